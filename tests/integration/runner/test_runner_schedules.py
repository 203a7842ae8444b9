"""Tasks on the same documents in every order that hypothesis thinks of: deletions, cancels, sweeps, crashes and zombies.

Real are the pipeline, the deletion, the sweep, and the ledger on PostgreSQL; the stores are the fakes that pass the contract
of the real ones. Every call to ledger and stores waits at a gate until the schedule lets it pass, so that processes stand
still between any two of their calls, for long or for ever.
"""

import asyncio
import inspect
import itertools
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, cast

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job_runner.deletion import Deletion
from job_runner.fetch import Source
from job_runner.index import Generation
from job_runner.knowledge_indexing import KnowledgeIndexing
from job_runner.ledger import Ledger
from job_runner.pipeline import DocumentPipeline, _Read
from job_runner.progress import SilentProgress
from job_runner.readers import read
from job_runner.settings import Settings
from job_runner.stores import OpenStores, Stores
from job_runner.sweep import sweep
from job_runner.work import Done, Work
from task_contract.errors import PermanentError, TaskError
from task_contract.models import Action, ProcessingTask
from task_operator.metrics import Metrics
from task_operator.observation import FenceState
from task_operator.projection import Database
from tests.support.memory_stores import MemoryTextIndex, MemoryVectorIndex
from tests.support.runner_lab import NOON, HashEmbedder

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

CONTENTS: Final = (2, 3, 4)
"""Chunks of each content that a document may have."""
_LOOKED: Final = 6
"""After so many calls a sweep that is late stands still: it has looked up what is stale, and removes it at the very end."""
SECONDS: Final = 0.3
"""For a verification to find what is there: in memory, at once or never."""


class QuickPipeline(DocumentPipeline):
    """The pipeline without its child process, which would take most of the time here and plays no part."""

    async def _read(self, source: Source) -> _Read:
        document = await asyncio.to_thread(self._parsed, source)
        return _Read(document=document, chunks=self._split(document))

    def _parsed(self, source: Source) -> Any:
        with (self._settings.document_root / self._file_path).open("rb") as file:
            return read(file, kind=source.kind, name=self._file_path)


class Gate:
    """Where calls wait until they are let pass."""

    def __init__(self) -> None:
        self._waiting: list[tuple[object, asyncio.Future[None]]] = []
        self._passing = 0

    async def call(self, process: object, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        passed = asyncio.get_running_loop().create_future()
        self._waiting.append((process, passed))
        await passed
        try:
            return await call(*arguments, **options)
        finally:
            self._passing -= 1

    def waiting(self, *, without: frozenset[object] = frozenset()) -> list[tuple[object, asyncio.Future[None]]]:
        self._waiting = [one for one in self._waiting if not one[1].done()]
        return [one for one in self._waiting if one[0] not in without]

    async def open(self, passed: asyncio.Future[None]) -> None:
        """Let a call pass, and wait until it has been answered."""
        self._passing += 1
        passed.set_result(None)
        while self._passing:  # noqa: ASYNC110 - of a few milliseconds
            await asyncio.sleep(0)


class Gated:
    """Stands before a ledger or a store for one process."""

    def __init__(self, inner: Any, gate: Gate, process: object) -> None:
        self._inner, self._gate, self._process = inner, gate, process

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._inner, name)
        if name == "aclose":
            return call
        if inspect.isasyncgenfunction(call):

            async def gated_parts(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
                async def parts() -> list[Any]:
                    return [part async for part in call(*arguments, **options)]

                for part in await self._gate.call(self._process, parts):
                    yield part

            return gated_parts

        async def gated(*arguments: Any, **options: Any) -> Any:
            return await self._gate.call(self._process, call, *arguments, **options)

        return gated


@dataclass(frozen=True)
class Plan:
    """What a task does, and what happens to it."""

    action: str
    document: int
    content: int
    attempts: int = 1
    """Pods that are there at once."""
    fate: str = "lives"
    """lives; canceled at some point; dies: its pods stand still from some point on, and its task is deleted."""
    at: int = 0
    """After how many calls of all processes."""

    @property
    def indexes(self) -> bool:
        """Whether it is about the knowledge base as a whole and no document."""
        return self.action in {"rebuild", "rollback", "repair"}


@dataclass(eq=False)
class Pod:
    task: "Task"
    process: object
    work: "asyncio.Task[Done]"


@dataclass(eq=False)
class Task:
    plan: Plan
    age: int
    """Seconds after noon at which it was created: no two are of the same age."""
    uid: uuid.UUID = field(default_factory=uuid.uuid4)
    ended: str | None = None
    """How it ended well: the reason."""
    fenced: bool = False


class World:
    """One knowledge base, its tasks and its stores."""

    def __init__(self, database: str, documents: Path) -> None:
        self.gate = Gate()
        self.ledger = Ledger(database)
        self.operator = Database(database, metrics=Metrics())
        self.namespace = f"schedules-{uuid.uuid4().hex[:12]}"
        self.stores: dict[Generation, Stores] = {}
        self.aliases: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        self.settings = Settings.model_validate(
            {"postgres_url": database, "document_root": documents, "log_level": "error", "verify_seconds": SECONDS}
        )
        self.pods: list[Pod] = []
        self.sweeps: dict[object, asyncio.Task[Any]] = {}

    def opener(self, process: object) -> OpenStores:
        def open_stores(generation: Generation) -> Stores:
            found = self.of(generation)
            return Stores(vectors=Gated(found.vectors, self.gate, process), texts=Gated(found.texts, self.gate, process))

        return open_stores

    def of(self, generation: Generation) -> Stores:
        if generation not in self.stores:
            made: Any = MemoryVectorIndex(self.aliases[0]), MemoryTextIndex(self.aliases[1])
            made[0].there = made[1].there = False
            self.stores[generation] = Stores(vectors=made[0], texts=made[1])
        return self.stores[generation]

    def start(self, task: Task) -> None:
        """Start a pod of a task."""
        plan, process = task.plan, object()
        document = f"d{plan.document}"
        payload = {
            "upsert": {"filePath": f"{plan.content}.txt", "documentId": document, "chunkSize": 100, "chunkOverlap": 0},
            "delete": {"action": "delete", "documentId": document},
            "delete_knowledge_base": {"action": "delete_knowledge_base", "confirm": "kb"},
            "rebuild": {"rebuildIndex": True, "keepGenerationSeconds": 3600 * plan.content},
            "rollback": {"action": "rollback"},
            "repair": {"action": "repair"},
        }[plan.action]
        kind = "knowledge_indexing" if plan.indexes else "document_processing"
        manifest = ProcessingTask.model_validate(
            {
                "metadata": {"name": "a", "namespace": self.namespace},
                "spec": {"type": kind, "kbId": "kb", "payload": payload},
            }
        )
        work = Work(
            manifest,
            uid=task.uid,
            created_at=NOON + timedelta(seconds=task.age),
            settings=self.settings.model_copy(update={"holder": uuid.uuid4().hex}),
            ledger=cast("Any", Gated(self.ledger, self.gate, process)),
            progress=SilentProgress(),
            make_embedder=lambda name, *, threads: HashEmbedder(),
        )
        upserts = manifest.spec.effective_action is Action.UPSERT
        stores = self.opener(process)
        made: QuickPipeline | Deletion | KnowledgeIndexing
        if plan.indexes:
            made = KnowledgeIndexing(work, open_labelled=lambda label: stores(label.names))
        elif upserts:
            made = QuickPipeline(work, embedder=HashEmbedder(), open_stores=stores)
        else:
            made = Deletion(work, open_stores=stores)
        self.pods.append(Pod(task, process, asyncio.create_task(made.run())))

    def sweep(self) -> object:
        """Start a sweep; return its process."""
        process = object()
        ledger: Any = Gated(self.ledger, self.gate, process)
        self.sweeps[process] = asyncio.create_task(sweep(self.namespace, ledger=ledger, open_stores=self.opener(process)))
        return process

    async def fence(self, task: Task) -> None:
        """Do as the operator does with a task that was canceled, or is gone: a commit that came first counts."""
        task.fenced = True
        if (await self.operator.raise_fence(str(task.uid), reason="Canceled")).state is FenceState.COMMITTED:
            task.ended = task.ended or "committed"

    async def check_reader(self) -> None:
        """What the ledger publishes is whole in both stores, at any time."""
        for generation, document, version, count in await self.published():
            stores = self.of(generation)
            found = [len(await store.stored(document, version)) for store in (stores.vectors, stores.texts)]
            assert found == [count, count], f"{document} version {version}: {found} of {count} chunks"

    async def published(self) -> list[tuple[Generation, str, int, int]]:
        connection = await asyncpg.connect(self.settings.postgres_url.get_secret_value())
        try:
            rows = await connection.fetch(
                "SELECT generation, document_id, published_version, chunk_count FROM documents "
                "JOIN knowledge_bases USING (namespace, kb_id) WHERE namespace = $1 AND published_version IS NOT NULL",
                self.namespace,
            )
        finally:
            await connection.close()
        return [
            (Generation(self.namespace, "kb", number), document, version, count) for number, document, version, count in rows
        ]

    async def needed(self) -> set[int]:
        """Return the generations that are kept."""
        return {one.number for one in await self.ledger.generations(namespace=self.namespace, kb_id="kb")}

    async def step(self, choice: int, *, frozen: frozenset[object]) -> bool:
        """Let one call pass; return whether anything is left to do."""
        deadline = asyncio.get_running_loop().time() + 10
        while not (waiting := self.gate.waiting(without=frozen)):
            going = {**self.sweeps, **{pod.process: pod.work for pod in self.pods}}
            if all(work.done() for process, work in going.items() if process not in frozen):
                return False
            assert asyncio.get_running_loop().time() < deadline, "nothing waits and nothing ends"
            await asyncio.sleep(0.001)
        await self.gate.open(waiting[choice % len(waiting)][1])
        return True

    async def aclose(self) -> None:
        for one in [*self.sweeps.values(), *(pod.work for pod in self.pods)]:
            one.cancel()
        await asyncio.gather(*self.sweeps.values(), *(pod.work for pod in self.pods), return_exceptions=True)
        await self.ledger.aclose()
        await self.operator.aclose()


def ends(world: World) -> Iterator[tuple[Pod, Done | None]]:
    """Take out the pods that have ended; a success is noted with its task."""
    for pod in list(world.pods):
        if pod.work.done():
            world.pods.remove(pod)
            error = pod.work.exception()
            assert error is None or isinstance(error, TaskError), error
            done = None if error else pod.work.result()
            if done is not None:
                pod.task.ended = done.reason
            elif isinstance(error, PermanentError):  # there is nothing to rebuild, or to roll back to
                assert pod.task.plan.indexes, error
                pod.task.ended = error.reason
            yield pod, done


async def lead(world: World, plans: list[tuple[int, Plan]], schedule: list[int], sweeps: dict[int, bool]) -> None:
    """Lead all tasks to their end, and compare what is left with what should be."""
    tasks = [Task(plan, age) for age, plan in plans]
    for task in tasks:
        for _ in range(task.plan.attempts):
            world.start(task)
    frozen: set[object] = set()
    late: dict[int, object] = {}
    choices = itertools.chain(schedule, itertools.count())
    for call, choice in enumerate(choices):
        for task in tasks:
            if task.plan.at == call and task.plan.fate != "lives" and task.ended is None:
                if task.plan.fate == "dies":
                    frozen |= {pod.process for pod in world.pods if pod.task is task}
                await world.fence(task)
        if call in sweeps:
            sweeping = world.sweep()
            if sweeps[call]:
                late[call + _LOOKED] = sweeping
        if call in late:
            frozen.add(late[call])
        going = await world.step(choice, frozen=frozenset(frozen))
        failed = [pod.task for pod, done in ends(world) if done is None]
        for task in dict.fromkeys(failed):
            if task.ended is None and not task.fenced and all(pod.task is not task for pod in world.pods):
                world.start(task)
                going = True
        if not going and call > max(sweeps, default=0):
            break
        if call % 7 == 0:
            await world.check_reader()
        assert call < 3000, "it goes on for ever"
    # The zombies wake up.
    while await world.step(0, frozen=frozenset()):
        pass
    list(ends(world))
    for swept in world.sweeps.values():
        swept.result()
    await world.check_reader()
    ledger: Any = world.ledger
    await sweep(world.namespace, ledger=ledger, open_stores=world.of)
    await check_end(world, tasks)


async def check_end(world: World, tasks: list[Task]) -> None:
    """The newest task that counts decides about each document, and the stores hold nothing else."""
    published = {document: (generation, version, count) for generation, document, version, count in await world.published()}
    expected: dict[Generation, set[tuple[str, int]]] = {}
    for number in (0, 1):
        counting = [
            task
            for task in tasks
            if task.ended not in {None, "Superseded"}
            and not task.plan.indexes
            and (task.plan.document == number or task.plan.action.endswith("base"))
        ]
        last = max(counting, key=lambda task: task.age, default=None)
        chunks = CONTENTS[last.plan.content] if last is not None and last.plan.action == "upsert" else 0
        generation, version, count = published.get(f"d{number}", (None, 0, 0))
        assert count == chunks, f"d{number} has {count} chunks; {[(task.plan, task.age, task.ended) for task in tasks]}"
        if generation is not None and chunks:
            expected.setdefault(generation, set()).add((f"d{number}", version))
    needed = await world.needed()
    for generation, stores in world.stores.items():
        if generation.number in needed and generation not in expected:
            continue  # retained: what tasks had begun to write there stays until it goes, or until a rollback
        found: Any = stores
        for store in (found.vectors, found.texts):
            held = {(row.document_id, row.version) for row in store.rows.values()}
            assert held == expected.get(generation, set()), f"generation {generation.number} holds {held}"
        if generation in expected:
            assert await found.vectors.serves()
            assert await found.texts.serves()
    for task in tasks:
        assert task.ended is not None or task.fenced, "a task that nobody has ended ends well"


PLANS = st.builds(
    Plan,
    action=st.sampled_from(
        ["upsert", "upsert", "upsert", "delete", "delete_knowledge_base", "rebuild", "rebuild", "rollback", "repair"]
    ),
    document=st.integers(0, 1),
    content=st.integers(0, len(CONTENTS) - 1),
    attempts=st.sampled_from([1, 1, 1, 2]),
    fate=st.sampled_from(["lives", "lives", "canceled", "dies"]),
    at=st.integers(0, 60),
)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    for number, count in enumerate(CONTENTS):
        sentences = [f"Content {number} sentence {one}".ljust(90, ".") + " end." for one in range(count)]
        (folder / f"{number}.txt").write_text("\n\n".join(sentences))
    return folder


@settings(
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    plans=st.lists(PLANS, min_size=2, max_size=4),
    order=st.randoms(use_true_random=False),
    schedule=st.lists(st.integers(0, 30), max_size=120),
    sweeps=st.dictionaries(st.integers(0, 100), st.booleans(), max_size=3),
)
def test_whatever_meets_dies_or_comes_late_the_newest_task_decides_and_nothing_else_is_left(
    database: str, documents: Path, plans: list[Plan], order: Any, schedule: list[int], sweeps: dict[int, bool]
) -> None:
    ages = list(range(1, len(plans) + 1))
    order.shuffle(ages)

    async def run() -> None:
        world = World(database, documents)
        await world.operator.warm_up()
        try:
            await lead(world, list(zip(ages, plans, strict=True)), schedule, sweeps)
        finally:
            await world.aclose()

    asyncio.run(run())
