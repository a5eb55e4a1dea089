"""Posteriors over networks against bayesian-torch and blitz themselves, where they are installed (`make test-pypi`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from vaefast.bayesian import MeanField

pytestmark = pytest.mark.pypi


def library(name: str, package: str) -> Any:
    return pytest.importorskip(name, reason=f"{package} is not installed; `make test-pypi` installs it and runs this")


def same_posterior(model: MeanField, layer: nn.Module, names: dict[str, tuple[str, str]]) -> None:
    """Gives their layer the model's means and scales."""
    with torch.no_grad():
        for name, (mu, rho) in names.items():
            getattr(layer, mu).copy_(model.module.get_parameter(name))
            getattr(layer, rho).copy_(model.rho.get_parameter(name))


@pytest.mark.parametrize(
    ("kind", "args", "shape"),
    [("Linear", (6, 4), (5, 6)), ("Conv2d", (2, 3, 3), (5, 2, 6, 6)), ("Conv1d", (2, 3, 3), (5, 2, 6))],
)
def test_bayesian_torchs_layers(kind: str, args: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """The KL is theirs, which is a mean, times the weights; and so is the output with the noise that they drew."""
    layers = library("bayesian_torch.layers", "bayesian-torch")
    model = MeanField(getattr(nn, kind)(*args), where="all", prior=(0.0, 0.5), init=0.1)
    layer = getattr(layers, f"{kind}Reparameterization")(*args, prior_variance=0.5)
    kernel = "weight" if kind == "Linear" else "kernel"
    same_posterior(model, layer, {"weight": (f"mu_{kernel}", f"rho_{kernel}"), "bias": ("mu_bias", "rho_bias")})
    x = torch.randn(shape)
    output, kl = layer(x)
    sizes = {name: p.numel() for name, p in model.module.named_parameters()}
    pairs = {name: MeanField(model.module, where=name, prior=(0.0, 0.5), init=0.1).kl() for name in sizes}
    torch.testing.assert_close(kl, sum(pairs[name] / sizes[name] for name in sizes))
    torch.testing.assert_close(model.kl(), sum(pairs.values()))
    noise = {"weight": getattr(layer, f"eps_{kernel}"), "bias": layer.eps_bias}
    weights = {
        name: p + F.softplus(model.rho.get_parameter(name)) * noise[name] for name, p in model.module.named_parameters()
    }
    torch.testing.assert_close(functional_call(model.module, weights, (x,)), output)


def test_blitz_estimates_the_kl() -> None:
    """Theirs is log q(w) - log p(w) at the draw, of a mixture of which one part is all."""
    modules = library("blitz.modules", "blitz-bayesian-pytorch")
    losses = library("blitz.losses", "blitz-bayesian-pytorch")
    model = MeanField(nn.Linear(6, 4), where="all", prior=(0.0, 0.5), init=0.1)
    layer = modules.BayesianLinear(6, 4, prior_sigma_1=0.5, prior_pi=1.0)
    same_posterior(model, layer, {"weight": ("weight_mu", "weight_rho"), "bias": ("bias_mu", "bias_rho")})
    x = torch.randn(2, 6)

    def estimate() -> Tensor:
        layer(x)
        found: Tensor = losses.kl_divergence_from_nn(layer)
        return found

    with torch.no_grad():
        found = torch.stack([estimate() for _ in range(2000)])
    assert abs(found.mean() - model.kl()) < 4 * found.std() / len(found) ** 0.5
