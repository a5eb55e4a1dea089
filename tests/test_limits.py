"""The tables of docs/limits.md, on both engines and through the executor; how a negative binomial becomes a Poisson."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from exact import nll as exact_nll
from inputs import assert_within
from torch import Tensor

import vaefast

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "limits.md").read_text()
ROWS = [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| (`.*) \|$", TEXT, re.MULTILINE)]
LIKELIHOOD_ROWS = [row for row in ROWS if len(row) == 5]
KL_ROWS = [row for row in ROWS if len(row) == 4]
PRIOR_ROWS = [row for row in ROWS if len(row) == 3]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
BOUND = {torch.float32: 2e-6, torch.float64: 5e-9}  # the tables give nine digits
LANES = 37


def numbers(text: str) -> list[float]:
    return [float(x) for x in text.split(", ")]


def column(value: float, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full((1, LANES), value, dtype=dtype, device=device)


def expect(found: Tensor, value: float, dtype: torch.dtype) -> None:
    assert_within(found, torch.full((1, LANES), value, dtype=torch.float64), BOUND[dtype])


@pytest.mark.isa
@DTYPES
@pytest.mark.parametrize("row", LIKELIHOOD_ROWS, ids=" ".join)
def test_likelihoods(backend: str, device: str, row: list[str], dtype: torch.dtype) -> None:
    name, at, data, nll, gradient = row
    recon = tuple(column(x, dtype, device).requires_grad_() for x in numbers(at))
    likelihood = vaefast.Likelihood(name.strip("`"))
    target = column(float(data), dtype, device)
    for reduction in ("none", "per_sample"):
        found = vaefast.reconstruction_loss(recon, target, likelihood=likelihood, reduction=reduction)
        if reduction == "none":
            expect(found, float(nll), dtype)
        gradients = torch.autograd.grad(found.sum(), recon)
        for g, expected in zip(gradients, gradient.split(", ")):
            if expected != "*":
                expect(g, float(expected), dtype)


@pytest.mark.isa
@DTYPES
@pytest.mark.parametrize("row", KL_ROWS, ids=" ".join)
def test_parameterizations(backend: str, device: str, row: list[str], dtype: torch.dtype) -> None:
    name, at, kl, gradient = row
    raw, mu = column(float(at), dtype, device).requires_grad_(), column(0.0, dtype, device)
    found = vaefast.gaussian_kl(mu, raw, parameterization=name.strip("`"), reduction="none")
    expect(found, float(kl), dtype)
    if gradient != "*":
        expect(torch.autograd.grad(found.sum(), raw)[0], float(gradient), dtype)


@pytest.mark.isa
@DTYPES
@pytest.mark.parametrize("again", [False, True], ids=["once", "again"])
@pytest.mark.parametrize("row", PRIOR_ROWS, ids=" ".join)
def test_a_kl_to_a_prior(backend: str, device: str, row: list[str], dtype: torch.dtype, again: bool) -> None:
    """``again`` by a backward that can be differentiated; and the prior's two as tensors and as numbers."""
    at, kl, gradient = row
    given = numbers(at.strip("`"))
    tensors = [column(x, dtype, device).requires_grad_() for x in given]
    for arguments in (tensors, [*tensors[:2], *given[2:]]):
        for reduction in ("none", "sum"):
            found = vaefast.gaussian_kl(*arguments, reduction=reduction)
            expect(found.expand(1, LANES) / (LANES if reduction == "sum" else 1), float(kl), dtype)
            leaves = [t for t in arguments if isinstance(t, Tensor)]
            for g, expected in zip(torch.autograd.grad(found.sum(), leaves, create_graph=again), gradient.split(", ")):
                expect(g.detach(), float(expected), dtype)


@pytest.mark.isa
@DTYPES
@pytest.mark.parametrize("theta", [1e6, 1e8, 1.1e8, 1e10, 1e12, 1e14, 1e20, 1e30])
def test_a_negative_binomial_becomes_a_poisson(backend: str, device: str, theta: float, dtype: torch.dtype) -> None:
    """Against 50 digits all the way."""
    mu, x = torch.tensor([[1e-3, 0.5, 5.0, 1e2, 1e4]]), torch.tensor([[0.0, 1.0, 3.0, 130.0, 9.9e3]])
    recon = mu.to(device, dtype).requires_grad_(), torch.full_like(mu, theta).to(device, dtype).requires_grad_()
    nll = vaefast.reconstruction_loss(recon, x.to(device, dtype), likelihood="negative_binomial", reduction="none")
    exact = exact_nll("negative_binomial", x.double(), tuple(p.detach().cpu() for p in recon))
    assert_within(nll, exact, {torch.float32: 2e-6, torch.float64: 1e-9}[dtype])
    dmu, dtheta = torch.autograd.grad(nll.sum(), recon)
    wide = mu.double()
    assert_within(dmu, theta / (theta + wide) * (1 - x.double() / (wide + 1e-8)), 2e-6)
    assert (dtheta.abs() <= 1e-3).all()


@pytest.mark.isa
@DTYPES
@pytest.mark.parametrize(("mean", "x"), [(math.nan, 0.0), (math.nan, 3.0), (2.0, math.nan), (math.inf, math.nan)])
@pytest.mark.parametrize(
    ("likelihood", "rest"),
    [
        ("negative_binomial", ()),
        ("zero_inflated_negative_binomial", (0.5,)),
        ("negative_binomial_mixture", (0.5,)),
    ],
)
def test_what_is_nan_beside_a_dispersion_of_zero(
    backend: str, device: str, likelihood: str, rest: tuple[float, ...], mean: float, x: float, dtype: torch.dtype
) -> None:
    means = (mean, 2.0) if likelihood.endswith("mixture") else (mean,)
    recon = tuple(column(value, dtype, device) for value in (*means, 0.0, *rest))
    for constant in (True, False):
        of = vaefast.Likelihood(likelihood, constant=constant)
        found = vaefast.reconstruction_loss(recon, column(x, dtype, device), likelihood=of, reduction="none")
        assert found.isnan().all()


@pytest.mark.isa
def test_counts_without_their_factorial(backend: str, device: str) -> None:
    """What is left may be small beside log x!, of which no more than 2.4e-7 is lost."""
    g = torch.Generator().manual_seed(0)
    mu, theta, rate = (
        torch.exp(at + scale * torch.randn(200_000, generator=g)) for at, scale in ((0, 3), (0, 2), (2, 1.5))
    )
    x = torch.poisson(rate, generator=g)
    likelihood = vaefast.Likelihood("negative_binomial", constant=False)
    given = (mu.to(device), theta.to(device))
    found = vaefast.reconstruction_loss(given, x.to(device), likelihood=likelihood, reduction="none")
    m, t, k = mu.double() + likelihood.options["eps"], theta.double(), x.double()
    exact = torch.lgamma(t) - torch.lgamma(k + t) + t * torch.log1p(m / t) - torch.xlogy(k, m / (t + m))
    assert_within(found, exact, 2e-6, slack=2.4e-7 * torch.lgamma(k + 1))
