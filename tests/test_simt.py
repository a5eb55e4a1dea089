"""The CUDA device code, executed on the CPU by the SIMT executor (simt/): the other tests once more, through it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# what concerns the CPU kernels alone, or draws more numbers than fibers can
NOT_HERE = "not reference and not ten_million and not statistics and not threads"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("files", [["test_kl.py", "test_likelihoods.py"], ["test_layouts.py", "test_half.py"]], ids=str)
def test_passes_in_any_order_of_threads_and_blocks(files: list[str], seed: int) -> None:
    options = ["-p", "simt.plugin", "-p", "no:cacheprovider", "-q", "-x", "-m", "not cuda", "-k", NOT_HERE]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(HERE / file) for file in files)],
        cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": str(HERE), "VAEFAST_SIMT_SEED": str(seed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-3000:]
    assert " passed" in run.stdout
