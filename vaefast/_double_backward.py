"""The backward ops through PyTorch, and so differentiable: what ``create_graph=True`` differentiates.

The kernels compute first derivatives. When those are themselves to be differentiated, the backward op is called with
gradients enabled and comes here: the PyTorch engine is evaluated at the same inputs and noise, and differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _categorical, _torch
from ._engine import Categorical, Experts, LogRatio, Moments, Pair, Reconstruction
from ._gaussian import PARAMETERIZATIONS, compute_dtype
from ._options import PER_DRAW, REDUCTIONS, Likelihood, Parameterization
from .likelihoods import LIKELIHOODS


def _own(t: Tensor) -> Tensor:
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def _gradients(
    f: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor],
    mask: Sequence[int],
) -> list[Tensor]:
    """Differentiable gradients of f's outputs in the masked inputs."""
    with torch.enable_grad():
        # views are new nodes: where one input was computed from another, its share must not be counted twice
        own = [None if t is None else _own(t) for t in inputs]
        wanted = [t for t, m in zip(own, mask) if m and t is not None]
        grads = torch.autograd.grad(f(*own), wanted, upstream, create_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads)]


# the operators below autograd have numbers for these, in the extension's order
_PARAMETERIZATIONS = tuple(PARAMETERIZATIONS)
_REDUCTIONS = (*REDUCTIONS, PER_DRAW)


def _parameterization(number: int, lo: float, hi: float, floor: float) -> Parameterization:
    clamp = None if math.isinf(lo) and math.isinf(hi) else (lo, hi)
    return Parameterization(_PARAMETERIZATIONS[number], clamp=clamp, floor=floor)


def _posterior_backward(
    dz: Tensor | None, dkl: Tensor | None, mu: Tensor, raw: Tensor, prior_mu: Tensor | None, prior_mu_value: float,
    prior_logvar: Tensor | None, prior_logvar_value: float, eps: Tensor | None, seed: Tensor | None,
    parameterization: int, lo: float, hi: float, floor: float, reduction: int, balance: float | None,
    mask: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    with torch._C._AutoDispatchBelowAutograd():  # the kernel checks the arguments
        torch.ops.vaefast.posterior_backward(
            dz, dkl, mu, raw, prior_mu, prior_mu_value, prior_logvar, prior_logvar_value, eps, seed,
            parameterization, lo, hi, floor, reduction, balance, mask,
        )  # fmt: skip
    p = _parameterization(parameterization, lo, hi, floor)

    def forward(mu: Tensor, raw: Tensor, pm: Tensor | None, plv: Tensor | None) -> list[Tensor]:
        out = []
        if dz is not None:
            out.append(_torch.sample(mu, raw, p, eps, None, seed, (prior_mu, prior_logvar)))
        if dkl is not None:
            prior = (prior_mu_value if pm is None else pm, prior_logvar_value if plv is None else plv)
            out.append(_torch.kl(Pair(mu, raw, *prior, p), _REDUCTIONS[reduction], balance))
        return out

    upstream = [t for t in (dz, dkl) if t is not None]
    return _gradients(forward, (mu, raw, prior_mu, prior_logvar), upstream, mask)


def _packed_backward(
    dz: Tensor | None, dkl: Tensor | None, moments: Tensor, dim: int, prior: Tensor | None, prior_lo: float,
    prior_hi: float, seed: Tensor | None, parameterization: int, lo: float, hi: float, floor: float, reduction: int,
    balance: None, mask: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.vaefast.packed_backward(
            dz, dkl, moments, dim, prior, prior_lo, prior_hi, seed,
            parameterization, lo, hi, floor, reduction, balance, mask,
        )  # fmt: skip
    p = _parameterization(parameterization, lo, hi, floor)
    prior_p = _parameterization(_PARAMETERIZATIONS.index("logvar"), prior_lo, prior_hi, 0.0)

    def forward(moments: Tensor, prior: Tensor | None) -> list[Tensor]:
        packed = None if prior is None else (prior, prior_p)
        asked = dz is not None, dkl is not None
        return _torch.packed(Moments(moments, dim, p, packed), _REDUCTIONS[reduction], None, *asked, seed)

    return _gradients(forward, (moments, prior), [t for t in (dz, dkl) if t is not None], mask)


def _reconstruction_backward(
    upstream: Tensor, params: Sequence[Tensor], target: Tensor, weight: Tensor | None, likelihood: str,
    options: Sequence[float], reduction: int, mask: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.vaefast.reconstruction_backward(
            upstream, params, target, weight, likelihood, options, reduction, mask
        )
    chosen = Likelihood(likelihood, **dict(zip(LIKELIHOODS[likelihood].options, options)))

    def forward(*params: Tensor) -> list[Tensor]:
        return [_torch.nll(Reconstruction(params, target, weight, chosen, False), _REDUCTIONS[reduction])]

    return _gradients(forward, params, [upstream], mask)


def _log_ratio_backward(
    g: Tensor, z: Tensor, mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_mu_value: float,
    prior_logvar: Tensor | None, prior_logvar_value: float, prior: bool, mask: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.vaefast.log_ratio_backward(
            g, z, mu, logvar, prior_mu, prior_mu_value, prior_logvar, prior_logvar_value, prior, mask
        )

    def forward(z: Tensor, mu: Tensor, logvar: Tensor, pm: Tensor | None, plv: Tensor | None) -> list[Tensor]:
        of_prior = (prior_mu_value if pm is None else pm, prior_logvar_value if plv is None else plv)
        return [_torch.log_ratio(LogRatio(z, mu, logvar, *of_prior, prior))]

    return _gradients(forward, (z, mu, logvar, prior_mu, prior_logvar), [g], mask)


def _experts_backward(
    dmu: Tensor | None, dlogvar: Tensor | None, mus: Tensor, logvars: Tensor, there: Tensor | None, prior: bool,
    mask: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.vaefast.experts_backward(dmu, dlogvar, mus, logvars, there, prior, mask)
    upstream = (dmu, dlogvar)

    def forward(mus: Tensor, logvars: Tensor) -> list[Tensor]:
        found = _torch.experts(Experts(mus, logvars, there, prior))
        return [t for t, g in zip(found, upstream) if g is not None]

    return _gradients(forward, (mus, logvars), [g for g in upstream if g is not None], mask)


def _categorical_backward(
    dz: Tensor | None, dkl: Tensor | None, logits: Tensor, prior: Tensor | None, dim: int, unimix: float,
    reduction: int, balance: float | None, mask: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.vaefast.categorical_backward(dz, dkl, logits, prior, dim, unimix, reduction, balance, mask)

    def forward(logits: Tensor, prior: Tensor | None) -> list[Tensor]:
        out = []
        if dz is not None:  # of the sample no more than its gradient is asked for
            rows = logits.to(compute_dtype(logits)).movedim(dim, -1)
            out.append(_categorical.probabilities(unimix, rows).movedim(-1, dim).to(logits.dtype))
        if dkl is not None:
            of = Categorical(logits, prior, dim, unimix)
            out += _torch.categorical(of, None, _REDUCTIONS[reduction], balance, True)
        return out

    return _gradients(forward, (logits, prior), [t for t in (dz, dkl) if t is not None], mask)


_LIBRARY: Any = torch.library.Library("vaefast", "IMPL")
_LIBRARY.impl("_differentiable_posterior_backward", _posterior_backward, "CompositeImplicitAutograd")
_LIBRARY.impl("_differentiable_packed_backward", _packed_backward, "CompositeImplicitAutograd")
_LIBRARY.impl("_differentiable_categorical_backward", _categorical_backward, "CompositeImplicitAutograd")
_LIBRARY.impl("_differentiable_experts_backward", _experts_backward, "CompositeImplicitAutograd")
_LIBRARY.impl("_differentiable_log_ratio_backward", _log_ratio_backward, "CompositeImplicitAutograd")
_LIBRARY.impl("_differentiable_reconstruction_backward", _reconstruction_backward, "CompositeImplicitAutograd")
