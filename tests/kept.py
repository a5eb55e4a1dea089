"""What is compiled for the tests, kept from run to run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def kept(folder: str, name: str, digest: str, suffix: str, make: Callable[[Path], object]) -> Path:
    """A file under ``build/folder``, which ``make`` is asked to write where it is not there: one for each name, of the
    latest digest."""
    out = Path(__file__).resolve().parents[1] / "build" / folder / f"{name}-{digest}{suffix}"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        for old in out.parent.glob(f"{name}-*"):
            old.unlink()
        unfinished = out.with_suffix(f".{os.getpid()}")
        make(unfinished)
        unfinished.rename(out)
    return out
