"""Commands of `ptask` without a cluster: files, flags, exit codes, errors, help, what is watched and what is followed."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ptask import completion, logs, manifests
from ptask.__main__ import arguments_of, run
from ptask.app import app
from ptask.cluster import Change
from ptask.live import Watched, drawn, line_of, seconds_of
from ptask.outcomes import CommandError, Exit, of_phases
from ptask.tables import as_text
from task_contract import names
from tests.support.cli_tasks import NOW, task

MANIFEST = """apiVersion: tasks.zzdsj.io/v1
kind: ProcessingTask
metadata: {name: handbook, labels: {team: search}, annotations: {why: because}}
spec: {type: document_processing, kbId: kb-42, payload: {filePath: /data/handbook.pdf}}
"""


def ptask(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process without a cluster."""
    given = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(
        [sys.executable, "-m", "ptask", *arguments], input=stdin, capture_output=True, text=True, env=given, check=False
    )


# -------------------------------------------------------------------------------------------------------------- manifests


def test_files_folders_patterns_documents_and_lists_are_read(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(MANIFEST)
    second = MANIFEST.replace("name: handbook,", "name: second,")
    (tmp_path / "two.yml").write_text(f"---\n{second}---\n{MANIFEST.replace('name: handbook,', 'generateName: many-,')}")
    listed = {"kind": "List", "items": [json.loads(json.dumps(task("listed")))]}
    (tmp_path / "list.json").write_text(json.dumps(listed))
    (tmp_path / "notes.txt").write_text("no manifest")
    found = manifests.read([str(tmp_path)])
    generated = found[3].name
    assert [draft.name for draft in found] == ["listed", "handbook", "second", generated]
    assert generated.startswith("many-")
    assert len(generated) == len("many-") + 5
    assert (found[1].labels, found[1].annotations) == ({"team": "search"}, {"why": "because"})
    assert found[0].namespace == "knowledge"
    assert [draft.name for draft in manifests.read([str(tmp_path / "*.yaml")])] == ["handbook"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no task"),
        ("just words", "it is no manifest but a str"),
        ("a: [1", "neither YAML nor JSON at line 1"),
        (MANIFEST.replace("ProcessingTask", "Job"), "kind Job; ptask takes tasks.zzdsj.io/v1 ProcessingTask"),
        (MANIFEST.replace("name: handbook,", ""), "metadata.name: is missing"),
        (MANIFEST.replace("kbId", "kbid"), "spec.kbid"),
        (MANIFEST.replace("filePath", "file"), "spec.payload.file"),
        (MANIFEST + "sepc: {}\n", "sepc: is no field"),
        (MANIFEST.partition("spec:")[0] + "spec: [a]\n", "spec: is no object"),
        (f"{MANIFEST}---\n{MANIFEST.replace('type: document_processing', 'type: magic')}", "document 2: spec.type"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_by_file_and_field(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(CommandError) as caught:
        manifests.read([str(path)])
    assert caught.value.code is Exit.USAGE
    assert words in caught.value.message
    assert "wrong.yaml" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("source", ["/nonexistent/a.yaml", "/nonexistent/*.yaml"])
def test_a_path_that_leads_nowhere_is_told(source: str) -> None:
    with pytest.raises(CommandError, match="/nonexistent/"):
        manifests.read([source])


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(f"{MANIFEST}---\n{MANIFEST}")
    with pytest.raises(CommandError, match=r"document 2: .*document 1 has a task handbook too"):
        manifests.read([str(path)])


def flags(**given: Any) -> list[manifests.Draft]:
    none: dict[str, Any] = {
        "kind": None, "kb": None, "documents": (), "name": None, "priority": None, "sets": (), "labels": {}
    }  # fmt: skip
    return manifests.from_flags(**none | given)


def test_flags_make_a_task_for_each_document() -> None:
    first, second = flags(
        kb="kb-42",
        documents=["/data/操作 Handbook V2.pdf", "https://host/a/b.pdf"],
        priority="high",
        sets=["chunkSize=500", "payload.metadata.team=search", "timeout=5m", "retry.limit=0", "spec.suspend=true"],
        labels={"batch": "x"},
    )
    assert first.name.startswith("handbook-v2-")
    assert second.name.startswith("b-")
    assert first.spec == {
        "type": "document_processing",
        "kbId": "kb-42",
        "priority": "high",
        "payload": {"filePath": "/data/操作 Handbook V2.pdf", "chunkSize": 500, "metadata": {"team": "search"}},
        "timeout": "5m",
        "retry": {"limit": 0},
        "suspend": True,
    }
    assert second.spec["payload"]["filePath"] == "https://host/a/b.pdf"
    assert second.manifest("knowledge")["metadata"] == {
        "name": second.name, "namespace": "knowledge", "labels": {"batch": "x"}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give manifests with --filename"),
        ({"kind": "health_check", "sets": ["nonsense"]}, "write FIELD=VALUE"),
        ({"kind": "health_check", "sets": ["a.b=1", "a=2"]}, "spec.a"),
        ({"kind": "health_check", "sets": ["timeout.x=1"]}, "spec.timeout"),
        ({"kind": "health_check", "sets": ["timeout=5m", "timeout.x=1"]}, "timeout is set to a value already"),
        ({"documents": ["a", "b"], "name": "x", "kb": "k"}, "leave --name out"),
        ({"kind": "magic"}, "spec.type"),
    ],
)
def test_flags_that_make_no_task_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(CommandError) as caught:
        flags(**given)
    assert words in caught.value.message
    assert caught.value.code is Exit.USAGE


# -------------------------------------------------------------------------------------------------------------- processes


def test_a_manifest_from_standard_input_is_checked_without_a_cluster() -> None:
    done = ptask("submit", "-f", "-", "--dry-run", "-o", "json", stdin=MANIFEST)
    assert (done.returncode, done.stderr) == (0, "")
    made = json.loads(done.stdout)
    assert (made["metadata"]["name"], made["metadata"]["labels"]) == ("handbook", {"team": "search"})


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["submit", "-f", "/nonexistent.yaml"], Exit.USAGE, "error: cannot read /nonexistent.yaml"),
        (["submit", "--type", "health_check", "--timeout", "soon"], Exit.USAGE, "cannot use --timeout soon"),
        (["list"], Exit.USAGE, "cannot use the kubeconfig"),
        (["get"], Exit.USAGE, "Missing argument"),
        (["nonsense"], Exit.USAGE, "No such command"),
        (["run", "x.yaml"], Exit.USAGE, "give --local"),
        (["kb", "get", "kb-42"], Exit.USAGE, "give --gateway"),
        (["watch", "-o", "yaml", "--kubeconfig", "/nonexistent"], Exit.USAGE, "kubeconfig /nonexistent"),
    ],
)
def test_an_error_is_one_sentence_with_a_remedy_and_an_exit_code(arguments: list[str], code: Exit, words: str) -> None:
    done = ptask(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_api_server_that_is_not_there_is_told_apart(tmp_path: Path) -> None:
    cluster = {"name": "c", "cluster": {"server": "https://127.0.0.1:9"}}
    context = {"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "knowledge"}}
    kubeconfig = {
        "apiVersion": "v1", "kind": "Config", "current-context": "x", "clusters": [cluster], "contexts": [context],
        "users": [{"name": "u", "user": {}}],
    }  # fmt: skip
    (tmp_path / "config").write_text(json.dumps(kubeconfig))
    done = ptask("list", KUBECONFIG=str(tmp_path / "config"))
    assert done.returncode == Exit.UNREACHABLE, done.stderr
    assert done.stderr.startswith("error: cannot list processingtasks: the Kubernetes API does not answer")
    assert len(done.stderr.splitlines()) == 1


def test_a_runner_that_is_not_configured_is_told() -> None:
    done = ptask("run", "--local", "-", stdin=MANIFEST)
    assert done.returncode == Exit.USAGE
    assert "TASKS_POSTGRES_URL is not set" in done.stderr


def test_help_imports_neither_the_cluster_s_client_nor_the_models() -> None:
    """Imports are counted, not seconds: `ptask --help` takes some 0.15 s of CPU, a third of which is Python and typer."""
    code = (
        "import sys\nfrom ptask.__main__ import run\nfrom ptask.app import app\n"
        "run(lambda given: app(given, prog_name='ptask'), ['--help'])\n"
        "heavy = ('kubernetes', 'httpx', 'task_contract', 'rich', 'yaml')\n"
        "print([one for one in heavy if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "submit" in done.stdout


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["submit", "--dry-run"], ["submit", "--dry-run=client"]),
        (["submit", "--dry-run", "server"], ["submit", "--dry-run", "server"]),
        (["submit", "--dry-run=server", "-f", "a"], ["submit", "--dry-run=server", "-f", "a"]),
        (["submit", "--", "--dry-run"], ["submit", "--", "--dry-run"]),
    ],
)
def test_dry_run_alone_is_that_of_the_client(given: list[str], read: list[str]) -> None:
    assert arguments_of(given) == read


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (CommandError("cannot do it; do that", code=Exit.TIMEOUT), Exit.TIMEOUT, "error: cannot do it; do that"),
        (KeyboardInterrupt(), Exit.INTERRUPTED, ""),
        (ZeroDivisionError("by zero"), Exit.FAILED, "a defect of ptask: ZeroDivisionError: by zero"),
        (ModuleNotFoundError("no", name="kubernetes.client"), Exit.FAILED, "install processing-tasks[cli]"),
    ],
)
def test_whatever_is_raised_ends_in_a_sentence(raised: BaseException, code: Exit, words: str) -> None:
    def broken(_: list[str]) -> None:
        raise raised

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert run(broken, []) == code
    assert words in said.getvalue()


def test_names_for_the_shell_come_without_errors_where_there_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nonexistent")

    line = SimpleNamespace(params={"kubeconfig": None, "context": None, "namespace": None})
    assert completion.tasks(line, "hand") == []


def test_kubectl_completes_the_plugin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["kubectl_complete-ptask", "kb", "p"])
    for name in ("_PTASK_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
        monkeypatch.setenv(name, "")
    completion.kubectl()
    assert capsys.readouterr().out.split() == ["purge", ":4"]


def test_every_command_and_option_has_a_description_and_commands_have_examples() -> None:
    import typer.main

    def walk(command: Any, path: str) -> None:
        assert command.help, path
        for parameter in command.params:
            assert getattr(parameter, "help", None) or parameter.name == "version", f"{path} {parameter.name}"
        for name, one in getattr(command, "commands", {}).items():
            walk(one, f"{path} {name}")

    walk(typer.main.get_command(app), "ptask")


# ------------------------------------------------------------------------------------------------------------- watching


@pytest.mark.parametrize(
    ("phases", "code"),
    [
        (["Completed", "Completed"], Exit.DONE),
        (["Completed", "Canceled"], Exit.CANCELED),
        (["Deleted"], Exit.CANCELED),
        (["Canceled", "Processing"], Exit.TIMEOUT),
        (["Processing", "Failed", "Canceled"], Exit.FAILED),
        (["Unknown"], Exit.TIMEOUT),
        ([], Exit.DONE),
    ],
)
def test_the_exit_code_of_a_wait_is_that_of_the_worst_end(phases: list[str], code: Exit) -> None:
    assert of_phases(phases) is code


KEY = ("knowledge", "handbook")


def test_a_wait_ends_when_all_that_is_wanted_has_ended() -> None:
    watched = Watched(frozenset({KEY, ("knowledge", "second")}))
    assert not watched.ended
    first = watched.take(Change("SYNC", (task(), task("second", "Processing"), task("other"))))
    assert [one["metadata"]["name"] for one in first] == ["handbook", "second"]
    assert list(watched.take(Change("MODIFIED", (task(),)))) == []
    watched.take(Change("MODIFIED", (task("second", "Completed"),)))
    assert not watched.ended
    watched.take(Change("LOST", message="no answer"))
    assert watched.lost == "no answer"
    watched.take(Change("MODIFIED", (task(phase="Failed"),)))
    assert (watched.ended, watched.lost) == (True, "")
    assert of_phases(watched.phases.values()) is Exit.FAILED


@pytest.mark.parametrize("kind", ["DELETED", "SYNC"])
def test_one_that_is_deleted_while_it_is_waited_for_counts_as_canceled(kind: str) -> None:
    watched = Watched(frozenset({KEY}))
    watched.take(Change("SYNC", (task(phase="Processing"),)))
    watched.take(Change(kind, (task(phase="Processing"),) if kind == "DELETED" else ()))
    assert watched.ended
    assert of_phases(watched.phases.values()) is Exit.CANCELED


def test_one_that_is_deleted_after_its_end_has_ended_so() -> None:
    watched = Watched(frozenset({KEY}))
    watched.take(Change("SYNC", (task(phase="Completed"),)))
    watched.take(Change("DELETED", (task(phase="Completed"),)))
    assert of_phases(watched.phases.values()) is Exit.DONE


def test_a_live_table_is_no_higher_than_the_terminal_and_shows_first_what_runs() -> None:
    watched = Watched()
    tasks = [task(f"done-{n:02}", "Completed") for n in range(40)] + [task("waits"), task("runs", "Processing", progress=62)]
    watched.take(Change("SYNC", tuple(tasks)))
    watched.take(Change("LOST", message="no answer"))
    lines = as_text(drawn(watched, now=NOW, width=80, height=12, namespaces=False)).splitlines()
    assert len(lines) <= 12
    assert "━━━━━━──── 62%" in lines[1]
    assert lines[2].startswith("waits")
    assert lines[-2] == "… and 34 more; 1 Queued, 1 Processing, 40 Completed"
    assert lines[-1] == "nothing is heard: no answer"


def test_a_line_changes_with_what_it_says_alone() -> None:
    assert line_of(task()) == line_of(task(message="other words"))
    assert line_of(task(phase="Processing", progress=1)) != line_of(task(phase="Processing", progress=2))


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1m30s", 90), ("1h", 3600), ("0", None), (None, None)])
def test_a_timeout_is_a_duration(text: str | None, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


# ------------------------------------------------------------------------------------------------------------------ logs


def test_of_a_worker_s_log_only_the_lines_of_the_task_are_shown() -> None:
    pooled = task(phase="Processing", executor="pool", job="texts-1")
    assert logs.pod_labels(pooled) == "batch.kubernetes.io/job-name=texts-1"
    wanted = logs.about(pooled)
    lines = [
        b'{"event": "mine", "uid": "uid-handbook"}',
        b'{"event": "of another, about uid-handbook", "uid": "uid-other"}',
        b'{"event": "nobody\'s"}',
        b"plain uid-handbook",
        b"",
    ]
    assert [wanted(line) for line in lines] == [True, False, False, True, False]


def test_a_task_with_a_job_has_pods_of_its_own() -> None:
    own = task(phase="Processing", executor="job", job="handbook-1")
    assert logs.pod_labels(own, attempt=2) == f"{names.TASK_UID_LABEL}=uid-handbook,{names.ATTEMPT_LABEL}=2"
    assert logs.about(own)(b"anything")


@pytest.mark.parametrize(("tail", "shown"), [(None, "a\nb\nc"), (2, "b\nc"), (0, "")])
def test_the_lines_that_a_status_keeps_serve_when_the_pod_is_gone(tail: int | None, shown: str) -> None:
    assert logs.kept(task(phase="Failed", error={"reason": "X", "log": "a\nb\nc"}), tail) == shown
    assert logs.kept(task(phase="Completed"), tail) is None
