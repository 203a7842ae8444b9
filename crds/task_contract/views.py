"""A task as services see it: in REST, WebSocket, callbacks and events. snake_case and lower-case states, not camelCase.

The names are those of the platform's own services (``task_id``, ``task_type``, ``completed_at``).
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from pydantic.alias_generators import to_snake

from task_contract.models import Phase

_FREE_FORM: Final = frozenset({"metadata", "seconds"})
"""Fields of payload and result whose keys are data, not names of ours."""


_snake: Final = lru_cache(maxsize=1024)(to_snake)
"""The names are few and each takes some microseconds: of a page of tasks they would be most of the time."""


def snake_case(value: Any) -> Any:
    """Return JSON with the names of all fields in snake_case; keys that are data stay as they are.

    >>> snake_case({"filePath": "a.pdf", "metadata": {"signedBy": "Ada"}})
    {'file_path': 'a.pdf', 'metadata': {'signedBy': 'Ada'}}
    """
    if isinstance(value, Mapping):
        return {_snake(key): item if key in _FREE_FORM else snake_case(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [snake_case(item) for item in value]
    return value


def timestamp(at: datetime) -> str:
    """Return a time as the wire has it: UTC, RFC 3339, whole seconds.

    >>> timestamp(datetime(2026, 1, 31, 9, 30, tzinfo=UTC))
    '2026-01-31T09:30:00Z'
    """
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def status_word(phase: str) -> str:
    """Return the state of a task as services write it: the phase in lower case."""
    return phase.lower()


def event_status(phase: str) -> str:
    """Return the state that a row of ``task_events`` tells of.

    A task that was deleted before it had ended (phase Deleted) is canceled: nothing of it will be published.
    """
    return status_word(Phase.CANCELED if phase == "Deleted" else phase)


def percent(phase: str, progress: int | None) -> int:
    """Return how far a task is in percent: 0 before it runs, 100 once it is Completed."""
    if phase == Phase.COMPLETED:
        return 100
    return 0 if phase == Phase.QUEUED or progress is None else progress


def task_view(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task from its manifest, as the API server hands it back. Fields without a value are None.

    ``id`` and ``task_id`` are the name of the resource, unique within its namespace among the tasks that exist.
    """
    metadata: Mapping[str, Any] = manifest["metadata"]
    spec: Mapping[str, Any] = manifest.get("spec") or {}
    status: Mapping[str, Any] = manifest.get("status") or {}
    phase = str(status.get("phase") or Phase.QUEUED)
    ready: Mapping[str, Any] = next((one for one in status.get("conditions") or () if one.get("type") == "Ready"), {})
    return {
        "id": metadata["name"],
        "task_id": metadata["name"],
        "namespace": metadata["namespace"],
        "uid": metadata["uid"],
        "task_type": spec.get("type"),
        "kb_id": spec.get("kbId"),
        "priority": spec.get("priority") or "normal",
        "status": status_word(phase),
        "stage": status.get("stage"),
        "progress": percent(phase, status.get("progress")),
        "attempt": status.get("attempt") or 0,
        "created_at": metadata.get("creationTimestamp"),
        "queued_at": status.get("queuedAt"),
        "started_at": status.get("startedAt"),
        "completed_at": status.get("finishedAt"),
        "reason": ready.get("reason"),
        "message": ready.get("message") or None,
        "queue": snake_case(status.get("queue")),
        "result": snake_case(status.get("result")),
        "error": snake_case(status.get("error")),
        "attempts": snake_case(status.get("attempts") or []),
        "duplicate_of": status.get("duplicateOf"),
        "payload": snake_case(spec.get("payload") or {}),
        "labels": dict(metadata.get("labels") or {}),
        "callback": _delivery(status.get("callback")),
    }


def _delivery(callback: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what has become of a callback; its states are in lower case as those of tasks."""
    if callback is None:
        return None
    view: dict[str, Any] = snake_case(callback)
    return view | ({"state": view["state"].lower()} if view.get("state") else {})
