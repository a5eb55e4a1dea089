"""The maximum mean discrepancy to the prior, against its definition, quadrature and the exact value of Gaussians."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from inputs import generator
from torch import Tensor

import vaefast


def kernel_of(kernel: str, s: float, x: Tensor, y: Tensor) -> float:
    square = (x - y).square().sum().item()
    return math.exp(-square / (2 * s * s)) if kernel == "gaussian" else 2 * s * s / (2 * s * s + square)


def by_definition(x: Tensor, y: Tensor, kernel: str, s: float) -> float:
    def mean(a: Tensor, b: Tensor, same: bool) -> float:
        pairs = [kernel_of(kernel, s, p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)]
        return sum(pairs) / len(pairs)

    return mean(x, x, True) - 2 * mean(x, y, False) + mean(y, y, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3), (6,)])
@pytest.mark.parametrize("bandwidth", [None, 0.7])
@pytest.mark.parametrize("kernel", ["gaussian", "inverse_multiquadric"])
def test_beside_draws(kernel: str, bandwidth: float | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=generator(0)).to(dtype)
    y = 2 * torch.randn(7, *shape[1:], generator=generator(1)).to(dtype)
    found = vaefast.aggregate_posterior_mmd(x, y, kernel=kernel, bandwidth=bandwidth)
    s = math.sqrt(x[0].numel()) if bandwidth is None else bandwidth
    exact = by_definition(x.double().view(len(x), -1), y.double().view(len(y), -1), kernel, s)
    assert found.dim() == 0 and found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(exact, rel=1e-12 if dtype == torch.float64 else 1e-6, abs=1e-12)


@pytest.mark.parametrize("dims", [1, 3, 40])
@pytest.mark.parametrize("bandwidth", [None, 0.5, 9.0])
def test_beside_the_standard_normal(dims: int, bandwidth: float | None) -> None:
    """The kernel comes apart by dimension, and Gauss-Hermite quadrature integrates each."""
    x = 3 * torch.randn(5, dims, generator=generator(2), dtype=torch.float64)
    s = math.sqrt(dims) if bandwidth is None else bandwidth
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(150))
    weights = weights / weights.sum()
    one = (torch.exp(-(x.unsqueeze(-1) - nodes).square() / (2 * s * s)) * weights).sum(-1).prod(1).mean()
    apart = nodes.unsqueeze(1) - nodes
    two = (torch.exp(-apart.square() / (2 * s * s)) * weights * weights.unsqueeze(1)).sum() ** dims
    pairs = [kernel_of("gaussian", s, p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j]
    exact = sum(pairs) / len(pairs) - 2 * one + two
    found = vaefast.aggregate_posterior_mmd(x, bandwidth=bandwidth)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("with_samples", [False, True])
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.5, 1.0), (0.0, 0.3)])
def test_has_no_bias(shift: float, scale: float, with_samples: bool) -> None:
    """Of z ~ N(m, v I) it is known: each mean is that of a Gaussian kernel under a Gaussian."""
    dims, s2, v = 4, 4.0, scale * scale
    g = generator(3)

    def drawn() -> Tensor:
        return torch.randn(16, dims, generator=g)

    found = torch.stack([
        vaefast.aggregate_posterior_mmd(shift + scale * drawn(), drawn() if with_samples else None) for _ in range(800)
    ])  # fmt: skip
    own, cross, prior = ((s2 / (s2 + var)) ** (dims / 2) for var in (2 * v, 1 + v, 2.0))
    exact = own - 2 * cross * math.exp(-dims * shift**2 / (2 * (s2 + 1 + v))) + prior
    error = found.std().item() / math.sqrt(len(found))
    assert abs(found.mean().item() - exact) < 4 * error
    assert (shift == 0 and scale == 1) or exact > 10 * error


@pytest.mark.parametrize("kernel", ["gaussian", "inverse_multiquadric"])
def test_gradients(kernel: str) -> None:
    z, y = (torch.randn(4, 3, generator=generator(k), dtype=torch.float64).requires_grad_() for k in (4, 5))
    assert torch.autograd.gradcheck(lambda *t: vaefast.aggregate_posterior_mmd(*t, kernel=kernel), (z, y))
    assert torch.autograd.gradcheck(vaefast.aggregate_posterior_mmd, (z,))


def test_pulls_a_gaussian_to_the_prior() -> None:
    g = generator(6)
    mean, log_std = torch.full((2,), 2.0).requires_grad_(), torch.full((2,), -1.5).requires_grad_()
    optimizer = torch.optim.Adam([mean, log_std], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 500)
    for _ in range(500):
        optimizer.zero_grad()
        vaefast.aggregate_posterior_mmd(mean + log_std.exp() * torch.randn(128, 2, generator=g)).backward()
        optimizer.step()
        schedule.step()
    assert mean.abs().max() < 0.1 and log_std.abs().max() < 0.1


def test_compiled() -> None:
    z = torch.randn(16, 3, generator=generator(7))
    compiled = torch.compile(vaefast.aggregate_posterior_mmd, fullgraph=True)
    torch.testing.assert_close(compiled(z), vaefast.aggregate_posterior_mmd(z))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(1, 3),), {}, "at least two draws"),
        ((torch.zeros(3, 0),), {}, "at least two draws"),
        ((torch.zeros(()),), {}, "z must be"),
        ((torch.zeros(3, 2), torch.zeros(1, 2)), {}, "prior_samples must have at least two"),
        ((torch.zeros(3, 2), torch.zeros(4, 3)), {}, "do not go with z"),
        ((torch.zeros(3, 2),), {"kernel": "laplace"}, "kernel must be"),
        ((torch.zeros(3, 2),), {"kernel": "inverse_multiquadric"}, "give prior_samples"),
        ((torch.zeros(3, 2),), {"bandwidth": 0.0}, "bandwidth must be"),
    ],
)
def test_refusals(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vaefast.aggregate_posterior_mmd(*arguments, **options)
