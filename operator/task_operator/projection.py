"""PostgreSQL as the operator uses it: projection of tasks, stored results, and the fence. The only file that speaks to it.

Rows of ``tasks`` are a copy of what the API server holds and can be made again from it at any time: writing them never
holds up a task. They are kept by uid, the latest version of each, until PostgreSQL has taken them; a row is replaced only
by one of a higher resourceVersion, so writing twice, late or out of order is harmless.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

import asyncpg
import orjson
import structlog
from pydantic import ValidationError

from task_contract.messages import AttemptOutcome
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
    "WHERE tasks.resource_version < excluded.resource_version"
)


@dataclass(frozen=True, slots=True)
class _Row:
    uid: str
    resource_version: int
    values: tuple[Any, ...]
    since: float
    """When it began to wait, by the event loop's clock."""
    deleted: bool


class Database:
    """The operator's side of PostgreSQL."""

    def __init__(self, url: str, *, metrics: Metrics) -> None:
        self._url = url
        self._metrics = metrics
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._pending: dict[str, _Row] = {}
        self._acknowledged: dict[str, int] = {}
        self._fences: dict[str, str] = {}
        self._wake = asyncio.Event()
        self._down_since: datetime | None = None

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
                while self._pending:
                    await self._flush()
                await self._pool.close()
        except (DatabaseUnavailable, TimeoutError):
            self._pool.terminate()  # what is lost here is projected again from the tasks at the next start
        self._pool = None

    # ------------------------------------------------------------------------------------------------- projection

    def submit(self, manifest: Mapping[str, Any], *, deleted: bool = False) -> None:
        """Have a task written; returns at once. Of one task only the latest version waits."""
        row = _row(manifest, since=asyncio.get_running_loop().time(), deleted=deleted)
        known = self._pending.get(row.uid)
        if known is not None:
            if known.resource_version >= row.resource_version:
                return
            row = replace(row, since=known.since)
        elif self._acknowledged.get(row.uid, -1) >= row.resource_version:
            return
        self._pending[row.uid] = row
        self._wake.set()

    def fence_later(self, uid: str, *, reason: str) -> None:
        """Have the fence of a task that is gone raised as soon as PostgreSQL can be reached."""
        self._fences[uid] = reason
        self._wake.set()

    def acknowledged(self, uid: str) -> int | None:
        """Return the resourceVersion up to which a task is known to be in PostgreSQL."""
        return self._acknowledged.get(uid)

    async def run(self) -> None:
        """Write what was submitted until cancelled; while PostgreSQL is away, try again with growing waits."""
        wait = 1.0
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while self._pending or self._fences:
                    await self._flush()
                wait = 1.0
            except DatabaseUnavailable as error:
                _log.warning("cannot write to PostgreSQL; waiting", pending=len(self._pending), error=str(error))
                self._wake.set()
                await asyncio.sleep(wait)
                wait = min(2 * wait, _MAX_BACKOFF)

    async def absent(self, *, namespaces: Sequence[str], alive: Callable[[str], bool]) -> int:
        """Mark rows of tasks that are gone without having been seen to go, and fence what they left; return how many."""
        scope = "AND namespace = ANY($1::text[])" if namespaces else "AND $1::text[] IS NOT NULL"
        rows = await self._run(
            lambda connection: connection.fetch(
                f"SELECT uid::text AS uid, finished_at FROM tasks WHERE deleted_at IS NULL {scope}",  # noqa: S608 - constants
                list(namespaces),
            )
        )
        gone = [row for row in rows if not alive(row["uid"])]
        if gone:
            uids = [row["uid"] for row in gone]
            await self._run(
                lambda connection: connection.execute(
                    "UPDATE tasks SET deleted_at = now(), updated_at = now() "
                    "WHERE uid = ANY($1::uuid[]) AND deleted_at IS NULL",
                    uids,
                )
            )
        for row in gone:
            self._acknowledged.pop(row["uid"], None)
            if row["finished_at"] is None:
                self.fence_later(row["uid"], reason="Deleted")
        return len(gone)

    def measure(self) -> None:
        """Set the gauges of the projection."""
        self._metrics.projection_pending.set(len(self._pending))
        oldest = min((row.since for row in self._pending.values()), default=None)
        self._metrics.projection_lag.set(0 if oldest is None else asyncio.get_running_loop().time() - oldest)

    async def _flush(self) -> None:
        rows = list(self._pending.values())[:_BATCH]
        if rows:
            await self._write(rows)
            for row in rows:
                self._settle(row)
        for uid, reason in list(self._fences.items()):
            await self.raise_fence(uid, reason=reason)
            self._fences.pop(uid, None)
        self.measure()

    def _settle(self, row: _Row) -> None:
        if row.deleted:
            self._acknowledged.pop(row.uid, None)
        else:
            self._acknowledged[row.uid] = max(row.resource_version, self._acknowledged.get(row.uid, 0))
        waiting = self._pending.get(row.uid)
        if waiting is not None and waiting.resource_version <= row.resource_version:
            del self._pending[row.uid]

    async def _write(self, rows: Sequence[_Row]) -> None:
        try:
            await self._upsert(rows)
        except asyncpg.DataError as error:
            if len(rows) == 1:
                # Held back it would block its neighbours for ever, and the task could never be deleted.
                _log.error("cannot project a task: PostgreSQL refuses its row", uid=rows[0].uid, error=str(error))
                return
            for row in rows:
                await self._write([row])

    async def _upsert(self, rows: Sequence[_Row]) -> None:
        columns = [list(column) for column in zip(*(row.values for row in rows), strict=True)]
        await self._run(lambda connection: connection.execute(_UPSERT, *columns))

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
                self._down_since = datetime.now(UTC)
            remedy = ""
            if isinstance(error, asyncpg.UndefinedTableError):
                remedy = '; run "python -m task_operator migrate"'
            raise DatabaseUnavailable(f"cannot use PostgreSQL: {error!r}{remedy}") from error
        self._down_since = None
        return answer


async def _raise_fence(connection: "asyncpg.Connection[asyncpg.Record]", uid: str, reason: str) -> Fence:
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1::uuid::text, 0))", uid)
        row = await connection.fetchrow(
            "SELECT outcome, holder, created_at FROM task_results "
            "WHERE task_uid = $1 AND outcome->>'outcome' = 'Succeeded' ORDER BY attempt DESC LIMIT 1",
            uid,
        )
        committed = await connection.fetchval(
            "SELECT true FROM document_versions "
            "WHERE task_uid = $1 AND state IN ('published', 'superseded', 'unchanged') LIMIT 1",
            uid,
        )
        if row is not None or committed:
            stored = None if row is None else _stored(row)
            return Fence(state=FenceState.COMMITTED, outcome=None if stored is None else stored.outcome)
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


def _row(manifest: Mapping[str, Any], *, since: float, deleted: bool) -> _Row:
    metadata: Mapping[str, Any] = manifest["metadata"]
    spec: Mapping[str, Any] = manifest.get("spec") or {}
    status: Mapping[str, Any] = manifest.get("status") or {}
    now = datetime.now(UTC)
    version = int(metadata["resourceVersion"])
    values = (
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
        now if deleted else None,
        int(metadata.get("generation") or 0),
        version,
    )
    return _Row(uid=metadata["uid"], resource_version=version, values=values, since=since, deleted=deleted)


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
