"""Documents that are uploaded: what is told of one by its name and beginning, and where they are put.

The places are :mod:`task_gateway.volumes` and :mod:`task_gateway.buckets`.
"""

import hashlib
import re
import unicodedata
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Protocol

FOLDER: Final = "uploads"
"""Of a namespace; everything there is the gateway's."""
PARTIAL: Final = ".partial-"
"""Begins the names of files that have no place yet."""
ABANDONED: Final = 3600.0
"""Seconds since a file that has no place was last written to, after which nobody does any more."""
HEAD: Final = 4096
"""Bytes from which a kind is told."""
_NAME_BYTES: Final = 200
"""Of a file's name; file systems allow 255."""


class PlaceUnavailable(Exception):
    """Documents of a namespace cannot be stored at the moment."""


class PlaceFull(Exception):
    """There is no room for the document."""


class TooLarge(Exception):
    """More bytes came than an upload may have."""


@dataclass(frozen=True, slots=True)
class Received:
    """A file that has arrived whole and has no place yet."""

    namespace: str
    partial: str
    """Its name until then."""
    size: int
    sha256: str
    head: bytes
    """The first :data:`HEAD` bytes."""


class Arriving:
    """A file on its way: its chunks, which can be gone over once, and what they have come to so far."""

    def __init__(self, chunks: AsyncIterator[bytes], *, limit: int) -> None:
        """``limit``: bytes, past which :class:`TooLarge` is raised."""
        self._chunks = chunks
        self._limit = limit
        self._digest = hashlib.sha256()
        self._size = 0
        self._head = b""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._chunks:
            self._size += len(chunk)
            if self._size > self._limit:
                raise TooLarge(f"an upload has at most {self._limit} bytes")
            if len(self._head) < HEAD:
                self._head += chunk[: HEAD - len(self._head)]
            self._digest.update(chunk)
            yield chunk

    def received(self, namespace: str, partial: str) -> Received:
        """Return it as one that has arrived, under the name that it has until it has a place."""
        return Received(namespace, partial, size=self._size, sha256=self._digest.hexdigest(), head=self._head)


@dataclass(frozen=True, slots=True)
class Stored:
    """A file in its place."""

    namespace: str
    file_path: str
    """As a task names it: below ``/data``, or ``s3://``."""
    fresh: bool
    """Whether it was not there before: an upload that is repeated finds what the first one stored."""


class DocumentStore(Protocol):
    """Where uploads are put. A file arrives under a name that nobody looks at; what stands in its place is whole, whenever a
    process dies, and what was left half is removed: by whoever began it, or an hour later."""

    def serves(self, namespace: str) -> bool:
        """Whether documents of a namespace can be put here."""

    def receive(self, chunks: AsyncIterator[bytes], *, namespace: str, limit: int) -> AbstractAsyncContextManager[Received]:
        """Write a file as it arrives; what was not placed until the end of the block is removed.

        Raises :class:`TooLarge` past ``limit`` bytes, :class:`PlaceFull`, :class:`PlaceUnavailable`, and what ``chunks``
        raises.
        """

    async def place(self, received: Received, *, kb_id: str, token: str, name: str) -> Stored:
        """Give a file its place: ``uploads/KB_ID/TOKEN/NAME``. Whoever repeats it with the same token gets the same one.

        Raises :class:`PlaceFull`, :class:`PlaceUnavailable`.
        """

    async def remove(self, stored: Stored) -> None:
        """Remove a file whose task was refused. One that is gone, or cannot be reached, is fine."""

    async def tidy(self, *, now: float | None = None) -> int:
        """Remove what processes that were killed have left half; return how many files.

        ``now``: seconds since the epoch. A file that is still being written to is younger than :data:`ABANDONED`.
        """

    async def aclose(self) -> None:
        """Close connections."""


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
