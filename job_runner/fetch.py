"""Opening a document: only below the document root, only regular files of bounded size, and of a kind told by content.

The file is opened once and stays open: what was checked and hashed is what the parser reads, whatever happens to the path
meanwhile.
"""

import asyncio
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, TypeVar

from job_runner.document import Kind
from job_runner.kinds import kind_of
from job_runner.readers.failure import ReadingFailed
from job_runner.watchdog import beat
from task_contract.errors import (
    DocumentChanged,
    DocumentEmpty,
    DocumentNotFound,
    DocumentRefused,
    DocumentUnreadable,
    StoreUnavailable,
    TaskError,
)
from task_contract.location import is_url
from task_contract.names import DOCUMENT_ROOT

if TYPE_CHECKING:
    from job_runner.settings import Settings

_FAILURES: Final[Mapping[str, type[TaskError]]] = {error.reason: error for error in (DocumentRefused, DocumentUnreadable)}
_HASH_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Opened:
    """A file that was opened, checked and hashed."""

    name: str
    """What messages call it: the path or URL of the task."""
    descriptor: int
    """Open for reading; closed by the context that gave it."""
    size: int
    sha256: str
    modified_ns: int

    def check_unchanged(self) -> None:
        """Raise DocumentChanged if the file was written to since it was hashed: text and hash would not belong together."""
        state = os.fstat(self.descriptor)
        if (state.st_size, state.st_mtime_ns) != (self.size, self.modified_ns):
            raise DocumentChanged(
                f"cannot index {self.name}: the file was written to while it was read; replace files by renaming"
            )


@dataclass(frozen=True, slots=True)
class Source(Opened):
    """A document: its kind is known too."""

    kind: Kind


F = TypeVar("F", bound=Opened)


@contextmanager
def opened(file_path: str, *, root: Path, max_bytes: int) -> Iterator[Source]:
    """Open the document of a task, below ``root``; blocking, run it in a thread.

    ``file_path`` is relative to ``root``, or absolute below ``root`` or below ``/data``, where pods have the volume.

    Raises DocumentNotFound, DocumentRefused, DocumentUnreadable, DocumentEmpty, and StoreUnavailable when the volume itself
    is missing or fails.
    """
    with inspected(open_below(file_path, root=root), name=file_path, max_bytes=max_bytes) as source:
        yield source


def files_below(prefix: str, *, root: Path) -> Iterator[str]:
    """Go over the files of a folder below ``root``, by their paths from there, in no order; blocking, run it in a thread.

    Links to folders are not followed, and what begins with a dot is not looked at: uploads that are under way have such
    names. Raises DocumentNotFound, DocumentRefused, and StoreUnavailable as :func:`opened` does.
    """
    folder = open_below(prefix, root=root)
    try:
        if not stat.S_ISDIR(os.fstat(folder).st_mode):
            raise DocumentRefused(
                f"cannot list {prefix}: it is not a folder; correct payload.prefix, or name it in filePaths"
            )

        def failed(error: OSError) -> None:
            raise _failed(prefix, error) from error

        for path, folders, files, _ in os.fwalk(".", onerror=failed, dir_fd=folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            beat()
            for name in files:
                if not name.startswith("."):
                    yield str(PurePosixPath(path) / name)
    finally:
        os.close(folder)


@contextmanager
def inspected(descriptor: int, *, name: str, max_bytes: int) -> Iterator[Source]:
    """Check and hash an open document, wherever it came from, and close it at the end; blocking, run it in a thread.

    Raises DocumentRefused, DocumentUnreadable, DocumentEmpty, and StoreUnavailable when it cannot be read.
    """
    with hashed(descriptor, name=name, max_bytes=max_bytes) as found:
        try:
            with open(descriptor, "rb", closefd=False) as file:
                kind = kind_of(file, name=name)
        except ReadingFailed as failure:
            raise _FAILURES[failure.reason](failure.message) from failure
        except OSError as error:
            raise _failed(name, error) from error
        yield Source(name, descriptor, found.size, found.sha256, found.modified_ns, kind)


@contextmanager
def hashed(descriptor: int, *, name: str, max_bytes: int) -> Iterator[Opened]:
    """Check and hash an open file that is no document, as rows of vectors; else as :func:`inspected`."""
    try:
        yield _hashed(descriptor, name=name, max_bytes=max_bytes)
    finally:
        os.close(descriptor)


async def open_document(
    stack: AsyncExitStack,
    file_path: str,
    *,
    settings: "Settings",
    inspect: Callable[..., AbstractContextManager[F]],
) -> F:
    """Open a file of a task, after it was fetched if a URL names it; it is closed with the stack.

    ``inspect`` is :func:`inspected`, or :func:`hashed` for a file that is no document. Raises as :func:`opened`, and as
    :func:`job_runner.remote.download`.
    """
    if is_url(file_path):
        from job_runner.remote import download  # an HTTP client, which a mounted document does not need

        descriptor = await download(file_path, settings=settings)
    else:
        descriptor = await asyncio.to_thread(open_below, file_path, root=settings.document_root)
    opening = inspect(descriptor, name=file_path, max_bytes=settings.max_document_bytes)
    return await asyncio.to_thread(stack.enter_context, opening)


def open_below(file_path: str, *, root: Path) -> int:
    """Open a file or a folder without ever leaving ``root``; return its descriptor.

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


def _hashed(descriptor: int, *, name: str, max_bytes: int) -> Opened:
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
        with open(descriptor, "rb", closefd=False) as file:
            file.seek(0)
            digest = hashlib.sha256()
            while data := file.read(_HASH_BYTES):
                digest.update(data)
                beat()
    except OSError as error:
        raise _failed(name, error) from error
    return Opened(name, descriptor, state.st_size, digest.hexdigest(), state.st_mtime_ns)
