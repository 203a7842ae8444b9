"""Two operators as processes on a real API server: one acts, the other takes over, and none writes what it should not."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiohttp import web

from devstack import Endpoints
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Result
from task_platform.kubernetes import Access
from tests.support.operator_lab import Kubelet, OperatorProcess, Place, Proxy, until

pytestmark = pytest.mark.integration

Start = Callable[..., OperatorProcess]
LEASES = "/apis/coordination.k8s.io/v1"
SUCCESS = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=1, reason="Completed", result=Result(documents=1))
ENDED = {1: SUCCESS, 2: SUCCESS, 3: SUCCESS}


@pytest.fixture
async def proxy(cluster: Endpoints, tmp_path: Path) -> AsyncIterator[Proxy]:
    proxy = Proxy(Access.from_kubeconfig(cluster.kubeconfig), folder=tmp_path)
    await proxy.start()
    yield proxy
    await proxy.aclose()


def election(place: Place, **more: str) -> dict[str, str]:
    return {"OPERATOR_LEASE_NAME": "operator", "OPERATOR_LEASE_NAMESPACE": place.namespace, **more}


@asynccontextmanager
async def pair(process: Start, **environment: Any) -> AsyncIterator[list[OperatorProcess]]:
    """Two operators that are ready, the one that leads first."""
    both = [process(**environment), process(**environment)]
    try:
        for one in both:
            one.start()
        for one in both:
            await one.ready()
        first = await leader(both)
        yield [first, *(one for one in both if one is not first)]
    finally:
        for one in both:
            if one.exit_code() is None:
                os.kill(one.pid, signal.SIGCONT)
            one.kill()


async def gauge(operator: OperatorProcess, name: str) -> float | None:
    _, text = await operator.get("/metrics")
    return next((float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} ")), None)


def resident(operator: OperatorProcess) -> int:
    """Return its memory in KiB."""
    status = Path(f"/proc/{operator.pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


async def leader(operators: list[OperatorProcess], *, seconds: float = 20) -> OperatorProcess:
    async def look() -> OperatorProcess | None:
        leads = [one for one in operators if one.exit_code() is None and await gauge(one, "task_operator_leader") == 1]
        assert len(leads) <= 1
        return leads[0] if leads else None

    found: OperatorProcess = await until("one of them leads", look, seconds=seconds)
    return found


async def phases(place: Place) -> dict[str, str]:
    return {one["metadata"]["name"]: one["status"]["phase"] for one in await place.objects("processingtasks")}


async def completed(place: Place, count: int, *, seconds: float = 60) -> None:
    async def look() -> bool:
        found = await phases(place)
        return len(found) == count and set(found.values()) == {"Completed"}

    await until(f"{count} tasks are completed", look, seconds=seconds, interval=0.5)


async def load(place: Place, prefix: str, *, count: int, pause: float = 0.1) -> None:
    for number in range(count):
        await place.create(f"{prefix}-{number}", kbId=f"kb-{number % 7}")
        await asyncio.sleep(pause)


async def once_each(place: Place) -> None:
    """No task had two attempts, and none has a Job of more than one."""
    for task in await place.objects("processingtasks"):
        assert [one["number"] for one in task["status"].get("attempts", [])] == [1], task["status"]
    owners = [job["metadata"]["ownerReferences"][0]["name"] for job in await place.objects("jobs")]
    assert len(owners) == len(set(owners))


@pytest.mark.parametrize(("how", "within"), [(signal.SIGKILL, 15.0), (signal.SIGTERM, 5.0)])
async def test_the_other_one_takes_over_in_time_and_no_task_is_lost_or_run_twice(
    place: Place, process: Start, url: str, sql: "asyncpg.Connection[Any]", how: signal.Signals, within: float
) -> None:
    environment = election(place, OPERATOR_POSTGRES_URL=url)
    async with pair(process, **environment) as (first, second), Kubelet(place, outcomes=ENDED).at_work():
        assert (await second.get("/readyz"))[1] == "ok, standing by\n"
        loading = asyncio.create_task(load(place, "before", count=20))
        await until("some have begun", lambda: place.objects("jobs"))
        os.kill(first.pid, how)
        began = time.monotonic()
        await place.create("after")

        async def acts() -> bool:
            return any(job["metadata"]["name"].startswith("after-") for job in await place.objects("jobs"))

        await until("the new leader makes a Job", acts, seconds=within + 10)
        assert time.monotonic() - began < within
        await loading
        await completed(place, 21)
        await once_each(place)

        async def projected() -> bool:
            rows = await sql.fetch("SELECT phase FROM tasks WHERE deleted_at IS NULL")
            return [row["phase"] for row in rows] == ["Completed"] * 21

        await until("PostgreSQL says the same", projected, seconds=20)
        assert await sql.fetchval("SELECT count(*) FROM task_events WHERE phase = 'Completed'") == 21


async def test_a_leader_that_was_paused_and_wakes_changes_nothing(
    place: Place, process: Start, url: str, sql: "asyncpg.Connection[Any]"
) -> None:
    environment = election(place, OPERATOR_POSTGRES_URL=url)
    async with pair(process, **environment) as (first, second), Kubelet(place, outcomes=ENDED).at_work():
        loading = asyncio.create_task(load(place, "task", count=40))
        await until("some have begun", lambda: place.objects("jobs"))
        await place.create("gone", suspend=True)
        await place.wait_for("Queued", name="gone", reason="Suspended")
        os.kill(first.pid, signal.SIGSTOP)
        await loading
        await until("the other one leads", lambda: gauge(second, "task_operator_leader"), seconds=20)
        await place.edit("gone", cancel=True)
        await place.wait_for("Canceled", name="gone")
        await place.kube.do("DELETE", place.path("processingtasks", "gone"))
        os.kill(first.pid, signal.SIGCONT)
        await completed(place, 40)
        await once_each(place)

        async def stands_by() -> bool:
            assert first.exit_code() is None
            return (await first.get("/readyz"))[1] == "ok, standing by\n"

        await until("the one that woke stands by", stands_by, seconds=20)
        assert await gauge(second, "task_operator_leader") == 1

        async def projected() -> bool:
            rows = await sql.fetch("SELECT phase, deleted_at IS NULL AS there FROM tasks ORDER BY phase")
            return [tuple(row) for row in rows] == [("Canceled", False), *[("Completed", True)] * 40]

        await until("PostgreSQL says the same", projected, seconds=30)
        second.stop()  # and the one that was paused can do it all again
        await place.create("after")
        await completed(place, 41)


async def test_the_one_that_stands_by_writes_nothing_and_is_small(
    place: Place, process: Start, proxy: Proxy, cluster: Endpoints
) -> None:
    first = process(**election(place))
    async with first.at_work(), Kubelet(place, outcomes=ENDED).at_work():
        await leader([first])
        async with process(kubeconfig=proxy.kubeconfig, **election(place)).at_work() as standby:
            await load(place, "task", count=10, pause=0)
            await completed(place, 10)
            assert proxy.writes == []
            assert await gauge(standby, "task_operator_leader") == 0
            assert await gauge(standby, "task_operator_status_writes_total") == 0
            assert resident(standby) < 110 * 1024  # KiB; 102,436 were seen, with every library of the tests beside it
            first.kill()
            await place.create("after")
            await completed(place, 11)
            assert "POST jobs" in proxy.writes


async def test_an_api_server_that_is_away_for_long_stops_the_leader_and_loses_nothing(
    place: Place, process: Start, proxy: Proxy
) -> None:
    operator = process(kubeconfig=proxy.kubeconfig, **election(place))
    async with operator.at_work(), Kubelet(place, outcomes=ENDED).at_work():
        await leader([operator])
        proxy.refuse = lambda *_: web.Response(status=503, text="away")
        await place.create()

        async def stopped() -> bool:
            return await gauge(operator, "task_operator_leader") == 0

        await until("it does not lead any more", stopped, seconds=15)
        proxy.refuse = lambda *_: None
        await completed(place, 1)
        assert operator.exit_code() is None


async def test_an_api_server_that_asks_to_wait_is_asked_no_more_often_than_it_says(
    place: Place, process: Start, proxy: Proxy
) -> None:
    refused: list[float] = []

    def busy(method: str, path: str) -> web.Response | None:
        if "leases" in path or method == "GET":
            return None
        refused.append(time.monotonic())
        body = {"kind": "Status", "reason": "TooManyRequests", "code": 429, "message": "too many requests"}
        return web.json_response(body, status=429, headers={"Retry-After": "3"})

    async with (
        process(kubeconfig=proxy.kubeconfig, **election(place)).at_work() as operator,
        Kubelet(place, outcomes=ENDED).at_work(),
    ):
        await leader([operator])
        proxy.refuse = busy
        began = time.monotonic()
        await load(place, "task", count=10, pause=0)

        async def often() -> bool:
            return len(refused) >= 30

        await until("each was refused three times", often, seconds=60)
        assert time.monotonic() - began > 6 - 0.5  # three seconds between two tries of each
        proxy.refuse = lambda *_: None
        await completed(place, 10)
        await once_each(place)


async def test_without_rights_on_leases_it_ends_and_says_so(place: Place, process: Start, proxy: Proxy) -> None:
    proxy.refuse = lambda _, path: (
        web.json_response({"kind": "Status", "message": "leases is forbidden"}, status=403) if "leases" in path else None
    )
    operator = process(kubeconfig=proxy.kubeconfig, **election(place))
    operator.start()

    async def over() -> bool:
        return operator.exit_code() is not None

    await until("it has ended", over, seconds=30)
    assert operator.exit_code() == 1
    assert "leases is forbidden" in operator.log.read_text()
