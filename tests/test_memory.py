"""What is kept and allocated: 16 bytes beside the inputs for a sample, one gradient for a loss, no copies of views.
What is resident stays as it is over many calls, what cannot be had leaves all as it was, and tensors may be of more
than 2^31 elements.

VAEFAST_TEST_CALLS=1e6 makes as many calls; VAEFAST_TEST_LARGE=1 draws a sample of 4 GB too.
"""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from inputs import LIKELIHOOD_CASES, PRIORS, draws_around, posterior, training
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import vaefast
from vaefast._philox import normal
from vaefast.reference import PARAMETERIZATIONS

CALLS = int(float(os.environ.get("VAEFAST_TEST_CALLS", "5e3")))
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


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def a_step(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> None:
    z, kl = vaefast.sample_with_kl(mu, logvar)
    loss = vaefast.elbo_loss(recon, target, mu, logvar)
    torch.autograd.grad(loss + kl + z.sum(), (recon, mu, logvar))


def a_list(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> None:
    zs, kl = vaefast.multi_tensor_sample_with_kl([mu, logvar], [logvar, mu])
    torch.autograd.grad(kl + zs[0].sum(), (mu, logvar))


def a_refusal(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> None:
    with pytest.raises(ValueError, match="target"):
        vaefast.elbo_loss(recon, target[:, 1:], mu, logvar)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux tells what is resident")
@pytest.mark.parametrize("call", [a_step, a_list, a_refusal])
def test_what_is_resident_stays(call: Callable[..., None]) -> None:
    """100 bytes left by each call would show, and with as many calls as there may be less."""
    recon, mu, logvar = (torch.randn(4, n, requires_grad=True) for n in (30, 6, 6))
    target = torch.rand(4, 30)
    with vaefast.use_backend("native"):
        for _ in range(1000):
            call(recon, target, mu, logvar)
        before = resident()
        for _ in range(CALLS):
            call(recon, target, mu, logvar)
    grown = resident() - before
    assert grown < 500_000, f"{grown:,} bytes more after {CALLS:,} calls"


def test_out_of_memory_leaves_all_as_it_was() -> None:
    """A sample, a gradient or an elementwise loss of a petabyte is refused by the allocator, as torch's own are."""
    with vaefast.use_backend("native"):
        small = torch.randn(4, 6, requires_grad=True)
        torch.manual_seed(0)
        expected = vaefast.reparameterize(small, small)
        huge = torch.zeros(1).expand(2**18, 2**30)
        trained = torch.zeros(1, requires_grad=True).expand(2**18, 2**30)
        for call in (
            lambda: vaefast.reparameterize(huge, huge),
            lambda: vaefast.sample_with_kl(huge, huge),
            lambda: vaefast.gaussian_kl(huge, huge, reduction="none"),
            lambda: vaefast.reconstruction_loss(huge, huge, reduction="none"),
            lambda: vaefast.reconstruction_loss(trained, huge, reduction="sum"),
            lambda: vaefast.multi_tensor_sample_with_kl([small, huge], [small, huge]),
        ):
            with pytest.raises(RuntimeError, match=r"can.t allocate memory|not enough memory"):
                call()
        torch.manual_seed(0)
        assert torch.equal(vaefast.reparameterize(small, small), expected)
        loss = vaefast.elbo_loss(small, small.detach().sigmoid(), small, small)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, small))


LARGE = 2**31 + 12_345


def test_sums_over_more_than_2_31_elements() -> None:
    """Of views that are one element each: no memory, and sums that are known."""
    mu, logvar = torch.full((1,), 0.5), torch.full((1,), 0.25)
    one = vaefast.gaussian_kl(mu.double(), logvar.double(), reduction="sum")
    recon, target = torch.full((1,), 0.75), torch.ones(1)
    nll = vaefast.reconstruction_loss(recon.double(), target.double(), reduction="sum")
    with vaefast.use_backend("native"):
        for shape in ((LARGE,), (LARGE // 3, 3)):
            kl = vaefast.gaussian_kl(mu.expand(shape), logvar.expand(shape), reduction="sum")
            torch.testing.assert_close(kl.double(), one * (LARGE // shape[-1] * shape[-1]), rtol=1e-6, atol=0)
        loss = vaefast.reconstruction_loss(recon.expand(LARGE), target.expand(LARGE), reduction="sum")
        torch.testing.assert_close(loss.double(), nll * LARGE, rtol=1e-6, atol=0)


def test_a_sample_of_more_than_2_31_elements() -> None:
    """4 GB of bfloat16, whose last elements' noise is that of their numbers."""
    if not os.environ.get("VAEFAST_TEST_LARGE"):
        pytest.skip("takes 5 GB of memory; VAEFAST_TEST_LARGE=1 where there are as many")
    zero, words = torch.zeros(1, dtype=torch.bfloat16), (5, 7)
    with vaefast.use_backend("native"):
        z = draws_around(words, zero.expand(LARGE))
    first = LARGE // 4 - 1000  # a counter is four elements
    expected = normal(torch.tensor((words[0], words[1] + first)), torch.empty(LARGE - 4 * first), torch.float32)
    torch.testing.assert_close(z[4 * first :].float(), expected.bfloat16().float(), rtol=2**-7, atol=1e-5)
    assert not (z[2**31 - 500 : 2**31 + 500] == 0).all()
