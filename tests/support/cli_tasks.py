"""Tasks and pods as the API server hands them out, for tests of the command line."""

from datetime import UTC, datetime, timedelta
from typing import Any

NOW = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)


def ago(**span: float) -> str:
    return (NOW - timedelta(**span)).strftime("%Y-%m-%dT%H:%M:%SZ")


def task(
    name: str = "handbook",
    phase: str | None = "Queued",
    *,
    spec: dict[str, Any] | None = None,
    namespace: str = "knowledge",
    created: str | None = None,
    **status: Any,
) -> dict[str, Any]:
    """Return a task; ``phase`` None: nobody has looked at it. ``reason`` and ``message`` are of its condition Ready."""
    made: dict[str, Any] = {
        "apiVersion": "tasks.zzdsj.io/v1",
        "kind": "ProcessingTask",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"uid-{name}",
            "creationTimestamp": created or ago(minutes=5),
        },
        "spec": {
            "type": "document_processing",
            "kbId": "kb-42",
            "priority": "normal",
            "payload": {"filePath": f"/data/{name}.pdf"},
            **(spec or {}),
        },
        "status": {"phase": "Queued"},
    }
    if phase is not None:
        reason = status.pop("reason", phase)
        ready = {"type": "Ready", "status": "True" if phase == "Completed" else "False", "reason": reason}
        if "message" in status:
            ready["message"] = status.pop("message")
        base = {"phase": phase, "observedGeneration": 1, "queuedAt": ago(minutes=5), "conditions": [ready]}
        made["status"] = base | status
    return made


def pod(name: str = "handbook-1", **status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "knowledge", "uid": f"uid-{name}", "labels": {}},
        "spec": {"nodeName": "node-a"},
        "status": {"phase": "Pending", **status},
    }


def waiting(reason: str, message: str = "", image: str = "registry/runner:1") -> dict[str, Any]:
    """Return the status of a pod whose container waits."""
    state = {"waiting": {"reason": reason, "message": message}}
    return {"containerStatuses": [{"name": "runner", "image": image, "state": state}]}


def event(reason: str, message: str, *, kind: str = "Warning", minutes: float = 1) -> dict[str, Any]:
    return {"metadata": {}, "type": kind, "reason": reason, "message": message, "lastTimestamp": ago(minutes=minutes)}
