"""A knowledge base of its own for a test of the runner, on real stores: tasks, attempts, and what the stores hold after."""

import asyncio
import inspect
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import asyncpg
import numpy as np
import numpy.typing as npt

from job_runner.attempt import identity, run_attempt
from job_runner.deletion import Deletion
from job_runner.embed import normalized
from job_runner.index import Generation, Label
from job_runner.knowledge_indexing import KnowledgeIndexing
from job_runner.ledger import Ledger
from job_runner.pipeline import DocumentPipeline
from job_runner.progress import SilentProgress
from job_runner.settings import Settings
from job_runner.stores import OpenStores, Stores, opener
from job_runner.vector_storage import VectorStorage
from job_runner.work import Done, Work
from task_contract.lifecycle import ExitCode
from task_contract.messages import AttemptOutcome
from task_contract.models import Action, ProcessingTask, TaskType

NAMESPACE = "test"
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ROOT = Path(__file__).resolve().parents[2]


class HashEmbedder:
    """A model that takes no time: equal texts have equal vectors, and each computed text is counted in a file."""

    name = "hash"
    fingerprint = "hash-1"
    dimension = 16
    max_tokens = None
    batch_tokens = 16_000

    def __init__(self, counter: Path | None = None, *, seconds: float = 0) -> None:
        self._counter = counter
        self._seconds = seconds

    def count_tokens(self, text: str) -> int:
        return len(text)

    def warm_up(self) -> None:
        pass

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        time.sleep(self._seconds)
        if self._counter is not None:
            with self._counter.open("a") as file:
                file.writelines("x\n" for _ in texts)
        drawn = [np.random.default_rng(abs(hash_of(text))).normal(size=self.dimension) for text in texts]
        return normalized(np.array(drawn, dtype=np.float32), dimension=self.dimension)

    def embed_query(self, text: str) -> npt.NDArray[np.float32]:
        vector: npt.NDArray[np.float32] = self.embed([text])[0]
        return vector


def hash_of(text: str) -> int:
    return int.from_bytes(uuid.uuid5(uuid.NAMESPACE_OID, text).bytes[:8], "big")


class OtherEmbedder(HashEmbedder):
    """Another model."""

    name = "other"
    fingerprint = "other-1"
    dimension = 24


class Reached:
    """Acts at a point of the pipeline: ``"texts.write 2 before"`` is before the second write of rows to Elasticsearch."""

    def __init__(self, point: str, act: Callable[[], Awaitable[None]]) -> None:
        name, number, side = point.split()
        self._wanted = name, int(number), side
        self._act = act
        self._counts: dict[str, int] = {}

    async def before(self, name: str) -> int:
        """Count a call that begins; return its number."""
        self._counts[name] = number = self._counts.get(name, 0) + 1
        await self._at(name, number, "before")
        return number

    async def after(self, name: str, number: int) -> None:
        await self._at(name, number, "after")

    async def _at(self, *point: object) -> None:
        if point == self._wanted:
            await self._act()


class Watched:
    """Stands before a ledger or a store, and tells `reached` of each call."""

    def __init__(self, inner: Any, name: str, reached: Reached) -> None:
        self._inner = inner
        self._name = name
        self._reached = reached

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._inner, method)
        if inspect.isasyncgenfunction(call):

            async def watched_parts(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
                number = await self._reached.before(f"{self._name}.{method}")
                async for part in call(*arguments, **options):
                    yield part
                await self._reached.after(f"{self._name}.{method}", number)

            return watched_parts

        async def watched(*arguments: Any, **options: Any) -> Any:
            number = await self._reached.before(f"{self._name}.{method}")
            answer = await call(*arguments, **options)
            await self._reached.after(f"{self._name}.{method}", number)
            return answer

        return watched


async def run_pipeline(task: ProcessingTask, settings: Settings, embedder: Any) -> Done:
    """Run the pipeline of a task, without what stands around it in a process of its own."""

    async def never() -> None:
        raise AssertionError("no point of the pipeline has the number 0")

    return await run_watched(task, settings, embedder, Reached("none 0 before", never))


async def run_watched(task: ProcessingTask, settings: Settings, embedder: Any, reached: Reached) -> Done:
    """Run the pipeline of a task with every call to ledger and stores watched."""
    uid, created_at = identity(task)
    ledger = Ledger(settings.postgres_url.get_secret_value())

    def watched_opener(settings: Settings, **options: Any) -> OpenStores:
        open_stores = opener(settings, **options)

        def watched_stores(generation: Generation) -> Stores:
            stores = open_stores(generation)
            return Stores(
                vectors=Watched(stores.vectors, "vectors", reached),
                texts=Watched(stores.texts, "texts", reached),
            )

        return watched_stores

    work = Work(
        task,
        uid=uid,
        created_at=created_at,
        settings=settings,
        ledger=cast("Any", Watched(ledger, "ledger", reached)),
        progress=SilentProgress(),
        make_embedder=lambda name, *, threads: embedder[name] if isinstance(embedder, dict) else embedder,
    )
    try:
        if task.spec.type is TaskType.VECTOR_STORAGE:
            return await VectorStorage(work, opener=watched_opener).run()
        if task.spec.type is TaskType.KNOWLEDGE_INDEXING and task.spec.effective_action is not Action.PURGE:

            def watched_label(label: Label) -> Stores:
                opened = watched_opener(settings, dimension=label.dimension, model_fingerprint=label.model_fingerprint)
                return opened(label.names)

            return await KnowledgeIndexing(work, open_labelled=watched_label).run()
        watched_stores = watched_opener(settings, dimension=embedder.dimension, model_fingerprint=embedder.fingerprint)
        if task.spec.effective_action is not Action.UPSERT:
            return await Deletion(work, open_stores=watched_stores).run()
        return await DocumentPipeline(work, embedder=embedder, open_stores=watched_stores).run()
    finally:
        await ledger.aclose()


class Lab:
    """Documents and tasks of one test. Tests share knowledge bases, one a model: a new collection takes Milvus seconds."""

    def __init__(self, urls: dict[str, str], *, folder: Path, knowledge_bases: "KnowledgeBases") -> None:
        self._knowledge_bases = knowledge_bases
        self._own: str | None = None
        self._key = uuid.uuid4().hex[:8]
        self.folder = folder
        self.documents = folder / "documents"
        self.documents.mkdir()
        self.environment = {
            **urls,
            "TASKS_DOCUMENT_ROOT": str(self.documents),
            "TASKS_TERMINATION_LOG": str(folder / "termination-log"),
        }
        (folder / "termination-log").touch()
        self.counter = folder / "embedded"
        self.counter.touch()
        self.embedder: Any = HashEmbedder(self.counter)
        self.others: dict[str, Any] = {"other": OtherEmbedder(self.counter)}
        """Further models, by name."""

    @property
    def kb_id(self) -> str:
        return self._own or self._knowledge_bases.of(self.embedder.dimension)

    def take_own_knowledge_base(self) -> None:
        self._own = self._knowledge_bases.new(self.embedder.dimension)

    def document_id(self, name: str) -> str:
        """Return the identity of a document of this test."""
        return f"{self._key}/{name}"

    def settings(self, **changes: object) -> Settings:
        given = {name.removeprefix("TASKS_").lower(): value for name, value in self.environment.items()}
        return Settings.model_validate({**given, "holder": uuid.uuid4().hex, "log_level": "warning", **changes})

    def task(
        self,
        file: str = "a.txt",
        *,
        uid: UUID | None = None,
        at: int = 0,
        timeout: str | None = None,
        stall_timeout: str | None = None,
        **payload: object,
    ) -> ProcessingTask:
        """Return a task; ``at`` is its creation in seconds after noon."""
        payload["documentId"] = self.document_id(str(payload.get("documentId", file)))
        spec: dict[str, object] = {
            "type": "document_processing",
            "kbId": self.kb_id,
            "payload": {"filePath": file, "chunkSize": 100, "chunkOverlap": 0, **payload},
        }
        if timeout is not None:
            spec["timeout"] = timeout
        if stall_timeout is not None:
            spec["stallTimeout"] = stall_timeout
        return self._of(spec, uid=uid, at=at)

    def deletion(self, document: str = "a.txt", *, uid: UUID | None = None, at: int = 0) -> ProcessingTask:
        """Return a task that deletes a document."""
        return self._of(self._deleting(action="delete", documentId=self.document_id(document)), uid=uid, at=at)

    def knowledge_base_deletion(self, *, uid: UUID | None = None, at: int = 0) -> ProcessingTask:
        """Return a task that deletes the whole knowledge base."""
        return self._of(self._deleting(action="delete_knowledge_base", confirm=self.kb_id), uid=uid, at=at)

    def indexing(self, *, uid: UUID | None = None, at: int = 0, **payload: object) -> ProcessingTask:
        """Return a task about the knowledge base as a whole."""
        return self._of({"type": "knowledge_indexing", "kbId": self.kb_id, "payload": payload}, uid=uid, at=at)

    def _deleting(self, **payload: object) -> dict[str, object]:
        return {"type": "document_processing", "kbId": self.kb_id, "payload": payload}

    def embedding(self, *, name: str = "a", uid: UUID | None = None, **payload: object) -> ProcessingTask:
        """Return a task that computes vectors."""
        return self._of({"type": "embedding_generation", "payload": payload}, uid=uid, at=0, name=name)

    def storage(self, document: str = "a", *, uid: UUID | None = None, at: int = 0, **payload: object) -> ProcessingTask:
        """Return a task that stores vectors as a document."""
        payload["documentId"] = self.document_id(document)
        return self._of({"type": "vector_storage", "kbId": self.kb_id, "payload": payload}, uid=uid, at=at)

    async def finish(self, task: ProcessingTask, phase: str = "Completed") -> None:
        """Enter a task into the projection, as the operator does."""
        await self.fetch(
            "INSERT INTO tasks (uid, namespace, name, type, priority, phase, spec, created_at, generation, "
            "resource_version) VALUES ($1, $2, $3, $4, 'normal', $5, $6::jsonb, now(), 1, 1)",
            UUID(task.metadata.uid),
            NAMESPACE,
            task.metadata.name,
            str(task.spec.type),
            phase,
            json.dumps(task.spec.manifest()),
        )

    @staticmethod
    def _of(spec: dict[str, object], *, uid: UUID | None, at: int, name: str = "a") -> ProcessingTask:
        created = (NOON + timedelta(seconds=at)).isoformat()
        metadata = {"name": name, "namespace": NAMESPACE, "uid": str(uid or uuid.uuid4()), "creationTimestamp": created}
        return ProcessingTask.model_validate({"metadata": metadata, "spec": spec})

    def write(self, sentences: Sequence[str], file: str = "a.txt") -> None:
        """Write a document of which each sentence becomes one chunk (with the chunk size of :meth:`task`)."""
        new = self.documents / f"{file}.new"
        new.write_text("\n\n".join(sentence.ljust(90, ".") + " end." for sentence in sentences))
        new.rename(self.documents / file)

    async def run(
        self, task: ProcessingTask, *, embedder: Any = None, **settings: object
    ) -> tuple[AttemptOutcome, ExitCode]:
        """Carry out one attempt in this process."""
        return await run_attempt(
            task,
            settings=self.settings(**settings),
            started=time.monotonic(),
            make=lambda name, *, threads: self.others.get(name) or embedder or self.embedder,
        )

    def command(self, *arguments: str, environment: dict[str, str] | None = None) -> "RunnerProcess":
        """Start the runner's command line."""
        return RunnerProcess(
            [sys.executable, "-m", *arguments],
            folder=self.folder,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": f"{ROOT}:{ROOT / 'crds'}",
                **self.environment,
                **(environment or {}),
            },
        )

    def task_file(self, task: ProcessingTask) -> str:
        path = self.folder / f"{uuid.uuid4().hex}.json"
        path.write_text(json.dumps(task.manifest()))
        return str(path)

    @property
    def embedded(self) -> int:
        """How many texts were computed in all."""
        return len(self.counter.read_text().splitlines())

    @cached_property
    def stores(self) -> Stores:
        return opener(self.settings(), dimension=self.embedder.dimension)(Generation(NAMESPACE, self.kb_id, 1))

    def generation(self, number: int, *, dimension: int | None = None) -> Stores:
        """Open a generation; the caller closes it."""
        opened = opener(self.settings(), dimension=dimension or self.embedder.dimension)
        return opened(Generation(NAMESPACE, self.kb_id, number))

    async def versions(self, document: str = "a.txt", *, up_to: int = 9) -> dict[int, tuple[int, int]]:
        """Return version → (rows in Milvus, rows in Elasticsearch) for the versions that have any."""
        found = {}
        for version in range(1, up_to + 1):
            counts = await asyncio.gather(
                self.stores.vectors.stored(self.document_id(document), version),
                self.stores.texts.stored(self.document_id(document), version),
            )
            if counts[0] or counts[1]:
                found[version] = (len(counts[0]), len(counts[1]))
        return found

    async def contents(self, document: str = "a.txt") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the rows of a document, of all versions, in both stores, in order, without what differs between tasks."""
        in_vectors, in_texts = await rows_of(self.stores, self.document_id(document))
        dropped = {"task_uid", "embedding", "metadata_pairs", "id", "version"}

        def plain(row: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in row.items() if name not in dropped}

        def ordered(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return sorted((plain(row) for row in found), key=lambda row: int(row["ordinal"]))

        return ordered(in_vectors), ordered(in_texts)

    async def fetch(self, query: str, *arguments: object) -> Any:
        """Ask PostgreSQL for one value."""
        connection = await asyncpg.connect(self.environment["TASKS_POSTGRES_URL"])
        try:
            return await connection.fetchval(query, *arguments)
        finally:
            await connection.close()

    async def published(self, document: str = "a.txt") -> int | None:
        found: int | None = await self.fetch(
            "SELECT published_version FROM documents WHERE namespace = $1 AND kb_id = $2 AND document_id = $3",
            NAMESPACE,
            self.kb_id,
            self.document_id(document),
        )
        return found

    async def aclose(self) -> None:
        await self.stores.aclose()


async def rows_of(stores: Stores, document_id: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return every row of a document, of all versions, from Milvus and from Elasticsearch, as they are stored."""
    vectors: Any = stores.vectors
    texts: Any = stores.texts
    await vectors.ensure()
    rows = await vectors._run("read", vectors._query, f'document_id == "{document_id}"', ["*"])
    await texts.stored(document_id, 1)  # refreshes
    query = {"term": {"document_id": document_id}}
    hits = (await texts._client.search(index=texts._name, query=query, size=10_000))["hits"]["hits"]
    return [dict(row) for row in rows], [hit["_source"] | {"id": hit["_id"]} for hit in hits]


class RunnerProcess(subprocess.Popen[str]):
    """The runner's command line. What it says goes to files, so that a test that fails, or gives up waiting, shows it."""

    def __init__(self, command: Sequence[str], *, folder: Path, env: dict[str, str]) -> None:
        self._output = folder / f"runner-{uuid.uuid4().hex[:8]}.out"
        self._errors = self._output.with_suffix(".log")
        with self._output.open("w") as output, self._errors.open("w") as errors:
            super().__init__(command, env=env, cwd=folder, stdout=output, stderr=errors)

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:  # noqa: A002 - theirs
        """Wait for the end; return what it said on standard output and standard error."""
        self.wait(timeout)
        return self._output.read_text(), self._errors.read_text()


class KnowledgeBases:
    """Those of one test module; dropped from both stores at its end."""

    def __init__(self, urls: dict[str, str]) -> None:
        self._urls = urls
        self._shared: dict[int, str] = {}
        self._all: list[tuple[str, int]] = []

    def of(self, dimension: int) -> str:
        if dimension not in self._shared:
            self._shared[dimension] = self.new(dimension)
        return self._shared[dimension]

    def new(self, dimension: int) -> str:
        kb_id = f"lab-{uuid.uuid4().hex[:12]}"
        self._all.append((kb_id, dimension))
        return kb_id

    async def drop(self) -> None:
        settings = Settings.model_validate(
            {name.removeprefix("TASKS_").lower(): value for name, value in self._urls.items()}
        )
        for kb_id, dimension in self._all:
            for number in range(1, 7):
                await drop(opener(settings, dimension=dimension)(Generation(NAMESPACE, kb_id, number)))


async def drop(stores: Stores) -> None:
    """Remove the collection and the index of a generation, if they are there, and close both stores."""
    await stores.vectors.drop()
    await stores.texts.drop()
    await stores.aclose()
