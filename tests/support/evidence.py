"""What a failed test leaves to read: the tasks, the pods with their logs, the last events, and the logs of processes.

One mechanism for every test: the namespaces it worked in are looked at while its fixtures still stand, so are the logs in
its folder (of an operator or a runner that ran as a process), and what they show becomes sections of the report.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devstack import Endpoints, installation
from tests.support.devstack import Kubectl

LINES = 40
"""Last lines of each log that are shown."""
YOUNGEST = 3
"""So many tasks and pods of a namespace are shown whole: tests share the namespaces of an installation."""
LOGS = 4
"""Youngest logs of processes that are shown."""
EVENTS = 25
"""Last events of each namespace that are shown."""


def namespaces(arguments: Mapping[str, Any]) -> list[str]:
    """Return the namespaces that a test with the fixture values ARGUMENTS works in: names, and what has one."""
    named = [arguments.get("namespace"), *(getattr(value, "namespace", None) for value in arguments.values())]
    found = dict.fromkeys(name for name in named if isinstance(name, str))
    if "installed" in arguments:
        found |= dict.fromkeys([installation.TASK_NAMESPACE, installation.SYSTEM_NAMESPACE])
    return list(found)


def logs(arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (title, last lines) of the youngest logs in the folder of a test."""
    folder = arguments.get("tmp_path")
    if not isinstance(folder, Path):
        return []
    # rglob does not go into linked folders, such as those of a test that sits in what looks like a clone.
    files = [file for file in folder.rglob("*") if file.suffix in {".log", ".out"} and file.is_file()]
    return [
        (f"{file.relative_to(folder)} (last {LINES} lines)", _end(file))
        for file in sorted(files, key=lambda file: file.stat().st_mtime)[-LOGS:]
    ]


def _end(file: Path) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-LINES:])


def gather(endpoints: Endpoints, namespace: str) -> list[tuple[str, str]]:
    """Return (title, text) of what NAMESPACE shows; what cannot be had says why instead."""
    kubectl = Kubectl(endpoints, namespace)

    def show(*arguments: str) -> tuple[str, str]:
        answer = kubectl.attempt(*arguments)
        return f"kubectl -n {namespace} {' '.join(arguments)}", (answer.stdout + answer.stderr).strip()

    def youngest(kind: str) -> list[str]:
        listed = kubectl.attempt("get", kind, "--sort-by=.metadata.creationTimestamp", "--output=name")
        return listed.stdout.split()[-YOUNGEST:]

    sections = [show("get", "ptask,job,pod", "--output=wide")]
    sections += [show("get", name, "--output=yaml") for name in youngest("ptask")]
    sections += [show("logs", name, "--all-containers", "--prefix", f"--tail={LINES}") for name in youngest("pod")]
    title, events = show("get", "events", "--sort-by=.metadata.creationTimestamp")
    sections.append((f"{title} (last {EVENTS})", "\n".join(events.splitlines()[-EVENTS:])))
    return sections
