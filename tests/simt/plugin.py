"""A pytest plugin: the package runs on the CUDA device code, executed by the SIMT executor, not on the CPU kernels."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location

import pytest

from .environment import LIBRARY


def install(path: str) -> None:
    """Makes the library vaefast._C, before vaefast is imported."""
    assert "vaefast" not in sys.modules
    spec = spec_from_file_location("vaefast._C", path, loader=ExtensionFileLoader("vaefast._C", path))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["vaefast._C"] = module
    spec.loader.exec_module(module)


if LIBRARY not in os.environ:
    raise pytest.UsageError("simt.plugin needs the environment that `python -m simt` makes: run that")
install(os.environ[LIBRARY])
