"""The harness: checks an implementation of a workload against float64, then times several of them side by side.

What is checked: every output and every gradient, at the size that is timed, against the eager implementation in float64
with the same noise (recovered from the sample that was drawn); the noise's mean and variance; that a second call draws
other noise. A wrong implementation is reported and not timed.

How it is timed: round robin, so that whatever else the machine does meets all of them alike; ratios come from the two
times of a round. A turn begins with a call that is not timed: what the implementation before left in caches and in the
operating system's lists of pages is not what it would find in a loop of its own. A time is that of enough calls in a
row to last MIN_SAMPLE, the device synchronised at its end: what a training loop waits for, launches included, with
small tensors still in the caches. Backward enters the autograd engine directly: ``torch.autograd.grad`` first checks
in Python every gradient that it is given, which takes as long whoever computes the workload (some 30 us for two), and
which a training loop, giving none for its scalar loss, does not pay. On a GPU, a case that moves COLD bytes or more is
timed by CUDA events around each call instead, after a write that fills the L2 cache with something else, and so is the
copy that it is compared with.
"""

from __future__ import annotations

import gc
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward  # what Tensor.backward and torch.autograd.grad end in
from torch.overrides import TorchFunctionMode

from benchmarks.providers import Provider, Step
from benchmarks.workloads import Draw, Function, Workload

TOLERANCE = 1e-4  # the largest deviation of a tensor, over the largest value of the true one
SIGMAS = 6  # how far the noise's mean and variance may be off, in their standard deviations
MIN_SAMPLE = 2e-3
MAX_ROUNDS = 400
CACHED = 1 << 20  # bytes of inputs and gradients that stay in a core's cache: 64k elements of mean and log variance
COSTED = ("eager", "vaefast")  # the others compile anew for every size
COLD = 1 << 26  # bytes
FLUSH = 1 << 28  # bytes, if that is several times the L2 cache
MODES = {"f": "forward", "fb": "forward + backward"}


class Nothing(torch.autograd.Function):
    """Outputs and gradients that are there already: what PyTorch takes for one node that computes nothing."""

    @staticmethod
    def forward(ctx: Any, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], *_: Tensor) -> Any:
        ctx.gradients = gradients
        return tuple(t.detach() for t in outputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, None, *ctx.gradients


class Wrong(Exception):
    """An implementation that does not compute the workload."""


class GivenNoise(TorchFunctionMode):
    """Makes ``torch.randn_like``, and what torch.distributions draw by, take the given tensors in turn."""

    def __init__(self, noise: Sequence[Tensor]) -> None:
        super().__init__()
        self.noise = list(noise)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn_like or func is torch.Tensor.normal_:
            return self.noise.pop(0)
        if func is torch.normal:
            mean, std = args
            return mean + std * self.noise.pop(0)
        return func(*args, **(kwargs or {}))


@dataclass
class Case:
    """A workload at a size, in a mode ("f" or "fb"), on a device, with its inputs."""

    workload: Workload
    mode: str
    device: torch.device
    factors: tuple[float, ...] = (1.0,)  # of the workload's sizes, one for all or one for each

    @property
    def sizes(self) -> dict[str, int]:
        return self.workload.scaled(*self.factors)

    @cached_property
    def inputs(self) -> list[Tensor]:
        return self.workload.make(Draw(self.device), **self.sizes)

    @cached_property
    def like(self) -> list[Tensor]:
        """A tensor of each output's shape that requires grad where it does: 1 for a scalar, else noise."""
        draw = Draw(self.device, seed=1)
        with torch.enable_grad():
            outputs = self.workload.eager(*self.inputs)
        like = [torch.ones_like(o) if o.dim() == 0 else draw.normal(*o.shape) for o in outputs]
        return [t.requires_grad_(o.requires_grad) for o, t in zip(outputs, like)]

    @property
    def upstream(self) -> list[Tensor | None]:
        """The gradient of each output, None for one that takes none."""
        return [t.detach() if t.requires_grad else None for t in self.like]

    def node(self) -> Function:
        """A workload that is one autograd node, with the inputs, outputs and gradients of this one, and no work."""
        outputs = [t.detach() for t in self.like]
        gradients = [torch.zeros_like(t) if t.requires_grad else None for t in self.inputs]
        return lambda *inputs: Nothing.apply(outputs, gradients, *inputs)

    def release(self) -> None:
        """Forgets the tensors, which would be made again."""
        self.__dict__.pop("inputs", None)
        self.__dict__.pop("like", None)

    def run(self, function: Function, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Outputs and, in mode "fb", gradients."""
        if self.mode == "f":
            with torch.no_grad():
                return function(*inputs), ()
        outputs = function(*inputs)
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, self.upstream) if g is not None]
        leaves = [t for t in inputs if t.requires_grad]
        gradients = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs])
        return tuple(o.detach() for o in outputs), gradients

    def noise(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The noise in the samples, in float64."""
        if self.workload.posteriors is None:
            return []
        with torch.no_grad():
            posteriors = self.workload.posteriors(*(t.double() for t in self.inputs))
            return [(z.double() - mean) / std for z, (mean, std) in zip(outputs, posteriors)]

    def step(self, function: Function, apart: bool = False) -> Step:
        """What is timed; runs under no_grad in mode "f". apart: on leaves of its own, whose autograd nodes no earlier
        call has tied to its stream."""
        inputs = tuple(t.detach().requires_grad_(t.requires_grad) for t in self.inputs) if apart else self.inputs
        if self.mode == "f":
            return lambda: function(*inputs)
        if self.workload.optimizer:
            return self._training_step(function)
        leaves = tuple(t for t in inputs if t.requires_grad)
        wanted = [i for i, g in enumerate(self.upstream) if g is not None]
        upstream = tuple(self.upstream[i] for i in wanted)

        def forward_backward() -> Any:
            outputs = function(*inputs)
            roots = tuple(outputs[i] for i in wanted)
            keep_graph, create_graph, allow_unused = False, False, False
            return _engine_run_backward(
                roots, upstream, keep_graph, create_graph, leaves, allow_unused, accumulate_grad=False
            )

        return forward_backward

    def training(self) -> tuple[Tensor, list[Tensor], torch.optim.Optimizer]:
        """The data, a copy of the parameters, and what trains them."""
        x, *parameters = self.inputs
        weights = [t.detach().clone().requires_grad_() for t in parameters]
        return x, weights, torch.optim.Adam(weights, lr=1e-3)

    def _training_step(self, function: Function) -> Step:
        x, weights, optimizer = self.training()

        def train() -> None:
            optimizer.zero_grad()
            function(x, *weights)[-1].backward()
            optimizer.step()

        return train

    def floor(self) -> int | None:
        """The bytes that any implementation moves: inputs and upstream gradients read once, what backward needs again
        twice, outputs and gradients written once."""
        if self.workload.optimizer:
            return None
        moved = [*self.inputs, *self.like]
        if self.mode == "fb":
            moved += [*(g for g in self.upstream if g is not None), *(self.inputs[i] for i in self.workload.reread)]
            moved += [t for t in self.inputs if t.requires_grad]
        return sum(map(bytes_of, moved))


def bytes_of(t: Tensor) -> int:
    """Of memory: a broadcast number is one."""
    return math.prod(n for n, step in zip(t.shape, t.stride()) if step) * t.element_size()


def deviation(got: Tensor, true: Tensor) -> float:
    """The largest error over the largest true value; infinite where a NaN or another shape came back."""
    if got.shape != true.shape:
        return float("inf")
    if got.numel() == 0:
        return 0.0
    error = ((got.double() - true).abs().max() / true.abs().max().clamp_min(1e-300)).item()
    return error if error == error else float("inf")


def check(case: Case, function: Function) -> float:
    """The worst deviation from float64 among outputs and gradients.

    Raises:
        Wrong: one is above TOLERANCE, or the noise is not standard normal, or the same in a second call.
    """
    outputs, gradients = case.run(function, case.inputs)
    noise = case.noise(outputs)
    inputs = [t.detach().double().requires_grad_(t.requires_grad) for t in case.inputs]
    with GivenNoise(noise):
        true_outputs, true_gradients = case.run(case.workload.eager, inputs)
    if len(outputs) != len(true_outputs):
        raise Wrong(f"{len(outputs)} outputs, not {len(true_outputs)}")
    worst = 0.0
    for kind, pairs in (("output", zip(outputs, true_outputs)), ("gradient", zip(gradients, true_gradients))):
        for i, (got, true) in enumerate(pairs):
            error = deviation(got, true)
            if error > TOLERANCE:
                raise Wrong(f"{kind} {i} is off by {error:.2g} of its largest value")
            worst = max(worst, error)
    for eps in noise:
        check_noise(eps)
    if any(torch.equal(z, other) for z, other, _ in zip(outputs, function(*case.inputs), noise)):
        raise Wrong("two calls drew the same noise")
    return worst


def check_noise(eps: Tensor) -> None:
    n = eps.numel()
    mean, variance = eps.mean().item(), eps.square().mean().item()
    spread = SIGMAS * (2 / n) ** 0.5
    # few draws vary more upwards: Laurent and Massart's bound on chi-square (2000, lemma 1)
    if not (abs(mean) <= SIGMAS * n**-0.5 and -spread <= variance - 1 <= spread + SIGMAS**2 / n):
        raise Wrong(f"the noise has mean {mean:.4g} and variance {variance:.4g} over {n} draws")


def saved_bytes(case: Case, function: Function) -> int:
    """Bytes that forward keeps for backward beside its inputs."""
    return kept_bytes(lambda: function(*case.inputs), case.inputs)


def kept_bytes(forward: Callable[[], object], beside: Iterable[Tensor]) -> int:
    """Bytes that forward keeps for backward beside those tensors."""
    known = {t.untyped_storage().data_ptr() for t in beside}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(t.detach())  # an address is not used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(kept.values())


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Keeps what C++ code writes to stderr off the terminal: the profiler announces itself there."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most memory that a step held at once beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as p:
        step()
    assert p.profiler is not None and p.profiler.kineto_results is not None
    changes = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda e: e.start_ns())
    return int(max(np.cumsum([0, *(e.nbytes() for e in changes)])))


@contextmanager
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def in_kernel() -> tuple[int, float]:
    """Pages touched for the first time, and seconds that all threads together spent in the operating system's kernel:
    making those pages, mostly."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt, usage.ru_stime


Timer = Callable[[Step, int], float]


def timer(device: torch.device, cold: bool = False) -> Timer:
    """What times a step: from the step and a number of calls to seconds a call."""
    if cold:
        return cold_timer(device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def time_calls(step: Step, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            step()
        synchronize()
        return (time.perf_counter() - start) / calls

    return time_calls


def cold_timer(device: torch.device) -> Timer:
    """Of the GPU itself. The flush leaves the cache full of bytes to write back, as in a training loop the step before
    does, and gives Python the time to queue the step before the GPU is ready for it."""
    size = max(FLUSH, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    flush = torch.empty(size, dtype=torch.uint8, device=device)

    def time_calls(step: Step, calls: int) -> float:
        events = []
        for _ in range(calls + 1):
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            pair[0].record()
            step()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        # the first call is queued on an idle GPU, which waits for it
        return sum(start.elapsed_time(end) for start, end in events[1:]) * 1e-3 / calls

    return time_calls


@dataclass
class Times:
    """Seconds a call in each round; over all calls, what ``in_kernel`` counts."""

    calls: int
    seconds: list[float] = field(default_factory=list)
    faults: int = 0
    kernel_seconds: float = 0.0

    def percentile(self, p: float) -> float:
        return float(np.percentile(self.seconds, p))

    def per_call(self, total: float) -> float:
        return total / (self.calls * max(1, len(self.seconds)))


def interleave(steps: Mapping[str, Step], time_calls: Timer, budget: float, min_rounds: int) -> dict[str, Times]:
    """Times of every step, round by round, until the budget (seconds) is spent; at least min_rounds of them."""
    times: dict[str, Times] = {}
    for name, step in steps.items():
        first = time_calls(step, 1)
        if first < MIN_SAMPLE:
            time_calls(step, 20)
            first = time_calls(step, 20)
        times[name] = Times(max(1, round(MIN_SAMPLE / first)))
    names = list(steps)
    with no_gc():
        end = time.perf_counter() + budget
        for rounds in range(MAX_ROUNDS):
            if rounds >= min_rounds and time.perf_counter() > end:
                break
            names.append(names.pop(0))
            for name in names:
                time_calls(steps[name], 1)
                t, before = times[name], in_kernel()
                t.seconds.append(time_calls(steps[name], t.calls))
                after = in_kernel()
                t.faults += after[0] - before[0]
                t.kernel_seconds += after[1] - before[1]
    return times


def ratio(of: Times, to: Times) -> float:
    """How many times as fast ``to`` is: the median over rounds."""
    return statistics.median(a / b for a, b in zip(of.seconds, to.seconds))


def measure(
    case: Case,
    providers: Sequence[Provider],
    *,
    budget: float,
    min_rounds: int,
    checked: bool = True,
    costed: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """The case's record for the results file; a provider that fails has an "error" in it instead of times. Where it is
    ``costed``, what a call and an element cost are measured too."""
    torch.compiler.reset()
    torch.manual_seed(0)
    records: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    with torch.set_grad_enabled(case.mode == "fb"):
        for provider in providers:
            progress(provider.name)
            record = records[provider.name] = {}
            function = provider.function(case.workload)
            assert function is not None
            try:
                if checked:
                    record["deviation"] = check(case, function)
                if provider.step:
                    steps[provider.name] = step = provider.step(case)
                    step()  # which compiles
                    continue
                if case.mode == "fb":
                    record["saved_bytes"] = saved_bytes(case, function)
                step = case.step(function)
                if not checked or case.workload.optimizer:
                    step()  # the first call compiles, or makes the optimizer's state
                record["peak_bytes"] = peak_bytes(step, case.device)
                steps[provider.name] = provider.wrap(case.step(function, apart=True)) if provider.wrap else step
            except Exception as error:  # one provider's failure is a result too
                record["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        progress("timing")
        floor = case.floor()
        cold = case.device.type == "cuda" and (floor or 0) >= COLD
        time_calls = timer(case.device, cold)
        times = interleave(steps, time_calls, budget, min_rounds)
        for name, t in times.items():
            records[name] |= summary(t, times, floor)
        if costed and not case.workload.optimizer:
            found = costs(case, [p for p in providers if p.name in steps], budget / 2, min_rounds)
            for name, cost in found.items():
                records[name]["costs"] = cost
    return {
        "workload": case.workload.name,
        "what": case.workload.what,
        "sizes": case.sizes,
        "elements": case.workload.elements(*case.factors),
        "mode": case.mode,
        "floor_bytes": floor,
        "cold": cold,
        "copy_seconds": copy_seconds(case.device, floor // 2, time_calls) if floor and cold else None,
        "providers": records,
    }


def costs(case: Case, providers: Sequence[Provider], budget: float, min_rounds: int) -> dict[str, dict[str, Any]]:
    """What a time is made of, by provider: what a call costs before any work is done, seen at one element, what of that
    one autograd node would take that does nothing, and what an element costs beyond that where memory does not count,
    seen where everything stays in the cache."""
    workload = case.workload
    fits = min(*case.factors, workload.largest(workload.footprint, CACHED))
    one, cached = (Case(workload, case.mode, case.device, (factor,)) for factor in (0.0, fits))
    functions = {p.name: f for p in providers if p.name in COSTED and (f := p.function(workload)) is not None}
    steps = {f"one {name}": one.step(f) for name, f in functions.items()}
    steps |= {f"cached {name}": cached.step(f) for name, f in functions.items()}
    if case.mode == "fb":
        steps["node"] = one.step(one.node())
    medians = {name: t.percentile(50) for name, t in interleave(steps, timer(case.device), budget, min_rounds).items()}
    elements = workload.elements(fits)
    return {
        name: {
            "call_seconds": (call := medians[f"one {name}"]),
            "node_seconds": medians.get("node"),
            "cached_elements": elements,
            "cached_seconds": (whole := medians[f"cached {name}"]),
            "seconds_per_element": max(0.0, whole - call) / elements,
        }
        for name in functions
    }


def summary(t: Times, others: Mapping[str, Times], floor: int | None) -> dict[str, Any]:
    median = t.percentile(50)
    return {
        "median": median,
        "p20": t.percentile(20),
        "p80": t.percentile(80),
        "rounds": len(t.seconds),
        "calls": t.calls,
        "page_faults": t.per_call(t.faults),
        "kernel_seconds": t.per_call(t.kernel_seconds),
        "bytes_per_second": None if floor is None else floor / median,
        "over": {name: ratio(others[name], t) for name in ("eager", "compile", "jax") if name in others},
    }


def lost(device: torch.device) -> bool:
    """Whether an earlier kernel's fault has left the device unusable for this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def copy_seconds(device: torch.device, size: int, time_calls: Timer) -> float:
    """What copying one tensor of that many bytes into another takes."""
    a, b = torch.zeros(size, dtype=torch.uint8, device=device), torch.zeros(size, dtype=torch.uint8, device=device)
    return statistics.median(time_calls(lambda: b.copy_(a), 1) for _ in range(11))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy."""
    on_gpu = device.type == "cuda"
    size = 1 << (30 if on_gpu else 28)
    return 2 * size / copy_seconds(device, size, timer(device, cold=on_gpu))
