"""Text in pictures, recognised by RapidOCR with the models that its wheel carries: Chinese and English in the first place.

The libraries are an extra (``requirements/ocr.txt``). Where they are not installed, pictures have no text. They change what
the same bytes give, so they are part of the parser's version: see :func:`job_runner.readers.parser_version`.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from job_runner.document import Kind

Recognize = Callable[[Any], list[str]]
"""From a picture, an array (rows, columns, 3) of bytes in the order blue, green, red, to its lines from the top down."""

PICTURED: Final = frozenset({Kind.PDF, Kind.IMAGE, Kind.EML})
"""Kinds of files in which pictures are looked at."""
NEEDS_OCR: Final = (
    "text in pictures needs OCR, which this runner lacks: use a runner's image with requirements/ocr.txt (docs/images.md)"
)
RESOLUTION: Final = 200
"""Dots an inch at which a page is rendered; type of 6 points is then 17 pixels high."""
SIDE: Final = 2000
"""Pixels of the longer side of a picture, to which RapidOCR brings larger ones: A4 then has 171 dots an inch."""
_SAME_ROW: Final = 0.5
"""Share of the lower of two pieces of text by which they overlap in height if they are in one row."""
_COLUMN_LINES: Final = 4
"""Lines that a column has at least on both sides of a gutter."""
_COLUMN_WIDTH: Final = 0.2
"""Share of the width of all text that a line of a column has at least; three columns have a third each."""
_MOST: Final = 0.6
"""Share of the pieces of text that are such lines of columns, where there are columns at all."""


class Box(NamedTuple):
    """Where a piece of text stands in a picture, in pixels from its top left corner."""

    left: float
    top: float
    right: float
    bottom: float


def version() -> str | None:
    """Return the version of the recognition, ``None`` where it is not installed. Imports none of it."""
    if importlib.util.find_spec("rapidocr") is None or importlib.util.find_spec("onnxruntime") is None:
        return None
    from importlib.metadata import version as version_of  # takes a third of the time that all readers take to import

    return f"rapidocr {version_of('rapidocr')}"


def recognizer(*, threads: int) -> Recognize | None:
    """Return the recognition, ``None`` where it is not installed. Its models are loaded with the first picture.

    It raises ValueError for a picture that its libraries fail on, and MemoryError.
    """
    if version() is None:
        return None
    engine: Any = None

    def recognize(picture: Any) -> list[str]:
        nonlocal engine
        if engine is None:
            engine = _engine(threads)
        try:
            found = engine(picture)
        except MemoryError:
            raise
        except Exception as error:  # of three libraries with errors of their own: the other pages are to be read
            if "memory" in str(error).lower():
                raise MemoryError(str(error)) from error
            raise ValueError(f"cannot recognise a picture: {error}") from error
        if not found.txts:
            return []
        corners = [(*box.min(axis=0), *box.max(axis=0)) for box in found.boxes]
        return lines([Box(*map(float, corner)) for corner in corners], list(found.txts))

    return recognize


def _engine(threads: int) -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime reports its use to its maker, once it is imported
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.max_side_len": SIDE,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


def lines(boxes: Sequence[Box], texts: Sequence[str]) -> list[str]:
    """Return pieces of text as lines in the order of reading: column by column, each row from the left."""
    return [
        " ".join(texts[index] for index in row) for part in _columns(boxes, range(len(texts))) for row in _rows(boxes, part)
    ]


def _columns(boxes: Sequence[Box], among: Sequence[int]) -> list[list[int]]:
    """Part pieces of text into the columns of a page. What reaches over two, a title, ends those above it."""
    order = sorted(among, key=lambda index: boxes[index].top)
    gutter = _gutter([boxes[index] for index in order])
    if gutter is None:
        return [order] if order else []
    parts: list[list[int]] = []
    left: list[int] = []
    right: list[int] = []
    for index in order:
        box = boxes[index]
        if box.right <= gutter:
            left.append(index)
        elif box.left >= gutter:
            right.append(index)
        else:
            parts += [*_columns(boxes, left), *_columns(boxes, right), [index]]
            left, right = [], []
    return [*parts, *_columns(boxes, left), *_columns(boxes, right)]


def _gutter(boxes: Sequence[Box]) -> float | None:
    """Return where two columns of prose part, ``None`` if there are none: the cells of a table are short, or few."""
    if len(boxes) < 2 * _COLUMN_LINES:
        return None
    first, last = min(box.left for box in boxes), max(box.right for box in boxes)
    least = (last - first) * _COLUMN_WIDTH
    long = [box for box in boxes if box.right - box.left >= least]
    for gutter in sorted({box.left for box in long}):
        before = [box for box in long if box.right <= gutter]
        after = [box for box in long if box.left >= gutter]
        if min(len(before), len(after)) >= _COLUMN_LINES and len(before) + len(after) >= _MOST * len(boxes):
            return gutter
    return None


def _rows(boxes: Sequence[Box], among: Sequence[int]) -> list[list[int]]:
    """Part pieces of text of one column into rows from the top down, each from the left to the right."""
    found: list[list[int]] = []
    for index in sorted(among, key=lambda index: (boxes[index].top, boxes[index].bottom)):
        box = boxes[index]
        if found:
            first = boxes[found[-1][0]]
            overlap = min(box.bottom, first.bottom) - max(box.top, first.top)
            if overlap > _SAME_ROW * min(box.bottom - box.top, first.bottom - first.top):
                found[-1].append(index)
                continue
        found.append([index])
    return [sorted(row, key=lambda index: boxes[index].left) for row in found]
