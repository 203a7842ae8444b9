"""Small PDF files for tests, written byte by byte, so that their damage is known exactly."""

import zlib
from dataclasses import dataclass, field

import pypdfium2


@dataclass
class PdfPage:
    """Lines of a page from the top down, as (size in points, text); Chinese is set in a standard font without embedding."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    image: bool = False
    picture: tuple[int, int, bytes] | None = None
    """Width, height and grey pixels of a picture that fills the page, below its lines."""
    damaged: bool = False
    """Point /Contents and /Type elsewhere, so that the page cannot be loaded."""


def make_pdf(pages: list[PdfPage], *, bookmarks: list[tuple[int, str]] | None = None) -> bytes:
    """Return a PDF. ``bookmarks`` are (page from 1, title), all of the first level."""
    objects: dict[int, bytes] = {
        3: b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        4: b"<< /Type /Font /Subtype /Type0 /BaseFont /STSong-Light /Encoding /UniGB-UCS2-H /DescendantFonts [5 0 R] >>",
        5: b"<< /Type /Font /Subtype /CIDFontType0 /BaseFont /STSong-Light "
        b"/CIDSystemInfo << /Registry (Adobe) /Ordering (GB1) /Supplement 2 >> /FontDescriptor 6 0 R >>",
        6: b"<< /Type /FontDescriptor /FontName /STSong-Light /Flags 4 /ItalicAngle 0 /Ascent 800 /Descent -200 /StemV 80 "
        b"/FontBBox [0 -200 1000 900] >>",
        7: b"<< /Type /XObject /Subtype /Image /Width 1 /Height 1 /ColorSpace /DeviceGray /BitsPerComponent 8 /Length 1 >>\n"
        b"stream\n\x80\nendstream",
    }
    kids = []
    number = 10
    for page in pages:
        content, number = number + 1, number + 2
        kids.append(content - 1)
        pictures = b""
        if page.picture is not None:
            width, height, pixels = page.picture
            packed = zlib.compress(pixels)
            pictures = b"/P %d 0 R " % number
            objects[number] = (
                b"<< /Type /XObject /Subtype /Image /Width %d /Height %d /ColorSpace /DeviceGray /BitsPerComponent 8 "
                b"/Filter /FlateDecode /Length %d >>\nstream\n%s\nendstream" % (width, height, len(packed), packed)
            )
            number += 1
        stream = _stream(page)
        objects[content] = b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream)
        objects[content - 1] = (
            b"[ /Broken ]"
            if page.damaged
            else (
                b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents %d 0 R /Resources "
                b"<< /Font << /F1 3 0 R /F2 4 0 R >> /XObject << %s/I 7 0 R >> >> >>" % (content, pictures)
            )
        )
    outline = b""
    if bookmarks:
        first = number + 1
        last = number + len(bookmarks)
        outline = b"/Outlines %d 0 R" % number
        objects[number] = b"<< /Type /Outlines /First %d 0 R /Last %d 0 R /Count %d >>" % (first, last, len(bookmarks))
        for index, (page_number, title) in enumerate(bookmarks):
            siblings = b"/Next %d 0 R " % (first + index + 1) if first + index < last else b""
            siblings += b"/Prev %d 0 R " % (first + index - 1) if index else b""
            objects[first + index] = b"<< /Title <%s> /Parent %d 0 R %s/Dest [%d 0 R /Fit] >>" % (
                (b"\xfe\xff" + title.encode("utf-16-be")).hex().encode(),
                number,
                siblings,
                kids[page_number - 1],
            )
    objects[1] = b"<< /Type /Catalog /Pages 2 0 R %s >>" % outline
    objects[2] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (
        len(kids),
        b" ".join(b"%d 0 R" % kid for kid in kids),
    )
    parts = [b"%PDF-1.7\n"]
    length = len(parts[0])
    offsets = {}
    for key in sorted(objects):
        offsets[key] = length
        parts.append(b"%d 0 obj\n%s\nendobj\n" % (key, objects[key]))
        length += len(parts[-1])
    size = max(objects) + 1
    parts.append(b"xref\n0 %d\n" % size)
    parts += [b"%010d 00000 n \n" % offsets[key] if key in offsets else b"0000000000 65535 f \n" for key in range(size)]
    parts.append(b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (size, length))
    return b"".join(parts)


def _stream(page: PdfPage) -> bytes:
    parts = [b"q 100 0 0 100 50 50 cm /I Do Q"] if page.image else []
    if page.picture:
        parts.append(b"q 595 0 0 842 0 0 cm /P Do Q")
    y = 800.0
    for size, text in page.lines:
        y -= size * 1.4
        if text.isascii():
            shown = b"(" + text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)").encode() + b")"
            font = b"/F1"
        else:
            shown, font = b"<" + text.encode("utf-16-be").hex().encode() + b">", b"/F2"
        parts.append(b"BT %s %g Tf 60 %g Td %s Tj ET" % (font, size, y, shown))
    return b"\n".join(parts)


def scanned(page: PdfPage, *, stamp: str = "", dpi: int = 150) -> PdfPage:
    """Return a page that is a picture of another one, with text of its own in small type above it."""
    pdf = pypdfium2.PdfDocument(make_pdf([page]))
    bitmap = pdf[0].render(scale=dpi / 72, grayscale=True)
    picture = (bitmap.width, bitmap.height, bitmap.to_numpy().tobytes())
    pdf.close()
    return PdfPage([(9, stamp)] if stamp else [], picture=picture)
