"""The gateway: creating over REST beside a bare create, batches, GET after POST, lists among a million tasks, idle memory.

It runs as a process of its own on a real API server and PostgreSQL, in trusting mode but for the part ``rights``, where each
request has a token. The caller is this process: its own event loop is part of every figure.
"""

import asyncio
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import aiohttp
import asyncpg
import orjson
import uvloop

import devstack
from devstack import cluster
from task_contract.crd import custom_resource_definition
from task_platform.kubernetes import Access
from tests.bench.measurement import Measurement
from tests.bench.usage import watching
from tests.support.databases import fresh_database
from tests.support.gateway_lab import GatewayProcess, account, document
from tests.support.many_tasks import fill
from tests.support.operator_lab import Kube, Place

RATE: Final = 100  # requests a second
SECONDS: Final = 60
BATCH: Final = 1000
TASKS: Final = 1_000_000
PAGES: Final = 300  # requests of each list
PARTS: Final = ("idle", "create", "rights", "batch", "visible", "list")

Send = Callable[[], Awaitable[None]]


def run(parts: Sequence[str] = ()) -> list[Measurement]:
    """Measure the parts, or all: about five minutes."""
    endpoints = devstack.up(["cluster", "stores"])
    cluster.apply([custom_resource_definition()])
    server = os.environ.get("TASKS_POSTGRES_URL") or endpoints.host_urls["TASKS_POSTGRES_URL"]
    chosen = list(parts) or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        raise devstack.DevstackError(f"cannot measure {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    with fresh_database(server, prefix="bench") as url, tempfile.TemporaryDirectory() as folder:
        return uvloop.run(_measure(endpoints.kubeconfig, url, Path(folder), chosen))


async def _measure(kubeconfig: Path, url: str, folder: Path, parts: Sequence[str]) -> list[Measurement]:
    kube = Kube(Access.from_kubeconfig(kubeconfig))
    found: list[Measurement] = []
    try:
        for part in parts:
            async with Place.fresh(kube) as place:
                trusting = part != "rights"
                process = GatewayProcess(
                    kubeconfig=kubeconfig,
                    postgres=url,
                    folder=folder,
                    namespaces=["tenant-0", "tenant-1", "tenant-2", "tenant-3"] if part == "list" else [place.namespace],
                    trusting=trusting,
                    GATEWAY_RATE="100000",
                    GATEWAY_BURST="1000000",
                )
                async with process.at_work():
                    found += await _PARTS[part](process, place, url)
    finally:
        await kube.aclose()
    return found


async def _idle(process: GatewayProcess, place: Place, url: str) -> list[Measurement]:
    await process.ask("GET", "/health")
    with watching(process.pid) as seen:
        await asyncio.sleep(3)
    how = "PSS after its start and one request"
    return [Measurement(metric="memory of an idle gateway", value=max(seen), unit="MB", target=80, how=how)]


async def _create(process: GatewayProcess, place: Place, url: str) -> list[Measurement]:
    return await _pair(process, place, token=None, name="create")


async def _rights(process: GatewayProcess, place: Place, url: str) -> list[Measurement]:
    token = await account(place.kube, place.namespace, "bench", verbs=("create",))
    return await _pair(process, place, token=token, name="create with a token")


async def _pair(process: GatewayProcess, place: Place, *, token: str | None, name: str) -> list[Measurement]:
    """POST to the gateway, and a bare create of the same, in turns of a second: both see the same machine."""
    spec = {
        "type": "document_processing",
        "kbId": "kb-42",
        "priority": "high",
        "payload": {"filePath": "/data/handbook.pdf"},
    }
    body, headers = orjson.dumps(document()), {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=64)) as session:

        async def post() -> None:
            async with session.post(process.url + "/api/v1/tasks", data=body, headers=headers) as response:
                assert response.status == 202, await response.text()
                await response.read()

        async def bare() -> None:
            resource = {
                "apiVersion": "tasks.zzdsj.io/v1",
                "kind": "ProcessingTask",
                "metadata": {"name": f"task-{uuid.uuid4().hex[:20]}"},
                "spec": spec,
            }
            await place.kube.do("POST", place.path("processingtasks"), resource)

        ours: list[float] = []
        theirs: list[float] = []
        await _load(post, seconds=1)
        await _load(bare, seconds=1)
        for _ in range(SECONDS):
            ours += await _load(post, seconds=1)
            theirs += await _load(bare, seconds=1)
    how = (
        f"{RATE}/s for {SECONDS} s, open loop, in turns of a second with as many bare creates by the same process; "
        f"median {1000 * statistics.median(ours):.1f} ms, bare {1000 * statistics.median(theirs):.1f}"
    )
    slow, base = 1000 * _p99(ours), 1000 * _p99(theirs)
    return [
        Measurement(metric=f"{name}, p99", value=slow, unit="ms", target=50, baseline=base, how=how),
        Measurement(metric=f"{name}, p99 to that of a bare create", value=slow / base, unit="times", target=3, how=how),
    ]


async def _load(send: Send, *, seconds: float) -> list[float]:
    """Send at the rate whether answers come or not; return how long each took from when it was due."""
    began = time.perf_counter()

    async def one(due: float) -> float:
        await send()
        return time.perf_counter() - due

    tasks = []
    for number in range(int(RATE * seconds)):
        due = began + number / RATE
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(due)))
    return list(await asyncio.gather(*tasks))


async def _batch(process: GatewayProcess, place: Place, url: str) -> list[Measurement]:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        answer = await process.do("POST", "/api/v1/tasks/batch", [document() for _ in range(BATCH)])
        times.append(time.perf_counter() - began)
        assert answer["accepted"] == BATCH
    began = time.perf_counter()
    gate = asyncio.Semaphore(16)

    async def bare(number: int) -> None:
        async with gate:
            await place.create(f"bare-{number}")

    await asyncio.gather(*(bare(number) for number in range(BATCH)))
    baseline = time.perf_counter() - began
    how = f"median of three ({', '.join(f'{one:.2f}' for one in times)} s); baseline: as many bare creates, 16 at once"
    metric = f"a batch of {BATCH} accepted"
    return [Measurement(metric=metric, value=statistics.median(times), unit="s", target=3, baseline=baseline, how=how)]


async def _visible(process: GatewayProcess, place: Place, url: str) -> list[Measurement]:
    """From sending POST to the answer of a GET that shows the task."""
    async with aiohttp.ClientSession() as session:
        body, headers = orjson.dumps(document()), {"Content-Type": "application/json"}

        async def there_and_back() -> None:
            async with session.post(process.url + "/api/v1/tasks", data=body, headers=headers) as response:
                name = (await response.json())["id"]
            async with session.get(f"{process.url}/api/v1/tasks/{name}") as response:
                assert response.status == 200

        times = []
        for _ in range(10):
            times += await _load(there_and_back, seconds=1)
    how = f"POST and then GET of the task, {RATE}/s for 10 s; median {1000 * statistics.median(times):.1f} ms"
    return [Measurement(metric="created to visible in GET, p99", value=_p99(times), unit="s", target=1, how=how)]


LISTS: Final = {
    "": "no filter",
    "&kb_id=kb-40": "a knowledge base",
    "&status=failed": "failed",
    "&status=canceled": "canceled, one in 997",
    "&priority=low": "low, one in 997",
    "&task_type=health_check": "health checks, one in 997",
}


async def _list(process: GatewayProcess, place: Place, url: str) -> list[Measurement]:
    connection = await asyncpg.connect(url)
    await fill(connection, TASKS)
    await connection.close()
    found = []
    for scope in ("tenant-0", "*"):
        for query, what in LISTS.items():
            times, path = [], f"/api/v1/tasks?limit=50&namespace={scope}{query}"
            cursor = ""
            for _ in range(PAGES):
                began = time.perf_counter()
                page = await process.do("GET", path + cursor)
                times.append(time.perf_counter() - began)
                assert page["items"], what
                cursor = f"&cursor={page['next_cursor']}" if page["next_cursor"] else ""
            where = "one namespace" if scope != "*" else "all four"
            how = f"{PAGES} pages of 50, one after the other; median {1000 * statistics.median(times):.1f} ms"
            metric = f"list of {where}, {what}, p99"
            found.append(Measurement(metric=metric, value=1000 * _p99(times), unit="ms", target=50, how=how))
    return found


_PARTS: Final[dict[str, Callable[[GatewayProcess, Place, str], Awaitable[list[Measurement]]]]] = {
    "idle": _idle,
    "create": _create,
    "rights": _rights,
    "batch": _batch,
    "visible": _visible,
    "list": _list,
}


def _p99(times: Sequence[float]) -> float:
    return sorted(times)[int(0.99 * (len(times) - 1))]
