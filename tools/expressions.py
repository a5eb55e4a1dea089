"""What tools/accuracy.py holds vaefast's functions against: PyTorch's own expressions, as people write them, and the
formulas in 50 digits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import mpmath
import torch
from mpmath import mpf
from torch import Tensor
from torch import distributions as D
from torch.nn import functional as F

from benchmarks import likelihoods as projects

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import exact

Call = Callable[..., Tensor]
Numbers = list[mpf]  # one site's, of one tensor


# ---- PyTorch's own, of (*recon, x)


def log_prob(distribution: Callable[..., D.Distribution]) -> Call:
    def nll(*tensors: Tensor) -> Tensor:
        *recon, x = tensors
        found: Tensor = distribution(*recon).log_prob(x)
        return -found

    return nll


def data_first(nll: Call) -> Call:
    """A formula of (x, *recon)."""
    return lambda *tensors: nll(tensors[-1], *tensors[:-1])


def bernoulli_probs(probs: Tensor, x: Tensor) -> Tensor:
    return F.binary_cross_entropy(probs, x, reduction="none")


def bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none")


def gamma(log_mean: Tensor, a: Tensor) -> D.Distribution:
    return D.Gamma(a, a * torch.exp(-log_mean), validate_args=False)


def log_normal(loc: Tensor, log_scale: Tensor) -> D.Distribution:
    return D.LogNormal(loc, log_scale.exp(), validate_args=False)


def with_zeros(distribution: Callable[..., D.Distribution]) -> Call:
    """A mass at 0 and a density above it."""

    def nll(*tensors: Tensor) -> Tensor:
        *recon, pi, x = tensors
        density = distribution(*recon).log_prob(torch.where(x > 0, x, torch.ones_like(x)))
        return torch.where(x > 0, F.softplus(pi) - density, F.softplus(-pi))

    return nll


def negative_binomial_mixture(mu1: Tensor, mu2: Tensor, theta: Tensor, logits: Tensor, x: Tensor) -> Tensor:
    """scvi-tools' log_mixture_nb of one inverse dispersion, its terms from its log_nb_positive."""
    first, second = (-projects.negative_binomial(x, mu, theta) for mu in (mu1, mu2))
    return -torch.logaddexp(first - F.softplus(-logits), second - F.softplus(-logits) - logits)


def beta_binomial(a: Tensor, b: Tensor, n: Tensor, x: Tensor) -> Tensor:
    """Pyro's BetaBinomial."""

    def log_beta(p: Tensor, q: Tensor) -> Tensor:
        return torch.lgamma(p) + torch.lgamma(q) - torch.lgamma(p + q)

    choose = torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)
    return log_beta(a, b) - log_beta(x + a, n - x + b) - choose


NLL: dict[str, Call] = {
    "bernoulli": bernoulli,
    "bernoulli_probs": bernoulli_probs,
    "continuous_bernoulli": log_prob(lambda logits: D.ContinuousBernoulli(logits=logits, validate_args=False)),
    "gaussian": log_prob(
        lambda mean, logvar=None: D.Normal(mean, 1.0 if logvar is None else (0.5 * logvar).exp(), validate_args=False)
    ),
    "laplace": log_prob(
        lambda loc, log_scale=None: D.Laplace(loc, 1.0 if log_scale is None else log_scale.exp(), validate_args=False)
    ),
    "student_t": log_prob(lambda loc, log_scale, df: D.StudentT(df, loc, log_scale.exp(), validate_args=False)),
    "log_normal": log_prob(log_normal),
    "gamma": log_prob(gamma),
    "zero_inflated_log_normal": with_zeros(log_normal),
    "zero_inflated_gamma": with_zeros(gamma),
    "poisson": log_prob(lambda log_rate: D.Poisson(log_rate.exp(), validate_args=False)),
    "negative_binomial": data_first(projects.negative_binomial),
    "zero_inflated_negative_binomial": data_first(projects.zero_inflated),
    "negative_binomial_mixture": negative_binomial_mixture,
    "beta_binomial": beta_binomial,
    "discretized_logistic": data_first(projects.discretized),
    "categorical": lambda logits, x: F.cross_entropy(logits, x.long(), reduction="none"),
    "discretized_logistic_mixture": data_first(projects.mixture),
}


def textbook_kl(mu: Tensor, logvar: Tensor, *prior: Tensor) -> Tensor:
    if not prior:
        return -0.5 * (1 + logvar - mu**2 - logvar.exp())
    prior_mu, prior_logvar = prior
    return -0.5 * (1 + logvar - prior_logvar - ((mu - prior_mu) ** 2 + logvar.exp()) / prior_logvar.exp())


def torch_kl(mu: Tensor, std: Tensor) -> Tensor:
    standard = D.Normal(torch.zeros_like(mu), torch.ones_like(mu), validate_args=False)
    return D.kl_divergence(D.Normal(mu, std, validate_args=False), standard)


# of (mu, raw): where there is a log variance the textbook's, else torch.distributions' of the standard deviation
KL: dict[str, Call] = {
    "logvar": textbook_kl,
    "log_std": lambda mu, raw: textbook_kl(mu, 2 * raw),
    "std": torch_kl,
    "var": lambda mu, raw: textbook_kl(mu, raw.log()),
    "softplus": lambda mu, raw: torch_kl(mu, F.softplus(raw)),
}
STD: dict[str, Call] = {
    "logvar": lambda raw: torch.exp(0.5 * raw),
    "log_std": torch.exp,
    "std": lambda raw: raw,
    "var": torch.sqrt,
    "softplus": F.softplus,
}


def categorical_kl(logits: Tensor, prior_logits: Tensor) -> Tensor:
    q, p = D.Categorical(logits=logits, validate_args=False), D.Categorical(logits=prior_logits, validate_args=False)
    return D.kl_divergence(q, p)


def mixture_log_prob(z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor) -> Tensor:
    components = D.Independent(D.Normal(mus, (0.5 * logvars).exp(), validate_args=False), 1)
    mixture = D.MixtureSameFamily(D.Categorical(logits=logits, validate_args=False), components, validate_args=False)
    found: Tensor = mixture.log_prob(z)
    return found


# ---- 50 digits, of one site's numbers


def scalars(f: Callable[..., mpf], **options: float) -> Callable[..., mpf]:
    """Of tensors that have one number a site: (*recon, x) to (x, *recon)."""

    def of(*lists: Numbers) -> mpf:
        *recon, x = (numbers[0] for numbers in lists)
        return f(x, *recon, **options)

    return of


def planes(f: Callable[..., mpf], **options: float) -> Callable[..., mpf]:
    return lambda recon, x: f(x, recon, **options)


def _log1p_exp(x: mpf) -> mpf:
    return mpmath.log1p(mpmath.exp(x))


def _gaussian(x: mpf, mean: mpf, logvar: mpf | int = 0, constant: float = True) -> mpf:
    return (mpmath.log(2 * mpmath.pi) * bool(constant) + logvar + (x - mean) ** 2 * mpmath.exp(-logvar)) / 2


def _laplace(x: mpf, loc: mpf, log_scale: mpf | int = 0, constant: float = True) -> mpf:
    return mpmath.log(2) * bool(constant) + log_scale + abs(x - loc) * mpmath.exp(-log_scale)


def digits_of(likelihood: str, options: dict[str, float]) -> Callable[..., mpf]:
    if likelihood in exact.MIXTURES:
        return planes(exact.MIXTURES[likelihood], **{k: v for k, v in options.items() if k != "dim"})
    simple = {"bernoulli": lambda x, logit: _log1p_exp(logit) - logit * x, "gaussian": _gaussian, "laplace": _laplace}
    return scalars({**exact.NLL, **simple}[likelihood], **options)


LOGVAR_DIGITS: dict[str, Callable[[mpf], mpf]] = {
    "logvar": lambda raw: raw,
    "log_std": lambda raw: 2 * raw,
    "std": lambda raw: 2 * mpmath.log(raw),
    "var": mpmath.log,
    "softplus": lambda raw: 2 * mpmath.log(_log1p_exp(raw)),
}


def kl_digits(parameterization: str) -> Callable[..., mpf]:
    def of(mu: Numbers, raw: Numbers, *prior: Numbers) -> mpf:
        lv = LOGVAR_DIGITS[parameterization](raw[0])
        pm, plv = (numbers[0] for numbers in prior) if prior else (mpf(0), mpf(0))
        d = lv - plv
        return (mpmath.exp(d) - 1 - d + (mu[0] - pm) ** 2 * mpmath.exp(-plv)) / 2

    return of


def sample_digits(parameterization: str) -> Callable[..., mpf]:
    return lambda mu, raw, eps: mu[0] + mpmath.exp(LOGVAR_DIGITS[parameterization](raw[0]) / 2) * eps[0]


def _log_softmax(logits: Sequence[mpf]) -> list[mpf]:
    total = mpmath.log(sum(mpmath.exp(x) for x in logits))
    return [x - total for x in logits]


def categorical_kl_digits(logits: Numbers, prior_logits: Numbers) -> mpf:
    q, p = _log_softmax(logits), _log_softmax(prior_logits)
    return sum((mpmath.exp(a) * (a - b) for a, b in zip(q, p)), mpf(0))


def mixture_digits(z: Numbers, mus: Numbers, logvars: Numbers, logits: Numbers) -> mpf:
    """mus and logvars are [K, D], one after the other."""
    d = len(z)
    terms = [
        log_weight - sum((_gaussian(z[i], mus[k * d + i], logvars[k * d + i]) for i in range(d)), mpf(0))
        for k, log_weight in enumerate(_log_softmax(logits))
    ]
    return mpmath.log(sum(mpmath.exp(t) for t in terms))
