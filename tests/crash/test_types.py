"""Tasks of the other types may die after any write too: the next attempt ends them, and readers never see a half of one."""

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

from tests.crash.faults import Kind
from tests.crash.life import World
from tests.crash.matrix import Outcome, evenly, kinds
from tests.crash.oracle import paths
from tests.crash.typed import LEADS, ROLE, Case, Ended, TypedLife, kill, lose_rows, without_faults
from tests.support.runner_lab import HashEmbedder

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3600)]

AT_ONCE = 4
REBUILD = {"rebuildIndex": True, "embeddingModel": "other", "maxRecallDrop": 100}
ROWS = [
    {"id": f"row {number}", "text": f"The text of {number}", "vector": [1.0, number, *[0.5] * (HashEmbedder.dimension - 2)]}
    for number in range(30)
]


async def rebuild(life: TypedLife) -> None:
    """Have a generation that is kept for a rollback."""
    rebuilt = TypedLife(life.world, Case("before", "knowledge_indexing", REBUILD, leaves={}))
    rebuilt.namespace, rebuilt.uids = life.namespace, life.uids
    assert await rebuilt.run() == 0


def lines(rows: Sequence[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


SEEDED = {"first": 12, "second": 6}
CASES = [
    Case("rebuild", "knowledge_indexing", REBUILD, points=4, leaves={1: SEEDED, 2: SEEDED}, leads=2),
    Case("rollback", "knowledge_indexing", {"action": "rollback"}, before=rebuild, leaves={1: SEEDED, 2: SEEDED}),
    Case("repair", "knowledge_indexing", {"action": "repair"}, before=lose_rows, whole=False, leaves={1: SEEDED}),
    Case("analysis", "knowledge_indexing", {"enhancementType": "semantic_analysis"}, leaves={1: SEEDED}),
    Case("purge", "knowledge_indexing", {"action": "purge", "confirm": "kb"}, leaves={}),
    Case(
        "vectors",
        "vector_storage",
        {"inputPath": "KEY/rows.jsonl", "documentId": "rows", "embeddingModel": "hash"},
        files={"rows.jsonl": lines(ROWS)},
        leaves={1: SEEDED | {"rows": len(ROWS)}},
    ),
    Case(
        "embeddings",
        "embedding_generation",
        {"inputPath": "KEY/texts.jsonl", "outputPath": "outputs/KEY/vectors.jsonl"},
        files={"texts.jsonl": lines([{"id": f"{number}", "text": f"text {number}"} for number in range(200)])},
        seeded=False,
        leaves={},
    ),
    Case("inline embeddings", "embedding_generation", {"texts": ["one", "two", "three"]}, seeded=False, leaves={}),
    Case(
        "batch",
        "batch_processing",
        {"prefix": "KEY", "glob": "in-*", "chunkSize": 100, "chunkOverlap": 0},
        files={"in-a.txt": "The text of a", "in-b.pdf": "%PDF-1.4 broken", "in-c.txt": "The text of c"},
        seeded=False,
        points=2,
        leaves={1: {"KEY/in-a.txt": 1, "KEY/in-c.txt": 1}},
    ),
]


LONG = ("rollback", "repair", "analysis", "purge", "vectors")
"""Those that `make test` leaves to `make crash`: it kills them within one process, at their calls, in
tests/integration/runner."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.long] * (case.name in LONG)) for case in CASES]
)
async def test_a_task_that_is_killed_at_any_point_is_ended_by_its_next_attempt(
    world: World, case: Case, everything: bool, outcomes: list[Outcome], subtests: pytest.Subtests
) -> None:
    undisturbed = await without_faults(world, case)
    _check_right(case, undisturbed)
    points = undisturbed.points if everything else evenly(undisturbed.points, case.points)
    room = asyncio.Semaphore(AT_ONCE)

    async def one(point: str) -> Outcome:
        async with room:
            return await kill(world, case, point, undisturbed)

    ended = await asyncio.gather(*(one(point) for point in points))
    outcomes += ended
    for outcome in ended:
        with subtests.test(" and ".join(outcome.points)):
            assert outcome.good, outcome.as_line()


def _check_right(case: Case, undisturbed: Ended) -> None:
    """Check by hand what every other end is compared with, and that the seams see what they should."""
    state = undisturbed.state
    for number in (1, 2):
        for store in ("Milvus", "Elasticsearch"):
            rows = state[f"generation {number} in {store}"]
            documents = Counter(key.rpartition(" ")[0] for key in rows or () if key != LEADS)
            assert documents == case.leaves.get(number, {}), f"generation {number} in {store}: {documents}"
            assert (rows or {}).get(LEADS, False) is (bool(case.leaves) and number == case.leads)
    if case.name == "embeddings":
        assert len(state["files"]["vectors.jsonl"].splitlines()) == 200
        assert state["files"].keys() == {"vectors.jsonl"}
    if case.name == "inline embeddings":
        assert len(state["task_vectors"]) == 1
    if case.name == "analysis":
        assert all(row["analysis"] for key, row in state["generation 1 in Milvus"].items() if key != LEADS)
    if case.name == "batch":
        assert sorted(row["state"] for row in state["batch_documents"]) == ["done", "done", "failed"]
    else:  # of a batch the rows of its documents say how it went
        assert [row["outcome"]["outcome"] for row in state["task_results"]] == ["Succeeded"], state["task_results"]
    seen = kinds(undisturbed.points)
    stores = (Kind.MILVUS, Kind.ELASTICSEARCH) if case.leaves else ()
    assert all(seen[f"{ROLE} {kind}"] for kind in (Kind.SQL, Kind.MESSAGE, *stores)), seen


async def test_the_judge_sees_what_a_reader_would_miss(world: World) -> None:
    life = TypedLife(world, CASES[0])
    try:
        await life.prepare()
        await life.read()
        assert not life.broken
        before = await life.look()
        await lose_rows(life)
        await life.read()
        assert life.broken == ["Milvus, generation 1: 9 of first's 12", "Elasticsearch, generation 1: 3 of second's 6"]
        assert len(paths("state", before, await life.look())) == 6
    finally:
        await life.aclose()
