"""Plain text and Markdown: the text as it is written, with its headings."""

import re
from typing import Final

from job_runner.document import Heading, Kind, Page, ParsedDocument


def read_plain(text: str) -> ParsedDocument:
    """Plain text; form feeds, as old printers knew them, start pages."""
    pages = [Page(number=1, start=0)]
    pages += [Page(number=number, start=feed.end()) for number, feed in enumerate(re.finditer("\f", text), start=2)]
    return ParsedDocument(kind=Kind.TEXT, text=text, pages=tuple(pages))


_FRONT_MATTER: Final = re.compile(r"\A---[ \t]*\n(.*?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_TITLE: Final = re.compile(r"^title:[ \t]*[\"']?(.+?)[\"']?[ \t]*$", re.MULTILINE)
_FENCE: Final = re.compile(r" {0,3}(`{3,}|~{3,})")
_ATX: Final = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*\Z")
_SETEXT: Final = re.compile(r" {0,3}(=+|-{2,})[ \t]*\Z")
_NOT_A_PARAGRAPH: Final = re.compile(r"[ \t]*(?:[-*+>|#]|\d+[.)]|`{3}|~{3}|\Z)| {4}")
_MARKUP: Final = re.compile(r"`+|\*\*|__(?=\S)|(?<=\S)__|!?\[([^\]]*)\]\([^)]*\)")


def read_markdown(text: str) -> ParsedDocument:
    """Markdown as it is written, with its headings; the front matter is left out, its title becomes a heading."""
    title = None
    if front_matter := _FRONT_MATTER.match(text):
        text = text[front_matter.end() :]
        found = _TITLE.search(front_matter.group(1))
        title = found.group(1) if found else None
    headings = _markdown_headings(text)
    if title is not None and not any(heading.level == 1 for heading in headings):
        headings.insert(0, Heading(start=0, end=0, level=1, title=title))
    return ParsedDocument(kind=Kind.MARKDOWN, text=text, pages=(Page(number=1, start=0),), headings=tuple(headings))


def _markdown_headings(text: str) -> list[Heading]:
    headings: list[Heading] = []
    fence: str | None = None
    previous, previous_start = "", 0
    offset = 0
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        start, offset = offset, offset + len(line)
        content = line.rstrip("\n")
        mark = _FENCE.match(content)
        if fence is not None:
            if mark and mark.group(1).startswith(fence) and not content[mark.end() :].strip():
                fence = None
            previous = ""
            continue
        if mark:
            fence, previous = mark.group(1), ""
            continue
        if (atx := _ATX.match(content)) and (title := _clean_title(atx.group(2) or "")):
            headings.append(Heading(start=start, end=offset, level=len(atx.group(1)), title=title))
        elif (under := _SETEXT.match(content)) and (title := _clean_title(previous)):
            headings.append(
                Heading(start=previous_start, end=offset, level=1 if under.group(1)[0] == "=" else 2, title=title)
            )
        # Only a paragraph of one line becomes a heading by what stands below it; " " stands for any other line.
        if not content.strip():
            previous = ""
        else:
            previous = " " if previous or _NOT_A_PARAGRAPH.match(content) else content
            previous_start = start
    return headings


def _clean_title(title: str) -> str:
    return _MARKUP.sub(lambda markup: markup.group(1) or "", title).strip()
