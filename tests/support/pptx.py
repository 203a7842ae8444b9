"""Small PPTX files for tests, written part by part."""

from collections.abc import Mapping, Sequence

from tests.support.docx import zipped

OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
MAIN_TYPE = "application/vnd.openxmlformats-officedocument.presentationml.presentation.main+xml"
_NAMESPACES = (
    ' xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main"'
    ' xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main"'
    ' xmlns:c="http://schemas.openxmlformats.org/drawingml/2006/chart"'
    ' xmlns:dgm="http://schemas.openxmlformats.org/drawingml/2006/diagram"'
    ' xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
    ' xmlns:m="http://schemas.openxmlformats.org/officeDocument/2006/math"'
    ' xmlns:p14="http://schemas.microsoft.com/office/powerpoint/2010/main"'
    f' xmlns:r="{OFFICE}"'
)


def text(*paragraphs: str) -> str:
    """Return paragraphs; each is text, or XML from ``<a:p>`` on."""
    return "".join(one if one.startswith("<") else f"<a:p><a:r><a:t>{one}</a:t></a:r></a:p>" for one in paragraphs)


def shape(*paragraphs: str, stands_for: str | None = None, hidden: bool = False) -> str:
    """Return a shape with text; ``stands_for`` is the type of its placeholder, ``""`` that of a body."""
    kind = f' type="{stands_for}"' if stands_for else ""
    placeholder = f"<p:ph{kind}/>" if stands_for is not None else ""
    about = f'<p:cNvPr id="1" name="x" hidden="{int(hidden)}"/><p:cNvSpPr/><p:nvPr>{placeholder}</p:nvPr>'
    return f"<p:sp><p:nvSpPr>{about}</p:nvSpPr><p:txBody><a:bodyPr/>{text(*paragraphs)}</p:txBody></p:sp>"


def table(*rows: Sequence[str], header: bool = False) -> str:
    """Return a table; cells are text, or XML from ``<a:tc`` on."""
    cells = [
        "".join(one if one.startswith("<") else f"<a:tc><a:txBody>{text(one)}</a:txBody></a:tc>" for one in row)
        for row in rows
    ]
    lines = "".join(f"<a:tr>{line}</a:tr>" for line in cells)
    return frame(f'<a:tbl><a:tblPr firstRow="{int(header)}"/>{lines}</a:tbl>')


def frame(content: str) -> str:
    """Return a frame around a table, a chart or a diagram."""
    about = '<p:nvGraphicFramePr><p:cNvPr id="2" name="y"/></p:nvGraphicFramePr>'
    return f"<p:graphicFrame>{about}<a:graphic><a:graphicData>{content}</a:graphicData></a:graphic></p:graphicFrame>"


def part(root: str, content: str, *, more: str = "") -> str:
    """Return a part of a presentation, around a body."""
    return f"<{root}{_NAMESPACES}{more}>{content}</{root}>"


def slide(*shapes: str, hidden: bool = False) -> str:
    """Return a slide with shapes."""
    return part("p:sld", f"<p:cSld><p:spTree>{''.join(shapes)}</p:spTree></p:cSld>", more=' show="0"' if hidden else "")


def related(targets: Mapping[str, tuple[str, str]]) -> str:
    """Return relationships, from ids to kinds and targets."""
    listed = "".join(
        f'<Relationship Id="{identity}" Type="{OFFICE}/{kind}" Target="{target}"/>'
        for identity, (kind, target) in targets.items()
    )
    return f'<Relationships xmlns="{PACKAGE}/relationships">{listed}</Relationships>'


def make_pptx(*slides: str, presentation: str = "", parts: Mapping[str, str | bytes | None] | None = None) -> bytes:
    """Return a PPTX. ``presentation`` is more of its main part; ``parts`` are further members, or replace others."""
    numbers = range(1, len(slides) + 1)
    # The order of slides is that of the list, not that of their parts' names.
    listed = "".join(f'<p:sldId id="{255 + number}" r:id="s{number}"/>' for number in numbers)
    members: dict[str, str | bytes | None] = {
        "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types">'
        f'<Override PartName="/ppt/presentation.xml" ContentType="{MAIN_TYPE}"/></Types>',
        "_rels/.rels": related({"r1": ("officeDocument", "ppt/presentation.xml")}),
        "ppt/presentation.xml": part("p:presentation", f"<p:sldIdLst>{listed}</p:sldIdLst>{presentation}"),
        "ppt/_rels/presentation.xml.rels": related(
            {f"s{number}": ("slide", f"slides/slide{100 - number}.xml") for number in numbers}
        ),
    }
    members |= {f"ppt/slides/slide{100 - number}.xml": content for number, content in enumerate(slides, start=1)}
    members |= parts or {}
    return zipped({name: content for name, content in members.items() if content is not None})
