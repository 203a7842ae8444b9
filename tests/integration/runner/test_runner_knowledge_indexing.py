"""Rebuild, gate, switch, rollback, repair and purge of a knowledge base, on real stores."""

import json
import uuid
from dataclasses import replace
from typing import Any

import pytest

from job_runner.consistency import verify
from job_runner.index import Generation, Label
from job_runner.ledger import Ledger
from job_runner.rebuild import serving
from job_runner.stores import labelled_opener, opener
from job_runner.sweep import sweep
from task_contract.lifecycle import ExitCode
from task_contract.messages import AttemptOutcome
from task_contract.models import ProcessingTask, Result
from tests.support.runner_lab import NAMESPACE, Lab

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

BOTH: dict[str, Any] = {"embedding_models": ("other",)}
"""Settings of a runner with two models."""


@pytest.fixture
def own(lab: Lab) -> Lab:
    """A lab with a knowledge base of its own."""
    lab.take_own_knowledge_base()
    return lab


async def publish(lab: Lab, file: str, count: int, *, at: int = 0, mark: str = "", **settings: Any) -> Result:
    lab.write([f"{file} {mark} sentence {number}" for number in range(count)], file)
    return await succeeded(lab, lab.task(file, at=at), **settings)


async def succeeded(lab: Lab, task: ProcessingTask, **settings: Any) -> Result:
    outcome, code = await lab.run(task, **settings)
    assert code is ExitCode.SUCCEEDED, outcome
    assert outcome.result is not None
    return outcome.result


async def failed(lab: Lab, task: ProcessingTask, **settings: Any) -> AttemptOutcome:
    outcome, code = await lab.run(task, **settings)
    assert code is not ExitCode.SUCCEEDED, outcome
    return outcome


async def consistent(lab: Lab, number: int, *, dimension: int = 16) -> tuple[int, int]:
    """Return (documents, chunks) of a generation, which both stores hold exactly."""
    ledger = Ledger(lab.environment["TASKS_POSTGRES_URL"])
    stores = lab.generation(number, dimension=dimension)
    try:
        await stores.open_existing()
        report = await verify(Generation(NAMESPACE, lab.kb_id, number), ledger=ledger, stores=stores)
    finally:
        await ledger.aclose()
        await stores.aclose()
    assert report.consistent, report.as_text()
    return report.documents, report.chunks


async def aliases(lab: Lab) -> tuple[int | None, int | None]:
    """Return the generations to which the aliases of Milvus and Elasticsearch lead."""
    found: list[int | None] = [None, None]
    for number in range(1, 6):
        stores = lab.generation(number)
        for place, store in enumerate((stores.vectors, stores.texts)):
            if await store.serves():
                found[place] = number
        await stores.aclose()
    return found[0], found[1]


async def generations(lab: Lab) -> dict[int, str]:
    found = await lab.fetch(
        "SELECT json_object_agg(generation, state) FROM generations WHERE namespace = $1 AND kb_id = $2",
        NAMESPACE,
        lab.kb_id,
    )
    return {int(number): state for number, state in json.loads(found).items()}


async def swept(lab: Lab) -> None:
    ledger = Ledger(lab.environment["TASKS_POSTGRES_URL"])
    try:
        await sweep(NAMESPACE, ledger=ledger, open_stores=opener(lab.settings(), dimension=0))
    finally:
        await ledger.aclose()


async def test_a_rebuild_with_the_same_model_and_splitter_computes_nothing(own: Lab) -> None:
    await publish(own, "a.txt", 5)
    await publish(own, "b.txt", 3)
    await succeeded(own, own.deletion("b.txt", at=1))
    await publish(own, "c.txt", 300)
    before = own.embedded
    result = await succeeded(own, own.indexing(rebuildIndex=True))
    assert own.embedded - before <= 100, "the questions of the gate alone, asked of both"
    assert (result.generation, result.documents, result.chunks) == (2, 2, 305)
    assert (result.embedded, result.reused) == (0, 305)
    assert (result.recall_before, result.recall_after) == (1.0, 1.0)
    assert await consistent(own, 2) == (2, 305)
    assert await aliases(own) == (2, 2)
    assert await generations(own) == {1: "retained", 2: "serving"}
    # Tasks go on in the new generation, and find what is unchanged.
    before = own.embedded
    assert (await succeeded(own, own.task("a.txt", at=9))).reused == 5
    assert own.embedded == before
    assert (await publish(own, "d.txt", 2, at=9)).chunks == 2
    assert await consistent(own, 2) == (3, 307)


async def test_a_rebuild_with_another_model_or_splitter_is_as_if_the_files_were_processed_anew(own: Lab) -> None:
    await publish(own, "a.txt", 7)
    await publish(own, "b.txt", 3)
    task = own.indexing(rebuildIndex=True, embeddingModel="other", chunkSize=200, chunkOverlap=0)
    result = await succeeded(own, task, **BOTH)
    assert (result.generation, result.documents) == (2, 2)
    assert result.embedded == result.chunks == 6
    assert await consistent(own, 2, dimension=24) == (2, 6)
    # The same file, split so and embedded so, is found unchanged: text, hash, offsets and all.
    unchanged, _ = await own.run(own.task("a.txt", at=9, chunkSize=200), **BOTH)
    assert unchanged.reason == "Unchanged"
    # A task that names no model takes that of the knowledge base; a runner that has not got it says so.
    assert (await publish(own, "c.txt", 2, at=9, **BOTH)).chunks == 2
    assert (await failed(own, own.task("c.txt", at=10))).reason == "ModelMismatch"


async def test_a_rollback_brings_what_was_published_since(own: Lab) -> None:
    await publish(own, "a.txt", 4)
    await publish(own, "b.txt", 3)
    assert (await failed(own, own.indexing(action="rollback"))).reason == "NothingToRollBack"
    await succeeded(own, own.indexing(rebuildIndex=True, embeddingModel="other"), **BOTH)
    await publish(own, "c.txt", 2, at=1, **BOTH)
    await publish(own, "a.txt", 6, at=1, mark="new", **BOTH)
    await succeeded(own, own.deletion("b.txt", at=1))
    before = own.embedded
    result = await succeeded(own, own.indexing(action="rollback"), **BOTH)
    assert (result.generation, result.documents, result.chunks, result.embedded) == (1, 2, 8, 8)
    assert own.embedded - before == 8
    assert await consistent(own, 1) == (2, 8)
    assert await aliases(own) == (1, 1)
    assert await generations(own) == {1: "serving", 2: "retained"}
    await publish(own, "d.txt", 2, at=9, **BOTH)
    assert await consistent(own, 1) == (3, 10)


async def test_a_generation_that_finds_less_does_not_serve(own: Lab) -> None:
    await publish(own, "a.txt", 4)
    lines = [
        {"question": f"a.txt sentence {number}", "documentId": own.document_id("a.txt"), "contains": "." * 70}
        for number in range(3)
    ]
    (own.documents / "golden.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (own.documents / "bad.jsonl").write_text('{"question": "x"}\n')
    bad = await failed(own, own.indexing(rebuildIndex=True, goldenPath="bad.jsonl"))
    assert bad.reason == "InvalidTask"
    assert bad.error is not None
    assert "goldenPath bad.jsonl: cannot read line 1" in bad.error.message
    # No chunk of the new size holds a piece that answers.
    cut: dict[str, Any] = {"rebuildIndex": True, "goldenPath": "golden.jsonl", "chunkSize": 50, "chunkOverlap": 0}
    less = await failed(own, own.indexing(**cut))
    assert less.reason == "RecallDropped"
    assert less.error is not None
    assert "generation 1 answers 100.0%" in less.error.message
    assert "the new one 0.0%" in less.error.message
    assert await generations(own) == {1: "serving"}
    assert await aliases(own) == (1, 1)
    await swept(own)
    stores = own.generation(2)
    assert not await stores.vectors.exists()
    assert not await stores.texts.exists()
    await stores.aclose()
    result = await succeeded(own, own.indexing(**cut, maxRecallDrop=100))
    assert (result.generation, result.recall_before, result.recall_after) == (3, 1.0, 0.0)
    assert await consistent(own, 3) == (1, 8)


async def test_what_a_task_left_half_done_is_cleared_up(own: Lab) -> None:
    await publish(own, "a.txt", 4)
    await succeeded(own, own.indexing(rebuildIndex=True, keepGenerationSeconds=0))
    await swept(own)
    assert await generations(own) == {2: "serving"}
    stores = own.generation(1)
    assert not await stores.vectors.exists()
    assert not await stores.texts.exists()
    await stores.aclose()
    assert (await failed(own, own.indexing(action="rollback"))).reason == "NothingToRollBack"
    assert (await succeeded(own, own.indexing(rebuildIndex=True))).generation == 3


async def test_a_purge_takes_all_generations(own: Lab) -> None:
    await publish(own, "a.txt", 4)
    await succeeded(own, own.indexing(rebuildIndex=True))
    wrong = await failed(own, own.indexing(action="purge", confirm="other", at=1))
    assert wrong.reason == "InvalidTask"
    result = await succeeded(own, own.indexing(action="purge", confirm=own.kb_id, at=1))
    assert (result.documents, result.milvus_count, result.elasticsearch_count) == (1, 0, 0)
    for number in (1, 2):
        stores = own.generation(number)
        assert not await stores.vectors.exists()
        assert not await stores.texts.exists()
        await stores.aclose()
    assert (await failed(own, own.indexing(rebuildIndex=True, at=2))).reason == "KnowledgeBaseNotFound"
    assert (await succeeded(own, own.indexing(rebuildIndex=True, at=0))).documents == 0, "superseded by the purge"
    await publish(own, "a.txt", 4, at=3)
    assert await aliases(own) == (3, 3), "a number is given once"


async def test_one_task_at_a_time_works_on_a_knowledge_base(own: Lab) -> None:
    await publish(own, "a.txt", 4)
    ledger = Ledger(own.environment["TASKS_POSTGRES_URL"])
    task = own.indexing(rebuildIndex=True)
    other = uuid.uuid4()
    created = task.metadata.creation_timestamp
    assert created is not None
    try:
        lease = await ledger.acquire(
            namespace=NAMESPACE, kb_id=own.kb_id, task_uid=other, task_created_at=created, holder="x"
        )
        assert lease is not None
        busy = await failed(own, task)
        assert (busy.reason, str(other) in (busy.error.message if busy.error else "")) == ("KnowledgeBaseBusy", True)
        await ledger.release(lease)
        await succeeded(own, task)
    finally:
        await ledger.aclose()


async def rows_of(lab: Lab, document: str) -> list[str]:
    """Return the ids of version 1 of a document, in order."""
    generation = Generation(NAMESPACE, lab.kb_id, 1)
    return [generation.chunk_id(lab.document_id(document), 1, ordinal) for ordinal in range(9)]


async def test_a_repair_makes_ledger_and_stores_alike_again(own: Lab) -> None:
    for file, count in (("a.txt", 5), ("b.txt", 3), ("c.txt", 4)):
        await publish(own, file, count)
    ids = await rows_of(own, "a.txt")
    stores = own.generation(1)
    try:
        await stores.open_existing()
        nothing = await succeeded(own, own.indexing(action="repair"))
        assert (nothing.repaired, nothing.documents, nothing.chunks) == (0, 3, 12)
        # Each store has lost other rows; one has rows of a version that nobody knows; the ledger has lost a document.
        await stores.texts.delete(ids[:2])
        await stores.vectors.delete(ids[3:5])
        known = [row async for part in stores.texts.read(own.document_id("b.txt"), 1) for row in part]
        strays = [replace(row, id=f"{row.ordinal}" * 32, version=7) for row in known]
        await stores.texts.write(strays)
        await own.fetch("DELETE FROM documents WHERE kb_id = $1 AND document_id = $2", own.kb_id, own.document_id("c.txt"))
        before = own.embedded
        result = await succeeded(own, own.indexing(action="repair"))
        assert (result.repaired, result.documents, result.chunks) == (2 + 2 + 3 + 1, 3, 12)
        assert (result.embedded, own.embedded - before) == (2, 2)
        assert await consistent(own, 1) == (3, 12)
        # The next task of that document does not take the number of rows that were removed.
        assert (await publish(own, "b.txt", 3, at=1, mark="new")).version == 8
        # What both have lost is named, and everything else is repaired all the same.
        await stores.texts.delete(ids[:3])
        await stores.vectors.delete(ids[:1])
        lost = await failed(own, own.indexing(action="repair"))
        assert lost.reason == "ChunksLost"
        assert lost.error is not None
        assert own.document_id("a.txt") in lost.error.message
        state = "SELECT state || missing FROM knowledge_base_states WHERE kb_id = $1"
        assert await own.fetch(state, own.kb_id) == "degraded2", "one chunk in each store"
        assert len(await stores.texts.stored(own.document_id("a.txt"), 1)) == 4
        assert (await succeeded(own, own.task("a.txt", at=2))).chunks == 5
        assert await own.fetch(state, own.kb_id) == "ready0"
    finally:
        await stores.aclose()


async def test_a_repair_leads_aliases_back(own: Lab) -> None:
    await publish(own, "a.txt", 2)
    await succeeded(own, own.indexing(rebuildIndex=True))
    old = own.generation(1)
    await old.vectors.serve()
    await old.aclose()
    assert await aliases(own) == (1, 2)
    assert (await succeeded(own, own.indexing(action="repair"))).repaired == 1
    assert await aliases(own) == (2, 2)


async def test_a_rebuild_with_an_analysis_writes_to_the_new_generation(own: Lab) -> None:
    await publish(own, "a.txt", 3)
    task = own.indexing(rebuildIndex=True, enhancementType="semantic_analysis")
    result = await succeeded(own, task)
    assert (result.generation, result.enhanced, result.chunks) == (2, 3, 3)
    assert (await succeeded(own, own.indexing(enhancementType="semantic_analysis"))).enhanced == 0
    # Rows are copied with what an analysis has written to them.
    again = await succeeded(own, own.indexing(rebuildIndex=True, enhancementType="semantic_analysis"))
    assert (again.generation, again.enhanced) == (3, 0)


async def test_a_lost_ledger_is_restored_from_the_generation_that_serves(own: Lab) -> None:
    await publish(own, "a.txt", 2)
    await succeeded(own, own.indexing(rebuildIndex=True))
    found = [Label(NAMESPACE, own.kb_id, number, "hash-1", 16) for number in (2, 1)]
    open_labelled = labelled_opener(own.settings())
    assert await serving(found, open_labelled) == found[:1]
    old = own.generation(1)
    await old.texts.serve()
    await old.aclose()
    assert await serving(found, open_labelled) == found[1:]
