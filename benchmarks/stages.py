"""Stages: commands that run one group after another under one deadline, none of which stops the next.

The stages of a group run side by side. A stage gets its limit or what is left of the total, less what later groups are
promised, whichever is smaller; the word SECONDS in its command becomes that time less a margin, for commands that end
by themselves. Each stage's output goes to a log file, whose end is kept where the stage failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = "SECONDS"
MARGIN = 10.0  # seconds between the end that a command is told and the one that it is given
GRACE = 5.0  # seconds between asking a command to end and ending it
TAIL = 12_000  # characters of a failed stage's output that are kept

Record = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        name: as shown, and the log file's name.
        command: its words; SECONDS among them becomes the time that it has.
        limit: seconds that it may take.
        promised: seconds that earlier groups leave for it.
        env: environment variables to set.
        needs: a stage that must have passed before.
        missing: why it cannot be run here; it fails with that.
        judge: from exit status and output, why it failed, or "".
    """

    name: str
    command: Sequence[str]
    limit: float
    promised: float = 0.0
    env: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""
    missing: str = ""
    judge: Callable[[int, str], str] = lambda status, output: f"exit status {status}" if status else ""


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it started, which share its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_stage(stage: Stage, seconds: float, cwd: Path, logs: Path, running: set[subprocess.Popen[bytes]]) -> Record:
    """Runs the stage for at most so many seconds; how it went. Its process is in ``running`` while it runs."""
    log = logs / f"{stage.name.replace(' ', '-')}.log"
    words = [str(max(1, int(seconds - MARGIN))) if word == SECONDS else word for word in stage.command]
    # as anyone would type it: where programs and files lie here concerns nobody who reads the results
    command = " ".join(os.path.basename(word) if os.path.isabs(word) else word for word in words)
    record: Record = {"name": stage.name, "command": command, "limit": round(seconds, 1)}
    start = time.monotonic()
    why = stage.missing
    if not why:
        with log.open("wb") as out:
            try:
                process = subprocess.Popen(
                    words,
                    cwd=cwd,
                    env={**os.environ, **stage.env},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                why = str(error)
            else:
                running.add(process)
                status: int | None = None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(seconds)
                end(process)
                running.discard(process)
                text = log.read_text(errors="replace")
                why = f"ran past its {seconds:.0f} s" if status is None else stage.judge(status, text)
                record["says"] = last_line(text)
                if why:
                    record["tail"] = text[-TAIL:]
    return record | {"ok": not why, "why": why, "seconds": round(time.monotonic() - start, 1)}


def run(
    groups: Sequence[Sequence[Stage]],
    total: float,
    cwd: Path,
    logs: Path,
    tell: Callable[[str], None] = lambda line: print(line, flush=True),
) -> list[Record]:
    """Every stage's record, in order; one that had no time left, or whose need failed, says so in it.

    An interrupt ends what runs and leaves no time to what follows, so that what was found so far is not lost.
    """
    logs.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + total
    records: list[Record] = []
    running: set[subprocess.Popen[bytes]] = set()
    for i, group in enumerate(groups):
        later = sum(max((s.promised for s in g), default=0.0) for g in groups[i + 1 :])
        left = deadline - later - time.monotonic()
        failed = {record["name"] for record in records if not record["ok"]}

        def one(stage: Stage, left: float = left, failed: frozenset[str] = frozenset(failed)) -> Record:
            seconds = min(stage.limit, left)
            why = f"not run: {stage.needs} failed" if stage.needs in failed else ""
            why = why or ("not run: no time was left" if seconds < 1 else "")
            if why:
                record: Record = {"name": stage.name, "ok": False, "why": why, "seconds": 0.0}
            else:
                tell(f"{stage.name}: {' '.join(stage.command)} (at most {seconds:.0f} s)")
                record = run_stage(stage, seconds, cwd, logs, running)
            tell(f"{stage.name}: {'ok' if record['ok'] else record['why']}, {record['seconds']:.0f} s")
            return record

        with ThreadPoolExecutor(max(1, len(group))) as pool:
            futures = [pool.submit(one, stage) for stage in group]
            try:
                wait(futures)
            except KeyboardInterrupt:
                deadline = 0.0
                for process in tuple(running):
                    end(process)
            records += [future.result() for future in futures]
    return records


def summary(records: Sequence[Record]) -> str:
    """The ends of what failed, then one line a stage."""
    parts = [
        f"--- {r['name']}: {r['why']}; its output ends with\n{r['tail'].rstrip()}\n" for r in records if r.get("tail")
    ]
    width = max((len(r["name"]) for r in records), default=0)
    for r in records:
        what = r.get("says", "") if r["ok"] else r["why"]
        parts.append(f"{'ok    ' if r['ok'] else 'FAILED'}  {r['name']:{width}}  {r['seconds']:6.1f} s  {what}")
    return "\n".join(parts)
