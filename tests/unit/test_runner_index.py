"""What may be stale of a document, which documents a store is asked about in one clause, and rows on their way to stores."""

from dataclasses import asdict, replace

import pytest

from job_runner.index import Row, Stale, alike, columns_of
from job_runner.milvus import _written_at_once

ROW = Row(
    id="a-1",
    document_id="a",
    version=1,
    ordinal=0,
    text="a",
    text_hash="b",
    page_start=0,
    page_end=0,
    heading_path="",
    char_start=0,
    char_end=1,
    language="en",
    metadata={"team": "harbour"},
    source_sha256="c",
    content_hash="d",
    task_uid="e",
    chunk_count=1,
    tokens=1,
    pipeline="f",
)


@pytest.mark.parametrize(
    ("up_to", "keep", "possible"),
    [
        (0, (), False),
        (1, (1,), False),
        (3, (1, 2, 3), False),
        (3, (3, 4), True),
        (3, (), True),
        (2, (1, 1), True),
        (2, (0, 1), True),
    ],
)
def test_a_document_whose_every_version_is_kept_has_nothing_stale(up_to: int, keep: tuple[int, ...], possible: bool) -> None:
    assert Stale("a", up_to=up_to, keep=keep).possible is possible


def test_documents_with_the_same_versions_are_one_clause() -> None:
    stale = [Stale("a", 2, (2,)), Stale("b", 2, (1,)), Stale("c", 2, (2,)), Stale("d", 3, (2,))]
    assert alike(stale) == {(2, (2,)): ["a", "c"], (2, (1,)): ["b"], (3, (2,)): ["d"]}


def test_a_call_of_milvus_takes_as_many_rows_as_fit() -> None:
    short, long = replace(ROW, text="a"), replace(ROW, text="文" * 30_000)
    assert list(_written_at_once([short] * 2_500, 16)) == [slice(0, 1024), slice(1024, 2048), slice(2048, 2500)]
    parts = list(_written_at_once([long] * 200, 1024))
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(200))
    assert max(part.stop - part.start for part in parts) == 63, "8 MB at four bytes a character"
    assert list(_written_at_once([], 16)) == []


def test_columns_of_a_row_are_those_of_its_class() -> None:
    assert columns_of(ROW) == asdict(ROW)
