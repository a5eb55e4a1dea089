"""What each primitive is, in 50 digits, and where it switches from one formula to another. A function returns a value,
or the terms that it adds up where its contract speaks of the terms."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
from mpmath import mp, mpf

mp.dps = 50
Exact = Callable[..., "mpf | list[mpf]"]
HALF_LOG_2PI = mpmath.log(2 * mp.pi) / 2


def _log(x: mpf) -> mpf:
    return mpf("-inf") if x == 0 else mpmath.log(x)


def _h(x: mpf) -> mpf:
    """e^x - 1 - x"""
    if x == mpf("inf"):
        return x
    return mpmath.fsum(x**k / mpmath.factorial(k) for k in range(2, 20)) if abs(x) < 1e-3 else mpmath.expm1(x) - x


def _exp_tail(y: mpf) -> mpf:
    return mpmath.fsum(y**k / mpmath.factorial(k + 2) for k in range(40))


def _atanh_tail(y: mpf) -> mpf:
    return mpmath.fsum(y**k / (2 * k + 3) for k in range(60))


def _parts(x: mpf) -> tuple[mpf, int]:
    mantissa, exponent = mpmath.frexp(x)
    return (mantissa, exponent) if mantissa >= mpf("0.7071067") else (2 * mantissa, exponent - 1)


def _stirling(z: mpf) -> mpf:
    if z > 1e8:
        return 1 / (12 * z) - 1 / (360 * z**3)
    return mpmath.loggamma(z + 1) - (z + mpf("0.5")) * mpmath.log(z) + z - HALF_LOG_2PI


def _stirling_slope(z: mpf) -> mpf:
    if z > 1e8:
        return -1 / (12 * z**2) + 1 / (120 * z**4)
    return mpmath.digamma(z + 1) - mpmath.log(z) - 1 / (2 * z)


def _factorial_excess(x: mpf) -> mpf:
    return (
        mpmath.log(x) / 2 + HALF_LOG_2PI + _stirling(x) if x > 1e8 else mpmath.loggamma(x + 1) - x * mpmath.log(x) + x
    )


def _negative_binomial(mu: mpf, theta: mpf, x: mpf) -> mpf:
    gammas = mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
    return (theta + x) * mpmath.log1p(mu / theta) - x * mpmath.log(mu / theta) - gammas


def _negative_binomial_dtheta(mu: mpf, theta: mpf, x: mpf) -> mpf:
    gammas = mpmath.digamma(x + theta) - mpmath.digamma(theta)
    return mpmath.log1p(mu / theta) + (x - mu) / (theta + mu) - gammas


RISING = ("rest", "factor", "least", "up", "dup", "top", "dtop")


def _log_rising(k: mpf, a: mpf) -> mpf:
    return mpmath.loggamma(k + 1) + mpmath.loggamma(a) - mpmath.loggamma(k + a)


def _rising(which: int) -> Exact:
    def result(k: mpf, a: mpf) -> mpf:
        if k == 0:
            return mpf((0, 1, 1, 1, 0, 1, 0)[which])
        A, small = k + a, a < 1
        factor, least, up = k * A / (1 if small else a), a if small else mpf(1), a + 1 if small else a
        rest = _log_rising(k, a) - k * mpmath.log(k / A) - a * mpmath.log(a / A) - mpmath.log(factor) / 2
        dup = mpmath.digamma(up) - mpmath.log(up)
        return (rest + mpmath.log(least), factor, least, up, dup, A, mpmath.digamma(A) - mpmath.log(A))[which]

    return result


def _beta_binomial(a: mpf, b: mpf, x: mpf, y: mpf) -> mpf:
    return _log_rising(x, a) + _log_rising(y, b) - _log_rising(x + y, a + b)


def _beta_binomial_da(a: mpf, b: mpf, x: mpf, y: mpf) -> mpf:
    return sum(s * mpmath.digamma(z) for s, z in ((1, a), (-1, x + a), (-1, a + b), (1, x + y + a + b)))


def _beta_binomial_dn(a: mpf, b: mpf, x: mpf, y: mpf) -> mpf:
    return sum(s * mpmath.digamma(z) for s, z in ((-1, x + y + 1), (1, y + 1), (-1, y + b), (1, x + y + a + b)))


def _rint(x: mpf) -> mpf:
    return mpf(round(float(x)))


def _sigmoid(x: mpf) -> mpf:
    return 1 / (1 + mpmath.exp(-x))


EXACT: dict[str, Exact] = {
    "exp_": mpmath.exp,
    "log_unit": _log,
    "log_": _log,
    "sqrt_": mpmath.sqrt,
    "abs_": abs,
    "at_most": min,
    "fused_": lambda a, b, c: a * b + c,
    "fma_": lambda a, b, c: [a * b, c],
    "reciprocal": lambda x: 1 / x,
    "rint_": _rint,
    "less": lambda a, b: mpf(a < b),
    "less_equal": lambda a, b: mpf(a <= b),
    "equal": lambda a, b: mpf(a == b),
    "select": lambda m, a, b: a if m == 1 else b,
    "log_parts.mantissa": lambda x: _parts(x)[0],
    "log_parts.exponent": lambda x: mpf(_parts(x)[1]),
    "polynomial(1,-0.5,0.25)": lambda x: [mpf(1), -x / 2, x * x / 4],
    "exp_tail": _exp_tail,
    "exp_tail<SHORT>": _exp_tail,
    "atanh_tail": _atanh_tail,
    "twice_atanh": lambda s: 2 * mpmath.atanh(s),
    "atanh_excess": lambda s: 2 * s**3 * _atanh_tail(s * s),
    "exp_terms.root": lambda x: mpmath.exp(x / 2),
    "exp_terms.em1": mpmath.expm1,
    "exp_terms.h": _h,
    "exp_terms(x,e^(x/2)).em1": mpmath.expm1,
    "exp_terms(x,e^(x/2)).h": _h,
    "softplus_terms.step": lambda x: mpf(x > 0),
    "softplus_terms.tail": lambda x: mpmath.log1p(mpmath.exp(-abs(x))),
    "softplus_terms.sigmoid": _sigmoid,
    "softplus_terms.complement": lambda x: _sigmoid(-x),
    "softplus(x,terms)": lambda x: x if x == mpf("inf") else mpmath.log1p(mpmath.exp(x)),
    "tanh_terms.tanh": mpmath.tanh,
    "tanh_terms.slope": lambda x: 4 * mpmath.exp(-2 * abs(x)) / (1 + mpmath.exp(-2 * abs(x))) ** 2,
    "log_difference.log": lambda _, x: mpmath.log(x),
    "log_difference.difference": lambda l, x: l - mpmath.log(x),  # noqa: E741
    "full_log_difference.log": lambda _, x: _log(x),
    "full_log_difference.difference": lambda l, x: l - _log(x),  # noqa: E741
    "stirling_from_one.value": _stirling,
    "stirling_from_one.slope": _stirling_slope,
    "stirling.value": _stirling,
    "stirling.slope": _stirling_slope,
    "stirling_step(z,1/z,1/(z+1)).value": lambda z: _stirling(z) - _stirling(z + 1),
    "stirling_step(z,1/z,1/(z+1)).slope": lambda z: _stirling_slope(z) - _stirling_slope(z + 1),
    "factorial_excess(x,log(x))": _factorial_excess,
    "in_unit": lambda x: x,
    "count_of": lambda x: x,
    "negative_binomial.nll": _negative_binomial,
    "negative_binomial.dmu": lambda mu, theta, x: theta / (theta + mu) * (1 - x / mu),
    "negative_binomial.dtheta": _negative_binomial_dtheta,
    "deviance(O,E,O-E).log": lambda seen, due: mpmath.log(seen / due),
    "deviance(O,E,O-E).value": lambda seen, due: [seen * mpmath.log(seen / due), due - seen],
    **{f"rising_term.{result}": _rising(n) for n, result in enumerate(RISING)},
    "beta_binomial(n=x+y).nll": _beta_binomial,
    "beta_binomial(n=x+y).da": _beta_binomial_da,
    "beta_binomial(n=x+y).db": lambda a, b, x, y: _beta_binomial_da(b, a, y, x),
    "beta_binomial(n=x+y).dn": _beta_binomial_dn,
    "clamp_": lambda x, lo, hi: min(max(x, lo), hi),
    "power_of_two": lambda n: mpf(2) ** n,
    "ldexp_": lambda m, n: m * mpf(2) ** n,
    "exp_parts<SMALL>.root": mpmath.exp,
    "exp_parts<SMALL>.r": lambda y: y,
    "exp_parts<SMALL>.Q": _h,
}

# where formulas meet, and where results overflow, underflow or pass 0
SWITCHES: dict[str, list[float]] = {
    "exp_": [88.72, -87.33, -103.97, 709.78, -708.4, -745.13, 0.34657],
    "exp_terms": [1.4, -1.4, 88.72, 177.44, -174.6, 709.78, 1419.56, -1416.0, 0.69],
    "exp_parts<SMALL>": [0.7, -0.7, 88.72, -103.9],
    "softplus_terms": [17.0, -17.0, 88.0, -104.0, 37.0, 745.0],
    "tanh_terms": [0.7, -0.7, 9.0, -20.0, 44.0, -52.0, 1e-4],
    "log_": [math.sqrt(0.5), math.sqrt(2.0), 1.0],
    "log_unit": [math.sqrt(0.5), 0.25],
    "log_parts": [math.sqrt(0.5), math.sqrt(2.0), 1.0, 2.0],
    "stirling": [1.0],
    "factorial_excess": [1.0],
    "negative_binomial": [1.0, 0.5, 2.0],
    "log_difference": [1.0, math.sqrt(2.0)],
}
