"""Which tasks may have a Job: limits, and the order of those that wait. No I/O; times are arguments.

A task holds a *place* from the moment its Job is to be made until that Job has ended. Limits count places: in all, of a
namespace, of a knowledge base, of a type. Who gets none waits; a place that becomes free goes to the first in line whom
every limit allows, so a knowledge base at its limit holds up nobody but itself.

A task for a worker pool needs no Job, and its place is one in the pool's window: so many tasks of a priority as may be
offered to the workers at once. It does not count in all, since the size of a pool is its own, but like any other of its
namespace, knowledge base and type. A window may grow and shrink at any time.

The line is in the order of creation, with a head start by priority (:data:`HEAD_START`). Since that is a fixed time, nobody
starves: a task of low priority waits for no task that is created more than an hour after it.

All of it can be lost: places are read from the Jobs that are there, and who waits asks again.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final, TypeAlias

from task_contract.models import Priority
from task_operator.cache import Key

HEAD_START: Final[Mapping[str, timedelta]] = {
    str(Priority.HIGH): timedelta(hours=1),
    str(Priority.NORMAL): timedelta(minutes=10),
    str(Priority.LOW): timedelta(),
}
"""So much earlier than it was created a task of a priority counts as created."""
_CLOSE: Final = 10  # positions in which every step forward is told

_Rank: TypeAlias = tuple[float, Key]
_Pool: TypeAlias = tuple[str, str]  # namespace and name
_Group: TypeAlias = tuple[str, str | None, str, _Pool | None, str]


class Limit(StrEnum):
    """What bounds places; the value is the reason in ``status.queue`` of a task that waits for it."""

    TOTAL = "TotalLimit"
    NAMESPACE = "NamespaceLimit"
    TYPE = "TypeLimit"
    KNOWLEDGE_BASE = "KnowledgeBaseLimit"
    POOL = "PoolLimit"


@dataclass(frozen=True, slots=True)
class Limits:
    """How many tasks may have a Job at once; 0: as many as there are."""

    total: int = 0
    namespace: int = 0
    knowledge_base: int = 0
    types: Mapping[str, int] = field(default_factory=dict)
    """By type of task."""

    def __bool__(self) -> bool:
        """Whether there is any limit."""
        return bool(self.total or self.namespace or self.knowledge_base or any(self.types.values()))

    def most(self, limit: Limit, kind: str) -> int:
        """Return how many places there are; of types those of ``kind``. 0: any number; of a pool see its window."""
        match limit:
            case Limit.TOTAL:
                return self.total
            case Limit.NAMESPACE:
                return self.namespace
            case Limit.TYPE:
                return self.types.get(kind, 0)
            case Limit.KNOWLEDGE_BASE:
                return self.knowledge_base
            case Limit.POOL:
                return 0


@dataclass(frozen=True, slots=True)
class Claim:
    """What a task's place counts against, and where the task stands in line."""

    namespace: str
    kb_id: str | None
    type: str
    priority: str
    created_at: datetime
    pool: _Pool | None = None
    """Namespace and name of the worker pool that is to carry it out; None: it gets a Job."""

    @property
    def rank(self) -> float:
        """Its place in line: lower goes first. Seconds since the epoch."""
        return (self.created_at - HEAD_START.get(self.priority, timedelta())).timestamp()


@dataclass(frozen=True, slots=True)
class Place:
    """The answer to a task that asks for a place."""

    position: int = 0
    """In line, from 1; 0: it has a place."""
    reason: str = ""
    """Which limit it waits for."""
    message: str = ""

    @property
    def granted(self) -> bool:
        """Whether its Job may be made."""
        return not self.position


GRANTED: Final = Place()


def worth_telling(told: int | None, position: int) -> bool:
    """Whether a position differs so much from the one that a status tells that it is worth a write.

    Told is every step among the first ten, before that only when half the way is done: a line of ten thousand costs each
    task some twenty writes, not ten thousand.
    """
    if told is None or position > told:
        return told is None
    return position != told and (position <= _CLOSE or 2 * position <= told)


class Dispatch:
    """Places and the line."""

    def __init__(
        self,
        limits: Limits,
        *,
        wake: Callable[[Key], None],
        window: Callable[[_Pool, str], int] = lambda _pool, _priority: 0,
    ) -> None:
        """``wake`` is called with each task that is given a place while it waits: it is to ask again.

        ``window`` tells how many tasks of a priority may be with the workers of a pool; when it may have become more,
        :meth:`grown` is to be called.
        """
        self._limits = limits
        self._wake = wake
        self._window = window
        self._holders: dict[Key, Claim] = {}
        self._held: Counter[tuple[Limit, tuple[str, ...]]] = Counter()
        self._waiting: dict[Key, Claim] = {}
        self._asked: dict[Key, int] = {}
        self._line: list[_Rank] = []
        self._groups: dict[_Group, list[_Rank]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def holders(self) -> int:
        """How many places are taken."""
        return len(self._holders)

    def ask(self, key: Key, claim: Claim) -> Place:
        """Give a task a place if the limits allow it, else have it wait. Who has one already is told so.

        One that goes elsewhere than where it has its place, from a pool to a Job, gives that place up.
        """
        held = self._holders.get(key)
        if held is not None:
            if held.pool == claim.pool:
                return GRANTED
            self.release(key)
        known = self._waiting.get(key)
        full = self._full(claim)
        if full is None:
            self._leave(key)
            self._take(key, claim)
            return GRANTED
        if known != claim:
            self._leave(key)
            self._waiting[key] = claim
            insort(self._line, (claim.rank, key))
            insort(self._groups.setdefault(_group(claim), []), (claim.rank, key))
        position = bisect_left(self._line, (claim.rank, key)) + 1
        self._asked[key] = position
        return Place(position=position, reason=full[0], message=full[1])

    def hold(self, key: Key, claim: Claim) -> None:
        """Note that a task has a Job, or is with a pool, whether it was given a place or not: limits may be lower now."""
        held = self._holders.get(key)
        if held is not None and held.pool != claim.pool:
            self.release(key)
        if key not in self._holders:
            self._leave(key)
            self._take(key, claim)

    def release(self, key: Key) -> None:
        """Note that a task has no Job and wants none at the moment; those who can go on are woken."""
        self._leave(key)
        claim = self._holders.pop(key, None)
        if claim is None:
            return
        self._held.subtract(_counted(claim))
        self.grown()

    def grown(self) -> None:
        """Give places that there are to who waits for them: a window may have grown."""
        while (first := self._first()) is not None:
            waiting = self._waiting[first]
            self._leave(first)
            self._take(first, waiting)
            self._wake(first)

    def moved(self) -> Iterator[Key]:
        """Go over the tasks whose position has changed enough to be told."""
        for position, (_, key) in enumerate(list(self._line), start=1):
            if worth_telling(self._asked.get(key), position):
                yield key

    def _take(self, key: Key, claim: Claim) -> None:
        self._holders[key] = claim
        self._held.update(_counted(claim))

    def _leave(self, key: Key) -> None:
        claim = self._waiting.pop(key, None)
        if claim is None:
            return
        self._asked.pop(key, None)
        group = self._groups[_group(claim)]
        for line in (self._line, group):
            del line[bisect_left(line, (claim.rank, key))]
        if not group:
            del self._groups[_group(claim)]

    def _first(self) -> Key | None:
        """Return the first in line whom all limits allow; of each group only its first is looked at."""
        heads = [group[0] for group in self._groups.values() if self._full(self._waiting[group[0][1]]) is None]
        return min(heads)[1] if heads else None

    def _full(self, claim: Claim) -> tuple[str, str] | None:
        """Return which limit allows no more, and in words; None: all do. The widest limit comes first."""
        for limit, whose in _counted(claim):
            if limit is Limit.POOL and claim.pool is not None:
                window = max(self._window(claim.pool, claim.priority), 0)
                if self._held[limit, whose] >= window:
                    return limit, f"as many {claim.priority} tasks are with pool {claim.pool[1]} as may be: {window}"
                continue
            most = self._limits.most(limit, claim.type)
            if most and self._held[limit, whose] >= most:
                of = f" of {whose[-1]}" if whose else ""
                return limit, f"as many tasks{of} run as may: {most}"
        return None


def _counted(claim: Claim) -> list[tuple[Limit, tuple[str, ...]]]:
    """Return what a place counts against, and whose."""
    counted: list[tuple[Limit, tuple[str, ...]]] = [
        (Limit.TOTAL, ()) if claim.pool is None else (Limit.POOL, (*claim.pool, claim.priority)),
        (Limit.NAMESPACE, (claim.namespace,)),
        (Limit.TYPE, (claim.type,)),
    ]
    return counted if claim.kb_id is None else [*counted, (Limit.KNOWLEDGE_BASE, (claim.namespace, claim.kb_id))]


def _group(claim: Claim) -> _Group:
    return claim.namespace, claim.kb_id, claim.type, claim.pool, "" if claim.pool is None else claim.priority
