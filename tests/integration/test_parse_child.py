"""The parser's child process: its answers, its errors, and its end in every case. No server, but a process for each."""

import asyncio
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from job_runner.document import Heading, Kind, ParsedDocument
from job_runner.fetch import opened
from job_runner.parse import ParserLimits, parse
from task_contract.errors import DocumentEmpty, DocumentRefused, DocumentUnreadable, ParserCrashed, TaskError
from tests.support.docx import DOCUMENT_TYPE, make_docx, paragraph, part, relationships, zipped
from tests.support.pdf import PdfPage, make_pdf
from tests.support.runner import until
from tests.support.workbooks import Value, make_xls

pytestmark = pytest.mark.integration

LIMITS = ParserLimits(memory_bytes=1 << 30, seconds=60, cpu_seconds=60, output_bytes=1 << 24)


async def parse_file(
    path: Path, limits: ParserLimits = LIMITS, progress: list[tuple[int, int]] | None = None
) -> ParsedDocument:
    seen = [] if progress is None else progress
    with opened(path.name, root=path.parent, max_bytes=1 << 30) as source:
        return await parse(source, limits=limits, on_progress=lambda done, total: seen.append((done, total)))


_strangers: set[int] = set()
"""Children that are there before a test begins: other tests may leave a zombie until it is collected."""


@pytest.fixture(autouse=True)
def know_strangers() -> None:
    _strangers.clear()
    _strangers.update(child.pid for child in psutil.Process().children(recursive=True))


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)} - _strangers


def commands() -> list[str]:
    return [word for pid in children() for word in psutil.Process(pid).cmdline()]


def test_libraries_that_read_files_are_loaded_by_the_child_alone() -> None:
    loaded = "import sys, job_runner.attempt, job_runner.pipeline; print(*{name.partition('.')[0] for name in sys.modules})"
    found = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.split()
    assert "asyncpg" in found
    assert not {"pypdfium2", "python_calamine", "selectolax", "lxml"} & set(found)


async def test_a_document_comes_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("# 标题 \U00020000\n\n正文。\n")
    document = await parse_file(path)
    assert document.kind is Kind.MARKDOWN
    assert document.text == "# 标题 \U00020000\n\n正文。\n"
    assert document.headings == (Heading(start=0, end=7, level=1, title="标题 \U00020000"),)


async def test_progress_by_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(make_pdf([PdfPage([(11, f"Chapter {number}.")]) for number in range(20)]))
    progress: list[tuple[int, int]] = []
    document = await parse_file(path, progress=progress)
    assert len(document.pages) == 20
    assert progress
    assert all(done <= total == 20 for done, total in progress)


async def test_errors_of_the_child_keep_their_type(tmp_path: Path) -> None:
    path = tmp_path / "broken.pdf"
    path.write_bytes(b"%PDF-1.7\nnothing else")
    with pytest.raises(DocumentUnreadable, match=r"cannot read broken\.pdf: the PDF is damaged"):
        await parse_file(path)


def bomb(size: int, *, content: bytes = b" ") -> bytes:
    """XML of WordprocessingML around ``size`` bytes of the same."""
    start, end = part("<w:body>|</w:body>").encode().split(b"|")
    return start + content * (size // len(content)) + end


def lying(data: bytes) -> bytes:
    """An archive that says of its main part that it has 1,000 bytes."""
    at = data.rindex(b"word/document.xml") - 46
    return data[: at + 24] + (1000).to_bytes(4, "little") + data[at + 28 :]


def encrypted(data: bytes) -> bytes:
    """An archive that says that all its members have a password."""
    return data.replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0")


BILLION_LAUGHS = "<!DOCTYPE w [<!ENTITY a 'ha'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;'><!ENTITY c '&b;&b;&b;&b;&b;&b;&b;'>]>"
EXTERNAL = "<!DOCTYPE w [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>"
DAMAGED = "the DOCX is damaged or cut short"
NO_ARCHIVE = "the ZIP archive, which DOCX, PPTX, XLSX, ODS and EPUB files are, is damaged or cut short"
PROSE = paragraph("word " * 400) + "".join(paragraph(f"{number} of {number * 7}") for number in range(2000))
ZIP_HEADER_ONLY = b"PK\x03\x04" + b"word/document.xml" * 10


@pytest.mark.parametrize(
    ("name", "make", "error", "message"),
    [
        pytest.param("a.docx", lambda: make_docx(PROSE)[:-2000], DocumentUnreadable, NO_ARCHIVE, id="truncated"),
        pytest.param("a.docx", lambda: ZIP_HEADER_ONLY, DocumentUnreadable, NO_ARCHIVE, id="start of an archive"),
        pytest.param("a.docx", lambda: zipped({"a.txt": b"x"}), DocumentRefused, "it is a ZIP archive", id="zip"),
        pytest.param(
            "a.docx",
            lambda: make_docx(content_type="text/plain"),
            DocumentRefused,
            "an Office file of an unknown",
            id="type",
        ),
        pytest.param(
            "a.docx", lambda: make_docx(parts={"word/document.xml": None}), DocumentUnreadable, DAMAGED, id="no main part"
        ),
        pytest.param(
            "a.docx",
            lambda: make_docx(
                parts={"_rels/.rels": relationships({"officeDocument": "word/document.xml"}, mode="External")}
            ),
            DocumentUnreadable,
            DAMAGED,
            id="main part elsewhere",
        ),
        pytest.param(
            "a.docx",
            lambda: make_docx(parts={"_rels/.rels": relationships({"officeDocument": "../../../etc/passwd"})}),
            DocumentUnreadable,
            DAMAGED,
            id="main part outside",
        ),
        pytest.param(
            "a.docx", lambda: make_docx(parts={"word/document.xml": "<w:p>"}), DocumentUnreadable, DAMAGED, id="no XML"
        ),
        pytest.param(
            "a.docx", lambda: make_docx(""), DocumentEmpty, "no text in it; text in pictures needs OCR", id="empty"
        ),
        pytest.param(
            "a.docx",
            lambda: make_docx(parts={"word/document.xml": part("").replace("?>", "?>" + BILLION_LAUGHS, 1)}),
            DocumentRefused,
            "its XML declares entities",
            id="entity bomb",
        ),
        pytest.param(
            "a.docx",
            lambda: make_docx(parts={"[Content_Types].xml": f"{EXTERNAL}<Types x='{DOCUMENT_TYPE}'>&x;</Types>"}),
            DocumentRefused,
            "its XML declares entities",
            id="external entity",
        ),
        pytest.param(
            "a.docx",
            lambda: make_docx(parts={"word/document.xml": bomb(300 << 20)}),
            DocumentRefused,
            "parts have more than 268435456 bytes when inflated",
            id="bomb by its size",
        ),
        pytest.param(
            "a.docx",
            lambda: make_docx(parts={"word/document.xml": bomb(20 << 20)}),
            DocumentRefused,
            "more than 200 times its size, as zip bombs do",
            id="bomb by its ratio",
        ),
        pytest.param(
            "a.docx",
            lambda: lying(make_docx(parts={"word/document.xml": bomb(2 << 20)})),
            DocumentUnreadable,
            DAMAGED,
            id="bomb that lies about its size",
        ),
        pytest.param(
            "a.docx",
            lambda: make_docx(parts={f"word/{number}-{'x' * 60_000}": b"" for number in range(80)}),
            DocumentRefused,
            "the archive's table of contents has",
            id="a table of contents without end",
        ),
        pytest.param(
            "a.docx", lambda: encrypted(make_docx(PROSE)), DocumentUnreadable, "encrypted with a password", id="password"
        ),
        pytest.param(
            "a.docx",
            lambda: make_docx("<w:p>" * 100_000 + "</w:p>" * 100_000),
            DocumentUnreadable,
            "more than 1000 elements in one another",
            id="XML that is 100,000 elements deep",
        ),
        pytest.param(
            "a.docx",
            lambda: make_docx('<w:p w:a="' + random.Random(1).randbytes(4 << 20).hex() + '"/>'),
            DocumentUnreadable,
            "a tag in word/document.xml has more than",
            id="a tag of 8 MB",
        ),
        pytest.param(
            "a.html", lambda: b"<html>" + b"<div>" * 100_000 + b"x", DocumentRefused, "open in one another", id="deep HTML"
        ),
        pytest.param("a.html", lambda: b"<i>x" * 4_100_000, DocumentRefused, "4100000 tags and the limit", id="many tags"),
        pytest.param(
            "a.html",
            lambda: b"<html><div id=app></div><script>x</script>",
            DocumentEmpty,
            "the page shows no text",
            id="scripts",
        ),
        pytest.param(
            "a.html", lambda: b"\xef\xbb\xbf<html><p>\xff", DocumentUnreadable, "marked as utf-8-sig", id="charset"
        ),
    ],
)
async def test_hostile_files_end_as_what_they_are(
    tmp_path: Path, name: str, make: Callable[[], bytes], error: type[TaskError], message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(make())
    began = time.monotonic()
    with pytest.raises(error, match=re.escape(message)) as failure:
        await parse_file(path)
    assert type(failure.value) is error
    assert str(failure.value).startswith("cannot ")
    assert time.monotonic() - began < LIMITS.seconds


@pytest.mark.parametrize(
    ("name", "make", "text"),
    [
        pytest.param(
            "a.html", lambda: b"<html><p>" + b"word " * 10_000_000, "word " * 9_999_999 + "word", id="a line of 50 MB"
        ),
        pytest.param("a.html", lambda: b"<html>" + b"<div>" * 4_900 + b"x", "x", id="deep"),
        pytest.param("a.html", lambda: b"<html>" + b"<table><tr><td>" * 1_600 + b"x", "x", id="tables in one another"),
        pytest.param("a.html", lambda: b"<html>" + b"<p>" * 100_000 + b"x", "x", id="never closed"),
        pytest.param(
            "a.html", lambda: b"<table><tr><td colspan=99999 rowspan=99999>x" * 2 + b"<tr>" * 9999, "x\n\nx", id="spans"
        ),
        pytest.param(
            "a.docx",
            lambda: make_docx("".join(paragraph(f"{number} 知识库" * 40) for number in range(3000))),
            "\n\n".join(f"{number} 知识库" * 40 for number in range(3000)),
            id="a large document",
        ),
        pytest.param(
            "a.docx",
            lambda: make_docx("<w:tbl><w:tr><w:tc>" * 300 + paragraph("x") + "</w:tc></w:tr></w:tbl>" * 300),
            "x",
            id="nested",
        ),
    ],
)
async def test_large_and_odd_files_are_read(tmp_path: Path, name: str, make: Callable[[], bytes], text: str) -> None:
    path = tmp_path / name
    path.write_bytes(make())
    assert (await parse_file(path, replace(LIMITS, output_bytes=1 << 27))).text == text


async def test_a_text_beyond_the_output_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text " * 100_000)
    with pytest.raises(DocumentRefused, match="larger than 100000 bytes"):
        await parse_file(path, replace(LIMITS, output_bytes=100_000))
    assert children() == set()


async def test_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("字" * 50_000_000)
    with pytest.raises(DocumentRefused, match="within 200 MiB of memory; raise TASKS_PARSER_MEMORY_BYTES"):
        await parse_file(path, replace(LIMITS, memory_bytes=200 << 20))


async def test_memory_that_a_library_asks_for_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "far.xls"
    far: list[list[Value]] = [["a"], *([] for _ in range(65_534)), [*[None] * 255, "z"]]
    path.write_bytes(make_xls({"S": far}))
    with pytest.raises(DocumentRefused, match="within 300 MiB of memory; raise TASKS_PARSER_MEMORY_BYTES"):
        await parse_file(path, replace(LIMITS, memory_bytes=300 << 20))


async def test_cpu_time_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_bytes(b"<p " + b" ".join(b"a%d" % number for number in range(300_000)) + b">x")  # quadratic in the library
    with pytest.raises(DocumentRefused, match="within 1 CPU seconds; raise TASKS_PARSER_SECONDS"):
        await parse_file(path, replace(LIMITS, cpu_seconds=1))
    assert children() == set()


async def test_wall_time_is_bounded_and_the_child_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text " * 20_000_000)
    with pytest.raises(ParserCrashed, match="within 0 s"):
        await parse_file(path, replace(LIMITS, seconds=0))
    assert children() == set()


async def test_a_canceled_parse_leaves_no_child(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(make_pdf([PdfPage([(11, "line " * 15)] * 50) for _ in range(3000)]))
    work = asyncio.create_task(parse_file(path))
    await until(lambda: bool(children()))
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert children() == set()


async def test_a_killed_child_is_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(make_pdf([PdfPage([(11, "line " * 15)] * 50) for _ in range(3000)]))
    work = asyncio.create_task(parse_file(path))
    await until(lambda: bool(children()))
    os.kill(children().pop(), 11)
    with pytest.raises(ParserCrashed, match="signal SIGSEGV"):
        await work


async def test_the_child_sees_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKS_POSTGRES_URL", "postgresql://secret")
    path = tmp_path / "a.pdf"
    path.write_bytes(make_pdf([PdfPage([(11, "line " * 15)] * 50) for _ in range(3000)]))
    work = asyncio.create_task(parse_file(path))
    # Between fork and exec the child still has the environment of its parent.
    await until(lambda: "job_runner.parse_child" in " ".join(commands()))
    assert "secret" not in str([psutil.Process(pid).environ() for pid in children()])
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


async def test_the_child_can_reach_nothing(tmp_path: Path) -> None:
    """What the filter refuses is tried in tests/integration/test_hostile_files.py."""
    path = tmp_path / "a.pdf"
    path.write_bytes(make_pdf([PdfPage([(11, "line " * 15)] * 50) for _ in range(3000)]))
    work = asyncio.create_task(parse_file(path))

    def filtered() -> bool:
        return any("\nSeccomp:\t2\n" in Path(f"/proc/{pid}/status").read_text() for pid in children())

    await until(filtered)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
