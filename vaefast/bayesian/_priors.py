"""Priors of weights, and how many of them are given to one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import Real, broadcasts, flag, floating, is_real


class Gaussian(nn.Module):
    """N(mean, std^2), the prior of a :class:`vaefast.bayesian.MeanField`'s weights; one object for many parameters is
    one prior.

    Args:
        mean: a number or a tensor that broadcasts to the parameter.
        std: the same, above 0.
        learned: whether the standard deviation is trained too, by the KL: for a Gaussian of mean 0 it goes to where
            ``std^2`` is the mean of ``mu^2 + sigma^2`` over its weights (empirical Bayes; Blundell et al. 2015, section
            3.3, warn of it for all of a network in one).

    Shape:
        a mean and a std of shape ``[]``, or any that broadcasts to each parameter whose prior this is.

    Raises:
        TypeError, ValueError: an argument that is no number or floating tensor; a number std that is not above 0.

    Example::

        prior = vaefast.bayesian.Gaussian(0.0, 0.1, learned=True)
        model = vaefast.bayesian.MeanField(encoder, prior=prior)
    """

    mean: Tensor | float
    logvar: Tensor | float

    def __init__(self, mean: Tensor | Real = 0.0, std: Tensor | Real = 1.0, *, learned: bool = False) -> None:
        super().__init__()
        self.learned = flag("learned", learned)
        if isinstance(mean, Tensor):
            self.register_buffer("mean", floating("mean", mean).detach().clone())
        elif is_real(mean) and math.isfinite(mean):
            self.mean = float(mean)
        else:
            raise TypeError(f"a prior's mean must be a finite number or a floating tensor, got {mean!r}")
        if isinstance(std, Tensor):
            logvar: Tensor | float = 2 * torch.log(floating("std", std).detach())
        elif not is_real(std):
            raise TypeError(f"a prior's std must be a number above 0 or a floating tensor, got {std!r}")
        elif not 0 < std < math.inf:
            raise ValueError(f"a prior's std must be a finite number above 0, got {std!r}")
        else:
            logvar = 2 * math.log(std)
        if self.learned:
            of_float = None if isinstance(logvar, Tensor) else torch.get_default_dtype()
            self.logvar = nn.Parameter(torch.as_tensor(logvar, dtype=of_float).clone())
        elif isinstance(logvar, Tensor):
            self.register_buffer("logvar", logvar)
        else:
            self.logvar = logvar

    def _check(self, name: str, p: Tensor) -> None:
        """That this can be the prior of that parameter."""
        for what, value in (("mean", self.mean), ("std", self.logvar)):
            if isinstance(value, Tensor):
                broadcasts(f"the prior's {what}", value, name, p.shape)

    def extra_repr(self) -> str:
        mean = self.mean if not isinstance(self.mean, Tensor) else f"of shape {tuple(self.mean.shape)}"
        std = (
            f"of shape {tuple(self.logvar.shape)}"
            if isinstance(self.logvar, Tensor) and self.logvar.dim()
            else f"{math.exp(0.5 * float(self.logvar)):.3g}"
        )
        return f"mean={mean}, std={std}" + (", learned=True" if self.learned else "")


# a Gaussian; or whatever has log_prob, whose KL is estimated from the weights that are drawn
Prior = Any
Given = tuple[Tensor | Real, Tensor | Real] | Gaussian | Callable[[str, nn.Parameter], Any] | Any


def priors_of(given: Given, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> list[Prior]:
    """Each parameter's, from one for all or a function of (name, parameter)."""
    if not isinstance(given, tuple) and not hasattr(given, "log_prob") and not isinstance(given, Gaussian):
        if not callable(given):
            raise TypeError(
                "prior must be (mean, std), a vaefast.bayesian.Gaussian, an object with log_prob, or a function of "
                f"(name, parameter) that returns one, got {given!r}"
            )
        found = [_prior(given(name, p)) for name, p in zip(names, parameters)]
    else:
        found = [_prior(given)] * len(names)
    for name, p, prior in zip(names, parameters, found):
        if isinstance(prior, Gaussian):
            prior._check(name, p)
            prior.to(p.device)
    return found


def _prior(given: Any) -> Prior:
    if isinstance(given, tuple):
        if len(given) != 2:
            raise ValueError(f"a prior as a tuple is (mean, std), got {len(given)} values")
        return Gaussian(*given)
    if isinstance(given, Gaussian) or hasattr(given, "log_prob"):
        return given
    raise TypeError(f"a prior must be (mean, std), a Gaussian or an object with log_prob, got {given!r}")


def column(values: Sequence[Tensor | float], like: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """As ``Posteriors`` has a prior's mean or log variance: one number for all, or a tensor each."""
    first = values[0]
    if not isinstance(first, Tensor) and all(not isinstance(v, Tensor) and v == first for v in values):
        return [], first
    made: dict[tuple[float, torch.dtype], Tensor] = {}
    found = []
    for value, mu in zip(values, like):
        if not isinstance(value, Tensor):
            key = value, torch.promote_types(mu.dtype, torch.float32)
            if key not in made:
                made[key] = torch.full((), value, dtype=key[1], device=mu.device)
            value = made[key]
        found.append(value)
    return found, 0.0
