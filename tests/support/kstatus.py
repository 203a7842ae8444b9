"""What tools that know nothing of us say of objects: the Go program in tests/kstatus, built as helm is."""

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from devstack import tools

SOURCE = Path(__file__).resolve().parents[1] / "kstatus"


HEALTH = Path(__file__).resolve().parents[2] / "manifests/argocd/tasks.zzdsj.io/ProcessingTask"
"""The health script for Argo CD, with fixtures in the form of Argo CD's own."""


def kstatus(*objects: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (status, message) of each object, as stored by an API server: InProgress, Current, Failed, Terminating."""
    return _judged(objects)


def argo(*objects: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (status, message) of each object as Argo CD shows it: Progressing, Healthy, Degraded, Suspended."""
    kinds = {one["kind"] for one in objects}
    assert len(kinds) == 1, "objects of one kind have one script"
    return _judged(objects, str(HEALTH.parent / kinds.pop() / "health.lua"))


def _judged(objects: Iterable[Mapping[str, Any]], *arguments: str) -> list[tuple[str, str]]:
    lines = "".join(json.dumps(one) + "\n" for one in objects)
    command = [str(tools.program(SOURCE)), *arguments]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [(answer["status"], answer["message"]) for answer in map(json.loads, done.stdout.splitlines())]
