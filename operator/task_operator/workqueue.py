"""A queue of keys: each once, none by two workers at a time, later, or again after an error with growing waits. A turn that
one key has at a time. And questions about keys that are asked together.
"""

import asyncio
import contextlib
import heapq
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterator
from itertools import count, islice
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
A = TypeVar("A")

_FIRST_BACKOFF: Final = 1.0  # seconds: an object that goes wrong costs at most one try a second
_MAX_BACKOFF: Final = 60.0
_FRESH: Final = 10.0  # seconds that a glance is true for: the line of keys that are called may be long


class WorkQueue(Generic[K]):
    """Keys that need a look. A key added while it is worked on is handed out again afterwards, so no change goes unseen."""

    def __init__(self) -> None:
        self._ready: deque[K] = deque()
        self._queued: set[K] = set()
        self._busy: set[K] = set()
        self._again: set[K] = set()
        self._due: dict[K, float] = {}
        self._later: list[tuple[float, int, K]] = []  # a heap; what :attr:`_due` does not confirm has been overtaken
        self._order = count()
        self._timer: asyncio.Handle | None = None  # one for all: a timer a key takes 0.9 KB, and thousands wait
        self._failures: dict[K, int] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, key: K) -> None:
        """Have a look at ``key`` as soon as a worker is free. One that is backing off after errors keeps waiting."""
        if key in self._failures and key in self._due:
            return
        self._push(key)

    def add_after(self, key: K, seconds: float) -> None:
        """Have a look after some time; the earlier of two times wins."""
        if seconds <= 0:
            self.add(key)
            return
        at = asyncio.get_running_loop().time() + seconds
        if self._due.get(key, at + 1) > at:
            self._schedule(key, at)

    async def get(self) -> K:
        """Wait for a key; :meth:`done` or :meth:`failed` must follow."""
        while not self._ready:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake_one()  # it was this one's turn: pass it on
                raise
        key = self._ready.popleft()
        self._queued.discard(key)
        self._busy.add(key)
        return key

    def done(self, key: K) -> None:
        """Say that the look at ``key`` went well."""
        self._failures.pop(key, None)
        self._release(key)

    def failed(self, key: K, *, at_least: float = 0.0) -> float:
        """Say that it went wrong: look again after a wait that doubles, which is returned in seconds."""
        failures = self._failures.get(key, 0) + 1
        self._failures[key] = failures
        wait = max(min(_FIRST_BACKOFF * (1 << min(failures - 1, 10)), _MAX_BACKOFF), at_least)
        self._again.discard(key)
        self._release(key)
        self._schedule(key, asyncio.get_running_loop().time() + wait)
        return wait

    def close(self) -> None:
        """Nothing becomes due any more."""
        self._due.clear()
        self._later.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _schedule(self, key: K, at: float) -> None:
        self._due[key] = at
        heapq.heappush(self._later, (at, next(self._order), key))
        if at == self._later[0][0]:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(self._later[0][0], self._ring) if self._later else None

    def _ring(self) -> None:
        now = asyncio.get_running_loop().time()
        while self._later and self._later[0][0] <= now:
            at, _, key = heapq.heappop(self._later)
            if self._due.get(key) == at:
                del self._due[key]
                self._push(key)
        self._set_timer()

    def _push(self, key: K) -> None:
        if key in self._busy:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._ready.append(key)
            self._wake_one()

    def _release(self, key: K) -> None:
        self._busy.discard(key)
        if key in self._again:
            self._again.discard(key)
            self._push(key)

    def _wake_one(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


class Turn(Generic[K]):
    """Lets one key at a time do what is welcome and can wait; whoever comes meanwhile is called when it is over.

    So it goes as fast as it is answered, and takes next to nothing from whoever answers slowly because of too much to do.
    """

    def __init__(self, call: Callable[[K], object]) -> None:
        """``call`` has a key looked at; :meth:`over` is to follow each look."""
        self._call = call
        self._taken = False
        self._called: K | None = None
        self._waiting: dict[K, None] = {}

    @contextlib.contextmanager
    def of(self, key: K) -> Iterator[bool]:
        """Say whether it is the turn of ``key``; if not, it is called later."""
        if self._taken:
            self._waiting[key] = None
            yield False
            return
        self._taken = True
        self._waiting.pop(key, None)
        try:
            yield True
        finally:
            self._taken = False
            self._next()

    def over(self, key: K) -> None:
        """Say that a look at ``key`` has ended: one that was called and had nothing to do passes its turn on."""
        if self._called == key:
            self._called = None
            if not self._taken:
                self._next()

    def _next(self) -> None:
        if self._waiting:
            first = next(iter(self._waiting))
            del self._waiting[first]
            self._called = first
            self._call(first)


class Glances(Generic[K, A]):
    """Asks what is welcome and can wait about many keys together, once in a while; nobody is kept waiting for the answers.

    Who finds no answer is called when it is there, and has :data:`_FRESH` seconds to come for it: what was true an hour ago,
    when it was not needed any more, is no answer.
    """

    def __init__(self, ask: Callable[[K], Awaitable[A]], call: Callable[[K], object], *, at_once: int, apart: float) -> None:
        """``ask`` is called for at most so many keys ``at_once``, those that wait longest; ``call`` has a key looked at;
        ``apart``: seconds from then to the next time."""
        self._ask = ask
        self._call = call
        self._at_once = at_once
        self._apart = apart
        self._asked: dict[K, None] = {}
        self._answers: dict[K, tuple[float, A | BaseException]] = {}
        """Each with when it was asked for, in the loop's time."""
        self._working: asyncio.Task[None] | None = None

    def take(self, key: K) -> A | None:
        """Return the answer about a key; None: it is asked for, and ``key`` is called. Raises what asking raised."""
        began, answer = self._answers.pop(key, (0.0, None))
        if answer is None or began < asyncio.get_running_loop().time() - _FRESH:
            self._asked[key] = None
            if self._working is None or self._working.done():
                self._working = asyncio.create_task(self._work())
            return None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def _work(self) -> None:
        time = asyncio.get_running_loop().time
        while self._asked:
            began, keys = time(), [*islice(self._asked, self._at_once)]
            for key in keys:
                del self._asked[key]
            self._answers = {key: answer for key, answer in self._answers.items() if answer[0] >= began - _FRESH}
            answers = await asyncio.gather(*map(self._ask, keys), return_exceptions=True)
            self._answers.update((key, (began, answer)) for key, answer in zip(keys, answers, strict=True))
            for key in keys:
                self._call(key)
            await asyncio.sleep(began + self._apart - time())
