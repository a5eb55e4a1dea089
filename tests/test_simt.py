"""The CUDA device code, executed on the CPU by the SIMT executor (simt/): the executor's tests, other tests through it,
mutants that they must catch, the lines that they reach, and the noise of both devices."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from simt.build import build, is_stale, library, write_mutant
from simt.coverage import line_counts, source_lines
from simt.environment import environment, pytest_command
from simt.mutants import MUTANTS, Mutant
from simt.noise import noise

HERE = Path(__file__).resolve().parent
# what concerns the CPU kernels alone, or draws more numbers than fibers can
NOT_HERE = "not reference and not ten_million and not statistics and not threads"
# each in an order of threads and blocks of its own
RUNS = {
    "kernels": ["simt"],
    "kl": ["test_kl.py", "test_likelihoods.py", "test_limits.py", "test_half.py", "-k", NOT_HERE],
    "layouts": ["test_layouts.py", "-k", NOT_HERE],
    # the graphs; numerical differentiation is thousands of launches, and the kernels' tests hold the values
    "gradients": ["test_gradients.py", "-k", f"{NOT_HERE} and not gradcheck"],
    "packed": ["test_packed.py", "-k", f"{NOT_HERE} and not gradcheck and not compiled"],
    "options": [
        "test_kl_options.py",
        "-k",
        f"{NOT_HERE} and not gradcheck and not twice and not compile and not for_its_mean",
    ],
    "lists": ["test_multi_tensor.py", "-k", f"{NOT_HERE} and not double and not compiled"],
    "latents": [
        "test_categorical_kernel.py",
        "test_experts_kernel.py",
        "test_total_correlation.py",
        "-k",
        f"{NOT_HERE} and not gradcheck and not differentiated and not memory and not compile",
    ],
    "mixtures": ["test_priors.py", "-k", f"{NOT_HERE} and not gradcheck and not 200 and (kernels or shares)"],
    # the bound itself is PyTorch's on a GPU
    "draws": ["test_bound_kernel.py", "-k", "latents or draws or priors or layouts or nothing or vanish"],
    "overwrite": ["test_overwrite.py", "-k", f"{NOT_HERE} and not compile and not allocates"],
}
# of the CPU's noise: a few units in the last place of the longest radius, 6.7; one rounding for half precision
AGREEMENT = {torch.float16: 4e-3, torch.bfloat16: 4e-2, torch.float32: 2e-6, torch.float64: 1e-12}

# seconds; the longest takes seven minutes where the machine is quiet
TIMEOUT = 2400

Run = subprocess.CompletedProcess[str]
Futures = dict[str, "Future[Run]"]


class Where(NamedTuple):
    """Which library, which order, and where its coverage counts go."""

    library: Path
    seed: int = 0
    counts: Path | None = None


def execute(command: list[str], where: Where) -> Run:
    """What hangs is ended, and what it said is kept."""
    python = [sys.executable, *command]
    options: Any = {"cwd": HERE.parent, "env": environment(*where), "capture_output": True, "text": True}
    try:
        return subprocess.run(python, timeout=TIMEOUT, **options)
    except subprocess.TimeoutExpired as late:
        said = ((text or b"").decode(errors="replace") for text in (late.stdout, late.stderr))
        return Run(python, -1, *said)


def execute_pytest(arguments: list[str], where: Where) -> Run:
    files = [str(HERE / word) if (HERE / word.split("::")[0]).exists() else word for word in arguments]
    return execute(pytest_command(["-q", "-x", "--tb=short", *files]), where)


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("counts")


@pytest.fixture(scope="module")
def runs(counts: Path) -> Iterator[Futures]:
    """All of them, as many at a time as there are cores."""
    build()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            name: pool.submit(execute_pytest, arguments, Where(library(), seed, counts))
            for seed, (name, arguments) in enumerate(RUNS.items())
        }


@pytest.fixture(scope="module")
def mutant_runs() -> Iterator[Futures]:
    fresh = [mutant for mutant in MUTANTS if not is_stale(mutant)]
    build(fresh)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            mutant.name: pool.submit(
                execute_pytest,
                [f"{mutant.of}::{mutant.test}", "-k", mutant.only],
                Where(library(mutant)),
            )
            for mutant in fresh
        }


@pytest.mark.parametrize("name", RUNS)
def test_passes_in_any_order_of_threads_and_blocks(runs: Futures, name: str) -> None:
    run = runs[name].result()
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-8000:]
    assert " passed" in run.stdout


def test_lines_are_reached(runs: Futures, counts: Path) -> None:
    for run in runs.values():
        run.result()
    found = line_counts(counts)
    assert {name for name, _ in found} >= {"kernel.cuh", "pack.cuh", "run.cuh"}
    missed = [line for line, count in found.items() if count == 0]
    reached = 1 - len(missed) / len(found)
    assert reached >= 0.95, f"{reached:.1%} of csrc/cuda's {len(found)} lines; not:\n{source_lines(missed)}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant_runs: Futures, mutant: Mutant) -> None:
    """The same test passes without the mutant: it is among the runs above."""
    write_mutant(mutant)
    run = mutant_runs[mutant.name].result()
    output = run.stdout + run.stderr
    assert run.returncode != 0, f"nothing noticed that {mutant.name}:\n{output[-3000:]}"
    assert re.search(mutant.shows, output), f"{mutant.name} showed as something else:\n{output[-8000:]}"


def test_noise_is_the_cpus(extension: object, tmp_path: Path) -> None:
    """Element by element; a wrong word would be off by about 1."""
    build()
    run = execute(["-m", "simt.noise", str(tmp_path / "noise")], Where(library()))
    assert run.returncode == 0, run.stdout + run.stderr
    theirs, ours = torch.load(tmp_path / "noise"), noise()
    assert theirs.keys() == ours.keys()
    for case, expected in ours.items():
        actual = theirs[case]
        assert actual.stride() == expected.stride(), case
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=AGREEMENT[expected.dtype], msg=lambda text, case=case: f"{case}: {text}"
        )
