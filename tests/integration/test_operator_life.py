"""What becomes of tasks that wait for each other, are made twice, are too many, or whose pod is never heard of again."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from devstack import Endpoints
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Result
from tests.support.devstack import Kubectl
from tests.support.operator_lab import Kubelet, OperatorProcess, Place, ended, running, until

pytestmark = pytest.mark.integration

SUCCESS = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=1, reason="Completed", result=Result(documents=1, chunks=87))
GOES_ON: dict[int, AttemptOutcome | None] = {1: None}
STUCK = 3  # seconds, instead of a minute

Start = Callable[..., OperatorProcess]


# -------------------------------------------------------------------------------------------------------------- limits


async def _unfinished_jobs(place: Place) -> int:
    return sum(not job.get("status", {}).get("conditions") for job in await place.objects("jobs"))


async def test_tasks_wait_in_line_for_their_knowledge_base_and_say_where(
    place: Place, process: Start, cluster: Endpoints
) -> None:
    operator = process(OPERATOR_LIMIT_KNOWLEDGE_BASE="1")
    kubelet = Kubelet(place, outcomes=dict(GOES_ON))
    async with operator.at_work(), kubelet.at_work():
        await place.create("runs")
        await place.wait_for("Processing", name="runs")
        await place.create("first-in-line", priority="high")
        await place.create("second-in-line")
        await place.create("elsewhere", kbId="another")
        first = await place.wait_for("Queued", name="first-in-line", reason="KnowledgeBaseLimit")
        second = await place.wait_for("Queued", name="second-in-line", reason="KnowledgeBaseLimit")
        assert (first["queue"]["position"], second["queue"]["position"]) == (1, 2)
        assert first["queue"]["message"] == "as many tasks of kb-42 run as may: 1"
        await place.wait_for("Processing", name="elsewhere")
        kubectl = Kubectl(cluster, place.namespace)
        described = await asyncio.to_thread(kubectl, "describe", "ptask", "second-in-line")
        for text in ("KnowledgeBaseLimit", "Position:  2", "as many tasks of kb-42 run as may: 1"):
            assert text in described

        operator.kill()  # the line is not written down anywhere: the next process finds it in tasks and Jobs
        operator.start()
        await operator.ready()
        assert await _unfinished_jobs(place) == 2

        kubelet.outcomes = {1: SUCCESS}
        for name in ("runs", "first-in-line", "second-in-line", "elsewhere"):
            await place.wait_for("Completed", name=name)
    ends = {name: (await place.status(name))["startedAt"] for name in ("runs", "first-in-line", "second-in-line")}
    assert list(ends.values()) == sorted(ends.values())


async def test_while_a_store_is_down_one_task_at_a_time_tries(place: Place, process: Start) -> None:
    down = AttemptOutcome(outcome=Outcome.GIVEN_BACK, attempt=1, reason="StoreUnavailable")
    kubelet = Kubelet(place, outcomes={1: down})
    async with process().at_work(), kubelet.at_work():
        await place.create("finds-out")
        await place.wait_for("Queued", name="finds-out", reason="StoreUnavailable")
        names = [f"task-{number}" for number in range(4)]
        for name in names:
            await place.create(name, kbId=name)
        for _ in range(10):
            assert await _unfinished_jobs(place) <= 1
            await asyncio.sleep(0.1)
        waits = await place.wait_for("Queued", name=names[-1], reason="StoreUnavailable")
        assert "position" in waits["queue"], "it was not tried, and waits in line"
        kubelet.outcomes = {1: SUCCESS}
        for name in ("finds-out", *names):
            await place.wait_for("Completed", name=name)


# -------------------------------------------------------------------------------------------------------------- budget


async def test_over_its_budget_a_namespace_loses_what_has_ended_first(
    place: Place, process: Start, url: str, sql: "asyncpg.Connection[Any]"
) -> None:
    async with process(OPERATOR_TASK_BUDGET="2", OPERATOR_POSTGRES_URL=url).at_work(), Kubelet(place).at_work():
        for number in range(4):
            await place.create(f"task-{number}")

            async def ends(name: str = f"task-{number}") -> bool:
                row = await sql.fetchrow("SELECT phase FROM tasks WHERE name = $1", name)
                return row is not None and row["phase"] == "Completed"

            await until("the task has ended", ends)

        async def few() -> bool:
            return [task["metadata"]["name"] for task in await place.objects("processingtasks")] == ["task-2", "task-3"]

        await until("two are left, the latest", few)

        async def told() -> bool:
            gone = await sql.fetch("SELECT name FROM tasks WHERE deleted_at IS NOT NULL ORDER BY name")
            return [row["name"] for row in gone] == ["task-0", "task-1"]

        await until("PostgreSQL has the others", told)


async def test_without_postgresql_no_task_goes_before_its_time(place: Place, process: Start) -> None:
    async with process(OPERATOR_TASK_BUDGET="1", OPERATOR_RESYNC_SECONDS="1").at_work(), Kubelet(place).at_work():
        for number in range(3):
            await place.create(f"task-{number}")
            await place.wait_for("Completed", name=f"task-{number}")
        await place.create("later", ttlSecondsAfterFinished=0)

        async def gone() -> bool:
            return await place.task("later") is None

        await until("a TTL is still kept", gone)
        assert len(await place.objects("processingtasks")) == 3


# ---------------------------------------------------------------------------------------------------------- duplicates


async def test_of_two_tasks_with_one_key_one_runs(place: Place, process: Start, url: str) -> None:
    kubelet = Kubelet(place, outcomes=dict(GOES_ON))
    async with process(OPERATOR_POSTGRES_URL=url).at_work(), kubelet.at_work():
        made = [await place.create(name, idempotencyKey="order-66") for name in ("one", "two")]
        made.sort(key=lambda task: (task["metadata"]["creationTimestamp"], task["metadata"]["uid"]))
        first, second = (task["metadata"]["name"] for task in made)
        duplicate = await place.wait_for("Canceled", name=second, reason="Duplicate")
        assert duplicate["duplicateOf"] == first
        await place.wait_for("Processing", name=first)
        await place.create("other-key", idempotencyKey="order-67")
        await place.wait_for("Processing", name="other-key")

        kubelet.outcomes = {1: SUCCESS}
        await place.wait_for("Completed", name=first)
        await place.create("late", idempotencyKey="order-66")
        assert (await place.wait_for("Canceled", name="late"))["duplicateOf"] == first
        assert (await place.status("late")).get("job") is None


# --------------------------------------------------------------------------------------------------- pods that are lost


@pytest.fixture
async def lost_node(place: Place) -> AsyncIterator[str]:
    """A node that nobody runs: what is bound to it is never told anything."""
    name = f"lost-{uuid.uuid4().hex[:8]}"
    await place.kube.do("POST", "/api/v1/nodes", {"metadata": {"name": name}})
    yield name
    await place.kube.ask("DELETE", f"/api/v1/nodes/{name}")
    for pod in await place.objects("pods"):
        await place.kube.ask("DELETE", place.path("pods", pod["metadata"]["name"]), {"gracePeriodSeconds": 0})


async def _runs_on(place: Place, node: str) -> str:
    """Have the task's pod run there, as its Job sees it; return the pod's name."""

    async def waits() -> dict[str, Any] | None:
        pods = [pod for pod in await place.objects("pods") if pod["status"].get("phase") == "Pending"]
        return pods[0] if pods else None

    pod = await until("there is a pod", waits)
    name: str = pod["metadata"]["name"]
    target = {"apiVersion": "v1", "kind": "Node", "name": node}
    binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
    await place.kube.do("POST", place.path("pods", name) + "/binding", binding)
    await Kubelet(place).write(pod, running())
    await place.wait_for("Processing")
    return name


@pytest.mark.parametrize("by_hand", ["pod", "job"])
async def test_a_pod_that_is_lost_with_its_node_loses_the_attempt_to_another(
    place: Place, process: Start, url: str, sql: "asyncpg.Connection[Any]", lost_node: str, by_hand: str
) -> None:
    async with process(OPERATOR_STUCK_SECONDS=str(STUCK), OPERATOR_POSTGRES_URL=url).at_work():
        task = await place.create()
        lost = await _runs_on(place, lost_node)
        await _intent(sql, task, holder=lost)
        begun = time.monotonic()
        if by_hand == "pod":
            await place.kube.do("DELETE", place.path("pods", lost), {"gracePeriodSeconds": 1})
        else:
            options = {"propagationPolicy": "Foreground"}
            await place.kube.do("DELETE", place.path("jobs", (await place.status())["job"]), options)
            await place.kube.do("DELETE", place.path("pods", lost), {"gracePeriodSeconds": 1})
        waiting = await place.wait_for("Queued", reason="NodeLost", seconds=STUCK + 20)
        assert lost_node in waiting["queue"]["message"]
        assert time.monotonic() - begun >= STUCK
        [held] = await sql.fetch("SELECT epoch, holder, state FROM document_versions")
        assert tuple(held) == (2, "", "intent"), "the pod could still commit"

        kubelet = Kubelet(place)

        async def another() -> dict[str, Any] | None:
            return next((pod for pod in await place.objects("pods") if pod["metadata"]["name"] != lost), None)

        pod = await until("there is another pod", another, seconds=20)
        await kubelet.write(pod, running())
        await place.wait_for("Processing")
        await kubelet.write(pod, ended(SUCCESS))
        status = await place.wait_for("Completed")
        assert [one["number"] for one in status["attempts"]] == [1], "the lost attempt was counted"
        assert lost in {pod["metadata"]["name"] for pod in await place.objects("pods")}, "the pod was there all the time"


async def _intent(sql: "asyncpg.Connection[Any]", task: dict[str, Any], *, holder: str) -> None:
    """Enter what a runner enters when it begins."""
    metadata = task["metadata"]
    base = (metadata["namespace"], task["spec"]["kbId"])
    await sql.execute(
        "INSERT INTO knowledge_bases (namespace, kb_id, model_fingerprint, dimension) VALUES ($1, $2, 'model', 8)", *base
    )
    await sql.execute(
        "INSERT INTO documents (namespace, kb_id, document_id, last_version) VALUES ($1, $2, 'handbook', 1)", *base
    )
    await sql.execute(
        "INSERT INTO document_versions (namespace, kb_id, document_id, version, task_uid, task_created_at, holder) "
        "VALUES ($1, $2, 'handbook', 1, $3, now(), $4)",
        *base,
        metadata["uid"],
        holder,
    )


# ----------------------------------------------------------------------------------------- what is deleted, and its Job


async def test_the_last_job_goes_before_its_task(place: Place, process: Start) -> None:
    async with process(OPERATOR_JOB_TTL_SECONDS="2").at_work(), Kubelet(place).at_work():
        await place.create()
        await place.wait_for("Completed")

        async def gone() -> bool:
            return not await place.objects("jobs") and not await place.objects("pods")

        await until("Job and pod are gone", gone)
        assert (await place.status())["phase"] == "Completed"


async def test_a_namespace_that_is_deleted_takes_everything_along_and_stops_nobody(
    place: Place, cluster: Endpoints, url: str, sql: "asyncpg.Connection[Any]", tmp_path: Path
) -> None:
    async with Place.fresh(place.kube) as other:
        namespaces = [place.namespace, other.namespace]
        operator = OperatorProcess(
            kubeconfig=cluster.kubeconfig, namespaces=namespaces, folder=tmp_path, OPERATOR_POSTGRES_URL=url
        )
        async with (
            operator.at_work(),
            Kubelet(place, outcomes=dict(GOES_ON)).at_work(),
            Kubelet(other, outcomes=dict(GOES_ON)).at_work() as kubelet,
        ):
            uid = (await place.create())["metadata"]["uid"]
            await other.create()
            await place.wait_for("Processing")
            await other.wait_for("Processing")
            await place.kube.do("DELETE", f"/api/v1/namespaces/{place.namespace}")

            async def gone() -> bool:
                status, _ = await place.kube.ask("GET", f"/api/v1/namespaces/{place.namespace}")
                return status == 404

            await until("the namespace is gone", gone, seconds=90)

            async def fenced() -> bool:
                return bool(await sql.fetchval("SELECT true FROM task_fences WHERE task_uid = $1", uid))

            await until("its task can publish nothing", fenced)
            kubelet.outcomes = {1: SUCCESS}
            await other.wait_for("Completed")
    assert "Traceback" not in operator.log.read_text()
