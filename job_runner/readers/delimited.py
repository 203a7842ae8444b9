"""Delimited tables (CSV, TSV), whatever the character between their fields: a line for each record, with its headers."""

import csv
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Final

from job_runner.document import Kind, Page, ParsedDocument
from job_runner.readers.charset import decode
from job_runner.readers.grid import lines

_DELIMITERS: Final = ",\t;|"
_SAMPLE_RECORDS: Final = 50
_FIELD_LIMIT: Final = 2**30
"""Characters of a field; the csv module's own limit of 128 KiB is for other uses."""
_LINE: Final = re.compile(r"[^\n]*\n|[^\n]+")
_DECLARED: Final = re.compile(r"sep=([^\n])\n", re.IGNORECASE)
"""What Excel writes, and understands, as the first line."""
_SENTINEL: Final = "\0"


def read_delimited(data: bytes, *, name: str) -> ParsedDocument:
    """Read a delimited table; it has neither pages nor headings.

    Raises :class:`ReadingFailed` where its characters can't be read.
    """
    text = decode(data, name=name)
    declared = _DECLARED.match(text)
    start = declared.end() if declared else 0
    delimiter = declared.group(1) if declared else _delimiter(text)
    quoted = '"' in text and _closes_its_quotes(text, start, delimiter)
    records = _records(text, start, delimiter, quoted=quoted)
    rows = ({column: value for column, field in enumerate(record) if (value := field.strip())} for record in records)
    body = "\n".join(lines(rows, titled=True))
    return ParsedDocument(kind=Kind.CSV, text=body, pages=(Page(number=1, start=0),))


def is_table(sample: str, *, whole: bool) -> bool:
    """Tell whether the beginning of a text of any name can be nothing but a delimited table.

    At least five lines, all with the same number of at least three fields that a comma, tab or semicolon parts; no comma is
    followed by a space, as in prose. ``whole``: the last line is not cut off.
    """
    first = [line.group().rstrip("\r\n") for line in islice(_LINE.finditer(sample), _SAMPLE_RECORDS + 1)]
    first = first if whole and len(first) <= _SAMPLE_RECORDS else first[:-1]
    while first and not first[-1].strip():
        first.pop()
    if len(first) < 5:
        return False
    for delimiter in ",\t;":
        if all(delimiter in line for line in first[:5]):
            widths = {len(fields) for fields in _parse(first, delimiter)}
            if len(widths) == 1 and min(widths) >= 3 and not (delimiter == "," and any(", " in line for line in first)):
                return True
    return False


def _delimiter(text: str) -> str:
    """Return the character that parts most of the first records into the same number of fields, then into the most."""
    best, found = (0.0, 0), ","
    for delimiter in _DELIMITERS:
        widths = Counter(len(record) for record in islice(_records(text, 0, delimiter), _SAMPLE_RECORDS) if record)
        width, count = max(widths.items(), key=lambda item: (item[0] > 1, item[1]), default=(1, 0))
        if width > 1 and (score := (count / widths.total(), width)) > best:
            best, found = score, delimiter
    return found


def _closes_its_quotes(text: str, start: int, delimiter: str) -> bool:
    """Tell whether quotes come in pairs; after one that nothing closes all the rest would be one field."""
    records = _parse(chain(_lines(text, start), ["\n", _SENTINEL]), delimiter)
    return deque(records, maxlen=1) == deque([[_SENTINEL]])


def _records(text: str, start: int, delimiter: str, *, quoted: bool = True) -> Iterator[list[str]]:
    return _parse(_lines(text, start), delimiter, quoted=quoted)


def _parse(text_lines: Iterable[str], delimiter: str, *, quoted: bool = True) -> Iterator[list[str]]:
    csv.field_size_limit(_FIELD_LIMIT)
    return csv.reader(text_lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)


def _lines(text: str, start: int) -> Iterator[str]:
    """Yield the lines of a text with their ends; only ``\\n`` is one."""
    return (found.group() for found in _LINE.finditer(text, start))
