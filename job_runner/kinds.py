"""What a file is, by its content; the name only counts where a format has no signature of its own.

- PDF, Office files, pictures and archives begin with a signature. ZIP archives are told apart by their members, compound
  files (OLE) by the names of the streams in their root.
- HTML begins with a tag of its own, an e-mail with header fields.
- JSON, JSON Lines and delimited tables are text. A file named so is one, unless its first character contradicts that; a
  file of another name is one if it can be nothing else (:func:`_data`). Markdown goes by its name, or by its headings.

This runs in the process that holds the passwords, so it looks at little and computes less: the first 64 KiB, the table of
contents of an archive and two of its members, up to 1 MiB each, the directory of a compound file. No XML is parsed.
"""

import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, Final

from job_runner.document import READABLE, Kind
from job_runner.readers.archive import Archive, BoundedReads
from job_runner.readers.delimited import is_table
from job_runner.readers.failure import ReadingFailed

_HEAD: Final = 64 * 1024
"""Bytes from which most kinds are told."""
_MEMBER_LIMIT: Final = 2**20
"""Bytes of a member of an archive that are looked at: a hundred times what its list of types has."""
_MARKDOWN_SUFFIXES: Final = frozenset({".md", ".markdown", ".mdown", ".mkd", ".mdx"})
_HTML_SUFFIXES: Final = frozenset({".html", ".htm", ".xhtml"})
_TABLE_SUFFIXES: Final = frozenset({".csv", ".tsv", ".tab"})
_JSON_SUFFIXES: Final = frozenset({".json", ".geojson"})
_LINES_SUFFIXES: Final = frozenset({".jsonl", ".ndjson", ".jsonlines", ".ldjson"})
_MAIL_SUFFIXES: Final = frozenset({".eml", ".mht", ".mhtml"})
_EXPORT_SUFFIXES: Final = frozenset({".xls", ".doc"})
"""What programs name pages, and saved ones (MHTML), that office suites are to open."""
_HTML_START: Final = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?>(?:<!--.*?-->\s*)*)<(?:!doctype\s+html|html|head|body)\b",
    re.IGNORECASE | re.DOTALL,
)
_TAG: Final = re.compile(rb"<[a-z][a-z0-9]*[\s/>]", re.IGNORECASE)
_MARKDOWN_HEADING: Final = re.compile(rb"^#{1,6} \S", re.MULTILINE)
_OFFICE_2003: Final = re.compile(rb"<\?mso-application\s+progid=")
_FIELD: Final = re.compile(rb"([!-9;-~]{1,76}):")
"""A header field's name (RFC 5322, 2.2)."""
_FIELDS: Final = frozenset({b"from", b"to", b"cc", b"date", b"subject", b"reply-to", b"sender", b"content-type"})
_TRACES: Final = frozenset({b"received", b"return-path", b"delivered-to", b"message-id", b"mime-version"})
"""Fields that programs write, and no one who types a memo."""
_JSON_START: Final = re.compile(
    r'\{\s*(?:"(?:[^"\\\n]|\\.)*"\s*:|\})|\[\s*(?:["{\[]|(?:-?\d[\d.eE+-]*|true|false|null)\s*,)'
)

_SIGNATURES: Final[tuple[tuple[bytes, str], ...]] = (
    (b"PK\x05\x06", "an empty ZIP archive"),
    (b"{\\rtf", "an RTF document"),
    (b"GIF8", "a GIF image"),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x7fELF", "a Linux program"),
    (b"MZ", "a Windows program"),
    (b"%!PS", "a PostScript file"),
    (b"SQLite format 3\x00", "an SQLite database"),
)
_IMAGES: Final = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff[\xc0-\xfe]|II[*+]\0|MM\0[*+]|RIFF.{4}WEBP"
    rb"|BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0{3}",  # BMP, by the sizes that its second header may have
    re.DOTALL,
)
_MAIN_TYPE: Final = re.compile(
    rb"""=\s*["']\s*application/(?:vnd\.)?([^"']{1,150}?\.main(?:\+xml)?)\s*["']""", re.IGNORECASE
)
_OFFICE: Final = (
    (b"wordprocessingml", Kind.DOCX),
    (b"ms-word", Kind.DOCX),
    (b"ms-excel.sheet.binary", "a binary Excel workbook (XLSB); save it as XLSX"),
    (b"spreadsheetml", Kind.XLSX),
    (b"ms-excel", Kind.XLSX),
    (b"presentationml", Kind.PPTX),
    (b"ms-powerpoint", Kind.PPTX),
    (b"visio", "a Visio drawing; export it as PDF"),
)
"""What stands in the content type of the main part of an Office file, with and without macros."""
_MIMETYPES: Final = (
    (b"application/epub+zip", Kind.EPUB),
    (b"application/vnd.oasis.opendocument.spreadsheet", Kind.ODS),
    (b"application/vnd.oasis.opendocument.text", "an OpenDocument text (ODT); save it as DOCX"),
    (b"application/vnd.oasis.opendocument.presentation", "an OpenDocument presentation (ODP); save it as PPTX"),
    (b"application/vnd.oasis.opendocument", "an OpenDocument file; save it as PDF"),
)
_COMPOUND: Final = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_STREAMS: Final = (
    ("Workbook", Kind.XLS),
    ("Book", Kind.XLS),  # Excel 5 and 95
    ("WordDocument", "an old Word document (DOC); save it as DOCX"),
    ("PowerPoint Document", "an old PowerPoint file (PPT); save it as PPTX"),
    ("__properties_version1.0", "an Outlook message (MSG); save it as HTML or text"),
)
_DIRECTORY_SECTORS: Final = 64
"""Sectors of the directory of a compound file that are looked at: 256 streams and more."""


def kind_of(file: BinaryIO, *, name: str) -> Kind:
    """Tell the kind of an open file; ``name`` is what messages call it, and its suffix counts as the module says.

    Raises :class:`ReadingFailed`: DocumentRefused, naming what it is instead, DocumentUnreadable for an archive that is cut
    short, a PDF that has lost its start and an Office file with a password.
    """
    suffix = PurePosixPath(name).suffix.lower()
    file.seek(0)
    head = file.read(_HEAD)
    if head.startswith(b"PK\x03\x04"):
        return _archive(file, name=name)
    if head.startswith(_COMPOUND):
        return _compound(file, head, name=name)
    if b"%PDF-" in head[:1024]:  # readers accept some bytes of a mail or a printer before it
        return Kind.PDF
    if _IMAGES.match(head):
        return Kind.IMAGE
    for signature, description in _SIGNATURES:
        if head.startswith(signature) and (len(signature) > 3 or b"\0" in head):
            raise _refused(name, description)
    if head[4:12] in {b"ftypmp42", b"ftypisom"} or (head.startswith((b"RIFF", b"OggS", b"ID3")) and b"\0" in head):
        raise _refused(name, "audio or video")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # the only way for text to have bytes of value 0
        whole, head = len(head) < _HEAD, head.decode("utf-16", errors="ignore").encode()
        return _text(head, whole=whole, suffix=suffix)
    if _OFFICE_2003.search(head[:1024]):
        raise _refused(name, "an Office 2003 file in XML; save it as DOCX or XLSX")
    if b"\0" in head:
        if suffix == ".pdf":
            message = f"cannot read {name}: it has no PDF header; it is damaged, export it again"
            raise ReadingFailed("DocumentUnreadable", message)
        raise _refused(name, "binary data of an unknown kind")
    return _text(head, whole=len(head) < _HEAD, suffix=suffix)


def _refused(name: str, what: str) -> ReadingFailed:
    described, _, remedy = what.partition("; ")
    advice = f": {remedy}" if remedy else ""
    return ReadingFailed("DocumentRefused", f"cannot read {name}: it is {described}; this version reads {READABLE}{advice}")


# ---------------------------------------------------------------------------------------------------------------- text


def _text(head: bytes, *, whole: bool, suffix: str) -> Kind:
    """Tell the kind of a text by its first bytes; ``whole``: there are no others."""
    if _HTML_START.match(head[:4096]) or (suffix in _HTML_SUFFIXES | _EXPORT_SUFFIXES and _TAG.search(head)):
        return Kind.HTML
    if _is_mail(head, named=suffix in _MAIL_SUFFIXES | _EXPORT_SUFFIXES):
        return Kind.EML
    if suffix in _MARKDOWN_SUFFIXES:
        return Kind.MARKDOWN
    if (kind := _data(head, whole=whole, suffix=suffix)) is not None:
        return kind
    if suffix in {".txt", ".text", ".log"}:
        return Kind.TEXT
    return Kind.MARKDOWN if _MARKDOWN_HEADING.search(head) else Kind.TEXT


def _is_mail(head: bytes, *, named: bool) -> bool:
    """Tell whether a text begins with the header of an e-mail.

    Every line up to the first empty one is a field or goes on with one. Of a file that is not named a mail, three are fields
    of mails, one of them such as only programs write.
    """
    found: set[bytes] = set()
    for line in head.removeprefix(b"\xef\xbb\xbf").splitlines():
        if not line.strip():
            break
        if line[:1] in b" \t" and found:
            continue
        field = _FIELD.match(line)
        if field is None:
            if found or not line.startswith(b"From "):  # the line that mailboxes part their mails with
                return False
        else:
            found.add(field.group(1).lower())
    known = found & (_FIELDS | _TRACES)
    return bool(known) if named else len(known) >= 3 and bool(found & _TRACES)


def _data(head: bytes, *, whole: bool, suffix: str) -> Kind | None:
    """Tell whether a text is JSON, JSON Lines or a delimited table; ``None``: it is neither.

    A name says so if the content does not contradict it: JSON begins with a bracket. Without such a name it is JSON if the
    whole file parses, or the beginning of one of more than 64 KiB looks like nothing else; JSON Lines if each of the first
    two lines is a JSON object or array; a delimited table if at least five lines have the same number of at least three
    fields, and no comma is followed by a space. A log, ``.log``, is a log.
    """
    text = head.decode("utf-8", errors="replace").removeprefix("\ufeff").lstrip()
    bracket = text[:1] in ("{", "[") and bool(text)
    if bracket and (suffix in _LINES_SUFFIXES or (suffix != ".log" and _is_json_lines(text))):
        return Kind.JSONL
    if bracket and (suffix in _JSON_SUFFIXES or (suffix != ".log" and _is_json(text, whole=whole))):
        return Kind.JSON
    if suffix in _TABLE_SUFFIXES or (suffix != ".log" and is_table(head.decode("latin-1"), whole=whole)):
        return Kind.CSV
    return None


def _is_json(text: str, *, whole: bool) -> bool:
    if not whole:
        return _JSON_START.match(text) is not None
    return _parses(text)


def _is_json_lines(text: str) -> bool:
    lines = [line for line in text.split("\n", 100)[:-1] if line.strip()][:2]
    return len(lines) == 2 and all(line.lstrip()[:1] in ("{", "[") and _parses(line) for line in lines)


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


# ------------------------------------------------------------------------------------------------------------ archives


class _Zip(Archive):
    FORMAT = "ZIP archive, which DOCX, PPTX, XLSX, ODS and EPUB files are,"


def _archive(file: BinaryIO, *, name: str) -> Kind:
    """Tell the kind of a ZIP archive by its members."""
    bounded = BoundedReads(file, name=name)
    try:
        archive = _Zip(bounded, name=name)
        if "mimetype" in archive:
            mimetype = archive.beginning("mimetype", size=_MEMBER_LIMIT).strip()
            for mark, what in _MIMETYPES:
                if mimetype.startswith(mark):
                    return _known(what, name=name)
        if "[content_types].xml" in archive:
            # Without the zeros of UTF-16, which some writers use.
            types = archive.beginning("[content_types].xml", size=_MEMBER_LIMIT).replace(b"\0", b"")
            for found in _MAIN_TYPE.finditer(types):
                for mark, what in _OFFICE:
                    if mark in found.group(1).lower():
                        return _known(what, name=name)
            raise _refused(name, "an Office file of an unknown kind")
        if "meta-inf/container.xml" in archive:
            return Kind.EPUB
        raise _refused(name, "a ZIP archive")
    finally:
        bounded.detach()  # the file stays open


def _known(what: Kind | str, *, name: str) -> Kind:
    if isinstance(what, Kind):
        return what
    raise _refused(name, what)


# ------------------------------------------------------------------------------------------------------ compound files


def _compound(file: BinaryIO, head: bytes, *, name: str) -> Kind:
    """Tell the kind of a compound file ([MS-CFB]) by the streams in its root; those of embedded files lie deeper."""
    streams = set(_root_streams(file, head))
    if "EncryptedPackage" in streams:
        message = f"cannot read {name}: the Office file is encrypted with a password; store it without one"
        raise ReadingFailed("DocumentUnreadable", message)
    found = (what for stream, what in _STREAMS if stream in streams)
    return _known(next(found, "an old Microsoft Office file; save it as DOCX or PDF"), name=name)


def _root_streams(file: BinaryIO, head: bytes) -> Iterator[str]:
    """Yield the names in the root of a compound file: the tree of siblings that hangs on the first entry."""
    directory = b"".join(_directory(file, head))
    entries = [directory[at : at + 128] for at in range(0, len(directory) - 127, 128)]
    ahead = [int.from_bytes(entries[0][76:80], "little")] if entries else []
    seen: set[int] = set()
    while ahead:
        number = ahead.pop()
        if number in seen or number >= len(entries):
            continue
        seen.add(number)
        entry = entries[number]
        yield entry[: max(int.from_bytes(entry[64:66], "little") - 2, 0)][:64].decode("utf-16-le", errors="replace")
        ahead += [int.from_bytes(entry[at : at + 4], "little") for at in (68, 72)]


def _directory(file: BinaryIO, head: bytes) -> Iterator[bytes]:
    """Yield the sectors of the directory of a compound file, in the order of the file's allocation table."""
    size = 4096 if int.from_bytes(head[30:32], "little") == 12 else 512
    table = [int.from_bytes(head[at : at + 4], "little") for at in range(76, 512, 4)]
    sector = int.from_bytes(head[48:52], "little")
    for _ in range(_DIRECTORY_SECTORS):
        file.seek((sector + 1) * size)
        read = file.read(size)
        if len(read) < size:
            return
        yield read
        index, place = divmod(sector, size // 4)
        if index >= len(table):
            return
        file.seek((table[index] + 1) * size + 4 * place)
        sector = int.from_bytes(file.read(4), "little")
