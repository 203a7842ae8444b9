"""Life-cycle events on their way out: each row of ``task_events`` as a CloudEvent, to every sink in the order of numbers.

How far a sink has been told stands in PostgreSQL (``event_cursors``), and moves on after the sink has taken the events: one
that is away for however long is told of all of them when it is back. An event may come twice, with the same id. One operator
at a time publishes to a sink, under an advisory lock on a connection of its own, which it loses with the connection.

Events of one task keep their order, whatever fails: the next one of a task goes out after the one before was taken.
"""

import asyncio
import contextlib
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Protocol

import asyncpg
import orjson
import structlog

from task_contract.names import EVENTS_NOTIFICATION
from task_contract.views import event_status, percent, timestamp
from task_operator.metrics import Metrics

_log = structlog.get_logger(__name__)

TYPE_PREFIX: Final = "io.zzdsj.tasks."
_BATCH: Final = 200
_LOCK: Final = 0x7074_6576  # "ptev" in ASCII: first key of the advisory locks, the second one is of the sink
_LOOK: Final = 5.0  # seconds between two looks when nobody calls: also whether the connection is still there
_TURN: Final = 3.0  # seconds between two tries to become the one that publishes
_MAX_BACKOFF: Final = 15.0  # seconds
_TIMEOUT: Final = 10.0  # seconds of a statement
_ALOUD: Final = "SELECT set_config('idle_session_timeout', '20s', false)"
"""PostgreSQL ends the session of a publisher that was paused, and its lock with it: longer than a sink takes for a round."""

_BEGIN: Final = (  # a sink that is new begins with what happens from now on
    "INSERT INTO event_cursors (sink, number) SELECT $1, coalesce(max(number), 0) FROM task_events ON CONFLICT DO NOTHING"
)
_NEXT: Final = (
    "SELECT number, task_uid::text AS uid, namespace, name, kb_id, type, phase, attempt, reason, message, at, "
    "(SELECT traceparent FROM tasks WHERE tasks.uid = task_uid) AS traceparent "
    "FROM task_events "
    "WHERE number > (SELECT number FROM event_cursors WHERE sink = $1) ORDER BY number LIMIT $2"
)
_ADVANCE: Final = "UPDATE event_cursors SET number = $2, updated_at = now() WHERE sink = $1 AND number < $2"
_BEHIND: Final = "SELECT coalesce((SELECT max(number) FROM task_events), 0) - number FROM event_cursors WHERE sink = $1"


class SinkUnavailable(Exception):
    """A sink has not taken what it was given: it may have, or not, and is given it again."""


class Sink(Protocol):
    """Where events go."""

    name: str
    """Key of its cursor."""

    async def put(self, events: Sequence["Event"]) -> None:
        """Give it events, each of another task; it has taken them all when this returns. Raises :class:`SinkUnavailable`."""

    async def aclose(self) -> None:
        """Close the connection."""


class Event:
    """One event as a sink is given it."""

    __slots__ = ("body", "number", "phase", "routing_key", "uid")

    def __init__(self, row: Mapping[str, Any], *, source: str) -> None:
        """``row``: of ``task_events``."""
        self.number: int = row["number"]
        self.uid: str = row["uid"]
        self.phase: str = row["phase"]
        self.routing_key = f"tasks.{row['namespace']}.{row['type'] or 'unknown'}.{event_status(row['phase'])}"
        self.body: bytes = orjson.dumps(cloud_event(row, source=source))

    @property
    def id(self) -> str:
        """The number as text: unique within the source."""
        return str(self.number)


def event_update(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of ``task_events`` as services see it: the live update of a transition.

    A task that was deleted before it had ended is canceled, for the reason Deleted.
    """
    at: datetime = row["at"]
    return {
        "type": "task",
        "event": row["number"],
        "task_id": row["name"],
        "namespace": row["namespace"],
        "uid": row["uid"],
        "kb_id": row["kb_id"],
        "task_type": row["type"],
        "status": event_status(row["phase"]),
        "progress": percent(row["phase"], None),
        "stage": None,
        "attempt": row["attempt"],
        "reason": row["reason"],
        "message": row["message"],
        "at": timestamp(at),
    }


def cloud_event(row: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Return a row of ``task_events`` as a CloudEvent 1.0 in structured form.

    With the extension for distributed tracing, where the task was given a ``traceparent``.
    """
    data, traceparent = event_update(row), row.get("traceparent")
    return {
        "specversion": "1.0",
        "id": str(row["number"]),
        "source": source,
        "type": f"{TYPE_PREFIX}{data['status']}",
        "subject": f"{row['namespace']}/{row['name']}",
        "time": data["at"],
        "datacontenttype": "application/json",
        **({} if traceparent is None else {"traceparent": traceparent}),
        "data": data,
    }


def rounds(events: Sequence[Event]) -> list[list[Event]]:
    """Return the events in rounds: in each one event of a task at most, and those of a task in their order."""
    told: dict[str, int] = {}
    found: list[list[Event]] = []
    for event in events:
        place = told.get(event.uid, 0)
        told[event.uid] = place + 1
        if place == len(found):
            found.append([])
        found[place].append(event)
    return found


class Publisher:
    """Publishes events to one sink until cancelled, when it is its turn."""

    def __init__(self, url: str, sink: Sink, *, source: str, metrics: Metrics, batch: int = _BATCH) -> None:
        """``url``: of PostgreSQL; ``source``: of the events, one for each installation."""
        self._url = url
        self._sink = sink
        self._source = source
        self._metrics = metrics
        self._batch = batch
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Take a connection, wait for the turn, publish; begin anew whenever something is lost."""
        wait = 1.0
        while True:
            try:
                connection = await asyncpg.connect(self._url, timeout=_TIMEOUT, command_timeout=_TIMEOUT)
                try:
                    await connection.execute(_ALOUD)
                    await self._take_turn(connection)
                    while True:
                        await self._publish(connection)
                        wait = 1.0
                        await self._called(connection)
                finally:
                    connection.terminate()  # and with it the lock
            except SinkUnavailable as error:
                _log.warning("cannot publish events; trying again", sink=self._sink.name, error=str(error), wait=wait)
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                _log.warning("cannot read events in PostgreSQL; trying again", sink=self._sink.name, error=repr(error))
            await asyncio.sleep(wait)
            wait = min(2 * wait, _MAX_BACKOFF)

    async def _take_turn(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        which = zlib.crc32(self._sink.name.encode()) & 0x7FFFFFFF
        while not await connection.fetchval("SELECT pg_try_advisory_lock($1, $2)", _LOCK, which):  # noqa: ASYNC110
            await asyncio.sleep(_TURN)
        await connection.add_listener(EVENTS_NOTIFICATION, lambda *_: self._wake.set())
        await connection.execute(_BEGIN, self._sink.name)

    async def _publish(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        """Publish all that there is."""
        await self._measure(connection)  # first: a sink that is away takes nothing
        while rows := await connection.fetch(_NEXT, self._sink.name, self._batch):
            events = [Event(dict(row), source=self._source) for row in rows]
            for each in rounds(events):
                await self._sink.put(each)
                await connection.execute("SELECT 1")  # whose turn it is not any more stops here
            await connection.execute(_ADVANCE, self._sink.name, events[-1].number)
            self._metrics.events_published.labels(self._sink.name).inc(len(events))
            await self._measure(connection)

    async def _measure(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        self._metrics.events_behind.labels(self._sink.name).set(await connection.fetchval(_BEHIND, self._sink.name))

    async def _called(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        """Wait until there may be more."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK):
                await self._wake.wait()
        self._wake.clear()
        await connection.execute("SELECT 1")

    async def aclose(self) -> None:
        """Close the connection to the sink."""
        await self._sink.aclose()
