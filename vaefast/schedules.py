"""Warm-up of beta, the KL's factor: a step goes in, a float comes out;
:class:`~vaefast.schedules.BetaSchedule` makes it a tensor.

A posterior that is pulled to its prior before the decoder has learned to use it may never come back. Warm-up lets the
reconstruction go first. Steps are whatever the caller counts, optimizer steps or epochs, from 0.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import is_real, is_whole, number
from ._functorch import of_vmap

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

        beta = vaefast.schedules.LinearSchedule(10_000, delay=1_000)
        loss = vaefast.elbo_loss(recon, x, mu, logvar, beta=beta(step))
    """

    steps: float
    start: float = 0.0
    stop: float = 1.0
    delay: float = 0

    def __post_init__(self) -> None:
        _check(self, steps=_at_least_zero, start=_at_least_zero, stop=_at_least_zero, delay=_at_least_zero)

    def __call__(self, step: float) -> float:
        step = _at_least_zero("step", step)
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

        beta = vaefast.schedules.CyclicalSchedule(40_000, cycles=4, ratio=0.5)
        loss = vaefast.elbo_loss(recon, x, mu, logvar, beta=beta(step))
    """

    steps: float
    cycles: int = 4
    ratio: float = 0.5
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        _check(self, steps=_above_zero)
        if not is_whole(self.cycles):
            raise TypeError(f"cycles must be an integer, got {self.cycles!r}")
        object.__setattr__(self, "cycles", operator.index(self.cycles))
        if not 1 <= self.cycles <= self.steps:
            raise ValueError(f"cycles must be from 1 to steps ({self.steps}), got {self.cycles}")
        _check(self, ratio=_above_zero)
        if self.ratio > 1:
            raise ValueError(f"ratio is the share of a cycle in which beta rises, in (0, 1]; got {self.ratio!r}")
        _check(self, start=_at_least_zero, stop=_at_least_zero)

    def __call__(self, step: float) -> float:
        step = _at_least_zero("step", step)
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

        beta = vaefast.schedules.SigmoidSchedule(5_000)  # 1 / (1 + exp(-0.0024 (step - 2500)))
        loss = vaefast.elbo_loss(recon, x, mu, logvar, beta=beta(step))
    """

    steps: float
    midpoint: float = 0.5
    steepness: float = 12.0
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        _check(self, steps=_above_zero, midpoint=_number, steepness=_above_zero)
        _check(self, start=_at_least_zero, stop=_at_least_zero)

    def __call__(self, step: float) -> float:
        step = _at_least_zero("step", step)
        x = self.steepness * (step / self.steps - self.midpoint)
        # tanh does not overflow where exp would
        return _between(self, 0.5 + 0.5 * math.tanh(0.5 * x))


class BetaSchedule(nn.Module):
    """A schedule's present value as a 0-d tensor, for ``beta=``; ``state_dict`` keeps the step.

    A changing float beta makes ``torch.compile`` compile again; a tensor does not. :meth:`step` writes into the same
    tensor, with no transfer back to the host, so it is right inside captured CUDA graphs too. Call it after
    ``backward``, as a learning rate schedule's. Registered in the model, it moves to the device and into the checkpoint
    with the rest. The value is float32 whatever the model is cast to, and follows from the step: also where the model
    was made on the meta device, and its tensors by ``to_empty``.

    In ``state_dict`` the step is four float32 numbers, ``step_digits``: its digits in base 256, the lowest first, which
    half precision holds exactly and of which a mean, as of the weights, is the steps' mean.

    Args:
        schedule: what gives a float for a step: one of this module's, or any function of an int.
        step: where it stands.

    Attributes:
        current_step: where it stands, an int.

    Shape:
        calling it gives a 0-d float32 tensor without gradient.

    Raises:
        TypeError, ValueError: a schedule that cannot be called; a step that is no integer, or below 0.
        RuntimeError: by ``load_state_dict``, a step that is not finite.

    Example::

        beta = vaefast.schedules.BetaSchedule(vaefast.schedules.LinearSchedule(10_000))
        vaefast.elbo_loss(recon, x, mu, logvar, beta=beta()).backward(); optimizer.step(); beta.step()
    """

    value: Tensor
    step_digits: Tensor

    def __init__(self, schedule: Callable[[int], float], step: int = 0) -> None:
        super().__init__()
        if not callable(schedule):
            raise TypeError(f"schedule must be a function of the step, such as LinearSchedule(steps); got {schedule!r}")
        self.schedule = schedule
        self.register_buffer("value", torch.zeros((), dtype=torch.float32), persistent=False)
        self.register_buffer("step_digits", torch.zeros(4, dtype=torch.float32))
        self._step, self._seen = 0, (0, 0)
        self.seek(step)

    def forward(self) -> Tensor:
        if not torch.compiler.is_compiling() and not of_vmap(self.value) and self._replaced():
            self._write(self.current_step)
        return self.value

    @property
    def current_step(self) -> int:
        """Where it stands, as was written last, or as others have written into the buffer since."""
        digits = self.step_digits
        return self._step if digits.is_meta or _writes(digits) == self._seen else _of_digits(digits)

    def step(self) -> None:
        """One step on, written into the same tensor."""
        # not current_step: DDP writes all buffers in each forward, and reading one would wait for the device
        self.seek((self._step if self.step_digits is self._mine else self.current_step) + 1)

    def seek(self, step: int) -> None:
        """To any step, forwards or back, an int of at least 0."""
        if not is_whole(step):
            raise TypeError(f"step must be an integer, got {type(step).__name__}")
        step = operator.index(step)
        _at_least_zero("step", step)
        self._write(step)

    def reset_parameters(self) -> None:
        """Writes the value and the step again, as those who make a model on the meta device have modules do."""
        self._write(self._step)

    def _write(self, step: int) -> None:
        value = float(self.schedule(step))
        device = self.step_digits.device
        if self._replaced():
            self.value = torch.zeros((), dtype=torch.float32, device=device)
        known = _digits(self._step) if _writes(self.step_digits) == self._seen else [None] * 4
        for digit, before, now in zip(self.step_digits.unbind(), known, _digits(step)):
            if now != before:
                digit.fill_(now)
        self.value.fill_(value)
        # what was written into, so that others in its place, and others' writes, are told from it
        self._step, self._filled, self._mine = step, self.value, self.step_digits
        self._seen = _writes(self.step_digits)

    def _replaced(self) -> bool:
        """Whether another tensor lies in the value's place than was filled, or one of another dtype or device."""
        value = self.value
        return (
            value is not getattr(self, "_filled", value)
            or value.dtype != torch.float32
            or value.device != self.step_digits.device
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BetaSchedule:
        """What ``to``, ``half`` and ``to_empty`` go by: both tensors follow to the device, and nothing else happens."""
        step, before = self.current_step, (self.value, self.step_digits)
        super()._apply(fn, recurse)
        if self.step_digits.device == before[1].device:
            self.value, self.step_digits = before
        else:
            self.step_digits = torch.zeros(4, dtype=torch.float32, device=self.step_digits.device)
            self._write(step)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        digits = state_dict.get(prefix + "step_digits")
        if not isinstance(digits, Tensor) or digits.shape != self.step_digits.shape or digits.is_meta:
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        try:
            step = _of_digits(digits)
        except ValueError as error:
            args[-1].append(f"{prefix}{error}")  # which torch raises with all else that is wrong with the state
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._write(step)

    def extra_repr(self) -> str:
        return f"{self.schedule!r}, step={self.current_step}"


_BASE = 256


def _digits(step: int) -> list[float]:
    """Four, of which the last takes what is left."""
    return [float(step // _BASE**k % _BASE if k < 3 else step // _BASE**3) for k in range(4)]


def _of_digits(digits: Tensor) -> int:
    step: float = sum(d * _BASE**k for k, d in enumerate(digits.tolist()))
    if not math.isfinite(step):
        raise ValueError(
            f"step_digits must be four finite numbers, the step's digits in base {_BASE}, got {digits.tolist()}"
        )
    return max(0, round(step))


def _writes(t: Tensor) -> tuple[int, int]:
    """Another for another tensor, a copy's too, and after each write into this one."""
    return id(t), 0 if t.is_inference() else t._version


def _between(schedule: LinearSchedule | CyclicalSchedule | SigmoidSchedule, share: float) -> float:
    # this form ends exactly at stop
    return (1.0 - share) * schedule.start + share * schedule.stop


def _number(name: str, value: object) -> float:
    if not is_real(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return number(value)


def _above_zero(name: str, value: object) -> float:
    found = _number(name, value)
    if found <= 0:
        raise ValueError(f"{name} must be above 0, got {value!r}")
    return found


def _at_least_zero(name: str, value: object) -> float:
    found = _number(name, value)
    if found < 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
    return found


def _check(schedule: object, **fields: Callable[[str, object], float]) -> None:
    """Each of a frozen schedule's fields, which then is of Python's own types."""
    for name, check in fields.items():
        object.__setattr__(schedule, name, check(name, getattr(schedule, name)))
