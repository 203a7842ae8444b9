"""What the operator has seen of tasks and Jobs, newest first: fed by watch events, lists and answers to its own writes.

Events come late, twice and out of order; a resourceVersion that is not higher than the known one changes nothing, nor does
anything of a task that is gone. Tasks are kept as compact JSON, finished ones as the few fields that are still needed, so
that ten thousand take a few megabytes.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from heapq import nsmallest
from types import MappingProxyType
from typing import Any, Final

import orjson

from task_contract.models import Phase, Spec, TaskType
from task_contract.names import TRACEPARENT_ANNOTATION
from task_operator.jobs import JobState, parse_time

Key = tuple[str, str]
"""(namespace, name) of a task."""

_REMEMBERED: Final = 4_000  # tasks that are gone: those of a minute and more, at 0.15 KB each
_KNOWN: Final = ("namespace", "name", "uid", "resourceVersion", "creationTimestamp")
"""Fields of the metadata that are kept beside the JSON alone, as ``status.job`` is: in that of 10,000 tasks they would be
2.2 MB."""
_LEFT_OUT: Final = frozenset({*_KNOWN, "managedFields", "annotations"})
_DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    Spec(type=TaskType.HEALTH_CHECK).model_dump(mode="json", by_alias=True, exclude={"type", "payload"}, exclude_none=True)
)
"""What the API server writes into each spec that does not say it: 200 bytes, which most tasks have in common."""
FINISHED: Final = frozenset(str(phase) for phase in Phase if phase.finished)
"""Phases that are never left, as a manifest names them."""


@dataclass(frozen=True, slots=True)
class CachedTask:
    """A task as last seen."""

    key: Key
    uid: str
    resource_version: int
    phase: str
    priority: str
    expires_at: float | None
    """Seconds since the epoch at which a finished task is due to be deleted."""
    settled: bool
    """Whether it has finished, and its status says so of the spec as it is now."""
    job: str | None
    """Name of the Job of its last attempt."""
    body: bytes
    """The rest of the manifest as JSON."""
    ended_at: float | None = None
    """Seconds since the epoch at which it finished."""
    idempotency_key: str | None = None
    depends_on: tuple[str, ...] = ()
    """Of an unfinished task: names of those that it waits for before its first attempt."""
    duplicate: bool = False
    """It has ended because another one of its idempotency key came first."""
    created: str = ""
    """Creation time as the API server writes it: compares as the times do."""
    waits_since: float | None = None
    """Seconds since the epoch at which it came into the queue; None: it is not in it, or was taken out by spec.suspend."""
    waits_for: str | None = None
    """What it waits for while it is in the queue, as ``status.queue`` says it."""

    @property
    def finished(self) -> bool:
        """Whether it will never change phase again."""
        return self.phase in FINISHED

    @property
    def rank(self) -> tuple[bool, bool, str, str]:
        """Its place among tasks of the same idempotency key."""
        return self.phase != Phase.COMPLETED, self.duplicate, self.created, self.uid

    def manifest(self) -> dict[str, Any]:
        """Return the task; of a finished one only what a decision about it needs."""
        loaded: dict[str, Any] = orjson.loads(self.body)
        known = zip(_KNOWN, (*self.key, self.uid, str(self.resource_version), self.created), strict=True)
        return {
            "metadata": {key: value for key, value in known if value} | loaded["metadata"],
            "spec": _DEFAULTS | loaded["spec"],
            "status": loaded["status"] if self.job is None else loaded["status"] | {"job": self.job},
        }


class Cache:
    """Tasks by key and Jobs by the key of their task."""

    def __init__(self) -> None:
        self._tasks: dict[Key, CachedTask] = {}
        self._jobs: dict[Key, tuple[JobState, ...]] = {}  # hardly ever more than one, and a dictionary takes 230 bytes
        self._changed: dict[Key, datetime] = {}
        self._gone: dict[str, None] = {}
        self._by_key: dict[tuple[str, str], set[Key]] = {}
        self._dependents: dict[Key, set[Key]] = {}
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._tasks)

    def task(self, key: Key) -> CachedTask | None:
        """Return the task of this name."""
        return self._tasks.get(key)

    def key(self, key: Key) -> Key:
        """Return the key of a task as it is kept here, or else as it came: who keeps one for each task keeps the same."""
        known = self._tasks.get(key)
        return key if known is None else known.key

    def tasks(self) -> Iterator[tuple[Key, CachedTask]]:
        """Go over all tasks."""
        return iter(list(self._tasks.items()))

    def count(self, namespace: str) -> int:
        """Return how many tasks a namespace has."""
        return self._counts[namespace]

    def uids(self) -> set[str]:
        """Return the uids of all tasks."""
        return {task.uid for task in self._tasks.values()}

    def job_uids(self) -> set[str]:
        """Return the uids of all Jobs."""
        return {job.uid for jobs in self._jobs.values() for job in jobs}

    def newest_task(self) -> int:
        """Return the highest version of a task; -1 of none."""
        return max((task.resource_version for task in self._tasks.values()), default=-1)

    def jobs(self, key: Key) -> tuple[JobState, ...]:
        """Return the Jobs that belong to a task of this name, whatever its uid."""
        return self._jobs.get(key, ())

    def job_keys(self) -> Iterator[Key]:
        """Go over the names of all tasks that have Jobs."""
        return iter(list(self._jobs))

    def jobs_changed_at(self, key: Key) -> datetime | None:
        """Return when a Job of this task last changed."""
        return self._changed.get(key)

    def put_task(self, manifest: Mapping[str, Any]) -> bool:
        """Take in a task; return whether that was news."""
        metadata = manifest["metadata"]
        key = (sys.intern(metadata["namespace"]), metadata["name"])
        version = int(metadata["resourceVersion"])
        known = self._tasks.get(key)
        if (known is not None and known.resource_version >= version) or metadata["uid"] in self._gone:
            return False
        if known is None:
            self._counts[key[0]] += 1
        else:
            self._unlist(key, known)
            key = known.key
        same = {job.name: job.name for job in self.jobs(key)}
        task = _cached(manifest, version, key=key, same=same)
        self._tasks[key] = task
        if task.idempotency_key is not None:
            self._by_key.setdefault((key[0], task.idempotency_key), set()).add(key)
        for name in task.depends_on:
            self._dependents.setdefault((key[0], name), set()).add(key)
        return True

    def dependents(self, key: Key) -> set[Key]:
        """Return the unfinished tasks that wait, or waited, for the task of this name, whether it is there or not."""
        return set(self._dependents.get(key, ()))

    def same_key(self, key: Key) -> set[Key]:
        """Return the other tasks that have the idempotency key of this one."""
        task = self._tasks.get(key)
        if task is None or task.idempotency_key is None:
            return set()
        return self._by_key.get((key[0], task.idempotency_key), set()) - {key}

    def first(self, key: Key) -> str | None:
        """Return the name of the task that comes before this one under its idempotency key; None: none does.

        The first is the one that was created first, by uid where that was in the same second; but one that has completed
        comes before all others, or a late arrival would have the work done again.
        """
        others = self.same_key(key)
        if not others:
            return None
        first = min((key, *others), key=lambda one: self._tasks[one].rank)
        return None if first == key else first[1]

    def _unlist(self, key: Key, task: CachedTask) -> None:
        if task.idempotency_key is not None:
            same = self._by_key.get((key[0], task.idempotency_key), set())
            same.discard(key)
            if not same:
                self._by_key.pop((key[0], task.idempotency_key), None)
        for name in task.depends_on:
            waiting = self._dependents.get((key[0], name), set())
            waiting.discard(key)
            if not waiting:
                self._dependents.pop((key[0], name), None)

    def drop_task(self, key: Key, *, uid: str, gone: bool = True) -> bool:
        """Forget a task, unless another one has taken its name; return whether it was known.

        ``gone``: whether it is, and nothing may bring it back; else somebody else looks after it.
        """
        known = self._tasks.get(key)
        if known is None or known.uid != uid:
            return False
        if gone:
            self._bury(uid)
        self._unlist(key, known)
        self._counts[key[0]] -= 1
        del self._tasks[key]
        if key not in self._jobs:
            self._changed.pop(key, None)
        return True

    def _bury(self, uid: str) -> None:
        """Remember that a task is gone: what is still on its way (a page of a list, an answer) must not bring it back."""
        self._gone[uid] = None
        if len(self._gone) > _REMEMBERED:
            del self._gone[next(iter(self._gone))]

    def put_job(self, job: JobState, *, now: datetime) -> bool:
        """Take in a Job; return whether that was news."""
        key = job_key(job)
        if key is None:
            return False
        known = self._job(key, job.name)
        if known is not None and known.resource_version >= job.resource_version:
            return False
        task = self._tasks.get(key)
        if task is not None and task.uid == job.owner_uid:  # what both say is kept once: of 10,000 it is 3 MB
            key = task.key
            name = task.job if task.job is not None and task.job == job.name else job.name
            job = replace(job, name=name, owner_uid=task.uid, owner_name=key[1])
        self._jobs[key] = (*self._others(key, job.name), job)
        self._changed[key] = now
        return True

    def _job(self, key: Key, name: str) -> JobState | None:
        return next((job for job in self.jobs(key) if job.name == name), None)

    def _others(self, key: Key, name: str) -> tuple[JobState, ...]:
        return tuple(job for job in self.jobs(key) if job.name != name)

    def drop_job(self, key: Key, name: str, *, uid: str, now: datetime) -> bool:
        """Forget a Job that is gone, unless another one has taken its name; return whether it was known."""
        known = self._job(key, name)
        if known is None or known.uid != uid:
            return False
        self._jobs[key] = self._others(key, name)
        self._changed[key] = now
        if not self._jobs[key]:
            del self._jobs[key]
            if key not in self._tasks:
                self._changed.pop(key, None)
        return True

    def mark_deleting(self, job: JobState) -> None:
        """Note that the deletion of a Job was accepted, so that nobody asks for it again before the event comes."""
        key = job_key(job)
        known = None if key is None else self._job(key, job.name)
        if key is not None and known is not None and known.uid == job.uid:
            self._jobs[key] = (*self._others(key, job.name), replace(known, deleting=True))


def surplus(
    tasks: Iterable[tuple[Key, CachedTask]], *, most: int, archived: Callable[[CachedTask], bool]
) -> list[tuple[Key, CachedTask]]:
    """Return which of a namespace's tasks are to go so that no more than ``most`` are left: those that ended first.

    Only finished ones that PostgreSQL has; where there are too few of them, more than ``most`` stay.
    """
    everything = list(tasks)
    ended = [(task.ended_at or 0.0, key, task) for key, task in everything if task.finished and archived(task)]
    return [(key, task) for _, key, task in nsmallest(max(0, len(everything) - most), ended)]


def job_key(job: JobState) -> Key | None:
    """Return the key of the task that a Job belongs to; None for a Job that no task controls."""
    return None if job.owner_name is None else (job.namespace, job.owner_name)


def _cached(manifest: Mapping[str, Any], version: int, *, key: Key, same: Mapping[str, str]) -> CachedTask:
    """``key`` and ``same``, names of its Jobs, are kept already."""
    metadata: Mapping[str, Any] = manifest["metadata"]
    spec: Mapping[str, Any] = _mapping(manifest.get("spec"))
    status: Mapping[str, Any] = _mapping(manifest.get("status"))
    phase = str(status.get("phase") or Phase.QUEUED)
    traceparent = _mapping(metadata.get("annotations")).get(TRACEPARENT_ANNOTATION)
    body = {
        "metadata": {key: value for key, value in metadata.items() if key not in _LEFT_OUT}
        | ({} if traceparent is None else {"annotations": {TRACEPARENT_ANNOTATION: traceparent}}),
        "spec": {key: value for key, value in spec.items() if key not in _DEFAULTS or _DEFAULTS[key] != value},
        "status": {key: value for key, value in status.items() if key != "job"},
    }
    expires = ended = None
    settled = phase in FINISHED and status.get("observedGeneration") == metadata.get("generation")
    if phase in FINISHED:
        body["spec"] = {key: spec[key] for key in ("type", "kbId", "ttlSecondsAfterFinished") if key in spec}
        kept = ("phase", "attempt", "finishedAt", "observedGeneration", *(() if settled else ("conditions",)))
        body["status"] = {key: status[key] for key in kept if key in status}
        ended = parse_time(status.get("finishedAt"))
        ttl = spec.get("ttlSecondsAfterFinished", 86_400)
        expires = ended.timestamp() + ttl if ended is not None and isinstance(ttl, (int, float)) else None
    job: str | None = status.get("job")
    return CachedTask(
        key=key,
        uid=sys.intern(metadata["uid"]),  # the projection has it too
        resource_version=version,
        phase=sys.intern(phase),  # words that thousands share are kept once
        priority=sys.intern(str(spec.get("priority") or "normal")),
        expires_at=expires,
        settled=settled,
        job=None if job is None else same.get(job, job),
        body=bytes(memoryview(orjson.dumps(body))),  # a copy: what orjson returns keeps the 4 KiB of its buffer
        ended_at=None if ended is None else ended.timestamp(),
        idempotency_key=None if spec.get("idempotencyKey") is None else str(spec["idempotencyKey"]),
        depends_on=() if phase in FINISHED else _names(spec.get("dependsOn")),
        duplicate="duplicateOf" in status,
        created=sys.intern(str(metadata.get("creationTimestamp") or "")),
        waits_since=None if phase != Phase.QUEUED or spec.get("suspend") else _queued_at(metadata, status),
        waits_for=None if phase != Phase.QUEUED else sys.intern(_reason(status)),
    )


def _reason(status: Mapping[str, Any]) -> str:
    return str(_mapping(status.get("queue")).get("reason") or Phase.QUEUED)


def _queued_at(metadata: Mapping[str, Any], status: Mapping[str, Any]) -> float | None:
    at = parse_time(status.get("queuedAt")) or parse_time(metadata.get("creationTimestamp"))
    return None if at is None else at.timestamp()


def _names(value: object) -> tuple[str, ...]:
    return tuple(sys.intern(str(name)) for name in value) if isinstance(value, list) else ()


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
