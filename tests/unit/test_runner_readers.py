"""What is read out of PDF, Markdown and text: the text itself, pages, headings, character sets."""

from pathlib import Path

import pytest

from job_runner.document import Kind, ParsedDocument, heading_paths
from job_runner.readers import ReadingFailed, decode, read
from tests.support.pdf import PdfPage, make_pdf

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/documents"


def read_bytes(tmp_path: Path, data: bytes, kind: Kind) -> ParsedDocument:
    path = tmp_path / "file"
    path.write_bytes(data)
    return read(path, kind=kind, name="file")


# ------------------------------------------------------------------------------------------------------------- charset

PROSE = "知识库把文档切成片段，每个片段都带有页码和标题。"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(PROSE.encode(), PROSE, id="utf-8"),
        pytest.param(PROSE.encode("utf-8-sig"), PROSE, id="utf-8 with mark"),
        pytest.param(PROSE.encode("utf-16"), PROSE, id="utf-16 with mark"),
        pytest.param(PROSE.encode("utf-32"), PROSE, id="utf-32 with mark"),
        pytest.param(PROSE.encode("gb18030"), PROSE, id="gb18030"),
        pytest.param(b"a\r\nb\rc", "a\nb\nc", id="line ends"),
        pytest.param(
            ("Une idée très française à côté. " * 20).encode("cp1252"), "Une idée très française à côté. " * 20, id="latin"
        ),
        pytest.param(
            ("知識庫將文件切成片段，每個片段都帶有頁碼與標題，這是繁體中文。" * 20).encode("big5"),
            "知識庫將文件切成片段，每個片段都帶有頁碼與標題，這是繁體中文。" * 20,
            id="big5",
        ),
        pytest.param(
            ("これは日本語の文章です。片仮名カタカナも含みます。" * 20).encode("shift_jis"),
            "これは日本語の文章です。片仮名カタカナも含みます。" * 20,
            id="shift-jis",
        ),
    ],
)
def test_text_is_decoded(data: bytes, expected: str) -> None:
    assert decode(data, name="file") == expected


@pytest.mark.parametrize("data", [bytes(range(256)) * 40, b"\x01\x02\x03\x04" * 100], ids=["all bytes", "control codes"])
def test_binary_data_is_no_text(data: bytes) -> None:
    with pytest.raises(ReadingFailed, match="cannot read file"):
        decode(data, name="file")


def test_a_wrong_byte_order_mark_is_named() -> None:
    with pytest.raises(ReadingFailed, match="marked as utf-8-sig") as failure:
        decode(b"\xef\xbb\xbfabc\xff", name="file")
    assert failure.value.reason == "DocumentUnreadable"


# ------------------------------------------------------------------------------------------------------------ markdown


def test_markdown_headings(tmp_path: Path) -> None:
    text = """---
title: "Handbook"
---
Intro.

Chapter
-------

## Part `one` [link](http://x) ##

```sh
# not a heading
```

~~~
## nor this
```
# nor that
~~~
two lines of
a paragraph
---

- item
---

#nospace
### Deep
"""
    document = read_bytes(tmp_path, text.encode(), Kind.MARKDOWN)
    assert not document.text.startswith("---")
    assert [(heading.level, heading.title) for heading in document.headings] == [
        (1, "Handbook"),
        (2, "Chapter"),
        (2, "Part one link"),
        (3, "Deep"),
    ]
    assert [document.text[heading.start : heading.end] for heading in document.headings] == [
        "",
        "Chapter\n-------\n",
        "## Part `one` [link](http://x) ##\n",
        "### Deep\n",
    ]
    assert heading_paths(document.headings)[-1] == ("Handbook", "Part one link", "Deep")


def test_chinese_example(tmp_path: Path) -> None:
    document = read(EXAMPLES / "operations-guide.zh.md", kind=Kind.MARKDOWN, name="guide")
    assert document.headings[0].title == "知识库平台运维手册"
    assert all(document.text[heading.start] == "#" for heading in document.headings)


# ---------------------------------------------------------------------------------------------------------------- text


def test_form_feeds_are_pages(tmp_path: Path) -> None:
    document = read_bytes(tmp_path, b"one\n\ftwo\n\fthree", Kind.TEXT)
    assert [(page.number, page.start) for page in document.pages] == [(1, 0), (2, 5), (3, 10)]
    assert document.page_at(4) == 1
    assert document.page_at(5) == 2


# ----------------------------------------------------------------------------------------------------------------- PDF


def test_english_example() -> None:
    document = read(EXAMPLES / "handbook.pdf", kind=Kind.PDF, name="handbook")
    assert [page.number for page in document.pages] == list(range(1, 11))
    assert document.failed_pages == ()
    paths = heading_paths(document.headings)
    assert paths[1] == ("1. What the team does", "1.1 Our task")
    assert "that a document which was accepted is found, that a document which was withdrawn is not found" in document.text


def test_chinese_lines_are_joined_without_spaces(tmp_path: Path) -> None:
    lines = [
        (12.0, "知识库把文档切成片段每个片段都带有页码和标题信"),
        (12.0, "息并且写进两个存储里面供人检索以及回答问题所用"),
        (12.0, "最后一行。"),
    ]
    document = read_bytes(tmp_path, make_pdf([PdfPage(lines)]), Kind.PDF)
    assert document.text == "".join(text for _, text in lines)


def test_headings_by_size_without_an_outline(tmp_path: Path) -> None:
    body = [(11.0, "This is an ordinary line of the body of this document, set small.")] * 6
    pages = [PdfPage([(22, "Big Title"), (16, "First part"), *body, (16, "Second part"), *body])]
    document = read_bytes(tmp_path, make_pdf(pages), Kind.PDF)
    assert [(heading.level, heading.title) for heading in document.headings] == [
        (1, "Big Title"),
        (2, "First part"),
        (2, "Second part"),
    ]
    assert all(document.text[heading.start : heading.end] == heading.title for heading in document.headings)


def test_an_outline_wins_over_sizes(tmp_path: Path) -> None:
    body = [(11.0, "This is an ordinary line of the body of this document, set small.")] * 3
    pages = [PdfPage([(22, "Big Title"), *body]), PdfPage([(11, "Second"), *body])]
    document = read_bytes(tmp_path, make_pdf(pages, bookmarks=[(2, "Second"), (2, "not in the text")]), Kind.PDF)
    assert [heading.title for heading in document.headings] == ["Second"]
    assert document.page_at(document.headings[0].start) == 2


def test_running_heads_and_page_numbers_are_left_out(tmp_path: Path) -> None:
    pages = [
        PdfPage(
            [(9, "Handbook, edition 7"), (11, f"Body of the page with number {number} here."), (9, f"Page {number} of 4")]
        )
        for number in "1234"
    ]
    document = read_bytes(tmp_path, make_pdf(pages), Kind.PDF)
    assert "edition" not in document.text
    assert "of 4" not in document.text
    assert document.text.count("Body") == 4


def test_a_damaged_page_and_a_scan_are_recorded_and_the_rest_is_read(tmp_path: Path) -> None:
    pages = [PdfPage([(11, "First.")]), PdfPage(damaged=True), PdfPage(image=True), PdfPage(), PdfPage([(11, "Fifth.")])]
    document = read_bytes(tmp_path, make_pdf(pages), Kind.PDF)
    assert "First." in document.text
    assert "Fifth." in document.text
    assert document.failed_pages == (2, 3)
    assert [page.number for page in document.pages] == [1, 2, 3, 4, 5]
    assert document.page_at(document.text.index("Fifth")) == 5


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        pytest.param(make_pdf([PdfPage(image=True)]), "DocumentEmpty", "OCR", id="scan"),
        pytest.param(make_pdf([PdfPage()]), "DocumentEmpty", "none of its 1 pages has text", id="blank"),
        pytest.param(make_pdf([PdfPage(damaged=True)]), "DocumentUnreadable", "damaged", id="every page damaged"),
        pytest.param(make_pdf([]), "DocumentUnreadable", "damaged or cut short", id="no pages"),
        pytest.param(b"%PDF-1.7\n%%EOF", "DocumentUnreadable", "damaged or cut short", id="header only"),
        pytest.param(make_pdf([PdfPage([(11, "x")])])[:200], "DocumentUnreadable", "damaged or cut short", id="cut short"),
    ],
)
def test_hopeless_pdfs_say_why(tmp_path: Path, data: bytes, reason: str, message: str) -> None:
    with pytest.raises(ReadingFailed, match=message) as failure:
        read_bytes(tmp_path, data, Kind.PDF)
    assert failure.value.reason == reason


@pytest.mark.parametrize("kind", [Kind.TEXT, Kind.MARKDOWN])
def test_white_space_is_no_document(tmp_path: Path, kind: Kind) -> None:
    with pytest.raises(ReadingFailed, match="no text") as failure:
        read_bytes(tmp_path, b" \n\t\n", kind)
    assert failure.value.reason == "DocumentEmpty"
