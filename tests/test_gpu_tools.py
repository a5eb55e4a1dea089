"""What ``make gpu`` runs, tried on the CPU: all its stages, dry; that wrong kernels are found; what a lost device, a
time that is up and builds that are compared come to.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sanitize
import torch
from torch import Tensor

import vaefast
from benchmarks import harness
from benchmarks.facts import LOST
from tools.gpu import ab, checks, plan, results, smoke

ROOT = Path(__file__).resolve().parents[1]

FUNCTIONS = {"reparameterize", "gaussian_kl", "sample_with_kl", "reconstruction_loss", "elbo_loss"}


def test_every_stage_runs_dry(extension: object, tmp_path: Path) -> None:
    """Each says something, leaves what the document is made of, and passes."""
    command = [
        sys.executable,
        "-m",
        "tools.gpu",
        "--dry",
        "--device",
        "cpu",
        "--seconds",
        "900",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    (file,) = tmp_path.glob("cpu-*.json")
    document = json.loads(file.read_text())
    stages = [stage.name for group in plan.plan(plan.Setting(tmp_path, tmp_path)) for stage in group]
    assert [record["name"] for record in document["stages"]] == stages
    assert all(record["ok"] and record["says"] for record in document["stages"])
    assert document["smoke"]["ran"] == document["smoke"]["of"] > len(checks.WHOLE)
    for name in ("cuda", "tests"):
        assert document[name]["finished"] and document[name]["outcomes"]["passed"] > 10
    assert len(document["kernels"]) > 40 and not any("error" in record for record in document["kernels"])
    (wall,) = document["documents"]
    assert set(wall["cases"][0]["providers"]) == {"eager", "compile", "vaefast"}
    assert {f"{name.replace(' ', '-')}.log" for name in stages} == {log.name for log in (tmp_path / "logs").iterdir()}
    assert re.search(r"ok +ncu +\S+ s +hot: ", done.stdout)


# -- smoke


def first_case(function: str) -> sanitize.Case:
    float32 = (case for case in sanitize.cases() if case.dtype == torch.float32)
    return next(case for case in float32 if sanitize.call_of(case, "cpu").function == function)


def spoiled(f: Callable[..., Any], change: Callable[[Tensor], Tensor], place: int) -> Callable[..., Any]:
    """With another result, or another one of two."""

    def call(*args: Any, **options: Any) -> Any:
        found = f(*args, **options)
        if isinstance(found, Tensor):
            return change(found)
        return tuple(change(x) if i == place else x for i, x in enumerate(found))

    return call


def off_by(scale: float, gradient: float) -> Callable[..., Any]:
    """Wrong in value or gradient, by a factor."""

    def wrong(t: Tensor) -> Tensor:
        return t * gradient + (t * (scale - gradient)).detach()

    return wrong


@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_smoke_finds_wrong_results(function: str, extension: object, monkeypatch: pytest.MonkeyPatch) -> None:
    check, right = checks.single(first_case(function)), getattr(vaefast, function)
    assert check("cpu")[""] <= 1
    # a sample's noise is known from its value alone, and its gradient is larger than that of a mean KL
    values = {"reparameterize": [], "sample_with_kl": [1]}.get(function, [0])
    for wrong, places in ((off_by(1.0, 1.02), [0]), (off_by(1.02, 1.0), values)):
        if places:
            monkeypatch.setattr(vaefast, function, spoiled(right, wrong, places[0]))
            assert check("cpu")[""] > 1


def test_smoke_sees_every_function() -> None:
    assert {sanitize.call_of(case, "cpu").function for case in sanitize.cases()} == FUNCTIONS
    names = [name for name, _ in checks.checks()]
    assert len(set(names)) == len(names)
    assert names.index("noise") == (len(names) - len(checks.WHOLE)) // len(sanitize.LAYOUTS), "after one layout of all"


def unless_wide(t: Tensor, factor: float) -> Tensor:
    """What is right is computed by the same function, in float64."""
    return t if t.dtype == torch.float64 else t * factor


MUTANTS: dict[str, tuple[Any, str, Callable[[Tensor], Tensor]]] = {
    "noise": (checks, "draws", lambda t: t + 1e-3 * torch.rand_like(t)),
    "graph": (vaefast, "reparameterize", lambda z: z * 0 + z.shape[0]),
    "lists": (vaefast, "multi_tensor_sample_with_kl", lambda kl: kl * 1.01),
    "packed": (vaefast.DiagonalGaussian, "sample_with_kl", lambda kl: kl * 1.01),
    "bits": (vaefast, "gaussian_kl", lambda kl: kl * (1 + 1e-4 * torch.rand(()))),
    "huge": (vaefast, "reconstruction_loss", lambda loss: loss * 1.01),
    "categorical": (vaefast, "categorical_kl", lambda kl: unless_wide(kl, 1.001)),
    "several draws": (vaefast.bounds, "log_weights", lambda w: unless_wide(w, 1.0001)),
    "experts": (vaefast, "product_of_experts", lambda logvar: unless_wide(logvar, 1.01)),
    "mixture": (vaefast.priors, "mixture_log_prob", lambda value: unless_wide(value, 1.0001)),
    "correlation": (vaefast, "total_correlation", lambda tc: unless_wide(tc, 1.001)),
}


@pytest.mark.parametrize("name", list(checks.WHOLE))
def test_smoke_finds_what_is_not_a_single_call(name: str, extension: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(checks.WHOLE[name]("cpu").values()) <= 1
    place, function, change = MUTANTS[name]
    monkeypatch.setattr(place, function, spoiled(getattr(place, function), change, 1))
    assert max(checks.WHOLE[name]("cpu").values()) > 1


def test_errors_are_in_units_of_what_is_allowed() -> None:
    exact = torch.tensor([0.0, 1.0, 100.0], dtype=torch.float64)
    assert checks.error(exact.float(), exact, 1e-3, 0) == 0
    assert checks.error(exact + torch.tensor([5e-4, 0, 0]), exact, 1e-3, 0) == pytest.approx(0.5)
    assert checks.error(exact + torch.tensor([0, 0, 0.2]), exact, 1e-3, 0) == pytest.approx(2)
    assert checks.error(1e-4 * exact + 1e-6, 1e-4 * exact, 1e-3, 0) == pytest.approx(0.1), "of its largest below 1"
    assert checks.error((exact * 1.002).bfloat16(), exact * 1.002, 0.0, 1) <= 1
    assert checks.error(exact.log(), exact, 1.0, 0) == math.inf
    assert checks.error(exact.log(), exact.log(), 1e-3, 0) == 0
    assert checks.error(exact[:2], exact, 1.0, 0) == math.inf


def test_smoke_names_the_check_that_lost_the_device_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ran: list[str] = []

    def check(name: str, off: float = 0.5) -> tuple[str, checks.Check]:
        def run(device: str) -> checks.Errors:
            ran.append(name)
            if name == "killed" and ran.count(name) == 1:
                raise KeyboardInterrupt
            return {"": off}

        return name, run

    def fails(device: str) -> checks.Errors:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    every = [check("a"), check("killed"), ("illegal", fails), check("late"), check("off, here", 3.0), check("z")]
    monkeypatch.setattr(smoke, "checks", lambda n: iter(every))
    out = tmp_path / "smoke.json"
    command = ["--device", "cpu", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        smoke.main(command)
    monkeypatch.setattr(harness, "lost", lambda device: ran[-1:] == ["killed"] or ran[-1:] == ["late"])
    assert smoke.main(command) == LOST
    assert smoke.main(command) == LOST
    monkeypatch.setattr(harness, "lost", lambda device: False)
    assert smoke.main(command) == 1
    assert ran == ["a", "killed", "late", "off, here", "z"]
    document = json.loads(out.read_text())
    assert document["ran"] == document["of"] == 6 and document["left"] == []
    assert [(bad["name"], bad.get("error", "")[:31]) for bad in document["bad"]] == [
        ("killed", "the process died"),
        ("illegal", "RuntimeError: CUDA error: an il"),
        ("late", "lost the device"),
        ("off, here", ""),
    ]
    assert "smoke: 6 of 6 checks ran, 4 off" in capsys.readouterr().out
    out.with_suffix(".jsonl").unlink()
    assert smoke.main([*command, "--until", str(time.time() - 1)]) == 1
    assert json.loads(out.read_text())["left"] == [name for name, _ in every]


# -- the tests' outcomes

SUITE = """
import pytest

from benchmarks import harness


@pytest.mark.parametrize("k", range(3))
def test_first(k): assert k != 1, "the second"

@pytest.fixture(params=["native", "reference"])
def backend(request): return request.param

@pytest.mark.cuda
def test_engine(backend): pass

def test_host(backend): pass

@pytest.mark.parametrize("k", range(2))
def test_gradchecks(k): pass

@pytest.mark.parametrize("k", range(3))
def test_last(k): pass

def test_zz_lost(monkeypatch):
    if LOSES:
        harness.lost = lambda device: True
        assert False
"""


def outcomes(folder: Path, *options: str, **values: object) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    suite = SUITE
    for name, value in ({"LOSES": False} | values).items():
        suite = suite.replace(name, repr(value))
    (folder / "test_it.py").write_text(suite)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    cuda: needs a CUDA device\n")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "tools.gpu.outcomes"]
    command += ["--rootdir", str(folder), "-c", str(folder / "pytest.ini"), "--outcomes", str(folder / "out.json")]
    done = subprocess.run([*command, *options, str(folder)], cwd=ROOT, capture_output=True, text=True)
    return done, json.loads((folder / "out.json").read_text())


def test_outcomes_are_written(tmp_path: Path) -> None:
    done, document = outcomes(tmp_path)
    order = re.findall(r"::(test_\w+(?:\[\S+\])?) \w+ ", done.stdout)
    assert order == [
        *("test_first[0]", "test_engine[native]", "test_host[native]"),
        *("test_gradchecks[0]", "test_last[0]", "test_zz_lost"),
        *(
            "test_first[1]",
            "test_host[reference]",
            "test_last[1]",
            "test_first[2]",
            "test_last[2]",
            "test_gradchecks[1]",
        ),
    ], "one of every function first, and no reference on CUDA"
    assert document["finished"] and document["collected"] == 12 and document["outcomes"] == {"passed": 11, "failed": 1}
    (failure,) = document["failures"]
    assert failure["test"].endswith("test_first[1]") and failure["says"].startswith("AssertionError: the second")
    assert "outcomes: 12 of 12 tests ran: 1 failed, 11 passed" in done.stdout


def test_a_time_that_is_up_ends_the_tests_in_order(tmp_path: Path) -> None:
    done, document = outcomes(tmp_path, "--stop-after", "0")
    assert done.returncode == 2 and not document["finished"]
    assert document["outcomes"] == {"passed": 1} and document["collected"] == 12
    assert plan.judge_tests(tmp_path / "out.json")(done.returncode, done.stdout) == ""


def test_nothing_is_believed_after_the_device_is_lost(tmp_path: Path) -> None:
    done, document = outcomes(tmp_path, LOSES=True)
    assert "test_zz_lost lost the device" in done.stdout and document["outcomes"] == {"passed": 5, "failed": 1}
    assert plan.judge_tests(tmp_path / "out.json")(done.returncode, done.stdout).startswith("1 failed, the first")


# -- results, and builds side by side


def test_ncus_counters_are_read() -> None:
    log = """==PROF== Connected to process 7
hot: posterior_forward sample, kl
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","7","job_kernel<float>","GPU Speed Of Light Throughput","Memory Throughput","%","91.5",""
"0","7","job_kernel<float>","Occupancy","Achieved Occupancy","%","45.2",""
"0","7","job_kernel<float>","Occupancy","","","","a hint"
"1","7","scale","Launch Statistics","Grid Size","","8,192",""
"""
    assert results.counters(log) == [
        {"kernel": "job_kernel<float>", "Memory Throughput": "91.5 %", "Achieved Occupancy": "45.2 %"},
        {"kernel": "scale", "Grid Size": "8,192"},
    ]
    assert results.counters("==ERROR== ERR_NVGPUCTRPERM") == []


def test_builds_are_compared(extension: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(ab, "WORK", tmp_path / "ab")
    builds = [tmp_path / "before.so", tmp_path / "after.so"]
    for build in builds:
        shutil.copy(extension.__file__, build)
    options = ["--device", "cpu", "--only", "^posterior_forward kl$", "--elements", "64", "--dtypes", "float32"]
    assert ab.main([*map(str, builds), *options, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"posterior_forward kl +float32 +64  before \S+ us \(1.000x\)  after \S+ us \(\S+x\)", said)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"{n}-{k}.json" for n in ("before", "after") for k in (0, 1)
    }
    (tmp_path / "broken.so").write_bytes(b"no library")
    with pytest.raises(SystemExit, match="broken did not load"):
        ab.main([str(tmp_path / "broken.so"), *options, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        ab.main([str(builds[0]), str(builds[0]), *options])


def test_a_slower_build_is_seen() -> None:
    times = {("scale_", "float32", 64): {"before": [2e-6, 4e-6, 3e-6], "after": [6e-6, 6e-6, 6e-6]}}
    assert re.search(r"scale_ +float32 +64  before 3.0 us \(1.000x\)  after 6.0 us \(0.500x\)", ab.table(times))
