"""Installations that share a namespace by a label: each looks after its own tasks, and none takes another's for gone."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from devstack import Endpoints
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Result
from task_contract.names import TASK_UID_LABEL
from tests.support.devstack import Kubectl
from tests.support.operator_lab import MERGE, Kubelet, OperatorProcess, Place, until

pytestmark = pytest.mark.integration

SUCCESS = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=1, reason="Completed", result=Result(documents=1, chunks=3))
Start = Callable[..., OperatorProcess]


@pytest.fixture
def team(process: Start, cluster: Endpoints, place: Place, tmp_path: Path, url: str) -> Start:
    """Make the operator of a team, which shares namespace and database with those of the others."""

    def start(name: str, **environment: str) -> OperatorProcess:
        folder = tmp_path / name
        folder.mkdir()
        return OperatorProcess(
            kubeconfig=cluster.kubeconfig,
            namespaces=[place.namespace],
            folder=folder,
            OPERATOR_POSTGRES_URL=url,
            OPERATOR_INSTANCE=f"release-{name}",
            OPERATOR_SELECTOR=f"team={name}",
            **{"OPERATOR_RESYNC_SECONDS": "1", "OPERATOR_SWEEP_INTERVAL_SECONDS": "0", **environment},
        )

    return start


async def create(place: Place, name: str, team: str | None, **spec: Any) -> dict[str, Any]:
    labels = {} if team is None else {"team": team}
    return await place.create(name, labels=labels, **spec)


async def relabel(place: Place, name: str, team: str) -> None:
    body = {"metadata": {"labels": {"team": team}}}
    await place.kube.do("PATCH", place.path("processingtasks", name), body, content_type=MERGE)


async def fences(sql: "asyncpg.Connection[Any]") -> list[str]:
    return [row["reason"] for row in await sql.fetch("SELECT reason FROM task_fences")]


async def test_each_installation_runs_its_own_tasks_and_leaves_the_others_alone(
    place: Place, team: Start, sql: "asyncpg.Connection[Any]"
) -> None:
    kubelet = Kubelet(place, outcomes={1: None})
    async with team("a").at_work() as a, team("b").at_work() as b, kubelet.at_work():
        await create(place, "of-a", "a")
        await create(place, "of-b", "b")
        await create(place, "of-nobody", None)
        for name in ("of-a", "of-b"):
            await place.wait_for("Processing", name=name)
        made = {job["metadata"]["labels"]["app.kubernetes.io/instance"] for job in await place.objects("jobs")}
        assert made == {"release-a", "release-b"}
        # Some resyncs of each, with the other's tasks in the same tables and the other's Jobs in the same namespace.
        for one in (a, b):
            before = await _resyncs(one)
            await until("two resyncs", partial(_more, one, before + 2))
        assert len(await place.objects("jobs")) == 2
        assert await sql.fetchval("SELECT count(*) FROM tasks WHERE deleted_at IS NOT NULL") == 0
        assert await fences(sql) == []
        kubelet.outcomes = {1: SUCCESS}
        for name in ("of-a", "of-b"):
            await place.wait_for("Completed", name=name)
        waits = await place.status("of-nobody")
        assert (waits["phase"], waits["conditions"][0]["message"]) == ("Queued", "waiting for the operator")


async def _resyncs(operator: OperatorProcess) -> float:
    _, metrics = await operator.get("/metrics")
    lines = [line for line in metrics.splitlines() if line.startswith("task_operator_resyncs_total") and '"done"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


async def _more(operator: OperatorProcess, wanted: float) -> bool:
    return await _resyncs(operator) >= wanted


async def test_a_task_that_is_given_to_another_installation_goes_on_with_its_pod(
    place: Place, team: Start, sql: "asyncpg.Connection[Any]"
) -> None:
    kubelet = Kubelet(place, outcomes={1: None})
    async with team("a", OPERATOR_RESYNC_SECONDS="300").at_work(), team("b").at_work(), kubelet.at_work():
        task = await create(place, "moves", "a")
        await place.wait_for("Processing", name="moves")
        [job] = await place.objects("jobs")
        await relabel(place, "moves", "b")
        # The other one acts upon it now.
        await place.edit("moves", suspend=True)
        await place.wait_for("Queued", name="moves", reason="Suspended")
        await place.edit("moves", suspend=False)
        await place.wait_for("Processing", name="moves")
        kubelet.outcomes = {number: SUCCESS.model_copy(update={"attempt": number}) for number in (1, 2)}
        await place.wait_for("Completed", name="moves")
        assert job["metadata"]["labels"][TASK_UID_LABEL] == task["metadata"]["uid"]

        async def stored() -> bool:
            row = await sql.fetchrow("SELECT phase, deleted_at FROM tasks WHERE name = 'moves'")
            return row is not None and (row["phase"], row["deleted_at"]) == ("Completed", None)

        await until("PostgreSQL has the end of it", stored)
        assert "Deleted" not in await fences(sql)

        # There and back, while nothing else changes: it is not taken for gone by the one that had it before.
        await relabel(place, "moves", "a")
        await relabel(place, "moves", "b")
        await relabel(place, "moves", "a")
        await place.kube.do("DELETE", place.path("processingtasks", "moves"))

        async def told() -> bool:
            return await sql.fetchval("SELECT deleted_at FROM tasks WHERE name = 'moves'") is not None

        await until("PostgreSQL knows that it is deleted", told)


async def test_a_pod_goes_on_when_its_task_changes_hands(place: Place, team: Start) -> None:
    kubelet = Kubelet(place, outcomes={1: None})
    async with team("a").at_work(), team("b").at_work(), kubelet.at_work():
        await create(place, "moves", "a")
        await place.wait_for("Processing", name="moves")
        [before] = await place.objects("jobs")
        await relabel(place, "moves", "b")
        await asyncio.sleep(0)
        kubelet.outcomes = {1: SUCCESS}
        status = await place.wait_for("Completed", name="moves")
        assert [one["number"] for one in status["attempts"]] == [1]
        [after] = await place.objects("jobs")
        assert after["metadata"]["uid"] == before["metadata"]["uid"]


async def test_a_task_that_is_deleted_is_fenced_and_its_job_goes(
    place: Place, team: Start, sql: "asyncpg.Connection[Any]"
) -> None:
    async with team("a").at_work(), Kubelet(place, outcomes={1: None}).at_work():
        for name in ("goes", "goes-and-comes"):
            await create(place, name, "a")
            await place.wait_for("Processing", name=name)
            await place.kube.do("DELETE", place.path("processingtasks", name))
        again = await create(place, "goes-and-comes", "a")

        async def gone() -> bool:
            jobs = [job["metadata"]["labels"][TASK_UID_LABEL] for job in await place.objects("jobs")]
            return jobs == [again["metadata"]["uid"]] and await fences(sql) == ["Deleted", "Deleted"]

        await until("both are fenced, and the Job of the new one is left", gone)
        await place.wait_for("Processing", name="goes-and-comes")


async def test_pools_and_schedules_are_selected_too(place: Place, team: Start, kubectl: Kubectl) -> None:
    def of(kind: str, name: str, team: str, spec: dict[str, Any]) -> dict[str, Any]:
        metadata = {"name": name, "labels": {"team": team}}
        return {"apiVersion": "tasks.zzdsj.io/v1", "kind": kind, "metadata": metadata, "spec": spec}

    schedule = {"schedule": "0 3 * * *", "taskTemplate": {"spec": {"type": "health_check"}}}
    pool = {"types": ["health_check"], "min": 0, "max": 1}
    async with team("a").at_work():
        for name, label in (("others", "b"), ("own", "a")):
            await place.kube.do("POST", place.path("processingschedules"), of("ProcessingSchedule", name, label, schedule))
            await place.kube.do("POST", place.path("workerpools"), of("WorkerPool", name, label, pool))

        async def told(plural: str) -> list[str]:
            return [
                one["metadata"]["name"]
                for one in await place.objects(plural)
                if "observedGeneration" in one.get("status", {})
            ]

        for plural in ("processingschedules", "workerpools"):
            await until(f"the own one of {plural} has a status", partial(told, plural))
            assert await told(plural) == ["own"]
