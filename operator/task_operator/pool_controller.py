"""Worker pools: Jobs of their workers, size, status. Gathers, lets :mod:`task_operator.pools` decide, and applies.

Each second, and soon after news, a pool is looked at whole: its Jobs as the watch knows them, its queue and its workers in
Redis, what waits for it. Everything that is done may be done twice, and whoever dies in between leaves nothing that the next
pass does not see: Jobs have names that follow from slot and revision, ``409`` for one of ours is success, the workers that
are to drain are told as a whole, and the status is written where it differs. What is only remembered (since when a pool is
idle, how many workers it wanted) costs a later scaling down when it is lost.

A cluster without the CRD WorkerPool, or without the right to list pools, has none; that is looked at again now and then.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import structlog
from pydantic import ValidationError

from task_contract.leases import PoolKeys, WorkerState
from task_contract.pools import PoolStatus
from task_operator.jobs import RunnerTemplate
from task_operator.lookout import Lookout
from task_operator.pool_jobs import build_worker_job, pool_of, revision_of, said_of, worker_job
from task_operator.pool_metrics import PoolMetrics
from task_operator.pool_queue import Look, PoolQueue, QueueUnavailable
from task_operator.pools import NOT_CONFIGURED, Backlog, Memory, NewWorker, Plan, Pool, Seen, Trouble, WorkerJob, plan
from task_platform.kubernetes import ClusterError, Conflict, Forbidden, Manifest, NotFound, Page

_log = structlog.get_logger(__name__)

Key = tuple[str, str]
"""Namespace and name of a pool."""
OnLook = Callable[[Pool, Look | None], None]
"""Takes what there is of a pool in Redis, each second; None: Redis cannot be used."""

_EVERY: Final = 1.0  # seconds between two looks at a pool
_ASK_AGAIN: Final = 10.0  # seconds between two questions about the same pod, or two tries of what was refused
_DRAIN_AGAIN: Final = 5.0  # seconds after which workers are told again that they are to drain: Redis may have been wiped


class Api(Protocol):
    """The part of :class:`task_operator.cluster.Cluster` that is used."""

    def list_pools(self, namespace: str | None) -> AsyncIterator[Page]: ...  # noqa: D102 - see Cluster
    def list_worker_jobs(self, namespace: str | None) -> AsyncIterator[Page]: ...  # noqa: D102
    async def list_worker_pods(self, namespace: str, *, job: str) -> list[Manifest]: ...  # noqa: D102
    async def pod_refusal(self, namespace: str, *, job_uid: str) -> str | None: ...  # noqa: D102
    async def get_job(self, namespace: str, name: str) -> Manifest: ...  # noqa: D102
    async def create_job(self, job: Manifest) -> Manifest: ...  # noqa: D102
    async def delete_job(self, namespace: str, name: str, *, uid: str) -> None: ...  # noqa: D102
    async def patch_pool_status(  # noqa: D102
        self, namespace: str, name: str, *, uid: str, status: Mapping[str, Any]
    ) -> Manifest: ...


@dataclass(slots=True)
class _Known:
    """What is known of a pool besides its Jobs."""

    pool: Pool
    version: int
    status: PoolStatus
    revision: str
    memory: Memory = field(default_factory=Memory)
    told: frozenset[str] | None = None
    """The workers that were told to drain; None: nothing is known to stand in Redis."""
    told_at: float = 0
    looked_at: float = float("-inf")
    written_at: float = float("-inf")
    refused: str = ""
    refused_at: float = float("-inf")
    counted: dict[str, WorkerState] | None = None
    """What workers had said of themselves when it was counted last, by their name."""


@dataclass(frozen=True, slots=True)
class _Job:
    job: WorkerJob
    version: int


class PoolController:
    """Keeps worker pools as they are to be, until cancelled."""

    def __init__(
        self,
        *,
        api: Api,
        queue: PoolQueue | None,
        template: RunnerTemplate,
        metrics: PoolMetrics,
        on_look: OnLook,
        backlog: Callable[[Pool], Backlog],
        namespaces: Sequence[str] = (),
        watched: bool = True,
        resync_seconds: float = 300,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``queue``: None if no Redis is configured. ``watched``: whether :meth:`on_pool` is told of pools; else they are
        listed every few seconds."""
        self._api = api
        self._queue = queue
        self._template = template
        self._metrics = metrics
        self._on_look = on_look
        self._backlog = backlog
        self._namespaces: tuple[str | None, ...] = tuple(namespaces) or (None,)
        self._clock = clock
        self._monotonic = monotonic
        self._known: dict[Key, _Known] = {}
        self._jobs: dict[Key, dict[str, _Job]] = {}
        self._said: dict[str, tuple[str, float]] = {}
        """What the pods of a Job said, and when they were asked, by its uid."""
        self._dropped: list[tuple[float, PoolKeys]] = []
        """Pools that are gone, and from when on what late workers have written to Redis is removed."""
        self._synced = False
        self._lookout = Lookout("pools", listing=self._list, watched=watched, resync_seconds=resync_seconds)

    # ------------------------------------------------------------------------------------------------- what is known

    @property
    def synced(self) -> bool:
        """Whether all pools have been listed once: before that nobody can say of a task that no pool serves it."""
        return self._synced

    def pools(self) -> Sequence[Pool]:
        """Return the pools of all namespaces, also those on their way out; none without a Redis to queue for them."""
        return () if self._queue is None else [known.pool for known in self._known.values()]

    def on_pool(self, kind: str, manifest: Mapping[str, Any]) -> None:
        """Take an event of the watch on WorkerPools."""
        metadata = manifest["metadata"]
        key = (metadata["namespace"], metadata["name"])
        if kind == "DELETED":
            known = self._known.get(key)
            if known is not None and known.pool.uid == metadata["uid"]:
                self._forget(key)
            return
        self._put_pool(key, manifest)

    def on_worker_job(self, kind: str, manifest: Mapping[str, Any]) -> None:
        """Take an event of the watch on Jobs; those that are no worker's are ignored."""
        key = pool_of(manifest)
        if key is None:
            return
        name = manifest["metadata"]["name"]
        if kind == "DELETED":
            known = self._jobs.get(key, {}).get(name)
            if known is not None and known.job.uid == manifest["metadata"]["uid"]:
                self._drop_job(key, name)
        else:
            self._put_job(key, manifest)
        self._lookout.soon(key)

    def relist(self) -> None:
        """Have everything listed soon: a watch was lost for longer than the server remembers, with deletions unseen."""
        self._lookout.relist()

    def _put_pool(self, key: Key, manifest: Mapping[str, Any]) -> None:
        version = int(manifest["metadata"]["resourceVersion"])
        known = self._known.get(key)
        if known is not None and version < known.version:
            return
        try:
            pool = Pool.from_manifest(manifest)
        except ValidationError as error:  # of a later release; its tasks have Jobs
            _log.warning("cannot read a WorkerPool", namespace=key[0], pool=key[1], error=str(error))
            if known is not None:
                self._forget(key)
            return
        try:
            status = PoolStatus.model_validate(manifest.get("status") or {})
        except ValidationError:  # it is written anew
            status = PoolStatus()
        if known is None or known.pool.uid != pool.uid:
            self._known[key] = _Known(pool, version, status, revision_of(pool, self._template))
            self._lookout.soon(key)
            return
        if known.pool != pool:
            known.pool, known.revision = pool, revision_of(pool, self._template)
            self._lookout.soon(key)
        known.version, known.status = version, status

    def _forget(self, key: Key) -> None:
        """A pool is gone. Owner references end its workers, who may write to Redis until they have ended."""
        known = self._known.pop(key)
        self._metrics.forget(*key)
        grace = known.pool.spec.grace_period + known.pool.spec.lease
        now = self._monotonic()
        self._dropped += [(now, known.pool.keys), (now + grace.total_seconds(), known.pool.keys)]
        self._lookout.soon(key)

    def _put_job(self, key: Key, manifest: Mapping[str, Any]) -> None:
        job = worker_job(manifest)
        version = int(manifest["metadata"]["resourceVersion"])
        jobs = self._jobs.setdefault(key, {})
        if job is None:
            return
        known = jobs.get(job.name)
        if known is not None and version < known.version:
            return
        jobs[job.name] = _Job(job, version)

    def _drop_job(self, key: Key, name: str) -> None:
        jobs = self._jobs[key]
        self._said.pop(jobs.pop(name).job.uid, None)
        if not jobs:
            del self._jobs[key]

    # ----------------------------------------------------------------------------------------------------- running

    async def run(self, watching: asyncio.Event) -> None:
        """Wait for the watches, list everything, look at every pool each second. May be run again after it was cancelled."""
        await watching.wait()
        for known in self._known.values():  # another operator may have led meanwhile, and told workers other things
            known.memory, known.told, known.counted = Memory(), None, None
        await self._lookout.list_until_done()
        self._synced = True
        self._lookout.restart()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._lookout.list_forever(), name="pool lists")
            group.create_task(self._drop_forever(), name="pool drops")
            full = self._monotonic()
            while True:
                now = self._monotonic()
                everyone: Collection[Key] = ()
                if now >= full:
                    everyone, full = self._known.keys(), now + _EVERY
                for key in self._lookout.begin(self._known, everyone):
                    group.create_task(self._guarded(key), name=f"pool {key[0]}/{key[1]}")
                await self._lookout.rest(full - self._monotonic())

    async def _list(self) -> None:
        """List pools and Jobs of workers. A cluster that has no WorkerPools, or does not show them, has none."""
        pools: dict[Key, Manifest] = {}
        jobs: dict[tuple[Key, str], Manifest] = {}
        pools_at = jobs_at = 0
        try:
            for namespace in self._namespaces:
                async for page in self._api.list_pools(namespace):
                    pools_at = page.resource_version
                    pools |= {(one["metadata"]["namespace"], one["metadata"]["name"]): one for one in page.items}
        except (NotFound, Forbidden) as error:
            if not self._lookout.absent:
                _log.warning("there are no worker pools: install the CRD workerpools with its rights", error=error.message)
            self._lookout.absent = error.message
            return
        if self._lookout.absent:
            _log.info("there are worker pools now")
            self._lookout.absent = ""
        for namespace in self._namespaces:
            async for page in self._api.list_worker_jobs(namespace):
                jobs_at = page.resource_version
                jobs |= {(key, one["metadata"]["name"]): one for one in page.items if (key := pool_of(one)) is not None}
        for pool_key in [key for key, known in self._known.items() if key not in pools and known.version <= pools_at]:
            self._forget(pool_key)
        for pool_key, manifest in pools.items():
            self._put_pool(pool_key, manifest)
        listed = [(key, name, known) for key, found in self._jobs.items() for name, known in found.items()]
        for key, name, known in listed:
            if (key, name) not in jobs and known.version <= jobs_at:
                self._drop_job(key, name)
        for (key, _), manifest in jobs.items():
            self._put_job(key, manifest)

    async def _guarded(self, key: Key) -> None:
        try:
            await self._look(key)
        except ClusterError as error:
            _log.warning("cannot look after a pool; trying again", namespace=key[0], pool=key[1], error=error.message)
        except Exception:  # noqa: BLE001 - a bug in one pool must not end the others, nor the tasks
            _log.exception("cannot look after a pool", namespace=key[0], pool=key[1])
        finally:
            self._lookout.ended(key)

    async def _drop_forever(self) -> None:
        while True:
            await self._drop_what_is_gone()
            await asyncio.sleep(_EVERY)

    async def _drop_what_is_gone(self) -> None:
        now = self._monotonic()
        for due in [one for one in self._dropped if one[0] <= now]:
            self._dropped.remove(due)
            keys = due[1]
            if self._queue is None or (keys.namespace, keys.pool) in self._known:
                continue  # there is one of that name again
            try:
                await self._queue.drop(keys)
            except QueueUnavailable:
                self._dropped.append((now + _ASK_AGAIN, keys))

    # ---------------------------------------------------------------------------------------------------- one pool

    async def _look(self, key: Key) -> None:
        known = self._known.get(key)
        if known is None or known.pool.deleting:
            return  # its workers end by their owner's end
        look, trouble = await self._queue_of(known)
        if self._known.get(key) is not known:
            return  # it went meanwhile
        self._tell(known, look)
        seen = Seen(
            pool=known.pool,
            revision=known.revision,
            jobs=self._jobs_of(key, known.pool.uid),
            backlog=self._backlog(known.pool),
            look=look,
            trouble=trouble,
            status=known.status,
            now=self._clock(),
            second=self._monotonic(),
            refused=known.refused,
        )
        decided = plan(seen, known.memory)
        known.memory = decided.memory
        self._metrics.seen(*key, decided.status, oldest_seconds=seen.backlog.oldest_seconds)
        if look is not None:
            self._count(key, known, look)
        await self._apply(key, known, decided)

    def _jobs_of(self, key: Key, uid: str) -> list[WorkerJob]:
        found = [one.job for one in self._jobs.get(key, {}).values() if one.job.pool_uid == uid]
        return [replace(job, message=self._said[job.uid][0]) if job.uid in self._said else job for job in found]

    async def _queue_of(self, known: _Known) -> tuple[Look | None, Trouble | None]:
        if self._queue is None:
            message = "the operator is told of no Redis, through which workers get their tasks; set OPERATOR_REDIS_URL"
            return None, Trouble(NOT_CONFIGURED, message)
        try:
            return await self._queue.look(known.pool.keys, lease=known.pool.spec.lease, now=self._clock()), None
        except QueueUnavailable as error:
            known.told = None
            return None, Trouble("RedisUnavailable", f"{error}; workers stay as they are, and get no tasks")

    def _tell(self, known: _Known, look: Look | None) -> None:
        """Hand on a look, no more often than each second: who gets two without a task in them may offer it again."""
        now = self._monotonic()
        if now - known.looked_at >= 0.9 * _EVERY:
            known.looked_at = now
            self._on_look(known.pool, look)

    async def _apply(self, key: Key, known: _Known, decided: Plan) -> None:
        if self._queue is not None and decided.drain is not None:
            try:
                await self._drain(self._queue, known, decided.drain)
                if decided.dismiss:
                    await self._queue.dismiss(known.pool.keys, decided.dismiss)
            except QueueUnavailable as error:  # the next look says so
                _log.warning("cannot tell workers", namespace=key[0], pool=key[1], error=str(error))
                known.told = None
        for job in decided.delete:
            await self._delete(key, job)
        now = self._monotonic()
        if now - known.refused_at >= _ASK_AGAIN:
            for new in decided.create:
                if not await self._create(key, known, new):
                    break
        for job in decided.ask:
            await self._ask(job)
        if decided.status != known.status and now - known.written_at >= _EVERY and self._known.get(key) is known:
            known.written_at = now
            await self._write(key, known, decided.status)

    async def _drain(self, queue: PoolQueue, known: _Known, workers: frozenset[str]) -> None:
        now = self._monotonic()
        if workers == known.told and (not workers or now - known.told_at < _DRAIN_AGAIN):
            return
        await queue.drain(known.pool.keys, sorted(workers))
        known.told, known.told_at = workers, now

    async def _delete(self, key: Key, job: WorkerJob) -> None:
        await self._api.delete_job(job.namespace, job.name, uid=job.uid)
        there = self._jobs.get(key, {}).get(job.name)
        if there is not None and there.job.uid == job.uid:  # until the watch tells that it is gone
            self._jobs[key][job.name] = replace(there, job=replace(there.job, deleting=True))

    async def _create(self, key: Key, known: _Known, new: NewWorker) -> bool:
        """Create a worker's Job; return whether there is one now."""
        job = build_worker_job(known.pool, new, revision=known.revision, template=self._template)
        try:
            self._put_job(key, await self._api.create_job(job))
        except Conflict:
            there = await self._api.get_job(key[0], job["metadata"]["name"])
            mine = worker_job(there)
            if mine is None or mine.pool_uid != known.pool.uid:
                known.refused = f"there is a Job {job['metadata']['name']} that is not of this pool; delete it"
                known.refused_at = self._monotonic()
                return False
            self._put_job(key, there)  # the answer to an earlier try was lost, or the watch is behind
        except ClusterError as error:
            known.refused, known.refused_at = error.message, self._monotonic()
            _log.warning("cannot create a worker", namespace=key[0], pool=key[1], error=error.message)
            return False
        known.refused = ""
        return True

    async def _ask(self, job: WorkerJob) -> None:
        """Find out what the pods of a Job say, or why there is none."""
        now = self._monotonic()
        if now - self._said.get(job.uid, ("", float("-inf")))[1] < _ASK_AGAIN:
            return
        said = said_of(await self._api.list_worker_pods(job.namespace, job=job.name))
        if not said and (refusal := await self._api.pod_refusal(job.namespace, job_uid=job.uid)):
            said = f"has no pod: {refusal}"
        self._said[job.uid] = (said, now)

    async def _write(self, key: Key, known: _Known, status: PoolStatus) -> None:
        try:
            stored = await self._api.patch_pool_status(*key, uid=known.pool.uid, status=status.manifest())
        except (NotFound, Conflict):
            return  # it has gone, or is another one of that name: the watch tells
        self._metrics.wrote()
        self._put_pool(key, stored)

    def _count(self, key: Key, known: _Known, look: Look) -> None:
        """Count what workers have done since they were looked at last. Those of an operator before this one are not new."""
        before, now = known.counted, {name: worker.state for name, worker in look.workers.items()}
        known.counted = now
        for name, state in now.items():
            old = state if before is None else before.get(name, WorkerState(worker=name))
            self._metrics.worked(*key, before=old, now=state)
        held = [worker.silent for worker in look.workers.values() if worker.state.leased]
        self._metrics.leases(*key, age=max(held, default=0.0), expired=look.expired)
