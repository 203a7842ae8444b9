"""``python -m tests.bench [NAME]``: run the benchmarks, write ``build/bench/NAME.json``, print a table.

A benchmark is a module here with a function ``run() -> list[Measurement]``. Figures of a shared machine are noisy: CPU time
and ratios within one run say more than wall time. ``--help`` lists what each of them measures.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

from devstack.progress import DevstackError

BENCHMARKS = ("devstack", "document", "operator", "pipeline")
RESULTS = Path(__file__).resolve().parents[2] / "build/bench"


def main(names: list[str]) -> int:
    """Run the benchmarks named, or all; return the exit status: 1 when one could not be run. A missed target is no error."""
    # One thread of linear algebra, as in the runner (job_runner.__main__); numpy reads it when it is imported.
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    if "--help" in names:
        print("python -m tests.bench [NAME ...]: writes build/bench/NAME.json; a missed target is no error\n")
        for name in BENCHMARKS:
            print(f"  {name:<10} {str(importlib.import_module(f'tests.bench.{name}_bench').__doc__).splitlines()[0]}")
        return 0
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"cannot run {', '.join(unknown)}: the benchmarks are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 1
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in names or BENCHMARKS:
        print(f"{name}: running", flush=True)
        began = time.monotonic()
        try:
            measurements = importlib.import_module(f"tests.bench.{name}_bench").run()
        except DevstackError as error:
            print(f"cannot measure {name}: {error}", file=sys.stderr)
            return 1
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps([measurement.record() for measurement in measurements], indent=2) + "\n")
        for one in measurements:
            target = "" if one.target is None else f"target {one.target:g}, {'met' if one.met else 'MISSED'}"
            print(f"  {one.metric:<52}{one.value:>10.2f} {one.unit:<10}{target}")
        print(f"  {time.monotonic() - began:.0f} s, {path.relative_to(Path.cwd())}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main([name for name in sys.argv[1:] if name]))
