"""The queues of worker pools in Redis, as the operator uses them. The only file of it that speaks to them.

Everything here may be repeated, and all of it lost: see :mod:`task_contract.leases`.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

import redis
import redis.asyncio
import structlog
from pydantic import ValidationError
from redis.asyncio import Redis

from task_contract.leases import (
    DISMISS,
    DRAIN,
    LOOK,
    OFFER,
    STREAM_OF,
    WITHDRAW,
    PoolKeys,
    PoolReport,
    ReportKind,
    WorkerState,
)
from task_contract.models import Priority
from task_contract.redis_address import failures, open_redis, takes_everything_in_pipelines

_FAILURES: Final = failures(redis)
_log = structlog.get_logger(__name__)
T = TypeVar("T")

_TIMEOUT: Final = 5.0  # seconds
_BLOCK: Final = 1_000  # milliseconds that a read of reports waits
_REPORTS: Final = 200  # of one read


class QueueUnavailable(Exception):
    """Redis cannot be used at the moment."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A task as it is offered to a pool."""

    uid: str
    namespace: str
    name: str
    attempt: int
    stamp: str
    """Its stay in the queue."""
    priority: str
    rank: float
    """Where it stands in line: seconds since the epoch, lower goes first."""
    task: str
    """As JSON: what a pod reads as its task."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker that has been heard of."""

    state: WorkerState
    silent: float
    """Seconds since it last renewed."""


@dataclass(frozen=True, slots=True)
class Look:
    """What there is of a pool in Redis."""

    expired: int
    """Leases that have just run out; each has a report."""
    leased: int
    waiting: Mapping[str, int]
    """By priority: tasks that no worker has taken yet."""
    uids: frozenset[str]
    """All tasks that are there, taken or not."""
    workers: Mapping[str, Worker]
    """By name of the pod."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A report, and its number: it stays until :meth:`PoolQueue.settle`."""

    number: str
    report: PoolReport


class PoolQueue:
    """Redis, of all pools. Methods raise :class:`QueueUnavailable`."""

    def __init__(self, url: str) -> None:
        # Reports are waited for on a connection of their own, which a read blocks for longer than others may take.
        self._redis: Redis = open_redis(
            redis.asyncio,
            url,
            decode_responses=True,
            socket_connect_timeout=_TIMEOUT,
            socket_timeout=_TIMEOUT,
            health_check_interval=30,
        )
        self._scripts = {text: self._redis.register_script(text) for text in (OFFER, LOOK, WITHDRAW, DRAIN, DISMISS)}

    async def aclose(self) -> None:
        """Close all connections."""
        await self._redis.aclose()

    async def offer(self, keys: PoolKeys, offers: Sequence[Offer], *, now: datetime) -> list[bool]:
        """Put tasks into a pool's queue in one request, in a cluster one by one; return for each whether it was not there
        yet."""
        calls: list[list[str | float]] = [
            [STREAM_OF[Priority(one.priority)], one.uid, one.attempt, one.stamp, one.rank, now.isoformat(), one.task]
            for one in offers
        ]
        if not takes_everything_in_pipelines(self._redis):
            return [bool(await self._run(OFFER, keys, values)) for values in calls]
        async with self._redis.pipeline(transaction=False) as pipeline:
            for values in calls:
                await self._scripts[OFFER](keys.all, values, client=pipeline)
            return [bool(new) for new in await _answered(pipeline.execute())]

    async def withdraw(self, keys: PoolKeys, uid: str) -> str | None:
        """Take a task out of a pool, whoever has it; return the worker that is told to stop."""
        return str(await self._run(WITHDRAW, keys, [uid])) or None

    async def look(self, keys: PoolKeys, *, lease: timedelta, now: datetime) -> Look:
        """End leases that have run out, and return what there is."""
        milliseconds = int(lease / timedelta(milliseconds=1))
        expired, leased, waiting, uids, flat, second = await self._run(LOOK, keys, [milliseconds, now.isoformat()])
        workers = {}
        for name, text in zip(flat[::2], flat[1::2], strict=True):
            at, _, state = text.partition("|")
            try:
                workers[name] = Worker(WorkerState.model_validate_json(state), float(second) - float(at))
            except ValidationError as error:  # of another release
                _log.warning("cannot read the state of a worker", worker=name, error=str(error))
        by_priority = {str(priority): waiting[number - 1] for priority, number in STREAM_OF.items()}
        return Look(expired, leased, by_priority, frozenset(uids), workers)

    async def drain(self, keys: PoolKeys, workers: Sequence[str]) -> None:
        """Have these workers end when they have finished what they have, and no others."""
        await self._run(DRAIN, keys, list(workers))

    async def dismiss(self, keys: PoolKeys, workers: Sequence[str]) -> None:
        """Forget workers whose pods are gone."""
        await self._run(DISMISS, keys, list(workers))

    async def drop(self, keys: PoolKeys) -> None:
        """Remove everything of a pool that is gone."""
        await _answered(self._redis.delete(*keys.all))

    async def reports(self, keys: PoolKeys, *, after: str = "0-0") -> AsyncGenerator[list[Heard], None]:
        """Yield what workers report, from the first report that is still there, as it comes; never ends by itself.

        An empty list says that everything was yielded which had been reported when it was asked for.
        """
        block: int | None = None  # until it is known what there is
        while True:
            answer: Any = await _answered(self._redis.xread({keys.reports: after}, count=_REPORTS, block=block))
            entries = [entry for _, found in answer or () for entry in found]
            if entries:
                after = entries[-1][0]
                yield [Heard(number, report) for number, values in entries if (report := _report(keys, values)) is not None]
            if len(entries) < _REPORTS:
                block = _BLOCK
                yield []

    async def settle(self, keys: PoolKeys, numbers: Sequence[str]) -> None:
        """Remove reports: what they say stands in the tasks' statuses, or matters no more."""
        if numbers:
            await _answered(self._redis.xdel(keys.reports, *numbers))

    async def _run(self, script: str, keys: PoolKeys, arguments: Sequence[Any]) -> Any:
        return await _answered(self._scripts[script](keys.all, list(arguments)))


def _report(keys: PoolKeys, values: Mapping[str, str]) -> PoolReport | None:
    """Read a report, or the notice of a lease that ran out; None for what cannot be read."""
    try:
        if "report" in values:
            return PoolReport.model_validate_json(values["report"])
        return PoolReport.model_validate(
            {
                "kind": ReportKind.EXPIRED,
                "uid": values["expired"],
                "namespace": keys.namespace,
                "name": "",
                "attempt": values["attempt"],
                "stamp": values["stamp"],
                "worker": values["worker"],
                "offered_at": values["at"],
                "finished_at": values["now"],
            }
        )
    except (ValidationError, KeyError) as error:  # of another release
        _log.warning("cannot read a report", pool=f"{keys.namespace}/{keys.pool}", error=str(error))
        return None


async def _answered(request: Awaitable[T]) -> T:
    try:
        answer = await request
    except _FAILURES as error:
        _stop_if_canceled()
        raise QueueUnavailable(f"cannot use Redis: {str(error) or type(error).__name__}") from error
    _stop_if_canceled()
    return answer


def _stop_if_canceled() -> None:
    """Raise the cancellation that the client has swallowed: else a loop of this process would go on without its leader."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
