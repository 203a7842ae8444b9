"""Blocks of text and their assembly to a document: what DOCX and HTML have in common once their markup is understood."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from job_runner.document import Heading, Kind, Page, ParsedDocument

INVISIBLE: Final[dict[int, str | None]] = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))
"""For ``translate``: soft hyphen and zero-width characters go, as words with them in it would not be found."""
SHOWN: Final[dict[int, str | None]] = INVISIBLE | dict.fromkeys(map(ord, "\t\n\f\r\xa0"), " ")
"""For ``translate``: white space in markup is a space as well."""
_LABEL_LIMIT: Final = 80
"""Characters of a column's header that every row repeats; a longer one is prose, and repeating it would bloat the text."""
_GUESSED_LABEL_LIMIT: Final = 30
_HAS_LETTER: Final = re.compile(r"[^\W\d_]")
_SPACES: Final = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, a heading, a list item or a row of a table."""

    text: str
    """Without white space at its edges. Empty: only its page breaks count."""
    level: int = 0
    """Level of a heading, 1 is the highest; 0: no heading."""
    group: int = 0
    """Blocks of one group follow each other line by line; others, and those of group 0, are parted by an empty line."""
    breaks: tuple[int, ...] = ()
    """Offsets in ``text`` at which a page begins."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table."""

    blocks: Sequence[Block] = ()
    columns: int = 1
    """Columns that it covers. What a cell covers in further rows are cells without blocks there: its text comes once."""
    header: bool = False


@dataclass(slots=True)
class Table:
    """A table as it was written; :meth:`blocks` decides what it is."""

    group: int
    rows: list[list[Cell]] = field(default_factory=list)
    header_rows: int = 0
    """Rows at the top that the file marks as the header."""
    layout: bool = False
    """The file says that it only places things."""

    def blocks(self) -> list[Block]:
        """Return the rows as lines, each with the headers of its columns: ``| City: Oslo | Population: 717,710 |``.

        A chunk that holds any row then says what its values are, wherever the text is cut. A table that only places things
        (one column or one row, headings or nested tables in its cells without a marked header) gives its cells' blocks.
        """
        rows = [row for row in self.rows if any(cell.blocks for cell in row)]
        if not rows:
            return []
        if self._places(rows, header_rows=self.header_rows):
            return [block for row in rows for cell in row for block in cell.blocks]
        titles = _titles(rows)
        header_end = max(titles, min(self.header_rows, len(rows)))
        if header_end == titles and _looks_like_header(rows[titles:]):
            header_end += 1
        labels = _labels(rows[titles:header_end])
        return [self._line(row, labels if number >= header_end else {}) for number, row in enumerate(rows)]

    def _places(self, rows: Sequence[Sequence[Cell]], *, header_rows: int) -> bool:
        if self.layout or max(len(row) for row in rows) == 1:
            return True
        if header_rows or any(cell.header for row in rows for cell in row):
            return False
        cells = [cell for row in rows for cell in row]
        return len(rows) == 1 or any(block.level or block.text.startswith("| ") for cell in cells for block in cell.blocks)

    def _line(self, row: Sequence[Cell], labels: dict[int, str]) -> Block:
        """Return a row as one line."""
        values: list[str] = []
        breaks = 0
        early = False
        column = 0
        previous: Cell | None = None
        for cell in row:
            value = _flat(cell.blocks)
            # A row that runs over to the next page has the break in each of its cells.
            if cell_breaks := sum(len(block.breaks) for block in cell.blocks):
                breaks = max(breaks, cell_breaks)
                early |= cell.blocks[0].breaks[:1] == (0,)
            if value:
                names = dict.fromkeys(labels[at] for at in range(column, column + cell.columns) if at in labels)
                label = " / ".join(names)[:_LABEL_LIMIT]
                named = previous is not None and (previous.header or values[-1].endswith((":", "：")))
                if named and not labels and not cell.header and len(row) == 2:
                    label = values.pop().rstrip(":：")  # a row with a header of its own: name and value
                values.append(f"{label}: {value}" if label and label != value else value)
            column += cell.columns
            previous = cell if value else None
        text = f"| {' | '.join(values)} |" if values else ""
        positions = (0 if early else len(text),) * min(breaks, 1) + (len(text),) * max(breaks - 1, 0)
        return Block(text=text, group=self.group, breaks=positions)


def _flat(blocks: Iterable[Block]) -> str:
    return _SPACES.sub(" ", " ".join(block.text for block in blocks if block.text))


def _titles(rows: Sequence[Sequence[Cell]]) -> int:
    """Return how many rows at the top are a title of the table: one cell above all columns."""
    width = max(sum(cell.columns for cell in row) for row in rows)
    for number, row in enumerate(rows):
        filled = [cell for cell in row if _flat(cell.blocks)]
        if len(filled) != 1 or filled[0].columns < width or width == 1:
            return number
    return 0


def _looks_like_header(rows: Sequence[Sequence[Cell]]) -> bool:
    """Tell whether the first row of an unmarked table names its columns.

    Of two columns it more likely is a name and its value, as all the rows are.
    """
    first = [_flat(cell.blocks) for cell in rows[0]] if rows else []
    return (
        len(rows) > 1
        and len(first) > 2
        and len(set(first)) == len(first)
        and all(0 < len(text) <= _GUESSED_LABEL_LIMIT and _HAS_LETTER.search(text) for text in first)
        and sum(len(row) == len(first) for row in rows) * 2 > len(rows)
    )


def _labels(header: Sequence[Sequence[Cell]]) -> dict[int, str]:
    """Return the label of each column: the texts above it, from the top down."""
    parts: dict[int, list[str]] = {}
    for row in header:
        column = 0
        for cell in row:
            text = _flat(cell.blocks).rstrip(":：")
            if 0 < len(text) <= _LABEL_LIMIT:
                for covered in range(column, column + cell.columns):
                    if text not in parts.setdefault(covered, []):
                        parts[covered].append(text)
            column += cell.columns
    return {column: " ".join(texts)[:_LABEL_LIMIT] for column, texts in parts.items()}


def assemble(blocks: Iterable[Block], *, kind: Kind, title: str | None = None) -> ParsedDocument:
    """Join blocks to a document; ``title`` becomes a heading above all if there is none of the first level."""
    assembly = Assembly()
    assembly.page(1)
    assembly.extend(blocks)
    return assembly.document(kind, title=title)


class Assembly:
    """A document that grows block by block."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._pages: list[Page] = []
        self._headings: list[Heading] = []
        self._length = 0
        self._group = 0
        self._waiting: list[int | tuple[str, int]] = []
        """Numbers of pages, and titles of headings with their levels, that begin with the next text."""

    def page(self, number: int) -> None:
        """Begin a page; the first one before any block."""
        self._waiting.append(number)
        self._group = 0

    def heading(self, title: str, *, level: int) -> None:
        """Put what comes below a heading that is not in the text."""
        self._waiting.append((title, level))

    def extend(self, blocks: Iterable[Block]) -> None:
        """Add blocks."""
        for block in blocks:
            self.add(block)

    def add(self, block: Block) -> None:
        """Add a block."""
        if block.text:
            if self._parts:
                glue = "\n" if block.group and block.group == self._group else "\n\n"
                self._parts.append(glue)
                self._length += len(glue)
            self._group = block.group
        if block.text or block.breaks:
            self._begin()
        for offset in block.breaks:
            self._pages.append(Page(number=self._pages[-1].number + 1, start=self._length + offset))
        if not block.text:
            return
        self._parts.append(block.text)
        start, self._length = self._length, self._length + len(block.text)
        if block.level:
            title = " ".join(block.text.split())
            self._headings.append(Heading(start=start, end=self._length, level=block.level, title=title))

    def document(self, kind: Kind, *, title: str | None = None, failed_pages: Iterable[int] = ()) -> ParsedDocument:
        """Return the document; ``title`` becomes a heading above all if there is none of the first level."""
        self._begin()
        headings = self._headings
        if title and all(heading.level > 1 for heading in headings):
            headings = [Heading(start=0, end=0, level=1, title=title), *headings]
        return ParsedDocument(
            kind=kind,
            text="".join(self._parts),
            pages=tuple(self._pages),
            headings=tuple(headings),
            failed_pages=tuple(failed_pages),
        )

    def _begin(self) -> None:
        for begun in self._waiting:
            if isinstance(begun, int):
                self._pages.append(Page(number=begun, start=self._length))
            else:
                title, level = begun
                self._headings.append(Heading(start=self._length, end=self._length, level=level, title=title))
        self._waiting.clear()


def clean(text: str, *, breaks: Sequence[int] = ()) -> Block:
    """Return a block of a text that may have white space at its edges; page breaks keep their places in it."""
    stripped = text.strip()
    if not breaks:
        return Block(text=stripped)
    cut = len(text) - len(text.lstrip())
    return Block(text=stripped, breaks=tuple(min(max(at - cut, 0), len(stripped)) for at in breaks))


def prefixed(block: Block, prefix: str) -> Block:
    """Return a block with something before its text, on the page where the text begins."""
    if not block.text or not prefix:
        return block
    return replace(block, text=prefix + block.text, breaks=tuple(at and at + len(prefix) for at in block.breaks))
