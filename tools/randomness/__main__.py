"""``python -m tools.randomness``: an hour of half a core. Writes its tables into docs/trust.md.

The words of Philox go through a battery as long as ``--bytes`` says; ``--draws`` normals, and as many pairs and classes
in proportion, against their distributions. ``tests/test_randomness.py`` has a slice with fixed seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import torch

import vaefast
from benchmarks.report import filled
from tools import ROOT
from tools.randomness import battery, draws
from tools.randomness.battery import Verdict
from tools.randomness.draws import Check

PAGE = ROOT / "docs" / "trust.md"


def checks(count: int) -> Iterable[tuple[str, Iterable[Check]]]:
    """Groups of checks, of normals so many."""
    torch.manual_seed(20261127)
    pairs = max(1, count // 10**8)
    yield f"{count:,} normals", draws.normality(count)
    yield f"{pairs} pairs of 1,000,000 normals each", draws.independence(pairs, 1_000_000)
    yield "Classes", draws.classes(max(10**5, count // 50))
    yield "Words", draws.counted(max(1000, count // 2000))


def table_of_checks(groups: Iterable[tuple[str, Iterable[Check]]]) -> str:
    lines = ["| draws | found | p |", "|---|---|---|"]
    for title, each in groups:
        lines.append(f"| **{title}** | | |")
        for check in each:
            lines.append(f"| {check.name} | {check.found} | {check.p:.2g} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def table_of_verdicts(verdicts: Iterable[Verdict]) -> str:
    lines = ["| battery | stream | amount | results | odd | failed |", "|---|---|---|---|---|---|"]
    for v in verdicts:
        odd = "; ".join(v.anomalies) or "none"
        lines.append(f"| {v.battery} | {v.stream} | {v.amount} | {v.results} | {odd} | {v.failed} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a battery fails a stream."""
    p = argparse.ArgumentParser(prog="tools.randomness", description=__doc__)
    p.add_argument("--only", choices=("battery", "draws"), help="one of the two")
    p.add_argument("--bytes", default="64GB", help="of the first stream, as PractRand takes it (default: 64GB, 2^36)")
    p.add_argument("--second", default="16GB", help="of the second stream")
    p.add_argument("--draws", type=float, default=1e9, help="normals (default: 1e9)")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    failed = 0
    if args.only != "draws":
        verdicts = [battery.run(s, most) for s, most in zip(battery.STREAMS, (args.bytes, args.second))]
        failed = sum(v.failed for v in verdicts)
        filled(PAGE, "battery", [table_of_verdicts(verdicts)])
    if args.only != "battery":
        with vaefast.use_backend("native"):
            filled(PAGE, "draws", [table_of_checks(checks(int(args.draws)))])
    return min(1, failed)


if __name__ == "__main__":
    raise SystemExit(main())
