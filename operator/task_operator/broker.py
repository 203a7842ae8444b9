"""Life-cycle events to RabbitMQ. The only file of the operator that speaks to it; imported where there is one."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Final

import aio_pika
from aio_pika.abc import AbstractConnection, AbstractExchange
from aiormq.exceptions import AMQPError

from task_operator.cloud_events import Event, SinkUnavailable

_CONNECT: Final = 10.0  # seconds
_CONFIRM: Final = 15.0  # seconds until RabbitMQ has confirmed what it was given
_CONTENT_TYPE: Final = "application/cloudevents+json"


class RabbitSink:
    """A durable topic exchange: routing key ``tasks.NAMESPACE.TYPE.STATUS``, persistent messages, publisher confirms.

    Messages that no queue is bound for are gone, as topic exchanges have it: bind a durable queue before they matter.
    """

    name = "rabbitmq"

    def __init__(self, url: str, *, exchange: str) -> None:
        self._url = url
        self._exchange_name = exchange
        self._connection: AbstractConnection | None = None
        self._exchange: AbstractExchange | None = None

    async def put(self, events: Sequence[Event]) -> None:
        """Publish, and wait until RabbitMQ has confirmed each. After a failure the connection is made anew."""
        try:
            exchange = await self._connected()
            async with asyncio.timeout(_CONFIRM):
                await asyncio.gather(*(self._publish(exchange, event) for event in events))
        except (AMQPError, OSError, TimeoutError, RuntimeError) as error:
            await self.aclose()
            raise SinkUnavailable(f"cannot publish to RabbitMQ: {error!r}") from error

    async def _publish(self, exchange: AbstractExchange, event: Event) -> None:
        message = aio_pika.Message(
            event.body,
            message_id=event.id,
            content_type=_CONTENT_TYPE,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        await exchange.publish(message, routing_key=event.routing_key, mandatory=False)

    async def _connected(self) -> AbstractExchange:
        if self._exchange is None:
            # Not the robust connection: who loses this one has to give the same events again.
            self._connection = await aio_pika.connect(self._url, timeout=_CONNECT)
            channel = await self._connection.channel(publisher_confirms=True)
            self._exchange = await channel.declare_exchange(
                self._exchange_name, aio_pika.ExchangeType.TOPIC, durable=True, timeout=_CONNECT
            )
        return self._exchange

    async def aclose(self) -> None:
        """Close the connection."""
        connection, self._connection, self._exchange = self._connection, None, None
        if connection is not None:
            with contextlib.suppress(AMQPError, OSError, TimeoutError, RuntimeError):
                async with asyncio.timeout(2):
                    await connection.close()
