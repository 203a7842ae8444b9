"""What nights are made of: stores that are down, pods that are taken away, a node that hangs. Nothing is lost or counted."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from devstack import installation, stores
from devstack.process import find
from task_contract.models import Phase, ProcessingTask
from tests.e2e.conftest import Installed
from tests.e2e.test_installation import document, long_text, poll, unique, verified

pytestmark = pytest.mark.e2e

MINUTES = timedelta(minutes=4)
DOWN = float(os.environ.get("STORE_DOWN_SECONDS", "8"))
"""So long a store is down; 600 is the promise (docs/operator.md), seconds suffice to see what becomes of tasks."""


def _pods(installed: Installed, task: ProcessingTask) -> list[Any]:
    found: list[Any] = installed.kubectl.get("pod", "-l", f"tasks.zzdsj.io/task-uid={task.metadata.uid}")["items"]
    return found


def _runs(installed: Installed, name: str) -> Callable[[], bool]:
    """Tell whether a task embeds: it has written something then."""
    return lambda: installed.client.get(name).status.phase is Phase.PROCESSING


def _uncounted(task: ProcessingTask) -> None:
    assert verified(task)
    assert [(one.number, one.reason) for one in task.status.attempts] == [(1, "Succeeded")], task.status.attempts


# -------------------------------------------------------------------------------------------------------------- stores


@contextlib.contextmanager
def _down(name: str) -> Iterator[None]:
    stores.stop(name)
    try:
        yield
    finally:
        stores.up()


@pytest.mark.parametrize("store", stores.NAMES)
def test_a_store_that_is_down_costs_time_and_no_attempt(installed: Installed, store: str) -> None:
    kb_id = unique("kb")
    running = unique("running")
    long_text(installed, f"{running}.txt", sentences=4_000)
    installed.client.submit(document(f"{running}.txt", kb_id=kb_id, retry={"limit": 0}), name=running)
    poll("it runs", _runs(installed, running), seconds=120)
    names = [running]
    with _down(store):
        back = time.monotonic() + DOWN
        for number in range(3):
            name = unique(f"waiting-{number}")
            long_text(installed, f"{name}.txt", sentences=20 + number)
            installed.client.submit(document(f"{name}.txt", kb_id=kb_id, retry={"limit": 0}), name=name)
            names.append(name)
        if store != "redis":  # without it nothing waits: it carries progress alone
            poll("a task says what it waits for", _waits(installed, names), seconds=120)
        while time.monotonic() < back:
            assert not [name for name in names if installed.client.get(name).status.phase is Phase.FAILED]
            time.sleep(1)
    for name in names:
        _uncounted(installed.client.wait(name, timeout=MINUTES))


def _waits(installed: Installed, names: list[str]) -> Callable[[], bool]:
    def look() -> bool:
        queues = [installed.client.get(name).status.queue for name in names]
        return any(queue is not None and queue.reason == "StoreUnavailable" for queue in queues)

    return look


# ---------------------------------------------------------------------------------------------------------------- pods


def test_a_cancel_reaches_the_pod_within_a_second_and_the_caller_within_five(installed: Installed) -> None:
    name = unique("cancel")
    long_text(installed, f"{name}.txt", sentences=60_000)
    task = installed.client.submit(document(f"{name}.txt", kb_id=unique("kb")), name=name)
    poll("it runs", _runs(installed, name), seconds=120)
    canceled = datetime.now(UTC)
    installed.client.cancel(name)
    ended = installed.client.wait(name, timeout=timedelta(seconds=30))
    assert ended.status.phase is Phase.CANCELED
    assert datetime.now(UTC) - canceled < timedelta(seconds=5)
    for pod in _pods(installed, task):
        told = datetime.fromisoformat(pod["metadata"]["deletionTimestamp"])
        grace = timedelta(seconds=pod["metadata"]["deletionGracePeriodSeconds"])
        assert told - grace - canceled <= timedelta(seconds=1), "SIGTERM follows the deletion at once"


def test_a_pod_that_is_evicted_as_in_a_drain_is_replaced(installed: Installed) -> None:
    name = unique("evicted")
    long_text(installed, f"{name}.txt", sentences=6_000)
    task = installed.client.submit(document(f"{name}.txt", kb_id=unique("kb"), retry={"limit": 0}), name=name)
    poll("it runs", _runs(installed, name), seconds=120)
    [pod] = _pods(installed, task)
    metadata = {"name": pod["metadata"]["name"], "namespace": installation.TASK_NAMESPACE}
    eviction = json.dumps({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata})
    path = f"/api/v1/namespaces/{installation.TASK_NAMESPACE}/pods/{pod['metadata']['name']}/eviction"
    installed.kubectl("create", "--raw", path, "-f", "-", stdin=eviction)
    _uncounted(installed.client.wait(name, timeout=MINUTES))


def test_a_pod_that_is_preempted_waits_for_room_and_is_not_counted(installed: Installed) -> None:
    name = unique("preempted")
    long_text(installed, f"{name}.txt", sentences=20_000)
    spec = document(f"{name}.txt", kb_id=unique("kb"), priority="low", retry={"limit": 0})
    task = installed.client.submit(spec, name=name)
    poll("it runs", _runs(installed, name), seconds=120)
    [pod] = _pods(installed, task)
    with _everything_taken(installed, image=pod["spec"]["containers"][0]["image"]):
        installed.kubectl("wait", f"ptask/{name}", "--for=jsonpath={.status.queue.reason}=Unschedulable", "--timeout=120s")
        assert installed.client.get(name).status.phase is Phase.QUEUED
    _uncounted(installed.client.wait(name, timeout=MINUTES))


@contextlib.contextmanager
def _everything_taken(installed: Installed, *, image: str) -> Iterator[None]:
    """Run a pod of high priority that needs what the node has but a little: the scheduler makes room for it."""
    name = unique("greedy")
    classes = [one["metadata"]["name"] for one in installed.kubectl.get("priorityclass")["items"]]
    priority_class = next(one for one in classes if one.startswith(installation.RELEASE) and one.endswith("high"))
    node = next(one for one in installed.kubectl.get("node")["items"] if "cpu" in one["status"].get("allocatable", {}))
    millis = 1000 * int(node["status"]["allocatable"]["cpu"])
    used = sum(_cpu(pod) for pod in installed.kubectl.get("pod", "-A")["items"] if _counts(pod))
    tasks = sum(_cpu(pod) for pod in installed.kubectl.get("pod")["items"] if _counts(pod))
    wanted = millis - (used - tasks) - 50
    pod = f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  priorityClassName: {priority_class}
  securityContext: {{runAsNonRoot: true, runAsUser: 65532, seccompProfile: {{type: RuntimeDefault}}}}
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 0
  containers:
    - name: greedy
      image: {image}
      imagePullPolicy: IfNotPresent
      command: [sleep, "600"]
      resources: {{requests: {{cpu: {wanted}m}}}}
      securityContext: {{allowPrivilegeEscalation: false, capabilities: {{drop: [ALL]}}}}
"""
    installed.kubectl("apply", "-f", "-", stdin=pod)
    try:
        yield
    finally:
        installed.kubectl("delete", "pod", name, "--grace-period=0", "--force")


def _cpu(pod: dict[str, Any]) -> int:
    """Return a pod's request in thousandths of a CPU."""
    total = 0
    for container in pod["spec"]["containers"]:
        text = str(container.get("resources", {}).get("requests", {}).get("cpu", "0"))
        total += int(text[:-1]) if text.endswith("m") else int(float(text) * 1000)
    return total


def _counts(pod: dict[str, Any]) -> bool:
    return pod["status"].get("phase") not in {"Succeeded", "Failed"}


def test_a_job_deleted_by_hand_costs_an_attempt_and_not_the_task(installed: Installed) -> None:
    name = unique("by-hand")
    long_text(installed, f"{name}.txt", sentences=6_000)
    retry = {"limit": 1, "initialDelay": "1s"}
    installed.client.submit(document(f"{name}.txt", kb_id=unique("kb"), retry=retry), name=name)
    poll("it runs", _runs(installed, name), seconds=120)
    installed.kubectl("delete", "job", str(installed.client.get(name).status.job), "--wait=false")
    task = installed.client.wait(name, timeout=MINUTES)
    verified(task)
    assert [one.reason for one in task.status.attempts] == ["JobDeleted", "Succeeded"]


# ---------------------------------------------------------------------------------------------------------------- node


@pytest.mark.long
def test_a_node_that_hangs_loses_the_attempt_within_three_minutes_and_publishes_nothing_when_it_is_back(
    installed: Installed,
) -> None:
    kb_id, name = unique("kb"), unique("hangs")
    long_text(installed, f"{name}.txt", sentences=6_000)
    task = installed.client.submit(document(f"{name}.txt", kb_id=kb_id, retry={"limit": 0}), name=name)
    poll("it runs", _runs(installed, name), seconds=120)
    [pod] = _pods(installed, task)
    kubelet, runner = find("kubelet"), _process_of(pod["metadata"]["uid"])
    assert kubelet is not None
    begun = time.monotonic()
    os.kill(kubelet.pid, signal.SIGSTOP)
    os.kill(runner, signal.SIGSTOP)
    try:
        installed.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
        poll("another pod is made", lambda: len(_pods(installed, task)) == 2, seconds=170)
        os.kill(runner, signal.SIGCONT)  # it wants to publish now, with nobody there to tell it to stop
        poll("the first runner has ended by itself", lambda: not _is_there(runner), seconds=120)
        assert installed.client.get(name).status.phase is Phase.QUEUED, "the first one has published"
    finally:
        os.kill(kubelet.pid, signal.SIGCONT)
    _uncounted(installed.client.wait(name, timeout=MINUTES))
    assert time.monotonic() - begun < 180
    poll("the first pod is gone", lambda: len(_pods(installed, task)) <= 1, seconds=60)


def _process_of(pod_uid: str) -> int:
    """Return the number, on this machine, of the process of a pod's runner."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"TASKS_HOLDER={pod_uid}".encode() in (entry / "environ").read_bytes():
                command = (entry / "cmdline").read_bytes().split(b"\0")
                if b"job_runner" in command and b"run" in command:
                    return int(entry.name)
    raise AssertionError(f"no process of pod {pod_uid} on this machine")


def _is_there(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# ----------------------------------------------------------------------------------------------------------- operators


def test_of_two_operators_the_other_one_goes_on_when_the_leader_is_killed(installed: Installed) -> None:
    system = ["-n", installation.SYSTEM_NAMESPACE]
    deployment = f"deploy/{installation.RELEASE}-operator"

    def scale(replicas: int) -> None:
        installed.kubectl("scale", deployment, f"--replicas={replicas}", *system)
        installed.kubectl("rollout", "status", deployment, "--timeout=90s", *system)

    def leader() -> str:
        """Return the name of the pod that the Lease names, which may be gone."""
        answer = installed.kubectl("get", "lease", f"{installation.RELEASE}-operator", "-o", "json", *system)
        return str(json.loads(answer)["spec"]["holderIdentity"]).partition("_")[0]

    name = unique("two")
    scale(2)
    try:
        first = leader()
        installed.kubectl("delete", "pod", first, "--grace-period=0", "--force", *system)
        began = time.monotonic()
        installed.client.submit({"type": "health_check"}, name=name)
        task = installed.client.wait(name, timeout=MINUTES)
        assert task.status.phase is Phase.COMPLETED, task.status.error
        assert leader() != first
        assert time.monotonic() - began < 60
    finally:
        scale(1)
