"""What happens to tasks, from one place in the process to all who watch.

Transitions come from ``task_events`` of PostgreSQL, in the order of their numbers, and none is passed over: the hub reads
``number > last`` whenever PostgreSQL says that there is something, every few seconds besides, and after every loss of the
connection. Progress comes from Redis and may be lost; the latest of each task is what counts.

::

    task_events ── EventSource ──┐                   ┌── Subscriber ── one client
                                 ├── Hub ── routes ──┼── Subscriber ── one client
    Redis ─────── ProgressFeed ──┘                   └── ...

A :class:`Subscriber` waits for nobody and nobody waits for it: what it is to be sent stands in a queue with a bound. Of a
task's progress only the latest waits there; a transition is never left out, so a client that does not keep up is dropped and
told why. Each update is encoded once, however many get it.

A filter begins at a position: the number of the last transition that was handed out. What came before is read from the
tables (:mod:`task_gateway.live`), what comes after reaches the subscriber, and nothing lies in between.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, Final, NamedTuple, Protocol

import orjson
import structlog

from task_contract.messages import ProgressEvent
from task_contract.models import Phase
from task_contract.views import event_status, percent, timestamp

_log = structlog.get_logger(__name__)

POLL: Final = 3.0  # seconds without a notification after which the table is asked all the same
_PAGE: Final = 1000
_MAX_BACKOFF: Final = 5.0  # seconds
RUNNING: Final = 10_000
"""Running tasks whose progress can be told, at some 1 KB each."""
QUEUE: Final = 1000
"""Updates that may wait for one client; some 0.4 KB each, shared with all others that are sent them."""
_BATCH: Final = 64
"""Updates that a client is given at once: what waits in the queue meanwhile is still replaced by what is newer."""


class SourceUnavailable(Exception):
    """The source of events does not answer."""


@dataclass(frozen=True, slots=True)
class Event:
    """A transition: a row of ``task_events``."""

    number: int
    uid: str
    namespace: str
    name: str
    kb_id: str | None
    type: str
    phase: str
    """A phase, or Deleted."""
    attempt: int
    reason: str
    message: str | None
    at: datetime


class EventSource(Protocol):
    """Where transitions come from. Every method raises :class:`SourceUnavailable`."""

    async def connect(self) -> None:
        """Connect, and hear from now on when there are events; what was connected before is closed."""

    async def heard(self, *, timeout: float) -> None:  # noqa: ASYNC109 - it is no error that nothing came
        """Wait until there may be new events, at most so many seconds."""

    async def after(self, number: int, *, limit: int) -> list[Event]:
        """Return the events with higher numbers, the lowest first."""

    async def head(self) -> int:
        """Return the highest number; 0 when there is none."""

    async def running(self, *, limit: int) -> tuple[int, list[Event]]:
        """Return the highest number, and the last events of tasks that run at that moment."""


@dataclass(frozen=True, slots=True)
class Update:
    """Something to tell: a transition if it has a number, else progress. ``data`` is the JSON."""

    uid: str
    namespace: str
    name: str
    kb_id: str | None
    number: int | None
    data: bytes


class Route(NamedTuple):
    """Where an update is looked up: its namespace or any (None), and its knowledge base, its name, or whatever it has."""

    namespace: str | None
    kb_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Filter:
    """What a client wants to hear of, within what it may."""

    namespaces: frozenset[str] | None
    """None: of all that there are."""
    kb_ids: frozenset[str] = frozenset()
    """Empty: of all."""
    task_ids: frozenset[str] = frozenset()
    """Names of tasks; empty: all."""

    def matches(self, update: Update) -> bool:
        """Whether the client is to be sent it."""
        return (
            (self.namespaces is None or update.namespace in self.namespaces)
            and (not self.kb_ids or update.kb_id in self.kb_ids)
            and (not self.task_ids or update.name in self.task_ids)
        )

    def routes(self) -> Iterator[Route]:
        """Yield where all that matches is looked up. What is found there may match or not."""
        for namespace in (None,) if self.namespaces is None else self.namespaces:
            if self.task_ids:
                yield from (Route(namespace, name=name) for name in self.task_ids)
            elif self.kb_ids:
                yield from (Route(namespace, kb_id=kb_id) for kb_id in self.kb_ids)
            else:
                yield Route(namespace)


class Drop(Enum):
    """Why the hub has parted with a client."""

    SLOW = "slow"
    """It did not take what waited for it."""
    RESET = "reset"
    """Numbers begin anew: the database was restored from a backup."""
    CLOSING = "closing"
    """This gateway stops; another one goes on."""


class Dropped(Exception):
    """There is nothing more for this client; ``drop`` says why."""

    def __init__(self, drop: Drop) -> None:
        super().__init__(drop.value)
        self.drop = drop


@dataclass(slots=True)
class _Following:
    filter: Filter
    floor: int
    """Transitions up to this number were sent, or are part of a snapshot that was."""


class Subscriber:
    """What one client is still to be sent."""

    def __init__(self, hub: "Hub", *, limit: int = QUEUE) -> None:
        self._hub = hub
        self._limit = limit
        self._following: dict[str, _Following] = {}
        self._queue: OrderedDict[int | str, Update] = OrderedDict()  # by number, or by uid of the task whose progress it is
        self._wake = asyncio.Event()
        self._nudged = False
        self.gone: asyncio.Future[Drop] = asyncio.get_running_loop().create_future()
        """Done once the hub has parted with the client, be it in the middle of a write that does not end."""

    def follow(self, key: str, wanted: Filter) -> int:
        """Begin to follow; return the position: transitions with a higher number are sent, and progress from now on."""
        self.unfollow(key)
        position = self._hub.position
        self._following[key] = _Following(wanted, floor=position)
        self._hub.add(self, wanted)
        return position

    def raise_floor(self, key: str, number: int) -> None:
        """Leave out transitions up to this number, as far as this filter is concerned: the client has them."""
        if (following := self._following.get(key)) is not None:
            following.floor = max(following.floor, number)

    def unfollow(self, key: str) -> bool:
        """Follow no longer; return whether there was such a key."""
        following = self._following.pop(key, None)
        if following is not None:
            self._hub.remove(self, following.filter)
        return following is not None

    def following(self) -> list[str]:
        """Return the keys of all that it follows."""
        return list(self._following)

    def close(self) -> None:
        """Follow nothing more. May be repeated."""
        for key in self.following():
            self.unfollow(key)
        self._hub.forget(self)

    def offer(self, update: Update) -> None:
        """Put an update into the queue; a client whose queue is full of transitions is dropped."""
        if self.gone.done():
            return
        if update.number is None:
            if update.uid in self._queue or len(self._queue) < self._limit:
                self._queue[update.uid] = update
        else:
            self._queue.pop(update.uid, None)  # progress of before
            if len(self._queue) >= self._limit and not self._make_room():
                self.drop(Drop.SLOW)
                return
            self._queue[update.number] = update
        self._wake.set()

    def _make_room(self) -> bool:
        """Leave out the oldest progress that waits; there may be none."""
        oldest = next((key for key in self._queue if isinstance(key, str)), None)
        if oldest is None:
            return False
        del self._queue[oldest]
        return True

    def drop(self, drop: Drop) -> None:
        """Part with the client: what waits is not sent any more."""
        if not self.gone.done():
            self.gone.set_result(drop)
            self._queue.clear()
            self._wake.set()
            self._hub.drops[drop] += 1

    def nudge(self) -> None:
        """Have :meth:`take` return at once, with nothing if there is nothing."""
        self._nudged = True
        self._wake.set()

    async def take(self) -> list[Update]:
        """Wait for updates and return the oldest ones. Raises :class:`Dropped`."""
        while True:
            if self.gone.done():
                raise Dropped(self.gone.result())
            if self._nudged:
                self._nudged = False
                return []
            found: list[Update] = []
            while self._queue and len(found) < _BATCH:
                _, update = self._queue.popitem(last=False)
                if self._wants(update):
                    found.append(update)
            if found:
                return found
            self._wake.clear()
            await self._wake.wait()

    def _wants(self, update: Update) -> bool:
        """Whether some filter matches that has not sent it already. Routes find more than filters let through."""
        return any(
            one.filter.matches(update) and (update.number is None or update.number > one.floor)
            for one in self._following.values()
        )


def task_update(
    event: Event,
    latest: ProgressEvent | None,
    *,
    kind: str = "task",
    number: int | None,
    stored: tuple[str | None, int | None] = (None, None),
) -> dict[str, Any]:
    """Return an update as it goes over the wire.

    ``latest`` is what the runner of whichever attempt has said last; ``stored`` are stage and percentage of the status, for
    when that is of no use. A task that was deleted before it had ended is canceled, for the reason Deleted: nothing of it
    will be published.
    """
    stage, done, counted = None, None, {}
    if event.phase == Phase.PROCESSING:
        stage, done = stored
        if latest is not None and latest.attempt == event.attempt:
            stage, done = str(latest.stage), latest.progress
            counted = {} if latest.total is None else {"done": latest.done, "total": latest.total}
    return {
        "type": kind,
        **({} if number is None else {"event": number}),
        "task_id": event.name,
        "namespace": event.namespace,
        "uid": event.uid,
        "kb_id": event.kb_id,
        "task_type": event.type,
        "status": event_status(event.phase),
        "progress": percent(event.phase, done),
        "stage": stage,
        **counted,
        "attempt": event.attempt,
        "reason": event.reason or None,
        "message": event.message,
        "at": timestamp(event.at),
    }


class Hub:
    """Hands on what happens. One a process; all of it runs in one event loop."""

    def __init__(
        self,
        source: EventSource,
        *,
        poll: float = POLL,
        most_running: int = RUNNING,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """``poll``: seconds; ``sleep``: waits between tries to reach the source."""
        self._source = source
        self._poll = poll
        self._sleep = sleep
        self._most_running = most_running
        self._position: int | None = None
        self._running: dict[str, Event] = {}
        self._progress: OrderedDict[str, ProgressEvent] = OrderedDict()
        self._routes: dict[Route, dict[Subscriber, int]] = {}
        self._subscribers: set[Subscriber] = set()
        self._ready = asyncio.Event()
        self._closing = False
        self.connected = False
        """Whether transitions arrive at the moment."""
        self.updates = 0
        """So many were handed on, to however many."""
        self.drops: dict[Drop, int] = dict.fromkeys(Drop, 0)

    # ------------------------------------------------------------------------------------------------------- clients

    @property
    def position(self) -> int:
        """Number of the last transition that was handed out. Raises :class:`SourceUnavailable` before the first look."""
        if self._position is None:
            raise SourceUnavailable("cannot follow tasks yet: PostgreSQL has not answered since this gateway was started")
        return self._position

    @property
    def subscribers(self) -> int:
        """So many clients are connected."""
        return len(self._subscribers)

    async def ready(self) -> None:
        """Wait until clients can follow."""
        await self._ready.wait()

    def subscriber(self, *, limit: int = QUEUE) -> Subscriber:
        """Return the queue of a new client, which follows nothing yet. To be closed."""
        one = Subscriber(self, limit=limit)
        self._subscribers.add(one)
        if self._closing:
            one.drop(Drop.CLOSING)
        return one

    def close(self) -> None:
        """Part with all clients: this gateway stops."""
        self._closing = True
        for one in list(self._subscribers):
            one.drop(Drop.CLOSING)

    def add(self, subscriber: Subscriber, wanted: Filter) -> None:
        """Route what may match to a subscriber; called by it."""
        for route in wanted.routes():
            counts = self._routes.setdefault(route, {})
            counts[subscriber] = counts.get(subscriber, 0) + 1

    def remove(self, subscriber: Subscriber, wanted: Filter) -> None:
        """Undo :meth:`add`."""
        for route in wanted.routes():
            counts = self._routes[route]
            counts[subscriber] -= 1
            if not counts[subscriber]:
                del counts[subscriber]
            if not counts:
                del self._routes[route]

    def forget(self, subscriber: Subscriber) -> None:
        """Part with a subscriber that is closed; called by it."""
        self._subscribers.discard(subscriber)

    def latest(self, uid: str) -> ProgressEvent | None:
        """Return how far the current attempt of a task has come, if its runner has said so lately."""
        return self._progress.get(uid)

    def resumed(self, event: Event) -> bytes:
        """Return the update of a transition that was read from the table for one client."""
        return orjson.dumps(task_update(event, self.latest(event.uid), number=event.number))

    # -------------------------------------------------------------------------------------------------------- sources

    async def run(self) -> None:
        """Read and hand on until cancelled."""
        wait = 0.5
        while True:
            try:
                await self._source.connect()
                await self._look()
                self.connected = True
                wait = 0.5
                while True:
                    await self._source.heard(timeout=self._poll)
                    await self._look()
            except SourceUnavailable as error:
                self.connected = False
                _log.warning("cannot follow tasks; clients are told nothing until PostgreSQL is back", error=str(error))
                await self._sleep(wait)
                wait = min(2 * wait, _MAX_BACKOFF)

    async def _look(self) -> None:
        """Hand on all that is new; begin anew when the numbers do."""
        if self._position is None:
            await self._begin()
            return
        read = 0
        while True:
            page = await self._source.after(self._position, limit=_PAGE)
            for event in page:
                self._on_event(event)
            read += len(page)
            if len(page) < _PAGE:
                break
        if not read and await self._source.head() < self._position:
            _log.warning("numbers of events begin anew: the database was restored; clients have to connect again")
            await self._begin()
            for one in list(self._subscribers):
                one.drop(Drop.RESET)

    async def _begin(self) -> None:
        head, running = await self._source.running(limit=self._most_running)
        self._running = {event.uid: event for event in running}
        self._position = head
        self._ready.set()

    def _on_event(self, event: Event) -> None:
        self._position = event.number
        if event.phase == Phase.PROCESSING:
            self._running[event.uid] = event
            if len(self._running) > self._most_running:
                del self._running[next(iter(self._running))]
        else:
            self._running.pop(event.uid, None)
            self._progress.pop(event.uid, None)
        data = orjson.dumps(task_update(event, self.latest(event.uid), number=event.number))
        self._publish(Update(event.uid, event.namespace, event.name, event.kb_id, event.number, data))

    def on_progress(self, said: ProgressEvent) -> None:
        """Hand on how far an attempt has come, if it is the one that runs and this is news.

        Said of a task that is not known to run it is kept: the runner is often heard of before PostgreSQL says that it runs.
        """
        before = self._progress.get(said.uid)
        if before is not None and (
            before.attempt > said.attempt
            or (before.attempt, before.stage, before.progress, before.done)
            == (said.attempt, said.stage, said.progress, said.done)
            # Another pod of a batch, which has not heard yet what others have done since.
            or (before.attempt == said.attempt and (said.done or 0) < (before.done or 0))
        ):
            return
        self._progress[said.uid] = said
        self._progress.move_to_end(said.uid)
        if len(self._progress) > self._most_running:
            self._progress.popitem(last=False)
        event = self._running.get(said.uid)
        if event is None or event.attempt != said.attempt:
            return
        told = task_update(event, said, number=None) | {"at": timestamp(said.at)}
        self._publish(Update(event.uid, event.namespace, event.name, event.kb_id, None, orjson.dumps(told)))

    def _publish(self, update: Update) -> None:
        self.updates += 1
        for one in self._audience(update):
            one.offer(update)

    def _audience(self, update: Update) -> Iterable[Subscriber]:
        found: dict[Subscriber, None] = {}
        for namespace in (update.namespace, None):
            for route in (
                Route(namespace),
                Route(namespace, kb_id=update.kb_id) if update.kb_id is not None else None,
                Route(namespace, name=update.name),
            ):
                if route is not None and (here := self._routes.get(route)) is not None:
                    found.update(dict.fromkeys(here))
        return found
