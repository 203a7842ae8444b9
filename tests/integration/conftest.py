"""Fixtures of the tests on a real API server."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from devstack import Endpoints
from task_contract import names
from task_operator.cluster import Access
from tests.support.devstack import Kubectl
from tests.support.operator_lab import Kube, Place

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def kubectl(cluster: Endpoints) -> Kubectl:
    """kubectl on a cluster that has the CRD as it is generated now."""
    run = Kubectl(cluster)
    run("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds/processingtasks.yaml"))
    run("wait", "--for=condition=Established", "--timeout=30s", f"crd/{names.PLURAL}.{names.GROUP}")
    return run


@pytest.fixture
async def kube(kubectl: Kubectl, cluster: Endpoints) -> AsyncIterator[Kube]:
    """Requests to the API server that has the CRD."""
    kube = Kube(Access.from_kubeconfig(cluster.kubeconfig))
    yield kube
    await kube.aclose()


@pytest.fixture
async def place(kube: Kube) -> AsyncIterator[Place]:
    """A namespace of the test's own for tasks, Jobs and pods."""
    async with Place.fresh(kube) as place:
        yield place
