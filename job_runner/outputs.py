"""Files that tasks write, below the folder ``outputs`` of the document volume: whole, or not there.

A file is written beside its place under a name that nobody reads, flushed to the disk, and renamed: what stands in its place
is whole, whenever the process or the machine dies, and another attempt replaces it. A process that was given up for dead and
wakes up finds its file gone when the next attempt has begun, and cannot rename it.

Every folder is opened below the one before, and no link is followed: nothing is written outside.
"""

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final
from uuid import UUID

from job_runner.watchdog import beat
from task_contract.errors import DocumentRefused, Fenced, InvalidTask, StoreUnavailable, TaskError
from task_contract.folders import NEW_FILE, open_folder
from task_contract.location import check_output_path
from task_contract.names import DOCUMENT_ROOT, OUTPUTS, digest

_PARTIAL: Final = ".partial-"
_ABANDONED: Final = 86_400.0
"""Seconds since a file that is not in its place was last written to: longer than an attempt is without progress."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NOT_OURS: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_IN_THE_WAY: Final = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTEMPTY})


class Output:
    """A file that is being written. All of it blocks; errors are those of :func:`replacing`."""

    def __init__(self, path: str, file: BinaryIO, *, folder: int, partial: str, name: str) -> None:
        self.path = path
        self._file = file
        self._folder = folder
        self._partial = partial
        self._name = name
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write what comes next."""
        with _explained(self.path):
            self._file.write(data)
        self._hash.update(data)
        beat()
        return len(data)

    @property
    def sha256(self) -> str:
        """Of what was written."""
        return self._hash.hexdigest()

    def flush(self) -> None:
        """Have the disk hold what was written."""
        with _explained(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Give the file its name, in place of what has it. Raises Fenced when another attempt has begun."""
        with _explained(self.path):
            try:
                os.rename(self._partial, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            except FileNotFoundError:
                raise Fenced(f"cannot write {self.path}: another attempt has begun; this one stops") from None
            os.fsync(self._folder)


@contextlib.contextmanager
def replacing(path: str, *, root: Path, uid: UUID, holder: str) -> Iterator[Output]:
    """Open ``payload.outputPath`` of a task for writing; what was not published until the end of the block is removed.

    Raises InvalidTask for a path that is none, DocumentRefused for a place that cannot be written to, StoreUnavailable where
    the volume is missing, fails or has no room, and Fenced.
    """
    try:
        parts = PurePosixPath(check_output_path(path).removeprefix(f"{DOCUMENT_ROOT}/")).parts
    except ValueError as error:
        raise InvalidTask(f"cannot write {path}: {error}; correct payload.outputPath") from error
    # Of fixed length, whatever the names of file and task.
    mine = f"{_PARTIAL}{digest(path, str(uid), length=16)}-"
    partial = f"{mine}{digest(holder, length=16)}"
    with _explained(path):
        folder = open_folder(root, parts[:-1], mode=0o775)  # what is missing of it below ``outputs``
    try:
        with _explained(path):
            _tidy(folder, mine)
            descriptor = os.open(partial, NEW_FILE, 0o644, dir_fd=folder)
        with os.fdopen(descriptor, "wb") as file:
            yield Output(path, file, folder=folder, partial=partial, name=parts[-1])
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial, dir_fd=folder)  # gone already when it was published
        os.close(folder)


def _tidy(folder: int, mine: str) -> None:
    """Remove what earlier attempts of a task have left, and what was left of others a day ago."""
    for name in os.listdir(folder):
        if name.startswith(_PARTIAL):
            with contextlib.suppress(FileNotFoundError):
                old = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime < time.time() - _ABANDONED
                if old or name.startswith(mine):
                    os.unlink(name, dir_fd=folder)


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _failure(path, error) from error


def _failure(path: str, error: OSError) -> TaskError:
    if error.errno in _NOT_OURS:
        return DocumentRefused(
            f"cannot write {path}: {error.strerror}; make the folder {OUTPUTS} of the document volume writable for user or "
            f"group {os.getgid()}"
        )
    if error.errno in _IN_THE_WAY:
        return DocumentRefused(
            f"cannot write {path}: {error.strerror}: a link, a file or a folder stands in the way; choose another "
            "payload.outputPath"
        )
    remedy = "make room on it" if error.errno in _FULL else "check the volume"
    return StoreUnavailable(f"cannot write {path} to the document volume: {error.strerror}; {remedy}")
