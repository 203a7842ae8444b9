"""Live updates on real PostgreSQL, Redis and API server: WebSocket and server-sent events, of gateway processes."""

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import socket as sockets
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from redis.asyncio import Redis

from devstack import Endpoints
from task_contract.messages import progress_event
from task_contract.models import Stage
from task_contract.names import PROGRESS_CHANNEL
from task_gateway.database import Database
from task_gateway.listener import Listener
from tests.support.event_sources import event, holds_the_contract, past_holds_the_contract
from tests.support.event_tables import tell
from tests.support.gateway_lab import GatewayProcess, account
from tests.support.live_lab import connected, streamed, within
from tests.support.operator_lab import Kube, Place, until

pytestmark = pytest.mark.integration

Make = Callable[..., GatewayProcess]
Sql = "asyncpg.Connection[Any]"


@pytest.fixture
def gateways(gateway: Make, stores: Endpoints) -> Make:
    """Make a trusting gateway for the namespaces ``knowledge``, the default, and ``other``, with Redis."""

    def make(**given: Any) -> GatewayProcess:
        redis = stores.host_urls["TASKS_REDIS_URL"]
        return gateway(**{"trusting": True, "namespaces": ["knowledge", "other"], "GATEWAY_REDIS_URL": redis, **given})

    return make


@pytest.fixture
async def live(gateways: Make) -> AsyncIterator[GatewayProcess]:
    """Such a gateway, at work and with its hub connected."""
    async with at_work(gateways()) as process:
        yield process


@contextlib.asynccontextmanager
async def at_work(process: GatewayProcess) -> AsyncIterator[GatewayProcess]:
    async with process.at_work():

        async def follows() -> bool:
            return "task_gateway_live_connected 1.0" in (await process.ask("GET", "/metrics"))[1]

        await until("the gateway follows tasks", follows, interval=0.05)
        yield process


@pytest.fixture
async def redis(stores: Endpoints) -> AsyncIterator[Redis]:
    client: Redis = Redis.from_url(stores.host_urls["TASKS_REDIS_URL"])
    yield client
    await client.aclose()


async def test_the_connection_that_listens_is_a_source_of_events(url: str, sql: "asyncpg.Connection[Any]") -> None:
    listener = Listener(url)
    await listener.connect()

    async def told(one: Any) -> int:
        return (await tell(sql, [one]))[0]

    await holds_the_contract(listener, told)
    await listener.aclose()


async def test_what_has_passed_is_read_from_the_tables(url: str, sql: "asyncpg.Connection[Any]") -> None:
    database = Database(url)
    await database.warm_up()

    async def told(one: Any) -> int:
        return (await tell(sql, [one]))[0]

    await past_holds_the_contract(database, told)
    await database.aclose()


# ------------------------------------------------------------------------------------------------------------ WebSocket


async def test_a_client_gets_a_snapshot_then_transitions_then_progress_within_a_second(
    live: GatewayProcess, sql: "asyncpg.Connection[Any]", redis: Redis
) -> None:
    await tell(sql, [event("done", "Completed"), event("waits", "Queued"), event("elsewhere", "Queued", namespace="other")])
    async with connected(live.front_url) as client:
        snapshot = await client.next()
        assert snapshot is not None
        assert {key: snapshot[key] for key in ("type", "task_id", "status", "progress", "event", "namespace", "kb_id")} == {
            "type": "snapshot",
            "task_id": "waits",
            "status": "queued",
            "progress": 0,
            "event": 3,
            "namespace": "knowledge",
            "kb_id": "kb-42",
        }
        began = time.monotonic()
        await tell(sql, [event("waits")])
        update = await client.next()
        assert update is not None
        assert (update["type"], update["event"], update["status"]) == ("task", 4, "processing")
        assert time.monotonic() - began < 1

        began = time.monotonic()
        said = {"uid": event("waits").uid, "namespace": "knowledge", "name": "waits", "attempt": 1, "stage": Stage.EMBED}
        await redis.publish(PROGRESS_CHANNEL, progress_event(**said, progress=62, at=datetime.now(UTC)))  # type: ignore[arg-type]
        update = await client.next()
        assert update is not None
        assert (update["status"], update["stage"], update["progress"], "event" in update) == (
            "processing",
            "embed",
            62,
            False,
        )
        assert time.monotonic() - began < 1

        await tell(sql, [event("waits", "Completed")])
        update = await client.next()
        assert update is not None
        assert (update["status"], update["progress"], update["event"]) == ("completed", 100, 5)
        # Nothing but tasks is sent to a client that has sent nothing.
        assert {frame["type"] for frame in client.frames} == {"snapshot", "task"}


async def test_messages_are_answered_and_change_what_is_sent(live: GatewayProcess, sql: "asyncpg.Connection[Any]") -> None:
    await tell(sql, [event("one", "Queued", kb_id="kb-1"), event("two", "Queued", kb_id="kb-2")])
    async with connected(live.front_url, kb_id="kb-none", control="true") as client:
        assert await client.next() == {
            "type": "ready",
            "id": "default",
            "event": 2,
            "sent": 0,
            "resumed": False,
            "reset": False,
            "truncated": False,
        }
        await client.send({"action": "subscribe", "id": "first", "kb_id": "kb-1"})
        assert await client.next() == {"type": "subscribed", "id": "first"}
        snapshot, ready = await client.next(), await client.next()
        assert snapshot is not None
        assert ready is not None
        assert (snapshot["task_id"], ready["type"], ready["sent"]) == ("one", "ready", 1)

        await tell(sql, [event("one", kb_id="kb-1"), event("two", kb_id="kb-2")])
        assert (await client.until(lambda frame: frame["type"] == "task"))["task_id"] == "one"
        await client.send({"action": "subscribe", "id": "second", "kb_id": ["kb-2"], "since": 2})
        assert (await client.until(lambda frame: frame["type"] == "task"))["event"] == 4  # what had passed
        ready = await client.next()
        assert ready is not None
        assert (ready["id"], ready["resumed"]) == ("second", True)

        await client.send({"action": "unsubscribe", "id": "first"})
        assert await client.next() == {"type": "unsubscribed", "id": "first", "known": True}
        await client.send({"action": "unsubscribe", "id": "first"})
        assert await client.next() == {"type": "unsubscribed", "id": "first", "known": False}
        await tell(sql, [event("one", "Completed", kb_id="kb-1"), event("two", "Completed", kb_id="kb-2")])
        assert (await client.until(lambda frame: frame["type"] == "task"))["task_id"] == "two"


BAD_MESSAGES: list[tuple[object, str]] = [
    ("no JSON", "is no JSON"),
    (b"\x00\xff", "binary"),
    ([1, 2], "action"),
    ({"action": "dance"}, "action"),
    ({"action": "subscribe", "kb": "kb-1"}, "kb: is no field of it"),
    ({"action": "subscribe", "kb_id": "../x"}, "kb_id"),
    ({"action": "subscribe", "kb_id": [f"kb-{n}" for n in range(101)]}, "kb_id"),
    ({"action": "subscribe", "since": -1}, "since"),
    ({"action": "subscribe", "namespace": "third"}, "this gateway serves knowledge, other"),
    ({"action": "unsubscribe", "id": ""}, "id"),
]


async def test_a_bad_message_is_answered_with_what_is_wrong(live: GatewayProcess) -> None:
    for message, said in BAD_MESSAGES:
        async with connected(live.front_url) as client:
            await client.send(message)
            answer = await client.next()
            assert answer is not None
            assert answer["type"] == "error", message
            assert said in answer["detail"]
            await client.send({"action": "subscribe"})  # and the connection serves on
            assert await client.next() == {"type": "subscribed", "id": "default"}


async def test_a_client_that_sends_nothing_but_nonsense_is_parted_with(live: GatewayProcess) -> None:
    async with connected(live.front_url) as client:
        for _ in range(5):
            await client.send("{")
        assert await client.closed() == aiohttp.WSCloseCode.POLICY_VIOLATION
    async with connected(live.front_url) as client:
        await client.send('"' + "x" * 20_000 + '"')
        assert await client.closed() == aiohttp.WSCloseCode.MESSAGE_TOO_BIG


async def test_fuzzed_frames_end_connections_and_never_the_gateway(
    live: GatewayProcess, sql: "asyncpg.Connection[Any]"
) -> None:
    chance = random.Random(7)
    key = "dGhlIHNhbXBsZSBub25jZQ=="
    handshake = (
        f"GET /ws/tasks HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()
    async with connected(live.front_url) as witness:
        for _ in range(150):
            reader, writer = await asyncio.open_connection("127.0.0.1", live.front_port)
            writer.write(handshake)
            assert b"101" in await within(5, reader.readline())
            with contextlib.suppress(ConnectionError):
                for _ in range(chance.randrange(1, 5)):
                    head = bytes([chance.randrange(256), chance.randrange(256)])
                    writer.write(head + chance.randbytes(chance.choice((0, 1, 4, 60, 5000))))
                await writer.drain()
            if chance.random() < 0.5:
                writer.transport.abort()
            writer.close()
        await tell(sql, [event()])
        assert (await witness.until(lambda frame: frame.get("event") == 1))["task_id"] == "handbook"
    assert live.exit_code() is None

    async def gone() -> bool:
        return "task_gateway_live_clients 0.0" in (await live.ask("GET", "/metrics"))[1]

    await until("all clients are forgotten", gone, seconds=30)
    assert not [line for line in live.lines() if line["level"] in {"error", "critical"}]


async def test_pages_of_elsewhere_may_not_listen(gateways: Make) -> None:
    async with at_work(gateways(GATEWAY_CORS_ORIGINS="https://app.example.com")) as process:
        for origin in ("https://app.example.com", process.front_url, None):
            headers = {} if origin is None else {"Origin": origin}
            async with connected(process.front_url, headers=headers, control="true") as client:
                assert (await client.next() or {})["type"] == "ready"
        for origin in ("https://evil.example.com", "null", "http://app.example.com", "http://[", "://", ""):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with connected(process.front_url, headers={"Origin": origin}):
                    pass
            assert refused.value.status == 403


@pytest.mark.parametrize("kind", ["WebSocket", "event stream"])
async def test_a_slow_client_is_dropped_with_a_reason_and_the_others_go_on(
    live: GatewayProcess, sql: "asyncpg.Connection[Any]", kind: str
) -> None:
    reader, writer = await _stuck(live, kind)
    long = "x" * 1000
    async with connected(live.front_url) as quick:
        told = 0

        async def dropped() -> bool:
            nonlocal told
            numbers = await tell(sql, [event(f"task-{told + n}", message=long) for n in range(400)])
            told += len(numbers)
            await quick.until(lambda frame: frame.get("event") == numbers[-1])
            return 'task_gateway_live_dropped{why="slow"} 1.0' in (await live.ask("GET", "/metrics"))[1]

        await until("the slow client is dropped", dropped, seconds=60)
        assert [frame["event"] for frame in quick.frames] == list(range(1, told + 1))

    async def forgotten() -> bool:
        return "task_gateway_live_clients 0.0" in (await live.ask("GET", "/metrics"))[1]

    await until("nothing of it is kept", forgotten, seconds=20)
    assert any("too slow" in line["event"] for line in live.lines())
    writer.transport.abort()
    del reader


async def _stuck(process: GatewayProcess, kind: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that reads nothing after the head of the answer, with a small buffer."""
    raw = sockets.socket()
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", process.front_port))
    reader, writer = await asyncio.open_connection(sock=raw, limit=1024)
    if kind == "WebSocket":
        writer.write(
            b"GET /ws/tasks HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
    else:
        writer.write(b"GET /api/v1/tasks/events HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (b"101" if kind == "WebSocket" else b"200") in await within(5, reader.readline())
    return reader, writer


async def test_a_gateway_that_stops_sends_its_clients_elsewhere(gateways: Make) -> None:
    process = gateways()
    async with at_work(process), connected(process.front_url) as client, streamed(process.url) as events:
        assert (await within(5, anext(events)))["retry"] == "1000"
        process.signal(signal.SIGTERM)
        assert await client.closed() == aiohttp.WSCloseCode.GOING_AWAY
        assert "stops" in client.close_reason
        rest = [one async for one in events]  # it ends
        assert [one["event"] for one in rest if "event" in one] == ["ready"]

        async def ended() -> bool:
            return process.exit_code() is not None

        await until("the gateway has ended", ended, seconds=10)
        assert process.exit_code() == 0


async def test_a_restored_database_is_told_by_a_snapshot_that_says_so(
    live: GatewayProcess, sql: "asyncpg.Connection[Any]"
) -> None:
    await tell(sql, [event(f"task-{number}") for number in range(5)])
    async with connected(live.front_url, since="5", control="true") as client:
        assert (await client.next() or {})["resumed"] is True
        await sql.execute("DELETE FROM task_events WHERE number > 2")
        await sql.execute("DELETE FROM tasks WHERE name IN ('task-2', 'task-3', 'task-4')")
        assert await client.closed() == aiohttp.WSCloseCode.SERVICE_RESTART
    async with connected(live.front_url, since="5", control="true") as client:
        ready = await client.until(lambda frame: frame["type"] == "ready")
        assert (ready["reset"], ready["event"]) == (True, 2)
        assert {(frame["task_id"], frame["reset"]) for frame in client.frames[:-1]} == {("task-0", True), ("task-1", True)}


async def test_an_outage_of_postgresql_costs_no_transition(
    live: GatewayProcess, sql: "asyncpg.Connection[Any]", stores: Endpoints
) -> None:
    """The connections of the gateway are ended, and it may not connect again for a while."""
    name = await sql.fetchval("SELECT current_database()")
    administrator = await asyncpg.connect(stores.host_urls["TASKS_POSTGRES_URL"])
    ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND pid <> $2"
    own = await sql.fetchval("SELECT pg_backend_pid()")
    async with connected(live.front_url) as client:
        for attempt in range(1, 4):
            await administrator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            await administrator.execute(ended, name, own)
            await tell(sql, [event(attempt=attempt), event(phase="Retrying", attempt=attempt)])
            await administrator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            await client.until(lambda frame, last=2 * attempt: frame["event"] == last, seconds=20)  # type: ignore[misc]
        assert [frame["event"] for frame in client.frames] == list(range(1, 7))
    await administrator.close()


# ----------------------------------------------------------------------------------------------------- several replicas


async def test_a_storm_reaches_clients_that_reconnect_to_any_replica_without_a_gap(
    gateways: Make, sql: "asyncpg.Connection[Any]", url: str
) -> None:
    """Two operators write at once, as during an update; clients with filters come back again and again, here or there."""
    bases = [f"kb-{number}" for number in range(4)]
    written: list[tuple[int, str | None, str]] = []
    chance = random.Random(20)
    stop = asyncio.Event()

    async def write(seed: int) -> None:
        dice, connection = random.Random(seed), await asyncpg.connect(url)
        for _ in range(60):
            batch = [
                event(f"task-{dice.randrange(40)}", dice.choice(("Queued", "Processing")), kb_id=dice.choice(bases))
                for _ in range(dice.randrange(1, 25))
            ]
            numbers = await tell(connection, batch)
            written.extend((number, one.kb_id, one.phase) for number, one in zip(numbers, batch, strict=True))
        await connection.close()

    async def follow(urls: list[str], kb_ids: list[str], seed: int) -> list[int]:
        """Return the numbers that a client has seen, in that order."""
        dice, seen, since = random.Random(seed), list[int](), 0
        while True:
            query = {"kb_id": ",".join(kb_ids), "since": str(since), "control": "true"}
            async with connected(dice.choice(urls), **query) as client:
                for _ in range(dice.randrange(1, 120)):
                    try:
                        frame = await client.next(seconds=1)
                    except AssertionError:
                        if stop.is_set():
                            return seen
                        break
                    assert frame is not None, (client.close_code, client.close_reason)
                    if frame["type"] == "ready":
                        assert frame["resumed"]
                    elif "event" in frame:
                        seen.append(frame["event"])
                        since = frame["event"]

    async with at_work(gateways()) as here, at_work(gateways()) as there:
        urls = [here.front_url, there.front_url]
        filters = [chance.sample(bases, chance.randrange(1, 4)) for _ in range(8)]
        clients = [asyncio.create_task(follow(urls, kb_ids, seed)) for seed, kb_ids in enumerate(filters)]
        await within(60, asyncio.gather(write(1), write(2)))
        stop.set()
        seen = await within(60, asyncio.gather(*clients))
    written.sort()
    assert len(written) > 500
    for kb_ids, numbers in zip(filters, seen, strict=True):
        assert numbers == [number for number, kb_id, _ in written if kb_id in kb_ids]


# -------------------------------------------------------------------------------------------------- server-sent events


async def test_an_event_stream_resumes_where_it_ended(live: GatewayProcess, sql: "asyncpg.Connection[Any]") -> None:
    await tell(sql, [event("one", "Queued"), event("two", "Queued")])
    async with streamed(live.url) as events:
        seen = [await within(5, anext(events)) for _ in range(4)]
        assert [one.get("id") for one in seen] == [None, None, "2", "2"]
        assert {one["data"]["task_id"] for one in seen[1:3]} == {"one", "two"}
        assert (seen[3]["event"], seen[3]["data"]["sent"]) == ("ready", 2)
        await tell(sql, [event("one")])
        assert (await within(5, anext(events)))["id"] == "3"
    await tell(sql, [event("two"), event("one", "Completed")])
    async with streamed(live.url, headers={"Last-Event-ID": "3"}) as events:
        # They may have passed before, or be told as they happen: then the word that it is ready comes first.
        seen = [await within(5, anext(events)) for _ in range(4)]
        told = [one for one in seen if "data" in one and one.get("event") != "ready"]
        assert [one["id"] for one in told] == ["4", "5"]
        assert told[1]["data"]["status"] == "completed"
    status, problem = await live.ask("GET", "/api/v1/tasks/events", headers={"Last-Event-ID": "x"})
    assert (status, problem["errors"][0]["field"]) == (422, "since")


# ------------------------------------------------------------------------------------------------------------- who may


async def test_namespaces_do_not_mix_and_a_ticket_works_once(
    gateway: Make, place: Place, kube: Kube, sql: "asyncpg.Connection[Any]"
) -> None:
    async with Place.fresh(kube) as other, at_work(gateway(namespaces=[place.namespace, other.namespace])) as process:
        ada = await account(kube, place.namespace, "ada", verbs=["list"])
        begin = [event("mine", "Queued", namespace=place.namespace), event("theirs", namespace=other.namespace)]
        numbers = await tell(sql, begin)
        header = {"Authorization": f"Bearer {ada}"}
        for namespace in (place.namespace, "*"):
            async with connected(process.front_url, headers=header, namespace=namespace) as client:
                snapshot = await client.next()
                assert snapshot is not None
                assert (snapshot["task_id"], snapshot["event"]) == ("mine", numbers[-1])
                batch = [event("theirs", "Completed", namespace=other.namespace), event("mine", namespace=place.namespace)]
                numbers = await tell(sql, batch)
                await client.until(lambda frame, last=numbers[1]: frame.get("event") == last)  # type: ignore[misc]
                assert {frame["namespace"] for frame in client.frames} == {place.namespace}
                await client.send({"action": "subscribe", "namespace": other.namespace})
                assert "lacks the right" in (await client.until(lambda frame: frame["type"] == "error"))["detail"]

        for headers, query, status in (
            ({}, {}, 401),
            ({"Authorization": "Bearer none"}, {}, 401),
            ({}, {"ticket": "guessed"}, 401),
            (header, {"namespace": other.namespace}, 403),
        ):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with connected(process.front_url, headers=headers, **query):
                    pass
            assert refused.value.status == status

        ticket = (await process.do("POST", "/api/v1/tickets", token=ada))["ticket"]
        async with connected(process.front_url, ticket=ticket) as client:
            assert (await client.next() or {})["task_id"] == "mine"
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with connected(process.front_url, ticket=ticket):
                pass
        assert refused.value.status == 401


# ---------------------------------------------------------------------------------------------------------- JavaScript

DOCUMENT = Path(__file__).resolve().parents[3] / "tests/data/gateway/live.js"


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js to run JavaScript with")
async def test_the_javascript_of_the_platform_works_unchanged(
    live: GatewayProcess, sql: "asyncpg.Connection[Any]", tmp_path: Path
) -> None:
    """The script stands in the file as front ends have it; only the address is that of this gateway."""
    script, replaced = re.subn(r"ws://localhost:8080", live.front_url.replace("http", "ws"), DOCUMENT.read_text())
    assert replaced == 1
    (tmp_path / "live.js").write_text(
        f"function refreshKnowledgeBase() {{ console.log('refreshed'); ws.close(); }}\n{script}"
    )
    await tell(sql, [event("other", "Queued")])
    node = await asyncio.create_subprocess_exec(
        *("node", "--experimental-websocket", str(tmp_path / "live.js")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"]},
    )
    assert node.stdout is not None
    try:
        first = await within(30, node.stdout.readline())
        assert first.decode().strip() == "任务 other 状态: queued"  # the snapshot: from now on it is told what happens
        await tell(sql, [event("task-1", "Queued"), event("task-1"), event("task-1", "Completed")])
        out, errors = await within(30, node.communicate())
    finally:
        with contextlib.suppress(ProcessLookupError):
            node.kill()
    assert node.returncode == 0, errors.decode()
    assert out.decode().splitlines() == [
        "进度: 0%",
        *("任务 task-1 状态: queued", "进度: 0%"),
        *("任务 task-1 状态: processing", "进度: 0%"),
        *("任务 task-1 状态: completed", "进度: 100%"),
        "refreshed",
    ]
