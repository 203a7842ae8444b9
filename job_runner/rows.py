"""Rows of a file, one after the other: a JSON object a line, or Parquet where pyarrow is installed.

A file is read from its beginning as often as somebody asks, in memory that does not grow with its rows. What a row is good
for is not known here: a row that cannot be read says why, and the next one is read.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from job_runner.fetch import Opened
from task_contract.errors import DocumentRefused, DocumentUnreadable

LINE_BYTES: Final = 4 << 20
"""Longest line: the most dimensions that Milvus takes, 32,768, at 24 digits, and as much again for text and metadata."""
_PARQUET: Final = b"PAR1"
_BATCH: Final = 512
"""Rows of Parquet that are made Python values at once."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row."""

    number: int
    """From 1; of a line, blank ones counted."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    """Why it cannot be read; empty: it was."""


def records(file: Opened, columns: Sequence[str]) -> Iterator[Record]:
    """Yield the rows of a file with at least those of the columns that it has; blocking, run it in a thread.

    One reading at a time: they share the place in the file. Raises DocumentRefused for Parquet without pyarrow,
    DocumentUnreadable for damaged Parquet, and DocumentChanged at the end of a file that was written to meanwhile.
    """
    with open(file.descriptor, "rb", closefd=False) as opened:
        opened.seek(0)
        is_parquet = opened.read(len(_PARQUET)) == _PARQUET
        opened.seek(0)
        yield from (_parquet(opened, columns, name=file.name) if is_parquet else _lines(opened))
    file.check_unchanged()


def _lines(file: Any) -> Iterator[Record]:
    number = 0
    while line := file.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(LINE_BYTES)
            yield Record(number, problem=f"the line has more than {LINE_BYTES} bytes")
        elif not line.isspace():
            yield _line(number, line)


def _line(number: int, line: bytes) -> Record:
    try:
        fields = orjson.loads(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except orjson.JSONDecodeError as error:
        # NaN and infinity, which Python writes and JSON has not, get the reason of any other number that is none.
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            return Record(number, problem=f"no JSON: {error.msg}")
    if not isinstance(fields, dict):
        return Record(number, problem="no JSON object")
    return Record(number, fields)


def _parquet(file: Any, columns: Sequence[str], *, name: str) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DocumentRefused(
            f"cannot read {name}: it is Parquet and this runner's image has no pyarrow; give JSON lines, or an image with "
            "the extra 'parquet'"
        ) from None
    try:
        table = parquet.ParquetFile(file)
        there = [column for column in columns if column in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(batch_size=_BATCH, columns=there):
            values = {column: _values(batch.column(column)) for column in there}
            for index in range(batch.num_rows):
                number += 1
                yield Record(number, {column: found[index] for column, found in values.items()})
    except (pyarrow.ArrowException, OSError) as error:
        raise DocumentUnreadable(f"cannot read {name}: damaged Parquet: {str(error)[:200]}; write it again") from error


def _values(column: Any) -> Sequence[Any]:
    """Return a column as JSON would have it; lists of numbers stay arrays, which are not made objects one by one."""
    import pyarrow

    if pyarrow.types.is_list(column.type) or pyarrow.types.is_fixed_size_list(column.type):
        lists = [scalar.values for scalar in column]
        return [None if numbers is None else _numbers(numbers) for numbers in lists]
    return [_plain(value) for value in column.to_pylist()]


def _numbers(numbers: Any) -> Sequence[Any]:
    found: list[Any] = numbers.to_pylist() if numbers.null_count else numbers.to_numpy(zero_copy_only=False)
    return found


def _plain(value: Any) -> Any:
    """Return a map, or an object without the keys that others have, as the object that JSON would have."""
    if isinstance(value, list):
        return dict(value)
    if isinstance(value, dict):
        return {key: one for key, one in value.items() if one is not None}
    return value
