"""Tasks over REST, on a real API server and PostgreSQL."""

import pytest

from tests.support.gateway_lab import GatewayProcess, document
from tests.support.operator_lab import Place

pytestmark = pytest.mark.integration


async def test_a_task_is_accepted_once_the_cluster_has_it_and_read_at_once(trusting: GatewayProcess, place: Place) -> None:
    status, headers, _ = await trusting.send("POST", "/api/v1/tasks", document(), headers={"X-Request-Id": "one-1"})
    assert (status, headers["X-Request-Id"]) == (202, "one-1")
    accepted = await trusting.do("POST", "/api/v1/tasks", document(labels={"team": "manuals"}))
    assert accepted["id"] == accepted["task_id"]
    assert (accepted["status"], accepted["namespace"]) == ("queued", place.namespace)

    stored = await place.task(accepted["id"])
    assert stored is not None
    assert (stored["metadata"]["uid"], stored["metadata"]["labels"]) == (accepted["uid"], {"team": "manuals"})
    assert stored["spec"]["payload"] == {"filePath": "/data/handbook.pdf"}

    view = await trusting.do("GET", accepted["links"]["self"])
    assert (view["uid"], view["status"], view["progress"], view["kb_id"]) == (accepted["uid"], "queued", 0, "kb-42")
    assert view["payload"] == {"file_path": "/data/handbook.pdf"}
