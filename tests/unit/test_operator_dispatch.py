"""Who may have a Job: limits, the line, and that nobody is forgotten in it."""

from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from task_operator.cache import Key
from task_operator.dispatch import Claim, Dispatch, Limits, worth_telling
from tests.support.operator_values import at


def claim(created: float = 0, **fields: str | None) -> Claim:
    given: dict[str, str | None] = {"namespace": "a", "kb_id": "kb", "type": "document_processing", "priority": "normal"}
    return Claim(created_at=at(created), **(given | fields))  # type: ignore[arg-type]  # a table of texts


class Line:
    """A dispatch whose tasks are named by a word."""

    def __init__(self, limits: Limits, window: int = 0) -> None:
        self.woken: list[str] = []
        self.window = window
        self.dispatch = Dispatch(limits, wake=lambda key: self.woken.append(key[1]), window=lambda *_: self.window)

    def ask(self, name: str, wanted: Claim) -> tuple[int, str]:
        place = self.dispatch.ask((wanted.namespace, name), wanted)
        return place.position, place.reason

    def release(self, name: str, namespace: str = "a") -> None:
        self.dispatch.release((namespace, name))


@dataclass(frozen=True)
class Row:
    name: str
    limits: Limits
    running: list[Claim]
    asks: Claim
    reason: str


ROWS = [
    Row("no limit in the way", Limits(total=2), [claim()], claim(), ""),
    Row("the limit of all", Limits(total=1), [claim(namespace="b")], claim(), "TotalLimit"),
    Row("the limit of a namespace", Limits(namespace=1), [claim()], claim(kb_id="other"), "NamespaceLimit"),
    Row("not that of another", Limits(namespace=1), [claim(namespace="b")], claim(), ""),
    Row("the limit of a knowledge base", Limits(knowledge_base=1), [claim()], claim(), "KnowledgeBaseLimit"),
    Row("not that of another", Limits(knowledge_base=1), [claim()], claim(kb_id="other"), ""),
    Row("nor of one of that name elsewhere", Limits(knowledge_base=1), [claim(namespace="b")], claim(), ""),
    Row("a task without knowledge base", Limits(knowledge_base=1), [claim(kb_id=None)], claim(kb_id=None), ""),
    Row("the limit of a type", Limits(types={"document_processing": 1}), [claim()], claim(kb_id="other"), "TypeLimit"),
    Row("not that of another", Limits(types={"health_check": 1}), [claim()], claim(), ""),
    Row("the widest is named", Limits(total=1, namespace=1, knowledge_base=1), [claim()], claim(), "TotalLimit"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_which_limit_holds_a_task_up(row: Row) -> None:
    line = Line(row.limits)
    for number, running in enumerate(row.running):
        assert line.ask(f"running-{number}", running) == (0, "")
    assert line.ask("asking", row.asks) == ((1, row.reason) if row.reason else (0, ""))


def test_a_place_that_becomes_free_goes_to_the_first_in_line() -> None:
    line = Line(Limits(total=1))
    line.ask("running", claim(0))
    assert line.ask("later", claim(20)) == (1, "TotalLimit")
    assert line.ask("earlier", claim(10)) == (1, "TotalLimit")
    assert line.ask("later", claim(20)) == (2, "TotalLimit")
    line.release("running")
    assert line.woken == ["earlier"]
    assert line.ask("newcomer", claim(30))[0] == 2, "the place is taken before who was woken has asked"
    assert line.ask("earlier", claim(10)) == (0, "")
    line.release("earlier")
    assert line.woken == ["earlier", "later"]


@pytest.mark.parametrize(
    ("one", "other", "first"),
    [
        (claim(0, priority="normal"), claim(600, priority="high"), "other"),
        (claim(0, priority="low"), claim(3599, priority="high"), "other"),
        (claim(0, priority="low"), claim(3601, priority="high"), "one"),
        (claim(0, priority="low"), claim(599, priority="normal"), "other"),
        (claim(0, priority="low"), claim(601, priority="normal"), "one"),
        (claim(0), claim(1), "one"),
    ],
)
def test_priority_is_a_head_start_and_nobody_starves(one: Claim, other: Claim, first: str) -> None:
    line = Line(Limits(total=1))
    line.ask("running", claim())
    line.ask("one", one)
    line.ask("other", other)
    line.release("running")
    assert line.woken == [first]


def test_a_priority_that_changes_moves_the_task() -> None:
    line = Line(Limits(total=1))
    line.ask("running", claim())
    line.ask("one", claim(1))
    assert line.ask("two", claim(2)) == (2, "TotalLimit")
    assert line.ask("two", claim(2, priority="high")) == (1, "TotalLimit")


def test_a_knowledge_base_at_its_limit_holds_up_nobody_else() -> None:
    line = Line(Limits(total=2, knowledge_base=1))
    line.ask("running", claim(0))
    for number in range(5):
        assert line.ask(f"waiting-{number}", claim(number)) == (number + 1, "KnowledgeBaseLimit")
    assert line.ask("other", claim(100, kb_id="other")) == (0, "")
    line.release("other")
    assert line.woken == []
    line.release("running")
    assert line.woken == ["waiting-0"]


def test_who_leaves_the_line_is_not_waited_for() -> None:
    line = Line(Limits(total=1))
    line.ask("running", claim())
    line.ask("suspended", claim(1))
    line.ask("next", claim(2))
    line.release("suspended")
    line.release("running")
    assert line.woken == ["next"]
    assert len(line.dispatch) == 0


def test_jobs_that_are_found_count_whatever_the_limits_say() -> None:
    line = Line(Limits(total=1))
    for name in ("one", "two"):
        line.dispatch.hold(("a", name), claim())
        line.dispatch.hold(("a", name), claim())
    assert line.ask("asking", claim(5)) == (1, "TotalLimit")
    line.release("one")
    assert line.woken == []
    line.release("two")
    assert line.woken == ["asking"]


def warm(created: float = 0, *, pool: str = "p", priority: str = "normal", kb_id: str = "kb") -> Claim:
    return replace(claim(created, kb_id=kb_id, priority=priority), pool=("a", pool))


def test_a_pool_has_places_of_its_own_for_each_priority() -> None:
    line = Line(Limits(total=1), window=1)
    line.ask("job", claim())
    assert line.ask("one", warm()) == (0, ""), "the limit in all is for Jobs"
    assert line.ask("two", warm(1)) == (1, "PoolLimit")
    assert line.ask("high", warm(2, priority="high")) == (0, "")
    assert line.ask("elsewhere", warm(3, pool="q")) == (0, "")
    assert line.ask("another job", claim(4))[1] == "TotalLimit", "what is with a pool does not count for Jobs"
    line.release("one")
    assert line.woken == ["two"]


def test_limits_of_a_knowledge_base_hold_in_a_pool_too() -> None:
    line = Line(Limits(knowledge_base=1), window=10)
    line.ask("job", claim())
    assert line.ask("same base", warm(1)) == (1, "KnowledgeBaseLimit")
    assert line.ask("other base", warm(2, kb_id="other")) == (0, "")


def test_a_window_that_grows_lets_more_through_and_one_of_none_nobody() -> None:
    line = Line(Limits(), window=0)
    for number in range(3):
        assert line.ask(f"waiting-{number}", warm(number)) == (number + 1, "PoolLimit")
    line.window = 2
    assert line.ask("waiting-0", warm(0)) == (0, "")
    line.dispatch.grown()
    assert line.woken == ["waiting-1"]
    line.window = 1
    line.release("waiting-0")
    assert line.woken == ["waiting-1"], "a window that shrinks takes no place away, and gives none"
    line.release("waiting-1")
    assert line.woken == ["waiting-1", "waiting-2"]


def test_who_goes_from_a_pool_to_a_job_leaves_its_place_there() -> None:
    line = Line(Limits(total=1), window=1)
    line.ask("moves", warm(0))
    line.ask("next", warm(1))
    assert line.ask("moves", claim(0)) == (0, "")
    assert line.woken == ["next"]
    line.dispatch.hold(("a", "next"), claim(1))
    assert line.ask("third", warm(2)) == (0, "")


@pytest.mark.parametrize(
    ("told", "position", "worth"),
    [
        (None, 4000, True),
        (4000, 3999, False),
        (4000, 2001, False),
        (4000, 2000, True),
        (20, 11, False),
        (20, 10, True),
        (10, 9, True),
        (10, 10, False),
        (3, 5, False),
    ],
)
def test_a_position_is_told_where_that_is_worth_a_write(told: int | None, position: int, worth: bool) -> None:
    assert worth_telling(told, position) is worth


def test_a_line_of_ten_thousand_costs_each_task_few_writes() -> None:
    told: int | None = None
    writes = 0
    for position in range(10_000, 0, -1):
        if worth_telling(told, position):
            told, writes = position, writes + 1
    assert told == 1
    assert writes <= 21


def test_who_has_come_closer_is_found() -> None:
    line = Line(Limits(total=1))
    line.ask("running", claim())
    for number in range(30):
        line.ask(f"waiting-{number:02}", claim(number))
    assert list(line.dispatch.moved()) == []
    for number in range(16):
        line.release(f"waiting-{number:02}")
    assert [key[1] for key in line.dispatch.moved()] == [f"waiting-{number}" for number in range(16, 30)]


CLAIMS = st.builds(
    claim,
    created=st.integers(0, 9000),
    namespace=st.sampled_from("ab"),
    kb_id=st.sampled_from(["kb-1", "kb-2", None]),
    type=st.sampled_from(["document_processing", "health_check"]),
    priority=st.sampled_from(["high", "normal", "low"]),
)
LIMITS = st.builds(
    Limits,
    total=st.integers(0, 4),
    namespace=st.integers(0, 3),
    knowledge_base=st.integers(0, 2),
    types=st.dictionaries(st.just("health_check"), st.integers(0, 2)),
)
STEPS = st.lists(st.tuples(st.sampled_from(["ask", "ask", "release"]), st.integers(0, 9)), max_size=40)


@given(limits=LIMITS, claims=st.lists(CLAIMS, min_size=10, max_size=10), steps=STEPS)
def test_places_are_within_the_limits_and_none_is_kept_from_who_may_have_it(
    limits: Limits, claims: list[Claim], steps: list[tuple[str, int]]
) -> None:
    holding: set[int] = set()
    waiting: set[int] = set()

    def wake(key: Key) -> None:
        waiting.discard(int(key[1]))
        holding.add(int(key[1]))

    dispatch = Dispatch(limits, wake=wake)
    for step, number in steps:
        key = (claims[number].namespace, str(number))
        if step == "ask":
            granted = dispatch.ask(key, claims[number]).granted
            (holding if granted else waiting).add(number)
        else:
            holding.discard(number)
            waiting.discard(number)
            dispatch.release(key)
        _check(limits, claims, holding)
        assert (dispatch.holders, len(dispatch)) == (len(holding), len(waiting))
        for one in waiting:
            with pytest.raises(AssertionError):
                _check(limits, claims, holding | {one})


def _check(limits: Limits, claims: list[Claim], holding: set[int]) -> None:
    """Count anew, the plain way."""
    held = [claims[number] for number in holding]
    assert not limits.total or len(held) <= limits.total
    namespaces = Counter(one.namespace for one in held)
    bases = Counter((one.namespace, one.kb_id) for one in held if one.kb_id)
    kinds = Counter(one.type for one in held)
    assert not limits.namespace or all(count <= limits.namespace for count in namespaces.values())
    assert not limits.knowledge_base or all(count <= limits.knowledge_base for count in bases.values())
    assert all(not limits.types.get(kind) or count <= limits.types[kind] for kind, count in kinds.items())


def test_the_time_that_counts_is_that_of_creation() -> None:
    early = claim(0)
    assert early.rank < replace(early, created_at=early.created_at + timedelta(seconds=1)).rank
    assert claim(0, priority="unheard of").rank > claim(0, priority="low").rank - 1


# ---------------------------------------------------------------------------------------------------------- fair shares


class Machine:
    """Places, tasks that take them, and a clock: who is given one when. All tasks take equally long, one after the other."""

    def __init__(self, limits: Limits, *, now: float = 0) -> None:
        self.now = now
        self.given: list[Key] = []
        self.claims: dict[Key, Claim] = {}
        self.dispatch = Dispatch(limits, wake=self.given.append, clock=lambda: at(self.now))

    def add(self, name: str, wanted: Claim) -> None:
        key = (wanted.namespace, name)
        self.claims[key] = wanted
        self.now = max(self.now, (wanted.created_at - at(0)).total_seconds())
        if self.dispatch.ask(key, wanted).granted:
            self.given.append(key)

    def run(self, starts: int) -> list[Claim]:
        """Let tasks end, the first to have a place first; return who was given the next places."""
        before = len(self.given)
        ended = before - self.dispatch.holders
        while len(self.given) < before + starts and self.dispatch.holders:
            self.dispatch.release(self.given[ended])
            ended += 1
        return [self.claims[key] for key in self.given[before:]]


def flooded(
    bases: list[tuple[str, str]], *, places: int, weights: dict[str, float] | None = None, tasks: int = 100
) -> Machine:
    machine = Machine(Limits(total=places, weights=weights or {}))
    for namespace, base in bases:  # each floods before the next comes
        for number in range(tasks):
            machine.add(f"{base}-{number:03}", claim(number, namespace=namespace, kb_id=base))
    return machine


def jain(service: list[int]) -> float:
    return sum(service) ** 2 / (len(service) * sum(one * one for one in service))


@pytest.mark.parametrize("places", [1, 3, 8, 50])
def test_equal_knowledge_bases_are_served_equally_whoever_came_first(places: int) -> None:
    machine = flooded([("a", f"kb-{number}") for number in range(8)], places=places)
    machine.run(places)  # what had places at the beginning
    service = Counter(one.kb_id for one in machine.run(400))
    assert jain(list(service.values())) > 0.99
    assert len(service) == 8


def test_namespaces_share_before_knowledge_bases_do() -> None:
    machine = flooded([("many", f"kb-{number}") for number in range(9)] + [("one", "kb")], places=4)
    machine.run(4)
    service = Counter(one.namespace for one in machine.run(100))
    assert abs(service["one"] - service["many"]) <= 2


@pytest.mark.parametrize("places", [1, 4, 5, 40])
def test_shares_go_by_weight(places: int) -> None:
    weights = {"a/big": 3.0, "b": 2.0}
    machine = flooded([("a", "big"), ("a", "small"), ("b", "kb")], places=places, weights=weights, tasks=300)
    machine.run(places)
    service = Counter(one.kb_id for one in machine.run(240))
    assert service["kb"] == pytest.approx(160, abs=2)
    assert service["big"] == pytest.approx(60, abs=2)
    assert service["small"] == pytest.approx(20, abs=2)


@pytest.mark.parametrize(("namespace", "base"), [("a", "seconds"), ("b", "hours")])
def test_long_tasks_leave_short_ones_their_share_of_the_places(namespace: str, base: str) -> None:
    machine = Machine(Limits(total=4))
    for number in range(10):
        machine.add(f"hours-{number}", claim(number, kb_id="hours"))
    for number in range(30):
        machine.add(f"seconds-{number:02}", claim(100 + number, namespace=namespace, kb_id=base))
    for name in ("hours-0", "hours-1"):
        machine.dispatch.release(("a", name))
    short = [key for key in machine.given if key[1].startswith("seconds")]
    assert len(short) == 2
    for _ in range(20):  # those of hours stay
        ended = short.pop(0)
        machine.dispatch.release(ended)
        assert machine.given[-1][1].startswith("seconds")
        short.append(machine.given[-1])


def test_who_was_away_saves_up_no_turns() -> None:
    machine = flooded([("a", "busy")], places=1)
    machine.run(50)
    for number in range(20):
        machine.add(f"back-{number:02}", claim(500 + number, kb_id="back"))
    service = Counter(one.kb_id for one in machine.run(20))
    assert abs(service["back"] - service["busy"]) <= 1


def test_who_was_held_back_by_its_limit_saves_up_no_turns() -> None:
    machine = Machine(Limits(total=2, knowledge_base=1))
    machine.add("long", claim(0, kb_id="limited"))
    for number in range(20):
        machine.add(f"limited-{number:02}", claim(number, kb_id="limited"))
        machine.add(f"one-{number:02}", claim(number, kb_id="one"))
        machine.add(f"two-{number:02}", claim(number, kb_id="two"))
    for _ in range(10):
        machine.dispatch.release(machine.given[-1])
    machine.dispatch.release(("a", "long"))
    assert Counter(machine.claims[key].kb_id for key in machine.given[1:])["limited"] == 1


def test_priority_goes_before_fairness_and_age_before_priority() -> None:
    machine = Machine(Limits(total=1))
    machine.add("running", claim(0, kb_id="other"))
    for number in range(5):
        machine.add(f"low-{number}", claim(number, kb_id=f"kb-{number}", priority="low"))
    machine.now = 1800
    for number in range(3):
        machine.add(f"high-{number}", claim(1800, kb_id="other", priority="high"))
    machine.add("normal", claim(1800, kb_id="kb-0", priority="normal"))
    assert [one.priority for one in machine.run(3)] == ["high"] * 3
    machine.now = 3700
    for number in range(3, 40):
        machine.add(f"high-{number}", claim(3700, kb_id="other", priority="high"))
    later = [one.priority for one in machine.run(10)]
    assert later[:9].count("low") == 5, "an hour old they share the first class with what is new and high"


@pytest.mark.parametrize("priority", ["high", "normal"])
def test_a_low_task_waits_an_hour_and_its_turn_however_many_come_before_it(priority: str) -> None:
    bases = [("abc"[number % 3], f"kb-{number}") for number in range(9)]
    machine = Machine(Limits(total=1))
    machine.add("running", claim(0, namespace="c", kb_id="kb-8"))
    machine.add("low", claim(0, namespace="a", kb_id="kb-low", priority="low"))
    for number in range(3600):  # twice as many as can be carried out
        machine.now = number
        namespace, base = bases[number % 9]
        machine.add(f"flood-{number}", claim(number, namespace=namespace, kb_id=base, priority=priority))
        if number % 2:
            machine.run(1)
    machine.now = 3600
    waited = next(number for number in range(100) if ("a", "low") in machine.given or not machine.run(1))
    assert waited <= 12, "three namespaces of at most four knowledge bases"


@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 4), st.sampled_from(["high", "normal", "low"])), max_size=60
    ),
    places=st.integers(1, 5),
)
def test_all_are_served_and_the_line_is_told_as_it_goes(arrivals: list[tuple[int, int, str]], places: int) -> None:
    machine = Machine(Limits(total=places), now=100)
    for number, (namespace, base, priority) in enumerate(arrivals):
        wanted = claim(number, namespace="abcd"[namespace], kb_id=f"kb-{base}", priority=priority)
        machine.add(f"task-{number}", wanted)
    waiting = [key for key in machine.claims if key not in machine.given]
    positions = sorted(machine.dispatch.ask(key, machine.claims[key]).position for key in waiting)
    assert positions == list(range(1, len(waiting) + 1))
    if places == 1 and waiting:
        first = min(waiting, key=lambda key: machine.dispatch.ask(key, machine.claims[key]).position)
        machine.run(1)
        assert machine.given[-1] == first
    machine.run(len(arrivals))
    assert sorted(machine.given) == sorted(machine.claims)
    assert len(machine.dispatch) == 0


def test_positions_in_a_long_line_are_near_what_they_are_and_cheap() -> None:
    machine = Machine(Limits(total=1))
    for number in range(2000):
        machine.add(f"task-{number:04}", claim(number, kb_id=f"kb-{number % 20}"))
    told = {key: machine.dispatch.ask(key, machine.claims[key]).position for key in machine.claims}
    exact = {key: position for position, key in enumerate(machine.dispatch._lines[None].order(5000), start=1)}
    assert max(abs(told[key] - position) for key, position in exact.items()) <= 2000 / 8 + 20


# -------------------------------------------------------------------------------------------------------- back-pressure


def test_while_the_stores_are_down_one_task_tries() -> None:
    line = Line(Limits(total=10))
    line.ask("one", claim(0))
    line.ask("two", claim(1))
    line.dispatch.store_down("a", "Milvus cannot be reached")
    assert line.ask("waits", claim(2)) == (1, "StoreUnavailable")
    assert line.ask("no stores", replace(claim(3), stores=False)) == (0, "")
    assert line.ask("elsewhere", claim(4, namespace="b")) == (0, "")
    line.ask("waits too", claim(5))
    line.release("one")
    assert line.woken == []
    line.release("two")
    assert line.woken == ["waits"], "the next one tries"
    line.dispatch.store_up("a")
    assert line.woken == ["waits", "waits too"]
    assert line.ask("newcomer", claim(6)) == (0, "")
