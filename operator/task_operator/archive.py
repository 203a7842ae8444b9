"""The archive in PostgreSQL ends somewhere: what is kept of tasks that are gone is deleted after a number of days.

Rows of ``tasks`` that are deleted, with attempts, events, stored results, vectors and fences, are all that is left of such
tasks: nothing is deleted unless somebody has said after how long. It goes in small batches with pauses, and takes no lock
that a writer waits for. It may be killed at any point, and two operators may do it at once.
"""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

import structlog

from task_operator.metrics import Metrics
from task_operator.projection import DatabaseUnavailable

_BATCH: Final = 500  # tasks: 0.1 to 0.2 s with a million of them in the tables, on a busy machine
_PAUSE: Final = 0.2  # seconds between batches
_LOOK: Final = timedelta(hours=1)

_log = structlog.get_logger(__name__)


class Database(Protocol):
    """The part of :class:`task_operator.projection.Database` that is used."""

    async def expire(self, *, before: datetime, most: int) -> int: ...  # noqa: D102 - see there


class Archive:
    """Deletes what is too old until cancelled."""

    def __init__(
        self,
        *,
        database: Database,
        keep: timedelta,
        metrics: Metrics,
        look: timedelta = _LOOK,
        batch: int = _BATCH,
        pause: float = _PAUSE,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``keep``: how long after its deletion the history of a task stays."""
        self._database = database
        self._keep = keep
        self._metrics = metrics
        self._look = look
        self._batch = batch
        self._pause = pause
        self._clock = clock

    async def run(self) -> None:
        """Look once an hour, for the first time at once."""
        while True:
            try:
                await self.look()
            except DatabaseUnavailable as error:
                _log.warning("cannot delete old history; trying again in an hour", error=str(error))
            await asyncio.sleep(self._look.total_seconds())

    async def look(self) -> None:
        """Delete all that is too old. Raises DatabaseUnavailable."""
        before, deleted = self._clock() - self._keep, 0
        while True:
            gone = await self._database.expire(before=before, most=self._batch)
            self._metrics.history_expired.inc(gone)
            deleted += gone
            if gone < self._batch:
                break
            await asyncio.sleep(self._pause)
        if deleted:
            _log.info("history of old tasks is deleted", tasks=deleted, before=before.isoformat())
