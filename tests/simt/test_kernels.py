"""Every kernel against the reference in float64: each op forward and backward, over dtypes, sizes and layouts.

The cases are no full product. Within a test, what is not its subject takes turns: a size, a layout, a reduction and so
on each step through their own list, and every value is met many times in ever other company.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from inputs import (
    CLAMPED_AND_FLOORED,
    ELBO_REDUCTIONS,
    FLOATING,
    LIKELIHOOD_CASES,
    PRIORS,
    REDUCTIONS,
    generator,
    gradients,
    posterior,
    prior_for,
    training,
)
from torch import Tensor

import vaefast
from vaefast import reference
from vaefast.reference import PARAMETERIZATIONS

# around a vector, a warp, a block and a block's share of work; several blocks
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 12293)
# rows that blocks share, rows that are split, none, and empty ones
ROWS = ((7, 5), (300, 3), (257, 33), (3, 1025), (5, 512), (2, 513), (2, 0), (0, 3), (2, 3, 4), (1, 4097))
LONG_ROWS = ((1, 9001), (3, 4099), (40, 515))
# what a kernel may add to the exact result, and the rounding of what it writes
ARITHMETIC = {torch.float16: 2e-6, torch.bfloat16: 2e-6, torch.float32: 2e-6, torch.float64: 1e-13}
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 0.0, torch.float64: 0.0}
# of the noise: Box-Muller's, at its longest radius
NOISE = {torch.float32: 1e-5, torch.float64: 1e-13}
MIXED = ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float64))

Layout = Callable[[Tensor], Tensor]


def offset(by: int) -> Layout:
    return lambda t: torch.cat((t.flatten().new_zeros(by), t.flatten()))[by:].view(t.shape)


def chunk(which: int) -> Layout:
    return lambda t: torch.cat((t + 1 - which, t + which), -1).chunk(2, -1)[which] if t.dim() else t


# the same values, lying elsewhere; but for "expanded", which repeats the first along each dimension
LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda t: t,
    "offset 1": offset(1),
    "offset 2": offset(2),
    "offset 3": offset(3),
    "chunk 0": chunk(0),
    "chunk 1": chunk(1),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t,
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() and t.numel() else t,
    "expanded columns": lambda t: t[..., :1].expand(t.shape) if t.dim() and t.numel() else t,
}


def turns(*lists: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Steps through all lists at once, endlessly; after each round of the first, the others are one further."""
    for round_ in itertools.count():
        for k, first in enumerate(lists[0]):
            step = round_ * len(lists[0]) + k
            yield first, *(values[(step + round_ * n) % len(values)] for n, values in enumerate(lists[1:], 1))


def some(count: int, *lists: Sequence[Any]) -> list[tuple[Any, ...]]:
    return list(itertools.islice(turns(*lists), count))


def wide(x: Any) -> Any:
    """A float64 copy, dense, and a leaf of its own."""
    return x.detach().double().contiguous().requires_grad_() if isinstance(x, Tensor) else x


def leaf(x: Any) -> Any:
    return x.detach().requires_grad_() if isinstance(x, Tensor) else x


def assert_right(actual: Tensor, exact: Tensor, dtype: torch.dtype, terms: float = 1, noise: float = 0) -> None:
    """Within the contract's bound of float64's result; terms: how many of the arithmetic's errors add up."""
    assert actual.shape == exact.shape
    a, e = actual.detach().double(), exact.detach()
    bound = (ARITHMETIC[dtype] * terms + noise) * e.abs().clamp(min=1) + ROUNDING[actual.dtype] * e.abs()
    wrong = ~((a == e) | (a.isnan() & e.isnan()) | ((a - e).abs() <= bound))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(f"{int(wrong.sum())} of {a.numel()} wrong, first at {at}: {a[at]!r}, exact {e[at]!r}")


def compare(native: Sequence[Tensor], exact: Sequence[Tensor], inputs: Sequence[Any], wides: Sequence[Any]) -> None:
    """Outputs, and the gradient of every input that is a tensor."""
    numbers = [(x, w) for x, w in zip(inputs, wides) if isinstance(x, Tensor) and x.requires_grad]
    # as precise as the widest of what comes in
    order = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    dtype = max((x.dtype for x in inputs if isinstance(x, Tensor)), key=order.index)
    for a, e in zip(native, exact):
        assert_right(a, e, dtype)
    elements = max(x.numel() for x, _ in numbers)
    # upstream gradients that each has exactly in its own dtype
    upstream = [(1.5 + torch.rand(o.shape, generator=generator(5 + k))).to(o.dtype) for k, o in enumerate(native)]
    ours = torch.autograd.grad(native, [x for x, _ in numbers], upstream, allow_unused=True)
    theirs = torch.autograd.grad(exact, [w for _, w in numbers], [u.double() for u in upstream], allow_unused=True)
    for (x, _), a, e in zip(numbers, ours, theirs):
        assert (a is None) == (e is None)
        if a is not None and e is not None:
            assert a.dtype == x.dtype
            # where an input broadcasts its gradient sums as many terms as numel says
            assert_right(a, e, dtype, terms=max(1.0, (elements / max(1, x.numel())) ** 0.5))


def check_posterior(inputs: list[Any], reduction: str, parameterization: Any, noise: str) -> None:
    """Sample, KL, and both in one pass. inputs: mu, raw and the prior's two; noise "eps", or "philox"."""
    inputs = [leaf(x) for x in inputs]
    wides = [wide(x) for x in inputs]
    mu = inputs[0]
    arithmetic = torch.float64 if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in inputs) else torch.float32
    options: dict[str, Any] = {"parameterization": parameterization}
    ours: dict[str, Any] = {}
    if noise == "eps":
        eps = torch.randn(mu.shape, generator=generator(9)).to(mu.dtype)
        ours["eps"] = eps
    else:
        # what the reference draws from the same state of the generator
        zero = torch.zeros_like(mu, dtype=arithmetic)
        torch.manual_seed(1)
        eps = reference.reparameterize(zero, zero)
    for function, count in ((vaefast.reparameterize, 2), (vaefast.gaussian_kl, 4), (vaefast.sample_with_kl, 4)):
        exact_of = getattr(reference, function.__name__)
        reduced = {} if count == 2 else {"reduction": reduction}
        sampled = function is not vaefast.gaussian_kl
        torch.manual_seed(1)
        native = function(*inputs[:count], **options, **reduced, **(ours if sampled else {}))
        exact = exact_of(*wides[:count], **options, **reduced, **({"eps": eps.double()} if sampled else {}))
        if count == 2:
            native, exact = (native,), (exact,)
        elif not sampled:
            native, exact = (native,), (exact,)
        if sampled:
            assert native[0].dtype == mu.dtype and native[0].stride() == torch.empty_like(mu).stride()
        compare(native, exact, inputs[:count], wides[:count])
