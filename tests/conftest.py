"""Session fixtures: the devstack, in the parts that a test needs."""

from collections.abc import Iterator

import pytest

from devstack import Endpoints
from tests.support.devstack import bring_up, fresh_namespace, started_here


@pytest.fixture(scope="session")
def cluster() -> Endpoints:
    """A real API server with its controllers, without a node: pods are made and never run."""
    return bring_up(["cluster"])


@pytest.fixture(scope="session")
def stores() -> Endpoints:
    """Real PostgreSQL, Redis, Milvus and Elasticsearch, at `host_urls`."""
    return bring_up(["stores"])


@pytest.fixture(scope="session")
def devstack_node() -> Endpoints:
    """The whole devstack: control plane, a node where pods run, and the stores."""
    return bring_up(["cluster", "node", "stores"])


@pytest.fixture
def namespace(cluster: Endpoints) -> Iterator[str]:
    """A fresh namespace under Pod Security `restricted`; deleted after the test."""
    with fresh_namespace(cluster) as name:
        yield name


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say that the devstack goes on running when this session started it."""
    if started_here:
        terminalreporter.write_line("The devstack that this session started goes on running; `make down` ends it.")
