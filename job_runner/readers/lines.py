"""Lines as they are set on pages, joined to paragraphs: what text of a PDF and text that was recognised have in common."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from job_runner.document import Heading, Kind, Page, ParsedDocument

_HEADING_LINE_LIMIT: Final = 100
_HEADING_SHARE: Final = 0.25
"""If more lines than this look like headings by their size, sizes tell nothing about this document."""
_LARGER: Final = 1.15
"""A heading is set at least this many times as large as the body."""
_FULL_LINE: Final = 0.75
"""A line of less than this share of the usual width ends its paragraph."""
_WIDE: Final = re.compile(
    r"[\u1100-\u11ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\U00020000-\U0003ffff]"
)
_SENTENCE_END: Final = re.compile(r"[。！？；…｡.!?:：][\"'”’」』）】》)\]]*\Z")
_LIST_ITEM: Final = re.compile(r"(?:[-*+•·▪◦‣–]|\(?\d{1,3}[.)、）]|[（(][一二三四五六七八九十]{1,3}[）)])\s*\S")
_DIGITS: Final = re.compile(r"\d+")
HYPHEN: Final = "\ufffe"
"""What PDFium writes for a hyphen that parts a word at the end of a line."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a PDF page, as it is set."""

    text: str
    page: int
    """Number of the page, from 1."""
    size: float = 0
    """Size of its first character in points; 0: unknown."""
    level: int = 0
    """Level of a heading; 0: no heading."""


def paged(lines: Sequence[Line], *, kind: Kind, count: int, failed: Iterable[int] = ()) -> ParsedDocument:
    """Return the document that lines on ``count`` pages make."""
    text, starts, headings = _reflow(lines)
    pages: list[Page] = []
    start = len(text)
    for number in range(count, 0, -1):
        start = starts.get(number, start)  # a page without text starts where the next one does: pages tile the text
        pages.append(Page(number=number, start=start))
    return ParsedDocument(
        kind=kind,
        text=text,
        pages=tuple(reversed(pages)),
        headings=tuple(headings),
        failed_pages=tuple(sorted({*failed})),
    )


def without_running_lines(lines: Sequence[Line], *, pages: int) -> list[Line]:
    """Leave out headers, footers and page numbers: first and last lines that most pages share but for their digits."""
    if pages < 3:
        return list(lines)
    found: dict[int, list[int]] = {}
    for index, line in enumerate(lines):
        found.setdefault(line.page, []).append(index)
    edges = [(indexes[0], indexes[-1]) for indexes in found.values() if len(indexes) > 2]
    dropped: set[int] = set()
    for side in (0, 1):
        shapes = {edge[side]: _DIGITS.sub("#", lines[edge[side]].text) for edge in edges}
        counts = Counter(shapes.values())
        dropped |= {index for index, shape in shapes.items() if counts[shape] * 2 > pages}
    return [line for index, line in enumerate(lines) if index not in dropped]


def with_large_lines(lines: Sequence[Line]) -> list[Line]:
    """Mark short lines that are set larger than the body as headings, the largest as level 1."""
    weights: Counter[float] = Counter()
    for line in lines:
        if line.size > 0:  # those of scanned pages have none
            weights[line.size] += len(line.text)
    body = max(weights, key=lambda size: weights[size], default=0)
    if body <= 0:
        return list(lines)

    def is_heading(line: Line) -> bool:
        return (
            line.size >= body * _LARGER
            and len(line.text) <= _HEADING_LINE_LIMIT
            and any(character.isalpha() for character in line.text)
            and not _SENTENCE_END.search(line.text)
        )

    sizes = sorted({line.size for line in lines if is_heading(line)}, reverse=True)
    marked = [replace(line, level=min(sizes.index(line.size) + 1, 6)) if is_heading(line) else line for line in lines]
    if sum(line.level > 0 for line in marked) > _HEADING_SHARE * len(lines):
        return list(lines)
    return marked


def _reflow(lines: Iterable[Line]) -> tuple[str, dict[int, int], list[Heading]]:
    """Join set lines to paragraphs. Returns the text, the offset of each page, and the headings.

    Line ends of a page are where the paper ended, not the sentence; in Chinese they would cut words in two.
    """
    lines = list(lines)
    widths = sorted(_width(line.text) for line in lines if not line.level)
    usual = widths[int(len(widths) * 0.9)] if widths else 0
    parts: list[str] = []
    length = 0
    starts: dict[int, int] = {}
    headings: list[Heading] = []
    previous: Line | None = None
    for line in lines:
        text = line.text.replace(HYPHEN, "")
        glue = "" if previous is None or previous.text.endswith(HYPHEN) else _glue(previous, line, usual=usual)
        parts += [glue, text]
        start = length + len(glue)
        length = start + len(text)
        starts.setdefault(line.page, start)
        if line.level:
            last = headings[-1] if headings else None
            if last and previous and previous.level == line.level and previous.page == line.page and line.size:
                headings[-1] = replace(last, end=length, title=f"{last.title} {text}")  # a title of two lines
            else:
                headings.append(Heading(start=start, end=length, level=line.level, title=text))
        previous = line
    return "".join(parts), starts, headings


def _glue(previous: Line, line: Line, *, usual: int) -> str:
    """Return what stands between two set lines in the text."""
    if previous.level or line.level:
        return "\n\n"
    if _width(previous.text) < usual * _FULL_LINE or _LIST_ITEM.match(line.text):
        return "\n\n" if _SENTENCE_END.search(previous.text) else "\n"
    if _WIDE.match(previous.text[-1]) and _WIDE.match(line.text[0]):
        return ""
    return " "


def _width(text: str) -> int:
    """Return the width of a line in half-width cells: a Chinese character is as wide as two letters."""
    return len(text) + len(_WIDE.findall(text))
