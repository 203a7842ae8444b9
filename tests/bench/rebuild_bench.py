"""A rebuild of 5,000 chunks with the same and another model; searches meanwhile; a repair's check of 50,000 chunks.

``--most COUNT`` takes so many chunks for each: to see that it works.
"""

import asyncio
import json
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from job_runner.index import Generation
from job_runner.ledger import Ledger
from job_runner.search import Searcher
from job_runner.stores import opener
from task_contract.models import ProcessingTask, Result
from tests.bench import corpus
from tests.bench.measurement import Measurement
from tests.bench.pipeline_bench import Bench, running
from tests.bench.usage import Used
from tests.support.runner_lab import NAMESPACE, NOON, run_pipeline

PARTS: Final = ("rebuild", "search", "check")
CHUNKS: Final = 5_000
CHECKED: Final = 50_000
_DOCUMENT: Final = 500
"""Chunks of a document."""
_SIZE: Final = 300
"""Characters of a chunk."""
_DIMENSION: Final = 128
"""Of the rows that are only checked."""


def run(only: Sequence[str] = (), *, most: int | None = None) -> list[Measurement]:
    """Run the parts, or all."""
    measured = []
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as bench:
        if not only or {"rebuild", "search"} & set(only):
            kb_id = bench.new_knowledge_base()
            _fill(bench, kb_id, min(most or CHUNKS, CHUNKS))
            if not only or "rebuild" in only:
                measured += _rebuilding(bench, kb_id)
            if not only or "search" in only:
                measured += _searching(bench, kb_id)
        if not only or "check" in only:
            measured += _checking(bench, min(most or CHECKED, CHECKED))
    return measured


def task(kind: str, kb_id: str, **payload: object) -> ProcessingTask:
    """Return a task about a knowledge base."""
    metadata = {"name": "bench", "namespace": NAMESPACE, "uid": str(uuid.uuid4()), "creationTimestamp": NOON.isoformat()}
    spec = {"type": kind, "kbId": kb_id, "timeout": "60m", "payload": payload}
    return ProcessingTask.model_validate({"metadata": metadata, "spec": spec})


def _texts(count: int) -> Iterator[str]:
    text = "".join(corpus.chinese(count * _SIZE))
    return (text[start : start + _SIZE] for start in range(0, count * _SIZE, _SIZE))


def _fill(bench: Bench, kb_id: str, chunks: int) -> None:
    """Publish documents of Chinese text, of so many chunks in all."""
    for number in range(max(1, chunks // _DOCUMENT)):
        name = f"{number}.txt"
        text = "\n\n".join(corpus.chinese(min(chunks, _DOCUMENT) * (_SIZE - 15), seed=number + 1))
        (bench.documents / name).write_text(text)
        result = asyncio.run(run_pipeline(bench.task(name, kb_id, chunkSize=_SIZE), bench.settings(), bench.embedder)).result
        print(f"      {name}: {result.chunks} chunks", flush=True)


class _Timed:
    """The packaged model under another name, so that its vectors count as those of another; seconds of it are summed."""

    name = "second"
    fingerprint = "second-1"

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.seconds = 0.0
        self.texts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        began = time.monotonic()
        vectors: npt.NDArray[np.float32] = self._inner.embed(texts)
        self.seconds += time.monotonic() - began
        self.texts += len(texts)
        return vectors


# ------------------------------------------------------------------------------------------------------------- rebuild


def _rebuilding(bench: Bench, kb_id: str) -> list[Measurement]:
    """The same model and splitter, then another model."""
    questions = bench.documents / "golden.jsonl"
    line = {"question": (bench.documents / "0.txt").read_text()[:60], "documentId": "0.txt"}
    questions.write_text(json.dumps(line) + "\n")
    same = _rebuilt(bench, kb_id, bench.embedder)
    second = _Timed(bench.embedder)
    other = _rebuilt(bench, kb_id, second)
    assert same.seconds is not None
    assert other.seconds is not None
    filling = other.seconds["embed"]
    print(f"      same {json.dumps(same.seconds)}, other {json.dumps(other.seconds)}", flush=True)
    how = f"{same.chunks} chunks of at most {_SIZE} Chinese characters in {same.documents} documents; one run"
    return [
        Measurement(
            metric="vectors computed, same model and splitter",
            value=same.embedded or 0,
            unit="texts",
            target=0,
            baseline=same.chunks,
            how=how,
        ),
        Measurement(
            metric="rebuild, same model and splitter", value=sum(same.seconds.values()), unit="s", baseline=filling, how=how
        ),
        Measurement(
            metric="embedder at work while another model fills",
            value=100 * second.seconds / filling,
            unit="%",
            target=90,
            better="higher",
            baseline=100,
            how=f"{how}; share of the stage in which the model computes: reading, writing and the ledger are the rest",
        ),
    ]


def _rebuilt(bench: Bench, kb_id: str, embedder: Any) -> Result:
    payload: dict[str, object] = {"rebuildIndex": True, "goldenPath": "golden.jsonl", "maxRecallDrop": 100}
    settings = bench.settings()
    if embedder is not bench.embedder:
        payload["embeddingModel"] = embedder.name
        settings = settings.model_copy(update={"embedding_models": (embedder.name,)})
    models = {settings.embedding_model: bench.embedder, embedder.name: embedder}
    done = asyncio.run(run_pipeline(task("knowledge_indexing", kb_id, **payload), settings, models))
    return done.result


# -------------------------------------------------------------------------------------------------------------- search


def _searching(bench: Bench, kb_id: str) -> list[Measurement]:
    """Searches while nothing else is done, and while a runner beside them rebuilds."""
    assert asyncio.run(_serving(bench, kb_id))[1] != "", "filled before"
    quiet, _ = asyncio.run(_ask(bench, kb_id, until=None))
    errors: list[str] = []
    ended = threading.Event()

    def rebuild() -> None:
        try:
            payload = {"rebuildIndex": True, "chunkSize": _SIZE - 50, "goldenPath": "golden.jsonl", "maxRecallDrop": 100}
            bench.run(task("knowledge_indexing", kb_id, **payload, embeddingModel=bench.embedder.name))
        except Exception as error:  # noqa: BLE001 - told below
            errors.append(f"rebuild: {error}")
        finally:
            ended.set()

    rebuilding = threading.Thread(target=rebuild)
    rebuilding.start()
    meanwhile, failed = asyncio.run(_ask(bench, kb_id, until=ended))
    rebuilding.join()
    assert not errors, errors
    how = f"searches of both stores, one after another: {len(quiet)} quiet, {len(meanwhile)} beside a rebuild's process"
    return [
        Measurement(metric="searches that failed during a rebuild", value=len(failed), unit="", target=0, how=how),
        Measurement(
            metric="p99 of searches during a rebuild, beside the quiet one",
            value=_p99(meanwhile) / _p99(quiet),
            unit="times",
            target=1.5,
            baseline=1,
            how=f"{how}; p99 {1000 * _p99(quiet):.0f} and {1000 * _p99(meanwhile):.0f} ms",
        ),
    ]


def _p99(seconds: Sequence[float]) -> float:
    return float(np.percentile(seconds, 99))


async def _serving(bench: Bench, kb_id: str) -> tuple[int, str, int]:
    ledger = Ledger(bench.settings().postgres_url.get_secret_value())
    try:
        found = await ledger.knowledge_base(namespace=NAMESPACE, kb_id=kb_id)
    finally:
        await ledger.aclose()
    assert found is not None
    return found


async def _ask(bench: Bench, kb_id: str, *, until: threading.Event | None) -> tuple[list[float], list[str]]:
    """Ask 300 times, or until an event; return how long each took, and what failed."""
    settings = bench.settings()
    ledger = Ledger(settings.postgres_url.get_secret_value())
    number, _, dimension = await _serving(bench, kb_id)
    generation = Generation(NAMESPACE, kb_id, number)
    stores = opener(settings, dimension=dimension)(generation)
    searcher = Searcher(generation, stores=stores, embedder=bench.embedder, ledger=ledger)
    questions = list(_texts(100))
    took: list[float] = []
    failed: list[str] = []
    try:
        await searcher.ask(questions[0][:40])  # connects
        while len(took) < 300 if until is None else not until.is_set():
            began = time.monotonic()
            try:
                answers = await searcher.ask(questions[len(took) % len(questions)][:40])
                assert answers.fused
            except Exception as error:  # noqa: BLE001 - counted
                failed.append(repr(error))
            took.append(time.monotonic() - began)
    finally:
        await stores.aclose()
        await ledger.aclose()
    return took, failed


# --------------------------------------------------------------------------------------------------------------- check


def _checking(bench: Bench, rows: int) -> list[Measurement]:
    """The whole runner repairs what needs no repair."""
    kb_id = bench.knowledge_bases.new(_DIMENSION)
    drawn = np.random.default_rng(1)
    texts = _texts(rows)
    for number in range(max(1, rows // _DOCUMENT)):
        with (bench.documents / "rows.jsonl").open("w") as file:
            for _ in range(min(rows, _DOCUMENT)):
                row = {"text": next(texts), "vector": drawn.normal(size=_DIMENSION).round(4).tolist()}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        payload = {"inputPath": "rows.jsonl", "documentId": f"{number}", "embeddingModel": "elsewhere"}
        asyncio.run(run_pipeline(task("vector_storage", kb_id, **payload), bench.settings(), bench.embedder))
    used, result = bench.run(task("knowledge_indexing", kb_id, action="repair"), watch=True)
    assert (result["chunks"], result["repaired"]) == (rows, 0), result
    return _of_check(used, rows)


def _of_check(used: Used, rows: int) -> list[Measurement]:
    how = f"one run of the whole runner, imports and connections included; {rows} rows in documents of {_DOCUMENT}"
    return [
        Measurement(metric="check of a repair", value=used.wall, unit="s", target=20, how=how),
        Measurement(metric="memory of a repair", value=used.memory, unit="MB", target=300, how=f"{how}; sum of PSS"),
    ]
