"""PDF files, mostly written object by object."""

import zlib
from collections.abc import Iterator, Mapping

from tests.data.hostile import Hostile
from tests.support.pdf import PdfPage, make_pdf

REFUSED, UNREADABLE, EMPTY = "DocumentRefused", "DocumentUnreadable", "DocumentEmpty"
DAMAGED = "the PDF is damaged or cut short"
TEXT = "The tide is high."
SHOWN = b"BT /F1 12 Tf 60 700 Td (The tide is high.) Tj ET"
FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"


def written(objects: Mapping[int, bytes], *, trailer: bytes = b"", junk: bytes = b"", xref: bool = True) -> bytes:
    """Return a PDF with these objects; 1 is the catalog."""
    out = bytearray(junk + b"%PDF-1.7\n")
    offsets = {}
    for number, content in objects.items():
        offsets[number] = len(out) - len(junk)
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    start = len(out) - len(junk)
    size = max(objects) + 1
    if xref:
        out += b"xref\n0 %d\n" % size
        for number in range(size):
            out += b"%010d 00000 n \n" % offsets[number] if number in offsets else b"0000000000 65535 f \n"
    out += b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (size, trailer, start)
    return bytes(out)


def stream(data: bytes, *, dictionary: bytes = b"") -> bytes:
    return b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(data), dictionary, data)


def page(*, contents: bytes = b"4 0 R", more: bytes = b"") -> bytes:
    resources = b"/Resources << /Font << /F1 5 0 R >> /XObject << /I 6 0 R >> >>"
    return b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents %s %s %s >>" % (contents, resources, more)


def one_page(
    *, content: bytes = b"", more: bytes = b"", catalog: bytes = b"", objects: Mapping[int, bytes] | None = None
) -> bytes:
    whole = {
        1: b"<< /Type /Catalog /Pages 2 0 R %s >>" % catalog,
        2: b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>",
        3: page(more=more),
        4: content or stream(SHOWN),
        5: FONT,
    }
    return written(whole | dict(objects or {}))


def files(url: str) -> Iterator[Hostile]:
    """Yield these files."""
    link = url.encode()
    good = one_page()
    tree = {1: b"<< /Type /Catalog /Pages 2 0 R >>", 3: page(), 4: stream(SHOWN), 5: FONT}
    yield Hostile("truncated.pdf", good[:60], UNREADABLE, DAMAGED)
    yield Hostile("truncated-late.pdf", good[:-60], UNREADABLE, DAMAGED)
    yield Hostile("header-only.pdf", b"%PDF-1.7\n", UNREADABLE, DAMAGED)
    locked = tree | {2: b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>"}
    yield Hostile("junk-before.pdf", written(locked, junk=b"x" * 1000), says=TEXT)
    yield Hostile("no-xref.pdf", written(locked, xref=False), says=TEXT)
    password = b"/Encrypt << /Filter /Standard /V 2 /R 3 /Length 128 /P -4 /O <%s> /U <%s> >> /ID [<00> <00>]"
    password %= (b"11" * 32, b"22" * 32)
    yield Hostile("password.pdf", written(locked, trailer=password), UNREADABLE, "encrypted and needs a password")
    unknown = b"/Encrypt << /Filter /Nobody /V 9 >> /ID [<00> <00>]"
    yield Hostile("unknown-security.pdf", written(locked, trailer=unknown), UNREADABLE, "encrypted")
    at_itself = good.index(b"xref\n0")
    yield Hostile("xref-loop.pdf", good.replace(b"/Root 1 0 R", b"/Root 1 0 R /Prev %d" % at_itself), says=TEXT)
    loop = {2: b"<< /Type /Pages /Count 9 /Kids [2 0 R 2 0 R 3 0 R] >>"}
    yield Hostile("tree-loop.pdf", written(tree | loop), says=TEXT)
    deep = {10 + it: b"<< /Type /Pages /Count 1 /Kids [%d 0 R] >>" % (11 + it) for it in range(20_000)}
    deep[2] = b"<< /Type /Pages /Count 1 /Kids [10 0 R] >>"
    yield Hostile("deep-tree.pdf", written(tree | deep), UNREADABLE, "all 1 pages are damaged")
    billion = {2: b"<< /Type /Pages /Count 1000000000 /Kids [3 0 R] >>"}
    yield Hostile("count-of-a-billion.pdf", written(tree | billion), says=TEXT)
    million = b"<< /Type /Pages /Count 1000000 /Kids [%s] >>" % (b"3 0 R " * 1_000_000)
    yield Hostile("a-million-pages.pdf", written(tree | {2: million}), REFUSED, "within 5 CPU seconds")
    nothing = b"\0" * (64 << 20)
    bomb = zlib.compress(zlib.compress(zlib.compress(nothing, 9), 9), 9)
    flates = b"/Filter [/FlateDecode /FlateDecode /FlateDecode]"
    yield Hostile(
        "stream-bomb.pdf", one_page(content=stream(bomb, dictionary=flates)), EMPTY, "none of its 1 pages has text"
    )
    hundred = b"/Filter [%s]" % (b"/ASCIIHexDecode " * 10_000)
    yield Hostile(
        "ten-thousand-filters.pdf",
        one_page(content=stream(b"41" * 1000, dictionary=hundred)),
        EMPTY,
        "none of its 1 pages has text",
    )
    size = b"/Width 2000000 /Height 2000000 /ColorSpace /DeviceRGB /BitsPerComponent 8"
    huge = stream(b"", dictionary=b"/Type /XObject /Subtype /Image " + size)
    drawn = stream(b"q 595 0 0 842 0 0 cm /I Do Q")
    yield Hostile("huge-image.pdf", one_page(content=drawn, objects={6: huge}), EMPTY, "needs OCR")
    endless_page = page(more=b"").replace(b"[0 0 595 842]", b"[0 0 1e30 1e30]")
    yield Hostile("endless-page.pdf", one_page(objects={3: endless_page}), says=TEXT)
    itself = b"/Type /XObject /Subtype /Form /BBox [0 0 1 1] /Resources << /XObject << /I 6 0 R >> >>"
    form = stream(b"q /I Do Q " + SHOWN, dictionary=itself)
    yield Hostile("form-loop.pdf", one_page(content=stream(SHOWN + b" /I Do"), objects={6: form}), says=TEXT)
    script = b"/OpenAction << /S /JavaScript /JS (app.launchURL\\('%s'\\); while \\(true\\) {}) >>" % link
    yield Hostile("javascript.pdf", one_page(catalog=script), says=TEXT)
    away = b"/Annots [<< /Type /Annot /Subtype /Link /Rect [0 0 9 9] /A << /S /URI /URI (%s) >> >>" % link
    away += b" << /Type /Annot /Subtype /Link /Rect [0 0 9 9] /A << /S /GoToR /F << /FS /URL /F (%s/a.pdf) >> >> >>" % link
    away += b" << /Type /Annot /Subtype /Link /Rect [0 0 9 9] /A << /S /Launch /F (/bin/sh) >> >>]"
    yield Hostile("external.pdf", one_page(more=away), says=TEXT)
    remote = stream(b"", dictionary=b"/F << /FS /URL /F (%s/stream) >>" % link)
    yield Hostile("external-stream.pdf", one_page(content=remote), EMPTY, "none of its 1 pages has text")
    outline = {
        7: b"<< /Type /Outlines /First 8 0 R /Last 8 0 R /Count 1 >>",
        8: b"<< /Title (Loop) /Parent 7 0 R /Next 8 0 R /First 8 0 R /Dest [3 0 R /Fit] >>",
    }
    yield Hostile("outline-loop.pdf", one_page(catalog=b"/Outlines 7 0 R", objects=outline), says=TEXT)
    yield Hostile("deep-objects.pdf", one_page(catalog=b"/X " + b"[" * 200_000 + b"]" * 200_000), says=TEXT)
    bad = [PdfPage(damaged=True)] * 3
    yield Hostile("one-good-page.pdf", make_pdf([*bad, PdfPage([(12, TEXT)]), *bad]), says=TEXT)
