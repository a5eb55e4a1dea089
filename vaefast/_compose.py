"""The one composition: every option that is no primitive of an engine, made of primitives, over whichever engine.

What is reduced over the batch goes by a ``Mean``, so that the batch may be spread over processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ._batch import Batch
from ._best_variance import SQUARES, gaussian_optimal
from ._checks import wrapped
from ._engine import Engine, Engines, Moments, Pair, Posteriors, Reconstruction
from ._gaussian import Prior, as_tensor, balanced, compute_dtype, logvar_of, promoted, reduced, std_of
from ._generators import Generators, each_its_own, torch_noise
from ._options import PLAIN, ELBOTerms, KLOptions, LogProb, Parameterization
from ._philox import philox_noise
from .likelihoods import COMPOSED

LOG_2PI = math.log(2 * math.pi)


class Mean(Protocol):
    """What ``"batchmean"`` is the mean over, if that is more than the batch of the call. Results are this process's
    share in it."""

    def reduction(self, batch: int, /) -> str:
        """How terms are reduced, of which :meth:`share` makes the share."""

    def share(self, term: Tensor, /) -> Tensor: ...

    def floored(self, sums: Tensor, floor: float, batch: int, reduction: str, /) -> Tensor:
        """The sum of ``max(floor, mean)``, from sums over the batch."""

    def distance(self, share: Tensor, capacity: Tensor | float, batch: int, reduction: str, /) -> Tensor:
        """``|mean - capacity|``, without gradient where it is 0."""


class Local:
    """The batch of the call, or its sum: what the two that bend a mean come to without a ``Mean``."""

    def floored(self, sums: Tensor, floor: float, batch: int, reduction: str) -> Tensor:
        # sums against B times the floor: those of an empty batch are 0
        floor *= batch
        total = torch.where(sums <= floor, floor, sums).sum()
        return total if reduction == "sum" else total / batch

    def distance(self, share: Tensor, capacity: Tensor | float, batch: int, reduction: str) -> Tensor:
        return (share - (capacity * batch if reduction == "sum" else capacity)).abs()


LOCAL = Local()


# ---- samples


def sample(
    engines: Engines,
    mu: Tensor,
    raw: Tensor,
    p: Parameterization,
    eps: Tensor | None,
    generator: Generators,
    noise: str | None,
    dim: int = 0,
) -> Tensor:
    """``dim`` is the batch, along which a list of generators has one for each sample."""

    def draw(mu: Tensor, raw: Tensor, own: torch.Generator | None) -> Tensor:
        engine = engines.engine(mu, eps, beside=(raw,))
        return engine.sample(mu, raw, p, *drawn(engine, mu, compute_dtype(mu, raw), eps, own, noise))

    if isinstance(generator, Sequence):
        return each_its_own(draw, (mu, raw), generator, dim)
    return draw(mu, raw, generator)


def tempered(
    engines: Engines,
    mu: Tensor,
    raw: Tensor,
    p: Parameterization,
    temperature: float,
    eps: Tensor | None,
    generator: Generators,
    noise: str | None,
    dim: int = 0,
) -> Tensor:
    """A sample of the standard deviation times the temperature, with the noise of :func:`sample`: what it draws of a
    mean of 0, in mu's memory order and, drawn by torch, of mu's dtype."""
    torchs = eps is None and (noise or engines.engine(mu, eps, beside=(raw,)).noise) == "torch"
    zero = torch.zeros_like(mu, dtype=mu.dtype if torchs else compute_dtype(mu, raw, eps))
    off = sample(engines, zero, raw, p, eps, generator, noise, dim)
    return torch.add(mu.to(off.dtype), off, alpha=temperature).to(mu.dtype)


def drawn(
    engine: Engine,
    mu: Tensor,
    dtype: torch.dtype,
    eps: Tensor | None,
    generator: torch.Generator | None,
    noise: str | None,
) -> tuple[Tensor | None, torch.Generator | None]:
    """Noise of another stream than the engine draws of itself, or the generator of which it does; ``dtype`` is what
    kernels would draw in."""
    if eps is not None or noise is None or noise == engine.noise:
        return eps, generator
    if noise == "philox" and not wrapped(mu):
        return philox_noise(mu, dtype, generator), None
    return torch_noise(mu, generator), None


def sample_with_kl(
    engine: Engine, pair: Pair, reduction: str, o: KLOptions, eps: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """In one pass, as far as the options allow."""
    if o.batch_dims != 1:
        batch = Batch(pair.mu, o.batch_dims, engine.noise)
        if eps is None and batch.reorders(pair.mu):
            return sample_and_kl(engine, pair, reduction, o, eps, generator)
        flat = batch.pair(pair), reduction, batch.options(o, pair.mu), batch.flat(eps, pair.mu)
        z, found = sample_with_kl(engine, *flat, generator)
        return batch.restored(z), batch.restored(found, reduction)
    if o.kl_weight is not None:
        # what the weight hides of the KL is in the sample all the same
        return sample_and_kl(engine, pair, reduction, o, eps, generator)
    begun, inner = begin(pair, reduction, o)
    if eps is None and engine.noise == "torch" and begun.mu is not pair.mu:
        eps, generator = torch_noise(pair.mu, generator), None  # which PyTorch draws otherwise for another dtype
    z, found = engine.sample_with_kl(begun, inner, o.balance, eps, generator)
    return z.to(pair.mu.dtype), finish(engine, found, pair, begun, inner, reduction, o)


def sample_and_kl(
    engine: Engine, pair: Pair, reduction: str, o: KLOptions, eps: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """In two passes."""
    z = engine.sample(mu_of_one_pass(pair, engine.noise, eps), pair.raw, pair.p, eps, generator)
    return z.to(pair.mu.dtype), kl(engine, pair, reduction, o)


def mu_of_one_pass(pair: Pair, noise: str, eps: Tensor | None) -> Tensor:
    """mu, in the dtype in which one pass for sample and KL would draw: float64 where the prior alone asks for that."""
    wide = noise == "philox" and compute_dtype(*pair[:4], eps) == torch.float64
    return pair.mu.double() if wide else pair.mu


def each_sample_with_kl(
    engines: Engines, pair: Pair, reduction: str, o: KLOptions, generator: Sequence[torch.Generator], noise: str | None
) -> tuple[Tensor, Tensor]:
    """Of a generator for each sample."""
    mu = mu_of_one_pass(pair, noise or engines.engine(pair.mu).noise, None)
    z = sample(engines, mu, pair.raw, pair.p, None, generator, noise)
    return z.to(pair.mu.dtype), kl(engines.engine(pair.mu, beside=pair[1:4]), pair, reduction, o)


def estimated(
    engines: Engines,
    pair: Pair,
    reduction: str,
    o: KLOptions,
    estimator: str,
    eps: Tensor | None,
    generator: Generators,
    noise: str | None,
) -> tuple[Tensor, Tensor]:
    """A sample z, and in the KL's place log q(z) - log p(z), with the options."""
    mu = pair.mu
    dtype = compute_dtype(*pair[:4], eps)
    if eps is None:
        zero = unscaled(mu, dtype, noise or engines.engine(mu).noise)
        eps = sample(engines, zero, zero, PLAIN["logvar"], None, generator, noise)

    def draw(mu: Tensor, raw: Tensor) -> Tensor:
        return sample(engines, mu.to(dtype), raw.to(dtype), pair.p, eps, None, noise)

    return at_sample(draw, eps, pair, reduction, o, estimator)


def unscaled(mu: Tensor, dtype: torch.dtype, noise: str) -> Tensor:
    """What is moved and scaled to the noise that the sample alone would have had: in mu's memory order and, drawn by
    torch, of mu's dtype."""
    return torch.zeros_like(mu, dtype=mu.dtype if noise == "torch" else dtype)


def at_sample(
    draw: Callable[[Tensor, Tensor], Tensor],
    eps: Tensor,
    pair: Pair,
    reduction: str,
    o: KLOptions,
    estimator: str,
    mean: Mean | None = None,
) -> tuple[Tensor, Tensor]:
    """The sample that is drawn of mu and raw with that noise, and the KL estimated there."""
    mu, raw, p = pair.mu, pair.raw, pair.p
    dtype = compute_dtype(*pair[:4], eps)
    z = draw(mu, raw)
    drawn_z = z.to(mu.dtype)
    begun, inner = begin(pair, reduction, o)
    if o.kl_weight is not None:
        mu, raw, *_ = begun
        z = draw(mu, raw)
    pm, plv = begun.prior_mu, begun.prior_logvar
    scale = std_of(raw.to(dtype), p.spec), logvar_of(raw.to(dtype), p.spec)
    e = eps.to(dtype)

    def log_ratio(z: Tensor, std: Tensor, logvar: Tensor, pm: Prior, plv: Prior) -> Tensor:
        standard = e
        if estimator == "stl":
            # q's parameters stand still, and z alone moves: (z - mu) / std, which is eps, by dz / std
            standard, logvar = e + (z - z.detach()) / std.detach(), logvar.detach()
        if o.prior is not None:
            return -0.5 * (standard * standard + (logvar + LOG_2PI)).sum(-1) - log_density(o.prior, z)
        pm, plv = as_tensor(pm, z), as_tensor(plv, z)
        return 0.5 * (((z - pm) * torch.exp(-0.5 * plv)) ** 2 - standard * standard + (plv - logvar))

    found = balanced(o.balance, log_ratio, (z, *scale), (pm, plv))
    batch = None
    if o.batch_dims != 1:
        batch = Batch(pair.mu, o.batch_dims)
        found, o, mu = batch.flat(found, found), batch.options(o, mu), batch.flat(mu, mu)
    found = reduced(found, inner, promoted(*pair[:4]) if inner == reduction else dtype)
    if o.kl_weight is not None:
        weight = o.kl_weight if o.prior is None or not o.kl_weight.dim() else o.kl_weight.squeeze(-1)
        found = weighted(found, weight, reduction, o)
    found = bounded(found, mu, reduction, o, mean)
    return drawn_z, found if batch is None else batch.restored(found, reduction)


def log_density(prior: LogProb, z: Tensor) -> Tensor:
    """One of each sample, as has to be."""
    found = prior.log_prob(z)
    if not isinstance(found, Tensor) or found.shape != z.shape[:-1]:
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"prior.log_prob gave {what} for z of shape {tuple(z.shape)}; it must give one log density for each sample "
            f"along the last dimension, {tuple(z.shape[:-1])}"
        )
    return found


def to_prior(engine: Engine, pair: Pair, reduction: str, o: KLOptions, mean: Mean | None) -> Tensor:
    """The KL to a prior that is no Gaussian, at a sample drawn for it."""
    dtype = compute_dtype(pair.mu, pair.raw)
    zero = unscaled(pair.mu, dtype, engine.noise)
    eps = engine.sample(zero, zero, PLAIN["logvar"], None, None)

    def draw(mu: Tensor, raw: Tensor) -> Tensor:
        return engine.sample(mu.to(dtype), raw.to(dtype), pair.p, eps, None)

    return at_sample(draw, eps, pair, reduction, o, "mc", mean)[1]


# ---- the KL


def kl(engine: Engine, pair: Pair, reduction: str, o: KLOptions, mean: Mean | None = None) -> Tensor:
    """KL(q || p) with the options."""
    if o.batch_dims != 1:
        batch = Batch(pair.mu, o.batch_dims)
        found = kl(engine, batch.pair(pair), reduction, batch.options(o, pair.mu), mean)
        return batch.restored(found, reduction)
    if o.prior is not None:
        return to_prior(engine, pair, reduction, o, mean)
    begun, inner = begin(pair, reduction, o)
    return finish(engine, engine.kl(begun, inner, o.balance), pair, begun, inner, reduction, o, mean)


def begin(pair: Pair, reduction: str, o: KLOptions) -> tuple[Pair, str]:
    """Of what the options begin with: a plain KL, reduced as far as they allow."""
    if o.kl_weight is not None:
        inner, pair = "none", hidden(pair, o.kl_weight)
    elif not o.free_bits and not o.symmetric:
        return pair, reduction
    else:
        inner = reduced_for_floors(reduction, o)
    # elements that are yet to be added up would lose digits in mu's half precision
    narrow = (inner != reduction or o.symmetric) and pair.mu.dtype in (torch.float16, torch.bfloat16)
    return (pair._replace(mu=pair.mu.float()) if narrow else pair), inner


def reduced_for_floors(reduction: str, o: KLOptions) -> str:
    """How far a KL is reduced before free bits."""
    if not o.free_bits:
        return reduction
    return "per_sample" if o.free_bits_per == "sample" else "none"


def finish(
    engine: Engine,
    kl: Tensor,
    pair: Pair,
    begun: Pair,
    inner: str,
    reduction: str,
    o: KLOptions,
    mean: Mean | None = None,
) -> Tensor:
    """The KL with the options, from the plain one that they begin with."""
    if o.symmetric:
        kl = kl + reverse(engine, begun, inner, o.balance)
        if reduction == "none":
            kl = kl.to(promoted(*pair[:4]))
    if o.kl_weight is not None:
        kl = weighted(kl, o.kl_weight, reduction, o)
    return bounded(kl, begun.mu, reduction, o, mean)


def hidden(pair: Pair, weight: Tensor) -> Pair:
    """The pair with 0 and 1 wherever the weight is 0: whatever stood there reaches neither the KL nor a gradient."""
    on = weight != 0

    def shown(x: Prior, other: float) -> Prior:
        return torch.where(on, x, other) if isinstance(x, Tensor) else x

    mu, raw, pm, plv, p = pair
    return Pair(torch.where(on, mu, 0.0), torch.where(on, raw, 1.0), shown(pm, 0.0), shown(plv, 0.0), p)


def weighted(kl: Tensor, weight: Tensor, reduction: str, o: KLOptions) -> Tensor:
    """Each element times its weight, then reduced as far as free bits allow."""
    return reduced(kl * weight.to(kl.dtype), reduced_for_floors(reduction, o), kl.dtype)


def reverse(engine: Engine, pair: Pair, reduction: str, balance: float | None) -> Tensor:
    """KL(p || q): exact next to p = q and not negative, as KL(q || p) is, and so is their sum."""
    dtype = compute_dtype(*pair[:4])
    like = pair.mu.to(dtype)
    prior = (as_tensor(t, like) for t in (pair.prior_mu, pair.prior_logvar))
    mu, logvar = (torch.zeros_like(like) + t if wrapped(like) else t.expand(like.shape) for t in prior)
    swapped = Pair(mu, logvar, pair.mu, logvar_of(pair.raw.to(dtype), pair.p.spec), PLAIN["logvar"])
    return engine.kl(swapped, reduction, None if balance is None else 1 - balance)


def bounded(kl: Tensor, mu: Tensor, reduction: str, o: KLOptions, mean: Mean | None) -> Tensor:
    """Free bits or the capacity, and what is left of the reduction.

    A floor is ``where(kl <= floor, floor, kl)``: without gradient on it, and a NaN stays one.
    """
    if o.free_bits and o.free_bits_per == "batch_dim":
        return (mean or LOCAL).floored(kl.sum(0), o.free_bits, mu.shape[0], reduction)
    if o.free_bits:
        kl = reduced(torch.where(kl <= o.free_bits, o.free_bits, kl), reduction, kl.dtype)
    if mean is not None:
        kl = mean.share(kl)
    if o.capacity is None:
        return kl
    capacity = o.capacity.to(kl.dtype) if isinstance(o.capacity, Tensor) else o.capacity
    return (mean or LOCAL).distance(kl, capacity, mu.shape[0], reduction)


# ---- the reconstruction


def nll(engine: Engine, of: Reconstruction, reduction: str, batch_dims: int = 1) -> Tensor:
    if batch_dims != 1:
        batch = Batch(of.params[0], batch_dims)
        return batch.restored(nll(engine, batch.reconstruction(of), reduction), reduction)
    return gaussian_optimal(engine, of, reduction) if of.likelihood.name in COMPOSED else engine.nll(of, reduction)


def engine_of(engines: Engines, of: Reconstruction) -> Engine:
    likelihood = SQUARES if of.likelihood.name in COMPOSED else of.likelihood
    return engines.engine(of.params[0], of.target, of.weight, likelihood=likelihood, beside=of.params[1:])


# ---- the ELBO


def elbo(
    engines: Engines,
    of: Reconstruction,
    pair: Pair,
    beta: Tensor | float,
    reduction: str,
    o: KLOptions,
    mean: Mean | None,
) -> ELBOTerms:
    if o.batch_dims != 1:
        batch, of_recon = batches(of, pair, o)
        flat = of_recon.reconstruction(of), batch.pair(pair), beta, reduction, batch.options(o, pair.mu), mean
        return batch.terms(elbo(engines, *flat), reduction)
    of_nll, of_kl = engine_of(engines, of), engines.engine(pair.mu, beside=pair[1:4])
    if mean is not None:
        reduction = mean.reduction(pair.mu.shape[0])
    composed = o.free_bits or o.capacity is not None or o.symmetric or o.kl_weight is not None or o.prior is not None
    plain = not composed and of.likelihood.name not in COMPOSED
    if plain and of_nll is of_kl and not isinstance(beta, Tensor):
        terms = of_kl.elbo(of, pair, beta, reduction, o.balance)
        # the loss apart: what is made of the two terms would take the backward pass out of its one kernel
        return terms if mean is None else ELBOTerms(*map(mean.share, terms))
    return elbo_of_terms(of_nll, of_kl, of, pair, beta, reduction, o, mean)


def elbo_of_terms(
    of_nll: Engine,
    of_kl: Engine,
    of: Reconstruction,
    pair: Pair,
    beta: Tensor | float,
    reduction: str,
    o: KLOptions,
    mean: Mean | None = None,
) -> ELBOTerms:
    """From an engine for each."""
    # first what may be refused: the reconstruction may be overwritten
    found = kl(of_kl, pair, reduction, o, mean)
    loss = nll(of_nll, of, reduction)
    return ELBOTerms.of(loss if mean is None else mean.share(loss), found, beta)


def batches(of: Reconstruction, pair: Pair, o: KLOptions) -> tuple[Batch, Batch]:
    """The latents' and the data's: one, whose samples are in one order, unless all are added up."""
    first, batch = of.params[0], Batch(pair.mu, o.batch_dims)
    return batch, batch if first.shape[: o.batch_dims] == batch.shape else Batch(first, o.batch_dims)


# ---- several, and packed


def multi_kl(engine: Engine, many: Posteriors, reduction: str, batch_dims: int) -> Tensor:
    if batch_dims == 1 or reduction == "sum":
        return engine.multi_kl(many, reduction)
    batch = Batch(many.mus[0], batch_dims)
    return batch.restored(engine.multi_kl(batch.posteriors(many), reduction), reduction)


def multi_sample_with_kl(
    engine: Engine, many: Posteriors, reduction: str, batch_dims: int, generator: torch.Generator | None
) -> tuple[list[Tensor], Tensor]:
    if batch_dims == 1 or reduction == "sum":
        return engine.multi_sample_with_kl(many, reduction, generator)
    batch = Batch(many.mus[0], batch_dims, engine.noise)
    if any(map(batch.reorders, many.mus)):
        samples, _ = engine.multi_sample_with_kl(many, "sum", generator)
        return samples, multi_kl(engine, many, reduction, batch_dims)
    samples, kl = engine.multi_sample_with_kl(batch.posteriors(many), reduction, generator)
    return [batch.restored(z) for z in samples], batch.restored(kl, reduction)


def packed(
    engine: Engine,
    of: Moments,
    reduction: str,
    batch_dims: int,
    generator: torch.Generator | None,
    with_sample: bool,
    with_kl: bool,
) -> list[Tensor]:
    if batch_dims == 1 or not with_kl:
        return engine.packed(of, reduction, generator, with_sample, with_kl)
    batch = Batch(of.moments, batch_dims, engine.noise)
    if with_sample and not of.moments.is_contiguous() and batch.reorders(of.moments.chunk(2, of.dim)[0]):
        (z,) = engine.packed(of, reduction, generator, True, False)
        return [z, *packed(engine, of, reduction, batch_dims, None, False, True)]
    *samples, kl = engine.packed(batch.moments(of), reduction, generator, with_sample, with_kl)
    return [*map(batch.restored, samples), batch.restored(kl, reduction)]
