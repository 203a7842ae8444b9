"""Render ``laboratory-rules.zh.md`` to ``laboratory-rules.zh.docx``.

Run it where python-docx is installed (it is no dependency of the project)::

    python -m venv /tmp/render && /tmp/render/bin/pip install 'python-docx>=1.2,<2'
    /tmp/render/bin/python examples/documents/src/render_docx.py

The output depends on the text and on the version of python-docx only: no date, no random id. It has what Word's users make:
numbers of chapters that Word counts, a header and a footer, tables in a style, a footnote, a text box, and a tracked change.
"""

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import docx
from docx.opc.constants import RELATIONSHIP_TYPE
from docx.opc.packuri import PackURI
from docx.opc.part import Part
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls, qn

SOURCE = Path(__file__).with_name("laboratory-rules.zh.md")
TARGET = SOURCE.parent.parent / "laboratory-rules.zh.docx"
FOOTNOTES_TYPE = "application/vnd.openxmlformats-officedocument.wordprocessingml.footnotes+xml"
CHAPTERS, STEPS = 90, 91
"""Ids of the two numberings: of headings, and of numbered lists."""


def numbering(document: Any) -> None:
    """Let Word count: chapters in Chinese, their sections in digits, steps in circles."""
    root = document.part.numbering_part.element
    levels = (
        (CHAPTERS, 0, "chineseCountingThousand", "第%1章", "Heading1"),
        (CHAPTERS, 1, "decimal", "%1.%2", "Heading2"),
        (STEPS, 0, "decimalEnclosedCircleChinese", "%1", None),
    )
    for identity in (STEPS, CHAPTERS):
        lines = "".join(
            f'<w:lvl w:ilvl="{index}"><w:start w:val="1"/><w:numFmt w:val="{how}"/>'
            + (f'<w:pStyle w:val="{style}"/>' if style else "")
            + ("<w:isLgl/>" if index else "")
            + f'<w:suff w:val="space"/><w:lvlText w:val="{text}"/><w:lvlJc w:val="left"/></w:lvl>'
            for one, index, how, text, style in levels
            if one == identity
        )
        # All definitions stand before all uses of them.
        root.insert(0, parse_xml(f'<w:abstractNum {nsdecls("w")} w:abstractNumId="{identity}">{lines}</w:abstractNum>'))
        root.append(parse_xml(f'<w:num {nsdecls("w")} w:numId="{identity}"><w:abstractNumId w:val="{identity}"/></w:num>'))
    for index, style in enumerate(("Heading 1", "Heading 2")):
        properties = document.styles[style].element.get_or_add_pPr()
        properties.get_or_add_numPr().get_or_add_numId().val = CHAPTERS
        if index:
            properties.get_or_add_numPr().get_or_add_ilvl().val = index


def footnotes(document: Any, notes: dict[str, str]) -> None:
    """Add the part of the footnotes, which python-docx does not know."""
    texts = "".join(
        f'<w:footnote w:id="{identity}"><w:p><w:r><w:footnoteRef/></w:r>'
        f'<w:r><w:t xml:space="preserve"> {text}</w:t></w:r></w:p></w:footnote>'
        for identity, text in notes.items()
    )
    separators = "".join(
        f'<w:footnote w:type="{kind}" w:id="{identity}"><w:p><w:r><w:{kind}/></w:r></w:p></w:footnote>'
        for identity, kind in ((-1, "separator"), (0, "continuationSeparator"))
    )
    xml = f"<w:footnotes {nsdecls('w')}>{separators}{texts}</w:footnotes>".encode()
    part = Part(PackURI("/word/footnotes.xml"), FOOTNOTES_TYPE, xml, document.part.package)
    document.part.relate_to(part, RELATIONSHIP_TYPE.FOOTNOTES)


def text_box(paragraph: Any, text: str) -> None:
    """Put a text box at a paragraph, as VML, which all versions of Word read."""
    paragraph.add_run()._r.append(
        parse_xml(
            f'<w:pict {nsdecls("w")} xmlns:v="urn:schemas-microsoft-com:vml"><v:shape style="width:400pt;height:40pt">'
            f"<v:textbox><w:txbxContent><w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:txbxContent></v:textbox></v:shape></w:pict>"
        )
    )


def add_table(document: Any, rows: list[list[str]]) -> None:
    """Add a table whose style sets the first row apart."""
    table = document.add_table(rows=len(rows), cols=len(rows[0]), style="Light Grid Accent 1")
    for row, texts in zip(table.rows, rows, strict=True):
        for cell, text in zip(row.cells, texts, strict=True):
            cell.text = text


def build(markdown: str) -> Any:
    """Return the document."""
    document = docx.Document()
    document.core_properties.author = "The processing-tasks authors"
    document.core_properties.title = "云岭水质实验室仪器与安全规程"
    document.styles["Normal"].element.get_or_add_rPr().get_or_add_rFonts().set(qn("w:eastAsia"), "SimSun")
    numbering(document)
    document.sections[0].header.paragraphs[0].text = "云岭水质实验室 内部文件"
    notes: dict[str, str] = {}
    for block in re.split(r"\n\s*\n", markdown.strip()):
        if heading := re.fullmatch(r"(#{1,3}) (.+)", block):
            document.add_heading(heading[2], level=len(heading[1]) - 1)
        elif note := re.fullmatch(r"注(\d+)：(.+)", block):
            notes[note[1]] = note[2]
        elif block.startswith("|"):
            add_table(document, [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()])
        elif block.startswith("> "):
            text_box(document.add_paragraph(), block[2:])
        elif re.match(r"- |\d\. ", block):
            for line in block.splitlines():
                mark, text = line.split(" ", 1)
                paragraph = document.add_paragraph(text, style="List Bullet" if mark == "-" else "List Paragraph")
                if mark != "-":
                    paragraph._p.get_or_add_pPr().get_or_add_numPr().get_or_add_numId().val = STEPS
                    paragraph._p.pPr.numPr.get_or_add_ilvl().val = 0
        else:
            text, *reference = re.split(r"\[\^(\d+)\]", block)
            paragraph = document.add_paragraph(text)
            if reference:
                run = paragraph.add_run()
                run._r.append(parse_xml(f'<w:footnoteReference {nsdecls("w")} w:id="{reference[0]}"/>'))
    footnotes(document, notes)
    # The edition was the third one before somebody, with tracked changes, made it the fourth.
    first = next(one for one in document.paragraphs if one.text.startswith("第四版"))
    first.runs[0].text = first.text.removeprefix("第四版")
    who = 'w:id="1" w:author="editor" w:date="2026-01-05T09:00:00Z"'
    first.runs[0]._r.addprevious(parse_xml(f"<w:del {nsdecls('w')} {who}><w:r><w:delText>第三版</w:delText></w:r></w:del>"))
    first.runs[0]._r.addprevious(parse_xml(f"<w:ins {nsdecls('w')} {who}><w:r><w:t>第四版</w:t></w:r></w:ins>"))
    return document


def main() -> None:
    """Write the file."""
    made = io.BytesIO()
    build(SOURCE.read_text(encoding="utf-8")).save(made)
    with zipfile.ZipFile(made) as source, zipfile.ZipFile(TARGET, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():  # without the times of today
            if name != "docProps/thumbnail.jpeg":
                content = source.read(name)
                if name == "_rels/.rels":
                    content = re.sub(rb"<Relationship [^>]*thumbnail[^>]*/>", b"", content)
                target.writestr(zipfile.ZipInfo(name, (2026, 1, 5, 9, 0, 0)), content, zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main()
