"""A Redis Cluster: real servers, of which the one with a pool's keys is killed, and whoever uses Redis goes on."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
import redis.asyncio
from redis.exceptions import RedisError

from devstack.stores.redis import program
from job_runner import leases
from job_runner.health import redis_version
from job_runner.leases import Leases
from task_contract.leases import PoolReport, ReportKind, WorkerState
from task_contract.messages import ProgressEvent
from task_contract.models import Stage
from task_contract.names import EVENTS_CHANNEL, PROGRESS_CHANNEL
from task_contract.redis_address import open_redis
from task_operator.channel import RedisSink
from task_operator.cloud_events import Event, SinkUnavailable
from task_operator.pool_queue import Heard, PoolQueue, QueueUnavailable
from task_platform.progress import ProgressFeed
from tests.support.operator_lab import until
from tests.support.redis_users import KEYS, a_queue_goes_on, offer
from tests.support.servers import free_port

pytestmark = pytest.mark.integration

PASSWORD = "secret of the nodes"
_SLOTS = 16_384


@dataclass
class Nodes:
    """Three masters with a third of the slots each, and a replica of each."""

    ports: list[int]
    processes: dict[int, "subprocess.Popen[bytes]"]

    @property
    def url(self) -> str:
        """Names the last ones, which are replicas: they know the others."""
        return "redis+cluster://:secret%20of%20the%20nodes@" + ",".join(f"127.0.0.1:{port}" for port in self.ports[3:])

    def start(self, folder: Path, port: int) -> None:
        with (folder / "log").open("wb") as log:
            self.processes[port] = subprocess.Popen([program(), str(folder / "redis.conf")], stdout=log, stderr=log)

    def ask(self, port: int, *command: object) -> object:
        with redis.Redis(port=port, password=PASSWORD, decode_responses=True) as node:
            return node.execute_command(*command)

    def kill_master_of(self, key: str) -> None:
        """Kill the one that has the slot of a key."""
        slot = int(str(self.ask(self.ports[3], "CLUSTER KEYSLOT", key)))
        victim = self.ports[slot * 3 // _SLOTS]
        self.processes[victim].kill()
        self.processes[victim].wait()


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    """A cluster of its own for each test, which kills a master of it."""
    made = Nodes([free_port() for _ in range(6)], {})

    async def knows_all() -> bool:
        try:
            found = [str(made.ask(port, "CLUSTER INFO")) for port in made.ports]
        except (RedisError, OSError):
            return False
        return all("'cluster_known_nodes': '6'" in one or "cluster_known_nodes:6" in one for one in found)

    async def stands() -> bool:
        try:
            found = [str(made.ask(port, "CLUSTER SLOTS")).count("127.0.0.1") for port in made.ports]
            state = [str(made.ask(port, "CLUSTER INFO")) for port in made.ports]
        except (RedisError, OSError):
            return False
        return all(one == 6 for one in found) and all("ok" in one for one in state)

    try:
        for port in made.ports:
            folder = tmp_path / str(port)
            folder.mkdir()
            text = (
                f"port {port}\ncluster-port {free_port()}\nbind 127.0.0.1\ndir {folder}\ncluster-enabled yes\n"
                f'requirepass "{PASSWORD}"\nmasterauth "{PASSWORD}"\nsave ""\ncluster-node-timeout 1000\n'
                "repl-diskless-sync-delay 0\ncluster-replica-validity-factor 0\n"
            )
            (folder / "redis.conf").write_text(text)
            made.start(folder, port)

        async def answer() -> bool:
            try:
                return all(made.ask(port, "PING") for port in made.ports)
            except (RedisError, OSError):
                return False

        await until("all nodes answer", answer)
        bus = {
            port: next(
                line.split()[1]
                for line in (tmp_path / str(port) / "redis.conf").read_text().splitlines()
                if line.startswith("cluster-port")
            )
            for port in made.ports
        }
        for number, port in enumerate(made.ports[:3]):
            first, after = -(-_SLOTS * number // 3), -(-_SLOTS * (number + 1) // 3)
            made.ask(port, "CLUSTER ADDSLOTSRANGE", first, after - 1)
            made.ask(port, "CONFIG SET", "cluster-announce-ip", "127.0.0.1")
        for port in made.ports[1:]:
            made.ask(made.ports[0], "CLUSTER MEET", "127.0.0.1", port, bus[port])
        await until("all know all", knows_all, seconds=30)
        for master, replica in zip(made.ports[:3], made.ports[3:], strict=True):
            made.ask(replica, "CLUSTER REPLICATE", made.ask(master, "CLUSTER MYID"))
        await until("the cluster stands", stands, seconds=30)
        yield made
    finally:
        for process in made.processes.values():
            process.kill()
            process.wait()


EVENT = Event(
    {"number": 1, "uid": "u", "phase": "Queued", "namespace": "n", "type": "health_check", "name": "a"}
    | dict.fromkeys(("kb_id", "reason", "message", "stage", "progress", "attempt", "traceparent"))
    | {"at": datetime(2026, 1, 1, tzinfo=UTC)},
    source="test",
)


async def test_a_task_goes_through_a_pools_queue_and_back(nodes: Nodes) -> None:
    operator, worker = PoolQueue(nodes.url), Leases(nodes.url, KEYS, "worker-1")
    assert await operator.offer(KEYS, [offer("one"), offer("two"), offer("one")], now=datetime.now(UTC)) == [
        True,
        True,
        False,
    ]
    first, second = await worker.take(5, held=())
    assert {first.uid, second.uid} == {"one", "two"}
    state = WorkerState(worker="worker-1", ready=True, leased=2, capacity=4)
    assert not (await worker.renew(state, [first, second])).lost
    look = await operator.look(KEYS, lease=timedelta(seconds=30), now=datetime.now(UTC))
    assert (look.leased, sorted(look.uids), [*look.workers]) == (2, ["one", "two"], ["worker-1"])
    report = PoolReport(
        kind=ReportKind.ENDED, uid=first.uid, namespace="knowledge", name=first.uid, attempt=1, stamp="s", worker="worker-1"
    )
    assert await worker.report([(first, report)]) == [True]
    heard: list[Heard] = []
    async for some in operator.reports(KEYS):
        heard += some
        if heard:
            break
    assert [one.report.uid for one in heard] == [first.uid]
    await operator.settle(KEYS, [one.number for one in heard])

    told: list[str] = []

    async def listen() -> None:
        async for said in worker.control():
            told.append(said)

    listening = asyncio.create_task(listen())

    async def listens() -> bool:
        return told == [""]

    await until("the worker listens", listens)
    assert await operator.withdraw(KEYS, second.uid) == "worker-1"

    async def hears() -> bool:
        return told == ["", second.uid]

    await until("the worker is told of the withdrawal", hears)
    listening.cancel()
    worker.last_words([(second, report)])
    await operator.drain(KEYS, ["worker-1"])
    await operator.dismiss(KEYS, ["worker-1"])
    await operator.drop(KEYS)
    await asyncio.gather(listening, return_exceptions=True)
    await operator.aclose()
    await worker.aclose()


async def test_a_pools_queue_and_its_workers_go_on_when_the_master_of_its_keys_is_killed(nodes: Nodes) -> None:
    await a_queue_goes_on(nodes.url, kill=lambda: nodes.kill_master_of(KEYS.reports))


async def test_progress_and_events_are_heard_before_and_after_a_node_was_killed(nodes: Nodes) -> None:
    heard: list[int] = []
    feed = ProgressFeed(nodes.url, sink=lambda event: heard.append(event.progress))
    listening = asyncio.create_task(feed.run())
    runner = open_redis(redis.asyncio, nodes.url, socket_timeout=2)
    worker, sink = Leases(nodes.url, KEYS, "worker-1"), RedisSink(nodes.url)

    def tell(percent: int, *, by_worker: bool) -> Callable[[], Awaitable[bool]]:
        async def told() -> bool:
            message = ProgressEvent(
                uid="u", namespace="n", name="a", attempt=1, stage=Stage.EMBED, progress=percent, at=datetime.now(UTC)
            ).model_dump_json(by_alias=True)
            try:
                if by_worker:
                    await worker.publish_progress([message])
                else:
                    await runner.publish(PROGRESS_CHANNEL, message)
            except (RedisError, leases.QueueUnavailable):
                return False
            return percent in heard

        return told

    try:
        await until("progress is heard", tell(10, by_worker=False))
        await until("that of a worker is heard", tell(20, by_worker=True))
        await feed.ping()
        async with runner.pubsub() as subscription:
            await subscription.subscribe(EVENTS_CHANNEL)

            async def published() -> bool:
                await sink.put([EVENT])
                message = await subscription.get_message(ignore_subscribe_messages=True, timeout=1)
                return message is not None

            await until("an event is heard", published)
        assert "." in await redis_version(nodes.url)
        nodes.kill_master_of(PROGRESS_CHANNEL)
        await until("progress is heard again", tell(30, by_worker=False), seconds=60)
        await until("that of a worker is heard again", tell(40, by_worker=True), seconds=30)
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await feed.aclose()
        await runner.aclose()
        await worker.aclose()
        await sink.aclose()


async def test_a_cluster_that_is_gone_is_unavailable_as_a_server_is_and_ends_nobody(nodes: Nodes) -> None:
    operator, worker, sink = PoolQueue(nodes.url), Leases(nodes.url, KEYS, "worker-1"), RedisSink(nodes.url)
    feed = ProgressFeed(nodes.url, sink=lambda event: None)
    listening = asyncio.create_task(feed.run())
    await operator.offer(KEYS, [offer("one")], now=datetime.now(UTC))
    [lease] = await worker.take(1, held=())
    report = PoolReport(
        kind=ReportKind.ENDED, uid="one", namespace="knowledge", name="one", attempt=1, stamp="s", worker="worker-1"
    )
    for process in nodes.processes.values():
        process.kill()
        process.wait()
    fresh = PoolQueue(nodes.url)  # of an operator that starts now
    for queue in (operator, fresh):
        with pytest.raises(QueueUnavailable, match="cannot use Redis"):
            await queue.offer(KEYS, [offer("two")], now=datetime.now(UTC))
    for ask in (worker.take(1, held=()), worker.publish_progress(["x"]), anext(aiter(worker.control()))):
        with pytest.raises(leases.QueueUnavailable, match="cannot use Redis"):
            await ask
    with pytest.raises(SinkUnavailable, match="cannot publish to Redis"):
        await sink.put([EVENT])
    worker.last_words([(lease, report)])
    assert not listening.done()
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    for one in (operator, fresh, worker, sink, feed):
        await one.aclose()
