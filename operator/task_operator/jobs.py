"""Kubernetes Jobs and pods as values: from a task to the Job of one attempt, and from what the API server says to reports.

Pure functions over dictionaries of the Kubernetes API; nothing here speaks to a server or reads a clock.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final, NamedTuple, Protocol

from task_contract.batches import parallelism_of, write_shards
from task_contract.lifecycle import ExitCode
from task_contract.messages import AttemptOutcome, last_lines
from task_contract.models import Metadata, Priority, ProcessingTask, Status, TaskType
from task_contract.names import (
    API_VERSION,
    ATTEMPT_LABEL,
    CONTAINER,
    DOCUMENT_ROOT,
    GROUP,
    KIND,
    MANAGED_BY,
    MANAGED_BY_LABEL,
    OUTPUTS,
    PART_OF,
    RESOURCE_CLASS_LABEL,
    SHARDS_ANNOTATION,
    TASK_ANNOTATION,
    TASK_FILE,
    TASK_NAME_ANNOTATION,
    TASK_UID_LABEL,
    TRACEPARENT_ANNOTATION,
    TYPE_LABEL,
    digest,
    job_name,
)
from task_contract.tracing import trace_id
from task_operator.resources import OOM_KILLED, MemoryGrowth, Resources, Size, class_of, resources_of

QUEUED_AT_ANNOTATION: Final = f"{GROUP}/queued-at"
"""Which stay in the queue a Job belongs to: the value of :func:`queue_stamp` when it was made. An attempt that is given
back keeps its number and so the name of its Job; this mark tells the Job that was given back from the one after it."""

JOB_NAME_LABEL: Final = "batch.kubernetes.io/job-name"
"""On each pod of a Job, by the Job controller: the Job's name."""

INDEX_ANNOTATION: Final = "batch.kubernetes.io/job-completion-index"
"""On each pod of an Indexed Job: its index."""

POLICY_FAILED: Final = "PodFailurePolicy"
"""The Job controller's word for a Job that was failed at once, since a pod reported a permanent error."""

DEADLINE_ALLOWANCE: Final = timedelta(minutes=10)
"""The runner ends an attempt at its timeout itself; the Job's deadline is the backstop for a runner that hangs, with room
for what comes before the container starts (scheduling, image pull)."""
JOB_TTL: Final = timedelta(days=1)
"""Backstop only: the operator deletes Jobs itself, after what they said is stored."""
SWEEP_DEADLINE: Final = timedelta(minutes=30)
"""Backstop for a sweep; what it has not come to, the next one does."""
SWEEP_TTL: Final = timedelta(minutes=1)
"""So long the next sweep waits after one that failed; one that succeeded gives the next one another name."""
GRACE: Final = timedelta(seconds=30)
TMP_SIZE: Final = "1Gi"
NONROOT: Final = 65532

_TASK_VOLUME: Final = "task"
_LOST: Final = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
"""Taints that the node controller gives a node whose kubelet has not been heard of for a while (50 s by default)."""


@dataclass(frozen=True, slots=True)
class RunnerTemplate:
    """What every runner pod has in common; comes from the operator's settings."""

    image: str
    image_pull_policy: str = "IfNotPresent"
    service_account: str = "processing-task-runner"
    stores_secret: str = "processing-task-stores"  # noqa: S105 - the name of a Secret, not a secret
    documents_claim: str | None = "processing-task-documents"
    """Claim of the document volume; None mounts none."""
    documents_subpath: str = ""
    """Folder of the volume that pods see, with ``{namespace}`` in place of theirs; empty: all of it."""
    priority_classes: Mapping[Priority, str] = field(default_factory=dict)
    classes: Mapping[str, Resources] = field(default_factory=dict)
    """Resources by the name of their class; pods of no task have those of medium."""
    memory_growth: MemoryGrowth = field(default_factory=MemoryGrowth)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    lost_node_seconds: int = 30
    """So long a pod stays on a node that is lost, before another one takes the attempt; Kubernetes' own default is 300."""
    affinity: Mapping[str, Any] = field(default_factory=dict)
    env: tuple[Mapping[str, Any], ...] = ()
    """More variables, as in a pod; those of the operator's own go before them."""
    pod_labels: Mapping[str, str] = field(default_factory=dict)
    """More labels; none replaces one of ours, by which pods are found."""
    pod_annotations: Mapping[str, str] = field(default_factory=dict)
    image_pull_secrets: tuple[str, ...] = ()
    kueue_queue: str = ""
    """LocalQueue of Kueue for Jobs of tasks that name none; empty: they start without Kueue."""
    instance: str = "processing-tasks"
    """Name of the installation (the release of the chart), for the label ``app.kubernetes.io/instance``."""
    version: str = ""
    """Of the product, for the label ``app.kubernetes.io/version``; empty: unknown, and the label is left out."""


INSTANCE_LABEL: Final = "app.kubernetes.io/instance"
KUEUE_QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"
"""By it Kueue knows the Jobs that are its own (https://kueue.sigs.k8s.io/docs/tasks/run/jobs/)."""


def common_labels(template: RunnerTemplate, *, name: str, component: str) -> dict[str, str]:
    """Return the labels that Kubernetes recommends, for an object that the operator makes.

    https://kubernetes.io/docs/concepts/overview/working-with-objects/common-labels/
    """
    labels = {
        "app.kubernetes.io/name": name,
        INSTANCE_LABEL: template.instance,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": PART_OF,
        MANAGED_BY_LABEL: MANAGED_BY,
    }
    return labels | ({"app.kubernetes.io/version": template.version} if template.version else {})


def queue_stamp(task: ProcessingTask) -> str:
    """Return the name of the task's present stay in the queue: when it was put there, to the second, in UTC."""
    return stamp_of(task.status, task.metadata)


def stamp_of(status: Status, metadata: Metadata) -> str:
    """Return the name of the stay in the queue that a status tells of."""
    at = status.queued_at or metadata.creation_timestamp
    return "" if at is None else f"{at.astimezone(UTC).isoformat()[:19]}Z"


class _Numbered(Protocol):
    @property
    def number(self) -> int: ...
    @property
    def finished_at(self) -> datetime | None: ...


class Attempted(Protocol):
    """A status, or as much of it as tells the number of an attempt."""

    @property
    def attempt(self) -> int: ...  # noqa: D102 - see Status
    @property
    def attempts(self) -> Sequence[_Numbered]: ...  # noqa: D102 - see Status


def current_attempt(status: Attempted) -> int:
    """Return the number of the attempt that runs, waits or comes next: the latest, or the one after if that was counted.

    ``status.attempts`` holds counted attempts only (one that is given back leaves it): a finished entry is a spent number.
    """
    spent = any(attempt.number == status.attempt and attempt.finished_at is not None for attempt in status.attempts)
    return status.attempt + 1 if spent else max(1, status.attempt)


# ------------------------------------------------------------------------------------------------------ task → Job


def task_document(task: ProcessingTask) -> str:
    """Return the JSON that the pod reads as its task: what identifies it, and its spec.

    A spec has at most 64 KiB, an object's annotations 256 KiB: it fits with room to spare. Characters outside ASCII stay as
    they are; escaped, Chinese text would be twice as long.
    """
    metadata = task.metadata
    created, given = metadata.creation_timestamp, metadata.annotations.get(TRACEPARENT_ANNOTATION)
    document = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": metadata.name,
            "namespace": metadata.namespace,
            "uid": metadata.uid,
            "generation": metadata.generation,
            "creationTimestamp": None if created is None else created.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        | ({"annotations": {TRACEPARENT_ANNOTATION: given}} if trace_id(given) else {}),
        "spec": task.spec.manifest(),
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def is_batch(task: ProcessingTask) -> bool:
    """Whether the task has a pod a shard, and an outcome a document."""
    return task.spec.type is TaskType.BATCH_PROCESSING


def pod_metadata(
    template: RunnerTemplate, labels: Mapping[str, str], annotations: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the metadata of a pod: ours, and what the settings add to it."""
    notes = {**template.pod_annotations, **(annotations or {})}
    return {"labels": {**template.pod_labels, **labels}, **({"annotations": notes} if notes else {})}


def build_job(task: ProcessingTask, *, attempt: int, template: RunnerTemplate, shards: Sequence[int] = ()) -> dict[str, Any]:
    """Return the Job of one attempt, under the restrictions of Pod Security ``restricted``.

    It has one pod that is never restarted in place. ``Ignore`` for disruptions lets the Job controller replace a pod that
    was evicted, preempted or lost with its node: such an end says nothing about the task. A permanent error fails the Job
    at once.

    That of a batch has one pod for each of ``shards``: an Indexed Job whose first index is the first of them. An index that
    fails ends, and the others go on; the next attempt has a Job for what is left. A permanent error is one of the whole
    batch (documents fail each for itself), so it fails this Job at once too.
    """
    metadata = task.metadata
    if metadata.uid is None:
        raise ValueError(f"cannot build a Job for task {metadata.name}: it has no uid; take it from the API server")
    labels = common_labels(template, name="processing-task-runner", component="runner") | {
        TASK_UID_LABEL: metadata.uid,
        ATTEMPT_LABEL: str(attempt),
        TYPE_LABEL: str(task.spec.type),
        RESOURCE_CLASS_LABEL: class_of(task),
    }
    deadline = task.spec.effective_timeout + DEADLINE_ALLOWANCE
    queue = template.kueue_queue if task.spec.kueue is None else task.spec.kueue.queue_name
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": job_name(task_name=metadata.name, task_uid=metadata.uid, attempt=attempt),
            "namespace": metadata.namespace,
            "labels": labels | ({KUEUE_QUEUE_LABEL: queue} if queue else {}),
            "annotations": {
                TASK_NAME_ANNOTATION: metadata.name,
                QUEUED_AT_ANNOTATION: queue_stamp(task),
                **({SHARDS_ANNOTATION: write_shards(shards)} if shards else {}),
            },
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": KIND,
                    "name": metadata.name,
                    "uid": metadata.uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": {
            **_completions(task, shards),
            **({"suspend": True} if queue else {}),
            "activeDeadlineSeconds": int(deadline.total_seconds()),
            "ttlSecondsAfterFinished": int(JOB_TTL.total_seconds()),
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": CONTAINER,
                            "operator": "In",
                            "values": [int(ExitCode.PERMANENT)],
                        },
                    },
                ]
            },
            "template": {
                "metadata": pod_metadata(
                    template, labels, {TASK_NAME_ANNOTATION: metadata.name, TASK_ANNOTATION: task_document(task)}
                ),
                "spec": _task_pod(task, attempt=attempt, template=template, shards=shards),
            },
        },
    }


def _completions(task: ProcessingTask, shards: Sequence[int]) -> dict[str, Any]:
    """Return how many pods a Job has, and what becomes of it when one fails."""
    if not shards:
        return {"backoffLimit": 0, "completions": 1, "parallelism": 1}
    return {
        "completionMode": "Indexed",
        "backoffLimitPerIndex": 0,
        "completions": len(shards),
        "parallelism": min(parallelism_of(task.spec.payload), len(shards)),
    }


def sweep_job_name(*, namespace: str, last: datetime | None) -> str:
    """Return the name of the Job of the sweep that follows on one: every operator that wants it means the same Job."""
    return f"processing-task-sweep-{digest(namespace, '' if last is None else last.astimezone(UTC).isoformat(), length=8)}"


def build_sweep_job(namespace: str, *, last: datetime | None, template: RunnerTemplate) -> dict[str, Any]:
    """Return the Job that sweeps the stores of a namespace, after the sweep that ended at ``last``.

    A pod as those of tasks, but for the document volume. It belongs to no task, and goes a minute after its end: while it is
    there, failed or not, its name keeps the next one waiting.
    """
    labels = common_labels(template, name="processing-task-sweep", component="sweep")
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": sweep_job_name(namespace=namespace, last=last), "namespace": namespace, "labels": labels},
        "spec": {
            "backoffLimit": 0,
            "completions": 1,
            "parallelism": 1,
            "activeDeadlineSeconds": int(SWEEP_DEADLINE.total_seconds()),
            "ttlSecondsAfterFinished": int(SWEEP_TTL.total_seconds()),
            "template": {
                "metadata": pod_metadata(template, labels),
                "spec": runner_pod(
                    ["python", "-m", "job_runner", "sweep", "--namespace", namespace],
                    priority_class=template.priority_classes.get(Priority.LOW),
                    template=template,
                    resources=template.classes.get(Size.MEDIUM, {}),
                ),
            },
        },
    }


def _task_pod(task: ProcessingTask, *, attempt: int, template: RunnerTemplate, shards: Sequence[int]) -> dict[str, Any]:
    folder, file = TASK_FILE.rsplit("/", 1)
    volumes: list[dict[str, Any]] = [
        {
            "name": _TASK_VOLUME,
            "downwardAPI": {
                "items": [{"path": file, "fieldRef": {"fieldPath": f"metadata.annotations['{TASK_ANNOTATION}']"}}]
            },
        },
    ]
    mounts: list[dict[str, Any]] = [{"name": _TASK_VOLUME, "mountPath": folder, "readOnly": True}]
    documents = document_volume(template, task.metadata.namespace, writes=task.spec.payload.output_path is not None)
    volumes += documents.volumes
    mounts += documents.mounts
    return runner_pod(
        ["python", "-m", "job_runner", "run", TASK_FILE],
        priority_class=template.priority_classes.get(task.spec.priority),
        template=template,
        resources=resources_of(task, template.classes, template.memory_growth),
        env=[
            {"name": "TASKS_ATTEMPT", "value": str(attempt)},
            {"name": "TASKS_HOLDER", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
            *(_shard(shards) if shards else ()),
        ],
        volumes=volumes,
        mounts=mounts,
    )


def _shard(shards: Sequence[int]) -> list[dict[str, Any]]:
    """Return what tells a pod its shard: which the Job is for, and the pod's place among them."""
    index = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX_ANNOTATION}']"}}
    return [
        {"name": "TASKS_SHARDS", "value": write_shards(shards)},
        {"name": "TASKS_SHARD_INDEX", "valueFrom": index},
    ]


class DocumentVolume(NamedTuple):
    """The document volume in a pod; nothing where there is none."""

    volumes: list[dict[str, Any]]
    mounts: list[dict[str, Any]]


def document_volume(template: RunnerTemplate, namespace: str, *, writes: bool) -> DocumentVolume:
    """Return the document volume of a pod, which reads it; if it ``writes``, then to the folder of outputs alone."""
    if not template.documents_claim:
        return DocumentVolume([], [])
    claim = {"claimName": template.documents_claim, "readOnly": not writes}
    mounts: list[dict[str, Any]] = [{"name": "documents", "mountPath": DOCUMENT_ROOT, "readOnly": True}]
    below = template.documents_subpath.replace("{namespace}", namespace)
    if below:
        mounts[0]["subPath"] = below
    if writes:
        outputs = f"{below}/{OUTPUTS}" if below else OUTPUTS
        mounts.append({"name": "documents", "mountPath": f"{DOCUMENT_ROOT}/{OUTPUTS}", "subPath": outputs})
    return DocumentVolume([{"name": "documents", "persistentVolumeClaim": claim}], mounts)


def runner_pod(
    command: list[str],
    *,
    priority_class: str | None,
    template: RunnerTemplate,
    resources: Mapping[str, Any],
    env: Sequence[Mapping[str, Any]] = (),
    volumes: Sequence[Mapping[str, Any]] = (),
    mounts: Sequence[Mapping[str, Any]] = (),
    node_selector: Mapping[str, str] | None = None,
    grace: timedelta = GRACE,
) -> dict[str, Any]:
    """Return what every pod of the runner has: its restrictions, the stores' Secret, and room for temporary files."""
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "serviceAccountName": template.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": int(grace.total_seconds()),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": NONROOT,
            "runAsGroup": NONROOT,
            "fsGroup": NONROOT,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": CONTAINER,
                "image": template.image,
                "imagePullPolicy": template.image_pull_policy,
                "command": command,
                **({"env": [*template.env, *env]} if template.env or env else {}),
                "envFrom": [{"secretRef": {"name": template.stores_secret}}],
                "resources": dict(resources),
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, *mounts],  # noqa: S108 - the pod's own emptyDir
            }
        ],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": TMP_SIZE}}, *volumes],
    }
    if priority_class:
        pod["priorityClassName"] = priority_class
    if nodes := {**template.node_selector, **(node_selector or {})}:
        pod["nodeSelector"] = nodes
    if tolerations := _tolerations(template):
        pod["tolerations"] = tolerations
    if template.affinity:
        pod["affinity"] = dict(template.affinity)
    if template.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in template.image_pull_secrets]
    return pod


def _tolerations(template: RunnerTemplate) -> list[dict[str, Any]]:
    """Return the tolerations of the settings, and for how long a lost node is borne with unless they say so."""
    given = [dict(toleration) for toleration in template.tolerations]
    named = {toleration.get("key", "") for toleration in given if toleration.get("effect") in {None, "", "NoExecute"}}
    if "" in named:  # all keys
        return given
    lost = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": template.lost_node_seconds}
    return given + [{"key": key, **lost} for key in _LOST if key not in named]


# ----------------------------------------------------------------------------------------------------- Job → state


@dataclass(frozen=True, slots=True)
class JobState:
    """What a Job of ours says about its attempt."""

    name: str
    namespace: str
    uid: str
    resource_version: int
    owner_uid: str | None
    """Uid of the task that controls it."""
    owner_name: str | None
    attempt: int
    queue_stamp: str
    """See :data:`QUEUED_AT_ANNOTATION`."""
    created_at: datetime | None = None
    started_at: datetime | None = None
    """When the Job controller took it up: the pod runs soon after, unless it has to wait for a node or an image."""
    ready: int = 0
    """Pods that run."""
    ending: str | None = None
    """Why the Job controller has given it up, while it still waits for a pod to stop: the reason of FailureTarget."""
    suspended: bool = False
    """By somebody else, or made so for Kueue to admit it: the operator never changes it."""
    kueue_queue: str | None = None
    """The queue of Kueue that it waits in, or was admitted from."""
    deleting: bool = False
    deleted_at: datetime | None = None
    """When its deletion was asked for; it is there until its pods are gone, if whoever deleted it wanted that."""
    complete: bool = False
    failed: bool = False
    failure_reason: str | None = None
    """Of the Failed condition: BackoffLimitExceeded, DeadlineExceeded, PodFailurePolicy."""
    failure_message: str = ""
    finished_at: datetime | None = None

    @property
    def finished(self) -> bool:
        """Whether the Job controller has ended it, one way or the other."""
        return self.complete or self.failed

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> "JobState":
        """Read a Job as the API server hands it out; what is missing counts as absent, never as an error."""
        metadata: Mapping[str, Any] = manifest["metadata"]
        spec: Mapping[str, Any] = manifest.get("spec") or {}
        status: Mapping[str, Any] = manifest.get("status") or {}
        owner: Mapping[str, Any] = next(
            (
                reference
                for reference in metadata.get("ownerReferences") or ()
                if reference.get("controller") and reference.get("kind") == KIND
            ),
            {},
        )
        conditions = {
            condition["type"]: condition for condition in status.get("conditions") or () if condition.get("status") == "True"
        }
        ended = conditions.get("Complete") or conditions.get("Failed") or {}
        failed = conditions.get("Failed")
        given_up = conditions.get("FailureTarget")
        return cls(
            name=metadata["name"],
            namespace=sys.intern(metadata["namespace"]),
            uid=metadata["uid"],
            resource_version=int(metadata["resourceVersion"]),
            owner_uid=owner.get("uid"),
            owner_name=owner.get("name"),
            attempt=_number((metadata.get("labels") or {}).get(ATTEMPT_LABEL)),
            queue_stamp=sys.intern((metadata.get("annotations") or {}).get(QUEUED_AT_ANNOTATION, "")),
            created_at=parse_time(metadata.get("creationTimestamp")),
            started_at=parse_time(status.get("startTime")),
            ready=status.get("ready") or 0,
            ending=None if given_up is None else given_up.get("reason"),
            suspended=bool(spec.get("suspend")),
            kueue_queue=(metadata.get("labels") or {}).get(KUEUE_QUEUE_LABEL),
            deleting=metadata.get("deletionTimestamp") is not None,
            deleted_at=parse_time(metadata.get("deletionTimestamp")),
            complete="Complete" in conditions,
            failed=failed is not None,
            failure_reason=None if failed is None else failed.get("reason"),
            failure_message="" if failed is None else failed.get("message") or "",
            finished_at=parse_time(ended.get("lastTransitionTime")),
        )


# ------------------------------------------------------------------------------------------------------ pod → report


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a pod does not run yet."""

    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class PodReport:
    """What a pod says about an attempt."""

    name: str
    uid: str
    job_uid: str | None
    index: str | None = None
    """Of an Indexed Job: which of its completions the pod is for."""
    node: str | None = None
    alive: bool = True
    """Neither Succeeded nor Failed: a process may still run in it."""
    running: bool = False
    stop_by: datetime | None = None
    """When it was to have stopped: its deletion was asked for, and its grace period is over then."""
    waiting: Waiting | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    overused: bool = False
    """It was evicted for what it used itself, of disk: more than its volumes or its limits allow."""
    under_pressure: bool = False
    """It was evicted since its node was short of memory or disk, which it may have taken."""
    disrupted: str | None = None
    """Reason of its DisruptionTarget condition, or Evicted, NodeLost, ...: the end was not the task's doing."""
    message: str = ""
    """What Kubernetes says about the end."""
    outcome: AttemptOutcome | None = None
    """The termination message, if the runner wrote one."""
    log: str = ""
    """Else the last lines of its log, which the kubelet hands over: of at most 80 lines and 2 KiB."""


_NO_NEWS: Final = frozenset({"ContainerCreating", "PodInitializing", ""})
# The kubelet goes back and forth between the two; told apart, each turn would cost a status write.
_SAME: Final = {"ErrImagePull": "ImagePullBackOff", "ErrImageNeverPull": "ImagePullBackOff"}
_BY_KUBELET: Final = frozenset({"TerminationByKubelet", "Evicted"})
_SHORT: Final = "The node was low on resource"
"""What the kubelet's message begins with; for the same reason it preempts for critical pods, and ends pods at a shutdown."""
_DISRUPTIONS: Final = frozenset(
    {
        "Evicted",
        "NodeLost",
        "NodeAffinity",
        "NodeShutdown",
        "Preempting",
        "Shutdown",
        "Terminated",
        "UnexpectedAdmissionError",
    }
)


def pod_report(manifest: Mapping[str, Any]) -> PodReport:
    """Read a pod of ours as the API server hands it out."""
    metadata: Mapping[str, Any] = manifest["metadata"]
    status: Mapping[str, Any] = manifest.get("status") or {}
    phase = status.get("phase") or "Pending"
    controller = next(
        (reference["uid"] for reference in metadata.get("ownerReferences") or () if reference.get("controller")), None
    )
    container: Mapping[str, Any] = next(
        (one for one in status.get("containerStatuses") or () if one.get("name") == CONTAINER), {}
    )
    state: Mapping[str, Any] = container.get("state") or {}
    ended: Mapping[str, Any] = state.get("terminated") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions") or ()}
    disruption = conditions.get("DisruptionTarget") or {}
    disrupted = disruption.get("reason") if disruption.get("status") == "True" else None
    overused = disrupted is None and phase == "Failed" and _overused(status)
    if disrupted is None and not overused and phase == "Failed" and status.get("reason") in _DISRUPTIONS:
        disrupted = status["reason"]
    alive = phase not in {"Succeeded", "Failed"}
    started = (state.get("running") or ended).get("startedAt")
    said = ended.get("message") or ""
    outcome = AttemptOutcome.parse(said)
    return PodReport(
        name=metadata["name"],
        uid=metadata["uid"],
        job_uid=controller,
        index=(metadata.get("annotations") or {}).get(INDEX_ANNOTATION),
        node=(manifest.get("spec") or {}).get("nodeName"),
        alive=alive,
        running="running" in state and alive,
        stop_by=parse_time(metadata.get("deletionTimestamp")),
        waiting=_waiting(status, state, conditions) if phase == "Pending" else None,
        started_at=parse_time(started),
        finished_at=parse_time(ended.get("finishedAt")),
        exit_code=ended.get("exitCode"),
        oom_killed=ended.get("reason") == OOM_KILLED,
        overused=overused,
        under_pressure=disrupted in _BY_KUBELET and (status.get("message") or "").startswith(_SHORT),
        disrupted=disrupted,
        message=disruption.get("message") or status.get("message") or "",
        outcome=outcome,
        log="" if outcome is not None else last_lines(said),
    )


def _overused(status: Mapping[str, Any]) -> bool:
    """Whether the kubelet evicted a pod for its own use of disk, and not since the node was short of something.

    In both cases the reason is Evicted. For a pod that exceeds the size of a volume or its limit of ephemeral storage the
    kubelet sets no DisruptionTarget (pkg/kubelet/eviction/eviction_manager.go, localStorageEviction), so the Job ends; nor
    did kubelets before 1.26 for a node that is short, but their messages begin with it.
    """
    return status.get("reason") == "Evicted" and not (status.get("message") or "").startswith("The node ")


def _waiting(status: Mapping[str, Any], state: Mapping[str, Any], conditions: Mapping[str, Mapping[str, Any]]) -> Waiting:
    # A container has a state only once a node has taken the pod: that says more than whether one will.
    waiting: Mapping[str, Any] = state.get("waiting") or {}
    reason = waiting.get("reason") or ""
    if reason not in _NO_NEWS:
        return Waiting(reason=_SAME.get(reason, reason), message=waiting.get("message") or "")
    scheduled = conditions.get("PodScheduled") or {}
    if scheduled.get("status") == "False":
        return Waiting(reason=scheduled.get("reason") or "Unschedulable", message=scheduled.get("message") or "")
    return Waiting(reason="PodPending", message=waiting.get("message") or status.get("message") or "")


def pods_of(job: JobState, pods: Iterable[PodReport]) -> tuple[PodReport, ...]:
    """Return the pods of one Job, those that ended later last; pods that have not ended come after all that have."""
    latest = datetime.max.replace(tzinfo=UTC)
    mine = [pod for pod in pods if pod.job_uid == job.uid]
    return tuple(sorted(mine, key=lambda pod: (pod.finished_at or latest, pod.started_at or latest, pod.name)))


@lru_cache(maxsize=4096)  # of a thousand Jobs of one second each would keep three of its own
def parse_time(text: str | None) -> datetime | None:
    """Read a timestamp of the Kubernetes API; None for none, or for one that is no timestamp."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0
