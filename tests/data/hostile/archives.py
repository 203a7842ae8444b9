"""ZIP archives and compound files: DOCX, PPTX, XLSX, ODS, EPUB, XLS."""

import io
import stat
import struct
import zipfile
from collections.abc import Iterator

from tests.data.hostile import Hostile
from tests.support import pptx
from tests.support.compound import make_compound
from tests.support.docx import W, make_docx, paragraph, part, relationships, zipped
from tests.support.epub import chapter, make_epub
from tests.support.workbooks import MAIN, cell, make_ods, make_xls, make_xlsx, sheet

REFUSED, UNREADABLE, EMPTY = "DocumentRefused", "DocumentUnreadable", "DocumentEmpty"
DAMAGED = "damaged or cut short"
ENTITIES = "its XML declares entities"
TEXT = "The tide is high."
LAUGHS = "<!DOCTYPE x [<!ENTITY a 'ha'>" + "".join(
    f"<!ENTITY {chr(98 + it)} '{f'&{chr(97 + it)};' * 10}'>" for it in range(9)
)


def files(url: str) -> Iterator[Hostile]:
    """Yield these files."""
    yield from _bombs()
    yield from _entities(url)
    yield from _broken()
    yield from _odd(url)


def _with_doctype(xml: str, doctype: str) -> str:
    start, end = xml.split("?>", 1) if xml.startswith("<?xml") else ("<?xml version='1.0'", xml)
    return f"{start}?>{doctype}{end}"


def _bombs() -> Iterator[Hostile]:
    spaces = part("<w:body>|</w:body>").replace("|", " " * (20 << 20))
    small = zipped({"bomb.txt": b"\0" * (1 << 20)})
    for _ in range(3):
        small = zipped({f"{number}.zip": small for number in range(10)})
    row = "<t:table-row{}><t:table-cell{}><x:p>{}</x:p></t:table-cell></t:table-row>"
    blank = row.format("", "", " " * (20 << 20))
    rows = row.format(' t:number-rows-repeated="1048576"', ' t:number-columns-repeated="16384"', "x") * 100
    far = sheet(["Tank"], more=f'<row r="1048576">{cell("XFD1048576", "far")}</row>')
    shared = f'<sst xmlns="{MAIN}"><si><t>{"x" * (20 << 20)}</t></si></sst>'
    yield Hostile("bomb.docx", make_docx(parts={"word/document.xml": spaces}), REFUSED, "as zip bombs do")
    yield Hostile("bomb.pptx", pptx.make_pptx(pptx.slide(" " * (20 << 20))), REFUSED, "as zip bombs do")
    yield Hostile("bomb.xlsx", make_xlsx({"S": sheet(["x"], more=" " * (20 << 20))}), REFUSED, "as zip bombs do")
    strings = {
        "xl/sharedStrings.xml": shared,
        "xl/_rels/workbook.xml.rels": pptx.related(
            {"s1": ("worksheet", "worksheets/sheet1.xml"), "t": ("sharedStrings", "sharedStrings.xml")}
        ),
    }
    yield Hostile("bomb-of-strings.xlsx", make_xlsx({"S": sheet(["x"])}, parts=strings), REFUSED, "as zip bombs do")
    yield Hostile("bomb.ods", make_ods(f"<t:table>{blank}</t:table>"), REFUSED, "as zip bombs do")
    yield Hostile("bomb.epub", make_epub({"a.xhtml": chapter(" " * (20 << 20))}), REFUSED, "as zip bombs do")
    yield Hostile("nested.zip", small, REFUSED, "it is a ZIP archive")
    yield Hostile("repeated.ods", make_ods(f"<t:table>{rows}</t:table>"), REFUSED, "within 512 MiB of memory")
    yield Hostile("far-cell.xlsx", make_xlsx({"S": far}), says="far")
    yield Hostile("overlapping.docx", _overlapping(make_docx(paragraph(TEXT))), UNREADABLE, DAMAGED)
    directory = {f"word/{number}-{'x' * 60_000}": b"" for number in range(80)}
    yield Hostile("endless-directory.docx", make_docx(parts=directory), REFUSED, "table of contents has")
    yield Hostile("lying-size.docx", _lying_about_size(make_docx(paragraph(TEXT * 100_000))), UNREADABLE, DAMAGED)


def _entities(url: str) -> Iterator[Hostile]:
    external = f"<!DOCTYPE x [<!ENTITY e SYSTEM '{url}/xxe'>]>"
    parameter = f"<!DOCTYPE x [<!ENTITY % p SYSTEM '{url}/xxe.dtd'> %p;]>"
    document = part(f"<w:body>{paragraph('&e;')}</w:body>")
    attacks = {
        "laughs": LAUGHS + "]>",
        "external": external,
        "passwd": "<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>",
        "parameter": parameter,
        "loop": "<!DOCTYPE x [<!ENTITY e '&f;'><!ENTITY f '&e;'>]>",
        "quadratic": f"<!DOCTYPE x [<!ENTITY e '{'x' * 50_000}'>]>",
    }
    for name, doctype in attacks.items():
        yield Hostile(
            f"entities-{name}.docx",
            make_docx(parts={"word/document.xml": _with_doctype(document, doctype)}),
            REFUSED,
            ENTITIES,
        )
    dtd = f"<!DOCTYPE w SYSTEM '{url}/w.dtd'>"
    yield Hostile(
        "external-dtd.docx", make_docx(parts={"word/document.xml": _with_doctype(document, dtd)}), REFUSED, ENTITIES
    )
    opf = f"{LAUGHS}]><package xmlns='http://www.idpf.org/2007/opf'>&j;</package>"
    yield Hostile(
        "entities.epub", make_epub({"a.xhtml": chapter(TEXT)}, parts={"OEBPS/content.opf": opf}), REFUSED, ENTITIES
    )
    yield Hostile("external.epub", make_epub({"a.xhtml": _with_doctype(chapter(f"{TEXT} &e;"), external)}), says=TEXT)
    slide = _with_doctype(pptx.slide(pptx.shape("&e;")), external)
    yield Hostile("entities.pptx", pptx.make_pptx(slide), REFUSED, ENTITIES)
    workbook = _with_doctype(sheet(["x"]), LAUGHS + "]>")
    yield Hostile("entities.xlsx", make_xlsx({"S": workbook}), REFUSED, ENTITIES)


def _broken() -> Iterator[Hostile]:
    whole = {
        "docx": make_docx(paragraph(TEXT * 1000)),
        "pptx": pptx.make_pptx(pptx.slide(pptx.shape(TEXT * 1000))),
        "xlsx": make_xlsx({"S": sheet([TEXT * 1000, "x"])}),
        "ods": make_ods(f"<t:table><t:table-row><t:table-cell><x:p>{TEXT}</x:p></t:table-cell></t:table-row></t:table>"),
        "epub": make_epub({"a.xhtml": chapter(TEXT * 1000)}),
    }
    for kind, data in whole.items():
        yield Hostile(f"truncated.{kind}", data[: len(data) * 2 // 3], UNREADABLE, DAMAGED)
        encrypted = data.replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0")
        yield Hostile(f"password.{kind}", encrypted, UNREADABLE, "encrypted with a password")
    xls = make_xls({"S": [[TEXT, "x"]]})
    yield Hostile("truncated.xls", xls[: len(xls) // 2], REFUSED, "an old Microsoft Office file")  # its directory is gone
    yield Hostile(
        "password-of-office.docx", make_compound({"EncryptedPackage": b"x" * 5000}), UNREADABLE, "encrypted with a password"
    )
    looping = bytearray(xls)
    table = struct.unpack_from("<I", looping, 76)[0]
    for sector in range(100):  # every sector is followed by the first one
        struct.pack_into("<I", looping, (table + 1) * 512 + 4 * sector, 1)
    yield Hostile("looping-sectors.xls", bytes(looping), REFUSED, "within 512 MiB of memory")
    yield Hostile("garbage.xlsx", make_xlsx({"S": "<worksheet><sheetData><row><c r='"}), UNREADABLE, "cannot ")


def _odd(url: str) -> Iterator[Hostile]:
    traversal = {"../../../../tmp/evil": b"x", "/etc/passwd": b"x", "word/../../evil": b"x", "..\\evil": b"x"}
    yield Hostile("traversal.docx", make_docx(paragraph(TEXT), parts=traversal), says=TEXT)
    outside = {"_rels/.rels": relationships({"officeDocument": "../../../etc/passwd"})}
    yield Hostile("main-part-outside.docx", make_docx(parts=outside), UNREADABLE, DAMAGED)
    up = "../../../../etc/passwd"
    escaping = make_epub({up: TEXT, "a.xhtml": chapter(TEXT)}, parts={f"OEBPS/{up}": None})
    yield Hostile("traversal.epub", escaping, says=TEXT)
    yield Hostile("link.docx", _with_link(make_docx(paragraph(TEXT))), says=TEXT)
    elsewhere = relationships({"attachedTemplate": f"{url}/t.dotm", "styles": f"{url}/s"}, mode="External")
    template = {"word/_rels/document.xml.rels": elsewhere}
    yield Hostile("external-template.docx", make_docx(paragraph(TEXT), parts=template), says=TEXT)
    remote = f"<p>{TEXT}</p><img src='{url}/i.png'/><script src='{url}/s.js'/><link rel='stylesheet' href='{url}/s.css'/>"
    yield Hostile("remote.epub", make_epub({"a.xhtml": chapter(remote)}), says=TEXT)
    deep = "<w:p>" * 100_000 + "</w:p>" * 100_000
    yield Hostile("deep.docx", make_docx(deep), UNREADABLE, "more than 1000 elements in one another")
    yield Hostile("deep.epub", make_epub({"a.xhtml": chapter("<div>" * 100_000)}), REFUSED, "open in one another")
    styles = f'<w:style xmlns:w="{W}" w:type="paragraph" w:styleId="{{}}"><w:basedOn w:val="{{}}"/></w:style>'
    loop = styles.format("A", "B") + styles.format("B", "A")
    yield Hostile("style-loop.docx", make_docx(paragraph(TEXT, style="A"), styles=loop), says=TEXT)
    spine = ["a.xhtml"] * 100_000
    yield Hostile("endless-spine.epub", make_epub({"a.xhtml": chapter(TEXT)}, spine=spine), says=TEXT)
    merged = [f"A{number}:XFD{number}" for number in range(1, 5001)]
    yield Hostile("merged.xlsx", make_xlsx({"S": sheet([TEXT, "x"], merged=merged)}), says=TEXT)


def _overlapping(data: bytes) -> bytes:
    """An archive in which all members share the data of one, as in the bombs that need no nesting."""
    first = data.index(b"PK\x03\x04")
    out = bytearray(data)
    at = out.index(b"PK\x01\x02")
    while (at := out.find(b"PK\x01\x02", at + 1)) > 0:
        struct.pack_into("<I", out, at + 42, first)
    return bytes(out)


def _lying_about_size(data: bytes) -> bytes:
    """An archive that says of its main part that it has 1,000 bytes."""
    at = data.rindex(b"word/document.xml") - 46
    return data[: at + 24] + (1000).to_bytes(4, "little") + data[at + 28 :]


def _with_link(data: bytes) -> bytes:
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as archive:
        link = zipfile.ZipInfo("word/media/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    return out.getvalue()
