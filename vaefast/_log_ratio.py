"""log p(z) - log q(z) at given draws z, for diagonal Gaussians: a sum for each of [K, B], with closed-form gradients.

Nothing is kept for backward but the arguments. Large draws on the CPU go block by block, so that what lies between
stays in the cache. What is differentiated again, traced or transformed goes by :func:`plain`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._closed import BLOCK
from ._functorch import alone, unseen
from ._gaussian import Prior, as_tensor, half, rows
from ._nodes import again, given, keep
from ._torch import trained

LOG_2PI = math.log(2 * math.pi)


def log_ratio(z: Tensor, mu: Tensor, logvar: Tensor, with_prior: bool, pm: Prior = None, plv: Prior = None) -> Tensor:
    """``[K, B]`` from z ``[K, B, ...]``, mu and logvar ``[B, ...]`` and what broadcasts to them, all in one dtype; of
    the prior N(pm, e^plv) where there is one, and else -log q(z) alone."""
    arguments = with_prior, z, mu, logvar, pm, plv
    if not z.numel() or not unseen(*(t for t in arguments if isinstance(t, Tensor))):
        return plain(*arguments)
    if not trained(*arguments):
        return value(*arguments)
    found: Tensor = _LogRatio.apply(*arguments)
    return found


def plain(with_prior: bool, z: Tensor, mu: Tensor, logvar: Tensor, pm: Prior, plv: Prior) -> Tensor:
    """In operations that autograd, a transform or a compiler follows."""
    twice = ((z - mu) * torch.exp(-0.5 * logvar)) ** 2 + logvar
    if not with_prior:
        return 0.5 * rows(twice + LOG_2PI, 2)
    pm, plv = as_tensor(pm, z), as_tensor(plv, z)
    return 0.5 * rows(twice - (((z - pm) * torch.exp(-0.5 * plv)) ** 2 + plv), 2)


def value(with_prior: bool, z: Tensor, mu: Tensor, logvar: Tensor, pm: Prior, plv: Prior) -> Tensor:
    inverse, of_prior = _inverse(logvar), _inverse(plv) if with_prior else None
    sums = []
    for draws in _blocks(z):
        square = torch.sub(draws, mu).mul_(inverse)
        square.mul_(square)
        if with_prior:
            s = _standard(draws, pm, of_prior)
            square.addcmul_(s, s, value=-1)
        sums.append(rows(square, 2))
    twice = sums[0] if len(sums) == 1 else torch.cat(sums)
    logs = logvar
    if not with_prior:
        twice.add_(LOG_2PI * math.prod(z.shape[2:]))
    elif plv is not None:
        logs = logvar - plv
    return twice.add_(rows(logs, 1)).mul_(0.5)


def gradients(
    wanted: Sequence[bool],
    g: Tensor,
    with_prior: bool,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    pm: Prior,
    plv: Prior,
) -> list[Tensor | None]:
    """Of the sum of g times the value, in those of the five tensors in which they are wanted."""
    of_z, of_mu, of_logvar, of_pm, of_plv = wanted
    inverse, of_prior = _inverse(logvar), _inverse(plv) if with_prior else None
    g = g.view(*g.shape, *(1,) * (z.dim() - 2))
    of_prior_too = with_prior and (of_z or of_pm or of_plv)
    dz: list[Tensor] = []
    # over the draws, what mu's, logvar's, pm's and plv's gradients are made of
    sums: list[Tensor | None] = [None] * 4
    for draws, upstream in zip(_blocks(z), g.split(_step(z))):
        r = torch.sub(draws, mu).mul_(inverse)
        weighted = r * upstream
        if of_mu:
            sums[0] = _added(sums[0], weighted)
        if of_logvar:
            sums[1] = _added(sums[1], r.mul_(weighted))
        share = weighted.mul_(inverse)
        if of_prior_too:
            s = _standard(draws, pm, of_prior)
            weighted = s * upstream
            if of_pm:
                sums[2] = _added(sums[2], weighted)
            if of_plv:
                sums[3] = _added(sums[3], weighted * s)
            share.sub_(weighted if of_prior is None else weighted.mul_(of_prior))
        if of_z:
            dz.append(share)
    total = g.sum(0)
    found = [
        torch.cat(dz) if len(dz) > 1 else dz[0] if dz else None,
        sums[0] if sums[0] is None else sums[0].mul_(inverse).neg_(),
        sums[1] if sums[1] is None else torch.sub(total, sums[1]).mul_(0.5),
        sums[2] if sums[2] is None or of_prior is None else sums[2].mul_(of_prior),
        sums[3] if sums[3] is None else sums[3].sub_(total).mul_(0.5),
    ]
    return [
        f.sum_to_size(t.shape) if f is not None and isinstance(t, Tensor) and f.shape != t.shape else f
        for f, t in zip(found, (z, mu, logvar, pm, plv))
    ]


def _step(z: Tensor) -> int:
    """How many draws are a block."""
    return max(1, BLOCK * z.shape[0] // z.numel()) if z.is_cpu and z.numel() >= 2 * BLOCK else z.shape[0]


def _blocks(z: Tensor) -> Sequence[Tensor]:
    blocks: Sequence[Tensor] = z.split(_step(z))
    return blocks


def _inverse(logvar: Prior) -> Any:
    """1 / std; None for 1."""
    if isinstance(logvar, Tensor):
        return torch.exp(half(logvar).neg_())
    return math.exp(-0.5 * logvar) if logvar else None


def _standard(draws: Tensor, mean: Prior, inverse: Any) -> Tensor:
    """(z - mean) / std; the draws themselves for N(0, 1)."""
    d = draws - mean if isinstance(mean, Tensor) or mean else draws
    return d if inverse is None else d * inverse


def _added(total: Tensor | None, each: Tensor) -> Tensor:
    """The sum over the draws, and over those before."""
    return each.sum(0) if total is None else total.add_(each.sum(0))


class _LogRatio(torch.autograd.Function):
    """``apply(with_prior, z, mu, logvar, pm, plv)``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        keep(ctx, arguments, [None] * len(arguments))
        ctx.plain = plain
        return value(*arguments)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled() or not alone():
            with torch.enable_grad():
                return tuple(again(ctx, saved, upstream))
        return None, *gradients(ctx.needs_input_grad[1:], upstream, *given(ctx, saved))
