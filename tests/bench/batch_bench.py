"""A batch of small documents in one Indexed Job on the whole installation, against the work that is in them."""

import os
import statistics
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import devstack
from devstack import installation
from task_contract.models import Phase, ProcessingTask
from tests.bench.corpus import english
from tests.bench.measurement import Measurement
from tests.support.devstack import Kubectl
from tests.support.resources import TaskResources

DOCUMENTS = int(os.environ.get("BATCH_DOCUMENTS", "200"))
PARALLELISM = 2
"""As many as the machine has CPUs: more pods would share them, and the sum of the work would hold their waiting."""


def run() -> list[Measurement]:
    """Process DOCUMENTS small documents as one batch in a knowledge base that is there."""
    endpoints = devstack.up()
    installed = installation.install(endpoints)
    assert installed.documents is not None
    client = TaskResources(endpoints, installation.TASK_NAMESPACE)
    key = uuid.uuid4().hex[:8]
    with _folder(installed.documents, key) as folder:
        # Its collection takes Milvus seconds, once.
        first = {"type": "document_processing", "kbId": f"bench-{key}", "payload": {"filePath": f"{folder}/0000.txt"}}
        client.submit(first, name=f"bench-first-{key}")
        client.wait(f"bench-first-{key}", timeout=timedelta(minutes=5))
        files = [f"{folder}/{number:04}.txt" for number in range(1, DOCUMENTS + 1)]
        payload = {"filePaths": files, "parallelism": PARALLELISM}
        client.submit({"type": "batch_processing", "kbId": f"bench-{key}", "payload": payload}, name=f"bench-{key}")
        task = client.wait(f"bench-{key}", timeout=timedelta(hours=1))
    assert task.status.phase is Phase.COMPLETED, task.status
    kubectl = Kubectl(endpoints, installation.TASK_NAMESPACE)
    pods = kubectl.get("pod", "-l", f"tasks.zzdsj.io/task-uid={task.metadata.uid}")["items"]
    return _measured(task, pods)


@contextmanager
def _folder(documents: Path, key: str) -> Iterator[str]:
    """Write documents of some two chunks each below the document volume; they go at the end."""
    folder = documents / f"bench-{key}"
    folder.mkdir()
    for number in range(DOCUMENTS + 1):
        path = folder / f"{number:04}.txt"
        path.write_text("\n\n".join(english(1_500, seed=number)))
        path.chmod(0o644)
    try:
        yield folder.name
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _measured(task: ProcessingTask, pods: list[dict[str, Any]]) -> list[Measurement]:
    assert task.metadata.creation_timestamp is not None
    assert task.status.finished_at is not None
    wall = (task.status.finished_at - task.metadata.creation_timestamp).total_seconds()
    work, starts = [], []
    for pod in pods:
        ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
        began, end = (datetime.fromisoformat(ended[side]) for side in ("startedAt", "finishedAt"))
        work.append((end - began).total_seconds())
        starts.append((began - datetime.fromisoformat(pod["metadata"]["creationTimestamp"])).total_seconds())
    waves = -(-len(pods) // PARALLELISM)
    start = statistics.mean(starts)
    ideal = sum(work) / PARALLELISM + waves * start
    how = (
        f"{DOCUMENTS} documents of some 1.5 kB, one Indexed Job, {len(pods)} pods, {PARALLELISM} at once; wall from "
        f"creation to the status Completed; work: the containers' times; pod starts: {waves} of {start:.1f} s"
    )
    return [
        Measurement(metric="wall / (work / parallelism + pod starts)", value=wall / ideal, unit="", target=1.15, how=how),
        Measurement(metric="wall", value=wall, unit="s", baseline=ideal, how=how),
        Measurement(metric="documents a second", value=DOCUMENTS / wall, unit="1/s", better="higher", how=how),
    ]
