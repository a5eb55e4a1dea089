"""Each kernel alone, on large tensors: its time, and how close it comes to a copy that moves as many bytes.

``python -m benchmarks.kernels --device cuda``. The operators below autograd are called directly, each of which is one
launch. What a kernel moves is counted in tensors, each read or written once. The names are those of predictions.json,
which ``make cuda-baseline`` writes for these kernels.

The records are written as they come. A kernel that loses the device ends the run with the status facts.LOST, one that
hangs is killed after HANGS seconds, and ``--resume`` goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vaefast
from benchmarks import facts, harness, run
from vaefast import Likelihood
from vaefast._options import REDUCTIONS
from vaefast.reference import DOMAINS, LIKELIHOODS, PARAMETERIZATIONS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
ELEMENTS = (1 << 24, 1 << 26)
ROUNDS = 7
HANGS = 30  # seconds
# logvar's number, no clamp, no floor
LOGVAR = (list(PARAMETERIZATIONS).index("logvar"), -math.inf, math.inf, 0.0)
SUM = REDUCTIONS.index("sum")
Call = Callable[[], Any]


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Args:
        name: operator and variant.
        inputs: how many tensors ``call`` takes, full size.
        moved: how many tensors it reads or writes; of a mixture's, whose target is smaller, those that are full size.
        call: from inputs and target to what is timed; the target lies in the likelihood's support.
        likelihood: whose support that is.
    """

    name: str
    inputs: int
    moved: int
    call: Callable[..., Call]
    likelihood: str = ""


def spec_of(likelihood: str) -> tuple[str, Sequence[float]]:
    """A likelihood as the operators below autograd take it."""
    return likelihood, Likelihood(likelihood).spec[1]


def posterior_forward(what: Collection[str]) -> Callable[..., Call]:
    def call(mu: Tensor, raw: Tensor, *more: Tensor | None) -> Call:
        sample, prior = "sample" in what, more[:2] if "prior" in what else (None, None)
        seed = torch.tensor([5, 0], device=mu.device) if sample else None
        q = (mu, raw, prior[0], 0.0, prior[1], 0.0, None, seed, None, *LOGVAR)
        return lambda: torch.ops.vaefast.posterior_forward(*q, SUM, None, sample, "kl" in what)

    return call


def posterior_backward(what: Collection[str]) -> Callable[..., Call]:
    def call(mu: Tensor, raw: Tensor, *more: Tensor | None) -> Call:
        sample, prior = "sample" in what, more[:2] if "prior" in what else (None, None)
        seed = torch.tensor([5, 0], device=mu.device) if sample else None
        q = (mu, raw, prior[0], 0.0, prior[1], 0.0, None, seed, *LOGVAR)
        upstream = (more[0] if sample else None, torch.ones((), device=mu.device) if "kl" in what else None)
        mask = [True, True, "prior" in what, "prior" in what]
        return lambda: torch.ops.vaefast.posterior_backward(*upstream, *q, SUM, None, mask)

    return call


def reconstruction_forward(name: str, count: int, grad: bool) -> Callable[..., Call]:
    def call(*tensors: Tensor) -> Call:
        params, target = list(tensors[:-1]), tensors[-1]
        spec = spec_of(name)
        return lambda: torch.ops.vaefast.reconstruction_forward(params, target, None, *spec, SUM, [grad] * count)

    return call


def reconstruction_backward(name: str, count: int) -> Callable[..., Call]:
    def call(*tensors: Tensor) -> Call:
        params, target = list(tensors[:-1]), tensors[-1]
        one, spec = torch.ones((), device=target.device), spec_of(name)
        return lambda: torch.ops.vaefast.reconstruction_backward(one, params, target, None, *spec, SUM, [True] * count)

    return call


def scale(kept: Tensor, target: None) -> Call:
    # not 1, which is skipped, and not so far from it that many calls overflow
    factor = torch.full((), 1 + 2.0**-20, device=kept.device, dtype=torch.float32)
    return lambda: torch.ops.vaefast.scale_([kept], factor)


def kernels() -> Iterator[Kernel]:
    for name, inputs, moved in (("sample", 2, 3), ("kl", 2, 2), ("kl, prior", 4, 4), ("sample, kl", 2, 3)):
        yield Kernel(f"posterior_forward {name}", inputs, moved, posterior_forward(name.split(", ")))
    for name, inputs, moved in (("sample", 3, 4), ("kl", 2, 4), ("kl, prior", 4, 8), ("sample, kl", 3, 5)):
        yield Kernel(f"posterior_backward {name}", inputs, moved, posterior_backward(name.split(", ")))
    for name, entry in LIKELIHOODS.items():
        targets = 0 if entry.planes else 1
        for count in range(entry.required, len(entry.params) + 1):
            for grad in (False, True):
                call = reconstruction_forward(name, count, grad)
                label = f"reconstruction_forward {name} {count}" + (", gradient" if grad else "")
                yield Kernel(label, count, count + targets + count * grad, call, name)
            call = reconstruction_backward(name, count)
            yield Kernel(f"reconstruction_backward {name} {count}", count, 2 * count + targets, call, name)
    yield Kernel("scale_", 1, 2, scale)


def target_of(name: str, params: Sequence[Tensor]) -> Tensor:
    """Data in the likelihood's support."""
    entry = LIKELIHOODS[name]
    if entry.support == "unit":
        return torch.rand_like(params[0])
    if entry.support == "real":
        return torch.randn_like(params[0])
    return entry.distribution(*(p.float() for p in params), **entry.options).sample().to(params[0].dtype)


def inputs_of(kernel: Kernel, elements: int, device: torch.device, dtype: torch.dtype) -> list[Tensor | None]:
    """Random numbers; for a likelihood, its parameters where they live, and data. A mixture has ten components."""
    entry = LIKELIHOODS.get(kernel.likelihood)
    shape: tuple[int, ...] = (elements,)
    if entry and entry.planes:
        planes = 10 * max(entry.planes.values())
        shape = (64, planes, max(1, elements // (64 * planes)))
    tensors = [torch.randn(shape, device=device, dtype=dtype) for _ in range(kernel.inputs)]
    if entry is None:
        return [*tensors, None]
    params = [DOMAINS[domain](t) for domain, t in zip(entry.domains, tensors)]
    return [*params, target_of(kernel.likelihood, params)]


def measure(
    kernel: Kernel, dtype: str, elements: int, time_calls: harness.Timer, device: torch.device
) -> dict[str, Any]:
    """The kernel's record; one that fails has an "error" in it instead of times."""
    moved = kernel.moved * elements * DTYPES[dtype].itemsize
    record: dict[str, Any] = {"kernel": kernel.name, "dtype": dtype, "elements": elements, "bytes": moved}
    try:
        step = kernel.call(*inputs_of(kernel, elements, device, DTYPES[dtype]))
        time_calls(step, 3)
        times = [time_calls(step, 5) for _ in range(ROUNDS)]
        copies = harness.copy_seconds(device, moved // 2, time_calls)
    except Exception as error:  # a kernel's failure is a result too
        return record | {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    seconds = statistics.median(times)
    return record | {"seconds": seconds, "bytes_per_second": moved / seconds, "of_copy": copies / seconds}


def table(records: Sequence[dict[str, Any]]) -> str:
    rows = [["kernel", "dtype", "elements", "us", "GB/s", "of copy"]]
    for r in records:
        found = [r["error"][:60], "", ""] if "error" in r else [
            run.number(r["seconds"], 1e-6), run.number(r["bytes_per_second"], 1e9), f"{r['of_copy']:.0%}"
        ]  # fmt: skip
        rows.append([r["kernel"], r["dtype"], str(r["elements"]), *found])
    return run.aligned(rows)


@dataclass(frozen=True)
class Job:
    """A kernel to measure."""

    kernel: Kernel
    dtype: str
    elements: int

    @property
    def key(self) -> dict[str, Any]:
        return {"kernel": self.kernel.name, "dtype": self.dtype, "elements": self.elements}

    def among(self, records: Sequence[dict[str, Any]]) -> bool:
        return any(self.key.items() <= record.items() for record in records)


def write(file: Path | None, records: Sequence[dict[str, Any]]) -> None:
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(records, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the kernels; 1 if one failed or no time was left, facts.LOST if one lost the device."""
    p = argparse.ArgumentParser(prog="benchmarks.kernels", description="each kernel alone against a copy")
    p.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    p.add_argument("--only", default="", metavar="REGEX", help="some kernels")
    p.add_argument("--elements", type=int, nargs="+", default=ELEMENTS, metavar="N")
    p.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, metavar="DTYPE", help=", ".join(DTYPES))
    p.add_argument(
        "--deadline", type=float, default=math.inf, metavar="SECONDS", help="begin no kernel later than this"
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="where the records go, as JSON")
    p.add_argument("--resume", action="store_true", help="keep what FILE holds and measure the rest")
    args = p.parse_args(argv)
    if args.device not in vaefast.available_backends():
        p.error(f"vaefast has no kernels for {args.device}\n{vaefast.show_config()}")
    end = time.monotonic() + args.deadline
    device = torch.device(args.device)
    time_calls = harness.timer(device, cold=args.device == "cuda")
    chosen = [kernel for kernel in kernels() if re.search(args.only, kernel.name)]
    jobs = [Job(kernel, dtype, n) for dtype in args.dtypes for n in args.elements for kernel in chosen]
    records = json.loads(args.out.read_text()) if args.resume and args.out and args.out.exists() else []
    left = [job for job in jobs if not job.among(records)]
    with torch.no_grad():
        while left and time.monotonic() < end:
            job = left.pop(0)
            write(args.out, [*records, job.key | {"error": "the process died"}])
            signal.alarm(HANGS if args.device == "cuda" else 0)
            records.append(measure(job.kernel, job.dtype, job.elements, time_calls, device))
            signal.alarm(0)
            write(args.out, records)
            if harness.lost(device):
                return facts.LOST
    print(table(records))
    shares = [r["of_copy"] for r in records if "error" not in r]
    half = f"half of them above {statistics.median(shares):.0%} of a copy's speed" if shares else "none of them well"
    print(f"kernels: {len(records)} of {len(jobs)} ran, {len(records) - len(shares)} failed, {half}")
    return int(len(shares) < len(jobs))


if __name__ == "__main__":
    raise SystemExit(main())
