"""A callback of an installation: signed with a Secret of the task's namespace, sent to a Service of it by its name."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from devstack import installation
from devstack.providers import Place
from task_contract.webhooks import parse_secrets, verify
from tests.e2e.conftest import Installed
from tests.support.devstack import Kubectl

pytestmark = pytest.mark.e2e

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
SECRET_NAME = "processing-task-callbacks"  # the one that the operator may read by default
# Writes each request as a line; the first one it answers with 503, as a service does that starts.
RECEIVER = """
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    seen = 0
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        print(json.dumps([self.path, dict(self.headers), body]), flush=True)
        self.send_response(204 if Handler.seen else 503)
        Handler.seen += 1
        self.end_headers()
    def log_message(self, *_):
        pass
HTTPServer(("", 8000), Handler).serve_forever()
"""


@pytest.fixture
def receiver(installed: Installed) -> Iterator[str]:
    """Name of a Service in the task namespace, and of the pod behind it."""
    name, kubectl = f"receiver-{uuid.uuid4().hex[:8]}", installed.kubectl
    place = Place()
    operator = Kubectl(installed.endpoints, place.namespace).get(f"deployment/{place.release}-operator")
    [container] = operator["spec"]["template"]["spec"]["containers"]
    [image] = [one["value"] for one in container["env"] if one["name"] == "OPERATOR_RUNNER_IMAGE"]
    restricted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "receiver",
                    "image": image,
                    "imagePullPolicy": "Never",
                    "command": ["python", "-c", RECEIVER],
                    "securityContext": restricted,
                    "readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1},
                }
            ],
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8000}]},
    }
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET_NAME}, "stringData": {"secret": SECRET}}
    for manifest in (pod, service, secret):
        kubectl.apply(manifest)
    kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=60s")
    yield name
    kubectl("delete", f"pod/{name}", f"service/{name}", f"secret/{SECRET_NAME}", "--wait=false")


def _ended(installed: Installed, name: str) -> dict[str, Any]:
    """Return the status of a task once its callback is out."""
    deadline = time.monotonic() + 120
    while True:
        status: dict[str, Any] = installed.kubectl.get(f"ptask/{name}")["status"]
        if (status.get("callback") or {}).get("state") in {"Delivered", "Dead"}:
            return status
        assert time.monotonic() < deadline, status
        time.sleep(0.5)


def test_a_signed_callback_reaches_a_service_of_the_namespace_by_its_name(installed: Installed, receiver: str) -> None:
    name = f"calls-{uuid.uuid4().hex[:8]}"
    callback = {
        "url": f"http://{receiver}/api/v1/tasks/{{task_id}}/callback",
        "secretRef": {"name": SECRET_NAME, "key": "secret"},
    }
    spec = {"type": "health_check", "callback": callback}
    meta = {"apiVersion": "tasks.zzdsj.io/v1", "kind": "ProcessingTask", "metadata": {"name": name}}
    installed.kubectl.apply(meta | {"spec": spec})
    status = _ended(installed, name)
    assert status["callback"]["state"] == "Delivered", status
    assert status["callback"]["attempts"] == 2  # the first one found the service starting

    sent = [json.loads(line) for line in installed.kubectl("logs", receiver).splitlines()]
    assert {path for path, _, _ in sent} == {f"/api/v1/tasks/{name}/callback"}
    ids = {verify(body.encode(), headers, parse_secrets(SECRET)) for _, headers, body in sent}
    assert len(ids) == 1, "every delivery has the same id"
    body = json.loads(sent[-1][2])
    assert (body["task_id"], body["status"], body["namespace"]) == (name, "completed", installation.TASK_NAMESPACE)
    told = installed.kubectl("describe", "ptask", name)
    assert "Delivered" in told
