"""Redis behind Sentinel: real servers, of which the master is killed, and whoever uses Redis goes on with the next one."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis
import redis.asyncio
from redis.exceptions import RedisError

from devstack.stores.redis import program
from task_contract.messages import ProgressEvent
from task_contract.models import Stage
from task_contract.names import PROGRESS_CHANNEL
from task_contract.redis_address import open_redis
from task_platform.progress import ProgressFeed
from tests.support.operator_lab import until
from tests.support.redis_users import a_queue_goes_on
from tests.support.servers import free_port

pytestmark = pytest.mark.integration

PASSWORD = "secret of the servers"
SENTINEL_PASSWORD = "of the sentinels"
URL = "redis+sentinel://:secret%20of%20the%20servers@127.0.0.1:{port}/main/1?sentinel_password=of+the+sentinels"


@dataclass
class Servers:
    """A master, a replica, and who watches them."""

    url: str
    sentinel: int
    processes: dict[int, "subprocess.Popen[bytes]"]

    def master(self) -> int:
        with redis.Redis(port=self.sentinel, password=SENTINEL_PASSWORD) as asked:
            return int(asked.sentinel_get_master_addr_by_name("main")[1])

    def kill_master(self) -> None:
        process = self.processes[self.master()]
        process.kill()
        process.wait()


@pytest.fixture
async def servers(tmp_path: Path) -> AsyncIterator[Servers]:
    """A master, a replica that follows it, and a Sentinel that knows both: each test kills a master of its own."""
    master, replica, sentinel = (free_port() for _ in range(3))
    processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(port: int, text: str, *options: str) -> None:
        folder = tmp_path / str(port)
        folder.mkdir()
        file = folder / "redis.conf"
        file.write_text(f"port {port}\nbind 127.0.0.1\ndir {folder}\n{text}")
        with (folder / "log").open("wb") as log:
            processes[port] = subprocess.Popen([program(), str(file), *options], stdout=log, stderr=log)

    async def follows() -> bool:
        try:
            with redis.Redis(port=replica, password=PASSWORD) as asked:
                return str(asked.info("replication")["master_link_status"]) == "up"
        except RedisError:
            return False

    async def promotable() -> bool:
        try:
            with redis.Redis(port=sentinel, password=SENTINEL_PASSWORD) as asked:
                known = asked.sentinel_slaves("main")
        except RedisError:
            return False
        return any(one["flags"] == "slave" and one["master-link-status"] == "ok" for one in known)

    secrets = f'requirepass "{PASSWORD}"\nmasterauth "{PASSWORD}"\nsave ""\nrepl-diskless-sync-delay 0\n'
    watched = (
        f'requirepass "{SENTINEL_PASSWORD}"\nsentinel monitor main 127.0.0.1 {master} 1\n'
        f'sentinel auth-pass main "{PASSWORD}"\nsentinel down-after-milliseconds main 500\n'
        "sentinel failover-timeout main 2000\n"
    )
    try:
        start(master, secrets)
        start(replica, f"{secrets}replicaof 127.0.0.1 {master}\n")
        # A Sentinel asks a master for its replicas at once and then every ten seconds: it begins when there is one.
        await until("a replica follows", follows)
        start(sentinel, watched, "--sentinel")
        await until("Sentinel knows a replica", promotable)
        yield Servers(URL.format(port=sentinel), sentinel, processes)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


async def test_a_pools_queue_and_its_workers_go_on_with_the_next_master(servers: Servers) -> None:
    before = servers.master()
    await a_queue_goes_on(servers.url, kill=servers.kill_master)
    assert servers.master() != before


async def test_progress_is_heard_after_a_failover(servers: Servers) -> None:
    heard: list[int] = []
    feed = ProgressFeed(servers.url, sink=lambda event: heard.append(event.progress))
    listening = asyncio.create_task(feed.run())
    runner = open_redis(redis.asyncio, servers.url, socket_timeout=2)

    def tell(percent: int) -> Callable[[], Awaitable[bool]]:
        async def told() -> bool:
            event = ProgressEvent(
                uid="u", namespace="n", name="a", attempt=1, stage=Stage.EMBED, progress=percent, at=datetime.now(UTC)
            )
            try:
                await runner.publish(PROGRESS_CHANNEL, event.model_dump_json(by_alias=True))
            except RedisError:
                return False
            return percent in heard

        return told

    try:
        await until("progress is heard", tell(10))
        servers.kill_master()
        await until("progress is heard again", tell(20), seconds=40)
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await feed.aclose()
        await runner.aclose()


async def test_what_a_thread_says_last_finds_the_master_too(servers: Servers) -> None:
    async def said() -> bool:
        try:
            with open_redis(redis, servers.url) as client:
                return bool(client.set("said", "yes"))
        except (RedisError, OSError):
            return False

    assert await said()
