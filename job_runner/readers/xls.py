"""XLS with a damaged sheet, by xlrd: calamine reads all sheets of one when it opens it, and none where one is damaged.

xlrd reads one sheet at a time, in Python and many times as slowly, so it is asked only where calamine has failed. It stops
at damage with whatever exception that leads to; its memory and time are bounded by those of the confined process.
"""

import datetime
import io
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from job_runner.readers.workbook import SheetFailed

R = TypeVar("R")


class DamagedXls:
    """The sheets of an XLS, each read by itself."""

    def __init__(self, file: BinaryIO) -> None:
        """Read what the workbook says of its sheets. Raises ``SheetFailed`` where that is damaged as well."""
        import xlrd

        content = file.read()
        nowhere = io.StringIO()  # it prints what it wonders at
        self._book: Any = _tried(
            lambda: xlrd.open_workbook(file_contents=content, on_demand=True, ragged_rows=True, logfile=nowhere)
        )

    @property
    def count(self) -> int:
        """Sheets, hidden ones counted."""
        return int(self._book.nsheets)

    @property
    def shown(self) -> Iterator[tuple[int, str]]:
        """Number, from 1, and name of each sheet that is not hidden."""
        visibility = self._book._sheet_visibility  # noqa: SLF001 - that of a sheet is known once the sheet is read
        for number, (name, hidden) in enumerate(zip(self._book.sheet_names(), visibility, strict=True), start=1):
            if not hidden:
                yield number, name

    def rows(self, number: int) -> Iterator[list[Any]]:
        """Yield the rows of a sheet from the top, each with its values from the left, empty texts between them.

        Values are those of calamine: texts, numbers, booleans, dates and times. Raises ``SheetFailed``.
        """
        sheet = _tried(lambda: self._book.sheet_by_index(number - 1))
        for row in range(sheet.nrows):
            yield [self._value(kind, value) for kind, value in zip(sheet.row_types(row), sheet.row_values(row), strict=True)]
        self._book.unload_sheet(number - 1)

    def _value(self, kind: int, value: Any) -> Any:
        import xlrd

        match kind:
            case xlrd.XL_CELL_DATE:
                return self._time(value)
            case xlrd.XL_CELL_BOOLEAN:
                return bool(value)
            case xlrd.XL_CELL_ERROR:
                return xlrd.error_text_from_code.get(value, "")
        return value

    def _time(self, value: float) -> Any:
        """Return a date, with its time if it has one, or a time of day; a number that is none as it is."""
        import xlrd

        if value < 0:
            return value
        try:
            found: datetime.datetime = xlrd.xldate_as_datetime(value, self._book.datemode)
        except (ValueError, OverflowError):
            return value
        if value < 1:
            return found.time()
        return found if found.time() != datetime.time() else found.date()


def _tried(read: Callable[[], R]) -> R:
    try:
        return read()
    except MemoryError:  # the limit of the process, of which its parent tells
        raise
    except Exception as error:
        raise SheetFailed(f"{type(error).__name__}: {error}"[:200]) from error
