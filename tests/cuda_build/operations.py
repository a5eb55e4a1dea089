"""What the hot loop of each operation has to do at least: its byte floor, in vector loads and stores. The operations
and their names are those that benchmarks/kernels.py times.

The kernels choose at run time among dtypes, parameterizations and sources of noise, so besides loads and stores a path
is told apart by traces that only the wanted choice leaves: Philox's multiplier, the exponentials of a log-variance,
the packing of a half-precision result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cuda_build.paths import Demand, Flow, Path, Search

PHILOX = r"-0x2daee0ad|0xd2511f53"  # the first multiplier, as SASS prints it
EX2 = r"^MUFU\.EX2"
# The loop of a posterior holds the square root of the parameterization "var"; no reconstruction takes one.
POSTERIOR = Demand(r"^MUFU\.RSQ")
PACK = 4  # elements with float arithmetic (kPack in csrc/cuda/pack.cuh)
LINE = 16  # bytes that the plain path moves at once, and
FLIGHT = 2  # times in a row for each operand, twice that of one, once of four (Line and kFlight in csrc/cuda/plain.cuh)


@dataclass(frozen=True)
class DType:
    """How a dtype shows in the machine code.

    Args:
        name: as torch calls it.
        size: bytes an element.
        unpack: what a load leaves, two elements each time at most.
        pack: what a store takes, two elements each time.
        type: as C++ calls it.
    """

    name: str
    size: int
    unpack: str = ""
    pack: str = ""
    type: str = "float"


UNPACK_PRMT = r"^PRMT .*0x(7632|5410|7610)"
DTYPES = (
    DType("float32", 4),
    DType("float16", 2, r"^HADD2\.F32", r"^F2FP\.(F16|PACK_AB)", "__half"),
    DType(
        "bfloat16",
        2,
        rf"{UNPACK_PRMT}|^LOP3.*0xffff0000|\b0x10000\b|^SHL|^SHF\.L|^IMAD\.U32",
        r"^F2FP\.BF16",
        "__nv_bfloat16",
    ),
)


@dataclass(frozen=True)
class Operation:
    """A use of a kernel: tensors that it reads and writes once, and what tells its path from others.

    Args:
        name: the benchmark's.
        kernel: its short name, without the arithmetic type; on the plain path, S for the operands' type.
        loads: tensors that are read.
        stores: tensors that are written.
        posterior: whether the kernel's loop over a posterior is meant, not the one over a reconstruction.
        scalars: further loads that it may do: an upstream gradient that is one number.
        philox: whether noise is drawn.
        exp: whether each element takes an exponential.
    """

    name: str
    kernel: str
    loads: int
    stores: int
    posterior: bool = True
    scalars: int = 0
    philox: bool = False
    exp: bool = False

    @property
    def plain(self) -> bool:
        return "<S" in self.kernel

    def kernel_for(self, dtype: DType) -> str:
        """The kernel's short name, float arithmetic left out."""
        if dtype.type == "float":
            return self.kernel.replace("<S, ", "<").replace("<S>", "")
        return self.kernel.replace("<S", f"<{dtype.type}")

    def moved(self, dtype: DType) -> tuple[int, int]:
        """Elements that one instruction moves, and how many moves of each operand are once round the loop."""
        times = 2 * FLIGHT if self.loads == 1 else FLIGHT if self.loads < 4 else 1
        return (LINE // dtype.size, times) if self.plain else (PACK, 1)

    def demands(self, dtype: DType) -> list[Demand]:
        """For a path that goes once round the loop."""
        pack, times = self.moved(dtype)
        width, elements = 8 * pack * dtype.size, pack * times
        vector, other = rf"\.E\S*\.{width}\b", rf"\.E\S*\.{192 - width}\b"
        found = [
            Demand(rf"^LDG{vector}", self.loads * times, self.loads * times),
            Demand(rf"^STG{vector}", self.stores * times, self.stores * times),
            Demand(rf"^LDG(?!{vector})(?!{other})", 0, self.scalars),
            Demand(rf"^STG(?!{vector})|^LDG{other}", 0, 0),
        ]
        if self.philox:
            found.append(Demand(PHILOX, elements // 4))
        if self.exp:
            found.append(Demand(EX2, elements))
        if dtype.unpack:
            found.append(Demand(dtype.unpack, self.loads * elements // 2))
        if dtype.pack:
            found.append(Demand(dtype.pack, self.stores * elements // 2))
        return found


KL_FORWARD, KL_BACKWARD = "PosteriorForward<false, true>", "PosteriorBackward<false, true>"
# In their usual form: a log-variance, Philox noise, the standard normal prior unless the name says else.
FIXED = (
    Operation("posterior_forward sample", "PlainForward<S, true, false>", 2, 1, philox=True, exp=True),
    Operation("posterior_forward kl", "PlainForward<S, false, true>", 2, 0, exp=True),
    Operation("posterior_forward kl, prior", KL_FORWARD, 4, 0, exp=True),
    Operation("posterior_forward sample, kl", "PlainForward<S, true, true>", 2, 1, philox=True, exp=True),
    Operation("posterior_backward sample", "PlainBackward<S, true, false>", 2, 2, philox=True, exp=True),
    Operation("posterior_backward kl", "PlainBackward<S, false, true>", 2, 2, exp=True),
    Operation("posterior_backward kl, prior", KL_BACKWARD, 4, 4, scalars=1, exp=True),
    Operation("posterior_backward sample, kl", "PlainBackward<S, true, true>", 3, 2, philox=True, exp=True),
    # once round the inner loop: each kept gradient
    Operation("scale_", "PlainRescale<S> + PlainBackward<S, false, true>", 1, 1, posterior=False),
)


def operations(names: Iterable[str]) -> Iterator[Operation]:
    """Those of kernels with these names: the fixed ones, and three for each likelihood and number of parameters."""
    yield from FIXED
    for kernel in sorted({name.partition(": ")[2] for name in names}):
        if found := re.fullmatch(r"PlainReconstruction<(\w+), (\d+)> \+ PlainForward<false, true>", kernel):
            likelihood, count = re.sub(r"(?<!^)(?=[A-Z])", "_", found[1]).lower(), int(found[2])
            forward, backward = (f"reconstruction_{way} {likelihood} {count}" for way in ("forward", "backward"))
            plain = kernel.replace("<", "<S, ")
            yield Operation(forward, plain, count + 1, 0, posterior=False)
            yield Operation(f"{forward}, gradient", plain, count + 1, count, posterior=False)
            yield Operation(backward, plain, count + 1, count, posterior=False)


def way_round(operation: Operation, dtype: DType, flow: Flow) -> Path | None:
    """The shortest that does the operation."""
    loops = [loop for loop in flow.loops if any(map(POSTERIOR, flow.body(loop[1]))) == operation.posterior]
    return Search(flow, operation.demands(dtype)).shortest(loops)


def instructions(operation: Operation, dtype: DType, flow: Flow) -> float | None:
    """The fewest an element."""
    path, (pack, times) = way_round(operation, dtype, flow), operation.moved(dtype)
    return path.length / (pack * times) if path else None
