"""XLSX and XLS, by calamine: the values of their cells, those of an XLSX with their units. (An XLS of which a sheet is
damaged: :mod:`job_runner.readers.xls`.)

calamine holds every cell between the first and the last one of a sheet, has no bounds on what it inflates, and Rust aborts
the process where memory is wanting. So an XLSX is looked at before: its parts are inflated within bounds, and a sheet whose
cells lie far from each other is written anew without what is empty between them.
"""

import datetime
import io
import re
import zipfile
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar, Final

from job_runner.document import Kind, ParsedDocument
from job_runner.readers.failure import OnProgress, ReadingFailed
from job_runner.readers.grid import Row, cleaned, lines
from job_runner.readers.package import COMMON_PREFIXES, Attributes, Package
from job_runner.readers.workbook import Place, Sheet, SheetFailed, document, merged

_AREA_LIMIT: Final = 8_000_000
"""Cells between the first and the last one of a sheet: calamine holds 24 bytes for each, filled or empty."""
_REFERENCE: Final = re.compile(rb"""\sr\s*=\s*["']\s*([A-Za-z]{1,3})(\d{1,7})\s*["']""")
_CELL: Final = re.compile(rb"<(?:[\w.-]+:)?c\s[^>]*>")
_STYLE: Final = re.compile(rb"""\ss\s*=\s*["']\s*(\d+)""")
_PLACES_OF_OTHERS: Final = re.compile(
    rb"""(<(?:[\w.-]+:)?row\b[^>]*?)\sr\s*=\s*["'][^"']*["']|<(?:[\w.-]+:)?(?:mergeCell|dimension)\b[^>]*>"""
)
"""Numbers of rows, and tags that name cells and have no text."""
_FORMAT_TOKEN: Final = re.compile(
    r"""(?P<end>;)|"(?P<literal>[^"]*)"|\\(?P<escaped>.)|_.|\*.|\[\$(?P<currency>[^\]-]*)[^\]]*\]"""
    r"""|(?P<condition>\[[<>=])|\[[^\]]*\]"""
    r"""|(?P<digits>[0#?.,]+(?:E[-+]0+)?)|(?P<mark>[%‰$€£¥₩₽+() -])|(?P<other>.)""",
    re.DOTALL,
)
"""Pieces of the format of a number; what has no name is there for looks."""
_PASSWORD: Final = re.compile(rb"\x09\x08(?:\x10\0.{16}|\x08\0.{8})(?:\x86\0\0\0)?\x2f\0", re.DOTALL)
"""The record FilePass of an XLS behind the one that begins its workbook ([MS-XLS] 2.1.7.20.3), where passwords are."""
_STRETCH: Final = 2**20
"""Bytes without a tag that are kept to see where one begins."""
_EXACT: Final = 1e15
"""Whole numbers below it are written in full. Workbooks keep 15 digits."""


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


class _Xlsx(Package):
    """An XLSX. Names of XML have no prefix in SpreadsheetML's namespaces, transitional or strict."""

    FORMAT: ClassVar = "XLSX"
    MARKS: ClassVar = ("spreadsheetml", "ms-excel")
    PREFIXES: ClassVar = COMMON_PREFIXES | {
        "http://schemas.openxmlformats.org/spreadsheetml/2006/main": "",
        "http://purl.oclc.org/ooxml/spreadsheetml/main": "",
    }

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
        formats = self._formats()
        checked = _Checked()
        for name, part in sheets:
            try:
                found = _Cells(self.pieces(part), formats=formats)
                if found.area > _AREA_LIMIT:
                    checked.closed_up[part] = _closed_up(b"".join(self.pieces(part)))
                    found = _Cells([checked.closed_up[part]], formats=formats)
                checked.formats[name] = found.formats
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

    def _formats(self) -> dict[bytes, "_Format"]:
        """Return the formats that add to a number what it is, by the numbers of their styles."""
        codes = {"9": "0%", "10": "0.00%"}
        styles: list[str] = []
        path: list[str] = []

        def start(name: str, attributes: Attributes) -> None:
            path.append(name)
            if name == "numFmt":
                codes[attributes.get("numFmtId", "")] = attributes.get("formatCode", "")
            elif name == "xf" and "cellXfs" in path:
                styles.append(attributes.get("numFmtId", ""))

        def end(name: str) -> None:
            path.pop()

        part = self.related("styles")
        if part is None:
            return {}
        self.parse(part, start=start, end=end)
        known = {identity: _format_of(code) for identity, code in codes.items()}
        shown = {str(number).encode(): known.get(style) for number, style in enumerate(styles)}
        return {style: found for style, found in shown.items() if found is not None}


@dataclass(frozen=True, slots=True)
class _Format:
    """How a number is shown, as far as that says what it is: its unit, its currency, that it is a percentage."""

    before: str
    after: str
    factor: float = 1

    def write(self, number: float) -> str:
        """Return a number with what belongs to it; its digits stay as they are."""
        shown = f"{number * self.factor:.12g}" if self.factor != 1 else _text(float(number))
        return cleaned(f"{self.before}{shown}{self.after}")


def _format_of(code: str) -> _Format | None:
    """Read the first section of a format (ECMA-376 part 1, 18.8.31).

    ``None``: it adds nothing, is one of dates or of text, or depends on the number.
    """
    texts = ["", ""]
    factor = 1.0
    digits = False
    for token in _FORMAT_TOKEN.finditer(code):
        match token.lastgroup:
            case "end":
                break
            case "other" | "condition":
                return None
            case "digits":
                if digits and texts[1]:
                    return None  # a number in several pieces, as those of telephones
                digits = True
                factor /= 1000 ** (len(token.group()) - len(token.group().rstrip(",")))
            case "literal" | "escaped" | "currency" | "mark":
                text = token[token.lastgroup]
                texts[digits] += text
                factor *= 100 if text == "%" and token.lastgroup == "mark" else 1
    before, after = (text.strip() and text for text in texts)
    return _Format(before, after, factor) if digits and (before or after) else None


@dataclass(slots=True)
class _Checked:
    """What is known of an XLSX before calamine reads it."""

    broken: dict[str, str] = field(default_factory=dict)
    """Why a sheet must not be read, by its name."""
    closed_up: dict[str, bytes] = field(default_factory=dict)
    """Parts with sheets whose cells lie too far from each other, without the gaps."""
    formats: dict[str, "_Formats"] = field(default_factory=dict)
    """Formats of cells, by the name of their sheet."""

    def of(self, sheet: str) -> "_Formats":
        """Return the formats of the cells of a sheet.

        Raises ``SheetFailed`` for one that must not be read: also where calamine sees a sheet that was not seen here, as it
        takes no notice of namespaces.
        """
        if sheet in self.broken or sheet not in self.formats:
            raise SheetFailed(f"{sheet!r}: {self.broken.get(sheet, 'the XLSX does not list it as a sheet')}")
        return self.formats[sheet]


_Formats = Mapping[int, Sequence[tuple[int, _Format]]]
"""Formats of the cells of a row with their columns, by its number, both from 0; most rows share theirs."""


class _Cells:
    """Where the cells of a sheet lie and how they are shown, by the attributes in its XML."""

    def __init__(self, pieces: Iterable[bytes], *, formats: Mapping[bytes, _Format]) -> None:
        by_row: dict[int, list[tuple[int, _Format]]] = {}
        shared: dict[tuple[tuple[int, _Format], ...], tuple[tuple[int, _Format], ...]] = {}
        self.formats: dict[int, Sequence[tuple[int, _Format]]] = {}
        rows: set[int] = set()
        columns: set[bytes] = set()
        for tags in _whole_tags(pieces):
            if references := _REFERENCE.findall(tags):
                columns.update([column for column, _ in references])
                numbers = [int(row) for _, row in references]
                rows |= {min(numbers), max(numbers)}
            if formats:
                for tag in _CELL.findall(tags):
                    if (style := _STYLE.search(tag)) and style[1] in formats and (place := _REFERENCE.search(tag)):
                        by_row.setdefault(int(place[2]) - 1, []).append((_column(place[1]) - 1, formats[style[1]]))
                for row in list(by_row)[:-1]:  # the last one may go on
                    found = tuple(by_row.pop(row))
                    self.formats[row] = shared.setdefault(found, found)
        self.formats |= by_row
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
    from python_calamine import CalamineWorkbook, SheetVisibleEnum

    try:
        with _failures_of_calamine():
            workbook = CalamineWorkbook.from_filelike(file)
    except SheetFailed as error:
        if kind is Kind.XLS and (found := _by_xlrd(file, name=name, on_progress=on_progress)) is not None:
            return found
        message = f"cannot read {name}: the workbook is damaged ({error}); save it again with the program that made it"
        raise ReadingFailed("DocumentUnreadable", message) from error

    def sheet_lines(number: int, sheet: str) -> Iterator[str]:
        formats: _Formats = checked.of(sheet) if checked is not None else {}
        with _failures_of_calamine():
            cells = workbook.get_sheet_by_index(number - 1)
            if cells.start is not None:
                rows = _rows(cells.iter_rows(), start=cells.start, formats=formats)
                yield from lines(merged(rows, cells.merged_cell_ranges or (), top=cells.start[0]))

    metadata = workbook.sheets_metadata
    sheets = (
        Sheet(number, found.name, sheet_lines(number, found.name))
        for number, found in enumerate(metadata, start=1)
        if found.visible == SheetVisibleEnum.Visible
    )
    return document(kind, sheets, name=name, count=len(metadata), on_progress=on_progress)


def _by_xlrd(file: BinaryIO, *, name: str, on_progress: OnProgress) -> ParsedDocument | None:
    """Read those sheets of an XLS that are not damaged; ``None`` where the workbook itself is."""
    from job_runner.readers.xls import DamagedXls

    file.seek(0)
    if _PASSWORD.search(file.read()):
        message = f"cannot read {name}: the workbook is encrypted with a password; store it without one"
        raise ReadingFailed("DocumentUnreadable", message)
    file.seek(0)
    try:
        workbook = DamagedXls(file)
    except SheetFailed:
        return None
    sheets = (
        Sheet(number, title, lines(_rows(workbook.rows(number), start=(0, 0), formats={})))
        for number, title in workbook.shown
    )
    return document(Kind.XLS, sheets, name=name, count=workbook.count, on_progress=on_progress)


@contextmanager
def _failures_of_calamine() -> Iterator[None]:
    """Turn what calamine raises about a damaged workbook into ``SheetFailed``; a panic of its is no :class:`Exception`."""
    from python_calamine import CalamineError

    try:
        yield
    except CalamineError as error:
        raise SheetFailed(str(error)[:200]) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise SheetFailed(str(error)[:200]) from error


def _rows(rows: Iterable[list[Any]], *, start: Place, formats: _Formats) -> Iterator[Row]:
    top, left = start
    for number, values in enumerate(rows, start=top):
        for column, shown in formats.get(number, ()):
            if 0 <= column - left < len(values) and isinstance(found := values[column - left], float):
                values[column - left] = shown.write(found)
        yield {column: text for column, found in enumerate(values, left) if found != "" and (text := _text(found))}


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
