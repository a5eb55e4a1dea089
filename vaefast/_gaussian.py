"""The Gaussian arithmetic in PyTorch, elementwise: the Python side of ``csrc/posterior.h``. And the reductions.

``PARAMETERIZATIONS`` is one of the two registries: an entry here and a struct there is all that a new one takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._checks import wrapped

# None is 0
Prior = Tensor | float | None
# a parameterization's name, clamp and floor; the bounds are infinite where there is no clamp
Spec = tuple[str, float, float, float]


class Activation(NamedTuple):
    """raw -> the standard deviation, raw -> the log variance without going through it; and their derivatives, each a
    tensor times a number: that of the standard deviation s from raw and s, where None is 1, that of the log variance
    from raw. ``short`` is a shorter way to the log variance with its derivative, without autograd; None of raw that it
    is not for. ``power`` is that of raw which the variance is, 0 where it is none."""

    std: Callable[[Tensor], Tensor]
    logvar: Callable[[Tensor], Tensor]
    dstd: Callable[[Tensor, Tensor], tuple[Tensor | None, float]]
    dlogvar: Callable[[Tensor], tuple[Tensor | None, float]]
    short: Callable[[Tensor], tuple[Tensor, Tensor, float] | None] = lambda r: None
    power: int = 0


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), which beyond 40 is x even in float64."""
    return F.softplus(x, threshold=40.0)


# from here down softplus is e^x, even in float64
_LOW = -40.0
# and from here its logarithm is x in float32, and its slope 1
_LOW_NARROW = -16.0


def _log_softplus(x: Tensor) -> Tensor:
    """Twice the logarithm, which does not underflow with it; and whose gradient, divided by the softplus and multiplied
    by its slope, overflows on the way only where it is next to infinite itself."""
    low = x < (_LOW if x.dtype == torch.float64 else _LOW_NARROW)
    return 2 * torch.where(low, x, torch.log(softplus(torch.where(low, 0.0, x))))


def _short_log_softplus(x: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """The same and its slope on the CPU, where e^x neither vanishes nor overflows: no choice by element."""
    if not x.is_cpu or not all(abs(t.item()) <= -_LOW for t in x.aminmax()):
        return None
    e = torch.exp(x)
    s = torch.log1p(e)
    slope = e.div_((e + 1).mul_(s))
    return s.log_().mul_(2), slope, 2.0


_constants: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}


def constant(value: float, like: Tensor) -> Tensor:
    """A number as a tensor that is kept: an operation takes it in half the time of one that it has to make."""
    key = value, like.dtype, like.device
    found = _constants.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = _constants[key] = torch.full((), value, dtype=like.dtype, device=like.device)
    return found


PARAMETERIZATIONS: dict[str, Activation] = {
    "logvar": Activation(lambda r: torch.exp(r * 0.5), lambda r: r, lambda r, s: (s, 0.5), lambda r: (None, 1.0)),
    "log_std": Activation(torch.exp, lambda r: 2 * r, lambda r, s: (s, 1.0), lambda r: (None, 2.0)),
    "std": Activation(
        lambda r: r, lambda r: 2 * torch.log(r), lambda r, s: (None, 1.0), lambda r: (torch.reciprocal(r), 2.0), power=2
    ),
    "var": Activation(
        torch.sqrt, torch.log, lambda r, s: (torch.reciprocal(s), 0.5), lambda r: (torch.reciprocal(r), 1.0), power=1
    ),
    "softplus": Activation(
        softplus,
        _log_softplus,
        lambda r, s: (torch.sigmoid(r), 1.0),
        lambda r: (torch.where(r < _LOW, 1.0, torch.sigmoid(r).div_(softplus(r))), 2.0),
        _short_log_softplus,
    ),
}


def clamped(raw: Tensor, lo: float, hi: float) -> Tensor:
    if lo == -math.inf and hi == math.inf:
        return raw
    # not torch.clamp, whose gradient on the edges depends on torch's version; this one's is 0
    return F.hardtanh(raw, lo, hi)


def softened(x: Tensor, c: float) -> Tensor:
    """c tanh(x / c), in float32 at least: within +-c, and x itself far inside; Vahdat & Kautz 2020 (arXiv:2007.03898),
    whose code has c = 5."""
    return (c * torch.tanh(wide(x) / c)).to(x.dtype)


def std_of(raw: Tensor, spec: Spec) -> Tensor:
    name, lo, hi, floor = spec
    std = PARAMETERIZATIONS[name].std(clamped(raw, lo, hi))
    return std + floor if floor > 0 else std


def logvar_of(raw: Tensor, spec: Spec) -> Tensor:
    """The log variance; raw itself where it is that already."""
    name, lo, hi, floor = spec
    if floor > 0:
        return 2 * torch.log(std_of(raw, spec))
    return PARAMETERIZATIONS[name].logvar(clamped(raw, lo, hi))


def std_with_gradient(raw: Tensor, spec: Spec) -> tuple[Tensor, Tensor | None, float]:
    """The standard deviation, and its derivative: a tensor, None for 1, times a number."""
    name, lo, hi, floor = spec
    of = PARAMETERIZATIONS[name]
    r = clamped(raw, lo, hi)
    std = of.std(r)
    slope, factor = of.dstd(r, std)
    if r is not raw:
        slope = _within(torch.ones_like(r) if slope is None else slope, raw, lo, hi)
    return (std + floor if floor > 0 else std), slope, factor


def _within(gradient: Tensor, raw: Tensor, lo: float, hi: float) -> Tensor:
    """0 where raw is clamped, edges included."""
    found: Tensor = torch.ops.aten.hardtanh_backward(gradient, raw, lo, hi)
    return found


# B_2k / (2k)! from k = 1: x / expm1(x) is 1 - x / 2 + the sum of these times x^2k
_BERNOULLI = (
    1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000, 1 / 74724249600,
    -3617 / 10670622842880000,
)  # fmt: skip


# what is infinite leaves e^x more than x
_MOST = 1e30


def expm1_and_h(x: Tensor) -> tuple[Tensor, Tensor]:
    """e^x - 1, and h(x) = e^x - 1 - x without cancellation.

    Of float32 in float64, where that is fast: e^x - 1 - x - x^2 / 2 is noise only where it is nothing beside
    x^2 / 2, and is cut off there. Else, where |x| < 1/2, as ``expm1(x) (1 - x / expm1(x))``, whose second factor has
    a series of few terms.
    """
    fast = x.device.type != "mps" and not torch.compiler.is_compiling() and not wrapped(x)
    if x.dtype == torch.float32 and fast:
        w = x.double()
        m, c = torch.expm1(w), w.clamp(-1, 1)
        square = c * c
        rest = torch.sub(m - w.clamp(max=_MOST), square, alpha=0.5)
        return m, torch.add(F.hardshrink(rest, 1e-20), square, alpha=0.5)
    # clamped: what overflows would turn the gradient of 0 into NaN, though where() does not take it
    m, c = torch.expm1(x), x.clamp(-0.5, 0.5)
    w = c * c
    terms = _BERNOULLI if x.dtype == torch.float64 else _BERNOULLI[:4]
    series = w * terms[-1] + terms[-2]
    for b in terms[-3::-1]:
        series = series * w + b
    return m, torch.where(w < 0.25, m * (c * (0.5 - c * series)), m - x.clamp(max=_MOST))


def h(x: Tensor) -> Tensor:
    """e^x - 1 - x without cancellation."""
    return expm1_and_h(x)[1].to(x.dtype)


def kl(spec: Spec, mu: Tensor, raw: Tensor, prior_mu: Prior, prior_logvar: Prior) -> Tensor:
    """Elementwise KL(N(mu, s^2) || N(prior_mu, e^prior_logvar)); Kingma & Welling 2014, appendix B, rearranged."""
    logvar = logvar_of(raw, spec)
    if prior_mu is None and prior_logvar is None:
        return 0.5 * (mu * mu + h(logvar))
    pm, plv = as_tensor(prior_mu, mu), as_tensor(prior_logvar, mu)
    # e^(-lvp/4) multiplies the difference, twice, so that what is scaled overflows only where it is infinite; of no
    # distance, where that alone is, nothing is left
    off = mu - pm
    far = (off == 0) & (plv < _least_logvar(off.dtype))
    step = torch.exp(-0.25 * torch.where(far, 0.0, plv))
    return 0.5 * (h(logvar - plv) + (off * step * step) ** 2)


def _least_logvar(dtype: torch.dtype) -> float:
    """From which on e^(-logvar / 4) is finite."""
    return -4 * math.log(torch.finfo(dtype).max)


def _scaled(off: Tensor, prior_logvar: Tensor | float) -> tuple[Tensor, Tensor]:
    """off / std and off / std^2 of a prior, as :func:`kl` has them, without autograd."""
    most = torch.finfo(off.dtype).max
    if isinstance(prior_logvar, Tensor):
        step = torch.exp(prior_logvar * -0.25).clamp_(max=most)
        delta = (off * step).mul_(step)
        return delta, (delta * step).mul_(step)
    number = math.exp(min(-0.25 * prior_logvar, math.log(most)))
    if number <= math.sqrt(most):
        delta = off * number**2
        return delta, delta * number**2
    delta = (off * number).mul_(number)
    return delta, (delta * number).mul_(number)


def kl_with_gradients(
    spec: Spec, mu: Tensor, raw: Tensor, prior_mu: Prior, prior_logvar: Prior, priors: bool, total: bool,
    out: Tensor | None = None,
) -> tuple[Tensor | float, list[tuple[Tensor, float]]]:  # fmt: skip
    """Twice :func:`kl`, without autograd, or the sum of that, a number; and of it, not doubled, the derivatives in mu
    and raw and, with ``priors``, in the prior's two, each a tensor times a number. That in mu may be mu; that in raw
    may be put into ``out``."""
    name, lo, hi, floor = spec
    of = PARAMETERIZATIONS[name]
    plain = (lo, hi, floor) == (-math.inf, math.inf, 0) and (prior_logvar is None or isinstance(prior_logvar, float))
    if of.power and plain and not prior_logvar and total and not priors:
        found = _of_power(of.power, mu if prior_mu is None else mu - prior_mu, raw)
        if found is not None:
            return found
    r = clamped(raw, lo, hi)
    if floor > 0:
        std = of.std(r)
        (slope, factor), std = of.dstd(r, std), std + floor
        logvar, slope, factor = 2 * torch.log(std), std.reciprocal() if slope is None else slope / std, 2 * factor
    else:
        short = of.short(r)
        logvar, slope, factor = (of.logvar(r), *of.dlogvar(r)) if short is None else short
    if prior_logvar is not None:
        logvar = logvar - prior_logvar
    d = dmu = mu - prior_mu if isinstance(prior_mu, Tensor) or prior_mu else mu
    if isinstance(prior_logvar, Tensor) or prior_logvar:
        d, dmu = _scaled(d, prior_logvar)
    square = d * d
    twice: Tensor | float
    if total:
        m, whole = expm1_and_sum_of_h(logvar)
        twice = whole + square.sum().item()
    else:
        m, each = expm1_and_h(logvar)
        twice = each.to(mu.dtype).add_(square)
    if slope is None and out is not None:
        m = draw = out.copy_(m)
    else:
        m = m.to(mu.dtype)
        draw = m if slope is None else torch.mul(m, slope, out=out)
    if r is not raw:
        draw = _within(draw, raw, lo, hi)
    gradients = [(dmu, 1.0), (draw, 0.5 * factor)]
    if priors:
        gradients += [(dmu.neg(), 1.0), (m + square, -0.5)]
    return twice, gradients


# What a precision loses of the sums of e^x - 1 and of x is little beside that of h(x) where the mean of that is not
# small. In float32 from the first number on: there |e^x - 1| is on average 6 times as large as h(x) at most, and sums
# were off by 1.2e-6 of themselves at most. In float64 from the second on. Infinity leaves nothing.
_LEAST_MEAN = {torch.float32: 0.08, torch.float64: 1e-8}


def _enough(total: float, dtype: torch.dtype, n: int) -> bool:
    return _LEAST_MEAN[dtype] * n < total < math.inf


def _of_power(k: int, d: Tensor, raw: Tensor) -> tuple[float, list[tuple[Tensor, float]]] | None:
    """:func:`kl_with_gradients` of means d away from the prior's, of a variance raw^k that is no exponential, k 1 or 2:
    h(log raw^k) = raw^k - 1 - k log raw, and its slope k (raw^k - 1) / raw. None where it would not be exact."""
    if raw.dtype != torch.float32:
        return None
    n, off = raw.numel(), raw - 1
    if k == 2:
        off.mul_(raw + 1)
    total = off.sum().item() - k * torch.log(raw).sum().item()
    if not _enough(total, torch.float32, n):
        w = raw.double()
        total = (w if k == 1 else w * w).sum().item() - n - k * w.log_().sum().item()
        if not _enough(total, torch.float64, n):
            return None
    return total + (d * d).sum().item(), [(d, 1.0), (off.div_(raw), 0.5 * k)]


def expm1_and_sum_of_h(x: Tensor) -> tuple[Tensor, float]:
    """e^x - 1 and, of a tensor of the CPU, the sum of h(x) = e^x - 1 - x."""
    if x.dtype == torch.float32:
        m, n = torch.expm1(x), x.numel()
        total = m.sum().item() - x.sum().item()
        if _enough(total, torch.float32, n):
            return m, total
        w = x.double()
        linear = w.sum().item() + n
        total = w.exp_().sum().item() - linear
        if _enough(total, torch.float64, n):
            return m, total
    m, each = expm1_and_h(x)
    return m, each.sum().item()


def as_tensor(x: Prior, like: Tensor) -> Tensor:
    """A tensor of like's dtype; None is 0."""
    if isinstance(x, Tensor):
        return x.to(like.dtype)
    return torch.full((), 0.0 if x is None else x, dtype=like.dtype, device=like.device)


def compute_dtype(*tensors: Prior) -> torch.dtype:
    for t in tensors:
        if isinstance(t, Tensor) and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def promoted(*tensors: Prior) -> torch.dtype:
    dtype: torch.dtype | None = None
    for t in tensors:
        if isinstance(t, Tensor) and t.dtype != torch.bool:
            dtype = t.dtype if dtype is None else torch.promote_types(dtype, t.dtype)
    assert dtype is not None
    return dtype


def wide(x: Tensor) -> Tensor:
    """For what is yet to be added up: in half precision it would lose digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# how many dimensions these leave
ROWS = {"per_sample": 1, "per_draw": 2}


def reduced(x: Tensor, reduction: str, narrow: torch.dtype) -> Tensor:
    """By name; elements that stay such are narrowed."""
    if reduction == "none":
        return x.to(narrow)
    if reduction == "mean":
        return x.mean()
    if reduction == "sum":
        return x.sum()
    dims = ROWS.get(reduction, 1)
    if x.is_nested:
        rows = torch.stack([row.sum() for row in x.unbind()])
    else:
        rows = x if x.dim() == dims else x.flatten(dims).sum(dims)
    return rows if reduction in ROWS else rows.mean()


def balanced(alpha: float | None, kl: Callable[..., Tensor], q: Sequence[Tensor], p: Sequence[Prior]) -> Tensor:
    """alpha KL(sg(q) || p) + (1 - alpha) KL(q || sg(p)); Hafner et al. 2021 (arXiv:2010.02193), algorithm 2."""
    if alpha is None:
        return kl(*q, *p)
    fixed_q, fixed_p = ([t.detach() if isinstance(t, Tensor) else t for t in ts] for ts in (q, p))
    return alpha * kl(*fixed_q, *p) + (1 - alpha) * kl(*q, *fixed_p)
