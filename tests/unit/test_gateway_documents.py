"""Uploads on the document volume: whole or not there, in their place and nobody else's, and of the kind that they claim."""

import asyncio
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from task_contract.models import Payload
from task_gateway.documents import (
    Arriving,
    PlaceFull,
    PlaceUnavailable,
    Received,
    Stored,
    TooLarge,
    safe_name,
    wrong_content,
)
from task_gateway.volumes import DocumentVolumes, _write
from tests.support.uploading import files, parts

PDF = b"%PDF-1.7\n..."


@pytest.fixture
def volumes(tmp_path: Path) -> DocumentVolumes:
    (tmp_path / "knowledge").mkdir()
    (tmp_path / "other").mkdir()
    return DocumentVolumes(tmp_path)


async def put(
    volumes: DocumentVolumes, data: bytes, *, token: str = "t1", name: str = "handbook.pdf"
) -> tuple[Received, Stored]:
    async with volumes.receive(parts(data), namespace="knowledge", limit=1 << 20) as received:
        return received, await volumes.place(received, kb_id="kb-42", token=token, name=name)


async def test_a_document_stands_where_its_task_says(volumes: DocumentVolumes, tmp_path: Path) -> None:
    received, stored = await put(volumes, PDF)
    assert stored == Stored(namespace="knowledge", file_path="/data/uploads/kb-42/t1/handbook.pdf", fresh=True)
    file = tmp_path / "knowledge/uploads/kb-42/t1/handbook.pdf"
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == (PDF, 0o644)
    assert (received.size, received.sha256, received.head) == (len(PDF), hashlib.sha256(PDF).hexdigest(), PDF)
    assert files(tmp_path) == ["knowledge/uploads/kb-42/t1/handbook.pdf"]


async def test_an_upload_that_is_repeated_takes_the_same_place(volumes: DocumentVolumes, tmp_path: Path) -> None:
    await put(volumes, PDF)
    _, again = await put(volumes, PDF)
    assert not again.fresh
    assert len(files(tmp_path)) == 1


async def test_a_large_document_is_written_in_blocks(volumes: DocumentVolumes, tmp_path: Path) -> None:
    data = os.urandom(3_500_000)
    pieces = [data[at : at + 65_537] for at in range(0, len(data), 65_537)]
    async with volumes.receive(parts(*pieces), namespace="knowledge", limit=len(data)) as received:
        stored = await volumes.place(received, kb_id="kb-42", token="t1", name="a.pdf")
    assert (tmp_path / "knowledge" / stored.file_path.removeprefix("/data/")).read_bytes() == data
    assert received.sha256 == hashlib.sha256(data).hexdigest()
    assert len(received.head) == 4096


@pytest.mark.parametrize(
    ("data", "then", "error"),
    [
        ([b"x" * 600, b"y" * 600], None, TooLarge),
        ([b"x" * 600], ConnectionResetError("cut"), ConnectionResetError),
        ([], asyncio.CancelledError(), asyncio.CancelledError),
    ],
)
async def test_what_does_not_arrive_whole_leaves_nothing(
    volumes: DocumentVolumes, tmp_path: Path, data: list[bytes], then: Exception | None, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        async with volumes.receive(parts(*data, then=then), namespace="knowledge", limit=1000):
            pytest.fail("it has not arrived")
    assert files(tmp_path) == []


async def test_what_is_refused_after_it_arrived_leaves_nothing(volumes: DocumentVolumes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"):
        async with volumes.receive(parts(PDF), namespace="knowledge", limit=1000):
            raise ValueError("refused")
    assert files(tmp_path) == []


async def test_a_document_whose_task_was_refused_is_removed_alone(volumes: DocumentVolumes, tmp_path: Path) -> None:
    await put(volumes, PDF)
    _, refused = await put(volumes, PDF, token="t2")
    await volumes.remove(refused)
    await volumes.remove(refused)
    assert files(tmp_path) == ["knowledge/uploads/kb-42/t1/handbook.pdf"]
    assert not (tmp_path / "knowledge/uploads/kb-42/t2").exists()


async def test_what_killed_processes_left_is_removed_an_hour_later(volumes: DocumentVolumes, tmp_path: Path) -> None:
    await put(volumes, PDF)
    left = tmp_path / "knowledge/uploads/.partial-0123"
    left.write_bytes(b"half")
    assert await volumes.tidy() == 0
    assert await volumes.tidy(now=left.stat().st_mtime + 3601) == 1
    assert files(tmp_path) == ["knowledge/uploads/kb-42/t1/handbook.pdf"]


@pytest.mark.parametrize("link", ["knowledge/uploads", "knowledge/uploads/kb-42", "knowledge/uploads/kb-42/t1"])
async def test_no_link_leads_into_another_volume(volumes: DocumentVolumes, tmp_path: Path, link: str) -> None:
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "other")
    with pytest.raises(PlaceUnavailable):
        await put(volumes, PDF)
    assert files(tmp_path / "other") == []


async def test_a_file_that_is_a_link_is_replaced_and_not_followed(volumes: DocumentVolumes, tmp_path: Path) -> None:
    folder = tmp_path / "knowledge/uploads/kb-42/t1"
    folder.mkdir(parents=True)
    victim = tmp_path / "other/victim"
    victim.write_bytes(b"theirs")
    (folder / "handbook.pdf").symlink_to(victim)
    await put(volumes, PDF)
    assert victim.read_bytes() == b"theirs"
    assert (folder / "handbook.pdf").read_bytes() == PDF


async def test_a_volume_that_is_not_mounted_is_said_to_be_so(volumes: DocumentVolumes) -> None:
    assert volumes.serves("knowledge")
    assert not volumes.serves("missing")
    with pytest.raises(PlaceUnavailable, match="is it mounted in the gateway"):
        async with volumes.receive(parts(PDF), namespace="missing", limit=10):
            pytest.fail("there is no volume")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is full")
async def test_a_full_volume_is_said_to_be_full() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(PlaceFull, match="volume of namespace knowledge is full"):
            await _write(full, Arriving(parts(PDF), limit=100), namespace="knowledge")
    finally:
        os.close(full)


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        ("handbook.pdf", "handbook.pdf"),
        ("/etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("操作手册.md", "操作手册.md"),
        ("..", "document"),
        (".hidden.txt", "hidden.txt"),
        ("a\x00b\nc.txt", "abc.txt"),
        ("", "document"),
        (None, "document"),
        ("u\u0308ber.txt", "\u00fcber.txt"),
        ("x" * 400 + ".pdf", "x" * 196 + ".pdf"),
        ("手" * 100 + ".docx", "手" * 65 + ".docx"),
    ],
)
def test_names_are_made_safe(given_name: str | None, name: str) -> None:
    assert safe_name(given_name) == name


@given(st.text())
def test_every_name_fits_a_path_of_a_task(name: str) -> None:
    safe = safe_name(name)
    assert safe not in {"", ".", ".."}
    assert len(safe.encode()) <= 200
    path = f"/data/uploads/kb-42/t1/{safe}"
    assert Payload(file_path=path).file_path == path
    assert os.path.basename(path) == safe  # noqa: PTH119 - as the system sees it


PNG, ZIP, OLD = b"\x89PNG\r\n\x1a\n" + b"\0" * 9, b"PK\x03\x04" + b"\0" * 9, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0"


@pytest.mark.parametrize(
    ("head", "name", "declared", "wrong"),
    [
        (PDF, "a.pdf", "application/pdf", None),
        (b"junk of a printer " + PDF, "a.pdf", "", None),
        (ZIP, "a.docx", "application/vnd.openxmlformats-officedocument.wordprocessingml.document", None),
        (OLD, "a.xls", "application/vnd.ms-excel", None),
        (OLD, "with-a-password.docx", "", None),  # the runner says that it is encrypted
        (PNG, "scan.jpg", "image/png", None),  # a picture under the wrong name is read all the same
        (b"\xff\xd8\xff\xe0", "scan.jpeg", "image/jpeg", None),
        (b"# Title\n", "a.md", "text/markdown", None),
        (b"MZ is no program here", "a.txt", "text/plain", None),
        ("\ufeff标题".encode("utf-16"), "a.txt", "", None),
        (b"a,b\n1,2\n", "no-suffix", "application/octet-stream", None),
        (b"", "a.txt", "", "the file is empty"),
        (b"<html>", "a.pdf", "", "its name ends with .pdf, but it has no PDF header"),
        (b"plain", "a", "application/pdf", "it was sent as application/pdf, but it has no PDF header"),
        (PDF, "a.docx", "", "its name ends with .docx, but it is no ZIP archive, which such a file is"),
        (b"plain", "a.png", "", "its name ends with .png, but it is no picture"),
        (b"\x7fELF\x02\0", "a.txt", "", "it is a Linux program, which is not read"),
        (b"MZ\x90\0", "setup", "", "it is a Windows program, which is not read"),
        (b"\x00\x01\x02", "a.bin", "", "it is binary data of an unknown kind"),
    ],
)
def test_a_file_is_what_it_says(head: bytes, name: str, declared: str, wrong: str | None) -> None:
    assert wrong_content(head, name=name, declared=declared) == wrong
