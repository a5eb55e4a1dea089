"""Philox4x32-10 and Box-Muller in int64 tensor arithmetic: the reference of ``csrc/philox.h``.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". The noise is a function of (seed, offset, element
index) alone: element i reads word i % 4 of counter offset + i / 4, where i counts in the memory order of the sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._functorch import tracing, transforming
from ._generators import explain_to_compilers

_MUL = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def draw_seed(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Two int64 words, (seed, offset), from the default generator of like's device or from ``generator``, on any."""
    explain_to_compilers(generator)
    device = like.device if generator is None else generator.device
    word = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)
    return torch.cat((word, torch.zeros_like(word))).to(like.device)


def take_counters(like: Tensor, numel: int, generator: torch.Generator | None = None) -> Tensor:
    """The seed of numel elements, as a kernel takes it: on a GPU that is the generator's own seed and its offset, which
    moves on; elsewhere, and where a graph or a transform is in the making, what ``draw_seed`` gives."""
    device = like.device if generator is None else generator.device
    if (
        device.type != "cuda"
        or torch.compiler.is_compiling()
        or transforming()
        or tracing()
        or torch.cuda.is_current_stream_capturing()
    ):
        return draw_seed(like, generator)
    if generator is None:
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + (numel + 3) // 4 * 4)
    seed = generator.initial_seed()
    return torch.tensor((seed - (seed >> 63 << 64), offset // 4), device=like.device)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds; words are int64 tensors that hold 32-bit unsigned values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # an int64 product wraps, and the bits that matter survive: mask after every shift
        p0, p1 = c0 * _MUL[0], c2 * _MUL[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _words(seed: Tensor, numel: int, stream: int) -> tuple[Tensor, ...]:
    index = seed[1] + torch.arange((numel + 3) // 4, device=seed.device)
    word = torch.full_like(index, stream)
    key = (seed[0] & _LOW, (seed[0] >> 32) & _LOW)
    return philox4x32((index & _LOW, (index >> 32) & _LOW, word, torch.zeros_like(index)), key)


def _box_muller(u: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2 * torch.log(u))
    return radius * torch.cos(2 * math.pi * turns), radius * torch.sin(2 * math.pi * turns)


def _signed(word: Tensor, bits: int) -> Tensor:
    return word - ((word >> (bits - 1)) << bits)


def _flat_normal(seed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    pairs: list[Tensor] = []
    if dtype == torch.float64:
        for stream in (0, 1):
            x0, x1, x2, x3 = _words(seed, numel, stream)
            u, t = ((x0 << 21) | (x1 >> 11)), ((x2 << 21) | (x3 >> 11))
            pairs += _box_muller((u + 1).to(dtype) * 2.0**-53, _signed(t, 53).to(dtype) * 2.0**-53)
    else:
        x0, x1, x2, x3 = _words(seed, numel, 0)
        for u, t in ((x0, x1), (x2, x3)):
            uniform = u.to(torch.float32) * 2.0**-32 + 2.0**-32
            pairs += _box_muller(uniform, _signed(t, 32).to(torch.float32) * 2.0**-32)
    flat = torch.stack(pairs, 1).flatten()
    if torch.compiler.is_exporting():  # of whose batch no slice can be shown to fit
        return flat[torch.arange(numel, device=seed.device)]
    return flat[:numel]


def normal(seed: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard normal noise shaped like ``like``; float32, or float64 with 53-bit uniforms."""
    z = torch.empty_like(like, device="meta")
    flat = _flat_normal(seed, like.numel(), dtype)
    if not like.numel():
        return flat.reshape(z.shape)
    if transforming() or tracing():
        # under vmap a sample's strides skip over the others' elements, and as_strided is refused, and torch.jit.trace
        # keeps strides as numbers, those of the batch that it saw: their order is what counts. Not so while compiling,
        # where to compare strides would be to compile for them.
        order = sorted(range(z.dim()), key=z.stride, reverse=True)
        return flat.view([z.shape[d] for d in order]).permute([order.index(d) for d in range(z.dim())])
    return flat.as_strided(z.shape, z.stride())


def philox_noise(like: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """A kernel's noise for a sample of like's, in the dtype that it would compute in."""
    return normal(take_counters(like, like.numel(), generator), like, dtype)


def philox_noises(
    likes: Sequence[Tensor], dtypes: Sequence[torch.dtype], generator: torch.Generator | None
) -> list[Tensor]:
    """That for many in one call, which share one stream; each takes whole counters of it."""
    counters = [(x.numel() + 3) // 4 for x in likes]
    seed, found = take_counters(likes[0], 4 * sum(counters), generator), []
    taken = torch.zeros_like(seed)
    for x, dtype, own in zip(likes, dtypes, counters):
        found.append(normal(seed + taken, x, dtype))
        taken[1] += own
    return found
