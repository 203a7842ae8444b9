"""Only documents below the root are opened, and only of the kinds that are read."""

import hashlib
import os
from pathlib import Path

import pytest

from job_runner.fetch import opened
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
    ("data", "error", "message"),
    [
        pytest.param(b"\x7fELF\x02\x01\0", DocumentRefused, "a Linux program", id="refused"),
        pytest.param(b"PK\x03\x04 and no more", DocumentUnreadable, "damaged or cut short", id="unreadable"),
    ],
)
def test_kinds_that_are_not_read_are_errors_of_the_contract(
    tmp_path: Path, data: bytes, error: type[TaskError], message: str
) -> None:
    (tmp_path / "a.docx").write_bytes(data)
    with pytest.raises(error, match=message), opened("a.docx", root=tmp_path, max_bytes=1 << 20):
        pass
