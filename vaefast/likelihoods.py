"""The likelihoods in PyTorch: the Python side of ``csrc/likelihoods/``.

``LIKELIHOODS`` is one of the two registries. An entry here is a likelihood: checks, gradients, generation and
``torch.compile`` go by it. With a struct there it gets its kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch import distributions as D
from torch.nn import functional as F

from . import _closed_counts, _counts, _densities
from ._counts import LARGE, in_float64
from ._distributions import (
    BetaBinomial,
    Classes,
    ContinuousBernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    EitherOf,
    NegativeBinomial,
    Poisson,
    StudentT,
    ZeroInflated,
    ZeroOr,
)
from ._gaussian import constant, softplus
from ._limits import beside, in_unit, inverse, weighed
from ._supports import DOMAINS, SUPPORTS, Asked, Closed, Domain, LikelihoodEntry

__all__ = ["COMPOSED", "DOMAINS", "LIKELIHOODS", "SUPPORTS", "Domain", "LikelihoodEntry"]


def _bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    # softplus(l) - l x from the side where nothing cancels; no |l|, whose gradient is lost at 0
    positive = logits > 0
    up, down = torch.where(positive, logits, 0.0), torch.where(positive, 0.0, logits)
    above, below = weighed(up, 1 - x) + F.softplus(-up), F.softplus(down) - weighed(down, x)
    return torch.where(positive, above, below)


# as many are computed in no more time than an operation takes to begin
_FEW = 1 << 9
# as far as that l - l x is right to 1.5e-6, and down to where l (1 - x) - log(sigmoid(l)) is, whose parts may cancel
_NEAR, _BELOW = 24.0, -10.0
# numbers, from which on a closed form takes less than PyTorch's operator and its gradient; logits beyond the caches
_FEW_PROBS, _FEW_LOGITS = 1 << 13, 1 << 22


def _bernoulli_gradients(asked: Asked, x: Tensor, logits: Tensor) -> Closed:
    sigmoid = torch.sigmoid(logits)
    gradients = [(torch.sub(sigmoid, x, out=asked.into(0)), 1.0)]
    if logits.numel() <= _FEW and logits.is_cpu:
        # one operation for all, in float64: it has two terms of l (1 - x) that may cancel
        wide = F.binary_cross_entropy_with_logits(logits.double(), x.double(), reduction="none")
        return wide, 1.0, 0.0, gradients
    if logits.is_cpu and logits.dtype == torch.float32:
        least, most = (t.item() for t in logits.aminmax())
        if _BELOW <= least and most <= _NEAR:
            return torch.addcmul(logits, logits, x, value=-1).sub_(sigmoid.log_()), 1.0, 0.0, gradients
        if -_NEAR <= least and most <= _NEAR:
            # log(1 + e^-|l|) is that of the sigmoid on the side where it is above 1/2
            rest = sigmoid.sub_(0.5).abs_().add_(0.5).log_()
            return F.relu(logits).addcmul_(logits, x, value=-1).sub_(rest), 1.0, 0.0, gradients
    nll = F.relu(logits).mul_(torch.sub(constant(1.0, x), x)).addcmul_(logits.clamp(max=0), x, value=-1)
    return nll.add_(_closed_counts.log1p_exp(logits)), 1.0, 0.0, gradients


def _bernoulli_probs(x: Tensor, probs: Tensor) -> Tensor:
    """F.binary_cross_entropy: logarithms >= -100; where p (1 - p) < 1e-12, that divides instead. What it refuses, a
    datum or a probability outside [0, 1], is NaN."""
    x = in_unit(x)
    inside = probs * (1 - probs) > 1e-12
    p, end = torch.where(inside, probs, 0.5), probs.detach()
    logs = (torch.log(end).clamp(min=-100), torch.log1p(-end).clamp(min=-100))
    at_end = (probs - end) * (end - x) / 1e-12 - x * logs[0] - (1 - x) * logs[1]
    return torch.where(inside, -x * torch.log(p) - (1 - x) * torch.log1p(-p), at_end)


def _bernoulli_probs_gradients(asked: Asked, x: Tensor, probs: Tensor) -> Closed:
    x, other = in_unit(x), torch.sub(constant(1.0, probs), probs)
    logs = torch.log(probs).clamp_(min=-100), probs.neg().log1p_().clamp_(min=-100)
    gradient = (probs - x).div_(other.mul_(probs).clamp_(min=1e-12))
    return torch.lerp(logs[1], logs[0], x), -1.0, 0.0, [(gradient, 1.0)]


def _bernoulli_probs_operator(x: Tensor, probs: Tensor) -> Tensor | None:
    if x.numel() > _FEW_PROBS or x.dtype != torch.float32:  # its 1e-12 is float32's
        return None
    least, most = x.aminmax()
    if not (least.item() >= 0 and most.item() <= 1):
        return None
    try:
        return F.binary_cross_entropy(probs, x, reduction="none")
    except RuntimeError:  # of a probability that is none
        return None


def _gaussian(x: Tensor, mean: Tensor, logvar: Tensor | None = None, *, constant: float) -> Tensor:
    if logvar is None:
        return 0.5 * (constant * math.log(2 * math.pi) + (x - mean) ** 2)
    d = x - mean
    return 0.5 * (constant * math.log(2 * math.pi) + beside(d**2 * inverse(logvar, d), logvar))


def _gaussian_gradients(
    asked: Asked, x: Tensor, mean: Tensor, logvar: Tensor | None = None, *, constant: float
) -> Closed:
    if logvar is None:
        d = torch.sub(mean, x, out=asked.into(0))
        return d * d, 0.5, 0.5 * constant * math.log(2 * math.pi), [(d, 1.0)]
    d = mean - x
    scaled = torch.mul(d, torch.exp(-logvar), out=asked.into(0))
    square = d.mul_(scaled)
    return square + logvar, 0.5, 0.5 * constant * math.log(2 * math.pi), [(scaled, 1.0), (1 - square, 0.5)]


def _laplace(x: Tensor, loc: Tensor, log_scale: Tensor | None = None, *, constant: float) -> Tensor:
    if log_scale is None:
        return constant * math.log(2) + (x - loc).abs()
    d = x - loc
    return constant * math.log(2) + beside(d.abs() * inverse(log_scale, d), log_scale)


def _laplace_gradients(
    asked: Asked, x: Tensor, loc: Tensor, log_scale: Tensor | None = None, *, constant: float
) -> Closed:
    d = loc - x
    if log_scale is None:
        return d.abs(), 1.0, constant * math.log(2), [(d.sign_(), 1.0)]
    inverse = torch.exp(-log_scale)
    scaled = d.abs().mul_(inverse)
    return scaled + log_scale, 1.0, constant * math.log(2), [(d.sign_().mul_(inverse), 1.0), (1 - scaled, 1.0)]


@in_float64
def _continuous_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """log((e^l - 1) / l) - l x; Loaiza-Ganem & Cunningham 2019 (arXiv:1907.06845), equation 6."""
    small = logits.abs() < 1e-2
    near, far = torch.where(small, logits, 0.0), torch.where(small, 1.0, logits)
    series = near / 2 + near**2 / 24 - near**4 / 2880
    # from the end that l leads to; at infinity all mass is there
    a, positive, x = far.abs(), far > 0, in_unit(x)
    size = torch.where(torch.isinf(far), 1.0, a)
    large = beside(weighed(far, torch.where(positive, 1 - x, -x)), torch.log(-torch.expm1(-size)) - torch.log(a))
    return torch.where(small, series - near * x, large)


@in_float64
def _student_t(x: Tensor, loc: Tensor, log_scale: Tensor, df: Tensor) -> Tensor:
    df = df.clamp(max=1e30)  # a Gaussian
    d, small = x - loc, torch.where(df < LARGE, df, 1.0)
    norm = torch.lgamma(small / 2) - torch.lgamma((small + 1) / 2) + 0.5 * torch.log(math.pi * small)
    norm = torch.where(df < LARGE, norm, 0.5 * math.log(2 * math.pi) + 0.25 / df)
    # (df + 1) / 2 log(1 + s) with s = d^2 / (df scale^2): beyond 1 by the logarithm of s, for the scale may vanish
    apart = torch.log(torch.where(d == 0, 1.0, d.abs())) - 0.5 * torch.log(df)
    far = (d != 0) & (log_scale < apart)
    scaled = torch.where(far, 0.0, d) * inverse(log_scale, torch.where(far, 0.0, d))
    apart, log = torch.where(far, apart, 0.0), torch.where(far, log_scale, 0.0)
    beyond = (df + 1) * (apart + 0.5 * torch.log1p(torch.exp(2 * (log - apart)))) - df * log
    return norm + torch.where(far, beyond, log_scale + (df + 1) / 2 * torch.log1p(scaled**2 / df))


@in_float64
def _discretized_logistic(
    x: Tensor, mean: Tensor, log_scale: Tensor, bins: float, low: float, high: float, floor: float
) -> Tensor:
    """-log(sigmoid(b) - sigmoid(a)) at the edges a, b of x's bin; Salimans et al. 2017 (arXiv:1701.05517), eq. 2."""
    half = (high - low) / (bins - 1) / 2
    inverse = torch.exp(-torch.where(log_scale <= floor, floor, log_scale))
    a, b = (x - mean - half) * inverse, (x - mean + half) * inverse
    inner = softplus(a) + softplus(-b) - torch.log(-torch.expm1(-2 * half * inverse))
    return torch.where(x < low + half / 2, softplus(-b), torch.where(x > high - half / 2, softplus(a), inner))


def _check_floor(per_sample: float, floor: float) -> None:
    if floor < 0:
        raise ValueError(f"floor is the least variance, at least 0, got {floor!r}")


def _check_bins(bins: float, low: float, high: float, floor: float) -> None:
    if not (bins >= 2 and bins == int(bins)):
        raise ValueError(f"bins must be a whole number, at least 2, got {bins!r}")
    if not low < high:
        raise ValueError(f"low must be below high, got low={low!r}, high={high!r}")


def _check_dim(dim: float) -> None:
    if dim != int(dim) or dim == 0:
        raise ValueError(f"dim must be a whole number and not 0, which is the batch, got {dim!r}")


def _check_mixture(channels: float, dim: float, **grid: float) -> None:
    _check_bins(**grid)
    _check_dim(dim)
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, as there are couplings for, got {channels!r}")


@in_float64
def _categorical(x: Tensor, logits: Tensor, dim: float) -> Tensor:
    logits = logits.movedim(int(dim), -1)
    hit = x.unsqueeze(-1) == torch.arange(logits.shape[-1], device=x.device)
    known = hit.any(-1, keepdim=True)
    picked = torch.where(hit | ~known, torch.log_softmax(logits, -1), 0.0)
    return -picked.sum(-1) * torch.where(known.squeeze(-1), 1.0, math.nan)


def _categorical_gradients(asked: Asked, x: Tensor, logits: Tensor, dim: float) -> Closed:
    log_p = torch.log_softmax(logits, int(dim))
    index = x.long().clamp_(0, logits.shape[int(dim)] - 1)
    known = torch.where(x == index, 1.0, math.nan).to(x.dtype)
    index, sites = index.unsqueeze(int(dim)), known.unsqueeze(int(dim))
    nll = log_p.gather(int(dim), index).squeeze(int(dim))
    gradient = log_p.exp_().scatter_add_(int(dim), index, -torch.ones_like(sites))
    if not x.is_cpu or sites.isnan().any():  # to look first waits for a GPU
        gradient.mul_(sites)
    return nll.mul_(known), -1.0, 0.0, [(gradient, 1.0)]


def _categorical_operator(x: Tensor, logits: Tensor, dim: float) -> Tensor | None:
    if int(dim) != 1 or logits.numel() > _FEW_LOGITS:
        return None
    index = x.long()
    least, most = index.aminmax()
    if least.item() < 0 or most.item() >= logits.shape[1] or not (index == x).all().item():
        return None
    return F.cross_entropy(logits, index, reduction="none")


@in_float64
def _discretized_logistic_mixture(x: Tensor, planes: Tensor, channels: float, dim: float, **grid: float) -> Tensor:
    """-log sum_k softmax(l)_k prod_c P(x_c | m_kc + sum_b<c tanh(a_kcb) x_b, ls_kc); Salimans et al. 2017
    (arXiv:1701.05517), section 2.2."""
    x = x.movedim(int(dim), -1).unsqueeze(-1)
    columns = 2 if channels == 1 else 3
    logits, *rest = planes.movedim(int(dim), -1).unflatten(-1, (1 + int(channels) * columns, -1)).unbind(-2)
    nll = torch.zeros_like(logits)
    couplings = iter(rest[2::3])
    for c in range(int(channels)):
        mean, log_scale = rest[columns * c : columns * c + 2]
        for b in range(c):
            mean = mean + torch.tanh(next(couplings)) * x[..., b, :]
        nll = nll + _discretized_logistic(x[..., c, :].expand_as(mean), mean, log_scale, **grid)
    return torch.logsumexp(logits, -1) - torch.logsumexp(logits - nll, -1)


LIKELIHOODS: dict[str, LikelihoodEntry] = {
    "bernoulli": LikelihoodEntry(
        ("logits",),
        1,
        "unit",
        "softplus(l) - l x",
        _bernoulli,
        lambda logits: D.Bernoulli(logits=logits, validate_args=False),
        gradients=_bernoulli_gradients,
    ),
    "bernoulli_probs": LikelihoodEntry(
        ("probs",),
        1,
        "unit",
        "-x log p - (1 - x) log(1 - p), logarithms >= -100",
        _bernoulli_probs,
        lambda probs: D.Bernoulli(probs=probs, validate_args=False),
        domains=("unit",),
        gradients=_bernoulli_probs_gradients,
        operator=_bernoulli_probs_operator,
    ),
    "continuous_bernoulli": LikelihoodEntry(
        ("logits",),
        1,
        "unit",
        "log((e^l - 1) / l) - l x",
        _continuous_bernoulli,
        ContinuousBernoulli,
        gradients=_densities.continuous_bernoulli,
    ),
    "gaussian": LikelihoodEntry(
        ("mean", "logvar"),
        1,
        "real",
        "(log 2 pi + lv + (x - m)^2 e^-lv) / 2",
        _gaussian,
        lambda mean, logvar=None, constant=True: D.Normal(
            mean, 1.0 if logvar is None else torch.exp(0.5 * logvar), validate_args=False
        ),
        options={"constant": True},
        gradients=_gaussian_gradients,
    ),
    "laplace": LikelihoodEntry(
        ("loc", "log_scale"),
        1,
        "real",
        "log 2 + ls + |x - m| e^-ls",
        _laplace,
        lambda loc, log_scale=None, constant=True: D.Laplace(
            loc, 1.0 if log_scale is None else torch.exp(log_scale), validate_args=False
        ),
        options={"constant": True},
        gradients=_laplace_gradients,
    ),
    "student_t": LikelihoodEntry(
        ("loc", "log_scale", "df"),
        3,
        "real",
        "log(B(df / 2, 1 / 2) sqrt(df)) + ls + (df + 1) / 2 log(1 + (x - m)^2 e^(-2 ls) / df)",
        _student_t,
        lambda loc, log_scale, df: StudentT(df, loc, torch.exp(log_scale)),
        domains=("real", "log", "positive"),
        gradients=_densities.student_t,
    ),
    "log_normal": LikelihoodEntry(
        ("loc", "log_scale"),
        2,
        "positive",
        "log x + ls + (log 2 pi + (log x - m)^2 e^(-2 ls)) / 2",
        _counts.log_normal,
        lambda loc, log_scale: D.LogNormal(loc, torch.exp(log_scale), validate_args=False),
    ),
    "gamma": LikelihoodEntry(
        ("log_mean", "concentration"),
        2,
        "positive",
        "log Gamma(a) + a (l - log a) - (a - 1) log x + a x e^-l",
        _counts.gamma,
        lambda log_mean, concentration: D.Gamma(
            concentration, concentration * torch.exp(-log_mean), validate_args=False
        ),
        domains=("log", "positive"),
    ),
    "zero_inflated_log_normal": LikelihoodEntry(
        ("loc", "log_scale", "pi_logits"),
        3,
        "at least 0",
        "-log(sigmoid(p) [x = 0] + sigmoid(-p) LN(x; m, e^ls) [x > 0])",
        _counts.zero_inflated_log_normal,
        lambda loc, log_scale, pi_logits: ZeroOr(
            D.LogNormal(loc, torch.exp(log_scale), validate_args=False), pi_logits
        ),
        domains=("real", "log", "real"),
    ),
    "zero_inflated_gamma": LikelihoodEntry(
        ("log_mean", "concentration", "pi_logits"),
        3,
        "at least 0",
        "-log(sigmoid(p) [x = 0] + sigmoid(-p) G(x; e^l, a) [x > 0])",
        _counts.zero_inflated_gamma,
        lambda log_mean, concentration, pi_logits: ZeroOr(
            D.Gamma(concentration, concentration * torch.exp(-log_mean), validate_args=False), pi_logits
        ),
        domains=("log", "positive", "real"),
    ),
    "poisson": LikelihoodEntry(
        ("log_rate",),
        1,
        "count",
        "e^r - r x + log x!",
        _counts.poisson,
        lambda log_rate, constant: Poisson(torch.exp(log_rate.double()), validate_args=False),
        domains=("log",),
        options={"constant": True},
        gradients=_closed_counts.poisson,
    ),
    "negative_binomial": LikelihoodEntry(
        ("mu", "theta"),
        2,
        "count",
        "-log NB(x; mean m, inverse dispersion t)",
        _counts.negative_binomial,
        lambda mu, theta, constant, eps: NegativeBinomial.of_mean(mu + eps, theta),
        domains=("positive", "positive"),
        options={"constant": True, "eps": 1e-8},
        gradients=_closed_counts.negative_binomial,
    ),
    "zero_inflated_negative_binomial": LikelihoodEntry(
        ("mu", "theta", "pi_logits"),
        3,
        "count",
        "-log(sigmoid(p) [x = 0] + sigmoid(-p) NB(x; m, t))",
        _counts.zero_inflated_negative_binomial,
        lambda mu, theta, pi_logits, constant, eps: ZeroInflated(NegativeBinomial.of_mean(mu + eps, theta), pi_logits),
        domains=("positive", "positive", "real"),
        options={"constant": True, "eps": 1e-8},
        gradients=_closed_counts.zero_inflated_negative_binomial,
    ),
    "negative_binomial_mixture": LikelihoodEntry(
        ("mu1", "mu2", "theta1", "mixture_logits"),
        4,
        "count",
        "-log(sigmoid(l) NB(x; m1, t) + sigmoid(-l) NB(x; m2, t))",
        _counts.negative_binomial_mixture,
        lambda mu1, mu2, theta1, mixture_logits, constant, eps: EitherOf(
            NegativeBinomial.of_mean(mu1 + eps, theta1), NegativeBinomial.of_mean(mu2 + eps, theta1), mixture_logits
        ),
        domains=("positive", "positive", "positive", "real"),
        options={"constant": True, "eps": 1e-8},
    ),
    "beta_binomial": LikelihoodEntry(
        ("alpha", "beta", "total_count"),
        3,
        "some of total",
        "log B(a, b) - log B(x + a, n - x + b) - log C(n, x)",
        _counts.beta_binomial,
        BetaBinomial,
        domains=("positive", "positive", "total"),
    ),
    "discretized_logistic": LikelihoodEntry(
        ("mean", "log_scale"),
        2,
        "bins",
        "-log(sigmoid(b) - sigmoid(a)), a, b = (x -+ w / 2 - m) e^-ls",
        _discretized_logistic,
        lambda mean, log_scale, bins, low, high, floor: DiscretizedLogistic(
            mean, torch.exp(log_scale.clamp(min=floor)), bins, low, high
        ),
        options={"bins": 256, "low": -1.0, "high": 1.0, "floor": -7.0},
        check=_check_bins,
        gradients=_densities.discretized_logistic,
    ),
    "categorical": LikelihoodEntry(
        ("logits",),
        1,
        "class",
        "logsumexp(l) - l_x",
        _categorical,
        lambda logits, dim: Classes(logits, int(dim)),
        domains=("planes",),
        options={"dim": 1},
        check=_check_dim,
        planes={0: 1},
        gradients=_categorical_gradients,
        operator=_categorical_operator,
    ),
    "discretized_logistic_mixture": LikelihoodEntry(
        ("planes",),
        1,
        "bins",
        "-log sum_k softmax(l)_k prod_c DL(x_c; m_kc + sum_b<c tanh(a_kcb) x_b, ls_kc)",
        _discretized_logistic_mixture,
        lambda planes, channels, dim, **grid: DiscretizedLogisticMixture(planes, int(dim), int(channels), **grid),
        domains=("planes",),
        options={"bins": 256, "low": -1.0, "high": 1.0, "floor": -7.0, "channels": 3, "dim": 1},
        check=_check_mixture,
        planes={1: 3, 3: 10},
        gradients=_densities.discretized_logistic_mixture,
    ),
}


# Composed of another's sums (vaefast/_compose.py): no kernel of their own, and no value for a single element.
COMPOSED: dict[str, LikelihoodEntry] = {
    "gaussian_optimal": LikelihoodEntry(
        ("mean",),
        1,
        "real",
        "(sum (x - m)^2 / s + n log(2 pi s)) / 2, s the mean of (x - m)^2, at least a floor",
        _gaussian,
        lambda mean, per_sample, floor: D.Normal(mean, math.nan, validate_args=False),
        domains=("real",),
        options={"per_sample": False, "floor": math.exp(-12)},
        check=_check_floor,
    ),
}


def names() -> tuple[str, ...]:
    return (*LIKELIHOODS, *COMPOSED)


def entry_of(name: str) -> LikelihoodEntry:
    return COMPOSED[name] if name in COMPOSED else LIKELIHOODS[name]
