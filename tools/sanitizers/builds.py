"""The compiled core with a sanitizer's checks in it, in folders of its own under build/: the usual build stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from tools import ROOT, setup_py

SETUP = setup_py()
# what undefined covers, and float to an int that cannot hold it, which it leaves out
ADDRESS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
THREAD = ["-fsanitize=thread"]
# What is defined is looked at in the one-lane kernels, which have every operation by itself, and in all that leads to
# them; in vectors, where intrinsics have replaced what could be undefined, those checks take a quarter of an hour to
# compile.
OF_VECTORS = ["-fsanitize=address", "-fno-sanitize-recover=all"]


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise SystemExit("the sanitizers are g++'s; install it (apt install g++)")
    return found


def library(name: str) -> str:
    """A runtime library of the compiler's."""
    return subprocess.run(
        [compiler(), f"-print-file-name={name}"], check=True, text=True, capture_output=True
    ).stdout.strip()


def newer(target: Path, sources: list[Path]) -> bool:
    return target.exists() and all(target.stat().st_mtime >= s.stat().st_mtime for s in sources)


def objects(folder: Path, units: dict[str, tuple[Path, list[str]]]) -> list[Path]:
    """Compiles what is older than csrc, a unit after the other, or MAX_JOBS at a time."""
    from concurrent.futures import ThreadPoolExecutor

    folder.mkdir(parents=True, exist_ok=True)
    read = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]

    def compile_unit(item: tuple[str, tuple[Path, list[str]]]) -> Path:
        name, (source, flags) = item
        made = folder / f"{name}.o"
        if not newer(made, [*read, source]):
            print(f"compiling {name}", flush=True)
            subprocess.run([compiler(), *flags, "-c", str(source), "-o", str(made)], check=True)
        return made

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_unit, units.items()))


def flags_for(sanitizer: list[str]) -> list[str]:
    plain = [f for f in SETUP.CXX_FLAGS if f not in ("-O3", "-g0")]
    return ["-std=c++20", "-fPIC", "-O1", "-g1", "-fno-omit-frame-pointer", *sanitizer, *plain, f"-I{ROOT / 'csrc'}"]


def kernels(isa: str, flags: list[str]) -> dict[str, tuple[Path, list[str]]]:
    of_isa = SETUP.kernel_flags(isa, compiler())
    return {f"{isa}-{Path(k).stem}": (ROOT / k, [*flags, *of_isa]) for k in SETUP.KERNELS}


def extension(isa: str) -> Path:
    """A folder with a package vaefast whose core is sanitized, up to that instruction set, and whose Python is this
    checkout's."""
    import torch
    from torch.utils import cpp_extension

    folder = ROOT / "build" / f"address-{isa}-torch-{torch.__version__}"
    own = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    flags = [*(f"-isystem{path}" for path in own), "-fopenmp", "-DTORCH_EXTENSION_NAME=_C"]
    flags += ["-DTORCH_API_INCLUDE_EXTENSION_H", *(f"-DVAEFAST_HAVE_{each}" for each in {"DEFAULT", isa})]
    of_vectors, flags = [*flags_for(OF_VECTORS), *flags], [*flags_for(ADDRESS), *flags]
    units = kernels("DEFAULT", flags) | (kernels(isa, of_vectors) if isa != "DEFAULT" else {})
    sources = sorted({*(ROOT / "csrc").rglob("*.cpp")} - {ROOT / k for k in SETUP.KERNELS})
    for of, files in SETUP.by_folder(sources).items():
        units[f"core-{of.name}"] = (SETUP.together(of.name, files, folder / "units"), flags)
    made = objects(folder / "objects", units)
    package = folder / "vaefast"
    package.mkdir(exist_ok=True)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    core = package / f"_C{suffix}"
    if not newer(core, made):
        lib = f"-L{Path(torch.__file__).parent / 'lib'}"
        torch_libraries = ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
        subprocess.run(
            [compiler(), "-shared", *ADDRESS, *map(str, made), lib, *torch_libraries, "-o", str(core)], check=True
        )
    for path in (ROOT / "vaefast").iterdir():
        link = package / path.name
        if not path.name.startswith("_C.cpython") and not link.exists():
            link.symlink_to(path)
    return folder


def driver() -> Path:
    """threads.cpp with the one-lane kernels, in which there is nothing of torch."""
    folder = ROOT / "build" / "thread"
    flags = flags_for(THREAD)
    source = Path(__file__).with_name("threads.cpp")
    made = objects(folder, kernels("DEFAULT", flags) | {"threads": (source, flags)})
    out = folder / "threads"
    subprocess.run([compiler(), *THREAD, *map(str, made), "-o", str(out), "-pthread"], check=True)
    return out


def environment(folder: Path, isa: str) -> dict[str, str]:
    """Of a Python that runs the sanitized package. Leaks are not looked for: Python and torch keep what they have."""
    preload = " ".join((library("libasan.so"), library("libubsan.so"), library("libstdc++.so.6")))
    return {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(folder),
        "ATEN_CPU_CAPABILITY": isa.lower(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
