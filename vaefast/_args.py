"""Argument checks shared by every public function: what was given, what it takes, how to mend it.

They run before any kernel, for the native and the reference path alike, and cost a few comparisons on good input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .reference import LikelihoodEntry

Real = float | int
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
REDUCTIONS = ("none", "per_sample", "batchmean", "sum", "mean")
ELBO_REDUCTIONS = ("per_sample", "batchmean", "sum")
NOISE = ("philox", "torch")
ESTIMATORS = ("analytic", "mc", "stl")
# what free bits are counted for: the reductions that can follow, and why no other can
FREE_BITS_PER: dict[str, tuple[tuple[str, ...], str]] = {
    "dim": (REDUCTIONS, ""),
    "sample": (ELBO_REDUCTIONS, "the floor is under the KL of a whole sample, which has no elements"),
    "batch_dim": (("batchmean", "sum"), "the floor is under means over the batch, which belong to no sample"),
}


@dataclass(frozen=True)
class Parameterization:
    """What the posterior's second argument ``raw`` means, with an optional clamp and floor.

    ``std = activation(clamp(raw)) + floor``, and the floored ``std`` enters the KL too. The activation goes by
    ``name``: ``"logvar"`` exp(raw / 2), ``"log_std"`` exp(raw), ``"std"`` raw, ``"var"`` sqrt(raw), ``"softplus"``
    log(1 + e^raw).

    Args:
        name: one of the five names above.
        clamp: ``(lo, hi)`` applied to ``raw``; no gradient outside, edges included.
        floor: added to the standard deviation, at least 0.

    Raises:
        ValueError: an unknown name, ``lo > hi``, a NaN bound, or a negative or non-finite floor.

    Example::

        diffusers = Parameterization("logvar", clamp=(-30.0, 20.0))
        z = reparameterize(mu, raw, parameterization=diffusers)
    """

    name: str = "logvar"
    clamp: tuple[float, float] | None = None
    floor: float = 0.0
    # an operator's arguments parameterization, lo, hi, floor; the bounds are infinite where there is no clamp
    spec: tuple[str, float, float, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from .reference import PARAMETERIZATIONS

        choice("parameterization", self.name, tuple(PARAMETERIZATIONS))
        if self.clamp is not None:
            if not isinstance(self.clamp, (tuple, list)) or not all(map(is_real, self.clamp)):
                raise TypeError(f"clamp must be None or two numbers (lo, hi), got {self.clamp!r}")
            if len(self.clamp) != 2 or not self.clamp[0] <= self.clamp[1]:
                raise ValueError(f"clamp must be (lo, hi) with lo <= hi, got {self.clamp!r}")
        if not is_real(self.floor):
            raise TypeError(f"floor must be a number, got {self.floor!r}")
        if not (self.floor >= 0.0 and math.isfinite(self.floor)):
            raise ValueError(f"floor must be a finite number >= 0 (it is added to the std), got {self.floor!r}")
        lo, hi = self.clamp if self.clamp is not None else (-math.inf, math.inf)
        object.__setattr__(self, "spec", (self.name, lo, hi, self.floor))


class Likelihood:
    """A likelihood p(x | recon) with its options; its name alone stands for it with their defaults.

    Args:
        name: one of ``vaefast.LIKELIHOODS``.
        **options: of ``"gaussian"``, ``"laplace"``, ``"poisson"``, ``"negative_binomial"`` and
            ``"zero_inflated_negative_binomial"``: ``constant=True``, whether log(2 pi) / 2, log 2 or log(x!) is in.
            (Without it and without a scale, the first two are half the squared, and the absolute, error.) Of the
            last two also ``eps=1e-8``, added to the mean as scvi-tools does. ``"gaussian_optimal"``:
            ``per_sample=False``, whether each sample has a variance of its own. ``"discretized_logistic"``:
            ``bins=256`` values from ``low=-1.0`` to ``high=1.0``, and ``floor=-7.0``, the least log scale; so does
            ``"discretized_logistic_mixture"``, and ``channels=3`` or 1. That one and ``"categorical"``: ``dim=1``, the
            dimension of ``recon`` along which the logits lie (negative ones count from the end).

    Raises:
        TypeError, ValueError: an unknown name or option, or a value that it does not take.

    Example::

        digits = vaefast.Likelihood("discretized_logistic", bins=17)
        nll = vaefast.reconstruction_loss((mean, log_scale), x, likelihood=digits)
    """

    __slots__ = ("name", "options", "spec")

    name: str
    options: dict[str, float]
    # an operator's arguments likelihood, options
    spec: tuple[str, list[float]]

    def __init__(self, name: str, **options: float) -> None:
        from .reference import COMPOSED, LIKELIHOODS

        entries = {**LIKELIHOODS, **COMPOSED}
        choice("likelihood", name, tuple(entries))
        takes = entries[name].options
        for key, value in options.items():
            if key not in takes:
                known = f"it takes {', '.join(takes)}" if takes else "it takes none"
                raise TypeError(f"likelihood {name!r} has no option {key!r}; {known}")
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"option {key} of likelihood {name!r} must be a finite number, got {value!r}")
        self.name, self.options = name, {**takes, **options}
        entries[name].check(**self.options)
        self.spec = (name, [float(value) for value in self.options.values()])

    def __repr__(self) -> str:
        return f"Likelihood({', '.join([repr(self.name), *(f'{k}={v!r}' for k, v in self.options.items())])})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Likelihood) and (self.name, self.options) == (other.name, other.options)

    def __hash__(self) -> int:
        return hash((self.name, *self.options.values()))


# each name with its options' defaults
LIKELIHOODS: dict[str, Likelihood] = {}


def likelihood(value: object) -> Likelihood:
    if isinstance(value, Likelihood):
        return value
    if not isinstance(value, str):
        raise TypeError(f"likelihood must be a str or a vaefast.Likelihood, got {type(value).__name__}")
    found = LIKELIHOODS.get(value)
    if found is None:
        found = LIKELIHOODS[value] = Likelihood(value)
    return found


def is_real(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def reduction_for_elbo(reduction: str) -> None:
    if reduction in ("mean", "none"):
        why = (
            "a mean over elements would weigh the reconstruction and the KL by their sizes"
            if reduction == "mean"
            else "the reconstruction and the KL have different elements, so they only add up per sample"
        )
        raise ValueError(
            f"reduction={reduction!r} is not an ELBO: {why}. Use one of {', '.join(map(repr, ELBO_REDUCTIONS))}"
        )
    choice("reduction", reduction, ELBO_REDUCTIONS)


def floating(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {str(x.dtype)[6:]}; "
            f"convert it with {name}.float()"
        )
    return x


def same_device(name: str, x: Tensor, other: str, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} but {other} is on {device}; move it with {name}.to({str(device)!r})")


def broadcasts(name: str, x: Tensor, to: str, shape: torch.Size) -> None:
    """x must expand to shape without changing shape."""
    short = len(shape) - x.dim()
    if short < 0 or any(a != 1 and a != b for a, b in zip(x.shape, shape[short:])):
        raise ValueError(f"{name} of shape {tuple(x.shape)} does not broadcast to {to}'s shape {tuple(shape)}")


def same_shape(name: str, x: Tensor, other: str, shape: torch.Size) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)} but {other} has {tuple(shape)}; they must be equal")


def batched(name: str, x: Tensor, reduction: str) -> None:
    if x.dim() == 0 and reduction in ("per_sample", "batchmean"):
        raise ValueError(
            f"reduction={reduction!r} needs a batch dimension, but {name} is a 0-d tensor; "
            f"use 'sum' or {name}.unsqueeze(0)"
        )


def batch(name: str, x: object) -> Tensor:
    x = floating(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name} must be [B, ...], got a 0-d tensor; use {name}.unsqueeze(0)")
    return x


def parameterization(value: str | Parameterization) -> Parameterization:
    if isinstance(value, Parameterization):
        return value
    if not isinstance(value, str):
        raise TypeError(f"parameterization must be a str or a Parameterization, got {type(value).__name__}")
    if value not in PLAIN:
        choice("parameterization", value, tuple(PLAIN))
    return PLAIN[value]


# each name without clamp or floor; reference.py fills it in, so that calls need not make one
PLAIN: dict[str, Parameterization] = {}


def posterior(mu: object, logvar: object) -> tuple[Tensor, Tensor]:
    mu, logvar = floating("mu", mu), floating("logvar", logvar)
    same_shape("logvar", logvar, "mu", mu.shape)
    same_device("logvar", logvar, "mu", mu.device)
    return mu, logvar


def packed(moments: object, dim: object) -> tuple[Tensor, int]:
    """Moments whose dimension ``dim``, counted from the front in what is returned, has two halves."""
    moments = floating("moments", moments)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an int, got {dim!r}; deterministic goes by name")
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
    pairs = [posterior(mu, raw) for mu, raw in zip(tensors("mus", mus), tensors("raws", raws, "mus", mus))]
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


def tensors(name: str, values: object, other: str = "", others: object = None) -> list[Any]:
    """A list or tuple, not empty, as long as the other one."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of tensors, got {type(values).__name__}")
    if not values:
        raise ValueError(f"{name} is empty; give at least one tensor")
    if isinstance(others, (list, tuple)) and len(values) != len(others):
        raise ValueError(f"{name} has {len(values)} tensors but {other} has {len(others)}; they go in pairs")
    return list(values)


def same_batches(mus: Sequence[Tensor], reduction: str) -> None:
    choice("reduction", reduction, ELBO_REDUCTIONS)
    if reduction == "sum":
        return
    for mu in mus:
        batched("a tensor of mus", mu, reduction)
        if mu.shape[0] != mus[0].shape[0]:
            raise ValueError(
                f"reduction={reduction!r} needs one batch (dimension 0) in all of mus, but there are "
                f"{mus[0].shape[0]} and {mu.shape[0]}; use 'sum'"
            )


def prior(name: str, value: object, mu: Tensor) -> Tensor | float | None:
    if value is None:
        return None
    if is_real(value):
        return float(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be None, a float or a torch.Tensor, got {type(value).__name__}")
    broadcasts(name, floating(name, value), "mu", mu.shape)
    same_device(name, value, "mu", mu.device)
    return value


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


def noise(kind: str, eps: object, generator: object, mu: Tensor, dim: int | None = 0) -> Tensor | None:
    choice("noise", kind, NOISE)
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


def parameters(recon: object, likelihood: str, entry: LikelihoodEntry) -> list[Tensor]:
    """The likelihood's parameters; the first has the full shape."""
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


def indices(target: Tensor, value: object) -> Tensor:
    """Classes as the kernels take them: whole numbers in float32, which has them up to 2^24."""
    from .reference import entry_of

    return target.float() if entry_of(likelihood(value)).support == "class" else target


def reconstruction(
    recon: object, target: object, weight: object, chosen: Likelihood, entry: LikelihoodEntry
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """The likelihood's parameters, the target, and the weight."""
    params = parameters(recon, chosen.name, entry)
    first = params[0]
    target = floating("target", target)
    if entry.planes:
        shape = mixture(first, target, chosen, entry.planes)
    else:
        shape = first.shape
        same_shape("target", target, "recon", shape)
    same_device("target", target, "recon", first.device)
    if weight is None:
        return params, target, None
    if not (isinstance(weight, Tensor) and weight.dtype == torch.bool):
        weight = floating("weight", weight)
    broadcasts("weight", weight, "recon's sites" if entry.planes else "recon", shape)
    same_device("weight", weight, "recon", first.device)
    return params, target, weight


def factor(name: str, value: object, mu: Tensor | None = None) -> Tensor | float:
    """A float, or a 0-d tensor, on mu's device where there is one to compare with."""
    if is_real(value):
        return float(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a float or a 0-d torch.Tensor, got {type(value).__name__}")
    if floating(name, value).dim() != 0:
        raise ValueError(f"{name} must be a float or a 0-d tensor, got shape {tuple(value.shape)}")
    if mu is not None:
        same_device(name, value, "mu", mu.device)
    return value


class KLOptions(NamedTuple):
    """What the KL's keyword arguments ask for; see :func:`vaefast.gaussian_kl`."""

    free_bits: float = 0.0
    free_bits_per: str = "dim"
    balance: float | None = None
    capacity: Tensor | float | None = None
    symmetric: bool = False


def kl_options(
    reduction: str, free_bits: object, free_bits_per: str, balance: object, capacity: object, symmetric: object
) -> KLOptions:
    """The options, as far as they can be judged without tensors."""
    if not is_real(free_bits):
        raise TypeError(f"free_bits must be a number (nats), got {free_bits!r}")
    if not 0 <= free_bits < math.inf:
        raise ValueError(f"free_bits must be a finite number >= 0 (nats; 0 is off), got {free_bits!r}")
    choice("free_bits_per", free_bits_per, tuple(FREE_BITS_PER))
    takes, why = FREE_BITS_PER[free_bits_per]
    if free_bits > 0 and reduction not in takes:
        raise ValueError(
            f"free_bits_per={free_bits_per!r} does not go with reduction={reduction!r}: {why}. "
            f"Use one of {', '.join(map(repr, takes))}"
        )
    return KLOptions(
        float(free_bits),
        free_bits_per,
        kl_balance(balance),
        None if capacity is None else kl_capacity(capacity, reduction, free_bits),
        flag("symmetric", symmetric),
    )


def kl_balance(value: object, *prior: object) -> float | None:
    """The balance; where a prior is given too, it must have a tensor."""
    if value is None:
        return None
    if not is_real(value):
        raise TypeError(f"balance must be None or a number from 0 to 1, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"balance must be from 0 (trains q alone) to 1 (trains the prior alone), got {value!r}")
    if prior and not any(isinstance(p, Tensor) for p in prior):
        raise ValueError(
            f"balance={value!r} divides the KL's gradient between the posterior and the prior, but neither prior_mu "
            "nor prior_logvar is a tensor; give a prior that is trained, or balance=None"
        )
    return float(value)


def kl_capacity(value: object, reduction: str, free_bits: float) -> Tensor | float:
    capacity = factor("capacity", value)
    if not isinstance(capacity, Tensor) and not 0 <= capacity < math.inf:
        raise ValueError(f"capacity must be a finite number >= 0 (nats a sample), got {value!r}")
    if reduction not in ELBO_REDUCTIONS:
        raise ValueError(
            f"capacity does not go with reduction={reduction!r}: it is held against the KL of a whole sample. "
            f"Use one of {', '.join(map(repr, ELBO_REDUCTIONS))}"
        )
    if free_bits > 0:
        raise ValueError(
            f"capacity and free_bits={free_bits!r} were both given; each says how large the KL shall be, "
            "so pass one of them"
        )
    return capacity


def kl_tensors(options: KLOptions, mu: Tensor, prior_mu: object, prior_logvar: object) -> None:
    """The options, judged by the tensors that they serve."""
    whole_samples = options.free_bits > 0 and options.free_bits_per != "dim"
    if mu.dim() == 0 and (whole_samples or options.capacity is not None):
        what = f"free_bits_per={options.free_bits_per!r}" if whole_samples else "capacity"
        raise ValueError(f"{what} needs a batch dimension, but mu is a 0-d tensor; use mu.unsqueeze(0)")
    kl_balance(options.balance, prior_mu, prior_logvar)
    if isinstance(options.capacity, Tensor):
        same_device("capacity", options.capacity, "mu", mu.device)


def estimator(name: str, options: KLOptions) -> None:
    choice("estimator", name, ESTIMATORS)
    if name != "analytic" and options.symmetric:
        raise ValueError(
            f"estimator={name!r} does not go with symmetric=True: samples of q estimate KL(q || p) alone; "
            "use 'analytic'"
        )


def samples(mu: Tensor, logvar: Tensor, number: object) -> tuple[Tensor, Tensor]:
    """Both as ``[K, B, ...]`` views, which take no memory."""
    if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
        raise TypeError(f"num_samples must be None or an int, got {number!r}")
    if number < 1:
        raise ValueError(f"num_samples must be at least 1, got {number!r}")
    return mu.expand(number, *mu.shape), logvar.expand(number, *logvar.shape)


def elbo_batch(recon: Tensor, mu: Tensor, reduction: str) -> None:
    batched("recon", recon, reduction)
    batched("mu", mu, reduction)
    same_device("mu", mu, "recon", recon.device)
    if reduction != "sum" and recon.shape[0] != mu.shape[0]:
        raise ValueError(
            f"recon has a batch of {recon.shape[0]} but mu has {mu.shape[0]} (dimension 0); "
            "they must be equal for the two terms to add up per sample"
        )
