"""Life-cycle events to Redis and RabbitMQ, from a real PostgreSQL to real brokers that are stopped in between."""

import asyncio
import json
import os
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aio_pika
import asyncpg
import pytest
from redis.asyncio import Redis

from devstack import Endpoints
from devstack.stores import common, rabbitmq
from task_contract.names import EVENTS_CHANNEL
from task_operator.broker import RabbitSink
from task_operator.channel import RedisSink
from task_operator.metrics import Metrics
from task_operator.projection import Database
from tests.support.broker import Broker
from tests.support.operator_lab import Kubelet, OperatorProcess, Place, until
from tests.support.operator_values import finished, manifest, processing
from tests.support.publishing import SOURCE, begun, caught_up, publishing

DOWN = float(os.environ.get("BROKER_DOWN_SECONDS", "0"))
"""So long the broker is away at least; 600 is the promise, and a restart suffices to see it."""
pytestmark = [pytest.mark.integration, pytest.mark.alone]  # they stop the broker


@dataclass
class Story:
    """Tasks whose life is written to PostgreSQL step by step."""

    database: Database
    version: int = 0
    uids: list[str] = field(default_factory=list)

    async def step(self, uid: str, status: dict[str, Any] | None) -> None:
        self.version += 1
        made = manifest(name=f"task-{uid[:8]}", **({} if status is None else {"status": status}))
        made["metadata"] |= {"resourceVersion": str(self.version), "uid": uid}
        self.database.submit(made)
        await self.database._flush()

    async def live(self, number: int) -> None:
        """Have so many tasks live side by side: three transitions each."""
        uids = [str(uuid.uuid4()) for _ in range(number)]
        self.uids += uids
        for status in (None, processing(), finished()):
            for uid in uids:
                await self.step(uid, status)


@pytest.fixture
async def story(url: str) -> AsyncIterator[Story]:
    database = Database(url, metrics=Metrics())
    await database.warm_up()
    yield Story(database)
    await database.aclose()


async def _numbers(sql: "asyncpg.Connection[Any]", *, after: int = 0) -> list[int]:
    return [row["number"] for row in await sql.fetch("SELECT number FROM task_events WHERE number > $1 ORDER BY 1", after)]


def _in_order_of_each_task(events: list[dict[str, Any]]) -> None:
    """Without the repetitions that "at least once" allows, every task tells its life in order and without a gap."""
    told: defaultdict[str, list[str]] = defaultdict(list)
    last: defaultdict[str, int] = defaultdict(int)
    for event in events:
        data = event["data"]
        if data["event"] > last[data["uid"]]:
            last[data["uid"]] = data["event"]
            told[data["uid"]].append(data["status"])
    assert set(map(tuple, told.values())) == {("queued", "processing", "completed")}


@pytest.fixture
def broker() -> Broker:
    return Broker.up()


@pytest.fixture
def sink(broker: Broker) -> Callable[[], RabbitSink]:
    exchange = f"test-{uuid.uuid4().hex[:8]}"
    return lambda: RabbitSink(broker.url, exchange=exchange)


async def _bound_queue(broker: Broker, exchange: str, key: str = "tasks.#") -> str:
    """Bind a durable queue to the exchange; return its name."""
    async with await aio_pika.connect(broker.url) as connection:
        channel = await connection.channel()
        to = await channel.declare_exchange(exchange, aio_pika.ExchangeType.TOPIC, durable=True)
        queue = await channel.declare_queue(f"{exchange}-{uuid.uuid4().hex[:6]}", durable=True)
        await queue.bind(to, key)
        return queue.name


async def _drain(broker: Broker, queue: str) -> list[aio_pika.abc.AbstractIncomingMessage]:
    async with await aio_pika.connect(broker.url) as connection:
        channel = await connection.channel()
        found = await channel.declare_queue(queue, passive=True)
        messages = []
        while (message := await found.get(fail=False)) is not None:
            await message.ack()
            messages.append(message)
        await found.delete()
        return messages


async def test_events_are_published_as_cloud_events_with_routing_keys_that_select(
    story: Story, url: str, sql: "asyncpg.Connection[Any]", broker: Broker, sink: Callable[[], RabbitSink]
) -> None:
    one = sink()
    everything = await _bound_queue(broker, one._exchange_name)
    ends = await _bound_queue(broker, one._exchange_name, "tasks.knowledge.*.completed")
    async with publishing(url, one):
        await begun(sql, "rabbitmq")
        await story.live(3)
        await caught_up(sql, "rabbitmq")
    messages = await _drain(broker, everything)
    assert [int(message.message_id or 0) for message in messages] == await _numbers(sql)
    first = messages[0]
    assert (first.content_type, first.delivery_mode) == ("application/cloudevents+json", 2)
    event = json.loads(first.body)
    assert (event["specversion"], event["source"], event["type"]) == ("1.0", SOURCE, "io.zzdsj.tasks.queued")
    assert [json.loads(message.body)["data"]["status"] for message in await _drain(broker, ends)] == ["completed"] * 3


async def test_a_broker_that_was_away_is_told_of_all_that_happened_in_order(
    story: Story, url: str, sql: "asyncpg.Connection[Any]", broker: Broker, sink: Callable[[], RabbitSink]
) -> None:
    one = sink()
    queue = await _bound_queue(broker, one._exchange_name)
    async with publishing(url, one):
        await begun(sql, "rabbitmq")
        await story.live(20)
        work = asyncio.create_task(story.live(40))
        await asyncio.to_thread(broker.stop)  # in the middle of it
        back = asyncio.get_running_loop().time() + DOWN
        await work
        await story.live(20)
        while asyncio.get_running_loop().time() < back:
            await story.live(1)
            await asyncio.sleep(1)
        assert await sql.fetchval("SELECT number FROM event_cursors") < max(await _numbers(sql))
        await asyncio.to_thread(broker.start)
        await caught_up(sql, "rabbitmq")
        await story.live(5)
        await caught_up(sql, "rabbitmq")
    events = [json.loads(message.body) for message in await _drain(broker, queue)]
    assert {event["data"]["event"] for event in events} == set(await _numbers(sql))
    _in_order_of_each_task(events)


async def test_a_broker_that_is_killed_under_load_loses_nothing_that_it_confirmed(
    story: Story, url: str, sql: "asyncpg.Connection[Any]", broker: Broker, sink: Callable[[], RabbitSink]
) -> None:
    one = sink()
    queue = await _bound_queue(broker, one._exchange_name)
    async with publishing(url, one):
        await begun(sql, "rabbitmq")
        work = asyncio.create_task(story.live(150))
        await asyncio.to_thread(lambda: broker.stop(kill=True))
        await work
        await asyncio.to_thread(broker.start)
        await caught_up(sql, "rabbitmq")
    events = [json.loads(message.body) for message in await _drain(broker, queue)]
    assert {event["data"]["event"] for event in events} == set(await _numbers(sql))
    _in_order_of_each_task(events)


async def test_one_of_two_publishers_works_and_the_other_takes_over_where_it_ends(
    story: Story, url: str, sql: "asyncpg.Connection[Any]", broker: Broker, sink: Callable[[], RabbitSink]
) -> None:
    one, two = sink(), sink()
    queue = await _bound_queue(broker, one._exchange_name)
    async with publishing(url, two):
        async with publishing(url, one):
            await begun(sql, "rabbitmq")
            await story.live(10)
            await caught_up(sql, "rabbitmq")
        await story.live(10)
        await caught_up(sql, "rabbitmq")
    numbers = [int(message.message_id or 0) for message in await _drain(broker, queue)]
    assert numbers == await _numbers(sql)  # none twice: nothing failed


async def test_a_new_sink_begins_with_what_happens_from_now_on(
    story: Story, url: str, sql: "asyncpg.Connection[Any]", broker: Broker, sink: Callable[[], RabbitSink]
) -> None:
    await story.live(3)
    before = max(await _numbers(sql))
    one = sink()
    queue = await _bound_queue(broker, one._exchange_name)
    async with publishing(url, one):
        await begun(sql, "rabbitmq")
        await story.live(2)
        await caught_up(sql, "rabbitmq")
    numbers = [int(message.message_id or 0) for message in await _drain(broker, queue)]
    assert numbers == await _numbers(sql, after=before)


async def test_whoever_subscribes_in_redis_hears_of_events(
    story: Story, url: str, sql: "asyncpg.Connection[Any]", stores: Endpoints
) -> None:
    redis_url = stores.host_urls["TASKS_REDIS_URL"]
    async with Redis.from_url(redis_url) as redis, redis.pubsub() as subscription:
        await subscription.subscribe(EVENTS_CHANNEL)
        async with publishing(url, RedisSink(redis_url)):
            await begun(sql, "redis")
            await story.live(2)
            await caught_up(sql, "redis")
        heard: list[dict[str, Any]] = []

        async def all_of_them() -> bool:
            message = await subscription.get_message(ignore_subscribe_messages=True, timeout=1)
            if message is not None and json.loads(message["data"])["source"] == SOURCE:
                heard.append(json.loads(message["data"]))
            return len(heard) >= 6

        await until("all were heard", all_of_them, interval=0)
    mine = [event for event in heard if event["data"]["uid"] in story.uids]
    assert len(mine) == 6
    _in_order_of_each_task(mine)


async def test_an_operator_tells_redis_and_rabbitmq_of_a_task(
    place: Place,
    process: Callable[..., OperatorProcess],
    url: str,
    sql: "asyncpg.Connection[Any]",
    stores: Endpoints,
    broker: Broker,
) -> None:
    exchange = f"test-{uuid.uuid4().hex[:8]}"
    queue = await _bound_queue(broker, exchange, f"tasks.{place.namespace}.#")
    brokers = {
        "OPERATOR_REDIS_URL": stores.host_urls["TASKS_REDIS_URL"],
        "OPERATOR_RABBITMQ_URL": broker.url,
        "OPERATOR_RABBITMQ_EXCHANGE": exchange,
    }
    async with Kubelet(place).at_work(), process(OPERATOR_POSTGRES_URL=url, **brokers).at_work() as operator:
        await begun(sql, "rabbitmq")
        await begun(sql, "redis")
        await place.create()
        await place.wait_for("Completed")

        async def told() -> bool:
            return bool(await sql.fetchval("SELECT count(*) FROM task_events WHERE phase = 'Completed'"))

        await until("PostgreSQL has its end", told)
        await caught_up(sql, "rabbitmq")
        await caught_up(sql, "redis")
        _, metrics = await operator.get("/metrics")
    events = [json.loads(message.body) for message in await _drain(broker, queue)]
    assert [event["data"]["status"] for event in events][-1] == "completed"
    assert {event["subject"] for event in events} == {f"{place.namespace}/handbook"}
    for sink in ("redis", "rabbitmq"):
        assert f'task_events_published_total{{sink="{sink}"}} {len(events)}.0' in metrics


def test_the_broker_listens_on_this_machine_alone(broker: Broker) -> None:
    assert broker.url.endswith(f"@{common.HOST}:{rabbitmq.port()}/")
