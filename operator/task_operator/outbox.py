"""The outbox in PostgreSQL as its senders use it: callbacks that are due, and wake-up calls.

What is in it was written by :mod:`task_operator.projection`, with the end of the task. A callback is taken under a lease:
whoever dies over one leaves it to others when that ends, so each is sent at least once, and by two at once only when a lease
has run out. What became of it is written with the lease as condition.
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

import asyncpg
import structlog

_log = structlog.get_logger(__name__)

_MAX_BACKOFF: Final = 30.0  # seconds
_PING: Final = 15.0  # seconds between two looks whether a connection that only listens is still there


class Database(Protocol):
    """The part of :class:`task_operator.projection.Database` that is used."""

    async def ask(self, work: Callable[[Any], Any]) -> Any: ...  # noqa: D102 - see there


@dataclass(frozen=True, slots=True)
class Callback:
    """A callback that this process has the lease of."""

    id: str
    task_uid: str
    namespace: str
    name: str
    url: str
    host: str
    secret_name: str | None
    secret_key: str | None
    body: str
    attempts: int
    """Deliveries that were tried before."""
    first_attempt_at: datetime | None
    lease: uuid.UUID
    traceparent: str | None = None
    """That the task was given."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """What becomes of a callback after a delivery was tried."""

    state: str
    """pending, delivered or dead."""
    error: str | None = None
    status_code: int | None = None
    after: timedelta = timedelta()
    """How long a pending one waits."""


@dataclass(frozen=True, slots=True)
class Told:
    """What ``status.callback`` of a task is to say."""

    id: str
    task_uid: str
    namespace: str
    name: str
    state: str
    attempts: int
    last_attempt_at: datetime | None
    status_code: int | None
    error: str | None


_DUE: Final = "SELECT EXISTS (SELECT FROM callbacks WHERE state = 'pending' AND next_at <= now())"
# So many of a host, those that are in delivery included; of one host the oldest first.
_CLAIM: Final = (
    "WITH due AS (SELECT found.id FROM "
    "(SELECT DISTINCT host FROM callbacks WHERE state = 'pending' AND next_at <= now()) AS of "
    "LEFT JOIN unnest($1::text[], $2::int[]) AS busy (host, number) USING (host), "
    "LATERAL (SELECT id, next_at FROM callbacks AS one WHERE state = 'pending' AND next_at <= now() AND one.host = of.host "
    "ORDER BY next_at LIMIT greatest(0, $3::int - coalesce(busy.number, 0)) FOR UPDATE SKIP LOCKED) AS found "
    "ORDER BY found.next_at LIMIT $4) "
    "UPDATE callbacks SET lease = $5, next_at = now() + $6 FROM due WHERE callbacks.id = due.id "
    "RETURNING callbacks.id, task_uid::text, namespace, name, url, host, secret_name, secret_key, body, attempts, "
    "first_attempt_at, lease, (SELECT traceparent FROM tasks WHERE tasks.uid = callbacks.task_uid) AS traceparent"
)
_SETTLE: Final = (
    "UPDATE callbacks SET state = $3, attempts = attempts + 1, error = $4, status_code = $5, "
    "next_at = CASE WHEN $3 = 'pending' THEN now() + $6 ELSE next_at END, lease = NULL, last_attempt_at = now(), "
    "first_attempt_at = coalesce(first_attempt_at, now()), "
    "finished_at = CASE WHEN $3 = 'pending' THEN NULL ELSE now() END "
    # One that was delivered is, also when the lease was lost meanwhile.
    "WHERE id = $1 AND state = 'pending' AND (lease = $2 OR $3 = 'delivered')"
)
_RELEASE: Final = "UPDATE callbacks SET lease = NULL, next_at = now() WHERE state = 'pending' AND lease = ANY($1::uuid[])"
_UNTOLD: Final = (
    "SELECT id, task_uid::text, namespace, name, state, attempts, last_attempt_at, status_code, error FROM callbacks "
    "WHERE told_state IS DISTINCT FROM state AND last_attempt_at IS NOT NULL ORDER BY last_attempt_at LIMIT $1"
)
_TOLD: Final = "UPDATE callbacks SET told_state = $2 WHERE id = $1"
_COUNTS: Final = (
    "SELECT state, count(*) AS number, min(created_at) AS oldest FROM callbacks WHERE state <> 'delivered' GROUP BY state"
)
LIST: Final = (
    "SELECT namespace, name, state, attempts, last_attempt_at, status_code, url, error FROM callbacks "
    "WHERE state = $1 AND (namespace = $2 OR $2 IS NULL) ORDER BY created_at DESC LIMIT $3"
)
"""Callbacks in a state, the youngest first: $2 bounds them to a namespace, or is null."""


class Outbox:
    """Callbacks on their way out. Methods raise :class:`task_operator.projection.DatabaseUnavailable`."""

    def __init__(self, database: Database, *, lease: timedelta) -> None:
        """``lease``: longer than a delivery can take."""
        self._database = database
        self._lease = lease

    async def claim(self, *, most: int, per_host: int, busy: Mapping[str, int]) -> list[Callback]:
        """Take callbacks that are due, ``per_host`` of one host less those that are ``busy``, the oldest first."""
        arguments = (list(busy), list(busy.values()), per_host, most, uuid.uuid4(), self._lease)

        async def work(connection: "asyncpg.Connection[asyncpg.Record]") -> list[asyncpg.Record]:
            # Mostly there is none, and then nothing is written.
            return await connection.fetch(_CLAIM, *arguments) if await connection.fetchval(_DUE) else []

        return [Callback(**row) for row in await self._database.ask(work)]

    async def settle(self, callback: Callback, settlement: Settlement) -> bool:
        """Write what became of a delivery; False if somebody else has the callback by now."""
        arguments = (
            callback.id,
            callback.lease,
            settlement.state,
            settlement.error,
            settlement.status_code,
            settlement.after,
        )
        done = await self._database.ask(lambda connection: connection.execute(_SETTLE, *arguments))
        return bool(done != "UPDATE 0")

    async def release(self, callbacks: Sequence[Callback]) -> None:
        """Give callbacks back that were not sent to the end: others may take them at once."""
        leases = [callback.lease for callback in callbacks]
        await self._database.ask(lambda connection: connection.execute(_RELEASE, leases))

    async def untold(self, *, most: int) -> list[Told]:
        """Return callbacks whose task does not say yet what became of them: first failures, and changes of state."""
        rows = await self._database.ask(lambda connection: connection.fetch(_UNTOLD, most))
        return [Told(**row) for row in rows]

    async def told(self, callback: Told) -> None:
        """Note that the task says it."""
        await self._database.ask(lambda connection: connection.execute(_TOLD, callback.id, callback.state))

    async def counts(self, *, now: datetime) -> dict[str, tuple[int, float]]:
        """Return how many callbacks are pending and dead, and the age of the oldest of each in seconds."""
        rows = await self._database.ask(lambda connection: connection.fetch(_COUNTS))
        return {row["state"]: (row["number"], (now - row["oldest"]).total_seconds()) for row in rows}


class Listener:
    """Hears what PostgreSQL notifies, on a connection of its own; comes back after every loss of it."""

    def __init__(self, url: str, wakes: Mapping[str, Callable[[], None]]) -> None:
        """``wakes``: whom to call, by channel; and once when the connection is made, for what was missed before."""
        self._url = url
        self._wakes = wakes

    async def run(self) -> None:
        """Listen until cancelled."""
        wait = 1.0
        while True:
            try:
                connection = await asyncpg.connect(self._url, timeout=10, command_timeout=10)
            except (OSError, TimeoutError, asyncpg.PostgresError) as error:
                _log.warning("cannot listen to PostgreSQL; looking now and then instead", error=repr(error))
                await asyncio.sleep(wait)
                wait = min(2 * wait, _MAX_BACKOFF)
                continue
            wait = 1.0
            try:
                await self._listen(connection)
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                _log.warning("lost the connection that listens to PostgreSQL", error=repr(error))
            finally:
                connection.terminate()
            await asyncio.sleep(wait)

    async def _listen(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        for channel, wake in self._wakes.items():
            await connection.add_listener(channel, _calling(wake))
            wake()
        while True:
            await asyncio.sleep(_PING)
            await connection.execute("SELECT 1")


def _calling(wake: Callable[[], None]) -> Callable[..., None]:
    return lambda *_: wake()
