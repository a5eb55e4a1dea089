"""What was built, with what, and why not more: read from ``_build_info.py``, which setup.py writes."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

__version__ = "0.1.0"


@dataclass(frozen=True)
class BuildInfo:
    torch: str = ""
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


def compiled() -> bool:
    return not info().why_no_native and find_spec("vaefast._C") is not None


def why_not_compiled() -> str:
    return info().why_no_native or "its compiled file is missing; run `pip install --force-reinstall --no-deps .`"


def refuse_other_torch() -> None:
    """An extension holds the memory layout of the torch it was built against: with another it would crash."""
    built = info().torch
    if torch.__version__ != built:
        raise ImportError(
            f"vaefast was built against torch {built} but torch {torch.__version__} is installed. Build it again: "
            "`pip install --force-reinstall --no-deps --no-cache-dir .` in vaefast's source folder "
            "(or install the torch it was built against)."
        )
