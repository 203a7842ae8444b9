"""Jobs against whole expected objects; pods and Jobs as the API server hands them out, and what is read from them."""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from task_contract.models import Priority, ProcessingTask, parse_manifest
from task_operator.jobs import (
    KUEUE_QUEUE_LABEL,
    JobState,
    PodReport,
    RunnerTemplate,
    Waiting,
    build_job,
    build_sweep_job,
    current_attempt,
    pod_report,
    pods_of,
    queue_stamp,
    task_document,
)
from task_operator.resources import MemoryGrowth, class_of, classes, in_bytes, unknown_class
from tests.support.operator_values import (
    UID,
    at,
    ended_attempt,
    given_back,
    job,
    name_of,
    pod,
    processing,
    retrying,
    success,
    task,
)

DATA = Path(__file__).parent.parent / "data" / "operator"

FULL = RunnerTemplate(
    image="registry.example/runner:1.2.3",
    image_pull_policy="Always",
    service_account="runner",
    stores_secret="stores",
    documents_claim="documents",
    priority_classes={Priority.HIGH: "tasks-high"},
    classes={"medium": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "4Gi"}}},
    node_selector={"pool": "tasks"},
    tolerations=({"key": "tasks", "operator": "Exists", "effect": "NoSchedule"},),
    image_pull_secrets=("registry",),
    instance="release-1",
    version="1.2.3",
)
BATCH = {"type": "batch_processing", "payload": {"prefix": "manuals", "parallelism": 3}}
HEALTH_CHECK = {"type": "health_check", "kbId": None, "payload": {"components": ["postgres"]}, "retry": {"limit": 0}}


@pytest.mark.parametrize(
    ("golden", "given", "attempt", "template", "shards"),
    [
        ("job-document.yaml", task(spec={"priority": "high", "timeout": "10m"}), 1, FULL, ()),
        ("job-batch.yaml", task(spec=BATCH, status=retrying(1)), 2, RunnerTemplate(image="runner:1"), (0, 1, 2, 7)),
        (
            "job-health-check.yaml",
            task(spec=HEALTH_CHECK, status=given_back(2, queued_at=90)),
            2,
            RunnerTemplate(image="runner:1", documents_claim=None),
            (),
        ),
    ],
)
def test_the_job_of_an_attempt_is_exactly_this(
    golden: str, given: ProcessingTask, attempt: int, template: RunnerTemplate, shards: tuple[int, ...]
) -> None:
    expected = yaml.safe_load((DATA / golden).read_text())
    assert build_job(given, attempt=attempt, template=template, shards=shards) == expected


WRITES = {"type": "embedding_generation", "kbId": None, "payload": {"texts": ["a"], "outputPath": "outputs/a.npy"}}


def test_a_task_that_writes_a_file_can_write_to_the_folder_of_outputs_and_to_nothing_else() -> None:
    pods = [build_job(one, attempt=1, template=FULL)["spec"]["template"]["spec"] for one in (task(spec=WRITES), task())]
    volumes, mounts = (
        [[one for one in found if one["name"] == "documents"] for found in parts]
        for parts in ([pod["volumes"] for pod in pods], [pod["containers"][0]["volumeMounts"] for pod in pods])
    )
    claims = [one["persistentVolumeClaim"] for (one,) in volumes]
    assert claims == [{"claimName": "documents", "readOnly": False}, {"claimName": "documents", "readOnly": True}]
    read = {"name": "documents", "mountPath": "/data", "readOnly": True}
    assert mounts == [[read, {"name": "documents", "mountPath": "/data/outputs", "subPath": "outputs"}], [read]]


@pytest.mark.parametrize(
    ("spec", "default", "queue"),
    [({}, "", None), ({}, "team", "team"), ({"kueue": {"queueName": "own"}}, "team", "own")],
)
def test_a_job_for_kueue_is_made_suspended_in_its_queue(spec: dict[str, Any], default: str, queue: str | None) -> None:
    made = build_job(task(spec=spec), attempt=1, template=replace(FULL, kueue_queue=default))
    assert made["metadata"]["labels"].get(KUEUE_QUEUE_LABEL) == queue
    assert made["spec"].get("suspend", False) is (queue is not None)
    read = JobState.from_manifest(made | {"metadata": made["metadata"] | {"uid": "u", "resourceVersion": "1"}})
    assert (read.suspended, read.kueue_queue) == (queue is not None, queue)


def test_equal_arguments_make_equal_jobs() -> None:
    one, two = (build_job(task(), attempt=1, template=FULL) for _ in range(2))
    assert json.dumps(one) == json.dumps(two)


def test_the_pod_reads_its_task_as_a_manifest_that_parses_again() -> None:
    given = task(spec={"payload": {"filePath": "/data/手册.md", "metadata": {"作者": "王"}}, "timeout": "90s"})
    document = task_document(given)
    read = parse_manifest(json.loads(document))
    assert read.spec == given.spec
    assert read.metadata.uid == UID
    assert read.metadata.creation_timestamp == at(0)
    assert "手册" in document


def test_a_task_of_the_largest_size_fits_into_the_annotations_of_a_pod() -> None:
    labels = {f"{'k' * 60}{number:03}": "数" * 300 for number in range(32)}
    document = task_document(task(spec={"payload": {"filePath": "/data/a.pdf", "metadata": labels}}))
    assert len(document.encode()) < 200 * 1024


def test_a_job_needs_a_task_that_the_api_server_knows() -> None:
    with pytest.raises(ValueError, match="it has no uid"):
        build_job(task(uid=None), attempt=1, template=FULL)


@pytest.mark.parametrize(
    ("status", "attempt"),
    [
        (None, 1),
        (processing(1), 1),
        (processing(3), 3),
        (retrying(1), 2),
        (given_back(2), 2),
        (retrying(8) | {"attempts": [ended_attempt(number) for number in range(4, 9)]}, 9),
    ],
)
def test_the_current_attempt_follows_from_the_status(status: dict[str, Any] | None, attempt: int) -> None:
    assert current_attempt(task(status=status).status) == attempt


def test_a_stay_in_the_queue_is_named_by_its_beginning() -> None:
    assert queue_stamp(task()) == "2026-11-24T12:00:00Z"
    assert queue_stamp(task(status=given_back(queued_at=20))) == "2026-11-24T12:00:20Z"


# ---------------------------------------------------------------------------------------------------------------- Jobs


def _job_manifest(**status: Any) -> dict[str, Any]:
    made = build_job(task(), attempt=1, template=FULL)
    made["metadata"] |= {"uid": "job-1", "resourceVersion": "7", "creationTimestamp": "2026-11-24T12:00:01Z"}
    return made | {"status": status}


def test_a_job_says_whose_attempt_it_is() -> None:
    state = JobState.from_manifest(_job_manifest(active=1, ready=1))
    assert (state.name, state.owner_uid, state.owner_name) == (name_of(1), UID, "handbook")
    assert (state.attempt, state.queue_stamp, state.ready) == (1, "2026-11-24T12:00:00Z", 1)
    assert not state.finished


def test_a_job_has_ended_only_when_its_pods_have() -> None:
    target = [{"type": "FailureTarget", "status": "True", "reason": "PodFailurePolicy"}]
    assert not JobState.from_manifest(_job_manifest(conditions=target)).finished
    ended = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "exit code 65"}
    state = JobState.from_manifest(
        _job_manifest(conditions=[*target, ended | {"lastTransitionTime": "2026-11-24T12:00:30Z"}])
    )
    assert state.failed
    assert state.finished
    assert (state.failure_reason, state.finished_at) == ("PodFailurePolicy", at(30))
    assert JobState.from_manifest(_job_manifest(conditions=[{"type": "Complete", "status": "True"}])).complete
    assert not JobState.from_manifest(_job_manifest(conditions=[{"type": "Complete", "status": "False"}])).finished


def test_a_job_that_no_task_controls_is_nobodys() -> None:
    manifest = _job_manifest()
    manifest["metadata"] |= {"ownerReferences": [{"kind": "CronJob", "controller": True, "uid": "x"}], "labels": None}
    state = JobState.from_manifest(manifest)
    assert (state.owner_uid, state.owner_name, state.attempt) == (None, None, 0)


# ---------------------------------------------------------------------------------------------------------------- pods


def _pod_manifest(phase: str, *, state: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    containers = [] if state is None else [{"name": "sidecar", "state": {}}, {"name": "runner", "state": state}]
    return {
        "metadata": {
            "name": "pod-1",
            "uid": "pod-1",
            "ownerReferences": [{"kind": "Job", "uid": "job-1-0", "controller": True}],
        },
        "status": {"phase": phase, "containerStatuses": containers} | status,
    }


def _terminated(**fields: Any) -> dict[str, Any]:
    return {"terminated": {"startedAt": "2026-11-24T12:00:05Z", "finishedAt": "2026-11-24T12:00:29Z", **fields}}


UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
BY_KUBELET = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}
VOLUME_FULL = 'Usage of EmptyDir volume "tmp" exceeds the limit "1Gi". '
DISRUPTED = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drained"}


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        pytest.param(_pod_manifest("Pending"), pod(waiting=Waiting("PodPending")), id="just made"),
        pytest.param(
            _pod_manifest("Pending", conditions=[UNSCHEDULABLE]),
            pod(waiting=Waiting("Unschedulable", "0/3 nodes")),
            id="no node takes it",
        ),
        pytest.param(
            _pod_manifest("Pending", state={"waiting": {"reason": "ErrImagePull", "message": "not found"}}),
            pod(waiting=Waiting("ImagePullBackOff", "not found")),
            id="its image cannot be pulled",
        ),
        pytest.param(
            _pod_manifest("Pending", state={"waiting": {"reason": "CreateContainerConfigError", "message": "no Secret"}}),
            pod(waiting=Waiting("CreateContainerConfigError", "no Secret")),
            id="its Secret is missing",
        ),
        pytest.param(
            _pod_manifest("Pending", state={"waiting": {"reason": "ContainerCreating"}}),
            pod(waiting=Waiting("PodPending")),
            id="its container is being made",
        ),
        pytest.param(
            _pod_manifest("Running", state={"running": {"startedAt": "2026-11-24T12:00:05Z"}}),
            pod(running=True, started_at=at(5)),
            id="it runs",
        ),
        pytest.param(
            _pod_manifest("Succeeded", state=_terminated(exitCode=0, message=success().termination_message())),
            pod(alive=False, started_at=at(5), finished_at=at(29), exit_code=0, outcome=success()),
            id="it has said how it ended",
        ),
        pytest.param(
            _pod_manifest("Failed", state=_terminated(exitCode=1, message="Traceback (most recent call last):")),
            pod(
                alive=False,
                started_at=at(5),
                finished_at=at(29),
                exit_code=1,
                log="Traceback (most recent call last):",
            ),
            id="its message is the end of its log",
        ),
        pytest.param(
            _pod_manifest("Failed", state=_terminated(exitCode=137, reason="OOMKilled")),
            pod(alive=False, started_at=at(5), finished_at=at(29), exit_code=137, oom_killed=True),
            id="it was killed for memory",
        ),
        pytest.param(
            _pod_manifest("Failed", state=_terminated(exitCode=143), conditions=[DISRUPTED]),
            pod(
                alive=False,
                started_at=at(5),
                finished_at=at(29),
                exit_code=143,
                disrupted="EvictionByEvictionAPI",
                message="drained",
            ),
            id="it was evicted by the API",
        ),
        pytest.param(
            _pod_manifest("Failed", reason="Evicted", message=VOLUME_FULL, state=_terminated(exitCode=137)),
            pod(
                alive=False,
                started_at=at(5),
                finished_at=at(29),
                exit_code=137,
                overused=True,
                message=VOLUME_FULL,
            ),
            id="it was evicted for what it wrote itself",
        ),
        pytest.param(
            _pod_manifest("Failed", reason="Evicted", message="The node was low on resource: memory."),
            pod(alive=False, disrupted="Evicted", under_pressure=True, message="The node was low on resource: memory."),
            id="it was evicted by its node, a kubelet before 1.26",
        ),
        pytest.param(
            _pod_manifest(
                "Failed",
                reason="Evicted",
                message="The node was low on resource: memory.",
                conditions=[BY_KUBELET | {"message": "The node was low on resource: memory."}],
            ),
            pod(
                alive=False,
                disrupted="TerminationByKubelet",
                under_pressure=True,
                message="The node was low on resource: memory.",
            ),
            id="it was evicted by its node",
        ),
        pytest.param(
            _pod_manifest(
                "Failed",
                reason="Preempting",
                message="Preempted in order to admit critical pod",
                conditions=[BY_KUBELET | {"message": "Pod was preempted by Kubelet to accommodate a critical pod."}],
            ),
            pod(
                alive=False,
                disrupted="TerminationByKubelet",
                message="Pod was preempted by Kubelet to accommodate a critical pod.",
            ),
            id="it had to make room for a critical pod",
        ),
        pytest.param(
            {"metadata": {"name": "pod-1", "uid": "pod-1"}},
            pod(job_uid=None, waiting=Waiting("PodPending")),
            id="it has no status yet",
        ),
    ],
)
def test_a_pod_says(manifest: dict[str, Any], expected: PodReport) -> None:
    assert pod_report(manifest) == expected


def test_the_pod_that_ended_last_comes_last() -> None:
    pods = [
        pod(name="running", uid="c"),
        pod(name="later", uid="b", finished_at=at(20)),
        pod(name="of another Job", uid="d", job_uid="other"),
        pod(name="earlier", uid="a", finished_at=at(10)),
    ]
    assert [one.name for one in pods_of(job(), pods)] == ["earlier", "later", "running"]


def test_the_deadline_of_a_job_leaves_room_for_the_runner_to_stop_by_itself() -> None:
    made = build_job(task(spec={"timeout": "10m"}), attempt=1, template=FULL)
    assert made["spec"]["activeDeadlineSeconds"] == timedelta(minutes=20).total_seconds()


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("quantity", "size"),
    [
        ("512Mi", 512 * 2**20),
        ("2Gi", 2 * 2**30),
        ("1.5Gi", 3 * 2**29),
        ("1G", 10**9),
        ("128974848", 128974848),
        ("129e6", 129_000_000),
        ("129M", 129_000_000),
        ("128974848000m", 128974848),
        ("1m", 1),
        (".5k", 500),
        (1024, 1024),
    ],
)
def test_a_quantity_of_memory_is_read_as_kubernetes_does(quantity: str | int, size: int) -> None:
    assert in_bytes(quantity) == size


@pytest.mark.parametrize("quantity", ["", "1K", "2GiB", "-1", "1 Gi", "Gi", "1e", "1e999"])
def test_what_is_no_quantity_is_refused(quantity: str) -> None:
    with pytest.raises(ValueError, match="no quantity of memory; write it as 512Mi or 2Gi"):
        in_bytes(quantity)


RESOURCES = {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}}


@pytest.mark.parametrize(
    ("reasons", "growth", "memory"),
    [
        ([], MemoryGrowth(), ("512Mi", "2Gi")),
        (["StoresDisagree"], MemoryGrowth(), ("512Mi", "2Gi")),
        (["OOMKilled"], MemoryGrowth(), ("1024Mi", "4096Mi")),
        (["OOMKilled", "Timeout", "OOMKilled"], MemoryGrowth(), ("2048Mi", "8192Mi")),
        (["OOMKilled"] * 3, MemoryGrowth(), ("4096Mi", "8192Mi")),
        (["OOMKilled"], MemoryGrowth(factor=1.5), ("768Mi", "3072Mi")),
        (["OOMKilled"], MemoryGrowth(factor=1), ("512Mi", "2Gi")),
        (["OOMKilled"], MemoryGrowth(limit="1Gi"), ("1024Mi", "2048Mi")),  # never less than before
    ],
)
def test_an_attempt_after_one_that_ran_out_of_memory_gets_more(
    reasons: list[str], growth: MemoryGrowth, memory: tuple[str, str]
) -> None:
    attempts = [
        {"number": number, "job": f"a-{number}", "finishedAt": "2026-11-24T12:00:00Z", "reason": reason}
        for number, reason in enumerate(reasons, start=1)
    ]
    status = {"phase": "Retrying" if reasons else "Queued", "attempt": len(attempts), "attempts": attempts}
    template = replace(FULL, classes=classes(RESOURCES, configured={}), memory_growth=growth)
    made = build_job(task(status=status), attempt=len(attempts) + 1, template=template)
    found = made["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert (found["requests"]["memory"], found["limits"]["memory"]) == memory
    assert found["requests"]["cpu"] == "250m"


# ------------------------------------------------------------------------------------------------------ resource classes


def _document(file: str, size: int | None = None, **more: Any) -> dict[str, Any]:
    return {"payload": {"filePath": file} | ({} if size is None else {"fileBytes": size}), **more}


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (HEALTH_CHECK, "small"),
        ({"payload": {"action": "delete", "documentId": "a.pdf"}}, "small"),
        ({"payload": {"action": "delete_knowledge_base", "confirm": "kb-42"}}, "small"),
        (_document("/data/a.txt"), "small"),
        (_document("/data/a.MD", 2**20), "small"),
        (_document("/data/a.csv", 2**20 + 1), "medium"),
        (_document("/data/a.json", 24 * 2**20), "medium"),
        (_document("/data/a.html", 24 * 2**20 + 1), "large"),
        (_document("/data/a.pdf"), "medium"),
        (_document("/data/a.pdf", 0), "small"),
        (_document("s3://manuals/a.pdf", 256 * 2**20), "medium"),
        (_document("https://example.com/a.pdf", 2**30), "large"),
        (_document("/data/a.docx"), "medium"),
        (_document("/data/a.xlsx", 2**18), "small"),
        (_document("/data/a.pptx", 6 * 2**20), "medium"),
        (_document("/data/a.epub", 6 * 2**20 + 1), "large"),
        (_document("/data/a.PNG"), "large"),
        (_document("/data/a.tiff", 10), "large"),
        (_document("/data/a.eml"), "medium"),
        (_document("/data/a"), "medium"),
        (_document("/data/a.pdf/b"), "medium"),
        (_document("/data/a.png", resourceClass="small"), "small"),
        (HEALTH_CHECK | {"resourceClass": "gpu"}, "gpu"),
    ],
    ids=str,
)
def test_the_class_of_a_task_follows_from_its_type_and_input(spec: dict[str, Any], name: str) -> None:
    made = build_job(task(spec=spec), attempt=1, template=FULL)
    assert class_of(task(spec=spec)) == name
    assert made["metadata"]["labels"]["tasks.zzdsj.io/resource-class"] == name


def test_small_and_large_follow_from_medium_unless_they_are_given() -> None:
    medium = {"requests": {"cpu": "250m", "memory": "512Mi", "x/gpu": "1"}, "limits": {"cpu": "1.5", "memory": "2Gi"}}
    assert classes(medium, configured={}) == {
        "small": {"requests": {"cpu": "125m", "memory": "256Mi", "x/gpu": "1"}, "limits": {"cpu": "1.5", "memory": "2Gi"}},
        "medium": medium,
        "large": {
            "requests": {"cpu": "500m", "memory": "1024Mi", "x/gpu": "1"},
            "limits": {"cpu": "3000m", "memory": "4096Mi"},
        },
    }
    own = {"large": {"limits": {"memory": "3Gi"}}, "gpu": {"limits": {"nvidia.com/gpu": "1"}}}
    found = classes(medium, configured=own)
    assert (sorted(found), found["large"], found["gpu"]) == (["gpu", "large", "medium", "small"], *own.values())


def test_memory_grows_from_what_the_class_has() -> None:
    status = retrying(1) | {"attempts": [ended_attempt(1, "OOMKilled")]}
    given = task(spec=_document("/data/a.png"), status=status)
    made = build_job(given, attempt=2, template=replace(FULL, classes=classes(RESOURCES, configured={})))
    found = made["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert found == {"requests": {"cpu": "500m", "memory": "2048Mi"}, "limits": {"memory": "8192Mi"}}


def test_a_class_that_the_settings_do_not_have_is_refused_with_those_that_they_have() -> None:
    known = classes(RESOURCES, configured={"gpu": {}})
    assert unknown_class(task(spec={"resourceClass": "gpu"}), known) is None
    assert unknown_class(task(), {}) is None
    problem = unknown_class(task(spec={"resourceClass": "huge"}), known)
    assert problem is not None
    assert problem.startswith("cannot give the pod resourceClass huge: the operator's settings have gpu, large, medium, sm")


# ------------------------------------------------------------------------------------------------------------ lost nodes

NOT_READY, UNREACHABLE = (
    {"key": f"node.kubernetes.io/{name}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 45}
    for name in ("not-ready", "unreachable")
)
FOR_EVER = {"key": NOT_READY["key"], "operator": "Exists", "effect": "NoExecute"}
NEW_PODS = {"key": UNREACHABLE["key"], "operator": "Exists", "effect": "NoSchedule"}
ALL_KEYS = {"operator": "Exists"}
ALL_EFFECTS = {"key": UNREACHABLE["key"], "operator": "Exists"}
BATCH = {"key": "batch", "operator": "Equal", "value": "true", "effect": "NoExecute"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], [NOT_READY, UNREACHABLE]),
        ([BATCH], [BATCH, NOT_READY, UNREACHABLE]),
        ([FOR_EVER], [FOR_EVER, UNREACHABLE]),
        ([NEW_PODS], [NEW_PODS, NOT_READY, UNREACHABLE]),
        ([ALL_KEYS], [ALL_KEYS]),
        ([ALL_KEYS | {"effect": "NoSchedule"}], [ALL_KEYS | {"effect": "NoSchedule"}, NOT_READY, UNREACHABLE]),
        ([ALL_EFFECTS], [ALL_EFFECTS, NOT_READY]),
    ],
    ids=str,
)
def test_a_lost_node_is_left_soon_unless_the_settings_say_otherwise(
    given: list[dict[str, Any]], expected: list[dict[str, Any]]
) -> None:
    made = build_job(task(), attempt=1, template=replace(FULL, tolerations=tuple(given), lost_node_seconds=45))
    assert made["spec"]["template"]["spec"]["tolerations"] == expected


def test_what_the_settings_add_to_every_pod_of_the_runner() -> None:
    added = replace(
        FULL,
        affinity={"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        env=({"name": "TZ", "value": "UTC"}, {"name": "TASKS_ATTEMPT", "value": "99"}),
        pod_labels={"team": "knowledge", "app.kubernetes.io/component": "other"},
        pod_annotations={"example.com/scrape": "true"},
    )
    of_task = build_job(task(), attempt=2, template=added)["spec"]["template"]
    of_sweep = build_sweep_job("knowledge", last=None, template=added)["spec"]["template"]
    for made, component in ((of_task, "runner"), (of_sweep, "sweep")):
        assert made["spec"]["affinity"] == added.affinity
        assert made["metadata"]["labels"]["team"] == "knowledge"
        assert made["metadata"]["labels"]["app.kubernetes.io/component"] == component, "pods are found by it"
        assert made["metadata"]["annotations"]["example.com/scrape"] == "true"
        assert {"name": "TZ", "value": "UTC"} in made["spec"]["containers"][0]["env"]
    [*_, last] = [one for one in of_task["spec"]["containers"][0]["env"] if one["name"] == "TASKS_ATTEMPT"]
    assert last["value"] == "2", "the operator's own goes before it: of two the last counts"


def test_pods_see_the_folder_of_their_namespace_and_write_to_its_outputs_alone() -> None:
    template = RunnerTemplate(image="runner:1", documents_subpath="teams/{namespace}")
    given = task(spec={"type": "embedding_generation", "payload": {"texts": ["a"], "outputPath": "outputs/a.npy"}})
    pod = build_job(given, attempt=1, template=template)["spec"]["template"]["spec"]
    mounts = [one for one in pod["containers"][0]["volumeMounts"] if one["name"] == "documents"]
    namespace = given.metadata.namespace
    assert mounts == [
        {"name": "documents", "mountPath": "/data", "readOnly": True, "subPath": f"teams/{namespace}"},
        {"name": "documents", "mountPath": "/data/outputs", "subPath": f"teams/{namespace}/outputs"},
    ]
