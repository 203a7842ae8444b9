"""The promise that nothing is lost: the operator is killed before and after every write of a task, on a real API server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from devstack import Endpoints
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Failure
from task_operator.cluster import Access
from tests.support.devstack import Kubectl
from tests.support.operator_lab import Kube, Kubelet, OperatorProcess, Place, Proxy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

AT_ONCE = 4
"""Histories that run side by side: each waits for the Job controller most of the time."""

RETRYABLE = AttemptOutcome(
    outcome=Outcome.FAILED,
    attempt=1,
    reason="StoresDisagree",
    error=Failure(reason="StoresDisagree", message="cannot verify", retryable=True, stage="verify"),
)


@dataclass(frozen=True)
class History:
    """How one task went."""

    end: dict[str, Any]
    writes: list[str]
    killed: bool


async def _history(
    place: Place,
    folder: Path,
    *,
    outcomes: dict[int, AttemptOutcome | None],
    cancel: bool,
    kill_at: tuple[str, int, str] | None = None,
) -> History:
    """Run one task from beginning to end, with the operator killed at one write and started again."""
    proxy = Proxy(place.kube.access, folder=folder)
    await proxy.start()
    operator = OperatorProcess(kubeconfig=proxy.kubeconfig, namespaces=[place.namespace], folder=folder)
    again = asyncio.Event()

    def on_kill() -> None:
        operator.kill()
        again.set()

    proxy.kill_at = kill_at
    proxy.on_kill = on_kill

    async def restart() -> None:
        await again.wait()
        operator.start()

    restarting = asyncio.create_task(restart())
    kubelet = Kubelet(place, outcomes=outcomes)
    try:
        async with operator.at_work(), kubelet.at_work():
            await place.create()
            if cancel:
                await place.wait_for("Processing")
                await place.edit(cancel=True)
            await place.wait_for("Completed", "Failed", "Canceled", seconds=90)
            if kill_at is not None and not proxy.killed:
                # The last write was not answered yet when the task was seen to have ended.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(again.wait(), 5)
            if proxy.killed:
                await asyncio.wait_for(restarting, 5)
                await operator.ready()
            status = await place.status()
            jobs = await place.objects("jobs")
        end = {
            "phase": status["phase"],
            "attempt": status["attempt"],
            "attempts": [(one["number"], one["job"], one["reason"]) for one in status["attempts"]],
            "conditions": [(one["type"], one["status"], one["reason"]) for one in status["conditions"]],
            "error": status.get("error"),
            "Jobs left": sorted(job["metadata"]["labels"]["tasks.zzdsj.io/attempt"] for job in jobs),
            "Jobs made": len(kubelet.jobs),
            "pods made": len(kubelet.pods),
        }
        end["attempts"] = [(number, reason) for number, _, reason in end["attempts"]]
        return History(end=end, writes=proxy.writes, killed=proxy.killed)
    finally:
        restarting.cancel()
        await proxy.aclose()


@pytest.fixture
async def kube(kubectl: Kubectl, cluster: Endpoints) -> AsyncIterator[Kube]:
    kube = Kube(Access.from_kubeconfig(cluster.kubeconfig))
    yield kube
    await kube.aclose()


@pytest.mark.parametrize(
    ("outcomes", "cancel", "expected"),
    [
        pytest.param({}, False, ["POST jobs", "PATCH Processing", "PATCH Completed"], id="success"),
        pytest.param(
            {1: RETRYABLE},
            False,
            [
                "POST jobs",
                "PATCH Processing",
                "PATCH Retrying",
                "POST jobs",
                "DELETE jobs",
                "PATCH Processing",
                "PATCH Completed",
            ],
            id="retry",
        ),
        pytest.param({1: None}, True, ["POST jobs", "PATCH Processing", "DELETE jobs", "PATCH Canceled"], id="cancel"),
    ],
)
async def test_a_kill_at_any_write_of_a_task_changes_nothing_in_the_end(
    kube: Kube,
    tmp_path: Path,
    outcomes: dict[int, AttemptOutcome | None],
    cancel: bool,
    expected: list[str],
) -> None:
    slots = asyncio.Semaphore(AT_ONCE)

    async def run(kill_at: tuple[str, int, str] | None) -> History:
        async with slots, Place.fresh(kube) as place:
            return await _history(place, tmp_path, outcomes=outcomes, cancel=cancel, kill_at=kill_at)

    undisturbed = await run(None)
    # A machine under load may start a pod so late that the operator says why it waits: that write is none of the path.
    assert [write for write in undisturbed.writes if write != "PATCH Queued"] == expected

    points = [
        (label, expected[: number + 1].count(label), when)
        for number, label in enumerate(expected)
        for when in ("before", "after")
    ]
    async with asyncio.TaskGroup() as group:
        histories = [group.create_task(run(point)) for point in points]

    for point, history in zip(points, (done.result() for done in histories), strict=True):
        assert history.killed, f"the operator was never killed at {point}: {history.writes}"
        assert history.end == undisturbed.end, f"killed at {point}: {history.writes}"
