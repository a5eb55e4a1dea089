"""The standard deviations that a posterior starts from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import Real, broadcasts, floating, is_real

Start = str | Real | Callable[[str, nn.Parameter], Any]
# what 'fan_in' multiplies the usual size of a fresh weight by
SHARE = 0.1


def raw_std(init: Start, name: str, p: nn.Parameter) -> Tensor:
    """rho, of which softplus is the standard deviation, of the parameter's shape and dtype."""
    if isinstance(init, str):
        if init != "fan_in":
            raise ValueError(f"init must be 'fan_in', a number or a function of (name, parameter), got {init!r}")
        std: Any = SHARE / math.sqrt(fan_in(p))
    elif is_real(init):
        std = init
    elif callable(init):
        std = init(name, p)
    else:
        raise TypeError(f"init must be 'fan_in', a number or a function of (name, parameter), got {init!r}")
    if isinstance(std, Tensor):
        broadcasts(f"init's standard deviation of {name}", floating("init's standard deviation", std), name, p.shape)
        std = std.detach().to(device=p.device, dtype=torch.float64).expand(p.shape)
        # of a weight of 0 a share is 0, which no rho has; its KL would be infinite
        std = std.clamp(min=1e-8)
    elif is_real(std) and 0 < std < math.inf:
        std = torch.full(p.shape, float(std), dtype=torch.float64, device=p.device)
    else:
        raise ValueError(f"init's standard deviation of {name} must be a number above 0 or a tensor, got {std!r}")
    # log(e^std - 1), which neither overflows nor loses small ones
    rho: Tensor = std + torch.log(-torch.expm1(-std))
    return rho.to(p.dtype).contiguous()


def fan_in(p: Tensor) -> int:
    """How many inputs an output has, as ``torch.nn.init`` counts them; a vector's is its length."""
    return max(1, p.numel() // (p.shape[0] if p.dim() > 1 and p.shape[0] else 1))
