"""Whether a transform of ``torch.func`` is at work: kernels and their autograd nodes know nothing of its layers. Or
whatever else is to see PyTorch's own operations."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

depth = torch._C._functorch.get_dynamic_layer_stack_depth


def transforming() -> bool:
    return bool(depth() > 0)


# What torch.compiler.assume_constant_result does, which would import the whole compiler. Not every torch can trace
# depth(), and graphs are guarded by the stack of transforms anyway.
transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]


def of_vmap(x: Tensor) -> bool:
    """Whether x is one of a batch that torch.vmap goes over, whose number is none."""
    return bool(torch._C._functorch.is_batchedtensor(x))


# by which the autograd engine batches gradients (is_grads_batched)
_VMAP_MODE: Any = torch._C._parse_dispatch_key("VmapMode")


def alone() -> bool:
    """Whether a backward pass is one, so that it may write over what forward kept, and not many in a batch."""
    return depth() == 0 and not torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)


def outside() -> AbstractContextManager[object]:
    """Without the transforms, for computing on what is none of their tensors."""
    if depth() == 0:
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    found: AbstractContextManager[object] = temporarily_clear_interpreter_stack()
    return found


def tracing() -> bool:
    """Whether torch.jit.trace records: PyTorch's operators then, which have gradients in a graph and load anywhere."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def unseen(*tensors: Tensor) -> bool:
    """Whether nothing traces, transforms or wraps the tensors' operations, so that they may be any."""
    for t in tensors:
        if type(t) is not Tensor and type(t) is not Parameter:
            return False
    return (
        not torch.compiler.is_compiling()
        and depth() == 0
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )
