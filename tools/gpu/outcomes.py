"""A pytest plugin for a run with little time: ``pytest -p tools.gpu.outcomes --stop-after 120 --outcomes FILE``.

One case of every test function comes first, then the second of every function, and so on, so that a run cut short has
seen everything once; most gradchecks, which take as long as all else, come last. Cases of the reference back end, which
run no kernel, are left out on CUDA. Failures go to the file at once, and it is written every few seconds: pytest tells
of failures last, and a run that is killed tells nothing. After a test that lost the device nothing that follows in the
same process can pass: a worker of xdist ends, and another takes its place; a lone process stops.
"""

from __future__ import annotations

import collections
import json
import math
import os
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness

EVERY = 5.0  # seconds between two writes
FAILURES, SLOWEST = 200, 25  # that are kept
SAYS, TAIL = 500, 1500  # characters of a failure


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("outcomes")
    group.addoption("--stop-after", type=float, default=math.inf, metavar="SECONDS", help="begin no test later")
    group.addoption("--outcomes", type=Path, default=None, metavar="FILE", help="where outcomes go, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    file, seconds = config.getoption("--outcomes"), config.getoption("--stop-after")
    config.pluginmanager.register(Outcomes(file, seconds, hasattr(config, "workerinput")), "outcomes of tests")


def engine(item: pytest.Item) -> str:
    """The back end that a test is run with, where it takes one."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    return str(params.get("backend", params.get("face", "")))


def dealt(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The first case of every function, then the second of every function, ..."""
    seen: collections.Counter[str] = collections.Counter()
    turn = {}
    for item in items:
        function = item.nodeid.partition("[")[0]
        turn[item] = "gradcheck" in function and seen[function] > 0, seen[function]
        seen[function] += 1
    return sorted(items, key=turn.__getitem__)


class Outcomes:
    """What the tests of a process, or of xdist's workers, came to."""

    def __init__(self, file: Path | None, seconds: float, worker: bool) -> None:
        self.file, self.seconds, self.worker = file, seconds, worker
        self.start = self.written = time.monotonic()
        self.collected = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.slowest: list[tuple[float, str]] = []
        self.failures: list[dict[str, str]] = []
        self.session: pytest.Session | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        ours = [i for i in items if i.get_closest_marker("cuda") is None or not engine(i).startswith("reference")]
        config.hook.pytest_deselected(items=[i for i in items if i not in set(ours)])
        items[:] = dealt(ours)
        self.collected = len(items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        self.collected = len(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.when == "call" or report.skipped:
            self.counts["error" if report.failed and report.when != "call" else report.outcome] += 1
        self.slowest = sorted([*self.slowest, (round(report.duration, 2), report.nodeid)], reverse=True)[:SLOWEST]
        if report.failed and len(self.failures) < FAILURES:
            text = str(report.longrepr)
            crash = getattr(report.longrepr, "reprcrash", None)
            says = str(getattr(crash, "message", text))[:SAYS]
            self.failures.append({"test": report.nodeid, "when": str(report.when), "says": says, "tail": text[-TAIL:]})
            self.write(finished=False)
        elif time.monotonic() - self.written > EVERY:
            self.write(finished=False)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.session and time.monotonic() - self.start > self.seconds:
            self.session.shouldstop = "the time for this is used up"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed and harness.lost(torch.device("cuda" if torch.cuda.is_initialized() else "cpu")):
            if self.worker:
                if self.file:
                    with self.file.with_suffix(".lost").open("a") as lost:
                        lost.write(f"{item.nodeid}: {report.longreprtext[-TAIL:]}\n")
                os._exit(1)  # xdist names the test
            item.session.shouldstop = f"{item.nodeid} lost the device"
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.write(finished=not session.shouldstop and self.ran >= self.collected)

    @property
    def ran(self) -> int:
        return sum(self.counts.values())

    def says(self) -> str:
        each = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self.counts.items()))
        return f"{self.ran} of {self.collected} tests ran: {each or 'none'}"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"outcomes: {self.says()}")

    def write(self, finished: bool) -> None:
        self.written = time.monotonic()
        if self.file is None or self.worker:
            return
        document = {
            "says": self.says(),
            "finished": finished,
            "seconds": round(self.written - self.start, 1),
            "collected": self.collected,
            "outcomes": dict(self.counts),
            "failures": self.failures,
            "slowest": self.slowest,
        }
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(document, indent=1) + "\n")
        part.replace(self.file)
