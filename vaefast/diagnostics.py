"""Posterior collapse: which latent units a model uses, told from the posteriors of a data set.

A unit that carries nothing has q(z|x) = p(z) for every x: no KL, and a posterior mean that does not move with x. KLs
are in nats, and z is measured from its prior, as ``(z - prior_mu) / prior_std``: under a prior that is learned, such as
a hierarchy's, the posterior mean moves where the prior's does, and that says nothing about x. Under N(0, I) this is z.

A unit is one element of a sample: of ``[B, C, H, W]`` there are C H W. For one unit a channel,
each place being a sample, give ``mu.movedim(1, -1).flatten(0, 2)``, and the other arguments likewise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _options
from ._arguments import posterior, soft
from ._checks import floating, is_real, number
from ._gaussian import logvar_of
from ._options import Parameterization
from .functional import Prior, gaussian_kl

__all__ = ["CollapseMonitor", "CollapseReport", "active_units", "collapse_report"]

THRESHOLD = 0.01
LISTED = 20


def active_units(mu: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Which units are active: ``Var_x(E_q[z|x]) > threshold``, the variance of the posterior mean over the data.

    Burda et al. 2016 (arXiv:1509.00519), section 5: a unit's activity is ``A = Cov_x(E_q(z|x)[z])``, and it is active
    where ``A > 0.01``. Data in batches goes to a :class:`CollapseMonitor`.

    Args:
        mu: ``[N, ...]``, the posterior means of at least 2 samples, of any floating dtype.
        threshold: at least 0, in the square of z's unit.

    Returns:
        A bool tensor, the shape of one sample.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype or shape, or fewer than 2 samples.

    Example::

        active = vaefast.diagnostics.active_units(mu)
        print(f"{int(active.sum())} of {active.numel()} units are active")
    """
    threshold = _threshold(threshold)
    mean = _Moments()
    mean.update(_samples(mu))
    return mean.variance() > threshold


@dataclass(frozen=True, eq=False)
class CollapseReport:
    """What :func:`~vaefast.diagnostics.collapse_report` and :class:`~vaefast.diagnostics.CollapseMonitor` find.

    ``str()`` is a table, ``plot()`` a picture.

    All tensors are float64 and have the shape of one sample.

    Args:
        samples: how many samples were seen.
        threshold: the activity above which a unit is active.
        kl: a unit's KL(q || p) in nats, its mean over the samples.
        activity: ``Var_x(E_q[z|x])``; see :func:`active_units`.
        mean, std: of the aggregated posterior ``q(z) = E_x q(z|x)``, which a good fit to the prior brings to 0 and 1:
            ``mean = E_x[mu]``, ``std^2 = E_x[sigma^2] + E_x[mu^2] - mean^2``. As activity, they are measured from the
            prior.

    Example::

        report = vaefast.diagnostics.collapse_report(mu, logvar)
        print(report.number_active, report.kl.sum()); report.plot()
    """

    samples: int
    threshold: float
    kl: Tensor
    activity: Tensor
    mean: Tensor
    std: Tensor

    @property
    def active(self) -> Tensor:
        """Where ``activity > threshold``, a bool tensor."""
        return self.activity > self.threshold

    @property
    def number_active(self) -> int:
        return int(self.active.sum())

    def __str__(self) -> str:
        units = self.kl.numel()
        lines = [
            f"{self.number_active} of {units} units active: Var_x(E_q[z|x]) > {self.threshold:g}",
            f"KL {float(self.kl.sum()):.2f} nats a sample, mean of {self.samples}",
            f"{'unit':>12}{'KL':>10}{'activity':>12}{'mean':>10}{'std':>10}",
        ]
        order = self.kl.flatten().argsort(descending=True)[:LISTED]
        indices = torch.stack(torch.unravel_index(order, self.kl.shape or (1,)), dim=1).tolist()
        columns = (self.kl, self.activity, self.mean, self.std, self.active)
        values = (t.flatten()[order].tolist() for t in columns)
        for index, kl, activity, mean, std, active in zip(indices, *values):
            name = ",".join(map(str, index))
            idle = "" if active else "  not active"
            lines.append(f"{name:>12}{kl:10.4f}{activity:12.4f}{mean:10.3f}{std:10.3f}{idle}")
        if units > LISTED:
            lines.append(f"{'...':>12} and {units - LISTED} with less KL")
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Every unit's KL, the largest first, and whether it is active.

        Args:
            ax: matplotlib's Axes to draw on; a new figure's if None.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is missing.
        """
        if ax is None:
            try:
                import matplotlib.pyplot as plt
            except ImportError as error:
                raise ImportError("plot() needs matplotlib: pip install 'vaefast[demo]'") from error
            _, ax = plt.subplots()
        kl, order = self.kl.flatten().sort(descending=True)
        active = self.active.flatten()[order]
        number, units = self.number_active, self.kl.numel()
        # stairs draw a million units as fast as ten
        for chosen, colour, name in ((active, "#30638e", "active"), (~active, "#d1495b", "not active")):
            if chosen.any():
                ax.stairs((kl * chosen).tolist(), fill=True, color=colour, label=name)
        ax.set(xlabel="unit, by KL", ylabel="KL, nats", xlim=(0, max(units, 1)))
        ax.locator_params(axis="x", integer=True)
        ax.set_title(f"{number} of {units} units active, KL {float(kl.sum()):.2f} nats")
        if units:
            ax.legend(frameon=False)
        return ax


class CollapseMonitor:
    """Gathers a :class:`~vaefast.diagnostics.CollapseReport` over batches, in float64, as exact as if seen at once.

    The variance over batches is put together as in Chan et al. 1983 (The American Statistician 37(3)), equation 2.1.

    Args:
        threshold: the activity above which a unit is active.
        parameterization: what ``logvar`` means; see :class:`vaefast.Parameterization`.

    Raises:
        TypeError, ValueError: an argument of wrong type, or an unknown name.

    Example::

        monitor = vaefast.diagnostics.CollapseMonitor()
        for x in loader: monitor.update(*encoder(x).chunk(2, dim=1))
        print(monitor.report())
    """

    def __init__(self, threshold: float = THRESHOLD, *, parameterization: str | Parameterization = "logvar") -> None:
        self.threshold = _threshold(threshold)
        self.parameterization = _options.parameterization(parameterization)
        self.reset()

    def reset(self) -> None:
        """Forgets what was seen; the next batch is the first."""
        self._kl, self._mean, self._variance = _Moments(), _Moments(), _Moments()

    @torch.no_grad()
    def update(self, mu: Tensor, logvar: Tensor, prior_mu: Prior = None, prior_logvar: Prior = None) -> None:
        """One more batch, of any size.

        Args:
            mu, logvar: ``[B, ...]``; B may be 0 or change, the rest may not.
            prior_mu, prior_logvar: as for :func:`vaefast.gaussian_kl`.

        Raises:
            TypeError, ValueError: an argument of wrong type, dtype, shape or device.
        """
        mu, logvar = (_samples(t) for t in posterior(mu, logvar))
        if self._mean.count and mu.shape[1:] != self._mean.mean.shape:
            raise ValueError(
                f"mu has samples of shape {tuple(mu.shape[1:])} but those before had {tuple(self._mean.mean.shape)}; "
                "use another monitor, or reset() this one"
            )
        kl = gaussian_kl(
            mu, logvar, prior_mu, prior_logvar, parameterization=self.parameterization, reduction="none"
        )  # fmt: skip
        mu, logvar, p = soft(mu, logvar, self.parameterization)
        mu, logvar = _double(mu), _double(logvar_of(logvar, p.spec))
        pm, plv = (
            torch.as_tensor(0.0 if prior is None else prior, device=mu.device, dtype=torch.float64)
            for prior in (prior_mu, prior_logvar)
        )
        self._kl.update(kl)
        self._mean.update((mu - pm) * (-0.5 * plv).exp())
        self._variance.update((logvar - plv).exp())

    def report(self) -> CollapseReport:
        """What was found so far.

        Raises:
            ValueError: fewer than 2 samples were seen; a variance needs two.
        """
        of_mean = self._mean
        activity = of_mean.variance()
        std = (self._variance.mean + of_mean.squares / of_mean.count).sqrt()
        return CollapseReport(of_mean.count, self.threshold, self._kl.mean, activity, of_mean.mean, std)


def collapse_report(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Prior = None,
    prior_logvar: Prior = None,
    *,
    threshold: float = THRESHOLD,
    parameterization: str | Parameterization = "logvar",
) -> CollapseReport:
    """A :class:`~vaefast.diagnostics.CollapseReport` of one batch: KL, activity and aggregated posterior, unit by unit.

    Args:
        mu, logvar, prior_mu, prior_logvar, parameterization: as for :func:`vaefast.gaussian_kl`; at least 2 samples.
        threshold: the activity above which a unit is active.

    Returns:
        The report; ``print`` it, or ``plot()`` it.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape or device, or fewer than 2 samples.

    Example::

        report = vaefast.diagnostics.collapse_report(mu, logvar)
        print(report)
    """
    monitor = CollapseMonitor(threshold, parameterization=parameterization)
    monitor.update(mu, logvar, prior_mu, prior_logvar)
    return monitor.report()


class _Moments:
    """Mean and variance over dimension 0 of all that was seen."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.squares = self.mean

    def update(self, x: Tensor) -> None:
        x = _double(x.detach())
        count = self.count + len(x)
        if not len(x):
            return
        mean = x.mean(0)
        squares = (x - mean).square().sum(0)
        if self.count:
            # on the latest batch's device: the model may have moved since
            delta = mean - self.mean.to(mean.device)
            squares = self.squares.to(mean.device) + squares + delta.square() * (self.count * len(x) / count)
            mean = self.mean.to(mean.device) + delta * (len(x) / count)
        self.count, self.mean, self.squares = count, mean, squares

    def variance(self) -> Tensor:
        if self.count < 2:
            raise ValueError(f"activity is a variance over samples and needs at least 2, got {self.count}")
        return self.squares / (self.count - 1)


def _double(x: Tensor) -> Tensor:
    """On the CPU where the device has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _samples(x: object) -> Tensor:
    """At least float32, with a dimension of samples."""
    x = floating("mu", x)
    if x.dim() == 0:
        raise ValueError("mu must be [N, ...], samples first, but it is a 0-d tensor")
    return x if x.dtype == torch.float64 else x.float()


def _threshold(value: object) -> float:
    if not is_real(value):
        raise TypeError(f"threshold must be a number, got {type(value).__name__}")
    found = number(value)
    if not (found >= 0 and math.isfinite(found)):
        raise ValueError(f"threshold must be finite and at least 0, got {value!r}")
    return found
