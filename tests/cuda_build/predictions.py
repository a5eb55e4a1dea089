"""What each kernel is predicted to reach: benchmarks/predictions.json, made by ``model`` from the machine code, beside
which ``make gpu`` sets what it measures.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cuda_build import units
from cuda_build.binary import cubin_sass, resources
from cuda_build.model import GPU, GPUS, Constants, code_of, predict
from cuda_build.operations import DTYPES, operations
from cuda_build.paths import Flow

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "predictions.json"
ELEMENTS = (1 << 24, 1 << 26)  # 64 and 256 MB of float32, as benchmarks/kernels.py takes them
# double has no place here: its arithmetic is not what the GPU issues
UNITS = tuple(unit for unit in units.UNITS if unit != "double")

Key = tuple[str, str, str, int]


def key_of(record: Mapping[str, Any]) -> Key:
    return record["kernel"], record["dtype"], record["gpu"], record["elements"]


def predictions(gpus: Mapping[str, GPU] = GPUS) -> list[dict[str, Any]]:
    """A record for each kernel, dtype, GPU and size."""
    found = []
    for arch in sorted({gpu.arch for gpu in gpus.values()}):
        cubins = [units.cubin(unit, arch) for unit in UNITS]
        flows = {name: Flow(kernel) for cubin in cubins for name, kernel in cubin_sass(cubin).items()}
        taken = {name: r for cubin in cubins for (name, _), r in resources(cubin).items()}
        for operation in operations(flows):
            for dtype in DTYPES:
                kernel = f"float: {operation.kernel_for(dtype)}"
                code = code_of(operation, dtype, flows[kernel], taken[kernel])
                size = dtype.size * (operation.loads + operation.stores)
                for name in (name for name, gpu in gpus.items() if gpu.arch == arch):
                    for elements in ELEMENTS:
                        record = {"kernel": operation.name, "dtype": dtype.name, "gpu": name, "elements": elements}
                        reached = predict(code, size, elements, gpus[name])
                        reached["share"] = round(reached["share"], 3)
                        found.append({**record, **asdict(code), "bytes": size, **reached})
    return found


def committed() -> dict[Key, dict[str, Any]]:
    """The file's records."""
    return {key_of(record): record for record in json.loads(FILE.read_text())["predictions"]}


def text(records: Sequence[dict[str, Any]]) -> str:
    """The file: a line a record."""
    gpus = ",\n".join(f"  {json.dumps(name)}: {json.dumps(asdict(gpu))}" for name, gpu in GPUS.items())
    lines = ",\n".join(f"  {json.dumps(record)}" for record in records)
    constants = json.dumps(asdict(Constants()))
    return f'{{\n "gpus": {{\n{gpus}\n }},\n "constants": {constants},\n "predictions": [\n{lines}\n ]\n}}\n'


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """A line for each kernel and dtype: what its code is like, and the share of a copy's speed on each GPU and size."""
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        rows.setdefault((record["kernel"], record["dtype"]), []).append(record)
    columns = [f"{r['gpu']} 2^{r['elements'].bit_length() - 1}" for r in next(iter(rows.values()), [])]
    head = f"{'kernel':68} {'dtype':9} registers blocks instructions waits in flight  "
    lines = [head + "  ".join(columns)]
    for (kernel, dtype), found in rows.items():
        r = found[0]
        code = f"{r['registers']:9} {r['blocks']:6} {r['instructions']:12.2f} {r['waits']:5} {r['in_flight']:9}  "
        shares = (f"{s['share']:4.0%} {s['bound'][0]}".rjust(len(column)) for s, column in zip(found, columns))
        lines.append(f"{kernel:68} {dtype:9} {code}{'  '.join(shares)}")
    return "\n".join([*lines, "bound by m(emory), l(atency) or i(ssue)"])
