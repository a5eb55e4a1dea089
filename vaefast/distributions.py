"""``torch.distributions`` through the kernels: :class:`~vaefast.distributions.Normal`, whose samples, densities and KLs
are each one pass."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributions as D
from torch.distributions import constraints
from torch.distributions.kl import _KL_MEMOIZE, register_kl
from torch.distributions.utils import broadcast_all, lazy_property

from . import _normal
from ._checks import is_real, number

__all__ = ["Normal"]


class _derived(lazy_property[Any, Tensor]):
    """A parameter that was not given, computed from the one that was, each time.

    torch's lazy_property, as which validation and ``repr`` treat it, keeps the value and its graph: a distribution that
    outlives a step would then differentiate a graph that is gone, or miss the optimizer's update.
    """

    def __get__(self, instance: Any, obj_type: Any = None) -> Any:
        return super().__get__(None, obj_type) if instance is None else self.wrapped(instance)


class Normal(D.Normal):
    """The ``torch.distributions.Normal`` that samples, scores and compares in one kernel each.

    It is one (``isinstance`` says so), and what is not listed here is inherited: ``cdf``, ``icdf``, ``mean``, ``mode``,
    ``variance``, ``Independent``, transforms, KLs to other families. It has any of three scales; gradients go straight
    into the one that was given. Samples come from :func:`vaefast.reparameterize`, which keeps 16 bytes for backward
    and not the noise, and KLs between two normals, either of which may be torch's, from :func:`vaefast.gaussian_kl`,
    which does not cancel. Densities, and the second of a KL's two, work on the log variance: a ``scale`` costs them its
    logarithm, and in float32 an error of 1e-7 times its size; so give ``logvar`` where you have it. Where vaefast has
    nothing for the tensors (integers, DTensors), torch does it.

    Args:
        loc: the mean, a float or a tensor: float16, bfloat16, float32 or float64, CPU or CUDA, any strides.
        scale: the standard deviation; or
        logvar: the log variance; or
        log_std: the log of the standard deviation. Exactly one; it broadcasts with ``loc``.
        validate_args: torch's checks, which wait for the device. They are off unless True; None takes torch's default.

    Attributes:
        loc: a tensor of ``batch_shape``.
        scale: as loc; as the next two, computed each time where it was not given.
        logvar: as loc.
        log_std: as loc.

    Raises:
        TypeError: no scale or more than one.
        ValueError: not a float or a tensor; with ``validate_args=True``, a value out of range.

    Kingma & Welling 2014 (arXiv:1312.6114), sections 2.4 and appendix B.

    Example::

        q = vaefast.distributions.Normal(mu, logvar=logvar)
        kl = torch.distributions.kl_divergence(q, vaefast.distributions.Normal(0.0, 1.0)).sum(-1)
    """

    arg_constraints = {  # noqa: RUF012 (torch declares it)
        "loc": constraints.real,
        "scale": constraints.positive,
        "logvar": constraints.real,
        "log_std": constraints.real,
    }

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float | None = None,
        validate_args: bool | None = False,
        *,
        logvar: Tensor | float | None = None,
        log_std: Tensor | float | None = None,
    ) -> None:
        scales = {"scale": scale, "logvar": logvar, "log_std": log_std}
        given = {name: value for name, value in scales.items() if value is not None}
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise TypeError(f"Normal takes exactly one of scale, logvar= and log_std=; got {got}")
        ((self._given, raw),) = given.items()
        self.loc, raw = broadcast_all(*(number(value) if is_real(value) else value for value in (loc, raw)))
        # where torch has its scale, an instance's attribute, which stands before the class's property
        self.__dict__[self._given] = raw
        D.Distribution.__init__(self, self.loc.shape, validate_args=validate_args)

    @_derived
    def scale(self) -> Tensor:
        log_std: Tensor = self.log_std
        return log_std.exp()

    @_derived
    def logvar(self) -> Tensor:
        log_std: Tensor = self.log_std
        return 2 * log_std

    @_derived
    def log_std(self) -> Tensor:
        return torch.log(self.scale) if self._given == "scale" else 0.5 * self.logvar

    def expand(self, batch_shape: Any, _instance: Any = None) -> Normal:
        """The same distribution over a larger batch, without a copy.

        Args:
            batch_shape: what ``batch_shape`` broadcasts to.

        Raises:
            RuntimeError: it does not broadcast.

        Example::

            rows = vaefast.distributions.Normal(0.0, logvar=prior_logvar).expand((128, 20))
            z = rows.rsample()
        """
        new: Normal = self._get_checked_instance(Normal, _instance)
        shape = torch.Size(batch_shape)
        new._given = self._given
        new.loc = self.loc.expand(shape)
        new.__dict__[self._given] = getattr(self, self._given).expand(shape)
        D.Distribution.__init__(new, shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> D.Independent[Any]:
        """The last dimensions as one event, as Pyro writes it: Pyro's ``Independent`` where Pyro is loaded, or torch's.

        Args:
            reinterpreted_batch_ndims: how many of ``batch_shape``'s; all if None.

        Raises:
            ValueError: more than there are.

        Example::

            q = vaefast.distributions.Normal(mu, logvar=logvar).to_event(1)
            log_q = q.log_prob(q.rsample())  # [B]
        """
        dims = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        pyro = sys.modules.get("pyro.distributions")
        independent: Callable[..., D.Independent[Any]] = getattr(pyro, "Independent", D.Independent)
        return independent(self, dims)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """:meth:`rsample` without gradients.

        Example::

            z = vaefast.distributions.Normal(mu, logvar=logvar).sample((10,))
            x = decoder(z)
        """
        with torch.no_grad():
            return self.rsample(sample_shape).detach()  # for torch.jit.trace, which does not record no_grad

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``loc + scale * eps``, eps ~ N(0, 1) from the default generator's seed, differentiably.

        Args:
            sample_shape: how many samples, as dimensions before ``batch_shape``.

        Returns:
            ``[*sample_shape, *batch_shape]``, the parameters' dtype.

        Example::

            z = vaefast.distributions.Normal(mu, logvar=logvar).rsample()
            x = decoder(z)
        """
        found = _normal.rsample(self, self._extended_shape(sample_shape))
        return super().rsample(sample_shape) if found is None else found

    def log_prob(self, value: Tensor | float) -> Tensor:
        """-(log 2 pi + logvar + (value - loc)^2 / e^logvar) / 2, in nats. ``torch.compile`` fuses the formula itself.

        Args:
            value: broadcasts with ``batch_shape``; trained too. A number is taken as well.

        Returns:
            The broadcast shape, in the promoted dtype.

        Raises:
            RuntimeError: ``value`` does not broadcast.

        Example::

            q = vaefast.distributions.Normal(mu, logvar=logvar)
            log_q = q.log_prob(q.rsample())
        """
        if self._validate_args:
            self._validate_sample(value)  # type: ignore[arg-type]
        if not isinstance(value, Tensor) and is_real(value):
            value = number(value)
        found = _normal.log_prob(self, value)
        density: Tensor = super().log_prob(value) if found is None else found
        return density

    def entropy(self) -> Tensor:
        """(1 + log 2 pi) / 2 + log(scale), in nats, ``batch_shape``.

        Example::

            q = vaefast.distributions.Normal(mu, logvar=logvar)
            bound = log_joint + q.entropy().sum(-1)
        """
        log_std: Tensor = self.log_std
        return 0.5 + 0.5 * math.log(2 * math.pi) + log_std


_PAIRS = ((Normal, Normal), (Normal, D.Normal), (D.Normal, Normal))
for _pair in _PAIRS:
    register_kl(*_pair)(_normal.kl)
# as after a first call: torch.compile cannot trace torch's search for the most specific pair
_KL_MEMOIZE.update(dict.fromkeys(_PAIRS, _normal.kl))
