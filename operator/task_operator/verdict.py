"""How an attempt ended: what the pod said, else what the runner stored, else what Kubernetes saw. Pure functions."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from task_contract.errors import AttemptStalled
from task_contract.lifecycle import ExitCode
from task_contract.messages import AttemptOutcome, Outcome, hung, last_lines
from task_contract.models import Failure, Phase, QueueStatus, Result
from task_operator.jobs import POLICY_FAILED, JobState, PodReport, is_batch, pods_of
from task_operator.observation import Batch, Decision, Need, Observed, Policy, Store, StoredOutcome
from task_operator.resources import OOM_KILLED
from task_operator.statuses import clip

DISK_FULL: Final = "DiskFull"
"""Reason of an attempt whose pod was evicted for what it wrote itself."""
NODE_PRESSURE: Final = "NodePressure"
"""Reason of an attempt whose pods were evicted again and again since their nodes were short of memory or disk."""


WORKER_LOST: Final = "WorkerLost"
"""Reason of an attempt whose worker was silent for longer than its lease."""
BATCH_FAILED: Final = "BatchFailed"
"""Reason of a batch of which more documents failed for good than payload.maxFailedPercent allows."""
PARTIALLY_FAILED: Final = "PartiallyFailed"
"""Reason of a batch that succeeded although documents failed: so many are allowed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an attempt ended: exactly one of success, failure and given_back is there."""

    success: AttemptOutcome | None = None
    failure: Failure | None = None
    given_back: QueueStatus | None = None
    result: Result | None = None
    """What a failed attempt found all the same, such as the state of each component in a health check."""
    message: str = ""
    """What there is to say of a success."""
    started_at: datetime | None = None


def judge_job(observed: Observed, job: JobState, *, now: datetime, policy: Policy) -> Verdict | Decision:
    """Return how a Job that has finished ended, or what must be known to tell.

    First what the pod said, then what it stored, then what Kubernetes saw. A success that is known from anywhere counts:
    where all went well, the row that the pod stored is asked for first, for a list of pods costs the API server many times
    as much.
    """
    if is_batch(observed.task):
        return _judge_batch(observed, job)
    if Need.PODS not in observed.answered:
        if not job.complete or not observed.store.configured or observed.store.down_since is not None:
            return Decision(needs=frozenset({Need.PODS}))
        if Need.RESULT not in observed.answered:
            return Decision(needs=frozenset({Need.RESULT}))
        if observed.result is None or not _succeeded(observed.result.outcome):
            return Decision(needs=frozenset({Need.PODS}))
        # Of an attempt that was seen to run, the status tells better when that began.
        seen = observed.task.status.phase is Phase.PROCESSING
        return verdict_of(observed.result.outcome, None if seen else job.started_at)
    pods = pods_of(job, observed.pods)
    last = pods[-1] if pods else None
    started = last.started_at if last is not None else None
    said = next((pod.outcome for pod in pods if pod.outcome is not None and _succeeded(pod.outcome)), None)
    said = said or (last.outcome if last is not None else None)
    timed_out = job.failed and job.failure_reason == "DeadlineExceeded"
    # A pod that is evicted is asked to stop, and may say that it hands back: it was ended for what it did.
    overruled = timed_out or (last is not None and last.overused)
    if said is not None and (_succeeded(said) or not overruled):
        return verdict_of(said, started)
    if observed.store.configured:
        if Need.RESULT not in observed.answered:
            return Decision(needs=frozenset({Need.RESULT}))
        if observed.result is not None and _belongs(observed.result, job=job, pods=pods):
            if _succeeded(observed.result.outcome) or not overruled:
                return verdict_of(observed.result.outcome, started)
        elif wait_for_store(observed.store, now=now, policy=policy):
            return Decision(after=timedelta(seconds=5))
    if timed_out:
        return _timed_out(observed, job, last)
    return replace(_verdict_of_kubernetes(job, last), started_at=started)


def _timed_out(observed: Observed, job: JobState, last: PodReport | None) -> Verdict:
    """Judge a Job that has run into its own deadline."""
    started = None if last is None else last.started_at
    if observed.task.status.phase is not Phase.PROCESSING and started is None:
        queue = observed.task.status.queue
        reason = "PodPending" if queue is None else queue.reason
        message = f"the pod of Job {job.name} did not start in time"
        return Verdict(given_back=QueueStatus(reason=reason, message=message))
    failure = Failure(
        reason="Timeout",
        message="cannot finish the attempt within spec.timeout: the runner did not stop by itself",
        retryable=True,
        log=_log_of(last),
    )
    return Verdict(failure=failure, started_at=started)


# ------------------------------------------------------------------------------------------------------------- batches


def verdict_of_batch(observed: Observed) -> Verdict | Decision | None:
    """Return how a batch ended, or what must be known to tell; None: documents are left, or not listed yet.

    What counts is which documents have ended, and that stands in PostgreSQL alone: while it is away there is nothing to
    judge by, and no pod could work either.
    """
    if Need.BATCH not in observed.answered:
        return Decision(needs=frozenset({Need.BATCH}))
    batch = observed.batch
    if batch is None:
        return Decision(after=timedelta(seconds=5))
    if not batch.ended:
        return None
    allowed = observed.task.spec.payload.max_failed_percent or 0
    said = f"{batch.failed} of {batch.total} documents failed: {'; '.join(batch.failures)}" if batch.failed else ""
    if 100 * batch.failed > allowed * batch.total:
        message = clip(f"cannot publish all: {said}; payload.maxFailedPercent allows {allowed} %")
        return Verdict(failure=Failure(reason=BATCH_FAILED, message=message, retryable=False), result=result_of(batch))
    outcome = AttemptOutcome(
        outcome=Outcome.SUCCEEDED,
        attempt=max(observed.task.status.attempt, 1),
        reason=PARTIALLY_FAILED if batch.failed else "Completed",
        result=result_of(batch),
    )
    return Verdict(success=outcome, message=clip(said))


def result_of(batch: Batch) -> Result:
    """Return the counts of a batch as a result."""
    return Result(
        documents=batch.published,
        documents_total=batch.total,
        documents_failed=batch.failed,
        chunks=batch.chunks,
        embedded=batch.embedded,
        reused=batch.reused,
    )


def _judge_batch(observed: Observed, job: JobState) -> Verdict | Decision:
    """Return how a batch ended whose Job has finished; where documents are left, how the attempt ended.

    One pod's end decides: an error of the whole batch before a pod that ran out of memory (the next one gets more), that
    before any other counted failure, and only where nothing is counted the attempt is given back.
    """
    verdict = verdict_of_batch(observed)
    if verdict is not None:
        return verdict
    if Need.PODS not in observed.answered:
        return Decision(needs=frozenset({Need.PODS}))
    pods = pods_of(job, observed.pods)
    if job.failed and job.failure_reason == "DeadlineExceeded":
        return _timed_out(observed, job, pods[-1] if pods else None)
    last = {pod.index: pod for pod in pods}  # a pod that was evicted has one after it
    ends = [_end_of(job, pod) for pod in last.values() if pod.outcome is None or not _succeeded(pod.outcome)]
    if all(end.failure is None or end.failure.retryable for end in ends) and job.failure_reason == POLICY_FAILED:
        # Its pod is gone. Of a batch only such an error is stored: another pod's end says nothing of the whole.
        if Need.RESULT not in observed.answered:
            return Decision(needs=frozenset({Need.RESULT}))
        if observed.result is not None:
            ends.append(verdict_of(observed.result.outcome, None))
    return max(ends, key=_weight, default=_verdict_of_kubernetes(job, None))


def _end_of(job: JobState, pod: PodReport) -> Verdict:
    """Return what one pod's end means for the attempt."""
    if pod.outcome is not None and not pod.overused:
        return verdict_of(pod.outcome, pod.started_at)
    return replace(_verdict_of_kubernetes(job, pod), started_at=pod.started_at)


def _weight(end: Verdict) -> int:
    if end.failure is None:
        return 0
    return 3 if not end.failure.retryable else 2 if end.failure.reason == OOM_KILLED else 1


def verdict_of(outcome: AttemptOutcome, started: datetime | None) -> Verdict:
    """Return what an outcome means for the attempt."""
    error = outcome.error or Failure(reason=outcome.reason, retryable=True)
    if outcome.log:
        error = error.model_copy(update={"log": last_lines(outcome.log)})
    match outcome.outcome:
        case Outcome.SUCCEEDED:
            return Verdict(success=outcome, started_at=started)
        case Outcome.GIVEN_BACK:
            queue = QueueStatus(reason=outcome.reason, message=clip(error.message) or None)
            return Verdict(given_back=queue, started_at=started)
        case Outcome.FENCED:
            # Nobody has ended the task, so another pod held the attempt: whether that one published, the next attempt sees.
            return Verdict(failure=error.model_copy(update={"retryable": True}), started_at=started)
        case Outcome.FAILED:
            return Verdict(failure=error, result=outcome.result, started_at=started)


def _verdict_of_kubernetes(job: JobState, pod: PodReport | None) -> Verdict:
    """Judge by what Kubernetes saw of a runner that said nothing."""

    def counted(reason: str, message: str, *, retryable: bool = True) -> Verdict:
        return Verdict(failure=Failure(reason=reason, message=clip(message), retryable=retryable, log=_log_of(pod)))

    if job.complete:
        return counted("ResultLost", f"cannot find the result of Job {job.name}: neither its pod nor PostgreSQL has it")
    if pod is None:
        return counted("PodLost", f"cannot tell how Job {job.name} ended: its pod is gone; {job.failure_message}")
    if pod.disrupted is not None:
        return Verdict(given_back=QueueStatus(reason="Evicted", message=clip(f"{pod.disrupted}: {pod.message}")))
    if pod.overused:
        message = f"cannot finish the attempt: {pod.message.strip()} Split the document, or lower TASKS_MAX_DOCUMENT_BYTES"
        return counted(DISK_FULL, message)
    if pod.oom_killed:
        return counted("OOMKilled", "cannot finish the attempt: the runner used more memory than its limit allows")
    match pod.exit_code:
        case ExitCode.STORE_UNAVAILABLE:
            return Verdict(given_back=QueueStatus(reason="StoreUnavailable", message="a store cannot be reached"))
        case ExitCode.HANDED_BACK:
            return Verdict(given_back=QueueStatus(reason="HandedBack", message="the runner was asked to stop"))
        case ExitCode.FENCED:
            return counted("Fenced", "cannot go on: another pod holds the attempt")
        case ExitCode.PERMANENT:
            return counted("PermanentError", "the runner reported a permanent error without saying which", retryable=False)
        case None:
            return counted("PodFailed", f"cannot run the pod of Job {job.name}: {pod.message or job.failure_message}")
        case 1 if hung(pod.log):
            message = (
                "cannot go on: no progress for spec.stallTimeout, and no thread of the runner could run; "
                "the stacks in its log say in which library it hangs"
            )
            return counted(AttemptStalled.reason, message)
        case code:
            return counted("ContainerFailed", f"the runner ended with {_how(code)} without saying why; see its last lines")


def burden_on_nodes(pods: Sequence[PodReport], *, most: int) -> Verdict | None:
    """Judge a Job whose pods are evicted and replaced without end: each may be what its node is short of memory for.

    The kubelet takes pods first that use more than they requested, and the Job controller ignores disruptions of all kinds.
    Drains, preemption and lost nodes do not count here.
    """
    evicted = [pod for pod in pods if pod.under_pressure]
    if len(evicted) < most:
        return None
    message = (
        f"cannot finish the attempt: {len(evicted)} pods of it were evicted, the last one: {evicted[-1].message.strip()} "
        "Give the task a larger spec.resourceClass, or add a node"
    )
    failure = Failure(reason=NODE_PRESSURE, message=clip(message), retryable=True, log=_log_of(evicted[-1]))
    return Verdict(failure=failure, started_at=evicted[-1].started_at)


def _how(code: int) -> str:
    """Return an exit code for people; above 128 it is a signal, as shells and the kubelet report it."""
    try:
        return f"exit code {code} ({signal.Signals(code - 128).name})"
    except ValueError:
        return f"exit code {code}"


def _log_of(pod: PodReport | None) -> str | None:
    return pod.log or None if pod is not None else None


def _succeeded(outcome: AttemptOutcome) -> bool:
    return outcome.outcome is Outcome.SUCCEEDED


def _belongs(result: StoredOutcome, *, job: JobState, pods: Sequence[PodReport]) -> bool:
    """Whether a stored outcome is that of this Job, and not of one of the same number that was given back before."""
    if _succeeded(result.outcome) or result.holder in {pod.uid for pod in pods}:
        return True
    return job.created_at is not None and result.created_at >= job.created_at


def wait_for_store(store: Store, *, now: datetime, policy: Policy) -> bool:
    """Whether PostgreSQL is down, but not yet for so long that an end is judged without it."""
    return store.down_since is not None and now - store.down_since < policy.store_patience
