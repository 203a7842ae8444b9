"""Workers of a pool as processes, on a real Redis and PostgreSQL: killed, paused, told to stop, cut off."""

import asyncio
import signal
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from job_runner.ledger import Ended, KeptVectors, Ledger
from task_contract.errors import Fenced
from task_contract.leases import ReportKind
from task_contract.lifecycle import ExitCode
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import ProcessingTask
from task_contract.names import PROGRESS_CHANNEL
from task_contract.vectors import INLINE
from tests.support.runner_lab import Lab
from tests.support.worker_lab import PoolLab, embedding, health_check, resume, suspend, until
from tests.support.worker_lab import task as task_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

OBEDIENT = "tests.support.slow_runner"


@pytest.fixture
async def pool(tmp_path: Path, database: str) -> AsyncIterator[PoolLab]:
    async with PoolLab.open(tmp_path, database) as pool:
        yield pool


async def running(pool: PoolLab, *tasks: ProcessingTask, attempt: int = 1) -> None:
    """Offer tasks and wait until a worker says that they run."""
    await pool.offer(*tasks, attempt=attempt)
    for task in tasks:
        await pool.report(task, ReportKind.RUNNING, attempt=attempt)


# ------------------------------------------------------------------------------------------------------------ the work


async def test_carries_out_what_is_offered_and_reports_it(pool: PoolLab) -> None:
    worker = pool.worker(pool_revision="r1")
    await pool.ready(worker)
    checked, embedded = health_check("postgres", "redis", "model"), embedding("one", "two")
    assert await pool.offer(checked, embedded, stamp="7") == [True, True]
    for task in (checked, embedded):
        report = await pool.report(task)
        assert report.outcome is not None
        assert report.outcome.outcome is Outcome.SUCCEEDED, report
        assert (report.worker, report.job, report.stamp) == (worker.name, f"{worker.name}-job", "7")
        assert report.offered_at is not None
        assert report.started_at is not None
        assert report.finished_at is not None
        assert report.offered_at <= report.started_at <= report.finished_at
        assert await pool.outcome(task) == report.outcome.model_dump(by_alias=True, exclude_none=True, mode="json")
    look = await pool.look()
    assert (look.leased, look.uids) == (0, frozenset())
    state = look.workers[worker.name].state
    assert (state.revision, state.capacity, state.ready, state.draining) == ("r1", 4, True, False)
    assert state.load_seconds > 0
    parts = await pool.fetch(
        "SELECT length(vectors) FROM task_vector_parts WHERE task_uid = $1", uuid.UUID(embedded.metadata.uid)
    )
    assert parts == 2 * 512 * 4


async def test_an_idle_worker_takes_a_task_at_once(pool: PoolLab) -> None:
    await pool.ready(pool.worker(module=OBEDIENT))
    waited = []
    for _ in range(10):
        task = health_check()
        await pool.offer(task)
        report = await pool.report(task)
        assert report.offered_at is not None
        assert report.started_at is not None
        waited.append((report.started_at - report.offered_at).total_seconds())
    assert sorted(waited)[4] < 0.1, waited


async def test_tasks_that_cannot_be_carried_out_are_reported_as_such(pool: PoolLab) -> None:
    await pool.ready(pool.worker(module=OBEDIENT))
    poison, good = embedding("fail here"), [embedding(f"good {number}") for number in range(3)]
    sick, batch = (
        health_check("milvus"),
        task_of(type="batch_processing", kbId="kb", payload={"documents": [{"filePath": "a"}]}),
    )
    other = health_check()
    other = other.model_copy(update={"metadata": other.metadata.model_copy(update={"uid": "no uuid"})})
    await pool.offer(poison, *good, sick, batch, other)
    for task in good:
        assert (await pool.report(task)).outcome == AttemptOutcome.parse(str(await _row(pool, task)))
    expected = [(poison, "InternalError"), (sick, "Unhealthy"), (batch, "InvalidTask"), (other, "InvalidTask")]
    for task, reason in expected:
        outcome = (await pool.report(task)).outcome
        assert outcome is not None
        assert (outcome.outcome, outcome.reason) == (Outcome.FAILED, reason)
        others = {one.metadata.uid for one, _ in expected} - {task.metadata.uid}
        assert not any(str(uid) in (outcome.log or "") for uid in others)  # a log is of its own attempt alone


async def _row(pool: PoolLab, task: ProcessingTask) -> object:
    return await pool.fetch("SELECT outcome FROM task_results WHERE task_uid = $1", uuid.UUID(task.metadata.uid))


async def test_texts_of_several_tasks_share_calls_of_the_model(pool: PoolLab) -> None:
    worker = pool.worker(module=OBEDIENT, pool_concurrency="16")
    await pool.ready(worker)
    tasks = [embedding(f"sleep 0.2 {number}") for number in range(16)]
    await pool.offer(*tasks)
    for task in tasks:
        outcome = (await pool.report(task)).outcome
        assert outcome is not None
        assert outcome.reason == "Completed"

    async def counted() -> bool:
        state = (await pool.look()).workers[worker.name].state
        return state.texts == 16 and state.tasks == 16 and state.calls < 16 and state.room == 64 * state.calls

    await until("the worker says how many calls it made", counted)


async def test_a_task_is_done_by_one_of_two_workers(pool: PoolLab) -> None:
    await pool.ready(pool.worker(module=OBEDIENT), pool.worker(module=OBEDIENT))
    tasks = [embedding(f"sleep 0.05 {number}") for number in range(40)]
    await pool.offer(*tasks)
    for task in tasks:
        await pool.report(task)
    ended = [one for one in pool.heard if one.kind is ReportKind.ENDED]
    assert len(ended) == 40
    assert len({one.worker for one in ended}) == 2


async def test_progress_and_running_are_told_while_an_attempt_lasts(pool: PoolLab) -> None:
    await pool.ready(pool.worker(module=OBEDIENT))
    client = pool.queue._redis
    async with client.pubsub() as channel:
        await channel.subscribe(PROGRESS_CHANNEL)
        task = embedding("sleep 3")
        await pool.offer(task)
        report = await pool.report(task, ReportKind.RUNNING)
        assert (report.outcome, report.finished_at) == (None, None)
        await pool.report(task)
        said: list[str] = []

        async def told() -> bool:
            message = await channel.get_message(timeout=0.1)
            said.extend([message["data"]] if message is not None and message["type"] == "message" else [])
            return any(f'"uid":"{task.metadata.uid}"' in text and '"stage":"embed"' in text for text in said)

        await until("progress is told", told)
    assert [one.kind for one in pool.heard] == [ReportKind.RUNNING, ReportKind.ENDED]


async def test_an_attempt_has_its_own_time(pool: PoolLab) -> None:
    await pool.ready(pool.worker(module=OBEDIENT))
    late, other = embedding("sleep 5", timeout="2s"), embedding("other")
    await pool.offer(late, other)
    outcome = (await pool.report(late)).outcome
    assert outcome is not None
    assert outcome.reason == "Timeout"
    outcome = (await pool.report(other)).outcome
    assert outcome is not None
    assert outcome.reason == "Completed"


# ------------------------------------------------------------------------------------------------------------- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_worker_ends_at_once_when_it_is_told_to(pool: PoolLab, number: int) -> None:
    worker = pool.worker(module=OBEDIENT)
    await pool.ready(worker)
    worker.send_signal(number)
    told_at = time.monotonic()
    assert await worker.ended() == ExitCode.HANDED_BACK
    assert time.monotonic() - told_at < 5
    assert not (await pool.look()).workers[worker.name].state.ready


async def test_a_busy_worker_finishes_what_it_can_and_hands_back_the_rest(pool: PoolLab) -> None:
    worker = pool.worker(module=OBEDIENT)  # 9 s of grace, 3 of them for handing back
    await pool.ready(worker)
    short, long, waiting = embedding("sleep 3"), embedding(*["sleep 1"] * 200), embedding("later")
    await running(pool, long)
    await pool.offer(short)
    await until("both are taken", lambda: _leased(pool, 2))
    worker.send_signal(signal.SIGTERM)
    told_at = time.monotonic()
    await asyncio.sleep(0.5)
    await pool.offer(waiting)
    assert await worker.ended() == ExitCode.HANDED_BACK
    assert 4 < time.monotonic() - told_at < 12
    reports = {one.uid: one.outcome for one in await pool.reports() if one.kind is ReportKind.ENDED}
    handed_back = reports[str(long.metadata.uid)]
    assert handed_back is not None
    assert (handed_back.outcome, handed_back.reason) == (Outcome.GIVEN_BACK, "HandedBack")
    assert (await pool.outcome(long))["reason"] == "HandedBack"
    assert waiting.metadata.uid not in reports
    look = await pool.look()
    assert look.leased == 0
    assert look.uids == {waiting.metadata.uid}


async def _leased(pool: PoolLab, count: int) -> bool:
    return (await pool.look()).leased == count


async def test_a_worker_that_is_to_drain_finishes_what_it_has_takes_no_more_and_ends_well(pool: PoolLab) -> None:
    worker = pool.worker(module=OBEDIENT)
    await pool.ready(worker)
    has, later = embedding("sleep 3"), health_check()
    await running(pool, has)
    await pool.queue.drain(pool.keys, [worker.name])
    await until("the worker drains", lambda: _draining(pool, worker.name), seconds=3)
    await pool.offer(later)
    assert await worker.ended() == ExitCode.SUCCEEDED
    outcome = (await pool.report(has)).outcome
    assert outcome is not None
    assert outcome.reason == "Completed"
    assert (await pool.look()).uids == {later.metadata.uid}


async def _draining(pool: PoolLab, name: str) -> bool:
    state = (await pool.look()).workers[name].state
    return state.draining and not state.ready


@pytest.mark.parametrize("how", ["hang", "loop"])
async def test_an_attempt_that_hangs_is_reported_and_the_others_are_given_back(pool: PoolLab, how: str) -> None:
    worker = pool.worker(module=OBEDIENT)
    await pool.ready(worker)
    hanging, other = embedding(how, stallTimeout="3s"), embedding("sleep 1", "behind it")
    await pool.offer(hanging)
    await until("it is taken", lambda: _leased(pool, 1))
    await pool.offer(other)
    assert await worker.ended(60) == ExitCode.RETRYABLE
    reports = {one.uid: one.outcome for one in await pool.reports() if one.kind is ReportKind.ENDED}
    stalled = reports[str(hanging.metadata.uid)]
    assert stalled is not None
    assert (stalled.outcome, stalled.reason) == (Outcome.FAILED, "NoProgress")
    if how == "hang":  # a loop that hangs takes nothing
        given_back = reports[str(other.metadata.uid)]
        assert given_back is not None
        assert given_back.reason == "HandedBack"
    assert (await pool.look()).leased == 0


# -------------------------------------------------------------------------------------------------------------- losses


async def test_tasks_of_a_worker_that_is_killed_go_to_another(pool: PoolLab) -> None:
    first = pool.worker(module=OBEDIENT)
    await pool.ready(first)
    task = embedding("sleep 60", "sleep 60")
    await running(pool, task)
    second = pool.worker(module=OBEDIENT)
    await pool.ready(second)
    first.kill()
    killed_at = time.monotonic()
    report = await pool.report(task, ReportKind.EXPIRED)
    assert report.worker == first.name
    assert time.monotonic() - killed_at < pool.lease + 4
    again = task.model_copy(update={"spec": embedding("quick").spec})
    await pool.offer(again, attempt=2)
    outcome = (await pool.report(again, attempt=2)).outcome
    assert outcome is not None
    assert (outcome.attempt, outcome.reason) == (2, "Completed")


async def test_a_worker_that_was_paused_for_longer_than_its_lease_says_nothing_and_goes_on(pool: PoolLab) -> None:
    zombie = pool.worker(module=OBEDIENT)
    await pool.ready(zombie)
    task = embedding("sleep 3", "of the first")
    await running(pool, task)
    suspend(zombie)
    await pool.report(task, ReportKind.EXPIRED)
    second = pool.worker(module=OBEDIENT)
    await pool.ready(second)
    await pool.offer(task, attempt=2)
    done = await pool.report(task, attempt=2)
    assert done.worker == second.name
    key = uuid.UUID(task.metadata.uid)
    kept_at = await pool.fetch("SELECT created_at FROM task_vectors WHERE task_uid = $1", key)
    resume(zombie)
    # It takes tasks again; what it had before is given up.
    await pool.queue.drain(pool.keys, [second.name])
    await second.ended()
    other = health_check()
    await pool.offer(other)
    assert (await pool.report(other)).worker == zombie.name
    await until("it has no lease", lambda: _leased(pool, 0))
    await pool.queue.drain(pool.keys, [zombie.name])
    assert await zombie.ended() == ExitCode.SUCCEEDED
    mine = [(one.kind, one.worker) for one in await pool.reports() if one.uid == task.metadata.uid]
    assert mine == [
        ("running", zombie.name),
        ("expired", zombie.name),
        *[("running", second.name)] * (len(mine) - 3),
        ("ended", second.name),
    ]
    assert await pool.fetch("SELECT created_at FROM task_vectors WHERE task_uid = $1", key) == kept_at
    assert await pool.outcome(task) is None
    assert (await pool.outcome(task, attempt=2))["reason"] == "Completed"


async def test_vectors_of_an_attempt_that_was_given_up_replace_nothing(pool: PoolLab) -> None:
    """Whatever the zombie has missed: the ledger refuses it once a later attempt has ended."""
    ledger = Ledger(pool.database)
    uid = uuid.uuid4()
    kept = KeptVectors(uid, 0, 16, "hash", "hash-1", "0" * 64, INLINE)
    await ledger.keep_vectors(kept, attempt=1)
    await ledger.keep_vectors(kept, attempt=2)
    outcome = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=2)
    await ledger.record([Ended(uid, "pod", outcome)])
    with pytest.raises(Fenced, match="later attempt"):
        await ledger.keep_vectors(kept, attempt=1)
    await ledger.keep_vectors(kept, attempt=2)
    await ledger.aclose()


async def test_a_task_that_is_withdrawn_stops_within_a_second(pool: PoolLab) -> None:
    worker = pool.worker(module=OBEDIENT)
    await pool.ready(worker)
    task = embedding(*["sleep 1"] * 60)
    await running(pool, task)
    assert await pool.queue.withdraw(pool.keys, str(task.metadata.uid)) == worker.name
    withdrawn_at = time.monotonic()

    async def idle() -> bool:
        return (await pool.look()).workers[worker.name].state.tasks == 1

    await until("it has stopped", idle, seconds=pool.lease)
    assert time.monotonic() - withdrawn_at < pool.lease
    assert [one.kind for one in await pool.reports()] == [ReportKind.RUNNING]
    assert await pool.outcome(task) is None


async def test_a_redis_that_dies_loses_no_result(pool: PoolLab) -> None:
    worker = pool.worker(module=OBEDIENT)
    await pool.ready(worker)
    task = embedding("sleep 4")
    await running(pool, task)
    pool.redis.kill()
    row = None
    deadline = time.monotonic() + 30
    while row is None and time.monotonic() < deadline:
        row = await pool.outcome(task)
        await asyncio.sleep(0.1)
    assert row is not None
    assert row["reason"] == "Completed"
    pool.redis.start()
    pool._read = "0-0"  # of a stream that is gone
    outcome = (await pool.report(task)).outcome
    assert outcome is not None
    assert outcome.reason == "Completed"
    later = health_check()
    await _offered(pool, later)
    assert (await pool.report(later)).worker == worker.name


async def _offered(pool: PoolLab, task: ProcessingTask) -> None:
    async def offered() -> bool:
        try:
            await pool.offer(task)
        except Exception:  # noqa: BLE001 - its connections are those of before
            return False
        return True

    await until("the task is offered", offered)


async def test_a_redis_that_is_wiped_has_tasks_carried_out_again(pool: PoolLab) -> None:
    worker = pool.worker(module=OBEDIENT)
    await pool.ready(worker)
    task = embedding("sleep 1", "sleep 1", "sleep 1", "sleep 1")
    await running(pool, task)
    pool.redis.wipe()
    pool._read = "0-0"
    await pool.offer(task)
    outcome = (await pool.report(task)).outcome
    assert outcome is not None
    assert outcome.reason == "Completed"
    await until("nothing is left", lambda: _leased(pool, 0))
    assert sum(one.kind is ReportKind.ENDED for one in await pool.reports()) == 1


async def test_without_postgresql_attempts_are_given_back_and_reported(pool: PoolLab) -> None:
    worker = pool.worker(module=OBEDIENT, postgres_url="postgresql://nobody@127.0.0.1:9/none")
    await pool.ready(worker)
    task = embedding("one")
    await pool.offer(task)
    outcome = (await pool.report(task)).outcome
    assert outcome is not None
    assert (outcome.outcome, outcome.reason) == (Outcome.GIVEN_BACK, "StoreUnavailable")


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("environment", "code", "said"),
    [
        ({"TASKS_WORKER": ""}, ExitCode.STORE_UNAVAILABLE, "cannot work for a pool: TASKS_WORKER not set; "),
        (
            {"TASKS_POOL_CONCURRENCY": "many"},
            ExitCode.STORE_UNAVAILABLE,
            "cannot start the runner: TASKS_POOL_CONCURRENCY: ",
        ),
        ({"TASKS_EMBEDDING_MODEL": "none"}, ExitCode.PERMANENT, "cannot load the embedding model 'none': "),
    ],
    ids=str,
)
async def test_wrong_settings_are_said_in_one_sentence(
    pool: PoolLab, environment: dict[str, str], code: ExitCode, said: str
) -> None:
    worker = pool.worker(**{name.removeprefix("TASKS_").lower(): value for name, value in environment.items()})
    assert await worker.ended() == code
    errors = worker.communicate()[1]
    assert errors.splitlines()[-1].startswith(said), errors
    assert "Traceback" not in errors


# ------------------------------------------------------------------------------------------------------------- endurance


async def test_thousands_of_tasks_leave_nothing_behind(pool: PoolLab) -> None:
    worker = pool.worker(module=OBEDIENT, pool_concurrency="16", log_level="warning")
    await pool.ready(worker)
    process = psutil.Process(worker.pid)
    sizes = []
    for _ in range(4):
        tasks = [one for number in range(400) for one in (health_check("postgres", "model"), embedding(f"text {number}"))]
        for start in range(0, len(tasks), 200):
            await pool.offer(*tasks[start : start + 200])

        async def all_ended() -> bool:
            uids = {one.uid for one in await pool.reports() if one.kind is ReportKind.ENDED}
            return all(task.metadata.uid in uids for task in tasks)  # noqa: B023 - it is awaited within the loop

        await until("all tasks have ended", all_ended, seconds=120, pause=0.2)
        sizes.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
    memory, files, threads = zip(*sizes, strict=True)
    assert memory[-1] < memory[0] + 8 * 2**20, sizes
    assert files[-1] <= files[0] + 4, sizes
    assert threads[-1] <= threads[0] + 16, sizes  # the executor starts them when they are needed first


# ----------------------------------------------------------------------------------------------------------- all stores


async def test_a_document_goes_through_a_worker_into_both_stores(lab: Lab, pool: PoolLab) -> None:
    lab.write(["one", "two", "three"])
    worker = pool.worker(
        module=OBEDIENT,
        **{
            name.removeprefix("TASKS_").lower(): value
            for name, value in lab.environment.items()
            if name not in {"TASKS_POSTGRES_URL", "TASKS_REDIS_URL"}
        },
    )
    await pool.ready(worker)
    task = lab.task()
    await pool.offer(task)
    outcome = (await pool.report(task, seconds=90)).outcome  # a new collection takes Milvus seconds
    assert outcome is not None
    assert outcome.reason == "Completed", outcome
    assert await lab.published() == 1
    assert await lab.versions() == {1: (3, 3)}
    again = lab.task(at=1)
    await pool.offer(again)
    outcome = (await pool.report(again)).outcome
    assert outcome is not None
    assert outcome.reason == "Unchanged", outcome
