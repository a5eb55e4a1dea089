"""Compiles the kernels for one architecture, without torch, and keeps what came out under ``build/``."""

from __future__ import annotations

import hashlib
import os
import shutil
from functools import cache
from pathlib import Path

from kept import kept

from cuda_build.binary import Missing, output

ROOT = Path(__file__).resolve().parents[2]
# kernels of an arithmetic type; on the plain path, whose arithmetic is float, of operands that hold a type; and of what
# is no job's
UNITS = {
    "float": ("kernels.cu", "VAEFAST_ARITHMETIC=float"),
    "double": ("kernels.cu", "VAEFAST_ARITHMETIC=double"),
    "plain-float32": ("kernels.cu", "VAEFAST_PLAIN=float"),
    "plain-float16": ("kernels.cu", "VAEFAST_PLAIN=__half"),
    "plain-bfloat16": ("kernels.cu", "VAEFAST_PLAIN=__nv_bfloat16"),
    "alone-float": ("alone.cu", "VAEFAST_ARITHMETIC=float"),
    "alone-double": ("alone.cu", "VAEFAST_ARITHMETIC=double"),
}


def nvcc() -> str:
    """The path of the CUDA compiler."""
    if found := shutil.which("nvcc"):
        return found
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if Path(home, "bin", "nvcc").exists():
        return str(Path(home, "bin", "nvcc"))
    raise Missing("no nvcc in PATH or CUDA_HOME; install the CUDA toolkit")


def _command(unit: str, arch: int) -> list[object]:
    source, define = UNITS[unit]
    options = ["-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", f"-D{define}"]
    return [nvcc(), *options, Path(__file__).with_name(source)]


@cache
def _key(unit: str, arch: int) -> str:
    """Changes with all that the machine code follows from: of the sources those that the unit includes."""
    digest = hashlib.sha256(f"{UNITS[unit]} {arch} {output(nvcc(), '--version')}".encode())
    read = output(*_command(unit, arch), "-MM").replace("\\\n", " ").split()
    for file in sorted({Path(name).resolve() for name in read if name.startswith(str(ROOT))}):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def cubin(unit: str, arch: int) -> Path:
    """The kernels of a unit for sm_``arch``; about a minute where they are not kept from before."""
    return kept(
        "cuda-units", f"{unit}-sm_{arch}", _key(unit, arch), ".cubin",
        lambda out: output(*_command(unit, arch), "-cubin", "-o", out),
    )  # fmt: skip
