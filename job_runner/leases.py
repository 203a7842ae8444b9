"""The leases of a worker in Redis, by the scripts of :mod:`task_contract.leases`. The only file that speaks to it of them.

Everything may be repeated, and is after an answer that did not come. One answer must not get lost: tasks that were taken in
a call that failed are ours, and nobody works on them. They are looked for before more are taken.
"""

import random
from collections.abc import AsyncIterator, Awaitable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeVar

import redis
import redis.asyncio
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.retry import Retry as BlockingRetry

from task_contract.leases import GROUP, RENEW, REPORT, TAKE, PoolKeys, PoolReport, WorkerState
from task_contract.names import PROGRESS_CHANNEL
from task_contract.redis_address import failures, open_redis, publish, subscribed

_FAILURES: Final = failures(redis)
T = TypeVar("T")

_TIMEOUT: Final = 5.0  # seconds
_LONGEST_WAIT: Final = 5.0  # seconds for which Redis may have nothing to say to who listens
_LAST_WORDS_TIMEOUT: Final = 2.0  # seconds
_LOOKED_AT: Final = 10
"""New entries of a stream that one wait may bring: each wakes a waiting worker once."""
_REPORTS: Final = 200  # of one call


class QueueUnavailable(Exception):
    """Redis cannot be used at the moment."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A task that this worker has."""

    stream: int
    entry: str
    """Its number in the stream: another lease of the same task has another one."""
    uid: str
    attempt: int
    stamp: str
    """The stay in the queue, for the operator."""
    offered_at: datetime
    task: str
    """As JSON."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """What a worker hears when it says that it is alive."""

    draining: bool
    """Whether it is to end when it has finished what it has."""
    lost: frozenset[str]
    """Uids of tasks of which it has no lease any more."""


class Backoff:
    """Growing pauses between tries, each shortened by up to a half at random."""

    def __init__(self, *, first: float = 0.05, longest: float = 2.0) -> None:
        self._first = first
        self._longest = longest
        self._pause = first

    def pause(self) -> float:
        """Return the next one, in seconds."""
        pause, self._pause = self._pause, min(2 * self._pause, self._longest)
        return pause * random.uniform(0.5, 1)  # noqa: S311 - it spreads load, it hides nothing

    def reset(self) -> None:
        """Begin anew after a success."""
        self._pause = self._first


class Leases:
    """Redis, for one worker of one pool. Methods raise :class:`QueueUnavailable`."""

    def __init__(self, url: str, keys: PoolKeys, worker: str) -> None:
        self._url = url
        self._keys = keys
        self._all = keys.all
        self._worker = worker
        # No retries of the client's own: a repeated TAKE would take twice.
        options: dict[str, Any] = {
            "decode_responses": True,
            "socket_connect_timeout": _TIMEOUT,
            "retry": Retry(NoBackoff(), 0),
            "health_check_interval": 30,
        }
        self._redis: Redis = open_redis(redis.asyncio, url, socket_timeout=_TIMEOUT, **options)
        self._listening: Redis = open_redis(redis.asyncio, url, socket_timeout=_LONGEST_WAIT + _TIMEOUT, **options)
        self._scripts = {text: self._redis.register_script(text) for text in (TAKE, RENEW, REPORT)}
        self._seen: dict[str, str] | None = None
        self._in_doubt = False

    async def aclose(self) -> None:
        """Close all connections."""
        await self._redis.aclose()
        await self._listening.aclose()

    async def take(self, most: int, *, held: Collection[tuple[int, str]]) -> list[Lease]:
        """Take tasks; none is there, or the worker is to drain, when there are none. ``held``: streams and entries that it
        has.

        Call it until it returns fewer than asked for, and only then :meth:`wait`.
        """
        if self._seen is None:  # before the first look: what is offered after it wakes who waits
            self._seen = await self._ends()
        if found := await self.forgotten(held):
            return found
        try:
            taken = await self._run(TAKE, [self._worker, most])
        except BaseException:  # also when canceled: the answer may be on its way
            self._in_doubt = True
            self._seen = None
            raise
        return [_lease(*fields) for fields in taken]

    async def _ends(self) -> dict[str, str]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for stream in self._keys.streams:
                pipeline.xrevrange(stream, count=1)
            found = await _answered(pipeline.execute())
        return {stream: last[0][0] if last else "0-0" for stream, last in zip(self._keys.streams, found, strict=True)}

    async def forgotten(self, held: Collection[tuple[int, str]]) -> list[Lease]:
        """Return leases that this worker has and does not know of, since an answer was lost. Nothing is changed by that."""
        if not self._in_doubt:
            return []
        found = []
        for number, stream in enumerate(self._keys.streams, start=1):
            try:
                pending: Any = await _answered(self._redis.xpending_range(stream, GROUP, "-", "+", 1000, self._worker))
            except QueueUnavailable as error:
                if "NOGROUP" in str(error):
                    continue
                raise
            for entry in (one["message_id"] for one in pending):
                if (number, entry) in held:
                    continue
                read: Any = await _answered(self._redis.xrange(stream, entry, entry))
                for _, values in read:
                    task = values.get("task") or await _answered(self._redis.hget(self._keys.large, values["uid"]))
                    if task:
                        one = values["uid"], values["attempt"], values["stamp"], values["at"]
                        found.append(_lease(number, entry, *one, task))
        self._in_doubt = False
        return found

    async def wait(self, seconds: float) -> None:
        """Wait until there may be something to take, so long at most."""
        seen: dict[Any, Any] | None = self._seen
        if seen is None:
            return
        # Not by the group: reading by it takes. An entry that another worker takes meanwhile wakes this one once.
        answer: Any = await _answered(self._listening.xread(seen, count=_LOOKED_AT, block=max(1, int(1000 * seconds))))
        for stream, entries in answer or ():
            seen[stream] = entries[-1][0]

    async def renew(self, state: WorkerState, leases: Sequence[Lease]) -> Renewed:
        """Say that the worker is alive and still has these."""
        arguments: list[Any] = [self._worker, state.model_dump_json(by_alias=True)]
        for lease in leases:
            arguments += lease.stream, lease.entry, lease.uid
        draining, lost = await self._run(RENEW, arguments)
        return Renewed(bool(draining), frozenset(lost))

    async def report(self, reports: Sequence[tuple[Lease, PoolReport]]) -> list[bool]:
        """Report; return for each whether it was taken: it is not where somebody else has the task by now."""
        taken: list[bool] = []
        for start in range(0, len(reports), _REPORTS):
            part = reports[start : start + _REPORTS]
            taken += [bool(one) for one in await self._run(REPORT, _reports(self._worker, part))]
        return taken

    def last_words(self, reports: Sequence[tuple[Lease, PoolReport]]) -> None:
        """Report from another thread while the event loop hangs. Blocks for seconds at most; raises nothing."""
        try:
            with open_redis(
                redis,
                self._url,
                socket_timeout=_LAST_WORDS_TIMEOUT,
                socket_connect_timeout=_LAST_WORDS_TIMEOUT,
                retry=BlockingRetry(NoBackoff(), 0),
            ) as client:
                client.eval(REPORT, len(self._all), *self._all, *_reports(self._worker, reports))
        except _FAILURES:
            pass  # the leases run out

    async def publish_progress(self, messages: Sequence[str]) -> None:
        """Tell how far tasks have come; may be lost."""
        await _answered(publish(self._redis, PROGRESS_CHANNEL, messages))

    async def control(self) -> AsyncIterator[str]:
        """Yield uids of tasks that were withdrawn, and ``drain``, as they come; "" once it listens."""
        with _explained():
            async with subscribed(self._listening, self._keys.control) as channel:
                while True:
                    message = await channel.get_message(timeout=_LONGEST_WAIT)
                    if message is not None:
                        yield str(message["data"]) if message["type"] == "message" else ""

    async def _run(self, script: str, arguments: Sequence[Any]) -> Any:
        return await _answered(self._scripts[script](self._all, list(arguments)))


def _lease(stream: int, entry: str, uid: str, attempt: str, stamp: str, offered_at: str, task: str) -> Lease:
    return Lease(int(stream), entry, uid, int(attempt), stamp, datetime.fromisoformat(offered_at), task)


def _reports(worker: str, reports: Sequence[tuple[Lease, PoolReport]]) -> list[str]:
    arguments = [worker]
    for lease, report in reports:
        said = report.model_dump_json(by_alias=True, exclude_none=True)
        arguments += str(report.kind), str(lease.stream), lease.entry, lease.uid, said
    return arguments


async def _answered(request: Awaitable[T]) -> T:
    with _explained():
        return await request


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        raise QueueUnavailable(f"cannot use Redis: {str(error) or type(error).__name__}") from error
