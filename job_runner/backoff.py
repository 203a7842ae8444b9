"""Patience with a store that has too much to do: asked again after growing pauses, for a bounded time."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from job_runner.watchdog import asking
from task_contract.errors import StoreUnavailable

R = TypeVar("R")

SECONDS: Final = 30.0
"""How long a busy store is asked again before the attempt is given back."""
_FIRST: Final = 0.2
_LONGEST: Final = 5.0


class Busy(StoreUnavailable):
    """The store is there and has too much to do. Where nobody is patient it is a StoreUnavailable like any other."""

    def __init__(self, message: str, *, after: float = 0) -> None:
        super().__init__(message)
        self.after = after
        """Seconds for which the store asks to be left alone (Retry-After); 0: it does not say."""


async def patiently(
    call: Callable[[], Awaitable[R]],
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> R:
    """Await a call again and again while it raises Busy; the last Busy is raised when time is up.

    Pauses double from 0.2 to 5 s, each shortened by up to a half at random, so that pods that were refused together do not
    come back together. A store that names a pause is left alone for all of it, or given up where that is too long.
    """
    deadline = clock() + seconds
    pause = _FIRST
    with asking():  # pauses too: the store's silence, not the attempt's
        while True:
            try:
                return await call()
            except Busy as busy:
                wait = max(busy.after, pause * random.uniform(0.5, 1))  # noqa: S311 - it spreads load, it hides nothing
                if clock() + wait > deadline:
                    raise
            await sleep(wait)
            pause = min(2 * pause, _LONGEST)
