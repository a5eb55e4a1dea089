"""Explicit generators: one a sample, and what of them cannot be traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._checks import wrapped
from ._functorch import tracing

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
    if generator is None:  # exporters know the operator that takes none
        return torch.randn(like.shape, dtype=like.dtype, device=like.device)
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def torch_noises(likes: Sequence[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """For each N(0, 1) of its dtype, from one draw for all where there is one dtype."""
    first = likes[0]
    if any(wrapped(x) or x.dtype != first.dtype for x in likes):
        return [torch_noise(x, generator) for x in likes]
    if tracing():
        # of the tensors' own sizes, in one operation: a draw that goes unused would be left out of the graph
        flat = torch_noise(torch.cat([x.flatten() for x in likes]), generator)
    else:
        flat = torch_noise(first.new_empty(()).expand(sum(x.numel() for x in likes)), generator)
    parts = flat.split([x.numel() for x in likes])
    return [part.view(x.shape) for part, x in zip(parts, likes)]
