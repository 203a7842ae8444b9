"""Fixtures of the end-to-end tests: the product installed with its chart, as a user installs it."""

import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

from devstack import DevstackError, Endpoints, installation
from devstack.demo import put_documents
from tests.support.devstack import Kubectl
from tests.support.resources import TaskResources


@dataclass(frozen=True)
class Installed:
    """The installation under test."""

    endpoints: Endpoints
    kubectl: Kubectl
    """In the task namespace."""
    client: TaskResources
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
    return Installed(
        endpoints=devstack_node,
        kubectl=Kubectl(devstack_node, installation.TASK_NAMESPACE),
        client=TaskResources(devstack_node, installation.TASK_NAMESPACE),
        documents=installed.documents,
    )


@pytest.fixture
def service(installed: Installed) -> str:
    """Token of an account that may edit in the task namespace."""
    name, kubectl = f"service-{uuid.uuid4().hex[:8]}", installed.kubectl
    kubectl("create", "serviceaccount", name)
    account = f"--serviceaccount={installation.TASK_NAMESPACE}:{name}"
    kubectl("create", "rolebinding", name, "--clusterrole=edit", account)
    return kubectl("create", "token", name).strip()
