"""Takes a compiled library apart: its kernels' resources and SASS for each architecture.

cuobjdump and nvdisasm come with the CUDA toolkit or, where that is a small one, with the triton that a CUDA build of
torch brings along.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cuda_build.sass import Kernel, kernels

NUMBER = re.compile(r"([A-Z]+):(\d+)")


class Missing(Exception):
    """A tool that is not there; the message says how to get it."""


@dataclass(frozen=True)
class Resources:
    """What a thread or block of a kernel takes: registers a thread; stack and local memory a thread, shared memory a
    block, in bytes."""

    registers: int
    stack: int
    local: int
    shared: int


@cache
def tool(name: str) -> str:
    """The path of one of the toolkit's programs."""
    if found := shutil.which(name):
        return found
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or []) if triton else []:
        program = Path(folder, "backends", "nvidia", "bin", name)
        if program.exists():
            return str(program)
    raise Missing(f"no {name} in PATH or in triton; install the CUDA toolkit's binary utilities or triton")


def output(*command: object, cwd: Path | None = None) -> str:
    """What a program prints."""
    words = [str(word) for word in command]
    run = subprocess.run(words, capture_output=True, text=True, cwd=cwd)
    if run.returncode:
        raise RuntimeError(f"{' '.join(words)}: {run.stderr.strip() or run.stdout.strip()}")
    return run.stdout


def arguments(template: str) -> list[str]:
    """The arguments of ``name<a, b<c, d>>``: a and b<c, d>."""
    found, depth = [""], 0
    for letter in template.partition("<")[2][:-1]:
        depth += (letter == "<") - (letter == ">")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return [argument.strip() for argument in found]


@cache
def short_name(symbol: str) -> str:
    """From a symbol of the library ``float: Reconstruction<Bernoulli, 1> + PosteriorForward<false, true>``, ``float:
    many PosteriorForward<...>`` or, of a kernel that is not made of works, ``float: experts_kernel<true, false>``."""
    name = re.sub(r"\b(\w+::)+", "", output("c++filt", "-p", symbol).strip()).replace("> >", ">>")
    if not re.search(r"<(float|double)\b", name):
        return name
    arithmetic, *parts = arguments(name)
    plain = [part.replace(f"<{arithmetic}>", "").replace(f"<{arithmetic}, ", "<") for part in parts]
    kernel = name.partition("<")[0]
    if kernel not in ("job_kernel", "list_kernel", "alone_kernel"):
        return f"{arithmetic}: {kernel}" + (f"<{', '.join(plain)}>" if plain else "")
    works = [part for part in plain if part != "Nothing"]
    return f"{arithmetic}: {'many ' if kernel == 'list_kernel' else ''}{' + '.join(works)}"


def resources(library: Path) -> dict[tuple[str, int], Resources]:
    """By short name and architecture (90 for sm_90; 0 in a cubin, which is for one)."""
    found: dict[tuple[str, int], Resources] = {}
    arch, name = 0, ""
    for line in output(tool("cuobjdump"), "-res-usage", library).splitlines():
        if told := re.match(r"arch = sm_(\d+)", line):
            arch = int(told[1])
        elif told := re.match(r" Function (\S+):", line):
            name = told[1]
        elif "REG:" in line:
            n = {key: int(value) for key, value in NUMBER.findall(line)}
            found[short_name(name), arch] = Resources(n["REG"], n["STACK"], n["LOCAL"], n["SHARED"])
    return found


@cache
def architectures(library: Path) -> tuple[int, ...]:
    """Those that the library holds machine code for."""
    listed = output(tool("cuobjdump"), "-lelf", library)
    return tuple(sorted({int(arch) for arch in re.findall(r"\.sm_(\d+)\w*\.cubin", listed)}))


@cache
def cubin_sass(cubin: Path) -> dict[str, Kernel]:
    """The kernels of a cubin, by short name."""
    return {short_name(kernel.name): kernel for kernel in kernels(output(tool("nvdisasm"), "-c", cubin))}
