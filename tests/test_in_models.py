"""Schedules, losses and monitors as parts of a model: whatever is done to all of it, their numbers stay right."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import posterior, training
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import vaefast
from vaefast.diagnostics import CollapseMonitor, collapse_report
from vaefast.schedules import BetaSchedule, CyclicalSchedule, LinearSchedule, SigmoidSchedule

SCHEDULES: list[Callable[[int], float]] = [
    LinearSchedule(100_000), CyclicalSchedule(100_000, ratio=0.9), SigmoidSchedule(200_000), math.sqrt,
]  # fmt: skip
# steps that half precision rounds, or cannot hold
STEPS = [0, 3, 2049, 70_001, 2**40 + 1]
BETA, CAPACITY = 1e-6, 70_000.3  # as numbers that half precision has not


class Model(nn.Module):
    def __init__(self, schedule: Callable[[int], float], step: int = 0) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.beta = BetaSchedule(schedule, step)
        self.loss = vaefast.ELBOLoss(beta=BetaSchedule(schedule, step))
        self.monitor = CollapseMonitor()

    def check(self, step: int) -> None:
        for beta in (self.beta, self.loss.beta):
            value = beta()
            assert value.dtype == torch.float32 and value.shape == () and not value.is_meta
            assert value.item() == torch.tensor(beta.schedule(step), dtype=torch.float32).item()
            assert beta.current_step == step


def on_meta(schedule: Callable[[int], float], step: int) -> Model:
    with torch.device("meta"):
        return Model(schedule, step)


def dirtied(model: Model) -> Model:
    """to_empty, in memory that holds something else."""

    def fn(t: Tensor) -> Tensor:
        return torch.full_like(t, 7.5, device="cpu")

    return model._apply(fn)


CHANGES: dict[str, Callable[[Model], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to a dtype": lambda m: m.to(torch.float16),
    "to another layout": lambda m: m.to(memory_format=torch.channels_last),
    "half and back": lambda m: m.half().float(),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "by way of meta": lambda m: m.to("meta").to_empty(device="cpu"),
    "_apply": lambda m: m._apply(lambda t: t * 3 + 1),
    "_apply that fills": dirtied,
    "share_memory": lambda m: m.share_memory(),
    "requires_grad_": lambda m: m.requires_grad_(False),
    "deepcopy": copy.deepcopy,
    "deepcopy of meta": lambda m: copy.deepcopy(m.to("meta")).to_empty(device="cpu"),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "replaced buffers": lambda m: replaced(m),
    "reset_parameters": lambda m: m.apply(lambda x: getattr(x, "reset_parameters", lambda: None)()),
}


def replaced(model: Model) -> Model:
    """Each buffer that no checkpoint holds anew and empty, as from_pretrained of transformers does."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            module._buffers[name] = torch.full_like(module._buffers[name], math.nan).half()
    return model


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: getattr(s, "__name__", type(s).__name__))
@pytest.mark.parametrize("step", STEPS)
def test_a_schedule_keeps_its_value_and_step(schedule: Callable[[int], float], step: int, change: str) -> None:
    model = CHANGES[change](Model(schedule, step))
    model.check(step)
    model.beta.step()
    model.loss.beta.step()
    model.check(step + 1)


@pytest.mark.parametrize("change", [None, "half", "deepcopy", "replaced buffers"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "fill", [lambda m: m.to_empty(device="cpu"), dirtied, lambda m: m.to_empty(device="cpu").half()]
)
def test_a_schedule_made_on_the_meta_device(step: int, change: str | None, fill: Callable[[Model], Model]) -> None:
    model = on_meta(LinearSchedule(10**6), step)
    assert model.beta().is_meta and model.beta.current_step == step
    model = fill(model if change is None else CHANGES[change](model))
    model.check(step)


# what is done to checkpoints on their way
CHECKPOINTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "as it is": lambda s: s,
    "half": lambda s: {k: v.half() for k, v in s.items()},
    "half where it is floating": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    "bfloat16": lambda s: {k: v.bfloat16() for k, v in s.items()},
    "double": lambda s: {k: v.double() for k, v in s.items()},
    "contiguous clones": lambda s: {k: v.clone().contiguous().cpu() for k, v in s.items()},
    "numpy": lambda s: {k: torch.from_numpy(v.numpy().copy()) for k, v in s.items()},
    "pickled": lambda s: pickle.loads(pickle.dumps(s)),
    "mean of itself": lambda s: {k: (v + v) / 2 for k, v in s.items()},
}
LOADS: dict[str, tuple[Callable[[], Model], dict[str, Any]]] = {
    "plain": (lambda: Model(LinearSchedule(10**6)), {}),
    "assign": (lambda: Model(LinearSchedule(10**6)), {"assign": True}),
    "assign over meta": (lambda: on_meta(LinearSchedule(10**6), 0), {"assign": True}),
    "over to_empty": (lambda: dirtied(on_meta(LinearSchedule(10**6), 0)), {}),
    "over half": (lambda: Model(LinearSchedule(10**6)).half(), {}),
}


@pytest.mark.parametrize("way", list(CHECKPOINTS))
@pytest.mark.parametrize("load", list(LOADS))
@pytest.mark.parametrize("step", STEPS[:4])
def test_a_checkpoint_holds_the_step(step: int, load: str, way: str) -> None:
    state = Model(LinearSchedule(10**6), step).state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    make, options = LOADS[load]
    model = make()
    model.load_state_dict(CHECKPOINTS[way](state), **options)
    model.check(step)


def decayed(ema: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: 0.75 * v + 0.25 * state[k] for k, v in ema.items()}


def in_place(ema: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    for k, v in ema.items():
        v.mul_(0.75).add_(state[k], alpha=0.25)
    return ema


def copied(ema: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    for e, v in zip(ema.values(), state.values()):
        e.copy_(0.75 * e + 0.25 * v)
    return ema


def lerped(ema: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    for k, v in ema.items():
        v.lerp_(state[k], 0.25)
    return ema


@pytest.mark.parametrize("loop", [decayed, in_place, copied, lerped])
@pytest.mark.parametrize("live", [False, True], ids=["of clones", "of a model's own"])
def test_a_mean_of_state_dicts_has_the_mean_step(loop: Callable[..., dict[str, Tensor]], live: bool) -> None:
    model, other = Model(LinearSchedule(10**6), 300), Model(LinearSchedule(10**6), 300)
    ema, expected = other.state_dict() if live else {k: v.clone() for k, v in model.state_dict().items()}, 300.0
    with torch.no_grad():
        for _ in range(5):
            model.beta.seek(model.beta.current_step + 1000)
            model.loss.beta.seek(model.beta.current_step)
            ema, expected = loop(ema, model.state_dict()), 0.75 * expected + 0.25 * model.beta.current_step
    if live:
        assert loop is decayed or abs(other.beta.current_step - expected) <= 1
    averaged = Model(LinearSchedule(10**6))
    averaged.load_state_dict(ema)
    assert abs(averaged.beta.current_step - expected) <= 1
    averaged.check(averaged.beta.current_step)


@pytest.mark.parametrize(
    "options", [{}, {"use_buffers": True}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}], ids=["", "buffers", "function"]
)
def test_averaged_models(options: dict[str, Any]) -> None:
    model = Model(LinearSchedule(1000), 100)
    averaged = AveragedModel(model, **options)
    for _ in range(3):
        averaged.update_parameters(model)
        model.beta.step()
    last = averaged.module.beta.current_step
    assert 100 <= last <= 102
    again = Model(LinearSchedule(1000))
    again.load_state_dict(averaged.module.state_dict())
    again.beta.seek(again.beta.current_step)
    assert again.beta.current_step == last
    assert 0.1 <= averaged.module.beta().item() <= 0.102 + 1e-6


def test_a_state_that_is_none_is_refused() -> None:
    beta = BetaSchedule(LinearSchedule(10))
    with pytest.raises((RuntimeError, ValueError), match="four finite numbers"):
        beta.load_state_dict({"step_digits": torch.full((4,), math.nan)})
    with pytest.raises(RuntimeError, match="size mismatch for step_digits"):
        beta.load_state_dict({"step_digits": torch.zeros(())})
    with pytest.raises(RuntimeError, match="Missing key"):
        beta.load_state_dict({})
    assert beta.current_step == 0


def options_of(device: str) -> dict[str, Any]:
    made = {"beta": torch.tensor(BETA, device=device)}
    return {**made, "capacity": torch.tensor(CAPACITY, dtype=torch.float64, device=device)}


@pytest.mark.parametrize("change", [c for c in CHANGES if c not in ("reset_parameters", "_apply", "replaced buffers")])
def test_options_in_tensors_keep_their_numbers(change: str) -> None:
    criterion = vaefast.ELBOLoss(**options_of("cpu"))
    found = CHANGES[change](nn.ModuleDict({"criterion": criterion}))["criterion"]
    assert found.beta.dtype == torch.float32 and found.beta.item() == torch.tensor(BETA).item()
    assert found.kl_options.capacity.dtype == torch.float64 and found.kl_options.capacity.item() == CAPACITY


@pytest.mark.parametrize("base", [lambda m: m, lambda m: m.to("meta"), lambda m: m.half()], ids=["a", "meta", "half"])
@pytest.mark.parametrize("steps", [(3, 3), (2, 7)])
def test_an_ensemble_has_a_beta_each(steps: tuple[int, ...], base: Callable[[nn.Module], nn.Module]) -> None:
    """torch.func's: states in a stack, under vmap; and a state in the place of a module's own."""
    data, q = training("bernoulli", 1), posterior()

    def made(step: int) -> nn.Module:
        return vaefast.ELBOLoss(beta=BetaSchedule(LinearSchedule(10), step))

    args = data.recon, data.target, q.mu, q.raw
    expected = torch.stack([vaefast.elbo_loss(*args, beta=step / 10) for step in steps])
    module = base(copy.deepcopy(made(0)))
    _, state = torch.func.stack_module_state([made(step) for step in steps])
    found = torch.vmap(lambda s: torch.func.functional_call(module, s, args))(state)
    torch.testing.assert_close(found, expected)
    for step, e in zip(steps, expected):
        own = made(0)
        torch.testing.assert_close(torch.func.functional_call(own, dict(made(step).named_buffers()), args), e)
        assert own.beta.current_step == 0 and own.beta().item() == 0


def test_options_without_a_number_are_no_number() -> None:
    criterion = vaefast.ELBOLoss(**options_of("meta"))
    assert criterion.beta.is_meta
    criterion = nn.ModuleList([criterion]).to_empty(device="cpu")[0]
    assert criterion.beta.isnan() and criterion.kl_options.capacity.isnan()
    criterion = vaefast.ELBOLoss(**options_of("cpu"))
    with torch.device("meta"):
        model = nn.ModuleDict({"loss": criterion, "layer": nn.Linear(2, 2)})
    model.to_empty(device="cpu")
    assert criterion.beta.item() == torch.tensor(BETA).item()


@pytest.mark.parametrize("change", ["half", "deepcopy", "to_empty", "by way of meta", "pickle"])
def test_a_loss_with_a_schedule_goes_by_it(change: str) -> None:
    data, q = training("bernoulli", 1), posterior()
    criterion = vaefast.ELBOLoss(beta=BetaSchedule(LinearSchedule(10)))
    assert "LinearSchedule" in repr(criterion)
    criterion = CHANGES[change](nn.ModuleList([criterion]))[0]
    for step in range(12):
        expected = vaefast.elbo_loss(data.recon, data.target, q.mu, q.raw, beta=min(1.0, step / 10))
        torch.testing.assert_close(criterion(data.recon, data.target, q.mu, q.raw), expected)
        criterion.beta.step()
    assert "beta.step_digits" in criterion.state_dict()


@pytest.mark.parametrize("change", [c for c in CHANGES if c not in ("share_memory",)])
def test_a_monitor_keeps_what_it_saw(change: str) -> None:
    batches = [(torch.randn(5, 4), torch.randn(5, 4)) for _ in range(4)]
    model = Model(LinearSchedule(10))
    for k, (mu, logvar) in enumerate(batches):
        if k == 2:
            model = CHANGES[change](model)
        model.monitor.update(mu, logvar)
    expected = collapse_report(*(torch.cat(side) for side in zip(*batches)))
    found = model.monitor.report()
    for name in ("kl", "activity", "mean", "std"):
        value = getattr(found, name)
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, getattr(expected, name))


def test_a_monitor_made_on_the_meta_device() -> None:
    mu, logvar = torch.randn(5, 4), torch.randn(5, 4)
    monitor = on_meta(LinearSchedule(3), 0).to_empty(device="cpu").monitor
    monitor.update(mu, logvar)
    torch.testing.assert_close(monitor.report().kl, collapse_report(mu, logvar).kl)


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("initialise", ["reset_parameters", "state_dict", None])
def test_fsdp_initialised_late(one_rank: None, initialise: str | None) -> None:
    """FSDP2: made on the meta device, sharded, emptied onto the device, initialised or loaded."""
    torch.manual_seed(0)
    model = on_meta(LinearSchedule(10**6), 2049)
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    dirtied(model)
    step = 2049
    if initialise == "reset_parameters":
        model.apply(lambda module: getattr(module, "reset_parameters", lambda: None)())
    elif initialise == "state_dict":
        step = 70_001
        set_model_state_dict(
            model, Model(LinearSchedule(10**6), step).state_dict(),
            options=StateDictOptions(full_state_dict=True),
        )  # fmt: skip
    model.check(step)
    state = get_model_state_dict(model)
    other = Model(LinearSchedule(10**6))
    other.beta.load_state_dict({"step_digits": state["beta.step_digits"]})
    assert other.beta.current_step == step


@pytest.mark.pypi
def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="safetensors is not installed; `make test-pypi` installs it and runs this"
    )
    model, path = Model(LinearSchedule(10**6), 70_001), str(tmp_path / "model.safetensors")
    safetensors.save_file(model.state_dict(), path)
    other = Model(LinearSchedule(10**6))
    other.load_state_dict(safetensors.load_file(path))
    other.check(70_001)
    safetensors.save_model(model.half(), path)
    for made in (Model(LinearSchedule(10**6)), Model(LinearSchedule(10**6)).half()):
        safetensors.load_model(made, path)
        made.check(70_001)
