"""The generations of a knowledge base in the ledger: which one serves, which one is being filled, which one is kept.

Readers of the ledger see one generation at any time, whole: the switch is one transaction, which holds the advisory lock of
the knowledge base exclusively, as its deletion does. Commits hold it shared. So the last comparison of what is published
with what the new generation holds, and the switch itself, have no commit in between; a commit that comes later finds another
generation than its intent was entered for and begins again (``Commit.AGAIN``).

One task at a time rebuilds, rolls back, repairs or analyzes a knowledge base: it holds the *lease*, a row with an epoch.
All it writes here is conditional on the epoch. So a process that was given up for dead and wakes up can write into both
stores, rows of a generation that nobody reads or equal ones, and cannot switch.

Numbers are given once: of a generation that goes there is a row in ``generation_drops``, for ever.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from job_runner.postgres import Connected
from task_contract.errors import Fenced, KnowledgeBaseBusy, KnowledgeBaseNotFound

TASK_LOCK_SHARED: Final = "SELECT pg_advisory_xact_lock_shared(hashtextextended($1::uuid::text, 0))"
"""Whoever commits for a task takes it. The operator takes it exclusively to raise the fence."""
KNOWLEDGE_BASE_LOCK: Final = "hashtextextended($1 || '/' || $2, 1)"
"""Key of the advisory lock of (namespace, kbId); the seed keeps it apart from the locks of tasks."""
NEXT_GENERATION: Final = (
    "(SELECT coalesce(max(generation), 0) + 1 FROM ("
    "SELECT namespace, kb_id, generation FROM knowledge_bases UNION ALL "
    "SELECT namespace, kb_id, generation FROM generations UNION ALL "
    "SELECT namespace, kb_id, generation FROM generation_drops UNION ALL "
    "SELECT namespace, kb_id, generation FROM knowledge_base_deletions) AS known WHERE namespace = $1 AND kb_id = $2)"
)
"""The number of a new generation of ($1, $2): higher than any that was given."""
DELETED_SINCE: Final = (
    "SELECT EXISTS (SELECT FROM knowledge_base_deletions WHERE namespace = $1 AND kb_id = $2 AND task_created_at > $3)"
)
"""Whether a task that is newer than a moment has deleted the knowledge base."""
_STRANGER: Final = "interval '10 minutes'"
"""So long a lease is held by a task that the projection does not know, as of somebody at a command line, when it rests."""
_DEAD: Final = (
    "(EXISTS (SELECT FROM tasks WHERE tasks.uid = {0} AND (finished_at IS NOT NULL OR deleted_at IS NOT NULL)) "
    "OR EXISTS (SELECT FROM task_fences WHERE task_fences.task_uid = {0}))"
)
"""Whether a task has ended or is gone."""
_LEASE: Final = (
    (
        "SELECT l.task_uid, t.name, l.task_uid IS NULL OR l.task_uid = $3 OR DEAD "
        "OR (t.uid IS NULL AND l.renewed_at < now() - STRANGER) AS free "
        "FROM knowledge_base_leases l LEFT JOIN tasks t ON t.uid = l.task_uid "
        "WHERE l.namespace = $1 AND l.kb_id = $2 FOR UPDATE OF l"
    )
    .replace("DEAD", _DEAD.format("l.task_uid"))
    .replace("STRANGER", _STRANGER)
)
"""Who has the lease of ($1, $2), and whether task $3 may take it."""
_BEGIN: Final = (
    "INSERT INTO generations (namespace, kb_id, generation, model_fingerprint, dimension, state, embedding_model, "
    "splitting, task_uid) VALUES ($1, $2, NEXT, $3, $4, 'filling', $5, $6::jsonb, $7) RETURNING generation"
).replace("NEXT", NEXT_GENERATION)
_RETAIN_AGAIN: Final = (
    "UPDATE generations SET state = 'retained', task_uid = NULL WHERE {0} AND state = 'filling' AND keep_until IS NOT NULL"
)
_DROP: Final = (
    "WITH gone AS (DELETE FROM generations WHERE {0} RETURNING namespace, kb_id, generation) "
    "INSERT INTO generation_drops (namespace, kb_id, generation) SELECT namespace, kb_id, generation FROM gone "
    "ON CONFLICT (namespace, kb_id, generation) DO UPDATE SET since = now(), dropped_at = NULL"
)
_DIFFERING: Final = (
    "FROM documents d LEFT JOIN generation_documents g ON (g.namespace, g.kb_id, g.document_id) = "
    "(d.namespace, d.kb_id, d.document_id) AND g.generation = $3 WHERE d.namespace = $1 AND d.kb_id = $2 "
    "AND d.published_version IS NOT NULL AND g.version IS DISTINCT FROM d.published_version "
)
"""Documents of ($1, $2) of which generation $3 has not the version that readers see."""


class State(StrEnum):
    """What a generation is for."""

    FILLING = "filling"
    """A rebuild or a rollback brings documents into it."""
    SERVING = "serving"
    """Readers see it."""
    RETAINED = "retained"
    """It has served, and is kept for a rollback."""


@dataclass(frozen=True, slots=True)
class KnownGeneration:
    """A generation as the ledger knows it."""

    number: int
    model_fingerprint: str
    dimension: int
    state: State
    splitting: Mapping[str, Any]
    """What the rebuild that made it wants of all documents: chunkSize, chunkOverlap, processingMode; those it named."""
    task_uid: UUID | None
    """The task that fills it or has filled it."""
    switched: bool
    """Whether that task has made it serve."""
    aliased: bool
    """Whether both aliases were seen to lead to it since."""
    facts: Mapping[str, Any]
    """Fields of the result of that task."""


@dataclass(frozen=True, slots=True)
class Lease:
    """That a task alone works on a knowledge base as a whole."""

    namespace: str
    kb_id: str
    task_uid: UUID
    holder: str
    epoch: int

    @property
    def key(self) -> tuple[str, str]:
        """The knowledge base."""
        return self.namespace, self.kb_id


@dataclass(frozen=True, slots=True)
class Differing:
    """A document that a generation has not, or in another version, or that it has and readers do not see any more."""

    document_id: str
    version: int
    """That readers see."""
    content_hash: str
    chunk_count: int
    """0: it is deleted."""


@dataclass(frozen=True, slots=True)
class Filled:
    """What was brought into a generation of one document."""

    document_id: str
    version: int
    content_hash: str
    chunk_count: int


@dataclass(frozen=True, slots=True)
class Switch:
    """What a switch enters beside the generation."""

    keep_seconds: int
    """How long the generation that served is kept."""
    facts: Mapping[str, Any] = field(default_factory=dict)


class Generations(Connected):
    """The part of :class:`job_runner.ledger.Ledger` that knows generations."""

    async def acquire(
        self, *, namespace: str, kb_id: str, task_uid: UUID, task_created_at: datetime, holder: str
    ) -> Lease | None:
        """Take the lease of a knowledge base; ``None`` when a newer task has deleted it.

        Takes over from an earlier attempt of the task, and from a task that has ended. Raises KnowledgeBaseNotFound,
        KnowledgeBaseBusy while another task has the lease, and Fenced when this one was canceled.
        """
        key = namespace, kb_id
        async with self.connection("take the lease") as connection, connection.transaction():
            if await connection.fetchval("SELECT 1 FROM task_fences WHERE task_uid = $1", task_uid):
                raise _fenced(kb_id)
            await connection.execute(f"SELECT pg_advisory_xact_lock_shared({KNOWLEDGE_BASE_LOCK})", *key)
            if await connection.fetchval(DELETED_SINCE, *key, task_created_at):
                return None
            await connection.execute(
                "INSERT INTO knowledge_base_leases (namespace, kb_id, holder, epoch) SELECT namespace, kb_id, '', 0 "
                "FROM knowledge_bases WHERE namespace = $1 AND kb_id = $2 ON CONFLICT DO NOTHING",
                *key,
            )
            row = await connection.fetchrow(
                _LEASE,
                *key,
                task_uid,
            )
            if row is None:
                raise KnowledgeBaseNotFound(
                    f"cannot index {kb_id}: namespace {namespace} has no such knowledge base; check spec.kbId"
                )
            if not row["free"]:
                raise KnowledgeBaseBusy(
                    f"cannot index {kb_id}: task {row['name'] or row['task_uid']} rebuilds, repairs or analyzes it; "
                    "wait for its end, or cancel it"
                )
            epoch = await connection.fetchval(
                "UPDATE knowledge_base_leases SET task_uid = $3, holder = $4, epoch = epoch + 1, renewed_at = now() "
                "WHERE namespace = $1 AND kb_id = $2 RETURNING epoch",
                *key,
                task_uid,
                holder,
            )
            return Lease(namespace, kb_id, task_uid, holder, epoch)

    async def was_deleted(self, *, namespace: str, kb_id: str, since: datetime) -> bool:
        """Tell whether a task that is newer than a moment has deleted the knowledge base."""
        async with self.connection("look for deletions") as connection:
            return bool(await connection.fetchval(DELETED_SINCE, namespace, kb_id, since))

    async def renew(self, lease: Lease) -> None:
        """Say that the task goes on. Raises Fenced when it was canceled, or another has taken over."""
        async with self.connection("renew the lease") as connection, connection.transaction():
            await _hold(connection, lease)

    async def release(self, lease: Lease) -> None:
        """Let the next task work on the knowledge base."""
        async with self.connection("release the lease") as connection:
            await connection.execute(
                "UPDATE knowledge_base_leases SET task_uid = NULL, holder = '' "
                "WHERE namespace = $1 AND kb_id = $2 AND task_uid = $3 AND epoch = $4",
                *lease.key,
                lease.task_uid,
                lease.epoch,
            )

    async def generations(self, *, namespace: str, kb_id: str) -> list[KnownGeneration]:
        """Return the generations of a knowledge base, the youngest number first."""
        async with self.connection("read the generations") as connection:
            rows = await connection.fetch(
                "SELECT generation, model_fingerprint, dimension, state, splitting, task_uid, switched_at, aliases_at, "
                "facts FROM generations WHERE namespace = $1 AND kb_id = $2 ORDER BY generation DESC",
                namespace,
                kb_id,
            )
        return [
            KnownGeneration(
                number=row["generation"],
                model_fingerprint=row["model_fingerprint"],
                dimension=row["dimension"],
                state=State(row["state"]),
                splitting=json.loads(row["splitting"]),
                task_uid=row["task_uid"],
                switched=row["switched_at"] is not None,
                aliased=row["switched_at"] is None or row["aliases_at"] is not None,
                facts=json.loads(row["facts"]),
            )
            for row in rows
        ]

    async def begin_generation(
        self, lease: Lease, *, model_fingerprint: str, dimension: int, embedding_model: str, splitting: Mapping[str, Any]
    ) -> int:
        """Return the number of a generation to be filled: that of an earlier attempt at the same, else a new one.

        Another one that was being filled goes, or is retained again: nobody else has the lease, so nobody fills it.
        """
        wanted = json.dumps(splitting, sort_keys=True)
        async with self.connection("begin a generation") as connection, connection.transaction():
            await _hold(connection, lease)
            number: int | None = await connection.fetchval(
                "UPDATE generations SET task_uid = $3 WHERE namespace = $1 AND kb_id = $2 AND state = 'filling' "
                "AND keep_until IS NULL AND model_fingerprint = $4 AND splitting = $5::jsonb RETURNING generation",
                *lease.key,
                lease.task_uid,
                model_fingerprint,
                wanted,
            )
            await _give_up(connection, "namespace = $1 AND kb_id = $2 AND generation <> $3", *lease.key, number or 0)
            if number is None:
                number = await connection.fetchval(
                    _BEGIN,
                    *lease.key,
                    model_fingerprint,
                    dimension,
                    embedding_model,
                    wanted,
                    lease.task_uid,
                )
            assert number is not None  # noqa: S101 - for the type checker: inserted above
            return number

    async def refill_generation(self, lease: Lease) -> int | None:
        """Make the generation that is retained one to be filled, for a rollback to it; ``None`` where there is none.

        One that an earlier attempt has begun to fill is gone on with.
        """
        async with self.connection("begin a rollback") as connection, connection.transaction():
            await _hold(connection, lease)
            number: int | None = await connection.fetchval(
                "UPDATE generations SET state = 'filling', task_uid = $3, switched_at = NULL, aliases_at = NULL "
                "WHERE namespace = $1 AND kb_id = $2 AND keep_until IS NOT NULL AND generation = ("
                "SELECT max(generation) FROM generations WHERE namespace = $1 AND kb_id = $2 AND keep_until IS NOT NULL) "
                "RETURNING generation",
                *lease.key,
                lease.task_uid,
            )
            return number

    async def give_up(self, lease: Lease, number: int) -> None:
        """Drop a generation that was being filled; one that has served is retained again."""
        async with self.connection("give up a generation") as connection, connection.transaction():
            await _hold(connection, lease)
            await _give_up(connection, "namespace = $1 AND kb_id = $2 AND generation = $3", *lease.key, number)

    async def differing(self, lease: Lease, number: int, *, after: str = "", most: int = 1000) -> list[Differing]:
        """Return documents that are to be brought into a generation, in the order of their identities, from one on."""
        async with self.connection("compare the generations") as connection, connection.transaction():
            await _hold(connection, lease)
            rows = await connection.fetch(
                "SELECT d.document_id, d.published_version, d.content_hash, d.chunk_count " + _DIFFERING + "AND "
                "d.document_id > $4 ORDER BY d.document_id LIMIT $5",
                *lease.key,
                number,
                after,
                most,
            )
        return [
            Differing(row["document_id"], row["published_version"], row["content_hash"], row["chunk_count"]) for row in rows
        ]

    async def enter(self, lease: Lease, number: int, documents: Sequence[Filled]) -> None:
        """Note what both stores hold of documents in a generation. They were read back, or will be before a switch."""
        async with self.connection("enter documents of a generation") as connection, connection.transaction():
            await _hold(connection, lease)
            await connection.execute(
                "INSERT INTO generation_documents (namespace, kb_id, generation, document_id, version, content_hash, "
                "chunk_count) SELECT $1, $2, $3, * FROM unnest($4::text[], $5::bigint[], $6::text[], $7::integer[]) "
                "ON CONFLICT (namespace, kb_id, generation, document_id) DO UPDATE SET version = excluded.version, "
                "content_hash = excluded.content_hash, chunk_count = excluded.chunk_count",
                *lease.key,
                number,
                [one.document_id for one in documents],
                [one.version for one in documents],
                [one.content_hash for one in documents],
                [one.chunk_count for one in documents],
            )

    async def forget(self, lease: Lease, number: int, document_ids: Sequence[str]) -> None:
        """Take documents out of what a generation is said to hold: they are to be brought there again."""
        async with self.connection("forget documents of a generation") as connection, connection.transaction():
            await _hold(connection, lease)
            await connection.execute(
                "DELETE FROM generation_documents WHERE namespace = $1 AND kb_id = $2 AND generation = $3 "
                "AND document_id = ANY($4)",
                *lease.key,
                number,
                list(document_ids),
            )

    async def switch(self, lease: Lease, number: int, entered: Switch) -> bool:
        """Make a generation serve that holds all that is published; return whether it does.

        ``False``: tasks have published meanwhile, and nothing has changed. The generation that served is retained; one that
        was retained before goes. Raises Fenced when the task was canceled or the lease has been taken over.
        """
        key = lease.key
        async with self.connection("switch the generations") as connection, connection.transaction():
            await connection.execute(TASK_LOCK_SHARED, lease.task_uid)
            await connection.execute(f"SELECT pg_advisory_xact_lock({KNOWLEDGE_BASE_LOCK})", *key)
            await _hold(connection, lease)
            if await connection.fetchval(f"SELECT EXISTS (SELECT {_DIFFERING})", *key, number):
                return False
            await connection.execute(_DROP.format("namespace = $1 AND kb_id = $2 AND state = 'retained'"), *key)
            await connection.execute(
                "UPDATE generations SET state = 'retained', keep_until = now() + make_interval(secs => $3) "
                "WHERE namespace = $1 AND kb_id = $2 AND state = 'serving'",
                *key,
                float(entered.keep_seconds),
            )
            await connection.execute(
                "INSERT INTO generation_documents (namespace, kb_id, generation, document_id, version, content_hash, "
                "chunk_count) SELECT namespace, kb_id, b.generation, d.document_id, d.published_version, d.content_hash, "
                "d.chunk_count FROM documents d JOIN knowledge_bases b USING (namespace, kb_id) "
                "WHERE namespace = $1 AND kb_id = $2 AND d.published_version IS NOT NULL",
                *key,
            )
            await connection.execute(
                "UPDATE documents d SET content_hash = g.content_hash, chunk_count = g.chunk_count, checked_at = now(), "
                "missing = 0, extra = 0 FROM generation_documents g WHERE d.namespace = $1 AND d.kb_id = $2 "
                "AND (g.namespace, g.kb_id, g.document_id) = (d.namespace, d.kb_id, d.document_id) AND g.generation = $3",
                *key,
                number,
            )
            await connection.execute(
                "DELETE FROM generation_documents WHERE namespace = $1 AND kb_id = $2 AND generation = $3", *key, number
            )
            await connection.execute(
                "UPDATE generations SET state = 'serving', switched_at = now(), aliases_at = NULL, keep_until = NULL, "
                "facts = $4::jsonb WHERE namespace = $1 AND kb_id = $2 AND generation = $3",
                *key,
                number,
                json.dumps(entered.facts),
            )
            await connection.execute(
                "UPDATE knowledge_bases b SET generation = g.generation, model_fingerprint = g.model_fingerprint, "
                "dimension = g.dimension FROM generations g WHERE b.namespace = $1 AND b.kb_id = $2 "
                "AND (g.namespace, g.kb_id, g.generation) = (b.namespace, b.kb_id, $3)",
                *key,
                number,
            )
            return True

    # ------------------------------------------------------------------------------------- what a switch leaves to do

    async def aliased(self, *, namespace: str, kb_id: str, number: int) -> bool:
        """Note that both aliases lead to a generation; return whether it is the one that serves."""
        async with self.connection("record the aliases") as connection:
            await connection.execute(
                "UPDATE generations SET aliases_at = now() WHERE namespace = $1 AND kb_id = $2 AND generation = $3 "
                "AND state = 'serving' AND switched_at IS NOT NULL",
                namespace,
                kb_id,
                number,
            )
            serving = await connection.fetchval(
                "SELECT generation FROM knowledge_bases WHERE namespace = $1 AND kb_id = $2", namespace, kb_id
            )
            return bool(serving == number)

    async def switched(self, *, namespace: str, since: datetime | None) -> list[str]:
        """Return the knowledge bases whose aliases are to be looked at: switched since a moment, or not seen to be yet."""
        async with self.connection("look for switches") as connection:
            rows = await connection.fetch(
                "SELECT kb_id FROM generations WHERE namespace = $1 AND state = 'serving' AND switched_at IS NOT NULL "
                "AND ($2::timestamptz IS NULL OR switched_at > $2 OR aliases_at IS NULL) ORDER BY kb_id",
                namespace,
                since,
            )
            return [row["kb_id"] for row in rows]

    async def expire(self, *, namespace: str) -> None:
        """Have go what is retained longer than it should be, and what tasks have left that will not fill it any more."""
        expired = (
            "namespace = $1 AND state = 'retained' AND keep_until < now() AND NOT EXISTS (SELECT FROM generations other "
            "WHERE (other.namespace, other.kb_id, other.state) = (generations.namespace, generations.kb_id, 'serving') "
            "AND other.switched_at IS NOT NULL AND other.aliases_at IS NULL)"  # the aliases may still lead to it
        )
        async with self.connection("look for old generations") as connection, connection.transaction():
            await _give_up(connection, f"namespace = $1 AND {_DEAD.format('generations.task_uid')}", namespace)
            await connection.execute(_DROP.format(expired), namespace)

    async def dropped_generations(self, *, namespace: str, since: datetime | None) -> list[tuple[str, int]]:
        """Return (kbId, generation) of those that go since a moment, or that a store may still have."""
        async with self.connection("look for dropped generations") as connection:
            rows = await connection.fetch(
                "SELECT kb_id, generation FROM knowledge_base_deletions WHERE namespace = $1 "
                "AND generation IS NOT NULL AND ($2::timestamptz IS NULL OR deleted_at > $2 OR dropped_at IS NULL) "
                "UNION SELECT kb_id, generation FROM generation_drops WHERE namespace = $1 "
                "AND ($2::timestamptz IS NULL OR since > $2 OR dropped_at IS NULL) ORDER BY kb_id, generation",
                namespace,
                since,
            )
            return [(row["kb_id"], row["generation"]) for row in rows]

    async def dropped(self, *, namespace: str, kb_id: str, generation: int) -> None:
        """Note that both stores were found without a generation."""
        async with self.connection("record that a generation is gone") as connection:
            for table in ("knowledge_base_deletions", "generation_drops"):
                await connection.execute(
                    f"UPDATE {table} SET dropped_at = now() "  # noqa: S608 - names of tables
                    "WHERE namespace = $1 AND kb_id = $2 AND generation = $3",
                    namespace,
                    kb_id,
                    generation,
                )

    async def is_needed(self, *, namespace: str, kb_id: str, generation: int) -> bool:
        """Tell whether a generation serves, is being filled or retained."""
        async with self.connection("look for the generation") as connection:
            return bool(
                await connection.fetchval(
                    "SELECT EXISTS (SELECT FROM knowledge_bases WHERE namespace = $1 AND kb_id = $2 AND generation = $3 "
                    "UNION ALL SELECT FROM generations WHERE namespace = $1 AND kb_id = $2 AND generation = $3)",
                    namespace,
                    kb_id,
                    generation,
                )
            )


def _fenced(kb_id: str) -> Fenced:
    return Fenced(f"cannot go on with {kb_id}: the task was canceled, or another one has taken over; this one stops")


async def _hold(connection: Any, lease: Lease) -> None:
    """Hold on to the lease until the transaction ends, and renew it."""
    held = await connection.fetchval(
        "UPDATE knowledge_base_leases SET renewed_at = now() WHERE namespace = $1 AND kb_id = $2 AND task_uid = $3 "
        "AND epoch = $4 AND NOT EXISTS (SELECT FROM task_fences WHERE task_fences.task_uid = $3) RETURNING 1",
        *lease.key,
        lease.task_uid,
        lease.epoch,
    )
    if not held:
        raise _fenced(lease.kb_id)


async def _give_up(connection: Any, which: str, *arguments: object) -> None:
    """Drop generations that were being filled; those that have served are retained again."""
    await connection.execute(_RETAIN_AGAIN.format(which), *arguments)
    await connection.execute(_DROP.format(f"{which} AND state = 'filling'"), *arguments)
