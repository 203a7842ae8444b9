"""Schedules on a real API server: with the operator as a process that is killed, and with its part alone under a clock."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from task_contract.names import SCHEDULED_AT_ANNOTATION
from task_operator.cluster import Cluster
from task_operator.metrics import Metrics
from task_operator.schedule_controller import ScheduleController
from task_operator.schedules import rfc3339
from tests.support.operator_lab import MERGE, Kube, OperatorProcess, Place, Proxy, until

pytestmark = pytest.mark.integration

NAME = "nightly"


async def create(place: Place, **spec: Any) -> dict[str, Any]:
    body = {
        "apiVersion": "tasks.zzdsj.io/v1",
        "kind": "ProcessingSchedule",
        "metadata": {"name": NAME},
        "spec": {"schedule": "* * * * *", "taskTemplate": {"spec": {"type": "health_check"}}} | spec,
    }
    return await place.kube.do("POST", place.path("processingschedules"), body)


async def get(place: Place) -> dict[str, Any]:
    return await place.kube.do("GET", place.path("processingschedules", NAME))


async def write(place: Place, plural: str, name: str, status: dict[str, Any]) -> None:
    """Write a status as the operator does."""
    await place.kube.do("PATCH", f"{place.path(plural, name)}/status", {"status": status}, content_type=MERGE)


async def times(place: Place) -> list[str]:
    """Return the times that the tasks were made for, as hour and minute."""
    tasks = await place.objects("processingtasks")
    return sorted(task["metadata"]["annotations"][SCHEDULED_AT_ANNOTATION][11:16] for task in tasks)


def condition(schedule: dict[str, Any], kind: str = "Ready") -> tuple[str, str] | None:
    found = {one["type"]: (one["status"], one["reason"]) for one in schedule["status"]["conditions"]}
    return found.get(kind)


# ------------------------------------------------------------------------------------------------------------ a process


async def test_an_operator_that_is_killed_before_it_could_say_so_makes_no_second_task(
    place: Place, process: Callable[..., OperatorProcess], tmp_path: Path
) -> None:
    due = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=1)
    await create(place, schedule=f"{due.minute} {due.hour} {due.day} {due.month} *")  # once a year
    await write(place, "processingschedules", NAME, {"observedGeneration": 1, "nextScheduleTime": rfc3339(due)})
    proxy = Proxy(place.kube.access, folder=tmp_path)
    proxy.refuse = lambda method, path: (
        web.json_response({"message": "etcd is full"}, status=500) if "processingschedules/nightly/status" in path else None
    )
    await proxy.start()
    try:
        async with process(kubeconfig=proxy.kubeconfig).at_work():
            await until("the task is made", lambda: times(place))
    finally:
        await proxy.aclose()
    (task,) = await place.objects("processingtasks")
    assert condition(await get(place)) == ("False", "Pending")

    async def told() -> dict[str, Any] | None:
        found = await get(place)
        return found if found["status"].get("lastScheduleTime") else None

    async with process().at_work():
        schedule = await until("the schedule tells of its task", told)
        assert schedule["status"]["lastScheduleTime"] == rfc3339(due)
        assert schedule["status"]["nextScheduleTime"].startswith(str(due.year + 1))
        assert schedule["status"]["missed"] == 0
        assert condition(schedule) == ("True", "Scheduled")
        (same,) = await place.objects("processingtasks")
        assert same["metadata"]["uid"] == task["metadata"]["uid"]
        await place.edit(same["metadata"]["name"], cancel=True)  # the watch tells how it ends

        async def idle() -> bool:
            return not (await get(place))["status"]["active"]

        await until("the schedule has no active task", idle)
        await place.kube.do("DELETE", place.path("processingschedules", NAME))

        async def gone() -> bool:
            return await place.objects("processingtasks") == []

        await until("the tasks went with their schedule", gone)
        await create(place, schedule="61 * * * *")

        async def stalled() -> bool:
            return condition(await get(place), "Stalled") == ("True", "InvalidSchedule")

        await until("the watch has told of a schedule that has no times", stalled, seconds=20)


async def test_an_operator_whose_cluster_does_not_know_the_kind_goes_on_without_schedules(
    place: Place, process: Callable[..., OperatorProcess], tmp_path: Path
) -> None:
    proxy = Proxy(place.kube.access, folder=tmp_path)
    proxy.refuse = lambda method, path: (
        web.json_response({"message": "no such kind"}, status=404) if "processingschedules" in path else None
    )
    await proxy.start()
    try:
        async with process(kubeconfig=proxy.kubeconfig).at_work() as operator:
            await place.create()

            async def job() -> bool:
                return bool(await place.objects("jobs"))

            await until("a task has its Job", job)
            assert "there are no schedules: install the CRD processingschedules" in operator.log.read_text()
    finally:
        await proxy.aclose()


# ----------------------------------------------------------------------------------------------------- under a clock


class Clocked:
    """The part of the operator that schedules, on a real API server, under a clock of the test's."""

    def __init__(self, place: Place, cluster: Cluster, now: datetime) -> None:
        self.place, self._cluster, self.now = place, cluster, now
        self.restart()

    def restart(self) -> None:
        """Begin as a new process does."""
        self._controller = ScheduleController(
            api=self._cluster,
            metrics=Metrics(),
            archived=lambda _uid, _version: True,
            namespaces=[self.place.namespace],
            clock=lambda: self.now,
        )

    async def step(self, minutes: float = 1) -> dict[str, Any]:
        """Let time pass and have the schedule looked at; return it."""
        self.now += timedelta(minutes=minutes)
        await self._controller._list()
        await self._controller._guarded((self.place.namespace, NAME))
        return await get(self.place)

    async def end(self, phase: str) -> None:
        """Let all tasks end."""
        for task in await self.place.objects("processingtasks"):
            if "finishedAt" not in task["status"]:
                ended = {"phase": phase, "finishedAt": rfc3339(self.now)}
                await write(self.place, "processingtasks", task["metadata"]["name"], ended)


@pytest.fixture
async def clocked(place: Place, kube: Kube) -> AsyncIterator[Callable[..., Any]]:
    cluster = Cluster(kube.access)
    await cluster.warm_up()

    async def make(**spec: Any) -> Clocked:
        created = datetime.fromisoformat((await create(place, **spec))["metadata"]["creationTimestamp"])
        there = Clocked(place, cluster, created.replace(second=0))
        await there.step(0)
        return there

    yield make
    await cluster.aclose()


async def test_each_minute_has_one_task_whoever_makes_it(place: Place, clocked: Callable[..., Any]) -> None:
    one = await clocked()
    for number in range(1, 4):
        schedule = await one.step()
        if number == 2:
            one.restart()
            await one.step(0)
    assert len(await times(place)) == len(set(await times(place))) == 3
    assert schedule["status"]["activeCount"] == 3
    version = schedule["metadata"]["resourceVersion"]
    one.restart()
    assert (await one.step(0))["metadata"]["resourceVersion"] == version
    two, three = Clocked(place, one._cluster, one.now), Clocked(place, one._cluster, one.now)
    await asyncio.gather(two.step(), three.step())
    assert len(await times(place)) == 4
    assert (await two.step(0))["status"]["missed"] == 0


async def test_a_forbidden_minute_waits_and_a_replaced_task_is_canceled(place: Place, clocked: Callable[..., Any]) -> None:
    one = await clocked(concurrencyPolicy="Forbid", successfulHistoryLimit=1)
    await one.step()
    schedule = await one.step()
    assert condition(schedule) == ("True", "Waiting")
    assert len(await times(place)) == 1
    await one.end("Completed")
    schedule = await one.step(0.5)
    assert condition(schedule) == ("True", "Scheduled")
    assert len(await times(place)) == 2
    assert schedule["status"]["lastSuccessfulTime"]

    await place.kube.do(
        "PATCH",
        place.path("processingschedules", NAME),
        {"spec": {"concurrencyPolicy": "Replace"}},
        content_type=MERGE,
    )
    await one.step(0.5)
    tasks = sorted(await place.objects("processingtasks"), key=lambda task: str(task["metadata"]["name"]))
    assert [task["spec"]["cancel"] for task in tasks] == [False, True, False]
    await one.end("Completed")
    await one.step(0.1)
    assert len(await times(place)) == 1


async def test_what_cron_or_the_time_zones_do_not_know_stalls_the_schedule(
    place: Place, clocked: Callable[..., Any]
) -> None:
    one = await clocked(schedule="61 * * * *")
    assert condition(await get(place), "Stalled") == ("True", "InvalidSchedule")
    for change, stalled in (
        ({"schedule": "* * * * *", "timeZone": "Mars/Base"}, ("True", "UnknownTimeZone")),
        ({"timeZone": "Asia/Shanghai"}, None),
    ):
        path = place.path("processingschedules", NAME)
        await place.kube.do("PATCH", path, {"spec": change}, content_type=MERGE)
        assert condition(await one.step(0), "Stalled") == stalled
    assert await times(place) == []
    await one.step()
    assert len(await times(place)) == 1
