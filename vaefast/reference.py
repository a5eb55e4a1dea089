"""Pure-PyTorch versions of the public functions: the fallback, the oracle of the tests, and the path for what the
kernels do not cover (double backward, torch.func, forward-mode AD).

Two registries are the Python side of ``csrc/likelihoods.h`` and ``csrc/posterior.h``: ``LIKELIHOODS`` and
``PARAMETERIZATIONS``. An entry here and a struct there is all that a new one takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributions as D
from torch.nn import functional as F

from . import _args, _kl_options
from ._args import Parameterization, Real
from ._kl_options import Pair
from ._philox import draw_seed, normal

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


@dataclass(frozen=True)
class Likelihood:
    """A likelihood p(x | params), elementwise.

    ``nll(x, *params)`` is -log p in nats; the first ``required`` params must be given. ``support`` is where x lives
    ("unit" for [0, 1], "real"), ``formula`` goes to the tables, ``distribution(*params)`` is the torch.distributions
    object that the tests hold it against.
    """

    params: tuple[str, ...]
    required: int
    support: str
    formula: str
    nll: Callable[..., Tensor]
    distribution: Callable[..., D.Distribution]


def _bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    # softplus(l) - l x from the side where nothing cancels; no |l|, whose gradient is lost at 0
    return torch.where(logits > 0, logits * (1 - x) + F.softplus(-logits), F.softplus(logits) - logits * x)


def _gaussian(x: Tensor, mean: Tensor, logvar: Tensor | None = None) -> Tensor:
    if logvar is None:
        return 0.5 * (math.log(2 * math.pi) + (x - mean) ** 2)
    return 0.5 * (math.log(2 * math.pi) + logvar + (x - mean) ** 2 * torch.exp(-logvar))


def _laplace(x: Tensor, loc: Tensor, log_scale: Tensor | None = None) -> Tensor:
    if log_scale is None:
        return math.log(2) + (x - loc).abs()
    return math.log(2) + log_scale + (x - loc).abs() * torch.exp(-log_scale)


LIKELIHOODS: dict[str, Likelihood] = {
    "bernoulli": Likelihood(
        ("logits",),
        1,
        "unit",
        "softplus(l) - l x",
        _bernoulli,
        lambda logits: D.Bernoulli(logits=logits, validate_args=False),
    ),
    "gaussian": Likelihood(
        ("mean", "logvar"),
        1,
        "real",
        "(log 2 pi + lv + (x - m)^2 e^-lv) / 2",
        _gaussian,
        lambda mean, logvar=None: D.Normal(mean, 1.0 if logvar is None else torch.exp(0.5 * logvar)),
    ),
    "laplace": Likelihood(
        ("loc", "log_scale"),
        1,
        "real",
        "log 2 + ls + |x - m| e^-ls",
        _laplace,
        lambda loc, log_scale=None: D.Laplace(loc, 1.0 if log_scale is None else torch.exp(log_scale)),
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


def _std_logvar(raw: Tensor, p: Parameterization) -> tuple[Tensor, Tensor]:
    if p.clamp is not None:
        lo, hi = p.clamp
        # not torch.clamp, whose gradient on the edges depends on torch's version
        raw = torch.where((raw <= lo) | (raw >= hi), raw.detach().clamp(lo, hi), raw)
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
    generator: torch.Generator | None = None,
    noise: str = "philox",
    num_samples: int | None = None,
) -> Tensor:
    """See :func:`vaefast.reparameterize`."""
    mu, logvar = _args.posterior(mu, logvar)
    if num_samples is not None:
        mu, logvar = _args.samples(mu, logvar, num_samples)
    p = _args.parameterization(parameterization)
    eps = _args.noise(noise, eps, generator, mu)
    return _sample(mu, logvar, p, eps, None, generator, noise)


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
    generator: torch.Generator | None = None,
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
    z = reparameterize(mu, logvar, parameterization=pair.p, eps=eps, generator=generator, noise=noise)
    return z, _kl_options.kl(plain_kl, pair, reduction, options)


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
    _args.noise("philox", None, generator, mus[0])
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
    likelihood: str = "bernoulli",
    reduction: str = "batchmean",
    weight: Tensor | None = None,
) -> Tensor:
    """See :func:`vaefast.reconstruction_loss`."""
    params, target, weight = _args.reconstruction(recon, target, weight, likelihood, LIKELIHOODS)
    _args.choice("reduction", reduction, _args.REDUCTIONS)
    _args.batched("recon", params[0], reduction)
    dtype = _compute_dtype(*params, target, weight)
    x, ps = target.to(dtype), [p.to(dtype) for p in params]
    narrow = _promote(*params, target)
    if weight is None:
        return _reduce(LIKELIHOODS[likelihood].nll(x, *ps).expand_as(x), reduction, narrow)
    w = weight.to(dtype)
    on = w != 0
    # masked elements are evaluated at 1, so that whatever they held reaches neither the loss nor a gradient
    nll = LIKELIHOODS[likelihood].nll(torch.where(on, x, 1.0), *(torch.where(on, p, 1.0) for p in ps))
    return _reduce(torch.where(on, w * nll, 0.0), reduction, narrow)


def elbo_terms(
    recon: Tensor | tuple[Tensor, ...],
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | Real | None = None,
    prior_logvar: Tensor | Real | None = None,
    *,
    likelihood: str = "bernoulli",
    beta: Tensor | Real = 1.0,
    parameterization: str | Parameterization = "logvar",
    reduction: str = "batchmean",
    weight: Tensor | None = None,
    free_bits: float = 0.0,
    free_bits_per: str = "dim",
    balance: float | None = None,
    capacity: Tensor | Real | None = None,
    symmetric: bool = False,
) -> ELBOTerms:
    """See :func:`vaefast.elbo_terms`."""
    _args.reduction_for_elbo(reduction)
    nll = reconstruction_loss(recon, target, likelihood=likelihood, reduction=reduction, weight=weight)
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
    likelihood: str = "bernoulli",
    beta: Tensor | Real = 1.0,
    parameterization: str | Parameterization = "logvar",
    reduction: str = "batchmean",
    weight: Tensor | None = None,
    free_bits: float = 0.0,
    free_bits_per: str = "dim",
    balance: float | None = None,
    capacity: Tensor | Real | None = None,
    symmetric: bool = False,
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
    ).loss
