"""The coefficients of csrc's polynomials: ``python -m tools.coefficients`` prints them with the error that they leave.

Each is minimax, by Remez's exchange in 50 digits, in the weighted error that its use has, and then rounded to the type
that computes with it, up or down as suits the others. Taylor coefficients need no program: they stand in the
headers as fractions.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mpmath
from mpmath import mp, mpf

Function = Callable[[mpf], mpf]
DIGITS = 50


@dataclass(frozen=True)
class Fit:
    """p(x) = sum of c_k x^k with the least maximum of ``weight(x) |p(x) - f(x)|`` over ``interval``."""

    file: str
    f: Function
    weight: Function
    interval: tuple[str, str]
    count: int
    narrow: bool  # coefficients are rounded to float, else to double
    fixed: tuple[float, ...] = ()  # the lowest ones


def rounded(x: mpf, narrow: bool) -> float:
    wide = float(x)
    return float(struct.unpack("f", struct.pack("f", wide))[0]) if narrow else wide


def value(coefficients: Sequence[mpf | float], x: mpf) -> mpf:
    total = mpf(0)
    for c in reversed(coefficients):
        total = total * x + c
    return total


def error_at(fit: Fit, coefficients: Sequence[mpf | float], x: mpf) -> mpf:
    return fit.weight(x) * (value(coefficients, x) - fit.f(x))


def _peaks(error: Function, ends: tuple[mpf, mpf], points: int) -> list[mpf]:
    """The places of the error's extremes, by a grid that is dense at the ends, each refined by a parabola."""
    low, high = ends
    grid = [(low + high) / 2 - (high - low) / 2 * mpmath.cos(mp.pi * k / points) for k in range(points + 1)]
    values = [error(x) for x in grid]
    found = []
    for k, (x, e) in enumerate(zip(grid, values)):
        before, after = (values[k - 1] if k else None), (values[k + 1] if k < points else None)
        if all(other is None or abs(e) >= abs(other) or e * other < 0 for other in (before, after)):
            if before is not None and after is not None and e * before > 0 and e * after > 0:
                a, b = (grid[k - 1] - x), (grid[k + 1] - x)
                fa, fb = before - e, after - e
                bottom = fa * b - fb * a
                if bottom != 0:
                    x = x + (fa * b * b - fb * a * a) / (2 * bottom)
            found.append(x)
    return found


def _alternating(error: Function, places: Sequence[mpf], count: int) -> list[mpf]:
    """``count`` of the places, whose errors have signs by turns, the largest of them kept."""
    kept: list[mpf] = []
    for x in places:
        if kept and error(kept[-1]) * error(x) > 0:
            if abs(error(x)) > abs(error(kept[-1])):
                kept[-1] = x
        else:
            kept.append(x)
    while len(kept) > count:
        kept.pop(0 if abs(error(kept[0])) < abs(error(kept[-1])) else -1)
    return kept


def _remez(fit: Fit) -> list[mpf]:
    """The fixed coefficients, and those that go with them best."""
    known = fit.fixed
    first, free = len(known), fit.count - len(known)
    ends = mpf(fit.interval[0]), mpf(fit.interval[1])
    middle, half = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2
    # none in the middle, which may be 0
    nodes = [middle - half * mpmath.cos(mp.pi * (k + mpf("0.4")) / (free + 1)) for k in range(free + 1)]
    coefficients: list[mpf] = []
    for _ in range(30):
        rows = [
            [x**j for j in range(free)] + [(-1) ** k / (fit.weight(x) * abs(x) ** first)] for k, x in enumerate(nodes)
        ]
        right = [(fit.f(x) - value(known, x)) / x**first for x in nodes]
        *solved, level = mpmath.lu_solve(mpmath.matrix(rows), mpmath.matrix(right))
        coefficients = [mpf(c) for c in known] + list(solved)
        cache: dict[mpf, mpf] = {}

        def error(x: mpf, c: Sequence[mpf] = coefficients, cache: dict[mpf, mpf] = cache) -> mpf:
            """Of the polynomial that is free, over x^first: its signs alternate, also where x goes through 0."""
            if x not in cache:
                cache[x] = error_at(fit, c, x) * (-1 if x < 0 and first % 2 else 1)
            return cache[x]

        nodes = _alternating(error, _peaks(error, ends, 24 * (free + 2)), free + 1)
        if len(nodes) < free + 1:
            raise RuntimeError(f"the error has {len(nodes)} extremes of {free + 1}")
        if max(abs(error(x)) for x in nodes) <= abs(level) * (1 + mpf("1e-6")):
            break
    return coefficients


def _step(x: float, way: int) -> float:
    """The float after x, away from 0 or towards it."""
    (bits,) = struct.unpack("i", struct.pack("f", x))
    return float(struct.unpack("f", struct.pack("i", bits + way))[0])


def _polished(fit: Fit, found: list[float], points: int = 80) -> list[float]:
    """Coefficients a step from the rounded ones, one or two at a time, as long as the greatest error falls."""
    low, high = mpf(fit.interval[0]), mpf(fit.interval[1])
    xs = [low + (high - low) * k / points for k in range(points + 1)]
    free = range(len(fit.fixed), fit.count)
    powers = [[float(fit.weight(x) * x**k) for k in range(fit.count)] for x in xs]
    errors = [float(error_at(fit, found, x)) for x in xs]
    best = max(map(abs, errors))
    single = [((k, way),) for k in free for way in (1, -1)]
    moves = [*single, *((a, b) for (a,), (b,) in itertools.combinations(single, 2) if a[0] != b[0])]
    better = True
    while better:
        better = False
        for move in moves:
            steps = [(k, _step(found[k], way)) for k, way in move]
            tried = [e + sum((c - found[k]) * row[k] for k, c in steps) for e, row in zip(errors, powers)]
            error = max(map(abs, tried))
            if error < 0.999 * best:
                errors, best, better = tried, error, True
                for k, c in steps:
                    found[k] = c
    return found


def coefficients_of(fit: Fit) -> list[float]:
    with mp.workdps(DIGITS):
        found = [rounded(c, fit.narrow) for c in _remez(fit)]
        return _polished(fit, found) if fit.narrow else found


def greatest_error(fit: Fit, coefficients: Sequence[float], points: int = 400) -> float:
    with mp.workdps(DIGITS):
        low, high = mpf(fit.interval[0]), mpf(fit.interval[1])
        return float(max(abs(error_at(fit, coefficients, low + (high - low) * k / points)) for k in range(points + 1)))


def _exp_tail(y: mpf) -> mpf:
    """(e^y - 1 - y) / y^2"""
    if abs(y) < mpf("1e-3"):
        return sum(y**k / mpmath.factorial(k + 2) for k in range(14))
    return (mpmath.expm1(y) - y) / y**2


def _atanh_tail(y: mpf) -> mpf:
    """(atanh(s) / s - 1) / s^2 at s^2 = y"""
    if y < mpf("1e-4"):
        return sum(y**k / (2 * k + 3) for k in range(14))
    s = mpmath.sqrt(y)
    return (mpmath.atanh(s) / s - 1) / y


def stirling(z: mpf) -> mpf:
    """log Gamma(z + 1) - (z + 1/2) log z + z - log(2 pi) / 2"""
    return mpmath.loggamma(z + 1) - (z + mpf("0.5")) * mpmath.log(z) + z - mpmath.log(2 * mp.pi) / 2


def stirling_slope(z: mpf) -> mpf:
    return mpmath.digamma(z + 1) - mpmath.log(z) - 1 / (2 * z)


def _small(u: mpf) -> bool:
    return bool(u < mpf("1e-9"))


def _stirling_value(u: mpf) -> mpf:
    return mpf(1) / 12 - u**2 / 360 if _small(u) else stirling(1 / u) / u


def _stirling_slope(u: mpf) -> mpf:
    return -mpf(1) / 12 + u**2 / 120 if _small(u) else stirling_slope(1 / u) / u**2


def _sine(y: mpf) -> mpf:
    """sin(2 pi f) / f at f^2 = y"""
    f = mpmath.sqrt(y)
    return 2 * mp.pi * mpmath.sinc(2 * mp.pi * f)


def _cosine(y: mpf) -> mpf:
    return mpmath.cos(2 * mp.pi * mpmath.sqrt(y))


FITS: dict[str, Fit] = {
    # relative: what q(y) is wrong by, h(x) is in its own last place; 1/2 is exact, so that h is right at 0
    "exp_tail double": Fit("vmath.h", _exp_tail, lambda y: 1 / _exp_tail(y), ("-0.7", "0.7"), 13, False, (0.5,)),
    "exp_tail float": Fit("vmath.h", _exp_tail, lambda y: 1 / _exp_tail(y), ("-0.7", "0.7"), 7, True, (0.5,)),
    # relative to e^y, where a tenth of an ulp is enough
    "exp_tail short": Fit(
        "vmath.h", _exp_tail, lambda y: (y * y + mpf("1e-8")) * mpmath.exp(-y), ("-0.3466", "0.3466"), 5, True
    ),
    # of atanh(s) / s
    "atanh_tail float": Fit("vmath.h", _atanh_tail, lambda y: y + mpf("1e-4"), ("0", "0.11111112"), 4, True),
    # of S(1 / u), and as far as a float's 1/12 allows relative to it; of 12 S'(1 / u) / u^2, relative
    "stirling value": Fit("special.h", _stirling_value, lambda u: u + mpf("0.05"), ("0", "1"), 7, True),
    "stirling slope": Fit("special.h", _stirling_slope, lambda u: mpf(12), ("0", "1"), 7, True),
    # relative, up to an eighth of a turn
    "sine float": Fit("philox.h", _sine, lambda y: 1 / _sine(y), ("0", "0.015625"), 4, True),
    "cosine float": Fit("philox.h", _cosine, lambda y: 1 / _cosine(y), ("0", "0.015625"), 4, True),
}


def main() -> None:
    for name, fit in FITS.items():
        found = coefficients_of(fit)
        print(f"{name} ({fit.file}), error {greatest_error(fit, found):.2g}:\n  {', '.join(map(repr, found))}")


if __name__ == "__main__":
    main()
