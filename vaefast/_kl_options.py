"""The KL's options, composed of plain KLs and samples: one place for the kernels' path and the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _args, reference
from ._args import KLOptions, Parameterization
from ._generators import Generators

Prior = Tensor | float | None


class Pair(NamedTuple):
    """q and p, between which a KL is taken."""

    mu: Tensor
    raw: Tensor
    prior_mu: Prior
    prior_logvar: Prior
    p: Parameterization


# KL(q || p) with a reduction and a balance, and no other option
Plain = Callable[[Pair, str, float | None], Tensor]


def checked(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Prior,
    prior_logvar: Prior,
    parameterization: str | Parameterization,
    reduction: str,
    *options: Any,
) -> tuple[Pair, KLOptions]:
    """The arguments of a KL and its options (:class:`KLOptions`' five), or an error that says what is wrong."""
    mu, logvar = _args.posterior(mu, logvar)
    p = _args.parameterization(parameterization)
    pm, plv = _args.prior("prior_mu", prior_mu, mu), _args.prior("prior_logvar", prior_logvar, mu)
    _args.choice("reduction", reduction, _args.REDUCTIONS)
    _args.batched("mu", mu, reduction)
    found = _args.kl_options(reduction, *options)
    _args.kl_tensors(found, mu, pm, plv)
    return Pair(mu, logvar, pm, plv, p), found


def kl(plain: Plain, pair: Pair, reduction: str, o: KLOptions) -> Tensor:
    """KL(q || p) with the options."""
    first = begin(pair, reduction, o)
    return finish(plain(*first, o.balance), plain, pair, reduction, o)


def begin(pair: Pair, reduction: str, o: KLOptions) -> tuple[Pair, str]:
    """Of what the options begin with: a plain KL, reduced as far as they allow."""
    if not o.free_bits:
        return pair, reduction
    inner = "per_sample" if o.free_bits_per == "sample" else "none"
    return (pair if inner == reduction else pair._replace(mu=wide(pair.mu))), inner


def wide(mu: Tensor) -> Tensor:
    """For an elementwise KL that is yet to be added up: in mu's half precision it would lose digits."""
    return mu.float() if mu.dtype in (torch.float16, torch.bfloat16) else mu


def finish(kl: Tensor, plain: Plain, pair: Pair, reduction: str, o: KLOptions) -> Tensor:
    """The KL with the options, from the plain one that they begin with."""
    if o.symmetric:
        kl = (kl + _reverse(plain, pair, begin(pair, reduction, o)[1], o.balance)).to(kl.dtype)
    return _bounded(kl, pair.mu, reduction, o)


def _reverse(plain: Plain, pair: Pair, reduction: str, balance: float | None) -> Tensor:
    """KL(p || q): exact next to p = q and not negative, as KL(q || p) is, and so is their sum."""
    dtype = reference._compute_dtype(*pair[:4])
    like = pair.mu.to(dtype)
    of_p = [reference._wide(t, like).expand(like.shape) for t in (pair.prior_mu, pair.prior_logvar)]
    of_q = pair.mu, reference._std_logvar(pair.raw.to(dtype), pair.p)[1]
    swapped = Pair(of_p[0], of_p[1], *of_q, _args.PLAIN["logvar"])
    return plain(swapped, reduction, None if balance is None else 1 - balance)


def _bounded(kl: Tensor, mu: Tensor, reduction: str, o: KLOptions) -> Tensor:
    """Free bits or the capacity, and what is left of the reduction."""
    if o.free_bits and o.free_bits_per == "batch_dim":
        # sums over the batch, against B times the floor: those of an empty batch are 0
        total = _floored(kl.sum(0), o.free_bits * mu.shape[0]).sum()
        return total if reduction == "sum" else total / mu.shape[0]
    if o.free_bits:
        return reference._reduce(_floored(kl, o.free_bits), reduction, kl.dtype)
    if o.capacity is None:
        return kl
    capacity = o.capacity.to(kl.dtype) if isinstance(o.capacity, Tensor) else o.capacity
    return (kl - (capacity * mu.shape[0] if reduction == "sum" else capacity)).abs()


def _floored(kl: Tensor, floor: float) -> Tensor:
    """max(floor, kl), without gradient where kl <= floor; a NaN stays one."""
    return torch.where(kl <= floor, floor, kl)


def balanced(alpha: float | None, kl: Callable[..., Tensor], q: Sequence[Tensor], p: Sequence[Prior]) -> Tensor:
    """alpha KL(sg(q) || p) + (1 - alpha) KL(q || sg(p)); Hafner et al. 2021 (arXiv:2010.02193), algorithm 2."""
    if alpha is None:
        return kl(*q, *p)
    fixed_q, fixed_p = ([t.detach() if isinstance(t, Tensor) else t for t in ts] for ts in (q, p))
    return alpha * kl(*fixed_q, *p) + (1 - alpha) * kl(*q, *fixed_p)


def sampled(
    reparameterize: Callable[..., Tensor], pair: Pair, eps: Tensor | None, generator: Generators, noise: str
) -> Tensor:
    """The sample that one pass with the KL draws, by itself: in float64 where the prior alone asks for that."""
    mu = pair.mu
    if (eps is not None or noise == "philox") and reference._compute_dtype(*pair[:4]) == torch.float64:
        mu = mu.double()
    z = reparameterize(mu, pair.raw, parameterization=pair.p, eps=eps, generator=generator, noise=noise)
    return z.to(pair.mu.dtype)


def estimated(
    reparameterize: Callable[..., Tensor],
    pair: Pair,
    reduction: str,
    o: KLOptions,
    estimator: str,
    eps: Tensor | None,
    generator: Generators,
    noise: str,
) -> tuple[Tensor, Tensor]:
    """A sample z, and in the KL's place log q(z) - log p(z), with the options."""
    mu, raw, pm, plv, p = pair
    dtype = reference._compute_dtype(mu, raw, pm, plv, eps)
    if eps is None:
        # the noise that the sample alone would have had: in mu's memory order and, drawn by torch, of mu's dtype
        zero = torch.zeros_like(mu, dtype=mu.dtype if noise == "torch" else dtype)
        eps = reparameterize(zero, zero, generator=generator, noise=noise)
    z = reparameterize(mu.to(dtype), raw.to(dtype), parameterization=p, eps=eps)
    scale = reference._std_logvar(raw.to(dtype), p)
    e = eps.to(dtype)

    def log_ratio(z: Tensor, std: Tensor, logvar: Tensor, pm: Prior, plv: Prior) -> Tensor:
        pm, plv = reference._wide(pm, z), reference._wide(plv, z)
        standard = e
        if estimator == "stl":
            # q's parameters stand still, and z alone moves: (z - mu) / std, which is eps, by dz / std
            standard, logvar = e + (z - z.detach()) / std.detach(), logvar.detach()
        return 0.5 * (((z - pm) * torch.exp(-0.5 * plv)) ** 2 - standard * standard + (plv - logvar))

    kl = balanced(o.balance, log_ratio, (z, *scale), (pm, plv))
    inner = begin(pair, reduction, o)[1]
    narrow = reference._promote(mu, raw, pm, plv) if inner == reduction else dtype
    return z.to(mu.dtype), _bounded(reference._reduce(kl, inner, narrow), mu, reduction, o)
