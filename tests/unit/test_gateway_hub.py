"""The hub: whom what happens to a task is told, in which order, and what becomes of clients that do not keep up."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from task_contract.messages import ProgressEvent
from task_contract.models import Stage
from task_gateway.hub import Drop, Dropped, Filter, Hub, SourceUnavailable, Subscriber, Update, task_update
from tests.support.event_sources import MemoryEvents, event, holds_the_contract
from tests.support.operator_lab import until

EVERYTHING = Filter(None)


async def no_wait(seconds: float) -> None:
    """Wait for nothing but the others."""
    await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def at_work(source: MemoryEvents, **options: Any) -> AsyncIterator[Hub]:
    settled: dict[str, Any] = {"poll": 0.01, "sleep": no_wait} | options
    hub = Hub(source, **settled)
    work = asyncio.create_task(hub.run())
    try:
        async with asyncio.timeout(20):
            await hub.ready()
            yield hub
    finally:
        work.cancel()
        await asyncio.wait([work])


async def caught_up(hub: Hub, source: MemoryEvents) -> None:
    async def look() -> bool:
        return hub.position == (source.events[-1].number if source.events else 0)

    await until("the hub has read all events", look, seconds=10, interval=0)


def pending(subscriber: Subscriber) -> list[dict[str, Any]]:
    """Return all that waits for a client, as it goes over the wire."""
    told: list[dict[str, Any]] = []
    while True:
        taking = subscriber.take()
        try:
            taking.send(None)
        except StopIteration as taken:
            told += [orjson.loads(one.data) for one in taken.value]
        else:
            taking.close()  # it waits: there is nothing more
            return told


def progress(
    name: str = "handbook", percent: int = 50, *, attempt: int = 1, stage: Stage = Stage.EMBED, namespace: str = "knowledge"
) -> ProgressEvent:
    at = datetime(2026, 1, 1, 12, 5, tzinfo=UTC)
    uid = event(name, namespace=namespace).uid
    return ProgressEvent(uid=uid, namespace=namespace, name=name, attempt=attempt, stage=stage, progress=percent, at=at)


async def test_events_in_memory_are_as_those_of_postgresql() -> None:
    source = MemoryEvents()
    await source.connect()
    await holds_the_contract(source, source.tell)


async def test_a_source_that_is_away_says_so() -> None:
    source = MemoryEvents()
    with pytest.raises(SourceUnavailable):
        await source.head()
    source.leave()
    with pytest.raises(SourceUnavailable):
        await source.connect()


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (EVERYTHING, ["a1", "a2", "b1", "bare"]),
        (Filter(frozenset({"a"})), ["a1", "a2", "bare"]),
        (Filter(frozenset({"a", "b"})), ["a1", "a2", "b1", "bare"]),
        (Filter(frozenset({"a", "b"}), kb_ids=frozenset({"kb-1"})), ["a1", "b1"]),
        (Filter(None, kb_ids=frozenset({"kb-1", "kb-2"})), ["a1", "a2", "b1"]),
        (Filter(frozenset({"a"}), task_ids=frozenset({"a2", "b1", "none"})), ["a2"]),
        (Filter(None, kb_ids=frozenset({"kb-2"}), task_ids=frozenset({"a1", "a2"})), ["a2"]),
        (Filter(frozenset()), []),
    ],
)
async def test_a_filter_lets_through_what_it_names(wanted: Filter, names: list[str]) -> None:
    source = MemoryEvents()
    async with at_work(source) as hub:
        client = hub.subscriber()
        client.follow("all", wanted)
        for name, namespace, kb_id in (("a1", "a", "kb-1"), ("a2", "a", "kb-2"), ("b1", "b", "kb-1"), ("bare", "a", None)):
            source.add(event(name, "Queued", namespace=namespace, kb_id=kb_id))
        await caught_up(hub, source)
        assert [told["task_id"] for told in pending(client)] == names


async def test_an_update_that_two_filters_let_through_comes_once() -> None:
    source = MemoryEvents()
    async with at_work(source) as hub:
        client = hub.subscriber()
        client.follow("base", Filter(None, kb_ids=frozenset({"kb-42"})))
        client.follow("task", Filter(None, task_ids=frozenset({"handbook"})))
        source.add(event())
        await caught_up(hub, source)
        assert len(pending(client)) == 1


async def test_nothing_comes_of_what_is_followed_no_longer() -> None:
    source = MemoryEvents()
    async with at_work(source) as hub:
        client = hub.subscriber()
        client.follow("base", EVERYTHING)
        source.add(event("before"))
        await caught_up(hub, source)
        assert client.unfollow("base")
        assert not client.unfollow("base")
        source.add(event("after"))
        await caught_up(hub, source)
        assert pending(client) == []
        client.close()
        assert (hub.subscribers, hub._routes) == (0, {})


async def test_what_is_part_of_a_snapshot_is_not_told_again() -> None:
    source = MemoryEvents()
    async with at_work(source) as hub:
        client = hub.subscriber()
        client.follow("new", EVERYTHING)
        for _ in range(4):
            source.add(event())
        await caught_up(hub, source)
        client.raise_floor("new", 3)
        client.raise_floor("gone", 9)  # a filter that is followed no longer
        assert [told["event"] for told in pending(client)] == [4]


async def test_only_the_latest_progress_waits_and_none_after_its_transition() -> None:
    source = MemoryEvents(event("one"), event("two"))
    async with at_work(source) as hub:
        client = hub.subscriber()
        client.follow("all", EVERYTHING)
        for percent in range(0, 60, 10):
            hub.on_progress(progress("one", percent))
            hub.on_progress(progress("two", percent))
        source.add(event("one", "Completed"))
        await caught_up(hub, source)
        told = [(one["task_id"], one["status"], one["progress"], one.get("event")) for one in pending(client)]
        assert told == [("two", "processing", 50, None), ("one", "completed", 100, 3)]


async def test_progress_that_comes_before_its_transition_is_told_with_it() -> None:
    source = MemoryEvents(event("one", "Queued"))
    async with at_work(source) as hub:
        client = hub.subscriber()
        client.follow("all", EVERYTHING)
        hub.on_progress(progress("one", 7))
        assert pending(client) == []
        source.add(event("one"))
        await caught_up(hub, source)
        [told] = pending(client)
        assert (told["status"], told["progress"], told["stage"]) == ("processing", 7, "embed")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (progress("one", 50, attempt=2), [50]),
        (progress("one", 50, attempt=1), []),  # of a pod that does not stop
        (progress("one", 50, attempt=3), []),  # the table does not have that one yet
        (progress("unknown", 50), []),
    ],
)
async def test_progress_is_that_of_the_attempt_that_runs(said: ProgressEvent, told: list[int]) -> None:
    source = MemoryEvents(event("one", attempt=1), event("one", "Retrying", attempt=1), event("one", attempt=2))
    async with at_work(source) as hub:
        client = hub.subscriber()
        client.follow("all", EVERYTHING)
        hub.on_progress(said)
        hub.on_progress(said)  # what is no news is not told
        assert [one["progress"] for one in pending(client)] == told


async def test_of_a_batch_each_ended_document_is_told_and_no_pod_that_knows_less() -> None:
    source = MemoryEvents(event("one"))
    async with at_work(source) as hub:
        client = hub.subscriber()
        client.follow("all", EVERYTHING)
        told = []
        for done in (1, 2, 1, 3):
            counted = {"done": done, "total": 900, "progress": 100 * done // 900}
            hub.on_progress(progress("one").model_copy(update=counted))
            told += [(one["done"], one["total"], one["progress"]) for one in pending(client)]
        assert told == [(1, 900, 0), (2, 900, 0), (3, 900, 0)]


async def test_progress_of_a_finished_task_is_not_told() -> None:
    source = MemoryEvents(event())
    async with at_work(source) as hub:
        client = hub.subscriber()
        client.follow("all", EVERYTHING)
        hub.on_progress(progress(percent=20))
        source.add(event(phase="Failed"))
        await caught_up(hub, source)
        assert hub.latest(event().uid) is None
        hub.on_progress(progress(percent=30))
        assert [one["status"] for one in pending(client)] == ["failed"]


async def test_a_client_that_does_not_keep_up_is_dropped_and_the_others_get_all() -> None:
    source = MemoryEvents()
    async with at_work(source) as hub:
        slow, fast = hub.subscriber(limit=5), hub.subscriber(limit=5)
        slow.follow("all", EVERYTHING)
        fast.follow("all", EVERYTHING)
        told = []
        for _ in range(8):
            source.add(event())
            await caught_up(hub, source)
            told += pending(fast)
        assert [one["event"] for one in told] == list(range(1, 9))
        assert slow.gone.result() is Drop.SLOW
        with pytest.raises(Dropped):
            await slow.take()
        assert hub.drops[Drop.SLOW] == 1


async def test_progress_makes_room_for_transitions_and_drops_nobody() -> None:
    names = [f"task-{number}" for number in range(9)]
    source = MemoryEvents(*(event(name) for name in names))
    async with at_work(source) as hub:
        client = hub.subscriber(limit=5)
        client.follow("all", EVERYTHING)
        for name in names:
            hub.on_progress(progress(name))
        for name in names[5:8]:
            source.add(event(name, "Completed"))
        await caught_up(hub, source)
        told = pending(client)
        assert [one["task_id"] for one in told if one["status"] == "completed"] == names[5:8]
        assert len(told) == 5
        assert not client.gone.done()


async def test_no_event_is_passed_over_when_the_source_was_away() -> None:
    source = MemoryEvents(event("before"))
    async with at_work(source) as hub:
        client = hub.subscriber(limit=5000)
        client.follow("all", EVERYTHING)
        source.leave()
        for number in range(2500):  # more than are read at once
            source.add(event(f"task-{number}"), heard=False)
        source.come_back()
        await caught_up(hub, source)
        assert [one["event"] for one in pending(client)] == list(range(2, 2502))


async def test_a_lost_notification_costs_a_moment_only() -> None:
    source = MemoryEvents()
    async with at_work(source) as hub:
        client = hub.subscriber()
        client.follow("all", EVERYTHING)
        source.add(event(), heard=False)
        await caught_up(hub, source)
        assert len(pending(client)) == 1


async def test_a_restored_database_parts_with_all_clients() -> None:
    source = MemoryEvents(*(event() for _ in range(5)))
    async with at_work(source) as hub:
        client = hub.subscriber()
        client.follow("all", EVERYTHING)
        source.restore(upto=2)
        assert await client.gone is Drop.RESET
        again = hub.subscriber()
        assert again.follow("all", EVERYTHING) == 2
        source.add(event("after"))
        await caught_up(hub, source)
        assert [(one["event"], one["task_id"]) for one in pending(again)] == [(3, "after")]


async def test_a_gateway_that_stops_parts_with_all_clients_and_takes_no_more() -> None:
    async with at_work(MemoryEvents()) as hub:
        client = hub.subscriber()
        hub.close()
        assert await client.gone is Drop.CLOSING
        assert await hub.subscriber().gone is Drop.CLOSING


async def test_nobody_can_follow_before_the_source_has_answered() -> None:
    hub = Hub(MemoryEvents())
    with pytest.raises(SourceUnavailable, match="PostgreSQL has not answered"):
        hub.subscriber().follow("all", EVERYTHING)


async def test_what_the_hub_knows_of_running_tasks_has_a_bound() -> None:
    source = MemoryEvents(*(event(f"task-{number}") for number in range(5)))
    async with at_work(source, most_running=3) as hub:
        for number in range(5, 9):
            source.add(event(f"task-{number}"))
            hub.on_progress(progress(f"task-{number}"))
        await caught_up(hub, source)
        assert (len(hub._running), len(hub._progress)) == (3, 3)
        client = hub.subscriber()
        client.follow("all", EVERYTHING)
        hub.on_progress(progress("task-8", 80))  # the youngest are kept
        assert [one["progress"] for one in pending(client)] == [80]


def test_a_deleted_task_is_told_as_canceled() -> None:
    told = task_update(event(phase="Deleted", reason="Deleted"), None, number=7)
    assert (told["status"], told["reason"], told["event"]) == ("canceled", "Deleted", 7)
    assert told["at"] == "2026-01-01T12:00:00Z"


# Events of four tasks in two namespaces, progress, losses of the connection, and reading by one of two clients.
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("event"), st.integers(0, 3)),
        st.tuples(st.just("progress"), st.integers(0, 3)),
        st.tuples(st.just("lost"), st.just(0)),
        st.tuples(st.just("read"), st.integers(0, 1)),
    ),
    max_size=60,
)
_FILTERS = st.builds(
    Filter,
    st.one_of(st.none(), st.frozensets(st.sampled_from(["a", "b"]), max_size=2)),
    kb_ids=st.frozensets(st.sampled_from(["kb-0", "kb-1"]), max_size=1),
    task_ids=st.frozensets(st.sampled_from(["t0", "t1", "t2"]), max_size=2),
)


@settings(max_examples=60)
@given(steps=_STEPS, filters=st.tuples(_FILTERS, _FILTERS))
def test_every_client_gets_each_transition_that_its_filter_lets_through_once_and_in_order(
    steps: list[tuple[str, int]], filters: tuple[Filter, Filter]
) -> None:
    asyncio.run(_live(steps, filters))


async def _live(steps: list[tuple[str, int]], filters: tuple[Filter, Filter]) -> None:
    source = MemoryEvents()
    got: tuple[list[int], list[int]] = ([], [])
    async with at_work(source) as hub:
        clients = [hub.subscriber(), hub.subscriber()]
        for client, wanted in zip(clients, filters, strict=True):
            client.follow("all", wanted)
        for percent, (step, which) in enumerate(steps):
            name, namespace, kb_id = f"t{which}", "ab"[which % 2], f"kb-{which // 2}"
            match step:
                case "event":
                    source.add(event(name, "Processing", namespace=namespace, kb_id=kb_id))
                case "progress":
                    hub.on_progress(progress(name, percent, namespace=namespace))
                case "lost":
                    source.leave()
                    await asyncio.sleep(0)
                    source.come_back()
                case _:
                    got[which].extend(one["event"] for one in pending(clients[which]) if "event" in one)
            await asyncio.sleep(0)
        await caught_up(hub, source)
        for client, numbers in zip(clients, got, strict=True):
            numbers.extend(one["event"] for one in pending(client) if "event" in one)
    for wanted, numbers in zip(filters, got, strict=True):
        assert numbers == [
            one.number
            for one in source.events
            if wanted.matches(Update(one.uid, one.namespace, one.name, one.kb_id, one.number, b""))
        ]
