"""Which lines of csrc/cuda ran: gcov's counts, added up over template instantiations, units and runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from .build import COMPILER, CSRC, FOLDER


def gcov() -> str:
    """The compiler's own: counts are read by the version that wrote them."""
    version = re.search(r"-[\d.]+$", shlex.split(COMPILER)[-1])
    return "gcov" + (version.group() if version else "")


def line_counts(counts: Path) -> Counter[tuple[str, int]]:
    """How often each line that holds code ran, by file name and line, from the counts below a folder."""
    found: Counter[tuple[str, int]] = Counter()
    for data in counts.rglob("*.gcda"):
        # gcov looks for a unit's notes beside its counts
        shutil.copy(FOLDER / f"{data.stem}.gcno", data.parent)
        command = [gcov(), "--json-format", "--stdout", str(data)]
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for file in report["files"]:
            path = Path(report["current_working_directory"], file["file"]).resolve()
            if path.parent == CSRC / "cuda":
                for line in file["lines"]:
                    found[path.name, line["line_number"]] += line["count"]
    return found


def source_lines(lines: list[tuple[str, int]]) -> str:
    """For people: each line with its place."""
    return "\n".join(
        f"csrc/cuda/{name}:{number}: {(CSRC / 'cuda' / name).read_text().splitlines()[number - 1].strip()}"
        for name, number in sorted(lines)
    )
