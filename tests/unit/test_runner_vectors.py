"""Rows of vectors: how they are read, which are refused, and files that are whole or not there."""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from job_runner import rows
from job_runner.fetch import Opened, hashed
from job_runner.outputs import replacing
from job_runner.rows import Record, records
from job_runner.vector_files import reading, writing
from job_runner.vector_storage import Good, Refused, Survey, checked
from task_contract.errors import DocumentRefused, DocumentUnreadable, Fenced, InvalidTask, StoreUnavailable, TaskError
from task_contract.messages import TERMINATION_LIMIT, AttemptOutcome, Outcome
from task_contract.models import Result

TASK = uuid.UUID(int=1)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Opened]:
    with hashed(os.open(path, os.O_RDONLY), name=path.name, max_bytes=1 << 24) as file:
        yield file


def read(path: Path, *columns: str) -> list[Record]:
    with opened(path) as file:
        found = list(records(file, columns))
        assert [record.number for record in records(file, columns)] == [record.number for record in found]
        return found


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("line", "fields", "problem"),
    [
        (b'{"text": "a", "vector": [1, 2.5]}', {"text": "a", "vector": [1, 2.5]}, ""),
        (b"\xef\xbb\xbf" + b'{"text": "a"}', {"text": "a"}, ""),
        (b'{"text": "a"}\r', {"text": "a"}, ""),
        (b'{"text": ', {}, "no JSON"),
        (b"[" * 100_000, {}, "no JSON"),
        (b'{"text": "\xff"}', {}, "no JSON"),
        (b'["a"]', {}, "no JSON object"),
        (b"7", {}, "no JSON object"),
        (b'{"text": "' + b"x" * rows.LINE_BYTES + b'"}', {}, "the line has more than 4194304 bytes"),
    ],
)
def test_a_line_is_a_row_or_says_why_not_and_the_next_one_is_read(
    tmp_path: Path, line: bytes, fields: dict[str, Any], problem: str
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(line + b'\n\n{"text": "next"}')
    first, following = read(tmp_path / "rows.jsonl", "text")
    assert (first.number, dict(first.fields)) == (1, fields)
    assert first.problem.startswith(problem)
    assert bool(first.problem) == bool(problem)
    assert following == Record(3, {"text": "next"})


def test_a_number_that_json_has_not_is_read_and_left_to_the_row_s_check(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"vector": [NaN, 1]}')
    (row,) = read(tmp_path / "rows.jsonl", "vector")
    with pytest.raises(Refused, match="not finite"):
        checked(Record(1, {**row.fields, "text": "a"}), dimension=2, metadata={})


@pytest.mark.parametrize("size", [None, 2], ids=["lists", "lists of fixed size"])
def test_parquet_has_the_rows_that_json_would_have(tmp_path: Path, size: int | None) -> None:
    vectors = pyarrow.list_(pyarrow.float32(), size) if size else pyarrow.list_(pyarrow.float64())
    columns = {
        "vector": pyarrow.array([[1, 0], None, [0, 1]], vectors),
        "text": pyarrow.array(["a", "b", None]),
        "id": pyarrow.array([1, 2, 3]),
        "metadata": pyarrow.array([[("k", "v")], None, []], pyarrow.map_(pyarrow.string(), pyarrow.string())),
        "other": pyarrow.array([1, 2, 3]),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    found = read(tmp_path / "rows.parquet", "vector", "text", "id", "metadata", "absent")
    assert [record.number for record in found] == [1, 2, 3]
    assert [None if (one := record.fields["vector"]) is None else list(one) for record in found] == [[1, 0], None, [0, 1]]
    assert [record.fields["metadata"] for record in found] == [{"k": "v"}, None, {}]
    assert [set(record.fields) for record in found] == [{"vector", "text", "id", "metadata"}] * 3


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1" + b"x" * 100)
    with pytest.raises(DocumentUnreadable, match=r"cannot read rows\.parquet: damaged Parquet"):
        read(tmp_path / "rows.parquet", "text")


# -------------------------------------------------------------------------------------------------------------- checks

ROW = {"vector": [3.0, 4.0], "text": "chunk"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vector": None}, "no vector"),
        ({"vector": [1.0]}, "the vector has 1 dimensions and not 2"),
        ({"vector": [1.0, 2.0, 3.0]}, "the vector has 3 dimensions and not 2"),
        ({"vector": []}, "the vector has 0 dimensions and not 2|no list of numbers"),
        ({"vector": [float("nan"), 1.0]}, "not finite"),
        ({"vector": [float("inf"), 1.0]}, "not finite"),
        ({"vector": [0.0, 0.0]}, "the vector is zero"),
        ({"vector": ["1", "2"]}, "no list of numbers"),
        ({"vector": [True, False]}, "no list of numbers"),
        ({"vector": [[1.0], [2.0]]}, "no list of numbers"),
        ({"vector": [[1.0], 2.0]}, "no list of numbers"),
        ({"vector": [None, 1.0]}, "no list of numbers"),
        ({"vector": [10**400, 1]}, "no list of numbers|not finite"),
        ({"vector": "abc"}, "no list of numbers"),
        ({"vector": {"a": 1}}, "no list of numbers"),
        ({"text": None}, "no text"),
        ({"text": " \n"}, "no text"),
        ({"text": 7}, "no text"),
        ({"text": "x" * 65_536}, "the text has 65536 bytes, 65535 are the most"),
        ({"text": "\ud800"}, "the text is no Unicode"),
        ({"id": ""}, "the id has 0 characters"),
        ({"id": "x" * 257}, "the id has 257 characters"),
        ({"id": 1.5}, "the id is no text"),
        ({"id": True}, "the id is no text"),
        ({"id": "a", "metadata": {"id": "b"}}, "the metadata has another id"),
        ({"metadata": {"a": 1}}, "the metadata is no object of texts"),
        ({"metadata": ["a"]}, "the metadata is no object of texts"),
        ({"metadata": {"x" * 64: "a"}}, "a label of the metadata"),
        ({"metadata": {"a": "x" * 1025}}, "a label of the metadata"),
        ({"metadata": {str(number): "x" for number in range(34)}}, "the metadata has 34 labels"),
        ({"metadata": {str(number): "\U0001f30a" * 1000 for number in range(20)}}, "the metadata has 8"),
    ],
)
def test_a_bad_row_says_what_is_wrong_with_it(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        checked(Record(1, {**ROW, **changes}), dimension=2, metadata={})


@pytest.mark.parametrize(
    ("vector", "scaled"),
    [([0.6, 0.8], False), ([3, 4], True), ([3e-30, 4e-30], True), ([3e37, 4e37], True)],
)
def test_a_vector_of_another_length_is_scaled_to_1(vector: list[float], scaled: bool) -> None:
    good = checked(Record(1, {**ROW, "vector": vector}), dimension=2, metadata={})
    assert good.scaled is scaled
    assert good.vector.dtype == np.float32
    np.testing.assert_allclose(good.vector, [0.6, 0.8], rtol=1e-6)


def test_the_labels_of_the_task_stand_below_those_of_the_row_and_the_id_is_one() -> None:
    record = Record(1, {**ROW, "id": 7, "metadata": {"a": "row"}})
    assert checked(record, dimension=2, metadata={"a": "task", "b": "task"}).metadata == {"a": "row", "b": "task", "id": "7"}


def test_of_rows_with_one_id_the_first_good_one_stays_and_the_first_refused_rows_are_named_in_order() -> None:
    survey = Survey()
    for number, key in enumerate("aabacb" * 4, start=1):
        record = Record(number, {**ROW, "id": key})
        row: Good | Refused = Refused("bad") if number in {1, 9} else checked(record, dimension=2, metadata={})
        survey.add(record, row)
    survey.refuse_repeated()
    assert [index + 1 for index, good in enumerate(survey.good) if good] == [2, 3, 5]
    assert (survey.accepted, survey.refused) == (3, 21)
    assert [number for number, _ in survey.named] == [1, 4, 6, 7, 8, 9, 10, 11, 12, 13]
    assert {reason for _, reason in survey.named} == {"bad", "its id stands in a row before"}


def test_the_longest_reasons_fit_into_a_termination_message() -> None:
    survey = Survey()
    survey.add(Record(1, ROW), checked(Record(1, ROW), dimension=2, metadata={}))
    for number in range(20):
        survey.add(Record(10**6 + number), Refused("x" * 500))
    result = Result.model_validate({**survey.facts(2), "chunks": 10**6, "seconds": {"publish": 1.001, "store": 1000.001}})
    outcome = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=1, result=result)
    read = AttemptOutcome.parse(outcome.termination_message())
    assert len(outcome.termination_message().encode()) <= TERMINATION_LIMIT
    assert read is not None
    assert read.result == result


# --------------------------------------------------------------------------------------------------------------- files


def write(root: Path, path: str, vectors: Any, *, ids: list[str | None] | None = None, holder: str = "pod") -> str:
    with replacing(path, root=root, uid=TASK, holder=holder) as output:
        with writing(output, count=len(vectors), dimension=vectors.shape[1]) as sink:
            for start in range(0, len(vectors), 3):
                part = vectors[start : start + 3]
                sink((ids or [None] * len(vectors))[start : start + 3], part)
        output.flush()
        output.publish()
    return output.sha256


@pytest.mark.parametrize("suffix", ["npy", "jsonl", "parquet"])
def test_a_file_is_read_back_to_the_last_bit(tmp_path: Path, suffix: str) -> None:
    vectors = np.random.default_rng(1).normal(size=(10, 5)).astype(np.float32)
    path = f"/data/outputs/deep/er/vectors.{suffix}"
    digest = write(tmp_path, path, vectors, ids=["a", None, *"cdefghij"])
    file = tmp_path / f"outputs/deep/er/vectors.{suffix}"
    assert [one.name for one in file.parent.iterdir()] == [file.name]
    assert oct(file.stat().st_mode)[-3:] == "644"
    with opened(file) as source:
        assert source.sha256 == digest
        assert np.array_equal(np.stack(list(reading(source, count=10, dimension=5))), vectors)
        with pytest.raises(DocumentUnreadable, match="10 vectors and not 11"):
            list(reading(source, count=11, dimension=5))
    if suffix == "npy":
        assert np.array_equal(np.load(file), vectors)
    elif suffix == "jsonl":
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [(line["row"], line.get("id")) for line in lines[:3]] == [(1, "a"), (2, None), (3, "c")]
    else:
        assert parquet.read_table(file)["id"].to_pylist()[:3] == ["a", None, "c"]


def test_until_it_is_published_the_file_of_before_stays_and_what_was_cut_off_is_removed(tmp_path: Path) -> None:
    old, new = np.zeros((1, 2), np.float32), np.ones((4, 2), np.float32)
    write(tmp_path, "outputs/v.npy", old)
    abandoned = tmp_path / "outputs/.partial-somebody"
    abandoned.touch()
    os.utime(abandoned, (0, time.time() - 90_000))
    (tmp_path / "outputs/.partial-at-work").touch()
    with contextlib.suppress(KeyError), replacing("outputs/v.npy", root=tmp_path, uid=TASK, holder="a") as output:
        output.write(b"half")
        raise KeyError
    assert np.array_equal(np.load(tmp_path / "outputs/v.npy"), old)
    assert sorted(one.name for one in (tmp_path / "outputs").iterdir()) == [".partial-at-work", "v.npy"]
    write(tmp_path, "outputs/v.npy", new)
    assert np.array_equal(np.load(tmp_path / "outputs/v.npy"), new)


def test_an_attempt_that_was_given_up_for_dead_cannot_publish(tmp_path: Path) -> None:
    with replacing("outputs/v.npy", root=tmp_path, uid=TASK, holder="zombie") as zombie:
        zombie.write(b"old")
        write(tmp_path, "outputs/v.npy", np.ones((1, 2), np.float32), holder="next")
        with pytest.raises(Fenced):
            zombie.publish()
    assert np.load(tmp_path / "outputs/v.npy").shape == (1, 2)


def _link_out(root: Path) -> None:
    (root.parent / "elsewhere").mkdir()
    (root / "outputs").symlink_to(root.parent / "elsewhere")


def _link_below(root: Path) -> None:
    (root.parent / "elsewhere").mkdir()
    (root / "outputs").mkdir()
    (root / "outputs/a").symlink_to(root.parent / "elsewhere")


def _file_below(root: Path) -> None:
    (root / "outputs").mkdir()
    (root / "outputs/a").touch()


def _folder_there(root: Path) -> None:
    (root / "outputs/a/v.npy").mkdir(parents=True)
    (root / "outputs/a/v.npy/x").touch()


def _nothing(root: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "path", "error"),
    [
        (_link_out, "outputs/a/v.npy", DocumentRefused),
        (_link_below, "outputs/a/v.npy", DocumentRefused),
        (_file_below, "outputs/a/v.npy", DocumentRefused),
        (_folder_there, "outputs/a/v.npy", DocumentRefused),
        (_nothing, "outputs/" + "x" * 300 + ".npy", DocumentRefused),
        (_nothing, "outputs/../v.npy", InvalidTask),
        (_nothing, "outputs/a/../../v.npy", InvalidTask),
        (_nothing, "/etc/v.npy", InvalidTask),
        (_nothing, "v.npy", InvalidTask),
        (_nothing, "outputs/v.txt", InvalidTask),
        (_nothing, "outputs/.v.npy", InvalidTask),
    ],
)
def test_nothing_is_written_outside_or_through_what_is_in_the_way(
    tmp_path: Path, prepare: Any, path: str, error: type[TaskError]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    prepare(root)
    with pytest.raises(error, match="cannot write"):
        write(root, path, np.ones((1, 2), np.float32))
    assert list(tmp_path.rglob(".partial-*")) == []
    assert list((tmp_path / "elsewhere").glob("*")) == []


def test_a_link_in_the_place_of_the_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "outputs/v.npy").symlink_to(tmp_path / "kept")
    write(tmp_path, "outputs/v.npy", np.ones((1, 2), np.float32))
    assert (tmp_path / "kept").read_text() == "kept"
    assert not (tmp_path / "outputs/v.npy").is_symlink()


def test_a_volume_that_is_missing_or_full_is_waited_for(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="check the volume"):
        write(tmp_path / "absent", "outputs/v.npy", np.ones((1, 2), np.float32))
