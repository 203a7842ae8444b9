"""One document on the whole installation: from `kubectl apply` to Completed, and where the time goes."""

import statistics
import uuid
from datetime import timedelta

import devstack
from devstack import installation
from devstack.demo import put_documents
from task_contract.models import ProcessingTask
from tests.bench.measurement import Measurement
from tests.support.resources import TaskResources

RUNS = 5


def run() -> list[Measurement]:
    """Process the ten-page handbook RUNS times, each in a new knowledge base."""
    endpoints = devstack.up()
    put_documents(installation.install(endpoints))
    client = TaskResources(endpoints, installation.TASK_NAMESPACE)
    tasks = [_process(client) for _ in range(RUNS)]
    whole = [_seconds(task) for task in tasks]
    how = (
        f"median of {RUNS} runs of examples/documents/handbook.pdf, one at a time; times of the status, of a second's grain"
    )
    stages = sorted({stage for task in tasks for stage in (task.status.result.seconds or {} if task.status.result else {})})
    return [
        Measurement(metric="apply to Completed", value=statistics.median(whole), unit="s", target=15, how=how),
        *(
            Measurement(
                metric=f"stage {stage}", value=statistics.median(_stage(task, stage) for task in tasks), unit="s", how=how
            )
            for stage in stages
        ),
    ]


def _process(client: TaskResources) -> ProcessingTask:
    key = uuid.uuid4().hex[:8]
    spec = {"type": "document_processing", "kbId": f"bench-{key}", "payload": {"filePath": "handbook.pdf"}}
    client.submit(spec, name=f"bench-{key}")
    return client.wait(f"bench-{key}", timeout=timedelta(minutes=2))


def _seconds(task: ProcessingTask) -> float:
    assert task.status.finished_at is not None
    assert task.metadata.creation_timestamp is not None
    return (task.status.finished_at - task.metadata.creation_timestamp).total_seconds()


def _stage(task: ProcessingTask, stage: str) -> float:
    assert task.status.result is not None
    return (task.status.result.seconds or {}).get(stage, 0.0)
