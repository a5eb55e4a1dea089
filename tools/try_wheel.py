"""A wheel as a user gets it: in a new environment that has a torch and no compiler on its PATH, every operator against
float64, values and gradients.

    python -m tools.try_wheel --torch 2.15.0 [--python .venv-2.15/bin/python] [WHEEL]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# what the checks are made of; not the package, which is the wheel's
CHECKS = ("tools", "benchmarks", "tests")
# seconds: torch's import, and with vaefast's
IMPORTS = """
import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import vaefast; c = time.perf_counter()
print(f"import torch {b - a:.2f} s, vaefast {1000 * (c - b):.0f} ms more")
print(vaefast.__file__)
print(vaefast.show_config())
assert "cpu" in vaefast.available_backends(), "no kernels"
"""


def newest(folder: Path) -> Path:
    tag = sys.implementation.cache_tag.replace("cpython-", "cp")
    wheels = sorted(folder.glob(f"vaefast-*-{tag}-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise SystemExit(f"{folder} has no wheel for {tag}; make wheel makes one")
    return wheels[-1]


def environment(folder: Path, torch: str) -> Path:
    """Its Python, with torch and what comes with it."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", f"torch=={torch}", "numpy"], check=True)
    return python


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="tools.try_wheel", description="checks a wheel as a user gets it")
    p.add_argument("wheel", nargs="?", type=Path, help="default: the newest for this Python in dist/")
    p.add_argument("--torch", required=True, help="the version of torch to try it with")
    p.add_argument("--python", type=Path, help="of an environment that has that torch; default: one is made")
    args = p.parse_args(argv)
    tag = f"{sysconfig.get_python_version()}-torch-{args.torch}"
    python = args.python or environment(ROOT / "build" / f"try-{tag}", args.torch)
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "site")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
        subprocess.run([*pip, str(args.wheel or newest(ROOT / "dist"))], check=True)
        for name in CHECKS:
            shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
        env = {
            "PATH": str(python.parent),
            "HOME": os.environ.get("HOME", folder),
            "PYTHONPATH": f"{site}:{folder}:{folder}/tests",
        }
        subprocess.run([str(python), "-c", IMPORTS], cwd=folder, env=env, check=True)
        smoke = [str(python), "-m", "tools.gpu.smoke", "--device", "cpu", "--out", str(Path(folder, "smoke.json"))]
        return subprocess.run(smoke, cwd=folder, env=env).returncode


if __name__ == "__main__":
    raise SystemExit(main())
