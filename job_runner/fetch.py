"""Opening a document: only below the document root, only regular files of bounded size, and of a kind told by content.

The file is opened once and stays open: what was checked and hashed is what the parser reads, whatever happens to the path
meanwhile.
"""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from job_runner.document import Kind
from task_contract.errors import (
    DocumentChanged,
    DocumentEmpty,
    DocumentNotFound,
    DocumentRefused,
    DocumentUnreadable,
    StoreUnavailable,
)
from task_contract.names import DOCUMENT_ROOT

_HEAD: Final = 64 * 1024
"""Bytes from which the kind of a file is told."""
_DIRECTORY: Final = 4096
"""Bytes of the directory of a compound file that are looked at, wherever it lies: 32 entries."""
_MARKDOWN_SUFFIXES: Final = frozenset({".md", ".markdown", ".mdown", ".mkd", ".mdx"})
_HTML_SUFFIXES: Final = frozenset({".html", ".htm", ".xhtml"})
_HTML_START: Final = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?>(?:<!--.*?-->\s*)*)<(?:!doctype\s+html|html|head|body)\b",
    re.IGNORECASE | re.DOTALL,
)
_TAG: Final = re.compile(rb"<[a-z][a-z0-9]*[\s/>]", re.IGNORECASE)
_MARKDOWN_HEADING: Final = re.compile(rb"^#{1,6} \S", re.MULTILINE)

_SIGNATURES: Final[tuple[tuple[bytes, str], ...]] = (
    (b"PK\x05\x06", "an empty ZIP archive"),
    (b"{\\rtf", "an RTF document"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x7fELF", "a Linux program"),
    (b"MZ", "a Windows program"),
    (b"%!PS", "a PostScript file"),
    (b"SQLite format 3\x00", "an SQLite database"),
)
# The first member of these archives is stored uncompressed and says what they are.
_FIRST_MEMBERS: Final = (
    (b"mimetypeapplication/epub+zip", "an EPUB book"),
    (b"mimetypeapplication/vnd.oasis.opendocument", "an OpenDocument file"),
)
_COMPOUND: Final = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_STREAMS: Final = (
    ("WordDocument", ("an old Word document (DOC)", "save it as DOCX")),
    ("Workbook", ("an old Excel workbook (XLS)", "save it as PDF")),
    ("PowerPoint Document", ("an old PowerPoint file (PPT)", "save it as PDF")),
    ("__substg1.0_", ("an Outlook message (MSG)", "save it as HTML or text")),
)
_SUPPORTED: Final = "this version reads PDF, DOCX, HTML, Markdown and text"


@dataclass(frozen=True, slots=True)
class Source:
    """A document that was opened, checked and hashed."""

    name: str
    """What messages call it: the path or URL of the task."""
    descriptor: int
    """Open for reading; closed by :func:`inspected`."""
    size: int
    sha256: str
    kind: Kind
    modified_ns: int

    def check_unchanged(self) -> None:
        """Raise DocumentChanged if the file was written to since it was hashed: text and hash would not belong together."""
        state = os.fstat(self.descriptor)
        if (state.st_size, state.st_mtime_ns) != (self.size, self.modified_ns):
            raise DocumentChanged(
                f"cannot index {self.name}: the file was written to while it was read; replace files by renaming"
            )


@contextmanager
def opened(file_path: str, *, root: Path, max_bytes: int) -> Iterator[Source]:
    """Open the document of a task, below ``root``; blocking, run it in a thread.

    ``file_path`` is relative to ``root``, or absolute below ``root`` or below ``/data``, where pods have the volume.

    Raises DocumentNotFound, DocumentRefused, DocumentUnreadable, DocumentEmpty, and StoreUnavailable when the volume itself
    is missing or fails.
    """
    with inspected(_open(file_path, root=root), name=file_path, max_bytes=max_bytes) as source:
        yield source


@contextmanager
def inspected(descriptor: int, *, name: str, max_bytes: int) -> Iterator[Source]:
    """Check and hash an open file, wherever it came from, and close it at the end; blocking, run it in a thread.

    Raises DocumentRefused, DocumentUnreadable, DocumentEmpty, and StoreUnavailable when it cannot be read.
    """
    try:
        yield _inspect(descriptor, name=name, max_bytes=max_bytes)
    finally:
        os.close(descriptor)


def _open(file_path: str, *, root: Path) -> int:
    """Open the file without ever leaving ``root``.

    Links are resolved first, then every part of what came out is opened below the part before without following links: a
    link that somebody puts in the way between the two steps makes it fail instead of leading out.
    """
    if "\0" in file_path:
        raise DocumentRefused(f"cannot open {file_path!r}: a path has no NUL characters; correct payload.filePath")
    if not root.is_dir():
        raise StoreUnavailable(
            f"cannot open {file_path}: the document volume is not mounted at {root}; mount it, or set TASKS_DOCUMENT_ROOT"
        )
    real_root = Path(os.path.realpath(root))
    try:
        real = Path(os.path.realpath(real_root / _below(file_path, root=root), strict=True))
        parts = real.relative_to(real_root).parts
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DocumentNotFound(
            f"cannot find {file_path} below {root}; put the file there or correct payload.filePath"
        ) from error
    except ValueError as error:
        raise _outside(file_path, root) from error
    except OSError as error:
        raise _failed(file_path, error) from error
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    current = os.open(real_root, flags | os.O_DIRECTORY)
    try:
        for depth, part in enumerate(parts, start=1):
            # O_NONBLOCK: opening a named pipe must not wait for a writer.
            kind = os.O_NONBLOCK if depth == len(parts) else os.O_DIRECTORY
            following = os.open(part, flags | kind, dir_fd=current)
            os.close(current)
            current = following
    except OSError as error:
        os.close(current)
        raise _failed(file_path, error) from error
    return current


def _below(file_path: str, *, root: Path) -> PurePosixPath:
    """Return the path relative to the root; the parts ``..`` are refused, not resolved."""
    path = PurePosixPath(file_path)
    if ".." in path.parts:
        raise _outside(file_path, root)
    if not path.is_absolute():
        return path
    for known in (PurePosixPath(root), PurePosixPath(os.path.realpath(root)), PurePosixPath(DOCUMENT_ROOT)):
        if path.is_relative_to(known):
            return path.relative_to(known)
    raise _outside(file_path, root)


def _outside(file_path: str, root: Path) -> DocumentRefused:
    return DocumentRefused(f"cannot open {file_path}: it is not below the document volume ({root}); put the file there")


def _failed(file_path: str, error: OSError) -> DocumentRefused | DocumentNotFound | StoreUnavailable:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return DocumentNotFound(
                f"cannot find {file_path}: it was removed; put the file there or correct payload.filePath"
            )
        case errno.EACCES | errno.EPERM:
            return DocumentRefused(f"cannot open {file_path}: no permission; make it readable for user {os.getuid()}")
        case errno.ELOOP | errno.ENXIO | errno.ENAMETOOLONG:
            return DocumentRefused(f"cannot open {file_path}: {error.strerror}; give the path of a regular file")
        case _:  # the volume, not the document: a stale NFS handle, an I/O error
            return StoreUnavailable(f"cannot read {file_path} from the document volume: {error.strerror}; check the volume")


def _inspect(descriptor: int, *, name: str, max_bytes: int) -> Source:
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode):
        raise DocumentRefused(f"cannot read {name}: it is not a regular file; give the path of a file")
    if state.st_size > max_bytes:
        message = (
            f"cannot read {name}: it has {state.st_size} bytes and the limit is {max_bytes}; "
            "split it, or raise TASKS_MAX_DOCUMENT_BYTES"
        )
        raise DocumentRefused(message)
    if state.st_size == 0:
        raise DocumentEmpty(f"cannot index {name}: the file has 0 bytes")
    try:
        head = os.pread(descriptor, _HEAD, 0)
        if head.startswith(_COMPOUND):
            head += os.pread(descriptor, _DIRECTORY, _directory_of(head))
        kind = kind_of(head, name=name)
        with open(descriptor, "rb", closefd=False) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _failed(name, error) from error
    return Source(
        name=name, descriptor=descriptor, size=state.st_size, sha256=sha256, kind=kind, modified_ns=state.st_mtime_ns
    )


def kind_of(head: bytes, *, name: str) -> Kind:
    """Tell the kind of a file from its first bytes; the name only decides between Markdown, text and a piece of HTML.

    Whether a ZIP archive is a DOCX stands in its members: who reads it looks there.

    Raises DocumentRefused, naming what it is instead, and DocumentUnreadable for a PDF that has lost its start and for an
    Office file with a password.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if b"%PDF-" in head[:1024]:  # readers accept some bytes of a mail or a printer before it
        return Kind.PDF
    if head.startswith(b"PK\x03\x04"):
        if described := next((what for mark, what in _FIRST_MEMBERS if mark in head[:128]), None):
            raise DocumentRefused(f"cannot read {name}: it is {described}; {_SUPPORTED}")
        return Kind.DOCX
    if head.startswith(_COMPOUND):
        raise _compound(head, name=name)
    for signature, description in _SIGNATURES:
        if head.startswith(signature) and (len(signature) > 3 or b"\0" in head):
            raise DocumentRefused(f"cannot read {name}: it is {description}; {_SUPPORTED}")
    if head[4:12] in {b"ftypmp42", b"ftypisom"} or (head.startswith((b"RIFF", b"OggS", b"ID3")) and b"\0" in head):
        raise DocumentRefused(f"cannot read {name}: it is audio or video; {_SUPPORTED}")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # the only way for text to have bytes of value 0
        head = head[:4096].decode("utf-16", errors="ignore").encode()
    elif b"\0" in head:
        if suffix == ".pdf":
            raise DocumentUnreadable(f"cannot read {name}: it has no PDF header; it is damaged, export it again")
        raise DocumentRefused(f"cannot read {name}: it is binary data of an unknown kind; {_SUPPORTED}")
    if _HTML_START.match(head[:4096]) or (suffix in _HTML_SUFFIXES and _TAG.search(head)):
        return Kind.HTML
    if suffix in _MARKDOWN_SUFFIXES:
        return Kind.MARKDOWN
    if suffix in {".txt", ".text", ".log"}:
        return Kind.TEXT
    return Kind.MARKDOWN if _MARKDOWN_HEADING.search(head) else Kind.TEXT


def _compound(head: bytes, *, name: str) -> DocumentRefused | DocumentUnreadable:
    """Return the error for a compound file (OLE, [MS-CFB]), by the names of the streams in it."""
    if "EncryptedPackage".encode("utf-16-le") in head:
        return DocumentUnreadable(f"cannot read {name}: the Office file is encrypted with a password; store it without one")
    found = (what for stream, what in _STREAMS if stream.encode("utf-16-le") in head)
    what, remedy = next(found, ("an old Microsoft Office file", "save it as DOCX or PDF"))
    return DocumentRefused(f"cannot read {name}: it is {what}; {_SUPPORTED}: {remedy}")


def _directory_of(head: bytes) -> int:
    """Return the offset of the first directory sector of a compound file; [MS-CFB] 2.2 has the header."""
    exponent, sector = int.from_bytes(head[0x1E:0x20], "little"), int.from_bytes(head[0x30:0x34], "little")
    return (sector + 1) << exponent if exponent in {9, 12} else 0
