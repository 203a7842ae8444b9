"""What parsing makes of a file, and what splitting makes of that: plain values, no I/O.

All offsets count Unicode code points of :attr:`ParsedDocument.text`, which is the one text that every later stage speaks of.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

TITLE_LIMIT: Final = 120
"""Characters of a heading that are kept; eight levels of it fit the 4096 bytes that Milvus has for a heading path."""
DEPTH_LIMIT: Final = 8
"""Levels of a heading path that are kept."""


class Kind(StrEnum):
    """What a file is, by its content."""

    PDF = "pdf"
    MARKDOWN = "markdown"
    TEXT = "text"
    DOCX = "docx"
    HTML = "html"
    PPTX = "pptx"
    XLSX = "xlsx"
    XLS = "xls"
    ODS = "ods"
    CSV = "csv"
    JSON = "json"
    JSONL = "jsonl"
    EPUB = "epub"
    EML = "eml"
    IMAGE = "image"


READABLE: Final = "PDF, DOCX, PPTX, XLSX, XLS, ODS, CSV, JSON, EPUB, HTML, Markdown, text and e-mails (EML)"
"""What messages say that this version reads."""


_PAGED: Final = frozenset({Kind.PDF, Kind.PPTX, Kind.XLSX, Kind.XLS, Kind.ODS})


@dataclass(frozen=True, slots=True)
class Page:
    """One page; text without pages is page 1. Pages tile the text: each starts where the one before ended."""

    number: int
    start: int


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading: what follows ``start`` belongs to it, up to the next heading of the same or a higher level."""

    start: int
    """Offset of the heading's own line."""
    end: int
    """Offset just behind the heading's own line; equal to ``start`` when the heading is not in the text (a bookmark)."""
    level: int
    """1 is the highest."""
    title: str


@dataclass(frozen=True, slots=True)
class ParsedDocument:
    """The text of a file with its pages and headings."""

    kind: Kind
    text: str
    pages: tuple[Page, ...]
    """In order, at least one."""
    headings: tuple[Heading, ...] = ()
    """In order of their offsets."""
    failed_pages: tuple[int, ...] = ()
    """Numbers of pages that could not be read; the others were."""

    @property
    def paged(self) -> bool:
        """Whether page numbers mean anything: Markdown and most texts have no pages. Sheets and slides are pages."""
        return self.kind in _PAGED or len(self.pages) > 1

    def page_at(self, offset: int) -> int:
        """Return the number of the page that holds ``offset``."""
        return self.pages[max(0, bisect_right(self.pages, offset, key=lambda page: page.start) - 1)].number


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document, as both stores hold it. ``text == document.text[start:end]``, never empty."""

    ordinal: int
    text: str
    start: int
    end: int
    page_start: int
    page_end: int
    heading_path: tuple[str, ...]
    language: str
    """``zh``, ``en`` or ``other``, by script."""
    tokens: int
    """Tokens of the text as the embedding model counts them; 0 where nobody asked for them.

    For a model with a limit they are counted by sentence, as the limit is held: up to one a sentence more than of the whole.
    """


def language_of_most(chunks: Iterable[Chunk]) -> str | None:
    """Return the language with the most characters; ``None`` without chunks."""
    sizes: Counter[str] = Counter()
    for chunk in chunks:
        sizes[chunk.language] += len(chunk.text)
    return max(sorted(sizes), key=sizes.__getitem__, default=None)


def heading_paths(headings: Sequence[Heading]) -> list[tuple[str, ...]]:
    """Return for each heading the titles from the top down to it: ``("Chapter 2", "2.1 Backup")``.

    A level that was left out (a level 3 below a level 1) adds nothing to the path.
    """
    paths: list[tuple[str, ...]] = []
    stack: list[Heading] = []
    for heading in headings:
        while stack and stack[-1].level >= heading.level:
            stack.pop()
        stack.append(heading)
        paths.append(tuple(parent.title[:TITLE_LIMIT] for parent in stack[-DEPTH_LIMIT:]))
    return paths
