"""Servers of the crash matrix, how much of it is run, and what it says at the end."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from devstack import Endpoints
from tests.crash.life import World
from tests.crash.matrix import Outcome
from tests.support.devstack import Kubectl
from tests.support.operator_lab import ROOT

OUTCOMES = pytest.StashKey[list[Outcome]]()
REPORT = ROOT / "build/crash.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-points", action="store_true", help="kill at every point, not at an even choice of them")


@pytest.fixture
def everything(request: pytest.FixtureRequest) -> bool:
    """Whether every point is tried."""
    return bool(request.config.getoption("--all-points", default=False))


@pytest.fixture
def outcomes(request: pytest.FixtureRequest) -> list[Outcome]:
    """Where each life that was led is noted, for the table at the end."""
    return request.config.stash.setdefault(OUTCOMES, [])


@pytest.fixture
async def world(cluster: Endpoints, stores: Endpoints, tmp_path: Path) -> AsyncIterator[World]:
    """All servers, with the CRDs as they are now and a fresh database."""
    kubectl = Kubectl(cluster)
    kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    # Progress is what may be lost, and would make the number of writes a matter of speed.
    urls = {key: value for key, value in stores.host_urls.items() if key != "TASKS_REDIS_URL"}
    async with World.fresh(cluster.kubeconfig, urls, folder=tmp_path) as world:
        yield world


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table of points and how their lives ended; keep it as JSON."""
    outcomes = config.stash.get(OUTCOMES, [])
    if not outcomes:
        return
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps([outcome.as_json() for outcome in outcomes], indent=1) + "\n")
    terminalreporter.section("crash matrix")
    for outcome in outcomes:
        if config.getoption("--all-points", default=False) or not outcome.good:
            terminalreporter.write_line(outcome.as_line())
    bad = sum(not outcome.good for outcome in outcomes)
    terminalreporter.write_line(f"{len(outcomes)} lives, {bad} that ended otherwise than one without faults: {REPORT}")
