"""Live updates: 1,000 WebSockets on 100 knowledge bases and 20 that see all, at 100 updates a second; created → visible.

The gateway is a process of its own on real PostgreSQL, Redis and API server. The clients share this process and do little: a
few lines on a raw connection that find the number, or the percentage, of a frame. Transitions are written as the operator
writes them, ten batches a second; for what is created the operator itself runs, and tasks stay suspended.
"""

import asyncio
import os
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast

import aiohttp
import asyncpg
import orjson
import uvloop
from redis.asyncio import Redis

import devstack
from devstack import cluster
from task_contract.crd import custom_resource_definition
from task_contract.messages import progress_event
from task_contract.models import Stage
from task_contract.names import PROGRESS_CHANNEL
from task_platform.kubernetes import Access
from tests.bench.measurement import Measurement
from tests.bench.usage import watching
from tests.support.databases import fresh_database
from tests.support.event_sources import event
from tests.support.event_tables import tell
from tests.support.gateway_lab import GatewayProcess, document
from tests.support.live_lab import connected
from tests.support.operator_lab import Kube, OperatorProcess, Place, until

CLIENTS: Final = 980
SEE_ALL: Final = 20
BASES: Final = 100
BATCHES: Final = 10  # a second, each of as many transitions as progress messages
SECONDS: Final = 40
CREATED: Final = 300
CREATE_RATE: Final = 20  # a second
PARTS: Final = ("crowd", "visible")


@dataclass
class Load:
    """When what was told, and when it arrived."""

    sent: dict[int, float] = field(default_factory=dict)
    """By number of the event; by percentage and more (see :func:`_progress_key`) for progress."""
    late: list[float] = field(default_factory=list)
    """Seconds from telling to arrival, one for each frame."""
    early: dict[int, list[float]] = field(default_factory=dict)
    """Arrivals of events whose transaction has not been answered yet."""


class Client(asyncio.Protocol):
    """A WebSocket that reads frames and keeps when each came."""

    def __init__(self, load: Load, path: str) -> None:
        self._load = load
        self._path = path
        self._data = bytearray()
        self._open = False
        self.frames = 0
        self.lost: Exception | str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # which uvloop's is not by its class
        self.transport.write(
            f"GET {self._path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = error or "closed"

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self._data += data
        if not self._open:
            head, separator, rest = self._data.partition(b"\r\n\r\n")
            if not separator:
                return
            assert b" 101 " in head, head
            self._open, self._data = True, bytearray(rest)
        while (frame := self._frame()) is not None:
            kind, body = frame
            if kind == 9:
                self.transport.write(b"\x8a\x80\0\0\0\0")  # pong
            elif kind == 1:
                self._arrived(orjson.loads(body), now)

    def _frame(self) -> tuple[int, bytes] | None:
        data = self._data
        if len(data) < 2:
            return None
        size, start = data[1], 2
        if size == 126:
            if len(data) < 4:
                return None
            size, start = struct.unpack_from(">H", data, 2)[0], 4
        if len(data) < start + size:
            return None
        kind, body = data[0] & 15, bytes(data[start : start + size])
        del data[: start + size]
        return kind, body

    def _arrived(self, told: dict[str, Any], now: float) -> None:
        if told["type"] != "task":
            return
        self.frames += 1
        key = told.get("event") or _progress_key(told["task_id"], told["progress"])
        if (sent := self._load.sent.get(key)) is not None:
            self._load.late.append(now - sent)
        else:
            self._load.early.setdefault(key, []).append(now)


def _progress_key(name: str, percent: int) -> int:
    """Return a key below zero: no number of an event."""
    return -(int(name.rpartition("-")[2]) * 1000 + percent) - 1


def run(parts: Sequence[str] = ()) -> list[Measurement]:
    """Measure the parts, or both: two minutes."""
    endpoints = devstack.up(["cluster", "stores"])
    cluster.apply([custom_resource_definition()])
    chosen = list(parts) or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise devstack.DevstackError(f"cannot measure {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    server = os.environ.get("TASKS_POSTGRES_URL") or endpoints.host_urls["TASKS_POSTGRES_URL"]
    measured: list[Measurement] = []
    for part in chosen:
        with fresh_database(server, prefix="bench") as url, tempfile.TemporaryDirectory() as folder:
            work = {"crowd": _crowd, "visible": _visible}[part]
            measured += uvloop.run(work(endpoints, url, Path(folder)))
    return measured


@asynccontextmanager
async def _gateway(endpoints: devstack.Endpoints, url: str, folder: Path, namespace: str) -> AsyncIterator[GatewayProcess]:
    process = GatewayProcess(
        kubeconfig=endpoints.kubeconfig,
        postgres=url,
        folder=folder,
        namespaces=[namespace],
        trusting=True,
        GATEWAY_REDIS_URL=endpoints.host_urls["TASKS_REDIS_URL"],
        GATEWAY_RATE="10000",
        GATEWAY_BURST="10000",
    )
    async with process.at_work():

        async def follows() -> bool:
            return "task_gateway_live_connected 1.0" in (await process.ask("GET", "/metrics"))[1]

        await until("the gateway follows tasks", follows)
        yield process


async def _crowd(endpoints: devstack.Endpoints, url: str, folder: Path) -> list[Measurement]:
    load, loop = Load(), asyncio.get_running_loop()
    async with _gateway(endpoints, url, folder, "knowledge") as process:
        with watching(process.pid) as idle:
            await asyncio.sleep(1)
        began = time.monotonic()
        clients = []
        for number in range(CLIENTS + SEE_ALL):
            path = "/ws/tasks" if number >= CLIENTS else f"/ws/tasks?kb_id=kb-{number % BASES}"
            _, client = await loop.create_connection(
                lambda path=path: Client(load, path),  # type: ignore[misc]
                *("127.0.0.1", process.front_port),
            )
            clients.append(client)

        async def connected_all() -> bool:
            return f"task_gateway_live_clients {CLIENTS + SEE_ALL}.0" in (await process.ask("GET", "/metrics"))[1]

        await until("all clients are connected", connected_all, seconds=60)
        connecting = time.monotonic() - began
        cpu = _cpu(process.pid)
        with watching(process.pid) as memory:
            await _tell(load, url, endpoints.host_urls["TASKS_REDIS_URL"])
        cpu = (_cpu(process.pid) - cpu) / SECONDS
        dropped = [client.lost for client in clients if client.lost is not None]
        if dropped:
            raise devstack.DevstackError(f"cannot measure: {len(dropped)} clients were lost, such as {dropped[0]}")
        for client in clients:
            client.transport.abort()
    late = sorted(load.late)
    updates = 2 * (BATCHES * 5) * SECONDS
    how = (
        f"{updates / SECONDS:.0f} updates/s for {SECONDS} s, half transitions and half progress, {len(late)} frames "
        f"({len(late) / SECONDS:.0f}/s) to {CLIENTS} clients of a knowledge base each and {SEE_ALL} of all; from before the "
        f"transaction, or the message to Redis, to the client; all connected in {connecting:.1f} s; "
        f"gateway {100 * cpu:.0f} % of a core"
    )
    expected = updates * (SEE_ALL + CLIENTS / BASES)
    return [
        Measurement(metric="update → client, p50", value=1000 * _at(late, 0.50), unit="ms", how=how),
        Measurement(metric="update → client, p99", value=1000 * _at(late, 0.99), unit="ms", target=1000, how=how),
        Measurement(
            metric="frames that arrived", value=100 * len(late) / expected, unit="%", target=99, better="higher", how=how
        ),
        Measurement(metric="gateway with 1,000 clients, memory", value=max(memory), unit="MB", target=200, how=how),
        Measurement(metric="gateway idle, memory", value=max(idle), unit="MB", target=80, how="before the first client"),
    ]


async def _tell(load: Load, url: str, redis_url: str) -> None:
    """Tell transitions and progress at the rate; return a moment after the last."""
    connection, redis = await asyncpg.connect(url), Redis.from_url(redis_url)
    names = [(f"task-{number}", f"kb-{number % BASES}") for number in range(500)]
    await tell(connection, [event(name, kb_id=kb_id) for name, kb_id in names])  # they run: progress can be told
    await asyncio.sleep(2)
    load.late.clear()
    load.early.clear()
    began, turn = time.monotonic(), 0
    while turn < SECONDS * BATCHES:
        await asyncio.sleep(max(0.0, began + turn / BATCHES - time.monotonic()))
        batch = [names[(5 * turn + place) % len(names)] for place in range(5)]
        sent = time.monotonic()
        for number in await tell(connection, [event(name, kb_id=kb_id, message="goes on") for name, kb_id in batch]):
            load.sent[number] = sent
            load.late += [at - sent for at in load.early.pop(number, ())]
        # Of other tasks than those of the transitions: a transition takes the place of progress that waits.
        for name, _ in (names[(5 * turn + place + len(names) // 2) % len(names)] for place in range(5)):
            percent = turn * 5 // len(names) % 100
            load.sent[_progress_key(name, percent)] = time.monotonic()
            said = {"uid": event(name).uid, "namespace": "knowledge", "name": name, "attempt": 1, "stage": Stage.EMBED}
            message = progress_event(**said, progress=percent, at=datetime.now(UTC))  # type: ignore[arg-type]
            await redis.publish(PROGRESS_CHANNEL, message)
        turn += 1
    await asyncio.sleep(2)
    await connection.close()
    await redis.aclose()


async def _visible(endpoints: devstack.Endpoints, url: str, folder: Path) -> list[Measurement]:
    """From the 202 of a POST until a WebSocket client is told of the task."""
    kube = Kube(Access.from_kubeconfig(endpoints.kubeconfig))
    seen: dict[str, float] = {}
    accepted: dict[str, float] = {}
    async with AsyncExitStack() as stack:
        stack.push_async_callback(kube.aclose)
        place = await stack.enter_async_context(Place.fresh(kube))
        operator = OperatorProcess(
            kubeconfig=endpoints.kubeconfig, namespaces=[place.namespace], folder=folder, OPERATOR_POSTGRES_URL=url
        )
        await stack.enter_async_context(operator.at_work())
        process = await stack.enter_async_context(_gateway(endpoints, url, folder, place.namespace))
        client = await stack.enter_async_context(connected(process.front_url))
        session = await stack.enter_async_context(aiohttp.ClientSession())

        async def follow() -> None:
            while (frame := await client.next(seconds=60)) is not None:
                seen.setdefault(frame["task_id"], time.monotonic())

        following = asyncio.create_task(follow())
        stack.callback(following.cancel)
        body, began = orjson.dumps(document(suspend=True)), time.monotonic()
        for turn in range(CREATED):
            await asyncio.sleep(max(0.0, began + turn / CREATE_RATE - time.monotonic()))
            async with session.post(
                process.url + "/api/v1/tasks", data=body, headers={"Content-Type": "application/json"}
            ) as response:
                assert response.status == 202, await response.text()
                accepted[(await response.json())["id"]] = time.monotonic()

        async def all_seen() -> bool:
            return accepted.keys() <= seen.keys()

        await until("all tasks are visible", all_seen, seconds=60)
    late = sorted(max(0.0, seen[name] - at) for name, at in accepted.items())
    how = f"{CREATED} suspended tasks at {CREATE_RATE}/s through REST, the operator and PostgreSQL to a WebSocket"
    return [
        Measurement(metric="created → WebSocket, p50", value=1000 * _at(late, 0.50), unit="ms", how=how),
        Measurement(metric="created → WebSocket, p99", value=1000 * _at(late, 0.99), unit="ms", target=1000, how=how),
    ]


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("inf")


def _cpu(pid: int) -> float:
    """Return the CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
