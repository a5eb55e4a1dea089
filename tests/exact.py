"""The likelihoods' published formulas in 50 digits, written out from the definitions; what float64 cannot be trusted
with. A likelihood that is not here is held against its torch.distributions object."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import torch
from mpmath import mp, mpf
from torch import Tensor

from vaefast.reference import LIKELIHOODS

mp.dps = 50


def _bernoulli_probs(x: mpf, p: mpf) -> mpf:
    def log(value: mpf) -> mpf:
        return max(mpmath.log(value), mpf(-100)) if value > 0 else mpf(-100)

    return -(x * log(p) + (1 - x) * log(1 - p))


def _continuous_bernoulli(x: mpf, logit: mpf) -> mpf:
    """C(lambda) lambda^x (1 - lambda)^(1 - x), C = 2 artanh(1 - 2 lambda) / (1 - 2 lambda), or 2 at 1/2."""
    if logit == 0:
        return mpf(0)
    density = logit * mpmath.exp(logit * x) / mpmath.expm1(logit)
    return -mpmath.log(density)


def _student_t(x: mpf, loc: mpf, log_scale: mpf, df: mpf) -> mpf:
    t = (x - loc) / mpmath.exp(log_scale)
    log_norm = mpmath.loggamma((df + 1) / 2) - mpmath.loggamma(df / 2) - mpmath.log(df * mp.pi) / 2 - log_scale
    return (df + 1) / 2 * mpmath.log(1 + t * t / df) - log_norm


def _poisson(x: mpf, log_rate: mpf, constant: float) -> mpf:
    return mpmath.exp(log_rate) - x * log_rate + (mpmath.loggamma(x + 1) if constant else 0)


def _negative_binomial(x: mpf, mu: mpf, theta: mpf, constant: float, eps: float) -> mpf:
    mu = mu + mpf(eps)
    p = mu / (mu + theta)
    log_pmf = mpmath.loggamma(x + theta) - mpmath.loggamma(theta) + theta * mpmath.log(1 - p) + x * mpmath.log(p)
    return -log_pmf + (mpmath.loggamma(x + 1) if constant else 0)


def _zero_inflated(x: mpf, mu: mpf, theta: mpf, pi_logits: mpf, constant: float, eps: float) -> mpf:
    kept, dropped = 1 / (1 + mpmath.exp(pi_logits)), 1 / (1 + mpmath.exp(-pi_logits))
    pmf = mpmath.exp(-_negative_binomial(x, mu, theta, constant, eps))
    return -mpmath.log(kept * pmf + (dropped if x == 0 else 0))


def _discretized_logistic(x: mpf, mean: mpf, log_scale: mpf, bins: float, low: float, high: float, floor: float) -> mpf:
    scale, half = mpmath.exp(max(log_scale, mpf(floor))), mpf(high - low) / (2 * (mpf(bins) - 1))
    a, b = (x - half - mean) / scale, (x + half - mean) / scale

    def softplus(value: mpf) -> mpf:
        return mpmath.log1p(mpmath.exp(value))

    # -log(1 - sigmoid(a)), -log(sigmoid(b)), and the same of their product with what the logistic's tails leave
    if x < low + half / 2:
        return softplus(-b)
    return softplus(a) if x > high - half / 2 else softplus(a) + softplus(-b) - mpmath.log(-mpmath.expm1(a - b))


NLL: dict[str, Callable[..., mpf]] = {
    "bernoulli_probs": _bernoulli_probs,
    "continuous_bernoulli": _continuous_bernoulli,
    "student_t": _student_t,
    "poisson": _poisson,
    "negative_binomial": _negative_binomial,
    "zero_inflated_negative_binomial": _zero_inflated,
    "discretized_logistic": _discretized_logistic,
}


def nll(likelihood: str, target: Tensor, params: tuple[Tensor, ...], **options: float) -> Tensor:
    """-log p(target | params) in nats, elementwise, in float64; options as the registry's defaults unless given."""
    options = {**LIKELIHOODS[likelihood].options, **options}
    if likelihood not in NLL:
        return -LIKELIHOODS[likelihood].distribution(*(p.double() for p in params), **options).log_prob(target.double())
    columns = [t.double().expand(target.shape).reshape(-1).tolist() for t in (target, *params)]
    values = [float(NLL[likelihood](*map(mpf, row), **options)) for row in zip(*columns)]
    return torch.tensor(values, dtype=torch.float64).view(target.shape)
