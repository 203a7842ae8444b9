"""An attempt that makes no progress is ended, whatever it hangs in: a library, a lock, the event loop itself.

Whatever works says so (:func:`beat`), in any thread, and a thread of its own, one for all attempts of the process, looks
how long each has been silent. After ``spec.stallTimeout`` it ends the attempt in three steps, each for what the one before
cannot end:

1. *The event loop is told*: it cancels the work and ends the attempt as it does at a timeout, with a result row.
2. Where that takes more than :data:`LOOP_SECONDS` the loop hangs itself: the thread writes the termination message and
   ends the process.
3. Where no thread can run, since a library holds the interpreter's lock, :mod:`faulthandler`'s thread, which needs no
   interpreter, ends the process :data:`LOCK_SECONDS` later with exit code 1. It writes the stacks and nothing else, and
   :func:`task_contract.messages.hung` knows them again.

The stacks of all threads go to standard error in each case. A wait for a store is no stall: it has deadlines of its own,
at whose end the attempt is given back, uncounted (:func:`asking`). Redis is not involved.
"""

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar, copy_context
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import structlog

from task_contract.models import Stage

STORE_SECONDS: Final = 300.0
"""So long a call to a store may be silent, even where ``stallTimeout`` is shorter: longer than any takes to give up. The
longest are four requests of 15 s to Elasticsearch, and three of a minute that create a collection in Milvus, each begun at
the end of the half minute for which a busy store is asked again."""
LOOP_SECONDS: Final = 10.0
"""The event loop's time to end the attempt: a store call that is canceled, and 5 s for the result row."""
LOCK_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = (0.5, 10.0)
"""Between two looks: a twentieth of the limit within these bounds. Each look costs a thread that faulthandler starts, some
0.1 ms of CPU."""
_FRAMES: Final = 4
_THREADS: Final = 6
_IDLE: Final = "_worker"
"""Innermost function of a thread of an executor that waits for work."""

log = structlog.get_logger(__name__)


class Pulse:
    """Signs of work of one attempt. Given from any thread; reading a clock is all that one costs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = self._turned_at = clock()
        self._asking = 0
        self._lock = threading.Lock()
        self.stage: Stage | None = None
        """The stage that was entered last."""

    def beat(self, stage: Stage | None = None) -> None:
        """Say that something has been done."""
        self._at = self._clock()
        self.stage = stage or self.stage

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Say that a store is being asked. Its answer, good or bad, is a sign of work."""
        with self._lock:
            self._asking += 1
        try:
            yield
        finally:
            with self._lock:
                self._asking -= 1
            self.beat()

    def loop_turned(self) -> None:
        """Say that the event loop goes on."""
        self._turned_at = self._clock()

    def left(self, limit: float) -> float:
        """Return after how many seconds of further silence it has lasted for ``limit``; negative: it has for longer."""
        now = self._clock()
        patient = self._asking and now - self._turned_at < limit  # a loop that hangs hears no answer, and no deadline
        return self._at + (max(limit, STORE_SECONDS) if patient else limit) - now


_pulse: ContextVar[Pulse] = ContextVar("pulse")


def beat() -> None:
    """Say that something has been done, in the attempt that this task or thread works for, if any."""
    if (pulse := _pulse.get(None)) is not None:
        pulse.beat()


def current_pulse() -> Pulse | None:
    """Return the pulse of the attempt that this task or thread works for, if any, for another thread that works for it."""
    return _pulse.get(None)


def asking() -> contextlib.AbstractContextManager[None]:
    """Say that a store is being asked, in the attempt that this task or thread works for, if any."""
    pulse = _pulse.get(None)
    return contextlib.nullcontext() if pulse is None else pulse.asking()


class Watchdog:
    """Watches over an attempt while it is entered; what is called in it (tasks and threads too) finds the pulse.

    Any number of them may be entered at once; one thread of the process looks after all.
    """

    def __init__(
        self,
        pulse: Pulse,
        *,
        limit: float,
        on_stall: Callable[[], None],
        in_loop: Callable[[Callable[[], None]], object],
        last_resort: Callable[[], None] | None = None,
    ) -> None:
        """``limit`` in seconds. ``in_loop`` has something called by the event loop, such as ``on_stall``, once.

        ``last_resort`` is called by the watching thread and ends the process. Without it the process is not this attempt's
        alone, and goes on.
        """
        self._pulse = pulse
        self.limit = limit
        self._on_stall = on_stall
        self._in_loop = in_loop
        self.last_resort = last_resort
        self._told_at: float | None = None
        shortest, longest = _LOOK_SECONDS
        self._pause = min(max(limit / 20, shortest), longest)

    @property
    def soon(self) -> float:
        """Seconds until the first look at it, at most."""
        return min(self.limit, self._pause)

    def __enter__(self) -> Self:
        self._token = _pulse.set(self._pulse)
        self._context = copy_context()
        _watcher.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _pulse.reset(self._token)
        _watcher.remove(self)

    def look(self) -> float:
        """Tell of a stall, and end the process when that was of no use; return after how many seconds to look again."""
        if self._told_at is None:
            if (left := self._pulse.left(self.limit)) > 0:
                self._call(self._pulse.loop_turned)
                return min(left, self._pause)
            self._told_at = time.monotonic()
            self._context.copy().run(self._tell)
        left = self._told_at + LOOP_SECONDS - time.monotonic()
        if left <= 0 and self.last_resort is not None:
            self._context.copy().run(self.last_resort)
        return max(left, self._pause)

    def _tell(self) -> None:
        # The threads of this moment: a loop that is told ends what hangs in it.
        stacks = stacks_of_all_threads()
        log.error("no progress: the attempt is ended", seconds=self.limit, threads=innermost_frames())
        self._call(self._on_stall)
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(stacks)
            sys.stderr.flush()

    def _call(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the attempt has ended meanwhile
            self._in_loop(function)


class _Watcher:
    """The thread that looks after all attempts of the process. It is started by the first one, and stays."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watched: dict[Watchdog, None] = {}
        self._next = math.inf
        """When it looks next, as the monotonic clock has it."""
        self._armed_until = math.inf
        self._started = False

    def add(self, one: Watchdog) -> None:
        """Look after an attempt."""
        with self._changed:
            self._watched[one] = None
            self._arm([one], again=False)
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, name="watchdog", daemon=True).start()
            if time.monotonic() + one.soon < self._next:
                self._changed.notify()

    def remove(self, one: Watchdog) -> None:
        """Leave it alone from now on."""
        with self._changed:
            self._watched.pop(one, None)

    def _run(self) -> None:
        while True:
            with self._changed:
                watched = list(self._watched)
            pauses = [one.look() for one in watched if one in self._watched]
            with self._changed:
                self._arm(self._watched, again=True)
                # Attempts that were begun since are looked at in time, and those that follow soon need not wake this thread.
                pause = min([*pauses, *(one.soon for one in self._watched if one not in watched)], default=None)
                self._next = math.inf if pause is None else time.monotonic() + pause
                self._changed.wait(pause)

    def _arm(self, watched: Iterable[Watchdog], *, again: bool) -> None:
        """Have the process ended from outside of the interpreter, should this thread not come to arm it anew in time."""
        limit = min((one.limit for one in watched if one.last_resort is not None), default=math.inf)
        until = time.monotonic() + limit + LOOP_SECONDS + LOCK_SECONDS
        if until < self._armed_until or (again and until < math.inf):
            faulthandler.dump_traceback_later(limit + LOOP_SECONDS + LOCK_SECONDS, exit=True)
            self._armed_until = until
        elif again and self._armed_until < math.inf:
            faulthandler.cancel_dump_traceback_later()
            self._armed_until = math.inf


_watcher = _Watcher()


def innermost_frames() -> dict[str, str]:
    """Return where each other thread is that does something, shortly: this gets into ``status.error.log``."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = {}
    for ident, frame in sys._current_frames().items():  # noqa: SLF001 - that is what it is called
        frames = [entry for entry, _ in zip(traceback.walk_stack(frame), range(_FRAMES), strict=False)]
        if ident != threading.get_ident() and frames[0][0].f_code.co_name != _IDLE:
            said = (f"{Path(one.f_code.co_filename).name}:{line} {one.f_code.co_name}" for one, line in frames)
            found[names.get(ident, str(ident))] = " < ".join(said)
    return dict(list(found.items())[:_THREADS])


def stacks_of_all_threads() -> str:
    """Return what :mod:`faulthandler` writes: no source line is read, which might hang as well."""
    with open(os.memfd_create("stacks"), "w+", errors="replace") as file:  # noqa: PTH123 - it has no path
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()
