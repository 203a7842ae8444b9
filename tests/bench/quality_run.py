"""One embedding model on the golden set, for each way to split: JSON on standard output.

A process of its own, since other backends need other environments: ``python -m tests.bench.quality_run packaged``, or
sentence-transformers, or onnx.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import structlog

from job_runner.embed import PACKAGED_MODEL, Embedder, make_embedder
from job_runner.quality import Quality, evaluate
from task_contract.models import ProcessingMode
from tests.support import golden
from tests.support.databases import fresh_database

CARRIED = "all-MiniLM-L6-v2"
"""The model of sentence-transformers that a package carries: of English texts alone."""
BACKENDS = ("packaged", "sentence-transformers", "onnx")


def main(arguments: list[str]) -> int:
    """Measure on the stores that TASKS_* name; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.quality_run")
    parser.add_argument("backend", choices=BACKENDS)
    backend = parser.parse_args(arguments).backend
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    urls = {name: value for name, value in os.environ.items() if name.startswith("TASKS_")}
    with (
        tempfile.TemporaryDirectory() as folder,
        fresh_database(urls["TASKS_POSTGRES_URL"], prefix="bench") as database,
    ):
        embedder = _embedder(backend, Path(folder))
        given = {**urls, "TASKS_POSTGRES_URL": database}
        measured = {str(mode): asyncio.run(_measured(given, mode, embedder)) for mode in ProcessingMode}
    print(json.dumps({mode: {"recall": dict(one.recall), "mrr": dict(one.mrr)} for mode, one in measured.items()}))
    return 0


async def _measured(urls: dict[str, str], mode: ProcessingMode, embedder: Embedder) -> Quality:
    async with golden.filled(urls, mode=mode, embedder=embedder) as ask:
        return await evaluate(golden.questions(), ask)


def _embedder(backend: str, folder: Path) -> Embedder:
    if backend == "packaged":
        return make_embedder(PACKAGED_MODEL)
    if backend == "sentence-transformers":
        return make_embedder(CARRIED)
    from job_runner.export_onnx import main as export

    exported = folder / "exported"
    if export([CARRIED, str(exported)]) != 0:
        raise SystemExit(f"cannot measure onnx: {CARRIED} was not exported")
    return make_embedder(str(exported))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
