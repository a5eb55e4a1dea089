"""Compiles driver.cpp with the kernels of an instruction set, and has it solve problems."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from kept import kept
from torch import Tensor
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from tools import setup_py  # noqa: E402

DEBIAN = "apt install g++-aarch64-linux-gnu qemu-user, then make test-arm"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # DType of csrc/problems.h


class Target(NamedTuple):
    """Who compiles, for which instruction set, and what runs the result."""

    name: str
    compiler: str
    isa: str
    runner: tuple[str, ...] = ()

    def objects(self) -> list[Path]:
        """Of every kernel file and of the driver, compiled when first asked for and when their sources change."""
        if not shutil.which(self.compiler):
            pytest.skip(f"no {self.compiler}; {DEBIAN}")
        setup = setup_py()
        flags = [*setup.CXX_FLAGS, *setup.kernel_flags(self.isa, self.compiler), "-Wno-psabi"]
        includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
        command = [self.compiler, "-std=c++20", "-c", *flags, *includes]
        digest = hashlib.sha256("\n".join([torch.__version__, *command]).encode())
        for path in sorted([*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/cpu/*.cpp"), HERE / "driver.cpp"]):
            digest.update(path.read_bytes())

        def compiled(source: Path) -> Path:
            def compile_to(out: Path) -> None:
                built = subprocess.run([*command, str(source), "-o", str(out)], capture_output=True, text=True)
                assert built.returncode == 0, built.stderr[-6000:]

            return kept(f"arm/{self.name}", source.stem, digest.hexdigest()[:16], ".o", compile_to)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compiled, [HERE / "driver.cpp", *(ROOT / source for source in setup.KERNELS)]))

    def solve(self, problems: Sequence[Problem], folder: Path) -> list[list[Tensor]]:
        """The results of each, in the order in which the driver writes them."""
        if self.runner and not shutil.which(self.runner[0]):
            pytest.skip(f"no {self.runner[0]}; {DEBIAN}")
        program, asked, found = (folder / f"{self.name}{suffix}" for suffix in ("", ".problems", ".results"))
        # an emulator has no libraries of the machine that it emulates
        subprocess.run([self.compiler, "-static", *map(str, self.objects()), "-o", str(program)], check=True)
        asked.write_bytes(b"".join(problem.written() for problem in problems))
        subprocess.run([*self.runner, str(program), str(asked), str(found)], check=True)
        data, at, results = found.read_bytes(), 0, []
        for problem in problems:
            results.append([])
            for dtype, shape in problem.results():
                empty = torch.empty(shape, dtype=dtype)
                size = empty.numel() * empty.element_size()
                results[-1].append(torch.frombuffer(bytearray(data[at : at + size]), dtype=dtype).view(shape))
                at += size
        assert at == len(data)
        return results


HOST = Target("host", "g++", "DEFAULT")
ARM = Target("aarch64", "aarch64-linux-gnu-g++", "DEFAULT", ("qemu-aarch64",))


class Problem(NamedTuple):
    """``[rows, cols]``, or of a mixture ``[rows, planes, cols]``."""

    of_posterior: bool
    wholes: Sequence[int]  # what the driver reads before the numbers
    numbers: Sequence[float]
    words: Sequence[int]  # and after
    inputs: Sequence[Tensor]
    outputs: Sequence[Sequence[int]]  # their shapes

    @property
    def rows(self) -> int:
        return self.inputs[0].shape[0]

    @property
    def cols(self) -> int:
        return self.inputs[0].shape[-1]

    def written(self) -> bytes:
        head = [int(self.of_posterior), DTYPES.index(self.inputs[0].dtype), self.rows, self.cols, *self.wholes]
        packed = struct.pack(f"<{len(head)}q{len(self.numbers)}d", *head, *self.numbers)
        packed += struct.pack(f"<{len(self.words)}q", *self.words)
        return packed + b"".join(bytes(t.contiguous().view(torch.uint8).flatten().tolist()) for t in self.inputs)

    def results(self) -> list[tuple[torch.dtype, Sequence[int]]]:
        """First the sum of each row."""
        return [(torch.float64, (self.rows,)), *((self.inputs[0].dtype, shape) for shape in self.outputs)]
