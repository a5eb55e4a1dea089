"""The normals of torch.distributions through the kernels: what ``vaefast.distributions`` and the integrations share.

Each function returns None where the kernels have nothing for the tensors, so that the caller does what PyTorch does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal
from torch.distributions.kl import _KL_REGISTRY

from . import _backends
from ._checks import FLOATING, wrapped
from ._functorch import tracing, unseen
from ._gaussian import Prior
from ._torch import half_squares, trained
from .functional import gaussian_kl, reconstruction_loss, reparameterize

# what a distribution may be given, and the parameterization that it is
SCALES = {"scale": "std", "logvar": "logvar", "log_std": "log_std"}

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

_formula: Callable[[Normal, Normal], Tensor] = _KL_REGISTRY[Normal, Normal]


class Parameters(NamedTuple):
    """loc and one of ``SCALES``, of one shape, unless one was set by hand."""

    loc: Tensor
    raw: Tensor
    given: str

    @property
    def usable(self) -> bool:
        return usable(self.loc, self.raw) and self.loc.shape == self.raw.shape

    @property
    def logvar(self) -> Tensor:
        """float32 at least: a half's log variance would be off by what its density multiplies."""
        raw = self.raw if self.raw.dtype.itemsize > 2 else self.raw.float()
        return raw if self.given == "logvar" else 2 * (raw if self.given == "log_std" else raw.log())


def parameters(d: Normal) -> Parameters:
    given: str = getattr(d, "_given", "scale")  # torch's own have a scale
    return Parameters(d.loc, getattr(d, given), given)


def usable(*tensors: object) -> bool:
    """Whether vaefast's functions take these."""
    first = tensors[0]
    return all(
        isinstance(t, Tensor)
        and t.dtype in FLOATING
        and t.layout is torch.strided
        and not t.is_nested
        and not wrapped(t)
        and isinstance(first, Tensor)
        and t.device == first.device
        for t in tensors
    )  # fmt: skip


def covered(d: Normal) -> bool:
    """Whether the kernels, and not the reference, would do the work."""
    return usable(d.loc) and _backends.native_for(d.loc)


# numbers, of which PyTorch's operators take no longer on one CPU thread than a call of ours: of a density with its
# backward, and alone
FEW_TRAINED, FEW = 1 << 14, 1 << 16


def few(*tensors: object) -> bool:
    """Whether so few numbers come of these, on the CPU, that PyTorch's operators are as fast."""
    most = 0
    for t in tensors:
        if not isinstance(t, Tensor) or not t.is_cpu:  # and a graph is for any size
            return False
        count = t.numel()
        if count > most:
            most = count
    if most >= FEW or torch.compiler.is_compiling():
        return False
    return most < FEW_TRAINED or not trained(*tensors)


def _promoted(*tensors: Tensor) -> torch.dtype:
    """torch.result_type of floating tensors, which torch.compile does not trace: 0-d ones count among themselves."""
    dims = any(t.dim() for t in tensors)
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors if t.dim() or not dims))


def _alike(loc: Tensor, scale: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> bool:
    """Whether these are float32 of the CPU, and the prior's of one shape, the posterior's or a number's."""
    return (
        all(type(t) is Tensor and t.dtype is torch.float32 and t.is_cpu for t in (loc, scale, prior_loc, prior_scale))
        and loc.layout is torch.strided
        and not loc.is_nested
        and loc.shape == scale.shape
        and prior_loc.shape == prior_scale.shape
        and (prior_loc.shape == loc.shape or not prior_loc.dim())
    )


def rsample(d: Normal, shape: torch.Size, noise: str | None = None) -> Tensor | None:
    q = parameters(d)
    loc, raw, given = q
    # torch draws no noise that is made of other tensors
    ours = hasattr(d, "_given") and wrapped(loc) and wrapped(raw)
    if not ours and not q.usable:
        return None
    loc = loc.to(_promoted(loc, raw))
    return reparameterize(loc.expand(shape), raw.expand(shape), parameterization=SCALES[given], noise=noise)


def log_prob(d: Normal, value: object) -> Tensor | None:
    q = parameters(d)
    # a trace is made twice and compared, with and without gradients
    if not q.usable or not usable(q.loc, value) or tracing():
        return None
    assert isinstance(value, Tensor)
    dtype = _promoted(value, q.loc, q.raw)
    # torch.compile makes a loop of the formula, and of what is done with it
    plain = torch.compiler.is_compiling() or (few(q.loc, q.raw, value) and not _backends.native_for(q.loc))
    if dtype.itemsize > 2 and plain:
        if q.given == "scale":
            return None
        return -half_squares(value - q.loc, q.logvar) - HALF_LOG_2PI
    recon, target = q.loc, value
    if trained(recon, target):
        # the density knows the difference alone, which has a gradient for both; and backward does not read them, so
        # that they may change before it
        wide = torch.promote_types(dtype, torch.float32)
        recon = recon.to(wide) - target.to(wide)
        target = torch.zeros((), dtype=wide, device=recon.device)
    recon, target = torch.broadcast_tensors(recon, target)
    nll = reconstruction_loss((recon, q.logvar), target, likelihood="gaussian", reduction="none")
    return -nll.to(dtype)


def kl(p: Normal, q: Normal) -> Tensor:
    """KL(p || q) for every pair of normals: one function, so that no pair of types is ambiguous.

    Plain ones of torch keep torch's formula where there are no kernels for them.
    """
    plain = not hasattr(p, "_given") and not hasattr(q, "_given")
    posterior, prior = parameters(p), parameters(q)
    loc, raw, given = posterior
    if _alike(loc, raw, prior.loc, prior.raw) and (not plain or _backends.native_for(loc)):
        # what most are: nothing to promote, and nothing to expand
        pm: Prior = prior.loc
        plv: Prior = prior.logvar
        if not prior.loc.dim() and not trained(prior.loc, prior.raw) and unseen(loc, prior.loc):
            numbers = prior.loc.item(), prior.logvar.item()
            if all(map(math.isfinite, numbers)):
                pm, plv = numbers
        return gaussian_kl(loc, raw, pm, plv, parameterization=SCALES[given], reduction="none")
    fit = posterior.usable and prior.usable and usable(loc, prior.loc)
    if not fit or (plain and not _backends.native_for(loc)):
        return _formula(p, q)
    shape = torch.broadcast_shapes(loc.shape, prior.loc.shape)
    dtype = _promoted(loc, raw, prior.loc, prior.raw)
    found = gaussian_kl(
        loc.expand(shape), raw.expand(shape), prior.loc, prior.logvar,
        parameterization=SCALES[given], reduction="none",
    )  # fmt: skip
    return found.to(dtype)
