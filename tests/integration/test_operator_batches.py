"""Batches with a real API server, its Job controller and a real PostgreSQL: which Job follows on which, and how they end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest

from task_contract.batches import read_shards
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Failure
from task_contract.names import ATTEMPT_LABEL
from task_operator.jobs import INDEX_ANNOTATION
from task_operator.observation import Batch, FenceState
from task_operator.projection import Database
from tests.support.operator_lab import Kubelet, OperatorProcess, Place, until
from tests.support.operator_values import UID

pytestmark = pytest.mark.integration

Start = Callable[..., OperatorProcess]
DONE = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=1)
DOCUMENTS = 8


def _ended(kind: Outcome, reason: str, *, retryable: bool = True) -> AttemptOutcome:
    error = Failure(reason=reason, message=f"cannot go on: {reason}", retryable=retryable)
    return AttemptOutcome(outcome=kind, attempt=1, reason=reason, error=error)


CRASHED = _ended(Outcome.FAILED, "ParserCrashed")
NO_STORE = _ended(Outcome.GIVEN_BACK, "StoreUnavailable")
EMPTY = _ended(Outcome.FAILED, "DocumentNotFound", retryable=False)


async def _list(sql: "asyncpg.Connection[Any]", uid: str, *, shards: int = 4) -> None:
    """List the documents of a batch as its first pod does: two in each shard."""
    await sql.execute("INSERT INTO batches (task_uid, total) VALUES ($1, $2) ON CONFLICT DO NOTHING", uid, DOCUMENTS)
    await sql.execute(
        "INSERT INTO batch_documents (task_uid, ordinal, shard, file_path, document_id) SELECT $1, number, "
        "(number - 1) % $2, number || '.md', number || '.md' FROM generate_series(1, $3) AS number ON CONFLICT DO NOTHING",
        uid,
        shards,
        DOCUMENTS,
    )


async def _finish(sql: "asyncpg.Connection[Any]", uid: str, shard: int) -> None:
    await sql.execute(
        "UPDATE batch_documents SET state = 'done', reason = 'Completed', chunks = 2, embedded = 2, reused = 0 "
        "WHERE task_uid = $1 AND shard = $2",
        uid,
        shard,
    )


@dataclass
class Runners:
    """Plays the runners of a batch: each shard of each attempt ends as it is told to, or publishes its documents."""

    sql: "asyncpg.Connection[Any]"
    uid: str = ""
    script: Mapping[tuple[int, int], AttemptOutcome | None] = field(default_factory=dict)
    """(attempt, shard) → how it ends; None: it goes on running."""
    ran: list[tuple[int, int]] = field(default_factory=list)
    """(attempt, shard) of those that ended."""
    lists: bool = True

    async def ends(self, pod: Mapping[str, Any]) -> AttemptOutcome | None:
        attempt = int(pod["metadata"]["labels"][ATTEMPT_LABEL])
        environment = {one["name"]: one.get("value") for one in pod["spec"]["containers"][0]["env"]}
        shard = read_shards(environment["TASKS_SHARDS"])[int(pod["metadata"]["annotations"][INDEX_ANNOTATION])]
        if self.lists:
            await _list(self.sql, self.uid)
        outcome = self.script.get((attempt, shard), DONE)
        if outcome is DONE:
            await _finish(self.sql, self.uid, shard)
        if outcome is not None:
            self.ran.append((attempt, shard))
        return outcome


async def _create(place: Place, **spec: Any) -> str:
    files = [f"/data/{number}.md" for number in range(DOCUMENTS)]
    payload = {"filePaths": files, "parallelism": 4, **spec.pop("payload", {})}
    made = await place.create("manuals", type="batch_processing", payload=payload, **spec)
    uid: str = made["metadata"]["uid"]
    return uid


@pytest.fixture
def runners(sql: "asyncpg.Connection[Any]") -> Runners:
    return Runners(sql)


def _kubelet(place: Place, runners: Runners) -> Kubelet:
    return Kubelet(place, ends=runners.ends)


async def _started(place: Place, runners: Runners, **spec: Any) -> None:
    runners.uid = await _create(place, **spec)


async def test_a_batch_runs_as_one_indexed_job(place: Place, process: Start, url: str, runners: Runners) -> None:
    async with process(OPERATOR_POSTGRES_URL=url).at_work(), _kubelet(place, runners).at_work():
        await _started(place, runners)
        status = await place.wait_for("Completed", name="manuals")
        [job] = await place.objects("jobs")
    assert status["result"] == {
        "documents": 8,
        "documentsTotal": 8,
        "documentsFailed": 0,
        "chunks": 16,
        "embedded": 16,
        "reused": 0,
    }
    assert sorted(runners.ran) == [(1, 0), (1, 1), (1, 2), (1, 3)]
    assert (job["spec"]["completionMode"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Indexed", 4, 4)
    assert job["metadata"]["annotations"]["tasks.zzdsj.io/shards"] == "0-3"


async def test_the_next_attempt_is_for_the_shards_that_failed(
    place: Place, process: Start, url: str, runners: Runners
) -> None:
    runners.script = {(1, 1): CRASHED, (1, 3): CRASHED}
    async with process(OPERATOR_POSTGRES_URL=url).at_work(), _kubelet(place, runners).at_work():
        await _started(place, runners)
        status = await place.wait_for("Completed", name="manuals")
    assert [(one["number"], one["reason"]) for one in status["attempts"]] == [(1, "ParserCrashed"), (2, "Succeeded")]
    assert sorted(runners.ran) == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 1), (2, 3)]


async def test_shards_that_were_handed_back_cost_no_attempt_and_those_that_are_done_stay_so(
    place: Place, process: Start, url: str, runners: Runners
) -> None:
    runners.script = {(1, 0): NO_STORE, (1, 2): NO_STORE}
    async with process(OPERATOR_POSTGRES_URL=url).at_work(), _kubelet(place, runners).at_work():
        await _started(place, runners, retry={"limit": 0})
        waits = await place.wait_for("Queued", name="manuals", reason="StoreUnavailable")
        assert "attempts" not in waits or waits["attempts"] == []
        runners.script = {}
        status = await place.wait_for("Completed", name="manuals")
    assert [(one["number"], one["reason"]) for one in status["attempts"]] == [(1, "Succeeded")]
    assert sorted(runners.ran) == [(1, 0), (1, 0), (1, 1), (1, 2), (1, 2), (1, 3)]


async def test_after_the_last_attempt_the_documents_decide(
    place: Place, process: Start, url: str, runners: Runners, sql: "asyncpg.Connection[Any]"
) -> None:
    runners.script = {(1, 1): CRASHED}
    async with process(OPERATOR_POSTGRES_URL=url).at_work(), _kubelet(place, runners).at_work():
        await _started(place, runners, retry={"limit": 0})
        status = await place.wait_for("Failed", name="manuals")
    assert status["error"]["reason"] == "BatchFailed"
    assert "2 of 8 documents failed: ParserCrashed 2 (2.md" in status["error"]["message"]
    assert (status["result"]["documents"], status["result"]["documentsFailed"]) == (6, 2)
    assert await sql.fetchval("SELECT count(*) FROM task_fences WHERE task_uid = $1", runners.uid) == 1


async def test_with_enough_patience_the_same_is_a_success(place: Place, process: Start, url: str, runners: Runners) -> None:
    runners.script = {(1, 1): CRASHED}
    async with process(OPERATOR_POSTGRES_URL=url).at_work(), _kubelet(place, runners).at_work():
        await _started(place, runners, retry={"limit": 0}, payload={"maxFailedPercent": 25})
        status = await place.wait_for("Completed", name="manuals")
    succeeded = next(one for one in status["conditions"] if one["type"] == "Succeeded")
    assert (succeeded["reason"], status["result"]["documentsFailed"]) == ("PartiallyFailed", 2)
    assert "2 of 8 documents failed" in succeeded["message"]


async def test_what_is_wrong_with_the_whole_batch_ends_it_at_once(
    place: Place, process: Start, url: str, runners: Runners
) -> None:
    runners.lists = False
    runners.script = {(1, 0): None, (1, 1): EMPTY, (1, 2): None, (1, 3): None}
    async with process(OPERATOR_POSTGRES_URL=url).at_work(), _kubelet(place, runners).at_work():
        await _started(place, runners)
        # The Job controller deletes the other pods, and this kubelet ends none that is being deleted: they go by force.
        await until("a shard has ended", lambda: _truth(runners.ran))

        async def ended() -> bool:
            for pod in await place.objects("pods"):
                if pod["metadata"].get("deletionTimestamp"):
                    path = place.path("pods", pod["metadata"]["name"])
                    await place.kube.ask("DELETE", path, {"gracePeriodSeconds": 0})
            return bool((await place.status("manuals"))["phase"] == "Failed")

        await until("the task has failed", ended)
        status = await place.status("manuals")
    assert (status["error"]["reason"], status["attempt"]) == ("DocumentNotFound", 1)


async def _truth(what: object) -> bool:
    return bool(what)


async def test_a_cancel_keeps_what_was_published_and_says_how_much(
    place: Place, process: Start, url: str, runners: Runners
) -> None:
    runners.script = {(1, 1): None, (1, 2): None, (1, 3): None}
    async with process(OPERATOR_POSTGRES_URL=url).at_work(), _kubelet(place, runners).at_work():
        await _started(place, runners)
        await until("a shard is done", lambda: _truth(runners.ran))
        await place.edit("manuals", cancel=True)
        status = await place.wait_for("Canceled", name="manuals", seconds=15)
    assert (status["result"]["documents"], status["result"]["documentsTotal"]) == (2, 8)


async def test_a_job_that_was_deleted_is_followed_by_one_for_what_is_left(
    place: Place, process: Start, url: str, runners: Runners
) -> None:
    runners.script = {(1, 1): None, (1, 2): None, (1, 3): None}
    async with process(OPERATOR_POSTGRES_URL=url).at_work(), _kubelet(place, runners).at_work():
        await _started(place, runners)
        await place.wait_for("Processing", name="manuals")
        await until("a shard is done", lambda: _truth(runners.ran))
        [job] = await place.objects("jobs")
        body = {"propagationPolicy": "Background"}
        await place.kube.do("DELETE", place.path("jobs", job["metadata"]["name"]), body)
        status = await place.wait_for("Completed", name="manuals")
    assert [(one["number"], one["reason"]) for one in status["attempts"]] == [(1, "JobDeleted"), (2, "Succeeded")]
    assert sorted(runners.ran) == [(1, 0), (2, 1), (2, 2), (2, 3)]


async def test_a_suspended_batch_goes_on_with_what_is_left(place: Place, process: Start, url: str, runners: Runners) -> None:
    runners.script = {(1, 3): None}
    async with process(OPERATOR_POSTGRES_URL=url).at_work(), _kubelet(place, runners).at_work():
        await _started(place, runners)
        await place.wait_for("Processing", name="manuals")

        async def three() -> bool:
            return len(runners.ran) == 3

        await until("three shards are done", three)
        await place.edit("manuals", suspend=True)
        await place.wait_for("Queued", name="manuals", reason="Suspended")
        runners.script = {}
        await place.edit("manuals", suspend=False)
        await place.wait_for("Completed", name="manuals")
    assert runners.ran.count((1, 3)) == 1
    assert len(runners.ran) == 4


async def test_an_operator_that_died_between_two_attempts_goes_on_with_what_is_left(
    place: Place, process: Start, url: str, runners: Runners
) -> None:
    runners.script = {(1, 2): CRASHED}
    operator = process(OPERATOR_POSTGRES_URL=url)
    async with _kubelet(place, runners).at_work():
        async with operator.at_work():
            await _started(place, runners)
            await place.wait_for("Processing", name="manuals")
        # Killed. The Job ends, and goes, while nobody looks.
        await until("all shards have ended", lambda: _truth(len(runners.ran) == 4))
        [job] = await place.objects("jobs")
        await place.kube.do("DELETE", place.path("jobs", job["metadata"]["name"]), {"propagationPolicy": "Background"})
        async with process(OPERATOR_POSTGRES_URL=url).at_work():
            status = await place.wait_for("Completed", name="manuals")
    assert status["result"]["documents"] == 8
    assert runners.ran[4:] == [(2, 2)]


# ----------------------------------------------------------------------------------------------------------- PostgreSQL


async def test_a_batch_is_counted_as_it_stands(database: Database, sql: "asyncpg.Connection[Any]") -> None:
    assert await database.batch(UID) == Batch()
    await _list(sql, UID)
    await _finish(sql, UID, 0)
    await sql.execute(
        "UPDATE batch_documents SET state = 'failed', reason = 'DocumentEmpty', message = 'no text' "
        "WHERE task_uid = $1 AND shard = 2",
        UID,
    )
    await sql.execute(
        "UPDATE batch_documents SET state = 'done', reason = 'Duplicate' WHERE task_uid = $1 AND ordinal = 4", UID
    )
    assert await database.batch(UID) == Batch(
        total=8,
        pending=3,
        failed=2,
        published=2,
        chunks=4,
        embedded=4,
        reused=0,
        shards=(1, 3),
        failures=("DocumentEmpty 2 (3.md: no text)",),
    )


async def test_settling_fails_what_is_left_but_not_what_was_published(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    await _list(sql, UID, shards=1)
    await sql.execute("INSERT INTO knowledge_bases VALUES ('n', 'kb', 1, 'm', 2)")
    await sql.execute(
        "INSERT INTO documents (namespace, kb_id, document_id) VALUES ('n', 'kb', '1.md'), ('n', 'kb', '2.md')"
    )
    await sql.execute(
        "INSERT INTO document_versions (namespace, kb_id, document_id, version, task_uid, task_created_at, state, holder, "
        "chunk_count) VALUES ('n', 'kb', '1.md', 1, $1, now(), 'published', 'pod', 5), "
        "('n', 'kb', '2.md', 1, $1, now(), 'intent', 'pod', NULL)",
        UID,
    )
    await sql.execute(
        "UPDATE batch_documents SET reason = 'ParserCrashed', message = 'killed', begun = 1 "
        "WHERE task_uid = $1 AND ordinal = 3",
        UID,
    )

    batch = await database.settle_batch(UID, reason="OOMKilled", message="out of memory")

    assert (batch.pending, batch.failed, batch.published, batch.chunks, batch.shards) == (0, 7, 1, 5, ())
    rows = await sql.fetch("SELECT ordinal, reason, message FROM batch_documents WHERE state = 'failed' ORDER BY ordinal")
    found = {row["ordinal"]: (row["reason"], row["message"]) for row in rows}
    assert found[3] == ("ParserCrashed", "killed")
    assert found[8] == ("OOMKilled", "its turn did not come: out of memory")
    states = await sql.fetch("SELECT document_id, state FROM document_versions ORDER BY 1")
    assert [tuple(row) for row in states] == [("1.md", "published"), ("2.md", "canceled")]
    assert await sql.fetchval("SELECT reason FROM task_fences WHERE task_uid = $1", UID) == "OOMKilled"
    assert await database.settle_batch(UID, reason="OOMKilled", message="out of memory") == batch


@pytest.mark.parametrize(("left", "state"), [(1, FenceState.RAISED), (0, FenceState.COMMITTED)])
async def test_a_batch_has_committed_when_all_its_documents_have_ended(
    database: Database, sql: "asyncpg.Connection[Any]", left: int, state: FenceState
) -> None:
    await _list(sql, UID)
    for shard in range(4 - left):
        await _finish(sql, UID, shard)
    assert (await database.release(UID)).state is state
    assert (await database.raise_fence(UID, reason="Canceled")).state is state


async def test_the_documents_of_a_batch_go_with_the_history_of_its_task(
    database: Database, sql: "asyncpg.Connection[Any]"
) -> None:
    await _list(sql, UID)
    await sql.execute(
        "INSERT INTO tasks (uid, namespace, name, type, priority, phase, spec, created_at, deleted_at, generation, "
        "resource_version) VALUES ($1, 'n', 'a', 'batch_processing', 'normal', 'Completed', '{}', now(), now(), 1, 1)",
        UID,
    )
    before = await sql.fetchval("SELECT now() + interval '1 minute'")
    assert await database.expire(before=before, most=10) == 1
    assert await sql.fetchval("SELECT count(*) FROM batch_documents") == 0
