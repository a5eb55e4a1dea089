"""Mixed precision in training loops: autocast, GradScaler, half-precision modules.

The policy under autocast, on CPU and CUDA, float16 and bfloat16: nothing is cast on the way in. Arithmetic is in
float32 whatever the inputs' dtype (float64 where an input is); z and "none" losses come in the dtype of their inputs,
reduced losses in float32, gradients in the dtype of what they belong to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import generator
from loops import LATENTS, PIXELS, VAE, Inputs, data, everything, inputs
from torch import Tensor
from torch.nn import functional as F

import vaefast

HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
B = 16


def eps_for(device: str) -> Tensor:
    return torch.randn(B, LATENTS, generator=generator(7)).to(device)


def textbook(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / B


def bce(t: Inputs, d: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(t.logits, d.x.to(t.logits.dtype), reduction="sum") / B


# what the package computes, and what PyTorch's users write, of half-precision activations
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "kl": (lambda t, d: vaefast.gaussian_kl(t.mu, t.raw), lambda t, d: textbook(t.mu, t.raw)),
    "kl next to the prior": (
        lambda t, d: vaefast.gaussian_kl(t.mu * 0.01, t.raw * 0.01),
        lambda t, d: textbook(t.mu * 0.01, t.raw * 0.01),
    ),
    "packed kl": (
        lambda t, d: vaefast.DiagonalGaussian(t.moments).kl(reduction="batchmean"),
        lambda t, d: textbook(*t.moments.chunk(2, 1)),
    ),
    "many kls": (
        lambda t, d: vaefast.multi_tensor_gaussian_kl([t.mu, t.raw], [t.raw, t.mu]),
        lambda t, d: textbook(t.mu, t.raw) + textbook(t.raw, t.mu),
    ),
    "bernoulli": (lambda t, d: vaefast.reconstruction_loss(t.logits, d.x), bce),
    "gaussian": (
        lambda t, d: vaefast.reconstruction_loss((t.mean, t.logvar), d.x, likelihood="gaussian"),
        lambda t, d: F.gaussian_nll_loss(t.mean, d.x, t.logvar.exp(), full=True, eps=0, reduction="sum") / B,
    ),
    "categorical": (
        lambda t, d: vaefast.reconstruction_loss(t.classes, d.labels, likelihood="categorical", reduction="mean"),
        lambda t, d: F.cross_entropy(t.classes, d.labels),
    ),
    "elbo": (
        lambda t, d: vaefast.elbo_loss(t.logits, d.x, t.mu, t.raw, beta=0.5),
        lambda t, d: bce(t, d) + 0.5 * textbook(t.mu, t.raw),
    ),
}


def error(actual: Tensor, exact: Tensor) -> float:
    return (actual.detach().double() - exact.detach()).abs().max().item()


@HALVES
@pytest.mark.parametrize("name", list(CASES))
def test_autocast_is_at_least_as_accurate_as_pytorchs_own_policy(
    backend: str, device: str, half: torch.dtype, name: str
) -> None:
    """Loss and gradients of the halves that a network puts out under autocast, against float64."""
    d, found = data(B, device=device), []
    at = inputs(B, device=device).to(half)
    wide = at.to(torch.float64).leaves()
    for f in CASES[name]:
        t = at.leaves()
        with torch.autocast(device, half):
            loss = f(t, d)
        found.append([loss, *torch.autograd.grad(loss.float() * 8, t, allow_unused=True)])
    exact_loss = CASES[name][1](wide, d._replace(x=d.x.double()))
    exact = [exact_loss, *torch.autograd.grad(exact_loss * 8, wide, allow_unused=True)]
    assert found[0][0].dtype == torch.float32
    for what, ours, theirs, e in zip(("loss", *Inputs._fields), *found, exact):
        if e is None:
            assert ours is None
            continue
        # what a result in this dtype may be off for its own rounding, and a kept gradient for that of the scale
        roundings = 0.5 if what == "loss" else 1.01
        slack = roundings * torch.finfo(ours.dtype).eps * e.abs().max().item()
        tiny = 0.0 if half == torch.bfloat16 or what == "loss" else 6e-8  # float16's subnormals
        assert error(ours, e) <= error(theirs, e) + slack + tiny, what
        if what != "loss":
            assert ours.dtype == half


@HALVES
def test_autocast_samples_are_what_the_next_layer_would_get(backend: str, device: str, half: torch.dtype) -> None:
    """z is rounded once; in PyTorch's policy it is rounded by each operator, or by the next layer's cast."""
    at, eps = inputs(B, device=device).to(half), eps_for(device)
    exact = at.mu.double() + torch.exp(0.5 * at.raw.double()) * eps.double()
    with torch.autocast(device, half):
        z, _ = vaefast.sample_with_kl(at.mu, at.raw, eps=eps)
        theirs = (at.mu + torch.exp(0.5 * at.raw) * eps).to(half)
    assert z.dtype == half
    assert torch.equal(z, vaefast.reparameterize(at.mu, at.raw, eps=eps))
    assert error(z, exact) <= error(theirs, exact) + 1e-6 * exact.abs().max().item()
    # the nearest half, but where float32 arithmetic ended at the middle of two
    assert (z != exact.to(half)).double().mean() < 0.02


@HALVES
def test_autocast_changes_no_precision(backend: str, device: str, half: torch.dtype) -> None:
    """Float32 and float64 inputs give under autocast, bit for bit, what they give outside: nothing is cast down."""
    for dtype in (torch.float32, torch.float64):
        t, d = inputs(B, device=device, dtype=dtype), data(B, device=device)
        d = d._replace(x=d.x.to(dtype))
        found = []
        for enabled in (False, True):
            torch.manual_seed(1)
            with torch.autocast(device, half, enabled=enabled):
                loss, samples = everything(t, d)
            grads = torch.autograd.grad(loss, t)
            assert loss.dtype == dtype and all(v.dtype == dtype for v in (*samples, *grads))
            found.append([loss, *samples, *grads])
        assert all(torch.equal(a, b) for a, b in zip(*found))


@HALVES
def test_what_comes_in_which_dtype(backend: str, device: str, half: torch.dtype) -> None:
    """The documented policy, row by row, as a model under autocast meets it: half activations, float32 data."""
    t, d = inputs(B, device=device).to(half).leaves(), data(B, device=device)
    with torch.autocast(device, half):
        z, kl = vaefast.sample_with_kl(t.mu, t.raw)
        packed, packed_kl = vaefast.DiagonalGaussian(t.moments).sample_with_kl()
        (many, *_), many_kl = vaefast.multi_tensor_sample_with_kl([t.mu], [t.raw])
        elementwise = vaefast.gaussian_kl(t.mu, t.raw, reduction="none")
        mixed = vaefast.reconstruction_loss(t.logits, d.x, reduction="none")
        terms = vaefast.elbo_terms(t.logits, d.x, t.mu, t.raw)
        module = vaefast.ELBOLoss(beta=torch.tensor(0.5, device=device))(t.logits, d.x, t.mu, t.raw)
    assert {v.dtype for v in (z, packed, many, elementwise)} == {half}
    assert {v.dtype for v in (kl, packed_kl, many_kl, mixed, module, *terms)} == {torch.float32}
    grads = torch.autograd.grad(terms.loss + kl + packed_kl.sum() + z.float().sum(), t, allow_unused=True)
    assert {g.dtype for g in grads if g is not None} == {half}


# -- training


def batches(device: str, count: int = 12) -> Tensor:
    """Points near a plane, which a small VAE learns quickly."""
    g = generator(0)
    plane = torch.randn(2, PIXELS, generator=g)
    return torch.sigmoid(torch.randn(count, 64, 2, generator=g) @ plane).to(device)


def fit(
    model: torch.nn.Module, device: str, half: torch.dtype | None, scaler: torch.amp.GradScaler, steps: int
) -> list[float]:
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-2), []
    for k in range(steps):
        x = batches(device)[k % 12].to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        with torch.autocast(device, half, enabled=half is not None):
            loss = model(x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


@HALVES
def test_grad_scaler_skips_overflow_steps(backend: str, device: str, half: torch.dtype) -> None:
    """A scale at which gradients overflow: no parameter moves, the scale falls, and training goes on."""
    torch.manual_seed(0)
    model = VAE(vaefast.ELBOLoss("gaussian", beta=0.1, reduction="sum")).to(device)
    before = copy.deepcopy(model.state_dict())
    start = 2.0**40 if half == torch.float16 else 2.0**127
    scaler = torch.amp.GradScaler(device, init_scale=start, backoff_factor=2.0**-4, growth_interval=10_000)
    fit(model, device, half, scaler, 1)
    assert scaler.get_scale() == start / 16, "the overflow was seen"
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    losses = fit(model, device, half, scaler, 60)
    assert scaler.get_scale() <= start / 16
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert sum(losses[-12:]) < 0.95 * sum(losses[:12])


@HALVES
def test_grad_scaler_gives_float32s_gradients(backend: str, device: str, half: torch.dtype) -> None:
    """Unscaled again, they are those of a float32 step with the same noise, to the halves' roundings."""
    x, found = batches(device)[0], []
    for dtype in (None, half):
        torch.manual_seed(0)
        model = VAE(vaefast.ELBOLoss(beta=0.5)).to(device)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
        torch.manual_seed(1)
        with torch.autocast(device, half, enabled=dtype is not None):
            loss = model(x)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found.append([p.grad for p in model.parameters()])
    for a, e in zip(*found):
        assert a.dtype == torch.float32
        assert error(a, e.double()) <= 8 * torch.finfo(half).eps * e.abs().max().item()


@HALVES
def test_half_precision_modules_without_autocast(backend: str, device: str, half: torch.dtype) -> None:
    """Parameters and activations in half, the criterion too: gradients are those of the same numbers in float64."""
    torch.manual_seed(0)
    model = VAE(vaefast.ELBOLoss("gaussian", beta=torch.tensor(0.1))).to(device, half)
    x = batches(device)[0].to(half)
    mu, logvar = model.encoder(x).chunk(2, 1)
    z, kl = vaefast.sample_with_kl(mu, logvar)
    recon = model.decoder(z)
    nll = vaefast.reconstruction_loss(recon, x, likelihood="gaussian")
    loss = nll + 0.1 * kl
    assert loss.dtype == torch.float32 and z.dtype == half
    wide_mu, wide_logvar, wide_recon = (t.detach().double().requires_grad_() for t in (mu, logvar, recon))
    exact = vaefast.reference.elbo_loss(
        wide_recon, x.double(), wide_mu, wide_logvar, likelihood="gaussian", beta=0.1
    )  # fmt: skip
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    (of_recon,) = torch.autograd.grad(loss, recon, retain_graph=True)
    (exact_of_recon,) = torch.autograd.grad(exact, wide_recon)
    assert error(of_recon, exact_of_recon) <= torch.finfo(half).eps * exact_of_recon.abs().max().item()
    loss.backward()
    assert all(p.grad.dtype == half and p.grad.isfinite().all() for p in model.parameters())
    if half == torch.bfloat16:  # Adam's epsilon is 0 in float16
        losses = fit(model, device, None, torch.amp.GradScaler(device, enabled=False), 60)
        assert sum(losses[-12:]) < 0.95 * sum(losses[:12])
