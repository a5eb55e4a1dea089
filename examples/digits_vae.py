"""A VAE of handwritten digits
===========================

Trained in half a minute on a CPU.

The data is scikit-learn's own copy of the UCI handwritten digits: 1,797 real scans of 8 x 8 pixels, scaled to [0, 1]; a
fifth of each class is held out. The model is an encoder and a decoder of two hidden layers; everything between them is
vaefast: ``reparameterize`` draws z and ``elbo_terms`` is the loss. Everything is in nats an image.

A Bernoulli likelihood of grey values is forgiving: few latent units are worth their KL, and the pictures are soft. The
Gaussian and the Laplace learn their noise scale too, which pays for more units and sharper pictures.

::

    python examples/digits_vae.py --out out/demo
    python examples/digits_vae.py --out out/laplace --likelihood laplace

Written to ``--out``: reconstructions.png, samples.png, latent.png (from a run of its own with two latent units),
curves.png and metrics.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import common
import torch
from common import HIDDEN, PIXELS, Bound, Digits, evaluate, plt
from torch import Tensor, nn
from torch.nn import functional as F

import vaefast

LIKELIHOODS = [name for name, entry in vaefast.reference.LIKELIHOODS.items() if entry.support in ("unit", "real")]


@dataclass(frozen=True)
class Epoch:
    """Where training stands after an epoch; 0 is the untrained model."""

    train: Bound
    held_out: Bound


class VAE(nn.Module):
    """An encoder and a decoder of two hidden layers; a likelihood's scale parameters are learned scalars."""

    def __init__(self, latent: int, likelihood: str) -> None:
        super().__init__()
        self.latent = latent
        self.likelihood = likelihood
        self.entry = vaefast.reference.LIKELIHOODS[likelihood]
        self.encoder = common.mlp(PIXELS, HIDDEN, HIDDEN, 2 * latent)
        self.decoder = common.mlp(latent, HIDDEN, HIDDEN, PIXELS)
        self.scales = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in self.entry.params[1:])

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z|x), two views of one tensor."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> tuple[Tensor, ...]:
        """The likelihood's parameters."""
        numbers = (self.decoder(z), *self.scales)
        return tuple(vaefast.reference.DOMAINS[domain](x) for domain, x in zip(self.entry.domains, numbers))

    def terms(self, x: Tensor, generator: torch.Generator | None = None, beta: float = 1.0) -> vaefast.ELBOTerms:
        mu, logvar = self.encode(x)
        z = vaefast.reparameterize(mu, logvar, generator=generator)
        return vaefast.elbo_terms(self.decode(z), x, mu, logvar, likelihood=self.likelihood, beta=beta)

    @torch.no_grad()
    def picture(self, z: Tensor) -> Tensor:
        """The mean of p(x|z), ``[N, 64]``."""
        return vaefast.likelihood_mean(self.decode(z), self.likelihood)


def train(
    digits: Digits, latent: int, args: argparse.Namespace, device: torch.device, name: str
) -> tuple[VAE, list[Epoch]]:
    """A trained model and its history, one entry an epoch after that of the untrained model."""
    torch.manual_seed(args.seed)
    model = VAE(latent, args.likelihood).to(device)
    history = [measure(model, digits)]

    def loss(x: Tensor) -> Tensor:
        return model.terms(x, beta=args.beta).loss

    def after_epoch() -> str:
        history.append(measure(model, digits))
        return f"held-out ELBO {history[-1].held_out.elbo:.2f} nats"

    networks = [*model.encoder.parameters(), *model.decoder.parameters()]
    common.fit(networks, [*model.scales], digits.train, loss, args, name, after_epoch)
    return model, history


def measure(model: VAE, digits: Digits) -> Epoch:
    return Epoch(evaluate(model.terms, digits.train, 1), evaluate(model.terms, digits.held_out, 1))


# The loss and the sampling alone: the same work, as vaefast does it and as people write it.


@dataclass(frozen=True)
class LossInputs:
    """What the networks hand to the loss in one training step, and the gradient that the decoder would send to z."""

    mu: Tensor
    logvar: Tensor
    params: tuple[Tensor, ...]
    x: Tensor
    grad_z: Tensor
    likelihood: str
    beta: float


SampleAndLoss = Callable[[LossInputs, "Tensor | None"], "tuple[Tensor, Tensor]"]


def fused(t: LossInputs, eps: Tensor | None) -> tuple[Tensor, Tensor]:
    z = vaefast.reparameterize(t.mu, t.logvar, eps=eps)
    return z, vaefast.elbo_loss(t.params, t.x, t.mu, t.logvar, likelihood=t.likelihood, beta=t.beta)


def eager(t: LossInputs, eps: Tensor | None) -> tuple[Tensor, Tensor]:
    std = torch.exp(0.5 * t.logvar)
    z = t.mu + std * (torch.randn_like(std) if eps is None else eps)
    kl = -0.5 * torch.sum(1 + t.logvar - t.mu.pow(2) - t.logvar.exp())
    return z, (eager_nll(t) + t.beta * kl) / len(t.x)


def eager_nll(t: LossInputs) -> Tensor:
    first, *scales = t.params
    if t.likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(first, t.x, reduction="sum")
    if t.likelihood == "gaussian":
        (logvar,) = scales
        return 0.5 * torch.sum(math.log(2 * math.pi) + logvar + (t.x - first).pow(2) / logvar.exp())
    return -vaefast.reference.LIKELIHOODS[t.likelihood].distribution(*t.params).log_prob(t.x).sum()


def loss_inputs(model: VAE, x: Tensor, args: argparse.Namespace) -> LossInputs:
    mu, logvar = model.encode(x)
    params = model.decode(mu)
    leaves = [t.detach().requires_grad_() for t in (mu, logvar, *params)]
    return LossInputs(leaves[0], leaves[1], tuple(leaves[2:]), x, torch.randn_like(mu), args.likelihood, args.beta)


def in_float64(t: LossInputs) -> LossInputs:
    mu, logvar, *params = (leaf.detach().double().requires_grad_() for leaf in (t.mu, t.logvar, *t.params))
    return replace(t, mu=mu, logvar=logvar, params=tuple(params), x=t.x.double(), grad_z=t.grad_z.double())


def forward_backward(run: SampleAndLoss, t: LossInputs, eps: Tensor | None = None) -> tuple[Tensor, ...]:
    """z, the loss, and the gradients of both in everything that the networks made."""
    z, loss = run(t, eps)
    gradients = torch.autograd.grad((z, loss), (t.mu, t.logvar, *t.params), (t.grad_z, torch.ones_like(loss)))
    return (z.detach(), loss.detach(), *gradients)


def time_losses(t: LossInputs, backend: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of sampling and loss, forward and backward, taken in turn; first vaefast must be right."""
    contenders: dict[str, tuple[SampleAndLoss, str]] = {
        "vaefast": (fused, backend),
        "eager": (eager, backend),
        "reference": (fused, "reference"),
    }
    eps = torch.randn_like(t.mu)
    # in float64: torch.distributions' float32 gradient of the continuous Bernoulli is wrong in its third digit
    expected = forward_backward(eager, in_float64(t), eps.double())
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for right in (backend, "reference"):
        with vaefast.use_backend(right):
            torch.testing.assert_close(
                forward_backward(fused, t, eps), expected, rtol=1e-4, atol=1e-5, check_dtype=False
            )
    for _ in range(rounds):
        for name, (run, run_backend) in contenders.items():
            with vaefast.use_backend(run_backend):
                times[name].append(milliseconds(run, t))
    # the first fifth warms up
    return {name: statistics.median(values[rounds // 5 :]) for name, values in times.items()}


def milliseconds(run: SampleAndLoss, t: LossInputs) -> float:
    synchronize(t.x.device)
    start = time.perf_counter()
    forward_backward(run, t)
    synchronize(t.x.device)
    return 1e3 * (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Pictures.

PICTURES = {
    "reconstructions.png": "digits that training never saw, above what the decoder makes of their codes: softer",
    "samples.png": "digits that nobody wrote, from noise alone: most can be read",
    "latent.png": "two latent units: each class has its own place, and on the way to another a digit turns into that",
    "curves.png": "reconstruction falls as the code grows dearer; held-out digits stay close to those of training",
}
COLOURS = {"held-out": "#d1495b", "train": "#30638e"}


@torch.no_grad()
def draw_reconstructions(model: VAE, digits: Digits, path: Path) -> None:
    x = common.some_of_each(digits, 3)
    rows = {"scan": x, "model": model.picture(model.encode(x)[0])}
    common.draw_rows(rows, "Held-out digits and their reconstructions from the posterior mean", path)


def draw_samples(model: VAE, path: Path, seed: int) -> None:
    z = torch.randn(128, model.latent, generator=torch.Generator().manual_seed(seed))
    images = model.picture(z.to(next(model.parameters()).device))
    common.draw_sheet(images, "New digits: the decoder's mean at z ~ N(0, I)", path)


def draw_latent(model: VAE, digits: Digits, bound: Bound, path: Path) -> None:
    with torch.no_grad():
        mu = model.encode(digits.held_out)[0].cpu()
    reach = 1.08 * mu.abs().max().item()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 5.4))
    for digit in range(10):
        points = mu[digits.held_out_class == digit]
        left.scatter(points[:, 0], points[:, 1], s=22, color=f"C{digit}", edgecolors="white", linewidths=0.4)
        centre = points.median(dim=0).values
        badge = {"boxstyle": "circle,pad=0.25", "facecolor": f"C{digit}", "edgecolor": "white"}
        left.annotate(str(digit), centre, ha="center", va="center", color="white", weight="bold", bbox=badge)
    left.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="$z_1$", ylabel="$z_2$")
    left.set_title(f"Held-out digits in two latent units (ELBO {bound.elbo:.2f} nats)")
    count = 15
    ticks = torch.distributions.Normal(0, 1).icdf(torch.linspace(0.02, 0.98, count))
    z = torch.cartesian_prod(ticks.flip(0), ticks).flip(1)
    common.show(right, model.picture(z.to(digits.held_out.device)), count)
    right.set_title("The decoder's mean over the same plane")
    right.set(xlabel="$z_1$, from the 2nd to the 98th percentile of N(0, 1)", ylabel="$z_2$, the same")
    common.save(figure, path)


def draw_curves(history: list[Epoch], likelihood: str, path: Path) -> None:
    titles = {
        "elbo": f"ELBO, {likelihood} likelihood",
        "reconstruction": "Reconstruction, $-E_q \\log p(x|z)$",
        "kl": "KL(q(z|x) || N(0, I))",
    }
    epochs = range(1, len(history))
    figure, panels = plt.subplots(1, 3, figsize=(12.5, 3.8))
    for axes, (term, title) in zip(panels, titles.items()):
        for part, colour in COLOURS.items():
            values = [getattr(getattr(epoch, part.replace("-", "_")), term) for epoch in history[1:]]
            axes.plot(epochs, values, color=colour, linewidth=1.6, label=f"{part}: {values[-1]:.2f} at the end")
        axes.set(title=title, xlabel="epoch", ylabel="nats an image")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    common.save(figure, path)


def draw(model: VAE, flat: VAE, digits: Digits, metrics: dict[str, Any], history: list[Epoch], out: Path) -> None:
    draw_reconstructions(model, digits, out / "reconstructions.png")
    draw_samples(model, out / "samples.png", metrics["seed"])
    draw_latent(flat, digits, Bound(**metrics["two_latent_units"]), out / "latent.png")
    draw_curves(history, metrics["likelihood"], out / "curves.png")


# The command line.


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser("Trains a VAE on handwritten digits and draws what it learned.", "out/demo", 100)
    parser.add_argument("--latent", type=common.positive, default=16, help="latent units")
    parser.add_argument("--likelihood", choices=LIKELIHOODS, default="bernoulli", help="p(x|z)")
    parser.add_argument("--beta", type=float, default=1.0, help="the KL's factor in training; the ELBO is told at 1")
    parser.add_argument("--rounds", type=common.positive, default=500, help="repetitions of the timing")
    return common.parse(parser, argv)


def report(metrics: dict[str, Any]) -> None:
    names = {"held-out": "held_out", "train": "train", "untrained": "untrained", "2 latent units": "two_latent_units"}
    print("\nThe ELBO bounds log p(x) of a scan from below: minus what its code loses, minus what its code costs.")
    common.print_bounds({label: metrics[name] for label, name in names.items()})
    print(f"active units: {metrics['active_units']} of {metrics['latent']}")
    print(f"training: {metrics['training_seconds']:.1f} s for both runs")
    times = metrics["loss_ms"]
    print(
        "\nWhat vaefast computes, without the networks around it: the same sample, loss and gradients, by three ways."
    )
    print(f"sampling and loss, forward and backward, {metrics['loss_shape']}, median of {metrics['rounds']}:")
    for name, label in (
        ("vaefast", f"vaefast ({metrics['backend']})"),
        ("eager", "eager PyTorch"),
        ("reference", "vaefast's reference"),
    ):
        print(f"  {label:22}{times[name]:8.3f} ms   eager / this = {times['eager'] / times[name]:.2f}")
    print()
    for picture, sentence in PICTURES.items():
        print(f"{picture:20} {sentence}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    digits = common.read_digits(device)
    start = time.perf_counter()
    model, history = train(digits, args.latent, args, device, f"{args.latent} latent units")
    flat, _ = (model, history) if args.latent == 2 else train(digits, 2, args, device, "2 latent units")
    seconds = time.perf_counter() - start
    batch = digits.train[: args.batch_size]
    metrics: dict[str, Any] = {
        "likelihood": args.likelihood,
        "beta": args.beta,
        "backend": args.device if native(args) else "reference",
        "device": args.device,
        "seed": args.seed,
        "epochs": args.epochs,
        "latent": args.latent,
        "held_out": asdict(evaluate(model.terms, digits.held_out)),
        "train": asdict(evaluate(model.terms, digits.train)),
        "untrained": asdict(history[0].held_out),
        "two_latent_units": asdict(evaluate(flat.terms, digits.held_out)),
        "active_units": int(vaefast.diagnostics.active_units(model.encode(digits.held_out)[0]).sum()),
        "history": [asdict(epoch) for epoch in history],
        "training_seconds": seconds,
        "loss_shape": f"batch {len(batch)}, {args.latent} latent units, {PIXELS} pixels",
        "rounds": args.rounds,
        "loss_ms": time_losses(loss_inputs(model, batch, args), args.backend, args.rounds),
    }
    draw(model, flat, digits, metrics, history, args.out)
    return metrics


def native(args: argparse.Namespace) -> bool:
    return args.backend != "reference" and args.device in vaefast.available_backends()


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
