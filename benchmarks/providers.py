"""The providers: who computes a workload. A new provider is one entry in PROVIDERS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import vaefast
from benchmarks import jaxed
from benchmarks.workloads import Function, Workload

Step = Callable[[], Any]


@dataclass(frozen=True)
class Provider:
    """One way to compute a workload.

    Args:
        name: as shown and filtered by.
        function: the implementation, from a workload; None where it has none.
        wrap: what is done to a whole step (forward and backward) before it is timed.
        step: of a case the step, where it is none of PyTorch's: then ``function`` is checked alone.
        devices: where it runs.
    """

    name: str
    function: Callable[[Workload], Function | None]
    wrap: Callable[[Step], Step] | None = None
    step: Callable[[Any], Step] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")

    def covers(self, workload: Workload, device: torch.device) -> bool:
        if device.type not in self.devices or ((self.wrap or self.step) and workload.optimizer):
            return False
        return self.function(workload) is not None


def compiled(function: Function) -> Function:
    return torch.compile(function, fullgraph=True, dynamic=False)


def without_kernels(function: Function) -> Function:
    """As it runs where nothing is compiled: in the PyTorch engine."""

    def fallback(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with vaefast.use_backend("reference"):
            return function(*inputs)

    return fallback


def captured(step: Step) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The step as one CUDA graph, and its results, which every replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    try:
        with torch.cuda.graph(graph):
            kept = step()
    except Exception:
        # the generator takes a capture that broke off for one that goes on
        generator.graphsafe_set_state(before)
        raise
    return graph, kept


def graphed(step: Step) -> Step:
    """The step captured once, replayed after."""
    graph, kept = captured(step)

    def replay(kept: Any = kept) -> None:
        graph.replay()

    return replay


REGISTERED = (
    Provider("eager", lambda w: w.eager),
    Provider("distributions", lambda w: w.distributions),
    Provider("compile", lambda w: compiled(w.eager)),
    Provider("jax", jaxed.function, step=jaxed.step, devices=("cpu",)),
    Provider("eager+graph", lambda w: w.eager, wrap=graphed, devices=("cuda",)),
    Provider("vaefast", lambda w: w.vaefast),
    Provider("fallback", lambda w: without_kernels(w.vaefast)),
    Provider("vaefast+compile", lambda w: compiled(w.vaefast)),
    Provider("vaefast+graph", lambda w: w.vaefast, wrap=graphed, devices=("cuda",)),
)
PROVIDERS: dict[str, Provider] = {p.name: p for p in REGISTERED}
