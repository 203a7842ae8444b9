"""The operator that one writes first: kopf's handlers of changes, the generated synchronous client, kopf's defaults.

For comparison only (``python -m kopf run --standalone --namespace NAMESPACE tests/bench/baseline_operator.py``). It makes
the very Jobs that ours makes and reads the end of an attempt from the pod, as ours does, so that both ask the same work of
the API server. It has no retries, no history and no fence, and a kill between two of its writes may lose a task.
"""

import json
import os
from datetime import UTC, datetime
from typing import Any

import kopf
import kubernetes.client
import kubernetes.config

from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import ProcessingTask
from task_contract.names import ATTEMPT_LABEL, GROUP, PLURAL, TASK_NAME_ANNOTATION, TASK_UID_LABEL, VERSION
from task_operator.jobs import RunnerTemplate, build_job

TEMPLATE = RunnerTemplate(
    image="localhost/processing-tasks/runner:test",
    classes={"medium": {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}}},
    node_selector=json.loads(os.environ.get("BENCH_NODE_SELECTOR", '{"tests.tasks.zzdsj.io/node": "none"}')),
)

kubernetes.config.load_config()
jobs = kubernetes.client.BatchV1Api()
pods = kubernetes.client.CoreV1Api()
tasks = kubernetes.client.CustomObjectsApi()


@kopf.on.create(GROUP, VERSION, PLURAL)
def create(body: Any, namespace: Any, patch: Any, **_: Any) -> None:
    """Make the Job of a new task."""
    job: Any = build_job(ProcessingTask.model_validate(dict(body)), attempt=1, template=TEMPLATE)
    try:
        jobs.create_namespaced_job(namespace, job)
    except kubernetes.client.ApiException as error:
        if error.status != 409:
            raise
    patch.status["phase"] = "Queued"
    patch.status["job"] = job["metadata"]["name"]


@kopf.on.update(GROUP, VERSION, PLURAL, field="spec.cancel", new=True)
def cancel(status: Any, namespace: Any, patch: Any, **_: Any) -> None:
    """End a task that is to be canceled."""
    if status.get("job"):
        jobs.delete_namespaced_job(status["job"], namespace, propagation_policy="Background")
    patch.status["phase"] = "Canceled"


@kopf.on.event("batch", "v1", "jobs", labels={TASK_UID_LABEL: kopf.PRESENT})
def job_changed(event: Any, body: Any, namespace: Any, **_: Any) -> None:
    """Tell in the task's status what its Job does."""
    if event["type"] == "DELETED":
        return
    conditions = {one["type"] for one in body.status.get("conditions", []) if one["status"] == "True"}
    if "Complete" in conditions or "Failed" in conditions:
        _patch(body, namespace, _ended(body, namespace))
    elif body.status.get("ready"):
        _patch(body, namespace, {"phase": "Processing", "startedAt": _now(), "attempt": 1, "progress": 0})


def _ended(job: Any, namespace: str) -> dict[str, Any]:
    found: Any = pods.list_namespaced_pod(
        namespace, label_selector=f"{TASK_UID_LABEL}={job.metadata.labels[TASK_UID_LABEL]}"
    )
    ends = [
        container.state.terminated.message
        for pod in found.items
        for container in pod.status.container_statuses or []
        if pod.metadata.labels.get(ATTEMPT_LABEL) == "1" and container.state.terminated is not None
    ]
    outcome = AttemptOutcome.parse(ends[-1]) if ends else None
    status: dict[str, Any] = {"finishedAt": _now(), "phase": "Failed"}
    if outcome is not None and outcome.outcome is Outcome.SUCCEEDED:
        result = None if outcome.result is None else outcome.result.manifest()
        status |= {"phase": "Completed", "progress": 100, "result": result}
    elif not found.items and any(one["type"] == "Complete" for one in job.status.get("conditions", [])):
        status |= {"phase": "Completed", "progress": 100}  # a Job that the load ends has no pod
    return status


def _patch(job: Any, namespace: str, status: dict[str, Any]) -> None:
    name = job.metadata.annotations[TASK_NAME_ANNOTATION]
    tasks.patch_namespaced_custom_object_status(GROUP, VERSION, namespace, PLURAL, name, {"status": status})


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
