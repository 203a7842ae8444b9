"""Which tasks may run: limits, and fair shares of what they leave. No I/O; the time comes from a clock that is given.

A task holds a *place* from the moment its Job is to be made until that Job has ended. Limits count places: in all, of a
namespace, of a knowledge base, of a type. Who gets none waits. A knowledge base at its limit holds up nobody but itself.

A task for a worker pool needs no Job, and its place is one in the pool's window: so many tasks of a priority as may be
offered to the workers at once. It does not count in all, since the size of a pool is its own, but like any other of its
namespace, knowledge base and type. A window may grow and shrink at any time. Jobs and each window are *lanes*: what is free
in one helps nobody in another.

**Who is next.** A place that is free in a lane goes by four questions, each asked where the one before leaves a choice:

1. *Class.* A task is in the class of its priority, and moves up as it waits: by :data:`HEAD_START`, an hour after it was
   created it is in the first class whatever its priority.
2. *Namespace, then knowledge base in it: who has less than its share* of the places that are taken. A share goes by weight,
   of those who have a place or wait for one. So tasks of hours do not take all places from tasks of seconds.
3. *Whose turn it is*: start-time fair queueing. Each turn moves a namespace, and in it the knowledge base, back by 1/weight
   on a clock of the class; the one that is furthest in front has its turn. Who had nothing to do saves up no turns.
4. *Age.* In a knowledge base the oldest goes first, by creation minus the head start of its priority.

**Nobody starves.** An hour after its creation a task is in the first class, and nothing that is created later goes before
it in its knowledge base. From then on, at equal weights and with M namespaces of at most K knowledge bases each, a task that
has k others of its knowledge base before it starts with one of the next M*(K*(k+2)+1) places, as long as limits allow it,
and its namespace and knowledge base have less than their share: each of the others has at most one turn more meanwhile.

All of it can be lost: places are read from the Jobs that are there, and who waits asks again.
"""

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
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
_SKEW: Final = 60.0  # seconds by which the API server's clock may be ahead of ours: a task just created is in its class
_CLASSES: Final = tuple(HEAD_START[priority].total_seconds() - _SKEW for priority in (Priority.HIGH, Priority.NORMAL))
_CLOSE: Final = 10  # positions in which every step forward is told
_SHORT: Final = 64  # a line of this length is put in order for every question
_STALE: Final = 8  # the order of a longer one serves for as many changes as an eighth of its length
_SWEPT: Final = 256  # turns that a clock remembers before it looks which of them still matter

Pool: TypeAlias = tuple[str, str]
"""Namespace and name of a worker pool."""
_Rank: TypeAlias = tuple[float, Key]
_Lane: TypeAlias = tuple[Pool, str] | None  # a pool's window of a priority; None: Jobs


class Limit(StrEnum):
    """What bounds places; the value is the reason in ``status.queue`` of a task that waits for it."""

    STORE = "StoreUnavailable"
    TOTAL = "TotalLimit"
    NAMESPACE = "NamespaceLimit"
    TYPE = "TypeLimit"
    KNOWLEDGE_BASE = "KnowledgeBaseLimit"
    POOL = "PoolLimit"


@dataclass(frozen=True, slots=True)
class Limits:
    """How many tasks may have a place at once; 0: as many as there are."""

    total: int = 0
    namespace: int = 0
    knowledge_base: int = 0
    types: Mapping[str, int] = field(default_factory=dict)
    """By type of task."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Shares of what the limits leave, by ``NAMESPACE`` or ``NAMESPACE/KBID``; who is not named has 1."""

    def __bool__(self) -> bool:
        """Whether there is any limit."""
        return bool(self.total or self.namespace or self.knowledge_base or any(self.types.values()))

    def weight(self, namespace: str, kb_id: str | None = None) -> float:
        """Return the weight of a namespace among namespaces, or of a knowledge base among those of its namespace."""
        return self.weights.get(namespace if kb_id is None else f"{namespace}/{kb_id}", 1.0)

    def most(self, limit: Limit, kind: str) -> int:
        """Return how many places there are; of types those of ``kind``. 0: any number, or not told by a setting."""
        match limit:
            case Limit.TOTAL:
                return self.total
            case Limit.NAMESPACE:
                return self.namespace
            case Limit.TYPE:
                return self.types.get(kind, 0)
            case Limit.KNOWLEDGE_BASE:
                return self.knowledge_base
            case _:
                return 0


@dataclass(frozen=True, slots=True)
class Claim:
    """What a task's place counts against, and where the task stands in line."""

    namespace: str
    kb_id: str | None
    type: str
    priority: str
    created_at: datetime
    pool: Pool | None = None
    """The worker pool that is to carry it out; None: it gets a Job."""
    stores: bool = True
    """Whether it can do nothing without the stores of its namespace."""

    @property
    def rank(self) -> float:
        """Its place in its knowledge base: lower goes first. Seconds since the epoch."""
        return (self.created_at - HEAD_START.get(self.priority, timedelta())).timestamp()

    @property
    def lane(self) -> _Lane:
        """Where it waits."""
        return None if self.pool is None else (self.pool, self.priority)


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


class _Turns:
    """A virtual clock: whose turn it is among those who share something (start-time fair queueing, Goyal and others, 1996).

    The next turn of each begins where its last one ended, but not before the turn that was given last.
    """

    __slots__ = ("_after", "_now", "_sweep_at")

    def __init__(self) -> None:
        self._now = 0.0
        self._after: dict[str, float] = {}
        self._sweep_at = _SWEPT

    def next(self, who: str) -> float:
        """Return when the next turn of somebody begins."""
        return max(self._after.get(who, 0.0), self._now)

    def give(self, who: str, weight: float) -> None:
        """Note that somebody has had a turn."""
        self._now = self.next(who)
        self._after[who] = self._now + 1 / weight
        if len(self._after) > self._sweep_at:
            self._after = {one: after for one, after in self._after.items() if after > self._now}
            self._sweep_at = max(2 * len(self._after), _SWEPT)


class _Base:
    """The tasks of a knowledge base that wait in a lane, by type: each in the order of rank."""

    __slots__ = ("kinds",)

    def __init__(self) -> None:
        self.kinds: dict[str, list[_Rank]] = {}

    def ranks(self) -> list[_Rank]:
        """Return all, in order."""
        lists = list(self.kinds.values())
        return lists[0] if len(lists) == 1 else sorted(rank for ranks in lists for rank in ranks)


class _Tenant:
    """A namespace in a lane."""

    __slots__ = ("bases", "held", "held_of", "ranks")

    def __init__(self) -> None:
        self.ranks: list[_Rank] = []
        """All of its tasks that wait, in order."""
        self.bases: dict[str, _Base] = {}
        """Those of them with tasks that wait."""
        self.held = 0
        self.held_of: Counter[str] = Counter()
        """Places by knowledge base."""


class _Line:
    """Who waits in a lane, and who is next."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.tenants: dict[str, _Tenant] = {}
        self.held = 0
        self.size = 0
        self._turns: dict[tuple[int, str | None], _Turns] = {}  # by class, of namespaces, and of those in a namespace
        self._order: dict[Key, int] = {}
        self._ahead: tuple[int, int, int] = (0, 0, 0)  # by class, how many are in a better one
        self._changes = 0

    def wait(self, key: Key, claim: Claim) -> None:
        tenant = self._tenant(claim)
        rank = (claim.rank, key)
        insort(tenant.ranks, rank)
        insort(tenant.bases.setdefault(_base(claim), _Base()).kinds.setdefault(claim.type, []), rank)
        self.size += 1
        self._changes += 1

    def leave(self, key: Key, claim: Claim) -> None:
        tenant, rank = self.tenants[claim.namespace], (claim.rank, key)
        base = tenant.bases[_base(claim)]
        kind = base.kinds[claim.type]
        for ranks in (tenant.ranks, kind):
            del ranks[bisect_left(ranks, rank)]
        if not kind:
            del base.kinds[claim.type]
        if not base.kinds:
            del tenant.bases[_base(claim)]
        self.size -= 1
        self._changes += 1
        self._forget(claim)

    def take(self, claim: Claim, *, turn: int | None) -> None:
        """Note a place; ``turn``: of the class in which it was given. None: nobody gave it."""
        tenant, base = self._tenant(claim), _base(claim)
        tenant.held += 1
        tenant.held_of[base] += 1
        self.held += 1
        if turn is not None:
            self._clock(turn, None).give(claim.namespace, self._limits.weight(claim.namespace))
            self._clock(turn, claim.namespace).give(base, self._limits.weight(claim.namespace, base))

    def give_up(self, claim: Claim) -> None:
        tenant, base = self.tenants[claim.namespace], _base(claim)
        tenant.held -= 1
        tenant.held_of[base] -= 1
        if not tenant.held_of[base]:
            del tenant.held_of[base]
        self.held -= 1
        self._forget(claim)

    def next(self, now: float, full: Callable[[Key], bool]) -> tuple[Key, int] | None:
        """Return who is next of those that no limit holds back, and its class; None: nobody."""
        total = sum(self._limits.weight(name) for name in self.tenants)
        turns: list[tuple[int, bool, float, float, str]] = []
        for name, tenant in self.tenants.items():
            if tenant.ranks:
                turns.append(self._turn(name, tenant, _by_age(tenant.ranks[0][0], now), total, tenant.ranks[0][0]))
        while turns:
            turn = min(turns)
            turns.remove(turn)
            name = turn[-1]
            found = self._next_in(name, self.tenants[name], now, full)
            if found is None:
                continue
            key, grade, rank = found
            if grade <= turn[0]:
                return key, grade
            turns.append(self._turn(name, self.tenants[name], grade, total, rank))  # its first ones are held back
        return None

    def _turn(
        self, name: str, tenant: _Tenant, grade: int, total: float, rank: float
    ) -> tuple[int, bool, float, float, str]:
        weight = self._limits.weight(name)
        over = tenant.held * total >= (self.held + 1) * weight
        return grade, over, self._clock(grade, None).next(name), rank, name

    def _next_in(self, name: str, tenant: _Tenant, now: float, full: Callable[[Key], bool]) -> tuple[Key, int, float] | None:
        """Return who is next of a namespace, its class and rank."""
        weight = {base: self._limits.weight(name, base) for base in tenant.bases.keys() | tenant.held_of.keys()}
        total, places = sum(weight.values()), tenant.held + 1
        clocks = [self._clock(grade, name) for grade in range(3)]
        best: tuple[int, bool, float, _Rank] | None = None
        for base, waiting in tenant.bases.items():
            over = tenant.held_of[base] * total >= places * weight[base]
            for ranks in waiting.kinds.values():
                grade = _by_age(ranks[0][0], now)
                turn = grade, over, clocks[grade].next(base), ranks[0]
                if (best is None or turn < best) and not full(ranks[0][1]):
                    best = turn
        return None if best is None else (best[3][1], best[0], best[3][0])

    def order(self, now: float) -> list[Key]:
        """Return all who wait in the order in which they go if nobody comes, and no limit holds anybody back.

        Kept for :meth:`position`. Takes the time of sorting them.
        """
        line: list[tuple[int, float, float, Key]] = []
        for name, tenant in self.tenants.items():
            inside: list[tuple[int, float, float, Key]] = []
            for base, waiting in tenant.bases.items():
                step = 1 / self._limits.weight(name, base)
                inside += _in_turn(waiting.ranks(), now, step, [self._clock(grade, name).next(base) for grade in range(3)])
            inside.sort()
            step = 1 / self._limits.weight(name)
            starts = [self._clock(grade, None).next(name) for grade in range(3)]
            for grade, _, rank, key in inside:
                line.append((grade, starts[grade], rank, key))
                starts[grade] += step
        line.sort()
        grades = [one[0] for one in line]
        self._ahead = (0, bisect_left(grades, 1), bisect_left(grades, 2))
        order = [one[3] for one in line]
        self._order = {key: position for position, key in enumerate(order, start=1)}
        self._changes = 0
        return order

    def position(self, key: Key, claim: Claim, now: float) -> int:
        """Return where a task that waits stands; of a long line as it was a while ago.

        Of who has come since: right behind the one before it of its knowledge base.
        """
        if self.size <= _SHORT or self._changes * _STALE > self.size:
            self.order(now)
        if (known := self._order.get(key)) is not None:
            return known
        ranks = self.tenants[claim.namespace].bases[_base(claim)].kinds[claim.type]
        at = bisect_left(ranks, (claim.rank, key))
        before = self._order.get(ranks[at - 1][1]) if at else None
        position = 1 + (self._ahead[_by_age(claim.rank, now)] if before is None else before)
        self._order[key] = position
        return position

    def _clock(self, grade: int, namespace: str | None) -> _Turns:
        turns = self._turns.get((grade, namespace))
        if turns is None:
            turns = self._turns[grade, namespace] = _Turns()
        return turns

    def _tenant(self, claim: Claim) -> _Tenant:
        return self.tenants.setdefault(claim.namespace, _Tenant())

    def _forget(self, claim: Claim) -> None:
        tenant = self.tenants[claim.namespace]
        if not tenant.ranks and not tenant.held:
            del self.tenants[claim.namespace]
            for grade in range(3):
                self._turns.pop((grade, claim.namespace), None)


class Dispatch:
    """Places and the line."""

    def __init__(
        self,
        limits: Limits,
        *,
        wake: Callable[[Key], None],
        window: Callable[[Pool, str], int] = lambda _pool, _priority: 0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``wake`` is called with each task that is given a place while it waits: it is to ask again.

        ``window`` tells how many tasks of a priority may be with the workers of a pool; when it may have become more,
        :meth:`grown` is to be called.
        """
        self._limits = limits
        self._wake = wake
        self._window = window
        self._clock = clock
        self._holders: dict[Key, Claim] = {}
        self._held: Counter[tuple[Limit, tuple[str, ...]]] = Counter()
        self._waiting: dict[Key, Claim] = {}
        self._asked: dict[Key, int] = {}
        self._lines: dict[_Lane, _Line] = {}
        self._down: dict[str, str] = {}

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
            if held.lane == claim.lane:
                return GRANTED
            self.release(key)
        known = self._waiting.get(key)
        full = self._full(claim)
        if full is None:
            self._leave(key)
            self._take(key, claim, turn=_by_age(claim.rank, self._now()))
            return GRANTED
        if known != claim:
            self._leave(key)
            self._waiting[key] = claim
            self._line(claim).wait(key, claim)
        position = self._line(claim).position(key, claim, self._now())
        self._asked[key] = position
        return Place(position=position, reason=full[0], message=full[1])

    def hold(self, key: Key, claim: Claim) -> None:
        """Note that a task has a Job, or is with a pool, whether it was given a place or not: limits may be lower now."""
        held = self._holders.get(key)
        if held is not None and held.lane != claim.lane:
            self.release(key)
        if key not in self._holders:
            self._leave(key)
            self._take(key, claim, turn=None)

    def release(self, key: Key) -> None:
        """Note that a task has no Job and wants none at the moment; those who can go on are woken."""
        self._leave(key)
        claim = self._holders.pop(key, None)
        if claim is None:
            return
        self._held.subtract(_counted(claim))
        self._line(claim).give_up(claim)
        self.grown()

    def grown(self) -> None:
        """Give places that there are to who waits for them: a window may have grown."""
        now = self._now()
        for lane, line in list(self._lines.items()):
            if not line.size and not line.held:
                del self._lines[lane]
                continue
            while line.size and self._room(lane) and (found := line.next(now, self._held_back)) is not None:
                key, turn = found
                claim = self._waiting[key]
                self._leave(key)
                self._take(key, claim, turn=turn)
                self._wake(key)

    def store_down(self, namespace: str, message: str) -> None:
        """Note that tasks of a namespace could not reach a store: until :meth:`store_up` one at a time tries it."""
        self._down[namespace] = message

    def store_up(self, namespace: str) -> None:
        """Note that a task has reached the stores of its namespace."""
        if self._down.pop(namespace, None) is not None:
            self.grown()

    def moved(self) -> Iterator[Key]:
        """Go over the tasks whose position has changed enough to be told."""
        now = self._now()
        for line in list(self._lines.values()):
            for position, key in enumerate(line.order(now), start=1):
                if worth_telling(self._asked.get(key), position):
                    yield key

    def _now(self) -> float:
        return self._clock().timestamp()

    def _line(self, claim: Claim) -> _Line:
        line = self._lines.get(claim.lane)
        if line is None:
            line = self._lines[claim.lane] = _Line(self._limits)
        return line

    def _take(self, key: Key, claim: Claim, *, turn: int | None) -> None:
        self._holders[key] = claim
        self._held.update(_counted(claim))
        self._line(claim).take(claim, turn=turn)

    def _leave(self, key: Key) -> None:
        claim = self._waiting.pop(key, None)
        if claim is not None:
            self._asked.pop(key, None)
            self._line(claim).leave(key, claim)

    def _room(self, lane: _Lane) -> bool:
        """Whether a lane has a place at all, before it is asked for whom."""
        if lane is None:
            return not self._limits.total or self._held[Limit.TOTAL, ()] < self._limits.total
        pool, priority = lane
        return self._held[Limit.POOL, (*pool, priority)] < self._window(pool, priority)

    def _held_back(self, key: Key) -> bool:
        return self._full(self._waiting[key]) is not None

    def _full(self, claim: Claim) -> tuple[str, str] | None:
        """Return which limit allows no more, and in words; None: all do. The widest limit comes first."""
        for limit, whose in _counted(claim):
            held = self._held[limit, whose]
            if limit is Limit.STORE:
                if held and claim.namespace in self._down:
                    return limit, f"one task at a time tries whether the stores are back: {self._down[claim.namespace]}"
            elif limit is Limit.POOL and claim.pool is not None:
                window = max(self._window(claim.pool, claim.priority), 0)
                if held >= window:
                    return limit, f"as many {claim.priority} tasks are with pool {claim.pool[1]} as may be: {window}"
            elif (most := self._limits.most(limit, claim.type)) and held >= most:
                of = f" of {whose[-1]}" if whose else ""
                return limit, f"as many tasks{of} run as may: {most}"
        return None


def _in_turn(ranks: list[_Rank], now: float, step: float, starts: list[float]) -> list[tuple[int, float, float, Key]]:
    """Return those who wait in a knowledge base: class, beginning of the turn, rank, key."""
    first = bisect_right(ranks, now - _CLASSES[0], key=lambda rank: rank[0])
    second = bisect_right(ranks, now - _CLASSES[1], key=lambda rank: rank[0])
    return [
        (grade, starts[grade] + number * step, rank, key)
        for grade, part in enumerate((ranks[:first], ranks[first:second], ranks[second:]))
        for number, (rank, key) in enumerate(part)
    ]


def _by_age(rank: float, now: float) -> int:
    """Return the class of a task, from 0: that of its priority, or a better one for the time that it has waited."""
    waited = now - rank
    return 0 if waited >= _CLASSES[0] else 1 if waited >= _CLASSES[1] else 2


def _counted(claim: Claim) -> list[tuple[Limit, tuple[str, ...]]]:
    """Return what a place counts against, and whose."""
    counted: list[tuple[Limit, tuple[str, ...]]] = [
        (Limit.TOTAL, ()) if claim.pool is None else (Limit.POOL, (*claim.pool, claim.priority)),
        (Limit.NAMESPACE, (claim.namespace,)),
        (Limit.TYPE, (claim.type,)),
    ]
    if claim.kb_id is not None:
        counted.append((Limit.KNOWLEDGE_BASE, (claim.namespace, claim.kb_id)))
    return [(Limit.STORE, (claim.namespace,)), *counted] if claim.stores else counted


def _base(claim: Claim) -> str:
    """Return the knowledge base that a task counts for; those without one share."""
    return claim.kb_id or ""
