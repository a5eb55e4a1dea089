"""The contracts as the headers state them (csrc/vmath.h says how), and the names that the headers define."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mpmath import mpf

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"
HEADERS = [CSRC / name for name in ("vmath.h", "special.h", "cpu/vec.h", "cpu/vec_exp.h")]
# they make, move or name values, and compute nothing
NOT_PRIMITIVES = {"lit", "loadu", "store", "bits_of", "from_bits", "split_bits", "Wide", "name", "op", "infinity"}


@dataclass(frozen=True)
class Argument:
    name: str
    low: str
    high: str
    whole: bool
    or_zero: bool

    def ends(self, dtype: type[np.floating]) -> tuple[float, float]:
        return number(self.low, dtype), number(self.high, dtype)


@dataclass(frozen=True)
class Contract:
    header: str
    name: str
    result: str
    arguments: tuple[Argument, ...]
    error: str
    ends: tuple[tuple[tuple[str, ...], str], ...]

    @property
    def may_be_nan(self) -> bool:
        return self.error not in ("mask", "whole", "copy")

    @property
    def of(self) -> str:
        return self.error.partition(" of ")[2]

    def allowed(self, dtype: type[np.floating]) -> tuple[mpf, mpf]:
        """How many ulps, and how much besides."""
        if not self.may_be_nan:
            return mpf(0), mpf(0)
        sides = self.error.partition(" of ")[0].split(" / ")
        ulps = plain = mpf(0)
        for term in sides[0 if dtype is np.float32 else -1].split(" + "):
            value, _, unit = term.partition(" ")
            if unit:
                assert unit == "ulp", self
                ulps += mpf(value)
            else:
                plain += mpf(value)
        return ulps, plain


def number(text: str, dtype: type[np.floating]) -> float:
    info = np.finfo(dtype)
    named = {
        "tiny": float(info.tiny),
        "max": float(info.max),
        "2^-53": 2.0**-53,
        "2^-100": 2.0**-100,
        "2^100": 2.0**100,
    }
    return -number(text[1:], dtype) if text[:1] == "-" and text[1:] in named else named.get(text) or float(text)


def read() -> list[Contract]:
    found = []
    for header in HEADERS:
        for line in header.read_text().splitlines():
            if not line.strip().startswith("// @ "):
                continue
            what, domain, error, *ends = (part.strip() for part in line.strip()[5:].split(" | "))
            name, result = re.fullmatch(r"(.*?)(?:\.([a-zA-Z]\w*))?", what).groups()  # type: ignore[union-attr]
            arguments = tuple(
                Argument(n, low, high, bool(whole), bool(zero))
                for whole, names, low, high, zero in re.findall(
                    r"(whole )?(\w+(?: and \w+)*) in \[([^,]+), ([^\]]+)\]( or 0)?", domain
                )
                for n in names.split(" and ")
            )
            at = tuple(
                (tuple(x.strip("() ").split(", ")), y)
                for x, y in (each.split(": ") for each in (ends[0].split("; ") if ends else []))
            )
            contract = Contract(header.name, name, result or "", arguments, error, at)
            assert arguments and all(len(x) == len(arguments) for x, _ in at), line
            assert contract.of in ("", "the terms", "1 or more"), line
            found.append(contract)
    return found


def defined() -> set[str]:
    """The functions that the headers define."""
    names: set[str] = set()
    for header in HEADERS:
        text = re.sub(r"//.*", "", header.read_text())
        names |= set(
            re.findall(
                r"VF_(?:HD|CALLED) (?:static )?[\w:<>, ]*?\b(\w+)\([^()]*(?:\([^()]*\))?[^()]*\) *(?:const )?[{:]", text
            )
        )
        names |= set(re.findall(r"VF_EACH_\d\((\w+)\)", text))
    return names - NOT_PRIMITIVES
