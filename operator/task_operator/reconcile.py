"""What to do about one task, as a pure function of what was observed.

:func:`decide` reads the task, its Jobs and, where it asked for them, pods, stored results and the fence, and returns a
frozen :class:`Decision`. It never reads a clock, draws a number or speaks to a server. What it needs to know and was not
told it asks for (:class:`Need`); the controller answers and calls again.

A decision may be carried out in part and decided again from what is then to be seen, in any process: facts that must
outlive a process stand in the task's status or on the Job, never in memory.
"""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final

from task_contract.batches import shard_count
from task_contract.errors import HandedBack
from task_contract.leases import PoolReport, ReportKind
from task_contract.lifecycle import retry_delay
from task_contract.messages import AttemptOutcome, Outcome, ProgressEvent
from task_contract.models import (
    Action,
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
from task_operator.dependencies import DEPENDS_ON, NOT_BEFORE, judge, left_until
from task_operator.dispatch import Limit, Place, worth_telling
from task_operator.jobs import JobState, current_attempt, is_batch, pods_of, stamp_of
from task_operator.observation import (
    Decision,
    Ending,
    Fence,
    FenceState,
    Need,
    Observed,
    Policy,
    Pools,
    Refusal,
    View,
    view_of,
)
from task_operator.resources import unknown_class
from task_operator.statuses import (
    clip,
    completed,
    ended,
    ended_attempt,
    failed,
    given_back,
    queued,
    ready_reason,
    status_in,
    to_second,
    with_attempt,
    without_attempt,
)
from task_operator.verdict import (
    BATCH_FAILED,
    WORKER_LOST,
    Verdict,
    burden_on_nodes,
    judge_job,
    result_of,
    verdict_of,
    verdict_of_batch,
    wait_for_store,
)
from task_operator.waits import NO_POOL, QUEUE_UNAVAILABLE, overdue, time_left, wait_of, waiting

_DEFAULT: Final = Policy()
_WORKERS_LOST: Final = 2
"""So many workers may be lost over a task before it gets a Job."""
_CUT_OFF: Final = "the queue of the worker pool cannot be reached: Redis does not answer"
_WITHOUT_REDIS: Final = "worker pools cannot be used: the operator has no Redis; set OPERATOR_REDIS_URL"


def decide(observed: Observed, *, now: datetime, random: float, policy: Policy = _DEFAULT) -> Decision:
    """Return what to do about a task.

    ``now`` is aware; ``random`` is uniform in [0, 1) and spreads retries. A task that has finished never changes phase.
    """
    task, status = observed.task, observed.task.status
    if task.metadata.deletion_timestamp is not None:
        # The garbage collector ends the Job; a missing Job means nothing any more.
        return Decision(withdraw=observed.lease is not None, heard=bool(observed.reports))
    if status.phase.finished:
        return replace(_finished(observed, now=now, policy=policy), heard=bool(observed.reports))
    if problem := _impossible(task, database=observed.store.configured):
        failure = Failure(reason="InvalidTask", message=clip(problem), retryable=False)
        return Decision(
            status=failed(task, failure, now=now), delete_jobs=tuple(job for job in observed.jobs if not job.deleting)
        )
    view = view_of(observed)
    ending = _ending(observed, now=now)
    if ending is not None:
        decision = _stop(observed, view, ending, now=now, policy=policy)
        return _with_pools(_with_history(decision, observed), observed, view)
    if task.spec.suspend and not (view.over or (view.job is not None and view.job.finished)):
        decision = _suspend(observed, view, now=now)
    elif view.report is not None and view.over:
        decision = _after_pool(observed, view, view.report, now=now, random=random, policy=policy)
    elif view.job is not None:
        decision = _with_job(observed, view, view.job, now=now, random=random, policy=policy)
    elif view.lease is not None or view.executor is Executor.POOL:
        decision = _with_pool(observed, view, now=now, random=random, policy=policy)
    else:
        decision = _without_job(observed, view, now=now, random=random, policy=policy)
    decision = _with_history(_sweep(_until_deadline(decision, task, now=now), view), observed)
    return _with_pools(decision, observed, view)


def refuse(metadata: Metadata, status: Status, message: str, *, now: datetime) -> Decision:
    """Return what to do about a task whose spec cannot be read, such as one of another version: end it as Failed."""
    if status.phase.finished:
        return Decision()
    # The spec stands in for the one that cannot be read; nothing of it gets into a status.
    stand_in = ProcessingTask.model_validate({"metadata": metadata, "spec": {"type": TaskType.HEALTH_CHECK}})
    task = stand_in.model_copy(update={"status": status})
    failure = Failure(reason="InvalidTask", message=clip(message), retryable=False)
    return Decision(status=failed(task, failure, now=now))


# ------------------------------------------------------------------------------------------------------- the situation


def _impossible(task: ProcessingTask, *, database: bool) -> str | None:
    """Return why this version cannot carry out a task. The CRD refuses such tasks, unless it is of another version."""
    spec = task.spec
    if spec.callback is not None and not database:
        return (
            "cannot call back: callbacks leave from PostgreSQL, which this operator does not have; "
            "set OPERATOR_POSTGRES_URL, or create the task without callback"
        )
    if is_batch(task) and not database:
        return (
            "cannot carry out a batch: its documents and what becomes of each stand in PostgreSQL, which this operator does "
            "not have; set OPERATOR_POSTGRES_URL"
        )
    if spec.kb_id is None and spec.type not in {TaskType.HEALTH_CHECK, TaskType.EMBEDDING_GENERATION}:
        return "cannot work without a knowledge base: set spec.kbId"
    if spec.type is TaskType.DOCUMENT_PROCESSING:
        needs_file = spec.effective_action is Action.UPSERT
        if needs_file and spec.payload.file_path is None:
            return "cannot find the document: set spec.payload.filePath"
    return None


def _ending(observed: Observed, *, now: datetime) -> Ending | None:
    task = observed.task
    if task.spec.cancel:
        return Ending(phase=Phase.CANCELED, reason="Canceled", message="canceled by spec.cancel")
    if observed.first is not None:
        message = f"task {observed.first} has the same spec.idempotencyKey and came first: look there"
        return Ending(phase=Phase.CANCELED, reason="Duplicate", message=message, duplicate_of=observed.first)
    due = _deadline(task)
    if due is not None and now >= due:
        message = "cannot finish the task within spec.deadline; create a new task with a longer one"
        return Ending(phase=Phase.FAILED, reason="DeadlineExceeded", message=message)
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


def _sweep(decision: Decision, view: View) -> Decision:
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


def _with_history(decision: Decision, observed: Observed) -> Decision:
    """Put off a status that pushes an attempt out of its bounded list until PostgreSQL has the version that holds it."""
    status, store = observed.task.status, observed.store
    if decision.status is None or not store.configured:
        return decision
    kept = {attempt.number for attempt in decision.status.attempts}
    if all(attempt.number in kept for attempt in status.attempts if attempt.finished_at is not None):
        return decision  # one that is given back leaves the list too: it has not ended, and does not count
    if observed.projected is not None and observed.projected >= int(observed.task.metadata.resource_version or 0):
        return decision
    return Decision(after=timedelta(seconds=1 if store.down_since is None else 5))


# ------------------------------------------------------------------------------------------------------ finished tasks


def _finished(observed: Observed, *, now: datetime, policy: Policy) -> Decision:
    task, status = observed.task, observed.task.status
    ended = status.finished_at or task.metadata.creation_timestamp
    version = int(task.metadata.resource_version or 0)
    archived = not observed.store.configured or (observed.projected is not None and observed.projected >= version)
    # The last Job stays for a while, for the log of its pod, unless it still runs: then a pod works for nobody.
    stay = timedelta() if ended is None else ended + policy.job_ttl - now
    kept = tuple(
        job for job in observed.jobs if job.finished and job.name == status.job and (stay > timedelta() or not archived)
    )
    delete = tuple(job for job in observed.jobs if not job.deleting and job not in kept)
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
    if ended is None:
        return Decision(delete_jobs=delete)
    left = ended + timedelta(seconds=task.spec.ttl_seconds_after_finished) - now
    due = min(left, stay) if kept else left
    if due > timedelta():
        return Decision(delete_jobs=delete, after=due)
    if not archived:
        # Ten thousand of them may wait while PostgreSQL is away.
        return Decision(delete_jobs=delete, after=timedelta(seconds=5 if observed.store.down_since is None else 60))
    return Decision(delete_jobs=delete, delete_task=True)


# ------------------------------------------------------------------------------------------------------ cancel, deadline


def _stop(observed: Observed, view: View, ending: Ending, *, now: datetime, policy: Policy) -> Decision:
    """End a task from outside, unless its work was published before: the commit that came first wins."""
    task, job = observed.task, view.job
    if job is not None and job.finished:
        verdict = judge_job(observed, job, now=now, policy=policy)
        if isinstance(verdict, Decision):
            return verdict
        if verdict.success is not None:
            return Decision(status=_completed(task, view, verdict, now=now))
    if view.report is not None and view.over:
        said = view.report.outcome
        if said is not None and said.outcome is Outcome.SUCCEEDED:
            verdict = verdict_of(said, _began(task, view.report))
            return Decision(status=_completed(task, view, verdict, now=_ended_at(task, view.report, now=now)))
    running = tuple(one for one in observed.jobs if not one.finished)
    stoppable = tuple(one for one in running if not one.deleting)
    if observed.store.configured:
        if Need.FENCE not in observed.answered:
            return Decision(needs=frozenset({Need.FENCE}), fence_reason=ending.reason)
        if observed.fence is not None and observed.fence.state is FenceState.RAISED:
            if is_batch(task) and Need.BATCH not in observed.answered:
                return Decision(needs=frozenset({Need.BATCH}))
            result = None if observed.batch is None or not observed.batch.listed else result_of(observed.batch)
            return Decision(status=ended(task, view, ending, now=now, result=result), delete_jobs=stoppable)
        if observed.fence is not None:
            changed = observed.jobs_changed_at or now
            silent = job is not None and not job.ready and now - changed > policy.stuck_patience
            if job is not None and not job.finished and not job.deleting and not silent:
                return Decision(after=timedelta(seconds=1))  # it has committed and is about to say so
            if _may_report(observed, view):
                return Decision(after=timedelta(seconds=1))  # so will its worker, or its lease runs out
            return _committed(observed, view, observed.fence, now=now)
    # No fence to be had: nothing can be committed any more once no pod is left.
    if running:
        return Decision(delete_jobs=stoppable, after=timedelta(seconds=1))
    if view.executor is Executor.POOL or observed.lease is not None:
        return Decision(status=ended(task, view, ending, now=now))  # a worker publishes nothing without PostgreSQL
    if Need.PODS not in observed.answered:
        return Decision(needs=frozenset({Need.PODS}))
    # A pod that does not answer for so long is waited for no longer, or a lost node would hold the task for ever.
    if any(pod.alive and (pod.stop_by is None or now < pod.stop_by + policy.stuck_patience) for pod in observed.pods):
        return Decision(after=timedelta(seconds=1))
    return Decision(status=ended(task, view, ending, now=now))


def _may_report(observed: Observed, view: View) -> bool:
    """Whether a worker may have the attempt, whose word about its end is yet to come."""
    lease, pools = view.lease, observed.pools
    if lease is None or lease.lost or view.over or pools is None:
        return False
    return pools.down_since is None and pools.gone_since is None


def _committed(observed: Observed, view: View, fence: Fence, *, now: datetime, job: JobState | None = None) -> Decision:
    """End a task whose work was published before anybody could stop it; ``job`` goes with it.

    A batch has committed when all of its documents have ended, and that may be badly.
    """
    task, gone = observed.task, () if job is None else (job,)
    if is_batch(task):
        verdict = verdict_of_batch(observed)
        if isinstance(verdict, Decision):
            return verdict
        if verdict is not None and verdict.failure is not None:
            status = failed(task, verdict.failure, now=now, view=view, result=verdict.result)
            return Decision(status=status, delete_jobs=gone)
        if verdict is not None:
            return Decision(status=_completed(task, view, verdict, now=now), delete_jobs=gone)
    outcome = fence.outcome or AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=view.attempt)
    return Decision(status=completed(task, view, outcome, None, now=now), delete_jobs=gone)


def _completed(task: ProcessingTask, view: View, verdict: Verdict, *, now: datetime) -> Status:
    if verdict.success is None:
        raise AssertionError("a verdict without success")
    return completed(task, view, verdict.success, verdict.started_at, now=now, message=verdict.message)


def _suspend(observed: Observed, view: View, *, now: datetime) -> Decision:
    task, status, job = observed.task, observed.task.status, view.job
    stop = tuple(one for one in (job, view.blocker) if one is not None and not one.deleting)
    held = job is not None or view.lease is not None
    if not held and status.phase is Phase.QUEUED and ready_reason(status) == "Suspended":
        return Decision(delete_jobs=stop)
    waits_for_retry = status.phase is Phase.RETRYING and not held
    changes: dict[str, Any] = {"retry_at": status.retry_at if waits_for_retry else None}
    if held or status.phase is Phase.PROCESSING:
        changes |= given_back(task, view, now=now)
    queue = QueueStatus(reason="Suspended", message="suspended by spec.suspend", since=to_second(now))
    return Decision(status=queued(task, queue, now=now, **changes), delete_jobs=stop)


# ----------------------------------------------------------------------------------------------- the attempt has a Job


def _with_job(observed: Observed, view: View, job: JobState, *, now: datetime, random: float, policy: Policy) -> Decision:
    if job.finished:
        verdict = judge_job(observed, job, now=now, policy=policy)
        if isinstance(verdict, Decision):
            return verdict
        return _judge(observed, view, verdict, now=now, random=random, policy=policy)
    if job.ready and not job.deleting:
        where = f"as Job {job.name}"
        return _running(observed, view, where, started_at=to_second(now), now=now, policy=policy)
    stopping = _stopping(observed, view, job, now=now, random=random, policy=policy)
    if stopping is not None:
        return stopping
    if job.deleting:
        if ending := overdue(observed.task.status.queue, attempt=view.attempt, now=now, policy=policy):
            return _stop(observed, view, ending, now=now, policy=policy)
        return Decision(after=timedelta(seconds=5))  # by hand; judged when it is gone
    return _starting(observed, view, job, now=now, random=random, policy=policy)


def _stopping(
    observed: Observed, view: View, job: JobState, *, now: datetime, random: float, policy: Policy
) -> Decision | None:
    """Take the attempt from a pod that was told to stop and does not: its node is lost, or hangs.

    The Job controller makes no other pod before that one has stopped, which may be never. None: no such pod.
    """
    changed = observed.jobs_changed_at or job.created_at or now
    if job.suspended or job.started_at is None or now - changed < _patience(observed.task, policy):
        return None  # or the Job controller has not taken it up: there is no pod
    if Need.PODS not in observed.answered:
        ran = observed.task.status.phase is Phase.PROCESSING  # then it is not one of many that wait for room
        return Decision(needs=frozenset({Need.PODS}), patient=not ran)
    alive = [pod for pod in pods_of(job, observed.pods) if pod.alive]
    ends = [pod.stop_by for pod in alive if pod.stop_by is not None]
    if not alive or len(ends) < len(alive):
        return None
    due = max(ends) + policy.stuck_patience
    if now < due:
        return Decision(after=min(due - now, policy.pod_look_interval))
    if observed.store.configured:
        if Need.RESULT not in observed.answered:
            return Decision(needs=frozenset({Need.RESULT}))
        if observed.result is not None and observed.result.outcome.outcome is Outcome.SUCCEEDED:
            verdict = verdict_of(observed.result.outcome, alive[-1].started_at)
            return _judge(observed, view, verdict, now=now, random=random, policy=policy)
        if Need.RELEASE not in observed.answered:
            return Decision(needs=frozenset({Need.RELEASE}))
        if observed.release is None:
            return Decision(after=timedelta(seconds=5))  # nor can the pod commit while PostgreSQL is away
        if observed.release.state is FenceState.COMMITTED:
            return _committed(observed, view, observed.release, now=now, job=job)
    pod = alive[-1]
    where = "" if pod.node is None else f" on node {pod.node}"
    message = f"pod {pod.name}{where} was told to stop and does not answer: is the node lost? Another pod takes the attempt"
    if job.ending == "DeadlineExceeded":
        failure = Failure(reason="Timeout", message=clip(message), retryable=True)
        verdict = Verdict(failure=failure, started_at=pod.started_at)
    else:
        verdict = Verdict(given_back=QueueStatus(reason="NodeLost", message=clip(message)), started_at=pod.started_at)
    return _judge(observed, view, verdict, now=now, random=random, policy=policy)


def _running(observed: Observed, view: View, where: str, *, started_at: datetime, now: datetime, policy: Policy) -> Decision:
    """Say that the attempt runs, and how far it has come."""
    task, status = observed.task, observed.task.status
    progress = observed.progress
    if progress is not None and progress.attempt != view.attempt:
        progress = None
    if status.phase is Phase.PROCESSING and status.attempt == view.attempt and status.job == view.ran_as:
        if progress is None or _told(progress, status, batch=is_batch(task)):
            return Decision()
        written = observed.last_write
        if written is not None and now - written < policy.progress_interval:
            return Decision(after=policy.progress_interval - (now - written))
        changes: dict[str, Any] = {"stage": progress.stage, "progress": progress.progress}
        if progress.total is None:
            return Decision(status=status.model_copy(update=changes))
        message = f"{progress.done} of {progress.total} documents have ended; attempt {view.attempt} runs {where}"
        told = status_in(task, Phase.PROCESSING, reason="Processing", message=message, now=now, **changes)
        return Decision(status=told)
    attempt = Attempt(number=view.attempt, job=view.ran_as, started_at=started_at)
    return Decision(
        status=status_in(
            task,
            Phase.PROCESSING,
            reason="Processing",
            message=f"attempt {view.attempt} runs {where}",
            now=now,
            attempt=view.attempt,
            job=view.ran_as,
            executor=view.executor,
            stage=None if progress is None else progress.stage,
            progress=0 if progress is None else progress.progress,
            started_at=status.started_at or started_at,
            # How long the last wait was decides how long the next one is, should the attempt be given back again.
            retry_at=status.retry_at if status.phase is Phase.QUEUED else None,
            queue=None,
            attempts=with_attempt(status.attempts, attempt),
        )
    )


def _told(progress: ProgressEvent, status: Status, *, batch: bool) -> bool:
    """Whether a status says already how far an attempt has come.

    Of the pods of a batch each tells its own stage, and its own count of all documents: the highest one is the latest.
    """
    if batch:
        return status.progress is not None and progress.progress <= status.progress
    return (progress.stage, progress.progress) == (status.stage, status.progress)


def _starting(observed: Observed, view: View, job: JobState, *, now: datetime, random: float, policy: Policy) -> Decision:
    """Tell why a pod does not run, once it has had time to start."""
    task, status = observed.task, observed.task.status
    changed = observed.jobs_changed_at or job.created_at or now
    patience = _patience(task, policy)
    if now - changed < patience:
        return Decision(after=patience - max(now - changed, timedelta()))
    unseen = now - (job.created_at or changed)
    if job.started_at is None and not job.suspended and timedelta() <= unseen < policy.controller_patience:
        return Decision(after=policy.controller_patience - unseen)  # in a burst it lags behind: there is no pod to look at
    queue = wait_of(observed, job, now=now)
    if isinstance(queue, Need):
        return Decision(needs=frozenset({queue}), patient=True)
    pods = pods_of(job, observed.pods)
    if (burden := burden_on_nodes(pods, most=policy.evictions_under_pressure)) is not None:
        judged = _judge(observed, view, burden, now=now, random=random, policy=policy)
        return replace(judged, delete_jobs=(*judged.delete_jobs, job))
    if queue is None:
        return Decision(after=timedelta(seconds=1))  # the Job controller has yet to say what the pods already do
    if ending := overdue(queue, attempt=view.attempt, now=now, policy=policy):
        return _stop(observed, view, ending, now=now, policy=policy)
    waited = now - (job.created_at or changed)
    after = min(max(waited / 2, policy.pod_patience), policy.pod_look_interval)
    if (left := time_left(queue, now=now, policy=policy)) is not None:
        after = min(after, left)
    if status.queue is not None and status.queue.reason == queue.reason:
        return Decision(after=after)
    if status.phase is Phase.RETRYING:
        return Decision(status=status.model_copy(update={"queue": queue}), after=after)
    changes: dict[str, Any] = {"retry_at": status.retry_at if status.phase is Phase.QUEUED else None}
    if status.phase is Phase.PROCESSING:
        # The Job controller replaces a pod that was evicted: the same Job goes on, so the stay in the queue is the same.
        changes |= {"attempts": without_attempt(status.attempts, view.attempt), "stage": None, "progress": None}
    return Decision(status=queued(task, queue, now=now, **changes), after=after)


def _patience(task: ProcessingTask, policy: Policy) -> timedelta:
    """Return how long a Job may have no pod that runs before anybody looks why.

    Of a batch that runs, the pods of some shards have ended and those of the next are starting.
    """
    under_way = is_batch(task) and task.status.phase is Phase.PROCESSING
    return policy.pod_look_interval if under_way else policy.pod_patience


def _judge(observed: Observed, view: View, verdict: Verdict, *, now: datetime, random: float, policy: Policy) -> Decision:
    task, status = observed.task, observed.task.status
    if verdict.success is not None:
        return Decision(status=_completed(task, view, verdict, now=now))
    if verdict.given_back is not None:
        delay = _give_back_delay(status, now=now, policy=policy)
        repeated = status.queue is not None and status.queue.reason == verdict.given_back.reason
        if view.executor is Executor.POOL and verdict.given_back.reason == HandedBack.reason and not repeated:
            delay = timedelta()  # another worker is there already
        since = status.queue.since if repeated and status.queue is not None else None
        queue = verdict.given_back.model_copy(update={"since": since or to_second(now)})
        retry_at = to_second(now + delay, up=True)
        given = queued(task, queue, now=now, retry_at=retry_at, **given_back(task, view, now=now))
        return Decision(status=given, delete_jobs=() if view.job is None else (view.job,), after=retry_at - now)
    if verdict.failure is None:
        raise AssertionError("a verdict without content")
    failure = verdict.failure
    if not failure.retryable or view.attempt > task.spec.retry.limit:
        if is_batch(task) and failure.reason != BATCH_FAILED:
            settled = _settled(observed, failure)
            if isinstance(settled, Decision):
                return settled
            if settled is not None:
                settled = replace(settled, started_at=verdict.started_at)
                return _judge(observed, view, settled, now=now, random=random, policy=policy)
        status = failed(task, failure, now=now, view=view, result=verdict.result, started_at=verdict.started_at)
        return Decision(status=status)
    delay = retry_delay(task.spec.retry, failures=view.attempt, random=random)
    if failure.reason == WORKER_LOST:
        delay = timedelta()  # it says nothing of the task
    retry_at = to_second(now + delay, up=delay > timedelta())
    retrying = status_in(
        task,
        Phase.RETRYING,
        reason=failure.reason,
        message=f"attempt {view.attempt} failed, the next follows: {failure.message}",
        now=now,
        attempt=view.attempt,
        job=view.ran_as,
        executor=view.executor,
        started_at=status.started_at or verdict.started_at or to_second(now),
        stage=None,
        progress=None,
        queue=None,
        error=failure,
        retry_at=retry_at,
        attempts=ended_attempt(status, view, failure.reason, started_at=verdict.started_at, now=now),
    )
    return Decision(status=retrying, after=max(retry_at - now, timedelta()))


def _settled(observed: Observed, failure: Failure) -> Verdict | Decision | None:
    """Return how a batch ended of which no attempt follows: what the last one has left counts as failed.

    None: which documents there are is not known, and the failure is that of the whole.
    """
    verdict = verdict_of_batch(observed)
    if verdict is not None or observed.batch is None or not observed.batch.listed:
        return verdict
    if Need.SETTLE not in observed.answered:
        return Decision(needs=frozenset({Need.SETTLE}), settle=failure)
    return Decision(after=timedelta(seconds=5))  # PostgreSQL went away in between


def _give_back_delay(status: Status, *, now: datetime, policy: Policy) -> timedelta:
    """Return the next wait: twice the last one while giving back repeats. The last one is read from the status."""
    queued, retry = status.queued_at, status.retry_at
    if status.phase is Phase.RETRYING or queued is None or retry is None or now - retry > policy.give_back_memory:
        return policy.give_back_delay
    return min(max(2 * (retry - queued), policy.give_back_delay), policy.give_back_max_delay)


# ------------------------------------------------------------------------------------------------ a pool has the attempt


def _with_pool(observed: Observed, view: View, *, now: datetime, random: float, policy: Policy) -> Decision:
    """Follow an attempt that is in the queue of a pool, or with a worker of it."""
    task, lease, pools = observed.task, view.lease, observed.pools
    runs = view.executor is Executor.POOL
    if runs and now >= (due := _backstop(observed, view, now=now, policy=policy)):
        message = "cannot finish the attempt within spec.timeout: the worker did not stop by itself"
        verdict = Verdict(failure=Failure(reason="Timeout", message=message, retryable=True))
        return _take_back(observed, view, verdict, now=now, random=random, policy=policy)
    if pools is None:
        queue = QueueStatus(reason=QUEUE_UNAVAILABLE, message=_WITHOUT_REDIS)
        return _take_back(observed, view, Verdict(given_back=queue), now=now, random=random, policy=policy)
    if pools.down_since is not None:
        return _cut_off(observed, view, pools, pools.down_since, now=now, random=random, policy=policy)
    report = view.report
    if report is not None and not _told_running(view, task.status):
        where = f"in pod {report.worker}" + ("" if lease is None else f" of worker pool {lease.pool}")
        return _running(observed, view, where, started_at=_began(task, report), now=now, policy=policy)
    if lease is None and not pools.known:
        return Decision(after=timedelta(seconds=1))
    if lease is None or lease.lost:
        return _offer_anew(observed, view, pools, now=now, random=random, policy=policy)
    if pools.serving != lease.pool:
        if not runs:
            return Decision(withdraw=True)  # and another way is looked for when it is out
        if pools.gone_since is not None and now - pools.gone_since >= policy.pool_gone_patience:
            queue = QueueStatus(reason=HandedBack.reason, message=f"worker pool {lease.pool} was deleted")
            return _take_back(observed, view, Verdict(given_back=queue), now=now, random=random, policy=policy)
    elif not runs and lease.priority != task.spec.priority:
        return Decision(offer=lease.pool)  # it moves to the stream of its priority
    if not runs:
        return Decision()  # its worker will say when it runs, and when it has ended
    decision = _running(observed, view, "in a worker pool", started_at=now, now=now, policy=policy)
    return replace(decision, after=min(decision.after or due - now, due - now))


def _backstop(observed: Observed, view: View, *, now: datetime, policy: Policy) -> datetime:
    """Return when an attempt is taken from a worker that does not end it, as a Job's deadline does."""
    begun = next((one.started_at for one in observed.task.status.attempts if one.number == view.attempt), None)
    return (begun or now) + observed.task.spec.effective_timeout + policy.attempt_allowance


def _told_running(view: View, status: Status) -> bool:
    """Whether the status says that the worker runs the attempt."""
    return status.phase is Phase.PROCESSING and status.attempt == view.attempt and status.job == view.ran_as


def _offer_anew(observed: Observed, view: View, pools: Pools, *, now: datetime, random: float, policy: Policy) -> Decision:
    """Offer an attempt again that Redis, or this process, knows nothing of any more: it may have run to its end."""
    if observed.store.configured:
        if Need.RESULT not in observed.answered:
            return Decision(needs=frozenset({Need.RESULT}))
        if (verdict := _stored(observed)) is not None:
            return _judge(observed, view, verdict, now=now, random=random, policy=policy)
    pool = pools.present or pools.serving
    if pool is not None:
        return Decision(offer=pool)
    if view.executor is not Executor.POOL:
        return Decision(withdraw=True)
    queue = QueueStatus(reason=HandedBack.reason, message=clip(f"its worker pool is gone: {pools.missing}"))
    return _take_back(observed, view, Verdict(given_back=queue), now=now, random=random, policy=policy)


def _cut_off(
    observed: Observed,
    view: View,
    pools: Pools,
    since: datetime,
    *,
    now: datetime,
    random: float,
    policy: Policy,
) -> Decision:
    """Wait for Redis, or have the attempt go on as a Job: of one that a worker may have, after its lease."""
    runs = view.executor is Executor.POOL
    patience = policy.pool_fallback_patience + (pools.lease if runs else timedelta())
    if not policy.pool_fallback:
        left = None
    elif (left := since + patience - now) <= timedelta():
        queue = QueueStatus(reason=QUEUE_UNAVAILABLE, message="Redis cannot be used: the attempt goes on as a Job")
        if not runs:
            return Decision(withdraw=True)
        return _take_back(observed, view, Verdict(given_back=queue), now=now, random=random, policy=policy)
    if runs:
        return Decision(after=left)
    return _await_pool(observed.task, QUEUE_UNAVAILABLE, _CUT_OFF, since=since, left=left, now=now, policy=policy)


def _take_back(
    observed: Observed, view: View, verdict: Verdict, *, now: datetime, random: float, policy: Policy
) -> Decision:
    """Take an attempt from the worker that may have it: it cannot commit any more. What it has achieved before counts."""
    if observed.store.configured:
        if Need.RESULT not in observed.answered:
            return Decision(needs=frozenset({Need.RESULT}))
        if (stored := _stored(observed)) is not None:
            return _judge(observed, view, stored, now=now, random=random, policy=policy)
        if Need.RELEASE not in observed.answered:
            return Decision(needs=frozenset({Need.RELEASE}))
        if observed.release is None:
            return Decision(after=timedelta(seconds=5))  # nor can the worker commit while PostgreSQL is away
        if observed.release.state is FenceState.COMMITTED:
            return _committed(observed, view, observed.release, now=now)
    return _judge(observed, view, verdict, now=now, random=random, policy=policy)


def _stored(observed: Observed) -> Verdict | None:
    """Return how the attempt ended as its worker has stored it, if that says anything about the attempt."""
    if observed.result is None or observed.result.outcome.outcome not in {Outcome.SUCCEEDED, Outcome.FAILED}:
        return None
    return verdict_of(observed.result.outcome, None)


def _after_pool(
    observed: Observed, view: View, report: PoolReport, *, now: datetime, random: float, policy: Policy
) -> Decision:
    """Judge an attempt that a worker has ended, or lost."""
    task = observed.task
    if report.kind is ReportKind.EXPIRED:
        message = f"cannot follow pod {report.worker}: it was silent for longer than its lease; is its node lost?"
        lost = Verdict(failure=Failure(reason=WORKER_LOST, message=message, retryable=True))
        return _take_back(observed, view, lost, now=now, random=random, policy=policy)
    began, at = _began(task, report), _ended_at(task, report, now=now)
    if report.outcome is not None:
        verdict = verdict_of(report.outcome, began)
    else:
        if observed.store.configured and Need.RESULT not in observed.answered:
            return Decision(needs=frozenset({Need.RESULT}))
        message = f"cannot find the result of pod {report.worker}: neither its report nor PostgreSQL has it"
        lost = Verdict(failure=Failure(reason="ResultLost", message=message, retryable=True), started_at=began)
        verdict = _stored(observed) or lost
    return _judge(observed, view, verdict, now=at, random=random, policy=policy)


def _began(task: ProcessingTask, report: PoolReport) -> datetime:
    """Return when a worker took the attempt: by its own clock, but not before the task was there to be taken."""
    stay = task.status.queued_at or task.metadata.creation_timestamp
    began = report.started_at or report.finished_at or report.offered_at or stay
    if began is None:
        raise AssertionError("a task without creationTimestamp")
    return to_second(began if stay is None else max(began, stay))


def _ended_at(task: ProcessingTask, report: PoolReport, *, now: datetime) -> datetime:
    """Return when a worker ended the attempt: by its own clock, but not before it began, and not in the future."""
    return max(min(report.finished_at or now, now), _began(task, report))


def _pool_for(observed: Observed, *, since: datetime | None, now: datetime, policy: Policy) -> str | Decision | None:
    """Return the pool that takes the next attempt, or what is done while that cannot be said; None: it gets a Job."""
    task, pools = observed.task, observed.pools
    if task.spec.executor is Executor.JOB or is_batch(task):
        return None
    if sum(attempt.reason == WORKER_LOST for attempt in task.status.attempts) >= _WORKERS_LOST:
        return None  # it may be what they die of: there are limits of its own, and nobody beside it
    wanted = task.spec.executor is Executor.POOL
    if pools is None:
        if not wanted:
            return None
        return _await_pool(task, NO_POOL, _WITHOUT_REDIS, since=since, left=None, now=now, policy=policy)
    if not pools.known:
        return Decision(after=timedelta(seconds=1), awaits_pool=True)
    if pools.serving is None:
        if not wanted:
            return None
        return _await_pool(task, NO_POOL, pools.missing, since=since, left=None, now=now, policy=policy)
    if pools.down_since is not None:
        left = pools.down_since + policy.pool_fallback_patience - now if policy.pool_fallback else None
        if left is not None and left <= timedelta():
            return None
        return _await_pool(task, QUEUE_UNAVAILABLE, _CUT_OFF, since=since, left=left, now=now, policy=policy)
    return pools.serving


def _await_pool(
    task: ProcessingTask,
    reason: str,
    message: str,
    *,
    since: datetime | None,
    left: timedelta | None,
    now: datetime,
    policy: Policy,
) -> Decision:
    """Say what a task waits for before it can be offered to a pool. It is woken when that may have changed."""
    status = task.status
    waited = now - (since or now)
    if status.queue is None and timedelta() <= waited < policy.queue_patience:
        patience = policy.queue_patience - waited
        return Decision(awaits_pool=True, after=patience if left is None else min(left, patience))
    queue = waiting(status, reason, message, now=now)
    if status.queue is not None and (status.queue.reason, status.queue.message) == (queue.reason, queue.message):
        return Decision(awaits_pool=True, after=left)
    if status.phase is Phase.RETRYING:
        return Decision(awaits_pool=True, status=status.model_copy(update={"queue": queue}), after=left)
    return Decision(awaits_pool=True, status=queued(task, queue, now=now), after=left)


def _with_pools(decision: Decision, observed: Observed, view: View) -> Decision:
    """Add what follows for pools: what they have and should not have is withdrawn, and what was heard is done with."""
    if decision.needs:
        return decision
    pools, status = observed.pools, decision.status or observed.task.status
    if observed.reports:
        told = not view.over and _told_running(view, status)
        decision = replace(decision, heard=view.report is None or decision.status is not None or told)
    present = None if pools is None else pools.present
    if decision.offer is not None or (observed.lease is None and present is None):
        return decision
    stays = (
        (view.lease is not None or observed.lease is None)
        and view.job is None
        and decision.create_attempt is None
        and not status.phase.finished
        and current_attempt(status) == view.attempt
        and stamp_of(status, observed.task.metadata) == view.stamp
        and ready_reason(status) != "Suspended"
    )
    return decision if stays else replace(decision, withdraw=True)


# -------------------------------------------------------------------------------------------- the attempt has no Job


def _without_job(observed: Observed, view: View, *, now: datetime, random: float, policy: Policy) -> Decision:
    task, status = observed.task, observed.task.status
    if ending := overdue(status.queue, attempt=view.attempt, now=now, policy=policy):
        return _stop(observed, view, ending, now=now, policy=policy)
    if view.blocker is not None:
        # Given back before; its name is free once it is gone. Whoever deleted it may have wanted it to outlast its pods:
        # deleted once more, as we delete, it waits for them no longer.
        at = view.blocker.deleted_at
        waits = view.blocker.deleting if at is None else now - at < policy.stuck_patience
        return Decision(delete_jobs=() if waits else (view.blocker,), after=timedelta(seconds=5))
    if status.phase is Phase.PROCESSING:
        return _lost(observed, view, now=now, random=random, policy=policy)
    resumed = None
    if status.phase is Phase.QUEUED and ready_reason(status) == "Suspended":
        resumed = queued(task, None, now=now)
    if not status.attempt and (held_back := _before_start(observed, now=now)) is not None:
        return held_back
    if status.retry_at is not None and now < status.retry_at:
        return Decision(status=resumed, after=status.retry_at - now)
    if observed.refusal is not None:
        return _refused(task, view, observed.refusal, now=now, policy=policy)
    since = status.retry_at or status.queued_at or task.metadata.creation_timestamp
    shards: tuple[int, ...] = ()
    if is_batch(task):
        found = _batch_before_job(observed, view, now=now, random=random, policy=policy)
        if isinstance(found, Decision):
            return found
        shards = found
    pool = _pool_for(observed, since=since, now=now, policy=policy)
    if isinstance(pool, Decision):
        return pool if pool.status is not None or resumed is None else replace(pool, status=resumed)
    may_have_run = since is not None and now - since > policy.result_age
    if observed.store.configured and (may_have_run or (observed.pools is not None and observed.pools.inherited)):
        if Need.RESULT not in observed.answered:
            return Decision(needs=frozenset({Need.RESULT}))
        if observed.result is not None and observed.result.outcome.outcome in {Outcome.SUCCEEDED, Outcome.FAILED}:
            verdict = verdict_of(observed.result.outcome, None)
            return _judge(observed, view, verdict, now=now, random=random, policy=policy)
    if (problem := unknown_class(task, policy.resource_classes)) is not None:
        return Decision(status=failed(task, Failure(reason="InvalidTask", message=clip(problem), retryable=False), now=now))
    if (observed.limited or pool is not None) and Need.PLACE not in observed.answered:
        return Decision(needs=frozenset({Need.PLACE}), offer=pool)
    if observed.place is not None and not observed.place.granted:
        decision = _in_line(task, observed.place, since=since, now=now, policy=policy)
        return replace(decision, awaits_pool=pool is not None)
    if pool is not None:
        return Decision(status=resumed, offer=pool)
    return Decision(status=resumed, create_attempt=view.attempt, shards=shards)


def _before_start(observed: Observed, *, now: datetime) -> Decision | None:
    """Hold back a task that has not begun, or end it, for the tasks and the time that it waits for; None: it may begin."""
    task = observed.task
    after = None
    reason, message = NOT_BEFORE, ""
    if task.spec.depends_on:
        if Need.DEPENDENCIES not in observed.answered:
            return Decision(needs=frozenset({Need.DEPENDENCIES}))
        judged = judge(observed.dependencies)
        if isinstance(judged, Failure):
            failure = judged.model_copy(update={"message": clip(judged.message)})
            return Decision(status=failed(task, failure, now=now))
        if judged is not None:
            reason, message = DEPENDS_ON, clip(judged)
            after = None if observed.dependencies.sure else timedelta(seconds=5)
    if not message and (left := left_until(task, now)):
        message = f"starts at {task.spec.not_before:%Y-%m-%dT%H:%M:%SZ} (spec.notBefore)"
        after = timedelta(seconds=left)
    if not message:
        return None
    told = task.status.queue
    if told is not None and (told.reason, told.message) == (reason, message):
        return Decision(after=after)
    return Decision(status=queued(task, waiting(task.status, reason, message, now=now), now=now), after=after)


def _batch_before_job(
    observed: Observed, view: View, *, now: datetime, random: float, policy: Policy
) -> Decision | tuple[int, ...]:
    """Return for which shards of a batch a Job is to be made, or what is to be done instead.

    Which are left follows from the documents alone: so it does not matter which Jobs there were, and what became of them.
    """
    if Need.BATCH in observed.answered and observed.batch is None:
        message = "cannot tell which documents of the batch are left: PostgreSQL does not answer"
        return _refused(observed.task, view, Refusal(reason="StoreUnavailable", message=message), now=now, policy=policy)
    verdict = verdict_of_batch(observed)
    if isinstance(verdict, Decision):
        return verdict
    if verdict is not None:
        return _judge(observed, view, verdict, now=now, random=random, policy=policy)
    if observed.batch is not None and observed.batch.listed:
        return observed.batch.shards
    return tuple(range(shard_count(observed.task.spec.payload)))


def _in_line(task: ProcessingTask, place: Place, *, since: datetime | None, now: datetime, policy: Policy) -> Decision:
    """Say which limit a task waits for. It is woken when it may go on, or has come much closer."""
    status = task.status
    told = status.queue if status.queue is not None and status.queue.reason == place.reason else None
    patience = policy.queue_patience
    if place.reason == Limit.POOL:  # thousands wait, and are to write one after the other
        patience = policy.pool_queue_patience + place.position * policy.pool_queue_spread
    waited = now - (since or now)
    if status.queue is None and timedelta() <= waited < patience:
        return Decision(after=patience - waited)
    if told is not None and not worth_telling(told.position, place.position):
        return Decision()
    queue = waiting(status, place.reason, place.message, now=now).model_copy(update={"position": place.position})
    if status.phase is Phase.RETRYING:
        return Decision(status=status.model_copy(update={"queue": queue}))
    return Decision(status=queued(task, queue, now=now))


def _lost(observed: Observed, view: View, *, now: datetime, random: float, policy: Policy) -> Decision:
    """Judge an attempt that ran and whose Job is gone: somebody deleted it, or its own deadline for deletion came first."""
    if Need.JOB not in observed.answered:
        return Decision(needs=frozenset({Need.JOB}))
    if is_batch(observed.task):
        verdict_by_documents = verdict_of_batch(observed)
        if isinstance(verdict_by_documents, Decision):
            return verdict_by_documents
        if verdict_by_documents is not None:
            return _judge(observed, view, verdict_by_documents, now=now, random=random, policy=policy)
    if observed.store.configured:
        if Need.RESULT not in observed.answered:
            return Decision(needs=frozenset({Need.RESULT}))
        # A runner that is deleted hands back: that says nothing about why, so only what it achieved counts.
        if observed.result is not None and observed.result.outcome.outcome in {Outcome.SUCCEEDED, Outcome.FAILED}:
            verdict = verdict_of(observed.result.outcome, None)
            return _judge(observed, view, verdict, now=now, random=random, policy=policy)
        if observed.result is None and wait_for_store(observed.store, now=now, policy=policy):
            return Decision(after=timedelta(seconds=5))
    failure = Failure(
        reason="JobDeleted", message=f"cannot follow Job {view.name}: it was deleted while it ran", retryable=True
    )
    return _judge(observed, view, Verdict(failure=failure), now=now, random=random, policy=policy)


def _refused(task: ProcessingTask, view: View, refusal: Refusal, *, now: datetime, policy: Policy) -> Decision:
    if refusal.permanent:
        failure = Failure(reason=refusal.reason, message=clip(refusal.message), retryable=False)
        return Decision(status=failed(task, failure, now=now))
    status = task.status
    queue = waiting(status, refusal.reason, refusal.message, now=now)
    delay = min(max(now - (queue.since or now), policy.give_back_delay), policy.give_back_max_delay)
    if (left := time_left(queue, now=now, policy=policy)) is not None:
        delay = min(delay, left)
    retry_at = to_second(now + delay, up=True)
    if status.phase is Phase.RETRYING:
        waits = status.model_copy(update={"queue": queue, "retry_at": retry_at})
    else:
        waits = queued(task, queue, now=now, retry_at=retry_at)
    return Decision(status=waits, after=retry_at - now)
