"""The polynomials of csrc have the coefficients that tools/coefficients.py makes, and they leave what csrc says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.coefficients import FITS, coefficients_of, greatest_error

CSRC = Path(__file__).resolve().parent.parent / "csrc"
# in the weighted error of the fit
GREATEST = {
    "exp_tail double": 3e-17,
    "exp_tail float": 9e-9,
    "exp_tail short": 4e-9,
    "atanh_tail float": 5e-9,
    "stirling value": 3e-9,
    "stirling slope": 5e-7,
    "sine float": 3e-8,
    "cosine float": 7e-8,
}


@pytest.mark.parametrize("name", FITS)
def test_the_program_makes_the_coefficients(name: str) -> None:
    fit = FITS[name]
    found = coefficients_of(fit)
    # a coefficient stands there as the shortest text that reads back as it, bit for bit
    pattern = r",\s+".join(re.escape(repr(c)) for c in found) + r"\)"
    assert len(re.findall(pattern, (CSRC / fit.file).read_text())) == 1, f"{name} should be {found}"
    assert greatest_error(fit, found) <= GREATEST[name]


def test_every_polynomial_is_made_by_the_program() -> None:
    """But for Taylor's, whose coefficients are fractions."""
    for path in sorted(CSRC.rglob("*.h")):
        calls = re.findall(r"polynomial\((?!V)[^;]*?\w+,([^;()]*)\)", path.read_text())
        decimal = [c for c in calls if not re.search(r"\d / \d", c) and re.search(r"\d\.\d{4}", c)]
        assert len(decimal) == sum(fit.file == path.name for fit in FITS.values()), path.name
