"""``python -m tools.accuracy``: writes docs/accuracy.md, the worst error of each function in each dtype, and where.

Kernels, the PyTorch engine and PyTorch's own expression get the same random inputs, rounded to the dtype; the truth is
the formula in float64 at those, and for float64 in 200 digits. ``tests/test_accuracy.py`` holds the page.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from mpmath import mp, mpf
from torch import Tensor

import vaefast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from inputs import LIKELIHOOD_CASES, planes_shape, raw_for, targets, training  # noqa: E402

from tools import expressions  # noqa: E402
from tools.expressions import Call  # noqa: E402
from vaefast.likelihoods import LikelihoodEntry  # noqa: E402

PAGE = ROOT / "docs" / "accuracy.md"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COUNT = {torch.float32: 20_000, torch.float64: 150, torch.bfloat16: 20_000, torch.float16: 20_000}
COLUMNS = ("kernels", "PyTorch engine", "PyTorch")

HEAD = """# Accuracy

The worst error of each function, and the arguments where it is: of the kernels, of the engine in PyTorch that stands in
where nothing was compiled, and of PyTorch's own expression in the same dtype. `make accuracy` writes this page, and
`tests/test_accuracy.py` holds it. {machine}

An error is against the truth at the inputs as they were rounded to the dtype: the formula in float64, and for float64
200 digits, whose gradient is a central difference in them. It is relative, |found - true| / |true|, for a KL and for
the gradient of one to N(0, I), and |found - true| / max(1, |true|) elsewhere. Points whose true result the dtype cannot
hold as a normal number are left out. `inf` and `NaN` are results that are not finite where the truth is. *A rounding*
is how far the truth itself moves, at the kernels' worst point, where each argument moves by its last place: a result
that is wrong by no more is as good as its arguments. There are {many} random points a row and dtype, {few} of float64,
a fifth of those or less where a point is many numbers. A half dtype rounds its results: 4e-3 in bfloat16, 5e-4 in
float16.

What arguments are drawn from:

- *everyday*: as networks give them at first, N(0, 1) through the activation, real parameters N(0, 4); data drawn from
  the likelihood at those parameters. For a KL mean and log variance are N(0, 1).
- *wide*: real parameters and means ±10^U(-8, 4), logarithms of scales and rates U(-30, 30), positive parameters
  10^U(-6, 6), probabilities 10^-U(0, 11.9) from either end, planes of mixtures ±10^U(-8, 1.5); data ±10^U(-3, 4), above
  0 10^U(-30, 4), counts to 10^6, shares and bins anywhere. For a KL mean and log variance are ±10^U(-20, 1.9), most of
  them next to the prior.

PyTorch's expression is the function of `torch.nn.functional` or minus the `log_prob` of `torch.distributions` where
there is one; else what a well-known project writes (scvi-tools' counts, PixelCNN++'s logistics), and the textbook's KL,
`-0.5 * (1 + logvar - mu**2 - logvar.exp())`.
"""


class Inputs(NamedTuple):
    """Of each site the tensors that are trained, and those that are given; in float64, as the dtype rounded them."""

    trained: list[Tensor]
    given: list[Tensor]


Draw = Callable[[torch.Generator, torch.dtype, int], Inputs]


@dataclass(frozen=True)
class Case:
    """A function of one result a site: ``ours(*trained, *given)``, ``theirs`` likewise, ``exact`` in float64; and
    ``digits`` of one site's numbers, a list for each tensor."""

    group: str
    name: str
    domain: str
    draw: Draw
    ours: Call
    theirs: Call
    exact: Call
    digits: Callable[..., mpf]
    relative: tuple[bool, bool] = (False, False)  # the value's error, and the gradient's
    share: float = 1.0  # of a row's points: where each takes many numbers

    @property
    def row(self) -> str:
        return f"{self.name}, {self.domain}"


class Worst(NamedTuple):
    error: float
    at: tuple[float, ...]

    def __str__(self) -> str:
        if math.isnan(self.error):
            return f"NaN at {told(self.at)}"
        return "0" if self.error == 0 else f"{self.error:.1e} at {told(self.at)}"


def told(numbers: Sequence[float]) -> str:
    """Short, in brackets; of many, the first and how many there are."""
    shown = ", ".join(f"{x:.3g}" for x in numbers[:5])
    return f"({shown}{f', .. {len(numbers)}' if len(numbers) > 5 else ''})"


# ---- inputs


def magnitudes(g: torch.Generator, shape: Sequence[int], low: float, high: float) -> Tensor:
    """10^U(low, high)"""
    return 10.0 ** (low + (high - low) * torch.rand(tuple(shape), generator=g, dtype=torch.float64))


def signs(g: torch.Generator, shape: Sequence[int]) -> Tensor:
    return torch.randint(2, tuple(shape), generator=g).double().mul(2).sub(1)


def shares(g: torch.Generator, shape: Sequence[int]) -> Tensor:
    small = magnitudes(g, shape, -11.9, 0.0)
    return torch.where(signs(g, shape) > 0, small, 1 - small)


WIDE: dict[str, Callable[[torch.Generator, Sequence[int]], Tensor]] = {
    "real": lambda g, n: signs(g, n) * magnitudes(g, n, -8.0, 4.0),
    "log": lambda g, n: 60 * torch.rand(tuple(n), generator=g, dtype=torch.float64) - 30,
    "positive": lambda g, n: magnitudes(g, n, -6.0, 6.0),
    "unit": shares,
    "total": lambda g, n: magnitudes(g, n, 0.0, 6.0).ceil(),
    "planes": lambda g, n: signs(g, n) * magnitudes(g, n, -8.0, 1.5),
}
WIDE_DATA: dict[str, Callable[[torch.Generator, Sequence[int]], Tensor]] = {
    "unit": lambda g, n: torch.rand(tuple(n), generator=g, dtype=torch.float64),
    "real": lambda g, n: signs(g, n) * magnitudes(g, n, -3.0, 4.0),
    "positive": lambda g, n: magnitudes(g, n, -30.0, 4.0),
    "at least 0": lambda g, n: magnitudes(g, n, -30.0, 4.0) * (signs(g, n) > 0),
    "count": lambda g, n: magnitudes(g, n, -0.5, 6.0).floor(),
    "bins": lambda g, n: torch.randint(256, tuple(n), generator=g).double() * 2 / 255 - 1,
}


def rounded(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    most = torch.finfo(dtype).max
    return [t.clamp(-most, most).to(dtype).double() for t in tensors]


def data_of(likelihood: str, count: int, domain: str) -> Draw:
    entry = vaefast.reference.LIKELIHOODS[likelihood]

    def everyday(g: torch.Generator, dtype: torch.dtype, n: int) -> Inputs:
        data = training(likelihood, count, (n, 1) if entry.planes else (n,), dtype, seed=g.initial_seed())
        return Inputs(rounded(data.recon, dtype), [data.target.double()])

    def wide(g: torch.Generator, dtype: torch.dtype, n: int) -> Inputs:
        shape = planes_shape(likelihood, (n, 1)) if entry.planes else (n,)
        recon = rounded([WIDE[domain](g, shape) for domain in entry.domains[:count]], dtype)
        if entry.support in WIDE_DATA:
            like = targets(likelihood, recon).shape if entry.planes else shape
            return Inputs(recon, rounded([WIDE_DATA[entry.support](g, like)], dtype))
        return Inputs(recon, rounded([targets(likelihood, recon)], dtype))

    return everyday if domain == "everyday" else wide


def posteriors(parameterization: str, domain: str, prior: bool = False, eps: bool = False) -> Draw:
    def draw(g: torch.Generator, dtype: torch.dtype, n: int) -> Inputs:
        def normal() -> Tensor:
            return torch.randn(n, generator=g, dtype=torch.float64)

        if domain == "everyday":
            mu, raw = normal(), raw_for(parameterization, (n,), torch.float64, g.initial_seed())
        else:
            mu, lv = (signs(g, (n,)) * magnitudes(g, (n,), -20.0, 1.9) for _ in range(2))
            raw = RAW[parameterization](lv)
        found = [mu, raw, *([normal(), normal()] if prior else [])]
        return Inputs(rounded(found, dtype), rounded([normal()], dtype) if eps else [])

    return draw


# the log variance into each parameterization's raw
RAW: dict[str, Call] = {
    "logvar": lambda lv: lv,
    "log_std": lambda lv: lv / 2,
    "std": lambda lv: (lv / 2).exp(),
    "var": lambda lv: lv.exp(),
    "softplus": lambda lv: (lv / 2).exp() + torch.log(-torch.expm1(-(lv / 2).exp())),
}


# ---- the functions


def likelihood_cases() -> Iterator[Case]:
    for likelihood, count in LIKELIHOOD_CASES:
        entry = vaefast.reference.LIKELIHOODS[likelihood]

        def ours(*tensors: Tensor, likelihood: str = likelihood) -> Tensor:
            return vaefast.reconstruction_loss(tensors[:-1], tensors[-1], likelihood=likelihood, reduction="none")

        def exact(*tensors: Tensor, entry: LikelihoodEntry = entry) -> Tensor:
            return entry.nll(tensors[-1], *tensors[:-1], **entry.options)

        name = f"`{likelihood}`" if count == len(entry.params) else f"`{likelihood}` of {entry.params[0]} alone"
        for domain in DOMAINS:
            yield Case(
                "Likelihoods", name, domain, data_of(likelihood, count, domain), ours, expressions.NLL[likelihood],
                exact, expressions.digits_of(likelihood, dict(entry.options)), share=0.1 if entry.planes else 1.0,
            )  # fmt: skip


def h(x: Tensor) -> Tensor:
    """e^x - 1 - x, without cancellation: by its series below 1/2."""
    small = torch.where(x.abs() < 0.5, x, 0.0)
    series = torch.zeros_like(x)
    for k in range(18, 1, -1):
        series = (series + 1) * small / k if k > 2 else (series + 1) * small * small / 2
    return torch.where(x.abs() < 0.5, series, torch.expm1(torch.where(x.abs() < 0.5, 1.0, x)) - x)


def kl_cases() -> Iterator[Case]:
    for parameterization, activation in vaefast.reference.PARAMETERIZATIONS.items():

        def ours(mu: Tensor, raw: Tensor, *prior: Tensor, p: str = parameterization) -> Tensor:
            return vaefast.gaussian_kl(mu, raw, *prior, parameterization=p, reduction="none")

        def exact(mu: Tensor, raw: Tensor, *prior: Tensor, logvar: Call = activation.logvar) -> Tensor:
            pm, plv = prior or (torch.zeros_like(mu), torch.zeros_like(mu))
            return 0.5 * (h(logvar(raw) - plv) + (mu - pm) ** 2 * torch.exp(-plv))

        for domain in DOMAINS:
            yield Case(
                "The KL", f"`{parameterization}`", domain, posteriors(parameterization, domain), ours,
                expressions.KL[parameterization], exact, expressions.kl_digits(parameterization), (True, True),
            )  # fmt: skip
        if parameterization == "logvar":
            yield Case(
                "The KL", "`logvar` to a prior", "everyday", posteriors(parameterization, "everyday", prior=True), ours,
                expressions.textbook_kl, exact, expressions.kl_digits(parameterization), (True, False),
            )  # fmt: skip


def sample_cases() -> Iterator[Case]:
    for parameterization, activation in vaefast.reference.PARAMETERIZATIONS.items():

        def ours(mu: Tensor, raw: Tensor, eps: Tensor, p: str = parameterization) -> Tensor:
            return vaefast.reparameterize(mu, raw, parameterization=p, eps=eps)

        def theirs(mu: Tensor, raw: Tensor, eps: Tensor, std: Call = expressions.STD[parameterization]) -> Tensor:
            return mu + std(raw) * eps

        def exact(mu: Tensor, raw: Tensor, eps: Tensor, std: Call = activation.std) -> Tensor:
            return mu + std(raw) * eps

        for domain in DOMAINS:
            yield Case(
                "Samples", f"`{parameterization}`", domain, posteriors(parameterization, domain, eps=True), ours,
                theirs, exact, expressions.sample_digits(parameterization),
            )  # fmt: skip


def normals(shapes: Sequence[Sequence[int]], scale: float = 1.0) -> Draw:
    """[n, *shape] each, N(0, scale^2)"""

    def draw(g: torch.Generator, dtype: torch.dtype, n: int) -> Inputs:
        found = [scale * torch.randn(n, *shape, generator=g, dtype=torch.float64) for shape in shapes]
        return Inputs(rounded(found, dtype), [])

    return draw


def near_uniform(g: torch.Generator, dtype: torch.dtype, n: int) -> Inputs:
    """Logits of magnitudes far below 1, as of a posterior that has collapsed."""
    found = [signs(g, (n, 8)) * magnitudes(g, (n, 8), -8.0, -1.0) for _ in range(2)]
    return Inputs(rounded(found, dtype), [])


def categorical_cases() -> Iterator[Case]:
    def ours(logits: Tensor, prior_logits: Tensor) -> Tensor:
        return vaefast.categorical_kl(logits, prior_logits, reduction="none")

    def exact(logits: Tensor, prior_logits: Tensor) -> Tensor:
        log_q, log_p = logits.log_softmax(-1), prior_logits.log_softmax(-1)
        return (log_q.exp() * h(log_p - log_q)).sum(-1)

    for domain, draw in {"everyday": normals([[8], [8]]), "near each other": near_uniform}.items():
        yield Case(
            "The KL", "`categorical_kl` of 8 classes", domain, draw, ours, expressions.categorical_kl, exact,
            expressions.categorical_kl_digits, (True, False), share=0.2,
        )  # fmt: skip


def mixture_cases() -> Iterator[Case]:
    """One mixture for all z: of each site its own, so that a call takes one."""

    def one_by_one(f: Call) -> Call:
        return lambda *tensors: torch.stack([f(*site).reshape(()) for site in zip(*tensors)])

    def ours(z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor) -> Tensor:
        return vaefast.priors.mixture_log_prob(z.unsqueeze(0), mus, logvars, logits)

    yield Case(
        "Priors", "`priors.mixture_log_prob`, 5 of 3 dimensions", "everyday", normals([[3], [5, 3], [5, 3], [5]]),
        one_by_one(ours), expressions.mixture_log_prob, expressions.mixture_log_prob, expressions.mixture_digits,
        share=0.02,
    )  # fmt: skip


DOMAINS = ("everyday", "wide")
CASES = [*kl_cases(), *categorical_cases(), *sample_cases(), *likelihood_cases(), *mixture_cases()]


# ---- errors


def results(f: Call, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Of each site the value, and the gradients in what is trained; in float64."""
    leaves = [t.to(dtype).requires_grad_() for t in inputs.trained]
    value = f(*leaves, *(t.to(dtype) for t in inputs.given))
    gradients = torch.autograd.grad(value.sum(), leaves)
    return [t.detach().double() for t in (value.view(len(leaves[0])), *gradients)]


def true_digits(case: Case, inputs: Inputs) -> list[Tensor]:
    """The same in 200 digits; a gradient is a central difference, of a step of 10^-60 of the number."""
    tensors = [*inputs.trained, *inputs.given]
    value, gradients = [], [torch.zeros(t.shape, dtype=t.dtype) for t in inputs.trained]
    with mp.workdps(200):
        for site in range(len(tensors[0])):
            lists = [[mpf(x) for x in t[site].flatten().tolist()] for t in tensors]
            value.append(float(case.digits(*lists)))
            for numbers, gradient in zip(lists, gradients):
                flat = gradient[site].view(-1)
                for k, x in enumerate(numbers):
                    step = max(abs(x), mpf(10) ** -30) * mpf(10) ** -60
                    numbers[k] = x + step
                    above = case.digits(*lists)
                    numbers[k] = x - step
                    slope = (above - case.digits(*lists)) / (2 * step)
                    flat[k] = float(slope) if abs(slope) > mpf(10) ** -50 else 0.0  # 0 but for the difference's error
                    numbers[k] = x
    return [torch.tensor(value, dtype=torch.float64), *gradients]


def truth(case: Case, inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    return true_digits(case, inputs) if dtype == torch.float64 else results(case.exact, inputs, torch.float64)


def errors(found: Tensor, true: Tensor, relative: bool, dtype: torch.dtype) -> Tensor:
    """[sites], of each the greatest."""
    info, scale = torch.finfo(dtype), true.abs()
    held = true.isfinite() & (scale < info.max)
    if relative:
        held &= (scale >= info.tiny) | (true == 0)
        scale = torch.where(true == 0, 1.0, scale)
    else:
        scale = scale.clamp(min=1.0)
    off = torch.where(found == true, 0.0, (found - true).abs() / scale)
    return torch.where(held, off, 0.0).reshape(len(true), -1).amax(1)  # a NaN is the greatest


def at_site(inputs: Inputs, site: int) -> Inputs:
    return Inputs(*([t[site : site + 1] for t in tensors] for tensors in inputs))


def of_a_rounding(case: Case, inputs: Inputs, dtype: torch.dtype, gradient: bool) -> float:
    """How far the truth at one site moves where each argument moves by its last place, or stays: the most of 16."""
    g, eps = torch.Generator().manual_seed(0), torch.finfo(dtype).eps

    def moved(t: Tensor) -> Tensor:
        steps = torch.randint(-1, 2, (16, *t.shape[1:]), generator=g).double()
        return t * (1 + eps * torch.where(t == t.round(), 0.0, steps))  # what is counted does not move

    there = truth(case, inputs, dtype)
    near = truth(case, Inputs(*([moved(t) for t in tensors] for tensors in inputs)), dtype)
    pairs = [*zip(near, there)][1:] if gradient else [*zip(near, there)][:1]
    return max(errors(a, b.expand_as(a), case.relative[gradient], dtype).max().item() for a, b in pairs)


class Row(NamedTuple):
    """By column, each the worst; a text where an expression does not run. And what a rounding does to the truth."""

    cells: dict[str, Worst | str]
    rounding: float


def rows_of(case: Case, dtype: torch.dtype, seed: int = 1, points: float = 1.0) -> list[Row]:
    """Of the value, and of all gradients; at so large a share of the page's points."""
    g = torch.Generator().manual_seed(seed)
    inputs = case.draw(g, dtype, max(5, int(COUNT[dtype] * case.share * points)))
    true = truth(case, inputs, dtype)
    cells: tuple[dict[str, Worst | str], dict[str, Worst | str]] = {}, {}
    sites = [0, 0]
    for column in COLUMNS:
        try:
            if column == "PyTorch":
                found = results(case.theirs, inputs, dtype)
            else:
                with vaefast.use_backend("auto" if column == "kernels" else "reference"):
                    found = results(case.ours, inputs, dtype)
        except (NotImplementedError, RuntimeError) as error:
            for each in cells:
                each[column] = type(error).__name__
            continue
        off = [errors(a, b, case.relative[k > 0], dtype) for k, (a, b) in enumerate(zip(found, true))]
        for k, worst in enumerate((off[0], torch.stack(off[1:]).amax(0))):
            site = int(worst.argmax())
            sites[k] = site if column == "kernels" else sites[k]
            numbers = [x for t in (*inputs.trained, *inputs.given) for x in t[site].flatten().tolist()]
            cells[k][column] = Worst(worst[site].item(), tuple(numbers))
    at = (at_site(inputs, site) for site in sites)
    return [Row(each, of_a_rounding(case, there, dtype, k > 0)) for k, (each, there) in enumerate(zip(cells, at))]


# ---- the page


def table(group: str, dtype: torch.dtype) -> str:
    lines = ["| function | of | kernels | PyTorch engine | PyTorch | a rounding |", "|---|---|---|---|---|---|"]
    for case in CASES:
        if case.group == group:
            for what, row in zip(("value", "gradient"), rows_of(case, dtype)):
                cells = " | ".join(str(row.cells[c]) for c in COLUMNS)
                lines.append(f"| {case.row} | {what} | {cells} | {row.rounding:.1e} |")
    return "\n".join(lines)


def page() -> str:
    machine = f"This one is of {torch.backends.cpu.get_cpu_capability()} kernels and torch {torch.__version__}."
    many, few = COUNT[torch.float32], COUNT[torch.float64]
    parts = [HEAD.format(machine=machine, many=f"{many:,}", few=few)]
    for group in dict.fromkeys(case.group for case in CASES):
        parts.append(f"## {group}\n")
        parts += [f"### {group} in {str(dtype).removeprefix('torch.')}\n\n{table(group, dtype)}\n" for dtype in DTYPES]
    return "\n".join(parts)


def main() -> None:
    torch.set_num_threads(1)
    PAGE.write_text(page())
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
