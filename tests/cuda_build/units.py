"""Compiles the kernels for one architecture, without torch, and keeps what came out under ``build/``."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from kept import kept

from cuda_build.binary import Missing, output

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("kernels.cu")
# kernels of an arithmetic type; on the plain path, whose arithmetic is float, of operands that hold a type; and of what
# is no job's
UNITS = {
    "float": "VAEFAST_ARITHMETIC=float",
    "double": "VAEFAST_ARITHMETIC=double",
    "plain-float32": "VAEFAST_PLAIN=float",
    "plain-float16": "VAEFAST_PLAIN=__half",
    "plain-bfloat16": "VAEFAST_PLAIN=__nv_bfloat16",
    "alone-float": "VAEFAST_ALONE=float",
    "alone-double": "VAEFAST_ALONE=double",
}


def nvcc() -> str:
    """The path of the CUDA compiler."""
    if found := shutil.which("nvcc"):
        return found
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if Path(home, "bin", "nvcc").exists():
        return str(Path(home, "bin", "nvcc"))
    raise Missing("no nvcc in PATH or CUDA_HOME; install the CUDA toolkit")


def _key(unit: str, arch: int) -> str:
    """Changes with all that the machine code follows from."""
    digest = hashlib.sha256(f"{UNITS[unit]} {arch} {output(nvcc(), '--version')}".encode())
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "likelihoods").glob("*.h")]
    for file in [SOURCE, *sorted(headers), *sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))]:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def cubin(unit: str, arch: int) -> Path:
    """The kernels of a unit for sm_``arch``; about a minute where they are not kept from before."""
    options = ["-std=c++17", "-O3", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}", f"-D{UNITS[unit]}"]
    return kept(
        "cuda-units", f"{unit}-sm_{arch}", _key(unit, arch), ".cubin",
        lambda out: output(nvcc(), *options, "-cubin", SOURCE, "-o", out),
    )  # fmt: skip
