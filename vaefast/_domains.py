"""Whether data and parameters lie where a likelihood is defined: a question that waits for the device, and so is asked
apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _arguments, _options
from ._gaussian import wide
from ._options import Likelihood
from .likelihoods import LikelihoodEntry, entry_of


def _whole(x: Tensor) -> Tensor:
    return (x >= 0) & (x == x.floor()) & x.isfinite()


# in words, and as a question; what is in no list is asked to be a number
PLACES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "real": ("the finite numbers", torch.isfinite),
    "planes": ("the finite numbers", torch.isfinite),
    "log": ("the numbers below infinity", lambda x: x < math.inf),
    "positive": ("the numbers above 0", lambda x: (x > 0) & (x < math.inf)),
    "at least 0": ("the numbers from 0", lambda x: (x >= 0) & (x < math.inf)),
    "unit": ("[0, 1]", lambda x: (x >= 0) & (x <= 1)),
    "count": ("the whole numbers from 0", _whole),
    "total": ("the whole numbers from 0", _whole),
}


def _place(name: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    return PLACES.get(name, ("the numbers", lambda x: ~x.isnan()))


def check(
    recon: Tensor | Sequence[Tensor],
    target: Tensor,
    likelihood: str | Likelihood = "bernoulli",
    *,
    weight: Tensor | None = None,
) -> None:
    """Raises where data or parameters lie outside the likelihood's domain: which, at which index, and its value.

    :func:`vaefast.reconstruction_loss` does not ask, as the answer would have to come from the device: outside, its
    value is NaN or what the formula makes of it. So call this for the first batches of a run, or have
    ``ELBOLoss(check=10)`` do it.

    Args:
        recon, target, likelihood: as for :func:`vaefast.reconstruction_loss`.
        weight: where it is 0 nothing is asked.

    Raises:
        ValueError: a datum or a parameter outside the domain, or one that is NaN.
        TypeError, ValueError: what :func:`vaefast.reconstruction_loss` does not take.

    Example::

        vaefast.check(probabilities, images, "bernoulli_probs")
        # ValueError: target[0, 3] is 200.0; the data of 'bernoulli_probs' must be in [0, 1]. There are 784 such
    """
    chosen = _options.likelihood(likelihood)
    if isinstance(target, Tensor) and not target.is_floating_point():
        target = _arguments.indices(target, chosen)
    of = _arguments.reconstruction(recon, target, weight, chosen, False)
    entry = entry_of(chosen.name)
    if of.params[0].is_meta or not of.params[0].numel():
        return
    shape, dim = _arguments.loss_shape(of.params[0], chosen)
    on = torch.ones((), dtype=torch.bool, device=target.device) if weight is None else weight != 0

    def ask(name: str, x: Tensor, place: str, inside: Tensor, what: str) -> None:
        shown = on.expand(shape)
        outside = (~inside & (shown.unsqueeze(dim) if dim and x.dim() > len(shape) else shown)).nonzero()
        if len(outside):
            # of a tensor that broadcasts, its own index
            index = [
                k if size > 1 else 0 for k, size in zip(outside[0].tolist()[-x.dim() or len(outside[0]) :], x.shape)
            ]
            raise ValueError(
                f"{name}{index or ''} is {x[tuple(index)].item()!r}; {what} of {chosen.name!r} must be in {place}. "
                f"There are {len(outside)} such"
            )

    for name, x, domain in zip(entry.params, of.params, entry.domains):
        if domain == "positive" and chosen.options.get("eps", 0) > 0 and name == entry.params[0]:
            domain = "at least 0"  # eps is added to it
        place, inside = _place(domain)
        label = "recon" if len(of.params) == 1 else f"recon's {name}"
        ask(label, x, place, inside(x), "this parameter")
    ask("target", of.target, *_data(entry, of.target, of.params, chosen, dim), "the data")


def _data(
    entry: LikelihoodEntry, x: Tensor, params: Sequence[Tensor], chosen: Likelihood, dim: int
) -> tuple[str, Tensor]:
    """Where data live, in words, and which do."""
    if entry.support == "class":
        classes = params[0].shape[dim]
        return f"the classes 0 to {classes - 1}", _whole(x) & (x < classes)
    if entry.support == "some of total":
        total = params[entry.domains.index("total")]
        return "the whole numbers from 0 to the total", _whole(x) & (x <= total)
    if entry.support == "bins":
        o = chosen.options
        width = (o["high"] - o["low"]) / (o["bins"] - 1)
        bin_ = (wide(x) - o["low"]) / width
        # data on the grid, but for the rounding of their dtype
        rounding = 0.01 + torch.finfo(x.dtype).eps * max(abs(o["low"]), abs(o["high"])) / width
        near = (bin_ - bin_.round()).abs() <= rounding
        place = f"the {int(o['bins'])} values from {o['low']:g} to {o['high']:g}"
        return place, near & (bin_ >= -rounding) & (bin_ <= o["bins"] - 1 + rounding)
    place, inside = _place(entry.support)
    return place, inside(x)
