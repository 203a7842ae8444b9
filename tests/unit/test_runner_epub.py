"""What is read out of an EPUB: the documents in reading order, their pages, headings from markup and table of contents."""

import io

import pytest

from job_runner.document import Kind, ParsedDocument
from job_runner.readers import ReadingFailed, read
from tests.support.epub import chapter, make_epub, nav, ncx

ONE = chapter("<h1>第一章 潮汐</h1><p>一段。</p>")
TWO = chapter("<h1>第二章 海流</h1><h2>深处</h2><p>两段。</p>")


def read_book(data: bytes) -> ParsedDocument:
    return read(io.BytesIO(data), kind=Kind.EPUB, name="book.epub")


def headings(document: ParsedDocument) -> list[tuple[int, str]]:
    return [(heading.level, heading.title) for heading in document.headings]


def test_documents_come_in_the_order_of_the_spine_each_a_page() -> None:
    data = make_epub(
        {"b.xhtml": TWO, "a.xhtml": ONE, "c.xhtml": chapter("<img src='x.png'/>")}, spine=["a.xhtml", "b.xhtml"]
    )
    document = read_book(data)
    assert document.text == "第一章 潮汐\n\n一段。\n\n第二章 海流\n\n深处\n\n两段。"
    assert [(page.number, document.text[page.start :][:3]) for page in document.pages] == [(1, "第一章"), (2, "第二章")]
    assert headings(document) == [(1, "第一章 潮汐"), (1, "第二章 海流"), (2, "深处")]
    assert document.paged


def test_a_document_without_text_is_a_page_as_well() -> None:
    empty = chapter("<img src='cover.png'/>")
    document = read_book(make_epub({"0.xhtml": empty, "1.xhtml": ONE, "2.xhtml": empty, "3.xhtml": TWO}))
    assert len(document.pages) == 4
    assert document.page_at(document.text.index("一段")) == 2
    assert document.page_at(document.text.index("两段")) == 4


@pytest.mark.parametrize(
    ("chapters", "tables", "expected"),
    [
        pytest.param(
            {"p.xhtml": chapter("<h1>Part One</h1>"), "a.xhtml": chapter("<h1>Tides</h1><h2>Spring</h2>x")},
            {"nav": nav(("p.xhtml", "Part One", [("a.xhtml#top", "Tides")]))},
            [(1, "Part One"), (2, "Tides"), (3, "Spring")],
            id="levels are those of the table of contents",
        ),
        pytest.param(
            {"a.xhtml": chapter("<p>TIDES</p><p>Water rises.</p>")},
            {"nav": nav(("a.xhtml", "Tides", []))},
            [(1, "TIDES")],
            id="a paragraph with the words of an entry is a heading",
        ),
        pytest.param(
            {"a.xhtml": chapter("<p>Water rises.</p>"), "b.xhtml": chapter("<p>Water falls.</p>")},
            {"ncx": ncx(("a.xhtml", "Flood"), ("b.xhtml", "Ebb"))},
            [(1, "Flood"), (1, "Ebb")],
            id="EPUB 2, and entries whose words the documents lack",
        ),
        pytest.param(
            {"a.xhtml": chapter("<p>Water rises.</p>")},
            {"title": " The  Tides ", "nav": "<not xml", "ncx": "<nor this"},
            [(1, "The Tides")],
            id="the title, and tables of contents that are broken",
        ),
        pytest.param(
            {"text/a%20b.xhtml": chapter("<p>Water rises.</p>")},
            {"nav": nav(("./text/../text/a%20b.xhtml", "Flood", []), ("http://x/text/a%20b.xhtml", "Far", []))},
            [(1, "Flood")],
            id="addresses are resolved, others are not followed",
        ),
    ],
)
def test_headings(chapters: dict[str, str], tables: dict[str, str], expected: list[tuple[int, str]]) -> None:
    data = make_epub(chapters, **tables)  # type: ignore[arg-type]
    assert headings(read_book(data)) == expected


def test_the_table_of_contents_is_not_read_as_text() -> None:
    data = make_epub({"a.xhtml": ONE}, nav=nav(("a.xhtml", "第一章 潮汐", [])), spine=["nav", "a.xhtml"])
    assert read_book(data).text == "第一章 潮汐\n\n一段。"


@pytest.mark.parametrize("tag", ["<title/>", "<script src='a.js'/>", "<title></title><style />", "<a id='x' title='>'/>"])
def test_an_empty_element_of_xml_does_not_swallow_the_rest(tag: str) -> None:
    assert read_book(
        make_epub({"a.xhtml": chapter("<p>one<br/>two</p><a id='p'/><p>three</p>", title=tag)})
    ).text.split() == [
        "one",
        "two",
        "three",
    ]


def test_a_damaged_document_is_a_failed_page_and_the_rest_is_read() -> None:
    document = read_book(make_epub({"a.xhtml": ONE, "lost.xhtml": TWO, "c.xhtml": TWO}, parts={"OEBPS/lost.xhtml": None}))
    assert document.failed_pages == (2,)
    assert document.page_at(document.text.index("第二章")) == 3


ENCRYPTED = (
    '<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container">'
    '<EncryptedData xmlns="http://www.w3.org/2001/04/xmlenc#">'
    '<EncryptionMethod Algorithm="{}"/></EncryptedData></encryption>'
)


def test_obfuscated_fonts_are_no_protection() -> None:
    parts = {"META-INF/encryption.xml": ENCRYPTED.format("http://www.idpf.org/2008/embedding")}
    assert read_book(make_epub({"a.xhtml": ONE}, parts=parts)).text.endswith("一段。")


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        pytest.param(
            make_epub(
                {"a.xhtml": ONE},
                parts={"META-INF/encryption.xml": ENCRYPTED.format("http://www.w3.org/2001/04/xmlenc#aes128-cbc")},
            ),
            "DocumentUnreadable",
            "encrypted (digital rights management); store it without",
            id="rights management",
        ),
        pytest.param(
            make_epub({"a.xhtml": ONE}, parts={"META-INF/encryption.xml": ENCRYPTED[:60]}),
            "DocumentUnreadable",
            "damaged or cut short",
            id="a damaged list of what is encrypted",
        ),
        pytest.param(
            make_epub({"a.xhtml": ONE}, parts={"META-INF/container.xml": None}),
            "DocumentUnreadable",
            "damaged",
            id="container",
        ),
        pytest.param(
            make_epub({"a.xhtml": ONE}, parts={"OEBPS/content.opf": "<package/>"}),
            "DocumentUnreadable",
            "damaged or cut short (oebps/content.opf)",
            id="no spine",
        ),
        pytest.param(
            make_epub({"a.xhtml": ONE}, parts={"OEBPS/content.opf": "<!DOCTYPE p [<!ENTITY a 'b'>]><package>&a;</package>"}),
            "DocumentRefused",
            "its XML declares entities, which no EPUB needs",
            id="entities",
        ),
        pytest.param(
            make_epub({"a.xhtml": ONE}, parts={"OEBPS/a.xhtml": None}),
            "DocumentUnreadable",
            "all 1 documents",
            id="all lost",
        ),
        pytest.param(make_epub({"a.xhtml": chapter("<img/>")}), "DocumentEmpty", "no text in it", id="pictures"),
        pytest.param(
            make_epub({"a.xhtml": chapter(" " * (17 << 20))}), "DocumentRefused", "as zip bombs do; save", id="a bomb"
        ),
    ],
)
def test_refusals(data: bytes, reason: str, message: str) -> None:
    with pytest.raises(ReadingFailed) as failure:
        read_book(data)
    assert (failure.value.reason, message in failure.value.message) == (reason, True), failure.value.message
