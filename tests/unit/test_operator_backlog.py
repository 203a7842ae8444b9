"""Rows on their way to PostgreSQL: the newest version wins, memory is bounded, and an API server restored from a backup."""

import asyncio
import itertools
import random
import tracemalloc
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from task_contract.models import Phase
from task_operator.backlog import LIMIT, Backlog, Row
from task_operator.cache import Cache
from task_operator.controller import VersionsWentBack
from task_operator.jobs import parse_time
from task_operator.projection import _values
from task_platform.kubernetes import Page
from tests.support.operator_values import at, manifest, processing, success
from tests.support.operator_world import KEY, Operator, World

FULL_SPEC = {"payload": {"filePath": "/data/handbook.pdf", "metadata": {f"label-{n}": "x" * 40 for n in range(10)}}}


def row(version: int, *, uid: str = "a", **more: Any) -> Row:
    return Row(uid=uid, version=version, values=(uid, f"version {version}"), **more)


def real_row(version: int, *, deleted: bool = False, uid: str | None = None) -> Row:
    """Return the row of an ordinary task, with texts of its own as a row from the network has."""
    made = manifest(spec=FULL_SPEC, status=processing(progress=version % 100))
    uid = uid or str(uuid.uuid4())
    made["metadata"] |= {"uid": uid, "resourceVersion": str(version), "name": f"task-{uid}"}
    return Row(
        uid=uid, version=version, values=_values(made, deleted_at=at(0) if deleted else None, now=at(0)), deleted=deleted
    )


def test_of_one_task_only_the_newest_version_waits_and_9_is_older_than_10() -> None:
    backlog = Backlog()
    for version in (9, 10, 9, 10, 8):
        backlog.put(row(version), now=version)
    (waiting,) = backlog.batch(100)
    assert waiting.version == 10
    assert backlog.oldest() == 9
    backlog.settle(waiting)
    assert (len(backlog), backlog.size, backlog.stored("a")) == (0, 0, 10)
    assert not backlog.wants("a", 10)
    assert backlog.wants("a", 11)


def test_a_version_that_comes_while_the_one_before_is_written_waits_for_the_next_batch() -> None:
    backlog = Backlog()
    backlog.put(row(1), now=0)
    (being_written,) = backlog.batch(100)
    backlog.put(row(2), now=1)
    backlog.settle(being_written)
    assert [one.version for one in backlog.batch(100)] == [2]


def test_batches_begin_with_what_has_waited_longest() -> None:
    backlog = Backlog()
    for number in range(5):
        backlog.put(row(number, uid=str(number)), now=number)
    backlog.put(row(100, uid="0"), now=100)
    assert [one.uid for one in backlog.batch(2)] == ["0", "1"]


def test_memory_is_bounded_over_ten_minutes_without_postgresql_and_a_list_brings_what_was_dropped() -> None:
    """Two new tasks a second, two versions of each, and a small part of the room: 1,200 tasks where some 400 may wait."""
    limit = LIMIT // 32
    backlog = Backlog(limit)
    alive: dict[str, int] = {}
    versions = itertools.count(1)
    tracemalloc.start()
    try:
        for second in range(600):
            for _ in range(2):
                uid = str(uuid.uuid4())
                for version in (next(versions), next(versions)):
                    if backlog.wants(uid, version):
                        backlog.put(real_row(version, uid=uid), now=second)
                alive[uid] = version
            assert backlog.size <= limit
        alive_bytes = 300 * len(alive)  # what this test itself remembers
        assert tracemalloc.get_traced_memory()[0] - alive_bytes < 1.5 * limit
    finally:
        tracemalloc.stop()
    assert backlog.incomplete
    assert backlog.oldest() == 0
    assert backlog.forgotten == 0

    table: dict[str, int] = {}

    def drain() -> None:
        while batch := backlog.batch(500):
            for one in batch:
                table[one.uid] = one.version
                backlog.settle(one)

    drain()  # PostgreSQL is back
    assert len(table) < len(alive)
    backlog.restart(table)
    lost = backlog.newest()
    for uid, version in alive.items():
        if backlog.wants(uid, version, lost=lost):
            backlog.put(real_row(version, uid=uid), now=600)
        if backlog.half_full:
            drain()
    drain()
    assert table == alive
    assert len(backlog) == 0


def test_the_estimate_of_a_rows_size_is_near_the_truth() -> None:
    backlog = Backlog()
    tracemalloc.start()
    for number in range(500):
        parse_time.cache_clear()  # tasks of different times share none
        backlog.put(real_row(number), now=0)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.6 * used < backlog.size < 1.6 * used


def test_the_last_rows_of_deleted_tasks_displace_those_that_a_list_brings_again() -> None:
    size = row(1).size
    backlog = Backlog(limit=3 * size)
    for uid in "abc":
        backlog.put(row(1, uid=uid), now=0)
    backlog.put(row(2, uid="d"), now=0)
    assert ([one.uid for one in backlog.batch(9)], backlog.incomplete) == (["a", "b", "c"], True)
    backlog.restart({})
    for uid in "efg":
        backlog.put(row(2, uid=uid, deleted=True), now=0)
    assert ([one.uid for one in backlog.batch(9)], backlog.incomplete, backlog.forgotten) == (["e", "f", "g"], True, 0)
    backlog.put(row(2, uid="h", deleted=True), now=0)
    assert (len(backlog), backlog.forgotten) == (3, 1)


def test_what_was_removed_from_the_table_is_wanted_again() -> None:
    backlog = Backlog()
    backlog.put(row(5), now=0)
    backlog.settle(backlog.batch(1)[0])
    assert not backlog.wants("a", 5)
    backlog.restart({})
    assert backlog.wants("a", 5)
    assert backlog.stored("a") is None


def test_a_lower_version_counts_only_if_the_higher_one_was_known_before_the_list() -> None:
    backlog = Backlog()
    backlog.put(row(900), now=0)
    lost = backlog.newest()
    backlog.put(row(950), now=1)  # an event that comes while the list is under way
    backlog.put(row(940, lost=lost, listed=True), now=2)
    assert [one.version for one in backlog.batch(9)] == [950]

    lost = backlog.newest()
    backlog.put(row(510, lost=lost, listed=True), now=3)
    backlog.put(row(520), now=4)
    (waiting,) = backlog.batch(9)
    assert (waiting.version, waiting.lost, waiting.listed) == (520, 950, True), "the table has to learn of the loss"


def test_an_event_that_waits_is_confirmed_by_a_list_of_the_same_version() -> None:
    backlog = Backlog()
    backlog.put(row(510), now=0)
    (being_written,) = backlog.batch(9)
    backlog.confirm("a", lost=900)
    backlog.confirm("b", lost=900)
    assert not backlog.wants("a", 510, lost=900)
    backlog.settle(being_written, written=False)  # the table has 900
    assert backlog.stored("a") is None
    (waiting,) = backlog.batch(9)
    assert (waiting.version, waiting.lost, waiting.listed) == (510, 900, True)
    backlog.settle(waiting)
    assert backlog.stored("a") == 510


# ------------------------------------------------------------------------------------------------------------ the cache


def _task(version: int, **parts: Any) -> dict[str, Any]:
    made = manifest(**parts)
    made["metadata"] |= {"resourceVersion": str(version)}
    return made


def test_a_task_that_is_gone_does_not_come_back() -> None:
    cache = Cache()
    cache.put_task(_task(900, uid="one"))
    assert cache.drop_task(KEY, uid="one")
    assert not cache.put_task(_task(900, uid="one")), "a page of a list from before it went"
    assert not cache.put_task(_task(901, uid="one")), "an answer that was under way"
    assert cache.put_task(_task(902, uid="two"))


# ------------------------------------------------------------------------------------------------------- the controller


@pytest.mark.parametrize("moment", range(6))
async def test_a_task_goes_on_after_the_api_server_was_restored(moment: int) -> None:
    world = World()
    world.version = 1000
    world.add_task()
    operator = Operator(world)
    for number, step in enumerate(["settle", "run", "settle", "end", "settle", "none"]):
        if number == moment:
            world.restore()
            operator.deliver(lose=True)
        match step:
            case "settle":
                await operator.settle()
            case "run":
                assert world.run_pod()
            case "end":
                assert world.end_pod(success())
    await operator.finish()
    assert world.status["phase"] == Phase.COMPLETED
    assert world.created == 1


async def test_a_task_that_went_back_is_noticed_even_when_versions_have_caught_up() -> None:
    world = World()
    world.version = 1000
    world.add_task()
    operator = Operator(world)
    await operator.settle()
    world.tasks[KEY]["metadata"]["resourceVersion"] = "510"
    world.version = 5000
    await operator.look(resync=True)
    assert operator.crashes == 1


async def test_a_task_that_comes_while_a_list_is_under_way_is_not_taken_for_gone() -> None:
    world = World()
    world.add_task()
    operator = Operator(world)
    await operator.settle()
    controller = operator._controller
    assert controller is not None
    listed = await anext(world.list_tasks(None))
    fresh = _task(world.version, uid="fresh")
    fresh["metadata"]["name"] = "fresh"

    async def list_tasks(namespace: str | None) -> AsyncIterator[Page]:
        controller.on_task("ADDED", fresh)  # its event overtakes the list
        yield listed

    world.list_tasks = list_tasks  # type: ignore[method-assign]  # a list that is slow
    await controller._resync()
    assert {key[1] for key, _ in controller._cache.tasks()} == {"handbook", "fresh"}


async def test_a_watch_that_opens_again_on_a_restored_api_server_ends_the_process() -> None:
    world = World()
    world.version = 1000
    world.add_task()
    operator = Operator(world)
    await operator.settle()
    controller = operator._controller
    assert controller is not None
    checking = asyncio.create_task(controller._check_versions_forever())
    controller.check_versions()
    await asyncio.sleep(0.01)
    assert not checking.done()
    world.restore()
    controller.check_versions()
    with pytest.raises(VersionsWentBack, match="restored from a backup"):
        await asyncio.wait_for(checking, 5)


async def test_what_a_restored_api_server_does_not_know_any_more_is_gone_and_what_it_knows_anew_stays() -> None:
    world = World()
    world.version = 1000
    world.add_task()
    operator = Operator(world)
    await operator.settle()
    lost = world.tasks.pop(KEY)
    world.jobs.clear()
    world.version = 500
    new = _task(501, uid=str(uuid.UUID(int=random.Random(1).getrandbits(128))))
    new["metadata"]["name"] = "another"
    world.tasks[("knowledge", "another")] = new
    await operator.look(resync=True)
    assert operator.crashes == 1, "its watches would wait for versions that do not come"
    await operator.look()
    controller = operator._controller
    assert controller is not None
    assert [key[1] for key, _ in controller._cache.tasks()] == ["another"]
    assert world.fences == {lost["metadata"]["uid"]}
