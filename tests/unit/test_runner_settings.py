"""Settings, task files and the messages about them."""

import json
import os
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest

from job_runner import settings
from job_runner.__main__ import main
from job_runner.attempt import identity, read_task, write_termination_message
from task_contract.errors import InvalidTask, StoreUnavailable
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Result

SPEC = {"type": "document_processing", "kbId": "kb", "payload": {"filePath": "a.txt"}}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(settings.PREFIX):
            monkeypatch.delenv(name)


def test_one_error_names_each_bad_variable_and_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKS_ATTEMPT", "secret-0")
    monkeypatch.setenv("TASKS_LOG_LEVEL", "secret-1")
    with pytest.raises(StoreUnavailable) as failure:
        settings.load()
    message = failure.value.message
    assert message.startswith("cannot start the runner: ")
    assert all(name in message for name in ("TASKS_POSTGRES_URL", "TASKS_ATTEMPT", "TASKS_LOG_LEVEL"))
    assert "secret" not in message


def test_defaults_and_empty_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKS_POSTGRES_URL", "postgresql://u:password@h/d")
    monkeypatch.setenv("TASKS_REDIS_URL", "")
    loaded = settings.load()
    assert loaded.redis_url is None
    assert loaded.document_stores_missing == ["TASKS_MILVUS_URL", "TASKS_ELASTICSEARCH_URL"]
    assert "password" not in repr(loaded)
    assert settings.load().holder != loaded.holder


@pytest.mark.parametrize(("setting", "limit", "expected"), [("", None, 1), ("", 3, 3), ("2", 3, 2), ("2", None, 2)])
def test_the_model_computes_with_the_threads_that_the_container_has(
    monkeypatch: pytest.MonkeyPatch, setting: str, limit: int | None, expected: int
) -> None:
    monkeypatch.setenv("TASKS_POSTGRES_URL", "postgresql://localhost/x")
    monkeypatch.setenv("TASKS_EMBEDDING_THREADS", setting)
    monkeypatch.setattr("job_runner.settings.cpu_limit", lambda: limit)
    assert settings.load().threads == expected


def test_lists_are_split_at_commas_and_white_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKS_POSTGRES_URL", "postgresql://h/d")
    monkeypatch.setenv("TASKS_SOURCE_ALLOW", "files.corp, *.example.com\n10.0.0.0/8,")
    monkeypatch.setenv("TASKS_SOURCE_PORTS", "443 8443")
    monkeypatch.setenv("TASKS_S3_BUCKETS", " manuals,public/team-a/ ")
    loaded = settings.load()
    assert loaded.source_allow == ("files.corp", "*.example.com", "10.0.0.0/8")
    assert loaded.source_ports == (443, 8443)
    assert loaded.s3_buckets == ("manuals", "public/team-a/")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TASKS_SOURCE_ALLOW", "10.0.0.1/8", "'10.0.0.1/8' is no host name, address or network"),
        ("TASKS_SOURCE_PORTS", "0", "greater than or equal to 1"),
        ("TASKS_SOURCE_PORTS", "http", "valid integer"),
        ("TASKS_SOURCE_CA", "secret: no certificate", "must be one or more certificates in PEM form"),
        ("TASKS_SOURCE_CA", "-----BEGIN CERTIFICATE-----\nc2VjcmV0\n-----END CERTIFICATE-----\n", "in PEM form"),
        ("TASKS_S3_BUCKETS", "Secret", "should match pattern"),
        ("TASKS_S3_ENDPOINT", "https://user:secret@s3.example.com", "should match pattern"),
        ("TASKS_S3_ENDPOINT", "s3.example.com", "should match pattern"),
        ("TASKS_S3_ADDRESSING", "secret", "'path' or 'virtual'"),
        ("TASKS_S3_REGION", "https://secret", "should match pattern"),
    ],
)
def test_bad_settings_of_sources_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv("TASKS_POSTGRES_URL", "postgresql://h/d")
    monkeypatch.setenv(name, value)
    with pytest.raises(StoreUnavailable) as failure:
        settings.load()
    assert name in failure.value.message
    assert message in failure.value.message
    assert "secret" not in failure.value.message


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{root}:{root / 'crds'}", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_bad_settings_reach_the_kubelet(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    done = run_command("-m", "job_runner", "run", "task.json", TASKS_TERMINATION_LOG=str(log))
    assert done.returncode == 69
    outcome = AttemptOutcome.parse(log.read_text())
    assert outcome is not None
    assert (outcome.outcome, outcome.reason) == (Outcome.GIVEN_BACK, "StoreUnavailable")
    assert "TASKS_POSTGRES_URL" in done.stderr


def test_logs_are_json_and_tracebacks_show_no_values() -> None:
    code = """
import logging, structlog
from job_runner import logs
logs.configure("info")
def fail():
    password = "secret" + "-1"
    raise ValueError("boom")
try:
    fail()
except ValueError:
    structlog.get_logger().exception("failed", where="here")
    logging.getLogger("library").exception("failed too")
    logging.getLogger("library").warning("not said")
"""
    lines = [json.loads(line) for line in run_command("-c", code).stderr.splitlines()]
    assert [line["event"] for line in lines] == ["failed", "failed too"]
    assert lines[0]["where"] == "here"
    assert "boom" in str(lines[0]["exception"])
    assert "secret-1" not in str(lines)


def test_the_end_of_the_log_is_kept_without_secrets() -> None:
    code = """
import sys, structlog
from job_runner import logs, settings
loaded = settings.load()
logs.configure("info")
log = structlog.get_logger()
assert logs.tail() is None
for number in range(100):
    log.info("step", number=number)
log.error("cannot connect to postgresql://tasks:p%40ss@host/db as tasks with p@ss, token Milvus-1")
print(logs.tail(secrets=loaded.secrets))
"""
    done = run_command(
        "-c", code, TASKS_POSTGRES_URL="postgresql://tasks:p%40ss@host/db", TASKS_MILVUS_TOKEN="root:Milvus-1"
    )
    *before, last = done.stdout.splitlines()
    assert json.loads(last)["event"] == "cannot connect to *** as tasks with ***, token ***"
    assert [json.loads(line)["number"] for line in before] == list(range(100 - len(before), 100))
    assert 512 < len(done.stdout) <= 1025


@pytest.mark.parametrize(
    ("name", "value", "secrets"),
    [
        ("postgres_url", "postgresql://user:p%40ss@host:5432/db", {"p%40ss", "p@ss"}),
        ("postgres_url", "postgresql://user@host:5432/db", set()),
        ("postgres_url", "postgresql://host/db", set()),
        ("redis_url", "redis://:pw@host:6379/0", {"pw"}),
        ("elasticsearch_url", "https://host:9200", set()),
        ("milvus_token", "root:Mil:vus", {"Mil:vus"}),
        ("s3_secret_access_key", "abc", set()),
    ],
)
def test_secrets_are_the_values_and_the_passwords_in_them(name: str, value: str, secrets: set[str]) -> None:
    given = {"postgres_url": "postgresql://h/d", name: value}
    assert settings.Settings.model_validate(given).secrets == {*given.values(), *secrets}


def test_help_explains_every_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"TASKS_{name.upper()}" in printed for name in settings.Settings.model_fields)
    assert "Pydantic" not in printed
    assert "None" not in printed


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_a_task_file_is_json_or_yaml(tmp_path: Path, form: str) -> None:
    path = tmp_path / "task"
    manifest = {"metadata": {"name": "a"}, "spec": SPEC}
    path.write_text(json.dumps(manifest) if form == "json" else "metadata: {name: a}\nspec:\n  " + json.dumps(SPEC))
    assert read_task(path).spec.kb_id == "kb"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the task file"),
        ("[1]", "it holds no object"),
        ("{a: [}", "neither JSON nor YAML"),
        (json.dumps({"metadata": {"name": "a"}, "spec": SPEC | {"unknown": 1}}), "spec.unknown"),
        (json.dumps({"metadata": {"name": "a", "uid": "x"}, "spec": {"type": "x"}}), "spec.type"),
        (json.dumps({"spec": SPEC}), "metadata"),
    ],
)
def test_a_bad_task_file_is_explained(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "task"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidTask, match=message):
        read_task(path)


def test_what_the_api_server_hands_over_may_have_newer_fields(tmp_path: Path) -> None:
    path = tmp_path / "task"
    uid = str(uuid.uuid4())
    manifest = {
        "metadata": {"name": "a", "uid": uid, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": SPEC | {"newer": 1},
    }
    path.write_text(json.dumps(manifest))
    assert identity(read_task(path)) == (uuid.UUID(uid), datetime(2026, 1, 1, tzinfo=UTC))


def test_a_task_without_a_cluster_is_a_new_one_each_time(tmp_path: Path) -> None:
    path = tmp_path / "task"
    path.write_text(json.dumps({"metadata": {"name": "a"}, "spec": SPEC}))
    task = read_task(path)
    assert identity(task)[0] != identity(task)[0]
    with pytest.raises(InvalidTask, match="no UUID"):
        identity(task.model_copy(update={"metadata": task.metadata.model_copy(update={"uid": "x"})}))


def test_the_termination_message_replaces_what_was_there(tmp_path: Path) -> None:
    log = tmp_path / "log"
    outcome = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=1, result=Result(chunks=1))
    write_termination_message(outcome, log)
    assert not log.exists(), "outside a pod there is no such file, and none is made"
    log.write_text("x" * 5000)
    write_termination_message(outcome, log)
    assert AttemptOutcome.parse(log.read_text()) == outcome
