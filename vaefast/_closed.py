"""Losses and samples whose gradients have a closed form: computed with the value, in one pass, and kept for backward.

A formula gives its values with the gradients of their sum, in few operations of PyTorch. Large tensors on the CPU go
through it block by block, so that what lies between inputs and results stays in the cache. Kept gradients are used
once: scaled in place and handed over. A second backward, and one that is differentiated itself, goes by ``plain``, the
same in operations that autograd follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ._gaussian import ROWS, constant
from ._gaussian import reduced as summed

# elements: two threads' work, and half a megabyte in float32
BLOCK = 1 << 17

# a tensor times a number
Scaled = tuple[Tensor, float]


# values, factor, constant, gradients: elementwise ``factor * values + constant``, and the gradients of the sum of that
# in each tensor, None where none is wanted. For the values there may be their sum, a number. Gradients are tensors of
# the formula's making, or in every block the operand itself; that of one that is broadcast is as large as the values.
Values = tuple[Tensor | float, float, float, Sequence[Scaled | None]]
# where gradients may be written, one for each tensor or none at all
Room = Sequence[Tensor | None]
# of tensors that broadcast to the first, which gradients are wanted, whether the values' sum will do, and the room
Formula = Callable[[Sequence[Tensor], Sequence[bool], bool, Room], Values]
# a loss, reduced, and what its gradient is multiplied by for each operand's
Term = tuple[Tensor, Sequence[Scaled | None]]


def term(formula: Formula, tensors: Sequence[Tensor], wanted: Sequence[bool], reduction: str, dims: int) -> Term:
    """The formula's values, which have ``dims`` dimensions, reduced. The first tensor has the full shape; the others
    broadcast to it."""
    first = tensors[0]
    scalar = reduction != "none" and reduction not in ROWS
    if first.is_cpu and first.numel() >= 2 * BLOCK:
        # a gradient of one value for many is added up with those of the loss, where there are several
        cuts = scalar or not broadcast(tensors, wanted)
        one_by_one = cuts and reduction not in ROWS and large(*tensors)
        if one_by_one or (cuts and reduction != "none" and first.shape[0] > 1):
            return blockwise(formula, tensors, wanted, reduction, dims, one_by_one)
    values, factor, constant, gradients = formula(tensors, wanted, scalar and first.is_cpu, ())
    if not scalar:
        assert isinstance(values, Tensor)
        elements = values.numel()
        if reduction in ROWS:
            values = summed(values, reduction, values.dtype)
            constant *= elements / values.numel()
        value = values.to(first.dtype) if factor == 1 else values.to(first.dtype) * factor
        return value + constant if constant else value, gradients
    for k, g in enumerate(gradients):
        if g is not None and g[0].shape != tensors[k].shape:
            gradients = [g and (fitted(g[0], t), g[1]) for g, t in zip(gradients, tensors)]
            break
    elements = first.numel() if isinstance(values, float) else values.numel()
    total = values if isinstance(values, float) else values.sum()
    return reduced(total, elements, first, factor, constant * elements, gradients, reduction)


def broadcast(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> bool:
    """Whether a gradient is wanted in one that is broadcast."""
    return any(w and t.shape != tensors[0].shape for t, w in zip(tensors, wanted))


def large(*tensors: Tensor) -> bool:
    """Whether they are so many numbers that blocks pay, each side by side in memory, or one for all."""
    first = tensors[0]
    return (
        first.numel() >= 2 * BLOCK
        and first.is_cpu
        and all(not t.dim() or (t.shape == first.shape and (t.is_contiguous() or not any(t.stride()))) for t in tensors)
    )


def fitted(gradient: Tensor, to: Tensor) -> Tensor:
    return gradient if gradient.shape == to.shape else gradient.sum_to_size(to.shape)


def reduced(
    total: Tensor | float,
    elements: int,
    first: Tensor,
    factor: float,
    constant: float,
    gradients: Sequence[Scaled | None],
    reduction: str,
) -> Term:
    """From the sum of so many values, one number, and that of the constants."""
    if reduction != "sum":
        share = 1 / (elements if reduction == "mean" else first.shape[0])
        factor, constant = factor * share, constant * share
        gradients = [g and (g[0], g[1] * share) for g in gradients]
    if isinstance(total, Tensor) and total.is_cpu:
        total = total.item()
    if isinstance(total, float):
        # numbers are multiplied faster than tensors of one
        return torch.scalar_tensor(within(total * factor + constant, first.dtype), dtype=first.dtype), gradients
    value = total if factor == 1 else total * factor
    return value + constant if constant else value, gradients


def within(value: float, dtype: torch.dtype) -> float:
    """A number as tensors of the dtype have it: infinite beyond their range, where torch refuses to make one of it."""
    most = torch.finfo(dtype).max
    return math.copysign(math.inf, value) if value > most or value < -most else value


def blockwise(
    formula: Formula, tensors: Sequence[Tensor], wanted: Sequence[bool], reduction: str, dims: int, one_by_one: bool
) -> Term:
    """Block by block: of as many elements, or of whole samples. Of values that stay elements, those of the formula have
    the first tensor's shape."""
    first, elementwise = tensors[0], reduction == "none"
    # the gradients of what is not broadcast, written block by block; of what is, added up
    full = [w and t.shape == first.shape for t, w in zip(tensors, wanted)]
    small: dict[int, list[Tensor]] = {i: [] for i, w in enumerate(wanted) if w and not full[i]}
    written = [torch.empty(first.shape, dtype=first.dtype) for yes in (*full, elementwise) if yes]
    # which have the first tensor's dimension 0
    batched = [t.dim() >= dims and t.shape[0] == first.shape[0] for t in tensors]
    scalar = not elementwise and reduction not in ROWS
    parts: list[Tensor] = []
    total, elements = 0.0, 0
    # a block that holds what is odd may have other factors than the rest: theirs are the first one's
    factors: list[float | None] = [None] * len(full)
    # which operands are their own gradients, in every block
    itself: set[int] = set()
    for block in cut([*tensors, *written], None if one_by_one else [*batched, *(True for _ in written)]):
        operands, into = block[: len(full)], iter(block[len(full) :])
        room = [next(into) if yes else None for yes in full]
        values, factor, constant, gradients = formula(operands, wanted, scalar, room)
        count = operands[0].numel() if isinstance(values, float) else values.numel()
        elements += count
        if elementwise:
            assert isinstance(values, Tensor)
            torch.mul(values, factor, out=block[-1])
            if constant:
                block[-1].add_(constant)
        elif scalar:
            total += factor * (values if isinstance(values, float) else values.sum().item()) + constant * count
        else:
            assert isinstance(values, Tensor)
            sums = summed(values, reduction, values.dtype)
            sums = sums * factor if factor != 1 else sums
            parts.append(sums + constant * count / sums.numel() if constant else sums)
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            g, of_this = gradient
            of_all = factors[i]
            if of_all is None:
                of_all = factors[i] = of_this
            kept = room[i]
            if kept is None:
                g = fitted(g, operands[i])
                small[i].append(g if of_this == of_all else g * (of_this / of_all))
                continue
            if g is operands[i]:
                itself.add(i)
                continue
            if g is not kept:
                kept.copy_(g)
            if of_this != of_all:
                kept.mul_(of_this / of_all)
    collected: list[Scaled | None] = []
    whole = iter(written)
    for i, found in enumerate(factors):
        if found is None:
            collected.append(None)
        elif full[i]:
            of_blocks = next(whole)
            collected.append((tensors[i] if i in itself else of_blocks, found))
        else:
            joined = torch.cat(small[i]) if batched[i] and not one_by_one else torch.stack(small[i]).sum(0)
            collected.append((joined, found))
    if elementwise:
        return written[-1], collected
    if scalar:
        return reduced(total, elements, first, 1.0, 0.0, collected, reduction)
    return torch.cat(parts).to(first.dtype), collected


def cut(tensors: Sequence[Tensor], batched: Sequence[bool] | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Block by block: of as many numbers, or of whole samples of those that are ``batched``."""
    first = tensors[0]
    if batched is None:
        count = -(-first.numel() // BLOCK)
        return zip(*(t.view(-1).split(BLOCK) if t.dim() else [t] * count for t in tensors))
    rows = max(1, BLOCK * first.shape[0] // first.numel())
    count = -(-first.shape[0] // rows)
    return zip(*(t.split(rows) if b else [t] * count for t, b in zip(tensors, batched)))


# -- what autograd is given


def times(kept: Tensor, factor: float, g: Tensor, own: bool, like: Tensor) -> Tensor:
    """A kept gradient times that of the loss, written over where it is our own, in its argument's shape and dtype."""
    if own and g.dim() == 0 and g.is_cpu:
        # a loop over them, or an operation, is worth a look at the number
        factor = within(factor * g.item(), kept.dtype)
        found = kept.data if factor == 1 else kept.data.mul_(factor)
    else:
        if factor != 1:
            factor = within(factor, g.dtype)
            g = g * constant(factor, g) if g.dim() == 0 and own else g * factor
        if g.dim():
            g = g.view(*g.shape, *(1,) * (kept.dim() - g.dim()))
        found = kept.data.mul_(g) if own else kept * g
    return found if found.shape == like.shape else found.sum_to_size(like.shape)
