"""Fixtures of the tests of the gateway."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from devstack import Endpoints
from tests.support.gateway_lab import GatewayProcess
from tests.support.operator_lab import Place


@pytest.fixture
def gateway(place: Place, cluster: Endpoints, url: str, tmp_path: Path) -> Callable[..., GatewayProcess]:
    """Make a gateway for the namespace, with a database of its own; arguments of GatewayProcess may be given."""

    def make(**given: object) -> GatewayProcess:
        arguments = {
            "kubeconfig": cluster.kubeconfig,
            "postgres": url,
            "folder": tmp_path,
            "namespaces": [place.namespace],
            **given,
        }
        return GatewayProcess(**arguments)  # type: ignore[arg-type]  # a test may replace any of them

    return make


@pytest.fixture
async def trusting(gateway: Callable[..., GatewayProcess]) -> AsyncIterator[GatewayProcess]:
    """A gateway at work that trusts the network."""
    async with gateway(trusting=True).at_work() as process:
        yield process
