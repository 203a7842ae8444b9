"""Pods that never start: the reason is to be seen within seconds, and at the deadline the task fails with it."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from devstack import Endpoints
from tests.support.devstack import Kubectl
from tests.support.operator_lab import ROOT, Kubelet, OperatorProcess, Place, until

pytestmark = pytest.mark.integration

VISIBLE = 12.0  # seconds from the creation of a task to the reason in its status, on a machine that does much else
DEADLINE = 15


Start = Callable[..., OperatorProcess]


@pytest.fixture
def process(place: Place, cluster: Endpoints, tmp_path: Path) -> Start:
    def start(**environment: str) -> OperatorProcess:
        given: dict[str, Any] = {"kubeconfig": cluster.kubeconfig, "namespaces": [place.namespace], "folder": tmp_path}
        deadlines = {
            "OPERATOR_PENDING_DEADLINE_SECONDS": str(DEADLINE),
            "OPERATOR_CAPACITY_DEADLINE_SECONDS": str(DEADLINE),
            "OPERATOR_DOCUMENTS_CLAIM": "",
        }
        return OperatorProcess(**(given | deadlines | environment))

    return start


async def _quota(place: Place, **hard: str) -> None:
    await place.kube.do("POST", place.path("resourcequotas"), {"metadata": {"name": "few"}, "spec": {"hard": hard}})

    async def counted() -> bool:
        return "hard" in (await place.objects("resourcequotas"))[0].get("status", {})

    await until("the quota is known", counted)


async def _waits_then_fails(place: Place, cluster: Endpoints, *, reason: str, message: str) -> dict[str, Any]:
    """Create a task; check what people see while it waits; return its status at the end."""
    created = time.monotonic()
    await place.create()
    waiting = await place.wait_for("Queued", reason=reason)
    assert time.monotonic() - created < VISIBLE
    assert message in waiting["queue"]["message"]
    table = await asyncio.to_thread(Kubectl(cluster, place.namespace), "get", "ptask", "handbook", "--no-headers")
    assert table.split()[-2] == reason
    await place.wait_for("Failed", seconds=DEADLINE + 30)
    assert time.monotonic() - created >= DEADLINE - 1  # times in a status are whole seconds
    status = await place.status()
    assert status["error"]["reason"] == "PendingDeadlineExceeded"
    assert status["error"]["retryable"] is False
    assert f"within {DEADLINE}s: {reason}: " in status["error"]["message"]
    assert message in status["error"]["message"]
    assert "queue" not in status

    async def gone() -> bool:
        return not await place.objects("jobs") and not await place.objects("pods")

    await until("Job and pod are gone", gone, seconds=60)
    return status


@pytest.mark.e2e
async def test_an_image_that_does_not_exist(place: Place, process: Start, node: Endpoints) -> None:
    image = "127.0.0.1:1/processing-tasks/none:1"
    operator = process(OPERATOR_RUNNER_IMAGE=image, OPERATOR_RUNNER_NODE_SELECTOR="{}")
    async with operator.at_work():
        status = await _waits_then_fails(place, node, reason="ImagePullBackOff", message=image)
    assert "look at the runner's image" in status["error"]["message"]


async def test_a_node_selector_that_fits_no_node(place: Place, process: Start, cluster: Endpoints) -> None:
    async with process().at_work():
        status = await _waits_then_fails(place, cluster, reason="Unschedulable", message="nodes")
    assert "add a node that fits" in status["error"]["message"]


@pytest.mark.parametrize("hard", ["pods", "count/jobs.batch"])
async def test_a_quota_of_none(place: Place, process: Start, cluster: Endpoints, hard: str) -> None:
    await _quota(place, **{hard: "0"})
    async with process().at_work():
        status = await _waits_then_fails(place, cluster, reason="QuotaExceeded", message="exceeded quota: few")
    assert "raise the ResourceQuota" in status["error"]["message"]


async def test_the_example_of_a_quota_bounds_the_tasks_and_loses_none(place: Place, process: Start) -> None:
    example = yaml.safe_load((ROOT / "manifests/resource-quota.yaml").read_text())
    example["metadata"]["namespace"] = place.namespace
    await place.kube.do("POST", place.path("resourcequotas"), example)

    async def used() -> dict[str, str]:
        status = (await place.objects("resourcequotas"))[0].get("status", {})
        return status.get("used", {}) if status.get("hard", {}).keys() == example["spec"]["hard"].keys() else {}

    await until("the quota is known", used)
    allowed = int(example["spec"]["hard"]["pods"])
    names = [f"task-{number}" for number in range(allowed + 3)]
    kubelet = Kubelet(place, outcomes={1: None})
    async with process(OPERATOR_CAPACITY_DEADLINE_SECONDS="600").at_work(), kubelet.at_work():
        for name in names:
            await place.create(name)

        async def bounded() -> bool:
            statuses = [await place.status(name) for name in names]
            running = [one for one in statuses if one["phase"] == "Processing"]
            waiting = [one for one in statuses if one.get("queue", {}).get("reason") == "QuotaExceeded"]
            return (len(running), len(waiting)) == (allowed, 3)

        await until("as many run as may, the others wait", bounded)

        async def counted() -> bool:
            full = await used()
            counts = (full.get("pods"), full.get("count/processingtasks.tasks.zzdsj.io"))
            return counts == (str(allowed), str(len(names)))

        await until("the quota counts tasks and pods", counted)
        kubelet.outcomes = {}
        for name in names:
            status = await place.wait_for("Completed", name=name, seconds=120)
            assert [(one["number"], one["reason"]) for one in status["attempts"]] == [(1, "Succeeded")]
    assert len(kubelet.pods) == len(names)


async def test_a_pod_that_the_cluster_refuses(place: Place, process: Start, cluster: Endpoints) -> None:
    limits = {"limits": [{"type": "Container", "max": {"memory": "100Mi"}}]}
    await place.kube.do("POST", place.path("limitranges"), {"metadata": {"name": "small"}, "spec": limits})
    async with process().at_work():
        await _waits_then_fails(place, cluster, reason="PodForbidden", message="maximum memory usage per Container is 100Mi")


async def test_a_wait_goes_on_where_it_was_when_the_operator_is_killed(place: Place, process: Start) -> None:
    operator = process()
    async with operator.at_work():
        await place.create()
        before = await place.wait_for("Queued", reason="Unschedulable")
        operator.kill()
        operator.start()
        await operator.ready()
        after = await place.wait_for("Failed", seconds=DEADLINE + 30)
    assert after["queuedAt"] == before["queuedAt"]
    assert after["finishedAt"] > before["queue"]["since"]
