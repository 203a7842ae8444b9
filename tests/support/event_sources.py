"""Events in memory in place of PostgreSQL, and what any source of events has to hold."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from task_gateway.hub import Event, EventSource, SourceUnavailable

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
Tell = Callable[[Event], Awaitable[int]]
"""Adds an event, whose number is not looked at; returns its number."""


def event(
    name: str = "handbook",
    phase: str = "Processing",
    *,
    number: int = 0,
    namespace: str = "knowledge",
    kb_id: str | None = "kb-42",
    attempt: int = 1,
    reason: str = "",
    message: str | None = None,
) -> Event:
    """Return an event; tasks of the same namespace and name have the same uid."""
    return Event(
        number=number,
        uid=str(uuid.uuid5(uuid.NAMESPACE_URL, f"{namespace}/{name}")),
        namespace=namespace,
        name=name,
        kb_id=kb_id,
        type="document_processing",
        phase=phase,
        attempt=attempt,
        reason=reason or phase,
        message=message,
        at=NOON,
    )


class MemoryEvents:
    """An EventSource that is told its events, and that can be away."""

    def __init__(self, *events: Event) -> None:
        self.events: list[Event] = []
        self.away = False
        self._connected = False
        self._heard = asyncio.Event()
        for one in events:
            self.add(one)

    def add(self, told: Event, *, heard: bool = True) -> int:
        """Add an event; without HEARD nobody is woken, as by a notification that was lost."""
        number = self.events[-1].number + 1 if self.events else 1
        self.events.append(
            Event(number, told.uid, told.namespace, told.name, told.kb_id, told.type, *_rest(told)),
        )
        if heard:
            self._heard.set()
        return number

    async def tell(self, told: Event) -> int:
        """Add an event."""
        return self.add(told)

    def leave(self) -> None:
        """Be away until :meth:`come_back`; the connection is lost."""
        self.away, self._connected = True, False
        self._heard.set()

    def come_back(self) -> None:
        """Be there again for who connects."""
        self.away = False

    def restore(self, *, upto: int) -> None:
        """Be as a database that was restored from a backup of when the highest number was that."""
        self.events = [one for one in self.events if one.number <= upto]
        self._heard.set()

    def _check(self) -> None:
        if self.away or not self._connected:
            raise SourceUnavailable("cannot read events: away")

    async def connect(self) -> None:
        if self.away:
            raise SourceUnavailable("cannot listen to events: away")
        self._connected = True
        self._heard.set()

    async def heard(self, *, timeout: float) -> None:  # noqa: ASYNC109
        try:
            async with asyncio.timeout(timeout):
                await self._heard.wait()
        except TimeoutError:
            pass
        self._heard.clear()
        self._check()

    async def after(self, number: int, *, limit: int) -> list[Event]:
        self._check()
        return [one for one in self.events if one.number > number][:limit]

    async def head(self) -> int:
        self._check()
        return self.events[-1].number if self.events else 0

    async def running(self, *, limit: int) -> tuple[int, list[Event]]:
        self._check()
        last = {one.uid: one for one in self.events}
        return await self.head(), [one for one in last.values() if one.phase == "Processing"][:limit]


def _rest(told: Event) -> tuple[str, int, str, str | None, datetime]:
    return told.phase, told.attempt, told.reason, told.message, told.at


async def holds_the_contract(source: EventSource, tell: Tell) -> None:
    """Look at all that the hub relies on; the source is connected and has no events yet."""
    assert await source.head() == 0
    assert await source.after(0, limit=10) == []
    assert await source.running(limit=10) == (0, [])

    first = await tell(event("one", "Queued"))
    await asyncio.wait_for(source.heard(timeout=60), 10)  # woken, not timed out
    assert await source.head() == first
    [read] = await source.after(0, limit=10)
    assert read == event("one", "Queued", number=first)

    numbers = [first]
    for told in (event("one"), event("two", kb_id=None), event("two", "Completed", kb_id=None, message="done")):
        numbers.append(await tell(told))
    assert numbers == sorted(set(numbers))
    assert [one.number for one in await source.after(first, limit=2)] == numbers[1:3]
    assert [one.number for one in await source.after(numbers[2], limit=9)] == numbers[3:]
    head, running = await source.running(limit=10)
    assert (head, [one.name for one in running]) == (numbers[-1], ["one"])

    await source.heard(timeout=0.05)  # something was said meanwhile
    await source.heard(timeout=0.05)  # nothing more comes, and that is no error
    await source.connect()  # may be repeated
    assert await source.head() == numbers[-1]
    await tell(event("one", "Completed"))
    await asyncio.wait_for(source.heard(timeout=60), 10)
