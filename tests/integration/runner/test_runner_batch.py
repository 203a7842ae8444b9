"""Batches on real stores: what is listed, which documents an attempt takes, and what becomes of each."""

import asyncio
import json
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from job_runner.attempt import identity
from job_runner.batch import Batch, list_documents
from job_runner.ledger import Ledger
from job_runner.work import Work
from task_contract.batches import MOST_DOCUMENTS
from task_contract.errors import DocumentNotFound, DocumentRefused, InvalidTask, TaskError
from task_contract.lifecycle import ExitCode
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Payload, ProcessingTask, Stage
from tests.support.runner_lab import HashEmbedder, Lab

pytestmark = pytest.mark.asyncio


def batch(lab: Lab, *, uid: uuid.UUID | None = None, **payload: object) -> ProcessingTask:
    spec: dict[str, object] = {
        "type": "batch_processing",
        "kbId": lab.kb_id,
        "payload": {"chunkSize": 100, "chunkOverlap": 0, **payload},
    }
    return lab._of(spec, uid=uid, at=0)


def write(lab: Lab, *names: str) -> list[str]:
    """Write documents of one chunk each into a folder of this test; return their paths."""
    (lab.documents / lab._key).mkdir(exist_ok=True)
    paths = [lab.document_id(name) for name in names]
    for path in paths:
        lab.write([f"The text of {path}"], file=path)
    return paths


async def rows(lab: Lab, task: ProcessingTask) -> list[dict[str, Any]]:
    connection = await asyncpg.connect(lab.environment["TASKS_POSTGRES_URL"])
    try:
        found = await connection.fetch(
            "SELECT * FROM batch_documents WHERE task_uid = $1 ORDER BY ordinal", task.metadata.uid
        )
        return [dict(row) for row in found]
    finally:
        await connection.close()


async def states(lab: Lab, task: ProcessingTask) -> list[tuple[str, str | None]]:
    return [(row["state"], row["reason"]) for row in await rows(lab, task)]


async def test_publishes_every_document_once_and_records_each(lab: Lab) -> None:
    paths = write(lab, "a.txt", "b.txt", "c.txt")
    task = batch(lab, filePaths=paths, metadata={"team": "a"})

    outcome, code = await lab.run(task)

    assert (outcome.outcome, code) == (Outcome.SUCCEEDED, ExitCode.SUCCEEDED)
    assert outcome.result is not None
    assert (outcome.result.documents, outcome.result.documents_total, outcome.result.documents_failed) == (3, 3, 0)
    assert await states(lab, task) == [("done", "Completed")] * 3
    assert [await lab.published(name) for name in ("a.txt", "b.txt", "c.txt")] == [1, 1, 1]
    assert lab.embedded == 3
    stored = (await lab.contents("a.txt"))[1]
    assert [row["metadata"] for row in stored] == [{"team": "a"}]

    again, _ = await lab.run(task)
    assert again.outcome is Outcome.SUCCEEDED
    assert lab.embedded == 3
    assert await lab.fetch("SELECT max(begun) FROM batch_documents WHERE task_uid = $1", uuid.UUID(task.metadata.uid)) == 1


async def test_a_broken_document_is_recorded_and_the_next_goes_on(lab: Lab) -> None:
    paths = write(lab, "a.txt", "c.txt")
    (lab.documents / lab._key / "b.pdf").write_bytes(b"%PDF-1.4 broken")
    paths.insert(1, lab.document_id("b.pdf"))
    task = batch(lab, filePaths=[*paths, lab.document_id("none.txt"), "../secret"])

    outcome, code = await lab.run(task)

    assert (outcome.outcome, code) == (Outcome.SUCCEEDED, ExitCode.SUCCEEDED)  # the operator judges the counts
    assert outcome.result is not None
    assert (outcome.result.documents, outcome.result.documents_failed) == (2, 3)
    found = await rows(lab, task)
    assert [row["reason"] for row in found] == [
        *("Completed", "DocumentUnreadable", "Completed", "DocumentNotFound", "DocumentRefused"),
    ]
    assert "cannot find" in found[3]["message"]


async def test_each_shard_does_its_documents_and_no_others(lab: Lab) -> None:
    paths = write(lab, "a.txt", "b.txt", "c.txt", "d.txt")
    task = batch(lab, filePaths=paths, parallelism=2)

    await lab.run(task, shards="1", shard_index=0)
    assert [state for state, _ in await states(lab, task)] == ["pending", "done", "pending", "done"]
    await lab.run(task, shards="0-1", shard_index=0)
    assert [state for state, _ in await states(lab, task)] == ["done"] * 4


async def test_pods_that_come_at_once_list_once(lab: Lab) -> None:
    paths = write(lab, *(f"{number}.txt" for number in range(8)))
    task = batch(lab, prefix=lab._key, parallelism=4)

    ended = await asyncio.gather(*(lab.run(task, shards="0-7", shard_index=index) for index in range(8)))

    assert {outcome.outcome for outcome, _ in ended} == {Outcome.SUCCEEDED}
    found = await rows(lab, task)
    assert [row["file_path"] for row in found] == paths
    assert {row["state"] for row in found} == {"done"}
    assert {row["begun"] for row in found} == {1}


async def test_the_set_of_documents_is_that_of_the_first_listing(lab: Lab) -> None:
    write(lab, "a.txt")
    task = batch(lab, prefix=lab._key)
    await lab.run(task)
    write(lab, "b.txt")

    await lab.run(task, attempt=2)

    assert len(await rows(lab, task)) == 1


class FailsOnce(HashEmbedder):
    """A model that fails with a text until it is told not to."""

    def __init__(self, text: str, error: Exception) -> None:
        super().__init__()
        self.text, self.error = text, error
        self.healed = False

    def embed(self, texts: Sequence[str]) -> Any:
        if not self.healed and any(self.text in text for text in texts):
            raise self.error
        return super().embed(texts)


async def test_what_may_be_tried_again_is_left_to_the_next_attempt(lab: Lab) -> None:
    paths = write(lab, "a.txt", "b.txt", "c.txt")
    task = batch(lab, filePaths=paths, parallelism=1)
    model = FailsOnce("b.txt", RuntimeError("a bug"))

    outcome, code = await lab.run(task, embedder=model, shards="0")

    assert (outcome.outcome, code) == (Outcome.FAILED, ExitCode.RETRYABLE)
    assert outcome.error is not None
    assert "b.txt" in outcome.error.message
    assert "a bug" in outcome.error.message
    assert [state for state, _ in await states(lab, task)] == ["done", "pending", "done"]
    # The outcome of one shard says nothing of the whole attempt.
    assert await lab.fetch("SELECT count(*) FROM task_results WHERE task_uid = $1", uuid.UUID(task.metadata.uid)) == 0

    model.healed = True
    outcome, code = await lab.run(task, embedder=model, shards="0", attempt=2)
    assert code == ExitCode.SUCCEEDED
    assert await states(lab, task) == [("done", "Completed")] * 3


class Killed(BaseException):
    """The pod dies here: nothing that follows in it happens."""


async def test_a_document_that_kills_its_pod_comes_last_in_the_next_attempt(lab: Lab) -> None:
    paths = write(lab, "a.txt", "b.txt", "c.txt")
    task = batch(lab, filePaths=paths, parallelism=1)
    lab.embedder = FailsOnce("b.txt", Killed())  # type: ignore[arg-type]

    for attempt in (1, 2):
        with pytest.raises(Killed):
            await lab.run(task, shards="0", attempt=attempt)

    assert [(row["state"], row["begun"]) for row in await rows(lab, task)] == [("done", 1), ("pending", 2), ("done", 1)]


async def test_a_store_that_is_down_ends_the_pod_and_records_nothing(lab: Lab) -> None:
    paths = write(lab, "a.txt", "b.txt")
    task = batch(lab, filePaths=paths)

    outcome, code = await lab.run(task, milvus_url="http://127.0.0.1:1")

    assert (outcome.outcome, code) == (Outcome.GIVEN_BACK, ExitCode.STORE_UNAVAILABLE)
    assert [state for state, _ in await states(lab, task)] == ["pending", "pending"]
    assert sum(row["begun"] for row in await rows(lab, task)) == 1


async def test_a_server_that_is_down_holds_up_its_documents_alone(lab: Lab) -> None:
    paths = write(lab, "b.txt")
    task = batch(lab, filePaths=["s3://manuals/a.txt", *paths])

    outcome, code = await lab.run(task, s3_buckets="manuals", s3_endpoint="http://127.0.0.1:1", s3_anonymous=True)

    assert (outcome.outcome, outcome.reason, code) == (
        *(Outcome.GIVEN_BACK, "SourceUnavailable", ExitCode.STORE_UNAVAILABLE),
    )
    assert await states(lab, task) == [("pending", "SourceUnavailable"), ("done", "Completed")]


async def test_a_canceled_batch_stops_at_the_fence(lab: Lab) -> None:
    paths = write(lab, "a.txt")
    task = batch(lab, filePaths=paths)
    await lab.fetch("INSERT INTO task_fences (task_uid, reason) VALUES ($1, 'Canceled')", uuid.UUID(task.metadata.uid))

    outcome, _ = await lab.run(task)

    assert outcome.outcome is Outcome.FENCED
    assert [state for state, _ in await states(lab, task)] == ["pending"]


async def test_a_document_that_was_published_before_the_pod_died_is_found_published(lab: Lab) -> None:
    paths = write(lab, "a.txt")
    task = batch(lab, filePaths=paths)
    await lab.run(task)
    await lab.fetch(
        "UPDATE batch_documents SET state = 'pending', reason = NULL, chunks = NULL WHERE task_uid = $1",
        uuid.UUID(task.metadata.uid),
    )

    outcome, _ = await lab.run(task, attempt=2)

    assert outcome.outcome is Outcome.SUCCEEDED
    assert await states(lab, task) == [("done", "Completed")]
    assert lab.embedded == 1


async def test_the_same_document_twice_is_done_once_and_another_under_its_id_refused(lab: Lab) -> None:
    first, second = write(lab, "a.txt", "b.txt")
    lines = [first, first, json.dumps({"filePath": second, "documentId": first}), "", second]
    (lab.documents / "list.txt").write_text("\n".join(lines))
    task = batch(lab, manifestPath="list.txt")

    outcome, _ = await lab.run(task)

    found = await rows(lab, task)
    assert [(row["state"], row["reason"]) for row in found] == [
        *(("done", "Completed"), ("done", "Duplicate"), ("failed", "DuplicateDocument"), ("done", "Completed")),
    ]
    assert "it would replace this one" in found[2]["message"]
    assert outcome.result is not None
    assert (outcome.result.documents, outcome.result.documents_failed, outcome.result.documents_total) == (2, 1, 4)
    assert await lab.published("a.txt") == 1


async def test_what_ends_the_whole_batch_is_permanent_and_kept(lab: Lab) -> None:
    task = batch(lab, prefix="nowhere")

    outcome, code = await lab.run(task, shards="0-7", shard_index=3)

    assert (outcome.outcome, outcome.reason, code) == (Outcome.FAILED, "DocumentNotFound", ExitCode.PERMANENT)
    assert outcome.error is not None
    assert "payload.prefix" in outcome.error.message
    stored = await lab.fetch("SELECT outcome FROM task_results WHERE task_uid = $1", uuid.UUID(task.metadata.uid))
    assert AttemptOutcome.model_validate_json(stored).reason == "DocumentNotFound"


LISTS: list[tuple[str, dict[str, str], type[TaskError] | list[str], str]] = [
    ("all below a folder", {"prefix": "m"}, ["m/a.md", "m/b.txt", "m/deep/er/d.md"], ""),
    ("absolute", {"prefix": "/data/m/"}, ["/data/m/a.md", "/data/m/b.txt", "/data/m/deep/er/d.md"], ""),
    ("of one kind", {"prefix": "m", "glob": "*.md"}, ["m/a.md"], ""),
    ("of one kind, anywhere", {"prefix": "m", "glob": "**/*.md"}, ["m/a.md", "m/deep/er/d.md"], ""),
    ("an alternative", {"prefix": "m", "glob": "[ab].*"}, ["m/a.md", "m/b.txt"], ""),
    ("none matches", {"prefix": "m", "glob": "*.pdf"}, DocumentNotFound, "none of the 3 files there matches payload.glob"),
    ("an empty folder", {"prefix": "empty"}, DocumentNotFound, "there is no file; correct payload.prefix"),
    ("no folder", {"prefix": "none"}, DocumentNotFound, "correct payload.prefix"),
    ("a file", {"prefix": "m/a.md"}, DocumentRefused, "it is not a folder"),
    ("outside", {"prefix": "/etc"}, DocumentRefused, "not below the document volume"),
    ("a link out", {"prefix": "out"}, DocumentRefused, "not below the document volume"),
    ("no manifest", {"manifestPath": "none.txt"}, DocumentNotFound, "payload.manifestPath"),
    ("an empty manifest", {"manifestPath": "blank.txt"}, DocumentNotFound, "names no document"),
    ("a bad line", {"manifestPath": "bad.jsonl"}, InvalidTask, "line 2 of payload.manifestPath: filePath"),
    ("no text", {"manifestPath": "latin.txt"}, TaskError, "not in UTF-8"),
    ("too many", {"manifestPath": "long.txt"}, InvalidTask, f"more than {MOST_DOCUMENTS} documents"),
]


@pytest.mark.parametrize(("payload", "expected", "said"), [one[1:] for one in LISTS], ids=[one[0] for one in LISTS])
async def test_lists(
    lab: Lab, payload: dict[str, str], expected: type[TaskError] | list[str], said: str, tmp_path: Path
) -> None:
    root = lab.documents
    for name in ("m/a.md", "m/b.txt", "m/deep/er/d.md", "m/.partial-1", "m/.hidden/e.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text")
    (root / "empty").mkdir()
    (root / "out").symlink_to("/etc")
    (root / "m" / "out").symlink_to("/etc")
    (root / "blank.txt").write_text("\n\n")
    (root / "bad.jsonl").write_text('{"filePath": "a.md"}\n{"documentId": "x"}\n')
    (root / "latin.txt").write_bytes("café".encode("latin-1"))
    (root / "long.txt").write_text("".join(f"{number}.md\n" for number in range(MOST_DOCUMENTS + 1)))
    listing = list_documents(Payload.model_validate(payload), settings=lab.settings())

    if isinstance(expected, list):
        assert [one.file_path for one in await listing] == expected
        return
    with pytest.raises(expected) as raised:
        await listing
    assert said in raised.value.message


class Told:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, tuple[int, int] | None]] = []

    def report(self, stage: Stage, percent: int, *, counted: tuple[int, int] | None = None) -> None:
        if (percent, counted) not in self.heard:
            self.heard.append((percent, counted))


async def test_tells_how_many_of_all_documents_have_ended(lab: Lab) -> None:
    paths = write(lab, "a.txt", "b.txt", "c.txt", "d.txt")
    task = batch(lab, filePaths=paths, parallelism=2)
    uid, created_at = identity(task)

    async def told(shard: str) -> list[tuple[int, tuple[int, int] | None]]:
        progress = Told()
        settings = lab.settings(shards=shard)
        async with aclosing(Ledger(settings.postgres_url.get_secret_value())) as ledger:
            work = Work(
                task,
                uid=uid,
                created_at=created_at,
                settings=settings,
                ledger=ledger,
                progress=progress,
                make_embedder=lambda name, *, threads: lab.embedder,
            )
            await Batch(work).run()
        return progress.heard

    assert await told("0") == [(0, (0, 4)), (25, (1, 4)), (50, (2, 4))]
    assert await told("1") == [(50, (2, 4)), (75, (3, 4)), (100, (4, 4))]
