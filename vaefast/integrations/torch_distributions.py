"""``torch.distributions.Normal``: ``rsample``, ``sample``, ``log_prob`` and the KL between two, fused.

Subclasses, Pyro's and scvi-tools' among them, and what is built of normals (``Independent``, ``LogNormal``) come along.
The density of a ``MixtureSameFamily`` of K diagonal normals in D dimensions, as a prior is, goes by
:func:`vaefast.priors.mixture_log_prob`, without a tensor of ``[..., K, D]``; one for each sample is torch's own. A
normal's ``entropy`` is a logarithm and has nothing to fuse; few draws and densities on a CPU stay torch's own, which
are as fast. Construction still validates as torch does, which waits for a GPU: ``vaefast.distributions.Normal`` does
not, or pass ``validate_args=False``.

Kingma & Welling 2014 (arXiv:1312.6114), section 2.4 and appendix B.

Example::

    with vaefast.integrations.torch_distributions.enabled():
        kl = kl_divergence(Normal(mu, std), Normal(0.0, 1.0))
        z = Normal(mu, std).rsample()
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from .. import _backends, _mixtures, _normal
from .._functorch import unseen
from ..priors import mixture_log_prob
from ._integration import Coverage, Integration, replace, replace_kl

__all__ = ["disable", "enable", "enabled"]


def _not_negative(scale: Tensor) -> bool:
    """What torch.normal asks of a scale that no constructor has looked at; its own error is the one to be seen."""
    return torch.compiler.is_compiling() or scale.is_meta or not scale.numel() or bool(scale.min() >= 0)


# draws of fewer numbers, which with their backward take longer on one CPU thread than PyTorch's operators do
FEW = 1 << 15


def _few(loc: Tensor, sample_shape: Any) -> bool:
    if torch.compiler.is_compiling() or not loc.is_cpu:  # a graph is for any size
        return False
    count = loc.numel()
    return count < FEW and (not sample_shape or count * math.prod(sample_shape) < FEW)


def replace_methods(undo: ExitStack, cls: type[Normal], noise: str | None) -> None:
    """Fused methods for cls, which fall back on its own, or on those that it inherits."""

    def before(name: str) -> Callable[..., Tensor]:
        own: Callable[..., Tensor] | None = vars(cls).get(name)
        return own or (lambda self, *args: getattr(super(cls, self), name)(*args))

    theirs = {name: before(name) for name in ("rsample", "sample", "log_prob")}

    def rsample(self: Normal, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        if noise is None and _few(self.loc, sample_shape):
            return theirs["rsample"](self, sample_shape)
        found = None
        if _normal.covered(self):
            found = _normal.rsample(self, self._extended_shape(sample_shape), noise)
        return theirs["rsample"](self, sample_shape) if found is None else found

    def sample(self: Normal, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        if noise is None and _few(self.loc, sample_shape):
            return theirs["sample"](self, sample_shape)
        found = None
        if _normal.covered(self) and (self._validate_args or _not_negative(self.scale)):
            with torch.no_grad():
                found = _normal.rsample(self, self._extended_shape(sample_shape), noise)
        # torch.jit.trace does not record no_grad
        return theirs["sample"](self, sample_shape) if found is None else found.detach()

    def log_prob(self: Normal, value: Tensor) -> Tensor:
        found = None
        few = isinstance(value, Tensor) and _normal.few(self.loc, self.scale, value)
        if not few and _normal.covered(self):
            if self._validate_args:
                self._validate_sample(value)
            found = _normal.log_prob(self, value)
        return theirs["log_prob"](self, value) if found is None else found

    for name, method in (("rsample", rsample), ("sample", sample), ("log_prob", log_prob)):
        replace(undo, cls, name, method)


def _mixture(d: MixtureSameFamily, value: object) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """For many values ``[..., D]`` of one mixture of K diagonal normals, what ``mixture_log_prob`` takes."""
    weights, each = d.mixture_distribution, d.component_distribution
    if not isinstance(weights, Categorical) or not isinstance(each, Independent):
        return None
    base = each.base_dist
    if not isinstance(base, Normal) or type(base).log_prob is not Normal.log_prob:
        return None
    loc, scale = base.loc, base.scale
    if not isinstance(value, Tensor) or not _normal.usable(loc, scale, value, weights.logits) or not unseen(loc, value):
        return None
    one = loc.dim() == 2 and each.reinterpreted_batch_ndims == 1 and weights.logits.shape == loc.shape[:1]
    wide = loc.dtype.itemsize > 2 and value.dtype == loc.dtype == scale.dtype == weights.logits.dtype
    if not one or not wide or value.dim() < 1 or value.shape[-1] != loc.shape[1]:
        return None
    kernels = _mixtures.kernels_for(_backends.native_for(value), value, loc, scale, weights.logits)
    if kernels is None and value.numel() * len(loc) <= _mixtures.FEW:
        return None
    return value, loc, 2 * scale.log(), weights.logits


def _replace_mixtures(undo: ExitStack) -> None:
    theirs: Callable[..., Tensor] = MixtureSameFamily.log_prob

    def log_prob(self: MixtureSameFamily, x: Tensor) -> Tensor:
        arguments = _mixture(self, x)
        if arguments is None:
            return theirs(self, x)
        if self._validate_args:
            self._validate_sample(x)
        return mixture_log_prob(*arguments)

    replace(undo, MixtureSameFamily, "log_prob", log_prob)


def _install(undo: ExitStack, noise: str | None) -> None:
    replace_methods(undo, Normal, noise)
    _replace_mixtures(undo)
    replace_kl(undo, [(Normal, Normal)], _normal.kl)


integration = Integration(_install, lambda: Coverage(("Normal", "MixtureSameFamily")))
enable, disable, enabled = integration.enable, integration.disable, integration.enabled
