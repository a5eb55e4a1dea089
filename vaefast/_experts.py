"""The product of Gaussian experts, with its gradients in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import dense, flag, floating, like, same_device
from ._functorch import alone, unseen
from ._gaussian import compute_dtype, softplus
from ._nodes import again, given, keep
from ._torch import trained

# a log variance beside which every other expert decides
_ABSENT = 1e30


def product_of_experts(
    mus: Tensor, logvars: Tensor, mask: Tensor | None = None, *, prior: bool = True
) -> tuple[Tensor, Tensor]:
    """The Gaussian that M modalities agree on, the product of their densities: precisions add up.

    Wu & Goodman 2018 (arXiv:1802.05335): ``1 / var = 1 + sum_m 1 / var_m`` and ``mu = var sum_m mu_m /
    var_m``. Computed from log variances, of any size, with no precision formed; nothing is added to a variance.

    Args:
        mus, logvars: ``[M, B, D]``, each modality's mean and log variance; D may be several dimensions.
        mask: ``[M, B]``, bool: which modalities there are; None for all. What a missing one holds, NaN too, reaches
            neither result nor gradient. It has the first dimensions of ``mus``, or 1 in their place: ``[M, S, 1]`` goes
            with ``[M, S, B, D]``, as for S subsets.
        prior: whether N(0, I) is an expert too.

    Returns:
        ``(mu, logvar)``, ``[B, D]`` each, in the dtypes of ``mus`` and ``logvars``. Where no expert is left, which
        takes ``prior=False``, the mean is 0 and the log variance infinite.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device.

    Example::

        mus, logvars = torch.randn(3, 128, 20), torch.randn(3, 128, 20)  # of three modalities
        mu, logvar = vaefast.product_of_experts(mus, logvars, mask=torch.rand(3, 128) > 0.5)
    """
    mus = floating("mus", mus)
    logvars = like("logvars", logvars, "mus", mus)
    if mus.dim() < 2 or not mus.shape[0]:
        raise ValueError(f"mus must be [M, B, ...] of at least one modality, got shape {tuple(mus.shape)}")
    if mask is not None:
        mask = _checked(mask, mus)
    prior = flag("prior", prior)
    dtype = compute_dtype(mus, logvars)
    arguments = prior, mask, mus.to(dtype), logvars.to(dtype)
    if not unseen(mus, logvars, *(() if mask is None else (mask,))):
        mu, logvar = plain(*arguments)
    elif trained(mus, logvars):
        mu, logvar = _Product.apply(*arguments)
    else:
        mu, logvar, _ = closed(*arguments)
    return mu.to(mus.dtype), logvar.to(logvars.dtype)


def _checked(mask: Tensor, mus: Tensor) -> Tensor:
    """With a dimension for each of mus'."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = str(mask.dtype)[6:] if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be None or a bool tensor, True where a modality is there, got {got}")
    dense("mask", mask)
    dims = mask.dim()
    if dims > mus.dim() or any(a != b and a != 1 for a, b in zip(mask.shape, mus.shape)) or not dims:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not go with the first dimensions of mus, whose shape is "
            f"{tuple(mus.shape)}; it is [M, B]"
        )
    same_device("mask", mask, "mus", mus.device)
    return mask.view(*mask.shape, *(1,) * (mus.dim() - dims))


def closed(prior: bool, mask: Tensor | None, mus: Tensor, logvars: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the log variance, and each expert's share in the mean."""
    if mask is not None:
        mus, logvars = torch.where(mask, mus, 0.0), torch.where(mask, logvars, _ABSENT)
    shares = torch.softmax(-logvars, 0)
    # of the most precise expert, whose share is 1 / M at least: log share = logvar - its own
    logvar = torch.log(shares.amax(0)).add_(logvars.amin(0))
    mu = torch.mul(shares, mus).sum(0)
    if prior:
        beside = torch.sigmoid(-logvar)
        logvar = softplus(logvar.neg_()).neg_()
        mu.mul_(beside)
        shares.mul_(beside)
    if mask is not None:
        if not prior:
            logvar.masked_fill_(~mask.any(0), torch.inf)
        shares.mul_(mask)
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
    return mu, torch.where(mask.any(0), -log_precision, torch.inf)


class _Product(torch.autograd.Function):
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
