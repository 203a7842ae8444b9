"""Delimited tables (CSV, TSV): which character parts the fields."""

import csv
from collections.abc import Iterable
from typing import Final

DELIMITERS: Final = ",\t;|"
_SAMPLE_LINES: Final = 50


def is_table(sample: str, *, whole: bool) -> bool:
    """Tell whether the beginning of a text of any name can be nothing but a delimited table.

    At least five lines, all with the same number of at least three fields that a comma, tab or semicolon parts; no comma is
    followed by a space, as in prose. ``whole``: the last line is not cut off.
    """
    lines = sample.splitlines()[: _SAMPLE_LINES + 1]
    lines = lines if whole and len(lines) <= _SAMPLE_LINES else lines[:-1]
    while lines and not lines[-1].strip():
        lines.pop()
    for delimiter in ",\t;":
        if len(lines) >= 5 and all(delimiter in line for line in lines[:5]):
            widths = {len(fields) for fields in _fields(lines, delimiter)}
            if len(widths) == 1 and min(widths) >= 3 and not (delimiter == "," and any(", " in line for line in lines)):
                return True
    return False


def _fields(lines: Iterable[str], delimiter: str) -> Iterable[list[str]]:
    try:
        yield from csv.reader(lines, delimiter=delimiter)
    except csv.Error:  # a field of more than 128 KiB, as after a quote that nothing closes
        yield []
