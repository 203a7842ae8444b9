"""Tasks in worker pools on a real API server, PostgreSQL and Redis; the workers are played by this test."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from devstack import Endpoints
from task_contract.leases import RENEW, REPORT, STREAM_OF, TAKE, PoolKeys, PoolReport, WorkerState
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Priority, TaskType
from task_contract.pools import PoolSpec
from task_operator.cluster import Cluster
from task_operator.controller import Controller
from task_operator.jobs import RunnerTemplate
from task_operator.metrics import Metrics
from task_operator.pool_queue import Offer, PoolQueue, QueueUnavailable
from task_operator.pools import Pool
from task_operator.projection import Database
from task_platform.kubernetes import Access
from tests.support.operator_lab import Place, end, until

pytestmark = pytest.mark.integration

LEASE = timedelta(seconds=1)
HEALTH: dict[str, Any] = {"type": "health_check", "kbId": None, "payload": {}, "executor": "pool"}


class Queue(PoolQueue):
    """One that can be cut off from Redis, and counts its requests."""

    down = False
    offers = 0

    async def offer(self, keys: PoolKeys, offers: Sequence[Offer], *, now: datetime) -> list[bool]:
        self._check()
        self.offers += 1
        return await super().offer(keys, offers, now=now)

    def _check(self) -> None:
        if self.down:
            raise QueueUnavailable("cut off")


@dataclass
class Lease:
    """A task that a worker has taken."""

    stream: int
    id: str
    uid: str
    attempt: int
    stamp: str
    name: str
    began: datetime


@dataclass
class Worker:
    """A worker, as far as Redis sees one."""

    redis: Redis
    keys: PoolKeys
    name: str = "texts-1a667239-0-5f-1-abcde"

    async def take(self) -> list[Lease]:
        taken = await self.redis.eval(TAKE, len(self.keys.all), *self.keys.all, self.name, 10)
        return [Lease(int(one[0]), one[1], one[2], int(one[3]), one[4], _name(one[6]), datetime.now(UTC)) for one in taken]

    async def wait_for(self, number: int = 1) -> list[Lease]:
        """Take tasks until there are so many."""
        taken: list[Lease] = []

        async def look() -> bool:
            taken.extend(await self.take())
            return len(taken) >= number

        await until(f"{number} tasks in the pool", look, seconds=20, interval=0.05)
        return taken

    async def renew(self, *leases: Lease) -> None:
        state = WorkerState(worker=self.name, ready=True, capacity=4).model_dump_json(by_alias=True)
        held = [part for one in leases for part in (one.stream, one.id, one.uid)]
        await self.redis.eval(RENEW, len(self.keys.all), *self.keys.all, self.name, state, *held)

    async def report(self, lease: Lease, kind: str, **more: Any) -> bool:
        report = PoolReport.model_validate(
            {
                "kind": kind,
                "uid": lease.uid,
                "namespace": self.keys.namespace,
                "name": lease.name,
                "attempt": lease.attempt,
                "stamp": lease.stamp,
                "worker": self.name,
                "job": self.name.rpartition("-")[0],
                "started_at": lease.began,
                **more,
            }
        )
        text = report.model_dump_json(by_alias=True, exclude_none=True)
        values = (self.name, kind, lease.stream, lease.id, lease.uid, text)
        taken = await self.redis.eval(REPORT, len(self.keys.all), *self.keys.all, *values)
        return bool(taken[0])

    async def end(self, lease: Lease, outcome: Outcome = Outcome.SUCCEEDED, reason: str = "Completed") -> bool:
        ended = AttemptOutcome(outcome=outcome, attempt=lease.attempt, reason=reason)
        return await self.report(lease, "ended", outcome=ended, finished_at=datetime.now(UTC))


def _name(task: str) -> str:

    return str(json.loads(task)["metadata"]["name"])


@dataclass
class Lab:
    """The controller at work in this process, with a pool; it can be thrown away and made anew."""

    place: Place
    access: Access
    postgres: str
    redis_url: str
    redis: Redis
    pools: list[Pool] = field(default_factory=list)
    queue: Queue | None = None
    stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    @property
    def keys(self) -> PoolKeys:
        return PoolKeys(self.place.namespace, "texts")

    def worker(self, name: str = "texts-1a667239-0-5f-1-abcde") -> Worker:
        return Worker(self.redis, self.keys, name)

    @contextlib.asynccontextmanager
    async def operator(self) -> AsyncIterator[Queue]:
        """Run the controller; leaving kills it wherever it stands."""
        port, metrics = _Port(self.pools), Metrics()
        cluster, database = Cluster(self.access), Database(self.postgres, metrics=metrics)
        self.queue = queue = Queue(self.redis_url)
        await cluster.warm_up()
        await database.warm_up()
        controller = Controller(
            api=cluster,
            template=RunnerTemplate(image="runner:1"),
            metrics=metrics,
            database=database,
            namespaces=[self.place.namespace],
            pools=port,
            pool_queue=queue,
            resync_seconds=1,
        )
        watching = asyncio.Event()
        watching.set()
        work = [
            asyncio.create_task(controller.lead()),
            asyncio.create_task(controller.observe(watching)),
            asyncio.create_task(database.run()),
            asyncio.create_task(_look_forever(controller, queue, self.pools)),
        ]
        try:
            yield queue
            for one in work:
                assert not one.done(), one.exception()
        finally:
            await end(*work)
            await queue.aclose()
            await database.aclose()
            await cluster.aclose()


@dataclass
class _Port:
    found: list[Pool]
    synced: bool = True

    def pools(self) -> Sequence[Pool]:
        return self.found


async def _look_forever(controller: Controller, queue: Queue, pools: list[Pool]) -> None:
    while True:
        for pool in pools:
            try:
                queue._check()
                look = await queue.look(pool.keys, lease=pool.spec.lease, now=datetime.now(UTC))
            except QueueUnavailable:
                look = None
            controller.on_look(pool, look)
        await asyncio.sleep(0.3)


@pytest.fixture
async def lab(place: Place, cluster: Endpoints, stores: Endpoints, url: str) -> AsyncIterator[Lab]:
    """A namespace with a pool of health checks."""
    redis_url = stores.host_urls["TASKS_REDIS_URL"]
    redis: Redis = Redis.from_url(redis_url, decode_responses=True)
    lab = Lab(place, Access.from_kubeconfig(cluster.kubeconfig), url, redis_url, redis)
    lab.pools.append(Pool(place.namespace, "texts", "uid", PoolSpec(types=[TaskType.HEALTH_CHECK], lease=LEASE)))
    yield lab
    await redis.delete(*lab.keys.all)
    await redis.aclose()


async def test_a_task_of_under_a_second_is_one_write_from_which_the_whole_history_follows(
    lab: Lab, sql: "asyncpg.Connection[Any]"
) -> None:
    async with lab.operator():
        created = await lab.place.create("check", **HEALTH)
        worker = lab.worker()
        [lease] = await worker.wait_for()
        await worker.end(lease)
        status = await lab.place.wait_for("Completed", name="check")
        assert (status["executor"], status["job"]) == ("pool", "texts-1a667239-0-5f-1")
        assert [one["reason"] for one in status["attempts"]] == ["Succeeded"]
        assert {"queuedAt", "startedAt", "finishedAt"} <= status.keys()
        task = await lab.place.task("check")
        assert task is not None
        writers = [one for one in task["metadata"]["managedFields"] if one.get("subresource") == "status"]
        assert len(writers) == 1

        async def told() -> bool:
            rows = await sql.fetch("SELECT phase FROM task_events WHERE task_uid = $1 ORDER BY number", lease.uid)
            return [row["phase"] for row in rows] == ["Queued", "Processing", "Completed"]

        await until("all transitions are in PostgreSQL", told, seconds=10)
        row = await sql.fetchrow("SELECT job, reason FROM attempts WHERE task_uid = $1", created["metadata"]["uid"])
        assert row is not None
        assert (row["job"], row["reason"]) == ("texts-1a667239-0-5f-1", "Succeeded")

        async def settled() -> bool:
            return await lab.redis.xlen(lab.keys.reports) == 0

        await until("the report is removed", settled, seconds=5)


async def test_a_task_that_takes_longer_is_said_to_run_and_in_which_pod(lab: Lab) -> None:
    async with lab.operator():
        await lab.place.create("check", **HEALTH)
        worker = lab.worker()
        [lease] = await worker.wait_for()
        await worker.report(lease, "running")
        status = await lab.place.wait_for("Processing", name="check", seconds=20)
        ready = next(one for one in status["conditions"] if one["type"] == "Ready")
        assert worker.name in ready["message"]
        await worker.renew(lease)
        assert await worker.end(lease)
        await lab.place.wait_for("Completed", name="check")


async def test_a_worker_that_is_silent_loses_the_task_to_another_and_reports_in_vain_when_it_wakes(lab: Lab) -> None:
    async with lab.operator():
        await lab.place.create("check", **HEALTH)
        paused, other = lab.worker("texts-1a667239-0-5f-1-aaaaa"), lab.worker("texts-1a667239-1-5f-1-bbbbb")
        [lost] = await paused.wait_for()
        await paused.report(lost, "running")
        began = asyncio.get_running_loop().time()
        [lease] = await other.wait_for()
        assert asyncio.get_running_loop().time() - began < LEASE.total_seconds() + 2, "the handover took too long"
        assert lease.attempt == 2
        assert not await paused.end(lost)
        assert await other.end(lease)
        status = await lab.place.wait_for("Completed", name="check")
        assert [(one["reason"], one["job"]) for one in status["attempts"]] == [
            ("WorkerLost", "texts-1a667239-0-5f-1"),
            ("Succeeded", "texts-1a667239-1-5f-1"),
        ]


async def test_what_redis_has_lost_is_offered_again_within_seconds(lab: Lab) -> None:
    async with lab.operator():
        for number in range(20):
            await lab.place.create(f"check-{number}", **HEALTH)
        worker = lab.worker()
        taken = await worker.wait_for(20)
        await lab.redis.delete(*lab.keys.all)
        began = asyncio.get_running_loop().time()
        again = await worker.wait_for(20)
        assert asyncio.get_running_loop().time() - began < 5
        assert {one.uid for one in again} == {one.uid for one in taken}
        for lease in again:
            assert lease.attempt == 1
            await worker.end(lease)
        for number in range(20):
            await lab.place.wait_for("Completed", name=f"check-{number}")


async def test_an_operator_that_comes_back_takes_up_what_is_queued_runs_and_has_ended(lab: Lab) -> None:
    worker = lab.worker()
    async with lab.operator():
        for name in ("ended", "runs", "waits"):
            await lab.place.create(name, **HEALTH)
        leases = {one.name: one for one in await worker.wait_for(3)}
        await worker.report(leases["runs"], "running")
        await lab.place.wait_for("Processing", name="runs", seconds=20)
    renewing = asyncio.create_task(_renew(worker, leases["runs"], leases["waits"]))
    assert await worker.end(leases["ended"])
    async with lab.operator():
        await lab.place.wait_for("Completed", name="ended")
        assert await worker.end(leases["runs"])
        assert await worker.end(leases["waits"])
        for name in ("runs", "waits"):
            status = await lab.place.wait_for("Completed", name=name)
            assert [one["number"] for one in status["attempts"]] == [1]
    renewing.cancel()


async def _renew(worker: Worker, *leases: Lease) -> None:
    while True:
        await worker.renew(*leases)
        await asyncio.sleep(0.2)


async def test_while_redis_cannot_be_reached_tasks_say_so_and_go_on_when_it_can(lab: Lab) -> None:
    async with lab.operator() as queue:
        queue.down = True
        await lab.place.create("check", **HEALTH)
        await lab.place.wait_for("Queued", name="check", reason="QueueUnavailable", seconds=20)
        queue.down = False
        worker = lab.worker()
        [lease] = await worker.wait_for()
        await worker.end(lease)
        await lab.place.wait_for("Completed", name="check")


async def test_a_task_that_is_canceled_or_suspended_leaves_its_pool_and_its_worker_is_told(lab: Lab) -> None:
    async with lab.operator():
        worker = lab.worker()
        listening = lab.redis.pubsub()
        await listening.subscribe(lab.keys.control)
        await lab.place.create("canceled", **HEALTH)
        await lab.place.create("suspended", **HEALTH)
        leases = {one.name: one for one in await worker.wait_for(2)}
        renewing = asyncio.create_task(_renew(worker, *leases.values()))
        await lab.place.edit("canceled", cancel=True)
        await lab.place.edit("suspended", suspend=True)
        await lab.place.wait_for("Canceled", name="canceled")
        await lab.place.wait_for("Queued", name="suspended", reason="Suspended")
        told: set[str] = set()

        async def heard() -> bool:
            message = await listening.get_message(ignore_subscribe_messages=True, timeout=0.1)
            told.update([] if message is None else [message["data"]])
            return told >= {one.uid for one in leases.values()}

        await until("the worker is told", heard, seconds=10)
        await listening.aclose()  # type: ignore[no-untyped-call]
        renewing.cancel()
        await lab.place.edit("suspended", suspend=False)
        [lease] = await worker.wait_for()
        assert (lease.name, lease.attempt) == ("suspended", 1)
        assert lease.stamp != leases["suspended"].stamp
        await worker.end(lease)
        await lab.place.wait_for("Completed", name="suspended")


async def test_priority_that_is_raised_while_a_task_waits_moves_it_to_its_stream(lab: Lab) -> None:
    async with lab.operator():
        await lab.place.create("check", priority="low", **HEALTH)

        async def there(priority: Priority) -> bool:
            return await lab.redis.xlen(lab.keys.streams[STREAM_OF[priority] - 1]) == 1

        await until("it is among the low", lambda: there(Priority.LOW), seconds=20)
        await lab.place.edit("check", priority="high")
        await until("it is among the high", lambda: there(Priority.HIGH), seconds=20)
        assert not await there(Priority.LOW)


async def test_many_tasks_are_offered_in_few_requests(lab: Lab) -> None:
    async with lab.operator() as queue:
        await asyncio.gather(*(lab.place.create(f"check-{number}", **HEALTH) for number in range(60)))
        worker, done = lab.worker(), set[str]()

        async def work() -> bool:
            for lease in await worker.take():
                await worker.end(lease)
                done.add(lease.name)
            return len(done) == 60

        await until("all are done", work, seconds=60, interval=0.02)
        for number in range(60):
            await lab.place.wait_for("Completed", name=f"check-{number}")
        assert queue.offers < 40
