"""``python -m simt ARGUMENTS``: pytest on the device code (see __init__.py)."""

from __future__ import annotations

import os
import sys

from .build import build, library
from .environment import environment, pytest_command

build()
os.execve(sys.executable, [sys.executable, *pytest_command(sys.argv[1:])], environment(library()))
