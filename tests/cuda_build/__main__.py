"""``python -m cuda_build``: tables of what the machine code takes; ``--write`` keeps them, as the package says;
``--fit`` brings the model's constants to what a GPU did."""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_build import gates, model, predictions, units
from cuda_build.binary import resources


def taken() -> gates.Baseline:
    """Registers a thread and shared memory a block, of every kernel."""
    # side by side, the two that take many minutes first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda unit: units.cubin(unit, gates.ARCH), units.UNITS))
    return {
        f"sm_{gates.ARCH}": {
            name: {"registers": r.registers, "shared": r.shared}
            for unit in units.UNITS
            for (name, _), r in sorted(resources(units.cubin(unit, gates.ARCH)).items())
        }
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cuda_build", description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite baseline.json and benchmarks/predictions.json")
    parser.add_argument("--fit", type=Path, metavar="RESULTS", help="print constants that fit a file of make gpu")
    args = parser.parse_args()
    if args.fit:
        results = json.loads(args.fit.read_text())
        known = predictions.committed().values()
        gpu = next(name for name in model.GPUS if name in results["machine"]["gpu"])
        constants, off = model.fit(known, results["kernels"], gpu)
        print(f"{model.told(constants)}\noff by {off:.1%} on average")
        return
    baseline, predicted = taken(), predictions.predictions()
    if args.write:
        gates.BASELINE.write_text(json.dumps(baseline, indent=1) + "\n")
        predictions.FILE.write_text(predictions.text(predicted))
        return
    for name, numbers in baseline[f"sm_{gates.ARCH}"].items():
        print(f"{numbers['registers']:4} registers  {numbers['shared']:5} bytes shared  {name}")
    print(predictions.table(predicted))


if __name__ == "__main__":
    main()
