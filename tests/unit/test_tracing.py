"""A trace goes from the caller's header through the resource to what the pod reads."""

import json
from datetime import UTC, datetime

import pytest
import structlog

from task_contract.models import ProcessingTask
from task_contract.names import TRACEPARENT_ANNOTATION
from task_contract.tracing import trace_id, trace_of
from task_gateway import tracing
from task_operator.cache import Cache
from task_operator.jobs import task_document
from tests.support.operator_values import manifest

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
GIVEN = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("why", "given", "known"),
    [
        ("as the standard has it", GIVEN, True),
        ("a later version, with more behind", f"01-{TRACE}-00f067aa0ba902b7-01-more", True),
        ("this version has nothing behind", f"{GIVEN}-more", False),
        ("no version", f"ff-{TRACE}-00f067aa0ba902b7-01", False),
        ("no trace", f"00-{'0' * 32}-00f067aa0ba902b7-01", False),
        ("no span", f"00-{TRACE}-{'0' * 16}-01", False),
        ("capitals", GIVEN.upper(), False),
        ("a line of its own in a log", f"{GIVEN}\n", False),
        ("anything", "x" * 300, False),
        ("too long", f"01-{TRACE}-00f067aa0ba902b7-01-{'x' * 300}", False),
        ("none", None, False),
    ],
)
def test_what_is_no_trace_is_as_if_it_were_not_there(why: str, given: str | None, known: bool) -> None:
    assert (trace_id(given) == TRACE) is known, why
    tracing.begin({} if given is None else {"traceparent": given})
    assert tracing.annotations() == ({TRACEPARENT_ANNOTATION: given} if known else {})
    structlog.contextvars.clear_contextvars()


def test_a_task_without_a_trace_has_one_of_its_own() -> None:
    uid = "0d9f8a52-4a51-4b8e-9f43-2f5d0c1e7a10"
    assert trace_of({}, uid=uid) == trace_of({TRACEPARENT_ANNOTATION: "nonsense"}, uid=uid) == uid.replace("-", "")
    assert trace_of({TRACEPARENT_ANNOTATION: GIVEN}, uid=uid) == TRACE


@pytest.mark.parametrize(("given", "kept"), [(GIVEN, {TRACEPARENT_ANNOTATION: GIVEN}), ("nonsense", None)])
def test_of_the_annotations_the_pod_is_told_the_trace_and_no_other(given: str, kept: dict[str, str] | None) -> None:
    made = manifest()
    made["metadata"] |= {
        "resourceVersion": "7",
        "annotations": {TRACEPARENT_ANNOTATION: given, "kubectl.kubernetes.io/last-applied-configuration": "x" * 1000},
    }
    cache = Cache()
    cache.put_task(made)
    cached = cache.task((made["metadata"]["namespace"], made["metadata"]["name"]))
    assert cached is not None
    assert b"last-applied" not in cached.body
    document = json.loads(task_document(ProcessingTask.model_validate(cached.manifest())))
    assert document["metadata"].get("annotations") == kept
    read = ProcessingTask.model_validate(document)
    assert trace_of(read.metadata.annotations, uid="u-1") == (TRACE if kept else "u1")
    assert read.metadata.creation_timestamp is None or read.metadata.creation_timestamp <= datetime.now(UTC)
