"""PostgreSQL as the operator uses it: projection of tasks, stored results, and the fence. The only file that speaks to it.

Rows of ``tasks`` are a copy of what the API server holds and can be made again from it at any time: writing them never
holds up a task. They wait in a :class:`~task_operator.backlog.Backlog` until PostgreSQL has taken them, in batches; a row is
never replaced by one of a lower resourceVersion, so writing twice, late or out of order is harmless.

Every full list begins with what the table holds (:meth:`Database.held`), and that is then all that is known of it: rows that
somebody removed, that were dropped while PostgreSQL was away, or that are of a history that the API server has lost to a
restored backup, are written from the list.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import asyncpg
import orjson
import structlog
from pydantic import ValidationError

from task_contract.messages import AttemptOutcome
from task_operator.backlog import LIMIT, Backlog, Row
from task_operator.jobs import parse_time
from task_operator.metrics import Metrics
from task_operator.observation import Fence, FenceState, StoredOutcome

_log = structlog.get_logger(__name__)

_BATCH: Final = 500
_MAX_BACKOFF: Final = 30.0  # seconds
_COMMAND_TIMEOUT: Final = 10.0  # seconds
_CONNECTIONS: Final = 4


class DatabaseUnavailable(Exception):
    """PostgreSQL cannot be used at the moment."""


# Column of ``tasks`` and its type, in the order of the parameters.
_COLUMNS: Final[tuple[tuple[str, str], ...]] = (
    ("uid", "uuid"),
    ("namespace", "text"),
    ("name", "text"),
    ("kb_id", "text"),
    ("type", "text"),
    ("priority", "text"),
    ("phase", "text"),
    ("stage", "text"),
    ("progress", "smallint"),
    ("attempt", "smallint"),
    ("job", "text"),
    ("spec", "jsonb"),
    ("result", "jsonb"),
    ("error", "jsonb"),
    ("queue", "jsonb"),
    ("attempts", "jsonb"),
    ("created_at", "timestamptz"),
    ("queued_at", "timestamptz"),
    ("started_at", "timestamptz"),
    ("finished_at", "timestamptz"),
    ("deleted_at", "timestamptz"),
    ("generation", "bigint"),
    ("resource_version", "bigint"),
)
_UPSERT: Final = (
    f"INSERT INTO tasks ({', '.join(name for name, _ in _COLUMNS)}) "  # noqa: S608 - made of constants only
    f"SELECT * FROM unnest({', '.join(f'${number}::{kind}[]' for number, (_, kind) in enumerate(_COLUMNS, 1))}) "
    "ON CONFLICT (uid) DO UPDATE SET "
    f"{', '.join(f'{name} = excluded.{name}' for name, _ in _COLUMNS if name != 'uid')}, updated_at = now() "
    "WHERE tasks.resource_version <= excluded.resource_version RETURNING uid::text AS uid"
)


# Rows that a list contradicts: called deleted although the task exists, or of a version that the API server never had.
_GIVE_WAY: Final = (
    "UPDATE tasks SET resource_version = 0 "
    "FROM unnest($1::uuid[], $2::bigint[], $3::bigint[]) AS listed (uid, version, lost) "
    "WHERE tasks.uid = listed.uid AND (tasks.deleted_at IS NOT NULL "
    "OR tasks.resource_version > listed.version AND tasks.resource_version <= listed.lost)"
)


@dataclass(frozen=True, slots=True)
class Held:
    """What the table says of a task that is not deleted."""

    version: int
    finished: bool


@dataclass(frozen=True, slots=True)
class Intent:
    """A task that writes a version of a document, or has died over it."""

    uid: str
    known: bool
    """Whether it is, or was, a task of this cluster: the projection has it."""
    begun_at: datetime
    """When an attempt last took it up."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What is known of the sweeps of a namespace."""

    namespace: str
    last: datetime | None
    """When one last ended; None before the first."""
    since: datetime
    """The same, or when the first knowledge base was made."""
    dirty: bool
    """Whether there are versions, or knowledge bases, of which the stores have not been freed yet."""


_SWEPT: Final = (
    "SELECT namespace, max(finished_at) AS last, coalesce(max(finished_at), min(since)) AS since, "
    "EXISTS (SELECT FROM document_versions v "
    "WHERE v.namespace = used.namespace AND state = 'canceled' AND swept_at IS NULL) "
    "OR EXISTS (SELECT FROM knowledge_base_deletions d WHERE d.namespace = used.namespace AND generation IS NOT NULL "
    "AND dropped_at IS NULL AND deleted_at < now() - interval '1 minute') AS dirty "
    "FROM (SELECT namespace, created_at AS since FROM knowledge_bases "
    "UNION ALL SELECT namespace, deleted_at FROM knowledge_base_deletions) AS used LEFT JOIN sweeps USING (namespace) "
    "WHERE namespace = ANY($1::text[]) OR cardinality($1::text[]) = 0 GROUP BY namespace ORDER BY namespace"
)


class Database:
    """The operator's side of PostgreSQL."""

    def __init__(
        self,
        url: str,
        *,
        metrics: Metrics,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        limit: int = LIMIT,
    ) -> None:
        """``limit``: bytes of rows that may wait."""
        self._url = url
        self._clock = clock
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._backlog = Backlog(limit)
        self._fences: dict[str, str] = {}  # 0.2 KB each; of tasks deleted unfinished while PostgreSQL is away
        self._wake = asyncio.Event()
        self._flushed = asyncio.Event()
        self._down_since: datetime | None = None
        self.on_incomplete: Callable[[], None] = lambda: None
        """Called when PostgreSQL is back after rows were dropped: all tasks are to be listed anew."""
        metrics.watch_projection(pending=lambda: len(self._backlog), size=lambda: self._backlog.size, lag=self._lag)

    def _lag(self) -> float:
        oldest = self._backlog.oldest()
        return 0.0 if oldest is None else asyncio.get_running_loop().time() - oldest

    @property
    def down_since(self) -> datetime | None:
        """Since when PostgreSQL does not answer; None while it does."""
        return self._down_since

    async def warm_up(self) -> None:
        """Prepare the pool. Nothing is connected yet: an operator starts without its database too."""
        self._pool = asyncpg.create_pool(
            self._url, min_size=0, max_size=_CONNECTIONS, timeout=_COMMAND_TIMEOUT, command_timeout=_COMMAND_TIMEOUT
        )
        try:
            await self._pool
        except (OSError, asyncpg.PostgresError) as error:
            _log.warning("cannot reach PostgreSQL yet", error=repr(error))

    async def aclose(self) -> None:
        """Write what is waiting if that is quickly done, and close all connections."""
        if self._pool is None:
            return
        try:
            async with asyncio.timeout(2):
                while self._backlog:
                    await self._flush()
                await self._pool.close()
        except (DatabaseUnavailable, TimeoutError):
            self._pool.terminate()  # what is lost here is projected again from the tasks at the next start
        self._pool = None

    # ------------------------------------------------------------------------------------------------- projection

    def submit(self, manifest: Mapping[str, Any], *, deleted: bool = False, lost: int | None = None) -> None:
        """Have a task written; returns at once. Of one task only the latest version waits.

        With ``lost`` it is from a list: versions up to that one were known before the list was asked for.
        """
        uid, version = manifest["metadata"]["uid"], int(manifest["metadata"]["resourceVersion"])
        bound = -1 if lost is None else lost
        if lost is not None:
            self._backlog.confirm(uid, lost=lost)
        if self._backlog.wants(uid, version, lost=bound):
            values = _values(manifest, deleted_at=self._clock() if deleted else None, now=self._clock())
            row = Row(uid=uid, version=version, values=values, deleted=deleted, lost=bound, listed=lost is not None)
            self._backlog.put(row, now=asyncio.get_running_loop().time())
            self._wake.set()

    def newest(self) -> int:
        """Return the highest resourceVersion that is known of any task; -1 of none."""
        return self._backlog.newest()

    async def room(self) -> None:
        """Wait until the backlog is half empty at most, or PostgreSQL is away: for who could submit more than it takes."""
        while self._backlog.half_full and self._down_since is None:
            self._flushed.clear()
            await self._flushed.wait()

    def fence_later(self, uid: str, *, reason: str) -> None:
        """Have the fence of a task that is gone raised as soon as PostgreSQL can be reached."""
        self._fences[uid] = reason
        self._wake.set()

    def acknowledged(self, uid: str) -> int | None:
        """Return the resourceVersion up to which a task is known to be in PostgreSQL."""
        return self._backlog.stored(uid)

    async def run(self) -> None:
        """Write what was submitted until cancelled; while PostgreSQL is away, try again with growing waits."""
        wait = 1.0
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while self._backlog or self._fences:
                    await self._flush()
                wait = 1.0
                if self._backlog.incomplete:
                    _log.warning("PostgreSQL is back; listing all tasks for the rows that were dropped meanwhile")
                    self.on_incomplete()
            except DatabaseUnavailable as error:
                _log.warning("cannot write to PostgreSQL; waiting", pending=len(self._backlog), error=str(error))
                self._wake.set()
                self._flushed.set()
                await asyncio.sleep(wait)
                wait = min(2 * wait, _MAX_BACKOFF)

    async def held(self, *, namespaces: Sequence[str]) -> dict[str, Held]:
        """Return what the table holds of tasks that exist, by uid, and take it for all that is known to be there.

        To be asked before the tasks are listed; the list is then to be submitted whole. Raises :class:`DatabaseUnavailable`.
        """
        scope = "AND namespace = ANY($1::text[])" if namespaces else "AND $1::text[] IS NOT NULL"
        rows = await self._run(
            lambda connection: connection.fetch(
                "SELECT uid::text AS uid, resource_version, finished_at IS NOT NULL AS finished "  # noqa: S608 - constants
                f"FROM tasks WHERE deleted_at IS NULL {scope}",
                list(namespaces),
            )
        )
        held = {row["uid"]: Held(version=row["resource_version"], finished=row["finished"]) for row in rows}
        self._backlog.restart({uid: one.version for uid, one in held.items()})
        return held

    async def mark_deleted(self, gone: Mapping[str, Held]) -> None:
        """Mark rows of tasks that are gone without having been seen to go, and fence what they left unfinished."""
        await self._run(
            lambda connection: connection.execute(
                "UPDATE tasks SET deleted_at = now(), updated_at = now() WHERE uid = ANY($1::uuid[]) AND deleted_at IS NULL",
                list(gone),
            )
        )
        for uid, one in gone.items():
            self._backlog.forget(uid)
            if not one.finished:
                self.fence_later(uid, reason="Deleted")

    async def _flush(self) -> None:
        rows = self._backlog.batch(_BATCH)
        if rows:
            written = await self._write(rows)
            for row in rows:
                self._backlog.settle(row, written=row.uid in written)
        for uid, reason in list(self._fences.items()):
            await self.raise_fence(uid, reason=reason)
            self._fences.pop(uid, None)
        if self._backlog.forgotten:
            _log.error("deleted tasks have no last row in PostgreSQL: too many waited", count=self._backlog.forgotten)
            self._backlog.forgotten = 0
        self._flushed.set()

    async def _write(self, rows: Sequence[Row]) -> set[str]:
        """Write rows that are newer than the table's; return the uids of those."""
        try:
            written: set[str] = await self._run(lambda connection: _upsert(connection, rows))
        except asyncpg.DataError as error:
            if len(rows) == 1:
                # Held back it would block its neighbours for ever, and the task could never be deleted.
                _log.error("cannot project a task: PostgreSQL refuses its row", uid=rows[0].uid, error=str(error))
                return {rows[0].uid}
            return {uid for row in rows for uid in await self._write([row])}
        return written

    # ------------------------------------------------------------------------------------------- results and fence

    async def result(self, uid: str, *, attempt: int) -> StoredOutcome | None:
        """Return how an attempt ended, as its runner stored it. Raises :class:`DatabaseUnavailable`."""
        row = await self._run(
            lambda connection: connection.fetchrow(
                "SELECT outcome, holder, created_at FROM task_results WHERE task_uid = $1 AND attempt = $2", uid, attempt
            )
        )
        return None if row is None else _stored(row)

    async def raise_fence(self, uid: str, *, reason: str) -> Fence:
        """Bar a task from committing, unless it has. May be repeated. Raises :class:`DatabaseUnavailable`.

        A runner commits under the shared advisory lock on the uid and looks for the fence there; this holds the exclusive
        one, so that one of the two comes first and the other one sees it.
        """
        fence: Fence = await self._run(lambda connection: _raise_fence(connection, uid, reason))
        return fence

    async def release(self, uid: str) -> Fence:
        """Take the intents of a task from the pod that holds them, unless it has committed.

        The pod cannot commit any more; the next one of the task takes them up as ever. May be repeated. Raises
        :class:`DatabaseUnavailable`.
        """
        fence: Fence = await self._run(lambda connection: _release(connection, uid))
        return fence

    # ------------------------------------------------------------------------------------------------------- sweeping

    async def intents(self, *, namespaces: Sequence[str]) -> list[Intent]:
        """Return the tasks that have intents in the knowledge ledger. Raises :class:`DatabaseUnavailable`."""
        rows = await self._run(
            lambda connection: connection.fetch(
                "SELECT v.task_uid::text AS uid, bool_or(t.uid IS NOT NULL) AS known, max(v.updated_at) AS begun_at "
                "FROM document_versions v LEFT JOIN tasks t ON t.uid = v.task_uid WHERE v.state = 'intent' "
                "AND (v.namespace = ANY($1::text[]) OR cardinality($1::text[]) = 0) GROUP BY v.task_uid",
                list(namespaces),
            )
        )
        return [Intent(uid=row["uid"], known=row["known"], begun_at=row["begun_at"]) for row in rows]

    async def swept(self, *, namespaces: Sequence[str]) -> list[Swept]:
        """Return what is known of sweeps, for each namespace with knowledge bases. Raises :class:`DatabaseUnavailable`."""
        rows = await self._run(lambda connection: connection.fetch(_SWEPT, list(namespaces)))
        return [Swept(**row) for row in rows]

    async def _run(self, work: Callable[[Any], Any]) -> Any:
        if self._pool is None:
            raise RuntimeError("Database is used before warm_up()")
        try:
            async with self._pool.acquire(timeout=_COMMAND_TIMEOUT) as connection:
                answer = await work(connection)
        except asyncpg.DataError:
            raise
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            if self._down_since is None:
                self._down_since = self._clock()
            remedy = ""
            if isinstance(error, asyncpg.UndefinedTableError):
                remedy = '; run "python -m task_operator migrate"'
            raise DatabaseUnavailable(f"cannot use PostgreSQL: {error!r}{remedy}") from error
        self._down_since = None
        return answer


async def _upsert(connection: "asyncpg.Connection[asyncpg.Record]", rows: Sequence[Row]) -> set[str]:
    listed = [(row.uid, row.version, row.lost) for row in rows if row.listed]
    async with connection.transaction():
        if listed:
            await connection.execute(_GIVE_WAY, *(list(column) for column in zip(*listed, strict=True)))
        columns = zip(*(row.values for row in rows), strict=True)
        return {row["uid"] for row in await connection.fetch(_UPSERT, *(list(column) for column in columns))}


async def _committed(connection: "asyncpg.Connection[asyncpg.Record]", uid: str) -> Fence | None:
    """Return what a task has committed, and let nothing be committed until the transaction ends; None: nothing yet."""
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1::uuid::text, 0))", uid)
    row = await connection.fetchrow(
        "SELECT outcome, holder, created_at FROM task_results "
        "WHERE task_uid = $1 AND outcome->>'outcome' = 'Succeeded' ORDER BY attempt DESC LIMIT 1",
        uid,
    )
    committed = await connection.fetchval(
        "SELECT true FROM document_versions "
        "WHERE task_uid = $1 AND state IN ('published', 'superseded', 'unchanged') "
        "UNION ALL SELECT true FROM knowledge_base_deletions WHERE task_uid = $1 LIMIT 1",
        uid,
    )
    if row is None and not committed:
        return None
    stored = None if row is None else _stored(row)
    return Fence(state=FenceState.COMMITTED, outcome=None if stored is None else stored.outcome)


async def _release(connection: "asyncpg.Connection[asyncpg.Record]", uid: str) -> Fence:
    async with connection.transaction():
        if (committed := await _committed(connection, uid)) is not None:
            return committed
        await connection.execute(
            "UPDATE document_versions SET epoch = epoch + 1, holder = '', updated_at = now() "
            "WHERE task_uid = $1 AND state = 'intent'",
            uid,
        )
    return Fence(state=FenceState.RAISED)


async def _raise_fence(connection: "asyncpg.Connection[asyncpg.Record]", uid: str, reason: str) -> Fence:
    async with connection.transaction():
        if (committed := await _committed(connection, uid)) is not None:
            return committed
        await connection.execute(
            "INSERT INTO task_fences (task_uid, reason) VALUES ($1, $2) ON CONFLICT DO NOTHING", uid, reason
        )
        await connection.execute(
            "UPDATE document_versions SET state = 'canceled', epoch = epoch + 1, updated_at = now() "
            "WHERE task_uid = $1 AND state = 'intent'",
            uid,
        )
    return Fence(state=FenceState.RAISED)


def _stored(row: asyncpg.Record) -> StoredOutcome | None:
    try:
        outcome = AttemptOutcome.model_validate_json(row["outcome"])
    except ValidationError as error:
        _log.warning("ignoring a stored result that cannot be read", error=str(error))
        return None
    return StoredOutcome(outcome=outcome, holder=row["holder"], created_at=row["created_at"])


def _values(manifest: Mapping[str, Any], *, deleted_at: datetime | None, now: datetime) -> tuple[Any, ...]:
    """Return the row of a task, in the order of the columns."""
    metadata: Mapping[str, Any] = manifest["metadata"]
    spec: Mapping[str, Any] = manifest.get("spec") or {}
    status: Mapping[str, Any] = manifest.get("status") or {}
    return (
        metadata["uid"],
        metadata["namespace"],
        metadata["name"],
        _text(spec.get("kbId")),
        _text(spec.get("type")) or "",
        _text(spec.get("priority")) or "normal",
        _text(status.get("phase")) or "Queued",
        _text(status.get("stage")),
        _small(status.get("progress")),
        _small(status.get("attempt")) or 0,
        _text(status.get("job")),
        _json(spec),
        _json(status.get("result")),
        _json(status.get("error")),
        _json(status.get("queue")),
        _json(status.get("attempts") or []),
        _time(metadata.get("creationTimestamp")) or now,
        _time(status.get("queuedAt")),
        _time(status.get("startedAt")),
        _time(status.get("finishedAt")),
        deleted_at,
        int(metadata.get("generation") or 0),
        int(metadata["resourceVersion"]),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value).replace("\x00", "")


def _small(value: object) -> int | None:
    return value if isinstance(value, int) and -32768 <= value <= 32767 else None


def _time(value: object) -> datetime | None:
    at = parse_time(value) if isinstance(value, str) else None
    return at if at is None or at.tzinfo is not None else at.replace(tzinfo=UTC)


def _json(value: object) -> str | None:
    if value is None:
        return None
    data = orjson.dumps(value)
    if b"\\u0000" in data:  # JSON may hold NUL, jsonb may not
        data = orjson.dumps(_without_nul(value))
    return data.decode()


def _without_nul(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\x00", "")
    if isinstance(value, Mapping):
        return {_without_nul(key): _without_nul(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nul(item) for item in value]
    return value
