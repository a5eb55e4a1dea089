"""Error bars from a Bayesian network
===================================

A network with one number in and one out, whose training data have a gap; and 442 patients with ten measurements, whose
disease a year later is to be told (scikit-learn's diabetes). Either has a posterior over its weights,
``vaefast.bayesian.MeanField``, and noise of a trained variance. ``predict`` splits the variance of what it says: what
is noise (aleatoric), and what the weights do not know (epistemic).

A mean-field posterior is known to be too sure between two clouds of data (Foong et al. 2019, arXiv:1906.11537), and so
it is here: its band widens outside of the data, and is narrower in the gap than beside it.

The patients' error bars are right if, of those held out, a share p lies within the intervals that are to have p of
them. Beside the posterior stands the same network without one, whose noise is trained, too. Nothing keeps that one from
fitting its 300 patients exactly, no weight decay and no early stopping, and then it is sure of them all.

::

    python examples/bayesian_regression.py --out out/bayesian_regression

Written to ``--out``: error_bars.png and metrics.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import common
import torch
from common import INK, plt
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.distributions import Normal

import vaefast
from vaefast.bayesian import MeanField

SHARES = tuple(i / 20 for i in range(1, 20))


class Data(NamedTuple):
    """Inputs ``[N, D]`` and targets ``[N]``."""

    x: Tensor
    y: Tensor
    held_out: Tensor
    held_out_y: Tensor


class Network(nn.Module):
    """The mean and the log variance of a number; the variance is one for all."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.logvar = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x)[:, 0], self.logvar


def gap() -> Data:
    x = torch.cat((torch.linspace(-2.0, -0.7, 40), torch.linspace(0.7, 2.0, 40)))
    grid = torch.linspace(-3.5, 3.5, 200)
    return Data(x[:, None], x**3 / 4 + 0.1 * torch.randn(len(x)), grid[:, None], grid**3 / 4)


def diabetes() -> Data:
    data = load_diabetes()
    x, y = (torch.tensor(t, dtype=torch.float32) for t in (data.data, data.target))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(common.SPLIT_SEED))
    train, held_out = order[:300], order[300:]
    x, y = ((t - t[train].mean(0)) / t[train].std(0) for t in (x, y))
    return Data(x[train], y[train], x[held_out], y[held_out])


def train(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], data: Data, args: argparse.Namespace) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs)
    for _ in range(args.epochs):
        optimizer.zero_grad()
        loss(data.x, data.y).backward()
        optimizer.step()
        schedule.step()


def posterior(data: Data, hidden: int, args: argparse.Namespace) -> MeanField:
    model = MeanField(Network(data.x.shape[1], hidden), prior=(0.0, 1.0), estimator="local", init=0.02)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return model.elbo_loss(model(x), y, dataset_size=len(y), likelihood="gaussian")

    train(model, loss, data, args)
    return model


def plain(data: Data, hidden: int, args: argparse.Namespace) -> Network:
    model = Network(data.x.shape[1], hidden)
    train(model, lambda x, y: vaefast.reconstruction_loss(model(x), y, likelihood="gaussian"), data, args)
    return model


def coverage(q: Normal, y: Tensor) -> list[float]:
    """The share of targets within the central interval of each of ``SHARES``."""
    within = 2 * (q.cdf(y) - 0.5).abs()
    return [(within <= share).double().mean().item() for share in SHARES]


def measures(q: Normal, y: Tensor) -> dict[str, Any]:
    covered = coverage(q, y)
    off = sum(abs(a - b) for a, b in zip(covered, SHARES)) / len(SHARES)
    return {
        "rmse": (q.mean - y).square().mean().sqrt().item(),
        "nll": -q.log_prob(y).mean().item(),
        "coverage_error": off,
        "coverage": covered,
    }


def picture(data: Data, prediction: Any, found: dict[str, dict[str, Any]]) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    x, mean = data.held_out[:, 0], prediction.mean
    total, known = (prediction.aleatoric + prediction.epistemic).sqrt(), prediction.epistemic.sqrt()
    for std, shade, label in ((total, 0.2, "with noise"), (known, 0.45, "weights alone")):
        left.fill_between(x, mean - 2 * std, mean + 2 * std, color="#e0a030", alpha=shade, linewidth=0, label=label)
    left.plot(x, data.held_out_y, color="#b9bfca", label="truth")
    left.plot(x, mean, color=INK)
    left.plot(data.x[:, 0], data.y, ".", color=INK, markersize=3)
    left.set(ylim=(-8, 8), title="a gap in the data, 2 sigma")
    left.legend(frameon=False, loc="upper left")
    right.plot([0, 1], [0, 1], color="#b9bfca", linewidth=1)
    for (name, of), color in zip(found.items(), ("#c8553d", INK)):
        right.plot(SHARES, of["coverage"], "o-", markersize=3, color=color, label=name)
    right.set(xlabel="share that is to lie within", ylabel="share that does", title="patients held out")
    right.legend(frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the table, draws the picture, and returns the numbers."""
    made = common.parser("error bars from a Bayesian network", "out/bayesian_regression", epochs=1000)
    made.set_defaults(lr=1e-2)
    args = common.parse(made, argv)
    with common.settings(args):
        torch.manual_seed(args.seed)
        line, patients = gap(), diabetes()
        on_line = posterior(line, 50, args).predict(line.held_out, likelihood="gaussian", num_samples=200)
        mean, logvar = (t.detach() for t in plain(patients, 50, args)(patients.held_out))
        said = posterior(patients, 50, args).predict(patients.held_out, likelihood="gaussian", num_samples=200)
        q = {
            "plain": Normal(mean, (0.5 * logvar).exp()),
            "posterior": Normal(said.mean, (said.aleatoric + said.epistemic).sqrt()),
        }
        found = {name: measures(each, patients.held_out_y) for name, each in q.items()}
        print(f"{'patients':12}{'rmse':>8}{'nll':>8}{'coverage error':>16}")
        for name, m in found.items():
            print(f"{name:12}{m['rmse']:8.3f}{m['nll']:8.3f}{m['coverage_error']:16.3f}")
        x = line.held_out[:, 0].abs()
        places = {"within the data": (x > 0.7) & (x < 2), "in the gap": x < 0.5, "outside": x > 3}
        stds = {name: on_line.epistemic[where].sqrt().mean().item() for name, where in places.items()}
        print("epistemic sigma: " + ", ".join(f"{std:.3f} {name}" for name, std in stds.items()))
        common.save(picture(line, on_line, found), args.out / "error_bars.png")
        metrics = {"patients": found, "epistemic": stds}
        common.write(metrics, args)
    return metrics


if __name__ == "__main__":
    main()
