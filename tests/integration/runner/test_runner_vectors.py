"""embedding_generation and vector_storage on real stores: from the input to what readers see, and nothing between."""

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from job_runner.ledger import Ledger
from job_runner.publication import WINDOW
from job_runner.vector_storage import GROUP
from task_contract.errors import Fenced, StoreUnavailable
from task_contract.lifecycle import ExitCode
from task_contract.messages import AttemptOutcome
from task_contract.models import ProcessingTask
from task_contract.vectors import vectors_of
from tests.support.runner_lab import Lab, Reached, run_pipeline, run_watched

TEXTS = ["one", "two", "three", "四"]


def lines(folder: Path, name: str, rows: Sequence[Any]) -> None:
    """Write a file of JSON lines, whole."""
    (folder / f"{name}.new").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.new").rename(folder / name)


def error(outcome: AttemptOutcome) -> tuple[str, str]:
    assert outcome.error is not None, outcome
    return outcome.error.reason, outcome.error.message


async def kept(lab: Lab, task: ProcessingTask) -> list[tuple[str | None, list[float]]]:
    """Return the vectors of a task that PostgreSQL has."""
    ledger = Ledger(lab.environment["TASKS_POSTGRES_URL"])
    try:
        parts = [part async for part in ledger.vector_parts(UUID(task.metadata.uid))]
        return [(key, list(vector)) for part in parts for key, vector in vectors_of(part)]
    finally:
        await ledger.aclose()


# ---------------------------------------------------------------------------------------------------------- embedding


async def test_vectors_of_inline_texts_are_kept_in_postgresql_in_their_order_and_a_retry_replaces_them(lab: Lab) -> None:
    task = lab.embedding(texts=TEXTS)
    for _ in range(2):
        outcome, code = await lab.run(task)
        assert code is ExitCode.SUCCEEDED, outcome
        assert outcome.result is not None
        assert (outcome.result.vectors, outcome.result.dimension, outcome.result.output) == (4, 16, "postgres")
    found = await kept(lab, task)
    assert [key for key, _ in found] == [None] * 4
    assert np.array_equal(np.array([vector for _, vector in found], np.float32), lab.embedder.embed(TEXTS))


@pytest.mark.parametrize("suffix", ["npy", "jsonl", "parquet"])
async def test_vectors_of_a_file_go_into_a_file_row_by_row(lab: Lab, suffix: str) -> None:
    texts = [f"text {number}" * (number % 7 + 1) for number in range(5_000)]
    lines(lab.documents, "texts.jsonl", [{"id": f"row-{number}", "text": text} for number, text in enumerate(texts)])
    task = lab.embedding(inputPath="texts.jsonl", outputPath=f"outputs/sets/a.{suffix}")
    outcome, code = await lab.run(task)
    assert code is ExitCode.SUCCEEDED, outcome
    assert outcome.result is not None
    assert (outcome.result.vectors, outcome.result.output) == (5_000, f"outputs/sets/a.{suffix}")
    file = lab.documents / f"outputs/sets/a.{suffix}"
    if suffix == "npy":
        vectors = np.load(file)
    elif suffix == "parquet":
        table = parquet.read_table(file)
        assert table["id"].to_pylist()[4_999] == "row-4999"
        vectors = np.array(table["vector"].to_pylist(), np.float32)
    else:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert (rows[4_999]["id"], rows[4_999]["row"]) == ("row-4999", 5_000)
        vectors = np.array([row["vector"] for row in rows], np.float32)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors[4_990:], lab.embedder.embed(texts[4_990:]))
    assert [one.name for one in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("rows", "payload", "reason", "says"),
    [
        (None, {}, "DocumentNotFound", "cannot find a.jsonl"),
        ([], {}, "DocumentEmpty", "0 bytes"),
        ([{"text": "a"}, {"id": 1}], {}, "DocumentUnreadable", "row 2: no text"),
        ([{"text": "a"}, ["b"]], {}, "DocumentUnreadable", "row 2: no JSON object"),
        ([{"text": "x" * 24_577}], {}, "DocumentUnreadable", "row 1: the text has 24577 characters"),
        ([{"text": "a"}], {"embeddingModel": "another"}, "InvalidTask", "cannot embed with 'another'"),
        ([{"text": "a"}] * 5, {}, "InvalidTask", "320 bytes, 256 are the most; set payload.outputPath"),
    ],
)
async def test_bad_input_is_named_before_anything_is_computed(
    lab: Lab, rows: Any, payload: dict[str, Any], reason: str, says: str
) -> None:
    if rows is not None:
        lines(lab.documents, "a.jsonl", rows)
    outcome, code = await lab.run(lab.embedding(inputPath="a.jsonl", **payload), inline_result_bytes=256)
    assert code is ExitCode.PERMANENT
    assert error(outcome)[0] == reason
    assert says in error(outcome)[1]
    assert lab.embedded == 0


@pytest.mark.parametrize("payload", [{}, {"outputPath": "outputs/a.npy"}], ids=["inline", "file"])
async def test_a_canceled_task_leaves_no_vectors(lab: Lab, payload: dict[str, Any]) -> None:
    task = lab.embedding(texts=TEXTS, **payload)
    await lab.fetch("INSERT INTO task_fences (task_uid, reason) VALUES ($1, 'Canceled')", UUID(task.metadata.uid))
    outcome, code = await lab.run(task)
    assert code is ExitCode.FENCED, outcome
    assert await lab.fetch("SELECT count(*) FROM task_vectors WHERE task_uid = $1", UUID(task.metadata.uid)) == 0
    assert [one for one in lab.documents.rglob("*") if one.is_file()] == []


# ------------------------------------------------------------------------------------------------------------- storage


def rows_of(lab: Lab, texts: Sequence[str], **columns: Sequence[Any]) -> list[dict[str, Any]]:
    vectors = lab.embedder.embed(texts).tolist()
    rows = [{"text": text, "vector": vector} for text, vector in zip(texts, vectors, strict=True)]
    return [row | {name: values[index] for name, values in columns.items()} for index, row in enumerate(rows)]


async def test_good_rows_are_published_and_the_others_are_named(lab: Lab) -> None:
    good = rows_of(lab, TEXTS, id=["a", "b", "c", 4], metadata=[{"k": "1"}, None, {}, {"k": "4"}])
    good[1]["vector"] = [2 * number for number in good[1]["vector"]]
    bad = [
        {"text": "x", "vector": [1.0] * 15},
        {"text": "x", "vector": [float("nan")] * 16},
        {"text": "x", "vector": [0] * 16},
        {"vector": good[0]["vector"]},
        good[0] | {"text": "again"},
    ]
    lines(lab.documents, "rows.jsonl", [bad[0], *good[:2], *bad[1:4], *good[2:], bad[4]])
    task = lab.storage(inputPath="rows.jsonl", metadata={"set": "one"}, embeddingModel="hash")
    outcome, code = await lab.run(task)
    assert code is ExitCode.SUCCEEDED, outcome
    result = outcome.result
    assert result is not None
    assert (result.chunks, result.milvus_count, result.elasticsearch_count, result.rejected) == (4, 4, 4, 5)
    assert (result.embedded, result.reused, result.dimension) == (None, None, 16)
    assert [(one.row, one.reason) for one in result.rejections or ()] == [
        (1, "the vector has 15 dimensions and not 16"),
        (4, "the vector has numbers that are not finite"),
        (5, "the vector is zero"),
        (6, "no text"),
        (9, "its id stands in a row before"),
    ]
    in_milvus, in_elasticsearch = await lab.contents("a")
    assert in_milvus == in_elasticsearch
    assert [(row["ordinal"], row["text"], row["chunk_count"]) for row in in_milvus] == [
        (index, text, 4) for index, text in enumerate(TEXTS)
    ]
    assert [row["metadata"] for row in in_milvus] == [
        {"set": "one", "k": "1", "id": "a"},
        {"set": "one", "id": "b"},
        {"set": "one", "id": "c"},
        {"set": "one", "k": "4", "id": "4"},
    ]
    hit = (await lab.stores.vectors.search(lab.embedder.embed(["two"])[0], limit=1))[0]
    assert hit.text == "two"
    assert hit.score == pytest.approx(1, abs=1e-5)
    assert lab.embedded == len(TEXTS) + 1  # the test's own

    again, _ = await lab.run(
        lab.storage(
            inputPath="rows.jsonl",
            metadata={"set": "one"},
            embeddingModel="hash",
        ),
    )
    assert again.reason == "Unchanged"
    assert again.result is not None
    assert again.result.rejections == result.rejections
    lines(lab.documents, "rows.jsonl", good[:1])
    await lab.run(lab.storage(inputPath="rows.jsonl", at=5))
    assert await lab.versions("a") == {3: (1, 1)}  # one that was unchanged has a number too


async def test_rows_of_parquet_are_stored_like_those_of_json(lab: Lab) -> None:
    vectors = lab.embedder.embed(TEXTS)
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), 16)
    parquet.write_table(pyarrow.table({"text": TEXTS, "vector": column}), lab.documents / "rows.parquet")
    outcome, _ = await lab.run(lab.storage(inputPath="rows.parquet"))
    assert outcome.result is not None, outcome
    assert (outcome.result.chunks, outcome.result.rejected) == (4, 0)
    assert [row["text"] for row in (await lab.contents("a"))[1]] == TEXTS


@pytest.mark.parametrize(
    ("rows", "payload", "reason", "says"),
    [
        (None, {}, "DocumentNotFound", "cannot find rows.jsonl"),
        ([], {}, "DocumentEmpty", "0 bytes"),
        ([{"text": "a", "vector": [1.0]}, {"text": "b"}], {}, "DocumentRefused", "no row of it is good: row 1: the vector"),
        ([{"text": "a", "vector": [1.0] * 16}], {"embeddingModel": "another"}, "ModelMismatch", "external-another"),
    ],
)
async def test_bad_storage_is_named_and_nothing_of_it_is_seen(
    lab: Lab, rows: Any, payload: dict[str, Any], reason: str, says: str
) -> None:
    lines(lab.documents, "first.jsonl", rows_of(lab, ["first"]))
    await lab.run(lab.storage("first", inputPath="first.jsonl"))
    if rows is not None:
        lines(lab.documents, "rows.jsonl", rows)
    outcome, code = await lab.run(lab.storage(inputPath="rows.jsonl", **payload))
    assert code is ExitCode.PERMANENT, outcome
    assert error(outcome)[0] == reason
    assert says in error(outcome)[1]
    assert await lab.versions("a") == {}
    assert await lab.published("a") is None


async def test_vectors_of_a_model_from_elsewhere_make_a_knowledge_base_of_their_own(lab: Lab) -> None:
    lab.take_own_knowledge_base()
    name = "模型" * 100
    lines(lab.documents, "rows.jsonl", [{"text": "a", "vector": [1.0] * 16}, {"text": "b", "vector": [1.0] * 15}])
    outcome, _ = await lab.run(lab.storage(inputPath="rows.jsonl", embeddingModel=name))
    assert outcome.result is not None, outcome
    assert (outcome.result.chunks, outcome.result.rejected, outcome.result.dimension) == (1, 1, 16)
    outcome, _ = await lab.run(lab.storage("b", inputPath="rows.jsonl", embeddingModel="hash"))
    assert error(outcome)[0] == "ModelMismatch"
    outcome, _ = await lab.run(lab.storage("b", inputPath="rows.jsonl"))  # as what the knowledge base has
    assert outcome.result is not None, outcome


@pytest.mark.parametrize("output", [None, "outputs/a.npy", "outputs/a.jsonl", "outputs/a.parquet"])
async def test_vectors_of_a_task_are_stored_with_its_texts(lab: Lab, output: str | None) -> None:
    name = f"embed-{uuid.uuid4().hex[:8]}"
    lines(lab.documents, "texts.jsonl", [{"id": number, "text": text} for number, text in enumerate(TEXTS)])
    source: dict[str, Any] = {"texts": TEXTS} if output is None else {"inputPath": "texts.jsonl", "outputPath": output}
    made = lab.embedding(name=name, **source)
    assert (await lab.run(made))[1] is ExitCode.SUCCEEDED
    await lab.finish(made)
    outcome, _ = await lab.run(lab.storage(fromTask=name))
    assert outcome.result is not None, outcome
    assert (outcome.result.chunks, outcome.result.rejected) == (4, 0)
    rows = (await lab.contents("a"))[1]
    assert [row["text"] for row in rows] == TEXTS
    assert [row["metadata"] for row in rows] == [{} if output is None else {"id": str(number)} for number in range(4)]
    for text in TEXTS:
        hits = await lab.stores.vectors.search(lab.embedder.embed([text])[0], limit=50)
        assert [hit.score for hit in hits if hit.text == text and hit.document_id == lab.document_id("a")] == [
            pytest.approx(1, abs=1e-5)
        ]
    if output is not None:
        lines(lab.documents, "texts.jsonl", [{"text": text} for text in reversed(TEXTS)])
        outcome, _ = await lab.run(lab.storage("b", fromTask=name))
        assert error(outcome)[0] == "DocumentRefused"
        assert "texts.jsonl has changed since" in error(outcome)[1]


@pytest.mark.parametrize(
    ("kind", "phase", "reason", "code"),
    [
        (None, None, "InvalidTask", ExitCode.PERMANENT),
        ("embedding", "Failed", "InvalidTask", ExitCode.PERMANENT),
        ("embedding", "Processing", "TaskUnfinished", ExitCode.STORE_UNAVAILABLE),
        ("embedding", "Completed", "DocumentNotFound", ExitCode.PERMANENT),
        ("storage", "Completed", "InvalidTask", ExitCode.PERMANENT),
    ],
)
async def test_a_task_without_vectors_is_named(
    lab: Lab, kind: str | None, phase: str | None, reason: str, code: ExitCode
) -> None:
    name = f"embed-{uuid.uuid4().hex[:8]}"
    if phase is not None:
        made = lab.embedding(name=name, texts=TEXTS) if kind == "embedding" else lab.storage(inputPath="a.jsonl")
        named = made.model_copy(update={"metadata": made.metadata.model_copy(update={"name": name})})
        await lab.finish(named, phase)
    outcome, found = await lab.run(lab.storage(fromTask=name))
    assert (error(outcome)[0], found) == (reason, code)
    assert name in error(outcome)[1]


POINTS = [
    "ledger.begin 1 after",
    "vectors.write 1 before",
    "vectors.write 1 after",
    "texts.write 1 before",
    "texts.write 1 after",
    "vectors.stored 1 before",
    "ledger.commit 1 before",
    "ledger.commit 1 after",
    "vectors.remove 1 before",
    "texts.remove 1 after",
]


@pytest.mark.parametrize("point", POINTS)
async def test_who_dies_at_a_point_leaves_one_whole_version_and_the_next_attempt_ends_with_the_new_one(
    lab: Lab, point: str
) -> None:
    lines(lab.documents, "rows.jsonl", rows_of(lab, ["old 1", "old 2", "old 3"]))
    await run_pipeline(lab.storage(inputPath="rows.jsonl"), lab.settings(), lab.embedder)
    lines(lab.documents, "rows.jsonl", rows_of(lab, ["new 1", "new 2"]))
    task = lab.storage(inputPath="rows.jsonl", at=1)

    async def die() -> None:
        raise StoreUnavailable("cannot go on: killed")

    with pytest.raises(StoreUnavailable):
        await run_watched(task, lab.settings(), lab.embedder, Reached(point, die))
    version = await lab.published("a")
    whole = {1: (3, 3), 2: (2, 2)}
    assert version is not None
    assert (await lab.versions("a"))[version] == whole[version]
    done = await run_pipeline(task, lab.settings(), lab.embedder)
    assert done.result.chunks == 2
    assert await lab.versions("a") == {2: (2, 2)}
    assert [row["text"] for row in (await lab.contents("a"))[0]] == ["new 1", "new 2"]


async def test_a_second_pod_of_the_task_takes_the_intent_and_the_first_one_cannot_publish(lab: Lab) -> None:
    lines(lab.documents, "rows.jsonl", rows_of(lab, ["1", "2"]))
    task = lab.storage(inputPath="rows.jsonl")

    async def second() -> None:
        await run_pipeline(task, lab.settings(), lab.embedder)

    with pytest.raises(Fenced):
        await run_watched(task, lab.settings(), lab.embedder, Reached("ledger.commit 1 before", second))
    assert await lab.versions("a") == {1: (2, 2)}


async def test_a_version_of_more_rows_than_a_window_is_taken_over_and_compared_in_windows(lab: Lab) -> None:
    count = WINDOW + 300
    vectors = np.random.default_rng(1).normal(size=(count, 16)).round(3)
    rows = [{"text": f"row {index}", "vector": vector} for index, vector in enumerate(vectors.tolist())]
    lines(lab.documents, "rows.jsonl", rows)
    task = lab.storage(inputPath="rows.jsonl")

    async def die() -> None:
        raise StoreUnavailable("cannot go on: killed")

    with pytest.raises(StoreUnavailable):
        await run_watched(task, lab.settings(), lab.embedder, Reached(f"texts.write {WINDOW // GROUP + 1} after", die))
    done = await run_pipeline(task, lab.settings(), lab.embedder)
    assert (done.result.chunks, done.result.milvus_count, done.result.elasticsearch_count) == (count,) * 3
    assert (await run_pipeline(task, lab.settings(), lab.embedder)).result.milvus_count == count
    assert (
        await run_pipeline(lab.storage(inputPath="rows.jsonl", at=1), lab.settings(), lab.embedder)
    ).reason == "Unchanged"
