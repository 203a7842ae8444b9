"""Small workbooks for tests, written part by part: XLSX, ODS and XLS (BIFF8, [MS-XLS])."""

import struct
from collections.abc import Mapping, Sequence
from html import escape

from tests.support.compound import make_compound
from tests.support.docx import zipped

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
RELATIONSHIPS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
SHEET_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"
DATE, PERCENT, DURATION, OWN = 1, 2, 3, 4
"""Styles of cells, see :func:`make_xlsx`."""
_STYLES = (
    f'<styleSheet xmlns="{MAIN}"><numFmts><numFmt numFmtId="164" formatCode="[h]:mm:ss"/>'
    '<numFmt numFmtId="165" formatCode="{}"/></numFmts><cellStyleXfs><xf numFmtId="10"/></cellStyleXfs><cellXfs>'
    '<xf numFmtId="0"/><xf numFmtId="14"/><xf numFmtId="10"/><xf numFmtId="164"/><xf numFmtId="165"/></cellXfs></styleSheet>'
)

Value = str | float | bool | None


def cell(reference: str, value: Value, *, style: int = 0) -> str:
    """Return a cell of an XLSX."""
    if isinstance(value, bool):
        return f'<c r="{reference}" t="b"><v>{int(value)}</v></c>'
    if isinstance(value, str):
        return f'<c r="{reference}" t="inlineStr"><is><t xml:space="preserve">{escape(value)}</t></is></c>'
    return f'<c r="{reference}" s="{style}">{"" if value is None else f"<v>{value}</v>"}</c>'


def sheet(*rows: Sequence[Value], merged: Sequence[str] = (), more: str = "") -> str:
    """Return a sheet of an XLSX from its top left cell on; ``more`` are rows as XML."""
    filled = [
        f'<row r="{number}">'
        + "".join(cell(f"{chr(65 + column)}{number}", value) for column, value in enumerate(row) if value is not None)
        + "</row>"
        for number, row in enumerate(rows, start=1)
    ]
    ranges = "".join(f'<mergeCell ref="{one}"/>' for one in merged)
    merges = f"<mergeCells>{ranges}</mergeCells>" if merged else ""
    return f'<worksheet xmlns="{MAIN}"><sheetData>{"".join(filled)}{more}</sheetData>{merges}</worksheet>'


def make_xlsx(
    sheets: Mapping[str, str],
    *,
    hidden: Sequence[str] = (),
    parts: Mapping[str, str | bytes | None] | None = None,
    main_type: str = SHEET_TYPE,
    own_format: str = "General",
) -> bytes:
    """Return an XLSX with sheets. ``parts`` are further members, or replace others; ``None`` leaves one out.

    ``own_format`` is that of cells in the style ``OWN``.
    """
    shown = ("visible", "hidden")
    listed = "".join(
        f'<sheet name="{escape(name)}" sheetId="{number}" r:id="s{number}" state="{shown[name in hidden]}"/>'
        for number, name in enumerate(sheets, start=1)
    )
    related = "".join(
        f'<Relationship Id="s{number}" Type="{RELATIONSHIPS}/worksheet" Target="worksheets/sheet{number}.xml"/>'
        for number in range(1, len(sheets) + 1)
    )
    package = "http://schemas.openxmlformats.org/package/2006"
    members: dict[str, str | bytes | None] = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{main_type}"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships">'
        f'<Relationship Id="r1" Type="{RELATIONSHIPS}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{MAIN}" xmlns:r="{RELATIONSHIPS}"><sheets>{listed}</sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships">{related}'
        f'<Relationship Id="t" Type="{RELATIONSHIPS}/styles" Target="styles.xml"/></Relationships>',
        "xl/styles.xml": _STYLES.format(escape(own_format)),
    }
    members |= {f"xl/worksheets/sheet{number}.xml": content for number, content in enumerate(sheets.values(), start=1)}
    members |= parts or {}
    return zipped({name: content for name, content in members.items() if content is not None})


def make_ods(body: str, *, styles: str = "", manifest: str = "<manifest/>") -> bytes:
    """Return an ODS with tables as XML."""
    names = "".join(
        f' xmlns:{prefix}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
        for prefix, name in (("o", "office"), ("t", "table"), ("x", "text"), ("s", "style"), ("d", "drawing"))
    )
    content = (
        f"<o:document-content{names}><o:automatic-styles>{styles}</o:automatic-styles>"
        f"<o:body><o:spreadsheet>{body}</o:spreadsheet></o:body></o:document-content>"
    )
    mimetype = "application/vnd.oasis.opendocument.spreadsheet"
    return zipped({"mimetype": mimetype, "content.xml": content, "META-INF/manifest.xml": manifest})


def make_xls(
    sheets: Mapping[str, Sequence[Sequence[Value]]], *, hidden: Sequence[str] = (), password: bool = False
) -> bytes:
    """Return an XLS with sheets from their top left cell on; with ``password``, one that says that it is encrypted."""

    def record(kind: int, content: bytes = b"") -> bytes:
        return struct.pack("<HH", kind, len(content)) + content

    def text(value: str, size: str) -> bytes:
        return struct.pack(f"<{size}B", len(value), 1) + value.encode("utf-16-le")

    def substream(kind: int, *records: bytes) -> bytes:
        begin = record(0x0809, struct.pack("<HHHHII", 0x0600, kind, 0x0DBB, 0x07CC, 0, 6))
        return begin + b"".join(records) + record(0x000A)

    bodies = []
    for rows in sheets.values():
        records = [
            record(0x0204, struct.pack("<HHH", row, column, 0) + text(value, "H"))
            if isinstance(value, str)
            else record(0x0203, struct.pack("<HHHd", row, column, 0, value))
            for row, values in enumerate(rows)
            for column, value in enumerate(values)
            if value is not None
        ]
        bodies.append(substream(0x0010, *records))
    names = [text(name, "B") for name in sheets]
    at = len(substream(0x0005, *(record(0x0085, bytes(6) + name) for name in names)))
    listed = []
    for name, encoded, body in zip(sheets, names, bodies, strict=True):
        listed.append(record(0x0085, struct.pack("<IBB", at, name in hidden, 0) + encoded))
        at += len(body)
    encryption = [record(0x002F, struct.pack("<HHH", 1, 1, 1) + bytes(48))] if password else []
    return make_compound({"Workbook": substream(0x0005, *encryption, *listed) + b"".join(bodies)})
