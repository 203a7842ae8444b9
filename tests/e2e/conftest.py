"""Fixtures of the end-to-end tests: the product installed with its chart, as a user installs it."""

from dataclasses import dataclass
from pathlib import Path

import kubernetes.client
import kubernetes.config
import pytest

from devstack import DevstackError, Endpoints, installation
from devstack.demo import put_documents
from service_client import TaskClient
from tests.support.devstack import Kubectl


@dataclass(frozen=True)
class Installed:
    """The installation under test."""

    endpoints: Endpoints
    kubectl: Kubectl
    """In the task namespace."""
    client: TaskClient
    documents: Path
    """The host's side of the document volume."""


@pytest.fixture(scope="session")
def installed(devstack_node: Endpoints) -> Installed:
    """The release, installed or upgraded to this tree."""
    try:
        installed = installation.install(devstack_node)
    except DevstackError as error:
        pytest.exit(f"{error}", returncode=4)
    put_documents(installed)
    assert installed.documents is not None
    api = kubernetes.config.new_client_from_config(str(devstack_node.kubeconfig))
    return Installed(
        endpoints=devstack_node,
        kubectl=Kubectl(devstack_node, installation.TASK_NAMESPACE),
        client=TaskClient(kubernetes.client.CustomObjectsApi(api), namespace=installation.TASK_NAMESPACE),
        documents=installed.documents,
    )
