"""Why a task is where it is, and what to do: one paragraph. A pure function of what is known.

The status says most of it. Pods, Events, pools, the task that it depends on and the operator say more, as far as the caller
may read them: what may not be read is said at the end, not passed over.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from ptask.tables import (
    FINISHED,
    Manifest,
    age,
    condition,
    moment,
    phase_of,
    plain,
    progress_of,
    span,
    status_of,
)

_UNSEEN: Final = timedelta(seconds=10)
"""So long after its creation the operator has written a status, if it looks at the task at all."""
_EVENT: Final = timedelta(hours=1)  # Events that are older tell of something else

_STORES: Final = "bring it back; the operator tries again after 5 s, then at most every minute, and nothing is counted"
_LIMIT: Final = (
    "the first in line goes on when one of those ends; raise operator.limits of the chart for more, and spec.priority is a "
    "head start"
)

MEANINGS: Final[Mapping[str, tuple[str, str]]] = {
    # Waits: why it does not run.
    "Queued": ("it waits for the operator to give it a place", ""),
    "Suspended": (
        "spec.suspend is true",
        'run `kubectl patch ptask {name} --type=merge -p \'{{"spec":{{"suspend":false}}}}\'`',
    ),
    "JobSuspended": ("somebody, such as a queueing system, has suspended its Job", "admit the Job there"),
    "KueueAdmission": (
        "Kueue has not admitted its Job yet",
        "see why with `kubectl describe workloads`; the ClusterQueue may be full",
    ),
    "TotalLimit": ("as many tasks as operator.limits.total allows have a Job", _LIMIT),
    "NamespaceLimit": ("as many tasks of this namespace as operator.limits allows have a Job", _LIMIT),
    "KnowledgeBaseLimit": ("as many tasks of this knowledge base as operator.limits allows have a Job", _LIMIT),
    "TypeLimit": ("as many tasks of this type as operator.limits allows have a Job", _LIMIT),
    "PoolLimit": (
        "the worker pool has as many tasks as its workers take",
        "raise spec.max of the WorkerPool, or wait until one ends",
    ),
    "NoPool": (
        "spec.executor is pool, and no worker pool of the namespace takes it",
        "make a WorkerPool that serves its type, or create it again with executor auto",
    ),
    "QueueUnavailable": ("the queue of the worker pools, Redis, cannot be reached", "bring Redis back"),
    "StoreUnavailable": ("a store, or the document volume, cannot be reached", _STORES),
    "SourceUnavailable": ("the server that has the document does not answer, or is not configured", _STORES),
    "KnowledgeBaseBusy": ("another task rebuilds, repairs or analyzes the knowledge base", "wait for its end, or cancel it"),
    "TaskUnfinished": ("the task whose vectors it stores has not ended", "look at that task, or cancel this one"),
    "DependsOn": (
        "tasks that spec.dependsOn names have not completed",
        "create those that are not there, or give such tasks a spec.deadline",
    ),
    "NotBefore": ("spec.notBefore is still to come", ""),
    "HandedBack": ("its pod was asked to stop and gave it back", "nothing has to be done; it goes on in another pod"),
    "Evicted": ("its pod was evicted", "nothing has to be done; it goes on in another pod"),
    "NodeLost": ("its node is lost or hangs", "look at the node; the attempt goes on elsewhere"),
    "Unschedulable": ("no node has room for its pod", "add a node that fits, or lower what the runner asks for"),
    "SchedulingGated": ("its pod has a scheduling gate", "have the gate removed by whoever set it"),
    "QuotaExceeded": ("the ResourceQuota of the namespace is used up", "raise it, or wait until other pods end"),
    "PodForbidden": ("the cluster refuses its pod", "remove what the message names"),
    "PodNotCreated": ("its Job has no pod yet", "look at the Job's Events with `kubectl describe job {job}`"),
    "PodPending": ("its pod is being started", ""),
    "ContainerCreating": ("its pod is being started", ""),
    "ImagePullBackOff": (
        "the runner's image cannot be pulled",
        "correct the runner's image or pull secrets in the chart's values",
    ),
    "ErrImagePull": (
        "the runner's image cannot be pulled",
        "correct the runner's image or pull secrets in the chart's values",
    ),
    "InvalidImageName": ("the name of the runner's image is wrong", "correct it in the chart's values"),
    "CreateContainerConfigError": (
        "its container cannot be configured, mostly for a Secret or key that is missing",
        "run `ptask doctor`, which names what the namespace lacks",
    ),
    "JobConflict": ("another object has the name of its Job", "delete that Job"),
    # Failures: what the reason means where its message does not say what to do.
    "OOMKilled": (
        "the runner used more memory than its limit",
        "the next attempt gets twice as much; set a larger spec.resourceClass",
    ),
    "Timeout": ("an attempt took longer than spec.timeout", "give a longer spec.timeout, or split the document"),
    "NoProgress": ("an attempt made no progress for spec.stallTimeout", "see the stacks at the end of `ptask logs {name}`"),
    "DiskFull": ("the attempt filled the volume for temporary files", "split the document"),
    "NodePressure": ("its pods were evicted for want of memory or disk on the node", "set a larger spec.resourceClass"),
    "StoresDisagree": (
        "the two stores did not hold exactly what was written",
        "run `ptask doctor --check` and look at the store that is named",
    ),
    "Unhealthy": (
        "a health check found a component that does not work",
        "bring back what `ptask get {name}` shows as UNHEALTHY",
    ),
    "PodLost": ("its pod is gone and left no word", "look at the health of the node"),
    "PodFailed": ("its pod could not run and left no word", "look at the health of the node"),
    "WorkerLost": ("the worker that had it was lost", "nothing has to be done; the attempt goes to another"),
    "PendingDeadlineExceeded": ("its pod did not start in time", "remove the cause, then `ptask retry {name}`"),
    "DeadlineExceeded": ("it was not done within spec.deadline", "give a longer spec.deadline and create it again"),
    "BatchFailed": (
        "too many documents of the batch failed",
        "see each document's reason through the gateway, correct, and `ptask retry {name}`",
    ),
    "Duplicate": ("another task with the same idempotencyKey came first", "look at that one"),
}
"""Reason → what it means, and what to do; docs/troubleshooting.md has all of them."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known about a task. None: it could not be read, which :attr:`unread` explains."""

    task: Manifest
    now: datetime
    pods: Sequence[Manifest] | None = ()
    """Of the current attempt, the youngest last."""
    events: Sequence[Manifest] | None = ()
    """Of the task and its pods, the youngest last."""
    pools: Sequence[Manifest] | None = ()
    """WorkerPools of the namespace."""
    needed: Mapping[str, Manifest | None] = field(default_factory=dict)
    """By name the tasks that payload.fromTask and spec.dependsOn name; None: it is not there."""
    operators: Sequence[Manifest] | None = None
    """Deployments of operators in the cluster."""
    unread: Sequence[str] = ()
    """What the caller may not read, such as ``pods``."""


def explain(known: Known) -> str:
    """Return one paragraph."""
    task, phase = known.task, phase_of(known.task)
    if phase in FINISHED:
        sentences = _ended(known)
    elif task.get("spec", {}).get("cancel"):
        sentences = [_lead(known), "It was canceled: it ends once its pod has stopped or can publish nothing more."]
        sentences += _pods(known)
    elif phase == "Retrying":
        sentences = _retrying(known)
    elif phase == "Processing":
        sentences = _running(known)
    else:
        sentences = _queued(known)
    if phase not in FINISHED:
        sentences += _deadline(known)
    if known.unread:
        sentences.append(f"(You may not read {' and '.join(known.unread)} here, which may say more.)")
    said = " ".join(sentence.strip() for sentence in sentences if sentence.strip())
    return plain(re.sub(r"\s+", " ", said))


def _lead(known: Known) -> str:
    metadata = known.task["metadata"]
    since = status_of(known.task).get("queuedAt") or metadata.get("creationTimestamp")
    phase = phase_of(known.task)
    length = f" for {age(since, known.now)}" if phase == "Queued" and since else ""
    return f"Task {metadata['name']} is {phase}{length}."


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".")
    return "" if not text else text[0].upper() + text[1:] + "."


def _meaning(reason: str, known: Known) -> tuple[str, str]:
    meaning, remedy = MEANINGS.get(reason, ("", ""))
    job = status_of(known.task).get("job") or "JOB"
    return meaning, remedy.format(name=known.task["metadata"]["name"], job=job)


# --------------------------------------------------------------------------------------------------------------- queued


def _queued(known: Known) -> list[str]:
    task, status = known.task, status_of(known.task)
    sentences = [_lead(known)]
    if task.get("spec", {}).get("suspend") and not status.get("queue"):
        meaning, remedy = _meaning("Suspended", known)
        return [*sentences, f"It does not run since {meaning}.", f"To run it, {remedy}."]
    queue = status.get("queue") or {}
    reason = str(queue.get("reason") or "")
    if not reason:
        return sentences + _unseen(known)
    meaning, remedy = _meaning(reason, known)
    position = queue.get("position")
    place = f"it is number {position} in line" if position else ""
    since = f" since {age(queue.get('since'), known.now)}" if queue.get("since") else ""
    sentences.append(f"It does not run{since} because {meaning or 'of ' + reason} ({reason}).")
    message = str(queue.get("message") or "")
    if message and message not in {reason, meaning}:
        sentences.append(_sentence(message))
    sentences.append(_sentence(place))
    if reason in {"TaskUnfinished", "DependsOn"}:
        sentences += _needed(known)
    if reason == "NotBefore" and (at := moment(task.get("spec", {}).get("notBefore"))) is not None:
        sentences.append(f"That is in {span((at - known.now).total_seconds())}.")
    sentences += _pool(known)
    sentences += _pods(known)
    sentences += _warning(known, message)
    return [*sentences, _sentence(remedy)]


def _unseen(known: Known) -> list[str]:
    """Return what to say of a task that waits without a reason: nobody has looked at it, or it is next."""
    task, status = known.task, status_of(known.task)
    created = moment(task["metadata"].get("creationTimestamp"))
    if created is not None and known.now - created < _UNSEEN:
        return ["It was created just now: the operator has not looked at it yet."]
    if status.get("observedGeneration") and status.get("queuedAt"):
        found = _pool(known) + _pods(known) + _warning(known, "")
        return found or ["The operator knows it and has put it into the queue: it is about to start."]
    return ["No operator has looked at it yet.", *_operators(known)]


def _operators(known: Known) -> list[str]:
    namespace = known.task["metadata"].get("namespace")
    if known.operators is None:
        return [f"Run `ptask doctor`: either the operator does not run, or {namespace} is not one of its taskNamespaces."]
    if not known.operators:
        return ["There is no operator in the cluster: install the chart, or run `ptask doctor`."]
    ready = [one for one in known.operators if (status_of(one).get("readyReplicas") or 0) > 0]
    if not ready:
        one = known.operators[0]["metadata"]
        return [
            f"The operator {one['namespace']}/{one['name']} has no ready pod: see why with "
            f"`kubectl -n {one['namespace']} describe pod -l app.kubernetes.io/component=operator`."
        ]
    return [f"The operator runs, so {namespace} is probably not one of its taskNamespaces: name it in the chart's values."]


def _needed(known: Known) -> list[str]:
    said = []
    for name, needed in known.needed.items():
        if needed is None:
            said.append(f"Task {name} that it needs is not there.")
        elif phase_of(needed) != "Completed":
            said.append(f"Task {name} that it needs is {phase_of(needed)} ({progress_of(needed)} %).")
    return said


def _pool(known: Known) -> list[str]:
    """Return what the pool that has the task, or should have it, is doing."""
    spec, status = known.task.get("spec", {}), status_of(known.task)
    asked = str(status.get("executor") or spec.get("executor") or "auto")
    if asked != "pool" or known.pools is None:
        return []
    serving = [pool for pool in known.pools if spec.get("type") in (pool.get("spec", {}).get("types") or ())]
    if not serving:
        return [
            f"No WorkerPool of the namespace serves {spec.get('type')}: make one, or create the task with executor auto."
        ]
    pool = serving[0]
    there = status_of(pool)
    figures = (
        f"{there.get('ready') or 0} of at most {pool.get('spec', {}).get('max')} workers ready, {there.get('busy') or 0} of "
        f"them busy, {there.get('queued') or 0} tasks waiting"
    )
    ready = condition(pool, "Ready")
    trouble = ""
    if ready.get("status") == "False":
        trouble = f", and is not ready: {ready.get('message') or ready.get('reason')}"
    return [_sentence(f"WorkerPool {pool['metadata']['name']} has {figures}{trouble}")]


# ----------------------------------------------------------------------------------------------------- running, retrying


def _running(known: Known) -> list[str]:
    status = status_of(known.task)
    number = status.get("attempt") or 1
    attempt: Mapping[str, Any] = next((one for one in status.get("attempts") or () if one.get("number") == number), {})
    since = age(attempt.get("startedAt") or status.get("startedAt"), known.now)
    stage = f" at stage {status['stage']}" if status.get("stage") else ""
    lead = f"Task {known.task['metadata']['name']} is Processing{stage}, {progress_of(known.task)} % of attempt {number}"
    sentences = [f"{lead}, which began {since} ago." if since else f"{lead}.", "It waits for nothing but its own work."]
    if known.task.get("spec", {}).get("suspend"):
        sentences[1] = "It was suspended: the attempt is given back once its pod has stopped."
    if error := status.get("error"):
        sentences.append(f"The attempt before failed: {error.get('reason')}, {_sentence(str(error.get('message') or ''))}")
    return sentences + _pods(known) + _warning(known, "")


def _retrying(known: Known) -> list[str]:
    task, status = known.task, status_of(known.task)
    error, number = status.get("error") or {}, int(status.get("attempt") or 1)
    limit = (task.get("spec", {}).get("retry") or {}).get("limit")
    of = "" if limit is None else f" of {int(limit) + 1}"
    reason = str(error.get("reason") or condition(task, "Ready").get("reason") or "an error")
    meaning, remedy = _meaning(reason, known)
    sentences = [f"{_lead(known)[:-1]}: attempt {number}{of} failed with {reason}."]
    sentences.append(_sentence(str(error.get("message") or meaning)))
    at = moment(status.get("retryAt"))
    if at is not None and at > known.now:
        sentences.append(f"The next attempt begins in {span((at - known.now).total_seconds())}.")
    else:
        sentences.append("The next attempt is about to begin.")
    if queue := status.get("queue"):
        sentences.append(_sentence(f"{queue.get('reason')}: {queue.get('message') or ''}".rstrip(": ")))
    return [*sentences, *_pods(known), *_warning(known, str(error.get("message") or "")), _sentence(remedy)]


# ---------------------------------------------------------------------------------------------------------------- ended


def _ended(known: Known) -> list[str]:
    task, status, phase = known.task, status_of(known.task), phase_of(known.task)
    ready, error = condition(task, "Ready"), status.get("error") or {}
    lead = f"Task {task['metadata']['name']} ended {age(status.get('finishedAt'), known.now)} ago: it is {phase}"
    reason = str(error.get("reason") or ready.get("reason") or "")
    lead += f" ({reason})." if reason not in {"", phase} else "."
    meaning, remedy = _meaning(reason, known)
    sentences = [lead]
    message = str(error.get("message") or ready.get("message") or "")
    sentences.append(_sentence(message or meaning))
    if phase == "Completed":
        return [*sentences, "It waits for nothing."]
    if other := status.get("duplicateOf"):
        return [*sentences, f"Task {other} does its work: see `ptask get {other}`."]
    attempts = [one for one in status.get("attempts") or () if one.get("reason")]
    if phase == "Failed" and len(attempts) > 1:
        sentences.append(f"Its attempts ended with {', '.join(str(one['reason']) for one in attempts)}.")
    if error.get("log"):
        sentences.append(f"`ptask logs {task['metadata']['name']}` has the last lines of its log.")
    if phase == "Failed" and ";" not in message:  # our messages end with their remedy behind a semicolon
        sentences.append(_sentence(remedy))
    again = "once the cause is gone" if phase == "Failed" else "if it is wanted after all"
    return [*sentences, f"It will not change any more; `ptask retry {task['metadata']['name']}` makes a new one {again}."]


# -------------------------------------------------------------------------------------------------------------- evidence


def _pods(known: Known) -> list[str]:
    """Return what the youngest pod of the attempt is doing."""
    if not known.pods:
        return []
    pod = known.pods[-1]
    name, state = pod["metadata"]["name"], status_of(pod)
    scheduled = condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        return [_sentence(f"pod {name} has no node: {scheduled.get('message') or scheduled.get('reason')}")]
    for container in (*(state.get("initContainerStatuses") or ()), *(state.get("containerStatuses") or ())):
        waiting = (container.get("state") or {}).get("waiting")
        if waiting:
            said = ": ".join(filter(None, (waiting.get("reason"), waiting.get("message"))))
            return [_sentence(f"pod {name} waits with {said}")]
        over = (container.get("state") or {}).get("terminated")
        if over and state.get("phase") != "Succeeded":
            return [f"Pod {name} has ended with {over.get('reason')} (exit code {over.get('exitCode')})."]
    if pod["metadata"].get("deletionTimestamp"):
        return [f"Pod {name} has been asked to stop."]
    more = f" (one of {len(known.pods)})" if len(known.pods) > 1 else ""
    if state.get("phase") == "Running":
        return [f"Pod {name}{more} runs on node {pod.get('spec', {}).get('nodeName')}."]
    return [f"Pod {name}{more} is {state.get('phase') or 'Pending'}."]


def _warning(known: Known, said: str) -> list[str]:
    """Return the youngest warning that is not in what was said already."""
    for event in reversed(known.events or ()):
        at = moment(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp"))
        if event.get("type") != "Warning" or at is None or known.now - at > _EVENT:
            continue
        message = str(event.get("message") or "").strip()
        if message and message[:60] not in said:
            return [
                _sentence(f"latest warning, {span((known.now - at).total_seconds())} ago: {event.get('reason')}, {message}")
            ]
        return []
    return []


def _deadline(known: Known) -> list[str]:
    text = known.task.get("spec", {}).get("deadline")
    created = moment(known.task["metadata"].get("creationTimestamp"))
    limit = seconds(text)
    if created is None or limit is None:
        return []
    left = (created + timedelta(seconds=limit) - known.now).total_seconds()
    return [f"Its deadline is in {span(left)}." if left > 0 else "Its deadline has passed: the operator is about to end it."]


def seconds(text: Any) -> float | None:
    """Return a duration of a manifest in seconds."""
    if not isinstance(text, str) or not re.fullmatch(r"([0-9]+(h|ms|m|s))+", text):
        return None
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"([0-9]+)(h|ms|m|s)", text))
