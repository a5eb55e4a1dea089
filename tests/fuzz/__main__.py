"""``PYTHONPATH=tests python -m fuzz [--minutes N] [--seed N] [--isa avx2 ...]``; ``--case "Case(...)"`` runs one again.

Each round is 2000 cases of a seed of its own, on one of the instruction sets, in a process of its own; on "executor" it
goes through the CUDA device code, as simt/ executes it, and leaves out the PyTorch engine's. What fails is made small
and printed, and its text is what ``--case`` takes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from simt.build import build, library
from simt.environment import LIBRARY, environment

if EXECUTED := LIBRARY in os.environ:
    import simt.plugin  # noqa: F401  (which takes the kernels' place before vaefast is imported)

import torch

from .cases import Case, Random, case_of, smallest
from .check import check

ISAS = ("default", "avx2", "avx512", "executor")


def failure_of(case: Case) -> Exception | None:
    try:
        check(case)
    except Exception as error:
        return error
    return None


def round_of(seed: int, count: int) -> int:
    """Runs so many cases; how many fail. Prints each failing one, made small."""
    failed = done = k = 0
    while done < count:
        case = case_of(Random((seed, k)))
        k += 1
        if EXECUTED and case.engine == "reference":
            continue
        done += 1
        error = failure_of(case)
        if error is not None:
            failed += 1
            kind = type(error)
            least = smallest(case, lambda other, kind=kind: type(failure_of(other)) is kind, 80)
            print(f"case {k - 1} of seed {seed}: {least!r}\n  {kind.__name__}: {failure_of(least)}", flush=True)
    return failed


def environment_of(isa: str) -> dict[str, str]:
    if isa == "executor":
        build()
        return environment(library())
    return {**os.environ, **({"ATEN_CPU_CAPABILITY": isa} if isa else {})}


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0, help="of the first round; each round takes the next")
    p.add_argument("--cases", type=int, default=2000, help="of a round")
    p.add_argument("--isa", nargs="*", choices=ISAS, help="instruction sets, by turns (default: this machine's)")
    p.add_argument("--case", help="run one case by its text")
    p.add_argument("--round", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    if args.case and args.isa:
        again = [sys.executable, "-m", "fuzz", "--case", args.case]
        return subprocess.run(again, env=environment_of(args.isa[0])).returncode
    if args.case:
        check(eval(args.case, {"Case": Case}))
        print("right")
        return 0
    if args.round:
        return min(1, round_of(args.seed, args.cases))
    isas = args.isa or [""]
    environments = {isa: environment_of(isa) for isa in isas}
    start, done, wrong, seed = time.monotonic(), 0, 0, args.seed
    while time.monotonic() < start + 60 * args.minutes:
        isa = isas[(seed - args.seed) % len(isas)]
        command = [sys.executable, "-m", "fuzz", "--round", "--seed", str(seed), "--cases", str(args.cases)]
        run = subprocess.run(command, env=environments[isa], capture_output=True, text=True)
        if run.returncode:  # a case that ends its process says so by its silence
            wrong += 1
            print(f"round {seed} {isa}:\n{run.stdout}{run.stderr[-2000:]}", flush=True)
        done, seed = done + args.cases, seed + 1
        rate = done / (time.monotonic() - start)
        print(f"{done} cases, {rate:.0f} a second, {wrong} rounds with failures", file=sys.stderr, flush=True)
    print(f"{done} cases of the seeds {args.seed} to {seed - 1}: failures in {wrong} of the {seed - args.seed} rounds")
    return min(1, wrong)


if __name__ == "__main__":
    raise SystemExit(main())
