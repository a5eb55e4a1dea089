"""Bounds of log p(x) from log importance weights ``[K, B]``, and how their gradient is shared between the encoder's
path and the decoder's."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _options
from ._checks import choice, is_real, is_whole, number

ESTIMATORS = ("iwae", "stl", "dreg")


class Bound(NamedTuple):
    """Which one: Renyi's alpha, of how many groups of draws the mean, and the ELBO's share in it."""

    alpha: float = 0.0
    groups: int = 1
    mix: float = 0.0

    def loss(self, log_weights: Tensor) -> Tensor:
        """The negative bounds ``[B]``, in nats."""
        if self.alpha == 0 and self.groups == 1 and not self.mix:
            return math.log(log_weights.shape[0]) - torch.logsumexp(log_weights, 0)
        return -self._bound(log_weights)

    def _bound(self, log_weights: Tensor) -> Tensor:
        mean = log_weights.mean(0) if self.mix or self.alpha == 1 else None
        if self.mix == 1 or self.alpha == 1:
            assert mean is not None
            return mean
        grouped = self._grouped(log_weights)
        if self.alpha == 0:
            each = torch.logsumexp(grouped, 1) - math.log(grouped.shape[1])
        else:
            each = renyi(grouped, 1 - self.alpha)
        bound = each.mean(0) if self.groups > 1 else each.squeeze(0)
        return bound if mean is None else torch.lerp(bound, mean, self.mix)

    def share_of_path(self, log_weights: Tensor) -> Tensor | None:
        """``[K, B]``: by what the gradient that arrives at the draws is multiplied for the doubly reparameterized one;
        None for 1.

        With w the normalised w_k^(1 - alpha), a weight's gradient is ``g = mix / K + (1 - mix) w``, and the draws' is
        ``mix / K + (1 - mix) (alpha w + (1 - alpha) w^2)``: the score's mean is that of the path's share
        ``(1 - alpha) w (1 - w)`` (Tucker et al. 2019, of w^(1 - alpha)).
        """
        if self.alpha == 1 or self.mix == 1:
            return None
        rest = 1 - self.alpha
        grouped = self._grouped(log_weights)
        w = torch.softmax(grouped if rest == 1 else rest * grouped, 1)
        if self.mix == 0:
            share = w if rest == 1 else self.alpha + rest * w
        else:
            own = (1 - self.mix) * w
            share = 1 - rest * own * (1 - w) / (self.mix / grouped.shape[1] + own)
        return share.flatten(0, 1)

    def _grouped(self, log_weights: Tensor) -> Tensor:
        grouped: Tensor = log_weights.unflatten(0, (self.groups, -1))
        return grouped


def renyi(log_weights: Tensor, power: float) -> Tensor:
    """``log(mean_k w_k^power) / power`` over dimension 1, exact for a power next to 0 as for any other."""
    extreme = log_weights.detach().amax(1) if power > 0 else log_weights.detach().amin(1)
    extreme = torch.where(extreme.isfinite(), extreme, 0.0)
    # none is above 1, and the largest is
    ratios = torch.expm1(power * (log_weights - extreme.unsqueeze(1)))
    return extreme + torch.log1p(ratios.mean(1)) / power


def bound(alpha: object, groups: object, mix: object, draws: int) -> Bound:
    """Checked."""
    for name, value in (("alpha", alpha), ("mix", mix)):
        if not is_real(value):
            raise TypeError(f"{name} must be a number, got {value!r}")
    assert is_real(alpha) and is_real(mix)
    alpha, mix = float(number(alpha)), float(number(mix))
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite (0 is importance-weighted, 1 the ELBO), got {alpha!r}")
    if not 0 <= mix <= 1:
        raise ValueError(f"mix must be from 0 (no ELBO) to 1 (the ELBO alone), got {mix!r}")
    if not is_whole(groups):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1 or draws % groups:
        raise ValueError(f"groups must divide the {draws} draws into equal parts, got {groups!r}")
    return Bound(alpha, int(groups), mix)


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """Each sample's, by name."""
    choice("reduction", reduction, _options.ELBO_REDUCTIONS)
    if reduction == "per_sample":
        return losses
    return losses.mean() if reduction == "batchmean" else losses.sum()
