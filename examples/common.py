"""What the examples share
=======================

The digits, the training loop, the command line, the look of the pictures.

The data is scikit-learn's own copy of the UCI handwritten digits: 1,797 real scans of 8 x 8 numbers from 0 to 16, each
the count of set pixels in a 4 x 4 block of a 32 x 32 bitmap; a fifth of each class is held out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
LEVELS = 16
HIDDEN = 256
SPLIT_SEED = 0
EVALUATION_SAMPLES = 64


@dataclass(frozen=True)
class Digits:
    """Scans ``[N, 64]`` in [0, 1], in steps of 1/16, and the classes of the held-out ones."""

    train: Tensor
    held_out: Tensor
    held_out_class: Tensor


@dataclass(frozen=True)
class Bound:
    """The ELBO and its two terms, nats an image: ``elbo = -(reconstruction + kl)``."""

    elbo: float
    reconstruction: float
    kl: float


Terms = Callable[[Tensor, "torch.Generator | None"], vaefast.ELBOTerms]


def read_digits(device: torch.device) -> Digits:
    digits = load_digits()
    x = torch.tensor(digits.data / LEVELS, dtype=torch.float32)
    y = torch.tensor(digits.target)
    train, held_out = train_test_split(range(len(x)), test_size=0.2, stratify=digits.target, random_state=SPLIT_SEED)
    return Digits(x[train].to(device), x[held_out].to(device), y[held_out])


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def steps_an_epoch(x: Tensor, args: argparse.Namespace) -> int:
    return math.ceil(len(x) / args.batch_size)


def fit(
    networks: Sequence[nn.Parameter],
    scales: Sequence[nn.Parameter],
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    args: argparse.Namespace,
    name: str,
    after_epoch: Callable[[], str],
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Adam over ``args.epochs``; scale parameters go ten times as fast. The bar shows what ``after_epoch`` says."""
    groups = [{"params": list(networks), "lr": args.lr}, {"params": list(scales), "lr": 10 * args.lr}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.Adam(groups)
    steps = args.epochs * steps_an_epoch(x, args)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], total_steps=steps)
    with tqdm(range(args.epochs), desc=name, unit="epoch") as progress:
        for _ in progress:
            for rows in torch.randperm(len(x)).split(args.batch_size):
                optimizer.zero_grad()
                loss(x[rows.to(x.device)]).backward()
                optimizer.step()
                schedule.step()
                after_step()
            progress.set_postfix_str(after_epoch())


@torch.no_grad()
def evaluate(terms: Terms, x: Tensor, samples: int = EVALUATION_SAMPLES) -> Bound:
    """The ELBO with ``samples`` draws of z an image, from a generator of its own that leaves training's noise alone."""
    generator = torch.Generator(x.device).manual_seed(0)
    loss, reconstruction, kl = terms(x.repeat(samples, 1), generator)
    return Bound(-loss.item(), reconstruction.item(), kl.item())


# Pictures.

INK = "#20304c"
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
    "savefig.bbox": "tight",
    "figure.constrained_layout.use": True,
}


def montage(images: Tensor, columns: int, gap: int = 1) -> Tensor:
    """``[N, 64]`` in rows of ``columns``, with NaN between them."""
    rows = len(images) // columns
    padded = F.pad(images.reshape(-1, SIDE, SIDE), (gap, 0, gap, 0), value=math.nan)
    sheet = padded.reshape(rows, columns, SIDE + gap, SIDE + gap).transpose(1, 2).reshape(rows * (SIDE + gap), -1)
    return F.pad(sheet, (0, gap, 0, gap), value=math.nan)


def show(axes: Any, images: Tensor, columns: int) -> None:
    """Images ``[N, 64]`` in [0, 1]."""
    shades = matplotlib.colors.LinearSegmentedColormap.from_list("ink", ["#f6f4ee", "#7f8aa3", INK, "#0b1020"])
    palette = shades.with_extremes(bad="#ffffff")
    axes.imshow(montage(images.cpu(), columns).numpy(), cmap=palette, vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def some_of_each(digits: Digits, each: int) -> Tensor:
    """Held-out scans ``[10 each, 64]``: rows of ten, one of each class."""
    chosen = torch.stack([torch.nonzero(digits.held_out_class == digit)[:each, 0] for digit in range(10)], dim=1)
    return digits.held_out[chosen.flatten().to(digits.held_out.device)]


def draw_rows(rows: dict[str, Tensor], title: str, path: Path) -> None:
    """Named stacks of images ``[10 n, 64]``, drawn as n blocks of one row of ten from each stack."""
    blocks = len(next(iter(rows.values()))) // 10
    figure, panels = plt.subplots(blocks, 1, figsize=(8.4, 0.4 + blocks * (0.25 + 0.76 * len(rows))), squeeze=False)
    for block, axes in enumerate(panels.flat):
        show(axes, torch.cat([images[10 * block : 10 * block + 10].cpu() for images in rows.values()]), 10)
        axes.set_yticks([4.5 + (SIDE + 1) * row for row in range(len(rows))], list(rows))
        axes.tick_params(length=0)
    panels.flat[0].set_title(title)
    save(figure, path)


def draw_sheet(images: Tensor, title: str, path: Path, columns: int = 16) -> None:
    rows = len(images) // columns
    figure, axes = plt.subplots(figsize=(8.4, 0.4 + 0.525 * rows))
    show(axes, images, columns)
    axes.set_title(title)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


# The command line.


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parser(description: str, out: str, epochs: int) -> argparse.ArgumentParser:
    """The options that every example takes."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    made = argparse.ArgumentParser(description=description, formatter_class=formatter)
    made.add_argument("--out", type=Path, default=Path(out), help="folder of the pictures and metrics.json")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train")
    made.add_argument("--epochs", type=positive, default=epochs, help="passes over the data, in each run")
    made.add_argument("--batch-size", type=positive, default=64, help="images a step")
    made.add_argument("--lr", type=float, default=2e-3, help="Adam's highest step size")
    made.add_argument("--backend", choices=["auto", "native", "reference"], default="auto", help="vaefast's back end")
    made.add_argument("--seed", type=int, default=0, help="weights, batches and noise")
    made.add_argument("--threads", type=positive, default=1, help="CPU threads; layers this small gain nothing by more")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = made.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: torch sees no CUDA device; use --device cpu")
    if args.backend == "native" and args.device not in vaefast.available_backends():
        made.error(f"--backend native: no compiled kernels for {args.device}\n{vaefast.show_config()}")
    return args


@contextmanager
def settings(args: argparse.Namespace) -> Iterator[None]:
    """The threads, the back end and the look of the pictures."""
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with vaefast.use_backend(args.backend), plt.rc_context(STYLE):
            yield
    finally:
        torch.set_num_threads(threads)


def print_bounds(bounds: dict[str, dict[str, float]]) -> None:
    """A line for each name's :class:`Bound`."""
    print(f"\n{'nats an image':28}{'ELBO':>10}{'reconstruction':>16}{'KL':>8}")
    for name, bound in bounds.items():
        print(f"{name:28}{bound['elbo']:10.2f}{bound['reconstruction']:16.2f}{bound['kl']:8.2f}")


def write(metrics: dict[str, Any], args: argparse.Namespace) -> None:
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"\npictures and metrics.json are in {args.out}")
