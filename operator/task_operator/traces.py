"""Spans of tasks that have ended, made of their history and sent to an OpenTelemetry collector (OTLP over HTTP, as JSON).

A task is a span from its creation to its end, below the span of the caller that gave its ``traceparent``; each attempt is a
span below it. Both are what PostgreSQL holds anyway, so nothing is measured for them while tasks run, and no span is lost
with a process: spans go out as events do (:mod:`task_operator.cloud_events`), after the end was stored, and again if nobody
knows whether they have arrived. Their ids follow from the uid of the task, so one that comes twice is the same span, and a
callback can name the span of its task before that was sent.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol

import aiohttp
import orjson
import structlog

from task_contract.tracing import parent_id, sampled, trace_id
from task_operator.cloud_events import Event, SinkUnavailable
from task_operator.projection import DatabaseUnavailable
from task_operator.transitions import ENDS

_log = structlog.get_logger(__name__)

_TIMEOUT: Final = 10.0  # seconds
_INTERNAL: Final = 1  # SPAN_KIND_INTERNAL
_OK, _ERROR = 1, 2  # STATUS_CODE_…
_AGAIN: Final = frozenset({429, 502, 503, 504})
"""Answers after which OTLP has the same spans sent again; any other refusal is for good."""
_FAILED: Final = "Failed"
_SUCCEEDED: Final = "Succeeded"

_TASKS: Final = (
    "SELECT uid::text, namespace, name, kb_id, type, priority, phase, reason, message, attempt, created_at, started_at, "
    "coalesce(finished_at, deleted_at, updated_at) AS ended_at, traceparent FROM tasks WHERE uid = ANY($1::uuid[])"
)
_ATTEMPTS: Final = (
    "SELECT task_uid::text, number, job, started_at, finished_at, reason, error FROM attempts "
    "WHERE task_uid = ANY($1::uuid[]) AND started_at IS NOT NULL AND finished_at IS NOT NULL ORDER BY number"
)
_USAGE: Final = (
    "SELECT task_uid::text, attempt, sum(cpu_seconds) AS cpu_seconds, max(memory_peak_bytes) AS memory_peak_bytes, "
    "sum(tokens)::bigint AS tokens FROM task_usage WHERE task_uid = ANY($1::uuid[]) GROUP BY 1, 2"
)


class Database(Protocol):
    """The part of :class:`task_operator.projection.Database` that is used."""

    async def ask(self, work: Any) -> Any: ...  # noqa: D102 - see there


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
    if not valid and not sampler.wants(given, uid=uid):
        return None
    flags = "01" if sampler.wants(given, uid=uid) else "00"
    return f"00-{trace_id(given) or uid.replace('-', '')}-{span_id(uid)}-{flags}"


def spans_of(
    task: Mapping[str, Any], attempts: Sequence[Mapping[str, Any]], usage: Mapping[int, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the spans of a task that has ended, as OTLP's JSON has them.

    ``task`` and ``attempts`` are rows of PostgreSQL; ``usage`` has what attempts have used, by their number.
    """
    uid: str = task["uid"]
    given = task["traceparent"]
    trace = trace_id(given) or uid.replace("-", "")
    common = {"k8s.namespace.name": task["namespace"], "task.name": task["name"], "task.type": task["type"]}
    yield _span(
        trace,
        span_id(uid),
        parent=parent_id(given),
        name=f"task {task['type']}",
        begun=task["created_at"],
        ended=task["ended_at"],
        failed=task["message"] or task["reason"] if task["phase"] == _FAILED else None,
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
        "attributes": _attributes(attributes),
        "status": {"code": _OK} if failed is None else {"code": _ERROR, "message": failed},
    }


def _nanoseconds(at: datetime) -> str:
    return str(round(at.timestamp() * 1e6) * 1000)


def _attributes(values: Mapping[str, Any]) -> list[dict[str, Any]]:
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


class TraceSink:
    """Sends the spans of tasks that have ended to a collector."""

    name = "traces"

    def __init__(
        self,
        database: Database,
        *,
        endpoint: str,
        headers: Mapping[str, str],
        sampler: Sampler,
        instance: str,
        version: str,
    ) -> None:
        """``endpoint``: of OTLP over HTTP, such as ``http://collector:4318``; ``headers``: what it wants to see with it."""
        self._database = database
        self._url = endpoint.rstrip("/") + "/v1/traces"
        self._headers = {**headers, "Content-Type": "application/json"}
        self._sampler = sampler
        resource = {"service.name": "processing-tasks", "service.instance.id": instance, "service.version": version or None}
        self._resource = {"attributes": _attributes(resource)}
        self._session: aiohttp.ClientSession | None = None

    async def put(self, events: Sequence[Event]) -> None:
        """Send the spans of those tasks that the events end. Raises :class:`SinkUnavailable`."""
        uids = [event.uid for event in events if event.phase in ENDS]
        if not uids:
            return
        spans = await self._spans(uids)
        if not spans:
            return
        scope = {"scope": {"name": __name__}, "spans": spans}
        body = {"resourceSpans": [{"resource": self._resource, "scopeSpans": [scope]}]}
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=_TIMEOUT), cookie_jar=aiohttp.DummyCookieJar()
            )
        try:
            async with self._session.post(
                self._url, data=orjson.dumps(body), headers=self._headers, allow_redirects=False
            ) as answer:
                status = answer.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise SinkUnavailable(f"cannot reach {self._url}: {error!r}; is it an OTLP collector's HTTP port?") from error
        if status in _AGAIN:
            raise SinkUnavailable(f"{self._url} answered {status}")
        if not 200 <= status < 300:  # the same spans would be refused again, and hold up all that follow
            _log.error("the collector refuses spans; look at its address and headers", status=status, spans=len(spans))

    async def _spans(self, uids: Sequence[str]) -> list[dict[str, Any]]:
        async def read(connection: Any) -> tuple[Any, Any, Any]:
            return (
                await connection.fetch(_TASKS, uids),
                await connection.fetch(_ATTEMPTS, uids),
                await connection.fetch(_USAGE, uids),
            )

        try:
            tasks, attempts, usage = await self._database.ask(read)
        except DatabaseUnavailable as error:
            raise SinkUnavailable(str(error)) from error
        return [
            span
            for task in tasks
            if self._sampler.wants(task["traceparent"], uid=task["uid"])
            for span in spans_of(
                task,
                [one for one in attempts if one["task_uid"] == task["uid"]],
                {one["attempt"]: one for one in usage if one["task_uid"] == task["uid"]},
            )
        ]

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None
