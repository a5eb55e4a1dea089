"""The engine in PyTorch: the fallback, and the path for what the kernels do not cover (double backward, torch.func,
forward-mode AD). Its functions are the primitives of ``_engine.Engine``."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _gaussian
from ._arguments import loss_shape
from ._checks import wrapped
from ._engine import Moments, Pair, Posteriors, Reconstruction
from ._gaussian import Prior, balanced, compute_dtype, logvar_of, promoted, reduced, std_of
from ._options import ELBOTerms, Parameterization
from ._philox import normal, take_counters
from .likelihoods import LIKELIHOODS


def sample(
    mu: Tensor,
    raw: Tensor,
    p: Parameterization,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Computed in ``dtype``, where more decides on it than is given here; ``seed`` is one that was drawn before."""
    dtype = dtype or compute_dtype(mu, raw, eps)
    if eps is None and wrapped(mu):
        eps = torch.randn_like(mu, dtype=dtype)  # which knows the noise of tensors that are made of others
    elif eps is None:
        eps = normal(take_counters(mu, mu.numel(), generator) if seed is None else seed, mu, dtype)
    return (mu.to(dtype) + std_of(raw.to(dtype), p.spec) * eps.to(dtype)).to(mu.dtype)


def kl(pair: Pair, reduction: str, balance: float | None) -> Tensor:
    mu, raw, *prior, p = pair
    dtype = compute_dtype(mu, raw, *prior)
    each = functools.partial(_gaussian.kl, p.spec)
    found = balanced(balance, each, (mu.to(dtype), raw.to(dtype)), prior)
    return reduced(found, reduction, promoted(mu, raw, *prior))


def sample_with_kl(
    pair: Pair, reduction: str, balance: float | None, eps: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    # one pass has one dtype: a prior in float64 asks for a sample in float64
    dtype = compute_dtype(*pair[:4], eps)
    return sample(pair.mu, pair.raw, pair.p, eps, generator, dtype=dtype), kl(pair, reduction, balance)


def nll(of: Reconstruction, reduction: str) -> Tensor:
    """Autograd keeps what it needs, so that nothing is overwritten."""
    params, target, weight, likelihood, _ = of
    dtype = compute_dtype(*params, target, weight)
    x, ps = target.to(dtype), [p.to(dtype) for p in params]
    narrow, each = promoted(*params, target), LIKELIHOODS[likelihood.name].nll
    shape, dim = loss_shape(params[0], likelihood)
    if weight is None:
        return reduced(each(x, *ps, **likelihood.options).expand(shape), reduction, narrow)
    w = weight.to(dtype)
    on = w != 0

    def ones(t: Tensor) -> Tensor:
        """Masked elements are evaluated at 1, so that whatever they held reaches neither the loss nor a gradient."""
        return torch.where(on.expand(shape).unsqueeze(dim) if dim and t.dim() > len(shape) else on, t, 1.0)

    values = each(ones(x), *map(ones, ps), **likelihood.options)
    return reduced(torch.where(on, w * values, 0.0), reduction, narrow)


def elbo(of: Reconstruction, pair: Pair, beta: float, reduction: str, balance: float | None) -> ELBOTerms:
    return ELBOTerms.of(nll(of, reduction), kl(pair, reduction, balance), beta)


def multi_kl(many: Posteriors, reduction: str) -> Tensor:
    count = len(many.mus)
    pms: Sequence[Prior] = many.prior_mus or [many.prior_mu or None] * count
    plvs: Sequence[Prior] = many.prior_logvars or [many.prior_logvar or None] * count
    kls = [kl(Pair(*each, many.p), reduction, None) for each in zip(many.mus, many.raws, pms, plvs)]
    dtype = compute_dtype(*kls)
    return torch.stack([each.to(dtype) for each in kls]).sum(0)


def multi_sample_with_kl(
    many: Posteriors, reduction: str, generator: torch.Generator | None
) -> tuple[list[Tensor], Tensor]:
    if any(map(wrapped, many.mus)):
        return [sample(mu, raw, many.p, None, None) for mu, raw in zip(many.mus, many.raws)], multi_kl(many, reduction)
    words = sum((mu.numel() + 3) // 4 * 4 for mu in many.mus)
    seed = take_counters(many.mus[0], words, generator)
    samples, counter = [], torch.zeros_like(seed)
    for mu, raw in zip(many.mus, many.raws):
        samples.append(sample(mu, raw, many.p, None, None, seed + counter))
        counter[1] += (mu.numel() + 3) // 4  # the samples share one stream, and take whole counters of it
    return samples, multi_kl(many, reduction)


def packed(
    of: Moments,
    reduction: str,
    generator: torch.Generator | None,
    with_sample: bool,
    with_kl: bool,
    seed: Tensor | None = None,
) -> list[Tensor]:
    mu, raw = of.moments.chunk(2, of.dim)
    out = []
    if with_sample:
        out.append(sample(mu, raw, of.p, None, generator, seed))
    if with_kl:
        prior: tuple[Prior, Prior] = (None, None)
        if of.prior is not None:
            moments, p = of.prior
            prior_mu, prior_raw = moments.chunk(2, of.dim)
            prior = prior_mu, logvar_of(prior_raw, p.spec)
        out.append(kl(Pair(mu, raw, *prior, of.p), reduction, None))
    return out
