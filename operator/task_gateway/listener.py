"""The connection that listens to ``task_events``: PostgreSQL says when there are events, and is asked for them here too.

It is the one connection of the process that is no part of the pool: what is listened for belongs to a session.
"""

import asyncio
import contextlib
from typing import Any, Final

import asyncpg

from task_contract.names import EVENTS_NOTIFICATION
from task_gateway.hub import Event, SourceUnavailable

_TIMEOUT: Final = 10.0  # seconds to connect, and for a statement
EVENT_COLUMNS: Final = "number, task_uid::text AS uid, namespace, name, kb_id, type, phase, attempt, reason, message, at"
_AFTER: Final = f"SELECT {EVENT_COLUMNS} FROM task_events WHERE number > $1 ORDER BY number LIMIT $2"  # noqa: S608 - a constant
_HEAD: Final = "SELECT coalesce(max(number), 0) FROM task_events"
_RUNNING: Final = (
    f"SELECT {', '.join('last.' + part for part in ('number', 'uid', 'namespace', 'name', 'kb_id', 'type', 'phase'))}, "  # noqa: S608 - names of ours; values are parameters
    "last.attempt, last.reason, last.message, last.at FROM tasks "
    f"CROSS JOIN LATERAL (SELECT {EVENT_COLUMNS} FROM task_events WHERE task_uid = tasks.uid ORDER BY number DESC LIMIT 1) "
    "AS last WHERE tasks.phase = 'Processing' AND tasks.finished_at IS NULL AND tasks.deleted_at IS NULL "
    "AND last.phase = 'Processing' ORDER BY tasks.created_at DESC LIMIT $1"
)


def event_of(row: Any) -> Event:
    """Return a row of :data:`EVENT_COLUMNS` as an event."""
    return Event(*row)


class Listener:
    """An :class:`~task_gateway.hub.EventSource` on PostgreSQL."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: asyncpg.Connection[Any] | None = None
        self._heard = asyncio.Event()

    async def connect(self) -> None:
        """Connect anew and listen; what is said from now on is heard."""
        await self.aclose()
        try:
            async with asyncio.timeout(_TIMEOUT):
                connection = await asyncpg.connect(self._url, timeout=_TIMEOUT, command_timeout=_TIMEOUT)
                self._connection = connection
                connection.add_termination_listener(self._wake)
                await connection.add_listener(EVENTS_NOTIFICATION, self._wake)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise SourceUnavailable(f"cannot listen to events: {error!r}; is PostgreSQL reachable?") from error

    def _wake(self, *_: object) -> None:
        self._heard.set()

    async def heard(self, *, timeout: float) -> None:  # noqa: ASYNC109 - it is no error that nothing came
        """Wait until PostgreSQL says that there are events, or so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._heard.wait()
        self._heard.clear()
        if self._connection is None or self._connection.is_closed():
            raise SourceUnavailable("cannot listen to events: the connection was lost; it is made again")

    async def after(self, number: int, *, limit: int) -> list[Event]:
        """Return the events with higher numbers, the lowest first."""
        return [event_of(row) for row in await self._ask("fetch", _AFTER, number, limit)]

    async def head(self) -> int:
        """Return the highest number; 0 when there is none."""
        return int(await self._ask("fetchval", _HEAD))

    async def running(self, *, limit: int) -> tuple[int, list[Event]]:
        """Return the highest number and, of the same moment, the last events of tasks that run, of the youngest first."""
        connection = self._connection
        if connection is None:
            raise SourceUnavailable("cannot read events: not connected")
        try:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                head = int(await connection.fetchval(_HEAD))
                return head, [event_of(row) for row in await connection.fetch(_RUNNING, limit)]
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise _unavailable(error) from error

    async def aclose(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            try:
                await connection.close(timeout=1)
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
                connection.terminate()

    async def _ask(self, method: str, statement: str, *values: object) -> Any:
        if self._connection is None:
            raise SourceUnavailable("cannot read events: not connected")
        try:
            return await getattr(self._connection, method)(statement, *values)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise _unavailable(error) from error


def _unavailable(error: Exception) -> SourceUnavailable:
    remedy = '; run "python -m task_operator migrate"' if isinstance(error, asyncpg.UndefinedTableError) else ""
    return SourceUnavailable(f"cannot read events: {error!r}{remedy}")
