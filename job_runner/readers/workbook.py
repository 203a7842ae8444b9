"""What workbooks of all formats have in common: each sheet is a page, under a heading of its name.

What is read are the values as they were last calculated. Hidden sheets are left out, as what nobody sees, but count where
sheets are counted. The rows of a sheet become lines with the headers of their columns (:mod:`job_runner.readers.grid`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from job_runner.document import Kind, ParsedDocument
from job_runner.readers.blocks import Assembly, Block
from job_runner.readers.failure import OnProgress, ReadingFailed
from job_runner.readers.grid import Row, cleaned

Place = tuple[int, int]
"""A cell, by row and column from 0."""
Range = tuple[Place, Place]
"""First and last cell."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """A sheet that is shown."""

    number: int
    """Its place in the workbook, hidden ones counted."""
    name: str
    lines: Iterable[str]
    """Those of its rows; raises ``SheetFailed``."""


class SheetFailed(Exception):
    """A sheet can't be read; others may be."""


def document(kind: Kind, sheets: Iterable[Sheet], *, name: str, count: int, on_progress: OnProgress) -> ParsedDocument:
    """Put the sheets of a workbook together. Those that fail are recorded, and the others read.

    ``count``: of all sheets. Raises :class:`ReadingFailed`, DocumentUnreadable, where all have failed.
    """
    assembly = Assembly()
    failed: list[int] = []
    read = 0
    reason: SheetFailed | None = None
    for sheet in sheets:
        assembly.page(sheet.number)
        try:
            for place, found in enumerate(sheet.lines):
                if place == 0:
                    assembly.add(Block(cleaned(sheet.name), level=1))
                assembly.add(Block(found, group=sheet.number))
        except SheetFailed as error:
            failed.append(sheet.number)
            reason = error
        else:
            read += 1
        on_progress(sheet.number, count)
    if reason is not None and not read:
        raise ReadingFailed(
            "DocumentUnreadable", f"cannot read {name}: none of its sheets can be read: {reason}"
        ) from reason
    return assembly.document(kind, failed_pages=failed)


def merged(rows: Iterable[Row], ranges: Iterable[Range], *, top: int) -> Iterator[Row]:
    """Repeat the value of a cell that covers several rows in each of them that has others, so that each says all."""
    begins: dict[int, list[tuple[int, int]]] = {}
    for (first, column), (last, _) in ranges:
        if last > first:
            begins.setdefault(first, []).append((last, column))
    covering: dict[int, tuple[int, str]] = {}
    for number, row in enumerate(rows, start=top):
        if covering and row:
            covering = {column: cover for column, cover in covering.items() if cover[0] >= number}
            if repeated := {column: value for column, (_, value) in covering.items() if column not in row}:
                row = dict(sorted({**row, **repeated}.items()))
        for last, column in begins.get(number, ()):
            if value := row.get(column):
                covering[column] = (last, value)
        yield row
