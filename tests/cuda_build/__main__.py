"""``python -m cuda_build``: tables of what the machine code takes; ``--write`` keeps them, as the package says."""

from __future__ import annotations

import argparse
import json

from cuda_build import gates, predictions, units
from cuda_build.binary import resources


def taken() -> gates.Baseline:
    """Registers a thread and shared memory a block, of every kernel."""
    return {
        f"sm_{gates.ARCH}": {
            name: {"registers": r.registers, "shared": r.shared}
            for arithmetic in units.ARITHMETICS
            for (name, _), r in sorted(resources(units.cubin(arithmetic, gates.ARCH)).items())
        }
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cuda_build", description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite baseline.json and benchmarks/predictions.json")
    write = parser.parse_args().write
    baseline, predicted = taken(), predictions.predictions()
    if write:
        gates.BASELINE.write_text(json.dumps(baseline, indent=1) + "\n")
        predictions.FILE.write_text(json.dumps(predicted, indent=1) + "\n")
        return
    for name, numbers in baseline[f"sm_{gates.ARCH}"].items():
        print(f"{numbers['registers']:4} registers  {numbers['shared']:5} bytes shared  {name}")
    for name, dtypes in predicted["operations"].items():
        for dtype, archs in dtypes.items():
            each = "  ".join(f"{arch}: {found['instructions']:6.2f}" for arch, found in archs.items())
            print(f"{name:24} {dtype:9} instructions an element  {each}")


if __name__ == "__main__":
    main()
