"""Schedules: which tasks are made, when, what becomes of times that were missed, and that nothing is made twice."""

from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from task_contract.names import SCHEDULED_AT_ANNOTATION
from task_operator.cron import Cron
from task_platform.kubernetes import Forbidden, Invalid, NotFound
from tests.support.schedule_world import World, schedule, world


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


# ------------------------------------------------------------------------------------------------------------ its course


def test_a_task_is_made_at_each_time_and_the_status_says_so() -> None:
    place = world()
    place.look()
    assert place.made() == []
    assert place.status["nextScheduleTime"] == "2026-11-28T03:05:00Z"
    place.step(minutes=5)
    place.step(minutes=5)
    assert place.made() == ["03:05", "03:10"]
    place.end(place.created[0])
    place.step(seconds=10)
    assert place.status["lastScheduleTime"] == "2026-11-28T03:10:00Z"
    assert place.status["lastSuccessfulTime"] == "2026-11-28T03:10:00Z"
    assert place.status["nextScheduleTime"] == "2026-11-28T03:15:00Z"
    assert (place.status["active"], place.status["activeCount"]) == ([place.created[1]], 1)
    assert place.status["missed"] == 0
    assert place.condition() == ("True", "Scheduled", "tasks are made at the times of the schedule")


def test_a_task_is_of_its_schedule() -> None:
    labels = {"team": "search", "tasks.zzdsj.io/schedule": "mine"}
    place = world(taskTemplate={"metadata": {"labels": labels}, "spec": {"type": "health_check", "colour": "red"}})
    place.step(minutes=5)
    (task,) = place.tasks.values()
    assert task["metadata"]["name"] == "nightly-1a667239-202611280305"
    assert task["metadata"]["labels"] == {
        "team": "search",
        "tasks.zzdsj.io/schedule": "nightly",
        "app.kubernetes.io/managed-by": "processing-tasks",
    }
    assert task["metadata"]["annotations"] == {SCHEDULED_AT_ANNOTATION: "2026-11-28T03:05:00Z"}
    (owner,) = task["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == (
        "ProcessingSchedule",
        place.manifest["metadata"]["uid"],
        True,
    )
    assert task["spec"] == {"type": "health_check", "colour": "red"}  # also what this release does not know


def test_looking_again_writes_nothing() -> None:
    place = world()
    place.step(minutes=5)
    before = list(place.writes)
    place.look(10)
    place.start()
    place.look(10)
    assert place.writes == before


def test_the_next_time_is_in_the_zone() -> None:
    place = world(schedule="30 2 * * *", timeZone="Asia/Shanghai")
    place.look()
    assert place.status["nextScheduleTime"] == "2026-11-28T18:30:00Z"


# ---------------------------------------------------------------------------------------------------------------- missed


def test_of_times_that_passed_without_an_operator_the_last_is_caught_up() -> None:
    place = world()
    place.look()
    place.start()
    place.step(minutes=17)
    assert place.made() == ["03:15"]
    assert place.status["missed"] == 2
    assert place.status["nextScheduleTime"] == "2026-11-28T03:20:00Z"


def test_a_schedule_that_nobody_saw_made_is_caught_up_from_its_creation() -> None:
    place = world()
    place.step(minutes=11)
    assert (place.made(), place.status["missed"]) == (["03:10"], 1)


@pytest.mark.parametrize(("late", "made"), [(30, ["03:05"]), (31, [])])
def test_what_is_later_than_the_deadline_is_missed(late: int, made: list[str]) -> None:
    place = world(startingDeadlineSeconds=30)
    place.look()
    place.step(minutes=5, seconds=late)
    assert place.made() == made
    assert place.status["missed"] == 1 - len(made)


def test_a_year_of_minutes_is_no_work() -> None:
    place = world(schedule="* * * * *")
    place.look()
    place.step(days=365)
    assert place.made() == ["03:00"]
    assert place.status["missed"] == 1000
    assert place.status["nextScheduleTime"] == "2027-11-28T03:01:00Z"


def test_what_passes_while_suspended_is_missed_and_stays_so() -> None:
    place = world(suspend=True)
    place.look()
    place.step(minutes=11)
    assert place.condition() == ("True", "Suspended", "no tasks are made while spec.suspend is true")
    assert (place.made(), place.status["missed"]) == ([], 2)
    place.edit(suspend=False)
    place.step(minutes=1)
    assert place.made() == []
    place.step(minutes=3)
    assert place.made() == ["03:15"]


# ------------------------------------------------------------------------------------------------------------- a change


def test_another_schedule_begins_with_now() -> None:
    place = world(schedule="0 * * * *")
    place.look()
    place.step(minutes=30)
    place.edit(schedule="*/7 * * * *")
    place.step(seconds=1)
    assert (place.made(), place.status["missed"]) == ([], 0)
    assert place.status["nextScheduleTime"] == "2026-11-28T03:35:00Z"


def test_a_time_that_the_schedule_does_not_have_any_more_is_not_caught_up() -> None:
    place = world(schedule="0 * * * *")
    place.look()
    place.now += timedelta(minutes=70)
    place.edit(schedule="30 * * * *")
    place.look()
    assert place.made() == []
    assert place.status["nextScheduleTime"] == "2026-11-28T04:30:00Z"


def test_a_denser_schedule_holds_at_once() -> None:
    place = world()
    place.step(minutes=1)
    place.edit(schedule="* * * * *")
    place.step(seconds=1)
    assert place.status["nextScheduleTime"] == "2026-11-28T03:02:00Z"


def test_another_limit_loses_no_time_that_is_due() -> None:
    place = world()
    place.look()
    place.edit(failedHistoryLimit=1)
    place.step(minutes=5)
    assert place.made() == ["03:05"]


@pytest.mark.parametrize(
    ("spec", "reason", "said"),
    [
        ({"schedule": "61 * * * *"}, "InvalidSchedule", "Bad minute"),
        ({"timeZone": "Mars/Base"}, "UnknownTimeZone", "spec.timeZone: there is no time zone 'Mars/Base'"),
    ],
)
def test_a_schedule_without_times_is_stalled_until_it_is_changed(spec: dict[str, Any], reason: str, said: str) -> None:
    place = world(**spec)
    place.step(minutes=10)
    for kind, expected in (("Ready", "False"), ("Stalled", "True")):
        found = place.condition(kind)
        assert found is not None
        assert found[:2] == (expected, reason)
        assert said in found[2]
    assert "nextScheduleTime" not in place.status
    place.edit(schedule="*/5 * * * *", timeZone="UTC")
    place.step(seconds=1)
    assert place.condition("Stalled") is None
    assert (place.made(), place.status["missed"]) == ([], 0)
    place.step(minutes=5)
    assert place.made() == ["03:15"]


# --------------------------------------------------------------------------------------------------------------- policies


def test_allowed_tasks_run_side_by_side() -> None:
    place = world()
    for _ in range(3):
        place.step(minutes=5)
    assert len(place.active()) == 3


def test_a_forbidden_time_waits_for_the_end_of_the_task_before_it() -> None:
    place = world(concurrencyPolicy="Forbid")
    place.step(minutes=5)
    place.step(minutes=5)
    assert place.made() == ["03:05"]
    assert place.condition() == (
        "True",
        "Waiting",
        "the task of 2026-11-28T03:10:00Z is made when nightly-1a667239-202611280305 has finished",
    )
    assert place.status["nextScheduleTime"] == "2026-11-28T03:10:00Z"
    place.step(minutes=5)
    assert place.status["missed"] == 1
    place.end_all("Failed")
    place.step(minutes=1)
    assert place.made() == ["03:05", "03:15"]
    assert (place.status["missed"], place.most_active) == (1, 1)


def test_a_forbidden_time_does_not_wait_longer_than_the_deadline() -> None:
    place = world(concurrencyPolicy="Forbid", startingDeadlineSeconds=60)
    place.step(minutes=5)
    place.step(minutes=6, seconds=1)
    place.end_all()
    place.step(seconds=1)
    assert place.made() == ["03:05"]
    assert place.status["missed"] == 1


def test_a_task_is_replaced_by_the_next() -> None:
    place = world(concurrencyPolicy="Replace")
    place.step(minutes=5)
    place.step(minutes=5)
    first, second = place.created
    assert place.tasks[first]["spec"]["cancel"] is True
    assert "cancel" not in place.tasks[second]["spec"]
    place.step(minutes=1)
    assert place.writes.count(f"cancel {first}") == 1


# ---------------------------------------------------------------------------------------------------------------- history


def test_of_finished_tasks_so_many_stay_as_are_to() -> None:
    place = world(successfulHistoryLimit=2, failedHistoryLimit=1)
    for phase in ("Completed", "Failed", "Completed", "Canceled", "Completed", "Completed"):
        place.step(minutes=5)
        place.end_all(phase)
    place.step(seconds=10)
    assert sorted(place.tasks) == [place.created[number] for number in (3, 4, 5)]


def test_what_postgresql_does_not_hold_stays_until_it_does() -> None:
    place = world(successfulHistoryLimit=0)
    place.archived = False
    place.step(minutes=5)
    place.end_all()
    place.step(seconds=10)
    assert len(place.tasks) == 1
    place.archived = True
    place.step(seconds=10)
    assert place.tasks == {}
    place.step(minutes=1)
    assert place.made() == ["03:05"]


# ---------------------------------------------------------------------------------------------------------------- refused


def test_a_task_that_a_quota_refuses_is_tried_again() -> None:
    place = world()
    place.look()
    place.refuse = Forbidden("exceeded quota: tasks", status=403)
    place.step(minutes=5)
    assert place.condition() == (
        "False",
        "TaskRefused",
        "the task of the last time could not be made: exceeded quota: tasks",
    )
    assert place.condition("Stalled") is None
    tries = len(place.writes)
    place.step(seconds=1)
    assert len(place.writes) == tries  # not each second
    place.refuse = None
    place.step(seconds=11)
    assert place.made() == ["03:05"]
    assert place.condition() == ("True", "Scheduled", "tasks are made at the times of the schedule")


def test_a_task_that_cannot_be_stalls_the_schedule_until_it_is_changed() -> None:
    place = world(concurrencyPolicy="Replace")
    place.step(minutes=5)
    place.refuse = Invalid("spec.kbId: required", status=422)
    place.step(minutes=5)
    assert place.condition("Stalled") == (
        "True",
        "TaskRefused",
        "the task of the last time could not be made: spec.kbId: required",
    )
    assert place.active() == place.created  # the one that could not be replaced goes on
    place.refuse = None
    place.edit(taskTemplate={"spec": {"type": "health_check"}})
    place.look()
    assert place.made() == ["03:05", "03:10"]


def test_a_foreign_task_of_the_name_is_not_taken_for_ours() -> None:
    place = world()
    place.look()
    name = "nightly-1a667239-202611280305"
    place.tasks[name] = {"metadata": {"name": name, "labels": {}, "uid": "x", "resourceVersion": "1"}, "status": {}}
    place.step(minutes=5)
    found = place.condition()
    assert found is not None
    assert found[1] == "TaskRefused"
    assert f"there is a task {name} that is not of this schedule; delete it" in found[2]


# ----------------------------------------------------------------------------------------------------- what is not there


def test_a_cluster_without_the_kind_has_none_until_it_has() -> None:
    place = world()
    there = place.list_schedules

    def missing(namespace: str | None) -> Any:
        raise NotFound("no such kind", status=404)

    place.list_schedules = missing  # type: ignore[method-assign]
    place.step(minutes=5)
    assert place.writes == []
    place.list_schedules = there  # type: ignore[method-assign]
    place.step(seconds=30)
    assert place.made() == ["03:05"]


def test_events_do_as_lists_do() -> None:
    place = world(concurrencyPolicy="Forbid")
    place.step(minutes=5)
    (name,) = place.created
    task = place.tasks[name]
    controller = place.controller
    assert controller._of
    controller.on_task("DELETED", task | {"metadata": task["metadata"] | {"uid": "of another"}})
    assert controller._of
    bare = task["metadata"] | {"labels": {}}
    controller.on_task("MODIFIED", task | {"metadata": bare})
    assert not controller._of
    controller.on_task("MODIFIED", task)
    controller.on_task("DELETED", task)
    assert (controller._of, controller._runs) == ({}, {})
    controller.on_schedule("DELETED", place.manifest)
    assert not controller._known


# ----------------------------------------------------------------------------------------------------------------- clocks


def test_a_clock_that_was_a_year_ahead_stops_nothing() -> None:
    place = world()
    place.now += timedelta(days=365)
    place.look()
    place.now -= timedelta(days=365)
    place.step(minutes=5)
    place.step(minutes=5)
    assert place.made()[-1] == "03:10"


def test_a_clock_that_is_set_back_a_little_makes_nothing_twice() -> None:
    place = world(successfulHistoryLimit=0)
    place.step(minutes=5)
    place.end_all()
    place.step(seconds=1)
    assert place.tasks == {}
    place.start()
    place.step(minutes=-3)
    place.step(minutes=3)
    assert place.made() == ["03:05"]
    place.step(minutes=5)
    assert place.made() == ["03:05", "03:10"]


# ----------------------------------------------------------------------------------------------------------------- crashes

POLICIES = ("Allow", "Forbid", "Replace")
SCHEDULES = [
    ("* * * * *", "UTC"),
    ("*/5 * * * *", "Asia/Shanghai"),
    ("30 1,2 * * *", "Europe/Berlin"),
    ("15 * * * *", "Europe/Berlin"),
    ("0 0 * * *", "Africa/Cairo"),
]
BEGINS = ["2026-11-28T03:00Z", "2026-03-28T23:30Z", "2026-10-24T23:30Z", "2026-04-23T20:00Z"]
STEP = st.one_of(
    st.tuples(st.just("pass"), st.integers(60, 600)),
    st.tuples(st.just("pass"), st.integers(3600, 90_000)),
    st.tuples(st.just("end"), st.sampled_from(["Completed", "Failed", "Canceled"])),
    st.tuples(st.just("restart"), st.just(0)),
    st.tuples(st.just("suspend"), st.booleans()),
)


@settings(max_examples=50)
@given(
    policy=st.sampled_from(POLICIES),
    when=st.sampled_from(SCHEDULES),
    begin=st.sampled_from(BEGINS),
    limit=st.integers(0, 2),
    deadline=st.none() | st.integers(10, 4000),
    steps=st.lists(st.tuples(STEP, st.sampled_from([0, 1, 1, 8])), min_size=3, max_size=12),
    deaths=st.lists(st.sampled_from(["", "", "before", "after"]), max_size=30),
)
def test_every_time_has_one_task_or_is_missed_wherever_operators_die(
    policy: str,
    when: tuple[str, str],
    begin: str,
    limit: int,
    deadline: int | None,
    steps: list[tuple[tuple[str, Any], int]],
    deaths: list[str],
) -> None:
    spec: dict[str, Any] = {"schedule": when[0], "timeZone": when[1], "concurrencyPolicy": policy}
    spec |= {"successfulHistoryLimit": limit, "failedHistoryLimit": limit}
    spec |= {} if deadline is None else {"startingDeadlineSeconds": deadline}
    place = world(begin, **spec)
    place.dies = lambda write: deaths[write] if write < len(deaths) else ""
    place.look(8)
    for (what, value), looks in steps:
        match what:
            case "pass":
                place.now += timedelta(seconds=value)
                place.monotonic += value
            case "end":
                place.end_all(value)
            case "restart":
                place.start()
            case "suspend":
                place.edit(suspend=value)
        place.look(looks)  # who dies in the only one stays dead until after the next step
    place.dies = lambda _: ""
    place.look(4)
    _holds(place, at(begin), policy=policy, limit=limit)


def _holds(place: World, begin: datetime, *, policy: str, limit: int) -> None:
    spec = place.manifest["spec"]
    until = at(place.status["nextScheduleTime"])
    times = list(takewhile(lambda one: one < until, Cron(spec["schedule"], spec["timeZone"]).times(begin)))
    made = [datetime.strptime(name[-12:], "%Y%m%d%H%M").replace(tzinfo=UTC) for name in place.created]
    assert made == sorted(set(made))
    assert set(made) <= set(times)
    missed = place.status["missed"]
    assert len(made) + missed == len(times) or (missed >= 999 and len(made) + missed < len(times))
    if policy == "Forbid":
        assert place.most_active <= 1
    if policy == "Replace":
        assert [name for name in place.active() if not place.tasks[name]["spec"].get("cancel")] == place.active()[-1:]
    for phases in ({"Completed"}, {"Failed", "Canceled"}):
        assert sum(task["status"]["phase"] in phases for task in place.tasks.values()) <= limit
    assert place.status["active"] == sorted(place.active(), reverse=True)[:32]
    assert (until > place.now) or place.condition()[1] == "Waiting"  # type: ignore[index]


@pytest.mark.parametrize("meanwhile", [{"suspend": True}, {}])
def test_a_time_whose_task_was_made_is_not_missed_however_late_that_is_seen(meanwhile: dict[str, bool]) -> None:
    place = world(startingDeadlineSeconds=60)
    place.look()
    place.dies = lambda write: "after" if write == 1 else ""
    place.now += timedelta(minutes=5)
    place.look(1)
    assert place.made() == ["03:05"]
    assert "lastScheduleTime" not in place.status
    place.edit(**meanwhile)
    place.step(minutes=4)
    assert place.status["lastScheduleTime"] == "2026-11-28T03:05:00Z"
    assert place.status["missed"] == 0


@pytest.mark.parametrize("deadline", [None, 60])
def test_a_time_whose_task_was_made_is_not_missed_when_a_later_one_has_come(deadline: int | None) -> None:
    spec: dict[str, Any] = {} if deadline is None else {"startingDeadlineSeconds": deadline}
    place = world(**spec)
    place.look()
    place.dies = lambda write: "after" if write == 1 else ""
    place.now += timedelta(minutes=5)
    place.look(1)
    place.step(minutes=7)  # 03:12
    late = deadline is not None
    assert place.made() == (["03:05"] if late else ["03:05", "03:10"])
    assert place.status["lastScheduleTime"] == f"2026-11-28T03:{'05' if late else '10'}:00Z"
    assert place.status["missed"] == int(late)


def test_who_dies_before_the_one_before_is_canceled_leaves_that_to_the_next() -> None:
    place = world(concurrencyPolicy="Replace")
    place.step(minutes=5)
    place.dies = lambda write: "after" if write == 2 else ""  # create, status, create
    place.step(minutes=5)
    assert place.made() == ["03:05", "03:10"]
    first, second = (place.tasks[name]["spec"] for name in place.created)
    assert (first.get("cancel"), second.get("cancel")) == (True, None)


def test_a_task_whose_time_the_status_does_not_have_yet_stays() -> None:
    place = world(successfulHistoryLimit=0)
    place.look()
    place.disturbed = True
    place.step(minutes=5)
    place.end_all()
    place.step(seconds=10)
    place.start()
    place.step(seconds=10)
    assert place.made() == ["03:05"]
    assert len(place.tasks) == 1
    place.disturbed = False
    place.step(seconds=10)
    assert (place.tasks, place.made()) == ({}, ["03:05"])


def test_a_leader_that_is_late_makes_no_second_task() -> None:
    place = world()
    place.look()
    late = place.controller
    place.step(minutes=5)
    place.start()
    place.look()
    place.controller = late
    place.look()
    assert place.made() == ["03:05"]


def test_the_world_tells_when_a_task_is_made_twice() -> None:
    place = world()
    place.step(minutes=5)
    place.tasks.clear()
    place.manifest = schedule(created=at("2026-11-28T03:00Z"))
    place.manifest["metadata"]["resourceVersion"] = "100"
    place.start()
    place.look()
    assert place.made() == ["03:05", "03:05"]
