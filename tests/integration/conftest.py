"""Fixtures of the tests on a real API server."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from devstack import Endpoints
from task_contract import names
from task_operator.metrics import Metrics
from task_operator.projection import Database
from task_platform.kubernetes import Access
from tests.support.databases import fresh_database
from tests.support.devstack import Kubectl
from tests.support.operator_lab import Kube, OperatorProcess, Place

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def kubectl(cluster: Endpoints) -> Kubectl:
    """kubectl on a cluster that has the CRDs as they are generated now."""
    run = Kubectl(cluster)
    run("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    crds = [f"crd/{plural}.{names.GROUP}" for plural in (names.PLURAL, names.POOL_PLURAL, names.SCHEDULE_PLURAL)]
    run("wait", "--for=condition=Established", "--timeout=30s", *crds)
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


@pytest.fixture
def process(place: Place, cluster: Endpoints, tmp_path: Path) -> Callable[..., OperatorProcess]:
    """Make an operator for the namespace; variables of its environment may be given."""

    def start(**environment: str) -> OperatorProcess:
        given = {"kubeconfig": cluster.kubeconfig, "namespaces": [place.namespace], "folder": tmp_path}
        return OperatorProcess(**(given | environment))  # type: ignore[arg-type]  # a test may replace any of them

    return start


@pytest.fixture
def url(stores: Endpoints) -> Iterator[str]:
    """URL of a database of the test's own, with the tables in it."""
    with fresh_database(stores.host_urls["TASKS_POSTGRES_URL"], prefix="operator") as url:
        yield url


@pytest.fixture
async def sql(url: str) -> "AsyncIterator[asyncpg.Connection[Any]]":
    """A connection to that database, beside the operator's."""
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    """The operator's side of that database, at work."""
    database = Database(url, metrics=Metrics())
    await database.warm_up()
    work = asyncio.create_task(database.run())
    yield database
    work.cancel()
    await asyncio.wait([work])
    await database.aclose()
