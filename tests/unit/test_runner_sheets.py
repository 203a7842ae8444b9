"""Workbooks and delimited tables: every row says what its values are, every sheet is a page."""

import io
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job_runner.document import Kind, ParsedDocument
from job_runner.readers import ReadingFailed, grid, read
from job_runner.readers.xls import DamagedXls
from job_runner.readers.xlsx import _text
from job_runner.split import SplitSettings, split
from tests.support.compound import make_compound
from tests.support.workbooks import (
    DATE,
    DURATION,
    MAIN,
    OWN,
    PERCENT,
    RELATIONSHIPS,
    Value,
    cell,
    make_ods,
    make_xls,
    make_xlsx,
    sheet,
)


def document(data: bytes, kind: Kind) -> ParsedDocument:
    return read(io.BytesIO(data), kind=kind, name="file")


def rows(text: str) -> list[dict[int, str]]:
    """Rows of one line each, values parted by commas."""
    lines = text.strip().split("/")
    return [{place: value for place, part in enumerate(line.split(",")) if (value := part.strip())} for line in lines]


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        pytest.param(
            "id,city,n/1,Oslo,5/2,Lima,6",
            ["| id | city | n |", "| id: 1 | city: Oslo | n: 5 |", "| id: 2 | city: Lima | n: 6 |"],
            id="header",
        ),
        pytest.param(
            "城市,人口/北京,2189/上海,2487",
            ["| 城市 | 人口 |", "| 城市: 北京 | 人口: 2189 |", "| 城市: 上海 | 人口: 2487 |"],
            id="words above numbers",
        ),
        pytest.param("a,b,c/x,y,z", ["| a | b | c |", "| a: x | b: y | c: z |"], id="three columns of words"),
        pytest.param(
            "Name,Handbook/Version,3/Owner,Ann",
            ["| Name | Handbook |", "| Version | 3 |", "| Owner | Ann |"],
            id="two columns are names and values",
        ),
        pytest.param(
            "Term,Meaning/Tide," + "rise and fall of the sea " * 4,
            ["| Term | Meaning |", "| Term: Tide | Meaning: " + ("rise and fall of the sea " * 4).strip() + " |"],
            id="words above prose",
        ),
        pytest.param("1,2,3/4,5,6", ["| 1 | 2 | 3 |", "| 4 | 5 | 6 |"], id="numbers alone"),
        pytest.param(
            "Oslo,NO,x/Lima,PE,y/Bergen,NO,z",
            ["| Oslo | NO | x |", "| Lima | PE | y |", "| Bergen | NO | z |"],
            id="a value that comes again below is no title",
        ),
        pytest.param("a,a,b/1,2,3", ["| a | a | b |", "| 1 | 2 | 3 |"], id="titles come once"),
        pytest.param(
            "Area,2023,2024/North,5,6/South,7,8",
            ["| Area | 2023 | 2024 |", "| Area: North | 2023: 5 | 2024: 6 |", "| Area: South | 2023: 7 | 2024: 8 |"],
            id="years above numbers",
        ),
        pytest.param(
            "Who,2023-05-01,n/Ann,2023-05-02,1",
            ["| Who | 2023-05-01 | n |", "| Ann | 2023-05-02 | 1 |"],
            id="dates above dates",
        ),
        pytest.param(
            "Report 2024/ /when,n/2024-01-01,3", ["Report 2024", "| when | n |", "| when: 2024-01-01 | n: 3 |"], id="a title"
        ),
        pytest.param(
            "Report/when,n/2024-01-01,3", ["Report", "| when | n |", "| when: 2024-01-01 | n: 3 |"], id="a title close by"
        ),
        pytest.param(
            "Site,Tide,,Wind,/,low,high,low,high/Oslo,1,2,3,4",
            [
                "| Site | Tide | Wind |",
                "| low | high | low | high |",
                "| Site: Oslo | Tide low: 1 | Tide high: 2 | Wind low: 3 | Wind high: 4 |",
            ],
            id="two rows of titles",
        ),
        pytest.param(
            "a,b,c/x,y,z/ /u,v,w",
            ["| a | b | c |", "| a: x | b: y | c: z |", "| a: u | b: v | c: w |"],
            id="a table goes on below an empty row",
        ),
        pytest.param(
            "a,b,c/x,y,z/ /d,e,f/1,2,3",
            ["| a | b | c |", "| a: x | b: y | c: z |", "| d | e | f |", "| d: 1 | e: 2 | f: 3 |"],
            id="another table below an empty row",
        ),
        pytest.param(
            "a,b,c/x,y,z/ /p,q,r,s/t,u,v,w/t,u,v,w",
            [
                "| a | b | c |",
                "| a: x | b: y | c: z |",
                "| p | q | r | s |",
                "| p: t | q: u | r: v | s: w |",
                "| p: t | q: u | r: v | s: w |",
            ],
            id="a table of other columns",
        ),
        pytest.param(
            "a,b,c/1,2,3/a,b,c/4,5,6",
            ["| a | b | c |", "| a: 1 | b: 2 | c: 3 |", "| a | b | c |", "| a: 4 | b: 5 | c: 6 |"],
            id="a header that comes again",
        ),
        pytest.param(
            "a,b,c/1,,3/,,4/1,2,3,5",
            ["| a | b | c |", "| a: 1 | c: 3 |", "| c: 4 |", "| a: 1 | b: 2 | c: 3 | 5 |"],
            id="ragged",
        ),
        pytest.param("x/y/z", ["x", "y", "z"], id="one column"),
        pytest.param(
            f"{'long ' * 20}.,n/x,1",
            [f"| {('long ' * 20).strip()} . | n |".replace(" .", " ."), f"| {('long ' * 20)[:79]}…: x | n: 1 |"],
            id="a long title is cut",
        ),
    ],
)
def test_rows_carry_their_headers(written: str, lines: list[str]) -> None:
    assert list(grid.lines(rows(written))) == lines


def test_a_header_is_found_however_many_rows_follow() -> None:
    found = list(grid.lines([{0: "n", 1: "word"}, *({0: str(number), 1: "x"} for number in range(200))]))
    assert found[0] == "| n | word |"
    assert all(line.startswith("| n: ") for line in found[1:])
    assert len(found) == 201


def test_a_long_row_is_written_in_parts_that_each_say_what_the_row_is() -> None:
    titles = {0: "Site"} | {column: f"Measure {column}" for column in range(1, 60)}
    found = list(grid.lines([titles, *({0: f"Dock {row}"} | dict.fromkeys(range(1, 60), "7" * 40) for row in range(3))]))
    rows = [line for line in found if line.startswith("| Site: ")]
    assert len(rows) == 3 * 5
    assert all(len(line) <= 850 and line.endswith(" |") for line in rows)
    assert [line.count(f"Measure {column}: ") for column in (1, 30, 59) for line in [" ".join(rows[:5])]] == [1, 1, 1]
    assert list(grid.lines([{0: "x" * 2000, 3: "y"}])) == ["x" * 2000, "y"]


words = st.text(string.ascii_letters + string.digits + " ,;\"'|\t\n库é-:.", max_size=12)


@settings(max_examples=30)
@given(st.lists(st.dictionaries(st.integers(0, 6), words.map(str.strip).filter(bool), max_size=6), max_size=70))
def test_no_value_of_a_row_is_lost_and_no_line_breaks(table: list[dict[int, str]]) -> None:
    sorted_rows = [dict(sorted(row.items())) for row in table]
    found = list(grid.lines(sorted_rows))
    filled = [row for row in sorted_rows if row]
    assert len(found) == len(filled)
    for line, row in zip(found, filled, strict=True):
        assert "\n" not in line
        place = 0
        for value in row.values():
            place = line.index(" ".join(value.split()), place)


# ----------------------------------------------------------------------------------------------------------- delimited

TABLE = "| a | b | c |\n| a: 1 | b: x | c: 3 |\n| a: 4 | b: y | c: 6 |"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        pytest.param(b"a,b,c\n1,x,3\n4,y,6\n", TABLE, id="comma"),
        pytest.param(b"a\tb\tc\r\n1\tx\t3\r\n4\ty\t6", TABLE, id="tab"),
        pytest.param(b"a;b;c\n1;x;3\n4;y;6", TABLE, id="semicolon"),
        pytest.param(b"a|b|c\n1|x|3\n4|y|6", TABLE, id="bar"),
        pytest.param(b"sep=;\na;b;c\n1;x;3\n4;y;6", TABLE, id="declared"),
        pytest.param(
            b"a;b;c\n1;x,y,z;3\n", "| a | b | c |\n| a: 1 | b: x,y,z | c: 3 |", id="semicolon, with commas in values"
        ),
        pytest.param(b"a;b\n1,5;2,5\n", "| a | b |\n| a: 1,5 | b: 2,5 |", id="decimal commas"),
        pytest.param("a,b,c\n1,x,3\n4,y,6\n".encode("utf-16"), TABLE, id="utf-16"),
        pytest.param(
            "城市,人口\n北京,2189\n".encode("gb18030"), "| 城市 | 人口 |\n| 城市: 北京 | 人口: 2189 |", id="gb18030"
        ),
        pytest.param(b'a,b\n1,"say ""hi"",\nand go"\n', '| a | b |\n| a: 1 | b: say "hi", and go |', id="quoted"),
        pytest.param(
            b'a,b\n1,"open\n2,x\n', '| a | b |\n| a: 1 | b: "open |\n| a: 2 | b: x |', id="a quote that nothing closes"
        ),
        pytest.param(
            b"question,answer\nWho?,Ann\n",
            "| question | answer |\n| question: Who? | answer: Ann |",
            id="a header by custom",
        ),
        pytest.param(b"Oslo,Norway\nBergen,Norway\n", "| Oslo | Norway |\n| Bergen | Norway |", id="no header"),
        pytest.param(
            b"a,b,c\n1\n,x\n1,2,3,4\n", "| a | b | c |\n| a: 1 |\n| b: x |\n| a: 1 | b: 2 | c: 3 | 4 |", id="ragged"
        ),
        pytest.param(b"one\ntwo\n", "one\ntwo", id="one column"),
        pytest.param(b"a,b\n" + b"x" * 200_000 + b",1\n", f"| a | b |\n| a: {'x' * 200_000} |\n| b: 1 |", id="a long field"),
    ],
)
def test_delimited_tables(data: bytes, text: str) -> None:
    found = document(data, Kind.CSV)
    assert found.text == text
    assert not found.paged


def test_every_chunk_of_a_table_says_what_its_values_are() -> None:
    data = "Site,Tank,Level\n" + "".join(f"Dock {row % 7},{row},{row * 3 % 100}\n" for row in range(400))
    for found in (document(data.encode(), Kind.CSV), document(make_xlsx({"Levels": sheet(*csv_rows(data))}), Kind.XLSX)):
        chunks = list(split(found, SplitSettings(chunk_size=300, chunk_overlap=50)))
        assert len(chunks) > 20
        for chunk in chunks:
            lines = [line for line in chunk.text.split("\n") if line.startswith("| Site: ")]
            assert lines, chunk.text
            assert all(" | Tank: " in line and " | Level: " in line and line.endswith(" |") for line in lines)
        assert found.kind is Kind.CSV or {chunk.heading_path for chunk in chunks} == {("Levels",)}


def csv_rows(text: str) -> list[list[str]]:
    return [line.split(",") for line in text.splitlines()]


# ----------------------------------------------------------------------------------------------------------- workbooks


def test_sheets_are_pages_with_headings() -> None:
    sheets = {
        "Tides": sheet(["when", "cm"], ["noon", 31]),
        "Notes & more": sheet(["x"]),
        "Old": sheet(["y"]),
        "Empty": sheet(),
    }
    for found in (
        document(make_xlsx(sheets, hidden=["Notes & more"]), Kind.XLSX),
        document(
            make_xls(
                {"Tides": [["when", "cm"], ["noon", 31]], "Notes & more": [["x"]], "Old": [["y"]], "Empty": []},
                hidden=["Notes & more"],
            ),
            Kind.XLS,
        ),
        document(
            make_ods(
                table("Tides", ["when", "cm"], ["noon", "31"])
                + table("Notes &amp; more", ["x"], more=' t:style-name="h"')
                + table("Old", ["y"])
                + table("Empty"),
                styles='<s:style s:name="h"><s:table-properties t:display="false"/></s:style>',
            ),
            Kind.ODS,
        ),
    ):
        assert found.text == "Tides\n\n| when | cm |\n| when: noon | cm: 31 |\n\nOld\n\ny"
        assert [(page.number, page.start) for page in found.pages] == [(1, 0), (3, 46), (4, 52)]
        assert [(heading.title, heading.level, heading.start) for heading in found.headings] == [
            ("Tides", 1, 0),
            ("Old", 1, 46),
        ]
        assert found.paged
        assert found.failed_pages == ()


def table(name: str, *lines: list[str], more: str = "") -> str:
    """A table of an ODS."""
    cells = ["".join(f"<t:table-cell><x:p>{value}</x:p></t:table-cell>" for value in line) for line in lines]
    return f'<t:table t:name="{name}"{more}>{"".join(f"<t:table-row>{line}</t:table-row>" for line in cells)}</t:table>'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param(cell("A2", 3.0), "3", id="whole"),
        pytest.param(cell("A2", -0.1), "-0.1", id="fraction"),
        pytest.param(cell("A2", 0.30000000000000004), "0.3", id="fifteen digits"),
        pytest.param(cell("A2", 123456789012345), "123456789012345", id="long"),
        pytest.param(cell("A2", 1e20), "1e+20", id="longer than a workbook knows"),
        pytest.param(cell("A2", True), "TRUE", id="switch"),
        pytest.param(cell("A2", 45000, style=DATE), "2023-03-15", id="date"),
        pytest.param(cell("A2", 45000.5625, style=DATE), "2023-03-15 13:30", id="date and time"),
        pytest.param(cell("A2", 1.5, style=DURATION), "36:00:00", id="duration"),
        pytest.param(cell("A2", 0.155, style=PERCENT), "15.5%", id="percentage"),
        pytest.param(cell("A2", " a\n b "), "a b", id="line break"),
        pytest.param(cell("A2", "a\u00ad\u200bb"), "ab", id="unseen"),
        pytest.param('<c r="A2" t="e"><v>#DIV/0!</v></c>', "", id="error"),
        pytest.param('<c r="A2"><f>1+1</f><v>2</v></c>', "2", id="formula"),
    ],
)
def test_values_are_as_a_person_reads_them(value: str, text: str) -> None:
    found = document(make_xlsx({"S": sheet(["x"], more=f'<row r="2">{value}</row>')}), Kind.XLSX)
    assert found.text == f"S\n\nx\n{text}".rstrip()


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("General", "12345.5"),
        ("#,##0.00", "12345.5"),
        ('#,##0.00 "€"', "12345.5 €"),
        ('_("$"* #,##0.00_);_("$"* (#,##0.00)', "$12345.5"),
        ("[$€-407] #,##0", "€ 12345.5"),
        ("¥#,##0;[Red]-¥#,##0", "¥12345.5"),
        ('0.0\\ "km"', "12345.5 km"),
        ('0"年"', "12345.5年"),
        ("0.0%", "1234550%"),
        ('0.0,"k"', "12.3455k"),
        ('[>1000]0.0,"k";0', "12345.5"),
        ("000-0000", "12345.5"),
        ("0.00E+00", "12345.5"),
        ("# ?/?", "12345.5"),
        ('"total"', "12345.5"),
        ("@", "12345.5"),
    ],
)
def test_numbers_keep_their_units(code: str, text: str) -> None:
    body = sheet(["x", "y"], more=f'<row r="2">{cell("A2", 1)}{cell("B2", 12345.5, style=OWN)}</row>')
    assert document(make_xlsx({"S": body}, own_format=code), Kind.XLSX).text == f"S\n\n| x | y |\n| x: 1 | y: {text} |"


def test_units_of_many_rows_belong_to_their_own_rows() -> None:
    cells = ((cell(f"A{row}", row), cell(f"B{row}", row, style=OWN if row % 3 else 0)) for row in range(2, 5000))
    more = "".join(f'<row r="{row}">{first}{second}</row>' for row, (first, second) in enumerate(cells, start=2))
    found = document(make_xlsx({"S": sheet(["n", "m"], more=more)}, own_format='0" cm"'), Kind.XLSX).text.split("\n")[3:]
    assert found == [f"| n: {row} | m: {row}{' cm' if row % 3 else ''} |" for row in range(2, 5000)]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        pytest.param(
            '<t:table-cell o:value="0.155"><x:p>15.5 <x:span>%</x:span></x:p></t:table-cell>', "15.5 %", id="as shown"
        ),
        pytest.param('<t:table-cell o:date-value="2024-05-31"/>', "2024-05-31", id="nothing shown"),
        pytest.param(
            "<t:table-cell><x:p>a</x:p><x:p>b<x:s/>c<x:line-break/>d</x:p></t:table-cell>", "a b c d", id="paragraphs"
        ),
        pytest.param(
            "<t:table-cell><o:annotation><x:p>no</x:p></o:annotation><x:p>a</x:p></t:table-cell>", "a", id="comment"
        ),
        pytest.param("<t:table-cell><x:p>a</x:p><d:frame><x:p>no</x:p></d:frame></t:table-cell>", "a", id="drawing"),
        pytest.param(
            '<t:table-cell t:number-columns-repeated="3"><x:p>a</x:p></t:table-cell>', "| a | a | a |", id="repeated"
        ),
        pytest.param(
            "<t:covered-table-cell><x:p>no</x:p></t:covered-table-cell><t:table-cell><x:p>a</x:p></t:table-cell>",
            "a",
            id="covered",
        ),
        pytest.param(
            "<t:table-cell><t:table><t:table-row><t:table-cell><x:p>no</x:p></t:table-cell></t:table-row></t:table>"
            "<x:p>a</x:p></t:table-cell>",
            "a",
            id="a table in a cell",
        ),
    ],
)
def test_cells_of_ods(body: str, text: str) -> None:
    found = document(make_ods(f'<t:table t:name="S"><t:table-row>{body}</t:table-row></t:table>'), Kind.ODS)
    assert found.text == f"S\n\n{text}"


def test_a_cell_over_several_rows_is_said_in_each() -> None:
    merged: list[list[Value]] = [["site", "tank", "cm"], ["Dock", 1, 31], [None, 2, 28], [None, None, None], [None, 3, 5]]
    found = document(make_xlsx({"S": sheet(*merged, merged=["A2:A4", "B1:C1"])}), Kind.XLSX)
    first, second = "| site: Dock | tank: 1 | cm: 31 |", "| site: Dock | tank: 2 | cm: 28 |"
    assert found.text == f"S\n\n| site | tank | cm |\n{first}\n{second}\n| tank: 3 | cm: 5 |"
    spanned = '<t:table-cell t:number-rows-spanned="2"><x:p>Dock</x:p></t:table-cell>'
    body = f"<t:table-row>{spanned}<t:table-cell><x:p>1</x:p></t:table-cell></t:table-row>"
    body += "<t:table-row><t:covered-table-cell/><t:table-cell><x:p>2</x:p></t:table-cell></t:table-row>"
    assert document(make_ods(f'<t:table t:name="S">{body}</t:table>'), Kind.ODS).text == "S\n\n| Dock | 1 |\n| Dock | 2 |"


FAR = '<row r="1048576">' + cell("XFD1048576", 7) + "</row>"


@pytest.mark.parametrize(
    ("broken", "parts"),
    [
        pytest.param("<worksheet><sheetData><row", None, id="damaged"),
        pytest.param(sheet(["a"]), {"xl/worksheets/sheet2.xml": None}, id="absent"),
    ],
)
def test_a_sheet_that_fails_is_recorded_and_the_others_are_read(
    broken: str, parts: dict[str, str | bytes | None] | None
) -> None:
    sheets = {"One": sheet(["1"]), "Bad": broken, "Three": sheet(["3"])}
    found = document(make_xlsx(sheets, parts=parts), Kind.XLSX)
    assert found.text == "One\n\n1\n\nThree\n\n3"
    assert found.failed_pages == (2,)
    assert [page.number for page in found.pages] == [1, 2, 3]
    with pytest.raises(ReadingFailed, match="none of its sheets can be read") as failure:
        document(make_xlsx({"Bad": "<worksheet><sheetData><row"}), Kind.XLSX)
    assert failure.value.reason == "DocumentUnreadable"


def test_a_sheet_that_was_not_checked_is_not_read() -> None:
    listed = f'<x:sheet xmlns:x="urn:x" xmlns:r="{RELATIONSHIPS}" name="Far" sheetId="9" r:id="s1"/>'
    parts = {"xl/workbook.xml": f'<workbook xmlns="{MAIN}"><sheets>{listed}</sheets></workbook>'}
    with pytest.raises(ReadingFailed, match="'Far': the XLSX does not list it as a sheet"):
        document(make_xlsx({"Far": sheet(["a"], more=FAR)}, parts=parts), Kind.XLSX)


def test_a_damaged_sheet_of_an_xls_is_recorded_and_the_others_are_read() -> None:
    values: dict[str, list[list[Value]]] = {
        "A": [["name", "at", "n"], ["x", "Bern", 1.5]],
        "B": [["b"], ["c"]],
        "C": [["d", "e"], [2.0, "f"]],
    }
    data = make_xls(values, hidden=[])
    begins = [found.start() for found in re.finditer(rb"\x09\x08\x10\0", data)]
    first, damaged, after = begins[1:]
    whole = document(data, Kind.XLS)
    found = document(data[: damaged + 20] + b"\xff" * (after - damaged - 20) + data[after:], Kind.XLS)
    assert (whole.failed_pages, found.failed_pages) == ((), (2,))
    assert found.text == whole.text.replace("B\n\nb\nc\n\n", "")
    none = data[: first + 20] + b"\xff" * (len(data) - first - 20)
    with pytest.raises(ReadingFailed, match="the workbook is damaged") as caught:
        document(none, Kind.XLS)
    assert caught.value.reason == "DocumentUnreadable"


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (45_443.0, 3, "2024-05-31"),
        (45_443.5, 3, "2024-05-31 12:00"),
        (0.25, 3, "06:00"),
        (-1.0, 3, "-1"),
        (1, 4, "TRUE"),
        (42, 5, "#N/A"),
        (7.0, 2, "7"),
        ("a", 1, "a"),
    ],
)
def test_cells_read_by_xlrd_are_those_that_calamine_gives(value: object, kind: int, text: str) -> None:
    found = DamagedXls(io.BytesIO(make_xls({"A": [["a"]]})))._value(kind, value)
    assert _text(found) == text


def test_a_cell_far_away_costs_nothing() -> None:
    found = document(make_xlsx({"S": sheet(["a", "b"], [1, 2], more=FAR)}), Kind.XLSX)
    assert found.text == "S\n\n| a | b |\n| a: 1 | b: 2 |\n7"
    rest = '<t:table-row t:number-rows-repeated="1048570"><t:table-cell t:number-columns-repeated="16384"/></t:table-row>'
    last = '<t:table-cell t:number-columns-repeated="16383"/><t:table-cell><x:p>7</x:p></t:table-cell>'
    assert (
        document(
            make_ods(table("S", ["a"]).replace("</t:table>", f"{rest}<t:table-row>{last}</t:table-row></t:table>")), Kind.ODS
        ).text
        == "S\n\na\n7"
    )


XXE = '<!DOCTYPE w [<!ENTITY x SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize(
    ("data", "kind", "reason", "message"),
    [
        pytest.param(
            make_xlsx({"S": XXE + sheet(["a"])}), Kind.XLSX, "DocumentRefused", "declares entities", id="entities in a sheet"
        ),
        pytest.param(
            make_xlsx({"S": sheet(["a"])}, parts={"xl/styles.xml": XXE + "<styleSheet/>"}),
            Kind.XLSX,
            "DocumentRefused",
            "declares entities",
            id="entities in styles",
        ),
        pytest.param(
            make_xlsx({"S": sheet(["a"], more=" " * (20 << 20))}), Kind.XLSX, "DocumentRefused", "as zip bombs do", id="bomb"
        ),
        pytest.param(
            make_xlsx({"S": sheet(["a"])}, parts={"xl/workbook.xml": "<x"}),
            Kind.XLSX,
            "DocumentUnreadable",
            "the XLSX is damaged",
            id="no workbook",
        ),
        pytest.param(
            make_xlsx({"S": sheet(["a"])}, main_type="text/plain"),
            Kind.XLSX,
            "DocumentRefused",
            "of the type 'text/plain'",
            id="another type",
        ),
        pytest.param(
            make_ods("").replace(b"PK\1\2\x14", b"PK\1\2\x15")[:-40],
            Kind.ODS,
            "DocumentUnreadable",
            "the ODS is damaged",
            id="cut ods",
        ),
        pytest.param(
            make_ods(table("S", ["a"]), manifest="<m:encryption-data/>"),
            Kind.ODS,
            "DocumentUnreadable",
            "with a password",
            id="password",
        ),
        pytest.param(
            make_compound({"Workbook": b"\x09\x08\xff\xff" * 9}),
            Kind.XLS,
            "DocumentUnreadable",
            "the workbook is damaged",
            id="xls",
        ),
        pytest.param(
            make_xls({"S": [["a"]]}, password=True),
            Kind.XLS,
            "DocumentUnreadable",
            "with a password",
            id="xls with a password",
        ),
        pytest.param(make_xlsx({"S": sheet()}), Kind.XLSX, "DocumentEmpty", "there is no text in it", id="empty"),
        pytest.param(
            make_xlsx({"S": sheet(["a"]), "T": sheet()}, hidden=["S"]),
            Kind.XLSX,
            "DocumentEmpty",
            "there is no text in it",
            id="hidden",
        ),
        pytest.param(b" \n,,\n", Kind.CSV, "DocumentEmpty", "there is no text in it", id="empty csv"),
    ],
)
def test_hopeless_tables_say_why(data: bytes, kind: Kind, reason: str, message: str) -> None:
    with pytest.raises(ReadingFailed, match=message) as failure:
        document(data, kind)
    assert failure.value.reason == reason
