"""A VAE with discrete latents
===========================

Latents that are classes, straight-through gradients, and what each class draws.

The code of a digit is ``--latents`` choices among ``--classes``: a one-hot vector each, sampled in one pass with its
KL to the uniform prior. The gradient goes straight through the sample (Bengio et al. 2013, arXiv:1308.3432), or, with
``--temperature``, through the relaxation at that temperature (Jang et al. 2017, arXiv:1611.01144). The KL of such a
code is bounded, latents x log classes, which is also the most that it can tell of a digit.

::

    python examples/discrete_vae.py --out out/discrete

Written to ``--out``: reconstructions.png, samples.png, classes.png (one latent's classes in turn, the others as they
are), usage.png (how often each class is chosen) and metrics.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import common
import torch
from common import HIDDEN, PIXELS, Digits, plt
from torch import Tensor, nn

import vaefast


class DiscreteVAE(nn.Module):
    def __init__(self, latents: int, classes: int, temperature: float | None) -> None:
        super().__init__()
        self.latents, self.classes, self.temperature = latents, classes, temperature
        self.encoder = common.mlp(PIXELS, HIDDEN, HIDDEN, latents * classes)
        self.decoder = common.mlp(latents * classes, HIDDEN, HIDDEN, PIXELS)

    def encode(self, x: Tensor) -> Tensor:
        """Logits ``[B, latents, classes]``."""
        found: Tensor = self.encoder(x).view(-1, self.latents, self.classes)
        return found

    def decode(self, z: Tensor) -> Tensor:
        found: Tensor = self.decoder(z.flatten(1))
        return found

    def terms(self, x: Tensor, generator: torch.Generator | None = None, free_bits: float = 0.0) -> vaefast.ELBOTerms:
        z, kl = vaefast.sample_with_categorical_kl(
            self.encode(x), temperature=self.temperature, generator=generator, free_bits=free_bits
        )
        nll = vaefast.reconstruction_loss(self.decode(z), x)
        return vaefast.ELBOTerms(nll + kl, nll, kl)

    def most_likely(self, x: Tensor) -> Tensor:
        """One-hot codes ``[B, latents, classes]``."""
        return nn.functional.one_hot(self.encode(x).argmax(-1), self.classes).to(x)


def train(digits: Digits, args: argparse.Namespace) -> tuple[DiscreteVAE, list[float]]:
    """The model, and the held-out ELBO after each epoch."""
    torch.manual_seed(args.seed)
    model = DiscreteVAE(args.latents, args.classes, args.temperature).to(digits.train.device)
    history: list[float] = []

    def loss(x: Tensor) -> Tensor:
        # what a latent tells up to so many nats is free, or the prior would hold it before it is of use
        return model.terms(x, free_bits=args.free_bits).loss

    def after_epoch() -> str:
        history.append(common.evaluate(model.terms, digits.held_out, 1).elbo)
        return f"held-out ELBO {history[-1]:.2f}"

    networks = list(model.parameters())
    common.fit(networks, [], digits.train, loss, args, "discrete VAE", after_epoch)
    return model, history


@torch.no_grad()
def draw(model: DiscreteVAE, digits: Digits, usage: Tensor, args: argparse.Namespace) -> None:
    x = common.some_of_each(digits, 3)
    common.draw_rows(
        {"scan": x, "model": vaefast.likelihood_mean(model.decode(model.most_likely(x)))},
        "Held-out digits, and what their most likely codes decode to",
        args.out / "reconstructions.png",
    )
    torch.manual_seed(args.seed)
    uniform = torch.zeros(128, model.latents, model.classes, device=x.device)
    drawn = vaefast.likelihood_mean(model.decode(vaefast.sample_categorical(uniform)))
    common.draw_sheet(drawn, "New digits: every latent's class drawn uniformly", args.out / "samples.png")
    # the latent whose classes change the pictures most
    codes = model.most_likely(x[:10])
    turned = codes.repeat(model.latents, model.classes, 1, 1, 1)  # latent, class, digit
    for latent in range(model.latents):
        turned[latent, :, :, latent] = torch.eye(model.classes, device=x.device).unsqueeze(1)
    images = vaefast.likelihood_mean(model.decode(turned.flatten(0, 2))).view(*turned.shape[:3], PIXELS)
    chosen = int(images.var(1).sum((1, 2)).argmax())
    shown = images[chosen].transpose(0, 1).reshape(-1, PIXELS)  # digit by digit, class by class
    common.draw_sheet(
        shown, f"Ten digits (rows), and latent {chosen} in each of its classes", args.out / "classes.png", model.classes
    )
    figure, axes = plt.subplots(figsize=(8.4, 3.6))
    picture = axes.imshow(usage.cpu().numpy(), cmap="Blues", vmin=0, aspect="auto")
    figure.colorbar(picture, ax=axes, label="share of the digits")
    axes.set(xlabel="class", ylabel="latent", title="How often each class is the code of a held-out digit")
    common.save(figure, args.out / "usage.png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("Trains a VAE whose latents are classes.", "out/discrete", 40)
    parser.add_argument("--latents", type=common.positive, default=4, help="latents, a class each")
    parser.add_argument("--classes", type=common.positive, default=10, help="classes of a latent")
    parser.add_argument("--free-bits", type=float, default=1.0, help="nats of each latent's KL that cost nothing")
    parser.add_argument(
        "--temperature", type=float, help="of Gumbel noise and its relaxation; straight-through without"
    )
    return common.parse(parser, argv)


def run(args: argparse.Namespace) -> dict[str, Any]:
    digits = common.read_digits(torch.device(args.device))
    model, history = train(digits, args)
    held_out, seen = (common.evaluate(model.terms, x) for x in (digits.held_out, digits.train))
    with torch.no_grad():
        usage = model.most_likely(digits.held_out).mean(0)
        each = vaefast.categorical_kl(model.encode(digits.held_out), reduction="none").mean(0)
    draw(model, digits, usage, args)
    return {
        "epochs": args.epochs,
        "latents": args.latents,
        "classes": args.classes,
        "temperature": args.temperature or 0.0,
        "free_bits": args.free_bits,
        "seed": args.seed,
        "held_out": asdict(held_out),
        "train": asdict(seen),
        "most_kl": args.latents * math.log(args.classes),
        "active_latents": int((each > 0.01).sum()),
        "history": history,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, measures, draws; returns what metrics.json holds."""
    args = parse(argv)
    with common.settings(args):
        metrics = run(args)
    common.print_bounds({name: metrics[name] for name in ("held_out", "train")})
    print(f"\nactive latents: {metrics['active_latents']} of {args.latents}; KL at most {metrics['most_kl']:.2f} nats")
    common.write(metrics, args)
    return metrics


if __name__ == "__main__":
    main()
