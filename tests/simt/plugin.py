"""A pytest plugin: the package runs on the CUDA device code, executed by the SIMT executor, not on the CPU kernels.

``pytest -p simt.plugin`` with this folder's parent on the path. The extension is built again when its sources change.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
SOURCES = [CSRC / f"{name}.cpp" for name in ("ops", "autograd", "compute", "problem")]


def build() -> Path:
    """Compiles csrc with the executor as the device of CPU tensors; ninja does nothing where nothing changed."""
    folder = HERE.parent.parent / "build" / f"simt-torch-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    # a virtual environment's ninja is found whether or not the environment is activated
    os.environ["PATH"] = os.pathsep.join((sysconfig.get_paths()["scripts"], os.environ.get("PATH", os.defpath)))
    sources = [*SOURCES, HERE / "launch.cpp", HERE / "simt.cpp"]
    load(
        name="_C",
        sources=[str(source) for source in sources],
        extra_include_paths=[str(HERE), str(CSRC)],
        extra_cflags=["-O2", "-g0", "-Wno-unknown-pragmas"],
        build_directory=str(folder),
        is_python_module=False,
    )
    return folder / "_C.so"


def install(path: Path) -> None:
    """Makes the library vaefast._C, before vaefast is imported."""
    assert "vaefast" not in sys.modules
    spec = spec_from_file_location("vaefast._C", path, loader=ExtensionFileLoader("vaefast._C", str(path)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["vaefast._C"] = module
    spec.loader.exec_module(module)


install(build())
