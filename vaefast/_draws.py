"""What importance weights are asked of: K draws for each sample of a batch, checked, and their log weights."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _arguments, _backends, _options
from ._checks import floating, same_device
from ._engine import Engine, LogRatio, Reconstruction
from ._functions import Recon
from ._gaussian import Prior, compute_dtype, logvar_of, wide
from ._options import PER_DRAW, Likelihood, LogProb, Parameterization
from .likelihoods import COMPOSED, entry_of


class Draws(NamedTuple):
    """``[K, B, ...]``: one batch dimension behind that of the draws."""

    of: Reconstruction
    z: Tensor
    mu: Tensor
    raw: Tensor
    p: Parameterization
    prior_mu: Prior
    prior_logvar: Prior
    log_prior: Tensor | None  # [K, B], where the prior is no Gaussian
    batch: torch.Size  # the batch's own dimensions

    def log_weights(self, frozen: bool = False) -> Tensor:
        """``[K, B]``: log p(x|z) + log p(z) - log q(z|x), of a q whose parameters stand still if it is ``frozen``."""
        engine = self._engine()
        return self._ratio(engine, frozen) - engine.nll(self.of, PER_DRAW)

    def bound(self, reduction: str, frozen: bool) -> tuple[Tensor, Tensor]:
        """The negative importance-weighted bound, reduced, and the log weights, which are not differentiated."""
        engine = self._engine()
        return engine.bound(self._ratio(engine, frozen), self.of, reduction)

    def _engine(self) -> Engine:
        first, *rest = self.of.params
        beside = *rest, self.z, self.mu, self.raw, self.prior_mu, self.prior_logvar
        return _backends.engine(first, self.of.target, self.of.weight, likelihood=self.of.likelihood, beside=beside)

    def _ratio(self, engine: Engine, frozen: bool) -> Tensor:
        """``[K, B]``: log p(z) - log q(z|x)."""
        mu, raw = (self.mu.detach(), self.raw.detach()) if frozen else (self.mu, self.raw)
        pm, plv = self.prior_mu, self.prior_logvar
        z, mu, raw = _in(compute_dtype(self.z, mu, raw, pm, plv), self.z, mu, raw)
        ratio = engine.log_ratio(LogRatio(z, mu, logvar_of(raw, self.p.spec), pm, plv, self.log_prior is None))
        if self.log_prior is None:
            return ratio
        return ratio + 0.5 * LOG_2PI * math.prod(mu.shape[1:]) + self.log_prior

    def restored(self, x: Tensor) -> Tensor:
        """With the batch's own dimensions, which come last."""
        return x if len(self.batch) == 1 else x.unflatten(-1, self.batch)


LOG_2PI = math.log(2 * math.pi)


def _in(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


def checked(
    recon: Recon,
    target: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Prior,
    prior_logvar: Prior,
    *,
    likelihood: str | Likelihood,
    parameterization: str | Parameterization,
    weight: Tensor | None,
    prior: LogProb | None,
    prior_parameterization: str | Parameterization,
    batch_dims: int,
) -> Draws:
    p, of_prior = _options.parameterization(parameterization), prior_parameterization
    mu, logvar = _arguments.posterior(mu, logvar)
    dims = _options.batch_dims(batch_dims)
    _arguments.batched_dims("mu", mu, dims)
    z = floating("z", z)
    if z.dim() != mu.dim() + 1 or z.shape[1:] != mu.shape:
        raise ValueError(
            f"z has shape {tuple(z.shape)} but mu has {tuple(mu.shape)}; z is K draws of it, (K, *{tuple(mu.shape)}): "
            "reparameterize(mu, logvar, num_samples=K)"
        )
    if not z.shape[0]:
        raise ValueError("z has no draws; it takes at least one: reparameterize(mu, logvar, num_samples=K)")
    same_device("mu", mu, "z", z.device)
    pm = _arguments.prior("prior_mu", prior_mu, mu)
    plv = _arguments.log_variance(
        _arguments.prior("prior_logvar", prior_logvar, mu),
        _arguments.prior_parameterization_of(of_prior),
        mu,
    )
    of = reconstruction(recon, target, weight, _options.likelihood(likelihood), z, dims)
    same_device("z", z, "recon", of.params[0].device)
    log_prior = None
    if prior is not None:
        if pm is not None or plv is not None:
            raise ValueError("prior and prior_mu or prior_logvar were both given; pass one prior")
        log_prior = log_prob(prior, z, dims)
    batch = mu.shape[:dims]
    if dims != 1:
        of, z = _joined(of, batch), _flat(z, z.dim(), 1, batch)
        mu, logvar, pm, plv = (_flat(t, mu.dim(), 0, batch) for t in (mu, logvar, pm, plv))
        log_prior = None if log_prior is None else log_prior.flatten(1)
    return Draws(of, z, mu, logvar, p, pm, plv, log_prior, batch)


def log_prob(prior: LogProb, z: Tensor, dims: int) -> Tensor:
    """log p(z), ``[K, *batch]``."""
    if not callable(getattr(prior, "log_prob", None)):
        raise TypeError(f"prior must have log_prob(z), as those of torch.distributions, got {type(prior).__name__}")
    found = prior.log_prob(wide(z))
    expected = z.shape[: 1 + dims]
    shape = tuple(found.shape) if isinstance(found, Tensor) else found
    if shape != tuple(expected):
        raise ValueError(
            f"prior.log_prob(z) of z {tuple(z.shape)} gave {shape}; it must give {tuple(expected)}, a number for each "
            "draw: torch.distributions.Independent(prior, 1) adds up"
        )
    return found


def reconstruction(recon: Any, target: Any, weight: Any, chosen: Likelihood, z: Tensor, dims: int) -> Reconstruction:
    """Its target is a view for every draw, which takes no memory."""
    if chosen.name in COMPOSED:
        raise ValueError(
            f"likelihood {chosen.name!r} takes its variance from the data that it is asked of, so that it is no "
            "density of x and has no importance weights; use 'gaussian' with a log variance"
        )
    if isinstance(target, Tensor) and not target.is_floating_point():
        target = _arguments.indices(target, chosen)
    entry = entry_of(chosen.name)
    params = _arguments.parameters(recon, chosen.name, entry)
    first, target = params[0], floating("target", target)
    if first.dim() < 1 + dims or first.shape[: 1 + dims] != z.shape[: 1 + dims]:
        raise ValueError(
            f"recon has shape {tuple(first.shape)} but z is {tuple(z.shape)}; recon begins with "
            f"{tuple(z.shape[: 1 + dims])}, the draws and the batch: decode(z)"
        )
    shown, shape = target.expand(first.shape[0], *target.shape), first.shape
    if entry.planes:
        shape = _arguments.mixture(first, shown, chosen, entry.planes)
    elif target.shape != shape[1:]:
        raise ValueError(
            f"target has shape {tuple(target.shape)} but a draw of recon has {tuple(shape[1:])}; they must be equal: "
            "the target is that of the batch, without the draws"
        )
    same_device("target", target, "recon", first.device)
    if weight is not None:
        _arguments.weight("weight", weight, "recon's sites" if entry.planes else "recon", first, shape)
    return Reconstruction(params, shown, weight, chosen, False)


def _joined(of: Reconstruction, batch: torch.Size) -> Reconstruction:
    """The batch's dimensions, those behind the draws', as one."""
    first, likelihood, count = of.params[0], of.likelihood, len(batch)
    sites = first.dim()
    if "dim" in likelihood.options:
        dim = _arguments.loss_shape(first, likelihood)[1]
        if dim <= count:
            raise ValueError(f"dim of {likelihood!r} is {dim} of recon, among the draws and the batch; it lies behind")
        likelihood = Likelihood(likelihood.name, **{**likelihood.options, "dim": dim - count + 1})
        sites -= 1
    return of._replace(
        params=[_flat(t, first.dim(), 1, batch) for t in of.params],
        target=_flat(of.target, of.target.dim(), 1, batch),
        weight=None if of.weight is None else _flat(of.weight, sites, 1, batch),
        likelihood=likelihood,
    )


def _flat(x: Any, dims: int, before: int, batch: torch.Size) -> Any:
    """x, which if it is a tensor broadcasts to one of so many dimensions, with those of the batch as one."""
    if not isinstance(x, Tensor):
        return x
    own = x.dim() - (dims - before - len(batch))  # of x's dimensions, those up to the batch's end
    if own <= 0:
        return x
    lead = x.shape[: max(0, own - len(batch))]
    return x.expand(*lead, *batch, *x.shape[own:]).flatten(len(lead), len(lead) + len(batch) - 1)
