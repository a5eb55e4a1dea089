"""A Bayesian network beside a plain one and an ensemble
======================================================

Handwritten digits, of which the networks know 0 to 7, and 400 examples of them; 8 and 9 are what they have never seen.
One network in four ways, each with as many steps in all: plain; five of them, with a fifth of the steps each, whose
probabilities are averaged (Lakshminarayanan et al. 2017, arXiv:1612.01474); and with a posterior over its weights,
``vaefast.bayesian.MeanField``, with the ELBO's KL and with a tenth of it (a cold posterior, Wenzel et al. 2020,
arXiv:2002.02405).

Held-out digits are shown as they are, and under noise. Of each network: accuracy; the nll; the calibration error, how
far confidence is from accuracy (Guo et al. 2017, arXiv:1706.04599), in ten bins; and how well the entropy of its
prediction tells the unknown digits from the known ones (the area under the ROC curve).

What comes out, of so few examples: the posterior is right the most often under noise, and a little better than the
others at the unknown digits. It is too modest about what it knows: with the ELBO's own KL its confidence is far below
its accuracy. A tenth of the KL takes most of that away, and is at the ensemble's height under noise. The plain network
is the best calibrated one on clean digits, and the worst at noise.

::

    python examples/bayesian_digits.py --out out/bayesian_digits

Written to ``--out``: reliability.png and metrics.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import common
import torch
from common import INK, LEVELS, PIXELS, plt
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from vaefast.bayesian import MeanField

EXAMPLES, KNOWN, MEMBERS, BINS, NOISE = 400, 8, 5, 10, 0.4
Predict = Callable[[Tensor], Tensor]


class Data(NamedTuple):
    """Scans ``[N, 64]`` in [0, 1] and their classes."""

    x: Tensor
    y: Tensor
    held_out: Tensor
    held_out_class: Tensor
    noisy: Tensor
    unknown: Tensor


def read(device: torch.device) -> Data:
    digits = load_digits()
    x, y = torch.tensor(digits.data / LEVELS, dtype=torch.float32), torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(common.SPLIT_SEED)
    known = torch.nonzero(y < KNOWN)[:, 0]
    known = known[torch.randperm(len(known), generator=generator)]
    train, held_out = known[:EXAMPLES], known[EXAMPLES:]
    noisy = (x[held_out] + NOISE * torch.randn(len(held_out), PIXELS, generator=generator)).clamp(0, 1)
    return Data(*(t.to(device) for t in (x[train], y[train], x[held_out], y[held_out], noisy, x[y >= KNOWN])))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(PIXELS, 64), nn.ReLU(), nn.Linear(64, KNOWN))


def train(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], data: Data, args: argparse.Namespace, epochs: int
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    steps = max(1, epochs) * math.ceil(len(data.x) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps)
    for _ in range(max(1, epochs)):
        for rows in torch.randperm(len(data.x)).split(args.batch_size):
            optimizer.zero_grad()
            loss(data.x[rows], data.y[rows]).backward()
            optimizer.step()
            schedule.step()


def plain(data: Data, args: argparse.Namespace, epochs: int) -> nn.Module:
    model = network().to(data.x.device)
    train(model, lambda x, y: F.cross_entropy(model(x), y), data, args, epochs)
    return model


def bayesian(data: Data, args: argparse.Namespace, beta: float) -> MeanField:
    model = MeanField(network(), prior=(0.0, 0.5), init=0.02, estimator="flipout").to(data.x.device)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return model.elbo_loss(model(x), y, dataset_size=len(data.x), likelihood="categorical", beta=beta)

    train(model, loss, data, args, args.epochs)
    return model


def averaged(models: Sequence[nn.Module]) -> Predict:
    def predict(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack([model(x).softmax(1) for model in models]).mean(0)

    return predict


def posterior_mean(model: MeanField, draws: int) -> Predict:
    return lambda x: model.predict(x, likelihood="categorical", num_samples=draws).mean


def reliability(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each bin of confidence: the share of examples, the mean confidence, the accuracy; NaN where there are none."""
    confidence, chosen = p.max(1)
    right = (chosen == y).to(p.dtype)
    at = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    count = torch.bincount(at, minlength=BINS).to(p.dtype)
    mean, accuracy = (torch.bincount(at, weights=w, minlength=BINS) / count for w in (confidence, right))
    return count / len(y), mean, accuracy


def calibration_error(p: Tensor, y: Tensor) -> float:
    share, confidence, accuracy = reliability(p, y)
    return (share * (confidence - accuracy).abs()).nansum().item()


def entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(1)


def area_under_roc(low: Tensor, high: Tensor) -> float:
    """How often a score of ``high`` is above one of ``low``; ties count half."""
    difference = high[:, None] - low
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()


def measures(predict: Predict, data: Data) -> dict[str, float]:
    p, noisy, unknown = (predict(x) for x in (data.held_out, data.noisy, data.unknown))
    y = data.held_out_class
    return {
        "accuracy": (p.argmax(1) == y).double().mean().item(),
        "nll": F.nll_loss(p.log(), y).item(),
        "calibration_error": calibration_error(p, y),
        "noisy_accuracy": (noisy.argmax(1) == y).double().mean().item(),
        "noisy_nll": F.nll_loss(noisy.log(), y).item(),
        "noisy_calibration_error": calibration_error(noisy, y),
        "unknown_auroc": area_under_roc(entropy(p), entropy(unknown)),
    }


def picture(predictions: dict[str, Predict], data: Data) -> Any:
    figure, panels = plt.subplots(2, len(predictions), figsize=(2.9 * len(predictions), 5.6), squeeze=False)
    for (name, predict), (top, bottom) in zip(predictions.items(), panels.T):
        top.plot([0, 1], [0, 1], color="#b9bfca", linewidth=1)
        for x, label, color in ((data.held_out, "clean", INK), (data.noisy, "noisy", "#c8553d")):
            _, confidence, accuracy = reliability(predict(x), data.held_out_class)
            top.plot(confidence.cpu(), accuracy.cpu(), "o-", markersize=4, color=color, label=label)
        top.set(title=name, xlabel="confidence", xlim=(0, 1), ylim=(0, 1.02))
        bins = [math.log(KNOWN) * i / 20 for i in range(21)]
        for x, label, color in ((data.held_out, "0 to 7", INK), (data.unknown, "8 and 9, never seen", "#e0a030")):
            bottom.hist(entropy(predict(x)).cpu().numpy(), bins, density=True, alpha=0.6, color=color, label=label)
        bottom.set(xlabel="entropy, nats", yticks=[])
    panels[0, 0].set_ylabel("accuracy")
    for axes in panels[:, 0]:
        axes.legend(frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the table, draws the diagrams, and returns the numbers."""
    made = common.parser("a Bayesian network beside a plain one and an ensemble", "out/bayesian_digits", epochs=60)
    made.set_defaults(lr=1e-2)
    made.add_argument("--draws", type=common.positive, default=32, help="of the weights, to predict with")
    args = common.parse(made, argv)
    with common.settings(args):
        torch.manual_seed(args.seed)
        data = read(torch.device(args.device))
        members = [plain(data, args, args.epochs // MEMBERS) for _ in range(MEMBERS)]
        predictions = {
            "plain": averaged([plain(data, args, args.epochs)]),
            f"{MEMBERS} networks": averaged(members),
            "posterior": posterior_mean(bayesian(data, args, beta=1.0), args.draws),
            "cold posterior": posterior_mean(bayesian(data, args, beta=0.1), args.draws),
        }
        found = {name: measures(predict, data) for name, predict in predictions.items()}
        heads = f"{'nll':>8}{'error':>8}"
        print(f"{'':16}{'accuracy':>10}{heads}{'noisy':>10}{heads}{'unknown: auroc':>18}")
        for name, m in found.items():
            print(
                f"{name:16}{m['accuracy']:10.3f}{m['nll']:8.3f}{m['calibration_error']:8.3f}"
                f"{m['noisy_accuracy']:10.3f}{m['noisy_nll']:8.3f}{m['noisy_calibration_error']:8.3f}"
                f"{m['unknown_auroc']:18.3f}"
            )
        common.save(picture(predictions, data), args.out / "reliability.png")
        metrics = {"held_out": found, "examples": EXAMPLES, "draws": args.draws}
        common.write(metrics, args)
    return metrics


if __name__ == "__main__":
    main()
