"""Fixtures of the tests on a real API server."""

from pathlib import Path

import pytest

from devstack import Endpoints
from task_contract import names
from tests.support.devstack import Kubectl

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def kubectl(cluster: Endpoints) -> Kubectl:
    """kubectl on a cluster that has the CRD as it is generated now."""
    run = Kubectl(cluster)
    run("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds/processingtasks.yaml"))
    run("wait", "--for=condition=Established", "--timeout=30s", f"crd/{names.PLURAL}.{names.GROUP}")
    return run
