"""``python -m tests.bench [NAME ...]``: run the benchmarks, write ``build/bench/NAME.json``, print a table.

A benchmark is a module here with a function ``run() -> list[Measurement]``. Figures of a shared machine are noisy: CPU time
and ratios within one run say more than wall time. ``--help`` lists what each of them measures. ``--only PART`` runs parts of
one benchmark that has parts (comma separated), and writes ``build/bench/NAME-PART.json``.
"""

import argparse
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from devstack.progress import DevstackError

BENCHMARKS = (
    *(
        "batch",
        "devstack",
        "dispatch",
        "document",
        "failover",
        "gateway",
        "gateway_live",
        "operator",
        "pipeline",
        "pools",
        "projection",
        "quality",
    ),
    *("rebuild", "soak", "store_limits", "vectors"),
)
NAMED_ONLY = ("soak", "store_limits")
"""Take half an hour and an hour, and are left out where all are run."""
PARTED = ("gateway", "gateway_live", "operator", "pipeline", "pools", "quality", "rebuild", "store_limits", "vectors")
"""Have parts."""
IN_ALL = {
    "operator": ("steady", "burst", "jobs", "idle"),
    "pools": ("floor", "steady", "queued", "killed", "embedding"),
}
"""Parts of these where all are run; the others, such as simulated nodes, pods and Celery, take as long as all the rest."""
RESULTS = Path(__file__).resolve().parents[2] / "build/bench"


def main(arguments: list[str]) -> int:
    """Run the benchmarks named, or all; return the exit status: 1 when one could not be run. A missed target is no error."""
    # One thread of linear algebra, as in the runner (job_runner.__main__); numpy reads it when it is imported.
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write build/bench/NAME.json; a missed target is no error.",
        epilog="\n".join(
            f"  {name:<12} {str(importlib.import_module(f'tests.bench.{name}_bench').__doc__).splitlines()[0]}"
            for name in BENCHMARKS
        )
        if "--help" in arguments
        else None,
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"one of {', '.join(BENCHMARKS)}; none: all but soak and store_limits, "
        f"of {' and '.join(IN_ALL)} the shorter parts",
    )
    parser.add_argument("--only", metavar="PART", help=f"parts of the benchmark {' or '.join(PARTED)}, comma separated")
    parser.add_argument("--most", type=int, metavar="COUNT", help="knowledge bases of store_limits, rows of the others")
    given = parser.parse_args(arguments)
    names = given.names or [name for name in BENCHMARKS if name not in NAMED_ONLY]
    parts = [part for part in (given.only or "").split(",") if part]
    if unknown := [name for name in names if name not in BENCHMARKS]:
        print(f"cannot run {', '.join(unknown)}: the benchmarks are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 1
    if parts and (len(names) != 1 or names[0] not in PARTED):
        print(f"cannot run parts of these: --only is for the benchmark {' or '.join(PARTED)}", file=sys.stderr)
        return 1
    options = {} if given.most is None else {"most": given.most}
    if options and names not in (["rebuild"], ["store_limits"], ["vectors"]):
        print("cannot run these with --most: it is for the benchmark rebuild, store_limits or vectors", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: databases and servers go with it
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in names:
        chosen = parts or ([] if given.names else list(IN_ALL.get(name, ())))
        print(f"{name}: running{' ' if chosen else ''}{', '.join(chosen)}", flush=True)
        began = time.monotonic()
        try:
            measurements = importlib.import_module(f"tests.bench.{name}_bench").run(*([chosen] if chosen else []), **options)
        except DevstackError as error:
            print(f"cannot measure {name}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"{name}: stopped; what it had made is gone", file=sys.stderr)
            return 130
        path = RESULTS / f"{'-'.join([name, *parts])}.json"
        path.write_text(json.dumps([measurement.record() for measurement in measurements], indent=2) + "\n")
        for one in measurements:
            target = "" if one.target is None else f"target {one.target:g}, {'met' if one.met else 'MISSED'}"
            print(f"  {one.metric:<52}{one.value:>10.2f} {one.unit:<10}{target}")
        print(f"  {time.monotonic() - began:.0f} s, {path.relative_to(Path.cwd())}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main([name for name in sys.argv[1:] if name]))
