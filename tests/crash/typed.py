"""One task of a type that is not ``document_processing``, killed at a call and run again, as the operator runs it again.

Real are PostgreSQL, both stores and the runner's process. What is there before is made by pipelines in this process.
"""

import json
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from job_runner.index import Generation
from job_runner.ledger import Ledger
from job_runner.stores import Stores, opener
from task_contract.lifecycle import ExitCode
from task_contract.models import ProcessingTask
from tests.crash.life import World
from tests.crash.matrix import Outcome
from tests.crash.oracle import paths, without
from tests.crash.repeated import Repeated, lead
from tests.support.runner_lab import NOON, HashEmbedder, OtherEmbedder, drop, rows_of, run_pipeline

ROLE = "runner"
LEADS = "the alias leads here"
DOCUMENTS = {"first": 12, "second": 6}
"""Published before: document → chunks."""
EMBEDDERS = {1: HashEmbedder, 2: OtherEmbedder}
"""Model by generation: a rebuild is one with another model."""
WHILE_RUNNING = ("knowledge_base_leases", "task_usage")
"""Tables that say who is at work, or what it has cost so far."""
_READS = re.compile(r" (Milvus (search|query|has_|list_|describe_|load_|get_)\w*|Elasticsearch (HEAD|GET|POST _search)) ")
"""Calls that change nothing: a kill there is one at the write before."""
COSTS = ("epoch", "holder", "attempt", "begun", "seconds", "embedded", "reused", "repaired", "enhanced")
"""What a killed process may change: how often somebody began, and which of them did how much."""


@dataclass(frozen=True)
class Case:
    """A task, and what is there before it."""

    name: str
    type: str
    payload: Mapping[str, object]
    leaves: Mapping[int, Mapping[str, int]]
    """Number of a generation → document → rows that each store has of it in the end."""
    leads: int = 1
    """Generation to which the aliases lead in the end, if there is one."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Name → content, in the folder ``KEY`` of the document root; in the payload, KEY stands for it too."""
    seeded: bool = True
    """Whether :data:`DOCUMENTS` are published before."""
    before: "Callable[[TypedLife], Awaitable[None]] | None" = None
    whole: bool = True
    """Whether readers see no half of anything on the way, which is not so where rows are missing before."""
    points: int = 1
    """Tried unless all are: with the preparation, one takes some seconds."""


class TypedLife(Repeated):
    """A namespace of its own with one knowledge base, and one task there."""

    def __init__(self, world: World, case: Case, kills: frozenset[str] = frozenset()) -> None:
        self.world, self.role = world, ROLE
        self.case = case
        self.kills = kills
        self.key = uuid.uuid4().hex[:8]
        self.namespace = f"typed-{self.key}"
        self.uid = str(uuid.uuid4())
        self.uids = {self.uid: "TASK"}
        self.processes = 0
        self.broken: list[str] = []
        """What a reader must not see when the runner has just been killed."""

    def generation(self, number: int) -> Generation:
        return Generation(self.namespace, "kb", number)

    @asynccontextmanager
    async def opened(self, number: int) -> AsyncIterator[Stores]:
        """Open a generation, ready where it is there."""
        made = opener(self.world.settings(), dimension=EMBEDDERS[number].dimension)
        stores = made(self.generation(number))
        try:
            await stores.open_existing()
            yield stores
        finally:
            await stores.aclose()

    # ------------------------------------------------------------------------------------------------------- before

    async def prepare(self) -> None:
        """Write the files, publish what is there before, and do what the case does before."""
        folder = self.world.documents / self.key
        folder.mkdir()
        for name, content in self.case.files.items():
            (folder / name).write_text(content)
        if self.case.seeded:
            for document, count in DOCUMENTS.items():
                file = f"{self.key}/{document}.txt"
                self.world.write(file, [f"The {document} sentence {number}" for number in range(count)])
                payload = {"filePath": file, "documentId": document, "chunkSize": 100, "chunkOverlap": 0}
                done = await run_pipeline(
                    self.task("document_processing", payload, name=document), self.world.settings(holder="a"), HashEmbedder()
                )
                assert done.reason == "Completed"
        if self.case.before is not None:
            await self.case.before(self)

    def task(self, kind: str, payload: Mapping[str, object], *, name: str, uid: str | None = None) -> ProcessingTask:
        uid = uid or str(uuid.uuid4())
        self.uids[uid] = name
        created = NOON + timedelta(seconds=len(self.uids))
        metadata = {"name": name, "namespace": self.namespace, "uid": uid, "creationTimestamp": created.isoformat()}
        given = json.loads(json.dumps(payload).replace("KEY", self.key))
        spec = {"type": kind, "payload": given} | ({} if kind == "embedding_generation" else {"kbId": "kb"})
        return ProcessingTask.model_validate({"metadata": metadata, "spec": spec})

    # --------------------------------------------------------------------------------------------------------- runs

    async def run(self) -> int:
        """Run one process at the task, as the next attempt; return how it ended."""
        number = str(self.processes + 1)
        task_file = self.world.folder / f"{self.key}.json"
        task = self.task(self.case.type, self.case.payload, name="a", uid=self.uid)
        task_file.write_text(json.dumps(task.manifest()))
        message = self.world.folder / f"{self.key}.message"
        message.touch()
        return await self.execute(
            str(task_file),
            TASKS_DOCUMENT_ROOT=str(self.world.documents),
            TASKS_TERMINATION_LOG=str(message),
            TASKS_EMBEDDING_MODEL=HashEmbedder.name,
            TASKS_EMBEDDING_MODELS=OtherEmbedder.name,
            TASKS_HOLDER=f"pod-{number}",
            TASKS_ATTEMPT=number,
        )

    # -------------------------------------------------------------------------------------------------------- after

    async def read(self) -> None:
        """Look as readers do: what the ledger publishes is whole in the generation that serves, and where aliases lead."""
        ledger = Ledger(self.world.urls["TASKS_POSTGRES_URL"])
        try:
            serving = await ledger.knowledge_base(namespace=self.namespace, kb_id="kb")
            if serving is None:
                return
            published = (await ledger.contents(self.generation(serving[0]))).published
        finally:
            await ledger.aclose()
        if self.case.seeded and not DOCUMENTS.keys() <= published.keys():
            self.broken.append(f"readers miss {sorted(DOCUMENTS.keys() - published.keys())}")
        leads: dict[str, list[int]] = {"Milvus": [], "Elasticsearch": []}
        for number in EMBEDDERS:
            async with self.opened(number) as stores:
                for (store, led), one in zip(leads.items(), (stores.vectors, stores.texts), strict=True):
                    there = await one.exists()
                    if there and await one.serves():
                        led.append(number)
                    if number != serving[0] and number not in led:
                        continue
                    for document, version in published.items():
                        expected = version.rows(self.generation(number), document).keys()
                        found = (await one.stored(document, version.version)).keys() if there else set()
                        if expected != found:
                            self.broken.append(f"{store}, generation {number}: {len(found)} of {document}'s {len(expected)}")
        if published and any(len(led) != 1 for led in leads.values()):
            self.broken.append(f"aliases lead to {leads}")

    async def look(self) -> dict[str, Any]:
        """Return all that is left, with names, uids and times replaced by what they are."""
        state: dict[str, Any] = {}
        for number in EMBEDDERS:
            async with self.opened(number) as stores:
                found = await self._generation(stores)
            state |= {f"generation {number} in {store}": rows for store, rows in found.items()}
        for table, column in await self._tables():
            wanted = self.namespace if column == "namespace" else self.uid
            entered = await self.world.sql.fetch(f"SELECT * FROM {table} WHERE {column}::text = $1 ORDER BY ctid", wanted)
            rows = [{name: value for name, value in row.items() if name not in COSTS} for row in entered]
            state[table] = [_parsed(row) for row in rows]
        # Each attempt has its own, and the last one tells what counts.
        state["task_results"] = state["task_results"][-1:]
        outputs = (self.world.documents / "outputs" / self.key).rglob("*")
        state["files"] = {one.name: one.read_text() for one in outputs if one.is_file()}
        names = {self.namespace: "NAMESPACE", self.key: "KEY", **{uid: f"UID of {name}" for uid, name in self.uids.items()}}
        replaced: dict[str, Any] = without(state, names)
        return {part: sorted(rows, key=str) if isinstance(rows, list) else rows for part, rows in replaced.items()}

    async def _generation(self, stores: Stores) -> dict[str, Any]:
        """Return store → the rows of a generation by document, version and ordinal; None where it is not there."""
        there = {"Milvus": await stores.vectors.exists(), "Elasticsearch": await stores.texts.exists()}
        if not all(there.values()):
            return {store: "half there" if known else None for store, known in there.items()}
        documents = {row.document_id for one in (stores.vectors, stores.texts) async for part in one.scan() for row in part}
        found: dict[str, dict[str, Any]] = {store: {} for store in there}
        for document in sorted(documents):
            for store, rows in zip(found, await rows_of(stores, document), strict=True):
                for row in rows:
                    key = f"{document.replace(self.key, 'KEY')} {row['version']}/{row['ordinal']}"
                    kept = {name: value for name, value in row.items() if name not in {"id", "duplicate_of"}}
                    kept["embedding"] = [round(float(number), 4) for number in row.get("embedding", ())]
                    kept["is a duplicate"] = bool(row.get("duplicate_of"))
                    found[store][f"stray {row['id']}" if key in found[store] else key] = kept
        leads = {"Milvus": await stores.vectors.serves(), "Elasticsearch": await stores.texts.serves()}
        return {store: rows | {LEADS: leads[store]} for store, rows in found.items()}

    async def _tables(self) -> list[tuple[str, str]]:
        """Return every table that names a namespace or a task, with the column that does."""
        query = (
            "SELECT table_name, min(column_name) FROM information_schema.columns JOIN information_schema.tables"
            " USING (table_schema, table_name) WHERE table_schema = 'public' AND table_type = 'BASE TABLE'"
            " AND column_name IN ('namespace', 'task_uid') GROUP BY table_name ORDER BY table_name"
        )
        return [(table, column) for table, column in await self.world.sql.fetch(query) if table not in WHILE_RUNNING]

    async def aclose(self) -> None:
        for number, embedder in EMBEDDERS.items():
            await drop(opener(self.world.settings(), dimension=embedder.dimension)(self.generation(number)))


def _parsed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with its JSON parsed, without what a killed process may change."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, bytes):
            found[name] = value.hex()
        elif isinstance(value, str) and value[:1] in "{[":
            found[name] = _without_costs(json.loads(value))
        else:
            found[name] = value
    return found


def _without_costs(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_costs(one) for name, one in value.items() if name not in COSTS}
    return value


@dataclass(frozen=True)
class Ended:
    """What a task without faults leaves, and the points on its way."""

    state: dict[str, Any]
    points: tuple[str, ...]


async def without_faults(world: World, case: Case) -> Ended:
    """Run a task without faults."""
    life = TypedLife(world, case)
    try:
        await life.prepare()
        assert await life.run() == ExitCode.SUCCEEDED
        await life.read()
        assert not life.broken, life.broken
        points = tuple(point for point in life.points if not _READS.search(point))
        return Ended(state=await life.look(), points=points)
    finally:
        await life.aclose()


async def kill(world: World, case: Case, point: str, undisturbed: Ended) -> Outcome:
    """Kill a runner, look at what readers see, run the task again, and compare the end."""

    async def live(life: TypedLife) -> list[str]:
        await life.prepare()
        while await life.run() != ExitCode.SUCCEEDED:
            if case.whole:
                await life.read()
        await life.read()
        return [*life.broken, *paths("state", undisturbed.state, await life.look())]

    return await lead(case.name, lambda: TypedLife(world, case, frozenset({point})), live)


async def lose_rows(life: TypedLife) -> None:
    """Take rows out of one store behind everybody's back, and others out of the other one."""
    async with life.opened(1) as stores:
        for store, document in ((stores.vectors, "first"), (stores.texts, "second")):
            await store.delete(sorted(await store.stored(document, 1))[:3])
