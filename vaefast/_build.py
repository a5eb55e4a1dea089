"""What was built, with what, and why not more: read from ``_build_info.py``, which setup.py writes."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

__version__ = "0.1.0"


# by torch's name of what a machine has, the kernels that it runs besides DEFAULT's
RUNS = {"AVX2": ("AVX2",), "AVX512": ("AVX2", "AVX512")}


@dataclass(frozen=True)
class BuildInfo:
    torch: str = ""
    torches: tuple[str, ...] = ()  # of a wheel, the torches that it has an extension for, as "2.13"
    cpu: tuple[str, ...] = ()
    cuda: str = ""
    cuda_archs: tuple[str, ...] = ()
    compiler: str = ""
    why_no_native: str = "vaefast was not installed; run `pip install .` in its source folder"
    why_no_cuda: str = ""


def info() -> BuildInfo:
    try:
        from . import _build_info
    except ImportError:
        return BuildInfo()
    build: dict[str, Any] = _build_info.BUILD
    return BuildInfo(**build)


def release_of(version: str) -> str:
    """\"2.13" of any "2.13.x" that was released, on whatever device: those share a memory layout."""
    found = re.fullmatch(r"(\d+\.\d+)\.\d+(\+\w+)?", version)
    return found[1] if found else version


def module() -> str:
    """The compiled module: the only one, or in a wheel that of the installed torch."""
    if not info().torches:
        return "vaefast._C"
    return f"vaefast.for_torch_{release_of(torch.__version__).replace('.', '_')}._C"


def compiled() -> bool:
    build = info()
    # a wheel that lacks this torch's is refused, and not taken for one that has none
    return not build.why_no_native and (bool(build.torches) or find_spec(module()) is not None)


def why_not_compiled() -> str:
    return info().why_no_native or "its compiled file is missing; run `pip install --force-reinstall --no-deps .`"


def extension() -> Any:
    """The compiled module, imported.

    Raises:
        ImportError: it is for another torch, whose memory layout it holds, or another machine: it would crash.
    """
    build, found = info(), torch.__version__
    if build.torches and release_of(found) not in build.torches:
        raise ImportError(
            f"this wheel of vaefast has kernels for torch {', '.join(build.torches)}, but torch {found} is installed. "
            "Install one of those (`pip install 'torch>=%s,<%s'`), or build vaefast against this torch: `pip install "
            "--force-reinstall --no-deps --no-binary vaefast vaefast`, or `pip install .` in its source folder."
            % (build.torches[0], after(build.torches[-1]))
        )
    if not build.torches and found != build.torch:
        raise ImportError(
            f"vaefast was built against torch {build.torch} but torch {found} is installed. Build it again: "
            "`pip install --force-reinstall --no-deps --no-cache-dir .` in vaefast's source folder "
            "(or install the torch it was built against)."
        )
    own = torch.backends.cpu.get_cpu_capability()
    if not {"DEFAULT", *RUNS.get(own.partition("_")[0], ())} & {*build.cpu}:
        raise ImportError(
            f"vaefast was compiled for {build.cpu[0]} alone (VAEFAST_CPU=native), but here torch takes {own}. Build "
            "it again on this machine, or without VAEFAST_CPU for all: `pip install --force-reinstall --no-deps "
            "--no-cache-dir .` in vaefast's source folder."
        )
    return importlib.import_module(module())


def after(release: str) -> str:
    major, minor = map(int, release.split("."))
    return f"{major}.{minor + 1}"
