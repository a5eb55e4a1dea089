"""diffusers' ``DiagonalGaussianDistribution``: ``sample``, ``kl`` and ``nll`` by :class:`vaefast.DiagonalGaussian`.

What is made while this is on is of a subclass, and stays fused. ``mean``, ``logvar``, ``std`` and ``var`` are computed
when read, from ``parameters``; setting one of them does not move its samples. No gradient passes on the edges of the
clamp, -30 and 20, where ``torch.clamp`` lets it. What the kernels have nothing for stays diffusers': subclasses, lists
of generators, deterministic ones, code under ``torch.compile``, which fuses by itself.

Rombach et al. 2022 (arXiv:2112.10752).

Example::

    vaefast.integrations.diffusers.enable()
    posterior = autoencoder.encode(images).latent_dist
    loss = reconstruction(autoencoder.decode(posterior.sample()).sample, images) + 1e-6 * posterior.kl().mean()
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _normal
from .._gaussian import wide
from ..functional import reparameterize
from ..packed import _DIFFUSERS, DiagonalGaussian
from ._integration import Integration, library, replace

__all__ = ["disable", "enable", "enabled"]


def _fused(cls: Any, noise: str) -> Any:
    """The subclass of diffusers' class."""

    class FusedDiagonalGaussian(cls):
        parameters: Tensor
        deterministic: bool

        # as pickle and deepcopy see it: theirs, made anew
        def __reduce__(self) -> tuple[Any, ...]:
            return cls, (self.parameters, self.deterministic)

        @property
        def _q(self) -> DiagonalGaussian:
            return DiagonalGaussian(self.parameters)

        @cached_property
        def mean(self) -> Tensor:
            return self._q.mean

        @cached_property
        def logvar(self) -> Tensor:
            return self._q.logvar

        @cached_property
        def std(self) -> Tensor:
            return torch.exp(0.5 * self.logvar) if not self.deterministic else torch.zeros_like(self.mean)

        @cached_property
        def var(self) -> Tensor:
            return torch.exp(self.logvar) if not self.deterministic else torch.zeros_like(self.mean)

        def sample(self, generator: Any = None) -> Tensor:
            if self.deterministic or not (generator is None or isinstance(generator, torch.Generator)):
                return super().sample(generator)  # type: ignore[no-any-return]
            if noise == "philox":
                return self._q.sample(generator)
            mean, raw = self.parameters.chunk(2, 1)
            randn = library("diffusers.utils.torch_utils", "diffusers").randn_tensor
            eps = randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            return reparameterize(mean, raw, parameterization=_DIFFUSERS, eps=eps)

        def kl(self, other: Any = None) -> Tensor:
            if self.deterministic or not (other is None or self._alike(other)):
                return super().kl(other)  # type: ignore[no-any-return]
            prior = None if other is None else DiagonalGaussian(other.parameters)
            if self.parameters.dim() == 4:
                return self._q.kl(prior).to(self.parameters.dtype)
            # theirs sums over these three whatever there is, also for videos
            prior = None if other is None else DiagonalGaussian(wide(other.parameters))
            kl = DiagonalGaussian(wide(self.parameters)).kl(prior, reduction="none")
            return kl.sum([1, 2, 3]).to(self.parameters.dtype)

        def _alike(self, other: Any) -> bool:
            mine, its = self.parameters, other.parameters
            return (
                not other.deterministic
                and _normal.usable(mine, its)
                and (mine.dtype, mine.shape) == (its.dtype, its.shape)
            )

        def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
            if self.deterministic or sample.shape != self.mean.shape:
                return super().nll(sample, dims)  # type: ignore[no-any-return]
            # in the dtype of theirs, but added up before it is narrowed
            return self._q.nll(sample, dims).to(torch.promote_types(self.parameters.dtype, sample.dtype))

    FusedDiagonalGaussian.__name__ = FusedDiagonalGaussian.__qualname__ = cls.__name__
    return FusedDiagonalGaussian


def _covered(parameters: object, deterministic: object) -> bool:
    return (
        isinstance(deterministic, bool)
        and _normal.usable(parameters)
        and isinstance(parameters, Tensor)
        and parameters.dim() > 1
        and parameters.shape[1] % 2 == 0
        and not torch.compiler.is_compiling()
        and _backends.native_for(parameters)
    )


def _install(undo: ExitStack, noise: str) -> None:
    # its constructor is what every module has, whenever and under whatever name it imported the class
    cls = library("diffusers.models.autoencoders.vae", "diffusers").DiagonalGaussianDistribution
    fused, theirs = _fused(cls, noise), cls.__init__

    def __init__(self: Any, parameters: Tensor, deterministic: bool = False) -> None:
        if type(self) is not cls or not _covered(parameters, deterministic):
            theirs(self, parameters, deterministic)
            return
        self.__class__ = fused
        self.parameters, self.deterministic = parameters, deterministic

    replace(undo, cls, "__init__", __init__)


integration = Integration(_install)
enable, disable, enabled = integration.enable, integration.disable, integration.enabled
