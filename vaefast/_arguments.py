"""What tensors must be, and the groups of arguments that engines take: checked, for either engine alike."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _options
from ._checks import (
    batched,
    broadcasts,
    choice,
    dense,
    factor,
    flag,
    floating,
    is_real,
    is_whole,
    like,
    same_device,
    tensors,
)
from ._engine import Pair, Posteriors, Reconstruction
from ._gaussian import Prior, as_tensor, compute_dtype, logvar_of, softened, wide
from ._options import Composed, KLOptions, Likelihood, Parameterization
from .likelihoods import LikelihoodEntry, entry_of


def posterior(mu: object, logvar: object) -> tuple[Tensor, Tensor]:
    mu = floating("mu", mu)
    return mu, like("logvar", logvar, "mu", mu)


def prior(name: str, value: object, mu: Tensor) -> Prior:
    if value is None:
        return None
    if is_real(value):
        return float(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be None, a float or a torch.Tensor, got {type(value).__name__}")
    broadcasts(name, floating(name, value), "mu", mu.shape)
    same_device(name, value, "mu", mu.device)
    return value


def kl(
    mu: object,
    logvar: object,
    prior_mu: object,
    prior_logvar: object,
    parameterization: str | Parameterization,
    reduction: str,
    balance: object,
    options: Composed,
) -> tuple[Pair, KLOptions]:
    mu, logvar = posterior(mu, logvar)
    p = _options.parameterization(parameterization)
    pm = None if prior_mu is None else prior("prior_mu", prior_mu, mu)
    given: Any = prior_logvar  # which is checked where it is converted, if it is
    plv = given if given is None or "prior_parameterization" in options else prior("prior_logvar", given, mu)
    return with_options(Pair(mu, logvar, pm, plv, p), reduction, balance, options)


def with_options(pair: Pair, reduction: str, balance: object, options: Composed) -> tuple[Pair, KLOptions]:
    """The options, as far as they go with the reduction and the tensors, and the pair that they are for."""
    mu = pair.mu
    if reduction not in _options.REDUCTIONS:
        choice("reduction", reduction, _options.REDUCTIONS)
    if mu.dim() == 0:
        batched("mu", mu, reduction)
    if balance is None and not options:
        return (pair if pair.p.soft_clamp is None else soft_pair(pair, None)), _options.NONE
    found = _options.kl_options(reduction, balance, options)
    if balance is not None:
        _options.kl_balance(balance, pair.prior_mu, pair.prior_logvar)
    if mu.dim() == 0 and (found.capacity is not None or (found.free_bits > 0 and found.free_bits_per != "dim")):
        what = "capacity" if found.capacity is not None else f"free_bits_per={found.free_bits_per!r}"
        raise ValueError(f"{what} needs a batch dimension, but mu is a 0-d tensor; use mu.unsqueeze(0)")
    if found.batch_dims != 1:
        batched_dims("mu", mu, found.batch_dims)
    if found.kl_weight is not None:
        weight("the KL's weight", found.kl_weight, "mu", mu, mu.shape)
    if found.prior is not None:
        other_prior(pair, found)
    if isinstance(found.capacity, Tensor):
        same_device("capacity", found.capacity, "mu", mu.device)
    if "prior_parameterization" in options and not (pair.prior_mu is None and pair.prior_logvar is None):
        p = _options.parameterization(found.prior_parameterization)
        pair = pair._replace(prior_mu=soft_mean(pair.prior_mu, p, mu, found.kl_weight))
        if pair.prior_logvar is not None:
            raw = prior("prior_logvar", pair.prior_logvar, mu)
            if found.kl_weight is not None and isinstance(raw, Tensor):
                raw = torch.where(found.kl_weight != 0, raw, 1.0)  # what it hides has a log variance, too
            pair = pair._replace(prior_logvar=log_variance(raw, p, mu, pair.raw, pair.prior_mu))
    return (pair if pair.p.soft_clamp is None else soft_pair(pair, found.kl_weight)), found


def soft(mu: Tensor, raw: Tensor, p: Parameterization) -> tuple[Tensor, Tensor, Parameterization]:
    """A posterior behind its soft clamp, as engines take it."""
    c = p.soft_clamp
    return (mu, raw, p) if c is None else (softened(mu, c), softened(raw, c), p.hard)


def soft_pair(pair: Pair, weight: Tensor | None) -> Pair:
    given = seen(pair.mu, weight), seen(pair.raw, weight)
    mu, raw, p = soft(*given, pair.p)
    return pair._replace(mu=mu, raw=raw, p=p)


def seen(x: Tensor, weight: Tensor | None) -> Tensor:
    """Without a NaN where the weight hides: the soft clamp's slope there, times 0, would be one."""
    return x if weight is None else torch.where((weight == 0) & x.isnan(), 0.0, x)


def soft_mean(mean: Prior, p: Parameterization, mu: Tensor, weight: Tensor | None) -> Prior:
    """A prior's, behind its own soft clamp."""
    if p.soft_clamp is None or mean is None:
        return mean
    mean = prior("prior_mu", mean, mu)
    return softened(seen(mean, weight) if isinstance(mean, Tensor) else as_tensor(mean, wide(mu)), p.soft_clamp)


def other_prior(pair: Pair, o: KLOptions) -> None:
    """Of a prior that is no Gaussian: its samples are the last dimension."""
    for name, given in (("prior_mu", pair.prior_mu), ("prior_logvar", pair.prior_logvar)):
        if given is not None:
            raise ValueError(f"prior and {name} were both given; prior stands in the place of the Gaussian's two")
    mu, weight = pair.mu, o.kl_weight
    if mu.dim() <= o.batch_dims:
        raise ValueError(
            f"prior takes samples along the last dimension, but mu of shape {tuple(mu.shape)} has none behind the "
            f"batch ({batch_words(o.batch_dims)}); use mu.unsqueeze(-1)"
        )
    if weight is not None and weight.dim() > 0 and weight.shape[-1] != 1:
        raise ValueError(
            f"the KL's weight of shape {tuple(weight.shape)} weighs elements, but prior gives one log density for all "
            "along the last dimension; the weight must have size 1 there"
        )


def batched_dims(name: str, x: Tensor, batch_dims: int) -> None:
    if x.dim() < batch_dims:
        raise ValueError(
            f"batch_dims={batch_dims}, but {name} of shape {tuple(x.shape)} has {x.dim()} dimensions; it takes the "
            "number of those that are the batch"
        )


def weight(name: str, value: object, of: str, first: Tensor, shape: torch.Size) -> None:
    """A mask, or factors; either broadcasts to the terms, whose shape it is."""
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        dense(name, value)
    else:
        value = floating(name, value)
    broadcasts(name, value, of, shape)
    same_device(name, value, of, first.device)


def log_variance(raw: Prior, p: Parameterization, mu: Tensor, *beside: Prior) -> Prior:
    """What a prior's second argument means; computed as the engines compute the posterior's: in float32, or in float64
    where it or one of those beside it is that."""
    if raw is None or p == _options.PLAIN["logvar"]:
        return raw
    dtype = compute_dtype(raw, mu, *beside)
    raw = raw.to(dtype) if isinstance(raw, Tensor) else as_tensor(raw, mu.to(dtype))
    return logvar_of(raw if p.soft_clamp is None else softened(raw, p.soft_clamp), p.spec)


def samples(mu: object, logvar: object, number: object) -> tuple[Tensor, Tensor]:
    """Both as ``[K, B, ...]`` views, which take no memory."""
    mu, logvar = posterior(mu, logvar)
    if not isinstance(number, torch.SymInt):
        if not is_whole(number):
            raise TypeError(f"num_samples must be None or an int, got {number!r}")
        number = operator.index(number)
    if number < 1:
        raise ValueError(f"num_samples must be at least 1, got {number!r}")
    return mu.expand(number, *mu.shape), logvar.expand(number, *logvar.shape)


def generators(value: object, x: Tensor, dim: int | None = 0) -> list[torch.Generator]:
    """One generator, or a list of as many as there are samples along x's dimension ``dim``, if it has samples."""
    if not isinstance(value, (list, tuple)):
        if not isinstance(value, torch.Generator):
            lists = "" if dim is None else "; a list of them, one a sample, is taken too"
            raise TypeError(f"generator must be a torch.Generator, got {type(value).__name__}{lists}")
        return [value]
    if dim is None:
        raise TypeError("generator must be one torch.Generator, got a list of them: there is no batch to divide among")
    for k, each in enumerate(value):
        if not isinstance(each, torch.Generator):
            raise TypeError(f"generator[{k}] must be a torch.Generator, got {type(each).__name__}")
    if x.dim() <= dim:
        raise ValueError("a list of generators needs a batch dimension, but there is none; pass one torch.Generator")
    if len(value) != x.shape[dim]:
        raise ValueError(
            f"generator is a list of {len(value)} but the batch (dimension 0) has {x.shape[dim]} samples; it takes one "
            "for each, or one torch.Generator for all"
        )
    return list(value)


def noise(kind: str | None, eps: object, generator: object, mu: Tensor, dim: int | None = 0) -> Tensor | None:
    """eps, if it is given, where all three go together."""
    if kind is not None:
        choice("noise", kind, _options.NOISE)
    if generator is not None:
        found = generators(generator, mu, dim)
        if eps is not None:
            raise ValueError("eps and generator were both given; eps is the noise itself, so pass one of them")
        for each in found:
            if each.device.type != mu.device.type:
                raise ValueError(
                    f"generator is on {each.device} but mu is on {mu.device}; "
                    f"make it with torch.Generator({mu.device.type!r})"
                )
    if eps is None:
        return None
    eps = floating("eps", eps)
    broadcasts("eps", eps, "mu", mu.shape)
    same_device("eps", eps, "mu", mu.device)
    return eps


def listed(values: Any) -> Any:
    """A tuple of what an iterable has that is neither tensor nor sequence: ``parameters()``, a ``ParameterList``."""
    known = isinstance(values, (Tensor, tuple, list, str, dict)) or not isinstance(values, Iterable)
    return values if known else tuple(values)


def parameters(recon: object, likelihood: str, entry: LikelihoodEntry) -> list[Tensor]:
    """The likelihood's parameters; the first has the full shape."""
    recon = listed(recon)
    given: Sequence[Any] = recon if isinstance(recon, (tuple, list)) else (recon,)
    if not entry.required <= len(given) <= len(entry.params):
        takes = ", ".join(entry.params[: entry.required])
        more = "".join(f"[, {name}]" for name in entry.params[entry.required :])
        raise ValueError(f"recon for {likelihood!r} must be ({takes}{more}), got {len(given)} tensors")
    first = floating("recon" if given is not recon else f"recon[0] ({entry.params[0]})", given[0])
    params = [first]
    for name, value in zip(entry.params[1:], given[1:]):
        label = f"recon's {name}"
        if is_real(value):
            value = torch.full((), float(value), dtype=first.dtype, device=first.device)
        broadcasts(label, floating(label, value), "recon", first.shape)
        same_device(label, value, "recon", first.device)
        params.append(value)
    return params


def loss_shape(first: Tensor, chosen: Likelihood) -> tuple[torch.Size, int]:
    """The elementwise loss's shape; and for a mixture the dimension, counted from the front, that it lacks, else 0."""
    if "dim" not in chosen.options:
        return first.shape, 0
    dim = int(chosen.options["dim"])
    if not -first.dim() < dim < first.dim():
        raise ValueError(
            f"dim={dim} of likelihood {chosen.name!r} must be a dimension of recon behind the batch, whose shape is "
            f"{tuple(first.shape)}"
        )
    dim %= first.dim()
    return torch.Size((*first.shape[:dim], *first.shape[dim + 1 :])), dim


def mixture(first: Tensor, target: Tensor, chosen: Likelihood, planes: dict[int, int]) -> torch.Size:
    """The elementwise loss's shape, where recon and target go together along ``dim``."""
    shape, dim = loss_shape(first, chosen)
    channels = int(chosen.options.get("channels", 0))
    count = planes[channels]
    if first.shape[dim] == 0 or first.shape[dim] % count:
        raise ValueError(
            f"recon for {chosen!r} has {first.shape[dim]} planes along dim={dim}; each component has {count}, so "
            f"it takes a multiple of {count}"
        )
    expected = (*shape[:dim], channels, *shape[dim:]) if channels else tuple(shape)
    if target.shape != expected:
        raise ValueError(
            f"target has shape {tuple(target.shape)}; {chosen!r} with recon of shape {tuple(first.shape)} takes "
            f"{expected}"
        )
    return shape


def indices(target: Tensor, chosen: Likelihood) -> Tensor:
    """Classes as the kernels take them: whole numbers in float32, which has them up to 2^24."""
    return target.float() if entry_of(chosen.name).support == "class" else target


def reconstruction(recon: object, target: object, given: Any, chosen: Likelihood, overwrite: object) -> Reconstruction:
    entry = entry_of(chosen.name)
    params = parameters(recon, chosen.name, entry)
    first = params[0]
    if entry.planes:
        target = floating("target", target)
        shape = mixture(first, target, chosen, entry.planes)
        same_device("target", target, "recon", first.device)
    else:
        shape = first.shape
        target = like("target", target, "recon", first)
    if given is not None:
        weight("weight", given, "recon's sites" if entry.planes else "recon", first, shape)
    return Reconstruction(params, target, given, chosen, flag("overwrite_recon", overwrite))


def elbo(first: Tensor, mu: Tensor, beta: object, reduction: str, batch_dims: int = 1) -> Tensor | float:
    """beta, where the two terms add up."""
    if reduction not in _options.ELBO_REDUCTIONS:
        _options.reduction_for_elbo(reduction)
    if first.dim() == 0 or mu.dim() == 0:
        batched("recon", first, reduction)
        batched("mu", mu, reduction)
    if mu.device != first.device:
        same_device("mu", mu, "recon", first.device)
    if batch_dims != 1:
        batched_dims("recon", first, batch_dims)
    if reduction != "sum" and first.shape[:batch_dims] != mu.shape[:batch_dims]:
        raise ValueError(
            f"recon has a batch of {batch_of(first, batch_dims)} but mu has {batch_of(mu, batch_dims)} "
            f"({batch_words(batch_dims)}); they must be equal for the two terms to add up per sample"
        )
    if type(beta) is float:
        return beta
    beta = factor("beta", beta)
    if isinstance(beta, Tensor):
        same_device("beta", beta, "mu", mu.device)
    return beta


def packed(moments: object, dim: object) -> tuple[Tensor, int]:
    """Moments whose dimension ``dim``, counted from the front in what is returned, has two halves."""
    moments = floating("moments", moments)
    if not is_whole(dim):
        raise TypeError(f"dim must be an int, got {dim!r}; deterministic goes by name")
    dim = operator.index(dim)
    if not -moments.dim() <= dim < moments.dim():
        raise ValueError(
            f"dim={dim} is no dimension of moments, whose shape is {tuple(moments.shape)}; it takes the one "
            "along which mean and log variance lie"
        )
    if moments.shape[dim] % 2:
        raise ValueError(
            f"moments of shape {tuple(moments.shape)} has {moments.shape[dim]} entries along dim={dim}; it takes an "
            "even number, the mean's and then as many of the log variance"
        )
    return moments, dim % moments.dim()


def posteriors(mus: object, raws: object) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists of the same length, at least 1, whose tensors match one by one and all lie on one device."""
    first = tensors("mus", mus)
    pairs = [posterior(mu, raw) for mu, raw in zip(first, tensors("raws", raws, "mus", first))]
    for mu, _ in pairs:
        same_device("a tensor of mus", mu, "its first", pairs[0][0].device)
    return [mu for mu, _ in pairs], [raw for _, raw in pairs]


def priors(name: str, values: object, mus: list[Tensor]) -> list[Tensor]:
    """As many tensors as there are mus, each broadcasting to its own, or none."""
    if values is None:
        return []
    found = tensors(name, values, "mus", mus)
    for value, mu in zip(found, mus):
        prior(f"a tensor of {name}", value, mu)
    return found


def same_batches(mus: Sequence[Tensor], reduction: str, batch_dims: int) -> None:
    choice("reduction", reduction, _options.ELBO_REDUCTIONS)
    if reduction == "sum":
        return
    for mu in mus:
        batched("a tensor of mus", mu, reduction)
        batched_dims("a tensor of mus", mu, batch_dims)
        if mu.shape[:batch_dims] != mus[0].shape[:batch_dims]:
            raise ValueError(
                f"reduction={reduction!r} needs one batch ({batch_words(batch_dims)}) in all of mus, but there are "
                f"{batch_of(mus[0], batch_dims)} and {batch_of(mu, batch_dims)}; use 'sum'"
            )


def batch_words(batch_dims: int) -> str:
    return "dimension 0" if batch_dims == 1 else f"batch_dims={batch_dims}"


def batch_of(x: Tensor, batch_dims: int) -> object:
    """Its size, as messages tell it."""
    return x.shape[0] if batch_dims == 1 else tuple(x.shape[:batch_dims])


def each_with_its_prior(
    mus: object,
    raws: object,
    prior_mus: object,
    prior_raws: object,
    parameterization: str | Parameterization,
    prior_parameterization: str | Parameterization | None,
    reduction: str,
    batch_dims: int,
) -> Posteriors:
    mus, raws = posteriors(mus, raws)
    p = _options.parameterization(parameterization)
    of_prior = p if prior_parameterization is None else prior_parameterization_of(prior_parameterization)
    pms = priors("prior_mus", prior_mus, mus)
    given = priors("prior_raws", prior_raws, mus)
    if of_prior.soft_clamp is not None:
        pms = [softened(t, of_prior.soft_clamp) for t in pms]
    means: Sequence[Prior] = pms or [None] * len(mus)
    plvs: list[Any] = [log_variance(raw, of_prior, *beside) for raw, beside in zip(given, zip(mus, raws, means))]
    same_batches(mus, reduction, batch_dims)
    return soft_posteriors(Posteriors(mus, raws, pms, 0.0, plvs, 0.0, p))


def soft_posteriors(many: Posteriors) -> Posteriors:
    c = many.p.soft_clamp
    if c is None:
        return many
    mus, raws = ([softened(t, c) for t in ts] for ts in (many.mus, many.raws))
    return many._replace(mus=mus, raws=raws, p=many.p.hard)


def all_with_one_prior(
    mus: object,
    raws: object,
    prior_mu: object,
    prior_logvar: object,
    parameterization: str | Parameterization,
    prior_parameterization: str | Parameterization,
    reduction: str,
    batch_dims: int,
) -> Posteriors:
    mus, raws = posteriors(mus, raws)
    p = _options.parameterization(parameterization)
    mean, raw = shared_prior("prior_mu", prior_mu, mus), shared_prior("prior_logvar", prior_logvar, mus)
    of_prior = prior_parameterization_of(prior_parameterization)
    pms, pm = spread(soft_mean(mean, of_prior, mus[0], None), mus)
    plvs, plv = spread(log_variance(raw, of_prior, *mus, *raws, *pms[:1]), mus)
    same_batches(mus, reduction, batch_dims)
    return soft_posteriors(Posteriors(mus, raws, pms, pm, plvs, plv, p))


def prior_parameterization_of(value: str | Parameterization) -> Parameterization:
    return _options.parameterization(value, "prior_parameterization")


def shared_prior(name: str, value: object, mus: list[Tensor]) -> Prior:
    """One for all mus."""
    found = None
    for mu in mus:
        found = prior(name, value, mu)
    return found


def spread(shared: Prior, mus: list[Tensor]) -> tuple[list[Tensor], float]:
    """A tensor as often as there are mus, or a number."""
    return ([shared] * len(mus), 0.0) if isinstance(shared, Tensor) else ([], shared or 0.0)
