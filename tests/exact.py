"""The likelihoods' published formulas in 50 digits, written out from the definitions; what float64 cannot be trusted
with. A likelihood that is not here is held against its torch.distributions object."""

from __future__ import annotations

import functools
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


def _log_sum_exp(terms: list[mpf]) -> mpf:
    return mpmath.log(sum(mpmath.exp(t) for t in terms))


def _categorical(x: list[mpf], logits: list[mpf]) -> mpf:
    return _log_sum_exp(logits) - logits[int(x[0])]


def _discretized_logistic_mixture(x: list[mpf], planes: list[mpf], channels: float, **grid: float) -> mpf:
    """PixelCNN++'s layout: K logits; then for each channel K means, K log scales and, of three channels, K couplings:
    of the second's mean with the first channel, of the third's with the first, and with the second."""
    channels, columns = int(channels), 2 if channels == 1 else 3
    K = len(planes) // (1 + channels * columns)
    rows = [planes[K * n : K * (n + 1)] for n in range(1 + channels * columns)]
    joint = []
    for k in range(K):
        mean = [rows[1 + columns * c][k] for c in range(channels)]
        if channels == 3:
            first, second, third = (mpmath.tanh(rows[n][k]) for n in (3, 6, 9))
            mean[1] += first * x[0]
            mean[2] += second * x[0] + third * x[1]
        scale = [rows[2 + columns * c][k] for c in range(channels)]
        joint.append(rows[0][k] - sum(_discretized_logistic(*each, **grid) for each in zip(x, mean, scale)))
    return _log_sum_exp(rows[0]) - _log_sum_exp(joint)


def _log_normal(x: mpf, loc: mpf, log_scale: mpf) -> mpf:
    """The normal density of log x, over x."""
    t = (mpmath.log(x) - loc) / mpmath.exp(log_scale)
    return t * t / 2 + mpmath.log(2 * mp.pi) / 2 + log_scale + mpmath.log(x)


def _gamma(x: mpf, log_mean: mpf, concentration: mpf) -> mpf:
    """x^(a - 1) e^(-x b) b^a / Gamma(a), of the rate b that gives the mean"""
    rate = concentration / mpmath.exp(log_mean)
    log_norm = concentration * mpmath.log(rate) - mpmath.loggamma(concentration)
    return x * rate - (concentration - 1) * mpmath.log(x) - log_norm


def _beta_binomial(x: mpf, alpha: mpf, beta: mpf, total: mpf) -> mpf:
    """scipy.stats.betabinom's: C(n, x) B(x + a, n - x + b) / B(a, b)"""

    def log_beta(p: mpf, q: mpf) -> mpf:
        return mpmath.loggamma(p) + mpmath.loggamma(q) - mpmath.loggamma(p + q)

    log_choose = -mpmath.log(total + 1) - log_beta(x + 1, total - x + 1)
    return log_beta(alpha, beta) - log_beta(x + alpha, total - x + beta) - log_choose


def _mixture(x: mpf, mu1: mpf, mu2: mpf, theta: mpf, logits: mpf, constant: float, eps: float) -> mpf:
    """totalVI's: scvi.distributions.NegativeBinomialMixture, of the first with probability sigmoid(logits)."""
    first, second = (mpmath.exp(-_negative_binomial(x, mu, theta, constant, eps)) for mu in (mu1, mu2))
    return -mpmath.log(first / (1 + mpmath.exp(-logits)) + second / (1 + mpmath.exp(logits)))


def _zero_or(nll: Callable[..., mpf]) -> Callable[..., mpf]:
    """A mass at 0 and a density above it."""

    def with_zeros(x: mpf, *params: mpf) -> mpf:
        *own, pi_logits = params
        if x == 0:
            return mpmath.log1p(mpmath.exp(-pi_logits))
        return mpmath.log1p(mpmath.exp(pi_logits)) + nll(x, *own)

    return with_zeros


NLL: dict[str, Callable[..., mpf]] = {
    "bernoulli_probs": _bernoulli_probs,
    "continuous_bernoulli": _continuous_bernoulli,
    "student_t": _student_t,
    "poisson": _poisson,
    "negative_binomial": _negative_binomial,
    "zero_inflated_negative_binomial": _zero_inflated,
    "discretized_logistic": _discretized_logistic,
    "log_normal": _log_normal,
    "gamma": _gamma,
    "negative_binomial_mixture": _mixture,
    "zero_inflated_log_normal": _zero_or(_log_normal),
    "zero_inflated_gamma": _zero_or(_gamma),
    "beta_binomial": _beta_binomial,
}

# of one site: the numbers of the target and of the parameter along `dim`
MIXTURES: dict[str, Callable[..., mpf]] = {
    "categorical": _categorical,
    "discretized_logistic_mixture": _discretized_logistic_mixture,
}


@functools.lru_cache(1 << 18)
def _at(likelihood: str, options: tuple[tuple[str, float], ...], *numbers: float) -> float:
    """Of one element, whose numbers several tests have in common."""
    return float(NLL[likelihood](*map(mpf, numbers), **dict(options)))


def nll(likelihood: str, target: Tensor, params: tuple[Tensor, ...], **options: float) -> Tensor:
    """-log p(target | params) in nats, elementwise, in float64; options as the registry's defaults unless given."""
    options = {**LIKELIHOODS[likelihood].options, **options}
    if likelihood in MIXTURES:
        dim = int(options.pop("dim"))
        target = target if target.dim() == params[0].dim() else target.unsqueeze(dim)
        x, planes = target.movedim(dim, -1), params[0].movedim(dim, -1)
        sites = zip(x.flatten(0, -2).tolist(), planes.flatten(0, -2).tolist())
        found = [float(MIXTURES[likelihood](list(map(mpf, xs)), list(map(mpf, ps)), **options)) for xs, ps in sites]
        return torch.tensor(found, dtype=torch.float64).view(x.shape[:-1])
    if likelihood not in NLL:
        return -LIKELIHOODS[likelihood].distribution(*(p.double() for p in params), **options).log_prob(target.double())
    columns = [t.double().expand(target.shape).reshape(-1).tolist() for t in (target, *params)]
    values = [_at(likelihood, tuple(options.items()), *row) for row in zip(*columns)]
    return torch.tensor(values, dtype=torch.float64).view(target.shape)
