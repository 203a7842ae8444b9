"""Live progress to Redis, for whoever watches. It may be lost: a Redis that is absent, slow or gone never harms a task."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Protocol, Self

import structlog

from task_contract.messages import progress_event
from task_contract.models import ProcessingTask, Stage
from task_contract.names import PROGRESS_CHANNEL
from task_contract.redis_address import open_redis

_INTERVAL: Final = 0.25
"""Seconds between two messages: four a second at most, however fast the work goes."""
_SEND_TIMEOUT: Final = 1.0
_REST_AFTER_FAILURE: Final = 5.0

log = structlog.get_logger(__name__)


class Progress(Protocol):
    """Takes how far the work has come. Never blocks, never raises."""

    def report(self, stage: Stage, percent: int, *, counted: tuple[int, int] | None = None) -> None:
        """Say that ``stage`` is under way and ``percent`` of the whole attempt is done; of a batch (done, total) as well."""


class SilentProgress:
    """Progress that nobody watches."""

    def report(self, stage: Stage, percent: int, *, counted: tuple[int, int] | None = None) -> None:
        """Say nothing."""


class RedisProgress:
    """Publishes the latest report, in the background; an asynchronous context manager that sends the last one at its end."""

    def __init__(self, url: str, *, task: ProcessingTask, uid: str, attempt: int) -> None:
        self._url = url
        self._task = task
        self._uid = uid
        self._attempt = attempt
        self._latest: tuple[Stage, int, tuple[int, int] | None] | None = None
        self._changed = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None
        self._client: Any = None
        self._complained = False
        self._closing = False

    async def __aenter__(self) -> Self:
        self._sender = asyncio.create_task(self._send_all())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        if self._sender is not None:
            # A cancellation can be lost in the client's own timeout (Python before 3.11.3): the flag ends the loop then, and
            # nobody waits for longer than one message may take.
            self._sender.cancel()
            await asyncio.wait({self._sender}, timeout=2 * _SEND_TIMEOUT)
        if self._changed.is_set():
            await self._send()
        if self._client is not None:
            await self._quietly(self._client.aclose)

    def report(self, stage: Stage, percent: int, *, counted: tuple[int, int] | None = None) -> None:
        """Keep the report until it is sent or a later one takes its place."""
        if (stage, percent, counted) != self._latest:
            self._latest = stage, percent, counted
            self._changed.set()

    async def _send_all(self) -> None:
        while not self._closing:
            await self._changed.wait()
            sent = await self._send()
            await asyncio.sleep(_INTERVAL if sent else _REST_AFTER_FAILURE)

    async def _send(self) -> bool:
        self._changed.clear()
        if self._latest is None:
            return True
        stage, percent, counted = self._latest
        message = progress_event(
            uid=self._uid,
            namespace=self._task.metadata.namespace,
            name=self._task.metadata.name,
            attempt=self._attempt,
            stage=stage,
            progress=percent,
            at=datetime.now(UTC),
            counted=counted,
        )
        return await self._quietly(lambda: self._publish(message))

    async def _publish(self, message: str) -> None:
        if self._client is None:
            import redis.asyncio

            self._client = open_redis(
                redis.asyncio, self._url, socket_timeout=_SEND_TIMEOUT, socket_connect_timeout=_SEND_TIMEOUT
            )
        await self._client.publish(PROGRESS_CHANNEL, message)

    async def _quietly(self, call: Callable[[], Awaitable[object]]) -> bool:
        """Call; return whether it worked. The first failure is logged, the others are the same."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(2 * _SEND_TIMEOUT):
                await call()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with Redis, the task goes on
            if not self._complained:
                self._complained = True
                log.warning("progress is not published", error=str(error), seconds=round(time.monotonic() - started, 3))
            return False
        return True
