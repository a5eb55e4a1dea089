"""The engine in PyTorch: the fallback, and the path for what the kernels do not cover (double backward, torch.func,
forward-mode AD). Its functions are the primitives of ``_engine.Engine``.

In eager they have autograd nodes of their own (``_nodes``). Where a transform, a compiler, forward-mode AD or a tensor
that is no plain one is to see the operations, they are PyTorch's (``_plain``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _categorical, _closed, _experts, _importance, _nodes, _plain
from ._arguments import loss_shape
from ._engine import Categorical, Experts, LogRatio, Moments, Pair, Posteriors, Reconstruction
from ._functorch import unseen
from ._gaussian import Prior, as_tensor, compute_dtype, logvar_of, promoted, reduced
from ._generators import torch_noise, torch_noises
from ._options import PER_DRAW, ELBOTerms, Likelihood, Parameterization
from ._philox import normal
from .likelihoods import LIKELIHOODS

# what it draws of itself
noise = "torch"


def trained(*tensors: object) -> bool:
    for t in tensors:
        if isinstance(t, Tensor) and t.requires_grad:
            return torch.is_grad_enabled()
    return False


# -- the primitives, of tensors that are in one dtype


def one_sample(
    p: Parameterization, mu: Tensor, raw: Tensor, eps: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    # a graph of any batch is not to be asked for its size
    blocks = not torch.compiler.is_compiling() and _closed.large(mu, raw) and unseen(mu, raw)
    if eps is None:
        if blocks and not trained(mu, raw):
            return _nodes.drawn(p.spec, mu, raw, generator)
        eps = torch_noise(mu, generator)
    if not blocks or not _closed.large(mu, eps) or not unseen(eps) or eps.requires_grad:
        return _plain.sample(p.spec, eps, mu, raw)
    if trained(mu, raw):
        z: Tensor = _nodes.Sample.apply(p.spec, eps, mu, raw)
        return z
    return _nodes.draw(p.spec, False, mu, raw, eps)[0]


def one_kl(
    p: Parameterization, reduction: str, balance: float | None, mu: Tensor, raw: Tensor, pm: Prior, plv: Prior
) -> Tensor:
    options = p.spec, reduction, balance
    if not mu.numel() or not unseen(*(t for t in (mu, raw, pm, plv) if isinstance(t, Tensor))):
        return _plain.kl(*options, mu, raw, pm, plv)
    return loss(functools.partial(_nodes.kl, *options), functools.partial(_plain.kl, *options), mu, raw, pm, plv)


def one_nll(likelihood: Likelihood, reduction: str, x: Tensor, w: Tensor | None, *params: Tensor) -> Tensor:
    shape, dim = loss_shape(params[0], likelihood)
    if reduction == "none" and len(shape) == 1:
        reduction = "per_sample"  # which is the same there
    # a mixture's sites are fewer than its parameters', so that what is elementwise does not multiply them
    if (dim and reduction == "none") or not closed(likelihood, x, w, *params):
        return _plain.nll(likelihood, reduction, x, w, *params)
    found = by_operator(likelihood, reduction, x, *params) if w is None else None
    if found is not None:
        return found
    compute = functools.partial(_nodes.nll, likelihood, reduction, len(shape))
    return loss(compute, functools.partial(_plain.nll, likelihood, reduction), x, w, *params)


def closed(likelihood: Likelihood, x: Tensor, w: Tensor | None, *params: Tensor) -> bool:
    """Whether there is a closed form for these."""
    return (
        LIKELIHOODS[likelihood.name].gradients is not None
        and params[0].numel() > 0
        and not trained(x, w)
        and unseen(x, *params, *(() if w is None else (w,)))
    )


def by_operator(likelihood: Likelihood, reduction: str, x: Tensor, *params: Tensor) -> Tensor | None:
    """By PyTorch's own operator, where there is one and it takes these, which have a :func:`closed` form and are
    trained: without gradients that takes no node."""
    entry = LIKELIHOODS[likelihood.name]
    if entry.operator is None or not x.is_cpu or not trained(*params):
        return None
    values = entry.operator(x, *params, **likelihood.options)
    if values is None:
        return None
    if reduction == "batchmean":
        return values.sum() / values.shape[0]
    return reduced(values, reduction, x.dtype)


def loss(compute: functools.partial[_closed.Term], plain: functools.partial[Tensor], *arguments: object) -> Tensor:
    found: Tensor
    if trained(*arguments):
        found = _nodes.Loss.apply(compute, plain, *arguments)
    else:
        found = compute([False] * len(arguments), *arguments)[0]
    return found


# -- the engine's


def sample(
    mu: Tensor,
    raw: Tensor,
    p: Parameterization,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: Tensor | None = None,
    beside: Sequence[Prior] = (),
) -> Tensor:
    """``seed`` is a kernel's, whose noise it is; ``beside`` is the prior that went in with it, for a kernel draws in
    the dtype in which it computes all that it is asked."""
    dtype = compute_dtype(mu, raw, eps, *beside)
    if seed is not None:
        eps = normal(seed, mu, dtype)
    elif eps is None and mu.dtype != dtype:
        eps = torch_noise(mu, generator)
    eps = None if eps is None else eps.to(dtype)
    return one_sample(p, mu.to(dtype), raw.to(dtype), eps, generator).to(mu.dtype)


def kl(pair: Pair, reduction: str, balance: float | None) -> Tensor:
    mu, raw, pm, plv, p = pair
    dtype = compute_dtype(mu, raw, pm, plv)
    found = one_kl(p, reduction, balance, mu.to(dtype), raw.to(dtype), _in(dtype, pm), _in(dtype, plv))
    return found.to(promoted(mu, raw, pm, plv)) if reduction == "none" else found


def _in(dtype: torch.dtype, x: Prior) -> Prior:
    return x.to(dtype) if isinstance(x, Tensor) else x


def sample_with_kl(
    pair: Pair, reduction: str, balance: float | None, eps: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    return sample(pair.mu, pair.raw, pair.p, eps, generator), kl(pair, reduction, balance)


def nll(of: Reconstruction, reduction: str) -> Tensor:
    params, target, weight, likelihood, _ = of
    dtype = compute_dtype(*params, target, weight)
    w = None if weight is None else weight.to(dtype)
    found = one_nll(likelihood, reduction, target.to(dtype), w, *(t.to(dtype) for t in params))
    return found.to(promoted(*params, target)) if reduction == "none" else found


def elbo(of: Reconstruction, pair: Pair, beta: float, reduction: str, balance: float | None) -> ELBOTerms:
    return ELBOTerms.of(nll(of, reduction), kl(pair, reduction, balance), beta)


# -- many in one call


def multi_kl(many: Posteriors, reduction: str) -> Tensor:
    count = len(many.mus)
    pms: Sequence[Prior] = many.prior_mus or [many.prior_mu or None] * count
    plvs: Sequence[Prior] = many.prior_logvars or [many.prior_logvar or None] * count
    each_of = list(zip(many.mus, many.raws, pms, plvs))
    given = [t for each in each_of for t in each if isinstance(t, Tensor)]
    if all(t.dtype == given[0].dtype and t.numel() for t in given) and unseen(*given):
        # one node for all, where there is nothing to promote
        if given[0].dtype in (torch.float32, torch.float64):
            of = many.p.spec, reduction
            flat = [t for each in each_of for t in each]
            return loss(functools.partial(_nodes.multi_kl, *of), functools.partial(_plain.multi_kl, *of), *flat)
    kls = [kl(Pair(*each, many.p), reduction, None) for each in each_of]
    dtype = compute_dtype(*kls)
    return torch.stack([each.to(dtype) for each in kls]).sum(0)


def multi_sample_with_kl(
    many: Posteriors, reduction: str, generator: torch.Generator | None
) -> tuple[list[Tensor], Tensor]:
    return samples(many, torch_noises(many.mus, generator)), multi_kl(many, reduction)


def samples(many: Posteriors, noises: Sequence[Tensor]) -> list[Tensor]:
    return [sample(mu, raw, many.p, eps, None) for mu, raw, eps in zip(many.mus, many.raws, noises)]


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
        beside = () if seed is None or of.prior is None else of.prior[:1]
        out.append(sample(mu, raw, of.p, None, generator, seed, beside))
    if with_kl:
        prior: tuple[Prior, Prior] = (None, None)
        if of.prior is not None:
            moments, p = of.prior
            prior_mu, prior_raw = moments.chunk(2, of.dim)
            prior = prior_mu, logvar_of(prior_raw, p.spec)
        out.append(kl(Pair(mu, raw, *prior, of.p), reduction, None))
    return out


# -- discrete latents


def categorical(
    of: Categorical, uniforms: Tensor | None, reduction: str, balance: float | None, with_kl: bool
) -> list[Tensor]:
    logits, prior, dim, unimix = of
    dtype = compute_dtype(logits, prior)
    q = logits.to(dtype).movedim(dim, -1)
    p = None if prior is None else prior.to(dtype).movedim(dim, -1)
    z, kl = _categorical.sites(unimix, balance, with_kl, q, p, uniforms)
    out = [] if z is None else [z.movedim(-1, dim).to(logits.dtype)]
    return out if kl is None else [*out, reduced(kl, reduction, dtype)]


# -- several draws a sample


def log_ratio(of: LogRatio) -> Tensor:
    return log_ratio_by(half_squares, of)


def log_ratio_by(half_squares: Callable[[Tensor, Prior], Tensor], of: LogRatio) -> Tensor:
    z, mu, logvar, pm, plv, prior = of
    each = half_squares(z - mu, logvar)
    if prior:
        each = each - half_squares(z - pm if isinstance(pm, Tensor) or pm else z, plv)
    return reduced(each, PER_DRAW, z.dtype)


def half_squares(apart: Tensor, logvar: Prior) -> Tensor:
    """-log N(apart; 0, e^logvar) without its constant, as people write it: a node for each operation takes less time
    than one in Python for all."""
    if not isinstance(logvar, Tensor) and not logvar:
        return 0.5 * (apart * apart)
    logvar = as_tensor(logvar, apart)
    return 0.5 * ((apart * torch.exp(-0.5 * logvar)).square() + logvar)


def bound(ratio: Tensor, of: Reconstruction, reduction: str) -> tuple[Tensor, Tensor]:
    return bound_of(ratio - nll(of, PER_DRAW), reduction)


def bound_of(log_weights: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    return _importance.reduced(_importance.Bound().loss(log_weights), reduction), log_weights.detach()


# -- several posteriors a sample


def experts(of: Experts) -> tuple[Tensor, Tensor]:
    mus, logvars, there, prior = of
    dtype = compute_dtype(mus, logvars)
    if there is not None:
        there = there.view(*there.shape, *(1,) * (mus.dim() - there.dim()))
    arguments = prior, there, mus.to(dtype), logvars.to(dtype)
    if not unseen(mus, logvars, *(() if there is None else (there,))):
        mu, logvar = _experts.plain(*arguments)
    elif trained(mus, logvars):
        mu, logvar = _experts.Product.apply(*arguments)
    else:
        mu, logvar, _ = _experts.closed(*arguments)
    return mu.to(mus.dtype), logvar.to(logvars.dtype)
