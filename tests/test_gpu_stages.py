"""``make gpu`` without a GPU: how stages fail, time out, go on and report, what is said where one is missing, and that
every stage's command is one that its program takes. test_gpu_tools.py runs them, dry.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sanitize
import torch
from cuda_build import predictions
from cuda_build.model import GPUS
from cuda_build.operations import DTYPES, operations
from inputs import FLOATING, LIKELIHOOD_CASES, REDUCTIONS

from benchmarks import harness, kernels, report, run
from benchmarks.facts import LOST
from benchmarks.harness import Case
from benchmarks.workloads import WORKLOADS, Draw
from tools.gpu import __main__ as gpu
from tools.gpu import machine, plan, results, stages
from tools.gpu.stages import SECONDS, UNTIL, Runner, Stage
from vaefast import _build, reference

ROOT = Path(__file__).resolve().parents[1]

CPU = torch.device("cpu")


def python(code: str, **options: Any) -> Stage:
    name = options.pop("name", "it")
    return Stage(
        name, [sys.executable, "-c", code], options.pop("limit", 60.0), options.pop("promised", 0.0), **options
    )


def run_all(*groups: list[Stage], total: float = 100.0, to: Path) -> list[stages.Record]:
    return Runner(ROOT, to, tell=lambda line: None).run(groups, total)


# -- stages


def test_a_failing_stage_does_not_stop_the_others(tmp_path: Path) -> None:
    bad = python("print('why'); raise SystemExit(3)", name="bad")
    absent = Stage("absent", ["/nowhere/program"], 10, 0)
    missing = python("", name="missing", missing="there is no tool: install it")
    good = python("import os; print('fine', os.environ['HERE'])", name="good", env={"HERE": "yes"})
    records = run_all([bad], [absent, missing], [good], to=tmp_path)
    assert [r["name"] for r in records] == ["bad", "absent", "missing", "good"]
    assert [r["ok"] for r in records] == [False, False, False, True]
    assert records[0]["why"] == "exit status 3" and records[0]["tail"] == "why\n"
    assert "/nowhere/program" in records[1]["why"]
    assert records[2]["why"] == "there is no tool: install it"
    assert records[3]["says"] == "fine yes" and "tail" not in records[3]
    assert records[0]["command"].startswith(f"{Path(sys.executable).name} -c print")
    assert (tmp_path / "good.log").read_text() == "fine yes\n"
    text = stages.summary(records)
    assert re.search(r"FAILED  bad .* exit status 3", text) and re.search(r"ok      good .* fine yes", text)
    assert text.startswith("--- bad: exit status 3")


def test_a_stage_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    begin = f"subprocess.Popen([sys.executable, '-c', {child!r}]); print('begun', flush=True)"
    code = f"import subprocess, sys, time; {begin}; time.sleep(60)"
    start = time.monotonic()
    (record,) = run_all([python(code, limit=1.5)], to=tmp_path / "logs")
    assert time.monotonic() - start < 30
    assert not record["ok"] and record["why"] == "ran past its 2 s" and "begun" in record["tail"]
    time.sleep(3)
    assert not mark.exists()


def test_time_is_shared_out(tmp_path: Path) -> None:
    """What later groups are promised is left to them; a command that ends by itself is told its time."""
    show = "import sys; print(sys.argv[1])"
    first = Stage("first", [sys.executable, "-c", show, SECONDS], 1000, promised=5)
    second = Stage("second", [sys.executable, "-c", show, SECONDS], 30, promised=40)
    third = Stage("third", [sys.executable, "-c", show, UNTIL], 50, promised=20)
    records = run_all([first], [second], [third], total=100, to=tmp_path)
    assert 35 <= records[0]["limit"] <= 40
    assert int(records[0]["says"]) == pytest.approx(records[0]["limit"] - stages.MARGIN, abs=1.1)
    assert records[1]["limit"] == 30 and records[1]["says"] == f"{30 - stages.MARGIN:.0f}"
    assert records[2]["limit"] == 50
    assert int(records[2]["says"]) == pytest.approx(time.time() + 50 - stages.MARGIN, abs=5)
    margin = Stage("margin", [sys.executable, "-c", show, SECONDS], 40, 0, margin=25)
    assert run_all([margin], to=tmp_path)[0]["says"] == "15"
    # promised more than there is, each has its part
    records = run_all([first], [replace(second, promised=75)], total=20, to=tmp_path)
    assert records[0]["limit"] == pytest.approx(20 * 5 / 80, abs=0.3)
    assert records[1]["limit"] > 17
    late = run_all([python("", name="late", promised=5)], total=0.5, to=tmp_path)
    assert late[0]["why"] == "not run: no time was left"


def test_stages_of_a_group_run_side_by_side(tmp_path: Path) -> None:
    """Each waits for the file that the other writes."""

    def meet(own: str, other: str) -> Stage:
        wait = f"p.joinpath({own!r}).touch()\nwhile not p.joinpath({other!r}).exists(): time.sleep(0.01)"
        return python(f"import pathlib, time\np = pathlib.Path({str(tmp_path)!r})\n{wait}", name=own)

    assert all(r["ok"] for r in run_all([meet("a", "b"), meet("b", "a")], to=tmp_path / "logs"))


def resuming(to: Path, *ends: str) -> Stage:
    """Ends differently each time: a statement a start."""
    code = f"""
import os, sys, pathlib
marks = pathlib.Path({str(to)!r})
turn = len(list(marks.iterdir()))
(marks / str(turn)).touch()
print("turn", turn, flush=True)
exec({ends!r}[turn])"""
    return Stage("it", [sys.executable, "-c", code], 60, 0, resumes=3)


@pytest.mark.parametrize("lost", [f"sys.exit({LOST})", "os.abort()", "os.kill(os.getpid(), 9)"])
def test_a_stage_that_loses_the_device_goes_on(lost: str, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    (record,) = run_all([resuming(marks, lost, lost, "print('fine')")], to=tmp_path)
    assert record["ok"] and record["resumed"] == 2 and record["says"] == "fine"
    assert (tmp_path / "it.log").read_text().count("turn") == 3
    (record,) = run_all([resuming(marks, *["unused"] * 3, "sys.exit(1)", lost)], to=tmp_path)
    assert record["why"] == "exit status 1" and "resumed" not in record, "only what lost the device is begun again"
    (record,) = run_all([resuming(marks, *["unused"] * 4, *[lost] * 4)], to=tmp_path)
    assert not record["ok"] and record["resumed"] == 3, "and not for ever"


def test_answers_are_there_when_their_stage_ends(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    runner = Runner(ROOT, tmp_path, tell=lambda line: None, done=lambda rs: seen.append([r["name"] for r in rs]))
    slow = python("import time; time.sleep(2)", name="slow")
    runner.run([[slow, python("", name="quick")], [python("", name="last")]], 60)
    assert seen == [["quick"], ["slow", "quick"], ["slow", "quick", "last"]]


def test_the_line_that_says_most_is_kept(tmp_path: Path) -> None:
    (record,) = run_all([python("print('found: 3')\nprint('bye')", tells="^found: ")], to=tmp_path)
    assert record["says"] == "found: 3"


def test_an_interrupt_ends_what_runs_and_keeps_what_was_found(tmp_path: Path) -> None:
    code = """
import json, os, signal, sys, threading
from pathlib import Path
from tools.gpu.stages import Runner, Stage
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background is begun without
threading.Timer(4, os.kill, (os.getpid(), signal.SIGINT)).start()
run = lambda name, code: Stage(name, [sys.executable, "-c", code], 60, 0, resumes=5)
groups = [[run("one", "print(1)")], [run("two", "import time; time.sleep(50)")], [run("three", "print(3)")]]
records = Runner(Path.cwd(), Path(sys.argv[1]), tell=lambda line: None).run(groups, 100)
print(json.dumps([r["ok"] for r in records]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=40)
    assert json.loads(done.stdout) == [True, False, False], done.stderr


# -- the machine


def test_without_a_gpu_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(Runner, "run", lambda *a, **k: pytest.fail("nothing may run"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.main([]) == 2
    assert "has no CUDA: make gpu PYTHON=" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert re.search(r"make gpu cannot run here: torch \S+ sees no CUDA device", capsys.readouterr().err)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 80GB")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(total_memory=80 << 30))
    for name in ("TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "VAEFAST_FORCE_CPU"):
        monkeypatch.setenv(name, "")


def toolkit(at: Path, release: str = "13.0") -> Path:
    """A folder with an nvcc that answers as one does."""
    nvcc = at / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.48'\n")
    nvcc.chmod(0o755)
    return at


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vaefast.available_backends", lambda: ("cpu", "reference"))


@pytest.fixture
def extension_for(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def have(*archs: str) -> None:
        monkeypatch.setattr("vaefast.available_backends", lambda: ("cuda", "cpu", "reference"))
        monkeypatch.setattr(_build, "info", lambda: _build.BuildInfo(cuda="CUDA 13.0", cuda_archs=archs))

    return have


def test_an_extension_that_has_kernels_for_the_gpu_is_used(extension_for: Callable[..., None]) -> None:
    extension_for("9.0")
    assert machine.why_not_usable("cuda", "9.0") == ""
    assert machine.why_not_usable("cuda", "8.0") == "it was built for 9.0, and the GPU is 8.0"
    extension_for("8.0", "9.0+PTX")
    assert all(not machine.why_not_usable("cuda", c) for c in ("8.0", "8.6", "9.0", "10.0", "12.0"))
    assert machine.why_not_usable("cuda", "7.5")


def test_an_extension_without_cuda_is_of_no_use(no_extension: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.why_not_usable("cuda", "9.0") == "it has no kernels for cuda"
    monkeypatch.setitem(sys.modules, "vaefast", None)
    assert "vaefast" in machine.why_not_usable("cuda", "9.0")


def test_without_nvcc_it_says_so(
    fake_gpu: None, no_extension: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert gpu.main([]) == 2
    assert re.search("no nvcc in CUDA_HOME=.*nowhere; install the CUDA 13 toolkit", capsys.readouterr().err)
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "old", "11.8")))
    assert gpu.main([]) == 2
    assert "nvcc is CUDA 11.8 but torch" in capsys.readouterr().err


def test_missing_packages_are_named(fake_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(machine, "TESTED_WITH", ("pytest", "nonesuch_a", "nonesuch_b"))
    assert gpu.main([]) == 2
    assert "pip install nonesuch_a nonesuch_b" in capsys.readouterr().err


def test_the_sanitizer_is_found_next_to_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    home = toolkit(tmp_path / "cuda")
    environment = {"PATH": "/nowhere", "CUDA_HOME": str(home)}
    usual = Path("/usr/local/cuda/bin/compute-sanitizer").exists()
    assert usual or machine.find_tool("compute-sanitizer", environment) is None
    tool = home / "compute-sanitizer" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert machine.find_tool("compute-sanitizer", environment) == str(tool)
    assert machine.of_kernels_alone(str(tool)) == []
    tool.write_text("#!/bin/sh\necho '  --kernel-regex arg   which kernels'\n")
    assert machine.of_kernels_alone(str(tool)) == ["--kernel-regex", "kns=vaefast"]


@pytest.fixture
def stand_ins(fake_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """In the place of the stages: one that writes the kernels' records, to be found in the folder returned, and one
    that fails."""
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "PREDICTIONS", tmp_path / "predictions.json")
    predicted = [
        {"kernel": name, "dtype": "float32", "gpu": chip, "elements": 9, "share": share}
        for name in ("scale_", "posterior_forward sample")
        for chip, share in (("H100", 0.5), ("Test", 0.97))
    ]
    (tmp_path / "predictions.json").write_text(json.dumps({"predictions": predicted}))
    kernels = ("scale_", "float32"), ("posterior_forward sample", "float32"), ("scale_", "bfloat16")
    found = [{"kernel": k, "dtype": d, "elements": 9, "of_copy": 0.93} for k, d in kernels]
    found += [found[0] | {"elements": 8}, found[0] | {"elements": 9, "dtype": "float64", "error": "no"}]
    there = tmp_path / "work" / "kernels.json"
    write = f"from pathlib import Path; Path({str(there)!r}).write_text({json.dumps(found)!r}); print('seen')"
    good, bad = python(write, name="kernels"), python("print('oops'); raise SystemExit(1)", name="tests")
    monkeypatch.setattr(gpu, "plan", lambda s: [[good], [bad]])
    return tmp_path


def test_everything_is_written_when_stages_fail(
    stand_ins: Path, extension_for: Callable[..., None], capsys: Any
) -> None:
    """A whole run with stand-ins for the stages: the file, the tables, the exit status."""
    extension_for("9.0")
    (stand_ins / "work").mkdir()
    (stand_ins / "work" / "wall.json").write_text('"of an earlier run"')
    assert gpu.main([]) == 1
    (out,) = (stand_ins / "results").glob("nvidia-test-80gb-*.json")
    document = json.loads(out.read_text())
    assert [(s["name"], s["ok"]) for s in document["stages"]] == [("kernels", True), ("tests", False)]
    assert document["stages"][1]["tail"] == "oops\n"
    assert document["machine"]["gpu"] == "NVIDIA Test 80GB" and document["machine"]["capability"] == "9.0"
    assert len(document["kernels"]) == 5 and document["documents"] == []
    assert [(p["kernel"], p["dtype"], p["predicted"]) for p in document["predictions"]] == [
        ("scale_", "float32", 0.97),
        ("posterior_forward sample", "float32", 0.97),
    ]
    text = capsys.readouterr().out
    assert re.search(r"posterior_forward sample +float32 +9 +93% +97%", text)
    assert "--- tests: exit status 1; its output ends with\noops" in text and f"written: {out}" in text
    folder = stand_ins / "mine"
    assert gpu.main(["--only", "kernels", "--out", str(folder)]) == 0
    assert {p.name for p in folder.iterdir()} == {"logs", out.name}, "each stage's own and the document, nothing else"
    assert json.loads((folder / out.name).read_text())["stages"][0]["says"] == "seen"


def test_what_cannot_be_built_runs_nothing_else(
    stand_ins: Path, no_extension: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(stand_ins / "cuda")))
    built = python("import os; print(os.environ['VAEFAST_FORCE_CUDA']); raise SystemExit(1)", name="build")
    monkeypatch.setattr(gpu, "build", lambda env: replace(built, env=env))
    assert gpu.main([]) == 1
    assert "of no use: it has no kernels for cuda" in capsys.readouterr().out
    (out,) = (stand_ins / "results").iterdir()
    (record,) = json.loads(out.read_text())["stages"]
    assert record["name"] == "build" and record["tail"] == "1\n"
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0"
    monkeypatch.setattr(gpu, "build", lambda env: python("", name="build"))
    assert gpu.main([]) == 1
    assert [r["name"] for r in json.loads(out.read_text())["stages"]] == ["build", "kernels", "tests"]


# -- the stages' commands


def planned(**options: Any) -> dict[str, Stage]:
    known = {"cores": 16, "sanitizer": "/bin/compute-sanitizer", "ncu": "/bin/ncu", "xdist": True}
    groups = plan.plan(plan.Setting(**({"work": Path("w"), "cache": Path("c")} | known | options)))
    return {stage.name: stage for group in groups for stage in group}


def test_the_plan_fits_its_time() -> None:
    """Every stage has what it is promised, whatever the others take, and all of it is less than seven minutes."""
    groups = plan.plan(plan.Setting(Path("w"), Path("c"), cores=16, xdist=True))
    promised = plan.BEFORE + sum(max(stage.promised for stage in group) for group in groups)
    assert promised <= plan.SECONDS_IN_ALL <= 420
    for stage in (s for group in groups for s in group):
        assert 30 <= stage.promised <= stage.limit, stage.name
    names = [stage.name for group in groups for stage in group]
    assert len(set(names)) == len(names) and names[0] == "smoke"
    said = (ROOT / "tools" / "gpu" / "README.md").read_text()
    for group in groups:
        row = re.search(rf"^\| {group[0].name}\b[^|]*\| (\d+) s", said, re.M)
        assert row and float(row[1]) == group[0].promised, f"README does not say what {group[0].name} is promised"
    assert {"cuda", "tests", "memcheck", "racecheck", "memcheck control", "nccl", "kernels", "wall", "ncu"} <= {*names}


def test_the_checkout_travels_light() -> None:
    """With the two files that are made beforehand it is less than 30 MB."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    extension = 20e6  # the most that prebuild.sh lets pass
    assert sum(file.stat().st_size for file in files if file.is_file()) + extension < 30e6


def test_commands_are_ones_that_their_programs_take(
    extension_for: Callable[..., None], fake_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    extension_for("9.0")
    parsed = {}
    for name, stage in planned().items():
        words = ["60" if word == SECONDS else word for word in stage.command]
        if words[1:3] == ["-m", "benchmarks"]:
            parsed[name] = run.parse(words[3:])
            assert parsed[name].device == "cuda" and parsed[name].deadline == 60 and parsed[name].resume
            assert all(name in run.PROVIDERS for name in parsed[name].providers.split(","))
    assert set(parsed) == {"compile", "wall"}
    assert parsed["wall"].filter == parsed["compile"].filter
    chosen = [name for name in WORKLOADS if re.search(parsed["wall"].filter, name)]
    assert len(chosen) == parsed["wall"].filter.count("|") + 1, "every name is a workload's"
    words = list(planned()["memcheck"].command)
    assert words[:5] == ["/bin/compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1"]
    assert (ROOT / words[words.index(sys.executable) + 1]).is_file() and words[-2:] == ["--until", UNTIL]
    assert "-n" in planned()["tests"].command and "-n" not in planned(xdist=False)["tests"].command
    assert "compute-sanitizer in PATH" in planned(sanitizer=None)["racecheck"].missing
    assert "no ncu" in planned(ncu=None)["ncu"].missing
    assert planned()["ncu"].command[0] == "/bin/ncu"
    assert not any(stage.missing for stage in planned(device="cpu", sanitizer=None, ncu=None).values())


@pytest.mark.parametrize(("stage", "more"), [("cuda", []), ("tests", ["tests/test_threads.py"])])
def test_the_tests_of_the_gpu_are_collected(stage: str, more: list[str], tmp_path: Path) -> None:
    words = planned(xdist=False, work=tmp_path)[stage].command
    command = ["60" if word == SECONDS else word for word in words if word != "-q"]
    done = subprocess.run([*command, *more, "--collect-only", "-q"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "cuda" in done.stdout and "[cpu" not in done.stdout


def test_the_control_must_find_its_error() -> None:
    judge = planned()["memcheck control"].judge
    assert judge(1, "========= Invalid __global__ read of size 16 bytes\n") == ""
    assert judge(0, "========= ERROR SUMMARY: 0 errors") and judge(1, "ImportError: no torch")


def test_clean_as_far_as_it_came_is_clean() -> None:
    judge = planned()["racecheck"].judge
    partly = "only {} of 640 cases ran before their time was up\n========= {}"
    assert judge(0, "640 cases ran") == ""
    assert judge(1, partly.format(90, "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")) == ""
    assert judge(1, partly.format(90, "ERROR SUMMARY: 0 errors")) == ""
    assert judge(1, partly.format(90, "ERROR SUMMARY: 3 errors")) == "exit status 1"
    assert judge(1, partly.format(0, "ERROR SUMMARY: 0 errors")) == "exit status 1"
    assert judge(1, "========= ERROR SUMMARY: 0 errors") == "exit status 1", "a case that failed"


def test_tests_pass_where_some_ran_and_none_failed(tmp_path: Path) -> None:
    judge = planned(work=tmp_path)["tests"].judge
    assert judge(0, "") == "exit status 0", "nothing ran"
    ran = {"outcomes": {"passed": 3}, "failures": []}
    (tmp_path / "tests.json").write_text(json.dumps(ran))
    assert judge(0, "") == "" and judge(2, "cut short") == "" and judge(3, "an internal error") == "exit status 3"
    (tmp_path / "tests.json").write_text(json.dumps(ran | {"failures": [{"test": "a.py::b"}]}))
    assert judge(1, "") == "1 failed, the first a.py::b"


def test_ncu_without_leave_says_so() -> None:
    judge = planned()["ncu"].judge
    assert "ERR_NVGPUCTRPERM" in judge(1, "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")
    assert judge(0, "") == "" and judge(9, "") == "exit status 9"


# -- what the sanitizer watches


def test_the_sanitizer_sees_every_function_on_every_dtype_shape_and_layout() -> None:
    met: dict[Any, set[Any]] = {}
    for case in sanitize.cases():
        key = (case.what, case.count)
        for option in (case.shape, case.layout, case.pick((1.0, 1.5)), case.pick(REDUCTIONS), case.dtype):
            met.setdefault((*key, type(option)), set()).add(option)
        met.setdefault((*key, case.dtype), set()).add(case.shape)
    whats = {key[:2] for key in met}
    assert len(whats) == 4 + 2 * len(LIKELIHOOD_CASES)
    for what in whats:
        assert met[(*what, tuple)] == set(sanitize.SHAPES)
        assert met[(*what, str)] == {*sanitize.LAYOUTS, *REDUCTIONS}
        assert met[(*what, float)] == {1.0, 1.5}
        for dtype in FLOATING:
            assert met[(*what, dtype)] == set(sanitize.SHAPES)


@pytest.mark.parametrize("layout", list(sanitize.LAYOUTS))
def test_layouts_keep_values_and_end_where_their_buffer_ends(layout: str) -> None:
    for shape in sanitize.SHAPES:
        t = torch.randn(shape)
        view = sanitize.LAYOUTS[layout](t)
        assert torch.equal(view, t)
        last = view.storage_offset() + sum((n - 1) * s for n, s in zip(view.shape, view.stride()))
        assert (last + 1) * 4 == view.untyped_storage().nbytes()


def test_the_sanitizers_cases_run(extension: object, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [case for k, case in enumerate(sanitize.cases()) if k % 9 == 0]
    monkeypatch.setattr(sanitize, "cases", lambda: iter(few))
    assert sanitize.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{len(few)} cases ran\n"
    assert sanitize.main(["--device", "cpu", "--every", "2"]) == 0
    assert capsys.readouterr().out == f"{(len(few) + 1) // 2} cases ran\n"
    assert sanitize.main(["--device", "cpu", "--until", str(time.time() - 1)]) == 1
    assert "only 0 of" in capsys.readouterr().out
    monkeypatch.setattr(sanitize, "run", lambda case, device: 1 / 0)
    assert sanitize.main(["--device", "cpu"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


# -- what is measured


def test_every_kernel_is_measured(extension: object, tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    assert kernels.main(["--device", "cpu", "--elements", "64", "--out", str(out)]) == 0
    records = json.loads(out.read_text())
    names = {record["kernel"] for record in records}
    assert len(records) == len(names) * len(kernels.DTYPES)
    assert all(record["seconds"] > 0 and record["bytes"] > 0 for record in records)
    for likelihood in reference.LIKELIHOODS:
        assert any(likelihood in name for name in names)


def test_every_kernel_has_its_predictions() -> None:
    """Under the name that it is timed by and for as many bytes, for every GPU and size; but for mixtures,
    whose loops over components are not told apart in the machine code."""
    plain = {name for name, entry in reference.LIKELIHOODS.items() if not entry.planes}
    timed = {kernel.name: kernel.moved for kernel in kernels.kernels() if kernel.likelihood in {"", *plain}}
    works = [f"{name.title().replace('_', '')}, {count}" for name, count in LIKELIHOOD_CASES if name in plain]
    held = [f"float: PlainReconstruction<{work}> + PlainForward<false, true>" for work in works]
    assert {o.name: o.loads + o.stores for o in operations(held)} == timed
    predicted = predictions.committed()
    assert predictions.ELEMENTS == kernels.ELEMENTS == tuple(map(int, plan.ELEMENTS))
    assert predicted.keys() == set(product(timed, [dtype.name for dtype in DTYPES], GPUS, predictions.ELEMENTS))


def test_a_kernel_that_loses_the_device_is_named_and_the_next_run_goes_on(
    extension: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "kernels.json"
    command = ["--device", "cpu", "--elements", "64", "--only", "^posterior_forward", "--out", str(out), "--resume"]
    command += ["--dtypes", "float32"]
    names = [kernel.name for kernel in kernels.kernels() if kernel.name.startswith("posterior_forward")]

    def dies(kernel: Any, dtype: str, *args: Any) -> dict[str, Any]:
        if kernel.name == names[1]:
            raise KeyboardInterrupt  # as good as a process that is gone
        return measure(kernel, dtype, *args)

    measure = kernels.measure
    monkeypatch.setattr(kernels, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        kernels.main(command)
    assert [(r["kernel"], r.get("error")) for r in json.loads(out.read_text())] == [
        (names[0], None),
        (names[1], "the process died"),
    ]
    monkeypatch.setattr(harness, "lost", lambda device: len(json.loads(out.read_text())) == 3)
    assert kernels.main(command) == LOST
    monkeypatch.setattr(harness, "lost", lambda device: False)
    assert kernels.main(command) == 1, "one failed"
    assert [r["kernel"] for r in json.loads(out.read_text())] == names
    assert f"{len(names)} of {len(names)} ran, 1 failed" in capsys.readouterr().out
    assert kernels.main([*command[:-3], "--deadline", "-1"]) == 1
    assert "kernels: 0 of" in capsys.readouterr().out


def test_a_kernel_that_fails_is_a_result() -> None:
    def fails(*tensors: torch.Tensor) -> Any:
        raise RuntimeError("no memory\nat all")

    record = kernels.measure(kernels.Kernel("bad", 1, 2, fails), "float32", 8, harness.timer(CPU), CPU)
    assert record["error"] == "RuntimeError: no memory"
    assert "RuntimeError: no memory" in kernels.table([record])


class FakeEvent:
    """An event on a GPU where everything takes two milliseconds."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        FakeEvent.clock += 2.0
        self.at = FakeEvent.clock

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


@pytest.fixture
def fake_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(L2_cache_size=1000))
    monkeypatch.setattr(harness, "FLUSH", 4096)


def test_cold_times_are_events_around_each_call(fake_events: None) -> None:
    calls: list[int] = []
    time_calls = harness.timer(CPU, cold=True)
    assert time_calls(lambda: calls.append(1), 5) == pytest.approx(2e-3)
    assert len(calls) == 6, "one more than is timed"
    assert harness.copy_seconds(CPU, 100, time_calls) == pytest.approx(2e-3)


def test_large_cases_on_a_gpu_are_timed_cold(fake_events: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.providers import PROVIDERS

    case = Case(WORKLOADS["sample-kl"], "fb", CPU, (0.02,))
    case.inputs, case.like  # noqa: B018  (made before the device changes its name)
    case.device = torch.device("cuda")
    monkeypatch.setattr(harness, "peak_bytes", lambda step, device: 1)
    monkeypatch.setattr(harness, "COLD", 1000)
    monkeypatch.setattr(harness, "cold_timer", lambda device, f=harness.cold_timer: f(CPU))
    monkeypatch.setattr(harness, "copy_seconds", lambda device, size, timer: 1e-3)
    record = harness.measure(case, [PROVIDERS["eager"], PROVIDERS["vaefast"]], budget=0.0, min_rounds=2)
    assert record["cold"] and record["copy_seconds"] == 1e-3
    assert record["providers"]["vaefast"]["median"] == pytest.approx(2e-3)
    assert report.memory_seconds(record, 1e9) == 1e-3


def test_sweeps_keep_round_sizes_round() -> None:
    assert run.spread(32.0, 2) == (8.0, 4.0) and run.spread(2.0**-15, 2) == (2.0**-7, 2.0**-8)
    assert run.spread(100.0, 2) == pytest.approx((10.0, 10.0))
    for elements in run.SWEEPS["cuda"]:
        workload = WORKLOADS["sample-kl"]
        sizes = workload.scaled(*run.factors_for(workload, elements))
        assert sizes["B"] * sizes["Z"] == elements


def test_what_a_cut_short_run_measured_is_there(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device: 1e10)
    out = tmp_path / "out.json"
    options = ["--budget", "0", "--providers", "eager", "--filter", "small", "--out", str(out)]
    assert run.main([*options, "--deadline", "-1"]) == 1
    assert not out.exists()
    assert "small-vae-bce" in capsys.readouterr().out
    measure = harness.measure

    def killed_at_the_second(case: Case, *args: Any, **options: Any) -> dict[str, Any]:
        if out.exists():
            raise KeyboardInterrupt
        return measure(case, *args, **options)

    monkeypatch.setattr(harness, "measure", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run.main(options)
    assert [case["workload"] for case in json.loads(out.read_text())["cases"]] == ["small-vae-bce"]


def test_large_inputs_repeat_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Draw, "BLOCK", 10)
    t = Draw(CPU).normal(5, 7, std=2.0).requires_grad_()
    assert t.shape == (5, 7) and t.is_leaf and t.is_contiguous()
    flat = t.detach().flatten()
    assert torch.equal(flat[10:20], flat[:10]) and torch.equal(flat[30:], flat[:5])


def test_a_gpus_results_get_their_own_table(tmp_path: Path) -> None:
    """Beside a CPU's: one table each, and a plot for the cases and the sweep."""
    pytest.importorskip("matplotlib", reason="reports need matplotlib: pip install 'vaefast[bench]'")
    from test_benchmarks import results

    def on_gpu(sweep: str | None, **more: Any) -> dict[str, Any]:
        document = results(sweep)
        document["machine"] |= {"gpu": "NVIDIA Test", "cuda": "13.0", "copy_bandwidth": 3e12}
        for case in document["cases"]:
            case |= {"cold": True, "copy_seconds": 1e-4}
        return document | more

    whole = {"date": "2026-01-31", "documents": [on_gpu(None), on_gpu("one"), on_gpu("one", cases=[])], "stages": []}
    files = [tmp_path / "a-cpu.json", tmp_path / "b-gpu.json", tmp_path / "c-gpu.json"]
    for file, content in zip(files, (results(), whole, {"documents": [], "stages": []})):
        file.write_text(json.dumps(content))
    readme, page = tmp_path / "performance.md", tmp_path / "page.md"
    readme.write_text("\n".join(report.marks("results")))
    page.write_text("\n".join(report.marks("costs")))
    assert report.main([*map(str, files), "--results", str(readme), "--page", str(page)]) == 0
    text = readme.read_text()
    assert text.count("| case | what, sizes |") == 2
    assert "A CPU, 2 cores" in text and "NVIDIA Test; torch 2.13.0, CUDA 13.0; copies 3000 GB/s" in text
    assert {p.name for p in tmp_path.glob("*.png")} == {"a-cpu.png", "b-gpu.png", "b-gpu-sweep.png"}
