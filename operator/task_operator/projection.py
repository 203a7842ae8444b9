"""PostgreSQL as the operator uses it: projection of tasks, stored results, and the fence. The only file that speaks to it.

Rows of ``tasks`` are a copy of what the API server holds and can be made again from it at any time: writing them never
holds up a task. They wait in a :class:`~task_operator.backlog.Backlog` until PostgreSQL has taken them, in batches; a row is
never replaced by one of a lower resourceVersion, so writing twice, late or out of order is harmless.

With a row its task's history is written, in the same transaction: what happened since the last event in ``task_events``
(:mod:`task_operator.transitions`), and the attempts. Events are numbered by one writer at a time, in the order in which they
become visible. Both tables are primary data, as rows of deleted tasks are: they cannot be made again.

Every full list begins with what the table holds (:meth:`Database.held`), and that is then all that is known of it: rows that
somebody removed, that were dropped while PostgreSQL was away, or that are of a history that the API server has lost to a
restored backup, are written from the list.

The callback of a task is written with its end, in the same transaction and once for all: its key is the task.

An operator that stands by writes nothing. It keeps the last rows of tasks that it has seen deleted, for nobody can list
those: should the leader have died before it wrote them, the next one does. Each transaction that writes asks once more
whether this process leads, when it has its lock; and PostgreSQL ends one that rests for ``rest`` seconds in the middle, so
that a process which was paused there has lost it before another one leads (:mod:`task_operator.election`).
"""

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import asyncpg
import orjson
import structlog
from pydantic import ValidationError

from task_contract.batches import COUNTS
from task_contract.callbacks import CALLBACKS_CHANNEL, callback_body, callback_id, fill_url, host_of
from task_contract.location import check_callback_url
from task_contract.messages import AttemptOutcome
from task_contract.names import EVENTS_NOTIFICATION, TRACEPARENT_ANNOTATION
from task_contract.tracing import trace_id
from task_operator.backlog import LIMIT, Backlog, Row
from task_operator.jobs import parse_time
from task_operator.metrics import Metrics
from task_operator.observation import Batch, Fence, FenceState, StoredOutcome
from task_operator.transitions import DELETED, ENDS, Attempt, Seen, Transition, transitions, withdrawn

_log = structlog.get_logger(__name__)

_ROWS: Final = 500
_MAX_BACKOFF: Final = 30.0  # seconds
_COMMAND_TIMEOUT: Final = 10.0  # seconds
_CONNECTIONS: Final = 4
_LINGER: Final = 0.1  # seconds: a statement costs more than a row, and a task often changes twice in a moment
FENCES: Final = 10_000
"""Fences of tasks that are gone that may wait for PostgreSQL, at 0.2 KB each."""
_KEPT: Final = 2 * 1024 * 1024  # bytes of rows of deleted tasks that an operator keeps while it stands by
_REST: Final = 20.0  # seconds


class DatabaseUnavailable(Exception):
    """PostgreSQL cannot be used at the moment."""


class NotLeading(DatabaseUnavailable):
    """A write that was not made, since another operator may lead by now."""


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
    ("reason", "text"),
    ("message", "text"),
    ("duplicate_of", "text"),
    ("created_at", "timestamptz"),
    ("queued_at", "timestamptz"),
    ("started_at", "timestamptz"),
    ("finished_at", "timestamptz"),
    ("deleted_at", "timestamptz"),
    ("generation", "bigint"),
    ("resource_version", "bigint"),
    ("traceparent", "text"),
)
_NAMES: Final = ", ".join(name for name, _ in _COLUMNS)
_PLACE: Final = {name: place for place, (name, _) in enumerate(_COLUMNS)}

_HELD: Final = (
    "SELECT uid::text AS uid, resource_version AS version, finished_at IS NOT NULL AS finished, "
    "told_version IS NOT DISTINCT FROM resource_version AS told "
    "FROM tasks WHERE deleted_at IS NULL AND (namespace = ANY($1::text[]) OR $1 = '{}')"
)
"""Tasks that are there, in these namespaces, or in all without any."""
_PREFETCH: Final = 500  # rows
# One writer at a time, from before the first number of an event is drawn until the commit: so events become visible in the
# order of their numbers. The lock has a statement of its own, for the next one is to see what the last holder has committed.
# A process that stands still in between (its node is lost) loses its connection, and the lock with it.
_ALONE: Final = f"SELECT pg_advisory_xact_lock({0x7074_6576_656E_7473})"  # "ptevents" in ASCII
_LAST_EVENTS: Final = (
    "LEFT JOIN LATERAL (SELECT phase, attempt, reason, queued_at FROM task_events "
    "WHERE task_uid = written.uid ORDER BY number DESC LIMIT 1) AS last ON true"
)
_UPSERT: Final = (
    f"WITH written AS (INSERT INTO tasks ({_NAMES}, told_version) "  # noqa: S608 - made of constants only
    "SELECT *, resource_version "
    f"FROM unnest({', '.join(f'${place}::{kind}[]' for place, (_, kind) in enumerate(_COLUMNS, 1))}) "
    f"AS given ({_NAMES}) ON CONFLICT (uid) DO UPDATE SET "
    f"{', '.join(f'{name} = excluded.{name}' for name, _ in _COLUMNS if name != 'uid')}, "
    "told_version = excluded.told_version, updated_at = now() "
    "WHERE tasks.resource_version <= excluded.resource_version RETURNING uid) "
    f"SELECT uid::text AS uid, last.* FROM written {_LAST_EVENTS}"
)
_MARK_DELETED: Final = (
    "WITH written AS (UPDATE tasks SET deleted_at = now(), updated_at = now(), told_version = resource_version "  # noqa: S608 - names of ours; values are parameters
    f"WHERE uid = ANY($1::uuid[]) AND deleted_at IS NULL RETURNING {_NAMES}) "
    f"SELECT {', '.join(f'written.{name} AS of_{name}' for name, _ in _COLUMNS)}, last.* FROM written {_LAST_EVENTS}"
)
_ADD_EVENTS: Final = (
    "WITH told AS (INSERT INTO task_events "  # noqa: S608 - names of ours
    "(task_uid, namespace, name, kb_id, type, phase, attempt, reason, message, queued_at, at) "
    "SELECT uid, namespace, name, kb_id, type, event.phase, event.attempt, event.reason, event.message, event.queued_at, "
    "coalesce(event.at, now()) FROM unnest("
    "$1::uuid[], $2::text[], $3::smallint[], $4::timestamptz[], $5::text[], $6::text[], $7::timestamptz[]) "
    "WITH ORDINALITY AS event (uid, phase, attempt, queued_at, reason, message, at, place) "
    "JOIN tasks USING (uid) ORDER BY event.place RETURNING number) "
    f"SELECT pg_notify('{EVENTS_NOTIFICATION}', max(number)::text) FROM told"
)
_PUT_ATTEMPTS: Final = (
    "INSERT INTO attempts (task_uid, number, job, started_at, finished_at, reason, error) "
    "SELECT * FROM unnest("
    "$1::uuid[], $2::smallint[], $3::text[], $4::timestamptz[], $5::timestamptz[], $6::text[], $7::jsonb[]) "
    "ON CONFLICT (task_uid, number) DO UPDATE SET job = excluded.job, started_at = excluded.started_at, "
    "finished_at = excluded.finished_at, reason = excluded.reason, error = coalesce(excluded.error, attempts.error)"
)
_WITHDRAW_ATTEMPTS: Final = (
    "DELETE FROM attempts USING unnest($1::uuid[], $2::smallint[]) AS gone (uid, number) "
    "WHERE task_uid = gone.uid AND attempts.number >= gone.number"
)
_PUT_CALLBACKS: Final = (
    "WITH put AS (INSERT INTO callbacks (id, task_uid, namespace, name, kb_id, url, host, secret_name, secret_key, body) "  # noqa: S608 - names of ours
    "SELECT * FROM unnest($1::text[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], "
    "$8::text[], $9::text[], $10::text[]) ON CONFLICT DO NOTHING RETURNING id) "  # by id or task: it has been written before
    f"SELECT pg_notify('{CALLBACKS_CHANNEL}', count(*)::text) FROM put HAVING count(*) > 0"
)


# Rows that a list contradicts: called deleted although the task exists, or of a version that the API server never had.
_GIVE_WAY: Final = (
    "UPDATE tasks SET resource_version = 0 "
    "FROM unnest($1::uuid[], $2::bigint[], $3::bigint[]) AS listed (uid, version, lost) "
    "WHERE tasks.uid = listed.uid AND (tasks.deleted_at IS NOT NULL "
    "OR tasks.resource_version > listed.version AND tasks.resource_version <= listed.lost)"
)


_PHASES: Final = (
    "SELECT DISTINCT ON (name) name, phase FROM tasks WHERE namespace = $1 AND name = ANY($2) ORDER BY name, created_at DESC"
)

_COUNT_USAGE: Final = (
    "WITH due AS (SELECT number FROM task_usage WHERE NOT counted ORDER BY number LIMIT $1 FOR UPDATE SKIP LOCKED) "
    "UPDATE task_usage SET counted = true FROM due WHERE task_usage.number = due.number RETURNING type, outcome, seconds, "
    "cpu_seconds, memory_byte_seconds, memory_peak_bytes, tokens, texts, stages, stores"
)

_EXPIRE: Final = (
    "WITH due AS (SELECT uid FROM tasks WHERE deleted_at < $1 "  # noqa: S608 - names of ours
    "AND NOT EXISTS (SELECT FROM callbacks WHERE task_uid = tasks.uid AND state = 'pending') "
    "ORDER BY deleted_at LIMIT $2 FOR UPDATE SKIP LOCKED), "
    + "".join(
        f"from_{table} AS (DELETE FROM {table} USING due WHERE task_uid = due.uid), "  # noqa: S608 - names of ours
        for table in (
            "attempts",
            "task_events",
            "task_results",
            "task_usage",
            "task_vectors",
            "task_fences",
            "callbacks",
            "batches",
        )
    )
    + "gone AS (DELETE FROM tasks USING due WHERE tasks.uid = due.uid RETURNING tasks.uid) SELECT count(*) FROM gone"
)


@dataclass(frozen=True, slots=True)
class Held:
    """What the table says of a task that is not deleted."""

    version: int
    finished: bool
    told: bool = True
    """Whether ``task_events`` tells of it up to this version; False: a release has written the row that tells nothing."""


@dataclass(frozen=True, slots=True)
class DefaultCallback:
    """Where the end of a task is told that names no callback of its own."""

    url: str
    """With the fields of :func:`task_contract.callbacks.fill_url`."""
    secret_name: str | None = None
    """Of the Secret in the task's namespace that signs, and the key in it; None: unsigned."""
    secret_key: str | None = None


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
    "AND dropped_at IS NULL AND deleted_at < now() - interval '1 minute') "
    "OR EXISTS (SELECT FROM generation_drops d WHERE d.namespace = used.namespace "
    "AND dropped_at IS NULL AND d.since < now() - interval '1 minute') "
    # A switch that stopped before the aliases, what is retained no longer, and what a task that has ended was filling.
    "OR EXISTS (SELECT FROM generations g LEFT JOIN tasks t ON t.uid = g.task_uid WHERE g.namespace = used.namespace AND ("
    "g.state = 'serving' AND g.aliases_at IS NULL AND g.switched_at < now() - interval '1 minute' "
    "OR g.state = 'retained' AND g.keep_until < now() "
    "OR g.state = 'filling' AND (t.finished_at IS NOT NULL OR t.deleted_at IS NOT NULL "
    "OR EXISTS (SELECT FROM task_fences f WHERE f.task_uid = g.task_uid)))) AS dirty "
    "FROM (SELECT namespace, created_at AS since FROM knowledge_bases "
    "UNION ALL SELECT namespace, deleted_at FROM knowledge_base_deletions) AS used LEFT JOIN sweeps USING (namespace) "
    "WHERE namespace = ANY($1::text[]) OR cardinality($1::text[]) = 0 GROUP BY namespace ORDER BY namespace"
)


_FAILURES: Final = (
    "SELECT reason, count(*) AS documents, (array_agg(file_path ORDER BY ordinal))[1] AS path, "
    "(array_agg(message ORDER BY ordinal))[1] AS message FROM batch_documents WHERE task_uid = $1 AND state = 'failed' "
    "GROUP BY reason ORDER BY 2 DESC, 1 LIMIT 3"
)
_PUBLISHED_UNSAID: Final = (
    "UPDATE batch_documents AS listed SET state = 'done', message = NULL, updated_at = now(), version = written.version, "
    "chunks = written.chunk_count, reason = CASE written.state WHEN 'published' THEN 'Completed' "
    "WHEN 'unchanged' THEN 'Unchanged' ELSE 'Superseded' END FROM document_versions AS written "
    "WHERE listed.task_uid = $1 AND listed.state = 'pending' AND written.task_uid = $1 "
    "AND written.document_id = listed.document_id AND written.state IN ('published', 'unchanged', 'superseded')"
)
_GIVE_UP: Final = (
    "UPDATE batch_documents SET state = 'failed', updated_at = now(), reason = coalesce(reason, $2), "
    "message = coalesce(message, CASE WHEN begun = 0 THEN 'its turn did not come: ' ELSE '' END || $3) "
    "WHERE task_uid = $1 AND state = 'pending'"
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
        fences: int = FENCES,
        default_callback: DefaultCallback | None = None,
        leads: Callable[[], bool] = lambda: True,
        rest: float = _REST,
    ) -> None:
        """``limit``: bytes of rows that may wait; ``fences``: how many fences of deleted tasks; ``leads``: whether this
        process may write at the moment; ``rest``: seconds that a transaction may stand still, less than it takes from when
        ``leads`` becomes false until it becomes true elsewhere."""
        self._leads = leads
        self._rest = rest
        self._stands_by = False
        self._kept: deque[Row] = deque()
        self._kept_size = 0
        self._default_callback = default_callback
        self._url = url
        self._clock = clock
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._backlog = Backlog(limit)
        self._fences: dict[str, str] = {}  # of tasks that were deleted unfinished
        self._most_fences = fences
        self._unfenced = 0
        self._wake = asyncio.Event()
        self._flushed = asyncio.Event()
        self._down_since: datetime | None = None
        self.on_incomplete: Callable[[], None] = lambda: None
        """Called when PostgreSQL is back after rows were dropped: all tasks are to be listed anew."""
        metrics.watch_projection(
            pending=lambda: len(self._backlog),
            size=lambda: self._backlog.size,
            lag=self._lag,
            down=lambda: 0.0 if self._down_since is None else (self._clock() - self._down_since).total_seconds(),
        )

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
            self._url,
            min_size=0,
            max_size=_CONNECTIONS,
            timeout=_COMMAND_TIMEOUT,
            command_timeout=_COMMAND_TIMEOUT,
            reset=_keep,
            init=self._prepare,
        )
        try:
            await self._pool
        except (OSError, asyncpg.PostgresError) as error:
            _log.warning("cannot reach PostgreSQL yet", error=repr(error))

    async def _prepare(self, connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        rest = f"{round(self._rest * 1000)}ms"
        await connection.execute("SELECT set_config('idle_in_transaction_session_timeout', $1, false)", rest)

    async def aclose(self) -> None:
        """Write what is waiting if that is quickly done, and close all connections."""
        if self._pool is None:
            return
        try:
            async with asyncio.timeout(2):
                while self._backlog and not self._stands_by:
                    await self._flush()
                await self._pool.close()
        except (DatabaseUnavailable, TimeoutError):
            self._pool.terminate()  # what is lost here is projected again from the tasks at the next start
        self._pool = None

    # ------------------------------------------------------------------------------------------------- projection

    def stand_by(self) -> None:
        """Take in nothing but rows of deleted tasks, and forget what waits: another operator writes it."""
        self._stands_by = True
        self._backlog.clear()
        self._fences.clear()

    def act(self) -> None:
        """Take in rows again, and write those of deleted tasks that were kept meanwhile."""
        self._stands_by = False
        now = asyncio.get_running_loop().time()
        for row in self._kept:
            self._backlog.put(row, now=now)
        self._kept.clear()
        self._kept_size = 0
        self._wake.set()
        self._flushed.set()

    def _keep_row(self, row: Row) -> None:
        self._kept.append(row)
        self._kept_size += row.size
        while self._kept_size > _KEPT:
            self._kept_size -= self._kept.popleft().size

    def submit(self, manifest: Mapping[str, Any], *, deleted: bool = False, lost: int | None = None) -> None:
        """Have a task written; returns at once. Of one task only the latest version waits.

        With ``lost`` it is from a list: versions up to that one were known before the list was asked for.
        """
        if self._stands_by and not deleted:
            return
        uid, version = sys.intern(manifest["metadata"]["uid"]), int(manifest["metadata"]["resourceVersion"])
        bound = -1 if lost is None else lost
        if lost is not None:
            self._backlog.confirm(uid, lost=lost)
        if self._backlog.wants(uid, version, lost=bound):
            values = _values(manifest, deleted_at=self._clock() if deleted else None, now=self._clock())
            row = Row(uid=uid, version=version, values=values, deleted=deleted, lost=bound, listed=lost is not None)
            if self._stands_by:
                self._keep_row(row)
                return
            self._backlog.put(row, now=asyncio.get_running_loop().time())
            self._wake.set()

    def newest(self) -> int:
        """Return the highest resourceVersion that is known of any task; -1 of none."""
        return self._backlog.newest()

    async def room(self) -> None:
        """Wait until the backlog is half empty at most, or PostgreSQL is away: for who could submit more than it takes."""
        while self._backlog.half_full and self._down_since is None and not self._stands_by:
            self._flushed.clear()
            await self._flushed.wait()

    def fence_later(self, uid: str, *, reason: str) -> None:
        """Have the fence of a task that is gone raised as soon as PostgreSQL can be reached.

        When too many wait the oldest is left to the sweeper, which fences every intent whose task does not live, within half
        a minute after PostgreSQL is back. While this operator stands by, another one does it.
        """
        if self._stands_by:
            return
        self._fences[uid] = reason
        if len(self._fences) > self._most_fences:
            del self._fences[next(iter(self._fences))]
            self._unfenced += 1
        self._wake.set()

    def acknowledged(self, uid: str) -> int | None:
        """Return the resourceVersion up to which a task is known to be in PostgreSQL."""
        return self._backlog.stored(uid)

    async def run(self) -> None:
        """Write what was submitted until cancelled; while PostgreSQL is away, try again with growing waits."""
        wait = 1.0
        while True:
            await self._wake.wait()
            await asyncio.sleep(_LINGER)
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
        held: dict[str, Held] = {}

        async def read(connection: Any) -> None:
            held.clear()
            async with connection.transaction(readonly=True):
                # Row by row: all at once, and a second time as what is made of them, are megabytes of 10,000 tasks.
                async for row in connection.cursor(_HELD, list(namespaces), prefetch=_PREFETCH):
                    held[sys.intern(row["uid"])] = Held(row["version"], finished=row["finished"], told=row["told"])

        await self.ask(read)
        newest = max((one.version for one in held.values()), default=-1)
        self._backlog.restart({uid: one.version for uid, one in held.items() if one.told}, newest=newest)
        return held

    async def mark_deleted(self, gone: Mapping[str, Held]) -> None:
        """Mark rows of tasks that are gone without having been seen to go, and fence what they left unfinished."""
        for uids in _batches(list(gone)):
            await self.ask(partial(_mark_deleted, uids=uids, check=self._check, default=self._default_callback))
            for uid in uids:
                self._backlog.forget(uid)
                if not gone[uid].finished:
                    self.fence_later(uid, reason="Deleted")

    async def _flush(self) -> None:
        rows = self._backlog.batch(_ROWS)
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
        if self._unfenced:
            _log.warning("too many fences waited; the next sweep bars those tasks from publishing", count=self._unfenced)
            self._unfenced = 0
        self._flushed.set()

    async def _write(self, rows: Sequence[Row]) -> set[str]:
        """Write rows that are newer than the table's; return the uids of those."""
        try:
            written: set[str] = await self.ask(
                lambda connection: _upsert(connection, rows, check=self._check, default=self._default_callback)
            )
        except asyncpg.DataError as error:
            if len(rows) == 1:
                # Held back it would block its neighbours for ever, and the task could never be deleted.
                _log.error("cannot project a task: PostgreSQL refuses its row", uid=rows[0].uid, error=str(error))
                return {rows[0].uid}
            half = len(rows) // 2
            return await self._write(rows[:half]) | await self._write(rows[half:])
        return written

    # ------------------------------------------------------------------------------------------- results and fence

    async def result(self, uid: str, *, attempt: int) -> StoredOutcome | None:
        """Return how an attempt ended, as its runner stored it. Raises :class:`DatabaseUnavailable`."""
        row = await self.ask(
            lambda connection: connection.fetchrow(
                "SELECT outcome, holder, created_at FROM task_results WHERE task_uid = $1 AND attempt = $2", uid, attempt
            )
        )
        return None if row is None else _stored(row)

    async def phases(self, namespace: str, names: Sequence[str]) -> dict[str, str]:
        """Return the phases of tasks that have ended, by name; of several of one name that of the youngest.

        Raises :class:`DatabaseUnavailable`.
        """
        rows = await self.ask(lambda connection: connection.fetch(_PHASES, namespace, list(names)))
        return {row["name"]: row["phase"] for row in rows if row["phase"] in ENDS}

    async def raise_fence(self, uid: str, *, reason: str) -> Fence:
        """Bar a task from committing, unless it has. May be repeated. Raises :class:`DatabaseUnavailable`.

        A runner commits under the shared advisory lock on the uid and looks for the fence there; this holds the exclusive
        one, so that one of the two comes first and the other one sees it.
        """
        fence: Fence = await self.ask(lambda connection: _raise_fence(connection, uid, reason, check=self._check))
        return fence

    async def release(self, uid: str) -> Fence:
        """Take the intents of a task from the pod that holds them, unless it has committed.

        The pod cannot commit any more; the next one of the task takes them up as ever. May be repeated. Raises
        :class:`DatabaseUnavailable`.
        """
        fence: Fence = await self.ask(lambda connection: _release(connection, uid, check=self._check))
        return fence

    # ---------------------------------------------------------------------------------------------------------- batch

    async def batch(self, uid: str) -> Batch:
        """Return what has become of the documents of a batch. Raises :class:`DatabaseUnavailable`."""
        batch: Batch = await self.ask(lambda connection: _batch(connection, uid))
        return batch

    async def settle_batch(self, uid: str, *, reason: str, message: str) -> Batch:
        """Have the documents of a batch that have not ended count as failed, each for its own last reason if it has one.

        The fence is raised with it, so that none of them is published after it counts as failed. What was published already,
        by a pod that died before it could say so, counts as done. May be repeated. Raises :class:`DatabaseUnavailable`.
        """
        batch: Batch = await self.ask(lambda connection: _settle_batch(connection, uid, reason, message, check=self._check))
        return batch

    # -------------------------------------------------------------------------------------------------------- archive

    async def expire(self, *, before: datetime, most: int) -> int:
        """Delete the history of tasks that were deleted before a moment, the oldest first; return of how many.

        With a row of ``tasks`` goes all that is kept of its task: attempts, events, results, usage, fence. Rows that another
        operator deletes at the same time are passed over. Raises :class:`DatabaseUnavailable`.
        """
        gone: int = await self.ask(lambda connection: connection.fetchval(_EXPIRE, before, most))
        return gone

    # ---------------------------------------------------------------------------------------------------------- usage

    async def count_usage(self, *, most: int) -> list[dict[str, Any]]:
        """Mark what attempts have used as counted, and return it. Raises :class:`DatabaseUnavailable`."""
        rows = await self.ask(lambda connection: connection.fetch(_COUNT_USAGE, most))
        return [dict(row) | {name: orjson.loads(row[name]) for name in ("stages", "stores")} for row in rows]

    # ------------------------------------------------------------------------------------------------------- sweeping

    async def intents(self, *, namespaces: Sequence[str]) -> list[Intent]:
        """Return the tasks that have intents in the knowledge ledger. Raises :class:`DatabaseUnavailable`."""
        rows = await self.ask(
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
        rows = await self.ask(lambda connection: connection.fetch(_SWEPT, list(namespaces)))
        return [Swept(**row) for row in rows]

    async def ask(self, work: Callable[[Any], Any]) -> Any:
        """Do a piece of work with a connection of the pool. Raises :class:`DatabaseUnavailable`, and asyncpg.DataError."""
        if self._pool is None:
            raise RuntimeError("Database is used before warm_up()")
        try:
            async with self._pool.acquire(timeout=_COMMAND_TIMEOUT) as connection:
                answer = await work(connection)
        except (asyncpg.DataError, NotLeading):
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

    def _check(self) -> None:
        """Raise :class:`NotLeading` unless this process may write; to be called with the lock that keeps others from it."""
        if not self._leads():
            raise NotLeading("cannot write to PostgreSQL: this operator does not lead any more")


async def _keep(_: object) -> None:
    """Take a connection as it is: nothing here leaves anything in its session, and asyncpg's reset is a request more."""


async def _upsert(
    connection: "asyncpg.Connection[asyncpg.Record]",
    rows: Sequence[Row],
    *,
    check: Callable[[], None],
    default: DefaultCallback | None,
) -> set[str]:
    """Write rows that are newer than the table's, and what they tell; return the uids of those."""
    listed = [(row.uid, row.version, row.lost) for row in rows if row.listed]
    async with connection.transaction():
        await connection.execute(_ALONE)
        check()
        if listed:
            await connection.execute(_GIVE_WAY, *_columns(listed))
        written = await connection.fetch(_UPSERT, *_columns([row.values for row in rows]))
        last = {record["uid"]: record for record in written}
        await _tell(connection, [(_told(last[row.uid]), row.values) for row in rows if row.uid in last], default=default)
    return set(last)


async def _mark_deleted(
    connection: "asyncpg.Connection[asyncpg.Record]",
    *,
    uids: Sequence[str],
    check: Callable[[], None],
    default: DefaultCallback | None,
) -> None:
    async with connection.transaction():
        await connection.execute(_ALONE)
        check()
        written = await connection.fetch(_MARK_DELETED, uids)
        await _tell(connection, [(_told(record), tuple(record)[: len(_COLUMNS)]) for record in written], default=default)


async def _tell(
    connection: "asyncpg.Connection[asyncpg.Record]",
    written: Sequence[tuple[Transition | None, Sequence[Any]]],
    *,
    default: DefaultCallback | None,
) -> None:
    """Add the events from the last one of each task to the row that was just written, what is new of its attempts, and its
    callback when it has ended."""
    events: list[tuple[Any, ...]] = []
    attempts: list[tuple[Any, ...]] = []
    gone: list[tuple[Any, ...]] = []
    callbacks: list[tuple[Any, ...]] = []
    for told, values in written:
        seen = _seen(values)
        uid = values[0]
        story = transitions(told, seen)
        if not story:
            continue
        events += [(uid, one.phase, one.attempt, one.queued_at, one.reason, one.message, one.at) for one in story]
        known = 0 if told is None else told.attempt
        attempts += [(uid, *one, _error_of(one, values)) for one in seen.attempts if one.number >= known]
        if (number := withdrawn(told, seen)) is not None:
            gone.append((uid, number))
        if story[-1].phase in ENDS - {DELETED} and (callback := _callback(values, default)) is not None:
            callbacks.append(callback)
    if gone:
        await connection.execute(_WITHDRAW_ATTEMPTS, *_columns(gone))
    if attempts:
        await connection.execute(_PUT_ATTEMPTS, *_columns(attempts))
    if events:
        await connection.execute(_ADD_EVENTS, *_columns(events))
    if callbacks:
        await connection.execute(_PUT_CALLBACKS, *_columns(callbacks))


def _callback(values: Sequence[Any], default: DefaultCallback | None) -> tuple[Any, ...] | None:
    """Return the row of the callback of a task that has ended; None if nobody wants one."""

    def of(name: str) -> Any:
        return values[_PLACE[name]]

    def read(name: str) -> Any:
        return None if of(name) is None else orjson.loads(of(name))

    named: Mapping[str, Any] = read("spec").get("callback") or {}
    url, secret = named.get("url"), named.get("secretRef") or {}
    if url is None and default is not None:
        url, secret = default.url, {"name": default.secret_name, "key": default.secret_key}
    if url is None:
        return None
    try:
        check_callback_url(url)
    except ValueError:
        return None  # a task that the CRD would refuse: it has ended as one that cannot be read
    uid, namespace, name, kb_id = str(of("uid")), of("namespace"), of("name"), of("kb_id")
    url = fill_url(url, task_id=name, namespace=namespace, kb_id=kb_id)
    body = callback_body(
        task_id=name,
        namespace=namespace,
        uid=uid,
        kb_id=kb_id,
        task_type=of("type"),
        phase=of("phase"),
        attempt=of("attempt"),
        result=read("result"),
        error=read("error"),
        finished_at=of("finished_at"),
    )
    secret_name, secret_key = secret.get("name"), secret.get("key")
    return (callback_id(uid), uid, namespace, name, kb_id, url, host_of(url), secret_name, secret_key, body)


def _columns(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _batches(uids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (uids[start : start + _ROWS] for start in range(0, len(uids), _ROWS))


def _told(record: asyncpg.Record) -> Transition | None:
    """Return the last event of a task that was just written."""
    if record["phase"] is None:
        return None
    return Transition(record["phase"], record["attempt"], record["queued_at"], record["reason"])


def _seen(values: Sequence[Any]) -> Seen:
    """Return what a row says of its task."""

    def of(name: str) -> Any:
        return values[_PLACE[name]]

    queue = of("queue")
    return Seen(
        phase=of("phase"),
        attempt=of("attempt"),
        created_at=of("created_at"),
        queued_at=of("queued_at") or of("created_at"),
        started_at=of("started_at"),
        finished_at=of("finished_at"),
        deleted_at=of("deleted_at"),
        attempts=_attempts(of("attempts")),
        reason=of("reason") or "",
        message=of("message"),
        waits_since=None if queue is None else _time(orjson.loads(queue).get("since")),
    )


def _attempts(text: str) -> list[Attempt]:
    """Read ``status.attempts``; what has no number is left out, and of two with the same one the last counts."""
    read = {
        number: Attempt(
            number, _text(one.get("job")) or "", _time(one.get("startedAt")), _time(one.get("finishedAt")), one.get("reason")
        )
        for one in orjson.loads(text)
        if (number := _small(one.get("number"))) is not None
    }
    return list(read.values())


def _error_of(attempt: Attempt, values: Sequence[Any]) -> str | None:
    """Return ``status.error`` if it is that of an attempt: of the last one, when it has failed."""
    last = attempt.number == values[_PLACE["attempt"]] and attempt.finished_at is not None
    error: str | None = values[_PLACE["error"]] if last else None
    return error


async def _committed(connection: "asyncpg.Connection[asyncpg.Record]", uid: str) -> Fence | None:
    """Return what a task has committed, and let nothing be committed until the transaction ends; None: nothing yet."""
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1::uuid::text, 0))", uid)
    row = await connection.fetchrow(
        "SELECT outcome, holder, created_at FROM task_results "
        "WHERE task_uid = $1 AND outcome->>'outcome' = 'Succeeded' ORDER BY attempt DESC LIMIT 1",
        uid,
    )
    # A batch has committed when all of its documents have ended; some alone keep nobody from canceling the others.
    committed = await connection.fetchval(
        "SELECT CASE WHEN EXISTS (SELECT FROM batches WHERE task_uid = $1) "
        "THEN NOT EXISTS (SELECT FROM batch_documents WHERE task_uid = $1 AND state = 'pending') "
        "ELSE EXISTS (SELECT FROM document_versions "
        "WHERE task_uid = $1 AND state IN ('published', 'superseded', 'unchanged')) "
        "OR EXISTS (SELECT FROM knowledge_base_deletions WHERE task_uid = $1) "
        "OR EXISTS (SELECT FROM generations WHERE task_uid = $1 AND switched_at IS NOT NULL) END",
        uid,
    )
    if row is None and not committed:
        return None
    stored = None if row is None else _stored(row)
    return Fence(state=FenceState.COMMITTED, outcome=None if stored is None else stored.outcome)


async def _release(connection: "asyncpg.Connection[asyncpg.Record]", uid: str, *, check: Callable[[], None]) -> Fence:
    async with connection.transaction():
        if (committed := await _committed(connection, uid)) is not None:
            return committed
        check()
        await connection.execute(
            "UPDATE document_versions SET epoch = epoch + 1, holder = '', updated_at = now() "
            "WHERE task_uid = $1 AND state = 'intent'",
            uid,
        )
        await connection.execute("UPDATE knowledge_base_leases SET epoch = epoch + 1, holder = '' WHERE task_uid = $1", uid)
    return Fence(state=FenceState.RAISED)


async def _raise_fence(
    connection: "asyncpg.Connection[asyncpg.Record]", uid: str, reason: str, *, check: Callable[[], None]
) -> Fence:
    async with connection.transaction():
        if (committed := await _committed(connection, uid)) is not None:
            return committed
        check()
        await _bar(connection, uid, reason)
    return Fence(state=FenceState.RAISED)


async def _bar(connection: "asyncpg.Connection[asyncpg.Record]", uid: str, reason: str) -> None:
    """Enter the fence and cancel all intents. The caller holds the task's advisory lock."""
    await connection.execute(
        "INSERT INTO task_fences (task_uid, reason) VALUES ($1, $2) ON CONFLICT DO NOTHING", uid, reason
    )
    await connection.execute(
        "UPDATE document_versions SET state = 'canceled', epoch = epoch + 1, updated_at = now() "
        "WHERE task_uid = $1 AND state = 'intent'",
        uid,
    )


async def _batch(connection: "asyncpg.Connection[asyncpg.Record]", uid: str) -> Batch:
    row = await connection.fetchrow(COUNTS, uid)
    if row is None or not row["total"]:
        return Batch()
    reasons = await connection.fetch(_FAILURES, uid)
    failures = tuple(f"{one['reason']} {one['documents']} ({one['path']}: {one['message']})" for one in reasons)
    return Batch(**{**row, "shards": tuple(row["shards"])}, failures=failures)


async def _settle_batch(
    connection: "asyncpg.Connection[asyncpg.Record]", uid: str, reason: str, message: str, *, check: Callable[[], None]
) -> Batch:
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1::uuid::text, 0))", uid)
        check()
        await _bar(connection, uid, reason)
        await connection.execute(_PUBLISHED_UNSAID, uid)
        await connection.execute(_GIVE_UP, uid, reason, message)
        return await _batch(connection, uid)


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
    ready: Mapping[str, Any] = next((one for one in status.get("conditions") or () if one.get("type") == "Ready"), {})
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
        _text(ready.get("reason")),
        _text(ready.get("message")) or None,
        _text(status.get("duplicateOf")),
        _time(metadata.get("creationTimestamp")) or now,
        _time(status.get("queuedAt")),
        _time(status.get("startedAt")),
        _time(status.get("finishedAt")),
        deleted_at,
        int(metadata.get("generation") or 0),
        int(metadata["resourceVersion"]),
        _traceparent(metadata.get("annotations")),
    )


def _traceparent(annotations: object) -> str | None:
    given = annotations.get(TRACEPARENT_ANNOTATION) if isinstance(annotations, Mapping) else None
    return given if isinstance(given, str) and trace_id(given) is not None else None


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
