"""A Gaussian at the variance that suits the data best, composed of an engine's squared errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._engine import Engine, Reconstruction
from ._gaussian import reduced
from ._options import Likelihood

# half the squared error
SQUARES = Likelihood("gaussian", constant=False)


def gaussian_optimal(engine: Engine, of: Reconstruction, reduction: str) -> Tensor:
    """n / 2 (log(2 pi s) + 1) with s the mean of the n squared errors, of all elements or of each sample's, or its
    floor; Rybkin et al. 2021 (arXiv:2006.13202), equation 4. A weight counts its element so many times."""
    if reduction == "none":
        raise ValueError(
            "reduction='none' does not go with 'gaussian_optimal', whose variance is shared by many elements; use "
            "'gaussian' with a log variance"
        )
    first, per_sample, floor = of.params[0], of.likelihood.options["per_sample"], of.likelihood.options["floor"]
    shared = not per_sample and reduction != "per_sample"
    if shared and of.weight is None and floor > 0 and not first.is_nested and first.numel():
        share = {"batchmean": first.numel() / first.shape[0], "sum": first.numel(), "mean": 1}[reduction]
        return of_mean_half_square(engine.nll(of._replace(likelihood=SQUARES, overwrite=False), "mean"), floor, share)
    per_row = "sum" if reduction in ("sum", "mean") and not per_sample else "per_sample"
    halves = engine.nll(of._replace(likelihood=SQUARES, overwrite=False), per_row)
    counts = counted(first, of.weight, per_row, halves)
    if per_sample or per_row == "sum":
        each = at_best_variance(halves, counts, halves, counts, floor)
    else:
        each = at_best_variance(halves, counts, halves.sum(), counts.sum(), floor)
    if reduction == "per_sample":
        return each
    if reduction == "batchmean":
        return each.mean()
    return each.sum() / (1 if reduction == "sum" else first.numel())


def of_mean_half_square(half: Tensor, floor: float, share: float) -> Tensor:
    """``share`` times what :func:`at_best_variance` gives for each of the elements of that mean, in few operations."""
    least = floor / 2
    log = half.clamp(min=least).log() + math.log(4 * math.pi)
    return torch.add(log * (share / 2), half.clamp(max=least), alpha=share / floor)


def at_best_variance(halves: Tensor, counts: Tensor, of_halves: Tensor, of_counts: Tensor, floor: float) -> Tensor:
    """``halves / s + counts / 2 log(2 pi s)`` with ``s = max(2 of_halves / of_counts, floor)``; 0 where nothing counts.

    What bounds s is a constant, so that below it this is the Gaussian of that variance.
    """
    some = of_counts != 0
    mean = 2 * of_halves / torch.where(some, of_counts, 1.0)
    free = mean > floor
    s = torch.where(some, torch.where(free, mean, floor), 1.0)
    # halves over their own variance are n / 2, and have no gradient
    own = halves is of_halves
    squares = torch.where(free, 0.5 * counts, halves / (floor or 1.0)) if own else halves / torch.where(s > 0, s, 1.0)
    return squares + 0.5 * counts * torch.log(2 * math.pi * s)


def counted(first: Tensor, weight: Tensor | None, per_row: str, halves: Tensor) -> Tensor:
    """How many elements each of ``halves`` is the sum of, in its dtype."""
    if weight is not None:
        return reduced(weight.to(halves.dtype).expand(first.shape), per_row, halves.dtype)
    if first.is_nested:
        return reduced(torch.ones_like(first, dtype=halves.dtype), per_row, halves.dtype)
    return torch.full_like(halves, first.numel() if per_row == "sum" else math.prod(first.shape[1:]))
