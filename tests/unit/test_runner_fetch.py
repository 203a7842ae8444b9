"""Only documents below the root are opened, and only of the kinds that are read."""

import hashlib
import os
from pathlib import Path

import pytest

from job_runner.document import Kind
from job_runner.fetch import kind_of, opened
from task_contract.errors import (
    DocumentEmpty,
    DocumentNotFound,
    DocumentRefused,
    DocumentUnreadable,
    StoreUnavailable,
    TaskError,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "folder").mkdir(parents=True)
    (root / "a.txt").write_text("hello")
    (root / "folder/b.md").write_text("# b")
    (root / "empty.txt").touch()
    (root / "large.txt").write_text("x" * 101)
    (tmp_path / "secret.txt").write_text("secret")
    (root / "inside").symlink_to("folder/b.md")
    (root / "outside").symlink_to(tmp_path / "secret.txt")
    (root / "outside-folder").symlink_to(tmp_path)
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("gone")
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("a.txt", b"hello"),
        ("folder/b.md", b"# b"),
        ("./folder//b.md", b"# b"),
        ("/data/a.txt", b"hello"),
        ("{root}/a.txt", b"hello"),
        ("inside", b"# b"),
    ],
)
def test_documents_below_the_root_are_opened(root: Path, path: str, content: bytes) -> None:
    with opened(path.format(root=root), root=root, max_bytes=100) as source:
        assert os.read(source.descriptor, 100) in {content, b""}
        assert source.sha256 == hashlib.sha256(content).hexdigest()
        assert source.size == len(content)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(source.descriptor)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("missing.txt", DocumentNotFound, "cannot find missing.txt"),
        ("a.txt/b", DocumentNotFound, "cannot find"),
        ("dangling", DocumentNotFound, "cannot find"),
        ("../secret.txt", DocumentRefused, "not below the document volume"),
        ("folder/../../secret.txt", DocumentRefused, "not below the document volume"),
        ("/etc/passwd", DocumentRefused, "not below the document volume"),
        ("/data/../etc/passwd", DocumentRefused, "not below the document volume"),
        ("outside", DocumentRefused, "not below the document volume"),
        ("outside-folder/secret.txt", DocumentRefused, "not below the document volume"),
        ("folder", DocumentRefused, "not a regular file"),
        ("pipe", DocumentRefused, "not a regular file"),
        ("a\0.txt", DocumentRefused, "NUL"),
        ("loop", DocumentRefused, "cannot open loop"),
        ("x" * 300, DocumentRefused, "cannot open"),
        ("empty.txt", DocumentEmpty, "0 bytes"),
        ("large.txt", DocumentRefused, "101 bytes and the limit is 100"),
    ],
)
def test_everything_else_is_refused(root: Path, path: str, error: type[TaskError], message: str) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(error, match=message), opened(path, root=root, max_bytes=100):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "a descriptor was left open"


def test_a_volume_that_is_not_mounted_is_not_the_tasks_fault(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="not mounted"), opened("a", root=tmp_path / "none", max_bytes=1):
        pass


@pytest.mark.parametrize(
    ("name", "head", "kind"),
    [
        ("a.pdf", b"%PDF-1.7 ...", Kind.PDF),
        ("a.txt", b"\0\0junk from a mail\n%PDF-1.4 ...", Kind.PDF),
        ("a.pdf", b"just text, whatever the name says", Kind.TEXT),
        ("a.md", b"plain", Kind.MARKDOWN),
        ("README", b"# Title\n\ntext", Kind.MARKDOWN),
        ("a.txt", b"# Title\n\ntext", Kind.TEXT),
        ("a", b"text", Kind.TEXT),
        ("a", b"MZ is how this text starts", Kind.TEXT),
        ("a", "知识库".encode("gb18030"), Kind.TEXT),
        ("a", "知识库".encode("utf-16"), Kind.TEXT),
        ("a.txt", b"PK\x03\x04..[Content_Types].xml..word/document.xml\0", Kind.DOCX),
        ("a.zip", b"PK\x03\x04..anything, the reader will tell\0", Kind.DOCX),
        ("a.txt", b"\xef\xbb\xbf \n<!DOCTYPE HTML PUBLIC>", Kind.HTML),
        ("a.md", b"<HTML lang=en>", Kind.HTML),
        ("a", b"<?xml version='1.0'?>\n<!-- saved --><!-- twice -->\n<!DOCTYPE html>", Kind.HTML),
        ("a", "<html><body>页</body></html>".encode("utf-16"), Kind.HTML),
        ("a.htm", b"<p>A piece of a page", Kind.HTML),
        ("a.md", b"<p align=center>A README", Kind.MARKDOWN),
        ("a.html", b"no tags at all", Kind.TEXT),
        ("a.txt", b"<!--" * 500 + b"-->" * 500, Kind.TEXT),
    ],
)
def test_the_kind_is_told_by_content(name: str, head: bytes, kind: Kind) -> None:
    assert kind_of(head, name=name) is kind


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"PK\x03\x04..mimetypeapplication/epub+zip", "an EPUB book"),
        (b"PK\x05\x06" + bytes(18), "an empty ZIP archive"),
        (b"\x89PNG\r\n\x1a\n\0", "a PNG image"),
        (b"\xff\xd8\xff\xe0\0", "a JPEG image"),
        (b"\x7fELF\x02\x01\0", "a Linux program"),
        (b"\x1f\x8b\x08\0", "a gzip file"),
        (b"{\\rtf1\\ansi", "an RTF document"),
        (b"\x00\x01\x02\x03", "binary data"),
    ],
)
def test_other_kinds_are_refused_by_their_name(head: bytes, what: str) -> None:
    with pytest.raises(
        DocumentRefused, match=f"cannot read x.txt: it is {what}.*this version reads PDF, DOCX, HTML, Markdown and text"
    ):
        kind_of(head, name="x.txt")


def compound(*streams: str) -> bytes:
    """A compound file (OLE) whose directory lies far behind its header: sectors of 512 bytes, the directory in the 300th."""
    header = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(22) + (9).to_bytes(2, "little") + bytes(16)
    header += (299).to_bytes(4, "little")
    directory = b"".join(stream.encode("utf-16-le").ljust(128, b"\0") for stream in ("Root Entry", *streams))
    return (header.ljust(512, b"\0") + b"\x01" * 299 * 512 + directory).ljust(400 * 512, b"\0")


@pytest.mark.parametrize(
    ("streams", "error", "message"),
    [
        pytest.param(
            ["EncryptionInfo", "EncryptedPackage"], DocumentUnreadable, "password; store it without", id="encrypted"
        ),
        pytest.param(["WordDocument"], DocumentRefused, "an old Word document.*save it as DOCX", id="doc"),
        pytest.param(["Workbook"], DocumentRefused, "an old Excel workbook", id="xls"),
        pytest.param(["__substg1.0_0037001F"], DocumentRefused, "an Outlook message", id="msg"),
        pytest.param(["Else"], DocumentRefused, "an old Microsoft Office file.*save it as DOCX or PDF", id="another"),
    ],
)
def test_compound_files_say_what_they_are(tmp_path: Path, streams: list[str], error: type[Exception], message: str) -> None:
    (tmp_path / "a.docx").write_bytes(compound(*streams))
    with pytest.raises(error, match=message), opened("a.docx", root=tmp_path, max_bytes=1 << 20):
        pass


def test_a_pdf_without_its_start_is_damaged() -> None:
    with pytest.raises(DocumentUnreadable, match="no PDF header"):
        kind_of(b"\x00\x01garbage", name="x.pdf")
