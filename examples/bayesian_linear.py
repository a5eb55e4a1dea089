"""Bayesian linear regression: where posterior and evidence are known
====================================================================

Of a linear model with Gaussian noise and a Gaussian prior, the posterior over the weights is a Gaussian that is known,
and so is the evidence. For every q::

    log p(y|X) = ELBO + KL(q(w) || p(w|X, y))

A mean-field q cannot follow the posterior's correlations. The best one has the posterior's mean and, on its diagonal,
the posterior's precisions (Bishop 2006, section 10.1.2), and leaves ``(sum_i log P_ii - log|P|) / 2`` nats of the
evidence, P being the precision matrix. With a low-rank factor q comes nearer, one column after the other, and arrives.

The data are 442 patients with ten correlated measurements (scikit-learn's diabetes).

::

    python examples/bayesian_linear.py --out out/bayesian_linear

Written to ``--out``: posterior.png and metrics.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from common import INK, plt
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn import functional as F

from vaefast.bayesian import MeanField

NOISE, PRIOR = 0.7, 0.5  # standard deviations, of a target whose own is 1


class Regression(NamedTuple):
    """Data, and what is known of them."""

    x: Tensor
    y: Tensor
    posterior: MultivariateNormal
    log_evidence: Tensor


def read() -> Regression:
    data = load_diabetes()
    x, y = torch.tensor(data.data), torch.tensor(data.target)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    one = torch.eye(x.shape[1], dtype=x.dtype)
    precision = x.T @ x / NOISE**2 + one / PRIOR**2
    posterior = MultivariateNormal(torch.linalg.solve(precision, x.T @ y / NOISE**2), precision_matrix=precision)
    marginal = PRIOR**2 * x @ x.T + NOISE**2 * torch.eye(len(x), dtype=x.dtype)
    return Regression(x, y, posterior, MultivariateNormal(torch.zeros_like(y), marginal).log_prob(y))


def model_of(data: Regression, rank: int = 0) -> MeanField:
    layer = nn.Linear(data.x.shape[1], 1, bias=False, dtype=data.x.dtype)
    return MeanField(layer, prior=(0.0, PRIOR), init=0.05, rank=rank)


def covariance(model: MeanField) -> Tensor:
    """Of q, ``[D, D]``."""
    found = torch.diag(F.softplus(model.rho.weight[0]).square())
    return found + model.factor.weight[0] @ model.factor.weight[0].T if model.rank else found


def elbo(model: MeanField, data: Regression) -> Tensor:
    """The exact one, nats of the whole data set: the expectation of a square is that of the mean and the variance."""
    error = (data.y - model.module(data.x)[:, 0]).square().sum() + torch.trace(data.x @ covariance(model) @ data.x.T)
    nll = 0.5 * error / NOISE**2 + len(data.y) * math.log(NOISE * math.sqrt(2 * math.pi))
    return -nll - model.kl()


def gap(model: MeanField, data: Regression) -> Tensor:
    """KL(q || p(w|X, y)), nats."""
    return kl_divergence(MultivariateNormal(model.module.weight[0], covariance(model)), data.posterior)


def least_gap(data: Regression) -> Tensor:
    """That of the best mean-field q."""
    precision = data.posterior.precision_matrix
    return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))


def climb(model: MeanField, data: Regression, rounds: int) -> None:
    """Ascent on the exact ELBO."""
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=50, history_size=50, tolerance_grad=1e-10, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -elbo(model, data)
        loss.backward()
        return loss

    for _ in range(rounds):
        optimizer.step(closure)


def train(model: MeanField, data: Regression, steps: int) -> None:
    """As networks are trained: minibatches, and the ELBO at a draw of the weights."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    logvar = torch.tensor(2 * math.log(NOISE), dtype=data.x.dtype)
    for _ in range(steps):
        rows = torch.randint(len(data.y), (64,))
        optimizer.zero_grad()
        output = model(data.x[rows])[:, 0]
        loss = model.elbo_loss((output, logvar), data.y[rows], dataset_size=len(data.y), likelihood="gaussian")
        loss.backward()
        optimizer.step()
        schedule.step()


def ellipse(mean: Tensor, cov: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:
    """Two standard deviations of two weights."""
    angle = torch.linspace(0, 2 * math.pi, 200, dtype=cov.dtype)
    root = torch.linalg.cholesky(cov[[i, j]][:, [i, j]])
    points = 2 * torch.stack((angle.cos(), angle.sin()), 1) @ root.T
    return mean[i] + points[:, 0], mean[j] + points[:, 1]


def picture(data: Regression, models: dict[str, MeanField], gaps: dict[int, float], out: Path) -> None:
    with plt.rc_context(common.STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
        p = data.posterior
        correlation = p.covariance_matrix / torch.outer(p.stddev, p.stddev)
        i, j = divmod(int(correlation.triu(1).abs().argmax()), len(correlation))
        names = load_diabetes().feature_names
        left.plot(*ellipse(p.mean, p.covariance_matrix, i, j), color=INK, label="posterior")
        for (name, model), color in zip(models.items(), ("#c8553d", "#e0a030", "#3a8f7b")):
            cov, mean = covariance(model).detach(), model.module.weight[0].detach()
            left.plot(*ellipse(mean, cov, i, j), "--", color=color, label=name)
        left.set(xlabel=f"weight of {names[i]}", ylabel=f"weight of {names[j]}", title="two weights, 2 sigma")
        left.legend(frameon=False)
        right.bar([str(rank) for rank in gaps], list(gaps.values()), color=INK)
        right.set(xlabel="rank", ylabel="nats", title="log evidence less the ELBO")
        common.save(figure, out)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the table, and returns its numbers."""
    parser = argparse.ArgumentParser(description="log p(y|X) = ELBO + KL(q || p(w|X, y)) on linear regression, in nats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=4, help="of 50 steps of L-BFGS")
    parser.add_argument("--steps", type=int, default=1000, help="of Adam, on minibatches at draws")
    parser.add_argument("--out", type=Path, default=Path("out/bayesian_linear"), help="of the picture and metrics.json")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    data = read()
    models = {"untrained": model_of(data), "mean field": model_of(data), "minibatches": model_of(data)}
    climb(models["mean field"], data, args.rounds)
    train(models["minibatches"], data, args.steps)
    for rank in (1, 2, 9):
        models[f"rank {rank}"] = model_of(data, rank)
        climb(models[f"rank {rank}"], data, args.rounds)
    print(f"{'nats':14}{'ELBO':>14}{'KL(q || post)':>15}{'sum':>14}{'log p(y|X)':>14}{'difference':>12}")
    rows = {}
    for name, model in models.items():
        with torch.no_grad():
            bound, rest = elbo(model, data), gap(model, data)
        difference = (bound + rest - data.log_evidence).item()
        rows[name] = {"elbo": bound.item(), "gap": rest.item(), "difference": difference}
        print(f"{name:14}{bound:14.6f}{rest:15.6f}{bound + rest:14.6f}{data.log_evidence:14.6f}{difference:12.1e}")
    print(f"the best mean-field q leaves {least_gap(data):.6f} nats")
    shown = {name: models[name] for name in ("mean field", "rank 2")}
    gaps = {0: rows["mean field"]["gap"], **{rank: rows[f"rank {rank}"]["gap"] for rank in (1, 2, 9)}}
    picture(data, shown, gaps, args.out / "posterior.png")
    metrics = {"log_evidence": data.log_evidence.item(), "least_gap": least_gap(data).item(), "q": rows}
    common.write(metrics, args)
    return metrics


if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices this small only wait for a second thread
    main()
