"""Text in pictures, recognised by RapidOCR with the models that its wheel carries: Chinese and English in the first place.

The libraries are an extra (``requirements/ocr.txt``). Where they are not installed, pictures have no text. They change what
the same bytes give, so they are part of the parser's version: see :func:`job_runner.readers.parser_version`.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, Final

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
        boxes = [(box[:, 0].min(), box[:, 1].min(), box[:, 1].max()) for box in found.boxes]
        return rows([(float(left), float(top), float(bottom)) for left, top, bottom in boxes], list(found.txts))

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


def rows(boxes: Sequence[tuple[float, float, float]], texts: Sequence[str]) -> list[str]:
    """Return pieces of text, each at (left, top, bottom), as rows from the top down, each from the left to the right."""
    found: list[list[int]] = []
    for index in sorted(range(len(texts)), key=lambda index: boxes[index][1:]):
        _, top, bottom = boxes[index]
        if found:
            _, row_top, row_bottom = boxes[found[-1][0]]
            overlap = min(bottom, row_bottom) - max(top, row_top)
            if overlap > _SAME_ROW * min(bottom - top, row_bottom - row_top):
                found[-1].append(index)
                continue
        found.append([index])
    return [" ".join(texts[index] for index in sorted(row, key=lambda index: boxes[index][0])) for row in found]
