"""Which of several operators acts: decisions by a table, candidates in a world that is out to have two of them lead."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from task_operator.election import Act, Candidate, Election, Lease, Timing, View, decide
from task_operator.metrics import Metrics
from task_platform.kubernetes import Conflict, Forbidden, NotFound, Unavailable

TIMING = Timing(duration=10, deadline=7, renew=2, look=1)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
OTHER = Lease(holder="other", renewed="2026-01-01T00:00:00.000000Z", duration=10, version="7")
MINE = replace(OTHER, holder="me")


# --------------------------------------------------------------------------------------------------------------- decide


@pytest.mark.parametrize(
    ("why", "view", "act", "at"),
    [
        ("nothing is known", View(), Act.LOOK, 100),
        ("there is no Lease yet", View(certain=True), Act.CREATE, 100),
        ("another one holds it", View(certain=True, lease=OTHER, since=95, looked_at=99.5, met=True), Act.LOOK, 100.5),
        ("it will run out sooner", View(certain=True, lease=OTHER, since=90.2, looked_at=99.5, met=True), Act.TAKE, 100.2),
        ("it has run out", View(certain=True, lease=OTHER, since=90, looked_at=99.5, met=True), Act.TAKE, 100),
        (
            "its holder asks for more time",
            View(certain=True, lease=replace(OTHER, duration=20), since=85, looked_at=99.5, met=True),
            Act.LOOK,
            100.5,
        ),
        (
            "somebody has written a number that keeps everybody out",
            View(certain=True, lease=replace(OTHER, duration=1e9), since=-200, looked_at=99.5, met=True),
            Act.TAKE,
            100,
        ),
        ("it was given back", View(certain=True, lease=replace(OTHER, holder=""), since=99, met=True), Act.TAKE, 100),
        ("it was there and is gone", View(certain=True, since=98, looked_at=99, met=True, vanished=True), Act.LOOK, 100),
        ("it has been gone for long", View(certain=True, since=95, looked_at=99, met=True, vanished=True), Act.CREATE, 100),
        ("its own was deleted", View(certain=True, since=99, met=True, renewed_at=98), Act.CREATE, 100),
        ("it leads", View(certain=True, lease=MINE, since=99, met=True, renewed_at=99), Act.RENEW, 101),
        ("it led, and nobody else since", View(certain=True, lease=MINE, since=50, met=True), Act.TAKE, 100),
        ("an answer was lost", View(lease=MINE, since=99, met=True, renewed_at=99), Act.LOOK, 100),
    ],
)
def test_what_to_do_follows_from_what_was_seen_and_when(why: str, view: View, act: Act, at: float) -> None:
    does, when = decide(view, me="me", now=100, timing=TIMING)
    assert (does, max(when, 100)) == (act, at), why


def test_a_leader_stops_before_anybody_may_begin() -> None:
    leader, heir = Candidate("me", TIMING), Candidate("heir", TIMING)
    leader.saw(None, now=0)
    wish = replace(leader.wish(Act.CREATE, wall=NOON), version="1")
    heir.saw(wish, now=0.5)  # as soon as it can be seen
    leader.wrote(wish, started=0.4, now=1.5)
    assert leader.leads(7.3)
    assert not leader.leads(7.5)
    heir.saw(wish, now=9.4)
    assert heir.next(9.4)[0] is Act.LOOK
    heir.saw(wish, now=9.6)
    assert heir.next(9.6) == (Act.TAKE, 10.5)


def test_who_makes_a_lease_that_has_vanished_acts_when_nobody_else_can() -> None:
    heir = Candidate("heir", TIMING)
    heir.saw(OTHER, now=0)
    heir.saw(None, now=1)
    heir.saw(None, now=5)
    assert heir.next(5)[0] is Act.CREATE
    heir.failed(at_once=False, started=5, now=6)  # it was made, and the answer was lost
    made = replace(heir.wish(Act.CREATE, wall=NOON), version="8")
    heir.saw(made, now=7)
    assert heir.next(7)[0] is Act.TAKE
    for now in range(7, 22, 2):
        heir.wrote(made, started=now, now=now)
        assert heir.leads(now) == (now >= 17)


def test_times_in_the_record_mean_nothing() -> None:
    candidate = Candidate("me", TIMING)
    for now in (0, 9.5):
        candidate.saw(replace(OTHER, renewed="2099-01-01T00:00:00.000000Z"), now=now)
    assert candidate.next(9.5) == (Act.TAKE, 10)
    candidate.saw(replace(OTHER, renewed="1999-01-01T00:00:00.000000Z"), now=9.9)  # set back: it lives
    assert candidate.next(10)[0] is Act.LOOK


def test_a_label_is_no_sign_of_life() -> None:
    candidate = Candidate("me", TIMING)
    candidate.saw(OTHER, now=0)
    candidate.saw(replace(OTHER, version="8"), now=9)
    assert candidate.next(9) == (Act.TAKE, 10)
    assert candidate.wish(Act.TAKE, wall=NOON).version == "8"


def test_no_record_comes_back_while_the_wall_clock_stands_or_is_set_back() -> None:
    candidate = Candidate("me", TIMING)
    candidate.saw(replace(OTHER, renewed="2026-01-01T13:00:00.000000Z"), now=0)
    seen = []
    for number, hours in enumerate((0, 0, 1, 2, 1, 0, 0, 3)):
        lease = candidate.wish(Act.TAKE, wall=NOON + timedelta(hours=hours))
        candidate.wrote(replace(lease, version=str(number)), started=number, now=number)
        seen.append(lease.renewed)
    assert seen == sorted(set(seen))
    assert [text[11:26] for text in seen[:4]] == ["13:00:00.000001", "13:00:00.000002", "13:00:00.000003", "14:00:00.000000"]


@pytest.mark.parametrize("text", ["", "soon", "9999-12-31T23:59:59.999999Z"])
def test_a_time_that_is_none_or_the_last_is_followed_by_the_wall_clocks(text: str) -> None:
    candidate = Candidate("me", TIMING)
    candidate.saw(replace(OTHER, renewed=text), now=0)
    assert candidate.wish(Act.TAKE, wall=NOON).renewed == "2026-01-01T12:00:00.000000Z"


def test_a_lease_is_read_whatever_stands_in_it() -> None:
    odd = {"metadata": {"resourceVersion": "3"}, "spec": {"leaseDurationSeconds": "ten", "leaseTransitions": None}}
    assert Lease.from_manifest(odd) == Lease()
    assert Lease.from_manifest({"metadata": {"resourceVersion": "3"}}).version == "3"
    spec = {"holderIdentity": "a", "renewTime": "b", "acquireTime": "c", "leaseTransitions": 4, "leaseDurationSeconds": 10}
    assert Lease.from_manifest({"metadata": {"resourceVersion": "3"}, "spec": spec}).spec() == spec


# -------------------------------------------------------------------------------------------------- two and three of them


@dataclass
class Faults:
    """How the world behaves, by chance from a seed."""

    chance: random.Random
    lost: float
    """Share of requests that are lost, half of them after they were carried out."""
    slow: float
    """Longest time of a request in seconds: some are carried out after the candidate has given up."""
    pauses: float
    """Share of candidates that stand still for up to 20 s, each ten seconds."""
    outages: float
    """Share of ten seconds in which the API server is away."""
    deletions: float
    """Share of ten seconds at the beginning of which somebody deletes the Lease."""


@dataclass
class Asked:
    act: Act
    wish: Lease
    started: float
    arrives: float
    answers: float
    gives_up: float
    outcome: Any = None


@dataclass
class World:
    """An API server with one Lease, and candidates whose clocks and wall clocks have nothing to do with each other."""

    faults: Faults
    count: int
    now: float = 0.0
    lease: Lease | None = None
    versions: int = 0
    away_until: float = 0.0
    candidates: list[Candidate] = field(default_factory=list)
    offsets: list[float] = field(default_factory=list)
    paused_until: list[float] = field(default_factory=list)
    asked: list[Asked | None] = field(default_factory=list)
    late: list[Asked] = field(default_factory=list)
    led: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number in range(self.count):
            self.candidates.append(Candidate(f"c{number}", TIMING))
            self.offsets.append(self.faults.chance.uniform(0, 1e6))
            self.paused_until.append(0.0)
            self.asked.append(None)

    def run(self, seconds: float, *, quiet: bool = False) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = round(self.now + 0.1, 3)
            if not quiet and abs(self.now % 10) < 0.05:
                self._mischief()
            for one in [*self.late]:
                if self.now >= one.arrives:
                    self._carry_out(one)
                    self.late.remove(one)
            for number, candidate in enumerate(self.candidates):
                if self.now >= self.paused_until[number]:
                    self._step(number, candidate, quiet=quiet)
            leads = [
                one.me for one, offset in zip(self.candidates, self.offsets, strict=True) if one.leads(self.now + offset)
            ]
            assert len(leads) <= 1, f"{leads} lead at {self.now}"
            if leads and (not self.led or self.led[-1][1] != leads[0]):
                self.led.append((self.now, leads[0]))

    def _mischief(self) -> None:
        chance, faults = self.faults.chance, self.faults
        if chance.random() < faults.outages:
            self.away_until = self.now + chance.uniform(1, 9)
        for number in range(self.count):
            if chance.random() < faults.pauses:
                self.paused_until[number] = self.now + chance.uniform(1, 20)
        if chance.random() < faults.deletions and all(one.view.met for one in self.candidates):
            self.lease = None

    def _step(self, number: int, candidate: Candidate, *, quiet: bool) -> None:
        now = self.now + self.offsets[number]
        asked = self.asked[number]
        if asked is None:
            act, at = candidate.next(now)
            if now < at:
                return
            chance = self.faults.chance
            wall = NOON + timedelta(hours=chance.choice((-1, 0, 1)))  # it jumps, or stands
            arrives = self.now + (0 if quiet else chance.uniform(0, self.faults.slow))
            answers = arrives + (0 if quiet else chance.uniform(0, self.faults.slow))
            if not quiet and chance.random() < self.faults.lost:
                answers = float("inf")
                if chance.random() < 0.5:
                    arrives = float("inf")
            wish = candidate.wish(act, wall=wall)
            self.asked[number] = Asked(act, wish, now, arrives, answers, now + TIMING.patience)
            return
        if asked.outcome is None and self.now >= asked.arrives:
            self._carry_out(asked)
        if asked.outcome is not None and self.now >= asked.answers and now < asked.gives_up:
            self.asked[number] = None
            match asked.outcome:
                case Exception():
                    candidate.failed(at_once=not isinstance(asked.outcome, Unavailable), started=asked.started, now=now)
                case ("saw", lease):
                    candidate.saw(lease, now=now)
                case lease:
                    candidate.wrote(lease, started=asked.started, now=now)
        elif now >= asked.gives_up:
            self.asked[number] = None
            if asked.outcome is None and asked.arrives < float("inf"):
                self.late.append(asked)  # on its way still, whoever gave up
            candidate.failed(at_once=False, started=asked.started, now=now)

    def _carry_out(self, asked: Asked) -> None:
        if self.now < self.away_until:
            asked.outcome = Unavailable("away")
        elif asked.act is Act.LOOK:
            asked.outcome = ("saw", self.lease)
        elif asked.act is Act.CREATE and self.lease is not None:
            asked.outcome = Conflict("there is one")
        elif asked.act is not Act.CREATE and self.lease is None:
            asked.outcome = NotFound("gone")
        elif asked.act is not Act.CREATE and self.lease is not None and asked.wish.version != self.lease.version:
            asked.outcome = Conflict("changed")
        else:
            self.versions += 1
            self.lease = replace(asked.wish, version=str(self.versions))
            asked.outcome = self.lease


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(2, 3),
    seed=st.integers(0, 2**32),
    lost=st.sampled_from([0, 0.1, 0.5]),
    slow=st.sampled_from([0, 0.2, 2.0, 6.0]),
    pauses=st.sampled_from([0, 0.2, 0.6]),
    outages=st.sampled_from([0, 0.3]),
    deletions=st.sampled_from([0, 0.3]),
)
@example(count=3, seed=1, lost=0.5, slow=6.0, pauses=0.6, outages=0.3, deletions=0.3)
def test_no_two_ever_lead_and_in_the_end_one_does(
    count: int, seed: int, lost: float, slow: float, pauses: float, outages: float, deletions: float
) -> None:
    faults = Faults(random.Random(seed), lost, slow, pauses, outages, deletions)
    world = World(faults, count)
    world.run(120)
    world.run(40, quiet=True)
    assert any(one.leads(world.now + offset) for one, offset in zip(world.candidates, world.offsets, strict=True))


def test_a_leader_that_stands_still_is_replaced_within_fifteen_seconds() -> None:
    world = World(Faults(random.Random(1), 0, 0.1, 0, 0, 0), 2)
    world.run(5)
    [(_, first)] = world.led
    world.paused_until[int(first[1:])] = float("inf")
    world.run(15)
    assert [who for _, who in world.led] == [first, "c1" if first == "c0" else "c0"]


# -------------------------------------------------------------------------------------------------------------- the loop

QUICK = Timing(duration=0.6, deadline=0.4, renew=0.1, look=0.05)


class Store:
    """A Lease in memory; each candidate reaches it through a store of its own, which may fail."""

    def __init__(self, shared: dict[str, Any]) -> None:
        self._shared = shared
        self.error: Exception | None = None
        self.hangs = False

    async def _reach(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error

    async def get(self) -> Lease | None:
        await self._reach()
        return self._shared.get("lease")

    async def create(self, lease: Lease) -> Lease:
        await self._reach()
        if self._shared.get("lease") is not None:
            raise Conflict("there is one")
        return self._put(lease)

    async def replace(self, lease: Lease) -> Lease:
        await self._reach()
        there = self._shared.get("lease")
        if there is None:
            raise NotFound("gone")
        if there.version != lease.version:
            raise Conflict("changed")
        return self._put(lease)

    def _put(self, lease: Lease) -> Lease:
        self._shared["version"] = self._shared.get("version", 0) + 1
        self._shared["lease"] = replace(lease, version=str(self._shared["version"]))
        there: Lease = self._shared["lease"]
        return there


class Operator:
    """One process: an election and what it does as leader."""

    def __init__(self, shared: dict[str, Any], name: str) -> None:
        self.store = Store(shared)
        self.metrics = Metrics()
        self.election = Election(self.store, me=name, timing=QUICK, metrics=self.metrics)
        self.working = False
        self.began = 0
        self.fails = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    async def lead(self) -> None:
        self.working = True
        self.began += 1
        try:
            await self.fails.wait()
            raise ValueError("a part failed")
        finally:
            self.working = False

    @asynccontextmanager
    async def standing(self) -> AsyncIterator["Operator"]:
        self.task = asyncio.create_task(self.election.run(self.lead))
        try:
            yield self
        finally:
            self.task.cancel()
            await asyncio.wait([self.task])


def gauges(operator: Operator) -> tuple[float | None, float | None]:
    value = operator.metrics.registry.get_sample_value
    return value("task_operator_leader"), value("task_operator_terms_total")


async def until(look: Callable[[], bool], *, seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not look():  # noqa: ASYNC110 - what is looked at tells nobody
            await asyncio.sleep(0.005)


async def test_one_leads_the_other_stands_by_and_takes_over_when_it_is_killed() -> None:
    shared: dict[str, Any] = {}
    async with Operator(shared, "b").standing() as other:
        await until(lambda: other.working)
        async with Operator(shared, "a").standing() as standby:
            await until(lambda: standby.election._candidate.view.met)
            assert not standby.election.leads()
            assert gauges(other) == (1, 1)
            assert gauges(standby) == (0, 0)
            assert other.task is not None
            other.task.cancel()  # nothing is given back
            await until(lambda: standby.working)
            assert shared["lease"].transitions == 1
            assert not other.election.leads()


async def test_a_lease_that_was_given_back_is_taken_at_once() -> None:
    shared: dict[str, Any] = {}
    async with Operator(shared, "a").standing() as first, Operator(shared, "b").standing() as second:
        await until(lambda: first.working or second.working)
        leader, standby = (first, second) if first.working else (second, first)
        assert leader.task is not None
        leader.task.cancel()
        await asyncio.wait([leader.task])
        assert leader.election.leads()  # there may be something to write at the end
        loop = asyncio.get_running_loop()
        began = loop.time()
        await leader.election.release()
        assert not leader.election.leads()
        await until(lambda: standby.working)
        assert loop.time() - began < QUICK.duration - QUICK.look


@pytest.mark.parametrize("how", ["refused", "hanging"])
async def test_who_cannot_renew_stops_in_time_and_goes_on_when_it_can(how: str) -> None:
    async with Operator({}, "a").standing() as operator:
        await until(lambda: operator.working)
        operator.store.error = Unavailable("away") if how == "refused" else None
        operator.store.hangs = how == "hanging"
        await until(lambda: not operator.election.leads())
        await until(lambda: not operator.working, seconds=0.2)
        operator.store.error, operator.store.hangs = None, False
        await until(lambda: operator.working)
        assert operator.began == 2


async def test_a_lease_that_somebody_takes_by_hand_is_lost_at_the_next_renewal() -> None:
    shared: dict[str, Any] = {}
    async with Operator(shared, "a").standing() as operator:
        await until(lambda: operator.working)
        operator.store._put(replace(shared["lease"], holder="kubectl"))
        await until(lambda: not operator.working, seconds=0.3)
        await until(lambda: operator.working)  # and had again when that does not change
        assert operator.began == 2


async def test_a_lease_that_is_deleted_is_made_again_by_its_leader() -> None:
    shared: dict[str, Any] = {}
    async with Operator(shared, "a").standing() as first, Operator(shared, "b").standing() as second:
        await until(lambda: first.working or second.working)
        leader = first if first.working else second
        await until(lambda: all(one.election._candidate.view.met for one in (first, second)))
        shared["lease"] = None
        await until(lambda: shared["lease"] is not None)
        assert shared["lease"].holder == leader.election._candidate.me
        await until(lambda: leader.working)


async def test_what_ends_the_work_of_a_leader_ends_the_election() -> None:
    async with Operator({}, "a").standing() as operator:
        await until(lambda: operator.working)
        operator.fails.set()
        assert operator.task is not None
        await asyncio.wait([operator.task])
        assert isinstance(operator.task.exception(), ValueError)


async def test_missing_rights_end_it() -> None:
    async with Operator({}, "a").standing() as operator:
        operator.store.error = Forbidden("leases is forbidden")
        assert operator.task is not None
        await asyncio.wait([operator.task])
        assert isinstance(operator.task.exception(), Forbidden)
