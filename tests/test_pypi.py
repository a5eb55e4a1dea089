"""Likelihoods of counts, and the preset, against scvi-tools itself where it is installed (`make test-pypi`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import gradients, posterior, training
from torch import Tensor
from torch.distributions import Normal

import vaefast

pytestmark = pytest.mark.pypi

COUNTS = [0.0, 1.0, 2.0, 7.0, 100.0, 1e4, 1e6]
MU = [1e-6, 1e-3, 0.5, 3.0, 100.0, 1e4, 1e6]
LOGITS = [-20.0, -1.0, 0.0, 3.0, 20.0]
THETA = [1e-4, 1e-2, 0.3, 1.0, 10.0, 1e3, 1e6]
# theirs adds its epsilon to theta too, within a logarithm, which moves a value by 1e-8 and a gradient by less
TOLERANCE = {torch.float64: 2e-8, torch.float32: 2e-6}


@pytest.fixture(params=["negative_binomial", "zero_inflated_negative_binomial"])
def likelihood(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def scvi(module: str) -> Any:
    return pytest.importorskip(
        f"scvi.{module}", reason="scvi-tools is not installed; `make test-pypi` installs it and runs this"
    )


@pytest.fixture
def log_prob(likelihood: str) -> Callable[..., Tensor]:
    module = scvi("distributions._negative_binomial")
    found: Callable[..., Tensor] = module.log_nb_positive if likelihood[0] == "n" else module.log_zinb_positive
    return found


def grid(likelihood: str, dtype: torch.dtype, device: str) -> tuple[Tensor, list[Tensor]]:
    """Counts [B, G] and the parameters: the means and logits in the rows, a dispersion for each of G genes."""
    logits = LOGITS if likelihood[0] == "z" else [0.0]
    rows = torch.tensor(list(itertools.product(COUNTS, MU, logits)), dtype=dtype, device=device)
    x, mu, pi = (column[:, None].expand(-1, len(THETA)).contiguous() for column in rows.unbind(1))
    params = [mu, torch.tensor(THETA, dtype=dtype, device=device), *([pi] if likelihood[0] == "z" else [])]
    return x, [p.requires_grad_() for p in params]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_count_likelihoods_are_scvis(
    backend: str, device: str, likelihood: str, log_prob: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """Each value and gradient; theirs in float64, where its own differences of large logarithms still hold."""
    x, params = grid(likelihood, dtype, device)
    nll = vaefast.reconstruction_loss(tuple(params), x, likelihood=likelihood, reduction="none")
    # each row's own dispersions, so that the gradient of the shared ones has its summands to be judged by
    wide = [p.detach().double().expand(x.shape).contiguous().requires_grad_() for p in params]
    exact = -log_prob(x.double(), *wide)
    summands = torch.autograd.grad(exact.sum(), wide)
    assert_close(nll, exact, exact.abs(), TOLERANCE[dtype])
    for g, e in zip(torch.autograd.grad(nll.sum(), params), summands):
        over = range(x.dim() - g.dim())
        sized = e.abs().sum(tuple(over)) if over else e.abs()
        assert_close(g, e.sum(tuple(over)) if over else e, sized, TOLERANCE[dtype])


def test_a_mixture_is_scvis(backend: str, device: str) -> None:
    """totalVI's, whose two components share an inverse dispersion, to which theirs adds an epsilon in one place."""
    module = scvi("distributions._negative_binomial")
    rows = list(itertools.product(COUNTS, MU[1:], MU[1:], THETA[1:-1], [-3.0, 0.0, 2.0]))
    x, *params = torch.tensor(rows, dtype=torch.float64, device=device)[:, None].unbind(2)
    ours = vaefast.reconstruction_loss(tuple(params), x, likelihood="negative_binomial_mixture", reduction="none")
    theirs = -module.log_mixture_nb(x, *params[:3], None, params[3])
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=2e-8)


def test_preset_is_the_loss_of_scvis_module(backend: str, device: str) -> None:
    module, distributions = scvi("module").VAE(n_input=30), scvi("distributions")
    data = training("zero_inflated_negative_binomial", 3, (16, 30), torch.float64, shapes=[(16, 30), (30,), (16, 30)])
    data, q = data.to(device).leaves(), posterior((16, 10), "var", dtype=torch.float64, device=device).leaves()
    px = distributions.ZeroInflatedNegativeBinomial(**dict(zip(("mu", "theta", "zi_logits"), data.recon)))
    qz, pz = Normal(q.mu, q.raw.sqrt()), Normal(torch.zeros_like(q.mu), torch.ones_like(q.mu))
    theirs = module.loss({"X": data.target}, {"qz": qz}, {"px": px, "pl": None, "pz": pz}, kl_weight=0.7).loss
    ours = vaefast.elbo_loss(data.recon, data.target, q.mu, q.raw, beta=0.7, preset="scvi")
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)
    inputs = [*data.recon, *q.tensors()]
    for g, e in zip(gradients(ours, inputs), gradients(theirs, inputs)):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-9)


def assert_close(actual: Tensor, exact: Tensor, size: Tensor, tolerance: float) -> None:
    error = (actual.double() - exact).abs() / size.clamp(min=1.0)
    assert error.max().item() <= tolerance, (error.max().item(), int(error.argmax()))
