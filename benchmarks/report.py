"""From results files to the tables of docs/performance.md and of the README here (between their markers), a plot beside
each file, the picture of the README and of the site's first page, and the one of time against size.

``python -m benchmarks.report [FILE ...]``; all of benchmarks/results/ if none is named.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LABELS = {"f": "forward", "fb": "forward + backward"}
PICTURE = "gains.png"
SIZES = "sizes.png"
# what the picture shows: a case of each kind, of the CPU that was measured last
PICTURED = {
    "small-vae-bce": "MNIST-size VAE",
    "image-vae-bce": "64x64 RGB VAE",
    "highres-vae-bce": "512x512 RGB VAE",
    "latent-diffusion-packed": "image autoencoder's moments",
    "hierarchy": "40 KLs of a hierarchy",
    "bnn": "25 million Bayesian weights",
    "zinb": "ZINB of 20,000 genes",
    "logistic-mixture": "mixed logistics, 32x32x3",
}
COLOURS = {
    "eager": "#9aa0a6",
    "compile": "#e8a33d",
    "fallback": "#4f9d69",
    "vaefast": "#2b6cb0",
    "vaefast+compile": "#7fb2e5",
}


def documents(results: dict[str, Any], file: Path) -> list[tuple[dict[str, Any], Path]]:
    """What a results file holds, and where the plot of each goes: one document, or several of a GPU's whole run, of
    which those without a case have nothing to show."""
    if "documents" not in results:
        return [(results, file.with_suffix(".png"))]
    named = [(d, file.with_name(f"{file.stem}{'-sweep' if d['sweep'] else ''}.png")) for d in results["documents"]]
    return [(d, out) for d, out in named if d["cases"]]


def duration(seconds: float) -> str:
    unit, name = next(((u, n) for u, n in ((1.0, "s"), (1e-3, "ms")) if seconds >= u), (1e-6, "µs"))
    return f"{seconds / unit:.3g} {name}" if seconds / unit < 999.5 else f"{seconds / unit:.0f} {name}"


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}x" if value < 10 else f"{value:.0f}x"


def size(value: int) -> str:
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if value >= u), (1, "B"))
    return f"{value / unit:.3g} {name}" if value / unit < 999.5 else f"{value / unit:.0f} {name}"


def sizes_of(key: str, *records: dict[str, Any] | None) -> str:
    """``key`` of each record; empty where one lacks it, as nothing is kept for backward where there is none."""
    return " → ".join(size(r[key]) for r in records if r) if all(r and key in r for r in records) else ""


def heading(document: dict[str, Any]) -> str:
    m = document["machine"]
    where = m["gpu"] or f"{m['cpu']}, {m['cores']} cores ({m['instruction_set']}), {m['threads']} threads"
    cuda = f", CUDA {m['cuda']}" if m["cuda"] else ""
    return f"{where}; torch {m['torch']}{cuda}; copies {m['copy_bandwidth'] / 1e9:.0f} GB/s; {document['date']}"


def modes_of(document: dict[str, Any]) -> str:
    """What is measured, where the case's name does not say otherwise."""
    modes = {case["mode"] for case in document["cases"]}
    return LABELS["fb" if "fb" in modes else "f"]


def case_name(case: dict[str, Any], mode: str) -> str:
    own = LABELS[case["mode"]]
    return str(case["workload"]) if own == mode else f"{case['workload']}, {own}"


def memory_seconds(case: dict[str, Any], bandwidth: float) -> float | None:
    """What copying as many bytes takes as the case has to move: measured at its size, or by the bandwidth of a large
    copy; None where its bytes are not known."""
    if case.get("copy_seconds") is not None:
        return float(case["copy_seconds"])
    return None if case["floor_bytes"] is None else case["floor_bytes"] / bandwidth


def timed(case: dict[str, Any], name: str) -> dict[str, Any] | None:
    record = case["providers"].get(name)
    return record if record and "error" not in record else None


def markdown(document: dict[str, Any]) -> str:
    """One table: a case a line, times, vaefast's ratios, what forward keeps for backward beside its inputs, and what a
    step needs at its peak."""
    mode = modes_of(document)
    head = ["case", "what, sizes", "eager", "torch.compile", "vaefast", "vs eager", "vs compile"]
    beside_jax = any(timed(case, "jax") for case in document["cases"])
    head += ["vs JAX"] * beside_jax + ["kept for backward, eager → vaefast", "peak memory, eager → vaefast"]
    rule = "|---|---|" + "---:|" * (len(head) - 2)
    lines = [f"{heading(document)}; {mode}; medians.", "", f"| {' | '.join(head)} |", rule]
    for case in document["cases"]:
        shown = {name: timed(case, name) for name in ("eager", "compile", "vaefast")}
        eager, fast = shown["eager"], shown["vaefast"]
        shape = ", ".join(f"{name} {size:,}" for name, size in case["sizes"].items())
        over = fast["over"] if fast else {}
        cells = [
            f"`{case_name(case, mode)}`",
            f"{case['what']}; {shape}",
            *(
                duration(r["median"]) if r else "failed" if name in case["providers"] else "not run"
                for name, r in shown.items()
            ),
            f"**{times(over.get('eager'))}**",
            times(over.get("compile")),
            *([times(over.get("jax"))] * beside_jax),
            *(sizes_of(key, eager, fast) for key in ("saved_bytes", "peak_bytes")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def costs(document: dict[str, Any]) -> str:
    """One table: a case a line, what a call, its arithmetic and its memory traffic cost apart, the estimate from them,
    what was reached, and what part of the rest the operating system took."""
    head = ["case", "node", "call", "arithmetic", "memory", "estimate", "reached", "estimate / reached", "rest"]
    head += ["in the kernel", "first touches"]
    bandwidth, threads = document["machine"]["copy_bandwidth"], document["machine"]["threads"]
    mode = modes_of(document)
    lines = [f"{heading(document)}; {mode}.", "", f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for case in document["cases"]:
        fast, memory = timed(case, "vaefast"), memory_seconds(case, bandwidth)
        if fast is None or memory is None:
            continue
        cells = [""] * len(head)
        cells[0] = f"`{case_name(case, mode)}`"
        cells[4] = f"{duration(memory)} ({size(case['floor_bytes'])})"
        cells[6] = duration(fast["median"])
        cells[10] = f"{fast['page_faults']:,.0f}"
        if cost := fast.get("costs"):
            an_element = cost["seconds_per_element"]
            arithmetic = an_element * case["elements"]
            estimate = cost["call_seconds"] + max(arithmetic, memory)
            cells[1] = duration(node) if (node := cost.get("node_seconds")) else ""
            cells[2] = duration(cost["call_seconds"])
            cells[3] = f"{duration(arithmetic)} ({an_element * 1e9:.2f} ns)"
            cells[5] = duration(estimate)
            cells[7] = f"{estimate / fast['median']:.0%}"
            cells[8] = duration(max(0.0, fast["median"] - estimate))
            cells[9] = duration(fast["kernel_seconds"] / threads)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def breakdown_rows(document: dict[str, Any]) -> list[list[str]]:
    """Head, then a line for each part of a training step, their sum, and the step that was not taken apart."""
    rows = [["part", "eager", "vaefast", "of the step", "times as fast"]]
    whole = document["breakdown"]["whole"]["vaefast"]["median"]
    for part, records in {**document["breakdown"]["parts"], "whole": document["breakdown"]["whole"]}.items():
        eager, fast = records["eager"]["median"], records["vaefast"]["median"]
        rows.append([part, duration(eager), duration(fast), f"{fast / whole:.0%}", times(eager / fast)])
    return rows


def breakdown(document: dict[str, Any]) -> str:
    head, *rows = (f"| {' | '.join(row)} |" for row in breakdown_rows(document))
    shape = ", ".join(f"{name} {size:,}" for name, size in document["breakdown"]["sizes"].items())
    rounds = document["breakdown"]["rounds"]
    title = f"{heading(document)}; `{document['breakdown']['workload']}`, {shape}; medians of {rounds} steps."
    return "\n".join([title, "", head, "|---|" + "---:|" * 4, *rows])


def kernels(results: dict[str, Any]) -> str:
    """A kernel of a GPU's run a line: its share of a copy's speed, by dtype and number of elements."""
    shares = {(r["kernel"], r["dtype"], r["elements"]): r["of_copy"] for r in results["kernels"] if "of_copy" in r}
    columns = [c for c in dict.fromkeys((dtype, elements) for _, dtype, elements in shares) if c[0] != "float64"]
    head = ["kernel", *(f"{dtype} {elements / 2**20:.0f}M" for dtype, elements in columns)]
    machine = results["machine"]
    title = f"{machine['gpu']}; torch {machine['torch']}, {machine['cuda']}; {results['date']}; of a copy's speed."
    lines = [title, "", f"| {' | '.join(head)} |", "|---|" + "---:|" * len(columns)]
    for name in dict.fromkeys(name for name, *_ in shares):
        cells = [f"{shares[key]:.0%}" if (key := (name, *column)) in shares else "" for column in columns]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def filled(page: Path, name: str, tables: Sequence[str]) -> None:
    """Writes the tables between the page's marks of that name; without a table, leaves the page as it is.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    if not tables:
        return
    begin, end = marks(name)
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed or begin in rest or end in after:
        raise ValueError(f"{page} must hold {begin} and then {end}, once each")
    page.write_text("\n\n".join([before + begin, *tables, end + after]))
    print(f"written: {page}, {name}")


def plot(document: dict[str, Any], out: Path) -> None:
    if document["sweep"]:
        return plot_sizes(document, sweeps(document), out)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # two bars a case, each as high as its label
    size = 9, 1.5 + 0.4 * len(document["cases"])
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    plot_speedups(axes, document)
    figure.suptitle(heading(document), fontsize=8, x=0.01, ha="left", color="#555")
    figure.savefig(out, dpi=160)
    plt.close(figure)


def plot_sizes(document: dict[str, Any], panels: Sequence[list[dict[str, Any]]], out: Path) -> None:
    """Time against size, a panel for each of a sweep's groups of cases."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (5 * columns, 4 * rows) if len(panels) > 1 else (9, 5)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, cases in zip(grid.flat, panels):
        axes.spines[["top", "right"]].set_visible(False)
        plot_sweep(axes, cases, document["machine"]["copy_bandwidth"])
    lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    grid[0, 0].legend(lines.values(), lines.keys(), frameon=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(heading(document), fontsize=8 if len(panels) == 1 else 11, x=0.01, ha="left", color="#555")
    figure.savefig(out, dpi=160)
    plt.close(figure)


def sweeps(document: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The cases of each workload and mode."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in document["cases"]:
        groups.setdefault((case["workload"], case["mode"]), []).append(case)
    return list(groups.values())


def plot_speedups(axes: Any, document: dict[str, Any]) -> None:
    """Bars: how many times as fast as eager and as torch.compile vaefast is, a case a pair."""
    cases = [case for case in document["cases"] if timed(case, "vaefast")][::-1]
    mode = modes_of(document)
    for shift, other, label in ((0.2, "eager", "against eager"), (-0.2, "compile", "against torch.compile")):
        for i, case in enumerate(cases):
            value = case["providers"]["vaefast"]["over"].get(other)
            if value is None:
                continue
            axes.barh(i + shift, value, 0.38, color=COLOURS[other], label=label if i == 0 else None)
            axes.text(value, i + shift, f" {value:.1f}", va="center", fontsize=8)
    axes.axvline(1, color="#333", linewidth=0.8)
    axes.set_yticks(range(len(cases)), [case_name(case, mode) for case in cases])
    axes.set_xlim(left=0)
    axes.margins(x=0.08)
    axes.set_xlabel(f"speed-up of vaefast, {mode} (times as fast; 1: equal)")
    axes.legend(frameon=False, loc="lower right")


def picture(document: dict[str, Any], out: Path) -> None:
    """Bars for the README: how many times as fast as eager PyTorch and as torch.compile, by what is computed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = {case["workload"]: timed(case, "vaefast") for case in document["cases"]}
    shown = [(label, record["over"]) for name, label in PICTURED.items() if (record := cases.get(name))][::-1]
    # so narrow that its words can be read on a phone
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for shift, other, label in ((0.2, "eager", "than eager PyTorch"), (-0.2, "compile", "than torch.compile")):
        at = [(i + shift, over[other]) for i, (_, over) in enumerate(shown) if over.get(other) is not None]
        axes.barh([y for y, _ in at], [value for _, value in at], 0.38, color=COLOURS[other], label=label)
        for y, value in at:
            axes.text(value, y, f" {times(value)}", va="center", fontsize=8)
    axes.axvline(1, color="#333", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [label for label, _ in shown])
    axes.set_xlim(left=0)
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("times as fast: sample, loss and all gradients")
    axes.legend(frameon=False, loc="upper right")
    figure.suptitle(heading(document), fontsize=7, x=0.01, ha="left", color="#555")
    figure.savefig(out, dpi=200)
    plt.close(figure)


def pictured(document: dict[str, Any]) -> bool:
    """Whether all that the picture shows was timed, on a CPU and against torch.compile too."""
    records = {case["workload"]: timed(case, "vaefast") for case in document["cases"]}
    return (
        not document["sweep"]
        and not document["machine"]["gpu"]
        and all((r := records.get(name)) and r["over"].get("compile") is not None for name in PICTURED)
    )


def plot_sweep(axes: Any, cases: Sequence[dict[str, Any]], bandwidth: float) -> None:
    """Lines: time an element against elements, one a provider, with 20th to 80th percentile and the time of a copy."""
    providers = dict.fromkeys(name for case in cases for name in case["providers"])
    for name in providers:
        points = [(case["elements"], r) for case in cases if (r := timed(case, name))]
        x = [n for n, _ in points]
        colour = COLOURS.get(name)
        (line,) = axes.plot(x, [r["median"] / n * 1e9 for n, r in points], "o-", ms=3, label=name, color=colour)
        low, high = ([r[p] / n * 1e9 for n, r in points] for p in ("p20", "p80"))
        axes.fill_between(x, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    limits = [(case["elements"], limit) for case in cases if (limit := memory_seconds(case, bandwidth))]
    if limits:
        x, limit = zip(*((n, seconds / n * 1e9) for n, seconds in limits))
        axes.plot(x, limit, "k--", linewidth=0.8, label="a copy of as many bytes")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"elements of {cases[0]['workload']}, {LABELS[cases[0]['mode']]}")
    axes.set_ylabel("ns an element")


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="benchmarks.report", description="tables and plots from results files")
    p.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all of benchmarks/results/")
    p.add_argument("--results", type=Path, default=ROOT / "docs" / "performance.md", help="where the results go")
    p.add_argument("--page", type=Path, default=ROOT / "benchmarks" / "README.md", help="where the costs go")
    args = p.parse_args(argv)
    tables: dict[str, list[str]] = {"results": [], "costs": [], "breakdown": [], "kernels": []}
    newest: dict[str, Any] | None = None
    found = (f for f in RESULTS.glob("*.json") if "-quick" not in f.name)
    read = [(json.loads(file.read_text()), file) for file in args.files or sorted(found, key=lambda f: f.stem)]
    # GPUs first
    for results, file in sorted(read, key=lambda one: "kernels" not in one[0]):
        if results.get("kernels"):
            tables["kernels"].append(kernels(results))
        if "breakdown" in results:
            tables["breakdown"].append(breakdown(results))
            continue
        for document, out in documents(results, file):
            plot(document, out)
            print(f"written: {out}")
            if pictured(document) and (newest is None or document["date"] > newest["date"]):
                newest = document
            if document["sweep"] and (panels := [g for g in sweeps(document) if g[0]["workload"] in PICTURED]):
                plot_sizes(document, panels, args.results.with_name(SIZES))
                print(f"written: {args.results.with_name(SIZES)}")
            if not document["sweep"]:
                tables["results"].append(markdown(document))
                if any("costs" in p for case in document["cases"] for p in case["providers"].values()):
                    tables["costs"].append(costs(document))
    if newest is not None:
        picture(newest, args.results.with_name(PICTURE))
        print(f"written: {args.results.with_name(PICTURE)}")
    filled(args.results, "results", tables["results"])
    for name in ("costs", "breakdown", "kernels"):
        filled(args.page, name, tables[name])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
