"""The promise that nothing is lost: killed at any point of a document's life, it ends as a life without faults does."""

import contextlib
import random
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from job_runner.embed import BATCH_TEXTS
from tests.crash.faults import Action, Kind
from tests.crash.life import Life, Scenario, Track, World
from tests.crash.matrix import TRACKS, Outcome, chosen, kinds, settle, try_all, without_faults
from tests.crash.oracle import differences

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3600)]

EMBEDDED = "Milvus upsert #1 after"

PUBLISH = Scenario("publish")
SCENARIOS: list[tuple[Scenario, int, Mapping[str, int]]] = [
    # A new version of a document that readers see.
    (PUBLISH, 4, {"POST jobs": 1, "PUT status": 2}),
    # The first document of a knowledge base: collection and index are made.
    (Scenario("first document", seeded=False, own_knowledge_base=True, published=1, roles=("runner",)), 2, {}),
    # An attempt fails and the next one goes on with what it left.
    (Scenario("retry", runner={EMBEDDED: Action.KILL}), 3, {"POST jobs": 2, "PUT status": 4, "DELETE jobs": 1}),
    # The document is deleted: a version of no chunks.
    (Scenario("delete", deletes=True), 2, {"POST jobs": 1, "PUT status": 2}),
    # A store is down for the first pod: the attempt is given back and not counted.
    (
        Scenario("given back", first_pod={"TASKS_MILVUS_URL": "http://127.0.0.1:9"}),
        2,
        {"POST jobs": 2, "PUT status": 4, "DELETE jobs": 1},
    ),
    # Canceled while the runner's node is lost; the runner comes back and wants to publish. It is lost at a moment when no
    # call is under way, whose timeout would be over when it comes back.
    (
        Scenario("cancel", runner={EMBEDDED: Action.STOP}, cancel=True, phase="Canceled", published=1, roles=("operator",)),
        2,
        {"POST jobs": 1, "PUT status": 2, "DELETE jobs": 1},
    ),
    # The runner's node is lost before it has published. Another pod does; the first one comes back and wants to as well.
    (
        Scenario("lost node", runner={EMBEDDED: Action.STOP}, loses_node=True, roles=("operator",)),
        2,
        {"POST jobs": 2, "PUT status": 4, "DELETE jobs": 1},
    ),
]
"""Each with the number of points that are tried unless all are, and with what it costs the API server without faults."""
PAIRS, SEED = 12, 4


@contextlib.asynccontextmanager
async def _tracks(world: World, count: int = TRACKS) -> AsyncIterator[list[Track]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(world.track()) for _ in range(count)]


@pytest.mark.parametrize(("scenario", "count", "writes"), SCENARIOS, ids=[scenario.name for scenario, *_ in SCENARIOS])
async def test_a_kill_at_any_point_changes_nothing_in_the_end(
    world: World,
    scenario: Scenario,
    count: int,
    writes: Mapping[str, int],
    everything: bool,
    outcomes: list[Outcome],
    subtests: pytest.Subtests,
) -> None:
    async with _tracks(world) as tracks:
        undisturbed = await without_faults(tracks, scenario, writes)
        points = undisturbed.points
        _check_kinds(scenario, points)
        kills = [frozenset({point}) for point in (points if everything else chosen(points, count))]
        if everything and scenario is PUBLISH:
            kills += _pairs(points)
        ended = await try_all(tracks, scenario, kills, undisturbed.end)
    outcomes += ended
    for outcome in ended:
        with subtests.test(" and ".join(outcome.points)):
            assert outcome.good, outcome.as_line()


def _check_kinds(scenario: Scenario, points: Sequence[str]) -> None:
    """A seam that sees nothing would make every kill there a success."""
    found = kinds(points)
    for role, expected in (
        ("operator", (Kind.API, Kind.SQL)),
        ("runner", (Kind.SQL, Kind.MILVUS, Kind.ELASTICSEARCH, Kind.MESSAGE)),
    ):
        if role in scenario.roles:
            assert all(found[f"{role} {kind}"] for kind in expected), f"some calls of the {role} are not seen: {found}"


def _pairs(points: Sequence[str]) -> list[frozenset[str]]:
    """Return pairs of points at which both processes are killed in one life, drawn once and for all."""
    draw = random.Random(SEED)
    of = [[point for point in points if point.startswith(role)] for role in ("operator", "runner")]
    return list(dict.fromkeys(frozenset(draw.choice(some) for some in of) for _ in range(PAIRS)))


async def test_a_runner_that_is_killed_again_and_again_gets_on(world: World) -> None:
    """Each runner writes one batch and dies before its next one; numbers of calls go on over the restarts."""
    count = 5 * BATCH_TEXTS  # each attempt begins with a small batch
    world.write("long.txt", [f"Sentence {number}" for number in range(count)])
    kills = frozenset(f"runner Milvus upsert #{number} before" for number in (2, 4, 6))
    async with _tracks(world, 1) as [track]:
        life = Life(PUBLISH, track, kills, file="long.txt")
        await track.live(life)
        end = await settle(life)
        assert life.reached
        assert not life.broken
        assert end.attempts == ("ContainerFailed",) * 3 + ("Succeeded",)
        result = (await track.place.status(life.name))["result"]
        assert (result["chunks"], result["milvusCount"], result["elasticsearchCount"]) == (count, count, count)
        assert 3 <= result["reused"] == count - result["embedded"]


async def test_a_file_that_was_replaced_between_attempts_is_read_anew(world: World) -> None:
    world.write("replaced.txt", [f"Sentence {number}" for number in range(100)])
    async with _tracks(world, 1) as [track]:
        life = Life(
            PUBLISH,
            track,
            frozenset({"runner Milvus upsert #2 after"}),
            file="replaced.txt",
            after_kill=lambda: world.write("replaced.txt", [f"Other {number}" for number in range(10)]),
        )
        await track.live(life)
        end = await settle(life)
        assert life.reached
        assert not life.broken
        expected = {f"3/{ordinal}" for ordinal in range(10)}
        assert end.state["Milvus"].keys() == expected == end.state["Elasticsearch"].keys(), (
            "the older rows had a lower number"
        )


async def test_the_judge_sees_what_is_otherwise(world: World) -> None:
    """A judge who finds everything alike would acquit everybody."""
    async with _tracks(world, 1) as [track]:
        life = Life(PUBLISH, track)
        await track.live(life)
        undisturbed = await settle(life)
        assert not differences(undisturbed, await settle(life), life)
        stores = track.stores(life.kb_id)
        lost = min(await stores.texts.stored(life.document_id, 2))
        await stores.texts.delete([lost])
        await world.sql.execute("INSERT INTO task_fences (task_uid, reason) VALUES ($1, 'Canceled')", life.uid)
        await world.sql.execute("UPDATE documents SET published_version = 1 WHERE document_id = $1", life.document_id)
        await world.sql.execute("UPDATE tasks SET phase = 'Failed' WHERE uid = $1", life.uid)
        found = differences(undisturbed, await settle(life), life)
        parts = ("Elasticsearch.2/", "documents[0].published_version", "task_fences", "tasks[0].phase")
        assert [any(one.startswith(part) for one in found) for part in parts] == [True] * 4, found
        assert len(found) == 4
        await track.read(life)
        assert life.broken, "a reader of version 1 finds no chunks"


def test_an_even_choice_has_each_kind_of_call_and_is_always_the_same() -> None:
    points = [f"runner Milvus query #{number} {side}" for number in range(20) for side in ("before", "after")]
    points += ["runner message written #1 before"]
    kept = chosen(points, 4)
    assert kept == chosen(points, 4)
    assert kept[0] == points[0]
    assert "runner message written #1 before" in kept
    assert len(kept) == 5
    assert chosen(points, 1000) == points
