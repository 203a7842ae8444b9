"""The container of a DOCX: a ZIP archive of XML parts (Open Packaging Conventions, ECMA-376 part 2), read with bounds.

Only members of the archive are read, by their exact names and never into files; a relationship that leads out of the archive
is not followed. XML is read as a stream, so that memory does not grow with its size.
"""

import io
import posixpath
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.parsers import expat

from job_runner.readers.failure import ReadingFailed

_DIRECTORY_LIMIT: Final = 4 * 2**20
"""Bytes of the table of contents of an archive: some 40,000 members, where real documents have up to a few thousand."""
_TOTAL_LIMIT: Final = 256 * 2**20
"""Bytes of all parts that are read, inflated: the limit that the text has by default."""
_RATIO_LIMIT: Final = 200
_RATIO_FROM: Final = 16 * 2**20
"""Inflated bytes from which the ratio counts. Deflate reaches 1,030, Word's XML 5 to 40, very regular tables 150."""
_DEPTH_LIMIT: Final = 1000
"""Elements in one another; Word itself nests below 200."""
_TOKEN_LIMIT: Final = 4 * 2**20
"""Bytes of one tag. expat keeps an unfinished one and scans it again with each piece of the file (CVE-2023-52425)."""
_PIECE: Final = 64 * 1024
_SUPPORTED: Final = "this version reads PDF, DOCX, HTML, Markdown and text"
_MAIN_PARTS: Final = (
    ("wordprocessingml", ""),  # .docx, .dotx, and the same by the strict standard
    ("ms-word", ""),  # .docm, .dotm: macros are one more part that is not read
    ("spreadsheetml", "an Excel workbook (XLSX)"),
    ("ms-excel", "an Excel workbook (XLSX)"),
    ("presentationml", "a PowerPoint file (PPTX)"),
    ("ms-powerpoint", "a PowerPoint file (PPTX)"),
)

Attributes = Mapping[str, str]
OnStart = Callable[[str, Attributes], None]
OnEnd = Callable[[str], None]
OnText = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Relationship:
    kind: str
    """The last part of its type: ``officeDocument``, ``styles``."""
    target: str


@contextmanager
def opened(path: Path, *, name: str) -> Iterator["Package"]:
    """Open an archive and find its main part.

    Raises :class:`ReadingFailed`: DocumentRefused for another kind of archive and for a bomb, DocumentUnreadable for a
    damaged one.
    """
    with _Bounded(io.FileIO(path), name=name) as file:
        yield Package(file, name=name)


class Package:
    """An open DOCX, see :func:`opened`."""

    def __init__(self, file: io.BufferedReader, *, name: str) -> None:
        self._name = name
        self._inflated = 0
        try:
            self._archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
            raise self._damaged() from error
        # Some writers part the names of members by backslashes; names are equal whatever their case (ECMA-376 part 2, 6.2).
        self._members = {member.filename.replace("\\", "/").lower(): member for member in self._archive.infolist()}
        if "[content_types].xml" not in self._members:
            raise ReadingFailed("DocumentRefused", f"cannot read {name}: it is a ZIP archive; {_SUPPORTED}")
        self.main = self._main_part()
        self._related = {related.kind: related.target for related in self._relationships(self.main)}

    def related(self, kind: str) -> str | None:
        """Return the part that the main part has as its ``styles``, ``numbering`` and so on; ``None``: it has none."""
        part = self._related.get(kind)
        return part if part in self._members else None

    def parse(self, part: str, *, start: OnStart, end: OnEnd, text: OnText = lambda text: None) -> None:
        """Read the XML of a part as a stream of events.

        Names of elements and attributes are local names; those of other namespaces than WordprocessingML's, transitional or
        strict, have a prefix for their namespace (see ``_PREFIXES``), or are ``"?"``.

        Raises :class:`ReadingFailed`.
        """
        parser = expat.ParserCreate(namespace_separator=" ")
        parser.buffer_text = True
        parser.SetParamEntityParsing(expat.XML_PARAM_ENTITY_PARSING_NEVER)
        parser.StartDoctypeDeclHandler = self._refuse_doctype
        parser.CharacterDataHandler = text
        names = _Names()
        depth = 0

        def start_element(name: str, attributes: dict[str, str]) -> None:
            nonlocal depth
            depth += 1
            if depth > _DEPTH_LIMIT:
                message = (
                    f"cannot read {self._name}: more than {_DEPTH_LIMIT} elements in one another in {part}; it is damaged"
                )
                raise ReadingFailed("DocumentUnreadable", message)
            start(names[name], {names[key]: value for key, value in attributes.items()} if attributes else attributes)

        def end_element(name: str) -> None:
            nonlocal depth
            depth -= 1
            end(names[name])

        parser.StartElementHandler = start_element
        parser.EndElementHandler = end_element
        member = self._inflatable(part)
        fed = 0
        try:
            with self._archive.open(member) as file:
                while piece := file.read(_PIECE):
                    parser.Parse(piece, False)
                    fed += len(piece)
                    if fed - parser.CurrentByteIndex > _TOKEN_LIMIT:
                        message = (
                            f"cannot read {self._name}: a tag in {part} has more than {_TOKEN_LIMIT} bytes; it is damaged"
                        )
                        raise ReadingFailed("DocumentUnreadable", message)
            parser.Parse(b"", True)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            OSError,
            expat.ExpatError,
            NotImplementedError,
            LookupError,
        ) as error:
            raise self._damaged(part) from error
        except RuntimeError as error:  # what zipfile has for a member with a password
            message = f"cannot read {self._name}: the archive is encrypted with a password; store it without one"
            raise ReadingFailed("DocumentUnreadable", message) from error

    def _inflatable(self, part: str) -> zipfile.ZipInfo:
        """Return the member of a part, if inflating it stays within bounds.

        The size is what the archive declares; zipfile inflates no more than that, and finds the checksum wrong if there is.
        """
        member = self._members.get(part.lower())
        if member is None:
            raise self._damaged(part)
        size = member.file_size
        self._inflated += size
        if self._inflated > _TOTAL_LIMIT:
            message = (
                f"cannot read {self._name}: its parts have more than {_TOTAL_LIMIT} bytes when inflated; split the document"
            )
            raise ReadingFailed("DocumentRefused", message)
        if size > _RATIO_FROM and size > member.compress_size * _RATIO_LIMIT:
            message = (
                f"cannot read {self._name}: {part} inflates to {size} bytes, more than {_RATIO_LIMIT} times its size, as "
                "zip bombs do; save the document again with its word processor"
            )
            raise ReadingFailed("DocumentRefused", message)
        return member

    def _main_part(self) -> str:
        target = next((related.target for related in self._relationships("") if related.kind == "officeDocument"), None)
        if target is None or target not in self._members:
            raise self._damaged(target or "the main part")
        content_type = self._content_types().get(f"/{target}") or ""
        for mark, other in _MAIN_PARTS:
            if mark in content_type:
                if other:
                    raise ReadingFailed("DocumentRefused", f"cannot read {self._name}: it is {other}; {_SUPPORTED}")
                return target
        message = f"cannot read {self._name}: it is an archive of the type {content_type[:100]!r}; {_SUPPORTED}"
        raise ReadingFailed("DocumentRefused", message)

    def _content_types(self) -> dict[str, str]:
        """Return the content type of each part that the archive tells it of, by its name in lower case with a slash."""
        by_extension: dict[str, str] = {}
        by_name: dict[str, str] = {}

        def start(name: str, attributes: Attributes) -> None:
            content_type = attributes.get("ContentType", "")
            if name == "ct:Default":
                by_extension[attributes.get("Extension", "").lower()] = content_type
            elif name == "ct:Override":
                by_name[attributes.get("PartName", "").lower()] = content_type

        self.parse("[content_types].xml", start=start, end=lambda name: None)
        defaults = {f"/{part}": by_extension.get(part.rpartition(".")[2], "") for part in self._members}
        return defaults | by_name

    def _relationships(self, part: str) -> list[_Relationship]:
        """Return the relationships of a part, or with ``""`` of the package, that stay within the archive."""
        folder, base = posixpath.split(part)
        found: list[_Relationship] = []

        def start(name: str, attributes: Attributes) -> None:
            if name == "rel:Relationship" and attributes.get("TargetMode") != "External":
                target = posixpath.normpath(posixpath.join("/", folder, attributes.get("Target", ""))).lstrip("/")
                found.append(_Relationship(kind=posixpath.basename(attributes.get("Type", "")), target=target.lower()))

        relationships = posixpath.join(folder, "_rels", f"{base}.rels")
        if relationships.lower() in self._members:
            self.parse(relationships, start=start, end=lambda name: None)
        return found

    def _damaged(self, part: str = "") -> ReadingFailed:
        where = f" ({part})" if part else ""
        return ReadingFailed(
            "DocumentUnreadable",
            f"cannot read {self._name}: the DOCX is damaged or cut short{where}; copy it again or save it anew",
        )

    def _refuse_doctype(self, *_: Any) -> None:
        # ECMA-376 part 2 forbids document type declarations, and entities of all kinds come with them.
        message = f"cannot read {self._name}: its XML declares entities, which no DOCX may; save it with a word processor"
        raise ReadingFailed("DocumentRefused", message)


_PREFIXES: Final = {
    "http://schemas.openxmlformats.org/wordprocessingml/2006/main": "",
    "http://purl.oclc.org/ooxml/wordprocessingml/main": "",
    "http://schemas.openxmlformats.org/markup-compatibility/2006": "mc:",
    "http://schemas.openxmlformats.org/officeDocument/2006/math": "m:",
    "http://purl.oclc.org/ooxml/officeDocument/math": "m:",
    "http://schemas.openxmlformats.org/package/2006/content-types": "ct:",
    "http://schemas.openxmlformats.org/package/2006/relationships": "rel:",
    "http://www.w3.org/XML/1998/namespace": "xml:",
}


class _Names(dict[str, str]):
    """Names of elements and attributes as expat has them, and as :meth:`Package.parse` gives them."""

    def __missing__(self, name: str) -> str:
        namespace, _, local = name.rpartition(" ")
        prefix = _PREFIXES.get(namespace) if namespace else ""
        short = "?" if prefix is None else prefix + local
        if len(self) < 10_000:  # a part of made-up names must not fill the memory
            self[name] = short
        return short


class _Bounded(io.BufferedReader):
    """A file of which no more than the bound is read at once, as zipfile does with the table of contents of an archive.

    Its size stands in the file, and a made-up one would take any amount of memory.
    """

    def __init__(self, raw: io.FileIO, *, name: str) -> None:
        super().__init__(raw)
        self._document = name

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _DIRECTORY_LIMIT:
            message = (
                f"cannot read {self._document}: the archive's table of contents has {size} bytes and the limit is "
                f"{_DIRECTORY_LIMIT}; save the document again with its word processor"
            )
            raise ReadingFailed("DocumentRefused", message)
        return super().read(size)
