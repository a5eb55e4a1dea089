"""The shortest way round a kernel's hot loop that does the work which an operation needs.

The kernels choose dtypes and strides at run time, so a loop holds many ways through it: all but one are for operands
that lie otherwise in memory. What the common case executes is the shortest cycle with exactly the vector loads and
stores of the operation (:class:`Demand`), found by Dijkstra's algorithm over (block, what was met so far). It is a
lower bound: a branch that the operation takes and no demand names may be longer than the one found.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count

import networkx as nx

from cuda_build.sass import TARGET, Instruction, Kernel

Met = tuple[int, ...]


@dataclass(frozen=True)
class Demand:
    """A path has to hold ``least`` instructions that the pattern finds, and no more than ``most``."""

    pattern: str
    least: int = 0
    most: int | None = None

    def __call__(self, instruction: Instruction) -> bool:
        return re.search(self.pattern, f"{instruction.opcode} {instruction.operands}") is not None


@dataclass(frozen=True)
class Block:
    """Instructions that are executed together, and the blocks that may follow."""

    first: int
    last: int
    successors: tuple[int, ...]


class Flow:
    """A kernel's control flow in blocks, each known by its first instruction."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._calls: dict[int, int] = {}
        follows = [kernel.successors(at) for at in range(len(kernel.code))]
        leaders = {0, *kernel.labels.values()}
        for at, then in enumerate(follows):
            if then != [at + 1]:
                leaders |= {*then, at + 1}
        starts = sorted(leaders & set(range(len(kernel.code))))
        self.blocks = {
            first: Block(first, end - 1, tuple(follows[end - 1]))
            for first, end in zip(starts, [*starts[1:], len(kernel.code)])
        }

    def body(self, blocks: Iterable[int]) -> Iterator[Instruction]:
        """What a loop's blocks hold."""
        for block in sorted(blocks):
            yield from self.instructions(block)

    @cached_property
    def graph(self) -> nx.DiGraph:
        graph = nx.DiGraph((first, then) for first, block in self.blocks.items() for then in block.successors)
        graph.add_nodes_from(self.blocks)
        return graph

    @cached_property
    def loops(self) -> list[tuple[int, frozenset[int]]]:
        """Header and body of every loop, the outer before the inner ones."""
        found: list[tuple[int, frozenset[int]]] = []
        waiting = [frozenset(self.blocks)]
        while waiting:
            inside = self.graph.subgraph(waiting.pop())
            for part in nx.strongly_connected_components(inside):
                if len(part) == 1 and not inside.has_edge(*part, *part):
                    continue
                body = frozenset(part)
                headers = {b for b in body if any(a not in body for a in self.graph.predecessors(b))} or {min(body)}
                found += [(header, body) for header in sorted(headers)]
                waiting.append(body - headers)
        return found

    def instructions(self, block: int) -> tuple[Instruction, ...]:
        return self.kernel.code[block : self.blocks[block].last + 1]

    def cost(self, block: int) -> int:
        """Instructions executed, those of called functions too."""
        places = range(block, self.blocks[block].last + 1)
        return len(places) + sum(self._call(at) for at in places if self.kernel.code[at].root == "CALL")

    def _call(self, at: int) -> int:
        """The fewest instructions from a function's entry to its return."""
        entry = self.kernel.callee(at)
        if entry is None:
            return 0
        if entry not in self._calls:
            self._calls[entry] = 0  # a function that calls itself is counted once
            distance = nx.single_source_dijkstra_path_length(self.graph, entry, weight=lambda _, to, __: self.cost(to))
            ends = [d for b, d in distance.items() if self.kernel.code[self.blocks[b].last].root == "RET"]
            self._calls[entry] = self.cost(entry) + min(ends, default=0)
        return self._calls[entry]


@dataclass(frozen=True)
class Path:
    """A way once round a loop, block by block.

    Args:
        length: instructions executed.
        blocks: that it goes through.
        instructions: of them.
        loop: all blocks of the loop.
        beside: instructions that some threads of a warp may execute where others do not: those between a fork of the
            way and where the threads meet again, which the demands allow.
    """

    length: int
    blocks: tuple[int, ...]
    instructions: tuple[Instruction, ...]
    loop: frozenset[int]
    beside: int = 0


def _meetings(instructions: Sequence[Instruction], demands: Sequence[Demand]) -> frozenset[Met]:
    """How often a block meets each demand: several answers where a predicate decides about a limited instruction."""
    ways = {(0,) * len(demands)}
    for instruction in instructions:
        hits = tuple(int(demand(instruction)) for demand in demands)
        if any(hits):
            then = {tuple(a + b for a, b in zip(way, hits)) for way in ways}
            if instruction.predicate:
                skipped = tuple(h if d.most is None else 0 for h, d in zip(hits, demands))
                then |= {tuple(a + b for a, b in zip(way, skipped)) for way in ways}
            ways = then
    return frozenset(ways)


class Search:
    """Looks for the shortest path of a kernel that meets the demands."""

    def __init__(self, flow: Flow, demands: Sequence[Demand]) -> None:
        self.flow, self.demands = flow, tuple(demands)
        self.cost = {block: flow.cost(block) for block in flow.blocks}
        self.meets = {block: _meetings(flow.instructions(block), demands) for block in flow.blocks}

    def shortest(self, loops: Iterable[tuple[int, frozenset[int]]]) -> Path | None:
        """The shortest cycle of any of these loops."""
        allowed = {block for block in self.meets if any(self._sums((0,) * len(self.demands), block))}
        cycles = [path for header, body in loops if (path := self._from(header, body & allowed))]
        path = min(cycles, key=lambda path: path.length, default=None)
        return path and replace(path, beside=self._beside(path))

    def _sums(self, met: Met, block: int) -> Iterator[Met]:
        for more in self.meets[block]:
            total = tuple(a + b for a, b in zip(met, more))
            if all(d.most is None or n <= d.most for n, d in zip(total, self.demands)):
                # beyond what is needed the number does not matter
                yield tuple(min(n, d.least) if d.most is None else n for n, d in zip(total, self.demands))

    def _from(self, start: int, body: frozenset[int]) -> Path | None:
        """From ``start`` back to it."""
        if start not in body:
            return None
        inside = self.flow.graph.subgraph(body)
        body = frozenset(nx.descendants(inside, start) & nx.ancestors(inside, start) | {start})
        possible = [sum(max(way[k] for way in self.meets[b]) for b in body) for k in range(len(self.demands))]
        if any(n < d.least for n, d in zip(possible, self.demands)):
            return None
        order = count()
        came: dict[tuple[int, Met], tuple[int, Met] | None] = {}
        heap: list[tuple[int, int, tuple[int, Met], tuple[int, Met] | None]] = []
        for met in self._sums((0,) * len(self.demands), start):
            heapq.heappush(heap, (self.cost[start], next(order), (start, met), None))
        while heap:
            length, _, state, before = heapq.heappop(heap)
            if state in came:
                continue
            came[state] = before
            block, met = state
            then = self.flow.blocks[block].successors
            if start in then and all(n >= d.least for n, d in zip(met, self.demands)):
                blocks = self._walked(came, state)
                return Path(length, blocks, tuple(i for b in blocks for i in self.flow.instructions(b)), body)
            for follower in then:
                if follower in body and follower != start:
                    for total in self._sums(met, follower):
                        if (follower, total) not in came:
                            heapq.heappush(heap, (length + self.cost[follower], next(order), (follower, total), state))
        return None

    def _beside(self, path: Path) -> int:
        """What the path leaves out at its forks."""
        found: set[int] = set()
        for block in path.blocks:
            for fork in (i for i in self.flow.instructions(block) if i.root == "BSSY"):
                seen = {self.flow.kernel.labels[TARGET.findall(fork.operands)[0]]}
                waiting = list(self.flow.blocks[block].successors)
                while waiting:
                    if (then := waiting.pop()) in path.loop and then not in seen:
                        seen.add(then)
                        found.add(then)
                        waiting += self.flow.blocks[then].successors
        return sum(self.cost[block] for block in found - set(path.blocks))

    def _walked(
        self, came: dict[tuple[int, Met], tuple[int, Met] | None], state: tuple[int, Met] | None
    ) -> tuple[int, ...]:
        blocks = []
        while state is not None:
            blocks.append(state[0])
            state = came[state]
        return tuple(reversed(blocks))
