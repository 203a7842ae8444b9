"""`ptask` on a real API server. Nobody carries tasks out: the test writes their statuses, as an operator would."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from devstack import Endpoints
from ptask.outcomes import Exit
from task_contract import names
from tests.support.cli import Ptask
from tests.support.devstack import Kubectl

pytestmark = pytest.mark.integration


@pytest.fixture
def ptask(cluster: Endpoints, kubectl: Kubectl, namespace: str) -> Ptask:
    return Ptask(cluster.kubeconfig, namespace)


@pytest.fixture
def write(kubectl: Kubectl, namespace: str) -> Callable[..., None]:
    """Write the status of a task."""

    def write(name: str, phase: str, **status: Any) -> None:
        at = "2026-01-31T09:30:00Z"
        ready = "True" if phase == "Completed" else "False"
        condition = {"type": "Ready", "status": ready, "reason": phase, "message": "", "lastTransitionTime": at}
        status = {"phase": phase, "observedGeneration": 1, "queuedAt": at, "conditions": [condition], **status}
        patch = json.dumps({"status": status})
        kubectl("patch", f"-n{namespace}", "ptask", name, "--subresource=status", "--type=merge", "-p", patch)

    return write


def health(name: str, **metadata: Any) -> str:
    return yaml.safe_dump(
        {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": name, **metadata},
            "spec": {"type": "health_check", "retry": {"limit": 0}},
        }
    )


def told(process: "subprocess.Popen[str]", words: str) -> str:
    """Return the output of a process up to the line that has the words."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if words in line:
            return seen
    raise AssertionError(f"it ended without {words!r}: {seen}")


@pytest.fixture
def ended() -> Iterator[Callable[["subprocess.Popen[str]"], "subprocess.Popen[str]"]]:
    """End what a test leaves running."""
    started: list[subprocess.Popen[str]] = []

    def keep(process: "subprocess.Popen[str]") -> "subprocess.Popen[str]":
        started.append(process)
        return process

    yield keep
    for process in started:
        process.kill()
        process.communicate()


def test_tasks_are_made_once_however_often_they_are_submitted(ptask: Ptask, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(health(name, labels={"team": "search"}, annotations={"why": "because"}))
    pattern = str(tmp_path / "*.yaml")
    first = ptask("submit", "-f", pattern, "--label", "batch=x")
    assert first.splitlines() == [
        "processingtask.tasks.zzdsj.io/a created",
        "processingtask.tasks.zzdsj.io/b created",
    ]
    assert "a unchanged" in ptask("submit", "-f", pattern)
    (tmp_path / "a.yaml").write_text(health("a").replace("limit: 0", "limit: 1"))
    refused = ptask.attempt("submit", "-f", pattern)
    assert refused.returncode == Exit.FAILED
    assert "b unchanged" in refused.stdout
    assert "a.yaml: cannot create task a: it exists with another spec" in refused.stderr
    stored = json.loads(ptask("get", "a", "-o", "json"))
    assert stored["metadata"]["labels"] == {"team": "search", "batch": "x"}
    assert stored["metadata"]["annotations"] == {"why": "because"}
    assert "managedFields" not in stored["metadata"]


def test_a_dry_run_is_judged_by_the_cluster_and_stores_nothing(ptask: Ptask) -> None:
    assert "server dry run" in ptask("submit", "-f", "-", "--dry-run=server", stdin=health("judged"))
    assert ptask.attempt("get", "judged").returncode == Exit.FAILED
    # The rule over two fields is the CRD's: the client does not know it.
    flags = ("--kb", "kb-42", "--document", "/data/a.pdf", "--set", "action=delete_knowledge_base")
    assert ptask("submit", *flags, "--dry-run=client")
    refused = ptask.attempt("submit", *flags, "--dry-run=server")
    assert refused.returncode == Exit.USAGE
    assert "spec.payload.confirm" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_list_is_chosen_by_fields_and_labels(ptask: Ptask, write: Callable[..., None]) -> None:
    assert "no tasks in namespace" in ptask.attempt("list").stderr
    for name, team in (("one", "a"), ("two", "b")):
        ptask("submit", "-f", "-", stdin=health(name, labels={"team": team}))
    write("two", "Failed", error={"reason": "Unhealthy", "message": "milvus", "retryable": False})
    assert ptask("list", "-o", "name", "--phase", "failed") == "processingtask.tasks.zzdsj.io/two\n"
    assert ptask("list", "-o", "name", "-l", "team in (a)") == "processingtask.tasks.zzdsj.io/one\n"
    rows = [line.split() for line in ptask("list", "-A", "-o", "wide").splitlines()]
    assert rows[0][:2] == ["NAMESPACE", "NAME"]
    assert [row[1] for row in rows if row[0] == ptask.namespace] in (["two", "one"], ["one", "two"])
    assert {item["metadata"]["name"] for item in yaml.safe_load(ptask("list", "-o", "yaml"))["items"]} == {"one", "two"}
    assert "Unhealthy: milvus" in ptask("get", "two")


@pytest.mark.parametrize(
    ("phase", "code"),
    [("Completed", Exit.DONE), ("Failed", Exit.FAILED), ("Canceled", Exit.CANCELED), (None, Exit.CANCELED)],
)
def test_a_wait_tells_what_happens_and_ends_with_the_task(
    ptask: Ptask, write: Callable[..., None], kubectl: Kubectl, ended: Any, phase: str | None, code: Exit
) -> None:
    process = ended(ptask.start("submit", "--type", "health_check", "--name", "waited", "--wait"))
    told(process, "waited Queued")
    write("waited", "Processing", stage="check", progress=50, attempt=1)
    told(process, "waited Processing check 50%")
    if phase is None:
        kubectl("delete", f"-n{ptask.namespace}", "ptask", "waited")
    else:
        write("waited", phase)
    told(process, f"waited {phase or 'Deleted'}" if phase else "waited")
    assert process.wait(timeout=60) == code


def test_a_wait_that_takes_too_long_is_a_timeout_and_the_task_goes_on(ptask: Ptask) -> None:
    done = ptask.attempt("submit", "--type", "health_check", "--name", "slow", "--wait", "--timeout", "1s")
    assert done.returncode == Exit.TIMEOUT
    assert "they go on" in done.stderr
    assert json.loads(ptask("get", "slow", "-o", "json"))["spec"].get("cancel") in {None, False}


def test_a_watch_follows_what_comes_and_is_json_for_machines(ptask: Ptask, write: Callable[..., None], ended: Any) -> None:
    process = ended(ptask.start("watch", "-o", "json", "-l", "team=a"))
    ptask("submit", "-f", "-", stdin=health("other"))
    ptask("submit", "-f", "-", stdin=health("mine", labels={"team": "a"}))
    line = told(process, "mine")
    assert json.loads(line)["metadata"]["name"] == "mine"
    write("mine", "Completed")
    assert json.loads(told(process, "Completed").splitlines()[-1])["status"]["phase"] == "Completed"


def test_cancel_asks_for_the_end_and_retry_does_it_again(ptask: Ptask, write: Callable[..., None]) -> None:
    for name in ("first", "second"):
        ptask("submit", "-f", "-", stdin=health(name, labels={"batch": "x"}))
    assert "first is being canceled" in ptask("cancel", "first")
    assert json.loads(ptask("get", "first", "-o", "json"))["spec"]["cancel"] is True
    unasked = ptask.attempt("cancel", "-l", "batch=x")
    assert unasked.returncode == Exit.USAGE
    assert "give --yes" in unasked.stderr
    assert "second is being canceled" in ptask("cancel", "-l", "batch=x", "--yes")
    assert ptask.attempt("retry", "first").returncode == Exit.FAILED  # it has not ended
    write("first", "Canceled")
    assert "first has ended already (Canceled)" in ptask("cancel", "first")
    fresh = ptask("retry", "first", "-o", "name").strip().rpartition("/")[2]
    stored = json.loads(ptask("get", fresh, "-o", "json"))
    assert stored["metadata"]["annotations"] == {names.RETRY_OF_ANNOTATION: "first"}
    assert stored["metadata"]["labels"] == {"batch": "x"}
    assert "cancel" not in stored["spec"] or not stored["spec"]["cancel"]


def test_why_and_top_tell_of_the_queue(ptask: Ptask, write: Callable[..., None]) -> None:
    ptask("submit", "-f", "-", stdin=health("waits"))
    write("waits", "Queued", queue={"reason": "TotalLimit", "message": "2 tasks run", "position": 3})
    said = ptask("why", "waits")
    assert "number 3 in line" in said
    assert len(said.splitlines()) == 1
    assert json.loads(ptask("why", "waits", "-o", "json"))["reason"] == "TotalLimit"
    seen = ptask("top")
    assert "normal     TotalLimit   1" in seen
    assert "nothing runs" in seen
    assert "1 Queued" in seen


def test_logs_of_a_task_without_a_pod_are_those_that_were_kept(ptask: Ptask, write: Callable[..., None]) -> None:
    ptask("submit", "-f", "-", stdin=health("broken"))
    none = ptask.attempt("logs", "broken")
    assert none.returncode == Exit.FAILED
    assert "ptask logs -f" in none.stderr
    error = {"reason": "Unhealthy", "message": "milvus", "retryable": False, "log": "first\nlast"}
    write("broken", "Failed", error=error)
    assert ptask("logs", "broken", "--tail", "1") == "last\n"
    followed = ptask.attempt("logs", "broken", "-f")
    assert (followed.returncode, followed.stdout) == (Exit.FAILED, "first\nlast\n")


def test_knowledge_bases_are_removed_by_tasks_that_ask_first(ptask: Ptask) -> None:
    assert ptask.attempt("kb purge kb-42").returncode == Exit.USAGE  # nobody is at the terminal
    made = ptask("kb purge kb-42", "--yes")
    name = made.split()[0].rpartition("/")[2]
    stored = json.loads(ptask("get", name, "-o", "json"))["spec"]
    assert (stored["type"], stored["payload"]) == ("knowledge_indexing", {"action": "purge", "confirm": "kb-42"})
    assert "created" in ptask("kb delete kb-42", "-y")
    assert "created" in ptask("kb verify kb-42", "-y")
    listed = ptask.attempt("kb list", "-o", "json")
    assert json.loads(listed.stdout)["source"] == "tasks"
    assert "--gateway has all of it" in listed.stderr


def test_who_may_not_is_told_what_to_ask_for(ptask: Ptask, kubectl: Kubectl, namespace: str, tmp_path: Path) -> None:
    kubectl("create", f"-n{namespace}", "serviceaccount", "nobody")
    token = kubectl("create", f"-n{namespace}", "token", "nobody").strip()
    config = yaml.safe_load(kubectl("config", "view", "--raw", "-o", "yaml"))
    config["users"] = [{"name": "nobody", "user": {"token": token}}]
    for context in config["contexts"]:
        context["context"]["user"] = "nobody"
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    refused = ptask.attempt("list", "--kubeconfig", str(tmp_path / "config"))
    assert refused.returncode == Exit.FAILED
    assert "forbidden" in refused.stderr
    assert "ask for the role view or edit" in refused.stderr
    seen = ptask.attempt("doctor", "-o", "json", "--kubeconfig", str(tmp_path / "config"))
    findings = {one["subject"]: one["level"] for one in json.loads(seen.stdout)["findings"]}
    assert findings[f"{namespace}: your rights"] == "problem"
    assert findings["operator"] == "unknown"
    assert seen.returncode == Exit.FAILED


def test_a_namespace_without_its_parts_is_a_problem_with_a_remedy(ptask: Ptask, namespace: str) -> None:
    done = ptask.attempt("doctor")
    assert done.returncode == Exit.FAILED
    assert f"{namespace}: Secret" in done.stdout
    assert f"name {namespace} in taskNamespaces" in done.stdout


def test_the_shell_is_told_names_of_tasks(ptask: Ptask, ended: Any) -> None:
    ptask("submit", "-f", "-", stdin=health("handbook"))
    line = f"ptask get -n {ptask.namespace} hand"
    process = ended(ptask.start("get", _PTASK_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD="4"))
    assert process.communicate(timeout=60)[0].split() == ["handbook"]
