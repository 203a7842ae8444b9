"""What callers see of tasks, the same over REST and over the Kubernetes API; and tasks as callers describe them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service_client.errors import FieldError, TaskClientError, TaskRefused
from task_contract.models import Attempt, Failure, QueueStatus, Result, Spec


class TaskStatus(StrEnum):
    """The state of a task."""

    QUEUED = "queued"
    PROCESSING = "processing"
    RETRYING = "retrying"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def finished(self) -> bool:
        """Whether it will never change again."""
        return self in {TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELED}


class _View(BaseModel):
    """Fields of a newer release are ignored."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class Submitted(_View):
    """A task that was accepted."""

    id: str
    """Its name: what the other calls take."""
    namespace: str
    uid: str
    """Never used twice."""
    status: TaskStatus = TaskStatus.QUEUED
    replayed: bool = False
    """Whether an earlier request with the same idempotency key, or name, had created it already."""


class CallbackDelivery(_View):
    """Whether the receiver of the callback knows of the end of the task."""

    state: str | None = None
    """pending, delivered or dead: given up, it can be sent again by hand."""
    attempts: int | None = None
    """Deliveries that were tried."""
    last_attempt_at: datetime | None = None
    status_code: int | None = None
    """What the receiver answered; None when it did not."""
    message: str | None = None
    """Why it is not delivered."""


class Task(_View):
    """A task. Fields without a value are None."""

    id: str
    namespace: str
    uid: str
    task_type: str | None = None
    kb_id: str | None = None
    priority: str = "normal"
    status: TaskStatus
    stage: str | None = None
    """fetch, parse, split, embed, store, verify, publish or check."""
    progress: int = 0
    """Percent."""
    attempt: int = 0
    created_at: datetime | None = None
    queued_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    """When it ended, however it ended."""
    reason: str | None = None
    """Such as Completed, Unchanged, DocumentUnreadable; docs/troubleshooting.md explains each."""
    message: str | None = None
    queue: QueueStatus | None = None
    """Why it does not run yet."""
    result: Result | None = None
    error: Failure | None = None
    """Why it, or its last attempt, failed."""
    attempts: list[Attempt] = []
    """The last five."""
    duplicate_of: str | None = None
    payload: dict[str, Any] = {}
    labels: dict[str, str] = {}
    callback: CallbackDelivery | None = None
    """What has become of its callback; None before the first delivery was tried."""
    deleted_at: datetime | None = None
    """Since when it is only in the archive; over REST."""


DELETED: Final = "Deleted"
"""Reason of a task that is canceled because it was deleted before it had ended."""


class TaskUpdate(_View):
    """Something that has happened to a task: a transition, or progress within a state; at first, where it stands."""

    task_id: str
    namespace: str = ""
    uid: str = ""
    status: TaskStatus
    event: int | None = None
    """Number of the transition, rising over all tasks: what a watch goes on behind. None for progress."""
    kb_id: str | None = None
    task_type: str | None = None
    progress: int | None = None
    stage: str | None = None
    done: int | None = None
    """Of a batch that runs, over REST: documents that have ended, well or not."""
    total: int | None = None
    """Of a batch that runs, over REST: documents that there are."""
    attempt: int | None = None
    reason: str | None = None
    message: str | None = None
    at: datetime | None = None

    @classmethod
    def of(cls, task: Task) -> "TaskUpdate":
        """Return the present state of a task."""
        shared = {name: getattr(task, name) for name in cls.model_fields if name in Task.model_fields}
        return cls(task_id=task.id, **shared)


@dataclass(frozen=True, slots=True)
class BatchItem:
    """What has become of one task of a batch: it was accepted, or there is an error."""

    index: int
    """Place in the batch, from 0."""
    task: Submitted | None = None
    error: TaskClientError | None = None


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tasks of the namespace; None does not choose."""

    status: TaskStatus | None = None
    task_type: str | None = None
    kb_id: str | None = None
    priority: str | None = None


# -------------------------------------------------------------------------------------------------------------- orders

TaskLike = Spec | Mapping[str, Any]
"""A task as a caller describes it: the body of REST (``task_type``, ``kb_id``, …), the spec of a manifest (``type``,
``kbId``, …), or the contract's model of it."""

_AROUND = ("namespace", "labels", "idempotency_key")


class _Around(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    namespace: str | None = None
    labels: dict[str, str] = {}
    idempotency_key: Annotated[str, Field(min_length=1, max_length=128)] | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """A task that is to be created."""

    task: TaskLike
    key: str
    """Idempotency key, the caller's or one of our own."""
    labels: Mapping[str, str]
    namespace: str | None
    name: str | None
    """Over the Kubernetes API alone: over REST the name follows from the key."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    """Over the Kubernetes API alone."""
    dry_run: bool = False
    """Over the Kubernetes API alone: it is judged, and not stored."""

    @classmethod
    def of(cls, task: TaskLike, *, key: str, labels: Mapping[str, str] | None = None, name: str | None = None) -> "Order":
        """Read what stands around the task itself; a key or labels in its body come first. Raises :class:`TaskRefused`."""
        inside = {} if isinstance(task, Spec) else {part: task[part] for part in _AROUND if part in task}
        try:
            around = _Around.model_validate(inside)
        except ValidationError as error:
            raise _refused(error) from error
        return cls(
            task=task,
            key=around.idempotency_key or key,
            labels={**(labels or {}), **around.labels},
            namespace=around.namespace,
            name=name,
        )

    def body(self, namespace: str | None) -> dict[str, Any]:
        """Return the body of REST. A body that was given goes as it is: the gateway is the one that judges it."""
        if isinstance(self.task, Spec):
            given = self.task.model_dump(mode="json", exclude_unset=True)
        elif _is_manifest(self.task):
            given = _spec(self.task, by_alias=True).model_dump(mode="json", exclude_unset=True)
        else:
            given = dict(self.task)
        if "type" in given:
            given["task_type"] = given.pop("type")
        # A key of the spec has another meaning (docs/tasks.md), and the gateway has one field for both.
        given["idempotency_key"] = self.key if given.get("idempotency_key") is None else given["idempotency_key"]
        if self.labels:
            given["labels"] = dict(self.labels)
        if namespace is not None:
            given.setdefault("namespace", namespace)
        return given

    def spec(self) -> dict[str, Any]:
        """Return the spec of the manifest, without defaults. Raises :class:`TaskRefused` that names each bad field."""
        if isinstance(self.task, Spec):
            return self.task.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
        if _is_manifest(self.task):
            return _spec(self.task, by_alias=True).model_dump(
                mode="json", by_alias=True, exclude_unset=True, exclude_none=True
            )
        body = {("type" if key == "task_type" else key): value for key, value in self.task.items() if key not in _AROUND}
        return _spec(body, by_alias=False).model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)


def _is_manifest(task: Mapping[str, Any]) -> bool:
    return "type" in task and "task_type" not in task


def _spec(given: Mapping[str, Any], *, by_alias: bool) -> Spec:
    try:
        return Spec.model_validate(given, by_alias=by_alias, by_name=not by_alias, extra="forbid")
    except ValidationError as error:
        raise _refused(error) from error


def _refused(error: ValidationError) -> TaskRefused:
    fields = []
    for problem in error.errors(include_url=False, include_input=False):
        path = [str(part) for part in problem["loc"]]
        path[0] = "task_type" if path[0] == "type" else path[0]
        fields.append(FieldError(".".join(path), problem["msg"].removeprefix("Value error, ")))
    shown = "; ".join(f"{one.field}: {one.message}" for one in fields)
    return TaskRefused(f"cannot create the task: {shown}", fields=tuple(fields))
