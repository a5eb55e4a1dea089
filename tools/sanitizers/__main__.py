"""``python -m tools.sanitizers address`` builds the extension under AddressSanitizer and UndefinedBehaviorSanitizer and
runs tests/sanitize.py on it, every kernel on tensors that end where their buffers end, and the tests of lists, noise,
threads, memory, overwriting, mixtures, experts, bounds, IVON, priors and hostile values. ``thread`` runs the kernels
without torch under ThreadSanitizer on 16 threads. Either first plants an error, which the sanitizer must report.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from tools import ROOT
from tools.sanitizers import builds

TESTS = (
    "security", "packed", "multi_tensor", "threads", "total_correlation", "memory", "noise", "overwrite", "mixtures",
    "experts_kernel", "bound_kernel", "ivon", "priors",
)  # fmt: skip
# what the sanitizer holds back is resident, 2^31 elements or a compiler take minutes, and what is not the CPU's kernels
LEFT_OUT = "not (resident or more_than or cuda or reference or compile)"
# the sanitized core or none; then a file of tests/ as a program, or pytest
OF_THE_BUILD = "import os, sys, vaefast; assert vaefast._native._C.__file__.startswith(os.getcwd()), vaefast.__file__; "
PROGRAM = OF_THE_BUILD + "import runpy; sys.argv.pop(0); sys.path.insert(0, os.path.dirname(sys.argv[0])); "
PROGRAM += "runpy.run_path(sys.argv[0], run_name='__main__')"
PYTEST = OF_THE_BUILD + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
# reads beyond a buffer of torch's, through an array that says it is longer
PAST_THE_END = (
    OF_THE_BUILD
    + """
import numpy, torch
class Longer:
    def __init__(self, t):
        self.t, at = t, (t.data_ptr(), False)
        self.__array_interface__ = {"shape": (t.numel() + 64,), "typestr": "<f4", "data": at, "version": 3}
long = torch.from_numpy(numpy.asarray(Longer(torch.zeros(1000))))
with vaefast.use_backend("native"):
    print(vaefast.gaussian_kl(long, long, reduction="sum"))
"""
)


def address(isa: str, every: int, tests: Sequence[str]) -> int:
    folder = builds.extension(isa)
    env = builds.environment(folder, isa)

    def python(code: str, *arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=env, cwd=folder, text=True, capture_output=capture)

    planted = python(PAST_THE_END, capture=True)
    if planted.returncode == 0 or "heap-buffer-overflow" not in planted.stderr:
        print(f"AddressSanitizer did not report the planted error: {planted.stdout}{planted.stderr[-3000:]}")
        return 1
    print("the planted error was reported", flush=True)
    began = time.monotonic()
    program = str(ROOT / "tests" / "sanitize.py")
    if python(PROGRAM, program, "--device", "cpu", "--every", str(every)).returncode:
        return 1
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in tests]
    options = [
        "-q",
        "-x",
        "-k",
        LEFT_OUT,
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(ROOT),
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    if python(PYTEST, *options, *files).returncode:
        return 1
    print(f"nothing found, in {time.monotonic() - began:.0f} s")
    return 0


def thread() -> int:
    driver = str(builds.driver())
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    planted = subprocess.run([driver, "--race"], text=True, capture_output=True, env=env)
    if planted.returncode == 0 or "data race" not in planted.stderr:
        print(f"ThreadSanitizer did not report the planted race: {planted.stdout}{planted.stderr[-3000:]}")
        return 1
    print("the planted race was reported", flush=True)
    return subprocess.run([driver], env=env).returncode


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="tools.sanitizers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("which", choices=("address", "thread"))
    p.add_argument("--isa", choices=[*builds.SETUP.SIMD], default="DEFAULT", help="address: whose kernels run")
    p.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth case of tests/sanitize.py")
    p.add_argument("--tests", nargs="*", default=TESTS, help="address: of tests/, without test_ and .py")
    args = p.parse_args(argv)
    return thread() if args.which == "thread" else address(args.isa, args.every, args.tests)


if __name__ == "__main__":
    raise SystemExit(main())
