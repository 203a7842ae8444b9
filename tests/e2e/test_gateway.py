"""The gateway of an installation: a service with a token sends a task, follows it and reads its log."""

import json
import time
from typing import Any

import pytest

from devstack.providers import Place
from tests.e2e.conftest import Installed
from tests.support.devstack import Kubectl

pytestmark = pytest.mark.e2e

PLACE = Place()
# Run in the pod of the gateway, since this machine may have no way to the Service; it goes through the Service all the same.
CALL = """
import json, sys, urllib.error, urllib.request
method, path, token, body = sys.argv[1:]
headers = {"Content-Type": "application/json"} | ({"Authorization": "Bearer " + token} if token else {})
request = urllib.request.Request(path, method=method, headers=headers, data=body.encode() or None)
try:
    answer = urllib.request.urlopen(request, timeout=30)
except urllib.error.HTTPError as error:
    answer = error
print(json.dumps([answer.status, answer.read().decode()]))
"""


def call(
    installed: Installed, method: str, path: str, *, token: str = "", body: Any = None, port: int = 8084
) -> tuple[int, str]:
    url = f"http://{PLACE.release}-gateway.{PLACE.namespace}:{port}{path}"
    where = ["exec", f"deployment/{PLACE.release}-gateway", "--", "python", "-c", CALL]
    sent = "" if body is None else json.dumps(body)
    status, text = json.loads(Kubectl(installed.endpoints, PLACE.namespace)(*where, method, url, token, sent))
    return status, text


def test_a_service_sends_a_task_and_follows_it_to_its_end(installed: Installed, service: str) -> None:
    for port in (8084, 8080):
        status, text = call(installed, "GET", "/health", port=port)
        assert (status, json.loads(text)["status"]) == (200, "ok"), text
    assert call(installed, "GET", "/api/v1/tasks")[0] == 401

    status, text = call(installed, "POST", "/api/v1/tasks", token=service, body={"task_type": "health_check"})
    assert status == 202, text
    links = json.loads(text)["links"]
    deadline = time.monotonic() + 180
    while True:
        status, text = call(installed, "GET", links["self"], token=service)
        assert status == 200, text
        view = json.loads(text)
        if view["status"] in {"completed", "failed"}:
            break
        assert time.monotonic() < deadline, view
    assert view["status"] == "completed", view
    assert {one["name"] for one in view["result"]["components"]} >= {"postgres", "milvus", "elasticsearch"}
    status, text = call(installed, "GET", links["logs"], token=service)
    assert status == 200
    assert "health" in text or "check" in text, text
    status, text = call(installed, "GET", links["events"], token=service)
    assert status == 200
    assert json.loads(text)["items"][0]["status"] == "queued"


def test_a_log_is_followed_to_the_end_of_its_attempt(installed: Installed, service: str) -> None:
    status, text = call(installed, "POST", "/api/v1/tasks", token=service, body={"task_type": "health_check"})
    assert status == 202, text
    links = json.loads(text)["links"]
    deadline = time.monotonic() + 120
    # Until there is a pod that writes, there is no log; then the answer ends with the attempt.
    while (found := call(installed, "GET", links["logs"] + "&follow=true", token=service))[0] != 200:
        assert (found[0], time.monotonic() < deadline) == (404, True), found
    followed = found[1].splitlines()
    status, text = call(installed, "GET", links["logs"] + "&tail=2", token=service)
    assert status == 200
    assert text.splitlines() == followed[-2:]
    status, text = call(installed, "GET", links["logs"], token=service)
    assert text.splitlines() == followed
