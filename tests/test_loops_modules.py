"""Modules in training loops: copies, checkpoints, devices, the meta device; what `import vaefast` brings."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import generator
from loops import LATENTS, PIXELS, VAE, data
from test_backends import output
from torch import Tensor, nn

import vaefast
from vaefast.schedules import BetaSchedule, LinearSchedule

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "beta in a tensor": {"likelihood": "gaussian", "beta": torch.tensor(1e-6)},
    "capacity in a tensor": {"capacity": torch.tensor(2.0)},
    "a likelihood with options": {"likelihood": vaefast.Likelihood("gaussian", constant=False), "free_bits": 0.1},
    "a preset": {"preset": "diffusers"},
}


class Annealed(VAE):
    """With a schedule in the model, and everything of the package that is a module."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(vaefast.ELBOLoss(**options))
        self.beta = BetaSchedule(LinearSchedule(10))

    def forward(self, x: Tensor) -> Tensor:
        mu, _ = self.encoder(x).chunk(2, 1)
        return super().forward(x) + self.beta() * mu.square().mean()


@pytest.fixture(params=list(OPTIONS))
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return OPTIONS[request.param]


def result(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    loss = model(x)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def assert_same(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    assert all(torch.equal(a, b) for a, b in zip(result(model, x), result(other, x), strict=True))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", list(COPIES))
def test_pickling_and_deepcopy(backend: str, device: str, options: dict[str, Any], how: str) -> None:
    """A copy computes the same, and shares nothing: training it leaves the original as it was."""
    model, x = Annealed(options).to(device), data(device=device).x
    before = result(model, x)
    other = COPIES[how](model)
    assert_same(model, other, x)
    other.beta.step()
    torch.optim.SGD(other.parameters(), 0.1).zero_grad()
    other(x).backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(result(model, x), before))
    assert not torch.equal(result(other, x)[0], before[0])


def test_pickling_and_deepcopy_of_a_distribution(backend: str, device: str) -> None:
    moments = torch.randn(3, 8, generator=generator(0)).to(device)
    q = vaefast.DiagonalGaussian(moments, clamp=(-1.0, 1.0))
    for other in (pickle.loads(pickle.dumps(q)), copy.deepcopy(q)):
        assert torch.equal(other.kl(), q.kl()) and torch.equal(other.mean, q.mean)


def test_state_dict_and_weights_only(backend: str, device: str, options: dict[str, Any]) -> None:
    """A checkpoint of model, optimiser and generator, read with weights_only=True, goes on where training stood."""
    model, x = Annealed(options).to(device), data(device=device).x
    optimizer = torch.optim.Adam(model.parameters())

    def train(model: Annealed, optimizer: torch.optim.Optimizer, g: torch.Generator) -> Tensor:
        optimizer.zero_grad()
        mu, logvar = model.encoder(x).chunk(2, 1)
        loss = model.criterion(model.decoder(vaefast.reparameterize(mu, logvar, generator=g)), x, mu, logvar)
        (loss * (1 + model.beta())).backward()
        optimizer.step()
        model.beta.step()
        return loss.detach()

    g = generator(3, device)
    train(model, optimizer, g)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": g.get_state()}, saved)
    expected = [train(model, optimizer, g) for _ in range(3)]
    saved.seek(0)
    checkpoint = torch.load(saved, weights_only=True)
    assert "criterion.beta" not in checkpoint["model"], "options are the code's, not the checkpoint's"
    resumed, own = Annealed(options).to(device), generator(0, device)
    optimizer = torch.optim.Adam(resumed.parameters())
    assert not any(resumed.load_state_dict(checkpoint["model"]))
    optimizer.load_state_dict(checkpoint["optimizer"])
    own.set_state(checkpoint["generator"].cpu())
    for e in expected:
        assert torch.equal(train(resumed, optimizer, own), e)


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
def test_to_device(device: str, options: dict[str, Any], half: torch.dtype | None) -> None:
    """A beta or a capacity in a tensor goes along, and keeps its dtype: as a half it would lose digits."""
    target = "meta" if device == "cpu" else device
    model = Annealed(options).to(device=target, dtype=half)
    x = data().x.to(target, half)
    loss = model(x)
    loss.backward()
    assert loss.device.type == target
    assert all(p.grad.device.type == target and p.grad.dtype == p.dtype for p in model.parameters())
    for factor, given in (
        (model.criterion.beta, options.get("beta")),
        (model.criterion.kl_options.capacity, options.get("capacity")),
    ):
        if isinstance(given, Tensor):
            assert factor.device.type == target and factor.dtype == torch.float32
            assert given.device.type == "cpu", "the caller's own tensor stays"
            assert target == "meta" or factor.item() == given.item()


def test_a_beta_that_stays_is_the_callers_own(backend: str) -> None:
    """Where nothing moves it is the same tensor, so that a schedule which writes into it is heard."""
    beta, x = torch.tensor(0.0), data().x
    model = VAE(vaefast.ELBOLoss(beta=beta)).to("cpu").float()
    before = result(model, x)[0]
    beta.fill_(1.0)
    assert result(model, x)[0] > before


def test_a_trained_beta_is_a_parameter(backend: str, device: str) -> None:
    model = VAE(vaefast.ELBOLoss(beta=nn.Parameter(torch.tensor(0.5)))).to(device)
    assert "criterion.beta" in model.state_dict()
    model(data(device=device).x).backward()
    assert model.criterion.beta.grad.item() > 0
    assert model.half().criterion.beta.dtype == torch.half, "as every parameter"


def test_meta_device(device: str) -> None:
    """Built without memory, tried out for shapes, given memory by to_empty and a state_dict."""
    ready = VAE().to(device)
    with torch.device("meta"):
        model = VAE()
        loss = model(torch.empty(7, PIXELS))
        z, kl = vaefast.sample_with_kl(*torch.empty(7, 2 * LATENTS).chunk(2, 1), reduction="per_sample")
        samples, total = vaefast.multi_tensor_sample_with_kl([z], [z])
        packed = vaefast.DiagonalGaussian(torch.empty(7, 8, 3, 3)).sample()
        nll = vaefast.reconstruction_loss(
            torch.empty(7, 3, 9), torch.empty(7, 9, dtype=torch.int64), likelihood="categorical", reduction="none"
        )
    for t, shape in ((loss, ()), (z, (7, LATENTS)), (kl, (7,)), (total, ()), (packed, (7, 4, 3, 3)), (nll, (7, 9))):
        assert t.is_meta and t.shape == shape
    assert samples[0].is_meta
    loss.backward()
    assert all(p.grad.is_meta for p in model.parameters())
    model = model.to_empty(device=device)
    model.zero_grad()
    model.load_state_dict(ready.state_dict())
    assert_same(model, ready, data(device=device).x)


# -- import

# what takes long to import, or belongs to those who use it
HEAVY = (
    "torch._dynamo", "torch._inductor", "torch.onnx", "torch.utils.cpp_extension", "torch.utils.tensorboard",
    "sympy", "scipy", "triton", "setuptools", "matplotlib", "pandas", "sklearn", "lightning", "accelerate", "diffusers",
)  # fmt: skip


def test_import_brings_nothing_heavy(extension: object) -> None:
    """Beyond what `import torch` has brought, its own modules alone; and an eager step needs nothing heavy either."""
    code = (
        "import sys, torch; before = set(sys.modules); import vaefast; after = set(sys.modules); "
        "m = torch.zeros(2, 4, requires_grad=True); vaefast.elbo_loss(m, m.detach(), m, m).backward(); "
        "vaefast.DiagonalGaussian(m).sample(torch.Generator()); "
        "print('import:', *[n for n in after - before if n.partition('.')[0] != 'vaefast']); "
        "print('step:', *set(sys.modules) - before)"
    )
    imported, step = (line.split()[1:] for line in output(code).splitlines())
    assert imported == []
    assert "vaefast" in step and not set(step) & set(HEAVY)
