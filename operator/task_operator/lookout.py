"""When to look at objects of a kind that there are few of: after news, after a time, one look at a time for each.

Tasks have a work queue of their own (:mod:`task_operator.workqueue`); of pools and schedules all fit into a set.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Final

import structlog

from task_operator.cache import Key
from task_platform.kubernetes import ClusterError, Gone, Unavailable

_log = structlog.get_logger(__name__)

_SOON: Final = 0.2  # seconds between news of an object and a look at it, and so the least between two looks
_POLL: Final = 5.0  # seconds between two lists of what is not watched
_ABSENT: Final = 30.0  # seconds between two looks whether the cluster has the kind at all
_MOST: Final = 15.0  # seconds between two tries at the first list


class Lookout:
    """Which objects are due, which are being looked at, and when all are listed anew."""

    def __init__(self, what: str, *, listing: Callable[[], Awaitable[None]], watched: bool, resync_seconds: float) -> None:
        """``what``: the objects in words. ``listing``: lists them, and may raise ClusterError."""
        self._what = what
        self._listing = listing
        self._watched = watched
        self._resync_seconds = resync_seconds
        self._due: set[Key] = set()
        self._looking: set[Key] = set()
        self._wake = asyncio.Event()
        self._relist = asyncio.Event()
        self.absent = ""
        """Why the cluster shows none: it lacks the kind, or the right to it. Set by ``listing``."""

    def soon(self, *keys: Key) -> None:
        """Have objects looked at in a moment, together with what else is new by then."""
        self._due.update(keys)
        self._wake.set()

    def relist(self) -> None:
        """Have all of them listed anew."""
        self._relist.set()

    def restart(self) -> None:
        """Forget looks of an earlier term: one that was cut off before it began is none."""
        self._looking.clear()

    def begin(self, known: Collection[Key], also: Collection[Key] = ()) -> set[Key]:
        """Return which of the known ones are to be looked at now, those of ``also`` too; each is then to be ``ended``."""
        self._due.update(also)
        begin = {key for key in self._due if key in known} - self._looking
        self._due &= self._looking  # these are looked at again, as soon as the look is over
        self._looking |= begin
        self._wake.clear()
        return begin

    def ended(self, key: Key) -> None:
        """Note that a look is over."""
        self._looking.discard(key)
        if key in self._due:
            self._wake.set()

    async def rest(self, seconds: float) -> None:
        """Wait until something is due, and a moment for what comes with it; at most so long if nothing is."""
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._wake.wait()
        except TimeoutError:
            return
        await asyncio.sleep(_SOON)

    async def list_until_done(self) -> None:
        """List, again with growing waits while the API server does not answer."""
        wait = 1.0
        while True:
            try:
                await self._listing()
            except (Unavailable, Gone) as error:
                _log.warning(f"cannot list {self._what} yet", error=error.message, wait=wait)
                await asyncio.sleep(wait)
                wait = min(2 * wait, _MOST)
            else:
                return

    async def list_forever(self) -> None:
        """List from time to time, and when asked to, until cancelled."""
        while True:
            every = _ABSENT if self.absent else self._resync_seconds if self._watched else _POLL
            try:
                async with asyncio.timeout(every):
                    await self._relist.wait()
            except TimeoutError:
                pass
            self._relist.clear()
            try:
                await self._listing()
            except ClusterError as error:
                _log.warning(f"cannot list {self._what}; trying again", error=error.message)
