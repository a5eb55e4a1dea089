"""The KL and its gradients against 50-digit arithmetic, from next to the prior to where float32 ends.

Bounds of the contract: relative error 1e-6 in float32 and 1e-14 in float64 against N(0, I), times max(1, |lvq - lvp|)
between two Gaussians, wherever the exact result is a normal number; and the KL is never negative.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from inputs import textbook_kl
from torch import Tensor

import vaefast

pytestmark = pytest.mark.isa

DIGITS = mpmath.mp.clone()
DIGITS.dps = 50
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "float64"])


class Exact(NamedTuple):
    """Value and gradients, each with the sum of the magnitudes of its terms, which is what bounds an error."""

    kl: list
    dmu: list
    dlogvar: list
    dprior_mu: list
    dprior_logvar: list
    dprior_logvar_terms: list


@cache
def logvars(dtype: torch.dtype) -> Tensor:
    """Log-spaced magnitudes up to 80 of both signs, from 1e-15 and from the least whose KL is a normal number."""
    least = -18 if dtype == torch.float32 else -150
    magnitudes = np.concatenate([np.logspace(-15, np.log10(80), 120), np.logspace(least, -15, 12), [0.5, 1, 2, 79.99]])
    return torch.from_numpy(np.concatenate([[0.0], magnitudes, -magnitudes])).to(dtype)


@cache
def to_prior(dtype: torch.dtype) -> tuple[Tensor, ...]:
    mus = torch.tensor([0.0, 1e-18, 1e-3, 1.0, 1e4, -3.0], dtype=dtype)
    return tuple(t.contiguous() for t in torch.cartesian_prod(mus, logvars(dtype)).unbind(1))


@cache
def between_two(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Distances in the mean and the log variance, from equal to far, at prior log variances up to +-80."""
    near = [0.0, 1e-12, -1e-7, 1e-6, -1e-5, 1e-3, -1e-2, 0.3, -0.9, 1.0, -1.5, 2.0, -2.5, 7.0, -20.0, 60.0]
    rows = []
    for lvp, d, (mup, dmu) in itertools.product(
        [0.0, 1e-15, 0.7, -3.0, 30.0, -30.0, 80.0, -80.0],
        near,
        [(0.0, 0.0), (0.0, 1e-3), (1.0, 1e-6), (100.0, -3.0), (0.0, 1e4)],
    ):
        rows.append([mup + dmu, max(-80.0, min(80.0, lvp + d)), mup, lvp])
    return tuple(t.contiguous() for t in torch.tensor(rows, dtype=torch.float64).to(dtype).unbind(1))


def exact(mu: Tensor, logvar: Tensor, prior_mu: Tensor | None = None, prior_logvar: Tensor | None = None) -> Exact:
    """From the very numbers that the kernels get."""
    zero = torch.zeros_like(mu)
    columns = [(zero if t is None else t).tolist() for t in (mu, logvar, prior_mu, prior_logvar)]
    rows = []
    for numbers in zip(*columns):
        m, lv, pm, plv = map(DIGITS.mpf, numbers)
        d = lv - plv
        em1 = DIGITS.expm1(d)
        h = em1 - d
        if abs(d) < 1e-10:  # at 50 digits the subtraction loses up to 2 log10(1/d) of them: the series does not
            h = DIGITS.fsum(d**k / DIGITS.factorial(k) for k in range(2, 12))
        precision = DIGITS.exp(-plv)
        square = (m - pm) ** 2 * precision
        slope = (m - pm) * precision
        rows.append(((h + square) / 2, slope, em1 / 2, -slope, -(em1 + square) / 2, (abs(em1) + square) / 2))
    return Exact(*map(list, zip(*rows)))


@cache
def exact_to_prior(dtype: torch.dtype) -> Exact:
    return exact(*to_prior(dtype))


@cache
def exact_between_two(dtype: torch.dtype) -> Exact:
    return exact(*between_two(dtype))


def relative_errors(actual: Tensor, exact: list, relative_to: list | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Errors relative to the exact value (or to its terms), and where that is a normal number of actual's dtype."""
    info = torch.finfo(actual.dtype)
    errors, normal = [], []
    for a, e, r in zip(actual.detach().cpu().tolist(), exact, relative_to or exact):
        normal.append(info.tiny <= abs(e) <= info.max and abs(r) <= info.max)
        if e == 0:
            assert a == 0, f"{a!r}, which should be 0"
        errors.append(float(abs(DIGITS.mpf(a) - e) / abs(r)) if normal[-1] and np.isfinite(a) else np.inf)
    return np.array(errors), np.array(normal)


def assert_relative(
    actual: Tensor, exact: list, tolerance: float | np.ndarray, relative_to: list | None = None
) -> None:
    errors, normal = relative_errors(actual, exact, relative_to)
    assert normal.sum() > 100, "the grid should hold results to compare"
    worst = int(np.argmax(np.where(normal, errors / tolerance, 0)))
    assert (errors[normal] <= np.broadcast_to(tolerance, errors.shape)[normal]).all(), (
        f"relative error {errors[worst]:.3g} at point {worst}: {actual[worst].item()!r}, exact {float(exact[worst])!r}"
    )


def leaves(tensors: tuple[Tensor, ...], device: str) -> list[Tensor]:
    return [t.detach().clone().to(device).requires_grad_() for t in tensors]


def kl_and_gradients(tensors: tuple[Tensor, ...], device: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    inputs = leaves(tensors, device)
    kl = vaefast.gaussian_kl(*inputs, reduction="none")
    return kl, torch.autograd.grad(kl.sum(), inputs)


@DTYPES
def test_to_the_prior(backend: str, device: str, dtype: torch.dtype) -> None:
    kl, (dmu, dlogvar) = kl_and_gradients(to_prior(dtype), device)
    e = exact_to_prior(dtype)
    assert_relative(kl, e.kl, TOLERANCE[dtype])
    assert_relative(dmu, e.dmu, TOLERANCE[dtype])
    assert_relative(dlogvar, e.dlogvar, TOLERANCE[dtype])
    assert (kl >= 0).all()


@DTYPES
def test_between_two_gaussians(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = between_two(dtype)
    kl, (dmu, dlogvar, dprior_mu, dprior_logvar) = kl_and_gradients(inputs, device)
    e = exact_between_two(dtype)
    tolerance = TOLERANCE[dtype] * (inputs[1] - inputs[3]).abs().clamp(min=1).double().numpy()
    assert_relative(kl, e.kl, tolerance)
    assert_relative(dmu, e.dmu, tolerance)
    assert_relative(dlogvar, e.dlogvar, tolerance)
    assert_relative(dprior_mu, e.dprior_mu, tolerance)
    # em1 + square can cancel: relative to the sum of their magnitudes
    assert_relative(dprior_logvar, e.dprior_logvar, tolerance, e.dprior_logvar_terms)
    assert (kl >= 0).all()


@DTYPES
def test_of_equal_gaussians_is_zero(backend: str, device: str, dtype: torch.dtype) -> None:
    logvar = logvars(dtype).to(device)
    mu = torch.linspace(-100, 100, logvar.numel(), dtype=dtype, device=device)
    kl = vaefast.gaussian_kl(mu, logvar, mu, logvar, reduction="none")
    assert torch.equal(kl, torch.zeros_like(kl))


@DTYPES
def test_is_never_negative_next_to_the_prior(backend: str, device: str, dtype: torch.dtype) -> None:
    """The neighbours of 0 and of equality, step by step, where rounding decides the sign."""
    bits = torch.arange(-4000, 4000, device=device)
    steps = bits.to(dtype) * torch.finfo(dtype).eps / 4
    for mu, center in ((0.0, 0.0), (0.0, 1.0), (1e-9, -80.0), (3.0, 80.0)):
        m = torch.full_like(steps, mu)
        p = torch.full_like(steps, center)
        assert (vaefast.gaussian_kl(m, center + steps * 8, m, p, reduction="none") >= 0).all()
    assert (vaefast.gaussian_kl(torch.zeros_like(steps), steps, reduction="none") >= 0).all()


@pytest.mark.parametrize("switch", [1.0, 2.0])
@DTYPES
def test_where_the_series_ends(backend: str, device: str, dtype: torch.dtype, switch: float) -> None:
    """Each neighbour of the points where an implementation may change its formula."""
    around = torch.tensor([switch, -switch], dtype=dtype)
    points = torch.cat([around * (1 + k * torch.finfo(dtype).eps) for k in range(-40, 41)])
    kl, (_, dlogvar) = kl_and_gradients((torch.zeros_like(points), points), device)
    e = exact(torch.zeros_like(points), points)
    assert_relative(kl, e.kl, TOLERANCE[dtype])
    assert_relative(dlogvar, e.dlogvar, TOLERANCE[dtype])


def textbook_errors(formula: Callable[..., Tensor]) -> tuple[np.ndarray, Tensor]:
    logvar = torch.logspace(-15, -3, 200)
    mu = torch.zeros_like(logvar)
    kl = formula(mu, logvar)
    return relative_errors(kl, exact(mu, logvar).kl)[0], kl


def test_where_the_textbook_formula_fails() -> None:
    """-(1 + lv - mu^2 - e^lv) / 2 in float32 loses every digit, or its sign, on inputs that the contract covers."""
    errors, kl = textbook_errors(textbook_kl)
    assert (errors > 1e-2).mean() > 0.9
    assert (kl < 0).any() or (kl == 0).any()
    ours, _ = textbook_errors(lambda mu, logvar: vaefast.gaussian_kl(mu, logvar, reduction="none"))
    assert (ours <= 1e-6).all()


def test_sum_next_to_the_prior_is_right(backend: str, device: str) -> None:
    """A converged posterior over many latents: the textbook's sum is noise here."""
    g = torch.Generator().manual_seed(0)
    mu = 1e-5 * torch.randn(64, 5000, generator=g)
    logvar = 1e-5 * torch.randn(64, 5000, generator=g)
    wanted = 0.5 * (mu.double() ** 2 + logvar.double() ** 2 / 2 + logvar.double() ** 3 / 6).sum()
    kl = vaefast.gaussian_kl(mu.to(device), logvar.to(device), reduction="sum")
    assert abs(kl.item() / wanted.item() - 1) < 1e-6
