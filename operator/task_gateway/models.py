"""What goes in and out over REST: requests parsed once into the contract's models, and answers as models for OpenAPI.

A request is the contract's :class:`~task_contract.models.Spec` in snake_case with a few fields around it; bounds stand in
the contract alone. Answers are dicts made by :func:`task_contract.views.task_view`; the models here describe them.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol
from uuid import UUID

import orjson
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)

from task_contract.messages import ProgressEvent
from task_contract.models import Attempt, Failure, Phase, Priority, QueueStatus, Result, Spec, TaskType, Timestamp
from task_contract.names import API_VERSION, GROUP, KIND, digest
from task_contract.views import event_status, task_view, timestamp
from task_gateway.problems import FieldError, Problem, field_errors

TasksStatus = Literal["queued", "processing", "retrying", "completed", "failed", "canceled"]
STATUSES: Final[Mapping[str, Phase]] = {phase.lower(): phase for phase in Phase}
"""Phase of each state as services write it."""

REQUEST_HASH: Final = f"{GROUP}/request-hash"
"""Annotation: digest of what was asked for, so that a repeated request is known from another one with the same key."""
CREATED_BY: Final = f"{GROUP}/created-by"
"""Annotation: the caller, as the cluster names it."""

_RENAMED: Final = {"type": "task_type"}
_OURS: Final = ("namespace", "labels")
_NOT_HERE: Final = frozenset({"type", "cancel"})


# -------------------------------------------------------------------------------------------------------------- cursors


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a page ends: the creation and uid of its last task."""

    created_at: datetime
    uid: UUID

    def text(self) -> str:
        """Return it as a word of URLs."""
        micros = (self.created_at - _EPOCH) // timedelta(microseconds=1)  # a float of seconds would round them
        return base64.urlsafe_b64encode(micros.to_bytes(8, "big", signed=True) + self.uid.bytes).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> "Cursor":
        """Read what :meth:`text` wrote. Raises ``ValueError``."""
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            at = _EPOCH + timedelta(microseconds=int.from_bytes(data[:8], "big", signed=True))
            return cls(created_at=at, uid=UUID(bytes=data[8:]))
        except (binascii.Error, ValueError, OverflowError) as error:
            raise ValueError("is no cursor; take next_cursor of the page before as it is") from error


CursorText = Annotated[
    Cursor, BeforeValidator(lambda text: Cursor.parse(str(text))), WithJsonSchema({"type": "string", "maxLength": 64})
]
"""A cursor as a parameter of a query."""


# ------------------------------------------------------------------------------------------------------------- requests


def _label_key(key: str) -> str:
    if key.partition("/")[0].endswith(("kubernetes.io", "k8s.io", GROUP)):
        raise ValueError("labels of Kubernetes and of this product are not the caller's")
    return key


_NAME_PART: Final = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
LabelKey = Annotated[
    str,
    Field(max_length=253, pattern=rf"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?{_NAME_PART}$"),
    AfterValidator(_label_key),
]
LabelValue = Annotated[str, Field(max_length=63, pattern=rf"^({_NAME_PART})?$")]
Namespace = Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]


class Around(BaseModel):
    """The fields of a request that are no fields of the spec."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    namespace: Namespace | None = None
    """Where the task goes. Default: header X-Namespace, ?namespace=, else the gateway's default."""
    labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=32)] = {}
    """Labels of the resource, as Kubernetes allows them."""


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """A task that somebody wants, checked as far as that goes without the API server."""

    spec: Mapping[str, Any]
    """As a manifest has it, with what the caller gave and no defaults."""
    labels: Mapping[str, str]
    namespace: str | None
    idempotency_key: str | None

    @property
    def hash(self) -> str:
        """Digest of all that was asked for; equal for requests that say the same, whatever the order of their fields."""
        return digest(orjson.dumps([self.spec, self.labels], option=orjson.OPT_SORT_KEYS).decode())


def parse_task(body: object) -> TaskRequest:
    """Read the body of POST /api/v1/tasks, or an item of a batch. Raises :class:`Problem` that names every bad field."""
    if not isinstance(body, dict):
        raise Problem(422, "invalid-task", "cannot create the task: the body must be a JSON object with task_type, kb_id, …")
    errors = [FieldError(name, "is no field of it; take it out") for name in sorted(_NOT_HERE & body.keys())]
    within = {key: value for key, value in body.items() if key not in _OURS and key not in _NOT_HERE}
    if "task_type" in within:
        within["type"] = within.pop("task_type")
    spec, around = None, None
    try:
        spec = Spec.model_validate(within, by_name=True, by_alias=False, extra="forbid")
    except ValidationError as error:
        errors += field_errors(error, rename=_RENAMED)
    try:
        around = Around.model_validate({key: body[key] for key in _OURS if key in body and body[key] is not None})
    except ValidationError as error:
        errors += field_errors(error)
    if errors or spec is None or around is None:
        shown = "; ".join(f"{one.field}: {one.message}" for one in errors[:3])
        raise Problem(422, "invalid-task", f"cannot create the task: {shown}", errors=errors)
    wanted = spec.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    # The name is made from the key: in the spec it would be one for all callers of the namespace.
    wanted.pop("idempotencyKey", None)
    return TaskRequest(spec=wanted, labels=around.labels, namespace=around.namespace, idempotency_key=spec.idempotency_key)


def manifest_of(
    request: TaskRequest, *, name: str, namespace: str, caller: str, labels: Mapping[str, str]
) -> dict[str, Any]:
    """Return the resource that a request asks for. ``labels``: where it gives no others."""
    labels = {**labels, **request.labels}
    annotations = {REQUEST_HASH: request.hash} | ({CREATED_BY: caller} if caller else {})
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": name,
            "namespace": namespace,
            "annotations": annotations,
            **({"labels": labels} if labels else {}),
        },
        "spec": request.spec,
    }


def name_of(*, namespace: str, caller: str, key: str) -> str:
    """Return the name of a task from the key of its request: the same for the same caller, another for anybody else."""
    return f"task-{digest(namespace, caller, key)}"


class PriorityChange(BaseModel):
    """Body of PATCH /api/v1/tasks/{id}."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    priority: Priority


def _moment(at: datetime) -> datetime:
    if not 1970 <= at.year < 3000:
        raise ValueError("must be a time between the years 1970 and 3000")
    return at.astimezone(UTC)


Moment = Annotated[AwareDatetime, AfterValidator(_moment)]


class ListQuery(BaseModel):
    """Parameters of GET /api/v1/tasks."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kb_id: Annotated[str, Field(pattern=r"^[!-~]{1,63}$")] | None = None
    """Tasks of a knowledge base."""
    task_type: TaskType | None = None
    """Tasks of a type."""
    status: TasksStatus | None = None
    """Tasks in a state."""
    priority: Priority | None = None
    """Tasks of a priority."""
    created_after: Moment | None = None
    """Created at this time or later; with time zone, such as 2026-01-31T09:30:00Z."""
    created_before: Moment | None = None
    """Created before this time."""
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    """Tasks of a page."""
    cursor: CursorText | None = None
    """next_cursor of the page before."""


class EventsQuery(BaseModel):
    """Parameters of GET /api/v1/tasks/{id}/events."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    after: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Transitions with a higher number."""
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    """Transitions of a page."""


class DocumentsQuery(BaseModel):
    """Parameters of GET /api/v1/tasks/{id}/documents."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    state: Literal["pending", "done", "failed"] | None = None
    """Documents in a state."""
    after: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Documents with a higher number."""
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    """Documents of a page."""


class LogQuery(BaseModel):
    """Parameters of GET /api/v1/tasks/{id}/logs."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    attempt: Annotated[int, Field(ge=1, le=32767)] | None = None
    """Number of an attempt. Default: the latest one that has a pod."""
    tail: Annotated[int, Field(ge=1, le=10_000)] = 500
    """Lines from the end."""
    follow: bool = False
    """Go on with what is written until the attempt ends."""


# -------------------------------------------------------------------------------------------------------------- answers


class Answer(BaseModel):
    """Base of answers: they may have more fields in a later release."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Links(Answer):
    """Paths of what belongs to a task, with the namespace in them."""

    self: str
    result: str
    events: str
    logs: str
    cancel: str


class Accepted(Answer):
    """A task that was accepted."""

    id: str
    """Name of the task; the same as task_id."""
    task_id: str
    namespace: str
    uid: str
    status: TasksStatus
    """queued; of a request that is repeated, what has become of the task since."""
    links: Links


class TaskView(Answer):
    """A task. Fields without a value are null."""

    id: str
    task_id: str
    """Name of the task, unique in its namespace among the tasks that exist."""
    namespace: str
    uid: str
    """Never used twice."""
    task_type: str | None
    kb_id: str | None
    priority: str
    status: TasksStatus
    stage: str | None
    progress: Annotated[int, Field(ge=0, le=100)]
    """Percent: 0 while it is queued, 100 when it is completed."""
    attempt: int
    created_at: Timestamp | None
    queued_at: Timestamp | None
    started_at: Timestamp | None
    completed_at: Timestamp | None
    """When it ended, however it ended."""
    reason: str | None
    message: str | None
    queue: QueueStatus | None
    """Why it does not run yet."""
    result: Result | None
    error: Failure | None
    attempts: list[Attempt]
    """The last five."""
    duplicate_of: str | None
    payload: dict[str, Any]
    """As submitted."""
    labels: dict[str, str]
    """Of a task that exists; lists and the archive have none."""
    callback: dict[str, Any] | None
    """What has become of its callback."""
    deleted_at: Timestamp | None
    """Since when it is only in the archive."""
    links: Links


class TaskPage(Answer):
    """Part of a list, the youngest first."""

    items: list[TaskView]
    next_cursor: str | None
    """Where the next page begins; null on the last one."""


class TaskResult(Answer):
    """How a task has ended."""

    task_id: str
    namespace: str
    status: Literal["completed", "failed", "canceled"]
    result: Result | None
    error: Failure | None
    completed_at: Timestamp | None


class TaskEvent(Answer):
    """A transition of a task."""

    type: Literal["task"]
    event: int
    """Number; of all tasks, a later event has a higher one."""
    task_id: str
    namespace: str
    uid: str
    kb_id: str | None
    task_type: str
    status: str
    """The state that it has come into; canceled, with the reason Deleted: it was deleted before it had ended."""
    attempt: int
    reason: str
    message: str | None
    at: Timestamp


class EventPage(Answer):
    """Transitions in their order."""

    items: list[TaskEvent]
    next_after: int | None
    """What to give as ?after= for the rest; null when there is none."""


class BatchDocument(Answer):
    """A document of a batch."""

    number: int
    """In the order of the batch, from 1."""
    file_path: str
    document_id: str
    state: Literal["pending", "done", "failed"]
    """pending: not ended yet, or to be tried again in the next attempt."""
    reason: str | None
    """Completed, Unchanged, Superseded, Duplicate; or of its last error."""
    message: str | None
    version: int | None
    chunks: int | None
    attempt: int | None
    """Of the task, that has taken it up last."""
    updated_at: Timestamp


class BatchDocumentPage(Answer):
    """Documents in the order of the batch."""

    items: list[BatchDocument]
    next_after: int | None
    """What to give as ?after= for the rest; null when there is none."""


class FieldProblem(Answer):
    """What is wrong with one field."""

    field: str
    """Its path, such as payload.chunk_size."""
    message: str


class ProblemBody(Answer):
    """A refusal (RFC 9457)."""

    type: str
    """A stable URI; docs/gateway.md explains each."""
    title: str
    status: int
    detail: str
    instance: str | None = None
    """Path of the request."""
    request_id: str | None = None
    """As in the header X-Request-Id and in the gateway's log."""
    errors: list[FieldProblem] = []


class BatchItem(Answer):
    """What has become of one task of a batch."""

    index: int
    """Place in the batch, from 0."""
    status: Literal["accepted", "refused"]
    task: Accepted | None
    problem: ProblemBody | None


class BatchAnswer(Answer):
    """What has become of a batch, in its order."""

    accepted: int
    refused: int
    items: list[BatchItem]


class TicketAnswer(Answer):
    """Stands for the caller's token once, in ?ticket= of a WebSocket or event stream."""

    ticket: str
    expires_at: Timestamp


class CallbacksQuery(BaseModel):
    """Parameters of GET /api/v1/callbacks."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    state: Literal["pending", "delivered", "dead"] = "dead"
    """What has become of them; dead: given up."""
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    """Callbacks of a page."""
    cursor: CursorText | None = None
    """next_cursor of the page before."""


class CallbackView(Answer):
    """The callback of a task."""

    id: str
    """What the receiver is told as webhook-id, the same each time."""
    task_id: str
    namespace: str
    uid: str
    kb_id: str | None
    host: str
    """Host and port of the receiver."""
    state: Literal["pending", "delivered", "dead"]
    attempts: int
    """Deliveries that were tried."""
    created_at: Timestamp
    last_attempt_at: Timestamp | None
    next_attempt_at: Timestamp | None
    """Of a pending one."""
    finished_at: Timestamp | None
    """When it was delivered or given up."""
    status_code: int | None
    """What the receiver has answered last."""
    message: str | None
    """Why it is not delivered."""


class CallbackPage(Answer):
    """Part of a list, the youngest first."""

    items: list[CallbackView]
    next_cursor: str | None


class Replayed(Answer):
    """A callback that is sent again."""

    task_id: str
    namespace: str
    state: Literal["pending"]


class ComponentState(Answer):
    """Whether a server answers."""

    status: Literal["ok", "down", "off"]
    message: str | None = None


class HealthAnswer(Answer):
    """Whether the gateway can do its work."""

    status: Literal["ok", "degraded", "down"]
    """degraded: tasks are accepted, lists or live progress are not to be had."""
    version: str
    components: dict[str, ComponentState]


class Row(Protocol):
    """A row of PostgreSQL."""

    def __getitem__(self, key: str, /) -> Any: ...


def links_of(name: str, namespace: str) -> dict[str, str]:
    """Return where the parts of a task are."""
    path, query = f"/api/v1/tasks/{name}", f"?namespace={namespace}"
    return {
        "self": path + query,
        **{part: f"{path}/{part}{query}" for part in ("result", "events", "logs", "cancel")},
    }


def accepted(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer to the creation of a task."""
    view = task_view(manifest)
    return {key: view[key] for key in ("id", "task_id", "namespace", "uid", "status")} | {
        "links": links_of(view["id"], view["namespace"])
    }


def live_view(manifest: Mapping[str, Any], latest: ProgressEvent | None = None) -> dict[str, Any]:
    """Return a task that exists; ``latest`` is what Redis has told last, of whichever attempt."""
    view = task_view(manifest)
    if (
        latest is not None
        and latest.uid == view["uid"]
        and view["status"] == "processing"
        and latest.attempt == view["attempt"]
    ):
        view["progress"], view["stage"] = latest.progress, str(latest.stage)
    return view | {"deleted_at": None, "links": links_of(view["id"], view["namespace"])}


def stored_view(row: Row) -> dict[str, Any]:
    """Return a task from its row in ``tasks``."""
    status = {
        "phase": row["phase"],
        "stage": row["stage"],
        "progress": row["progress"],
        "attempt": row["attempt"],
        "queuedAt": _when(row["queued_at"]),
        "startedAt": _when(row["started_at"]),
        "finishedAt": _when(row["finished_at"]),
        "conditions": [{"type": "Ready", "reason": row["reason"], "message": row["message"]}],
        "queue": _json(row["queue"]),
        "result": _json(row["result"]),
        "error": _json(row["error"]),
        "attempts": _json(row["attempts"]),
        "duplicateOf": row["duplicate_of"],
    }
    metadata = {
        "name": row["name"],
        "namespace": row["namespace"],
        "uid": str(row["uid"]),
        "creationTimestamp": _when(row["created_at"]),
    }
    view = task_view({"metadata": metadata, "spec": _json(row["spec"]), "status": status})
    return view | {"deleted_at": _when(row["deleted_at"]), "links": links_of(row["name"], row["namespace"])}


def document_view(row: Row) -> dict[str, Any]:
    """Return a document of a batch from its row in ``batch_documents``."""
    return {name: row[name] for name in BatchDocument.model_fields} | {"updated_at": _when(row["updated_at"])}


def event_view(row: Row) -> dict[str, Any]:
    """Return a transition from its row in ``task_events``."""
    return {
        "type": "task",
        "event": row["number"],
        "task_id": row["name"],
        "namespace": row["namespace"],
        "uid": str(row["task_uid"]),
        "kb_id": row["kb_id"],
        "task_type": row["type"],
        "status": event_status(row["phase"]),
        "attempt": row["attempt"],
        "reason": row["reason"],
        "message": row["message"],
        "at": timestamp(row["at"]),
    }


def callback_view(row: Row) -> dict[str, Any]:
    """Return a callback from its row in ``callbacks``."""
    return {
        "id": row["id"],
        "task_id": row["name"],
        "namespace": row["namespace"],
        "uid": str(row["task_uid"]),
        "kb_id": row["kb_id"],
        "host": row["host"],
        "state": row["state"],
        "attempts": row["attempts"],
        "created_at": timestamp(row["created_at"]),
        "last_attempt_at": _when(row["last_attempt_at"]),
        "next_attempt_at": _when(row["next_at"]),
        "finished_at": _when(row["finished_at"]),
        "status_code": row["status_code"],
        "message": row["error"],
    }


def _when(at: datetime | None) -> str | None:
    return None if at is None else timestamp(at)


def _json(data: str | None) -> Any:
    return None if data is None else orjson.loads(data)


# ---------------------------------------------------------------------------------------------------------------- pages
