"""The text of a document from its stored chunks, for another splitter: no file is needed, and none has to be there still.

A chunk is the text between two offsets, and the splitter leaves out nothing but white space. So the chunks give the text
back but for the kind of white space between them: a gap of two characters and more counts as the end of a paragraph.
Headings come from the paths of the chunks: a heading is known where the path changes, with its own line where the chunk has
it. Pages come from the page numbers; of a chunk over several pages nothing says where they turn, and they are taken to be
equally long.
"""

from collections.abc import Sequence

from job_runner.document import Heading, Kind, Page, ParsedDocument
from job_runner.index import Row


def reassembled(rows: Sequence[Row]) -> ParsedDocument:
    """Return the document of which these are all chunks, in the order of ordinals; at least one."""
    parts: list[str] = []
    length = 0
    headings: list[Heading] = []
    pages: list[Page] = []
    before: tuple[str, ...] = ()
    for row in rows:
        if (gap := row.char_start - length) > 0:
            parts.append(" " if gap == 1 else "\n" * gap)
            length = row.char_start
        path = tuple(row.heading_path.split("\n")) if row.heading_path else ()
        if path != before:
            headings += _headings(row, path, before, after=headings[-1].end if headings else 0)
            before = path
        pages += _pages(row, after=pages[-1] if pages else None)
        if row.char_end > length:
            parts.append(row.text[length - row.char_start :])
            length = row.char_end
    paged = rows[0].page_start > 0
    return ParsedDocument(
        kind=Kind.PDF if paged else Kind.TEXT,
        text="".join(parts),
        pages=tuple(pages) if paged else (Page(1, 0),),
        headings=tuple(headings),
    )


def _headings(row: Row, path: tuple[str, ...], before: tuple[str, ...], *, after: int) -> list[Heading]:
    """Return the headings that a chunk adds to the path of the one before it, none before an offset."""
    common = 0
    while common < min(len(path), len(before)) and path[common] == before[common]:
        common += 1
    if common == len(path):  # back to a section above, whose own line was before
        common -= 1
    found = []
    position = max(row.char_start, after)
    for level, title in enumerate(path[common:] if path else (), start=common + 1):
        at = row.text.find(title, position - row.char_start)
        if at < 0:
            found.append(Heading(start=position, end=position, level=level, title=title))
            continue
        start = row.text.rfind("\n", 0, at) + 1
        start = max(start, position - row.char_start)
        stop = row.text.find("\n", at)
        end = row.char_start + (len(row.text) if stop < 0 else stop + 1)
        found.append(Heading(start=row.char_start + start, end=end, level=level, title=title))
        position = end
    return found


def _pages(row: Row, *, after: Page | None) -> list[Page]:
    first = row.page_start if after is None else max(row.page_start, after.number + 1)
    count = row.page_end - row.page_start + 1
    found: list[Page] = []
    for number in range(first, row.page_end + 1):
        start = row.char_start + (number - row.page_start) * (row.char_end - row.char_start) // max(count, 1)
        start = 0 if after is None and not found else max(start, (found[-1] if found else after or Page(0, 0)).start)
        found.append(Page(number, start))
    return found
