"""Tasks through a queue of a real RabbitMQ."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage

from task_gateway.callers import ANYBODY, Callers
from task_gateway.metrics import Metrics
from task_gateway.models import TaskRequest
from task_gateway.problems import Problem
from task_gateway.submissions import Submissions, passes
from tests.support.broker import Broker
from tests.support.gateway_lab import GatewayProcess, account, document
from tests.support.operator_lab import Place, until

pytestmark = [pytest.mark.integration, pytest.mark.alone]  # they stop the broker


@dataclass
class Queue:
    """A queue of the test's own, and its dead letters."""

    name: str
    broker: Broker
    channel: aio_pika.abc.AbstractChannel

    async def send(self, body: Any, *, message_id: str | None = "order-1") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        message = aio_pika.Message(data, message_id=message_id, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await self.channel.default_exchange.publish(message, routing_key=self.name)

    async def waiting(self) -> int:
        queue = await self.channel.declare_queue(self.name, passive=True)
        return queue.declaration_result.message_count or 0

    async def dead(self, number: int) -> list[AbstractIncomingMessage]:
        """Return the dead letters once there are so many."""
        found: list[AbstractIncomingMessage] = []
        queue = await self.channel.declare_queue(self.name + ".dead", durable=True)

        async def look() -> bool:
            while (message := await queue.get(fail=False)) is not None:
                await message.ack()
                found.append(message)
            return len(found) >= number

        await until(f"{number} dead letters", look, seconds=20)
        return found


@pytest.fixture
async def queue() -> AsyncIterator[Queue]:
    broker = Broker.up()
    async with await aio_pika.connect(broker.url) as connection:
        channel = await connection.channel()
        one = Queue(f"test-{uuid.uuid4().hex[:8]}", broker, channel)
        await channel.declare_queue(one.name, durable=True)
        yield one
    async with await aio_pika.connect(broker.url) as connection:  # the first one may be gone with the broker
        channel = await connection.channel()
        for name in (one.name, one.name + ".dead"):
            await channel.queue_delete(name)


def settings(queue: Queue) -> dict[str, str]:
    return {"GATEWAY_RABBITMQ_URL": queue.broker.url, "GATEWAY_RABBITMQ_QUEUE": queue.name}


async def _tasks(place: Place, number: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def look() -> bool:
        found[:] = await place.objects("processingtasks")
        return len(found) >= number

    await until(f"{number} tasks", look, seconds=20)
    return found


async def test_a_message_becomes_a_task_and_the_same_message_the_same_task(
    gateway: Callable[..., GatewayProcess], place: Place, queue: Queue
) -> None:
    async with gateway(trusting=True, **settings(queue)).at_work():
        for _ in range(3):
            await queue.send(document(labels={"team": "knowledge"}), message_id="order-7")
        await queue.send(document(kb_id="kb-43"), message_id="order-8")
        tasks = await _tasks(place, 2)

        async def empty() -> bool:
            return await queue.waiting() == 0

        await until("the queue is empty", empty)
        assert {task["spec"]["kbId"] for task in tasks} == {"kb-42", "kb-43"}
        assert len(await place.objects("processingtasks")) == 2
        [one] = [task for task in tasks if task["spec"]["kbId"] == "kb-42"]
        assert one["metadata"]["labels"] == {"team": "knowledge"}


async def test_messages_that_are_no_tasks_go_to_the_dead_letters_with_the_reason(
    gateway: Callable[..., GatewayProcess], place: Place, queue: Queue
) -> None:
    bad: list[tuple[Any, str | None, str, str]] = [
        (b"not json", "one", "invalid-request", "no JSON"),
        ([1], "two", "invalid-task", "JSON object"),
        (document(task_type="dance"), "three", "invalid-task", "task_type"),
        (document(payload={"file_path": "/data/a", "chunk_size": 1}), "four", "invalid-task", "payload.chunk_size"),
        (document(payload={"file_path": "/etc/passwd"}), "five", "invalid-task", "payload.file_path"),
        (document(namespace="elsewhere"), "six", "namespace-not-served", "elsewhere"),
        (document(), "x" * 200, "invalid-task", "message_id"),
        (b"x" * 300_000, "eight", "too-large", "bytes"),
    ]
    async with gateway(trusting=True, **settings(queue)).at_work():
        await queue.send(document(), message_id="good")
        for body, message_id, _, _ in bad:
            await queue.send(body, message_id=message_id)
        await queue.send(document(kb_id="another"), message_id="good")  # the id is taken by another task
        dead = {message.message_id: message for message in await queue.dead(len(bad) + 1)}
    for body, message_id, kind, reason in [*bad, (None, "good", "already-exists", "idempotency_key")]:
        message = dead[message_id]
        assert message.headers["x-problem"] == kind
        assert reason in str(message.headers["x-reason"])
        assert body is None or message.body == (body if isinstance(body, bytes) else json.dumps(body).encode())
    assert len(await place.objects("processingtasks")) == 1
    assert await queue.waiting() == 0


async def test_messages_have_the_rights_of_their_account(
    gateway: Callable[..., GatewayProcess], place: Place, queue: Queue
) -> None:
    await account(place.kube, place.namespace, "stranger")
    await account(place.kube, place.namespace, "submitter", verbs=["create"])
    stranger, submitter = (f"system:serviceaccount:{place.namespace}:{name}" for name in ("stranger", "submitter"))
    async with gateway(**settings(queue), GATEWAY_RABBITMQ_ACCOUNT=stranger).at_work():
        await queue.send(document(), message_id="one")
        [dead] = await queue.dead(1)
        assert dead.headers["x-problem"] == "not-allowed"
    async with gateway(**settings(queue), GATEWAY_RABBITMQ_ACCOUNT=submitter).at_work():
        await queue.send(document(), message_id="two")
        [task] = await _tasks(place, 1)
    assert task["metadata"]["annotations"]["tasks.zzdsj.io/created-by"] == submitter


async def test_an_account_has_to_be_named(gateway: Callable[..., GatewayProcess], queue: Queue) -> None:
    process = gateway(**settings(queue))
    process.start()

    async def ended() -> bool:
        return process.exit_code() is not None

    await until("it has given up", ended)
    assert process.exit_code() == 2
    assert "GATEWAY_RABBITMQ_ACCOUNT is required" in process.log.read_text()


async def test_a_gateway_that_is_killed_under_load_loses_no_message_and_makes_no_task_twice(
    gateway: Callable[..., GatewayProcess], place: Place, queue: Queue
) -> None:
    number = 150
    for index in range(number):
        await queue.send(document(kb_id=f"kb-{index}"), message_id=f"order-{index}")
    first = gateway(trusting=True, **settings(queue))
    first.start()
    await _tasks(place, 20)
    first.kill()
    assert len(await place.objects("processingtasks")) < number
    async with gateway(trusting=True, **settings(queue)).at_work():
        tasks = await _tasks(place, number)

        async def empty() -> bool:
            return await queue.waiting() == 0

        await until("the queue is empty", empty)
    assert sorted(task["spec"]["kbId"] for task in tasks) == sorted(f"kb-{index}" for index in range(number))


# ------------------------------------------------------------------------------------ what the API server cannot be made do


class Creator:
    """In place of the API server: refuses as often as it is told."""

    def __init__(self, *problems: Problem | Exception) -> None:
        self.problems = list(problems)
        self.created: list[str | None] = []
        self.at_once = 0
        self.most_at_once = 0
        self.hold: asyncio.Event | None = None

    async def create(self, wanted: TaskRequest, **_: Any) -> tuple[dict[str, Any], bool]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.hold is not None:
                await self.hold.wait()
            if self.problems:
                raise self.problems.pop(0)
            self.created.append(wanted.idempotency_key)
            return {"metadata": {"name": "one"}}, False
        finally:
            self.at_once -= 1


class Nobody:
    """There are no reviews where the network is trusted."""


def _submissions(queue: Queue, creator: Creator, *, prefetch: int = 16) -> Submissions:
    callers = Callers(
        reviews=Nobody(),  # type: ignore[arg-type]
        tickets=Nobody(),  # type: ignore[arg-type]
        trusting=True,
        namespaces=(),
        default_namespace="default",
    )
    return Submissions(
        queue.broker.url,
        queue=queue.name,
        caller=ANYBODY,
        tasks=creator,
        callers=callers,
        metrics=Metrics(),
        prefetch=prefetch,
    )


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (Problem(503, "unavailable", "x"), True),
        (Problem(429, "too-many-requests", "x"), True),
        (Problem(403, "refused-by-cluster", "exceeded quota: tasks"), True),
        (Problem(403, "refused-by-cluster", "admission webhook denied it"), False),
        (Problem(403, "not-allowed", "x"), False),
        (Problem(409, "already-exists", "x"), False),
        (Problem(422, "invalid-task", "x"), False),
        (Problem(500, "internal", "x"), False),
    ],
)
def test_only_what_passes_is_tried_again(problem: Problem, expected: bool) -> None:
    assert passes(problem) is expected


@dataclass(frozen=True)
class Letter:
    """A message of a publisher that gives it no id: aiormq gives it one."""

    message_id: str | None
    body: bytes = b"{}"


@pytest.mark.parametrize("message_id", [None, ""])
async def test_a_message_without_an_id_is_refused(message_id: str | None) -> None:
    creator = Creator()
    submissions = _submissions(Queue("nowhere", Broker("amqp://nowhere"), None), creator)  # type: ignore[arg-type]
    problem = await submissions._outcome(Letter(message_id))  # type: ignore[arg-type]
    assert problem is not None
    assert "needs a message_id" in problem.detail
    assert creator.created == []


async def test_a_message_waits_while_the_cluster_does_not_answer_and_a_bug_buries_it(queue: Queue) -> None:
    creator = Creator(Problem(503, "unavailable", "the Kubernetes API does not answer"))
    work = asyncio.create_task(_submissions(queue, creator).run())
    try:
        await queue.send(document(), message_id="patient")

        async def created() -> bool:
            return creator.created == ["patient"]

        await until("it is created", created)
        creator.problems.append(RuntimeError("a bug"))
        await queue.send(document(), message_id="poison")
        [dead] = await queue.dead(1)
        assert (dead.message_id, dead.headers["x-problem"]) == ("poison", "internal")
    finally:
        work.cancel()
        await asyncio.wait([work])


async def test_a_replica_holds_no_more_messages_than_it_works_on_and_comes_back_with_the_broker(queue: Queue) -> None:
    creator = Creator()
    creator.hold = asyncio.Event()
    for index in range(20):
        await queue.send(document(), message_id=f"order-{index}")
    work = asyncio.create_task(_submissions(queue, creator, prefetch=4).run())
    try:

        async def four() -> bool:
            return creator.at_once == 4 and await queue.waiting() == 16

        await until("four are in work", four)
        assert creator.most_at_once == 4
        await asyncio.to_thread(queue.broker.stop)
        creator.hold.set()
        await asyncio.to_thread(queue.broker.start)
        async with await aio_pika.connect(queue.broker.url) as connection:
            queue.channel = await connection.channel()

            async def all_of_them() -> bool:
                return len(set(creator.created)) == 20 and await queue.waiting() == 0

            await until("all are created", all_of_them, seconds=60)
    finally:
        work.cancel()
        await asyncio.wait([work])
