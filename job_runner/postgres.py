"""A small pool of connections to PostgreSQL, whose exceptions become ours here."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import asyncpg

from job_runner.usage import asked
from job_runner.watchdog import asking
from task_contract.errors import StoreUnavailable

TIMEOUT: Final = 15.0
"""Seconds for one statement, waiting for locks included."""
_CLOSE_SECONDS: Final = 2.0


class Connected:
    """Who asks PostgreSQL. Construct it cheaply; :meth:`warm_up` connects."""

    def __init__(self, url: str, *, connections: int = 2) -> None:
        """``connections``: most of them at once."""
        self._url = url
        self._most = connections
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._connecting = asyncio.Lock()

    async def warm_up(self) -> None:
        """Connect. Raises StoreUnavailable."""
        async with self._connecting:
            if self._pool is not None:
                return
            with _guarded("connect"):
                self._pool = await asyncpg.create_pool(
                    self._url, min_size=1, max_size=self._most, command_timeout=TIMEOUT, timeout=TIMEOUT, reset=_keep
                )

    async def aclose(self) -> None:
        """Close the connections; a server that does not answer is not waited for."""
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await pool.close()
            except (TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                pool.terminate()

    @contextlib.asynccontextmanager
    async def connection(self, action: str) -> AsyncIterator[Any]:
        """Lend a connection to do what ``action`` says. Raises StoreUnavailable."""
        with asking(), asked("postgresql"):
            await self.warm_up()
            assert self._pool is not None  # noqa: S101 - for the type checker: warm_up() has set it
            with _guarded(action):
                async with self._pool.acquire(timeout=TIMEOUT) as connection:
                    yield connection


async def _keep(_: object) -> None:
    """Take a connection as it is: nothing here leaves anything in its session, and asyncpg's reset is a request more."""


@contextlib.contextmanager
def _guarded(action: str) -> Iterator[None]:
    """Turn exceptions of asyncpg into ours. All are StoreUnavailable: no content of a task can make a statement fail."""
    try:
        yield
    except asyncpg.UndefinedTableError as error:
        message = f"cannot {action} in PostgreSQL: its tables are missing; run `python -m task_operator migrate`"
        raise StoreUnavailable(message) from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, ssl.SSLError, TimeoutError) as error:
        detail = str(error) or type(error).__name__
        message = f"cannot {action} in PostgreSQL: {detail}; check TASKS_POSTGRES_URL and the server"
        raise StoreUnavailable(message) from error
