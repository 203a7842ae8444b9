"""The document volumes, as uploads are put on them: ``FOLDER/NAMESPACE`` here is ``/data`` in the pods of that namespace.

A file arrives under a name that nobody looks at, is flushed to the disk, and is renamed into its place: what stands there is
whole, whenever the process or the machine dies. What was left half is removed, by whoever began it, or an hour later.

Every folder is opened below the one before, and no link is followed: whoever writes to the volume of one namespace leads
nothing into that of another.
"""

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import time
import unicodedata
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from task_contract.names import DOCUMENT_ROOT

FOLDER: Final = "uploads"
"""Below the volume's root; everything there is the gateway's."""
HEAD: Final = 4096
"""Bytes from which a kind is told."""
_PARTIAL: Final = ".partial-"
_ABANDONED: Final = 3600.0  # seconds since a file was last written to
_BLOCK: Final = 1 << 20
"""Bytes that are written at once."""
_NAME_BYTES: Final = 200
"""Of a file's name; file systems allow 255."""
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class VolumeUnavailable(Exception):
    """The document volume of a namespace cannot be written to at the moment."""


class VolumeFull(Exception):
    """There is no room for the document."""


class TooLarge(Exception):
    """More bytes came than an upload may have."""


@dataclass(frozen=True, slots=True)
class Received:
    """A file that has arrived whole and has no place yet."""

    namespace: str
    partial: str
    size: int
    sha256: str
    head: bytes
    """The first :data:`HEAD` bytes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A file in its place."""

    namespace: str
    file_path: str
    """As a task names it: below ``/data``."""
    fresh: bool
    """Whether it was not there before: an upload that is repeated finds what the first one stored."""


def safe_name(name: str | None) -> str:
    """Return a file's name as it may stand in a path: its last part, without control characters, of bounded length.

    >>> safe_name("C:\\\\reports\\\\Quarter 1.pdf")
    'Quarter 1.pdf'
    >>> safe_name("../../etc/passwd")
    'passwd'
    """
    last = re.split(r"[/\\]", unicodedata.normalize("NFC", name or ""))[-1]
    clean = "".join(one for one in last if unicodedata.category(one)[0] != "C").strip().lstrip(".")
    path = PurePosixPath(clean or "document")
    suffix = path.suffix if len(path.suffix.encode()) <= 20 else ""
    stem = path.name.removesuffix(suffix)
    while len((stem + suffix).encode()) > _NAME_BYTES:
        stem = stem[:-1]
    return stem + suffix


class DocumentVolumes:
    """Where uploads are put."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def serves(self, namespace: str) -> bool:
        """Whether there is a volume for a namespace."""
        return (self._folder / namespace).is_dir()

    @contextlib.asynccontextmanager
    async def receive(self, chunks: AsyncIterator[bytes], *, namespace: str, limit: int) -> AsyncIterator[Received]:
        """Write a file as it arrives; what was not placed until the end of the block is removed.

        Raises :class:`TooLarge` past ``limit`` bytes, :class:`VolumeFull`, :class:`VolumeUnavailable`, and what ``chunks``
        raises.
        """
        partial = _PARTIAL + uuid.uuid4().hex
        with _explained(namespace):
            folder = await asyncio.to_thread(self._open, namespace, FOLDER)
        try:
            with _explained(namespace):
                file = await asyncio.to_thread(_create, partial, folder)
            try:
                size, digest, head = await _write(file, chunks, namespace=namespace, limit=limit)
            finally:
                os.close(file)
            yield Received(namespace=namespace, partial=partial, size=size, sha256=digest, head=head)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(partial, dir_fd=folder)  # gone already when it was placed
            os.close(folder)

    async def place(self, received: Received, *, kb_id: str, token: str, name: str) -> Stored:
        """Give a file its place: ``uploads/KB_ID/TOKEN/NAME``. Whoever repeats it with the same token gets the same one."""
        with _explained(received.namespace):
            fresh = await asyncio.to_thread(self._place, received, kb_id, token, name)
        path = f"{DOCUMENT_ROOT}/{FOLDER}/{kb_id}/{token}/{name}"
        return Stored(namespace=received.namespace, file_path=path, fresh=fresh)

    def remove(self, stored: Stored) -> None:
        """Remove a file whose task was refused, with its folder; blocks for a moment. One that is gone is fine."""
        folder, token, name = stored.file_path.removeprefix(f"{DOCUMENT_ROOT}/").rsplit("/", 2)
        with contextlib.suppress(OSError):
            above = self._open(stored.namespace, *folder.split("/"))
            try:
                below = os.open(token, _DIRECTORY, dir_fd=above)
                try:
                    os.unlink(name, dir_fd=below)
                finally:
                    os.close(below)
                os.rmdir(token, dir_fd=above)
            finally:
                os.close(above)

    def tidy(self, *, now: float | None = None) -> int:
        """Remove what processes that were killed have left half; blocks. Returns how many files.

        ``now``: seconds since the epoch. A file that is still being written to is younger than an hour.
        """
        before = (time.time() if now is None else now) - _ABANDONED
        removed = 0
        for namespace in sorted(self._folder.iterdir()) if self._folder.is_dir() else []:
            with contextlib.suppress(OSError):
                folder = os.open(namespace / FOLDER, _DIRECTORY)
                try:
                    for name in os.listdir(folder):  # noqa: PTH208 - of an open folder
                        if (
                            name.startswith(_PARTIAL)
                            and os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime < before
                        ):
                            os.unlink(name, dir_fd=folder)
                            removed += 1
                finally:
                    os.close(folder)
        return removed

    def _open(self, namespace: str, *parts: str) -> int:
        """Open a folder below the volume of a namespace, making the parts that are not there."""
        current = os.open(self._folder / namespace, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # a mount, not a user's
        for part in parts:
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=current)
                following = os.open(part, _DIRECTORY, dir_fd=current)
            finally:
                os.close(current)
            current = following
        return current

    def _place(self, received: Received, kb_id: str, token: str, name: str) -> bool:
        above = self._open(received.namespace, FOLDER)
        try:
            place = self._open(received.namespace, FOLDER, kb_id, token)
            try:
                fresh = name not in os.listdir(place)  # noqa: PTH208 - of an open folder
                os.rename(received.partial, name, src_dir_fd=above, dst_dir_fd=place)
                os.fsync(place)
                return fresh
            finally:
                os.close(place)
        finally:
            os.close(above)


def _create(name: str, folder: int) -> int:
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder)


async def _write(file: int, chunks: AsyncIterator[bytes], *, namespace: str, limit: int) -> tuple[int, str, bytes]:
    """Write all that comes and flush it to the disk; return size, SHA-256 and beginning."""
    digest, size, head = hashlib.sha256(), 0, b""
    block = bytearray()

    def flush(data: bytes) -> None:
        digest.update(data)
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]

    async def write() -> None:
        with _explained(namespace):
            await asyncio.to_thread(flush, bytes(block))
        block.clear()

    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise TooLarge(f"an upload has at most {limit} bytes")
        if len(head) < HEAD:
            head += chunk[: HEAD - len(head)]
        block += chunk
        if len(block) >= _BLOCK:
            await write()
    await write()
    with _explained(namespace):
        await asyncio.to_thread(os.fsync, file)
    return size, digest.hexdigest(), head


@contextlib.contextmanager
def _explained(namespace: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise VolumeFull(f"cannot store the document: the volume of namespace {namespace} is full") from error
        raise VolumeUnavailable(
            f"cannot store the document: the volume of namespace {namespace} cannot be written to ({error.strerror}); "
            "is it mounted in the gateway, below GATEWAY_DOCUMENTS?"
        ) from error


# ------------------------------------------------------------------------------------------------------------- content

_ZIP: Final = b"PK\x03\x04"
_COMPOUND: Final = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_PICTURES: Final = {
    ".png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    ".jpg": re.compile(rb"\xff\xd8\xff"),
    ".tif": re.compile(rb"II[*+]\0|MM\0[*+]"),
    ".webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    ".bmp": re.compile(rb"BM"),
}
_PICTURES_TOO: Final = {".jpeg": ".jpg", ".tiff": ".tif"}
_ARCHIVES: Final = frozenset({".docx", ".docm", ".pptx", ".pptm", ".xlsx", ".xlsm", ".ods", ".epub"})
_TYPES: Final = {
    "application/pdf": ".pdf",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": ".docx",
    "application/vnd.openxmlformats-officedocument.presentationml.presentation": ".pptx",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": ".xlsx",
    "application/vnd.oasis.opendocument.spreadsheet": ".ods",
    "application/epub+zip": ".epub",
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/tiff": ".tif",
    "image/webp": ".webp",
    "image/bmp": ".bmp",
}
_FOREIGN: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\x7fELF", "a Linux program"),
    (b"MZ", "a Windows program"),
    (b"GIF8", "a GIF image"),
    (b"\x1f\x8b", "a gzip file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"{\\rtf", "an RTF document"),
    (b"%!PS", "a PostScript file"),
)


def wrong_content(head: bytes, *, name: str, declared: str) -> str | None:
    """Return what is wrong with a file by its beginning, its name and the type that it was sent as; None: nothing.

    What only the whole file shows, such as which Office format a ZIP archive is, the runner says when it reads it.
    """
    if not head:
        return "the file is empty"
    suffix = PurePosixPath(name).suffix.lower()
    for claimed, by in (
        (suffix, f"its name ends with {suffix}"),
        (_TYPES.get(declared, ""), f"it was sent as {declared}"),
    ):
        if claimed and (said := _contradicts(head, claimed)) is not None:
            return f"{by}, but {said}"
    if any((_is_pdf(head), head.startswith((_ZIP, _COMPOUND)), *(form.match(head) for form in _PICTURES.values()))):
        return None
    for signature, what in _FOREIGN:
        if head.startswith(signature) and (len(signature) > 3 or b"\0" in head):
            return f"it is {what}, which is not read"
    if b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it is binary data of an unknown kind"
    return None


def _contradicts(head: bytes, suffix: str) -> str | None:
    """Return in what way a file is not of the kind that something names; None: it may be, or the kind has no signature."""
    suffix = _PICTURES_TOO.get(suffix, suffix)
    if suffix == ".pdf" and not _is_pdf(head):
        return "it has no PDF header"
    if suffix in _ARCHIVES and not head.startswith((_ZIP, _COMPOUND)):  # one with a password is a compound file
        return "it is no ZIP archive, which such a file is"
    if suffix in _PICTURES and _PICTURES[suffix].match(head) is None and not any(f.match(head) for f in _PICTURES.values()):
        return "it is no picture"
    return None


def _is_pdf(head: bytes) -> bool:
    return b"%PDF-" in head[:1024]
