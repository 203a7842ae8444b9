"""Texts of several attempts in one call of the model: who shares it, whose turn it is, and who fails."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job_runner.embed import PACKAGED_MODEL, make_embedder
from job_runner.shared_model import Line, Request, SharedModel, SharedModels, embed_for
from job_runner.watchdog import Pulse, Watchdog
from tests.support.runner_lab import HashEmbedder

REQUESTS = st.lists(
    st.tuples(st.sampled_from("abc"), st.lists(st.integers(1, 40), min_size=1, max_size=6)), min_size=1, max_size=12
)


def request(party: str, sizes: Sequence[int]) -> Request:
    return Request([f"{party}{number}" for number in range(len(sizes))], sizes, party=party)


def calls(line: Line, *, most: int, budget: int) -> Iterator[dict[Request, list[int]]]:
    while line.texts:
        yield line.take(most, budget)


# ------------------------------------------------------------------------------------------------------------ the line


@given(REQUESTS, st.integers(1, 8), st.integers(1, 60))
def test_every_text_is_in_one_call_and_calls_keep_their_bounds(
    wanted: list[tuple[str, list[int]]], most: int, budget: int
) -> None:
    line = Line()
    requests = [request(party, sizes) for party, sizes in wanted]
    for one in requests:
        line.add(one)
    assert line.texts == sum(len(sizes) for _, sizes in wanted)
    seen: dict[Request, list[int]] = {one: [] for one in requests}
    for call in calls(line, most=most, budget=budget):
        sizes = [one.sizes[index] for one, indices in call.items() for index in indices]
        assert 1 <= len(sizes) <= most
        assert len(sizes) == 1 or len(sizes) * max(sizes) <= budget
        for one, indices in call.items():
            seen[one] += indices
    assert all(indices == list(range(len(one.texts))) for one, indices in seen.items())
    assert list(line) == []


@given(REQUESTS, st.integers(1, 8))
def test_no_knowledge_base_that_waits_is_two_texts_behind_another(wanted: list[tuple[str, list[int]]], most: int) -> None:
    line = Line()
    for party, sizes in wanted:
        line.add(request(party, sizes))
    waiting = Counter({party: sum(len(sizes) for name, sizes in wanted if name == party) for party, _ in wanted})
    served: Counter[str] = Counter()
    for call in calls(line, most=most, budget=10**6):
        for one, indices in call.items():
            served[one.party] += len(indices)
            waiting[one.party] -= len(indices)
        behind = min((served[party] for party in waiting if waiting[party]), default=0)
        ahead = max((served[party] for party in waiting if waiting[party]), default=0)
        assert ahead - behind <= 1


def test_requests_of_a_knowledge_base_take_turns() -> None:
    line = Line()
    long, short = request("a", [1] * 64), request("a", [1])
    line.add(long)
    line.add(short)
    assert line.take(2, 100) == {long: [0], short: [0]}


def test_who_did_not_fit_is_first_in_the_next_call() -> None:
    line = Line()
    small, large, other = request("a", [1, 1, 1]), request("b", [50]), request("c", [1])
    for one in (small, large, other):
        line.add(one)
    assert line.take(64, 60) == {small: [0, 1, 2], other: [0]}
    line.add(later := request("a", [1]))
    assert line.take(64, 60) == {large: [0]}
    assert line.take(64, 60) == {later: [0]}


def test_what_is_dropped_does_not_come_again() -> None:
    line = Line()
    failed, other = request("a", [1, 1, 1]), request("a", [1])
    line.add(failed)
    line.add(other)
    line.take(1, 10)
    line.drop(failed)
    line.drop(failed)
    assert line.texts == 1
    assert line.take(64, 10) == {other: [0]}


# ----------------------------------------------------------------------------------------------------------- the model


class Recorded(HashEmbedder):
    """Notes the texts of each call. The first call waits until it is let go, so that others gather meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[str]] = []
        self.entered = threading.Event()
        self.go = threading.Event()

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.batches.append(list(texts))
        self.entered.set()
        assert self.go.wait(10)
        if any("poison" in text for text in texts):
            raise ValueError("poison")
        return super().embed(texts)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def ask(pool: ThreadPoolExecutor, model: SharedModel, *texts: str, party: str = "") -> "Future[npt.NDArray[np.float32]]":
    context = copy_context()
    context.run(embed_for, party)
    return pool.submit(context.run, model.embed, list(texts))


def gathered(model: SharedModel, count: int) -> None:
    """Wait until so many requests are in line or under way."""
    deadline = time.monotonic() + 10
    while len(model._waiting) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_texts_that_wait_together_share_a_call_and_each_gets_its_own_vectors(pool: ThreadPoolExecutor) -> None:
    inner = Recorded()
    model = SharedModel(inner, batch_size=64, wait_seconds=0)
    first = ask(pool, model, "first")
    assert inner.entered.wait(10)
    others = {number: ask(pool, model, f"{number} a", f"{number} b", party=str(number)) for number in range(8)}
    gathered(model, 9)
    inner.go.set()
    alone = HashEmbedder()
    assert np.array_equal(first.result(10), alone.embed(["first"]))
    for number, one in others.items():
        assert np.array_equal(one.result(10), alone.embed([f"{number} a", f"{number} b"]))
    assert [len(batch) for batch in inner.batches] == [1, 16]
    assert (model.calls, model.texts, model.room) == (2, 17, 128)


def test_a_request_that_is_larger_than_a_call_is_put_together_again(pool: ThreadPoolExecutor) -> None:
    inner = Recorded()
    inner.go.set()
    model = SharedModel(inner, batch_size=4, wait_seconds=0)
    texts = [f"text {number}" for number in range(10)]
    assert np.array_equal(ask(pool, model, *texts).result(10), HashEmbedder().embed(texts))
    assert [len(batch) for batch in inner.batches] == [4, 4, 2]


def test_a_poison_text_fails_its_own_request_alone(pool: ThreadPoolExecutor) -> None:
    inner = Recorded()
    model = SharedModel(inner, batch_size=4, wait_seconds=0)
    first = ask(pool, model, "first")
    assert inner.entered.wait(10)
    good = [ask(pool, model, f"good {number}", party=str(number)) for number in range(3)]
    bad = ask(pool, model, *["poison"] * 6, party="bad")
    gathered(model, 5)
    inner.go.set()
    with pytest.raises(ValueError, match="poison"):
        bad.result(10)
    for one in (first, *good):
        assert one.result(10).shape == (1, 16)
    assert ask(pool, model, "later").result(10).shape == (1, 16)
    assert sum(text == "poison" for batch in inner.batches for text in batch) < 12  # what is left of it is not tried


def test_a_call_waits_for_others_no_longer_than_it_may(pool: ThreadPoolExecutor) -> None:
    inner = Recorded()
    inner.go.set()
    model = SharedModel(inner, batch_size=64, wait_seconds=0.2)
    started = time.monotonic()
    ask(pool, model, "alone").result(10)
    assert 0.2 <= time.monotonic() - started < 5


def test_a_call_for_which_nobody_else_can_ask_does_not_wait(pool: ThreadPoolExecutor) -> None:
    inner = Recorded()
    inner.go.set()
    model = SharedModel(inner, batch_size=64, wait_seconds=60, may_ask=lambda: 2)
    both = [ask(pool, model, "one"), ask(pool, model, "two")]
    for one in both:
        one.result(10)
    assert [sorted(batch) for batch in inner.batches] == [["one", "two"]]


def test_who_waits_in_line_does_not_stall_while_the_model_goes_on(pool: ThreadPoolExecutor) -> None:
    inner = Recorded()
    model = SharedModel(inner, batch_size=1, wait_seconds=0)
    now = [0.0]
    pulse = Pulse(lambda: now[0])
    with Watchdog(pulse, limit=60, on_stall=lambda: None, in_loop=lambda function: function()):
        waiting = ask(pool, model, "a", "b")
    gathered(model, 1)
    now[0] = 50.0
    assert pulse.left(60) == 10
    inner.go.set()
    waiting.result(10)
    assert pulse.left(60) == 60


def test_no_text_is_no_call() -> None:
    model = SharedModel(make_embedder(PACKAGED_MODEL), batch_size=4)
    assert model.embed([]).shape == (0, 512)
    assert model.calls == 0


def test_vectors_of_the_packaged_model_are_those_of_texts_alone(pool: ThreadPoolExecutor) -> None:
    """To the last bit but one: what linear algebra adds up in another order differs by its rounding."""
    inner = make_embedder(PACKAGED_MODEL)
    model = SharedModels(lambda name, *, threads: inner, batch_size=16)(PACKAGED_MODEL)
    texts = ["one", "二つの文", "a long text, " * 50, "", "zażółć gęślą jaźń", "6"]
    joint = [ask(pool, model, text, party=text) for text in texts]
    for text, found in zip(texts, joint, strict=True):
        np.testing.assert_allclose(found.result(30), inner.embed([text]), rtol=0, atol=1e-6)


def test_a_model_is_made_once() -> None:
    made: list[str] = []

    def make(name: str, *, threads: int) -> HashEmbedder:
        made.append(name)
        return HashEmbedder()

    models = SharedModels(make, batch_size=4)
    assert models.known("a") is None
    first = models("a", threads=2)
    assert models("a") is first is models.known("a")
    models("b").embed(["text"])
    assert made == ["a", "b"]
    assert models.totals == (1, 1, 4)
