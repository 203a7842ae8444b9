"""Rows of plain values, from a sheet or a delimited file, as lines that each say what their values are.

``| City: Oslo | Population: 717,710 |``: each row carries the headers of its columns, as rows of tables in documents do
(:class:`job_runner.readers.blocks.Table`), so that a chunk that holds any row can be understood. Nothing marks the header of
such rows: it is looked for at the top, and again below an empty row, where often another table begins.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Final

Row = Mapping[int, str]
"""Values by columns, in their order: only those that are not empty, without white space at their edges."""
Labels = Mapping[int, str]
"""What the columns are called, where they are."""

_SAMPLE: Final = 50
"""Rows from which it is told which of them are a header."""
_HEADER_LIMIT: Final = 200
"""Characters of a header; a longer value is prose."""
_LABEL_LIMIT: Final = 80
"""Characters of it that each row repeats."""
_LINE_LIMIT: Final = 800
"""Characters from which a row is written in parts, so that each fits a chunk of the usual size whole."""
_KEY_LIMIT: Final = 100
_DATE: Final = re.compile(r"(?:19|20)\d\d年?(?:[-/.年]\d{1,2}月?(?:[-/.月]\d{1,2}日?.{0,15})?)?")
_MEASURE: Final = re.compile(
    r"[-+(]?[$€£¥]?\s?\d[\d\s.,:/%'’-]*(?:e[-+]?\d+)?\s?[%€$£¥)]*|true|false|yes|no|[是否]", re.IGNORECASE
)
"""A number, date, time, amount of money or switch."""
_MEASURED: Final = 0.8
"""Share of such values from which a column is one of them."""
_PROSE: Final = 60
"""Characters that the values of a column have on average if it holds prose; its header is at most half as long."""
_UNSEEN: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\xad\u200b\u2060\ufeff\ufffd]")
"""Control characters, soft hyphens and characters without width."""


def lines(rows: Iterable[Row], *, titled: bool = False) -> Iterator[str]:
    """Yield a line for each row that has values, several for a long one. Rows are read as they come, up to 50 of them ahead.

    ``titled``: what the rows come from has a header by custom; the first row is one unless it contradicts that.
    """
    ahead = iter(rows)
    labels: Labels = {}
    for first in ahead:
        if not first:
            continue
        sample = [first]
        rest: Iterator[Row] = iter(())
        for row in ahead:
            if not row:
                break
            sample.append(row)
            if len(sample) == _SAMPLE:
                rest = _until_empty(ahead)
                break
        plain, labels = _header(sample, before=labels, titled=titled)
        titled = False
        for number, row in enumerate(chain(sample, rest)):
            text = line(row, labels if number >= plain else {})
            if len(text) <= _LINE_LIMIT:
                yield text
            else:
                yield from _parts(row, labels if number >= plain else {})


def line(row: Row, labels: Labels) -> str:
    """Return a row as a line; a value that is alone in its row and has no label stands for itself."""
    values: list[str] = []
    labelled = False
    for column, written in row.items():
        value = " ".join(written.split())
        label = labels.get(column)
        if label and label != value:
            labelled = True
            value = f"{label}: {value}"
        values.append(value)
    return f"| {' | '.join(values)} |" if labelled or len(values) > 1 else "".join(values)


def _parts(row: Row, labels: Labels) -> Iterator[str]:
    """Yield a long row in parts; each begins with the first value, if that is short: most often it says what the row is."""
    first = next(iter(row))
    key = {first: row[first]} if len(row[first]) <= _KEY_LIMIT else {}
    part: dict[int, str] = {}
    length = 0
    for column, value in row.items():
        size = len(value) + len(labels.get(column, "")) + 5
        if length + size > _LINE_LIMIT and len(part) > len(key):
            yield line(part, labels)
            part, length = dict(key), sum(map(len, key.values()))
        part[column] = value
        length += size
    yield line(part, labels)


def cleaned(value: str) -> str:
    """Return a value without white space at its edges, and without characters that nobody sees."""
    return (value if value.isprintable() else _UNSEEN.sub("", value)).strip()


def _until_empty(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        if not row:
            return
        yield row


def _header(sample: Sequence[Row], *, before: Labels, titled: bool) -> tuple[int, Labels]:
    """Return how many rows at the top are titles and headers, and the labels of the rows below.

    ``before``: the labels of the rows before an empty one. They hold on where the columns are the same and no row looks
    like another header.
    """
    titles = next((number for number, row in enumerate(sample) if len(row) > 1), 0)
    rows = sample[titles:]
    used = {column for row in rows for column in row}
    continued = bool(before) and used <= before.keys()
    for count in (2, 1):
        if len(rows) <= count:
            continue
        head, body = rows[:count], [row for row in rows[count:] if row != rows[0]]
        contrast = _contrast(head, body)
        if contrast is None or 2 * len(rows[0]) < len(used):
            continue
        if contrast or (count == 1 and not continued and (len(rows[0]) > 2 or titled)):
            return titles + count, _labels(head)
    return titles, before if continued else {}


def _contrast(head: Sequence[Row], body: Sequence[Row]) -> bool | None:
    """Tell whether rows look like the header of those below; ``None``: they can't be it, ``False``: they may.

    Titles are words, each once and not among the values below it; or dates, as those of months, above numbers. They contrast
    with their columns if one of these holds measures or prose.
    """
    labels = _labels(head)
    if not body or len(labels) < 2 or len(set(labels.values())) < len(labels):
        return None
    if len(head) == 2 and head[1].keys() <= head[0].keys():
        return None  # two rows are a header where the first one has titles of several columns
    words = 0
    contrast = False
    for column in labels:
        below = [row[column] for row in body if column in row]
        measured = bool(below) and sum(_MEASURE.fullmatch(value) is not None for value in below) >= _MEASURED * len(below)
        for title in (row[column] for row in head if column in row):
            if len(title) > _HEADER_LIMIT or title in below:
                return None
            if _DATE.fullmatch(title):
                if not measured or sum(_DATE.fullmatch(value) is not None for value in below) * 2 > len(below):
                    return None
            elif _MEASURE.fullmatch(title):
                return None
            else:
                words += 1
                prose = sum(map(len, below)) > _PROSE * len(below) and 2 * len(title) <= _PROSE
                contrast |= measured or prose
    return contrast and words > 0 if len(head) == 2 else contrast if words else None


def _labels(head: Sequence[Row]) -> dict[int, str]:
    """Return the label of each column: the titles above it, from the top down.

    In all rows but the last a title holds for the columns on its right, up to the next one.
    """
    labels: dict[int, str] = {}
    above = ""
    for column in sorted({column for row in head for column in row}):
        last = head[-1].get(column, "")
        if len(head) == 2:
            above = head[0].get(column) or (above if last else "")
        titles = dict.fromkeys(" ".join(title.split()).rstrip(":： ") for title in (above, last) if title)
        if label := " ".join(titles):
            labels[column] = label if len(label) <= _LABEL_LIMIT else label[: _LABEL_LIMIT - 1] + "…"
    return labels
