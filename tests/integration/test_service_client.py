"""The client for services, on a real API server."""

import json
import threading
from datetime import timedelta
from typing import Any

import kubernetes.client
import kubernetes.config
import pytest

from devstack import Endpoints
from service_client import TaskClient, TaskConflict, TaskNotFound, TaskRefused, TaskTimeout
from task_contract.models import Payload, Phase, ProcessingTask, Spec, TaskType
from tests.support.devstack import Kubectl

pytestmark = pytest.mark.integration

SPEC: dict[str, Any] = {"type": "document_processing", "kbId": "kb", "payload": {"filePath": "a.pdf"}}


@pytest.fixture
def client(cluster: Endpoints, namespace: str, kubectl: Kubectl) -> TaskClient:
    api = kubernetes.config.new_client_from_config(str(cluster.kubeconfig))
    return TaskClient(kubernetes.client.CustomObjectsApi(api), namespace=namespace)


def test_a_named_task_is_created_once_however_often_it_is_submitted(client: TaskClient) -> None:
    first = client.submit(SPEC, name="one")
    again = client.submit(
        Spec(type=TaskType.DOCUMENT_PROCESSING, kb_id="kb", payload=Payload(file_path="a.pdf")), name="one"
    )
    assert first.metadata.uid == again.metadata.uid
    assert client.submit(SPEC).metadata.uid != first.metadata.uid


def test_what_the_client_wrote_is_told_from_what_others_did(client: TaskClient, namespace: str, kubectl: Kubectl) -> None:
    client.submit(SPEC, name="one")
    client.cancel("one")
    found = kubectl.get("ptask", "one", "-n", namespace, "--show-managed-fields")
    managed = found["metadata"]["managedFields"]
    assert {one["manager"] for one in managed} == {"processing-tasks-client"}
    assert found["spec"]["cancel"] is True


def test_a_name_that_another_spec_has_is_a_conflict(client: TaskClient) -> None:
    client.submit(SPEC, name="one")
    with pytest.raises(TaskConflict, match="another spec"):
        client.submit(SPEC | {"kbId": "other"}, name="one")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SPEC | {"prio": "high"}, "spec.prio"),
        ({"type": "document_processing", "payload": {"filePath": "a"}}, "spec.kbId: required"),
    ],
    ids=["refused here", "refused by the API server"],
)
def test_a_bad_spec_is_refused_with_the_name_of_the_field(client: TaskClient, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskRefused, match=message):
        client.submit(spec)


def test_an_absent_task_is_not_found(client: TaskClient) -> None:
    for call in (client.get, client.cancel):
        with pytest.raises(TaskNotFound):
            call("absent")


def test_waiting_sees_each_change_and_returns_the_finished_task(
    client: TaskClient, namespace: str, kubectl: Kubectl
) -> None:
    client.submit(SPEC, name="one")
    seen: list[str] = []
    processing = threading.Event()

    def patch(status: dict[str, Any]) -> None:
        body = json.dumps({"status": status})
        kubectl.attempt("patch", "ptask", "one", "-n", namespace, "--subresource=status", "--type=merge", "-p", body)

    def finish() -> None:
        patch({"phase": "Processing", "progress": 40})
        processing.wait(20)
        patch({"phase": "Completed", "result": {"chunks": 7}})

    def note(task: ProcessingTask) -> None:
        seen.append(task.status.phase)
        if task.status.phase is Phase.PROCESSING:
            processing.set()

    worker = threading.Thread(target=finish)
    worker.start()
    task = client.wait("one", timeout=timedelta(seconds=30), on_change=note)
    worker.join()
    assert task.status.result is not None
    assert task.status.result.chunks == 7
    assert seen[-1] == "Completed"
    assert "Processing" in seen


def test_waiting_ends_with_the_timeout_and_the_task_goes_on(client: TaskClient) -> None:
    client.submit(SPEC, name="one")
    with pytest.raises(TaskTimeout, match="Queued"):
        client.wait("one", timeout=timedelta(seconds=1))
    assert client.cancel("one").spec.cancel
