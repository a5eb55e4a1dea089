"""Does every kernel run and match? The checks of ``checks.py``, a line of FILE.jsonl before and after each.

``python -m tools.gpu.smoke --out FILE`` goes on behind what FILE.jsonl holds: a check that began and did not end lost
the device or hung. Exit status: 0 all right, 1 something is off or no time was left, facts.LOST if a check lost the
device, in which case the same command goes on with the next.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import vaefast
from benchmarks import facts, harness
from tools.gpu.checks import checks

HANGS = 30  # seconds
Line = dict[str, Any]


def plain(off: float) -> float | str:
    """JSON has no infinity."""
    return round(off, 3) if math.isfinite(off) else "inf"


def judge(lines: Iterable[Line], names: Sequence[str]) -> Line:
    """The document: what ran, what was off, and the worst error of each kind."""
    ended: dict[str, Line] = {}
    for line in lines:
        ended[line["name"]] = {"error": "the process died"} if "begin" in line else line
    bad: list[Line] = []
    worst: dict[str, float] = {}
    for name, line in ended.items():
        if "error" in line:
            bad.append({"name": name, "error": line["error"]})
        for what, found in line.get("off", {}).items():
            off, label = float(found), f"{name}, {what}" if what else name
            kind = ",".join(label.split(",")[:2])
            worst[kind] = max(worst.get(kind, 0.0), off)
            if not off <= 1:
                bad.append({"name": label, "times the allowed error": found})
    return {
        "ran": len(ended),
        "of": len(names),
        "left": [name for name in names if name not in ended][:20],
        "bad": bad,
        "worst, in units of the allowed error": {kind: plain(off) for kind, off in sorted(worst.items())},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks that are left."""
    p = argparse.ArgumentParser(prog="tools.gpu.smoke", description="every kernel against float64")
    p.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    p.add_argument("--until", type=float, default=math.inf, metavar="TIME", help="begin no check later (time.time())")
    p.add_argument("--every", type=int, default=1, metavar="N", help="of the single calls only every Nth")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON; FILE.jsonl holds a line a finding")
    args = p.parse_args(argv)
    device, start = torch.device(args.device), time.monotonic()
    log = Path(f"{args.out}l")
    lines: list[Line] = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {line["name"] for line in lines}
    every = list(checks(args.every))

    def say(line: Line) -> None:
        lines.append(line)
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    status = 0
    with vaefast.use_backend("native"):
        for name, check in every:
            if name in known:
                continue
            if time.time() > args.until:
                break
            say({"name": name, "begin": True})
            signal.alarm(HANGS if args.device == "cuda" else 0)
            try:
                say({"name": name, "off": {what: plain(off) for what, off in check(args.device).items()}})
            except Exception as error:  # a check's failure is a result too
                say({"name": name, "error": f"{type(error).__name__}: {error}"[:500]})
            signal.alarm(0)
            if harness.lost(device):
                if "error" not in lines[-1]:
                    say({"name": name, "error": "lost the device"})
                status = facts.LOST
                break
    document = judge(lines, [name for name, _ in every])
    document |= {"device": args.device, "config": vaefast.show_config(), "seconds": round(time.monotonic() - start, 1)}
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    for finding in document["bad"][:20]:
        print(*finding.values(), sep=": ")
    print(f"smoke: {document['ran']} of {document['of']} checks ran, {len(document['bad'])} off")
    return status or int(bool(document["bad"]) or document["ran"] < document["of"])


if __name__ == "__main__":
    raise SystemExit(main())
