"""What a check of a knowledge base finds on real stores, and the ledger restored from them."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from job_runner.consistency import Deviation, Report, verify
from job_runner.index import Generation, Label, Row, Stored
from job_runner.ledger import Ledger, RebuiltDocument
from job_runner.rebuild import choose, rebuild, versions
from task_contract.errors import InvalidTask, ModelMismatch
from task_contract.lifecycle import ExitCode
from task_contract.models import ProcessingTask
from task_contract.names import chunk_id, digest
from tests.support.runner_lab import NAMESPACE, HashEmbedder, Lab, Reached, run_watched

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


@pytest.fixture
def own(lab: Lab) -> Lab:
    """A lab with a knowledge base of its own."""
    lab.take_own_knowledge_base()
    return lab


async def publish(lab: Lab, file: str, count: int, *, at: int = 0, mark: str = "") -> None:
    lab.write([f"{file} {mark} sentence {number}" for number in range(count)], file)
    outcome, code = await lab.run(lab.task(file, at=at))
    assert code is ExitCode.SUCCEEDED, outcome


async def checked(lab: Lab) -> Report:
    ledger = Ledger(lab.environment["TASKS_POSTGRES_URL"])
    try:
        return await verify(Generation(NAMESPACE, lab.kb_id, 1), ledger=ledger, stores=lab.stores)
    finally:
        await ledger.aclose()


async def state(lab: Lab) -> tuple[Any, ...]:
    """Return (state, documents, chunks, missing, extra) of the knowledge base."""
    found = await lab.fetch(
        "SELECT ROW(state, documents, chunks, missing, extra)::text FROM knowledge_base_states "
        "WHERE namespace = $1 AND kb_id = $2",
        NAMESPACE,
        lab.kb_id,
    )
    name, *numbers = found.strip("()").split(",")
    return name, *map(int, numbers)


async def generations(lab: Lab) -> str:
    found: str = await lab.fetch(
        "SELECT string_agg(ROW(generation, model_fingerprint, dimension)::text, ' ') FROM generations "
        "WHERE namespace = $1 AND kb_id = $2",
        NAMESPACE,
        lab.kb_id,
    )
    return found


async def stray(lab: Lab, document: str, version: int, *, count: int = 2) -> None:
    """Write rows that no task knows of into both stores, as a pod does that was given up for dead."""
    vectors: Any = lab.stores.vectors
    texts: Any = lab.stores.texts
    known = lab.document_id(document)
    [hit, *_] = (await texts._client.search(index=texts._name, size=1))["hits"]["hits"]
    source = {name: value for name, value in hit["_source"].items() if name != "metadata_pairs"}

    rows = [
        replace(
            Row(id="", **source),
            id=chunk_id(namespace=NAMESPACE, kb_id=lab.kb_id, document_id=known, version=version, ordinal=ordinal),
            document_id=known,
            version=version,
            ordinal=ordinal,
            chunk_count=9,
        )
        for ordinal in range(count)
    ]
    await vectors.write(rows, HashEmbedder().embed([row.text for row in rows]))
    await texts.write(rows)


async def test_nothing_is_found_where_all_is_well(own: Lab) -> None:
    await publish(own, "a.txt", 5)
    await publish(own, "b.txt", 3)
    await publish(own, "a.txt", 4, at=1, mark="new")
    assert await checked(own) == Report(documents=2, chunks=7, deviations=())
    assert await state(own) == ("ready", 2, 7, 0, 0)
    assert await generations(own) == f"(1,{HashEmbedder.fingerprint},{HashEmbedder.dimension})"


async def test_what_is_missing_and_what_is_too_much_is_found_entered_and_repaired(own: Lab) -> None:
    await publish(own, "a.txt", 5)
    await publish(own, "b.txt", 3)
    name = own.document_id("a.txt")
    ids = sorted(await own.stores.vectors.stored(name, 1))
    await own.stores.vectors.delete(ids[:2])
    await own.stores.texts.delete(ids[1:4])
    await stray(own, "b.txt", 7)
    await stray(own, "unknown.txt", 1, count=1)
    other, unknown = own.document_id("b.txt"), own.document_id("unknown.txt")
    report = await checked(own)
    assert {one.document_id: one for one in report.deviations} == {
        name: Deviation(name, 1, milvus_missing=2, elasticsearch_missing=3),
        other: Deviation(other, 1, milvus_extra=2, elasticsearch_extra=2),
        unknown: Deviation(unknown, None, milvus_extra=1, elasticsearch_extra=1),
    }
    assert "Milvus misses 2 chunks and has 0 rows too many, Elasticsearch misses 3 and has 0" in report.as_text()
    assert await state(own) == ("degraded", 2, 8, 5, 4)

    # The same bytes again: the lost chunks are written anew, and what the check had found counts no more.
    outcome, _ = await own.run(own.task("a.txt", at=1))
    assert outcome.reason == "Completed"
    assert await state(own) == ("ready", 2, 8, 0, 4)
    assert {one.document_id for one in (await checked(own)).deviations} == {other, unknown}


async def test_a_task_that_publishes_during_the_check_is_no_deviation(own: Lab) -> None:
    await publish(own, "a.txt", 5)
    own.write([f"newer {number}" for number in range(4)])
    seen: list[tuple[Any, ...]] = []

    async def look() -> None:
        assert await checked(own) == Report(documents=1, chunks=5, deviations=())
        seen.append(await state(own))

    await run_watched(own.task(at=1), own.settings(), own.embedder, Reached("ledger.commit 1 before", look))
    assert seen == [("indexing", 1, 5, 0, 0)]
    assert await checked(own) == Report(documents=1, chunks=4, deviations=())
    assert await state(own) == ("ready", 1, 4, 0, 0)


async def documents(lab: Lab) -> list[dict[str, Any]]:
    connection = await asyncpg.connect(lab.environment["TASKS_POSTGRES_URL"])
    try:
        rows = await connection.fetch(
            "SELECT document_id, last_version, published_version, content_hash, chunk_count, published_task_uid "
            "FROM documents WHERE namespace = $1 AND kb_id = $2 ORDER BY document_id",
            NAMESPACE,
            lab.kb_id,
        )
        return [dict(row) for row in rows]
    finally:
        await connection.close()


async def forget(lab: Lab) -> None:
    """Lose the ledger of the knowledge base."""
    connection = await asyncpg.connect(lab.environment["TASKS_POSTGRES_URL"])
    try:
        for table in ("document_versions", "documents", "generations", "knowledge_bases"):
            await connection.execute(f"DELETE FROM {table} WHERE namespace = $1 AND kb_id = $2", NAMESPACE, lab.kb_id)
    finally:
        await connection.close()


async def test_a_lost_ledger_is_restored_from_the_stores(own: Lab) -> None:
    await publish(own, "a.txt", 5)
    await publish(own, "b.txt", 3)
    await publish(own, "a.txt", 4, at=1, mark="new")
    before = await documents(own)
    await stray(own, "a.txt", 3)  # of 9 chunks two: a task died over it
    await stray(own, "c.txt", 1)
    await forget(own)

    def rebuilt(*arguments: str) -> tuple[int, str, str]:
        process = own.command("job_runner", "rebuild-ledger", "--namespace", NAMESPACE, *arguments)
        output, errors = process.communicate(timeout=120)
        return process.returncode, output, errors

    lost = f"  {own.document_id('c.txt')}: not whole in both stores; create its task again"
    code, output, errors = await asyncio.to_thread(rebuilt, "--kb-id", own.kb_id, "--dry-run")
    assert (code, output) == (0, f"{NAMESPACE}/{own.kb_id}: 2 documents are whole in both stores, 0 entered\n{lost}\n"), (
        errors
    )
    assert await documents(own) == []
    code, output, errors = await asyncio.to_thread(rebuilt)  # all knowledge bases of the namespace
    assert f"{NAMESPACE}/{own.kb_id}: 2 documents are whole in both stores, 2 entered\n{lost}\n" in output, errors

    after = {row["document_id"]: row for row in await documents(own)}
    assert after.pop(own.document_id("c.txt"))["published_version"] is None
    assert after.pop(own.document_id("a.txt")) == before[0] | {"last_version": 3}
    assert [*after.values()] == before[1:]
    assert (await state(own))[:3] == ("ready", 2, 7)
    assert await generations(own) == f"(1,{HashEmbedder.fingerprint},{HashEmbedder.dimension})"

    # It may run again, and tasks go on as if nothing had been lost: what is unchanged is seen, no number is given twice.
    code, output, errors = await asyncio.to_thread(rebuilt, "--kb-id", own.kb_id)
    assert "0 entered" in output, errors
    outcome, _ = await own.run(own.task("b.txt", at=5))
    assert outcome.reason == "Unchanged"
    await publish(own, "a.txt", 6, at=9, mark="newest")
    assert await own.versions("a.txt") == {4: (6, 6)}
    await publish(own, "c.txt", 2, at=9)
    assert await checked(own) == Report(documents=3, chunks=11, deviations=())


async def test_documents_of_a_restored_ledger_are_older_than_any_deletion(own: Lab) -> None:
    await publish(own, "a.txt", 5)
    await forget(own)
    ledger = Ledger(own.environment["TASKS_POSTGRES_URL"])
    label = Label(NAMESPACE, own.kb_id, 1, own.embedder.fingerprint, own.embedder.dimension)
    assert (await rebuild(label, ledger=ledger, stores=own.stores)).entered == 1
    await ledger.aclose()
    await publish(own, "b.txt", 3, at=9)  # so that the knowledge base stays, and its documents go one by one
    deletion = own.task("a.txt", at=5).manifest()
    deletion["spec"]["payload"] = {"action": "delete_knowledge_base", "confirm": own.kb_id}
    outcome, _ = await own.run(ProcessingTask.model_validate(deletion))
    assert outcome.reason == "Deleted", outcome
    assert (await own.versions("a.txt"), await own.versions("b.txt")) == ({}, {1: (3, 3)})
    assert await checked(own) == Report(documents=1, chunks=3, deviations=())


async def test_what_a_task_published_since_the_loss_stays(own: Lab) -> None:
    await publish(own, "a.txt", 5)
    await publish(own, "a.txt", 4, at=1, mark="new")
    await publish(own, "b.txt", 3)
    await forget(own)
    await publish(own, "a.txt", 6, at=2, mark="newest")  # as version 1, which is lower than what the stores have
    ledger = Ledger(own.environment["TASKS_POSTGRES_URL"])
    label = Label(NAMESPACE, own.kb_id, 1, own.embedder.fingerprint, own.embedder.dimension)
    assert (await rebuild(label, ledger=ledger, stores=own.stores)).entered == 1
    found = {row["document_id"]: (row["published_version"], row["last_version"]) for row in await documents(own)}
    assert found == {own.document_id("a.txt"): (1, 2), own.document_id("b.txt"): (1, 1)}
    await publish(own, "a.txt", 2, at=3, mark="last")
    assert await own.versions("a.txt") == {3: (2, 2)}

    for changed, error in ((replace(label, dimension=8), ModelMismatch), (replace(label, generation=2), InvalidTask)):
        with pytest.raises(error):
            await ledger.restore(changed, [])
    await ledger.aclose()


# ------------------------------------------------------------------------------------------- which version is published

LABEL = Label("test", "kb", 1, "model", 8)


def rows(document: str, version: int, ordinals: range, *, of: int = 0, content: str = "c") -> list[Stored]:
    return [
        Stored(
            id=chunk_id(namespace="test", kb_id="kb", document_id=document, version=version, ordinal=ordinal),
            document_id=document,
            version=version,
            ordinal=ordinal,
            content_hash=digest(content),
            task_uid=str(uuid.UUID(int=version)),
            chunk_count=of,
        )
        for ordinal in ordinals
    ]


def swapped(found: list[Stored]) -> list[Stored]:
    return [replace(row, id=digest(row.id)) for row in found]


WHOLE = rows("a", 1, range(3), of=3)
CASES: list[tuple[str, list[Stored], list[Stored], int | None, int]] = [
    ("whole in both", WHOLE, WHOLE, 1, 1),
    ("in one alone", WHOLE, [], None, 1),
    ("one store lacks a chunk", WHOLE, WHOLE[:2], None, 1),
    ("both lack the same chunk", WHOLE[:2], WHOLE[:2], None, 1),
    ("two whole versions", WHOLE + rows("a", 4, range(2), of=2), WHOLE + rows("a", 4, range(2), of=2), 4, 4),
    ("a newer one is not whole", WHOLE + rows("a", 2, range(2), of=3), WHOLE + rows("a", 2, range(3), of=3), 1, 2),
    ("rows of another knowledge base", swapped(WHOLE), swapped(WHOLE), None, 1),
    ("contents differ between the stores", WHOLE, rows("a", 1, range(3), of=3, content="d"), None, 1),
    ("contents differ within a store", WHOLE[:2] + rows("a", 1, range(2, 3), of=3, content="d"), WHOLE, None, 1),
    ("of a release without counts", rows("a", 1, range(3)), rows("a", 1, range(3)), 1, 1),
    ("of a release without counts, with a hole", rows("a", 1, range(1, 3)), rows("a", 1, range(1, 3)), None, 1),
]


@pytest.mark.parametrize(
    ("milvus", "elasticsearch", "published", "last"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
async def test_the_highest_version_that_both_stores_have_whole_is_published(
    milvus: list[Stored], elasticsearch: list[Stored], published: int | None, last: int
) -> None:
    async def pages(found: list[Stored]) -> AsyncIterator[list[Stored]]:
        for row in found:
            yield [row]

    [document] = choose(await versions(pages(milvus), LABEL.names), await versions(pages(elasticsearch), LABEL.names))
    assert isinstance(document, RebuiltDocument)
    assert document.last_version == last
    assert (None if document.published is None else document.published.version) == published
    if document.published is not None:
        assert document.published.chunk_count == len([row for row in milvus if row.version == published])
        assert document.task_uid == str(uuid.UUID(int=document.published.version))
