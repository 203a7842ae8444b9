"""The knowledge ledger in PostgreSQL: which version of a document readers see, and who may write the next one.

Nothing is lost whatever dies when:

- A version is an *intent* until its row and the document's row say ``published``, in one transaction. Before it, readers
  of the ledger see the old version, whole; after it, the new one, whole: both stores were read back before.
- Each process that works on an intent raises its *epoch* and keeps the number; committing wants the same number. A pod that
  was given up for dead and wakes up can write rows of that one version, which the new holder writes too, equal for equal
  content, and cannot commit. When the content has changed between two attempts, the version number changes too, so that
  late writes of the older content go to a number that nobody reads.
- A task's *fence* (a row in ``task_fences``) and its commit exclude each other by an advisory lock on the task's uid:
  whichever comes first counts.
- If the connection breaks during a commit, its outcome is unknown here and known to the next attempt: it finds the version
  published by its own task, and only clears up.

- A *deletion* of a document is a version like any other, of no chunks: what is older is superseded by it, what is newer
  replaces it, and the rows of all lower versions go as they do after each publication.
- The deletion of a knowledge base takes its rows out of these tables and leaves one in ``knowledge_base_deletions``, by
  which older tasks are superseded, and one for each of its generations (:mod:`job_runner.generations`) in
  ``generation_drops``. The next document begins another generation, whose collection and index no late writer
  knows.
- A version that is canceled, superseded or lower than the published one stays so: :meth:`Ledger.begin` hands out new numbers
  only. So what a sweep has found to be stale may be removed at any later time.

Order of locks, everywhere: advisory lock of the task, that of the knowledge base (shared but for its deletion and for a
switch of generations), row of the lease, row of the document, row of the version.
"""

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

import asyncpg

from job_runner.generations import DELETED_SINCE, KNOWLEDGE_BASE_LOCK, NEXT_GENERATION, TASK_LOCK_SHARED, Generations
from job_runner.index import Generation, Label, Stale
from job_runner.together import Together
from job_runner.usage import Usage, Used, asked
from job_runner.watchdog import asking
from task_contract.errors import Fenced, InvalidTask, ModelMismatch, StoreUnavailable
from task_contract.messages import AttemptOutcome
from task_contract.models import Phase
from task_contract.vectors import PARTS

_TOGETHER_BYTES: Final = 1 << 20
"""Vectors of one transaction, where several tasks have theirs in it: 32 tasks of 16 texts each, at 512 dimensions."""
DELETED: Final = "deleted"
"""The content hash of a document that is not there: no SHA-256 in hex digits."""
_USED: Final = tuple(one.name for one in fields(Usage))
_ENTER_KNOWLEDGE_BASE: Final = (
    "INSERT INTO knowledge_bases (namespace, kb_id, model_fingerprint, dimension, generation) "
    "VALUES ($1, $2, $3, $4, NEXT) ON CONFLICT DO NOTHING"
).replace("NEXT", NEXT_GENERATION)
_ENTER_GENERATION: Final = (
    "INSERT INTO generations (namespace, kb_id, generation, model_fingerprint, dimension) "
    "SELECT namespace, kb_id, generation, model_fingerprint, dimension FROM knowledge_bases "
    "WHERE namespace = $1 AND kb_id = $2 ON CONFLICT DO NOTHING"
)
_DOCUMENTS: Final = (
    "SELECT document_id, published_version, content_hash, chunk_count FROM documents JOIN knowledge_bases base "
    "USING (namespace, kb_id) WHERE namespace = $1 AND kb_id = $2 AND base.generation = $3 "
    "AND published_version IS NOT NULL AND document_id = coalesce($4, document_id) "
    "UNION ALL SELECT document_id, version, content_hash, chunk_count FROM generation_documents "
    "WHERE namespace = $1 AND kb_id = $2 AND generation = $3 AND document_id = coalesce($4, document_id)"
)
"""What generation $3 of ($1, $2) should hold."""
_ONE_DOCUMENT: Final = _DOCUMENTS.replace("coalesce($4, document_id)", "$4")
"""The same of one document, which PostgreSQL finds by its key."""
_REBUILT: Final = (
    "unnest($3::text[], $4::bigint[], $5::bigint[], $6::text[], $7::integer[], $8::uuid[]) "
    "AS new (document_id, last_version, version, content_hash, chunk_count, task_uid) "
    "LEFT JOIN tasks ON tasks.uid = new.task_uid"
)
_RESTORE: Final = tuple(
    statement.replace("REBUILT", _REBUILT)
    for statement in (
        "INSERT INTO documents AS old (namespace, kb_id, document_id, last_version) "
        "SELECT $1, $2, new.document_id, new.last_version FROM REBUILT ON CONFLICT (namespace, kb_id, document_id) "
        "DO UPDATE SET last_version = greatest(old.last_version, excluded.last_version)",
        # So that another attempt of the task finds its work done.
        "INSERT INTO document_versions (namespace, kb_id, document_id, version, task_uid, task_created_at, state, "
        "holder, content_hash, chunk_count) SELECT $1, $2, new.document_id, new.version, new.task_uid, "
        "coalesce(tasks.created_at, now()), 'published', 'rebuild', new.content_hash, new.chunk_count FROM REBUILT "
        "JOIN documents AS old ON (old.namespace, old.kb_id, old.document_id) = ($1, $2, new.document_id) "
        "WHERE old.published_version IS NULL AND new.version IS NOT NULL ON CONFLICT DO NOTHING",
        # With the task's time, if the projection has it: older tasks go on being superseded.
        "UPDATE documents AS old SET published_version = new.version, content_hash = new.content_hash, "
        "chunk_count = new.chunk_count, published_task_uid = new.task_uid, published_task_at = tasks.created_at, "
        "updated_at = now(), checked_at = now() FROM REBUILT WHERE old.namespace = $1 AND old.kb_id = $2 "
        "AND old.document_id = new.document_id AND old.published_version IS NULL AND new.version IS NOT NULL",
    )
)
"""What to do with the documents of a knowledge base that was read from the stores; the last one publishes."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a process wants to publish, and in whose name."""

    namespace: str
    kb_id: str
    document_id: str
    task_uid: UUID
    task_created_at: datetime
    """Order of tasks: what an older task brings does not replace what a newer one brought."""
    holder: str
    content_hash: str
    model_fingerprint: str
    dimension: int

    @classmethod
    def to_delete(
        cls, *, namespace: str, kb_id: str, document_id: str, task_uid: UUID, task_created_at: datetime, holder: str
    ) -> "Claim":
        """Return the claim that a document is not there. It needs no model."""
        return cls(namespace, kb_id, document_id, task_uid, task_created_at, holder, DELETED, "", 0)

    @property
    def deletes(self) -> bool:
        """Whether it is one that the document is not there."""
        return self.content_hash == DELETED


class Standing(StrEnum):
    """What is to be done about a claim."""

    WORK = "work"
    """Write the version, then commit."""
    UNCHANGED = "unchanged"
    """The published version has the same content: check the stores, then confirm."""
    PUBLISHED = "published"
    """An earlier attempt of this task has published: only clear up."""
    SUPERSEDED = "superseded"
    """A newer task has published: do nothing."""


@dataclass(frozen=True, slots=True)
class Published:
    """The version that readers see."""

    version: int
    content_hash: str
    chunk_count: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a result that reading the document has given; empty where an earlier release has published it."""

    def rows(self, generation: Generation, document_id: str, *, first: int = 0, below: int | None = None) -> dict[str, str]:
        """Return chunk id → content hash of the rows that each store must have, with ordinals from ``first`` on."""
        ordinals = range(first, self.chunk_count if below is None else below)
        ids = (generation.chunk_id(document_id, self.version, ordinal) for ordinal in ordinals)
        return dict.fromkeys(ids, self.content_hash)


@dataclass(frozen=True, slots=True)
class Intent:
    """A claim that was entered: version number, epoch, and what is published at the moment."""

    claim: Claim
    standing: Standing
    version: int
    epoch: int
    generation: int
    published: Published | None
    resumed: bool
    """Whether an earlier holder may have written rows of this version."""


@dataclass(frozen=True, slots=True)
class KnowledgeBaseDeletion:
    """What the deletion of a knowledge base has taken out of the ledger."""

    whole: bool
    """False where there was none, or where newer documents stay."""
    generations: tuple[int, ...]
    """Whose collections and indices are to go."""
    documents: int
    """That readers saw before."""


@dataclass(frozen=True, slots=True)
class StaleDocument:
    """What a sweep is to remove of a document."""

    kb_id: str
    generation: int
    stale: Stale
    dead: tuple[int, ...]
    """Versions known by the ledger among the stale ones that never were published."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What both stores should hold of a knowledge base, or of one document of it."""

    published: Mapping[str, Published]
    """By document id."""
    intents: frozenset[tuple[str, int]]
    """(document id, version) that a task may be writing."""


@dataclass(frozen=True, slots=True)
class RebuiltDocument:
    """A document as the ledger is to know it."""

    document_id: str
    last_version: int
    """Highest number of which there is any row: it must not be allotted again."""
    published: Published | None
    """``None`` when no version is whole in both stores."""
    task_uid: str | None
    """The task that wrote the published version."""


class Commit(StrEnum):
    """How a commit ended."""

    DONE = "done"
    SUPERSEDED = "superseded"
    """A newer task was faster; nothing was published."""
    AGAIN = "again"
    """What the intent was based on has changed: begin again."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended, and who says so."""

    task_uid: UUID
    holder: str
    outcome: AttemptOutcome


@dataclass(frozen=True, slots=True)
class KeptVectors:
    """What embedding_generation has computed, in the order of the columns of ``task_vectors``."""

    task_uid: UUID
    vectors: int
    dimension: int
    model: str
    model_fingerprint: str
    source_sha256: str
    """Of what was embedded."""
    output: str
    """:data:`task_contract.vectors.INLINE`, or the path of a file."""
    output_sha256: str | None = None
    """Of that file."""


_KEPT: Final = tuple(one.name for one in fields(KeptVectors))


@dataclass(frozen=True, slots=True)
class VectorPart:
    """Some of the vectors that are kept in PostgreSQL."""

    first: int
    """Number of the first one, from 0."""
    ids: Sequence[str | None]
    vectors: bytes
    """float32, little-endian."""


@dataclass(frozen=True, slots=True)
class _Keeping:
    """Vectors that an attempt wants to enter."""

    kept: KeptVectors
    parts: tuple[VectorPart, ...]
    attempt: int

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(len(part.vectors) for part in self.parts)


@dataclass(frozen=True, slots=True)
class KnownTask:
    """A task as the projection has it."""

    uid: UUID
    phase: Phase
    spec: Mapping[str, Any]


class Ledger(Generations):
    """The ledger over a small pool of connections. Construct it cheaply; :meth:`warm_up` connects."""

    def __init__(self, url: str, *, connections: int = 2) -> None:
        """As of :class:`job_runner.postgres.Connected`."""
        super().__init__(url, connections=connections)
        self._keep = Together(self._keep_together, weight=lambda one: one.size, most=_TOGETHER_BYTES)

    async def check(self) -> str:
        """Return what a health check says of the server."""
        async with self.connection("ask for the version") as connection:
            version = await connection.fetchval("SHOW server_version")
            await connection.fetchval("SELECT count(*) FROM knowledge_bases WHERE false")
            return f"PostgreSQL {version}"

    async def begin(self, claim: Claim) -> Intent:
        """Enter a claim, or take over what an earlier attempt of the same task has entered.

        Raises Fenced when the task was canceled, and ModelMismatch when the knowledge base has vectors of another model.
        """
        async with self.connection("enter the intent") as connection, connection.transaction():
            await _check_fence(connection, claim)
            await _share_knowledge_base(connection, claim)
            if await _deleted_since(connection, claim):
                return _intent(claim, Standing.SUPERSEDED, 0, 0, 0, None, resumed=False)
            generation = await _knowledge_base(connection, claim)
            document = await _document(connection, claim, insert=True)
            published = _published(document)
            row = await connection.fetchrow(
                "SELECT version, state, content_hash FROM document_versions "
                "WHERE namespace = $1 AND kb_id = $2 AND document_id = $3 AND task_uid = $4 FOR UPDATE",
                *_key(claim),
                claim.task_uid,
            )
            state = None if row is None else row["state"]
            if state == "canceled":
                raise _fenced(claim)
            if state == "published":
                return _intent(claim, Standing.PUBLISHED, row["version"], 0, generation, published, resumed=True)
            # Every version that is newer than the published one in time has, or is given, the higher number: removing
            # the versions with lower numbers after a commit then removes what is older, and nothing else.
            # An unchanged one may count as stale already.
            outnumbered = (
                row is None or state == "unchanged" or (published is not None and row["version"] < published.version)
            )
            version = document["last_version"] + 1 if outnumbered else row["version"]
            if state == "superseded" or _is_newer(document, claim, row["version"] if row else version):
                await _enter(connection, claim, row=row, version=row["version"] if row else version, state="superseded")
                resumed = row is not None
                number = row["version"] if resumed else version
                return _intent(claim, Standing.SUPERSEDED, number, 0, generation, published, resumed=resumed)
            changed = row is not None and row["content_hash"] != claim.content_hash
            if changed:
                version = document["last_version"] + 1
            epoch = await _enter(connection, claim, row=row, version=version, state="intent")
            unchanged = published is not None and published.content_hash == claim.content_hash
            resumed = row is not None and version == row["version"]
            standing = Standing.UNCHANGED if unchanged else Standing.WORK
            return _intent(claim, standing, version, epoch, generation, published, resumed=resumed)

    async def commit(self, intent: Intent, *, chunk_count: int, facts: Mapping[str, Any] | None = None) -> Commit:
        """Publish the version of an intent, with what its results say of the document. The caller has read both stores back.

        Raises Fenced when the task was canceled or another process holds the intent.
        """
        return await self._settle(intent, state="published", chunk_count=chunk_count, facts=facts)

    async def confirm(self, intent: Intent) -> Commit:
        """Settle an intent whose content is published already: readers go on seeing the version that they see.

        The task counts as the one that published, so that a task between the two in age cannot bring older content back.
        """
        return await self._settle(intent, state="unchanged", chunk_count=None)

    async def _settle(
        self, intent: Intent, *, state: str, chunk_count: int | None, facts: Mapping[str, Any] | None = None
    ) -> Commit:
        claim = intent.claim
        async with self.connection("commit the version") as connection, connection.transaction():
            await connection.execute(TASK_LOCK_SHARED, claim.task_uid)  # commits do not wait for each other
            await _share_knowledge_base(connection, claim)
            await _check_fence(connection, claim)
            if await _deleted_since(connection, claim):
                await _set_state(connection, intent, "superseded")
                return Commit.SUPERSEDED
            if await _generation(connection, claim) != intent.generation:
                return Commit.AGAIN
            document = await _document(connection, claim, insert=False)
            row = await connection.fetchrow(
                "SELECT epoch, holder, state FROM document_versions "
                "WHERE namespace = $1 AND kb_id = $2 AND document_id = $3 AND version = $4 AND task_uid = $5 FOR UPDATE",
                *_key(claim),
                intent.version,
                claim.task_uid,
            )
            mine = row is not None and (row["epoch"], row["holder"], row["state"]) == (intent.epoch, claim.holder, "intent")
            if not mine:
                raise _fenced(claim)
            if _is_newer(document, claim, intent.version):
                await _set_state(connection, intent, "superseded")
                return Commit.SUPERSEDED
            published = document["published_version"]
            if state == "unchanged":
                if published != (intent.published and intent.published.version):
                    return Commit.AGAIN
                await connection.execute(
                    "UPDATE documents SET published_task_uid = $4, published_task_at = $5, updated_at = now(), "
                    "checked_at = now(), missing = 0, extra = 0 "
                    "WHERE namespace = $1 AND kb_id = $2 AND document_id = $3",
                    *_key(claim),
                    claim.task_uid,
                    claim.task_created_at,
                )
            else:
                if published is not None and published > intent.version:
                    return Commit.AGAIN
                await connection.execute(
                    "UPDATE documents SET published_task_uid = $4, published_task_at = $5, published_version = $6, "
                    "content_hash = $7, chunk_count = $8, updated_at = now(), checked_at = now(), missing = 0, extra = 0 "
                    "WHERE namespace = $1 AND kb_id = $2 AND document_id = $3",
                    *_key(claim),
                    claim.task_uid,
                    claim.task_created_at,
                    intent.version,
                    claim.content_hash,
                    chunk_count,
                )
            await _set_state(connection, intent, state, chunk_count=chunk_count, facts=facts)
            return Commit.DONE

    async def published(self, *, namespace: str, kb_id: str, document_ids: list[str]) -> dict[str, int]:
        """Return document id → the version that readers see, for those documents that have one."""
        async with self.connection("read the published versions") as connection:
            rows = await connection.fetch(
                "SELECT document_id, published_version FROM documents "
                "WHERE namespace = $1 AND kb_id = $2 AND document_id = ANY($3) AND published_version IS NOT NULL",
                namespace,
                kb_id,
                document_ids,
            )
            return {row["document_id"]: row["published_version"] for row in rows}

    async def is_empty(self, *, namespace: str, kb_id: str) -> bool:
        """Return whether readers see no document at all; its collection and its index may not exist yet."""
        async with self.connection("read the published versions") as connection:
            return not await connection.fetchval(
                "SELECT EXISTS (SELECT FROM documents WHERE namespace = $1 AND kb_id = $2 AND chunk_count > 0)",
                namespace,
                kb_id,
            )

    async def knowledge_base(self, *, namespace: str, kb_id: str) -> tuple[int, str, int] | None:
        """Return generation, model fingerprint and dimension of a knowledge base; ``None`` for one that is not there."""
        async with self.connection("read the knowledge base") as connection:
            row = await connection.fetchrow(
                "SELECT generation, model_fingerprint, dimension FROM knowledge_bases WHERE namespace = $1 AND kb_id = $2",
                namespace,
                kb_id,
            )
            return None if row is None else (row["generation"], row["model_fingerprint"], row["dimension"])

    async def contents(self, generation: Generation, *, document_id: str | None = None) -> Contents:
        """Return what a generation should hold and what tasks are writing to it, as of one moment.

        That is what is published, of the generation that serves; of another one what was brought into it.
        """
        asked = generation.namespace, generation.kb_id, generation.number, document_id
        async with (
            self.connection("read the documents") as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            documents = await connection.fetch(_DOCUMENTS if document_id is None else _ONE_DOCUMENT, *asked)
            intents = await connection.fetch(
                "SELECT document_id, version FROM document_versions WHERE namespace = $1 AND kb_id = $2 "
                "AND state = 'intent' AND document_id = coalesce($4, document_id) "
                "AND $3 = (SELECT generation FROM knowledge_bases WHERE namespace = $1 AND kb_id = $2)",
                *asked,
            )
        return Contents(
            published={
                row["document_id"]: Published(row["published_version"], row["content_hash"], row["chunk_count"])
                for row in documents
            },
            intents=frozenset((row["document_id"], row["version"]) for row in intents),
        )

    @contextlib.asynccontextmanager
    async def keeping(
        self, generation: Generation, *, document_id: str, version: int, task_uid: UUID
    ) -> AsyncIterator[bool]:
        """Yield whether a version is published, and keep it so within the block, which must last seconds.

        Who publishes another version, or deletes document or knowledge base, waits at its commit until the block is left:
        what the block writes to the rows of this version is in the stores when they are removed. Raises Fenced when the task
        was canceled.
        """
        key = generation.namespace, generation.kb_id
        async with self.connection("keep the published version") as connection, connection.transaction():
            if await connection.fetchval("SELECT 1 FROM task_fences WHERE task_uid = $1", task_uid):
                raise Fenced(f"cannot go on with {document_id}: the task was canceled; this one stops")
            await connection.execute(f"SELECT pg_advisory_xact_lock_shared({KNOWLEDGE_BASE_LOCK})", *key)
            published = await connection.fetchval(
                "SELECT published_version FROM documents WHERE namespace = $1 AND kb_id = $2 AND document_id = $3 FOR SHARE",
                *key,
                document_id,
            )
            yield published == version

    async def record_check(
        self, generation: Generation, checked: Contents, deviations: Mapping[str, tuple[int, int]]
    ) -> None:
        """Enter what a check found: document id → (chunks missing, rows too many); the others are in order.

        A document that was published since was read back by its task, and keeps what that found.
        """
        names = list(checked.published)
        found = [deviations.get(name, (0, 0)) for name in names]
        async with self.connection("record the check") as connection:
            await connection.execute(
                "UPDATE documents SET checked_at = now(), missing = checked.missing, extra = checked.extra "
                "FROM unnest($3::text[], $4::bigint[], $5::integer[], $6::integer[]) "
                "AS checked (document_id, version, missing, extra) WHERE namespace = $1 AND kb_id = $2 "
                "AND documents.document_id = checked.document_id AND published_version = checked.version "
                "AND (SELECT generation FROM knowledge_bases WHERE namespace = $1 AND kb_id = $2) = $7::integer",
                generation.namespace,
                generation.kb_id,
                names,
                [published.version for published in checked.published.values()],
                [missing for missing, _ in found],
                [extra for _, extra in found],
                generation.number,
            )

    async def bar(self, generation: Generation, document_id: str, *, up_to: int) -> None:
        """See to it that no task is given a version number up to one any more: rows of such numbers are of nobody."""
        async with self.connection("bar version numbers") as connection:
            await connection.execute(
                "UPDATE documents SET last_version = greatest(last_version, $4) "
                "WHERE namespace = $1 AND kb_id = $2 AND document_id = $3",
                generation.namespace,
                generation.kb_id,
                document_id,
                up_to,
            )

    async def unknown(self, generation: Generation, document_ids: Collection[str]) -> set[str]:
        """Return those documents of which the ledger has never heard."""
        async with self.connection("look for documents") as connection:
            rows = await connection.fetch(
                "SELECT document_id FROM unnest($3::text[]) AS asked (document_id) WHERE NOT EXISTS ("
                "SELECT FROM documents d WHERE d.namespace = $1 AND d.kb_id = $2 AND d.document_id = asked.document_id)",
                generation.namespace,
                generation.kb_id,
                list(document_ids),
            )
            return {row["document_id"] for row in rows}

    async def restore(self, label: Label, documents: Sequence[RebuiltDocument]) -> int:
        """Enter a knowledge base as the stores hold it; return how many documents are published by that.

        What the ledger says already stays. When the task of a version is known, its time is entered too, so that older tasks
        go on being superseded. Raises ModelMismatch, and InvalidTask when readers of the ledger see another generation.
        """
        key = label.namespace, label.kb_id
        published = [document.published for document in documents]
        found = (
            [document.document_id for document in documents],
            [document.last_version for document in documents],
            [None if one is None else one.version for one in published],
            [None if one is None else one.content_hash for one in published],
            [None if one is None else one.chunk_count for one in published],
            [document.task_uid for document in documents],
        )
        async with self.connection("restore the knowledge base") as connection, connection.transaction():
            await connection.execute(
                "INSERT INTO knowledge_bases (namespace, kb_id, generation, model_fingerprint, dimension) "
                "VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING",
                *key,
                label.generation,
                label.model_fingerprint,
                label.dimension,
            )
            known = await connection.fetchrow(
                "SELECT generation, model_fingerprint, dimension FROM knowledge_bases WHERE namespace = $1 AND kb_id = $2",
                *key,
            )
            _check_model(label.kb_id, known, model_fingerprint=label.model_fingerprint, dimension=label.dimension)
            if known["generation"] != label.generation:
                raise InvalidTask(
                    f"cannot restore generation {label.generation} of {label.kb_id}: the ledger publishes generation "
                    f"{known['generation']}; rebuild that one"
                )
            await connection.execute(_ENTER_GENERATION, *key)
            for statement in _RESTORE:
                status = await connection.execute(statement, *key, *found)
            return int(status.rpartition(" ")[2])

    # ------------------------------------------------------------------------------------------------------- deletion

    async def replaced_any(self, claim: Claim, version: int) -> bool:
        """Tell whether readers saw chunks of a document before a version of it was published."""
        async with self.connection("read the versions") as connection:
            return bool(
                await connection.fetchval(
                    "SELECT chunk_count FROM document_versions WHERE namespace = $1 AND kb_id = $2 AND document_id = $3 "
                    "AND state = 'published' AND version < $4 ORDER BY version DESC LIMIT 1",
                    *_key(claim),
                    version,
                )
            )

    async def delete_knowledge_base(
        self, *, namespace: str, kb_id: str, task_uid: UUID, task_created_at: datetime
    ) -> KnowledgeBaseDeletion:
        """Take a knowledge base out of the ledger, or return what an earlier attempt of this task has taken out.

        What older tasks publish afterwards is superseded. Where a newer task has published, everything stays: the documents
        are then to be deleted one by one, see :meth:`older_documents`. Raises Fenced when the task was canceled.
        """
        async with self.connection("delete the knowledge base") as connection, connection.transaction():
            await connection.execute(TASK_LOCK_SHARED, task_uid)
            if await connection.fetchval("SELECT 1 FROM task_fences WHERE task_uid = $1", task_uid):
                raise Fenced(f"cannot delete knowledge base {kb_id}: the task was canceled; this one stops")
            key = namespace, kb_id
            await connection.execute(f"SELECT pg_advisory_xact_lock({KNOWLEDGE_BASE_LOCK})", *key)
            row = await connection.fetchrow(
                "SELECT generation, documents FROM knowledge_base_deletions "
                "WHERE namespace = $1 AND kb_id = $2 AND task_uid = $3",
                *key,
                task_uid,
            )
            if row is not None:
                left = await connection.fetch(
                    "SELECT generation FROM generation_drops WHERE namespace = $1 AND kb_id = $2 AND dropped_at IS NULL",
                    *key,
                )
                whole = row["generation"] is not None
                going = {one["generation"] for one in left} | ({row["generation"]} if whole else set())
                return KnowledgeBaseDeletion(whole, tuple(sorted(going)), row["documents"])
            counts = await connection.fetchrow(
                "SELECT count(*) FILTER (WHERE published_task_at > $3) AS newer, "
                "count(*) FILTER (WHERE coalesce(published_task_at, '-infinity') <= $3 AND chunk_count > 0) AS older "
                "FROM documents WHERE namespace = $1 AND kb_id = $2",
                *key,
                task_created_at,
            )
            numbers: list[int] = []
            if not counts["newer"]:
                await connection.execute("DELETE FROM documents WHERE namespace = $1 AND kb_id = $2", *key)
                rows = await connection.fetch(
                    "INSERT INTO generation_drops (namespace, kb_id, generation) "
                    "SELECT namespace, kb_id, generation FROM knowledge_bases WHERE namespace = $1 AND kb_id = $2 "
                    "UNION SELECT namespace, kb_id, generation FROM generations WHERE namespace = $1 AND kb_id = $2 "
                    "RETURNING generation",
                    *key,
                )
                numbers = sorted(row["generation"] for row in rows)
                await connection.execute("DELETE FROM knowledge_bases WHERE namespace = $1 AND kb_id = $2", *key)
            await connection.execute(
                "INSERT INTO knowledge_base_deletions (namespace, kb_id, task_uid, task_created_at, generation, documents) "
                "VALUES ($1, $2, $3, $4, $5, $6)",
                *key,
                task_uid,
                task_created_at,
                max(numbers, default=None),  # pods of the release before count on from this one
                counts["older"],
            )
            return KnowledgeBaseDeletion(bool(numbers), tuple(numbers), counts["older"])

    async def older_documents(self, *, namespace: str, kb_id: str, task_uid: UUID, task_created_at: datetime) -> list[str]:
        """Return the documents that a deletion of the whole knowledge base takes away one by one, also those it began."""
        async with self.connection("read the documents") as connection:
            rows = await connection.fetch(
                "SELECT document_id FROM documents WHERE namespace = $1 AND kb_id = $2 "
                "AND (coalesce(published_task_at, '-infinity') <= $4 AND chunk_count > 0 OR published_task_uid = $3) "
                "ORDER BY document_id",
                namespace,
                kb_id,
                task_uid,
                task_created_at,
            )
            return [row["document_id"] for row in rows]

    # ---------------------------------------------------------------------------------------------------------- sweep

    async def dead_tasks(self, *, namespace: str) -> list[UUID]:
        """Return the tasks that are known to have ended, or to be gone, and still have intents."""
        async with self.connection("look for dead intents") as connection:
            return [row["task_uid"] for row in await connection.fetch(_DEAD_TASKS, namespace)]

    async def bury(self, tasks: Sequence[UUID]) -> int:
        """Cancel the intents of tasks, so that nobody commits them; return how many. What was committed before stays."""
        buried = 0
        async with self.connection("cancel dead intents") as connection:
            for task in tasks:
                async with connection.transaction():
                    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1::uuid::text, 0))", task)
                    rows = await connection.fetch(
                        "UPDATE document_versions SET state = 'canceled', epoch = epoch + 1, updated_at = now() "
                        "WHERE task_uid = $1 AND state = 'intent' RETURNING 1",
                        task,
                    )
                    buried += len(rows)
        return buried

    async def stale(self, *, namespace: str, since: datetime | None, dead: Sequence[UUID] = ()) -> list[StaleDocument]:
        """Return what is stale of each document that was written to since a moment, or has dead versions not yet swept.

        Intents of the tasks in ``dead`` count as canceled, which :meth:`bury` makes them.

        It stays stale, whatever is begun or committed later: see the module's docstring.
        """
        async with self.connection("look for stale versions") as connection:
            rows = await connection.fetch(
                "SELECT d.kb_id, k.generation, d.document_id, d.last_version, d.published_version, "
                "array_agg(v.version) FILTER (WHERE v.state = 'intent' AND v.task_uid <> ALL($3::uuid[])) AS live, "
                "array_agg(v.version) FILTER (WHERE v.state IN ('canceled', 'superseded', 'unchanged')) AS dead "
                "FROM documents d JOIN knowledge_bases k USING (namespace, kb_id) "
                "LEFT JOIN document_versions v USING (namespace, kb_id, document_id) WHERE d.namespace = $1 "
                "GROUP BY d.kb_id, k.generation, d.document_id, d.last_version, d.published_version, d.updated_at "
                "HAVING $2::timestamptz IS NULL OR d.updated_at > $2 OR max(v.updated_at) > $2 "
                "OR bool_or(v.state = 'canceled' AND v.swept_at IS NULL OR v.task_uid = ANY($3::uuid[])) "
                "ORDER BY d.kb_id, d.last_version, d.document_id",
                namespace,
                since,
                list(dead),
            )
        found = [
            StaleDocument(
                kb_id=row["kb_id"],
                generation=row["generation"],
                stale=Stale(
                    row["document_id"],
                    up_to=row["last_version"],
                    keep=tuple(sorted({row["published_version"], *(row["live"] or ())} - {None})),
                ),
                dead=tuple(row["dead"] or ()),
            )
            for row in rows
        ]
        return [one for one in found if one.stale.possible]

    async def swept(self, *, namespace: str, kb_id: str, documents: Sequence[StaleDocument]) -> None:
        """Note that both stores were found without the stale versions of these documents."""
        dead = [(one.stale.document_id, version) for one in documents for version in one.dead]
        async with self.connection("record the sweep") as connection:
            await connection.execute(
                "UPDATE document_versions SET swept_at = now() "
                "FROM unnest($3::text[], $4::bigint[]) AS swept (document, number) "
                "WHERE namespace = $1 AND kb_id = $2 AND document_id = swept.document AND version = swept.number",
                namespace,
                kb_id,
                [document for document, _ in dead],
                [version for _, version in dead],
            )

    async def record_sweep(self, *, namespace: str, summary: str) -> None:
        """Note that a namespace has been swept; ``summary`` is JSON."""
        async with self.connection("record the sweep") as connection:
            await connection.execute(
                "INSERT INTO sweeps (namespace, finished_at, summary) VALUES ($1, now(), $2::jsonb) "
                "ON CONFLICT (namespace) DO UPDATE SET finished_at = excluded.finished_at, summary = excluded.summary",
                namespace,
                summary,
            )

    # -------------------------------------------------------------------------------------------------------- results

    async def record(self, ended: Sequence["Ended"]) -> None:
        """Keep how attempts ended, in one statement; a success is never replaced, and a fenced process says nothing over
        another one.

        Of an attempt that is named twice the last one counts.
        """
        rows = list({(one.task_uid, one.outcome.attempt): one for one in ended}.values())
        async with self.connection("record the result") as connection:
            await connection.execute(
                "INSERT INTO task_results (task_uid, attempt, holder, outcome) "
                "SELECT * FROM unnest($1::uuid[], $2::smallint[], $3::text[], $4::jsonb[]) "
                "ON CONFLICT (task_uid, attempt) DO UPDATE "
                "SET holder = excluded.holder, outcome = excluded.outcome, created_at = now() "
                "WHERE task_results.outcome->>'outcome' <> 'Succeeded' AND excluded.outcome->>'outcome' <> 'Fenced'",
                [one.task_uid for one in rows],
                [one.outcome.attempt for one in rows],
                [one.holder for one in rows],
                [one.outcome.model_dump_json(by_alias=True, exclude_none=True) for one in rows],
            )

    async def record_usage(self, used: Sequence[Used]) -> None:
        """Enter what this process has used for attempts."""
        rows = [
            {
                "task_uid": str(one.uid),
                "attempt": one.attempt,
                "holder": one.holder,
                "namespace": one.task.metadata.namespace,
                "kb_id": one.task.spec.kb_id,
                "type": str(one.task.spec.type),
                "outcome": str(one.outcome),
                **{column: getattr(one.usage, column) for column in _USED},
            }
            for one in used
        ]
        columns = (
            "task_uid, attempt, holder, namespace, kb_id, type, outcome, seconds, cpu_seconds, memory_byte_seconds, "
            "memory_peak_bytes, tokens, texts, stages, stores"
        )
        async with self.connection("record what was used") as connection:
            await connection.execute(
                f"INSERT INTO task_usage ({columns}) SELECT {columns} "  # noqa: S608 - names of ours
                "FROM jsonb_populate_recordset(NULL::task_usage, $1::jsonb)",
                json.dumps(rows),
            )

    # -------------------------------------------------------------------------------------------------------- vectors

    async def keep_vectors(
        self,
        kept: "KeptVectors",
        parts: Sequence["VectorPart"] = (),
        *,
        attempt: int,
        before_commit: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Enter the vectors of a task, whole or not at all, in place of what an earlier attempt has entered.

        Those of several tasks that come about the same time are entered in one transaction; with ``before_commit``, which
        gives a file its name, in one of their own: if the commit fails after it, the next attempt replaces the file. Raises
        Fenced when the task was canceled: fence and commit exclude each other, as those of a version; and when a later
        attempt has entered its own: this one was given up for dead, and woke up.
        """
        keeping = _Keeping(kept, tuple(parts), attempt)
        if before_commit is None:
            with asking(), asked("postgresql"):
                await self._keep(keeping)
            return
        async with self.connection("keep the vectors") as connection, connection.transaction():
            [refused] = await _enter_vectors(connection, [keeping])
            if refused is not None:
                raise refused
            await before_commit()

    async def _keep_together(self, wanted: Sequence[_Keeping]) -> list[Exception | None]:
        try:
            async with self.connection("keep the vectors") as connection, connection.transaction():
                return await _enter_vectors(connection, wanted)
        except StoreUnavailable as error:
            if len(wanted) == 1 or not isinstance(error.__cause__, asyncpg.DataError):
                raise
        failures: list[Exception | None] = []
        for one in wanted:  # the others are not to go with one that PostgreSQL does not take
            try:
                failures += await self._keep_together([one])
            except StoreUnavailable as error:
                failures.append(error)
        return failures

    async def kept_vectors(self, task_uid: UUID) -> "KeptVectors | None":
        """Return what the vectors of a task are and where; None where there are none."""
        async with self.connection("look for the vectors") as connection:
            row = await connection.fetchrow(
                "SELECT task_uid, vectors, dimension, model, model_fingerprint, source_sha256, output, output_sha256 "
                "FROM task_vectors WHERE task_uid = $1",
                task_uid,
            )
            return None if row is None else KeptVectors(*row)

    async def vector_parts(self, task_uid: UUID) -> AsyncIterator[Mapping[str, Any]]:
        """Yield the parts that are kept here, as :func:`task_contract.vectors.vectors_of` takes them."""
        first = 0
        while True:
            async with self.connection("read the vectors") as connection:
                row = await connection.fetchrow(PARTS, task_uid, first)
            if row is None:
                return
            yield row
            first = row["first"] + 1

    async def task(self, *, namespace: str, name: str) -> "KnownTask | None":
        """Return what the projection has of the youngest task of a name, whether it exists or not."""
        async with self.connection("look for the task") as connection:
            row = await connection.fetchrow(
                "SELECT uid, phase, spec FROM tasks WHERE namespace = $1 AND name = $2 ORDER BY created_at DESC LIMIT 1",
                namespace,
                name,
            )
            return None if row is None else KnownTask(row["uid"], Phase(row["phase"]), json.loads(row["spec"]))


# --------------------------------------------------------------------------------------------------------------- parts


_DEAD_TASKS: Final = (
    "SELECT DISTINCT v.task_uid FROM document_versions v LEFT JOIN tasks t ON t.uid = v.task_uid "
    "WHERE v.namespace = $1 AND v.state = 'intent' AND (t.finished_at IS NOT NULL OR t.deleted_at IS NOT NULL "
    "OR EXISTS (SELECT FROM task_fences f WHERE f.task_uid = v.task_uid))"
)


def _key(claim: Claim) -> tuple[str, str, str]:
    return claim.namespace, claim.kb_id, claim.document_id


def _fenced(claim: Claim) -> Fenced:
    return Fenced(
        f"cannot publish {claim.document_id}: the task was canceled, or another pod has taken over; this one stops"
    )


async def _enter_vectors(connection: Any, wanted: Sequence[_Keeping]) -> list[Exception | None]:
    """Enter vectors of tasks within a transaction; return what was refused."""
    tasks, attempts = [one.kept.task_uid for one in wanted], [one.attempt for one in wanted]
    # Whoever raises a fence has one of these locks at a time: so nobody waits in a circle.
    await connection.execute(
        "SELECT pg_advisory_xact_lock_shared(hashtextextended(uid::text, 0)) FROM unnest($1::uuid[]) AS wanted (uid)", tasks
    )
    rows = await connection.fetch(
        "SELECT EXISTS (SELECT FROM task_fences f WHERE f.task_uid = uid) AS canceled, "
        "EXISTS (SELECT FROM task_vectors v WHERE v.task_uid = uid AND v.attempt > wanted.attempt) "
        "OR EXISTS (SELECT FROM task_results r WHERE r.task_uid = uid AND r.attempt > wanted.attempt "
        "AND r.outcome->>'outcome' = 'Succeeded') AS late "
        "FROM unnest($1::uuid[], $2::smallint[]) WITH ORDINALITY AS wanted (uid, attempt, number) ORDER BY number",
        tasks,
        attempts,
    )
    refused: list[Exception | None] = []
    last = {one.kept.task_uid: one for one in sorted(wanted, key=lambda one: one.attempt)}
    for one, row in zip(wanted, rows, strict=True):
        if row["canceled"]:
            refused.append(Fenced("cannot keep the vectors: the task was canceled; this one stops"))
        elif row["late"] or last[one.kept.task_uid] is not one:
            refused.append(Fenced("cannot keep the vectors: a later attempt has kept its own; this one stops"))
        else:
            refused.append(None)
    entered = [one for one, why in zip(wanted, refused, strict=True) if why is None]
    if not entered:
        return refused
    await connection.execute("DELETE FROM task_vectors WHERE task_uid = ANY($1)", [one.kept.task_uid for one in entered])
    await connection.execute(
        "INSERT INTO task_vectors (task_uid, vectors, dimension, model, model_fingerprint, source_sha256, output, "
        "output_sha256, attempt) SELECT * FROM unnest($1::uuid[], $2::integer[], $3::integer[], $4::text[], $5::text[], "
        "$6::text[], $7::text[], $8::text[], $9::smallint[])",
        *([getattr(one.kept, column) for one in entered] for column in _KEPT),
        [one.attempt for one in entered],
    )
    parts = [(one.kept.task_uid, part) for one in entered for part in one.parts]
    if parts:
        await connection.execute(
            "INSERT INTO task_vector_parts (task_uid, first, ids, vectors) "
            "SELECT * FROM unnest($1::uuid[], $2::integer[], $3::jsonb[], $4::bytea[])",
            [uid for uid, _ in parts],
            [part.first for _, part in parts],
            [json.dumps(part.ids) for _, part in parts],
            [part.vectors for _, part in parts],
        )
    return refused


async def _check_fence(connection: Any, claim: Claim) -> None:
    if await connection.fetchval("SELECT 1 FROM task_fences WHERE task_uid = $1", claim.task_uid):
        raise _fenced(claim)


async def _share_knowledge_base(connection: Any, claim: Claim) -> None:
    """Wait for a deletion of the knowledge base that is under way, and keep the next one waiting."""
    await connection.execute(f"SELECT pg_advisory_xact_lock_shared({KNOWLEDGE_BASE_LOCK})", claim.namespace, claim.kb_id)


async def _deleted_since(connection: Any, claim: Claim) -> bool:
    return bool(await connection.fetchval(DELETED_SINCE, claim.namespace, claim.kb_id, claim.task_created_at))


async def _generation(connection: Any, claim: Claim) -> int | None:
    found: int | None = await connection.fetchval(
        "SELECT generation FROM knowledge_bases WHERE namespace = $1 AND kb_id = $2", claim.namespace, claim.kb_id
    )
    return found


async def _knowledge_base(connection: Any, claim: Claim) -> int:
    """Return the generation; the first document decides the model of a knowledge base. Its deletion decides nothing."""
    await connection.execute(
        _ENTER_KNOWLEDGE_BASE,
        claim.namespace,
        claim.kb_id,
        claim.model_fingerprint,
        claim.dimension,
    )
    if not claim.deletes:
        await connection.execute(
            "UPDATE knowledge_bases SET model_fingerprint = $3, dimension = $4 "
            "WHERE namespace = $1 AND kb_id = $2 AND model_fingerprint = ''",
            claim.namespace,
            claim.kb_id,
            claim.model_fingerprint,
            claim.dimension,
        )
    row = await connection.fetchrow(
        "SELECT generation, model_fingerprint, dimension FROM knowledge_bases WHERE namespace = $1 AND kb_id = $2",
        claim.namespace,
        claim.kb_id,
    )
    if not claim.deletes:
        _check_model(claim.kb_id, row, model_fingerprint=claim.model_fingerprint, dimension=claim.dimension)
        await connection.execute(_ENTER_GENERATION, claim.namespace, claim.kb_id)
    generation: int = row["generation"]
    return generation


def _check_model(kb_id: str, known: Mapping[str, Any], *, model_fingerprint: str, dimension: int) -> None:
    if (known["model_fingerprint"], known["dimension"]) != (model_fingerprint, dimension):
        raise ModelMismatch(
            f"cannot add to knowledge base {kb_id}: it was filled with model {known['model_fingerprint']} "
            f"({known['dimension']} dimensions), the runner has {model_fingerprint} ({dimension}); "
            "use the first model, or another knowledge base"
        )


async def _document(connection: Any, claim: Claim, *, insert: bool) -> Mapping[str, Any]:
    """Lock and return the row of the document."""
    if insert:
        await connection.execute(
            "INSERT INTO documents (namespace, kb_id, document_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            *_key(claim),
        )
    row = await connection.fetchrow(
        "SELECT last_version, published_version, published_task_at, content_hash, chunk_count, ("
        "SELECT facts FROM document_versions AS its WHERE its.namespace = $1 AND its.kb_id = $2 "
        "AND its.document_id = $3 AND its.version = published_version) AS facts FROM documents "
        "WHERE namespace = $1 AND kb_id = $2 AND document_id = $3 FOR UPDATE",
        *_key(claim),
    )
    if row is None:  # deleted between begin and commit, and with it all its versions
        raise _fenced(claim)
    found: Mapping[str, Any] = row
    return found


def _published(document: Mapping[str, Any]) -> Published | None:
    if document["published_version"] is None:
        return None
    return Published(
        version=document["published_version"],
        content_hash=document["content_hash"],
        chunk_count=document["chunk_count"],
        facts=json.loads(document["facts"] or "{}"),
    )


def _is_newer(document: Mapping[str, Any], claim: Claim, version: int) -> bool:
    """Tell whether what is published comes from a newer task than the claim's.

    Kubernetes counts seconds; of two tasks of one second the one that began later, with the higher number, is the newer.
    """
    published_at, published = document["published_task_at"], document["published_version"]
    if published_at is None:
        return False
    return bool((published_at, published) > (claim.task_created_at, version))


async def _enter(connection: Any, claim: Claim, *, row: Mapping[str, Any] | None, version: int, state: str) -> int:
    """Write the row of the version with a new epoch, under its old or a new number; return the epoch."""
    if row is None:
        epoch = await connection.fetchval(
            "INSERT INTO document_versions "
            "(namespace, kb_id, document_id, version, task_uid, task_created_at, holder, content_hash, state) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) RETURNING epoch",
            *_key(claim),
            version,
            claim.task_uid,
            claim.task_created_at,
            claim.holder,
            claim.content_hash,
            state,
        )
    else:
        epoch = await connection.fetchval(
            "UPDATE document_versions SET version = $5, epoch = epoch + 1, holder = $6, content_hash = $7, state = $8, "
            "updated_at = now() WHERE namespace = $1 AND kb_id = $2 AND document_id = $3 AND version = $4 RETURNING epoch",
            *_key(claim),
            row["version"],
            version,
            claim.holder,
            claim.content_hash,
            state,
        )
    await connection.execute(
        "UPDATE documents SET last_version = greatest(last_version, $4), updated_at = now() "
        "WHERE namespace = $1 AND kb_id = $2 AND document_id = $3",
        *_key(claim),
        version,
    )
    return int(epoch)


async def _set_state(
    connection: Any,
    intent: Intent,
    state: str,
    *,
    chunk_count: int | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    await connection.execute(
        "UPDATE document_versions SET state = $5, chunk_count = $6, facts = $7::jsonb, updated_at = now() "
        "WHERE namespace = $1 AND kb_id = $2 AND document_id = $3 AND version = $4",
        *_key(intent.claim),
        intent.version,
        state,
        chunk_count,
        None if facts is None else json.dumps(facts),
    )


def _intent(
    claim: Claim,
    standing: Standing,
    version: int,
    epoch: int,
    generation: int,
    published: Published | None,
    *,
    resumed: bool,
) -> Intent:
    return Intent(
        claim=claim,
        standing=standing,
        version=version,
        epoch=epoch,
        generation=generation,
        published=published,
        resumed=resumed,
    )
