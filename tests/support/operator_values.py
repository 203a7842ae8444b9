"""Tasks, Jobs and pods for tests of the operator, written down as the API server hands them out."""

from datetime import UTC, datetime, timedelta
from typing import Any

from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Failure, ProcessingTask, Result
from task_contract.names import job_name
from task_operator.jobs import JobState, PodReport

UID = "0d9f8a52-1b1c-4c7e-9d53-0d5a0a4bd1a7"
T0 = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
"""When the tasks of these tests were created."""


def at(seconds: float) -> datetime:
    """Return a moment some seconds after the creation of the task."""
    return T0 + timedelta(seconds=seconds)


def stamp(seconds: float) -> str:
    """Return the same moment as a timestamp of the Kubernetes API."""
    return at(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


def name_of(attempt: int) -> str:
    """Return the name of an attempt's Job."""
    return job_name(task_name="handbook", task_uid=UID, attempt=attempt)


def condition(reason: str, *, kind: str = "Ready", status: str = "False") -> dict[str, Any]:
    return {"type": kind, "status": status, "reason": reason, "message": "", "lastTransitionTime": stamp(0)}


def manifest(*, spec: dict[str, Any] | None = None, status: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    """Return a task as a manifest: Queued as the CRD's defaults leave it, unless a status is given."""
    return {
        "apiVersion": "tasks.zzdsj.io/v1",
        "kind": "ProcessingTask",
        "metadata": {
            "name": "handbook",
            "namespace": "knowledge",
            "uid": UID,
            "generation": 1,
            "resourceVersion": "100",
            "creationTimestamp": stamp(0),
            **metadata,
        },
        "spec": {
            "type": "document_processing",
            "kbId": "kb-42",
            "payload": {"filePath": "/data/handbook.pdf"},
            "retry": {"limit": 3, "initialDelay": "10s", "factor": 2, "maxDelay": "10m", "jitter": 0},
            **(spec or {}),
        },
        "status": status or {"phase": "Queued", "attempt": 0, "conditions": [condition("Queued")]},
    }


def task(**parts: Any) -> ProcessingTask:
    """Return a parsed task; arguments as for :func:`manifest`."""
    return ProcessingTask.model_validate(manifest(**parts))


def processing(attempt: int = 1, **more: Any) -> dict[str, Any]:
    """Return the status of a task whose attempt runs."""
    earlier = [ended_attempt(number) for number in range(1, attempt)]
    running = {"number": attempt, "job": name_of(attempt), "startedAt": stamp(5)}
    return {
        "phase": "Processing",
        "attempt": attempt,
        "job": name_of(attempt),
        "queuedAt": stamp(0),
        "startedAt": stamp(5),
        "progress": 0,
        "observedGeneration": 1,
        "attempts": [*earlier, running],
        "conditions": [condition("Processing")],
        **more,
    }


def ended_attempt(number: int, reason: str = "StoresDisagree") -> dict[str, Any]:
    return {"number": number, "job": name_of(number), "startedAt": stamp(5), "finishedAt": stamp(20), "reason": reason}


def retrying(attempt: int = 1, *, retry_at: float = 30, **more: Any) -> dict[str, Any]:
    """Return the status of a task whose attempt has failed and is counted."""
    return {
        "phase": "Retrying",
        "attempt": attempt,
        "job": name_of(attempt),
        "queuedAt": stamp(0),
        "startedAt": stamp(5),
        "retryAt": stamp(retry_at),
        "attempts": [ended_attempt(number) for number in range(1, attempt + 1)],
        "error": {"reason": "StoresDisagree", "message": "cannot verify", "retryable": True},
        "conditions": [condition("StoresDisagree")],
        **more,
    }


def given_back(attempt: int = 1, *, queued_at: float = 20, retry_at: float = 25, reason: str = "Evicted") -> dict[str, Any]:
    """Return the status of a task whose attempt was given back."""
    return {
        "phase": "Queued",
        "attempt": attempt,
        "job": name_of(attempt),
        "queuedAt": stamp(queued_at),
        "startedAt": stamp(5),
        "retryAt": stamp(retry_at),
        "queue": {"reason": reason, "since": stamp(queued_at)},
        "conditions": [condition(reason)],
    }


def finished(phase: str = "Completed", *, ended: float = 60, **more: Any) -> dict[str, Any]:
    """Return the status of a task that has ended."""
    return {
        "phase": phase,
        "attempt": 1,
        "job": name_of(1),
        "queuedAt": stamp(0),
        "startedAt": stamp(5),
        "finishedAt": stamp(ended),
        "observedGeneration": 1,
        "attempts": [ended_attempt(1, "Succeeded" if phase == "Completed" else "DocumentNotFound")],
        "conditions": [condition("Completed", status="True" if phase == "Completed" else "False")],
        **more,
    }


def job(attempt: int = 1, *, queued_at: float = 0, **fields: Any) -> JobState:
    """Return a Job of the task, made under the given stay in the queue; active without a ready pod unless told otherwise."""
    known: dict[str, Any] = {
        "name": name_of(attempt),
        "namespace": "knowledge",
        "uid": f"job-{attempt}-{queued_at}",
        "resource_version": 200,
        "owner_uid": UID,
        "owner_name": "handbook",
        "attempt": attempt,
        "queue_stamp": stamp(queued_at),
        "created_at": at(1),
        "started_at": at(1),
    }
    return JobState(**(known | fields))


def complete(attempt: int = 1, **fields: Any) -> JobState:
    known: dict[str, Any] = {"complete": True, "finished_at": at(30)}
    return job(attempt, **(known | fields))


def failed(attempt: int = 1, *, reason: str = "BackoffLimitExceeded", **fields: Any) -> JobState:
    known: dict[str, Any] = {"failed": True, "failure_reason": reason, "finished_at": at(30)}
    return job(attempt, **(known | fields))


def pod(attempt: int = 1, *, queued_at: float = 0, **fields: Any) -> PodReport:
    """Return a pod of the Job of the same arguments."""
    known: dict[str, Any] = {"name": f"pod-{attempt}", "uid": f"pod-{attempt}", "job_uid": f"job-{attempt}-{queued_at}"}
    return PodReport(**(known | fields))


def ended_pod(attempt: int = 1, **fields: Any) -> PodReport:
    """Return a pod that has ended."""
    known: dict[str, Any] = {"alive": False, "started_at": at(5), "finished_at": at(29), "exit_code": 1}
    return pod(attempt, **(known | fields))


def success(attempt: int = 1, reason: str = "Completed") -> AttemptOutcome:
    counted = {} if reason == "Superseded" else {"chunks": 87, "milvus_count": 87, "elasticsearch_count": 87, "version": 1}
    result = Result.model_validate({"documents": len(counted) and 1} | counted)
    return AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=attempt, reason=reason, result=result)


def failure(reason: str = "StoresDisagree", *, retryable: bool = True, attempt: int = 1) -> AttemptOutcome:
    error = Failure(reason=reason, message=f"cannot go on: {reason}", retryable=retryable, stage="verify")
    return AttemptOutcome(outcome=Outcome.FAILED, attempt=attempt, reason=reason, error=error)


def handed_back(reason: str = "StoreUnavailable", *, attempt: int = 1) -> AttemptOutcome:
    error = Failure(reason=reason, message="cannot reach Milvus", retryable=True)
    return AttemptOutcome(outcome=Outcome.GIVEN_BACK, attempt=attempt, reason=reason, error=error)


def fenced(attempt: int = 1) -> AttemptOutcome:
    error = Failure(reason="Fenced", message="cannot commit: another pod holds the attempt", retryable=False)
    return AttemptOutcome(outcome=Outcome.FENCED, attempt=attempt, reason="Fenced", error=error)
