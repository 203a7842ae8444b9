"""JSON and JSON Lines: ``path: value`` a line, records as rows with the names of their fields, long ones under headings.

Numbers stand as they are written. ``null``, empty values and data in base64 are left out: nobody searches for them.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from job_runner.document import Kind, ParsedDocument
from job_runner.readers.blocks import Assembly, Block
from job_runner.readers.charset import decode
from job_runner.readers.failure import ReadingFailed
from job_runner.readers.grid import cleaned, line, lines

_ROW_LIMIT: Final = 1000
"""Characters up to which a record is one row: what fits a chunk of the usual size. Longer ones get a heading each."""
_INLINE_LIMIT: Final = 200
"""Characters of a list that stands on one line."""
_TITLE_LIMIT: Final = 120
_TITLES: Final = ("title", "name", "headline", "subject", "question", "label", "标题", "名称", "问题", "題名", "名前")
"""Fields whose value is the title of a record, the best first; whatever their case."""
_BASE64: Final = re.compile(r"(?:data:[\w/+.-]+;base64,)?[A-Za-z0-9+/=_\-\s]{512,}")
_WORD_LIMIT: Final = 100
"""Characters of the longest word of any language, with room: prose has a space within as many."""

_Fields = list[tuple[str, str]]
"""The values of a record, each with its path."""


def read_json(data: bytes, *, name: str) -> ParsedDocument:
    """Read JSON; it has no pages.

    Raises :class:`ReadingFailed`: DocumentUnreadable with the place where it is not JSON, DocumentRefused for what lies too
    deep.
    """
    text = decode(data, name=name)
    assembly = Assembly()
    assembly.page(1)
    with _bounded_depth(name):
        try:
            value = _loads(text)
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":  # lines of JSON that are taken for JSON by the name of the file
                return read_json_lines(data, name=name)
            message = (
                f"cannot read {name}: it is not JSON: {error.msg} in line {error.lineno}, column {error.colno}; correct it"
            )
            raise ReadingFailed("DocumentUnreadable", message) from error
        assembly.extend(_top(value))
    return assembly.document(Kind.JSON)


def read_json_lines(data: bytes, *, name: str) -> ParsedDocument:
    """Read JSON Lines; it has no pages. Lines that are no JSON are recorded by their numbers, and the others are read.

    Raises :class:`ReadingFailed`: DocumentUnreadable where no line is JSON, DocumentRefused for what lies too deep.
    """
    text = decode(data, name=name)
    failed: dict[int, str] = {}
    read = 0

    def records() -> Iterator[Any]:
        nonlocal read
        read = 0
        for number, found in enumerate(re.finditer(r"[^\n]*\n|[^\n]+", text), start=1):
            if found.group().strip():
                try:
                    value = _loads(found.group())
                except json.JSONDecodeError as error:
                    failed[number] = f"{error.msg} in line {number}, column {error.colno}"
                else:
                    read += 1
                    yield value

    assembly = Assembly()
    assembly.page(1)
    with _bounded_depth(name):
        assembly.extend(_array(records, level=1))
    if failed and not read:
        message = f"cannot read {name}: none of its lines is JSON: {next(iter(failed.values()))}; correct it"
        raise ReadingFailed("DocumentUnreadable", message)
    return assembly.document(Kind.JSONL, failed_pages=failed)


@contextmanager
def _bounded_depth(name: str) -> Iterator[None]:
    """Turn what Python raises about values in one another, about a thousand deep, into a refusal."""
    try:
        yield
    except RecursionError as error:
        message = f"cannot read {name}: its values lie too deep in one another; give it fewer levels"
        raise ReadingFailed("DocumentRefused", message) from error


def _loads(text: str) -> Any:
    return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)


def _top(value: Any) -> Iterator[Block]:
    """Yield a whole document: values of the first level by themselves, those that hold others under a heading each.

    The simple ones come first, as they would else belong to the heading above them.
    """
    if isinstance(value, list):
        yield from _array(partial(iter, value), level=1)
        return
    if not isinstance(value, dict):
        yield Block(_scalar(value))
        return
    simple = {key: found for key, found in value.items() if _inline(found) is not None}
    yield from _lines(_fields(simple))
    for key, found in value.items():
        if key not in simple:
            inner = _array(partial(iter, found), level=2) if isinstance(found, list) else _lines(_fields(found))
            content = list(inner)
            if content:
                yield Block(cleaned(key) or "–", level=1)
                yield from content


def _array(items: Callable[[], Iterator[Any]], *, level: int) -> Iterator[Block]:
    """Yield the items of an array, which is read twice: first to see what it holds.

    Records that are short become rows of a table, and so do arrays of simple values; other records get a heading each.
    """
    short = all(_is_short(item) for item in items())
    if short and all(isinstance(item, list) for item in items()):
        rows = ({place: text for place, found in enumerate(item) if (text := _inline(found))} for item in items())
        yield from (Block(row, group=1) for row in lines(rows))
        return
    for number, item in enumerate(items(), start=1):
        if not isinstance(item, dict):
            if text := _inline(item) or "; ".join(f"{path}: {found}" for path, found in _fields({"": item})):
                yield Block(f"- {text}", group=1)
        elif short:
            fields = _fields(item)
            if row := line(
                {at: text for at, (_, text) in enumerate(fields)}, {at: path for at, (path, _) in enumerate(fields)}
            ):
                yield Block(row, group=1)
        else:
            content = list(_lines(_fields(item)))
            if content:
                yield Block(_title(item) or f"{number}.", level=level)
                yield from content


def _is_short(item: Any) -> bool:
    """Tell whether an item fits one row."""
    if isinstance(item, list):
        return all(_inline(found) is not None for found in item)
    if not isinstance(item, dict):
        return True
    return sum(len(path) + len(text) + 5 for path, text in _fields(item)) <= _ROW_LIMIT


def _title(item: Mapping[str, Any]) -> str:
    by_name = {key.lower(): found for key, found in item.items()}
    for name in _TITLES:
        if isinstance(found := by_name.get(name), str) and (title := " ".join(cleaned(found).split())):
            return title[:_TITLE_LIMIT]
    return ""


def _lines(fields: _Fields) -> Iterator[Block]:
    """Yield a line for each value; one that has several lines is a paragraph of its own."""
    for path, text in fields:
        yield Block(f"{path}: {text}" if path else text, group=0 if "\n" in text else 1)


def _fields(value: Mapping[str, Any]) -> _Fields:
    """Return all values of an object that are not empty, by their paths: ``address.city``, ``tanks[2].level``."""
    found: _Fields = []

    def collect(path: str, value: Any) -> None:
        if (text := _inline(value)) is not None:
            if text:
                found.append((path, text))
        elif isinstance(value, dict):
            for key, inner in value.items():
                name = cleaned(key)
                collect(f"{path}.{name}" if path else name, inner)
        else:
            for number, inner in enumerate(value, start=1):
                collect(f"{path}[{number}]", inner)

    for key, inner in value.items():
        collect(cleaned(key), inner)
    return found


def _inline(value: Any) -> str | None:
    """Return a simple value, or a short list of such, as text; ``None`` for others."""
    if isinstance(value, dict):
        return None if value else ""
    if not isinstance(value, list):
        return _scalar(value)
    if any(isinstance(item, dict | list) for item in value):
        return None
    text = ", ".join(filter(None, map(_scalar, value)))
    return text if len(text) <= _INLINE_LIMIT else None


def _scalar(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case str():
            return "" if _is_data(value) else cleaned(value)
    return str(value)


def _is_data(text: str) -> bool:
    """Tell whether a text is data in base64: letters and digits without the spaces that words have between them."""
    return len(text) >= 512 and _BASE64.fullmatch(text) is not None and max(map(len, text.split(" "))) > _WORD_LIMIT
