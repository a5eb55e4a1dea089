"""The reader of SASS and the search for hot paths, on a listing small enough to count by hand."""

from __future__ import annotations

import pytest
from cuda_build import gates
from cuda_build.binary import Resources, arguments
from cuda_build.operations import DTYPES, Operation, instructions
from cuda_build.paths import Demand, Flow, Search
from cuda_build.sass import Kernel, kernels

LISTING = """
//--------------------- .nv.info                  --------------------------
//--------------------- .text.loop                --------------------------
        .section        .text.loop,"ax",@progbits
loop:
.text.loop:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT ;
        /*0020*/               @P0 EXIT ;
.L_x_0:
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0060*/                   FADD R4, R4, R8 ;
.L_x_1:
        /*0070*/                   BSSY B0, `(.L_x_3) ;
        /*0080*/              @!P2 BRA `(.L_x_2) ;
        /*0090*/                   CALL.REL.NOINC `($loop$slow) ;
        /*00a0*/                   BRA `(.L_x_4) ;
.L_x_2:
        /*00b0*/                   MUFU.EX2 R4, R4 ;
        /*00c0*/                   FMUL R4, R4, R4 ;
.L_x_4:
        /*00d0*/                   BSYNC B0 ;
.L_x_3:
        /*00e0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00f0*/               @P3 BRA `(.L_x_0) ;
        /*0100*/                   DADD R4, R4, R6 ;
        /*0110*/                   EXIT ;
        .weak           $loop$slow
        .type           $loop$slow,@function
$loop$slow:
        /*0120*/                   FADD R4, R4, R4 ;
        /*0130*/                   FADD R4, R4, R4 ;
        /*0140*/                   FMUL R4, R4, R4 ;
        /*0150*/                   RET.REL.NODEC R20 `(loop) ;
//--------------------- .nv.constant0             --------------------------
"""


@pytest.fixture
def kernel() -> Kernel:
    (found,) = kernels(LISTING)
    return found


@pytest.fixture
def flow(kernel: Kernel) -> Flow:
    return Flow(kernel)


def test_instructions(kernel: Kernel) -> None:
    assert kernel.name == "loop" and len(kernel.code) == 22
    assert str(kernel.code[2]) == "@P0 EXIT"
    assert (kernel.code[3].opcode, kernel.code[3].root) == ("LDG.E.128", "LDG")


def test_where_an_instruction_leads(kernel: Kernel) -> None:
    assert kernel.successors(0) == [1]
    assert kernel.successors(2) == [3]
    assert kernel.successors(4) == [5, 7]
    assert kernel.successors(10) == [13]
    assert kernel.successors(13) == [14]
    assert kernel.successors(17) == []
    assert kernel.callee(9) == 18


def test_the_loop(flow: Flow) -> None:
    ((header, body),) = flow.loops
    assert header == 3 and body == {3, 5, 7, 9, 11, 13, 14}


@pytest.mark.parametrize(
    ("pattern", "least", "most", "length"),
    [
        ("^STG", 1, None, 9),  # 30 40 70 80 b0 c0 d0 e0 f0
        ("^MUFU", 1, None, 9),
        ("^MUFU", 0, 0, 13),  # 30 40 70 80 90 a0 d0 e0 f0, and four of what is called
        (r"^LDG\.E$|^LDG\.E ", 1, None, 11),
        ("^DADD", 1, None, None),
        ("^LDG", 1, 1, 9),
    ],
)
def test_shortest_way_round(flow: Flow, pattern: str, least: int, most: int | None, length: int | None) -> None:
    path = Search(flow, [Demand(pattern, least, most)]).shortest(flow.loops)
    assert (path and path.length) == length


def test_instructions_an_element(flow: Flow) -> None:
    once = Operation("once", "loop", 1, 1, posterior=False)
    assert instructions(once, DTYPES[0], flow) == 9 / 4
    assert instructions(Operation("twice", "loop", 2, 1, posterior=False), DTYPES[0], flow) is None
    assert instructions(Operation("posterior", "loop", 1, 1), DTYPES[0], flow) is None


def test_gates_on_double(kernel: Kernel) -> None:
    assert not list(gates.no_double("float: A", kernel))
    assert "1 loops over packs" in next(gates.no_double("float: A + B", kernel))
    (found,) = kernels(LISTING.replace("FADD R4, R4, R8", "DMUL R4, R4, R8").replace("DADD", "DSETP"))
    told = list(gates.no_double("float: A", found))
    assert "`DMUL R4, R4, R8` in a loop" in told[0] and "DSETP" in told[1] and len(told) == 2


def test_gates_on_memory(kernel: Kernel) -> None:
    assert not list(gates.vectors("k", kernel))
    assert not list(gates.no_local_memory("k", Resources(32, 0, 0, 64), kernel))
    (narrow,) = kernels(LISTING.replace("STG.E.128", "STL.128"))
    assert list(gates.vectors("k", narrow)) == ["k: no 128-bit STG"]
    assert len(list(gates.no_local_memory("k", Resources(32, 16, 0, 64), narrow))) == 2


def test_gates_on_the_baseline() -> None:
    baseline = {"k": {"registers": 32, "shared": 64}}
    assert not list(gates.within("k", Resources(32, 0, 0, 64), baseline))
    assert list(gates.within("k", Resources(33, 0, 0, 64), baseline)) == ["k: 33 registers, 32 in the baseline"]
    assert "--write" in next(gates.within("new", Resources(1, 0, 0, 0), baseline))


def test_template_arguments() -> None:
    assert arguments("f<float, A<B<1>, 2>, C>") == ["float", "A<B<1>, 2>", "C"]


def test_gates_on_instructions() -> None:
    known = {("k", "float32", "H100", 64): {"instructions": 5.0}}
    record = {"kernel": "k", "dtype": "float32", "gpu": "H100", "elements": 64, "instructions": 5.0}
    assert not list(gates.no_slower([record], known))
    slower = [record | {"instructions": 5.25}, record | {"dtype": "float16"}]
    told = list(gates.no_slower(slower, known))
    assert told[0] == "k, float32, H100, 64: 5.25 instructions an element, predicted 5.0" and "--write" in told[1]
