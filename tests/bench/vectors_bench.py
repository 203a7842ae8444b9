"""vector_storage beside the clients' own bulk calls, memory from 10,000 to 200,000 rows; embedding beside a bare loop.

``--most COUNT`` takes fewer than 200,000 rows: to see that it works.
"""

import asyncio
import json
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from job_runner.embed import batches
from job_runner.index import Generation
from job_runner.stores import opener
from task_contract.models import ProcessingTask
from tests.bench import corpus
from tests.bench.measurement import Measurement
from tests.bench.pipeline_bench import Bench, pipeline_row, running
from tests.support.runner_lab import NAMESPACE, NOON, run_pipeline

PARTS: Final = ("storage", "memory", "embedding")
FEW: Final = 10_000
MANY: Final = 200_000
DIMENSION: Final = 128
"""Of the rows: 200,000 of them, with texts, are half a gigabyte of JSON, a little less than a runner takes."""
TEXT: Final = 300
TEXTS: Final = 2_000
BULK: Final = 1_000
"""Rows of a bulk call: what pymilvus' documentation does, and twice what Elasticsearch's helper takes by default."""


def run(only: Sequence[str] = (), *, most: int = MANY) -> list[Measurement]:
    """Run the parts, or all."""
    measured = []
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as bench:
        few = min(FEW, most)
        if not only or "storage" in only:
            measured += _storage(bench, few)
        if not only or "memory" in only:
            measured += _memory(bench, few, most)
        if not only or "embedding" in only:
            measured += _embedding(bench, min(TEXTS, most))
    return measured


def task(bench: Bench, kind: str, kb_id: str | None = None, **payload: object) -> ProcessingTask:
    """Return a task of one of the two types."""
    spec = {"type": kind, "timeout": "60m", "payload": payload} | ({} if kb_id is None else {"kbId": kb_id})
    metadata = {"name": "bench", "namespace": NAMESPACE, "uid": str(uuid.uuid4()), "creationTimestamp": NOON.isoformat()}
    return ProcessingTask.model_validate({"metadata": metadata, "spec": spec})


def _rows(count: int) -> Iterator[tuple[list[str], npt.NDArray[np.float32]]]:
    """Yield texts and vectors, BULK at a time."""
    text = "".join(corpus.chinese(100 * TEXT))
    drawn = np.random.default_rng(1)
    for start in range(0, count, BULK):
        size = min(BULK, count - start)
        texts = [f"{start + index} {text[index % 100 * TEXT :][:TEXT]}" for index in range(size)]
        vectors = drawn.normal(size=(size, DIMENSION)).astype(np.float32)
        yield texts, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _write(path: Path, count: int) -> None:
    with path.open("wb") as file:
        number = 0
        for texts, vectors in _rows(count):
            for text, vector in zip(texts, vectors, strict=True):
                number += 1
                row = {"id": f"row-{number}", "text": text, "vector": vector, "metadata": {"team": "harbour"}}
                file.write(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))


# ------------------------------------------------------------------------------------------------------------- storage


def _storage(bench: Bench, count: int) -> list[Measurement]:
    """Rows through the whole task, and by the clients' bulk calls into both stores at once."""
    _write(bench.documents / "rows.jsonl", count)
    ratios, rates, bulk = [], [], []
    for number in range(3):
        ours, theirs = (bench.knowledge_bases.new(DIMENSION) for _ in range(2))
        for kb_id in (ours, theirs):  # collections are made outside of the measurement
            asyncio.run(_prepare(bench, kb_id))
        stored = task(bench, "vector_storage", ours, inputPath="rows.jsonl", embeddingModel="elsewhere")
        began = time.monotonic()
        done = asyncio.run(run_pipeline(stored, bench.settings(), bench.embedder))
        mine, seconds = time.monotonic() - began, done.result.seconds
        other = asyncio.run(_bulk(bench, theirs, count))
        assert done.result.chunks == count
        print(f"      {count / mine:.0f} rows/s, bulk calls {count / other:.0f}; stages {json.dumps(seconds)}", flush=True)
        if number or count < FEW:  # the first round warms caches, connections and the JVM
            ratios.append(other / mine)
            rates.append(count / mine)
            bulk.append(count / other)
    how = (
        f"{count} rows of {DIMENSION} dimensions and {TEXT} characters, in turns, median; ours from a file of JSON lines to "
        "the publication, both readings and the reading back included; theirs: MilvusClient.upsert() and "
        f"helpers.async_bulk() at once, {BULK} rows a call, from dictionaries made outside of the time"
    )
    return [
        Measurement(
            metric="vector_storage beside the clients' bulk calls",
            value=float(np.median(ratios)) * 100,
            unit="%",
            target=85,
            better="higher",
            baseline=100,
            how=how,
        ),
        Measurement(
            metric="vector_storage", value=float(np.median(rates)), unit="rows/s", baseline=float(np.median(bulk)), how=how
        ),
    ]


async def _prepare(bench: Bench, kb_id: str) -> None:
    stores = opener(bench.settings(), dimension=DIMENSION)(Generation(NAMESPACE, kb_id, 1))
    await stores.ensure()
    await stores.aclose()


async def _bulk(bench: Bench, kb_id: str, count: int) -> float:
    """Return the seconds of the bulk calls of both clients at once."""
    from elasticsearch.helpers import async_bulk

    stores: Any = opener(bench.settings(), dimension=DIMENSION)(Generation(NAMESPACE, kb_id, 1))
    await stores.ensure()
    data: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = []
    for texts, vectors in _rows(count):
        rows = [pipeline_row(len(data) * BULK + index, text) for index, text in enumerate(texts)]
        plain = [asdict(row) for row in rows]
        milvus = [{**row, "embedding": vector} for row, vector in zip(plain, vectors, strict=True)]
        elasticsearch = [
            {"_id": row["id"], "_source": {key: value for key, value in row.items() if key != "id"}} for row in plain
        ]
        data.append((milvus, elasticsearch))

    async def into_milvus() -> None:
        for rows, _ in data:
            await asyncio.to_thread(stores.vectors._client.upsert, stores.vectors._name, rows)

    async def into_elasticsearch() -> None:
        for _, rows in data:
            await async_bulk(stores.texts._client, rows, index=stores.texts._name)

    began = time.monotonic()
    await asyncio.gather(into_milvus(), into_elasticsearch())
    took = time.monotonic() - began
    await stores.aclose()
    return took


# -------------------------------------------------------------------------------------------------------------- memory


def _memory(bench: Bench, few: int, many: int) -> list[Measurement]:
    """The whole runner with few and with many rows."""
    most = {}
    for count in (few, many):
        _write(bench.documents / f"{count}.jsonl", count)
        kb_id = bench.knowledge_bases.new(DIMENSION)
        stored = task(bench, "vector_storage", kb_id, inputPath=f"{count}.jsonl", embeddingModel="elsewhere")
        used, result = bench.run(stored, watch=True)
        (bench.documents / f"{count}.jsonl").unlink()
        most[count] = used.memory
        print(f"      {count} rows: {used.memory:.0f} MB, {result['chunks']} stored, {used.wall:.0f} s", flush=True)
    how = f"one run each of the whole runner, rows of {DIMENSION} dimensions; sum of PSS, looked at 50 times a second"
    return [
        Measurement(
            metric=f"memory, {many} rows beside {few}",
            value=most[many] / most[few],
            unit="times",
            target=1.3,
            baseline=1,
            how=how,
        ),
        Measurement(metric=f"memory, most, {many} rows", value=most[many], unit="MB", baseline=most[few], how=how),
    ]


# ----------------------------------------------------------------------------------------------------------- embedding


def _embedding(bench: Bench, count: int) -> list[Measurement]:
    """Texts of a file into a file, and the same texts through the model in a bare loop."""
    text = "".join(corpus.chinese(count * TEXT))
    texts = [text[start : start + TEXT] for start in range(0, count * TEXT, TEXT)]
    (bench.documents / "texts.jsonl").write_bytes(b"".join(orjson.dumps({"text": one}) + b"\n" for one in texts))
    ratios, rates = [], []
    for number in range(3):
        took = asyncio.run(_embed(bench, f"outputs/{number}.npy"))
        began = time.monotonic()
        tokens = [bench.embedder.count_tokens(one) for one in texts]
        for batch in batches(tokens, budget=bench.embedder.batch_tokens):
            bench.embedder.embed([texts[index] for index in batch])
        bare = time.monotonic() - began
        ratios.append(bare / took)
        rates.append(count / took)
        print(f"      {count / took:.0f} texts/s, bare loop {count / bare:.0f}", flush=True)
    return [
        Measurement(
            metric="embedding_generation beside a bare loop",
            value=float(np.median(ratios)) * 100,
            unit="%",
            target=90,
            better="higher",
            baseline=100,
            how=f"{count} texts of {TEXT} characters, in turns, median of 3; ours from a file of JSON lines into a .npy, "
            f"{np.median(rates):.0f} texts/s; theirs: the same batches through the same loaded model, from memory",
        )
    ]


async def _embed(bench: Bench, output: str) -> float:
    from job_runner.embedding import EmbeddingGeneration
    from job_runner.ledger import Ledger
    from job_runner.progress import SilentProgress
    from job_runner.work import Work

    embed = task(bench, "embedding_generation", inputPath="texts.jsonl", outputPath=output)
    settings = bench.settings()
    ledger = Ledger(settings.postgres_url.get_secret_value())
    await ledger.warm_up()
    work = Work(
        embed,
        uid=uuid.UUID(embed.metadata.uid),
        created_at=NOON,
        settings=settings,
        ledger=ledger,
        progress=SilentProgress(),
        make_embedder=lambda name, *, threads: bench.embedder,
    )
    try:
        began = time.monotonic()
        await EmbeddingGeneration(work, embedder=bench.embedder).run()
        return time.monotonic() - began
    finally:
        await ledger.aclose()
