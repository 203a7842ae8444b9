"""The devstack as tests see it: brought up once a session and left running, and namespaces that come and go."""

import contextlib
import json
import subprocess
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import devstack
from devstack import DevstackError, Endpoints
from devstack.process import running

RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


started_here: list[str] = []
"""Parts that this session started; they are left running, and the summary says so."""


_up: set[str] = set()
"""Parts that this session has seen up: tests share them and leave them running."""


def bring_up(parts: Collection[str]) -> Endpoints:
    """Bring up PARTS; what cannot be brought up fails the test with the one sentence that names the remedy."""
    if _up.issuperset(parts):
        return devstack.endpoints()
    mark = {"cluster": "apiserver", "node": "kubelet", "stores": "postgres"}
    fresh = [part for part in parts if not running(mark[part])]
    try:
        endpoints = devstack.up(parts)
    except DevstackError as error:
        pytest.fail(str(error), pytrace=False)
    started_here.extend(fresh)
    _up.update(parts)
    return endpoints


class Kubectl:
    """kubectl as the administrator."""

    def __init__(self, endpoints: Endpoints, namespace: str | None = None) -> None:
        self._command = [str(endpoints.kubectl), f"--kubeconfig={endpoints.kubeconfig}"]
        if namespace is not None:
            self._command.append(f"--namespace={namespace}")

    def attempt(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run it and return how it ended."""
        return subprocess.run(
            [*self._command, *arguments], input=stdin, capture_output=True, text=True, timeout=120, check=False
        )

    def __call__(self, *arguments: str, stdin: str | None = None) -> str:
        """Run it and return its output; AssertionError with its error output when it fails."""
        done = self.attempt(*arguments, stdin=stdin)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def get(self, *arguments: str) -> Any:
        """Return the object or list that `kubectl get ARGUMENTS` finds."""
        return json.loads(self("get", *arguments, "--output=json"))

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Apply OBJECTS."""
        self("apply", "--filename=-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))


@contextlib.contextmanager
def fresh_namespace(endpoints: Endpoints, labels: Mapping[str, str] = RESTRICTED) -> Iterator[str]:
    """Make a namespace with LABELS, by default under Pod Security `restricted`; it goes away in the background after."""
    name = f"test-{uuid.uuid4().hex[:10]}"
    kubectl = Kubectl(endpoints)
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": dict(labels)}})
    try:
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


def in_private_machine(
    script: str, *, state: Path, mounts: Sequence[str] = (), seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run the shell SCRIPT as if on a machine of its own: own network, processes, mounts and state folder.

    A devstack that runs on this machine is out of reach; whatever SCRIPT leaves running ends with it.
    """
    prepare = ["set -eu", "ip link set lo up", *mounts, f"export DEVSTACK_STATE={state}"]
    # The shell is process 1 there, and reaps what is left to it while it waits.
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    return subprocess.run(
        [*command, "bash", "-c", "\n".join([*prepare, script])],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
