"""The command line: runs the cases, prints a table, writes benchmarks/results/<machine>-<date>.json.

- ``python benchmarks/run.py``: everything, forward + backward where there is something to train
- ``python benchmarks/run.py --quick``: a first look, under a minute: smaller sizes, no torch.compile
- ``python benchmarks/run.py --filter bce --mode f``: some workloads, forward only
- ``python benchmarks/run.py --sweep small-vae-bce,bnn``: time against size, from a batch of one element to 10^8
  elements or what fits in memory, each ten times the one before; ``--sweep all``: every workload
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # python benchmarks/run.py has benchmarks/ there instead

import torch  # noqa: E402

import vaefast  # noqa: E402
from benchmarks import facts, harness, report  # noqa: E402
from benchmarks.harness import Case  # noqa: E402
from benchmarks.providers import PROVIDERS, Provider  # noqa: E402
from benchmarks.workloads import WORKLOADS, Workload  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
QUICK_PROVIDERS = ("eager", "vaefast", "eager+graph", "vaefast+graph")
QUICK_BYTES = 1 << 26
SWEEP_PROVIDERS = ("eager", "compile", "vaefast", "eager+graph", "vaefast+graph")
SWEEPS = {"cpu": [10**k for k in range(9)], "cuda": [1, *(2**k for k in range(8, 29, 2))]}  # elements
# bytes of inputs and gradients; what eager makes on its way is several times as much
SWEEP_BYTES = {"cpu": 2 * 10**9, "cuda": 2**33}
# beyond, float64 would need several times the memory of what is timed
SWEEP_CHECKED_BYTES = {"cpu": 2 * 10**8, "cuda": 2**30}
TIMED = {
    "cpu": "wall time of enough calls in a row",
    "cuda": f"cases that move less than {harness.COLD >> 20} MiB: wall time of enough calls in a row, with launches, "
    "the L2 cache as the call before left it; larger ones: CUDA events around each call, the cache filled with other "
    "data before each, and before each of the copies that they are compared with",
}
CHECKED = (
    "every output and gradient against the eager implementation in float64 with the same noise, "
    f"to {harness.TOLERANCE:g} of the largest value; the noise's mean and variance; two calls draw different noise"
)


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    config = vaefast.show_config()
    runs = re.search(r"this machine runs (\w+)", config)
    return {
        "device": device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "instruction_set": runs.group(1) if runs else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "copy_bandwidth": harness.copy_bandwidth(device),
        "config": config,
    }


def file_name(info: dict[str, Any], date: str, suffix: str = "") -> str:
    return facts.file_name(info["gpu"] or f"{info['cpu']} {info['cores']} cores", date, suffix)


def modes(args: argparse.Namespace, workload: Workload) -> list[str]:
    """Those that were asked for among the workload's; its first where none was."""
    if args.mode is None:
        return [workload.modes[0]]
    return [mode for mode in harness.MODES if args.mode in (mode, "all") and mode in workload.modes]


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for workload in WORKLOADS.values():
        if not re.search(args.filter, workload.name):
            continue
        for mode in modes(args, workload):
            case = Case(workload, mode, device)
            while args.quick and (case.floor() or 0) > QUICK_BYTES:
                case = Case(workload, mode, device, (case.factors[0] / 2,))
            yield case


def spread(ratio: float, count: int) -> tuple[float, ...]:
    """So many factors whose product is the ratio: powers of two where it is one, so that round sizes stay round."""
    exponent = math.log2(ratio)
    if exponent != round(exponent):
        return (ratio ** (1 / count),) * count
    whole, rest = divmod(round(exponent), count)
    return tuple(2.0 ** (whole + (i < rest)) for i in range(count))


def swept(names: str) -> list[str]:
    """The workloads that ``--sweep`` names; all is without the bare generator, which is a part of a call."""
    return [name for name in WORKLOADS if name != "normal"] if names == "all" else names.split(",")


def factors_for(workload: Workload, elements: int) -> tuple[float, ...]:
    """What brings the workload to so many elements, or as near from below as its sizes allow."""
    rounded = spread(elements / workload.elements(1.0), len(workload.sizes))
    if workload.elements(*rounded) == elements:
        return rounded
    return (workload.largest(workload.elements, elements),)


def sweep_cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """Of each workload the largest first: a run that is cut short keeps what claims are made of."""
    targets = [n for n in SWEEPS[device.type][: -2 if args.quick else None] if n <= args.sweep_max]
    for workload in map(WORKLOADS.__getitem__, swept(args.sweep)):
        for mode in modes(args, workload):
            points = {}
            for elements in targets:
                case = Case(workload, mode, device, factors_for(workload, elements))
                if workload.memory(*case.factors) <= SWEEP_BYTES[device.type]:
                    points.setdefault(tuple(case.sizes.values()), case)
            yield from reversed(points.values())


def providers_of(args: argparse.Namespace, case: Case) -> list[Provider]:
    default = QUICK_PROVIDERS if args.quick else SWEEP_PROVIDERS if args.sweep else tuple(PROVIDERS)
    names = args.providers.split(",") if args.providers else default
    return [PROVIDERS[name] for name in names if PROVIDERS[name].covers(case.workload, case.device)]


@contextlib.contextmanager
def progress_bar(steps: int) -> Iterator[Callable[[str], None]]:
    """What is called with the name of each step as it begins; it draws a bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda what: None
        return
    with tqdm(total=steps, unit="step", disable=None) as bar:

        def progress(what: str) -> None:
            bar.set_description(what)
            bar.update()

        yield progress


def run(
    args: argparse.Namespace,
    device: torch.device,
    save: Callable[[dict[str, Any]], None] = lambda document: None,
    measured: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The whole results document; ``save`` is called with what there is of it after every case. Cases that were
    measured before are kept; one that loses the device is the last."""
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.perf_counter()
    chosen = list(sweep_cases(args, device) if args.sweep else cases(args, device))
    document: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": facts.commit(),
        "machine": machine(device),
        "checked": CHECKED,
        "timed": TIMED[device.type],
        "sweep": swept(args.sweep) if args.sweep else None,
        "cases": list(measured),
        "left_out": [],
        "seconds": 0.0,
    }
    if document["machine"]["load_before"] > 0.5 and device.type == "cpu":
        print("the machine is busy: threads that wait for a core make CPU figures meaningless", file=sys.stderr)
    known = {label(r["workload"], r["sizes"], r["mode"]) for r in measured}
    chosen = [case for case in chosen if label(case.workload.name, case.sizes, case.mode) not in known]
    plans = [(case, providers_of(args, case)) for case in chosen]
    with progress_bar(sum(len(p) + 1 for _, p in plans)) as progress:
        for case, providers in plans:
            name = f"{case.workload.name} {case.mode}"
            if time.perf_counter() - start > args.deadline:
                document["left_out"].append(f"{name} {case.sizes}")
                continue
            checked = not args.sweep or case.workload.footprint(*case.factors) <= SWEEP_CHECKED_BYTES[device.type]
            record = harness.measure(
                case,
                providers,
                budget=args.budget,
                min_rounds=args.min_rounds,
                checked=checked,
                costed=not (args.sweep or args.quick),
                progress=lambda what, name=name: progress(f"{name} {what}"),
            )
            document["cases"].append(record)
            if args.sweep:
                order = document["sweep"].index
                document["cases"].sort(key=lambda r: (order(r["workload"]), r["mode"], r["elements"]))
            document["seconds"] = round(time.perf_counter() - start, 1)
            case.release()
            save(document)
            if harness.lost(device):
                break
    return document


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest entry: the first two to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    pad = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    return "\n".join("  ".join(p(cell, w) for p, cell, w in zip(pad, row, widths)).rstrip() for row in rows)


def number(value: float | None, unit: float = 1.0, digits: int = 3) -> str:
    """A few significant digits, never an exponent."""
    if value is None:
        return "-"
    value /= unit
    if value == 0:
        return "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def label(workload: str, sizes: Mapping[str, int], mode: str) -> str:
    return f"{workload} {mode} {' '.join(f'{name}{size}' for name, size in sizes.items())}"


def case_label(case: dict[str, Any]) -> str:
    return label(case["workload"], case["sizes"], case["mode"])


def worst(document: dict[str, Any]) -> str:
    """Where vaefast gains least on eager, and every case where it loses; and so the fallback, where that was timed."""
    found = [verdict(document, name) for name in ("vaefast", "fallback")]
    return "\n".join(filter(None, found)) or "vaefast and eager were not both timed"


def verdict(document: dict[str, Any], name: str) -> str:
    ratios = [
        (fast["over"]["eager"], case_label(case))
        for case in document["cases"]
        if "eager" in (fast := case["providers"].get(name, {})).get("over", {})
    ]
    if not ratios:
        return ""
    least, where = min(ratios)
    slower = [f"\n  {number(ratio)}x  {label}" for ratio, label in sorted(ratios) if ratio < 1]
    return (
        f"{name} against eager at worst {number(least)}x: {where}; "
        f"slower than eager at {len(slower)} of {len(ratios)} points{':' if slower else ''}{''.join(slower)}"
    )


def table(document: dict[str, Any]) -> str:
    bandwidth = document["machine"]["copy_bandwidth"]
    head = ["case", "provider", "ms", "p20", "p80", "x eager", "x compile", "GB/s", "of copy", "kept MB", "peak MB",
            "kernel ms", "faults", "deviation", "rounds"]  # fmt: skip
    rows = [head]
    for case in document["cases"]:
        label, limit = case_label(case), report.memory_seconds(case, bandwidth)
        for name, r in case["providers"].items():
            if "error" in r:
                rows.append([label, name, r["error"][:90], *[""] * (len(head) - 3)])
                continue
            rate = r["bytes_per_second"]
            rows.append([
                label, name, *(number(r[key], 1e-3) for key in ("median", "p20", "p80")),
                *(number(r["over"].get(other)) for other in ("eager", "compile")),
                number(rate, 1e9), "-" if limit is None else f"{limit / r['median']:.0%}",
                number(r.get("saved_bytes"), 1e6), number(r.get("peak_bytes"), 1e6),
                number(r["kernel_seconds"], 1e-3), f"{r['page_faults']:.0f}",
                f"{r.get('deviation', math.nan):.0e}", str(r["rounds"]),
            ])  # fmt: skip
    m = document["machine"]
    where = m["gpu"] or f"{m['cpu']}, {m['cores']} cores, {m['instruction_set']}"
    return (
        f"{aligned(rows)}\n\n{where}, {m['threads']} threads, torch {m['torch']}, commit {document['commit']}; "
        f"copy bandwidth {number(bandwidth, 1e9)} GB/s; {document['seconds']:.0f} s\n"
        f"checked: {document['checked']}\ntimed: {document['timed']}"
        + "".join(f"\nleft out for want of time: {case}" for case in document["left_out"])
        + f"\n{worst(document)}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="benchmarks", description="vaefast against eager PyTorch and torch.compile")
    p.add_argument("--filter", default="", metavar="REGEX", help=f"workloads: {', '.join(WORKLOADS)}")
    p.add_argument("--providers", metavar="A,B", help=f"among {', '.join(PROVIDERS)}")
    p.add_argument(
        "--mode",
        choices=[*harness.MODES, "all"],
        help="f: forward, no grad; fb: and backward (default: fb, but f where there is nothing to train)",
    )
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    p.add_argument("--quick", action="store_true", help="under a minute: smaller sizes, no torch.compile")
    p.add_argument(
        "--budget", type=float, metavar="SECONDS", help="timing a case, at least 5 rounds (default 2; quick 0.5)"
    )
    p.add_argument(
        "--sweep",
        nargs="?",
        const="sample-kl",
        metavar="A,B",
        help="workloads, or all, at many sizes (default sample-kl)",
    )
    p.add_argument("--sweep-max", type=float, default=math.inf, metavar="N", help="at most so many elements")
    p.add_argument("--deadline", type=float, default=math.inf, metavar="SECONDS", help="begin no case later than this")
    p.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/<machine>-<date>.json")
    p.add_argument("--resume", action="store_true", help="keep the cases that --out holds and measure the rest")
    args = p.parse_args(argv)
    args.budget = args.budget if args.budget is not None else (0.5 if args.quick else 2.0)
    args.min_rounds = 3 if args.quick or args.sweep else 5
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("torch sees no CUDA device; use --device cpu")
    if args.device not in vaefast.available_backends():
        p.error(f"vaefast has no kernels for {args.device}, only its reference\n{vaefast.show_config()}")
    unknown = set((args.providers or "eager").split(",")) - set(PROVIDERS)
    if unknown:
        p.error(f"unknown providers: {', '.join(sorted(unknown))}")
    unknown = set(swept(args.sweep)) - set(WORKLOADS) if args.sweep else set()
    if unknown:
        p.error(f"unknown workloads: {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    if not any(re.search(args.filter, name) for name in WORKLOADS):
        p.error(f"no workload matches {args.filter!r}; there are {', '.join(WORKLOADS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the arguments say; 1 if a provider failed or was wrong, or nothing was measured; facts.LOST if a case
    lost the device."""
    args = parse(argv)
    suffix = ("-sweep" if args.sweep else "") + ("-quick" if args.quick else "")
    out: Path | None = args.out

    def save(document: dict[str, Any]) -> None:
        nonlocal out
        out = out or RESULTS / file_name(document["machine"], document["date"], suffix)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n")

    device = torch.device(args.device)
    resumes = args.resume and out is not None and out.exists()
    document = run(args, device, save, json.loads(out.read_text())["cases"] if resumes and out else [])
    print(table(document))
    print(
        f"written: {out}"
        if document["cases"]
        else "nothing was measured: no time was left, or no workload has that mode"
    )
    if harness.lost(device):
        return facts.LOST
    failed = any("error" in r for case in document["cases"] for r in case["providers"].values())
    return int(failed or not document["cases"])


if __name__ == "__main__":
    raise SystemExit(main())
