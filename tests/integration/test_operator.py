"""The operator as a process, on a real API server with its controllers: what a task's author and its neighbours see."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from devstack import Endpoints
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Failure, Result
from task_contract.names import job_name
from task_operator.cluster import Cluster
from task_platform.kubernetes import Access, Conflict, Invalid
from tests.support.devstack import Kubectl
from tests.support.operator_lab import Kubelet, OperatorProcess, Place, Proxy, ended, running, until

pytestmark = pytest.mark.integration

SUCCESS = AttemptOutcome(
    outcome=Outcome.SUCCEEDED, attempt=1, reason="Completed", result=Result(documents=1, chunks=87, milvus_count=87)
)


def outcome(kind: Outcome, reason: str, *, retryable: bool = True) -> AttemptOutcome:
    error = Failure(reason=reason, message=f"cannot go on: {reason}", retryable=retryable, stage="parse")
    return AttemptOutcome(outcome=kind, attempt=1, reason=reason, error=error)


Start = Callable[..., OperatorProcess]


@pytest.fixture
async def proxy(cluster: Endpoints, tmp_path: Path) -> AsyncIterator[Proxy]:
    proxy = Proxy(Access.from_kubeconfig(cluster.kubeconfig), folder=tmp_path)
    await proxy.start()
    yield proxy
    await proxy.aclose()


def _conditions(status: dict[str, Any]) -> dict[str, str]:
    return {one["type"]: f"{one['status']}/{one['reason']}" for one in status["conditions"]}


async def test_a_task_runs_and_kubectl_can_wait_for_it(place: Place, process: Start, cluster: Endpoints) -> None:
    async with process().at_work(), Kubelet(place, outcomes={1: SUCCESS}).at_work():
        made = await place.create(priority="high")
        kubectl = Kubectl(cluster, place.namespace)
        wait = ["wait", "ptask/handbook", "--for=condition=Succeeded", "--timeout=60s"]
        await asyncio.to_thread(kubectl, *wait)
        status = await place.status()
        jobs = await place.objects("jobs")

    assert status["phase"] == "Completed"
    assert status["result"] == {"documents": 1, "chunks": 87, "milvusCount": 87}
    assert status["attempt"] == 1
    assert status["progress"] == 100
    assert status["observedGeneration"] == 1
    assert _conditions(status) == {"Ready": "True/Completed", "Succeeded": "True/Completed"}
    # A Job stays for its logs as long as its task.
    assert [job["metadata"]["name"] for job in jobs] == [
        job_name(task_name="handbook", task_uid=made["metadata"]["uid"], attempt=1)
    ]
    assert status["job"] == jobs[0]["metadata"]["name"]
    owner = jobs[0]["metadata"]["ownerReferences"][0]
    assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (made["metadata"]["uid"], True, True)
    columns = await asyncio.to_thread(kubectl, "get", "ptask", "handbook", "-o", "wide", "--no-headers")
    assert columns.split()[:7] == ["handbook", "document_processing", "kb-42", "high", "Completed", "100", "1"]


async def test_every_write_names_its_manager_and_every_object_its_application(place: Place, process: Start) -> None:
    async with process(OPERATOR_INSTANCE="release-1").at_work(), Kubelet(place, outcomes={1: SUCCESS}).at_work():
        await place.create()
        await place.wait_for("Completed")
        task, jobs, pods = await place.task(), await place.objects("jobs"), await place.objects("pods")

    assert task is not None
    managers = {(one["manager"], one.get("subresource")) for one in task["metadata"]["managedFields"]}
    assert ("processing-tasks-operator", "status") in managers
    assert {one["manager"] for one in jobs[0]["metadata"]["managedFields"] if one.get("subresource") is None} == {
        "processing-tasks-operator"
    }
    for made in (jobs[0], pods[0]):
        labels = made["metadata"]["labels"]
        assert {name.removeprefix("app.kubernetes.io/"): value for name, value in labels.items() if "app.k" in name} == {
            "name": "processing-task-runner",
            "instance": "release-1",
            "component": "runner",
            "part-of": "processing-tasks",
            "managed-by": "processing-tasks",
            "version": version("processing-tasks"),
        }


async def test_a_permanent_failure_ends_the_task_at_once(place: Place, process: Start) -> None:
    broken = outcome(Outcome.FAILED, "DocumentUnreadable", retryable=False)
    async with process().at_work(), Kubelet(place, outcomes={1: broken}).at_work():
        await place.create()
        status = await place.wait_for("Failed")
        jobs = await place.objects("jobs")

    assert status["error"] == {
        "reason": "DocumentUnreadable",
        "message": "cannot go on: DocumentUnreadable",
        "retryable": False,
        "stage": "parse",
    }
    assert _conditions(status) == {
        "Ready": "False/DocumentUnreadable",
        "Succeeded": "False/DocumentUnreadable",
        "Stalled": "True/DocumentUnreadable",
    }
    assert [(one["number"], one["reason"]) for one in status["attempts"]] == [(1, "DocumentUnreadable")]
    reasons = [one["reason"] for one in jobs[0]["status"]["conditions"] if one["type"] == "Failed"]
    assert reasons == ["PodFailurePolicy"]


async def test_attempts_end_at_the_limit(place: Place, process: Start) -> None:
    again = outcome(Outcome.FAILED, "ParserCrashed")
    async with process().at_work(), Kubelet(place, outcomes={1: again, 2: again, 3: again}).at_work():
        await place.create(retry={"limit": 1, "initialDelay": "1s", "maxDelay": "1s", "jitter": 0})
        status = await place.wait_for("Failed")

    assert [one["number"] for one in status["attempts"]] == [1, 2]
    assert status["error"]["reason"] == "ParserCrashed"


async def test_kubectl_describe_tells_retries_and_failures_once(
    place: Place, process: Start, cluster: Endpoints, tmp_path: Path
) -> None:
    again = outcome(Outcome.FAILED, "ParserCrashed")
    operator = process(OPERATOR_INSTANCE="release-1")
    async with operator.at_work(), Kubelet(place, outcomes={1: again, 2: again}).at_work():
        await place.create(retry={"limit": 1, "initialDelay": "1s", "maxDelay": "1s", "jitter": 0})
        await place.wait_for("Failed")

        async def told() -> list[dict[str, Any]]:
            path = f"/apis/events.k8s.io/v1/namespaces/{place.namespace}/events"
            listed = await place.kube.do("GET", path, fieldSelector="regarding.kind=ProcessingTask")
            return list(listed["items"]) if len(listed["items"]) >= 2 else []

        await until("the Events are there", told)
        operator.kill()
        operator.start()
        await operator.ready()
        events = await told()
        shown = await asyncio.to_thread(Kubectl(cluster, place.namespace), "describe", "ptask", "handbook")

    assert sorted(event["reason"] for event in events) == ["Failed", "Retrying"]
    assert {event["type"] for event in events} == {"Warning"}
    assert events[0]["metadata"]["labels"]["app.kubernetes.io/instance"] == "release-1"
    assert {one["manager"] for event in events for one in event["metadata"]["managedFields"]} == {
        "processing-tasks-operator"
    }
    table = shown[shown.index("Events:") :]
    assert "attempt 1 failed (ParserCrashed): cannot go on: ParserCrashed; the next one starts at" in table
    assert "Failed" in table
    assert "tasks.zzdsj.io/operator" in table


async def test_events_that_are_refused_change_nothing(place: Place, process: Start, proxy: Proxy) -> None:
    def forbid(method: str, path: str) -> web.Response | None:
        if "/events" not in path:
            return None
        body = {"kind": "Status", "reason": "Forbidden", "message": "events is forbidden: cannot create"}
        return web.Response(status=403, text=json.dumps(body), content_type="application/json")

    proxy.refuse = forbid
    again = outcome(Outcome.FAILED, "ParserCrashed")
    operator = process(kubeconfig=proxy.kubeconfig)
    async with operator.at_work(), Kubelet(place, outcomes={1: again}).at_work():
        await place.create()
        await place.wait_for("Completed")
        assert 'task_operator_events_total{result="failed"} 1.0' in (await operator.get("/metrics"))[1]


async def test_a_store_that_is_down_costs_no_attempt(place: Place, process: Start) -> None:
    down = outcome(Outcome.GIVEN_BACK, "StoreUnavailable")
    kubelet = Kubelet(place, outcomes={1: down})
    async with process().at_work(), kubelet.at_work():
        await place.create()
        status = await place.wait_for("Queued", reason="StoreUnavailable")
        assert status["queue"]["reason"] == "StoreUnavailable"
        assert status["attempt"] == 1
        assert status.get("attempts", []) == []
        kubelet.outcomes = {1: SUCCESS}
        status = await place.wait_for("Completed")

    assert status["attempt"] == 1
    assert [(one["number"], one["reason"]) for one in status["attempts"]] == [(1, "Succeeded")]
    assert len(kubelet.jobs) == 2


async def test_a_task_that_is_suspended_gives_its_attempt_back_and_runs_again(place: Place, process: Start) -> None:
    kubelet = Kubelet(place, outcomes={1: None})
    async with process().at_work(), kubelet.at_work():
        await place.create()
        await place.wait_for("Processing")
        await place.edit(suspend=True)
        status = await place.wait_for("Queued", reason="Suspended")
        assert status["attempt"] == 1

        async def gone() -> bool:
            return not await place.objects("jobs") and not await place.objects("pods")

        await until("Job and pod are gone", gone)
        kubelet.outcomes = {1: SUCCESS}
        await place.edit(suspend=False)
        status = await place.wait_for("Completed")

    assert [(one["number"], one["reason"]) for one in status["attempts"]] == [(1, "Succeeded")]


async def test_a_canceled_task_ends_with_its_pod(place: Place, process: Start) -> None:
    async with process().at_work(), Kubelet(place, outcomes={1: None}).at_work():
        await place.create()
        await place.wait_for("Processing")
        await place.edit(cancel=True)
        status = await place.wait_for("Canceled")
        # Without PostgreSQL there is no fence: the end is not told before the pod is gone.
        assert await place.objects("pods") == []
        assert await place.objects("jobs") == []

    assert _conditions(status) == {"Ready": "False/Canceled", "Succeeded": "False/Canceled", "Stalled": "True/Canceled"}


async def test_a_job_deleted_by_hand_is_a_counted_attempt(place: Place, process: Start) -> None:
    kubelet = Kubelet(place, outcomes={1: None})
    async with process().at_work(), kubelet.at_work():
        await place.create()
        status = await place.wait_for("Processing")
        path = place.path("jobs", status["job"])
        await place.kube.do("DELETE", path, {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"})
        status = await place.wait_for("Completed")

    assert [(one["number"], one["reason"]) for one in status["attempts"]] == [(1, "JobDeleted"), (2, "Succeeded")]


async def test_an_eviction_costs_no_attempt(place: Place, process: Start) -> None:
    kubelet = Kubelet(place, outcomes={1: None})
    async with process().at_work(), kubelet.at_work():
        await place.create()
        await place.wait_for("Processing")
        pod = (await place.objects("pods"))[0]
        name = pod["metadata"]["name"]
        kubelet.starts = False
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": place.namespace}}
        await place.kube.do("POST", place.path("pods", name) + "/eviction", eviction)
        # What a kubelet does with a pod that is to go: it ends the container.
        await kubelet.write(pod, ended(outcome(Outcome.GIVEN_BACK, "HandedBack")))
        await place.wait_for("Queued")
        kubelet.outcomes, kubelet.starts = {1: SUCCESS}, True
        status = await place.wait_for("Completed")

    assert [(one["number"], one["reason"]) for one in status["attempts"]] == [(1, "Succeeded")]
    assert len(kubelet.jobs) == 1
    assert len(kubelet.pods) == 2


async def test_why_a_task_does_not_run_stands_in_its_status(place: Place, process: Start) -> None:
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "1"}}}
    await place.kube.do("POST", place.path("resourcequotas"), quota)

    async def counted() -> bool:
        found = (await place.objects("resourcequotas"))[0]
        return "hard" in found.get("status", {})

    await until("the quota is known", counted)
    async with process().at_work():
        await place.create("first")
        status = await place.wait_for("Queued", reason="Unschedulable", name="first")
        assert status["queue"]["message"]
        await place.create("second")
        status = await place.wait_for("Queued", reason="QuotaExceeded", name="second")
        assert "exceeded quota" in status["queue"]["message"]
        await place.kube.do("DELETE", place.path("resourcequotas", "none"))
        await place.wait_for("Queued", reason="Unschedulable", name="second")


async def test_an_image_that_cannot_be_pulled_is_named(place: Place, process: Start) -> None:
    async with process().at_work():
        await place.create()

        async def pods() -> list[dict[str, Any]]:
            return await place.objects("pods")

        pod = (await until("the pod is made", pods))[0]
        waiting = {"reason": "ErrImagePull", "message": "no such image"}
        state = {"name": "runner", "image": "i", "imageID": "", "restartCount": 0, "ready": False}
        scheduled = {"type": "PodScheduled", "status": "True"}
        status = {"containerStatuses": [state | {"state": {"waiting": waiting}}], "conditions": [scheduled]}
        await Kubelet(place).write(pod, status)
        found = await place.wait_for("Queued", reason="ImagePullBackOff")
        assert found["queue"]["message"] == "no such image"


async def test_a_deleted_task_takes_its_job_and_pod_with_it(place: Place, process: Start) -> None:
    async with process().at_work(), Kubelet(place, outcomes={1: None}).at_work():
        await place.create()
        await place.wait_for("Processing")
        await place.kube.do("DELETE", place.path("processingtasks", "handbook"))

        async def gone() -> bool:
            return not await place.objects("jobs") and not await place.objects("pods")

        await until("Job and pod are gone", gone)
        assert await place.task() is None  # no finalizer holds it


async def test_a_finished_task_is_deleted_after_its_ttl(place: Place, process: Start) -> None:
    async with process().at_work(), Kubelet(place).at_work():
        await place.create(ttlSecondsAfterFinished=2)
        await place.wait_for("Completed")

        async def gone() -> bool:
            return await place.task() is None

        await until("the task is gone", gone, seconds=20)


async def test_a_deadline_ends_a_task_that_never_ran_and_none_of_its_neighbours(place: Place, process: Start) -> None:
    async with process().at_work(), Kubelet(place).at_work():
        await place.create("good")
        await place.create("late", deadline="1s", suspend=True)
        late = await place.wait_for("Failed", name="late")
        await place.wait_for("Completed", name="good")

    assert late["error"]["reason"] == "DeadlineExceeded"
    assert late["attempt"] == 0


async def test_jobs_of_tasks_that_are_gone_are_deleted(place: Place, process: Start) -> None:
    async with process().at_work():
        await place.create()

        async def jobs() -> list[dict[str, Any]]:
            return await place.objects("jobs")

        made = (await until("the Job is made", jobs))[0]
    # An owner that does not exist any more, as after an orphaning deletion or a restored backup.
    orphan = {"apiVersion": "batch/v1", "kind": "Job", "spec": made["spec"]}
    orphan["spec"].pop("selector")
    for label in ("controller-uid", "batch.kubernetes.io/controller-uid", "job-name", "batch.kubernetes.io/job-name"):
        orphan["spec"]["template"]["metadata"]["labels"].pop(label, None)
    labels = made["metadata"]["labels"]
    owner = made["metadata"]["ownerReferences"][0] | {"name": "gone", "uid": "11111111-1111-4111-8111-111111111111"}
    orphan["metadata"] = {"name": "orphan", "labels": labels, "ownerReferences": [owner]}
    await place.kube.do("POST", place.path("jobs"), orphan)
    async with process().at_work():

        async def only_ours() -> bool:
            return [job["metadata"]["name"] for job in await jobs()] == [made["metadata"]["name"]]

        await until("the orphan is gone", only_ours, seconds=30)


# ------------------------------------------------------------------------------------------------- faults on the way


async def test_watches_that_break_lose_nothing(place: Place, process: Start, proxy: Proxy) -> None:
    async with process(kubeconfig=proxy.kubeconfig).at_work(), Kubelet(place).at_work():
        for number in range(5):
            proxy.cut_watches()
            await place.create(f"task-{number}")
        for number in range(5):
            await place.wait_for("Completed", name=f"task-{number}")


async def test_an_api_server_that_has_trouble_loses_nothing(place: Place, process: Start, proxy: Proxy) -> None:
    left = {"429": 2, "500": 2, "503": 2}
    headers = {"Retry-After": "1"}

    def trouble(method: str, path: str) -> web.Response | None:
        if method == "GET":
            return None
        for status, count in left.items():
            if count:
                left[status] -= 1
                body = json.dumps({"kind": "Status", "message": "try later", "reason": "Trouble"})
                return web.Response(status=int(status), text=body, headers=headers, content_type="application/json")
        return None

    async with process(kubeconfig=proxy.kubeconfig).at_work(), Kubelet(place).at_work():
        proxy.refuse = trouble
        await place.create("one")
        await place.create("two")
        for name in ("one", "two"):
            status = await place.wait_for("Completed", name=name, seconds=90)
            assert [one["number"] for one in status["attempts"]] == [1]
    assert sum(left.values()) == 0


async def test_an_api_server_too_busy_for_lists_and_watches_loses_nothing(
    place: Place, process: Start, proxy: Proxy
) -> None:
    """As API Priority and Fairness answers where the queues of a flow are full."""
    left: dict[str, int] = {}

    def busy(method: str, path: str) -> web.Response | None:
        kind = path.rpartition("/")[2]
        if method != "GET" or not left.get(kind):
            return None
        left[kind] -= 1
        body = {"kind": "Status", "reason": "TooManyRequests", "code": 429, "message": "too many requests"}
        return web.json_response(body, status=429, headers={"Retry-After": "1"})

    proxy.refuse = busy
    left |= {"processingtasks": 4, "jobs": 4, "processingschedules": 2, "workerpools": 2}
    operator = process(kubeconfig=proxy.kubeconfig)
    async with operator.at_work(), Kubelet(place).at_work():
        await place.create("one")
        await place.wait_for("Completed", name="one")
        assert left["processingtasks"] == left["jobs"] == 0
        left |= {"processingtasks": 4, "jobs": 4, "pods": 2}
        proxy.cut_watches()
        await place.create("two")
        await place.wait_for("Completed", name="two", seconds=90)
        assert left["processingtasks"] == left["jobs"] == 0
        assert operator.exit_code() is None


async def test_a_second_writer_costs_no_transition(place: Place, process: Start) -> None:
    async with process().at_work(), Kubelet(place).at_work():
        await place.create()
        done = asyncio.Event()

        async def label() -> int:
            count = 0
            while not done.is_set():  # as fast as it goes: no version that the operator has read is the newest for long
                patch = {"metadata": {"labels": {"count": str(count)}}}
                path = place.path("processingtasks", "handbook")
                await place.kube.do("PATCH", path, patch, content_type="application/merge-patch+json")
                count += 1
            return count

        labelling = asyncio.create_task(label())
        status = await place.wait_for("Completed")
        done.set()
        assert await labelling > 10
    assert [(one["number"], one["reason"]) for one in status["attempts"]] == [(1, "Succeeded")]


async def test_a_status_is_replaced_beside_new_labels_but_not_over_another_status(place: Place, cluster: Endpoints) -> None:
    api = Cluster(Access.from_kubeconfig(cluster.kubeconfig))
    await api.warm_up()
    created = await place.create()
    uid, before = created["metadata"]["uid"], created["status"]
    which = {"uid": uid, "generation": created["metadata"]["generation"]}
    path = place.path("processingtasks", "handbook")
    await place.kube.do("PATCH", path, {"metadata": {"labels": {"a": "b"}}}, content_type="application/merge-patch+json")
    after = before | {"stage": "parse"}
    stored = await api.replace_status(place.namespace, "handbook", **which, before=before, after=after)
    assert (stored["status"], stored["metadata"]["labels"]) == (after, {"a": "b"})
    with pytest.raises(Conflict):  # the status is another one
        await api.replace_status(place.namespace, "handbook", **which, before=before, after=after)
    await place.kube.do("PATCH", path, {"spec": {"cancel": True}}, content_type="application/merge-patch+json")
    with pytest.raises(Conflict):  # the spec is another one
        await api.replace_status(place.namespace, "handbook", **which, before=after, after=before)
    which["generation"] += 1
    with pytest.raises(Conflict):  # the task is another one
        await api.replace_status(place.namespace, "handbook", **(which | {"uid": "gone"}), before=after, after=before)
    with pytest.raises(Invalid, match="phase"):  # what the schema refuses is no conflict
        await api.replace_status(place.namespace, "handbook", **which, before=after, after=after | {"phase": "Lost"})
    await api.aclose()


async def test_missing_rights_end_the_operator_with_the_reason(process: Start, proxy: Proxy) -> None:
    def forbid(method: str, path: str) -> web.Response | None:
        if "processingtasks" not in path:
            return None
        body = {"kind": "Status", "reason": "Forbidden", "message": "processingtasks is forbidden: cannot list"}
        return web.Response(status=403, text=json.dumps(body), content_type="application/json")

    proxy.refuse = forbid
    operator = process(kubeconfig=proxy.kubeconfig)
    operator.start()

    async def has_ended() -> bool:
        return operator.exit_code() is not None

    await until("the operator has ended", has_ended, seconds=30)
    assert operator.exit_code() == 1
    assert "processingtasks is forbidden" in operator.log.read_text()


async def test_it_stops_within_ten_seconds_and_says_how_it_is_meanwhile(place: Place, process: Start) -> None:
    operator = process()
    async with operator.at_work(), Kubelet(place, outcomes={1: None}).at_work():
        await place.create()
        await place.wait_for("Processing")
        assert (await operator.get("/healthz"))[0] == 200
        status, metrics = await operator.get("/metrics")
        assert status == 200
        assert 'task_queue_size{priority="normal"} 0.0' in metrics
        assert "task_operator_jobs_created_total 1.0" in metrics
        assert operator.stop(seconds=10) == 0
        lines = [json.loads(line) for line in operator.log.read_text().splitlines()]
        assert {line["level"] for line in lines} == {"info"}
        assert lines[-1]["event"] == "operator stopped"


def test_the_pods_of_a_running_job_look_like_a_kubelets() -> None:
    assert running()["containerStatuses"][0]["ready"] is True
    assert ended(SUCCESS)["phase"] == "Succeeded"
