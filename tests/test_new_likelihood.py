"""What docs/extending.md claims: a new likelihood is one struct and one reference entry, and the tests pick it up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def block(language: str, holds: str) -> str:
    """The page's code block of a language that holds some text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    (found,) = [text for text in blocks if holds in text]
    return str(found)


@pytest.mark.install
def test_a_likelihood_takes_two_entries(tmp_path: Path) -> None:
    copy = tmp_path / "vaefast"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "out", "*.so", "_build_info.py")
    )
    struct, entry = block("cpp", "struct Exponential"), block("python", 'LIKELIHOODS["exponential"]')
    header, registry = copy / "csrc" / "likelihoods" / "positive.h", copy / "vaefast" / "likelihoods.py"
    text, listed = re.subn(
        r"(using PositiveLikelihoods =\s*TypeList<[^>]*)>;",
        lambda m: f"{struct}\n{m[1]}, Exponential>;",
        header.read_text(),
    )
    assert listed == 1
    header.write_text(text)
    registry.write_text(registry.read_text() + "\n\n" + entry)

    env = {**os.environ, "PYTHONPATH": str(copy)}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=copy, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    tests = [
        "tests/test_registry.py",
        "tests/test_likelihoods.py",
        "tests/test_gradients.py",
        "-k",
        "(registr or exponential) and not documentation",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not cuda", *tests],
        cwd=copy,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:]
    assert int(re.findall(r"(\d+) passed", run.stdout)[0]) > 20, run.stdout[-2000:]
