"""The last of the end-to-end tests: what a user removes is gone."""

import json

import pytest

from devstack import installation
from task_contract.names import TASK_UID_LABEL
from tests.e2e.conftest import Installed
from tests.support.devstack import Kubectl

pytestmark = pytest.mark.e2e


def test_delete_all_tasks_and_uninstall_leave_nothing_behind(installed: Installed) -> None:
    installed.kubectl("delete", "ptask", "--all", "--wait", "--timeout=60s")
    assert not installed.kubectl.get("job,pod", "--selector", TASK_UID_LABEL)["items"]  # sweeps are of no task
    installation.uninstall(installed.endpoints)
    everything = Kubectl(installed.endpoints)
    kinds = "namespace,clusterrole,clusterrolebinding,priorityclass,customresourcedefinition"
    left = [
        item["metadata"]["name"]
        for item in everything.get(kinds)["items"]
        if installation.RELEASE in json.dumps(item["metadata"]) or item["metadata"]["name"] == installation.TASK_NAMESPACE
    ]
    assert left == []
