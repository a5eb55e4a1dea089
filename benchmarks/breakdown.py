"""Where a training step of a small VAE goes: its networks, the sample and the loss, Adam.

``python -m benchmarks.breakdown``. The parts are those of the workload ``train-step``. Backward is one call, as in
training; autograd runs its nodes last made first, so that the loss's are over when the decoder's first begins, and so
on: a hook before the first node of each part tells the time. Steps of eager and of vaefast alternate, taken apart and,
to show that looking costs little, whole.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import facts, harness, report, run
from benchmarks.harness import Case
from benchmarks.workloads import TRAINED, WORKLOADS, decoder, encoder

WARM_UP = 10
WORKLOAD = "train-step"
Parts = dict[str, float]


def taken_apart(case: Case, provider: str) -> Callable[[], Parts]:
    """A training step that returns the seconds of its parts."""
    x, weights, optimizer = case.training()
    draw, loss = TRAINED[provider]
    now = time.perf_counter

    def step() -> Parts:
        begun: dict[str, float] = {}

        def tell(name: str, tensor: Tensor) -> None:
            def hook(gradients: Any) -> None:
                begun[name] = now()

            assert tensor.grad_fn is not None
            tensor.grad_fn.register_prehook(hook)

        start = now()
        optimizer.zero_grad()
        zeroed = now()
        mu, logvar = encoder(x, weights)
        encoded = now()
        z = draw(mu, logvar)
        drawn = now()
        recon = decoder(z, weights)
        decoded = now()
        value = loss(recon, x, mu, logvar)
        valued = now()
        for name, tensor in (("decoder", recon), ("sample", z), ("encoder", mu)):
            tell(name, tensor)
        hooked = now()
        value.backward()
        returned = now()
        optimizer.step()
        return {
            "zero_grad": zeroed - start,
            "networks, forward": encoded - zeroed + decoded - drawn,
            "sample and loss, forward": drawn - encoded + valued - decoded,
            "sample and loss, backward": begun["decoder"] - hooked + begun["encoder"] - begun["sample"],
            "networks, backward": begun["sample"] - begun["decoder"] + returned - begun["encoder"],
            "Adam": now() - returned,
        }

    return step


def summary(seconds: Sequence[float]) -> dict[str, float]:
    return {name: float(np.percentile(seconds, p)) for name, p in (("median", 50), ("p20", 20), ("p80", 80))}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """The parts of a step and the whole of another, by provider."""
    time_calls = harness.timer(case.device)
    apart = {name: taken_apart(case, name) for name in TRAINED}
    whole = {name: case.step(getattr(case.workload, name)) for name in TRAINED}
    parts: dict[str, list[Parts]] = {name: [] for name in TRAINED}
    wholes: dict[str, list[float]] = {name: [] for name in TRAINED}
    names = list(TRAINED)
    torch.manual_seed(0)
    with harness.no_gc():
        for _ in range(WARM_UP + rounds):
            names.append(names.pop(0))
            for name in names:
                parts[name].append(apart[name]())
                wholes[name].append(time_calls(whole[name], 1))
    return {
        "workload": case.workload.name,
        "sizes": case.sizes,
        "rounds": rounds,
        "parts": {
            part: {name: summary([p[part] for p in parts[name][WARM_UP:]]) for name in TRAINED}
            for part in next(iter(parts.values()))[0]
        },
        "whole": {name: summary(wholes[name][WARM_UP:]) for name in TRAINED},
    }


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="benchmarks.breakdown", description="where a small VAE's training step goes")
    p.add_argument("--rounds", type=int, default=500, metavar="N", help="steps of each kind (default 500)")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    p.add_argument("--out", type=Path, metavar="FILE", help="where the figures go, as JSON")
    args = p.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    document = {
        "date": datetime.date.today().isoformat(),
        "commit": facts.commit(),
        "machine": run.machine(device),
        "breakdown": measure(Case(WORKLOADS[WORKLOAD], "fb", device), args.rounds),
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{run.aligned(report.breakdown_rows(document))}\n\n{report.heading(document)}, commit {document['commit']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
