"""What runs on a GPU, in which order, for how long: the answers that are worth most come first."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.gpu.stages import SECONDS, UNTIL, Stage

SECONDS_IN_ALL = 400.0  # a build not counted
BEFORE = 20.0  # of them until the first stage begins: Python, torch, facts
BUILD_SECONDS = 600.0
PARTLY = re.compile(r"only (\d+) of \d+ cases ran")
CLEAN = ("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards")
# from a VAE of digits to one of large pictures; large latents, weights, counts, a hierarchy, classes
WALL = "^(small-vae-bce|small-vae-gaussian|image-vae-bce|highres-vae-bce|sample-kl|bnn|zinb|hierarchy|categorical)$"
PROVIDERS = "eager,compile,eager+graph,vaefast,vaefast+graph"
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats", "SchedulerStats")
HOT = (
    "posterior_forward sample, kl",
    "reconstruction_forward bernoulli 1, gradient",
    "posterior_backward sample, kl",
    "posterior_forward sample",
    "reconstruction_forward zero_inflated_negative_binomial 3, gradient",
    "reconstruction_forward categorical 1, gradient",
)
ELEMENTS = ("16777216", "67108864")  # 64 and 256 MB of float32


@dataclass(frozen=True)
class Setting:
    """Where and how the stages run.

    Args:
        work: what they leave: JSON files.
        cache: what later stages or runs take up again.
        device: cuda, or the CPU in its place.
        dry: a few of each, to try the stages.
        cores: of the machine.
        sanitizer: compute-sanitizer, where it is.
        alone: its options that leave other packages' kernels out.
        ncu: where it is.
        xdist: whether tests can be dealt out to processes.
    """

    work: Path
    cache: Path
    device: str = "cuda"
    dry: bool = False
    cores: int = 1
    sanitizer: str | None = None
    alone: Sequence[str] = ()
    ncu: str | None = None
    xdist: bool = False

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    def file(self, name: str) -> str:
        return str(self.work / f"{name}.json")

    def module(self, name: str, *options: str) -> list[str]:
        return [sys.executable, "-m", name, "--device", self.device, *options]


def read(file: Path) -> Any:
    """What a stage wrote, or None."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


# -- verdicts


def judge_control(status: int, output: str) -> str:
    """The sanitizer must have found the error that was planted."""
    found = "Invalid __global__" in output
    return "" if status and found else "memcheck did not report a read past the end of a buffer"


def judge_sanitizer(status: int, output: str) -> str:
    """Clean as far as it came is clean."""
    partly = PARTLY.search(output)
    clean = partly and int(partly[1]) and any(line in output for line in CLEAN)
    return "" if not status or clean else f"exit status {status}"


def judge_tests(file: Path) -> Callable[[int, str], str]:
    """No failure among those that ran, some of which there must be."""

    def judge(status: int, output: str) -> str:
        found = read(file) or {"outcomes": {}, "failures": []}
        if found["failures"]:
            return f"{len(found['failures'])} failed, the first {found['failures'][0]['test']}"
        return "" if found["outcomes"].get("passed") and status in (0, 2) else f"exit status {status}"

    return judge


def judge_ncu(status: int, output: str) -> str:
    if "ERR_NVGPUCTRPERM" in output:
        return "the driver keeps its counters from this user (ERR_NVGPUCTRPERM)"
    return f"exit status {status}" if status else ""


# -- stages


def build(env: dict[str, str]) -> Stage:
    """Makes the extension in place."""
    return Stage("build", [sys.executable, "setup.py", "build_ext", "--inplace"], BUILD_SECONDS, BUILD_SECONDS, env)


def smoke(s: Setting) -> Stage:
    few = ["--every", "60"] if s.dry else []
    command = s.module("tools.gpu.smoke", "--until", UNTIL, "--out", s.file("smoke"), *few)
    # what is right is computed by a few of a machine's cores; more threads than there are would wait for each other
    threads = {"OMP_NUM_THREADS": str(min(8, os.cpu_count() or 1))}
    return Stage("smoke", command, 75, 45, threads, resumes=8, tells="^smoke: ")


def tests(s: Setting, name: str, processes: int, *options: str) -> Stage:
    mark = "cuda" if s.gpu else "not cuda and not install and not cuda_build and not pypi"
    command = [sys.executable, "-m", "pytest", "-m", mark, "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "tools.gpu.outcomes", "--stop-after", SECONDS, "--outcomes", s.file(name), *options]
    # short tests of many files, dealt out a few at a time
    command += ["-n", str(processes), "--dist", "load", "--maxschedchunk", "4"] if s.xdist and not s.dry else []
    judge = judge_tests(s.work / f"{name}.json")
    # many processes share the cores
    env = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    # a test takes up to 14 s, and every worker ends its own
    return Stage(name, command, 190, 150, env, judge=judge, tells="^outcomes: ", margin=20)


def sanitize(s: Setting, name: str, *options: str, tells: str, judge: Callable[[int, str], str]) -> Stage:
    tool = name.split()[0]
    command = [s.sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--print-limit", "20"]
    # torch asks the driver for what it may not have, which is no error of a kernel
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    program = [sys.executable, "tests/sanitize.py", "--device", s.device, *options]
    absent = "there is no compute-sanitizer in PATH or next to nvcc: install the CUDA toolkit's"
    return Stage(
        name,
        [*command, *s.alone, *program] if s.gpu else program,
        190,
        150,
        # a buffer of its own for every tensor, so that its end is the end of what may be touched
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"},
        missing="" if s.sanitizer or not s.gpu else absent,
        judge=judge if s.gpu else judge_sanitizer,
        tells=tells,
    )


def bench(s: Setting, name: str, limit: float, promised: float, *options: str) -> Stage:
    command = s.module("benchmarks", "--deadline", SECONDS, *options, "--out", s.file(name), "--resume")
    env = {"TORCHINDUCTOR_CACHE_DIR": str(s.cache / "inductor"), "TRITON_CACHE_DIR": str(s.cache / "triton")}
    # a dry run tries the stages, not the compiler
    env |= {"TORCHDYNAMO_DISABLE": "1"} if s.dry else {}
    return Stage(name, command, limit, promised, env, resumes=4, tells="at worst|^written|nothing was measured")


def nccl(s: Setting) -> Stage:
    """A process group of one rank, as a training loop uses it; on a CPU it is gloo's."""
    command = [sys.executable, "examples/ddp_vae.py", "--device", s.device, "--epochs", "2"]
    command += ["--out", str(s.cache / "ddp")]
    return Stage("nccl", command, 90, 40, {"NCCL_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "2"}, tells="epoch 2")


def proof(s: Setting) -> list[Stage]:
    """Side by side: tests, sanitizers, NCCL; and Inductor's cache is filled, so that compiling does not eat the time
    that is for measuring."""
    few = ["-k", "test_generator_state or test_replays or test_the_same_bits"] if s.dry else []
    rest = ["tests/test_half.py"] if s.dry else ["--ignore=tests/test_cuda.py", "--ignore=tests/test_distributed.py"]
    half = max(2, min(10, s.cores // 2))
    until = ["--until", UNTIL, *(["--every", "60"] if s.dry else [])]
    wall = "^small-vae-bce$" if s.dry else WALL
    return [
        tests(s, "cuda", 2, "tests/test_cuda.py", *few),
        tests(s, "tests", half - 2 or 1, *rest),
        sanitize(s, "memcheck", *until, tells="cases ran", judge=judge_sanitizer),
        sanitize(s, "racecheck", *until, tells="cases ran", judge=judge_sanitizer),
        sanitize(s, "memcheck control", "--past-the-end", tells="Invalid|read past", judge=judge_control),
        nccl(s),
        bench(s, "compile", 190, 150, "--filter", wall, "--providers", "compile", "--budget", "0"),
    ]


def kernels(s: Setting) -> Stage:
    dtypes = ["float32"] if s.dry else ["float32", "bfloat16", "float64"]
    elements = ["4096"] if s.dry else ELEMENTS
    command = s.module("benchmarks.kernels", "--dtypes", *dtypes, "--elements", *elements)
    command += ["--deadline", SECONDS, "--out", s.file("kernels"), "--resume"]
    return Stage("kernels", command, 90, 60, resumes=8, tells="^kernels: ")


def wall(s: Setting) -> Stage:
    some, budget = ("^small-vae-bce$", "0.05") if s.dry else (WALL, "0.4")
    return bench(s, "wall", 130, 85, "--filter", some, "--providers", PROVIDERS, "--budget", budget)


def ncu(s: Setting) -> Stage:
    program = s.module("tools.gpu.hot", *(["--elements", "4096"] if s.dry else []))
    command = [s.ncu or "ncu", "--csv", "--page", "details", "--profile-from-start", "off", "--clock-control", "none"]
    command += ["--target-processes", "application-only", *(w for name in SECTIONS for w in ("--section", name))]
    missing = "" if s.ncu or not s.gpu else "there is no ncu in PATH or next to nvcc: install Nsight Compute"
    return Stage(
        "ncu", [*command, *program] if s.gpu else program, 70, 40, missing=missing, judge=judge_ncu, tells="^hot: "
    )


def plan(s: Setting) -> list[list[Stage]]:
    """The stages by group; those of a group run side by side."""
    return [[smoke(s)], proof(s), [kernels(s)], [wall(s)], [ncu(s)]]
