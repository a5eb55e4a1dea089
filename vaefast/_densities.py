"""Closed forms, with gradients, of likelihoods whose plain formulas are float64's: what ``likelihoods`` gives the
PyTorch engine for speed. Rearranged so that nothing cancels in float32, and without a choice by element, which takes
ten times as long as an addition. Of what float32 does not hold, or of float64 itself, there is none: they are None.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._closed_counts import gamma, log1p_exp
from ._gaussian import constant
from ._supports import Asked, Closed


def _narrow(x: Tensor) -> bool:
    """Whether these are for float32: to look at the numbers waits for a GPU."""
    return x.is_cpu and x.dtype == torch.float32


# coth(1 / 2) / 2 + 1 / 2 - 1, the mean at logit 1
_MEAN_AT_1 = 1 / -math.expm1(-1.0) - 1


def continuous_bernoulli(asked: Asked, x: Tensor, logits: Tensor) -> Closed | None:
    """With a = |l|: max(l, 0) (1 - x) - min(l, 0) x + log((1 - e^-a) / a). Its slope is the mean, which is
    1 / (1 - e^-l) - 1 / l, less x: as far as a = 1 by the series of the Bernoulli numbers, from there on what the
    mean's distance from 1/2 grows by."""
    if not _narrow(x):
        return None
    least, most = (t.item() for t in x.aminmax())
    if not (least >= 0 and most <= 1):
        return None
    a = logits.abs()
    minus = a.clamp(min=1e-30).neg_()
    nll = F.relu(logits).mul_(torch.sub(constant(1.0, x), x)).addcmul_(logits.clamp(max=0), x, value=-1)
    nll.add_(torch.expm1(minus).div_(minus).log_())
    near = logits.clamp(-1, 1)
    square = near * near
    mean = (square * (-1 / 1209600)).add_(1 / 30240).mul_(square).sub_(1 / 720).mul_(square).add_(1 / 12).mul_(near)
    beyond = a.clamp_(min=1)
    grown = torch.neg(beyond, out=minus).exp_().neg_().add_(1).reciprocal_().sub_(beyond.reciprocal_())
    mean.addcmul_(grown.sub_(_MEAN_AT_1), logits.sign())
    return nll, 1.0, 0.0, [(mean.add_(0.5).sub_(x), 1.0)]


class Tails(NamedTuple):
    """What a Student's t is made of beside its data: e^-ls / sqrt(n), (n + 1) / 2, what stands before the logarithm;
    what the gradient in loc, that in log_scale and that in df are multiplied by; the norm's slope in df."""

    inverse: Tensor
    half: Tensor
    norm: Tensor
    loc: Tensor
    scale: Tensor
    df: Tensor
    slope: Tensor


def _tails(log_scale: Tensor, df: Tensor) -> Tails | None:
    """None where logarithms are so large that float32 loses what they leave of each other."""
    z = df * 0.5
    at, beside = gamma(z), gamma(z + 0.5)
    # log Gamma(z) - log Gamma(z + 1/2) + log(2 pi z) / 2
    step = torch.log1p(-0.5 / beside.w)
    root = (z / at.w).mul_(2 * math.pi).sqrt_().mul_(beside.r).div_(at.r)
    norm = torch.addcmul(root.log_().add_(at.s).sub_(beside.s).add_(0.5), z, step) + log_scale
    least, most = (t.item() for t in norm.aminmax())
    if not (least >= -8 and most <= 8):
        return None
    inverse, half = torch.exp(-log_scale) * df.rsqrt(), z + 0.5
    # digamma(z) is log w - d(z) - 1 / z
    slope = (step - at.d() + beside.d() - (0.5 / z) / (z + 0.5)) * 0.5 + 0.25 / z
    return Tails(inverse, half, norm, 2 * half * inverse, -2 * half, -half / df, slope)


def student_t(asked: Asked, x: Tensor, loc: Tensor, log_scale: Tensor, df: Tensor) -> Closed | None:
    """With q = (loc - x) e^-ls / sqrt(n): norm + (n + 1) / 2 log(1 + q^2)."""
    of = asked.of(_tails, log_scale, df) if _narrow(x) else None
    if of is None:
        return None
    q = (loc - x).mul_(of.inverse)
    square = q * q
    log = torch.log1p(square)
    nll = torch.addcmul(of.norm, log, of.half)
    below = square + 1
    dloc, share = q.div_(below), square.div_(below)
    gradients = [(dloc.mul_(of.loc), 1.0), None, None]
    if asked.wanted[1]:
        gradients[1] = torch.addcmul(constant(1.0, x), share, of.scale), 1.0
    if asked.wanted[2]:
        gradients[2] = torch.addcmul(of.slope, share, of.df).add_(log, alpha=0.5), 1.0
    return nll, 1.0, 0.0, gradients


# half a bin in scales, beyond which e^k swallows what is beside it; and beyond which it shows how far 1 + (e^-|c| - 1)
# is from e^-|c|
_SHARPEST, _SHARP = 8.0, 1.0


class Bins(NamedTuple):
    """Of a scale, with k half a bin in scales: 1 / scale, k, e^k + e^-k, e^k - e^-k; and whether any k is large."""

    inverse: Tensor
    half: Tensor
    cosh: Tensor
    sinh: Tensor
    sharp: bool


def _bins(log_scale: Tensor, half: float, floor: float) -> Bins | None:
    inverse = log_scale.clamp(min=floor).neg_().exp_()
    most = half * inverse.max().item()
    if not most <= _SHARPEST:
        return None
    k = inverse * half
    e = torch.expm1(k)
    other = (e + 1).reciprocal_()
    return Bins(inverse, k, torch.add(other, e).add_(1), other.add_(1).mul_(e), most > _SHARP)


def logistic(
    x: Tensor, mean: Tensor, log_scale: Tensor, of: Bins, half: float, low: float, high: float, floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The nll and its gradients. With c = (x - m) / scale and e = e^-|c| the bin's probability is, of sinh and cosh of
    c and k, e (e^k - e^-k) / D, D = 1 + e (e^k + e^-k + e): the slope in |c| is (1 - e^2) / D. In the two outer bins it
    is a sigmoid."""
    inverse, k, cosh, sinh, sharp = of
    c = (x - mean).mul_(inverse)
    size = c.abs()
    less = torch.expm1(-size)
    e = torch.exp(-size) if sharp else less + 1
    d = torch.add(cosh, e).mul_(e).add_(1)
    slope = torch.add(less, constant(2.0, x)).mul_(less).div_(d)  # -(1 - e^2) / D
    nll = torch.div(d, sinh).log_().add_(size)
    dscale = e.mul_(sinh).div_(d).neg_().add_(cosh / sinh).mul_(k).addcmul_(size, slope)
    dmean = slope.mul_(c.sign()).mul_(inverse)
    least, most = (t.item() for t in x.aminmax())
    if least < low + half / 2 or most > high - half / 2:
        side = F.hardshrink(x - (low + high) / 2, (high - low) / 2 - half / 2).sign_()
        outer, t = side.abs(), c.mul_(side).sub_(k)
        at_end = torch.sigmoid(t)
        nll.lerp_(torch.relu(t).add_(log1p_exp(t)), outer.expand_as(nll))
        dscale.lerp_(t.mul_(at_end).neg_(), outer.expand_as(nll))
        dmean.lerp_(at_end.mul_(side).mul_(inverse).neg_(), outer.expand_as(nll))
    return nll, dmean, torch.ops.aten.hardtanh_backward(dscale, log_scale.expand_as(dscale), floor, math.inf)


def discretized_logistic(
    asked: Asked, x: Tensor, mean: Tensor, log_scale: Tensor, bins: float, low: float, high: float, floor: float
) -> Closed | None:
    half = (high - low) / (bins - 1) / 2
    of = _bins(log_scale, half, floor) if _narrow(x) else None
    if of is None:
        return None
    nll, *gradients = logistic(x, mean, log_scale, of, half, low, high, floor)
    return nll, 1.0, 0.0, [(g, 1.0) for g in gradients]


def discretized_logistic_mixture(
    asked: Asked, x: Tensor, planes: Tensor, bins: float, low: float, high: float, floor: float, channels: float,
    dim: float,
) -> Closed | None:  # fmt: skip
    if not _narrow(x):
        return None
    half, along, columns = (high - low) / (bins - 1) / 2, int(dim), 2 if channels == 1 else 3
    along %= planes.dim()
    logits, *rest = planes.unflatten(along, (1 + int(channels) * columns, -1)).unbind(along)
    gradient = torch.empty(planes.shape)
    dlogits, *drest = gradient.unflatten(along, (1 + int(channels) * columns, -1)).unbind(along)
    log_p = torch.log_softmax(logits, along)
    joint, parts, first = log_p.clone(), [], 0
    couplings = rest[2::3] if columns == 3 else []
    for channel in range(int(channels)):
        mean, log_scale = rest[columns * channel : columns * channel + 2]
        of = _bins(log_scale, half, floor)
        if of is None:
            return None
        for before in range(channel):
            mean = torch.addcmul(mean, torch.tanh(couplings[first + before]), x.narrow(along, before, 1))
        first += channel
        nll, *slopes = logistic(x.narrow(along, channel, 1), mean, log_scale, of, half, low, high, floor)
        joint.sub_(nll)
        parts.append(slopes)
    most = joint.amax(along, keepdim=True)
    share = joint.sub_(most).exp_()
    whole = share.sum(along, keepdim=True)
    share.div_(whole)
    torch.sub(log_p.exp_(), share, out=dlogits)
    for d in drest[2::3] if columns == 3 else ():
        d.zero_()
    first = 0
    for channel, (dmean, dscale) in enumerate(parts):
        torch.mul(dmean, share, out=drest[columns * channel])
        torch.mul(dscale, share, out=drest[columns * channel + 1])
        for before in range(channel):
            into = drest[2::3][first + before]
            torch.mul(drest[columns * channel], x.narrow(along, before, 1), out=into)
            # tanh's slope, 4 e / (1 + e)^2 with e = e^-2|a|
            e = couplings[first + before].abs().mul_(-2).exp_()
            into.mul_(e).mul_(4).div_(e.add_(1).square_())
        first += channel
    return most.add_(whole.log_()).squeeze(along), -1.0, 0.0, [(gradient, 1.0)]
