"""Stages: commands that run one group after another under one deadline, none of which stops the next.

The stages of a group run side by side. A stage gets its limit or what is left of the total, less what later groups are
promised, whichever is smaller; where the total is less than all promises, each is kept in part. Commands that end by
themselves are told their time, less a margin: the word SECONDS becomes how long, the word UNTIL becomes when (as
``time.time()`` counts). Each stage's output goes to a log file, whose end is kept where the stage failed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.facts import LOST

SECONDS, UNTIL = "SECONDS", "UNTIL"
MARGIN = 8.0
GRACE = 5.0  # seconds between asking a command to end and ending it
TAIL = 12_000  # characters of a failed stage's output that are kept

Record = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        name: as shown, and the log file's name.
        command: its words, SECONDS and UNTIL among them.
        limit: seconds that it may take.
        promised: seconds that earlier groups leave for it.
        env: environment variables to set.
        missing: why it cannot be run here; it fails with that.
        judge: from exit status and output, why it failed, or "".
        resumes: how often it is begun again after it lost the device (exit status LOST) or died of a signal; the
            command knows from its own files where to go on.
        tells: finds the line of the output that says most; the last one does where none is found.
        margin: seconds between the end that the command is told and the one that it is given.
    """

    name: str
    command: Sequence[str]
    limit: float
    promised: float
    env: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""
    judge: Callable[[int, str], str] = lambda status, output: f"exit status {status}" if status else ""
    resumes: int = 0
    tells: str = r"\S"
    margin: float = MARGIN


def telling_line(text: str, pattern: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if re.search(pattern, line)), lines[-1] if lines else "")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it started, which share its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def typed(words: Sequence[str]) -> str:
    """As anyone would type it: where programs and files lie here concerns nobody who reads the results."""
    return " ".join(os.path.basename(word) if os.path.isabs(word) else word for word in words)


class Runner:
    """Runs stages.

    Args:
        cwd: where commands run.
        logs: where their output goes.
        tell: takes a line for those who watch.
        done: takes the records so far whenever a stage has ended.
    """

    def __init__(
        self,
        cwd: Path,
        logs: Path,
        tell: Callable[[str], None] = lambda line: print(line, flush=True),
        done: Callable[[Sequence[Record]], None] = lambda records: None,
    ) -> None:
        self.cwd, self.logs, self.tell, self.done = cwd, logs, tell, done
        self.records: list[Record] = []
        self._order: list[str] = []
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, groups: Sequence[Sequence[Stage]], total: float) -> list[Record]:
        """The records of all stages so far, in order; one that had no time left says so in it.

        An interrupt ends what runs and leaves no time to what follows, so that what was found so far is not lost.
        """
        deadline = time.monotonic() + total
        promised = [max((stage.promised for stage in group), default=0.0) for group in groups]
        kept = min(1.0, total / sum(promised)) if sum(promised) else 1.0
        self._order += [stage.name for group in groups for stage in group]
        for i, group in enumerate(groups):
            left = deadline - kept * sum(promised[i + 1 :]) - time.monotonic()
            with ThreadPoolExecutor(max(1, len(group))) as pool:
                futures = [pool.submit(self._one, stage, min(stage.limit, left)) for stage in group]
                try:
                    wait(futures)
                except KeyboardInterrupt:
                    self._stopped.set()
                    for process in tuple(self._running):
                        end(process)
                for future in futures:
                    future.result()
        return self.records

    def _one(self, stage: Stage, seconds: float) -> None:
        if seconds < 1 or self._stopped.is_set():
            record: Record = {"name": stage.name, "ok": False, "why": "not run: no time was left", "seconds": 0.0}
        else:
            self.tell(f"{stage.name}: {' '.join(stage.command)} (at most {seconds:.0f} s)")
            record = self._record(stage, seconds)
        said = f" ({record['says']})" if record.get("says") else ""
        self.tell(f"{stage.name}: {'ok' if record['ok'] else record['why']}, {record['seconds']:.0f} s{said}")
        with self._lock:
            self.records.append(record)
            self.records.sort(key=lambda r: self._order.index(r["name"]))
            self.done(self.records)

    def _record(self, stage: Stage, seconds: float) -> Record:
        """Runs the stage for at most so many seconds; how it went."""
        log = self.logs / f"{stage.name.replace(' ', '-')}.log"
        start = time.monotonic()
        record: Record = {"name": stage.name, "command": typed(stage.command), "limit": round(seconds, 1)}
        why, status, resumed = stage.missing, None, 0
        try:
            if not why:
                with log.open("wb") as out:
                    status = self._command(stage, start + seconds, out)
                    while resumed < stage.resumes and status is not None and (status == LOST or status < 0):
                        if self._stopped.is_set() or time.monotonic() - start > seconds - stage.margin:
                            break
                        resumed += 1
                        status = self._command(stage, start + seconds, out)
                text = log.read_text(errors="replace")
                why = f"ran past its {seconds:.0f} s" if status is None else stage.judge(status, text)
                record["says"] = telling_line(text, stage.tells)
                if why:
                    record["tail"] = text[-TAIL:]
        except OSError as error:
            why = str(error)
        if resumed:
            record["resumed"] = resumed
        return record | {"ok": not why, "why": why, "seconds": round(time.monotonic() - start, 1)}

    def _command(self, stage: Stage, until: float, out: BinaryIO) -> int | None:
        """Its exit status; None where it had to be ended."""
        left = until - time.monotonic()
        own = max(1.0, left - stage.margin)
        told = {SECONDS: f"{own:.0f}", UNTIL: f"{time.time() + own:.0f}"}
        process = subprocess.Popen(
            [told.get(word, word) for word in stage.command],
            cwd=self.cwd,
            env={**os.environ, **stage.env},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._running.add(process)
        try:
            return process.wait(left)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)
            self._running.discard(process)


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
