"""From changes to decisions to writes: the loop around :func:`task_operator.reconcile.decide`.

Whatever changes, a task's key goes into the work queue. A worker takes it, gathers what is known of the task, decides, and
applies the decision. No two workers look at one task at a time, and a look that fails is repeated with growing waits. A full
resync lists everything anew from time to time and covers every event that was missed.

**Nothing is lost.** The process may be killed before or after any write; the next one starts from lists. What makes each
place safe, in the order in which the writes of a task come:

- *before the Job is created*: the task is Queued (or Retrying, and its time has come) and has no Job: it is created.
- *Job created, answer or process lost*: its name follows from task and attempt, so creating it again is answered with
  AlreadyExists; the Job that is there names our task's uid as its owner, and is taken for the one that was made.
- *Job created → Processing written*: status still says Queued or Retrying; the Job is found and read. If it has ended
  meanwhile Processing is skipped.
- *Job ended → end written*: the Job and its pod stay until the task says how they ended: nobody deletes them before (their
  TTL of a day is the backstop, and then ``task_results`` has the outcome, which is looked for before a Job is made anew).
- *Retrying written → next Job created*: number and time of the next attempt follow from the status alone (``attempts``
  holds the spent number, ``retryAt`` the time).
- *documents of a batch left → Job for their shards created*: which are left is read from PostgreSQL each time, so it does
  not matter which Jobs there were. A Job that was made before is taken as it is, for the shards that it was made for.
- *documents left after the last attempt → counted as failed → end written*: counting them again finds none left.
- *next Job created → Job of the earlier attempt deleted*: Jobs of lower attempts are deleted whenever the current has one.
- *given back: Queued written → Job deleted → Job of the same number created*: writing Queued gives the task a new
  ``queuedAt``; a Job carries the ``queuedAt`` it was made under. One that carries another is the one that was given back:
  it is deleted, not read, and blocks its name until it is gone.
- *fence raised → Canceled written → Job deleted*: raising the fence again finds it raised. A Job that still runs when its
  task has ended is deleted; its runner fails at the fence.
- *intents taken from a pod that does not stop → Queued written*: taking them again is harmless, and the pod that takes them
  up next raises the epoch anyway.
- *offered to a pool, answer or process lost*: nothing of it stands in the status. The task is Queued (or Retrying, and its
  time has come), so it is offered again; the same attempt in the same stay in the queue is there once, whoever offers it.
  What may have ended meanwhile is looked for in ``task_results`` before.
- *a worker reported → status written → report removed*: a report stays in Redis until the status says what it says. Read
  again, by whichever process, it is one of an attempt that is spent, of an earlier stay, or of a finished task, and goes.
- *worker silent for its lease → intents taken → Retrying written → next attempt offered*: the report that the lease ran out
  stays until Retrying is written; taking the intents again is harmless, and the worker cannot commit from the first time on.
- *ended, suspended, or gone to a Job: written → withdrawn from the pool*: each look at the pool takes out what should not be
  there; until then a worker may go on, and fails at the fence, or reports what concerns nobody.
- *Redis wiped*: what was offered is not there in two looks in a row, and is offered again. What Redis knew of the end of an
  attempt, ``task_results`` knows.
- *end written → last Job, and in the end the task deleted (TTL)*: deletion needs the end to be known to be in PostgreSQL:
  written by this process, or found there by it.

Every status write carries the resourceVersion it was decided upon, every deletion the uid: what was decided upon something
old is refused (409), and looked at again.
"""

import asyncio
import contextlib
import random as random_module
import sys
import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import islice
from typing import Any, Final, Protocol, TypeVar, cast

import orjson
import structlog
from pydantic import ValidationError

from task_contract.leases import PoolReport, ReportKind
from task_contract.messages import Outcome, ProgressEvent
from task_contract.models import Metadata, Phase, ProcessingTask, Stage, Status, TaskType, describe
from task_contract.names import API_VERSION, KIND
from task_contract.tracing import trace_of
from task_operator.cache import FINISHED, Cache, CachedTask, Key, job_key, surplus
from task_operator.dependencies import Dependencies, Dependency, circle_through
from task_operator.dispatch import Claim, Dispatch, Limit, Limits, Place
from task_operator.events import of_transition, of_wait
from task_operator.jobs import (
    JobState,
    PodReport,
    RunnerTemplate,
    build_job,
    current_attempt,
    parse_time,
    pod_report,
    queue_stamp,
)
from task_operator.metrics import Metrics, Waiting
from task_operator.observation import Batch, Decision, Fence, Need, Observed, Policy, Refusal, Store, StoredOutcome, view_of
from task_operator.pool_queue import Look, Offer, QueueUnavailable
from task_operator.pool_tasks import PoolPort, PoolTasks, Queue
from task_operator.pools import Backlog, Pool
from task_operator.projection import Database, DatabaseUnavailable, Held
from task_operator.reconcile import decide, refuse
from task_operator.selection import instance_of
from task_operator.statuses import tells_a_wait
from task_operator.verdict import WORKER_LOST
from task_operator.waits import refused_for
from task_operator.workqueue import Glances, Turn, WorkQueue
from task_platform.kubernetes import ClusterError, Conflict, Forbidden, Gone, Invalid, Manifest, NotFound, Page, Unavailable

T = TypeVar("T")

_log = structlog.get_logger(__name__)

_WORKERS: Final = 24
_PODS_AT_ONCE: Final = 50
"""Tasks whose pods are looked at together where they do not start, in one list of each namespace."""
_PODS_APART: Final = 1.0
"""Seconds from one such look to the next: in a burst of a thousand Jobs there were ten lists a second, and what they told
was over before it could be written."""
_ORPHAN_PATIENCE: Final = 3.0  # seconds in which the garbage collector may do it
_CONFLICTS: Final = 4  # looks in a row that may end in a conflict before the task waits
_ROUNDS: Final = 12  # a decision asks for at most one thing a round, and there are nine
_POSITIONS: Final = 10.0  # seconds between two looks whose position in line is to be told
_TOLD: Final = 100  # of them, those in front: ten writes a second, however fast a long line moves
_PRUNED: Final = 500  # tasks of a namespace deleted in a row
_EPOCH: Final = datetime.fromtimestamp(0, UTC)
_REACHED_STORES: Final = frozenset({Stage.ANALYZE, Stage.VERIFY, Stage.GATE, Stage.PUBLISH})


class VersionsWentBack(Exception):
    """The API server counts its versions from an earlier number than it did: its etcd was restored from a backup.

    What is cached is of a history that is lost. So are the watches: they wait, without an error, for versions above the
    last one that they saw. Only a new process helps, as Kubernetes advises for all controllers after a restore; and it is
    enough, since it begins with lists.
    """

    def __str__(self) -> str:
        return "the API server was restored from a backup: its versions went back; starting anew"


class Api(Protocol):
    """The part of :class:`task_operator.cluster.Cluster` that is used."""

    async def check_access(self, namespace: str | None) -> None: ...  # noqa: D102 - see Cluster
    async def task_version(self, namespace: str | None) -> int: ...  # noqa: D102
    def list_tasks(self, namespace: str | None) -> AsyncIterator[Page]: ...  # noqa: D102
    def list_uids(self, namespace: str | None) -> AsyncIterator[set[str]]: ...  # noqa: D102 - see Cluster
    def list_jobs(self, namespace: str | None) -> AsyncIterator[Page]: ...  # noqa: D102
    async def list_pods(self, namespace: str, *, task_uid: str) -> list[Manifest]: ...  # noqa: D102
    async def pod_refusal(self, namespace: str, *, job_uid: str) -> str | None: ...  # noqa: D102
    async def get_task(self, namespace: str, name: str) -> Manifest: ...  # noqa: D102
    async def get_job(self, namespace: str, name: str) -> Manifest: ...  # noqa: D102
    async def create_job(self, job: Manifest) -> Manifest: ...  # noqa: D102
    async def delete_job(self, namespace: str, name: str, *, uid: str) -> None: ...  # noqa: D102
    async def delete_task(self, namespace: str, name: str, *, uid: str, resource_version: int) -> None: ...  # noqa: D102
    async def put_status(  # noqa: D102 - see Cluster
        self, namespace: str, name: str, *, uid: str, resource_version: int, status: Mapping[str, Any]
    ) -> Manifest: ...
    async def patch_status(  # noqa: D102
        self, namespace: str, name: str, *, uid: str, resource_version: int, patch: Mapping[str, Any]
    ) -> Manifest: ...
    async def replace_status(  # noqa: D102
        self, namespace: str, name: str, *, uid: str, generation: int, before: Mapping[str, Any], after: Mapping[str, Any]
    ) -> Manifest: ...


@dataclass(slots=True)
class _Facts:
    """What one look has found out beyond the cache."""

    insist: bool = False
    """Earlier looks in the same row ended in conflicts: write unless spec or status have changed, whatever else has."""
    news: float | None = None
    """Since when what has changed waits to be told, on the clock of time.perf_counter; None: nothing has but the time."""
    answered: frozenset[Need] = frozenset()
    pods: tuple[PodReport, ...] = ()
    pod_refusal: str | None = None
    result: StoredOutcome | None = None
    fence: Fence | None = None
    release: Fence | None = None
    batch: Batch | None = None
    dependencies: Dependencies = Dependencies()  # noqa: RUF009 - frozen
    place: Place | None = None
    refusal: Refusal | None = None
    reports: tuple[PoolReport, ...] = ()
    """Those that the last decision rests on."""
    claim: Claim | None = None


@dataclass(slots=True)
class _Live:
    """What is remembered of a task that runs, and may be forgotten."""

    progress: ProgressEvent | None = None
    written: datetime | None = None
    announced: str | None = None
    """Name of the Event of the wait that was told last."""


@dataclass(frozen=True, slots=True)
class _Unseen:
    """A task that is seen no more."""

    uid: str
    resource_version: int
    """Since when."""
    manifest: Mapping[str, Any] | None
    """As it was last; None: nobody has told."""


@dataclass(frozen=True, slots=True)
class _Task:
    """A task as one look sees it."""

    key: Key
    cached: CachedTask
    parsed: ProcessingTask | None
    metadata: Metadata
    status: Status
    problem: str = ""
    """Why it could not be parsed."""


class Controller:
    """Keeps Jobs and statuses in step with tasks."""

    def __init__(
        self,
        *,
        api: Api,
        template: RunnerTemplate,
        metrics: Metrics,
        database: Database | None = None,
        announce: Callable[[Manifest], None] = lambda _: None,
        namespaces: Sequence[str] = (),
        selected: bool = False,
        pools: PoolPort | None = None,
        pool_queue: Queue | None = None,
        policy: Policy | None = None,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        budget: int = 0,
        leads: Callable[[], bool] = lambda: True,
        resync_seconds: float = 300,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        random: Callable[[], float] = random_module.random,
        workers: int = _WORKERS,
        pods_apart: float = _PODS_APART,
    ) -> None:
        """``selected``: whether it sees tasks of some labels only: one that it sees no more may be there all the same, and
        another installation looks after it.
        ``budget``: so many tasks of a namespace stay; over it, finished ones go before their time. 0: any number.
        ``leads``: whether this operator acts at the moment, or stands by and only watches.

        Without ``pools`` and ``pool_queue`` no task gets to a worker pool.
        """
        self._api = api
        self._template = template
        self._metrics = metrics
        self._database = database
        self._announce = announce
        self._namespaces: tuple[str | None, ...] = tuple(namespaces) or (None,)
        self._selected = selected
        self._unseen: dict[Key, _Unseen] = {}
        self._policy = policy or Policy()
        self._resync_seconds = resync_seconds
        self._clock = clock
        self._random = random
        self._workers = workers
        self._cache = Cache()
        self._queue: WorkQueue[Key] = WorkQueue()
        # Why tasks wait is told one by one: an API server that has no time has it for Jobs and ends of tasks first.
        self._telling: Turn[Key] = Turn(self._queue.add)
        self._limited = bool(limits)

        def places() -> tuple[PoolTasks | None, Dispatch | None]:
            if pools is None or pool_queue is None:
                return None, Dispatch(limits, wake=self._queue.add, clock=clock) if limits else None
            tasks = PoolTasks(
                queue=pool_queue,
                pools=pools,
                metrics=metrics,
                classes=template.classes,
                wake=self._queue.add,
                tell=self._tell,
                live=self._unfinished,
                grown=self._grown,
                clock=clock,
            )
            return tasks, Dispatch(limits, wake=self._queue.add, window=tasks.window, clock=clock)

        self._places = places
        self._pools, self._dispatch = places()
        self._budget = budget
        self._crowded: set[str] = set()
        self._crowd = asyncio.Event()
        self._live: dict[str, _Live] = {}
        self._news: dict[Key, float] = {}
        """Since when news of a task wait for a look, on the clock of time.perf_counter."""
        self._glances = Glances[tuple[Key, str], tuple[PodReport, ...]](
            lambda of: self._pods(of[0][0], of[1]),
            lambda of: self._queue.add(of[0]),
            at_once=_PODS_AT_ONCE,
            apart=pods_apart,
        )
        """Pods of tasks that wait for them to run."""
        self._leads = leads
        self._term = 0  # how often it was called to act
        self._confirmed: int | None = None  # the term in which everything was last listed
        self._listed = asyncio.Event()
        self._resync_now = asyncio.Event()
        self._reopened = asyncio.Event()
        metrics.watch_queue(self._waiting)

    # ------------------------------------------------------------------------------------------------------ running

    @property
    def synced(self) -> bool:
        """Whether everything has been listed once."""
        return self._listed.is_set()

    def alive(self) -> set[str] | None:
        """Return the uids of all tasks that have not finished; None before everything has been listed since it leads.

        What is not among them may be barred from publishing for ever, so a cache that a watch may be late for is not enough.
        """
        if not self._leads() or self._confirmed != self._term:
            return None
        return {task.uid for _, task in self._cache.tasks() if not task.finished}

    async def observe(self, watching: asyncio.Event) -> None:
        """Wait for the watches, list everything, then keep up until cancelled, whoever leads. Raises what listing is refused
        with.

        In this order: what is deleted after the list reaches the watches, what was deleted before is not listed. The other
        way round, a Job deleted between list and watch would be believed in until the next resync.
        """
        await self._begin(watching)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._resync_forever(), name="resync")
            group.create_task(self._check_versions_forever(), name="versions")

    async def lead(self) -> None:
        """Act until cancelled, as soon as everything is listed; again whenever this operator is called to lead.

        It begins with what it knows from its watches. What it may be wrong about is asked for, or refused to it, where it
        matters: before a Job counts as lost or as an orphan, and by the resourceVersion of each write. A list of everything,
        for the projection and for what went unseen, follows while it works.
        """
        self._term += 1
        await self._listed.wait()
        self._take_over()
        async with asyncio.TaskGroup() as group:
            for number in range(self._workers):
                group.create_task(self._work(), name=f"worker {number}")
            group.create_task(self._prune_forever(), name="prune")
            if self._pools is not None:
                group.create_task(self._pools.run(), name="pools")
            if self._dispatch is not None:
                group.create_task(self._tell_positions_forever(self._dispatch), name="positions")

    def _take_over(self) -> None:
        """Look at everything as if it had just been listed; places and progress of an earlier term are forgotten."""
        self._live.clear()
        self._news.clear()  # how long they waited for another leader's death is no delay of this one
        self._pools, self._dispatch = self._places()
        self._look_after_all()
        if self._confirmed != self._term:
            self._resync_now.set()

    async def _begin(self, watching: asyncio.Event) -> None:
        wait = 1.0
        while True:
            try:
                for namespace in self._namespaces:
                    await self._api.check_access(namespace)  # kopf would take a refusal for a passing trouble
                await watching.wait()
                await self._resync()
            except (Unavailable, Gone) as error:
                _log.warning("cannot list yet", error=error.message, wait=wait)
                await asyncio.sleep(wait)
                wait = min(2 * wait, 15.0)
            else:
                self._listed.set()
                _log.info("everything is listed", tasks=len(self._cache))
                return

    def relist(self) -> None:
        """Have everything listed soon: a watch was lost for longer than the server remembers, with deletions unseen."""
        self._resync_now.set()

    def check_versions(self) -> None:
        """Have it looked soon whether this is still the same API server: a watch was broken, and opened again."""
        self._reopened.set()

    async def _check_versions_forever(self) -> None:
        while True:
            await self._reopened.wait()
            self._reopened.clear()
            newest = self._cache.newest_task()
            try:
                version = await self._api.task_version(self._namespaces[0])
            except ClusterError as error:
                _log.warning("cannot ask for the API server's version; trying again", error=error.message)
                await asyncio.sleep(1)
                self._reopened.set()
            else:
                if version < newest:
                    raise VersionsWentBack

    async def _work(self) -> None:
        while True:
            key = self._cache.key(await self._queue.get())
            started = time.perf_counter()
            news = self._news.pop(key, None)
            structlog.contextvars.clear_contextvars()
            structlog.contextvars.bind_contextvars(namespace=key[0], task=key[1])
            try:
                await self._look(key, news=news)
            except VersionsWentBack:
                raise
            except asyncio.CancelledError:  # it leads no more: the look is to be taken again when it does
                self._queue.add(key)
                self._queue.done(key)
                raise
            except ClusterError as error:
                self._keep_news(key, news)
                self._count(key, error, self._queue.failed(key, at_least=error.retry_after or 0.0))
            except Exception as error:  # noqa: BLE001 - one task that trips over a bug must not end the others
                _log.exception("cannot look after a task", namespace=key[0], task=key[1])
                self._keep_news(key, news)
                self._count(key, error, self._queue.failed(key))
            else:
                self._queue.done(key)
            self._metrics.reconcile_seconds.observe(time.perf_counter() - started)
            self._metrics.queue_depth.set(len(self._queue))

    def _keep_news(self, key: Key, since: float | None) -> None:
        """What a look that failed should have told is not told yet."""
        if since is not None and self._cache.task(key) is not None:
            self._news[key] = since

    async def _look(self, key: Key, *, news: float | None = None) -> None:
        for left in reversed(range(_CONFLICTS)):
            try:
                return await self._reconcile(key, insist=not left, news=news)
            except Conflict as error:
                # Somebody has written since: decide upon what is there now. Who writes labels all the time could win every
                # race for the resourceVersion, so the last look does without it.
                self._metrics.reconcile_errors.labels(type(error).__name__).inc()
                await self._refresh(key)
                if not left:
                    raise
        return None

    def _count(self, key: Key, error: Exception, wait: float) -> None:
        self._metrics.reconcile_errors.labels(type(error).__name__).inc()
        _log.warning("looking again", namespace=key[0], task=key[1], error=str(error), wait=wait)

    async def _refresh(self, key: Key) -> None:
        known = self._cache.task(key)
        try:
            found = await self._api.get_task(*key)
            self.on_task("MODIFIED", found)
            if known is not None and int(found["metadata"]["resourceVersion"]) < known.resource_version:
                raise VersionsWentBack
        except NotFound:
            self._gone(key, None)
        except ClusterError as error:
            _log.warning("cannot read a task again", namespace=key[0], task=key[1], error=error.message)

    def _waiting(self) -> Waiting:
        now, waiting = self._clock().timestamp(), Waiting()
        if not self._leads():  # two operators would count each task twice
            return waiting
        for _, task in self._cache.tasks():
            if task.phase not in {"Queued", "Retrying"}:
                continue
            waiting.sizes[task.priority] += 1
            waiting.reasons[task.waits_for or task.phase] += 1
            if task.waits_since is not None:
                age = max(0.0, now - task.waits_since)
                waiting.oldest[task.priority] = max(age, waiting.oldest.get(task.priority, 0.0))
        return waiting

    # ------------------------------------------------------------------------------------------------------- events

    def on_task(self, kind: str | None, manifest: Mapping[str, Any]) -> None:
        """Take in a task from a watch (``kind`` ADDED, MODIFIED, DELETED) or a list (None)."""
        metadata = manifest["metadata"]
        key = (metadata["namespace"], metadata["name"])
        if kind == "DELETED":
            self._not_seen(key, _Unseen(metadata["uid"], int(metadata["resourceVersion"]), manifest))
            return
        self._seen(key, kind, metadata)
        new = self._cache.task(key) is None
        if self._cache.put_task(manifest):
            key = self._cache.key(key)
            self._project(manifest)
            self._news.setdefault(key, time.perf_counter())
            self._queue.add(key)
            for other in self._cache.same_key(key):
                self._queue.add(other)  # which of them is the first may have changed
            if new or (manifest.get("status") or {}).get("phase") in FINISHED:
                self._wake_dependents(key)
            self._count_tasks(key[0])

    def on_job(self, kind: str | None, manifest: Mapping[str, Any]) -> None:
        """Take in a Job of ours."""
        job = JobState.from_manifest(manifest)
        key = job_key(job)
        if key is None or self._is_anothers(key, manifest):
            return
        key = self._cache.key(key)
        if kind == "DELETED":
            if self._cache.drop_job(key, job.name, uid=job.uid, now=self._clock()):
                self._queue.add(key)
        elif self._cache.put_job(job, now=self._clock()):
            if self._cache.task(key) is None:
                self._queue.add_after(key, _ORPHAN_PATIENCE)  # its task's event may be on its way
            else:
                self._news.setdefault(key, time.perf_counter())
                self._queue.add(key)

    def _is_anothers(self, key: Key, job: Mapping[str, Any]) -> bool:
        """Whether another installation has made a Job, for a task that it looks after."""
        return self._selected and self._cache.task(key) is None and instance_of(job) != self._template.instance

    def on_progress(self, event: ProgressEvent) -> None:
        """Take in progress; of one attempt only news that are newer."""
        key = (event.namespace, event.name)
        cached = self._cache.task(key)
        if cached is None or cached.uid != event.uid or cached.finished:
            return
        if event.stage in _REACHED_STORES and self._dispatch is not None:
            self._dispatch.store_up(key[0])
        live = self._live.setdefault(event.uid, _Live())
        known = live.progress
        if known is None or (event.attempt, event.at) >= (known.attempt, known.at):
            live.progress = event
            if self._pools is not None and cached.phase != Phase.PROCESSING and self._pools.lease(event.uid) is not None:
                return  # its worker says so if it takes longer than a moment
            # A runner tells its progress four times a second; until the status may be written again there is nothing to do.
            wait = timedelta() if live.written is None else live.written + self._policy.progress_interval - self._clock()
            self._queue.add_after(key, wait.total_seconds())

    def _not_seen(self, key: Key, unseen: _Unseen) -> None:
        """A task is deleted; or its labels are no longer those that are looked after, which only the API server knows."""
        if self._selected:
            self._unseen[key] = unseen
            self._queue.add(key)
        else:
            self._gone(key, unseen.manifest)

    def _seen(self, key: Key, kind: str | None, metadata: Mapping[str, Any]) -> None:
        """A task of this name is seen, by a watch or a list; what was read by its name (MODIFIED) may be another's."""
        unseen = self._unseen.get(key)
        if unseen is None:
            return
        if unseen.uid != metadata["uid"]:
            del self._unseen[key]
            self._gone(key, unseen.manifest)
        elif kind != "MODIFIED" and int(metadata["resourceVersion"]) > unseen.resource_version:
            del self._unseen[key]

    async def _ask_after(self, key: Key) -> None:
        """Find out what has become of a task that is seen no more: only one that is deleted is fenced and told so."""
        unseen = self._unseen[key]
        try:
            there = (await self._api.get_task(*key))["metadata"]["uid"] == unseen.uid
        except NotFound:
            there = False
        if self._unseen.get(key) is not unseen:
            return  # it was seen again, or has gone again
        del self._unseen[key]
        if not there:
            self._gone(key, unseen.manifest)
            return
        _log.info("another installation looks after a task", namespace=key[0], task=key[1], uid=unseen.uid)
        self._forget(key, unseen.uid, gone=False)
        for job in self._cache.jobs(key):
            self._cache.drop_job(key, job.name, uid=job.uid, now=self._clock())

    def _forget(self, key: Key, uid: str, *, gone: bool) -> None:
        """Forget what is known of a task."""
        if self._cache.drop_task(key, uid=uid, gone=gone) and self._dispatch is not None:
            self._dispatch.release(key)
        self._live.pop(uid, None)
        self._wake_dependents(key)
        self._news.pop(key, None)
        if self._pools is not None:
            self._pools.forget(uid, key)

    async def elsewhere(self) -> set[str]:
        """Return the uids of tasks that are there and that another installation looks after. Raises ClusterError."""
        found: set[str] = set()
        if self._selected:
            for namespace in self._namespaces:
                async for uids in self._api.list_uids(namespace):
                    found |= uids
        return found - self._cache.uids()

    def _gone(self, key: Key, manifest: Mapping[str, Any] | None) -> None:
        """Forget a task; its fence is raised, so that a pod that still runs publishes nothing."""
        known = self._cache.task(key)
        uid = known.uid if manifest is None and known is not None else (manifest or {}).get("metadata", {}).get("uid")
        if uid is None:
            return
        phase = ((manifest or {}).get("status") or {}).get("phase")
        finished = phase in FINISHED or (known is not None and known.uid == uid and known.finished)
        self._forget(key, uid, gone=True)
        if self._database is not None:
            if manifest is not None:
                self._database.submit(manifest, deleted=True)
            if not finished:
                self._database.fence_later(uid, reason="Deleted")
        if self._cache.jobs(key):
            self._queue.add_after(key, _ORPHAN_PATIENCE)

    # ----------------------------------------------------------------------------------------------- limits and budget

    def _settle(self, key: Key, facts: _Facts) -> None:
        """Tell the dispatch whether a task holds a place: while a Job that has not ended, or a pool, has it."""
        if self._dispatch is None:
            return
        cached = self._cache.task(key)
        if cached is not None and self._has_job(key, cached):
            self._dispatch.hold(key, _claim_of(key, cached, pool=None))
            return
        lease = None if cached is None or self._pools is None else self._pools.lease(cached.uid)
        if cached is not None and lease is not None:
            claim = facts.claim
            if claim is None or claim.pool != (key[0], lease.pool):
                claim = _claim_of(key, cached, pool=lease.pool)
            self._dispatch.hold(key, claim)
        elif cached is None or facts.place is None or facts.place.granted:
            self._dispatch.release(key)

    def _note_stores(self, task: _Task, status: Status) -> None:
        """Tell the dispatch what an attempt has found out about the stores of its namespace."""
        if self._dispatch is None or task.parsed is None or task.parsed.spec.type is TaskType.HEALTH_CHECK:
            return
        queue = status.queue
        if queue is not None and queue.reason == Limit.STORE and queue.position is None:
            self._dispatch.store_down(task.key[0], queue.message or "a store cannot be reached")
        elif status.phase is Phase.COMPLETED:
            self._dispatch.store_up(task.key[0])

    def _has_job(self, key: Key, cached: CachedTask) -> bool:
        return any(not job.finished and job.owner_uid == cached.uid for job in self._cache.jobs(key))

    # ----------------------------------------------------------------------------------------------------------- pools

    def on_look(self, pool: Pool, look: Look | None) -> None:
        """Take in what there is of a pool in Redis; None: Redis cannot be used."""
        if self._pools is not None and self.synced and self._leads():
            self._pools.on_look(pool, look)

    def backlog(self, pool: Pool) -> Backlog:
        """Return what waits for a pool."""
        return Backlog() if self._pools is None else self._pools.backlog(pool)

    def _unfinished(self, namespace: str, uids: Mapping[str, str]) -> dict[str, Key]:
        """Return which of these uids, each with its name or none, are tasks that have not finished."""
        found, nameless = {}, set()
        for uid, name in uids.items():
            if not name:
                nameless.add(uid)
            elif (cached := self._cache.task((namespace, name))) is not None and cached.uid == uid and not cached.finished:
                found[uid] = (namespace, name)
        if nameless:
            found |= {task.uid: key for key, task in self._cache.tasks() if task.uid in nameless and not task.finished}
        return found

    def _tell(self, key: Key) -> None:
        """Have a look at news of a task."""
        self._news.setdefault(key, time.perf_counter())
        self._queue.add(key)

    def _grown(self) -> None:
        if self._dispatch is not None:
            self._dispatch.grown()

    async def _offer(self, task: _Task, pool: str, facts: _Facts) -> None:
        if self._pools is None or task.parsed is None:
            return
        namespace, name = task.key
        of = (namespace, pool)
        if facts.claim is None or facts.claim.pool != of:
            facts.claim = _claim(task.parsed, pool=pool)
        offer = Offer(
            uid=task.cached.uid,
            namespace=namespace,
            name=name,
            attempt=current_attempt(task.parsed.status),
            stamp=queue_stamp(task.parsed),
            priority=str(task.parsed.spec.priority),
            rank=facts.claim.rank,
            task=_document(task.cached),
        )
        try:
            await self._pools.offer(task.key, of, offer)
        except QueueUnavailable as error:
            _log.warning("cannot offer a task yet", namespace=namespace, task=name, pool=pool, error=str(error))
            self._pools.failed(of)
            self._queue.add_after(task.key, 1.0)

    def _heard(self, task: _Task, facts: _Facts) -> None:
        """Count what workers have said, and have it removed."""
        if self._pools is None or task.parsed is None:
            return
        self._pools.heard(task.cached.uid, facts.reports)
        attempt, stay = current_attempt(task.parsed.status), task.parsed.status.queued_at or task.metadata.creation_timestamp
        for report in facts.reports:
            if report.attempt != attempt or report.stamp != queue_stamp(task.parsed) or task.status.phase.finished:
                continue
            if report.kind is ReportKind.EXPIRED:
                self._metrics.pool_handovers.labels(WORKER_LOST).inc()
            elif report.outcome is not None and report.outcome.outcome is Outcome.GIVEN_BACK:
                self._metrics.pool_handovers.labels(report.outcome.reason).inc()
            if report.kind is ReportKind.ENDED and report.started_at is not None:
                wait = (report.started_at - (stay or report.started_at)).total_seconds()
                self._metrics.pool_wait_seconds.labels(str(task.parsed.spec.priority)).observe(max(0.0, wait))
                run = ((report.finished_at or report.started_at) - report.started_at).total_seconds()
                self._metrics.pool_run_seconds.labels(str(task.parsed.spec.type)).observe(max(0.0, run))

    async def _tell_positions_forever(self, dispatch: Dispatch) -> None:
        while True:
            await asyncio.sleep(_POSITIONS)
            for key in islice(dispatch.moved(), _TOLD):
                self._queue.add(key)

    def _count_tasks(self, namespace: str) -> None:
        if self._budget and self._cache.count(namespace) > self._budget:
            self._crowded.add(namespace)
            self._crowd.set()

    async def _prune_forever(self) -> None:
        """Delete finished tasks of namespaces that have too many, the oldest first."""
        while True:
            await self._crowd.wait()
            self._crowd.clear()
            namespaces, self._crowded = self._crowded, set()
            try:
                for namespace in namespaces:
                    await self._prune(namespace)
            except ClusterError as error:
                _log.warning("cannot delete finished tasks over the budget; trying again", error=error.message)
            await asyncio.sleep(1)
            for namespace in namespaces:
                self._count_tasks(namespace)  # until they are gone, also those that PostgreSQL is yet to take

    async def _prune(self, namespace: str) -> None:
        inside = ((key, task) for key, task in self._cache.tasks() if key[0] == namespace)
        gone = surplus(inside, most=self._budget, archived=self._archived)
        for key, task in gone[:_PRUNED]:
            with contextlib.suppress(Conflict):  # changed since: looked at anew in a second
                await self._api.delete_task(*key, uid=task.uid, resource_version=task.resource_version)
                self._metrics.pruned.inc()
        if gone:
            _log.info("finished tasks over the budget were deleted", namespace=namespace, count=len(gone[:_PRUNED]))

    def _archived(self, task: CachedTask) -> bool:
        stored = None if self._database is None else self._database.acknowledged(task.uid)
        return stored is not None and stored >= task.resource_version

    def _project(self, manifest: Mapping[str, Any]) -> None:
        if self._database is not None:
            self._database.submit(manifest)

    # ------------------------------------------------------------------------------------------------------- resync

    async def _resync_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._resync_seconds):
                    await self._resync_now.wait()
            except TimeoutError:
                pass
            self._resync_now.clear()
            try:
                await self._resync()
            except ClusterError as error:
                self._metrics.resyncs.labels("failed").inc()
                _log.warning("cannot resync; trying again soon", error=error.message)
                await asyncio.sleep(5)
                self._resync_now.set()

    async def _resync(self) -> None:
        """List tasks and Jobs, take in what is new, forget what is gone, and look at all that may need it."""
        term = self._term if self._leads() else None
        held = await self._held()
        for namespace in self._namespaces:
            await self._list_tasks(namespace)
            await self._list_jobs(namespace)
        if held is not None:
            await self._mark_deleted(held)
        self._look_after_all()
        self._confirmed = term
        self._metrics.resyncs.labels("done").inc()

    def _look_after_all(self) -> None:
        now = self._clock().timestamp()
        for key, cached in self._cache.tasks():
            self._look_after(key, (self._idle_until(key, cached) or now) - now)
        for key in self._cache.job_keys():
            known = self._cache.task(key)
            if known is None:
                self._queue.add(key)
            elif self._dispatch is not None and self._has_job(key, known):
                self._dispatch.hold(key, _claim_of(key, known, pool=None))  # before anybody asks for a place
        for namespace in {key[0] for key, _ in self._cache.tasks()}:
            self._count_tasks(namespace)

    def _idle_until(self, key: Key, cached: CachedTask) -> float | None:
        """Return when there is next something to do about a task that has finished, in seconds since the epoch; None: now.

        Of ten thousand that have finished hardly any has something to do, so this is told without reading them.
        """
        if not cached.settled or cached.expires_at is None:
            return None
        jobs = self._cache.jobs(key)
        if not jobs:
            return cached.expires_at
        if cached.ended_at is None or any(not job.finished or job.name != cached.job for job in jobs):
            return None
        return min(cached.expires_at, cached.ended_at + self._policy.job_ttl.total_seconds())

    async def _list_tasks(self, namespace: str | None) -> None:
        """Take in what a list says of tasks: what was known before and is not in it is gone.

        Raises :class:`VersionsWentBack`.
        """
        before, newest = self._cache.uids(), self._cache.newest_task()
        lost = max(newest, -1 if self._database is None else self._database.newest())
        seen: set[str] = set()
        listed_at = 0
        async for page in self._api.list_tasks(namespace):
            if page.resource_version < newest:
                raise VersionsWentBack
            listed_at = page.resource_version
            for manifest in page.items:
                metadata = manifest["metadata"]
                key, uid = (metadata["namespace"], metadata["name"]), sys.intern(metadata["uid"])
                seen.add(uid)
                self._seen(key, None, metadata)
                known = self._cache.task(key)
                if known is not None and int(metadata["resourceVersion"]) < known.resource_version <= newest:
                    raise VersionsWentBack
                self._cache.put_task(manifest)
                cached = self._cache.task(key)
                if cached is not None and cached.uid == uid and self._database is not None:
                    self._database.submit(manifest, lost=lost)
            if self._database is not None:
                await self._database.room()
        for key, cached in self._cache.tasks():
            inside = namespace is None or key[0] == namespace
            if inside and cached.uid in before and cached.uid not in seen:
                self._not_seen(key, _Unseen(cached.uid, listed_at, None))

    async def _list_jobs(self, namespace: str | None) -> None:
        before, now = self._cache.job_uids(), self._clock()
        seen: set[str] = set()
        async for page in self._api.list_jobs(namespace):
            for manifest in page.items:
                job = JobState.from_manifest(manifest)
                seen.add(job.uid)
                owner = job_key(job)
                if owner is not None and not self._is_anothers(owner, manifest):
                    self._cache.put_job(job, now=now)
        for key in self._cache.job_keys():
            for job in self._cache.jobs(key):
                inside = namespace is None or key[0] == namespace
                if inside and job.uid in before and job.uid not in seen:
                    self._cache.drop_job(key, job.name, uid=job.uid, now=self._clock())

    async def _held(self) -> dict[str, Held] | None:
        """Return what PostgreSQL holds of tasks; None when it cannot be asked. To be asked before tasks are listed."""
        if self._database is None or not self._leads():
            return None
        try:
            return await self._database.held(namespaces=[one for one in self._namespaces if one is not None])
        except DatabaseUnavailable as error:
            _log.warning("cannot compare PostgreSQL with the cluster", error=str(error))
            return None

    async def _mark_deleted(self, held: Mapping[str, Held]) -> None:
        alive = self._cache.uids()
        gone = {uid: one for uid, one in held.items() if uid not in alive}
        if not gone or self._database is None:
            return
        if others := await self.elsewhere():
            gone = {uid: one for uid, one in gone.items() if uid not in others}
        try:
            await self._database.mark_deleted(gone)
        except DatabaseUnavailable as error:
            _log.warning("cannot mark deleted tasks in PostgreSQL", error=str(error))
        else:
            _log.info("tasks were deleted unseen", count=len(gone))

    # ---------------------------------------------------------------------------------------- gather, decide, apply

    async def _reconcile(self, key: Key, *, insist: bool, news: float | None) -> None:
        facts = _Facts(insist=insist, news=news)
        try:
            await self._act(key, facts)
        finally:
            self._settle(key, facts)
            self._telling.over(key)

    async def _act(self, key: Key, facts: _Facts) -> None:
        if key in self._unseen:
            await self._ask_after(key)
        cached = self._cache.task(key)
        await self._delete_orphans(key, None if cached is None else cached.uid)
        if cached is None:
            return
        if self._pools is not None and cached.finished:
            self._pools.forget(cached.uid, key)
        if (idle := (self._idle_until(key, cached) or 0) - self._clock().timestamp()) > 0:
            self._look_after(key, idle)
            return
        task = _read(key, cached)
        trace = trace_of(task.metadata.annotations, uid=cached.uid)
        structlog.contextvars.bind_contextvars(uid=cached.uid, attempt=task.status.attempt, trace_id=trace)
        decision = await self._decide(task, facts)
        changed = False
        if decision.status is not None and tells_a_wait(task.status, decision.status):
            with self._telling.of(key) as its_turn:
                changed = its_turn and await self._write_status(task, decision.status, facts)
        elif decision.status is not None:
            changed = await self._write_status(task, decision.status, facts)
        if decision.heard:
            self._heard(task, facts)
        for job in decision.delete_jobs:
            await self._api.delete_job(job.namespace, job.name, uid=job.uid)
            self._cache.mark_deleting(job)
            changed = changed or not job.deleting
        if self._pools is not None:
            if decision.withdraw:
                await self._pools.withdraw(task.cached.uid, key[0])
                changed = True
            if not decision.awaits_pool:
                self._pools.waits_no_more(key)
        if decision.offer is not None:
            await self._offer(task, decision.offer, facts)
        if decision.create_attempt is not None and task.parsed is not None:
            facts.refusal = await self._create(task.parsed, attempt=decision.create_attempt, shards=decision.shards)
            changed = True
            if facts.refusal is not None:
                cached = self._cache.task(key)
                if cached is None or cached.uid != task.cached.uid:
                    return
                task = _read(key, cached)
                decision = await self._decide(task, facts)
                if decision.status is not None:
                    await self._write_status(task, decision.status, facts)
                changed = False
        if decision.delete_task:
            _log.info("deleting a task after its TTL", namespace=key[0], task=key[1])
            await self._api.delete_task(*key, uid=task.cached.uid, resource_version=task.cached.resource_version)
            return
        self._announce_wait(task)
        if changed:
            self._queue.add(key)  # whether that was all, a look at what is there now tells
        elif decision.after is not None:
            self._look_after(key, max(decision.after.total_seconds(), 0.05))

    def _look_after(self, key: Key, seconds: float) -> None:
        if seconds <= self._resync_seconds:  # else the resync comes first
            self._queue.add_after(key, seconds)

    async def _decide(self, task: _Task, facts: _Facts) -> Decision:
        if task.parsed is None:
            return refuse(task.metadata, task.status, task.problem, now=self._clock())
        database = self._database
        live = self._live.get(task.cached.uid)
        random = self._random()
        uid, pools = task.cached.uid, self._pools
        usable, lease = (None, None) if pools is None else (pools.facts(task.parsed), pools.lease(uid))
        facts.reports = () if pools is None else pools.reports(uid)
        for _ in range(_ROUNDS):
            observed = Observed(
                task=task.parsed,
                pools=usable,
                lease=lease,
                reports=facts.reports,
                jobs=self._jobs_of(task.parsed),
                jobs_changed_at=self._cache.jobs_changed_at(task.key),
                store=Store() if database is None else Store(configured=True, down_since=database.down_since),
                projected=None if database is None else database.acknowledged(task.cached.uid),
                progress=None if live is None else live.progress,
                last_write=None if live is None else live.written,
                refusal=facts.refusal,
                answered=facts.answered,
                pods=facts.pods,
                pod_refusal=facts.pod_refusal,
                result=facts.result,
                fence=facts.fence,
                release=facts.release,
                batch=facts.batch,
                dependencies=facts.dependencies,
                first=self._cache.first(task.key),
                limited=self._limited,
                place=facts.place,
            )
            decision = decide(observed, now=self._clock(), random=random, policy=self._policy)
            if decision.patient and Need.PODS in decision.needs:
                if (pods := self._glances.take((task.key, uid))) is None:
                    return Decision()  # it is looked at again when they are there
                facts.pods = pods
                facts.answered |= {Need.PODS}
                continue
            if not decision.needs:
                if decision.awaits_pool and pools is not None and usable is not None:
                    since = _once(task.status.queued_at or task.metadata.creation_timestamp)
                    pools.waits(task.key, task.key[0], usable.serving, since)
                return decision
            for need in decision.needs:
                await self._answer(need, task.parsed, facts, decision)
            facts.answered |= decision.needs
        raise RuntimeError(f"no decision about {task.key} after {_ROUNDS} rounds: {decision.needs}")

    def _jobs_of(self, task: ProcessingTask) -> tuple[JobState, ...]:
        key = (task.metadata.namespace, task.metadata.name)
        return tuple(job for job in self._cache.jobs(key) if job.owner_uid == task.metadata.uid)

    async def _answer(self, need: Need, task: ProcessingTask, facts: _Facts, decision: Decision) -> None:
        namespace, uid = task.metadata.namespace, task.metadata.uid or ""
        match need:
            case Need.PODS:
                facts.pods = await self._pods(namespace, uid)
            case Need.POD_REFUSAL:
                job = view_of(Observed(task=task, jobs=self._jobs_of(task))).job
                job_uid = "" if job is None else job.uid
                try:
                    facts.pod_refusal = await self._api.pod_refusal(namespace, job_uid=job_uid)
                except Forbidden as error:  # the reason for a wait is worth less than the wait itself
                    _log.warning("cannot read why a pod was refused; grant list on events", error=error.message)
            case Need.JOB:
                try:
                    name = view_of(Observed(task=task)).name
                    self.on_job("MODIFIED", await self._api.get_job(namespace, name))
                except NotFound:
                    return
            case Need.PLACE:
                cached = self._cache.task((namespace, task.metadata.name))
                if self._dispatch is not None and cached is not None:
                    key = cached.key
                    facts.claim = _claim(task, pool=decision.offer)
                    facts.place = self._dispatch.ask(key, facts.claim)
            case Need.DEPENDENCIES:
                facts.dependencies = await self._dependencies(task)
            case Need.RESULT | Need.FENCE | Need.RELEASE | Need.BATCH | Need.SETTLE:
                if self._database is None:
                    return
                try:
                    await self._ask(self._database, need, uid, facts, decision, attempt=current_attempt(task.status))
                except DatabaseUnavailable as error:
                    _log.warning("PostgreSQL does not answer", task=task.metadata.name, error=str(error))

    async def _pods(self, namespace: str, uid: str) -> tuple[PodReport, ...]:
        return tuple(pod_report(pod) for pod in await self._api.list_pods(namespace, task_uid=uid))

    async def _dependencies(self, task: ProcessingTask) -> Dependencies:
        """Return what has become of the tasks that a task waits for: those that are gone PostgreSQL may know."""
        namespace, names = task.metadata.namespace, task.spec.depends_on or []

        def needed_by(name: str) -> Sequence[str]:
            cached = self._cache.task((namespace, name))
            return () if cached is None else cached.depends_on

        phases = {name: None if (known := self._cache.task((namespace, name))) is None else known.phase for name in names}
        gone, sure = [name for name, phase in phases.items() if phase is None], True
        if gone and self._database is not None:
            try:
                phases |= await self._database.phases(namespace, gone)
            except DatabaseUnavailable as error:
                sure = False
                _log.warning("cannot ask PostgreSQL how tasks ended", task=task.metadata.name, error=str(error))
        return Dependencies(
            of=tuple(Dependency(name, phase) for name, phase in phases.items()),
            circle=circle_through(task.metadata.name, needed_by),
            sure=sure,
        )

    def _wake_dependents(self, key: Key) -> None:
        for other in self._cache.dependents(key):
            self._queue.add(other)

    async def _ask(
        self, database: Database, need: Need, uid: str, facts: _Facts, decision: Decision, *, attempt: int
    ) -> None:
        match need:
            case Need.RESULT:
                facts.result = await database.result(uid, attempt=attempt)
            case Need.RELEASE:
                facts.release = await database.release(uid)
            case Need.FENCE:
                facts.fence = await database.raise_fence(uid, reason=decision.fence_reason)
            case Need.BATCH:
                facts.batch = await database.batch(uid)
            case Need.SETTLE if decision.settle is not None:
                why = decision.settle
                facts.batch = await database.settle_batch(uid, reason=why.reason, message=why.message)

    async def _write_status(self, task: _Task, status: Status, facts: _Facts) -> bool:
        """Write what differs; return whether anything did."""
        patch = merge_patch(task.status.manifest(), status.manifest())
        if not patch:
            return False
        try:
            uid, version = task.cached.uid, task.cached.resource_version
            if task.cached.finished:  # of which a part of the status is known
                answer = await self._api.patch_status(*task.key, uid=uid, resource_version=version, patch=patch)
            else:
                before = task.cached.manifest()
                generation, stored = before["metadata"]["generation"], before.get("status") or {}
                after = merged(stored, patch)  # with fields of a later release, which this one does not know
                if facts.insist:
                    answer = await self._api.replace_status(
                        *task.key, uid=uid, generation=generation, before=stored, after=after
                    )
                else:
                    answer = await self._api.put_status(*task.key, uid=uid, resource_version=version, status=after)
        except NotFound:
            self._gone(task.key, None)
            return False
        self._metrics.status_writes.inc()
        if self._cache.put_task(answer):
            self._project(answer)
        self._note_stores(task, status)
        if status.phase.finished:
            self._wake_dependents(task.key)
        if status.phase.finished:
            self._live.pop(task.cached.uid, None)
        else:
            self._live.setdefault(task.cached.uid, _Live()).written = self._clock()
        if status.phase is not task.status.phase:
            if facts.news is not None:
                self._metrics.status_lag.labels(str(status.phase)).observe(time.perf_counter() - facts.news)
            _log.info(
                "task",
                namespace=task.key[0],
                task=task.key[1],
                uid=task.cached.uid,
                phase=str(status.phase),
                attempt=status.attempt,
                reason=next((one.reason for one in status.conditions if one.type == "Ready"), None),
            )
            if (event := of_transition(task.metadata, task.status, status, now=self._clock())) is not None:
                self._announce(event)
            if status.phase.finished:
                kind = "unknown" if task.parsed is None else str(task.parsed.spec.type)
                self._metrics.finished(type_=kind, status=status)
        return True

    def _announce_wait(self, task: _Task) -> None:
        event = of_wait(task.metadata, task.status, now=self._clock())
        if event is None:
            return
        live = self._live.setdefault(task.cached.uid, _Live())
        if live.announced != event["metadata"]["name"]:
            live.announced = event["metadata"]["name"]
            self._announce(event)

    async def _create(self, task: ProcessingTask, *, attempt: int, shards: Sequence[int]) -> Refusal | None:
        """Create the Job of an attempt, or find it created; return why the API server refuses it."""
        job = build_job(task, attempt=attempt, template=self._template, shards=shards)
        namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
        try:
            answer = await self._api.create_job(job)
            self._metrics.jobs_created.inc()
        except Conflict as conflict:
            try:
                answer = await self._api.get_job(namespace, name)
            except NotFound:
                raise conflict from None  # gone between the two requests: try again
            state = JobState.from_manifest(answer)
            if state.owner_uid != task.metadata.uid:
                message = (
                    f"cannot create Job {name}: another object owns a Job of that name; delete it and create the task anew"
                )
                return Refusal(reason="JobConflict", message=message, permanent=True)
        except Forbidden as error:
            return Refusal(reason=refused_for(error.message, otherwise="JobForbidden"), message=error.message)
        except Invalid as error:
            return Refusal(reason="JobInvalid", message=error.message)
        self._cache.put_job(JobState.from_manifest(answer), now=self._clock())
        return None

    async def _delete_orphans(self, key: Key, uid: str | None) -> None:
        """Delete Jobs whose task does not exist any more, or is another one of the same name."""
        orphans = [job for job in self._cache.jobs(key) if job.owner_uid != uid and not job.deleting]
        if not orphans:
            return
        try:
            current = (await self._api.get_task(*key))["metadata"]["uid"]
        except NotFound:
            current = None
        for job in orphans:
            if job.owner_uid != current:
                _log.info("deleting a Job whose task is gone", namespace=job.namespace, job=job.name)
                await self._api.delete_job(job.namespace, job.name, uid=job.uid)
                self._cache.mark_deleting(job)


def merge_patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON merge patch (RFC 7386) from one mapping to another: null removes, lists are replaced whole.

    >>> merge_patch({"phase": "Queued", "queue": {"reason": "Suspended"}}, {"phase": "Processing"})
    {'phase': 'Processing', 'queue': None}
    """
    patch: dict[str, Any] = {}
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            patch[key] = merge_patch(old, new)
        else:
            patch[key] = new
    return dict(sorted(patch.items()))


def merged(before: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a JSON merge patch makes of a mapping, as the API server does it.

    >>> merged({"phase": "Queued", "queue": {"reason": "Suspended"}}, {"phase": "Processing", "queue": None})
    {'phase': 'Processing'}
    """
    after = dict(before)
    for key, value in patch.items():
        if value is None:
            after.pop(key, None)
        elif isinstance(value, Mapping):
            inner = before.get(key)
            after[key] = merged(inner if isinstance(inner, Mapping) else {}, value)
        else:
            after[key] = value
    return after


def _document(cached: CachedTask) -> str:
    """Return what a worker reads as its task: as :func:`task_operator.jobs.task_document`, but for what is a default."""
    manifest = cached.manifest()
    kept = ("name", "namespace", "uid", "generation", "creationTimestamp", "annotations")  # those that the cache keeps
    metadata = {key: manifest["metadata"][key] for key in kept if key in manifest["metadata"]}
    document = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": manifest["spec"]}
    return orjson.dumps(document).decode()


def _claim(task: ProcessingTask, *, pool: str | None) -> Claim:
    """Return what a task's place counts against; ``pool``: the one that is to have it."""
    metadata, spec = task.metadata, task.spec
    return Claim(
        namespace=_once(metadata.namespace),
        kb_id=_once(spec.kb_id),
        type=_once(str(spec.type)),
        priority=_once(str(spec.priority)),
        created_at=_once(metadata.creation_timestamp) or _EPOCH,
        stores=spec.type is not TaskType.HEALTH_CHECK,
        pool=None if pool is None else _once((metadata.namespace, pool)),
    )


def _claim_of(key: Key, cached: CachedTask, *, pool: str | None) -> Claim:
    """Return the same of a task that may be one that cannot be parsed."""
    spec = cached.manifest()["spec"]
    kb_id = spec.get("kbId")
    return Claim(
        namespace=key[0],
        kb_id=None if kb_id is None else _once(str(kb_id)),
        type=_once(str(spec.get("type"))),
        priority=cached.priority,
        created_at=parse_time(cached.created) or _EPOCH,
        stores=spec.get("type") != TaskType.HEALTH_CHECK,
        pool=None if pool is None else _once((key[0], pool)),
    )


def _once(value: T) -> T:
    """Return an equal value that is kept already, where there is one: thousands of tasks have it in common."""
    return cast("T", _kept(value))


@lru_cache(maxsize=4096)
def _kept(value: Hashable) -> Hashable:
    return value


@lru_cache(maxsize=128)  # what was just read is read again after a write that did not change it; 6 KB each
def _read(key: Key, cached: CachedTask) -> _Task:
    """Parse a cached task. One that cannot be parsed keeps what can be read of it: enough to say so in its status."""
    manifest = cached.manifest()
    try:
        parsed = ProcessingTask.model_validate(manifest)
    except ValidationError as error:
        try:
            status = Status.model_validate(manifest.get("status") or {})
        except ValidationError:
            status = Status()
        metadata = Metadata(
            name=key[1], namespace=key[0], uid=cached.uid, generation=manifest["metadata"].get("generation") or 1
        )
        metadata = metadata.model_copy(update={"resource_version": str(cached.resource_version)})
        problem = f"cannot read the task: {describe(error)}; create a new one"
        return _Task(key=key, cached=cached, parsed=None, metadata=metadata, status=status, problem=problem)
    return _Task(key=key, cached=cached, parsed=parsed, metadata=parsed.metadata, status=parsed.status)
