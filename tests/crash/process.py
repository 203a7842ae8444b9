"""The operator, the runner or its sweep as they are, with the seams watched: ``python -m tests.crash.process operator``.

Everything that is not the product is here and in :mod:`tests.crash.faults`: neither knows that it is watched.
"""

import os
import runpy
import sys
from pathlib import Path

from tests.crash import faults as seams

COUNTER = "CRASH_COUNTER"
"""File in which the runner's model counts the texts that it computes."""


def main(role: str, *arguments: str) -> None:
    """Become the process of a role."""
    faults = seams.Faults.from_environment()
    seams.watch_sql(faults)
    if role == "operator":
        seams.watch_api(faults)
        module = "task_operator"
    else:
        _quick_model(Path(os.environ.pop(COUNTER)))
        seams.watch_elasticsearch(faults)
        seams.watch_milvus(faults)
        seams.watch_message(faults)
        module = "job_runner"
    sys.argv = [module, "sweep" if role == "sweep" else "run", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _quick_model(counter: Path) -> None:
    """Have a model that takes no time, before anybody has looked up how models are made."""
    from job_runner import embed

    def make(name: str, *, threads: int = 1) -> embed.Embedder:
        from tests.support.runner_lab import HashEmbedder, OtherEmbedder

        return OtherEmbedder(counter) if name == OtherEmbedder.name else HashEmbedder(counter)

    embed.make_embedder = make


if __name__ == "__main__":
    main(*sys.argv[1:])
