"""Pictures: their text, recognised; each picture of a TIFF is a page."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from job_runner.document import Kind, ParsedDocument
from job_runner.readers.failure import OnProgress, ReadingFailed
from job_runner.readers.lines import Line, paged
from job_runner.readers.ocr import NEEDS_OCR, SIDE, Recognize

if TYPE_CHECKING:
    from PIL import Image

_FORMATS: Final = ("PNG", "JPEG", "TIFF", "WEBP", "BMP")
"""The only ones of Pillow's decoders that see the file."""
_PIXEL_LIMIT: Final = 120_000_000
"""Pixels of a picture: A3 at 600 dots an inch has 70 million; decoded they take up to 4 bytes each, twice for a moment."""
_TALL: Final = 2
"""Height in widths from which a picture is read piece by piece: as a whole it would be shrunk to ``SIDE``."""
_TALL_WIDTH: Final = 1400
"""Pixels to which the width of a tall picture is brought: that of a page of A4."""


def read_image(file: BinaryIO, *, name: str, on_progress: OnProgress, recognize: Recognize | None) -> ParsedDocument:
    """Read a picture, or several of one file; one that cannot be read is a failed page.

    Raises :class:`ReadingFailed`: DocumentEmpty where there is no text or no OCR, DocumentRefused for a picture that is too
    large, DocumentUnreadable for a damaged one.
    """
    if recognize is None:
        raise ReadingFailed("DocumentEmpty", f"cannot index {name}: it is a picture; {NEEDS_OCR}")
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # pictures above the limit are refused here, instead of warned of there
    damaged = ReadingFailed(
        "DocumentUnreadable", f"cannot read {name}: the picture is damaged or cut short; copy it again or save it anew"
    )
    lines: list[Line] = []
    failed: list[int] = []
    try:
        image = Image.open(file, formats=_FORMATS)
        count = getattr(image, "n_frames", 1)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError) as error:
        raise damaged from error
    for number in range(1, count + 1):
        try:
            image.seek(number - 1)
            _check_size(image, name=name)
            for piece in _pieces(image):
                lines += [Line(text=text, page=number) for text in recognize(piece)]
        except (OSError, ValueError, SyntaxError, EOFError):
            failed.append(number)
        on_progress(number, count)
    if not lines:
        if len(failed) == count:
            raise damaged
        raise ReadingFailed("DocumentEmpty", f"cannot index {name}: no text was recognised in it")
    return paged(lines, kind=Kind.IMAGE, count=count, failed=failed)


def _check_size(image: "Image.Image", *, name: str) -> None:
    """Raise DocumentRefused before a picture is decoded that would take all memory; its size stands in its header."""
    width, height = image.size
    if width * height > _PIXEL_LIMIT:
        message = (
            f"cannot read {name}: the picture has {width} by {height} pixels and the limit is {_PIXEL_LIMIT} in all; "
            "save it in a lower resolution"
        )
        raise ReadingFailed("DocumentRefused", message)


def _pieces(image: "Image.Image") -> Iterator[Any]:
    """Yield a picture as arrays of pixels of blue, green and red: whole, or a tall one piece by piece from the top."""
    import numpy as np
    from PIL import Image, ImageOps

    image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a large JPEG is decoded in a lower resolution
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.has_transparency_data:
        page = Image.new("RGBA", upright.size, "white")
        page.alpha_composite(upright.convert("RGBA"))
        upright = page
    upright = upright.convert("RGB")
    width, height = upright.size
    if height > _TALL * width:
        if width > _TALL_WIDTH:
            upright = upright.resize((_TALL_WIDTH, height * _TALL_WIDTH // width))
        yield from cut(np.asarray(upright)[:, :, ::-1])
    else:
        upright.thumbnail((2 * SIDE, 2 * SIDE))
        yield np.asarray(upright)[:, :, ::-1].copy()


def cut(pixels: Any) -> Iterator[Any]:
    """Yield pieces of at most ``SIDE`` rows, cut where a row has the least contrast: between lines of text."""
    start = 0
    while len(pixels) - start > SIDE:
        first = start + SIDE * 3 // 4
        rows = pixels[first : start + SIDE].reshape(start + SIDE - first, -1)
        contrast = rows.max(axis=1).astype(int) - rows.min(axis=1)
        end = first + int(contrast.argmin())
        yield pixels[start:end].copy()
        start = end
    yield pixels[start:].copy()
