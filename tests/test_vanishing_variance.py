"""A variance that data can bring to 0: the loss stays finite, and its gradient is the formula's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from inputs import generator
from torch import Tensor

import vaefast
from vaefast import Likelihood

DEFAULT = math.exp(-12)
FLOORS = [None, 1e-2, 1e-4, 1e-8, 0]
# how far the reconstruction is from the data
ERRORS = [0.0, 1e-30, 1e-12, 1e-6, 1e-3, 0.1, 10.0]
WEIGHTS: dict[str, Tensor | None] = {"none": None, "mask": torch.arange(5) < 3, "counts": torch.arange(1.0, 6.0)}


def chosen(per_sample: bool, floor: float | None) -> Likelihood:
    return Likelihood("gaussian_optimal", per_sample=per_sample, **({} if floor is None else {"floor": floor}))


def exact(mean: Tensor, x: Tensor, w: Tensor | None, per_sample: bool, floor: float, reduction: str) -> Tensor:
    """In float64: a Gaussian whose variance is the weighted mean of the squares, and bounded."""
    weight = torch.ones_like(x) if w is None else w.double().expand(x.shape)
    squares, dims = weight * (x - mean) ** 2, tuple(range(1, x.dim()))
    halves, counts = squares.sum(dims), weight.sum(dims)
    s = halves / counts if per_sample else halves.sum() / counts.sum()
    s = torch.where(s > floor, s, floor)
    rows = 0.5 * (halves / s + counts * torch.log(2 * math.pi * s))
    return {"per_sample": rows, "batchmean": rows.mean(), "sum": rows.sum(), "mean": rows.sum() / x.numel()}[reduction]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("weight", list(WEIGHTS))
@pytest.mark.parametrize("reduction", ["per_sample", "batchmean", "sum", "mean"])
def test_value_and_gradient(face: Any, per_sample: bool, floor: float | None, weight: str, reduction: str) -> None:
    x = torch.randn(4, 3, 5, generator=generator(3), dtype=torch.float64)
    direction = torch.randn(4, 3, 5, generator=generator(4), dtype=torch.float64)
    w = WEIGHTS[weight]
    for error in ERRORS:
        if floor == 0 and error < 1e-6:
            continue  # without a bound there is none
        mean = (x + error * direction).requires_grad_()
        given = None if w is None else w if w.dtype == torch.bool else w.double()
        nll = face.reconstruction_loss(mean, x, likelihood=chosen(per_sample, floor), reduction=reduction, weight=given)
        expected = exact(mean, x, w, per_sample, DEFAULT if floor is None else floor, reduction)
        torch.testing.assert_close(nll, expected, rtol=1e-12, atol=1e-12)
        found, wanted = (torch.autograd.grad(t.sum(), mean, retain_graph=True)[0] for t in (nll, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 7), (1, 1), (3,), (2, 3, 4, 4)], ids=str)
def test_a_perfect_reconstruction(face: Any, per_sample: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The default's: finite, lowest, and without a gradient."""
    x = torch.rand(shape, generator=generator(1)).to(dtype)
    mean = x.clone().requires_grad_()
    for reduction in ("per_sample", "batchmean", "sum", "mean"):
        nll = face.reconstruction_loss(mean, x, likelihood=chosen(per_sample, None), reduction=reduction)
        assert nll.isfinite().all()
        (gradient,) = torch.autograd.grad(nll.sum(), mean)
        assert (gradient == 0).all()
    rows = face.reconstruction_loss(mean, x, likelihood=chosen(per_sample, None), reduction="per_sample")
    lowest = math.prod(shape[1:]) / 2 * (math.log(2 * math.pi) - 12)
    torch.testing.assert_close(rows.double(), torch.full_like(rows, lowest).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("per_sample", [False, True])
def test_one_perfect_sample_among_others(face: Any, per_sample: bool) -> None:
    x = torch.rand(4, 7)
    mean = torch.cat([x[:2], x[2:] + 0.1]).requires_grad_()
    nll = face.elbo_loss(mean, x, torch.zeros(4, 2), torch.zeros(4, 2), likelihood=chosen(per_sample, None))
    (gradient,) = torch.autograd.grad(nll, mean)
    assert nll.isfinite() and gradient.isfinite().all()
    assert (gradient[:2] == 0).all() and (gradient[2:] != 0).all()


def test_training_to_a_perfect_fit_stays_finite() -> None:
    x = torch.rand(8, 5)
    mean = torch.nn.Parameter(torch.zeros(8, 5))
    optimizer = torch.optim.SGD([mean], lr=1e-5)
    for _ in range(3000):
        optimizer.zero_grad()
        loss = vaefast.reconstruction_loss(mean, x, likelihood="gaussian_optimal", reduction="sum")
        loss.backward()
        optimizer.step()
    assert loss.isfinite() and mean.isfinite().all()


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("error", [1e-4, 0.3])
def test_gradcheck(face: Any, per_sample: bool, error: float) -> None:
    """On either side of the bound, to the second order."""
    x = torch.randn(3, 4, generator=generator(5), dtype=torch.float64)
    mean = (x + error * torch.randn(3, 4, generator=generator(6), dtype=torch.float64)).requires_grad_()

    def f(m: Tensor) -> Tensor:
        return face.reconstruction_loss(m, x, likelihood=chosen(per_sample, 1e-3))

    torch.autograd.gradcheck(f, [mean], eps=1e-7, atol=1e-4, rtol=1e-4)
    torch.autograd.gradgradcheck(f, [mean], eps=1e-7, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("floor", [-1e-6, -1, math.nan, math.inf, "1", None])
def test_a_bound_is_a_variance(floor: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="floor"):
        Likelihood("gaussian_optimal", floor=floor)


def test_the_bound_is_shown() -> None:
    assert f"floor={DEFAULT!r}" in repr(Likelihood("gaussian_optimal"))
    assert "floor=e^-12" in str(Likelihood.__doc__)
