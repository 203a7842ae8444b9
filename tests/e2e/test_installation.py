"""What a user does with an installation: apply, watch, cancel, delete, break, and ask."""

import asyncio
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from devstack import installation
from job_runner.index import Generation
from job_runner.settings import Settings
from job_runner.stores import opener
from task_contract.models import Phase, ProcessingTask
from tests.e2e.conftest import Installed
from tests.support.resources import TaskAbsent

pytestmark = pytest.mark.e2e

MINUTES = timedelta(minutes=3)


def unique(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex[:8]}"


def document(path: str, *, kb_id: str, **spec: Any) -> dict[str, Any]:
    return {"type": "document_processing", "kbId": kb_id, "payload": {"filePath": path}} | spec


def poll(what: str, check: Callable[[], bool], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.2)


def search(installed: Installed, *, kb_id: str, query: str) -> dict[str, dict[str, Any]]:
    """Return the best hit of each store; nothing for a knowledge base into which nothing was ever written."""
    command = [sys.executable, "-m", "job_runner", "search", "--json", "--top-k", "1", "--query", query]
    command += ["--namespace", installation.TASK_NAMESPACE, "--kb-id", kb_id]
    environment = os.environ | installed.endpoints.host_urls
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if "has no such knowledge base" in answer.stderr:
        return {}
    assert answer.returncode == 0, answer.stderr
    return {hit["store"]: hit for hit in map(json.loads, answer.stdout.splitlines())}


def long_text(installed: Installed, name: str, *, sentences: int) -> None:
    """Put a document on the volume that keeps a runner busy for a while."""
    lines = (
        f"Sentence number {number} tells how shelf {number % 97} of hall {number % 13} is filled."
        for number in range(sentences)
    )
    path = installed.documents / name
    path.write_text("\n".join(lines))
    path.chmod(0o644)


def verified(task: ProcessingTask) -> int:
    """Return the number of chunks after checking that both stores hold exactly these."""
    assert task.status.phase is Phase.COMPLETED, task.status.error
    result = task.status.result
    assert result is not None
    assert result.chunks
    assert result.chunks == result.milvus_count == result.elasticsearch_count
    return result.chunks


def test_an_english_pdf_is_found_by_its_text_with_page_and_heading(installed: Installed) -> None:
    kb_id = unique("kb")
    task = installed.client.submit(document("handbook.pdf", kb_id=kb_id, priority="high"), name=unique("handbook"))
    installed.kubectl("wait", f"ptask/{task.metadata.name}", "--for=condition=Succeeded", "--timeout=120s")
    done = installed.client.get(task.metadata.name)
    assert verified(done) > 10
    assert done.status.result is not None
    assert done.status.result.pages == 10
    for hit in search(installed, kb_id=kb_id, query="When does the nightly verification compare both stores?").values():
        assert "02:30" in hit["text"]
        assert hit["pageStart"] == 5


def test_a_chinese_markdown_file_is_found_by_its_text_with_heading(installed: Installed) -> None:
    kb_id = unique("kb")
    name = unique("guide")
    installed.client.submit(document("operations-guide.zh.md", kb_id=kb_id), name=name)
    verified(installed.client.wait(name, timeout=MINUTES))
    for hit in search(installed, kb_id=kb_id, query="柴油发电机在断电后多久启动？").values():
        assert "九十秒" in hit["text"]
        assert any("机房断电" in heading for heading in hit["headingPath"])


def test_a_broken_pdf_fails_at_once_with_the_reason(installed: Installed) -> None:
    name = unique("broken")
    installed.client.submit(document("broken.pdf", kb_id=unique("kb")), name=name)
    task = installed.client.wait(name, timeout=MINUTES)
    assert task.status.phase is Phase.FAILED
    assert task.status.error is not None
    assert task.status.error.reason == "DocumentUnreadable"
    assert task.status.attempt == 1
    deadline = time.monotonic() + 20
    while "DocumentUnreadable: cannot read" not in (shown := installed.kubectl("describe", "ptask", name)):
        assert time.monotonic() < deadline, shown
        time.sleep(0.5)
    assert "tasks.zzdsj.io/operator" in shown[shown.rindex("Events:") :]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("absent.pdf", "DocumentNotFound"),
        ("outside.pdf", "DocumentRefused"),
        ("https://kubernetes.default.svc/api", "DocumentRefused"),
        ("s3://manuals/handbook.pdf", "DocumentRefused"),
    ],
    ids=["absent", "outside the volume", "the Kubernetes API", "a bucket that is not listed"],
)
def test_a_document_that_cannot_be_had_fails_at_once(installed: Installed, path: str, reason: str) -> None:
    outside = installed.documents / "outside.pdf"
    outside.unlink(missing_ok=True)
    outside.symlink_to("/etc/passwd")
    name = unique("bad")
    installed.client.submit(document(path, kb_id=unique("kb")), name=name)
    task = installed.client.wait(name, timeout=MINUTES)
    outside.unlink()
    assert task.status.error is not None
    assert (task.status.phase, task.status.error.reason, task.status.attempt) == (Phase.FAILED, reason, 1)


def test_a_health_check_tells_the_state_of_every_component(installed: Installed) -> None:
    name = unique("health")
    installed.client.submit({"type": "health_check"}, name=name)
    task = installed.client.wait(name, timeout=MINUTES)
    assert task.status.result is not None
    assert task.status.result.components is not None
    assert {component.name for component in task.status.result.components} == {
        "postgres",
        "redis",
        "milvus",
        "elasticsearch",
        "model",
        "documents",
    }
    assert all(component.healthy for component in task.status.result.components)


def test_a_task_pod_has_no_token_and_runs_restricted(installed: Installed) -> None:
    name = unique("health")
    installed.client.submit({"type": "health_check"}, name=name)
    task = installed.client.wait(name, timeout=MINUTES)
    [pod] = installed.kubectl.get("pod", "-l", f"job-name={task.status.job}")["items"]
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert not any("projected" in volume for volume in pod["spec"]["volumes"])
    [container] = pod["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_same_bytes_are_not_processed_again_and_new_bytes_replace_the_old(installed: Installed) -> None:
    kb_id, path = unique("kb"), unique("notes") + ".md"
    target = installed.documents / path

    def process(text: str) -> ProcessingTask:
        target.write_text(text)
        target.chmod(0o644)
        name = unique("notes")
        installed.client.submit(document(path, kb_id=kb_id), name=name)
        return installed.client.wait(name, timeout=MINUTES)

    verified(process("# Locker\n\nThe locker key hangs behind the blue door."))
    again = process("# Locker\n\nThe locker key hangs behind the blue door.")
    assert again.status.phase is Phase.COMPLETED
    assert next(one.reason for one in again.status.conditions if one.type == "Ready") == "Unchanged"
    verified(process("# Locker\n\nThe locker key lies in the red drawer."))
    for hit in search(installed, kb_id=kb_id, query="Where is the locker key?").values():
        assert "red drawer" in hit["text"]


def test_a_deleted_document_is_found_no_more_and_neither_is_a_deleted_knowledge_base(installed: Installed) -> None:
    kb_id, path = unique("kb"), unique("notes") + ".md"
    target = installed.documents / path
    target.write_text("# Locker\n\nThe locker key hangs behind the blue door.")
    target.chmod(0o644)

    def run(payload: dict[str, Any], reason: str, documents: int) -> None:
        name = unique("notes")
        installed.client.submit({"type": "document_processing", "kbId": kb_id, "payload": payload}, name=name)
        task = installed.client.wait(name, timeout=MINUTES)
        assert next(one.reason for one in task.status.conditions if one.type == "Ready") == reason
        assert task.status.result is not None
        assert task.status.result.documents == documents

    upsert, question = {"filePath": path}, "Where is the locker key?"
    run(upsert, "Completed", 1)
    assert set(search(installed, kb_id=kb_id, query=question)) == {"milvus", "elasticsearch"}
    run({"action": "delete", "filePath": path}, "Deleted", 1)
    assert search(installed, kb_id=kb_id, query=question) == {}
    run({"action": "delete", "filePath": path}, "Deleted", 0)
    run(upsert, "Completed", 1)
    run({"action": "delete_knowledge_base", "confirm": kb_id}, "Deleted", 1)
    assert search(installed, kb_id=kb_id, query=question) == {}
    run(upsert, "Completed", 1)
    assert set(search(installed, kb_id=kb_id, query=question)) == {"milvus", "elasticsearch"}


def test_what_a_canceled_task_has_written_is_swept_within_a_minute(installed: Installed) -> None:
    kb_id, name, file = unique("kb"), unique("long"), unique("long") + ".txt"
    long_text(installed, file, sentences=20_000)
    installed.client.submit(document(file, kb_id=kb_id), name=name)

    def rows() -> list[int]:
        return asyncio.run(_rows(installed, kb_id))

    poll("both stores hold something", lambda: min(rows()) > 0, seconds=120)
    installed.client.cancel(name)
    canceled = time.monotonic()
    assert installed.client.wait(name, timeout=MINUTES).status.phase is Phase.CANCELED
    poll("nothing is left in the stores", lambda: max(rows()) == 0, seconds=60 - (time.monotonic() - canceled))


async def _rows(installed: Installed, kb_id: str) -> list[int]:
    """Return how many rows each store has of a knowledge base."""
    urls = installed.endpoints.host_urls
    settings = Settings.model_validate({name.removeprefix("TASKS_").lower(): value for name, value in urls.items()})
    stores = opener(settings, dimension=0)(Generation(installation.TASK_NAMESPACE, kb_id, 1))
    try:
        await stores.open_existing()
        return [sum([len(page) async for page in store.scan()]) for store in (stores.vectors, stores.texts)]
    finally:
        await stores.aclose()


def test_a_suspended_task_waits_and_runs_when_it_is_resumed(installed: Installed) -> None:
    name = unique("suspended")
    installed.client.submit({"type": "health_check", "suspend": True}, name=name)
    installed.kubectl("wait", f"ptask/{name}", "--for=jsonpath={.status.queue.reason}=Suspended", "--timeout=30s")
    assert not _children(installed, installed.client.get(name))
    installed.kubectl("patch", "ptask", name, "--type=merge", "-p", '{"spec":{"suspend":false}}')
    assert installed.client.wait(name, timeout=MINUTES).status.phase is Phase.COMPLETED


def _children(installed: Installed, task: ProcessingTask, kinds: str = "job,pod") -> list[Any]:
    found: list[Any] = installed.kubectl.get(kinds, "-l", f"tasks.zzdsj.io/task-uid={task.metadata.uid}")["items"]
    return found


def _running(installed: Installed, name: str) -> Callable[[], bool]:
    return lambda: installed.client.get(name).status.phase is Phase.PROCESSING


def test_cancel_ends_a_running_task_and_nothing_of_it_is_published(installed: Installed) -> None:
    kb_id, name = unique("kb"), unique("cancel")
    long_text(installed, f"{name}.txt", sentences=60_000)
    installed.client.submit(document(f"{name}.txt", kb_id=kb_id), name=name)
    poll("it runs", _running(installed, name))
    installed.client.cancel(name)
    task = installed.client.wait(name, timeout=timedelta(seconds=30))
    assert task.status.phase is Phase.CANCELED
    poll("its pod is gone", lambda: not _children(installed, task, "pod"))
    assert search(installed, kb_id=kb_id, query="Which shelf is filled?") == {}


def test_deleting_a_running_task_leaves_no_job_and_no_pod(installed: Installed) -> None:
    name = unique("deleted")
    long_text(installed, f"{name}.txt", sentences=60_000)
    task = installed.client.submit(document(f"{name}.txt", kb_id=unique("kb")), name=name)
    poll("it runs", _running(installed, name))
    installed.kubectl("delete", "ptask", name, "--wait")
    with pytest.raises(TaskAbsent):
        installed.client.get(name)
    poll("its Job and its pod are gone", lambda: not _children(installed, task))


def test_a_killed_pod_and_a_killed_operator_lose_nothing(installed: Installed) -> None:
    kb_id, name = unique("kb"), unique("killed")
    long_text(installed, f"{name}.txt", sentences=6_000)
    retry = {"limit": 3, "initialDelay": "1s"}
    installed.client.submit(document(f"{name}.txt", kb_id=kb_id, retry=retry), name=name)
    poll("it runs", _running(installed, name))
    for pod in _children(installed, installed.client.get(name), "pod"):
        installed.kubectl("delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force")
    system = ["-n", installation.SYSTEM_NAMESPACE]
    installed.kubectl("delete", "pod", "--all", "--grace-period=0", "--force", *system)
    verified(installed.client.wait(name, timeout=MINUTES))
    installed.kubectl("rollout", "status", f"deploy/{installation.RELEASE}-operator", "--timeout=60s", *system)


async def test_postgresql_shows_what_the_resource_says(installed: Installed) -> None:
    name = unique("health")
    installed.client.submit({"type": "health_check"}, name=name)
    task = installed.client.wait(name, timeout=MINUTES)
    connection = await asyncpg.connect(installed.endpoints.host_urls["TASKS_POSTGRES_URL"])
    try:
        deadline = time.monotonic() + 10
        while True:
            row = await connection.fetchrow("SELECT phase, attempt, name FROM tasks WHERE uid = $1", task.metadata.uid)
            if row is not None and row["phase"] == "Completed":
                break
            assert time.monotonic() < deadline, row
        assert (row["name"], row["attempt"]) == (name, task.status.attempt), task.status
    finally:
        await connection.close()
