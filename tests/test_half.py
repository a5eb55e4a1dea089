"""float16 and bfloat16: at most twice the error of the plain PyTorch expression in that dtype, against float64.

Errors are the largest over a tensor: elementwise, PyTorch's own is 0 wherever its roundings happen to cancel. Where a
result is a single number the same holds, so the slack there is float32's own rounding, in which a reduced loss comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from inputs import (
    LIKELIHOOD_CASES,
    Data,
    generator,
    gradients,
    nll_of,
    posterior,
    std_and_logvar,
    textbook_kl,
    training,
)
from torch import Tensor
from torch.nn import functional as F

import vaefast
from vaefast.reference import PARAMETERIZATIONS

HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
CASES = pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)


def error(actual: Tensor, exact: Tensor) -> float:
    return (actual.detach().double().cpu() - exact.detach().cpu()).abs().max().item()


def assert_not_worse(ours: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """2x the plain error, and one rounding of the result where the plain one has none."""
    rounding = torch.finfo(ours.dtype).eps / 2 * exact.abs().max().item()
    assert error(ours, exact) <= 2 * error(plain, exact) + rounding, what


def compare(
    f: Callable[..., Sequence[Tensor]], plain: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], what: str
) -> list[Tensor]:
    """f against the plain expression in the inputs' dtype, both against the plain one in float64, with gradients."""
    found = []
    for function, dtype in ((f, None), (plain, None), (plain, torch.float64)):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        out = list(function(*leaves))
        found.append([*out, *gradients(out, leaves)])
    for k, (ours, eager, exact) in enumerate(zip(*found)):
        assert_not_worse(ours, eager, exact, f"{what}, output {k}")
    return found[0]


def plain_nll(likelihood: str, x: Tensor, *params: Tensor) -> Tensor:
    """What people write; for a likelihood that has no such line here, the reference's expression."""
    x = x.to(params[0].dtype)
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(params[0], x, reduction="none")
    return nll_of(likelihood, Data(params, x))


@HALVES
@CASES
@pytest.mark.parametrize("reduction", ["none", "per_sample", "batchmean"])
def test_reconstruction(native: str, half: torch.dtype, likelihood: str, count: int, reduction: str) -> None:
    data = training(likelihood, count, (32, 200), half).to(native)

    def ours(*params: Tensor) -> list[Tensor]:
        return [vaefast.reconstruction_loss(params, data.target, likelihood=likelihood, reduction=reduction)]

    def plain(*params: Tensor) -> list[Tensor]:
        nll = plain_nll(likelihood, data.target, *params)
        rows = nll if reduction == "none" else nll.sum(1)
        return [rows.mean() if reduction == "batchmean" else rows]

    value, *grads = compare(ours, plain, data.recon, likelihood)
    assert value.dtype == (half if reduction == "none" else torch.float32)
    assert all(g.dtype == half for g in grads)


@HALVES
@pytest.mark.parametrize("parameterization", list(PARAMETERIZATIONS))
@pytest.mark.parametrize("prior", ["none", "full"])
@pytest.mark.parametrize("reduction", ["none", "per_sample", "batchmean"])
def test_sample_with_kl(native: str, half: torch.dtype, parameterization: str, prior: str, reduction: str) -> None:
    p = posterior((32, 100), parameterization, prior, half, native)
    eps = torch.randn(32, 100, generator=generator(3)).to(native, half)

    def ours(mu: Tensor, raw: Tensor, *prior: Tensor) -> Sequence[Tensor]:
        return vaefast.sample_with_kl(mu, raw, *prior, parameterization=parameterization, reduction=reduction, eps=eps)

    def plain(mu: Tensor, raw: Tensor, *prior: Tensor) -> Sequence[Tensor]:
        activation = PARAMETERIZATIONS[parameterization]
        kl = textbook_kl(mu, activation.logvar(raw), *prior)
        rows = kl if reduction == "none" else kl.sum(1)
        return mu + activation.std(raw) * eps.to(mu.dtype), rows.mean() if reduction == "batchmean" else rows

    z, kl, *grads = compare(ours, plain, p.tensors(), parameterization)
    assert z.dtype == half
    assert kl.dtype == (half if reduction == "none" else torch.float32)
    assert all(g.dtype == half for g in grads)


@HALVES
def test_elbo(native: str, half: torch.dtype) -> None:
    data, p = training("bernoulli", 1, (16, 300), half).to(native), posterior((16, 20), dtype=half, device=native)

    def ours(recon: Tensor, mu: Tensor, raw: Tensor) -> list[Tensor]:
        return [vaefast.elbo_loss(recon, data.target, mu, raw, beta=0.5)]

    def plain(recon: Tensor, mu: Tensor, raw: Tensor) -> list[Tensor]:
        nll = plain_nll("bernoulli", data.target, recon).sum(1)
        return [(nll + 0.5 * textbook_kl(mu, raw).sum(1)).mean()]

    value, *_ = compare(ours, plain, [*data.recon, p.mu, p.raw], "elbo")
    assert value.dtype == torch.float32


@HALVES
@pytest.mark.parametrize("parameterization", list(PARAMETERIZATIONS))
def test_conversions_round_to_nearest(native: str, half: torch.dtype, parameterization: str) -> None:
    """z is the half nearest to the float32 result, over subnormals, overflow and every exponent."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    mu = bits.view(half).to(native)
    raw = posterior((1,), parameterization, device=native).raw.expand_as(mu)
    z = vaefast.reparameterize(mu, raw, parameterization=parameterization, eps=torch.zeros((), device=native))
    assert z.dtype == half
    assert torch.equal(z.isnan(), mu.isnan())
    numbers = ~mu.isnan()
    assert torch.equal(z[numbers], mu[numbers])
    scaled = vaefast.reparameterize(
        torch.zeros_like(mu), torch.zeros_like(mu, dtype=torch.float32), eps=mu.float() * 1.7
    )
    assert torch.equal(scaled[numbers], (mu.float() * 1.7).to(half)[numbers])


@HALVES
@CASES
def test_half_parameters_with_a_float32_target(
    backend: str, device: str, half: torch.dtype, likelihood: str, count: int
) -> None:
    """autocast's normal case: gradients in the parameters' dtype, a float32 loss, the target in its full precision."""
    data = training(likelihood, count, (8, 33))
    recon = tuple(p.to(device, half).requires_grad_() for p in data.recon)
    target = data.target.to(device)
    value = vaefast.reconstruction_loss(recon, target, likelihood=likelihood)
    assert value.dtype == torch.float32
    assert vaefast.reconstruction_loss(recon, target, likelihood=likelihood, reduction="none").dtype == torch.float32
    wide = Data(tuple(p.detach().double() for p in recon), target.double()).leaves()
    exact = nll_of(likelihood, wide).sum(1).mean()
    assert value.item() == pytest.approx(exact.item(), rel=2e-6)
    for actual, wanted in zip(gradients(value, recon), gradients(exact, wide.recon)):
        assert actual.dtype == half
        # the kept gradient is rounded once, and once more when the incoming one has been multiplied in
        assert error(actual, wanted) <= 1.01 * torch.finfo(half).eps * wanted.abs().max().item()


@pytest.mark.parametrize("mu_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("raw_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("prior_dtype", [None, torch.bfloat16, torch.float64], ids=str)
def test_mixed_posteriors(backend: str, device: str, mu_dtype: Any, raw_dtype: Any, prior_dtype: Any) -> None:
    """z has mu's dtype, each gradient its input's; float64 anywhere makes the loss float64."""
    p = posterior((5, 9), prior="none" if prior_dtype is None else "full", device=device)
    dtypes = [mu_dtype, raw_dtype, prior_dtype, prior_dtype]
    leaves = [t.to(d).detach().requires_grad_() for t, d in zip(p.tensors(), dtypes)]
    z, kl = vaefast.sample_with_kl(*leaves, eps=torch.full((), 0.5, device=device))
    wide = torch.float64 in dtypes
    assert z.dtype == mu_dtype
    assert kl.dtype == (torch.float64 if wide else torch.float32)
    std, logvar = std_and_logvar("logvar", leaves[1].detach())
    exact = textbook_kl(leaves[0].detach().double(), logvar, *(t.detach().double() for t in leaves[2:])).sum(1).mean()
    assert kl.item() == pytest.approx(exact.item(), rel=1e-12 if wide else 1e-6)
    exact_z = leaves[0].detach().double() + 0.5 * std
    assert error(z, exact_z) <= 2 * torch.finfo(mu_dtype).eps * exact_z.abs().max().item() + (0 if wide else 1e-6)
    for leaf, gradient in zip(leaves, gradients([z, kl], leaves)):
        assert gradient.dtype == leaf.dtype
        assert gradient.isfinite().all()
    none = vaefast.gaussian_kl(*leaves, reduction="none")
    promoted = mu_dtype
    for d in dtypes[1 : len(leaves)]:
        promoted = torch.promote_types(promoted, d)
    assert none.dtype == promoted


@CASES
@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_float16_gradient_of_a_mean_survives_a_loss_scaler(
    native: str, likelihood: str, count: int, reduction: str
) -> None:
    """Unscaled, an element's gradient is below float16's least number; times 2^16 it is an ordinary one."""
    shape = (4096, 16) if reduction == "mean" else (65536, 1)
    data = training(likelihood, count, shape, torch.float16).to(native)
    leaf, wide = data.leaves(), data.to(torch.float64).leaves()
    scale = 2.0**16
    value = vaefast.reconstruction_loss(leaf.recon, leaf.target, likelihood=likelihood, reduction=reduction)
    (value * scale).backward()
    exact = nll_of(likelihood, wide)
    exact = torch.autograd.grad(scale * (exact.mean() if reduction == "mean" else exact.sum(1).mean()), wide.recon)
    for p, e in zip(leaf.recon, exact):
        assert ((p.grad.double() - e).abs() <= 1e-3 * e.abs() + 2e-6).all()
    elbo_leaf = data.leaves()
    p = posterior((shape[0], 2), device=native)
    loss = vaefast.elbo_loss(elbo_leaf.recon, data.target, p.mu, p.raw, likelihood=likelihood, reduction="batchmean")
    (loss * scale).backward()
    factor = 1 if reduction == "batchmean" else shape[1]
    for a, e in zip(elbo_leaf.recon, exact):
        assert ((a.grad.double() / factor - e).abs() <= 1e-3 * e.abs() + 2e-6).all()


@HALVES
def test_long_half_sums_do_not_saturate(native: str, half: torch.dtype) -> None:
    """Summed in the dtype, bfloat16 would stop at 256 and float16 overflow at 65504."""
    logits = torch.zeros(2, 400_000, dtype=half, device=native)
    rows = vaefast.reconstruction_loss(logits, logits, reduction="per_sample")
    assert rows.tolist() == pytest.approx([400_000 * 0.6931471805599453] * 2, rel=2e-6)
    kl = vaefast.gaussian_kl(torch.ones_like(logits), logits, reduction="sum")
    assert kl.item() == 400_000
