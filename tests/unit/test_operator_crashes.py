"""Whatever happens in whatever order, with the process killed before or after any write: the task ends, once."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from task_contract.messages import ProgressEvent
from task_contract.models import Phase, Stage
from task_platform.kubernetes import Unavailable
from tests.support.operator_values import UID, failure, name_of, success
from tests.support.operator_world import KEY, OUTCOMES, Crash, Operator, World

STEPS = st.one_of(
    st.tuples(st.just("look"), st.integers(0, 7)),
    st.tuples(st.just("look without answer"), st.integers(0, 7)),
    st.tuples(st.just("look"), st.none()),
    st.tuples(st.just("end"), st.sampled_from(sorted(OUTCOMES))),
    st.tuples(st.just("end silently"), st.sampled_from(sorted(OUTCOMES))),
    st.tuples(st.sampled_from(["run", "lose events", "resync", "suspend", "resume", "restart", "restore"]), st.none()),
    st.tuples(st.sampled_from(["run", "commit", "delete Job", "cancel", "database down", "database up"]), st.none()),
    st.tuples(st.sampled_from(["lose node", "return node"]), st.none()),
    st.tuples(st.just("wait"), st.sampled_from([1, 4, 15, 90, 400])),
)

LOOK: tuple[str, Any] = ("look", None)
RUNS: list[tuple[str, Any]] = [LOOK, ("run", None), LOOK]
BEGINNINGS: list[list[tuple[str, Any]]] = [
    [],
    RUNS,
    [*RUNS, ("end", "failure"), LOOK],
    [*RUNS, ("end", "given back"), LOOK],
    [*RUNS, ("suspend", None), LOOK],
    [*RUNS, ("end", "failure"), LOOK, ("suspend", None), LOOK],
    [*RUNS, ("commit", None)],
    [*RUNS, ("commit", None), ("cancel", None)],
    [*RUNS, ("lose node", None), LOOK, ("wait", 90), LOOK],
    [*RUNS, ("commit", None), ("lose node", None), LOOK, ("wait", 90), LOOK],
]
"""Where histories become interesting; a random walk would seldom get there."""


async def play(world: World, operator: Operator, steps: list[tuple[str, Any]]) -> None:
    ended: dict[str, Any] | None = None
    for step, argument in steps:
        match step:
            case "look" | "look without answer":
                world.crash_in, world.fault = argument, Crash if step == "look" else Unavailable
                operator.deliver()
                await operator.settle(rounds=3)
                world.crash_in = None
            case "resync":
                await operator.look(resync=True)
            case "run":
                world.run_pod()
            case "restore":
                world.restore()
            case "commit":
                world.commit()
            case "end":
                world.end_pod(OUTCOMES[argument])
            case "end silently":
                world.end_pod(OUTCOMES[argument], message=False)
            case "lose events":
                operator.deliver(lose=True)
            case "delete Job":
                for name in list(world.jobs)[:1]:
                    world.remove_job(name)
            case "lose node":
                world.lose_node()
            case "return node":
                world.return_node()
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


@settings(max_examples=120)
@given(begin=st.sampled_from(BEGINNINGS), steps=st.lists(STEPS, max_size=15), database=st.booleans())
def test_every_history_converges(begin: list[tuple[str, Any]], steps: list[tuple[str, Any]], database: bool) -> None:
    world = World()
    world.add_task()
    operator = Operator(world, database=database)

    asyncio.run(play(world, operator, begin + steps))

    status = world.status
    phase = Phase(status["phase"])
    assert phase.finished
    numbers = [attempt["number"] for attempt in status.get("attempts", [])]
    assert numbers == list(range(1, len(numbers) + 1)), "an attempt is counted twice, or never"
    assert len(numbers) <= 4, "more attempts than the policy allows"
    assert status["attempt"] <= 4
    assert all(job["status"].get("conditions") for job in world.jobs.values()), "a Job runs for a finished task"
    assert len(world.jobs) <= 1
    if database and phase is Phase.CANCELED and UID in world.published:
        # Only when PostgreSQL was down for the whole of it may a cancel not know of the commit.
        assert any(step == "database down" for step, _ in steps)
    if phase is Phase.COMPLETED:
        assert UID in world.published
    if database:
        assert world.commits <= 1


async def _success_path(world: World, operator: Operator) -> None:
    await operator.settle()
    world.run_pod()
    await operator.settle()
    world.end_pod(success())
    await operator.settle()


async def _retry_path(world: World, operator: Operator) -> None:
    await operator.settle()
    world.run_pod()
    await operator.settle()
    world.end_pod(failure())
    await operator.settle()
    world.now += timedelta(seconds=20)
    await operator.settle()
    world.run_pod()
    await operator.settle()
    world.end_pod(success())
    await operator.settle()


async def _give_back_path(world: World, operator: Operator) -> None:
    await operator.settle()
    world.run_pod()
    await operator.settle()
    world.end_pod(OUTCOMES["given back"])
    await operator.settle()
    world.now += timedelta(seconds=20)
    await operator.settle()
    world.run_pod()
    await operator.settle()
    world.end_pod(success())
    await operator.settle()


async def _lost_node_path(world: World, operator: Operator) -> None:
    await operator.settle()
    world.run_pod()
    await operator.settle()
    world.lose_node()
    for _ in range(3):
        world.now += timedelta(seconds=60)
        await operator.settle()
    world.run_pod()
    await operator.settle()
    world.return_node()
    world.end_pod(success())
    await operator.settle()


async def _cancel_path(world: World, operator: Operator) -> None:
    await operator.settle()
    world.run_pod()
    await operator.settle()
    world.edit(cancel=True)
    await operator.settle()


PATHS = {
    "success": _success_path,
    "retry": _retry_path,
    "give back": _give_back_path,
    "lost node": _lost_node_path,
    "cancel": _cancel_path,
}


def _end(world: World) -> dict[str, Any]:
    status = world.status
    return {
        "phase": status["phase"],
        "attempt": status["attempt"],
        "attempts": [(one["number"], one["reason"]) for one in status["attempts"]],
        "conditions": [(one["type"], one["status"], one["reason"]) for one in status["conditions"]],
        "jobs made": world.created,
        "jobs left": sorted(world.jobs),
        "commits": world.commits,
    }


@pytest.mark.parametrize("path", PATHS)
async def test_an_answer_that_is_lost_at_any_write_changes_nothing_in_the_end(path: str) -> None:
    undisturbed = World()
    undisturbed.add_task()
    await PATHS[path](undisturbed, Operator(undisturbed))

    for cut in range(len(undisturbed.writes)):
        world = World()
        world.add_task()
        world.crash_in, world.fault = cut, Unavailable
        operator = Operator(world)
        operator.deaf = True  # or the event would tell what the answer did not
        await PATHS[path](world, operator)
        operator.deaf = False
        await operator.finish()
        assert _end(world) == _end(undisturbed), f"cut at {undisturbed.writes[cut]}"


async def test_a_task_that_is_done_costs_three_writes() -> None:
    world = World()
    world.add_task()
    await _success_path(world, Operator(world))
    assert [write for write in world.writes if write.startswith(("created", "patched", "deleted"))] == [
        "created Job",
        "patched status Processing",
        "patched status Completed",
    ]
    assert world.phases == ["Queued", "Processing", "Completed"]


@pytest.mark.parametrize("outcome", ["success", "permanent"])
async def test_who_writes_labels_all_the_time_holds_no_task_up(outcome: str) -> None:
    world, operator = World(labelled=True), None
    world.add_task()
    operator = Operator(world)
    await operator.settle()
    world.run_pod()
    operator.deliver()
    await operator.settle()
    world.end_pod(OUTCOMES[outcome])
    operator.deliver()
    await operator.settle()
    assert world.phases == ["Queued", "Processing", "Completed" if outcome == "success" else "Failed"]


async def test_progress_costs_one_look_a_second_however_often_it_is_told() -> None:
    world = World()
    world.add_task()
    operator = Operator(world)
    await operator.settle()
    world.run_pod()
    await operator.settle()
    controller = operator._controller
    assert controller is not None
    while len(controller._queue):
        controller._queue.done(await controller._queue.get())
    looks = 0
    for quarter in range(12):
        world.now += timedelta(seconds=0.25)
        at = world.now
        event = ProgressEvent(
            uid=UID, namespace="knowledge", name="handbook", attempt=1, stage=Stage.EMBED, progress=quarter, at=at
        )
        controller.on_progress(event)
        if len(controller._queue):
            controller._queue.done(await controller._queue.get())
            await operator.look()
            looks += 1
    assert looks <= 6, "a look for each write, and one after it"
    assert (world.status["stage"], world.status["progress"]) == ("embed", 11)
    controller._queue.close()


async def test_the_lag_of_a_status_is_told_once_a_change_and_not_for_what_time_brings() -> None:
    world = World()
    world.add_task()
    operator = Operator(world)
    controller = await operator._start()
    metrics = controller._metrics

    async def work(until: str) -> None:
        worker = asyncio.create_task(controller._work())
        async with asyncio.timeout(10):
            while world.status.get("phase") != until:
                operator.deliver()
                await asyncio.sleep(0)
        worker.cancel()

    def lags() -> dict[str, float]:
        found = (one for family in metrics.registry.collect() for one in family.samples)
        return {one.labels["phase"]: one.value for one in found if one.name == "task_operator_status_lag_seconds_count"}

    operator.deliver()
    controller._queue.add(KEY)
    assert lags() == {}
    while not world.jobs:
        await operator.look()
    world.run_pod()
    await work("Processing")
    assert lags() == {"Processing": 1}
    world.end_pod(failure())
    await work("Retrying")
    assert lags() == {"Processing": 1, "Retrying": 1}
    world.now += timedelta(minutes=1)  # the time of the next attempt comes: no news
    controller._queue.add(KEY)
    await operator.look()
    assert lags() == {"Processing": 1, "Retrying": 1}


async def test_a_task_that_ends_before_anyone_looks_costs_two() -> None:
    world = World()
    world.add_task()
    operator = Operator(world)
    await operator.settle()
    world.run_pod()
    world.end_pod(success())
    await operator.settle()
    assert world.phases == ["Queued", "Completed"]


async def test_a_job_of_a_task_that_is_gone_is_deleted() -> None:
    world = World()
    world.add_task()
    operator = Operator(world)
    await operator.settle()
    del world.tasks[("knowledge", "handbook")]
    await operator.look(resync=True)
    assert world.jobs == {}


async def test_a_job_of_an_earlier_task_of_the_same_name_is_deleted_and_the_new_task_runs() -> None:
    world = World()
    world.add_task()
    operator = Operator(world)
    await operator.settle()
    old = name_of(1)
    world.add_task(uid="11111111-1111-4111-8111-111111111111")
    await operator.look(resync=True)
    await operator.settle()
    assert old not in world.jobs
    assert len(world.jobs) == 1


async def test_a_job_of_our_name_that_another_owner_has_ends_the_task_with_a_reason() -> None:
    world = World()
    world.add_task()
    operator = Operator(world)
    foreign = {"metadata": {"name": name_of(1), "namespace": "knowledge", "uid": "x", "resourceVersion": "1"}, "status": {}}
    world.jobs[name_of(1)] = foreign
    await operator.settle()
    assert world.status["phase"] == "Failed"
    assert world.status["error"]["reason"] == "JobConflict"
    assert world.jobs == {name_of(1): foreign}


async def test_a_task_that_cannot_be_parsed_fails_and_blocks_nobody() -> None:
    world = World()
    world.add_task(spec={"payload": {"chunkSize": "many"}})
    operator = Operator(world)
    await operator.settle()
    assert world.status["phase"] == "Failed"
    assert world.status["error"]["reason"] == "InvalidTask"
    assert "spec.payload.chunkSize" in world.status["error"]["message"]
    assert world.created == 0
