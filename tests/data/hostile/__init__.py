"""Files that want to hurt their reader: bombs, loops, lies, files cut short, and addresses that nobody may ask.

None is in the repository: scanners would take some for what they imitate, and some are large. They are made where they are
needed, the same bytes each time; ``python -m tests.data.hostile FOLDER`` writes them all.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from job_runner.parse import ParserLimits

LIMITS = ParserLimits(memory_bytes=512 << 20, seconds=120, cpu_seconds=5, output_bytes=32 << 20)
"""Half of the memory that a document has by default, and little time."""
URL = "http://hostile.invalid"
"""Stands in the files for the server that nobody may ask."""


@dataclass(frozen=True)
class Hostile:
    """A file and how reading it has to end: with an error of a reason and in words, or as text."""

    name: str
    data: bytes
    reason: str = ""
    """Name of an error of :mod:`task_contract.errors`; empty: it is read."""
    says: str = ""
    """Part of the message, or of the text. Numbers in it are those of ``LIMITS``."""

    def __repr__(self) -> str:
        return self.name


def all_files(url: str = URL) -> Iterator[Hostile]:
    """Yield every file; ``url`` is where they lead who follows them."""
    from tests.data.hostile import archives, pdfs, texts

    yield from archives.files(url)
    yield from pdfs.files(url)
    yield from texts.files(url)
