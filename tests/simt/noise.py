"""Noise from the kernels that are loaded. ``python -m simt.noise FILE``, in the executor's environment, saves the
device code's, to be held against the CPU's."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

# a key's and a counter's sign, a counter whose lower word overflows
SEEDS = ((0, 0), (-1, 7), (12345, 2**32 - 2), (-(2**63), 2**62 - 3))
SHAPES = ((1,), (2,), (3,), (5,), (4097,), (3, 1367))


def noise() -> dict[str, Tensor]:
    """Of given seeds, and drawn by forward and again by backward where the sample lies in this order and that."""
    # they import vaefast, which must find the kernels that it is to use in place
    from inputs import FLOATING, draws, generator

    import vaefast

    found = {f"{d}, {seed}, {shape}": draws(seed, shape, d) for d in FLOATING for seed in SEEDS for shape in SHAPES}
    for dtype in FLOATING:
        zero = torch.zeros(3, 6, 5, 7, dtype=dtype)
        layouts = {
            "contiguous": zero,
            "offset": torch.zeros(631, dtype=dtype)[1:].view(zero.shape),
            "transposed": zero.transpose(0, 3),
            "channels last": zero.contiguous(memory_format=torch.channels_last),
            "chunk": torch.zeros(3, 12, 5, 7, dtype=dtype).chunk(2, 1)[1],
            "every other": torch.zeros(3, 6, 5, 14, dtype=dtype)[..., ::2],
        }
        for layout, mu in layouts.items():
            raw = mu.detach().requires_grad_()
            z = vaefast.reparameterize(mu, raw, generator=generator(3))
            found[f"{dtype}, {layout}"] = z.detach()
            # d z / d raw is half the noise where the standard deviation is e^(raw / 2) at raw = 0
            (half,) = torch.autograd.grad(z.sum(), raw)
            found[f"{dtype}, {layout}, backward"] = 2 * half
    return found


if __name__ == "__main__":
    from . import plugin  # noqa: F401  (the device code becomes vaefast._C)

    torch.save(noise(), sys.argv[1])
