"""``python -m tools.convergence``: one VAE trained with the textbook's loss and with vaefast's engines, from ten seeds.

Writes the table and the picture of docs/trust.md. Networks, batches and the held-out bound are the same for every way;
the bound is the textbook's in float64, so that no engine judges itself. Then a start from a collapsed posterior, where
the textbook's KL has no digits left.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import scipy.optimize
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vaefast
from benchmarks.report import filled
from tools import ROOT

PAGE = ROOT / "docs" / "trust.md"
PICTURE = ROOT / "docs" / "convergence.png"
SEEDS, EPOCHS, BATCH, LATENT, HIDDEN = 10, 60, 128, 10, 128
RATE, SAMPLES = 2e-3, 16
PIXELS, LEVELS = 64, 16
COLLAPSED, STEPS, SLOW = 1e-5, 300, 1e-7  # what the encoder's last layer is multiplied by; the steps after, their rate


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, PIXELS))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, 1)
        return mu, logvar


class Loss(NamedTuple):
    """Nats an image."""

    total: Tensor
    kl: Tensor


def textbook_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def textbook(model: VAE, x: Tensor, eps: Tensor | None = None) -> Loss:
    """As in pytorch/examples, over the batch."""
    mu, logvar = model.encode(x)
    std = torch.exp(0.5 * logvar)
    z = mu + std * (torch.randn_like(std) if eps is None else eps)
    nll = F.binary_cross_entropy_with_logits(model.decoder(z), x, reduction="sum")
    kl = textbook_kl(mu, logvar) / len(x)
    return Loss(nll / len(x) + kl, kl)


def fused(model: VAE, x: Tensor) -> Loss:
    mu, logvar = model.encode(x)
    terms = vaefast.elbo_terms(model.decoder(vaefast.reparameterize(mu, logvar)), x, mu, logvar)
    return Loss(terms.loss, terms.kl)


def bfloat16() -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16)


class Way(NamedTuple):
    loss: Callable[[VAE, Tensor], Loss]
    backend: str = "auto"
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext


WAYS = {
    "textbook": Way(textbook),
    "PyTorch engine": Way(fused, "reference"),
    "kernels": Way(fused, "native"),
    "kernels, bfloat16 autocast": Way(fused, "native", bfloat16),
    "textbook, bfloat16 autocast": Way(textbook, autocast=bfloat16),
}


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's scans in [0, 1]: what is trained on, and a fifth that is held out."""
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().data / LEVELS, dtype=torch.float32)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[len(x) // 5 :]], x[order[: len(x) // 5]]


def fresh(seed: int) -> VAE:
    torch.manual_seed(seed)
    return VAE()


def steps(way: Way, model: VAE, x: Tensor, seed: int, rate: float, count: int) -> Iterator[Loss]:
    """So many steps of Adam; each step's loss."""
    optimizer, g = torch.optim.Adam(model.parameters(), rate), torch.Generator().manual_seed(seed)
    done = 0
    while True:
        for rows in torch.randperm(len(x), generator=g).split(BATCH):
            if done == count:
                return
            done += 1
            with vaefast.use_backend(way.backend), way.autocast():
                loss = way.loss(model, x[rows])
            optimizer.zero_grad()
            loss.total.backward()
            yield loss
            optimizer.step()


@torch.no_grad()
def held_out_elbo(model: VAE, x: Tensor) -> float:
    """In float64, over SAMPLES draws an image that are every model's."""
    wide, rows = copy.deepcopy(model).double(), x.double().repeat(SAMPLES, 1)
    eps = torch.randn(len(rows), LATENT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return -textbook(wide, rows, eps).total.item()


def trained(way: Way, seed: int, epochs: int, train: Tensor, held_out: Tensor) -> float:
    model = fresh(seed)
    for _ in steps(way, model, train, seed, RATE, epochs * math.ceil(len(train) / BATCH)):
        pass
    return held_out_elbo(model, held_out)


# ---- what ten seeds can tell


class Comparison(NamedTuple):
    """A way's ELBOs less the textbook's, seed by seed."""

    mean: float
    interval: float  # half of the 95% interval
    p: float  # of the paired t-test
    found: float  # the difference that the test at 5% finds with probability 0.8


def compared(elbos: Sequence[float], textbooks: Sequence[float]) -> Comparison:
    n, off = len(elbos), [a - b for a, b in zip(elbos, textbooks)]
    error, mean = statistics.stdev(off) / math.sqrt(n), statistics.fmean(off)
    t = scipy.stats.t(n - 1)
    least = t.ppf(0.975)

    def power(difference: float) -> float:
        law = scipy.stats.nct(n - 1, difference / error)
        return float(law.sf(least) + law.cdf(-least))

    found = scipy.optimize.brentq(lambda d: power(d) - 0.8, 0.0, 6 * error)
    return Comparison(mean, least * error, float(2 * t.sf(abs(mean) / error)), float(found))


def table(elbos: dict[str, list[float]]) -> str:
    lines = [
        "| trained with | held-out ELBO, nats an image | less the textbook's | p | would be found |",
        "|---|---|---|---|---|",
    ]
    for name, values in elbos.items():
        own = f"| {name} | {statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f} |"
        if name == "textbook":
            lines.append(f"{own} | | |")
            continue
        c = compared(values, elbos["textbook"])
        lines.append(f"{own} {c.mean:+.3f} ± {c.interval:.3f} | {c.p:.2f} | {c.found:.3f} |")
    return "\n".join(lines)


# ---- from a collapsed start


class Start(NamedTuple):
    """At each step the KL as a way tells it, and as it is, nats an image."""

    told: list[float]
    true: list[float]


def from_collapse(way: Way, train: Tensor) -> Start:
    model = fresh(0)
    with torch.no_grad():
        for p in model.encoder[2].parameters():
            p.mul_(COLLAPSED)
    start = Start([], [])
    batches = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), SLOW)
    for _ in range(STEPS):
        x = train[torch.randint(len(train), (BATCH,), generator=batches)]
        with vaefast.use_backend(way.backend):
            loss = way.loss(model, x)
        with torch.no_grad():
            mu, logvar = (t.double() for t in model.encode(x))
            # e^l - 1 - l by its series, which has all its digits below 1e-2
            h = torch.where(logvar.abs() < 1e-2, series(logvar), torch.expm1(logvar) - logvar)
            start.true.append((0.5 * (mu**2 + h)).sum().item() / len(x))
        start.told.append(loss.kl.item())
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    return start


def series(x: Tensor) -> Tensor:
    return x**2 / 2 + x**3 / 6 + x**4 / 24 + x**5 / 120 + x**6 / 720


def table_of_starts(starts: dict[str, Start]) -> str:
    lines = ["| KL of | at the start | true | below 0 | wrong by more than a tenth |", "|---|---|---|---|---|"]
    for name, s in starts.items():
        wrong = sum(abs(a - b) > 0.1 * b for a, b in zip(s.told, s.true))
        below = sum(a < 0 for a in s.told)
        first = f"{s.told[0]:.1e} | {s.true[0]:.1e}"
        lines.append(f"| {name} | {first} | {below} of {STEPS} steps | {wrong} of {STEPS} |")
    return "\n".join(lines)


def draw(elbos: dict[str, list[float]], starts: dict[str, Start]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for k, (name, values) in enumerate(elbos.items()):
        left.plot(values, [k] * len(values), "o", alpha=0.5, color="#9aa0a6" if "textbook" in name else "#2b6cb0")
        left.plot(statistics.fmean(values), k, "|", markersize=22, color="#20304c")
    left.set_yticks(range(len(elbos)), list(elbos))
    left.invert_yaxis()
    left.set_xlabel("held-out ELBO, nats an image; a dot a seed")
    steps_ = range(1, STEPS + 1)
    for (name, s), colour in zip(starts.items(), ("#e8a33d", "#2b6cb0")):
        above = [(n, a) for n, a in zip(steps_, s.told) if a > 0]
        below = [(n, -a) for n, a in zip(steps_, s.told) if a < 0]
        right.plot(*zip(*above), ".", color=colour, label=name)
        if below:
            right.plot(*zip(*below), "x", color=colour, label=f"{name}, below 0")
    right.plot(steps_, starts["kernels"].true, "-", color="#20304c", linewidth=1, label="true")
    right.set(xscale="log", yscale="log", xlabel="step from a collapsed start", ylabel="KL, nats an image")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=110)
    print(f"written: {PICTURE}")


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="tools.convergence", description=__doc__)
    p.add_argument("--seeds", type=int, default=SEEDS)
    p.add_argument("--epochs", type=int, default=EPOCHS)
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    began, (train, held_out) = time.monotonic(), digits()
    elbos: dict[str, list[float]] = {name: [] for name in WAYS}
    for seed in range(args.seeds):
        for name, way in WAYS.items():
            elbos[name].append(trained(way, seed, args.epochs, train, held_out))
        print(f"seed {seed}: {', '.join(f'{name} {e[-1]:.2f}' for name, e in elbos.items())}", flush=True)
    starts = {name: from_collapse(WAYS[name], train) for name in ("textbook", "kernels")}
    filled(PAGE, "convergence", [table(elbos), table_of_starts(starts)])
    draw(elbos, starts)
    print(f"{time.monotonic() - began:.0f} s, {time.process_time():.0f} s of a core")


if __name__ == "__main__":
    main()
