"""A rebuild that dies at any of its writes: readers see one whole generation, and the next attempt or a sweep ends it.

The ledger is the real one; the stores are the fakes that pass the contract of the real ones.
"""

import uuid
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from job_runner.deletion import Deletion
from job_runner.index import Generation
from job_runner.knowledge_indexing import KnowledgeIndexing
from job_runner.ledger import Ledger
from job_runner.pipeline import DocumentPipeline
from job_runner.progress import SilentProgress
from job_runner.stores import Stores
from job_runner.sweep import sweep
from job_runner.work import Work
from task_contract.models import ProcessingTask
from tests.support.memory_stores import MemoryTextIndex, MemoryVectorIndex
from tests.support.runner_lab import NOON, HashEmbedder, Lab, OtherEmbedder, Reached, Watched

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

POINTS = [
    f"{call} {side}"
    for call in (
        "ledger.acquire 1",
        "ledger.begin_generation 1",
        "vectors.ensure 2",
        "vectors.write 1",
        "texts.write 1",
        "ledger.enter 1",
        "ledger.enter 2",
        "texts.scan 1",
        "ledger.renew 1",
        "texts.search 2",
        "ledger.switch 1",
        "vectors.serve 1",
        "texts.serve 1",
        "ledger.aliased 1",
        "ledger.release 1",
    )
    for side in ("before", "after")
]


class Died(BaseException):
    """What the process would raise if it were there still."""


class Dying(Reached):
    """Nothing passes after the point at which the process has died."""

    dead = False

    def __init__(self, point: str) -> None:
        super().__init__(point, self._die)

    async def _die(self) -> None:
        self.dead = True
        raise Died

    async def before(self, name: str) -> int:
        if self.dead:
            raise Died
        return await super().before(name)


class World:
    """A knowledge base on stores in memory."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.namespace = f"crashes-{uuid.uuid4().hex[:12]}"
        self.ledger = Ledger(lab.environment["TASKS_POSTGRES_URL"])
        self.made: dict[Generation, Stores] = {}
        self.aliases: tuple[dict[str, Any], dict[str, Any]] = ({}, {})

    def of(self, generation: Generation) -> Stores:
        if generation not in self.made:
            vectors, texts = MemoryVectorIndex(self.aliases[0]), MemoryTextIndex(self.aliases[1])
            vectors.there = texts.there = False
            self.made[generation] = Stores(vectors=vectors, texts=texts)
        return self.made[generation]

    async def run(
        self, kind: str, payload: dict[str, Any], *, uid: uuid.UUID | None = None, point: str = "none 0 before"
    ) -> Any:
        reached = Dying(point)
        settings = self.lab.settings(embedding_models=("other",))
        models = {"other": OtherEmbedder(), settings.embedding_model: HashEmbedder()}
        work = Work(
            ProcessingTask.model_validate(
                {
                    "metadata": {"name": "a", "namespace": self.namespace},
                    "spec": {"type": kind, "kbId": "kb", "payload": payload},
                }
            ),
            uid=uid or uuid.uuid4(),
            created_at=NOON,
            settings=settings,
            ledger=cast("Any", Watched(self.ledger, "ledger", reached)),
            progress=SilentProgress(),
            make_embedder=lambda name, *, threads: models[name],
        )

        def watched(generation: Generation) -> Stores:
            stores = self.of(generation)
            return Stores(vectors=Watched(stores.vectors, "vectors", reached), texts=Watched(stores.texts, "texts", reached))

        try:
            if kind == "knowledge_indexing":
                return await KnowledgeIndexing(work, open_labelled=lambda label: watched(label.names)).run()
            if payload.get("action") == "delete":
                return await Deletion(work, open_stores=watched).run()
            embedder = await work.embedder_of_knowledge_base()
            return await DocumentPipeline(work, embedder=embedder, open_stores=watched).run()
        except Died:
            return None

    async def publish(self, name: str, count: int) -> None:
        self.lab.write([f"{name} sentence {number}" for number in range(count)], name)
        done = await self.run("document_processing", {"filePath": name, "chunkSize": 100, "chunkOverlap": 0})
        assert done.reason == "Completed"

    async def serving(self) -> int:
        found = await self.ledger.knowledge_base(namespace=self.namespace, kb_id="kb")
        assert found is not None
        return found[0]

    async def check_readers(self) -> None:
        """Who reads through the ledger sees a whole generation, and who reads through an alias another or the same."""
        generation = Generation(self.namespace, "kb", await self.serving())
        expected: dict[str, str] = {}
        for name, published in (await self.ledger.contents(generation)).published.items():
            expected |= published.rows(generation, name)
        stores: Any = self.of(generation)
        for store in (stores.vectors, stores.texts):
            assert {row.id: row.content_hash for row in store.rows.values()} == expected
        for aliases in self.aliases:
            assert {row.ordinal for row in aliases["alias"].rows.values()} == {0, 1, 2, 3}
            assert aliases["alias"].rows.keys() == expected.keys(), "the same ids in either generation"


@pytest.fixture
async def world(lab: Lab) -> AsyncIterator[World]:
    world = World(lab)
    await world.publish("a.txt", 4)
    await world.publish("b.txt", 2)
    yield world
    await world.ledger.aclose()


REBUILD = {"rebuildIndex": True, "embeddingModel": "other"}


@pytest.mark.parametrize("point", POINTS)
async def test_a_rebuild_that_died_anywhere_is_ended_by_the_next_attempt(world: World, point: str) -> None:
    uid = uuid.uuid4()
    await world.run("knowledge_indexing", REBUILD, uid=uid, point=point)
    await world.check_readers()
    done = await world.run("knowledge_indexing", REBUILD, uid=uid)
    assert (done.reason, done.result.generation, done.result.chunks) == ("Completed", 2, 6)
    assert done.result.recall_after is not None
    await world.check_readers()
    serving: Any = world.of(Generation(world.namespace, "kb", 2))
    assert await serving.vectors.serves()
    assert await serving.texts.serves()


@pytest.mark.parametrize("point", POINTS)
async def test_what_a_rebuild_that_died_anywhere_leaves_is_ended_by_a_sweep(world: World, point: str) -> None:
    uid = uuid.uuid4()
    await world.run("knowledge_indexing", REBUILD, uid=uid, point=point)
    await world.lab.fetch("INSERT INTO task_fences (task_uid, reason) VALUES ($1, 'Ended')", uid)
    await sweep(world.namespace, ledger=world.ledger, open_stores=world.of)
    await world.check_readers()
    number = await world.serving()
    stores: Any = world.of(Generation(world.namespace, "kb", number))
    assert await stores.vectors.serves()
    assert await stores.texts.serves()
    left = {generation.number for generation, made in world.made.items() if await made.vectors.exists()}
    assert left == ({1} if number == 1 else {1, 2}), "what was filled is gone, what has served is kept"
    # Another task begins where this one has left off.
    done = await world.run("knowledge_indexing", {"rebuildIndex": True})
    assert done.reason == "Completed"
    await world.check_readers()
