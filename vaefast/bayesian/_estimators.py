"""Estimators of less variance, as hooks on the layers whose noise they make: the layer itself runs at the mean.

A layer is linear in its weights, so that what other weights would give is the same layer with those in their place:
with the variances, over squared inputs, it gives the outputs' variances; with a perturbation, the outputs'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._gaussian import wide
from .._options import Parameterization
from ..functional import reparameterize
from ._sites import Site, in_place_of

# how many spatial dimensions; a subclass's forward may be anything, so that these types alone are meant
LAYERS: dict[type[nn.Module], int] = {
    nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3,
    nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3,
}  # fmt: skip
# where no input is other than 0, there is no noise, and the root would have no gradient
VARIANCE = Parameterization("var", clamp=(1e-30, math.inf))


class Noise:
    """A forward hook; without ``spread`` it does nothing.

    ``weight`` and ``bias`` are the sites' numbers, -1 for a bias that has no posterior.
    """

    def __init__(self, weight: int, bias: int) -> None:
        self.weight, self.bias = weight, bias
        self.spread: tuple[Tensor, Tensor | None] | None = None
        self.generator: torch.Generator | None = None

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if self.spread is None:
            return None
        return self.noisy(layer, args, kwargs, output, self.spread)

    def noisy(
        self, layer: nn.Module, args: Any, kwargs: Any, output: Tensor, spread: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        raise NotImplementedError


def _with(layer: nn.Module, weight: Tensor, bias: Tensor | None, args: Any, kwargs: Any) -> Tensor:
    with in_place_of([(layer, "weight"), (layer, "bias")], [weight, bias]):
        found: Tensor = layer.forward(*args, **kwargs)  # which calls no hook
    return found


def _input(args: Any, kwargs: Any) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    others = {name: value for name, value in kwargs.items() if name != "input"}
    return kwargs["input"], (), others


class Local(Noise):
    """Kingma et al. 2015 (arXiv:1506.02557), equation 6: each output drawn from its own Gaussian; ``spread`` has the
    weights' standard deviations."""

    def noisy(
        self, layer: nn.Module, args: Any, kwargs: Any, output: Tensor, spread: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        x, rest, kwargs = _input(args, kwargs)
        std, of_bias = spread
        square = wide(x).square()
        # in half precision squares of small and of large numbers are 0 and infinite
        with torch.autocast(x.device.type, enabled=False):
            variances = wide(std).square(), None if of_bias is None else wide(of_bias).square()
            variance = _with(layer, *variances, (square, *rest), kwargs)
        return reparameterize(output, variance, parameterization=VARIANCE, generator=self.generator)


class Flipout(Noise):
    """Wen et al. 2018 (arXiv:1803.04386), equation 3: each example's own signs on one perturbation, ``spread``."""

    def noisy(
        self, layer: nn.Module, args: Any, kwargs: Any, output: Tensor, spread: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        x, rest, kwargs = _input(args, kwargs)
        spatial = LAYERS[type(layer)]
        perturbed = _with(layer, *spread, (x * self.signs(x, spatial), *rest), kwargs)
        return output + perturbed * self.signs(perturbed, spatial)

    def signs(self, x: Tensor, spatial: int) -> Tensor:
        """For each example and channel, the same at all its places, as a weight is."""
        shape = [1] * x.dim()
        if spatial:
            shape[-spatial - 1] = x.shape[-spatial - 1]
            batched = x.dim() > spatial + 1
        else:
            shape[-1] = x.shape[-1]
            batched = x.dim() > 1
        if batched:
            shape[0] = x.shape[0]
        return torch.randint(0, 2, shape, generator=self.generator, dtype=x.dtype, device=x.device).mul_(2).sub_(1)


ESTIMATORS: dict[str, type[Noise] | None] = {"weights": None, "local": Local, "flipout": Flipout}


def attach(kind: type[Noise], module: nn.Module, sites: Sequence[Site]) -> list[Noise]:
    """A hook on every layer that it applies to, whose parameters nothing else shares."""
    at = {site.places[0]: i for i, site in enumerate(sites) if len(site.places) == 1}
    found = []
    for layer in module.modules():
        if type(layer) in LAYERS and (layer, "weight") in at:
            noise = kind(at[layer, "weight"], at.get((layer, "bias"), -1))
            layer.register_forward_hook(noise, with_kwargs=True)
            found.append(noise)
    return found


def detach(module: nn.Module) -> None:
    """The module without them."""
    for layer in module.modules():
        for key in [key for key, hook in layer._forward_hooks.items() if isinstance(hook, Noise)]:
            del layer._forward_hooks[key]
            layer._forward_hooks_with_kwargs.pop(key, None)
