"""Everything without a container: text, HTML, JSON, tables, mails, pictures, and files that are not what they are named."""

import gzip
import struct
import zlib
from base64 import b64encode
from collections.abc import Iterator

from tests.data.hostile import Hostile
from tests.data.hostile.pdfs import one_page
from tests.support.docx import make_docx, paragraph, zipped

REFUSED, UNREADABLE, EMPTY = "DocumentRefused", "DocumentUnreadable", "DocumentEmpty"
TEXT = "The tide is high."


def files(url: str) -> Iterator[Hostile]:
    """Yield these files."""
    yield from _nothing()
    yield from _lies()
    yield from _large()
    yield from _mails(url)
    yield from _unicode()
    remote = (
        f"<html><head><base href='{url}/'><link rel=stylesheet href=s.css><meta http-equiv=refresh content='0;url={url}/r'>"
        f"<script src={url}/s.js></script></head><body><p>{TEXT}</p><img src={url}/i.png><iframe src={url}/f></iframe>"
        f"<object data={url}/o></object><video src={url}/v></video><svg><image href={url}/x></svg></body></html>"
    )
    yield Hostile("remote.html", remote.encode(), says=TEXT)
    dtd = f"<?xml version='1.0'?><!DOCTYPE html SYSTEM '{url}/x.dtd'><html>{TEXT}</html>"
    yield Hostile("external-dtd.html", dtd.encode(), says=TEXT)


def _nothing() -> Iterator[Hostile]:
    yield Hostile("empty.txt", b"", EMPTY, "0 bytes")
    yield Hostile("white.txt", b" \t\r\n" * 10_000, EMPTY, "no text in it")
    yield Hostile("white.md", "\u3000\u00a0\n".encode() * 1000, EMPTY, "no text in it")
    yield Hostile("mark-only.txt", b"\xef\xbb\xbf", EMPTY, "no text in it")
    yield Hostile("white.csv", b",,,\n,,,\n" * 100, EMPTY, "cannot index")
    yield Hostile("empty.json", b"{}", EMPTY, "cannot index")
    yield Hostile("zeros.bin", b"\0" * 100_000, REFUSED, "binary data")
    yield Hostile("zeros-in-text.txt", b"The tide\0 is high." * 10, REFUSED, "binary data")
    yield Hostile("controls.txt", bytes(range(1, 9)) * 1000, REFUSED, "binary data, not text")
    yield Hostile("scripts-only.html", b"<html><script>document.write('x')</script></html>", EMPTY, "shows no text")


def _lies() -> Iterator[Hostile]:
    yield Hostile("pdf-as.docx", one_page(), says=TEXT)
    yield Hostile("docx-as.pdf", make_docx(paragraph(TEXT)), says=TEXT)
    yield Hostile("html-as.pdf", f"<!doctype html><p>{TEXT}".encode(), says=TEXT)
    yield Hostile("program-as.pdf", b"\x7fELF\x02\x01\x01\0" + bytes(1000), REFUSED, "a Linux program")
    yield Hostile("program-as.txt", b"MZ\x90\0\x03\0\0\0" + bytes(1000), REFUSED, "a Windows program")
    yield Hostile("zip-as.docx", zipped({"a.txt": TEXT}), REFUSED, "it is a ZIP archive")
    yield Hostile("gzip-as.pdf", gzip.compress(bytes(1 << 20), mtime=0), REFUSED, "a gzip file")
    yield Hostile("png-as.txt", _png(10, 10), EMPTY, "needs OCR")
    yield Hostile("text-as.png", TEXT.encode(), says=TEXT)
    yield Hostile("both-pdf-and-zip.pdf", one_page() + zipped({"a.txt": "x"}), says=TEXT)
    yield Hostile("huge-picture.png", _png(2**31 - 1, 2**31 - 1), EMPTY, "needs OCR")


def _large() -> Iterator[Hostile]:
    yield Hostile("deep.html", b"<html>" + b"<div>" * 100_000 + b"x", REFUSED, "open in one another")
    yield Hostile("tags.html", b"<i>x" * 4_100_000, REFUSED, "tags and the limit")
    yield Hostile("open-comment.html", b"<html><p>x" + b"<!--" * 500_000, says="x")
    yield Hostile(
        "attributes.html", b"<p " + b" ".join(b"a%d" % it for it in range(300_000)) + b">x", REFUSED, "within 5 CPU seconds"
    )
    yield Hostile("entities.html", b"<html><p>x" + b"&amp;" * 1_000_000, says="x&")
    yield Hostile("spans.html", b"<table><tr><td colspan=99999 rowspan=99999>x" * 50 + b"<tr>" * 9999, says="x")
    yield Hostile("deep.json", b"[" * 1_000_000, REFUSED, "too deep in one another")
    yield Hostile("deep-objects.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, REFUSED, "too deep in one another")
    yield Hostile("number.json", b'{"a": ' + b"9" * 1_000_000 + b"}", EMPTY, "no text in it")
    yield Hostile("line.csv", b"a,b\n" + b"x" * (60 << 20), REFUSED, "cannot parse line.csv within")  # memory or time
    yield Hostile("quote.csv", b'a,b,c\n1,"' + b"x,\n" * 500_000, says="| a: x |")
    yield Hostile("columns.csv", b"a," * 250_000 + b"\n" + b"1," * 250_000, says="| a | a |")
    yield Hostile("line.txt", b"x" * (60 << 20), REFUSED, "larger than")
    yield Hostile("hashes.md", b"#" * 1_000_000 + b"\n" + b"# " * 500_000, says="#")
    yield Hostile("fences.md", b"```\n" * 200_000 + b"x", says="x")
    yield Hostile("brackets.md", b"# " + b"[" * 50_000 + b"](x)", says="[")
    yield Hostile("front-matter.md", b"---\n" + b"a: b\n" * 500_000, says="a: b")


def _mails(url: str) -> Iterator[Hostile]:
    head = b"From: a@example.com\nSubject: Tides\nMIME-Version: 1.0\n"

    def attached(data: bytes, name: bytes) -> bytes:
        return (
            b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\n" + TEXT.encode() + b"\n--b\nContent-Type: application/x\n"
            b"Content-Transfer-Encoding: base64\nContent-Disposition: attachment; filename=" + name + b"\n\n"
            + b64encode(data) + b"\n--b--\n"
        )  # fmt: skip

    nested = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (it, it) for it in range(10_000))
    yield Hostile("nested.eml", head + nested + b"\nx", REFUSED, "parts of the mail are in one another")
    yield Hostile(
        "mails-in-mails.eml", (head + b"Content-Type: message/rfc822\n\n") * 10_000 + b"\nx", REFUSED, "in one another"
    )
    parts = b"Content-Type: multipart/mixed; boundary=b\n\n" + b"--b\n\nx\n" * 100_000
    yield Hostile("many-parts.eml", head + parts, says="x")
    yield Hostile("header.eml", head + b"X-Long: " + b"x" * (8 << 20) + b"\n\n" + TEXT.encode(), says=TEXT)
    yield Hostile("headers.eml", head + b"X: y\n" * 500_000 + b"\n" + TEXT.encode(), says=TEXT)
    words = b"=?utf-8?q?=" * 100_000
    yield Hostile("encoded-words.eml", head.replace(b"Tides", words) + b"\n" + TEXT.encode(), says=TEXT)
    bomb = head + attached(make_docx(" " * (20 << 20)), b"a.docx")
    yield Hostile("bomb-attached.eml", bomb, says="[Attachment a.docx was not read: word/document.xml inflates")
    program = head + attached(b"MZ\x90\0" + bytes(99), b"../../a.exe")
    yield Hostile("program-attached.eml", program, says="[Attachment a.exe was not read: it is a Windows program]")
    body = b'Content-Type: message/external-body; access-type=URL; URL="%s/x"\n\nContent-Type: text/plain\n\n' % url.encode()
    yield Hostile("external.eml", head + body, says="Tides")
    html = f"Content-Type: text/html\n\n<img src='{url}/pixel.gif'><p>{TEXT}".encode()
    yield Hostile("pixel.eml", head + html, says=TEXT)
    yield Hostile(
        "base64.eml",
        head + b"Content-Transfer-Encoding: base64\n\n" + b"=A=" * 100_000,
        says="[Text not read: it holds binary data, not text]",
    )
    yield Hostile("charset.eml", head + b"Content-Type: text/plain; charset=rot13\n\n" + TEXT.encode(), says=TEXT)


def _unicode() -> Iterator[Hostile]:
    yield Hostile("marks.txt", ("e" + "\u0301" * 200_000 + TEXT).encode(), says=TEXT)
    yield Hostile("direction.txt", ("\u202e" * 1000 + TEXT).encode(), says=TEXT)
    yield Hostile("overlong.txt", b"\xc0\xaf\xe0\x80\xaf" * 1000 + TEXT.encode(), UNREADABLE, "its character set is unknown")
    yield Hostile("surrogates.json", b'{"a": "\\ud800\\udfff \\ud800 The tide is high."}', says=TEXT)
    yield Hostile("utf-7.txt", b"+ADw-script+AD4- " + TEXT.encode(), says=TEXT)
    yield Hostile("half-utf-16.txt", b"\xff\xfe" + "x".encode("utf-16-le") + b"\xd8", UNREADABLE, "marked as utf-16")
    yield Hostile("newlines.txt", b"\n" * 5_000_000 + TEXT.encode(), says=TEXT)
    yield Hostile("form-feeds.txt", b"\f" * 100_000 + TEXT.encode(), says=TEXT)


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
