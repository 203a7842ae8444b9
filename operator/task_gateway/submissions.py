"""Tasks through a queue of RabbitMQ: each message is the body of POST /api/v1/tasks. No other file here speaks to it.

A message is acknowledged after the API server has stored its task. Whoever dies before leaves it to another replica, which
finds the task there: its name follows from the id of the message. What can never become a task goes to the queue of dead
letters, with the reason in its headers, before it is acknowledged. While the cluster does not answer messages stay in the
queue: each replica holds no more of them than it works on.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, Final, Protocol

import aio_pika
import structlog
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aiormq.exceptions import AMQPError

from task_gateway.callers import Caller, Callers
from task_gateway.metrics import Metrics
from task_gateway.models import TaskRequest, parse_task
from task_gateway.problems import Problem
from task_gateway.routes import parse_json

_log = structlog.get_logger(__name__)

DEAD: Final = ".dead"
"""Queue of dead letters: the name of the queue and this."""
_MOST_BYTES: Final = 262_144
_CONNECT: Final = 10.0  # seconds
_CONFIRM: Final = 15.0  # seconds
_MAX_WAIT: Final = 30.0  # seconds
_KEY: Final = 128  # characters of an idempotency key
_PASSING: Final = frozenset({408, 429, 503})
"""Statuses of problems that are not the message's."""


class Creator(Protocol):
    """The part of :class:`task_gateway.tasks.Tasks` that is used."""

    async def create(  # noqa: D102 - see there
        self, wanted: TaskRequest, *, caller: Caller, namespace: str, annotations: Mapping[str, str] | None = None
    ) -> tuple[dict[str, Any], bool]: ...


class Submissions:
    """Makes tasks of messages until cancelled."""

    def __init__(
        self,
        url: str,
        *,
        queue: str,
        caller: Caller,
        tasks: Creator,
        callers: Callers,
        metrics: Metrics,
        prefetch: int = 16,
    ) -> None:
        """``caller``: whose rights the messages have; who may publish to the queue is for RabbitMQ to say."""
        self._url = url
        self._queue = queue
        self._caller = caller
        self._tasks = tasks
        self._callers = callers
        self._metrics = metrics
        self._prefetch = prefetch

    async def run(self) -> None:
        """Consume; come back after every loss of the connection."""
        wait = 1.0
        while True:
            connection = None
            try:
                connection = await aio_pika.connect(self._url, timeout=_CONNECT)
                async with asyncio.TaskGroup() as group:
                    channel = await self._consume(connection, group)
                    wait = 1.0
                    await channel.closed()  # as it is when the connection is
                    raise ConnectionResetError("RabbitMQ has closed the channel")
            except* (AMQPError, OSError, TimeoutError, RuntimeError) as errors:
                _log.warning("cannot take tasks from RabbitMQ; trying again", error=repr(errors.exceptions[0]), wait=wait)
            finally:
                if connection is not None:
                    with contextlib.suppress(AMQPError, OSError, TimeoutError, RuntimeError):
                        async with asyncio.timeout(2):
                            await connection.close()
            await asyncio.sleep(wait)
            wait = min(2 * wait, _MAX_WAIT)

    async def _consume(self, connection: aio_pika.abc.AbstractConnection, group: asyncio.TaskGroup) -> AbstractChannel:
        channel = await connection.channel(publisher_confirms=True)
        await channel.set_qos(prefetch_count=self._prefetch)
        await channel.declare_queue(self._queue + DEAD, durable=True, timeout=_CONNECT)
        queue = await channel.declare_queue(self._queue, durable=True, timeout=_CONNECT)

        async def take(message: AbstractIncomingMessage) -> None:
            group.create_task(self._handle(message, channel))

        await queue.consume(take)
        return channel

    async def _handle(self, message: AbstractIncomingMessage, channel: AbstractChannel) -> None:
        wait = 1.0
        while (problem := await self._outcome(message)) is not None and passes(problem):
            # The message stays where it is: a queue that is not emptied is how the sender learns of it.
            _log.warning("cannot create the task of a message; trying again", detail=problem.detail, wait=wait)
            await asyncio.sleep(wait)
            wait = min(2 * wait, _MAX_WAIT)
        if problem is not None:
            await self._bury(message, channel, problem)
        await message.ack()

    async def _outcome(self, message: AbstractIncomingMessage) -> Problem | None:
        """Create the task of a message; return why it cannot be."""
        try:
            await self._submit(message)
        except Problem as problem:
            return problem
        except Exception:  # noqa: BLE001 - a message that trips over a bug must not stop the others
            _log.exception("cannot handle a message", message=message.message_id)
            return Problem(500, "internal", "cannot create the task: a fault of the gateway; its log has it")
        return None

    async def _submit(self, message: AbstractIncomingMessage) -> None:
        """Create the task of a message, or find it. Raises :class:`Problem`."""
        if not message.message_id or len(message.message_id) > _KEY:
            raise Problem(
                422, "invalid-task", f"cannot create the task: the message needs a message_id of 1 to {_KEY} characters"
            )
        if len(message.body) > _MOST_BYTES:
            raise Problem(413, "too-large", f"cannot create the task: the message has more than {_MOST_BYTES} bytes")
        body = parse_json(message.body)
        if isinstance(body, dict):
            body = {"idempotency_key": message.message_id} | body
        wanted = parse_task(body)
        namespace = self._callers.namespace(wanted.namespace)
        await self._callers.check(self._caller, "create", namespace)
        manifest, replayed = await self._tasks.create(wanted, caller=self._caller, namespace=namespace)
        self._metrics.submissions.labels("repeated" if replayed else "accepted").inc()
        _log.info(
            "audit", action="queue", namespace=namespace, task=manifest["metadata"]["name"], message=message.message_id
        )

    async def _bury(self, message: AbstractIncomingMessage, channel: AbstractChannel, problem: Problem) -> None:
        """Put a message into the queue of dead letters, with the reason."""
        dead = aio_pika.Message(
            message.body,
            message_id=message.message_id,
            correlation_id=message.correlation_id,
            reply_to=message.reply_to,
            content_type=message.content_type,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            headers={"x-problem": f"{problem.kind}", "x-reason": problem.detail[:2000], "x-queue": self._queue},
        )
        async with asyncio.timeout(_CONFIRM):
            await channel.default_exchange.publish(dead, routing_key=self._queue + DEAD, mandatory=True)
        self._metrics.submissions.labels("refused").inc()
        _log.warning("a message is no task", message=message.message_id, detail=problem.detail)


def passes(problem: Problem) -> bool:
    """Whether what refused a task may accept it later: an API server that does not answer, a quota that is used up."""
    return problem.status in _PASSING or (problem.kind == "refused-by-cluster" and "exceeded quota" in problem.detail)
