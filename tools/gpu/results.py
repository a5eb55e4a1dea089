"""One document of all that the stages found, made anew whenever one of them ends."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.facts import commit
from tools.gpu.plan import HOT, read
from tools.gpu.stages import Record

PREDICTIONS = Path(__file__).resolve().parents[2] / "benchmarks" / "predictions.json"
DOCUMENTS = ("wall",)  # of the benchmarks'
FOUND = ("smoke", "cuda", "tests", "kernels")


def compare(measured: Sequence[dict[str, Any]], predictions: Any, gpu: str) -> list[dict[str, Any]]:
    """Each measured kernel beside the share of a copy's speed that was predicted for this GPU, where it was."""
    keys = ("kernel", "dtype", "elements")
    shares = {
        tuple(p[key] for key in keys): p["share"] for p in (predictions or {}).get("predictions", []) if p["gpu"] in gpu
    }
    return [
        {**record, "predicted": shares[key]}
        for record in measured
        if (key := tuple(record[key] for key in keys)) in shares and "error" not in record
    ]


def comparison(rows: Sequence[dict[str, Any]]) -> str:
    """The table of measured and predicted shares."""
    lines = [f"{'kernel':48} {'dtype':9} {'elements':>10} {'measured':>9} {'predicted':>9}"]
    for r in rows:
        share, predicted = f"{r['of_copy']:.0%}", f"{r['predicted']:.0%}"
        lines.append(f"{r['kernel']:48} {r['dtype']:9} {r['elements']:>10} {share:>9} {predicted:>9}")
    return "\n".join(lines)


def hottest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in rows if r["kernel"] in HOT]


def counters(log: str) -> list[dict[str, str]]:
    """What ncu's CSV says of each kernel: metrics by name, their units behind them."""
    lines = log.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(line for line in lines[head:] if line.startswith('"')):
        if row.get("Metric Name") and row.get("Metric Value"):
            kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
            kernel[row["Metric Name"]] = f"{row['Metric Value']} {row.get('Metric Unit') or ''}".strip()
    return list(kernels.values())


def collect(machine: Mapping[str, Any], records: Sequence[Record], work: Path, seconds: float) -> dict[str, Any]:
    """The results document; it holds what there is."""
    found = {name: document for name in FOUND if (document := read(work / f"{name}.json")) is not None}
    log = work / "logs" / "ncu.log"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": dict(machine),
        "seconds": round(seconds, 1),
        "stages": list(records),
        **found,
        "predictions": compare(found.get("kernels", []), read(PREDICTIONS), machine["gpu"]),
        "documents": [d for name in DOCUMENTS if (d := read(work / f"{name}.json"))],
        "ncu": counters(log.read_text(errors="replace")) if log.exists() else [],
    }
