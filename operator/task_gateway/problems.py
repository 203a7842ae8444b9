"""Refusals as problems (RFC 9457): each has a stable type, a title, and a detail that ends with the remedy.

The table :data:`TITLES` is part of the API: ``docs/gateway.md`` explains every type. What the Kubernetes API or PostgreSQL
refuse is turned into a problem here and nowhere else.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError
from pydantic.alias_generators import to_snake

from task_platform.kubernetes import ClusterError, Conflict, Forbidden, Gone, Invalid, NotFound

CONTENT_TYPE: Final = "application/problem+json"
BASE: Final = "https://tasks.zzdsj.io/problems/"

_DNS_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DNS_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")

TITLES: Final[Mapping[str, str]] = {
    "invalid-request": "The request cannot be read",
    "invalid-task": "The task is not valid",
    "invalid-parameter": "A parameter is not valid",
    "not-authenticated": "No valid token",
    "not-allowed": "The caller lacks the right",
    "namespace-not-served": "This gateway does not serve the namespace",
    "not-found": "No such thing",
    "task-not-found": "No such task",
    "method-not-allowed": "Not with this method",
    "already-exists": "The name or key is taken by another task",
    "not-finished": "The task has not ended",
    "archived": "The task exists in the archive only",
    "no-log": "There is no log",
    "no-vectors": "There are no vectors",
    "no-callback": "The task has no callback",
    "conflict": "Somebody else has written since",
    "too-large": "The body is too large",
    "volume-full": "There is no room for the document",
    "unsupported-media-type": "The body is of another type",
    "too-many-requests": "Too many requests",
    "refused-by-cluster": "The cluster refuses it",
    "unavailable": "Something that is needed does not answer",
    "internal": "A fault of the gateway",
}
"""Every type of problem, without :data:`BASE`."""


@dataclass(frozen=True, slots=True)
class FieldError:
    """What is wrong with one field; ``field`` is a path in the caller's words, such as ``payload.chunk_size``."""

    field: str
    message: str


class Problem(Exception):
    """A refusal. ``kind`` is one of :data:`TITLES`."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        errors: Iterable[FieldError] = (),
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.detail = detail
        self.errors = tuple(errors)
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, -int(-retry_after // 1)))

    def body(self, *, instance: str | None = None, request_id: str | None = None) -> dict[str, Any]:
        """Return the problem as JSON has it."""
        return {
            "type": BASE + self.kind,
            "title": TITLES[self.kind],
            "status": self.status,
            "detail": self.detail,
            **({} if instance is None else {"instance": instance}),
            **({} if request_id is None else {"request_id": request_id}),
            **({"errors": [{"field": one.field, "message": one.message} for one in self.errors]} if self.errors else {}),
        }


def is_namespace(name: str) -> bool:
    """Whether a namespace may have this name (RFC 1123 label)."""
    return _DNS_LABEL.fullmatch(name) is not None


def is_task_name(name: str) -> bool:
    """Whether a task may have this name (RFC 1123 subdomain)."""
    return len(name) <= 253 and _DNS_NAME.fullmatch(name) is not None


def of_validation(error: ValidationError, *, kind: str, what: str, rename: Mapping[str, str] | None = None) -> Problem:
    """Return what pydantic has found; ``rename`` gives first parts of paths their name on the wire."""
    errors = field_errors(error, rename=rename)
    shown = "; ".join(f"{one.field}: {one.message}" for one in errors[:3])
    return Problem(422, kind, f"{what}: {shown}", errors=errors)


def field_errors(error: ValidationError, *, rename: Mapping[str, str] | None = None) -> list[FieldError]:
    """Return the bad fields of a model, at most 50; paths are dotted."""
    found = []
    for problem in error.errors(include_url=False, include_input=False, include_context=False)[:50]:
        first, *rest = [str(part) for part in problem["loc"] if part != "[key]"] or [""]
        path = ".".join([(rename or {}).get(first, first), *rest])
        found.append(FieldError(_printable(path), _printable(_message(problem["type"], problem["msg"]))))
    return found


def _message(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "is no field of it; take it out"
    if kind == "missing":
        return "is required"
    return message.removeprefix("Value error, ")


def _printable(text: str) -> str:
    """Return text that may hold a caller's bytes as it may stand in an answer: valid Unicode, and not too long."""
    return text.encode("utf-8", "replace").decode()[:500]


def wire_field(path: str) -> str:
    """Return the path of a field of the resource in the words of REST.

    >>> wire_field("spec.payload.chunkSize")
    'payload.chunk_size'
    """
    parts = [to_snake(part) for part in path.removeprefix("spec.").split(".")]
    return ".".join(["task_type" if parts[0] == "type" else parts[0], *parts[1:]])


def _wire_message(message: str) -> tuple[str | None, str]:
    """Split a message of our CEL rules, ``spec.payload.chunkSize: must …``, into the field and what is wrong with it."""
    match = re.search(r"\bspec((?:\.[A-Za-z]+)*): (.+)$", message, re.DOTALL)
    if match is None:
        return None, message
    return wire_field("spec" + match.group(1)), _CAMEL.sub(lambda word: to_snake(word.group()), match.group(2))


_CAMEL: Final = re.compile(r"\b[a-z]+(?:[A-Z][a-z]+)+\b")
"""Names of fields in our own messages."""


def of_cluster(error: ClusterError, *, what: str) -> Problem:
    """Return what the API server's refusal means for the caller; ``what`` says what could not be done."""
    match error:
        case NotFound():
            return Problem(404, "task-not-found", f"{what}: {error.answer or 'it is not there'}")
        case Invalid():
            errors = _causes(error.causes, error.answer)
            shown = "; ".join(f"{one.field}: {one.message}" for one in errors[:3])
            status = 413 if error.status == 413 else 422
            return Problem(status, "too-large" if status == 413 else "invalid-task", f"{what}: {shown}", errors=errors)
        case Conflict() | Gone():
            return Problem(409, "conflict", f"{what}: {error.answer}; read it again and repeat")
        case Forbidden():
            return Problem(403, "refused-by-cluster", f"{what}: {error.answer}")
        case _:
            wait = 1.0 if error.retry_after is None else error.retry_after
            return Problem(
                503,
                "unavailable",
                f"{what}: the Kubernetes API does not answer; repeat the request, with an idempotency_key it is safe",
                retry_after=wait,
            )


@contextlib.contextmanager
def refused(what: str, *, but: type[ClusterError] | tuple[type[ClusterError], ...] = ()) -> Iterator[None]:
    """Raise :func:`of_cluster` of what the API server refuses within the block, except ``but``."""
    try:
        yield
    except but:
        raise
    except ClusterError as error:
        raise of_cluster(error, what=what) from error


def _causes(causes: Sequence[tuple[str, str]], answer: str) -> list[FieldError]:
    found = []
    for path, message in causes[:50]:
        named, text = _wire_message(message)
        found.append(FieldError(named or wire_field(path), text))
    if not found:
        named, text = _wire_message(answer)
        found.append(FieldError(named or "spec", text))
    return found
