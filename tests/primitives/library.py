"""primitives.cpp as a library, for an instruction set or for the SIMT executor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from kept import kept
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from tools import setup_py  # noqa: E402

SIMT = HERE.parent / "simt"
ORDER = ("DEFAULT", "AVX2", "AVX512")
TARGETS = (*ORDER, "SIMT")
CHUNK = 64  # what every vector's length divides


class Entry(NamedTuple):
    index: int
    form: str
    results: tuple[str, ...]
    arguments: int


def _compiler() -> str:
    asked = os.environ.get("CXX")
    for command in [asked] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(command.split()[0]):
            return command
    pytest.skip("no C++ compiler compiles the primitives; install g++ or set CXX")


class Library:
    """The primitives of one target, compiled when first asked for and when their sources change."""

    def __init__(self, target: str) -> None:
        own = torch.backends.cpu.get_cpu_capability()
        setup = setup_py()
        if target in ORDER and "x86_64" in os.uname().machine:
            if own not in ORDER or ORDER.index(target) > ORDER.index(own):
                pytest.skip(f"this machine runs {own}, which is not above {target}")
            flags = setup.kernel_flags(target, _compiler())
            sources = [HERE / "primitives.cpp"]
        elif target == "SIMT":
            flags = [*setup.KERNEL_FLAGS, "-include", str(SIMT / "simt.h")]
            sources = [HERE / "primitives.cpp", SIMT / "simt.cpp"]
        elif target == "DEFAULT":
            flags, sources = setup.kernel_flags(target, _compiler()), [HERE / "primitives.cpp"]
        else:
            pytest.skip(f"{target} is for x86-64")
        command = [
            *_compiler().split(),
            *("-std=c++20", "-shared", "-fPIC", *setup.CXX_FLAGS, *flags),
            *("-fvisibility=default", f"-I{ROOT / 'csrc'}"),
            *(f"-isystem{path}" for path in cpp_extension.include_paths()),
            *map(str, sources),
            *(f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu", "-ldl"),
        ]
        read = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cpu").glob("*.h"), SIMT / "simt.h", *sources]
        digest = hashlib.sha256("\n".join([torch.__version__, *command]).encode())
        for path in sorted(read):
            digest.update(path.read_bytes())

        def compile_to(out: Path) -> None:
            built = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
            assert built.returncode == 0, built.stderr[-6000:]

        self._library = ctypes.CDLL(str(kept("primitives", target, digest.hexdigest()[:16], ".so", compile_to)))
        self._library.describe.restype = ctypes.c_char_p
        self.entries: dict[str, list[Entry]] = {}
        for index, line in enumerate(self._library.describe().decode().splitlines()):
            form, name, results, arguments = line.split("|")
            self.entries.setdefault(name, []).append(Entry(index, form, tuple(results.split() or [""]), int(arguments)))

    def run(self, entry: Entry, arguments: Sequence[np.ndarray]) -> list[np.ndarray]:
        """All results; the arguments are padded with their last element."""
        dtype, n = arguments[0].dtype, len(arguments[0])
        padded = [np.concatenate([a, np.repeat(a[-1:], -n % CHUNK)]) for a in arguments]
        outs = [np.zeros_like(padded[0]) for _ in entry.results]
        scalar = ctypes.c_float if dtype == np.float32 else ctypes.c_double

        def pointers(arrays: Sequence[np.ndarray]) -> Any:
            return (ctypes.POINTER(scalar) * len(arrays))(*(a.ctypes.data_as(ctypes.POINTER(scalar)) for a in arrays))

        function = self._library.run_float if dtype == np.float32 else self._library.run_double
        function(entry.index, pointers(padded), pointers(outs), len(outs), ctypes.c_int64(len(padded[0])))
        return [out[:n] for out in outs]
