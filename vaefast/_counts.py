"""Closed forms of the likelihoods of counts, with gradients: what ``likelihoods`` gives the PyTorch engine for speed.

Log-gammas cancel here. Of many numbers each is taken apart (Abramowitz & Stegun 1964, 6.1.15 and 6.1.41): with w = z + 3

    log Gamma(z) = (z - 1/2) log w - w + log(2 pi) / 2 + s(w) - log r(z),    r(z) = z (z + 1) (z + 2) / w^3

so that the logarithms, of ratios then, are multiplied and added up in float64, and what is left is small and smooth, and
right in float32. Its slope, 6.3.5 and 6.3.18, is log w - d(z). Of few numbers ``torch.lgamma`` of float64 takes less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._supports import Closed

# elements: up to here, operations that begin cost more than log-gammas
_FEW = 1 << 10

# of a larger dispersion the log-gammas' difference is noise even in float64
LARGE = 1e5

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Gamma(NamedTuple):
    """Of float32's z > 0, in the notation above: w, 1 / w, 1 / w^2, (z + 1) (z + 2) / w^2, r(z), s(w)."""

    w: Tensor
    inverse: Tensor
    square: Tensor
    rising: Tensor
    r: Tensor
    s: Tensor

    def d(self) -> Tensor:
        """log w - digamma(z) - 1 / z: the series', and of two more steps from z to w."""
        i, square = self.inverse, self.square
        series = (square / 252).sub_(1 / 120).mul_(square).add_(1 / 12).mul_(i).add_(0.5).mul_(i)
        return series.add_(torch.add(i, square, alpha=-1.5).div_(self.rising), alpha=2)


def gamma(z: Tensor) -> Gamma:
    w = z + 3
    inverse = w.reciprocal()
    square, r = inverse * inverse, z * inverse
    rising = torch.add(r, square, alpha=2)
    s = (square / 1260).sub_(1 / 360).mul_(square).add_(1 / 12).mul_(inverse)
    return Gamma(w, inverse, square, rising, r.mul_(rising), s)


def few(x: Tensor) -> bool:
    return x.numel() <= _FEW or x.dtype == torch.float64


def counted(x: Tensor) -> bool:
    """Whether closed forms are for these data: what is below 0 is none, and to look at that waits for a GPU."""
    return x.is_cpu and x.min().item() >= 0


def poisson(x: Tensor, log_rate: Tensor, wanted: Sequence[bool], constant: float) -> Closed | None:
    if not counted(x):
        return None
    wide, log = x.double(), log_rate.double()
    slope = torch.exp(log).sub_(wide)
    gradient = slope.to(x.dtype)
    if not constant:
        # the rate once more
        return slope.add_(wide).addcmul_(wide, log, value=-1), 1.0, 0.0, [(gradient, 1.0)]
    if few(x):
        nll = slope.add_(wide).addcmul_(wide, log, value=-1).add_((wide + 1).lgamma_())
        return nll, 1.0, 0.0, [(gradient, 1.0)]
    g = gamma(x + 1)
    log_w = (wide + 4).log_()
    slope.addcmul_(wide, log_w.sub_(log))
    return slope.add_(g.w.sqrt_().div_(g.r).log_().add_(g.s)), 1.0, _HALF_LOG_2PI - 4, [(gradient, 1.0)]


def negative_binomial(
    x: Tensor, mu: Tensor, theta: Tensor, wanted: Sequence[bool], constant: float, eps: float
) -> Closed | None:
    if not counted(x) or not theta.max().item() <= LARGE:
        return None
    wide, of = x.double(), mu.double() + eps
    t = theta.double()
    n, sum_ = wide + t, of + t
    dmu = dtheta = None
    if few(x):
        log_theta = t.log()
        log = sum_.log()
        nll = (log - log_theta).mul_(t)
        nll += (log - of.log()).mul_(wide)
        nll += t.lgamma() - n.lgamma()
        if constant:
            nll += (wide + 1).lgamma_()
        share = n / sum_
        if wanted[0]:
            dmu = share - wide / of
        if wanted[1]:
            dtheta = t.digamma().sub_(log_theta).sub_(1) - n.digamma()
            dtheta.add_(log).add_(share)
        return nll, 1.0, 0.0, scaled(x, dmu, dtheta)
    # n log(sum / (n + 3)) + x log((x + 4) / mu), and what is left of theta's
    ratio = (sum_ / (n + 3)).log_()
    nll = n * ratio
    other = (wide + 4).div_(of) if constant else of.reciprocal()
    nll.addcmul_(wide, other.log_())
    of_n, of_theta, log_theta = gamma(x + theta), gamma(theta), torch.log1p(3 / theta)
    rest = (of_n.r * of_n.w.sqrt()).div_(of_theta.r * of_theta.w.sqrt())
    if constant:
        of_x = gamma(x + 1)
        rest.mul_(of_x.w.sqrt_()).div_(of_x.r).log_().add_(of_x.s)
    else:
        nll.add_(wide)
        rest.log_()
    nll.add_(rest.sub_(of_n.s).add_(torch.addcmul(of_theta.s, theta, log_theta)))
    if wanted[0]:
        other = of.float()
        dmu = (other - x).mul_(theta).div_(other.mul_(sum_.float()))
    if wanted[1]:
        # n / sum and 1 / theta - 1 / n, which may be large and cancel
        slope = torch.div(n, sum_).sub_(wide.div_(n.mul_(t))).add_(ratio).float()
        dtheta = of_n.d().sub_(of_theta.d()).add_(slope).add_(log_theta - 1)
    return nll, 1.0, _HALF_LOG_2PI - 4 if constant else 0.0, scaled(x, dmu, dtheta)


def zero_inflated_negative_binomial(
    x: Tensor, mu: Tensor, theta: Tensor, pi_logits: Tensor, wanted: Sequence[bool], constant: float, eps: float
) -> Closed | None:
    """With l(y) = log(1 + e^-|y|) and u = p + nll of the negative binomial, at 0 min(max(-p, 0), nll) + l(p) - l(u), and
    max(p, 0) + l(p) + nll elsewhere: nothing cancels. Slopes in p and nll are sigmoid(p) and 1, at 0 less sigmoid(u)."""
    found = negative_binomial(x, mu, theta, wanted[:2], constant, eps)
    if found is None:
        return None
    nll, _, rest, (dmu, dtheta) = found
    if rest:
        nll.add_(rest)
    u = (nll + pi_logits).to(x.dtype)
    nll, p = nll.to(x.dtype), pi_logits
    at_zero = 1 - x.sign()
    taken = torch.sigmoid(u).mul_(at_zero)
    above, below = torch.relu(p).add(nll), torch.minimum(torch.relu(-p), nll).sub_(_softplus_of_minus(u))
    value = above.lerp_(below, at_zero).add_(_softplus_of_minus(p))
    dp = torch.sigmoid(p).sub(taken) if wanted[2] else None
    if dmu is not None or dtheta is not None:
        left = taken.neg_().add_(1)
        dmu, dtheta = (g and (g[0].mul_(left), 1.0) for g in (dmu, dtheta))
    return value, 1.0, 0.0, [dmu, dtheta, None if dp is None else (dp, 1.0)]


def _softplus_of_minus(x: Tensor) -> Tensor:
    """log(1 + e^-|x|), by the logarithm as in ``likelihoods._bernoulli_gradients``."""
    return x.abs().neg_().exp_().add_(1.0).log_()


def scaled(x: Tensor, *gradients: Tensor | None) -> list[tuple[Tensor, float] | None]:
    return [None if g is None else (g.to(x.dtype), 1.0) for g in gradients]
