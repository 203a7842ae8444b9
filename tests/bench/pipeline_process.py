"""The runner as it is, with its model watched: ``python -m tests.bench.pipeline_process run TASK_FILE``.

Each batch of texts that was computed is a line in the file that BENCH_EMBEDDED names: monotonic time, number of texts, and
CPU seconds of the process so far, its parsing child included.
"""

import os
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.usage import cpu_so_far

VARIABLE = "BENCH_EMBEDDED"


class Watched:
    """A model whose batches are counted; everything else is the model's."""

    def __init__(self, inner: Any, counter: Path) -> None:
        self._inner = inner
        self._counter = counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def embed(self, texts: Sequence[str]) -> Any:
        vectors = self._inner.embed(texts)
        with self._counter.open("a") as file:  # one write, so that a kill leaves whole lines
            file.write(f"{time.monotonic()} {len(texts)} {cpu_so_far()}\n")
        return vectors


def main(arguments: list[str]) -> None:
    """Become the runner."""
    counter = Path(os.environ.pop(VARIABLE))
    # As in job_runner.__main__, whose import comes too late for this: the model's module is imported here before it.
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    from job_runner import embed

    make = embed.make_embedder
    embed.make_embedder = lambda *given, **options: Watched(make(*given, **options), counter)
    sys.argv = ["job_runner", *arguments]
    runpy.run_module("job_runner", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
