"""sigma-VAE's likelihood: a Gaussian at the variance that maximises it."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import FLOATING, generator, gradients, posterior

import vaefast
from vaefast import Likelihood

SHAPES = pytest.mark.parametrize("shape", [(6, 40), (3, 2, 5, 7), (9,)], ids=str)


def data(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    mean, noise = torch.randn(2, *shape, generator=generator(4), dtype=torch.float64).unbind()
    x = (mean + 0.05 * noise).to(device, dtype)
    return mean.to(device, dtype).requires_grad_(), x


@SHAPES
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("reduction", ["per_sample", "batchmean", "sum", "mean"])
def test_is_the_gaussian_at_its_best_variance(
    backend: str, device: str, shape: tuple[int, ...], per_sample: bool, reduction: str
) -> None:
    """The plain Gaussian with log s as its log variance, and no other s gives less."""
    if per_sample and len(shape) == 1:
        return  # a single element has no variance
    mean, x = data(shape, torch.float32, device)
    chosen = Likelihood("gaussian_optimal", per_sample=per_sample)
    nll = vaefast.reconstruction_loss(mean, x, likelihood=chosen, reduction=reduction)
    wide = mean.detach().double().requires_grad_()
    squares = (x.double() - wide) ** 2
    over = tuple(range(1, len(shape))) if per_sample else None
    best = (squares.mean() if over is None else squares.mean(over, keepdim=True)).log().expand(shape)
    expected = vaefast.reconstruction_loss((wide, best), x.double(), likelihood="gaussian", reduction=reduction)
    torch.testing.assert_close(nll.double(), expected, rtol=2e-6, atol=2e-6)
    for other in (0.9, 1.1):
        worse = vaefast.reconstruction_loss(
            (wide, best + math.log(other)), x.double(), likelihood="gaussian", reduction=reduction
        )
        assert worse.sum() > expected.sum()
    if reduction != "per_sample":
        ours, theirs = torch.autograd.grad(nll, mean)[0], torch.autograd.grad(expected, wide)[0]
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", FLOATING)
def test_dtypes(backend: str, device: str, dtype: torch.dtype) -> None:
    mean, x = data((8, 33), dtype, device)
    nll = vaefast.reconstruction_loss(mean, x, likelihood="gaussian_optimal")
    s = ((x.double() - mean.detach().double()) ** 2).mean()
    assert nll.item() == pytest.approx(33 / 2 * (math.log(2 * math.pi * s.item()) + 1), rel=2e-6)
    assert gradients(nll, [mean])[0].dtype == dtype


def test_a_mask_takes_elements_out(backend: str, device: str) -> None:
    mean, x = data((8, 30), torch.float32, device)
    mask = torch.ones(30, dtype=torch.bool, device=device)
    mask[20:] = False
    masked = vaefast.reconstruction_loss(mean, x, likelihood="gaussian_optimal", weight=mask)
    alone = vaefast.reconstruction_loss(mean[:, :20], x[:, :20], likelihood="gaussian_optimal")
    torch.testing.assert_close(masked, alone)


def test_in_the_elbo(backend: str, device: str) -> None:
    mean, x = data((8, 30), torch.float32, device)
    p = posterior((8, 4), device=device).leaves()
    terms = vaefast.elbo_terms(mean, x, p.mu, p.raw, likelihood="gaussian_optimal", beta=0.5)
    nll = vaefast.reconstruction_loss(mean, x, likelihood="gaussian_optimal")
    torch.testing.assert_close(terms.loss, nll + 0.5 * vaefast.gaussian_kl(p.mu, p.raw))
    assert all(g.isfinite().all() for g in gradients(terms.loss, [mean, p.mu, p.raw]))


def test_gradcheck(backend: str, device: str) -> None:
    mean, x = data((3, 5), torch.float64, device)
    torch.autograd.gradcheck(lambda m: vaefast.reconstruction_loss(m, x, likelihood="gaussian_optimal"), [mean])
    torch.autograd.gradgradcheck(lambda m: vaefast.reconstruction_loss(m, x, likelihood="gaussian_optimal"), [mean])


def test_generation(backend: str, device: str) -> None:
    mean, _ = data((3, 5), torch.float32, device)
    assert torch.equal(vaefast.likelihood_mean(mean, "gaussian_optimal"), mean)
    with pytest.raises(ValueError, match=r"gaussian_optimal.*variance from data.*'gaussian'"):
        vaefast.sample_likelihood(mean, "gaussian_optimal")


def test_errors(backend: str, device: str) -> None:
    mean, x = data((3, 5), torch.float32, device)
    with pytest.raises(ValueError, match=r"reduction='none'.*shared"):
        vaefast.reconstruction_loss(mean, x, likelihood="gaussian_optimal", reduction="none")
    with pytest.raises(ValueError, match=r"must be \(mean\), got 2"):
        vaefast.reconstruction_loss((mean, mean), x, likelihood="gaussian_optimal")
