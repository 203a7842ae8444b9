"""The PostgreSQL schema as ordered SQL files, and the function that brings a database up to date.

The tables are a contract as the CRD is: the operator projects into ``tasks``, the runner writes ``task_results`` and the
ledger, the operator raises ``task_fences``. The driver comes in as a protocol, so that this package imports none.
"""

from contextlib import AbstractAsyncContextManager
from importlib import resources
from typing import Any, Final, Protocol

_ADVISORY_LOCK: Final = 0x7074_6D69_6772_6174
"""Key of the advisory lock that lets one process migrate at a time: "ptmigrat" in ASCII."""


class Connection(Protocol):
    """The part of ``asyncpg.Connection`` that is used."""

    async def execute(self, query: str, *args: Any) -> str:
        """Run one statement, or several without arguments."""

    async def fetchval(self, query: str, *args: Any) -> Any:
        """Run a query and return its first value."""

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        """Open a transaction."""


def migrations() -> list[tuple[int, str]]:
    """Return the migrations as (number, SQL), in order. File names start with the number: ``0001_initial.sql``."""
    folder = resources.files("task_contract").joinpath("migrations")
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".sql")), key=lambda entry: entry.name)
    return [(int(entry.name.split("_", 1)[0]), entry.read_text()) for entry in files]


async def migrate(connection: Connection) -> int:
    """Bring the database up to date; return how many migrations were applied. May run twice, and in two processes at once.

    One transaction under an advisory lock: a process that dies half way leaves the schema as it was.
    """
    applied = 0
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _ADVISORY_LOCK)
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations"
            " (version integer PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        current = await connection.fetchval("SELECT coalesce(max(version), 0) FROM schema_migrations")
        for version, sql in migrations():
            if version > current:
                await connection.execute(sql)
                await connection.execute("INSERT INTO schema_migrations (version) VALUES ($1)", version)
                applied += 1
    return applied
