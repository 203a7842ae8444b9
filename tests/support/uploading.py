"""Files that arrive, and what is left of them in a folder: of volumes, and of a server that keeps objects as files."""

from collections.abc import AsyncIterator
from pathlib import Path


async def parts(*data: bytes, then: BaseException | None = None) -> AsyncIterator[bytes]:
    """Yield these chunks; ``then``: what happens after them."""
    for one in data:
        yield one
    if then is not None:
        raise then


def files(folder: Path) -> list[str]:
    """Return the paths of all files, parts of uploads included that were not completed."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
