"""A VAE of counts: which likelihood fits?
=======================================

Counts, as in single-cell genomics, under three likelihoods.

The scans of handwritten digits are counts: each of their 64 numbers says how many of the 16 pixels of a 4 x 4 block
were set. Pixels play the genes and an image's ink, the sum of its counts, the library size; the model is scvi-tools'
(Lopez et al. 2018, Nature Methods 15, doi:10.1038/s41592-018-0229-2)::

    mu = ink * softmax(decoder(z)),    theta = exp(a parameter for each pixel),    pi_logits = dropout(z)

    poisson                              recon = log mu                   variance mu
    negative_binomial                    recon = (mu, theta)              variance mu + mu^2 / theta
    zero_inflated_negative_binomial      recon = (mu, theta, pi_logits)   and more zeros

The ink is given, to encoder and decoder, so all bounds are on log p(x | ink) and compare. These counts end at 16 and
pile up there, which none of the three can say; counts.png shows how each makes do.

::

    python examples/counts_vae.py --out out/counts
    python examples/counts_vae.py --out out/poisson --likelihood poisson

Written to ``--out``: reconstructions.png, samples.png, counts.png (how often each count comes, in the data and by the
models), kl.png (the latent units' KL) and metrics.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import common
import torch
from common import HIDDEN, LEVELS, PIXELS, Digits, plt
from torch import Tensor, nn

import vaefast
from vaefast.diagnostics import CollapseReport, collapse_report

LIKELIHOODS = {
    "poisson": "#e09f3e",
    "negative_binomial": "#30638e",
    "zero_inflated_negative_binomial": "#d1495b",
}


class CountsVAE(nn.Module):
    """Counts ``[B, 64]`` and back; what the likelihood does not take is not made."""

    def __init__(self, latent: int, likelihood: str) -> None:
        super().__init__()
        self.latent = latent
        self.likelihood = likelihood
        self.encoder = common.mlp(PIXELS, HIDDEN, HIDDEN, 2 * latent)
        self.decoder = common.mlp(latent, HIDDEN, HIDDEN, PIXELS)
        self.log_theta = nn.Parameter(torch.zeros(PIXELS)) if likelihood != "poisson" else None
        zero_inflated = likelihood == "zero_inflated_negative_binomial"
        self.dropout = common.mlp(latent, HIDDEN, PIXELS) if zero_inflated else None

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(torch.log1p(x)).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor, ink: Tensor) -> tuple[Tensor, ...]:
        """The likelihood's parameters; ink is ``[B, 1]``."""
        log_mu = ink.log() + self.decoder(z).log_softmax(dim=1)
        if self.log_theta is None:
            return (log_mu,)
        parameters = (log_mu.exp(), self.log_theta.exp())
        return parameters if self.dropout is None else (*parameters, self.dropout(z))

    def terms(self, x: Tensor, generator: torch.Generator | None = None) -> vaefast.ELBOTerms:
        mu, logvar = self.encode(x)
        z = vaefast.reparameterize(mu, logvar, generator=generator)
        return vaefast.elbo_terms(self.decode(z, ink_of(x)), x, mu, logvar, likelihood=self.likelihood)

    @torch.no_grad()
    def mean(self, z: Tensor, ink: Tensor) -> Tensor:
        """E[x|z], ``[B, 64]``."""
        return vaefast.likelihood_mean(self.decode(z, ink), self.likelihood)

    @torch.no_grad()
    def probabilities(self, x: Tensor, counts: Tensor) -> Tensor:
        """How often each of the counts comes under p(x|z), z drawn from q(z|x): a mean over images and pixels."""
        recon = self.decode(vaefast.reparameterize(*self.encode(x)), ink_of(x))

        def share(count: float) -> Tensor:
            all_alike = torch.full_like(x, count)
            nll = vaefast.reconstruction_loss(recon, all_alike, likelihood=self.likelihood, reduction="none")
            return torch.exp(-nll).mean()

        return torch.stack([share(count) for count in counts.tolist()])


def ink_of(x: Tensor) -> Tensor:
    return x.sum(dim=1, keepdim=True)


def train(digits: Digits, likelihood: str, args: argparse.Namespace) -> CountsVAE:
    torch.manual_seed(args.seed)
    model = CountsVAE(args.latent, likelihood).to(digits.train.device)
    scales = [] if model.log_theta is None else [model.log_theta]
    common.fit(
        [p for p in model.parameters() if p is not model.log_theta],
        scales,
        digits.train,
        lambda x: model.terms(x).loss,
        args,
        likelihood,
        lambda: f"held-out ELBO {common.evaluate(model.terms, digits.held_out, 1).elbo:.2f} nats",
    )
    return model


def short(likelihood: str) -> str:
    return likelihood.replace("_", " ").replace("zero inflated negative binomial", "ZINB")


@torch.no_grad()
def draw(
    models: dict[str, CountsVAE], digits: Digits, reports: dict[str, CollapseReport], args: argparse.Namespace
) -> None:
    x = common.some_of_each(digits, 2)
    rows = {"scan": x / LEVELS}
    for name, model in models.items():
        rows[short(name).replace(" ", "\n")] = model.mean(model.encode(x)[0], ink_of(x)) / LEVELS
    common.draw_rows(
        rows, "Held-out digits and the mean counts at the posterior mean", args.out / "reconstructions.png"
    )

    generator = torch.Generator().manual_seed(args.seed)
    z = torch.randn(48, args.latent, generator=generator).to(x.device)
    ink = ink_of(digits.train[:48])
    figure, panels = plt.subplots(len(models), 1, figsize=(8.4, 1.9 * len(models)), squeeze=False)
    for axes, (name, model) in zip(panels.flat, models.items()):
        common.show(axes, model.mean(z, ink) / LEVELS, 16)
        axes.set_title(f"{short(name)}: mean counts at z ~ N(0, I)", fontsize=10)
    common.save(figure, args.out / "samples.png")

    counts = torch.arange(LEVELS + 5)
    ticks = counts.tolist()
    figure, axes = plt.subplots(figsize=(8.4, 4.2))
    seen = torch.bincount(digits.held_out.flatten().long().cpu(), minlength=len(counts)) / digits.held_out.numel()
    axes.bar(ticks, seen.tolist(), color="#d6d3c8", label="held-out digits")
    for name, model in models.items():
        likely = model.probabilities(digits.held_out, counts)
        axes.plot(ticks, likely.tolist(), "o-", color=LIKELIHOODS[name], markersize=4, linewidth=1.4, label=short(name))
    axes.set(yscale="log", xlabel="set pixels in a block (of 16)", ylabel="share of blocks", xticks=ticks[::2])
    axes.set_title("How often each count comes")
    axes.legend(frameon=False)
    common.save(figure, args.out / "counts.png")

    figure, panels = plt.subplots(1, len(models), figsize=(4 * len(models), 3.6), sharey=True, squeeze=False)
    for axes, (name, report) in zip(panels.flat, reports.items()):
        report.plot(axes)
        axes.set_title(f"{short(name)}\n{axes.get_title()}", fontsize=10)
    common.save(figure, args.out / "kl.png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("Trains VAEs of counts under several likelihoods and compares them.", "out/counts", 100)
    parser.add_argument("--likelihood", choices=LIKELIHOODS, nargs="+", default=list(LIKELIHOODS), help="p(x|z)")
    parser.add_argument("--latent", type=common.positive, default=10, help="latent units")
    return common.parse(parser, argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    scans = common.read_digits(torch.device(args.device))
    digits = Digits(LEVELS * scans.train, LEVELS * scans.held_out, scans.held_out_class)
    models = {likelihood: train(digits, likelihood, args) for likelihood in args.likelihood}
    with torch.no_grad():
        reports = {name: collapse_report(*model.encode(digits.held_out)) for name, model in models.items()}
    draw(models, digits, reports, args)
    return {
        "epochs": args.epochs,
        "latent": args.latent,
        "seed": args.seed,
        "held_out": {name: asdict(common.evaluate(model.terms, digits.held_out)) for name, model in models.items()},
        "train": {name: asdict(common.evaluate(model.terms, digits.train)) for name, model in models.items()},
        "active_units": {name: report.number_active for name, report in reports.items()},
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, measures, draws; returns what metrics.json holds."""
    args = parse(argv)
    with common.settings(args):
        metrics = run(args)
    for part in ("held_out", "train"):
        print(f"\n{part.replace('_', '-')} digits")
        common.print_bounds({short(name): bound for name, bound in metrics[part].items()})
    active = ", ".join(f"{short(name)} {count}" for name, count in metrics["active_units"].items())
    print(f"\nactive units of {metrics['latent']}: {active}")
    common.write(metrics, args)
    return metrics


if __name__ == "__main__":
    main()
