"""A VAE's prior: N(0, I), a mixture, a VampPrior
==============================================

One network, three priors, and the evidence of digits that it never saw. And a beta-TCVAE, whose latents come apart.

With two latents the aggregate posterior of handwritten digits lies in clusters, and N(0, I) does not: what is drawn
from between them is no digit. A mixture of Gaussians that is trained with the model, and the VampPrior
(Tomczak & Welling 2018, arXiv:1705.07120), whose components are the posteriors of pseudo-inputs, follow it. ``prior=``
takes them; the KL to them is estimated at the sample. The evidence of each model is estimated by importance sampling
from its posterior,

    log p(x) ~ log 1/S sum_s p(x|z_s) p(z_s) / q(z_s|x)

which is too small in the mean, and less so than the ELBO (Burda et al. 2016, arXiv:1509.00519, equation 8). The pixels
are whole numbers under a discretized logistic, so that p(x) is a probability.

The beta-TCVAE (Chen et al. 2018, arXiv:1802.04942) weighs one part of the KL, the total correlation of the latents.

::

    python examples/priors_vae.py --out out/priors

Written to ``--out``: priors.png (the latents under each prior, and digits drawn from it), traversals.png (along the
latents of a VAE and a beta-TCVAE) and metrics.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from common import HIDDEN, LEVELS, PIXELS, Digits, plt
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import vaefast
from vaefast.priors import GaussianMixturePrior, VampPrior

NORMAL, MIXTURE, VAMP = "N(0, I)", "mixture", "VampPrior"
WALKED, STEPS, REACH = 6, 12, 2.5
LIKELIHOOD = vaefast.Likelihood("discretized_logistic", bins=LEVELS + 1)


class VAE(nn.Module):
    """The networks, and a prior of so many components. The decoder gives every pixel a mean and a log scale."""

    def __init__(self, latent: int, prior: str, components: int, scans: Tensor) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = common.mlp(PIXELS, HIDDEN, HIDDEN, 2 * latent)
        self.decoder = common.mlp(latent, HIDDEN, HIDDEN, 2 * PIXELS)
        self.prior: Any = None
        if prior == MIXTURE:
            self.prior = GaussianMixturePrior(components, latent)
        elif prior == VAMP:
            self.prior = VampPrior(scans[:components], self.encode_clamped)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def encode_clamped(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Of pseudo-inputs, whose values are to stay those of pixels."""
        return self.encode(u.clamp(-1.0, 1.0))

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self.decoder(z).chunk(2, dim=-1)
        return mean, log_scale

    @torch.no_grad()
    def picture(self, z: Tensor) -> Tensor:
        """The mean of p(x|z) in [0, 1]."""
        return (vaefast.likelihood_mean(self.decode(z), LIKELIHOOD) + 1) / 2

    def terms(self, x: Tensor, generator: torch.Generator | None = None) -> vaefast.ELBOTerms:
        z, kl = vaefast.sample_with_kl(*self.encode(x), prior=self.prior, generator=generator)
        return vaefast.ELBOTerms.of(vaefast.reconstruction_loss(self.decode(z), x, likelihood=LIKELIHOOD), kl, 1.0)

    def log_prior(self, z: Tensor) -> Tensor:
        if self.prior is None:
            return Independent(Normal(torch.zeros_like(z), 1.0), 1).log_prob(z)
        found: Tensor = self.prior.log_prob(z)
        return found

    def draw(self, count: int, seed: int) -> Tensor:
        """Pictures ``[count, 64]``, the decoder's mean at draws from the prior."""
        generator = torch.Generator(self.decoder[0].weight.device).manual_seed(seed)
        if self.prior is None:
            z = torch.randn(count, self.latent, generator=generator, device=generator.device)
        else:
            z = self.prior.sample(count, generator=generator)
        return self.picture(z)


def beta_tcvae(model: VAE, x: Tensor, beta: float, dataset_size: int) -> Tensor:
    mu, logvar = model.encode(x)
    z = vaefast.reparameterize(mu, logvar)
    return vaefast.beta_tcvae_loss(
        model.decode(z), x, z, mu, logvar, dataset_size, likelihood=LIKELIHOOD, beta=beta
    )  # fmt: skip


@torch.no_grad()
def log_evidence(model: VAE, x: Tensor, samples: int, chunk: int = 64) -> Tensor:
    """log p(x) of each of x in nats, estimated with so many samples of the posterior."""
    mu, logvar = model.encode(x)
    q = vaefast.distributions.Normal(mu, logvar=logvar)
    parts = []
    for k in range(0, samples, chunk):
        z = vaefast.reparameterize(mu, logvar, num_samples=min(chunk, samples - k))
        recon = model.decode(z)
        nll = vaefast.reconstruction_loss(
            recon, x.expand_as(recon[0]), likelihood=LIKELIHOOD, reduction="per_sample", batch_dims=2
        )
        parts.append(model.log_prior(z) - nll - q.log_prob(z).sum(-1))
    return torch.logsumexp(torch.cat(parts), 0) - math.log(samples)


@torch.no_grad()
def parts_of_the_kl(model: VAE, x: Tensor) -> dict[str, float]:
    """Over all of x at once, which are then the whole data set."""
    mu, logvar = model.encode(x)
    found = vaefast.total_correlation(vaefast.reparameterize(mu, logvar), mu, logvar, len(x), estimator="mss")
    return {name: value.item() for name, value in found._asdict().items()}


def train(digits: Digits, name: str, latent: int, args: argparse.Namespace) -> VAE:
    """``name`` is a prior's, or else the beta-TCVAE's."""
    torch.manual_seed(args.seed)
    model = VAE(latent, name, args.components, digits.train).to(digits.train.device)
    if name in (NORMAL, MIXTURE, VAMP):
        common.fit(list(model.parameters()), [], digits.train, lambda x: model.terms(x).loss, args, name, str)
    else:
        size = len(digits.train)
        common.fit(
            list(model.parameters()), [], digits.train, lambda x: beta_tcvae(model, x, args.beta, size), args, name, str
        )  # fmt: skip
    return model


# Pictures.


@torch.no_grad()
def draw_priors(models: dict[str, VAE], digits: Digits, path: Path, seed: int) -> None:
    """Above, the held-out digits' posterior means over the prior's density, of the first two latents; below, draws."""
    figure, panels = plt.subplots(2, len(models), figsize=(11.5, 6.8), height_ratios=(5, 3))
    for (above, below), (name, model) in zip(panels.T, models.items()):
        mu = model.encode(digits.held_out)[0].cpu()
        if model.latent == 2:
            ticks = torch.linspace(-1.1, 1.1, 160) * mu.abs().max()
            grid = torch.cartesian_prod(ticks, ticks).to(digits.held_out.device)
            density = model.log_prior(grid).view(160, 160).T.cpu()
            levels = density.max() - torch.linspace(7.0, 0.0, 15)  # a thousandth of the peak is in
            above.contourf(ticks, ticks, density, levels=levels, cmap="Greys", alpha=0.6)
        for digit in range(10):
            points = mu[digits.held_out_class == digit]
            above.scatter(points[:, 0], points[:, 1], s=9, color=f"C{digit}", label=str(digit))
        above.set(title=name, xlabel="$z_1$", ylabel="$z_2$")
        common.show(below, model.draw(50, seed), 10)
    panels[0, 0].legend(ncols=2, fontsize=7, frameon=False, handletextpad=0.1, columnspacing=0.6)
    common.save(figure, path)


@torch.no_grad()
def draw_traversals(models: dict[str, VAE], x: Tensor, digit: Tensor, path: Path) -> None:
    """From one scan, along the latents that tell most, those of the largest KL first."""
    figure, panels = plt.subplots(1, len(models), figsize=(10.5, 0.6 + 0.5 * WALKED))
    for axes, (name, model) in zip(panels, models.items()):
        mu, logvar = model.encode(x)
        most = vaefast.kl_per_dim(mu, logvar).argsort(descending=True)[:WALKED]
        z = model.encode(digit.unsqueeze(0))[0].repeat(len(most) * STEPS, 1)
        values = torch.linspace(-REACH, REACH, STEPS, device=z.device).repeat(len(most))
        z[torch.arange(len(z)), most.repeat_interleave(STEPS)] = values
        common.show(axes, model.picture(z), STEPS)
        axes.set(title=name, xlabel=f"z from {-REACH} to {REACH}", ylabel="one latent a row")
    common.save(figure, path)


# The command line.


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("Trains a VAE of handwritten digits under three priors, and a beta-TCVAE.", "out/priors", 30)
    parser.add_argument("--latent", type=common.positive, default=2, help="latent units of the models with priors")
    parser.add_argument("--walked", type=common.positive, default=8, help="latent units of the two that are walked")
    parser.add_argument("--components", type=common.positive, default=20, help="of the mixture and the VampPrior")
    parser.add_argument("--beta", type=float, default=3.0, help="the total correlation's factor")
    parser.add_argument("--samples", type=common.positive, default=512, help="of the posterior, for the evidence")
    return common.parse(parser, argv)


def report(metrics: dict[str, Any]) -> None:
    print(f"\n{'held-out digits, nats an image':34}{'log p(x)':>10}{'ELBO':>9}{'more than N(0, I)':>20}")
    for name, found in metrics["priors"].items():
        more = f"{found['gain']:.2f} +- {found['standard_error']:.2f}"
        print(f"{name:34}{found['log_evidence']:10.2f}{found['elbo']:9.2f}{more:>20}")
    print(f"\n{'the KL of training digits, nats':34}{'I(x; z)':>10}{'TC':>8}{'dim. KL':>9}")
    for name, found in metrics["parts"].items():
        print(f"{name:34}" + "".join(f"{value:{w}.2f}" for value, w in zip(found.values(), (10, 8, 9))))


def run(args: argparse.Namespace) -> dict[str, Any]:
    scans = common.read_digits(torch.device(args.device))
    digits = Digits(2 * scans.train - 1, 2 * scans.held_out - 1, scans.held_out_class)
    models = {name: train(digits, name, args.latent, args) for name in (NORMAL, MIXTURE, VAMP)}
    priors, evidence = {}, {}
    for name, model in models.items():
        torch.manual_seed(args.seed)
        evidence[name] = log_evidence(model, digits.held_out, args.samples)
        gain = evidence[name] - evidence[NORMAL]
        priors[name] = {
            "log_evidence": evidence[name].mean().item(),
            "elbo": common.evaluate(model.terms, digits.held_out).elbo,
            "gain": gain.mean().item(),
            "standard_error": gain.std().item() / math.sqrt(len(gain)),
        }
    walked = {
        name: train(digits, of, args.walked, args) for name, of in (("VAE", NORMAL), ("beta-TCVAE", "beta-TCVAE"))
    }
    draw_priors(models, digits, args.out / "priors.png", args.seed)
    draw_traversals(walked, digits.train, digits.held_out[0], args.out / "traversals.png")
    return {
        "latent": args.latent,
        "walked": args.walked,
        "components": args.components,
        "beta": args.beta,
        "samples": args.samples,
        "epochs": args.epochs,
        "seed": args.seed,
        "priors": priors,
        "parts": {name: parts_of_the_kl(model, digits.train) for name, model in walked.items()},
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, measures, draws; returns what metrics.json holds."""
    args = parse(argv)
    with common.settings(args):
        metrics = run(args)
    report(metrics)
    common.write(metrics, args)
    return metrics


if __name__ == "__main__":
    main()
