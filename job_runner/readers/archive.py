"""A ZIP archive of XML parts, as DOCX and EPUB are, read with bounds.

Only members of the archive are read, by their exact names and never into files. XML is read as a stream, so that memory does
not grow with its size, and entities are refused.
"""

import io
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, ClassVar, Final, Self, cast
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

Attributes = Mapping[str, str]
OnStart = Callable[[str, Attributes], None]
OnEnd = Callable[[str], None]
OnText = Callable[[str], None]

_BROKEN: Final = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    expat.ExpatError,
    NotImplementedError,
    LookupError,
    ValueError,
    OverflowError,
)
"""What zipfile, zlib and expat raise about damaged data."""


class Archive:
    """An open archive; subclasses know its format."""

    FORMAT: ClassVar[str] = "archive"
    """What messages call it: ``DOCX``."""
    PREFIXES: ClassVar[Mapping[str, str]] = {}
    """Prefix of the names of each namespace that is read, by its URI."""
    DOCTYPE: ClassVar[bool] = False
    """Whether the format allows document type declarations. Entities that one declares are refused either way."""

    def __init__(self, file: io.BufferedReader, *, name: str) -> None:
        self.name = name
        self._inflated = 0
        self._prefixed = _Names(self.PREFIXES)
        try:
            self._archive = zipfile.ZipFile(file)
        except _BROKEN as error:
            raise self.damaged() from error
        # Some writers part the names of members by backslashes; names are equal whatever their case (ECMA-376 part 2, 6.2).
        self._members = {member.filename.replace("\\", "/").lower(): member for member in self._archive.infolist()}

    @classmethod
    @contextmanager
    def opened(cls, file: BinaryIO, *, name: str) -> Iterator[Self]:
        """Open an archive.

        Raises :class:`ReadingFailed`: DocumentRefused for another kind of archive and for a bomb, DocumentUnreadable for a
        damaged one.
        """
        bounded = BoundedReads(file, name=name)
        try:
            yield cls(bounded, name=name)
        finally:
            bounded.detach()  # else it would close the file

    def __contains__(self, part: str) -> bool:
        return part.lower() in self._members

    def __iter__(self) -> Iterator[str]:
        """Names of all members, in lower case."""
        return iter(self._members)

    def read(self, part: str) -> bytes:
        """Return a part, inflated. Raises :class:`ReadingFailed`."""
        member = self._inflatable(part)
        with self._reading(part):
            return self._archive.read(member)

    def beginning(self, part: str, *, size: int) -> bytes:
        """Return at most ``size`` bytes from the start of a part; no more is inflated. Raises :class:`ReadingFailed`."""
        with self._reading(part), self._archive.open(self._member(part)) as file:
            return file.read(size)

    def pieces(self, part: str) -> Iterator[bytes]:
        """Yield a part of XML in pieces, for a library that reads it once it is known to be bounded and whole.

        Its beginning declares no entities. Raises :class:`ReadingFailed`.
        """
        parser = expat.ParserCreate()
        parser.SetParamEntityParsing(expat.XML_PARAM_ENTITY_PARSING_NEVER)
        parser.StartDoctypeDeclHandler = self._refuse_entities
        begun = False

        def start_element(name: str, attributes: dict[str, str]) -> None:
            nonlocal begun
            begun = True

        parser.StartElementHandler = start_element
        member = self._inflatable(part)
        with self._reading(part), self._archive.open(member) as file:
            while piece := file.read(_PIECE):
                if not begun:
                    parser.Parse(piece, False)
                yield piece

    def parse(self, part: str, *, start: OnStart, end: OnEnd = lambda name: None, text: OnText = lambda text: None) -> None:
        """Read the XML of a part as a stream of events.

        Names of elements and attributes are local names with the prefix that ``PREFIXES`` has for their namespace; those of
        other namespaces are ``"?"``.

        Raises :class:`ReadingFailed`.
        """
        parser = expat.ParserCreate(namespace_separator=" ")
        parser.buffer_text = True
        parser.SetParamEntityParsing(expat.XML_PARAM_ENTITY_PARSING_NEVER)
        parser.EntityDeclHandler = self._refuse_entities
        if not self.DOCTYPE:
            parser.StartDoctypeDeclHandler = self._refuse_entities
        parser.CharacterDataHandler = text
        names = self._prefixed
        depth = 0

        def start_element(name: str, attributes: dict[str, str]) -> None:
            nonlocal depth
            depth += 1
            if depth > _DEPTH_LIMIT:
                message = (
                    f"cannot read {self.name}: more than {_DEPTH_LIMIT} elements in one another in {part}; it is damaged"
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
        with self._reading(part):
            with self._archive.open(member) as file:
                while piece := file.read(_PIECE):
                    parser.Parse(piece, False)
                    fed += len(piece)
                    if fed - parser.CurrentByteIndex > _TOKEN_LIMIT:
                        message = (
                            f"cannot read {self.name}: a tag in {part} has more than {_TOKEN_LIMIT} bytes; it is damaged"
                        )
                        raise ReadingFailed("DocumentUnreadable", message)
            parser.Parse(b"", True)

    def damaged(self, part: str = "") -> ReadingFailed:
        """Return the error for an archive with a part that is broken or not there."""
        where = f" ({part})" if part else ""
        return ReadingFailed(
            "DocumentUnreadable",
            f"cannot read {self.name}: the {self.FORMAT} is damaged or cut short{where}; copy it again or save it anew",
        )

    @contextmanager
    def _reading(self, part: str) -> Iterator[None]:
        try:
            yield
        except _BROKEN as error:
            raise self.damaged(part) from error
        except RuntimeError as error:  # what zipfile has for a member with a password
            message = f"cannot read {self.name}: the archive is encrypted with a password; store it without one"
            raise ReadingFailed("DocumentUnreadable", message) from error

    def _member(self, part: str) -> zipfile.ZipInfo:
        """Return the member of a part.

        Its method of compression is one of the two that these formats know: others may ask for gigabytes of memory.
        """
        member = self._members.get(part.lower())
        if member is None or member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise self.damaged(part)
        return member

    def _inflatable(self, part: str) -> zipfile.ZipInfo:
        """Return the member of a part, if inflating it stays within bounds.

        The size is what the archive declares; zipfile inflates no more than that, and finds the checksum wrong if there is.
        """
        member = self._member(part)
        size = member.file_size
        self._inflated += size
        if self._inflated > _TOTAL_LIMIT:
            message = (
                f"cannot read {self.name}: its parts have more than {_TOTAL_LIMIT} bytes when inflated; split the document"
            )
            raise ReadingFailed("DocumentRefused", message)
        if size > _RATIO_FROM and size > member.compress_size * _RATIO_LIMIT:
            message = (
                f"cannot read {self.name}: {part} inflates to {size} bytes, more than {_RATIO_LIMIT} times its size, as "
                "zip bombs do; save the document again with the program that made it"
            )
            raise ReadingFailed("DocumentRefused", message)
        return member

    def _refuse_entities(self, *_: Any) -> None:
        message = (
            f"cannot read {self.name}: its XML declares entities, which no {self.FORMAT} needs; "
            "save it again with the program that made it"
        )
        raise ReadingFailed("DocumentRefused", message)


class _Names(dict[str, str]):
    """Names of elements and attributes as expat has them, and as :meth:`Archive.parse` gives them."""

    def __init__(self, prefixes: Mapping[str, str]) -> None:
        super().__init__()
        self._prefixes = prefixes

    def __missing__(self, name: str) -> str:
        namespace, _, local = name.rpartition(" ")
        prefix = self._prefixes.get(namespace) if namespace else ""
        short = "?" if prefix is None else prefix + local
        if len(self) < 10_000:  # a part of made-up names must not fill the memory
            self[name] = short
        return short


class BoundedReads(io.BufferedReader):
    """A file of which no more than the bound is read at once, as zipfile does with the table of contents of an archive.

    Its size stands in the file, and a made-up one would take any amount of memory.
    """

    def __init__(self, raw: BinaryIO, *, name: str) -> None:
        super().__init__(cast("io.RawIOBase", raw))
        self._document = name

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as usual. Raises :class:`ReadingFailed` above the bound."""
        if size is not None and size > _DIRECTORY_LIMIT:
            message = (
                f"cannot read {self._document}: the archive's table of contents has {size} bytes and the limit is "
                f"{_DIRECTORY_LIMIT}; save the document again with the program that made it"
            )
            raise ReadingFailed("DocumentRefused", message)
        return super().read(size)
