"""What to do about one task, as a pure function of what was observed.

:func:`decide` reads the task, its Jobs and, where it asked for them, pods, stored results and the fence, and returns a
frozen :class:`Decision`. It never reads a clock, draws a number or speaks to a server. What it needs to know and was not
told it asks for (:class:`Need`); the controller answers and calls again.

A decision may be carried out in part and decided again from what is then to be seen, in any process: facts that must
outlive a process stand in the task's status or on the Job, never in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from task_contract.lifecycle import ExitCode, conditions, retry_delay
from task_contract.messages import AttemptOutcome, Outcome, ProgressEvent
from task_contract.models import (
    AVAILABLE_TYPES,
    Attempt,
    Executor,
    Failure,
    Metadata,
    Phase,
    ProcessingTask,
    QueueStatus,
    Status,
    TaskType,
)
from task_contract.names import job_name
from task_operator.jobs import JobState, PodReport, current_attempt, pods_of, queue_stamp

_ATTEMPTS_KEPT: Final = 5  # the bound of status.attempts
_TEXT: Final = 1024  # the bound of texts in a status


class Need(StrEnum):
    """What a decision can ask for, because it costs a request and is seldom needed."""

    JOB = "job"
    """Whether the Job of the current attempt exists, asked of the API server and not of the cache."""
    PODS = "pods"
    """The pods of the task."""
    RESULT = "result"
    """The row of the current attempt in ``task_results``."""
    FENCE = "fence"
    """The fence over the whole task, to be raised now unless a commit came first. Raising it twice is raising it once."""


class FenceState(StrEnum):
    """Who came first: the operator's fence or the runner's commit."""

    RAISED = "raised"
    COMMITTED = "committed"


@dataclass(frozen=True, slots=True)
class Fence:
    """The answer to :attr:`Need.FENCE`."""

    state: FenceState
    outcome: AttemptOutcome | None = None
    """What the commit achieved, when the runner came to storing it."""


@dataclass(frozen=True, slots=True)
class StoredOutcome:
    """A row of ``task_results``."""

    outcome: AttemptOutcome
    holder: str
    """Uid of the pod that wrote it."""
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Refusal:
    """The API server would not create the Job."""

    reason: str
    message: str
    permanent: bool = False
    """Trying again can not help."""


@dataclass(frozen=True, slots=True)
class Store:
    """What is known of PostgreSQL."""

    configured: bool = False
    down_since: datetime | None = None
    """Since when it cannot be reached; None: it can."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Waits that are the operator's own and not a task's."""

    pod_patience: timedelta = timedelta(seconds=3)
    """So long a pod may take to start before anybody looks why."""
    pod_look_interval: timedelta = timedelta(seconds=60)
    """Longest time between two looks at pods that do not start."""
    give_back_delay: timedelta = timedelta(seconds=5)
    """Wait before an attempt that was given back is tried again; doubles while that repeats."""
    give_back_max_delay: timedelta = timedelta(seconds=60)
    give_back_memory: timedelta = timedelta(minutes=10)
    """An attempt that ran longer than this starts the doubling anew."""
    store_patience: timedelta = timedelta(minutes=2)
    """So long an end without a message waits for a PostgreSQL that is down, before it is judged without stored result."""
    progress_interval: timedelta = timedelta(seconds=1)
    """Shortest time between two status writes that only tell progress."""
    result_age: timedelta = timedelta(minutes=5)
    """An attempt that could have started so long ago may have run without being seen: look for its result first."""


@dataclass(frozen=True, slots=True)
class Observed:
    """Everything that a decision rests on."""

    task: ProcessingTask
    jobs: tuple[JobState, ...] = ()
    """All Jobs of the task that are there."""
    jobs_changed_at: datetime | None = None
    """When one of them was last seen to change, by the operator's clock."""
    store: Store = Store()
    projected: int | None = None
    """The resourceVersion up to which the task is known to be in PostgreSQL."""
    progress: ProgressEvent | None = None
    last_write: datetime | None = None
    """When the status was last written by this process."""
    refusal: Refusal | None = None
    """Of the Job that this pass tried to create."""
    answered: frozenset[Need] = frozenset()
    """Which of the following were looked up."""
    pods: tuple[PodReport, ...] = ()
    result: StoredOutcome | None = None
    fence: Fence | None = None
    """None although answered: PostgreSQL cannot be reached."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, in this order: answer the needs (and decide again), or write, delete, create."""

    needs: frozenset[Need] = frozenset()
    fence_reason: str = ""
    """Why the fence is to be raised, when it is among the needs."""
    status: Status | None = None
    """The whole status as it should be; None: as it is."""
    delete_jobs: tuple[JobState, ...] = ()
    create_attempt: int | None = None
    """Number of the attempt whose Job is to be created."""
    delete_task: bool = False
    after: timedelta | None = None
    """Look again after this time even if nothing happens."""


@dataclass(frozen=True, slots=True)
class _Ending:
    """Why a task is to end from outside."""

    phase: Phase
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class _Verdict:
    """How an attempt ended: exactly one of the three is there."""

    success: AttemptOutcome | None = None
    failure: Failure | None = None
    given_back: QueueStatus | None = None
    started_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class _View:
    """What follows from an observation at once."""

    attempt: int
    name: str
    """Of the attempt's Job."""
    job: JobState | None
    """The attempt's Job."""
    blocker: JobState | None
    """A Job of the same name that is from an earlier stay in the queue."""
    others: tuple[JobState, ...] = field(default=())


def decide(observed: Observed, *, now: datetime, random: float, policy: Policy = Policy()) -> Decision:
    """Return what to do about a task.

    ``now`` is aware; ``random`` is uniform in [0, 1) and spreads retries. A task that has finished never changes phase.
    """
    task, status = observed.task, observed.task.status
    if task.metadata.deletion_timestamp is not None:
        return Decision()  # the garbage collector ends the Job; a missing Job means nothing any more
    if status.phase.finished:
        return _finished(observed, now=now)
    if problem := _impossible(task):
        failure = Failure(reason="InvalidTask", message=_clip(problem), retryable=False)
        return Decision(
            status=_failed(task, failure, now=now), delete_jobs=tuple(job for job in observed.jobs if not job.deleting)
        )
    view = _view(observed)
    ending = _ending(task, now=now)
    if ending is not None:
        return _stop(observed, view, ending, now=now, policy=policy)
    if task.spec.suspend and not (view.job is not None and view.job.finished):
        decision = _suspend(observed, view, now=now)
    elif view.job is not None:
        decision = _with_job(observed, view, view.job, now=now, random=random, policy=policy)
    else:
        decision = _without_job(observed, view, now=now, random=random, policy=policy)
    return _sweep(_until_deadline(decision, task, now=now), view)


def refuse(metadata: Metadata, status: Status, message: str, *, now: datetime) -> Decision:
    """Return what to do about a task whose spec cannot be read, such as one of another version: end it as Failed."""
    if status.phase.finished:
        return Decision()
    # The spec stands in for the one that cannot be read; nothing of it gets into a status.
    stand_in = ProcessingTask.model_validate({"metadata": metadata, "spec": {"type": TaskType.HEALTH_CHECK}})
    task = stand_in.model_copy(update={"status": status})
    failure = Failure(reason="InvalidTask", message=_clip(message), retryable=False)
    return Decision(status=_failed(task, failure, now=now))


# ------------------------------------------------------------------------------------------------------- the situation


def _view(observed: Observed) -> _View:
    task = observed.task
    attempt = current_attempt(task.status)
    name = job_name(task_name=task.metadata.name, task_uid=task.metadata.uid or "", attempt=attempt)
    stamp = queue_stamp(task)
    same = [job for job in observed.jobs if job.name == name]
    job = next((job for job in same if job.queue_stamp == stamp), None)
    return _View(
        attempt=attempt,
        name=name,
        job=job,
        blocker=next((job for job in same if job.queue_stamp != stamp), None),
        others=tuple(job for job in observed.jobs if job.name != name),
    )


def _impossible(task: ProcessingTask) -> str | None:
    """Return why this version cannot carry out a task. The CRD refuses such tasks, unless it is of another version."""
    spec = task.spec
    if spec.type not in AVAILABLE_TYPES:
        available = ", ".join(AVAILABLE_TYPES)
        return f"cannot carry out type {spec.type}: this version knows {available}; create a task of one of these"
    if spec.executor is Executor.POOL:
        return "cannot use a worker pool: this version has none; create a task with executor auto or job"
    if spec.callback is not None:
        return "cannot call back: this version does not; create the task without callback and watch it instead"
    if spec.type is TaskType.DOCUMENT_PROCESSING and (spec.kb_id is None or spec.payload.file_path is None):
        return "cannot find the document: set spec.kbId and spec.payload.filePath"
    return None


def _ending(task: ProcessingTask, *, now: datetime) -> _Ending | None:
    if task.spec.cancel:
        return _Ending(phase=Phase.CANCELED, reason="Canceled", message="canceled by spec.cancel")
    due = _deadline(task)
    if due is not None and now >= due:
        message = "cannot finish the task within spec.deadline; create a new task with a longer one"
        return _Ending(phase=Phase.FAILED, reason="DeadlineExceeded", message=message)
    return None


def _deadline(task: ProcessingTask) -> datetime | None:
    created, deadline = task.metadata.creation_timestamp, task.spec.deadline
    return None if created is None or deadline is None else created + deadline


def _until_deadline(decision: Decision, task: ProcessingTask, *, now: datetime) -> Decision:
    due = _deadline(task)
    if due is None or decision.needs:
        return decision
    left = max(due - now, timedelta())
    return replace(decision, after=left if decision.after is None else min(left, decision.after))


def _sweep(decision: Decision, view: _View) -> Decision:
    """Add Jobs of other attempts: what still runs goes at once; what has ended goes when a later attempt has its Job."""
    if decision.needs:
        return decision
    gone = tuple(
        job
        for job in view.others
        if not job.deleting and (not job.finished or (view.job is not None and job.attempt < view.attempt))
    )
    listed = {job.uid for job in decision.delete_jobs}
    return replace(decision, delete_jobs=decision.delete_jobs + tuple(job for job in gone if job.uid not in listed))


# ------------------------------------------------------------------------------------------------------ finished tasks


def _finished(observed: Observed, *, now: datetime) -> Decision:
    task, status = observed.task, observed.task.status
    # The last Job stays as long as the task, for its logs, unless it still runs: then a pod works for nobody.
    delete = tuple(job for job in observed.jobs if not job.deleting and not (job.finished and job.name == status.job))
    if status.observed_generation is not None and status.observed_generation < task.metadata.generation:
        seen = status.model_copy(
            update={
                "observed_generation": task.metadata.generation,
                "conditions": [
                    condition.model_copy(update={"observed_generation": task.metadata.generation})
                    for condition in status.conditions
                ],
            }
        )
        return Decision(status=seen, delete_jobs=delete)
    ended = status.finished_at or task.metadata.creation_timestamp
    if ended is None:
        return Decision(delete_jobs=delete)
    left = ended + timedelta(seconds=task.spec.ttl_seconds_after_finished) - now
    if left > timedelta():
        return Decision(delete_jobs=delete, after=left)
    version = int(task.metadata.resource_version or 0)
    if observed.store.configured and (observed.projected is None or observed.projected < version):
        return Decision(delete_jobs=delete, after=timedelta(seconds=5))
    return Decision(delete_jobs=delete, delete_task=True)


# ------------------------------------------------------------------------------------------------------ cancel, deadline


def _stop(observed: Observed, view: _View, ending: _Ending, *, now: datetime, policy: Policy) -> Decision:
    """End a task from outside, unless its work was published before: the commit that came first wins."""
    task, job = observed.task, view.job
    if job is not None and job.finished:
        verdict = _verdict(observed, view, job, now=now, policy=policy)
        if isinstance(verdict, Decision):
            return verdict
        if verdict.success is not None:
            return Decision(status=_completed(task, view, verdict.success, verdict.started_at, now=now))
    running = tuple(one for one in observed.jobs if not one.finished)
    stoppable = tuple(one for one in running if not one.deleting)
    if observed.store.configured:
        if Need.FENCE not in observed.answered:
            return Decision(needs=frozenset({Need.FENCE}), fence_reason=ending.reason)
        if observed.fence is not None and observed.fence.state is FenceState.RAISED:
            return Decision(status=_ended(task, view, ending, now=now), delete_jobs=stoppable)
        if observed.fence is not None:
            if job is not None and not job.finished and not job.deleting:
                return Decision(after=timedelta(seconds=1))  # it has committed and is about to say so
            outcome = observed.fence.outcome or AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=view.attempt)
            return Decision(status=_completed(task, view, outcome, None, now=now))
    # No fence to be had: nothing can be committed any more once no pod is left.
    if running:
        return Decision(delete_jobs=stoppable, after=timedelta(seconds=1))
    if Need.PODS not in observed.answered:
        return Decision(needs=frozenset({Need.PODS}))
    if any(pod.alive for pod in observed.pods):
        return Decision(after=timedelta(seconds=1))
    return Decision(status=_ended(task, view, ending, now=now))


def _suspend(observed: Observed, view: _View, *, now: datetime) -> Decision:
    task, status, job = observed.task, observed.task.status, view.job
    stop = tuple(one for one in (job, view.blocker) if one is not None and not one.deleting)
    if job is None and status.phase is Phase.QUEUED and _ready_reason(status) == "Suspended":
        return Decision(delete_jobs=stop)
    waits_for_retry = status.phase is Phase.RETRYING and job is None
    changes: dict[str, Any] = {"retry_at": status.retry_at if waits_for_retry else None}
    if job is not None or status.phase is Phase.PROCESSING:
        changes |= _given_back(task, view, now=now)
    queue = QueueStatus(reason="Suspended", message="suspended by spec.suspend", since=_second(now))
    return Decision(status=_queued(task, queue, now=now, **changes), delete_jobs=stop)


# ----------------------------------------------------------------------------------------------- the attempt has a Job


def _with_job(observed: Observed, view: _View, job: JobState, *, now: datetime, random: float, policy: Policy) -> Decision:
    if job.finished:
        verdict = _verdict(observed, view, job, now=now, policy=policy)
        if isinstance(verdict, Decision):
            return verdict
        return _judge(observed, view, verdict, now=now, random=random, policy=policy)
    if job.deleting:
        return Decision(after=timedelta(seconds=5))  # by hand; judged when it is gone
    if job.ready:
        return _running(observed, view, job, now=now, policy=policy)
    return _starting(observed, view, job, now=now, policy=policy)


def _running(observed: Observed, view: _View, job: JobState, *, now: datetime, policy: Policy) -> Decision:
    task, status = observed.task, observed.task.status
    progress = observed.progress
    if progress is not None and progress.attempt != view.attempt:
        progress = None
    if status.phase is Phase.PROCESSING and status.attempt == view.attempt and status.job == job.name:
        if progress is None or (progress.stage, progress.progress) == (status.stage, status.progress):
            return Decision()
        written = observed.last_write
        if written is not None and now - written < policy.progress_interval:
            return Decision(after=policy.progress_interval - (now - written))
        return Decision(status=status.model_copy(update={"stage": progress.stage, "progress": progress.progress}))
    attempt = Attempt(number=view.attempt, job=job.name, started_at=_second(now))
    return Decision(
        status=_status(
            task,
            Phase.PROCESSING,
            reason="Processing",
            message=f"attempt {view.attempt} runs as Job {job.name}",
            now=now,
            attempt=view.attempt,
            job=job.name,
            executor=Executor.JOB,
            stage=None if progress is None else progress.stage,
            progress=0 if progress is None else progress.progress,
            started_at=status.started_at or _second(now),
            # How long the last wait was decides how long the next one is, should the attempt be given back again.
            retry_at=status.retry_at if status.phase is Phase.QUEUED else None,
            queue=None,
            attempts=_with_attempt(status.attempts, attempt),
        )
    )


def _starting(observed: Observed, view: _View, job: JobState, *, now: datetime, policy: Policy) -> Decision:
    """Tell why a pod does not run, once it has had time to start."""
    task, status = observed.task, observed.task.status
    changed = observed.jobs_changed_at or job.created_at or now
    if now - changed < policy.pod_patience:
        return Decision(after=policy.pod_patience - max(now - changed, timedelta()))
    waited = now - (job.created_at or changed)
    after = min(max(waited / 2, policy.pod_patience), policy.pod_look_interval)
    if job.suspended:
        queue = QueueStatus(reason="JobSuspended", message=f"Job {job.name} is suspended", since=_second(now))
    else:
        if Need.PODS not in observed.answered:
            return Decision(needs=frozenset({Need.PODS}))
        pods = pods_of(job, observed.pods)
        if any(pod.running for pod in pods) or (pods and not any(pod.waiting for pod in pods)):
            return Decision(after=timedelta(seconds=1))  # the Job controller has yet to say what the pods already do
        waiting = next((pod.waiting for pod in pods if pod.waiting is not None), None)
        disrupted = next((pod for pod in pods if pod.disrupted is not None), None)
        if waiting is None:
            reason, message = "PodNotCreated", f"the pod of Job {job.name} does not exist yet: kubectl describe job"
        elif disrupted is not None and waiting.reason == "PodPending":
            reason, message = "Evicted", f"{disrupted.disrupted}: {disrupted.message}"
        else:
            reason, message = waiting.reason, waiting.message
        queue = QueueStatus(reason=_clip(reason), message=_clip(message) or None, since=_second(now))
    if status.queue is not None and status.queue.reason == queue.reason:
        return Decision(after=after)
    if status.phase is Phase.RETRYING:
        return Decision(status=status.model_copy(update={"queue": queue}), after=after)
    changes: dict[str, Any] = {"retry_at": status.retry_at if status.phase is Phase.QUEUED else None}
    if status.phase is Phase.PROCESSING:
        # The Job controller replaces a pod that was evicted: the same Job goes on, so the stay in the queue is the same.
        changes |= {"attempts": _without_attempt(status.attempts, view.attempt), "stage": None, "progress": None}
    return Decision(status=_queued(task, queue, now=now, **changes), after=after)


def _verdict(observed: Observed, view: _View, job: JobState, *, now: datetime, policy: Policy) -> _Verdict | Decision:
    """Return how a Job that has finished ended, or what must be known to tell.

    First what the pod said, then what it stored, then what Kubernetes saw. A success that is known from anywhere counts.
    """
    if Need.PODS not in observed.answered:
        return Decision(needs=frozenset({Need.PODS}))
    pods = pods_of(job, observed.pods)
    last = pods[-1] if pods else None
    started = last.started_at if last is not None else None
    said = next((pod.outcome for pod in pods if pod.outcome is not None and _succeeded(pod.outcome)), None)
    said = said or (last.outcome if last is not None else None)
    timed_out = job.failed and job.failure_reason == "DeadlineExceeded"
    if said is not None and (_succeeded(said) or not timed_out):
        return _verdict_of(said, started)
    if observed.store.configured:
        if Need.RESULT not in observed.answered:
            return Decision(needs=frozenset({Need.RESULT}))
        if observed.result is not None and _belongs(observed.result, job=job, pods=pods):
            if _succeeded(observed.result.outcome) or not timed_out:
                return _verdict_of(observed.result.outcome, started)
        elif _wait_for_store(observed.store, now=now, policy=policy):
            return Decision(after=timedelta(seconds=5))
    if timed_out and observed.task.status.phase is not Phase.PROCESSING and started is None:
        queue = observed.task.status.queue
        reason = "PodPending" if queue is None else queue.reason
        message = f"the pod of Job {job.name} did not start in time"
        return _Verdict(given_back=QueueStatus(reason=reason, message=message))
    if timed_out:
        return _Verdict(
            failure=Failure(
                reason="Timeout",
                message="cannot finish the attempt within spec.timeout: the runner did not stop by itself",
                retryable=True,
            ),
            started_at=started,
        )
    return replace(_verdict_of_kubernetes(job, last), started_at=started)


def _verdict_of(outcome: AttemptOutcome, started: datetime | None) -> _Verdict:
    error = outcome.error or Failure(reason=outcome.reason, retryable=True)
    match outcome.outcome:
        case Outcome.SUCCEEDED:
            return _Verdict(success=outcome, started_at=started)
        case Outcome.GIVEN_BACK:
            queue = QueueStatus(reason=outcome.reason, message=_clip(error.message) or None)
            return _Verdict(given_back=queue, started_at=started)
        case Outcome.FENCED:
            # Nobody has ended the task, so another pod held the attempt: whether that one published, the next attempt sees.
            return _Verdict(failure=error.model_copy(update={"retryable": True}), started_at=started)
        case Outcome.FAILED:
            return _Verdict(failure=error, started_at=started)


def _verdict_of_kubernetes(job: JobState, pod: PodReport | None) -> _Verdict:
    """Judge by what Kubernetes saw of a runner that said nothing."""

    def counted(reason: str, message: str, *, retryable: bool = True) -> _Verdict:
        return _Verdict(failure=Failure(reason=reason, message=_clip(message), retryable=retryable))

    if job.complete:
        return counted("ResultLost", f"cannot find the result of Job {job.name}: neither its pod nor PostgreSQL has it")
    if pod is None:
        return counted("PodLost", f"cannot tell how Job {job.name} ended: its pod is gone; {job.failure_message}")
    if pod.disrupted is not None:
        return _Verdict(given_back=QueueStatus(reason="Evicted", message=_clip(f"{pod.disrupted}: {pod.message}")))
    if pod.oom_killed:
        return counted("OOMKilled", "cannot finish the attempt: the runner used more memory than its limit allows")
    match pod.exit_code:
        case ExitCode.STORE_UNAVAILABLE:
            return _Verdict(given_back=QueueStatus(reason="StoreUnavailable", message="a store cannot be reached"))
        case ExitCode.HANDED_BACK:
            return _Verdict(given_back=QueueStatus(reason="HandedBack", message="the runner was asked to stop"))
        case ExitCode.FENCED:
            return counted("Fenced", "cannot go on: another pod holds the attempt")
        case ExitCode.PERMANENT:
            return counted("PermanentError", "the runner reported a permanent error without saying which", retryable=False)
        case None:
            return counted("PodFailed", f"cannot run the pod of Job {job.name}: {pod.message or job.failure_message}")
        case code:
            return counted("ContainerFailed", f"the runner ended with exit code {code} without saying why; see its log")


def _judge(observed: Observed, view: _View, verdict: _Verdict, *, now: datetime, random: float, policy: Policy) -> Decision:
    task, status = observed.task, observed.task.status
    if verdict.success is not None:
        return Decision(status=_completed(task, view, verdict.success, verdict.started_at, now=now))
    if verdict.given_back is not None:
        delay = _give_back_delay(status, now=now, policy=policy)
        repeated = status.queue is not None and status.queue.reason == verdict.given_back.reason
        since = status.queue.since if repeated and status.queue is not None else None
        queue = verdict.given_back.model_copy(update={"since": since or _second(now)})
        retry_at = _second(now + delay, up=True)
        given = _queued(task, queue, now=now, retry_at=retry_at, **_given_back(task, view, now=now))
        return Decision(status=given, delete_jobs=() if view.job is None else (view.job,), after=retry_at - now)
    if verdict.failure is None:
        raise AssertionError("a verdict without content")
    failure = verdict.failure
    if not failure.retryable or view.attempt > task.spec.retry.limit:
        return Decision(status=_failed(task, failure, now=now, view=view, started_at=verdict.started_at))
    delay = retry_delay(task.spec.retry, failures=view.attempt, random=random)
    retry_at = _second(now + delay, up=delay > timedelta())
    retrying = _status(
        task,
        Phase.RETRYING,
        reason=failure.reason,
        message=f"attempt {view.attempt} failed, the next follows: {failure.message}",
        now=now,
        attempt=view.attempt,
        job=view.name,
        executor=Executor.JOB,
        started_at=status.started_at or verdict.started_at or _second(now),
        stage=None,
        progress=None,
        queue=None,
        error=failure,
        retry_at=retry_at,
        attempts=_ended_attempt(status, view, failure.reason, started_at=verdict.started_at, now=now),
    )
    return Decision(status=retrying, after=max(retry_at - now, timedelta()))


def _give_back_delay(status: Status, *, now: datetime, policy: Policy) -> timedelta:
    """Return the next wait: twice the last one while giving back repeats. The last one is read from the status."""
    queued, retry = status.queued_at, status.retry_at
    if status.phase is Phase.RETRYING or queued is None or retry is None or now - retry > policy.give_back_memory:
        return policy.give_back_delay
    return min(max(2 * (retry - queued), policy.give_back_delay), policy.give_back_max_delay)


def _succeeded(outcome: AttemptOutcome) -> bool:
    return outcome.outcome is Outcome.SUCCEEDED


def _belongs(result: StoredOutcome, *, job: JobState, pods: Sequence[PodReport]) -> bool:
    """Whether a stored outcome is that of this Job, and not of one of the same number that was given back before."""
    if _succeeded(result.outcome) or result.holder in {pod.uid for pod in pods}:
        return True
    return job.created_at is not None and result.created_at >= job.created_at


def _wait_for_store(store: Store, *, now: datetime, policy: Policy) -> bool:
    return store.down_since is not None and now - store.down_since < policy.store_patience


# -------------------------------------------------------------------------------------------- the attempt has no Job


def _without_job(observed: Observed, view: _View, *, now: datetime, random: float, policy: Policy) -> Decision:
    task, status = observed.task, observed.task.status
    if view.blocker is not None:
        # Given back before; its name is free once it is gone.
        delete = () if view.blocker.deleting else (view.blocker,)
        return Decision(delete_jobs=delete, after=timedelta(seconds=5))
    if status.phase is Phase.PROCESSING:
        return _lost(observed, view, now=now, random=random, policy=policy)
    resumed = None
    if status.phase is Phase.QUEUED and _ready_reason(status) == "Suspended":
        resumed = _queued(task, None, now=now)
    if status.retry_at is not None and now < status.retry_at:
        return Decision(status=resumed, after=status.retry_at - now)
    if observed.refusal is not None:
        return _refused(task, view, observed.refusal, now=now, policy=policy)
    since = status.retry_at or status.queued_at or task.metadata.creation_timestamp
    if observed.store.configured and since is not None and now - since > policy.result_age:
        if Need.RESULT not in observed.answered:
            return Decision(needs=frozenset({Need.RESULT}))
        if observed.result is not None and observed.result.outcome.outcome in {Outcome.SUCCEEDED, Outcome.FAILED}:
            verdict = _verdict_of(observed.result.outcome, None)
            return _judge(observed, view, verdict, now=now, random=random, policy=policy)
    return Decision(status=resumed, create_attempt=view.attempt)


def _lost(observed: Observed, view: _View, *, now: datetime, random: float, policy: Policy) -> Decision:
    """Judge an attempt that ran and whose Job is gone: somebody deleted it, or its own deadline for deletion came first."""
    if Need.JOB not in observed.answered:
        return Decision(needs=frozenset({Need.JOB}))
    if observed.store.configured:
        if Need.RESULT not in observed.answered:
            return Decision(needs=frozenset({Need.RESULT}))
        # A runner that is deleted hands back: that says nothing about why, so only what it achieved counts.
        if observed.result is not None and observed.result.outcome.outcome in {Outcome.SUCCEEDED, Outcome.FAILED}:
            verdict = _verdict_of(observed.result.outcome, None)
            return _judge(observed, view, verdict, now=now, random=random, policy=policy)
        if observed.result is None and _wait_for_store(observed.store, now=now, policy=policy):
            return Decision(after=timedelta(seconds=5))
    failure = Failure(
        reason="JobDeleted", message=f"cannot follow Job {view.name}: it was deleted while it ran", retryable=True
    )
    return _judge(observed, view, _Verdict(failure=failure), now=now, random=random, policy=policy)


def _refused(task: ProcessingTask, view: _View, refusal: Refusal, *, now: datetime, policy: Policy) -> Decision:
    if refusal.permanent:
        failure = Failure(reason=refusal.reason, message=_clip(refusal.message), retryable=False)
        return Decision(status=_failed(task, failure, now=now))
    status = task.status
    repeated = status.queue is not None and status.queue.reason == refusal.reason
    since = (status.queue.since if repeated and status.queue is not None else None) or _second(now)
    delay = min(max(now - since, policy.give_back_delay), policy.give_back_max_delay)
    retry_at = _second(now + delay, up=True)
    queue = QueueStatus(reason=refusal.reason, message=_clip(refusal.message), since=since)
    if status.phase is Phase.RETRYING:
        waiting = status.model_copy(update={"queue": queue, "retry_at": retry_at})
    else:
        waiting = _queued(task, queue, now=now, retry_at=retry_at)
    return Decision(status=waiting, after=retry_at - now)


# ------------------------------------------------------------------------------------------------------------ statuses


def _status(task: ProcessingTask, phase: Phase, *, reason: str, message: str, now: datetime, **changes: Any) -> Status:
    """Return the task's status in another phase: conditions that fit, and the changes; what is not named stays."""
    status = task.status
    fixed = {
        "phase": phase,
        "observed_generation": task.metadata.generation,
        "queued_at": status.queued_at or task.metadata.creation_timestamp,
        "conditions": list(
            conditions(
                phase,
                reason=reason,
                message=_clip(message),
                generation=task.metadata.generation,
                now=_second(now),
                previous=status.conditions,
            )
        ),
    }
    return status.model_copy(update=fixed | changes)


def _queued(task: ProcessingTask, queue: QueueStatus | None, *, now: datetime, **changes: Any) -> Status:
    reason = "Queued" if queue is None else queue.reason
    message = "waiting to run" if queue is None else queue.message or queue.reason
    return _status(task, Phase.QUEUED, reason=_condition_reason(reason), message=message, now=now, queue=queue, **changes)


def _given_back(task: ProcessingTask, view: _View, *, now: datetime) -> dict[str, Any]:
    """Return the changes that give an attempt back: it keeps its number, was never counted, and begins a new stay."""
    status = task.status
    before = status.queued_at or task.metadata.creation_timestamp
    at = _second(now)
    if before is not None and at <= before:  # clocks differ, or less than a second has passed: a stay has its own second
        at = before + timedelta(seconds=1)
    return {
        "queued_at": at,
        "attempt": view.attempt,
        "attempts": _without_attempt(status.attempts, view.attempt),
        "job": view.name,
        "stage": None,
        "progress": None,
    }


def _completed(
    task: ProcessingTask, view: _View, outcome: AttemptOutcome, started_at: datetime | None, *, now: datetime
) -> Status:
    status = task.status
    return _status(
        task,
        Phase.COMPLETED,
        reason=_condition_reason(outcome.reason),
        message="",
        now=now,
        attempt=view.attempt,
        job=view.name,
        executor=Executor.JOB,
        stage=None,
        progress=100,
        queue=None,
        retry_at=None,
        error=None,
        result=outcome.result,
        started_at=status.started_at or started_at or _second(now),
        finished_at=_second(now),
        attempts=_ended_attempt(status, view, "Succeeded", started_at=started_at, now=now),
    )


def _failed(
    task: ProcessingTask,
    failure: Failure,
    *,
    now: datetime,
    view: _View | None = None,
    started_at: datetime | None = None,
) -> Status:
    """Return the status of a failed task; without ``view`` it failed before any attempt of this kind."""
    status = task.status
    changes: dict[str, Any] = {}
    if view is not None:
        changes = {
            "attempt": view.attempt,
            "job": view.name,
            "executor": Executor.JOB,
            "started_at": status.started_at or started_at or _second(now),
            "attempts": _ended_attempt(status, view, failure.reason, started_at=started_at, now=now),
        }
    return _status(
        task,
        Phase.FAILED,
        reason=_condition_reason(failure.reason),
        message=failure.message,
        now=now,
        stage=None,
        queue=None,
        retry_at=None,
        error=failure,
        finished_at=_second(now),
        **changes,
    )


def _ended(task: ProcessingTask, view: _View, ending: _Ending, *, now: datetime) -> Status:
    status = task.status
    changes: dict[str, Any] = {}
    if any(attempt.number == view.attempt for attempt in status.attempts):
        changes["attempts"] = _ended_attempt(status, view, ending.reason, started_at=None, now=now)
    if ending.phase is Phase.FAILED:
        changes["error"] = Failure(reason=ending.reason, message=ending.message, retryable=False)
    return _status(
        task,
        ending.phase,
        reason=ending.reason,
        message=ending.message,
        now=now,
        stage=None,
        queue=None,
        retry_at=None,
        finished_at=_second(now),
        **changes,
    )


def _with_attempt(attempts: Sequence[Attempt], attempt: Attempt) -> list[Attempt]:
    return [*_without_attempt(attempts, attempt.number), attempt][-_ATTEMPTS_KEPT:]


def _without_attempt(attempts: Sequence[Attempt], number: int) -> list[Attempt]:
    return [attempt for attempt in attempts if attempt.number != number]


def _ended_attempt(status: Status, view: _View, reason: str, *, started_at: datetime | None, now: datetime) -> list[Attempt]:
    begun = next((attempt for attempt in status.attempts if attempt.number == view.attempt), None)
    return _with_attempt(
        status.attempts,
        Attempt(
            number=view.attempt,
            job=view.name,
            started_at=started_at or (None if begun is None else begun.started_at),
            finished_at=_second(now),
            reason=reason,
        ),
    )


def _ready_reason(status: Status) -> str | None:
    return next((condition.reason for condition in status.conditions if condition.type == "Ready"), None)


def _condition_reason(reason: str) -> str:
    """Return a reason that ``metav1.Condition`` allows: a word of letters, digits and underscores."""
    word = "".join(character for character in reason if character.isascii() and (character.isalnum() or character == "_"))
    return word if word and word[0].isalpha() else "Unknown"


def _clip(text: str) -> str:
    return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"


def _second(at: datetime, *, up: bool = False) -> datetime:
    """Return ``at`` to the second, as a status holds it. Ends of waits are rounded up: storing makes no wait shorter."""
    whole = at.astimezone(UTC).replace(microsecond=0)
    return whole + timedelta(seconds=1) if up and at.microsecond else whole
