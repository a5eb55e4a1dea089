"""What is left of a formula where something in it is infinite or nothing, as ``docs/limits.md`` lists it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weighed(a: Tensor, b: Tensor) -> Tensor:
    """a b where b, a weight that may be 0, leaves nothing of an infinite a."""
    return torch.where((b == 0) & a.isinf(), 0.0, a * b)


def inverse(log_scale: Tensor, off: Tensor) -> Tensor:
    """1 / scale, or 1 where the data meet the mean: of however small a scale nothing is left there."""
    return torch.exp(-torch.where(off == 0, 0.0, log_scale))


def beside(scaled: Tensor, log_scale: Tensor) -> Tensor:
    """What is scaled outgrows the logarithm."""
    return torch.where(scaled == math.inf, scaled, scaled + log_scale)


def in_unit(x: Tensor) -> Tensor:
    """NaN where it is outside [0, 1]."""
    return torch.where((x < 0) | (x > 1), math.nan, x)
