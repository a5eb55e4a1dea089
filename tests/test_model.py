"""The model of a kernel's speed: what it reads from machine code, on listings that can be counted by hand, and that its
predictions move as a GPU's would.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from cuda_build import model, predictions
from cuda_build.binary import Resources
from cuda_build.model import Code, Constants, code_of, predict
from cuda_build.operations import DTYPES, Operation
from cuda_build.paths import Flow
from cuda_build.sass import Instruction, kernels

GPU = model.GPU(90, copy=2e12, sms=100, clock=1e9)
SHARP = Constants(
    latency=0.6e-6, l2=0.27e-6, cycles=2.2, issue=0.8, beside=0.5, start=0.3e-6, fence=0.5e-6,
    arrive=0.6e-6, drain=0.0, launch=2e-6, sharpness=200.0,
)  # fmt: skip
SOFT = replace(SHARP, drain=0.5, sharpness=5.0)
# nothing but a copy
CODE = Code(
    registers=32, instructions=4.0, beside=0.0, trip=8, waits=1, in_flight=64, seeded=False, fences=0,
    at_once=0, least=4096, units=8192,
)  # fmt: skip


def instructions(text: str) -> list[Instruction]:
    return [Instruction("", *line.strip().split(" ", 1)) for line in text.strip().splitlines()]


def listing(name: str, lines: str) -> Flow:
    """A kernel, given as a line an instruction, or a label."""
    text, address = [f"//--- .text.{name} ---"], 0
    for line in lines.strip().splitlines():
        if line.strip().endswith(":"):
            text.append(line.strip())
            continue
        text.append(f"        /*{address:04x}*/   {line.strip()} ;")
        address += 16
    (kernel,) = kernels("\n".join(text))
    return Flow(kernel)


TAIL = """
BAR.SYNC.DEFER_BLOCKING 0x0
@P0 BRA `(.others)
{one}
ATOMG.E.ADD.STRONG.GPU PT, R3, desc[UR4][R4.64], R5
STS [R6], R3
.others:
BAR.SYNC.DEFER_BLOCKING 0x0
LDS R3, [R6]
{all}
@P1 EXIT
.finish:
{loads}
DADD R8, R8, R20
DADD R8, R8, R22
@P2 BRA `(.finish)
STG.E.64 desc[UR4][R2.64], R8
EXIT
"""
PARTIAL = "LDG.E.64.STRONG.GPU R{}, desc[UR4][R2.64]"
BATCHED = "\n".join([PARTIAL.format(20), PARTIAL.format(22)])
ONE_BY_ONE = "\n".join([PARTIAL.format(20), "DADD R8, R8, R20", PARTIAL.format(22)])


def test_waits_are_counted_with_what_is_under_way() -> None:
    two = """
    LDG.E.128 R4, desc[UR4][R2.64]
    LDG.E.128 R8, desc[UR4][R12.64]
    FADD R20, R4, R11
    FADD R20, R20, R8"""
    assert model.batches(instructions(two)) == [32]
    one_by_one = """
    LDG.E.128 R4, desc[UR4][R2.64]
    FADD R20, R4, R20
    LDG.E.64 R8, desc[UR4][R12.64]
    LDG.E R30, desc[UR4][R14.64]
    FADD R20, R30, R20
    FADD R20, R9, R20"""
    assert model.batches(instructions(one_by_one)) == [16, 8], "what is not wide comes from a cache"
    ahead = """
    FADD R20, R4, R5
    LDG.E.128 R4, desc[UR4][R2.64]
    FADD R21, R20, R20"""
    assert model.batches(instructions(ahead)) == [16], "for the next round"


def test_fences_are_every_threads_or_ones() -> None:
    fence = "MEMBAR.SC.GPU"
    both = listing("old", f"{fence}\n{TAIL.format(one='NOP', all=fence, loads=ONE_BY_ONE)}")
    assert model.fences_by_all(both) == 2 and model.partials_at_once(both) == 1
    single = listing("new", TAIL.format(one=fence, all="NOP", loads=BATCHED))
    assert model.fences_by_all(single) == 0 and model.partials_at_once(single) == 2
    predicated = listing("p", f"@!P3 {fence}\n{TAIL.format(one='NOP', all='NOP', loads=BATCHED)}")
    assert model.fences_by_all(predicated) == 0


LOOP = """
.loop:
LDG.E.128 R4, desc[UR4][R2.64]
LDG.E.128 R8, desc[UR4][R12.64]
FADD R4, R4, R8
MUFU.EX2 R4, R4
@P3 BRA `(.loop)
"""


def test_code_is_read() -> None:
    flow = listing("k", LOOP + TAIL.format(one="MEMBAR.SC.GPU", all="NOP", loads=BATCHED))
    taken = Resources(40, 0, 0, 64)
    forward = Operation("reconstruction_forward k 1", "k", 2, 0, posterior=False)
    read = code_of(forward, DTYPES[0], flow, taken)
    assert read == replace(CODE, registers=40, instructions=5 / 4, trip=4, in_flight=32, at_once=2)
    backward = replace(forward, name="reconstruction_backward k 1")
    assert code_of(backward, DTYPES[0], flow, taken) == replace(read, at_once=0), "nothing is summed"
    with pytest.raises(RuntimeError, match="no way round k does 'x', float32"):
        code_of(replace(forward, name="x", loads=3), DTYPES[0], flow, taken)


def test_sources_are_read() -> None:
    assert model.constant("kThreads") == 256 and model.constant("kPacksPerThread") == 4
    with pytest.raises(LookupError, match="kNonesuch"):
        model.constant("kNonesuch")
    assert model.unit_of(1 << 24, 4096, 8192) == 4096 and model.unit_of(1 << 26, 4096, 8192) == 3 * 4096
    assert model.unit_of(1 << 24, 8192, 8192) == 8192 and model.unit_of(1 << 26, 8192, 8192) == 2 * 8192


@pytest.mark.parametrize(
    ("registers", "blocks"), [(32, 8), (40, 6), (48, 5), (64, 4), (65, 3), (80, 3), (112, 2), (168, 1), (16, 8)]
)
def test_registers_leave_room_for_blocks(registers: int, blocks: int) -> None:
    assert model.resident(registers, 256) == blocks


def share(code: Code = CODE, size: int = 8, elements: int = 1 << 24, c: Constants = SHARP) -> Any:
    return predict(code, size, elements, GPU, c)


def test_a_copy_is_a_copy() -> None:
    assert share() == {"blocks": 8, "share": pytest.approx(1), "bound": "memory"}
    assert 0.9 < share(c=replace(SHARP, sharpness=5.0))["share"] < 1.0, "rates that are close slow each other"
    assert 0.9 < share(c=replace(SHARP, drain=1.0))["share"] < 1.0, "and the last blocks leave others idle"


def test_the_slowest_rate_decides() -> None:
    launch = replace(SHARP, launch=0.0)
    # 0.8 x 100 x 128 x 1e9 / 100 elements a second, of 8 bytes, over 2e12
    busy = share(replace(CODE, instructions=100.0), c=replace(launch, cycles=0.0))
    apart = share(replace(CODE, instructions=60.0, beside=80.0), c=replace(launch, cycles=0.0))
    assert apart == busy, "half of what some threads do beside the others"
    assert busy["bound"] == "issue" and busy["share"] == pytest.approx(0.8 * 100 * 128 * 1e9 / 100 * 8 / 2e12, abs=2e-3)
    # 4096 elements a block, 2 trips of a wait each after the start, and little else
    slow = replace(launch, latency=10e-6, cycles=0.0)
    late = share(c=slow)
    assert late["bound"] == "latency"
    assert late["share"] == pytest.approx(100 * 8 * 4096 / (0.3e-6 + 2 * 10e-6) * 8 / 2e12, abs=2e-3)
    assert share(replace(CODE, waits=2), c=slow)["share"] < 0.6 * late["share"]
    assert share(replace(CODE, registers=64), c=slow)["share"] == pytest.approx(late["share"] / 2, abs=2e-3)
    assert share(replace(CODE, trip=16), c=slow)["share"] > 1.4 * late["share"]
    assert share(replace(CODE, seeded=True), c=replace(slow, l2=1e-5))["share"] < 0.7 * late["share"]


def test_a_sum_costs_its_tail() -> None:
    tail = replace(CODE, at_once=8)
    shares = [
        share(code, c=SOFT)["share"]
        for code in (CODE, tail, replace(tail, fences=2), replace(tail, fences=2, at_once=1))
    ]
    assert shares == sorted(shares, reverse=True) and len(set(shares)) == 4
    large = [share(code, elements=1 << 26, c=SOFT)["share"] for code in (CODE, replace(tail, fences=2, at_once=1))]
    assert large[0] - large[1] < shares[0] - shares[3], "less of a longer time"


def test_the_committed_predictions_are_the_models() -> None:
    """Whoever changes a constant of the model has the file written again."""
    document = json.loads(predictions.FILE.read_text())
    assert document["constants"] == asdict(Constants())
    assert document["gpus"] == {name: asdict(gpu) for name, gpu in model.GPUS.items()}
    for record in document["predictions"]:
        code = Code(**{f.name: record[f.name] for f in fields(Code)})
        again = predict(code, record["bytes"], record["elements"], model.GPUS[record["gpu"]])
        again["share"] = round(again["share"], 3)
        assert again.items() <= record.items(), (record["kernel"], record["dtype"])


def test_constants_are_fitted_to_measurements() -> None:
    truth = replace(Constants(), latency=1.3e-6, issue=0.6)
    codes = [
        replace(CODE, registers=r, instructions=i, waits=w) for r in (40, 80) for i in (10.0, 80.0) for w in (1, 2)
    ]
    records = [
        {"kernel": str(k), "dtype": "float32", "gpu": "H100", "elements": n, "bytes": 12, **asdict(code)}
        for k, code in enumerate(codes)
        for n in predictions.ELEMENTS
    ]
    measured = [
        {**r, "of_copy": predict(code, 12, r["elements"], model.GPUS["H100"], truth)["share"]}
        for r, code in zip(records, (code for code in codes for _ in predictions.ELEMENTS))
    ]
    found, off = model.fit(
        records, [*measured, {"kernel": "0", "dtype": "float64", "elements": 1, "error": "x"}], "H100"
    )
    assert off < 0.02
    assert math.log(found.latency / truth.latency) == pytest.approx(0, abs=0.2)
    assert f"latency {found.latency:.3g}, " in model.told(found)
    with pytest.raises(LookupError, match="H200"):
        model.fit(records, measured, "H200")


def test_the_table_names_what_bounds() -> None:
    record = {"kernel": "k", "dtype": "float32", "gpu": "H100", "elements": 1 << 24, "bytes": 8, **asdict(CODE)}
    text = predictions.table([record | share(), record | share() | {"elements": 1 << 26, "share": 0.5}])
    assert "H100 2^24  H100 2^26" in text and "100% m" in text and " 50% m" in text and text.count("\n") == 2
