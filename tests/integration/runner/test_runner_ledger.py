"""The ledger on a real PostgreSQL: numbers, epochs, fences, and the order of tasks."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from job_runner.index import Stale
from job_runner.ledger import Claim, Commit, Ended, Ledger, Standing
from task_contract.errors import Fenced, ModelMismatch, StoreUnavailable
from task_contract.messages import AttemptOutcome, Outcome
from task_operator.metrics import Metrics
from task_operator.observation import FenceState
from task_operator.projection import Database

pytestmark = pytest.mark.integration

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
async def ledger(database: str) -> AsyncIterator[Ledger]:
    ledger = Ledger(database)
    yield ledger
    await ledger.aclose()


@pytest.fixture
async def sql(database: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


def claim(kb_id: str | None = None, *, at: int = 0, content: str = "content", **changes: Any) -> Claim:
    """A claim of a new task; ``at`` is seconds after noon."""
    return replace(
        Claim(
            namespace="test",
            kb_id=kb_id or f"kb-{uuid.uuid4().hex[:12]}",
            document_id="handbook",
            task_uid=uuid.uuid4(),
            task_created_at=NOON + timedelta(seconds=at),
            holder=f"pod-{uuid.uuid4().hex[:6]}",
            content_hash=content,
            model_fingerprint="model-a",
            dimension=8,
        ),
        **changes,
    )


def later(first: Claim, *, at: int, content: str = "other content") -> Claim:
    """Another task on the same document."""
    return claim(first.kb_id, at=at, content=content)


async def published(ledger: Ledger, of: Claim) -> int | None:
    found = await ledger.published(namespace=of.namespace, kb_id=of.kb_id, document_ids=[of.document_id])
    return found.get(of.document_id)


async def test_a_version_is_visible_once_it_is_committed(ledger: Ledger) -> None:
    first = claim()
    intent = await ledger.begin(first)
    assert (intent.standing, intent.version, intent.epoch, intent.resumed) == (Standing.WORK, 1, 1, False)
    assert intent.published is None
    assert await published(ledger, first) is None
    assert await ledger.is_empty(namespace=first.namespace, kb_id=first.kb_id)
    assert await ledger.commit(intent, chunk_count=3) is Commit.DONE
    assert await published(ledger, first) == 1
    assert not await ledger.is_empty(namespace=first.namespace, kb_id=first.kb_id)
    second = await ledger.begin(later(first, at=1))
    assert (second.standing, second.version) == (Standing.WORK, 2)
    assert second.published is not None
    assert (second.published.version, second.published.chunk_count) == (1, 3)


async def test_a_retry_keeps_its_number_and_fences_the_earlier_pod(ledger: Ledger) -> None:
    first = claim()
    zombie = await ledger.begin(first)
    retry = await ledger.begin(replace(first, holder="second pod"))
    assert (retry.version, retry.epoch, retry.resumed) == (1, 2, True)
    with pytest.raises(Fenced, match="another pod has taken over"):
        await ledger.commit(zombie, chunk_count=1)
    assert await published(ledger, first) is None
    assert await ledger.commit(retry, chunk_count=1) is Commit.DONE


async def test_the_same_pod_twice_is_told_apart_by_the_epoch(ledger: Ledger) -> None:
    first = claim()
    zombie = await ledger.begin(first)
    retry = await ledger.begin(first)
    with pytest.raises(Fenced):
        await ledger.commit(zombie, chunk_count=1)
    assert await ledger.commit(retry, chunk_count=1) is Commit.DONE


async def test_a_retry_with_other_content_takes_another_number(ledger: Ledger) -> None:
    first = claim()
    zombie = await ledger.begin(first)
    retry = await ledger.begin(replace(first, content_hash="the file was replaced"))
    assert (retry.version, retry.resumed) == (2, False)
    with pytest.raises(Fenced):
        await ledger.commit(zombie, chunk_count=1)
    assert await ledger.commit(retry, chunk_count=1) is Commit.DONE


async def test_a_retry_after_the_commit_finds_its_own_version(ledger: Ledger) -> None:
    first = claim()
    await ledger.commit(await ledger.begin(first), chunk_count=2)
    retry = await ledger.begin(replace(first, content_hash="whatever the file is now"))
    assert retry.standing is Standing.PUBLISHED
    assert retry.published is not None
    assert (retry.published.version, retry.published.chunk_count) == (1, 2)


async def test_of_two_pods_that_commit_at_once_one_wins(ledger: Ledger) -> None:
    first = claim()
    one = await ledger.begin(first)
    two = await ledger.begin(replace(first, holder="second pod"))
    ended = await asyncio.gather(
        ledger.commit(one, chunk_count=1), ledger.commit(two, chunk_count=1), return_exceptions=True
    )
    assert isinstance(ended[0], Fenced)
    assert ended[1] is Commit.DONE
    with pytest.raises(Fenced):
        await ledger.commit(two, chunk_count=1)


async def test_a_raised_fence_stops_begin_and_commit(ledger: Ledger, sql: Any) -> None:
    first = claim()
    intent = await ledger.begin(first)
    await sql.execute("INSERT INTO task_fences (task_uid, reason) VALUES ($1, 'Canceled')", first.task_uid)
    with pytest.raises(Fenced, match="canceled"):
        await ledger.commit(intent, chunk_count=1)
    with pytest.raises(Fenced, match="canceled"):
        await ledger.begin(first)
    assert await published(ledger, first) is None


async def test_a_commit_waits_for_the_operator_that_is_raising_the_fence(ledger: Ledger, sql: Any) -> None:
    first = claim()
    intent = await ledger.begin(first)
    async with sql.transaction():
        await sql.execute("SELECT pg_advisory_xact_lock(hashtextextended($1::uuid::text, 0))", first.task_uid)
        commit = asyncio.create_task(ledger.commit(intent, chunk_count=1))
        other = claim()
        await ledger.commit(await ledger.begin(other), chunk_count=1)  # of another task: does not wait
        assert not commit.done()
        await sql.execute("INSERT INTO task_fences (task_uid, reason) VALUES ($1, 'Canceled')", first.task_uid)
    with pytest.raises(Fenced):
        await commit


@pytest.mark.parametrize("state", ["canceled"])
async def test_a_version_that_the_operator_canceled_is_fenced(ledger: Ledger, sql: Any, state: str) -> None:
    first = claim()
    intent = await ledger.begin(first)
    await sql.execute(
        "UPDATE document_versions SET state = $2, epoch = epoch + 1 WHERE task_uid = $1", first.task_uid, state
    )
    with pytest.raises(Fenced):
        await ledger.commit(intent, chunk_count=1)
    with pytest.raises(Fenced):
        await ledger.begin(first)


async def test_the_operator_takes_an_intent_from_a_pod_that_does_not_stop(ledger: Ledger, database: str) -> None:
    operator = Database(database, metrics=Metrics())
    await operator.warm_up()
    first = claim()
    uid = str(first.task_uid)
    lost = await ledger.begin(first)
    assert (await operator.release(uid)).state is FenceState.RAISED
    assert (await operator.release(uid)).state is FenceState.RAISED

    with pytest.raises(Fenced):
        await ledger.commit(lost, chunk_count=3)
    elsewhere = await ledger.begin(replace(first, holder="pod-elsewhere"))
    assert elsewhere.version == lost.version
    assert await ledger.commit(elsewhere, chunk_count=3) is Commit.DONE

    assert (await operator.release(uid)).state is FenceState.COMMITTED
    assert await published(ledger, first) == 1
    await operator.aclose()


async def test_an_older_task_is_superseded_at_its_begin(ledger: Ledger) -> None:
    new = claim(at=10)
    await ledger.commit(await ledger.begin(new), chunk_count=1)
    old = later(new, at=5)
    for _ in range(2):  # again, as a retry
        intent = await ledger.begin(old)
        assert intent.standing is Standing.SUPERSEDED
    assert await published(ledger, new) == 1


async def test_an_older_task_is_superseded_at_its_commit(ledger: Ledger) -> None:
    new = claim(at=10)
    old_intent = await ledger.begin(later(new, at=5))
    new_intent = await ledger.begin(new)
    assert await ledger.commit(new_intent, chunk_count=1) is Commit.DONE
    assert await ledger.commit(old_intent, chunk_count=1) is Commit.SUPERSEDED
    assert await published(ledger, new) == 2


async def test_of_one_second_the_later_begin_is_the_newer(ledger: Ledger) -> None:
    one = claim(at=5)
    two = later(one, at=5)
    first, second = await ledger.begin(one), await ledger.begin(two)
    assert await ledger.commit(second, chunk_count=1) is Commit.DONE
    assert await ledger.commit(first, chunk_count=1) is Commit.SUPERSEDED
    three = later(one, at=5, content="third")
    assert await ledger.commit(await ledger.begin(three), chunk_count=1) is Commit.DONE


async def test_a_newer_task_that_was_overtaken_begins_again_with_a_higher_number(ledger: Ledger) -> None:
    new = claim(at=10)
    new_intent = await ledger.begin(new)
    old_intent = await ledger.begin(later(new, at=5))
    assert await ledger.commit(old_intent, chunk_count=1) is Commit.DONE
    assert await ledger.commit(new_intent, chunk_count=1) is Commit.AGAIN
    again = await ledger.begin(new)
    assert (again.standing, again.version) == (Standing.WORK, 3)
    assert not again.resumed
    assert await ledger.commit(again, chunk_count=1) is Commit.DONE
    assert await published(ledger, new) == 3


async def test_unchanged_content_is_confirmed_and_counts_as_the_newest(ledger: Ledger) -> None:
    first = claim(at=0)
    await ledger.commit(await ledger.begin(first), chunk_count=1)
    same = later(first, at=10, content="content")
    intent = await ledger.begin(same)
    assert intent.standing is Standing.UNCHANGED
    assert await ledger.confirm(intent) is Commit.DONE
    assert await published(ledger, first) == 1
    between = await ledger.begin(later(first, at=5))
    assert between.standing is Standing.SUPERSEDED


async def test_a_confirmation_whose_version_was_replaced_begins_again(ledger: Ledger) -> None:
    first = claim(at=0)
    await ledger.commit(await ledger.begin(first), chunk_count=1)
    intent = await ledger.begin(later(first, at=10, content="content"))
    await ledger.commit(await ledger.begin(later(first, at=5)), chunk_count=1)
    assert await ledger.confirm(intent) is Commit.AGAIN


async def test_a_retry_after_a_confirmation_takes_another_number(ledger: Ledger) -> None:
    """A sweep may have called the first one stale: rows that the retry writes again must not be among them."""
    first = claim(at=0)
    await ledger.commit(await ledger.begin(first), chunk_count=1)
    same = later(first, at=10, content="content")
    intent = await ledger.begin(same)
    await ledger.confirm(intent)
    retry = await ledger.begin(replace(same, holder="second pod"))
    assert (intent.version, retry.version, retry.resumed) == (2, 3, False)
    assert retry.standing is Standing.UNCHANGED


async def test_a_deletion_is_a_version_of_no_chunks(ledger: Ledger) -> None:
    first = claim(at=0)
    await ledger.commit(await ledger.begin(first), chunk_count=3)
    deletion = Claim.to_delete(
        namespace=first.namespace,
        kb_id=first.kb_id,
        document_id=first.document_id,
        task_uid=uuid.uuid4(),
        task_created_at=NOON + timedelta(seconds=10),
        holder="pod",
    )
    intent = await ledger.begin(deletion)
    assert (intent.standing, intent.version) == (Standing.WORK, 2)
    assert await ledger.commit(intent, chunk_count=0) is Commit.DONE
    assert await ledger.replaced_any(deletion, 2)
    assert await ledger.is_empty(namespace=first.namespace, kb_id=first.kb_id)
    assert (await ledger.begin(deletion)).standing is Standing.PUBLISHED
    assert (await ledger.begin(later(first, at=5))).standing is Standing.SUPERSEDED
    again = replace(deletion, task_uid=uuid.uuid4(), task_created_at=NOON + timedelta(seconds=20))
    assert (await ledger.begin(again)).standing is Standing.UNCHANGED
    newer = await ledger.begin(later(first, at=30))
    assert newer.standing is Standing.WORK
    assert await ledger.commit(newer, chunk_count=1) is Commit.DONE


async def test_what_is_stale_leaves_out_what_is_published_and_what_is_being_written(ledger: Ledger, sql: Any) -> None:
    namespace = f"stale-{uuid.uuid4().hex[:8]}"
    first = claim(at=0, namespace=namespace)
    await ledger.commit(await ledger.begin(first), chunk_count=1)
    dead, alive = (claim(first.kb_id, at=at, content=str(at), namespace=namespace) for at in (1, 2))
    for one in (dead, alive):
        await ledger.begin(one)
    assert await ledger.stale(namespace=namespace, since=None) == [], "every number is somebody's"
    [would] = await ledger.stale(namespace=namespace, since=None, dead=[dead.task_uid])
    assert would.stale.keep == (1, 3)
    assert await ledger.bury([dead.task_uid]) == 1
    [after] = await ledger.stale(namespace=namespace, since=NOON + timedelta(days=36_500))
    assert (after.stale, after.dead) == (would.stale, (2,)), "it was never swept, however old it is"
    assert would.stale == Stale("handbook", up_to=3, keep=(1, 3))
    await ledger.swept(namespace=namespace, kb_id=first.kb_id, documents=[after])
    assert await ledger.stale(namespace=namespace, since=NOON + timedelta(days=36_500)) == []
    assert await sql.fetchval("SELECT count(*) FROM document_versions WHERE swept_at IS NOT NULL") == 1


async def test_another_model_is_refused(ledger: Ledger) -> None:
    first = claim()
    await ledger.begin(first)
    for changed in ({"model_fingerprint": "model-b"}, {"dimension": 16}):
        with pytest.raises(ModelMismatch, match="was filled with model model-a"):
            await ledger.begin(replace(later(first, at=1), **changed))


async def test_many_tasks_on_one_document_get_different_numbers(ledger: Ledger) -> None:
    first = claim()
    intents = await asyncio.gather(*(ledger.begin(later(first, at=number)) for number in range(16)))
    assert sorted(intent.version for intent in intents) == list(range(1, 17))


async def test_results_are_kept_and_a_success_stays(ledger: Ledger, sql: Any) -> None:
    uid = uuid.uuid4()
    failed = AttemptOutcome.of_error(StoreUnavailable("down"), attempt=1)
    done = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=1)
    fenced = AttemptOutcome.of_error(Fenced("late"), attempt=1)
    expected = [(failed, "GivenBack"), (fenced, "GivenBack"), (done, "Succeeded"), (failed, "Succeeded")]
    for outcome, kept in expected:
        await ledger.record([Ended(uid, "pod", outcome)])
        assert await sql.fetchval("SELECT outcome->>'outcome' FROM task_results WHERE task_uid = $1", uid) == kept


async def test_results_of_many_attempts_are_kept_together(ledger: Ledger, sql: Any) -> None:
    uids = [uuid.uuid4() for _ in range(3)]
    failed = AttemptOutcome.of_error(StoreUnavailable("down"), attempt=2)
    done = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=2)
    await ledger.record([])
    await ledger.record([Ended(uids[0], "a", done)])
    await ledger.record([*(Ended(uid, "b", failed) for uid in uids), Ended(uids[2], "c", done)])  # one of them twice
    rows = await sql.fetch("SELECT holder, outcome->>'outcome' AS kept FROM task_results WHERE task_uid = ANY($1)", uids)
    assert sorted(tuple(row) for row in rows) == [("a", "Succeeded"), ("b", "GivenBack"), ("c", "Succeeded")]


async def test_a_server_that_is_down_or_empty_is_unavailable(store_urls: dict[str, str]) -> None:
    with pytest.raises(StoreUnavailable, match=r"cannot connect in PostgreSQL.*check TASKS_POSTGRES_URL"):
        await Ledger("postgresql://nobody@127.0.0.1:9/none").check()
    empty = Ledger(store_urls["TASKS_POSTGRES_URL"].rsplit("/", 1)[0] + "/template1")
    with pytest.raises(StoreUnavailable, match="task_operator migrate"):
        await empty.check()
    await empty.aclose()
