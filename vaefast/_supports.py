"""What an entry of the likelihoods' registry says, and where parameters and data live, with the extremes at which the
tests hold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributions as D


@dataclass(frozen=True)
class Domain:
    """Where a parameter lives: ``of`` takes any number there, as a network puts it out. ``extremes`` are the values,
    ends of the domain among them, at which the numbers are held to what the documentation promises.

    Example::

        theta = vaefast.likelihoods.DOMAINS["positive"](raw)
    """

    of: Callable[[Tensor], Tensor]
    extremes: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return self.of(x)


def _both(*values: float) -> tuple[float, ...]:
    return tuple(sign * x for x in values for sign in (1.0, -1.0))


DOMAINS: dict[str, Domain] = {
    "real": Domain(lambda x: x, _both(0.0, 1e-30, 1e-8, 1e-3, 0.5, 1.0, 15.0, 17.0, 88.0, 104.0, 1e4)),
    "log": Domain(lambda x: x, (-30.0, -10.0, -1.0, -1e-6, 0.0, 0.3, 10.0, 30.0)),
    "positive": Domain(torch.exp, (1e-6, 1e-3, 0.1, 1.0, 3.7, 50.0, 1e3, 1e6)),
    "unit": Domain(torch.sigmoid, (0.0, 1e-30, 1e-8, 0.3, 0.5, 0.75, 1.0 - 2.0**-24, 1.0)),
    "total": Domain(lambda x: torch.exp(x).ceil() + 3, (1.0, 2.0, 7.0, 100.0, 1e6)),
    "planes": Domain(lambda x: x, _both(0.0, 1e-8, 1e-3, 0.5, 1.0, 5.0, 15.0, 30.0)),
}

# Where data live, and there the extremes; without them, which data there can be follows from the parameters.
SUPPORTS: dict[str, tuple[float, ...]] = {
    "unit": (0.0, 1e-6, 0.3, 0.5, 1.0),
    "real": (-1e4, -1.0, 0.0, 1e-3, 0.5, 2.0, 1e4),
    "positive": (1e-30, 1e-6, 1e-3, 0.5, 2.0, 1e4),
    "at least 0": (0.0, 1e-30, 1e-6, 1e-3, 0.5, 2.0, 1e4),
    "count": (0.0, 1.0, 2.0, 7.0, 100.0, 1e6),
    "bins": tuple(-1.0 + 2.0 * k / 255 for k in (0, 1, 100, 128, 254, 255)),
    "class": (),
    "some of total": (),
}


class Asked(NamedTuple):
    """What a closed form is asked for: which parameters' gradients are ``wanted``. ``once`` is for :meth:`of`, ``room``
    for :meth:`into`."""

    wanted: Sequence[bool]
    once: list[Any]
    room: Sequence[Tensor | None] = ()

    def into(self, k: int) -> Tensor | None:
        """Where parameter k's gradient may be put, as an operation's ``out``: what lies elsewhere is copied there."""
        return self.room[k] if self.room else None

    def of(self, make: Callable[..., Any], *tensors: Tensor) -> Any:
        """make(*tensors): of parameters that are no block's alone made once for all blocks of a call."""
        if len(self.once) != len(tensors) + 1 or any(a is not b for a, b in zip(tensors, self.once)):
            self.once[:] = *tensors, make(*tensors)
        return self.once[-1]


# values, factor, constant: the nll is values * factor + constant; and the parameters' gradients, or None
Closed = tuple[Tensor, float, float, Sequence[tuple[Tensor, float] | None]]


def _anything(**options: float) -> None:
    """No option's value needs a check."""


@dataclass(frozen=True)
class LikelihoodEntry:
    """A likelihood p(x | params), elementwise.

    ``nll(x, *params, **options)`` is -log p in nats; the first ``required`` params must be given. ``support`` is where
    x lives, a name in ``SUPPORTS``, ``formula`` goes to the tables, ``distribution(*params, **options)`` is the
    torch.distributions object that draws, and that the tests hold it against. ``options`` are their defaults, in the
    struct's order, and ``check`` raises where their values do not go together. ``domains`` says of each parameter where
    it lives: a name in ``DOMAINS``; "log" is the logarithm of a scale or a rate.

    A mixture has one parameter, whose planes lie along the dimension that its last option, ``dim``, names: logits, and
    then each parameter of the components. ``planes`` says how many a component has, by the option ``channels``, the
    target's size along ``dim``, or at 0 where there is no such option and no such dimension. Its nll has the shape
    without ``dim``.

    ``gradients``, where there is one, is the closed form of ``nll`` with its gradients, for the fallback's speed: of
    an ``Asked``, the data, the parameters and the options it makes the values, a number that they are to be
    multiplied by and one that is to be added, and of each parameter the gradient, a tensor times a number; what is not
    wanted may be None. Its tensors are its own, and nothing of it is differentiated. Where it has nothing for its
    arguments it is None, and ``nll`` is differentiated.

    ``operator``, where there is one, is PyTorch's own for the same, which of few numbers takes less than the node of a
    closed form: of the data, the parameters and the options the nll, or None where it is not for these. It is asked on
    a CPU, and of data that are not trained.

    Example::

        entry = vaefast.likelihoods.LIKELIHOODS["poisson"]
        nll = entry.nll(x.round(), logits, constant=True)
    """

    params: tuple[str, ...]
    required: int
    support: str
    formula: str
    nll: Callable[..., Tensor]
    distribution: Callable[..., D.Distribution]
    domains: tuple[str, ...] = ("real", "log")
    options: dict[str, float] = field(default_factory=dict)
    check: Callable[..., None] = _anything
    planes: dict[int, int] = field(default_factory=dict)
    gradients: Callable[..., Closed | None] | None = None
    operator: Callable[..., Tensor | None] | None = None
