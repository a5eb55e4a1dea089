"""The aggregate posterior of a batch, ``q(z_i) = sum_j W_ij q(z_i | x_j)``, and its marginals ``q(z_id)``: for each
sample two logarithms of sums over the batch, the second one for each latent, without a ``[B, B, D]`` tensor.

The joint density is that of a mixture of as many components (``_mixtures``). The marginals are computed block by block,
forward and backward, so that a block stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ._functorch import unseen
from ._gaussian import compute_dtype
from ._mixtures import LOG_2PI, Density, gradients

# numbers of a block [latents, rows, B]
BLOCK = 1 << 16


class Weights(NamedTuple):
    """log W: ``base`` but in two columns of each row, ``[B]`` indices, and what stands there, ``[B]``."""

    base: float
    columns: tuple[Tensor, Tensor] | None = None
    logs: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, rows: slice, more: float) -> Tensor:
        """To exponents ``[..., rows, B]`` the weights' logarithms and a number; in place."""
        x.add_(self.base + more)
        return self.distinguish(x, rows)

    def distinguish(self, x: Tensor, rows: slice) -> Tensor:
        """The two columns, where base was added already; in place."""
        if self.columns is not None and self.logs is not None:
            index = torch.arange(x.shape[-2], device=x.device)
            for column, log in zip(self.columns, self.logs):
                x[..., index, column[rows]] += (log[rows] - self.base).to(x.dtype)
        return x

    def matrix(self, like: Tensor) -> Tensor:
        """``[B, B]``."""
        b = like.shape[0]
        found = torch.zeros(b, b, dtype=like.dtype, device=like.device)
        return self.add(found, slice(None), 0.0)


def minibatch(b: int, dataset_size: int) -> Weights:
    """Minibatch-weighted sampling: 1 / (N B). Chen et al. 2018 (arXiv:1802.04942), equation 3."""
    return Weights(-math.log(dataset_size * b))


def stratified(b: int, dataset_size: int, published: bool, device: torch.device) -> Weights:
    """Minibatch-stratified sampling: 1 / N for the sample's own posterior, (N - M) / (N M) for one other, 1 / M for the
    rest, M = B - 1. Chen et al. 2018, appendix C.2.

    The published code means to write the first two along diagonals, with strides that write them down the first two
    columns, which is another estimate: it weighs the first sample of a batch as if it were every sample's own.
    """
    m = b - 1
    rows = torch.arange(b, device=device)
    own = torch.full((b,), -math.log(dataset_size), dtype=torch.float64, device=device)
    other = torch.full_like(own, math.log((dataset_size - m) / (dataset_size * m)))
    if not published:
        return Weights(-math.log(m), (rows, (rows + 1) % b), (own, other))
    own[m - 1] = other[m - 1]
    return Weights(-math.log(m), (torch.zeros_like(rows), torch.ones_like(rows)), (own, other))


def plain(z: Tensor, mu: Tensor, logvar: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """As it is read, in operations that autograd, transforms and exports follow."""
    squares = ((z.unsqueeze(1) - mu) * torch.exp(-0.5 * logvar)) ** 2
    each, w = -0.5 * (squares + logvar + LOG_2PI), weights.matrix(z)
    return torch.logsumexp(each.sum(2) + w, 1), torch.logsumexp(each + w.unsqueeze(2), 1).sum(1)


class Kernels(Protocol):
    """What the extension computes of :class:`Marginals`, by the fields' names."""

    def marginals_forward(
        self, z: Tensor, mu: Tensor, slope: Tensor, constant: Tensor, columns: Sequence[Tensor],
        logs: Sequence[Tensor], /,
    ) -> Tensor: ...  # fmt: skip

    def marginals_backward(
        self, g: Tensor, marginals: Tensor, z: Tensor, mu: Tensor, slope: Tensor, constant: Tensor,
        columns: Sequence[Tensor], logs: Sequence[Tensor], /,
    ) -> list[Tensor]: ...  # fmt: skip


# the extension's, which :mod:`vaefast._native` brings, and the devices that they are for
kernels: Kernels | None = None
DEVICES = ("cpu",)


class Marginals:
    """``log q(z_id)`` less what all of them have in common, ``[D, B]``: what is added up over the batch lies side by
    side.

    The sums' terms are ``e^(constant - t^2)`` with ``t = (z - mu) slope``, the slope being ``e^(-logvar / 2) / sqrt 2``
    and the constant ``-logvar / 2``. What is in common would be rounded alike in each, and add up over the latents.
    """

    def __init__(self, z: Tensor, mu: Tensor, logvar: Tensor, weights: Weights, native: bool) -> None:
        dtype = compute_dtype(z, mu, logvar)
        self.z, self.mu, lv = (t.to(dtype).t().contiguous() for t in (z, mu, logvar))
        self.slope = torch.exp(-0.5 * lv).mul_(math.sqrt(0.5))
        self.constant = -0.5 * lv
        self.common = weights.base - 0.5 * LOG_2PI
        self.weights = weights
        self.kernels = kernels if native and z.device.type in DEVICES else None

    def given(self) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
        """As kernels take them."""
        columns = [t.to(self.z.dtype) for t in self.weights.columns or ()]
        logs = [(t - self.weights.base).to(self.z.dtype) for t in self.weights.logs or ()]
        return self.z, self.mu, self.slope, self.constant, columns, logs

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Latents and rows."""
        d, b = self.z.shape
        ds = max(1, min(d, BLOCK // max(1, b * b)))
        rows = max(1, min(b, BLOCK // max(1, b * ds)))
        return ((slice(k, k + ds), slice(i, i + rows)) for k in range(0, d, ds) for i in range(0, b, rows))

    def exponents(self, k: slice, i: slice) -> tuple[Tensor, Tensor]:
        """Of some latents and rows: t, and the logarithms of the terms."""
        t = self.z[k, i].unsqueeze(2) - self.mu[k].unsqueeze(1)
        t.mul_(self.slope[k].unsqueeze(1))
        x = torch.addcmul(self.constant[k].unsqueeze(1), t, t, value=-1)
        return t, self.weights.distinguish(x, i)

    def forward(self) -> Tensor:
        if self.kernels is not None:
            return self.kernels.marginals_forward(*self.given())
        found = torch.empty_like(self.z)
        for k, i in self.blocks():
            x = self.exponents(k, i)[1]
            top = x.amax(2, keepdim=True)
            top.masked_fill_(top.abs() == math.inf, 0.0)
            found[k, i] = x.sub_(top).exp_().sum(2, keepdim=True).log_().add_(top).squeeze(2)
        return found

    def backward(self, marginals: Tensor, g: Tensor) -> list[Tensor]:
        """The gradients ``[B, D]`` in z, mu and logvar, of g ``[B]`` times the sum over latents."""
        g = g.to(self.z.dtype)
        if self.kernels is not None:
            return [t.t() for t in self.kernels.marginals_backward(g.contiguous(), marginals, *self.given())]
        dz, dmu, dlv = torch.empty_like(self.z), torch.zeros_like(self.z), torch.zeros_like(self.z)
        for k, i in self.blocks():
            t, r = self.exponents(k, i)
            r.sub_(marginals[k, i].unsqueeze(2)).exp_().mul_(g[i].view(1, -1, 1))
            dlv[k] -= 0.5 * r.sum(1)
            r.mul_(t)
            dz[k, i] = (r * self.slope[k].unsqueeze(1)).sum(2)
            dmu[k] += r.sum(1)
            dlv[k] += r.mul_(t).sum(1)
        return [dz.mul_(-2).t(), dmu.mul_(self.slope).mul_(2).t(), dlv.t()]


def joint(z: Tensor, mu: Tensor, logvar: Tensor, weights: Weights) -> Density:
    # a mixture of B components weighs each by 1 / B
    more = math.log(max(1, z.shape[0]))
    return Density(z, mu, logvar, None, lambda rows, x: weights.add(x, rows, more))


def value(
    z: Tensor, mu: Tensor, logvar: Tensor, weights: Weights, native: bool
) -> tuple[Tensor, Tensor, Tensor, Density, list[Tensor]]:
    """log q(z_i) and sum_d log q(z_id), both ``[B]`` in float64, the summands ``[D, B]``, and what the first was
    computed from and by."""
    density = joint(z, mu, logvar, weights)
    found, kept = density.every()
    of_each = Marginals(z, mu, logvar, weights, native)
    marginals = of_each.forward()
    whole = marginals.sum(0, dtype=torch.float64).add_(z.shape[1] * of_each.common)
    return found, whole, marginals, density, kept


def backward(
    z: Tensor, mu: Tensor, logvar: Tensor, weights: Weights, native: bool, marginals: Tensor, g: Tensor,
    of_marginals: Tensor, density: Density | None = None, kept: Sequence[Tensor] = (),
) -> list[Tensor]:  # fmt: skip
    """The gradients in z, mu and logvar."""
    dtype = compute_dtype(z, mu, logvar)
    wide = z.to(dtype), mu.to(dtype), logvar.to(dtype)
    density = density or joint(*wide, weights)
    of_joint = gradients(*wide, None, g, kept, (True, True, True, False), density)
    found = Marginals(*wide, weights, native).backward(marginals, of_marginals)
    return [(a.add_(b) if b is not None else a).to(t.dtype) for a, b, t in zip(found, of_joint, (z, mu, logvar))]


class LogSums(torch.autograd.Function):
    """``apply(weights, native, z, mu, logvar)``."""

    @staticmethod
    def forward(
        ctx: Any, weights: Weights, native: bool, z: Tensor, mu: Tensor, logvar: Tensor
    ) -> tuple[Tensor, Tensor]:
        found, of_marginals, marginals, ctx.density, kept = value(z, mu, logvar, weights, native)
        ctx.weights, ctx.native = weights, native
        ctx.save_for_backward(z, mu, logvar, marginals, *kept)
        return found, of_marginals

    @staticmethod
    def backward(ctx: Any, g: Tensor, of_marginals: Tensor) -> tuple[Tensor | None, ...]:
        z, mu, logvar, marginals, *kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *differentiable(ctx.weights, wanted, [z, mu, logvar], (g, of_marginals))
        found = backward(
            z, mu, logvar, ctx.weights, ctx.native, marginals, g, of_marginals, ctx.density, kept
        )  # fmt: skip
        return None, None, *(t if yes else None for t, yes in zip(found, wanted))


def differentiable(
    weights: Weights, wanted: tuple[bool, ...], arguments: list[Tensor], upstream: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    """The gradients by what is plain, which can be differentiated again."""
    # views are new nodes: where one argument was computed from another, its share must not be counted twice
    own = [t.view_as(t) if yes else t for t, yes in zip(arguments, wanted)]
    values = plain(*(t.double() for t in own), weights)
    trained = [t for t, yes in zip(own, wanted) if yes]
    found = iter(torch.autograd.grad(values, trained, upstream, create_graph=True))
    return [next(found) if yes else None for yes in wanted]


# -- as torch.compile takes them: operators that it does not look into


@torch.library.custom_op("vaefast::aggregate_posterior", mutates_args=())
def _value_op(
    z: Tensor, mu: Tensor, logvar: Tensor, native: bool, base: float, columns: list[Tensor], logs: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    return value(z, mu, logvar, _weights(base, columns, logs), native)[:3]


@_value_op.register_fake
def _(
    z: Tensor, mu: Tensor, logvar: Tensor, native: bool, base: float, columns: list[Tensor], logs: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    each = z.new_empty(z.shape[0], dtype=torch.float64)
    return each, torch.empty_like(each), z.new_empty(z.shape[1], z.shape[0], dtype=compute_dtype(z, mu, logvar))


@torch.library.custom_op("vaefast::aggregate_posterior_backward", mutates_args=())
def _backward_op(
    z: Tensor, mu: Tensor, logvar: Tensor, native: bool, base: float, columns: list[Tensor], logs: list[Tensor],
    marginals: Tensor, g: Tensor, of_marginals: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    found = backward(z, mu, logvar, _weights(base, columns, logs), native, marginals, g, of_marginals)
    dz, dmu, dlogvar = (t.contiguous() for t in found)
    return dz, dmu, dlogvar


@_backward_op.register_fake
def _(
    z: Tensor, mu: Tensor, logvar: Tensor, native: bool, base: float, columns: list[Tensor], logs: list[Tensor],
    marginals: Tensor, g: Tensor, of_marginals: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dz, dmu, dlogvar = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (z, mu, logvar))
    return dz, dmu, dlogvar


def _weights(base: float, columns: list[Tensor], logs: list[Tensor]) -> Weights:
    return Weights(base, (columns[0], columns[1]), (logs[0], logs[1])) if columns else Weights(base)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, mu, logvar, ctx.native, ctx.base, columns, logs = inputs
    ctx.save_for_backward(z, mu, logvar, output[2], *columns, *logs)


def _backward(ctx: Any, g: Tensor, of_marginals: Tensor, _: Tensor) -> tuple[Any, ...]:
    z, mu, logvar, marginals, *more = ctx.saved_tensors
    lists = more[: len(more) // 2], more[len(more) // 2 :]
    found = _backward_op(z, mu, logvar, ctx.native, ctx.base, *lists, marginals, g, of_marginals)
    return *(t if yes else None for t, yes in zip(found, ctx.needs_input_grad)), None, None, *([None] * len(t) for t in lists)


_value_op.register_autograd(_backward, setup_context=_setup)


def log_sums(z: Tensor, mu: Tensor, logvar: Tensor, weights: Weights, native: bool) -> tuple[Tensor, Tensor]:
    """log q(z_i) and sum_d log q(z_id), ``[B]`` in float64, of checked ``[B, D]`` tensors; ``native`` by kernels, where
    there are any."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        columns, logs = list(weights.columns or ()), list(weights.logs or ())
        joint, marginals, _ = _value_op(z, mu, logvar, native, weights.base, columns, logs)
        return joint, marginals
    if not unseen(z, mu, logvar):
        return plain(z.double(), mu.double(), logvar.double(), weights)
    if torch.is_grad_enabled() and (z.requires_grad or mu.requires_grad or logvar.requires_grad):
        joint, marginals = LogSums.apply(weights, native, z, mu, logvar)
        return joint, marginals
    return value(z, mu, logvar, weights, native)[:2]
