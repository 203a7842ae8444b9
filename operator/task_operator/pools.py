"""Worker pools as values: which pool a task fits, how many workers there are to be, what is done about it. Pure functions.

A pool is scaled by what waits for it. A worker is never taken from its tasks: one that is not wanted any more is told to
drain, ends by itself, and its Job goes after it. See docs/adr/0045.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from task_contract.leases import PoolKeys
from task_contract.models import Executor, ProcessingTask
from task_contract.names import POOL_LABEL
from task_contract.pools import PoolSpec, WorkerPool
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
    if task.spec.executor is Executor.JOB:
        return None
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
