"""Explicit generators: one a sample, and what of them cannot be traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._checks import wrapped

Generators = torch.Generator | Sequence[torch.Generator] | None


def each_its_own(
    draw: Callable[..., Tensor], tensors: Sequence[Tensor], generators: Sequence[torch.Generator], dim: int = 0
) -> Tensor:
    """What ``draw(*tensors, generator)`` gives for each sample alone, side by side along ``dim``, the batch.

    A call for each keeps for backward what each would, 16 bytes; one call with all the noise would keep that.
    """
    if not generators:
        return draw(*tensors, None)
    samples = zip(*(t.split(1, dim) for t in tensors), generators)
    return torch.cat([draw(*sample, generator) for *sample, generator in samples], dim)


def explain_to_compilers(generator: torch.Generator | None) -> None:
    """Breaks the graph where Dynamo would, but says why: under ``fullgraph=True`` this is the error's reason."""
    if generator is not None and torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(
            msg="torch.compile cannot trace a torch.Generator: leave out generator= and seed the default one by "
            "torch.manual_seed, give the noise itself as eps=, or compile without fullgraph=True"
        )


def torch_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """N(0, 1) of PyTorch's own stream."""
    if wrapped(like):
        return torch.randn_like(like)  # which knows the noise of tensors that are made of others
    explain_to_compilers(generator)
    # exporters know the operator that takes no generator
    own = {} if generator is None else {"generator": generator}
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, **own)
