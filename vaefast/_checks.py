"""What an argument is by itself: its type, its name, its dtype; and how tensors lie to each other.

Every message tells the argument's name, what was given and what it takes. On good input a check is a comparison or two.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import Parameter

Real = float | int
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def is_real(value: object) -> TypeGuard[float]:
    """Whether value is a number: Python's, numpy's, or anything with ``__float__`` or ``__index__`` that is no tensor.

    :func:`number` makes one of Python's of it. A bool is none.
    """
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    return _scalar(value, "__float__", "__index__") and _converts(float, value)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether value is an int, or of another type that stands for one: ``operator.index`` makes it one."""
    if isinstance(value, int):
        return not isinstance(value, bool)
    return _scalar(value, "__index__") and _converts(operator.index, value)


def number(value: float) -> float:
    """Of Python's own types, which kernels and compilers take."""
    if type(value) is float or type(value) is int:
        return value
    return operator.index(value) if is_whole(value) else float(value)


def _scalar(value: object, *methods: str) -> bool:
    kind = type(value)
    return (
        any(hasattr(kind, method) for method in methods)
        and not isinstance(value, Tensor)
        and not is_bool(value)
        and not (isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real))
        and getattr(value, "ndim", 0) == 0
    )


def is_bool(value: object) -> bool:
    """Python's or numpy's."""
    return isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"))


def _converts(to: Any, value: object) -> bool:
    try:
        to(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def flag(name: str, value: object) -> bool:
    if not is_bool(value):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def wrapped(x: object) -> bool:
    """Whether x is a tensor made of others, a DTensor, a jagged one or another wrapper, which PyTorch's own operators
    see through. What traces is none."""
    kind = type(x)
    if (
        kind is Tensor
        or kind is Parameter
        or not isinstance(x, Tensor)
        or isinstance(x, (FakeTensor, FunctionalTensor))
    ):
        return False
    return getattr(kind, "__torch_dispatch__", None) is not Tensor.__torch_dispatch__


def dense(name: str, x: Tensor) -> None:
    """Elements at strides; a jagged tensor passes."""
    if x.layout is torch.strided and not x.is_nested and not x.is_quantized:
        return
    if x.layout is torch.jagged:
        return
    if x.is_nested:
        layout, remedy = "nested with layout torch.strided", "make it with layout=torch.jagged, or pad and mask it"
    elif x.is_quantized:
        layout, remedy = "quantized", f"convert it with {name}.dequantize()"
    else:
        layout, remedy = f"of layout {x.layout}", f"convert it with {name}.to_dense()"
    raise TypeError(f"{name} is {layout}; it must be a strided or a jagged tensor: {remedy}")


def floating(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    dense(name, x)
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
    """A list of what an iterable has, not empty, as long as the other one; a tensor's rows are none."""
    if not isinstance(values, Iterable) or isinstance(values, (Tensor, str, dict)):
        raise TypeError(f"{name} must be a list or tuple of tensors, got {type(values).__name__}")
    found = list(values)
    if not found:
        raise ValueError(f"{name} is empty; give at least one tensor")
    if isinstance(others, list) and len(found) != len(others):
        raise ValueError(f"{name} has {len(found)} tensors but {other} has {len(others)}; they go in pairs")
    return found


def factor(name: str, value: object) -> Tensor | float:
    """A float, or a 0-d tensor."""
    if is_real(value):
        return float(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a float or a 0-d torch.Tensor, got {type(value).__name__}")
    if floating(name, value).dim() != 0:
        raise ValueError(f"{name} must be a float or a 0-d tensor, got shape {tuple(value.shape)}")
    return value
