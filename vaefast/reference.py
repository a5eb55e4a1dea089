"""Pure-PyTorch versions of the public functions: the fallback, the oracle of the tests, and the path for what the
kernels do not cover (double backward, torch.func, forward-mode AD).

Two registries are the Python side of ``csrc/likelihoods.h`` and ``csrc/posterior.h``: ``LIKELIHOODS`` and
``PARAMETERIZATIONS``. An entry here and a struct there is all that a new one takes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch import distributions as D
from torch.nn import functional as F

from . import _args, _kl_options, _optimal
from ._args import Likelihood, Parameterization, Real
from ._distributions import Classes, DiscretizedLogistic, DiscretizedLogisticMixture, ZeroInflated
from ._generators import Generators, each_its_own, explain_to_compilers
from ._kl_options import Pair
from ._philox import draw_seed, normal

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "LIKELIHOODS",
    "PARAMETERIZATIONS",
    "ELBOTerms",
    "elbo_loss",
    "elbo_terms",
    "gaussian_kl",
    "kl_per_dim",
    "multi_tensor_gaussian_kl",
    "multi_tensor_sample_with_kl",
    "reconstruction_loss",
    "reparameterize",
    "sample_with_kl",
]


class ELBOTerms(NamedTuple):
    """The negative ELBO and its two terms in nats: ``loss = reconstruction + beta * kl``."""

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor


# From any number, as a network puts it out, to where a parameter lives.
DOMAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "real": lambda x: x,
    "log": lambda x: x,
    "positive": torch.exp,
    "unit": torch.sigmoid,
    "planes": lambda x: x,
}


def _anything(**options: float) -> None:
    """No option's value needs a check."""


@dataclass(frozen=True)
class LikelihoodEntry:
    """A likelihood p(x | params), elementwise.

    ``nll(x, *params, **options)`` is -log p in nats; the first ``required`` params must be given. ``support`` is where
    x lives ("unit" for [0, 1], "real", "count", "bins"), ``formula`` goes to the tables, ``distribution(*params,
    **options)`` is the torch.distributions object that draws, and that the tests hold it against. ``options`` are their
    defaults, in the struct's order, and ``check`` raises where their values do not go together. ``domains`` says of
    each parameter where it lives: a name in ``DOMAINS``; "log" is the logarithm of a scale or a rate.

    A mixture has one parameter, whose planes lie along the dimension that its last option, ``dim``, names: logits, and
    then each parameter of the components. ``planes`` says how many a component has, by the option ``channels``, the
    target's size along ``dim``, or at 0 where there is no such option and no such dimension. Its nll has the shape
    without ``dim``.
    """

    params: tuple[str, ...]
    required: int
    support: str
    formula: str
    nll: Callable[..., Tensor]
    distribution: Callable[..., D.Distribution]
    domains: tuple[str, ...] = ("real", "log")
    options: dict[str, float] = field(default_factory=dict)
    check: Callable[..., None] = _anything
    planes: dict[int, int] = field(default_factory=dict)


def _bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    # softplus(l) - l x from the side where nothing cancels; no |l|, whose gradient is lost at 0
    return torch.where(logits > 0, logits * (1 - x) + F.softplus(-logits), F.softplus(logits) - logits * x)


def _bernoulli_probs(x: Tensor, probs: Tensor) -> Tensor:
    """F.binary_cross_entropy, which refuses NaN: logarithms >= -100; where p (1 - p) < 1e-12, that divides instead."""
    inside = probs * (1 - probs) > 1e-12
    p, end = torch.where(inside, probs, 0.5), probs.detach()
    logs = (torch.log(end).clamp(min=-100), torch.log1p(-end).clamp(min=-100))
    at_end = (probs - end) * (end - x) / 1e-12 - x * logs[0] - (1 - x) * logs[1]
    return torch.where(inside, -x * torch.log(p) - (1 - x) * torch.log1p(-p), at_end)


def _gaussian(x: Tensor, mean: Tensor, logvar: Tensor | None = None, *, constant: float) -> Tensor:
    if logvar is None:
        return 0.5 * (constant * math.log(2 * math.pi) + (x - mean) ** 2)
    return 0.5 * (constant * math.log(2 * math.pi) + logvar + (x - mean) ** 2 * torch.exp(-logvar))


def _laplace(x: Tensor, loc: Tensor, log_scale: Tensor | None = None, *, constant: float) -> Tensor:
    if log_scale is None:
        return constant * math.log(2) + (x - loc).abs()
    return constant * math.log(2) + log_scale + (x - loc).abs() * torch.exp(-log_scale)


def _in_float64(nll: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For formulas whose large terms cancel: in float64 what is left is still right for float32."""

    @functools.wraps(nll)
    def wide(x: Tensor, *params: Tensor, **options: float) -> Tensor:
        return nll(x.double(), *(p.double() for p in params), **options).to(x.dtype)

    return wide


@_in_float64
def _continuous_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """log((e^l - 1) / l) - l x; Loaiza-Ganem & Cunningham 2019 (arXiv:1907.06845), equation 6."""
    small = logits.abs() < 1e-2
    near, far = torch.where(small, logits, 0.0), torch.where(small, 1.0, logits)
    series = near / 2 + near**2 / 24 - near**4 / 2880
    norm = F.relu(far) + torch.log(-torch.expm1(-far.abs()) / far.abs())
    return torch.where(small, series, norm) - logits * x


@_in_float64
def _student_t(x: Tensor, loc: Tensor, log_scale: Tensor, df: Tensor) -> Tensor:
    d = (x - loc) * torch.exp(-log_scale)
    norm = torch.lgamma(df / 2) - torch.lgamma((df + 1) / 2) + 0.5 * torch.log(math.pi * df)
    return norm + log_scale + (df + 1) / 2 * torch.log1p(d * d / df)


def _log_factorial(x: Tensor, constant: float) -> Tensor:
    """log(x!), or 0 where it is left out; NaN where x is no count."""
    return torch.where(x < 0, math.nan, torch.lgamma(x + 1) if constant else torch.zeros_like(x))


@_in_float64
def _poisson(x: Tensor, log_rate: Tensor, constant: float) -> Tensor:
    return torch.exp(log_rate) - x * log_rate + _log_factorial(x, constant)


@_in_float64
def _negative_binomial(x: Tensor, mu: Tensor, theta: Tensor, constant: float, eps: float) -> Tensor:
    mu = mu + eps
    gammas = torch.lgamma(theta) - torch.lgamma(x + theta) + _log_factorial(x, constant)
    return theta * torch.log1p(mu / theta) - torch.xlogy(x, mu / (theta + mu)) + gammas


@_in_float64
def _zero_inflated_negative_binomial(
    x: Tensor, mu: Tensor, theta: Tensor, pi_logits: Tensor, constant: float, eps: float
) -> Tensor:
    """Lopez et al. 2018 (scVI), supplementary; 0 with probability sigmoid(pi_logits) besides."""
    nll = _negative_binomial(x, mu, theta, constant=constant, eps=eps)
    at_zero = _softplus(-pi_logits) - _softplus(-pi_logits - nll)
    return torch.where(x == 0, at_zero, _softplus(pi_logits) + nll)


@_in_float64
def _discretized_logistic(
    x: Tensor, mean: Tensor, log_scale: Tensor, bins: float, low: float, high: float, floor: float
) -> Tensor:
    """-log(sigmoid(b) - sigmoid(a)) at the edges a, b of x's bin; Salimans et al. 2017 (arXiv:1701.05517), eq. 2."""
    half = (high - low) / (bins - 1) / 2
    inverse = torch.exp(-torch.where(log_scale <= floor, floor, log_scale))
    a, b = (x - mean - half) * inverse, (x - mean + half) * inverse
    inner = _softplus(a) + _softplus(-b) - torch.log(-torch.expm1(-2 * half * inverse))
    return torch.where(x < low + half / 2, _softplus(-b), torch.where(x > high - half / 2, _softplus(a), inner))


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


@_in_float64
def _categorical(x: Tensor, logits: Tensor, dim: float) -> Tensor:
    logits = logits.movedim(int(dim), -1)
    hit = x.unsqueeze(-1) == torch.arange(logits.shape[-1], device=x.device)
    known = hit.any(-1, keepdim=True)
    picked = torch.where(hit | ~known, torch.log_softmax(logits, -1), 0.0)
    return -picked.sum(-1) * torch.where(known.squeeze(-1), 1.0, math.nan)


@_in_float64
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


def _negative_binomial_distribution(mu: Tensor, theta: Tensor, eps: float) -> D.NegativeBinomial:
    return D.NegativeBinomial(theta, logits=torch.log((mu + eps) / theta), validate_args=False)


LIKELIHOODS: dict[str, LikelihoodEntry] = {
    "bernoulli": LikelihoodEntry(
        ("logits",),
        1,
        "unit",
        "softplus(l) - l x",
        _bernoulli,
        lambda logits: D.Bernoulli(logits=logits, validate_args=False),
    ),
    "gaussian": LikelihoodEntry(
        ("mean", "logvar"),
        1,
        "real",
        "(log 2 pi + lv + (x - m)^2 e^-lv) / 2",
        _gaussian,
        lambda mean, logvar=None, constant=True: D.Normal(mean, 1.0 if logvar is None else torch.exp(0.5 * logvar)),
        options={"constant": True},
    ),
    "laplace": LikelihoodEntry(
        ("loc", "log_scale"),
        1,
        "real",
        "log 2 + ls + |x - m| e^-ls",
        _laplace,
        lambda loc, log_scale=None, constant=True: D.Laplace(loc, 1.0 if log_scale is None else torch.exp(log_scale)),
        options={"constant": True},
    ),
    "bernoulli_probs": LikelihoodEntry(
        ("probs",),
        1,
        "unit",
        "-x log p - (1 - x) log(1 - p), logarithms >= -100",
        _bernoulli_probs,
        lambda probs: D.Bernoulli(probs=probs, validate_args=False),
        domains=("unit",),
    ),
    "continuous_bernoulli": LikelihoodEntry(
        ("logits",),
        1,
        "unit",
        "log((e^l - 1) / l) - l x",
        _continuous_bernoulli,
        lambda logits: D.ContinuousBernoulli(logits=logits, validate_args=False),
    ),
    "student_t": LikelihoodEntry(
        ("loc", "log_scale", "df"),
        3,
        "real",
        "log(B(df / 2, 1 / 2) sqrt(df)) + ls + (df + 1) / 2 log(1 + (x - m)^2 e^(-2 ls) / df)",
        _student_t,
        lambda loc, log_scale, df: D.StudentT(df, loc, torch.exp(log_scale)),
        domains=("real", "log", "positive"),
    ),
    "poisson": LikelihoodEntry(
        ("log_rate",),
        1,
        "count",
        "e^r - r x + log x!",
        _poisson,
        lambda log_rate, constant: D.Poisson(torch.exp(log_rate), validate_args=False),
        domains=("log",),
        options={"constant": True},
    ),
    "negative_binomial": LikelihoodEntry(
        ("mu", "theta"),
        2,
        "count",
        "-log NB(x; mean m, inverse dispersion t)",
        _negative_binomial,
        lambda mu, theta, constant, eps: _negative_binomial_distribution(mu, theta, eps),
        domains=("positive", "positive"),
        options={"constant": True, "eps": 1e-8},
    ),
    "zero_inflated_negative_binomial": LikelihoodEntry(
        ("mu", "theta", "pi_logits"),
        3,
        "count",
        "-log(sigmoid(p) [x = 0] + sigmoid(-p) NB(x; m, t))",
        _zero_inflated_negative_binomial,
        lambda mu, theta, pi_logits, constant, eps: ZeroInflated(
            _negative_binomial_distribution(mu, theta, eps), pi_logits
        ),
        domains=("positive", "positive", "real"),
        options={"constant": True, "eps": 1e-8},
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
    ),
}


# Composed of another's sums (vaefast/_optimal.py): no kernel of their own, and no value for a single element.
COMPOSED: dict[str, LikelihoodEntry] = {
    "gaussian_optimal": LikelihoodEntry(
        ("mean",),
        1,
        "real",
        "n / 2 (log(2 pi s) + 1), s the mean of (x - m)^2",
        _gaussian,
        lambda mean, per_sample: D.Normal(mean, math.nan, validate_args=False),
        domains=("real",),
        options={"per_sample": False},
    ),
}


class _Activation(NamedTuple):
    """raw -> the standard deviation, and raw -> the log variance without going through it."""

    std: Callable[[Tensor], Tensor]
    logvar: Callable[[Tensor], Tensor]


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


PARAMETERIZATIONS: dict[str, _Activation] = {
    "logvar": _Activation(lambda r: torch.exp(0.5 * r), lambda r: r),
    "log_std": _Activation(torch.exp, lambda r: 2 * r),
    "std": _Activation(lambda r: r, lambda r: 2 * torch.log(r)),
    "var": _Activation(torch.sqrt, torch.log),
    "softplus": _Activation(_softplus, lambda r: 2 * torch.log(_softplus(r))),
}


_args.PLAIN.update({name: Parameterization(name) for name in PARAMETERIZATIONS})
_args.LIKELIHOODS.update({name: Likelihood(name) for name in (*LIKELIHOODS, *COMPOSED)})
SQUARES = Likelihood("gaussian", constant=False)


def entry_of(likelihood: Likelihood) -> LikelihoodEntry:
    return COMPOSED.get(likelihood.name) or LIKELIHOODS[likelihood.name]


def clamped(raw: Tensor, p: Parameterization) -> Tensor:
    if p.clamp is None:
        return raw
    lo, hi = p.clamp
    # not torch.clamp, whose gradient on the edges depends on torch's version
    return torch.where((raw <= lo) | (raw >= hi), raw.detach().clamp(lo, hi), raw)


def _std_logvar(raw: Tensor, p: Parameterization) -> tuple[Tensor, Tensor]:
    raw = clamped(raw, p)
    activation = PARAMETERIZATIONS[p.name]
    std = activation.std(raw)
    if p.floor > 0:
        std = std + p.floor
        return std, 2 * torch.log(std)
    return std, activation.logvar(raw)


def _h(x: Tensor) -> Tensor:
    """e^x - 1 - x without cancellation: x^2 (1/2! + x/3! + ...) for |x| < 1, expm1(x) - x further out."""
    small = x.abs() < 1
    near = torch.where(small, x, 0.0)
    q = torch.zeros_like(x)
    for k in range(20 if x.dtype == torch.float64 else 12, 1, -1):
        q = q * near + 1.0 / math.factorial(k)
    far = torch.where(small, 1.0, x)
    return torch.where(small, near * near * q, torch.expm1(far) - far)


def _kl(
    mu: Tensor, raw: Tensor, prior_mu: Tensor | float | None, prior_logvar: Tensor | float | None, p: Parameterization
) -> Tensor:
    """Elementwise KL(N(mu, s^2) || N(prior_mu, e^prior_logvar)); Kingma & Welling 2014, appendix B, rearranged."""
    _, logvar = _std_logvar(raw, p)
    if prior_mu is None and prior_logvar is None:
        return 0.5 * (mu * mu + _h(logvar))
    pm, plv = _wide(prior_mu, mu), _wide(prior_logvar, mu)
    # e^(-lvp/2) multiplies the difference first, so that the square does not overflow before it is scaled down
    return 0.5 * (_h(logvar - plv) + ((mu - pm) * torch.exp(-0.5 * plv)) ** 2)


def _compute_dtype(*tensors: Tensor | float | None) -> torch.dtype:
    wide = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def _wide(x: Tensor | float | None, like: Tensor) -> Tensor:
    """A tensor of like's dtype; None is 0."""
    if isinstance(x, Tensor):
        return x.to(like.dtype)
    return torch.full((), 0.0 if x is None else x, dtype=like.dtype, device=like.device)


def _reduce(x: Tensor, reduction: str, narrow: torch.dtype) -> Tensor:
    if reduction == "none":
        return x.to(narrow)
    if reduction == "mean":
        return x.mean()
    if reduction == "sum":
        return x.sum()
    rows = x if x.dim() == 1 else x.flatten(1).sum(1)
    return rows if reduction == "per_sample" else rows.mean()


def zero_loss(like: Tensor, reduction: str) -> Tensor:
    """The loss that is 0 for every element of like."""
    return _reduce(torch.zeros_like(like, dtype=_compute_dtype(like)), reduction, like.dtype)


def _promote(*tensors: Tensor | float | None) -> torch.dtype:
    dtype: torch.dtype | None = None
    for t in tensors:
        if isinstance(t, Tensor) and t.dtype != torch.bool:
            dtype = t.dtype if dtype is None else torch.promote_types(dtype, t.dtype)
    assert dtype is not None
    return dtype


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    parameterization: str | Parameterization = "logvar",
    eps: Tensor | None = None,
    generator: Generators = None,
    noise: str = "philox",
    num_samples: int | None = None,
) -> Tensor:
    """See :func:`vaefast.reparameterize`."""
    mu, logvar = _args.posterior(mu, logvar)
    if num_samples is not None:
        mu, logvar = _args.samples(mu, logvar, num_samples)
    p = _args.parameterization(parameterization)
    dim = 0 if num_samples is None else 1
    eps = _args.noise(noise, eps, generator, mu, dim)

    def draw(mu: Tensor, raw: Tensor, generator: torch.Generator | None) -> Tensor:
        return _sample(mu, raw, p, eps, None, generator, noise)

    if isinstance(generator, Sequence):
        return each_its_own(draw, (mu, logvar), generator, dim)
    return draw(mu, logvar, generator)


def _sample(
    mu: Tensor,
    raw: Tensor,
    p: Parameterization,
    eps: Tensor | None,
    seed: Tensor | None,
    generator: torch.Generator | None = None,
    noise: str = "philox",
) -> Tensor:
    dtype = _compute_dtype(mu, raw, eps)
    if eps is None and noise == "torch":
        explain_to_compilers(generator)
        eps = torch.randn(mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)
    elif eps is None:
        eps = normal(draw_seed(mu, generator) if seed is None else seed, mu, dtype)
    std, _ = _std_logvar(raw.to(dtype), p)
    return (mu.to(dtype) + std * eps.to(dtype)).to(mu.dtype)


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | Real | None = None,
    prior_logvar: Tensor | Real | None = None,
    *,
    parameterization: str | Parameterization = "logvar",
    reduction: str = "batchmean",
    free_bits: float = 0.0,
    free_bits_per: str = "dim",
    balance: float | None = None,
    capacity: Tensor | Real | None = None,
    symmetric: bool = False,
) -> Tensor:
    """See :func:`vaefast.gaussian_kl`."""
    pair, options = _kl_options.checked(
        mu, logvar, prior_mu, prior_logvar, parameterization, reduction,
        free_bits, free_bits_per, balance, capacity, symmetric,
    )  # fmt: skip
    return _kl_options.kl(plain_kl, pair, reduction, options)


def plain_kl(pair: Pair, reduction: str, balance: float | None) -> Tensor:
    """The KL of checked arguments, without the options that are composed."""
    *tensors, p = pair
    dtype = _compute_dtype(*tensors)

    def kl(mu: Tensor, raw: Tensor, pm: Tensor | float | None, plv: Tensor | float | None) -> Tensor:
        return _kl(mu.to(dtype), raw.to(dtype), pm, plv, p)

    return _reduce(_kl_options.balanced(balance, kl, pair[:2], pair[2:4]), reduction, _promote(*tensors))


def kl_per_dim(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | Real | None = None,
    prior_logvar: Tensor | Real | None = None,
    *,
    parameterization: str | Parameterization = "logvar",
) -> Tensor:
    """See :func:`vaefast.kl_per_dim`."""
    mu = _kl_options.wide(_args.batch("mu", mu))
    kl = gaussian_kl(mu, logvar, prior_mu, prior_logvar, parameterization=parameterization, reduction="none")
    return kl.mean(0)


def sample_with_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | Real | None = None,
    prior_logvar: Tensor | Real | None = None,
    *,
    parameterization: str | Parameterization = "logvar",
    reduction: str = "batchmean",
    eps: Tensor | None = None,
    generator: Generators = None,
    noise: str = "philox",
    free_bits: float = 0.0,
    free_bits_per: str = "dim",
    balance: float | None = None,
    capacity: Tensor | Real | None = None,
    symmetric: bool = False,
    estimator: str = "analytic",
) -> tuple[Tensor, Tensor]:
    """See :func:`vaefast.sample_with_kl`."""
    pair, options = _kl_options.checked(
        mu, logvar, prior_mu, prior_logvar, parameterization, reduction,
        free_bits, free_bits_per, balance, capacity, symmetric,
    )  # fmt: skip
    _args.estimator(estimator, options)
    eps = _args.noise(noise, eps, generator, mu)
    if estimator != "analytic":
        return _kl_options.estimated(reparameterize, pair, reduction, options, estimator, eps, generator, noise)
    z = _kl_options.sampled(reparameterize, pair, eps, generator, noise)
    return z, _kl_options.kl(plain_kl, pair, reduction, options)


def packed_posterior(
    moments: Tensor,
    dim: int,
    p: Parameterization,
    prior: tuple[Tensor, Parameterization] | None,
    generator: torch.Generator | None,
    reduction: str,
    *,
    sample: bool,
    kl: bool,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """[z][kl] of a :class:`vaefast.DiagonalGaussian`; the prior is packed likewise."""
    mu, raw = moments.chunk(2, dim)
    out = []
    if sample:
        out.append(_sample(mu, raw, p, None, seed, generator))
    if kl:
        given: tuple[Tensor, ...] = ()
        if prior is not None:
            prior_mu, prior_raw = prior[0].chunk(2, dim)
            given = prior_mu, clamped(prior_raw, prior[1])
        out.append(gaussian_kl(mu, raw, *given, parameterization=p, reduction=reduction))
    return out


def multi_tensor_gaussian_kl(
    mus: Sequence[Tensor],
    raws: Sequence[Tensor],
    prior_mus: Sequence[Tensor] | None = None,
    prior_raws: Sequence[Tensor] | None = None,
    *,
    parameterization: str | Parameterization = "logvar",
    reduction: str = "batchmean",
) -> Tensor:
    """See :func:`vaefast.multi_tensor_gaussian_kl`."""
    mus, raws = _args.posteriors(mus, raws)
    p = _args.parameterization(parameterization)
    absent: list[Tensor | None] = [None] * len(mus)
    pms = _args.priors("prior_mus", prior_mus, mus) or absent
    plvs = logvars_of(_args.priors("prior_raws", prior_raws, mus), p) or absent
    _args.same_batches(mus, reduction)
    kls = [
        gaussian_kl(*each, parameterization=p, reduction=reduction)
        for each in zip(mus, raws, pms, plvs)
    ]  # fmt: skip
    return _add(kls)


def multi_tensor_sample_with_kl(
    mus: Sequence[Tensor],
    raws: Sequence[Tensor],
    prior_mu: Tensor | Real | None = 0.0,
    prior_logvar: Tensor | Real | None = 0.0,
    *,
    parameterization: str | Parameterization = "logvar",
    reduction: str = "sum",
    generator: torch.Generator | None = None,
) -> tuple[list[Tensor], Tensor]:
    """See :func:`vaefast.multi_tensor_sample_with_kl`."""
    mus, raws = _args.posteriors(mus, raws)
    p = _args.parameterization(parameterization)
    _args.same_batches(mus, reduction)
    _args.noise("philox", None, generator, mus[0], None)
    seed = draw_seed(mus[0], generator)
    samples, kls, counter = [], [], torch.zeros_like(seed)
    for mu, raw in zip(mus, raws):
        samples.append(_sample(mu, raw, p, None, seed + counter))
        counter[1] += (mu.numel() + 3) // 4  # the samples share one stream, and take whole counters of it
        kls.append(gaussian_kl(mu, raw, prior_mu, prior_logvar, parameterization=p, reduction=reduction))
    return samples, _add(kls)


def logvars_of(raws: list[Tensor], p: Parameterization) -> list[Tensor]:
    """The log variances that raws mean; raws themselves where they are that already."""
    return raws if p == _args.PLAIN["logvar"] else [_std_logvar(raw, p)[1] for raw in raws]


def _add(kls: list[Tensor]) -> Tensor:
    dtype = _compute_dtype(*kls)
    return torch.stack([kl.to(dtype) for kl in kls]).sum(0)


def reconstruction_loss(
    recon: Tensor | tuple[Tensor, ...],
    target: Tensor,
    *,
    likelihood: str | Likelihood = "bernoulli",
    reduction: str = "batchmean",
    weight: Tensor | None = None,
    overwrite_recon: bool = False,
) -> Tensor:
    """See :func:`vaefast.reconstruction_loss`; autograd keeps what it needs, and ``recon`` stays."""
    p = _args.likelihood(likelihood)
    if isinstance(target, Tensor) and not target.is_floating_point():
        target = _args.indices(target, p)
    params, target, weight = _args.reconstruction(recon, target, weight, p, entry_of(p))
    _args.flag("overwrite_recon", overwrite_recon)
    if p.name in COMPOSED:
        return _optimal.gaussian_optimal(reconstruction_loss, params, target, weight, reduction, p)
    _args.choice("reduction", reduction, _args.REDUCTIONS)
    _args.batched("recon", params[0], reduction)
    dtype = _compute_dtype(*params, target, weight)
    x, ps = target.to(dtype), [p.to(dtype) for p in params]
    narrow, nll_of = _promote(*params, target), functools.partial(LIKELIHOODS[p.name].nll, **p.options)
    shape, dim = _args.loss_shape(params[0], p)
    if weight is None:
        return _reduce(nll_of(x, *ps).expand(shape), reduction, narrow)
    w = weight.to(dtype)
    on = w != 0

    def ones(t: Tensor) -> Tensor:
        """Masked elements are evaluated at 1, so that whatever they held reaches neither the loss nor a gradient."""
        return torch.where(on.expand(shape).unsqueeze(dim) if dim and t.dim() > len(shape) else on, t, 1.0)

    return _reduce(torch.where(on, w * nll_of(ones(x), *map(ones, ps)), 0.0), reduction, narrow)


def elbo_terms(
    recon: Tensor | tuple[Tensor, ...],
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | Real | None = None,
    prior_logvar: Tensor | Real | None = None,
    *,
    likelihood: str | Likelihood = "bernoulli",
    beta: Tensor | Real = 1.0,
    parameterization: str | Parameterization = "logvar",
    reduction: str = "batchmean",
    weight: Tensor | None = None,
    free_bits: float = 0.0,
    free_bits_per: str = "dim",
    balance: float | None = None,
    capacity: Tensor | Real | None = None,
    symmetric: bool = False,
    preset: str | None = None,
    process_group: ProcessGroup | str | None = None,
    overwrite_recon: bool = False,
) -> ELBOTerms:
    """See :func:`vaefast.elbo_terms`."""
    if preset is not None:
        from . import presets  # which are made of this module's likelihoods

        return presets.elbo_terms(
            elbo_terms, preset, recon, target, mu, logvar, prior_mu, prior_logvar, weight=weight,
            likelihood=likelihood, beta=beta, parameterization=parameterization, reduction=reduction,
            free_bits=free_bits, free_bits_per=free_bits_per, balance=balance, capacity=capacity, symmetric=symmetric,
            process_group=process_group, overwrite_recon=overwrite_recon,
        )  # fmt: skip
    if process_group is not None:
        from . import distributed  # which has the KL's options, and they this module

        return distributed.elbo_terms(
            elbo_terms, gaussian_kl, process_group, recon, target, mu, logvar, prior_mu, prior_logvar, weight=weight,
            likelihood=likelihood, beta=beta, parameterization=parameterization, reduction=reduction,
            free_bits=free_bits, free_bits_per=free_bits_per, balance=balance, capacity=capacity, symmetric=symmetric,
            overwrite_recon=overwrite_recon,
        )  # fmt: skip
    _args.reduction_for_elbo(reduction)
    nll = reconstruction_loss(
        recon, target, likelihood=likelihood, reduction=reduction, weight=weight, overwrite_recon=overwrite_recon
    )
    kl = gaussian_kl(
        mu, logvar, prior_mu, prior_logvar, parameterization=parameterization, reduction=reduction,
        free_bits=free_bits, free_bits_per=free_bits_per, balance=balance, capacity=capacity, symmetric=symmetric,
    )  # fmt: skip
    _args.elbo_batch(recon if isinstance(recon, Tensor) else recon[0], mu, reduction)
    beta = _args.factor("beta", beta, mu)
    # one loss, one dtype
    dtype = torch.promote_types(nll.dtype, kl.dtype)
    nll, kl = nll.to(dtype), kl.to(dtype)
    return ELBOTerms(nll + beta * kl, nll, kl)


def elbo_loss(
    recon: Tensor | tuple[Tensor, ...],
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | Real | None = None,
    prior_logvar: Tensor | Real | None = None,
    *,
    likelihood: str | Likelihood = "bernoulli",
    beta: Tensor | Real = 1.0,
    parameterization: str | Parameterization = "logvar",
    reduction: str = "batchmean",
    weight: Tensor | None = None,
    free_bits: float = 0.0,
    free_bits_per: str = "dim",
    balance: float | None = None,
    capacity: Tensor | Real | None = None,
    symmetric: bool = False,
    preset: str | None = None,
    process_group: ProcessGroup | str | None = None,
    overwrite_recon: bool = False,
) -> Tensor:
    """See :func:`vaefast.elbo_loss`."""
    return elbo_terms(
        recon,
        target,
        mu,
        logvar,
        prior_mu,
        prior_logvar,
        likelihood=likelihood,
        beta=beta,
        parameterization=parameterization,
        reduction=reduction,
        weight=weight,
        free_bits=free_bits,
        free_bits_per=free_bits_per,
        balance=balance,
        capacity=capacity,
        symmetric=symmetric,
        preset=preset,
        process_group=process_group,
        overwrite_recon=overwrite_recon,
    ).loss
