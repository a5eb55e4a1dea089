"""A hierarchical VAE with learned priors
======================================

Three levels of latents on handwritten digits, top-down::

    p(x, z) = p(x|z) p(z_1) p(z_2|z_1) p(z_3|z_1, z_2),     q(z|x) = q(z_1|x) q(z_2|z_1, x) q(z_3|z_1, z_2, x)

The posterior of a level sees the levels above it, as in Sønderby et al. 2016 (arXiv:1602.02282) and VDVAE (Child 2021,
arXiv:2011.10650): a state goes from the top down, each level reads it for its prior, reads it and the encoder's
features for its posterior, and adds its sample to it. The KL of the hierarchy is the sum of its levels' KLs between two
Gaussians, and ``multi_tensor_gaussian_kl`` takes them all in one call.

Levels collapse easily, for others can do their work. Two remedies are here: beta is warmed up, and a level pays nothing
for its first ``--free-bits`` nats (Kingma et al. 2016, arXiv:1606.04934, equation 15, a level being a group).

::

    python examples/hierarchical_vae.py --out out/hierarchical
    python examples/hierarchical_vae.py --out out/plain --free-bits 0

Written to ``--out``: reconstructions.png, samples.png, levels.png (what each level adds), collapse.png and
metrics.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import common
import torch
from common import HIDDEN, PIXELS, Digits, plt
from torch import Tensor, nn

import vaefast
from vaefast.diagnostics import CollapseMonitor, CollapseReport
from vaefast.schedules import BetaSchedule, LinearSchedule

LATENTS = (4, 8, 16)
STATE = 128


class Gaussians(NamedTuple):
    """What ``gaussian_kl`` takes: a level's posterior and its prior."""

    mu: Tensor
    logvar: Tensor
    prior_mu: Tensor
    prior_logvar: Tensor


class Level(nn.Module):
    def __init__(self, latent: int) -> None:
        super().__init__()
        self.prior = common.mlp(STATE, HIDDEN, 2 * latent)
        self.posterior = common.mlp(2 * STATE, HIDDEN, 2 * latent)
        self.add = nn.Linear(latent, STATE)

    def gaussians(self, state: Tensor, features: Tensor) -> Gaussians:
        prior = self.prior(state)
        # the posterior is told as a step away from the prior, so that a level may do nothing
        posterior = prior + self.posterior(torch.cat((state, features), dim=1))
        return Gaussians(*posterior.chunk(2, dim=1), *prior.chunk(2, dim=1))


class HierarchicalVAE(nn.Module):
    """Levels from the top, the smallest, down; a Gaussian likelihood whose scale is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleList(
            [common.mlp(PIXELS, HIDDEN, STATE), *(common.mlp(STATE, HIDDEN, STATE) for _ in LATENTS[1:])]
        )
        self.levels = nn.ModuleList(Level(latent) for latent in LATENTS)
        self.start = nn.Parameter(torch.zeros(1, STATE))
        self.decoder = common.mlp(STATE, HIDDEN, PIXELS)
        self.logvar = nn.Parameter(torch.zeros(()))

    def encode(self, x: Tensor) -> list[Tensor]:
        """Features for each level, top first: the top's have gone through most layers."""
        features = []
        for layer in self.features:
            x = layer(x)
            features.append(x)
        return features[::-1]

    def infer(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, list[Gaussians]]:
        """The decoder's mean, and every level's posterior and prior."""
        state, found = self.start.expand(len(x), -1), []
        for level, features in zip(self.levels, self.encode(x)):
            found.append(level.gaussians(state, features))
            state = state + level.add(vaefast.reparameterize(found[-1].mu, found[-1].logvar, generator=generator))
        return self.decoder(state), found

    def terms(self, x: Tensor, generator: torch.Generator | None = None) -> vaefast.ELBOTerms:
        """The ELBO as it is, whatever training did with its KL."""
        mean, found = self.infer(x, generator)
        nll = self.reconstruction(mean, x)
        kl = vaefast.multi_tensor_gaussian_kl(*zip(*found))
        return vaefast.ELBOTerms(nll + kl, nll, kl)

    def training_loss(self, x: Tensor, beta: Tensor, free_bits: float) -> Tensor:
        """Free bits look at each level's KL by itself; without them one call takes all."""
        mean, found = self.infer(x)
        if free_bits:
            kl = sum(vaefast.gaussian_kl(*level).clamp(min=free_bits) for level in found)
        else:
            kl = vaefast.multi_tensor_gaussian_kl(*zip(*found))
        return self.reconstruction(mean, x) + beta * kl

    def reconstruction(self, mean: Tensor, x: Tensor) -> Tensor:
        return vaefast.reconstruction_loss((mean, self.logvar), x, likelihood="gaussian")

    @torch.no_grad()
    def generate(self, count: int, x: Tensor | None = None, known: int = 0) -> Tensor:
        """Images whose first ``known`` levels are the posterior's means for ``x``, and the rest the prior's draws."""
        state = self.start.expand(count, -1)
        features = [None] * len(self.levels) if x is None else self.encode(x)
        for at, (level, seen) in enumerate(zip(self.levels, features)):
            if at < known:
                z = level.gaussians(state, seen).mu
            else:
                z = vaefast.reparameterize(*level.prior(state).chunk(2, dim=1))
            state = state + level.add(z)
        return self.decoder(state)


def train(model: HierarchicalVAE, digits: Digits, args: argparse.Namespace) -> None:
    warmup = args.warmup * common.steps_an_epoch(digits.train, args)
    beta = BetaSchedule(LinearSchedule(warmup)).to(digits.train.device)

    def loss(x: Tensor) -> Tensor:
        return model.training_loss(x, beta(), args.free_bits)

    def after_epoch() -> str:
        return (
            f"beta {beta().item():.2f}, held-out ELBO {common.evaluate(model.terms, digits.held_out, 1).elbo:.2f} nats"
        )

    common.fit(
        [p for p in model.parameters() if p is not model.logvar],
        [model.logvar],
        digits.train,
        loss,
        args,
        "hierarchical VAE",
        after_epoch,
        beta.step,
    )


@torch.no_grad()
def reports(model: HierarchicalVAE, x: Tensor, batch: int) -> list[CollapseReport]:
    """One for each level, gathered batch by batch."""
    monitors = [CollapseMonitor() for _ in model.levels]
    for part in x.split(batch):
        for monitor, gaussians in zip(monitors, model.infer(part)[1]):
            monitor.update(*gaussians)
    return [monitor.report() for monitor in monitors]


def draw(model: HierarchicalVAE, digits: Digits, levels: list[CollapseReport], args: argparse.Namespace) -> None:
    x = common.some_of_each(digits, 3)
    known = [model.generate(len(x), x, count) for count in range(len(LATENTS) + 1)]
    common.draw_rows(
        {"scan": x, "model": known[-1]},
        "Held-out digits and their reconstructions from the posterior means",
        args.out / "reconstructions.png",
    )
    common.draw_sheet(model.generate(128), "New digits, every level drawn from its prior", args.out / "samples.png")
    names = ["no level", "top level", "two levels", "all levels"]
    common.draw_rows(
        {"scan": x[:10]} | {name: images[:10] for name, images in zip(names, known)},
        "What each level adds: these from q(z|x), the others drawn from their priors",
        args.out / "levels.png",
    )
    figure, panels = plt.subplots(1, len(levels), figsize=(4 * len(levels), 3.6), sharey=True)
    for at, (axes, report) in enumerate(zip(panels, levels), 1):
        report.plot(axes)
        axes.set_title(f"level {at}: {axes.get_title()}", fontsize=9)
    common.save(figure, args.out / "collapse.png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("Trains a VAE of three levels of latents on handwritten digits.", "out/hierarchical", 100)
    parser.add_argument("--free-bits", type=float, default=0.5, help="nats of KL that a level gets for nothing")
    parser.add_argument("--warmup", type=int, default=20, help="epochs in which beta rises from 0 to 1")
    args = common.parse(parser, argv)
    if args.free_bits < 0 or args.warmup < 0:
        parser.error("--free-bits and --warmup must be at least 0")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    digits = common.read_digits(device)
    torch.manual_seed(args.seed)
    model = HierarchicalVAE().to(device)
    untrained = common.evaluate(model.terms, digits.held_out)
    train(model, digits, args)
    levels = reports(model, digits.held_out, args.batch_size)
    draw(model, digits, levels, args)
    for at, report in enumerate(levels, 1):
        print(f"\nlevel {at}, held-out digits: {report}")
    return {
        "free_bits": args.free_bits,
        "warmup": args.warmup,
        "epochs": args.epochs,
        "seed": args.seed,
        "untrained": asdict(untrained),
        "held_out": asdict(common.evaluate(model.terms, digits.held_out)),
        "train": asdict(common.evaluate(model.terms, digits.train)),
        "levels": [
            {"latents": report.kl.numel(), "active_units": report.number_active, "kl": report.kl.sum().item()}
            for report in levels
        ],
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, measures, draws; returns what metrics.json holds."""
    args = parse(argv)
    with common.settings(args):
        metrics = run(args)
    common.print_bounds({name: metrics[name] for name in ("held_out", "train", "untrained")})
    common.write(metrics, args)
    return metrics


if __name__ == "__main__":
    main()
