"""The Gaussian likelihood at the variance that fits best: sigma-VAE, composed of squared errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import _args, reference
from ._args import Likelihood


def gaussian_optimal(
    loss: Callable[..., Tensor],
    params: list[Tensor],
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    chosen: Likelihood,
) -> Tensor:
    """n / 2 (log(2 pi s) + 1) with s the mean of the n squared errors, of all elements or of each sample's; Rybkin et
    al. 2021 (arXiv:2006.13202), equation 4.

    ``loss`` is :func:`vaefast.reconstruction_loss` of the path that calls. A weight counts its element so many times.
    """
    _args.choice("reduction", reduction, _args.REDUCTIONS)
    _args.batched("recon", params[0], reduction)
    if reduction == "none":
        raise ValueError(
            "reduction='none' does not go with 'gaussian_optimal', whose variance is shared by many elements; use "
            "'gaussian' with a log variance"
        )
    per_row = "sum" if reduction in ("sum", "mean") and not chosen.options["per_sample"] else "per_sample"
    halves, first = loss(params, target, likelihood=reference.SQUARES, reduction=per_row, weight=weight), params[0]
    if weight is None and per_row == "sum" and first.numel():
        # halves over its own variance is n / 2, and has no gradient
        n = first.numel()
        whole = torch.log(halves) * (0.5 * n) + 0.5 * n * (math.log(4 * math.pi / n) + 1)
        return whole if reduction == "sum" else whole / n
    counts = _counts(first, weight, per_row, halves)
    if chosen.options["per_sample"]:
        each = 0.5 * counts * (torch.log(2 * math.pi * (2 * halves / counts)) + 1)
    else:
        variance = 2 * halves.sum() / counts.sum()
        each = halves / variance + 0.5 * counts * torch.log(2 * math.pi * variance)
    if reduction == "per_sample":
        return each
    if reduction == "batchmean":
        return each.mean()
    return each.sum() / (1 if reduction == "sum" else first.numel())


def _counts(first: Tensor, weight: Tensor | None, per_row: str, halves: Tensor) -> Tensor:
    """How many elements each of ``halves`` is the sum of, in its dtype."""
    if weight is not None:
        full = weight.to(halves.dtype).expand(first.shape)
        return full.sum() if per_row == "sum" else full.reshape(first.shape[0], -1).sum(1)
    return torch.full_like(halves, first.numel() if per_row == "sum" else math.prod(first.shape[1:]))
