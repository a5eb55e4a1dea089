"""Under Lightning and accelerate as is: no plugin, no wrapper (`make test-pypi`)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import generator
from loops import PIXELS, VAE
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vaefast
from vaefast.bayesian import MeanField

pytestmark = [pytest.mark.pypi, pytest.mark.filterwarnings("ignore")]
HOW = "is not installed; `make test-pypi` installs it and runs this"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def rows() -> TensorDataset:
    g = generator(0)
    return TensorDataset(torch.sigmoid(torch.randn(96, 2, generator=g) @ torch.randn(2, PIXELS, generator=g)))


def model() -> VAE:
    torch.manual_seed(0)
    return VAE(vaefast.ELBOLoss("gaussian", beta=torch.tensor(0.1)))


def by_hand(epochs: int) -> VAE:
    """The loop that the frameworks stand for."""
    trained = model()
    optimizer = torch.optim.Adam(trained.parameters(), 1e-2)
    for _ in range(epochs):
        for k, (x,) in enumerate(DataLoader(rows(), 16)):
            torch.manual_seed(k)  # loaders draw numbers too
            optimizer.zero_grad()
            trained(x).backward()
            optimizer.step()
    return trained


def assert_same(found: torch.nn.Module, expected: torch.nn.Module, tolerance: float = 0.0) -> None:
    for a, e in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=tolerance, atol=tolerance)


def lit(vae: VAE) -> Any:
    lightning = pytest.importorskip("lightning", reason=f"lightning {HOW}")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae
            self.losses: list[float] = []

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            torch.manual_seed(index)
            loss: Tensor = self.vae(batch[0])
            self.log("loss", loss)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-2)

    return lightning, Lit()


def trainer(lightning: Any, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False, **options
    )  # fmt: skip


def test_lightning_trains_as_a_loop_by_hand(backend: str, tmp_path: Path) -> None:
    """Parameter for parameter; and its checkpoint is read again."""
    lightning, module = lit(model())
    trains = trainer(lightning, max_epochs=2, enable_checkpointing=False)
    trains.fit(module, DataLoader(rows(), 16))
    expected = by_hand(2)
    assert_same(module.vae, expected)
    trains.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    again = model()
    again.load_state_dict({name.removeprefix("vae."): p for name, p in saved.items()})
    assert_same(again, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0},
        {"detect_anomaly": True},
        {"deterministic": True},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_lightning_options(backend: str, options: dict[str, Any]) -> None:
    lightning, module = lit(model())
    trainer(lightning, max_epochs=5, enable_checkpointing=False, **options).fit(module, DataLoader(rows(), 16))
    torch.use_deterministic_algorithms(False)
    assert len(module.losses) == 30
    assert sum(module.losses[-6:]) < 0.9 * sum(module.losses[:6])


@pytest.fixture
def accelerate() -> Any:
    found = pytest.importorskip("accelerate", reason=f"accelerate {HOW}")
    yield found
    found.state.AcceleratorState._reset_state(True)


def accelerated(accelerate: Any, epochs: int, **options: Any) -> tuple[VAE, list[float], Any]:
    accelerator = accelerate.Accelerator(cpu=True, **options)
    vae = model()
    prepared, optimizer, loader = accelerator.prepare(
        vae, torch.optim.Adam(vae.parameters(), 1e-2), DataLoader(rows(), 16)
    )
    losses = []
    for _ in range(epochs):
        for k, (x,) in enumerate(loader):
            torch.manual_seed(k)
            with accelerator.accumulate(prepared):
                loss = prepared(x)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 1e6)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return accelerator.unwrap_model(prepared), losses, accelerator


def test_accelerate_trains_as_a_loop_by_hand(backend: str, accelerate: Any, tmp_path: Path) -> None:
    """Parameter for parameter; and its state is saved and restored, the generators' too."""
    found, _, accelerator = accelerated(accelerate, 2)
    assert_same(found, by_hand(2), 1e-6)
    accelerator.save_state(str(tmp_path / "state"))
    before = copy.deepcopy(found.state_dict())
    x = rows().tensors[0]
    expected = found(x).detach()
    with torch.no_grad():
        for p in found.parameters():
            p.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(p, before[name]) for name, p in found.state_dict().items())
    assert torch.equal(found(x), expected), "the noise goes on where it stood"


@pytest.mark.parametrize("options", [{"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}], ids=str)
def test_accelerate_options(backend: str, accelerate: Any, options: dict[str, Any]) -> None:
    _, losses, _ = accelerated(accelerate, 5, **options)
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


# ---- a posterior over a network's weights


def bayesian(estimator: str) -> MeanField:
    torch.manual_seed(0)
    return MeanField(nn.Sequential(nn.Linear(PIXELS, 8), nn.Tanh(), nn.Linear(8, 3)), estimator=estimator)


def classes() -> TensorDataset:
    (x,) = rows().tensors
    return TensorDataset(x, x[:, :3].argmax(1))


def nll_of(model: MeanField, batch: list[Tensor]) -> Tensor:
    return model.elbo_loss(model(batch[0]), batch[1], dataset_size=96, likelihood="categorical")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("estimator", ["weights", "local", "flipout"])
def test_lightning_trains_a_posterior_over_weights(
    backend: str, estimator: str, precision: str, tmp_path: Path
) -> None:
    """As a loop by hand, parameter for parameter; and its checkpoint is read again."""
    lightning = pytest.importorskip("lightning", reason=f"lightning {HOW}")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = bayesian(estimator)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            torch.manual_seed(index)
            return nll_of(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-2)

    module = Lit()
    trains = trainer(lightning, max_epochs=2, enable_checkpointing=False, precision=precision)
    trains.fit(module, DataLoader(classes(), 16))
    expected = bayesian(estimator)
    optimizer = torch.optim.Adam(expected.parameters(), 1e-2)
    for _ in range(2):
        for index, batch in enumerate(DataLoader(classes(), 16)):
            torch.manual_seed(index)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
                loss = nll_of(expected, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_same(module.model, expected)
    assert not torch.equal(
        module.model.rho.get_parameter("0.weight"), bayesian(estimator).rho.get_parameter("0.weight")
    )
    trains.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    again = bayesian(estimator)
    again.load_state_dict({name.removeprefix("model."): p for name, p in saved.items()})
    assert_same(again, expected)
