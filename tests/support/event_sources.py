"""Events in memory in place of PostgreSQL, and what any source of events has to hold."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from task_gateway.database import Passed, Standing
from task_gateway.following import Past
from task_gateway.hub import Event, EventSource, Filter, SourceUnavailable, Update

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


class MemoryPast:
    """What live updates read from the tables, over the same events. Tasks are those that the events tell of."""

    def __init__(self, source: MemoryEvents, *, kept_from: int = 1) -> None:
        self._source = source
        self.kept_from = kept_from
        """Events of lower numbers have expired."""
        self.progress: dict[str, tuple[str, int]] = {}
        """Stage and percentage of the status, by uid."""

    async def standing(self, wanted: Filter, *, limit: int) -> tuple[int, list[Standing]]:
        last = {one.uid: one for one in self._source.events}
        named = bool(wanted.task_ids) and wanted.namespaces is not None
        found = [
            Standing(one, *self.progress.get(one.uid, (None, None)))
            for one in reversed(last.values())
            if lets_through(wanted, one) and (named or one.phase in {"Queued", "Processing", "Retrying"})
        ]
        return (self._source.events[-1].number if self._source.events else 0), found[:limit]

    async def events_between(self, wanted: Filter, *, after: int, upto: int, limit: int) -> Passed:
        kept = [one for one in self._source.events if one.number >= self.kept_from]
        found = [one for one in kept if after < one.number <= upto and lets_through(wanted, one)]
        ends = (kept[0].number, kept[-1].number) if kept else (0, 0)
        return Passed(*ends, found[:limit])


def lets_through(wanted: Filter, told: Event) -> bool:
    """Whether a filter lets an event through."""
    return wanted.matches(Update(told.uid, told.namespace, told.name, told.kb_id, told.number, b""))


async def past_holds_the_contract(past: Past, tell: Tell) -> None:
    """Look at all that following relies on; there are no events yet."""
    everything = Filter(None)
    assert await past.standing(everything, limit=9) == (0, [])
    assert await past.events_between(everything, after=0, upto=0, limit=9) == Passed(0, 0, [])

    first = await tell(event("a1", "Queued", namespace="a", kb_id="kb-1"))
    await tell(event("a1", namespace="a", kb_id="kb-1"))
    await tell(event("b1", namespace="b", kb_id="kb-1"))
    await tell(event("a2", namespace="a", kb_id=None))
    await tell(event("a2", "Failed", namespace="a", kb_id=None, reason="DocumentEmpty", message="no text"))
    last = await tell(event("a3", "Queued", namespace="a", kb_id="kb-2"))

    in_a, named = frozenset({"a"}), frozenset({"a1", "a2", "b1"})
    for wanted, names in (
        (everything, {"a1", "b1", "a3"}),
        (Filter(in_a), {"a1", "a3"}),
        (Filter(None, kb_ids=frozenset({"kb-1"})), {"a1", "b1"}),
        (Filter(in_a, kb_ids=frozenset({"kb-1"})), {"a1"}),
        (Filter(in_a, task_ids=named), {"a1", "a2"}),  # how a2 has ended is told to who asks for it
        (Filter(None, task_ids=named), {"a1", "b1"}),  # unless in whichever namespace
        (Filter(frozenset()), set()),
    ):
        head, found = await past.standing(wanted, limit=9)
        assert (head, {one.event.name for one in found}) == (last, names), wanted
    _, found = await past.standing(Filter(in_a, task_ids=frozenset({"a2"})), limit=9)
    assert (found[0].event.phase, found[0].event.reason, found[0].event.message) == ("Failed", "DocumentEmpty", "no text")
    assert len((await past.standing(everything, limit=2))[1]) == 2

    for wanted, names_in_order in (
        (everything, ["a1", "b1", "a2", "a2", "a3"]),
        (Filter(in_a), ["a1", "a2", "a2", "a3"]),
        (Filter(None, kb_ids=frozenset({"kb-1", "kb-2"})), ["a1", "b1", "a3"]),
        (Filter(in_a, task_ids=named), ["a1", "a2", "a2"]),
    ):
        passed = await past.events_between(wanted, after=first, upto=last, limit=9)
        assert (passed.lowest, passed.head) == (first, last)
        assert [one.name for one in passed.events] == names_in_order
    passed = await past.events_between(everything, after=first, upto=last - 1, limit=2)
    assert [one.number for one in passed.events] == [first + 1, first + 2]
