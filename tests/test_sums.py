"""Nothing is narrowed before it is summed: what is a sum, in one call or over elements of another, has its digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import LIKELIHOOD_CASES, training
from torch import Tensor

import vaefast
from vaefast import DiagonalGaussian

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# rounding of the result, of whatever dtype it is, and of sums in float32
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# so large that a half cannot hold the sums
moments, others, z = draw(3, 16, 40, 40), draw(3, 16, 40, 40, seed=1), draw(3, 8, 40, 40, seed=2, scale=3.0)
mu, logvar, pm, plv = (draw(3, 50_000, seed=k) for k in range(4))

METHODS: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
    "nll": lambda to: DiagonalGaussian(to(moments)).nll(to(z)),
    "nll, dims": lambda to: DiagonalGaussian(to(moments)).nll(to(z), dims=[1, 2, 3]),
    "nll, one dim": lambda to: DiagonalGaussian(to(moments)).nll(to(z), dims=[3]),
    "nll, the batch": lambda to: DiagonalGaussian(to(moments)).nll(to(z), dims=(0, 1, 2, 3)),
    "nll, dim 2": lambda to: DiagonalGaussian(to(moments), 2).nll(to(z.reshape(3, 16, 20, 40)), dims=[1, 2]),
    "nll, deterministic": lambda to: DiagonalGaussian(to(moments), deterministic=True).nll(to(z), dims=[1, 2, 3]),
    "kl": lambda to: DiagonalGaussian(to(moments)).kl(),
    "kl to another": lambda to: DiagonalGaussian(to(moments)).kl(DiagonalGaussian(to(others))),
    "kl, sum": lambda to: DiagonalGaussian(to(moments)).kl(reduction="sum"),
    "kl, batchmean": lambda to: DiagonalGaussian(to(moments)).kl(reduction="batchmean"),
    "kl with a sample": lambda to: DiagonalGaussian(to(moments)).sample_with_kl()[1],
    "gaussian_kl": lambda to: vaefast.gaussian_kl(to(mu), to(logvar), to(pm), to(plv), reduction="per_sample"),
    "free bits": lambda to: vaefast.gaussian_kl(to(mu), to(logvar), free_bits=0.2, reduction="per_sample"),
    "free bits of a sample": lambda to: vaefast.gaussian_kl(
        to(mu), to(logvar), free_bits=1e5, free_bits_per="sample", reduction="sum"),
    "free bits of a dimension": lambda to: vaefast.gaussian_kl(
        to(mu), to(logvar), free_bits=0.2, free_bits_per="batch_dim", reduction="sum"),
    "capacity": lambda to: vaefast.gaussian_kl(to(mu), to(logvar), capacity=1e5, reduction="per_sample"),
    "symmetric": lambda to: vaefast.gaussian_kl(to(mu), to(logvar), symmetric=True, reduction="per_sample"),
    "symmetric, free bits": lambda to: vaefast.gaussian_kl(to(mu), to(logvar), symmetric=True, free_bits=0.3),
    "balance": lambda to: vaefast.gaussian_kl(to(mu), to(logvar), to(pm), balance=0.3, reduction="sum"),
    "kl_per_dim": lambda to: vaefast.kl_per_dim(to(mu).t(), to(logvar).t()),
    "levels": lambda to: vaefast.multi_tensor_gaussian_kl([to(mu), to(pm)], [to(logvar), to(plv)], reduction="sum"),
    "estimated": lambda to: vaefast.sample_with_kl(
        to(mu), to(logvar), eps=to(pm), estimator="mc", reduction="per_sample")[1],
    "elbo": lambda to: vaefast.elbo_loss((to(mu), to(pm)), to(plv), to(mu), to(logvar), likelihood="gaussian"),
    "elbo, free bits": lambda to: vaefast.elbo_loss(to(mu), to(plv.sigmoid()), to(mu), to(logvar), free_bits=0.2),
    "optimal": lambda to: vaefast.reconstruction_loss(to(mu), to(logvar), likelihood="gaussian_optimal"),
    "optimal, weights": lambda to: vaefast.reconstruction_loss(
        to(mu), to(logvar), likelihood="gaussian_optimal", weight=to(pm.abs()), reduction="sum"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", list(METHODS))
def test_sums_keep_their_digits(method: str, dtype: torch.dtype) -> None:
    """Against float64 of the same rounded inputs; in float32 at least."""
    for engines in ("auto", "reference"):
        with vaefast.use_backend(engines):
            found = METHODS[method](lambda t: t.to(dtype))
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        exact = METHODS[method](lambda t: t.to(dtype).double())
        torch.testing.assert_close(found.double(), exact, rtol=TOLERANCE[found.dtype], atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
def test_sums_of_likelihoods(face: Any, likelihood: str, count: int, dtype: torch.dtype) -> None:
    data = training(likelihood, count, (3, 2000)).to(dtype)
    for reduction in ("per_sample", "batchmean", "sum", "mean"):
        found = face.reconstruction_loss(data.recon, data.target, likelihood=likelihood, reduction=reduction)
        wide = data.to(torch.float64)
        exact = face.reconstruction_loss(wide.recon, wide.target, likelihood=likelihood, reduction=reduction)
        torch.testing.assert_close(found.double(), exact, rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_two_elements(face: Any, dtype: torch.dtype) -> None:
    """An elementwise result that is a sum of two is rounded once."""
    found = face.gaussian_kl(mu.to(dtype), logvar.to(dtype), pm.to(dtype), symmetric=True, reduction="none")
    assert found.dtype == dtype
    exact = face.gaussian_kl(*(t.to(dtype).double() for t in (mu, logvar, pm)), symmetric=True, reduction="none")
    half_an_ulp = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 4e-7, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=half_an_ulp * 1.001, atol=1e-6)


@pytest.mark.pypi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 8, 16, 16), (2, 8, 3, 16, 16)], ids=["images", "videos"])
def test_under_diffusers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """In the dtype of theirs, rounded once."""
    vae = pytest.importorskip(
        "diffusers.models.autoencoders.vae",
        reason="diffusers is not installed; `make test-pypi` installs it and runs this",
    )
    given, other, sample = (draw(*shape, seed=k).to(dtype) for k in range(3))
    sample = sample[:, :4]
    cls = vae.DiagonalGaussianDistribution
    wide = [cls(given.double()), cls(other.double())]
    exact = wide[0].nll(sample.double()), wide[0].kl(), wide[0].kl(wide[1])
    with vaefast.integrations.diffusers.enabled():
        q, p = cls(given), cls(other)
        found = q.nll(sample), q.kl(), q.kl(p)
    theirs = cls(given).nll(sample), cls(given).kl(), cls(given).kl(cls(other))
    for f, e, t in zip(found, exact, theirs):
        assert f.dtype == t.dtype
        torch.testing.assert_close(f.double(), e, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.3, -1.7, 38.531])
def test_sums_of_equal_terms(backend: str, value: float, dtype: torch.dtype) -> None:
    """Which are rounded alike, so that a long chain of additions is off in one direction: by 1e-5 after a thousand."""
    for n in (100, 1000, 1071, 100_003):
        logits = torch.full((1, n), value).to(dtype)
        exact = n * torch.nn.functional.softplus(logits[0, 0].double()).item()
        found = vaefast.reconstruction_loss(logits, torch.zeros_like(logits), reduction="sum").item()
        assert abs(found / exact - 1) < 2e-6
        mu = torch.full((1, n), 0.1 + abs(value)).to(dtype)
        kl = vaefast.gaussian_kl(mu, torch.zeros_like(mu), reduction="sum").item()
        assert abs(kl / (0.5 * n * mu[0, 0].double().item() ** 2) - 1) < 2e-6
