"""Where likelihoods' parameters and data live, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Domain:
    """Where a parameter lives: ``of`` takes any number there, as a network puts it out. ``extremes`` are the values,
    ends of the domain among them, at which the numbers are held to what the documentation promises."""

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
    "count": (0.0, 1.0, 2.0, 7.0, 100.0, 1e6),
    "bins": tuple(-1.0 + 2.0 * k / 255 for k in (0, 1, 100, 128, 254, 255)),
    "class": (),
    "some of total": (),
}
