"""PostgreSQL as the gateway uses it: lists and history as the operator has written them, and tickets. The only file of it
that speaks to PostgreSQL, beside the connection that listens (:mod:`task_gateway.listener`).

Nothing connects before it is needed: a gateway starts without its database, and accepts tasks without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import asyncpg

from task_contract.callbacks import REPLAY
from task_contract.models import Phase, Priority, TaskType
from task_contract.vectors import PARTS
from task_gateway.hub import Event, Filter
from task_gateway.listener import EVENT_COLUMNS
from task_gateway.models import Cursor

_CONNECTIONS: Final = 8
_CONNECT_TIMEOUT: Final = 5.0  # seconds
_COMMAND_TIMEOUT: Final = 10.0  # seconds

_COLUMNS: Final = (
    "uid, namespace, name, spec, phase, stage, progress, attempt, queued_at, started_at, finished_at, created_at, "
    "deleted_at, reason, message, queue, result, error, attempts, duplicate_of"
)


_KNOWLEDGE: Final = (
    "SELECT base.kb_id, base.generation, base.model_fingerprint, base.dimension, documents, chunks::bigint AS chunks, "
    "missing::bigint AS missing, extra::bigint AS extra, checked_at, intents, base.state, updated_at, "
    "(SELECT embedding_model FROM generations own WHERE own.namespace = $1 AND own.kb_id = base.kb_id "
    "AND own.generation = base.generation) AS embedding_model, "
    "kept.generation AS retained_generation, kept.model_fingerprint AS retained_model, kept.keep_until, "
    "filling.generation AS filling_generation, filling.model_fingerprint AS filling_model, "
    "filling.task_uid::text AS filling_task_uid FROM knowledge_base_states base "
    "LEFT JOIN generations kept ON kept.namespace = $1 AND kept.kb_id = base.kb_id AND kept.state = 'retained' "
    "LEFT JOIN generations filling ON filling.namespace = $1 AND filling.kb_id = base.kb_id AND filling.state = 'filling' "
    "WHERE base.namespace = $1"
)
"""Knowledge bases of a namespace, with the generations beside the one that serves."""


class DatabaseUnavailable(Exception):
    """PostgreSQL cannot be used at the moment."""


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tasks a list has. None: any."""

    kb_id: str | None = None
    task_type: TaskType | None = None
    phase: Phase | None = None
    priority: Priority | None = None
    created_after: datetime | None = None
    """Inclusive."""
    created_before: datetime | None = None
    """Exclusive."""


def page_statement(
    wanted: TaskFilter, *, scope: Sequence[str] | None, after: Cursor | None, limit: int
) -> tuple[str, list[Any]]:
    """Return the statement of a page of a list, and its values; the youngest tasks come first.

    Every namespace has a part of the index of its own: each gives its first rows, and of these the first ones are the page.
    Words that are enumerated stand in the statement: only so it is seen that an index of rare ones can serve.
    """
    values: list[Any] = []

    def value(one: Any) -> str:
        values.append(one)
        return f"${len(values)}"

    if scope is None:
        # Steps from one namespace of the index to the next: they are few, and the rows between them many.
        places = (
            "WITH RECURSIVE places AS ((SELECT namespace FROM tasks ORDER BY namespace LIMIT 1) UNION ALL "
            "SELECT (SELECT namespace FROM tasks WHERE namespace > places.namespace ORDER BY namespace LIMIT 1) "
            "FROM places WHERE places.namespace IS NOT NULL) "
        )
        source = "places"
    else:
        places, source = "", f"unnest({value(list(scope))}::text[]) AS places (namespace)"
    conditions = ["tasks.namespace = places.namespace"]
    for column, word in (("type", wanted.task_type), ("phase", wanted.phase), ("priority", wanted.priority)):
        if word is not None:
            conditions.append(f"{column} = '{word.value}'")
    if wanted.kb_id is not None:
        conditions.append(f"kb_id = {value(wanted.kb_id)}")
    if wanted.created_after is not None:
        conditions.append(f"created_at >= {value(wanted.created_after)}")
    if wanted.created_before is not None:
        conditions.append(f"created_at < {value(wanted.created_before)}")
    if after is not None:
        conditions.append(f"(created_at, uid) < ({value(after.created_at)}, {value(after.uid)})")
    order = f"ORDER BY created_at DESC, uid DESC LIMIT {value(limit)}"
    statement = (
        f"{places}SELECT found.* FROM {source} CROSS JOIN LATERAL (SELECT {_COLUMNS} FROM tasks "  # noqa: S608 - see above
        f"WHERE {' AND '.join(conditions)} {order}) AS found {order}"
    )
    return statement, values


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a task stands: the last event of it, and stage and percentage of its status."""

    event: Event
    stage: str | None
    progress: int | None


@dataclass(frozen=True, slots=True)
class Passed:
    """Events that have passed."""

    lowest: int
    """Of the numbers that are kept; 0 when there is none."""
    head: int
    """The highest number."""
    events: list[Event]


class Database:
    """The gateway's side of PostgreSQL. Every method raises :class:`DatabaseUnavailable`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None

    async def warm_up(self) -> None:
        """Prepare the pool; nothing is connected yet."""
        self._pool = asyncpg.create_pool(
            self._url,
            min_size=0,
            max_size=_CONNECTIONS,
            timeout=_CONNECT_TIMEOUT,
            command_timeout=_COMMAND_TIMEOUT,
            server_settings={"application_name": "processing-tasks-gateway"},
        )
        await self._pool  # with min_size 0 this connects to nothing

    async def aclose(self) -> None:
        """Close all connections."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None

    async def rows(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        """Return what a statement finds."""
        if self._pool is None:
            raise RuntimeError("the database is used before warm_up()")
        try:
            async with self._pool.acquire(timeout=_CONNECT_TIMEOUT) as connection:
                return await connection.fetch(statement, *values)
        except (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError) as error:
            raise DatabaseUnavailable(f"cannot ask PostgreSQL: {error!r}") from error
        except (
            asyncpg.UndefinedTableError,
            asyncpg.UndefinedColumnError,
            asyncpg.InvalidPasswordError,
            asyncpg.InvalidCatalogNameError,
            asyncpg.OperatorInterventionError,
            asyncpg.InsufficientResourcesError,
            asyncpg.InsufficientPrivilegeError,
        ) as error:
            raise DatabaseUnavailable(f"cannot ask PostgreSQL: {error}; was it migrated?") from error

    async def ping(self) -> None:
        """Ask for something small."""
        await self.rows("SELECT 1")

    # ---------------------------------------------------------------------------------------------------------- history

    async def task(self, namespace: str, name: str) -> asyncpg.Record | None:
        """Return the row of the youngest task of that name, whether it exists or not."""
        found = await self.rows(
            f"SELECT {_COLUMNS} FROM tasks WHERE namespace = $1 AND name = $2 ORDER BY created_at DESC LIMIT 1",  # noqa: S608 - names of ours; values are parameters
            namespace,
            name,
        )
        return found[0] if found else None

    async def page(
        self, wanted: TaskFilter, *, scope: Sequence[str] | None, after: Cursor | None, limit: int
    ) -> list[asyncpg.Record]:
        """Return a page of a list, of these namespaces or (None) of all; the youngest tasks come first."""
        if scope is not None and not scope:
            return []
        statement, values = page_statement(wanted, scope=scope, after=after, limit=limit)
        return await self.rows(statement, *values)

    async def events(self, uid: str, *, after: int, limit: int) -> list[asyncpg.Record]:
        """Return transitions of a task after a number, in their order."""
        return await self.rows(
            "SELECT number, task_uid, namespace, name, kb_id, type, phase, attempt, reason, message, at FROM task_events "
            "WHERE task_uid = $1 AND number > $2 ORDER BY number LIMIT $3",
            uid,
            after,
            limit,
        )

    async def batch_documents(self, uid: str, *, state: str | None, after: int, limit: int) -> list[asyncpg.Record]:
        """Return documents of a batch after a number, in their order."""
        return await self.rows(
            "SELECT ordinal AS number, file_path, document_id, state, reason, message, version, chunks, attempt, updated_at "
            "FROM batch_documents WHERE task_uid = $1 AND ordinal > $2 AND state = coalesce($3, state) "
            "ORDER BY ordinal LIMIT $4",
            uid,
            after,
            state,
            limit,
        )

    async def kept_log(self, uid: str, *, attempt: int) -> str | None:
        """Return the last lines of the log of an attempt that failed."""
        found = await self.rows(
            "SELECT error->>'log' AS log FROM attempts WHERE task_uid = $1 AND number = $2", uid, attempt
        )
        return found[0]["log"] if found else None

    async def vectors(self, uid: str, *, first: int) -> asyncpg.Record | None:
        """Return the part of a task's vectors that begins at one, or after it; None: there is none."""
        found = await self.rows(PARTS, uid, first)
        return found[0] if found else None

    # -------------------------------------------------------------------------------------------------------- callbacks

    async def callbacks(
        self, state: str, *, scope: Sequence[str] | None, after: Cursor | None, limit: int
    ) -> list[asyncpg.Record]:
        """Return callbacks in a state, of these namespaces or (None) of all; the youngest come first."""
        return await self.rows(
            "SELECT id, task_uid, namespace, name, kb_id, host, state, attempts, created_at, last_attempt_at, finished_at, "
            "CASE WHEN state = 'pending' THEN next_at END AS next_at, status_code, error FROM callbacks "
            "WHERE state = $1 AND ($2::text[] IS NULL OR namespace = ANY($2)) "
            "AND ($3::timestamptz IS NULL OR (created_at, task_uid) < ($3, $4::uuid)) "
            "ORDER BY created_at DESC, task_uid DESC LIMIT $5",
            state,
            None if scope is None else list(scope),
            None if after is None else after.created_at,
            None if after is None else after.uid,
            limit,
        )

    async def replay(self, namespace: str, name: str) -> int:
        """Have the callback of a task sent again, whatever has become of it; return how many there were."""
        found = await self.rows(REPLAY, None, namespace, [name])
        return int(found[0]["count"])

    # ---------------------------------------------------------------------------------------------------------- tickets

    async def put_ticket(self, digest: bytes, caller: str, *, expires_at: datetime) -> None:
        """Keep a ticket; those that have expired go at the same time."""
        await self.rows(
            "WITH gone AS (DELETE FROM gateway_tickets WHERE expires_at < now()) "
            "INSERT INTO gateway_tickets (digest, caller, expires_at) VALUES ($1, $2, $3)",
            digest,
            caller,
            expires_at,
        )

    async def take_ticket(self, digest: bytes) -> str | None:
        """Return the caller of a ticket and forget it; None for one that is used, or too old."""
        found = await self.rows(
            "DELETE FROM gateway_tickets WHERE digest = $1 RETURNING caller, expires_at > now() AS valid", digest
        )
        return str(found[0]["caller"]) if found and found[0]["valid"] else None

    # ------------------------------------------------------------------------------------------------------------- live

    async def standing(self, wanted: Filter, *, limit: int) -> tuple[int, list[Standing]]:
        """Return the highest number of an event and, of the same moment, where the tasks of a filter stand.

        Those are the unfinished ones, the youngest first; where tasks and namespaces are named, the youngest of each name,
        ended or not.
        """
        clauses, values = _conditions(wanted, table="tasks", first=2)
        order, distinct = "tasks.created_at DESC, tasks.uid DESC", ""
        if wanted.task_ids and wanted.namespaces is not None:
            distinct, order = "DISTINCT ON (tasks.namespace, tasks.name)", f"tasks.namespace, tasks.name, {order}"
        else:
            clauses += ["tasks.finished_at IS NULL", "tasks.deleted_at IS NULL"]
        rows = await self.rows(
            "SELECT edge.head, found.* FROM (SELECT coalesce(max(number), 0) AS head FROM task_events) AS edge "  # noqa: S608 - names of ours; values are parameters
            f"LEFT JOIN LATERAL (SELECT {distinct} coalesce(last.number, 0) AS number, uid::text AS uid, namespace, name, "
            "kb_id, type, coalesce(last.phase, tasks.phase) AS phase, coalesce(last.attempt, tasks.attempt) AS attempt, "
            "coalesce(last.reason, tasks.reason, tasks.phase) AS reason, coalesce(last.message, tasks.message) AS message, "
            "coalesce(last.at, tasks.created_at) AS at, stage, progress FROM tasks LEFT JOIN LATERAL (SELECT number, phase, "
            "attempt, reason, message, at FROM task_events WHERE task_uid = tasks.uid ORDER BY number DESC LIMIT 1) AS last "
            f"ON true WHERE {' AND '.join(clauses)} ORDER BY {order} LIMIT $1) AS found ON true",
            limit,
            *values,
        )
        found = [Standing(Event(*row[1:12]), row["stage"], row["progress"]) for row in rows if row["uid"] is not None]
        return rows[0]["head"], found

    async def events_between(self, wanted: Filter, *, after: int, upto: int, limit: int) -> Passed:
        """Return what events there are at all, and those of a filter with numbers above one and up to another."""
        clauses, values = _conditions(wanted, table="task_events", first=4)
        rows = await self.rows(
            "SELECT edge.lowest, edge.head, found.* FROM (SELECT coalesce(min(number), 0) AS lowest, "  # noqa: S608 - names of ours; values are parameters
            f"coalesce(max(number), 0) AS head FROM task_events) AS edge LEFT JOIN LATERAL (SELECT {EVENT_COLUMNS} "
            f"FROM task_events WHERE {' AND '.join(['number > $1', 'number <= $2', *clauses])} ORDER BY number LIMIT $3) "
            "AS found ON true ORDER BY found.number",
            after,
            upto,
            limit,
            *values,
        )
        events = [Event(*row[2:]) for row in rows if row["number"] is not None]
        return Passed(lowest=rows[0]["lowest"], head=rows[0]["head"], events=events)

    # -------------------------------------------------------------------------------------------------------- knowledge

    async def knowledge_base(self, namespace: str, kb_id: str) -> asyncpg.Record | None:
        """Return the state of a knowledge base; None for one in which nothing was ever published."""
        found = await self.rows(f"{_KNOWLEDGE} AND base.kb_id = $2", namespace, kb_id)
        return found[0] if found else None

    async def knowledge_bases(self, namespace: str, *, after: str | None, limit: int) -> list[asyncpg.Record]:
        """Return the states of knowledge bases, in the order of their ids, from the one after ``after``."""
        return await self.rows(
            f"{_KNOWLEDGE} AND base.kb_id > $2 ORDER BY base.kb_id LIMIT $3", namespace, after or "", limit
        )

    async def documents(self, namespace: str, kb_id: str, *, after: str | None, limit: int) -> list[asyncpg.Record]:
        """Return documents that readers see, in the order of their ids, from the one after ``after``."""
        beyond, values = ("AND document_id > $4", [after]) if after is not None else ("", [])
        return await self.rows(
            "SELECT document_id, published_version, chunk_count, content_hash, published_task_uid::text AS task_uid, "  # noqa: S608 - names of ours; values are parameters
            "missing, extra, checked_at, updated_at FROM documents WHERE namespace = $1 AND kb_id = $2 "
            f"AND published_version IS NOT NULL AND chunk_count > 0 {beyond} ORDER BY document_id LIMIT $3",
            namespace,
            kb_id,
            limit,
            *values,
        )

    async def costs(
        self, scope: Sequence[str] | None, *, kb_id: str | None, task_id: str | None, since: datetime, limit: int
    ) -> list[asyncpg.Record]:
        """Return what was used since a moment: first the sum, then by knowledge base, the most processor time first."""
        where, values = _within(scope, first=5)
        return await self.rows(
            "SELECT namespace, kb_id, count(DISTINCT task_uid) AS tasks, count(*) AS processes, "  # noqa: S608 - names of ours; values are parameters
            "coalesce(sum(seconds), 0)::float8 AS seconds, coalesce(sum(cpu_seconds), 0)::float8 AS cpu_seconds, "
            "coalesce(sum(memory_byte_seconds), 0)::float8 AS memory_byte_seconds, "
            "coalesce(sum(tokens), 0)::bigint AS tokens, coalesce(sum(texts), 0)::bigint AS texts "
            "FROM task_usage WHERE ended_at >= $1 AND ($2::text IS NULL OR kb_id = $2) AND ($3::text IS NULL OR task_uid IN "
            f"(SELECT uid FROM tasks WHERE name = $3 AND tasks.namespace = task_usage.namespace)) {where} "
            "GROUP BY GROUPING SETS ((), (namespace, kb_id)) ORDER BY grouping(namespace) DESC, 6 DESC, 1, 2 LIMIT $4 + 1",
            since,
            kb_id,
            task_id,
            limit,
            *values,
        )

    # ------------------------------------------------------------------------------------------------------- statistics

    async def unfinished(self, scope: Sequence[str] | None) -> list[asyncpg.Record]:
        """Return how many unfinished tasks there are by phase and priority, and since when the oldest one of each waits."""
        where, values = _within(scope)
        return await self.rows(
            "SELECT phase, priority, count(*) AS tasks, "  # noqa: S608 - names of ours; values are parameters
            "extract(epoch FROM now() - min(coalesce(queued_at, created_at)))::float8 AS oldest FROM tasks "
            f"WHERE finished_at IS NULL AND deleted_at IS NULL {where} GROUP BY phase, priority",
            *values,
        )

    async def ended(self, scope: Sequence[str] | None, *, seconds: Sequence[int]) -> list[asyncpg.Record]:
        """Return for each of these times until now how many tasks have ended how, and how long successful ones ran."""
        where, values = _within(scope, first=2)
        return await self.rows(
            "SELECT period.seconds, count(*) FILTER (WHERE phase = 'Completed') AS completed, "  # noqa: S608 - names of ours; values are parameters
            "count(*) FILTER (WHERE phase = 'Failed') AS failed, count(*) FILTER (WHERE phase = 'Canceled') AS canceled, "
            "avg(extract(epoch FROM finished_at - started_at)) FILTER (WHERE phase = 'Completed')::float8 AS ran "
            "FROM unnest($1::int[]) AS period (seconds) LEFT JOIN tasks "
            f"ON finished_at > now() - make_interval(secs => period.seconds) {where} GROUP BY period.seconds ORDER BY 1",
            list(seconds),
            *values,
        )


def _within(scope: Sequence[str] | None, *, first: int = 1) -> tuple[str, list[list[str]]]:
    """Return the condition that rows are in some namespaces, and its value; None: in any."""
    return ("", []) if scope is None else (f"AND namespace = ANY(${first}::text[])", [list(scope)])


def _conditions(wanted: Filter, *, table: str, first: int) -> tuple[list[str], list[list[str]]]:
    """Return a filter as conditions, with the values of their parameters, which count from ``first``."""
    given = {"namespace": wanted.namespaces, "kb_id": wanted.kb_ids or None, "name": wanted.task_ids or None}
    asked = {column: sorted(values) for column, values in given.items() if values is not None}
    clauses = [f"{table}.{column} = ANY(${place}::text[])" for place, column in enumerate(asked, first)]
    return clauses, list(asked.values())
