"""What a failed test leaves to read: the tasks, the pods with their logs, the operator's log and the last events.

One mechanism for every test that uses the cluster: the namespaces it worked in are looked at while its fixtures still
stand, and what they show becomes sections of the report.
"""

import json
from typing import Any

from devstack import Endpoints, installation
from tests.support.devstack import Kubectl

LINES = 40
"""Last lines of each log that are shown."""
EVENTS = 25
"""Last events of each namespace that are shown."""


def namespaces(arguments: dict[str, Any]) -> list[str]:
    """Return the namespaces that a test with the fixture values ARGUMENTS works in."""
    found = [arguments["namespace"]] if isinstance(arguments.get("namespace"), str) else []
    if "installed" in arguments:
        found += [installation.TASK_NAMESPACE, installation.SYSTEM_NAMESPACE]
    return found


def gather(endpoints: Endpoints, namespace: str) -> list[tuple[str, str]]:
    """Return (title, text) of what NAMESPACE shows; what cannot be had says why instead."""
    kubectl = Kubectl(endpoints, namespace)

    def show(*arguments: str) -> tuple[str, str]:
        answer = kubectl.attempt(*arguments)
        return f"kubectl -n {namespace} {' '.join(arguments)}", (answer.stdout + answer.stderr).strip()

    sections = [show("get", "ptask", "--output=yaml"), show("get", "job,pod", "--output=wide")]
    listed = kubectl.attempt("get", "pods", "--sort-by=.metadata.creationTimestamp", "--output=json")
    pods = json.loads(listed.stdout)["items"] if listed.returncode == 0 else []
    sections += [
        show("logs", pod["metadata"]["name"], "--all-containers", "--prefix", f"--tail={LINES}") for pod in pods[-3:]
    ]
    title, events = show("get", "events", "--sort-by=.metadata.creationTimestamp")
    sections.append((f"{title} (last {EVENTS})", "\n".join(events.splitlines()[-EVENTS:])))
    return sections
