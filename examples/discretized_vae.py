"""A VAE that is a lossless code
=============================

A discretized logistic likelihood, and bits per dimension.

The scans of handwritten digits hold whole numbers from 0 to 16. A density of such numbers has no bound: a narrow enough
peak on each makes any likelihood large. The discretized logistic (Salimans et al. 2017, arXiv:1701.05517, section 2.1,
with one component) gives each number the probability of its bin instead, so -log2 p(x) is the length of a code, and the
ELBO bounds it::

    bits per dimension = -ELBO / (64 ln 2)

Numbers are scaled to [-1, 1]; a bin is 2/16 wide, and the outermost reach to infinity.

::

    python examples/discretized_vae.py --out out/discretized

Written to ``--out``: reconstructions.png, samples.png, scale.png (where the model is sure), curve.png and metrics.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import common
import torch
from common import HIDDEN, LEVELS, PIXELS, Digits, plt
from torch import Tensor, nn

import vaefast
from vaefast.diagnostics import collapse_report

BIN = 2 / LEVELS
LIKELIHOOD = vaefast.Likelihood("discretized_logistic", bins=LEVELS + 1)


class DiscretizedVAE(nn.Module):
    """The decoder gives every pixel its own mean and log scale."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = common.mlp(PIXELS, HIDDEN, HIDDEN, 2 * latent)
        self.decoder = common.mlp(latent, HIDDEN, HIDDEN, 2 * PIXELS)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self.decoder(z).chunk(2, dim=1)
        return mean, log_scale

    def terms(self, x: Tensor, generator: torch.Generator | None = None) -> vaefast.ELBOTerms:
        mu, logvar = self.encode(x)
        z = vaefast.reparameterize(mu, logvar, generator=generator)
        return vaefast.elbo_terms(self.decode(z), x, mu, logvar, likelihood=LIKELIHOOD)


def bits_per_dimension(nats: float) -> float:
    return nats / (PIXELS * math.log(2))


def baseline(digits: Digits) -> float:
    """Bits per dimension of the held-out digits where every pixel has its own histogram of the training digits."""
    train, held_out = (((t + 1) / BIN).round().long() for t in (digits.train, digits.held_out))
    shares = torch.nn.functional.one_hot(train, LEVELS + 1).sum(0) + 1.0
    log_shares = (shares / shares.sum(1, keepdim=True)).log()
    return bits_per_dimension(-log_shares.T.gather(0, held_out).sum(1).mean().item())


def train(digits: Digits, args: argparse.Namespace) -> tuple[DiscretizedVAE, list[float]]:
    """The model, and the held-out bits per dimension after each epoch."""
    torch.manual_seed(args.seed)
    model = DiscretizedVAE(args.latent).to(digits.train.device)
    history: list[float] = []

    def after_epoch() -> str:
        history.append(bits_per_dimension(-common.evaluate(model.terms, digits.held_out, 1).elbo))
        return f"held-out {history[-1]:.3f} bits per dimension"

    networks = list(model.parameters())
    common.fit(networks, [], digits.train, lambda x: model.terms(x).loss, args, "discretized VAE", after_epoch)
    return model, history


@torch.no_grad()
def draw(
    model: DiscretizedVAE, digits: Digits, history: list[float], references: dict[str, float], args: argparse.Namespace
) -> None:
    x = common.some_of_each(digits, 3)
    recon = model.decode(model.encode(x)[0])
    common.draw_rows(
        {"scan": (x + 1) / 2, "model": (vaefast.likelihood_mean(recon, LIKELIHOOD) + 1) / 2},
        "Held-out digits and their mean at the posterior mean",
        args.out / "reconstructions.png",
    )
    torch.manual_seed(args.seed)
    drawn = vaefast.sample_likelihood(model.decode(torch.randn(128, model.latent).to(x)), LIKELIHOOD)
    common.draw_sheet((drawn + 1) / 2, "New digits: z ~ N(0, I), x ~ p(x|z)", args.out / "samples.png")
    common.draw_rows(
        {"scan": (x + 1)[:10] / 2, "scale": (recon[1].exp() / BIN / 4)[:10]},
        "Where the model is sure: its scale, from 0 (light) to four bins (dark)",
        args.out / "scale.png",
    )
    figure, axes = plt.subplots(figsize=(8.4, 4.2))
    axes.plot(range(1, len(history) + 1), history, color="#30638e", linewidth=1.6, label="the VAE, held-out digits")
    for (name, bits), style in zip(references.items(), ("--", ":")):
        axes.axhline(bits, color="#d1495b", linestyle=style, linewidth=1.2, label=f"{name}: {bits:.2f}")
    axes.set(xlabel="epoch", ylabel="bits per dimension", title="Length of a lossless code")
    axes.legend(frameon=False)
    common.save(figure, args.out / "curve.png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("Trains a VAE of whole numbers and tells its bits per dimension.", "out/discretized", 100)
    parser.add_argument("--latent", type=common.positive, default=16, help="latent units")
    return common.parse(parser, argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    scans = common.read_digits(torch.device(args.device))
    digits = Digits(2 * scans.train - 1, 2 * scans.held_out - 1, scans.held_out_class)
    references = {"17 equal bins": math.log2(LEVELS + 1), "a histogram for each pixel": baseline(digits)}
    model, history = train(digits, args)
    held_out, seen = (common.evaluate(model.terms, x) for x in (digits.held_out, digits.train))
    draw(model, digits, history, references, args)
    with torch.no_grad():
        report = collapse_report(*model.encode(digits.held_out))
    return {
        "epochs": args.epochs,
        "latent": args.latent,
        "seed": args.seed,
        "held_out": asdict(held_out),
        "train": asdict(seen),
        "bits_per_dimension": {
            "held-out": bits_per_dimension(-held_out.elbo),
            "train": bits_per_dimension(-seen.elbo),
            **references,
        },
        "active_units": report.number_active,
        "history": history,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, measures, draws; returns what metrics.json holds."""
    args = parse(argv)
    with common.settings(args):
        metrics = run(args)
    common.print_bounds({name: metrics[name] for name in ("held_out", "train")})
    print("\nbits per dimension")
    for name, bits in metrics["bits_per_dimension"].items():
        print(f"{name:28}{bits:10.3f}")
    print(f"active units: {metrics['active_units']} of {metrics['latent']}")
    common.write(metrics, args)
    return metrics


if __name__ == "__main__":
    main()
