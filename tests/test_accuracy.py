"""docs/accuracy.md is what the command writes, and no row of the kernels is worse than the contract but where its
arguments' own rounding is."""

from __future__ import annotations

import math
import re

import pytest
import torch

from tools import accuracy
from tools.accuracy import CASES, DTYPES, Case, rows_of

# of max(1, |true|), or relative; a half rounds its results to 8 or 11 bits
BOUNDS = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8, torch.float16: 2**-11}
HEADER = re.compile(r"### (.*) in (\w+)")
Found = dict[tuple[str, str, str, str], list[str]]


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def written() -> Found:
    """The page's rows, by group, dtype, function and what of it."""
    rows: Found = {}
    group = dtype = ""
    for line in accuracy.PAGE.read_text().splitlines():
        if head := HEADER.fullmatch(line):
            group, dtype = head.groups()
        elif line.startswith("| `"):
            name, what, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            rows[group, dtype, name, what] = cells
    return rows


def test_the_page_has_every_row() -> None:
    expected = {
        (case.group, named(dtype), case.row, what)
        for case in CASES
        for dtype in DTYPES
        for what in ("value", "gradient")
    }
    assert len({(case.group, case.row) for case in CASES}) == len(CASES)
    assert set(written()) == expected, "run `make accuracy`"


def error_of(cell: str) -> float:
    return float(cell.split(" at ")[0])


@pytest.mark.filterwarnings("ignore:likelihood .* has no kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("row", ["`logvar`, wide", "`gaussian`, wide", "`softplus`, everyday"])
def test_rows_are_what_the_command_writes(extension: object, row: str, dtype: torch.dtype) -> None:
    """Within a factor of 8: instruction sets and torches round each in their own way. The last column is left out: the
    textbook cancels there, and what remains is another number on each processor."""
    case = next(c for c in CASES if c.row == row and c.group in ("The KL", "Likelihoods"))
    for what, found in zip(("value", "gradient"), rows_of(case, dtype)):
        cells = written()[case.group, named(dtype), row, what]
        for column, cell in zip(accuracy.COLUMNS[:-1], cells[:-1]):
            there, here = error_of(cell), found.cells[column]
            assert isinstance(here, accuracy.Worst)
            same = there == here.error or (math.isnan(there) and math.isnan(here.error))
            assert same or there / 8 <= here.error <= 8 * there, f"{what}, {column}: {cell}, now {here}"


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=named)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.group}: {c.row}".replace("`", ""))
def test_kernels_are_as_good_as_their_arguments(extension: object, case: Case, dtype: torch.dtype) -> None:
    """Other draws than the page's, and a tenth as many."""
    if dtype == torch.float64 and case.share < 1:
        pytest.skip("many numbers a point, each in 200 digits: the page has them")
    for what, row in zip(("value", "gradient"), rows_of(case, dtype, seed=2, points=0.1)):
        kernels = row.cells["kernels"]
        assert isinstance(kernels, accuracy.Worst)
        assert kernels.error <= BOUNDS[dtype] + 4 * row.rounding, f"{what}: {kernels}, a rounding {row.rounding:.1e}"
