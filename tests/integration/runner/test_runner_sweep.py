"""The sweep on real stores: what nobody will publish goes, what is published or being written stays, whenever it comes."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from job_runner.index import Generation, Row
from job_runner.ledger import Ledger
from job_runner.stores import opener
from job_runner.sweep import Summary, sweep
from task_contract.errors import Fenced, StoresDisagree
from task_contract.lifecycle import ExitCode
from task_contract.models import ProcessingTask
from task_operator.jobs import RunnerTemplate
from task_operator.metrics import Metrics
from task_operator.projection import Database
from task_operator.sweeper import Sweeper
from tests.support.runner_lab import NAMESPACE, Lab, Reached, rows_of, run_watched

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


class Killed(Exception):
    """The process dies here: nothing that follows in it happens."""


@pytest.fixture
async def ledger(lab: Lab) -> AsyncIterator[Ledger]:
    """A ledger in which nothing but this test's knowledge base is to be swept."""
    ledger = Ledger(lab.environment["TASKS_POSTGRES_URL"])
    lab.take_own_knowledge_base()
    await lab.fetch("DELETE FROM documents")
    await lab.fetch("DELETE FROM knowledge_base_deletions")
    await lab.fetch("DELETE FROM knowledge_bases")
    yield ledger
    await ledger.aclose()


async def swept(lab: Lab, ledger: Ledger, **options: bool) -> Summary:
    return await sweep(NAMESPACE, ledger=ledger, open_stores=opener(lab.settings(), dimension=0), **options)


def uid_of(task: ProcessingTask) -> uuid.UUID:
    return uuid.UUID(task.metadata.uid)


async def ended(lab: Lab, task: ProcessingTask) -> None:
    """Have the projection say that a task has failed."""
    await lab.fetch(
        "INSERT INTO tasks (uid, namespace, name, type, priority, phase, spec, created_at, finished_at, generation, "
        "resource_version) VALUES ($1, $2, 'a', 'document_processing', 'normal', 'Failed', '{}', now(), now(), 1, 1)",
        uid_of(task),
        NAMESPACE,
    )


async def fenced(lab: Lab, task: ProcessingTask) -> None:
    """Cancel a task as the operator does."""
    await lab.fetch("INSERT INTO task_fences (task_uid, reason) VALUES ($1, 'Canceled')", uid_of(task))
    await lab.fetch(
        "UPDATE document_versions SET state = 'canceled', epoch = epoch + 1, updated_at = now() WHERE task_uid = $1",
        uid_of(task),
    )


async def killed(lab: Lab, task: ProcessingTask, point: str = "ledger.commit 1 before") -> None:
    """Run a task until it is killed at a point, with its rows written."""

    async def die() -> None:
        raise Killed

    with pytest.raises(Killed):
        await run_watched(task, lab.settings(), lab.embedder, Reached(point, die))


async def rows(lab: Lab, document: str = "a.txt") -> tuple[int, int]:
    in_vectors, in_texts = await rows_of(lab.stores, lab.document_id(document))
    return len(in_vectors), len(in_texts)


@pytest.mark.parametrize("end", [ended, fenced])
async def test_rows_of_a_task_that_ended_go_and_the_published_version_stays(lab: Lab, ledger: Ledger, end: Any) -> None:
    lab.write(["One", "Two"])
    await lab.run(lab.task(at=0))
    lab.write(["Three", "Four", "Five"])
    task = lab.task(at=1)
    await killed(lab, task)
    assert (await swept(lab, ledger)).milvus_rows == 0, "the task lives: it may be tried again"
    assert await rows(lab) == (5, 5)
    await end(lab, task)
    would = await swept(lab, ledger, dry_run=True)
    assert (would.milvus_rows, would.elasticsearch_rows) == (3, 3)
    assert await rows(lab) == (5, 5)
    found = await swept(lab, ledger)
    assert (found.milvus_rows, found.elasticsearch_rows, found.intents) == (3, 3, would.intents)
    assert await lab.versions() == {1: (2, 2)}
    again = await swept(lab, ledger)
    assert (again.milvus_rows, again.elasticsearch_rows, again.intents) == (0, 0, 0)
    assert await lab.fetch("SELECT count(*) FROM sweeps WHERE namespace = $1", NAMESPACE) == 1


async def test_what_was_swept_cannot_be_committed(lab: Lab, ledger: Ledger) -> None:
    lab.write(["One"])
    task = lab.task(at=0)

    async def buried() -> None:
        await ended(lab, task)
        assert (await swept(lab, ledger)).milvus_rows == 1

    with pytest.raises(Fenced):
        await run_watched(task, lab.settings(), lab.embedder, Reached("ledger.commit 1 before", buried))
    assert await lab.published() is None
    assert await rows(lab) == (0, 0)


@pytest.mark.parametrize("point", ["vectors.write 1 after", "texts.stored 1 after", "ledger.commit 1 before"])
async def test_a_sweep_takes_nothing_from_a_task_at_work(lab: Lab, ledger: Ledger, point: str) -> None:
    lab.write(["Old"])
    await lab.run(lab.task(at=0))
    lab.write([f"Sentence {number}" for number in range(40)])

    async def look() -> None:
        await swept(lab, ledger, everything=True)

    done = await run_watched(lab.task(at=1), lab.settings(verify_seconds=2), lab.embedder, Reached(point, look))
    assert done.reason == "Completed"
    assert await lab.versions() == {2: (40, 40)}


async def test_a_zombie_that_writes_after_the_sweep_is_swept_by_the_next_one(lab: Lab, ledger: Ledger) -> None:
    """The pod stands still in the middle of its writes; its task ends, is swept, and the pod wakes up."""
    lab.write(["Old"])
    await lab.run(lab.task(at=0))
    lab.write([f"Sentence {number}" for number in range(100)])
    task = lab.task(at=1)

    async def look() -> None:
        await ended(lab, task)
        await swept(lab, ledger)

    with pytest.raises((Fenced, StoresDisagree)):
        await run_watched(task, lab.settings(verify_seconds=1), lab.embedder, Reached("vectors.write 1 after", look))
    assert await lab.published() == 1
    assert sum(await rows(lab)) > 2
    found = await swept(lab, ledger)
    assert found.milvus_rows + found.elasticsearch_rows > 0
    assert await lab.versions() == {1: (1, 1)}


async def test_versions_that_the_ledger_no_longer_knows_go_too(lab: Lab, ledger: Ledger) -> None:
    """Between two attempts the file was replaced: the task has taken another number, and then it was deleted."""
    lab.write(["One", "Two"])
    task = lab.task(at=0)
    await killed(lab, task)
    lab.write(["Other"])
    await killed(lab, task)
    assert await lab.versions() == {1: (2, 2), 2: (1, 1)}
    assert (await swept(lab, ledger)).milvus_rows == 2, "the first number is nobody's"
    assert await lab.versions() == {2: (1, 1)}
    await ended(lab, task)
    assert (await swept(lab, ledger)).milvus_rows == 1
    assert await rows(lab) == (0, 0)


async def test_lower_versions_that_a_dead_publisher_left_go(lab: Lab, ledger: Ledger) -> None:
    lab.write(["One", "Two"])
    await lab.run(lab.task(at=0))
    lab.write(["Three"])
    await killed(lab, lab.task(at=1), "ledger.commit 1 after")
    assert await lab.versions() == {1: (2, 2), 2: (1, 1)}
    await swept(lab, ledger)
    assert await lab.versions() == {2: (1, 1)}


async def test_a_deletion_that_died_after_its_commit_is_finished(lab: Lab, ledger: Ledger) -> None:
    lab.write(["One", "Two"])
    await lab.run(lab.task(at=0))
    await killed(lab, lab.deletion(at=1), "ledger.commit 1 after")
    await swept(lab, ledger)
    assert await rows(lab) == (0, 0)


async def test_what_is_left_of_a_deleted_knowledge_base_goes_and_what_was_filled_since_stays(
    lab: Lab, ledger: Ledger
) -> None:
    lab.write(["One", "Two"])
    await lab.run(lab.task(at=0))
    await killed(lab, lab.knowledge_base_deletion(at=1), "ledger.delete_knowledge_base 1 after")
    lab.write(["New"])
    assert (await lab.run(lab.task(at=2)))[0].reason == "Completed"
    assert (await swept(lab, ledger, dry_run=True)).generations == 1
    assert (await swept(lab, ledger)).generations == 1
    first, second = (opener(lab.settings(), dimension=16)(Generation(NAMESPACE, lab.kb_id, number)) for number in (1, 2))
    try:
        assert not await first.vectors.exists()
        assert not await first.texts.exists()
        assert await second.texts.serves(), "the alias has gone over"
        # A late writer of the first generation: Elasticsearch makes the index anew for it.
        await first.texts.write([_row()])
        assert (await swept(lab, ledger)).generations == 1
        assert not await first.texts.exists()
        assert len(await second.texts.search("New", limit=5)) == 1
    finally:
        await second.drop()
        await first.aclose()
        await second.aclose()


def _row(document: str = "late", version: int = 9) -> Row:
    known: dict[str, Any] = {name: "0" if column.type is str else 0 for name, column in Row.__dataclass_fields__.items()}
    known |= {"metadata": {}, "keywords": ()}
    return Row(**known | {"id": f"{document}-{version}", "document_id": document, "version": version})


async def test_more_documents_than_a_store_is_asked_about_at_once(lab: Lab, ledger: Ledger) -> None:
    """Without the pipeline: 450 documents, each with a version that is published and one that is not."""
    await lab.stores.vectors.ensure()
    await lab.stores.texts.ensure()
    data = [_row(f"d{number}", version) for number in range(450) for version in (1, 2)]
    await lab.stores.vectors.write(data, np.full((len(data), 16), 0.25, dtype=np.float32))
    await lab.stores.texts.write(data)
    await lab.fetch(
        "INSERT INTO knowledge_bases (namespace, kb_id, model_fingerprint, dimension) VALUES ($1, $2, 'hash-1', 16)",
        NAMESPACE,
        lab.kb_id,
    )
    await lab.fetch(
        "INSERT INTO documents (namespace, kb_id, document_id, last_version, published_version, chunk_count) "
        "SELECT $1, $2, 'd' || number, 2, 1, 1 FROM generate_series(0, 449) AS number",
        NAMESPACE,
        lab.kb_id,
    )
    found = await swept(lab, ledger)
    assert (found.documents, found.milvus_rows, found.elasticsearch_rows) == (450, 450, 450)
    assert len([row async for page in lab.stores.vectors.scan() for row in page]) == 450
    assert {row.version async for page in lab.stores.texts.scan() for row in page} == {1}


async def test_documents_that_were_left_alone_for_long_are_looked_at_on_request(lab: Lab, ledger: Ledger) -> None:
    for number in range(2):
        lab.write([f"{number}"])
        await lab.run(lab.task(at=number))
    await lab.fetch("UPDATE documents SET updated_at = now() - interval '9 days'")
    await lab.fetch("UPDATE document_versions SET updated_at = now() - interval '9 days'")
    assert (await swept(lab, ledger)).documents == 0
    assert (await swept(lab, ledger, everything=True)).documents == 1


async def test_the_command_line(lab: Lab, ledger: Ledger) -> None:
    lab.write(["One", "Two"])
    task = lab.task(at=0)
    await killed(lab, task)
    await ended(lab, task)
    for options, expected in (
        (["--dry-run"], "would remove 2 rows from Milvus and 2 from Elasticsearch"),
        ([], "removed 2 rows from Milvus and 2 from Elasticsearch"),
        ([], "removed 0 rows from Milvus and 0 from Elasticsearch"),
    ):
        process = lab.command("job_runner", "sweep", "--namespace", NAMESPACE, *options)
        output, errors = await asyncio.to_thread(process.communicate, timeout=60)
        assert process.returncode == ExitCode.SUCCEEDED, errors
        assert f"namespace {NAMESPACE}: {expected}" in output
    summary = json.loads(await lab.fetch("SELECT summary FROM sweeps WHERE namespace = $1", NAMESPACE))
    assert summary["milvus_rows"] == 0
    environment = {"TASKS_MILVUS_URL": "http://127.0.0.1:9"}
    process = lab.command("job_runner", "sweep", "--namespace", NAMESPACE, environment=environment)
    output, errors = await asyncio.to_thread(process.communicate, timeout=60)
    assert process.returncode == ExitCode.STORE_UNAVAILABLE, (output, errors)


async def test_the_job_that_the_operator_makes_sweeps_what_a_dead_task_has_left(lab: Lab, ledger: Ledger) -> None:
    """From the operator's comparison to the stores; played are the API server and the pod, whose command is run as it is."""
    lab.write(["One", "Two"])
    task = lab.task(at=0)
    await killed(lab, task)
    await lab.fetch(
        "INSERT INTO tasks (uid, namespace, name, type, priority, phase, spec, created_at, generation, resource_version) "
        "VALUES ($1, $2, 'a', 'document_processing', 'normal', 'Processing', '{}', now(), 1, 1)",
        uid_of(task),
        NAMESPACE,
    )
    alive = {str(uid_of(task))}
    names: list[str] = []

    async def create_job(job: dict[str, Any]) -> dict[str, Any]:
        names.append(job["metadata"]["name"])
        [container] = job["spec"]["template"]["spec"]["containers"]
        process = lab.command(*container["command"][2:])
        output, errors = await asyncio.to_thread(process.communicate, timeout=60)
        assert process.returncode == ExitCode.SUCCEEDED, errors
        assert "removed 2 rows from Milvus and 2 from Elasticsearch" in output
        return job

    database = Database(lab.environment["TASKS_POSTGRES_URL"], metrics=Metrics())
    await database.warm_up()
    try:
        sweeper = Sweeper(
            create_job=create_job,
            database=database,
            alive=lambda: alive,
            template=RunnerTemplate(image="runner:1"),
            metrics=Metrics(),
            namespaces=[NAMESPACE],
        )
        await sweeper.look()
        assert not names, "the task is alive"
        alive.clear()
        await sweeper.look()
        assert await rows(lab) == (0, 0)
        await sweeper.look()
        assert len(names) == 1, "it is clean now"
        outcome, code = await lab.run(task, attempt=2)
        assert code is ExitCode.FENCED, outcome
    finally:
        await database.aclose()
