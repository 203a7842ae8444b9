"""WorkerPool as frozen pydantic models: the source of its CRD.

A pool is a set of warm workers in a namespace that carry out its tasks without a pod start. It holds nothing that is not
also in the tasks: a pool may be deleted, and Redis wiped, at any moment.
"""

from datetime import timedelta
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from task_contract.models import Conditions, Duration, Metadata, Model, Resource, TaskType

POOL_TYPES: tuple[TaskType, ...] = tuple(kind for kind in TaskType if kind is not TaskType.BATCH_PROCESSING)
"""What a worker can carry out: a batch is an Indexed Job, with a pod a shard."""


class WorkerResources(Model):
    """Requests and limits of a worker's container."""

    requests: Annotated[dict[Annotated[str, Field(max_length=63)], Resource], Field(max_length=8)] = {}
    limits: Annotated[dict[Annotated[str, Field(max_length=63)], Resource], Field(max_length=8)] = {}


class PoolSpec(Model):
    """What the pool is to be."""

    types: Annotated[list[TaskType], Field(min_length=1, max_length=5)]
    """Types of tasks that the workers carry out; batch_processing always has Jobs of its own."""
    min: Annotated[int, Field(ge=0, le=256)] = 0
    """Workers that stay although there is nothing to do. 0: none; the first task starts the first."""
    max: Annotated[int, Field(ge=1, le=256)] = 4
    """Most workers."""
    replicas: Annotated[int, Field(ge=0, le=256)] | None = None
    """Workers wanted, written by whoever scales the pool from outside (kubectl scale, an autoscaler); kept between min and
    max. Absent: the operator scales it by its queue."""
    target_backlog: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Tasks waiting for each worker that are fine: with more of them there are more workers."""
    scale_down_after: Duration = timedelta(minutes=1)
    """So long fewer workers have to be enough before there are fewer."""
    idle_timeout: Duration = timedelta(minutes=5)
    """So long the pool may have nothing to do before it goes down to min."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    """Tasks that a worker has at once; their texts share the calls of the model."""
    batch_size: Annotated[int, Field(ge=1, le=256)] = 64
    """Most texts, of several tasks, in one call of the model."""
    lease: Duration = timedelta(seconds=30)
    """So long a worker may be silent before its tasks go to others."""
    grace_period: Duration = timedelta(seconds=60)
    """So long a worker that is told to stop may finish what it has; the rest is given back, uncounted."""
    resources: WorkerResources = WorkerResources()
    """Of each worker. Default: the operator's class medium. A task that needs more has a Job of its own."""
    node_selector: Annotated[
        dict[Annotated[str, Field(max_length=317)], Annotated[str, Field(max_length=63)]], Field(max_length=16)
    ] = {}
    """Labels of the nodes that workers may run on."""
    priority_class_name: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """PriorityClass of the workers. Default: that of priority normal."""


class PoolStatus(Model):
    """What the operator has seen of a pool."""

    observed_generation: Annotated[int, Field(ge=0)] | None = None
    replicas: Annotated[int, Field(ge=0)] = 0
    """Workers that there are, also those that start or drain."""
    ready: Annotated[int, Field(ge=0)] = 0
    """Workers that take tasks."""
    busy: Annotated[int, Field(ge=0)] = 0
    """Of these, workers that have a task."""
    idle: Annotated[int, Field(ge=0)] = 0
    """Of these, workers that have none."""
    queued: Annotated[int, Field(ge=0)] = 0
    """Tasks that wait for a worker."""
    desired: Annotated[int, Field(ge=0)] = 0
    """Workers that there are to be."""
    revision: Annotated[str, Field(max_length=63)] | None = None
    """Of what workers are made from: image and settings. Those of another revision are replaced one after the other."""
    selector: Annotated[str, Field(max_length=1024)] | None = None
    """Labels of the workers' pods, for autoscalers."""
    conditions: Conditions = []
    """Ready, Reconciling, Stalled: what kstatus and kubectl wait read."""


class WorkerPool(Model):
    """A pool, as a manifest holds it and as the API server hands it back."""

    api_version: Literal["tasks.zzdsj.io/v1"] = "tasks.zzdsj.io/v1"
    kind: Literal["WorkerPool"] = "WorkerPool"
    metadata: Metadata
    spec: PoolSpec
    status: PoolStatus = PoolStatus()

    plural: ClassVar[str] = "workerpools"
