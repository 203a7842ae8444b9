"""HTML: what a reader of the page sees of its main part, as paragraphs, headings, lists and tables.

The tree is that of the HTML standard's own algorithm (Lexbor), which has an answer to whatever markup there is. Nothing is
ever fetched: addresses, images, frames and style sheets are not looked at.
"""

import re
from collections import Counter
from typing import TYPE_CHECKING, Final

from job_runner.document import Kind, ParsedDocument
from job_runner.readers.blocks import INVISIBLE, SHOWN, Block, Cell, Table, assemble
from job_runner.readers.charset import decode
from job_runner.readers.failure import ReadingFailed

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

_DEPTH_LIMIT: Final = 5000
"""Elements in one another. Real pages stay below 100 and browsers flatten beyond 512; the algorithm's time grows with the
square of it (measured: 0.4 s for 20,000, 32 s for 100,000)."""
_MARKUP_LIMIT: Final = 4_000_000
"""Tags of a page. Lexbor needs some 190 bytes an element (measured), so that about five million fit the default limit."""
_TAG: Final = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)")
_SELF_CLOSING: Final = re.compile(r"""<([a-zA-Z][\w:.-]*+)((?:\s++[\w:.-]++\s*+=\s*+(?:"[^"<]*+"|'[^'<]*+'))*+)\s*+/>""")
_VOID: Final = frozenset({
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr",
})  # fmt: skip
"""Elements of HTML that have no content and no end tag."""
# fmt: off
_NEVER_DEEP: Final = frozenset({
    # Without an end tag of their own, or ended by their neighbour or by one another.
    "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr",
    "html", "head", "body", "p", "li", "dt", "dd", "rt", "rp", "option", "optgroup", "tr", "td", "th", "thead", "tbody",
    "tfoot", "colgroup", "caption", "a", "nobr", "h1", "h2", "h3", "h4", "h5", "h6",
})
_UNSEEN: Final = frozenset({
    "head", "script", "style", "template", "noscript", "noframes", "noembed",  # no text, or text for readers without scripts
    "iframe", "object", "embed", "audio", "video", "canvas", "svg", "map",     # other media and what stands in for them
    "select", "datalist", "button", "textarea", "dialog",                      # controls
    "del", "rt", "rp", "annotation", "annotation-xml",  # deleted; pronunciation and source of what is there already
})
_BOILERPLATE: Final = frozenset({"nav", "menu"})
_BOILERPLATE_OF_A_PAGE: Final = frozenset({"aside", "footer"})
"""Dropped unless they belong to an article or to the main part: there they are notes."""
_BLOCKS: Final = frozenset({
    "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "dir", "div", "dl", "dt",
    "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hgroup", "hr",
    "html", "legend", "li", "listing", "main", "ol", "p", "plaintext", "pre", "search", "section", "summary", "table", "ul",
    "xmp",
})
# fmt: on
_HIDDEN: Final = "[hidden],[aria-hidden=true],[role=navigation],[role=search],[role=banner],[role=contentinfo]"
_HEADINGS: Final = {f"h{level}": level for level in range(1, 7)}
_LISTS: Final = frozenset({"ul", "ol", "dir", "dl"})
_PREFORMATTED: Final = frozenset({"pre", "listing", "plaintext", "xmp"})
_TABLE_DEPTH: Final = 20
"""Tables in one another that are read as tables; deeper ones only give their text."""
_COLUMN_LIMIT: Final = 1000
"""Columns of a table within which cells may span; the HTML standard's limit on colspan."""

_DECLARED: Final = re.compile(
    rb"""<meta\b[^>]*?\bcharset\s*=\s*["']?\s*([\w.:-]+)|<\?xml[^>]*?\bencoding\s*=\s*["']([\w.:-]+)""", re.IGNORECASE
)
_DECLARED_WITHIN: Final = 4096
"""Bytes; the standard says 1024, and pages that were saved with a comment above them have it later."""
_BREAK: Final = "\v"
"""Stands for <br> in the text of a paragraph, since no text has it after decoding."""
_WIDE = r"[\u2e80-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\U00020000-\U0003ffff]"
_LINE_END_IN_CHINESE: Final = re.compile(rf"(?<={_WIDE})[ \t]*\n[ \t\n]*(?={_WIDE})")
_SPACES: Final = re.compile(" {2,}")
_BREAKS: Final = re.compile(r" *\v *")
_PARAGRAPH_BREAK: Final = re.compile(r" *\v(?: *\v)+ *")


def read_html(data: bytes, *, name: str) -> ParsedDocument:
    """Read a page.

    Raises :class:`ReadingFailed`: DocumentRefused for markup without end, DocumentEmpty if the page shows nothing.
    """
    blocks, title = page_blocks(data, name=name)
    document = assemble(blocks, kind=Kind.HTML, title=title)
    if not document.text:
        message = (
            f"cannot index {name}: the page shows no text; if scripts fill it, save it from a browser once it is complete"
        )
        raise ReadingFailed("DocumentEmpty", message)
    return document


def page_blocks(
    data: bytes, *, name: str, charset: str | None = None, xhtml: bool = False
) -> tuple[list[Block], str | None]:
    """Return the blocks of a page and its title.

    ``charset``: what is declared outside of the page, which counts more than what it says itself. ``xhtml``: it is XML,
    whatever it begins with.

    Raises :class:`ReadingFailed`: DocumentRefused for markup without end.
    """
    from selectolax.lexbor import LexborHTMLParser, SelectolaxError

    if charset is None and (declared := _DECLARED.search(data, 0, _DECLARED_WITHIN)):
        charset = (declared.group(1) or declared.group(2)).decode("ascii")
    text = decode(data, name=name, declared=charset)
    _check_markup(text, name=name)
    if xhtml or text[:100].lstrip().startswith("<?xml"):
        text = _SELF_CLOSING.sub(_closed, text)
    try:
        tree = LexborHTMLParser(text.encode("utf-8", errors="replace"))
    except SelectolaxError as error:
        message = (
            f"cannot read {name}: the parser found no memory for its elements; split the page, or raise "
            "TASKS_PARSER_MEMORY_BYTES and the pod's memory"
        )
        raise ReadingFailed("DocumentRefused", message) from error
    root = tree.root
    blocks: list[Block] = []
    if root is not None:
        unseen = {node.mem_id for node in root.css(_HIDDEN)}
        main = root.css_first("main,[role=main]")
        if main is not None:
            blocks = _Walk(unseen, main=True).blocks(main)
        if not any(block.text for block in blocks):
            blocks = _Walk(unseen).blocks(root)
    title = tree.css_first("head > title")
    return blocks, _inline(title.text()).replace(_BREAK, " ") if title else None


def _closed(tag: re.Match[str]) -> str:
    """Return an element of XML without content as HTML has it: there ``<title/>`` begins one that never ends."""
    return tag.group() if tag.group(1).lower() in _VOID else f"<{tag.group(1)}{tag.group(2)}></{tag.group(1)}>"


def _check_markup(text: str, *, name: str) -> None:
    """Refuse markup whose tree would take all memory or all time: by an upper estimate that itself is linear."""
    tags = text.count("<")
    if tags > _MARKUP_LIMIT:
        message = f"cannot read {name}: it has {tags} tags and the limit is {_MARKUP_LIMIT}; split the page"
        raise ReadingFailed("DocumentRefused", message)
    if tags <= _DEPTH_LIMIT:
        return
    depth = 0
    opened: Counter[str] = Counter()
    for found in _TAG.finditer(text):
        end, tag = found.group(1), found.group(2).lower()
        if tag in _NEVER_DEEP:
            continue
        if not end:
            opened[tag] += 1
            depth += 1
            if depth > _DEPTH_LIMIT:
                message = (
                    f"cannot read {name}: more than {_DEPTH_LIMIT} elements are open in one another; "
                    "close them, or save the page's text"
                )
                raise ReadingFailed("DocumentRefused", message)
        elif opened[tag]:
            opened[tag] -= 1
            depth -= 1


def _inline(text: str) -> str:
    """Return text as a browser shows it in a line: white space is one space, and none where a line of Chinese ended."""
    # A line without end must not become a list of its words: only what there is more than one of is replaced one by one.
    if "\n" in text:
        text = _LINE_END_IN_CHINESE.sub("", text)
    text = text.translate(SHOWN).strip(" ")
    return _SPACES.sub(" ", text) if "  " in text else text


class _Walk:
    """One walk over a tree, without recursion: elements may be thousands deep."""

    def __init__(self, unseen: set[int], *, main: bool = False) -> None:
        self._unseen = unseen
        self._within = int(main)
        """Articles and main parts that are open."""
        self._out: list[Block] = []
        """Where blocks go: the document's, or those of the cell that is open."""
        self._inline: list[str] = []
        self._pre = 0
        self._level = 0
        self._group = 0
        self._groups = 0
        self._lists: list[_List] = []
        self._tables: list[_OpenTable] = []
        self._skipped_tables = 0

    def blocks(self, root: "LexborNode") -> list[Block]:
        """Return the blocks below an element."""
        node: LexborNode | None = root
        path: list[tuple[LexborNode, str]] = []
        while node is not None:
            tag = node.tag
            child = None
            if tag == "-text":
                self._inline.append(node.text_lexbor())
            elif tag is not None and tag[0] != "-" and self._enter(node, tag):
                path.append((node, tag))
                child = node.first_child
                if child is None:
                    path.pop()
                    self._leave(tag)
            if child is not None:
                node = child
                continue
            following = node.next if path or node is not root else None
            while following is None and path:
                node, tag = path.pop()
                self._leave(tag)
                following = node.next if path else None
            node = following
        self._flush()
        return self._out

    def _enter(self, node: "LexborNode", tag: str) -> bool:
        """Begin an element; return whether to look into it."""
        if tag in _UNSEEN or tag in _BOILERPLATE or node.mem_id in self._unseen:
            return False
        if tag in _BOILERPLATE_OF_A_PAGE and not self._within:
            return False
        if tag == "br":
            self._inline.append("\n" if self._pre else _BREAK)
            return False
        if tag in {"article", "main"}:
            self._within += 1
        if tag in {"table", "tr", "td", "th", "thead"}:
            self._enter_table(node, tag)
            return True
        if tag not in _BLOCKS:
            return True
        self._flush()
        if tag in _HEADINGS:
            self._level = _HEADINGS[tag]
        elif tag in _PREFORMATTED:
            self._pre += 1
        elif tag in _LISTS:
            self._enter_list(node, tag)
        elif self._lists and tag in {"li", "dt", "dd"}:
            self._lists[-1].item(tag)
        return True

    def _leave(self, tag: str) -> None:
        """End an element."""
        if tag in {"article", "main"}:
            self._within -= 1
        if tag in {"table", "tr", "td", "th", "thead"}:
            self._leave_table(tag)
            return
        if tag not in _BLOCKS:
            return
        self._flush()
        if tag in _HEADINGS:
            self._level = 0
        elif tag in _PREFORMATTED:
            self._pre -= 1
        elif tag in _LISTS:
            self._lists.pop()
            if not self._lists:
                self._group = 0

    def _flush(self) -> None:
        """End a paragraph."""
        if not self._inline:
            return
        text = "".join(self._inline)
        self._inline.clear()
        if self._pre:
            paragraphs = [text.translate(INVISIBLE).replace("\xa0", " ").rstrip().lstrip("\n")]
        elif _BREAK in text:
            end = " " if self._level else "\n"
            paragraphs = [_BREAKS.sub(end, part.strip(_BREAK + " ")) for part in _PARAGRAPH_BREAK.split(_inline(text))]
        else:
            paragraphs = [_inline(text)]
        for paragraph in paragraphs:
            if paragraph:
                marker = self._lists[-1].marker() if self._lists and not self._level else ""
                self._out.append(Block(text=marker + paragraph, level=self._level, group=self._group))

    def _next_group(self) -> int:
        self._groups += 1
        return self._groups

    # ----------------------------------------------------------------------------------------------------------- lists

    def _enter_list(self, node: "LexborNode", tag: str) -> None:
        if not self._lists:
            self._group = self._next_group()
        start = _number(node.attributes.get("start"), default=1) if tag == "ol" else 0
        self._lists.append(_List(kind=tag, number=start, depth=min(len(self._lists), 8)))

    # ---------------------------------------------------------------------------------------------------------- tables

    def _enter_table(self, node: "LexborNode", tag: str) -> None:
        if tag == "table":
            self._flush()
            if len(self._tables) >= _TABLE_DEPTH:
                self._skipped_tables += 1
                return
            role = node.attributes.get("role")
            table = Table(group=self._next_group(), layout=role in {"presentation", "none"})
            self._tables.append(_OpenTable(table, outer=self._out, lists=self._lists, group=self._group))
            self._out, self._lists, self._group = [], [], 0
            self._tables[-1].caption = self._out
        elif self._tables and not self._skipped_tables:
            self._flush()
            current = self._tables[-1]
            if tag == "tr":
                current.begin_row()
            elif tag == "thead":
                current.in_head = True
            else:
                self._out, self._lists, self._group = [], [], 0
                current.begin_cell(node, self._out, header=tag == "th")
        else:
            self._flush()

    def _leave_table(self, tag: str) -> None:
        self._flush()
        if tag == "table" and self._skipped_tables:
            self._skipped_tables -= 1
        elif self._tables and not self._skipped_tables:
            table = self._tables[-1]
            if tag == "tr":
                table.end_row()
            elif tag == "thead":
                table.in_head = False
            elif tag == "table":
                self._tables.pop()
                self._out, self._lists, self._group = table.outer, table.lists, table.group
                self._out += table.caption
                self._out += table.table.blocks()
            else:
                self._out, self._lists, self._group = table.caption, [], 0


class _List:
    """A list that is open."""

    def __init__(self, *, kind: str, number: int, depth: int) -> None:
        self._kind = kind
        self._number = number
        self._indent = "  " * depth
        self._pending = ""
        self._width = 0

    def item(self, tag: str) -> None:
        """Begin an item."""
        match self._kind, tag:
            case "ol", "li":
                mark, self._number = f"{self._number}. ", self._number + 1
            case "dl", "dt":
                mark = ""
            case "dl", "dd":
                mark = "  "
            case _:
                mark = "- "
        self._pending = self._indent + mark
        self._width = len(self._pending)

    def marker(self) -> str:
        """Return what stands before the next paragraph: the mark of its item once, then as many spaces."""
        marker, self._pending = self._pending or " " * self._width, ""
        return marker


class _OpenTable:
    """A table that is open, and what was open around it."""

    def __init__(self, table: Table, *, outer: list[Block], lists: list[_List], group: int) -> None:
        self.table = table
        self.outer = outer
        self.lists = lists
        self.group = group
        self.caption: list[Block] = []
        self.in_head = False
        self._row: list[Cell] = []
        self._column = 0
        self._covered: dict[int, int] = {}
        """By column, the last row that a cell further up covers."""
        self._open = False

    def begin_row(self) -> None:
        self.end_row()
        self._open = True

    def begin_cell(self, node: "LexborNode", blocks: list[Block], *, header: bool) -> None:
        self._open = True
        self._fill()
        attributes = node.attributes
        columns = min(max(_number(attributes.get("colspan"), default=1), 1), max(_COLUMN_LIMIT - self._column, 1))
        rows = _number(attributes.get("rowspan"), default=1)
        self._row.append(Cell(blocks=blocks, columns=columns, header=header))
        if rows > 1 and self._column < _COLUMN_LIMIT:
            last = len(self.table.rows) + rows - 1
            self._covered |= dict.fromkeys(range(self._column, self._column + columns), last)
        self._column += columns

    def end_row(self) -> None:
        """Add the row that is open, if any."""
        if not self._open:
            return
        self._fill()
        row, table = self._row, self.table
        if (
            table.header_rows == len(table.rows)
            and row
            and (self.in_head or all(cell.header for cell in row if cell.blocks))
        ):
            table.header_rows += 1
        table.rows.append(row)
        self._row, self._column, self._open = [], 0, False

    def _fill(self) -> None:
        """Put an empty cell where cells of rows further up reach down to."""
        first = self._column
        while self._covered.get(self._column, -1) >= len(self.table.rows):
            self._column += 1
        if self._column > first:
            self._row.append(Cell(columns=self._column - first))


def _all_headers(row: list[Cell]) -> bool:
    filled = [cell for cell in row if cell.blocks]
    return bool(filled) and all(cell.header for cell in filled)


def _number(text: str | None, *, default: int) -> int:
    """Return the number that an attribute begins with, as the HTML standard reads it; bounded to six digits."""
    found = re.match(r"\s*([+-]?\d{1,6})", text or "")
    return int(found.group(1)) if found else default
