"""Sends spans of tasks that have ended, made of their history, to an OpenTelemetry collector (OTLP over HTTP, as JSON).

A task is a span from its creation to its end, below the span of the caller that gave its ``traceparent``; each attempt is a
span below it. Both are what PostgreSQL holds anyway, so nothing is measured for them while tasks run, and no span is lost
with a process: spans go out as events do (:mod:`task_operator.cloud_events`), after the end was stored, and again if nobody
knows whether they have arrived. Their ids follow from the uid of the task, so one that comes twice is the same span, and a
callback can name the span of its task before that was sent.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import aiohttp
import orjson
import structlog

from task_operator.cloud_events import Event, SinkUnavailable
from task_operator.projection import DatabaseUnavailable
from task_operator.spans import Sampler, attributes_of, spans_of
from task_operator.transitions import ENDS

_log = structlog.get_logger(__name__)

_TIMEOUT: Final = 10.0  # seconds
_AGAIN: Final = frozenset({429, 502, 503, 504})
"""Answers after which OTLP has the same spans sent again; any other refusal is for good."""

_TASKS: Final = (
    "SELECT uid::text, namespace, name, kb_id, type, priority, phase, reason, message, attempt, created_at, "
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
        self._resource = {"attributes": attributes_of(resource)}
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
