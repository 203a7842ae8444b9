"""Life-cycle events to Redis' publish and subscribe. The only file that publishes to it."""

from collections.abc import Sequence

from redis.asyncio import Redis
from redis.exceptions import RedisError

from task_contract.names import EVENTS_CHANNEL
from task_operator.cloud_events import Event, SinkUnavailable


class RedisSink:
    """The channel ``tasks.zzdsj.io:events``: whoever subscribes hears of what happens, whoever does not misses it."""

    name = "redis"

    def __init__(self, url: str) -> None:
        self._redis: Redis = Redis.from_url(url, socket_connect_timeout=5, socket_timeout=5)

    async def put(self, events: Sequence[Event]) -> None:
        """Publish in one request."""
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for event in events:
                    pipeline.publish(EVENTS_CHANNEL, event.body)
                await pipeline.execute()
        except (RedisError, OSError, TimeoutError) as error:
            raise SinkUnavailable(f"cannot publish to Redis: {error!r}") from error

    async def aclose(self) -> None:
        """Close the connection."""
        await self._redis.aclose()
