"""Small EPUB books for tests, written part by part."""

from collections.abc import Mapping, Sequence
from urllib.parse import unquote

from tests.support.docx import zipped

XHTML = "http://www.w3.org/1999/xhtml"


def chapter(body: str, *, title: str = "<title/>") -> str:
    """Return a document of a book."""
    return f'<?xml version="1.0" encoding="utf-8"?><html xmlns="{XHTML}"><head>{title}</head><body>{body}</body></html>'


def nav(*entries: tuple[str, str, Sequence[tuple[str, str]]]) -> str:
    """Return a table of contents of EPUB 3: (address, title, those below)."""

    def listed(links: Sequence[tuple[str, str, Sequence[tuple[str, str]]]]) -> str:
        items = [
            f'<li><a href="{href}">{title}</a>{listed([(*one, ()) for one in below]) if below else ""}</li>'
            for href, title, below in links
        ]
        return f"<ol>{''.join(items)}</ol>"

    body = f'<nav epub:type="toc" xmlns:epub="http://www.idpf.org/2007/ops"><h1>Contents</h1>{listed(entries)}</nav>'
    return chapter(body)


def ncx(*entries: tuple[str, str]) -> str:
    """Return a table of contents of EPUB 2, with the document type declaration that they have: (address, title)."""
    points = "".join(
        f'<navPoint id="p{number}"><navLabel><text>{title}</text></navLabel><content src="{href}"/></navPoint>'
        for number, (href, title) in enumerate(entries)
    )
    return (
        '<!DOCTYPE ncx PUBLIC "-//NISO//DTD ncx 2005-1//EN" "http://www.daisy.org/z3986/2005/ncx-2005-1.dtd">'
        f'<ncx xmlns="http://www.daisy.org/z3986/2005/ncx/"><navMap>{points}</navMap></ncx>'
    )


def make_epub(
    chapters: Mapping[str, str | bytes],
    *,
    title: str = "",
    nav: str = "",
    ncx: str = "",
    spine: Sequence[str] | None = None,
    parts: Mapping[str, str | bytes | None] | None = None,
) -> bytes:
    """Return a book: documents by their addresses below ``OEBPS``, and their order. ``None`` in ``parts``
    leaves a member out.
    """
    items = "".join(f'<item id="{name}" href="{name}" media-type="application/xhtml+xml"/>' for name in chapters)
    if nav:
        items += '<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>'
    if ncx:
        items += '<item id="ncx" href="toc.ncx" media-type="application/x-dtbncx+xml"/>'
    order = "".join(f'<itemref idref="{name}"/>' for name in (chapters if spine is None else spine))
    members: dict[str, str | bytes | None] = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0">'
        '<rootfiles><rootfile full-path="OEBPS/content.opf"/></rootfiles></container>',
        "OEBPS/content.opf": '<package xmlns="http://www.idpf.org/2007/opf" version="3.0">'
        f'<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{title}</dc:title></metadata>'
        f"<manifest>{items}</manifest><spine>{order}</spine></package>",
        "OEBPS/nav.xhtml": nav or None,
        "OEBPS/toc.ncx": ncx or None,
        **{f"OEBPS/{unquote(name)}": content for name, content in chapters.items()},
    }
    members |= parts or {}
    return zipped({name: content for name, content in members.items() if content is not None})
