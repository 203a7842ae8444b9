"""Tasks and their attempts as spans, made of what PostgreSQL holds of them when they have ended. Pure functions."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import orjson

from task_contract.models import Phase
from task_contract.tracing import parent_id, sampled, trace_for, trace_id

_INTERNAL: Final = 1  # SPAN_KIND_INTERNAL
_OK, _ERROR = 1, 2  # STATUS_CODE_…
_SUCCEEDED: Final = "Succeeded"  # reason of an attempt that no other follows


@dataclass(frozen=True, slots=True)
class Sampler:
    """Which tasks have spans: those whose caller's are sampled, and a part of those without a caller."""

    ratio: float = 1.0
    """Of the tasks that nobody gave a ``traceparent``, from 0 to 1."""

    def wants(self, traceparent: str | None, *, uid: str) -> bool:
        """Tell whether a task has spans. The same task always gets the same answer."""
        if trace_id(traceparent) is not None:
            return sampled(traceparent)
        return int(hashlib.sha256(uid.encode()).hexdigest()[:8], 16) < self.ratio * (1 << 32)


def span_id(uid: str, attempt: int | None = None) -> str:
    """Return the id of the span of a task, or of one of its attempts: 16 hexadecimal digits."""
    text = uid if attempt is None else f"{uid}/{attempt}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def traceparent_of(given: str | None, *, uid: str, sampler: Sampler | None) -> str | None:
    """Return the ``traceparent`` of a request that is made for a task that was ``given`` one; None for none.

    The parent is the task's own span. Without spans (``sampler`` None) what was given is handed on as it is.
    """
    valid = trace_id(given) is not None
    if sampler is None:
        return given if valid else None
    wanted = sampler.wants(given, uid=uid)
    return f"00-{trace_for(given, uid=uid)}-{span_id(uid)}-{'01' if wanted else '00'}" if valid or wanted else None


def spans_of(
    task: Mapping[str, Any], attempts: Sequence[Mapping[str, Any]], usage: Mapping[int, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the spans of a task that has ended, as OTLP's JSON has them.

    ``task`` and ``attempts`` are rows of PostgreSQL; ``usage`` has what attempts have used, by their number.
    """
    uid: str = task["uid"]
    given = task["traceparent"]
    trace = trace_for(given, uid=uid)
    common = {"k8s.namespace.name": task["namespace"], "task.name": task["name"], "task.type": task["type"]}
    yield _span(
        trace,
        span_id(uid),
        parent=parent_id(given),
        name=f"task {task['type']}",
        begun=task["created_at"],
        ended=task["ended_at"],
        failed=task["message"] or task["reason"] if task["phase"] == Phase.FAILED else None,
        attributes=common
        | {
            "task.uid": uid,
            "task.kb_id": task["kb_id"],
            "task.priority": task["priority"],
            "task.phase": task["phase"],
            "task.reason": task["reason"],
            "task.attempts": task["attempt"],
        },
    )
    for attempt in attempts:
        number: int = attempt["number"]
        used = usage.get(number, {})
        error = None if attempt["error"] is None else orjson.loads(attempt["error"])
        wrong = None if attempt["reason"] == _SUCCEEDED else (error or {}).get("message") or attempt["reason"]
        yield _span(
            trace,
            span_id(uid, number),
            parent=span_id(uid),
            name=f"attempt {number}",
            begun=attempt["started_at"],
            ended=attempt["finished_at"],
            failed=wrong,
            attributes=common
            | {
                "task.attempt": number,
                "task.reason": attempt["reason"],
                "k8s.job.name": attempt["job"] or None,
                "process.cpu.seconds": used.get("cpu_seconds"),
                "process.memory.peak_bytes": used.get("memory_peak_bytes"),
                "embedding.tokens": used.get("tokens"),
            },
        )


def _span(
    trace: str,
    identity: str,
    *,
    parent: str | None,
    name: str,
    begun: datetime,
    ended: datetime,
    failed: str | None,
    attributes: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "traceId": trace,
        "spanId": identity,
        **({} if parent is None else {"parentSpanId": parent}),
        "name": name,
        "kind": _INTERNAL,
        "startTimeUnixNano": _nanoseconds(begun),
        "endTimeUnixNano": _nanoseconds(max(begun, ended)),  # clocks of node and operator
        "attributes": attributes_of(attributes),
        "status": {"code": _OK} if failed is None else {"code": _ERROR, "message": failed},
    }


def _nanoseconds(at: datetime) -> str:
    return str(round(at.timestamp() * 1e6) * 1000)


def attributes_of(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return attributes with their types; those that are None are left out."""
    found = []
    for key, value in values.items():
        match value:
            case None:
                continue
            case int():
                typed: dict[str, Any] = {"intValue": str(value)}
            case float():
                typed = {"doubleValue": value}
            case _:
                typed = {"stringValue": str(value)}
        found.append({"key": key, "value": typed})
    return found
