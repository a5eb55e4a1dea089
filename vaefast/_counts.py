"""The formulas of counts and of positive data, in PyTorch: a part of :mod:`vaefast.likelihoods`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._gaussian import softplus
from ._limits import beside, inverse, weighed

# from here on a difference of log-gammas is its first terms of 1 / n
LARGE = 1e5


def in_float64(nll: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For formulas whose large terms cancel: in float64 what is left is still right for float32."""

    @functools.wraps(nll)
    def wide(x: Tensor, *params: Tensor, **options: float) -> Tensor:
        if x.device.type == "mps":  # which has no float64
            return nll(x, *params, **options)
        return nll(x.double(), *(p.double() for p in params), **options).to(x.dtype)

    return wide


def _count(x: Tensor) -> Tensor:
    """NaN where it is below 0."""
    return torch.where(x < 0, math.nan, x)


@in_float64
def log_normal(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    log = torch.log(x)
    d = log - loc
    half_square = 0.5 * (d * inverse(log_scale, d)) ** 2
    return 0.5 * math.log(2 * math.pi) + beside(half_square, log_scale + log)


@in_float64
def gamma(x: Tensor, log_mean: Tensor, concentration: Tensor) -> Tensor:
    """Of shape a and rate a / mean."""
    a, log = concentration, torch.log(x)
    norm = torch.lgamma(a) + a * (1 - torch.log(a))
    return norm + torch.xlogy(1 - a, x) + a * (torch.exp(log - log_mean) - 1 + log_mean)


@in_float64
def beta_binomial(x: Tensor, alpha: Tensor, beta: Tensor, total_count: Tensor) -> Tensor:
    """scipy.stats.betabinom(n, a, b); NaN where x is below 0 or above n."""

    def rising(k: Tensor, a: Tensor) -> Tensor:
        return torch.lgamma(k + 1) + torch.lgamma(a) - torch.lgamma(k + a)

    x = torch.where((x < 0) | (x > total_count), math.nan, x)
    return rising(x, alpha) + rising(total_count - x, beta) - rising(total_count, alpha + beta)


def _log_factorial(x: Tensor, constant: float) -> Tensor:
    """log(x!), or 0 where it is left out."""
    return torch.lgamma(x + 1) if constant else torch.zeros_like(x)


@in_float64
def poisson(x: Tensor, log_rate: Tensor, constant: float) -> Tensor:
    x = _count(x)
    rate = torch.exp(log_rate)
    # beside an infinite rate nothing counts
    return rate - weighed(torch.where(rate == math.inf, 0.0, log_rate), x) + _log_factorial(x, constant)


@in_float64
def negative_binomial(x: Tensor, mu: Tensor, theta: Tensor, constant: float, eps: float) -> Tensor:
    x, mu = _count(x), mu + eps
    large = theta > LARGE
    t = torch.where(large | (theta == 0), 1.0, theta)
    gammas = torch.lgamma(t) - torch.lgamma(x + t)
    nll = t * torch.log1p(mu / t) - torch.xlogy(x, mu / (t + mu)) + gammas
    # towards the Poisson, where the log-gammas would cancel: by Stirling's formula; from 1e30 on it is one
    t = torch.where(large, theta, LARGE).clamp(max=1e30)
    apart = t * (torch.log1p(mu / t) - torch.log1p(x / t)) + x * (1 + torch.log1p((mu - x) / (t + x)))
    far = apart + 0.5 * torch.log1p(x / t) - torch.xlogy(x, mu) + x / (12 * t * (t + x))
    # of a dispersion of 0 all are 0, whatever the mean, if it is a number; a slope of the data, infinity times 0, would
    # reach those of the others
    least = torch.where(x == 0, 0.0, math.inf * x.detach())
    none = (theta == 0) & ~mu.isnan()
    return torch.where(none, least, torch.where(large, far, nll) + _log_factorial(x, constant))


@in_float64
def zero_inflated_negative_binomial(
    x: Tensor, mu: Tensor, theta: Tensor, pi_logits: Tensor, constant: float, eps: float
) -> Tensor:
    """Lopez et al. 2018 (scVI), supplementary; 0 with probability sigmoid(pi_logits) besides."""
    nll = negative_binomial(x, mu, theta, constant=constant, eps=eps)
    # log(sigmoid(p) + sigmoid(-p) e^-nll), from the side where an infinite p leaves something
    above = pi_logits > 0
    up, down = torch.where(above, pi_logits, 0.0), torch.where(above, 0.0, pi_logits)
    at_zero = torch.where(above, softplus(-up) - softplus(-up - nll), softplus(down) - torch.logaddexp(down, -nll))
    return torch.where(x == 0, at_zero, softplus(pi_logits) + nll)


@in_float64
def negative_binomial_mixture(
    x: Tensor,
    mu1: Tensor,
    mu2: Tensor,
    theta1: Tensor,
    mixture_logits: Tensor,
    constant: float,
    eps: float,
) -> Tensor:
    """Gayoso et al. 2021 (totalVI): of the first with probability sigmoid(mixture_logits)."""
    first = negative_binomial(x, mu1, theta1, constant=constant, eps=eps) + softplus(-mixture_logits)
    second = negative_binomial(x, mu2, theta1, constant=constant, eps=eps)
    return -torch.logaddexp(-first, -(second + softplus(mixture_logits)))


def _or_zero(nll: Callable[..., Tensor], x: Tensor, *params: Tensor) -> Tensor:
    """0 with probability sigmoid of the last parameter, else of that density, which is not asked at 0."""
    *own, pi_logits = params
    none = x == 0
    above = nll(torch.where(none, 1.0, x), *own)
    kept = pi_logits + torch.where(
        x >= 0, torch.zeros_like(x), math.nan
    )  # so that its gradient is NaN where the loss is
    return torch.where(none, softplus(-pi_logits), above + softplus(kept))


@in_float64
def zero_inflated_log_normal(x: Tensor, loc: Tensor, log_scale: Tensor, pi_logits: Tensor) -> Tensor:
    return _or_zero(log_normal, x, loc, log_scale, pi_logits)


@in_float64
def zero_inflated_gamma(x: Tensor, log_mean: Tensor, concentration: Tensor, pi_logits: Tensor) -> Tensor:
    return _or_zero(gamma, x, log_mean, concentration, pi_logits)
