"""``PYTHONPATH=tests python -m fuzz [--minutes N] [--seed N] [--isa avx2 ...]``; ``--case "Case(...)"`` runs one again.

Each round is 2000 cases of a seed of its own, on one of the instruction sets, in a process of its own. What fails is
made small and printed, and its text is what ``--case`` takes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from .cases import Case, Random, case_of, smallest
from .check import check

ISAS = ("default", "avx2", "avx512")


def failure_of(case: Case) -> Exception | None:
    try:
        check(case)
    except Exception as error:
        return error
    return None


def round_of(seed: int, count: int) -> int:
    """Runs so many cases; how many fail. Prints each failing one, made small."""
    failed = 0
    for k in range(count):
        case = case_of(Random((seed, k)))
        error = failure_of(case)
        if error is not None:
            failed += 1
            kind = type(error)
            least = smallest(case, lambda other, kind=kind: type(failure_of(other)) is kind, 80)
            print(f"case {k} of seed {seed}: {least!r}\n  {kind.__name__}: {failure_of(least)}", flush=True)
    return failed


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
    if args.case:
        check(eval(args.case, {"Case": Case}))
        print("right")
        return 0
    if args.round:
        return min(1, round_of(args.seed, args.cases))
    end, done, wrong, seed = time.monotonic() + 60 * args.minutes, 0, 0, args.seed
    isas = args.isa or [""]
    while time.monotonic() < end:
        isa = isas[(seed - args.seed) % len(isas)]
        environment = {**os.environ, **({"ATEN_CPU_CAPABILITY": isa} if isa else {})}
        command = [sys.executable, "-m", "fuzz", "--round", "--seed", str(seed), "--cases", str(args.cases)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:  # a case that ends its process says so by its silence
            wrong += 1
            print(f"round {seed} {isa}:\n{run.stdout}{run.stderr[-2000:]}", flush=True)
        done, seed = done + args.cases, seed + 1
        print(f"{done} cases, {wrong} rounds with failures", file=sys.stderr, flush=True)
    print(f"{done} cases of the seeds {args.seed} to {seed - 1}: failures in {wrong} of the {seed - args.seed} rounds")
    return min(1, wrong)


if __name__ == "__main__":
    raise SystemExit(main())
