"""What only a GPU has: graphs, streams, devices, launches, its memory and its generator's state.

Tests with the ``native`` fixture run their logic on the CPU too, a stand-in in the place of the GPU feature, so that
a mistake in the test shows without a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from inputs import (
    LIKELIHOOD_CASES,
    REDUCTIONS,
    assert_checkpointing_replays,
    assert_within,
    draws,
    generator,
    posterior,
    training,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import vaefast
from benchmarks.providers import captured
from vaefast.reference import PARAMETERIZATIONS

NO_GPU = "no CUDA device; run `make gpu` on a machine with one"
REPEATS = {"cpu": 2, "cuda": 50}  # of what could go wrong once in a while
Tensors = tuple[Tensor, ...]
Step = Callable[[], Tensors]


@pytest.fixture
def cuda() -> Iterator[str]:
    """The kernels of the GPU, and nothing that an earlier test left in its memory."""
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    assert "cuda" in vaefast.available_backends(), vaefast.show_config()
    gc.collect()
    torch.cuda.empty_cache()
    with vaefast.use_backend("native"):
        yield "cuda"


on_gpu = pytest.mark.cuda


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def latents(device: str, shape: Sequence[int] = (6, 500), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    p = posterior(shape, dtype=dtype, device=device)
    return leaves_of(p.mu, p.raw)


def set_rng_state(device: str, state: Tensor) -> None:
    torch.cuda.set_rng_state(state) if device == "cuda" else torch.set_rng_state(state)


def rng_state(device: str) -> Tensor:
    return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# -- graphs


class Replayed:
    """A step captured as a CUDA graph; on the CPU, the step done again, its results put where the first ones lie."""

    def __init__(self, step: Step, device: str) -> None:
        self.step, self.graph = step, None
        if device == "cuda":
            self.graph, self.results = captured(step)
        else:
            self.results = step()

    def __call__(self) -> Tensors:
        """The results of a replay, which the next one overwrites."""
        if self.graph is not None:
            self.graph.replay()
        else:
            with torch.no_grad():
                for kept, new in zip(self.results, self._again()):
                    kept.copy_(new)
        return tuple(t.detach().clone() for t in self.results)

    @torch.enable_grad()
    def _again(self) -> Tensors:
        return tuple(t.detach() for t in self.step())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("parameterization", list(PARAMETERIZATIONS))
def test_replays_draw_anew_and_backward_knows_the_noise(native: str, parameterization: str, dtype: torch.dtype) -> None:
    """d z / d raw = dz * eps * d std / d raw, with the eps that (z - mu) / std tells, in every replay."""
    p = posterior((6, 500), parameterization, dtype=dtype, device=native).leaves()
    dz = torch.randn(6, 500, generator=generator(3)).to(native, dtype)

    def step() -> Tensors:
        z = vaefast.reparameterize(p.mu, p.raw, parameterization=parameterization)
        return (z, *torch.autograd.grad(z, (p.mu, p.raw), dz))

    replay = Replayed(step, native)
    raw = p.raw.detach().double().requires_grad_()
    std = PARAMETERIZATIONS[parameterization].std(raw)
    (dstd,) = torch.autograd.grad(std.sum(), raw)
    seen: list[Tensor] = []
    for _ in range(4):
        z, dmu, draw = (t.double() for t in replay())
        eps = (z - p.mu.detach().double()) / std.detach()
        assert abs(eps.mean()) < 6 / 3000**0.5
        assert abs(eps.var() - 1) < 6 * (2 / 3000) ** 0.5
        assert torch.equal(dmu, dz.double())
        # the eps above has z's rounding in it, times z over std
        slack = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]
        torch.testing.assert_close(draw, dz.double() * eps * dstd, rtol=slack, atol=slack)
        assert not any(torch.equal(z, other) for other in seen)
        seen.append(z)


def whole_step(
    mu: Tensor, raw: Tensor, recon: Tensor, x: Tensor, likelihood: str = "bernoulli", reduction: str = "batchmean"
) -> Tensors:
    """Sample, loss, backward: z, the loss's terms, the gradients of mu, raw, recon."""
    z, _ = vaefast.sample_with_kl(mu, raw)
    terms = vaefast.elbo_terms(recon, x, mu, raw, likelihood=likelihood, beta=0.5, reduction=reduction)
    loss = terms.loss.sum() * 1.5 + z.square().sum()
    return (z, *terms, *torch.autograd.grad(loss, (mu, raw, recon)))


def exact_step(z: Tensor, mu: Tensor, raw: Tensor, recon: Tensor, x: Tensor, **options: str) -> Tensors:
    """The same by the reference in float64, given the sample."""
    mu, raw, recon = (t.detach().double().cpu().requires_grad_() for t in (mu, raw, recon))
    eps = ((z.double().cpu() - mu) / torch.exp(raw / 2)).detach()
    again = vaefast.reference.reparameterize(mu, raw, eps=eps)
    terms = vaefast.reference.elbo_terms(recon, x.double().cpu(), mu, raw, beta=0.5, **options)
    loss = terms.loss.sum() * 1.5 + again.square().sum()
    return (again, *terms, *torch.autograd.grad(loss, (mu, raw, recon)))


def step_inputs(device: str, batch: int = 6, seed: int = 0) -> list[Tensor]:
    p, d = posterior((batch, 500), seed=seed), training("bernoulli", 1, (batch, 9000), seed=seed)
    return [*leaves_of(*(t.to(device) for t in (p.mu, p.raw, *d.recon))), d.target.to(device)]


@pytest.mark.parametrize("reduction", ["batchmean", "per_sample"])
def test_graphs_give_eager_values(native: str, reduction: str) -> None:
    """Also for data that was put in place after the capture."""
    inputs = step_inputs(native)
    replay = Replayed(lambda: whole_step(*inputs, reduction=reduction), native)
    for seed in range(3):
        with torch.no_grad():
            for t, new in zip(inputs, step_inputs(native, seed=seed)):
                t.copy_(new)
        found = replay()
        for k, (a, e) in enumerate(zip(found, exact_step(found[0], *inputs, reduction=reduction))):
            assert_within(a, e, 2e-5, f"result {k}")


def test_graphs_draw_what_eager_draws(native: str) -> None:
    """From one state of the generator, and they leave it in one state."""
    mu, raw = latents(native)

    def step() -> Tensors:
        return vaefast.sample_with_kl(mu, raw)

    replay = Replayed(step, native)
    found = {}
    for name, run in (("eager", step), ("graph", replay)):
        torch.manual_seed(5)
        found[name] = [run()[0].detach().clone() for _ in range(3)], rng_state(native)
    assert all(torch.equal(a, b) for a, b in zip(found["eager"][0], found["graph"][0]))
    assert torch.equal(found["eager"][1], found["graph"][1])


def test_two_draws_in_a_graph_differ(native: str) -> None:
    mu, raw = latents(native)
    replay = Replayed(lambda: (vaefast.reparameterize(mu, raw), vaefast.reparameterize(mu, raw)), native)
    first, second = replay()
    third, fourth = replay()
    samples = [first, second, third, fourth]
    assert all(not torch.equal(a, b) for k, a in enumerate(samples) for b in samples[:k])


def test_a_graph_runs_beside_eager_reductions(native: str) -> None:
    """The counters of blocks that have finished are a graph's own."""
    mu, raw = latents(native, (64, 5000))
    replay = Replayed(lambda: (vaefast.gaussian_kl(mu, raw), vaefast.gaussian_kl(raw, mu, reduction="sum")), native)
    kl, other = vaefast.gaussian_kl(mu, raw), vaefast.gaussian_kl(raw, mu, reduction="sum")
    side = torch.cuda.Stream() if native == "cuda" else None
    synchronize(native)
    for _ in range(REPEATS[native]):
        with torch.cuda.stream(side) if side else contextlib.nullcontext():
            found = replay()
        eager = [vaefast.gaussian_kl(mu, raw, reduction="batchmean") for _ in range(5)]
        synchronize(native)
        assert torch.equal(found[0], kl) and torch.equal(found[1], other)
        assert all(torch.equal(e, kl) for e in eager)


def test_a_captured_backward_can_be_replayed_twice(native: str) -> None:
    """A forward graph and a backward graph: a backward alone, again, gives the same gradients."""
    recon, x = (t.to(native) for t in (*training("bernoulli", 1, (4, 3000)).recon, torch.rand(4, 3000)))
    recon.requires_grad_()
    upstream = torch.full((), 1.5, device=native)
    loss = None

    def forward() -> Tensors:
        nonlocal loss
        loss = vaefast.reconstruction_loss(recon, x)
        return (loss,)

    def backward() -> Tensors:
        assert loss is not None
        return torch.autograd.grad(loss, recon, upstream, retain_graph=native == "cpu")

    if native == "cuda":
        pool = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            forward()
            backward()
        torch.cuda.current_stream().wait_stream(side)
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[0], pool=pool):
            forward()
        with torch.cuda.graph(graphs[1], pool=pool):
            (gradient,) = backward()
        graphs[0].replay()
        graphs[1].replay()
        once = gradient.clone()
        graphs[1].replay()
        twice = gradient
    else:
        forward()
        (once,), (twice,) = backward(), backward()
    exact = (torch.sigmoid(recon.detach().double()) - x.double()) * 1.5 / 4
    assert_within(once, exact, 2e-6)
    assert torch.equal(once, twice)


@on_gpu
def test_graphed_callables(cuda: str) -> None:
    """torch.cuda.make_graphed_callables: a forward graph and a backward graph, noise kept from one to the other."""
    mu, raw, recon, x = step_inputs(cuda)

    def f(mu: Tensor, raw: Tensor, recon: Tensor, x: Tensor) -> Tensors:
        z, kl = vaefast.sample_with_kl(mu, raw)
        return z, kl + vaefast.reconstruction_loss(recon, x)

    graphed = torch.cuda.make_graphed_callables(f, (mu, raw, recon, x))
    seen: list[Tensor] = []
    for seed in range(3):
        *leaves, x = step_inputs(cuda, seed=seed)
        z, loss = graphed(*leaves, x)
        z, value = z.clone(), loss.clone()
        gradients = torch.autograd.grad(3 * loss + z.square().sum(), leaves)
        mu, raw, recon = (t.detach().double().cpu().requires_grad_() for t in leaves)
        eps = ((z.detach().double().cpu() - mu) / torch.exp(raw / 2)).detach()
        exact_z, kl = vaefast.reference.sample_with_kl(mu, raw, eps=eps)
        exact = kl + vaefast.reference.reconstruction_loss(recon, x.double().cpu())
        assert_within(value, exact, 2e-5)
        for a, e in zip(gradients, torch.autograd.grad(3 * exact + exact_z.square().sum(), (mu, raw, recon))):
            assert_within(a, e, 5e-5)
        assert not any(torch.equal(z, other) for other in seen)
        seen.append(z)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(native: str, mode: str) -> None:
    """By Inductor, and in its own CUDA graphs: values, gradients, and noise that is new in every call."""
    how: dict[str, Any] = {"backend": "aot_eager"}
    if native == "cuda":
        pytest.importorskip("triton", reason="Inductor needs triton for a GPU")
        how = {"mode": mode}
    torch._dynamo.reset()
    f = torch.compile(lambda *t: whole_outputs(*t), fullgraph=True, **how)
    seen: list[Tensor] = []
    for call in range(4):
        *leaves, x = step_inputs(native)
        torch.compiler.cudagraph_mark_step_begin()
        z, loss = f(*leaves, x)
        gradients = [g.clone() for g in torch.autograd.grad(loss + z.square().sum(), leaves)]
        mu, raw, recon = (t.detach().double().cpu().requires_grad_() for t in leaves)
        z, loss = z.detach().clone(), loss.detach().clone()
        eps = ((z.double().cpu() - mu) / torch.exp(raw / 2)).detach()
        again = vaefast.reference.reparameterize(mu, raw, eps=eps)
        exact = vaefast.reference.elbo_loss(recon, x.double().cpu(), mu, raw)
        assert_within(loss, exact, 2e-5)
        for a, e in zip(gradients, torch.autograd.grad(exact + again.square().sum(), (mu, raw, recon))):
            assert_within(a, e, 5e-5)
        assert not any(torch.equal(z, other) for other in seen), f"call {call} drew the noise of another"
        seen.append(z)
    torch._dynamo.reset()


def whole_outputs(mu: Tensor, raw: Tensor, recon: Tensor, x: Tensor) -> Tensors:
    return vaefast.reparameterize(mu, raw), vaefast.elbo_loss(recon, x, mu, raw)


# -- streams and devices


@contextlib.contextmanager
def on_a_side_stream(device: str) -> Iterator[None]:
    """A stream with work ahead of what is issued on it, so that what ran on another stream would be too early."""
    if device == "cpu":
        yield
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        yield
    torch.cuda.current_stream().wait_stream(side)


def test_work_is_issued_on_the_current_stream(native: str) -> None:
    """Inputs that are written late on a side stream are read as written."""
    inputs, late = step_inputs(native, seed=0), step_inputs(native, seed=1)
    whole_step(*inputs)
    synchronize(native)
    with on_a_side_stream(native):
        with torch.no_grad():
            for t, new in zip(inputs, late):
                t.copy_(new)
        found = whole_step(*inputs)
    for k, (a, e) in enumerate(zip(found, exact_step(found[0], *late))):
        assert_within(a, e, 2e-5, f"result {k}")


def test_backward_follows_forward_onto_its_stream(native: str) -> None:
    """Called from another stream than forward's, as autograd promises."""
    *leaves, x = step_inputs(native)
    with on_a_side_stream(native):
        loss = vaefast.reconstruction_loss(leaves[2], x, reduction="per_sample")
        z, kl = vaefast.sample_with_kl(leaves[0], leaves[1])
    dmu, draw, drecon = torch.autograd.grad(loss.sum() * 1.5 + z.square().sum() + 2 * kl, leaves)
    mu, raw, recon = (t.detach().double().cpu().requires_grad_() for t in leaves)
    eps = ((z.detach().double().cpu() - mu) / torch.exp(raw / 2)).detach()
    exact_z, exact_kl = vaefast.reference.sample_with_kl(mu, raw, eps=eps)
    nll = vaefast.reference.reconstruction_loss(recon, x.double().cpu(), reduction="sum")
    exact = torch.autograd.grad(nll * 1.5 + exact_z.square().sum() + 2 * exact_kl, (mu, raw, recon))
    for a, e in zip((dmu, draw, drecon), exact):
        assert_within(a, e, 5e-5)


@pytest.mark.parametrize("rows", [1, 3, 700])
def test_streams_do_not_share_a_counter(native: str, rows: int) -> None:
    """Sums on two streams at once: the last block of each finishes its own launch."""
    streams = [torch.cuda.Stream() for _ in range(2)] if native == "cuda" else [None, None]
    data = [latents(native, (rows, n)) for n in (40_000 if rows < 10 else 5_000, 300)]
    expected = [vaefast.gaussian_kl(*d, reduction="per_sample") for d in data]
    synchronize(native)
    found: list[list[Tensor]] = [[], []]
    for _ in range(REPEATS[native]):
        for k, stream in enumerate(streams):
            with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                found[k].append(vaefast.gaussian_kl(*data[k], reduction="per_sample"))
    synchronize(native)
    for k in range(2):
        assert all(torch.equal(t, expected[k]) for t in found[k])


@on_gpu
def test_a_counter_where_torch_holds_all_memory(cuda: str) -> None:
    """The first sum of a process needs a little memory of its own: torch gives back what it does not use."""
    if not os.environ.get("VAEFAST_WHOLE_GPU"):
        pytest.skip("takes the memory of all other processes on the GPU; VAEFAST_WHOLE_GPU=1 where there are none")
    code = """
import torch, vaefast
x = torch.zeros(4, 100, device="cuda")
held, size = [], 1 << 34
while size >= 512:
    try:
        held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        size //= 2
del held
assert torch.cuda.mem_get_info()[0] < 1 << 22, torch.cuda.mem_get_info()
assert vaefast.gaussian_kl(x, x, reduction="sum").item() == 0
"""
    # loaded before memory is full
    env = {**os.environ, "CUDA_MODULE_LOADING": "EAGER"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_threads_may_share_a_stream(native: str) -> None:
    """Python threads that issue sums at once, as data-parallel code does."""
    from concurrent.futures import ThreadPoolExecutor

    data = [latents(native, (k + 1, 20_000)) for k in range(4)]
    expected = [vaefast.gaussian_kl(*d, reduction="per_sample").detach() for d in data]

    def many(k: int) -> list[Tensor]:
        return [vaefast.gaussian_kl(*data[k], reduction="per_sample").detach() for _ in range(REPEATS[native])]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(many, range(4)))
    assert all(torch.equal(t, e) for ts, e in zip(found, expected) for t in ts)


@on_gpu
def test_second_device_while_the_first_is_current(cuda: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this takes two CUDA devices, and there is one")
    inputs = [t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in step_inputs("cpu")]
    assert torch.cuda.current_device() == 0
    torch.cuda.manual_seed_all(3)
    first = rng_state(cuda)
    found = whole_step(*inputs)
    assert all(t.device == torch.device("cuda", 1) for t in found)
    assert torch.equal(rng_state(cuda), first), "the noise is from the generator of the tensors' device"
    for a, e in zip(found, exact_step(found[0], *inputs)):
        assert_within(a, e, 2e-5)
    assert torch.cuda.current_device() == 0


# -- what a step costs


@contextlib.contextmanager
def no_synchronisation(device: str) -> Iterator[None]:
    """Raises where the CPU waits for the GPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_waits_for_the_gpu(native: str, reduction: str, dtype: torch.dtype) -> None:
    """Forward, backward, both ways of scaling, masks, priors that broadcast, the first call of a stream too."""
    p = posterior((6, 50), prior="broadcast", dtype=dtype, device=native).leaves()
    eps = torch.ones(50, device=native, dtype=dtype)
    cases = [(name, training(name, count, (6, 50), dtype).to(native).leaves()) for name, count in LIKELIHOOD_CASES]
    mask = torch.rand(6, 50, device=native) > 0.5
    factors = torch.full((), 1.5, device=native), torch.linspace(1, 2, 6, device=native)
    upstream = factors[1] if reduction == "per_sample" else factors[0]
    synchronize(native)
    with no_synchronisation(native), on_a_side_stream(native):
        z, kl = vaefast.sample_with_kl(*p.args(), reduction=reduction)
        given = vaefast.reparameterize(p.mu, p.raw, eps=eps)
        torch.autograd.grad((z.sum() + given.sum() + kl.sum()), p.tensors())
        for name, data in cases:
            for weight in (None, mask):
                options: dict[str, Any] = {"likelihood": name, "reduction": reduction, "weight": weight}
                loss = vaefast.reconstruction_loss(data.recon, data.target, **options)
                outer = upstream.to(loss.dtype).expand_as(loss) if reduction != "none" else torch.ones_like(loss)
                torch.autograd.grad(loss, data.recon, outer, retain_graph=True)
                torch.autograd.grad(loss, data.recon, outer)
            if reduction in ("per_sample", "batchmean", "sum"):
                terms = vaefast.elbo_terms(data.recon, data.target, *p.args(), likelihood=name, reduction=reduction)
                torch.autograd.grad(terms.loss.sum(), [*data.recon, *p.tensors()])
    synchronize(native)


def launches(f: Callable[[], Any]) -> list[str]:
    """The names of the kernels, copies and fills that the GPU ran."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
        f()
        torch.cuda.synchronize()
    return [e.name for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@on_gpu
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "laplace"])
def test_a_step_is_four_launches(cuda: str, likelihood: str) -> None:
    """Sample and loss, forward and backward; what else runs is autograd adding two gradients of mu and of logvar."""
    mu, raw, recon, x = step_inputs(cuda, batch=128)
    dz, one = torch.randn_like(mu), torch.ones((), device=cuda)

    def step() -> Tensors:
        z = vaefast.reparameterize(mu, raw)
        loss = vaefast.elbo_loss(recon, x, mu, raw, likelihood=likelihood)
        return torch.autograd.grad((z, loss), (mu, raw, recon), (dz, one))

    step()
    names = launches(step)
    assert names, "the profiler saw no kernel; it needs CUPTI"
    own = [name for name in names if "vaefast" in name]
    assert 3 <= len(own) <= 4, names
    assert len(names) - len(own) <= 2, names


@on_gpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_loss_is_one_launch(cuda: str, reduction: str) -> None:
    mu, raw, recon, x = (t.detach() for t in step_inputs(cuda, batch=128))
    calls: list[Callable[[], Any]] = [
        lambda: vaefast.gaussian_kl(mu, raw, reduction=reduction),
        lambda: vaefast.sample_with_kl(mu, raw, reduction=reduction),
        lambda: vaefast.reconstruction_loss(recon, x, reduction=reduction),
    ]
    if reduction in ("per_sample", "batchmean", "sum"):
        calls.append(lambda: vaefast.elbo_terms(recon, x, mu, raw, reduction=reduction))
    for k, f in enumerate(calls):
        f()
        names = launches(f)
        assert len(names) == 1, (k, names)


@on_gpu
def test_a_list_is_one_launch(cuda: str) -> None:
    """Forward and backward each, whatever the number of tensors."""
    mus, raws = ([torch.randn(32, 4 * n, device=cuda, requires_grad=True) for n in range(1, 100)] for _ in range(2))
    one = torch.ones((), device=cuda)
    kl, step = vaefast.multi_tensor_gaussian_kl, vaefast.multi_tensor_sample_with_kl
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "kl": (lambda: torch.autograd.grad(kl(mus, raws, reduction="sum"), mus + raws, one), 2),
        "sample": (lambda: step([m.detach() for m in mus], [r.detach() for r in raws]), 1),
    }
    for what, (f, count) in calls.items():
        f()
        names = launches(f)
        assert len(names) == count, (what, names)


MIB = 1 << 20
SLACK = 2 * MIB  # the allocator's rounding of large blocks, sums of blocks, scalars


def peak_and_kept(f: Callable[[], Any]) -> tuple[int, int]:
    """Bytes allocated at most during f(), and still held by its result, beyond those of before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = f()
    torch.cuda.synchronize()
    peak, kept = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    del result
    return peak, kept


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reconstruction_allocates_one_gradient(cuda: str, dtype: torch.dtype) -> None:
    recon = torch.randn(64, MIB // 2, device=cuda, dtype=dtype, requires_grad=True)
    x = torch.rand(64, MIB // 2, device=cuda, dtype=dtype)
    size = recon.numel() * recon.element_size()
    factor = torch.full((), 1.5, device=cuda)
    vaefast.reconstruction_loss(recon[:1], x[:1])  # this stream's counter
    for upstream in (None, factor):
        peak, _ = peak_and_kept(lambda u=upstream: torch.autograd.grad(vaefast.reconstruction_loss(recon, x), recon, u))
        assert size <= peak <= size + SLACK
    peak, _ = peak_and_kept(lambda: vaefast.reconstruction_loss(recon.detach(), x))
    assert peak <= SLACK


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_keeps_its_inputs_and_16_bytes(cuda: str, dtype: torch.dtype) -> None:
    """From a chunked tensor: no copy of the halves, forward z alone, backward the two gradients alone."""
    moments = torch.randn(64, MIB, device=cuda, dtype=dtype)
    mu, raw = (t.detach().requires_grad_() for t in moments.chunk(2, 1))
    size = mu.numel() * mu.element_size()
    vaefast.gaussian_kl(mu[:1], raw[:1])
    peak, kept = peak_and_kept(lambda: vaefast.sample_with_kl(mu, raw))
    assert size <= kept <= peak <= size + SLACK
    z, kl = vaefast.sample_with_kl(mu, raw)
    dz, dkl = torch.randn_like(z), torch.ones_like(kl)
    peak, _ = peak_and_kept(lambda: torch.autograd.grad((z, kl), (mu, raw), (dz, dkl)))
    assert 2 * size <= peak <= 2 * size + SLACK


# -- noise and repeatability


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_noise_is_the_cpus(native: str, dtype: torch.dtype, tolerance: float) -> None:
    """For one seed and offset, over a million draws: absolutely to a rounding of the largest."""
    for seed in ((1, 0), (-(2**62) + 5, 2**32 - 7), (2**63 - 1, 2**62)):
        cpu, here = (draws(seed, (1001, 1000), dtype, d) for d in ("cpu", native))
        torch.testing.assert_close(here.cpu(), cpu, rtol=0, atol=tolerance)
        assert abs(here.double().var() - 1) < 6 * (2 / here.numel()) ** 0.5


@pytest.mark.parametrize("reduction", ["none", "per_sample", "batchmean"])
@pytest.mark.parametrize("shape", [(3, 300_000), (3000, 70)], ids=str)
def test_the_same_bits_from_run_to_run(native: str, reduction: str, shape: tuple[int, int]) -> None:
    p = posterior(shape, prior="broadcast", device=native).leaves()
    data = training("gaussian", 2, shape, shapes=[None, shape[1:]]).to(native).leaves()

    def everything() -> list[Tensor]:
        torch.manual_seed(1)
        z, kl = vaefast.sample_with_kl(*p.args(), reduction=reduction)
        nll = vaefast.reconstruction_loss(data.recon, data.target, likelihood="gaussian", reduction=reduction)
        loss = z.square().sum() + 2 * kl.sum() + 3 * nll.sum()
        return [z, kl, nll, *torch.autograd.grad(loss, [*p.tensors(), *data.recon])]

    first = everything()
    for _ in range(REPEATS[native] // 2):
        assert all(torch.equal(a, b) for a, b in zip(first, everything()))


def test_generator_state(native: str) -> None:
    """Saved and restored, forked, and of a generator of one's own: as for torch.randn."""
    mu, raw = latents(native)
    state = rng_state(native)
    first, second = vaefast.reparameterize(mu, raw), vaefast.reparameterize(mu, raw)
    assert not torch.equal(first, second)
    after = rng_state(native)
    set_rng_state(native, state)
    with torch.random.fork_rng():
        assert torch.equal(vaefast.sample_with_kl(mu, raw)[0], first)
    assert torch.equal(rng_state(native), state)
    assert torch.equal(vaefast.reparameterize(mu, raw), first)
    torch.randn(7, device=native)
    set_rng_state(native, after)
    expected = torch.randn(1000, device=native)
    set_rng_state(native, state)
    for _ in range(2):
        vaefast.reparameterize(mu, raw)
    assert torch.equal(torch.randn(1000, device=native), expected), "both take their numbers from one counter"
    own = generator(3, native)
    default = rng_state(native)
    drawn = [vaefast.reparameterize(mu, raw, generator=own) for _ in range(2)]
    assert not torch.equal(*drawn)
    assert torch.equal(rng_state(native), default)
    assert torch.equal(vaefast.reparameterize(mu, raw, generator=generator(3, native)), drawn[0])


def test_draws_are_not_torchs(native: str) -> None:
    """Noise and torch.randn's from one seed are uncorrelated, one after the other and from the same state."""
    zero = torch.zeros(1000, 1000, device=native)
    torch.manual_seed(0)
    drawn = vaefast.reparameterize(zero, zero).flatten()
    after = torch.randn(10**6, device=native)
    torch.manual_seed(0)
    same_state = torch.randn(10**6, device=native)
    assert abs((drawn * after).double().mean()) < 6e-3
    # a counter's words in another order: at most a few pairs may be the same
    assert abs((drawn * same_state).double().mean()) < 6e-3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_noise(native: str, use_reentrant: bool) -> None:
    assert_checkpointing_replays(*latents(native), use_reentrant)


# -- where things lie


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", range(5))
def test_misaligned_tensors(native: str, dtype: torch.dtype, offset: int) -> None:
    """Every distance from a 16-byte boundary, sizes with every remainder, against the CPU."""

    def moved(t: Tensor, device: str) -> Tensor:
        room = torch.full((t.numel() + offset,), math.nan, dtype=t.dtype, device=device)
        return room[offset:].view(t.shape).copy_(t).detach().requires_grad_()

    for columns in (4096 * 2 + offset, 5 + offset):
        p, d = posterior((2, columns), dtype=dtype), training("gaussian", 2, (2, columns), dtype)
        eps = torch.randn(2, columns, generator=generator(1), dtype=torch.float64).to(dtype)
        found = []
        for device in (native, "cpu"):
            mu, raw, m, lv = (moved(t, device) for t in (p.mu, p.raw, *d.recon))
            z, kl = vaefast.sample_with_kl(mu, raw, eps=moved(eps, device).detach(), reduction="per_sample")
            target = moved(d.target, device).detach()
            nll = vaefast.reconstruction_loss((m, lv), target, likelihood="gaussian", reduction="per_sample")
            gradients = torch.autograd.grad((z.sum() + kl.sum() + nll.sum()) * 1.5, (mu, raw, m, lv))
            found.append([z, kl, nll, *gradients])
        # one rounding of the dtype: both sides round results that may differ in their last bits of float32
        tolerance = max(2e-6, torch.finfo(dtype).eps)
        for a, e in zip(*found):
            assert_within(a, e, 2 * tolerance)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "chunk": lambda t: torch.cat((t, t), 1).chunk(2, 1)[1],
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "broadcast": lambda t: t[:1].expand_as(t),
}


def seeded_sample(mu: Tensor, raw: Tensor, seed: tuple[int, int]) -> Tensor:
    words = torch.tensor(seed, device=mu.device)
    no_clamp_no_floor = (-math.inf, math.inf, 0.0)
    q = (mu, raw, None, 0.0, None, 0.0, None, words, None)
    z: Tensor = torch.ops.vaefast.posterior(*q, "logvar", *no_clamp_no_floor, "none", None, True, False)[0]
    return z


@pytest.mark.parametrize("layout", list(STRIDED))
def test_noise_of_strided_tensors_is_the_cpus(native: str, layout: str) -> None:
    """Elements are numbered in the sample's memory order on both devices."""
    p = posterior((4, 6, 5, 17))
    found = [
        seeded_sample(*(STRIDED[layout](t.to(device)) for t in (p.mu, p.raw)), (5, 7)) for device in ("cpu", native)
    ]
    assert found[0].stride() == found[1].stride()
    assert_within(found[1], found[0], 2e-5)


@on_gpu
def test_more_elements_than_32_bits_count(cuda: str) -> None:
    """Reconstruction and its scaling, KL and sample over more than 2^31 elements: offsets, noise counters, sums."""
    rows, columns = 2049, 1 << 20
    n = rows * columns
    assert n > 2**31
    if torch.cuda.mem_get_info()[0] < 10 * n:
        pytest.skip(f"{10 * n / 1e9:.0f} GB of GPU memory must be free")
    half = {"dtype": torch.bfloat16, "device": cuda}
    x = torch.randn(rows, columns, **half).requires_grad_()
    zero = torch.zeros((), **half).expand(rows, columns)
    squares = torch.stack([row.double().square().sum() for row in x.detach()])
    # kept gradients times a factor for each row, which PyTorch does, and times one for all, which a kernel does
    for reduction, factor in (("per_sample", 1.0), ("sum", 2.0)):
        nll = vaefast.reconstruction_loss(x, zero, likelihood="gaussian", reduction=reduction)
        exact = 0.5 * (squares + columns * math.log(2 * math.pi))
        torch.testing.assert_close(nll.double(), exact if nll.dim() else exact.sum(), rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(nll, x, torch.full_like(nll, factor))
        assert all(torch.equal(g, factor * r) for g, r in zip(gradient, x.detach()))
        del gradient
    x.requires_grad_(False)
    kl = vaefast.gaussian_kl(x, zero, reduction="per_sample")
    torch.testing.assert_close(kl.double(), 0.5 * squares, rtol=1e-6, atol=0)
    # one of them transposed: offsets are found by division
    raw = torch.randn(columns, rows, **half)
    kl = vaefast.gaussian_kl(x.t(), raw, reduction="none")
    at = torch.randint(n, (4096,), device=cuda)
    at[0], at[1] = 0, n - 1
    i, j = at // rows, at % rows
    expected = vaefast.gaussian_kl(x.t()[i, j], raw[i, j], reduction="none")
    assert torch.equal(kl[i, j], expected)
    del x, raw, kl
    torch.cuda.empty_cache()
    flat = torch.zeros(n, **half)
    z = seeded_sample(flat, flat, (11, 3))
    for start in (0, 2**31 - 4096, 2**31, n - 4096):
        assert torch.equal(z[start : start + 4096], draws((11, 3 + start // 4), (4096,), torch.bfloat16, cuda))


@on_gpu
def test_more_rows_than_a_launch_numbers(cuda: str) -> None:
    """An error, where 32 bits of a row's number would wrap round to few rows."""
    rows = 2**32 + 4
    if torch.cuda.mem_get_info()[0] < 9 * rows:
        pytest.skip(f"{9 * rows / 1e9:.0f} GB of GPU memory must be free")
    mu = torch.zeros(1, 1, dtype=torch.bfloat16, device=cuda).expand(rows, 1)
    with pytest.raises(RuntimeError, match="4294967300 rows are too many for one launch; split the batch"):
        vaefast.gaussian_kl(mu, mu, reduction="per_sample")
