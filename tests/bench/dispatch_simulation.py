"""Tasks, places and a clock: what the operator's dispatch does to them, by discrete events.

Nothing is slept, and nothing is random but by a seed.
"""

import heapq
import random
from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Final, Protocol

from task_operator.cache import Key
from task_operator.dispatch import GRANTED, Claim, Dispatch, Limits, Place

_BEGIN: Final = datetime(2026, 1, 1, tzinfo=UTC)
_PER_DAY: Final = 86_400


@dataclass(frozen=True, slots=True)
class Arrival:
    """A task: when it comes, and how long it takes; seconds."""

    at: float
    namespace: str
    base: str
    takes: float
    priority: str = "normal"


@dataclass(slots=True)
class Served:
    """What became of it; seconds from the beginning."""

    task: Arrival
    started: float = 0.0

    @property
    def waited(self) -> float:
        """How long it waited for a place."""
        return self.started - self.task.at

    @property
    def latency(self) -> float:
        """From its creation to its end."""
        return self.waited + self.task.takes


class Line(Protocol):
    """The part of a dispatch that is simulated."""

    def ask(self, key: Key, claim: Claim) -> Place:
        """Give a task a place, or have it wait."""

    def release(self, key: Key) -> None:
        """Note that a task has ended."""


class Fifo:
    """What everybody begins with, for comparison: whoever came first; with ``by_priority`` of the highest priority first."""

    def __init__(self, limits: Limits, *, wake: Callable[[Key], None], by_priority: bool = False) -> None:
        """See :class:`task_operator.dispatch.Dispatch`."""
        self._places = limits.total
        self._wake = wake
        self._by_priority = by_priority
        self._held = 0
        self._line: list[tuple[int, float, Key]] = []

    def ask(self, key: Key, claim: Claim) -> Place:
        """Give a task a place, or have it wait."""
        if self._held < self._places:
            self._held += 1
            return GRANTED
        order = ("high", "normal", "low").index(claim.priority) if self._by_priority else 0
        insort(self._line, (order, claim.created_at.timestamp(), key))
        return Place(position=len(self._line), reason="TotalLimit")

    def release(self, key: Key) -> None:
        """Note that a task has ended."""
        self._held -= 1
        if self._line and self._held < self._places:
            self._held += 1
            self._wake(self._line.pop(0)[2])


Maker = Callable[[Limits, Callable[[Key], None], Callable[[], datetime]], Line]


def fair(limits: Limits, wake: Callable[[Key], None], clock: Callable[[], datetime]) -> Line:
    """Make the operator's dispatch."""
    return Dispatch(limits, wake=wake, clock=clock)


def fifo(limits: Limits, wake: Callable[[Key], None], clock: Callable[[], datetime]) -> Line:
    """Make one that knows no shares and no priorities."""
    return Fifo(limits, wake=wake)


def strict(limits: Limits, wake: Callable[[Key], None], clock: Callable[[], datetime]) -> Line:
    """Make one that knows priorities alone."""
    return Fifo(limits, wake=wake, by_priority=True)


def simulate(arrivals: Iterable[Arrival], *, places: int, make: Maker, until: float = float("inf")) -> list[Served]:
    """Let tasks come, wait, run and end; return those that have started by ``until``, in the order of their starts."""
    now = 0.0
    woken: list[Key] = []
    line = make(Limits(total=places), woken.append, lambda: _BEGIN + timedelta(seconds=now))
    waiting: dict[Key, Served] = {}
    ends: list[tuple[float, int, Key]] = []
    number = count()
    served: list[Served] = []

    def start(key: Key) -> None:
        one = waiting.pop(key)
        one.started = now
        served.append(one)
        heapq.heappush(ends, (now + one.task.takes, next(number), key))

    def end_until(moment: float) -> None:
        nonlocal now
        while ends and ends[0][0] <= moment:
            now, _, key = heapq.heappop(ends)
            line.release(key)
            while woken:
                start(woken.pop(0))

    for task in arrivals:
        end_until(min(task.at, until))
        if task.at > until:
            return served
        now = task.at
        key = (task.namespace, f"task-{next(number)}")
        waiting[key] = Served(task)
        if line.ask(key, claim_of(task)).granted:
            start(key)
    end_until(until)
    return served


def claim_of(task: Arrival) -> Claim:
    """Return what a task asks the dispatch for."""
    return Claim(
        namespace=task.namespace,
        kb_id=task.base,
        type="document_processing",
        priority=task.priority,
        created_at=_BEGIN + timedelta(seconds=task.at),
    )


def poisson(
    rate: float, *, seconds: float, tenants: Sequence[tuple[str, str]], mean: float, seed: int, priorities: str = "normal"
) -> Iterator[Arrival]:
    """Let tasks come at a rate a second, of tenants (namespace, knowledge base) in no order; durations are lognormal,
    with this mean.

    ``priorities``: words of which each task gets one, as often as it is there.
    """
    drawn = random.Random(seed)
    words = priorities.split()
    at = 0.0
    while (at := at + drawn.expovariate(rate)) < seconds:
        namespace, base = drawn.choice(tenants)
        yield Arrival(at, namespace, base, drawn.lognormvariate(-0.125, 0.5) * mean, drawn.choice(words))


def tenants(namespaces: int, bases: int) -> list[tuple[str, str]]:
    """Return knowledge bases, spread over namespaces."""
    return [(f"tenant-{number % namespaces}", f"kb-{number}") for number in range(bases)]


def jain(service: Sequence[float]) -> float:
    """Return Jain's index of fairness: 1 when all have the same, 1/n when one has all."""
    return sum(service) ** 2 / (len(service) * sum(one * one for one in service)) if any(service) else 0.0


def quantile(values: Iterable[float], part: float) -> float:
    """Return a quantile by rank."""
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else 0.0
