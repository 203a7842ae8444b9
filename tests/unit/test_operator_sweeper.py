"""Which tasks are dead, which namespaces are due, and that two operators and a crash make one Job of it."""

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from task_operator.jobs import RunnerTemplate, build_sweep_job, sweep_job_name
from task_operator.metrics import Metrics
from task_operator.observation import Fence, FenceState
from task_operator.projection import Intent, Swept
from task_operator.sweeper import STRANGER, Sweeper, dead, is_due
from task_platform.kubernetes import Conflict, Forbidden, Manifest, Unavailable
from tests.support.operator_values import at
from tests.unit.test_operator_jobs import DATA, FULL

HOUR = timedelta(hours=1)


def intent(uid: str = "a", *, known: bool = True, begun: float = 0) -> Intent:
    return Intent(uid=uid, known=known, begun_at=at(begun))


@pytest.mark.parametrize(
    ("intents", "alive", "expected"),
    [
        ([], set(), []),
        ([intent("a"), intent("b")], {"a"}, ["b"]),
        ([intent("a")], {"a", "c"}, []),
        ([intent("a", known=False)], set(), []),
        ([intent("a", known=False, begun=-STRANGER.total_seconds() - 1)], set(), ["a"]),
        ([intent("a", known=False, begun=-STRANGER.total_seconds() - 1)], {"a"}, []),
    ],
    ids=["none", "gone", "alive", "by hand, young", "by hand, old", "not projected yet"],
)
def test_the_dead_are_those_who_are_not_alive(intents: list[Intent], alive: set[str], expected: list[str]) -> None:
    assert dead(intents, alive=alive, now=at(0)) == expected


@pytest.mark.parametrize(
    ("dirty", "since", "expected"), [(True, 0, True), (False, 0, False), (False, -3599, False), (False, -3600, True)]
)
def test_a_namespace_is_due_when_it_is_dirty_or_an_hour_has_passed(dirty: bool, since: float, expected: bool) -> None:
    swept = Swept(namespace="knowledge", last=None, since=at(since), dirty=dirty)
    assert is_due(swept, interval=HOUR, now=at(0)) is expected


def test_the_job_of_a_sweep_is_exactly_this() -> None:
    expected = yaml.safe_load(Path(DATA / "job-sweep.yaml").read_text())
    assert build_sweep_job("knowledge", last=at(90), template=FULL) == expected


def test_the_name_of_the_job_follows_from_namespace_and_last_sweep() -> None:
    names = {sweep_job_name(namespace=name, last=last) for name in ("a", "b") for last in (None, at(0), at(1))}
    assert len(names) == 6
    assert all(len(name) <= 63 for name in names)


class Ledger:
    """What PostgreSQL says, and the fences that were raised in it."""

    def __init__(self, intents: Sequence[Intent] = (), swept: Sequence[Swept] = ()) -> None:
        self.found = list(intents)
        self.swept_ = list(swept)
        self.fenced: list[str] = []

    async def intents(self, *, namespaces: Sequence[str]) -> list[Intent]:
        return [one for one in self.found if one.uid not in self.fenced]

    async def swept(self, *, namespaces: Sequence[str]) -> list[Swept]:
        return self.swept_

    async def raise_fence(self, uid: str, *, reason: str) -> Fence:
        self.fenced.append(uid)
        return Fence(state=FenceState.RAISED)


class Cluster:
    """Jobs by (namespace, name), and what the next creations are answered with."""

    def __init__(self) -> None:
        self.jobs: dict[tuple[str, str], Manifest] = {}
        self.answers: list[Exception] = []

    async def create_job(self, job: Manifest) -> Manifest:
        key = job["metadata"]["namespace"], job["metadata"]["name"]
        if self.answers:
            raise self.answers.pop()
        if key in self.jobs:
            raise Conflict("cannot POST: already exists")
        self.jobs[key] = job
        return job


def sweeper(
    ledger: Ledger, cluster: Cluster, *, alive: Collection[str] | None = (), elsewhere: Collection[str] = ()
) -> Sweeper:
    async def others() -> Collection[str]:
        return elsewhere

    return Sweeper(
        create_job=cluster.create_job,
        database=ledger,
        alive=lambda: alive,
        elsewhere=others,
        template=RunnerTemplate(image="runner:1"),
        metrics=Metrics(),
        interval=HOUR,
        clock=lambda: at(0),
    )


def dirty(namespace: str = "knowledge", last: datetime | None = None) -> Swept:
    return Swept(namespace=namespace, last=last, since=last or at(0), dirty=True)


async def test_the_dead_are_fenced_once_and_the_namespace_is_swept_by_one_job() -> None:
    ledger, cluster = Ledger([intent("dead"), intent("alive")], [dirty()]), Cluster()
    for _ in range(3):  # two operators, one of them after a crash
        await sweeper(ledger, cluster, alive={"alive"}).look()
    assert ledger.fenced == ["dead"]
    assert len(cluster.jobs) == 1


async def test_tasks_of_another_installation_are_not_fenced() -> None:
    ledger, cluster = Ledger([intent("dead"), intent("theirs")], [dirty()]), Cluster()
    await sweeper(ledger, cluster, elsewhere={"theirs"}).look()
    assert ledger.fenced == ["dead"]


async def test_after_a_sweep_the_next_one_has_another_job() -> None:
    ledger, cluster = Ledger(swept=[dirty()]), Cluster()
    await sweeper(ledger, cluster).look()
    ledger.swept_ = [dirty(last=at(5))]
    await sweeper(ledger, cluster).look()
    assert len(cluster.jobs) == 2


async def test_nothing_is_fenced_before_all_tasks_are_known() -> None:
    ledger, cluster = Ledger([intent("dead")], [dirty()]), Cluster()
    await sweeper(ledger, cluster, alive=None).look()
    assert not ledger.fenced
    assert not cluster.jobs


@pytest.mark.parametrize("error", [Forbidden("cannot POST: exceeded quota"), Unavailable("cannot POST: 503")])
async def test_a_namespace_that_refuses_its_job_does_not_hold_up_the_others(error: Any) -> None:
    ledger, cluster = Ledger(swept=[dirty("a"), dirty("b")]), Cluster()
    cluster.answers = [error]
    await sweeper(ledger, cluster).look()
    assert [namespace for namespace, _ in cluster.jobs] == ["b"]
