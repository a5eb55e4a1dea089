"""Bitwise the same results for 1, 2 and 4 threads and from run to run, above the sizes where threads share the work.
And many Python threads at once, forks, workers, an interrupt."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from inputs import LIKELIHOOD_CASES, generator, training
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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


# ---- Python's own threads, processes and signals

PYTHON_THREADS = 16


def at_once(f: Callable[[int], object]) -> list[object]:
    """f(0), f(1), ... on as many threads, none of which begins before all are there."""
    barrier = threading.Barrier(PYTHON_THREADS)

    def together(k: int) -> object:
        barrier.wait()
        return f(k)

    with ThreadPoolExecutor(PYTHON_THREADS) as pool:
        return list(pool.map(together, range(PYTHON_THREADS)))


def test_python_threads_share_operators_and_inputs(extension: object) -> None:
    """Each trains leaves of its own against one target and one prior, many steps at once; a list's call too."""
    target, prior = torch.rand(8, 300), torch.randn(20)

    def steps(k: int) -> list[Tensor]:
        found = []
        g = generator(k)
        for _ in range(10):
            recon, mu, logvar = (torch.randn(8, n, generator=g).requires_grad_() for n in (300, 20, 20))
            loss = vaefast.elbo_loss(recon, target, mu, logvar, prior, None, free_bits=0.1)
            many = vaefast.multi_tensor_gaussian_kl([mu, logvar], [logvar, mu])
            found += [loss, many, *torch.autograd.grad(loss + many, (recon, mu, logvar))]
        return found

    with vaefast.use_backend("native"):
        alone = [steps(k) for k in range(PYTHON_THREADS)]
        for k, found in enumerate(at_once(steps)):
            assert all(torch.equal(a, b) for a, b in zip(alone[k], found)), k


@pytest.mark.parametrize("shared", ["default", "explicit"])
def test_python_threads_share_a_generator(extension: object, shared: str) -> None:
    """Whoever comes first: together they draw what one thread would, each sample once."""
    zero, calls = torch.zeros(40), 50

    def some(g: torch.Generator | None) -> list[tuple[float, ...]]:
        return [tuple(vaefast.reparameterize(zero, zero, generator=g).tolist()) for _ in range(calls)]

    def fresh() -> torch.Generator | None:
        torch.manual_seed(3)
        return None if shared == "default" else generator(3)

    with vaefast.use_backend("native"):
        g = fresh()
        alone = [sample for _ in range(PYTHON_THREADS) for sample in some(g)]
        g = fresh()
        found = [sample for each in at_once(lambda k: some(g)) for sample in each]  # type: ignore[attr-defined]
    assert sorted(found) == sorted(alone)
    assert len(set(found)) == PYTHON_THREADS * calls


def test_threads_may_change_between_calls(extension: object, set_threads: SetThreads) -> None:
    """And between a forward and its backward."""
    found = []
    with vaefast.use_backend("native"):
        for forward, backward in ((1, 1), (1, 3), (3, 1), (4, 2), (2, 4)):
            g = generator(0)
            mu, logvar = (torch.randn(64, 2000, generator=g).requires_grad_() for _ in range(2))
            torch.manual_seed(0)
            set_threads(forward)
            z, kl = vaefast.sample_with_kl(mu, logvar)
            set_threads(backward)
            found.append([z, kl, *torch.autograd.grad(z.sum() + kl, (mu, logvar))])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


class Drawn(Dataset[Tensor]):
    """Samples that are drawn where they are loaded, and a loss of more elements than one thread's share."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, k: int) -> Tensor:
        with vaefast.use_backend("native"):
            zero = torch.zeros(8, 8000)
            z = vaefast.reparameterize(zero, zero)
            return torch.stack((z.flatten()[0], z.flatten()[-1], vaefast.gaussian_kl(z, zero)))


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_workers_draw(extension: object, set_threads: SetThreads) -> None:
    """Two workers after a parent whose threads have run: each draws its own, and again the same from one seed."""
    set_threads(2)
    Drawn()[0]

    def epoch() -> Tensor:
        loaded = DataLoader(Drawn(), num_workers=2, multiprocessing_context="fork", generator=generator(1))
        return torch.cat(list(loaded))

    first = epoch()
    assert len(set(first.view(-1, 3)[:, 0].tolist())) == len(Drawn())
    assert torch.equal(first, epoch())


def _in_a_child(results: object) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(5)
    results.put(Drawn()[0].tolist())  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_fork_computes_what_its_parent_does(extension: object, set_threads: SetThreads) -> None:
    set_threads(2)
    torch.manual_seed(5)
    expected = Drawn()[0].tolist()
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_in_a_child, args=(results,))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and results.get() == expected


INTERRUPTED = """
import signal, sys, torch, vaefast

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background processes begin without
zero = torch.zeros(1)
long, expected = zero.expand(600_000_000), vaefast.gaussian_kl(torch.ones(9), torch.zeros(9), reduction="sum")
print("ready", flush=True)
try:
    while True:
        with vaefast.use_backend("native"):
            vaefast.gaussian_kl(long, long, reduction="sum")
except KeyboardInterrupt:
    print("interrupted", flush=True)
assert torch.equal(vaefast.gaussian_kl(torch.ones(9), torch.zeros(9), reduction="sum"), expected)
torch.manual_seed(1)
first = vaefast.reparameterize(zero, zero)
torch.manual_seed(1)
assert torch.equal(first, vaefast.reparameterize(zero, zero))
print("goes on")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_comes_when_the_call_is_done(extension: object) -> None:
    """Ctrl-C in a call of hundreds of milliseconds: KeyboardInterrupt, the block left, and all as it was."""
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        threading.Timer(0.3, program.send_signal, [signal.SIGINT]).start()
        assert program.stdout.read() == "interrupted\ngoes on\n"
    assert program.returncode == 0
