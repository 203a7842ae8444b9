"""What is read out of each kind of file: the text itself, pages, headings, character sets."""

import io
from pathlib import Path
from typing import Any

import pytest

from job_runner.document import Kind, ParsedDocument, heading_paths
from job_runner.readers import ReadingFailed, decode, read
from job_runner.readers.numbering import write_number
from tests.support.docx import DOCUMENT_TYPE, STRICT, make_docx, paragraph, part, relationships, table
from tests.support.pdf import PdfPage, make_pdf

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/documents"


def read_bytes(data: bytes, kind: Kind) -> ParsedDocument:
    return read(io.BytesIO(data), kind=kind, name="file")


def read_file(path: Path, kind: Kind) -> ParsedDocument:
    return read_bytes(path.read_bytes(), kind)


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


def test_markdown_headings() -> None:
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
    document = read_bytes(text.encode(), Kind.MARKDOWN)
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


def test_chinese_example() -> None:
    document = read_file(EXAMPLES / "operations-guide.zh.md", Kind.MARKDOWN)
    assert document.headings[0].title == "知识库平台运维手册"
    assert all(document.text[heading.start] == "#" for heading in document.headings)


# ---------------------------------------------------------------------------------------------------------------- text


def test_form_feeds_are_pages() -> None:
    document = read_bytes(b"one\n\ftwo\n\fthree", Kind.TEXT)
    assert [(page.number, page.start) for page in document.pages] == [(1, 0), (2, 5), (3, 10)]
    assert document.page_at(4) == 1
    assert document.page_at(5) == 2


# ----------------------------------------------------------------------------------------------------------------- PDF


def test_english_example() -> None:
    document = read_file(EXAMPLES / "handbook.pdf", Kind.PDF)
    assert [page.number for page in document.pages] == list(range(1, 11))
    assert document.failed_pages == ()
    paths = heading_paths(document.headings)
    assert paths[1] == ("1. What the team does", "1.1 Our task")
    assert "that a document which was accepted is found, that a document which was withdrawn is not found" in document.text


def test_chinese_lines_are_joined_without_spaces() -> None:
    lines = [
        (12.0, "知识库把文档切成片段每个片段都带有页码和标题信"),
        (12.0, "息并且写进两个存储里面供人检索以及回答问题所用"),
        (12.0, "最后一行。"),
    ]
    document = read_bytes(make_pdf([PdfPage(lines)]), Kind.PDF)
    assert document.text == "".join(text for _, text in lines)


def test_headings_by_size_without_an_outline() -> None:
    body = [(11.0, "This is an ordinary line of the body of this document, set small.")] * 6
    pages = [PdfPage([(22, "Big Title"), (16, "First part"), *body, (16, "Second part"), *body])]
    document = read_bytes(make_pdf(pages), Kind.PDF)
    assert [(heading.level, heading.title) for heading in document.headings] == [
        (1, "Big Title"),
        (2, "First part"),
        (2, "Second part"),
    ]
    assert all(document.text[heading.start : heading.end] == heading.title for heading in document.headings)


def test_an_outline_wins_over_sizes() -> None:
    body = [(11.0, "This is an ordinary line of the body of this document, set small.")] * 3
    pages = [PdfPage([(22, "Big Title"), *body]), PdfPage([(11, "Second"), *body])]
    document = read_bytes(make_pdf(pages, bookmarks=[(2, "Second"), (2, "not in the text")]), Kind.PDF)
    assert [heading.title for heading in document.headings] == ["Second"]
    assert document.page_at(document.headings[0].start) == 2


def test_running_heads_and_page_numbers_are_left_out() -> None:
    pages = [
        PdfPage(
            [(9, "Handbook, edition 7"), (11, f"Body of the page with number {number} here."), (9, f"Page {number} of 4")]
        )
        for number in "1234"
    ]
    document = read_bytes(make_pdf(pages), Kind.PDF)
    assert "edition" not in document.text
    assert "of 4" not in document.text
    assert document.text.count("Body") == 4


def test_a_damaged_page_and_a_scan_are_recorded_and_the_rest_is_read() -> None:
    pages = [PdfPage([(11, "First.")]), PdfPage(damaged=True), PdfPage(image=True), PdfPage(), PdfPage([(11, "Fifth.")])]
    document = read_bytes(make_pdf(pages), Kind.PDF)
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
def test_hopeless_pdfs_say_why(data: bytes, reason: str, message: str) -> None:
    with pytest.raises(ReadingFailed, match=message) as failure:
        read_bytes(data, Kind.PDF)
    assert failure.value.reason == reason


@pytest.mark.parametrize("kind", [Kind.TEXT, Kind.MARKDOWN])
def test_white_space_is_no_document(kind: Kind) -> None:
    with pytest.raises(ReadingFailed, match="no text") as failure:
        read_bytes(b" \n\t\n", kind)
    assert failure.value.reason == "DocumentEmpty"


# ---------------------------------------------------------------------------------------------------------------- HTML


def page(body: str, *, head: str = "") -> bytes:
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>".encode()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        pytest.param(page("<p>a  b\nc<p>d &lt;e&gt; caf&eacute;&nbsp;&#x77e5;"), "a b c\n\nd <e> café 知", id="paragraphs"),
        pytest.param(page("a<br>b<br><br>c"), "a\nb\n\nc", id="two line ends are a paragraph"),
        pytest.param(page("<p>知识库\n  把文档</p>"), "知识库把文档", id="line ends in Chinese"),
        pytest.param(page("one <b>t</b>wo&shy;x&#8203;y"), "one twoxy", id="inline elements and invisible characters"),
        pytest.param(page("<pre>\na\n  b\n\n c \n</pre>"), "a\n  b\n\n c", id="pre"),
        pytest.param(
            page("<ul><li>a<li><p>b</p><p>c</p><ol start=3><li>d</ol><li>e</ul><p>f"),
            "- a\n- b\n  c\n  3. d\n- e\n\nf",
            id="lists",
        ),
        pytest.param(page("<dl><dt>a<dd>b<dt>c<dd>d</dl>"), "a\n  b\nc\n  d", id="definitions"),
        pytest.param(
            page("<nav>x</nav><aside>x</aside><p>a<footer>x</footer><script>x</script><noscript>x</noscript>"
                 "<style>x</style><template>x</template><svg><text>x</text></svg><select><option>x</select><p hidden>x"
                 "<p aria-hidden=true>x</p><div role=navigation>x</div><del>x</del><!-- x -->"),
            "a",
            id="what is not seen, or is not of this page",
        ),
        pytest.param(page("<article>a<aside>b</aside><footer>c</footer></article>"), "a\n\nb\n\nc", id="an article's"),
        pytest.param(page("x<main><p>a<aside>b</aside></main>x"), "a\n\nb", id="the main part alone"),
        pytest.param(page("a<main></main>"), "a", id="an empty main part"),
        pytest.param(b"<p>a<div>b</p>c</div></b></table><td>d<i>e", "a\n\nb\n\nc\n\nde", id="malformed"),
        pytest.param(b"<p>a<p title='x>y'>b<!-->c", "a\n\nbc", id="quotes and an odd comment"),
        pytest.param(b"<html><body>" + b"word " * 50 + b"a\0b<", "word " * 50 + "ab<", id="a null and a loose bracket"),
        pytest.param(page("<img src='http://192.0.2.1/x'><link href='http://192.0.2.1/x'>a"), "a", id="nothing is fetched"),
    ],
)  # fmt: skip
def test_html_text(data: bytes, text: str) -> None:
    assert read_bytes(data, Kind.HTML).text == text


@pytest.mark.parametrize(
    ("table", "text"),
    [
        pytest.param(
            "<caption>Sites</caption><thead><tr><th>Site<th>Tanks<tbody><tr><td>North<td>3<tr><td>South<td>",
            "Sites\n\n| Site | Tanks |\n| Site: North | Tanks: 3 |\n| Site: South |",
            id="header",
        ),
        pytest.param(
            "<tr><th rowspan=2>Site<th colspan=2>Period<tr><th>Day<th>Night<tr><td>A<td>1<td>2",
            "| Site | Period |\n| Day | Night |\n| Site: A | Period Day: 1 | Period Night: 2 |",
            id="header of two rows",
        ),
        pytest.param(
            "<tr><th>A<th>B<th>C<tr><td rowspan=2>x<td colspan=2>y<tr><td>1<td>2",
            "| A | B | C |\n| A: x | B / C: y |\n| B: 1 | C: 2 |",
            id="merged cells come once, in their columns",
        ),
        pytest.param(
            "<tr><th colspan=2>Duck<tr><th>Kingdom:<td>Animals<tr><th>Class：<td>Birds",
            "| Duck |\n| Kingdom: Animals |\n| Class: Birds |",
            id="a title above all columns",
        ),
        pytest.param(
            "<tr><td colspan=3>Sites<tr><td>A<td>B<td>C<tr><td>1<td>2<td>3",
            "| Sites |\n| A | B | C |\n| A: 1 | B: 2 | C: 3 |",
            id="a title and a header without a mark",
        ),
        pytest.param("<tr><th>Name<td>Bob<tr><th>Age<td>5", "| Name: Bob |\n| Age: 5 |", id="headers of rows"),
        pytest.param("<tr><td>Name：<td>Bob<tr><td>Age:<td>5", "| Name: Bob |\n| Age: 5 |", id="names by their colons"),
        pytest.param("<tr><td>Name<td>Bob<tr><td>Age<td>old", "| Name | Bob |\n| Age | old |", id="names and values"),
        pytest.param(
            "<tr><td>A<td>B<td>C<tr><td>1<td>2<td>3", "| A | B | C |\n| A: 1 | B: 2 | C: 3 |", id="header without a mark"
        ),
        pytest.param("<tr><td>1<td>2<td>3<tr><td>4<td>5<td>6", "| 1 | 2 | 3 |\n| 4 | 5 | 6 |", id="numbers are no header"),
        pytest.param("<tr><td><h2>a</h2>b<td>c<tr><td>d<td>e", "a\n\nb\n\nc\n\nd\n\ne", id="layout by headings"),
        pytest.param("<tr><td>a<td><table><tr><td>1<td>2<tr><td>3<td>4</table>", "a\n\n| 1 | 2 |\n| 3 | 4 |", id="layout"),
        pytest.param(
            f"<tr><th>{'long ' * 20}<th>B<tr><td>1<td>2", f"| {'long ' * 19}long | B |\n| 1 | B: 2 |", id="prose is no label"
        ),
        pytest.param(
            "<tr><th>A<th>B<tr><td><ul><li>x<li>y</ul><td>z", "| A | B |\n| A: - x - y | B: z |", id="list in a cell"
        ),
        pytest.param("", "", id="nothing"),
    ],
)
def test_html_tables(table: str, text: str) -> None:
    assert read_bytes(page(f"0<table>{table}</table>"), Kind.HTML).text == f"0\n\n{text}".rstrip()


def test_html_headings() -> None:
    data = page("<h1>A <em>big</em><br>one</h1>x<h3>b</h3><ul><li><h2>in a list</h2>y</ul>", head="<title>T</title>")
    document = read_bytes(data, Kind.HTML)
    assert [(one.level, one.title) for one in document.headings] == [(1, "A big one"), (3, "b"), (2, "in a list")]
    assert [document.text[one.start : one.end] for one in document.headings] == ["A big one", "b", "in a list"]
    assert not document.paged


@pytest.mark.parametrize("body", ["<h2>a</h2>b", "b"])
def test_the_title_of_a_page_stands_in_for_a_missing_heading(body: str) -> None:
    document = read_bytes(page(body, head="<title>\n T &amp; U </title>"), Kind.HTML)
    assert heading_paths(document.headings)[0] == ("T & U",)
    assert "T & U" not in document.text


LONG = "知识库把文档切成片段，每个片段都带有页码和标题。"


@pytest.mark.parametrize(
    ("declared", "encoding", "text"),
    [
        pytest.param("<meta charset=gb2312>", "gb18030", "知识库", id="a short text in GBK as it says"),
        pytest.param("<meta charset=gbk>", "gb18030", "联通", id="which is valid UTF-8 as well"),
        pytest.param("<META http-equiv=Content-Type content='text/html; charset=big5'>", "big5", "知識庫", id="Big5"),
        pytest.param("<?xml version='1.0' encoding='Shift_JIS'?>", "shift_jis", "日本", id="XHTML"),
        pytest.param("<meta charset='windows-1251'>", "cp1251", "Привет", id="Cyrillic"),
        pytest.param("<meta charset=iso-8859-1>", "cp1252", "“café”", id="Latin-1 means more"),
        pytest.param("<meta charset=iso-8859-5>", "utf-8", LONG, id="a declaration that was forgotten"),
        pytest.param("<meta charset=utf-8>", "gb18030", LONG * 5, id="a declaration that is wrong"),
        pytest.param("<meta charset=utf-16>", "utf-8", "知识库", id="a declaration that cannot be"),
        pytest.param("<meta charset=unicode_escape>", "utf-8", "C:\\x41", id="no character set of pages"),
        pytest.param("<meta charset=gbk>", "utf-8-sig", "知识库", id="a byte order mark wins"),
        pytest.param("<meta charset=gbk>", "utf-16", "知识库", id="so does that of UTF-16"),
        pytest.param("", "gb18030", LONG * 5, id="none"),
    ],
)
def test_html_charset(declared: str, encoding: str, text: str) -> None:
    data = f"{declared}<title>{text}</title><p>{text}</p>".encode(encoding)
    assert read_bytes(data, Kind.HTML).text == text


# ---------------------------------------------------------------------------------------------------------------- DOCX


def docx_text(body: str, **more: Any) -> str:
    return read_bytes(make_docx(body, **more), Kind.DOCX).text


def run(content: str, *, properties: str = "") -> str:
    return f"<w:r><w:rPr>{properties}</w:rPr>{content}</w:r>"


def words(text: str) -> str:
    return f'<w:t xml:space="preserve">{text}</w:t>'


PAGE_BREAK = "<w:br w:type='page'/>"
DELETED_MARK = "<w:rPr><w:del/></w:rPr>"
SHOWN = "<w:vanish w:val='0'/>"
BOX = f"<w:txbxContent>{paragraph('box')}</w:txbxContent>"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        pytest.param(paragraph("a") + paragraph("") + paragraph("b"), "a\n\nb", id="paragraphs"),
        pytest.param(
            f"<w:p>{run('<w:t> a </w:t><w:tab/><w:t>b</w:t><w:br/><w:t>c</w:t><w:noBreakHyphen/><w:softHyphen/>')}</w:p>",
            "a\tb\nc-",
            id="tabs, line ends, hyphens",
        ),
        pytest.param(
            f"<w:p>{run(words('a '))}<w:ins>{run(words('new'))}</w:ins>"
            f"<w:del>{run('<w:delText>old</w:delText><w:tab/>')}</w:del>"
            f"<w:moveFrom>{run(words('gone'))}</w:moveFrom><w:moveTo>{run(words(' here'))}</w:moveTo></w:p>",
            "a new here",
            id="tracked changes",
        ),
        pytest.param(
            paragraph("first ", properties=DELETED_MARK) + paragraph("second", style="1") + paragraph("third"),
            "first second\n\nthird",
            id="a deleted paragraph mark",
        ),
        pytest.param(paragraph("last", properties=DELETED_MARK), "last", id="the last mark deleted"),
        pytest.param(f"<w:p>{run(words('a'))}{run(words('x'), properties='<w:vanish/>')}</w:p>", "a", id="hidden"),
        pytest.param(
            f"<w:p>{run(words('a'), properties=SHOWN)}"
            "<w:pPr><w:pPrChange><w:pPr><w:pStyle w:val='TOC1'/></w:pPr></w:pPrChange></w:pPr></w:p>",
            "a",
            id="not hidden, former properties",
        ),
        pytest.param(
            f'<w:p><w:hyperlink r:id="x">{run(words("link"))}</w:hyperlink><w:r><w:instrText>PAGE</w:instrText></w:r>'
            f"<w:fldSimple>{run(words(' 7'))}</w:fldSimple></w:p>",
            "link 7",
            id="links and fields",
        ),
        pytest.param(
            f"<w:p>{run(words('a'))}<w:r><mc:AlternateContent><mc:Choice><w:drawing><wps:txbx>{BOX}</wps:txbx></w:drawing>"
            f"</mc:Choice><mc:Fallback><w:pict><v:textbox>{BOX}</v:textbox></w:pict></mc:Fallback></mc:AlternateContent></w:r>"
            f"{run(words(' b'))}</w:p>",
            "a b\n\nbox",
            id="a text box, once",
        ),
        pytest.param(paragraph("1 Scope\t3", style="TOC1") + paragraph("a"), "a", id="table of contents"),
        pytest.param(
            '<w:sdt><w:sdtPr><w:docPartObj><w:docPartGallery w:val="Table of Contents"/></w:docPartObj></w:sdtPr>'
            f"<w:sdtContent>{paragraph('x')}</w:sdtContent></w:sdt><w:sdt><w:sdtPr/><w:sdtContent>{paragraph('a')}"
            f"</w:sdtContent></w:sdt><w:p><w:sdt><w:sdtPr><w:showingPlcHdr/></w:sdtPr><w:sdtContent>{run(words('Click'))}"
            f"</w:sdtContent></w:sdt></w:p>",
            "a",
            id="content controls",
        ),
        pytest.param("<w:p><m:oMath><m:r><m:t>x=1</m:t></m:r></m:oMath></w:p>", "x=1", id="mathematics"),
        pytest.param(
            "<w:p><w:r><w:ruby><w:rt><w:r><w:t>kan</w:t></w:r></w:rt><w:rubyBase><w:r><w:t>漢</w:t></w:r></w:rubyBase>"
            "</w:ruby></w:r></w:p>",
            "漢",
            id="ruby",
        ),
        pytest.param(paragraph("a") + table(["x", "y"]) + paragraph("b"), "a\n\nx\n\ny\n\nb", id="order"),
    ],
)  # fmt: skip
def test_docx_text(body: str, text: str) -> None:
    assert docx_text(body) == text


GRID = '<w:tblStyle w:val="Grid"/>'


@pytest.mark.parametrize(
    ("body", "text"),
    [
        pytest.param(table(["A", "B"], ["1", "2"], properties=GRID), "| A | B |\n| A: 1 | B: 2 |", id="header by style"),
        pytest.param(
            table(["A", "B"], ["1", "2"], properties=GRID + '<w:tblLook w:val="0480"/>'),
            "| A | B |\n| 1 | 2 |",
            id="not used",
        ),
        pytest.param(
            "<w:tbl><w:tr><w:trPr><w:tblHeader/></w:trPr>"
            + "</w:tr><w:tr>".join("".join(f"<w:tc>{paragraph(one)}</w:tc>" for one in row) for row in ("AB", "12"))
            + "</w:tr></w:tbl>",
            "| A | B |\n| A: 1 | B: 2 |",
            id="header by mark",
        ),
        pytest.param(
            table([f"<w:p>{run(words(one), properties='<w:b/>')}</w:p>" for one in "AB"], ["1", "2"]),
            "| A | B |\n| A: 1 | B: 2 |",
            id="header in bold",
        ),
        pytest.param(
            table(
                ["A", "B", "C"],
                ['<w:tcPr><w:gridSpan w:val="2"/></w:tcPr>' + paragraph("wide"), "1"],
                ['<w:tcPr><w:vMerge w:val="restart"/></w:tcPr>' + paragraph("tall"), "2", "3"],
                ["<w:tcPr><w:vMerge/></w:tcPr>" + paragraph("tall"), "4", "5"],
            ),
            "| A | B | C |\n| A / B: wide | C: 1 |\n| A: tall | B: 2 | C: 3 |\n| B: 4 | C: 5 |",
            id="merged cells come once",
        ),
        pytest.param(
            "<w:tbl><w:tr><w:trPr><w:del/></w:trPr><w:tc>" + paragraph("x") + "</w:tc></w:tr></w:tbl>" + paragraph("a"),
            "a",
            id="a deleted row",
        ),
        pytest.param(table([paragraph("in", style="1") + paragraph("a box")]), "in\n\na box", id="a frame of one cell"),
        pytest.param(
            table(["A", "B", "C"], ["1", table(["x", "y"], ["u", "v"]) + paragraph("2"), "3"]),
            "A\n\nB\n\nC\n\n1\n\n| x | y |\n| u | v |\n\n2\n\n3",
            id="a table that places tables",
        ),
    ],
)
def test_docx_tables(body: str, text: str) -> None:
    assert docx_text(body) == text


def test_docx_headings() -> None:
    body = (
        paragraph("手册", style="Title")
        + paragraph("总则", style="1")
        + paragraph("范围", style="2")
        + paragraph("by outline", properties='<w:outlineLvl w:val="2"/>')
        + paragraph("no heading", style="1", properties='<w:outlineLvl w:val="9"/>')
        + paragraph("附则", style="Own")
    )
    document = read_bytes(make_docx(body), Kind.DOCX)
    assert [(one.level, one.title) for one in document.headings] == [
        (1, "手册"),
        (2, "总则"),
        (3, "范围"),
        (4, "by outline"),
        (2, "附则"),
    ]
    assert [document.text[one.start : one.end] for one in document.headings] == [one.title for one in document.headings]


def level(index: int, how: str, text: str, more: str = "") -> str:
    return f'<w:lvl w:ilvl="{index}"><w:start w:val="1"/><w:numFmt w:val="{how}"/><w:lvlText w:val="{text}"/>{more}</w:lvl>'


def number(identity: int, index: int) -> str:
    return f'<w:numPr><w:ilvl w:val="{index}"/><w:numId w:val="{identity}"/></w:numPr>'


NUMBERING = (
    f'<w:abstractNum w:abstractNumId="0">{level(0, "chineseCounting", "第%1章")}{level(1, "decimal", "%1.%2", "<w:isLgl/>")}'
    f'</w:abstractNum><w:abstractNum w:abstractNumId="1">{level(0, "bullet", "·")}{level(1, "lowerRoman", "(%2)")}'
    "</w:abstractNum>"
    '<w:num w:numId="1"><w:abstractNumId w:val="0"/></w:num><w:num w:numId="2"><w:abstractNumId w:val="1"/></w:num>'
    '<w:num w:numId="3"><w:abstractNumId w:val="0"/>'
    '<w:lvlOverride w:ilvl="0"><w:startOverride w:val="7"/></w:lvlOverride></w:num>'
)


def test_docx_numbers_are_part_of_the_text() -> None:
    lines = [("总则", "1", 1, 0), ("范围", "2", 1, 1), ("依据", "2", 1, 1), ("维护", "1", 1, 0), ("巡检", "2", 1, 1)]
    body = "".join(paragraph(text, style=style, properties=number(one, at)) for text, style, one, at in lines)
    body += "".join(
        paragraph(text, properties=number(2, at)) for text, at in (("a", 0), ("b", 1), ("c", 1), ("d", 0), ("e", 1))
    )
    body += paragraph("又一章", properties=number(3, 0)) + paragraph("none", properties=number(0, 0))
    document = read_bytes(make_docx(body, numbering=NUMBERING), Kind.DOCX)
    assert [one.title for one in document.headings] == ["第一章 总则", "1.1 范围", "1.2 依据", "第二章 维护", "2.1 巡检"]
    assert document.text.endswith("- a\n  (i) b\n  (ii) c\n- d\n  (i) e\n第七章 又一章\n\nnone")


@pytest.mark.parametrize(
    ("how", "numbers", "written"),
    [
        (
            "chineseCountingThousand",
            (1, 10, 11, 20, 105, 110, 1002, 10_000),
            "一 十 十一 二十 一百零五 一百一十 一千零二 10000",
        ),
        ("chineseLegalSimplified", (1, 10, 25), "壹 壹拾 贰拾伍"),
        ("upperRoman", (4, 9, 1994), "IV IX MCMXCIV"),
        ("lowerLetter", (1, 26, 27), "a z aa"),
        ("decimalZero", (3, 12), "03 12"),
        ("decimalEnclosedCircleChinese", (1, 20, 21), "① ⑳ 21"),
        ("ideographTraditional", (1, 10, 11), "甲 癸 11"),
        ("never heard of", (3,), "3"),
    ],
)
def test_formats_of_numbers(how: str, numbers: tuple[int, ...], written: str) -> None:
    assert " ".join(write_number(one, how) for one in numbers) == written


def test_docx_notes_follow_their_paragraph_once() -> None:
    reference = '<w:footnoteReference w:id="2"/>'
    body = f"<w:p>{run(words('a') + reference + words(' b') + reference)}</w:p>" + paragraph("c")
    notes = '<w:footnote w:type="separator" w:id="0"><w:p/></w:footnote>'
    notes += (
        f'<w:footnote w:id="2">{paragraph("the note")}</w:footnote><w:footnote w:id="3">{paragraph("unused")}</w:footnote>'
    )
    assert docx_text(body, footnotes=notes) == "a[1] b[1]\n\n[1] the note\n\nc"


def test_docx_pages_are_those_of_the_last_layout() -> None:
    turn = "<w:lastRenderedPageBreak/>"
    row = [f"<w:p>{run(words(one) + turn + words(' runs over'))}</w:p>" for one in ("left", "right")]
    body = (
        paragraph("one")
        + f"<w:p>{run(words('still one '))}{run(turn + words('two'))}</w:p>"
        + f"<w:p>{run(PAGE_BREAK)}</w:p><w:p>{run(turn + words('three'))}</w:p>"
        + table(row, ["after", "it"])
    )
    document = read_bytes(make_docx(body), Kind.DOCX)
    assert document.paged
    places = {word: document.page_at(document.text.index(word)) for word in ("still", "two", "three", "left", "after")}
    assert places == {"still": 1, "two": 2, "three": 3, "left": 3, "after": 4}


def test_docx_without_a_layout_has_no_pages() -> None:
    document = read_bytes(make_docx(f"<w:p>{run(PAGE_BREAK)}</w:p>" + paragraph("a")), Kind.DOCX)
    assert not document.paged


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(make_docx(paragraph("a"), namespace=STRICT), id="strict"),
        pytest.param(
            make_docx(paragraph("a"), content_type="application/vnd.ms-word.document.macroEnabled.main+xml"), id="macros"
        ),
        pytest.param(make_docx(paragraph("a"), parts={"word/media/../../../x": b"x", "/etc/passwd": b"x"}), id="names"),
        pytest.param(
            make_docx(parts={"word/document.xml": None, "WORD\\document.xml": part(f"<w:body>{paragraph('a')}</w:body>")}),
            id="backslashes",
        ),
        pytest.param(
            make_docx(paragraph("a"), parts={
                "word/_rels/document.xml.rels": relationships({"styles": "http://192.0.2.1/s.xml"}, mode="External"),
            }),
            id="a part elsewhere is not fetched",
        ),
        pytest.param(
            make_docx("", parts={
                "_rels/.rels": relationships({"officeDocument": "/doc/Main.XML"}),
                "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
                f'<Override PartName="/doc/main.xml" ContentType="{DOCUMENT_TYPE}"/></Types>',
                "doc/main.xml": part(f"<w:body>{paragraph('a')}</w:body>").replace("UTF-8", "UTF-16").encode("utf-16"),
            }),
            id="another place, UTF-16",
        ),
    ],
)  # fmt: skip
def test_unusual_docx(data: bytes) -> None:
    assert read_bytes(data, Kind.DOCX).text == "a"


@pytest.mark.parametrize(("depth", "text"), [(20, "| 1 | 2 |\n| 3 | 4 |"), (21, "1\n\n2\n\n3\n\n4")])
def test_tables_that_lie_too_deep_give_their_text(depth: int, text: str) -> None:
    markup = "<table><tr><td>1<td>2<tr><td>3<td>4</table>"
    body = table(["1", "2"], ["3", "4"])
    for _ in range(depth - 1):
        markup = f"<table><tr><td>{markup}</table>"
        body = table([body])
    assert read_bytes(page(markup), Kind.HTML).text == text
    assert read_bytes(make_docx(body), Kind.DOCX).text == text
