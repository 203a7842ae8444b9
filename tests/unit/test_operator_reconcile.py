"""Every arrow of a task's life as a row: what is observed, and what is decided upon it."""

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest

from task_contract.lifecycle import ARROWS
from task_contract.messages import AttemptOutcome, Outcome, ProgressEvent
from task_contract.models import Component, ComponentHealth, Metadata, Phase, ProcessingTask, Result, Stage, Status
from task_operator import waits
from task_operator.dispatch import GRANTED, Place
from task_operator.jobs import Waiting
from task_operator.observation import Decision, Fence, FenceState, Need, Observed, Policy, Refusal, Store, StoredOutcome
from task_operator.reconcile import decide, refuse
from task_operator.waits import refused_for
from tests.support.operator_values import (
    UID,
    at,
    complete,
    condition,
    ended_attempt,
    ended_pod,
    failed,
    failure,
    fenced,
    finished,
    given_back,
    handed_back,
    job,
    manifest,
    name_of,
    pod,
    processing,
    retrying,
    stamp,
    success,
    task,
)

NOW = 40  # seconds after creation, unless a row says otherwise
PODS = frozenset({Need.PODS})
RESULT = frozenset({Need.RESULT})
ALL = frozenset(Need)
POSTGRES = Store(configured=True)
POSTGRES_DOWN = Store(configured=True, down_since=at(NOW - 10))
POSTGRES_LONG_DOWN = Store(configured=True, down_since=at(NOW - 600))


def stored(outcome: AttemptOutcome, *, holder: str = "pod-1", written: float = 28) -> StoredOutcome:
    return StoredOutcome(outcome=outcome, holder=holder, created_at=at(written))


def progress(attempt: int = 1, percent: int = 62) -> ProgressEvent:
    return ProgressEvent(
        uid=UID, namespace="knowledge", name="handbook", attempt=attempt, stage=Stage.EMBED, progress=percent, at=at(39)
    )


@dataclass(frozen=True)
class Row:
    name: str
    observed: Observed
    status: dict[str, Any] | None = None
    """Fields of the decided status, as dotted paths of its manifest; None: no write."""
    needs: frozenset[Need] = frozenset()
    delete: list[str] = field(default_factory=list)
    create: int | None = None
    delete_task: bool = False
    after: float | None = None
    now: float = NOW


def waits_since(reason: str, since: float) -> ProcessingTask:
    """Return a task whose status says why it has not started, and since when."""
    queue = {"reason": reason, "since": stamp(since)}
    return task(status={"phase": "Queued", "attempt": 0, "queue": queue, "conditions": [condition(reason)]})


QUEUED = task()
PLACE = frozenset({Need.PLACE})
THIRD = Place(3, "KnowledgeBaseLimit", "as many tasks of kb-42 run as may: 4")
STOPPING = pod(running=True, stop_by=at(70))
STUCK = 131  # seconds: a minute after the grace of that pod
CANCEL = {"cancel": True}
SUSPEND = {"suspend": True}
PATIENT = {"retry": {"limit": 8, "initialDelay": "10s", "factor": 2, "maxDelay": "10m", "jitter": 0}}

ROWS = [
    # ------------------------------------------------------------------------------------------------------- starting
    Row("a new task gets its first Job", Observed(task=QUEUED), create=1),
    Row(
        "a Job that is just made is given time",
        Observed(task=QUEUED, jobs=(job(),), jobs_changed_at=at(NOW - 1)),
        after=2,
    ),
    Row(
        "a Job that the Job controller has yet to notice has no pod to look at",
        Observed(task=QUEUED, jobs=(job(started_at=None),)),
        now=21,
        after=10,
    ),
    Row(
        "one that it does not notice is looked at all the same",
        Observed(task=QUEUED, jobs=(job(started_at=None),)),
        now=31,
        needs=PODS,
    ),
    Row("a Job without a ready pod has its pods looked at", Observed(task=QUEUED, jobs=(job(),)), needs=PODS),
    Row(
        "why a pod does not start stands in the status",
        Observed(
            task=QUEUED,
            jobs=(job(),),
            answered=PODS,
            pods=(pod(waiting=Waiting("ImagePullBackOff", "no such image")),),
        ),
        status={"phase": "Queued", "queue.reason": "ImagePullBackOff", "queue.message": "no such image", "attempt": 0},
        after=19.5,
    ),
    Row(
        "the same reason is not written twice",
        Observed(
            task=task(status={"phase": "Queued", "attempt": 0, "queue": {"reason": "Unschedulable"}}),
            jobs=(job(),),
            answered=PODS,
            pods=(pod(waiting=Waiting("Unschedulable", "0/1 nodes")),),
        ),
        after=19.5,
    ),
    Row(
        "a Job whose pod does not exist has the reason looked for",
        Observed(task=QUEUED, jobs=(job(),), answered=PODS),
        needs=frozenset({Need.POD_REFUSAL}),
    ),
    Row(
        "a Job whose pod does not exist says so",
        Observed(task=QUEUED, jobs=(job(),), answered=ALL),
        status={"queue.reason": "PodNotCreated"},
        after=19.5,
    ),
    Row(
        "a pod that the quota does not allow says so in the cluster's words",
        Observed(task=QUEUED, jobs=(job(),), answered=ALL, pod_refusal='pods "x" is forbidden: exceeded quota: few'),
        status={
            "queue.reason": "QuotaExceeded",
            "queue.message": 'cannot create the pod: pods "x" is forbidden: exceeded quota: few',
            "queue.since": stamp(NOW),
            "conditions.Ready": "False/QuotaExceeded",
        },
        after=19.5,
    ),
    Row(
        "a pod that admission refuses says so",
        Observed(task=QUEUED, jobs=(job(),), answered=ALL, pod_refusal='pods "x" is forbidden: violates PodSecurity'),
        status={"queue.reason": "PodForbidden"},
        after=19.5,
    ),
    Row(
        "a refusal that is known is not searched for again",
        Observed(task=waits_since("QuotaExceeded", 10), jobs=(job(),), answered=PODS),
        after=19.5,
    ),
    Row(
        "a class that the settings have not ends the task before it waits for anything",
        Observed(task=task(spec={"resourceClass": "huge"}), limited=True),
        status={"phase": "Failed", "error.reason": "InvalidTask"},
    ),
    Row(
        "one that was taken out of the settings ends no attempt that runs",
        Observed(task=task(spec={"resourceClass": "huge"}, status=processing()), jobs=(job(ready=1),)),
    ),
    # ------------------------------------------------------------------------------------------------- limits
    Row("where there are limits a Job needs a place", Observed(task=QUEUED, limited=True), needs=PLACE),
    Row(
        "with a place it is made",
        Observed(task=QUEUED, limited=True, answered=PLACE, place=GRANTED),
        create=1,
    ),
    Row(
        "a short wait for a place is not told",
        Observed(task=QUEUED, limited=True, answered=PLACE, place=THIRD),
        after=4,
        now=1,
    ),
    Row(
        "a longer one is, with the position",
        Observed(task=QUEUED, limited=True, answered=PLACE, place=THIRD),
        status={
            "phase": "Queued",
            "queue": {
                "position": 3,
                "reason": "KnowledgeBaseLimit",
                "message": "as many tasks of kb-42 run as may: 4",
                "since": stamp(NOW),
            },
            "conditions.Ready": "False/KnowledgeBaseLimit",
        },
    ),
    Row(
        "a position that is known is not told again",
        Observed(
            task=task(status={"phase": "Queued", "queue": {"position": 3, "reason": "KnowledgeBaseLimit"}}),
            limited=True,
            answered=PLACE,
            place=THIRD,
        ),
    ),
    Row(
        "one that is much better is",
        Observed(
            task=task(
                status={"phase": "Queued", "queue": {"position": 6, "reason": "KnowledgeBaseLimit", "since": stamp(9)}}
            ),
            limited=True,
            answered=PLACE,
            place=THIRD,
        ),
        status={"queue.position": 3, "queue.since": stamp(9)},
    ),
    Row(
        "so is another limit",
        Observed(
            task=task(status={"phase": "Queued", "queue": {"position": 3, "reason": "TotalLimit", "since": stamp(9)}}),
            limited=True,
            answered=PLACE,
            place=THIRD,
        ),
        status={"queue.reason": "KnowledgeBaseLimit", "queue.since": stamp(9)},
    ),
    Row(
        "a retry that waits for a place stays a retry",
        Observed(task=task(status=retrying(retry_at=30)), limited=True, answered=PLACE, place=THIRD),
        status={"phase": "Retrying", "queue.reason": "KnowledgeBaseLimit"},
    ),
    Row(
        "a wait for a place has no end but the deadline",
        Observed(task=waits_since("TotalLimit", 10), limited=True, answered=PLACE, place=Place(1, "TotalLimit", "full")),
        status={"queue.position": 1, "queue.since": stamp(10)},
        now=10_000_000,
    ),
    # ------------------------------------------------------------------------------------- pods that never start
    Row(
        "a wait of the same kind goes on, whatever it is called now",
        Observed(
            task=waits_since("PodPending", 10),
            jobs=(job(),),
            answered=PODS,
            pods=(pod(waiting=Waiting("ImagePullBackOff", "no such image")),),
        ),
        status={"queue.reason": "ImagePullBackOff", "queue.since": stamp(10)},
        after=19.5,
    ),
    Row(
        "a wait for room does not count as one of the pod's own",
        Observed(
            task=waits_since("Unschedulable", 10),
            jobs=(job(),),
            answered=PODS,
            pods=(pod(waiting=Waiting("ImagePullBackOff", "no such image")),),
        ),
        status={"queue.reason": "ImagePullBackOff", "queue.since": stamp(3650)},
        after=60,
        now=3650,
    ),
    Row(
        "the end of the longest wait is not slept through",
        Observed(
            task=waits_since("ImagePullBackOff", 10),
            jobs=(job(),),
            answered=PODS,
            pods=(pod(waiting=Waiting("ImagePullBackOff")),),
        ),
        after=10,
        now=3600,
    ),
    Row(
        "a pod that never starts for reasons of its own ends the task, fence first",
        Observed(
            task=waits_since("ImagePullBackOff", 10),
            jobs=(job(),),
            store=POSTGRES,
            answered=PODS,
            pods=(pod(waiting=Waiting("ImagePullBackOff", "no such image")),),
        ),
        needs=frozenset({Need.FENCE}),
        now=3610,
    ),
    Row(
        "a pod that never starts for reasons of its own ends the task",
        Observed(
            task=waits_since("ImagePullBackOff", 10),
            jobs=(job(),),
            store=POSTGRES,
            answered=ALL,
            pods=(pod(waiting=Waiting("ImagePullBackOff", "no such image")),),
            fence=Fence(FenceState.RAISED),
        ),
        status={
            "phase": "Failed",
            "error.reason": "PendingDeadlineExceeded",
            "error.retryable": False,
            "error.message": "cannot start attempt 1 within 1h: ImagePullBackOff: no such image; look at the runner's image "
            "and pull secrets in the chart's values, then create a new task",
            "conditions.Stalled": "True/PendingDeadlineExceeded",
            "queue": None,
            "attempt": 0,
        },
        delete=[name_of(1)],
        now=3610,
    ),
    Row(
        "a commit that came first wins over that deadline too",
        Observed(
            task=waits_since("PodPending", 10),
            jobs=(job(),),
            store=POSTGRES,
            answered=ALL,
            pods=(pod(waiting=Waiting("PodPending")),),
            fence=Fence(FenceState.COMMITTED, success()),
        ),
        after=1,
        now=3610,
    ),
    Row(
        "without a fence the Job goes first",
        Observed(
            task=waits_since("ImagePullBackOff", 10),
            jobs=(job(),),
            answered=PODS,
            pods=(pod(waiting=Waiting("ImagePullBackOff")),),
        ),
        delete=[name_of(1)],
        after=1,
        now=3610,
    ),
    Row(
        "and is waited for",
        Observed(task=waits_since("ImagePullBackOff", 10), jobs=(job(deleting=True),), answered=PODS),
        after=1,
        now=3610,
    ),
    Row(
        "and no other is made in its place",
        Observed(task=waits_since("ImagePullBackOff", 10), answered=PODS),
        status={"phase": "Failed", "error.reason": "PendingDeadlineExceeded"},
        now=3610,
    ),
    Row(
        "a pod that started at the last moment runs",
        Observed(task=waits_since("ImagePullBackOff", 10), jobs=(job(ready=1),)),
        status={"phase": "Processing", "queue": None},
        now=3610,
    ),
    Row(
        "a pod that started before the Job says so runs",
        Observed(task=waits_since("ImagePullBackOff", 10), jobs=(job(),), answered=PODS, pods=(pod(running=True),)),
        after=1,
        now=3610,
    ),
    Row(
        "room is waited for longer, since others may have it",
        Observed(
            task=waits_since("Unschedulable", 10),
            jobs=(job(),),
            answered=PODS,
            pods=(pod(waiting=Waiting("Unschedulable", "0/1 nodes")),),
        ),
        after=60,
        now=3610,
    ),
    Row(
        "but not for ever",
        Observed(
            task=waits_since("Unschedulable", 10),
            jobs=(job(),),
            store=POSTGRES,
            answered=ALL,
            pods=(pod(waiting=Waiting("Unschedulable", "0/1 nodes")),),
            fence=Fence(FenceState.RAISED),
        ),
        status={"phase": "Failed", "error.reason": "PendingDeadlineExceeded"},
        delete=[name_of(1)],
        now=86_410,
    ),
    Row(
        "a quota that refuses the Job itself is no different",
        Observed(task=waits_since("QuotaExceeded", 10), store=POSTGRES, answered=ALL, fence=Fence(FenceState.RAISED)),
        status={"phase": "Failed", "error.reason": "PendingDeadlineExceeded"},
        now=86_410,
    ),
    Row(
        "the try at the end of the wait for a quota is not put off beyond it",
        Observed(task=waits_since("QuotaExceeded", 10), refusal=Refusal("QuotaExceeded", "exceeded quota: pods")),
        status={"queue.since": stamp(10), "retryAt": stamp(86_410)},
        after=10,
        now=86_400,
    ),
    Row(
        "an attempt after a failure that never starts ends the task as well",
        Observed(
            task=task(status=retrying(queue={"reason": "ImagePullBackOff", "since": stamp(10)})),
            jobs=(job(2),),
            store=POSTGRES,
            answered=ALL,
            pods=(pod(2, waiting=Waiting("ImagePullBackOff")),),
            fence=Fence(FenceState.RAISED),
        ),
        status={"phase": "Failed", "error.reason": "PendingDeadlineExceeded", "attempt": 1},
        delete=[name_of(2)],
        now=3610,
    ),
    Row(
        "a store that is down, or a Job that somebody suspended, is waited for without end",
        Observed(task=waits_since("JobSuspended", 10), jobs=(job(suspended=True),)),
        after=60,
        now=10_000_000,
    ),
    Row(
        "pods that run before the Job says so are no news",
        Observed(task=QUEUED, jobs=(job(),), answered=PODS, pods=(pod(running=True),)),
        after=1,
    ),
    Row(
        "a Job that somebody suspended is the reason for waiting",
        Observed(task=QUEUED, jobs=(job(suspended=True),)),
        status={"queue.reason": "JobSuspended"},
        after=19.5,
    ),
    Row(
        "a Job that Kueue has not admitted waits for that, without end",
        Observed(task=waits_since("KueueAdmission", 10), jobs=(job(suspended=True, kueue_queue="team"),)),
        after=60,
        now=10_000_000,
    ),
    Row(
        "an attempt that Kueue takes its place from is given back, uncounted, and keeps its Job",
        Observed(task=task(status=processing()), jobs=(job(suspended=True, kueue_queue="team"),)),
        status={"phase": "Queued", "queue.reason": "KueueAdmission", "attempt": 1, "attempts": []},
        after=49.5,
        now=100,
    ),
    Row(
        "a pod that runs makes the task Processing",
        Observed(task=QUEUED, jobs=(job(ready=1),)),
        status={
            "phase": "Processing",
            "attempt": 1,
            "job": name_of(1),
            "startedAt": stamp(NOW),
            "queuedAt": stamp(0),
            "progress": 0,
            "executor": "job",
            "attempts": [{"number": 1, "job": name_of(1), "startedAt": stamp(NOW)}],
        },
    ),
    Row(
        "a quota that is used up is waited for",
        Observed(task=QUEUED, refusal=Refusal("QuotaExceeded", "exceeded quota: pods")),
        status={"phase": "Queued", "queue.reason": "QuotaExceeded", "queue.since": stamp(NOW), "retryAt": stamp(NOW + 5)},
        after=5,
    ),
    Row(
        "a quota that stays used up is asked less often",
        Observed(
            task=task(status={"phase": "Queued", "attempt": 0, "queue": {"reason": "QuotaExceeded", "since": stamp(10)}}),
            refusal=Refusal("QuotaExceeded", "exceeded quota: pods"),
        ),
        status={"queue.since": stamp(10), "retryAt": stamp(NOW + 30)},
        after=30,
    ),
    Row(
        "a Job of the same name that is not ours ends the task",
        Observed(task=QUEUED, refusal=Refusal("JobConflict", "cannot create Job", permanent=True)),
        status={"phase": "Failed", "error.reason": "JobConflict", "error.retryable": False},
    ),
    Row(
        "an attempt that may have run unseen has its result looked for",
        Observed(task=QUEUED, store=POSTGRES),
        needs=frozenset({Need.RESULT}),
        now=400,
    ),
    Row(
        "a result that was stored unseen counts",
        Observed(task=QUEUED, store=POSTGRES, answered=ALL, result=stored(success())),
        status={"phase": "Completed", "result.chunks": 87},
        now=400,
    ),
    Row(
        "without a stored result an old task just starts",
        Observed(task=QUEUED, store=POSTGRES, answered=ALL),
        create=1,
        now=400,
    ),
    # -------------------------------------------------------------------------------------------------------- running
    Row(
        "progress is written",
        Observed(task=task(status=processing()), jobs=(job(ready=1),), progress=progress()),
        status={"stage": "embed", "progress": 62, "phase": "Processing"},
    ),
    Row(
        "progress within a second of the last write waits",
        Observed(task=task(status=processing()), jobs=(job(ready=1),), progress=progress(), last_write=at(NOW - 0.25)),
        after=0.75,
    ),
    Row(
        "progress of another attempt is none",
        Observed(task=task(status=processing(2)), jobs=(job(2, ready=1),), progress=progress(attempt=1)),
    ),
    Row("a task that runs as its status says needs nothing", Observed(task=task(status=processing()), jobs=(job(ready=1),))),
    Row(
        "a pod that was evicted is replaced within the Job: the task waits again",
        Observed(
            task=task(status=processing()),
            jobs=(job(),),
            answered=PODS,
            pods=(
                ended_pod(disrupted="EvictionByEvictionAPI", message="drained"),
                pod(uid="second", name="second", waiting=Waiting("PodPending")),
            ),
        ),
        status={"phase": "Queued", "queue.reason": "Evicted", "attempt": 1, "queuedAt": stamp(0), "attempts": []},
        after=19.5,
    ),
    # -------------------------------------------------------------------------------------------------------- success
    Row("a Job that has ended has its pods read", Observed(task=task(status=processing()), jobs=(complete(),)), needs=PODS),
    Row(
        "the termination message completes the task",
        Observed(task=task(status=processing()), jobs=(complete(),), answered=PODS, pods=(ended_pod(outcome=success()),)),
        status={
            "phase": "Completed",
            "result.chunks": 87,
            "progress": 100,
            "finishedAt": stamp(NOW),
            "conditions.Ready": "True/Completed",
            "conditions.Succeeded": "True/Completed",
            "conditions.StoresConsistent": "True/Verified",
            "attempts": [ended_attempt(1, "Succeeded") | {"finishedAt": stamp(NOW)}],
        },
    ),
    Row(
        "Processing is skipped by a task that has ended before anyone looked",
        Observed(task=QUEUED, jobs=(complete(),), answered=PODS, pods=(ended_pod(outcome=success()),)),
        status={"phase": "Completed", "startedAt": stamp(5), "attempt": 1, "job": name_of(1)},
    ),
    Row(
        "a superseded task is Completed with that reason",
        Observed(
            task=task(status=processing()),
            jobs=(complete(),),
            answered=PODS,
            pods=(ended_pod(outcome=success(reason="Superseded")),),
        ),
        status={"phase": "Completed", "conditions.Succeeded": "True/Superseded"},
    ),
    Row(
        "without a message the stored result is looked for",
        Observed(task=task(status=processing()), jobs=(complete(),), store=POSTGRES, answered=PODS),
        needs=frozenset({Need.RESULT}),
    ),
    Row(
        "a Job that has completed has its stored result read, which costs less than its pods",
        Observed(task=task(status=processing()), jobs=(complete(),), store=POSTGRES),
        needs=RESULT,
    ),
    Row(
        "a stored success needs no pods",
        Observed(task=QUEUED, jobs=(complete(started_at=at(3)),), store=POSTGRES, answered=RESULT, result=stored(success())),
        status={"phase": "Completed", "result.chunks": 87, "startedAt": stamp(3)},
    ),
    Row(
        "when an attempt began that was seen to run, its status tells best",
        Observed(
            task=task(status=processing()),
            jobs=(complete(started_at=at(3)),),
            store=POSTGRES,
            answered=RESULT,
            result=stored(success()),
        ),
        status={"attempts": [ended_attempt(1, "Succeeded") | {"finishedAt": stamp(NOW)}]},
    ),
    Row(
        "a Job that has completed without a stored success has its pods read",
        Observed(task=QUEUED, jobs=(complete(),), store=POSTGRES, answered=RESULT, result=stored(failure())),
        needs=PODS,
    ),
    Row(
        "a PostgreSQL that is down is not asked first",
        Observed(task=QUEUED, jobs=(complete(),), store=POSTGRES_DOWN),
        needs=PODS,
    ),
    Row(
        "a Job that has failed has its pods read first",
        Observed(task=task(status=processing()), jobs=(failed(),), store=POSTGRES),
        needs=PODS,
    ),
    Row(
        "the stored result completes a task whose pod is gone",
        Observed(task=task(status=processing()), jobs=(complete(),), store=POSTGRES, answered=ALL, result=stored(success())),
        status={"phase": "Completed", "result.chunks": 87},
    ),
    Row(
        "a success that nobody can tell of is a counted failure",
        Observed(task=task(status=processing()), jobs=(complete(),), answered=PODS, pods=(ended_pod(exit_code=0),)),
        status={"phase": "Retrying", "error.reason": "ResultLost", "retryAt": stamp(NOW + 10)},
        after=10,
    ),
    Row(
        "an end without a message waits for a PostgreSQL that is down",
        Observed(task=task(status=processing()), jobs=(complete(),), store=POSTGRES_DOWN, answered=ALL),
        after=5,
    ),
    Row(
        "but not for ever",
        Observed(task=task(status=processing()), jobs=(complete(),), store=POSTGRES_LONG_DOWN, answered=ALL),
        status={"phase": "Retrying", "error.reason": "ResultLost"},
        after=10,
    ),
    # -------------------------------------------------------------------------------------------------------- failure
    Row(
        "a failure that may pass is tried again after a wait",
        Observed(task=task(status=processing()), jobs=(failed(),), answered=PODS, pods=(ended_pod(outcome=failure()),)),
        status={
            "phase": "Retrying",
            "attempt": 1,
            "error.reason": "StoresDisagree",
            "error.stage": "verify",
            "retryAt": stamp(NOW + 10),
            "conditions.Reconciling": "True/StoresDisagree",
            "conditions.StoresConsistent": "False/StoresDisagree",
            "attempts": [ended_attempt(1) | {"finishedAt": stamp(NOW)}],
        },
        after=10,
    ),
    Row(
        "waits grow with the number of failures",
        Observed(task=task(status=processing(3)), jobs=(failed(3),), answered=PODS, pods=(ended_pod(3, outcome=failure()),)),
        status={"phase": "Retrying", "attempt": 3, "retryAt": stamp(NOW + 40)},
        after=40,
    ),
    Row(
        "the attempt after the last allowed one is not made",
        Observed(task=task(status=processing(4)), jobs=(failed(4),), answered=PODS, pods=(ended_pod(4, outcome=failure()),)),
        status={
            "phase": "Failed",
            "attempt": 4,
            "error.reason": "StoresDisagree",
            "conditions.Stalled": "True/StoresDisagree",
            "conditions.StoresConsistent": "False/StoresDisagree",
        },
    ),
    Row(
        "a failure that would come again ends the task at once",
        Observed(
            task=task(status=processing()),
            jobs=(failed(reason="PodFailurePolicy"),),
            answered=PODS,
            pods=(ended_pod(outcome=failure("DocumentUnreadable", retryable=False)),),
        ),
        status={
            "phase": "Failed",
            "error.reason": "DocumentUnreadable",
            "conditions.Ready": "False/DocumentUnreadable",
            "conditions.Succeeded": "False/DocumentUnreadable",
        },
    ),
    Row(
        "a runner out of memory is a counted failure of its own",
        Observed(
            task=task(status=processing()),
            jobs=(failed(),),
            answered=PODS,
            pods=(ended_pod(oom_killed=True, exit_code=137),),
        ),
        status={"phase": "Retrying", "error.reason": "OOMKilled"},
        after=10,
    ),
    Row(
        "a runner that crashes says its exit code, and the last lines of its log are kept",
        Observed(
            task=task(status=processing()),
            jobs=(failed(),),
            answered=PODS,
            pods=(ended_pod(exit_code=139, log="Fatal Python error: Segmentation fault"),),
        ),
        status={
            "phase": "Retrying",
            "error.reason": "ContainerFailed",
            "error.message": "the runner ended with exit code 139 (SIGSEGV) without saying why; see its last lines",
            "error.log": "Fatal Python error: Segmentation fault",
        },
        after=10,
    ),
    *(
        Row(
            f"a pod that was evicted for what it wrote itself is counted, {what}",
            Observed(
                task=task(status=processing()),
                jobs=(failed(),),
                store=POSTGRES,
                answered=ALL,
                pods=(ended_pod(exit_code=143, outcome=said, overused=True, message='Usage of "tmp" exceeds "1Gi". '),),
                result=row,
            ),
            status={
                "phase": "Retrying",
                "error.reason": "DiskFull",
                "error.message": 'cannot finish the attempt: Usage of "tmp" exceeds "1Gi". '
                "Split the document, or lower TASKS_MAX_DOCUMENT_BYTES",
            },
            after=10,
        )
        for what, said, row in (
            ("though it said nothing", None, None),
            ("though it said that it hands back", handed_back("HandedBack"), None),
            ("though it stored that it hands back", None, stored(handed_back("HandedBack"), written=19)),
        )
    ),
    *(
        Row(
            f"pods that are evicted again and again are counted when the node was short of something: {what}",
            Observed(
                task=task(status=processing(), spec={"retry": {"limit": limit}}),
                jobs=(job(),),
                jobs_changed_at=at(30),
                answered=PODS,
                pods=(
                    *(
                        ended_pod(
                            uid=f"pod-{number}",
                            exit_code=137,
                            disrupted="TerminationByKubelet",
                            under_pressure=pressed,
                            message="The node was low on resource: memory. ",
                        )
                        for number in range(times)
                    ),
                    pod(uid="next", waiting=Waiting("PodPending")),
                ),
            ),
            status=status,
            delete=[name_of(1)] if status["phase"] != "Queued" else [],
            after=after,
        )
        for what, times, pressed, limit, status, after in (
            ("not yet", 2, True, 3, {"phase": "Queued", "queue.reason": "Evicted", "attempts": []}, 19.5),
            ("not for a drain", 9, False, 3, {"phase": "Queued", "queue.reason": "Evicted", "attempts": []}, 19.5),
            ("three times", 3, True, 3, {"phase": "Retrying", "error.reason": "NodePressure"}, 10),
            ("the last attempt", 3, True, 0, {"phase": "Failed", "error.reason": "NodePressure"}, None),
        )
    ),
    Row(
        "unless its work was done before",
        Observed(
            task=task(status=processing()),
            jobs=(failed(),),
            store=POSTGRES,
            answered=ALL,
            pods=(ended_pod(exit_code=137, overused=True),),
            result=stored(success(), written=19),
        ),
        status={"phase": "Completed"},
    ),
    Row(
        "a runner that ran out of memory leaves its last lines too",
        Observed(
            task=task(status=processing()),
            jobs=(failed(),),
            answered=PODS,
            pods=(ended_pod(oom_killed=True, exit_code=137, log="embedding"),),
        ),
        status={"phase": "Retrying", "error.reason": "OOMKilled", "error.log": "embedding"},
        after=10,
    ),
    Row(
        "a runner that no thread could end in time is known by the stacks at the end of its log",
        Observed(
            task=task(status=processing()),
            jobs=(failed(),),
            answered=PODS,
            pods=(ended_pod(exit_code=1, log='Thread 0x01:\n  File "/re.py", line 7 in match\n'),),
        ),
        status={"phase": "Retrying", "error.reason": "NoProgress"},
        after=10,
    ),
    Row(
        "a runner that a thread could end in time is one more failed attempt",
        Observed(
            task=task(status=processing(), spec={"retry": {"limit": 0}}),
            jobs=(failed(),),
            answered=PODS,
            pods=(ended_pod(exit_code=75, outcome=failure("NoProgress").model_copy(update={"log": "one\ntwo"})),),
        ),
        status={"phase": "Failed", "error.reason": "NoProgress", "error.log": "one\ntwo"},
    ),
    Row(
        "a permanent exit code without a message is permanent",
        Observed(task=task(status=processing()), jobs=(failed(),), answered=PODS, pods=(ended_pod(exit_code=65),)),
        status={"phase": "Failed", "error.reason": "PermanentError"},
    ),
    Row(
        "a pod that is gone without a trace is a counted failure",
        Observed(task=task(status=processing()), jobs=(failed(),), answered=PODS),
        status={"phase": "Retrying", "error.reason": "PodLost"},
        after=10,
    ),
    Row(
        "the deadline of a Job that ran is a timeout",
        Observed(
            task=task(status=processing()),
            jobs=(failed(reason="DeadlineExceeded"),),
            answered=PODS,
            pods=(ended_pod(outcome=handed_back("HandedBack")),),
        ),
        status={"phase": "Retrying", "error.reason": "Timeout"},
        after=10,
    ),
    Row(
        "a success at the Job's deadline is a success",
        Observed(
            task=task(status=processing()),
            jobs=(failed(reason="DeadlineExceeded"),),
            answered=PODS,
            pods=(ended_pod(outcome=success()),),
        ),
        status={"phase": "Completed"},
    ),
    Row(
        "a pod that never started does not count",
        Observed(
            task=task(status={"phase": "Queued", "attempt": 0, "queue": {"reason": "Unschedulable"}}),
            jobs=(failed(reason="DeadlineExceeded"),),
            answered=PODS,
        ),
        status={"phase": "Queued", "queue.reason": "Unschedulable", "attempt": 1, "retryAt": stamp(NOW + 5)},
        delete=[name_of(1)],
        after=5,
    ),
    Row(
        "a fenced attempt of a live task is counted and tried again",
        Observed(task=task(status=processing()), jobs=(failed(),), answered=PODS, pods=(ended_pod(outcome=fenced()),)),
        status={"phase": "Retrying", "error.reason": "Fenced", "error.retryable": True},
        after=10,
    ),
    # ----------------------------------------------------------------------------------------------------- next attempt
    Row(
        "the next attempt waits for its time",
        Observed(task=task(status=retrying(retry_at=NOW + 7)), jobs=(failed(),)),
        after=7,
    ),
    Row("its time come, the next attempt gets its Job", Observed(task=task(status=retrying()), jobs=(failed(),)), create=2),
    Row(
        "the Job of the earlier attempt goes when the next one has its own",
        Observed(task=task(status=retrying()), jobs=(failed(1), job(2)), jobs_changed_at=at(NOW - 1)),
        delete=[name_of(1)],
        after=2,
    ),
    Row(
        "the next attempt runs",
        Observed(task=task(status=retrying()), jobs=(job(2, ready=1),)),
        status={"phase": "Processing", "attempt": 2, "job": name_of(2), "startedAt": stamp(5)},
    ),
    Row(
        "the sixth attempt waits until PostgreSQL has the first, which leaves the list",
        Observed(task=task(spec=PATIENT, status=retrying(5)), jobs=(job(6, ready=1),), store=POSTGRES, projected=99),
        after=1,
    ),
    Row(
        "it waits longer for a PostgreSQL that is down",
        Observed(task=task(spec=PATIENT, status=retrying(5)), jobs=(job(6, ready=1),), store=POSTGRES_LONG_DOWN),
        after=5,
    ),
    Row(
        "it is told once PostgreSQL has the first",
        Observed(task=task(spec=PATIENT, status=retrying(5)), jobs=(job(6, ready=1),), store=POSTGRES, projected=100),
        status={"phase": "Processing", "attempt": 6},
    ),
    Row(
        "without PostgreSQL there is nothing to wait for",
        Observed(task=task(spec=PATIENT, status=retrying(5)), jobs=(job(6, ready=1),)),
        status={"phase": "Processing", "attempt": 6},
    ),
    Row(
        "five attempts fit: nothing waits",
        Observed(task=task(spec=PATIENT, status=retrying(4)), jobs=(job(5, ready=1),), store=POSTGRES_LONG_DOWN),
        status={"phase": "Processing", "attempt": 5},
    ),
    Row(
        "an attempt that is given back leaves the list at once",
        Observed(
            task=task(spec=PATIENT, status=processing(5)),
            jobs=(failed(5),),
            store=POSTGRES_LONG_DOWN,
            answered=ALL,
            pods=(ended_pod(5, outcome=handed_back(attempt=5)),),
        ),
        status={"phase": "Queued", "queue.reason": "StoreUnavailable"},
        delete=[name_of(5)],
        after=5,
    ),
    Row(
        "an end that would push the first attempt out waits as well",
        Observed(
            task=task(spec=PATIENT, status=retrying(5)),
            jobs=(complete(6),),
            store=POSTGRES,
            answered=ALL,
            pods=(ended_pod(6, outcome=success(6)),),
        ),
        after=1,
    ),
    Row(
        "a Job of an earlier attempt that still runs is ended",
        Observed(task=task(status=processing(2)), jobs=(job(1, ready=1), job(2, ready=1))),
        delete=[name_of(1)],
    ),
    Row(
        "why the next attempt does not start is said without leaving Retrying",
        Observed(
            task=task(status=retrying()), jobs=(job(2),), answered=PODS, pods=(pod(2, waiting=Waiting("Unschedulable")),)
        ),
        status={"phase": "Retrying", "queue.reason": "Unschedulable"},
        after=19.5,
    ),
    # ----------------------------------------------------------------------------------------------------- given back
    Row(
        "a store that is down gives the attempt back, uncounted",
        Observed(task=task(status=processing()), jobs=(failed(),), answered=PODS, pods=(ended_pod(outcome=handed_back()),)),
        status={
            "phase": "Queued",
            "attempt": 1,
            "queue.reason": "StoreUnavailable",
            "queue.since": stamp(NOW),
            "queuedAt": stamp(NOW),
            "retryAt": stamp(NOW + 5),
            "attempts": [],
            "conditions.Ready": "False/StoreUnavailable",
        },
        delete=[name_of(1)],
        after=5,
    ),
    Row(
        "so does a server of documents that is down, under a reason of its own",
        Observed(
            task=task(status=processing()),
            jobs=(failed(),),
            answered=PODS,
            pods=(ended_pod(outcome=handed_back("SourceUnavailable")),),
        ),
        status={"phase": "Queued", "queue.reason": "SourceUnavailable", "attempts": []},
        delete=[name_of(1)],
        after=5,
    ),
    Row(
        "an eviction that fails the Job gives the attempt back",
        Observed(
            task=task(status=processing()),
            jobs=(failed(),),
            answered=PODS,
            pods=(ended_pod(disrupted="PreemptionByScheduler", exit_code=137),),
        ),
        status={"phase": "Queued", "queue.reason": "Evicted"},
        delete=[name_of(1)],
        after=5,
    ),
    Row(
        "exit codes say it too, when the message is lost",
        Observed(task=task(status=processing()), jobs=(failed(),), answered=PODS, pods=(ended_pod(exit_code=69),)),
        status={"phase": "Queued", "queue.reason": "StoreUnavailable"},
        delete=[name_of(1)],
        after=5,
    ),
    Row(
        "a stop by SIGTERM is found in PostgreSQL when the pod is gone",
        Observed(
            task=task(status=processing()),
            jobs=(failed(),),
            store=POSTGRES,
            answered=ALL,
            result=stored(handed_back("HandedBack")),
        ),
        status={"phase": "Queued", "queue.reason": "HandedBack"},
        delete=[name_of(1)],
        after=5,
    ),
    Row(
        "what an earlier Job of the same number handed back says nothing about this one",
        Observed(
            task=task(status=processing(queuedAt=stamp(20))),
            jobs=(failed(queued_at=20, created_at=at(26)),),
            store=POSTGRES,
            answered=ALL,
            pods=(ended_pod(queued_at=20, uid="other", oom_killed=True),),
            result=stored(handed_back(), written=19),
        ),
        status={"phase": "Retrying", "error.reason": "OOMKilled"},
        after=10,
    ),
    Row(
        "the Job that was given back is deleted and not read again",
        Observed(task=task(status=given_back()), jobs=(failed(),)),
        delete=[name_of(1)],
        after=5,
    ),
    Row(
        "its name is waited for",
        Observed(task=task(status=given_back()), jobs=(failed(deleting=True),)),
        after=5,
    ),
    Row("the wait over, the same number is tried again", Observed(task=task(status=given_back())), create=1),
    Row("the wait not over, nothing happens", Observed(task=task(status=given_back(retry_at=NOW + 3))), after=3),
    Row(
        "giving back again doubles the wait",
        Observed(
            task=task(status=processing(queuedAt=stamp(10), retryAt=stamp(30))),
            jobs=(failed(queued_at=10),),
            answered=PODS,
            pods=(ended_pod(queued_at=10, outcome=handed_back()),),
        ),
        status={"phase": "Queued", "queuedAt": stamp(NOW), "retryAt": stamp(NOW + 40)},
        delete=[name_of(1)],
        after=40,
    ),
    Row(
        "a stay in the queue has its own second, whatever the clock says",
        Observed(
            task=task(status=processing(queuedAt=stamp(50))),
            jobs=(failed(queued_at=50),),
            answered=PODS,
            pods=(ended_pod(queued_at=50, outcome=handed_back()),),
        ),
        status={"queuedAt": stamp(51)},
        delete=[name_of(1)],
        after=5,
    ),
    # ------------------------------------------------------------------------------------------------------- Job lost
    Row(
        "a Job that is missing is asked for at the API server",
        Observed(task=task(status=processing())),
        needs=frozenset({Need.JOB}),
    ),
    Row(
        "a Job that is missing has its result looked for",
        Observed(task=task(status=processing()), store=POSTGRES, answered=frozenset({Need.JOB})),
        needs=frozenset({Need.RESULT}),
    ),
    Row(
        "a Job deleted by hand is a counted attempt",
        Observed(task=task(status=processing()), store=POSTGRES, answered=ALL, result=stored(handed_back("HandedBack"))),
        status={"phase": "Retrying", "error.reason": "JobDeleted"},
        after=10,
    ),
    Row(
        "a Job deleted after the commit completes the task",
        Observed(task=task(status=processing()), store=POSTGRES, answered=ALL, result=stored(success())),
        status={"phase": "Completed", "result.chunks": 87},
    ),
    Row(
        "a Job that is being deleted is waited for",
        Observed(task=task(status=processing()), jobs=(job(deleting=True),), answered=PODS),
        after=5,
    ),
    # ------------------------------------------------------------------------------------------- pods that do not stop
    Row(
        "a pod that was told to stop is given its grace and a minute",
        Observed(task=task(status=processing()), jobs=(job(),), answered=PODS, pods=(STOPPING,), store=POSTGRES),
        after=60,
    ),
    Row(
        "a pod beside it that runs has the attempt",
        Observed(
            task=task(status=processing()),
            jobs=(job(),),
            answered=PODS,
            pods=(STOPPING, pod(running=True, name="pod-2", uid="pod-2")),
            store=POSTGRES,
        ),
        now=STUCK,
        after=1,
    ),
    Row(
        "a pod that does not stop has its result looked for",
        Observed(task=task(status=processing()), jobs=(job(),), answered=PODS, pods=(STOPPING,), store=POSTGRES),
        now=STUCK,
        needs=frozenset({Need.RESULT}),
    ),
    Row(
        "a pod that stored a success before it got stuck has succeeded",
        Observed(
            task=task(status=processing()),
            jobs=(job(),),
            answered=PODS | {Need.RESULT},
            pods=(STOPPING,),
            store=POSTGRES,
            result=stored(success()),
        ),
        now=STUCK,
        status={"phase": "Completed", "result.chunks": 87},
    ),
    Row(
        "a pod that does not stop has its intents taken",
        Observed(
            task=task(status=processing()),
            jobs=(job(),),
            answered=PODS | {Need.RESULT},
            pods=(STOPPING,),
            store=POSTGRES,
        ),
        now=STUCK,
        needs=frozenset({Need.RELEASE}),
    ),
    Row(
        "and the attempt goes elsewhere, uncounted",
        Observed(
            task=task(status=processing(2)),
            jobs=(job(2),),
            answered=ALL,
            pods=(pod(2, running=True, stop_by=at(70), node="worker-7"),),
            store=POSTGRES,
            release=Fence(FenceState.RAISED),
        ),
        now=STUCK,
        status={"phase": "Queued", "attempt": 2, "queue.reason": "NodeLost", "attempts": [ended_attempt(1)]},
        delete=[name_of(2)],
        after=5,
    ),
    Row(
        "but not while PostgreSQL is away: the pod might commit when it is back",
        Observed(task=task(status=processing()), jobs=(job(),), answered=ALL, pods=(STOPPING,), store=POSTGRES_DOWN),
        now=STUCK,
        after=5,
    ),
    Row(
        "a commit that came first counts",
        Observed(
            task=task(status=processing()),
            jobs=(job(),),
            answered=ALL,
            pods=(STOPPING,),
            store=POSTGRES,
            release=Fence(FenceState.COMMITTED, success()),
        ),
        now=STUCK,
        status={"phase": "Completed", "result.chunks": 87},
        delete=[name_of(1)],
    ),
    Row(
        "without PostgreSQL nothing can be committed",
        Observed(task=task(status=processing()), jobs=(job(),), answered=PODS, pods=(STOPPING,)),
        now=STUCK,
        status={"phase": "Queued", "queue.reason": "NodeLost"},
        delete=[name_of(1)],
        after=5,
    ),
    Row(
        "a pod that does not stop after its time is over is counted",
        Observed(task=task(status=processing()), jobs=(job(ending="DeadlineExceeded"),), answered=PODS, pods=(STOPPING,)),
        now=STUCK,
        status={"phase": "Retrying", "error.reason": "Timeout"},
        after=10,
    ),
    Row(
        "nor is a Job waited for that was deleted by hand and waits for such a pod",
        Observed(
            task=task(status=processing()), jobs=(job(deleting=True, deleted_at=at(30)),), answered=PODS, pods=(STOPPING,)
        ),
        now=STUCK,
        status={"phase": "Queued", "queue.reason": "NodeLost"},
        delete=[name_of(1)],
        after=5,
    ),
    Row(
        "a Job that was given back and outlives its deletion is deleted once more",
        Observed(task=task(status=given_back()), jobs=(job(deleting=True, deleted_at=at(30)),)),
        now=95,
        delete=[name_of(1)],
        after=5,
    ),
    Row(
        "a Job that was given back is given time to go",
        Observed(task=task(status=given_back()), jobs=(job(deleting=True, deleted_at=at(30)),)),
        now=85,
        after=5,
    ),
    # ------------------------------------------------------------------------------------------------------ duplicates
    Row(
        "a task whose idempotency key another one had first never runs",
        Observed(task=QUEUED, first="original"),
        needs=PODS,
    ),
    Row(
        "and says which",
        Observed(task=QUEUED, first="original", answered=PODS),
        status={
            "phase": "Canceled",
            "duplicateOf": "original",
            "conditions.Ready": "False/Duplicate",
            "conditions.Stalled": "True/Duplicate",
        },
    ),
    Row(
        "a duplicate that runs already is fenced",
        Observed(task=task(status=processing()), first="original", jobs=(job(ready=1),), store=POSTGRES),
        needs=frozenset({Need.FENCE}),
    ),
    Row(
        "and ended",
        Observed(
            task=task(status=processing()),
            first="original",
            jobs=(job(ready=1),),
            store=POSTGRES,
            answered=ALL,
            fence=Fence(FenceState.RAISED),
        ),
        status={"phase": "Canceled", "duplicateOf": "original"},
        delete=[name_of(1)],
    ),
    Row(
        "unless it has published before",
        Observed(
            task=task(status=processing()),
            first="original",
            jobs=(job(),),
            store=POSTGRES,
            answered=ALL,
            fence=Fence(FenceState.COMMITTED, success()),
        ),
        after=1,
    ),
    # ---------------------------------------------------------------------------------------------------------- cancel
    Row(
        "a cancel asks for the fence first",
        Observed(task=task(spec=CANCEL, status=processing()), jobs=(job(ready=1),), store=POSTGRES),
        needs=frozenset({Need.FENCE}),
    ),
    Row(
        "the fence up, the task is Canceled and its Job deleted",
        Observed(
            task=task(spec=CANCEL, status=processing()),
            jobs=(job(ready=1),),
            store=POSTGRES,
            answered=ALL,
            fence=Fence(FenceState.RAISED),
        ),
        status={
            "phase": "Canceled",
            "conditions.Ready": "False/Canceled",
            "conditions.Stalled": "True/Canceled",
            "finishedAt": stamp(NOW),
        },
        delete=[name_of(1)],
    ),
    Row(
        "a commit that came first is waited for",
        Observed(
            task=task(spec=CANCEL, status=processing()),
            jobs=(job(ready=1),),
            store=POSTGRES,
            answered=ALL,
            fence=Fence(FenceState.COMMITTED),
        ),
        after=1,
    ),
    Row(
        "a commit that came first wins",
        Observed(
            task=task(spec=CANCEL, status=processing()),
            store=POSTGRES,
            answered=ALL,
            fence=Fence(FenceState.COMMITTED, success()),
        ),
        status={"phase": "Completed", "result.chunks": 87},
    ),
    Row(
        "a success that the pod tells wins over a cancel",
        Observed(
            task=task(spec=CANCEL, status=processing()),
            jobs=(complete(),),
            store=POSTGRES,
            answered=PODS,
            pods=(ended_pod(outcome=success()),),
        ),
        status={"phase": "Completed"},
    ),
    Row(
        "a task that never started is canceled too",
        Observed(task=task(spec=CANCEL), store=POSTGRES, answered=ALL, fence=Fence(FenceState.RAISED)),
        status={"phase": "Canceled"},
    ),
    Row(
        "without a fence the Job is deleted first",
        Observed(task=task(spec=CANCEL, status=processing()), jobs=(job(ready=1),)),
        delete=[name_of(1)],
        after=1,
    ),
    Row(
        "without a fence the pods are waited for",
        Observed(task=task(spec=CANCEL, status=processing()), answered=PODS, pods=(pod(running=True),)),
        after=1,
    ),
    Row(
        "without a fence the task is Canceled when no pod is left",
        Observed(task=task(spec=CANCEL, status=processing()), answered=PODS),
        status={"phase": "Canceled"},
    ),
    Row(
        "a fence that PostgreSQL cannot raise is done without",
        Observed(task=task(spec=CANCEL, status=processing()), jobs=(job(ready=1),), store=POSTGRES_DOWN, answered=ALL),
        delete=[name_of(1)],
        after=1,
    ),
    # --------------------------------------------------------------------------------------------------------- suspend
    Row(
        "suspend gives a running attempt back, uncounted",
        Observed(task=task(spec=SUSPEND, status=processing()), jobs=(job(ready=1),)),
        status={
            "phase": "Queued",
            "queue.reason": "Suspended",
            "attempt": 1,
            "queuedAt": stamp(NOW),
            "attempts": [],
            "conditions.Ready": "False/Suspended",
        },
        delete=[name_of(1)],
    ),
    Row(
        "a task that is suspended from the start has no Job",
        Observed(task=task(spec=SUSPEND)),
        status={"phase": "Queued", "queue.reason": "Suspended", "attempt": 0},
    ),
    Row(
        "a suspended task rests",
        Observed(task=task(spec=SUSPEND, status={"phase": "Queued", "attempt": 1, "conditions": [condition("Suspended")]})),
    ),
    Row(
        "suspend between two attempts keeps the wait",
        Observed(task=task(spec=SUSPEND, status=retrying(retry_at=NOW + 7)), jobs=(failed(),)),
        status={"phase": "Queued", "queue.reason": "Suspended", "attempt": 1, "retryAt": stamp(NOW + 7)},
    ),
    Row(
        "what has ended before the suspend counts",
        Observed(
            task=task(spec=SUSPEND, status=processing()),
            jobs=(complete(),),
            answered=PODS,
            pods=(ended_pod(outcome=success()),),
        ),
        status={"phase": "Completed"},
    ),
    Row(
        "resumed, the same number runs again",
        Observed(
            task=task(
                status={
                    "phase": "Queued",
                    "attempt": 1,
                    "queuedAt": stamp(20),
                    "queue": {"reason": "Suspended"},
                    "conditions": [condition("Suspended")],
                }
            )
        ),
        status={"phase": "Queued", "queue": None, "conditions.Ready": "False/Queued"},
        create=1,
    ),
    # -------------------------------------------------------------------------------------------------------- deadline
    Row(
        "a deadline is looked at in time",
        Observed(task=task(spec={"deadline": "1m"}), jobs=(job(ready=1),), jobs_changed_at=at(39)),
        status={"phase": "Processing"},
        after=20,
    ),
    Row(
        "past its deadline a task fails, fence first",
        Observed(task=task(spec={"deadline": "30s"}, status=processing()), jobs=(job(ready=1),), store=POSTGRES),
        needs=frozenset({Need.FENCE}),
    ),
    Row(
        "past its deadline a task fails",
        Observed(
            task=task(spec={"deadline": "30s"}, status=processing()),
            jobs=(job(ready=1),),
            store=POSTGRES,
            answered=ALL,
            fence=Fence(FenceState.RAISED),
        ),
        status={"phase": "Failed", "error.reason": "DeadlineExceeded", "conditions.Ready": "False/DeadlineExceeded"},
        delete=[name_of(1)],
    ),
    Row(
        "a deadline ends a suspended task too",
        Observed(task=task(spec=SUSPEND | {"deadline": "30s"}), answered=PODS),
        status={"phase": "Failed", "error.reason": "DeadlineExceeded"},
    ),
    # ---------------------------------------------------------------------------------------------------- cannot be done
    Row(
        "a task without a knowledge base ends as InvalidTask",
        Observed(task=task(spec={"kbId": None})),
        status={"phase": "Failed", "error.reason": "InvalidTask", "attempt": 0},
    ),
    Row(
        "an upsert without a file ends as InvalidTask",
        Observed(task=task(spec={"payload": {"documentId": "handbook"}})),
        status={"phase": "Failed", "error.reason": "InvalidTask"},
    ),
    Row(
        "a deletion needs no file",
        Observed(task=task(spec={"payload": {"action": "delete", "documentId": "handbook"}})),
        create=1,
    ),
    Row(
        "a knowledge base is deleted without any document",
        Observed(task=task(spec={"payload": {"action": "delete_knowledge_base", "confirm": "kb-42"}})),
        create=1,
    ),
    # -------------------------------------------------------------------------------------------------------- finished
    Row("a finished task rests until its TTL", Observed(task=task(status=finished())), after=86_420),
    Row("its last Job stays for five minutes", Observed(task=task(status=finished()), jobs=(complete(),)), now=359, after=1),
    Row(
        "and goes then",
        Observed(task=task(status=finished()), jobs=(complete(),)),
        now=360,
        delete=[name_of(1)],
        after=86_100,
    ),
    Row(
        "but not before PostgreSQL has what it said",
        Observed(task=task(status=finished()), jobs=(complete(),), store=POSTGRES, projected=99),
        now=360,
        after=5,
    ),
    Row(
        "a task with a shorter TTL takes its Job along",
        Observed(task=task(spec={"ttlSecondsAfterFinished": 0}, status=finished()), jobs=(complete(),)),
        now=60,
        delete_task=True,
    ),
    Row(
        "a Job that still runs for a finished task is ended",
        Observed(task=task(status=finished("Canceled")), jobs=(job(ready=1),)),
        delete=[name_of(1)],
        after=86_420,
    ),
    Row(
        "of a finished task only the last Job stays",
        Observed(task=task(status=finished(job=name_of(2))), jobs=(failed(1), complete(2))),
        delete=[name_of(1)],
        after=320,
    ),
    Row("its TTL over, a finished task is deleted", Observed(task=task(status=finished())), now=86_461, delete_task=True),
    Row(
        "but not before PostgreSQL has it",
        Observed(task=task(status=finished()), store=POSTGRES, projected=99),
        now=86_461,
        after=5,
    ),
    Row(
        "and then it is",
        Observed(task=task(status=finished()), store=POSTGRES, projected=100),
        now=86_461,
        delete_task=True,
    ),
    Row(
        "a change of the TTL is acknowledged",
        Observed(task=task(generation=2, status=finished())),
        status={"phase": "Completed", "observedGeneration": 2, "finishedAt": stamp(60)},
    ),
    Row(
        "a cancel that comes too late changes nothing",
        Observed(task=task(spec=CANCEL, status=finished()), jobs=(complete(),)),
        after=320,
    ),
    Row(
        "a task that is being deleted is left to the garbage collector",
        Observed(task=task(deletionTimestamp=stamp(39), status=processing())),
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_decide(row: Row) -> None:
    decision = decide(row.observed, now=at(row.now), random=0.5)

    assert decision.needs == row.needs
    assert [one.name for one in decision.delete_jobs] == row.delete
    assert decision.create_attempt == row.create
    assert decision.delete_task == row.delete_task
    assert (decision.after.total_seconds() if decision.after is not None else None) == row.after
    assert (decision.status is None) == (row.status is None)
    if decision.status is not None and row.status is not None:
        written = decision.status.manifest()
        assert {path: _read(written, path) for path in row.status} == row.status
        before = row.observed.task.status.phase
        assert decision.status.phase is before or decision.status.phase in ARROWS[before]
        Status.model_validate(written)  # within the bounds of the schema


def _read(written: dict[str, Any], path: str) -> Any:
    head, _, rest = path.partition(".")
    if head == "conditions":
        found = {one["type"]: f"{one['status']}/{one['reason']}" for one in written["conditions"]}
        return found.get(rest)
    value = written.get(head)
    return value if not rest or value is None else _read(value, rest)


def test_a_deadline_of_zero_is_none_and_a_long_cause_leaves_room_for_the_remedy() -> None:
    pods = (pod(waiting=Waiting("ImagePullBackOff", "x" * 5000)),)
    observed = Observed(task=waits_since("ImagePullBackOff", 10), jobs=(job(),), answered=PODS, pods=pods)
    patient = Policy(pending_deadline=timedelta(), capacity_deadline=timedelta())
    assert decide(observed, now=at(10_000_000), random=0.5, policy=patient) == Decision(after=timedelta(seconds=60))
    gone = Observed(task=waits_since("QuotaExceeded", 10), answered=PODS)
    assert decide(gone, now=at(10_000_000), random=0.5, policy=patient).create_attempt == 1
    status = decide(replace(gone, task=observed.task), now=at(10_000), random=0.5).status
    assert status is not None
    assert status.error is not None
    long = task(
        status={"phase": "Queued", "attempt": 0, "queue": {"reason": "Odd", "message": "x" * 1024, "since": stamp(0)}}
    )
    status = decide(replace(gone, task=long), now=at(10_000), random=0.5).status
    assert status is not None
    assert status.error is not None
    assert status.error.message.endswith("…; remove the cause, then create a new task")
    Status.model_validate(status.manifest())


def test_a_wait_for_a_server_is_ended_by_the_tasks_deadline_alone() -> None:
    day = 86_400
    queue = {"reason": "SourceUnavailable", "since": stamp(NOW - 3 * day)}
    status = {"phase": "Queued", "queue": queue, "queuedAt": stamp(NOW - 60), "retryAt": stamp(NOW + 10), "attempt": 1}
    assert waits.kind_of("SourceUnavailable") is waits.kind_of("StoreUnavailable") is waits.Kind.WANTED
    assert decide(Observed(task=task(status=status)), now=at(NOW), random=0.5).status is None


def test_a_task_that_cannot_be_read_fails_with_the_reason_and_is_then_left_alone() -> None:
    metadata = Metadata(name="handbook", namespace="knowledge", uid=UID, generation=3)

    decision = refuse(metadata, Status(), "cannot read the task: spec.payload.chunkSize: too large", now=at(NOW))

    assert decision.status is not None
    assert decision.status.phase is Phase.FAILED
    assert decision.status.error is not None
    assert decision.status.error.reason == "InvalidTask"
    assert "chunkSize" in decision.status.error.message
    assert decision.status.observed_generation == 3
    assert refuse(metadata, decision.status, "again", now=at(NOW)) == Decision()


def test_waits_while_giving_back_repeats_double_to_a_minute_and_begin_anew_after_a_long_run() -> None:
    status: dict[str, Any] = processing()
    now, waits = float(NOW), []
    for _ in range(6):
        one = task(status=status)
        mark = (one.status.queued_at or at(0)) - at(0)
        queued_at = mark.total_seconds()
        observed = Observed(
            task=one,
            jobs=(failed(queued_at=queued_at),),
            answered=PODS,
            pods=(ended_pod(queued_at=queued_at, outcome=handed_back()),),
        )
        decision = decide(observed, now=at(now), random=0.5)
        assert decision.status is not None
        assert decision.after is not None
        waits.append(decision.after.total_seconds())
        now += waits[-1]
        runs = Observed(
            task=task(status=decision.status.manifest()),
            jobs=(job(queued_at=(decision.status.queued_at or at(0)).timestamp() - at(0).timestamp(), ready=1),),
        )
        running = decide(runs, now=at(now), random=0.5).status
        assert running is not None
        status = running.manifest()
        now += 2
    assert waits == [5, 10, 20, 40, 60, 60]

    long = task(status=status)
    queued_at = (long.status.queued_at or at(0)).timestamp() - at(0).timestamp()
    observed = Observed(
        task=long,
        jobs=(failed(queued_at=queued_at),),
        answered=PODS,
        pods=(ended_pod(queued_at=queued_at, outcome=handed_back()),),
    )
    assert decide(observed, now=at(now + 3600), random=0.5).after == timedelta(seconds=5)


def test_texts_that_are_too_long_for_a_status_are_cut() -> None:
    outcome = AttemptOutcome(outcome=Outcome.FAILED, attempt=1, reason="Odd reason: with spaces!")
    observed = Observed(
        task=task(status=processing()),
        jobs=(failed(failure_message="x" * 5000),),
        answered=PODS,
        pods=(ended_pod(outcome=outcome),),
    )
    status = decide(observed, now=at(NOW), random=0.5).status
    assert status is not None
    assert {one.reason for one in status.conditions} == {"Oddreasonwithspaces"}
    gone = Observed(task=observed.task, jobs=observed.jobs, answered=PODS)
    lost = decide(gone, now=at(NOW), random=0.5).status
    assert lost is not None
    Status.model_validate(lost.manifest())


def test_a_failed_health_check_still_tells_the_state_of_each_component() -> None:
    found = Result(
        components=[ComponentHealth(name=Component.MILVUS, healthy=False, milliseconds=5000, message="no answer")]
    )
    outcome = failure("Unhealthy").model_copy(update={"result": found})
    observed = Observed(
        task=task(status=processing(), spec={"retry": {"limit": 0}}),
        jobs=(failed(),),
        answered=PODS,
        pods=(ended_pod(outcome=outcome),),
    )
    status = decide(observed, now=at(NOW), random=0.5).status
    assert status is not None
    assert (status.phase, status.result) == (Phase.FAILED, found)


def test_only_five_attempts_are_kept_and_the_number_goes_on() -> None:
    attempts = [ended_attempt(number) for number in range(4, 9)]
    spec = {"retry": {"limit": 20, "initialDelay": "10s"}}
    observed = Observed(task=task(spec=spec, status=retrying(8) | {"attempts": attempts}), jobs=(job(9, ready=1),))
    status = decide(observed, now=at(NOW), random=0.5).status
    assert status is not None
    assert [attempt.number for attempt in status.attempts] == [5, 6, 7, 8, 9]
    assert manifest()["metadata"]["uid"] == UID


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ('jobs.batch "a" is forbidden: exceeded quota: pods, requested: 1', "QuotaExceeded"),
        ("jobs.batch is forbidden: User cannot create resource", "JobForbidden"),
    ],
)
def test_want_of_quota_is_told_from_other_refusals(message: str, reason: str) -> None:
    assert refused_for(message, otherwise="JobForbidden") == reason
