"""``python -m cuda_build``: tables of what the machine code takes; ``--write`` keeps them, as the package says."""

from __future__ import annotations

import argparse
import json
from itertools import groupby

from cuda_build import gates, predictions, units
from cuda_build.binary import resources


def taken() -> gates.Baseline:
    """Registers a thread and shared memory a block, of every kernel."""
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
    write = parser.parse_args().write
    baseline, predicted = taken(), predictions.predictions()
    if write:
        gates.BASELINE.write_text(json.dumps(baseline, indent=1) + "\n")
        predictions.FILE.write_text(predictions.text(predicted))
        return
    for name, numbers in baseline[f"sm_{gates.ARCH}"].items():
        print(f"{numbers['registers']:4} registers  {numbers['shared']:5} bytes shared  {name}")
    print(f"\n{'':44}instructions an element, the share of a copy's speed that they allow")
    for (name, dtype), records in groupby(predicted, key=lambda r: (r["kernel"], r["dtype"])):
        each = "  ".join(f"{r['gpu']} {r['instructions']:6.2f} {r['share']:4.0%}" for r in records)
        print(f"{name:44} {dtype:9} {each}")


if __name__ == "__main__":
    main()
