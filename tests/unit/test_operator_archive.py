"""How the archive is kept short: in batches, until nothing is too old, and whatever PostgreSQL does."""

import asyncio
from datetime import datetime, timedelta

import pytest

from task_operator.archive import Archive
from task_operator.metrics import Metrics
from task_operator.projection import DatabaseUnavailable
from tests.support.operator_values import at

DAY = timedelta(days=1)


class Table:
    """Rows by the moment of their deletion."""

    def __init__(self, *deleted: float, away: int = 0) -> None:
        self.rows = [at(seconds) for seconds in sorted(deleted)]
        self.away = away
        self.asked: list[int] = []
        self.empty = asyncio.Event()

    async def expire(self, *, before: datetime, most: int) -> int:
        if self.away:
            self.away -= 1
            raise DatabaseUnavailable("cannot use PostgreSQL")
        due = [row for row in self.rows if row < before][:most]
        self.rows = self.rows[len(due) :]
        self.asked.append(len(due))
        if not self.rows:
            self.empty.set()
        return len(due)


@pytest.mark.parametrize(
    ("deleted", "batches", "left"),
    [
        ([], [0], 0),
        ([-90_000, -5], [1], 1),
        ([-90_000 - number for number in range(5)], [2, 2, 1], 0),
        ([-90_000 - number for number in range(4)], [2, 2, 0], 0),
        ([-86_400, -86_401], [1], 1),
    ],
    ids=["nothing", "one of two", "several batches", "whole batches", "to the second"],
)
async def test_a_look_deletes_all_that_is_too_old_in_batches(deleted: list[float], batches: list[int], left: int) -> None:
    table, metrics = Table(*deleted), Metrics()
    await Archive(database=table, keep=DAY, metrics=metrics, batch=2, pause=0, clock=lambda: at(0)).look()
    assert (table.asked, len(table.rows)) == (batches, left)
    assert metrics.registry.get_sample_value("task_operator_history_expired_total") == sum(batches)


async def test_it_goes_on_after_an_outage() -> None:
    table = Table(-90_000, away=2)
    archive = Archive(
        database=table, keep=DAY, metrics=Metrics(), look=timedelta(milliseconds=1), pause=0, clock=lambda: at(0)
    )
    working = asyncio.create_task(archive.run())
    async with asyncio.timeout(10):
        await table.empty.wait()
    working.cancel()
    assert table.asked == [1]
