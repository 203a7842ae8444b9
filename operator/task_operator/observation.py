"""What a decision about a task rests on, and what it consists of. Values only; frozen."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from functools import lru_cache

from task_contract.leases import PoolReport, ReportKind
from task_contract.messages import AttemptOutcome, Outcome, ProgressEvent
from task_contract.models import Executor, Failure, Phase, ProcessingTask, Status
from task_contract.names import job_name
from task_operator.dependencies import Dependencies
from task_operator.dispatch import Place
from task_operator.jobs import JobState, PodReport, current_attempt, queue_stamp
from task_operator.resources import Size


class Need(StrEnum):
    """What a decision can ask for, because it costs a request and is seldom needed."""

    JOB = "job"
    """Whether the Job of the current attempt exists, asked of the API server and not of the cache."""
    PODS = "pods"
    """The pods of the task."""
    POD_REFUSAL = "pod refusal"
    """What the Job controller said when the cluster would not let it create the pod."""
    PLACE = "place"
    """Whether the limits allow the task a Job."""
    RESULT = "result"
    """The row of the current attempt in ``task_results``."""
    FENCE = "fence"
    """The fence over the whole task, to be raised now unless a commit came first. Raising it twice is raising it once."""
    BATCH = "batch"
    """What has become of the documents of a batch so far."""
    SETTLE = "settle"
    """The same, after those that have not ended are made to count as failed: from then on none of them is published."""
    DEPENDENCIES = "dependencies"
    """What has become of the tasks that it waits for."""
    RELEASE = "release"
    """The intents of the task, to be taken now from whichever pod holds them, unless a commit came first: that pod cannot
    commit any more, the next one of the task can."""


class FenceState(StrEnum):
    """Who came first: the operator's fence or the runner's commit."""

    RAISED = "raised"
    COMMITTED = "committed"


@dataclass(frozen=True, slots=True)
class Fence:
    """The answer to :attr:`Need.FENCE` and :attr:`Need.RELEASE`."""

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
class Batch:
    """What PostgreSQL says of the documents of a batch; all 0: no pod has listed them yet."""

    total: int = 0
    pending: int = 0
    failed: int = 0
    published: int = 0
    """Those that ended well and were neither superseded nor duplicates."""
    chunks: int = 0
    embedded: int = 0
    reused: int = 0
    shards: tuple[int, ...] = ()
    """Those with documents that have not ended, in ascending order."""
    failures: tuple[str, ...] = ()
    """Reasons of failed documents, the most frequent first: how many, and the first of them with its message."""

    @property
    def listed(self) -> bool:
        """Whether it is known which documents there are."""
        return self.total > 0

    @property
    def ended(self) -> bool:
        """Whether all of them have ended, well or not."""
        return self.listed and not self.pending


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
class Lease:
    """An attempt that this process has offered to a pool, and whose end it has not heard of."""

    pool: str
    attempt: int
    stamp: str
    """Which stay in the queue."""
    priority: str
    lost: bool = False
    """Two looks in a row did not find it, and no report says why: Redis has lost it."""


@dataclass(frozen=True, slots=True)
class Pools:
    """What worker pools can do for a task, as far as this process knows. Without Redis there is none of this."""

    known: bool = False
    """Whether all pools of the namespace were listed, each was looked at, and what its workers reported was read. Before,
    nobody can tell whether a pool has the task."""
    serving: str | None = None
    """The pool for its next attempt: that which has the task, as long as it fits."""
    missing: str = ""
    """Why there is none."""
    down_since: datetime | None = None
    """Since when Redis cannot be used; None: it can."""
    lease: timedelta = timedelta()
    """So long a worker of the pool may be silent."""
    present: str | None = None
    """A pool in whose queue the last look has seen the task, under whatever attempt."""
    gone_since: datetime | None = None
    """Since when the pool that has the task does not exist any more."""
    inherited: bool = False
    """An earlier process may have offered the attempt."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Waits that are the operator's own and not a task's."""

    pod_patience: timedelta = timedelta(seconds=3)
    """So long a pod may take to start before anybody looks why."""
    controller_patience: timedelta = timedelta(seconds=30)
    """So long the Job controller may take to notice a Job before anybody looks for a pod of it."""
    pod_look_interval: timedelta = timedelta(seconds=60)
    """Longest time between two looks at pods that do not start."""
    pending_deadline: timedelta = timedelta(hours=1)
    """So long a pod may fail to start for reasons of its own, such as its image; zero: for ever."""
    capacity_deadline: timedelta = timedelta(days=1)
    """So long it may wait for room (a node, quota) that others may hold; zero: for ever."""
    resource_classes: frozenset[str] = frozenset(Size)
    """Names that ``spec.resourceClass`` may have."""
    queue_patience: timedelta = timedelta(seconds=5)
    """So long a task waits for a place before its status says so: most waits are shorter, and each would cost a write."""
    pool_queue_patience: timedelta = timedelta(seconds=30)
    """The same of a task that waits for its turn in a pool's line: thousands do, and most are done by then."""
    pool_queue_spread: timedelta = timedelta(seconds=0.01)
    """And so much longer for each that is in front of it: a line that stands still is no burst of writes."""
    pool_fallback: bool = False
    """Whether tasks of pools run as Jobs while Redis cannot be used."""
    pool_fallback_patience: timedelta = timedelta(seconds=60)
    """After so long; one that a worker may have, so long after its lease."""
    pool_gone_patience: timedelta = timedelta(seconds=90)
    """So long workers of a pool that was deleted have to finish: their grace period, and what comes after it."""
    attempt_allowance: timedelta = timedelta(minutes=10)
    """A worker ends an attempt at its timeout itself. So long after that the attempt is taken from one that does not."""
    give_back_delay: timedelta = timedelta(seconds=5)
    """Wait before an attempt that was given back is tried again; doubles while that repeats."""
    give_back_max_delay: timedelta = timedelta(seconds=60)
    give_back_memory: timedelta = timedelta(minutes=10)
    """An attempt that ran longer than this starts the doubling anew."""
    evictions_under_pressure: int = 3
    """An attempt whose pods nodes under pressure evicted so often is counted: it may be their doing."""
    stuck_patience: timedelta = timedelta(seconds=60)
    """So long after its grace period a pod that was told to stop may be there, before its attempt goes elsewhere."""
    job_ttl: timedelta = timedelta(minutes=5)
    """So long the last Job of a finished task stays, for the log of its pod."""
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
    first: str | None = None
    """Name of the task that comes before this one under the same idempotencyKey; None: none does."""
    limited: bool = False
    """Whether there are limits, so that a Job needs a place."""
    place: Place | None = None
    """The answer to :attr:`Need.PLACE`."""
    dependencies: Dependencies = Dependencies()  # noqa: RUF009 - frozen
    """The answer to :attr:`Need.DEPENDENCIES`."""
    progress: ProgressEvent | None = None
    last_write: datetime | None = None
    """When the status was last written by this process."""
    refusal: Refusal | None = None
    """Of the Job that this pass tried to create."""
    pools: Pools | None = None
    """None: pools cannot be used, for Redis is not configured."""
    lease: Lease | None = None
    reports: tuple[PoolReport, ...] = ()
    """What workers have said of the task and no status says yet, in the order in which they said it."""
    answered: frozenset[Need] = frozenset()
    """Which of the following were looked up."""
    pods: tuple[PodReport, ...] = ()
    pod_refusal: str | None = None
    result: StoredOutcome | None = None
    fence: Fence | None = None
    """None although answered: PostgreSQL cannot be reached."""
    release: Fence | None = None
    """The same."""
    batch: Batch | None = None
    """The same."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, in this order: answer the needs (and decide again), or write, delete, create."""

    needs: frozenset[Need] = frozenset()
    patient: bool = False
    """Whether the pods, if they are among the needs, can wait a moment: nothing but why none runs depends on them."""
    fence_reason: str = ""
    """Why the fence is to be raised, when it is among the needs."""
    settle: Failure | None = None
    """Why documents that have not ended are to count as failed, when that is among the needs."""
    status: Status | None = None
    """The whole status as it should be; None: as it is."""
    delete_jobs: tuple[JobState, ...] = ()
    create_attempt: int | None = None
    """Number of the attempt whose Job is to be created."""
    shards: tuple[int, ...] = ()
    """Of a batch: which shards it is for."""
    heard: bool = False
    """The reports that this rests on may be removed: what they say stands in the status, or matters no more."""
    withdraw: bool = False
    """Take the task out of the pools that have it."""
    offer: str | None = None
    """The pool that the attempt is to be offered to. Offering it twice is offering it once."""
    awaits_pool: bool = False
    """The task waits for a pool: to be offered to the one that serves it, or for one to come."""
    delete_task: bool = False
    after: timedelta | None = None
    """Look again after this time even if nothing happens."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a task is to end from outside."""

    phase: Phase
    reason: str
    message: str
    duplicate_of: str | None = None


@dataclass(frozen=True, slots=True)
class View:
    """The current attempt, and what has it: a Job, or a pool."""

    attempt: int
    name: str
    """Of the attempt's Job."""
    job: JobState | None
    """The attempt's Job."""
    blocker: JobState | None
    """A Job of the same name that is from an earlier stay in the queue."""
    others: tuple[JobState, ...] = field(default=())
    stamp: str = ""
    """Of the present stay in the queue."""
    lease: Lease | None = None
    """Of this attempt in this stay."""
    report: PoolReport | None = None
    """The last word of a worker about it. While it has a Job too, only that it succeeded."""
    ran_as: str = ""
    """What stands in the status as its Job: its own, or that of the worker."""
    executor: Executor = Executor.JOB

    @property
    def over(self) -> bool:
        """Whether a worker has ended the attempt, or has lost it."""
        return self.report is not None and self.report.kind is not ReportKind.RUNNING


def view_of(observed: Observed) -> View:
    """Return what follows from an observation at once."""
    task, status = observed.task, observed.task.status
    attempt = current_attempt(status)
    name = _job_name(task_name=task.metadata.name, task_uid=task.metadata.uid or "", attempt=attempt)
    stamp = queue_stamp(task)
    same = [job for job in observed.jobs if job.name == name]
    job = next((job for job in same if job.queue_stamp == stamp), None)
    lease = observed.lease
    if lease is not None and (lease.attempt, lease.stamp) != (attempt, stamp):
        lease = None
    report = _last_word(observed.reports, attempt=attempt, stamp=stamp)
    if job is not None and not _success(report):
        report = None
    ran_as, executor = name, Executor.JOB
    if report is not None:
        ran_as, executor = _worker_job(report, status), Executor.POOL
    elif job is None and status.phase is Phase.PROCESSING and status.executor is Executor.POOL:
        ran_as, executor = status.job or name, Executor.POOL
    return View(
        attempt=attempt,
        name=name,
        job=job,
        blocker=next((job for job in same if job.queue_stamp != stamp), None),
        others=tuple(job for job in observed.jobs if job.name != name),
        stamp=stamp,
        lease=lease,
        report=report,
        ran_as=ran_as,
        executor=executor,
    )


_job_name = lru_cache(maxsize=1024)(job_name)  # a look needs it several times


def _last_word(reports: tuple[PoolReport, ...], *, attempt: int, stamp: str) -> PoolReport | None:
    """Return what counts of the reports about an attempt: that it succeeded, else how it ended, else that it runs."""
    mine = [report for report in reports if (report.attempt, report.stamp) == (attempt, stamp)]
    ends = [report for report in mine if report.kind is not ReportKind.RUNNING]
    return next((report for report in ends if _success(report)), next(iter(ends or mine[::-1]), None))


def _success(report: PoolReport | None) -> bool:
    return report is not None and report.outcome is not None and report.outcome.outcome is Outcome.SUCCEEDED


def _worker_job(report: PoolReport, status: Status) -> str:
    """Return the name of the worker's Job; a lease that ran out names the pod alone, which is called after its Job."""
    if report.job:
        return report.job
    if status.phase is Phase.PROCESSING and status.job is not None and report.worker.startswith(f"{status.job}-"):
        return status.job
    return (report.worker.rpartition("-")[0] or report.worker)[:63]
