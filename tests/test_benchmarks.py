"""The benchmarks' own logic: every implementation of every workload is right, a wrong one is caught, reports come out.

Nothing here looks at a time.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bayesian, breakdown, harness, history, jaxed, report, run
from benchmarks.harness import Case, Wrong
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.workloads import WORKLOADS, Function, Workload

ROOT = Path(__file__).resolve().parents[1]

CPU = torch.device("cpu")
FACTOR = 0.02
UNSAID: dict[str, Any] = {"checked": "", "timed": "", "left_out": []}
MODED = [(name, mode) for name, w in WORKLOADS.items() for mode in w.modes]


def small(name: str, mode: str = "fb") -> Case:
    return Case(WORKLOADS[name], mode, CPU, (FACTOR,))


@pytest.mark.parametrize(("name", "mode"), MODED)
@pytest.mark.parametrize("kind", ["eager", "distributions", "vaefast"])
def test_implementations_are_right(kind: str, name: str, mode: str) -> None:
    function = getattr(WORKLOADS[name], kind)
    if function is None:
        pytest.skip(f"{name} has no {kind}")
    assert harness.check(small(name, mode), function) <= harness.TOLERANCE


@pytest.mark.parametrize("name", jaxed.FORMULAS)
@pytest.mark.parametrize("mode", ["f", "fb"])
def test_jax(name: str, mode: str) -> None:
    if not jaxed.INSTALLED:
        pytest.skip("JAX is not installed; `pip install jax` and this runs")
    providers = [PROVIDERS["eager"], PROVIDERS["vaefast"], PROVIDERS["jax"]]
    case = harness.measure(small(name, mode), providers, budget=0.01, min_rounds=1)
    record = case["providers"]
    assert "jax" in run.table({"cases": [case], "machine": run.machine(CPU), "commit": "", "seconds": 0.0, **UNSAID})
    assert all("error" not in r and r["deviation"] <= harness.TOLERANCE and r["median"] > 0 for r in record.values())
    assert record["vaefast"]["over"]["jax"] > 0


def scaled(i: int) -> Any:
    """The right outputs, but the i-th off by a thousandth."""

    def wrong(w: Workload) -> Function:
        return lambda *inputs: tuple(o * 1.001 if j == i else o for j, o in enumerate(w.vaefast(*inputs)))

    return wrong


def detached(w: Workload) -> Function:
    """The right values; the last input takes part in them, but not in the gradients."""
    return lambda *inputs: w.vaefast(*[t + 0 * t if i else t.detach() + 0 * t for i, t in enumerate(inputs)])


def no_noise(w: Workload) -> Function:
    """Eager, with zeros for noise."""

    def wrong(*inputs: Tensor) -> tuple[Tensor, ...]:
        with harness.GivenNoise([torch.zeros_like(inputs[0])]):
            return w.eager(*inputs)

    return wrong


def same_noise(w: Workload) -> Function:
    def wrong(*inputs: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return w.vaefast(*inputs)

    return wrong


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (scaled(1), "output 1 is off"),
        (scaled(0), "gradient"),
        (detached, "gradient 0 is off"),
        (no_noise, "variance 0"),
        (same_noise, "same noise"),
        (lambda w: lambda *inputs: w.vaefast(*inputs)[:1], "1 outputs, not 2|out of range"),
        (lambda w: lambda *inputs: tuple(o * float("nan") for o in w.vaefast(*inputs)), "off by inf"),
    ],
)
def test_wrong_implementations_are_caught(make: Any, why: str) -> None:
    case = small("sample-kl")
    with pytest.raises((Wrong, IndexError), match=why):
        harness.check(case, make(case.workload))


def test_few_draws_may_be_far_out_and_many_may_not() -> None:
    far = torch.tensor([4.0])
    harness.check_noise(far)
    for wrong in (7 * torch.ones(1), far.expand(10), torch.full((1000,), float("nan")), 1.5 * torch.randn(1000)):
        with pytest.raises(Wrong, match=r"over \d+ draws"):
            harness.check_noise(wrong)


def test_failures_are_results_and_are_not_timed() -> None:
    def fails(*inputs: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("no kernel\nfor this")

    wrong = Provider("wrong", lambda w: scaled(1)(w))
    raising = Provider("raising", lambda w: fails)
    record = harness.measure(small("sample-kl"), [PROVIDERS["eager"], wrong, raising], budget=0.0, min_rounds=1)
    providers = record["providers"]
    assert providers["wrong"]["error"].startswith("Wrong: output 1 is off")
    assert providers["raising"]["error"] == "RuntimeError: no kernel"
    assert "median" in providers["eager"] and "median" not in providers["wrong"]
    assert providers["eager"]["over"] == {"eager": 1.0}


def test_memory_and_bytes() -> None:
    case = small("sample-kl")
    one = case.inputs[0].numel() * 4
    assert harness.saved_bytes(case, case.workload.vaefast) == 16
    assert harness.saved_bytes(case, case.workload.eager) >= 2 * one
    # mu and logvar read twice, z written, its gradient read, two gradients written; and the KL with its gradient
    assert case.floor() == 8 * one + 8
    assert small("sample-kl", "f").floor() == 3 * one + 4
    numbers = small("normal", "f")
    assert numbers.floor() == numbers.sizes["N"] * 4 + 8  # its mean and scale are one number each
    peak = harness.peak_bytes(case.step(case.workload.vaefast), CPU)
    assert 3 * one <= peak < 4 * one


@pytest.mark.parametrize("kind", ["eager", "vaefast"])
def test_what_is_timed_is_what_was_checked(kind: str) -> None:
    """A step's gradients are those that the check looks at, the noise being the same."""
    case = small("small-vae-bce")
    function = getattr(case.workload, kind)
    torch.manual_seed(3)
    _, expected = case.run(function, case.inputs)
    torch.manual_seed(3)
    for got, checked in zip(case.step(function)(), expected, strict=True):
        assert torch.equal(got, checked)


def test_training_steps_leave_the_inputs_alone() -> None:
    case = small("train-step")
    before = [t.clone() for t in case.inputs]
    case.step(case.workload.vaefast)()
    assert all(torch.equal(a, b) for a, b in zip(before, case.inputs))


def test_rounds_are_interleaved() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = harness.interleave(steps, harness.timer(CPU), budget=0.0, min_rounds=4)
    assert [len(t.seconds) for t in times.values()] == [4, 4]
    assert harness.ratio(times["a"], times["a"]) == 1.0
    slow, fast = harness.Times(1, [2.0, 4.0, 9.0]), harness.Times(1, [1.0, 2.0, 3.0])
    assert harness.ratio(slow, fast) == 2.0


def arguments(*more: str) -> list[str]:
    return ["--quick", "--budget", "0", "--providers", "eager,vaefast", *more]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device: 1e10)
    out = tmp_path / "out.json"
    assert run.main(arguments("--filter", "small|train", "--out", str(out))) == 0
    document = json.loads(out.read_text())
    assert [c["workload"] for c in document["cases"]] == ["small-vae-bce", "small-vae-gaussian", "train-step"]
    assert document["machine"]["threads"] == torch.get_num_threads()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("small-vae-bce fb B128 Z20 X784") for line in lines) == 2
    for bad in (["--filter", "nonesuch"], ["--providers", "nonesuch"], ["--mode", "x"]):
        with pytest.raises(SystemExit):
            run.main(bad)


def test_what_is_not_trained_is_run_forward() -> None:
    default, forward, both, every = (
        run.parse(["--quick", "--filter", "normal|small-vae-bce|train", *mode])
        for mode in ([], ["--mode", "f"], ["--mode", "fb"], ["--mode", "all"])
    )

    def chosen(args: Any) -> list[tuple[str, str]]:
        return [(case.workload.name, case.mode) for case in run.cases(args, CPU)]

    vae, normal, train = "small-vae-bce", "normal", "train-step"
    assert chosen(default) == [(vae, "fb"), (normal, "f"), (train, "fb")]
    assert chosen(forward) == [(vae, "f"), (normal, "f")]
    assert chosen(both) == [(vae, "fb"), (train, "fb")]
    assert chosen(every) == [(vae, "f"), (vae, "fb"), (normal, "f"), (train, "fb")]


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_sweeps_go_from_one_element_up_by_tens(name: str) -> None:
    workload = WORKLOADS[name]
    args = run.parse(["--sweep", name, "--sweep-max", "1e6"])
    points = list(run.sweep_cases(args, CPU))[::-1]
    assert set(points[0].sizes.values()) == {1}
    assert all(point.mode == workload.modes[0] for point in points)
    elements = [workload.elements(*point.factors) for point in points]
    # the next point but one, where a batch's pairs do not fit
    assert elements[-1] <= 1e6 and (elements[-1] > 8e5 or workload.memory(10 * points[-1].factors[0]) > 2e9)
    assert all(1 < b / a < 20 for a, b in itertools.pairwise(elements))
    whole = list(run.sweep_cases(run.parse(["--sweep", name]), CPU))
    assert all(workload.memory(*point.factors) <= run.SWEEP_BYTES["cpu"] for point in whole)
    assert workload.memory(*whole[0].factors) > 1e8


def test_elements_and_bytes_are_those_of_the_inputs() -> None:
    for workload in WORKLOADS.values():
        tiny = Case(workload, workload.modes[0], CPU, (FACTOR,))
        inputs = tiny.inputs[:1] if workload.optimizer else tiny.inputs
        trained = [t for t in inputs if t.requires_grad]
        assert workload.footprint(FACTOR) == sum(t.numel() * t.element_size() for t in [*inputs, *trained])
        assert workload.elements(FACTOR) == max(t.numel() for t in inputs)


def test_several_sweeps_end_in_a_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device: 1e10)
    out = tmp_path / "out.json"
    names = ["normal", "small-vae-bce", "train-step"]
    assert run.main(arguments("--sweep", ",".join(names), "--sweep-max", "3000", "--out", str(out))) == 0
    document = json.loads(out.read_text())
    assert document["sweep"] == names
    assert list(dict.fromkeys(case["workload"] for case in document["cases"])) == names
    assert [case["elements"] for case in document["cases"]][:4] == [1, 10, 100, 1000]
    assert "vaefast against eager at worst" in capsys.readouterr().out
    assert run.swept("all") == [name for name in WORKLOADS if name != "normal"]
    with pytest.raises(SystemExit):
        run.main(["--sweep", "normal,nonesuch"])


def test_the_verdict_names_what_is_slower() -> None:
    document = results(["one", "two"])
    assert run.worst(document) == (
        "vaefast against eager at worst 3.00x: one fb B4 X1000; slower than eager at 0 of 2 points"
    )
    document["cases"].append(result("three", 1e-3, 2e-3))
    verdict = run.worst(document).splitlines()
    assert verdict[0].startswith("vaefast against eager at worst 0.500x: three fb") and "1 of 3 points:" in verdict[0]
    assert verdict[1:] == ["  0.500x  three fb B4 X1000"]
    document["cases"][0]["providers"]["fallback"] = {"over": {"eager": 0.9}}
    assert run.worst(document).splitlines()[2:] == [
        "fallback against eager at worst 0.900x: one fb B4 X1000; slower than eager at 1 of 1 points:",
        "  0.900x  one fb B4 X1000",
    ]
    for case in document["cases"]:
        case["providers"] = {"vaefast": {"error": "RuntimeError: x"}}
    assert run.worst(document) == "vaefast and eager were not both timed"


def result(workload: str, eager: float, vaefast: float, **more: Any) -> dict[str, Any]:
    def record(seconds: float) -> dict[str, Any]:
        over = {"eager": eager / seconds, "compile": 0.5 * eager / seconds}
        memory = {"peak_bytes": 1_500_000, "saved_bytes": 16, "page_faults": 1234.0}
        return {"median": seconds, "p20": seconds, "p80": seconds, "over": over, **memory}

    providers = {"eager": record(eager), "compile": {"error": "RuntimeError: x"}, "vaefast": record(vaefast)}
    sizes = {"B": 4, "X": 1000}
    return {
        "workload": workload, "what": "something", "sizes": sizes, "elements": 4000, "mode": "fb",
        "floor_bytes": 48_000, "providers": providers, **more,
    }  # fmt: skip


def results(sweep: str | list[str] | None = None) -> dict[str, Any]:
    machine = {"gpu": None, "cpu": "A CPU", "cores": 2, "instruction_set": "AVX2", "threads": 2, "torch": "2.13.0",
               "cuda": None, "copy_bandwidth": 1e10}  # fmt: skip
    cases = [result("one", 3e-3, 1e-3), result("two", 4e-2, 1e-3, elements=400_000)]
    return {"date": "2026-01-31", "commit": "abc", "machine": machine, "sweep": sweep, "cases": cases}


def pages(folder: Path) -> tuple[Path, Path, list[str]]:
    """The two pages with marks and old tables, and the options that name them."""
    readme, page = folder / "performance.md", folder / "page.md"
    for file, names in ((readme, ["results"]), (page, ["costs", "breakdown"])):
        file.write_text("before\n" + "between\n".join("\nold\n".join(report.marks(n)) for n in names) + "\nafter\n")
    return readme, page, ["--results", str(readme), "--page", str(page)]


def test_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="reports need matplotlib: pip install 'vaefast[bench]'")
    readme, _, options = pages(tmp_path)
    file = tmp_path / "a-cpu.json"
    file.write_text(json.dumps(results()))
    assert report.main([str(file), *options]) == 0
    text = readme.read_text()
    row = "| `one` | something; B 4, X 1,000 | 3 ms | failed | 1 ms | **3.0x** | 1.5x | 16 B → 16 B | 1.5 MB → 1.5 MB |"
    assert row in text.splitlines()
    assert "**40x**" in text and "A CPU, 2 cores (AVX2), 2 threads" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert report.main([str(file), *options]) == 0
    assert readme.read_text() == text
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="results:begin"):
        report.main([str(file), *options])


def test_the_pages_hold_the_tables_of_the_results() -> None:
    """No figure on them is typed: each is in a file of benchmarks/results/."""
    page = (report.ROOT / "docs" / "performance.md").read_text()
    for file in report.RESULTS.glob("*.json"):
        results = json.loads(file.read_text())
        if "breakdown" in results:
            continue
        for document, _ in report.documents(results, file):
            assert document["sweep"] or report.markdown(document) in page, file.name


def test_costs_are_a_table(tmp_path: Path) -> None:
    """Also where they were not measured, as in older files, or the limit is not known."""
    pytest.importorskip("matplotlib", reason="reports need matplotlib: pip install 'vaefast[bench]'")
    _, page, options = pages(tmp_path)
    file, document = tmp_path / "a-cpu.json", results()
    document["cases"].append(result("three", 1e-3, 1e-3, floor_bytes=None))
    costs = {
        "node_seconds": 2e-5,
        "call_seconds": 1e-4,
        "cached_elements": 100,
        "cached_seconds": 2e-4,
        "seconds_per_element": 2e-7,
    }
    document["cases"][0]["providers"]["vaefast"] |= {"costs": costs, "kernel_seconds": 1e-4}
    file.write_text(json.dumps(document))
    assert report.main([str(file), *options]) == 0
    lines = page.read_text().splitlines()
    # 4000 elements take 0.8 ms, and 48 kB at 10 GB/s 4.8 us; two threads
    row = "| 20 µs | 100 µs | 800 µs (200.00 ns) | 4.8 µs (48 kB) | 900 µs | 1 ms | 90% | 100 µs | 50 µs | 1,234 |"
    assert f"| `one` {row}" in lines
    assert "| `two` |  |  |  | 4.8 µs (48 kB) |  | 1 ms |  |  |  | 1,234 |" in lines
    assert not any("three" in line for line in lines)
    assert lines.count("old") == 1, "no breakdown, so that one stays"


def test_breakdown(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(breakdown, "WARM_UP", 1)
    out = tmp_path / "b.json"
    assert breakdown.main(["--rounds", "3", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["breakdown"]
    assert (found["workload"], found["sizes"], found["rounds"]) == ("train-step", {"B": 128}, 3)
    for provider in ("eager", "vaefast"):
        parts = [part[provider]["median"] for part in found["parts"].values()]
        assert len(parts) == 6 and all(seconds > 0 for seconds in parts)
    assert "networks, backward" in capsys.readouterr().out
    _, page, options = pages(tmp_path)
    assert report.main([str(out), *options]) == 0
    lines = page.read_text().splitlines()
    assert sum(line.startswith("| Adam | ") for line in lines) == 1 and lines.count("old") == 1


def test_costs_of_calls_and_elements() -> None:
    providers = [PROVIDERS[name] for name in ("eager", "compile", "vaefast")]
    found = harness.costs(small("sample-kl"), providers, budget=0.0, min_rounds=1)
    assert set(found) == {"eager", "vaefast"}
    for cost in found.values():
        assert cost["call_seconds"] > 0 and cost["node_seconds"] > 0
        assert cost["cached_elements"] == WORKLOADS["sample-kl"].elements(FACTOR)
    workload = WORKLOADS["sample-kl"]
    assert 2**15 < workload.elements(workload.largest(workload.footprint, harness.CACHED)) <= 2**16
    for costed in (True, False):
        record = harness.measure(small("normal", "f"), providers[::2], budget=0.0, min_rounds=1, costed=costed)
        assert ("costs" in record["providers"]["vaefast"]) == costed


@pytest.mark.parametrize("sweep", ["one", ["one", "two"]])
def test_sweep_report_leaves_the_readme_alone(sweep: str | list[str], tmp_path: Path) -> None:
    """Of one workload, as older files have it, and of several."""
    pytest.importorskip("matplotlib", reason="reports need matplotlib: pip install 'vaefast[bench]'")
    file = tmp_path / "sweep.json"
    document = results(sweep)
    document["cases"].append(result("untold", 1e-3, 1e-3, floor_bytes=None))
    file.write_text(json.dumps(document))
    absent = str(tmp_path / "absent.md")
    assert report.main([str(file), "--results", absent, "--page", absent]) == 0
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / report.SIZES).exists(), "none of the README's cases is in it"
    document["cases"].append(result("zinb", 1e-3, 1e-3))
    file.write_text(json.dumps(document))
    assert report.main([str(file), "--results", absent, "--page", absent]) == 0
    assert (tmp_path / report.SIZES).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234, "1.23 s"), (0.0123, "12.3 ms"), (0.4567, "457 ms"), (4.2e-4, "420 µs"), (12.0, "12 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (16, "16 B"), (30720, "30.7 kB"), (999_900, "1000 kB"), (268_435_456, "268 MB")]
)
def test_sizes(value: int, text: str) -> None:
    assert report.size(value) == text


def test_file_names_hold_machine_and_date() -> None:
    info = {"gpu": None, "cpu": "Some CPU @ 2.0GHz", "cores": 8}
    assert run.file_name(info, "2026-01-31") == "some-cpu-2-0ghz-8-cores-2026-01-31.json"
    assert run.file_name(info | {"gpu": "NVIDIA H200"}, "2026-01-31", "-sweep") == "nvidia-h200-2026-01-31-sweep.json"


def test_every_workload_has_inputs_to_train() -> None:
    for workload in WORKLOADS.values():
        tiny = Case(replace(workload), workload.modes[0], CPU, (FACTOR,))
        assert any(t.requires_grad for t in tiny.inputs) == ("fb" in workload.modes)
        assert all(size >= 1 for size in tiny.sizes.values())


def test_history_says_what_got_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A case that lost a tenth between two commits on one kind of device, and none that did not."""
    source = next(f for f in sorted(report.RESULTS.glob("*.json")) if any(history.entries_of(f)))
    results = json.loads(source.read_text())
    documents = results.get("documents", [results])
    kept = tmp_path / "history.json"
    for day, (commit, factor) in enumerate((("first", 1.0), ("second", 0.9), ("third", 0.98)), 1):
        results["commit"], moved = commit, documents[0]
        moved["date"] = f"2027-01-0{day}"
        for case in moved["cases"][:1]:
            case["providers"]["vaefast"]["over"]["eager"] *= factor
        file = tmp_path / f"{commit}.json"
        file.write_text(json.dumps(results))
        status = history.main([str(file), "--history", str(kept)])
        said = capsys.readouterr().out
        assert status == (commit == "second")
        assert ("nothing slower" in said) == (commit == "third")
        assert said.count("slower: ") == (commit == "second")
    assert [e["commit"] for e in json.loads(kept.read_text())] == ["first", "second", "third"]


def test_history_knows_the_results_that_are_kept() -> None:
    """`make history` was run after they came."""
    known = json.loads(history.FILE.read_text())
    assert history.added(known, sorted(report.RESULTS.glob("*.json"))) == known


def test_bayesian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A first look at a LeNet and few weights, by whatever libraries there are."""
    monkeypatch.setattr(bayesian, "NETWORKS", {"LeNet": (bayesian.lenet, (2,))})
    monkeypatch.setattr(bayesian, "WEIGHTS", {"a few": (3, 5)})
    monkeypatch.setattr(bayesian, "accuracies", lambda seeds, epochs: {"vaefast": [0.5] * seeds})
    assert bayesian.main(["--rounds", "3", "--seeds", "2", "--out", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "found.json").read_text())
    for tables in bayesian.pages(document).values():
        assert "\n\n".join(tables) in printed
    libraries = document["networks"][0]["libraries"]
    assert {"vaefast", bayesian.ALONE} <= set(libraries) and libraries["vaefast"]["kept"] > 0
    assert "| vaefast | 50.00% ± 0.00% | 2 |" in printed and "| a few |" in printed


def test_what_pages_say_of_bayesian_networks_is_in_the_results() -> None:
    files = sorted((report.RESULTS / "bayesian").glob("*.json"))
    assert files
    for (page, _), tables in bayesian.pages(json.loads(files[-1].read_text())).items():
        assert all(table in page.read_text() for table in tables), page
