"""Folders of a document volume, opened one below the other: no link is followed, so nothing is written outside of it."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags of :func:`os.open` for a folder that is no link."""
NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
"""The same for a file that must not be there yet."""


def open_folder(root: Path, parts: Iterable[str], *, mode: int) -> int:
    """Open a folder below ``root``, making with ``mode`` the parts that are not there; return its descriptor, to be closed.

    ``root`` itself may be a link: it is what was mounted, and no task names it. Blocks; raises OSError.
    """
    current = os.open(os.path.realpath(root), DIRECTORY)
    for part in parts:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, mode, dir_fd=current)
            following = os.open(part, DIRECTORY, dir_fd=current)
        finally:
            os.close(current)
        current = following
    return current
