"""Worker pools as values: which pool a task fits, how many workers there are to be, what is done about it. Pure functions.

A pool is scaled by what waits for it. A worker is never taken from its tasks: one that is not wanted any more is told to
drain, ends by itself, and its Job goes after it. See docs/adr/0045.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import count
from typing import Any, Final, Literal

from task_contract.leases import PoolKeys
from task_contract.models import Condition, Executor, ProcessingTask
from task_contract.names import POOL_LABEL
from task_contract.pools import PoolSpec, PoolStatus, WorkerPool
from task_operator.pool_queue import Look, Worker
from task_operator.resources import OOM_KILLED, Resources, Size, class_of, in_bytes, unknown_class

_COMPRESSIBLE: Final = frozenset({"cpu"})
"""Less of it takes longer and fails nothing, so workers share it."""
_ALWAYS_SOME: Final = frozenset({"memory", "ephemeral-storage"})
"""A container that says nothing of these may use what its node has."""


@dataclass(frozen=True, slots=True)
class Pool:
    """A WorkerPool, as far as others than its own controller care."""

    namespace: str
    name: str
    uid: str
    spec: PoolSpec
    deleting: bool = False
    """Whether it is on its way out: it takes no tasks."""
    generation: int = 0

    @property
    def keys(self) -> PoolKeys:
        """Where its queue is in Redis."""
        return PoolKeys(self.namespace, self.name)

    @property
    def selector(self) -> str:
        """Selects the pods of its workers."""
        return f"{POOL_LABEL}={self.name}"

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> "Pool":
        """Read a WorkerPool as the API server hands it out. Raises pydantic's ValidationError for one that is none."""
        pool = WorkerPool.model_validate(manifest)
        metadata = manifest["metadata"]
        return cls(
            namespace=metadata["namespace"],
            name=metadata["name"],
            uid=metadata["uid"],
            spec=pool.spec,
            deleting=metadata.get("deletionTimestamp") is not None,
            generation=metadata.get("generation") or 0,
        )


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits for a pool, by what the operator knows of its tasks."""

    waiting: int = 0
    """Tasks that no worker has, whether they have been offered yet or not."""
    oldest_seconds: float = 0
    """So long the first of them has been waiting."""


# ------------------------------------------------------------------------------------------------------- which pool


def misfit(task: ProcessingTask, pool: Pool, classes: Mapping[str, Resources]) -> str | None:
    """Return why a pool cannot take a task, as a part of a sentence; None if it can.

    A task fits if the memory, and whatever else cannot be shared, that its class requests is no more than what a worker
    requests. One that ran out of memory has a Job of its own, whose memory grows.
    """
    if task.metadata.namespace != pool.namespace:
        return f"it is in namespace {pool.namespace}"
    if pool.deleting:
        return "it is being deleted"
    if task.spec.type not in pool.spec.types:
        return f"it does not serve {task.spec.type}"
    if unknown_class(task, classes) is not None:
        return f"there is no resourceClass {task.spec.resource_class}"
    if any(attempt.reason == OOM_KILLED for attempt in task.status.attempts):
        return "the task has run out of memory, and its next attempt gets more"
    wanted = classes.get(class_of(task)) or classes.get(Size.MEDIUM) or {}
    return _too_large(wanted, worker_resources(pool.spec, classes))


def fits(task: ProcessingTask, pool: Pool, classes: Mapping[str, Resources]) -> bool:
    """Whether a pool can take a task."""
    return misfit(task, pool, classes) is None


def choose(task: ProcessingTask, pools: Iterable[Pool], classes: Mapping[str, Resources]) -> Pool | None:
    """Return the pool that takes a task: of those that fit the first by name; None if the task is for a Job."""
    if task.spec.executor is Executor.JOB or task.spec.kueue is not None:
        return None  # Kueue admits Jobs
    return min((pool for pool in pools if fits(task, pool, classes)), key=lambda pool: pool.name, default=None)


def worker_resources(spec: PoolSpec, classes: Mapping[str, Resources]) -> Resources:
    """Return the resources of a worker: those of the pool, or of the class medium if it names none."""
    own = {kind: values for kind in ("requests", "limits") if (values := getattr(spec.resources, kind))}
    return own or classes.get(Size.MEDIUM) or {}


def _too_large(wanted: Resources, worker: Resources) -> str | None:
    for name in {*wanted.get("requests", {}), *wanted.get("limits", {})} - _COMPRESSIBLE:
        need, have = _requested(wanted, name), _requested(worker, name)
        if need is None or (have is None and name in _ALWAYS_SOME):
            continue
        if have is None or in_bytes(need) > in_bytes(have):
            return f"the task asks for {need} of {name}, a worker has {have or 'none'}"
    return None


def _requested(resources: Resources, name: str) -> str | None:
    """Return what is requested of a resource; a limit alone is also a request, as Kubernetes has it."""
    return resources.get("requests", {}).get(name) or resources.get("limits", {}).get(name)


# -------------------------------------------------------------------------------------------------------- how many

PATIENCE: Final = 30.0
"""Seconds that a task may wait before the backlog that is fine is taken to be smaller: half after these, a third after twice
as many. So few long tasks get workers too, that never are a backlog by their number."""


@dataclass(frozen=True, slots=True)
class Load:
    """What there is to do."""

    waiting: int = 0
    oldest_seconds: float = 0
    leased: int = 0
    """Tasks that workers have."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What the past says. Lost with the operator, which costs a pool that it is scaled down later, and nothing else."""

    wanted: tuple[tuple[float, int], ...] | None = None
    """What load would have wanted within ``scaleDownAfter``: second and workers, falling; None: nothing is known."""
    idle_since: float | None = None
    looking_since: float | None = None
    """Since when Redis has been answering without a break."""
    told: frozenset[str] = frozenset()
    """Names of Jobs whose workers were told to drain: these end by themselves, and it means nothing."""


def needed(spec: PoolSpec, load: Load) -> int:
    """Return how many workers the load is worth, whatever the bounds of the pool."""
    fine = max(1.0, spec.target_backlog / (1 + load.oldest_seconds // PATIENCE))
    return max(math.ceil(load.waiting / fine), math.ceil(load.leased / spec.concurrency))


def desired_workers(spec: PoolSpec, load: Load, *, workers: int, memory: Memory, second: float) -> tuple[int, Memory]:
    """Return how many workers there are to be, and what to remember. ``second``: of a clock that never goes back.

    More at once, whatever is missing; fewer, when fewer have been enough for ``scaleDownAfter``; ``min`` after nothing was
    to be done for ``idleTimeout``, until when one stays. Whoever writes ``spec.replicas`` decides instead.
    """
    busy = load.waiting > 0 or load.leased > 0
    idle_since = None if busy else second if memory.idle_since is None else memory.idle_since
    if spec.replicas is not None:
        desired = _within(spec, spec.replicas)
        return desired, replace(memory, wanted=((second, desired),), idle_since=idle_since)
    if idle_since is not None and second - idle_since >= spec.idle_timeout.total_seconds():
        return spec.min, replace(memory, wanted=((second, spec.min),), idle_since=idle_since)
    want = _within(spec, needed(spec, load) if busy else min(1, workers))
    before = ((second, _within(spec, workers)),) if memory.wanted is None else memory.wanted
    oldest = second - spec.scale_down_after.total_seconds()
    kept = tuple((at, number) for at, number in before if at > oldest and number > want)
    wanted = (*kept, (second, want))
    return _within(spec, wanted[0][1]), replace(memory, wanted=wanted, idle_since=idle_since)


def _within(spec: PoolSpec, workers: int) -> int:
    return max(spec.min, min(workers, spec.max))


# -------------------------------------------------------------------------------------------------- what is to be done

STABLE: Final = timedelta(minutes=10)
"""A worker that has run for so long and fails then is the first that fails."""
SHORT: Final = timedelta(seconds=30)
"""A worker that ends by itself within these, told by nobody, has failed, whatever its exit code says."""
START: Final = timedelta(minutes=10)
"""So long a worker may take to start: as long as a Deployment's progressDeadlineSeconds."""
SLOW: Final = timedelta(seconds=15)
"""After these, what a worker waits for is looked up."""
SILENCE: Final = 90.0
"""Seconds of silence, if they are more than three leases, after which a worker that runs is given up: it hangs."""
FAILURES: Final = 2
"""So many of a slot in a row, and the pool is stalled."""
_BACKOFF: Final = (2.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds between a failure and the next worker of the slot, by the number of failures in a row."""
_TEXT: Final = 1024
_ASKED: Final = 2  # Jobs of a kind whose pods are looked up at a time
NOT_CONFIGURED: Final = "RedisNotConfigured"
"""Reason of :class:`Trouble` of an operator that was told of no Redis: then there are no workers."""


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """The Job of a worker."""

    name: str
    namespace: str
    uid: str
    pool_uid: str
    slot: int
    revision: str
    number: int
    """How often the slot has been tried in a row with this revision."""
    created_at: datetime
    started_at: datetime | None = None
    ready: int = 0
    """Pods that run."""
    deleting: bool = False
    complete: bool = False
    failed: bool = False
    finished_at: datetime | None = None
    message: str = ""
    """Why it failed, or what it waits for, by its pod and by Kubernetes."""

    @property
    def finished(self) -> bool:
        """Whether the Job controller has ended it."""
        return self.complete or self.failed

    def backoff_over(self) -> datetime:
        """Return from when on the slot may be tried again, after this one has failed."""
        seconds = _BACKOFF[min(self.number, len(_BACKOFF)) - 1]
        return (self.finished_at or self.created_at) + timedelta(seconds=seconds)


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why the queue of a pool cannot be used."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What there is of a pool."""

    pool: Pool
    revision: str
    """Of what its workers are made from now."""
    jobs: Sequence[WorkerJob]
    backlog: Backlog
    look: Look | None
    """None: Redis cannot be used, and ``trouble`` says why."""
    trouble: Trouble | None
    status: PoolStatus
    """As it was written last."""
    now: datetime
    second: float
    """Of a clock that never goes back."""
    refused: str = ""
    """Why the last Job of a worker could not be created."""


@dataclass(frozen=True, slots=True)
class NewWorker:
    """A Job that is to be created."""

    slot: int
    number: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done about a pool."""

    create: tuple[NewWorker, ...]
    delete: tuple[WorkerJob, ...]
    drain: frozenset[str] | None
    """Pods of the workers that are to take no more, all of them; None: Redis cannot be told."""
    dismiss: tuple[str, ...]
    """Workers that Redis remembers and that are gone."""
    ask: tuple[WorkerJob, ...]
    """Jobs whose pods say why they failed or do not run."""
    status: PoolStatus
    memory: Memory


@dataclass(frozen=True, slots=True)
class _Place:
    """A Job that has not ended, and what its worker says."""

    job: WorkerJob
    current: bool
    """Whether it is made of what workers are made of now."""
    starts: bool
    """Whether no process of it runs: nothing is lost with it."""
    pods: tuple[str, ...] = ()
    """Of those that have been heard of."""
    ready: bool = False
    """Whether it takes tasks."""
    busy: bool = False
    draining: bool = False
    going: bool = False
    """Whether it drains, and nobody here has told it to: its pod is being stopped."""
    silent: float = 0


def plan(seen: Seen, memory: Memory) -> Plan:
    """Decide upon a pool.

    No worker that may have a task is ended: it is told to drain. While Redis is silent nobody knows who has one, so nothing
    that runs is touched. There are never more than ``max`` workers, but for one while they are replaced.
    """
    spec = seen.pool.spec
    live = [job for job in seen.jobs if not job.finished and not job.deleting]
    desired, memory = _desired(seen, memory, workers=len(live))
    places = _places(seen, memory, live)
    lost = _lost(seen, memory, places)
    staying = [place for place in places if place not in lost and not place.going]
    leaving = _leaving(staying, desired)
    leaving += _replaced([place for place in staying if place not in leaving], desired)
    if seen.look is None:  # what has never run can be taken back, and nothing else
        leaving = [place for place in leaving if place.starts]
    deleted = [*lost, *(place for place in leaving if place.starts)]
    drained = [place for place in leaving if not place.starts]
    records, spent = _finished(seen, memory, places)
    left = len(staying) - len(leaving)
    create = _created(seen, places, records, missing=desired - left, room=spec.max - (len(live) - len(deleted)))
    rolling = any(not place.current for place in staying)
    if rolling and seen.look is not None and not (create or leaving) and left == desired and len(live) <= desired:
        create = _created(seen, places, records, missing=1, room=1)
    names = {job.name for job in seen.jobs}
    return Plan(
        create=create,
        delete=(*(place.job for place in deleted), *spent),
        drain=None if seen.look is None else frozenset(pod for place in drained for pod in place.pods),
        dismiss=_dismissed(seen, live),
        ask=_unexplained(seen, places, records),
        status=_status(seen, places, records, desired=desired),
        memory=replace(memory, told=frozenset(place.job.name for place in drained) | (memory.told & names)),
    )


def _desired(seen: Seen, memory: Memory, *, workers: int) -> tuple[int, Memory]:
    spec = seen.pool.spec
    if seen.look is None:
        # Whoever has tasks goes on with them; who is busy, nobody can tell. Afterwards the window begins anew.
        wanted = spec.min if spec.replicas is None else spec.replicas
        desired = _within(spec, max(workers, wanted))
        return desired, replace(memory, wanted=((seen.second, desired),), idle_since=None, looking_since=None)
    if memory.looking_since is None:
        memory = replace(memory, looking_since=seen.second)
    load = Load(seen.backlog.waiting, seen.backlog.oldest_seconds, seen.look.leased)
    return desired_workers(spec, load, workers=workers, memory=memory, second=seen.second)


def _places(seen: Seen, memory: Memory, live: Sequence[WorkerJob]) -> list[_Place]:
    workers: dict[str, list[tuple[str, Worker]]] = {}
    for pod, worker in ({} if seen.look is None else seen.look.workers).items():
        workers.setdefault(worker.state.job, []).append((pod, worker))
    lease = seen.pool.spec.lease.total_seconds()
    places = []
    for job in live:
        current = job.revision == seen.revision
        if not (mine := workers.get(job.name)):
            places.append(_Place(job, current, starts=job.ready == 0))
            continue
        # A pod that was evicted has a successor in the same Job, and may still be heard of beside it.
        last = min((worker for _, worker in mine), key=lambda worker: worker.silent)
        places.append(
            _Place(
                job,
                current,
                starts=job.ready == 0 and last.silent > lease,
                pods=tuple(sorted(pod for pod, _ in mine)),
                ready=last.state.ready and not last.state.draining and last.silent <= lease,
                busy=any(worker.state.leased for _, worker in mine),
                draining=last.state.draining,
                going=last.state.draining and job.name not in memory.told,
                silent=last.silent,
            )
        )
    return places


def _lost(seen: Seen, memory: Memory, places: Iterable[_Place]) -> list[_Place]:
    """Return the workers whose process is there and says nothing: their leases have run out, and they keep a slot."""
    if memory.looking_since is None:
        return []
    looking = seen.second - memory.looking_since
    silence = max(SILENCE, 3 * seen.pool.spec.lease.total_seconds())
    lost = []
    for place in places:
        since = place.job.started_at or place.job.created_at
        if place.pods:
            hangs = place.silent > silence and looking > silence
        else:
            hangs = seen.now - since > START and looking > START.total_seconds()
        if place.job.ready and hangs:
            lost.append(place)
    return lost


def _order(place: _Place) -> tuple[bool, bool, bool, bool, float]:
    """Who leaves first: who is about to anyway, then the outdated, those that do not run, the idle ones, the newest."""
    return not place.draining, place.current, not place.starts, place.busy, -place.job.created_at.timestamp()


def _leaving(staying: Sequence[_Place], desired: int) -> list[_Place]:
    mixed = desired > 0 and len({place.current for place in staying}) == 2
    allowed = desired + 1 if mixed else desired  # the one too many is what a rolling update is made with
    return sorted(staying, key=_order)[: max(0, len(staying) - allowed)]


def _replaced(staying: Sequence[_Place], desired: int) -> list[_Place]:
    """Return the outdated workers that go now: those that do not run, and one when there is one for it that takes tasks."""
    outdated = sorted((place for place in staying if not place.current), key=_order)
    if idle := [place for place in outdated if place.starts]:
        return idle
    if len(staying) > desired and all(place.ready for place in staying if place.current):
        return outdated[:1]
    return []


def _finished(seen: Seen, memory: Memory, places: Sequence[_Place]) -> tuple[list[WorkerJob], list[WorkerJob]]:
    """Return of the Jobs that have ended those that are the last failure of their slot, and those that can go."""
    records, spent = [], []
    latest: dict[int, WorkerJob] = {}
    for job in seen.jobs:
        if job.revision == seen.revision and not job.deleting:
            latest[job.slot] = max(job, latest.get(job.slot, job), key=lambda one: one.number)
    proven = any(place.current and place.ready for place in places)
    trying = {place.job.slot for place in places if place.current and not place.ready}
    for job in seen.jobs:
        if not job.finished or job.deleting:
            continue
        ended = job.finished_at or seen.now
        lived = ended - (job.started_at or job.created_at)
        failed = job.name not in memory.told and (job.failed or lived < SHORT)
        stale = lived >= STABLE or (proven and seen.now - ended >= STABLE)
        if not failed or stale or job.revision != seen.revision:
            spent.append(job)
        elif latest[job.slot] is job:
            records.append(job)
        elif job.slot not in trying or job.number < latest[job.slot].number - 1:
            spent.append(job)  # else it tells why, until its successor is better
    return records, spent


def _created(
    seen: Seen, places: Sequence[_Place], records: Sequence[WorkerJob], *, missing: int, room: int
) -> tuple[NewWorker, ...]:
    """Return new workers. A slot that has failed is tried again after a while, and counts as filled until then.

    While all fail there is one at a time that tries: workers without end would only fill the cluster.
    """
    if seen.trouble is not None and seen.trouble.reason == NOT_CONFIGURED:
        return ()
    due = sorted((job for job in records if job.backoff_over() <= seen.now), key=lambda job: (-job.number, job.slot))
    waiting = len(records) - len(due)
    number = min(missing - waiting, room)
    if records and not any(place.current and place.ready for place in places):
        trying = any(place.current for place in places)
        number = 0 if trying or waiting else min(number, 1)
    again = [NewWorker(job.slot, job.number + 1) for job in due[: max(0, number)]]
    taken = {job.slot for job in seen.jobs}
    free = (slot for slot in count() if slot not in taken)
    return (*again, *(NewWorker(next(free), 1) for _ in range(number - len(again))))


def _dismissed(seen: Seen, live: Iterable[WorkerJob]) -> tuple[str, ...]:
    if seen.look is None:
        return ()
    names = {job.name for job in live}
    lease = seen.pool.spec.lease.total_seconds()
    there = seen.look.workers.items()
    return tuple(pod for pod, worker in there if worker.state.job not in names and worker.silent > lease)


def _unexplained(seen: Seen, places: Iterable[_Place], records: Iterable[WorkerJob]) -> tuple[WorkerJob, ...]:
    failed = [job for job in records if not job.message]
    slow = [place.job for place in places if place.starts and seen.now - place.job.created_at >= SLOW]
    return (*failed[:_ASKED], *sorted(slow, key=lambda job: job.created_at)[:_ASKED])


# ---------------------------------------------------------------------------------------------------------- the status


def _status(seen: Seen, places: Sequence[_Place], records: Sequence[WorkerJob], *, desired: int) -> PoolStatus:
    ready = sum(place.ready for place in places)
    busy = sum(place.ready and place.busy for place in places)
    if seen.look is None:  # as they were
        ready = min(seen.status.ready, len(places))
        busy = min(seen.status.busy, ready)
    return PoolStatus(
        observed_generation=seen.pool.generation,
        replicas=len(places),
        ready=ready,
        busy=busy,
        idle=ready - busy,
        queued=seen.backlog.waiting,
        desired=desired,
        revision=seen.revision,
        selector=seen.pool.selector,
        conditions=_conditions(seen, places, records, ready=ready, desired=desired),
    )


def _conditions(
    seen: Seen, places: Sequence[_Place], records: Sequence[WorkerJob], *, ready: int, desired: int
) -> list[Condition]:
    """Return what is to be known of the pool. Reconciling and Stalled are there only when they are so, and never both."""
    missing = _missing(seen, places, desired)
    found: list[tuple[str, Literal["True", "False"], str, str]] = []
    stalled = _stalled(seen, places, records)
    if seen.trouble is not None:
        found.append(("Ready", "False", seen.trouble.reason, seen.trouble.message))
    elif ready:
        found.append(("Ready", "True", "Serving", "workers take tasks"))
    elif not desired:
        held = seen.pool.spec.replicas == 0
        then = "tasks wait until spec.replicas is another number" if held else "the first task starts one"
        found.append(("Ready", "True", "ScaledToZero", f"no worker runs; {then}"))
    else:
        reason, message = stalled or ("WorkersStart", missing)
        found.append(("Ready", "False", reason, message))
    current = sum(place.current and place.ready for place in places)
    if stalled is not None:
        found.append(("Stalled", "True", *stalled))
    elif seen.trouble is None and any(not place.current for place in places) and desired:
        message = f"{current} of {desired} workers are made of the present image and settings"
        found.append(("Reconciling", "True", "RollingUpdate", message))
    elif seen.trouble is None and ready < desired:
        found.append(("Reconciling", "True", "WorkersStart", missing))
    before = {condition.type: condition for condition in seen.status.conditions}
    now = seen.now.replace(microsecond=0)
    return [
        Condition(
            type=kind,
            status=status,
            reason=reason,
            message=message[:_TEXT],
            observed_generation=seen.pool.generation,
            last_transition_time=old.last_transition_time if (old := before.get(kind)) and old.status == status else now,
        )
        for kind, status, reason, message in found
    ]


def _missing(seen: Seen, places: Sequence[_Place], desired: int) -> str:
    """Return how many workers are missing, and what the first of them that says so waits for."""
    ready = sum(place.ready for place in places)
    waits = [place.job for place in places if place.job.message and not place.ready]
    why = f": {waits[0].name} {waits[0].message}" if waits else ""
    if seen.refused:
        why = f": cannot create the next one: {seen.refused}"
    return f"{ready} of {desired} workers take tasks{why}"


def _stalled(seen: Seen, places: Sequence[_Place], records: Sequence[WorkerJob]) -> tuple[str, str] | None:
    """Return why nothing gets better by waiting."""
    tries = [place.job for place in places if place.current and not place.ready and place.job.number > FAILURES]
    if any(job.number >= FAILURES for job in records) or tries:
        failed = [job for job in seen.jobs if job.finished and job.revision == seen.revision and job.message]
        last = max(failed, key=lambda job: job.finished_at or job.created_at, default=None)
        times = max(job.number - (not job.finished) for job in (*records, *tries))
        said = "" if last is None else f"; the last one, {last.name}: {last.message}"
        return "WorkersFail", f"workers fail, {times} times in a row{said}"
    # While Redis is silent so are workers that are well; what does not run at all, the Job says.
    unheard = [place for place in places if not place.pods and (place.starts or seen.look is not None)]
    late = [place.job for place in unheard if seen.now - place.job.created_at > START]
    if not late:
        return None
    why = next((f": {job.message}" for job in late if job.message), "")
    minutes = int(START.total_seconds() // 60)
    return "WorkersStart", f"{late[0].name} does not take tasks after {minutes} minutes{why}"
