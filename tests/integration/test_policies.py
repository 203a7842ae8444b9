"""The admission policies of manifests/policies on a real API server: who is refused, with which words."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from task_gateway.models import CREATED_BY
from tests.support.chart import NAMESPACE, ROOT
from tests.support.devstack import Kubectl

POLICIES = ROOT / "manifests/policies"
ACCOUNTS = ("operator", "gateway")
SECONDS = 30.0  # in which an API server has heard of a policy, a binding or a right

pytestmark = pytest.mark.integration

Attempt = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def policies(kubectl: Kubectl, namespace: str) -> Iterator[None]:
    """The policies, named after the namespace and bound to it alone: other tests have the API server in common."""
    documents = [
        one for name in ("priority", "images") for one in yaml.safe_load_all((POLICIES / f"{name}.yaml").read_text())
    ]
    for one in documents:
        if one["kind"] == "ValidatingAdmissionPolicy":
            for part in (*one["spec"]["matchConditions"], *one["spec"]["variables"]):
                for account in ACCOUNTS:
                    own = f"{namespace}:{account}"
                    part["expression"] = part["expression"].replace(f"{NAMESPACE}:processing-tasks-{account}", own)
        one["metadata"]["name"] = one["metadata"]["name"].replace("processing-tasks", namespace)
        if one["kind"] == "ValidatingAdmissionPolicyBinding":
            only = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
            one["spec"] |= {"policyName": one["metadata"]["name"], "matchResources": only}
    kubectl.apply(*documents)
    try:
        yield
    finally:
        kinds = "validatingadmissionpolicybinding,validatingadmissionpolicy"
        names = [one["metadata"]["name"] for one in documents if one["kind"] == "ValidatingAdmissionPolicy"]
        kubectl("delete", kinds, *names)
        kubectl("delete", "clusterrole", f"{namespace}-prioritize")


@pytest.fixture
def account(kubectl: Kubectl, namespace: str) -> Callable[[str], list[str]]:
    """Make an account that may make and change tasks, and make Jobs; return the options that make kubectl it."""

    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "editors", "namespace": namespace},
        "rules": [
            {"apiGroups": ["tasks.zzdsj.io"], "resources": ["processingtasks"], "verbs": ["create", "get", "patch"]},
            {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create"]},
        ],
    }
    kubectl.apply(role)

    def make(name: str) -> list[str]:
        kubectl("create", "serviceaccount", name, "-n", namespace)
        kubectl("create", "rolebinding", name, "-n", namespace, "--role=editors", f"--serviceaccount={namespace}:{name}")
        return ["-n", namespace, "--as", f"system:serviceaccount:{namespace}:{name}"]

    return make


def task(name: str, priority: str | None) -> str:
    spec = {"type": "health_check"} | ({"priority": priority} if priority else {})
    return json.dumps(
        {"apiVersion": "tasks.zzdsj.io/v1", "kind": "ProcessingTask", "metadata": {"name": name}, "spec": spec}
    )


def until(expected: int, attempt: Callable[[], "subprocess.CompletedProcess[str]"]) -> str:
    """Repeat ATTEMPT until it ends as EXPECTED; return what it said."""
    deadline = time.monotonic() + SECONDS
    while (done := attempt()).returncode != expected:
        assert time.monotonic() < deadline, done.stdout + done.stderr
        time.sleep(0.2)
    return done.stdout + done.stderr


@pytest.mark.usefixtures("policies")
def test_high_is_for_who_may_prioritize(kubectl: Kubectl, namespace: str, account: Callable[[str], list[str]]) -> None:
    editor = account("editor")

    def create(name: str, priority: str | None, *options: str) -> "subprocess.CompletedProcess[str]":
        return kubectl.attempt("create", "-f=-", *editor, *options, stdin=task(name, priority))

    for priority in (None, "normal", "low"):
        until(0, lambda priority=priority: create("any", priority, "--dry-run=server"))  # type: ignore[misc]
    said = until(1, lambda: create("urgent", "high", "--dry-run=server"))
    who = f"system:serviceaccount:{namespace}:editor"
    assert f"spec.priority: {who} may not set high in namespace {namespace}: use normal or low, or ask for the verb" in said
    assert "Forbidden" in said

    assert create("calm", "low").returncode == 0
    raised = ["patch", "ptask/calm", "--type=merge", '-p={"spec":{"priority":"high"}}']
    assert "may not set high" in kubectl.attempt(*raised, *editor).stderr

    # The administrator has every verb; what is high stays in the hands of who may change tasks.
    kubectl("create", "-f=-", "-n", namespace, stdin=task("urgent", "high"))
    kubectl("patch", "ptask/urgent", "--type=merge", '-p={"spec":{"cancel":true}}', *editor)

    grant = ["create", "rolebinding", "prioritize", "-n", namespace, f"--clusterrole={namespace}-prioritize"]
    kubectl(*grant, f"--serviceaccount={namespace}:editor")
    until(0, lambda: create("granted", "high", "--dry-run=server"))
    kubectl(*raised, *editor)


@pytest.mark.usefixtures("policies")
def test_through_the_gateway_the_service_that_sent_the_task_is_judged(
    kubectl: Kubectl, namespace: str, account: Callable[[str], list[str]]
) -> None:
    gateway, other = account("gateway"), account("other")
    grant = ["create", "rolebinding", "prioritize", "-n", namespace, f"--clusterrole={namespace}-prioritize"]
    kubectl(*grant, f"--serviceaccount={namespace}:favoured")
    favoured, plain = (f"system:serviceaccount:{namespace}:{name}" for name in ("favoured", "plain"))

    def send(who: list[str], sender: str | None) -> "subprocess.CompletedProcess[str]":
        manifest = json.loads(task("urgent", "high"))
        manifest["metadata"]["annotations"] = {CREATED_BY: sender} if sender else {}
        return kubectl.attempt("create", "-f=-", "--dry-run=server", *who, stdin=json.dumps(manifest))

    until(1, lambda: send(gateway, plain))  # the policy is at work
    until(0, lambda: send(gateway, favoured))
    cases: list[tuple[list[str], str | None, str]] = [
        (gateway, plain, plain),
        (gateway, None, f"system:serviceaccount:{namespace}:gateway"),
        (gateway, "ann@example.com", f"system:serviceaccount:{namespace}:gateway"),
        (gateway, f"{favoured}:more", f"system:serviceaccount:{namespace}:gateway"),
        # What others write into the annotation tells nothing.
        (other, favoured, f"system:serviceaccount:{namespace}:other"),
    ]
    for who, sender, judged in cases:
        done = send(who, sender)
        assert done.returncode == 1, sender
        assert f"spec.priority: {judged} may not set high" in done.stderr

    # A change is the gateway's, whoever sent the task.
    manifest = json.loads(task("calm", "low"))
    manifest["metadata"]["annotations"] = {CREATED_BY: favoured}
    kubectl("create", "-f=-", "-n", namespace, stdin=json.dumps(manifest))
    raised = ["patch", "ptask/calm", "--type=merge", '-p={"spec":{"priority":"high"}}']
    assert f"{namespace}:gateway may not set high" in kubectl.attempt(*raised, *gateway).stderr


def job(name: str, *images: str, before: str | None = None) -> str:
    secure: dict[str, Any] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    made = [{"name": f"c{number}", "image": image, "securityContext": secure} for number, image in enumerate(images)]
    pod: dict[str, Any] = {"restartPolicy": "Never", "containers": made}
    if before:
        pod["initContainers"] = [{"name": "before", "image": before, "securityContext": secure}]
    spec = {"suspend": True, "template": {"spec": pod}}
    return json.dumps({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec})


RUNNER = "registry.example.com/processing-tasks/runner"
IMAGES: list[tuple[str, dict[str, Any], str | None]] = [
    ("a tag", {"images": [f"{RUNNER}:0.1.0"]}, None),
    ("a digest", {"images": [f"{RUNNER}@sha256:{'0' * 64}"], "before": f"{RUNNER}:0.1.0"}, None),
    ("another image", {"images": ["docker.io/library/alpine:3"]}, "docker.io/library/alpine:3"),
    ("begins alike", {"images": [f"{RUNNER}-of-others:1"]}, f"{RUNNER}-of-others:1"),
    ("beside a good one", {"images": [f"{RUNNER}:0.1.0", "alpine"]}, "alpine"),
    ("before a good one", {"images": [f"{RUNNER}:0.1.0"], "before": "alpine"}, "alpine"),
]


@pytest.mark.usefixtures("policies")
def test_the_operator_runs_images_of_the_list_alone(
    kubectl: Kubectl, namespace: str, account: Callable[[str], list[str]]
) -> None:
    operator, somebody = account("operator"), account("somebody")

    def create(who: list[str], **of: Any) -> "subprocess.CompletedProcess[str]":
        manifest = job("work", *of["images"], before=of.get("before"))
        return kubectl.attempt("create", "-f=-", "--dry-run=server", *who, stdin=manifest)

    until(1, lambda: create(operator, images=["alpine"]))  # the policy is at work
    for case, of, refused in IMAGES:
        said = until(0 if refused is None else 1, lambda of=of: create(operator, **of))  # type: ignore[misc]
        if refused is not None:
            assert f"image {refused} is not one that the operator may run: set runner.image" in said, case
            assert f"to one of {RUNNER}:, {RUNNER}@" in said, case
    assert create(somebody, images=["alpine"]).returncode == 0, "the list is for the operator"


def test_the_policies_name_the_accounts_that_the_chart_makes() -> None:
    accounts = {
        one["metadata"]["name"].removeprefix("processing-tasks-"): one["spec"]["template"]["spec"]["serviceAccountName"]
        for one in yaml.safe_load_all((ROOT / "manifests/install.yaml").read_text())
        if one["kind"] == "Deployment"
    }
    assert accounts == {account: f"processing-tasks-{account}" for account in ACCOUNTS}
    for file, account in (("images", "operator"), ("priority", "gateway")):
        assert f"'system:serviceaccount:{NAMESPACE}:{accounts[account]}'" in (POLICIES / f"{file}.yaml").read_text()
    assert CREATED_BY in (POLICIES / "priority.yaml").read_text()


@pytest.mark.usefixtures("policies")
def test_the_types_of_the_expressions_fit(kubectl: Kubectl, namespace: str) -> None:
    """The API server compares them with the schemas of what they are about, and tells in the status."""
    for policy in ("priority", "images"):
        name = f"validatingadmissionpolicy/{namespace}-{policy}"
        kubectl("wait", name, "--for=jsonpath={.status.observedGeneration}=1", "--timeout=30s")
        assert kubectl.get(name)["status"].get("typeChecking", {}) == {}
