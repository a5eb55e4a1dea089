"""The words of Philox, as ``stream.cpp`` writes them, through a packaged battery: PractRand's ``RNG_test`` where it is
on the PATH, or dieharder (``apt install dieharder``)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from tools import ROOT, setup_py

OUT = ROOT / "out" / "battery"
STREAMS = {
    "one key, its counters in order": ["counters", "20261127"],
    "keys that count up, 4 counters of each": ["calls", "0", "4"],
}
ANOMALY = re.compile(r"^  \S.*?\s+(unusual|suspicious|very suspicious|VERY SUSPICIOUS|FAIL.*)\s*$", re.MULTILINE)


class Verdict(NamedTuple):
    """What a battery found in a stream."""

    battery: str
    stream: str
    amount: str
    results: int
    anomalies: list[str]  # as the battery words them, each with its test
    failed: int


def compiled() -> Path:
    """stream.cpp, by the compiler that builds the extension."""
    out = OUT / "stream"
    out.parent.mkdir(parents=True, exist_ok=True)
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SystemExit("no C++ compiler compiles the stream; install g++ (apt install g++)")
    source = Path(__file__).with_name("stream.cpp")
    flags = ["-std=c++20", "-O3", "-march=native", *setup_py().KERNEL_FLAGS]
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(out)], check=True)
    return out


def of_practrand(text: str, stream: str) -> Verdict:
    """The last length that RNG_test reported on, and what it found odd at any."""
    lengths = re.findall(r"^length= (.*?), time=", text, re.MULTILINE)
    results = re.findall(r"(?:in|all remaining test results|and) (\d+) (?:test result|remaining)", text)
    odd = [" ".join(m.group(0).split()) for m in ANOMALY.finditer(text)]
    failed = sum("FAIL" in line for line in odd)
    return Verdict("PractRand", stream, lengths[-1], int(results[-1]), odd, failed)


def of_dieharder(text: str, stream: str) -> Verdict:
    rows = [line for line in text.splitlines() if re.search(r"\|\s*(PASSED|WEAK|FAILED)\s*$", line)]
    odd = ["".join(line.split()) for line in rows if "PASSED" not in line]
    tests = f"{len(rows)} results"
    return Verdict("dieharder", stream, tests, len(rows), odd, sum("FAILED" in line for line in odd))


def run(stream: str, most: str) -> Verdict:
    """A battery over one of STREAMS, as much of it as ``most`` says; what it prints is kept in out/."""
    words = [str(compiled()), *STREAMS[stream]]
    practrand, dieharder = shutil.which("RNG_test"), shutil.which("dieharder")
    if practrand:
        battery = [practrand, "stdin32", "-tlmin", "1GB", "-tlmax", most]
    elif dieharder:
        battery = [dieharder, "-g", "200", "-a"]
    else:
        raise SystemExit("no battery: put PractRand's RNG_test on the PATH, or apt install dieharder")
    log = OUT / f"{Path(battery[0]).name}-{words[1]}.txt"
    print(f"{' '.join(words)} | {' '.join(battery)} > {log}", flush=True)
    with log.open("w") as out, subprocess.Popen(words, stdout=subprocess.PIPE) as source:
        subprocess.run(battery, stdin=source.stdout, stdout=out, check=True)
        source.kill()
    return (of_practrand if practrand else of_dieharder)(log.read_text(), stream)
