"""`helm test` on the installation."""

import pytest

from devstack import installation
from devstack.providers import Place
from tests.e2e.conftest import Installed

pytestmark = pytest.mark.e2e


def test_helm_test_succeeds_and_leaves_nothing(installed: Installed) -> None:
    said = installation.helm(installed.endpoints, Place(), "test", installation.RELEASE, "--timeout=150s")
    assert "Succeeded" in said
    kinds = "pods,serviceaccounts,roles,rolebindings"
    installed.kubectl("wait", kinds, "--selector=app.kubernetes.io/component=test", "--for=delete", "--timeout=60s")
    tasks = [task["metadata"]["name"] for task in installed.kubectl.get("ptask")["items"]]
    assert [name for name in tasks if name.startswith(f"{installation.RELEASE}-test-")] == []
