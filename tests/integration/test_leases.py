"""The scripts that hand tasks to workers, on a real Redis: what operator and workers see of one another."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as Disconnected

from job_runner.leases import Lease, Leases, QueueUnavailable
from task_contract.leases import INLINE_TASK, KEPT_SECONDS, PoolKeys, PoolReport, ReportKind, WorkerState
from task_contract.messages import AttemptOutcome, Outcome
from task_operator.pool_queue import Heard, Look, PoolQueue
from task_operator.pool_queue import QueueUnavailable as TableGone
from tests.support.worker_lab import NAMESPACE, RedisServer, health_check, offered, until

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]

LONG = timedelta(hours=1)
"""A lease that does not run out in a test."""
PAST = timedelta(milliseconds=1)
"""One that has run out by the next call."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


class Table:
    """The two sides of a pool."""

    def __init__(self, url: str, stack: AsyncExitStack) -> None:
        self.url = url
        self.keys = PoolKeys(NAMESPACE, f"pool-{time.monotonic_ns()}")
        self.queue = PoolQueue(url)
        self.redis: Any = Redis.from_url(url, decode_responses=True)
        self._stack = stack
        stack.push_async_callback(self.queue.aclose)
        stack.push_async_callback(self.redis.aclose)

    def worker(self, name: str) -> Leases:
        leases = Leases(self.url, self.keys, name)
        self._stack.push_async_callback(leases.aclose)
        return leases

    async def offer(
        self, *uids: str, attempt: int = 1, stamp: str = "1", priority: str = "normal", rank: float = 0
    ) -> list[bool]:
        task = health_check()
        offers = []
        for uid in uids:
            one = offered(task, attempt=attempt, stamp=stamp, priority=priority, rank=rank)
            offers.append(type(one)(uid, one.namespace, one.name, attempt, stamp, priority, one.rank, f'{{"uid": "{uid}"}}'))
        return await self.queue.offer(self.keys, offers, now=datetime.now(UTC))

    async def look(self, lease: timedelta = LONG) -> Look:
        return await self.queue.look(self.keys, lease=lease, now=datetime.now(UTC))

    async def expired(self) -> Look:
        """Look until what is not renewed has run out."""
        await asyncio.sleep(0.005)
        return await self.look(PAST)

    async def reports(self) -> list[PoolReport]:
        found: list[Heard] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                async for part in self.queue.reports(self.keys):
                    found += part
        return [one.report for one in found]

    def report(self, lease: Lease, worker: str, kind: ReportKind = ReportKind.ENDED) -> tuple[Lease, PoolReport]:
        outcome = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=lease.attempt) if kind is ReportKind.ENDED else None
        given = {"uid": lease.uid, "namespace": NAMESPACE, "name": "a", "attempt": lease.attempt, "stamp": lease.stamp}
        return lease, PoolReport(kind=kind, worker=worker, outcome=outcome, **given)


@pytest.fixture
async def table(server: RedisServer) -> AsyncIterator[Table]:
    async with AsyncExitStack() as stack:
        yield Table(server.url, stack)


def uids(leases: list[Lease]) -> list[str]:
    return [lease.uid for lease in leases]


def state(name: str) -> WorkerState:
    return WorkerState(worker=name, ready=True, capacity=4)


# ------------------------------------------------------------------------------------------------------------- offering


async def test_a_task_is_taken_once_however_often_it_is_offered(table: Table) -> None:
    a, b = table.worker("a"), table.worker("b")
    assert await table.offer("one") == [True]
    assert await table.offer("one") == [False]
    taken = await asyncio.gather(a.take(4, held=()), b.take(4, held=()))
    assert sorted(map(len, taken)) == [0, 1]
    assert await table.offer("one") == [False]
    assert await a.take(4, held=()) == await b.take(4, held=()) == []
    look = await table.look()
    assert (look.leased, look.waiting["normal"]) == (1, 0)
    assert look.uids == {"one"}


async def test_what_is_taken_is_what_was_offered(table: Table) -> None:
    before = datetime.now(UTC)
    await table.offer("one", attempt=3, stamp="5", priority="high")
    (lease,) = await table.worker("a").take(4, held=())
    assert (lease.uid, lease.attempt, lease.stamp, lease.stream, lease.task) == ("one", 3, "5", 1, '{"uid": "one"}')
    assert before <= lease.offered_at <= datetime.now(UTC)


async def test_a_large_task_stands_beside_the_stream_and_goes_with_its_lease(table: Table) -> None:
    a = table.worker("a")
    task = f'{{"text": "{"x" * INLINE_TASK}"}}'
    one = offered(health_check())
    large = type(one)("large", NAMESPACE, "a", 1, "1", "normal", 1.0, task)
    await table.queue.offer(table.keys, [large], now=datetime.now(UTC))
    assert await table.redis.hget(table.keys.large, "large") == task
    (lease,) = await a.take(4, held=())
    assert lease.task == task
    assert await a.report([table.report(lease, "a")]) == [True]
    assert not await table.redis.exists(table.keys.large)


async def test_a_higher_attempt_takes_the_place_of_a_lower_one(table: Table) -> None:
    a = table.worker("a")
    await table.offer("one")
    (first,) = await a.take(4, held=())
    assert await table.offer("one", attempt=2) == [True]
    (second,) = await a.take(4, held=())
    assert second.attempt == 2
    assert (await a.renew(state("a"), [first])).lost == {"one"}
    assert (await a.renew(state("a"), [second])).lost == frozenset()
    assert await a.report([table.report(first, "a"), table.report(second, "a")]) == [False, True]


# --------------------------------------------------------------------------------------------------------------- turns


async def test_the_highest_priority_goes_first_and_the_lowest_gets_its_turns(table: Table) -> None:
    a = table.worker("a")
    for priority, rank in (("low", 3.0), ("normal", 2.0), ("high", 1.0)):
        await table.offer(*(f"{priority} {number}" for number in range(40)), priority=priority, rank=rank)
    taken = uids(await a.take(64, held=()))
    assert taken[:8] == ["high 0", "high 1", "high 2", "normal 0", "high 3", "high 4", "high 5", "normal 1"]
    first = [uid.split()[0] for uid in taken]
    assert [first[:64].count(priority) for priority in ("high", "normal", "low")] == [40, 20, 4]


async def test_what_has_waited_for_long_goes_before_a_higher_priority(table: Table) -> None:
    a = table.worker("a")
    await table.offer("old", priority="low", rank=1.0)
    await table.offer("new", priority="high", rank=100.0)
    assert uids(await a.take(1, held=())) == ["old"]


async def test_a_task_that_waits_moves_to_its_new_priority_and_one_that_is_taken_stays(table: Table) -> None:
    a = table.worker("a")
    await table.offer("moved", "taken", priority="low", rank=9.0)
    await table.offer("other", priority="normal", rank=5.0)
    assert await table.offer("moved", priority="high", rank=1.0) == [True]
    look = await table.look()
    assert look.waiting == {"high": 1, "normal": 1, "low": 1}
    assert uids(await a.take(3, held=())) == ["moved", "other", "taken"]
    assert await table.offer("taken", priority="high", rank=1.0) == [False]
    assert await a.take(3, held=()) == []


# -------------------------------------------------------------------------------------------------------------- leases


async def test_a_lease_that_is_renewed_does_not_run_out(table: Table) -> None:
    a = table.worker("a")
    await table.offer("one")
    (lease,) = await a.take(4, held=())
    await asyncio.sleep(0.15)
    assert (await a.renew(state("a"), [lease])).lost == frozenset()
    look = await table.look(timedelta(milliseconds=100))
    assert (look.expired, look.leased) == (0, 1)
    assert look.workers["a"].state.capacity == 4
    assert look.workers["a"].silent < 5


async def test_a_lease_that_runs_out_is_reported_and_its_worker_is_heard_no_more(table: Table) -> None:
    a, b = table.worker("a"), table.worker("b")
    await table.offer("one", stamp="7")
    (lost,) = await a.take(4, held=())
    look = await table.expired()
    assert (look.expired, look.leased, look.uids) == (1, 0, frozenset())
    (report,) = await table.reports()
    assert (report.kind, report.uid, report.attempt, report.stamp, report.worker) == ("expired", "one", 1, "7", "a")
    assert report.offered_at is not None
    await table.offer("one", attempt=2, stamp="7")
    (lease,) = await b.take(4, held=())
    # The one that was given up for dead wakes up.
    assert (await a.renew(state("a"), [lost])).lost == {"one"}
    assert await a.report([table.report(lost, "a", ReportKind.RUNNING), table.report(lost, "a")]) == [False, False]
    assert (await b.renew(state("b"), [lease])).lost == frozenset()
    assert await b.report([table.report(lease, "b")]) == [True]
    assert [(one.kind, one.worker) for one in await table.reports()] == [("expired", "a"), ("ended", "b")]


async def test_a_report_of_running_keeps_the_lease(table: Table) -> None:
    a = table.worker("a")
    await table.offer("one")
    (lease,) = await a.take(4, held=())
    assert await a.report([table.report(lease, "a", ReportKind.RUNNING)]) == [True]
    assert (await table.look()).leased == 1
    assert await a.report([table.report(lease, "a")]) == [True]
    look = await table.look()
    assert (look.leased, look.uids) == (0, frozenset())
    assert (await a.renew(state("a"), [lease])).lost == {"one"}


async def test_a_report_that_is_repeated_is_written_again_and_harms_nobody(table: Table) -> None:
    a = table.worker("a")
    await table.offer("one")
    (lease,) = await a.take(4, held=())
    assert await a.report([table.report(lease, "a")]) == [True]
    assert await a.report([table.report(lease, "a")]) == [True]
    await table.offer("one", attempt=2)
    assert await a.report([table.report(lease, "a")]) == [False]


async def test_a_task_that_is_withdrawn_stops_its_worker_at_once(table: Table) -> None:
    a = table.worker("a")
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def listen() -> None:
        async for said in a.control():
            await heard.put(said)

    listening = asyncio.create_task(listen())
    assert await heard.get() == ""
    await table.offer("waiting", "held")
    assert await table.queue.withdraw(table.keys, "waiting") is None
    (lease,) = await a.take(4, held=())
    assert lease.uid == "held"
    assert await table.queue.withdraw(table.keys, "held") == "a"
    assert await heard.get() == "held"
    assert (await a.renew(state("a"), [lease])).lost == {"held"}
    assert await table.queue.withdraw(table.keys, "held") is None
    assert (await table.look()).uids == frozenset()
    listening.cancel()
    await asyncio.wait([listening])


# --------------------------------------------------------------------------------------------------------- drain, dismiss


async def test_who_is_to_drain_gets_no_task_and_hears_it(table: Table) -> None:
    a, b = table.worker("a"), table.worker("b")
    await table.offer("one")
    assert not (await a.renew(state("a"), [])).draining
    await table.queue.drain(table.keys, ["a"])
    assert (await a.renew(state("a"), [])).draining
    assert await a.take(4, held=()) == []
    assert uids(await b.take(4, held=())) == ["one"]
    await table.queue.drain(table.keys, [])
    assert not (await a.renew(state("a"), [])).draining


async def test_a_worker_that_is_dismissed_is_forgotten_and_its_leases_run_out(table: Table) -> None:
    a, b = table.worker("a"), table.worker("b")
    await table.offer("one")
    await a.take(4, held=())
    for name, worker in (("a", a), ("b", b)):
        await worker.renew(state(name), [])
    await table.queue.drain(table.keys, ["a"])
    await table.queue.dismiss(table.keys, ["a"])
    look = await table.look()
    assert set(look.workers) == {"b"}
    assert look.leased == 1
    assert not (await a.renew(state("a"), [])).draining
    assert (await table.expired()).expired == 1


# -------------------------------------------------------------------------------------------------------------- losses


async def test_a_wiped_redis_is_filled_again_and_what_has_ended_meanwhile_is_heard(table: Table) -> None:
    a = table.worker("a")
    await table.offer("running", "ended")
    running, ended = await a.take(4, held=())
    await table.redis.delete(*table.keys.all)
    assert (await table.look()).uids == frozenset()
    assert await a.report([table.report(ended, "a")]) == [True]  # the operator knows whether it still wants to hear
    assert (await a.renew(state("a"), [running])).lost == {"running"}
    assert await table.offer("running") == [True]
    assert await a.report([table.report(running, "a")]) == [False]
    assert uids(await a.take(4, held=())) == ["running"]


async def test_the_turns_alone_may_be_lost_and_may_come_from_a_copy(table: Table) -> None:
    a = table.worker("a")
    await table.offer("one", "two")
    assert uids(await a.take(1, held=())) == ["one"]
    await table.redis.delete(f"{table.keys.base}:turns")
    assert uids(await a.take(4, held=())) == ["two"]
    await table.offer("three", "four")
    assert uids(await a.take(4, held=())) == ["three", "four"]
    assert await a.take(4, held=()) == []


async def test_the_group_may_be_lost(table: Table) -> None:
    a = table.worker("a")
    await table.offer("one", "two")
    (lease,) = await a.take(1, held=())
    await table.redis.xgroup_destroy(table.keys.streams[1], "workers")
    assert (await a.renew(state("a"), [lease])).lost == {"one"}
    assert uids(await a.take(4, held=())) == ["one", "two"]


async def test_an_entry_of_nobody_is_removed_and_no_other_of_the_same_number(table: Table) -> None:
    a = table.worker("a")
    await table.offer("mine", priority="low", rank=9.0)
    (number, _), *_ = await table.redis.xrange(table.keys.streams[2])
    nobody = {"uid": "nobody", "attempt": 1, "stamp": "1", "rank": 1, "at": datetime.now(UTC).isoformat(), "task": "{}"}
    await table.redis.xadd(table.keys.streams[0], nobody, id=number)
    assert uids(await a.take(4, held=())) == ["mine"]
    assert await table.redis.xlen(table.keys.streams[0]) == 0


async def test_what_no_operator_looks_at_is_gone_after_a_week(table: Table) -> None:
    """A pool may be deleted while no operator is there to hear of it."""
    await table.offer("a", "b")
    worker = table.worker("w")
    (lease,) = await worker.take(1, held=())
    await worker.renew(state("w"), [lease])
    await table.look()
    kept = [key async for key in table.redis.scan_iter(f"{table.keys.base}*")]
    assert len(kept) >= 3, kept
    assert [key for key in kept if not 0 < await table.redis.ttl(key) <= KEPT_SECONDS] == []


# --------------------------------------------------------------------------------------------------------- a worker's side


async def test_who_waits_is_woken_by_an_offer_of_any_priority(table: Table) -> None:
    a = table.worker("a")
    for number, priority in enumerate(("high", "normal", "low", "low")):
        assert await a.take(4, held=()) == []
        waiting = asyncio.create_task(a.wait(10))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        offered_at = time.monotonic()
        await table.offer(f"task {number}", priority=priority)
        await waiting
        assert uids(await a.take(4, held=())) == [f"task {number}"]
        assert time.monotonic() - offered_at < 5


async def test_what_is_offered_between_the_look_and_the_wait_wakes_too(table: Table) -> None:
    a, b = table.worker("a"), table.worker("b")
    await table.offer("before")
    await b.take(4, held=())
    assert await a.take(4, held=()) == []
    await table.offer("between")
    await a.wait(10)
    assert uids(await a.take(4, held=())) == ["between"]
    waiting = asyncio.create_task(a.wait(0.1))
    await waiting  # nothing: neither what others have nor what it has wakes it again and again
    started = time.monotonic()
    await a.wait(0.2)
    assert time.monotonic() - started >= 0.15


async def test_tasks_of_an_answer_that_was_lost_are_found(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    a = table.worker("a")
    one = offered(health_check())
    large = type(one)("large", NAMESPACE, "a", 1, "1", "high", 1.0, "x" * (INLINE_TASK + 1))
    await table.offer("held")
    (held,) = await a.take(1, held=())
    await table.queue.offer(table.keys, [large], now=datetime.now(UTC))
    await table.offer("lost")
    run = a._run

    async def lose(script: str, arguments: Any) -> Any:
        await run(script, arguments)
        raise QueueUnavailable("gone") from Disconnected("gone")

    monkeypatch.setattr(a, "_run", lose)
    with pytest.raises(QueueUnavailable):
        await a.take(4, held={(held.stream, held.entry)})
    monkeypatch.setattr(a, "_run", run)
    found = await a.take(4, held={(held.stream, held.entry)})
    assert sorted(uids(found)) == ["large", "lost"]
    assert {one.uid: one.task for one in found}["large"] == large.task
    assert await a.take(4, held=()) == []
    assert (await a.renew(state("a"), found)).lost == frozenset()


async def test_a_redis_that_is_away_is_said_and_its_return_is_noticed(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    async with AsyncExitStack() as stack:
        stack.callback(server.kill)
        table = Table(server.url, stack)
        a = table.worker("a")
        await table.offer("one")
        (lease,) = await a.take(4, held=())
        server.kill()
        for call in (a.take(4, held=()), a.renew(state("a"), [lease]), a.report([table.report(lease, "a")])):
            with pytest.raises(QueueUnavailable, match="cannot use Redis: "):
                await call
        a.last_words([table.report(lease, "a")])  # raises nothing
        server.start()

        async def back() -> bool:
            try:
                return await a.report([table.report(lease, "a")]) == [True]
            except QueueUnavailable:
                return False

        async def offer() -> bool:
            try:
                return await table.offer("two") == [True]
            except TableGone:
                return False

        await until("Redis is used again", back)
        await until("a task is offered", offer)
        assert uids(await a.take(4, held=())) == ["two"]
        a.last_words([table.report(lease, "a")])
        assert [one.uid for one in await table.reports()] == ["one", "one"]
