"""diffusers' Gaussians: ``DiagonalGaussianDistribution``, ``OobleckDiagonalGaussianDistribution`` and
``MiniMaxH3AudioDiagonalGaussianDistribution``.

The first's ``sample``, ``kl`` and ``nll`` go by :class:`vaefast.DiagonalGaussian`.

What is made while this is on is of a subclass, and stays fused. ``mean``, ``logvar``, ``std`` and ``var`` are computed
when read, from ``parameters``; setting one of them does not move its samples. No gradient passes on the edges of the
clamp, -30 and 20, where ``torch.clamp`` lets it. What the kernels have nothing for stays diffusers': subclasses, lists
of generators, deterministic ones, code under ``torch.compile``, which fuses by itself.

The audio autoencoders' two sample in one kernel, Oobleck's of a softplus with 1e-4 added, MiniMax H3's of a log std;
so does Oobleck's KL to N(0, I), which is twice the KL, as theirs is. Its KL to another is left to diffusers: it has the
wrong sign. ``enable()`` returns the names of these, and those of the classes that are left alone: an
``IdentityDistribution`` has nothing to compute.

Rombach et al. 2022 (arXiv:2112.10752).

Example::

    vaefast.integrations.diffusers.enable()
    posterior = autoencoder.encode(images).latent_dist
    loss = reconstruction(autoencoder.decode(posterior.sample()).sample, images) + 1e-6 * posterior.kl().mean()
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .. import _backends, _normal
from .._gaussian import wide
from .._options import Parameterization
from ..functional import gaussian_kl, reparameterize
from ..packed import _DIFFUSERS, DiagonalGaussian
from ._integration import Coverage, Integration, library, replace

__all__ = ["disable", "enable", "enabled"]


def _fused(cls: Any, noise: str | None) -> Any:
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
            if noise != "torch":
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
            # theirs takes whatever has a mean and a variance
            mine, its = self.parameters, getattr(other, "parameters", None)
            return (
                getattr(other, "deterministic", True) is False
                and isinstance(its, Tensor)
                and _normal.usable(mine, its)
                and (mine.dtype, mine.shape) == (its.dtype, its.shape)
            )

        def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
            if (
                self.deterministic
                or dims is None
                or not _normal.usable(self.parameters, sample)
                or sample.shape != self.mean.shape
            ):
                return super().nll(sample, dims)  # type: ignore[no-any-return]
            # in the dtype of theirs, but added up before it is narrowed
            return self._q.nll(sample, (dims,) if isinstance(dims, int) else dims).to(
                torch.promote_types(self.parameters.dtype, sample.dtype)
            )

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


def _oobleck(undo: ExitStack, cls: Any, noise: str | None) -> None:
    theirs = cls.kl

    def kl(self: Any, other: Any = None) -> Tensor:
        if other is not None or self.deterministic or not _alike(self.mean, self.scale) or type(self) is not cls:
            return cast(Tensor, theirs(self, other))
        # the sum over channels of what is not halved, and its mean over the rest
        mean: Tensor = self.mean
        found = gaussian_kl(wide(mean), self.scale, parameterization=_OOBLECK, reduction="mean")
        return (2 * mean.shape[1] * found).to(mean.dtype)

    replace(undo, cls, "kl", kl)
    _sample(undo, cls, noise, "scale", _OOBLECK)


def _sample(undo: ExitStack, cls: Any, noise: str | None, raw: str, parameterization: str | Parameterization) -> None:
    theirs = cls.sample

    def sample(self: Any, generator: Any = None) -> Tensor:
        mean, scale = self.mean, getattr(self, raw)
        known = type(self) is cls and (generator is None or isinstance(generator, torch.Generator))
        if not known or not _alike(mean, scale):
            return cast(Tensor, theirs(self, generator))
        if noise != "torch" and (generator is None or generator.device.type == mean.device.type):
            return reparameterize(mean, scale, parameterization=parameterization, generator=generator)
        randn = library("diffusers.utils.torch_utils", "diffusers").randn_tensor
        eps = randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return reparameterize(mean, scale, parameterization=parameterization, eps=eps)

    replace(undo, cls, "sample", sample)


def _alike(mean: object, scale: object) -> bool:
    return (
        _normal.usable(mean, scale)
        and isinstance(mean, Tensor)
        and isinstance(scale, Tensor)
        and mean.shape == scale.shape
        and mean.dtype == scale.dtype
        and not torch.compiler.is_compiling()
        and _backends.native_for(mean)
    )


def _find(module: str, name: str) -> Any:
    """A class of diffusers, or None where it is of another age."""
    library("diffusers", "diffusers")
    try:
        return getattr(importlib.import_module(f"diffusers.models.autoencoders.{module}"), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("diffusers."):
            raise
        return None


def _install(undo: ExitStack, noise: str | None) -> None:
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
    oobleck, audio = (_find(module, name) for module, name in _AUDIO)
    if oobleck is not None:
        _oobleck(undo, oobleck, noise)
    if audio is not None:
        _sample(undo, audio, noise, "logs", "log_std")


def _coverage() -> Coverage:
    """By the names of the classes that diffusers' models define."""
    models = Path(library("diffusers.models", "diffusers").__file__).parent
    texts = (path.read_text(encoding="utf-8") for path in sorted(models.rglob("*.py")))
    names = {name for text in texts for name in re.findall(r"^class (\w*Distribution)\b", text, re.MULTILINE)}
    fused = {"DiagonalGaussianDistribution", *(name for _, name in _AUDIO)} & names
    return Coverage(tuple(sorted(fused)), tuple(sorted(names - fused)))


_OOBLECK = Parameterization("softplus", floor=1e-4)
_AUDIO = (
    ("autoencoder_oobleck", "OobleckDiagonalGaussianDistribution"),
    ("autoencoder_kl_minimax_h3_audio", "MiniMaxH3AudioDiagonalGaussianDistribution"),
)

integration = Integration(_install, _coverage)
enable, disable, enabled = integration.enable, integration.disable, integration.enabled
