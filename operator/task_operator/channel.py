"""Life-cycle events to Redis' publish and subscribe. The only file that publishes to it."""

from collections.abc import Sequence
from typing import Final

import redis
import redis.asyncio

from task_contract.names import EVENTS_CHANNEL
from task_contract.redis_address import failures, open_redis, publish
from task_operator.cloud_events import Event, SinkUnavailable

_FAILURES: Final = failures(redis)


class RedisSink:
    """The channel ``tasks.zzdsj.io:events``: whoever subscribes hears of what happens, whoever does not misses it."""

    name = "redis"

    def __init__(self, url: str) -> None:
        self._redis: redis.asyncio.Redis = open_redis(redis.asyncio, url, socket_connect_timeout=5, socket_timeout=5)

    async def put(self, events: Sequence[Event]) -> None:
        """Publish in one request."""
        try:
            await publish(self._redis, EVENTS_CHANNEL, [event.body for event in events])
        except _FAILURES as error:
            raise SinkUnavailable(f"cannot publish to Redis: {error!r}") from error

    async def aclose(self) -> None:
        """Close the connection."""
        await self._redis.aclose()
