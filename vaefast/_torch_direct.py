"""The short way of a plain eager call to the PyTorch engine: few checks for the tensors that most calls have, alike and
in float32, and no groups. Every other call takes the engine's way."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _arguments, _closed, _nodes, _plain, _torch
from ._checks import is_bool
from ._functorch import unseen
from ._gaussian import Prior
from ._options import ELBO_REDUCTIONS, REDUCTIONS, Likelihood, Parameterization
from .likelihoods import LIKELIHOODS


def takes(x: object) -> bool:
    """Whether a call whose first tensor is x may come here."""
    return isinstance(x, Tensor) and unseen(x) and x.layout is torch.strided and not x.is_nested


def narrow(x: object) -> TypeGuard[Tensor]:
    """Whether x is a tensor as most calls have it."""
    return (
        (type(x) is Tensor or type(x) is Parameter)
        and x.dtype is torch.float32
        and x.layout is torch.strided
        and not x.is_nested
    )


def alike(x: object, like: Tensor) -> bool:
    return narrow(x) and narrow(like) and x.shape == like.shape and x.device == like.device


def beside(x: object, first: Tensor) -> bool:
    """One that broadcasts to the first: a further parameter, or a prior's."""
    return (
        narrow(x)
        and x.device == first.device
        and x.dim() <= first.dim()
        and all(n in (1, size) for n, size in zip(reversed(x.shape), reversed(first.shape)))
    )


def number(prior: Prior) -> bool:
    return prior is None or type(prior) is float


def own(prior: Prior, mu: Tensor) -> bool:
    """Whether a prior's is a number, or a tensor that broadcasts to mu."""
    return beside(prior, mu) if isinstance(prior, Tensor) else number(prior)


# the engine's own functions, which take no self
_static: Any = staticmethod


class Direct:
    """``_engine.Direct``."""

    def posterior(
        self, mu: Tensor, raw: Tensor, prior_mu: Prior, prior_logvar: Prior, p: Parameterization, reduction: str,
        balance: float | None, eps: None, generator: None, with_sample: bool, with_kl: bool, /,
    ) -> list[Tensor]:  # fmt: skip
        plain = alike(raw, mu) and own(prior_mu, mu) and own(prior_logvar, mu) and mu.dim() > 0 and mu.numel() > 0
        if not plain or reduction not in REDUCTIONS:
            if not with_kl:
                mu, raw = _arguments.posterior(mu, raw)
                return [_torch.sample(mu, raw, p, None, None)]
            pair, _ = _arguments.kl(mu, raw, prior_mu, prior_logvar, p, reduction, balance, {})
            kl = _torch.kl(pair, reduction, balance)
            return [_torch.sample(pair.mu, pair.raw, p, None, None), kl] if with_sample else [kl]
        found = []
        if with_sample:
            if _closed.large(mu, raw):
                found.append(_torch.one_sample(p, mu, raw, None, None))
            else:
                drawn = torch.randn_like(mu, memory_format=torch.contiguous_format)
                found.append(_plain.sample(p.spec, drawn, mu, raw))
        if with_kl:
            options = p.spec, reduction, balance
            arguments: tuple[Any, ...] = mu, raw, prior_mu, prior_logvar
            if _torch.trained(*arguments):
                node = functools.partial(_nodes.kl, *options), functools.partial(_plain.kl, *options)
                found.append(_nodes.Loss.apply(*node, *arguments))
            else:
                found.append(_nodes.kl(*options, _nodes.NONE, *arguments)[0])
        return found

    def parameters(
        self, recon: object, target: object, weight: object, chosen: Likelihood, /
    ) -> Sequence[Tensor] | None:
        entry = LIKELIHOODS.get(chosen.name)
        if weight is not None or entry is None or not isinstance(target, Tensor) or target.requires_grad:
            return None
        params = recon if isinstance(recon, (tuple, list)) else (recon,)
        if not entry.required <= len(params) <= len(entry.params):
            return None
        first = params[0]
        if not isinstance(first, Tensor) or first.dim() == 0 or first.numel() == 0:
            return None
        if entry.planes:
            fit = narrow(first) and narrow(target) and target.device == first.device
            return params if fit and _arguments.mixture(first, target, chosen, entry.planes) else None
        return params if alike(target, first) and all(beside(t, first) for t in params[1:]) else None

    def reconstruction(
        self, params: Sequence[Tensor], target: Tensor, weight: Tensor | None, chosen: Likelihood, overwrite: bool,
        reduction: str, /,
    ) -> Tensor:  # fmt: skip
        if reduction not in REDUCTIONS or not is_bool(overwrite):
            raise ValueError
        entry, dims = LIKELIHOODS[chosen.name], params[0].dim()
        if entry.gradients is None or entry.planes or (reduction == "none" and dims == 1):
            return _torch.one_nll(chosen, reduction, target, None, *params)
        found = _torch.by_operator(chosen, reduction, target, *params)
        if found is not None:
            return found
        if _torch.trained(*params):
            compute = functools.partial(_nodes.nll, chosen, reduction, dims)
            loss: Tensor = _nodes.Loss.apply(
                compute, functools.partial(_plain.nll, chosen, reduction), target, None, *params
            )
            return loss
        return _nodes.nll(chosen, reduction, dims, _nodes.NONE, target, None, *params)[0]

    def fused_elbo(
        self, loss_alone: bool, params: Sequence[Tensor], target: Tensor, weight: Tensor | None, chosen: Likelihood,
        overwrite: bool, mu: Tensor, raw: Tensor, prior_mu: Prior, prior_logvar: Prior, p: Parameterization,
        beta: float, reduction: str, balance: float | None, /,
    ) -> Any:  # fmt: skip
        recon = params[0]
        if (
            not loss_alone
            or LIKELIHOODS[chosen.name].gradients is None
            or not (isinstance(raw, Tensor) and alike(raw, mu) and number(prior_mu) and number(prior_logvar))
            or mu.dim() == 0
            or mu.numel() == 0
            or mu.device != recon.device
            or (reduction != "sum" and (reduction not in ELBO_REDUCTIONS or mu.shape[0] != recon.shape[0]))
            or (overwrite is not True and overwrite is not False)
        ):
            of = _arguments.reconstruction(params, target, weight, chosen, overwrite)
            pair, _ = _arguments.kl(mu, raw, prior_mu, prior_logvar, p, reduction, balance, {})
            terms = _torch.elbo(of, pair, _number(_arguments.elbo(recon, mu, beta, reduction)), reduction, balance)
            return terms.loss if loss_alone else terms
        arguments: tuple[Any, ...] = target, weight, mu, raw, prior_mu, prior_logvar, *params
        dims = len(_arguments.loss_shape(recon, chosen)[0])
        options = chosen, reduction, dims, float(beta), p.spec, balance
        if _torch.trained(mu, raw, *params):
            plain = functools.partial(_plain.elbo, chosen, reduction, beta, p.spec, balance)
            return _nodes.Loss.apply(functools.partial(_nodes.elbo, *options), plain, *arguments)
        return _nodes.elbo(*options, _nodes.NONE, *arguments)[0]

    def multi(
        self, mus: Sequence[Tensor], raws: Sequence[Tensor], prior_mus: Sequence[Tensor], prior_mu: float,
        prior_logvars: Sequence[Tensor], prior_logvar: float, p: Parameterization, reduction: str, generator: None,
        with_sample: bool, /,
    ) -> list[Tensor]:  # fmt: skip
        many = _arguments.each_with_its_prior(
            mus, raws, prior_mus or None, prior_logvars or None, p, None, reduction, 1
        )
        return [_torch.multi_kl(many, reduction)]

    sample, kl, sample_with_kl = _static(_torch.sample), _static(_torch.kl), _static(_torch.sample_with_kl)
    nll, elbo, packed = _static(_torch.nll), _static(_torch.elbo), _static(_torch.packed)
    categorical, log_ratio, bound = _static(_torch.categorical), _static(_torch.log_ratio), _static(_torch.bound)
    experts = _static(_torch.experts)
    multi_kl, multi_sample_with_kl = _static(_torch.multi_kl), _static(_torch.multi_sample_with_kl)
    noise = _torch.noise


def _number(beta: Tensor | float) -> float:
    assert not isinstance(beta, Tensor)
    return beta


direct = Direct()
