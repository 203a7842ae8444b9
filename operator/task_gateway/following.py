"""How a client begins to follow tasks, and what it is sent first, whichever protocol carries it.

It is sent where the tasks stand (a snapshot), then what happens. Both come from the same numbers: the client follows the hub
from a position first, and the snapshot is read after that, so that it holds all up to the position and more; what it holds
already is left out of what follows. A client that comes back names the last number it has seen, and is sent what has passed
since, from the table and by whichever replica. Where that is not to be had any more it gets a snapshot that says so.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Protocol

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from task_gateway.callers import Caller, Callers
from task_gateway.database import Passed, Standing
from task_gateway.hub import Filter, Hub, SourceUnavailable, Subscriber, task_update
from task_gateway.problems import Problem

SNAPSHOT: Final = 5000
"""Tasks of a snapshot; of more the youngest."""
RESUMED: Final = 10_000
"""Events that are sent to a client which comes back; when there are more it gets a snapshot."""
REACH: Final = 500_000
"""Numbers that are looked at for them."""
NAMES: Final = 100
"""Knowledge bases, or tasks, of one wish."""
LAST_NUMBER: Final = 2**63 - 1
NAME_PATTERN: Final = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$"
"""Of knowledge bases and, in lower case, of tasks."""
_READS: Final = 4
"""Snapshots that are read at once: the pool of connections has others to serve."""


def _several(value: object) -> object:
    return [value] if isinstance(value, str) else value


Several = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=253, pattern=NAME_PATTERN)], ...],
    BeforeValidator(_several),
    Field(max_length=NAMES),
]
"""One name, or a list of them."""


class Wish(BaseModel):
    """What a client wants to hear of. Empty: all."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    namespace: Annotated[str, Field(max_length=63)] | None = None
    kb_id: Several = ()
    task_id: Several = ()
    since: Annotated[int, Field(ge=0, le=LAST_NUMBER)] | None = None


class Past(Protocol):
    """The part of :class:`task_gateway.database.Database` that is used."""

    async def standing(self, wanted: Filter, *, limit: int) -> tuple[int, list[Standing]]: ...  # noqa: D102 - see there
    async def events_between(  # noqa: D102 - see there
        self, wanted: Filter, *, after: int, upto: int, limit: int
    ) -> Passed: ...


@dataclass(frozen=True, slots=True)
class Frame:
    """JSON to send; ``number``: up to this number the client then knows everything."""

    data: bytes
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """What a client is sent before anything else."""

    frames: list[Frame]
    event: int
    """Up to this number it has been told everything with them."""
    resumed: bool
    """Whether it is what has passed, and no snapshot."""
    reset: bool = False
    """Whether it asked for what has passed, which is not to be had any more."""
    truncated: bool = False
    """Whether there are more tasks than the snapshot has."""

    def ready(self, key: str) -> Frame:
        """Return the frame that says so."""
        body = {
            "type": "ready",
            "id": key,
            "event": self.event,
            "resumed": self.resumed,
            "reset": self.reset,
            "truncated": self.truncated,
            "sent": len(self.frames),
        }
        return Frame(orjson.dumps(body), self.event)


class Watchers:
    """Makes a :class:`Watcher` of each client."""

    def __init__(
        self,
        *,
        hub: Hub,
        past: Past,
        callers: Callers,
        most: int,
        snapshot: int = SNAPSHOT,
        resumed: int = RESUMED,
        reach: int = REACH,
    ) -> None:
        """``most``: clients at once; ``snapshot``, ``resumed``, ``reach``: see the constants."""
        self.hub = hub
        self.past = past
        self.callers = callers
        self.reading = asyncio.Semaphore(_READS)
        self.snapshot = snapshot
        self.resumed = resumed
        self.reach = reach
        self._most = most

    def watcher(self, caller: Caller, *namespaces: str | None) -> "Watcher":
        """Return a new client, which follows nothing yet; to be closed.

        ``namespaces``: those that the request names, for wishes that name none. Raises :class:`Problem` 503 without room.
        """
        if self.hub.subscribers >= self._most:
            raise Problem(503, "unavailable", f"cannot take more than {self._most} clients; try again", retry_after=5)
        return Watcher(self, self.hub.subscriber(), caller=caller, namespaces=namespaces)


class Watcher:
    """A client: what it follows, within what its caller may list."""

    def __init__(
        self, watchers: Watchers, subscriber: Subscriber, *, caller: Caller, namespaces: Sequence[str | None]
    ) -> None:
        self._watchers = watchers
        self.subscriber = subscriber
        self._caller = caller
        self._namespaces = tuple(namespaces)
        self._followed: dict[str, tuple[Wish, Filter]] = {}

    def close(self) -> None:
        """Follow nothing more."""
        self.subscriber.close()

    @property
    def followed(self) -> int:
        """So many wishes are followed."""
        return len(self._followed)

    def follows(self, key: str) -> bool:
        """Whether something is followed under that key."""
        return key in self._followed

    async def follow(self, key: str, wish: Wish) -> Begun:
        """Follow a wish, in place of the one with the same key, and return what is to be sent first.

        Raises :class:`Problem` and :class:`~task_gateway.database.DatabaseUnavailable`; then it is not followed.
        """
        wanted = await self._filter(wish)
        try:
            position = self.subscriber.follow(key, wanted)
        except SourceUnavailable as error:
            raise Problem(503, "unavailable", f"{error}; try again", retry_after=2) from error
        try:
            async with self._watchers.reading:
                begun = await self._begin(wanted, wish.since, position)
        except BaseException:
            self.unfollow(key)
            raise
        self.subscriber.raise_floor(key, begun.event)
        self._followed[key] = wish, wanted
        return begun

    def unfollow(self, key: str) -> bool:
        """Follow it no longer; return whether it was."""
        self._followed.pop(key, None)
        return self.subscriber.unfollow(key)

    async def may_still(self) -> bool:
        """Return whether the caller may still hear of all that it follows. While nobody can tell, it may."""
        try:
            for wish, wanted in list(self._followed.values()):
                if await self._filter(wish) != wanted:
                    return False
        except Problem as problem:
            return problem.status >= 500
        return True

    async def _filter(self, wish: Wish) -> Filter:
        callers = self._watchers.callers
        scope = await callers.scope(self._caller, callers.namespace(wish.namespace, *self._namespaces))
        namespaces = None if scope is None else frozenset(scope)
        return Filter(namespaces, kb_ids=frozenset(wish.kb_id), task_ids=frozenset(wish.task_id))

    async def _begin(self, wanted: Filter, since: int | None, position: int) -> Begun:
        if since is not None and (resumed := await self._resume(wanted, since, position)) is not None:
            return resumed
        most = self._watchers.snapshot
        head, tasks = await self._watchers.past.standing(wanted, limit=most + 1)
        truncated, tasks = len(tasks) > most, tasks[:most]
        frames = []
        for place, task in enumerate(tasks, 1):
            # The number is on the last one alone: a client that comes back after half a snapshot needs a whole one.
            number = head if place == len(tasks) else None
            latest = self._watchers.hub.latest(task.event.uid)
            told = task_update(task.event, latest, kind="snapshot", number=number, stored=(task.stage, task.progress))
            frames.append(Frame(orjson.dumps(told if since is None else told | {"reset": True}), number))
        return Begun(frames, event=head, resumed=False, reset=since is not None, truncated=truncated)

    async def _resume(self, wanted: Filter, since: int, position: int) -> Begun | None:
        """Return what has passed since a number; None when that cannot be told any more."""
        most = self._watchers.resumed
        if position - since > self._watchers.reach:
            return None
        passed = await self._watchers.past.events_between(wanted, after=since, upto=position, limit=most + 1)
        if not passed.lowest - 1 <= since <= passed.head or len(passed.events) > most:
            return None
        frames = [Frame(self._watchers.hub.resumed(event), event.number) for event in passed.events]
        return Begun(frames, event=max(since, position), resumed=True)
