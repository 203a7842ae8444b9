"""Jobs of workers against whole expected objects, and what is read from them and their pods."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from task_operator.jobs import RunnerTemplate
from task_operator.pool_jobs import build_worker_job, pool_of, revision_of, said_of, worker_job
from task_operator.pools import NewWorker
from tests.support.operator_values import at, stamp
from tests.support.pool_values import POOL_UID, pool
from tests.unit.test_operator_jobs import DATA, FULL

PLAIN = RunnerTemplate(image="runner:1", documents_claim=None, classes={"medium": {"requests": {"memory": "512Mi"}}})
WHOLE: dict[str, Any] = {
    "concurrency": 8,
    "batchSize": 128,
    "lease": "1m30s",
    "gracePeriod": "2m",
    "resources": {"requests": {"cpu": "1"}, "limits": {"memory": "3Gi"}},
    "nodeSelector": {"disk": "fast"},
    "priorityClassName": "workers",
}


@pytest.mark.parametrize(
    ("golden", "spec", "template", "new"),
    [
        ("worker-full.yaml", WHOLE, FULL, NewWorker(3, 2)),
        ("worker-plain.yaml", {"types": ["health_check"]}, PLAIN, NewWorker(0, 1)),
    ],
)
def test_the_job_of_a_worker_is_exactly_this(
    golden: str, spec: dict[str, Any], template: RunnerTemplate, new: NewWorker
) -> None:
    expected = yaml.safe_load((DATA / golden).read_text())
    assert build_worker_job(pool(spec=spec), new, revision="5f", template=template) == expected


@pytest.mark.parametrize(
    ("change", "another"),
    [
        ({}, False),
        ({"min": 2, "max": 9, "replicas": 3, "targetBacklog": 5, "idleTimeout": "1m", "scaleDownAfter": "2m"}, False),
        ({"types": ["health_check", "embedding_generation"]}, False),
        ({"types": ["health_check"]}, True),  # they may not write outputs any more
        *(({name: value}, True) for name, value in WHOLE.items()),
    ],
)
def test_workers_are_replaced_for_what_they_are_told_and_for_nothing_else(change: dict[str, Any], another: bool) -> None:
    assert (revision_of(pool(spec=change), FULL) != revision_of(pool(), FULL)) is another


@pytest.mark.parametrize("change", [{"image": "runner:2"}, {"stores_secret": "others"}, {"version": "9"}])
def test_workers_are_replaced_for_another_image_and_other_settings(change: dict[str, Any]) -> None:
    assert revision_of(pool(), replace(FULL, **change)) != revision_of(pool(), FULL)


def as_stored(slot: int = 0, number: int = 1, **status: Any) -> dict[str, Any]:
    job = build_worker_job(pool(), NewWorker(slot, number), revision="5f", template=FULL)
    job["metadata"] |= {"uid": "job-uid", "resourceVersion": "7", "creationTimestamp": stamp(1)}
    return job | {"status": status}


def test_what_was_built_is_read_back() -> None:
    failed = {"type": "Failed", "status": "True", "lastTransitionTime": stamp(9), "reason": "BackoffLimitExceeded"}
    manifest = as_stored(3, 2, startTime=stamp(2), ready=0, conditions=[failed])
    job = worker_job(manifest)
    assert pool_of(manifest) == ("knowledge", "texts")
    assert job is not None
    assert (job.slot, job.number, job.revision, job.pool_uid) == (3, 2, "5f", POOL_UID)
    assert (job.created_at, job.started_at, job.finished_at) == (at(1), at(2), at(9))
    assert (job.failed, job.complete, job.finished) == (True, False, True)


@pytest.mark.parametrize("cut", ["ownerReferences", "labels", "creationTimestamp"])
def test_a_job_that_lacks_what_makes_it_ours_is_none(cut: str) -> None:
    manifest = as_stored()
    del manifest["metadata"][cut]
    assert worker_job(manifest) is None


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "texts-pod", "uid": "1"}, "status": status}


def ended(**terminated: Any) -> dict[str, Any]:
    return pod(phase="Failed", containerStatuses=[{"name": "runner", "state": {"terminated": terminated}}])


@pytest.mark.parametrize(
    ("pods", "said"),
    [
        ([], ""),
        ([ended(exitCode=1, message="no model")], "ended with exit code 1: no model"),
        ([ended(exitCode=137, reason="OOMKilled")], "ran out of memory (OOMKilled); give spec.resources more"),
        (
            [
                pod(
                    phase="Pending",
                    containerStatuses=[
                        {"name": "runner", "state": {"waiting": {"reason": "ErrImagePull", "message": "no such tag"}}}
                    ],
                )
            ],
            "does not run: ImagePullBackOff: no such tag",
        ),
        (
            [
                pod(
                    phase="Pending",
                    conditions=[
                        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
                    ],
                )
            ],
            "does not run: Unschedulable: 0/3 nodes",
        ),
    ],
)
def test_what_a_pod_says_is_a_sentence(pods: list[dict[str, Any]], said: str) -> None:
    assert said_of(pods).startswith(said)
    assert bool(said_of(pods)) is bool(said)


def test_golden_files_are_read_by_somebody() -> None:
    here = Path(__file__).read_text() + (Path(__file__).parent / "test_operator_jobs.py").read_text()
    here += (Path(__file__).parent / "test_operator_sweeper.py").read_text()
    assert [path.name for path in DATA.glob("*.yaml") if path.name not in here] == []
