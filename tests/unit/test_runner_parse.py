"""The parser's child process: its answers, its errors, and its end in every case."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from job_runner.document import Heading, Kind, ParsedDocument
from job_runner.fetch import opened
from job_runner.parse import ParserLimits, parse
from task_contract.errors import DocumentRefused, DocumentUnreadable, ParserCrashed
from tests.support.pdf import PdfPage, make_pdf
from tests.support.runner import until

LIMITS = ParserLimits(memory_bytes=1 << 30, seconds=30, output_bytes=1 << 24)


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


async def test_a_text_beyond_the_output_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text " * 100_000)
    with pytest.raises(DocumentRefused, match="larger than 100000 bytes"):
        await parse_file(path, replace(LIMITS, output_bytes=100_000))
    assert children() == set()


async def test_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("字" * 50_000_000)
    with pytest.raises(ParserCrashed, match="memory limit of 200 MiB"):
        await parse_file(path, replace(LIMITS, memory_bytes=200 << 20))


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
