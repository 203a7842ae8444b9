"""The text of a document from its chunks, and what the next splitter makes of it."""

from dataclasses import replace

import pytest

from job_runner.document import Chunk, Heading, Kind, Page, ParsedDocument
from job_runner.index import Row
from job_runner.made import Made, rehashed, with_model
from job_runner.reassembly import reassembled
from job_runner.split import SPLITTER_VERSION, SplitSettings, split
from task_contract.models import ProcessingMode

MADE = Made("3", SPLITTER_VERSION, ProcessingMode.INTELLIGENT_SPLIT, 300, 60, "model-1")


def sentences(count: int, mark: str) -> str:
    return "".join(f"{mark} sentence {number} says something about its subject. " for number in range(count))


def document(*, paged: bool = False) -> ParsedDocument:
    text, headings, pages = "", [], []
    for number, (title, level, count) in enumerate([("Part 1", 1, 20), ("1.1 First", 2, 9), ("第二部分", 1, 30)], start=1):
        pages.append(Page(number, len(text)))
        headings.append(Heading(len(text), len(text) + len(title) + 1, level, title))
        text += f"{title}\n{sentences(count, title).strip()}\n\n"
    kind = Kind.PDF if paged else Kind.TEXT
    return ParsedDocument(kind, text, tuple(pages) if paged else (Page(1, 0),), tuple(headings))


def rows(chunks: list[Chunk], *, paged: bool = False) -> list[Row]:
    return [
        Row(
            id=str(chunk.ordinal),
            document_id="d",
            version=1,
            ordinal=chunk.ordinal,
            text=chunk.text,
            text_hash="",
            page_start=chunk.page_start if paged else 0,
            page_end=chunk.page_end if paged else 0,
            heading_path="\n".join(chunk.heading_path),
            char_start=chunk.start,
            char_end=chunk.end,
            language=chunk.language,
            metadata={},
            source_sha256="",
            content_hash="",
            task_uid="",
            chunk_count=len(chunks),
            tokens=0,
            pipeline=MADE.text,
        )
        for chunk in chunks
    ]


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("overlap", [0, 60])
def test_the_text_comes_back_but_for_white_space_between_chunks(paged: bool, overlap: int) -> None:
    original = document(paged=paged)
    chunks = list(split(original, SplitSettings(300, overlap)))
    found = reassembled(rows(chunks, paged=paged))
    assert found.text.split() == original.text.split()
    assert all(found.text[chunk.start : chunk.end] == chunk.text for chunk in chunks)
    assert [one.title for one in found.headings] == [one.title for one in original.headings]
    assert [one.level for one in found.headings] == [one.level for one in original.headings]
    assert [page.number for page in found.pages] == ([1, 2, 3] if paged else [1])
    assert found.paged is paged


@pytest.mark.parametrize("size", [150, 300, 600, 2000])
def test_another_size_gives_what_the_file_would_give(size: int) -> None:
    original = document()
    found = reassembled(rows(list(split(original, SplitSettings(300, 60)))))
    settings = SplitSettings(size, 0)
    assert [(chunk.start, chunk.end, chunk.heading_path) for chunk in split(found, settings)] == [
        (chunk.start, chunk.end, chunk.heading_path) for chunk in split(original, settings)
    ]


def test_pages_that_turn_within_a_chunk_are_in_order() -> None:
    chunks = [
        Chunk(0, "a" * 90, 5, 95, 2, 4, (), "en", 0),
        Chunk(1, "b" * 10, 90, 100, 4, 4, (), "en", 0),
        Chunk(2, "c" * 10, 101, 111, 6, 6, (), "en", 0),
    ]
    assert reassembled(rows(chunks, paged=True)).pages == (Page(2, 0), Page(3, 35), Page(4, 65), Page(6, 101))


@pytest.mark.parametrize("kind", [Kind.TEXT, Kind.PDF, Kind.HTML])
def test_the_content_hash_is_the_one_of_the_file_processed_anew(kind: Kind) -> None:
    before = MADE.content_hash(kind, "0" * 64, {"a": "b"})
    new = replace(MADE, chunk_size=500, model="model-2")
    found = rehashed(before, MADE.text, new.text, source_sha256="0" * 64, metadata={"a": "b"})
    assert found == new.content_hash(kind, "0" * 64, {"a": "b"})


def test_rows_of_others_have_a_hash_of_their_own() -> None:
    assert Made.read("") is Made.read("rows of others") is None
    assert Made.read(MADE.text) == MADE
    changed = with_model("vectors of others, model a", "b")
    assert changed == "vectors of others, model b"
    found = rehashed("c" * 64, "vectors of others, model a", changed, source_sha256="", metadata={})
    assert found not in {"c" * 64, rehashed("d" * 64, "", changed, source_sha256="", metadata={})}
