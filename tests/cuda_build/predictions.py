"""What the machine code lets a kernel reach: instructions an element against what a GPU issues and moves.

An SM issues four instructions of 32 threads a clock. A kernel cannot be faster than that, nor than its bytes at the
memory's bandwidth: the longer of the two is the prediction, a bound for large tensors whose time is not latency's.
``make gpu`` sets it beside what it measures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cuda_build import units
from cuda_build.binary import cubin_sass
from cuda_build.operations import DTYPES, instructions, operations
from cuda_build.paths import Flow

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "predictions.json"
LANES = 4 * 32


@dataclass(frozen=True)
class GPU:
    """Memory bandwidth in bytes a second, SMs, and clocks a second, from the vendor's data sheets."""

    arch: int
    bandwidth: float
    sms: int
    clock: float


GPUS = {
    "A100": GPU(80, 2.04e12, 108, 1.41e9),
    "H100": GPU(90, 3.35e12, 132, 1.98e9),
    "H200": GPU(90, 4.8e12, 132, 1.98e9),
    "B200": GPU(100, 8.0e12, 148, 1.85e9),
}


def bounds(count: float, size: int, gpu: GPU) -> dict[str, Any]:
    """For a kernel of so many instructions and bytes an element; its share of the bandwidth is also that of a copy."""
    memory, issue = size / gpu.bandwidth, count / (gpu.sms * LANES * gpu.clock)
    return {
        "picoseconds": round(max(memory, issue) * 1e12, 3),
        "share": round(min(1.0, memory / issue), 3),
        "bound": "memory" if memory >= issue else "issue",
    }


def predictions(gpus: Mapping[str, GPU] = GPUS) -> list[dict[str, Any]]:
    """A record for each kernel, dtype and GPU. Double has no place here: its arithmetic is not what the GPU issues."""
    flows = {
        arch: {
            name: Flow(kernel)
            for unit in units.UNITS
            if unit != "double"
            for name, kernel in cubin_sass(units.cubin(unit, arch)).items()
        }
        for arch in sorted({gpu.arch for gpu in gpus.values()})
    }
    found = []
    for operation in operations(next(iter(flows.values()))):
        for dtype in DTYPES:
            size = dtype.size * (operation.loads + operation.stores)
            counts = {
                arch: instructions(operation, dtype, flow[f"float: {operation.kernel_for(dtype)}"])
                for arch, flow in flows.items()
            }
            for name, gpu in gpus.items():
                count = counts[gpu.arch]
                if count is None:
                    raise RuntimeError(
                        f"no way round {operation.kernel} for sm_{gpu.arch} does '{operation.name}', {dtype.name}"
                    )
                record = {"kernel": operation.name, "dtype": dtype.name, "gpu": name, "instructions": count}
                found.append({**record, "bytes": size, **bounds(count, size, gpu)})
    return found


def committed() -> dict[tuple[str, str, str], dict[str, Any]]:
    """The file's records, by kernel, dtype and GPU."""
    return {(r["kernel"], r["dtype"], r["gpu"]): r for r in json.loads(FILE.read_text())["predictions"]}


def text(records: Sequence[dict[str, Any]]) -> str:
    """The file: a line a record."""
    gpus = ",\n".join(f"  {json.dumps(name)}: {json.dumps(asdict(gpu))}" for name, gpu in GPUS.items())
    lines = ",\n".join(f"  {json.dumps(record)}" for record in records)
    return f'{{\n "gpus": {{\n{gpus}\n }},\n "predictions": [\n{lines}\n ]\n}}\n'
