"""Bayesian networks of other libraries beside ``vaefast.bayesian.MeanField`` on the same networks: a training step's
time, what it keeps for backward, and the most memory that it holds.

``python -m benchmarks.bayesian``, in the environment that ``make test-pypi`` makes; what is missing is left out.
All weights and biases have a posterior, the batch one draw, and the KL its own formula. The steps take turns, so that
what else a machine does falls on all. ``network alone`` has no posterior: what a step takes and keeps beyond it is
sampling and KL, whose ratios come second.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import kept_bytes, peak_bytes
from vaefast.bayesian import MeanField

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


def alone_of(network: nn.Module) -> tuple[nn.Module, Loss]:
    return network, lambda x, y: F.cross_entropy(network(x), y)


def vaefast_of(network: nn.Module) -> tuple[nn.Module, Loss]:
    model = MeanField(network, where="all", prior=(0.0, 1.0), init=0.02)
    return model, lambda x, y: model.elbo_loss(model(x), y, dataset_size=EXAMPLES, likelihood="categorical")


def bayesian_torch_of(network: nn.Module) -> tuple[nn.Module, Loss]:
    of_models = importlib.import_module("bayesian_torch.models.dnn_to_bnn")
    options = {
        "prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.9,
        "type": "Reparameterization", "moped_enable": False,
    }  # fmt: skip
    of_models.dnn_to_bnn(network, options)
    return network, lambda x, y: F.cross_entropy(network(x), y) + of_models.get_kl_loss(network) / EXAMPLES


def blitz_of(network: nn.Module) -> tuple[nn.Module, Loss]:
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
    return model, lambda x, y: F.cross_entropy(model(x), y) + kl_of(model) / EXAMPLES


ALONE = "network alone"
LIBRARIES: dict[str, Callable[[nn.Module], tuple[nn.Module, Loss]]] = {
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
            model, loss = of(make())
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    print(f"{'network':18}{'batch':>6}  {'library':16}{'ms':>9}{'kept MB':>9}{'peak MB':>9}   whole, sampling and KL")
    for network, (make, batches) in NETWORKS.items():
        for batch in batches:
            found = compare(make, batch, args.rounds)
            ours, alone = found["vaefast"], found[ALONE]
            for name, row in found.items():
                ratios = ""
                if name not in (ALONE, "vaefast"):
                    whole = {key: row[key] / ours[key] for key in row}
                    part = {key: (row[key] - alone[key]) / (ours[key] - alone[key]) for key in row}
                    ratios = "   ".join(f"{key} {whole[key]:.2f}, {part[key]:.2f}" for key in row)
                print(
                    f"{network:18}{batch:6}  {name:16}{1e3 * row['seconds']:9.2f}"
                    f"{row['kept'] / 1e6:9.2f}{row['peak'] / 1e6:9.2f}   {ratios}"
                )


if __name__ == "__main__":
    main()
