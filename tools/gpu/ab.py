"""Which of several builds of the extension is faster: ``python -m tools.gpu.ab --out FOLDER before.so after.so``.

Each build is measured by benchmarks/kernels.py in a process of its own, in turn (A B, B A), so that what the machine
does meanwhile meets all alike. A build is tried in a copy of the package under build/ab; the checkout's own stays.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.gpu.plan import HOT

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "ab"
KERNELS = f"^({'|'.join((*HOT, 'posterior_forward kl', 'scale_'))})$"
ROUNDS = 2
Seconds = dict[tuple[str, str, int], dict[str, list[float]]]


def package(build: Path) -> Path:
    """A folder that holds the package with this extension in it."""
    folder = WORK / build.stem
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "vaefast", folder / "vaefast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(build, folder / "vaefast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    return folder


def measure(folder: Path, options: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """The records of one process, which must have run this folder's extension."""
    code = "import sys, vaefast; print(vaefast.__file__); from benchmarks.kernels import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT)))}
    command = [sys.executable, "-c", code, *options, "--out", str(out)]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if not run.stdout.startswith(str(folder)):
        raise SystemExit(f"{folder.name} did not load: {run.stderr.strip()}")
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def table(seconds: Seconds) -> str:
    """Medians in microseconds; behind the first's, how many times as fast the others are."""
    lines = []
    for (kernel, dtype, elements), by in seconds.items():
        medians = {name: statistics.median(times) for name, times in by.items()}
        first = next(iter(medians.values()))
        cells = "  ".join(f"{name} {1e6 * t:.1f} us ({first / t:.3f}x)" for name, t in medians.items())
        lines.append(f"{kernel:68} {dtype:9} {elements:>9}  {cells}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Compares; 1 if a kernel failed in one of the builds."""
    p = argparse.ArgumentParser(prog="tools.gpu.ab", description="builds of the extension, side by side")
    p.add_argument("builds", nargs="+", type=Path, metavar="BUILD.so")
    p.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    p.add_argument("--only", default=KERNELS, metavar="REGEX", help="kernels (default: the hottest)")
    p.add_argument("--elements", nargs="+", default=["16777216", "67108864"], metavar="N")
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], metavar="DTYPE")
    p.add_argument("--out", type=Path, default=WORK, metavar="FOLDER", help="for the records (default build/ab)")
    args = p.parse_args(argv)
    if len({build.stem for build in args.builds}) < len(args.builds):
        p.error("two builds have the same name")
    args.out.mkdir(parents=True, exist_ok=True)
    options = ["--device", args.device, "--only", args.only, "--elements", *args.elements, "--dtypes", *args.dtypes]
    folders = [package(build) for build in args.builds]
    seconds: Seconds = {}
    failed = False
    for turn in range(ROUNDS):
        for folder in folders if turn % 2 == 0 else reversed(folders):
            for r in measure(folder, options, args.out.resolve() / f"{folder.name}-{turn}.json"):
                if "error" in r:
                    failed = True
                    print(f"{folder.name}: {r['kernel']} {r['dtype']}: {r['error']}")
                    continue
                key = r["kernel"], r["dtype"], r["elements"]
                seconds.setdefault(key, {}).setdefault(folder.name, []).append(r["seconds"])
    print(table(seconds))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
