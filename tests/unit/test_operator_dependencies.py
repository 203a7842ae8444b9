"""What a task waits for before it begins: other tasks, and a time."""

from dataclasses import dataclass
from typing import Any

import pytest

from task_contract.models import Failure
from task_operator.cache import Cache
from task_operator.dependencies import Dependencies, Dependency, circle_through, judge
from task_operator.observation import Decision, Need, Observed
from task_operator.reconcile import decide
from tests.support.operator_values import at, finished, manifest, retrying, stamp, task


@pytest.mark.parametrize(
    ("edges", "circle"),
    [
        ({"a": []}, ""),
        ({"a": ["b"], "b": []}, ""),
        ({"a": ["gone"]}, ""),
        ({"a": ["a"]}, "a a"),
        ({"a": ["b"], "b": ["a"]}, "a b a"),
        ({"a": ["x", "b"], "x": [], "b": ["c"], "c": ["x", "a"]}, "a b c a"),
        ({"a": ["b"], "b": ["c"], "c": ["b"]}, ""),
        ({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}, ""),
    ],
)
def test_a_task_that_waits_for_itself_is_found(edges: dict[str, list[str]], circle: str) -> None:
    assert " ".join(circle_through("a", lambda name: edges.get(name, []))) == circle


def test_a_long_chain_is_followed() -> None:
    edges = {str(number): [str(number + 1)] for number in range(20_000)}
    assert circle_through("0", lambda name: edges.get(name, [])) == ()
    edges["20000"] = ["0"]
    assert len(circle_through("0", lambda name: edges.get(name, []))) == 20_002


@dataclass(frozen=True)
class Row:
    name: str
    phases: dict[str, str | None]
    judged: str | None
    """The reason of a failure, or what is said; None: the task may begin."""
    circle: tuple[str, ...] = ()
    sure: bool = True


ROWS = [
    Row("all completed", {"a": "Completed", "b": "Completed"}, None),
    Row("one runs", {"a": "Completed", "b": "Processing"}, "waits for 1 of 2 tasks: b (Processing)"),
    Row("one is not there", {"a": None}, "waits for 1 of 1 tasks: a (there is none)"),
    Row("one failed", {"a": "Failed", "b": "Processing"}, "DependencyFailed"),
    Row("one was canceled", {"a": "Canceled"}, "DependencyFailed"),
    Row("a circle", {"a": "Queued"}, "InvalidTask", circle=("t", "a", "t")),
    Row(
        "PostgreSQL is away",
        {"a": None},
        "waits for 1 of 1 tasks: a (there is none, and PostgreSQL, which may know of one that was deleted, does not answer)",
        sure=False,
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_other_tasks_mean_for_one(row: Row) -> None:
    found = judge(known(row.phases, circle=row.circle, sure=row.sure))
    assert (found.reason if isinstance(found, Failure) else found) == row.judged


def known(phases: dict[str, str | None], **more: Any) -> Dependencies:
    return Dependencies(of=tuple(Dependency(name, phase) for name, phase in phases.items()), **more)


def decision(parts: dict[str, Any], dependencies: Dependencies | None = None, *, now: float = 10) -> Decision:
    asked = frozenset() if dependencies is None else frozenset({Need.DEPENDENCIES})
    observed = Observed(task=task(**parts), answered=asked, dependencies=dependencies or Dependencies())
    return decide(observed, now=at(now), random=0)


WAITING = {"spec": {"dependsOn": ["a"]}}


def test_a_task_asks_for_what_it_waits_for_and_says_so() -> None:
    assert decision(WAITING).needs == {Need.DEPENDENCIES}
    waits = decision(WAITING, known({"a": "Queued"}))
    assert waits.status is not None
    assert waits.status.queue is not None
    assert (waits.status.phase, waits.status.queue.reason) == ("Queued", "DependsOn")
    assert waits.create_attempt is None
    again = decision(WAITING | {"status": waits.status.manifest()}, known({"a": "Queued"}))
    assert again == Decision(), "told once"
    assert decision(WAITING, known({"a": "Completed"})).create_attempt == 1


def test_a_task_whose_dependency_failed_fails_and_names_it() -> None:
    status = decision(WAITING, known({"a": "Failed"})).status
    assert status is not None
    assert status.error is not None
    assert (status.phase, status.error.reason, status.error.retryable) == ("Failed", "DependencyFailed", False)
    assert "task a" in status.error.message


def test_a_task_that_has_begun_waits_for_nobody() -> None:
    begun = {"spec": {"dependsOn": ["a"], "notBefore": stamp(500)}, "status": retrying(retry_at=5)}
    assert decision(begun, now=10).create_attempt == 2


def test_a_task_waits_for_its_time_and_is_looked_at_then() -> None:
    later = {"spec": {"notBefore": stamp(100)}}
    waits = decision(later, now=10)
    assert waits.status is not None
    assert waits.status.queue is not None
    assert waits.status.queue.reason == "NotBefore"
    assert waits.after is not None
    assert waits.after.total_seconds() == 90
    assert decision(later, now=100).create_attempt == 1


def test_what_a_task_waits_for_is_told_before_when_it_would_start() -> None:
    both = {"spec": {"notBefore": stamp(100), "dependsOn": ["a"]}}
    assert decision(both, known({"a": "Failed"}), now=10).status is not None
    waits = decision(both, known({"a": "Completed"}), now=10).status
    assert waits is not None
    assert waits.queue is not None
    assert waits.queue.reason == "NotBefore"


def test_the_deadline_ends_the_wait_for_a_task_that_never_comes() -> None:
    ends = decision({"spec": {"dependsOn": ["a"], "deadline": "1m"}}, known({"a": None}), now=30)
    assert ends.after is not None
    assert ends.after.total_seconds() == 30
    over = decision({"spec": {"dependsOn": ["a"], "deadline": "1m"}}, known({"a": None}), now=60)
    assert Need.PODS in over.needs or (over.status is not None and over.status.phase == "Failed")


def test_the_cache_knows_who_waits_for_whom() -> None:
    cache = Cache()
    one = manifest(spec={"dependsOn": ["a", "b"]})
    key = (one["metadata"]["namespace"], one["metadata"]["name"])
    a, b = (key[0], "a"), (key[0], "b")
    cache.put_task(one)
    assert cache.dependents(a) == cache.dependents(b) == {key}
    cache.put_task(manifest(spec={"dependsOn": ["a", "b"]}, status=finished(), resourceVersion="1000"))
    assert cache.dependents(a) == set(), "a finished task waits for nobody"
    cache.put_task(manifest(spec={"dependsOn": ["a"]}, resourceVersion="1001"))
    cache.drop_task(key, uid=one["metadata"]["uid"])
    assert cache.dependents(a) == set()
