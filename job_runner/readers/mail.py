"""E-mail (EML): subject, people and date, the text, then each attachment that is a document of its own.

Headers and structure are those of the standard library's parser. Of two versions of one text the plain one is read, the
HTML one where that is empty. Attachments are told by their content and read as files of their kind are, with bounds on how
many, how large and how deep. One that cannot be read is a failed page, one of a kind that nothing reads is named there.
"""

import contextlib
import email
import email.errors
import email.header
import email.policy
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from email.message import Message
from typing import BinaryIO, Final, Protocol, TypeAlias

from job_runner.document import Heading, Kind, Page, ParsedDocument
from job_runner.readers.blocks import Block, assemble
from job_runner.readers.charset import decode
from job_runner.readers.failure import ReadingFailed
from job_runner.readers.html import page_blocks

_DEPTH_LIMIT: Final = 100
"""Multiparts in one another; mail programs make up to five. The parser itself is recursive and ends at some 300."""
_FIELD_LIMIT: Final = 64 * 1024
"""Characters of a header field that are read: some 1,000 recipients. Decoding takes time by the square of what there is."""
_HEADERS: Final = ("From", "To", "Cc", "Date")
_LEVELS: Final = 6
_SIGNATURES: Final = frozenset({
    "application/pgp-signature", "application/pkcs7-signature", "application/x-pkcs7-signature", "application/pgp-keys",
})  # fmt: skip
_ENCRYPTED: Final = "cannot read {}: the mail is encrypted; store it decrypted, with its mail program"


@dataclass(slots=True)
class Allowance:
    """What the attachments of a mail may still be, those of mails in it included."""

    depth: int = 3
    """Mails in one another."""
    count: int = 100
    size: int = 256 * 2**20
    """Bytes, decoded: as much as the parts of an archive may have."""


class ReadAttachment(Protocol):
    """Reads an attachment as :func:`job_runner.readers.read` reads a file."""

    def __call__(self, file: BinaryIO, *, kind: Kind, name: str, allowance: Allowance) -> ParsedDocument:
        """Raise :class:`ReadingFailed`."""
        ...


def read_mail(file: BinaryIO, *, name: str, allowance: Allowance, read: ReadAttachment) -> ParsedDocument:
    """Read an e-mail.

    Raises :class:`ReadingFailed`: DocumentUnreadable for an encrypted one, DocumentRefused for parts in one another without
    end, DocumentEmpty for one that says nothing.
    """
    try:
        message = email.message_from_binary_file(file, policy=email.policy.compat32)
        return _Mail(name=name, allowance=allowance, read=read).document(message)
    except RecursionError as error:  # the library's parser, which has no limit of its own
        raise _too_deep(name) from error


def _too_deep(name: str) -> ReadingFailed:
    message = (
        f"cannot read {name}: more than {_DEPTH_LIMIT} parts of the mail are in one another; save what it holds as files"
    )
    return ReadingFailed("DocumentRefused", message)


_Part: TypeAlias = "Message[str, str]"


@dataclass(slots=True)
class _Mail:
    """One mail, and what was found in it so far."""

    name: str
    allowance: Allowance
    read: ReadAttachment
    text: list[Block] = field(default_factory=list)
    attachments: list[_Part] = field(default_factory=list)
    encrypted: bool = False

    def document(self, message: _Part) -> ParsedDocument:
        """Return the whole mail."""
        self._collect(message, depth=0)
        subject = _header(message, "Subject")
        head = [Block(text=f"{key}: {value}", group=1) for key in _HEADERS if (value := _header(message, key))]
        parts = [assemble([*([Block(text=subject, level=1)] if subject else []), *head, *self.text], kind=Kind.EML)]
        failed: list[int] = []
        for attachment in self.attachments:
            part, is_failed = self._attachment(attachment)
            if is_failed:
                failed.append(1 + sum(len(one.pages) for one in parts))
            parts.append(part)
        if not self.text and not self.attachments:
            if self.encrypted:
                raise ReadingFailed("DocumentUnreadable", _ENCRYPTED.format(self.name))
            if not subject:
                message_ = f"cannot index {self.name}: the mail has neither subject, text nor attachments"
                raise ReadingFailed("DocumentEmpty", message_)
        return _joined(parts, failed=failed)

    # ---------------------------------------------------------------------------------------------------------- parts

    def _collect(self, part: _Part, *, depth: int, text_wanted: bool = True) -> None:
        """Take text and attachments from a part and those below it."""
        if depth > _DEPTH_LIMIT:
            raise _too_deep(self.name)
        kind = part.get_content_type()
        if kind.startswith("multipart/") and not part.is_multipart():
            kind = "text/plain"  # its boundary is lost
        if part.is_multipart() and kind != "message/rfc822":
            below = [one for one in part.get_payload() if isinstance(one, Message)]
            match kind:
                case "multipart/alternative":
                    self._collect_alternative(below, depth=depth, text_wanted=text_wanted)
                case "multipart/encrypted":
                    self.encrypted = True
                case _:
                    for one in below:
                        self._collect(one, depth=depth + 1, text_wanted=text_wanted)
        elif kind in _SIGNATURES:
            pass
        elif kind in {"application/pkcs7-mime", "application/x-pkcs7-mime"}:
            self.encrypted = True
        elif kind in {"text/plain", "text/html"} and part.get_content_disposition() != "attachment" and not _filename(part):
            if text_wanted:
                self.text += self._blocks(part, kind)
        elif not _is_decoration(part):
            self.attachments.append(part)

    def _collect_alternative(self, versions: Sequence[_Part], *, depth: int, text_wanted: bool) -> None:
        """Take the text of one version, and the attachments of all: mail programs hang them on any."""
        ordered = sorted(versions, key=lambda version: version.get_content_type() != "text/plain")
        for version in ordered:
            before = len(self.text)
            self._collect(version, depth=depth + 1, text_wanted=text_wanted)
            text_wanted = text_wanted and len(self.text) == before

    def _blocks(self, part: _Part, kind: str) -> list[Block]:
        data, charset = _payload(part), part.get_content_charset()
        try:
            if kind == "text/html":
                found = page_blocks(data, name=self.name, charset=charset)[0]
                return [replace(block, level=min(block.level + 1, _LEVELS)) if block.level else block for block in found]
            text = decode(data, name=self.name, declared=charset)
        except ReadingFailed as failure:
            return [Block(text=f"[Text not read: {_why(failure, self.name)}]")]
        if part.get_param("format") == "flowed":
            text = _unflowed(text, delete_space=str(part.get_param("delsp")).lower() == "yes")
        return [Block(text=paragraph.strip("\n")) for paragraph in re.split(r"\n[ \t]*\n", text) if paragraph.strip()]

    # ---------------------------------------------------------------------------------------------------- attachments

    def _attachment(self, part: _Part) -> tuple[ParsedDocument, bool]:
        """Return what is in an attachment, and whether reading it failed."""
        from job_runner.kinds import kind_of  # here: that module imports from this package

        inner = part.get_payload(0) if part.is_multipart() else None
        title = _filename(part)
        data = b""
        if isinstance(inner, Message):
            title = title or _header(inner, "Subject")
        else:
            data = _payload(part)
        title = title or part.get_content_type()
        name = f"{self.name} > {title}"
        self.allowance.count -= 1
        self.allowance.size -= len(data)
        if self.allowance.count < 0 or self.allowance.size < 0:
            return _note(title, "the attachments are too many or too large"), True
        try:
            kind = Kind.EML if isinstance(inner, Message) else kind_of(io.BytesIO(data), name=title)
        except ReadingFailed as failure:
            return _note(title, _why(failure, title)), failure.reason == "DocumentUnreadable"
        if kind is Kind.EML and self.allowance.depth <= 1:
            return _note(title, "too many mails are in one another"), True
        self.allowance.depth -= kind is Kind.EML
        try:
            if isinstance(inner, Message):
                document = _Mail(name=name, allowance=self.allowance, read=self.read).document(inner)
            else:
                document = self.read(io.BytesIO(data), kind=kind, name=name, allowance=self.allowance)
        except ReadingFailed as failure:
            return _note(title, _why(failure, name)), failure.reason != "DocumentEmpty"
        finally:
            self.allowance.depth += kind is Kind.EML
        head = assemble([Block(text=f"Attachment: {title}", level=2)], kind=Kind.EML)
        return _joined([head, document], deeper=2, same_page=True), False


def _note(title: str, why: str) -> ParsedDocument:
    """Return what stands in the place of an attachment that is not read."""
    return assemble([Block(text=f"[Attachment {title} was not read: {why}]")], kind=Kind.EML)


def _why(failure: ReadingFailed, name: str) -> str:
    """Return the reason in a message, without its beginning ("cannot read a.zip: ") and without the remedy."""
    return re.sub(rf"cannot \w+ {re.escape(name)}(?: \([^)]*\))?: ", "", failure.message).partition(";")[0]


def _joined(
    parts: Sequence[ParsedDocument], *, failed: Sequence[int] = (), deeper: int = 0, same_page: bool = False
) -> ParsedDocument:
    """Return documents one after the other, with their pages counted through; ``failed`` are numbers of pages there.

    The headings of all but the first are ``deeper`` levels down. ``same_page``: the second goes on where the first ends.
    """
    texts: list[str] = []
    pages: list[Page] = []
    headings: list[Heading] = []
    lost = list(failed)
    length = 0
    for part in parts:
        if texts:
            texts.append("\n\n")
            length += 2
        before = len(pages) - (same_page and bool(texts))
        pages += [
            Page(number=before + page.number, start=length + page.start)
            for page in part.pages
            if before + page.number > len(pages)
        ]
        down = deeper if texts else 0
        headings += [
            replace(one, start=length + one.start, end=length + one.end, level=min(one.level + down, _LEVELS))
            for one in part.headings
        ]
        lost += [before + page for page in part.failed_pages]
        texts.append(part.text)
        length += len(part.text)
    return ParsedDocument(
        kind=Kind.EML,
        text="".join(texts),
        pages=tuple(pages),
        headings=tuple(headings),
        failed_pages=tuple(sorted({*lost})),
    )


# ------------------------------------------------------------------------------------------------------ headers and data


def _raw(message: _Part, key: str) -> str:
    return next((str(value) for found, value in message.raw_items() if found.lower() == key.lower()), "")


def _header(message: _Part, key: str) -> str:
    """Return a header field as people read it, in one line; ``""`` if there is none."""
    return _decoded(_raw(message, key))


def _decoded(value: str) -> str:
    """Return a header's value with its encoded words (RFC 2047) decoded; other bytes are taken as those of a text are."""
    value = value[:_FIELD_LIMIT]
    pieces: Sequence[tuple[str | bytes, str | None]] = [(value, None)]
    if not value.isascii():
        pieces = [(value.encode("utf-8", errors="surrogateescape"), None)]
    elif "=?" in value:
        with contextlib.suppress(email.errors.HeaderParseError):  # damaged base64
            pieces = email.header.decode_header(value)
    return " ".join("".join(_text(piece, charset) for piece, charset in pieces).split())


def _text(piece: str | bytes, charset: str | None) -> str:
    if isinstance(piece, str):
        return piece
    try:
        return decode(piece, name="header", declared=charset)
    except ReadingFailed:
        return piece.decode("utf-8", errors="replace")


def _filename(part: _Part) -> str:
    """Return the name of an attachment, without the folders that some programs leave in it; ``""`` if it has none."""
    for key in ("Content-Disposition", "Content-Type"):
        if not (raw := _raw(part, key)).isascii():
            part.replace_header(key, _decoded(raw))  # the library would replace such bytes by question marks
    name = part.get_filename("")
    return re.split(r"[/\\]", _decoded(name))[-1][:255] if name else ""


def _payload(part: _Part) -> bytes:
    """Return the content of a part with its transfer encoding undone; damaged base64 gives what there is."""
    data = part.get_payload(decode=True)
    return data if isinstance(data, bytes) else b""


def _is_decoration(part: _Part) -> bool:
    """Tell a picture that belongs to the text, a logo, from one that was attached."""
    return part.get_content_maintype() == "image" and part.get_content_disposition() != "attachment" and "Content-ID" in part


def _unflowed(text: str, *, delete_space: bool) -> str:
    """Return text of ``format=flowed`` (RFC 3676) with the lines of a paragraph joined again."""
    lines: list[str] = []
    flows = False
    for line in text.split("\n"):
        content = line.removeprefix(" ") if not line.startswith(">") else line
        if flows and not content.startswith(">") and content != "-- ":
            lines[-1] += content
        else:
            lines.append(content)
        flows = content.endswith(" ") and content != "-- "
        if flows and delete_space:
            lines[-1] = lines[-1][:-1]
    return "\n".join(line.rstrip(" ") for line in lines)
