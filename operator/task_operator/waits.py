"""Why a task does not run yet, and for how long that is put up with. Pure functions.

A pod that does not start holds its task in one of three kinds of wait:

- *for room*: no node fits, or a quota is used up. Others have to finish first, which may take as long as they do: a queue
  in front of a small quota is no fault. Ended after :attr:`~task_operator.observation.Policy.capacity_deadline`.
- *of its own*: its image cannot be pulled, its container cannot be configured, the cluster refuses it. Time cures that
  seldom. Ended after :attr:`~task_operator.observation.Policy.pending_deadline`.
- *by somebody's will or a store's*: suspended, handed back, a store that is down, a limit of ours. Ended by
  ``spec.deadline`` alone.

A wait goes on as long as its kind stays the same, whatever the words for it: ``status.queue.since`` holds its beginning,
so that another process counts from there too.
"""

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from task_contract.models import Phase, QueueStatus, Status, format_duration
from task_operator.dependencies import DEPENDS_ON, NOT_BEFORE
from task_operator.dispatch import Limit
from task_operator.jobs import JobState, pods_of
from task_operator.observation import Ending, Need, Observed, Policy
from task_operator.statuses import clip, to_second

PENDING_DEADLINE_EXCEEDED: Final = "PendingDeadlineExceeded"
"""Reason of a task that failed because its pod never started."""

NO_POOL: Final = "NoPool"
"""Reason of a wait for a worker pool that takes the task."""
QUEUE_UNAVAILABLE: Final = "QueueUnavailable"
"""Reason of a wait for Redis."""

KUEUE_ADMISSION: Final = "KueueAdmission"
"""Reason of a task whose Job Kueue has not admitted, or has taken its admission from."""

_QUOTA: Final = "QuotaExceeded"
_FORBIDDEN: Final = "PodForbidden"
_ROOM: Final = frozenset({"Unschedulable", "SchedulingGated", _QUOTA})
_WANTED: Final = frozenset(Limit) | {
    NO_POOL,
    QUEUE_UNAVAILABLE,
    DEPENDS_ON,
    NOT_BEFORE,
    "Suspended",
    "JobSuspended",
    KUEUE_ADMISSION,
    "HandedBack",
    "StoreUnavailable",
    "SourceUnavailable",
    "KnowledgeBaseBusy",
    "TaskUnfinished",
    "Evicted",
    "NodeLost",
}
_REMEDIES: Final = {
    "Unschedulable": "add a node that fits, or look at node selector, tolerations and resources of the runner",
    _QUOTA: "raise the ResourceQuota of the namespace, or lower the resources of the runner",
    "ImagePullBackOff": "look at the runner's image and pull secrets in the chart's values",
    "InvalidImageName": "correct the runner's image in the chart's values",
}
_REMEDY: Final = "remove the cause"
_CAUSE: Final = 600  # characters of a cause that leave room for the remedy in a status


class Kind(StrEnum):
    """What a wait is for."""

    ROOM = "room"
    OWN = "own"
    WANTED = "wanted"


def kind_of(reason: str) -> Kind:
    """Return what a task with this ``status.queue.reason`` waits for."""
    if reason in _WANTED:
        return Kind.WANTED
    return Kind.ROOM if reason in _ROOM else Kind.OWN


def refused_for(message: str, *, otherwise: str) -> str:
    """Return why the API server would not create a Job or pod: want of quota, for which others have to finish first."""
    return _QUOTA if "exceeded quota" in message else otherwise


def waiting(status: Status, reason: str, message: str, *, now: datetime) -> QueueStatus:
    """Return a wait for ``reason``: the one that the status tells of, going on, or one that begins now."""
    known = status.queue
    goes_on = known is not None and known.since is not None and kind_of(known.reason) is kind_of(reason)
    since = known.since if known is not None and goes_on else to_second(now)
    return QueueStatus(reason=clip(reason), message=clip(message) or None, since=since)


def wait_of(observed: Observed, job: JobState, *, now: datetime) -> QueueStatus | Need | None:
    """Return why the pod of a Job does not run; or what must be known to tell; or None: it does run, or did."""
    status = observed.task.status
    if job.suspended and job.kueue_queue is not None:
        message = f"Job {job.name} waits to be admitted by Kueue, in queue {job.kueue_queue}"
        return waiting(status, KUEUE_ADMISSION, message, now=now)
    if job.suspended:
        return waiting(status, "JobSuspended", f"Job {job.name} is suspended", now=now)
    if Need.PODS not in observed.answered:
        return Need.PODS
    pods = pods_of(job, observed.pods)
    if any(pod.running for pod in pods) or (pods and not any(pod.waiting for pod in pods)):
        return None
    pending = next((pod.waiting for pod in pods if pod.waiting is not None), None)
    if pending is None:
        return _without_pod(observed, job, now=now)
    disrupted = next((pod for pod in pods if pod.disrupted is not None), None)
    if disrupted is not None and pending.reason == "PodPending":
        return waiting(status, "Evicted", f"{disrupted.disrupted}: {disrupted.message}", now=now)
    return waiting(status, pending.reason, pending.message, now=now)


def _without_pod(observed: Observed, job: JobState, *, now: datetime) -> QueueStatus | Need:
    known = observed.task.status.queue
    if known is not None and known.reason in {_QUOTA, _FORBIDDEN}:
        return known  # asking again would tell the same, and cost the API server a search through all events
    if Need.POD_REFUSAL not in observed.answered:
        return Need.POD_REFUSAL
    if observed.pod_refusal is None:
        message = f"the pod of Job {job.name} does not exist yet: kubectl describe job"
        return waiting(observed.task.status, "PodNotCreated", message, now=now)
    reason = refused_for(observed.pod_refusal, otherwise=_FORBIDDEN)
    return waiting(observed.task.status, reason, f"cannot create the pod: {observed.pod_refusal}", now=now)


def overdue(queue: QueueStatus | None, *, attempt: int, now: datetime, policy: Policy) -> Ending | None:
    """Return how a wait that has lasted too long ends its task; None while it has not."""
    left = time_left(queue, now=now, policy=policy)
    if queue is None or left is None or left > timedelta():
        return None
    limit = format_duration(_limit(queue.reason, policy) or timedelta())
    cause = queue.reason if queue.message is None else f"{queue.reason}: {queue.message}"
    if len(cause) > _CAUSE:
        cause = cause[: _CAUSE - 1] + "…"
    remedy = _REMEDIES.get(queue.reason, _REMEDY)
    message = f"cannot start attempt {attempt} within {limit}: {cause}; {remedy}, then create a new task"
    return Ending(phase=Phase.FAILED, reason=PENDING_DEADLINE_EXCEEDED, message=message)


def time_left(queue: QueueStatus | None, *, now: datetime, policy: Policy) -> timedelta | None:
    """Return how much longer a wait may last; None: for ever."""
    limit = None if queue is None else _limit(queue.reason, policy)
    return None if queue is None or queue.since is None or limit is None else queue.since + limit - now


def _limit(reason: str, policy: Policy) -> timedelta | None:
    match kind_of(reason):
        case Kind.ROOM:
            return policy.capacity_deadline or None
        case Kind.OWN:
            return policy.pending_deadline or None
        case Kind.WANTED:
            return None
