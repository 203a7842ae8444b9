"""The tables in PostgreSQL, brought up to date by Alembic.

The statements are the contract's SQL files (``task_contract/migrations``), so that operator, runner and whoever reads the
tables find them in one place; ``versions`` holds a revision for each, in order. Everything is one transaction under an
advisory lock: a process that dies half way leaves the tables as they were, and of two that begin at once one waits.
"""

from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Final

import asyncpg

_ADVISORY_LOCK: Final = 0x7074_6D69_6772_6174
"""Key of the lock that lets one process migrate at a time: "ptmigrat" in ASCII. Release 0.1.0 takes the same."""
_HERE: Final = Path(__file__).parent


async def migrate(url: str) -> int:
    """Bring the database at an address up to date; return how many migrations were applied. May run again at any time.

    Raises OSError, TimeoutError and asyncpg.PostgresError when it cannot be reached.
    """
    # Imported here: the operator itself does without, and SQLAlchemy takes 30 MB of memory.
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    def connect() -> Awaitable[Any]:
        return asyncpg.connect(url, timeout=10)  # which knows what may stand in the address, such as sslmode

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            return await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


def _upgrade(connection: Any) -> int:
    from alembic import command
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext

    configuration = Config()
    configuration.set_main_option("script_location", str(_HERE))
    configuration.attributes["connection"] = connection
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
    context = MigrationContext.configure(connection)
    before = context.get_current_revision()
    if before is None and (before := _of_the_first_release(connection)) is not None:
        command.stamp(configuration, before)
    command.upgrade(configuration, "head")
    after = context.get_current_revision()
    _tell_the_first_release(connection, int(after or 0))
    return int(after or 0) - int(before or 0)


def _of_the_first_release(connection: Any) -> str | None:
    """Return the revision of tables that release 0.1.0 has made: it kept a list of its own."""
    if connection.exec_driver_sql("SELECT to_regclass('schema_migrations')").scalar() is None:
        return None
    version = connection.exec_driver_sql("SELECT max(version) FROM schema_migrations").scalar()
    return None if version is None else f"{version:04}"


def _tell_the_first_release(connection: Any, version: int) -> None:
    """Keep the list of release 0.1.0: after a rollback it must not begin to make the tables."""
    connection.exec_driver_sql(
        "CREATE TABLE IF NOT EXISTS schema_migrations"
        " (version integer PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    connection.exec_driver_sql(
        f"INSERT INTO schema_migrations (version) SELECT generate_series(1, {version}) ON CONFLICT DO NOTHING"
    )


def run(name: str) -> None:
    """Run one of the contract's SQL files, as a revision does."""
    from alembic import op

    from task_contract.migrations import read

    sql = read(name)
    # Past SQLAlchemy, which prepares each statement: the server prepares no more than one at a time.
    driver: Any = op.get_bind().connection.dbapi_connection
    driver.run_async(lambda connection: connection.execute(sql))
