"""What must hold of every kernel's machine code: each returns what is wrong, a line a finding."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cuda_build import predictions
from cuda_build.binary import Resources
from cuda_build.operations import DType, Operation, way_round
from cuda_build.paths import Flow
from cuda_build.sass import Instruction, Kernel

BASELINE = Path(__file__).with_name("baseline.json")
ARCH = 90  # the architecture that every change is judged on
LOCAL = ("LDL", "STL")
REGISTER = re.compile(r"\bR(\d+)\b")
DOUBLE = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b|\S*64H|\S*\.F64\b")
# Outside the loops over packs a float kernel may execute these, a few times a block:
ALLOWED_DOUBLE = {
    "DADD": "the last block adds up the units' sums in double",
    "DMUL": "a sum times the reduction's scale",
    "DFMA": "nll + beta * kl",
    "F2F.F64.F32": "a unit's sum on its way to the last block; nll and kl before they are added",
    "F2F.F32.F64": "scales and constants of the problem, kept in double; the sums' results",
}

# Kernels whose threads take an element each; and those of them whose sums are double: a one-hot sample goes by them,
# and a gradient has many draws or samples.
ALONE = re.compile(r": (Categorical|LogRatio|log_ratio|experts|marginals|mixture_)")
DOUBLE_SUMS = re.compile(r": (CategoricalWork<\w+, false>|log_ratio_backward|marginals_backward|mixture_)")

Baseline = dict[str, dict[str, dict[str, int]]]


def read_baseline() -> Baseline:
    found: Baseline = json.loads(BASELINE.read_text())
    return found


# whose log-gammas hold more numbers than registers do, and take far longer than fetching one again
SPILLED = "BetaBinomial"


def no_local_memory(name: str, taken: Resources, kernel: Kernel | None = None) -> Iterator[str]:
    if SPILLED in name:
        return
    if taken.stack or taken.local:
        yield f"{name}: {taken.stack} bytes of stack, {taken.local} of local memory a thread"
    if kernel and (spills := [i for i in kernel.code if i.root in LOCAL]):
        yield f"{name}: {len(spills)} instructions on local memory, such as `{spills[0]}`"


def within(name: str, taken: Resources, baseline: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    if name not in baseline:
        yield f"{name}: not in the baseline; write it again (python -m cuda_build --write)"
        return
    for what, most in baseline[name].items():
        if getattr(taken, what) > most:
            yield f"{name}: {getattr(taken, what)} {what}, {most} in the baseline"


def in_flight(path: Iterable[Instruction]) -> int:
    """The most loads of 16 bytes that are under way on it before what one of them brings is used."""
    most, waiting = 0, list[set[int]]()
    for instruction in path:
        named = [int(number) for number in REGISTER.findall(instruction.operands)]
        if instruction.root == "LDG" and instruction.opcode.endswith(".128"):
            waiting.append(set(range(named[0], named[0] + 4)))
            most = max(most, len(waiting))
        elif any(number in loaded for loaded in waiting for number in named):
            waiting.clear()
    return most


def flights(operation: Operation, dtype: DType, flow: Flow) -> Iterator[str]:
    """All that go once round the loop, on the plain path; but ptxas puts one of the Bernoulli's behind the first use,
    whatever their order."""
    path = way_round(operation, dtype, flow)
    wanted = operation.moved(dtype)[1] * operation.loads - (" bernoulli 1" in operation.name)
    if path is None:
        yield f"{operation.name}, {dtype.name}: no way round {operation.kernel_for(dtype)} does it"
    elif (found := in_flight(path.instructions)) < wanted:
        yield f"{operation.name}, {dtype.name}: {found} loads of 16 bytes in flight, not {wanted}"


def vectors(name: str, kernel: Kernel) -> Iterator[str]:
    """16 bytes at once, but for doubles, which go one by one (kPack in csrc/cuda/pack.cuh), as a mixture's sites do;
    and the KL beside a mixture is a function that several kernels call. A KL alone, with its sum reduced, still holds
    the store of an unreduced one."""
    if name.startswith("double") or re.search("Mixture<|ClassWork<|finish", name) or ALONE.search(name):
        return
    # of a KL on the plain path the sum alone is written
    roots = ("LDG",) if re.search(r": PlainForward<(\w+, )?false, true>$", name) else ("LDG", "STG")
    for root in roots:
        if not any(i.root == root and i.opcode.endswith(".128") for i in kernel.code):
            yield f"{name}: no 128-bit {root}"


def no_slower(fresh: Iterable[Mapping[str, Any]], known: Mapping[predictions.Key, Any]) -> Iterator[str]:
    """Predictions made anew against the committed ones."""
    for r in fresh:
        key = predictions.key_of(r)
        name = ", ".join(map(str, key))
        if key not in known:
            yield f"{name}: not among the predictions; write them again (python -m cuda_build --write)"
        elif r["instructions"] > (most := known[key]["instructions"]):
            yield f"{name}: {r['instructions']} instructions an element, predicted {most}"


def packed(flow: Flow) -> list[frozenset[int]]:
    """The outermost loops that move whole packs."""
    loops = [body for _, body in flow.loops if any(i.opcode.endswith("E.128") for i in flow.body(body))]
    return [body for body in loops if not any(body < other for other in loops)]


def no_double(name: str, kernel: Kernel) -> Iterator[str]:
    """Of a float kernel: none in any loop over packs, whatever the dtypes, and only listed ones elsewhere."""
    if DOUBLE_SUMS.search(name):
        return
    flow = Flow(kernel)
    hot = packed(flow)
    # a mixture's sites go one by one, and so do sums
    single = ("Mixture", "ClassWork", "finish")
    works = [] if ALONE.search(name) else name.partition(": ")[2].split(" + ")
    if len(hot) < sum(not work.startswith(single) for work in works):
        yield f"{name}: {len(hot)} loops over packs were found"
    for body in hot:
        for instruction in flow.body(body):
            if DOUBLE.match(instruction.opcode):
                yield f"{name}: `{instruction}` in a loop over packs"
    for opcode in sorted({i.opcode for i in kernel.code if DOUBLE.match(i.opcode)} - ALLOWED_DOUBLE.keys()):
        yield f"{name}: {opcode}, which is not among ALLOWED_DOUBLE"
