"""The options, as far as they can be judged without tensors: each is stated here, once."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypedDict, TypeVar

import torch
from torch import Tensor

from . import likelihoods
from ._checks import Real, choice, factor, flag, is_bool, is_real, is_whole, number
from ._gaussian import PARAMETERIZATIONS, Spec

F = TypeVar("F", bound=Callable[..., Any])

REDUCTIONS = ("none", "per_sample", "batchmean", "sum", "mean")
# and of engines alone, for what several samples are drawn of: the sums of [K, B, ...] over all but [K, B]
PER_DRAW = "per_draw"
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
    log(1 + e^raw). With a soft clamp c, ``raw`` and the mean are ``c tanh(x / c)`` first.

    Args:
        name: one of the five names above.
        clamp: ``(lo, hi)`` applied to ``raw``; no gradient outside, edges included.
        floor: added to the standard deviation, at least 0.
        soft_clamp: c > 0, for ``c tanh(x / c)`` on ``raw`` and on the mean, before the clamp; in PyTorch's operations,
            in float32 at least. NVAE (Vahdat & Kautz 2020, arXiv:2007.03898) has 5.0, and the prior's too: give it as
            ``prior_parameterization``.

    Raises:
        ValueError: an unknown name, ``lo > hi``, a NaN bound, a negative or non-finite floor, or a soft clamp that is
            not above 0.

    Example::

        diffusers = vaefast.Parameterization("logvar", clamp=(-30.0, 20.0))
        z = vaefast.reparameterize(mu, raw, parameterization=diffusers)
    """

    name: str = "logvar"
    clamp: tuple[float, float] | None = None
    floor: float = 0.0
    soft_clamp: float | None = None
    spec: Spec = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        choice("parameterization", self.name, tuple(PARAMETERIZATIONS))
        if self.clamp is not None:
            bounds = tuple(self.clamp) if isinstance(self.clamp, Iterable) else ()
            if not bounds or isinstance(self.clamp, (Tensor, str)) or not all(map(is_real, bounds)):
                raise TypeError(f"clamp must be None or two numbers (lo, hi), got {self.clamp!r}")
            clamp = tuple(map(number, bounds))
            if len(clamp) != 2 or not clamp[0] <= clamp[1]:
                raise ValueError(f"clamp must be (lo, hi) with lo <= hi, got {self.clamp!r}")
            object.__setattr__(self, "clamp", clamp)
        if not is_real(self.floor):
            raise TypeError(f"floor must be a number, got {self.floor!r}")
        object.__setattr__(self, "floor", number(self.floor))
        if not (self.floor >= 0.0 and math.isfinite(self.floor)):
            raise ValueError(f"floor must be a finite number >= 0 (it is added to the std), got {self.floor!r}")
        if self.soft_clamp is not None:
            if not is_real(self.soft_clamp):
                raise TypeError(f"soft_clamp must be None or a number, got {self.soft_clamp!r}")
            object.__setattr__(self, "soft_clamp", number(self.soft_clamp))
            if not 0 < self.soft_clamp < math.inf:
                raise ValueError(f"soft_clamp must be a finite number above 0 (c tanh(x / c)), got {self.soft_clamp!r}")
        lo, hi = self.clamp if self.clamp is not None else (-math.inf, math.inf)
        object.__setattr__(self, "spec", (self.name, lo, hi, self.floor))

    @property
    def hard(self) -> Parameterization:
        """Without the soft clamp, which comes before an engine."""
        return replace(self, soft_clamp=None)


# each name without clamp or floor, so that calls need not make one
PLAIN: dict[str, Parameterization] = {name: Parameterization(name) for name in PARAMETERIZATIONS}


def parameterization(value: str | Parameterization, name: str = "parameterization") -> Parameterization:
    if isinstance(value, Parameterization):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str or a Parameterization, got {type(value).__name__}")
    if value not in PLAIN:
        choice(name, value, tuple(PLAIN))
    return PLAIN[value]


class Likelihood:
    """A likelihood p(x | recon) with its options; its name alone stands for it with their defaults.

    Args:
        name: one of ``vaefast.LIKELIHOODS``.
        **options: of ``"gaussian"``, ``"laplace"``, ``"poisson"``, ``"negative_binomial"``,
            ``"zero_inflated_negative_binomial"`` and ``"negative_binomial_mixture"``: ``constant=True``, whether
            log(2 pi) / 2, log 2 or log(x!) is in. (Without it and without a scale, the first two are half the squared,
            and the absolute, error.) Of the last three also ``eps=1e-8``, added to the mean as scvi-tools does.
            ``"gaussian_optimal"``: ``per_sample=False``, whether each sample has a variance of its own, and
            ``floor=e^-12``, the least variance that it may have, that of sigma-VAE's code: where errors are smaller,
            the loss is the Gaussian's of that variance, and a perfect reconstruction has a finite loss and gradient 0;
            0 is no bound.
            ``"discretized_logistic"``: ``bins=256`` values from ``low=-1.0`` to ``high=1.0``, and ``floor=-7.0``, the
            least log scale; so does ``"discretized_logistic_mixture"``, and ``channels=3`` or 1. That one and
            ``"categorical"``: ``dim=1``, the dimension of ``recon`` along which the logits lie (negative ones count
            from the end).

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
        choice("likelihood", name, likelihoods.names())
        entry = likelihoods.entry_of(name)
        takes: dict[str, float] = entry.options
        given: dict[str, float] = {}
        for key, value in options.items():
            if key not in takes:
                known = f"it takes {', '.join(takes)}" if takes else "it takes none"
                raise TypeError(f"likelihood {name!r} has no option {key!r}; {known}")
            if not is_bool(value) and not (is_real(value) and math.isfinite(value)):
                raise ValueError(f"option {key} of likelihood {name!r} must be a finite number, got {value!r}")
            given[key] = bool(value) if is_bool(value) else number(value)
        self.name, self.options = name, {**takes, **given}
        entry.check(**self.options)
        self.spec = (name, [float(value) for value in self.options.values()])

    def __repr__(self) -> str:
        return f"Likelihood({', '.join([repr(self.name), *(f'{k}={v!r}' for k, v in self.options.items())])})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Likelihood) and (self.name, self.options) == (other.name, other.options)

    def __hash__(self) -> int:
        return hash((self.name, *self.options.values()))


# each name with its options' defaults; one that is registered later joins when it is first named
_LIKELIHOODS: dict[str, Likelihood] = {name: Likelihood(name) for name in likelihoods.names()}


def likelihood(value: object) -> Likelihood:
    if isinstance(value, Likelihood):
        return value
    if not isinstance(value, str):
        raise TypeError(f"likelihood must be a str or a vaefast.Likelihood, got {type(value).__name__}")
    found = _LIKELIHOODS.get(value)
    if found is None:
        found = _LIKELIHOODS[value] = Likelihood(value)
    return found


def reduction_for_elbo(reduction: str) -> None:
    if reduction in ELBO_REDUCTIONS:
        return
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


def temperature(value: object) -> float:
    if not is_real(value):
        raise TypeError(f"temperature must be a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"temperature must be a finite number >= 0 (it multiplies the std), got {value!r}")
    return float(value)


class ELBOTerms(NamedTuple):
    """The negative ELBO and its two terms in nats: ``loss = reconstruction + beta * kl``.

    0-d tensors, or ``[B]`` with ``reduction="per_sample"``.

    Example::

        loss, reconstruction, kl = vaefast.elbo_terms(decoder(z), x, mu, logvar)
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor

    @classmethod
    def of(cls, reconstruction: Tensor, kl: Tensor, beta: Tensor | float) -> ELBOTerms:
        # one loss, one dtype
        dtype = torch.promote_types(reconstruction.dtype, kl.dtype)
        reconstruction, kl = reconstruction.to(dtype), kl.to(dtype)
        return cls(reconstruction + beta * kl, reconstruction, kl)


class LogProb(Protocol):
    """A prior of any kind: of :mod:`vaefast.priors`, or of ``torch.distributions`` with one event dimension.

    Example::

        normal = torch.distributions.Normal(torch.zeros(20), 1.0)
        prior: vaefast.bounds.LogProb = torch.distributions.Independent(normal, 1)
    """

    def log_prob(self, value: Tensor, /) -> Tensor:
        """The log density in nats: of z ``[..., D]``, ``[...]``.

        Example::

            normal = torch.distributions.Normal(torch.zeros(20), 1.0)
            log_p = torch.distributions.Independent(normal, 1).log_prob(torch.zeros(8, 2, 20))  # [8, 2]
        """


class KLOptions(NamedTuple):
    """What the KL's keyword arguments ask for, checked; see :func:`vaefast.gaussian_kl`."""

    free_bits: float = 0.0
    free_bits_per: str = "dim"
    balance: float | None = None
    capacity: Tensor | float | None = None
    symmetric: bool = False
    prior_parameterization: str | Parameterization = "logvar"
    kl_weight: Tensor | None = None
    batch_dims: int = 1
    prior: LogProb | None = None

    def changed(self) -> dict[str, Any]:
        """Those that are not the defaults."""
        return {
            name: value for name, value, default in zip(self._fields, self, self._field_defaults.values())
            if value is not default and value != default
        }  # fmt: skip


NONE = KLOptions()


class Composed(TypedDict, total=False):
    """The options of ``KLOptions`` that no engine knows of, as functions take them: ``**options``.

    A call without them is told by one test of an empty dictionary.
    """

    free_bits: float
    free_bits_per: str
    capacity: Tensor | Real | None
    symmetric: bool
    prior_parameterization: str | Parameterization
    kl_weight: Tensor | None
    batch_dims: int
    prior: LogProb | None


def spelled_out(f: F, **own_names: str) -> F:
    """Has ``f`` show each of the KL's options: in the place of ``balance``, which it names, and of ``**options``. Some
    it has under names of its own."""
    parameters = []
    for p in inspect.signature(f).parameters.values():
        if p.name == "balance":
            annotations = {name: getattr(a, "__forward_arg__", a) for name, a in KLOptions.__annotations__.items()}
            parameters += [
                p.replace(name=own_names.get(name, name), default=default, annotation=annotations[name])
                for name, default in KLOptions._field_defaults.items()
            ]
        elif p.name in own_names.values():
            continue
        elif p.kind is not p.VAR_KEYWORD:
            parameters.append(p)
    f.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return f


def composed(options: Composed) -> bool:
    """Whether any of them is other than its default, or may be."""
    defaults = KLOptions._field_defaults
    for name, value in options.items():
        if name not in defaults or type(value) is not type(defaults[name]) or value != defaults[name]:
            return True
    return False


def kl_options(reduction: str, balance: object, options: Composed) -> KLOptions:
    for name in options:
        if name not in KLOptions._field_defaults:
            raise TypeError(f"{name!r} is an unexpected keyword argument")
    free_bits, per = options.get("free_bits", 0.0), options.get("free_bits_per", "dim")
    capacity, symmetric = options.get("capacity"), options.get("symmetric", False)
    of_prior = options.get("prior_parameterization", "logvar")
    if type(free_bits) is not float and not is_real(free_bits):
        raise TypeError(f"free_bits must be a number (nats), got {free_bits!r}")
    free_bits = float(free_bits)
    if not 0 <= free_bits < math.inf:
        raise ValueError(f"free_bits must be a finite number >= 0 (nats; 0 is off), got {free_bits!r}")
    if per != "dim":
        choice("free_bits_per", per, tuple(FREE_BITS_PER))
    takes, why = FREE_BITS_PER[per]
    if free_bits > 0 and reduction not in takes:
        raise ValueError(
            f"free_bits_per={per!r} does not go with reduction={reduction!r}: {why}. "
            f"Use one of {', '.join(map(repr, takes))}"
        )
    return KLOptions(
        free_bits,
        per,
        None if balance is None else kl_balance(balance),
        None if capacity is None else kl_capacity(capacity, reduction, free_bits),
        symmetric is not False and flag("symmetric", symmetric),
        of_prior if of_prior == "logvar" else parameterization(of_prior, "prior_parameterization"),
        options.get("kl_weight"),
        batch_dims(options["batch_dims"]) if "batch_dims" in options else 1,
        None if options.get("prior") is None else kl_prior(options["prior"], reduction, balance, options),
    )


def batch_dims(value: object) -> int:
    if not is_whole(value):
        raise TypeError(f"batch_dims must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"batch_dims must be at least 1 (the first dimensions that are the batch), got {value!r}")
    return operator.index(value)


def kl_balance(value: object, *prior: object) -> float:
    """The balance; where a prior is given too, it must have a tensor."""
    if not is_real(value):
        raise TypeError(f"balance must be None or a number from 0 to 1, got {value!r}")
    value = float(value)
    if not 0 <= value <= 1:
        raise ValueError(f"balance must be from 0 (trains q alone) to 1 (trains the prior alone), got {value!r}")
    if prior and not any(isinstance(p, Tensor) for p in prior):
        raise ValueError(
            f"balance={value!r} divides the KL's gradient between the posterior and the prior, but neither prior_mu "
            "nor prior_logvar is a tensor; give a prior that is trained, or balance=None"
        )
    return value


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


def density(prior: object) -> LogProb:
    if not callable(getattr(prior, "log_prob", None)):
        raise TypeError(
            f"prior must have a method log_prob(z), as the objects of vaefast.priors do, got {type(prior).__name__}; "
            "a Gaussian's mean and log variance go into prior_mu and prior_logvar"
        )
    found: Any = prior
    return found  # type: ignore[no-any-return]


def kl_prior(prior: object, reduction: str, balance: object, options: Composed) -> LogProb:
    """What samples alone know the KL to, so that it is one of whole samples."""
    found = density(prior)
    per = options.get("free_bits_per", "dim")
    if reduction not in ELBO_REDUCTIONS:
        raise ValueError(
            f"prior does not go with reduction={reduction!r}: it gives one log density of a whole sample. "
            f"Use one of {', '.join(map(repr, ELBO_REDUCTIONS))}"
        )
    if balance is not None:
        raise ValueError(
            f"prior does not go with balance={balance!r}, which divides the gradient between a posterior and a "
            "Gaussian prior; use balance=None"
        )
    if options.get("symmetric", False):
        raise ValueError("prior does not go with symmetric=True: samples of q estimate KL(q || p) alone")
    if options.get("free_bits", 0.0) and per != "sample":
        raise ValueError(
            f"prior does not go with free_bits_per={per!r}: its KL is of whole samples, not of dimensions; use 'sample'"
        )
    return found


def estimator(name: str, options: KLOptions, temperature: float) -> None:
    choice("estimator", name, ESTIMATORS)
    if name != "analytic" and temperature != 1:
        raise ValueError(
            f"estimator={name!r} does not go with temperature={temperature!r}: samples of another distribution do not "
            "estimate this KL; use 'analytic'"
        )
    if name != "analytic" and options.symmetric:
        raise ValueError(
            f"estimator={name!r} does not go with symmetric=True: samples of q estimate KL(q || p) alone; "
            "use 'analytic'"
        )
