"""Tasks in worker pools, whatever happens to operator, workers and Redis, at any write: they end, once."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from task_contract.models import Phase
from task_platform.kubernetes import Unavailable
from tests.support.operator_values import UID, failure, handed_back, success
from tests.support.operator_world import OUTCOMES, Crash, MemoryPools, Operator, World

ENDS = OUTCOMES | {"handed back": handed_back("HandedBack")}

STEPS = st.one_of(
    st.tuples(st.just("look"), st.integers(0, 7)),
    st.tuples(st.just("look without answer"), st.integers(0, 7)),
    st.tuples(st.just("look"), st.none()),
    st.tuples(st.just("end"), st.sampled_from(sorted(ENDS))),
    st.tuples(st.just("end pod"), st.sampled_from(sorted(OUTCOMES))),
    st.tuples(st.sampled_from(["take", "tell", "silence", "wipe", "repeat", "renew", "pools"]), st.none()),
    st.tuples(st.sampled_from(["Redis down", "Redis up", "no pool", "another pool", "restart", "lose events"]), st.none()),
    st.tuples(st.sampled_from(["commit", "suspend", "resume", "cancel", "database down", "database up", "run"]), st.none()),
    st.tuples(st.just("wait"), st.sampled_from([1, 4, 15, 90, 400])),
)

LOOK: tuple[str, Any] = ("look", None)
TAKEN: list[tuple[str, Any]] = [LOOK, ("take", None)]
RUNS: list[tuple[str, Any]] = [*TAKEN, ("tell", None), LOOK]
BEGINNINGS: list[list[tuple[str, Any]]] = [
    [],
    TAKEN,
    RUNS,
    [*TAKEN, ("end", "success")],
    [*RUNS, ("end", "handed back"), LOOK],
    [*RUNS, ("silence", None), LOOK],
    [*RUNS, ("silence", None), LOOK, LOOK, ("take", None), ("silence", None), LOOK],
    [*RUNS, ("wipe", None), ("pools", None), ("pools", None), LOOK, ("take", None)],
    [*TAKEN, ("wipe", None), ("restart", None), LOOK, ("take", None)],
    [*RUNS, ("commit", None), ("silence", None)],
    [*RUNS, ("Redis down", None), ("wait", 400), LOOK, ("run", None)],
]


async def play(world: World, operator: Operator, pools: MemoryPools, steps: list[tuple[str, Any]]) -> None:
    ended: dict[str, Any] | None = None
    for step, argument in steps:
        match step:
            case "look" | "look without answer":
                world.crash_in, world.fault = argument, Crash if step == "look" else Unavailable
                operator.deliver()
                await operator.settle(rounds=3)
                world.crash_in = None
            case "pools":
                operator.look_at_pools()
            case "take":
                pools.take()
            case "tell":
                for run in pools.runs:
                    pools.tell(run)
            case "end":
                for run in pools.runs[:1]:
                    pools.end(run, ENDS[argument])
            case "commit":
                for run in pools.runs[:1]:
                    world._committed(run.worker, run.uid)
            case "silence" | "wipe" | "repeat" | "renew":
                getattr(pools, step)()
            case "Redis down" | "Redis up":
                pools.up = step == "Redis up"
            case "no pool" | "another pool":
                pools.names = [] if step == "no pool" else ["a-better-one", *pools.names]
            case "run":
                world.run_pod()
            case "end pod":
                world.end_pod(OUTCOMES[argument])
            case "lose events":
                operator.deliver(lose=True)
            case "suspend" | "resume":
                world.edit(suspend=step == "suspend")
            case "cancel":
                world.edit(cancel=True)
            case "database down" | "database up":
                world.database_up = step == "database up"
            case "restart":
                operator._controller = None
            case "wait":
                world.now += timedelta(seconds=argument)
        if ended is not None:
            assert _lasting(world.status) == ended, "a finished task has changed"
        elif Phase(world.status["phase"]).finished:
            ended = _lasting(world.status)
    await operator.finish()
    assert ended is None or _lasting(world.status) == ended


def _lasting(status: dict[str, Any]) -> dict[str, Any]:
    conditions = [
        {key: value for key, value in condition.items() if key != "observedGeneration"} for condition in status["conditions"]
    ]
    return {key: value for key, value in status.items() if key != "observedGeneration"} | {"conditions": conditions}


@settings(max_examples=150)
@given(
    begin=st.sampled_from(BEGINNINGS),
    steps=st.lists(STEPS, max_size=15),
    database=st.booleans(),
    fallback=st.booleans(),
)
def test_every_history_of_a_task_in_a_pool_converges(
    begin: list[tuple[str, Any]], steps: list[tuple[str, Any]], database: bool, fallback: bool
) -> None:
    world = World()
    world.add_task()
    pools = MemoryPools(world)
    operator = Operator(world, database=database, pools=pools, fallback=fallback)

    asyncio.run(play(world, operator, pools, begin + steps))

    status = world.status
    phase = Phase(status["phase"])
    assert phase.finished
    numbers = [attempt["number"] for attempt in status.get("attempts", [])]
    assert numbers == list(range(1, len(numbers) + 1)), "an attempt is counted twice, or never"
    assert len(numbers) <= 4, "more attempts than the policy allows"
    assert status["attempt"] <= 4
    assert all(job["status"].get("conditions") for job in world.jobs.values()), "a Job runs for a finished task"
    if phase is Phase.COMPLETED:
        assert UID in world.published
    if database:
        assert world.commits <= 1
    if database and phase is Phase.CANCELED and UID in world.published:
        assert any(step == "database down" for step, _ in begin + steps)


async def _quick(world: World, operator: Operator, pools: MemoryPools) -> None:
    await operator.settle()
    run = pools.take()
    assert run is not None
    world.now += timedelta(seconds=0.4)
    pools.end(run, success())
    await operator.settle()


async def _long(world: World, operator: Operator, pools: MemoryPools) -> None:
    await operator.settle()
    run = pools.take()
    assert run is not None
    world.now += timedelta(seconds=1)
    pools.tell(run)
    await operator.settle()
    world.now += timedelta(seconds=20)
    pools.end(run, success())
    await operator.settle()


async def _lost(world: World, operator: Operator, pools: MemoryPools) -> None:
    await operator.settle()
    run = pools.take()
    assert run is not None
    pools.tell(run)
    await operator.settle()
    pools.silence()
    await operator.settle()
    again = pools.take()
    assert again is not None
    pools.end(run, success())  # it wakes, and cannot commit any more
    pools.end(again, success())
    await operator.settle()


async def _handed_back(world: World, operator: Operator, pools: MemoryPools) -> None:
    await operator.settle()
    run = pools.take()
    assert run is not None
    pools.tell(run)
    await operator.settle()
    pools.end(run, handed_back("HandedBack"))
    await operator.settle()
    again = pools.take()
    assert again is not None
    pools.end(again, success())
    await operator.settle()


async def _canceled(world: World, operator: Operator, pools: MemoryPools) -> None:
    await operator.settle()
    pools.take()
    world.edit(cancel=True)
    await operator.settle()


async def _suspended(world: World, operator: Operator, pools: MemoryPools) -> None:
    await operator.settle()
    pools.take()
    world.edit(suspend=True)
    await operator.settle()
    world.edit(suspend=False)
    await operator.settle()
    pools.renew()
    run = pools.take()
    assert run is not None
    pools.end(run, success())
    await operator.settle()


PATHS = {
    "quick": _quick,
    "long": _long,
    "lost": _lost,
    "handed back": _handed_back,
    "canceled": _canceled,
    "suspended": _suspended,
}


def _end(world: World) -> dict[str, Any]:
    status = world.status
    return {
        "phase": status["phase"],
        "attempt": status["attempt"],
        "attempts": [(one["number"], one["reason"]) for one in status.get("attempts", [])],
        "conditions": [(one["type"], one["status"], one["reason"]) for one in status["conditions"]],
        "jobs made": world.created,
        "commits": world.commits,
    }


@pytest.mark.parametrize("killed", [False, True], ids=["cut", "killed"])
@pytest.mark.parametrize("path", PATHS)
async def test_a_process_that_dies_or_gets_no_answer_at_any_write_changes_nothing(path: str, killed: bool) -> None:
    undisturbed = World()
    undisturbed.add_task()
    pools = MemoryPools(undisturbed)
    await PATHS[path](undisturbed, Operator(undisturbed, pools=pools), pools)

    for cut in range(len(undisturbed.writes)):
        world = World()
        world.add_task()
        pools = MemoryPools(world)
        world.crash_in, world.fault = cut, Crash if killed else Unavailable
        operator = Operator(world, pools=pools)
        await PATHS[path](world, operator, pools)
        await operator.finish()
        assert _end(world) == _end(undisturbed), f"cut at {undisturbed.writes[cut]}"
        for _ in range(2):
            operator.look_at_pools()
            await asyncio.sleep(0.01)
        assert not pools.entries.get("texts") or not operator._controller, "it is still in the queue of the pool"


async def test_a_task_that_ends_within_a_second_costs_one_status_write() -> None:
    world = World()
    world.add_task()
    pools = MemoryPools(world)
    await _quick(world, Operator(world, pools=pools), pools)
    told = [one for one in world.writes if one.startswith(("put", "patch"))]
    assert told == ["put status", "patched status Completed"]
    status = world.status
    assert (status["executor"], status["job"]) == ("pool", "texts-1a667239-0-5f-1")
    assert status["queuedAt"] == status["startedAt"] == status["finishedAt"] == "2026-11-24T12:00:00Z"
    assert status["attempts"] == [
        {
            "number": 1,
            "job": "texts-1a667239-0-5f-1",
            "startedAt": "2026-11-24T12:00:00Z",
            "finishedAt": "2026-11-24T12:00:00Z",
            "reason": "Succeeded",
        }
    ]
    assert pools.said["texts"] == []


async def test_the_third_attempt_after_two_lost_workers_has_a_job_of_its_own() -> None:
    world = World()
    world.add_task(spec={"executor": "pool"})
    pools = MemoryPools(world)
    operator = Operator(world, pools=pools)
    for _ in range(2):
        await operator.settle()
        assert pools.take() is not None
        pools.silence()
    await operator.settle()
    assert len(world.jobs) == 1
    assert [one["reason"] for one in world.status["attempts"]] == ["WorkerLost", "WorkerLost"]
    world.run_pod()
    world.end_pod(success())
    await operator.settle()
    assert (world.status["phase"], world.status["executor"], world.status["attempt"]) == ("Completed", "job", 3)


async def test_what_a_wiped_redis_had_is_offered_again_after_two_looks() -> None:
    world = World()
    world.add_task()
    pools = MemoryPools(world)
    operator = Operator(world, pools=pools)
    await operator.settle()
    pools.wipe()
    operator.look_at_pools()
    await operator.look()
    assert not pools.entries.get("texts")
    operator.look_at_pools()
    await operator.look()
    assert list(pools.entries["texts"]) == [UID]


async def test_a_result_that_is_stored_is_taken_when_its_report_is_lost_with_redis() -> None:
    world = World()
    world.add_task()
    pools = MemoryPools(world)
    operator = Operator(world, pools=pools)
    await operator.settle()
    run = pools.take()
    assert run is not None
    pools.up = False
    pools.end(run, success())
    pools.wipe()
    pools.up = True
    await operator.look(resync=True)
    await operator.look(resync=True)
    assert world.status["phase"] == "Completed"
    assert pools.offered == [("texts", 1)]


async def test_a_task_is_not_offered_twice_while_a_report_about_it_is_unread() -> None:
    world = World()
    world.add_task()
    pools = MemoryPools(world)
    operator = Operator(world, database=False, pools=pools)
    await operator.settle()
    controller = operator._controller
    assert controller is not None
    assert controller._pools is not None
    run = pools.take()
    assert run is not None
    pools.end(run, success())
    for _ in range(3):  # looks, but no reading
        controller.on_look(pools.pools()[0], pools.look("texts"))
        await operator.look()
    assert pools.offered == [("texts", 1)]
    operator.look_at_pools()
    await operator.look()
    assert world.status["phase"] == "Completed"


@pytest.mark.parametrize("fallback", [False, True], ids=["wait", "job"])
async def test_while_redis_is_down_tasks_wait_with_the_reason_or_become_jobs_after_a_minute(fallback: bool) -> None:
    world = World()
    world.add_task()
    pools = MemoryPools(world)
    operator = Operator(world, pools=pools, fallback=fallback)
    await operator.settle()
    pools.up = False
    await operator.settle()
    world.now += timedelta(seconds=10)
    await operator.settle()
    assert world.status["queue"]["reason"] == "QueueUnavailable"
    assert not world.jobs
    world.now += timedelta(seconds=55)
    await operator.settle()  # out of the pool, as far as that can be
    await operator.settle()
    assert len(world.jobs) == fallback
    pools.up = True
    await operator.settle()
    await operator.settle()
    assert bool(pools.entries.get("texts")) is not fallback, "it is in both, or in none"
    await operator.finish()
    assert (world.status["executor"], world.commits) == ("job" if fallback else "pool", 1)


async def test_what_a_worker_may_have_becomes_a_job_after_its_lease_and_is_taken_from_the_worker_first() -> None:
    world = World()
    world.add_task()
    pools = MemoryPools(world)
    operator = Operator(world, pools=pools, fallback=True)
    await operator.settle()
    run = pools.take()
    assert run is not None
    pools.tell(run)
    await operator.settle()
    pools.up = False
    await operator.settle()
    world.now += timedelta(seconds=89)
    await operator.settle()
    assert world.status["phase"] == "Processing"
    world.now += timedelta(seconds=2)
    await operator.settle()
    assert world.status["queue"]["reason"] == "QueueUnavailable"
    assert world.writes.index("release intents") < world.writes.index("patched status Queued")
    world.now += timedelta(seconds=10)
    await operator.settle()
    assert len(world.jobs) == 1
    pools.end(run, success())
    assert world.commits == 0, "a worker from which the attempt was taken has committed"
    await operator.finish()
    assert world.status["attempts"][-1]["number"] == 1, "it was counted"


async def test_who_asks_for_a_pool_that_there_is_not_waits_and_is_told_which() -> None:
    world = World()
    world.add_task(spec={"executor": "pool"})
    pools = MemoryPools(world, names=[])
    operator = Operator(world, pools=pools)
    await operator.settle()
    world.now += timedelta(seconds=6)
    await operator.settle()
    assert world.status["queue"]["reason"] == "NoPool"
    assert "document_processing" in world.status["queue"]["message"]
    pools.names.append("texts")
    await operator.finish()
    assert world.status["executor"] == "pool"


async def test_of_a_pool_that_is_deleted_while_redis_is_away_tasks_get_jobs_when_it_is_back() -> None:
    world = World()
    world.add_task()
    pools = MemoryPools(world)
    operator = Operator(world, pools=pools)
    await operator.settle()  # offered, and no worker takes it
    pools.up = False
    operator.look_at_pools()
    pools.names = []
    operator.look_at_pools()
    pools.up = True
    for _ in range(20):
        await operator.settle()
        world.run_pod() or world.end_pod(success())
        world.now += timedelta(seconds=15)
    assert world.status["phase"] == "Completed"
    assert world.status["executor"] == "job"


async def test_a_task_stays_where_it_was_offered_when_a_pool_comes_that_is_first_by_name() -> None:
    world = World()
    world.add_task()
    pools = MemoryPools(world)
    operator = Operator(world, pools=pools)
    await operator.settle()
    pools.names = ["a-better-one", "texts"]
    await operator.settle()
    assert pools.offered == [("texts", 1)]
    operator._controller = None
    await operator.look(resync=True)
    await operator.look(resync=True)
    assert pools.offered == [("texts", 1)]


async def test_a_priority_that_is_changed_moves_the_task() -> None:
    world = World()
    world.add_task()
    pools = MemoryPools(world)
    operator = Operator(world, pools=pools)
    await operator.settle()
    world.edit(priority="high")
    await operator.settle()
    assert pools.entries["texts"][UID].offer.priority == "high"


async def test_a_task_that_is_deleted_is_taken_out_of_its_pool_by_the_second_look() -> None:
    world = World()
    world.add_task()
    pools = MemoryPools(world)
    operator = Operator(world, pools=pools)
    await operator.settle()
    task = world.tasks.pop(("knowledge", "handbook"))
    world._touch("task", "DELETED", task)
    operator.deliver()
    operator.look_at_pools()
    await asyncio.sleep(0.01)
    assert pools.entries["texts"], "it may be a task of another operator"
    operator.look_at_pools()
    await asyncio.sleep(0.01)
    assert not pools.entries["texts"]


async def test_a_worker_that_fails_ends_the_attempt_as_a_pod_does() -> None:
    world = World()
    world.add_task()
    pools = MemoryPools(world)
    operator = Operator(world, pools=pools)
    await operator.settle()
    run = pools.take()
    assert run is not None
    pools.end(run, failure())
    await operator.settle()
    assert (world.status["phase"], world.status["error"]["reason"]) == ("Retrying", "StoresDisagree")
    assert not pools.entries["texts"], "offered before its time has come"
    world.now += timedelta(seconds=11)
    await operator.settle()
    assert pools.entries["texts"][UID].offer.attempt == 2
