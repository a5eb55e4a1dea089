"""Bitwise the same results for 1, 2 and 4 threads and from run to run, above the sizes where threads share the work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inputs import LIKELIHOOD_CASES, generator, training
from torch import Tensor

import vaefast

SetThreads = Callable[[int], None]


def everything(shape: tuple[int, int], reduction: str, dtype: torch.dtype, layout: str) -> list[Tensor]:
    """Losses, samples and gradients of every function, from one seed."""
    torch.manual_seed(0)
    g = generator(0)
    mu, raw, pm = (torch.randn(*shape, generator=g).to(dtype) for _ in range(3))
    if layout == "strided":
        mu, raw = (t.t().contiguous().t() for t in (mu, raw))
    plv = torch.randn(shape[1], generator=g).to(dtype)
    leaves = [t.requires_grad_() for t in (mu, raw, pm, plv)]
    z, kl = vaefast.sample_with_kl(*leaves, reduction=reduction)
    upstream = [torch.randn(t.shape, generator=g).to(t.dtype) for t in (z, kl)]
    found = [z, kl, *torch.autograd.grad((z, kl), leaves, upstream)]
    for name, count in LIKELIHOOD_CASES:
        data = training(name, count, shape, dtype, [None, *[shape[1:]] * (count - 1)]).leaves()
        recon, x = data.recon, data.target
        weight = torch.rand(*shape, generator=g) > 0.1
        nll = vaefast.reconstruction_loss(recon, x, likelihood=name, reduction=reduction, weight=weight)
        found += [nll, *torch.autograd.grad(nll.sum(), recon)]
        if reduction in ("per_sample", "batchmean", "sum"):
            loss, *_ = terms = vaefast.elbo_terms(recon, x, *leaves, likelihood=name, reduction=reduction, beta=0.3)
            found += [*terms, *torch.autograd.grad(loss.sum(), [*recon, *leaves])]
    return found


@pytest.mark.parametrize("shape", [(64, 5000), (3, 100_003), (20_000, 7)], ids=str)
@pytest.mark.parametrize(
    ("reduction", "layout"),
    [("none", "contiguous"), ("per_sample", "contiguous"), ("batchmean", "contiguous"), ("batchmean", "strided")],
)
def test_threads_do_not_change_a_bit(
    extension: object, set_threads: SetThreads, shape: tuple[int, int], reduction: str, layout: str
) -> None:
    with vaefast.use_backend("native"):
        set_threads(1)
        alone = everything(shape, reduction, torch.float32, layout)
        for threads in (2, 4):
            set_threads(threads)
            for k, (a, b) in enumerate(zip(alone, everything(shape, reduction, torch.float32, layout))):
                assert torch.equal(a, b), f"result {k} differs with {threads} threads"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(extension: object, set_threads: SetThreads, dtype: torch.dtype) -> None:
    with vaefast.use_backend("native"):
        runs = []
        for threads in (1, 4):
            set_threads(threads)
            runs.append(everything((3, 60_001), "batchmean", dtype, "contiguous"))
        assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_run_to_run(native: str) -> None:
    if native == "cpu":
        runs = [everything((64, 5000), "batchmean", torch.float32, "contiguous") for _ in range(4)]
        assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))
        return
    data = training("bernoulli", 1, (64, 5000)).to(native)
    values = [vaefast.reconstruction_loss(data.recon, data.target) for _ in range(20)]
    assert all(torch.equal(values[0], v) for v in values[1:])


def test_threads_do_not_change_the_noise(native: str, set_threads: SetThreads) -> None:
    zero = torch.zeros(3, 100_003, device=native)
    samples = []
    for threads in (1, 2, 3, 4):
        set_threads(threads)
        torch.manual_seed(1)
        samples.append(vaefast.reparameterize(zero, zero))
    assert all(torch.equal(samples[0], s) for s in samples[1:])


def test_sums_are_accurate(native: str) -> None:
    """Blocks in float32 combined in float64: a long float32 sum keeps its digits."""
    x = torch.rand(3, 1_000_003, generator=generator(0))
    kl = vaefast.gaussian_kl(x.to(native), torch.zeros_like(x, device=native), reduction="per_sample")
    exact = 0.5 * (x.double() ** 2).sum(1)
    torch.testing.assert_close(kl.cpu().double(), exact, rtol=2e-7, atol=0)
