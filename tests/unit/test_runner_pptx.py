"""Presentations: slides are pages, titles are headings, and all that the audience sees is text."""

import io

import pytest

from job_runner.document import Kind, ParsedDocument, heading_paths
from job_runner.kinds import kind_of
from job_runner.readers import ReadingFailed, read
from tests.support.pptx import frame, make_pptx, part, related, shape, slide, table


def document(data: bytes) -> ParsedDocument:
    assert kind_of(io.BytesIO(data), name="a") is Kind.PPTX
    return read(io.BytesIO(data), kind=Kind.PPTX, name="file")


def paragraph(properties: str, text: str, *, level: int = 0) -> str:
    return f'<a:p><a:pPr lvl="{level}">{properties}</a:pPr><a:r><a:t>{text}</a:t></a:r></a:p>'


def auto(kind: str, text: str, *, level: int = 0, start: str = "") -> str:
    return paragraph(f'<a:buAutoNum type="{kind}"{start}/>', text, level=level)


def cell(text: str, attributes: str) -> str:
    return f"<a:tc {attributes}><a:txBody><a:p><a:r><a:t>{text}</a:t></a:r></a:p></a:txBody></a:tc>"


FIELDS = (
    '<a:p><a:fld type="slidenum"><a:t>7</a:t></a:fld><a:r><a:t>kept</a:t></a:r>'
    '<a:fld type="datetime1"><a:t>May</a:t></a:fld></a:p>'
)
BULLETS = "<a:p><a:r><a:t>one</a:t></a:r><a:r><a:t>, more</a:t></a:r></a:p>"


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        pytest.param(
            [shape("Body", stands_for=""), shape("Title", stands_for="title")], "Title\n\n- Body", id="the title comes first"
        ),
        pytest.param([shape("Title", "of two lines", stands_for="ctrTitle")], "Title of two lines", id="title"),
        pytest.param([shape("a", stands_for="subTitle"), shape("b", "c")], "a\n\nb\n\nc", id="text without bullets"),
        pytest.param(
            [shape(BULLETS, paragraph("", "two", level=1), paragraph("<a:buNone/>", "plain"), stands_for="body")],
            "- one, more\n  - two\n\nplain",
            id="bullets",
        ),
        pytest.param(
            [shape(paragraph('<a:buChar char="•"/>', "a"), paragraph('<a:buChar char="•"/>', "b"))],
            "- a\n- b",
            id="own bullets",
        ),
        pytest.param(
            [
                shape(
                    auto("arabicPeriod", "a", start=' startAt="3"'),
                    auto("alphaLcParenR", "b", level=1),
                    auto("alphaLcParenR", "c", level=1),
                    auto("arabicPeriod", "d"),
                    auto("romanUcParenBoth", "e", level=1),
                )
            ],
            "3. a\n  a) b\n  b) c\n4. d\n  (I) e",
            id="numbers",
        ),
        pytest.param([shape("<a:p><a:r><a:t>a</a:t></a:r><a:br/><a:r><a:t>b</a:t></a:r></a:p>")], "a\nb", id="line break"),
        pytest.param([shape(FIELDS)], "kept", id="fields"),
        pytest.param([shape("x", stands_for="ftr"), shape("x", stands_for="sldNum"), shape("a")], "a", id="footers"),
        pytest.param([shape("x", hidden=True), shape("a")], "a", id="hidden shape"),
        pytest.param([f"<p:grpSp>{shape('a')}<p:grpSp>{shape('b')}</p:grpSp></p:grpSp>"], "a\n\nb", id="groups"),
        pytest.param(
            [f'<p:grpSp><p:nvGrpSpPr><p:cNvPr id="1" name="g" hidden="1"/></p:nvGrpSpPr>{shape("x")}</p:grpSp>', shape("a")],
            "a",
            id="hidden group",
        ),
        pytest.param(
            [
                f"<mc:AlternateContent><mc:Choice>{shape('a')}</mc:Choice><mc:Fallback>{shape('x')}</mc:Fallback></mc:AlternateContent>"
            ],
            "a",
            id="alternatives",
        ),
        pytest.param([shape("<a:p><m:oMath><m:r><m:t>x+1</m:t></m:r></m:oMath></a:p>")], "x+1", id="formula"),
        pytest.param([table(["City", "n"], ["Oslo", "7"], header=True)], "| City | n |\n| City: Oslo | n: 7 |", id="table"),
        pytest.param(
            [
                table(
                    [cell("Tide", 'gridSpan="2"'), cell("", 'hMerge="1"'), "Wind"],
                    ["low", "high", cell("", 'vMerge="1"')],
                    header=True,
                )
            ],
            "| Tide | Wind |\n| Tide: low | Tide: high |",
            id="merged cells",
        ),
    ],
)
def test_slides(shapes: list[str], text: str) -> None:
    assert document(make_pptx(slide(*shapes))).text == text


def test_slides_are_pages_and_titles_are_headings() -> None:
    found = document(
        make_pptx(
            slide(shape("Tides", stands_for="title"), shape("They rise.", stands_for="")),
            slide(shape("unseen"), hidden=True),
            slide(shape("No title here", "and more")),
            slide(),
            slide(shape("Winds", stands_for="title")),
        )
    )
    assert found.text == "Tides\n\n- They rise.\n\nNo title here\n\nand more\n\nWinds"
    assert [(page.number, found.text[page.start :][:5]) for page in found.pages] == [
        (1, "Tides"),
        (3, "No ti"),
        (4, "Winds"),
        (5, "Winds"),
    ]
    assert [(heading.title, found.text[heading.start : heading.end]) for heading in found.headings] == [
        ("Tides", "Tides"),
        ("No title here", ""),
        ("Winds", "Winds"),
    ]
    assert found.paged


def test_sections_stand_above_titles() -> None:
    listed = [("Sea", (256, 257)), ("Air", (258,))]
    sections = ""
    for name, ids in listed:
        slides_of = "".join(f'<p14:sldId id="{one}"/>' for one in ids)
        sections += f'<p14:section name="{name}"><p14:sldIdLst>{slides_of}</p14:sldIdLst></p14:section>'
    slides = [slide(shape(title, stands_for="title")) for title in ("Tides", "Waves", "Winds")]
    found = document(make_pptx(*slides, presentation=f"<p14:sectionLst>{sections}</p14:sectionLst>"))
    assert heading_paths(found.headings) == [("Sea",), ("Sea", "Tides"), ("Sea", "Waves"), ("Air",), ("Air", "Winds")]


def test_notes_come_last() -> None:
    notes = slide(shape("picture", stands_for="sldImg"), shape("Say this.", "And that.", stands_for="body")).replace(
        "p:sld", "p:notes"
    )
    parts = {
        "ppt/slides/_rels/slide99.xml.rels": related({"n": ("notesSlide", "../notesSlides/notesSlide1.xml")}),
        "ppt/notesSlides/notesSlide1.xml": notes,
        # Notes that name themselves as their notes are read once.
        "ppt/notesSlides/_rels/notesSlide1.xml.rels": related({"n": ("notesSlide", "notesSlide1.xml")}),
    }
    assert document(make_pptx(slide(shape("a", stands_for="")), parts=parts)).text == "- a\n\nSay this.\n\nAnd that."


def points(role: str, *values: str) -> str:
    listed = "".join(f'<c:pt idx="{index}"><c:v>{value}</c:v></c:pt>' for index, value in enumerate(values))
    return f"<c:{role}><c:strRef><c:strCache>{listed}</c:strCache></c:strRef></c:{role}>"


def test_charts_and_diagrams_are_text() -> None:
    series = [points("tx", name) + points("cat", "May", "June") + points("val", *values) for name, values in
              (("Low", ("1", "2")), ("High", ("8", "9")))]  # fmt: skip
    title = "<c:title><c:tx><c:rich><a:p><a:r><a:t>Tides</a:t></a:r></a:p></c:rich></c:tx></c:title>"
    drawn = "".join(f"<c:ser>{one}</c:ser>" for one in series)
    nodes = [("", "Plan"), ("", "Do"), (' type="pres"', "unseen")]
    listed = "".join(
        f"<dgm:pt{kind}><dgm:t><a:p><a:r><a:t>{text}</a:t></a:r></a:p></dgm:t></dgm:pt>" for kind, text in nodes
    )
    parts = {
        "ppt/slides/_rels/slide99.xml.rels": related({
            "c": ("chart", "../charts/chart1.xml"), "d": ("diagramData", "../diagrams/data1.xml"),
            "x": ("chart", "../gone.xml"),
        }),
        "ppt/charts/chart1.xml": part("c:chartSpace", f"<c:chart>{title}<c:plotArea>{drawn}</c:plotArea></c:chart>"),
        "ppt/diagrams/data1.xml": part("dgm:dataModel", f"<dgm:ptLst>{listed}</dgm:ptLst>"),
    }  # fmt: skip
    shapes = [frame('<c:chart r:id="c"/>'), frame('<dgm:relIds r:dm="d"/>'), frame('<c:chart r:id="x"/>')]
    found = document(make_pptx(slide(*shapes), parts=parts))
    assert found.text == "Tides\n\n| May | Low: 1 | High: 8 |\n| June | Low: 2 | High: 9 |\n\n- Plan\n- Do"


def test_a_slide_that_is_damaged_is_recorded_and_the_others_are_read() -> None:
    found = document(make_pptx(slide(shape("a")), "<p:sld", slide(shape("c")), parts={"ppt/slides/slide97.xml": None}))
    assert found.text == "a"
    assert found.failed_pages == (2, 3)
    assert [page.number for page in found.pages] == [1, 2, 3]


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        pytest.param(
            make_pptx("<p:sld"), "DocumentUnreadable", "the PPTX is damaged or cut short", id="no slide that can be read"
        ),
        pytest.param(make_pptx(slide()), "DocumentEmpty", "there is no text on its slides", id="empty"),
        pytest.param(make_pptx(), "DocumentEmpty", "there is no text on its slides", id="no slides"),
        pytest.param(
            make_pptx('<!DOCTYPE p [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + slide(shape("&x;"))),
            "DocumentRefused",
            "its XML declares entities",
            id="external entity",
        ),
        pytest.param(make_pptx(slide(shape(" " * (20 << 20)))), "DocumentRefused", "as zip bombs do", id="bomb"),
    ],
)
def test_hopeless_presentations_say_why(data: bytes, reason: str, message: str) -> None:
    with pytest.raises(ReadingFailed, match=message) as failure:
        document(data)
    assert failure.value.reason == reason
