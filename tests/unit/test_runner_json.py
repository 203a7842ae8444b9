"""JSON and JSON Lines become lines that say where each value stands."""

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job_runner.document import Kind, ParsedDocument
from job_runner.readers import ReadingFailed, read


def document(text: str | bytes, kind: Kind = Kind.JSON) -> ParsedDocument:
    return read(io.BytesIO(text.encode() if isinstance(text, str) else text), kind=kind, name="file")


LONG = "The tide rises and falls twice a day. " * 30


@pytest.mark.parametrize(
    ("value", "text", "headings"),
    [
        pytest.param(
            '{"port": 8080, "ratio": 1.10, "on": true, "note": null}', "port: 8080\nratio: 1.10\non: true", [], id="simple"
        ),
        pytest.param(
            '{"db": {"host": "a", "pool": {"max": 5}}, "name": "x"}',
            "name: x\n\ndb\n\nhost: a\npool.max: 5",
            ["db"],
            id="what is nested stands under its name",
        ),
        pytest.param('{"tags": ["x", "y"], "empty": {}, "none": []}', "tags: x, y", [], id="a short list is a value"),
        pytest.param(
            '{"tanks": [{"id": 1, "at": {"dock": "N"}}, {"id": 2}]}',
            "tanks\n\n| id: 1 | at.dock: N |\n| id: 2 |",
            ["tanks"],
            id="short records are rows",
        ),
        pytest.param('[{"城市": "北京", "人口": 2189}]', "| 城市: 北京 | 人口: 2189 |", [], id="records alone"),
        pytest.param('[["city", "n"], ["Oslo", 1]]', "| city | n |\n| city: Oslo | n: 1 |", [], id="rows with a header"),
        pytest.param(
            json.dumps([{"Title": "Tides", "body": LONG + "\n\nMore."}, {"body": "b", "parts": [{"x": 1}, [2, [3]]]}]),
            f"Tides\n\nTitle: Tides\n\nbody: {LONG}\n\nMore.\n\n"
            "2.\n\nbody: b\nparts[1].x: 1\nparts[2][1]: 2\nparts[2][2]: 3",
            ["Tides", "2."],
            id="long records have headings",
        ),
        pytest.param('[1, "a", null, [1, 2], {"x": 1}]', "- 1\n- a\n- 1, 2\n| x: 1 |", [], id="a list of anything"),
        pytest.param('"alone"', "alone", [], id="a string"),
        pytest.param('{"a.b": 1, "a": {"b": 2}}', "a.b: 1\n\na\n\nb: 2", ["a"], id="names with dots"),
        pytest.param('{"n": 123456789012345678901234567890}', "n: 123456789012345678901234567890", [], id="a long number"),
        pytest.param('{"a": " x\\u0000\\u200by "}', "a: xy", [], id="unseen characters"),
        pytest.param(json.dumps({"a": "x", "image": "iVBORw0KGgo" * 90}), "a: x", [], id="base64"),
        pytest.param('{"a": "知识库"}'.encode("utf-16"), "a: 知识库", [], id="utf-16"),
    ],
)
def test_json(value: str | bytes, text: str, headings: list[str]) -> None:
    found = document(value)
    assert found.text == text
    assert [heading.title for heading in found.headings] == headings
    assert [found.text[heading.start : heading.end] for heading in found.headings] == headings
    assert not found.paged


simple = (
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="ascii", exclude_categories=["C"]), max_size=9)
)
values = st.recursive(
    simple,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc.", max_size=3), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=40)
@given(values)
def test_no_value_is_lost(value: Any) -> None:
    expected = [str(leaf).lower() if isinstance(leaf, bool) else " ".join(str(leaf).split()) for leaf in leaves(value)]
    if any(expected):
        text = " ".join(document(json.dumps(value)).text.split())
        assert all(leaf in text for leaf in expected)


def leaves(value: Any) -> list[Any]:
    match value:
        case dict():
            return [leaf for inner in value.values() for leaf in leaves(inner)]
        case list():
            return [leaf for inner in value for leaf in leaves(inner)]
    return [] if value is None else [value]


def test_a_line_that_is_no_json_is_recorded_and_the_others_are_read() -> None:
    found = document('{"a": 1}\n\nbad\n{"a": 2}\n{"a": 3', Kind.JSONL)
    assert found.text == "| a: 1 |\n| a: 2 |"
    assert found.failed_pages == (3, 5)


def test_lines_of_json_are_read_also_where_they_are_taken_for_json() -> None:
    assert document('{"a": 1}\n{"a": 2}').text == "| a: 1 |\n| a: 2 |"


def test_lines_with_long_records_have_headings() -> None:
    found = document("".join(json.dumps({"name": f"Tide {number}", "text": LONG}) + "\n" for number in range(3)), Kind.JSONL)
    assert [heading.title for heading in found.headings] == ["Tide 0", "Tide 1", "Tide 2"]


@pytest.mark.parametrize(
    ("text", "kind", "reason", "message"),
    [
        pytest.param(
            '{"a":\n]', Kind.JSON, "DocumentUnreadable", "not JSON: Expecting value in line 2, column 1", id="broken"
        ),
        pytest.param(
            "x\ny", Kind.JSONL, "DocumentUnreadable", "none of its lines is JSON: .* in line 1, column 1", id="no line"
        ),
        pytest.param("[" * 100_000, Kind.JSON, "DocumentRefused", "too deep in one another", id="deep"),
        pytest.param('{"a":' * 100_000, Kind.JSONL, "DocumentRefused", "too deep in one another", id="deep line"),
        pytest.param('{"a": [null, {}]}', Kind.JSON, "DocumentEmpty", "there is no text in it", id="empty"),
    ],
)
def test_hopeless_json_says_why(text: str, kind: Kind, reason: str, message: str) -> None:
    with pytest.raises(ReadingFailed, match=message) as failure:
        document(text, kind)
    assert failure.value.reason == reason
