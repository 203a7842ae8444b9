"""The contract's models, life cycle arithmetic and messages."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from task_contract import names
from task_contract.crd import custom_resource_definition
from task_contract.errors import (
    DocumentUnreadable,
    Fenced,
    HandedBack,
    InvalidTask,
    ParserCrashed,
    StoreUnavailable,
    TaskError,
)
from task_contract.lifecycle import ARROWS, ExitCode, conditions, exit_code, retry_delay, stores_consistent
from task_contract.messages import LOG_LIMIT, TERMINATION_LIMIT, AttemptOutcome, Outcome, hung, last_lines
from task_contract.migrations import migrations
from task_contract.models import (
    Component,
    ComponentHealth,
    Condition,
    Failure,
    Payload,
    Phase,
    ProcessingTask,
    Result,
    RetryPolicy,
    format_duration,
    parse_duration,
    parse_manifest,
)
from task_contract.pool_crd import pool_definition
from tests.support.locations import BAD_URLS, GOOD_PATHS

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def manifest(**spec: Any) -> dict[str, Any]:
    base = {"type": "document_processing", "kbId": "kb", "payload": {"filePath": "/data/a.pdf"}}
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": "a"}, "spec": base | spec}


# ------------------------------------------------------------------------------------------------------------ durations


@given(st.integers(min_value=0, max_value=10**11))
def test_durations_survive_writing_and_reading(milliseconds: int) -> None:
    value = timedelta(milliseconds=milliseconds)
    if milliseconds < 99_999 * 3_600_000:
        assert parse_duration(format_duration(value)) == value


@pytest.mark.parametrize("text", ["", "10", "10 s", "-1s", "1.5s", "1d", "s", "1h2", 10, None, "1" * 30 + "s"])
def test_a_bad_duration_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match="must be a duration such as"):
        parse_duration(text)


# ------------------------------------------------------------------------------------------------------------ manifests


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"payload": {"filePath": "a", "chunksize": 3}}, "spec.payload.chunksize: Extra inputs are not permitted"),
        ({"prio": "high"}, "spec.prio: Extra inputs"),
        ({"priority": "urgent"}, "spec.priority: Input should be 'high', 'normal' or 'low'"),
        ({"timeout": "soon"}, "spec.timeout: must be a duration"),
        ({"type": "ocr", "priority": "x"}, "spec.priority"),
        ({"retry": {"limit": 99}}, "spec.retry.limit: Input should be less than or equal to 20"),
        ({"kbId": "-"}, "spec.kbId"),
        ({"payload": None}, "spec.payload"),
    ],
)
def test_a_bad_manifest_is_refused_with_the_path_of_each_field(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        parse_manifest(manifest(**spec))
    assert message in caught.value.message


@pytest.mark.parametrize(("message", "url"), [(message, url) for message, urls in BAD_URLS.items() for url in urls])
def test_a_url_of_another_form_is_refused_with_the_path_of_the_field(message: str, url: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        parse_manifest(manifest(payload={"filePath": url}))
    assert f"spec.payload.filePath: {message}" in caught.value.message


@pytest.mark.parametrize("path", GOOD_PATHS)
def test_a_document_lies_on_the_volume_in_a_bucket_or_on_a_server(path: str) -> None:
    payload = parse_manifest(manifest(payload={"filePath": path})).spec.payload
    assert (payload.file_path, payload.effective_document_id) == (path, path)


def test_a_manifest_without_spec_is_refused() -> None:
    with pytest.raises(InvalidTask, match="spec"):
        parse_manifest({"metadata": {"name": "a"}})


def test_unknown_fields_of_stored_objects_are_ignored_so_that_a_rollback_can_read_them() -> None:
    stored = manifest(shinyNewField=1)
    stored["status"] = {"phase": "Processing", "alsoNew": {"a": 1}}
    task = ProcessingTask.model_validate(stored)
    assert task.status.phase is Phase.PROCESSING


def test_a_manifest_survives_a_round_trip() -> None:
    task = parse_manifest(manifest(retry={"initialDelay": "1m30s"}, timeout="2h", deadline="1h"))
    assert parse_manifest(task.manifest()) == task


@pytest.mark.parametrize(
    ("payload", "overlap"),
    [({}, 200), ({"chunkSize": 500}, 100), ({"chunkSize": 4000}, 200), ({"chunkOverlap": 0}, 0)],
)
def test_the_default_overlap_is_200_or_a_fifth_of_a_small_chunk(payload: dict[str, int], overlap: int) -> None:
    assert Payload.model_validate(payload).effective_chunk_overlap == overlap


# ----------------------------------------------------------------------------------------------------------- life cycle


def test_a_finished_task_has_no_way_out_and_every_other_phase_can_be_canceled() -> None:
    for phase, following in ARROWS.items():
        assert bool(following) is not phase.finished
        if not phase.finished:
            assert Phase.CANCELED in following


@pytest.mark.parametrize(
    ("failures", "random", "seconds"),
    [(1, 0.5, 10), (2, 0.5, 20), (3, 0.5, 40), (7, 0.5, 600), (10_000, 0.5, 600), (1, 0.0, 8), (1, 1.0, 12)],
)
def test_retry_delays_double_up_to_the_cap_with_jitter(failures: int, random: float, seconds: float) -> None:
    assert retry_delay(RetryPolicy(), failures=failures, random=random) == timedelta(seconds=seconds)


def test_a_retry_delay_before_any_failure_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        retry_delay(RetryPolicy(), failures=0, random=0)


@pytest.mark.parametrize(
    ("error", "code", "outcome"),
    [
        (DocumentUnreadable("x"), ExitCode.PERMANENT, Outcome.FAILED),
        (ParserCrashed("x"), ExitCode.RETRYABLE, Outcome.FAILED),
        (TaskError("x"), ExitCode.RETRYABLE, Outcome.FAILED),
        (StoreUnavailable("x"), ExitCode.STORE_UNAVAILABLE, Outcome.GIVEN_BACK),
        (HandedBack("x"), ExitCode.HANDED_BACK, Outcome.GIVEN_BACK),
        (Fenced("x"), ExitCode.FENCED, Outcome.FENCED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, TaskError) else str(value),
)
def test_each_error_has_one_exit_code_and_one_outcome(error: TaskError, code: ExitCode, outcome: Outcome) -> None:
    assert exit_code(error) is code
    told = AttemptOutcome.of_error(error, attempt=2)
    assert (told.outcome, told.attempt, told.reason) == (outcome, 2, error.reason)


@pytest.mark.parametrize(
    ("phase", "wanted"),
    [
        (Phase.QUEUED, {"Ready": "False"}),
        (Phase.PROCESSING, {"Ready": "False", "Succeeded": "Unknown", "Reconciling": "True"}),
        (Phase.RETRYING, {"Ready": "False", "Succeeded": "Unknown", "Reconciling": "True"}),
        (Phase.COMPLETED, {"Ready": "True", "Succeeded": "True"}),
        (Phase.FAILED, {"Ready": "False", "Succeeded": "False", "Stalled": "True"}),
        (Phase.CANCELED, {"Ready": "False", "Succeeded": "False", "Stalled": "True"}),
    ],
)
def test_conditions_of_each_phase(phase: Phase, wanted: dict[str, str]) -> None:
    found = conditions(phase, reason="R", message="m", generation=4, now=NOW)
    assert {condition.type: condition.status for condition in found} == wanted
    assert all(condition.observed_generation == 4 and condition.last_transition_time == NOW for condition in found)


def test_the_transition_time_stays_while_the_status_of_a_condition_stays() -> None:
    earlier = NOW - timedelta(hours=1)
    previous = [Condition(type="Ready", status="False", last_transition_time=earlier, reason="Queued")]
    found = {
        one.type: one
        for one in conditions(Phase.PROCESSING, reason="R", message="", generation=1, now=NOW, previous=previous)
    }
    assert found["Ready"].last_transition_time == earlier
    assert found["Succeeded"].last_transition_time == NOW


VERIFIED = Result(documents=1, chunks=40, milvus_count=40, elasticsearch_count=40, version=3)
DISAGREE = Failure(reason="StoresDisagree", message="of 40 chunks, Milvus misses 2 and has 1 others", retryable=True)
STORE_DOWN = Failure(reason="StoreUnavailable", message="", retryable=True)


@pytest.mark.parametrize(
    ("result", "error", "wanted"),
    [
        (None, None, None),
        (
            VERIFIED,
            None,
            ("True", "Verified", "Milvus and Elasticsearch hold exactly the 40 chunks of version 3: 0 missing, 0 extra"),
        ),
        (
            Result(documents=0, chunks=0, milvus_count=0, elasticsearch_count=0),
            None,
            ("True", "Verified", "Milvus and Elasticsearch hold no chunk of the document: 0 missing, 0 extra"),
        ),
        (None, DISAGREE, ("False", "StoresDisagree", DISAGREE.message)),
        (VERIFIED, DISAGREE, ("False", "StoresDisagree", DISAGREE.message)),
        (None, STORE_DOWN, None),
        (Result(documents=0, version=3), None, None),  # superseded: it has verified nothing
        (Result(chunks=40), None, None),
    ],
)
def test_a_task_says_whether_the_stores_are_consistent(
    result: Result | None, error: Failure | None, wanted: tuple[str, str, str] | None
) -> None:
    found = stores_consistent(result, error, generation=4, now=NOW)
    assert (None if found is None else (found.status, found.reason, found.message)) == wanted
    if found is not None:
        assert (found.type, found.observed_generation, found.last_transition_time) == ("StoresConsistent", 4, NOW)
        later = stores_consistent(result, error, generation=4, now=NOW + timedelta(hours=1), previous=[found])
        assert later == found


# ------------------------------------------------------------------------------------------------------------- messages


def test_a_termination_message_never_exceeds_what_the_kubelet_keeps() -> None:
    components = [ComponentHealth(name=Component.MODEL, healthy=False, milliseconds=1, message="知" * 1024)] * 6
    result = Result(chunks=3, components=components, seconds={f"stage{number}": 1.5 for number in range(16)})
    outcome = AttemptOutcome.of_error(ParserCrashed("坏" * 5000), attempt=1).model_copy(update={"result": result})
    text = outcome.termination_message()
    assert len(text.encode()) <= TERMINATION_LIMIT
    read = AttemptOutcome.parse(text)
    assert read is not None
    assert read.reason == "ParserCrashed"
    assert read.result is not None
    assert read.result.chunks == 3


@pytest.mark.parametrize("message", ["short", "坏" * 1024, "坏" * 700])
@pytest.mark.parametrize("log", ["l" * 1024, "志" * 1024, '{"event": "a"}\n' * 68, "x"])
def test_the_log_gets_the_room_that_is_left_in_a_termination_message(message: str, log: str) -> None:
    outcome = AttemptOutcome.of_error(ParserCrashed(message), attempt=1).model_copy(update={"log": log})
    text = outcome.termination_message()
    read = AttemptOutcome.parse(text)
    assert len(text.encode()) <= TERMINATION_LIMIT
    assert read is not None
    assert read.error is not None
    assert len((read.log or "").encode()) <= LOG_LIMIT
    if message == "short":
        assert read.error.message == message
        assert read.log
        assert log.endswith(read.log.lstrip("…"))
        assert len(read.log.encode()) > min(500, len(log) - 1)


@pytest.mark.parametrize(
    ("text", "limit", "lines"),
    [
        ("", 10, ""),
        ("one\ntwo\n", 10, "one\ntwo"),
        ("one\ntwo\nthree\n", 9, "two\nthree"),
        ("one\ntwo\nthree\n", 8, "three"),
        ("one\ntwo\nthree\n", 5, "three"),
        ("one\ntwo\nthree\n", 4, "…ree"),
        ("one\n", 1, ""),
        ("a\x00b\x1b[31mred\x1b[0m\r\nc\td\x07", 99, "abred\nc\td"),
        ("知识\ud800库", 99, "知识库"),
        ("  indented\n  too\n\n", 99, "  indented\n  too"),
    ],
)
def test_the_last_lines_of_a_log_are_whole_and_printable(text: str, limit: int, lines: str) -> None:
    assert last_lines(text, limit=limit) == lines


STACKS = """Timeout (0:00:03)!
Thread 0x00007f2a5d7fa640 (most recent call first):
  File "/usr/lib/python3.11/re/__init__.py", line 166 in match
  File "/app/main.py", line 12 in <module>
"""


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (STACKS, True),
        (STACKS[-60:], True),
        ("", False),
        (STACKS + "killed", False),
        ('Traceback (most recent call last):\n  File "a.py", line 1, in f\nModuleNotFoundError: No module', False),
        ("Fatal Python error: Segmentation fault\n" + STACKS + "\nExtension modules: numpy (total: 1)", False),
    ],
)
def test_a_runner_that_hung_is_known_by_the_end_of_its_log(log: str, expected: bool) -> None:
    assert hung(log) is expected


@pytest.mark.parametrize("text", [None, "", "Killed", '{"outcome": "Succ', "[]", '{"outcome": "Nonsense", "attempt": 1}'])
def test_a_message_that_is_not_ours_is_no_outcome(text: str | None) -> None:
    assert AttemptOutcome.parse(text) is None


# ---------------------------------------------------------------------------------------------------------------- names


@given(st.text(alphabet="abcz0189-.", min_size=1, max_size=253), st.uuids(), st.integers(min_value=1, max_value=10**6))
def test_job_names_are_valid_labels_and_equal_for_equal_arguments(name: str, uid: object, attempt: int) -> None:
    job = names.job_name(task_name=name, task_uid=str(uid), attempt=attempt)
    assert len(job) <= 63
    assert job.strip("-") == job
    assert set(job) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert job == names.job_name(task_name=name, task_uid=str(uid), attempt=attempt)


def test_tenants_with_look_alike_names_do_not_share_stores() -> None:
    pairs = [("a", "kb-1"), ("a", "kb_1"), ("a", "KB-1"), ("b", "kb-1"), ("a-kb", "1"), ("a", "kb.1")]
    stores = {names.knowledge_base_name(namespace=namespace, kb_id=kb_id) for namespace, kb_id in pairs}
    assert len(stores) == len(pairs)


def test_chunk_ids_do_not_mix_up_their_parts() -> None:
    one = names.chunk_id(namespace="a", kb_id="b", document_id="c1", version=1, ordinal=1)
    other = names.chunk_id(namespace="a", kb_id="b", document_id="c", version=11, ordinal=1)
    assert one != other


# ------------------------------------------------------------------------------------------------------------ generated


def test_the_generated_crds_are_in_sync_with_the_models() -> None:
    for definition in (custom_resource_definition(), pool_definition()):
        file = f"{definition['spec']['names']['plural']}.yaml"
        for folder in ("crds", "helm/processing-tasks/files/crds"):
            assert yaml.safe_load((ROOT / folder / file).read_text()) == json.loads(json.dumps(definition)), (folder, file)


def test_migrations_are_numbered_without_gaps() -> None:
    assert [number for number, _ in migrations()] == list(range(1, len(migrations()) + 1))


@pytest.mark.parametrize("path", sorted((ROOT / "manifests/examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_manifest_is_read(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] == names.KIND:
            parse_manifest(document)
