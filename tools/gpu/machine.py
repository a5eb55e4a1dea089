"""What is there: Python, torch, the GPU, the compiled extension, the toolkit's programs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.facts import first_line
from tools import setup_py

TESTED_WITH = ("pytest", "hypothesis", "mpmath", "scipy", "numpy")
BUILT_WITH = ("ninja", "setuptools")
OLDEST_SETUPTOOLS = 77
DRIVER = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current"


class Unfit(Exception):
    """This machine cannot run the stages; the message says what is missing."""


def need(packages: Sequence[str]) -> None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        raise Unfit(f"{sys.executable} lacks {', '.join(absent)}: pip install {' '.join(absent)}")


def find_device(kind: str) -> dict[str, Any]:
    """The GPU, or the CPU in its place, and what is around it.

    Raises:
        Unfit: there is no torch with CUDA, no GPU that it sees, or a Python package is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise Unfit(f"{sys.executable} cannot import torch ({error}): make gpu PYTHON=..., one that has it") from None
    found = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "headers": Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        "cores": os.cpu_count(),
    }
    if kind == "cpu":
        need(TESTED_WITH)
        return {"gpu": "CPU", **found}
    if torch.version.cuda is None:
        raise Unfit(f"torch {torch.__version__} of {sys.executable} has no CUDA: make gpu PYTHON=..., one that has")
    if not torch.cuda.is_available():
        raise Unfit(
            f"torch {torch.__version__} sees no CUDA device (CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): run it where `nvidia-smi` lists a GPU"
        )
    need(TESTED_WITH)
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "memory": torch.cuda.get_device_properties(0).total_memory,
        "driver": first_line("nvidia-smi", f"--query-gpu={DRIVER}", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        **found,
    }


def covers(archs: Sequence[str], capability: str) -> bool:
    """Whether code for these architectures, as TORCH_CUDA_ARCH_LIST names them, runs on such a GPU."""
    major, minor = map(int, capability.split("."))
    for arch in archs:
        built = tuple(map(int, arch.removesuffix("+PTX").split(".")))
        if (built[0] == major and built[1] <= minor) or (arch.endswith("+PTX") and built <= (major, minor)):
            return True
    return False


def why_not_usable(kind: str, capability: str = "") -> str:
    """Why the extension that lies in the checkout has to be built anew, or ""."""
    try:
        import vaefast
        from vaefast import _build
    except ImportError as error:
        return str(error)
    if kind not in vaefast.available_backends():
        return f"it has no kernels for {kind}"
    archs = _build.info().cuda_archs
    if kind == "cuda" and not covers(archs, capability):
        return f"it was built for {' '.join(archs)}, and the GPU is {capability}"
    return ""


def find_compilers(capability: str) -> dict[str, str]:
    """The environment variables to build with, for that GPU.

    Raises:
        Unfit: there is no nvcc of torch's CUDA, or a Python package is missing.
    """
    import torch

    need(BUILT_WITH)
    import setuptools

    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise Unfit(f"setuptools {setuptools.__version__} is too old: pip install 'setuptools>={OLDEST_SETUPTOOLS}'")
    os.environ["TORCH_CUDA_ARCH_LIST"] = capability
    os.environ.pop("VAEFAST_FORCE_CPU", None)
    builder = setup_py()
    try:
        builder.find_cuda(torch)  # sets CUDA_HOME
    except builder.Missing as missing:
        raise Unfit(str(missing)) from None
    return {
        "VAEFAST_FORCE_CUDA": "1",
        "MAX_JOBS": str(os.cpu_count() or 1),
        # for the sanitizer's messages; the code is the same
        "NVCC_APPEND_FLAGS": f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -lineinfo".strip(),
    }


def find_tool(name: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """compute-sanitizer or ncu, from PATH or from the toolkit that nvcc is of."""
    nvcc = shutil.which("nvcc")
    homes = [environ.get("CUDA_HOME"), str(Path(nvcc).resolve().parents[1]) if nvcc else None, "/usr/local/cuda"]
    places = [Path(home, folder) for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which(name, path=os.pathsep.join([environ.get("PATH", ""), *map(str, places)]))


def of_kernels_alone(sanitizer: str) -> list[str]:
    """The option by which compute-sanitizer leaves torch's kernels alone, which would take the time, if it has it."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        run = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, timeout=20)
        if "--kernel-regex" in run.stdout + run.stderr:
            return ["--kernel-regex", "kns=vaefast"]
    return []
