"""PDF: text without running heads and page numbers, lines joined to paragraphs, headings from the outline or from sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Final

from job_runner.document import Kind, ParsedDocument
from job_runner.readers.failure import OnProgress, ReadingFailed
from job_runner.readers.lines import HYPHEN, Line, paged, with_large_lines, without_running_lines
from job_runner.readers.ocr import NEEDS_OCR, RESOLUTION, SIDE, Recognize

_WINDOW: Final = 100
"""Pages after which a PDF is opened anew. PDFium keeps what it has parsed of an open one, 7 KB a page of plain text: 31 MB
after 1,000 pages, 25 if it is opened anew, in the same time (measured)."""
_STAMP: Final = 100
"""Characters below which the text of a page may be what a scanner or an archive stamped on it."""


def read_pdf(file: BinaryIO, *, name: str, on_progress: OnProgress, recognize: Recognize | None = None) -> ParsedDocument:
    """Read a PDF page by page; a page that cannot be read is recorded.

    Scanned pages are those of ``recognize``; without it they are among the failed ones. Raises :class:`ReadingFailed`.
    """
    import pypdfium2

    pdf = _opened(file, name=name)
    lines: list[Line] = []
    failed: list[int] = []
    scans: list[int] = []
    try:
        count = len(pdf)
        if count == 0:
            raise ReadingFailed("DocumentUnreadable", f"cannot read {name}: the PDF has no pages; it is damaged")
        bookmarks = _bookmarks(pdf)
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
    finally:
        pdf.close()  # also one that is closed
    if not lines:
        if scans:
            raise ReadingFailed("DocumentEmpty", f"cannot index {name}: none of its {count} pages has text; {NEEDS_OCR}")
        if failed:
            raise ReadingFailed("DocumentUnreadable", f"cannot read {name}: all {count} pages are damaged")
        raise ReadingFailed("DocumentEmpty", f"cannot index {name}: none of its {count} pages has text")
    lines = without_running_lines(lines, pages=count)
    lines = _with_bookmarks(lines, bookmarks) if bookmarks else with_large_lines(lines)
    return paged(lines, kind=Kind.PDF, count=count, failed=[*failed, *scans])


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


def _page_lines(pdf: Any, number: int, *, with_sizes: bool, recognize: Recognize | None) -> tuple[list[Line], bool]:
    """Return the lines of a page, and whether it is a scan."""
    page = pdf[number - 1]
    try:
        lines = _text_lines(page, number, with_sizes=with_sizes)
        is_scan = _is_scan(page, characters=sum(len(line.text) for line in lines))
        if is_scan and recognize is not None:
            recognized = [Line(text=text, page=number) for text in recognize(_rendered(page))]
            lines = recognized or lines
    finally:
        page.close()
    return lines, is_scan


def _text_lines(page: Any, number: int, *, with_sizes: bool) -> list[Line]:
    """Return the lines of the text that a page has."""
    import pypdfium2.raw as pdfium

    lines: list[Line] = []
    text_page = page.get_textpage()
    try:
        text = text_page.get_text_bounded()
        # Positions in the text are positions of characters only if the library left nothing out.
        sized = with_sizes and len(text) == text_page.count_chars()
        offset = 0
        for raw in text.split("\n"):
            start, offset = offset, offset + len(raw) + 1
            content = raw.strip("\r\x00 \t\u3000")
            if not content.strip(HYPHEN):
                continue
            size = 0.0
            if sized:
                first = start + len(raw) - len(raw.lstrip("\r\x00 \t\u3000"))
                size = round(pdfium.FPDFText_GetFontSize(text_page, first), 1)
            lines.append(Line(text=content, page=number, size=size))
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


def _with_bookmarks(lines: Sequence[Line], bookmarks: Sequence[_Bookmark]) -> list[Line]:
    """Mark the lines that bookmarks point at; a bookmark whose line is not found marks nothing."""

    def key(text: str) -> str:
        return "".join(text.split()).casefold()

    wanted: dict[tuple[int, str], int] = {(mark.page, key(mark.title)): mark.level for mark in bookmarks}
    marked: list[Line] = []
    for line in lines:
        level = wanted.pop((line.page, key(line.text)), 0)
        marked.append(replace(line, level=level) if level else line)
    return marked
