"""What an argument is by itself: its type, its name, its dtype; and how tensors lie to each other.

Every message tells the argument's name, what was given and what it takes. On good input a check is a comparison or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

Real = float | int
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def is_real(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def floating(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {str(x.dtype)[6:]}; "
            f"convert it with {name}.float()"
        )
    return x


def same_device(name: str, x: Tensor, other: str, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} but {other} is on {device}; move it with {name}.to({str(device)!r})")


def same_shape(name: str, x: Tensor, other: str, shape: torch.Size) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)} but {other} has {tuple(shape)}; they must be equal")


def like(name: str, x: object, other: str, first: Tensor) -> Tensor:
    """A floating tensor of the other's shape, on its device."""
    x = floating(name, x)
    if x.shape != first.shape or x.device != first.device:
        same_shape(name, x, other, first.shape)
        same_device(name, x, other, first.device)
    return x


def broadcasts(name: str, x: Tensor, to: str, shape: torch.Size) -> None:
    """x must expand to shape without changing shape."""
    short = len(shape) - x.dim()
    if short < 0 or any(a != 1 and a != b for a, b in zip(x.shape, shape[short:])):
        raise ValueError(f"{name} of shape {tuple(x.shape)} does not broadcast to {to}'s shape {tuple(shape)}")


def batched(name: str, x: Tensor, reduction: str) -> None:
    if x.dim() == 0 and reduction in ("per_sample", "batchmean"):
        raise ValueError(
            f"reduction={reduction!r} needs a batch dimension, but {name} is a 0-d tensor; "
            f"use 'sum' or {name}.unsqueeze(0)"
        )


def batch(name: str, x: object) -> Tensor:
    x = floating(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name} must be [B, ...], got a 0-d tensor; use {name}.unsqueeze(0)")
    return x


def tensors(name: str, values: object, other: str = "", others: object = None) -> list[Any]:
    """A list or tuple, not empty, as long as the other one."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of tensors, got {type(values).__name__}")
    if not values:
        raise ValueError(f"{name} is empty; give at least one tensor")
    if isinstance(others, (list, tuple)) and len(values) != len(others):
        raise ValueError(f"{name} has {len(values)} tensors but {other} has {len(others)}; they go in pairs")
    return list(values)


def factor(name: str, value: object) -> Tensor | float:
    """A float, or a 0-d tensor."""
    if is_real(value):
        return float(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a float or a 0-d torch.Tensor, got {type(value).__name__}")
    if floating(name, value).dim() != 0:
        raise ValueError(f"{name} must be a float or a 0-d tensor, got shape {tuple(value.shape)}")
    return value
