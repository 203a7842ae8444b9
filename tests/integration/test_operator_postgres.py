"""The operator and PostgreSQL: the projection, results that outlive their pods, and the fence against a late commit."""

import asyncio
import json
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from devstack import Endpoints
from devstack.stores import postgres
from job_runner.ledger import Ledger
from task_contract.messages import AttemptOutcome, Outcome, progress_event
from task_contract.models import Failure, Result, Stage
from task_contract.names import PROGRESS_CHANNEL
from task_operator.metrics import Metrics
from task_operator.observation import FenceState
from task_operator.projection import Database, DatabaseUnavailable, Held
from task_operator.schema import migrate
from task_platform.kubernetes import Access
from tests.support.operator_lab import Kubelet, OperatorProcess, Place, Proxy, until
from tests.support.operator_values import at, finished, manifest, processing
from tests.support.servers import free_port

pytestmark = pytest.mark.integration

SUCCESS = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=1, reason="Completed", result=Result(documents=1, chunks=87))
FAILURE = AttemptOutcome(
    outcome=Outcome.FAILED,
    attempt=1,
    reason="ParserCrashed",
    error=Failure(reason="ParserCrashed", message="cannot parse", retryable=True),
)


async def _acknowledged(database: Database, uid: str, version: int) -> None:
    async def look() -> bool:
        return (database.acknowledged(uid) or 0) >= version

    await until(f"version {version} is in PostgreSQL", look, seconds=20)


def _task(version: int, *, uid: str | None = None, **parts: Any) -> dict[str, Any]:
    made = manifest(**parts)
    made["metadata"] |= {"resourceVersion": str(version), "uid": uid or made["metadata"]["uid"]}
    return made


UID = manifest()["metadata"]["uid"]


async def _only_row(sql: "asyncpg.Connection[Any]") -> asyncpg.Record:
    rows = await sql.fetch("SELECT * FROM tasks")
    assert len(rows) == 1
    row: asyncpg.Record = rows[0]
    return row


# ---------------------------------------------------------------------------------------------------------- projection


async def test_a_row_follows_its_task_and_never_goes_back(database: Database, sql: "asyncpg.Connection[Any]") -> None:
    database.submit(_task(9, status=processing(stage="embed", progress=62)))
    await _acknowledged(database, UID, 9)
    row = await _only_row(sql)
    assert (row["phase"], row["stage"], row["progress"], row["attempt"]) == ("Processing", "embed", 62, 1)
    assert (row["kb_id"], row["type"], row["priority"]) == ("kb-42", "document_processing", "normal")
    assert json.loads(row["spec"])["payload"] == {"filePath": "/data/handbook.pdf"}
    assert (row["created_at"], row["started_at"], row["finished_at"]) == (at(0), at(5), None)

    database.submit(_task(8))
    # 10 is later than 9 although "10" sorts before "9".
    database.submit(_task(10, status=finished(result={"chunks": 87})))
    await _acknowledged(database, UID, 10)
    row = await _only_row(sql)
    assert (row["phase"], row["resource_version"]) == ("Completed", 10)
    assert json.loads(row["result"]) == {"chunks": 87}
    assert row["finished_at"] == at(60)


async def test_an_older_version_that_another_process_sends_late_changes_nothing(
    database: Database, url: str, sql: "asyncpg.Connection[Any]"
) -> None:
    database.submit(_task(20, status=finished()))
    await _acknowledged(database, UID, 20)
    late = Database(url, metrics=Metrics())
    await late.warm_up()
    late.submit(_task(19))
    await late.aclose()
    assert await sql.fetchval("SELECT phase FROM tasks") == "Completed"


async def test_thousands_are_written_in_batches_and_odd_ones_hold_nobody_up(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    uids = [str(uuid.uuid4()) for _ in range(1200)]
    for number, uid in enumerate(uids):
        database.submit(_task(100 + number, uid=uid))
    odd = _task(5000, uid=str(uuid.uuid4()), spec={"payload": {"metadata": {"a": "nul \x00 here"}}})
    database.submit(odd)
    broken = _task(5001, uid=str(uuid.uuid4()))
    broken["metadata"]["generation"] = 2**70
    database.submit(broken)
    for uid in (*uids, odd["metadata"]["uid"], broken["metadata"]["uid"]):
        await _acknowledged(database, uid, 1)
    assert await sql.fetchval("SELECT count(*) FROM tasks") == 1201
    stored = await sql.fetchval("SELECT spec FROM tasks WHERE uid = $1", odd["metadata"]["uid"])
    assert json.loads(stored)["payload"]["metadata"] == {"a": "nul  here"}


async def test_rows_wait_for_a_database_that_is_away(url: str, sql: "asyncpg.Connection[Any]") -> None:
    database = Database(url, metrics=Metrics())
    await database.warm_up()
    await sql.execute("ALTER TABLE tasks RENAME TO away")
    work = asyncio.create_task(database.run())
    database.submit(_task(7))

    async def down() -> bool:
        return database.down_since is not None

    await until("the database is seen to be away", down)
    with pytest.raises(DatabaseUnavailable, match="migrate"):
        await database.held(namespaces=[])
    database.submit(_task(8, status=processing()))
    await sql.execute("ALTER TABLE away RENAME TO tasks")
    await _acknowledged(database, UID, 8)
    assert database.down_since is None
    assert await sql.fetchval("SELECT phase FROM tasks") == "Processing"
    work.cancel()
    await asyncio.wait([work])
    await database.aclose()


async def test_of_several_hosts_the_one_that_can_be_written_to_is_used(url: str) -> None:
    user, at_sign, rest = url.partition("@")
    several = f"{user}{at_sign}127.0.0.1:{free_port()},{rest}?target_session_attrs=read-write"
    await migrate(several)
    database, ledger = Database(several, metrics=Metrics()), Ledger(several)
    try:
        await database.warm_up()
        assert await database.held(namespaces=()) == {}
        assert (await ledger.check()).startswith("PostgreSQL")
    finally:
        await ledger.aclose()
        await database.aclose()


async def test_an_operator_starts_without_its_database() -> None:
    database = Database("postgresql://nobody:none@127.0.0.1:1/none", metrics=Metrics())
    await database.warm_up()
    with pytest.raises(DatabaseUnavailable, match="cannot use PostgreSQL"):
        await database.result(UID, attempt=1)
    assert database.down_since is not None
    database.submit(_task(1))
    await database.aclose()


async def test_rows_of_tasks_that_went_unseen_are_marked_and_fenced(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    gone, done, here = (str(uuid.uuid4()) for _ in range(3))
    database.submit(_task(1, uid=gone))
    database.submit(_task(2, uid=done, status=finished()))
    database.submit(_task(3, uid=here))
    await _acknowledged(database, here, 3)
    assert await database.held(namespaces=["other"]) == {}
    held = await database.held(namespaces=["knowledge"])
    assert held == {gone: Held(1, finished=False), done: Held(2, finished=True), here: Held(3, finished=False)}
    await database.mark_deleted({uid: held[uid] for uid in (gone, done)})
    assert database.acknowledged(gone) is None
    assert (await database.held(namespaces=[])).keys() == {here}
    rows = {str(row["uid"]): row["deleted_at"] for row in await sql.fetch("SELECT uid, deleted_at FROM tasks")}
    assert rows[here] is None
    assert rows[gone] is not None
    assert rows[done] is not None

    async def fenced() -> bool:
        return [str(row["task_uid"]) for row in await sql.fetch("SELECT task_uid FROM task_fences")] == [gone]

    await until("the unfinished one is fenced", fenced)


async def test_rows_that_were_removed_are_written_again_from_a_list(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    database.submit(_task(7, status=processing()))
    await _acknowledged(database, UID, 7)
    await sql.execute("TRUNCATE tasks")
    database.submit(_task(7, status=processing()), lost=7)
    assert await sql.fetchval("SELECT count(*) FROM tasks") == 0, "without a look at the table it is believed in"
    await database.held(namespaces=[])
    database.submit(_task(7, status=processing()), lost=7)
    await _acknowledged(database, UID, 7)
    assert (await _only_row(sql))["phase"] == "Processing"


async def test_a_list_of_a_restored_api_server_begins_a_new_history(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    alive, gone, back = (str(uuid.uuid4()) for _ in range(3))
    for version, uid in ((900, alive), (901, gone), (902, back)):
        database.submit(_task(version, uid=uid, status=finished()))
    database.submit(_task(903, uid=back, status=finished()), deleted=True)
    await _acknowledged(database, gone, 901)

    async def deleted() -> bool:
        return bool(await sql.fetchval("SELECT deleted_at IS NOT NULL FROM tasks WHERE uid = $1", back))

    await until("the deletion is in PostgreSQL", deleted)
    await database.held(namespaces=[])
    lost = database.newest()
    assert lost == 901
    database.submit(_task(511, uid=back, status=processing()))  # an event before the list
    # The restored list: one task is back at its beginning, one does not exist yet, one exists again.
    database.submit(_task(510, uid=alive), lost=lost)
    database.submit(_task(511, uid=back, status=processing()), lost=lost)
    database.submit(_task(520, uid=alive, status=processing()))  # an event right after it
    await _acknowledged(database, alive, 520)
    await _acknowledged(database, back, 511)
    rows = await sql.fetch("SELECT uid::text, phase, resource_version, deleted_at FROM tasks")
    assert {row["uid"]: (row["phase"], row["resource_version"], row["deleted_at"]) for row in rows} == {
        alive: ("Processing", 520, None),
        back: ("Processing", 511, None),
        gone: ("Completed", 901, None),  # for mark_deleted: it is not in the list
    }
    database.submit(_task(515, uid=alive))
    database.submit(_task(521, uid=alive, status=finished()))
    await _acknowledged(database, alive, 521)
    assert await sql.fetchval("SELECT phase FROM tasks WHERE uid = $1", alive) == "Completed"


@pytest.fixture
def own_postgres(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A PostgreSQL of this test's own: another state folder (that its user may enter), another port."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="operator-postgres-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setenv("DEVSTACK_STATE", folder)
        monkeypatch.setenv("DEVSTACK_POSTGRES_PORT", str(free_port()))
        postgres.up()
        try:
            yield
        finally:
            postgres.down(kill=True)


async def test_a_postgresql_that_stops_and_starts_loses_no_row(cluster: Endpoints, own_postgres: None) -> None:
    url = await asyncio.to_thread(postgres.create_database, "operator")
    await migrate(url)
    metrics, incomplete = Metrics(), asyncio.Event()
    database = Database(url, metrics=metrics, limit=400_000)
    database.on_incomplete = incomplete.set
    await database.warm_up()
    work = asyncio.create_task(database.run())
    uids = [str(uuid.uuid4()) for _ in range(300)]
    database.submit(_task(1, uid=uids[0]))
    await _acknowledged(database, uids[0], 1)

    await asyncio.to_thread(postgres.down)
    for version, uid in enumerate(uids, 2):
        database.submit(_task(version, uid=uid))
        database.submit(_task(1000 + version, uid=uid, status=processing()))

    async def away() -> bool:
        return database.down_since is not None

    await until("the database is seen to be away", away)
    waits = metrics.registry.get_sample_value("task_operator_projection_pending_bytes") or 0
    assert 300_000 < waits <= 400_000
    assert (metrics.registry.get_sample_value("task_operator_projection_lag_seconds") or 0) > 0
    await asyncio.to_thread(postgres.up)
    async with asyncio.timeout(60):
        await incomplete.wait()
    # What the operator does then: it looks at the table, lists all tasks, and submits the list.
    held = await database.held(namespaces=[])
    assert 100 < len(held) < 300
    for version, uid in enumerate(uids, 2):
        database.submit(_task(1000 + version, uid=uid, status=processing()), lost=database.newest())
        await database.room()
    for version, uid in enumerate(uids, 2):
        await _acknowledged(database, uid, 1000 + version)
    assert len(await database.held(namespaces=[])) == 300
    assert database.down_since is None
    work.cancel()
    await asyncio.wait([work])
    await database.aclose()


# ------------------------------------------------------------------------------------------------- results and fence


async def _intent(
    sql: "asyncpg.Connection[Any]", state: str = "intent", *, namespace: str = "knowledge", uid: str = UID
) -> None:
    await sql.execute(
        "INSERT INTO knowledge_bases (namespace, kb_id, model_fingerprint, dimension) VALUES ($1, 'kb-42', 'm', 3)",
        namespace,
    )
    await sql.execute("INSERT INTO documents (namespace, kb_id, document_id) VALUES ($1, 'kb-42', 'd')", namespace)
    await sql.execute(
        "INSERT INTO document_versions (namespace, kb_id, document_id, version, task_uid, task_created_at, state, holder) "
        "VALUES ($3, 'kb-42', 'd', 1, $1, now(), $2, 'pod-1')",
        uid,
        state,
        namespace,
    )


async def _store_result(
    sql: "asyncpg.Connection[Any]", outcome: AttemptOutcome, *, uid: str = UID, attempt: int = 1
) -> None:
    await sql.execute(
        "INSERT INTO task_results (task_uid, attempt, holder, outcome) VALUES ($1, $2, 'pod-1', $3) "
        "ON CONFLICT (task_uid, attempt) DO UPDATE SET outcome = excluded.outcome, created_at = now()",
        uid,
        attempt,
        outcome.model_dump_json(by_alias=True, exclude_none=True),
    )


async def test_a_stored_result_is_found_by_attempt(database: Database, sql: "asyncpg.Connection[Any]") -> None:
    assert await database.result(UID, attempt=1) is None
    await _store_result(sql, SUCCESS)
    found = await database.result(UID, attempt=1)
    assert found is not None
    assert (found.outcome, found.holder) == (SUCCESS, "pod-1")
    await sql.execute('UPDATE task_results SET outcome = \'{"outcome": "Odd"}\'')
    assert await database.result(UID, attempt=1) is None


async def test_a_fence_ends_the_intent_and_stands(database: Database, sql: "asyncpg.Connection[Any]") -> None:
    await _intent(sql)
    for _ in range(2):
        assert (await database.raise_fence(UID, reason="Canceled")).state is FenceState.RAISED
    row = await sql.fetchrow("SELECT state, epoch FROM document_versions")
    assert row is not None
    assert (row["state"], row["epoch"]) == ("canceled", 2)
    assert await sql.fetchval("SELECT reason FROM task_fences WHERE task_uid = $1", UID) == "Canceled"


@pytest.mark.parametrize("state", ["published", "superseded", "unchanged"])
async def test_a_commit_that_came_first_wins(database: Database, sql: "asyncpg.Connection[Any]", state: str) -> None:
    await _intent(sql, state)
    await _store_result(sql, FAILURE)
    await _store_result(sql, SUCCESS, attempt=2)
    fence = await database.raise_fence(UID, reason="Canceled")
    assert fence.state is FenceState.COMMITTED
    assert fence.outcome == SUCCESS
    assert await sql.fetchval("SELECT count(*) FROM task_fences") == 0


async def test_a_commit_under_way_is_waited_for(database: Database, sql: "asyncpg.Connection[Any]") -> None:
    await _intent(sql)
    commit = sql.transaction()
    await commit.start()
    await sql.execute("SELECT pg_advisory_xact_lock_shared(hashtextextended($1::text, 0))", UID)
    raising = asyncio.create_task(database.raise_fence(UID, reason="Canceled"))

    async def waits() -> bool:
        return bool(await sql.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))

    await until("the fence waits for the lock", waits)
    await sql.execute("UPDATE document_versions SET state = 'published'")
    await commit.commit()
    assert (await raising).state is FenceState.COMMITTED


async def test_the_deletion_of_a_knowledge_base_that_came_first_wins(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    await sql.execute(
        "INSERT INTO knowledge_base_deletions (namespace, kb_id, task_uid, task_created_at, generation) "
        "VALUES ('knowledge', 'kb-42', $1, now(), 1)",
        UID,
    )
    assert (await database.raise_fence(UID, reason="Canceled")).state is FenceState.COMMITTED


LONG_AGO = "now() - interval '2 minutes'"


async def _generation(sql: "asyncpg.Connection[Any]", state: str, **columns: str) -> None:
    """Enter a knowledge base with one generation of a task; a column is given by an expression."""
    await sql.execute(
        "INSERT INTO knowledge_bases (namespace, kb_id, model_fingerprint, dimension) VALUES ('knowledge', 'kb-42', 'm', 8)"
    )
    names = "".join(f", {name}" for name in columns)
    values = "".join(f", {value}" for value in columns.values())
    await sql.execute(
        "INSERT INTO generations (namespace, kb_id, generation, model_fingerprint, dimension, state, task_uid"
        f"{names}) VALUES ('knowledge', 'kb-42', 1, 'm', 8, $1, $2{values})",
        state,
        UID,
    )


@pytest.mark.parametrize(("switched", "expected"), [("now()", FenceState.COMMITTED), ("NULL", FenceState.RAISED)])
async def test_a_rebuild_that_has_switched_has_committed(
    database: Database, sql: "asyncpg.Connection[Any]", switched: str, expected: FenceState
) -> None:
    await _generation(sql, "serving" if expected is FenceState.COMMITTED else "filling", switched_at=switched)
    assert (await database.raise_fence(UID, reason="Canceled")).state is expected


async def test_the_lease_of_a_knowledge_base_is_taken_from_a_pod_that_does_not_stop(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    await _generation(sql, "filling")
    await sql.execute(
        "INSERT INTO knowledge_base_leases (namespace, kb_id, task_uid, holder) VALUES ('knowledge', 'kb-42', $1, 'pod')",
        UID,
    )
    await database.release(UID)
    row = await sql.fetchrow("SELECT task_uid::text, holder, epoch FROM knowledge_base_leases")
    assert row is not None
    assert tuple(row) == (UID, "", 2)


# ------------------------------------------------------------------------------------------------------------- sweeping


@pytest.mark.parametrize(
    ("state", "columns", "dirty"),
    [
        pytest.param("serving", {}, False, id="never rebuilt"),
        pytest.param(
            "serving", {"switched_at": "now() - interval '2 minutes'", "aliases_at": "now()"}, False, id="switched"
        ),
        pytest.param("serving", {"switched_at": "now()"}, False, id="being switched"),
        pytest.param("serving", {"switched_at": LONG_AGO}, True, id="stopped before the aliases"),
        pytest.param("retained", {"keep_until": "now() + interval '1 hour'"}, False, id="kept"),
        pytest.param("retained", {"keep_until": "now() - interval '1 hour'"}, True, id="kept no longer"),
        pytest.param("filling", {}, False, id="being filled"),
    ],
)
async def test_what_a_rebuild_leaves_makes_a_namespace_dirty(
    database: Database, sql: "asyncpg.Connection[Any]", state: str, columns: dict[str, str], dirty: bool
) -> None:
    await _generation(sql, state, **columns)
    assert [one.dirty for one in await database.swept(namespaces=[])] == [dirty]
    if state == "filling":
        await database.raise_fence(UID, reason="Canceled")
        assert [one.dirty for one in await database.swept(namespaces=[])] == [True], "nobody fills it any more"


async def test_intents_are_told_with_whether_their_task_was_ever_one_of_the_cluster(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    stranger = str(uuid.uuid4())
    await _intent(sql)
    await _intent(sql, namespace="other", uid=stranger)
    await _intent(sql, "published", namespace="third", uid=str(uuid.uuid4()))
    database.submit(_task(9))
    await _acknowledged(database, UID, 9)
    found = {one.uid: one.known for one in await database.intents(namespaces=[])}
    assert found == {UID: True, stranger: False}
    assert [one.uid for one in await database.intents(namespaces=["other", "third"])] == [stranger]


async def test_a_namespace_is_dirty_until_its_dead_versions_are_swept(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    async def look(*namespaces: str) -> list[tuple[str, bool, bool]]:
        found = await database.swept(namespaces=namespaces)
        return [(one.namespace, one.dirty, one.last is None) for one in found]

    assert await look() == []
    await _intent(sql)
    await _intent(sql, namespace="other", uid=str(uuid.uuid4()))
    assert await look() == [("knowledge", False, True), ("other", False, True)]
    await database.raise_fence(UID, reason="Canceled")
    assert await look() == [("knowledge", True, True), ("other", False, True)]
    assert await look("other") == [("other", False, True)]
    await sql.execute("UPDATE document_versions SET swept_at = now() WHERE state = 'canceled'")
    await sql.execute("INSERT INTO sweeps (namespace, finished_at) VALUES ('knowledge', now())")
    assert await look("knowledge") == [("knowledge", False, False)]
    await sql.execute(
        "INSERT INTO knowledge_base_deletions (namespace, kb_id, task_uid, task_created_at, generation, deleted_at) "
        "VALUES ('third', 'kb', $1, now(), 1, now() - interval '2 minutes'), ('knowledge', 'kb', $1, now(), NULL, now())",
        str(uuid.uuid4()),
    )
    assert await look() == [("knowledge", False, False), ("other", False, True), ("third", True, True)]
    await sql.execute("UPDATE knowledge_base_deletions SET dropped_at = now()")
    assert (await look("third")) == [("third", False, True)]


# ------------------------------------------------------------------------------------------------- the whole operator


@pytest.fixture
def process(place: Place, cluster: Endpoints, url: str, tmp_path: Path) -> Callable[..., OperatorProcess]:
    def start(**environment: str) -> OperatorProcess:
        given = {"kubeconfig": cluster.kubeconfig, "namespaces": [place.namespace], "folder": tmp_path}
        return OperatorProcess(**(given | {"OPERATOR_POSTGRES_URL": url} | environment))  # type: ignore[arg-type]  # see given

    return start


Start = Callable[..., OperatorProcess]


async def _row(sql: "asyncpg.Connection[Any]", uid: str) -> Any:
    return await sql.fetchrow("SELECT * FROM tasks WHERE uid = $1", uid)


async def test_a_result_outlives_message_and_pod(place: Place, process: Start, sql: "asyncpg.Connection[Any]") -> None:
    async with process().at_work(), Kubelet(place, outcomes={1: SUCCESS}, messages=False).at_work():
        uid = (await place.create())["metadata"]["uid"]
        await _store_result(sql, SUCCESS, uid=uid)
        status = await place.wait_for("Completed")
        assert status["result"] == {"documents": 1, "chunks": 87}

        async def projected() -> bool:
            row = await _row(sql, uid)
            return row is not None and row["phase"] == "Completed"

        await until("the end is in PostgreSQL", projected)
        assert json.loads((await _row(sql, uid))["result"]) == {"documents": 1, "chunks": 87}


async def test_a_success_that_nobody_can_tell_of_is_tried_again(place: Place, process: Start) -> None:
    async with process().at_work(), Kubelet(place, outcomes={1: SUCCESS}, messages=False).at_work():
        await place.create(retry={"limit": 0})
        status = await place.wait_for("Failed")
    assert status["error"]["reason"] == "ResultLost"


async def test_a_cancel_stands_as_soon_as_the_fence_does(
    place: Place, process: Start, sql: "asyncpg.Connection[Any]"
) -> None:
    async with process().at_work(), Kubelet(place, outcomes={1: None}).at_work():
        uid = (await place.create())["metadata"]["uid"]
        await place.wait_for("Processing")
        await place.edit(cancel=True)
        await place.wait_for("Canceled", seconds=10)
        assert await sql.fetchval("SELECT reason FROM task_fences WHERE task_uid = $1", uid) == "Canceled"

        async def gone() -> bool:
            return not await place.objects("jobs")

        await until("the Job is gone", gone)


async def test_a_cancel_after_the_commit_completes_the_task(
    place: Place, process: Start, sql: "asyncpg.Connection[Any]"
) -> None:
    kubelet = Kubelet(place, outcomes={1: None})
    async with process().at_work(), kubelet.at_work():
        uid = (await place.create())["metadata"]["uid"]
        await place.wait_for("Processing")
        await _store_result(sql, SUCCESS, uid=uid)
        await place.edit(cancel=True)
        kubelet.outcomes = {1: SUCCESS}
        status = await place.wait_for("Completed")
    assert status["result"] == {"documents": 1, "chunks": 87}
    assert await sql.fetchval("SELECT count(*) FROM task_fences") == 0


async def test_a_task_deleted_while_it_runs_is_fenced_and_its_row_stays(
    place: Place, process: Start, sql: "asyncpg.Connection[Any]"
) -> None:
    async with process().at_work(), Kubelet(place, outcomes={1: None}).at_work():
        uid = (await place.create())["metadata"]["uid"]
        await place.wait_for("Processing")
        await place.kube.do("DELETE", place.path("processingtasks", "handbook"))

        async def marked() -> bool:
            row = await _row(sql, uid)
            fence = await sql.fetchval("SELECT reason FROM task_fences WHERE task_uid = $1", uid)
            return row is not None and row["deleted_at"] is not None and fence == "Deleted"

        await until("row and fence say so", marked, seconds=15)


async def test_a_task_deleted_while_the_operator_is_away_is_fenced_when_it_is_back(
    place: Place, process: Start, sql: "asyncpg.Connection[Any]"
) -> None:
    operator = process()
    async with operator.at_work(), Kubelet(place, outcomes={1: None}).at_work():
        uid = (await place.create())["metadata"]["uid"]
        await place.wait_for("Processing")

        async def projected() -> bool:
            row = await _row(sql, uid)
            return row is not None and row["phase"] == "Processing"

        await until("the task is in PostgreSQL", projected)
        operator.kill()
        await place.kube.do("DELETE", place.path("processingtasks", "handbook"))
        operator.start()

        async def marked() -> bool:
            fence = await sql.fetchval("SELECT reason FROM task_fences WHERE task_uid = $1", uid)
            return fence == "Deleted" and (await _row(sql, uid))["deleted_at"] is not None

        await until("row and fence say so", marked, seconds=20)


async def test_what_a_task_has_begun_is_swept_when_the_operator_comes_back_after_it_was_deleted(
    place: Place, process: Start, sql: "asyncpg.Connection[Any]"
) -> None:
    operator = process()
    async with operator.at_work(), Kubelet(place, outcomes={1: None}).at_work():
        uid = (await place.create())["metadata"]["uid"]
        await place.wait_for("Processing")
        await _intent(sql, namespace=place.namespace, uid=uid)

        async def sweeps() -> list[str]:
            names = [job["metadata"]["name"] for job in await place.objects("jobs")]
            return [name for name in names if name.startswith("processing-task-sweep-")]

        assert not await sweeps(), "the task is at work"
        operator.kill()
        await place.kube.do("DELETE", place.path("processingtasks", "handbook"))
        operator.start()

        async def swept() -> bool:
            return bool(await sweeps())

        await until("a Job sweeps", swept, seconds=60)
        assert await sql.fetchval("SELECT state FROM document_versions WHERE task_uid = $1", uid) == "canceled"

        async def counted() -> bool:
            return "task_operator_sweep_jobs_total 1.0" in (await operator.get("/metrics"))[1]

        await until("it is counted", counted)


async def test_a_ttl_waits_for_the_row(place: Place, process: Start, sql: "asyncpg.Connection[Any]") -> None:
    async with process().at_work(), Kubelet(place).at_work():
        uid = (await place.create(ttlSecondsAfterFinished=1))["metadata"]["uid"]

        async def gone() -> bool:
            return await place.task() is None

        await until("the task is gone", gone, seconds=30)
        row = await _row(sql, uid)
        assert row["phase"] == "Completed"


async def test_the_table_is_made_again_from_the_tasks_while_the_operator_runs_and_when_it_starts(
    place: Place, process: Start, sql: "asyncpg.Connection[Any]"
) -> None:
    operator = process(OPERATOR_RESYNC_SECONDS="2")

    async def rows() -> dict[str, str]:
        found = await sql.fetch("SELECT name, phase FROM tasks WHERE deleted_at IS NULL")
        return {row["name"]: row["phase"] for row in found}

    async def whole() -> bool:
        return await rows() == {"done": "Completed", "waits": "Queued"}

    async with operator.at_work(), Kubelet(place).at_work():
        await place.create("done")
        await place.create("waits", suspend=True)
        await place.wait_for("Completed", name="done")
        await until("both are in PostgreSQL", whole)
        before = await sql.fetchval("SELECT result FROM tasks WHERE name = 'done'")
        await sql.execute("TRUNCATE tasks")
        await until("both are there again, by the resync", whole, seconds=20)
        assert await sql.fetchval("SELECT result FROM tasks WHERE name = 'done'") == before
        operator.kill()
        await sql.execute("TRUNCATE tasks")
        operator.start()
        await until("both are there again, by the start", whole, seconds=30)
        # A row of a version that the API server never had, as after it was restored from a backup.
        await sql.execute("UPDATE tasks SET resource_version = resource_version + 1000000, phase = 'Lost'")
        await until("the list wins", whole, seconds=20)
        path = place.path("processingtasks", "waits")
        await place.kube.do("PATCH", path, {"spec": {"suspend": False}}, content_type="application/merge-patch+json")

        async def completed() -> bool:
            return await rows() == {"done": "Completed", "waits": "Completed"}

        await until("what happens after it is told too", completed, seconds=30)


async def test_progress_from_redis_gets_into_the_status_at_most_once_a_second(
    place: Place, process: Start, cluster: Endpoints, stores: Endpoints, tmp_path: Path
) -> None:
    proxy = Proxy(Access.from_kubeconfig(cluster.kubeconfig), folder=tmp_path)
    await proxy.start()
    redis_url = stores.host_urls["TASKS_REDIS_URL"]
    redis: Redis = Redis.from_url(redis_url)
    kubelet = Kubelet(place, outcomes={1: None})
    operator = process(kubeconfig=proxy.kubeconfig, OPERATOR_REDIS_URL=redis_url)
    async with operator.at_work(), kubelet.at_work():
        uid = (await place.create())["metadata"]["uid"]
        await place.wait_for("Processing")
        before = len(proxy.writes)
        await redis.publish(PROGRESS_CHANNEL, "no event")
        started = asyncio.get_running_loop().time()
        for percent in range(1, 91):
            event = progress_event(
                uid=uid,
                namespace=place.namespace,
                name="handbook",
                attempt=1,
                stage=Stage.EMBED,
                progress=percent,
                at=at(percent),
            )
            await redis.publish(PROGRESS_CHANNEL, event)
            await asyncio.sleep(0.02)

        async def caught_up() -> bool:
            status = await place.status()
            return (status.get("stage"), status.get("progress")) == ("embed", 90)

        await until("the last progress is in the status", caught_up)
        took = asyncio.get_running_loop().time() - started
        assert 1 <= len(proxy.writes) - before <= took + 1
    await redis.aclose()
    await proxy.aclose()
