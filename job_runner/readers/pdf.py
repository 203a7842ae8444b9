"""PDF: text without running heads and page numbers, lines joined to paragraphs, headings from the outline or from sizes."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Final

from job_runner.document import Heading, Kind, Page, ParsedDocument
from job_runner.readers.failure import OnProgress, ReadingFailed
from job_runner.readers.ocr import NEEDS_OCR, RESOLUTION, SIDE, Recognize

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
_WINDOW: Final = 100
"""Pages after which a PDF is opened anew. PDFium keeps what it has parsed of an open one, 7 KB a page of plain text: 31 MB
after 1,000 pages, 25 if it is opened anew, in the same time (measured)."""
_STAMP: Final = 100
"""Characters below which the text of a page may be what a scanner or an archive stamped on it."""
_HYPHEN: Final = "\ufffe"
"""What PDFium writes for a hyphen that parts a word at the end of a line."""


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a PDF page, as it is set."""

    text: str
    page: int
    """Number of the page, from 1."""
    size: float = 0
    """Size of its first character in points; 0: unknown."""
    level: int = 0
    """Level of a heading; 0: no heading."""


def read_pdf(file: BinaryIO, *, name: str, on_progress: OnProgress, recognize: Recognize | None = None) -> ParsedDocument:
    """Read a PDF page by page; a page that cannot be read is recorded.

    Scanned pages are those of ``recognize``; without it they are among the failed ones. Raises :class:`ReadingFailed`.
    """
    import pypdfium2

    pdf = _opened(file, name=name)
    count = len(pdf)
    if count == 0:
        raise ReadingFailed("DocumentUnreadable", f"cannot read {name}: the PDF has no pages; it is damaged")
    bookmarks = _bookmarks(pdf)
    lines: list[_Line] = []
    failed: list[int] = []
    scans: list[int] = []
    for number in range(1, count + 1):
        if number % _WINDOW == 0:
            pdf.close()
            pdf = _opened(file, name=name)
        try:
            found, is_scan = _page_lines(pdf, number, with_sizes=not bookmarks, recognize=recognize)
        except (pypdfium2.PdfiumError, ValueError, UnicodeError):
            failed.append(number)
        else:
            lines += found
            if is_scan and not found and recognize is None:
                scans.append(number)
        on_progress(number, count)
    pdf.close()
    if not lines:
        if scans:
            raise ReadingFailed("DocumentEmpty", f"cannot index {name}: none of its {count} pages has text; {NEEDS_OCR}")
        if failed:
            raise ReadingFailed("DocumentUnreadable", f"cannot read {name}: all {count} pages are damaged")
        raise ReadingFailed("DocumentEmpty", f"cannot index {name}: none of its {count} pages has text")
    lines = _without_running_lines(lines, pages=count)
    lines = _with_bookmarks(lines, bookmarks) if bookmarks else _with_large_lines(lines)
    text, starts, headings = _reflow(lines)
    pages: list[Page] = []
    start = len(text)
    for number in range(count, 0, -1):
        start = starts.get(number, start)  # a page without text starts where the next one does: pages tile the text
        pages.append(Page(number=number, start=start))
    return ParsedDocument(
        kind=Kind.PDF,
        text=text,
        pages=tuple(reversed(pages)),
        headings=tuple(headings),
        failed_pages=tuple(sorted({*failed, *scans})),
    )


def _opened(file: BinaryIO, *, name: str) -> Any:
    """Open a PDF; PDFium reads the parts of the file as it needs them."""
    import pypdfium2

    try:
        return pypdfium2.PdfDocument(file)
    except pypdfium2.PdfiumError as error:
        raise ReadingFailed("DocumentUnreadable", _why_unreadable(error, name=name)) from error


def _why_unreadable(error: Any, *, name: str) -> str:
    match getattr(error, "err_code", None):
        case 4:
            return f"cannot read {name}: the PDF is encrypted and needs a password; store it without one"
        case 5:
            return f"cannot read {name}: the PDF is encrypted in a way that is not supported; store it without encryption"
        case _:
            return f"cannot read {name}: the PDF is damaged or cut short; export it again from its source"


@dataclass(frozen=True, slots=True)
class _Bookmark:
    page: int
    level: int
    title: str


def _bookmarks(pdf: Any) -> list[_Bookmark]:
    """Return the outline of a PDF; empty when there is none or it is damaged."""
    found: list[_Bookmark] = []
    try:
        for entry in pdf.get_toc(max_depth=8):
            destination = entry.get_dest()
            page = None if destination is None else destination.get_index()
            title = " ".join((entry.get_title() or "").split())
            if page is not None and title:
                found.append(_Bookmark(page=page + 1, level=entry.level + 1, title=title))
    except (ValueError, UnicodeError, RuntimeError):  # an outline is a help, never a reason to refuse a document
        return []
    return found


def _page_lines(pdf: Any, number: int, *, with_sizes: bool, recognize: Recognize | None) -> tuple[list[_Line], bool]:
    """Return the lines of a page, and whether it is a scan."""
    page = pdf[number - 1]
    try:
        lines = _text_lines(page, number, with_sizes=with_sizes)
        is_scan = _is_scan(page, characters=sum(len(line.text) for line in lines))
        if is_scan and recognize is not None:
            recognized = [_Line(text=text, page=number) for text in recognize(_rendered(page))]
            lines = recognized or lines
    finally:
        page.close()
    return lines, is_scan


def _text_lines(page: Any, number: int, *, with_sizes: bool) -> list[_Line]:
    """Return the lines of the text that a page has."""
    import pypdfium2.raw as pdfium

    lines: list[_Line] = []
    text_page = page.get_textpage()
    try:
        text = text_page.get_text_bounded()
        # Positions in the text are positions of characters only if the library left nothing out.
        sized = with_sizes and len(text) == text_page.count_chars()
        offset = 0
        for raw in text.split("\n"):
            start, offset = offset, offset + len(raw) + 1
            content = raw.strip("\r\x00 \t\u3000")
            if not content.strip(_HYPHEN):
                continue
            size = 0.0
            if sized:
                first = start + len(raw) - len(raw.lstrip("\r\x00 \t\u3000"))
                size = round(pdfium.FPDFText_GetFontSize(text_page, first), 1)
            lines.append(_Line(text=content, page=number, size=size))
    finally:
        text_page.close()
    return lines


def _is_scan(page: Any, *, characters: int) -> bool:
    """Tell whether the text of a page is in a picture: there is none besides, or hardly any beside one of half the page."""
    import pypdfium2.raw as pdfium

    if characters >= _STAMP:
        return False
    images = page.get_objects(filter=[pdfium.FPDF_PAGEOBJ_IMAGE])
    if not characters:
        return next(images, None) is not None
    half = page.get_width() * page.get_height() / 2
    for image in images:
        left, bottom, right, top = image.get_bounds()
        if (right - left) * (top - bottom) >= half:
            return True
    return False


def _rendered(page: Any) -> Any:
    """Return a page as a picture, an array of rows of pixels of blue, green and red."""
    longest = max(page.get_width(), page.get_height(), 1)
    scale = min(RESOLUTION / 72, SIDE / longest)
    bitmap = page.render(scale=scale, no_smoothtext=False)
    try:
        return bitmap.to_numpy().copy()
    finally:
        bitmap.close()


def _without_running_lines(lines: Sequence[_Line], *, pages: int) -> list[_Line]:
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


def _with_bookmarks(lines: Sequence[_Line], bookmarks: Sequence[_Bookmark]) -> list[_Line]:
    """Mark the lines that bookmarks point at; a bookmark whose line is not found marks nothing."""

    def key(text: str) -> str:
        return "".join(text.split()).casefold()

    wanted: dict[tuple[int, str], int] = {(mark.page, key(mark.title)): mark.level for mark in bookmarks}
    marked: list[_Line] = []
    for line in lines:
        level = wanted.pop((line.page, key(line.text)), 0)
        marked.append(replace(line, level=level) if level else line)
    return marked


def _with_large_lines(lines: Sequence[_Line]) -> list[_Line]:
    """Mark short lines that are set larger than the body as headings, the largest as level 1."""
    weights: Counter[float] = Counter()
    for line in lines:
        if line.size > 0:  # those of scanned pages have none
            weights[line.size] += len(line.text)
    body = max(weights, key=lambda size: weights[size], default=0)
    if body <= 0:
        return list(lines)

    def is_heading(line: _Line) -> bool:
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


def _reflow(lines: Iterable[_Line]) -> tuple[str, dict[int, int], list[Heading]]:
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
    previous: _Line | None = None
    for line in lines:
        text = line.text.replace(_HYPHEN, "")
        glue = "" if previous is None or previous.text.endswith(_HYPHEN) else _glue(previous, line, usual=usual)
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


def _glue(previous: _Line, line: _Line, *, usual: int) -> str:
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
