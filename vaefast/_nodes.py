"""The PyTorch engine's autograd nodes: of a posterior's sample and KL, of a reconstruction, and of an ELBO.

Each keeps gradients that forward computed (``_closed``), and what a differentiable backward would need. Arguments come
checked, in one dtype. Those that are not trained are no inputs of autograd: ``eps``, the target, the weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _closed, _gaussian, _plain
from ._arguments import loss_shape
from ._closed import Room, Scaled, Term, Values
from ._functorch import alone, outside
from ._gaussian import ROWS, Prior, Spec
from ._options import Likelihood
from ._supports import Asked
from .likelihoods import LIKELIHOODS

# no gradients are wanted, of as many arguments as there may be
NONE = (False,) * 16


def kl(
    spec: Spec,
    reduction: str,
    balance: float | None,
    wanted: Sequence[bool],
    mu: Tensor,
    raw: Tensor,
    pm: Prior,
    plv: Prior,
) -> Term:
    """With the gradients in all four."""

    def formula(tensors: Sequence[Tensor], wanted: Sequence[bool], total: bool, room: Room) -> Values:
        if both_numbers:
            q = tensors[0], tensors[1]
            twice, gradients = _gaussian.kl_with_gradients(spec, *q, pm, plv, False, total, room[1] if room else None)
            return twice, 0.5, 0.0, [g if w else None for g, w in zip(gradients, wanted)]
        given = iter(tensors[2:])
        prior = tuple(next(given) if isinstance(t, Tensor) else t for t in (pm, plv))
        twice, found = _gaussian.kl_with_gradients(
            spec, tensors[0], tensors[1], prior[0], prior[1], any(wanted[2:]), total
        )
        if balance is not None:
            found = [(t, f * (balance if n > 1 else 1 - balance)) for n, (t, f) in enumerate(found)]
        rest = [g for g, t in zip(found[2:] or (None, None), (pm, plv)) if isinstance(t, Tensor)]
        return twice, 0.5, 0.0, [g if w else None for g, w in zip([*found[:2], *rest], wanted)]

    both_numbers = not isinstance(pm, Tensor) and not isinstance(plv, Tensor)
    if both_numbers:
        value, found = _closed.term(formula, (mu, raw), wanted[:2], reduction, mu.dim())
        return value, [*found, None, None]
    tensors = [mu, raw, *(t for t in (pm, plv) if isinstance(t, Tensor))]
    flags = [*wanted[:2], *(w for w, t in zip(wanted[2:], (pm, plv)) if isinstance(t, Tensor))]
    value, found = _closed.term(formula, tensors, flags, reduction, mu.dim())
    rest = iter(found[2:])
    return value, [*found[:2], *(next(rest) if isinstance(t, Tensor) else None for t in (pm, plv))]


def multi_kl(spec: Spec, reduction: str, wanted: Sequence[bool], *quads: Any) -> Term:
    """The sum over mu, raw, prior mu and prior log variance in turn, with the gradients in all."""
    terms: list[Tensor] = []
    gradients: list[Scaled | None] = []
    for k in range(0, len(quads), 4):
        term, found = kl(spec, reduction, None, wanted[k : k + 4], *quads[k : k + 4])
        terms.append(term)
        gradients += found
    if terms[0].is_cpu and not terms[0].dim():
        total = _closed.within(sum(t.item() for t in terms), terms[0].dtype)
        return torch.scalar_tensor(total, dtype=terms[0].dtype), gradients
    return torch.stack(terms).sum(0), gradients


def nll(
    likelihood: Likelihood,
    reduction: str,
    dims: int,
    wanted: Sequence[bool],
    x: Tensor,
    w: Tensor | None,
    *params: Tensor,
) -> Term:
    """With the gradients in all arguments."""
    closed, options, count = LIKELIHOODS[likelihood.name].gradients, likelihood.options, len(params)
    assert closed is not None
    once: list[Any] = []

    def formula(tensors: Sequence[Tensor], wanted: Sequence[bool], total: bool, room: Room) -> Values:
        params, x = tensors[:count], tensors[count]
        if w is None:
            values, sum_of_values, factor, constant, found = evaluated(x, params, wanted, room, reduction in ROWS)
            gradients = [g if yes else None for g, yes in zip(found, wanted)]
            # of a number it is not known that it is of fewer values than there are parameters
            as_number = total and values.shape == params[0].shape
            return sum_of_values if as_number else values, factor, constant, gradients
        # what is masked is evaluated at 1, so that whatever it held reaches neither the loss nor a gradient
        weight = tensors[-1]
        shape, dim = loss_shape(params[0], likelihood)
        on = weight != 0

        def over(w: Tensor, t: Tensor) -> Tensor:
            """A mixture's planes have a dimension more than its sites, which are what is weighed."""
            return w.expand(shape).unsqueeze(dim) if dim and t.dim() > len(shape) else w

        # of one class there is no other than 0
        x = torch.where(over(on, x), x, 0.0 if LIKELIHOODS[likelihood.name].support == "class" else 1.0)
        params = [torch.where(over(on, t), t, 1.0) for t in params]
        values, _, factor, constant, found = evaluated(x, params, wanted)
        gradients = [
            (g[0] * over(weight, g[0]), g[1]) if g is not None and yes else None for g, yes in zip(found, wanted)
        ]
        if total and constant:
            constant *= weight.sum().item() / weight.numel()
        elif constant:
            values, factor, constant = values * factor + constant, 1.0, 0.0
        return values * weight, factor, constant, gradients

    def evaluated(
        x: Tensor, params: Sequence[Tensor], wanted: Sequence[bool], room: Room = (), by_rows: bool = False
    ) -> tuple[Tensor, float, float, float, Sequence[Scaled | None]]:
        """Closed's, its values added up already if ``by_rows``, and their sum, known of the CPU's. Where that is not
        finite, or there is no closed form for these, by the plain formula, which has the limits."""
        of = closed(Asked(wanted, once, room), x, *params, **options)
        if of is not None:
            values, factor, constant, found = of
            if by_rows:
                elements = values.numel()
                values = _gaussian.reduced(values, reduction, values.dtype)
                constant *= elements / values.numel()
            sum_of_values = values.sum().item() if values.is_cpu else 0.0
            if math.isfinite(sum_of_values):
                return values, sum_of_values, factor, constant, found
        values, found = differentiated(
            functools.partial(LIKELIHOODS[likelihood.name].nll, x, **options), params, wanted
        )
        return values, values.sum().item() if values.is_cpu else 0.0, 1.0, 0.0, found

    tensors = (*params, x) if w is None else (*params, x, w)
    value, gradients = _closed.term(formula, tensors, (*wanted[2:], False, False), reduction, dims)
    return value, [None, None, *gradients[:count]]


def differentiated(
    f: Callable[..., Tensor], operands: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, list[Scaled]]:
    """Of an elementwise f its values, and the gradients of their sum: unread where they are not wanted."""
    with torch.enable_grad():
        leaves = [t.detach().expand(operands[0].shape).requires_grad_(yes) for t, yes in zip(operands, wanted)]
        values = f(*leaves)
        trained = [t for t in leaves if t.requires_grad]
        found = iter(torch.autograd.grad(values.sum(), trained) if trained else ())
    return values.detach(), [(next(found) if t.requires_grad else t, 1.0) for t in leaves]


def elbo(
    likelihood: Likelihood, reduction: str, dims: int, beta: float, spec: Spec, balance: float | None,
    wanted: Sequence[bool],
    x: Tensor, w: Tensor | None, mu: Tensor, raw: Tensor, pm: Prior, plv: Prior, *params: Tensor,
) -> Term:  # fmt: skip
    """The loss alone, with the gradients in all arguments."""
    found = short_elbo(likelihood, reduction, beta, spec, balance, wanted, x, w, mu, raw, pm, plv, *params)
    if found is not None:
        return found
    loss, of_params = nll(likelihood, reduction, dims, (False, False, *wanted[6:]), x, w, *params)
    value, of_posterior = kl(spec, reduction, balance, wanted[2:6], mu, raw, pm, plv)
    if beta != 1:
        of_posterior = [g and (g[0], beta * g[1]) for g in of_posterior]
    if loss.is_cpu and not loss.dim():
        total = torch.scalar_tensor(_closed.within(loss.item() + beta * value.item(), loss.dtype), dtype=loss.dtype)
    else:
        total = torch.add(loss, value, alpha=beta)
    return total, [None, None, *of_posterior, *of_params[2:]]


def short_elbo(
    likelihood: Likelihood, reduction: str, beta: float, spec: Spec, balance: float | None, wanted: Sequence[bool],
    x: Tensor, w: Tensor | None, mu: Tensor, raw: Tensor, pm: Prior, plv: Prior, *params: Tensor,
) -> Term | None:  # fmt: skip
    """What most calls ask for, one number of few elements on the CPU, without what the others take; else None."""
    closed, first = LIKELIHOODS[likelihood.name].gradients, params[0]
    if reduction == "per_sample" or w is not None or isinstance(pm, Tensor) or isinstance(plv, Tensor):
        return None
    if closed is None or not first.is_cpu or max(first.numel(), mu.numel()) >= 2 * _closed.BLOCK:
        return None
    of = closed(Asked(wanted[6:], []), x, *params, **likelihood.options)
    if of is None or of[0].shape != first.shape:
        return None
    values, factor, constant, of_params = of
    total = values.sum().item() * factor + constant * values.numel()
    if not math.isfinite(total):
        return None
    twice, of_posterior = _gaussian.kl_with_gradients(spec, mu, raw, pm, plv, False, True)
    assert isinstance(twice, float)
    share = 1.0 if reduction == "sum" else 1 / first.shape[0]
    value = torch.scalar_tensor(_closed.within((total + beta * 0.5 * twice) * share, first.dtype), dtype=first.dtype)
    gradients: list[Scaled | None] = [None] * (6 + len(params))
    for k, (g, f) in enumerate(of_posterior, 2):
        if wanted[k]:
            gradients[k] = g, f * beta * share
    for k, scaled in enumerate(of_params, 6):
        if scaled is not None and wanted[k]:
            g, f = scaled
            gradients[k] = (g if g.shape == params[k - 6].shape else _closed.fitted(g, params[k - 6])), f * share
    return value, gradients


class Loss(torch.autograd.Function):
    """``apply(compute, plain, *arguments)``: ``compute(wanted, *arguments)``, a Term; ``plain`` gives its value.

    Among the arguments are tensors, of which some are trained, and others.
    """

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Term], plain: Callable[..., Tensor], *arguments: Any) -> Tensor:
        value, gradients = compute(ctx.needs_input_grad[2:], *arguments)
        ctx.compute, ctx.plain = compute, plain
        keep(ctx, arguments, gradients)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, *again(ctx, saved, upstream)
        kept: list[Any] = [None if k is None else saved[k[0]] for k in ctx.gradients]
        if ctx.used:
            # what was saved is of no transform, whoever maps over upstream gradients
            with outside():
                kept = [g and g[0] for g in ctx.compute(ctx.needs_input_grad[2:], *given(ctx, saved))[1]]
        own = alone()
        ctx.used = ctx.used or own
        return (
            None,
            None,
            *[
                None if k is None else _closed.times(t, k[1], upstream, own and k[2], saved[k[3]])
                for t, k in zip(kept, ctx.gradients)
            ],
        )


class Sample(torch.autograd.Function):
    """``apply(spec, eps, mu, raw)``, for tensors that are :func:`_closed.large`."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, eps: Tensor, mu: Tensor, raw: Tensor) -> Tensor:
        z, slope, ctx.factor = draw(spec, ctx.needs_input_grad[3], mu, raw, eps)
        ctx.spec, ctx.plain = spec, functools.partial(_plain.sample, spec)
        keep(ctx, (eps, mu, raw), [None, None, None if slope is None else (slope, 1.0)])
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *again(ctx, saved, dz)
        if not ctx.needs_input_grad[3]:
            return None, None, dz, None
        eps, slope = saved[0], saved[3] if len(saved) > 3 else None
        if ctx.used:
            _, slope, _ = draw(ctx.spec, True, saved[1], saved[2], eps)
        own = alone()
        ctx.used = ctx.used or own
        share = dz * eps if slope is None else slope.data.mul_(eps).mul_(dz) if own else slope * eps * dz
        if ctx.factor != 1:
            share.mul_(ctx.factor)
        return None, None, dz if ctx.needs_input_grad[2] else None, share


def draw(spec: Spec, wanted: bool, mu: Tensor, raw: Tensor, eps: Tensor) -> tuple[Tensor, Tensor | None, float]:
    """The sample, and what its gradient is multiplied by for raw's: a tensor, None for 1, times a number and eps."""
    if not _closed.large(mu, raw, eps):
        std, slope, factor = _gaussian.std_with_gradient(raw, spec)
        return torch.addcmul(mu, std, eps), slope, factor
    z, kept, factor = torch.empty_like(mu), torch.empty_like(mu) if wanted else None, 1.0
    for m, r, e, out, *slopes in _closed.cut([mu, raw, eps, z] if kept is None else [mu, raw, eps, z, kept]):
        std, slope, factor = _gaussian.std_with_gradient(r, spec)
        torch.addcmul(m, std, e, out=out)
        if slope is None:
            kept = None
        elif slopes:
            slopes[0].copy_(slope)
    return z, kept, factor


# torch.randn's numbers are the same in pieces that begin where one of its packs does, the last of a pack at least
_PACK = 16


def drawn(spec: Spec, mu: Tensor, raw: Tensor, generator: torch.Generator | None) -> Tensor:
    """A sample of :func:`_closed.large` tensors that is not trained: each block's noise is drawn where the sample goes,
    which is written over it while that is in the cache."""
    z = torch.empty(mu.shape, dtype=mu.dtype)
    in_blocks = not 0 < z.numel() % _closed.BLOCK < _PACK
    if not in_blocks:
        z.normal_(generator=generator)
    for m, r, out in _closed.cut([mu, raw, z]):
        if in_blocks:
            out.normal_(generator=generator)
        # a number for many is multiplied and added in a quarter of addcmul's time
        out.mul_(_gaussian.std_of(r, spec)).add_(m)
    return z


def keep(ctx: Any, arguments: Sequence[Any], gradients: Sequence[Scaled | None]) -> None:
    """Saves the arguments and the gradients: where each is, its factor, whether it may be written over, and where its
    argument is."""
    saved: list[Tensor] = []
    others: list[Any] = []
    ctx.others, ctx.used = others, False
    for a in arguments:
        if isinstance(a, Tensor):
            others.append(len(saved))
            saved.append(a)
        else:
            others.append((a,))
    kept: list[tuple[int, float, bool, Any] | None] = []
    ctx.gradients = kept
    for a, g, n in zip(arguments, gradients, others):
        if g is None:
            kept.append(None)
        else:
            kept.append((len(saved), g[1], g[0] is not a, n))
            saved.append(g[0])
    ctx.save_for_backward(*saved)


def again(ctx: Any, saved: Sequence[Tensor], upstream: Tensor | tuple[Tensor, ...]) -> list[Tensor | None]:
    """The arguments' gradients by what is plain, which can be differentiated again: gradients are enabled."""
    own = given(ctx, saved)
    # views are new nodes: where one argument was computed from another, its share must not be counted twice
    own = [t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in own]
    trained = [isinstance(t, Tensor) and t.requires_grad for t in own]
    inputs = [t for t, yes in zip(own, trained) if yes]
    found = iter(torch.autograd.grad(ctx.plain(*own), inputs, upstream, create_graph=True, allow_unused=True))
    return [next(found) if yes else None for yes in trained]


def given(ctx: Any, saved: Sequence[Tensor]) -> list[Any]:
    """The arguments that :func:`keep` was given."""
    return [saved[n] if type(n) is int else n[0] for n in ctx.others]
