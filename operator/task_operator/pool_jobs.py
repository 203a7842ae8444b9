"""The Job of a worker as a value: built for a slot of a pool, and read back. Pure functions.

It is made of the same parts as the Job of a task (:mod:`task_operator.jobs`), so the same restrictions hold.
"""

import json
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Final

from task_contract.models import Priority, TaskType
from task_contract.names import (
    API_VERSION,
    POOL_KIND,
    POOL_LABEL,
    REVISION_LABEL,
    SLOT_LABEL,
    digest,
    worker_job_name,
)
from task_operator.jobs import (
    JOB_NAME_LABEL,
    JOB_TTL,
    JobState,
    PodReport,
    RunnerTemplate,
    common_labels,
    document_volume,
    parse_time,
    pod_metadata,
    pod_report,
    runner_pod,
)
from task_operator.pools import NewWorker, Pool, WorkerJob, worker_resources

GRACE_MARGIN: Final = timedelta(seconds=10)
"""Between the end of the pool's grace period, when a worker gives back what it has not finished, and SIGKILL."""
_WRITES: Final = frozenset({TaskType.EMBEDDING_GENERATION})
"""Types whose tasks may have an ``outputPath``."""
_REVISION: Final = 6  # hex digits: part of a name of 63 characters, and one of few that a pool has had


def revision_of(pool: Pool, template: RunnerTemplate) -> str:
    """Return what workers are made of, in short: image, settings, and those parts of the pool that a worker is told.

    Workers of another revision are replaced. What only the operator reads (bounds, times of scaling) is no part of it.
    """
    return digest(json.dumps(_spec(pool, template, labels=_labels(pool, template)), sort_keys=True), length=_REVISION)


def build_worker_job(pool: Pool, new: NewWorker, *, revision: str, template: RunnerTemplate) -> dict[str, Any]:
    """Return the Job of a worker, under the restrictions of Pod Security ``restricted``.

    It has one pod that is never restarted in place, since the operator decides whether there is another one; ``Ignore`` for
    disruptions has the Job controller replace one that was evicted, preempted or lost with its node. It has no deadline: a
    worker ends when it is told to. Whoever deletes the pool deletes it.
    """
    name = worker_job_name(pool_name=pool.name, pool_uid=pool.uid, slot=new.slot, revision=revision, number=new.number)
    labels = _labels(pool, template)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": pool.namespace,
            "labels": labels | {SLOT_LABEL: str(new.slot), REVISION_LABEL: revision},
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": POOL_KIND,
                    "name": pool.name,
                    "uid": pool.uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": _spec(pool, template, labels=labels | {REVISION_LABEL: revision}),
    }


def _labels(pool: Pool, template: RunnerTemplate) -> dict[str, str]:
    return common_labels(template, name="processing-task-worker", component="worker") | {POOL_LABEL: pool.name}


def _spec(pool: Pool, template: RunnerTemplate, *, labels: Mapping[str, str]) -> dict[str, Any]:
    spec = pool.spec
    documents = document_volume(template, pool.namespace, writes=not _WRITES.isdisjoint(spec.types))
    revision = labels.get(REVISION_LABEL, "")
    return {
        "backoffLimit": 0,
        "completions": 1,
        "parallelism": 1,
        "ttlSecondsAfterFinished": int(JOB_TTL.total_seconds()),
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
        },
        "template": {
            "metadata": pod_metadata(template, labels),
            "spec": runner_pod(
                ["python", "-m", "job_runner", "work"],
                priority_class=spec.priority_class_name or template.priority_classes.get(Priority.NORMAL),
                template=template,
                resources=worker_resources(spec, template.classes),
                env=[
                    *({"name": name, "value": value} for name, value in _environment(pool, revision).items()),
                    _from_field("TASKS_WORKER", "metadata.name"),
                    _from_field("TASKS_WORKER_JOB", f"metadata.labels['{JOB_NAME_LABEL}']"),
                    _from_field("TASKS_HOLDER", "metadata.uid"),
                ],
                volumes=documents.volumes,
                mounts=documents.mounts,
                node_selector=spec.node_selector,
                grace=spec.grace_period + GRACE_MARGIN,
            ),
        },
    }


def _environment(pool: Pool, revision: str) -> dict[str, str]:
    spec = pool.spec
    return {
        "TASKS_POOL": pool.name,
        "TASKS_POOL_NAMESPACE": pool.namespace,
        "TASKS_POOL_REVISION": revision,
        "TASKS_POOL_CONCURRENCY": str(spec.concurrency),
        "TASKS_POOL_BATCH_SIZE": str(spec.batch_size),
        "TASKS_POOL_LEASE_SECONDS": f"{spec.lease.total_seconds():g}",
        "TASKS_POOL_GRACE_SECONDS": f"{spec.grace_period.total_seconds():g}",
    }


def _from_field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


# ------------------------------------------------------------------------------------------------------- Job → state


def pool_of(manifest: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return namespace and name of the pool whose worker a Job is; None for a Job that is no worker's."""
    metadata = manifest["metadata"]
    labels: Mapping[str, str] = metadata.get("labels") or {}
    return None if POOL_LABEL not in labels else (metadata["namespace"], labels[POOL_LABEL])


def worker_job(manifest: Mapping[str, Any]) -> WorkerJob | None:
    """Read the Job of a worker as the API server hands it out; None for one that is none, or has lost its labels."""
    metadata: Mapping[str, Any] = manifest["metadata"]
    labels: Mapping[str, str] = metadata.get("labels") or {}
    owner = next(
        (one["uid"] for one in metadata.get("ownerReferences") or () if one.get("controller") and one["kind"] == POOL_KIND),
        None,
    )
    slot, (_, _, number) = labels.get(SLOT_LABEL, ""), metadata["name"].rpartition("-")
    created = parse_time(metadata.get("creationTimestamp"))
    if owner is None or created is None or not slot.isdecimal() or not number.isdecimal():
        return None
    state = JobState.from_manifest(manifest)
    return WorkerJob(
        name=state.name,
        namespace=state.namespace,
        uid=state.uid,
        pool_uid=owner,
        slot=int(slot),
        revision=labels.get(REVISION_LABEL, ""),
        number=max(1, int(number)),
        created_at=created,
        started_at=state.started_at,
        ready=state.ready,
        deleting=state.deleting,
        complete=state.complete,
        failed=state.failed,
        finished_at=state.finished_at,
    )


def said_of(manifests: Iterable[Mapping[str, Any]]) -> str:
    """Return what the pods of a worker's Job say: why the last one failed, or what it waits for; nothing if it runs."""
    latest = max((pod_report(pod) for pod in manifests), key=_when, default=None)
    if latest is None:
        return ""
    if latest.waiting is not None:
        return f"does not run: {latest.waiting.reason}" + (f": {latest.waiting.message}" if latest.waiting.message else "")
    if latest.alive:
        return "runs, and is not ready" if latest.running else ""
    if latest.oom_killed:
        return "ran out of memory (OOMKilled); give spec.resources more, or spec.concurrency less"
    if latest.disrupted is not None:
        return f"was stopped ({latest.disrupted}): {latest.message}"
    error = None if latest.outcome is None else latest.outcome.error
    said = latest.log or latest.message if error is None else error.message
    code = "" if latest.exit_code is None else f"with exit code {latest.exit_code}"
    return f"ended {code}" + (f": {said}" if said else "")


def _when(pod: PodReport) -> tuple[bool, str]:
    return pod.alive, "" if pod.started_at is None else pod.started_at.isoformat()
