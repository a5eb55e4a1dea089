"""What results say of where they come from: the commit, a file name; and what programs say of how they ended. Imports
neither torch nor vaefast."""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOST = 75  # exit status: a case lost the device for this process; run again with --resume, it goes on behind that case


def first_line(*command: str) -> str | None:
    """Of what a command prints; None if it fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return run.stdout.partition("\n")[0]
    return None


def commit() -> str | None:
    return first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*")


def file_name(machine: str, date: str, suffix: str = "") -> str:
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") + f"-{date}{suffix}.json"
