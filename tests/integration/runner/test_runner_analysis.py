"""A semantic analysis on real stores: what it writes, what it leaves alone, and tasks that publish and delete beside it."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import psutil
import pytest

from job_runner.analysis import Duplicates, _compared, analyze
from job_runner.index import FIELDS, READ_AT_ONCE, Filters, Generation, Row
from job_runner.ledger import Ledger
from job_runner.progress import SilentProgress
from job_runner.stores import Stores
from job_runner.work import Work
from task_contract.errors import Fenced, InvalidTask
from task_contract.lifecycle import ExitCode
from tests.support.memory_stores import MemoryTextIndex
from tests.support.runner_lab import NAMESPACE, Lab, Reached, Watched

pytestmark = pytest.mark.integration

ANALYZED = ("language", "keywords", "summary", "duplicate_of", "analysis")


@pytest.fixture
async def own(lab: Lab) -> Lab:
    """A knowledge base of this test alone."""
    lab.take_own_knowledge_base()
    return lab


async def run_analysis(lab: Lab, *, reached: Reached | None = None, uid: uuid.UUID | None = None) -> int:
    """Analyze the knowledge base; each call to stores and ledger is watched."""

    async def never() -> None:
        raise AssertionError("no point has the number 0")

    reached = reached or Reached("none 0 before", never)
    ledger = Ledger(lab.settings().postgres_url.get_secret_value())
    task = lab.task(uid=uid)
    work = Work(
        task,
        uid=uuid.UUID(str(task.metadata.uid)),
        created_at=task.metadata.creation_timestamp,  # type: ignore[arg-type]  # the lab sets it
        settings=lab.settings(),
        ledger=ledger,
        progress=SilentProgress(),
        make_embedder=lambda *_, **__: lab.embedder,
    )
    await lab.stores.ensure()
    stores = Stores(
        vectors=WatchedStore(lab.stores.vectors, "vectors", reached), texts=WatchedStore(lab.stores.texts, "texts", reached)
    )
    try:
        return await analyze(work, Generation(NAMESPACE, lab.kb_id, 1), stores)
    finally:
        await ledger.aclose()


class WatchedStore(Watched):
    """Reading is by windows: it is not watched."""

    def read(self, document_id: str, version: int) -> Any:
        return self._inner.read(document_id, version)

    def read_with_vectors(self, document_id: str, version: int) -> Any:
        return self._inner.read_with_vectors(document_id, version)


async def rows(lab: Lab, document: str = "a.txt", *, version: int = 1) -> list[Row]:
    """Return the rows of a version: alike in both stores but for their vectors, which are those of their texts."""
    document_id = lab.document_id(document)
    texts = [row async for part in lab.stores.texts.read(document_id, version) for row in part]
    vectors = [pair async for pair in lab.stores.vectors.read_with_vectors(document_id, version)]
    assert [row for part, _ in vectors for row in part] == texts
    for part, found in vectors:
        expected = lab.embedder.embed([row.text for row in part])
        assert abs(found - expected).max() < 1e-6
    return texts


async def published(lab: Lab, *sentences: str, document: str = "a.txt", at: int = 0) -> None:
    lab.write(sentences, document)
    outcome, code = await lab.run(lab.task(document, at=at))
    assert code is ExitCode.SUCCEEDED, outcome


SENTENCES = (
    "The operator marks the task as failed when the retry limit is reached and keeps its message",
    "柴油发电机在断电后九十秒内启动，值班员每周检查柴油发电机并记录燃油的油位",
    "Backups of the ledger run each night at three and a restore drill follows on each Tuesday",
)


async def test_every_row_gets_its_columns_and_nothing_else_of_it_changes(own: Lab) -> None:
    await published(own, *SENTENCES)
    await published(own, SENTENCES[0], document="b.txt")
    before = await rows(own)
    assert await run_analysis(own) == 4
    after = await rows(own)
    assert [row.language for row in after] == ["en", "zh", "en"]
    assert "retry limit" in after[0].keywords
    assert {"柴油", "发电机"} <= set(after[1].keywords)
    assert after[2].summary.startswith("Backups of the ledger run each night")
    untouched = {name: getattr(before[0], name) for name in ANALYZED}
    assert [replace(row, **untouched) for row in after] == [replace(row, **untouched) for row in before]
    assert [row.duplicate_of for row in (*after, *await rows(own, "b.txt"))] == ["", "", "", after[0].id]

    async def found(filters: Filters) -> set[str]:
        hits = await own.stores.vectors.search(own.embedder.embed_query("x"), limit=9, filters=filters)
        words = await own.stores.texts.search("operator Backups 柴油", limit=9, filters=filters)
        assert {hit.id for hit in hits} == {hit.id for hit in words}
        return {hit.id for hit in hits}

    assert await found(Filters(without_duplicates=True)) == {row.id for row in after}
    assert await found(Filters(keywords=("柴油",))) == {after[1].id}
    assert await run_analysis(own) == 0, "nothing has changed"


async def test_only_what_changed_is_written(own: Lab) -> None:
    await published(own, SENTENCES[0])
    await published(own, *SENTENCES, document="b.txt")
    await run_analysis(own)
    first = (await rows(own))[0].id
    assert [row.duplicate_of for row in await rows(own, "b.txt")] == [first, "", ""]
    await published(own, SENTENCES[0], "Another sentence about something that nobody has said before in here", at=1)
    assert await run_analysis(own) == 3, "two new rows, and the one that repeats a row that has another id now"
    new = await rows(own, version=2)
    assert [row.duplicate_of for row in await rows(own, "b.txt")] == [new[0].id, "", ""]
    _, code = await own.run(own.deletion(at=2))
    assert code is ExitCode.SUCCEEDED
    assert await run_analysis(own) == 1, "what was repeated has gone"
    assert [row.duplicate_of for row in await rows(own, "b.txt")] == ["", "", ""]


POINTS = ("texts.write 1 before", "texts.write 1 after", "vectors.write 1 before", "vectors.write 1 after")


class Killed(Exception):
    pass


@pytest.mark.parametrize("point", POINTS)
async def test_killed_anywhere_the_next_run_does_the_rest(own: Lab, point: str) -> None:
    await published(own, *SENTENCES)

    async def kill() -> None:
        raise Killed

    with pytest.raises(Killed):
        await run_analysis(own, reached=Reached(point, kill))
    await run_analysis(own)
    assert all(row.analysis for row in await rows(own))
    assert await run_analysis(own) == 0


@pytest.mark.parametrize(
    ("action", "point"),
    [
        *(("publish", point) for point in ("ledger", *POINTS)),
        ("delete", "vectors.write 1 before"),
        ("delete the knowledge base", "ledger"),
        ("delete the knowledge base", "vectors.write 1 before"),
    ],
)
async def test_no_row_comes_back_after_its_removal(own: Lab, point: str, action: str) -> None:
    """A task that publishes or deletes comes in at each point of a write; afterwards only what it left is there."""
    await published(own, *SENTENCES)
    started: list[asyncio.Task[Any]] = []

    async def task() -> None:
        if action == "publish":
            await published(own, "Another text altogether", at=10)
        else:
            deletion = own.deletion(at=10) if action == "delete" else own.knowledge_base_deletion(at=10)
            outcome, code = await own.run(deletion)
            assert code is ExitCode.SUCCEEDED, outcome

    async def meanwhile() -> None:
        started.append(asyncio.create_task(task()))
        with suppress(TimeoutError):  # it waits for the lock: within a second it could be done
            await asyncio.wait_for(asyncio.shield(started[0]), 1)

    if point == "ledger":
        await at_the_lock(own, meanwhile)
    else:
        await run_analysis(own, reached=Reached(point, meanwhile))
    await started[0]
    if action == "delete the knowledge base":
        assert (await own.stores.vectors.exists(), await own.stores.texts.exists()) == (False, False)
    else:
        assert await own.versions() == ({2: (1, 1)} if action == "publish" else {})


async def at_the_lock(lab: Lab, meanwhile: Callable[[], Awaitable[None]]) -> None:
    """Analyze with something done just before the ledger is asked to keep the version: the write is not made."""
    keeping = Ledger.keeping

    def late(self: Ledger, *arguments: Any, **named: Any) -> Any:
        class Late:
            async def __aenter__(self) -> bool:
                await meanwhile()
                return await inner.__aenter__()

            async def __aexit__(self, *exception: Any) -> None:
                await inner.__aexit__(*exception)

        inner = keeping(self, *arguments, **named)
        return Late()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "keeping", late)
        await run_analysis(lab)


async def test_readers_find_every_row_once_while_it_is_written(own: Lab) -> None:
    await published(own, *(f"Sentence {number} of a document that is read all the time" for number in range(60)))
    stop = asyncio.Event()
    seen: list[tuple[int, int]] = []

    async def read() -> None:
        while not stop.is_set():
            hits = await own.stores.vectors.search(own.embedder.embed_query("x"), limit=100)
            words = await own.stores.texts.search("Sentence", limit=100)
            seen.append((len({hit.id for hit in hits}), len({hit.id for hit in words})))
            assert seen[-1] == (len(hits), len(words)), "no row twice"

    reader = asyncio.create_task(read())
    try:
        for _ in range(5):
            assert await run_analysis(own) == 60
            await forget(own)
    finally:
        stop.set()
        await reader
    assert len(seen) > 5
    assert set(seen) == {(60, 60)}


async def forget(lab: Lab) -> None:
    """Make all rows ones that are to be analyzed."""
    async for part, vectors in lab.stores.vectors.read_with_vectors(lab.document_id("a.txt"), 1):
        await lab.stores.vectors.write([replace(row, analysis="") for row in part], vectors)


async def test_a_canceled_task_writes_nothing(own: Lab) -> None:
    await published(own, *SENTENCES)
    uid = uuid.uuid4()
    await own.fetch("INSERT INTO task_fences (task_uid, reason) VALUES ($1, 'test')", uid)
    with pytest.raises(Fenced, match="canceled"):
        await run_analysis(own, uid=uid)
    assert not any(row.analysis for row in await rows(own))


async def test_a_collection_of_an_earlier_release_is_to_be_rebuilt(own: Lab) -> None:
    await published(own, *SENTENCES)
    vectors: Any = own.stores.vectors
    await own.stores.ensure()
    vectors._columns = frozenset({"id", "text", "embedding"})
    with pytest.raises(InvalidTask, match="has no columns for it"):
        await run_analysis(own)
    vectors._columns = frozenset()


class Streamed:
    """A vector store whose rows are made while they are read: 20,000 take no memory of their own."""

    def __init__(self, count: int) -> None:
        self._words = np.random.default_rng(1).choice(list("abcdefghijklmnopqrstuvwxyz"), (5000, 7))
        self._count = count

    async def read(self, document_id: str, version: int) -> AsyncIterator[list[Row]]:
        drawn = np.random.default_rng(int(document_id))
        for start in range(0, self._count, READ_AT_ONCE):
            yield [
                self._row(document_id, ordinal, " ".join("".join(self._words[one]) for one in drawn.integers(0, 5000, 60)))
                for ordinal in range(start, min(start + READ_AT_ONCE, self._count))
            ]

    @staticmethod
    def _row(document_id: str, ordinal: int, text: str) -> Row:
        columns = dict.fromkeys(FIELDS, "") | {"document_id": document_id, "ordinal": ordinal, "text": text, "keywords": ()}
        return Row(**columns, id=f"{document_id}-{ordinal}")  # type: ignore[arg-type]  # what is not looked at is empty


def growth_mib() -> float:
    """MiB that 18,000 rows which repeat no other add to the process."""

    async def compare() -> float:
        process = psutil.Process()
        stores: Any = Stores(vectors=Streamed(500), texts=MemoryTextIndex())  # type: ignore[arg-type]  # it is read alone
        duplicates = Duplicates()
        resident = 0
        for number in range(40):
            await _compared(str(number), 1, stores, duplicates)
            if number == 3:
                resident = process.memory_info().rss
        return (process.memory_info().rss - resident) / 2**20

    return asyncio.run(compare())


def test_memory_grows_by_the_signatures_alone() -> None:
    """2 KB for each of 18,000 rows are 38 MB (measured 35 to 38); rows that were kept as well would make it 61.

    In a process of its own: what other tests left in this one would be counted.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as alone:
        assert alone.submit(growth_mib).result() < 55
