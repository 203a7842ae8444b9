"""Workbooks: XLSX and XLS by calamine, ODS as a stream of XML events. Each sheet is a page under a heading of its name.

What is read are the values as they were last calculated. Hidden sheets are left out, as what nobody sees, but count where
sheets are counted. The rows of a sheet become lines with the headers of their columns (:mod:`job_runner.readers.grid`).
"""

import datetime
import io
import re
import zipfile
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar, Final

from job_runner.document import Kind, ParsedDocument
from job_runner.readers.archive import Archive, Attributes
from job_runner.readers.blocks import Assembly, Block
from job_runner.readers.failure import OnProgress, ReadingFailed
from job_runner.readers.grid import Row, cleaned, lines
from job_runner.readers.package import COMMON_PREFIXES, Package

_AREA_LIMIT: Final = 8_000_000
"""Cells between the first and the last one of a sheet: calamine holds 24 bytes for each, filled or empty."""
_REFERENCE: Final = re.compile(rb"""\sr\s*=\s*["']\s*([A-Za-z]{1,3})(\d{1,7})\s*["']""")
_CELL: Final = re.compile(rb"<(?:[\w.-]+:)?c\s[^>]*>")
_STYLE: Final = re.compile(rb"""\ss\s*=\s*["']\s*(\d+)""")
_PLACES_OF_OTHERS: Final = re.compile(
    rb"""(<(?:[\w.-]+:)?row\b[^>]*?)\sr\s*=\s*["'][^"']*["']|<(?:[\w.-]+:)?(?:mergeCell|dimension)\b[^>]*>"""
)
"""Numbers of rows, and tags that name cells and have no text."""
_PERCENT: Final = re.compile(r"[^%\"\\]*%[^%\"\\]*")
_STRETCH: Final = 2**20
_ROWS: Final = 1_048_576
_COLUMNS: Final = 16_384
"""Size of a sheet, in Excel and LibreOffice."""
_EMPTY_ROWS: Final = 1000
"""Empty rows of an ODS that are kept, of any number that follow each other."""
_EXACT: Final = 1e15
"""Whole numbers below it are written in full. Workbooks keep 15 digits."""
_ODS_SKIPPED: Final = frozenset({
    "office:annotation", "office:forms", "table:tracked-changes", "table:dde-links", "table:shapes",
    "draw:frame", "draw:custom-shape", "draw:g", "draw:line", "draw:rect", "draw:control", "draw:caption",
})  # fmt: skip
_ODS_VALUES: Final = (
    "office:string-value",
    "office:date-value",
    "office:time-value",
    "office:boolean-value",
    "office:value",
)
"""What a cell holds, where it does not say what it shows."""
_Place = tuple[int, int]
"""A cell, by row and column from 0."""
_Range = tuple[_Place, _Place]
"""First and last cell."""
_SPREADSHEET: Final = {
    "http://schemas.openxmlformats.org/spreadsheetml/2006/main": "",
    "http://purl.oclc.org/ooxml/spreadsheetml/main": "",
}


@dataclass(frozen=True, slots=True)
class _Sheet:
    """A sheet that is shown."""

    number: int
    """Its place in the workbook, hidden ones counted."""
    name: str
    lines: Iterable[str]
    """Those of its rows; raises ``_SheetFailed``."""


class _SheetFailed(Exception):
    """A sheet can't be read; others may."""


def read_xlsx(file: BinaryIO, *, name: str, on_progress: OnProgress) -> ParsedDocument:
    """Read an XLSX.

    Raises :class:`ReadingFailed`: DocumentRefused for a bomb, DocumentUnreadable for a damaged file and where no sheet can
    be read.
    """
    with _Xlsx.opened(file, name=name) as package:
        checked = package.checked()
        source = package.with_parts(checked.closed_up) if checked.closed_up else file
    source.seek(0)
    return _read_by_calamine(source, kind=Kind.XLSX, name=name, checked=checked, on_progress=on_progress)


def read_xls(file: BinaryIO, *, name: str, on_progress: OnProgress) -> ParsedDocument:
    """Read an XLS: Excel 5 to 2003. Its sheets have at most 65,536 rows of 256 columns.

    Raises :class:`ReadingFailed`: DocumentUnreadable.
    """
    return _read_by_calamine(file, kind=Kind.XLS, name=name, checked=None, on_progress=on_progress)


def _document(kind: Kind, sheets: Iterable[_Sheet], *, name: str, count: int, on_progress: OnProgress) -> ParsedDocument:
    """Put the sheets of a workbook together. Those that fail are recorded, and the others read."""
    assembly = Assembly()
    failed: list[int] = []
    read = 0
    reason: _SheetFailed | None = None
    for sheet in sheets:
        assembly.page(sheet.number)
        try:
            for place, found in enumerate(sheet.lines):
                if place == 0:
                    assembly.add(Block(sheet.name, level=1))
                assembly.add(Block(found, group=sheet.number))
        except _SheetFailed as error:
            failed.append(sheet.number)
            reason = error
        else:
            read += 1
        on_progress(sheet.number, count)
    if reason is not None and not read:
        raise ReadingFailed(
            "DocumentUnreadable", f"cannot read {name}: none of its sheets can be read: {reason}"
        ) from reason
    return assembly.document(kind, failed_pages=failed)


# ---------------------------------------------------------------------------------------------------------- XLSX, XLS


class _Xlsx(Package):
    """An XLSX. Names of XML have no prefix in SpreadsheetML's namespaces, transitional or strict."""

    FORMAT: ClassVar = "XLSX"
    MARKS: ClassVar = ("spreadsheetml", "ms-excel")
    PREFIXES: ClassVar = COMMON_PREFIXES | _SPREADSHEET

    def checked(self) -> "_Checked":
        """Inflate all parts that calamine reads, within the bounds of an archive: it has none of its own.

        Raises :class:`ReadingFailed`, where more than a sheet is wrong.
        """
        parts = self.relationships(self.main)
        sheets: list[tuple[str, str]] = []

        def start(name: str, attributes: Attributes) -> None:
            if name == "sheet" and (part := parts.get(attributes.get("r:id", ""))) is not None:
                sheets.append((attributes.get("name", ""), part.target))

        self.parse(self.main, start=start)
        if (strings := self.related("sharedStrings")) is not None:
            deque(self.pieces(strings), maxlen=0)
        styles = self._percentages()
        checked = _Checked()
        for name, part in sheets:
            try:
                found = _Cells(self.pieces(part), percentages=styles)
                if found.area > _AREA_LIMIT:
                    checked.closed_up[part] = _closed_up(b"".join(self.pieces(part)))
                    found = _Cells([checked.closed_up[part]], percentages=styles)
                checked.percentages[name] = found.percentages
                if found.area > _AREA_LIMIT:
                    checked.broken[name] = f"its {found.area} cells are too many; split it"
            except ReadingFailed as failure:
                if failure.reason != "DocumentUnreadable":
                    raise
                checked.broken[name] = "its part of the file is damaged"
        return checked

    def with_parts(self, parts: Mapping[str, bytes]) -> BinaryIO:
        """Return the archive with other content of some parts, in memory, as far as calamine reads it."""
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for part in self:
                if part.endswith((".xml", ".rels")) and not part.startswith(("xl/drawings/", "xl/charts/", "docprops/")):
                    name = "[Content_Types].xml" if part == "[content_types].xml" else part
                    archive.writestr(name, parts[part] if part in parts else self.read(part))
        file.seek(0)
        return file

    def _percentages(self) -> frozenset[bytes]:
        """Return the numbers of the styles that show a value as a percentage."""
        formats = {"9": "0%", "10": "0.00%"}
        styles: list[str] = []
        path: list[str] = []

        def start(name: str, attributes: Attributes) -> None:
            path.append(name)
            if name == "numFmt":
                formats[attributes.get("numFmtId", "")] = attributes.get("formatCode", "")
            elif name == "xf" and "cellXfs" in path:
                styles.append(attributes.get("numFmtId", ""))

        def end(name: str) -> None:
            path.pop()

        part = self.related("styles")
        if part is None:
            return frozenset()
        self.parse(part, start=start, end=end)
        shown = (_PERCENT.fullmatch(formats.get(style, "")) is not None for style in styles)
        return frozenset(str(number).encode() for number, shows in enumerate(shown) if shows)


@dataclass(slots=True)
class _Checked:
    """What is known of an XLSX before calamine reads it."""

    broken: dict[str, str] = field(default_factory=dict)
    """Why a sheet must not be read, by its name."""
    closed_up: dict[str, bytes] = field(default_factory=dict)
    """Parts with sheets whose cells lie too far from each other, without the gaps."""
    percentages: dict[str, Set[_Place]] = field(default_factory=dict)
    """Cells that show percentages, by the name of their sheet."""

    def cells(self, sheet: str) -> Set[_Place]:
        """Return the cells of a sheet that show percentages.

        Raises ``_SheetFailed`` for one that must not be read: also where calamine sees a sheet that was not seen here, as it
        takes no notice of namespaces.
        """
        if sheet in self.broken or sheet not in self.percentages:
            raise _SheetFailed(f"{sheet!r}: {self.broken.get(sheet, 'the XLSX does not list it as a sheet')}")
        return self.percentages[sheet]


class _Cells:
    """Where the cells of a sheet lie, by the references in its XML."""

    def __init__(self, pieces: Iterable[bytes], *, percentages: Set[bytes]) -> None:
        self.percentages: set[_Place] = set()
        rows: set[int] = set()
        columns: set[bytes] = set()
        for tags in _whole_tags(pieces):
            if references := _REFERENCE.findall(tags):
                columns.update([column for column, _ in references])
                numbers = [int(row) for _, row in references]
                rows |= {min(numbers), max(numbers)}
            if percentages:
                for tag in _CELL.findall(tags):
                    if (style := _STYLE.search(tag)) and style[1] in percentages and (place := _REFERENCE.search(tag)):
                        self.percentages.add((int(place[2]) - 1, _column(place[1]) - 1))
        places = [_column(letters) for letters in columns]
        self.area = (max(rows) - min(rows) + 1) * (max(places) - min(places) + 1) if rows else 0
        """Cells between the first and the last one."""


def _whole_tags(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield XML in pieces that end between two tags; a longer stretch without any holds no references."""
    rest = b""
    for piece in pieces:
        data = rest + piece
        cut = data.rfind(b"<") if len(data) < _STRETCH else -1
        cut = cut if cut >= 0 else len(data)
        yield data[:cut]
        rest = data[cut:]
    yield rest


def _closed_up(sheet: bytes) -> bytes:
    """Return a sheet without the rows and columns that no cell is in; of several empty rows, one remains."""
    references = set(_REFERENCE.findall(sheet))
    columns = sorted({_column(column) for column, _ in references})
    rows: dict[int, int] = {}
    for row in sorted({int(row) for _, row in references}):
        last = next(reversed(rows), row)
        rows[row] = rows.get(last, 0) + min(row - last, 2) if rows else 1

    def moved(found: re.Match[bytes]) -> bytes:
        column = bisect_left(columns, _column(found[1])) + 1
        return b' r="%s%d"' % (_letters(column), rows[int(found[2])])

    return _REFERENCE.sub(moved, _PLACES_OF_OTHERS.sub(rb"\1", sheet))


def _column(letters: bytes) -> int:
    """Return the number of a column: ``A`` is 1, ``AA`` 27."""
    number = 0
    for letter in letters.upper():
        number = number * 26 + letter - 64
    return number


def _letters(column: int) -> bytes:
    """Return the letters of a column, see :func:`_column`."""
    letters = b""
    while column:
        column, letter = divmod(column - 1, 26)
        letters = bytes([65 + letter]) + letters
    return letters


def _read_by_calamine(
    file: BinaryIO, *, kind: Kind, name: str, checked: _Checked | None, on_progress: OnProgress
) -> ParsedDocument:
    # Imported here: only workbooks need it.
    from python_calamine import CalamineWorkbook, PasswordError, SheetVisibleEnum

    try:
        with _failures_of_calamine():
            workbook = CalamineWorkbook.from_filelike(file)
    except PasswordError as error:
        message = f"cannot read {name}: the workbook is encrypted with a password; store it without one"
        raise ReadingFailed("DocumentUnreadable", message) from error
    except _SheetFailed as error:
        message = f"cannot read {name}: the workbook is damaged ({error}); save it again with the program that made it"
        raise ReadingFailed("DocumentUnreadable", message) from error

    def sheet_lines(number: int, sheet: str) -> Iterator[str]:
        percentages = checked.cells(sheet) if checked is not None else frozenset[_Place]()
        with _failures_of_calamine():
            cells = workbook.get_sheet_by_index(number - 1)
            if cells.start is not None:
                rows = _rows(cells.iter_rows(), start=cells.start, percentages=percentages)
                yield from lines(_merged(rows, cells.merged_cell_ranges or (), top=cells.start[0]))

    metadata = workbook.sheets_metadata
    sheets = (
        _Sheet(number, found.name, sheet_lines(number, found.name))
        for number, found in enumerate(metadata, start=1)
        if found.visible == SheetVisibleEnum.Visible
    )
    return _document(kind, sheets, name=name, count=len(metadata), on_progress=on_progress)


@contextmanager
def _failures_of_calamine() -> Iterator[None]:
    """Turn what calamine raises about a damaged workbook into ``_SheetFailed``; a panic of its is no :class:`Exception`."""
    from python_calamine import CalamineError, PasswordError

    try:
        yield
    except PasswordError:
        raise
    except CalamineError as error:
        raise _SheetFailed(str(error)[:200]) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise _SheetFailed(str(error)[:200]) from error


def _rows(rows: Iterable[Sequence[Any]], *, start: _Place, percentages: Set[_Place]) -> Iterator[Row]:
    top, left = start
    for number, values in enumerate(rows, start=top):
        if percentages:
            values = [
                f"{found * 100:.12g}%" if isinstance(found, float) and (number, column) in percentages else found
                for column, found in enumerate(values, start=left)
            ]
        yield {column: text for column, found in enumerate(values, left) if found != "" and (text := _text(found))}


def _merged(rows: Iterable[Row], ranges: Iterable[_Range], *, top: int) -> Iterator[Row]:
    """Repeat the value of a cell that covers several rows in each of them that has others, so that each says all."""
    begins: dict[int, list[tuple[int, int]]] = {}
    for (first, column), (last, _) in ranges:
        if last > first:
            begins.setdefault(first, []).append((last, column))
    covering: dict[int, tuple[int, str]] = {}
    for number, row in enumerate(rows, start=top):
        if covering and row:
            covering = {column: cover for column, cover in covering.items() if cover[0] >= number}
            if repeated := {column: value for column, (_, value) in covering.items() if column not in row}:
                row = dict(sorted({**row, **repeated}.items()))
        for last, column in begins.get(number, ()):
            if value := row.get(column):
                covering[column] = (last, value)
        yield row


def _text(found: Any) -> str:
    """Return a value as a person reads it, whatever the format that its cell has."""
    match found:
        case str():
            return cleaned(found)
        case bool():
            return "TRUE" if found else "FALSE"
        case float():
            whole = found.is_integer() and abs(found) < _EXACT
            return str(int(found)) if whole else f"{found:.15g}"
        case datetime.datetime():
            return found.isoformat(" ", "minutes" if found.second == 0 else "seconds")
        case datetime.time():
            return found.isoformat("minutes" if found.second == 0 else "seconds")
        case datetime.timedelta():
            minutes, seconds = divmod(round(found.total_seconds()), 60)
            return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    return str(found)  # whole numbers, and dates as 2024-05-31


# ----------------------------------------------------------------------------------------------------------------- ODS


class _Ods(Archive):
    """An ODS."""

    FORMAT: ClassVar = "ODS"
    PREFIXES: ClassVar = {
        f"urn:oasis:names:tc:opendocument:xmlns:{name}:1.0": f"{prefix}:"
        for name, prefix in (
            ("office", "office"),
            ("table", "table"),
            ("text", "text"),
            ("style", "style"),
            ("drawing", "draw"),
        )
    }


def read_ods(file: BinaryIO, *, name: str, on_progress: OnProgress) -> ParsedDocument:
    """Read an ODS; values are as they are shown.

    Raises :class:`ReadingFailed`: DocumentRefused for a bomb, DocumentUnreadable for a damaged file or one with a password.
    """
    with _Ods.opened(file, name=name) as archive:
        if "meta-inf/manifest.xml" in archive and b"encryption-data" in archive.read("meta-inf/manifest.xml"):
            message = f"cannot read {name}: the ODS is encrypted with a password; store it without one"
            raise ReadingFailed("DocumentUnreadable", message)
        reader = _OdsReader()
        archive.parse("content.xml", start=reader.start, end=reader.end, text=reader.text)
    return _document(Kind.ODS, reader.sheets, name=name, count=reader.count, on_progress=on_progress)


class _OdsReader:
    """Turns the events of the content of an ODS into sheets."""

    def __init__(self) -> None:
        self.sheets: list[_Sheet] = []
        self.count = 0
        self._hidden_styles: set[str] = set()
        self._style = ""
        self._skip = 0
        self._name = ""
        self._hidden = False
        self._rows: list[Row] = []
        self._ranges: list[_Range] = []
        self._row: dict[int, str] = {}
        self._repeated = 1
        self._column = 0
        self._cell: Attributes | None = None
        self._paragraphs: list[str] = []
        self._within = 0
        """Paragraphs that are open in one another."""

    def start(self, name: str, attributes: Attributes) -> None:
        """Begin an element."""
        if self._skip or name in _ODS_SKIPPED:
            self._skip += 1
            return
        match name:
            case "style:style":
                self._style = attributes.get("style:name", "")
            case "style:table-properties" if attributes.get("table:display") == "false":
                self._hidden_styles.add(self._style)
            case "table:table" if self._cell is not None:
                self._skip = 1  # a table in a cell
            case "table:table":
                self.count += 1
                self._name = attributes.get("table:name", "")
                self._hidden = attributes.get("table:style-name") in self._hidden_styles
                self._rows, self._ranges = [], []
            case "table:table-row":
                self._row, self._column = {}, 0
                self._repeated = _count(attributes, "table:number-rows-repeated")
            case "table:table-cell":
                self._cell, self._paragraphs = attributes, []
            case "table:covered-table-cell":
                self._column += _count(attributes, "table:number-columns-repeated")
                self._skip = 1
            case "text:p" | "text:h":
                self._within += 1
                self._paragraphs.append("")
            case "text:s" if self._within:
                self._paragraphs[-1] += " "
            case "text:tab" | "text:line-break" if self._within:
                self._paragraphs[-1] += " "

    def end(self, name: str) -> None:
        """End an element."""
        if self._skip:
            self._skip -= 1
            return
        match name:
            case "text:p" | "text:h":
                self._within -= 1
            case "table:table-cell":
                self._end_cell()
            case "table:table-row":
                self._rows += [self._row] * (self._repeated if self._row else min(self._repeated, _EMPTY_ROWS))
            case "table:table":
                if not self._hidden:
                    found = list(lines(_merged(self._rows, self._ranges, top=0)))
                    self.sheets.append(_Sheet(self.count, self._name, found))
                self._rows = []

    def text(self, text: str) -> None:
        """Take text; that in paragraphs is what a cell shows."""
        if self._within and not self._skip:
            self._paragraphs[-1] += text

    def _end_cell(self) -> None:
        cell = self._cell or {}
        shown = cleaned("\n".join(self._paragraphs)) or cleaned(
            next((cell[name] for name in _ODS_VALUES if name in cell), "")
        )
        columns = min(_count(cell, "table:number-columns-repeated"), _COLUMNS - self._column)
        if shown:
            self._row |= dict.fromkeys(range(self._column, self._column + columns), shown)
            if (rows := _count(cell, "table:number-rows-spanned")) > 1:
                first = len(self._rows)
                self._ranges.append(((first, self._column), (first + rows - 1, self._column)))
        self._column += columns
        self._cell = None


def _count(attributes: Attributes, name: str) -> int:
    """Return how often something is repeated."""
    value = attributes.get(name, "1")
    return min(max(int(value), 1), _ROWS) if value.isdecimal() and len(value) < 10 else 1
