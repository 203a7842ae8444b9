"""What pods get on a real API server: a resource class, refused if it is not there, and how long they bear a lost node."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from devstack import Endpoints
from tests.support.operator_lab import OperatorProcess, Place, until

pytestmark = pytest.mark.integration

GPU = {"requests": {"cpu": "1"}, "limits": {"memory": "3Gi"}}


async def test_a_task_names_its_class_or_gets_one_by_its_document(place: Place, cluster: Endpoints, tmp_path: Path) -> None:
    operator = OperatorProcess(
        kubeconfig=cluster.kubeconfig,
        namespaces=[place.namespace],
        folder=tmp_path,
        OPERATOR_RUNNER_RESOURCE_CLASSES=orjson.dumps({"gpu": GPU}).decode(),
        OPERATOR_DOCUMENTS_CLAIM="",
    )
    async with operator.at_work():
        await place.create("small", payload={"filePath": "a.md", "fileBytes": 1000})
        await place.create("large", payload={"filePath": "a.md", "fileBytes": 2**30})
        await place.create("gpu", resourceClass="gpu")
        await place.create("huge", resourceClass="huge")
        failed = await place.wait_for("Failed", name="huge", reason="InvalidTask")

        async def made() -> dict[str, dict[str, dict[str, str]]]:
            jobs = await place.objects("jobs")
            found = {
                job["metadata"]["labels"]["tasks.zzdsj.io/resource-class"]: job["spec"]["template"]["spec"]["containers"][0]
                for job in jobs
            }
            return {name: container["resources"] for name, container in found.items()} if len(jobs) == 3 else {}

        assert await until("three Jobs are made", made) == {
            "small": {"requests": {"cpu": "125m", "memory": "256Mi"}, "limits": {"memory": "2Gi"}},
            "large": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "4Gi"}},
            "gpu": GPU,
        }

        async def pods() -> list[dict[str, Any]]:
            found = await place.objects("pods")
            return found if len(found) == 3 else []

        for pod in await until("three pods are made", pods):
            # Admission adds 300 s for what has none.
            lost = {one["key"]: one["tolerationSeconds"] for one in pod["spec"]["tolerations"] if "tolerationSeconds" in one}
            assert lost == {"node.kubernetes.io/not-ready": 30, "node.kubernetes.io/unreachable": 30}
    assert failed["attempt"] == 0
    assert "the operator's settings have gpu, large, medium, small" in failed["error"]["message"]
