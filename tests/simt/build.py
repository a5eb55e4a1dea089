"""Builds the package's extension with the executor in place of a GPU, as it is and with mutants of the device code.

The device code is compiled with AddressSanitizer, with the check that a pack's address is as aligned as a GPU wants it,
and with gcov's counters. Ninja does nothing where nothing changed.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.utils import cpp_extension

from tools import setup_py

from .mutants import Mutant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
# objects of several compilers or versions of torch must not meet
FOLDER = ROOT / "build" / f"simt-torch-{torch.__version__}-python-{sys.version_info.major}.{sys.version_info.minor}"
COMPILER = os.environ.get("CXX", "g++")
SANITIZE = "-fsanitize=address,alignment -fno-sanitize-recover=alignment -fno-omit-frame-pointer"
# c++20: torch's oldest and newest headers both take it
FLAGS = "-std=c++20 -fPIC -g0 -Wno-unknown-pragmas -DAT_PER_OPERATOR_HEADERS -DTORCH_EXTENSION_NAME=_C"
CHECKED = f"-O1 {SANITIZE}"
# precompiled: parsing torch's headers takes longer than compiling a unit of device code
HEADER = "#include <ATen/core/Tensor.h>\n#include <ATen/CPUGeneratorImpl.h>\n"
HOST = sorted(path for path in CSRC.rglob("*.cpp") if path.parent.name != "cpu")
LAUNCH = HERE / "launch.cpp"


def device_units() -> list[Path]:
    return sorted((CSRC / "cuda").glob("run_*.cu"))


def library(mutant: Mutant | None = None) -> Path:
    return FOLDER / (f"{mutant.name}/_C.so" if mutant else "_C.so")


def write(path: Path, text: str) -> None:
    """Leaves a file that holds the text already, so that nothing is compiled again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def is_stale(mutant: Mutant) -> bool:
    return not mutant.fits((CSRC / "cuda" / mutant.file).read_text())


def write_mutant(mutant: Mutant) -> Path:
    """A copy of csrc's device code with the mutant's change; returns the folder that takes csrc's place."""
    folder = FOLDER / mutant.name
    for source in (CSRC / "cuda").iterdir():
        text = source.read_text()
        write(folder / "cuda" / source.name, mutant.apply(text) if source.name == mutant.file else text)
    return folder


class Rules:
    """What ninja is told."""

    def __init__(self) -> None:
        includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
        system = " ".join(f"-isystem {path}" for path in includes)
        libraries = f"-L{Path(torch.__file__).parent / 'lib'} -lc10 -ltorch_cpu -ltorch -ltorch_python"
        self.header = FOLDER / "aten.h"
        self.lines = [
            "ninja_required_version = 1.3",
            "rule compile",
            f"  command = {COMPILER} -MMD -MF $out.d {FLAGS} $flags -I{HERE} $first -I{CSRC} {system} $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {COMPILER} -shared {SANITIZE} --coverage $in -o $out {libraries}",
            f"build {self.header}.gch: compile {self.header}",
            f"  flags = {CHECKED} -x c++-header",
        ]
        write(self.header, HEADER)

    def host(self, source: Path, flags: str = "-O0") -> Path:
        out = FOLDER / f"host-{source.stem}.o"
        self.lines += [f"build {out}: compile {source}", f"  flags = {flags} -c"]
        return out

    def checked(self, source: Path, flags: str = "", first: Path | None = None) -> Path:
        out = (first or FOLDER) / f"{source.stem}.o"
        self.lines += [
            f"build {out}: compile {source} | {self.header}.gch",
            f"  flags = {CHECKED} -include {self.header} {flags} -x c++ -c",
            f"  first = {f'-I{first}' if first else ''}",
        ]
        return out

    def link(self, out: Path, objects: Iterable[Path]) -> None:
        self.lines.append(f"build {out}: link {' '.join(str(o) for o in objects)}")


def write_rules(mutants: Sequence[Mutant]) -> None:
    rules = Rules()
    counted = "--coverage -fprofile-abs-path"
    nvcc = f"-include {HERE / 'simt.h'}"
    # the executor jumps between stacks, which a sanitizer's own code must not see
    setup = setup_py()
    units = [setup.together(folder.name, sources, FOLDER) for folder, sources in setup.by_folder(HOST).items()]
    host = [*map(rules.host, units), rules.host(HERE / "simt.cpp", "-O2")]
    device = {unit.stem: rules.checked(unit, f"{nvcc} {counted}") for unit in device_units()}
    device[LAUNCH.stem] = rules.checked(LAUNCH, counted)
    rules.link(library(), [*device.values(), *host])
    for mutant in mutants:
        folder = write_mutant(mutant)
        source = LAUNCH if mutant.unit == LAUNCH.stem else folder / "cuda" / f"{mutant.unit}.cu"
        broken = rules.checked(source, nvcc, folder)
        sound = [out for unit, out in device.items() if unit != mutant.unit]
        # the mutant comes first: of an inline function that several objects hold, the linker takes the first
        rules.link(library(mutant), [broken, *sound, *host])
    write(FOLDER / "build.ninja", "\n".join(rules.lines) + "\n")


def build(mutants: Sequence[Mutant] = ()) -> None:
    """The library and those with the mutants, up to date."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_rules(mutants)
        # a virtual environment's ninja is found whether or not the environment is activated
        path = os.pathsep.join((sysconfig.get_paths()["scripts"], os.environ.get("PATH", os.defpath)))
        run = subprocess.run(
            ["ninja", "-C", str(FOLDER), f"-j{os.environ.get('MAX_JOBS', os.cpu_count() or 1)}"],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
        )
    if run.returncode != 0:
        raise RuntimeError(f"the device code does not build for the executor:\n{run.stdout[-8000:]}{run.stderr}")
