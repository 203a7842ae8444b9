"""Worker pools: which pool a task fits, how many workers there are, and what becomes of each, decided without servers."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from task_contract.pools import PoolSpec
from task_operator.pools import Backlog, Load, Memory, choose, desired_workers, fits, misfit, needed, plan
from task_operator.resources import classes
from tests.support.operator_values import task
from tests.support.pool_values import PoolWorld, pool

MEDIUM = {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}}
CLASSES = classes(MEDIUM, configured={"gpu": {"limits": {"nvidia.com/gpu": "1", "memory": "512Mi"}}})
EMBED = {"type": "embedding_generation", "payload": {"texts": ["a"]}}


# ------------------------------------------------------------------------------------------------------- which pool


@pytest.mark.parametrize(
    ("spec", "given_spec", "because"),
    [
        ({}, EMBED, None),
        ({}, {"type": "health_check", "kbId": None, "payload": {}}, None),
        ({}, {"payload": {"filePath": "/data/a.md"}}, "does not serve document_processing"),
        ({"types": ["document_processing"]}, {"payload": {"filePath": "/data/a.png"}}, "the task asks for 1024Mi of memory"),
        (
            {"types": ["document_processing"], "resources": {"limits": {"memory": "1Gi"}}},
            {"payload": {"filePath": "/data/a.png"}},
            None,
        ),
        ({"resources": {"requests": {"memory": "256Mi"}}}, EMBED, "asks for 512Mi of memory, a worker has 256Mi"),
        ({"resources": {"requests": {"cpu": "1m"}}}, EMBED, None),
        ({}, EMBED | {"resourceClass": "gpu"}, "asks for 1 of nvidia.com/gpu, a worker has none"),
        ({}, EMBED | {"resourceClass": "huge"}, "there is no resourceClass huge"),
    ],
)
def test_a_task_fits_a_pool_that_serves_its_type_with_workers_as_large(
    spec: dict[str, Any], given_spec: dict[str, Any], because: str | None
) -> None:
    found = misfit(task(spec=given_spec), pool(spec=spec), CLASSES)
    assert found is None if because is None else because in (found or "")


def test_a_task_that_ran_out_of_memory_fits_no_pool() -> None:
    killed = {"number": 1, "job": "a", "startedAt": "2026-11-24T12:00:00Z", "reason": "OOMKilled"}
    status = {"phase": "Retrying", "attempt": 1, "attempts": [killed], "conditions": []}
    assert "has run out of memory" in (misfit(task(spec=EMBED, status=status), pool(), CLASSES) or "")


def test_a_pool_of_another_namespace_or_on_its_way_out_takes_nothing() -> None:
    assert not fits(task(spec=EMBED), pool(namespace="other"), CLASSES)
    assert not fits(task(spec=EMBED), pool(deletionTimestamp="2026-11-24T12:00:00Z"), CLASSES)


def test_of_several_pools_the_first_by_name_takes_it_in_whatever_order_they_come() -> None:
    pools = [pool(name=name) for name in ("c", "a", "b")] + [pool(name="0", spec={"types": ["health_check"]})]
    chosen = [choose(task(spec=EMBED), order, CLASSES) for order in (pools, pools[::-1])]
    assert [None if one is None else one.name for one in chosen] == ["a", "a"]
    assert choose(task(spec=EMBED | {"executor": "job"}), pools, CLASSES) is None


# -------------------------------------------------------------------------------------------------------- how many


def spec(**fields: Any) -> PoolSpec:
    return pool(spec=fields).spec


@pytest.mark.parametrize(
    ("load", "workers"),
    [
        (Load(), 0),
        (Load(waiting=1), 1),
        (Load(waiting=10), 1),
        (Load(waiting=11), 2),
        (Load(waiting=11, oldest_seconds=30), 3),
        (Load(waiting=2, oldest_seconds=3600), 2),
        (Load(leased=4), 1),
        (Load(leased=5), 2),
        (Load(waiting=1, leased=12), 3),
    ],
)
def test_workers_follow_from_what_waits_how_long_and_what_runs(load: Load, workers: int) -> None:
    assert needed(spec(targetBacklog=10, concurrency=4), load) == workers


def test_from_zero_it_is_one_step_and_back_again_it_takes_its_time() -> None:
    of = spec(max=8, scaleDownAfter="60s", idleTimeout="5m")
    memory = Memory()
    history: list[tuple[int, int]] = []
    for second in range(600):
        waiting = 75 if second < 10 else 0
        workers, memory = desired_workers(
            of, Load(waiting), workers=history[-1][1] if history else 0, memory=memory, second=second
        )
        history.append((second, workers))
    changes = [(at, number) for (at, number), (_, before) in zip(history[1:], history, strict=False) if number != before]
    assert history[0] == (0, 8)
    assert changes == [(69, 1), (310, 0)]


@pytest.mark.parametrize(("replicas", "workers"), [(0, 2), (3, 3), (9, 5)])
def test_whoever_writes_replicas_decides_within_the_bounds(replicas: int, workers: int) -> None:
    found, _ = desired_workers(
        spec(min=2, max=5, replicas=replicas), Load(waiting=1000), workers=1, memory=Memory(), second=0
    )
    assert found == workers


def test_an_operator_that_has_just_started_takes_no_worker_away_before_its_time() -> None:
    of = spec(scaleDownAfter="60s")
    one, memory = desired_workers(of, Load(waiting=1), workers=4, memory=Memory(), second=1000)
    later, memory = desired_workers(of, Load(waiting=1), workers=4, memory=memory, second=1059)
    last, _ = desired_workers(of, Load(waiting=1), workers=4, memory=memory, second=1060)
    assert (one, later, last) == (4, 4, 1)


# ------------------------------------------------------------------------------------------------ what becomes of them


def world(**fields: Any) -> PoolWorld:
    return PoolWorld(pool(spec={"scaleDownAfter": "10s", "idleTimeout": "20s"} | fields))


def conditions(world: PoolWorld) -> dict[str, tuple[str, str]]:
    return {one.type: (one.status, one.reason) for one in world.status.conditions}


def test_a_pool_without_tasks_is_ready_with_no_worker() -> None:
    idle = world()
    idle.step(5)
    assert idle.created == []
    assert conditions(idle) == {"Ready": ("True", "ScaledToZero")}


def test_the_first_tasks_start_all_workers_that_they_are_worth() -> None:
    at_once = world(max=4)
    at_once.backlog = Backlog(waiting=35, oldest_seconds=0)
    at_once.step()
    assert len(at_once.created) == 4
    assert conditions(at_once) == {"Ready": ("False", "WorkersStart"), "Reconciling": ("True", "WorkersStart")}
    at_once.step(3)
    assert (at_once.status.ready, at_once.status.idle, at_once.status.desired) == (4, 4, 4)
    assert conditions(at_once) == {"Ready": ("True", "Serving")}


def test_a_busy_worker_is_not_ended_however_long_nothing_waits() -> None:
    busy = world(max=3)
    busy.backlog = Backlog(30)
    busy.step(5)
    kept = busy.live[1].name
    busy.workers[kept].leased = 1
    busy.backlog = Backlog()
    busy.step(100)
    assert [job.name for job in busy.live] == [kept]
    assert busy.status.busy == 1
    busy.workers[kept].leased = 0
    busy.step(30)
    assert busy.jobs == {}


def test_the_newest_of_the_idle_goes_first() -> None:
    aged = world(min=1, max=3)
    aged.step(5)
    (old,) = aged.live
    aged.backlog = Backlog(30)
    aged.step(5)
    aged.backlog = Backlog()
    aged.step(60)
    assert [job.name for job in aged.live] == [old.name]


def test_work_that_comes_back_keeps_a_worker_that_was_told_to_drain() -> None:
    back = world(max=1)
    back.backlog = Backlog(1)
    back.step(4)
    (name,) = back.workers
    back.workers[name].leased = 1
    back.pool = replace(back.pool, spec=back.pool.spec.model_copy(update={"replicas": 0}))
    back.step(2)
    assert back.workers[name].draining
    back.pool = replace(back.pool, spec=back.pool.spec.model_copy(update={"replicas": None}))
    back.step(2)
    assert back.live[0].name == name
    assert not back.workers[name].draining
    assert len(back.created) == 1


def test_a_worker_that_is_being_stopped_is_replaced_at_once_within_max() -> None:
    stopped = world(min=1, max=2)
    stopped.step(4)
    (name,) = stopped.workers
    stopped.workers[name].leased = 1
    seen = stopped.seen()
    assert seen.look is not None
    stopped.workers[name].draining = True  # its pod was deleted: it finishes what it has
    stopped.second += 1
    decided = plan(stopped.seen(), stopped.memory)
    assert [new.slot for new in decided.create] == [1]
    assert decided.delete == ()


def test_a_failed_worker_is_followed_by_another_in_its_slot() -> None:
    failed = world(min=1)
    failed.step(40)
    (first,) = failed.live
    failed.end(first.name, failed=True, message="ended with exit code 1")
    failed.step(6)
    assert [(job.slot, job.number) for job in failed.live] == [(0, 2)]
    assert first.name not in failed.jobs


def test_workers_that_fail_in_a_row_are_few_and_the_condition_says_why() -> None:
    broken = world(min=3, max=3)
    broken.boots = False
    broken.step(1800)
    assert len(broken.created) < 3 + 14
    assert conditions(broken) == {"Ready": ("False", "WorkersFail"), "Stalled": ("True", "WorkersFail")}
    message = broken.status.conditions[0].message
    assert "no model" in message
    assert "times in a row" in message
    broken.boots = True
    broken.step(320)
    assert broken.status.ready == 3
    assert conditions(broken) == {"Ready": ("True", "Serving")}


def test_an_image_that_ends_at_once_by_itself_is_a_failure_too() -> None:
    wrong = world(min=1)
    for _ in range(600):
        for job in wrong.live:
            if (wrong.now - job.created_at).total_seconds() >= 1:
                wrong.end(job.name, failed=False)
        wrong.step()
    assert len(wrong.created) < 10


def test_while_redis_is_down_nothing_that_runs_is_touched() -> None:
    down = world(max=4)
    down.backlog = Backlog(40)
    down.step(5)
    down.redis, down.backlog = False, Backlog()
    names = [job.name for job in down.live]
    decided = down.step(200)
    assert [job.name for job in down.live] == names
    assert decided.drain is None
    assert conditions(down) == {"Ready": ("False", "RedisUnavailable")}
    assert down.status.ready == 4
    down.redis = True
    down.step(9)
    assert [job.name for job in down.live] == names
    down.step(60)
    assert down.live == []


def test_a_worker_that_hangs_is_replaced_but_not_for_an_outage_of_redis() -> None:
    hung = world(min=2, max=2)
    hung.step(5)
    hung.redis = False
    hung.step(500)
    hung.redis = True
    assert hung.step().delete == ()
    frozen, other = (job.name for job in hung.live)
    hung.workers[frozen].frozen = True
    hung.step(85)
    assert frozen in hung.jobs
    hung.step(20)
    assert frozen not in hung.jobs
    assert other in hung.jobs
    assert hung.status.ready == 2


def test_a_roll_replaces_one_after_the_other_and_never_serves_with_fewer() -> None:
    rolled = world(min=3, max=3)
    rolled.step(5)
    busy = rolled.live[0].name
    rolled.workers[busy].leased = 1
    rolled.revision = "b"
    most, fewest = 0, 3
    for _ in range(60):
        rolled.step()
        most, fewest = max(most, len(rolled.live)), min(fewest, len(rolled.ready))
    assert (most, fewest) == (4, 2) or (most, fewest) == (4, 3)
    assert busy in rolled.jobs
    assert conditions(rolled)["Reconciling"] == ("True", "RollingUpdate")
    rolled.workers[busy].leased = 0
    rolled.step(30)
    assert {job.revision for job in rolled.live} == {"b"}
    assert len(rolled.live) == 3
    assert conditions(rolled) == {"Ready": ("True", "Serving")}


def test_a_roll_to_an_image_that_fails_stops_with_all_old_workers_in_place() -> None:
    bad = world(min=3, max=3)
    bad.step(5)
    bad.revision, bad.boots = "b", False
    bad.step(900)
    assert sorted(job.revision for job in bad.ready) == ["a", "a", "a"]
    assert conditions(bad) == {"Ready": ("True", "Serving"), "Stalled": ("True", "WorkersFail")}


def test_workers_that_never_ran_are_replaced_without_waiting_for_them() -> None:
    pending = world(min=2, max=2)
    pending.schedules = False
    pending.step(20)
    assert conditions(pending)["Ready"] == ("False", "WorkersStart")
    pending.revision = "b"
    pending.step(1)
    assert {job.revision for job in pending.live} == {"b"}


CHANGES = st.sampled_from(
    ["more", "less", "none", "max", "min", "replicas", "free", "roll", "crash", "busy", "idle", "redis", "boots", "freeze"]
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(CHANGES, st.integers(0, 6), st.integers(1, 40)), max_size=12))
def test_whatever_happens_the_bounds_hold_no_busy_worker_is_ended_and_it_settles(
    events: list[tuple[str, int, int]],
) -> None:
    any_ = PoolWorld(pool(spec={"min": 1, "max": 4, "scaleDownAfter": "10s", "idleTimeout": "20s"}))

    def change(**fields: Any) -> None:
        any_.pool = replace(any_.pool, spec=any_.pool.spec.model_copy(update=fields))

    def step() -> None:
        before = {job.name for job in any_.live}
        busy = {name for name, one in any_.workers.items() if one.leased and not one.frozen}
        names = set(any_.jobs)
        any_.step()
        new = {job.name for job in any_.live} - before
        assert any_.plan is not None
        gone = {job.name for job in any_.plan.delete}
        assert not gone & busy & {job.name for job in any_.live}
        assert not gone - names
        assert not (busy & gone), "a busy worker was ended"
        if new:
            mixed = len({job.revision for job in any_.live}) > 1
            assert len(any_.live) <= any_.pool.spec.max + (1 if mixed else 0)

    for kind, number, seconds in events:
        workers = [any_.workers[job.name] for job in any_.live if job.name in any_.workers]
        match kind:
            case "more":
                any_.backlog = Backlog(number * 10, number * 10)
            case "less":
                any_.backlog = Backlog(1)
            case "none":
                any_.backlog = Backlog()
            case "max":
                change(max=max(1, number), min=min(any_.pool.spec.min, max(1, number)))
            case "min":
                change(min=min(number, any_.pool.spec.max))
            case "replicas":
                change(replicas=number)
            case "free":
                change(replicas=None)
            case "roll":
                any_.revision = chr(ord("a") + number)
            case "crash" if any_.live:
                any_.end(any_.live[number % len(any_.live)].name, failed=True)
            case "busy" if workers:
                workers[number % len(workers)].leased = 1
            case "idle":
                for one in any_.workers.values():
                    one.leased = 0
            case "redis":
                any_.redis = number > 1
            case "boots":
                any_.boots = number > 1
            case "freeze" if workers:
                workers[number % len(workers)].frozen = True
        for _ in range(seconds):
            step()
    any_.redis = any_.boots = True
    for one in any_.workers.values():
        one.leased = 0
    for _ in range(700):
        step()
    settled = [job.name for job in any_.live]
    for _ in range(100):
        step()
    assert [job.name for job in any_.live] == settled, "it flaps"
    assert len(settled) == any_.status.desired == any_.status.ready
    assert {job.revision for job in any_.live} <= {any_.revision}
    assert [job for job in any_.jobs.values() if job.finished] == []
    assert all(one.type == "Ready" and one.status == "True" for one in any_.status.conditions)
