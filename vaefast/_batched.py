"""The operators under ``torch.vmap``, where it is over gradients: one call for each of the batch, put side by side.

vaefast's functions under ``torch.vmap`` go to the PyTorch engine; these are for the backward of a graph that was made
outside (``vmap(lambda v: autograd.grad(y, x, v))``). The engine's own batching has the same in csrc/autograd/batched.h.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _one_of(index: int, x: Any, dim: Any) -> Any:
    """The argument of call number ``index``."""
    if isinstance(dim, (list, tuple)):
        return [_one_of(index, each, own) for each, own in zip(x, dim)]
    return x if dim is None else x.select(dim, index)


def _one_by_one(operator: Any, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    written = [
        k for k, a in enumerate(operator._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]
    for k in written:
        if args[k] and None in in_dims[k]:
            name = operator._schema.arguments[k].name
            raise RuntimeError(
                f"{operator._schema.name} under vmap: it writes over {name}, which is one tensor for a batch of results"
            )
    results = [operator(*_one_of(k, args, tuple(in_dims))) for k in range(info.batch_size)]
    first = results[0]
    if first is None:
        return None, None
    if isinstance(first, Tensor):
        return torch.stack(results), 0
    columns = [torch.stack(each) for each in zip(*results)]
    return type(first)(columns), type(first)([0] * len(columns))


def register() -> None:
    for name in torch._C._dispatch_get_all_op_names():
        space, _, own = name.partition("::")
        if space == "vaefast" and not own.startswith("_"):
            operator = getattr(torch.ops.vaefast, own).default
            torch.library.register_vmap(name, functools.partial(_one_by_one, operator))
