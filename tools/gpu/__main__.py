"""``make gpu``: whether every kernel runs and is right, whether memory is touched that is not its own, and how fast it
is, in the order of what is worth most and in a given time.

The compiled extension that lies in the checkout is used where it loads and has kernels for the GPU; only else is one
built, in a time of its own. Nothing is downloaded or installed. Every answer is written as it comes: to --out, or to
benchmarks/results/<gpu>-<date>.json and build/gpu. The exit status is 1 if a stage failed, 2 if this machine cannot run
them at all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.facts import file_name
from tools import ROOT
from tools.gpu import machine, results
from tools.gpu.machine import Unfit
from tools.gpu.plan import SECONDS_IN_ALL, Setting, build, plan
from tools.gpu.stages import Record, Runner, Stage, summary

WORK = ROOT / "build" / "gpu"
RESULTS = ROOT / "benchmarks" / "results"
NAMES = ("smoke", "cuda", "tests", "compile", "kernels", "wall")  # of what stages leave
SUFFIXES = (".json", ".jsonl", ".lost")
TABLE = 4000  # characters of the wall times' table that are shown


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="tools.gpu", description="proves and measures the kernels on a GPU")
    p.add_argument(
        "--seconds", type=float, default=SECONDS_IN_ALL, help=f"for all stages (default {SECONDS_IN_ALL:.0f})"
    )
    p.add_argument("--only", default="", metavar="REGEX", help="some stages: smoke, cuda, tests, memcheck, ...")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="for results, each stage's own, and logs")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--dry", action="store_true", help="a few of each, to try the stages")
    return p.parse_args(argv)


def setting(args: argparse.Namespace) -> Setting:
    sanitizer = machine.find_tool("compute-sanitizer")
    return Setting(
        work=args.out or WORK,
        cache=WORK,
        device=args.device,
        dry=args.dry,
        cores=os.cpu_count() or 1,
        sanitizer=sanitizer,
        alone=machine.of_kernels_alone(sanitizer) if sanitizer else (),
        ncu=machine.find_tool("ncu"),
        xdist=importlib.util.find_spec("xdist") is not None,
    )


def builds(args: argparse.Namespace, found: dict[str, Any]) -> list[Stage]:
    """What has to be built first.

    Raises:
        Unfit: the extension cannot be used, and another cannot be built.
    """
    capability = found.get("capability", "")
    why = machine.why_not_usable(args.device, capability)
    if not why:
        return []
    print(f"the extension in the checkout is of no use: {why}", flush=True)
    if args.device == "cpu":
        raise Unfit(f"there is no extension for the CPU ({why}): make build")
    environment = machine.find_compilers(capability)
    for stamp in ROOT.glob(".venv*/.built"):  # the build will be another's than theirs
        stamp.unlink()
    return [build(environment)]


def show(document: dict[str, Any], work: Path, records: Sequence[Record], out: Path) -> None:
    """What a reader wants to see first comes last."""
    log = work / "logs" / "wall.log"
    if log.exists():
        print(log.read_text(errors="replace")[-TABLE:])
    if rows := results.hottest(document["predictions"]):
        print(results.comparison(rows))
    for name in ("smoke", "cuda", "tests"):
        found = document.get(name, {})
        for failure in [*found.get("bad", []), *found.get("failures", [])][:10]:
            print(f"{name}:", *(str(failure[key])[:200] for key in failure if key != "tail"))
    print(summary([{key: value for key, value in r.items() if key != "tail" or len(value) < TABLE} for r in records]))
    print(f"\n{document['machine']['gpu']}: {document['seconds']:.0f} s; written: {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; 1 if one failed, 2 if none can run here."""
    args = parse(argv)
    start = time.monotonic()
    try:
        found = machine.find_device(args.device)
        first = builds(args, found)
    except Unfit as unfit:
        print(f"make gpu cannot run here: {unfit}", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    s = setting(args)
    s.work.mkdir(parents=True, exist_ok=True)
    for old in (*(s.work / f"{name}{suffix}" for name in NAMES for suffix in SUFFIXES), *s.work.glob("logs/*.log")):
        old.unlink(missing_ok=True)
    # for every stage: nothing need be installed
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    document: dict[str, Any] = {}
    out = Path()

    def save(records: Sequence[Record]) -> None:
        nonlocal document, out
        document = results.collect(found, records, s.work, time.monotonic() - start)
        out = (args.out or RESULTS) / file_name(found["gpu"], document["date"])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")

    save([])
    runner = Runner(ROOT, s.work / "logs", done=save)
    groups = [[stage for stage in group if re.search(args.only, stage.name)] for group in plan(s)]
    spent = time.monotonic() - start
    records = runner.run([first], sum(stage.limit for stage in first)) if first else []
    if all(record["ok"] for record in records):
        records = runner.run(groups, args.seconds - spent)
    show(document, s.work, records, out)
    return int(not all(record["ok"] for record in records))


if __name__ == "__main__":
    # told to stop, it ends its stages and writes what it has, as it does on ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
