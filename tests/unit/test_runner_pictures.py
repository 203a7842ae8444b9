"""Pictures and scanned pages where OCR is not installed, and the parts of reading them that need none."""

import io
from pathlib import Path

import numpy as np
import pytest

from job_runner import readers
from job_runner.cpus import available_cpus, cpu_limit
from job_runner.document import Kind
from job_runner.parse import parser_limits
from job_runner.readers import ReadingFailed, image, ocr
from job_runner.settings import Settings
from tests.support.pdf import PdfPage, make_pdf, scanned

SETTINGS = Settings(postgres_url="postgresql://nowhere/none", parser_seconds=30)
TEXT = PdfPage([(14, "The tide is high in the morning.")])


def test_without_ocr_a_scanned_page_is_a_failed_one_and_the_rest_is_read() -> None:
    data = make_pdf([TEXT, scanned(TEXT, dpi=20), scanned(TEXT, stamp="Archive No. 17", dpi=20)])
    document = readers.read(io.BytesIO(data), kind=Kind.PDF, name="a.pdf")
    assert document.failed_pages == (2,)
    assert document.text == "The tide is high in the morning. Archive No. 17"


@pytest.mark.parametrize(
    ("kind", "data"),
    [(Kind.PDF, make_pdf([scanned(TEXT, dpi=20)])), (Kind.IMAGE, b"\x89PNG\r\n\x1a\n")],
    ids=["pdf", "image"],
)
def test_without_ocr_the_message_names_the_image_that_has_it(kind: Kind, data: bytes) -> None:
    with pytest.raises(
        ReadingFailed, match=r"cannot index a: .*OCR, which this runner lacks: use .*requirements/ocr\.txt"
    ) as failed:
        readers.read(io.BytesIO(data), kind=kind, name="a")
    assert failed.value.reason == "DocumentEmpty"


def test_scanned_pages_and_pages_with_a_stamp_are_recognised_and_no_others() -> None:
    seen: list[tuple[int, ...]] = []

    def recognize(picture: np.ndarray) -> list[str]:
        seen.append(picture.shape)
        return [f"recognised {len(seen)}"]

    data = make_pdf([TEXT, scanned(TEXT, dpi=20), scanned(TEXT, stamp="Archive No. 17", dpi=20), PdfPage(), TEXT])
    document = readers.read(io.BytesIO(data), kind=Kind.PDF, name="a.pdf", recognize=recognize)
    assert document.failed_pages == ()
    assert [document.page_at(document.text.index(f"recognised {number}")) for number in (1, 2)] == [2, 3]
    assert "Archive" not in document.text  # it is in the picture as well, which is rendered with it
    assert seen == [(2000, 1414, 3)] * 2


def test_the_version_of_the_parser_names_ocr_for_kinds_with_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert readers.parser_version(Kind.PDF) == readers.PARSER_VERSION
    monkeypatch.setattr(readers, "ocr_version", lambda: "rapidocr 3.10.0")
    versions = {kind: readers.parser_version(kind) for kind in Kind}
    assert {kind for kind, version in versions.items() if "rapidocr 3.10.0" in version} == {Kind.PDF, Kind.IMAGE, Kind.EML}


def test_bounds_are_wider_where_pictures_may_have_to_be_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parser_limits(SETTINGS, Kind.PDF) == parser_limits(SETTINGS, Kind.DOCX)
    monkeypatch.setattr("job_runner.parse.ocr_version", lambda: "rapidocr 3.10.0")
    monkeypatch.setattr("job_runner.parse.available_cpus", lambda: 16)
    wide = parser_limits(SETTINGS, Kind.PDF)
    assert (wide.memory_bytes, wide.seconds, wide.cpu_seconds, wide.threads) == (3 << 30, 3600, 4 * 3600, 4)
    assert parser_limits(SETTINGS, Kind.DOCX).seconds == 30


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RuntimeError("Non-zero status code"), "failed page"),
        (RuntimeError("Failed to allocate memory for requested buffer"), "no memory"),
        (MemoryError(), "no memory"),
    ],
    ids=["other", "memory of a library", "memory"],
)
def test_a_picture_that_the_libraries_fail_on_is_a_failed_page_and_want_of_memory_is_told_apart(
    error: Exception, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(picture: object) -> None:
        raise error

    monkeypatch.setattr(ocr, "version", lambda: "rapidocr 3.10.0")
    monkeypatch.setattr(ocr, "_engine", lambda threads: engine)
    data = io.BytesIO(make_pdf([TEXT, scanned(TEXT, dpi=20)]))
    recognize = ocr.recognizer(threads=1)
    if outcome == "no memory":
        with pytest.raises(MemoryError):
            readers.read(data, kind=Kind.PDF, name="a", recognize=recognize)
    else:
        assert readers.read(data, kind=Kind.PDF, name="a", recognize=recognize).failed_pages == (2,)


def column(left: float, right: float, *names: str, top: float = 0) -> list[tuple[ocr.Box, str]]:
    """Lines of text one below the other."""
    return [(ocr.Box(left, top + 20 * at, right, top + 20 * at + 14), name) for at, name in enumerate(names)]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        pytest.param(column(0, 500, "a", "b"), ["a", "b"], id="from the top down"),
        pytest.param(column(90, 120, "42") + column(0, 50, "Tank", "next"), ["Tank 42", "next"], id="a row of cells"),
        pytest.param(column(0, 50, "a") + column(60, 99, "b", top=8), ["a", "b"], id="half a line lower is another row"),
        pytest.param([], [], id="nothing"),
        pytest.param(
            column(0, 230, *"abcd") + column(250, 480, *"efgh", top=3), list("abcdefgh"), id="two columns that are not level"
        ),
        pytest.param(
            column(0, 480, "Title")
            + column(0, 230, *"abcd", top=40)
            + column(250, 480, *"efgh", top=40)
            + column(100, 400, "Middle", top=140)
            + column(0, 230, *"ijkl", top=180)
            + column(250, 480, *"mnop", top=180),
            ["Title", *"abcdefgh", "Middle", *"ijklmnop"],
            id="titles over both columns",
        ),
        pytest.param(
            column(0, 150, *"abcd") + column(165, 315, *"efgh") + column(330, 480, *"ijkl"), list("abcdefghijkl"), id="three"
        ),
        pytest.param(
            column(0, 60, *"abcd") + column(200, 260, *"efgh") + column(400, 480, *"ijkl"),
            ["a e i", "b f j", "c g k", "d h l"],
            id="a table: its cells are short",
        ),
        pytest.param(
            column(0, 200, *"abc") + column(220, 480, *"efg"), ["a e", "b f", "c g"], id="three rows of two are no columns"
        ),
    ],
)
def test_pieces_of_text_are_put_into_the_order_of_reading(pieces: list[tuple[ocr.Box, str]], expected: list[str]) -> None:
    for order in (pieces, pieces[::-1], sorted(pieces)):
        assert ocr.lines([box for box, _ in order], [text for _, text in order]) == expected


def test_a_tall_picture_is_cut_between_lines() -> None:
    pixels = np.full((5000, 40, 3), 255, dtype=np.uint8)
    for top in range(0, 5000, 50):
        pixels[top : top + 30, 5:35] = 0
    pieces = list(image.cut(pixels))
    assert sum(len(piece) for piece in pieces) == 5000
    assert all(len(piece) <= ocr.SIDE for piece in pieces)
    ends = np.cumsum([len(piece) for piece in pieces])[:-1]
    assert all(end % 50 >= 30 for end in ends), ends


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        pytest.param({"cpu.max": "150000 100000"}, 2, id="one and a half CPUs"),
        pytest.param({"cpu.max": "max 100000"}, None, id="no limit"),
        pytest.param({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1, id="version 1"),
        pytest.param({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, id="version 1 without limit"),
        pytest.param({"cpu.max": "nonsense"}, None, id="unreadable"),
        pytest.param({"cpu.max": "99900000 100000"}, 64, id="more than there are"),
        pytest.param({}, None, id="no control group"),
    ],
)
def test_cpus_are_those_of_the_container(
    files: dict[str, str], limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content + "\n")
    assert cpu_limit(tmp_path) == limit
    assert available_cpus(tmp_path) == (limit or 64)
