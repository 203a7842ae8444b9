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

Order of locks, everywhere: advisory lock of the task, row of the document, row of the version.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

import asyncpg

from task_contract.errors import Fenced, ModelMismatch, StoreUnavailable
from task_contract.messages import AttemptOutcome
from task_contract.migrations import migrate as apply_migrations

TIMEOUT: Final = 15.0
"""Seconds for one statement, waiting for locks included."""
_CLOSE_SECONDS: Final = 2.0


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


class Commit(StrEnum):
    """How a commit ended."""

    DONE = "done"
    SUPERSEDED = "superseded"
    """A newer task was faster; nothing was published."""
    AGAIN = "again"
    """What the intent was based on has changed: begin again."""


class Ledger:
    """The ledger over a small pool of connections. Construct it cheaply; :meth:`warm_up` connects."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._connecting = asyncio.Lock()

    async def warm_up(self) -> None:
        """Connect. Raises StoreUnavailable."""
        async with self._connecting:
            if self._pool is not None:
                return
            with _guarded("connect"):
                self._pool = await asyncpg.create_pool(
                    self._url, min_size=1, max_size=2, command_timeout=TIMEOUT, timeout=TIMEOUT
                )

    async def aclose(self) -> None:
        """Close the connections; a server that does not answer is not waited for."""
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await pool.close()
            except (TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                pool.terminate()

    @contextlib.asynccontextmanager
    async def _connection(self, action: str) -> AsyncIterator[Any]:
        await self.warm_up()
        assert self._pool is not None  # noqa: S101 - for the type checker: warm_up() has set it
        with _guarded(action):
            async with self._pool.acquire(timeout=TIMEOUT) as connection:
                yield connection

    async def migrate(self) -> int:
        """Bring the tables up to date; return how many migrations were applied."""
        async with self._connection("migrate the tables") as connection:
            return await apply_migrations(connection)

    async def check(self) -> str:
        """Return what a health check says of the server."""
        async with self._connection("ask for the version") as connection:
            version = await connection.fetchval("SHOW server_version")
            await connection.fetchval("SELECT count(*) FROM knowledge_bases WHERE false")
            return f"PostgreSQL {version}"

    async def begin(self, claim: Claim) -> Intent:
        """Enter a claim, or take over what an earlier attempt of the same task has entered.

        Raises Fenced when the task was canceled, and ModelMismatch when the knowledge base has vectors of another model.
        """
        async with self._connection("enter the intent") as connection, connection.transaction():
            await _check_fence(connection, claim)
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
            outnumbered = row is None or (published is not None and row["version"] < published.version)
            version = document["last_version"] + 1 if outnumbered else row["version"]
            if state == "superseded" or _is_newer(document, claim, row["version"] if row else version):
                await _enter(connection, claim, row=row, version=row["version"] if row else version, state="superseded")
                return _intent(claim, Standing.SUPERSEDED, version, 0, generation, published, resumed=False)
            changed = row is not None and row["content_hash"] != claim.content_hash
            if changed:
                version = document["last_version"] + 1
            epoch = await _enter(connection, claim, row=row, version=version, state="intent")
            unchanged = published is not None and published.content_hash == claim.content_hash
            resumed = row is not None and version == row["version"]
            standing = Standing.UNCHANGED if unchanged else Standing.WORK
            return _intent(claim, standing, version, epoch, generation, published, resumed=resumed)

    async def commit(self, intent: Intent, *, chunk_count: int) -> Commit:
        """Publish the version of an intent. The caller has read both stores back.

        Raises Fenced when the task was canceled or another process holds the intent.
        """
        return await self._settle(intent, state="published", chunk_count=chunk_count)

    async def confirm(self, intent: Intent) -> Commit:
        """Settle an intent whose content is published already: readers go on seeing the version that they see.

        The task counts as the one that published, so that a task between the two in age cannot bring older content back.
        """
        return await self._settle(intent, state="unchanged", chunk_count=None)

    async def _settle(self, intent: Intent, *, state: str, chunk_count: int | None) -> Commit:
        claim = intent.claim
        async with self._connection("commit the version") as connection, connection.transaction():
            # Shared: commits do not wait for each other. The operator takes it exclusively to raise the fence.
            await connection.execute(
                "SELECT pg_advisory_xact_lock_shared(hashtextextended($1::uuid::text, 0))", claim.task_uid
            )
            await _check_fence(connection, claim)
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
                    "UPDATE documents SET published_task_uid = $4, published_task_at = $5, updated_at = now() "
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
                    "content_hash = $7, chunk_count = $8, updated_at = now() "
                    "WHERE namespace = $1 AND kb_id = $2 AND document_id = $3",
                    *_key(claim),
                    claim.task_uid,
                    claim.task_created_at,
                    intent.version,
                    claim.content_hash,
                    chunk_count,
                )
            await _set_state(connection, intent, state, chunk_count=chunk_count)
            return Commit.DONE

    async def published(self, *, namespace: str, kb_id: str, document_ids: list[str]) -> dict[str, int]:
        """Return document id → the version that readers see, for those documents that have one."""
        async with self._connection("read the published versions") as connection:
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
        async with self._connection("read the published versions") as connection:
            return not await connection.fetchval(
                "SELECT EXISTS (SELECT FROM documents"
                " WHERE namespace = $1 AND kb_id = $2 AND published_version IS NOT NULL)",
                namespace,
                kb_id,
            )

    async def knowledge_base(self, *, namespace: str, kb_id: str) -> tuple[int, str, int] | None:
        """Return generation, model fingerprint and dimension of a knowledge base; ``None`` for one that is not there."""
        async with self._connection("read the knowledge base") as connection:
            row = await connection.fetchrow(
                "SELECT generation, model_fingerprint, dimension FROM knowledge_bases WHERE namespace = $1 AND kb_id = $2",
                namespace,
                kb_id,
            )
            return None if row is None else (row["generation"], row["model_fingerprint"], row["dimension"])

    async def record(self, outcome: AttemptOutcome, *, task_uid: UUID, holder: str) -> None:
        """Keep how an attempt ended; a success is never replaced, and a fenced process says nothing over another one."""
        async with self._connection("record the result") as connection:
            await connection.execute(
                "INSERT INTO task_results (task_uid, attempt, holder, outcome) VALUES ($1, $2, $3, $4::jsonb) "
                "ON CONFLICT (task_uid, attempt) DO UPDATE "
                "SET holder = excluded.holder, outcome = excluded.outcome, created_at = now() "
                "WHERE task_results.outcome->>'outcome' <> 'Succeeded' AND excluded.outcome->>'outcome' <> 'Fenced'",
                task_uid,
                outcome.attempt,
                holder,
                outcome.model_dump_json(by_alias=True, exclude_none=True),
            )


# --------------------------------------------------------------------------------------------------------------- parts


def _key(claim: Claim) -> tuple[str, str, str]:
    return claim.namespace, claim.kb_id, claim.document_id


def _fenced(claim: Claim) -> Fenced:
    return Fenced(
        f"cannot publish {claim.document_id}: the task was canceled, or another pod has taken over; this one stops"
    )


async def _check_fence(connection: Any, claim: Claim) -> None:
    if await connection.fetchval("SELECT 1 FROM task_fences WHERE task_uid = $1", claim.task_uid):
        raise _fenced(claim)


async def _knowledge_base(connection: Any, claim: Claim) -> int:
    """Return the generation; the first document decides the model of a knowledge base."""
    await connection.execute(
        "INSERT INTO knowledge_bases (namespace, kb_id, model_fingerprint, dimension) VALUES ($1, $2, $3, $4) "
        "ON CONFLICT DO NOTHING",
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
    if (row["model_fingerprint"], row["dimension"]) != (claim.model_fingerprint, claim.dimension):
        raise ModelMismatch(
            f"cannot add to knowledge base {claim.kb_id}: it was filled with model {row['model_fingerprint']} "
            f"({row['dimension']} dimensions), the runner has {claim.model_fingerprint} ({claim.dimension}); "
            "use the first model, or another knowledge base"
        )
    generation: int = row["generation"]
    return generation


async def _document(connection: Any, claim: Claim, *, insert: bool) -> Mapping[str, Any]:
    """Lock and return the row of the document."""
    if insert:
        await connection.execute(
            "INSERT INTO documents (namespace, kb_id, document_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            *_key(claim),
        )
    row = await connection.fetchrow(
        "SELECT last_version, published_version, published_task_at, content_hash, chunk_count FROM documents "
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


async def _set_state(connection: Any, intent: Intent, state: str, *, chunk_count: int | None = None) -> None:
    await connection.execute(
        "UPDATE document_versions SET state = $5, chunk_count = $6, updated_at = now() "
        "WHERE namespace = $1 AND kb_id = $2 AND document_id = $3 AND version = $4",
        *_key(intent.claim),
        intent.version,
        state,
        chunk_count,
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


@contextlib.contextmanager
def _guarded(action: str) -> Iterator[None]:
    """Turn exceptions of asyncpg into ours. All are StoreUnavailable: no content of a task can make a statement fail."""
    try:
        yield
    except asyncpg.UndefinedTableError as error:
        message = f"cannot {action} in PostgreSQL: its tables are missing; run `python -m job_runner migrate`"
        raise StoreUnavailable(message) from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, ssl.SSLError, TimeoutError) as error:
        detail = str(error) or type(error).__name__
        message = f"cannot {action} in PostgreSQL: {detail}; check TASKS_POSTGRES_URL and the server"
        raise StoreUnavailable(message) from error
