"""Documents and knowledge bases that are deleted, on real stores: nothing is left, whatever dies or meets meanwhile."""

import asyncio
import uuid
from typing import Any

import pytest

from job_runner.index import Generation
from job_runner.ledger import Ledger
from job_runner.search import search
from job_runner.stores import opener
from task_contract.errors import Fenced
from task_contract.lifecycle import ExitCode
from task_contract.messages import AttemptOutcome
from tests.support.runner_lab import NAMESPACE, HashEmbedder, Lab, Reached, rows_of, run_pipeline, run_watched

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


class Killed(Exception):
    """The process dies here: nothing that follows in it happens."""


async def die() -> None:
    raise Killed


def told(outcome: AttemptOutcome) -> tuple[str, int | None, int | None, int | None]:
    """Return (reason, documents, rows left in Milvus, rows left in Elasticsearch)."""
    assert outcome.result is not None, outcome
    return outcome.reason, outcome.result.documents, outcome.result.milvus_count, outcome.result.elasticsearch_count


async def rows(lab: Lab, document: str = "a.txt") -> tuple[int, int]:
    in_vectors, in_texts = await rows_of(lab.stores, lab.document_id(document))
    return len(in_vectors), len(in_texts)


async def chunks(lab: Lab, document: str = "a.txt") -> int | None:
    """Return how many chunks readers see."""
    found: int | None = await lab.fetch(
        "SELECT chunk_count FROM documents WHERE namespace = $1 AND kb_id = $2 AND document_id = $3",
        NAMESPACE,
        lab.kb_id,
        lab.document_id(document),
    )
    return found


async def asked(lab: Lab) -> int:
    """Return how many chunks a search finds in both stores."""
    ledger = Ledger(lab.environment["TASKS_POSTGRES_URL"])
    try:
        answers = await search(
            "One",
            namespace=NAMESPACE,
            kb_id=lab.kb_id,
            top_k=3,
            ledger=ledger,
            embedder=lab.embedder,
            open_stores=opener(lab.settings(), dimension=lab.embedder.dimension),
        )
    finally:
        await ledger.aclose()
    return len(answers.milvus) + len(answers.elasticsearch)


# ----------------------------------------------------------------------------------------------------------- documents


async def test_a_deleted_document_is_in_neither_store_and_its_neighbour_is(lab: Lab) -> None:
    lab.write(["One", "Two"])
    lab.write(["Three"], "b.txt")
    for task in (lab.task(at=0), lab.task("b.txt", at=0)):
        await lab.run(task)
    outcome, code = await lab.run(lab.deletion(at=1))
    assert (code, told(outcome)) == (ExitCode.SUCCEEDED, ("Deleted", 1, 0, 0))
    assert await rows(lab) == (0, 0)
    assert await rows(lab, "b.txt") == (1, 1)
    assert await chunks(lab) == 0
    again, code = await lab.run(lab.deletion(at=2))
    assert (code, told(again)) == (ExitCode.SUCCEEDED, ("Deleted", 0, 0, 0))


async def test_a_deletion_needs_neither_file_nor_model(lab: Lab) -> None:
    lab.write(["One"])
    await lab.run(lab.task(at=0))
    (lab.documents / "a.txt").unlink()
    task = lab.deletion(at=1)
    process = lab.command(
        "job_runner", "run", lab.task_file(task), environment={"TASKS_EMBEDDING_MODEL": "/models/that-is-not-there"}
    )
    output, errors = await asyncio.to_thread(process.communicate, timeout=60)
    assert process.returncode == 0, errors
    outcome = AttemptOutcome.parse(output)
    assert outcome is not None
    assert told(outcome) == ("Deleted", 1, 0, 0)
    assert await rows(lab) == (0, 0)


async def test_what_was_never_there_is_deleted_without_a_trace(lab: Lab) -> None:
    lab.take_own_knowledge_base()
    for task in (lab.deletion(at=0), lab.knowledge_base_deletion(at=1)):
        outcome, code = await lab.run(task)
        assert (code, told(outcome)) == (ExitCode.SUCCEEDED, ("Deleted", 0, 0, 0))
    assert not await lab.stores.vectors.exists()
    assert not await lab.stores.texts.exists()


async def test_the_first_document_after_a_deletion_still_decides_the_model(lab: Lab) -> None:
    lab.take_own_knowledge_base()
    await lab.run(lab.deletion(at=0))
    assert await asked(lab) == 0
    lab.write(["One"])
    outcome, _ = await lab.run(lab.task(at=1))
    assert outcome.reason == "Completed", outcome
    assert await asked(lab) == 2
    other = HashEmbedder()
    other.fingerprint = "hash-2"
    outcome, _ = await lab.run(lab.task(at=2), embedder=other)
    assert outcome.reason == "ModelMismatch"


@pytest.mark.parametrize(
    ("first", "then", "published"),
    [
        ("delete 10", "upsert 5", False),
        ("delete 5", "upsert 10", True),
        ("delete 5", "upsert 5", True),
        ("upsert 10", "delete 5", True),
        ("upsert 5", "delete 10", False),
        ("upsert 5", "delete 5", False),
    ],
)
async def test_of_a_deletion_and_an_upsert_the_newer_task_wins(lab: Lab, first: str, then: str, published: bool) -> None:
    lab.write(["One", "Two"])
    reasons = []
    for step in (first, then):
        action, at = step.split()
        make = lab.deletion if action == "delete" else lab.task
        outcome, code = await lab.run(make(at=int(at)))
        assert code is ExitCode.SUCCEEDED, outcome
        reasons.append(outcome.reason)
    assert await rows(lab) == ((2, 2) if published else (0, 0))
    assert await chunks(lab) == (2 if published else 0)
    superseded = int(first.split()[1]) > int(then.split()[1])
    assert (reasons[1] == "Superseded") is superseded, reasons


POINTS = ["vectors.write 1 after", "ledger.commit 1 before"]


@pytest.mark.parametrize("point", [*POINTS, "ledger.commit 1 after"])
@pytest.mark.parametrize("newer", [True, False])
async def test_a_deletion_that_comes_between(lab: Lab, point: str, newer: bool) -> None:
    """The upsert stands still, the deletion runs from begin to end, the upsert goes on."""
    lab.write(["Old"])
    await lab.run(lab.task(at=0))
    lab.write([f"Sentence {number}" for number in range(40)])

    async def delete() -> None:
        outcome, code = await lab.run(lab.deletion(at=20 if newer else 5))
        assert code is ExitCode.SUCCEEDED, outcome

    done = await run_watched(lab.task(at=10), lab.settings(verify_seconds=5), lab.embedder, Reached(point, delete))
    committed = point == "ledger.commit 1 after"
    assert done.reason == ("Superseded" if newer and not committed else "Completed")
    assert await rows(lab) == ((0, 0) if newer else (40, 40))
    assert await chunks(lab) == (0 if newer else 40)


@pytest.mark.parametrize("point", ["ledger.begin 1 after", "ledger.commit 1 before", "ledger.commit 1 after"])
@pytest.mark.parametrize("newer", [True, False])
async def test_an_upsert_that_comes_between(lab: Lab, point: str, newer: bool) -> None:
    lab.write(["Old"])
    await lab.run(lab.task(at=0))
    lab.write(["New", "and newer"])

    async def upsert() -> None:
        outcome, code = await lab.run(lab.task(at=20 if newer else 5))
        assert code is ExitCode.SUCCEEDED, outcome

    done = await run_watched(lab.deletion(at=10), lab.settings(), lab.embedder, Reached(point, upsert))
    committed = point == "ledger.commit 1 after"
    assert done.reason == ("Superseded" if newer and not committed else "Deleted")
    assert await rows(lab) == ((2, 2) if newer else (0, 0))
    assert await chunks(lab) == (2 if newer else 0)


@pytest.mark.parametrize(
    "point",
    [
        *("ledger.begin 1 after", "ledger.commit 1 before", "ledger.commit 1 after"),
        *("vectors.remove 1 before", "texts.count 1 before", "ledger.replaced_any 1 before"),
    ],
)
async def test_a_deletion_that_dies_anywhere_ends_as_one_that_does_not(lab: Lab, point: str) -> None:
    lab.write(["One", "Two"])
    await lab.run(lab.task(at=0))
    task = lab.deletion(at=1)
    with pytest.raises(Killed):
        await run_watched(task, lab.settings(), lab.embedder, Reached(point, die))
    outcome, code = await lab.run(task, attempt=2)
    assert (code, told(outcome)) == (ExitCode.SUCCEEDED, ("Deleted", 1, 0, 0))
    assert outcome.result is not None
    assert outcome.result.version == 2
    assert await rows(lab) == (0, 0)


async def test_a_canceled_deletion_deletes_nothing(lab: Lab) -> None:
    lab.write(["One"])
    await lab.run(lab.task(at=0))
    task = lab.deletion(at=1)

    async def cancel() -> None:
        await lab.fetch("INSERT INTO task_fences (task_uid, reason) VALUES ($1, 'Canceled')", uuid.UUID(task.metadata.uid))

    with pytest.raises(Fenced):
        await run_watched(task, lab.settings(), lab.embedder, Reached("ledger.commit 1 before", cancel))
    assert await rows(lab) == (1, 1)
    assert await chunks(lab) == 1


async def test_two_pods_of_one_deletion(lab: Lab) -> None:
    lab.write(["One"])
    await lab.run(lab.task(at=0))
    task = lab.deletion(at=1)
    ended = await asyncio.gather(lab.run(task), lab.run(task))
    assert {code for _, code in ended} <= {ExitCode.SUCCEEDED, ExitCode.FENCED}
    assert ExitCode.SUCCEEDED in {code for _, code in ended}
    assert await rows(lab) == (0, 0)


# ----------------------------------------------------------------------------------------------------- knowledge bases


async def tables(lab: Lab) -> tuple[int, ...]:
    """Return how many rows of a knowledge base the ledger has: itself, documents, versions."""
    return tuple(
        [
            await lab.fetch(f"SELECT count(*) FROM {table} WHERE namespace = $1 AND kb_id = $2", NAMESPACE, lab.kb_id)
            for table in ("knowledge_bases", "documents", "document_versions")
        ]
    )


async def filled(lab: Lab) -> None:
    """Publish two documents in a knowledge base of its own."""
    lab.take_own_knowledge_base()
    lab.write(["One", "Two"])
    lab.write(["Three"], "b.txt")
    for task in (lab.task(at=0), lab.task("b.txt", at=0)):
        assert (await lab.run(task))[0].reason == "Completed"


async def there(lab: Lab, generation: int) -> tuple[bool, bool]:
    stores = opener(lab.settings(), dimension=0)(Generation(NAMESPACE, lab.kb_id, generation))
    try:
        return await stores.vectors.exists(), await stores.texts.exists()
    finally:
        await stores.aclose()


async def test_a_deleted_knowledge_base_is_gone_from_stores_and_ledger_and_can_be_filled_again(lab: Lab) -> None:
    await filled(lab)
    outcome, code = await lab.run(lab.knowledge_base_deletion(at=10))
    assert (code, told(outcome)) == (ExitCode.SUCCEEDED, ("Deleted", 2, 0, 0))
    assert await there(lab, 1) == (False, False)
    assert await tables(lab) == (0, 0, 0)
    older, _ = await lab.run(lab.task(at=5))
    assert older.reason == "Superseded"
    assert await tables(lab) == (0, 0, 0)
    other = HashEmbedder()
    other.fingerprint = "hash-2"
    newer, _ = await lab.run(lab.task(at=20), embedder=other)
    assert newer.reason == "Completed", newer
    assert (await there(lab, 1), await there(lab, 2)) == ((False, False), (True, True))
    again, _ = await lab.run(lab.knowledge_base_deletion(at=30))
    assert told(again) == ("Deleted", 1, 0, 0)
    assert await there(lab, 2) == (False, False)


async def test_what_newer_tasks_have_published_outlives_the_deletion_of_the_knowledge_base(lab: Lab) -> None:
    await filled(lab)
    lab.write(["Newer", "and newer"], "b.txt")
    await lab.run(lab.task("b.txt", at=20))
    task = lab.knowledge_base_deletion(at=10)
    outcome, _ = await lab.run(task)
    assert told(outcome) == ("Deleted", 1, 0, 0)
    assert await rows(lab) == (0, 0)
    assert await rows(lab, "b.txt") == (2, 2)
    again, _ = await lab.run(task, attempt=2)
    assert told(again) == ("Deleted", 1, 0, 0)
    older, _ = await lab.run(lab.task(documentId="another", at=5))
    assert older.reason == "Superseded"
    lab.write(["Back"])
    assert (await lab.run(lab.task(at=11)))[0].reason == "Completed"
    assert await rows(lab) == (1, 1)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("newer", [True, False])
async def test_a_task_whose_knowledge_base_is_deleted_under_it(lab: Lab, point: str, newer: bool) -> None:
    await filled(lab)
    lab.write([f"Sentence {number}" for number in range(40)])

    async def delete() -> None:
        outcome, code = await lab.run(lab.knowledge_base_deletion(at=10))
        assert code is ExitCode.SUCCEEDED, outcome

    task = lab.task(at=20 if newer else 5)
    settings = lab.settings(verify_seconds=2)
    try:
        reason = (await run_watched(task, settings, lab.embedder, Reached(point, delete))).reason
    except Exception:  # noqa: BLE001 - the store refuses rows of a collection that is gone: another attempt is made
        reason = (await run_pipeline(task, lab.settings(), lab.embedder)).reason
    assert reason == ("Completed" if newer else "Superseded")
    assert await tables(lab) == ((1, 1, 1) if newer else (0, 0, 0))
    if newer:
        stores = opener(lab.settings(), dimension=lab.embedder.dimension)(Generation(NAMESPACE, lab.kb_id, 2))
        found = await rows_of(stores, lab.document_id("a.txt"))
        assert [len(part) for part in found] == [40, 40]
        assert len(await stores.texts.search("Sentence", limit=5)) == 5
        assert await stores.texts.serves(), "the alias serves the new generation"
        await stores.drop()
        await stores.aclose()


@pytest.mark.parametrize(
    "point",
    [
        *("ledger.delete_knowledge_base 1 after", "vectors.drop 1 after", "ledger.dropped 1 before"),
    ],
)
async def test_a_deletion_of_a_knowledge_base_that_dies_anywhere_ends_as_one_that_does_not(lab: Lab, point: str) -> None:
    await filled(lab)
    task = lab.knowledge_base_deletion(at=10)
    with pytest.raises(Killed):
        await run_watched(task, lab.settings(), lab.embedder, Reached(point, die))
    outcome, code = await lab.run(task, attempt=2)
    assert (code, told(outcome)) == (ExitCode.SUCCEEDED, ("Deleted", 2, 0, 0))
    assert await there(lab, 1) == (False, False)
    assert await tables(lab) == (0, 0, 0)


async def test_a_deletion_of_the_knowledge_base_waits_for_a_commit_that_is_under_way(lab: Lab) -> None:
    """Eight tasks and the deletion at once: whatever the order, what is left is whole and newer than the deletion."""
    lab.take_own_knowledge_base()
    for number in range(8):
        lab.write([f"{number}", "x"], f"{number}.txt")
    tasks = [lab.task(f"{number}.txt", at=number) for number in range(8)]
    ended = await asyncio.gather(*(lab.run(task) for task in tasks), lab.run(lab.knowledge_base_deletion(at=4)))
    for task, (outcome, code) in zip(tasks, ended, strict=False):
        if code is not ExitCode.SUCCEEDED:  # rows of a collection that was dropped meanwhile
            outcome, code = await lab.run(task, attempt=2)
        assert code is ExitCode.SUCCEEDED, outcome
    ledger = Ledger(lab.environment["TASKS_POSTGRES_URL"])
    found = await ledger.knowledge_base(namespace=NAMESPACE, kb_id=lab.kb_id)
    await ledger.aclose()
    assert found is not None
    stores: Any = opener(lab.settings(), dimension=lab.embedder.dimension)(Generation(NAMESPACE, lab.kb_id, found[0]))
    for number in range(8):
        in_vectors, in_texts = await rows_of(stores, lab.document_id(f"{number}.txt"))
        expected = 2 if number > 4 else {0, 2} if number == 4 else 0
        assert len(in_vectors) == len(in_texts)
        assert len(in_vectors) in (expected if isinstance(expected, set) else {expected}), number
    await stores.drop()
    await stores.aclose()
