"""A publisher of events at work on one sink, and how far it has come."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg

from task_operator.cloud_events import Publisher, Sink
from task_operator.metrics import Metrics
from tests.support.operator_lab import until

SOURCE = "//tasks.zzdsj.io/test"


@contextlib.asynccontextmanager
async def publishing(url: str, sink: Sink) -> AsyncIterator[Publisher]:
    publisher = Publisher(url, sink, source=SOURCE, metrics=Metrics())
    work = asyncio.create_task(publisher.run())
    try:
        yield publisher
        if work.done():
            work.result()
    finally:
        work.cancel()
        await asyncio.wait([work])
        await publisher.aclose()


async def begun(sql: "asyncpg.Connection[Any]", sink: str) -> None:
    """Wait until events from now on go to the sink."""

    async def look() -> bool:
        return bool(await sql.fetchval("SELECT count(*) FROM event_cursors WHERE sink = $1", sink))

    await until(f"{sink} has begun", look, interval=0.02)


async def caught_up(sql: "asyncpg.Connection[Any]", sink: str, *, seconds: float = 60) -> None:
    """Wait until the sink has taken all events."""

    async def look() -> bool:
        return bool(
            await sql.fetchval(
                "SELECT number >= (SELECT coalesce(max(number), 0) FROM task_events) FROM event_cursors WHERE sink = $1",
                sink,
            )
        )

    await until(f"{sink} has all events", look, seconds=seconds, interval=0.05)
