"""The primitives in operations that autograd, a transform or a compiler follows. Arguments come in one dtype."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import _gaussian
from ._arguments import loss_shape
from ._gaussian import Prior, Spec, balanced, reduced, std_of
from ._options import Likelihood
from .likelihoods import LIKELIHOODS


def sample(spec: Spec, eps: Tensor, mu: Tensor, raw: Tensor) -> Tensor:
    std = std_of(raw, spec)
    return mu + std * eps if mu.is_nested else torch.addcmul(mu, std, eps)


def kl(spec: Spec, reduction: str, balance: float | None, mu: Tensor, raw: Tensor, pm: Prior, plv: Prior) -> Tensor:
    each = functools.partial(_gaussian.kl, spec)
    return reduced(balanced(balance, each, (mu, raw), (pm, plv)), reduction, mu.dtype)


def multi_kl(spec: Spec, reduction: str, *quads: Tensor | float | None) -> Tensor:
    """The sum over mu, raw, prior mu and prior log variance in turn."""
    each: list[Any] = [quads[k : k + 4] for k in range(0, len(quads), 4)]
    return torch.stack([kl(spec, reduction, None, *quad) for quad in each]).sum(0)


def nll(likelihood: Likelihood, reduction: str, x: Tensor, w: Tensor | None, *params: Tensor) -> Tensor:
    each, options = LIKELIHOODS[likelihood.name].nll, likelihood.options
    shape, dim = loss_shape(params[0], likelihood)
    if w is None:
        return reduced(each(x, *params, **options).expand(shape), reduction, x.dtype)
    on = w != 0

    def ones(t: Tensor) -> Tensor:
        """Masked elements are evaluated at 1, so that whatever they held reaches neither the loss nor a gradient."""
        return torch.where(on.expand(shape).unsqueeze(dim) if dim and t.dim() > len(shape) else on, t, 1.0)

    values = each(ones(x), *map(ones, params), **options)
    return reduced(torch.where(on, w * values, 0.0), reduction, x.dtype)


def elbo(
    likelihood: Likelihood, reduction: str, beta: float, spec: Spec, balance: float | None,
    x: Tensor, w: Tensor | None, mu: Tensor, raw: Tensor, pm: Prior, plv: Prior, *params: Tensor,
) -> Tensor:  # fmt: skip
    """The loss alone."""
    return nll(likelihood, reduction, x, w, *params) + beta * kl(spec, reduction, balance, mu, raw, pm, plv)
