"""A circuit breaker for each service: after some failures in a row calls fail at once for a while, then one is tried.

It keeps callers from waiting for a service that is down, and the service from a queue of calls when it comes back.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

FAILURES: Final = 5
"""So many in a row open the circuit."""
OPEN_SECONDS: Final = 10.0
"""So long calls fail at once; then a single one is tried."""


@dataclass
class Breaker:
    """Of one service. Safe in several threads.

    ::

        closed ── 5 failures in a row ──► open ── 10 s ──► half open: one call is tried
          ▲                                ▲                  │ fails │ succeeds
          │                                └──────────────────┘       │
          └────────────────────────────────────────────────────────── ┘
    """

    clock: Callable[[], float] = time.monotonic
    failures: int = 0
    """In a row."""
    _opened_at: float = 0.0
    _probing: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def enter(self) -> float:
        """Ask whether a call may be made: 0 for yes, else the seconds until one may be.

        Whoever is allowed ends with :meth:`succeeded`, :meth:`failed` or :meth:`abandoned`.
        """
        with self._lock:
            if self.failures < FAILURES:
                return 0.0
            left = self._opened_at + OPEN_SECONDS - self.clock()
            if left > 0:
                return left
            if self._probing:
                return OPEN_SECONDS / 10
            self._probing = True
            return 0.0

    def succeeded(self) -> None:
        """The service has answered: close the circuit."""
        with self._lock:
            self.failures, self._probing = 0, False

    def failed(self) -> None:
        """The service did not answer, or with a fault of its own."""
        with self._lock:
            self.failures, self._probing = self.failures + 1, False
            self._opened_at = self.clock()

    def abandoned(self) -> None:
        """The caller has gone before there was an answer: nothing is known, and another call may be the probe."""
        with self._lock:
            self._probing = False


class Breakers:
    """The breakers of a process, by base URL of the service."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._breakers: dict[str, Breaker] = {}

    def of(self, url: str) -> Breaker:
        """Return the breaker of a service."""
        return self._breakers.setdefault(url, Breaker(self._clock))


SHARED: Final = Breakers()
"""Of all clients of this process that are given no others."""
