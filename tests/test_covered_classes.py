"""Classes that look covered: each Gaussian of the installed diffusers is fused, or named as one that is not."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import generator, gradients
from torch import Tensor

import vaefast
from vaefast import integrations

OPTIONAL = "is not installed; `make test-pypi` installs it and runs this"


def test_enable_names_what_it_fuses() -> None:
    try:
        assert integrations.torch_distributions.enable() == (("Normal", "MixtureSameFamily"), ())
        with integrations.torch_distributions.enabled("torch") as covered:
            assert covered.fused == ("Normal", "MixtureSameFamily")
    finally:
        integrations.torch_distributions.disable()


def classes() -> dict[str, type]:
    """Every class of diffusers' models whose name ends like a distribution's."""
    models = pytest.importorskip("diffusers.models", reason=f"diffusers {OPTIONAL}")
    found: dict[str, type] = {}
    for module in pkgutil.walk_packages(models.__path__, "diffusers.models."):
        try:
            loaded = importlib.import_module(module.name)
        except (ImportError, RuntimeError):
            continue  # what needs another package, such as flax
        for name, cls in inspect.getmembers(loaded, inspect.isclass):
            if name.endswith("Distribution") and cls.__module__.startswith("diffusers"):
                found[name] = cls
    return found


@pytest.mark.pypi
def test_every_distribution_is_fused_or_named() -> None:
    found = classes()
    assert {"DiagonalGaussianDistribution", "OobleckDiagonalGaussianDistribution"} <= set(found)
    before = {name: dict(vars(cls)) for name, cls in found.items()}
    with integrations.diffusers.enabled() as covered:
        assert set(found) <= {*covered.fused, *covered.left}
        assert not {*covered.fused} & {*covered.left}
        changed = {name for name, cls in found.items() if dict(vars(cls)) != before[name]}
        assert changed == set(covered.fused) & set(found)
        # what draws or has a KL is fused
        for name in covered.left:
            assert not hasattr(found[name], "kl"), name
            assert "randn" not in inspect.getsource(found[name]), name
        text = str(integrations.diffusers.__doc__)
        assert all(name in text for name in (*covered.fused, *covered.left))
    assert {name: dict(vars(cls)) for name, cls in found.items()} == before


def oobleck(*given: Tensor) -> Any:
    module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_oobleck", reason=f"diffusers {OPTIONAL}")
    return module.OobleckDiagonalGaussianDistribution(torch.cat(given, 1))


def minimax(*given: Tensor) -> Any:
    name = "diffusers.models.autoencoders.autoencoder_kl_minimax_h3_audio"
    module = pytest.importorskip(name, reason=f"diffusers {OPTIONAL}, or is of an age without it")
    return module.MiniMaxH3AudioDiagonalGaussianDistribution(*given)


METHODS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "oobleck, sample": (oobleck, lambda q: q.sample()),
    "oobleck, sample by a generator": (oobleck, lambda q: q.sample(generator(3))),
    "oobleck, sample by generators": (oobleck, lambda q: q.sample([generator(3), generator(4)])),
    "oobleck, kl": (oobleck, lambda q: q.kl()),
    "oobleck, kl to another": (oobleck, lambda q: q.kl(oobleck(*(torch.ones(2, 4, 30, dtype=q.mean.dtype),) * 2))),
    "oobleck, mode": (oobleck, lambda q: q.mode()),
    "oobleck, std": (oobleck, lambda q: q.std),
    "oobleck, logvar": (oobleck, lambda q: q.logvar),
    "minimax, sample": (minimax, lambda q: q.sample()),
    "minimax, sample by a generator": (minimax, lambda q: q.sample(generator(3))),
    "minimax, mode": (minimax, lambda q: q.mode()),
}


@pytest.mark.pypi
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(METHODS))
def test_is_theirs(extension: object, name: str, dtype: torch.dtype) -> None:
    """Values and gradients, of the noise that it would have drawn."""
    make, method = METHODS[name]
    given = [torch.randn(2, 4, 30, generator=generator(k)).to(dtype).requires_grad_() for k in range(2)]

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        out = method(make(*given))
        grads = gradients(out, given) if out.requires_grad else []
        return [out, *(torch.zeros_like(t) if g is None else g for t, g in zip(given, grads))]

    theirs = run()
    with integrations.diffusers.enabled(noise="torch"):
        fused = run()
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    assert len(fused) == len(theirs)
    for f, t in zip(fused, theirs):
        assert f.dtype == t.dtype
        torch.testing.assert_close(f, t, rtol=tolerance, atol=tolerance)


@pytest.mark.pypi
@pytest.mark.parametrize("make", [oobleck, minimax])
def test_the_kernel_draws(extension: object, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed; `make test-pypi` installs it and runs this")
    mean, raw = torch.full((4, 4, 2000), 3.0), torch.full((4, 4, 2000), -1.0)
    calls: list[Any] = []
    original = vaefast.reparameterize
    monkeypatch.setattr(integrations.diffusers, "reparameterize", lambda *a, **k: calls.append(k) or original(*a, **k))
    with integrations.diffusers.enabled():
        q = make(mean, raw)
        z = q.sample()
        assert len(calls) == 1
        assert not torch.equal(z, q.sample())
        torch.manual_seed(0)
        first = q.sample()
        torch.manual_seed(0)
        assert torch.equal(first, q.sample())
        assert torch.equal(q.sample(generator(1)), q.sample(generator(1)))
    std = q.std[0, 0, 0].item()
    assert z.std().item() == pytest.approx(std, rel=0.02) and z.mean().item() == pytest.approx(3.0, abs=0.02)
    calls.clear()
    make(mean, raw).sample()
    assert not calls


@pytest.mark.pypi
def test_a_deterministic_oobleck_is_theirs(extension: object) -> None:
    module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_oobleck", reason=f"diffusers {OPTIONAL}")
    moments = torch.randn(2, 8, 30)
    with integrations.diffusers.enabled():
        q = module.OobleckDiagonalGaussianDistribution(moments, deterministic=True)
        assert q.kl().item() == 0.0

        class Derived(module.OobleckDiagonalGaussianDistribution):
            pass

        torch.manual_seed(0)
        z = Derived(moments).sample()
    torch.manual_seed(0)
    assert torch.equal(z, module.OobleckDiagonalGaussianDistribution(moments).sample())
