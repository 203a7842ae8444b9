"""Databases of their own on a PostgreSQL that is up."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from task_operator.schema import migrate

_PATIENCE = 30.0  # seconds


@contextlib.contextmanager
def fresh_database(server: str, *, prefix: str) -> Iterator[str]:
    """Yield the URL of a new database with the tables in it; dropped after, also with connections to it."""
    name = f"{prefix}_{uuid.uuid4().hex[:12]}"
    url = urlunsplit(urlsplit(server)._replace(path=f"/{name}"))

    async def execute(statement: str) -> None:
        connection = await asyncpg.connect(server)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(execute(f"CREATE DATABASE {name}"))
    try:
        assert asyncio.run(migrate(url)) > 0
        yield url
    finally:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                asyncio.run(execute(f"DROP DATABASE {name} WITH (FORCE)"))
                break
            except asyncpg.InsufficientPrivilegeError:  # the server's own autovacuum is at work in it: not for long
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
