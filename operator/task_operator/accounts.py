"""What pods have used, in the operator's metrics: a pod is gone before Prometheus could ask it.

The runner leaves a row in ``task_usage`` for every attempt that a process worked on. Who marks a row as counted counts it:
two operators never count one twice, and what came while none ran is counted by the next one. One that dies between the mark
and the next scrape takes those few with it, as it takes all that its counters held; the rows stay (ADR 0050).
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import structlog

from task_operator.metrics import Metrics
from task_operator.projection import DatabaseUnavailable

_LOOK_SECONDS: Final = 5.0
"""Between two looks: less than between two scrapes, and one look finds nothing in an index that is empty."""
_MOST: Final = 500

_log = structlog.get_logger(__name__)


class Database(Protocol):
    """The part of :class:`task_operator.projection.Database` that is used."""

    async def count_usage(self, *, most: int) -> Sequence[Mapping[str, Any]]: ...  # noqa: D102 - see there


class Accounts:
    """Counts what attempts have used until cancelled."""

    def __init__(self, *, database: Database, metrics: Metrics) -> None:
        self._database = database
        self._metrics = metrics

    async def run(self) -> None:
        """Look every few seconds, and again at once where there was more."""
        while True:
            try:
                while await self.look() == _MOST:
                    pass
            except DatabaseUnavailable as error:
                _log.warning("cannot count what attempts have used; trying again", error=str(error))
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self) -> int:
        """Count what nobody has counted yet; return of how many. Raises DatabaseUnavailable."""
        rows = await self._database.count_usage(most=_MOST)
        for row in rows:
            self._metrics.used(row)
        return len(rows)
