"""Schedules against their papers' formulas, their edges, and a tensor beta that costs no recompilation and resumes."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from inputs import posterior, training
from torch._dynamo.testing import CompileCounter

import vaefast
from vaefast.schedules import BetaSchedule, CyclicalSchedule, LinearSchedule, SigmoidSchedule

Schedule = LinearSchedule | CyclicalSchedule | SigmoidSchedule
SCHEDULES: list[Schedule] = [
    LinearSchedule(100),
    LinearSchedule(7, start=0.2, stop=4.0, delay=5),
    LinearSchedule(10, start=2.0, stop=0.5),
    LinearSchedule(0),
    CyclicalSchedule(100),
    CyclicalSchedule(103, cycles=5, ratio=0.8, start=0.1, stop=2.0),
    CyclicalSchedule(9, cycles=9, ratio=1.0),
    SigmoidSchedule(5000),
    SigmoidSchedule(50, midpoint=0.8, steepness=30.0, start=0.5, stop=0.25),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_values_stay_between_start_and_stop(schedule: Schedule) -> None:
    lo, hi = sorted((schedule.start, schedule.stop))
    values = [schedule(step) for step in range(3 * int(schedule.steps) + 1)]
    assert all(type(value) is float and lo <= value <= hi for value in values)
    assert values[-1] == pytest.approx(schedule.stop, abs=1e-2 * (hi - lo))
    assert schedule(10**12) == pytest.approx(schedule.stop, rel=1e-12)


def test_linear() -> None:
    beta = LinearSchedule(100, start=0.5, stop=2.0, delay=20)
    for step in range(300):
        expected = 0.5 if step < 20 else 0.5 + 1.5 * (step - 20) / 100 if step < 120 else 2.0
        assert beta(step) == pytest.approx(expected, rel=1e-14)
    assert beta(0) == beta(20) == 0.5
    assert beta(120) == 2.0
    assert LinearSchedule(4)(1.5) == 0.375
    assert [LinearSchedule(0, delay=2)(step) for step in range(4)] == [0.0, 0.0, 1.0, 1.0]


def fu(t: int, total: int, cycles: int, ratio: float) -> float:
    """Fu et al. 2019, equations 6 and 7, with their f; their t begins at 1."""
    tau = ((t - 1) % math.ceil(total / cycles)) / (total / cycles)
    return tau / ratio if tau <= ratio else 1.0


@pytest.mark.parametrize(("total", "cycles", "ratio"), [(100, 4, 0.5), (103, 5, 0.8), (10, 1, 1.0), (9, 9, 0.3)])
def test_cyclical(total: int, cycles: int, ratio: float) -> None:
    beta = CyclicalSchedule(total, cycles, ratio)
    for step in range(total):
        assert beta(step) == pytest.approx(fu(step + 1, total, cycles, ratio), rel=1e-14)
    zeros = [step for step in range(total) if beta(step) == 0.0]
    assert zeros == [cycle * math.ceil(total / cycles) for cycle in range(cycles)]
    assert beta(total) == beta(total + 1) == 1.0


def test_cyclical_runs_from_start_to_stop() -> None:
    plain, moved = CyclicalSchedule(50), CyclicalSchedule(50, start=0.25, stop=3.0)
    for step in range(60):
        assert moved(step) == pytest.approx(0.25 + 2.75 * plain(step), rel=1e-14)


def test_sigmoid() -> None:
    beta = SigmoidSchedule(5000)
    for step in range(0, 6000, 7):
        assert beta(step) == pytest.approx(1 / (1 + math.exp(-0.0024 * (step - 2500))), rel=1e-12)
    assert beta(2500) == 0.5
    assert beta(0) == pytest.approx(0.0025, abs=1e-4)
    assert SigmoidSchedule(1, steepness=1e6)(0) == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedules_are_values(schedule: Schedule) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == schedule == copy.deepcopy(schedule)
    assert len({schedule, copy.copy(schedule)}) == 1
    with pytest.raises(AttributeError):
        schedule.steps = 3
    for step in (-1, -1e-9, math.nan, math.inf):
        with pytest.raises(ValueError, match="step must be"):
            schedule(step)
    for step in ("1", None, True, torch.tensor(1)):
        with pytest.raises(TypeError, match="step must be a number"):
            schedule(step)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LinearSchedule, {"steps": -1}, "steps must be at least 0"),
        (LinearSchedule, {"steps": "many"}, "steps must be a number, got str"),
        (LinearSchedule, {"steps": 5, "delay": -1}, "delay must be at least 0"),
        (LinearSchedule, {"steps": 5, "start": -0.5}, "start must be at least 0"),
        (LinearSchedule, {"steps": 5, "stop": math.inf}, "stop must be finite"),
        (CyclicalSchedule, {"steps": -5}, "steps must be above 0"),
        (CyclicalSchedule, {"steps": 5, "cycles": 6}, r"cycles must be from 1 to steps \(5\), got 6"),
        (CyclicalSchedule, {"steps": 5, "cycles": 0}, "cycles must be from 1"),
        (CyclicalSchedule, {"steps": 5, "cycles": 2.5}, "cycles must be an integer"),
        (CyclicalSchedule, {"steps": 5, "ratio": 0}, "ratio must be above 0"),
        (CyclicalSchedule, {"steps": 5, "ratio": 1.5}, r"ratio is the share .* \(0, 1\]"),
        (CyclicalSchedule, {"steps": 5, "stop": -1}, "stop must be at least 0"),
        (SigmoidSchedule, {"steps": 0}, "steps must be above 0"),
        (SigmoidSchedule, {"steps": 5, "midpoint": math.nan}, "midpoint must be finite"),
        (SigmoidSchedule, {"steps": 5, "steepness": -1}, "steepness must be above 0"),
        (SigmoidSchedule, {"steps": 5, "start": False}, "start must be a number, got bool"),
    ],
)
def test_wrong_options_are_named(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kind(**options)


def loss(beta: Any, device: str = "cpu") -> torch.Tensor:
    data, p = training("bernoulli", 1).to(device), posterior(device=device)
    return vaefast.elbo_loss(data.recon, data.target, p.mu, p.raw, beta=beta)


def test_beta_follows_its_schedule(device: str) -> None:
    schedule = LinearSchedule(4)
    beta = BetaSchedule(schedule).to(device)
    for step in range(6):
        assert beta.current_step == step
        assert beta().shape == ()
        assert not beta().requires_grad
        assert beta().item() == schedule(step)
        torch.testing.assert_close(loss(beta(), device), loss(schedule(step), device))
        beta.step()
    beta.seek(1)
    assert beta().item() == 0.25
    assert "LinearSchedule(steps=4" in repr(beta)
    assert "step=1" in repr(beta)


def test_beta_takes_any_function() -> None:
    beta = BetaSchedule(lambda step: 1 / (1 + step), step=3)
    assert beta().item() == 0.25


def test_beta_writes_into_one_tensor(device: str) -> None:
    beta = BetaSchedule(LinearSchedule(10)).to(device)
    first = beta()
    beta.step()
    assert beta() is first
    assert first.item() == pytest.approx(0.1)


def test_beta_resumes_from_a_checkpoint() -> None:
    model = torch.nn.ModuleDict({"beta": BetaSchedule(CyclicalSchedule(100))})
    for _ in range(13):
        model["beta"].step()
    state = pickle.loads(pickle.dumps(model.state_dict()))
    other = torch.nn.ModuleDict({"beta": BetaSchedule(CyclicalSchedule(100))})
    other.load_state_dict(state)
    assert other["beta"].current_step == 13
    assert torch.equal(other["beta"](), model["beta"]())
    assert torch.equal(copy.deepcopy(model)["beta"](), model["beta"]())


def test_a_checkpoint_holds_nothing_but_numbers(tmp_path: Any) -> None:
    beta = BetaSchedule(LinearSchedule(10), step=4)
    torch.save(beta.state_dict(), tmp_path / "beta.pt")
    other = BetaSchedule(LinearSchedule(10))
    other.load_state_dict(torch.load(tmp_path / "beta.pt", weights_only=True))
    assert other.current_step == 4


@pytest.mark.parametrize("step", [-1, 1.5, True, "1", None])
def test_beta_refuses_other_steps(step: Any) -> None:
    beta = BetaSchedule(LinearSchedule(10))
    with pytest.raises((TypeError, ValueError), match="step must be"):
        beta.seek(step)
    assert beta.current_step == 0
    with pytest.raises((TypeError, ValueError), match="step must be"):
        BetaSchedule(LinearSchedule(10), step)


def test_beta_needs_a_schedule() -> None:
    with pytest.raises(TypeError, match=r"schedule must be a function of the step.*LinearSchedule.*got 0\.5"):
        BetaSchedule(0.5)


def test_compiled_once_for_all_values(device: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    beta = BetaSchedule(LinearSchedule(5)).to(device)
    data, p = training("bernoulli", 1).to(device), posterior(device=device).leaves()

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(value: torch.Tensor) -> torch.Tensor:
        return vaefast.elbo_loss(data.recon, data.target, p.mu, p.raw, beta=value)

    for step in range(6):
        value = compiled(beta())
        torch.testing.assert_close(value, loss(step / 5, device))
        value.backward()
        beta.step()
    assert counter.frame_count == 1


def test_compiled_once_inside_a_model() -> None:
    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beta = BetaSchedule(LinearSchedule(5))

        def forward(self, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
            return self.beta() * vaefast.gaussian_kl(mu, logvar)

    torch._dynamo.reset()
    counter, p, model = CompileCounter(), posterior(), Loss()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(6):
        torch.testing.assert_close(compiled(p.mu, p.raw), step / 5 * vaefast.gaussian_kl(p.mu, p.raw))
        model.beta.step()
    assert counter.frame_count == 1


@pytest.mark.cuda
def test_a_step_does_not_wait_for_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; run `make gpu` on a machine with one")
    beta = BetaSchedule(LinearSchedule(5)).to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        beta.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert beta().item() == pytest.approx(0.2)
