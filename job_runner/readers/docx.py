"""DOCX: what a reader of the printed document sees, as paragraphs, headings, lists and tables, in their order.

One pass over the main part as a stream of XML events, in memory that grows with the text alone. What is not text: what
tracked changes deleted or moved away, hidden text, comments, headers and footers, tables of contents (they repeat the
headings), codes of fields, pictures. Footnotes, endnotes and text boxes follow the paragraph that they belong to.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import BinaryIO, ClassVar, Final

from job_runner.document import Kind, ParsedDocument
from job_runner.readers.blocks import SHOWN, Block, Cell, Table, assemble, clean, prefixed
from job_runner.readers.failure import ReadingFailed
from job_runner.readers.numbering import Numbering, integer
from job_runner.readers.package import COMMON_PREFIXES, Attributes, Package

_HEADING_STYLE: Final = re.compile(
    r"(?:heading|标题|標題|見出し|제목|überschrift|titre|título|titolo|заголовок|kop|rubrik)\s*([1-9])", re.IGNORECASE
)
"""Names of heading styles. Word stores its own as "heading 1" in all languages, other writers as they show them."""
_TITLE_STYLE: Final = re.compile(r"title|标题|標題|文档标题|titel", re.IGNORECASE)
_CONTENTS_STYLE: Final = re.compile(
    r"(?:toc|目录|目錄)\s*(?:[1-9]|heading|标题|標題)|contents? heading|table of figures", re.IGNORECASE
)
_STYLE_DEPTH: Final = 20
"""Styles that a style may be based on, one upon the other; it ends a chain that bites its tail."""
_TABLE_DEPTH: Final = 20
"""Tables in one another that are read as tables; deeper ones only give their text."""
_COLUMN_LIMIT: Final = 63
"""Columns of a table; Word has no more."""
_LEVELS: Final = 9
_BODY: Final = -1
"""Outline level of text that is no heading, whatever its style says."""
_SKIPPED: Final = frozenset({
    "del", "moveFrom", "delText", "instrText", "delInstrText", "rt", "sectPr", "object",
    "pPrChange", "rPrChange", "tblPrChange", "trPrChange", "tcPrChange", "tblPrExChange", "tblGridChange", "sectPrChange",
    "numberingChange", "headerReference", "footerReference",
})  # fmt: skip
"""Elements without text of today: what was deleted, moved away, or what properties used to be."""


class _Docx(Package):
    """A DOCX. Names of XML have no prefix in WordprocessingML's namespaces, transitional or strict."""

    FORMAT: ClassVar = "DOCX"
    MARKS: ClassVar = ("wordprocessingml", "ms-word")  # .docx and .dotx; .docm and .dotm, whose macros are not read
    PREFIXES: ClassVar = COMMON_PREFIXES | {
        "http://schemas.openxmlformats.org/wordprocessingml/2006/main": "",
        "http://purl.oclc.org/ooxml/wordprocessingml/main": "",
        "http://schemas.openxmlformats.org/officeDocument/2006/math": "m:",
        "http://purl.oclc.org/ooxml/officeDocument/math": "m:",
    }


def read_docx(file: BinaryIO, *, name: str) -> ParsedDocument:
    """Read a DOCX.

    Raises :class:`ReadingFailed`: DocumentRefused for other archives and for bombs, DocumentUnreadable for a damaged file,
    DocumentEmpty for one without text.
    """
    with _Docx.opened(file, name=name) as package:
        styles = _Styles(package)
        numbering = Numbering(package)
        notes: dict[str, list[Block]] = {}
        for kind in ("footnote", "endnote"):
            part = package.related(f"{kind}s")
            if part is not None:
                reader = _Reader(styles, numbering, notes={})
                package.parse(part, start=reader.start, end=reader.end, text=reader.text)
                notes |= reader.found_notes
        reader = _Reader(styles, numbering, notes=notes)
        package.parse(package.main, start=reader.start, end=reader.end, text=reader.text)
    document = assemble(_below_title(reader.blocks()), kind=Kind.DOCX)
    if not document.text:
        message = f"cannot index {name}: there is no text in it; text in pictures needs OCR: save it as PDF"
        raise ReadingFailed("DocumentEmpty", message)
    if reader.page_breaks == 0:
        return replace(document, pages=document.pages[:1])
    return document


_TITLE: Final = 100
"""Level of a paragraph in the style Title until the document is whole."""


def _below_title(blocks: list[Block]) -> list[Block]:
    """Put a title above all other headings. A second one is a heading of the first level as well."""
    if not any(block.level == _TITLE for block in blocks):
        return blocks
    return [
        replace(block, level=1 if block.level == _TITLE else block.level + 1) if block.level else block for block in blocks
    ]


# -------------------------------------------------------------------------------------------------------------- styles


@dataclass(slots=True)
class _Style:
    name: str = ""
    parent: str | None = None
    outline: int | None = None
    number_id: str | None = None
    number_level: int | None = None
    hidden: bool | None = None
    marks_first_row: bool = False
    """A table style that sets the first row apart."""


@dataclass(frozen=True, slots=True)
class _Resolved:
    """What a style and those it is based on say together."""

    level: int = 0
    contents: bool = False
    number_id: str | None = None
    number_level: int | None = None
    hidden: bool = False
    marks_first_row: bool = False


class _Styles:
    """The styles of a document."""

    def __init__(self, package: Package) -> None:
        self._styles: dict[str, _Style] = {}
        self._default: str | None = None
        self._resolved: dict[str | None, _Resolved] = {}
        part = package.related("styles")
        if part is not None:
            self._read(package, part)

    def __getitem__(self, style: str | None) -> _Resolved:
        """Return a paragraph's or table's style by its id; ``None``: that of paragraphs without one."""
        if style not in self._resolved:
            self._resolved[style] = self._resolve(style or self._default)
        return self._resolved[style]

    def _resolve(self, style: str | None) -> _Resolved:
        chain: list[_Style] = []
        while style is not None and style in self._styles and len(chain) < _STYLE_DEPTH:
            chain.append(self._styles[style])
            style = chain[-1].parent
        level = next((found for one in chain if (found := _level(one)) is not None), 0)
        return _Resolved(
            level=max(level, 0),
            contents=any(_CONTENTS_STYLE.fullmatch(one.name) for one in chain[:2]),
            number_id=next((one.number_id for one in chain if one.number_id is not None), None),
            number_level=next((one.number_level for one in chain if one.number_level is not None), None),
            hidden=next((one.hidden for one in chain if one.hidden is not None), False),
            marks_first_row=any(one.marks_first_row for one in chain),
        )

    def _read(self, package: Package, part: str) -> None:
        style = _Style()

        def start(name: str, attributes: Attributes) -> None:
            nonlocal style
            value = attributes.get("val", "")
            match name:
                case "style":
                    identity = attributes.get("styleId", "")
                    style = self._styles[identity] = _Style()
                    if attributes.get("type") == "paragraph" and _on(attributes.get("default", "0")):
                        self._default = identity
                case "name":
                    style.name = value.strip()
                case "basedOn":
                    style.parent = value
                case "outlineLvl":
                    style.outline = _outline(value)
                case "numId":
                    style.number_id = value
                case "ilvl":
                    style.number_level = integer(value, default=0)
                case "vanish":
                    style.hidden = _on(attributes.get("val"))
                case "tblStylePr":
                    style.marks_first_row |= attributes.get("type") == "firstRow"

        package.parse(part, start=start, end=lambda name: None)


def _level(style: _Style) -> int | None:
    """Return the heading level that a style by itself has; ``None``: it says nothing, ``_BODY``: it is no heading."""
    if style.outline is not None:
        return style.outline
    if found := _HEADING_STYLE.fullmatch(style.name):
        return int(found.group(1))
    return _TITLE if _TITLE_STYLE.fullmatch(style.name) else None


def _outline(value: str) -> int:
    """Return the heading level of an outline level, which counts from 0; 9 is body text."""
    level = integer(value, default=_LEVELS)
    return level + 1 if 0 <= level < _LEVELS else _BODY


def _on(value: str | None) -> bool:
    """Read a switch: it is on by being there."""
    return value is None or value.lower() not in {"0", "false", "off", "none"}


# ---------------------------------------------------------------------------------------------------------------- text


@dataclass(slots=True)
class _Paragraph:
    """A paragraph that is open."""

    parts: list[str] = field(default_factory=list)
    length: int = 0
    breaks: list[int] = field(default_factory=list)
    style: str | None = None
    outline: int | None = None
    number_id: str | None = None
    number_level: int | None = None
    mark_deleted: bool = False
    """Its end was deleted: it goes on in the next paragraph."""
    bold: bool = True
    """All its text so far is bold."""
    following: list[Block] = field(default_factory=list)
    """Text boxes and notes."""


@dataclass(slots=True)
class _Flow:
    """A sequence of paragraphs: the body, a cell, a text box, a note."""

    blocks: list[Block] = field(default_factory=list)
    carried: _Paragraph | None = None
    """A paragraph whose end was deleted."""
    bold: bool = True
    """All its text so far is bold."""


@dataclass(slots=True)
class _OpenTable:
    table: Table
    style: str | None = None
    first_row_apart: bool = True
    """The table uses what its style has for the first row."""
    bold_rows: list[bool] = field(default_factory=list)
    row: list[Cell] = field(default_factory=list)
    row_is_header: bool = False
    row_is_bold: bool = True
    row_deleted: bool = False
    columns: int = 1
    dropped: bool = False
    """The cell was deleted, or continues one above or before it: its text was there."""


class _Reader:
    """Turns the events of a part into blocks."""

    def __init__(self, styles: _Styles, numbering: Numbering, *, notes: dict[str, list[Block]]) -> None:
        self.found_notes: dict[str, list[Block]] = {}
        self.page_breaks = 0
        self._styles = styles
        self._numbering = numbering
        self._notes = notes
        self._noted: dict[str, int] = {}
        self._flows = [_Flow()]
        self._paragraphs: list[_Paragraph] = []
        self._tables: list[_OpenTable | None] = []
        """Tables that are open; ``None`` for one that is too deep."""
        self._groups = 0
        self._list_group = 0
        self._skip = 0
        self._properties = ""
        """Whose properties are being read: ``p``, ``tr``, ``tc``; those of runs are not counted."""
        self._hidden = False
        self._bold = False
        self._text: list[str] | None = None
        self._keep_spaces = False
        self._alternatives: list[bool] = []
        """For each choice between representations that is open: whether one was read."""
        self._controls: list[bool] = []
        """For each content control that is open: whether what it shows is no text of the document."""
        self._note = ""
        self._starts: dict[str, Callable[[Attributes], None]] = {
            "p": self._start_paragraph,
            "pPr": lambda attributes: self._within("p"),
            "trPr": lambda attributes: self._within("tr"),
            "tcPr": lambda attributes: self._within("tc"),
            "del": self._mark_deleted,
            "moveFrom": self._mark_deleted,
            "cellDel": self._mark_deleted,
            "pStyle": self._set_style,
            "outlineLvl": self._set_outline,
            "numId": self._set_number,
            "ilvl": self._set_number_level,
            "r": self._start_run,
            "vanish": self._set_hidden,
            "b": self._set_bold,
            "t": self._start_text,
            "m:t": self._start_text,
            "tab": lambda attributes: self._add("\t"),
            "ptab": lambda attributes: self._add("\t"),
            "br": lambda attributes: self._add("\n"),
            "cr": lambda attributes: self._add("\n"),
            "noBreakHyphen": lambda attributes: self._add("-"),
            "lastRenderedPageBreak": self._break_page,
            "footnoteReference": lambda attributes: self._refer(f"footnote {attributes.get('id')}"),
            "endnoteReference": lambda attributes: self._refer(f"endnote {attributes.get('id')}"),
            "footnote": lambda attributes: self._start_note("footnote", attributes),
            "endnote": lambda attributes: self._start_note("endnote", attributes),
            "txbxContent": lambda attributes: self._flows.append(_Flow()),
            "tbl": self._start_table,
            "tblStyle": self._set_table_style,
            "tblLook": self._set_table_look,
            "tr": self._start_row,
            "tblHeader": self._set_row_header,
            "gridBefore": self._indent_row,
            "tc": self._start_cell,
            "gridSpan": self._set_columns,
            "vMerge": self._set_merged,
            "hMerge": self._set_merged,
            "mc:AlternateContent": lambda attributes: self._alternatives.append(False),
            "mc:Choice": self._choose,
            "mc:Fallback": self._choose,
            "sdt": lambda attributes: self._controls.append(False),
            "docPartGallery": self._set_gallery,
            "showingPlcHdr": self._set_placeholder,
            "sdtContent": self._start_control,
        }
        self._ends: dict[str, Callable[[], None]] = {
            "p": self._end_paragraph,
            "pPr": lambda: self._within(""),
            "trPr": lambda: self._within(""),
            "tcPr": lambda: self._within(""),
            "r": self._end_run,
            "t": self._end_text,
            "m:t": self._end_text,
            "footnote": self._end_note,
            "endnote": self._end_note,
            "txbxContent": self._end_text_box,
            "tbl": self._end_table,
            "tr": self._end_row,
            "tc": self._end_cell,
            "mc:AlternateContent": lambda: _pop(self._alternatives),
            "sdt": lambda: _pop(self._controls),
        }

    def blocks(self) -> list[Block]:
        """Return the blocks of the body, once its part was read."""
        return self._ended(self._flows[0])

    def start(self, name: str, attributes: Attributes) -> None:
        """Begin an element."""
        if self._skip:
            self._skip += 1
        elif name in _SKIPPED and not (self._properties and name in {"del", "moveFrom"}):
            self._skip = 1
        elif (starts := self._starts.get(name)) is not None:
            starts(attributes)

    def end(self, name: str) -> None:
        """End an element."""
        if self._skip:
            self._skip -= 1
        elif (ends := self._ends.get(name)) is not None:
            ends()

    def text(self, text: str) -> None:
        """Take text; only that in <t> is text."""
        if self._text is not None and not self._skip:
            self._text.append(text)

    # ------------------------------------------------------------------------------------------------------ paragraphs

    def _within(self, properties: str) -> None:
        self._properties = properties

    def _start_paragraph(self, attributes: Attributes) -> None:
        flow = self._flows[-1]
        paragraph = _Paragraph()
        if (carried := flow.carried) is not None:
            # Where the mark between two paragraphs was deleted, the properties of the second one hold for both.
            flow.carried = None
            paragraph = replace(carried, style=None, outline=None, number_id=None, number_level=None, mark_deleted=False)
        self._paragraphs.append(paragraph)

    def _end_paragraph(self) -> None:
        if not self._paragraphs:
            return
        paragraph = self._paragraphs.pop()
        flow = self._flows[-1]
        if paragraph.mark_deleted:
            flow.carried = paragraph
        else:
            self._finish(paragraph, flow)

    def _finish(self, paragraph: _Paragraph, flow: _Flow) -> None:
        """Add a paragraph and what belongs to it to its flow."""
        style = self._styles[paragraph.style]
        block = clean("".join(paragraph.parts), breaks=paragraph.breaks)
        level = style.level if paragraph.outline is None else max(paragraph.outline, 0)
        number_id = paragraph.number_id or style.number_id
        label, depth = "", 0
        if number_id is not None:
            number_level = style.number_level if paragraph.number_level is None else paragraph.number_level
            label, depth = self._numbering.label(number_id, number_level, style=paragraph.style)
        if style.contents or style.hidden:
            block = replace(block, text="", breaks=(0,) * len(block.breaks))
        if not block.text:
            flow.blocks += [block] if block.breaks else []
        elif level:
            self._list_group = 0
            flow.blocks.append(replace(prefixed(block, "" if label == "- " else label), level=level))
        elif label:
            self._list_group = self._list_group or self._next_group()
            flow.blocks.append(replace(prefixed(block, "  " * depth + label), group=self._list_group))
        else:
            self._list_group = 0
            flow.blocks.append(block)
        if block.text:
            flow.bold &= paragraph.bold
        flow.blocks += paragraph.following

    def _ended(self, flow: _Flow) -> list[Block]:
        """Return the blocks of a flow that has ended."""
        if flow.carried is not None:
            self._finish(flow.carried, flow)
            flow.carried = None
        return flow.blocks

    def _next_group(self) -> int:
        self._groups += 1
        return self._groups

    def _mark_deleted(self, attributes: Attributes) -> None:
        """Take a deleted or moved away paragraph mark, row or cell."""
        table = self._tables[-1] if self._tables else None
        match self._properties:
            case "p" if self._paragraphs:
                self._paragraphs[-1].mark_deleted = True
            case "tr" if table is not None:
                table.row_deleted = True
            case "tc" if table is not None:
                table.dropped = True

    def _set_style(self, attributes: Attributes) -> None:
        if self._properties == "p" and self._paragraphs:
            self._paragraphs[-1].style = attributes.get("val")

    def _set_outline(self, attributes: Attributes) -> None:
        if self._properties == "p" and self._paragraphs:
            self._paragraphs[-1].outline = _outline(attributes.get("val", ""))

    def _set_number(self, attributes: Attributes) -> None:
        if self._properties == "p" and self._paragraphs:
            self._paragraphs[-1].number_id = attributes.get("val")

    def _set_number_level(self, attributes: Attributes) -> None:
        if self._properties == "p" and self._paragraphs:
            self._paragraphs[-1].number_level = integer(attributes.get("val"), default=0)

    # ------------------------------------------------------------------------------------------------------------ runs

    def _start_run(self, attributes: Attributes) -> None:
        self._hidden = self._bold = False

    def _end_run(self) -> None:
        self._hidden = False

    def _set_hidden(self, attributes: Attributes) -> None:
        if not self._properties:
            self._hidden = _on(attributes.get("val"))

    def _set_bold(self, attributes: Attributes) -> None:
        if not self._properties:
            self._bold = _on(attributes.get("val"))

    def _start_text(self, attributes: Attributes) -> None:
        self._text = []
        self._keep_spaces = attributes.get("xml:space") == "preserve"

    def _end_text(self) -> None:
        text = "".join(self._text or ()).translate(SHOWN)
        self._text = None
        self._add(text if self._keep_spaces else text.strip())

    def _add(self, text: str) -> None:
        """Add text to the paragraph."""
        if self._hidden or self._properties or not self._paragraphs or not text:
            return
        paragraph = self._paragraphs[-1]
        paragraph.parts.append(text)
        paragraph.length += len(text)
        if not self._bold and not text.isspace():
            paragraph.bold = False

    def _break_page(self, attributes: Attributes) -> None:
        if self._paragraphs:
            paragraph = self._paragraphs[-1]
            paragraph.breaks.append(paragraph.length)
            self.page_breaks += 1

    # ------------------------------------------------------------------------------------------- notes and text boxes

    def _refer(self, note: str) -> None:
        """Take a reference to a note: ``[1]`` here, and the note below the paragraph, once."""
        blocks = self._notes.get(note)
        if not blocks or not self._paragraphs or self._hidden:
            return
        if note not in self._noted:
            self._noted[note] = len(self._noted) + 1
            first, *others = blocks
            self._paragraphs[-1].following += [prefixed(first, f"[{self._noted[note]}] "), *others]
        self._add(f"[{self._noted[note]}]")

    def _start_note(self, kind: str, attributes: Attributes) -> None:
        # Those with a type are the lines between text and notes.
        self._note = "" if attributes.get("type", "normal") != "normal" else f"{kind} {attributes.get('id')}"
        self._flows.append(_Flow())

    def _end_note(self) -> None:
        blocks = self._ended(self._flows.pop())
        if self._note:
            self.found_notes[self._note] = [replace(block, level=0, breaks=()) for block in blocks if block.text]

    def _end_text_box(self) -> None:
        blocks = self._ended(self._flows.pop())
        if self._paragraphs:
            self._paragraphs[-1].following += blocks
        else:
            self._flows[-1].blocks += blocks

    # ---------------------------------------------------------------------------------------------------------- tables

    def _start_table(self, attributes: Attributes) -> None:
        deep = len(self._tables) >= _TABLE_DEPTH
        self._tables.append(None if deep else _OpenTable(Table(group=self._next_group())))

    def _end_table(self) -> None:
        table = self._tables.pop() if self._tables else None
        if table is None:
            return
        rows = table.table
        if not rows.header_rows and len(rows.rows) > 1:
            styled = table.first_row_apart and self._styles[table.style].marks_first_row
            rows.header_rows = int(styled or (table.bold_rows[0] and not all(table.bold_rows)))
        self._flows[-1].blocks += rows.blocks()

    def _set_table_style(self, attributes: Attributes) -> None:
        if table := self._table():
            table.style = attributes.get("val")

    def _set_table_look(self, attributes: Attributes) -> None:
        if table := self._table():
            bits = attributes.get("val", "")
            by_bits = bool(int(bits, 16) & 0x20) if re.fullmatch(r"[0-9A-Fa-f]{4}", bits) else True
            table.first_row_apart = _on(attributes["firstRow"]) if "firstRow" in attributes else by_bits

    def _start_row(self, attributes: Attributes) -> None:
        if table := self._table():
            table.row, table.row_is_header, table.row_is_bold, table.row_deleted = [], False, True, False

    def _end_row(self) -> None:
        if (table := self._table()) is None or table.row_deleted:
            return
        if table.row_is_header and table.table.header_rows == len(table.table.rows):
            table.table.header_rows += 1
        table.table.rows.append(table.row)
        table.bold_rows.append(table.row_is_bold)

    def _set_row_header(self, attributes: Attributes) -> None:
        if table := self._table():
            table.row_is_header = _on(attributes.get("val"))

    def _indent_row(self, attributes: Attributes) -> None:
        if (table := self._table()) and (columns := self._columns(attributes)):
            table.row.append(Cell(columns=columns))

    def _start_cell(self, attributes: Attributes) -> None:
        if table := self._table():
            table.columns, table.dropped = 1, False
            self._flows.append(_Flow())

    def _end_cell(self) -> None:
        if table := self._table():
            flow = self._flows.pop()
            blocks = self._ended(flow)
            if table.dropped:
                blocks = []
            table.row_is_bold &= flow.bold
            table.row.append(Cell(blocks=blocks, columns=table.columns))

    def _set_columns(self, attributes: Attributes) -> None:
        if table := self._table():
            table.columns = max(self._columns(attributes), 1)

    def _set_merged(self, attributes: Attributes) -> None:
        if table := self._table():
            table.dropped |= attributes.get("val", "continue") != "restart"

    @staticmethod
    def _columns(attributes: Attributes) -> int:
        return min(max(integer(attributes.get("val"), default=0), 0), _COLUMN_LIMIT)

    def _table(self) -> _OpenTable | None:
        return self._tables[-1] if self._tables else None

    # ----------------------------------------------------------------------------------- alternatives, content controls

    def _choose(self, attributes: Attributes) -> None:
        """Read the first of several representations of the same thing: a text box comes as a drawing and as VML."""
        if not self._alternatives or self._alternatives[-1]:
            self._skip = 1
        else:
            self._alternatives[-1] = True

    def _set_gallery(self, attributes: Attributes) -> None:
        if self._controls and attributes.get("val") == "Table of Contents":
            self._controls[-1] = True

    def _set_placeholder(self, attributes: Attributes) -> None:
        if self._controls and _on(attributes.get("val")):
            self._controls[-1] = True

    def _start_control(self, attributes: Attributes) -> None:
        if self._controls and self._controls[-1]:
            self._skip = 1


def _pop(stack: list[bool]) -> None:
    if stack:
        stack.pop()
