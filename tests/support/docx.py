"""Small DOCX files for tests, written part by part, so that what is in them and what is wrong with them is known exactly."""

import io
import zipfile
from collections.abc import Mapping

W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
STRICT = "http://purl.oclc.org/ooxml/wordprocessingml/main"
RELATIONSHIPS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
DOCUMENT_TYPE = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
STYLES = """
<w:style w:type="paragraph" w:default="1" w:styleId="Normal"><w:name w:val="Normal"/></w:style>
<w:style w:type="paragraph" w:styleId="Title"><w:name w:val="Title"/></w:style>
<w:style w:type="paragraph" w:styleId="1"><w:name w:val="heading 1"/><w:pPr><w:outlineLvl w:val="0"/></w:pPr></w:style>
<w:style w:type="paragraph" w:styleId="2"><w:name w:val="标题 2"/></w:style>
<w:style w:type="paragraph" w:styleId="Own"><w:name w:val="Chapter"/><w:basedOn w:val="1"/></w:style>
<w:style w:type="paragraph" w:styleId="TOC1"><w:name w:val="toc 1"/></w:style>
<w:style w:type="table" w:styleId="Grid"><w:name w:val="Grid"/><w:tblStylePr w:type="firstRow"/></w:style>
"""


def paragraph(text: str, *, style: str = "", properties: str = "") -> str:
    """Return a paragraph of one run; ``text`` is XML."""
    if style:
        properties = f'<w:pStyle w:val="{style}"/>' + properties
    return f'<w:p><w:pPr>{properties}</w:pPr><w:r><w:t xml:space="preserve">{text}</w:t></w:r></w:p>'


def table(*rows: list[str], properties: str = "") -> str:
    """Return a table; cells are XML, or text that becomes a paragraph."""
    cells = [[one if one.startswith("<") else paragraph(one) for one in row] for row in rows]
    lines = ["".join(f"<w:tc>{cell}</w:tc>" for cell in row) for row in cells]
    return f"<w:tbl><w:tblPr>{properties}</w:tblPr>{''.join(f'<w:tr>{line}</w:tr>' for line in lines)}</w:tbl>"


def part(body: str, *, root: str = "document", namespace: str = W) -> str:
    """Return a part of WordprocessingML around a body."""
    return f"""<?xml version="1.0" encoding="UTF-8" standalone="yes"?>
<w:{root} xmlns:w="{namespace}" xmlns:r="{RELATIONSHIPS}"
 xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"
 xmlns:m="http://schemas.openxmlformats.org/officeDocument/2006/math"
 xmlns:wps="http://schemas.microsoft.com/office/word/2010/wordprocessingShape"
 xmlns:v="urn:schemas-microsoft-com:vml">{body}</w:{root}>"""


def make_docx(
    body: str = "",
    *,
    styles: str = STYLES,
    numbering: str = "",
    footnotes: str = "",
    content_type: str = DOCUMENT_TYPE,
    namespace: str = W,
    parts: Mapping[str, str | bytes | None] | None = None,
) -> bytes:
    """Return a DOCX with a body. ``parts`` are further members, or replace others; ``None`` leaves one out."""
    found = {
        "styles": part(styles, root="styles"),
        "numbering": numbering and part(numbering, root="numbering"),
        "footnotes": footnotes and part(footnotes, root="footnotes"),
    }
    related = [kind for kind, content in found.items() if content]
    members: dict[str, str | bytes | None] = {
        "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/word/document.xml" ContentType="{content_type}"/></Types>',
        "_rels/.rels": relationships({"officeDocument": "word/document.xml"}),
        "word/_rels/document.xml.rels": relationships({kind: f"{kind}.xml" for kind in related}),
        "word/document.xml": part(f"<w:body>{body}</w:body>", namespace=namespace),
    }
    members |= {f"word/{kind}.xml": found[kind] for kind in related}
    members |= parts or {}
    return zipped({name: content for name, content in members.items() if content is not None})


def relationships(targets: Mapping[str, str], *, mode: str = "Internal") -> str:
    """Return a part of relationships, from kinds to targets."""
    return (
        '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
        + "".join(
            f'<Relationship Id="r{number}" Type="{RELATIONSHIPS}/{kind}" Target="{target}" TargetMode="{mode}"/>'
            for number, (kind, target) in enumerate(targets.items())
        )
        + "</Relationships>"
    )


def zipped(members: Mapping[str, str | bytes]) -> bytes:
    """Return an archive, deflated; the same bytes each time."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=zipfile.ZIP_DEFLATED)
    return file.getvalue()
