"""What a task went through is told whole and once, however few of its versions come through, in whatever order."""

import asyncio
import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from task_contract.models import Phase
from task_operator.projection import _attempts, _seen, _values
from task_operator.transitions import DELETED, ENDS, Seen, Transition, transitions, withdrawn
from tests.support.operator_values import (
    T0,
    at,
    condition,
    ended_attempt,
    finished,
    given_back,
    manifest,
    name_of,
    processing,
    retrying,
    stamp,
)
from tests.support.operator_world import Operator, World
from tests.unit.test_operator_crashes import BEGINNINGS, STEPS, play

Manifest = Mapping[str, Any]
Short = tuple[str, int, str, float | None]
"""Phase, attempt, reason, seconds after the creation of the task; None: no time is known."""


def seen(version: Manifest, *, deleted: float | None = None) -> Seen:
    """Return what the row of a task says of it."""
    return _seen(_values(version, deleted_at=None if deleted is None else at(deleted), now=at(0)))


def told(*statuses: Mapping[str, Any], deleted: float | None = None) -> list[Transition]:
    """Return all events of a task whose versions have these statuses; ``deleted``: with the last one it is gone."""
    found: list[Transition] = []
    for number, status in enumerate(statuses, 1):
        last = deleted if number == len(statuses) else None
        found += transitions(found[-1] if found else None, seen(manifest(status=dict(status)), deleted=last))
    return found


def short(story: Iterable[Transition]) -> list[Short]:
    return [(one.phase, one.attempt, one.reason, None if one.at is None else (one.at - T0).total_seconds()) for one in story]


def waits(reason: str = "Queued", *, since: float | None = None, **more: Any) -> dict[str, Any]:
    queue = {} if since is None else {"queue": {"reason": reason, "since": stamp(since)}}
    return {"phase": "Queued", "attempt": 0, "queuedAt": stamp(0), "conditions": [condition(reason)], **queue, **more}


def running(number: int, began: float) -> dict[str, Any]:
    return {"number": number, "job": name_of(number), "startedAt": stamp(began)}


def ended(number: int, began: float, end: float, reason: str = "ParserCrashed") -> dict[str, Any]:
    return running(number, began) | {"finishedAt": stamp(end), "reason": reason}


NEW = manifest()["status"]
QUEUED: Short = ("Queued", 1, "Queued", 0)
RUNS: Short = ("Processing", 1, "Processing", 5)
FAILED_ONCE = [QUEUED, RUNS, ("Retrying", 1, "StoresDisagree", 20)]
AGAIN = processing(2, attempts=[ended_attempt(1), running(2, 30)])

STORIES: list[tuple[str, list[dict[str, Any]], list[Short]]] = [
    ("a new task", [NEW], [QUEUED]),
    ("one that waits for something says for what", [waits("Unschedulable", since=4)], [("Queued", 1, "Unschedulable", 0)]),
    ("each version once", [NEW, processing(), finished()], [QUEUED, RUNS, ("Completed", 1, "Completed", 60)]),
    ("only its end is seen", [finished()], [QUEUED, RUNS, ("Completed", 1, "Completed", 60)]),
    ("progress is no event", [processing(stage=stage) for stage in ("fetch", "parse", "embed")], [QUEUED, RUNS]),
    (
        "an attempt whose start nobody knows has begun all the same",
        [NEW, finished(attempts=[{"number": 1, "job": name_of(1), "finishedAt": stamp(60), "reason": "Succeeded"}])],
        [QUEUED, ("Processing", 1, "Processing", 60), ("Completed", 1, "Completed", 60)],
    ),
    ("a failed attempt", [processing(), retrying()], FAILED_ONCE),
    ("a failed attempt, and the next one at once", [NEW, AGAIN], [*FAILED_ONCE, ("Processing", 2, "Processing", 30)]),
    (
        "all attempts fail unseen",
        [
            NEW,
            finished(
                "Failed",
                attempt=3,
                attempts=[ended(1, 5, 9), ended(2, 12, 18), ended(3, 30, 60, "OOMKilled")],
                conditions=[condition("OOMKilled")],
            ),
        ],
        [
            QUEUED,
            RUNS,
            ("Retrying", 1, "ParserCrashed", 9),
            ("Processing", 2, "Processing", 12),
            ("Retrying", 2, "ParserCrashed", 18),
            ("Processing", 3, "Processing", 30),
            ("Failed", 3, "OOMKilled", 60),
        ],
    ),
    (
        "it fails at its deadline while it waits for the next attempt",
        [processing(), finished("Failed", attempts=[ended(1, 5, 20)], conditions=[condition("DeadlineExceeded")])],
        [QUEUED, RUNS, ("Retrying", 1, "ParserCrashed", 20), ("Failed", 1, "DeadlineExceeded", 60)],
    ),
    (
        "canceled while it waits",
        [NEW, finished("Canceled", attempt=0, attempts=[], conditions=[condition("Canceled")])],
        [QUEUED, ("Canceled", 0, "Canceled", 60)],
    ),
    (
        "canceled while it runs, unseen",
        [NEW, finished("Canceled", attempts=[ended(1, 5, 60, "Canceled")], conditions=[condition("Canceled")])],
        [QUEUED, RUNS, ("Canceled", 1, "Canceled", 60)],
    ),
    (
        "given back",
        [NEW, processing(), given_back(), processing(queuedAt=stamp(20), attempts=[running(1, 26)])],
        [QUEUED, RUNS, ("Queued", 1, "Evicted", 20), ("Processing", 1, "Processing", 26)],
    ),
    ("given back before it was seen to run", [NEW, given_back()], [QUEUED, RUNS, ("Queued", 1, "Evicted", 20)]),
    (
        "given back, and all unseen",
        [processing(), finished(queuedAt=stamp(20), attempts=[ended(1, 26, 60, "Succeeded")])],
        [QUEUED, RUNS, ("Queued", 1, "Queued", 20), ("Processing", 1, "Processing", 26), ("Completed", 1, "Completed", 60)],
    ),
    (
        "given back after a failed attempt, all unseen",
        [NEW, finished(attempt=2, queuedAt=stamp(40), attempts=[ended(1, 5, 20), ended(2, 50, 60, "Succeeded")])],
        [
            QUEUED,
            RUNS,
            ("Retrying", 1, "ParserCrashed", 20),
            ("Queued", 2, "Queued", 40),
            ("Processing", 2, "Processing", 50),
            ("Completed", 2, "Completed", 60),
        ],
    ),
    (
        "another pod for the same Job: the stay is the same",
        [processing(), waits("Evicted", since=12, attempt=1, startedAt=stamp(5)), processing(attempts=[running(1, 15)])],
        [QUEUED, RUNS, ("Queued", 1, "Evicted", 12), ("Processing", 1, "Processing", 15)],
    ),
    (
        "suspended between two attempts, and resumed",
        [
            retrying(),
            waits("Suspended", since=25, attempt=1, attempts=[ended_attempt(1)]),
            waits(attempt=1, attempts=[ended_attempt(1)]),
            AGAIN,
        ],
        [*FAILED_ONCE, ("Queued", 2, "Suspended", 25), ("Queued", 2, "Queued", None), ("Processing", 2, "Processing", 30)],
    ),
    (
        "waits for one thing after another",
        [NEW, waits("KnowledgeBaseLimit", since=1), waits("KnowledgeBaseLimit", since=1), waits("Unschedulable", since=7)],
        [QUEUED, ("Queued", 1, "KnowledgeBaseLimit", 1), ("Queued", 1, "Unschedulable", 7)],
    ),
    (
        "attempts that have left the status are not told again",
        [
            processing(6, attempts=[*(ended_attempt(number) for number in range(2, 6)), running(6, 30)]),
            processing(7, attempts=[*(ended_attempt(number) for number in range(3, 7)), running(7, 40)]),
        ],
        [
            QUEUED,
            *(
                event
                for number in range(2, 6)
                for event in (("Processing", number, "Processing", 5.0), ("Retrying", number, "StoresDisagree", 20.0))
            ),
            ("Processing", 6, "Processing", 30),
            ("Retrying", 6, "StoresDisagree", 20),
            ("Processing", 7, "Processing", 40),
        ],
    ),
    (
        "a status of nobody's making says what it says",
        [{"phase": "Processing", "attempt": 4}],
        [QUEUED, ("Processing", 4, "Processing", None)],
    ),
]


@pytest.mark.parametrize(("statuses", "expected"), [row[1:] for row in STORIES], ids=[row[0] for row in STORIES])
def test_a_story(statuses: list[dict[str, Any]], expected: list[Short]) -> None:
    assert short(told(*statuses)) == expected


@pytest.mark.parametrize(("statuses", "expected"), [row[1:] for row in STORIES], ids=[row[0] for row in STORIES])
def test_a_version_that_is_written_again_tells_nothing(statuses: list[dict[str, Any]], expected: list[Short]) -> None:
    twice = [status for status in statuses for _ in range(2)]
    assert short(told(*twice)) == expected


def test_the_deletion_of_an_unfinished_task_is_its_end_and_that_of_a_finished_one_is_none() -> None:
    assert short(told(NEW, processing(), deleted=44)) == [QUEUED, RUNS, (DELETED, 1, DELETED, 44)]
    assert short(told(finished(), deleted=90)) == [QUEUED, RUNS, ("Completed", 1, "Completed", 60)]
    [*_, end] = told(NEW, processing(), deleted=44)
    assert transitions(end, seen(manifest(status=processing()), deleted=50)) == []


def test_events_of_where_the_task_stands_carry_its_words() -> None:
    ready = condition("ParserCrashed") | {"message": "attempt 1 failed, the next follows: cannot parse"}
    [*_, last] = told(retrying(attempts=[ended(1, 5, 20)], conditions=[ready]))
    assert (last.reason, last.message) == ("ParserCrashed", "attempt 1 failed, the next follows: cannot parse")


def test_a_task_of_a_restored_api_server_goes_on_from_where_it_is() -> None:
    [*_, end] = told(finished())
    assert short(transitions(end, seen(manifest(status=processing())))) == [RUNS]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (processing(), given_back(), 1),
        (processing(), processing(queuedAt=stamp(20), attempts=[running(1, 26)]), None),
        (processing(), retrying(), None),
        (retrying(), waits("Suspended", attempt=1, attempts=[ended_attempt(1)]), None),
        (processing(2), given_back(2) | {"attempts": [ended_attempt(1)]}, 2),
        (processing(2), finished("Canceled", attempt=2, queuedAt=stamp(40), attempts=[ended_attempt(1)]), 2),
    ],
    ids=["given back", "given back and begun anew", "counted", "waits", "the second", "given back and canceled"],
)
def test_an_attempt_that_was_given_back_is_withdrawn(
    before: dict[str, Any], after: dict[str, Any], expected: int | None
) -> None:
    assert withdrawn(told(before)[-1], seen(manifest(status=after))) == expected


def test_attempts_are_read_from_the_status_as_far_as_they_can_be() -> None:
    ends = {"number": 1, "finishedAt": stamp(20)}
    odd = [{"job": "x"}, {"number": 70_000}, {"number": 1}, {"number": 2, "startedAt": "soon"}, ends]
    read = _attempts(json.dumps(odd))
    assert [(one.number, one.job, one.started_at, one.finished_at) for one in read] == [
        (1, "", None, at(20)),
        (2, "", None, None),
    ]


# ------------------------------------------------------------------------------------------- whatever becomes of versions


def _fold(versions: Sequence[Manifest], order: Iterable[int]) -> list[Transition]:
    """Return the events of a table that takes versions in some order: a lower one never replaces a higher one."""
    found: list[Transition] = []
    known = -1
    for place in order:
        version = int(versions[place]["metadata"]["resourceVersion"])
        if version >= known:
            known = version
            found += transitions(found[-1] if found else None, seen(versions[place]))
    return found


def _is_within(part: Sequence[object], whole: Iterable[object]) -> bool:
    rest = iter(whole)
    return all(any(one == other for other in rest) for one in part)


@settings(max_examples=60)
@given(
    begin=st.sampled_from(BEGINNINGS),
    steps=st.lists(STEPS.filter(lambda step: step[0] != "restore"), max_size=15),
    data=st.data(),
)
def test_whatever_versions_come_through_the_story_is_the_same(
    begin: list[tuple[str, Any]], steps: list[tuple[str, Any]], data: st.DataObject
) -> None:
    world = World()
    world.add_task()
    versions: list[Manifest] = [copy.deepcopy(world.tasks[("knowledge", "handbook")])]
    # The times of a status are whole seconds: what follows each other within one has no order in it.
    spread = [part for step in begin + steps for part in (step, ("wait", 2))]
    asyncio.run(play(world, Operator(world), spread))
    versions += [thing for kind, _, thing in world.events if kind == "task"]

    everything = _fold(versions, range(len(versions)))
    assert _is_within(world.phases, [event.phase for event in everything])
    chosen = data.draw(st.lists(st.integers(0, len(versions) - 1), max_size=8))
    story = _fold(versions, [*chosen, len(versions) - 1])

    places = [(event.phase, event.attempt) for event in story]
    assert _is_within(places, [(event.phase, event.attempt) for event in everything])
    assert places[0] == ("Queued", 1)
    final = seen(versions[-1])
    assert [phase for phase, _ in places if phase in ENDS] == [places[-1][0]] == [final.phase]
    assert Phase(final.phase).finished
    counted = {one.number for one in final.attempts}
    assert counted <= {number for phase, number in places if phase == "Processing"}
    failed = [number for phase, number in places if phase == "Retrying"]
    assert failed == sorted(set(failed))
    assert {one.number for one in final.attempts if one.finished_at != final.finished_at} <= set(failed)
    assert transitions(story[-1], final) == []
