"""kubectl on one cluster, named by a kubeconfig file of ours: never the one that the user's shell points at."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from devstack import tools
from devstack.process import run
from devstack.progress import DevstackError

MINIMUM = (1, 31)
"""The oldest kubectl, as the oldest Kubernetes, that the product is for."""


class Kubectl:
    """Calls of PROGRAM with KUBECONFIG; each raises DevstackError ("cannot DOING: ...") with what kubectl said."""

    def __init__(self, program: Path, kubeconfig: Path) -> None:
        self.command = [str(program), f"--kubeconfig={kubeconfig}"]

    def __call__(self, *arguments: str, doing: str, stdin: str | None = None) -> str:
        """Run it and return its standard output."""
        return run([*self.command, *arguments], doing=doing, stdin=stdin)

    def find(self, *what: str) -> dict[str, Any] | None:
        """Return the object that `kubectl get WHAT` names, or None when it is not there."""
        printed = self("get", *what, "--ignore-not-found", "--output=json", doing=f"look at {' '.join(what)}")
        found: dict[str, Any] | None = json.loads(printed) if printed.strip() else None
        return found

    def apply(self, objects: Sequence[dict[str, Any]]) -> None:
        """Make OBJECTS (manifests) so in the cluster by server-side apply."""
        manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        options = ["apply", "--server-side", "--force-conflicts", "--field-manager=devstack", "--filename=-"]
        self(*options, doing="apply the devstack's objects to the cluster", stdin=manifest)

    def differs(self, manifest: str, *, field_manager: str) -> bool | None:
        """Whether applying MANIFEST would change anything in the cluster; None when that cannot be told."""
        options = ["diff", "--server-side", "--force-conflicts", f"--field-manager={field_manager}", "--filename=-"]
        done = subprocess.run(
            [*self.command, *options], input=manifest, capture_output=True, text=True, timeout=60, check=False
        )
        return {0: False, 1: True}.get(done.returncode)


def program() -> Path:
    """Return a kubectl for a cluster that is not ours: the one on PATH when it is new enough, else the one we build."""
    if found := shutil.which("kubectl"):
        told = subprocess.run([found, "version", "--client", "--output=json"], capture_output=True, text=True, check=False)
        if (version := client_version(told.stdout)) is not None and version >= MINIMUM:
            return Path(found)
    return tools.kubectl()


def client_version(text: str) -> tuple[int, int] | None:
    """Read the release out of what `kubectl version --client --output=json` prints; None when it holds none."""
    try:
        version = json.loads(text)["clientVersion"]["gitVersion"]
    except (ValueError, KeyError, TypeError):
        return None
    found = re.match(r"v(\d+)\.(\d+)", str(version))
    return (int(found[1]), int(found[2])) if found else None


def require_version(kubectl: Kubectl) -> None:
    """Raise DevstackError unless the server is at least of MINIMUM."""
    told = json.loads(kubectl("version", "--output=json", doing="reach the cluster"))["serverVersion"]["gitVersion"]
    found = re.match(r"v(\d+)\.(\d+)", told)
    if found is None or (int(found[1]), int(found[2])) < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        raise DevstackError(f"cannot install on Kubernetes {told}: use a cluster of version {wanted} or newer")
