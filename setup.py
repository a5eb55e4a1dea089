"""Builds vaefast's compiled core against the torch that is installed, and records what was built and why not more.

What cannot be built costs one line of reason, printed here and shown by ``vaefast.show_config()``, and not the
installation: without CUDA the CPU kernels are built, and without torch or a C++ compiler the package is pure Python.

Environment variables:
    VAEFAST_FORCE_CUDA=1    fail, naming the fix, instead of building without CUDA
    VAEFAST_FORCE_CPU=1     build no CUDA kernels
    VAEFAST_FORCE_PYTHON=1  compile nothing
    VAEFAST_CPU=native      compile for this machine's instruction set alone (default: for all of its architecture)
    MAX_JOBS                compilers at a time (default: one a core)
    CXX, CUDA_HOME          the C++ compiler and the CUDA toolkit to use
    TORCH_CUDA_ARCH_LIST    GPU architectures, such as "8.0;9.0+PTX" (default: those of ARCHS that the toolkit knows)
    VAEFAST_PREBUILT        a folder of what tools/wheel.py compiled, to be put into a wheel
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
# compiled once per instruction set
KERNELS = ("csrc/cpu/kernels.cpp", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/run_*.cpp")))
# roughly, with AVX512, of the files that are units: what is long, and kernels.cpp, which every change of a likelihood
# compiles again; the others are one, since each would take longest over its headers
SECONDS = {
    "others": 17,
    "discrete": 15,
    "categorical": 14,
    "posterior_float": 14,
    "positive": 13,
    "compound": 12,
    "counts": 12,
    "real": 9,
    "posterior_double": 9,
    "binary": 5,
    "kernels": 4,
}
SIMD = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
# whichever kernel an expression is inlined into, it is rounded alike; no loop is doubled for a flag that it looks at;
# none scatters its vectors for fear that an int index wraps around, which Python's own flags allow; and no word of what
# gcc's own intrinsics leave undefined
KERNEL_FLAGS = [
    "-ffp-contract=off",
    "-fno-unswitch-loops",
    "-fno-wrapv",
    "-Wno-uninitialized",
]
# gcc's analyses of memory take it as long as the rest and find nothing: once all is inlined, and the earlier that is
# the better, kernels compute in registers
GCC_FLAGS = [
    "-fno-tree-pta",
    *("--param", "sccvn-max-alias-queries-per-access=30"),
    *("--param", "early-inlining-insns=60"),
]
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-DAT_PER_OPERATOR_HEADERS",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",  # gcc 12's of torch's own lists
]


class Missing(Exception):
    """Something that a build needs and does not find; the message ends with how to get it."""


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def output(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def find_torch() -> Any:
    """The torch that vaefast will run with. pip hides it from an isolated build, but Python knows its place."""
    paths = [*site.getsitepackages(), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's packages
        paths.insert(0, site.getusersitepackages())
    sys.path += [path for path in paths if path not in sys.path]
    try:
        import torch
    except (ImportError, OSError) as error:
        if getattr(error, "name", None) == "torch":
            uv = "; uv hides torch from builds unless given --no-build-isolation" if "UV" in os.environ else ""
            raise Missing(f"the build found no torch; install torch first, then vaefast again{uv}") from None
        raise Missing(f"torch cannot be imported ({error}); repair it, then install vaefast again") from error
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise Missing(f"torch {torch.__version__} is older than {oldest}; upgrade torch, then install vaefast again")
    return torch


def find_compiler() -> str:
    """Name and version of the C++ compiler, which CXX then names."""
    asked = os.environ.get("CXX")
    for command in [asked] if asked else ["c++", "g++", "clang++"]:
        try:
            line = output(*shlex.split(command), "--version").splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            continue
        # torch's ninja rules and setuptools' linker would each look for a compiler of their own
        os.environ["CXX"] = command
        version = re.search(r"\d+(\.\d+)+", re.sub(r"\(.*?\)", "", line))
        return f"{'clang++' if 'clang' in line else 'g++'} {version[0] if version else line}"
    what = f"CXX={asked} does not run" if asked else "no C++ compiler was found"
    raise Missing(f"{what}; install g++ (apt install g++, dnf install gcc-c++) or set CXX, then install vaefast again")


def kernel_flags(simd: str, compiler: str = "") -> list[str]:
    """Of the kernels for that instruction set, by that compiler or the one that CXX names."""
    nothing = ("-xc++", "-c", os.devnull, "-o", os.devnull)
    command = [*shlex.split(compiler or os.environ["CXX"]), "-Werror", *GCC_FLAGS, *nothing]
    known = subprocess.run(command, capture_output=True).returncode == 0
    flags = [*KERNEL_FLAGS, *SIMD[simd], f"-DCPU_CAPABILITY={simd}", f"-DCPU_CAPABILITY_{simd}"]
    return flags + GCC_FLAGS if known else flags


def instruction_sets(torch: Any) -> tuple[str, ...]:
    """Those to compile for."""
    if platform.machine() != "x86_64":
        return ("DEFAULT",)
    asked = os.environ.get("VAEFAST_CPU") or "all"
    if asked not in ("all", "native"):
        raise SystemExit(f"VAEFAST_CPU={asked}, but it takes all (the default) or native: this machine's alone")
    if asked == "all":
        return tuple(SIMD)
    own = torch.backends.cpu.get_cpu_capability().partition("_")[0]
    return (own if own in SIMD else "DEFAULT",)


def find_headers() -> None:
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        raise Missing("Python.h was not found; install Python's headers (python3-dev), then install vaefast again")


def find_cuda(torch: Any) -> tuple[str, tuple[str, ...]]:
    """The CUDA toolkit's version and the architectures to compile for, which TORCH_CUDA_ARCH_LIST then names."""
    if flag("VAEFAST_FORCE_CPU"):
        raise Missing("VAEFAST_FORCE_CPU was set; unset it to build the CUDA kernels")
    wanted = torch.version.cuda
    if not wanted:
        raise Missing(f"torch {torch.__version__} has no CUDA; install a CUDA build of torch (pytorch.org/get-started)")
    if not any(ROOT.glob("csrc/cuda/*.cu")):
        raise Missing("csrc/cuda has no .cu file; take a source tree that has CUDA kernels")

    fix = f"install the CUDA {wanted.split('.')[0]} toolkit or set CUDA_HOME to it, then install vaefast again"
    home = os.environ.get("CUDA_HOME")
    nvcc = Path(home, "bin", "nvcc") if home else Path(shutil.which("nvcc") or USUAL_NVCC)
    try:
        found = re.search(r"release (\d+)\.(\d+)", output(nvcc, "--version"))
        known = output(nvcc, "--list-gpu-arch").split()
        # an nvcc on PATH may be a wrapper far from its toolkit, but it knows the way there
        top = re.search(r"TOP=(.+)", output(nvcc, "--dryrun", "-x", "cu", os.devnull))
    except (OSError, subprocess.CalledProcessError):
        found = None
    if found is None:
        raise Missing(f"no nvcc in {'CUDA_HOME=' + home if home else 'PATH or CUDA_HOME'}; {fix}")
    if top and not home:
        os.environ["CUDA_HOME"] = str(Path(top[1].strip()).resolve())
    version = f"{found[1]}.{found[2]}"
    if found[1] != wanted.split(".")[0]:
        raise Missing(f"nvcc is CUDA {version} but torch {torch.__version__} was built with CUDA {wanted}; {fix}")
    # without a list, torch's builder asks the machine's GPUs, and fails where there is none
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        archs = [arch for arch in ARCHS if f"compute_{arch.replace('.', '')}" in known]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(archs) + "+PTX"
    return f"CUDA {version}", tuple(re.split(r"[; ]+", os.environ["TORCH_CUDA_ARCH_LIST"].strip("; ")))


def plan() -> dict[str, Any]:
    """What to build, as ``vaefast._build.BuildInfo`` takes it."""
    build: dict[str, Any] = {"torch": "", "torches": (), "cpu": (), "cuda": "", "cuda_archs": (), "compiler": ""}
    build |= {"why_no_native": "", "why_no_cuda": ""}
    try:
        if flag("VAEFAST_FORCE_PYTHON"):
            raise Missing("VAEFAST_FORCE_PYTHON was set; unset it to build the kernels")
        if sys.platform == "win32":
            raise Missing("the kernels do not build on Windows yet; use WSL for them")
        torch = find_torch()
        build["torch"] = str(torch.__version__)
        build["compiler"] = find_compiler()
        find_headers()
        build["cpu"] = instruction_sets(torch)
        build["cuda"], build["cuda_archs"] = find_cuda(torch)
    except Missing as missing:
        build["why_no_cuda"] = str(missing)
        build["why_no_native"] = "" if build["cpu"] else str(missing)
    if flag("VAEFAST_FORCE_CUDA") and build["why_no_cuda"]:
        raise SystemExit(f"VAEFAST_FORCE_CUDA was set, but {build['why_no_cuda']}")
    return build


def report(build: dict[str, Any]) -> None:
    if build["why_no_native"]:
        print(f"vaefast: pure Python, no kernels: {build['why_no_native']}", flush=True)
        return
    print(f"vaefast: CPU kernels ({', '.join(build['cpu'])}), {build['compiler']}, torch {build['torch']}", flush=True)
    cuda = f"CUDA kernels for {' '.join(build['cuda_archs'])} with {build['cuda']}"
    print(f"vaefast: {cuda if build['cuda'] else 'no CUDA kernels: ' + build['why_no_cuda']}", flush=True)


def named(source: str) -> str:
    return Path(source).stem.removeprefix("run_")


def cost(simd: str, source: str) -> int:
    """Roughly the seconds that a unit takes to compile."""
    name = named(source)
    if not simd:
        return {"csrc": 35, "autograd": 30, "operators": 15}.get(name, 5)
    return SECONDS.get(name, 5) * {"AVX512": 4, "AVX2": 3}.get(simd, 1) // 4


def progress(done: int, units: int) -> None:
    bar = f"vaefast: [{'#' * (40 * done // units):<40}] {done} of {units} compiled"
    print(bar, end="\r" if done < units and sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def record(build: dict[str, Any], folder: Path) -> None:
    text = f'"""What was built."""\n\nfrom typing import Any\n\nBUILD: dict[str, Any] = {build!r}\n'
    Path(folder, "_build_info.py").write_text(text)


def by_folder(sources: Sequence[Path]) -> dict[Path, list[Path]]:
    folders = sorted({source.parent for source in sources})
    return {folder: [source for source in sources if source.parent == folder] for folder in folders}


def together(name: str, sources: Sequence[Path], work: Path) -> Path:
    """One unit of several files: torch's headers take longer than what includes them."""
    unit = work / f"{name}.cpp"
    text = "".join(f'#include "{source.relative_to(ROOT / "csrc")}"\n' for source in sources)
    if not unit.exists() or unit.read_text() != text:
        unit.parent.mkdir(parents=True, exist_ok=True)
        unit.write_text(text)
    return unit


def prebuilt(folder: Path) -> dict[str, Any]:
    """A wheel of what was compiled before."""

    class BuildPrebuilt(build_py):
        def run(self) -> None:
            shutil.rmtree(Path(self.build_lib, "vaefast"), ignore_errors=True)
            super().run()
            shutil.copytree(folder, Path(self.build_lib, "vaefast"), dirs_exist_ok=True)

    class Binary(Distribution):
        def has_ext_modules(self) -> bool:
            return True

    return {"cmdclass": {"build_py": BuildPrebuilt}, "distclass": Binary}


def commands(build: dict[str, Any]) -> dict[str, Any]:
    class BuildPython(build_py):
        def run(self) -> None:
            if not self.editable_mode:  # what an earlier build left there would be installed too
                shutil.rmtree(Path(self.build_lib, "vaefast"), ignore_errors=True)
            super().run()
            if build["why_no_native"]:
                record(build, ROOT / "vaefast" if self.editable_mode else Path(self.build_lib, "vaefast"))

    if build["why_no_native"]:
        return {"cmdclass": {"build_py": BuildPython}}

    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class BuildNative(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # kept, for editable installs too, so that ninja compiles what changed; it does not see that torch changed
            self.build_temp = str(ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{build['torch']}")

        def build_extension(self, ext: Any) -> None:
            """Side by side, what takes longest first. torch's ninja file has one set of flags, so that each instruction
            set is compiled apart; nvcc's sources go torch's way."""
            cxx = ext.extra_compile_args["cxx"]
            extra: dict[tuple[str, str], list[str]] = {}
            work = Path(self.build_temp)
            alone = [source for source in KERNELS if named(source) in SECONDS]
            others = together("others", [ROOT / source for source in KERNELS if source not in alone], work)
            for simd in build["cpu"]:
                extra |= dict.fromkeys(((simd, source) for source in (*alone, str(others))), kernel_flags(simd))
            core = [ROOT / source for source in ext.sources if source.endswith(".cpp")]
            for folder, sources in by_folder(core).items():
                # where a call finds its way to one of those
                have = [f"-DVAEFAST_HAVE_{simd}" for simd in build["cpu"]] if folder.name == "cpu" else []
                extra["", str(together(folder.name, sources, work))] = have
            ext.sources = [source for source in ext.sources if not source.endswith(".cpp")]
            units = sorted(extra, key=lambda unit: (-cost(*unit), unit))

            def compile_unit(unit: tuple[str, str]) -> str:
                simd, source = unit
                [made] = self.compiler.compile(
                    [source],
                    output_dir=str(Path(self.build_temp, simd or "core", Path(source).stem)),
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*cxx, *extra[unit]],
                )
                return str(made)

            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1) if self.use_ninja else 1
            with ThreadPoolExecutor(jobs) as pool:
                compiling = [pool.submit(compile_unit, unit) for unit in units]
                for done, unit in enumerate(as_completed(compiling), 1):
                    unit.result()
                    progress(done, len(units))
                ext.extra_objects = [unit.result() for unit in compiling]
            if not ext.sources:  # torch's compile() refuses to have nothing to do
                self.compiler.compile = lambda *_, **__: []
            super().build_extension(ext)

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                raise SystemExit(
                    f"vaefast: its kernels did not compile: {error}. The compiler's messages are above. "
                    "VAEFAST_FORCE_CPU=1 leaves out the CUDA kernels, VAEFAST_FORCE_PYTHON=1 all of them."
                ) from error
            record(build, ROOT / "vaefast" if self.inplace else Path(self.build_lib, "vaefast"))

    linux = sys.platform == "linux"
    defines = ["-DVAEFAST_CUDA"] if build["cuda"] else []
    sources = sorted({*ROOT.glob("csrc/**/*.cpp")} - {ROOT / kernel for kernel in KERNELS})
    sources += sorted(ROOT.glob("csrc/cuda/*.cu")) if build["cuda"] else []
    extension = (CUDAExtension if build["cuda"] else CppExtension)(
        "vaefast._C",
        [str(source.relative_to(ROOT)) for source in sources],
        include_dirs=[str(ROOT / "csrc")],
        # OpenMP's symbols come from the library that torch loads: a second one would bring its own threads
        extra_compile_args={"cxx": CXX_FLAGS + ["-fopenmp"] * linux + defines, "nvcc": ["-O3", *defines]},
        extra_link_args=["-Wl,-s"] * linux,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_py": BuildPython, "build_ext": BuildNative}}


def main() -> None:
    if {"egg_info", "dist_info", "sdist"} & set(sys.argv):  # metadata is the same whatever gets built
        setup()
        return
    # a virtual environment's ninja is the one to use, activated or not
    os.environ["PATH"] = os.pathsep.join((sysconfig.get_paths()["scripts"], os.environ.get("PATH", os.defpath)))
    if folder := os.environ.get("VAEFAST_PREBUILT"):
        setup(**prebuilt(Path(folder)))
        return
    build = plan()
    report(build)
    setup(**commands(build))


if __name__ == "__main__":
    main()
