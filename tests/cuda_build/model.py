"""What share of a copy's speed a kernel reaches: a model of its blocks on a GPU, from what its machine code says.

A kernel's blocks are at work all at once, as many as their registers leave room for. Each goes round its loop, waiting
for memory as often as the loop waits and issuing the loop's instructions, and at the end adds up its part of the sum.
So many elements at once in so long a time is one rate; the instructions that a GPU issues allow a second, and the bytes
that its memory moves a third. The kernel goes somewhat slower than the slowest of them, most where two are close. Then
come the blocks that end last, the sum over the blocks, and the launch, which a copy has too.

What a kernel is like is read from its code (:func:`code_of`) and from the sources (:func:`constant`). What a GPU is
like are the constants of :class:`GPU` and :class:`Constants`; ``python -m cuda_build --fit RESULTS`` fits the latter to
what ``make gpu`` measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import networkx as nx

from cuda_build.binary import Resources
from cuda_build.operations import LINE, PACK, DType, Operation, way_round
from cuda_build.paths import Flow
from cuda_build.sass import Instruction

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
REGISTER = re.compile(r"(?<!\w)R(\d+)")
LOAD, PARTIAL = re.compile(r"^LDG\.E\S*\.(64|128)\b"), re.compile(r"^LDG\.E\.64\.STRONG\.GPU")
# of a multiprocessor, compute capability 8.0 to 10.0: CUDA C++ Programming Guide, technical specifications
REGISTERS, WARPS, BLOCKS, WARP, LANES = 65536, 64, 32, 32, 128
GRANULE = 256  # registers that a warp takes at a time


@dataclass(frozen=True)
class GPU:
    """A GPU.

    Args:
        arch: what is compiled for it.
        copy: bytes a second, read and written, of a large copy: on an H100 as measured, on an H200 some 90% of the data
            sheet's.
        sms: multiprocessors, by the data sheet.
        clock: cycles a second under load, by ncu on an H100 1.94e9 to 1.99e9.
    """

    arch: int
    copy: float
    sms: int
    clock: float


GPUS = {"H100": GPU(90, 3.04e12, 132, 1.96e9), "H200": GPU(90, 4.3e12, 132, 1.96e9)}


@dataclass(frozen=True)
class Constants:
    """What no data sheet says. Those of BOUNDS are fitted to two runs on an H100 (2026-11-27), 348 results in float32
    and bfloat16, 5.3% off on average; fitted to the first alone they predicted the second, of other kernels, 6.7% off.
    ``launch`` is that of the copies there; ``fence`` is assumed.

    Args:
        latency: seconds from a load to its data, from a memory that is busy.
        l2: the same from the L2 cache.
        cycles: between two instructions of a thread, where other warps issue in between.
        issue: share of the issue slots that are filled where nothing waits.
        beside: share of what only some threads of a warp have to do that a warp does.
        start: seconds from a block's place to its first load.
        fence: that a fence by every thread takes, stores being under way.
        arrive: that a block takes to add up its threads' sums and to say that it is done.
        drain: share of a unit's time in which the blocks that end last leave the GPU half empty.
        launch: seconds of a launch, a copy's as a kernel's.
        sharpness: how sharply the slowest rate decides; the sum of rates to minus this power is inverted.
    """

    latency: float = 0.4e-6
    l2: float = 1.0e-6
    cycles: float = 5.95
    issue: float = 1.0
    beside: float = 0.65
    start: float = 0.44e-6
    fence: float = 0.5e-6
    arrive: float = 1.87e-6
    drain: float = 0.38
    launch: float = 5.4e-6
    sharpness: float = 8.0


@dataclass(frozen=True)
class Code:
    """What a kernel's machine code says of an operation on a dtype.

    Args:
        registers: a thread.
        instructions: an element, in the loop, by the shortest way.
        beside: further ones that some threads of a warp may have to do where others do not.
        trip: elements of a thread, once round the loop.
        waits: for memory, once round.
        in_flight: bytes of a thread that are under way at most.
        seeded: whether a block reads its seed before it begins.
        fences: by every thread of a block, where it says that it is done.
        at_once: partial sums that a thread of the last block loads before it adds the first; 0 where there are none.
        least: elements of a block at least, where they are enough for all of a GPU's.
        units: that a large problem is cut into.
    """

    registers: int
    instructions: float
    beside: float
    trip: int
    waits: int
    in_flight: int
    seeded: bool
    fences: int
    at_once: int
    least: int
    units: int


@cache
def constant(name: str) -> int:
    """An integer of csrc/cuda, by its name."""
    for file in sorted(SOURCES.glob("*.cuh")):
        if found := re.search(rf"constexpr \w+ {name} = (\d+);", file.read_text()):
            return int(found[1])
    raise LookupError(f"no constexpr {name} in {SOURCES}")


# -- from the machine code


def loaded(instruction: Instruction) -> frozenset[int]:
    """The registers that a wide load from memory fills."""
    if not LOAD.match(instruction.opcode):
        return frozenset()
    first = int(REGISTER.findall(instruction.operands)[0])
    words = 4 if ".128" in instruction.opcode else 2
    return frozenset(range(first, first + words))


def batches(loop: Sequence[Instruction], load: re.Pattern[str] = LOAD) -> list[int]:
    """Once round a loop: the bytes under way whenever something that was loaded is waited for. The loop is gone round
    twice, so that what a round loads for the next is seen."""
    found: list[int] = []
    waiting: set[int] = set()
    under_way = 0
    for _ in range(2):
        found.clear()
        for instruction in loop:
            fresh = loaded(instruction) if load.match(instruction.opcode) else frozenset()
            used = {int(r) for r in REGISTER.findall(instruction.operands)}
            if fresh:
                waiting |= fresh
                under_way += 4 * len(fresh)
            elif used & waiting:
                found.append(under_way)
                waiting.clear()
                under_way = 0
    return found


@cache
def fences_by_all(flow: Flow) -> int:
    """Fences that no thread goes round on its way from or to a barrier of its block."""
    graph, end = flow.graph.copy(), -1
    graph.add_edges_from((b, end) for b, block in flow.blocks.items() if not block.successors)
    ways = ((graph, 0), (graph.reverse(), end))
    before, after = ({**nx.immediate_dominators(g, root), root: root} for g, root in ways)

    def chain(tree: dict[int, int], at: int) -> Iterator[int]:
        while at in tree and tree[at] != at:
            at = tree[at]
            yield at

    reached = [b for b in flow.blocks if b in before and b in after]
    barriers = [b for b in reached if any(i.root == "BAR" for i in flow.instructions(b))]
    met = {*barriers, *(b for bar in barriers for tree in (before, after) for b in chain(tree, bar))}
    fences = (i for b in reached if b in met for i in flow.instructions(b) if i.root == "MEMBAR")
    return sum(not fence.predicate for fence in fences)


@cache
def partials_at_once(flow: Flow) -> int:
    """Partial sums that are loaded before the first is added, in the loop of the last block that has most."""
    inner = [body for _, body in flow.loops if not any(other < body for _, other in flow.loops)]
    loops = [tuple(flow.body(body)) for body in inner]
    loops = [loop for loop in loops if any(PARTIAL.match(i.opcode) for i in loop)]
    return max((round(sum(b) / len(b) / 8) for loop in loops if (b := batches(loop, PARTIAL))), default=0)


def sums(operation: Operation) -> bool:
    return "_forward" in operation.name and not operation.name.endswith(" sample")


def code_of(operation: Operation, dtype: DType, flow: Flow, taken: Resources) -> Code:
    path = way_round(operation, dtype, flow)
    if path is None:
        raise RuntimeError(f"no way round {flow.kernel.name} does '{operation.name}', {dtype.name}")
    pack, times = operation.moved(dtype)
    moved = LINE // dtype.size if sums(operation) else PACK  # as least_of in csrc/cuda/kernel.cuh
    trip, waited = pack * times, batches(path.instructions)
    return Code(
        registers=taken.registers,
        instructions=path.length / trip,
        # a posterior's forks are its parameterizations, of which a launch has one
        beside=0.0 if operation.posterior else path.beside / trip,
        trip=trip,
        waits=len(waited),
        in_flight=max(waited, default=0),
        seeded=operation.philox,
        fences=fences_by_all(flow) if sums(operation) else 0,
        at_once=partials_at_once(flow) if sums(operation) else 0,
        least=constant("kThreads") * constant("kPacksPerThread") * moved,
        units=constant("kRescaleUnits" if operation.name == "scale_" else "kMaxUnits"),
    )


# -- to a time


def resident(registers: int, threads: int) -> int:
    """Blocks of a multiprocessor."""
    warps = threads // WARP
    each = -(-registers * WARP // GRANULE) * GRANULE
    return min(REGISTERS // each // warps, WARPS // warps, BLOCKS)


def unit_of(elements: int, least: int, units: int) -> int:
    """Elements of a block, as geometry_of in csrc/cuda/kernel.cuh cuts one long row."""
    return least * (1 + elements // (least * units))


def predict(code: Code, size: int, elements: int, gpu: GPU, c: Constants = Constants()) -> dict[str, Any]:
    """Share of a copy's speed at so many elements of ``size`` bytes each, read and written, and what bounds it."""
    threads, unit = constant("kThreads"), unit_of(elements, code.least, code.units)
    blocks = resident(code.registers, threads)
    instructions = code.instructions + c.beside * code.beside
    trips = math.ceil(unit / threads / code.trip)
    life = trips * (code.waits * c.latency + code.trip * instructions * c.cycles / gpu.clock)
    life += c.start + (c.l2 if code.seeded else 0.0) + (c.arrive if code.at_once else 0.0) + code.fences * c.fence
    rates = {
        "memory": gpu.copy / size,
        "latency": gpu.sms * blocks * unit / life,
        "issue": c.issue * gpu.sms * LANES * gpu.clock / instructions,
    }
    bound = min(rates, key=lambda name: rates[name])
    rate = rates[bound] * sum((rates[bound] / r) ** c.sharpness for r in rates.values()) ** (-1 / c.sharpness)
    last = c.l2 * (2 + math.ceil(elements / unit / threads / code.at_once)) if code.at_once else 0.0
    seconds = elements / rate + c.drain * life + last + c.launch
    return {"blocks": blocks, "share": (elements * size / gpu.copy + c.launch) / seconds, "bound": bound}


# -- fitted to measurements

# of those that are fitted; the others are told apart by no measurement yet, or were measured themselves
BOUNDS = {
    "latency": (0.4e-6, 1.5e-6),
    "l2": (0.15e-6, 1.0e-6),
    "cycles": (1.0, 8.0),
    "issue": (0.5, 1.0),
    "beside": (0.1, 1.0),
    "start": (0.1e-6, 1.5e-6),
    "arrive": (0.1e-6, 3.0e-6),
    "drain": (0.05, 1.5),
    "sharpness": (2.0, 8.0),
}


def fit(records: Iterable[dict[str, Any]], measured: Iterable[dict[str, Any]], gpu: str) -> tuple[Constants, float]:
    """The constants that bring this GPU's predicted shares closest to the measured, by least squares of logarithms; and
    by how much the shares are off then, on average."""
    import numpy as np
    from scipy.optimize import least_squares

    reached = {(m["kernel"], m["dtype"], m["elements"]): m["of_copy"] for m in measured if "error" not in m}
    pairs = [
        (Code(**{f.name: r[f.name] for f in fields(Code)}), r["bytes"], r["elements"], reached[key])
        for r in records
        if r["gpu"] == gpu and (key := (r["kernel"], r["dtype"], r["elements"])) in reached
    ]
    if not pairs:
        raise LookupError(f"nothing that was measured has a prediction for {gpu}")
    names, start = list(BOUNDS), Constants()

    def at(logs: Sequence[float]) -> Constants:
        return replace(start, **{name: getattr(start, name) * math.exp(x) for name, x in zip(names, logs)})

    def off(logs: Sequence[float]) -> list[float]:
        shares = (predict(code, size, n, GPUS[gpu], at(logs))["share"] for code, size, n, _ in pairs)
        return [math.log(share / found) for share, (*_, found) in zip(shares, pairs)]

    at_least, at_most = (np.log([BOUNDS[name][k] / getattr(start, name) for name in names]) for k in (0, 1))
    # what the measurements do not tell stays as it is, and one that went wrong does not count for more than ten
    best = least_squares(
        lambda logs: [*off(logs), *(0.03 * logs)],
        np.zeros(len(names)),
        bounds=(at_least - 1e-9, at_most + 1e-9),
        loss="soft_l1",
        f_scale=0.1,
    )
    return at(best.x), sum(map(abs, off(best.x))) / len(pairs)


def told(c: Constants) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in asdict(c).items())
