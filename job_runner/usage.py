"""What an attempt costs: processor, memory, tokens, stores. Measured in the process that works on it.

Who computes or asks says so here (:func:`embedded`, :func:`asked`, :func:`spent`), without knowing who listens: the meter of
the attempt that this task or thread works for, if any. Its figures become a row of ``task_usage``, from which the operator
makes metrics: a pod is gone before Prometheus could ask it (ADR 0050).
"""

import asyncio
import contextlib
import math
import resource
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final
from uuid import UUID

from task_contract.messages import Outcome
from task_contract.models import ProcessingTask, Stage

_SAMPLE_SECONDS: Final = 1.0
"""Between two looks at the memory, of 0.1 ms each; what comes and goes in between is in the peak of the kernel alone."""
_FRESH_SECONDS: Final = 0.05
"""So long a look at the memory holds where attempts of a worker begin and end one after the other: many last no longer."""
_CGROUPS: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used until now."""

    seconds: float
    cpu_seconds: float
    """Of this process and of children that have ended."""
    memory_byte_seconds: float
    memory_peak_bytes: int
    tokens: int
    texts: int
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage."""
    stores: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Requests and their seconds by store, waiting for a busy one included."""


@dataclass(frozen=True, slots=True)
class Used:
    """What a process has used for an attempt, and which attempt that was."""

    task: ProcessingTask
    uid: UUID
    attempt: int
    holder: str
    outcome: Outcome
    usage: Usage


class Meter:
    """What one attempt uses."""

    def __init__(self, *, since: float | None = None) -> None:
        """``since``: the monotonic time at which this process began, all of which belongs to the attempt."""
        self.since = since
        self.began = self.seconds = 0.0
        self.cpu_seconds = self.byte_seconds = 0.0
        self.peak = 0
        self._lock = threading.Lock()
        self._tokens = self._texts = 0
        self._stages: dict[str, float] = {}
        self._stores: dict[str, tuple[int, float]] = {}

    def embedded(self, *, texts: int, tokens: int) -> None:
        """Count texts that are embedded."""
        with self._lock:
            self._texts += texts
            self._tokens += tokens

    def spent(self, stage: Stage, seconds: float) -> None:
        """Count time of a stage."""
        with self._lock:
            self._stages[str(stage)] = self._stages.get(str(stage), 0.0) + seconds

    def asked(self, store: str, seconds: float) -> None:
        """Count a request to a store."""
        with self._lock:
            number, before = self._stores.get(store, (0, 0.0))
            self._stores[store] = (number + 1, before + seconds)

    @property
    def usage(self) -> Usage:
        """What was used."""
        with self._lock:
            return Usage(
                seconds=round(self.seconds, 3),
                cpu_seconds=round(self.cpu_seconds, 3),
                memory_byte_seconds=round(self.byte_seconds),
                memory_peak_bytes=self.peak,
                tokens=self._tokens,
                texts=self._texts,
                stages={stage: round(spent, 3) for stage, spent in self._stages.items()},
                stores={store: (number, round(spent, 4)) for store, (number, spent) in self._stores.items()},
            )


class Process:
    """Shares out what this process uses among the attempts that it works on: at each moment all have the same part.

    Of a process with one attempt that is exact. What a worker uses while it has none belongs to nobody.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] | None = None,
        memory: Callable[[], int] | None = None,
    ) -> None:
        self._clock = clock
        self._cpu = cpu or _cpu_seconds
        self._look = memory or _memory
        self._meters: list[Meter] = []
        self._at = self._spent = 0.0
        self._memory = 0
        self._looked_at = -math.inf
        self._sampling: asyncio.Task[None] | None = None

    def begin(self, meter: Meter) -> None:
        """Let an attempt have its part from now on."""
        self.share()
        meter.began = self._at
        if not self._meters and not self._fresh:
            self._memory, self._looked_at = self._look(), self._at
        if meter.since is not None:
            meter.began = meter.since
            meter.cpu_seconds = self._spent
            meter.byte_seconds = (self._at - meter.since) * self._memory / 2  # it has grown to that from nothing
        self._meters.append(meter)
        meter.peak = self._memory

    def end(self, meter: Meter) -> None:
        """Let an attempt have no part any more."""
        self.share() if self._fresh else self.sample()
        self._meters.remove(meter)
        if meter.since is not None:
            meter.peak = max(meter.peak, _peak())
        meter.seconds = self._at - meter.began

    @property
    def _fresh(self) -> bool:
        return self._clock() - self._looked_at < _FRESH_SECONDS

    def share(self) -> None:
        """Give each attempt its part of what was used since the last time."""
        now, spent = self._clock(), self._cpu()
        for meter in self._meters:
            meter.cpu_seconds += (spent - self._spent) / len(self._meters)
            meter.byte_seconds += (now - self._at) * self._memory / len(self._meters)
        self._at, self._spent = now, spent

    def sample(self) -> None:
        """Look at the memory; between two looks it was as much as their mean."""
        now = self._look()
        self._memory = (self._memory + now) // 2
        self.share()
        self._memory, self._looked_at = now, self._at
        for meter in self._meters:
            meter.peak = max(meter.peak, now)

    @contextlib.asynccontextmanager
    async def metered(self, meter: Meter) -> AsyncIterator[None]:
        """Have everything that is begun within count on this meter."""
        token = _meter.set(meter)
        self.begin(meter)
        if self._sampling is None or self._sampling.done():
            self._sampling = asyncio.create_task(self._sample_while_needed(), name="memory")
        try:
            yield
        finally:
            self.end(meter)
            _meter.reset(token)

    async def _sample_while_needed(self) -> None:
        while self._meters:
            await asyncio.sleep(_SAMPLE_SECONDS)
            self.sample()


_meter: ContextVar[Meter] = ContextVar("meter")


def embedded(*, texts: int, tokens: int) -> None:
    """Say that texts are embedded."""
    if (meter := _meter.get(None)) is not None:
        meter.embedded(texts=texts, tokens=tokens)


def spent(stage: Stage, seconds: float) -> None:
    """Say that a stage took so long."""
    if (meter := _meter.get(None)) is not None:
        meter.spent(stage, seconds)


@contextlib.contextmanager
def asked(store: str) -> Iterator[None]:
    """Say that a store is being asked; its refusals count too."""
    if (meter := _meter.get(None)) is None:
        yield
        return
    began = time.monotonic()
    try:
        yield
    finally:
        meter.asked(store, time.monotonic() - began)


# ------------------------------------------------------------------------------------------------------------ the kernel


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _memory() -> int:
    """Return bytes: of the container without files that the kernel may drop, as the kubelet counts; else of this process."""
    try:
        folder = _cgroup()
        used = int((folder / "memory.current").read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, used - int(statistics.get("inactive_file", "0")))
    except (OSError, ValueError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    """Return bytes: the most that this process, or one of its children, has held, for however short a time."""
    found = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(found) * 1024  # Linux counts in KiB


@cache
def _cgroup() -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::/"):
            return _CGROUPS / line.removeprefix("0::/")
    raise OSError("no unified hierarchy of cgroups")


PROCESS: Final = Process()
"""This one."""
