"""EPUB, version 2 and 3: the documents of the book in reading order, each a page, with the titles of its table of contents.

The container is a ZIP archive (EPUB 3.3, part OCF): ``META-INF/container.xml`` names the package document, which lists the
files (manifest) and their order (spine). The documents are XHTML, read as pages of HTML are. Nothing outside of the archive
is read.
"""

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import BinaryIO, ClassVar, Final
from urllib.parse import unquote, urlsplit

from job_runner.document import Kind, ParsedDocument
from job_runner.readers.archive import Archive, Attributes
from job_runner.readers.blocks import Block, assemble
from job_runner.readers.failure import OnProgress, ReadingFailed
from job_runner.readers.html import page_blocks

_CONTAINER: Final = "meta-inf/container.xml"
_ENCRYPTION: Final = "meta-inf/encryption.xml"
_OBFUSCATION: Final = frozenset({"http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC"})
"""Algorithms that only garble fonts: a book with them is not protected."""
_DOCUMENTS: Final = frozenset({"application/xhtml+xml", "text/html", "text/x-oeb1-document"})
_NCX: Final = "application/x-dtbncx+xml"
_LEVELS: Final = 6


def read_epub(file: BinaryIO, *, name: str, on_progress: OnProgress) -> ParsedDocument:
    """Read a book. A document of it that cannot be read is a failed page, the others are read.

    Raises :class:`ReadingFailed`: DocumentUnreadable for a damaged or protected book, DocumentRefused for a bomb,
    DocumentEmpty for one without text.
    """
    with _Book.opened(file, name=name) as book:
        package = book.package()
        contents = book.contents(package)
        blocks: list[Block] = []
        failed: list[int] = []
        headings = _Headings()
        for number, part in enumerate(package.spine, start=1):
            found: list[Block] = []
            try:
                if part != package.navigation:  # it repeats the headings
                    found = headings.placed(book.document(part), contents.get(part, ()))
            except ReadingFailed as failure:
                if failure.reason == "DocumentRefused":  # a bomb is no damaged page
                    raise
                failed.append(number)
            blocks += _on_page(found, number)
            on_progress(number, len(package.spine))
    document = assemble(blocks, kind=Kind.EPUB, title=package.title or None)
    if not document.text:
        if len(failed) == len(package.spine):
            raise ReadingFailed("DocumentUnreadable", f"cannot read {name}: all {len(failed)} documents in it are damaged")
        message = f"cannot index {name}: there is no text in it; text in pictures needs OCR: save it as PDF"
        raise ReadingFailed("DocumentEmpty", message)
    return replace(document, failed_pages=tuple(failed))


def _on_page(blocks: list[Block], number: int) -> list[Block]:
    """Return the blocks of a page with the break that begins it; the first page begins by itself."""
    if number == 1:
        return blocks
    if not blocks:
        return [Block(text="", breaks=(0,))]
    return [replace(blocks[0], breaks=(0,)), *blocks[1:]]


@dataclass(slots=True)
class _Package:
    """What the package document says."""

    title: str = ""
    spine: list[str] = field(default_factory=list)
    """Parts in the order of reading, each once."""
    navigation: str | None = None
    """The table of contents of EPUB 3, a document."""
    ncx: str | None = None
    """That of EPUB 2, an XML file of its own."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of the table of contents."""

    title: str
    level: int
    """1 is the highest."""


class _Book(Archive):
    """An open EPUB."""

    FORMAT: ClassVar = "EPUB"
    DOCTYPE: ClassVar = True  # the table of contents of EPUB 2 has one
    PREFIXES: ClassVar = {
        "urn:oasis:names:tc:opendocument:xmlns:container": "",
        "http://www.idpf.org/2007/opf": "",
        "http://openebook.org/namespaces/oeb-package/1.0/": "",
        "http://www.daisy.org/z3986/2005/ncx/": "",
        "http://www.w3.org/1999/xhtml": "",
        "http://www.idpf.org/2007/ops": "epub:",
        "http://purl.org/dc/elements/1.1/": "dc:",
        "http://purl.org/dc/elements/1.0/": "dc:",
        "http://www.w3.org/2001/04/xmlenc#": "enc:",
    }

    def package(self) -> _Package:
        """Read the package document. Raises :class:`ReadingFailed`, also for a protected book."""
        if _ENCRYPTION in self:
            self._refuse_protection()
        path = self._package_path()
        package = _Package()
        items: dict[str, tuple[str, str]] = {}
        spine: list[str] = []
        ncx = ""
        in_title = False

        def start(name: str, attributes: Attributes) -> None:
            nonlocal ncx, in_title
            match name:
                case "item":
                    href, kind = _resolved(path, attributes.get("href", "")), attributes.get("media-type", "")
                    items[attributes.get("id", "")] = (href, kind)
                    if "nav" in attributes.get("properties", "").split():
                        package.navigation = href
                case "itemref":
                    spine.append(attributes.get("idref", ""))
                case "spine":
                    ncx = attributes.get("toc", "")
                case "dc:title":
                    in_title = not package.title

        def end(name: str) -> None:
            nonlocal in_title
            in_title = in_title and name != "dc:title"

        def text(characters: str) -> None:
            if in_title:
                package.title += characters

        self.parse(path, start=start, end=end, text=text)
        package.title = " ".join(package.title.split())
        package.ncx = next((part for key, (part, kind) in items.items() if key == ncx or kind == _NCX), None)
        found = dict.fromkeys(items[key][0] for key in spine if key in items and items[key][1] in _DOCUMENTS)
        package.spine = list(found)
        if not package.spine:
            raise self.damaged(path)
        return package

    def document(self, part: str) -> list[Block]:
        """Return the blocks of a document of the book. Raises :class:`ReadingFailed`."""
        return page_blocks(self.read(part), name=f"{self.name} ({part})", xhtml=True)[0]

    def contents(self, package: _Package) -> Mapping[str, Sequence[_Entry]]:
        """Return the lines of the table of contents, by the document they lead to; without a readable one, nothing."""
        for part, reader in ((package.navigation, self._navigation), (package.ncx, self._ncx)):
            try:
                if part is not None and part in self and (found := reader(part)):
                    return found
            except ReadingFailed as failure:  # it is a help, never a reason to give up a book
                if failure.reason == "DocumentRefused":
                    raise
        return {}

    def _navigation(self, part: str) -> dict[str, list[_Entry]]:
        """Read the table of contents of EPUB 3: lists of links in one another in ``<nav epub:type="toc">``."""
        found: dict[str, list[_Entry]] = {}
        depth = 0
        inside = False
        href: str | None = None
        title: list[str] = []

        def start(name: str, attributes: Attributes) -> None:
            nonlocal depth, inside, href
            if name == "nav":
                inside = "toc" in attributes.get("epub:type", "").split()
            elif inside and name == "ol":
                depth += 1
            elif inside and name in {"a", "span"} and href is None:
                href = attributes.get("href", "")
                title.clear()

        def end(name: str) -> None:
            nonlocal depth, inside, href
            if name == "nav":
                inside = False
            elif inside and name == "ol":
                depth -= 1
            elif inside and name == "a" and href is not None:
                _enter(found, part, href, title="".join(title), depth=depth)
                href = None
            elif name == "span":
                href = href or None

        self.parse(part, start=start, end=end, text=title.append)
        return found

    def _ncx(self, part: str) -> dict[str, list[_Entry]]:
        """Read the table of contents of EPUB 2: ``navPoint`` in one another, each with a label and an address."""
        found: dict[str, list[_Entry]] = {}
        depth = 0
        title: list[str] = []
        in_label = False

        def start(name: str, attributes: Attributes) -> None:
            nonlocal depth, in_label
            match name:
                case "navPoint":
                    depth += 1
                case "navLabel" if depth:
                    title.clear()
                    in_label = True
                case "content" if depth:
                    _enter(found, part, attributes.get("src", ""), title="".join(title), depth=depth)

        def end(name: str) -> None:
            nonlocal depth, in_label
            if name == "navPoint":
                depth -= 1
            elif name == "navLabel":
                in_label = False

        def text(characters: str) -> None:
            if in_label:
                title.append(characters)

        self.parse(part, start=start, end=end, text=text)
        return found

    def _package_path(self) -> str:
        paths: list[str] = []

        def start(name: str, attributes: Attributes) -> None:
            if name == "rootfile":
                paths.append(_resolved("", attributes.get("full-path", "")))

        self.parse(_CONTAINER, start=start)
        if not paths:
            raise self.damaged(_CONTAINER)
        return paths[0]

    def _refuse_protection(self) -> None:
        """Raise DocumentUnreadable if anything but fonts is encrypted."""
        algorithms: list[str] = []
        inside = False

        def start(name: str, attributes: Attributes) -> None:
            nonlocal inside
            if name == "enc:EncryptedData":
                inside = True
                algorithms.append("")
            elif name == "enc:EncryptionMethod" and inside:
                algorithms[-1] = attributes.get("Algorithm", "")
                inside = False  # what follows describes keys

        self.parse(_ENCRYPTION, start=start)
        if not _OBFUSCATION.issuperset(algorithms):
            message = (
                f"cannot read {self.name}: the EPUB is encrypted (digital rights management); store it without protection"
            )
            raise ReadingFailed("DocumentUnreadable", message)


def _resolved(base: str, href: str) -> str:
    """Return the part that an address in another part leads to, in lower case; ``""`` for one that leads elsewhere."""
    try:
        address = urlsplit(href)
    except ValueError:
        return ""
    if address.scheme or address.netloc:
        return ""
    path = unquote(address.path)
    return posixpath.normpath(posixpath.join("/", posixpath.dirname(base), path)).lstrip("/").lower() if path else base


def _enter(found: dict[str, list[_Entry]], part: str, href: str, *, title: str, depth: int) -> None:
    title = " ".join(title.split())
    if title and href:
        found.setdefault(_resolved(part, href), []).append(_Entry(title=title, level=min(max(depth, 1), _LEVELS)))


class _Headings:
    """Places the table of contents in the documents, one after the other."""

    def __init__(self) -> None:
        self._deeper = 0
        """How far the levels of the book's own headings are above those that the table of contents has for them."""

    def placed(self, blocks: list[Block], entries: Sequence[_Entry]) -> list[Block]:
        """Return the blocks of a document with the levels of the table of contents.

        A paragraph with the words of an entry is a heading, whatever its markup. If none is, the first entry is put above
        the document: readers see it in their table of contents.
        """
        ahead = {_key(entry.title): entry for entry in reversed(entries)}
        out: list[Block] = []
        any_heading = False
        for block in blocks:
            entry = ahead.pop(_key(block.text), None) if ahead and len(block.text) < 500 else None
            level = block.level
            if entry is not None:
                self._deeper = entry.level - level if level else self._deeper
                level = entry.level
            elif level:
                level = min(max(level + self._deeper, 1), _LEVELS)
            any_heading |= level > 0
            out.append(replace(block, level=level) if level != block.level else block)
        if entries and out and not any_heading:
            return [Block(text=entries[0].title, level=entries[0].level), *out]
        return out


def _key(text: str) -> str:
    return "".join(text.split()).casefold()
