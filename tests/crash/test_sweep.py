"""A sweep may die after any write: the next one removes what is left, and what readers or tasks need is never gone."""

import asyncio

import pytest

from tests.crash.faults import Kind
from tests.crash.life import World
from tests.crash.matrix import Outcome, chosen, kinds
from tests.crash.sweeping import ROLE, SweepLife, Swept, differences, kill, without_faults

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3600)]

POINTS = 3
"""Tried unless all are: with the preparation, one takes some seconds."""
AT_ONCE = 3


async def test_a_sweep_that_is_killed_at_any_point_changes_nothing_in_the_end(
    world: World, everything: bool, outcomes: list[Outcome], subtests: pytest.Subtests
) -> None:
    undisturbed = await without_faults(world)
    # By hand, what all others are compared with.
    kept = {("half", "1"): 20, ("replaced", "2"): 40, ("live", "2"): 40, ("live", "3"): 20}
    for store in ("Milvus", "Elasticsearch"):
        found = [tuple(key.partition("/")[0].split()) for key in undisturbed.state[store]]
        assert {one: found.count(one) for one in found} == kept, f"{store}: {sorted(set(found))}"
    assert undisturbed.state["deleted knowledge base"] == {"Milvus": False, "Elasticsearch": False}
    expected = {"intents": 1, "documents": 3, "milvus_rows": 80, "elasticsearch_rows": 80, "generations": 1, "aliases": 0}
    assert undisturbed.summary == expected | {"dry_run": False}
    seen = kinds(undisturbed.points)
    assert all(seen[f"{ROLE} {kind}"] for kind in (Kind.SQL, Kind.MILVUS, Kind.ELASTICSEARCH)), seen

    points = undisturbed.points if everything else chosen(undisturbed.points, POINTS)
    room = asyncio.Semaphore(AT_ONCE)

    async def one(point: str) -> Outcome:
        async with room:
            return await kill(world, point, undisturbed)

    ended = await asyncio.gather(*(one(point) for point in points))
    outcomes += ended
    for outcome in ended:
        with subtests.test(" and ".join(outcome.points)):
            assert outcome.good, outcome.as_line()


async def test_the_judge_sees_what_a_sweep_has_left_or_taken(world: World) -> None:
    life = SweepLife(world)
    try:
        await life.prepare()
        unswept = await life.look()
        assert await life.summary() is None
        await life.sweep()
        summary = await life.summary()
        assert summary is not None
        undisturbed = Swept(state=await life.look(), summary=summary, points=())
        assert not differences(undisturbed, await life.look(), summary)
        found = differences(undisturbed, unswept, None)
        assert any(one.startswith("state.Milvus.half 2/") for one in found), "rows that were to go"
        assert any(one.startswith("state.deleted knowledge base.Elasticsearch: True") for one in found)
        assert found[-1] == "no row in sweeps"
        stores = life.stores("kb")
        lost = min(await stores.texts.stored("live", 3))
        await stores.texts.delete([lost])
        await stores.aclose()
        found = differences(undisturbed, await life.look(), summary | {"milvus_rows": 81})
        assert found[0].startswith("state.Elasticsearch.live 3/")
        assert found[1:] == ["sweeps.summary.milvus_rows: 81 instead of 80"]
    finally:
        await life.aclose()
