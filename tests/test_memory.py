"""What is kept and allocated: 16 bytes beside the inputs for a sample, one gradient for a loss, no copies of views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from inputs import LIKELIHOOD_CASES, PRIORS, posterior, training
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import vaefast
from vaefast.reference import PARAMETERIZATIONS

pytestmark = pytest.mark.usefixtures("extension")


def kept_bytes(f: Callable[[], Any], inputs: Sequence[Tensor]) -> int:
    """Bytes that the graph of f() keeps alive beside the storage of its inputs."""
    known = {t.untyped_storage().data_ptr() for t in inputs}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with vaefast.use_backend("native"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = f()
    assert out is not None
    return sum(kept.values())


class Work:
    """The ATen operators that f() ran and the bytes that it allocated, those inside the kernels included."""

    def __init__(self, f: Callable[[], Any]) -> None:
        with vaefast.use_backend("native"):
            f()
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
                self.result = f()
        self.names = {e.name for e in p.events()}
        self.allocated = sum(max(0, e.self_cpu_memory_usage) for e in p.events())

    def copies(self) -> set[str]:
        return self.names & {"aten::clone", "aten::contiguous", "aten::copy_", "aten::_to_copy", "aten::cat"}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("parameterization", list(PARAMETERIZATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sample_keeps_16_bytes(parameterization: str, prior: str, dtype: torch.dtype) -> None:
    p = posterior((64, 1000), parameterization, prior, dtype).leaves()
    assert kept_bytes(lambda: vaefast.sample_with_kl(*p.args(), parameterization=parameterization), p.tensors()) == 16
    mu, raw = p.mu, p.raw
    assert kept_bytes(lambda: vaefast.reparameterize(mu, raw, parameterization=parameterization), [mu, raw]) == 16
    several = {"parameterization": parameterization, "num_samples": 7}
    assert kept_bytes(lambda: vaefast.reparameterize(mu, raw, **several), [mu, raw]) == 16


def test_kl_keeps_nothing() -> None:
    p = posterior((64, 1000), prior="full").leaves()
    for balance in (None, 0.8):
        assert kept_bytes(lambda: vaefast.gaussian_kl(*p.args(), balance=balance), p.tensors()) == 0  # noqa: B023


def test_given_noise_is_kept_as_it_is() -> None:
    p = posterior((64, 1000)).leaves()
    eps = torch.randn(64, 1000)
    assert kept_bytes(lambda: vaefast.sample_with_kl(p.mu, p.raw, eps=eps), [p.mu, p.raw, eps]) == 0


@pytest.mark.parametrize(("likelihood", "count"), LIKELIHOOD_CASES)
@pytest.mark.parametrize("reduction", ["none", "per_sample", "batchmean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reconstruction_keeps_its_gradients(likelihood: str, count: int, reduction: str, dtype: torch.dtype) -> None:
    """One gradient a parameter; none at all where backward recomputes: 'none' and float16."""
    data = training(likelihood, count, (16, 500), dtype)
    leaf = data.leaves()
    options: dict[str, Any] = {"likelihood": likelihood, "reduction": reduction}
    kept = kept_bytes(
        lambda: vaefast.reconstruction_loss(leaf.recon, leaf.target, **options), [*leaf.recon, leaf.target]
    )
    one = data.recon[0].numel() * data.recon[0].element_size()
    assert kept <= count * one
    if reduction == "none" or dtype == torch.float16:
        assert kept == 0
    assert kept_bytes(lambda: vaefast.reconstruction_loss(data.recon, data.target, **options), []) == 0


@pytest.mark.parametrize(("latents", "kept"), [(40, 2 * 16 * 40 * 4), (1025, 0)])
def test_elbo_keeps_the_reconstructions_gradient(latents: int, kept: int) -> None:
    """And the KL's where it is small: of 16,384 latents at most."""
    data, p = training("bernoulli", 1, (16, 500)).leaves(), posterior((16, latents)).leaves()
    inputs = [*data.recon, data.target, p.mu, p.raw]
    assert kept_bytes(lambda: vaefast.elbo_loss(data.recon, data.target, p.mu, p.raw), inputs) == 16 * 500 * 4 + kept


CHUNKS: dict[str, Callable[[int, int], Tensor]] = {
    "rows": lambda b, n: torch.randn(b, 2 * n),
    "images": lambda b, n: torch.randn(b, 8, n // 4),
    "channels last": lambda b, n: torch.randn(b, 8, n // 16, 4).contiguous(memory_format=torch.channels_last),
}
SMALL = 4096  # bytes: the seed, the loss, the profiler's own


@pytest.mark.parametrize("layout", list(CHUNKS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_views_are_not_copied(layout: str, dtype: torch.dtype) -> None:
    """An encoder's moments.chunk(2, 1) costs nothing: forward allocates z alone, backward the two gradients alone."""
    b, n = 64, 4096
    moments = CHUNKS[layout](b, n).to(dtype)
    mu, raw = (t.detach().requires_grad_() for t in moments.chunk(2, 1))
    size = mu.numel() * mu.element_size()
    forward = Work(lambda: vaefast.sample_with_kl(mu, raw))
    assert not forward.copies()
    assert size <= forward.allocated <= size + SMALL
    z, kl = forward.result
    assert z.is_contiguous() or z.is_contiguous(memory_format=torch.channels_last)
    upstream = torch.randn_like(z), torch.tensor(2.0)
    backward = Work(lambda: torch.autograd.grad((z, kl), (mu, raw), upstream, retain_graph=True))
    assert not backward.copies()
    assert 2 * size <= backward.allocated <= 2 * size + SMALL


def test_mixed_dtypes_are_not_copied() -> None:
    recon = torch.randn(64, 4096, dtype=torch.bfloat16, requires_grad=True)
    target, weight = torch.rand(64, 4096), torch.rand(64, 1) > 0.5
    work = Work(lambda: vaefast.reconstruction_loss(recon, target, weight=weight))
    assert not work.copies()
    assert work.allocated <= 64 * 4096 * 2 + SMALL


def test_reconstruction_allocates_one_gradient() -> None:
    recon = torch.randn(64, 4096, requires_grad=True)
    target = torch.rand(64, 4096)
    size = 64 * 4096 * 4
    assert Work(lambda: vaefast.reconstruction_loss(recon, target)).allocated <= size + SMALL
    assert Work(lambda: vaefast.reconstruction_loss(recon.detach(), target)).allocated <= SMALL
    for factor in (torch.tensor(1.0), torch.tensor(3.0)):
        step = Work(lambda f=factor: torch.autograd.grad(vaefast.reconstruction_loss(recon, target), recon, f))
        assert not step.copies()
        assert step.allocated <= size + SMALL  # backward hands out what forward wrote, scaled in place


def test_elbo_step_allocates_its_gradients() -> None:
    recon, target = torch.randn(64, 4096, requires_grad=True), torch.rand(64, 4096)
    mu, raw = torch.randn(64, 512).chunk(2, 1)
    leaves = [recon, mu.detach().requires_grad_(), raw.detach().requires_grad_()]
    step = Work(lambda: torch.autograd.grad(vaefast.elbo_loss(leaves[0], target, *leaves[1:]), leaves))
    assert not step.copies()
    assert step.allocated <= sum(t.numel() * 4 for t in leaves) + SMALL


def test_the_graph_frees_what_it_kept() -> None:
    """Two backward passes over a freed graph are refused, as everywhere in PyTorch."""
    data = training("bernoulli", 1).leaves()
    loss = vaefast.reconstruction_loss(data.recon, data.target)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
