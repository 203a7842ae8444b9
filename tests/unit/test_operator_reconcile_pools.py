"""Decisions about tasks that worker pools have, or are to have: one row a situation."""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from task_contract.leases import PoolReport
from task_contract.models import ProcessingTask
from task_operator.dispatch import GRANTED, Place
from task_operator.observation import Decision, Fence, FenceState, Lease, Need, Observed, Policy, Pools, Store, StoredOutcome
from task_operator.reconcile import decide
from tests.support.operator_values import UID, at, failure, handed_back, job, name_of, processing, stamp, success, task

WORKER = "texts-1a667239-0-5f-1-abcde"
WORKER_JOB = "texts-1a667239-0-5f-1"
READY = Pools(known=True, serving="texts", lease=timedelta(seconds=30))
NONE = Pools(known=True, missing="no WorkerPool of namespace knowledge serves document_processing")
DOWN = Pools(known=True, serving="texts", lease=timedelta(seconds=30), down_since=at(20))
POSTGRES = Store(configured=True)
DEFAULT = Policy()
FULL = Place(7, "PoolLimit", "full")
CUT_OFF = "the queue of the worker pool cannot be reached: Redis does not answer"
WITHOUT_REDIS = "worker pools cannot be used: the operator has no Redis; set OPERATOR_REDIS_URL"


def lease(attempt: int = 1, *, queued_at: float = 0, **more: Any) -> Lease:
    known: dict[str, Any] = {"pool": "texts", "attempt": attempt, "stamp": stamp(queued_at), "priority": "normal"}
    return Lease(**(known | more))


def report(kind: str, attempt: int = 1, *, queued_at: float = 0, **more: Any) -> PoolReport:
    known: dict[str, Any] = {
        "kind": kind,
        "uid": UID,
        "namespace": "knowledge",
        "name": "handbook",
        "attempt": attempt,
        "stamp": stamp(queued_at),
        "worker": WORKER,
        "job": "" if kind == "expired" else WORKER_JOB,
        "started_at": None if kind == "expired" else at(5),
        "finished_at": None if kind == "running" else at(6),
    }
    return PoolReport.model_validate(known | more)


def in_pool(attempt: int = 1, **more: Any) -> dict[str, Any]:
    """Return the status of a task whose attempt a worker runs."""
    status = processing(attempt, **more)
    status["attempts"][-1]["job"] = WORKER_JOB
    return status | {"job": WORKER_JOB, "executor": "pool"}


def lost(*numbers: int) -> dict[str, Any]:
    attempts = [
        {"number": one, "job": WORKER_JOB, "startedAt": stamp(1), "finishedAt": stamp(2), "reason": "WorkerLost"}
        for one in numbers
    ]
    return {
        "phase": "Retrying",
        "attempt": numbers[-1],
        "queuedAt": stamp(0),
        "retryAt": stamp(2),
        "attempts": attempts,
        "conditions": [],
    }


def placed(observed: dict[str, Any]) -> dict[str, Any]:
    return {"answered": frozenset({Need.PLACE}), "place": GRANTED} | observed


@dataclass
class Row:
    name: str
    observed: Observed
    now: float = 10
    policy: Policy = DEFAULT
    status: dict[str, Any] = field(default_factory=dict)
    """Paths in the status that is written; empty: none is."""
    needs: frozenset[Need] = frozenset()
    offer: str | None = None
    withdraw: bool = False
    heard: bool = False
    create: int | None = None
    after: float | None = None


def pools_only(spec: dict[str, Any] | None = None, **parts: Any) -> ProcessingTask:
    return task(spec={"executor": "pool"} | (spec or {}), **parts)


STORED = StoredOutcome(success(), WORKER, at(6))
JOBS = Policy(pool_fallback=True)
WITH_RELEASE: dict[str, Any] = {"store": POSTGRES, "answered": frozenset({Need.RESULT, Need.RELEASE})}

ROWS = [
    # ------------------------------------------------------------------------------------------------------ the choice
    Row("auto has a Job where there are no pools at all", Observed(task=task()), create=1),
    Row("auto has a Job where no pool takes it", Observed(task=task(), pools=NONE), create=1),
    Row(
        "auto asks for a place in the pool that takes it",
        Observed(task=task(), pools=READY),
        needs=frozenset({Need.PLACE}),
        offer="texts",
    ),
    Row("and is offered to it", Observed(**placed({"task": task(), "pools": READY})), offer="texts"),
    Row("job has a Job whatever pools there are", Observed(task=task(spec={"executor": "job"}), pools=READY), create=1),
    Row("nobody is sent elsewhere before the pools are known", Observed(task=task(), pools=Pools()), after=1),
    Row("who wants a pool is patient first", Observed(task=pools_only(), pools=NONE), now=2, after=3),
    Row(
        "and is told then which is missing",
        Observed(task=pools_only(), pools=NONE),
        status={"phase": "Queued", "queue.reason": "NoPool", "queue.message": NONE.missing},
    ),
    Row(
        "or that there can be none",
        Observed(task=pools_only()),
        status={
            "queue.reason": "NoPool",
            "queue.message": "worker pools cannot be used: the operator has no Redis; set OPERATOR_REDIS_URL",
        },
    ),
    Row(
        "a place in a pool's line is told after half a minute, and one after the other",
        Observed(task=task(), pools=READY, answered=frozenset({Need.PLACE}), place=FULL),
        after=20.07,
    ),
    Row(
        "after one lost worker the next one has it",
        Observed(**placed({"task": task(status=lost(1)), "pools": READY})),
        offer="texts",
    ),
    Row("after two it has a Job", Observed(task=pools_only(status=lost(1, 2)), pools=READY), create=3),
    Row(
        "what an earlier process may have offered may have ended",
        Observed(task=task(), pools=Pools(known=True, serving="texts", inherited=True), store=POSTGRES),
        needs=frozenset({Need.RESULT}),
    ),
    Row(
        "and is judged by that",
        Observed(
            task=task(),
            pools=Pools(known=True, serving="texts", inherited=True),
            store=POSTGRES,
            answered=frozenset({Need.RESULT}),
            result=STORED,
        ),
        status={"phase": "Completed"},
    ),
    # -------------------------------------------------------------------------------------------------- it has the task
    Row("what is offered is left alone", Observed(task=task(), pools=READY, lease=lease())),
    Row(
        "what runs for longer than a moment is Processing",
        Observed(task=task(), pools=READY, lease=lease(), reports=(report("running"),)),
        status={
            "phase": "Processing",
            "executor": "pool",
            "job": WORKER_JOB,
            "startedAt": stamp(5),
            "attempts.0.startedAt": stamp(5),
        },
        heard=True,
    ),
    Row(
        "which is said once",
        Observed(task=task(status=in_pool()), pools=READY, lease=lease(), reports=(report("running"),)),
        heard=True,
        after=2395,
    ),
    Row(
        "a success that nobody saw begin is one write",
        Observed(task=task(), pools=READY, reports=(report("running"), report("ended", outcome=success()))),
        status={
            "phase": "Completed",
            "executor": "pool",
            "job": WORKER_JOB,
            "attempt": 1,
            "queuedAt": stamp(0),
            "startedAt": stamp(5),
            "finishedAt": stamp(6),
            "attempts.0.reason": "Succeeded",
            "attempts.0.job": WORKER_JOB,
        },
        heard=True,
    ),
    Row(
        "a worker's clock is not believed to be before the task, nor in the future",
        Observed(
            task=task(), pools=READY, reports=(report("ended", outcome=success(), started_at=at(-50), finished_at=at(999)),)
        ),
        status={"startedAt": stamp(0), "finishedAt": stamp(10)},
        heard=True,
    ),
    Row(
        "a failure is tried again as that of a pod is",
        Observed(task=task(), pools=READY, reports=(report("ended", outcome=failure()),)),
        status={"phase": "Retrying", "executor": "pool", "error.reason": "StoresDisagree", "retryAt": stamp(16)},
        heard=True,
        after=10,
    ),
    Row(
        "handed back: at once",
        Observed(task=task(status=in_pool()), pools=READY, reports=(report("ended", outcome=handed_back("HandedBack")),)),
        status={"phase": "Queued", "queue.reason": "HandedBack", "attempt": 1, "retryAt": stamp(6), "queuedAt": stamp(6)},
        heard=True,
        after=0,
    ),
    Row(
        "a store is down: after a while",
        Observed(task=task(status=in_pool()), pools=READY, reports=(report("ended", outcome=handed_back()),)),
        status={"phase": "Queued", "queue.reason": "StoreUnavailable", "retryAt": stamp(11)},
        heard=True,
        after=5,
    ),
    Row(
        "what another attempt reports is nothing",
        Observed(task=task(status=in_pool(2)), pools=READY, lease=lease(2), reports=(report("ended", outcome=success()),)),
        heard=True,
        after=2395,
    ),
    Row(
        "nor what was said in an earlier stay in the queue",
        Observed(task=task(), pools=READY, lease=lease(), reports=(report("ended", queued_at=-9, outcome=failure()),)),
        heard=True,
    ),
    Row(
        "while it has a Job a failure in a pool is nothing",
        Observed(task=task(), jobs=(job(ready=True),), pools=READY, reports=(report("ended", outcome=failure()),)),
        status={"phase": "Processing", "executor": "job", "job": name_of(1)},
        heard=True,
    ),
    Row(
        "but a success counts",
        Observed(task=task(), jobs=(job(ready=True),), pools=READY, reports=(report("ended", outcome=success()),)),
        status={"phase": "Completed", "executor": "pool"},
        heard=True,
    ),
    # -------------------------------------------------------------------------------------------------- the worker is lost
    Row(
        "of a lost worker the result is looked for",
        Observed(task=task(status=in_pool()), pools=READY, store=POSTGRES, reports=(report("expired"),)),
        needs=frozenset({Need.RESULT}),
    ),
    Row(
        "then its intents are taken",
        Observed(
            task=task(status=in_pool()),
            pools=READY,
            store=POSTGRES,
            answered=frozenset({Need.RESULT}),
            reports=(report("expired"),),
        ),
        needs=frozenset({Need.RELEASE}),
    ),
    Row(
        "which waits for PostgreSQL, and the report stays",
        Observed(
            task=task(status=in_pool()),
            pools=READY,
            reports=(report("expired"),),
            **WITH_RELEASE,
        ),
        after=5,
    ),
    Row(
        "then another one has the next attempt at once",
        Observed(
            task=task(status=in_pool()),
            pools=READY,
            reports=(report("expired"),),
            release=Fence(FenceState.RAISED),
            **WITH_RELEASE,
        ),
        status={"phase": "Retrying", "error.reason": "WorkerLost", "retryAt": stamp(10), "attempts.0.job": WORKER_JOB},
        heard=True,
        after=0,
    ),
    Row(
        "unless it had committed",
        Observed(
            task=task(status=in_pool()),
            pools=READY,
            reports=(report("expired"),),
            release=Fence(FenceState.COMMITTED, success()),
            **WITH_RELEASE,
        ),
        status={"phase": "Completed"},
        heard=True,
    ),
    Row(
        "the last attempt is the last",
        Observed(task=task(spec={"retry": {"limit": 0}}), pools=READY, reports=(report("expired"),)),
        status={"phase": "Failed", "error.reason": "WorkerLost", "attempts.0.job": WORKER_JOB},
        heard=True,
    ),
    Row(
        "a worker that does not end an attempt loses it after the timeout",
        Observed(
            task=task(status=in_pool()),
            pools=READY,
            lease=lease(),
            release=Fence(FenceState.RAISED),
            **WITH_RELEASE,
        ),
        now=5 + 40 * 60,
        status={"phase": "Retrying", "error.reason": "Timeout"},
        withdraw=True,
        after=10,
    ),
    # ------------------------------------------------------------------------------------------------------ Redis is lost
    Row(
        "what is lost is looked for in PostgreSQL",
        Observed(task=task(), pools=READY, store=POSTGRES, lease=lease(lost=True)),
        needs=frozenset({Need.RESULT}),
    ),
    Row(
        "and offered again",
        Observed(task=task(), pools=READY, store=POSTGRES, lease=lease(lost=True), answered=frozenset({Need.RESULT})),
        offer="texts",
    ),
    Row(
        "what runs, for all that is known after a restart, too",
        Observed(task=task(status=in_pool()), pools=READY, store=POSTGRES, answered=frozenset({Need.RESULT})),
        offer="texts",
    ),
    Row("but not before it is known what is there", Observed(task=task(status=in_pool()), pools=Pools()), after=1),
    Row(
        "while Redis is down a task says so",
        Observed(task=task(), pools=DOWN),
        now=30,
        status={"phase": "Queued", "queue.reason": "QueueUnavailable"},
    ),
    Row("what runs goes on", Observed(task=task(status=in_pool()), pools=DOWN, lease=lease()), now=600),
    Row(
        "where a setting says so a task waits a minute",
        Observed(
            task=task(
                status={
                    "phase": "Queued",
                    "queue": {
                        "reason": "QueueUnavailable",
                        "message": "the queue of the worker pool cannot be reached: Redis does not answer",
                    },
                    "conditions": [],
                }
            ),
            pools=DOWN,
        ),
        policy=JOBS,
        now=30,
        after=50,
    ),
    Row("and becomes a Job", Observed(task=task(), pools=DOWN), policy=JOBS, now=80, create=1),
    Row(
        "one that was offered is taken out first",
        Observed(task=task(), pools=DOWN, lease=lease()),
        policy=JOBS,
        now=80,
        withdraw=True,
    ),
    Row(
        "one that runs keeps its lease and a minute",
        Observed(task=task(status=in_pool()), pools=DOWN, lease=lease()),
        policy=JOBS,
        now=80,
        after=30,
    ),
    Row(
        "and is then taken back",
        Observed(
            task=task(status=in_pool()),
            pools=DOWN,
            lease=lease(),
            release=Fence(FenceState.RAISED),
            **WITH_RELEASE,
        ),
        policy=JOBS,
        now=110,
        status={"phase": "Queued", "queue.reason": "QueueUnavailable", "attempt": 1},
        withdraw=True,
        after=5,
    ),
    # ---------------------------------------------------------------------------------------------- the pool, or the task
    Row(
        "a pool that does not take it any more gives it up", Observed(task=task(), pools=NONE, lease=lease()), withdraw=True
    ),
    Row(
        "but what its worker runs it ends",
        Observed(task=task(status=in_pool()), pools=NONE, lease=lease()),
        after=2395,
    ),
    Row(
        "unless the pool has been gone for long",
        Observed(
            task=task(status=in_pool()),
            pools=Pools(known=True, gone_since=at(20)),
            lease=lease(),
            release=Fence(FenceState.RAISED),
            **WITH_RELEASE,
        ),
        now=110,
        status={"phase": "Queued", "queue.reason": "HandedBack", "attempt": 1},
        withdraw=True,
        after=0,
    ),
    Row(
        "another priority is another stream",
        Observed(task=task(spec={"priority": "high"}), pools=READY, lease=lease()),
        offer="texts",
    ),
    Row(
        "suspended: given back and taken out",
        Observed(task=task(spec={"suspend": True}, status=in_pool()), pools=READY, lease=lease()),
        status={"phase": "Queued", "conditions.0.reason": "Suspended", "queuedAt": stamp(10)},
        withdraw=True,
    ),
    Row(
        "canceled without PostgreSQL",
        Observed(task=task(spec={"cancel": True}, status=in_pool()), pools=READY, lease=lease()),
        status={"phase": "Canceled"},
        withdraw=True,
    ),
    Row(
        "canceled behind the fence",
        Observed(
            task=task(spec={"cancel": True}, status=in_pool()),
            pools=READY,
            lease=lease(),
            store=POSTGRES,
            answered=frozenset({Need.FENCE}),
            fence=Fence(FenceState.RAISED),
        ),
        status={"phase": "Canceled"},
        withdraw=True,
    ),
    Row(
        "a commit came first, and the worker is about to say so",
        Observed(
            task=task(spec={"cancel": True}, status=in_pool()),
            pools=READY,
            lease=lease(),
            store=POSTGRES,
            answered=frozenset({Need.FENCE}),
            fence=Fence(FenceState.COMMITTED),
        ),
        after=1,
    ),
    Row(
        "a task with a Job is taken out of a pool that has it too",
        Observed(
            task=task(status=processing()),
            jobs=(job(ready=True),),
            pools=Pools(known=True, serving="texts", present="texts"),
        ),
        withdraw=True,
    ),
    Row(
        "what is said of a finished task is done with",
        Observed(
            task=task(status={"phase": "Completed", "finishedAt": stamp(5), "observedGeneration": 1, "conditions": []}),
            pools=READY,
            reports=(report("ended", outcome=failure()),),
        ),
        heard=True,
        after=86_395,
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_decide(row: Row) -> None:
    decision = decide(row.observed, now=at(row.now), random=0.5, policy=row.policy)

    assert decision.needs == row.needs
    assert (decision.offer, decision.withdraw, decision.heard) == (row.offer, row.withdraw, row.heard)
    assert decision.create_attempt == row.create
    assert (None if decision.after is None else decision.after.total_seconds()) == row.after
    assert (decision.status is not None) == bool(row.status)
    if decision.status is not None:
        written = decision.status.manifest()
        assert {path: _read(written, path) for path in row.status} == row.status


def test_who_waits_for_a_pool_is_counted_for_it() -> None:
    waits = [
        Observed(task=task(), pools=READY, answered=frozenset({Need.PLACE}), place=FULL),
        Observed(task=pools_only(), pools=NONE),
        Observed(task=task(), pools=DOWN),
    ]
    rest = [Observed(task=task(), pools=NONE), Observed(task=task(spec={"suspend": True}), pools=READY)]

    def decided(observed: Observed) -> Decision:
        return decide(observed, now=at(10), random=0.5)

    assert [decided(one).awaits_pool for one in waits] == [True, True, True]
    assert [decided(one).awaits_pool for one in rest] == [False, False]


def _read(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else (value or {}).get(part)
    return value
