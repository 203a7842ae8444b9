"""Spans of tasks that have ended: what they say, and whose they are."""

import uuid
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from task_operator.settings import headers_of
from task_operator.spans import Sampler, span_id, spans_of, traceparent_of
from tests.support.operator_values import at

UID = "11111111-2222-3333-4444-555555555555"
GIVEN = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
UNSAMPLED = GIVEN[:-2] + "00"


def row(**changes: Any) -> dict[str, Any]:
    return {
        "uid": UID,
        "namespace": "team-a",
        "name": "handbook",
        "kb_id": "kb-1",
        "type": "document_processing",
        "priority": "normal",
        "phase": "Completed",
        "reason": "Completed",
        "message": None,
        "attempt": 1,
        "created_at": at(0),
        "started_at": at(5),
        "ended_at": at(60),
        "traceparent": GIVEN,
    } | changes


def attempt(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "task_uid": UID,
        "number": number,
        "job": f"handbook-{number}",
        "started_at": at(5),
        "finished_at": at(50),
        "reason": "Succeeded",
        "error": None,
    } | changes


def values(span: dict[str, Any]) -> dict[str, Any]:
    return {one["key"]: next(iter(one["value"].values())) for one in span["attributes"]}


def test_a_task_is_a_span_below_its_callers_and_attempts_are_spans_below_it() -> None:
    lost = attempt(1, reason="OutOfMemory", error='{"message": "needs more"}')
    task, first, second = spans_of(row(attempt=2), [lost, attempt(2)], {2: {"cpu_seconds": 1.5, "tokens": 7}})
    assert {one["traceId"] for one in (task, first, second)} == {"4bf92f3577b34da6a3ce929d0e0e4736"}
    assert (task["name"], task["spanId"]) == ("task document_processing", span_id(UID))
    assert task["parentSpanId"] == "00f067aa0ba902b7"
    assert [one["parentSpanId"] for one in (first, second)] == [span_id(UID)] * 2
    assert len({one["spanId"] for one in (task, first, second)}) == 3
    assert first["status"] == {"code": 2, "message": "needs more"}
    assert (task["status"], second["status"]) == ({"code": 1}, {"code": 1})
    assert values(task)["task.kb_id"] == "kb-1"
    assert {"process.cpu.seconds": 1.5, "embedding.tokens": "7"}.items() <= values(second).items()
    assert "process.cpu.seconds" not in values(first)
    taken = int(task["endTimeUnixNano"]) - int(task["startTimeUnixNano"])
    assert taken == timedelta(seconds=60) // timedelta(microseconds=1) * 1000


def test_a_failed_task_says_why_and_one_without_a_caller_has_a_trace_of_its_own() -> None:
    [task] = spans_of(row(phase="Failed", reason="Timeout", message="took too long", traceparent=None), [], {})
    assert task["status"] == {"code": 2, "message": "took too long"}
    assert task["traceId"] == UID.replace("-", "")
    assert "parentSpanId" not in task


def test_clocks_that_differ_make_no_span_that_ends_before_it_begins() -> None:
    _, one = spans_of(row(), [attempt(1, started_at=at(50), finished_at=at(49))], {})
    assert one["startTimeUnixNano"] == one["endTimeUnixNano"]


@pytest.mark.parametrize(
    ("why", "given", "sampler", "expected"),
    [
        ("nobody traces", None, None, None),
        ("handed on where no spans are sent", GIVEN, None, GIVEN),
        ("no traceparent", "00-zz", None, None),
        ("below the task's span", GIVEN, Sampler(), f"00-{GIVEN[3:35]}-{span_id(UID)}-01"),
        ("the caller does not sample", UNSAMPLED, Sampler(), f"00-{GIVEN[3:35]}-{span_id(UID)}-00"),
        ("a trace of its own", None, Sampler(), f"00-{UID.replace('-', '')}-{span_id(UID)}-01"),
        ("not among those that are sampled", None, Sampler(0), None),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_what_a_callback_is_told_of_its_trace(
    why: str, given: str | None, sampler: Sampler | None, expected: str | None
) -> None:
    assert traceparent_of(given, uid=UID, sampler=sampler) == expected


@given(st.lists(st.uuids(version=4), min_size=400, max_size=400, unique=True))
def test_a_part_of_the_tasks_is_sampled_and_always_the_same(uids: list[uuid.UUID]) -> None:
    wanted = [Sampler(0.5).wants(None, uid=str(uid)) for uid in uids]
    assert wanted == [Sampler(0.5).wants(None, uid=str(uid)) for uid in uids]
    assert 100 < sum(wanted) < 300


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("a=b", {"a": "b"}),
        ("authorization=Bearer%20x%3D, api-key=1", {"authorization": "Bearer x=", "api-key": "1"}),
    ],
)
def test_headers_are_written_as_opentelemetry_does(text: str, expected: dict[str, str]) -> None:
    assert headers_of(text) == expected


@pytest.mark.parametrize("text", ["a", "=b", "a b=c", "a=%0A"])
def test_headers_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="name=value"):
        headers_of(text)
