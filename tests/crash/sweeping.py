"""One sweep of a namespace that has everything to be swept, killed at a call and made again, as the operator makes it again.

Real are PostgreSQL, both stores and the sweep's process. What it is about is left behind by pipelines that stop at a point:
nobody but the sweep itself dies here.
"""

import asyncio
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

from job_runner.index import Generation
from job_runner.stores import Stores, opener
from task_contract.lifecycle import ExitCode
from task_contract.models import ProcessingTask
from tests.crash.life import NEW, OLD, World
from tests.crash.matrix import Outcome
from tests.crash.oracle import paths, without
from tests.crash.repeated import Repeated, lead
from tests.support.runner_lab import NOON, HashEmbedder, Reached, drop, rows_of, run_pipeline, run_watched

ROLE = "sweep"
KB, GONE = "kb", "kb-gone"
DOCUMENTS = {
    "half": "a version is published, a task that has ended has left the next one half way",
    "replaced": "its task died between publishing and removing the version before",
    "live": "the same, and a task that lives has written the version after the published one",
}
TABLES = ("knowledge_bases", "generations", "documents", "document_versions", "knowledge_base_deletions")


class Stopped(Exception):
    """The pipeline goes no further."""


@dataclass
class SweepLife(Repeated):
    """A namespace of its own, with what is to be swept in it and what is not."""

    world: World
    kills: frozenset[str] = frozenset()
    role: str = ROLE
    key: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    uids: dict[str, str] = field(default_factory=dict)
    """Uid of a task → what is said of it in a comparison."""
    processes: int = 0
    broken: list[str] = field(default_factory=list)
    """What must not be seen when the sweep has just been killed."""

    @property
    def namespace(self) -> str:
        return f"swept-{self.key}"

    def stores(self, kb_id: str) -> Stores:
        return opener(self.world.settings(), dimension=HashEmbedder.dimension)(Generation(self.namespace, kb_id, 1))

    # ------------------------------------------------------------------------------------------------------- before

    async def prepare(self) -> None:
        """Leave behind what a sweep is for."""
        await asyncio.gather(self._fill(), self._delete_knowledge_base())

    async def _fill(self) -> None:
        for document in DOCUMENTS:
            await self._publish(document, OLD)
        await self._stop(self._task("half", NEW, at=1), "ledger.commit 1 before")
        await self.world.sql.execute(
            "INSERT INTO tasks (uid, namespace, name, type, priority, phase, spec, created_at, finished_at, generation, "
            "resource_version) VALUES ($1, $2, 'a', 'document_processing', 'normal', 'Failed', '{}', now(), now(), 1, 1)",
            next(UUID(uid) for uid, name in self.uids.items() if name == f"half {NEW}"),
            self.namespace,
        )
        for document in ("replaced", "live"):
            await self._stop(self._task(document, NEW, at=1), "ledger.commit 1 after")
        await self._stop(self._task("live", OLD, at=2), "ledger.commit 1 before")

    async def _delete_knowledge_base(self) -> None:
        await self._publish("document", OLD, kb_id=GONE)
        deletion = self._of({"action": "delete_knowledge_base", "confirm": GONE}, "deletion", kb_id=GONE, at=1)
        await self._stop(deletion, "ledger.delete_knowledge_base 1 after")

    async def _publish(self, document: str, file: str, *, kb_id: str = KB) -> None:
        done = await run_pipeline(self._task(document, file, kb_id=kb_id), self.world.settings(holder="a"), HashEmbedder())
        assert done.reason == "Completed"

    async def _stop(self, task: ProcessingTask, point: str) -> None:
        async def stop() -> None:
            raise Stopped

        try:
            await run_watched(task, self.world.settings(holder="a"), HashEmbedder(), Reached(point, stop))
        except Stopped:
            return
        raise AssertionError(f"the pipeline has not come to {point}")

    def _task(self, document: str, file: str, *, kb_id: str = KB, at: int = 0) -> ProcessingTask:
        payload = {"filePath": file, "documentId": document, "chunkSize": 100, "chunkOverlap": 0}
        return self._of(payload, f"{document} {file}", kb_id=kb_id, at=at)

    def _of(self, payload: Mapping[str, object], name: str, *, kb_id: str, at: int) -> ProcessingTask:
        uid = str(uuid.uuid4())
        self.uids[uid] = name
        metadata = {
            "name": "a",
            "namespace": self.namespace,
            "uid": uid,
            "creationTimestamp": (NOON + timedelta(seconds=at)).isoformat(),
        }
        spec = {"type": "document_processing", "kbId": kb_id, "payload": payload}
        return ProcessingTask.model_validate({"metadata": metadata, "spec": spec})

    # -------------------------------------------------------------------------------------------------------- sweep

    async def sweep(self) -> int:
        """Run one process; return how it ended."""
        return await self.execute("--namespace", self.namespace)

    # -------------------------------------------------------------------------------------------------------- after

    async def look(self) -> dict[str, Any]:
        """Return what is in both stores and in the ledger, with names, uids and times replaced by what they are."""
        stores, gone = self.stores(KB), self.stores(GONE)
        try:
            rows = {document: await rows_of(stores, document) for document in DOCUMENTS}
            there = {"Milvus": await gone.vectors.exists(), "Elasticsearch": await gone.texts.exists()}
        finally:
            await stores.aclose()
            await gone.aclose()
        state: dict[str, Any] = {"Milvus": {}, "Elasticsearch": {}, "deleted knowledge base": there}
        for document, both in rows.items():
            for store, found in zip(("Milvus", "Elasticsearch"), both, strict=True):
                state[store] |= {f"{document} {row['version']}/{row['ordinal']}": _plain(row) for row in found}
        for table in TABLES:
            entered = await self.world.sql.fetch(f"SELECT * FROM {table} WHERE namespace = $1", self.namespace)
            state[table] = [dict(row) for row in entered]
        names = {self.namespace: "NAMESPACE", **{uid: f"UID of {name}" for uid, name in self.uids.items()}}
        replaced: dict[str, Any] = without(state, names)
        for table in TABLES:
            replaced[table] = sorted(replaced[table], key=str)
        return replaced

    async def summary(self) -> dict[str, Any] | None:
        """Return what the namespace's row in sweeps says."""
        found = await self.world.sql.fetchval("SELECT summary::text FROM sweeps WHERE namespace = $1", self.namespace)
        return None if found is None else dict(json.loads(found))

    async def aclose(self) -> None:
        for kb_id in (KB, GONE):
            await drop(self.stores(kb_id))


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    embedding = [round(float(number), 4) for number in row.get("embedding", ())]
    return {name: value for name, value in row.items() if name != "id"} | {"embedding": embedding}


@dataclass(frozen=True)
class Swept:
    """What a sweep without faults leaves."""

    state: dict[str, Any]
    summary: dict[str, Any]
    points: tuple[str, ...]


async def without_faults(world: World) -> Swept:
    """Sweep twice without faults, in two namespaces: what differs says nothing."""

    async def one() -> tuple[SweepLife, dict[str, Any], dict[str, Any] | None]:
        life = SweepLife(world)
        try:
            await life.prepare()
            assert await life.sweep() == ExitCode.SUCCEEDED
            return life, await life.look(), await life.summary()
        finally:
            await life.aclose()

    (first, state, summary), (second, other, said) = await asyncio.gather(one(), one())
    assert not (found := paths("state", state, other)), f"two sweeps without faults differ: {found}"
    assert summary is not None
    assert summary == said
    odd = set(first.points) ^ set(second.points)
    assert not odd, f"two sweeps without faults differ in what they call: {sorted(odd)}"
    return Swept(state=state, summary=summary, points=tuple(first.points))


async def kill(world: World, point: str, undisturbed: Swept) -> Outcome:
    """Kill a sweep, look at what it has left so far, sweep again, and compare the end."""

    async def live(life: SweepLife) -> list[str]:
        await life.prepare()
        while await life.sweep() != ExitCode.SUCCEEDED:
            await _look_between(life, undisturbed)
        return [*life.broken, *differences(undisturbed, await life.look(), await life.summary())]

    return await lead(ROLE, lambda: SweepLife(world, frozenset({point})), live)


async def _look_between(life: SweepLife, undisturbed: Swept) -> None:
    """What stays in the end is never missing; and whoever finds the row in sweeps may believe it."""
    state = await life.look()
    for store in ("Milvus", "Elasticsearch"):
        kept = undisturbed.state[store]
        life.broken += paths(f"{store}, killed", kept, {key: row for key, row in state[store].items() if key in kept})
    if await life.summary() is not None:
        life.broken += [f"said to be swept: {one}" for one in paths("state", undisturbed.state, state)]


def differences(undisturbed: Swept, state: Mapping[str, Any], summary: Mapping[str, Any] | None) -> list[str]:
    """Return how an end differs. A sweep that was killed has told nobody what it removed: the last one removes the rest."""
    found = paths("state", undisturbed.state, state)
    if summary is None:
        return [*found, "no row in sweeps"]
    for name, expected in undisturbed.summary.items():
        removed = name in {"intents", "milvus_rows", "elasticsearch_rows", "generations"}
        if summary[name] > expected if removed else summary[name] != expected:
            found.append(f"sweeps.summary.{name}: {summary[name]} instead of {expected}")
    return found
