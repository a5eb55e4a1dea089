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

from ._functorch import alone, unseen
from ._gaussian import compute_dtype
from ._mixtures import LOG_2PI, Density, gradients

# numbers of a block [latents, rows, B]
BLOCK = 1 << 16

# of [B, B, D] so many are quickest taken all at once, and twice as many without kernels
FEW = 1 << 15


class Weights(NamedTuple):
    """log W: ``base`` but in two columns of each row, ``[B]`` indices, and what stands there, ``[B]``."""

    base: float
    columns: tuple[Tensor, Tensor] | None = None
    logs: tuple[Tensor, Tensor] | None = None

    def distinguish(self, x: Tensor, rows: slice) -> Tensor:
        """Adds to exponents ``[..., rows, B]`` what the two columns have beyond base; in place."""
        if self.columns is not None and self.logs is not None:
            index = torch.arange(x.shape[-2], device=x.device)
            for column, log in zip(self.columns, self.logs):
                x[..., index, column[rows]] += (log[rows] - self.base).to(x.dtype)
        return x

    def matrix(self, like: Tensor) -> Tensor:
        """``[B, B]``."""
        b = like.shape[0]
        found = torch.full((b, b), self.base, dtype=like.dtype, device=like.device)
        return self.distinguish(found, slice(None))


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
devices: Sequence[str] = ()


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
        self.weights = weights
        self.kernels = kernels if native and z.device.type in devices else None

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


class Rows(NamedTuple):
    """Of each sample log q(z|x), log q(z) and sum_d log q(z_d), without what :func:`terms` adds; float64, ``[B]``."""

    own: Tensor
    joint: Tensor
    marginals: Tensor


def plain(z: Tensor, mu: Tensor, logvar: Tensor, weights: Weights) -> Rows:
    """As it is read, in operations that autograd, transforms and exports follow."""
    t = (z.unsqueeze(1) - mu) * torch.exp(-0.5 * logvar)
    each, own = -0.5 * (t * t + logvar), (z - mu) * torch.exp(-0.5 * logvar)
    w = weights.distinguish(torch.zeros(len(z), len(z), dtype=z.dtype, device=z.device), slice(None))
    return Rows(
        -0.5 * (own * own + logvar).sum(1),
        torch.logsumexp(each.sum(2) + w, 1),
        torch.logsumexp(each + w.unsqueeze(2), 1).sum(1),
    )


class Few:
    """Of a small batch the densities themselves, ``[B, B, D]``, in float64."""

    def __init__(self, z: Tensor, mu: Tensor, logvar: Tensor, weights: Weights, native: bool) -> None:
        self.z, lv = z.double(), logvar.double()
        self.scale = torch.exp(-0.5 * lv)
        self.t = (self.z.unsqueeze(1) - mu).mul_(self.scale)
        self.x = torch.addcmul(-0.5 * lv, self.t, self.t, value=-0.5)
        self.sums = self.x.sum(2)
        own = self.sums.diagonal().clone()
        if weights.columns is not None:
            w = weights.distinguish(torch.zeros_like(self.sums), slice(None))
            self.sums += w
            self.x += w.unsqueeze(2)
        self.marginals = torch.logsumexp(self.x, 1)
        self.rows = Rows(own, torch.logsumexp(self.sums, 1), self.marginals.sum(1))

    def saved(self) -> tuple[Tensor, ...]:
        return ()

    def backward(self, saved: Sequence[Tensor], g_own: Any, g_joint: Any, g_marginals: Any) -> list[Tensor]:
        share = (self.x - self.marginals.unsqueeze(1)).exp_().mul_(g_marginals)
        joint = (self.sums - self.rows.joint.unsqueeze(1)).exp_().mul_(g_joint)
        joint.diagonal().add_(g_own)
        share.add_(joint.unsqueeze(2))
        moved = share * self.t
        dlv = (moved * self.t).sum(0).sub_(share.sum(0)).mul_(0.5)
        return [(moved * self.scale).sum(1).neg_(), moved.sum(0).mul_(self.scale), dlv]


class Many:
    """Without the densities of pairs."""

    def __init__(self, z: Tensor, mu: Tensor, logvar: Tensor, weights: Weights, native: bool) -> None:
        # a mixture of B components weighs each by 1 / B
        more = 0.5 * LOG_2PI * z.shape[1] + math.log(z.shape[0])
        self.density = Density(z, mu, logvar, None, lambda rows, x: weights.distinguish(x.add_(more), rows))
        self.of_each = Marginals(z, mu, logvar, weights, native)
        self.wide = z.double(), mu.double(), logvar.double()
        z, mu, logvar = self.wide
        self.precision = torch.exp(-logvar)
        self.difference = z - mu
        own = (self.difference * self.difference).mul_(self.precision).add_(logvar).sum(1).mul_(-0.5)
        joint, self.kept = self.density.every()
        self.marginals = self.of_each.forward()
        self.rows = Rows(own, joint, self.marginals.sum(0, dtype=torch.float64))

    def saved(self) -> tuple[Tensor, ...]:
        """What backward is given, handed over: a graph that has run backward keeps none of it."""
        kept, self.kept = self.kept, []
        return self.marginals, *kept

    def backward(self, saved: Sequence[Tensor], g_own: Any, g_joint: Any, g_marginals: Any) -> list[Tensor]:
        marginals, *kept = saved
        ones = torch.ones_like(self.rows.own)
        joint = gradients(*self.wide, None, g_joint * ones, kept, (True, True, True, False), self.density)
        found = self.of_each.backward(marginals, g_marginals * ones)
        moved = self.difference * self.precision
        own = (moved.neg(), moved, (moved * self.difference).sub_(1).mul_(0.5))
        by_sample = g_own.unsqueeze(1) if isinstance(g_own, Tensor) and g_own.dim() else g_own
        return [t.mul_(by_sample).add_(a).add_(b) for t, a, b in zip(own, joint, found) if a is not None]


def terms(rows: Rows, z: Tensor, weights: Weights, standard: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Mutual information, total correlation and dimension-wise KL, the last against N(0, I) if the prior is standard
    and else without the prior's share."""
    own, joint, marginals = rows
    base, d = weights.base, z.shape[1]
    last = marginals + (0.5 * z.double().square().sum(1) if standard else -0.5 * LOG_2PI * d)
    return (
        (own - joint).sub_(base).mean(dtype=dtype),
        (joint - marginals).add_(base - d * base).mean(dtype=dtype),
        last.add_(d * base).mean(dtype=dtype),
    )


class Terms(torch.autograd.Function):
    """``apply(weights, native, standard, dtype, z, mu, logvar)``: :func:`terms`."""

    @staticmethod
    def forward(
        ctx: Any, weights: Weights, native: bool, standard: bool, dtype: torch.dtype, z: Tensor, mu: Tensor,
        logvar: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        few = z.shape[0] * z.numel() <= (FEW if native else 2 * FEW)
        ctx.sums = (Few if few else Many)(z, mu, logvar, weights, native)
        ctx.options = weights, standard, dtype
        ctx.save_for_backward(z, mu, logvar, *ctx.sums.saved())
        return terms(ctx.sums.rows, z, weights, standard, dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        z, mu, logvar, *saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled() or not alone():
            return None, None, None, None, *differentiable(ctx.options, wanted, (z, mu, logvar), upstream)
        g_mi, g_tc, g_last = (g.item() if g.is_cpu else g for g in upstream)
        b = len(z)
        found = ctx.sums.backward(saved, g_mi / b, (g_tc - g_mi) / b, (g_last - g_tc) / b)
        if ctx.options[1]:
            found[0] = found[0] + z.to(found[0].dtype) * (g_last / b)
        return (
            None, None, None, None,
            *(t.to(like.dtype) if yes else None for t, yes, like in zip(found, wanted, (z, mu, logvar))),
        )  # fmt: skip


def differentiable(
    options: tuple[Weights, bool, torch.dtype],
    wanted: Sequence[bool],
    arguments: tuple[Tensor, Tensor, Tensor],
    upstream: tuple[Tensor, ...],
) -> list[Tensor | None]:
    """The gradients by what is plain, which can be differentiated again, and for many upstream at once."""
    again, weights = torch.is_grad_enabled(), options[0]
    with torch.enable_grad():
        # views are new nodes: where one argument was computed from another, its share must not be counted twice
        own = [t.view_as(t) if yes else t for t, yes in zip(arguments, wanted)]
        z, mu, logvar = (t.double() for t in own)
        values = terms(plain(z, mu, logvar, weights), own[0], *options)
        trained = [t for t, yes in zip(own, wanted) if yes]
        found = iter(torch.autograd.grad(values, trained, upstream, create_graph=again))
    return [next(found) if yes else None for yes in wanted]


# -- as torch.compile takes them: operators that it does not look into


@torch.library.custom_op("vaefast::aggregate_posterior", mutates_args=())
def _rows_op(
    z: Tensor, mu: Tensor, logvar: Tensor, native: bool, base: float, columns: list[Tensor], logs: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = Many(z, mu, logvar, _weights(base, columns, logs), native)
    return *found.rows, found.marginals


@_rows_op.register_fake
def _(
    z: Tensor, mu: Tensor, logvar: Tensor, native: bool, base: float, columns: list[Tensor], logs: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own, joint, marginals = (z.new_empty(z.shape[0], dtype=torch.float64) for _ in range(3))
    return own, joint, marginals, z.new_empty(z.shape[1], z.shape[0], dtype=compute_dtype(z, mu, logvar))


@torch.library.custom_op("vaefast::aggregate_posterior_backward", mutates_args=())
def _backward_op(
    z: Tensor, mu: Tensor, logvar: Tensor, native: bool, base: float, columns: list[Tensor], logs: list[Tensor],
    marginals: Tensor, g_own: Tensor, g_joint: Tensor, g_marginals: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sums = Many(z, mu, logvar, _weights(base, columns, logs), native)
    found = sums.backward(sums.saved(), g_own, g_joint, g_marginals)
    dz, dmu, dlogvar = (t.to(like.dtype).contiguous() for t, like in zip(found, (z, mu, logvar)))
    return dz, dmu, dlogvar


@_backward_op.register_fake
def _(
    z: Tensor, mu: Tensor, logvar: Tensor, native: bool, base: float, columns: list[Tensor], logs: list[Tensor],
    marginals: Tensor, g_own: Tensor, g_joint: Tensor, g_marginals: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dz, dmu, dlogvar = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (z, mu, logvar))
    return dz, dmu, dlogvar


def _weights(base: float, columns: list[Tensor], logs: list[Tensor]) -> Weights:
    return Weights(base, (columns[0], columns[1]), (logs[0], logs[1])) if columns else Weights(base)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, mu, logvar, ctx.native, ctx.base, columns, logs = inputs
    ctx.save_for_backward(z, mu, logvar, output[3], *columns, *logs)


def _backward(ctx: Any, g_own: Tensor, g_joint: Tensor, g_marginals: Tensor, _: Tensor) -> tuple[Any, ...]:
    z, mu, logvar, marginals, *more = ctx.saved_tensors
    lists = more[: len(more) // 2], more[len(more) // 2 :]
    upstream = (t.contiguous() for t in (g_own, g_joint, g_marginals))
    found = _backward_op(z, mu, logvar, ctx.native, ctx.base, *lists, marginals, *upstream)
    unused = ([None] * len(t) for t in lists)
    return *(t if yes else None for t, yes in zip(found, ctx.needs_input_grad)), None, None, *unused


_rows_op.register_autograd(_backward, setup_context=_setup)


def terms_of(
    z: Tensor, mu: Tensor, logvar: Tensor, weights: Weights, native: bool, standard: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`terms` of checked ``[B, D]`` tensors; ``native`` by kernels, where there are any."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        columns, logs = list(weights.columns or ()), list(weights.logs or ())
        rows = Rows(*_rows_op(z, mu, logvar, native, weights.base, columns, logs)[:3])
        return terms(rows, z, weights, standard, dtype)
    if not unseen(z, mu, logvar):
        return terms(plain(z.double(), mu.double(), logvar.double(), weights), z, weights, standard, dtype)
    found: tuple[Tensor, Tensor, Tensor] = Terms.apply(weights, native, standard, dtype, z, mu, logvar)
    return found
