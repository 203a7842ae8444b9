"""Live progress from Redis. What it carries may be lost: nothing but a percentage in the status depends on it."""

import asyncio
from collections.abc import Callable
from typing import Final

import redis
import redis.asyncio
import structlog
from pydantic import ValidationError

from task_contract.messages import ProgressEvent
from task_contract.names import PROGRESS_CHANNEL
from task_contract.redis_address import failures, open_redis, subscribed

_FAILURES: Final = failures(redis)
_log = structlog.get_logger(__name__)
_MAX_BACKOFF: Final = 30.0  # seconds
_SILENCE: Final = 15.0  # seconds without a message before a ping asks whether Redis is still there


class ProgressFeed:
    """Subscribes to the progress channel and hands each event on; comes back after every loss of the connection."""

    def __init__(self, url: str, *, sink: Callable[[ProgressEvent], None]) -> None:
        self._redis: redis.asyncio.Redis = open_redis(
            redis.asyncio, url, socket_connect_timeout=5, health_check_interval=_SILENCE
        )
        self._sink = sink

    async def run(self) -> None:
        """Listen until cancelled."""
        wait = 1.0
        while True:
            try:
                async with subscribed(self._redis, PROGRESS_CHANNEL) as subscription:
                    wait = 1.0
                    while True:
                        # With a timeout, so that the health check notices a peer that is gone without a word.
                        message = await subscription.get_message(ignore_subscribe_messages=True, timeout=_SILENCE)
                        if message is not None:
                            self._handle(message["data"])
            except _FAILURES as error:
                _log.warning("cannot follow progress in Redis; status shows none until it is back", error=repr(error))
                await asyncio.sleep(wait)
                wait = min(2 * wait, _MAX_BACKOFF)

    async def ping(self) -> None:
        """Ask whether Redis answers. Raises what is wrong."""
        await self._redis.ping()

    async def aclose(self) -> None:
        """Close the connection."""
        await self._redis.aclose()

    def _handle(self, data: bytes | str) -> None:
        try:
            event = ProgressEvent.model_validate_json(data)
        except ValidationError as error:
            _log.warning("ignoring a progress message that is none", error=str(error))
            return
        self._sink(event)
