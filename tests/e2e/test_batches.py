"""Many documents as one task on the installation: a broken one and a killed pod cost what they must, and nothing else."""

import asyncio
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from devstack.demo import DOCUMENTS
from task_contract.models import Phase, ProcessingTask
from tests.e2e.conftest import Installed
from tests.e2e.test_installation import long_text, poll, unique

pytestmark = pytest.mark.e2e

BROKEN = "007.pdf"


@pytest.fixture
def folder(installed: Installed) -> Iterator[Path]:
    """A folder of the document volume with 20 small documents, of which one is broken."""
    folder = installed.documents / unique("batch")
    folder.mkdir()
    for number in range(20):
        name = f"{number:03}.txt"
        if name != "007.txt":
            long_text(installed, f"{folder.name}/{name}", sentences=40 + number)
    shutil.copy(DOCUMENTS / "broken.pdf", folder / BROKEN)
    yield folder
    shutil.rmtree(folder)


def rows(installed: Installed, task: ProcessingTask) -> list[dict[str, Any]]:
    async def fetch() -> list[dict[str, Any]]:
        connection = await asyncpg.connect(installed.endpoints.host_urls["TASKS_POSTGRES_URL"])
        try:
            found = await connection.fetch(
                "SELECT * FROM batch_documents WHERE task_uid = $1 ORDER BY ordinal", task.metadata.uid
            )
        finally:
            await connection.close()
        return [dict(row) for row in found]

    return asyncio.run(fetch())


def _killed_one(installed: Installed, selector: str) -> bool:
    """Kill a pod that runs; return whether it had not ended by then: its shard has failed."""
    pods = installed.kubectl.get("pod", "-l", selector)["items"]
    running = [
        pod["metadata"] for pod in pods if pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
    ]
    if not running:
        return False
    victim = running[-1]  # the one that has most left to do
    installed.kubectl("delete", "pod", victim["name"], "--grace-period=0", "--force")
    index = victim["labels"]["batch.kubernetes.io/job-completion-index"]

    def ended() -> bool:
        [job] = installed.kubectl.get("job", "-l", f"{selector},tasks.zzdsj.io/attempt=1")["items"]
        ways = {way: job["status"].get(way, "") for way in ("failedIndexes", "completedIndexes")}
        found.update({way: index in _indexes(text) for way, text in ways.items()})
        return any(found.values())

    found: dict[str, bool] = {}
    poll("its shard has ended", ended, seconds=60)
    return found["failedIndexes"]


def _indexes(text: str) -> set[str]:
    """Read the indexes of a Job's status, such as "0,2-3"."""
    parts = [part.split("-") for part in text.split(",") if part]
    return {str(index) for part in parts for index in range(int(part[0]), int(part[-1]) + 1)}


def test_a_broken_document_and_a_killed_pod_cost_one_document(installed: Installed, folder: Path) -> None:
    name = unique("batch")
    spec = {
        "type": "batch_processing",
        "kbId": unique("kb"),
        "payload": {"prefix": folder.name, "glob": "*.*", "parallelism": 2, "maxFailedPercent": 5},
        "retry": {"limit": 2, "initialDelay": "1s"},
    }
    task = installed.client.submit(spec, name=name)
    poll("the first documents have ended", lambda: any(row["state"] == "done" for row in rows(installed, task)), seconds=180)
    selector = f"tasks.zzdsj.io/task-uid={task.metadata.uid}"
    [job] = installed.kubectl.get("job", "-l", selector)["items"]
    assert (job["spec"]["completionMode"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Indexed", 4, 2)
    poll("a pod of it is killed", lambda: _killed_one(installed, selector), seconds=60)

    jobs: dict[str, dict[str, Any]] = {}

    def ended() -> bool:
        jobs.update({one["metadata"]["uid"]: one for one in installed.kubectl.get("job", "-l", selector)["items"]})
        return installed.client.get(name).status.phase.finished

    poll("the batch has ended", ended, seconds=300)
    done = installed.client.get(name)
    assert done.status.phase is Phase.COMPLETED, done.status
    assert next(one.reason for one in done.status.conditions if one.type == "Succeeded") == "PartiallyFailed"
    result = done.status.result
    assert result is not None
    assert (result.documents, result.documents_failed, result.documents_total) == (19, 1, 20)
    outcomes = rows(installed, task)
    assert [(row["file_path"], row["reason"]) for row in outcomes if row["state"] != "done"] == [
        (f"{folder.name}/{BROKEN}", "DocumentUnreadable")
    ]
    assert {row["version"] for row in outcomes if row["state"] == "done"} == {1}, "a document was published twice"
    sizes = sorted(one["spec"]["completions"] for one in jobs.values())
    assert sizes[-1] == 4
    assert len(sizes) == 2
    assert sizes[0] < 4, "the next Job is for what is left"


def test_a_canceled_batch_keeps_what_it_has_published(installed: Installed, folder: Path) -> None:
    for path in folder.glob("*.txt"):
        long_text(installed, f"{folder.name}/{path.name}", sentences=800)
    name = unique("batch")
    spec = {
        "type": "batch_processing",
        "kbId": unique("kb"),
        "payload": {"prefix": folder.name, "glob": "*.txt", "parallelism": 1},
    }
    task = installed.client.submit(spec, name=name)
    poll("a document has ended", lambda: any(row["state"] == "done" for row in rows(installed, task)), seconds=180)
    installed.client.cancel(name)
    ended = installed.client.wait(name, timeout=timedelta(seconds=60))
    assert ended.status.phase is Phase.CANCELED
    assert ended.status.result is not None
    assert 0 < (ended.status.result.documents or 0) < 19
    assert ended.status.result.documents_total == 19
