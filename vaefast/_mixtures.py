"""The log density of a mixture of diagonal Gaussians: values and gradients without a ``[B, K, D]`` tensor.

Kernels, where there are any, take what is little, and float64. All else is matrix products in float64: with w = e^-lv,
of the exponent's ``sum_d (z - m)^2 w = sum_d z^2 w - 2 sum_d z m w + sum_d m^2 w`` each sum is one, and so are those of
the gradients. What cancels between them is 1e-16 of the largest term. Where that could be seen, and where there is
little to compute or float64 is asked for, the differences are taken one by one, block by block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ._functorch import alone, unseen
from ._gaussian import compute_dtype

LOG_2PI = math.log(2 * math.pi)

# float64 numbers: of a block of the joint density [rows, K], and of differences [rows, components, D]
BLOCK = 1 << 19
DIFFERENCES = 1 << 16

# responsibilities, as many numbers as are kept for backward
KEPT = 1 << 20

# differences from here down are as fast as matrix products, all at once
FEW = 1 << 16

# what the terms of an exponent may come to, so that the rounding of their sum, some 1e-16 of it, is below 1e-7
LARGEST = 1e8

# of float32, more differences than these are faster by matrix products than by kernels
MANY = 1 << 21


class Kernels(Protocol):
    """What the extension computes."""

    def mixture_forward(self, z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None, /) -> Tensor: ...

    def mixture_backward(
        self, g: Tensor, z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None, /
    ) -> list[Tensor]: ...


# the extension's, which :mod:`vaefast._native` brings, and the devices that they are for
kernels: Kernels | None = None
devices: Sequence[str] = ()


def kernels_for(native: bool, z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None) -> Kernels | None:
    if not native or z.device.type not in devices:
        return None
    few = len(z) * mus.numel() <= MANY
    return kernels if few or compute_dtype(z, mus, logvars, logits) == torch.float64 else None


class Components(NamedTuple):
    """A mixture in float64: means from a common centre, inverse variances, and the exponents' constants [K]."""

    m: Tensor
    w: Tensor
    mw: Tensor
    constant: Tensor


def plain(z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None) -> Tensor:
    """The formula as it is read, in operations that autograd, transforms and exports follow."""
    weights = -math.log(mus.shape[0]) if logits is None else torch.log_softmax(logits, 0)
    squares = ((z.unsqueeze(1) - mus) * torch.exp(-0.5 * logvars)) ** 2
    return torch.logsumexp(weights - 0.5 * (squares + logvars + LOG_2PI).sum(2), 1)


def in_one_dtype(z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None) -> Tensor:
    dtype = compute_dtype(z, mus, logvars, logits)
    return plain(z.to(dtype), mus.to(dtype), logvars.to(dtype), None if logits is None else logits.to(dtype))


def components(mus: Tensor, logvars: Tensor, logits: Tensor | None, centre: Tensor | float) -> Components:
    m, lv = mus.double() - centre, logvars.double()
    w = torch.exp(-lv)
    constant = -0.5 * lv.sum(1) - 0.5 * LOG_2PI * mus.shape[1]
    constant = constant - math.log(mus.shape[0]) if logits is None else constant + torch.log_softmax(logits.double(), 0)
    return Components(m, w, m * w, constant)


def by_products(z: Tensor, of: Components) -> bool:
    """Whether the products' rounding is below what float32 shows."""
    if z.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # the answer would have to come from the device
    most = (z * z).amax(0) @ of.w.amax(0) + (of.m * of.mw).sum(1).amax()
    return most.item() <= LARGEST


class Density:
    """log p(z) of float64 rows, from responsibilities ``r[b, k] = p(k | z_b)``, and what they give of the gradients.

    ``weigh(rows, exponents)`` adds what the weights of some rows have beyond the mixture's.
    """

    def __init__(
        self, z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None,
        weigh: Callable[[slice, Tensor], object] | None = None,
    ) -> None:  # fmt: skip
        self.weigh = weigh
        wide = compute_dtype(z, mus, logvars, logits) == torch.float64
        centre = 0.0 if wide else mus.mean(0, dtype=torch.float64)
        self.z = z.double() - centre
        self.of = components(mus, logvars, logits, centre)
        self.products = not wide and z.numel() > 0 and by_products(self.z, self.of)
        if self.products:
            self.exponents = torch.cat((-0.5 * self.of.w, self.of.mw), 1)
            self.constant = self.of.constant - 0.5 * (self.of.m * self.of.mw).sum(1)

    def rows(self) -> Iterator[slice]:
        size = max(1, BLOCK // max(1, len(self.of.m)))
        return (slice(b, b + size) for b in range(0, len(self.z), size))

    def tiles(self, z: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Rows, components, and for these ``z - m`` and ``(z - m) w``."""
        m, w, d = self.of.m, self.of.w, max(1, z.shape[1])
        ks = max(1, min(len(m), DIFFERENCES // d))
        bs = max(1, DIFFERENCES // (d * ks))
        for b in range(0, len(z), bs):
            for k in range(0, len(m), ks):
                i, j = slice(b, b + bs), slice(k, k + ks)
                diff = z[i].unsqueeze(1) - m[j]
                yield i, j, diff, diff * w[j]

    def log_prob(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The density of some rows, and their responsibilities."""
        z = self.z[rows]
        if self.products:
            r = torch.addmm(self.constant, torch.cat((z * z, z), 1), self.exponents.t())
        else:
            r = self.of.constant.expand(len(z), -1).clone()
            for i, j, diff, scaled in self.tiles(z):
                r[i, j] -= 0.5 * diff.mul_(scaled).sum(2)
        if self.weigh is not None:
            self.weigh(rows, r)
        top = r.amax(1, keepdim=True)
        top = top.masked_fill_(top.abs() == math.inf, 0.0)
        total = r.sub_(top).exp_().sum(1, keepdim=True)
        r.div_(total)
        return total.log_().add_(top).squeeze(1), r

    def every(self) -> tuple[Tensor, list[Tensor]]:
        """The density of all rows, and the responsibilities of each block, unless they are too many."""
        found, kept = [], []
        for rows in self.rows():
            each, r = self.log_prob(rows)
            found.append(each)
            if len(self.z) * len(self.of.m) <= KEPT:
                kept.append(r)
        return found[0] if len(found) == 1 else torch.cat(found) if found else self.z.new_zeros(0), kept

    def gradients(
        self, rows: slice, r: Tensor, g: Tensor, of_z: bool, of_components: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of some rows, whose densities have the gradients g: in z, means and log variances."""
        z, (m, w, mw, _) = self.z[rows], self.of
        dz = dm = dlv = None
        if not self.products:
            dz, dm, dlv = torch.zeros_like(z), torch.zeros_like(m), torch.zeros_like(m)
            for i, j, diff, scaled in self.tiles(z):
                share = (r[i, j] * g[i].unsqueeze(1)).unsqueeze(2)
                moved = scaled * share
                dz[i] -= moved.sum(1)
                dm[j] += moved.sum(0)
                dlv[j] += 0.5 * (moved.mul_(diff) - share).sum(0)
            return dz, dm, dlv
        g = g.unsqueeze(1)
        if of_z:
            means, inverse = (r @ torch.cat((mw, w), 1)).chunk(2, 1)
            dz = (means - z * inverse).mul_(g)
        if of_components:
            gz = g * z
            n, zs, squares = (r.t() @ torch.cat((g, gz, gz * z), 1)).split((1, z.shape[1], z.shape[1]), 1)
            moved = zs - m * n
            dm = moved * w
            # sum (z - m)^2 is the squares' sum less m times that of both
            dlv = (squares - m * (zs + moved)).mul_(w).sub_(n).mul_(0.5)
        return dz, dm, dlv


class Few:
    """The same of so few pairs that all differences are taken at once, in few operations."""

    def __init__(self, z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None) -> None:
        half = logvars.double() * -0.5
        self.scale = torch.exp(half)
        self.t = (z.double().unsqueeze(1) - mus).mul_(self.scale)
        self.x = torch.addcmul(half, self.t, self.t, value=-0.5).sum(2)
        self.common = 0.5 * LOG_2PI * mus.shape[1] + (math.log(len(mus)) if logits is None else 0.0)
        self.weights = None
        if logits is not None:
            self.weights = torch.log_softmax(logits, 0, dtype=torch.float64)
            self.x += self.weights

    def log_prob(self, dtype: torch.dtype) -> Tensor:
        return torch.logsumexp(self.x, 1).sub_(self.common).to(dtype)

    def gradients(self, g: Tensor, wanted: tuple[bool, bool, bool, bool]) -> list[Tensor | None]:
        r = torch.softmax(self.x, 1).mul_(g.unsqueeze(1))
        moved, counts = r.unsqueeze(2) * self.t, r.sum(0)
        found: list[Tensor | None] = [None] * 4
        if wanted[0] or wanted[1]:
            scaled = moved * self.scale
            found[0] = scaled.sum(1).neg_() if wanted[0] else None
            found[1] = scaled.sum(0) if wanted[1] else None
        if wanted[2]:
            found[2] = moved.mul_(self.t).sum(0).sub_(counts.unsqueeze(1)).mul_(0.5)
        if wanted[3] and self.weights is not None:
            found[3] = torch.ops.aten._log_softmax_backward_data(counts, self.weights, 0, torch.float64)
        return found


def gradients(
    z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None, g: Tensor, kept: Sequence[Tensor],
    wanted: tuple[bool, bool, bool, bool], density: Density | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Those that are wanted, each in its argument's dtype; ``kept`` are the responsibilities, if they were."""
    density = density or Density(z, mus, logvars, logits)
    g = g.double()
    of_z: list[Tensor | None] = []
    of_components: list[Tensor] = []
    counts = torch.zeros(len(mus), dtype=torch.float64, device=z.device)
    for n, b in enumerate(density.rows()):
        r = kept[n] if kept else density.log_prob(b)[1]
        dz, dm, dlv = density.gradients(b, r, g[b], wanted[0], wanted[1] or wanted[2])
        of_z.append(dz)
        if dm is not None and dlv is not None:
            of_components = [dm, dlv] if not of_components else [a.add_(b) for a, b in zip(of_components, (dm, dlv))]
        if wanted[3]:
            counts += g[b] @ r
    found: list[Tensor | None] = [None] * 4
    if wanted[0]:
        found[0] = torch.cat([t for t in of_z if t is not None]).to(z.dtype) if of_z else torch.zeros_like(z)
    for n, t in ((1, mus), (2, logvars)):
        if wanted[n]:
            found[n] = of_components[n - 1].to(t.dtype) if of_components else torch.zeros_like(t)
    if wanted[3] and logits is not None:
        found[3] = (counts - g.sum() * torch.softmax(logits.double(), 0)).to(logits.dtype)
    return found


def computed(native: bool, z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None) -> Tensor:
    """log p(z), of which nothing is kept."""
    by_kernels = kernels_for(native, z, mus, logvars, logits)
    if by_kernels is not None:
        return by_kernels.mixture_forward(z, mus, logvars, logits)
    return value(z, mus, logvars, logits)[0]


def value(z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None) -> tuple[Tensor, list[Tensor], Density]:
    """log p(z), the responsibilities, unless they are too many, and what both were computed from."""
    density = Density(z, mus, logvars, logits)
    found, kept = density.every()
    return found.to(compute_dtype(z, mus, logvars, logits)), kept, density


class LogProb(torch.autograd.Function):
    """``apply(native, z, mus, logvars, logits)``."""

    @staticmethod
    def forward(ctx: Any, native: bool, *arguments: Any) -> Tensor:
        z, mus, _, _ = arguments
        ctx.kernels = kernels_for(native, *arguments)
        if ctx.kernels is not None:
            ctx.save_for_backward(*arguments)
            return ctx.kernels.mixture_forward(*arguments)  # type: ignore[no-any-return]
        ctx.few = Few(*arguments) if len(z) * mus.numel() <= FEW else None
        if ctx.few is not None:
            ctx.save_for_backward(*arguments)
            return ctx.few.log_prob(compute_dtype(*arguments))  # type: ignore[no-any-return]
        found, kept, ctx.density = value(*arguments)
        ctx.save_for_backward(*arguments, *kept)
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, mus, logvars, logits, *kept = ctx.saved_tensors
        arguments = z, mus, logvars, logits
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or not alone():
            return None, *differentiable(wanted, arguments, g)
        if ctx.kernels is not None:
            found = zip_longest(ctx.kernels.mixture_backward(g, *arguments), wanted)
            return None, *(t if yes else None for t, yes in found)
        if ctx.few is not None:
            each = zip(ctx.few.gradients(g, wanted), arguments)
            return None, *(t if t is None else t.to(like.dtype) for t, like in each)
        return None, *gradients(z, mus, logvars, logits, g, kept, wanted, ctx.density)


def differentiable(wanted: Sequence[bool], arguments: Sequence[Any], g: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients by what is plain, which can be differentiated again, and for many g at once."""
    # views are new nodes: where one argument was computed from another, its share must not be counted twice
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [t.view_as(t) if yes else t for t, yes in zip(arguments, wanted)]
        value = in_one_dtype(*own)
        found = iter(torch.autograd.grad(value, [t for t, yes in zip(own, wanted) if yes], g, create_graph=again))
    return tuple(next(found) if yes else None for yes in wanted)


# -- as torch.compile takes them: operators that it does not look into


@torch.library.custom_op("vaefast::mixture_log_prob", mutates_args=())
def _log_prob_op(z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None, native: bool) -> Tensor:
    return computed(native, z, mus, logvars, logits)


@_log_prob_op.register_fake
def _(z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None, native: bool) -> Tensor:
    return z.new_empty(z.shape[0], dtype=compute_dtype(z, mus, logvars, logits))


@torch.library.custom_op("vaefast::mixture_log_prob_backward", mutates_args=())
def _backward_op(
    z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None, native: bool, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    by_kernels = kernels_for(native, z, mus, logvars, logits)
    if by_kernels is not None:
        found = [*by_kernels.mixture_backward(g, z, mus, logvars, logits), g.new_empty(0)]
        return found[0], found[1], found[2], found[3]
    dz, dm, dlv, dlogits = gradients(z, mus, logvars, logits, g, (), (True, True, True, logits is not None))
    assert dz is not None and dm is not None and dlv is not None
    return dz, dm, dlv, g.new_empty(0) if dlogits is None else dlogits


@_backward_op.register_fake
def _(
    z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None, native: bool, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = torch.empty_like
    return (
        empty(z, memory_format=torch.contiguous_format),
        empty(mus, memory_format=torch.contiguous_format),
        empty(logvars, memory_format=torch.contiguous_format),
        g.new_empty(0) if logits is None else empty(logits),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.native = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    found = _backward_op(*ctx.saved_tensors, ctx.native, g)
    return *(t if yes else None for t, yes in zip(found, ctx.needs_input_grad)), None


_log_prob_op.register_autograd(_backward, setup_context=_setup)


def log_prob(z: Tensor, mus: Tensor, logvars: Tensor, logits: Tensor | None, native: bool) -> Tensor:
    """log p(z) ``[B]`` of checked z ``[B, D]``, mus and logvars ``[K, D]``, logits ``[K]``; ``native`` by kernels."""
    given = [t for t in (z, mus, logvars, logits) if t is not None]
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        found: Tensor = _log_prob_op(z, mus, logvars, logits, native)
        return found
    if not unseen(*given):
        return in_one_dtype(z, mus, logvars, logits)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        found = LogProb.apply(native, z, mus, logvars, logits)
        return found
    return computed(native, z, mus, logvars, logits)
