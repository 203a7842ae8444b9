"""What PostgreSQL keeps of tasks beyond their rows: events in order, attempts, the archive. On a real server."""

import asyncio
import json
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from devstack import Endpoints
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Failure
from task_operator.accounts import Accounts
from task_operator.archive import Archive
from task_operator.backlog import Row
from task_operator.jobs import RunnerTemplate
from task_operator.metrics import Metrics
from task_operator.projection import _ALONE, Database, _upsert, _values
from task_operator.sweeper import Sweeper
from tests.docs.blocks import ROOT, blocks
from tests.support.operator_lab import Kubelet, OperatorProcess, Place, until
from tests.support.operator_values import at, ended_attempt, finished, given_back, manifest, processing, retrying, stamp

pytestmark = pytest.mark.integration

UID = manifest()["metadata"]["uid"]
Sql = "asyncpg.Connection[Any]"


def _task(version: int, *, uid: str = UID, **parts: Any) -> dict[str, Any]:
    made = manifest(**parts)
    made["metadata"] |= {"resourceVersion": str(version), "uid": uid}
    return made


async def _written(database: Database, version: int, *, uid: str = UID) -> None:
    async def look() -> bool:
        return (database.acknowledged(uid) or 0) >= version

    await until(f"version {version} is in PostgreSQL", look, seconds=20)


async def _story(sql: "asyncpg.Connection[Any]", uid: str = UID) -> list[tuple[str, int, str]]:
    rows = await sql.fetch("SELECT phase, attempt, reason FROM task_events WHERE task_uid = $1 ORDER BY number", uid)
    return [(row["phase"], row["attempt"], row["reason"]) for row in rows]


async def _attempts(sql: "asyncpg.Connection[Any]", uid: str = UID) -> list[tuple[int, str | None, bool]]:
    rows = await sql.fetch(
        "SELECT number, reason, finished_at IS NOT NULL AS ended FROM attempts WHERE task_uid = $1 ORDER BY 1", uid
    )
    return [(row["number"], row["reason"], row["ended"]) for row in rows]


async def _eventually(what: str, expected: Any, look: Callable[[], Any]) -> None:
    found: list[Any] = [None]

    async def same() -> bool:
        found[0] = await look()
        return bool(found[0] == expected)

    try:
        await until(what, same, seconds=20)
    except AssertionError:
        assert found[0] == expected


QUEUED = ("Queued", 1, "Queued")
RUNS = ("Processing", 1, "Processing")
DONE = ("Completed", 1, "Completed")


# ---------------------------------------------------------------------------------------------------------------- usage


async def test_what_attempts_used_is_counted_once_by_whichever_operator(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    await sql.execute(
        "INSERT INTO task_usage (task_uid, attempt, holder, namespace, type, outcome, seconds, cpu_seconds, "
        "memory_byte_seconds, memory_peak_bytes, tokens, texts, stages, stores) "
        """SELECT gen_random_uuid(), 1, 'pod', 'a', 'health_check', 'Succeeded', 2, 0.5, 100, 1e8, 30, 3, """
        """'{"embed": 1.5}', '{"milvus": [4, 0.2]}' FROM generate_series(1, 1200)"""
    )
    both = [Metrics(), Metrics()]
    accounts = [Accounts(database=database, metrics=metrics) for metrics in both]
    while sum(await asyncio.gather(*(one.look() for one in accounts))):
        pass

    def total(name: str, **labels: str) -> float:
        return sum(metrics.registry.get_sample_value(name, labels) or 0 for metrics in both)

    assert total("task_attempts_total", type="health_check", outcome="Succeeded") == 1200
    assert total("task_cpu_seconds_total", type="health_check") == 600
    assert total("task_embedding_tokens_total", type="health_check") == 36_000
    assert total("task_stage_seconds_sum", type="health_check", stage="embed") == 1800
    assert total("task_store_requests_total", store="milvus") == 4800
    assert round(total("task_store_seconds_total", store="milvus")) == 240
    assert total("task_memory_peak_bytes_bucket", type="health_check", le="1.34217728e+08") == 1200
    assert await sql.fetchval("SELECT count(*) FROM task_usage WHERE NOT counted") == 0


# --------------------------------------------------------------------------------------------------------------- events


async def test_the_statements_of_the_page_tell_the_history_of_a_task(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    database.submit(_task(1, status=retrying()))
    await _written(database, 1)
    [block] = [block for block in blocks(ROOT / "docs/operator.md") if block.language == "sql"]
    events, attempts = [await sql.fetch(statement) for statement in block.text.strip().rstrip(";").split(";")]
    assert [row["phase"] for row in events] == ["Queued", "Processing", "Retrying"]
    assert [(row["number"], row["message"]) for row in attempts] == [(1, "cannot verify")]


async def test_events_and_attempts_are_written_with_the_row(database: Database, sql: "asyncpg.Connection[Any]") -> None:
    database.submit(_task(1))
    await _written(database, 1)
    error = {"reason": "StoresDisagree", "message": "cannot verify", "retryable": True, "log": "the end of it"}
    database.submit(_task(2, status=retrying(error=error)))
    await _written(database, 2)
    database.submit(_task(3, status=processing(2)))
    await _written(database, 3)
    database.submit(_task(4, status=finished(attempt=2, attempts=[ended_attempt(1), ended_attempt(2, "Succeeded")])))
    await _written(database, 4)
    assert await _story(sql) == [
        QUEUED,
        RUNS,
        ("Retrying", 1, "StoresDisagree"),
        ("Processing", 2, "Processing"),
        ("Completed", 2, "Completed"),
    ]
    first = await sql.fetchrow("SELECT * FROM task_events ORDER BY number LIMIT 1")
    assert first is not None
    assert {key: first[key] for key in ("namespace", "name", "kb_id", "type", "queued_at", "at")} == {
        "namespace": "knowledge",
        "name": "handbook",
        "kb_id": "kb-42",
        "type": "document_processing",
        "queued_at": at(0),
        "at": at(0),
    }
    assert await _attempts(sql) == [(1, "StoresDisagree", True), (2, "Succeeded", True)]
    assert json.loads(await sql.fetchval("SELECT error FROM attempts WHERE number = 1")) == error
    assert await sql.fetchval("SELECT reason FROM tasks") == "Completed"


async def test_versions_that_were_skipped_are_told_all_the_same_and_none_twice(
    database: Database, url: str, sql: "asyncpg.Connection[Any]"
) -> None:
    database.submit(_task(5, status=finished()))
    await _written(database, 5)
    assert await _story(sql) == [QUEUED, RUNS, DONE]
    await sql.execute("TRUNCATE tasks")  # rows come back; what was told stays told
    await database.held(namespaces=[])
    database.submit(_task(5, status=finished()), lost=database.newest())
    await _written(database, 5)
    database.submit(_task(6, status=finished()), deleted=True)

    async def archived() -> bool:
        return bool(await sql.fetchval("SELECT deleted_at IS NOT NULL FROM tasks"))

    await until("its deletion is in PostgreSQL", archived)
    late = Database(url, metrics=Metrics())
    await late.warm_up()
    late.submit(_task(2, status=processing()))
    await late.aclose()
    assert await _story(sql) == [QUEUED, RUNS, DONE]


async def test_an_attempt_that_was_given_back_is_told_and_does_not_count(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    for version, status in enumerate([processing(), given_back(reason="StoreUnavailable")], 1):
        database.submit(_task(version, status=status))
        await _written(database, version)
        assert await _attempts(sql) == ([(1, None, False)] if version == 1 else [])
    database.submit(_task(3, status=processing(queuedAt=stamp(20))))
    await _written(database, 3)
    assert await _story(sql) == [QUEUED, RUNS, ("Queued", 1, "StoreUnavailable"), RUNS]
    assert await _attempts(sql) == [(1, None, False)]


async def test_tasks_that_go_unfinished_are_told_to_be_deleted_seen_or_unseen(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    seen, unseen, done = (str(uuid.uuid4()) for _ in range(3))
    for version, uid in enumerate((seen, unseen), 1):
        database.submit(_task(version, uid=uid, status=processing()))
    database.submit(_task(3, uid=done, status=finished()))
    await _written(database, 3, uid=done)
    database.submit(_task(4, uid=seen, status=processing()), deleted=True)
    deleted = [QUEUED, RUNS, ("Deleted", 1, "Deleted")]
    await _eventually("the deletion is told", deleted, lambda: _story(sql, seen))
    held = await database.held(namespaces=[])
    for _ in range(2):
        await database.mark_deleted({uid: held[uid] for uid in (unseen, done)})
    assert await _story(sql, unseen) == deleted
    assert await _story(sql, done) == [QUEUED, RUNS, DONE]


async def test_a_row_that_a_release_without_events_wrote_is_told_from_the_next_list(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    other = str(uuid.uuid4())
    database.submit(_task(3))
    database.submit(_task(4, uid=other, status=processing()))
    await _written(database, 4, uid=other)
    # After a rollback the release before goes on with the rows, with its own statement, and knows of no events.
    await sql.execute(
        "UPDATE tasks SET resource_version = 7, phase = 'Completed', started_at = $1, finished_at = $2 WHERE uid = $3",
        at(5),
        at(60),
        UID,
    )
    held = await database.held(namespaces=[])
    assert {uid: one.told for uid, one in held.items()} == {UID: False, other: True}
    assert database.acknowledged(UID) is None
    database.submit(_task(7, status=finished()), lost=database.newest())
    database.submit(_task(4, uid=other, status=processing()), lost=database.newest())
    await _written(database, 7)
    assert await _story(sql) == [QUEUED, RUNS, DONE]
    assert await _story(sql, other) == [QUEUED, RUNS]


async def test_numbers_become_visible_in_order_whoever_writes(url: str, sql: "asyncpg.Connection[Any]") -> None:
    """Two operators at once, as in a rolling update, and a reader that asks for what comes after the last it has seen."""
    writers = [await asyncpg.connect(url) for _ in range(2)]
    tasks, missed, seen = 150, [], set[int]()
    ended = asyncio.Event()

    async def write(connection: "asyncpg.Connection[Any]", part: int) -> None:
        for number in range(tasks):
            made = _task(1, uid=str(uuid.uuid4()), status=finished())
            made["metadata"]["name"] = f"task-{part}-{number}"
            values = _values(made, deleted_at=None, now=at(0))
            row = Row(uid=made["metadata"]["uid"], version=1, values=values)
            await _upsert(connection, [row], check=lambda: None, default=None)

    async def read() -> None:
        last = 0
        while True:
            done = ended.is_set()
            found = [row["number"] for row in await sql.fetch("SELECT number FROM task_events WHERE number > $1", last)]
            seen.update(found)
            last = max([last, *found])
            if done:
                return

    reading = asyncio.create_task(read())
    await asyncio.gather(*(write(connection, part) for part, connection in enumerate(writers)))
    ended.set()
    await reading
    missed = [row["number"] for row in await sql.fetch("SELECT number FROM task_events") if row["number"] not in seen]
    assert missed == []
    assert len(seen) == 3 * 2 * tasks
    for connection in writers:
        await connection.close()


async def test_a_writer_that_stands_still_holds_the_others_up_for_seconds_only(
    database: Database, url: str, sql: "asyncpg.Connection[Any]"
) -> None:
    patience = "SHOW idle_in_transaction_session_timeout"
    assert await database.ask(lambda connection: connection.fetchval(patience)) == "20s"
    frozen = await asyncpg.connect(url)
    transaction = frozen.transaction()
    await transaction.start()
    await frozen.execute(_ALONE)
    await frozen.execute("SET LOCAL idle_in_transaction_session_timeout = '1s'")  # the test's own patience
    database.submit(_task(1))
    await _written(database, 1)
    assert await _story(sql) == [QUEUED]
    assert frozen.is_closed()


async def test_whoever_listens_is_told_the_highest_number(database: Database, sql: "asyncpg.Connection[Any]") -> None:
    heard: list[str] = []
    await sql.add_listener("task_events", lambda *call: heard.append(str(call[-1])))
    database.submit(_task(1, status=processing()))
    await _written(database, 1)

    async def told() -> bool:
        return heard == [str(await sql.fetchval("SELECT max(number) FROM task_events"))]

    await until("the number is heard", told)
    database.submit(_task(2, status=processing(progress=30)))
    await _written(database, 2)
    database.submit(_task(3, status=finished()))
    await _written(database, 3)
    await _eventually("an event, and no progress, is heard", 2, lambda: asyncio.sleep(0, len(heard)))


# -------------------------------------------------------------------------------------------------- archive, fences


async def _count(sql: "asyncpg.Connection[Any]", *tables: str) -> dict[str, int]:
    return {table: await sql.fetchval(f"SELECT count(*) FROM {table}") for table in tables}


async def test_the_history_of_tasks_that_are_gone_long_enough_goes_whole(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    old, young, here = [str(uuid.uuid4()) for _ in range(5)], str(uuid.uuid4()), str(uuid.uuid4())
    for version, uid in enumerate([*old, young, here], 1):
        database.submit(_task(version, uid=uid, status=finished()), deleted=uid != here)
    await _written(database, 7, uid=here)
    for uid in [*old, young, here]:
        await sql.execute("INSERT INTO task_results (task_uid, attempt, holder, outcome) VALUES ($1, 1, 'pod', '{}')", uid)
        await sql.execute("INSERT INTO task_fences (task_uid, reason) VALUES ($1, 'Canceled')", uid)
        await sql.execute("INSERT INTO task_vectors VALUES ($1, 1, 1, 'model', 'model-1', 'sha', 'postgres')", uid)
        await sql.execute("INSERT INTO task_vector_parts VALUES ($1, 0, '[null]', '')", uid)
    await sql.execute("UPDATE tasks SET deleted_at = now() - interval '25 hours' WHERE uid = ANY($1::uuid[])", old)
    tables = ("tasks", "attempts", "task_events", "task_results", "task_fences", "task_vectors", "task_vector_parts")
    assert await _count(sql, *tables) == {table: 21 if table == "task_events" else 7 for table in tables}

    archive = Archive(database=database, keep=timedelta(days=1), metrics=Metrics(), batch=2, pause=0)
    await archive.look()

    assert await _count(sql, *tables) == {table: 6 if table == "task_events" else 2 for table in tables}
    assert {str(row["uid"]) for row in await sql.fetch("SELECT uid FROM tasks")} == {young, here}


async def test_fences_that_are_too_many_to_wait_are_raised_by_the_next_sweep(
    url: str, sql: "asyncpg.Connection[Any]"
) -> None:
    database = Database(url, metrics=Metrics(), fences=2)
    await database.warm_up()
    uids = [str(uuid.uuid4()) for _ in range(3)]
    await sql.execute(
        "INSERT INTO knowledge_bases (namespace, kb_id, model_fingerprint, dimension) VALUES ('k', 'kb', 'm', 3)"
    )
    await sql.execute("INSERT INTO documents (namespace, kb_id, document_id) VALUES ('k', 'kb', 'd')")
    for number, uid in enumerate(uids, 1):
        database.submit(_task(number, uid=uid, status=processing()))
        await sql.execute(
            "INSERT INTO document_versions (namespace, kb_id, document_id, version, task_uid, task_created_at, holder) "
            "VALUES ('k', 'kb', 'd', $1, $2, now(), 'pod')",
            number,
            uid,
        )
        database.submit(_task(10 + number, uid=uid, status=processing()), deleted=True)
        database.fence_later(uid, reason="Deleted")  # PostgreSQL is not written to yet
    working = asyncio.create_task(database.run())

    async def states() -> dict[int, str]:
        return {row["version"]: row["state"] for row in await sql.fetch("SELECT version, state FROM document_versions")}

    await _eventually("two are fenced", {1: "intent", 2: "canceled", 3: "canceled"}, states)

    async def create_job(job: dict[str, Any]) -> dict[str, Any]:
        return job

    template = RunnerTemplate(image="runner:1")
    sweeper = Sweeper(create_job=create_job, database=database, alive=set, template=template, metrics=Metrics())
    await sweeper.look()
    assert set((await states()).values()) == {"canceled"}
    fenced = {str(row["task_uid"]) for row in await sql.fetch("SELECT task_uid FROM task_fences")}
    assert fenced == set(uids)
    working.cancel()
    await asyncio.wait([working])
    await database.aclose()


# ------------------------------------------------------------------------------------------------- the whole operator


@pytest.fixture
def operator(place: Place, cluster: Endpoints, url: str, tmp_path: Path) -> OperatorProcess:
    environment = {"OPERATOR_POSTGRES_URL": url, "OPERATOR_HISTORY_DAYS": "2"}
    return OperatorProcess(kubeconfig=cluster.kubeconfig, namespaces=[place.namespace], folder=tmp_path, **environment)


def _fails(attempt: int) -> AttemptOutcome:
    error = Failure(reason="ParserCrashed", message=f"cannot parse page {attempt}", retryable=True)
    return AttemptOutcome(outcome=Outcome.FAILED, attempt=attempt, reason=error.reason, error=error)


@pytest.mark.timeout(240)
async def test_all_nine_attempts_of_a_flaky_task_are_kept(
    place: Place, operator: OperatorProcess, sql: "asyncpg.Connection[Any]"
) -> None:
    kubelet = Kubelet(place, outcomes={number: _fails(number) for number in range(1, 9)})
    async with operator.at_work(), kubelet.at_work():
        retry = {"limit": 8, "initialDelay": "0s", "maxDelay": "1s", "jitter": 0}
        uid = (await place.create(retry=retry))["metadata"]["uid"]
        status = await place.wait_for("Completed", seconds=200)
        assert [one["number"] for one in status["attempts"]] == [5, 6, 7, 8, 9]
        wanted = [*((number, "ParserCrashed", True) for number in range(1, 9)), (9, "Succeeded", True)]
        await _eventually("all attempts are in PostgreSQL", wanted, lambda: _attempts(sql, uid))
        story = [("Queued", 1, "Queued")]
        for number in range(1, 9):
            story += [("Processing", number, "Processing"), ("Retrying", number, "ParserCrashed")]
        told = [event for event in await _story(sql, uid) if event[0] != "Queued" or event[2] == "Queued"]
        assert told == [*story, ("Processing", 9, "Processing"), ("Completed", 9, "Completed")]
        messages = await sql.fetch("SELECT error->>'message' AS text FROM attempts WHERE task_uid = $1 AND number < 9", uid)
        assert {row["text"] for row in messages} <= {None, *(f"cannot parse page {number}" for number in range(1, 9))}


async def test_the_operator_deletes_history_after_so_many_days_as_it_is_told(
    operator: OperatorProcess, database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    old, young = (str(uuid.uuid4()) for _ in range(2))
    for version, (uid, hours) in enumerate([(old, 49), (young, 47)], 1):
        database.submit(_task(version, uid=uid, status=finished()), deleted=True)
        look = partial(sql.fetchval, "SELECT phase FROM tasks WHERE uid = $1", uid)
        await _eventually("it is archived", "Completed", look)
        await sql.execute("UPDATE tasks SET deleted_at = now() - $1::interval WHERE uid = $2", timedelta(hours=hours), uid)
    async with operator.at_work():
        await _eventually("the old one has gone", [], lambda: _story(sql, old))
        assert await _count(sql, "tasks", "task_events", "attempts") == {"tasks": 1, "task_events": 3, "attempts": 1}

        async def counted() -> bool:
            return "task_operator_history_expired_total 1.0" in (await operator.get("/metrics"))[1]

        await until("it is counted", counted)
