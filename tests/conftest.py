"""Session fixtures: the devstack, in the parts that a test needs.

It is brought up once the tests are collected and before any runs: what that shows is seen, and a first build of many
minutes is not under the time limit of a test.
"""

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from devstack import PARTS, DevstackError, Endpoints, images
from devstack import endpoints as where
from tests.support import evidence
from tests.support.devstack import bring_up, fresh_namespace, started_here

# No test is a timed one: beside others on a busy machine an example takes any time.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

HERE = Path(__file__).parent
ALONE = ("docs", "e2e")
"""Folders of tests that take the cluster, the stores or the machine for themselves."""
FIXTURES = {"cluster": ["cluster"], "node": ["cluster", "node"], "stores": ["stores"], "devstack_node": list(PARTS)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of those folders, and all that need the node; of others the marker stands where they do.

    The installation is removed by the last test that uses it, whatever the files are called.
    """
    installed = [place for place, item in enumerate(items) if item.path.is_relative_to(HERE / "e2e")]
    if installed:
        part = slice(installed[0], installed[-1] + 1)
        items[part] = sorted(items[part], key=lambda item: item.path.name == "test_uninstall.py")
    for item in items:
        if item.path.relative_to(HERE).parts[0] in ALONE or item.get_closest_marker("e2e"):
            item.add_marker("alone")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Bring up all that the collected tests need, and build the images; if that fails, the fixtures fail with the reason."""
    if session.config.option.collectonly:
        return
    used = {name for item in session.items if isinstance(item, pytest.Function) for name in item.fixturenames}
    if parts := {part for name in used & FIXTURES.keys() for part in FIXTURES[name]}:
        with contextlib.suppress(pytest.fail.Exception):
            bring_up([part for part in PARTS if part in parts])
    if "installed" in used:
        with contextlib.suppress(DevstackError):
            images.build()


@pytest.fixture(scope="session")
def cluster() -> Endpoints:
    """A real API server with its controllers: pods are made, and run only if something else brought up the node."""
    return bring_up(FIXTURES["cluster"])


@pytest.fixture(scope="session")
def node() -> Endpoints:
    """A real API server and a node where pods run."""
    return bring_up(FIXTURES["node"])


@pytest.fixture(scope="session")
def stores() -> Endpoints:
    """Real PostgreSQL, Redis, Milvus and Elasticsearch, at `host_urls`."""
    return bring_up(FIXTURES["stores"])


@pytest.fixture(scope="session")
def devstack_node() -> Endpoints:
    """The whole devstack: control plane, a node where pods run, and the stores."""
    return bring_up(FIXTURES["devstack_node"])


@pytest.fixture
def namespace(cluster: Endpoints) -> Iterator[str]:
    """A fresh namespace under Pod Security `restricted`; deleted after the test."""
    with fresh_namespace(cluster) as name:
        yield name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a failed test what its namespaces in the cluster and its processes show."""
    report = yield
    if report.failed and isinstance(item, pytest.Function) and call.when in {"setup", "call"}:
        report.sections += evidence.logs(item.funcargs)
        for namespace in evidence.namespaces(item.funcargs):
            report.sections += evidence.gather(where(), namespace)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say that the devstack goes on running when this session started it."""
    if started_here:
        parts = ", ".join(dict.fromkeys(started_here))
        terminalreporter.write_line(
            f"What this session started of the devstack ({parts}) goes on running; `make down` ends it."
        )
