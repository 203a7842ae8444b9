"""PPTX: what the audience of a presentation sees, slide by slide, and what its speaker noted.

Each slide is a page, numbered as PowerPoint does. Its title is a heading, below that of its section where there are several.
Shapes come in their order in the file, which is that of screen readers: text with its bullets and numbers, tables, charts as
tables of their values, diagrams (SmartArt) as lists; the notes come last. What is not text: hidden slides and shapes,
footers, dates and slide numbers, comments, what masters and layouts show on every slide, pictures and their descriptions.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import BinaryIO, ClassVar, Final

from job_runner.document import Kind, ParsedDocument
from job_runner.readers.blocks import SHOWN, Assembly, Block, Cell, Table, clean, prefixed
from job_runner.readers.failure import OnProgress, ReadingFailed
from job_runner.readers.grid import line
from job_runner.readers.numbering import integer, write_number
from job_runner.readers.package import COMMON_PREFIXES, Attributes, Package, Relationship

_TITLE_PLACEHOLDERS: Final = frozenset({"title", "ctrTitle"})
_LIST_PLACEHOLDERS: Final = frozenset({"", "obj", "body"})
"""Placeholders whose paragraphs have bullets unless they say that they have none."""
_LEFT_OUT_PLACEHOLDERS: Final = frozenset({"dt", "ftr", "hdr", "sldNum", "sldImg"})
_CONTAINERS: Final = frozenset({"p:sp", "p:grpSp", "p:graphicFrame", "p:cxnSp"})
_SKIPPED: Final = frozenset({"mc:Fallback", "p:timing", "p:extLst", "a:extLst", "p:pic", "p:oleObj", "p:controls"})
_COLUMN_LIMIT: Final = 1000
_POINT_LIMIT: Final = 1000
"""Values of a series of a chart that are read; of more, nobody reads single ones."""
_OPENING_LIMIT: Final = 80
"""Characters of the first line of a slide that stand in for a title that it lacks."""
_NUMBERED: Final = re.compile(r"(arabic|alphaLc|alphaUc|romanLc|romanUc)(ParenBoth|ParenR|Period|Plain)")
_FORMATS: Final = {"alphaLc": "lowerLetter", "alphaUc": "upperLetter", "romanLc": "lowerRoman", "romanUc": "upperRoman"}
_AROUND: Final = {"ParenBoth": "({})", "ParenR": "{})", "Plain": "{}"}
_NAMESPACES: Final = {
    "presentationml/2006/main": "p:",
    "presentationml/main": "p:",
    "drawingml/2006/main": "a:",
    "drawingml/main": "a:",
    "drawingml/2006/chart": "c:",
    "drawingml/chart": "c:",
    "drawingml/2006/diagram": "dgm:",
    "drawingml/diagram": "dgm:",
    "officeDocument/2006/math": "m:",
    "officeDocument/math": "m:",
}


class _Pptx(Package):
    """A PPTX. Names of XML have the prefixes that most files use, in the transitional and in the strict standard."""

    FORMAT: ClassVar = "PPTX"
    MARKS: ClassVar = ("presentationml", "ms-powerpoint")
    PREFIXES: ClassVar = (
        COMMON_PREFIXES
        | {f"http://schemas.openxmlformats.org/{name}": prefix for name, prefix in _NAMESPACES.items()}
        | {f"http://purl.oclc.org/ooxml/{name}": prefix for name, prefix in _NAMESPACES.items()}
        | {"http://schemas.microsoft.com/office/powerpoint/2010/main": "p14:"}
    )


def read_pptx(file: BinaryIO, *, name: str, on_progress: OnProgress) -> ParsedDocument:
    """Read a PPTX. A slide that is damaged is recorded, and the others are read.

    Raises :class:`ReadingFailed`: DocumentRefused for a bomb, DocumentUnreadable for a damaged file and where no slide can
    be read, DocumentEmpty for one without text.
    """
    assembly = Assembly()
    failed: list[int] = []
    with _Pptx.opened(file, name=name) as package:
        outline = _Outline(package)
        level = 2 if outline.sections else 1
        for number, part in enumerate(outline.slides, start=1):
            if (section := outline.sections.get(number)) is not None:
                assembly.heading(section, level=1)
            try:
                slide = _Slide(package, part, level=level)
            except ReadingFailed as failure:
                if failure.reason != "DocumentUnreadable" or len(failed) + 1 == len(outline.slides):
                    raise
                failed.append(number)
                assembly.page(number)
            else:
                if not slide.hidden:
                    assembly.page(number)
                    _add(assembly, slide, level=level)
            on_progress(number, len(outline.slides))
    document = assembly.document(Kind.PPTX, failed_pages=failed)
    if not document.text:
        message = f"cannot index {name}: there is no text on its slides; text in pictures needs OCR: save it as PDF"
        raise ReadingFailed("DocumentEmpty", message)
    return document


def _add(assembly: Assembly, slide: "_Slide", *, level: int) -> None:
    blocks = slide.blocks()
    if blocks and not blocks[0].level:
        assembly.heading(blocks[0].text.split("\n")[0].lstrip("- ")[:_OPENING_LIMIT], level=level)
    assembly.extend(blocks)


class _Outline:
    """The slides of a presentation."""

    def __init__(self, package: Package) -> None:
        self.slides: list[str] = []
        """Their parts, in order."""
        self.sections: dict[int, str] = {}
        """Names of sections by the numbers of their first slides; of one that holds all, the name says nothing."""
        related = package.relationships(package.main)
        numbers: dict[str, int] = {}
        named: list[str] = []

        def start(name: str, attributes: Attributes) -> None:
            match name:
                case "p:sldId":
                    if (slide := related.get(attributes.get("r:id", ""))) is not None:
                        self.slides.append(slide.target)
                        numbers[attributes.get("id", "")] = len(self.slides)
                case "p14:section":
                    named.append(" ".join(attributes.get("name", "").split()))
                case "p14:sldId" if named and named[-1] and (number := numbers.get(attributes.get("id", ""))):
                    self.sections[number] = named[-1]
                    named[-1] = ""

        package.parse(package.main, start=start)
        if len(named) < 2:
            self.sections.clear()


# --------------------------------------------------------------------------------------------------------------- slides


@dataclass(slots=True)
class _Shape:
    """A shape, a group of them or a frame that is open."""

    hidden: bool = False
    """It, or a group around it, is hidden."""
    placeholder: str | None = None
    """What it stands for; ``None``: it is a shape of its own."""
    blocks: list[Block] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    """Last number of each level of its numbered paragraphs."""


@dataclass(slots=True)
class _Paragraph:
    parts: list[str] = field(default_factory=list)
    level: int = 0
    bullet: str | None = None
    """``""``: it has none, ``None``: as its placeholder has."""
    start: int = 1


class _Slide:
    """A slide; with level 0, the notes below one: they have no title, no bullets of their own, and no notes."""

    def __init__(self, package: Package, part: str, *, level: int) -> None:
        self.hidden = False
        self._package = package
        self._related: Mapping[str, Relationship] = package.relationships(part)
        self._level = level
        self._title: Block | None = None
        self._body: list[Block] = []
        self._groups = 0
        self._shapes: list[_Shape] = []
        self._paragraph: _Paragraph | None = None
        self._field = False
        """Within a field that shows the number of the slide or the date."""
        self._text: list[str] | None = None
        self._table: Table | None = None
        self._columns = 1
        self._dropped = False
        self._cell: list[Block] | None = None
        self._chosen: list[bool] = []
        self._skip = 0
        package.parse(part, start=self._start, end=self._end, text=self._take)
        self._notes = self._read_notes()

    def blocks(self) -> list[Block]:
        """Return the title, what the slide shows, and its notes."""
        return [*([self._title] if self._title else []), *self._body, *self._notes]

    def _read_notes(self) -> list[Block]:
        part = next((related.target for related in self._related.values() if related.kind == "notesSlide"), None)
        if part is None or part not in self._package or self.hidden or not self._level:
            return []
        notes = _Slide(self._package, part, level=0)
        return [replace(block, group=block.group and block.group + self._groups) for block in notes.blocks()]

    def _start(self, name: str, attributes: Attributes) -> None:
        if self._skip or name in _SKIPPED:
            self._skip += 1
            return
        shape = self._shapes[-1] if self._shapes else None
        paragraph = self._paragraph
        match name:
            case "p:sld":
                self.hidden = attributes.get("show") in {"0", "false"}
            case "mc:AlternateContent":
                self._chosen.append(False)
            case "mc:Choice":
                if not self._chosen or self._chosen[-1]:
                    self._skip = 1
                else:
                    self._chosen[-1] = True
            case _ if name in _CONTAINERS:
                self._shapes.append(_Shape(hidden=shape is not None and shape.hidden))
            case "p:cNvPr" if shape is not None:
                shape.hidden |= attributes.get("hidden") in {"1", "true"}
            case "p:ph" if shape is not None:
                shape.placeholder = attributes.get("type", "")
            case "a:p":
                self._paragraph = _Paragraph()
            case "a:pPr" if paragraph is not None:
                paragraph.level = min(max(integer(attributes.get("lvl"), default=0), 0), 8)
            case "a:buNone" if paragraph is not None:
                paragraph.bullet = ""
            case "a:buChar" if paragraph is not None:
                paragraph.bullet = "-"
            case "a:buAutoNum" if paragraph is not None:
                paragraph.bullet = attributes.get("type", "")
                paragraph.start = integer(attributes.get("startAt"), default=1)
            case "a:fld":
                self._field = attributes.get("type", "").startswith(("slidenum", "datetime"))
            case "a:t" | "m:t" if not self._field:
                self._text = []
            case "a:br" if paragraph is not None:
                paragraph.parts.append("\n")
            case "a:tbl":
                self._groups += 1
                self._table = Table(group=self._groups)
            case "a:tblPr" if self._table is not None:
                self._table.header_rows = int(attributes.get("firstRow") in {"1", "true"})
            case "a:tr" if self._table is not None:
                self._table.rows.append([])
            case "a:tc" if self._table is not None:
                self._cell = []
                self._columns = min(max(integer(attributes.get("gridSpan"), default=1), 1), _COLUMN_LIMIT)
                self._dropped = attributes.get("hMerge") in {"1", "true"}
            case "c:chart" | "dgm:relIds" if shape is not None:
                shape.blocks += self._of_frame(name, attributes)

    def _end(self, name: str) -> None:
        if self._skip:
            self._skip -= 1
            return
        match name:
            case "mc:AlternateContent":
                self._chosen.pop()
            case "a:t" | "m:t" if self._text is not None:
                if self._paragraph is not None:
                    self._paragraph.parts.append("".join(self._text).translate(SHOWN))
                self._text = None
            case "a:fld":
                self._field = False
            case "a:p" if self._paragraph is not None:
                self._end_paragraph(self._paragraph)
                self._paragraph = None
            case "a:tc" if self._table is not None and self._cell is not None:
                if not self._dropped and self._table.rows:
                    self._table.rows[-1].append(Cell(blocks=self._cell, columns=self._columns))
                self._cell = None
            case "a:tbl" if self._table is not None:
                if self._shapes:
                    self._shapes[-1].blocks += self._table.blocks()
                self._table = None
            case _ if name in _CONTAINERS and self._shapes:
                self._end_shape(self._shapes.pop())

    def _take(self, text: str) -> None:
        if self._text is not None and not self._skip:
            self._text.append(text)

    def _end_paragraph(self, paragraph: _Paragraph) -> None:
        block = clean("".join(paragraph.parts))
        if not block.text:
            return
        if self._cell is not None:
            self._cell.append(block)
        elif self._shapes:
            shape = self._shapes[-1]
            bullet = _bullet(paragraph, shape, by_default=self._level > 0 and shape.placeholder in _LIST_PLACEHOLDERS)
            if bullet:
                block = replace(prefixed(block, "  " * paragraph.level + bullet + " "), group=-1)
            shape.blocks.append(block)

    def _end_shape(self, shape: _Shape) -> None:
        if shape.hidden or shape.placeholder in _LEFT_OUT_PLACEHOLDERS or not shape.blocks:
            return
        if shape.placeholder in _TITLE_PLACEHOLDERS and self._title is None and self._level:
            title = " ".join(" ".join(block.text.split()) for block in shape.blocks)
            self._title = Block(title, level=self._level)
            return
        self._groups += 1
        self._body += [replace(block, group=self._groups) if block.group == -1 else block for block in shape.blocks]

    def _of_frame(self, name: str, attributes: Attributes) -> list[Block]:
        """Return what a chart or a diagram shows, which stands in a part of its own."""
        related = self._related.get(attributes.get("r:dm" if name == "dgm:relIds" else "r:id", ""))
        if related is None or related.target not in self._package:
            return []
        self._groups += 1
        reader = _Diagram() if name == "dgm:relIds" else _Chart()
        self._package.parse(related.target, start=reader.start, end=reader.end, text=reader.text)
        return list(reader.blocks(group=self._groups))


def _bullet(paragraph: _Paragraph, shape: _Shape, *, by_default: bool) -> str:
    """Return what stands before a paragraph; a number counts on from the last one of its level."""
    if paragraph.bullet is None:
        return "-" if by_default else ""
    shape.numbers = {level: number for level, number in shape.numbers.items() if level <= paragraph.level}
    if paragraph.bullet in {"", "-"}:
        shape.numbers.pop(paragraph.level, None)
        return paragraph.bullet
    number = shape.numbers.get(paragraph.level, paragraph.start - 1) + 1
    shape.numbers[paragraph.level] = number
    found = _NUMBERED.match(paragraph.bullet)
    how, around = found.groups() if found else ("arabic", "Period")
    return _AROUND.get(around, "{}.").format(write_number(number, _FORMATS.get(how, "decimal")))


# ----------------------------------------------------------------------------------------------- diagrams and charts


class _Diagram:
    """The texts of a diagram, in their order, without their arrangement."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._shown = False
        self._within = False

    def start(self, name: str, attributes: Attributes) -> None:
        """Begin an element."""
        match name:
            case "dgm:pt":
                self._shown = attributes.get("type", "node") in {"node", "asst"}
            case "a:p" if self._shown:
                self._texts.append("")
            case "a:t":
                self._within = self._shown and bool(self._texts)

    def end(self, name: str) -> None:
        """End an element."""
        if name == "a:t":
            self._within = False

    def text(self, text: str) -> None:
        """Take text."""
        if self._within:
            self._texts[-1] += text.translate(SHOWN)

    def blocks(self, *, group: int) -> Iterator[Block]:
        """Yield a line for each text."""
        yield from (Block(f"- {text.strip()}", group=group) for text in self._texts if text.strip())


class _Chart:
    """The title of a chart and the values that it was last drawn from, as a table: a row for each category."""

    def __init__(self) -> None:
        self._path: list[str] = []
        self._title: list[str] = []
        self._series: list[dict[str, dict[int, str]]] = []
        self._point = 0
        self._parts: list[str] | None = None

    def start(self, name: str, attributes: Attributes) -> None:
        """Begin an element."""
        self._path.append(name)
        match name:
            case "c:ser":
                self._series.append({"c:tx": {}, "c:cat": {}, "c:val": {}})
            case "c:pt":
                self._point = integer(attributes.get("idx"), default=0)
            case "c:v" | "a:t":
                self._parts = []

    def end(self, name: str) -> None:
        """End an element."""
        if self._parts is not None and name in {"c:v", "a:t"}:
            self._keep("".join(self._parts).translate(SHOWN).strip())
            self._parts = None
        if self._path:
            self._path.pop()

    def text(self, text: str) -> None:
        """Take text."""
        if self._parts is not None:
            self._parts.append(text)

    def _keep(self, text: str) -> None:
        if "c:ser" not in self._path:
            if "c:title" in self._path and "a:t" in self._path:
                self._title.append(text)
            return
        role = next((role for part in self._path if (role := _ROLES.get(part))), None)
        if role is not None and 0 <= self._point < _POINT_LIMIT:
            # Of categories in several levels the first one is the closest.
            self._series[-1][role].setdefault(self._point if role != "c:tx" else 0, text)

    def blocks(self, *, group: int) -> Iterator[Block]:
        """Yield the title and the rows."""
        if title := " ".join(filter(None, self._title)):
            yield Block(title)
        labels = {place: found["c:tx"].get(0, "") for place, found in enumerate(self._series, start=1)}
        points = sorted({point for found in self._series for point in found["c:val"]})
        for point in points:
            row = {
                place: found["c:val"][point] for place, found in enumerate(self._series, start=1) if point in found["c:val"]
            }
            category = next((found["c:cat"][point] for found in self._series if point in found["c:cat"]), "")
            if text := line(({0: category} if category else {}) | row, labels):
                yield Block(text, group=group)


_ROLES: Final = {
    "c:tx": "c:tx",
    "c:cat": "c:cat",
    "c:xVal": "c:cat",
    "c:val": "c:val",
    "c:yVal": "c:val",
}
"""What the values of a series are for; those of points have two coordinates."""
