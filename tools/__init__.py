"""Programs for those who work on vaefast; none of them is installed with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def setup_py() -> ModuleType:
    """setup.py as a module: which sources, flags and instruction sets there are, and where nvcc is."""
    spec = importlib.util.spec_from_file_location("vaefast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
