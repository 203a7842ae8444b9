"""How a client begins to follow: what it is sent first, and that nothing is missed or told twice after that."""

import asyncio
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from task_gateway.callers import ANYBODY, Caller, Callers
from task_gateway.following import Begun, Watcher, Watchers, Wish
from task_gateway.hub import Hub
from task_gateway.problems import Problem
from tests.support.event_sources import MemoryEvents, MemoryPast, event, lets_through, past_holds_the_contract
from tests.unit.test_gateway_hub import at_work, caught_up, pending, progress


class Rights:
    """Reviews of the cluster: what each may list."""

    def __init__(self, **namespaces: set[str]) -> None:
        self.namespaces = namespaces
        self.away = False

    async def review_token(self, token: str, **_: Any) -> dict[str, Any]:
        raise AssertionError("nobody asks for it")

    async def review_access(self, spec: dict[str, Any]) -> bool:
        if self.away:
            raise Problem(503, "unavailable", "cannot check")
        return spec["resourceAttributes"].get("namespace", "") in self.namespaces.get(spec["user"], set())


class NoTickets:
    async def put_ticket(self, digest: bytes, caller: str, **_: Any) -> None:
        raise AssertionError("nobody asks for it")

    async def take_ticket(self, digest: bytes) -> str | None:
        raise AssertionError("nobody asks for it")


def callers(rights: Rights | None = None) -> Callers:
    """Return who may: everybody, or those who have rights."""
    return Callers(
        reviews=rights or Rights(),
        tickets=NoTickets(),
        trusting=rights is None,
        namespaces=("knowledge", "other"),
        default_namespace="knowledge",
        believe=0,
    )


def clients(
    hub: Hub, source: MemoryEvents, *, past: MemoryPast | None = None, rights: Rights | None = None, **bounds: int
) -> Watchers:
    return Watchers(hub=hub, past=past or MemoryPast(source), callers=callers(rights), most=3, **bounds)


def told(begun: Begun) -> list[dict[str, Any]]:
    return [orjson.loads(frame.data) for frame in begun.frames]


async def test_what_is_read_from_memory_is_as_from_postgresql() -> None:
    source = MemoryEvents()
    await past_holds_the_contract(MemoryPast(source), source.tell)


async def test_a_client_is_told_where_unfinished_tasks_stand_and_then_what_happens() -> None:
    source = MemoryEvents(event("done"), event("runs"), event("done", "Completed"), event("waits", "Queued"))
    async with at_work(source) as hub:
        past = MemoryPast(source)
        past.progress[event("runs").uid] = ("parse", 20)
        watcher = clients(hub, source, past=past).watcher(ANYBODY)
        begun = await watcher.follow("all", Wish())
        source.add(event("runs", "Completed"))
        await caught_up(hub, source)
        waits, runs = told(begun)
        assert (waits["type"], waits["task_id"], waits["status"]) == ("snapshot", "waits", "queued")
        assert (runs["task_id"], runs["status"], runs["stage"], runs["progress"]) == ("runs", "processing", "parse", 20)
        assert ("event" in waits, runs["event"]) == (False, 4)  # half a snapshot is nothing to go on from
        assert [one["event"] for one in pending(watcher.subscriber)] == [5]


async def test_a_snapshot_has_the_progress_of_this_moment() -> None:
    source = MemoryEvents(event("runs"))
    async with at_work(source) as hub:
        past = MemoryPast(source)
        past.progress[event("runs").uid] = ("parse", 20)
        hub.on_progress(progress("runs", 63))
        [one] = told(await clients(hub, source, past=past).watcher(ANYBODY).follow("all", Wish()))
        assert (one["stage"], one["progress"]) == ("embed", 63)


async def test_a_named_task_is_told_of_though_it_has_ended() -> None:
    source = MemoryEvents(event("done"), event("done", "Failed", reason="DocumentEmpty"))
    async with at_work(source) as hub:
        watcher = clients(hub, source).watcher(ANYBODY)
        [one] = told(await watcher.follow("all", Wish(task_id="done")))
        assert (one["status"], one["reason"]) == ("failed", "DocumentEmpty")


@pytest.mark.parametrize(
    ("since", "kept_from", "resumed"),
    [
        (6, 1, []),
        (4, 1, [5, 6]),
        (0, 1, [1, 2, 3, 4, 5, 6]),
        (2, 3, [3, 4, 5, 6]),
        (1, 3, None),  # 2 is no longer there
        (7, 1, None),  # numbers of a database that was restored since
    ],
)
async def test_a_client_that_comes_back_is_sent_what_has_passed_or_a_snapshot_that_says_so(
    since: int, kept_from: int, resumed: list[int] | None
) -> None:
    source = MemoryEvents(*(event(f"task-{number}") for number in range(6)))
    async with at_work(source) as hub:
        watcher = clients(hub, source, past=MemoryPast(source, kept_from=kept_from)).watcher(ANYBODY)
        begun = await watcher.follow("all", Wish(since=since))
        assert (begun.resumed, begun.reset) == (resumed is not None, resumed is None)
        if resumed is None:
            assert [one["reset"] for one in told(begun)] == [True] * 6
        else:
            assert [one["event"] for one in told(begun)] == resumed
            assert all(one["type"] == "task" and "reset" not in one for one in told(begun))


@pytest.mark.parametrize("bounds", [{"reach": 3}, {"resumed": 3}])
async def test_a_client_that_is_too_far_back_gets_a_snapshot(bounds: dict[str, Any]) -> None:
    source = MemoryEvents(*(event() for _ in range(6)))
    async with at_work(source) as hub:
        watcher = clients(hub, source, **bounds).watcher(ANYBODY)
        assert (await watcher.follow("all", Wish(since=2))).reset
        assert (await watcher.follow("all", Wish(since=3))).resumed


async def test_a_snapshot_has_a_bound_and_says_when_it_is_reached() -> None:
    source = MemoryEvents(*(event(f"task-{number}") for number in range(4)))
    async with at_work(source) as hub:
        begun = await clients(hub, source, snapshot=3).watcher(ANYBODY).follow("all", Wish())
        assert [one["task_id"] for one in told(begun)] == ["task-3", "task-2", "task-1"]
        assert begun.truncated
        assert orjson.loads(begun.ready("all").data)["truncated"] is True


async def test_a_replica_that_is_behind_tells_nothing_twice() -> None:
    """The client has seen 3 at another replica; this one has handed out 1."""
    source = MemoryEvents(event())
    async with at_work(source, poll=60) as hub:
        for _ in range(3):
            source.add(event(), heard=False)
        watcher = clients(hub, source).watcher(ANYBODY)
        begun = await watcher.follow("all", Wish(since=3))
        assert (hub.position, begun.resumed, begun.event, begun.frames) == (1, True, 3, [])
        source.add(event())
        await caught_up(hub, source)
        assert [one["event"] for one in pending(watcher.subscriber)] == [4, 5]


async def test_namespaces_that_the_caller_may_not_list_stay_unheard_of() -> None:
    source = MemoryEvents(event("mine", namespace="knowledge"), event("theirs", namespace="other"))
    rights = Rights(ada={"knowledge"}, bob={"knowledge", "other"})
    async with at_work(source) as hub:
        made = clients(hub, source, rights=rights)
        ada, bob = made.watcher(Caller("ada")), made.watcher(Caller("bob"), "*")
        with pytest.raises(Problem) as refused:
            await ada.follow("theirs", Wish(namespace="other"))
        assert (refused.value.status, ada.followed) == (403, 0)
        assert [one["task_id"] for one in told(await ada.follow("all", Wish(namespace="*")))] == ["mine"]
        assert {one["task_id"] for one in told(await bob.follow("all", Wish()))} == {"mine", "theirs"}
        source.add(event("theirs", "Completed", namespace="other"))
        await caught_up(hub, source)
        assert pending(ada.subscriber) == []
        assert [one["task_id"] for one in pending(bob.subscriber)] == ["theirs"]

        assert await bob.may_still()
        rights.away = True
        assert await bob.may_still()  # nobody can tell
        rights.away = False
        rights.namespaces["bob"] = {"knowledge"}
        assert not await bob.may_still()


async def test_more_clients_than_there_is_room_for_are_refused() -> None:
    source = MemoryEvents()
    async with at_work(source) as hub:
        made = clients(hub, source)
        first = [made.watcher(ANYBODY) for _ in range(3)]
        with pytest.raises(Problem, match="more than 3 clients"):
            made.watcher(ANYBODY)
        first[0].close()
        made.watcher(ANYBODY)


async def test_nobody_follows_before_postgresql_has_answered() -> None:
    source = MemoryEvents()
    watcher = clients(Hub(source), source).watcher(ANYBODY)
    with pytest.raises(Problem) as refused:
        await watcher.follow("all", Wish())
    assert refused.value.status == 503


class Slowly(MemoryPast):
    """Takes its time for an answer: things happen before and after it is read."""

    async def standing(self, *args: Any, **options: Any) -> Any:
        await asyncio.sleep(0)
        found = await super().standing(*args, **options)
        await asyncio.sleep(0)
        return found

    async def events_between(self, *args: Any, **options: Any) -> Any:
        await asyncio.sleep(0)
        found = await super().events_between(*args, **options)
        await asyncio.sleep(0)
        return found


# An event of one of three tasks; the client reads; its connection is lost and it comes back, to one of two replicas.
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("event"), st.integers(0, 2)),
        st.tuples(st.just("reads"), st.just(0)),
        st.tuples(st.just("comes back"), st.integers(0, 1)),
        st.tuples(st.just("turn"), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=80)
@given(steps=_STEPS, kb_id=st.sampled_from([(), ("kb-1",), ("kb-0", "kb-2")]))
def test_a_client_that_comes_back_to_any_replica_misses_nothing_and_hears_nothing_twice(
    steps: list[tuple[str, int]], kb_id: tuple[str, ...]
) -> None:
    asyncio.run(_live(steps, Wish(kb_id=kb_id)))


async def _live(steps: list[tuple[str, int]], wish: Wish) -> None:
    source = MemoryEvents(event("task-0", kb_id="kb-0"))
    other = Mirror(source)
    seen: list[int] = []
    async with at_work(source) as here, at_work(other) as there:
        replicas = [clients(hub, source, past=Slowly(source)) for hub in (here, there)]
        client = replicas[0].watcher(ANYBODY)
        since = (await client.follow("all", wish)).event
        began = since

        async def come_back(watcher: Watcher) -> int:
            begun = await watcher.follow("all", wish.model_copy(update={"since": since}))
            assert begun.resumed
            seen.extend(one["event"] for one in told(begun))
            return begun.event

        for step, which in steps:
            match step:
                case "event":
                    other.hear(source.add(event(f"task-{which}", kb_id=f"kb-{which}")))
                case "reads":
                    numbers = [one["event"] for one in pending(client.subscriber)]
                    seen.extend(numbers)
                    since = max([since, *numbers])
                case "comes back":
                    client.close()
                    client = replicas[which].watcher(ANYBODY)
                    since = await come_back(client)
                case _:
                    await asyncio.sleep(0)
        await caught_up(here, source)
        await caught_up(there, source)
        seen.extend(one["event"] for one in pending(client.subscriber))
    wanted = await client._filter(wish)
    assert seen == [one.number for one in source.events if one.number > began and lets_through(wanted, one)]


class Mirror(MemoryEvents):
    """The same events, heard of by another replica at its own pace."""

    def __init__(self, source: MemoryEvents) -> None:
        super().__init__()
        self.events = source.events

    def hear(self, number: int) -> None:
        if number % 2:  # every other notification is lost
            self._heard.set()
