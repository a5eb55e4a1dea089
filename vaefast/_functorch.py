"""Whether a transform of ``torch.func`` is at work: kernels and their autograd nodes know nothing of its layers."""

from __future__ import annotations

import torch

depth = torch._C._functorch.get_dynamic_layer_stack_depth


def transforming() -> bool:
    return bool(depth() > 0)


# What torch.compiler.assume_constant_result does, which would import the whole compiler. Not every torch can trace
# depth(), and graphs are guarded by the stack of transforms anyway.
transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]
