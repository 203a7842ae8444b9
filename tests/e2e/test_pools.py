"""A worker pool of the chart: from no worker to some and back, with tasks that do not notice what becomes of workers."""

import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from devstack import installation
from devstack.installation import helm
from devstack.providers import Place
from task_contract.models import Executor, Phase
from tests.e2e.conftest import Installed
from tests.e2e.test_installation import unique

pytestmark = pytest.mark.e2e

ROOT: Final = Path(__file__).resolve().parents[2]
NAME: Final = "texts"
SPEC: Final = {
    "types": ["embedding_generation", "health_check"],
    "max": 2,
    "targetBacklog": 4,
    "scaleDownAfter": "2s",
    "idleTimeout": "4s",
    "lease": "10s",
    "gracePeriod": "10s",
    "resources": {"requests": {"cpu": "50m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
}
HEALTH: Final[dict[str, Any]] = {"type": "health_check", "executor": "pool", "payload": {"components": ["postgres"]}}
EMBED: Final[dict[str, Any]] = {"type": "embedding_generation", "payload": {"texts": ["The tide station."]}}


def until(what: str, look: Callable[[], bool], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.2)


class PoolUnderTest:
    """The pool, by kubectl."""

    def __init__(self, installed: Installed) -> None:
        self._installed = installed
        self._kubectl = installed.kubectl

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self._kubectl.get("wpool", NAME).get("status") or {}
        return found

    def has(self, *, seconds: float = 60, **fields: Any) -> None:
        until(f"{fields}", lambda: fields.items() <= self.status().items(), seconds=seconds)

    def objects(self, kind: str) -> list[dict[str, Any]]:
        answer = json.loads(self._kubectl("get", kind, "-l", f"tasks.zzdsj.io/pool={NAME}", "-o", "json"))
        return list(answer["items"])

    def submit(self, number: int) -> list[str]:
        names = [unique("pooled") for _ in range(number)]
        for index, name in enumerate(names):
            self._installed.client.submit(HEALTH if index % 2 else EMBED, name=name)
        return names

    def all_complete_in_the_pool(self, names: list[str]) -> None:
        for name in names:
            task = self._installed.client.wait(name, timeout=timedelta(seconds=60))
            assert task.status.phase is Phase.COMPLETED, task.status.error
            assert task.status.executor is Executor.POOL


@pytest.fixture(scope="module")
def pool(installed: Installed) -> Iterator[PoolUnderTest]:
    """The pool as the chart makes it, without a release of its own."""
    values = json.dumps([{"name": NAME, "namespace": installation.TASK_NAMESPACE, "spec": SPEC}])
    chart = str(ROOT / "helm/processing-tasks")
    given = ["--kube-version=1.34.0", "--set-json", f"workerPools={values}", "--set", "stores.postgres.url=postgresql://a"]
    shown = ["--show-only", "templates/workerpools.yaml", "--api-versions", "tasks.zzdsj.io/v1/WorkerPool"]
    manifest = helm(installed.endpoints, Place(), "template", Place().release, chart, *given, *shown)
    installed.kubectl("apply", "-f", "-", stdin=manifest)
    pool = PoolUnderTest(installed)
    yield pool
    installed.kubectl("delete", "wpool", NAME, "--wait")
    until("its Jobs are gone", lambda: not pool.objects("jobs"))


def test_tasks_start_workers_and_workers_go_when_there_is_nothing_to_do(pool: PoolUnderTest, installed: Installed) -> None:
    installed.kubectl("wait", "wpool", NAME, "--for=condition=Ready", "--timeout=30s")
    pool.has(ready=0, desired=0)
    pool.all_complete_in_the_pool(pool.submit(10))
    workers = pool.objects("jobs")
    assert 1 <= len(workers) <= 2
    pool.has(replicas=0, ready=0)
    until("their Jobs are gone", lambda: not pool.objects("jobs"))


def test_neither_a_deleted_pod_nor_another_setting_loses_a_task(pool: PoolUnderTest, installed: Installed) -> None:
    installed.kubectl("scale", "wpool", NAME, "--replicas=2")
    pool.has(ready=2)
    before = pool.status()["revision"]
    names = pool.submit(10)
    gone = pool.objects("pods")[0]["metadata"]["name"]
    installed.kubectl("delete", "pod", gone, "--wait=false")
    names += pool.submit(10)
    pool.all_complete_in_the_pool(names)
    pool.has(ready=2)
    left = [pod["metadata"] for pod in pool.objects("pods") if "deletionTimestamp" not in pod["metadata"]]
    assert gone not in {metadata["name"] for metadata in left}

    installed.kubectl("patch", "wpool", NAME, "--type=merge", "-p", json.dumps({"spec": {"batchSize": 32}}))
    names = pool.submit(6)
    until("it rolls", lambda: pool.status()["revision"] != before)
    names += pool.submit(6)
    pool.all_complete_in_the_pool(names)

    def rolled() -> bool:
        revisions = [job["metadata"]["labels"]["tasks.zzdsj.io/revision"] for job in pool.objects("jobs")]
        return len(revisions) == 2 and before not in revisions

    until("all workers are new", rolled)
    pool.has(ready=2, replicas=2)
