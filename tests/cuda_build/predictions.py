"""What the machine code lets an operation reach: instructions an element against what a GPU issues and moves.

An SM issues four instructions of 32 threads a clock. An operation cannot be faster than that, nor than its bytes at the
memory's bandwidth: the longer of the two is the prediction, a bound for large tensors whose time is not latency's.
"""

from __future__ import annotations

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
    """For an operation of so many instructions and bytes an element."""
    memory, issue = size / gpu.bandwidth, count / (gpu.sms * LANES * gpu.clock)
    return {
        "picoseconds_an_element": round(max(memory, issue) * 1e12, 3),
        "bandwidth_fraction": round(min(1.0, memory / issue), 3),
        "bound": "memory" if memory >= issue else "issue",
    }


def predictions() -> dict[str, Any]:
    """By operation, dtype and architecture. Double has no place here: its arithmetic is not what the GPU issues."""
    found: dict[str, Any] = {}
    for arch in sorted({gpu.arch for gpu in GPUS.values()}):
        flows = {name: Flow(kernel) for name, kernel in cubin_sass(units.cubin("float", arch)).items()}
        for operation in operations(flows):
            for dtype in DTYPES:
                count = instructions(operation, dtype, flows[f"float: {operation.kernel}"])
                if count is None:
                    raise RuntimeError(
                        f"no way round {operation.kernel} for sm_{arch} does '{operation.name}', {dtype.name}"
                    )
                size = dtype.size * (operation.loads + operation.stores)
                found.setdefault(operation.name, {}).setdefault(dtype.name, {})[f"sm_{arch}"] = {
                    "instructions": count,
                    "bytes": size,
                    "gpus": {name: bounds(count, size, gpu) for name, gpu in GPUS.items() if gpu.arch == arch},
                }
    return {"gpus": {name: asdict(gpu) for name, gpu in GPUS.items()}, "operations": found}
