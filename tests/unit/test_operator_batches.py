"""What is decided about a batch: its documents say whether it has ended, its pods why an attempt has."""

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Final

import pytest

from task_contract.messages import AttemptOutcome, Outcome, ProgressEvent
from task_contract.models import Phase, ProcessingTask, Stage
from task_operator.jobs import JobState, PodReport
from task_operator.observation import Batch, Decision, Fence, FenceState, Need, Observed, Policy, Store
from task_operator.reconcile import decide
from task_operator.resources import OOM_KILLED
from tests.support.operator_values import (
    UID,
    at,
    complete,
    ended_pod,
    failed,
    failure,
    given_back,
    handed_back,
    job,
    pod,
    processing,
    retrying,
    success,
    task,
)

NOW: Final = 40
POSTGRES: Final = Store(configured=True)
BATCH: Final = frozenset({Need.BATCH})
PODS: Final = BATCH | {Need.PODS}
ALL: Final = frozenset(Need) - {Need.SETTLE}
SETTLED: Final = frozenset(Need)

NOT_LISTED: Final = Batch()
UNDER_WAY: Final = Batch(total=20, pending=7, failed=1, published=12, chunks=24, shards=(1, 3))
GOOD: Final = Batch(total=20, published=20, chunks=40, embedded=30, reused=10)
ONE_BAD: Final = Batch(
    total=20, failed=1, published=19, chunks=38, failures=("DocumentUnreadable 1 (b.pdf: cannot read b.pdf)",)
)


def batch(*, status: dict[str, Any] | None = None, limit: int = 3, **more: Any) -> ProcessingTask:
    payload = {"filePaths": [f"{number}.md" for number in range(20)], **more.pop("payload", {})}
    retry = {"limit": limit, "initialDelay": "10s", "factor": 2, "maxDelay": "10m", "jitter": 0}
    return task(spec={"type": "batch_processing", "payload": payload, "retry": retry, **more}, status=status)


def seen(given: ProcessingTask, *jobs: JobState, **observed: Any) -> Observed:
    known: dict[str, Any] = {"store": POSTGRES, "projected": 10_000}
    return Observed(task=given, jobs=jobs, **(known | observed))


def killed(index: int, **fields: Any) -> PodReport:
    return ended_pod(index=str(index), uid=f"pod-{index}", name=f"pod-{index}", **fields)


FAILED_INDEXES: Final = failed(reason="FailedIndexes")
PERMANENT: Final = failed(reason="PodFailurePolicy")
RUNS: Final = batch(status=processing())
LAST: Final = batch(status=processing(), limit=0)


@dataclass(frozen=True)
class Row:
    name: str
    observed: Observed
    status: dict[str, Any] | None = None
    """Fields of the decided status, as dotted paths of its manifest; None: no write."""
    needs: frozenset[Need] = frozenset()
    create: int | None = None
    shards: tuple[int, ...] = ()
    delete: int = 0
    after: float | None = None
    messages: list[str] = field(default_factory=list)
    """Parts of the message of the condition Ready, or Succeeded."""


ROWS = [
    # ------------------------------------------------------------------------------------------------------- starting
    Row("before a Job it is asked which documents are left", seen(batch()), needs=BATCH),
    Row(
        "a batch that nobody has listed gets a Job over all shards",
        seen(batch(), answered=BATCH, batch=NOT_LISTED),
        create=1,
        shards=(0, 1, 2, 3),
    ),
    Row(
        "the next attempt is for the shards that are left",
        seen(batch(status=retrying(1)), answered=BATCH, batch=UNDER_WAY),
        create=2,
        shards=(1, 3),
    ),
    Row(
        "so is an attempt that was given back",
        seen(batch(status=given_back(1)), answered=BATCH, batch=UNDER_WAY),
        create=1,
        shards=(1, 3),
    ),
    Row(
        "without PostgreSQL no Job is made, and the status says so",
        seen(batch(), answered=BATCH, batch=None),
        status={"phase": "Queued", "queue.reason": "StoreUnavailable"},
        after=5,
    ),
    Row(
        "a batch whose documents have all ended needs no Job",
        seen(batch(status=retrying(1)), answered=BATCH, batch=GOOD),
        status={"phase": "Completed", "result.documents": 20},
    ),
    Row(
        "a batch without a database is refused",
        seen(batch(), store=Store()),
        status={"phase": "Failed", "error.reason": "InvalidTask"},
        messages=["set OPERATOR_POSTGRES_URL"],
    ),
    # -------------------------------------------------------------------------------------------------------- running
    Row(
        "it runs as soon as one pod does",
        seen(batch(), job(ready=1)),
        status={"phase": "Processing", "attempt": 1, "progress": 0},
    ),
    Row(
        "between two rounds of pods it goes on running",
        seen(RUNS, job(), jobs_changed_at=at(NOW - 20)),
        after=40,
    ),
    Row(
        "when no pod starts for long, it is looked why",
        seen(RUNS, job(), jobs_changed_at=at(NOW - 61)),
        needs=frozenset({Need.PODS}),
    ),
    # --------------------------------------------------------------------------------------------------------- ending
    Row("the end of a Job has the documents looked at", seen(RUNS, complete()), needs=BATCH),
    Row("PostgreSQL is waited for", seen(RUNS, complete(), answered=BATCH), after=5),
    Row(
        "all documents published",
        seen(RUNS, complete(), answered=BATCH, batch=GOOD),
        status={
            "phase": "Completed",
            "progress": 100,
            "result.documents": 20,
            "result.documentsTotal": 20,
            "result.documentsFailed": 0,
            "result.chunks": 40,
            "result.embedded": 30,
            "result.reused": 10,
        },
    ),
    Row(
        "one failed, and none may",
        seen(RUNS, complete(), answered=BATCH, batch=ONE_BAD),
        status={
            "phase": "Failed",
            "error.reason": "BatchFailed",
            "error.retryable": False,
            "result.documents": 19,
            "result.documentsFailed": 1,
        },
        messages=["1 of 20 documents failed", "DocumentUnreadable 1 (b.pdf", "maxFailedPercent allows 0 %"],
    ),
    Row(
        "one of twenty failed, and five percent may",
        seen(batch(status=processing(), payload={"maxFailedPercent": 5}), complete(), answered=BATCH, batch=ONE_BAD),
        status={"phase": "Completed", "result.documents": 19, "result.documentsFailed": 1},
        messages=["1 of 20 documents failed"],
    ),
    Row(
        "one of twenty failed, and four percent may",
        seen(batch(status=processing(), payload={"maxFailedPercent": 4}), complete(), answered=BATCH, batch=ONE_BAD),
        status={"phase": "Failed", "error.reason": "BatchFailed"},
    ),
    Row(
        "documents are left: the pods say why",
        seen(RUNS, FAILED_INDEXES, answered=BATCH, batch=UNDER_WAY),
        needs=frozenset({Need.PODS}),
    ),
    Row(
        "one shard failed, the others are done: counted",
        seen(
            RUNS,
            FAILED_INDEXES,
            answered=PODS,
            batch=UNDER_WAY,
            pods=(killed(0, outcome=success()), killed(1, outcome=failure("ParserCrashed"))),
        ),
        status={"phase": "Retrying", "error.reason": "ParserCrashed", "attempts.0.reason": "ParserCrashed"},
        after=10,
    ),
    Row(
        "shards were handed back, others are done: not counted",
        seen(
            RUNS,
            FAILED_INDEXES,
            answered=PODS,
            batch=UNDER_WAY,
            pods=(killed(0, outcome=success()), killed(1, outcome=handed_back()), killed(2, outcome=handed_back())),
        ),
        status={"phase": "Queued", "queue.reason": "StoreUnavailable", "attempts": None},
        delete=1,
        after=5,
    ),
    Row(
        "one shard was handed back, another failed: counted",
        seen(
            RUNS,
            FAILED_INDEXES,
            answered=PODS,
            batch=UNDER_WAY,
            pods=(killed(0, outcome=handed_back()), killed(1, outcome=failure())),
        ),
        status={"phase": "Retrying", "error.reason": "StoresDisagree"},
        after=10,
    ),
    Row(
        "a pod out of memory goes before other failures: the next one gets more",
        seen(
            RUNS,
            FAILED_INDEXES,
            answered=PODS,
            batch=UNDER_WAY,
            pods=(killed(0, oom_killed=True, exit_code=137), killed(1, outcome=failure())),
        ),
        status={"phase": "Retrying", "error.reason": OOM_KILLED, "attempts.0.reason": OOM_KILLED},
        after=10,
    ),
    Row(
        "of an index only its last pod counts: the one before was evicted",
        seen(
            RUNS,
            FAILED_INDEXES,
            answered=PODS,
            batch=UNDER_WAY,
            pods=(
                killed(0, disrupted="EvictionByEvictionAPI", finished_at=at(10)),
                replace(killed(0, outcome=failure()), name="pod-0b", uid="pod-0b"),
            ),
        ),
        status={"phase": "Retrying", "error.reason": "StoresDisagree"},
        after=10,
    ),
    Row(
        "pods that are gone leave the counts: the attempt is counted",
        seen(RUNS, FAILED_INDEXES, answered=PODS, batch=UNDER_WAY),
        status={"phase": "Retrying", "error.reason": "PodLost"},
        after=10,
    ),
    Row(
        "an attempt over its time is counted, and what it has done stays done",
        seen(RUNS, failed(reason="DeadlineExceeded"), answered=PODS, batch=UNDER_WAY, pods=(killed(0),)),
        status={"phase": "Retrying", "error.reason": "Timeout"},
        after=10,
    ),
    Row(
        "what is wrong with the whole batch ends it at once",
        seen(
            RUNS,
            PERMANENT,
            answered=PODS,
            batch=NOT_LISTED,
            pods=(killed(0, outcome=failure("DocumentNotFound", retryable=False)), killed(1, outcome=handed_back())),
        ),
        status={"phase": "Failed", "error.reason": "DocumentNotFound", "result": None},
    ),
    Row(
        "where the pod that said so is gone, it is looked up",
        seen(RUNS, PERMANENT, answered=PODS, batch=NOT_LISTED, pods=(killed(1, outcome=handed_back()),)),
        needs=frozenset({Need.RESULT}),
    ),
    # ----------------------------------------------------------------------------------------------- the last attempt
    Row(
        "after the last attempt what is left is to count as failed",
        seen(LAST, FAILED_INDEXES, answered=PODS, batch=UNDER_WAY, pods=(killed(1, outcome=failure()),)),
        needs=frozenset({Need.SETTLE}),
    ),
    Row(
        "and then the documents decide",
        seen(LAST, FAILED_INDEXES, answered=SETTLED, batch=ONE_BAD, pods=(killed(1, outcome=failure()),)),
        status={"phase": "Failed", "error.reason": "BatchFailed", "result.documentsFailed": 1},
    ),
    Row(
        "which may be a success",
        seen(
            batch(status=processing(), limit=0, payload={"maxFailedPercent": 50}),
            FAILED_INDEXES,
            answered=SETTLED,
            batch=ONE_BAD,
            pods=(killed(1, outcome=failure()),),
        ),
        status={"phase": "Completed", "result.documents": 19},
    ),
    Row(
        "PostgreSQL went away in between",
        seen(LAST, FAILED_INDEXES, answered=SETTLED, batch=UNDER_WAY, pods=(killed(1, outcome=failure()),)),
        after=5,
    ),
    Row(
        "a failure before anything was listed is that of the task",
        seen(LAST, FAILED_INDEXES, answered=PODS, batch=NOT_LISTED, pods=(killed(0, outcome=failure()),)),
        status={"phase": "Failed", "error.reason": "StoresDisagree"},
    ),
    # ------------------------------------------------------------------------------------------- the Job is gone
    Row("a Job that is gone: first whether it is", seen(RUNS), needs=frozenset({Need.JOB})),
    Row("then the documents are looked at", seen(RUNS, answered=frozenset({Need.JOB})), needs=BATCH),
    Row(
        "all had ended",
        seen(RUNS, answered=ALL, batch=GOOD),
        status={"phase": "Completed", "result.documents": 20},
    ),
    Row(
        "some are left: somebody deleted the Job",
        seen(RUNS, answered=ALL, batch=UNDER_WAY),
        status={"phase": "Retrying", "error.reason": "JobDeleted"},
        after=10,
    ),
    # ------------------------------------------------------------------------------------- cancel, deadline, suspend
    Row(
        "a cancel raises the fence, whatever was published",
        seen(batch(status=processing(), cancel=True), job(ready=1)),
        needs=frozenset({Need.FENCE}),
    ),
    Row(
        "what had been done by then stands in the result",
        seen(
            batch(status=processing(), cancel=True),
            job(ready=1),
            answered=ALL,
            fence=Fence(FenceState.RAISED),
            batch=UNDER_WAY,
        ),
        status={"phase": "Canceled", "result.documents": 12, "result.documentsFailed": 1, "result.documentsTotal": 20},
        delete=1,
    ),
    Row(
        "all had ended before the cancel",
        seen(
            batch(status=processing(), cancel=True),
            complete(),
            answered=ALL,
            fence=Fence(FenceState.COMMITTED),
            batch=GOOD,
        ),
        status={"phase": "Completed", "result.documents": 20},
    ),
    Row(
        "all had ended before the cancel, too many of them badly",
        seen(
            batch(status=processing(), cancel=True),
            complete(),
            answered=ALL,
            fence=Fence(FenceState.COMMITTED),
            batch=ONE_BAD,
        ),
        status={"phase": "Failed", "error.reason": "BatchFailed"},
    ),
    Row(
        "the deadline of the task",
        seen(
            batch(status=processing(), deadline="30s"),
            job(ready=1),
            answered=ALL,
            fence=Fence(FenceState.RAISED),
            batch=UNDER_WAY,
        ),
        status={"phase": "Failed", "error.reason": "DeadlineExceeded", "result.documents": 12},
        delete=1,
    ),
    Row(
        "suspended, it is given back",
        seen(batch(status=processing(), suspend=True), job(ready=1)),
        status={"phase": "Queued", "queue.reason": "Suspended", "attempts": None},
        delete=1,
    ),
    # ------------------------------------------------------------------------------------------------- pods that hang
    Row(
        "pods on a lost node: another Job takes what is left",
        seen(
            RUNS,
            job(),
            jobs_changed_at=at(-100),
            answered=ALL,
            pods=(pod(index="1", running=True, stop_by=at(-70)),),
            release=Fence(FenceState.RAISED),
            batch=UNDER_WAY,
        ),
        status={"phase": "Queued", "queue.reason": "NodeLost"},
        delete=1,
        after=5,
    ),
    Row(
        "pods on a lost node that had done all",
        seen(
            RUNS,
            job(),
            jobs_changed_at=at(-100),
            answered=ALL,
            pods=(pod(index="1", running=True, stop_by=at(-70)),),
            release=Fence(FenceState.COMMITTED),
            batch=GOOD,
        ),
        status={"phase": "Completed", "result.documents": 20},
        delete=1,
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_decide(row: Row) -> None:
    decision = decide(row.observed, now=at(NOW), random=0.5)
    assert decision.needs == row.needs
    assert (decision.create_attempt, decision.shards) == (row.create, row.shards)
    assert len(decision.delete_jobs) == row.delete
    assert decision.after == (None if row.after is None else timedelta(seconds=row.after))
    assert (decision.status is None) == (row.status is None)
    written = {} if decision.status is None else decision.status.manifest()
    assert {path: _read(written, path) for path in row.status or {}} == (row.status or {})
    said = " ".join(condition["message"] for condition in written.get("conditions", ()))
    assert [part for part in row.messages if part not in said] == []


def _read(written: Any, path: str) -> Any:
    for part in path.split("."):
        written = written[int(part)] if isinstance(written, list) else (written or {}).get(part)
    return written or None if path in {"attempts", "result"} else written


def test_why_a_batch_is_settled_is_why_its_last_attempt_failed() -> None:
    observed = seen(LAST, FAILED_INDEXES, answered=PODS, batch=UNDER_WAY, pods=(killed(1, outcome=failure("OOMKilled")),))
    decision: Decision = decide(observed, now=at(NOW), random=0.5)
    assert decision.settle is not None
    assert decision.settle.reason == "OOMKilled"


def told(done: int, percent: int) -> ProgressEvent:
    return ProgressEvent(
        uid=UID,
        namespace="knowledge",
        name="handbook",
        attempt=1,
        stage=Stage.EMBED,
        progress=percent,
        at=at(39),
        done=done,
        total=20,
    )


def test_progress_counts_documents_and_never_goes_back() -> None:
    running = batch(status=processing(progress=25))
    forward = decide(seen(running, job(ready=4), progress=told(8, 40)), now=at(NOW), random=0.5).status
    assert forward is not None
    assert (forward.phase, forward.progress) == (Phase.PROCESSING, 40)
    ready = next(one for one in forward.conditions if one.type == "Ready")
    assert ready.message.startswith("8 of 20 documents have ended")
    # Another pod that has not heard of it yet, and a stage that has changed, are no news.
    for late in (told(4, 20), told(5, 25)):
        assert decide(seen(running, job(ready=4), progress=late), now=at(NOW), random=0.5) == Decision()


def test_pods_that_nodes_under_pressure_evict_again_and_again_count() -> None:
    evicted = tuple(
        killed(number, disrupted="TerminationByKubelet", under_pressure=True, message="The node was low on memory.")
        for number in range(3)
    )
    observed = seen(RUNS, job(), jobs_changed_at=at(-100), answered=ALL, pods=evicted, batch=UNDER_WAY)
    status = decide(observed, now=at(NOW), random=0.5, policy=Policy()).status
    assert status is not None
    assert status.error is not None
    assert status.error.reason == "NodePressure"


def test_the_outcome_of_one_shard_is_never_that_of_the_batch() -> None:
    said = AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=1)
    observed = seen(RUNS, complete(), answered=ALL, batch=UNDER_WAY, pods=(killed(0, outcome=said),))
    status = decide(observed, now=at(NOW), random=0.5).status
    assert status is not None
    assert status.phase is Phase.RETRYING
