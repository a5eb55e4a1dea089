"""The environment in which pytest meets the device code: sanitizers loaded first, memory poisoned."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from .build import COMPILER, FOLDER, HERE, ROOT

LIBRARY = "VAEFAST_SIMT_LIBRARY"
ASAN_OPTIONS = {
    # Python and torch leave much behind at exit
    "detect_leaks": 0,
    # every block starts as 0xff, a NaN in any floating dtype: an element that no kernel writes shows
    "malloc_fill_byte": 255,
    "max_malloc_fill_size": 2**30,
    # what a read or write must jump over to land in the next block unnoticed
    "redzone": 128,
    "quarantine_size_mb": 16,
}


def compilers_own(name: str) -> str:
    command = [*shlex.split(COMPILER), f"-print-file-name={name}"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        raise RuntimeError(f"{COMPILER} has no {name}, with which the executor is built: use g++ (CXX=g++)")
    return path


def environment(library: Path, seed: int = 0, counts: Path | None = None) -> dict[str, str]:
    """counts: the folder that gets the coverage counts, if they are wanted."""
    # Python does not bring libstdc++, whose exceptions AddressSanitizer wants to see from the start
    preload = " ".join(compilers_own(name) for name in ("libasan.so", "libstdc++.so"))
    return {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": ":".join(f"{key}={value}" for key, value in ASAN_OPTIONS.items()),
        "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(ROOT))),
        "VAEFAST_SIMT_SEED": str(seed),
        LIBRARY: str(library),
        "GCOV_PREFIX": str(counts or FOLDER / "counts"),
        # one process, one core: several run beside each other
        "OMP_NUM_THREADS": "1",
    }


def pytest_command(arguments: list[str]) -> list[str]:
    """For the Python of choice. What a sanitizer says before it ends the process is not captured."""
    plugins = ["-p", "simt.plugin", "-p", "no:cacheprovider", "--capture=sys", "-o", "faulthandler_timeout=600"]
    return ["-m", "pytest", *plugins, "-m", "not cuda and not install", *arguments]
