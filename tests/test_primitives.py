"""Every primitive of csrc's arithmetic against 50 digits, within the contract beside it, on every instruction set that
the machine has and as device code through the SIMT executor."""

from __future__ import annotations

import functools

import mpmath
import numpy as np
import pytest
from mpmath import mpf
from primitives.contracts import Contract, defined, number, read
from primitives.exact import EXACT, SWITCHES
from primitives.library import CHUNK, TARGETS, Entry, Library

CONTRACTS = read()
VECTOR_ONLY = {c.name for c in CONTRACTS if c.header in ("vec.h", "vec_exp.h")}
DTYPES = [np.float32, np.float64]
RANDOM = 300
ACROSS_LANES = ("any", "all")


@functools.lru_cache
def library(target: str) -> Library:
    return Library(target)


def entries(target: str, contract: Contract) -> list[tuple[Library, Entry, int]]:
    """The ways to call the contract's primitive, and which result is meant."""
    if contract.name in VECTOR_ONLY and target in ("DEFAULT", "SIMT"):
        pytest.skip(f"{target} goes one lane at a time, without {contract.name}")
    found = library(target)
    return [(found, e, e.results.index(contract.result)) for e in found.entries[contract.name]]


def label(contract: Contract) -> str:
    return f"{contract.name}.{contract.result}".strip(".")


CASES = pytest.mark.parametrize("contract", CONTRACTS, ids=label)
ONE_LANE = pytest.mark.parametrize("contract", [c for c in CONTRACTS if c.name not in ACROSS_LANES], ids=label)
NUMBERS = pytest.mark.parametrize("contract", [c for c in CONTRACTS if c.may_be_nan], ids=label)
ON = pytest.mark.parametrize("target", TARGETS)
OF = pytest.mark.parametrize("dtype", DTYPES, ids=["float", "double"])


def test_every_primitive_has_a_contract_and_every_contract_a_primitive() -> None:
    stated = {c.name.split("(")[0].split("<")[0] for c in CONTRACTS}
    assert defined() == stated
    assert len({label(c) for c in CONTRACTS}) == len(CONTRACTS)
    assert {label(c) for c in CONTRACTS if c.name not in ACROSS_LANES} == set(EXACT)


@ON
def test_every_contract_is_of_what_is_called(target: str) -> None:
    called = {(name, r) for name, each in library(target).entries.items() for e in each for r in e.results}
    plain = target in ("DEFAULT", "SIMT")
    assert called == {(c.name, c.result) for c in CONTRACTS if not (plain and c.name in VECTOR_ONLY)}


@functools.lru_cache
def points(contract: Contract, dtype: type[np.floating]) -> list[np.ndarray]:
    """The domain's ends and what is next to them, 0 and subnormal numbers, both sides of every switch, numbers of every
    magnitude and numbers evenly spread: for several arguments in drawn combinations."""
    rng, columns = np.random.default_rng(0), []
    switches = next((s for name, s in SWITCHES.items() if contract.name.startswith(name)), [])
    several = len(contract.arguments) > 1
    for argument in contract.arguments:
        low, high = argument.ends(dtype)
        if argument.whole:
            pool = np.arange(low, high + 1)
        else:
            finite = max(low, -float(np.finfo(dtype).max)), min(high, float(np.finfo(dtype).max))
            tiny, least = float(np.finfo(dtype).tiny), float(np.finfo(dtype).smallest_subnormal)
            special = [0.0, least, 3 * least, tiny / 2, tiny, 1e-30, 1e-20, 1e-8, 1e-4, 0.5, 1.0, 2.0, 10.0, *switches]
            special += [-x for x in special]
            near = [low, high, *finite, *(x * (1 + s * 1e-6) for x in special for s in (-1, 0, 1))]
            largest = np.log(min(max(map(abs, finite)), 1e30))
            smallest = np.log(max(tiny, 1e-35, finite[0] if finite[0] > 0 else 0))
            magnitudes = np.exp(rng.uniform(smallest, max(largest, smallest + 1), RANDOM))
            inner = max(finite[0], -150.0), min(finite[1], 150.0)
            even = rng.uniform(*inner, RANDOM) if inner[0] < inner[1] else []
            pool = np.concatenate([near, magnitudes * rng.choice([-1, 1], RANDOM), even])
        with np.errstate(over="ignore"):
            pool = pool.astype(dtype)
        pool = pool[(pool >= dtype(low)) & (pool <= dtype(high))]
        if argument.or_zero:
            pool = np.concatenate([pool, np.round(pool[::2]), np.zeros(RANDOM // 10, dtype)])
        columns.append(rng.permutation(np.resize(pool, 3 * RANDOM)) if several else pool)
    if contract.name == "log_difference":  # what it is for: l near log x
        half = columns[0].size // 2
        columns[1][:half] = np.exp(columns[0][:half].astype(np.float64) * 0.9).astype(dtype)
        columns[0][:half] = np.log(columns[1][:half])
    return columns


@functools.lru_cache
def exact(contract: Contract, dtype: type[np.floating]) -> list[tuple[mpf, mpf]]:
    """The results in 50 digits, and what the contract measures their errors by."""
    found = []
    for arguments in zip(*points(contract, dtype)):
        value = EXACT[label(contract)](*(mpf(float(a)) for a in arguments))
        terms = value if isinstance(value, list) else [value]
        total = sum(terms[1:], terms[0])
        size = sum(map(abs, terms)) if contract.of == "the terms" else abs(total)
        found.append((total, max(size, mpf(1)) if contract.of == "1 or more" else size))
    return found


def ulp(size: mpf, dtype: type[np.floating]) -> mpf:
    info = np.finfo(dtype)
    exponent = mpmath.frexp(size)[1] - 1 if 0 < size < mpf("inf") else info.minexp
    return mpf(2) ** (min(max(exponent, info.minexp), info.maxexp - 1) - info.nmant)


def excess(contract: Contract, dtype: type[np.floating], got: float, value: mpf, size: mpf) -> float:
    """The error as a part of what is allowed."""
    ulps, plain = contract.allowed(dtype)
    most = mpf(float(np.finfo(dtype).max))
    if got == value:
        return 0.0
    if value in (mpf("inf"), mpf("-inf")) or np.isnan(got):
        return float("inf")
    allowed = ulps * ulp(size, dtype) + plain * (size if contract.of else 1)
    # the nearest number is right, whatever an ulp of a contract says
    if np.isinf(got):
        return 0.0 if abs(value) + allowed + ulp(most, dtype) / 2 >= most and (got > 0) == (value > 0) else float("inf")
    error = abs(mpf(got) - value)
    return float(error / allowed) if allowed else (0.0 if error == 0 else float("inf"))


@ONE_LANE
@OF
@ON
def test_within_its_contract(target: str, dtype: type[np.floating], contract: Contract) -> None:
    arguments = points(contract, dtype)
    for lib, entry, which in entries(target, contract):
        got = lib.run(entry, arguments)[which]
        parts = [excess(contract, dtype, float(g), v, s) for g, (v, s) in zip(got, exact(contract, dtype))]
        worst = int(np.argmax(parts))
        at = [float(a[worst]) for a in arguments]
        assert parts[worst] <= 1, (
            f"{entry.form} {label(contract)} at {at}: {got[worst]!r}, exact {exact(contract, dtype)[worst][0]}, "
            f"{parts[worst]:.3g} times what {contract.error!r} allows"
        )


@CASES
@OF
@ON
def test_at_the_ends(target: str, dtype: type[np.floating], contract: Contract) -> None:
    """What the contract says of infinities and zeros, in every lane."""
    for at, expected in contract.ends:
        arguments = [np.full(CHUNK, number(x, dtype), dtype) for x in at]
        for lib, entry, which in entries(target, contract):
            got = lib.run(entry, arguments)[which]
            assert np.array_equal(got, np.full(CHUNK, number(expected, dtype), dtype), equal_nan=True), (at, got[:4])


@NUMBERS
@OF
@ON
def test_nan_stays_nan(target: str, dtype: type[np.floating], contract: Contract) -> None:
    """In any argument, beside lanes that have none."""
    columns = points(contract, dtype)
    for k, argument in enumerate(contract.arguments):
        if argument.whole:
            continue
        arguments = [np.resize(c, 2 * CHUNK).copy() for c in columns]
        arguments[k][::3] = np.nan
        hit = np.arange(2 * CHUNK) % 3 == 0
        for lib, entry, which in entries(target, contract):
            got = lib.run(entry, arguments)[which]
            assert np.isnan(got[hit]).all(), f"{entry.form} {argument.name}: {got[hit]}"
            clean = lib.run(entry, [np.resize(c, 2 * CHUNK) for c in columns])[which]
            assert np.array_equal(got[~hit], clean[~hit], equal_nan=True), f"{entry.form} {argument.name}"


@pytest.mark.parametrize("name", ACROSS_LANES)
@OF
@ON
def test_any_and_all(target: str, dtype: type[np.floating], name: str) -> None:
    """One lane decides, whichever it is."""
    (contract,) = [c for c in CONTRACTS if c.name == name]
    for lib, entry, _ in entries(target, contract):
        for odd in range(CHUNK):
            lanes = np.full(CHUNK, 0.0 if name == "any" else 1.0, dtype)
            lanes[odd] = 1 - lanes[odd]
            (got,) = lib.run(entry, [lanes])
            together = got == got[odd]  # the vector that the lane is in
            assert got[odd] == (1.0 if name == "any" else 0.0)
            assert together[odd] and np.ptp(np.flatnonzero(together)) == together.sum() - 1
