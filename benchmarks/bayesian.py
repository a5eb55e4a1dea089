"""Bayesian networks of other libraries beside ``vaefast.bayesian.MeanField`` on the same networks: a training step's
time, what it keeps for backward, and the most memory that it holds.

Then :class:`vaefast.bayesian.IVON` beside PyTorch's fused Adam: the step, and all of an iteration but forward and
backward: a draw, its gradients taken in, the weights put back, and the step.

``python -m benchmarks.bayesian``, in the environment that ``make test-pypi`` makes; what is missing is left out.
All weights and biases have a posterior, the batch one draw, and the KL its own formula. The steps take turns, so that
what else a machine does falls on all. ``network alone`` has no posterior: what a step takes and keeps beyond it is
sampling and KL, whose ratios come second.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vaefast
from benchmarks import facts, report, run
from benchmarks.harness import kept_bytes, peak_bytes
from vaefast.bayesian import IVON, MeanField

EXAMPLES = 60_000
Loss = Callable[[Tensor, Tensor], Tensor]


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def mlp() -> nn.Sequential:
    """10 million weights."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 2400), nn.ReLU(), nn.Linear(2400, 2400), nn.ReLU(), nn.Linear(2400, 1000),
        nn.ReLU(), nn.Linear(1000, 10),
    )  # fmt: skip


def alone_of(network: nn.Module, examples: int) -> tuple[nn.Module, Loss]:
    return network, lambda x, y: F.cross_entropy(network(x), y)


def vaefast_of(network: nn.Module, examples: int) -> tuple[nn.Module, Loss]:
    model = MeanField(network, where="all", prior=(0.0, 1.0), init=0.02)
    return model, lambda x, y: model.elbo_loss(model(x), y, dataset_size=examples, likelihood="categorical")


def bayesian_torch_of(network: nn.Module, examples: int) -> tuple[nn.Module, Loss]:
    of_models = importlib.import_module("bayesian_torch.models.dnn_to_bnn")
    options = {
        "prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.9,
        "type": "Reparameterization", "moped_enable": False,
    }  # fmt: skip
    of_models.dnn_to_bnn(network, options)
    return network, lambda x, y: F.cross_entropy(network(x), y) + of_models.get_kl_loss(network) / examples


def blitz_of(network: nn.Module, examples: int) -> tuple[nn.Module, Loss]:
    modules = importlib.import_module("blitz.modules")
    kl_of = importlib.import_module("blitz.losses").kl_divergence_from_nn
    layers = []
    for layer in network.children():
        if isinstance(layer, nn.Linear):
            layer = modules.BayesianLinear(layer.in_features, layer.out_features, prior_sigma_1=1.0)
        elif isinstance(layer, nn.Conv2d):
            layer = modules.BayesianConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, prior_sigma_1=1.0
            )  # fmt: skip
        layers.append(layer)
    model = nn.Sequential(*layers)
    return model, lambda x, y: F.cross_entropy(model(x), y) + kl_of(model) / examples


ALONE = "network alone"
LIBRARIES: dict[str, Callable[[nn.Module, int], tuple[nn.Module, Loss]]] = {
    ALONE: alone_of, "vaefast": vaefast_of, "bayesian-torch": bayesian_torch_of, "blitz": blitz_of,
}  # fmt: skip
NETWORKS = {"LeNet": (lenet, (1, 64)), "MLP of 10 million": (mlp, (1, 64))}


def compare(make: Callable[[], nn.Module], batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds, bytes kept and bytes at the peak of a step, forward and backward, by library."""
    x, y = torch.rand(batch, 1, 28, 28), torch.randint(0, 10, (batch,))
    steps: dict[str, Callable[[], None]] = {}
    found: dict[str, dict[str, float]] = {}
    for name, of in LIBRARIES.items():
        try:
            model, loss = of(make(), EXAMPLES)
        except ImportError:
            continue

        def step(model: nn.Module = model, loss: Loss = loss) -> None:
            model.zero_grad(set_to_none=True)
            loss(x, y).backward()

        for _ in range(2):
            step()
        model.zero_grad(set_to_none=True)
        found[name] = {
            "kept": kept_bytes(functools.partial(loss, x, y), (*model.parameters(), x, y)),
            "peak": peak_bytes(step, x.device),
        }
        steps[name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    for name in steps:
        found[name]["seconds"] = statistics.median(times[name])
    return found


def accuracies(seeds: int, epochs: int, draws: int = 16) -> dict[str, list[float]]:
    """Of scikit-learn's digits, enlarged to 28 x 28, the share of held-out ones that a LeNet's mean prediction over so
    many draws gets right, by library and seed; of the network alone, its own."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = F.interpolate(torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1), size=28)
    y = torch.tensor(digits.target)
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        train, held_out = torch.randperm(len(x)).split((1400, len(x) - 1400))
        for name, of in LIBRARIES.items():
            torch.manual_seed(seed)
            try:
                model, loss = of(lenet(), len(train))
            except ImportError:
                continue
            optimizer = torch.optim.Adam(model.parameters(), 2e-3)
            for _ in range(epochs):
                for rows in torch.randperm(len(train)).split(64):
                    optimizer.zero_grad()
                    loss(x[train[rows]], y[train[rows]]).backward()
                    optimizer.step()
            with torch.no_grad():
                p = sum(model(x[held_out]).softmax(1) for _ in range(1 if name == ALONE else draws))
            right = (torch.as_tensor(p).argmax(1) == y[held_out]).float().mean()
            found.setdefault(name, []).append(right.item())
    return found


ADAM = "fused Adam"
WEIGHTS = {
    "100 in two": (50, 50),
    "LeNet's": (156, 2416, 30840, 10164, 850),
    "a million": (10**6,),
    "10 million": (10**6,) * 10,
}


def optimizers(sizes: Sequence[int], rounds: int) -> dict[str, float]:
    """Seconds of a step of each, by turns."""
    params = [nn.Parameter(0.02 * torch.randn(n)) for n in sizes]
    gradients = [0.01 * torch.randn(n) for n in sizes]

    def give() -> None:
        for p, g in zip(params, gradients):
            p.grad = g

    give()
    adam, ivon, unfused = (
        torch.optim.Adam(params, fused=True),
        IVON(params, 1e-3, EXAMPLES),
        IVON(params, 1e-3, EXAMPLES),
    )
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        times.setdefault(name, []).append(time.perf_counter() - start)

    for _ in range(rounds):
        timed(ADAM, adam.step)
        for name, optimizer, backend in (("IVON", ivon, "auto"), ("IVON without kernels", unfused, "reference")):
            with vaefast.use_backend(backend):
                start = time.perf_counter()
                with optimizer.sampled_params(train=True):
                    give()
                drawn = time.perf_counter() - start
                timed(name, optimizer.step)
            times.setdefault(f"{name}, whole", []).append(drawn + times[name][-1])
    return {name: statistics.median(each[2:]) for name, each in times.items()}


# ---- what is told


def network_table(document: dict[str, Any]) -> str:
    """Each library's step, and how many times vaefast's its time is, that of sampling and KL, and what is kept."""
    lines = [
        "| network, batch | layers | a step | vaefast's | times as long | sampling and KL | kept for them |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["networks"]:
        found = row["libraries"]
        ours, alone = found["vaefast"], found[ALONE]
        for name, theirs in found.items():
            if name in ("vaefast", ALONE):
                continue
            part = {key: (theirs[key] - alone[key]) / (ours[key] - alone[key]) for key in theirs}
            lines.append(
                f"| {row['network']}, {row['batch']} | {name} | {1e3 * theirs['seconds']:.1f} ms "
                f"| {1e3 * ours['seconds']:.1f} ms | {theirs['seconds'] / ours['seconds']:.1f} "
                f"| {part['seconds']:.1f} | {part['kept']:.1f} |"
            )
    return "\n".join(lines)


def accuracy_table(document: dict[str, Any]) -> str:
    lines = ["| LeNet of | held-out digits right | seeds |", "|---|---|---|"]
    for name, each in document["accuracies"].items():
        spread = f" ± {statistics.stdev(each):.2%}" if len(each) > 1 else ""
        lines.append(f"| {name} | {statistics.mean(each):.2%}{spread} | {len(each)} |")
    return "\n".join(lines)


def ivon_table(document: dict[str, Any]) -> str:
    """Times of Adam's."""
    lines = [
        "| weights | fused Adam | IVON's step | with its draw | without kernels | with its draw |",
        "|---|---|---|---|---|---|",
    ]
    for weights, seconds in document["optimizers"].items():
        adam = seconds[ADAM]
        others = [s / adam for name, s in seconds.items() if name != ADAM]
        lines.append(f"| {weights} | {1e3 * adam:.2f} ms | " + " | ".join(f"{x:.2f}x" for x in others) + " |")
    return "\n".join(lines)


def pages(document: dict[str, Any]) -> dict[tuple[Path, str], list[str]]:
    """What stands where."""
    told = report.heading(document) + "."
    docs = report.ROOT / "docs"
    return {
        (docs / "coming-from" / "bayesian-torch.md", "layers"): [
            told, network_table(document), accuracy_table(document),
        ],
        (docs / "guides" / "bayesian-networks.md", "ivon"): [told, ivon_table(document)],
    }  # fmt: skip


def measure(rounds: int, seeds: int, epochs: int = 15) -> dict[str, Any]:
    torch.manual_seed(0)
    info = run.machine(torch.device("cpu"))
    networks = [
        {"network": name, "batch": batch, "libraries": compare(make, batch, rounds)}
        for name, (make, batches) in NETWORKS.items()
        for batch in batches
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": facts.commit(),
        "machine": info,
        "networks": networks,
        "accuracies": accuracies(seeds, epochs),
        "optimizers": {name: optimizers(sizes, 4 * rounds) for name, sizes in WEIGHTS.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=5, help="networks that each library trains for its accuracy")
    parser.add_argument("--out", type=Path, help="a file for the figures")
    parser.add_argument("--fill", type=Path, help="no measuring: tables of such a file into the pages that hold them")
    args = parser.parse_args(argv)
    if args.fill:
        for (page, name), tables in pages(json.loads(args.fill.read_text())).items():
            report.filled(page, name, tables)
        return 0
    document = measure(args.rounds, args.seeds)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    for tables in pages(document).values():
        print("\n\n".join(tables), end="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
