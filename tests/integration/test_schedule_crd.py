"""The CRD ProcessingSchedule on a real API server: what it refuses, with which words, its defaults and its columns."""

import json
import subprocess
from typing import Any

import pytest
import yaml

from task_contract.schedules import ScheduleSpec
from tests.support.devstack import Kubectl
from tests.unit.test_examples import ROOT

pytestmark = pytest.mark.integration

NAMED = {"name": "nightly"}
HEALTH: dict[str, Any] = {"type": "health_check"}


def create(kubectl: Kubectl, namespace: str, *, name: str = "nightly", **spec: Any) -> subprocess.CompletedProcess[str]:
    manifest = {
        "apiVersion": "tasks.zzdsj.io/v1",
        "kind": "ProcessingSchedule",
        "metadata": {"name": name},
        "spec": {"schedule": "30 2 * * *", "taskTemplate": {"spec": HEALTH}} | spec,
    }
    return kubectl.attempt("create", "-n", namespace, "--dry-run=server", "-f", "-", stdin=json.dumps(manifest))


def template(**spec: Any) -> dict[str, Any]:
    return {"taskTemplate": {"spec": HEALTH | spec}}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"schedule": ""}, "spec.schedule"),
        ({"schedule": "* * * *"}, "spec.schedule: five fields (minute, hour, day of month, month, day of week)"),
        ({"schedule": "0 * * * * *"}, "spec.schedule: five fields"),
        ({"schedule": "@every 1m"}, "spec.schedule: five fields"),
        ({"schedule": "TZ=UTC 0 * * * *"}, "the time zone is spec.timeZone"),
        ({"schedule": "0 0 * * ?"}, "spec.schedule: five fields"),
        ({"timeZone": "../etc/passwd"}, "spec.timeZone: the IANA name of a time zone"),
        ({"timeZone": ""}, "spec.timeZone"),
        ({"concurrencyPolicy": "allow"}, "spec.concurrencyPolicy: Unsupported value"),
        ({"startingDeadlineSeconds": 9}, "spec.startingDeadlineSeconds"),
        ({"successfulHistoryLimit": -1}, "spec.successfulHistoryLimit"),
        ({"failedHistoryLimit": 1001}, "spec.failedHistoryLimit"),
        ({"taskTemplate": {}}, "spec.taskTemplate.spec: Required value"),
        (template(cancel=True), "spec.taskTemplate.spec.cancel: tasks would be canceled at once"),
        (template(idempotencyKey="a"), "spec.taskTemplate.spec.idempotencyKey: is about one task alone; leave it out"),
        (template(notBefore="2026-11-28T03:00:00Z"), "spec.taskTemplate.spec.notBefore: is about one task alone"),
        (template(dependsOn=["a"]), "spec.taskTemplate.spec.dependsOn: is about one task alone"),
        # The rules of a task hold for the template.
        (template(type="document_processing"), "spec.kbId: required: name the knowledge base"),
        (template(type="cooking"), "spec.taskTemplate.spec.type: Unsupported value"),
        (template(timeout="0s"), "spec.timeout: must be between 1s and 168h"),
        (template(payload={"filePath": "a.pdf"}), "spec.payload.filePath: only for type document_processing"),
        (template(kbId="kb", type="document_processing", payload={"filePath": "../a"}), "'..' is not allowed"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_cannot_be_is_refused_by_name(kubectl: Kubectl, namespace: str, spec: dict[str, Any], message: str) -> None:
    answer = create(kubectl, namespace, **spec)
    assert answer.returncode != 0
    assert message in answer.stderr


@pytest.mark.parametrize(
    "schedule", ["*/5 0-6,22-23 * JAN-MAR MON-FRI", "0 0 L * *", "0 9 * * 1#1", "@daily", "0  3  * * 7"]
)
def test_what_cron_knows_is_accepted(kubectl: Kubectl, namespace: str, schedule: str) -> None:
    assert create(kubectl, namespace, schedule=schedule).returncode == 0


def test_a_name_has_to_be_a_label_of_tasks(kubectl: Kubectl, namespace: str) -> None:
    assert create(kubectl, namespace, name="a" * 63).returncode == 0
    assert "metadata.name" in create(kubectl, namespace, name="a" * 64).stderr


@pytest.mark.parametrize("path", sorted((ROOT / "manifests/examples").glob("schedule-*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_accepted_as_they_are(kubectl: Kubectl, namespace: str, path: Any) -> None:
    answer = kubectl.attempt("create", "-n", namespace, "--dry-run=server", "-f", str(path))
    assert answer.returncode == 0, answer.stderr
    ScheduleSpec.model_validate(yaml.safe_load(path.read_text())["spec"])


def test_one_example_shows_every_field() -> None:
    text = (ROOT / "manifests/examples/schedule-nightly.yaml").read_text(encoding="utf-8")
    assert [field.alias for field in ScheduleSpec.model_fields.values() if f"  {field.alias}:" not in text] == []


def test_a_new_one_says_that_nobody_has_seen_it_and_all_can_be_changed(kubectl: Kubectl, namespace: str) -> None:
    manifest = {"apiVersion": "tasks.zzdsj.io/v1", "kind": "ProcessingSchedule", "metadata": NAMED}
    spec = {"schedule": "30 2 * * *", "taskTemplate": {"spec": HEALTH}}
    kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(manifest | {"spec": spec}))
    stored = kubectl.get("psched", "nightly", "-n", namespace)
    assert ScheduleSpec.model_validate(stored["spec"]) == ScheduleSpec.model_validate(spec)
    assert (stored["spec"]["timeZone"], stored["spec"]["concurrencyPolicy"]) == ("UTC", "Allow")
    assert stored["spec"]["taskTemplate"]["spec"]["retry"]["limit"] == 3
    (ready,) = stored["status"]["conditions"]
    assert (ready["status"], ready["reason"]) == ("False", "Pending")
    header, row = kubectl("get", "psched", "-n", namespace).splitlines()
    assert header.split("  ")[0] == "NAME"
    assert header.replace("TIME ZONE", "TIME_ZONE").split()[1:] == [
        *("SCHEDULE", "TIME_ZONE", "SUSPEND", "ACTIVE", "LAST", "NEXT", "AGE")
    ]
    assert row.startswith("nightly")
    change = {
        "schedule": "@hourly",
        "suspend": True,
        "taskTemplate": {"spec": {"type": "embedding_generation", "kbId": "a"}},
    }
    change["taskTemplate"]["spec"] |= {"payload": {"texts": ["a"]}}  # type: ignore[index]
    kubectl("patch", "psched", "nightly", "-n", namespace, "--type=merge", "-p", json.dumps({"spec": change}))
    assert "nightly" in kubectl("get", "knowledge", "-n", namespace, "-o", "name")
