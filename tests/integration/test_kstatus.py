"""Every phase as tools read it that know nothing of us: kstatus, the library behind kpt, Flux and cli-utils.

The statuses are the ones that the operator decides upon, stored by the real API server, which adds its defaults.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from task_contract.models import Failure, Phase, ProcessingTask, QueueStatus, Status
from task_contract.pools import WorkerPool
from task_contract.schedules import ProcessingSchedule
from task_operator.controller import merge_patch
from task_operator.observation import Ending, Need, Observed, view_of
from task_operator.reconcile import decide
from task_operator.statuses import completed, ended, failed, given_back, queued
from task_platform.kubernetes import Forbidden
from tests.support.devstack import Kubectl
from tests.support.kstatus import HEALTH, argo, kstatus
from tests.support.operator_values import at, ended_pod, failure, job, success
from tests.support.operator_values import failed as failed_job
from tests.support.pool_values import PoolWorld, pool, pool_manifest
from tests.support.schedule_world import World
from tests.support.schedule_world import world as schedule_world

pytestmark = pytest.mark.integration

Decide = Callable[[ProcessingTask], Status]


def _decided(task: ProcessingTask, **observed: Any) -> Status:
    status = decide(Observed(task=task, **observed), now=at(40), random=0.5).status
    assert status is not None
    return status


def _of_job(task: ProcessingTask, **fields: Any) -> dict[str, Any]:
    """Return the fields by which a Job belongs to this task and to its present stay in the queue."""
    view = view_of(Observed(task=task))
    stamp = (task.status.queued_at or task.metadata.creation_timestamp or at(0)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"name": view.name, "owner_uid": task.metadata.uid, "queue_stamp": stamp, "uid": "job", **fields}


def _processing(task: ProcessingTask) -> Status:
    return _decided(task, jobs=(job(**_of_job(task, ready=1)),))


def _retrying(task: ProcessingTask) -> Status:
    pods = (ended_pod(job_uid="job", outcome=failure()),)
    return _decided(task, jobs=(failed_job(**_of_job(task)),), pods=pods, answered=frozenset({Need.PODS}))


def _waiting(task: ProcessingTask) -> Status:
    return queued(task, QueueStatus(reason="Unschedulable", message="no node fits", since=at(40)), now=at(40))


def _given_back(task: ProcessingTask) -> Status:
    queue = QueueStatus(reason="StoreUnavailable", message="cannot reach Milvus", since=at(40))
    return queued(task, queue, now=at(40), **given_back(task, view_of(Observed(task=task)), now=at(40)))


def _completed(task: ProcessingTask) -> Status:
    return completed(task, view_of(Observed(task=task)), success(), None, now=at(60))


def _superseded(task: ProcessingTask) -> Status:
    return completed(task, view_of(Observed(task=task)), success(reason="Superseded"), None, now=at(60))


def _failed(task: ProcessingTask) -> Status:
    return failed(task, Failure(reason="DocumentEmpty", message="cannot find text", retryable=False), now=at(60))


def _canceled(task: ProcessingTask) -> Status:
    ending = Ending(phase=Phase.CANCELED, reason="Canceled", message="canceled by spec.cancel")
    return ended(task, view_of(Observed(task=task)), ending, now=at(60))


ARGO = {"InProgress": "Progressing", "Current": "Healthy", "Failed": "Degraded"}
"""How Argo CD calls what kstatus says."""


class Tasks:
    """Tasks of one namespace, given the statuses that the operator would write."""

    def __init__(self, kubectl: Kubectl, namespace: str) -> None:
        self._kubectl = kubectl
        self._namespace = namespace

    def create(self, name: str) -> dict[str, Any]:
        spec = {"type": "document_processing", "kbId": "kb", "payload": {"filePath": "a.pdf"}}
        metadata = {"name": name, "namespace": self._namespace}
        self._kubectl.apply(
            {"apiVersion": "tasks.zzdsj.io/v1", "kind": "ProcessingTask", "metadata": metadata, "spec": spec}
        )
        return self.get(name)

    def get(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._kubectl.get("ptask", name, "-n", self._namespace)
        return found

    def patch(self, name: str, patch: dict[str, Any], *options: str) -> dict[str, Any]:
        body = json.dumps(patch)
        self._kubectl("patch", "ptask", name, "-n", self._namespace, "--type=merge", "-p", body, *options)
        return self.get(name)

    def write(self, name: str, *steps: Decide) -> dict[str, Any]:
        """Write the statuses that STEPS decide upon, one after the other; return the task as it is then stored."""
        for step in steps:
            task = ProcessingTask.model_validate(self.get(name))
            patch = merge_patch(task.status.manifest(), step(task).manifest())
            self.patch(name, {"status": patch}, "--subresource=status")
        return self.get(name)


@pytest.fixture
def tasks(kubectl: Kubectl, namespace: str) -> Tasks:
    return Tasks(kubectl, namespace)


@pytest.mark.parametrize(
    ("steps", "phase", "expected"),
    [
        ((), "Queued", "InProgress"),
        ((_waiting,), "Queued", "InProgress"),
        ((_processing,), "Processing", "InProgress"),
        ((_processing, _given_back), "Queued", "InProgress"),
        ((_processing, _retrying), "Retrying", "InProgress"),
        ((_processing, _retrying, _processing), "Processing", "InProgress"),
        ((_processing, _completed), "Completed", "Current"),
        ((_processing, _superseded), "Completed", "Current"),
        ((_processing, _retrying, _completed), "Completed", "Current"),
        ((_failed,), "Failed", "Failed"),
        ((_processing, _retrying, _failed), "Failed", "Failed"),
        ((_waiting, _canceled), "Canceled", "Failed"),
        ((_processing, _canceled), "Canceled", "Failed"),
    ],
    ids=lambda value: (
        (" → ".join(step.__name__.strip("_") for step in value) or "just created") if isinstance(value, tuple) else None
    ),
)
def test_every_phase_is_what_the_table_says(tasks: Tasks, steps: tuple[Decide, ...], phase: str, expected: str) -> None:
    tasks.create("one")
    stored = tasks.write("one", *steps)
    assert stored["status"]["phase"] == phase
    ((status, _),) = kstatus(stored)
    assert status == expected
    ((health, _),) = argo(stored)
    assert health == ARGO[expected]
    task = ProcessingTask.model_validate(stored)
    types = {one.type: one.status for one in task.status.conditions}
    consistent = types.pop("StoresConsistent", None)  # beside those of the phase, and nothing to kstatus
    assert consistent in ({"Completed": ("True", None)}.get(phase, ("False", None)))
    assert (
        types
        == {
            "Queued": {"Ready": "False"},
            "Processing": {"Ready": "False", "Succeeded": "Unknown", "Reconciling": "True"},
            "Retrying": {"Ready": "False", "Succeeded": "Unknown", "Reconciling": "True"},
            "Completed": {"Ready": "True", "Succeeded": "True"},
            "Failed": {"Ready": "False", "Succeeded": "False", "Stalled": "True"},
            "Canceled": {"Ready": "False", "Succeeded": "False", "Stalled": "True"},
        }[phase]
    )


@pytest.mark.parametrize(("end", "expected"), [(_completed, "Current"), (_failed, "Failed")])
def test_an_edit_of_a_finished_task_is_in_progress_until_it_is_acknowledged(
    tasks: Tasks, end: Decide, expected: str
) -> None:
    tasks.create("one")
    tasks.write("one", _processing, end)
    edited = tasks.patch("one", {"spec": {"ttlSecondsAfterFinished": 3600}})
    assert edited["metadata"]["generation"] == 2
    assert edited["status"]["observedGeneration"] == 1
    acknowledged = tasks.write("one", _decided)
    assert acknowledged["status"]["observedGeneration"] == 2
    assert [status for status, _ in kstatus(edited, acknowledged)] == ["InProgress", expected]


def test_an_edit_of_a_waiting_task_leaves_it_in_progress(tasks: Tasks) -> None:
    tasks.create("one")
    edited = tasks.patch("one", {"spec": {"priority": "high"}})
    waiting = tasks.write("one", _waiting)
    assert [status for status, _ in kstatus(edited, waiting)] == ["InProgress", "InProgress"]


def test_the_message_of_a_failure_is_the_tasks_own(tasks: Tasks) -> None:
    tasks.create("one")
    assert kstatus(tasks.write("one", _failed)) == [("Failed", "cannot find text")]


@pytest.mark.parametrize("kind", [ProcessingTask, WorkerPool, ProcessingSchedule])
def test_the_health_script_for_argo_cd_says_of_its_fixtures_what_they_say(
    kind: type[ProcessingTask | WorkerPool | ProcessingSchedule],
) -> None:
    folder = HEALTH.parent / kind.__name__
    cases = yaml.safe_load((folder / "health_test.yaml").read_text())["tests"]
    objects = [yaml.safe_load((folder / case["inputPath"]).read_text()) for case in cases]
    fixtures = sorted(f"testdata/{path.name}" for path in (folder / "testdata").iterdir())
    assert [case["inputPath"] for case in cases] == fixtures
    for one in objects:
        kind.model_validate(one)  # what the operator writes has this form
    found = [{"status": status, "message": message} for status, message in argo(*objects)]
    assert found == [case["healthStatus"] for case in cases]


def test_a_task_that_nobody_has_seen_yet_is_progressing_in_argo_cd() -> None:
    assert argo({"apiVersion": "tasks.zzdsj.io/v1", "kind": "ProcessingTask", "metadata": {"name": "a"}}) == [
        ("Progressing", "waiting for the operator")
    ]


# ------------------------------------------------------------------------------------------------------------------ pools


def _pool_world(**spec: Any) -> PoolWorld:
    return PoolWorld(pool(spec={"scaleDownAfter": "10s", "idleTimeout": "20s"} | spec))


def _serving() -> PoolWorld:
    world = _pool_world(min=2)
    world.step(10)
    return world


def _at_zero() -> PoolWorld:
    world = _pool_world()
    world.step(10)
    return world


def _starting() -> PoolWorld:
    world = _pool_world(min=2)
    world.step(1)
    return world


def _failing() -> PoolWorld:
    world = _pool_world(min=2)
    world.boots = False
    world.step(60)
    return world


def _pending() -> PoolWorld:
    world = _pool_world(min=2)
    world.schedules = False
    world.step(700)
    return world


def _rolling() -> PoolWorld:
    world = _serving()
    world.revision = "b"
    world.step(1)
    return world


def _broken_roll() -> PoolWorld:
    world = _serving()
    world.revision, world.boots = "b", False
    world.step(60)
    return world


def _without_redis() -> PoolWorld:
    world = _serving()
    world.redis = False
    world.step(5)
    return world


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (_serving, "Current"),
        (_at_zero, "Current"),
        (_starting, "InProgress"),
        (_rolling, "InProgress"),
        (_without_redis, "InProgress"),
        (_failing, "Failed"),
        (_pending, "Failed"),
        (_broken_roll, "Failed"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else None,
)
def test_every_state_of_a_pool_is_what_the_table_says(
    kubectl: Kubectl, namespace: str, state: Callable[[], PoolWorld], expected: str
) -> None:
    decided = state().status.manifest()
    manifest = pool_manifest()
    inside = ["-n", namespace]
    metadata = {"name": "texts", "namespace": namespace}
    kubectl.apply(
        {"apiVersion": manifest["apiVersion"], "kind": "WorkerPool", "metadata": metadata, "spec": manifest["spec"]}
    )
    patch = ["--subresource=status", "--type=merge", "-p", json.dumps({"status": decided})]
    kubectl("patch", "wpool", "texts", *inside, *patch)
    stored = kubectl.get("wpool", "texts", *inside)
    ((status, _),) = kstatus(stored)
    ((health, _),) = argo(stored)
    assert (status, health) == (expected, ARGO[expected])


# -------------------------------------------------------------------------------------------------------------- schedules


def _new() -> World:
    return schedule_world()


def _scheduled() -> World:
    place = schedule_world()
    place.step(minutes=5)
    return place


def _suspended() -> World:
    place = schedule_world(suspend=True)
    place.look()
    return place


def _held_up() -> World:
    place = schedule_world(concurrencyPolicy="Forbid")
    place.step(minutes=5)
    place.step(minutes=5)
    return place


def _invalid() -> World:
    place = schedule_world(schedule="61 * * * *")
    place.look()
    return place


def _refused() -> World:
    place = schedule_world()
    place.look()
    place.refuse = Forbidden("exceeded quota", status=403)
    place.step(minutes=5)
    return place


@pytest.mark.parametrize(
    ("state", "expected", "shown"),
    [
        (_new, "InProgress", "Progressing"),
        (_scheduled, "Current", "Healthy"),
        (_suspended, "Current", "Suspended"),
        (_held_up, "Current", "Healthy"),
        (_refused, "InProgress", "Progressing"),
        (_invalid, "Failed", "Degraded"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else None,
)
def test_every_state_of_a_schedule_is_what_the_table_says(
    kubectl: Kubectl, namespace: str, state: Callable[[], World], expected: str, shown: str
) -> None:
    place = state()
    inside = ["-n", namespace]
    metadata = {"name": "nightly", "namespace": namespace}
    kubectl.apply({key: place.manifest[key] for key in ("apiVersion", "kind", "spec")} | {"metadata": metadata})
    if place.status:
        patch = ["--subresource=status", "--type=merge", "-p", json.dumps({"status": place.status})]
        kubectl("patch", "psched", "nightly", *inside, *patch)
    stored = kubectl.get("psched", "nightly", *inside)
    ((status, _),) = kstatus(stored)
    ((health, _),) = argo(stored)
    assert (status, health) == (expected, shown)
