"""Whether an installation is whole, and what to do where it is not.

:func:`look` reads the cluster, as far as the caller may; :func:`diagnose` is a pure function of what was seen. What
may not be read is a finding of its own, never taken for good.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ptask.tables import (
    FINISHED,
    Manifest,
    age,
    condition,
    moment,
    phase_of,
    plain,
    status_of,
    waiting_for,
)

if TYPE_CHECKING:
    from ptask.cluster import Cluster

T = TypeVar("T")

_UNSEEN: Final = timedelta(minutes=1)
"""A task that is older than this and has no status was not looked at by any operator."""
_SILENT: Final = timedelta(minutes=30)
"""A task that runs this long without a change of its status is worth a look; spec.stallTimeout ends most before."""
_PULLS: Final = frozenset({"ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull"})
_BROKEN: Final = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CrashLoopBackOff"})
_FRESH: Final = 5.0  # seconds since its renewal by the clock here, after which a Lease is looked at twice
_RENEWALS: Final = 5.0  # seconds in which a leader renews its Lease more than once: it does so every 2 s
_SHOWN: Final = 5  # names of a finding

PARTS: Final = (
    ("service_account", "ServiceAccount", "OPERATOR_SERVICE_ACCOUNT", "processing-task-runner"),
    ("secret", "Secret", "OPERATOR_STORES_SECRET", "processing-task-stores"),
    ("persistent_volume_claim", "PersistentVolumeClaim", "OPERATOR_DOCUMENTS_CLAIM", "processing-task-documents"),
)
"""What a task namespace has: how the client calls it, its kind, the operator's setting with its name, and the default."""


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    UNKNOWN = "unknown"
    WARNING = "warning"
    PROBLEM = "problem"


_STYLES: Final = {Level.OK: "green", Level.UNKNOWN: "cyan", Level.WARNING: "yellow", Level.PROBLEM: "red"}
_MARKS: Final = {Level.OK: "ok", Level.UNKNOWN: "?", Level.WARNING: "warn", Level.PROBLEM: "FAIL"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about one thing, and what to do."""

    level: Level
    subject: str
    message: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return it for -o json."""
        return {"level": str(self.level), "subject": self.subject, "message": self.message, "remedy": self.remedy}


@dataclass(frozen=True, slots=True)
class Denied:
    """Something that could not be read."""

    message: str


@dataclass(frozen=True)
class Seen:
    """What there is in the cluster; Denied where it could not be read."""

    now: datetime
    crds: Mapping[str, "Manifest | Denied | None"]
    """By plural; None: not installed."""
    versions: Mapping[str, Sequence[str]]
    """By plural: versions that this release of the command works with."""
    operators: "Sequence[Manifest] | Denied"
    operator_pods: "Sequence[Manifest] | Denied" = ()
    leases: "Sequence[Manifest] | Denied" = ()
    alive: frozenset[str] = frozenset()
    """Names of Leases that were renewed while they were looked at: no clock has to agree for that."""
    classes: "Sequence[Manifest] | Denied" = ()
    rights: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    """By namespace: what the caller may do."""
    parts: Mapping[str, Mapping[str, "Manifest | bool | Denied | None"]] = field(default_factory=dict)
    """By namespace and kind: the object, None: it is missing, True: there is none by the operator's settings."""
    pods: Mapping[str, "Sequence[Manifest] | Denied"] = field(default_factory=dict)
    """By namespace: pods of tasks."""
    tasks: Mapping[str, "Sequence[Manifest] | Denied"] = field(default_factory=dict)
    """By namespace."""
    health: "Manifest | None" = None
    """The health check that was carried out, if one was asked for."""


# ----------------------------------------------------------------------------------------------------------------- judging


def diagnose(seen: Seen) -> list[Finding]:
    """Return what there is to say, in the order in which to repair it."""
    findings = [*_crds(seen), *_operators(seen), *_leases(seen), *_classes(seen)]
    for namespace in seen.rights:
        findings += _rights(namespace, seen.rights[namespace])
        findings += _parts(namespace, seen.parts.get(namespace, {}))
        findings += _pods(namespace, seen.pods.get(namespace, ()))
        findings += _tasks(namespace, seen.tasks.get(namespace, ()), now=seen.now)
    return [*findings, *_health(seen)]


def worst(findings: Sequence[Finding]) -> Level:
    """Return the worst level."""
    order = list(Level)
    return max((finding.level for finding in findings), key=order.index, default=Level.OK)


def _unknown(subject: str, denied: Denied, what: str) -> Finding:
    return Finding(
        Level.UNKNOWN,
        subject,
        f"cannot tell: {denied.message}",
        f"let somebody run this who may {what}, or ask for that right",
    )


_WITHOUT: Final = {
    "workerpools": "there are no warm pools, every task has a Job",
    "processingschedules": "there are no schedules",
}
"""What a cluster lacks without a kind that is not needed."""


def _crds(seen: Seen) -> list[Finding]:
    findings = []
    for plural, found in seen.crds.items():
        subject = f"CRD {plural}"
        without = _WITHOUT.get(plural)
        if isinstance(found, Denied):
            findings.append(_unknown(subject, found, "get customresourcedefinitions"))
        elif found is None:
            findings.append(
                Finding(
                    Level.PROBLEM if without is None else Level.WARNING,
                    subject,
                    "is not installed" if without is None else f"is not installed: {without}",
                    "install or upgrade the chart with crds.enabled=true (docs/install.md)",
                )
            )
        else:
            findings.append(_crd(subject, found, seen.versions.get(plural, ())))
    return findings


def _crd(subject: str, found: Manifest, versions: Sequence[str]) -> Finding:
    served = [str(one.get("name")) for one in found.get("spec", {}).get("versions", ()) if one.get("served")]
    if not set(served) & set(versions):
        return Finding(
            Level.PROBLEM,
            subject,
            f"serves {', '.join(served) or 'nothing'}; this ptask speaks {', '.join(versions)}",
            "install the ptask of the release that the cluster has",
        )
    established = condition(found, "Established")
    if established.get("status") != "True":
        said = established.get("message") or "is not established"
        return Finding(Level.PROBLEM, subject, str(said), f"see `kubectl describe crd {found['metadata']['name']}`")
    return Finding(Level.OK, subject, f"serves {', '.join(served)}")


def _operators(seen: Seen) -> list[Finding]:
    if isinstance(seen.operators, Denied):
        return [_unknown("operator", seen.operators, "list deployments in the operator's namespace (--system-namespace)")]
    if not seen.operators:
        return [
            Finding(
                Level.PROBLEM,
                "operator",
                "there is no Deployment of an operator",
                "install the chart (docs/install.md); if it is in a namespace that you cannot list, give --system-namespace",
            )
        ]
    return [_operator(deployment, seen) for deployment in seen.operators]


def _operator(deployment: Manifest, seen: Seen) -> Finding:
    metadata, status = deployment["metadata"], status_of(deployment)
    subject = f"operator {metadata['namespace']}/{metadata['name']}"
    wanted, ready = deployment.get("spec", {}).get("replicas", 1), int(status.get("readyReplicas") or 0)
    version = (metadata.get("labels") or {}).get("app.kubernetes.io/version", "unknown")
    if wanted == 0:
        return Finding(
            Level.PROBLEM,
            subject,
            "is scaled to 0: what runs ends, nothing new starts",
            f"run `kubectl -n {metadata['namespace']} scale deployment/{metadata['name']} --replicas=1`",
        )
    if not ready:
        why = _trouble([] if isinstance(seen.operator_pods, Denied) else seen.operator_pods)
        return Finding(
            Level.PROBLEM,
            subject,
            f"has 0 of {wanted} pods ready{why}",
            f"see `kubectl -n {metadata['namespace']} logs deployment/{metadata['name']} --all-containers --tail=50`",
        )
    level = Level.OK if ready >= wanted else Level.WARNING
    return Finding(level, subject, f"has {ready} of {wanted} pods ready, release {version}")


def _trouble(pods: Sequence[Manifest]) -> str:
    for pod in pods:
        for container in _containers(pod):
            state = container.get("state") or {}
            said = state.get("waiting") or (container.get("lastState") or {}).get("terminated") or {}
            if said.get("reason") not in {None, "PodInitializing", "ContainerCreating"}:
                return f": {container.get('name')} {said.get('reason')} {said.get('message') or ''}".rstrip()[:300]
    return ""


def _containers(pod: Manifest) -> list[Mapping[str, Any]]:
    state = status_of(pod)
    return [*(state.get("initContainerStatuses") or ()), *(state.get("containerStatuses") or ())]


def _leases(seen: Seen) -> list[Finding]:
    """A Lease is there where operators elect a leader; one operator alone has none."""
    if isinstance(seen.leases, Denied):
        return [_unknown("leader", seen.leases, "list leases in the operator's namespace")]
    operators = () if isinstance(seen.operators, Denied) else seen.operators
    wanted = {name for one in operators if (name := environment(one).get("OPERATOR_LEASE_NAME"))}
    findings = [
        Finding(Level.PROBLEM, f"leader {name}", "there is no Lease of that name", "see the logs of the operator's pods")
        for name in sorted(wanted - {lease["metadata"]["name"] for lease in seen.leases})
    ]
    for lease in seen.leases:
        spec = lease.get("spec", {})
        name, holder = lease["metadata"]["name"], spec.get("holderIdentity") or ""
        renewed, limit = moment(spec.get("renewTime")), float(spec.get("leaseDurationSeconds") or 15)
        if not holder or renewed is None:
            findings.append(
                Finding(
                    Level.PROBLEM,
                    f"leader {name}",
                    "nobody leads",
                    "see the logs of the operator's pods; one takes the Lease",
                )
            )
        elif name not in seen.alive and (silent := (seen.now - renewed).total_seconds()) > 2 * limit:
            said = f"{holder} has not renewed its Lease for {silent:.0f} s, of {limit:.0f} s that it lasts"
            findings.append(
                Finding(
                    Level.PROBLEM,
                    f"leader {name}",
                    said,
                    "see whether that pod runs; compare the clocks of this machine and the nodes",
                )
            )
        else:
            findings.append(Finding(Level.OK, f"leader {name}", f"is {holder}"))
    return findings


def _classes(seen: Seen) -> list[Finding]:
    """The classes that an operator's settings name are there: without them the cluster refuses every pod."""
    if isinstance(seen.operators, Denied):
        return []
    if isinstance(seen.classes, Denied):
        return [_unknown("PriorityClasses", seen.classes, "list priorityclasses")]
    there = {one["metadata"]["name"] for one in seen.classes}
    named = {
        name for one in seen.operators for name in _named_classes(environment(one).get("OPERATOR_PRIORITY_CLASSES", ""))
    }
    if lacking := sorted(named - there):
        return [
            Finding(
                Level.PROBLEM,
                "PriorityClasses",
                f"missing: {', '.join(lacking)}; the cluster refuses pods of that priority",
                "upgrade the chart with priorityClasses.create=true, or name classes that exist in priorityClasses.existing",
            )
        ]
    return [Finding(Level.OK, "PriorityClasses", f"{', '.join(sorted(named))} are there")] if named else []


def _named_classes(text: str) -> list[str]:
    """Return the names in ``high=a,normal=b`` or a JSON object."""
    import json

    if text.strip().startswith("{"):
        try:
            return [str(value) for value in json.loads(text).values() if value]
        except (ValueError, AttributeError):
            return []
    return [part.partition("=")[2].strip() for part in text.split(",") if part.partition("=")[2].strip()]


def _rights(namespace: str, rights: Mapping[str, bool]) -> list[Finding]:
    lacking = [verb for verb, allowed in rights.items() if not allowed]
    subject = f"{namespace}: your rights"
    if not lacking:
        return [Finding(Level.OK, subject, f"you may {', '.join(rights)}")]
    level = Level.PROBLEM if len(lacking) == len(rights) else Level.WARNING
    return [
        Finding(
            level,
            subject,
            f"you may not {', '.join(lacking)}",
            "ask for the role edit of the namespace (view to look), or a Role with these verbs; "
            "rbac.aggregateToUserRoles of the chart adds tasks to both",
        )
    ]


def _parts(namespace: str, parts: Mapping[str, "Manifest | bool | Denied | None"]) -> list[Finding]:
    findings, there = [], []
    for kind, found in parts.items():
        subject = f"{namespace}: {kind}"
        if isinstance(found, Denied):
            findings.append(_unknown(subject, found, f"get a {kind}"))
        elif found is None:
            findings.append(
                Finding(
                    Level.PROBLEM,
                    subject,
                    "is missing: pods of tasks cannot start",
                    f"name {namespace} in taskNamespaces of the chart"
                    + (", or create the Secret of stores.existingSecret there" if kind.startswith("Secret") else ""),
                )
            )
        elif isinstance(found, Mapping) and found.get("kind") == "PersistentVolumeClaim":
            findings += _claim(subject, found)
        else:
            there.append(kind)
    if there:
        findings.append(Finding(Level.OK, f"{namespace}: parts", f"{', '.join(there)} are there"))
    return findings


def _claim(subject: str, claim: Manifest) -> list[Finding]:
    phase = status_of(claim).get("phase")
    if phase == "Bound":
        return [Finding(Level.OK, subject, "is bound")]
    # WaitForFirstConsumer: the first pod binds it.
    said = f"is {phase}: it is bound by the first pod, or there is no volume for it"
    return [
        Finding(
            Level.WARNING,
            subject,
            said,
            "see `kubectl describe pvc`; documents.storageClassName of the chart chooses the class",
        )
    ]


def _pods(namespace: str, pods: "Sequence[Manifest] | Denied") -> list[Finding]:
    subject = f"{namespace}: pods"
    if isinstance(pods, Denied):
        return [_unknown(subject, pods, "list pods")]
    pulls, broken, nowhere = [], [], []
    for pod in pods:
        name = str(pod["metadata"]["name"])
        reasons = {((one.get("state") or {}).get("waiting") or {}).get("reason"): one for one in _containers(pod)}
        if found := _PULLS & reasons.keys():
            pulls.append(f"{name} ({reasons[next(iter(found))].get('image')})")
        elif found := _BROKEN & reasons.keys():
            waiting = (reasons[next(iter(found))].get("state") or {}).get("waiting") or {}
            broken.append(f"{name} ({waiting.get('reason')}: {waiting.get('message')})")
        elif condition(pod, "PodScheduled").get("status") == "False":
            nowhere.append(f"{name} ({condition(pod, 'PodScheduled').get('message')})")
    findings = []
    if pulls:
        findings.append(
            Finding(
                Level.PROBLEM,
                subject,
                f"cannot pull the image of {_some(pulls)}",
                "correct runner.image and imagePullSecrets in the chart's values; the Secret must exist in the namespace",
            )
        )
    if broken:
        findings.append(
            Finding(
                Level.PROBLEM,
                subject,
                f"cannot start {_some(broken)}",
                "create what the message names, mostly a Secret or a key of it",
            )
        )
    if nowhere:
        findings.append(
            Finding(
                Level.WARNING,
                subject,
                f"no node has room for {_some(nowhere)}",
                "add a node, or lower runner.resources in the chart's values",
            )
        )
    return findings or [Finding(Level.OK, subject, f"{len(pods)} there, none is stuck")]


def _tasks(namespace: str, tasks: "Sequence[Manifest] | Denied", *, now: datetime) -> list[Finding]:
    subject = f"{namespace}: tasks"
    if isinstance(tasks, Denied):
        return [_unknown(subject, tasks, "list processingtasks")]
    unseen, silent, down = [], [], []
    for task in tasks:
        name, created = str(task["metadata"]["name"]), moment(task["metadata"].get("creationTimestamp"))
        status, phase = status_of(task), phase_of(task)
        if phase in FINISHED or created is None:
            continue
        if not status.get("observedGeneration") and not status.get("queuedAt") and now - created > _UNSEEN:
            unseen.append(name)
        elif waiting_for(task) == "StoreUnavailable":
            down.append(f"{name} ({(status.get('queue') or {}).get('message')})")
        elif phase == "Processing" and (since := _last_change(task)) is not None and now - since > _SILENT:
            silent.append(f"{name} ({age(since.isoformat(), now)} at {status.get('stage') or 'no stage'})")
    findings = []
    if unseen:
        findings.append(
            Finding(
                Level.PROBLEM,
                subject,
                f"no operator has looked at {_some(unseen)}",
                f"start the operator, or name {namespace} in taskNamespaces of its chart",
            )
        )
    if down:
        findings.append(
            Finding(
                Level.PROBLEM, subject, f"a store is down for {_some(down)}", "bring it back; tasks go on within a minute"
            )
        )
    if silent:
        findings.append(
            Finding(Level.WARNING, subject, f"no progress of {_some(silent)}", "run `ptask why NAME` and `ptask logs NAME`")
        )
    going = sum(phase_of(task) not in FINISHED for task in tasks)
    return findings or [Finding(Level.OK, subject, f"{len(tasks)} there, {going} not ended, none is stuck")]


def _last_change(task: Manifest) -> datetime | None:
    """Return when the operator last wrote the status, which it does with each step of the progress."""
    times = [
        moment(str(entry.get("time")))
        for entry in task["metadata"].get("managedFields") or ()
        if entry.get("subresource") == "status"
    ]
    begun = moment(status_of(task).get("startedAt"))
    return max((at for at in (*times, begun) if at is not None), default=None)


def _health(seen: Seen) -> list[Finding]:
    task = seen.health
    if task is None:
        return []
    subject, phase = f"health check {task['metadata']['name']}", phase_of(task)
    components = (status_of(task).get("result") or {}).get("components") or ()
    findings = [
        Finding(
            Level.OK if one.get("healthy") else Level.PROBLEM,
            f"{subject}: {one.get('name')}",
            f"{'answers' if one.get('healthy') else 'does not answer'} in {one.get('milliseconds')} ms"
            + (f": {one['message']}" if one.get("message") else ""),
            "" if one.get("healthy") else f"bring {one.get('name')} back, or correct its address in the stores' Secret",
        )
        for one in components
    ]
    if phase == "Completed":
        return [Finding(Level.OK, subject, "a task runs from end to end"), *findings]
    error = status_of(task).get("error") or {}
    said = f"{error.get('reason')}: {error.get('message')}" if error else waiting_for(task) or "it has not ended in time"
    return [
        Finding(Level.PROBLEM, subject, f"is {phase}, {said}", f"run `ptask why {task['metadata']['name']}` for the cause"),
        *findings,
    ]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def environment(deployment: Manifest) -> dict[str, str]:
    """Return the variables of a Deployment's first container that have a value of their own."""
    containers = deployment.get("spec", {}).get("template", {}).get("spec", {}).get("containers") or [{}]
    return {str(one.get("name")): str(one["value"]) for one in containers[0].get("env") or () if "value" in one}


def as_lines(finding: Finding) -> list[tuple[str, str, str]]:
    """Return a finding as lines of mark, style and text; the remedy is a line of its own."""
    mark, style = _MARKS[finding.level], _STYLES[finding.level]
    lines = [(mark, style, plain(f"{finding.subject}: {finding.message}"))]
    return lines + ([("", "", plain(f"→ {finding.remedy}"))] if finding.remedy else [])


# ----------------------------------------------------------------------------------------------------------------- looking


def look(cluster: "Cluster", *, namespaces: Sequence[str] | None, system: str | None, now: datetime) -> Seen:
    """Read what there is to judge. ``namespaces`` None: those that the operators look after, else that of the command."""
    from ptask import cluster as api
    from task_contract import names

    selector = f"app.kubernetes.io/component=operator,app.kubernetes.io/part-of={names.PART_OF}"
    operators = _read(partial(cluster.items, api.DEPLOYMENTS, system, labels=selector))
    if isinstance(operators, Denied) and system is None:  # whoever may not look everywhere may look in the namespace in hand
        operators = _read(partial(cluster.items, api.DEPLOYMENTS, cluster.namespace, labels=selector))
    homes = [] if isinstance(operators, Denied) else sorted({one["metadata"]["namespace"] for one in operators})
    settings = {} if isinstance(operators, Denied) or not operators else environment(operators[0])
    looked_after = [name for name in settings.get("OPERATOR_NAMESPACES", "").replace(" ", "").split(",") if name]
    chosen = list(namespaces) if namespaces is not None else looked_after or [cluster.namespace]
    leases = _each(homes, lambda home: _our_leases(cluster.items(api.LEASES, home), operators))
    return Seen(
        now=now,
        crds={plural: _read(partial(_crd_of, cluster, plural)) for plural in (names.PLURAL, *_WITHOUT)},
        versions={plural: [names.VERSION] for plural in (names.PLURAL, *_WITHOUT)},
        operators=operators,
        operator_pods=_each(homes, lambda home: cluster.pods(home, selector)),
        leases=leases,
        alive=_alive(cluster, leases, now=now),
        classes=_read(partial(cluster.items, api.PRIORITY_CLASSES, None)),
        rights={namespace: _rights_in(cluster, namespace) for namespace in chosen},
        parts={namespace: _parts_of(cluster, namespace, settings) for namespace in chosen},
        pods={
            namespace: _read(partial(cluster.pods, namespace, f"app.kubernetes.io/part-of={names.PART_OF}"))
            for namespace in chosen
        },
        tasks={namespace: _read(partial(cluster.items, api.TASKS, namespace)) for namespace in chosen},
    )


def _read(ask: Callable[[], T]) -> "T | Denied":
    """Return what is there; Denied when the caller may not see it. What cannot be reached ends the command."""
    from service_client.errors import TaskForbidden

    try:
        return ask()
    except TaskForbidden as error:
        return Denied(error.message)


def _each(homes: Sequence[str], ask: Callable[[str], list[Any]]) -> "list[Any] | Denied":
    found: list[Any] = []
    for home in homes:
        one = _read(partial(ask, home))
        if isinstance(one, Denied):
            return one
        found += one
    return found


def _alive(cluster: "Cluster", leases: "Sequence[Manifest] | Denied", *, now: datetime) -> frozenset[str]:
    """Return the Leases that are renewed, of those whose times do not say so: the clocks here and there may differ."""
    from ptask import cluster as api

    found = set()
    for lease in () if isinstance(leases, Denied) else leases:
        metadata, renewed = lease["metadata"], lease.get("spec", {}).get("renewTime")
        at = moment(renewed)
        if at is None or abs((now - at).total_seconds()) < _FRESH:
            continue
        time.sleep(_RENEWALS)
        again = _read(partial(cluster.read, api.LEASES, metadata["name"], metadata["namespace"]))
        if not isinstance(again, Denied) and again.get("spec", {}).get("renewTime") != renewed:
            found.add(str(metadata["name"]))
    return frozenset(found)


def _our_leases(leases: Sequence[Manifest], operators: "Sequence[Manifest] | Denied") -> list[Manifest]:
    known = () if isinstance(operators, Denied) else operators
    mine = {one["metadata"]["name"] for one in known}
    return [
        lease
        for lease in leases
        if lease["metadata"]["name"] in mine | {environment(one).get("OPERATOR_LEASE_NAME") for one in known}
        or (lease["metadata"].get("labels") or {}).get("app.kubernetes.io/part-of") == "processing-tasks"
    ]


def _crd_of(cluster: "Cluster", plural: str) -> Manifest | None:
    from ptask import cluster as api
    from service_client.errors import TaskNotFound
    from task_contract import names

    try:
        return cluster.read_global(api.CRDS, f"{plural}.{names.GROUP}")
    except TaskNotFound:
        return None


def _rights_in(cluster: "Cluster", namespace: str) -> dict[str, bool]:
    from ptask import cluster as api

    pods = api.Resource("", "v1", "pods")
    asked = {
        "list tasks": ("list", api.TASKS, ""),
        "watch tasks": ("watch", api.TASKS, ""),
        "create tasks": ("create", api.TASKS, ""),
        "cancel tasks": ("patch", api.TASKS, ""),
        "list pods": ("list", pods, ""),
        "read logs": ("get", pods, "log"),
    }
    return {
        what: cluster.allowed(verb, resource, namespace, subresource=part) for what, (verb, resource, part) in asked.items()
    }


def _parts_of(
    cluster: "Cluster", namespace: str, settings: Mapping[str, str]
) -> dict[str, "Manifest | bool | Denied | None"]:
    found: dict[str, Manifest | bool | Denied | None] = {}
    for kind, word, setting, default in PARTS:
        name = settings.get(setting, default)
        if not name:
            continue  # the operator gives pods none
        one = _read(partial(cluster.core, kind, name, namespace))
        if kind == "secret" and isinstance(one, Mapping):
            one = {"kind": "Secret"}  # what is in it is nobody's business here
        found[f"{word} {name}"] = one
    return found
