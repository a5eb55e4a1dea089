"""A VAE of handwritten digits, trained in half a minute on a CPU.

The data is scikit-learn's own copy of the UCI handwritten digits: 1,797 real scans of 8 x 8 pixels, scaled to [0, 1]; a
fifth of each class is held out. The model is an encoder and a decoder of two hidden layers; everything between them is
vaefast: ``reparameterize`` draws z and ``elbo_terms`` is the loss. Everything is in nats an image.

A Bernoulli likelihood of grey values is forgiving: few latent units are worth their KL, and the pictures are soft. The
Gaussian and the Laplace learn their noise scale too, which pays for more units and sharper pictures.

    python examples/digits_vae.py --out out/demo
    python examples/digits_vae.py --out out/laplace --likelihood laplace

Written to --out: reconstructions.png, samples.png, latent.png (from a run of its own with two latent units), curves.png
and metrics.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vaefast

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f"this example needs {error.name}: pip install 'vaefast[demo]'") from error

SIDE = 8
PIXELS = SIDE * SIDE
HIDDEN = 256
SPLIT_SEED = 0
EVALUATION_SAMPLES = 64
LIKELIHOODS = [name for name in vaefast.LIKELIHOODS if vaefast.reference.LIKELIHOODS[name].support in ("unit", "real")]


@dataclass(frozen=True)
class Digits:
    """Scans ``[N, 64]`` in [0, 1] and the classes of the held-out ones."""

    train: Tensor
    held_out: Tensor
    held_out_class: Tensor


@dataclass(frozen=True)
class Bound:
    """The ELBO and its two terms, nats an image: ``elbo = -(reconstruction + kl)``."""

    elbo: float
    reconstruction: float
    kl: float


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
        self.entry = vaefast.reference.LIKELIHOODS[likelihood]
        self.encoder = mlp(PIXELS, HIDDEN, HIDDEN, 2 * latent)
        self.decoder = mlp(latent, HIDDEN, HIDDEN, PIXELS)
        self.scales = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in self.entry.params[1:])

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z|x), two views of one tensor."""
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> tuple[Tensor, ...]:
        """The likelihood's parameters."""
        numbers = (self.decoder(z), *self.scales)
        return tuple(vaefast.reference.DOMAINS[domain](x) for domain, x in zip(self.entry.domains, numbers))

    @torch.no_grad()
    def picture(self, z: Tensor) -> Tensor:
        """The mean of p(x|z) as ``[N, 8, 8]`` on the CPU."""
        return self.entry.distribution(*self.decode(z)).mean.reshape(-1, SIDE, SIDE).cpu()


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def read_digits(device: torch.device) -> Digits:
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    train, held_out = train_test_split(range(len(x)), test_size=0.2, stratify=digits.target, random_state=SPLIT_SEED)
    return Digits(x[train].to(device), x[held_out].to(device), y[held_out])


def train(
    digits: Digits, latent: int, args: argparse.Namespace, device: torch.device, name: str
) -> tuple[VAE, list[Epoch]]:
    """A trained model and its history, one entry an epoch after that of the untrained model."""
    torch.manual_seed(args.seed)
    model = VAE(latent, args.likelihood).to(device)
    networks = [*model.encoder.parameters(), *model.decoder.parameters()]
    groups = [{"params": networks, "lr": args.lr}]
    if len(model.scales):
        groups.append({"params": list(model.scales), "lr": 10 * args.lr})
    optimizer = torch.optim.Adam(groups)
    steps = args.epochs * math.ceil(len(digits.train) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], total_steps=steps)
    history = [measure(model, digits, args.likelihood)]
    with tqdm(range(args.epochs), desc=name, unit="epoch") as progress:
        for _ in progress:
            for rows in torch.randperm(len(digits.train)).split(args.batch_size):
                x = digits.train[rows.to(device)]
                mu, logvar = model.encode(x)
                z = vaefast.reparameterize(mu, logvar)
                terms = vaefast.elbo_terms(model.decode(z), x, mu, logvar, likelihood=args.likelihood, beta=args.beta)
                optimizer.zero_grad()
                terms.loss.backward()
                optimizer.step()
                schedule.step()
            history.append(measure(model, digits, args.likelihood))
            progress.set_postfix_str(f"held-out ELBO {history[-1].held_out.elbo:.2f} nats")
    return model, history


@torch.no_grad()
def evaluate(model: VAE, x: Tensor, likelihood: str, samples: int) -> Bound:
    """The ELBO with ``samples`` draws of z an image, from a generator of its own that leaves training's noise alone."""
    generator = torch.Generator(x.device).manual_seed(0)
    mu, logvar = (t.repeat(samples, 1) for t in model.encode(x))
    z = vaefast.reparameterize(mu, logvar, generator=generator)
    terms = vaefast.elbo_terms(model.decode(z), x.repeat(samples, 1), mu, logvar, likelihood=likelihood)
    return Bound(-terms.loss.item(), terms.reconstruction.item(), terms.kl.item())


def measure(model: VAE, digits: Digits, likelihood: str) -> Epoch:
    return Epoch(evaluate(model, digits.train, likelihood, 1), evaluate(model, digits.held_out, likelihood, 1))


@torch.no_grad()
def active_units(model: VAE, x: Tensor) -> int:
    """Latent units whose posterior mean moves with x: Var_x(E_q z) > 0.01 (Burda et al. 2016)."""
    return int((model.encode(x)[0].var(dim=0) > 0.01).sum())


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


def forward_backward(run: SampleAndLoss, t: LossInputs, eps: Tensor | None = None) -> tuple[Tensor, ...]:
    """z, the loss, and the gradients of both in everything that the networks made."""
    z, loss = run(t, eps)
    gradients = torch.autograd.grad((z, loss), (t.mu, t.logvar, *t.params), (t.grad_z, torch.ones_like(loss)))
    return (z.detach(), loss.detach(), *gradients)


def time_losses(t: LossInputs, backend: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of sampling and loss, forward and backward, taken in turn; first they must agree."""
    contenders: dict[str, tuple[SampleAndLoss, str]] = {
        "vaefast": (fused, backend),
        "eager": (eager, backend),
        "reference": (fused, "reference"),
    }
    eps = torch.randn_like(t.mu)
    expected = forward_backward(eager, t, eps)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run, run_backend in contenders.values():
        with vaefast.use_backend(run_backend):
            torch.testing.assert_close(forward_backward(run, t, eps), expected, rtol=1e-4, atol=1e-5)
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

INK = "#20304c"
COLOURS = {"held-out": "#d1495b", "train": "#30638e"}
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}


def montage(images: Tensor, columns: int, gap: int = 1) -> Tensor:
    """``[N, 8, 8]`` in rows of ``columns``, with NaN between them."""
    rows = len(images) // columns
    padded = F.pad(images, (gap, 0, gap, 0), value=math.nan)
    sheet = padded.reshape(rows, columns, SIDE + gap, SIDE + gap).transpose(1, 2).reshape(rows * (SIDE + gap), -1)
    return F.pad(sheet, (0, gap, 0, gap), value=math.nan)


def show(axes: Any, images: Tensor, columns: int) -> None:
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("ink", ["#f6f4ee", "#7f8aa3", INK, "#0b1020"])
    palette = shades.with_extremes(bad="#ffffff")
    axes.imshow(montage(images, columns).numpy(), cmap=palette, vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def draw_reconstructions(model: VAE, digits: Digits, path: Path) -> None:
    each = 3
    chosen = torch.stack([torch.nonzero(digits.held_out_class == digit)[:each, 0] for digit in range(10)], dim=1)
    x = digits.held_out[chosen.flatten().to(digits.held_out.device)]
    with torch.no_grad():
        mu, _ = model.encode(x)
    scans, made = x.reshape(-1, SIDE, SIDE).cpu(), model.picture(mu)
    figure, panels = plt.subplots(each, 1, figsize=(8.4, 5.6))
    for row, axes in enumerate(panels):
        part = slice(10 * row, 10 * row + 10)
        show(axes, torch.cat((scans[part], made[part])), 10)
        axes.set_yticks([4.5, 13.5], ["scan", "model"])
        axes.tick_params(length=0)
    panels[0].set_title("Held-out digits and their reconstructions from the posterior mean")
    save(figure, path)


def draw_samples(model: VAE, path: Path, seed: int) -> None:
    rows, columns = 8, 16
    z = torch.randn(rows * columns, model.latent, generator=torch.Generator().manual_seed(seed))
    figure, axes = plt.subplots(figsize=(8.4, 4.6))
    show(axes, model.picture(z.to(next(model.parameters()).device)), columns)
    axes.set_title("New digits: the decoder's mean at z ~ N(0, I)")
    save(figure, path)


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
    show(right, model.picture(z.to(digits.held_out.device)), count)
    right.set_title("The decoder's mean over the same plane")
    right.set(xlabel="$z_1$, from the 2nd to the 98th percentile of N(0, 1)", ylabel="$z_2$, the same")
    save(figure, path)


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
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


def draw(model: VAE, flat: VAE, digits: Digits, metrics: dict[str, Any], history: list[Epoch], out: Path) -> None:
    with plt.rc_context(STYLE):
        draw_reconstructions(model, digits, out / "reconstructions.png")
        draw_samples(model, out / "samples.png", metrics["seed"])
        draw_latent(flat, digits, Bound(**metrics["two_latent_units"]), out / "latent.png")
        draw_curves(history, metrics["likelihood"], out / "curves.png")


# The command line.


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a VAE on handwritten digits and draws what it learned.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the pictures and metrics.json")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train")
    parser.add_argument("--epochs", type=int, default=100, help="passes over the data, in each of the two runs")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="Adam's highest step size")
    parser.add_argument("--latent", type=int, default=16, help="latent units")
    parser.add_argument("--likelihood", choices=LIKELIHOODS, default="bernoulli", help="p(x|z)")
    parser.add_argument("--beta", type=float, default=1.0, help="the KL's factor in training; the ELBO is told at 1")
    parser.add_argument("--backend", choices=["auto", "native", "reference"], default="auto", help="vaefast's back end")
    parser.add_argument("--seed", type=int, default=0, help="weights, batches and noise")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; layers this small gain nothing from more")
    parser.add_argument("--rounds", type=int, default=500, help="repetitions of the timing")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; use --device cpu")
    if args.backend == "native" and args.device not in vaefast.available_backends():
        parser.error(f"--backend native: no compiled kernels for {args.device}\n{vaefast.show_config()}")
    if min(args.epochs, args.batch_size, args.latent, args.threads, args.rounds) < 1:
        parser.error("--epochs, --batch-size, --latent, --threads and --rounds must be at least 1")
    return args


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def report(metrics: dict[str, Any]) -> None:
    def line(name: str, bound: dict[str, float]) -> str:
        return f"{name:18}{bound['elbo']:10.2f}{bound['reconstruction']:16.2f}{bound['kl']:8.2f}"

    print(f"\n{'nats an image':18}{'ELBO':>10}{'reconstruction':>16}{'KL':>8}")
    print(line("held-out", metrics["held_out"]))
    print(line("train", metrics["train"]))
    print(line("untrained", metrics["untrained"]))
    print(line("2 latent units", metrics["two_latent_units"]))
    print(f"active units: {metrics['active_units']} of {metrics['latent']}")
    print(f"training: {metrics['training_seconds']:.1f} s for both runs")
    times = metrics["loss_ms"]
    print(f"\nsampling and loss, forward and backward, {metrics['loss_shape']}, median of {metrics['rounds']}:")
    for name, label in (
        ("vaefast", f"vaefast ({metrics['backend']})"),
        ("eager", "eager PyTorch"),
        ("reference", "vaefast's reference"),
    ):
        print(f"  {label:22}{times[name]:8.3f} ms   eager / this = {times['eager'] / times[name]:.2f}")


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    digits = read_digits(device)
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
        "held_out": asdict(evaluate(model, digits.held_out, args.likelihood, EVALUATION_SAMPLES)),
        "train": asdict(evaluate(model, digits.train, args.likelihood, EVALUATION_SAMPLES)),
        "untrained": asdict(history[0].held_out),
        "two_latent_units": asdict(evaluate(flat, digits.held_out, args.likelihood, EVALUATION_SAMPLES)),
        "active_units": active_units(model, digits.held_out),
        "history": [asdict(epoch) for epoch in history],
        "training_seconds": seconds,
        "loss_shape": f"batch {len(batch)}, {args.latent} latent units, {PIXELS} pixels",
        "rounds": args.rounds,
        "loss_ms": time_losses(loss_inputs(model, batch, args), args.backend, args.rounds),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    draw(model, flat, digits, metrics, history, args.out)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def native(args: argparse.Namespace) -> bool:
    return args.backend != "reference" and args.device in vaefast.available_backends()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, measures, draws; returns what metrics.json holds."""
    args = parse(argv)
    with cpu_threads(args.threads), vaefast.use_backend(args.backend):
        metrics = run(args)
    report(metrics)
    print(f"\npictures and metrics.json are in {args.out}")
    return metrics


if __name__ == "__main__":
    main()
