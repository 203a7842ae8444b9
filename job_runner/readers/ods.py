"""ODS: the values as its cells show them, from one stream of XML events."""

from typing import BinaryIO, ClassVar, Final

from job_runner.document import Kind, ParsedDocument
from job_runner.readers.archive import Archive, Attributes
from job_runner.readers.failure import OnProgress, ReadingFailed
from job_runner.readers.grid import Row, cleaned, lines
from job_runner.readers.workbook import Range, Sheet, document, merged

_ROWS: Final = 1_048_576
_COLUMNS: Final = 16_384
"""Size of a sheet in LibreOffice."""
_EMPTY_ROWS: Final = 1000
"""Empty rows that are kept, of any number that follow each other."""
_SKIPPED: Final = frozenset({
    "office:annotation", "office:forms", "table:tracked-changes", "table:dde-links", "table:shapes",
    "draw:frame", "draw:custom-shape", "draw:g", "draw:line", "draw:rect", "draw:control", "draw:caption",
})  # fmt: skip
_VALUES: Final = ("office:string-value", "office:date-value", "office:time-value", "office:boolean-value", "office:value")
"""What a cell holds, where it does not say what it shows."""


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
        reader = _Reader()
        archive.parse("content.xml", start=reader.start, end=reader.end, text=reader.text)
    return document(Kind.ODS, reader.sheets, name=name, count=reader.count, on_progress=on_progress)


class _Reader:
    """Turns the events of the content of an ODS into sheets."""

    def __init__(self) -> None:
        self.sheets: list[Sheet] = []
        self.count = 0
        self._hidden_styles: set[str] = set()
        self._style = ""
        self._skip = 0
        self._name = ""
        self._hidden = False
        self._rows: list[Row] = []
        self._ranges: list[Range] = []
        self._row: dict[int, str] = {}
        self._repeated = 1
        self._column = 0
        self._cell: Attributes | None = None
        self._paragraphs: list[str] = []
        self._within = 0
        """Paragraphs that are open in one another."""

    def start(self, name: str, attributes: Attributes) -> None:
        """Begin an element."""
        if self._skip or name in _SKIPPED:
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
                    found = list(lines(merged(self._rows, self._ranges, top=0)))
                    self.sheets.append(Sheet(self.count, self._name, found))
                self._rows = []

    def text(self, text: str) -> None:
        """Take text; that in paragraphs is what a cell shows."""
        if self._within and not self._skip:
            self._paragraphs[-1] += text

    def _end_cell(self) -> None:
        cell = self._cell or {}
        shown = cleaned("\n".join(self._paragraphs)) or cleaned(next((cell[name] for name in _VALUES if name in cell), ""))
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
