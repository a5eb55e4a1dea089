"""Warm-up of beta, the KL's factor: a step goes in, a float comes out; :class:`BetaSchedule` makes it a tensor.

A posterior that is pulled to its prior before the decoder has learned to use it may never come back. Warm-up lets the
reconstruction go first. Steps are whatever the caller counts, optimizer steps or epochs, from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._checks import is_real

__all__ = ["BetaSchedule", "CyclicalSchedule", "LinearSchedule", "SigmoidSchedule"]


@dataclass(frozen=True)
class LinearSchedule:
    """``start`` for ``delay`` steps, then in a straight line to ``stop`` within ``steps``, and there it stays.

    Sønderby et al. 2016 (arXiv:1602.02282), warm-up: ``beta(t) = start + (stop - start) min(max(t - delay, 0) / steps,
    1)``.

    Args:
        steps: the length of the ramp, at least 0; 0 is no ramp, but a jump.
        start, stop: the first and the last beta, at least 0; ``start > stop`` goes down.
        delay: how many steps ``start`` is held, at least 0.

    Raises:
        TypeError, ValueError: an argument that is no number or out of range; a step below 0.

    Example::

        beta = LinearSchedule(10_000, delay=1_000)
        loss = vaefast.elbo_loss(recon, x, mu, logvar, beta=beta(step))
    """

    steps: float
    start: float = 0.0
    stop: float = 1.0
    delay: float = 0

    def __post_init__(self) -> None:
        _at_least_zero("steps", self.steps)
        _at_least_zero("start", self.start)
        _at_least_zero("stop", self.stop)
        _at_least_zero("delay", self.delay)

    def __call__(self, step: float) -> float:
        _at_least_zero("step", step)
        risen = step - self.delay
        return _between(self, 1.0 if risen >= self.steps else risen / self.steps if risen > 0 else 0.0)


@dataclass(frozen=True)
class CyclicalSchedule:
    """``cycles`` ramps from ``start`` to ``stop`` within ``steps``; each takes ``ratio`` of its cycle, then holds.

    Fu et al. 2019 (arXiv:1903.10145), equations 6 and 7, with T = ``steps``, M = ``cycles``, R = ``ratio``, and t
    counted from 0: ``tau = mod(t, ceil(T / M)) / (T / M)``, ``beta(t) = start + (stop - start) min(tau / R, 1)``. From
    ``steps`` on it is ``stop``, so that training that goes on does not begin another cycle.

    Args:
        steps: the length of all cycles together, above 0.
        cycles: how many, an integer from 1 to ``steps``.
        ratio: the share of a cycle in which beta rises, in (0, 1].
        start, stop: beta at a cycle's begin and end, at least 0.

    Raises:
        TypeError, ValueError: an argument that is no number or out of range; a step below 0.

    Example::

        beta = CyclicalSchedule(40_000, cycles=4, ratio=0.5)
        loss = vaefast.elbo_loss(recon, x, mu, logvar, beta=beta(step))
    """

    steps: float
    cycles: int = 4
    ratio: float = 0.5
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        _above_zero("steps", self.steps)
        if not isinstance(self.cycles, int) or isinstance(self.cycles, bool):
            raise TypeError(f"cycles must be an integer, got {self.cycles!r}")
        if not 1 <= self.cycles <= self.steps:
            raise ValueError(f"cycles must be from 1 to steps ({self.steps}), got {self.cycles}")
        _above_zero("ratio", self.ratio)
        if self.ratio > 1:
            raise ValueError(f"ratio is the share of a cycle in which beta rises, in (0, 1]; got {self.ratio!r}")
        _at_least_zero("start", self.start)
        _at_least_zero("stop", self.stop)

    def __call__(self, step: float) -> float:
        _at_least_zero("step", step)
        if step >= self.steps:
            return float(self.stop)
        period = self.steps / self.cycles
        return _between(self, min(step % math.ceil(period) / period / self.ratio, 1.0))


@dataclass(frozen=True)
class SigmoidSchedule:
    """A logistic curve from ``start`` to ``stop``, steepest in the middle of ``steps``.

    Bowman et al. 2016 (arXiv:1511.06349), section 3.1 and figure 2: ``beta(t) = start + (stop - start) sigmoid(
    steepness (t / steps - midpoint))``. The curve never quite arrives: with the default steepness it is 0.25% off at
    step 0 and at ``steps``.

    Args:
        steps: the length of the rise, above 0.
        midpoint: where beta is half way, as a share of ``steps``; finite.
        steepness: how sharp the rise is, above 0; beta goes from 12% to 88% of its way in ``4 / steepness`` of
            ``steps``.
        start, stop: beta long before and long after, at least 0.

    Raises:
        TypeError, ValueError: an argument that is no number or out of range; a step below 0.

    Example::

        beta = SigmoidSchedule(5_000)  # 1 / (1 + exp(-0.0024 (step - 2500)))
        loss = vaefast.elbo_loss(recon, x, mu, logvar, beta=beta(step))
    """

    steps: float
    midpoint: float = 0.5
    steepness: float = 12.0
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        _above_zero("steps", self.steps)
        _number("midpoint", self.midpoint)
        _above_zero("steepness", self.steepness)
        _at_least_zero("start", self.start)
        _at_least_zero("stop", self.stop)

    def __call__(self, step: float) -> float:
        _at_least_zero("step", step)
        x = self.steepness * (step / self.steps - self.midpoint)
        # tanh does not overflow where exp would
        return _between(self, 0.5 + 0.5 * math.tanh(0.5 * x))


class BetaSchedule(nn.Module):
    """A schedule's present value as a 0-d tensor, for ``beta=``; ``state_dict`` keeps the step.

    A changing float beta makes ``torch.compile`` compile again; a tensor does not. :meth:`step` writes into the same
    tensor, with no transfer back to the host, so it is right inside captured CUDA graphs too. Call it after
    ``backward``, as a learning rate schedule's. Registered in the model, it moves to the device and into the checkpoint
    with the rest.

    Args:
        schedule: what gives a float for a step: one of this module's, or any function of an int.
        step: where it stands.

    Shape:
        calling it gives a 0-d float32 tensor without gradient.

    Raises:
        TypeError, ValueError: a schedule that cannot be called; a step that is no integer, or below 0.

    Example::

        beta = vaefast.schedules.BetaSchedule(vaefast.schedules.LinearSchedule(10_000))
        vaefast.elbo_loss(recon, x, mu, logvar, beta=beta()).backward(); optimizer.step(); beta.step()
    """

    value: Tensor

    def __init__(self, schedule: Callable[[int], float], step: int = 0) -> None:
        super().__init__()
        if not callable(schedule):
            raise TypeError(f"schedule must be a function of the step, such as LinearSchedule(steps); got {schedule!r}")
        self.schedule = schedule
        # in the state the step is kept, from which the value follows
        self.register_buffer("value", torch.zeros(()), persistent=False)
        self.seek(step)

    def forward(self) -> Tensor:
        return self.value

    def step(self) -> None:
        """One step on."""
        self.seek(self.current_step + 1)

    def seek(self, step: int) -> None:
        """To any step."""
        if not isinstance(step, int) or isinstance(step, bool):
            raise TypeError(f"step must be an integer, got {type(step).__name__}")
        _at_least_zero("step", step)
        self.value.fill_(self.schedule(step))
        self.current_step = step

    def get_extra_state(self) -> int:
        return self.current_step

    def set_extra_state(self, state: int) -> None:
        self.seek(state)

    def extra_repr(self) -> str:
        return f"{self.schedule!r}, step={self.current_step}"


def _between(schedule: LinearSchedule | CyclicalSchedule | SigmoidSchedule, share: float) -> float:
    # this form ends exactly at stop
    return (1.0 - share) * schedule.start + share * schedule.stop


def _number(name: str, value: object) -> float:
    if not is_real(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return value


def _above_zero(name: str, value: object) -> None:
    if _number(name, value) <= 0:
        raise ValueError(f"{name} must be above 0, got {value!r}")


def _at_least_zero(name: str, value: object) -> None:
    if _number(name, value) < 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
