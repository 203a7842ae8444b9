"""What `ptask doctor` finds: a table over what there may be in a cluster."""

from dataclasses import replace
from typing import Any

import pytest

from ptask.doctor import Denied, Finding, Level, Seen, as_lines, diagnose, environment, worst
from tests.support.cli_tasks import NOW, ago, pod, task, waiting

RIGHTS = {"list tasks": True, "create tasks": True}
CLAIM = {"kind": "PersistentVolumeClaim", "status": {"phase": "Bound"}}
SECRET = "Secret processing-task-stores"
DENIED = Denied("cannot list: forbidden")


def crd(*versions: str, established: str = "True") -> dict[str, Any]:
    return {
        "metadata": {"name": "processingtasks.tasks.zzdsj.io"},
        "spec": {"versions": [{"name": version, "served": True} for version in versions]},
        "status": {"conditions": [{"type": "Established", "status": established, "message": "names conflict"}]},
    }


def operator(*, wanted: int = 1, ready: int = 1, **variables: str) -> dict[str, Any]:
    container = {"env": [{"name": name, "value": value} for name, value in variables.items()]}
    return {
        "metadata": {"namespace": "system", "name": "op-operator", "labels": {"app.kubernetes.io/version": "0.1.0"}},
        "spec": {"replicas": wanted, "template": {"spec": {"containers": [container]}}},
        "status": {"readyReplicas": ready},
    }


def lease(*, holder: str = "op-1", seconds: float = 3) -> dict[str, Any]:
    spec = {"holderIdentity": holder, "renewTime": ago(seconds=seconds), "leaseDurationSeconds": 15}
    return {"metadata": {"name": "op-operator"}, "spec": spec}


WELL = Seen(
    now=NOW,
    crds={"processingtasks": crd("v1"), "workerpools": crd("v1"), "processingschedules": crd("v1")},
    versions={"processingtasks": ["v1"], "workerpools": ["v1"], "processingschedules": ["v1"]},
    operators=[operator(OPERATOR_PRIORITY_CLASSES='{"high": "op-high", "low": ""}')],
    leases=[lease()],
    classes=[{"metadata": {"name": "op-high"}}],
    rights={"knowledge": RIGHTS},
    parts={"knowledge": {SECRET: {"kind": "Secret"}, "PersistentVolumeClaim documents": CLAIM}},
    pods={"knowledge": [pod(phase="Running")]},
    tasks={"knowledge": [task(), task("done", "Completed")]},
)


def test_an_installation_that_is_well_has_no_remedies() -> None:
    findings = diagnose(WELL)
    assert {finding.level for finding in findings} == {Level.OK}
    assert not [finding.remedy for finding in findings if finding.remedy]
    assert {"CRD processingtasks", "operator system/op-operator", "leader op-operator", "PriorityClasses"} <= {
        finding.subject for finding in findings
    }
    assert worst(findings) is Level.OK


def in_namespace(**given: Any) -> dict[str, Any]:
    return {part: {"knowledge": value} for part, value in given.items()}


@pytest.mark.parametrize(
    ("changes", "level", "subject", "words"),
    [
        ({"crds": {"processingtasks": None}}, "problem", "CRD processingtasks", "not installed → crds.enabled"),
        ({"crds": {"workerpools": None}}, "warning", "CRD workerpools", "no warm pools"),
        ({"crds": {"processingschedules": None}}, "warning", "CRD processingschedules", "no schedules"),
        ({"crds": {"processingtasks": crd("v2")}}, "problem", "CRD processingtasks", "serves v2 → the ptask of the release"),
        ({"crds": {"processingtasks": crd("v1", established="False")}}, "problem", "CRD processingtasks", "names conflict"),
        ({"crds": {"processingtasks": DENIED}}, "unknown", "CRD processingtasks", "forbidden → customresourcedefinitions"),
        ({"operators": []}, "problem", "operator", "no Deployment → --system-namespace"),
        ({"operators": DENIED}, "unknown", "operator", "forbidden → --system-namespace"),
        ({"operators": [operator(wanted=0, ready=0)]}, "problem", "operator system/op-operator", "0 → --replicas=1"),
        (
            {"operators": [operator(ready=0)], "operator_pods": [pod(**waiting("CrashLoopBackOff", "back-off 40s"))]},
            "problem", "operator system/op-operator", "0 of 1 pods ready CrashLoopBackOff back-off 40s → logs",
        ),
        ({"operators": [operator(wanted=2)]}, "warning", "operator system/op-operator", "1 of 2"),
        ({"leases": [lease(seconds=90)]}, "problem", "leader op-operator", "op-1 has not renewed 90 s → clocks"),
        ({"leases": [lease(holder="")]}, "problem", "leader op-operator", "nobody leads"),
        ({"leases": [], "operators": [operator(OPERATOR_LEASE_NAME="op")]}, "problem", "leader op", "no Lease"),
        ({"leases": DENIED}, "unknown", "leader", "forbidden"),
        ({"classes": []}, "problem", "PriorityClasses", "missing: op-high → priorityClasses.create"),
        ({"rights": {"knowledge": {"list tasks": True, "create tasks": False}}}, "warning", "knowledge: your rights",
         "create tasks → role edit"),
        ({"rights": {"knowledge": {"list tasks": False}}}, "problem", "knowledge: your rights", "list tasks"),
        (in_namespace(parts={SECRET: None}), "problem", f"knowledge: {SECRET}", "missing → taskNamespaces existingSecret"),
        (in_namespace(parts={SECRET: DENIED}), "unknown", f"knowledge: {SECRET}", "forbidden"),
        (in_namespace(parts={"PersistentVolumeClaim documents": CLAIM | {"status": {"phase": "Pending"}}}), "warning",
         "knowledge: PersistentVolumeClaim documents", "Pending → storageClassName"),
        (in_namespace(pods=[pod(**waiting("ImagePullBackOff"))]), "problem", "knowledge: pods",
         "handbook-1 (registry/runner:1) → imagePullSecrets"),
        (in_namespace(pods=[pod(**waiting("CreateContainerConfigError", 'secret "x" not found'))]), "problem",
         "knowledge: pods", 'secret "x" not found'),
        (in_namespace(pods=[pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "no room"}])]), "warning",
         "knowledge: pods", "no room → add a node"),
        (in_namespace(pods=DENIED), "unknown", "knowledge: pods", "forbidden"),
        (in_namespace(tasks=[task("lost", None)]), "problem", "knowledge: tasks", "looked at lost → taskNamespaces"),
        (in_namespace(tasks=[task(queue={"reason": "StoreUnavailable", "message": "no Milvus"})]), "problem",
         "knowledge: tasks", "handbook (no Milvus) → bring it back"),
        (in_namespace(tasks=[task(phase="Processing", startedAt=ago(hours=2), stage="parse")]), "warning",
         "knowledge: tasks", "handbook parse → ptask why"),
        (in_namespace(tasks=[task(f"lost-{n}", None) for n in range(9)]), "problem", "knowledge: tasks", "and 4 more"),
    ],
)  # fmt: skip
def test_each_thing_that_is_wrong_has_a_remedy(changes: dict[str, Any], level: str, subject: str, words: str) -> None:
    if "crds" in changes:
        changes = changes | {"crds": {**WELL.crds, **changes["crds"]}}
    findings = diagnose(replace(WELL, **changes))
    bad = [finding for finding in findings if finding.level is not Level.OK]
    assert [(finding.level, finding.subject) for finding in bad] == [(level, subject)], bad
    said, _, remedy = words.partition(" → ")
    assert bad[0].remedy or level == "warning"
    missing = [word for word in said.split(" ") if word not in bad[0].message]
    assert not missing, bad[0]
    assert not [word for word in remedy.split(" ") if word not in bad[0].remedy], bad[0]
    assert worst(findings) is Level(level)


def test_a_lease_that_is_renewed_while_it_is_looked_at_is_fresh_whatever_the_clocks_say() -> None:
    late = replace(WELL, leases=[lease(seconds=900)], alive=frozenset({"op-operator"}))
    assert worst(diagnose(late)) is Level.OK


def test_a_task_that_is_just_made_or_reports_progress_is_not_stuck() -> None:
    busy = task("busy", "Processing", startedAt=ago(hours=2))
    busy["metadata"]["managedFields"] = [{"subresource": "status", "time": ago(minutes=1)}]
    tasks = [task("new", None, created=ago(seconds=5)), busy]
    assert worst(diagnose(replace(WELL, tasks={"knowledge": tasks}))) is Level.OK


def test_a_health_check_tells_of_each_component() -> None:
    def component(name: str, *, healthy: bool) -> dict[str, Any]:
        return {"name": name, "healthy": healthy, "milliseconds": 5, "message": "" if healthy else "refused"}

    well = task("doctor-1", "Completed", result={"components": [component("redis", healthy=True)]})
    assert worst(diagnose(replace(WELL, health=well))) is Level.OK
    both = [component("redis", healthy=True), component("milvus", healthy=False)]
    ill = task("doctor-1", "Failed", result={"components": both}, error={"reason": "Unhealthy", "message": "milvus"})
    bad = [finding for finding in diagnose(replace(WELL, health=ill)) if finding.level is Level.PROBLEM]
    assert [finding.subject for finding in bad] == ["health check doctor-1", "health check doctor-1: milvus"]
    assert "refused" in bad[1].message
    assert "Secret" in bad[1].remedy
    late = diagnose(replace(WELL, health=task("doctor-1", queue={"reason": "Unschedulable"})))
    assert [finding.message for finding in late if finding.level is Level.PROBLEM] == ["is Queued, Unschedulable"]


def test_a_finding_is_printed_with_its_remedy_and_without_commands_for_the_terminal() -> None:
    lines = as_lines(Finding(Level.PROBLEM, "pods", "bad \x1b[2J image", "pull it"))
    assert lines == [("FAIL", "red", "pods: bad [2J image"), ("", "", "→ pull it")]


def test_settings_with_values_from_secrets_are_left_out() -> None:
    deployment = operator(OPERATOR_NAMESPACES="a,b")
    deployment["spec"]["template"]["spec"]["containers"][0]["env"].append({"name": "X", "valueFrom": {}})
    assert environment(deployment) == {"OPERATOR_NAMESPACES": "a,b"}
