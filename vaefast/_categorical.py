"""The arithmetic of discrete latents: the KL between two categoricals, one-hot samples, and their gradients.

Rows are latents and columns classes: ``[N, K]``. A row's probabilities are ``p = (1 - u) softmax(l) + u / K``, of which
the share u, ``unimix``, is uniform (Hafner et al. 2023, arXiv:2301.04104).

In eager they have an autograd node of their own, :class:`Latents`, which keeps the softmax, and of the KL what its
gradient needs. Where others are to see the operations, they are PyTorch's: :func:`plain_kl` and :func:`plain_sample`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._closed import BLOCK
from ._functorch import unseen
from ._gaussian import Prior, balanced, expm1_and_h, h

# log ratios beyond which a probability that the softmax has rounded to 0 might count, by dtype
_LIMIT = {torch.float32: 64.0, torch.float64: 512.0}

# where every row's KL is larger, what float64 loses by h(x) = (e^x - 1) - x is nothing beside it
_PLAIN_FROM = 1e-17

# the least share that is left between a uniform number times a sum and the sum
_BELOW_ONE = 1 - 2.0**-52

# KL, what the KL's gradient in the logits is made of, and its gradient in the prior's logits
Terms = tuple[Tensor, Tensor | None, Tensor | None]


def mixed(p: Tensor, unimix: float) -> Tensor:
    """Of probabilities the share ``unimix`` made uniform."""
    return p if unimix == 0 else p * (1 - unimix) + unimix / p.shape[-1]


def _through_softmax(v: Tensor, s: Tensor, share: float) -> Tensor:
    """The gradient in the logits from that in ``share * softmax``, whose value without the share is s."""
    found: Tensor = torch._softmax_backward_data(v, s, -1, s.dtype)
    return found if share == 1 else found.mul_(share)


# -- in operations that autograd, a transform or a compiler follows


def _wide(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()  # which has no float64


def _log_probs(logits: Tensor, unimix: float) -> Tensor:
    log_p = torch.log_softmax(logits, -1)
    return log_p if unimix == 0 else torch.log(mixed(log_p.exp(), unimix))


def _log_of_prior(log_q: Tensor, unimix: float, prior: Prior) -> Tensor:
    if isinstance(prior, Tensor):
        return _log_probs(_wide(prior), unimix)
    return torch.full_like(log_q[..., :1], -math.log(log_q.shape[-1]))


def plain_kl(unimix: float, logits: Tensor, prior: Prior) -> Tensor:
    """KL(q || p) of each row, computed in float64: infinite where p alone is 0."""
    log_q = _log_probs(_wide(logits), unimix)
    log_p = _log_of_prior(log_q, unimix, prior)
    never = log_q == -torch.inf
    # sum q (log q - log p) = sum q h(log p - log q) with h(x) = e^x - 1 - x, for sum q = sum p: no term is negative
    d = torch.where(never, 0.0, log_p - torch.where(never, 0.0, log_q))
    near = d.abs() < 0.5
    q, p = log_q.exp(), log_p.exp()
    each = torch.where(near, q * h(torch.where(near, d, 0.0)), p - q - q * d)
    return torch.where(never, p, each).sum(-1).to(logits.dtype)


def plain_balanced(unimix: float, balance: float | None, logits: Tensor, prior: Tensor | None) -> Tensor:
    return balanced(balance, functools.partial(plain_kl, unimix), (logits,), (prior,))


def plain_sample(unimix: float, logits: Tensor, one_hot: Tensor) -> Tensor:
    """A drawn one-hot vector with the gradient of the probabilities (Bengio et al. 2013, arXiv:1308.3432)."""
    p = mixed(torch.softmax(logits, -1), unimix)
    return one_hot + (p - p.detach())


def relaxed(unimix: float, logits: Tensor, gumbels: Tensor, temperature: float) -> Tensor:
    """softmax((log p + g) / t): Jang et al. 2017 (arXiv:1611.01144), equation 2. What is never drawn stays 0."""
    log_p = logits if unimix == 0 else _log_probs(logits, unimix)
    return torch.softmax((log_p + gumbels) / temperature, -1)


def drawn(p: Tensor, uniforms: Tensor) -> Tensor:
    """One-hot, by the inverse of the distribution function: the first class up to which there is more than a uniform
    number of [0, 1) times the whole. So no class of probability 0 is drawn. A row that is NaN stays one."""
    sums = torch.cumsum(p, -1, dtype=uniforms.dtype)
    whole = sums[..., -1:]
    at = whole * (uniforms.unsqueeze(-1) * _BELOW_ONE)
    if unseen(p, uniforms):
        index = torch.searchsorted(sums, at, right=True)
    else:
        index = (sums <= at).sum(-1, keepdim=True)
    one = (whole - whole + 1).to(p.dtype)
    return torch.zeros_like(p).scatter(-1, index.clamp(max=p.shape[-1] - 1), one)


# -- in closed form


def terms(unimix: float, logits: Tensor, prior: Tensor | None, s: Tensor, wanted: Sequence[bool]) -> Terms:
    """Of rows whose softmax is s. With d = l_p - l_q, the difference of the logits less its mean under s,

        log softmax(l_p) - log softmax(l_q) = d - log(1 + S),    S = sum s h(d),    h(x) = e^x - 1 - x

    in which nothing cancels next to p = q; without unimix, log(1 + S) is the KL."""
    d = logits.neg() if prior is None else prior - logits
    d.sub_((s * d).sum(-1, keepdim=True))
    if not d.amax() < _LIMIT[d.dtype]:
        return _differentiated(unimix, logits, prior, s, wanted)
    for careful in (d.dtype is torch.float64, True):
        kl, of_q, of_p = _terms(unimix, d, s, careful, prior is not None and wanted[1])
        if careful or kl.amin() > _PLAIN_FROM:
            break
    dtype = logits.dtype
    return kl.to(dtype), of_q.to(dtype) if wanted[0] else None, None if of_p is None else of_p.to(dtype)


def _terms(unimix: float, d: Tensor, s: Tensor, careful: bool, of_prior: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    w = d.double()
    if careful:
        m, each = expm1_and_h(d)
        m = m.double()
    else:
        m = torch.expm1(w)
        each = m - w
    total = each.mul_(s).sum(-1, keepdim=True)
    if unimix == 0:
        kl = torch.log1p(total).squeeze(-1)
        # softmax(l_p) - s
        return kl, d.neg(), (m.sub_(total).mul_(s).div_(total + 1) if of_prior else None)
    share = 1 - unimix
    apart = m.sub_(total).mul_(s).div_(total + 1)
    q = mixed(s, unimix)
    x = (apart * share).div_(q)  # p / q - 1
    log = torch.log1p(x)
    each = expm1_and_h(log)[1] if careful else x - log
    kl = (each * q).sum(-1)
    if not of_prior:
        return kl, log.neg_(), None
    t = apart.add_(s)
    return kl, log.neg_(), _through_softmax(x / (x + 1), t, share)


def _differentiated(unimix: float, logits: Tensor, prior: Tensor | None, s: Tensor, wanted: Sequence[bool]) -> Terms:
    """The same by the plain formula, which has the limits."""
    with torch.enable_grad():
        q = logits.detach()
        p = None if prior is None else prior.detach().requires_grad_(wanted[1])
        kl = plain_kl(unimix, q, p)
        of_p = torch.autograd.grad(kl.sum(), p)[0] if p is not None and wanted[1] else None
    log_q = _log_probs(_wide(logits), unimix)
    ratio = torch.where(s > 0, log_q - _log_of_prior(log_q, unimix, prior), 0.0).to(s.dtype) if wanted[0] else None
    return kl.detach(), ratio, of_p


class Latents(torch.autograd.Function):
    """``apply(unimix, balance, with_kl, logits, prior, uniforms)`` -> the sample and the KL, None where it is not asked
    for: ``uniforms`` are the sample's noise, one a row. Both logits are ``[N, K]`` in one dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        unimix: float,
        balance: float | None,
        with_kl: bool,
        logits: Tensor,
        prior: Tensor | None,
        uniforms: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        wanted = ctx.needs_input_grad[3:5]
        z, kl, kept, of_prior = latents(unimix, with_kl, logits, prior, uniforms, wanted)
        ctx.unimix, ctx.balance, ctx.wanted = unimix, balance, wanted
        ctx.save_for_backward(logits, prior, z, *kept, of_prior)
        ctx.set_materialize_grads(False)
        return z, kl

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, dkl: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, prior, z, s, ratio, of_prior = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, None, *_again(ctx, logits, prior, z, dz, dkl), None
        v, of_p = dz, None
        if dkl is not None:
            of_q, of_p = shares(ctx.balance, dkl)
            if ctx.wanted[0]:
                v = ratio * of_q if dz is None else torch.addcmul(dz, ratio, of_q)
        return (
            None,
            None,
            None,
            _through_softmax(v, s, 1 - ctx.unimix) if ctx.wanted[0] and v is not None else None,
            None if of_prior is None or of_p is None else of_prior * of_p,
            None,
        )


def shares(balance: float | None, dkl: Tensor) -> tuple[Tensor, Tensor]:
    """The KL's gradient as q and p are to have it, a column."""
    dkl = dkl.unsqueeze(-1)
    return (dkl, dkl) if balance is None else (dkl * (1 - balance), dkl * balance)


def _again(
    ctx: Any, logits: Tensor, prior: Tensor | None, z: Tensor | None, dz: Tensor | None, dkl: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by what is plain, which can be differentiated again: gradients are enabled."""
    # views are new nodes: where one argument was computed from another, its share must not be counted twice
    own = [t if t is None or not wanted else t.view_as(t) for t, wanted in zip((logits, prior), ctx.wanted)]
    outputs, upstream = [], []
    if dz is not None and z is not None:
        outputs.append(plain_sample(ctx.unimix, own[0], z.detach()))  # type: ignore[arg-type]
        upstream.append(dz)
    if dkl is not None:
        outputs.append(plain_balanced(ctx.unimix, ctx.balance, own[0], own[1]))  # type: ignore[arg-type]
        upstream.append(dkl)
    inputs = [t for t, wanted in zip(own, ctx.wanted) if wanted and t is not None]
    found = iter(torch.autograd.grad(outputs, inputs, upstream, create_graph=True, allow_unused=True))
    first, second = (next(found) if wanted else None for wanted in ctx.wanted)
    return first, second


def latents(
    unimix: float,
    with_kl: bool,
    logits: Tensor,
    prior: Tensor | None,
    uniforms: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor | None, Tensor | None], Tensor | None]:
    """Sample, KL, what the gradient in the logits is made of (the softmax, and the KL's log ratio), and the KL's
    gradient in the prior's logits: block by block, so that what lies between stays in the cache."""
    rows = max(1, BLOCK // logits.shape[-1])
    if logits.shape[0] <= 2 * rows:
        return _block(unimix, with_kl, logits, prior, uniforms, wanted)
    parts = [
        _block(unimix, with_kl, *block, wanted)
        for block in zip(
            logits.split(rows),
            itertools.repeat(None) if prior is None else prior.split(rows),
            itertools.repeat(None) if uniforms is None else uniforms.split(rows),
        )
    ]
    z, kl, kept, of_prior = zip(*parts)
    s, ratio = zip(*kept)
    return _joined(z), _joined(kl), (_joined(s), _joined(ratio)), _joined(of_prior)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat([t for t in parts if t is not None])


def _block(
    unimix: float,
    with_kl: bool,
    logits: Tensor,
    prior: Tensor | None,
    uniforms: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor | None, Tensor | None], Tensor | None]:
    s = torch.softmax(logits, -1)
    z = None if uniforms is None else drawn(mixed(s, unimix), uniforms)
    kl, ratio, of_prior = terms(unimix, logits, prior, s, wanted) if with_kl else (None, None, None)
    return z, kl, (s if wanted[0] else None, ratio), of_prior


# -- either, by what covers the tensors


def sites(
    unimix: float, balance: float | None, with_kl: bool, logits: Tensor, prior: Tensor | None, uniforms: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The sample ``[..., K]`` and the KL ``[...]`` of logits and a prior of one shape and dtype, classes last."""
    given = [t for t in (logits, prior, uniforms) if t is not None]
    if logits.is_cpu and logits.numel() > 0 and unseen(*given):
        shape = logits.shape
        rows = logits.reshape(-1, shape[-1]), None if prior is None else prior.reshape(-1, shape[-1])
        flat = None if uniforms is None else uniforms.reshape(-1)
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            z, kl = Latents.apply(unimix, balance, with_kl, *rows, flat)
        else:
            z, kl, *_ = latents(unimix, with_kl, rows[0], rows[1], flat, (False, False))
        return None if z is None else z.view(shape), None if kl is None else kl.view(shape[:-1])
    z = None
    if uniforms is not None:
        with torch.no_grad():
            one_hot = drawn(mixed(torch.softmax(logits, -1), unimix), uniforms)
        z = plain_sample(unimix, logits, one_hot)
    return z, plain_balanced(unimix, balance, logits, prior) if with_kl else None
