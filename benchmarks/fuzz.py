"""Read a million mutated inputs over all boundaries, and count how many are accepted, rejected and at fault.

`python -m benchmarks.fuzz [--minutes 20] [--seed 0] [--only NAME] [--json FILE]` mutates valid input of every
boundary of tests/boundaries.py. Every input must be a correct value or be rejected with one sentence. The rest are
faults: one input of each kind is printed, and the exit code is 1. All boundaries have the same time, and at most
--inputs inputs.

memory  growth of the peak resident memory during the boundary, in MB
"""

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path
from random import Random

from tests.boundaries import boundaries, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="time over all boundaries")
    parser.add_argument("--inputs", type=int, default=200_000, help="largest number of inputs of one boundary")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only boundaries whose name contains this")
    parser.add_argument("--json", type=Path, help="write {name: number} to this file")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        every = [boundary for boundary in boundaries(Path(folder)) if options.only in boundary.name]
        sys.stdout.write(f"{'boundary':24}{'inputs':>10}{'accepted':>10}{'faults':>8}{'slowest':>10}{'memory':>8}\n")
        for index, boundary in enumerate(every):
            before = _peak_mb()
            seconds = options.minutes * 60 / len(every)
            tally = fuzz(boundary, Random(options.seed + index), inputs=options.inputs, seconds=seconds)
            inputs, accepted = sum(tally.outcomes.values()), tally.outcomes["accepted"]
            line = f"{boundary.name:24}{inputs:10,}{accepted:10,}{len(tally.faults):8}{tally.slowest_s:9.3f}s"
            sys.stdout.write(f"{line}{_peak_mb() - before:8.0f}\n")
            for fault, data in tally.faults.items():
                sys.stdout.write(f"    {fault}\n    {data[:300]!r}\n")
            sys.stdout.flush()
            values = {"inputs": inputs, "accepted": accepted, "faults": len(tally.faults)}
            figures |= {f"{boundary.name}/{name}": value for name, value in values.items()}
            figures[f"{boundary.name}/slowest_s"] = round(tally.slowest_s, 4)
    total = sum(value for name, value in figures.items() if name.endswith("/inputs"))
    sys.stdout.write(f"{total:,.0f} inputs\n")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return int(any(value for name, value in figures.items() if name.endswith("/faults")))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    raise SystemExit(main())
