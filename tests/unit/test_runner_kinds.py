"""What a file is stands in it; the name counts where formats have no signature."""

import io
import zipfile

import pytest

from job_runner.document import READABLE, Kind
from job_runner.kinds import kind_of
from job_runner.readers import ReadingFailed
from tests.support.compound import make_compound
from tests.support.docx import make_docx, zipped

OFFICE = "application/vnd.openxmlformats-officedocument"
PPTX = f"{OFFICE}.presentationml.presentation.main+xml"
MAIL = b"Return-Path: <a@example.com>\r\nFrom: a@example.com\r\nSubject: Tanks,\r\n tides\r\n\r\nText"
ROWS = "".join(f"{number}\t站{number}\t{number * 7}\n" for number in range(6))
POEM = "One, two,\nthree, four,\nfive, six,\nseven, eight,\nnine, ten,\n"
BMP = b"BM\x46\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0"


def office(content_type: str) -> bytes:
    """An Office file whose main part has a type, with an embedded workbook."""
    types = (
        '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        f'<Default Extension="xlsx" ContentType="{OFFICE}.spreadsheetml.sheet"/>'
        f'<Override PartName="/main.xml" ContentType="{content_type}"/></Types>'
    )
    return zipped({"[Content_Types].xml": types, "main.xml": "<x/>"})


def of_type(mimetype: str) -> bytes:
    """An OpenDocument file or a book."""
    return zipped({"mimetype": mimetype, "content.xml": "<x/>"})


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        # by signatures
        ("a.pdf", b"%PDF-1.7 ...", Kind.PDF),
        ("a.txt", b"\0\0junk from a mail\n%PDF-1.4 ...", Kind.PDF),
        ("a.txt", b"\x89PNG\r\n\x1a\n\0", Kind.IMAGE),
        ("a", b"\xff\xd8\xff\xe0\0", Kind.IMAGE),
        ("a", b"II*\0", Kind.IMAGE),
        ("a", b"MM\0*", Kind.IMAGE),
        ("a", b"RIFF\x24\0\0\0WEBPVP8 ", Kind.IMAGE),
        ("a", BMP, Kind.IMAGE),
        ("a", b"BMW and Audi are names", Kind.TEXT),
        # by the members of an archive
        ("a.txt", make_docx(), Kind.DOCX),
        ("a", office(f"{OFFICE}.wordprocessingml.template.main+xml"), Kind.DOCX),
        ("a.docx", office(f"{OFFICE}.spreadsheetml.sheet.main+xml"), Kind.XLSX),
        ("a", office("application/vnd.ms-excel.sheet.macroEnabled.main+xml"), Kind.XLSX),
        ("a", office(f"{OFFICE}.presentationml.slideshow.main+xml"), Kind.PPTX),
        ("a", office("application/vnd.ms-powerpoint.presentation.macroEnabled.main+xml"), Kind.PPTX),
        ("a", zipped({"[CONTENT_TYPES].XML": f"<x ContentType='{PPTX}'/>".encode("utf-16")}), Kind.PPTX),
        ("a.zip", of_type("application/vnd.oasis.opendocument.spreadsheet"), Kind.ODS),
        ("a", of_type("application/vnd.oasis.opendocument.spreadsheet-template"), Kind.ODS),
        ("a", of_type("application/epub+zip\n"), Kind.EPUB),
        ("a", zipped({"META-INF/container.xml": "<container/>"}), Kind.EPUB),
        # by the streams of a compound file
        ("a.doc", make_compound({"Workbook": b"x", "\x05SummaryInformation": b"x"}), Kind.XLS),
        ("a", make_compound({"Book": b"x"}), Kind.XLS),
        ("a", make_compound({"Workbook": b"x"}, embedded={"WordDocument": b"x"}), Kind.XLS),
        ("a", make_compound(dict.fromkeys(["1", "2", "3", "4", "5", "Workbook"], b"x"), directory_apart=True), Kind.XLS),
        # by tags and fields
        ("a.txt", b"\xef\xbb\xbf \n<!DOCTYPE HTML PUBLIC>", Kind.HTML),
        ("a.pdf", b"<html><body>Sign in</body></html>", Kind.HTML),
        ("a.csv", b"<!doctype html>\n<title>a,b</title>", Kind.HTML),
        ("a.md", b"<HTML lang=en>", Kind.HTML),
        ("a", b"<?xml version='1.0'?>\n<!-- saved --><!-- twice -->\n<!DOCTYPE html>", Kind.HTML),
        ("a", "<html><body>页</body></html>".encode("utf-16"), Kind.HTML),
        ("a.htm", b"<p>A piece of a page", Kind.HTML),
        ("a.html", b"no tags at all", Kind.TEXT),
        ("a.xls", b"<table><tr><td>an export</table>", Kind.HTML),
        ("a.xls", b"MIME-Version: 1.0\nX-Document-Type: Workbook\nContent-Type: multipart/related\n\n", Kind.EML),
        ("a.xls", b"a\tb\tc\n" * 5, Kind.CSV),
        ("a.txt", b"<!--" * 500 + b"-->" * 500, Kind.TEXT),
        ("a", MAIL, Kind.EML),
        ("a.txt", b"From a@example.com Mon Jan  1\n" + MAIL, Kind.EML),
        ("a.eml", b"Subject: alone\n\n", Kind.EML),
        ("a.txt", b"From: me\nTo: you\nDate: today\nSubject: a memo that somebody typed\n\nText", Kind.TEXT),
        ("a.txt", b"Subject: tanks\nMessage-ID: 1\nand prose\n\n", Kind.TEXT),
        ("a.eml", b"no field at all", Kind.TEXT),
        # JSON
        ("a.json", b'{"a": 1', Kind.JSON),
        ("a.json", b"\xef\xbb\xbf\n [", Kind.JSON),
        ("a.json", b"prose in a file of this name", Kind.TEXT),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', Kind.JSONL),
        ("a.jsonl", b'{"a": 1}', Kind.JSONL),
        ("a.jsonl", b"prose in a file of this name", Kind.TEXT),
        ("a", b'{"a": 1}\n{"a": 2}\n', Kind.JSONL),
        ("a", b'{"a": 1}\n\n{"a": broken', Kind.TEXT),
        ("a", b'{\n  "a": 1\n}\n', Kind.JSON),
        ("a.txt", '{"a": 1}'.encode("utf-16"), Kind.JSON),
        ("a.csv", b'[{"a": 1}, {"a": 2}]', Kind.JSON),
        ("a", b'[{"a": "' + b"x" * 70_000, Kind.JSON),
        ("a", b"[1] See " + b"x" * 70_000, Kind.TEXT),
        ("a.txt", b"[1] A reference, not JSON", Kind.TEXT),
        ("a.txt", b"{ a: template }", Kind.TEXT),
        ("a.log", b'{"a": 1}\n{"a": 2}\n', Kind.TEXT),
        ("a.md", b'{"a": 1}', Kind.MARKDOWN),
        # delimited tables
        ("a.csv", b"one field", Kind.CSV),
        ("a.TSV", b"a\tb\n1\t2", Kind.CSV),
        ("a", ROWS.encode(), Kind.CSV),
        ("a.txt", ROWS.encode("utf-16"), Kind.CSV),
        ("a.txt", ROWS.replace("\t", ",").encode("gb18030"), Kind.CSV),
        ("a", ROWS.replace("\t", ";").encode(), Kind.CSV),
        ("a", b'a,b,"c, d"\n' * 5, Kind.TEXT),
        ("a", POEM.encode(), Kind.TEXT),
        ("a", ROWS.encode()[:40], Kind.TEXT),
        ("a", b"| a | b |\n|---|---|\n" + b"| 1 | 2 |\n" * 9, Kind.TEXT),
        ("a.log", ROWS.encode(), Kind.TEXT),
        ("a.md", ROWS.encode(), Kind.MARKDOWN),
        ("a", (ROWS * 2000).encode(), Kind.CSV),
        # the rest
        ("a.pdf", b"just text, whatever the name says", Kind.TEXT),
        ("a.md", b"plain", Kind.MARKDOWN),
        ("a.md", b"<p align=center>A README", Kind.MARKDOWN),
        ("README", b"# Title\n\ntext", Kind.MARKDOWN),
        ("a.txt", b"# Title\n\ntext", Kind.TEXT),
        ("a", b"text", Kind.TEXT),
        ("a", b"MZ is how this text starts", Kind.TEXT),
        ("a", "知识库".encode("gb18030"), Kind.TEXT),
        ("a", "知识库".encode("utf-16"), Kind.TEXT),
    ],
)  # fmt: skip
def test_the_kind_is_told_by_content(name: str, data: bytes, kind: Kind) -> None:
    assert kind_of(io.BytesIO(data), name=name) is kind


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"PK\x05\x06" + bytes(18), "an empty ZIP archive"),
        (zipped({"a.txt": b"x"}), "a ZIP archive;"),
        (office("text/plain"), "an Office file of an unknown kind"),
        (office("application/vnd.ms-excel.sheet.binary.macroEnabled.main"), "a binary Excel workbook .*save it as XLSX"),
        (office("application/vnd.ms-visio.drawing.main+xml"), "a Visio drawing.*export it as PDF"),
        (of_type("application/vnd.oasis.opendocument.text"), "an OpenDocument text .*save it as DOCX"),
        (of_type("application/vnd.oasis.opendocument.graphics"), "an OpenDocument file.*save it as PDF"),
        (make_compound({"WordDocument": b"x"}), "an old Word document .*save it as DOCX"),
        (make_compound({"PowerPoint Document": b"x"}), "an old PowerPoint file .*save it as PPTX"),
        (make_compound({"__properties_version1.0": b"x"}), "an Outlook message"),
        (make_compound({"Else": b"x"}, embedded={"Workbook": b"x"}), "an old Microsoft Office file.*save it as DOCX or PDF"),
        (make_compound({"Workbook": b"x"})[:600], "an old Microsoft Office file"),
        (b"\x7fELF\x02\x01\0", "a Linux program"),
        (b"\x1f\x8b\x08\0", "a gzip file"),
        (b"GIF89a", "a GIF image"),
        (
            b'<?xml version="1.0"?>\r\n<?mso-application progid="Excel.Sheet"?>',
            "an Office 2003 file in XML.*save it as DOCX or XLSX",
        ),
        (b"{\\rtf1\\ansi", "an RTF document"),
        (b"\0\0\0\x20ftypisom", "audio or video"),
        (b"\x00\x01\x02\x03", "binary data"),
    ],
)
def test_other_kinds_are_refused_by_their_name(data: bytes, what: str) -> None:
    with pytest.raises(ReadingFailed, match=f"cannot read x.txt: it is {what}") as failure:
        kind_of(io.BytesIO(data), name="x.txt")
    assert failure.value.reason == "DocumentRefused"
    assert f"this version reads {READABLE}" in failure.value.message


def lying_about_size(data: bytes) -> bytes:
    """An archive that says its table of contents has 1 GiB."""
    end = data.rindex(b"PK\x05\x06")
    return data[: end + 12] + (1 << 30).to_bytes(4, "little") + data[end + 16 :]


def by_lzma() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("mimetype", "application/epub+zip")
    return file.getvalue()


def with_password(data: bytes) -> bytes:
    return data.replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        pytest.param("a.pdf", b"\x00\x01garbage", "no PDF header", id="pdf without its start"),
        pytest.param("a", make_docx("x" * 9999)[:-30], "ZIP archive, which DOCX.*is damaged or cut short", id="truncated"),
        pytest.param("a", b"PK\x03\x04" + bytes(50), "damaged or cut short", id="no archive"),
        pytest.param("a", lying_about_size(make_docx()), "damaged or cut short", id="lying"),
        pytest.param("a", by_lzma(), "damaged or cut short", id="another method"),
        pytest.param("a", with_password(make_docx()), "encrypted with a password", id="password"),
        pytest.param("a", make_compound({"EncryptedPackage": b"x"}), "encrypted with a password", id="office, password"),
    ],
)  # fmt: skip
def test_damaged_and_encrypted_files_say_so(name: str, data: bytes, message: str) -> None:
    with pytest.raises(ReadingFailed, match=message) as failure:
        kind_of(io.BytesIO(data), name=name)
    assert failure.value.reason == "DocumentUnreadable"


def test_little_of_a_bomb_is_inflated_and_the_file_stays_open() -> None:
    file = io.BytesIO(zipped({"mimetype": b" " * (8 << 20)}))
    with pytest.raises(ReadingFailed, match="a ZIP archive"):
        kind_of(file, name="a")
    assert file.seek(0) == 0
    oversized = io.BytesIO(zipped({f"{number}-{'x' * 60_000}": b"" for number in range(80)}))
    with pytest.raises(ReadingFailed, match=r"table of contents has .* and the limit is"):
        kind_of(oversized, name="a")
