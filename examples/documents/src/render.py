"""Render ``handbook.md`` to ``handbook.pdf``, and cut ``broken.pdf`` from it.

Run it where reportlab is installed (it is no dependency of the project)::

    python -m venv /tmp/render && /tmp/render/bin/pip install 'reportlab>=4,<6'
    /tmp/render/bin/python examples/documents/src/render.py

The output depends on the text and on the version of reportlab only: no date, no random id.
"""

import re
from pathlib import Path
from typing import Any

from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import BaseDocTemplate, Flowable, Frame, PageTemplate, Paragraph

SOURCE = Path(__file__).with_name("handbook.md")
TARGET = SOURCE.parent.parent / "handbook.pdf"
BROKEN = TARGET.with_name("broken.pdf")

BODY = ParagraphStyle("body", fontName="Times-Roman", fontSize=11.5, leading=16.6, spaceAfter=8, alignment=4)
STYLES = {
    1: ParagraphStyle("title", fontName="Helvetica-Bold", fontSize=22, leading=28, spaceAfter=14),
    2: ParagraphStyle("section", fontName="Helvetica-Bold", fontSize=16, leading=20, spaceBefore=16, spaceAfter=8),
    3: ParagraphStyle("subsection", fontName="Helvetica-Bold", fontSize=12.5, leading=16, spaceBefore=9, spaceAfter=4),
}
for heading in STYLES.values():
    heading.keepWithNext = 1


class Handbook(BaseDocTemplate):
    """A4 pages with a page number and one bookmark a numbered heading, as real handbooks have them."""

    def __init__(self, target: Path) -> None:
        super().__init__(
            str(target),
            pagesize=A4,
            title="Handbook of the Knowledge Base Team",
            author="The processing-tasks authors",
            subject="Sample document, CC0-1.0",
            lang="en",
            invariant=1,
        )
        frame = Frame(27 * mm, 25 * mm, A4[0] - 54 * mm, A4[1] - 48 * mm)
        self.addPageTemplates(PageTemplate(frames=[frame], onPage=self.number_page))

    @staticmethod
    def number_page(canvas: Canvas, document: BaseDocTemplate) -> None:
        """Write the page number at the foot of the page."""
        canvas.setFont("Helvetica", 9)
        canvas.drawCentredString(A4[0] / 2, 14 * mm, str(document.page))

    def afterFlowable(self, flowable: Flowable) -> None:  # noqa: N802 - the name is reportlab's
        """Add a bookmark for a heading that was just placed, with the place on the page where it stands."""
        level: int | None = getattr(flowable, "outline_level", None)
        if level is None:
            return
        text = flowable.getPlainText()
        key = re.sub(r"[^a-z0-9]+", "-", text.lower())
        self.canv.bookmarkHorizontal(key, 0, self.frame._y + flowable.height)  # noqa: SLF001 - its only measure of the place
        self.canv.addOutlineEntry(text, key, level=level)


def inline(text: str) -> str:
    """Turn the inline Markdown that the source uses into reportlab's markup."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"`(.+?)`", r'<font name="Courier" size="10">\1</font>', text)


def story(markdown: str) -> list[Any]:
    """Return the flowables of the source: headings of three levels and paragraphs."""
    parts: list[Any] = []
    for block in re.split(r"\n\s*\n", markdown.strip()):
        match = re.match(r"(#{1,3}) (.+)", block)
        if match is None:
            parts.append(Paragraph(inline(" ".join(block.split())), BODY))
            continue
        level = len(match[1])
        paragraph = Paragraph(inline(match[2]), STYLES[level])
        if level > 1:
            paragraph.outline_level = level - 2
        parts.append(paragraph)
    return parts


def main() -> None:
    """Write both files."""
    Handbook(TARGET).build(story(SOURCE.read_text(encoding="utf-8")))
    whole = TARGET.read_bytes()
    # Cut where an interrupted copy might: the header is there, the cross-reference table and most objects are not.
    BROKEN.write_bytes(whole[: len(whole) // 5])


if __name__ == "__main__":
    main()
