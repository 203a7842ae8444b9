"""What can go wrong for a caller, as one small tree. A message starts with what could not be done and ends with the remedy.

::

    ClientError
    ├── ServiceError               a call of another service; knows service, method, path and the status of the answer
    │   ├── ServiceUnavailable     no usable answer: refused, cut off, 5xx; trying later is the cure
    │   │   ├── ServiceTimeout     none in the time that the caller gives
    │   │   └── CircuitOpen        not even tried: the calls before have failed
    │   ├── TooManyRequests        429; `retry_after` in seconds if the service says when
    │   └── ServiceRefused         any other answer that is no success: the call itself has to change
    ├── TaskClientError            something about a task; the same classes over REST and over the Kubernetes API
    │   ├── TaskRefused            not valid; `fields` name what is wrong
    │   │   └── TaskForbidden      who calls may not do that
    │   ├── TaskConflict           there is another task of this name or key
    │   ├── TaskNotFound
    │   ├── TaskTimeout            it has not ended in time; it goes on
    │   ├── TaskNotFinished        it has no result yet
    │   ├── TaskFailed             it has ended otherwise than Completed; `task` says how
    │   └── TaskUnavailable        no usable answer; what was asked may have happened
    └── CallbackRefused            a callback that is not to be believed, or cannot be read
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service_client.views import Task


@dataclass(frozen=True, slots=True)
class FieldError:
    """What is wrong with one field; ``field`` is its path, such as ``payload.chunk_size``."""

    field: str
    message: str


@dataclass(frozen=True, slots=True)
class Problem:
    """What a service says about its refusal (RFC 9457), or as much of it as there was."""

    type: str = "about:blank"
    title: str = ""
    detail: str = ""
    request_id: str | None = None
    errors: tuple[FieldError, ...] = ()

    @classmethod
    def parse(cls, content_type: str, body: bytes) -> "Problem":
        """Read the body of a refusal. Anything that is no problem becomes its first 300 characters as detail."""
        try:
            given = json.loads(body) if "json" in content_type else None
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, Mapping):
            return cls(detail=body[:300].decode(errors="replace").strip())
        # Other services answer {"detail": …} or {"message": …} or {"error": …}; FastAPI's detail may be a list.
        words = next((given[key] for key in ("detail", "message", "error") if given.get(key)), "")
        listed = given.get("errors")
        errors = [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []
        return cls(
            type=str(given.get("type") or "about:blank"),
            title=str(given.get("title") or ""),
            detail=words if isinstance(words, str) else json.dumps(words, ensure_ascii=False)[:300],
            request_id=None if given.get("request_id") is None else str(given["request_id"]),
            errors=tuple(FieldError(str(one.get("field", "")), str(one.get("message", ""))) for one in errors),
        )


class ClientError(Exception):
    """Base of the tree."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ServiceError(ClientError):
    """A call of another service did not succeed."""

    def __init__(
        self,
        why: str,
        *,
        service: str,
        method: str,
        path: str,
        status: int | None = None,
        problem: Problem | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"cannot {method} {path} of {service}: {why}")
        self.service = service
        self.method = method
        self.path = path
        self.status = status
        """Of the answer; None when there was none."""
        self.problem = problem
        """What the service says about its refusal."""
        self.retry_after = retry_after
        """Seconds that it asks to wait."""


class ServiceUnavailable(ServiceError):
    """No usable answer. Unless the message says that nothing was sent, the service may have done what it was asked."""


class ServiceTimeout(ServiceUnavailable):
    """No answer in the time that the caller gives."""


class CircuitOpen(ServiceUnavailable):
    """Not tried: the calls before have failed. ``retry_after`` says when the next one is."""


class TooManyRequests(ServiceError):
    """The service asks for fewer calls."""


class ServiceRefused(ServiceError):
    """The service has answered, and not with success: the call itself has to change."""


class TaskClientError(ClientError):
    """Something about a task could not be done."""

    def __init__(self, message: str, *, fields: tuple[FieldError, ...] = (), retry_after: float | None = None) -> None:
        super().__init__(message)
        self.fields = fields
        """What is wrong, field by field, where that is known."""
        self.retry_after = retry_after
        """Seconds that the other side asks to wait."""


class TaskRefused(TaskClientError):
    """The task is not valid, or the caller may not create it; the message names the field."""


class TaskForbidden(TaskRefused):
    """Whoever calls is not known, or lacks the right."""


class TaskConflict(TaskClientError):
    """A task of this name or idempotency key exists and is another one."""


class TaskNotFound(TaskClientError):
    """No task of this name."""


class TaskTimeout(TaskClientError):
    """The task did not finish in time. It goes on; wait again or cancel it."""


class TaskNotFinished(TaskClientError):
    """The task has no result yet."""


class TaskFailed(TaskClientError):
    """The task has ended as failed or canceled."""

    def __init__(self, message: str, *, task: "Task") -> None:
        super().__init__(message)
        self.task = task


class TaskUnavailable(TaskClientError):
    """No usable answer. What was asked for may have happened: repeat it with the same idempotency key."""


class CallbackRefused(ClientError):
    """A callback that is not to be believed, or cannot be read. ``status`` is what to answer over HTTP."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status
