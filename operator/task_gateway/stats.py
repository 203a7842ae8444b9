"""Figures of the whole: the queue, what runs, how much ends how fast, and whether the stores answer.

They are counted in PostgreSQL, for the namespaces that the caller may list, and kept for a second, or for as long as keeps
counting below a twentieth of the time: on a million tasks they are older then, and say so.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, Protocol
from urllib.parse import urlsplit

import structlog
from aiohttp import web
from pydantic import Field

from task_contract.models import Phase, Priority
from task_gateway.callers import Callers, Scope
from task_gateway.database import DatabaseUnavailable
from task_gateway.models import Answer, Row
from task_gateway.routes import LIST_NAMESPACE, Route, answer, asked_namespace, caller_of

_log = structlog.get_logger(__name__)

KEEP: Final = 1.0  # seconds
_KEEP_LONGEST: Final = 30.0  # seconds
_KEEP_STORES: Final = 2.0  # seconds
_SHARE: Final = 20
_SCOPES: Final = 100
"""Of so many sets of namespaces figures are kept."""
_LOOK_SECONDS: Final = 1.5
_PERIODS: Final = {"1m": 60, "5m": 300, "1h": 3600}
_PORTS: Final = {"http": 80, "https": 443}

Check = Callable[[], Awaitable[None]]


class Counts(Protocol):
    """The part of :class:`task_gateway.database.Database` that is used."""

    async def unfinished(self, scope: Sequence[str] | None) -> Sequence[Row]: ...  # noqa: D102 - see there
    async def ended(self, scope: Sequence[str] | None, *, seconds: Sequence[int]) -> Sequence[Row]: ...  # noqa: D102


class Queue(Answer):
    """Tasks that wait."""

    total: int
    by_priority: dict[str, int]
    retrying: int
    """Of tasks that wait for their next attempt; not in the total."""
    oldest_seconds: Annotated[float, Field(ge=0)] | None
    """How long the one has waited that has waited longest; null when none does."""


class Workers(Answer):
    """What tasks run on."""

    kind: Literal["jobs"]
    """jobs: a Kubernetes Job is made for each attempt, so that no worker waits for work and idle is always 0."""
    busy: int
    idle: int


class Throughput(Answer):
    """What has ended lately."""

    completed: int
    failed: int
    canceled: int
    per_second: float
    """Tasks that ended, however they did."""
    success_rate: float | None
    """Completed of those that completed or failed, 0 to 1; null when none did."""
    average_seconds: float | None
    """From the first attempt's start to the end, of those that completed; null when none did."""


class StoreState(Answer):
    """Whether a server answers."""

    status: Literal["ok", "down", "off"]
    """off: the gateway is not told where it is."""
    milliseconds: float | None


class SystemStats(Answer):
    """Figures of the whole, for the namespaces that the caller may list."""

    namespaces: list[str] | None
    """null: all of the cluster."""
    queue: Queue | None
    """null, like the rest, while PostgreSQL does not answer."""
    running: int | None
    workers: Workers | None
    throughput: dict[str, Throughput] | None
    """By period: 1m, 5m, 1h."""
    stores: dict[str, StoreState]
    age_seconds: float
    """So old the figures are."""


@dataclass(slots=True)
class _Kept:
    figures: dict[str, Any] = field(default_factory=dict)
    at: float = float("-inf")
    keep: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Statistics:
    """GET /api/v1/stats/system."""

    def __init__(
        self,
        *,
        counts: Counts,
        callers: Callers,
        stores: Mapping[str, Check | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``stores``: asks each whether it answers, raising what is wrong; None: it is not used."""
        self._counts = counts
        self._callers = callers
        self._stores = stores
        self._clock = clock
        self._kept: OrderedDict[Scope, _Kept] = OrderedDict()
        self._stores_kept = _Kept()

    def routes(self) -> Sequence[Route]:
        """Return the operations."""
        return (
            Route(
                "GET",
                "/api/v1/stats/system",
                self._system,
                "Queue, throughput and health",
                {200: {"application/json": SystemStats}},
                problems=(422,),
                parameters=LIST_NAMESPACE,
                tag="service",
                description="Counted once a second at most; age_seconds says how old the figures are.",
            ),
        )

    async def _system(self, request: web.Request) -> web.Response:
        namespace = self._callers.namespace(*asked_namespace(request))
        scope = await self._callers.scope(caller_of(request), namespace)
        figures, stores = await asyncio.gather(self._figures(scope), self._store_states())
        return answer(
            {
                "namespaces": None if scope is None else list(scope),
                **figures.figures,
                "stores": stores.figures,
                "age_seconds": round(max(0.0, self._clock() - figures.at), 3),
            }
        )

    async def _figures(self, scope: Scope) -> _Kept:
        kept = self._kept.setdefault(scope, _Kept())
        self._kept.move_to_end(scope)
        if len(self._kept) > _SCOPES:
            self._kept.popitem(last=False)
        return await self._fresh(kept, lambda: self._count(scope))

    async def _store_states(self) -> _Kept:
        async def look() -> dict[str, Any]:
            found = await asyncio.gather(*(_state(check) for check in self._stores.values()))
            return dict(zip(self._stores, found, strict=True))

        return await self._fresh(self._stores_kept, look, longest=_KEEP_STORES)

    async def _fresh(
        self, kept: _Kept, ask: Callable[[], Awaitable[dict[str, Any]]], *, longest: float = _KEEP_LONGEST
    ) -> _Kept:
        """Ask if what is kept is too old. Whoever comes meanwhile waits for the same answer."""
        async with kept.lock:
            began = self._clock()
            if began - kept.at >= kept.keep:
                kept.figures = await ask()
                kept.at = self._clock()
                kept.keep = min(longest, max(KEEP, _SHARE * (kept.at - began)))
        return kept

    async def _count(self, scope: Scope) -> dict[str, Any]:
        try:
            unfinished = await self._counts.unfinished(scope)
            ended = await self._counts.ended(scope, seconds=list(_PERIODS.values()))
        except DatabaseUnavailable as error:
            _log.warning("cannot count tasks", error=str(error))
            return dict.fromkeys(("queue", "running", "workers", "throughput"))
        return figures(unfinished, ended)


def figures(unfinished: Sequence[Row], ended: Sequence[Row]) -> dict[str, Any]:
    """Return the figures that the counts give: ``unfinished`` by phase and priority, ``ended`` by period."""
    queued = [row for row in unfinished if row["phase"] == Phase.QUEUED]
    by_priority = {str(priority): 0 for priority in Priority}
    for row in queued:
        by_priority[row["priority"]] = by_priority.get(row["priority"], 0) + row["tasks"]
    running = sum(row["tasks"] for row in unfinished if row["phase"] == Phase.PROCESSING)
    by_period = {row["seconds"]: row for row in ended}
    return {
        "queue": {
            "total": sum(by_priority.values()),
            "by_priority": by_priority,
            "retrying": sum(row["tasks"] for row in unfinished if row["phase"] == Phase.RETRYING),
            "oldest_seconds": max((max(0.0, row["oldest"]) for row in queued), default=None),
        },
        "running": running,
        "workers": {"kind": "jobs", "busy": running, "idle": 0},
        "throughput": {name: _throughput(by_period[seconds], seconds) for name, seconds in _PERIODS.items()},
    }


def _throughput(row: Row, seconds: int) -> dict[str, Any]:
    completed, failed, canceled = row["completed"], row["failed"], row["canceled"]
    judged = completed + failed
    return {
        "completed": completed,
        "failed": failed,
        "canceled": canceled,
        "per_second": round((judged + canceled) / seconds, 4),
        "success_rate": round(completed / judged, 4) if judged else None,
        "average_seconds": None if row["ran"] is None else round(row["ran"], 3),
    }


async def _state(check: Check | None) -> dict[str, Any]:
    if check is None:
        return {"status": "off", "milliseconds": None}
    began = time.perf_counter()
    try:
        async with asyncio.timeout(_LOOK_SECONDS):
            await check()
    except Exception as error:  # noqa: BLE001 - whatever it is, the server does not work
        _log.warning("a store does not answer", error=repr(error))
        return {"status": "down", "milliseconds": None}
    return {"status": "ok", "milliseconds": round(1000 * (time.perf_counter() - began), 1)}


def connects(url: str) -> Check:
    """Return a check that connects to the server of a URL, and says nothing to it."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 80)

    async def check() -> None:
        _, writer = await asyncio.open_connection(host, port)
        writer.close()

    return check
