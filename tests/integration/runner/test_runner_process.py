"""The runner as its pod runs it: a process, real stores, and a file. Killed, fenced, overtaken, without stores."""

import asyncio
import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from task_contract.lifecycle import ExitCode
from task_contract.messages import AttemptOutcome, Outcome

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).resolve().parents[3] / "examples/documents"
NAMESPACE = "runner-tests"


@dataclass
class Runner:
    """Runs attempts of tasks of one knowledge base."""

    environment: dict[str, str]
    documents: Path
    messages: Path
    kb_id: str = field(default_factory=lambda: f"kb-{uuid.uuid4().hex[:8]}")

    def task(self, path: str, **fields: Any) -> dict[str, Any]:
        """Return a manifest as the operator hands it to a pod."""
        metadata = {"name": "task", "namespace": NAMESPACE, "uid": str(uuid.uuid4()), "generation": 1}
        metadata["creationTimestamp"] = fields.pop("created", "2026-01-01T00:00:00Z")
        payload = {"filePath": path} | fields.pop("payload", {})
        spec = {"type": "document_processing", "kbId": self.kb_id, "payload": payload} | fields
        return {"apiVersion": "tasks.zzdsj.io/v1", "kind": "ProcessingTask", "metadata": metadata, "spec": spec}

    def start(self, task: dict[str, Any], *, attempt: int = 1, **environment: str) -> "subprocess.Popen[str]":
        folder = self.messages / uuid.uuid4().hex
        folder.mkdir()
        (folder / "task.json").write_text(json.dumps(task))
        (folder / "message").touch()
        variables = self.environment | {
            "TASKS_DOCUMENT_ROOT": str(self.documents),
            "TASKS_ATTEMPT": str(attempt),
            "TASKS_HOLDER": folder.name,
            "TASKS_TERMINATION_LOG": str(folder / "message"),
        }
        command = [sys.executable, "-m", "job_runner", "run", str(folder / "task.json")]
        process = subprocess.Popen(
            command, env=os.environ | variables | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.args = folder  # where its message is
        return process

    def run(self, task: dict[str, Any], *, attempt: int = 1, **environment: str) -> tuple[int, AttemptOutcome]:
        """Run an attempt to its end; return exit code and termination message."""
        process = self.start(task, attempt=attempt, **environment)
        _, log = process.communicate(timeout=120)
        assert isinstance(process.args, Path)
        outcome = AttemptOutcome.parse((process.args / "message").read_text())
        assert outcome is not None, log
        return process.returncode, outcome

    def run_until(self, task: dict[str, Any], stage: str) -> None:
        """Run an attempt and kill it, without a word, as soon as ``stage`` has ended."""
        process = self.start(task)
        assert process.stderr is not None
        for line in process.stderr:
            if (
                line.startswith("{")
                and (event := json.loads(line)).get("event") == "stage ended"
                and event["stage"] == stage
            ):
                break
        else:
            pytest.fail(f"stage {stage} did not end")
        process.kill()
        process.communicate(timeout=30)

    def found(self, query: str) -> dict[str, dict[str, Any]]:
        """Return the best hit of each store."""
        command = [sys.executable, "-m", "job_runner", "search", "--json", "--top-k", "1", "--query", query]
        command += ["--namespace", NAMESPACE, "--kb-id", self.kb_id]
        answer = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60, check=True
        )
        return {hit["store"]: hit for hit in map(json.loads, answer.stdout.splitlines())}


@pytest.fixture
def runner(store_urls: dict[str, str], database: str, tmp_path: Path) -> Runner:
    documents, messages = tmp_path / "documents", tmp_path / "messages"
    documents.mkdir()
    messages.mkdir()
    for example in EXAMPLES.iterdir():
        if example.is_file():
            (documents / example.name).write_bytes(example.read_bytes())
    return Runner(environment=store_urls | {"TASKS_POSTGRES_URL": database}, documents=documents, messages=messages)


def verified(code: int, outcome: AttemptOutcome) -> int:
    """Return the number of chunks after checking that both stores hold exactly these."""
    assert code == ExitCode.SUCCEEDED, outcome
    result = outcome.result
    assert result is not None
    assert result.chunks
    assert result.chunks == result.milvus_count == result.elasticsearch_count
    return result.chunks


@pytest.mark.parametrize(
    ("document", "question", "answer"),
    [
        ("handbook.pdf", "When does the nightly verification compare both stores?", "02:30"),
        ("operations-guide.zh.md", "柴油发电机在断电后多久启动？", "九十秒"),
    ],
)
def test_a_document_is_published_and_found_in_both_stores(runner: Runner, document: str, question: str, answer: str) -> None:
    verified(*runner.run(runner.task(document)))
    hits = runner.found(question)
    assert set(hits) == {"milvus", "elasticsearch"}
    assert all(answer in hit["text"] for hit in hits.values())


@pytest.mark.parametrize("stage", ["fetch", "parse", "split", "embed", "store", "verify", "publish"])
def test_a_runner_killed_after_any_stage_leaves_a_retry_that_ends_as_if_nothing_had_been(runner: Runner, stage: str) -> None:
    task = runner.task("handbook.pdf")
    runner.run_until(task, stage)
    code, outcome = runner.run(task, attempt=2)
    assert code == ExitCode.SUCCEEDED, outcome
    result = outcome.result
    assert result is not None
    assert result.version == 1
    if outcome.reason == "Completed":
        chunks = verified(code, outcome)
        assert (result.embedded or 0) + (result.reused or 0) == chunks
        if stage in {"store", "verify"}:
            assert result.embedded == 0  # what the killed attempt had stored is not computed again
    else:
        assert (outcome.reason, stage) == ("Unchanged", "publish")
    assert all(
        "02:30" in hit["text"] for hit in runner.found("When does the nightly verification compare both stores?").values()
    )


def test_new_bytes_replace_the_old_and_reuse_the_vectors_of_what_stayed(runner: Runner) -> None:
    sections = [f"# Shelf {number}\n\nShelf {number} holds box {number * 7}.\n\n" for number in range(30)]
    (runner.documents / "a.md").write_text("".join(sections))
    first = verified(*runner.run(runner.task("a.md")))
    sections[3] = "# Shelf 3\n\nShelf 3 was emptied yesterday.\n\n"
    (runner.documents / "a.md").write_text("".join(sections))
    code, outcome = runner.run(runner.task("a.md", created="2026-01-02T00:00:00Z"))
    assert verified(code, outcome) == first
    assert outcome.result is not None
    assert outcome.result.version == 2
    assert outcome.result.embedded == 1
    assert outcome.result.reused == first - 1
    assert all("emptied" in hit["text"] for hit in runner.found("Which shelf was emptied?").values())


def test_an_older_task_publishes_nothing_over_a_newer_one(runner: Runner) -> None:
    (runner.documents / "a.md").write_text("The newer text is about otters.")
    verified(*runner.run(runner.task("a.md", created="2026-01-02T00:00:00Z")))
    (runner.documents / "a.md").write_text("The older text is about badgers.")
    code, outcome = runner.run(runner.task("a.md", created="2026-01-01T00:00:00Z"))
    assert (code, outcome.reason) == (ExitCode.SUCCEEDED, "Superseded")
    assert all("otters" in hit["text"] for hit in runner.found("What is the text about?").values())


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("broken.pdf", "DocumentUnreadable"),
        ("absent.pdf", "DocumentNotFound"),
        ("/etc/passwd", "DocumentRefused"),
        ("empty.txt", "DocumentEmpty"),
    ],
)
def test_a_document_that_cannot_be_processed_is_a_permanent_error(runner: Runner, document: str, reason: str) -> None:
    (runner.documents / "empty.txt").touch()
    code, outcome = runner.run(runner.task(document))
    assert (code, outcome.outcome, outcome.reason) == (ExitCode.PERMANENT, Outcome.FAILED, reason)


@pytest.mark.parametrize("variable", ["TASKS_POSTGRES_URL", "TASKS_MILVUS_URL", "TASKS_ELASTICSEARCH_URL"])
def test_a_store_that_is_down_gives_the_attempt_back(runner: Runner, variable: str) -> None:
    scheme = "postgresql" if "POSTGRES" in variable else "http"
    runner.environment |= {variable: f"{scheme}://127.0.0.1:1/x"}
    code, outcome = runner.run(runner.task("handbook.pdf"))
    assert (code, outcome.outcome) == (ExitCode.STORE_UNAVAILABLE, Outcome.GIVEN_BACK)


def test_redis_may_be_down(runner: Runner) -> None:
    verified(*runner.run(runner.task("handbook.pdf"), TASKS_REDIS_URL="redis://127.0.0.1:1/0"))


def test_sigterm_hands_the_attempt_back(runner: Runner) -> None:
    (runner.documents / "long.txt").write_text("\n".join(f"Sentence {n} is about shelf {n % 97}." for n in range(40_000)))
    process = runner.start(runner.task("long.txt"))
    assert process.stderr is not None
    for line in process.stderr:
        if '"split"' in line:
            break
    process.terminate()
    process.communicate(timeout=10)
    assert isinstance(process.args, Path)
    outcome = AttemptOutcome.parse((process.args / "message").read_text())
    assert outcome is not None
    assert (process.returncode, outcome.reason) == (ExitCode.HANDED_BACK, "HandedBack")


def test_a_fence_that_was_raised_while_it_worked_lets_nothing_be_published(runner: Runner) -> None:
    (runner.documents / "a.txt").write_text("\n".join(f"Sentence {n} is about shelf {n % 97}." for n in range(4_000)))
    task = runner.task("a.txt")
    process = runner.start(task)
    assert process.stderr is not None
    for line in process.stderr:
        if '"split"' in line:
            break

    async def fence() -> None:
        connection = await asyncpg.connect(runner.environment["TASKS_POSTGRES_URL"])
        try:
            await connection.execute(
                "INSERT INTO task_fences (task_uid, reason) VALUES ($1, 'Canceled')", task["metadata"]["uid"]
            )
        finally:
            await connection.close()

    asyncio.run(fence())
    process.communicate(timeout=60)
    assert process.returncode == ExitCode.FENCED
    assert runner.found("shelf") == {}
