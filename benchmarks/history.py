"""How many times as fast as eager PyTorch each case was, commit by commit, in history.json; and what got slower.

``python -m benchmarks.history [FILE ...]`` adds results files, all of benchmarks/results/ if none is named, and
compares the newest of each kind of device with the one before: 1 where a case lost more than ``--by``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, case_name, documents, heading, modes_of, timed

FILE = Path(__file__).with_name("history.json")
Entry = dict[str, Any]


def entries_of(file: Path) -> Iterator[Entry]:
    """A results file's documents, but sweeps: their sizes are not those of another."""
    results = json.loads(file.read_text())
    for document, _ in documents(results, file):
        if document.get("sweep") or "cases" not in document:
            continue
        mode, machine = modes_of(document), document["machine"]
        rows = {case_name(case, mode): timed(case, "vaefast") for case in document["cases"]}
        ratios = {name: row["over"].get("eager") for name, row in rows.items() if row}
        yield {
            "commit": results["commit"],
            "where": heading(document),
            "kind": machine["gpu"] or machine["instruction_set"],
            "over_eager": {name: round(ratio, 3) for name, ratio in ratios.items() if ratio},
        }


def added(known: Sequence[Entry], files: Sequence[Path]) -> list[Entry]:
    """Those known and those of the files, one a commit and place, the newest last."""
    by_key = {(e["commit"], e["where"]): e for e in [*known, *(e for file in files for e in entries_of(file))]}
    return sorted(by_key.values(), key=lambda e: str(e["where"]).rpartition("; ")[2])


def slower(before: Entry, after: Entry, by: float) -> list[str]:
    """A line for each case that lost more than this part of its ratio."""
    return [
        f"{name}: {was:.2f}x to {now:.2f}x ({now / was:.2f})"
        for name, was in before["over_eager"].items()
        if (now := after["over_eager"].get(name)) is not None and now < was * (1 - by)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="benchmarks.history", description="figures by commit, and what got slower")
    p.add_argument("files", nargs="*", type=Path, metavar="FILE", help="results (default: all of benchmarks/results/)")
    p.add_argument("--by", type=float, default=0.05, metavar="PART", help="what counts as slower (default 0.05)")
    p.add_argument("--history", type=Path, default=FILE, metavar="FILE", help="default: benchmarks/history.json")
    args = p.parse_args(argv)
    known = json.loads(args.history.read_text()) if args.history.exists() else []
    history = added(known, args.files or sorted(RESULTS.glob("*.json")))
    args.history.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in history) + "\n]\n")
    lost = False
    for kind in dict.fromkeys(entry["kind"] for entry in history):
        *earlier, after = [entry for entry in history if entry["kind"] == kind]
        print(f"{after['commit']}, {after['where']}")
        if not earlier:
            print("  the first of its kind")
            continue
        before = earlier[-1]
        found = slower(before, after, args.by)
        lost = lost or bool(found)
        print(f"  since {before['commit']}, {before['where']}:")
        print("\n".join(f"  slower: {line}" for line in found) or "  nothing slower")
    return int(lost)


if __name__ == "__main__":
    raise SystemExit(main())
