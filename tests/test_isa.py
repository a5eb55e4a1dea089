"""The tests marked ``isa`` once more for every instruction set that was built: users have others than this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vaefast import _build

HERE = Path(__file__).resolve().parent
ORDER = ["DEFAULT", "AVX2", "AVX512"]


@pytest.mark.parametrize("capability", ORDER)
def test_marked_tests_pass(extension: Any, capability: str) -> None:
    own = torch.backends.cpu.get_cpu_capability()
    if capability not in _build.info().cpu:
        pytest.skip(f"vaefast was built without {capability}")
    if own not in ORDER or ORDER.index(capability) > ORDER.index(own):
        pytest.skip(f"this machine runs {own}, which is not above {capability}")
    if capability == own:
        pytest.skip(f"{capability} is what the rest of this run tests")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "isa and not cuda", "-k", "not reference"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(HERE)],
        cwd=HERE.parent,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability.lower(), "VAEFAST_EXPECT_ISA": capability},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:]


@pytest.mark.isa
def test_the_instruction_set_is_the_one_asked_for(extension: Any) -> None:
    expected = os.environ.get("VAEFAST_EXPECT_ISA")
    if expected is not None:
        assert extension.cpu_capability() == expected
