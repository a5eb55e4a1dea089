"""The product of Gaussian experts, with its gradients in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._functorch import alone
from ._gaussian import softplus
from ._nodes import again, given, keep

# a log variance beside which every other expert decides
_ABSENT = 1e30


def closed(prior: bool, mask: Tensor | None, mus: Tensor, logvars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the log variance, and each expert's share in the mean."""
    if mask is not None:
        mus, logvars = torch.where(mask, mus, 0.0), torch.where(mask, logvars, _ABSENT)
    shares, least = torch.softmax(-logvars, 0), logvars.amin(0)
    # of the most precise expert, whose share is 1 / M at least: log share = logvar - its own
    logvar = torch.log(shares.amax(0)).add_(least)
    mu = torch.mul(shares, mus).sum(0)
    if prior:
        beside = torch.sigmoid(-logvar)
        logvar = softplus(logvar.neg_()).neg_()
        mu.mul_(beside)
        shares.mul_(beside)
    if mask is not None:
        if not prior:
            logvar.masked_fill_(least == _ABSENT, torch.inf)
        shares.masked_fill_(~mask, 0.0)
    return mu, logvar, shares


def plain(prior: bool, mask: Tensor | None, mus: Tensor, logvars: Tensor) -> tuple[Tensor, Tensor]:
    """In operations that autograd, a transform or a compiler follows."""
    if mask is not None:
        mus, logvars = torch.where(mask, mus, 0.0), torch.where(mask, logvars, _ABSENT)
    log_precision = torch.logsumexp(-logvars, 0)
    mu = (torch.softmax(-logvars, 0) * mus).sum(0)
    if prior:
        return mu * torch.sigmoid(log_precision), -softplus(log_precision)
    if mask is None:
        return mu, -log_precision
    return mu, torch.where(logvars.amin(0) == _ABSENT, torch.inf, -log_precision)


class Product(torch.autograd.Function):
    """``apply(prior, mask, mus, logvars)``, which keeps the shares: with s those, ``dmu_m = s_m dmu`` and
    ``dlogvar_m = s_m (dlogvar - (mu_m - mu) dmu)``."""

    @staticmethod
    def forward(ctx: Any, prior: bool, mask: Tensor | None, mus: Tensor, logvars: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar, shares = closed(prior, mask, mus, logvars)
        keep(ctx, (prior, mask, mus, logvars), [None, None, (shares, 1.0), (mu, 1.0)])
        ctx.plain = plain
        return mu, logvar

    @staticmethod
    def backward(ctx: Any, dmu: Tensor, dlogvar: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled() or not alone():
            with torch.enable_grad():
                return tuple(again(ctx, saved, (dmu, dlogvar)))
        _, mask, mus, _ = given(ctx, saved)
        shares, mu = saved[-2:]
        dmus = shares * dmu if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[3]:
            return None, None, dmus, None
        apart = mu - mus
        if mask is not None:
            apart = torch.where(mask, apart, 0.0)
        return None, None, dmus, apart.mul_(dmu).add_(dlogvar).mul_(shares)
