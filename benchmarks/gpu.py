"""``make gpu``: everything that takes a GPU, in one command under nine minutes: builds, tests, sanitizes, measures.

Nothing is downloaded and nothing is installed: the Python that runs this has torch with CUDA, and the compiled core is
built in place for the GPU that is there. What was found goes to benchmarks/results/<gpu>-<date>.json and a table, also
where a stage failed or was cut short. The exit status is 1 if a stage failed, 2 if this machine cannot run it at all.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # python benchmarks/gpu.py has benchmarks/ there instead

from benchmarks import stages  # noqa: E402
from benchmarks.facts import commit, file_name, first_line  # noqa: E402
from benchmarks.stages import SECONDS, Stage  # noqa: E402

WORK = ROOT / "build" / "gpu"
RESULTS = ROOT / "benchmarks" / "results"
PREDICTIONS = ROOT / "benchmarks" / "predictions.json"
TOTAL = 520.0  # seconds for all stages
TESTED_WITH = ("pytest", "hypothesis", "mpmath", "scipy", "numpy", "ninja", "setuptools")
OLDEST_SETUPTOOLS = 77
PROVIDERS = "eager,compile,eager+graph,vaefast,vaefast+compile,vaefast+graph"


class Unfit(Exception):
    """This machine cannot run the stages; the message says what is missing."""


def setup_py() -> ModuleType:
    """setup.py, which knows where nvcc is."""
    spec = importlib.util.spec_from_file_location("vaefast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_gpu() -> dict[str, Any]:
    """The GPU and what builds for it.

    Raises:
        Unfit: there is no torch with CUDA, no GPU that it sees, no nvcc of its CUDA, or a Python package is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise Unfit(f"{sys.executable} cannot import torch ({error}): make gpu PYTHON=..., one that has it") from None
    if torch.version.cuda is None:
        raise Unfit(f"torch {torch.__version__} of {sys.executable} has no CUDA: make gpu PYTHON=..., one that has")
    if not torch.cuda.is_available():
        raise Unfit(
            f"torch {torch.__version__} sees no CUDA device (CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): run it where `nvidia-smi` lists a GPU"
        )
    absent = [name for name in TESTED_WITH if importlib.util.find_spec(name) is None]
    if absent:
        raise Unfit(f"{sys.executable} lacks {', '.join(absent)}: pip install {' '.join(absent)}")
    import setuptools

    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise Unfit(f"setuptools {setuptools.__version__} is too old: pip install 'setuptools>={OLDEST_SETUPTOOLS}'")
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    builder = setup_py()
    os.environ["TORCH_CUDA_ARCH_LIST"] = capability
    os.environ.pop("VAEFAST_FORCE_CPU", None)
    try:
        toolkit, _ = builder.find_cuda(torch)  # sets CUDA_HOME
    except builder.Missing as missing:
        raise Unfit(str(missing)) from None
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": capability,
        "memory": torch.cuda.get_device_properties(0).total_memory,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": toolkit,
        "cores": os.cpu_count(),
    }


def find_sanitizer(environ: Mapping[str, str] = os.environ) -> str | None:
    """compute-sanitizer, from PATH or next to nvcc."""
    nvcc = shutil.which("nvcc")
    homes = [environ.get("CUDA_HOME"), str(Path(nvcc).resolve().parents[1]) if nvcc else None, "/usr/local/cuda"]
    places = [Path(home, folder) for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([environ.get("PATH", ""), *map(str, places)]))


def judge_control(status: int, output: str) -> str:
    """The sanitizer must have found the error that was planted."""
    found = "Invalid __global__" in output
    return "" if status and found else "memcheck did not report a read past the end of a buffer"


def plan(cores: int, sanitizer: str | None, xdist: bool) -> list[list[Stage]]:
    """The stages by group; those of a group run side by side."""
    python = sys.executable
    # --dist load: tests are short and of many files; a process each would outnumber the GPU's patience
    processes = ["-n", str(max(1, min(8, cores // 2))), "--dist", "load"] if xdist else []
    pytest = [python, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider", "--durations", "5"]
    few_threads = {"OMP_NUM_THREADS": "2"}  # many processes share the cores
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor")}

    def bench(name: str, limit: float, promised: float, *options: str) -> Stage:
        command = [python, "-m", "benchmarks", "--device", "cuda", "--deadline", SECONDS, *options]
        return Stage(name, [*command, "--out", str(WORK / f"{name}.json")], limit, promised, cache, "build")

    # a buffer of its own for every tensor, so that its end is the end of what may be touched
    exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    missing = "" if sanitizer else "there is no compute-sanitizer in PATH or next to nvcc: install the CUDA toolkit's"

    def sanitize(name: str, *options: str, **more: Any) -> Stage:
        tool = name.split()[0]
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        # torch asks the driver for what it may not have, which is no error of a kernel
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []
        command += [python, "tests/sanitize.py", "--device", "cuda", *options]
        return Stage(name, command, 170, 60, env=exact, needs="build", missing=missing, **more)

    build = Stage(
        "build",
        [python, "setup.py", "build_ext", "--inplace"],
        300,
        env={
            "VAEFAST_FORCE_CUDA": "1",
            "MAX_JOBS": str(cores),
            # for the sanitizer's messages; the code is the same
            "NVCC_APPEND_FLAGS": f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -lineinfo".strip(),
        },
    )
    proof = [
        Stage("cuda", [*pytest, "tests/test_cuda.py"], 170, 60, few_threads, "build"),
        Stage("tests", [*pytest, *processes, "--ignore", "tests/test_cuda.py"], 170, 60, few_threads, "build"),
        sanitize("memcheck", "--seconds", SECONDS),
        sanitize("racecheck", "--seconds", SECONDS),
        sanitize("memcheck control", "--past-the-end", judge=judge_control),
        # these fill Inductor's cache beside the tests, so that compiling does not eat the time that is for measuring
        bench("compile", 170, 60, "--providers", "compile,vaefast+compile", "--budget", "0"),
        bench("compile-sweep", 170, 60, "--sweep", "--providers", "compile", "--budget", "0"),
    ]
    kernels = [python, "-m", "benchmarks.kernels", "--out", str(WORK / "kernels.json")]
    measure = [
        Stage("kernels", kernels, 60, 20, needs="build"),
        bench("benchmarks", 200, 70, "--providers", PROVIDERS, "--budget", "1"),
        bench("sweep", 150, 50, "--sweep", "--budget", "0.5"),
    ]
    return [[build], proof, *([stage] for stage in measure)]


def read(file: Path) -> Any:
    """What a stage wrote, or None."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text())
    return None


def compare(measured: Sequence[dict[str, Any]], predictions: Any, gpu: str) -> list[dict[str, Any]]:
    """Each measured kernel beside the share of a copy's speed that was predicted for this GPU, where it was."""
    shares = {
        (p["kernel"], p["dtype"]): p["share"] for p in (predictions or {}).get("predictions", []) if p["gpu"] in gpu
    }
    return [
        {**record, "predicted": shares[key]}
        for record in measured
        if (key := (record["kernel"], record["dtype"])) in shares and "error" not in record
    ]


def comparison(rows: Sequence[dict[str, Any]]) -> str:
    """The table of measured and predicted shares."""
    lines = [f"{'kernel':48} {'dtype':9} {'elements':>10} {'measured':>9} {'predicted':>9}"]
    for r in rows:
        share, predicted = f"{r['of_copy']:.0%}", f"{r['predicted']:.0%}"
        lines.append(f"{r['kernel']:48} {r['dtype']:9} {r['elements']:>10} {share:>9} {predicted:>9}")
    return "\n".join(lines)


def collect(machine: dict[str, Any], records: Sequence[stages.Record], seconds: float) -> dict[str, Any]:
    """The results document."""
    kernels = read(WORK / "kernels.json") or []
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine,
        "seconds": round(seconds, 1),
        "stages": list(records),
        "kernels": kernels,
        "predictions": compare(kernels, read(PREDICTIONS), machine["gpu"]),
        "documents": [d for name in ("benchmarks", "sweep") if (d := read(WORK / f"{name}.json"))],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; 1 if one failed, 2 if none can run here."""
    p = argparse.ArgumentParser(prog="benchmarks.gpu", description="builds, tests, sanitizes and measures on a GPU")
    p.add_argument(
        "--total", type=float, default=TOTAL, metavar="SECONDS", help=f"for all stages (default {TOTAL:.0f})"
    )
    p.add_argument("--only", default="", metavar="REGEX", help="some stages: build, cuda, tests, memcheck, ...")
    p.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/<gpu>-<date>.json")
    args = p.parse_args(argv)
    start = time.monotonic()
    try:
        machine = find_gpu()
    except Unfit as unfit:
        print(f"make gpu cannot run here: {unfit}", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    WORK.mkdir(parents=True, exist_ok=True)
    for stale in WORK.glob("*.json"):
        stale.unlink()
    groups = plan(machine["cores"] or 1, find_sanitizer(), importlib.util.find_spec("xdist") is not None)
    groups = [[stage for stage in group if re.search(args.only, stage.name)] for group in groups]
    records = stages.run(groups, args.total, ROOT, WORK / "logs")
    document = collect(machine, records, time.monotonic() - start)
    out = args.out or RESULTS / file_name(machine["gpu"], document["date"])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    for name in ("kernels", "benchmarks", "sweep"):
        with contextlib.suppress(OSError):
            print((WORK / "logs" / f"{name}.log").read_text())
    if document["predictions"]:
        print(comparison(document["predictions"]))
    print(stages.summary(records))
    print(f"\n{machine['gpu']}: {document['seconds']:.0f} s; written: {out}")
    return int(not all(record["ok"] for record in records))


if __name__ == "__main__":
    # told to stop, it ends its stages and writes what it has, as it does on ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
