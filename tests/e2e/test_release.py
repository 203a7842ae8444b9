"""An upgrade of the release, and a rollback, among 200 tasks that have their Jobs."""

import json
import shutil
from pathlib import Path
from typing import Any, Final

import pytest

from devstack import installation
from devstack.installation import RELEASE, SYSTEM_NAMESPACE
from devstack.providers.embedded import Embedded
from task_contract.names import TASK_UID_LABEL
from tests.e2e.conftest import Installed
from tests.e2e.test_installation import poll
from tests.support.devstack import Kubectl
from tests.support.operator_lab import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.long]

CHART: Final = ROOT / "helm/processing-tasks"
TASKS: Final = 200
NOWHERE: Final = "runner.nodeSelector.tests\\.tasks\\.zzdsj\\.io/node=none"
"""Pods of tasks stay pending: a node of this machine has no room for 200 that run, and what counts is the Jobs."""


def test_an_upgrade_and_a_rollback_restart_no_job_and_lose_no_task(installed: Installed, tmp_path: Path) -> None:
    system, kubectl = Kubectl(installed.endpoints, SYSTEM_NAMESPACE), installed.kubectl

    def release(*arguments: str) -> None:
        installation.helm(installed.endpoints, Embedded().place, *arguments)
        for part in ("operator", "gateway"):
            system("rollout", "status", f"deployment/{RELEASE}-{part}", "--timeout=120s")

    def jobs(prefix: str = "upgraded-") -> dict[str, str]:
        found = kubectl.get("jobs", "--selector", TASK_UID_LABEL)["items"]
        mine = [job["metadata"] for job in found if job["metadata"]["ownerReferences"][0]["name"].startswith(prefix)]
        return {job["name"]: job["uid"] for job in mine}

    def tasks() -> dict[str, str]:
        found = kubectl.get("ptask", "--selector", "upgrade=200")["items"]
        return {task["metadata"]["name"]: task["metadata"]["uid"] for task in found}

    def acts(name: str) -> None:
        """Have the operator that there is now look at a task."""
        kubectl("create", "--filename=-", stdin=json.dumps(_task(name)))
        poll(f"{name} has its Job", lambda: len(jobs(name)) == 1, seconds=60)

    before = shutil.copytree(CHART, tmp_path / "before")
    described = before / "Chart.yaml"
    described.write_text(described.read_text().replace("version: 0.1.0", "version: 0.0.9"))
    release("upgrade", RELEASE, str(before), "--reuse-values", "--set", NOWHERE)
    try:
        made = {"apiVersion": "v1", "kind": "List", "items": [_task(f"upgraded-{number}") for number in range(TASKS)]}
        kubectl("create", "--filename=-", stdin=json.dumps(made))
        poll("all tasks have Jobs", lambda: len(jobs()) == TASKS, seconds=120)
        running, there = jobs(), tasks()

        release("upgrade", RELEASE, str(CHART), "--reuse-values", "--set", "operator.logLevel=DEBUG")
        acts("after-the-upgrade")
        assert jobs().items() >= running.items()
        release("rollback", RELEASE)
        operator = system.get("deployment", f"{RELEASE}-operator")
        assert operator["metadata"]["labels"]["helm.sh/chart"].endswith("-0.0.9")
        acts("after-the-rollback")
        assert jobs().items() >= running.items()
        assert tasks().items() >= there.items()
        statuses = [task["status"] for task in kubectl.get("ptask", "--selector", "upgrade=200")["items"]]
        assert {(status["phase"], status["attempt"]) for status in statuses} == {("Queued", 0)}
    finally:
        kubectl("delete", "ptask", "--selector", "upgrade=200", "--wait=false")
        installation.install(installed.endpoints)
        poll("their Jobs are gone", lambda: not jobs(), seconds=120)


def _task(name: str) -> dict[str, Any]:
    spec = {"type": "health_check", "executor": "job"}
    metadata = {"name": name, "labels": {"upgrade": "200"}}
    return {"apiVersion": "tasks.zzdsj.io/v1", "kind": "ProcessingTask", "metadata": metadata, "spec": spec}
