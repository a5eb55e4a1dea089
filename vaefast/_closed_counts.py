"""Closed forms of the likelihoods of counts, with gradients: what ``likelihoods`` gives the PyTorch engine for speed.

Log-gammas cancel here. Of many numbers each is taken apart (Abramowitz & Stegun 1964, 6.1.15 and 6.1.41), w = z + 3:

    log Gamma(z) = (z - 1/2) log w - w + log(2 pi) / 2 + s(w) - log r(z),    r(z) = z (z + 1) (z + 2) / w^3

so that the logarithms, of ratios then, are multiplied and added up in float64, and what is left is small and smooth,
and right in float32. Its slope, 6.3.5 and 6.3.18, is log w - d(z) - 1 / z. Of few numbers ``torch.lgamma`` of float64
takes less.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._counts import LARGE
from ._supports import Asked, Closed

# elements: up to here, operations that begin cost more than log-gammas
_FEW = 1 << 10

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def log1p_exp(x: Tensor) -> Tensor:
    """log(1 + e^-|x|) by the logarithm, which takes a third of log1p's time: to 1e-7, as far as float32 near 1 goes."""
    return x.abs().neg_().exp_().add_(1.0).log_()


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
        series = (square * _D[1]).add_(_D[0]).mul_(i).add_(0.5).mul_(i)
        return series.add_(torch.add(i, square, alpha=-1.5).div_(self.rising), alpha=2)


# s(w) = w^-1 (a + b w^-2), and what its slope adds to log w, w^-1 / 2 + w^-2 (a + b w^-2): of the series two terms,
# whose coefficients are fitted so that the largest error from w = 3 on is least, 1.8e-7
_S = 0.08333061, -0.0026763
_D = 0.08331541, -0.00778835


def gamma(z: Tensor) -> Gamma:
    w = z + 3
    inverse = w.reciprocal()
    square, r = inverse * inverse, z * inverse
    rising = torch.add(r, square, alpha=2)
    s = (square * _S[1]).add_(_S[0]).mul_(inverse)
    return Gamma(w, inverse, square, rising, r.mul_(rising), s)


def few(x: Tensor) -> bool:
    return x.numel() <= _FEW or x.dtype == torch.float64


def counted(x: Tensor) -> bool:
    """Whether closed forms are for these data: what is below 0 is none, and to look at that waits for a GPU."""
    return x.is_cpu and x.min().item() >= 0


def poisson(asked: Asked, x: Tensor, log_rate: Tensor, constant: float) -> Closed | None:
    if not counted(x):
        return None
    wide, log = x.double(), log_rate.double()
    rate = torch.exp(log)
    slope = rate - wide
    gradient = slope.to(x.dtype)
    if few(x) or not constant:
        nll = rate.addcmul_(wide, log, value=-1)
        return nll.add_((wide + 1).lgamma_()) if constant else nll, 1.0, 0.0, [(gradient, 1.0)]
    g = gamma(x + 1)
    slope.addcmul_(wide, (wide + 4).log_().sub_(log))
    nll = g.w.sqrt_().div_(g.r).log_().add_(g.s).add_(slope.float())
    return nll, 1.0, _HALF_LOG_2PI - 4, [(gradient, 1.0)]


class Dispersion(NamedTuple):
    """What is made of theta alone: in float64 it and theta + 3; what the nll is multiplied by within the logarithm,
    what is added, and what is added to theta's gradient."""

    wide: Tensor
    wide_w: Tensor
    factor: Tensor
    term: Tensor
    slope: Tensor


def dispersion(theta: Tensor) -> Dispersion:
    wide, of, log = theta.double(), gamma(theta), torch.log1p(3 / theta)
    factor = of.w.sqrt().mul_(of.r).reciprocal_()
    return Dispersion(wide, wide + 3, factor, torch.addcmul(of.s, theta, log), log.sub_(of.d()).sub_(1))


def negative_binomial(asked: Asked, x: Tensor, mu: Tensor, theta: Tensor, constant: float, eps: float) -> Closed | None:
    if not counted(x) or not theta.max().item() <= LARGE:
        return None
    if few(x):
        return _few_negative_binomials(asked, x, mu, theta, constant, eps)
    t, t_w, factor, term, slope = asked.of(dispersion, theta)
    wide, of = x.double(), mu.double()
    if eps:
        of = of.add_(eps)
    n, sum_, n_w = wide + t, of + t, wide + t_w
    # n log(sum / (n + 3)) + x log((x + 4) / mu), and what is left of the log-gammas
    ratio = torch.div(sum_, n_w, out=n_w).log_()
    nll = n * ratio
    other = (wide + 4).div_(of) if constant else of.reciprocal()
    nll.addcmul_(wide, other.log_())
    of_n = gamma(x + theta)
    rest = of_n.w.sqrt_().mul_(of_n.r).mul_(factor)
    if constant:
        of_x = gamma(x + 1)
        rest.mul_(of_x.w.sqrt_()).div_(of_x.r).log_().add_(of_x.s)
    else:
        rest.log_().add_(x)
    values = rest.sub_(of_n.s).add_(term).add_(nll.float())
    dmu = dtheta = None
    if asked.wanted[0]:
        m = of.float()
        dmu = (m - x).mul_(theta).div_(m.mul_(sum_.float()))
    if asked.wanted[1]:
        # n / sum and 1 / theta - 1 / n, which may be large and cancel
        apart = torch.div(n, sum_, out=sum_).add_(ratio).sub_(wide.div_(n.mul_(t)))
        dtheta = of_n.d().add_(slope).add_(apart.float())
    return values, 1.0, _HALF_LOG_2PI - 4 if constant else 0.0, scaled(x, dmu, dtheta)


def _few_negative_binomials(asked: Asked, x: Tensor, mu: Tensor, theta: Tensor, constant: float, eps: float) -> Closed:
    wide, of, t = x.double(), mu.double() + eps, theta.double()
    n, sum_, log_theta = wide + t, of + t, t.log()
    log = sum_.log()
    nll = (log - log_theta).mul_(t)
    nll += (log - of.log()).mul_(wide)
    nll += t.lgamma() - n.lgamma()
    if constant:
        nll += (wide + 1).lgamma_()
    dmu = dtheta = None
    share = n / sum_
    if asked.wanted[1]:
        dtheta = t.digamma().sub_(log_theta).sub_(1) - n.digamma()
        dtheta += log.add_(share)
    if asked.wanted[0]:
        dmu = share.sub_(wide / of)
    return nll, 1.0, 0.0, scaled(x, dmu, dtheta)


def zero_inflated_negative_binomial(
    asked: Asked, x: Tensor, mu: Tensor, theta: Tensor, pi_logits: Tensor, constant: float, eps: float
) -> Closed | None:
    """With l(y) = log(1 + e^-|y|) and u = p + nll of the negative binomial, at 0 min(max(-p, 0), nll) + l(p) - l(u),
    and max(p, 0) + l(p) + nll elsewhere: nothing cancels. Slopes in p and nll are sigmoid(p) and 1, at 0 less
    sigmoid(u)."""
    found = negative_binomial(asked, x, mu, theta, constant, eps)
    if found is None:
        return None
    nll, _, rest, (dmu, dtheta) = found
    if rest:
        nll.add_(rest)
    u = (nll + pi_logits).to(x.dtype)
    nll, p = nll.to(x.dtype), pi_logits
    at_zero = 1 - x.sign()
    taken = torch.sigmoid(u).mul_(at_zero)
    above, below = torch.relu(p).add(nll), torch.minimum(torch.relu(-p), nll).sub_(log1p_exp(u))
    value = above.lerp_(below, at_zero).add_(log1p_exp(p))
    dp = torch.sigmoid(p).sub(taken) if asked.wanted[2] else None
    if dmu is not None or dtheta is not None:
        left = taken.neg_().add_(1)
        dmu, dtheta = (g and (g[0].mul_(left), 1.0) for g in (dmu, dtheta))
    return value, 1.0, 0.0, [dmu, dtheta, None if dp is None else (dp, 1.0)]


def scaled(x: Tensor, *gradients: Tensor | None) -> list[tuple[Tensor, float] | None]:
    return [None if g is None else (g.to(x.dtype), 1.0) for g in gradients]
