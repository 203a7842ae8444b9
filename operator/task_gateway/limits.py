"""How much a caller may ask for: a token bucket each, kept in this replica alone.

A request is let in while the bucket holds anything, and takes what it costs even below zero: a batch is never too large to
be let in, and is paid for by waiting after it.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

_CALLERS: Final = 10_000


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class RateLimit:
    """Buckets by key. The least recently used go when there are too many: a bucket that is not used is full by then."""

    def __init__(
        self, *, rate: float, burst: float, most: int = _CALLERS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``rate``: tokens a second; ``burst``: size of a bucket; ``most``: how many buckets are kept."""
        self._rate = rate
        self._burst = burst
        self._most = most
        self._clock = clock
        self._buckets: OrderedDict[Hashable, _Bucket] = OrderedDict()

    def wait(self, key: Hashable) -> float:
        """Return for how many seconds the bucket is empty; 0 when a request may come now. Takes nothing."""
        bucket = self._filled(key)
        return 0.0 if bucket is None or bucket.tokens > 0 else (1e-9 - bucket.tokens) / self._rate

    def take(self, key: Hashable, cost: float = 1) -> float:
        """Take the cost of a request, and return 0; or, when the bucket is empty, nothing, and the seconds to wait."""
        if (wait := self.wait(key)) > 0:
            return wait
        self.charge(key, cost)
        return 0.0

    def charge(self, key: Hashable, cost: float) -> None:
        """Take more for a request that is under way."""
        bucket = self._filled(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(tokens=self._burst, at=self._clock())
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        bucket.tokens -= cost
        self._buckets.move_to_end(key)

    def _filled(self, key: Hashable) -> _Bucket | None:
        bucket = self._buckets.get(key)
        if bucket is not None:
            now = self._clock()
            bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.at) * self._rate)
            bucket.at = now
        return bucket
