"""Gradients in batches, by the autograd engine and by torch.vmap over it, are what a loop over them gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inputs import training
from torch import Tensor

import vaefast
from vaefast.reference import LIKELIHOODS

Case = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def leaf(*shape: int, seed: int = 0) -> Tensor:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return t.requires_grad_()


def seeded(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return f(*inputs)

    return call


Q = leaf(3, 4), leaf(3, 4, seed=1)
P = leaf(3, 4, seed=2), leaf(4, seed=3)
RECON, X = leaf(3, 5, seed=4), torch.rand(3, 5, dtype=torch.float64)
MOMENTS = leaf(3, 8, seed=5)
CASES: dict[str, Case] = {
    "sample": (seeded(vaefast.reparameterize), Q),
    "sample by std": (seeded(lambda m, s: vaefast.reparameterize(m, s, parameterization="std")), Q),
    "kl each": (lambda *q: vaefast.gaussian_kl(*q, reduction="none"), Q),
    "kl per sample": (lambda *q: vaefast.gaussian_kl(*q, reduction="per_sample"), (*Q, *P)),
    "kl": (vaefast.gaussian_kl, (*Q, *P)),
    "free bits": (lambda *q: vaefast.gaussian_kl(*q, free_bits=0.1, reduction="per_sample"), Q),
    "sample and kl, z": (seeded(lambda *q: vaefast.sample_with_kl(*q)[0]), Q),
    "sample and kl": (seeded(lambda *q: torch.cat([t.flatten() for t in vaefast.sample_with_kl(*q)])), Q),
    "elbo": (lambda r, *q: vaefast.elbo_loss(r, X, *q), (RECON, *Q)),
    "elbo per sample": (lambda r, *q: vaefast.elbo_loss(r, X, *q, reduction="per_sample"), (RECON, *Q, *P)),
    "elbo terms": (lambda r, *q: torch.stack(vaefast.elbo_terms(r, X, *q)), (RECON, *Q)),
    "several": (
        lambda a, b, c, d: vaefast.multi_tensor_gaussian_kl([a, c], [b, d], reduction="per_sample"),
        (*Q, leaf(3, 2, seed=6), leaf(3, 2, seed=7)),
    ),
    "several samples": (
        seeded(lambda *q: torch.cat([t.flatten() for t in vaefast.multi_tensor_sample_with_kl(q[:1], q[1:])[0]])),
        Q,
    ),
    "packed": (lambda m: vaefast.DiagonalGaussian(m).kl(), (MOMENTS,)),
    "packed sample": (seeded(lambda m: vaefast.DiagonalGaussian(m).sample()), (MOMENTS,)),
    "density": (lambda m: vaefast.DiagonalGaussian(m).nll(torch.ones(3, 4, dtype=torch.float64)), (MOMENTS,)),
    "kl per dim": (vaefast.kl_per_dim, Q),
}


def of_likelihood(name: str) -> Case:
    data = training(name, len(LIKELIHOODS[name].params), (3, 5), dtype=torch.float64)
    # a number of trials has no neighbours to take a numerical derivative by
    trained = sum(domain != "total" for domain in LIKELIHOODS[name].domains)

    def loss(*recon: Tensor) -> Tensor:
        full = (*recon, *data.recon[trained:])
        return vaefast.reconstruction_loss(full, data.target, likelihood=name, reduction="per_sample")

    return loss, tuple(p.requires_grad_() for p in data.recon[:trained])


CASES |= {name: of_likelihood(name) for name in LIKELIHOODS}
EVERY = pytest.mark.parametrize("name", list(CASES))


def by_loop(y: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor) -> list[Tensor]:
    each = [torch.autograd.grad(y, inputs, v, retain_graph=True, allow_unused=True) for v in upstream]
    return [torch.stack([torch.zeros_like(x) if g is None else g for g in gs]) for x, gs in zip(inputs, zip(*each))]


def upstream_of(y: Tensor) -> Tensor:
    return torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(8), dtype=y.dtype)


def assert_close(found: tuple[Tensor | None, ...], expected: list[Tensor]) -> None:
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(e) if f is None else f, e, rtol=1e-12, atol=1e-14)


@EVERY
@pytest.mark.parametrize("retain", [False, True], ids=["once", "retained"])
def test_is_grads_batched(backend: str, name: str, retain: bool) -> None:
    f, inputs = CASES[name]
    y = f(*inputs)
    v = upstream_of(y)
    expected = by_loop(f(*inputs), inputs, v)
    for _ in range(1 + retain):
        found = torch.autograd.grad(y, inputs, v, is_grads_batched=True, retain_graph=retain, allow_unused=True)
        assert_close(found, expected)


@EVERY
def test_vmap_over_grad(backend: str, name: str) -> None:
    f, inputs = CASES[name]
    y = f(*inputs)
    v = upstream_of(y)
    expected = by_loop(y, inputs, v)

    def gradients(v: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(y, inputs, v, retain_graph=True, allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found))

    assert_close(torch.vmap(gradients)(v), expected)


@EVERY
def test_vectorized_jacobian(backend: str, name: str) -> None:
    f, inputs = CASES[name]
    found = torch.autograd.functional.jacobian(f, inputs, vectorize=True)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(f, inputs), rtol=1e-12, atol=1e-14)


@EVERY
def test_vectorized_hessian(backend: str, name: str) -> None:
    f, inputs = CASES[name]

    def total(*given: Tensor) -> Tensor:
        return f(*given).square().sum()

    found = torch.autograd.functional.hessian(total, inputs, vectorize=True)
    torch.testing.assert_close(found, torch.autograd.functional.hessian(total, inputs), rtol=1e-10, atol=1e-10)


@EVERY
def test_gradcheck_of_batches(backend: str, name: str) -> None:
    f, inputs = CASES[name]
    assert torch.autograd.gradcheck(f, inputs, check_batched_grad=True, atol=1e-4)


@pytest.mark.parametrize("which", ["gradient", "both"])
def test_batches_within_batches(backend: str, which: str) -> None:
    f, inputs = CASES["kl"]
    y = f(*inputs)

    def gradients(v: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs, v, retain_graph=True)

    v = torch.randn(2, 3, dtype=torch.float64)
    once = torch.vmap(gradients)(v.flatten())
    for a, b in zip(torch.vmap(torch.vmap(gradients))(v), once):
        torch.testing.assert_close(a, b.unflatten(0, (2, 3)))


def test_gradients_that_were_kept_are_not_written_over(extension: object) -> None:
    """float32, where a loss keeps its gradients and backward multiplies them in place."""
    recon, x = torch.randn(3, 5, requires_grad=True), torch.rand(3, 5)
    y = vaefast.reconstruction_loss(recon, x)
    v = torch.tensor([1.0, 2.0, -3.0])
    (found,) = torch.autograd.grad(y, recon, v, is_grads_batched=True)
    (one,) = torch.autograd.grad(vaefast.reconstruction_loss(recon, x), recon)
    torch.testing.assert_close(found, one * v.view(3, 1, 1))
