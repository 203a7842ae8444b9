"""The document volumes, as uploads are put on them: ``FOLDER/NAMESPACE`` here is ``/data`` in the pods of that namespace.

A file is flushed to the disk under a name that nobody looks at, and is renamed into its place: what stands there is whole,
whenever the process or the machine dies.

Every folder is opened below the one before, and no link is followed: whoever writes to the volume of one namespace leads
nothing into that of another.
"""

import asyncio
import contextlib
import errno
import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

from task_contract.folders import DIRECTORY, NEW_FILE, open_folder
from task_contract.names import DOCUMENT_ROOT
from task_gateway.documents import ABANDONED, FOLDER, PARTIAL, Arriving, PlaceFull, PlaceUnavailable, Received, Stored

_BLOCK: Final = 1 << 20
"""Bytes that are written at once."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class DocumentVolumes:
    """A :class:`~task_gateway.documents.DocumentStore` of mounted folders."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def serves(self, namespace: str) -> bool:
        """Whether there is a volume for a namespace."""
        return (self._folder / namespace).is_dir()

    @contextlib.asynccontextmanager
    async def receive(self, chunks: AsyncIterator[bytes], *, namespace: str, limit: int) -> AsyncIterator[Received]:
        """Write a file as it arrives."""
        partial = PARTIAL + uuid.uuid4().hex
        with _explained(namespace):
            folder = await asyncio.to_thread(self._open, namespace, FOLDER)
        try:
            with _explained(namespace):
                file = await asyncio.to_thread(_create, partial, folder)
            arriving = Arriving(chunks, limit=limit)
            try:
                await _write(file, arriving, namespace=namespace)
            finally:
                os.close(file)
            yield arriving.received(namespace, partial)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(partial, dir_fd=folder)  # gone already when it was placed
            os.close(folder)

    async def place(self, received: Received, *, kb_id: str, token: str, name: str) -> Stored:
        """Give a file its place."""
        with _explained(received.namespace):
            fresh = await asyncio.to_thread(self._place, received, kb_id, token, name)
        path = f"{DOCUMENT_ROOT}/{FOLDER}/{kb_id}/{token}/{name}"
        return Stored(namespace=received.namespace, file_path=path, fresh=fresh)

    async def remove(self, stored: Stored) -> None:
        """Remove a file whose task was refused, with its folder."""
        await asyncio.to_thread(self._remove, stored)

    def _remove(self, stored: Stored) -> None:
        folder, token, name = stored.file_path.removeprefix(f"{DOCUMENT_ROOT}/").rsplit("/", 2)
        with contextlib.suppress(OSError):
            above = self._open(stored.namespace, *folder.split("/"))
            try:
                below = os.open(token, DIRECTORY, dir_fd=above)
                try:
                    os.unlink(name, dir_fd=below)
                finally:
                    os.close(below)
                os.rmdir(token, dir_fd=above)
            finally:
                os.close(above)

    async def tidy(self, *, now: float | None = None) -> int:
        """Remove what processes that were killed have left half."""
        return await asyncio.to_thread(self._tidy, (time.time() if now is None else now) - ABANDONED)

    async def aclose(self) -> None:
        """Nothing is held open."""

    def _tidy(self, before: float) -> int:
        removed = 0
        for namespace in sorted(self._folder.iterdir()) if self._folder.is_dir() else []:
            with contextlib.suppress(OSError):
                folder = os.open(namespace / FOLDER, DIRECTORY)
                try:
                    for name in os.listdir(folder):  # noqa: PTH208 - of an open folder
                        if (
                            name.startswith(PARTIAL)
                            and os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime < before
                        ):
                            os.unlink(name, dir_fd=folder)
                            removed += 1
                finally:
                    os.close(folder)
        return removed

    def _open(self, namespace: str, *parts: str) -> int:
        return open_folder(self._folder / namespace, parts, mode=0o755)

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
    return os.open(name, NEW_FILE, 0o644, dir_fd=folder)


async def _write(file: int, arriving: Arriving, *, namespace: str) -> None:
    """Write all that comes and flush it to the disk."""
    block = bytearray()

    def flush(data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]

    async def write() -> None:
        with _explained(namespace):
            await asyncio.to_thread(flush, bytes(block))
        block.clear()

    async for chunk in arriving:
        block += chunk
        if len(block) >= _BLOCK:
            await write()
    await write()
    with _explained(namespace):
        await asyncio.to_thread(os.fsync, file)


@contextlib.contextmanager
def _explained(namespace: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise PlaceFull(f"cannot store the document: the volume of namespace {namespace} is full") from error
        raise PlaceUnavailable(
            f"cannot store the document: the volume of namespace {namespace} cannot be written to ({error.strerror}); "
            "is it mounted in the gateway, below GATEWAY_DOCUMENTS?"
        ) from error
