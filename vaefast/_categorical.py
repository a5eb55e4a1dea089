"""The arithmetic of discrete latents: the KL between two categoricals, one-hot samples, and their gradients.

Rows are latents and columns classes: ``[N, K]``. A row's probabilities are ``p = (1 - u) softmax(l) + u / K``, of which
the share u, ``unimix``, is uniform (Hafner et al. 2023, arXiv:2301.04104).

In eager, where no kernel computes them, they have an autograd node of their own, :class:`Latents`, which keeps the
softmax, and of the KL what its gradient needs. Where others are to see the operations, they are PyTorch's:
:func:`plain_kl` and :func:`plain_sample`.
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

# where every row's KL is larger, what float64 loses by e^x - 1 - x is nothing beside it in float32
_PLAIN_FROM = 1e-8

# what rows of logits differ by on the average, squared, as a multiple of their KL, from which on rounding it shows:
# a KL is off by some 60 roundings at most below
_IN_COMMON = 4096.0

# the least share that is left between a uniform number times a sum and the sum
_BELOW_ONE = 1 - 2.0**-52

# KL, the log ratio of the probabilities, and the KL's gradient in the prior's logits
Terms = tuple[Tensor, Tensor, Tensor | None]


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


def probabilities(unimix: float, logits: Tensor) -> Tensor:
    return mixed(torch.softmax(logits, -1), unimix)


def plain_sample(unimix: float, logits: Tensor, one_hot: Tensor) -> Tensor:
    """A drawn one-hot vector with the gradient of the probabilities (Bengio et al. 2013, arXiv:1308.3432)."""
    p = probabilities(unimix, logits)
    return one_hot + (p - p.detach())


def relaxed(unimix: float, logits: Tensor, gumbels: Tensor, temperature: float) -> Tensor:
    """softmax((log p + g) / t): Jang et al. 2017 (arXiv:1611.01144), equation 2. What is never drawn stays 0."""
    log_p = logits if unimix == 0 else _log_probs(logits, unimix)
    return torch.softmax((log_p + gumbels) / temperature, -1)


def drawn(p: Tensor, uniforms: Tensor) -> Tensor:
    """One-hot of these probabilities."""
    return torch.zeros_like(p).scatter(-1, *_chosen(p, uniforms))


def _chosen(p: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Which class, by the inverse of the distribution function: the first up to which there is more than a uniform
    number of [0, 1) times the whole, so that none of probability 0 is drawn. And the 1 that is put there, or NaN."""
    sums = torch.cumsum(p, -1, dtype=uniforms.dtype)
    whole = sums[..., -1:]
    at = whole * (uniforms.unsqueeze(-1) * _BELOW_ONE)
    if unseen(p, uniforms):
        index = torch.searchsorted(sums, at, right=True)
    else:
        index = (sums <= at).sum(-1, keepdim=True)
    return index.clamp(max=p.shape[-1] - 1), (whole - whole + 1).to(p.dtype)


# -- in closed form


def terms(unimix: float, logits: Tensor, prior: Tensor | None, s: Tensor, of_prior: bool) -> Terms:
    """Of rows whose softmax is s, in float64. With d = l_p - l_q, the difference of the logits less its mean under s,

        log softmax(l_p) - log softmax(l_q) = d - log(1 + S),    S = sum s h(d),    h(x) = e^x - 1 - x

    in which nothing cancels next to p = q; without unimix, log(1 + S) is the KL. The log ratio, log q - log p, may lack
    a number that a row has in common."""
    d = logits.neg() if prior is None else prior - logits
    common = _dot(s, d)
    d.sub_(common)
    if not d.amax() < _LIMIT[d.dtype]:
        return _differentiated(unimix, logits, prior, s, of_prior)
    found = _of_apart(unimix, d, s, of_prior)
    # a difference of logits is rounded as a number of its size is, also where a row has most of it in common, which a
    # softmax does not see; without their greatest the logits are nearer to each other
    if prior is not None and (common.double().square_().squeeze(-1) > _IN_COMMON * found[0]).any():
        d = (prior - prior.amax(-1, keepdim=True)).sub_(logits - logits.amax(-1, keepdim=True))
        d.sub_(_dot(s, d))
        found = _of_apart(unimix, d, s, of_prior)
    return found


def _of_apart(unimix: float, d: Tensor, s: Tensor, of_prior: bool) -> Terms:
    if d.dtype is not torch.float64:
        found = _terms(unimix, d, s, False, of_prior)
        if found[0].amin() > _PLAIN_FROM:
            return found
    return _terms(unimix, d, s, True, of_prior)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vecdot(a, b)
    return found.unsqueeze(-1)


def _terms(unimix: float, d: Tensor, s: Tensor, careful: bool, of_prior: bool) -> Terms:
    """``careful``: whether KLs are so small that e^x - 1 and log(1 + x) need functions of their own, which are slow."""
    w, s = d.double(), s.double()
    m = torch.expm1(w) if careful else torch.exp(w).sub_(1)
    total = _dot(s, expm1_and_h(d)[1].double() if careful else m - w)
    if unimix == 0:
        # softmax(l_p) - s
        return torch.log1p(total).squeeze(-1), d.neg(), m.sub_(total).mul_(s).div_(total + 1) if of_prior else None
    share = 1 - unimix
    apart = m.sub_(total).mul_(s).div_(total + 1)
    q = s + unimix / (share * s.shape[-1])  # times the share, q's probabilities
    x = apart / q  # p / q - 1
    up = x + 1
    log = torch.log1p(x) if careful else torch.log(up)
    kl = _dot(q, expm1_and_h(log)[1] if careful else x - log).squeeze(-1).mul_(share)
    of_p = _through_softmax(x.div_(up), apart.add_(s), share) if of_prior else None
    return kl, log.neg_(), of_p


def _differentiated(unimix: float, logits: Tensor, prior: Tensor | None, s: Tensor, of_prior: bool) -> Terms:
    """The same by the plain formula, which has the limits."""
    with torch.enable_grad():
        q = logits.detach()
        p = None if prior is None else prior.detach().requires_grad_(of_prior)
        kl = plain_kl(unimix, q, p)
        of_p = torch.autograd.grad(kl.sum(), p)[0] if p is not None and of_prior else None
    log_q = _log_probs(_wide(logits), unimix)
    return kl.detach(), torch.where(s > 0, log_q - _log_of_prior(log_q, unimix, prior), 0.0), of_p


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
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor | None], Tensor | None]:
    """Sample, KL, what the gradient in the logits is made of (the softmax, and the KL's log ratio), and the KL's
    gradient in the prior's logits: block by block, so that what lies between stays in the cache."""
    s = torch.softmax(logits, -1)
    of_prior = prior is not None and wanted[1]
    z = None if uniforms is None else torch.zeros_like(s)
    kl = logits.new_empty(logits.shape[0]) if with_kl else None
    ratio = torch.empty_like(s) if with_kl and wanted[0] else None
    of_p = torch.empty_like(s) if with_kl and of_prior else None
    given = [logits, prior, s, uniforms, z, kl, ratio, of_p]
    rows = max(1, BLOCK // logits.shape[-1])
    for block in zip(*(itertools.repeat(None) if t is None else t.split(rows) for t in given)):
        _block(unimix, *block)
    return z, kl, (s, ratio), of_p


def _block(
    unimix: float,
    logits: Tensor,
    prior: Tensor | None,
    s: Tensor,
    uniforms: Tensor | None,
    z: Tensor | None,
    kl: Tensor | None,
    ratio: Tensor | None,
    of_p: Tensor | None,
) -> None:
    """Writes the last four of what comes before them."""
    if z is not None and uniforms is not None:
        z.scatter_(-1, *_chosen(mixed(s, unimix), uniforms))
    if kl is None:
        return
    found = terms(unimix, logits, prior, s, of_p is not None)
    for into, value in zip((kl, ratio, of_p), found):
        if into is not None and value is not None:
            into.copy_(value)


# -- either, by what covers the tensors


def sites(
    unimix: float, balance: float | None, with_kl: bool, logits: Tensor, prior: Tensor | None, uniforms: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The sample ``[..., K]`` and the KL ``[...]`` of logits and a prior of one shape and dtype, classes last."""
    given = [t for t in (logits, prior, uniforms) if t is not None]
    if logits.is_cpu and logits.numel() > 0 and unimix < 1 and unseen(*given):
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
            one_hot = drawn(probabilities(unimix, logits), uniforms)
        z = plain_sample(unimix, logits, one_hot)
    return z, plain_balanced(unimix, balance, logits, prior) if with_kl else None
