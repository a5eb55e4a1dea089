"""Bounds that tighten with draws
==============================

How far the ELBO is from log p(x), what more draws make of it, and what they do to the encoder's gradient.

Left: two VAEs of handwritten digits, one trained on the ELBO and one on the importance-weighted bound of 16 draws
(Burda et al. 2016, arXiv:1509.00519), doubly reparameterized (Tucker et al. 2019, arXiv:1810.04152). For each, the
bound of K draws of held-out digits rises with K to log p(x), which importance sampling with thousands of draws
estimates.

Right: the plot of Rainforth et al. 2018 (arXiv:1802.04537). On a linear Gaussian model, with an encoder near its
optimum, the signal-to-noise ratio of the encoder's gradient, ``|mean| / std`` over many draws of it, falls as
1 / sqrt(K) for the importance-weighted bound: a tighter bound trains the encoder worse. That of the doubly
reparameterized gradient of the same bound rises as sqrt(K). PIWAE gives the encoder the bound of groups of draws, and
the decoder that of all.

::

    python examples/importance_vae.py --out out/importance

Written to ``--out``: bounds.png and metrics.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
from common import HIDDEN, PIXELS, Digits, plt
from torch import Tensor, nn

import vaefast
from vaefast import bounds

DRAWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TRAINING_DRAWS = 16
SNR_DRAWS = (1, 2, 4, 8, 16, 32, 64, 128)
# the encoder's gradient: iwae_loss's arguments for K draws, or None where there are too few
GROUP = 8
GRADIENTS: dict[str, Callable[[int], dict[str, Any] | None]] = {
    "IWAE": lambda draws: {},
    "doubly reparameterized": lambda draws: {"estimator": "dreg"},
    f"PIWAE, groups of {GROUP} draws": lambda draws: {"groups": draws // GROUP} if draws >= GROUP else None,
}


class VAE(nn.Module):
    """Pixels are grey: each is a Bernoulli's mean."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.encoder = common.mlp(PIXELS, HIDDEN, 2 * latent)
        self.decoder = common.mlp(latent, HIDDEN, PIXELS)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def loss(self, x: Tensor, draws: int) -> Tensor:
        mu, logvar = self.encode(x)
        if draws == 1:
            return vaefast.elbo_loss(self.decoder(vaefast.reparameterize(mu, logvar)), x, mu, logvar)
        z = vaefast.reparameterize(mu, logvar, num_samples=draws)
        return bounds.iwae_loss(self.decoder(z), x, z, mu, logvar, estimator="dreg")


def train(digits: Digits, draws: int, args: argparse.Namespace) -> VAE:
    torch.manual_seed(args.seed)
    model = VAE(args.latent).to(digits.train.device)

    def after_epoch() -> str:
        with torch.no_grad():
            return f"held-out {-model.loss(digits.held_out, 1).item():.2f} nats"

    networks = list(model.parameters())
    name = "on the ELBO" if draws == 1 else f"on {draws} draws"
    common.fit(networks, [], digits.train, lambda x: model.loss(x, draws), args, name, after_epoch)
    return model


@torch.no_grad()
def measured(model: VAE, x: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """The bounds of K draws, means over x, each over as many draws in all; and log p(x)."""
    generator = torch.Generator(x.device).manual_seed(1)
    mu, logvar = model.encode(x)
    z = vaefast.reparameterize(mu, logvar, num_samples=DRAWS[-1], generator=generator)
    log_w = bounds.log_weights(model.decoder(z), x, z, mu, logvar)
    curve = {k: -bounds.bound_of(log_w, groups=DRAWS[-1] // k).item() for k in DRAWS}
    found = bounds.log_evidence(model.encode, model.decoder, x, num_samples=args.samples, generator=generator)
    return {
        "bounds": curve,
        "log_evidence": found.value.mean().item(),
        "standard_error": found.standard_error.square().mean().sqrt().item() / len(x) ** 0.5,
        "effective_samples": found.effective_samples.median().item(),
    }


class LinearGaussian:
    """Rainforth et al. 2018, section 4: x ~ N(z, I), z ~ N(theta, I), and q(z|x) = N(A x + b, 2/3 I), whose A and b are
    a little off their best, I / 2 and theta / 2."""

    DIM = 20

    def __init__(self) -> None:
        self.theta = torch.randn(self.DIM)
        self.x = self.theta + 2**0.5 * torch.randn(1, self.DIM)
        self.b = 0.5 * self.theta + 0.1 * torch.randn(self.DIM)

    def signal_to_noise(self, draws: int, times: int, **options: Any) -> float:
        """Of b's gradient, the mean over its elements, from ``times`` draws of it side by side in a batch."""
        b = self.b.expand(times, self.DIM).clone().requires_grad_()
        mu, logvar = 0.5 * self.x + b, torch.full((times, self.DIM), 2 / 3).log()
        z = vaefast.reparameterize(mu, logvar, num_samples=draws)
        loss = bounds.iwae_loss(
            z, self.x.expand_as(mu), z, mu, logvar, self.theta, likelihood="gaussian", reduction="sum", **options
        )
        (gradient,) = torch.autograd.grad(loss, b)
        return (gradient.mean(0).abs() / gradient.std(0)).mean().item()


def signals(args: argparse.Namespace) -> dict[str, dict[int, float]]:
    torch.manual_seed(args.seed)
    model = LinearGaussian()
    found: dict[str, dict[int, float]] = {name: {} for name in GRADIENTS}
    for name, options_for in GRADIENTS.items():
        for draws in SNR_DRAWS:
            options = options_for(draws)
            if options is not None:
                found[name][draws] = model.signal_to_noise(draws, args.gradients, **options)
    return found


COLOURS = ("#d1495b", "#30638e", "#edae49")


def draw(models: dict[str, Any], snr: dict[str, dict[int, float]], args: argparse.Namespace) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
    for (name, found), colour in zip(models.items(), COLOURS):
        left.plot(list(found["bounds"]), list(found["bounds"].values()), "o-", color=colour, label=f"trained {name}")
        left.axhline(found["log_evidence"], color=colour, linestyle="--", linewidth=1.0)
    left.set(
        xscale="log", xlabel="draws K", ylabel="nats an image", title="The bound of K draws, and log p(x) (dashed)"
    )
    left.legend(frameon=False, loc="lower right")
    for (name, values), colour in zip(snr.items(), COLOURS):
        right.plot(list(values), list(values.values()), "o-", color=colour, label=name)
    right.set(xscale="log", yscale="log", xlabel="draws K", title="Signal to noise of the encoder's gradient")
    right.legend(frameon=False)
    common.save(figure, args.out / "bounds.png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("Compares bounds of log p(x) by how many draws they take.", "out/importance", 20)
    parser.add_argument("--latent", type=common.positive, default=16, help="latent units")
    parser.add_argument("--samples", type=common.positive, default=2000, help="draws an image for log p(x)")
    parser.add_argument("--gradients", type=common.positive, default=2000, help="draws of each gradient")
    return common.parse(parser, argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    digits = common.read_digits(torch.device(args.device))
    models = {
        "on the ELBO": measured(train(digits, 1, args), digits.held_out, args),
        f"on {TRAINING_DRAWS} draws": measured(train(digits, TRAINING_DRAWS, args), digits.held_out, args),
    }
    snr = signals(args)
    draw(models, snr, args)
    return {"epochs": args.epochs, "latent": args.latent, "seed": args.seed, "trained": models, "signal_to_noise": snr}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, measures, draws; returns what metrics.json holds."""
    args = parse(argv)
    with common.settings(args):
        metrics = run(args)
    print(f"\n{'nats an image, held-out':28}{'ELBO':>10}{f'{DRAWS[-1]} draws':>12}{'log p(x)':>10}")
    for name, found in metrics["trained"].items():
        curve = found["bounds"]
        print(f"{'trained ' + name:28}{curve[1]:10.2f}{curve[DRAWS[-1]]:12.2f}{found['log_evidence']:10.2f}")
    print(f"\n{'signal to noise':28}" + "".join(f"{f'K={k}':>9}" for k in SNR_DRAWS))
    for name, values in metrics["signal_to_noise"].items():
        print(f"{name:28}" + "".join(f"{values[k]:9.3f}" if k in values else " " * 9 for k in SNR_DRAWS))
    common.write(metrics, args)
    return metrics


if __name__ == "__main__":
    main()
