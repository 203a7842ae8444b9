"""Scanned pages and pictures, read by the child process with the limits that the runner gives it."""

import io
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from job_runner import readers
from job_runner.document import Kind, ParsedDocument
from job_runner.fetch import opened
from job_runner.parse import parse, parser_limits
from job_runner.readers.ocr import recognizer
from job_runner.settings import Settings
from task_contract.errors import DocumentEmpty, DocumentRefused, DocumentUnreadable
from tests.support.pdf import PdfPage, make_pdf, scanned

LINES = [
    "The gauge is read at six in the morning and at six in the evening.",
    "Readings that differ by more than 12 mm are taken twice.",
]
ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ROOT / "tests/data/documents"
SETTINGS = Settings(postgres_url="postgresql://nowhere/none")


def page(*lines: str, size: float = 14) -> PdfPage:
    return PdfPage([(size, line) for line in lines])


async def parse_bytes(folder: Path, name: str, data: bytes) -> ParsedDocument:
    (folder / name).write_bytes(data)
    with opened(name, root=folder, max_bytes=1 << 30) as source:
        limits = parser_limits(SETTINGS, source.kind)
        return await parse(source, limits=limits, on_progress=lambda done, total: None)


def image_of(*lines: str, dpi: int = 100) -> Image.Image:
    """A picture of a page with these lines."""
    picture = scanned(page(*lines), dpi=dpi).picture
    assert picture is not None
    width, height, pixels = picture
    return Image.frombytes("L", (width, height), pixels)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


async def test_scanned_pages_are_recognised_and_the_others_are_read(tmp_path: Path) -> None:
    own = "Text of its own stays what it is, letter by letter: l1I O0."
    data = make_pdf([page(own), scanned(page(*LINES)), page("Last page.")])
    document = await parse_bytes(tmp_path, "mixed.pdf", data)
    assert document.kind is Kind.PDF
    assert document.failed_pages == ()
    assert len(document.pages) == 3
    assert document.text.startswith(own)
    for line in LINES:
        assert line in document.text
        assert document.page_at(document.text.index(line)) == 2
    assert document.page_at(document.text.index("Last page.")) == 3


async def test_a_stamp_on_a_scan_does_not_hide_it(tmp_path: Path) -> None:
    document = await parse_bytes(tmp_path, "stamped.pdf", make_pdf([scanned(page(" ", *LINES), stamp="Archive No. 17")]))
    assert LINES[0] in document.text
    assert "Archive No. 17" in document.text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
async def test_pictures_have_text(tmp_path: Path, kind: str) -> None:
    document = await parse_bytes(tmp_path, "picture", saved(image_of(LINES[1]).convert("RGB"), kind))
    assert document.kind is Kind.IMAGE
    assert document.text == LINES[1]
    assert not document.paged


async def test_each_picture_of_a_tiff_is_a_page(tmp_path: Path) -> None:
    first, second = (image_of(line) for line in LINES)
    data = saved(first, "TIFF", save_all=True, append_images=[second], compression="tiff_lzw")
    document = await parse_bytes(tmp_path, "fax.tif", data)
    assert document.text == " ".join(LINES)
    assert [item.number for item in document.pages] == [1, 2]
    assert document.page_at(document.text.index(LINES[1])) == 2


async def test_a_tall_picture_is_read_piece_by_piece(tmp_path: Path) -> None:
    one = image_of(*LINES)
    tall = Image.new("L", (one.width, 4 * one.height), "white")
    for row in range(4):
        tall.paste(one, (0, row * one.height))
    document = await parse_bytes(tmp_path, "chat.png", saved(tall))
    assert document.text.count("The gauge is read at six in the morning") == 4


def test_transparency_is_paper_and_a_photo_is_turned_upright() -> None:
    plain = image_of(LINES[1])
    letters = Image.new("RGBA", plain.size, (0, 0, 0, 0))
    letters.putalpha(plain.point([255 - value for value in range(256)]))  # black on nothing
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    photo = saved(plain.rotate(90, expand=True), "JPEG", exif=exif)
    recognize = recognizer(threads=1)
    for data in (saved(letters), photo):
        assert readers.read(io.BytesIO(data), kind=Kind.IMAGE, name="a", recognize=recognize).text == LINES[1]


def test_the_version_of_ocr_is_part_of_the_version_of_the_parser() -> None:
    assert readers.parser_version(Kind.PDF).startswith(f"{readers.PARSER_VERSION} with rapidocr 3.")
    assert readers.parser_version(Kind.MARKDOWN) == readers.PARSER_VERSION


async def test_bad_pictures_end_as_what_they_are(tmp_path: Path) -> None:
    data = saved(image_of(*LINES))
    with pytest.raises(DocumentUnreadable, match="the picture is damaged or cut short"):
        await parse_bytes(tmp_path, "cut.png", data[: len(data) // 2])
    with pytest.raises(DocumentEmpty, match="no text was recognised"):
        await parse_bytes(tmp_path, "white.png", saved(image_of()))
    huge = bytearray(data)
    huge[16:24] = (60_000).to_bytes(4, "big") * 2  # the size in its header; Pillow checks that header's sum
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    with pytest.raises(DocumentRefused, match="60000 by 60000 pixels and the limit is 120000000"):
        await parse_bytes(tmp_path, "huge.png", bytes(huge))


def test_nothing_is_downloaded_or_reported(tmp_path: Path) -> None:
    """Without the filter of the child: with a proxy that whoever wants a connection would ask, there is none at the end.

    The models are in the wheel. ONNX Runtime 1.32 reports to its maker, at the latest when its process ends.
    """
    (tmp_path / "a.png").write_bytes(saved(image_of(LINES[1])))
    script = """
from job_runner import readers
from job_runner.readers.ocr import recognizer
with open("a.png", "rb") as file:
    print(readers.read(file, kind=readers.Kind.IMAGE, name="a", recognize=recognizer(threads=1)).text)
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {"http_proxy": proxy, "https_proxy": proxy, "PYTHONPATH": f"{ROOT}:{ROOT / 'crds'}"}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == LINES[1]
        with pytest.raises(BlockingIOError):
            server.accept()


async def test_a_chinese_page_is_read_letter_by_letter(tmp_path: Path) -> None:
    """A page that was printed askew and a little blurred, beside the words that it was made of; spaces do not count."""
    words = (DOCUMENTS / "tide-rules.zh.png.md").read_text(encoding="utf-8")
    document = await parse_bytes(tmp_path, "tide-rules.zh.png", (DOCUMENTS / "tide-rules.zh.png").read_bytes())
    assert "".join(document.text.split()) == "".join(words.split())
    assert "读数与预报相差超过十二毫米的" in document.text  # the lines of a paragraph are joined
