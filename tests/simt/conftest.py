"""The tests of this folder are for the executor alone: a plain pytest leaves them to test_simt.py."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import NamedTuple

import pytest

from .environment import LIBRARY

collect_ignore_glob = [] if LIBRARY in os.environ else ["test_*.py"]


class Launched(NamedTuple):
    blocks: int
    threads: int
    kernel: str


@pytest.fixture
def launches() -> Callable[[], list[Launched]]:
    """What was launched since the test began."""
    executor = ctypes.CDLL(os.environ[LIBRARY])
    executor.simt_log.restype = ctypes.c_char_p
    executor.simt_clear_log()

    def read() -> list[Launched]:
        lines = (line.split(" ", 2) for line in executor.simt_log().decode().splitlines())
        return [Launched(int(blocks), int(threads), kernel) for blocks, threads, kernel in lines]

    return read
