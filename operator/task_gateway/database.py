"""PostgreSQL as the gateway uses it: lists and history as the operator has written them, and tickets. The only file of it
that speaks to PostgreSQL.

Nothing connects before it is needed: a gateway starts without its database, and accepts tasks without it.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import asyncpg

from task_contract.models import Phase, Priority, TaskType

_CONNECTIONS: Final = 8
_CONNECT_TIMEOUT: Final = 5.0  # seconds
_COMMAND_TIMEOUT: Final = 10.0  # seconds

_COLUMNS: Final = (
    "uid, namespace, name, spec, phase, stage, progress, attempt, queued_at, started_at, finished_at, created_at, "
    "deleted_at, reason, message, queue, result, error, attempts, duplicate_of"
)


class DatabaseUnavailable(Exception):
    """PostgreSQL cannot be used at the moment."""


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tasks a list has. None: any."""

    kb_id: str | None = None
    task_type: TaskType | None = None
    phase: Phase | None = None
    priority: Priority | None = None
    created_after: datetime | None = None
    """Inclusive."""
    created_before: datetime | None = None
    """Exclusive."""


class Database:
    """The gateway's side of PostgreSQL. Every method raises :class:`DatabaseUnavailable`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def warm_up(self) -> None:
        """Prepare the pool; nothing is connected yet."""
        self._pool = asyncpg.create_pool(
            self._url,
            min_size=0,
            max_size=_CONNECTIONS,
            timeout=_CONNECT_TIMEOUT,
            command_timeout=_COMMAND_TIMEOUT,
            server_settings={"application_name": "processing-tasks-gateway"},
        )
        await self._pool  # with min_size 0 this connects to nothing

    async def aclose(self) -> None:
        """Close all connections."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None

    async def rows(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        """Return what a statement finds."""
        if self._pool is None:
            raise RuntimeError("the database is used before warm_up()")
        try:
            async with self._pool.acquire(timeout=_CONNECT_TIMEOUT) as connection:
                return await connection.fetch(statement, *values)
        except (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError) as error:
            raise DatabaseUnavailable(f"cannot ask PostgreSQL: {error!r}") from error
        except (
            asyncpg.UndefinedTableError,
            asyncpg.UndefinedColumnError,
            asyncpg.InvalidPasswordError,
            asyncpg.InvalidCatalogNameError,
            asyncpg.OperatorInterventionError,
            asyncpg.InsufficientResourcesError,
            asyncpg.InsufficientPrivilegeError,
        ) as error:
            raise DatabaseUnavailable(f"cannot ask PostgreSQL: {error}; was it migrated?") from error

    async def ping(self) -> None:
        """Ask for something small."""
        await self.rows("SELECT 1")

    # ---------------------------------------------------------------------------------------------------------- history

    async def task(self, namespace: str, name: str) -> asyncpg.Record | None:
        """Return the row of the youngest task of that name, whether it exists or not."""
        found = await self.rows(
            f"SELECT {_COLUMNS} FROM tasks WHERE namespace = $1 AND name = $2 ORDER BY created_at DESC LIMIT 1",  # noqa: S608
            namespace,
            name,
        )
        return found[0] if found else None

    # ---------------------------------------------------------------------------------------------------------- tickets

    async def put_ticket(self, digest: bytes, caller: str, *, expires_at: datetime) -> None:
        """Keep a ticket; those that have expired go at the same time."""
        await self.rows(
            "WITH gone AS (DELETE FROM gateway_tickets WHERE expires_at < now()) "
            "INSERT INTO gateway_tickets (digest, caller, expires_at) VALUES ($1, $2, $3)",
            digest,
            caller,
            expires_at,
        )

    async def take_ticket(self, digest: bytes) -> str | None:
        """Return the caller of a ticket and forget it; None for one that is used, or too old."""
        found = await self.rows(
            "DELETE FROM gateway_tickets WHERE digest = $1 RETURNING caller, expires_at > now() AS valid", digest
        )
        return str(found[0]["caller"]) if found and found[0]["valid"] else None
