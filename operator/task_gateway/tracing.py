"""The trace that a request belongs to, for the tasks that it creates."""

from collections.abc import Mapping
from contextvars import ContextVar

import structlog

from task_contract.names import TRACEPARENT_ANNOTATION
from task_contract.tracing import trace_id

_current: ContextVar[str | None] = ContextVar("traceparent", default=None)


def begin(headers: Mapping[str, str]) -> None:
    """Take the ``traceparent`` of a request; one that is none is as if it were not there, as the standard wants it."""
    given = headers.get("traceparent")
    known = trace_id(given)
    _current.set(given if known else None)
    if known:
        structlog.contextvars.bind_contextvars(trace_id=known)


def annotations() -> dict[str, str]:
    """Return what a task that is created for the current request says of its trace."""
    given = _current.get()
    return {} if given is None else {TRACEPARENT_ANNOTATION: given}
