"""What goes in and out of the gateway over REST: requests, views, cursors, problems, and the document of all that."""

import base64
import contextlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID

import jsonschema
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from task_contract.messages import ProgressEvent
from task_contract.models import Phase, Priority, Spec, Stage, TaskType
from task_gateway.batches import Batches
from task_gateway.database import TaskFilter, page_statement
from task_gateway.logs import Logs
from task_gateway.models import (
    Around,
    Cursor,
    ListQuery,
    accepted,
    event_view,
    live_view,
    manifest_of,
    name_of,
    parse_task,
    stored_view,
)
from task_gateway.openapi import document as openapi_document
from task_gateway.probes import Probes
from task_gateway.problems import TITLES, FieldError, Problem, is_namespace, is_task_name, of_cluster
from task_gateway.routes import Part, Route, query_parameters
from task_gateway.settings import Settings
from task_gateway.tasks import Tasks
from task_gateway.tickets import Tickets
from task_operator.projection import _COLUMNS as COLUMNS
from task_operator.projection import _values as row_values
from task_platform.kubernetes import ClusterError, Conflict, Forbidden, Invalid, NotFound, Unavailable
from task_platform.settings import SettingsError, load_settings
from tests.support.gateway_lab import document
from tests.support.operator_values import finished, manifest, processing

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/gateway.md").read_text(encoding="utf-8")


def routes() -> list[Route]:
    """Return the operations of all parts; none of them is called."""
    nothing: Any = None
    tasks = Tasks(cluster=nothing, database=nothing, callers=nothing, metrics=nothing, settings=nothing)
    parts: Sequence[Part] = (
        tasks,
        Batches(tasks=tasks, callers=nothing, charge=nothing, settings=nothing),
        Logs(tasks=tasks, cluster=nothing, database=nothing),
        Tickets(nothing),
        Probes(checks={}, vital="", metrics=nothing, ready=lambda: True),
    )
    return [route for part in parts for route in part.routes()]


DOCUMENT = openapi_document(routes())
SCHEMAS = DOCUMENT["components"]["schemas"]


@cache
def validator(model: str) -> jsonschema.Draft202012Validator:
    """Return what checks JSON against a component of the document."""
    return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{model}", "components": DOCUMENT["components"]})


def check(value: Any, model: str) -> None:
    """Check JSON against a component of the document."""
    validator(model).validate(value)


# ------------------------------------------------------------------------------------------------------------- requests


def test_a_request_becomes_the_spec_that_it_names() -> None:
    body = document(
        retry={"limit": 1, "initial_delay": "5s"},
        stall_timeout="90s",
        ttl_seconds_after_finished=60,
        labels={"team": "manuals", "example.com/kind": "a.b_c"},
        payload={"file_path": "/data/a.pdf", "metadata": {"signedBy": "Ada"}},
        namespace="knowledge",
        idempotency_key="upload-7",
    )
    wanted = parse_task(body)
    assert wanted.spec == {
        "type": "document_processing",
        "kbId": "kb-42",
        "priority": "high",
        "payload": {"filePath": "/data/a.pdf", "metadata": {"signedBy": "Ada"}},
        "retry": {"limit": 1, "initialDelay": "5s"},
        "stallTimeout": "1m30s",
        "ttlSecondsAfterFinished": 60,
    }
    assert (wanted.namespace, wanted.idempotency_key) == ("knowledge", "upload-7")
    made = manifest_of(wanted, name="n", namespace="knowledge", caller="ada", labels={})
    assert made["metadata"]["labels"] == {"team": "manuals", "example.com/kind": "a.b_c"}
    assert made["metadata"]["annotations"] == {
        "tasks.zzdsj.io/request-hash": wanted.hash,
        "tasks.zzdsj.io/created-by": "ada",
    }


def test_labels_of_the_installation_are_given_where_the_request_has_no_others() -> None:
    wanted = parse_task(document(labels={"team": "b", "kind": "x"}))
    made = manifest_of(wanted, name="n", namespace="knowledge", caller="", labels={"team": "a", "tier": "y"})
    assert made["metadata"]["labels"] == {"team": "b", "kind": "x", "tier": "y"}


def test_every_field_of_the_spec_can_be_asked_for_but_cancel() -> None:
    fields = {"task_type" if name == "type" else name for name in Spec.model_fields} - {"cancel"}
    assert set(SCHEMAS["TaskRequest"]["properties"]) == fields | set(Around.model_fields)


SAME = [
    (document(timeout="60s"), document(timeout="1m")),
    (document(labels={"a": "1", "b": "2"}), document(labels={"b": "2", "a": "1"})),
    (document(namespace="a", idempotency_key="k"), document(namespace="b")),
    (document(resource_class=None), document()),
]
OTHER = [document(priority="low"), document(labels={"a": "1"}), document(kb_id="kb-43"), document(timeout="61s")]


def test_requests_that_say_the_same_have_the_same_hash_and_others_not() -> None:
    for one, other in SAME:
        assert parse_task(one).hash == parse_task(other).hash
    assert len({parse_task(body).hash for body in (document(), *OTHER)}) == 1 + len(OTHER)


def test_a_key_gives_one_name_to_one_caller_in_one_namespace() -> None:
    asked = [("a", "ada", "k"), ("b", "ada", "k"), ("a", "bob", "k"), ("a", "ada", "l"), ("a", "ad", "ak")]
    names = [name_of(namespace=namespace, caller=caller, key=key) for namespace, caller, key in asked]
    assert len(set(names)) == len(names)
    assert all(is_task_name(name) for name in names)
    assert name_of(namespace="a", caller="ada", key="k") == names[0]


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (document(type="document_processing"), ["type"]),
        (document(taskType="health_check"), ["taskType"]),
        (document(kb_id="-"), ["kb_id"]),
        (document(callback={"url": "ftp://x"}), ["callback.url"]),
        (document(callback={"url": "https://x", "secretRef": {"name": "a", "key": "b"}}), ["callback.secretRef"]),
        (document(retry={"limit": 21, "initial_delay": "1 h"}), ["retry.limit", "retry.initial_delay"]),
        (document(labels={"tasks.zzdsj.io/x": "y"}), ["labels.tasks.zzdsj.io/x"]),
        (document(labels={"a": "-"}), ["labels.a"]),
        (document(namespace="a/b"), ["namespace"]),
        (document(payload=[]), ["payload"]),
    ],
)
def test_a_bad_field_is_named_as_the_caller_has_it(body: Any, fields: list[str]) -> None:
    with pytest.raises(Problem) as refusal:
        parse_task(body)
    assert (refusal.value.status, refusal.value.kind) == (422, "invalid-task")
    assert [one.field for one in refusal.value.errors] == fields


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=20,
)
KEYS = [*sorted(SCHEMAS["TaskRequest"]["properties"]), "type", "cancel", "kbId", "\udfff", ""]


@given(json_values | st.dictionaries(st.sampled_from(KEYS), json_values) | st.builds(document, payload=json_values))
def test_whatever_is_sent_is_a_task_or_a_problem(body: Any) -> None:
    try:
        wanted = parse_task(body)
    except Problem as problem:
        check(problem.body(instance="/x", request_id="1"), "ProblemBody")
    else:
        assert wanted.spec["type"] in set(TaskType)


# ---------------------------------------------------------------------------------------------------------------- views

UID = manifest()["metadata"]["uid"]


def event(*, attempt: int = 1, uid: str = UID) -> ProgressEvent:
    at = datetime(2026, 1, 31, tzinfo=UTC)
    return ProgressEvent(uid=uid, namespace="n", name="x", attempt=attempt, stage=Stage.STORE, progress=85, at=at)


@pytest.mark.parametrize(
    ("status", "latest", "expected"),
    [
        (processing(stage="embed", progress=62), None, ("embed", 62)),
        (processing(stage="embed", progress=62), event(), ("store", 85)),
        (processing(stage="embed", progress=62), event(attempt=2), ("embed", 62)),
        (processing(stage="embed", progress=62), event(uid="0d9f8a52-0000-4c7e-9d53-0d5a0a4bd1a7"), ("embed", 62)),
        (finished(), event(), (None, 100)),
        (None, event(), (None, 0)),
    ],
    ids=["none", "newer", "of another attempt", "of another task", "after the end", "before the start"],
)
def test_live_progress_is_merged_in_while_its_attempt_runs(status: Any, latest: Any, expected: Any) -> None:
    view = live_view(manifest(status=status) if status else manifest(), latest)
    assert (view["stage"], view["progress"]) == expected
    check(view, "TaskView")


@pytest.mark.parametrize(
    "status", [None, processing(stage="embed", progress=62), finished(result={"chunks": 87}), finished("Failed")]
)
def test_a_stored_task_looks_as_the_live_one(status: Any) -> None:
    """The row is what the operator projects of the same manifest."""
    task = manifest(status=status) if status else manifest()
    task["metadata"]["resourceVersion"] = "7"
    row = dict(zip((name for name, _ in COLUMNS), row_values(task, deleted_at=None, now=datetime.now(UTC)), strict=True))
    live, stored = live_view(task), stored_view(row)
    check(stored, "TaskView")
    differs = {key for key in live if live[key] != stored[key]}
    assert differs <= {"labels", "callback"}


def test_answers_fit_the_document() -> None:
    check(accepted(manifest()), "Accepted")
    row = {
        "number": 7,
        "task_uid": UUID(UID),
        "namespace": "knowledge",
        "name": "handbook",
        "kb_id": None,
        "type": "health_check",
        "phase": "Deleted",
        "attempt": 1,
        "reason": "Deleted",
        "message": None,
        "at": datetime(2026, 1, 31, tzinfo=UTC),
    }
    view = event_view(row)
    check(view, "TaskEvent")
    assert (view["event"], view["status"], view["at"]) == (7, "canceled", "2026-01-31T00:00:00Z")


# ---------------------------------------------------------------------------------------------------------------- pages


@given(st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2999, 1, 1)), st.uuids())  # noqa: DTZ001 - given UTC
@example(datetime(2515, 1, 1, 0, 0, 0, 999_999), UUID(int=1))  # noqa: DTZ001 - a float of its seconds rounds up
def test_a_cursor_is_read_as_it_was_written(at: datetime, uid: UUID) -> None:
    cursor = Cursor(created_at=at.replace(tzinfo=UTC), uid=uid)
    text = cursor.text()
    assert Cursor.parse(text) == cursor
    assert re.fullmatch(r"[A-Za-z0-9_-]{32}", text)


@given(st.text(max_size=64) | st.binary(max_size=40).map(lambda data: base64.urlsafe_b64encode(data).decode().rstrip("=")))
def test_any_text_is_a_cursor_or_none(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert Cursor.parse(text).uid.int >= 0


def test_a_page_asks_for_what_the_filters_say_and_values_never_stand_in_the_statement() -> None:
    at = datetime(2026, 1, 31, tzinfo=UTC)
    wanted = TaskFilter(
        kb_id="' OR true --",
        task_type=TaskType.HEALTH_CHECK,
        phase=Phase.FAILED,
        priority=Priority.LOW,
        created_after=at,
        created_before=at,
    )
    after = Cursor(created_at=at, uid=UUID(UID))
    statement, values = page_statement(wanted, scope=("a", "b"), after=after, limit=51)
    assert values == [["a", "b"], "' OR true --", at, at, at, UUID(UID), 51]
    assert "OR true" not in statement
    assert "type = 'health_check' AND phase = 'Failed' AND priority = 'low'" in statement
    assert sorted(set(re.findall(r"\$\d+", statement))) == [f"${number}" for number in range(1, 8)]
    statement, values = page_statement(TaskFilter(), scope=None, after=None, limit=51)
    assert statement.startswith("WITH RECURSIVE")
    assert values == [51]


# ------------------------------------------------------------------------------------------------------------- problems

CEL = (
    "spec.payload",
    'Invalid value: "object": spec.payload.chunkOverlap: must be smaller than chunkSize (default 1000)',
)


@pytest.mark.parametrize(
    ("error", "status", "kind", "errors"),
    [
        (NotFound("x", status=404, answer="not there"), 404, "task-not-found", ()),
        (Conflict("x", status=409, answer="changed"), 409, "conflict", ()),
        (Forbidden("x", status=403, answer="exceeded quota"), 403, "refused-by-cluster", ()),
        (
            Invalid("x", status=422, answer="invalid", causes=[CEL]),
            422,
            "invalid-task",
            (FieldError("payload.chunk_overlap", "must be smaller than chunk_size (default 1000)"),),
        ),
        (
            Invalid("x", status=422, answer="invalid", causes=[("spec.type", "Unsupported value")]),
            422,
            "invalid-task",
            (FieldError("task_type", "Unsupported value"),),
        ),
        (Invalid("x", status=400, answer="strict decoding"), 422, "invalid-task", (FieldError("spec", "strict decoding"),)),
        (Unavailable("x", status=429, retry_after=2.5), 503, "unavailable", ()),
        (Unavailable("x"), 503, "unavailable", ()),
        (ClusterError("x"), 503, "unavailable", ()),
    ],
)
def test_what_the_cluster_refuses_is_a_problem(error: ClusterError, status: int, kind: str, errors: Any) -> None:
    problem = of_cluster(error, what="cannot create the task")
    assert (problem.status, problem.kind, problem.errors) == (status, kind, errors)
    assert problem.detail.startswith("cannot create the task: ")
    assert problem.headers == ({"Retry-After": "3" if error.retry_after else "1"} if status == 503 else {})
    check(problem.body(), "ProblemBody")


@pytest.mark.parametrize("name", ["a", "a-b", "0", "a" * 63])
def test_names_of_namespaces(name: str) -> None:
    assert is_namespace(name)
    assert is_task_name(f"{name}.{name}")


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a.b", "a/b", "a" * 64, "..", "a\n", "é", "a%2f"])
def test_no_names_of_namespaces(name: str) -> None:
    assert not is_namespace(name)
    assert name == "a.b" or len(name) == 64 or not is_task_name(name)


# ---------------------------------------------------------------------------------------------------------- the document


def test_the_document_is_valid() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    for name, schema in SCHEMAS.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert f"#/components/schemas/{name}" in str(DOCUMENT), f"nothing uses {name}"
    operations = [operation["operationId"] for path in DOCUMENT["paths"].values() for operation in path.values()]
    assert len(set(operations)) == len(operations)


def test_every_part_of_a_path_is_a_parameter() -> None:
    for route in routes():
        assert set(re.findall(r"{(\w+)}", route.path)) == {one.name for one in route.parameters if one.where == "path"}


def test_parameters_of_a_query_have_the_bounds_of_their_model() -> None:
    found = {one.name: dict(one.schema) for one in query_parameters(ListQuery)}
    assert set(found) == set(ListQuery.model_fields)
    assert found["limit"] == {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}
    assert found["priority"] == {"type": "string", "enum": ["high", "normal", "low"]}
    assert found["created_after"] == {"type": "string", "format": "date-time"}


# -------------------------------------------------------------------------------------------------------------- the page


def test_the_page_explains_every_problem_and_no_other() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| ([0-9, ]+) \|", PAGE, re.MULTILINE)
    assert {name for name, _ in rows} == set(TITLES)


def test_the_page_names_every_operation() -> None:
    for route in routes():
        assert route.path.removeprefix("/api/v1/tasks/{id}") in PAGE, route.path


# -------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GATEWAY_AUTH", "none"),
        ("GATEWAY_NAMESPACES", "a,B"),
        ("GATEWAY_DEFAULT_NAMESPACE", "*"),
        ("GATEWAY_LISTEN", "8084"),
        ("GATEWAY_AUTH_CACHE_SECONDS", "60"),
        ("GATEWAY_RATE", "0"),
        ("GATEWAY_POSTGRES_URL", ""),
        ("GATEWAY_DOCUMENTS", "uploads"),
        ("GATEWAY_DOCUMENTS", "s3://UPLOADS/"),
        ("GATEWAY_S3_ENDPOINT", "minio:9000"),
        ("GATEWAY_S3_CA", "no certificate"),
    ],
)
def test_a_bad_setting_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_POSTGRES_URL", "postgresql://x")
    load_settings(Settings, program="gateway")
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name):
        load_settings(Settings, program="gateway")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "GATEWAY_S3_ACCESS_KEY_ID and GATEWAY_S3_SECRET_ACCESS_KEY are required"),
        (
            {"S3_ACCESS_KEY_ID": "a", "S3_SECRET_ACCESS_KEY": "hidden", "UPLOAD_BYTES": str(5 * 2**30 + 1)},
            "GATEWAY_UPLOAD_BYTES: a bucket takes uploads of at most 5368709120 bytes",
        ),
    ],
)
def test_a_bucket_for_uploads_wants_an_account_and_a_limit_that_it_can_hold(
    given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"POSTGRES_URL": "postgresql://x", "DOCUMENTS": "s3://uploads/team-a", **given}.items():
        monkeypatch.setenv(f"GATEWAY_{name}", value)
    with pytest.raises(SettingsError, match=message) as raised:
        load_settings(Settings, program="gateway")
    assert "hidden" not in str(raised.value)
