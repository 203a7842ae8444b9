"""The controller of worker pools against an API and a queue that are a few dictionaries, when things go wrong."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from task_contract.leases import PoolKeys, WorkerState
from task_operator.jobs import RunnerTemplate
from task_operator.metrics import Metrics
from task_operator.pool_controller import PoolController
from task_operator.pool_metrics import PoolMetrics
from task_operator.pool_queue import Look, QueueUnavailable, Worker
from task_operator.pools import Backlog
from task_platform.kubernetes import Conflict, Forbidden, Manifest, NotFound, Page
from tests.support.operator_lab import until
from tests.support.operator_values import stamp
from tests.support.pool_values import POOL_UID, pool_manifest

KEY = ("knowledge", "texts")


@dataclass
class FakeApi:
    """Pools and Jobs of one namespace."""

    pools: dict[str, Manifest] = field(default_factory=dict)
    jobs: dict[str, Manifest] = field(default_factory=dict)
    error: Exception | None = None
    """What listing pools is refused with."""
    refuses: Exception | None = None
    """What creating a Job is refused with."""
    lose_answer: bool = False
    """Whether the next Job is created and the answer is lost: as if it were there already."""
    version: int = 1000
    statuses: list[Mapping[str, Any]] = field(default_factory=list)
    creations: int = 0

    async def list_pools(self, namespace: str | None) -> AsyncIterator[Page]:
        if self.error is not None:
            raise self.error
        yield Page([*self.pools.values()], self.version)

    async def list_worker_jobs(self, namespace: str | None) -> AsyncIterator[Page]:
        yield Page([*self.jobs.values()], self.version)

    async def list_worker_pods(self, namespace: str, *, job: str) -> list[Manifest]:
        return []

    async def pod_refusal(self, namespace: str, *, job_uid: str) -> str | None:
        return "exceeded quota: pods"

    async def get_job(self, namespace: str, name: str) -> Manifest:
        return self.jobs[name]

    async def create_job(self, job: Manifest) -> Manifest:
        self.creations += 1
        if self.refuses is not None:
            raise self.refuses
        if job["metadata"]["name"] in self.jobs:
            raise Conflict("already exists", status=409)
        self.version += 1
        metadata = {"uid": f"uid-{self.version}", "resourceVersion": str(self.version), "creationTimestamp": stamp(0)}
        stored = job | {"metadata": job["metadata"] | metadata}
        self.jobs[job["metadata"]["name"]] = stored
        if self.lose_answer:
            self.lose_answer = False
            raise Conflict("already exists", status=409)
        return stored

    async def delete_job(self, namespace: str, name: str, *, uid: str) -> None:
        self.jobs.pop(name, None)

    async def patch_pool_status(self, namespace: str, name: str, *, uid: str, status: Mapping[str, Any]) -> Manifest:
        self.statuses.append(status)
        self.version += 1
        stored = self.pools[name]
        stored["metadata"]["resourceVersion"] = str(self.version)
        stored["status"] = dict(status)
        return stored


@dataclass
class FakeQueue:
    """Redis."""

    down: bool = False
    workers: dict[str, Worker] = field(default_factory=dict)
    drained: list[list[str]] = field(default_factory=list)
    dropped: list[PoolKeys] = field(default_factory=list)

    async def look(self, keys: PoolKeys, **_: Any) -> Look:
        if self.down:
            raise QueueUnavailable("cannot use Redis: refused")
        return Look(0, 0, {}, frozenset(), dict(self.workers))

    async def drain(self, keys: PoolKeys, workers: Sequence[str]) -> None:
        self.drained.append([*workers])

    async def dismiss(self, keys: PoolKeys, workers: Sequence[str]) -> None:
        pass

    async def drop(self, keys: PoolKeys) -> None:
        self.dropped.append(keys)


@dataclass
class Lab:
    api: FakeApi = field(default_factory=FakeApi)
    queue: FakeQueue = field(default_factory=FakeQueue)
    metrics: Metrics = field(default_factory=Metrics)
    looks: list[Look | None] = field(default_factory=list)
    waiting: int = 0

    def __post_init__(self) -> None:
        self.pools = PoolController(
            api=self.api,
            queue=self.queue,  # type: ignore[arg-type]  # as much of it as is used
            template=RunnerTemplate(image="runner:1"),
            metrics=PoolMetrics(self.metrics),
            on_look=lambda _, look: self.looks.append(look),
            backlog=lambda _: Backlog(self.waiting),
        )

    def add(self, **spec: Any) -> None:
        self.api.pools["texts"] = pool_manifest(spec=spec)
        self.pools.on_pool("ADDED", self.api.pools["texts"])

    def hear(self, *, tasks: int = 0, renewals: int = 0) -> None:
        for name in self.api.jobs:
            state = WorkerState(worker=f"{name}-pod", job=name, ready=True, tasks=tasks, renewals=renewals, load_seconds=2)
            self.queue.workers[f"{name}-pod"] = Worker(state, 0.0)

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator["Lab"]:
        watching = asyncio.Event()
        watching.set()
        work = asyncio.create_task(self.pools.run(watching))
        try:
            await until("it is synced", self._synced, seconds=5, interval=0.01)
            yield self
            assert not work.done(), work.exception()
        finally:
            work.cancel()
            await asyncio.wait([work])

    async def _synced(self) -> bool:
        return self.pools.synced

    async def said(self, reason: str, text: str = "") -> None:
        """Wait for a condition with this reason and this text in its message."""

        async def look() -> bool:
            found = self.api.statuses[-1]["conditions"] if self.api.statuses else ()
            return any(one["reason"] == reason and text in one["message"] for one in found)

        await until(f"{reason}: {text}", look, seconds=10, interval=0.02)

    async def has(self, number: int) -> None:
        async def look() -> bool:
            return len(self.api.jobs) == number

        await until(f"{number} Jobs", look, seconds=10, interval=0.02)


@pytest.mark.parametrize("error", [NotFound("no such resource", status=404), Forbidden("not allowed", status=403)])
async def test_without_the_crd_the_operator_goes_on_and_finds_it_later(error: Exception, monkeypatch: Any) -> None:
    monkeypatch.setattr("task_operator.lookout._ABSENT", 0.05)
    lab = Lab()
    lab.api.error = error
    async with lab.at_work():
        assert lab.pools.synced
        assert lab.pools.pools() == []
        lab.api.pools["texts"] = pool_manifest(spec={"min": 1})
        lab.api.error = None
        await lab.has(1)
        assert [pool.name for pool in lab.pools.pools()] == ["texts"]


async def test_an_answer_that_was_lost_makes_no_second_worker() -> None:
    lab = Lab()
    lab.api.lose_answer = True
    async with lab.at_work():
        lab.add(min=1)
        await lab.has(1)
        await lab.said("WorkersStart")
    assert len(lab.api.jobs) == 1


async def test_a_job_of_that_name_that_is_somebody_elses_is_left_alone_and_named() -> None:
    lab = Lab()
    async with lab.at_work():
        lab.add(min=1)
        await lab.has(1)
    ((name, job),) = lab.api.jobs.items()
    other = Lab()
    owner = job["metadata"]["ownerReferences"][0] | {"uid": "another"}
    other.api.jobs[name] = job | {"metadata": job["metadata"] | {"ownerReferences": [owner]}}
    async with other.at_work():
        other.add(min=1)
        await other.said("WorkersStart", f"there is a Job {name} that is not of this pool")
    assert [*other.api.jobs] == [name]


async def test_what_a_quota_refuses_is_said_and_not_tried_each_second() -> None:
    lab = Lab()
    lab.api.refuses = Forbidden("exceeded quota: count/jobs.batch", status=403)
    async with lab.at_work():
        lab.add(min=3)
        await lab.said("WorkersStart", "exceeded quota: count/jobs.batch")
    assert lab.api.creations == 1


async def test_a_status_is_written_where_it_differs_and_nowhere_else() -> None:
    lab = Lab()
    async with lab.at_work():
        lab.add(min=1)
        await lab.has(1)
        lab.hear()
        await lab.said("Serving")
        written = len(lab.api.statuses)
        looks = len(lab.looks)

        async def looked() -> bool:
            return len(lab.looks) >= looks + 3

        await until("three more looks", looked, seconds=10)
        assert len(lab.api.statuses) == written


async def test_looks_are_handed_on_once_a_second_however_much_happens() -> None:
    lab = Lab()
    async with lab.at_work():
        lab.add()
        began = asyncio.get_running_loop().time()
        while len(lab.looks) < 3:
            lab.pools._lookout.soon(("knowledge", "texts"))
            await asyncio.sleep(0.02)
        assert asyncio.get_running_loop().time() - began >= 1.7


async def test_an_operator_that_leads_again_tells_workers_anew_who_drains() -> None:
    lab = Lab()
    lab.add(min=1)
    for times in (1, 2):  # between them another one has led
        async with lab.at_work():

            async def told(times: int = times) -> bool:
                return len(lab.queue.drained) == times

            await until("workers are told", told, seconds=10)
    assert lab.queue.drained == [[], []]


async def test_redis_that_is_down_is_told_as_nothing_seen() -> None:
    lab = Lab()
    lab.queue.down = True
    async with lab.at_work():
        lab.add(min=1)
        await lab.said("RedisUnavailable", "refused")
    assert set(lab.looks) == {None}
    assert lab.queue.drained == []


async def test_the_keys_of_a_pool_that_is_gone_are_dropped_unless_there_is_another_of_its_name() -> None:
    lab = Lab()
    async with lab.at_work():
        lab.add()
        gone = lab.api.pools.pop("texts")
        lab.pools.on_pool("DELETED", gone)

        async def dropped() -> bool:
            return bool(lab.queue.dropped)

        await until("the keys are dropped", dropped, seconds=5)
        assert lab.queue.dropped == [PoolKeys(*KEY)]
        assert lab.pools.pools() == []


async def test_an_event_that_is_late_changes_nothing() -> None:
    lab = Lab()
    lab.add(min=1)
    lab.pools.on_pool("MODIFIED", pool_manifest(spec={"min": 3}, resourceVersion="99"))
    lab.pools.on_pool("DELETED", pool_manifest(uid="an earlier one of that name"))
    (pool,) = lab.pools.pools()
    assert pool.spec.min == 1


async def test_a_pool_of_a_later_release_is_left_alone() -> None:
    lab = Lab()
    lab.add(types=["cooking"])
    assert lab.pools.pools() == []


async def test_what_workers_count_is_counted_once_and_what_was_before_is_not_new() -> None:
    lab = Lab()
    lab.api.pools["texts"] = pool_manifest(spec={"min": 1})
    labels = {"namespace": "knowledge", "pool": "texts"}

    async def counted(name: str, number: float) -> None:
        async def look() -> bool:
            return lab.metrics.registry.get_sample_value(name, labels) == number

        await until(f"{name} is {number}", look, seconds=10)

    async with lab.at_work():
        await lab.has(1)
        lab.hear(tasks=3, renewals=1)
        await counted("task_pool_attempts_total", 3)
        lab.hear(tasks=7, renewals=2)
        await counted("task_pool_attempts_total", 7)
        lab.hear(tasks=2, renewals=1)  # begun anew
        await counted("task_pool_attempts_total", 9)
        await counted("task_pool_load_seconds_count", 1)
        await counted("worker_pool_idle_count", 1)
    again = Lab(api=lab.api, queue=lab.queue)
    async with again.at_work():
        lab = again
        await counted("worker_pool_idle_count", 1)
        await counted("task_pool_attempts_total", 0)
        gone = again.api.pools.pop("texts")
        again.pools.on_pool("DELETED", gone)
        assert again.metrics.registry.get_sample_value("worker_pool_idle_count", labels) is None
    assert gone["metadata"]["uid"] == POOL_UID
