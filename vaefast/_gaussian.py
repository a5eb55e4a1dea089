"""The Gaussian arithmetic in PyTorch, elementwise: the Python side of ``csrc/posterior.h``. And the reductions.

``PARAMETERIZATIONS`` is one of the two registries: an entry here and a struct there is all that a new one takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# None is 0
Prior = Tensor | float | None
# a parameterization's name, clamp and floor; the bounds are infinite where there is no clamp
Spec = tuple[str, float, float, float]


class Activation(NamedTuple):
    """raw -> the standard deviation, raw -> the log variance without going through it."""

    std: Callable[[Tensor], Tensor]
    logvar: Callable[[Tensor], Tensor]


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


PARAMETERIZATIONS: dict[str, Activation] = {
    "logvar": Activation(lambda r: torch.exp(0.5 * r), lambda r: r),
    "log_std": Activation(torch.exp, lambda r: 2 * r),
    "std": Activation(lambda r: r, lambda r: 2 * torch.log(r)),
    "var": Activation(torch.sqrt, torch.log),
    "softplus": Activation(softplus, lambda r: 2 * torch.log(softplus(r))),
}


def clamped(raw: Tensor, lo: float, hi: float) -> Tensor:
    if lo == -math.inf and hi == math.inf:
        return raw
    # not torch.clamp, whose gradient on the edges depends on torch's version
    return torch.where((raw <= lo) | (raw >= hi), raw.detach().clamp(lo, hi), raw)


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


def h(x: Tensor) -> Tensor:
    """e^x - 1 - x without cancellation: x^2 (1/2! + x/3! + ...) for |x| < 1, expm1(x) - x further out."""
    small = x.abs() < 1
    near = torch.where(small, x, 0.0)
    q = torch.zeros_like(x)
    for k in range(20 if x.dtype == torch.float64 else 12, 1, -1):
        q = q * near + 1.0 / math.factorial(k)
    far = torch.where(small, 1.0, x)
    return torch.where(small, near * near * q, torch.expm1(far) - far)


def kl(spec: Spec, mu: Tensor, raw: Tensor, prior_mu: Prior, prior_logvar: Prior) -> Tensor:
    """Elementwise KL(N(mu, s^2) || N(prior_mu, e^prior_logvar)); Kingma & Welling 2014, appendix B, rearranged."""
    logvar = logvar_of(raw, spec)
    if prior_mu is None and prior_logvar is None:
        return 0.5 * (mu * mu + h(logvar))
    pm, plv = as_tensor(prior_mu, mu), as_tensor(prior_logvar, mu)
    # e^(-lvp/2) multiplies the difference first, so that the square does not overflow before it is scaled down
    return 0.5 * (h(logvar - plv) + ((mu - pm) * torch.exp(-0.5 * plv)) ** 2)


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


def reduced(x: Tensor, reduction: str, narrow: torch.dtype) -> Tensor:
    """By name; elements that stay such are narrowed."""
    if reduction == "none":
        return x.to(narrow)
    if reduction == "mean":
        return x.mean()
    if reduction == "sum":
        return x.sum()
    if x.is_nested:
        rows = torch.stack([row.sum() for row in x.unbind()])
    else:
        rows = x if x.dim() == 1 else x.flatten(1).sum(1)
    return rows if reduction == "per_sample" else rows.mean()


def balanced(alpha: float | None, kl: Callable[..., Tensor], q: Sequence[Tensor], p: Sequence[Prior]) -> Tensor:
    """alpha KL(sg(q) || p) + (1 - alpha) KL(q || sg(p)); Hafner et al. 2021 (arXiv:2010.02193), algorithm 2."""
    if alpha is None:
        return kl(*q, *p)
    fixed_q, fixed_p = ([t.detach() if isinstance(t, Tensor) else t for t in ts] for ts in (q, p))
    return alpha * kl(*fixed_q, *p) + (1 - alpha) * kl(*q, *fixed_p)
