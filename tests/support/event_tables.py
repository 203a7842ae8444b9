"""Tasks and their events in real tables, written as the operator does: one writer at a time, one transaction a batch."""

import uuid
from collections.abc import Sequence
from typing import Any

import asyncpg

from task_gateway.hub import Event
from task_operator.projection import _ALONE

_TASK = """
INSERT INTO tasks (uid, namespace, name, kb_id, type, priority, phase, attempt, spec, created_at, queued_at, finished_at,
                   generation, resource_version, told_version, reason)
SELECT $1::uuid, $2, $3, $4, $5, 'normal', $6::text, $7, jsonb_build_object('type', $5::text, 'kbId', $4::text), $8, $8,
       CASE WHEN $6::text IN ('Completed', 'Failed', 'Canceled') THEN now() END, 1, 1, 1, $9
    ON CONFLICT (uid) DO UPDATE SET phase = excluded.phase, finished_at = excluded.finished_at, attempt = excluded.attempt
"""
_EVENT = """
INSERT INTO task_events (task_uid, namespace, name, kb_id, type, phase, attempt, reason, message, queued_at, at)
VALUES ($1::uuid, $2, $3, $4, $5, $6, $7, $8, $9, $10, $10) RETURNING number
"""


async def tell(connection: "asyncpg.Connection[Any]", events: Sequence[Event]) -> list[int]:
    """Write events, with the rows of their tasks, and say so; return their numbers, which are not those given."""
    numbers: list[int] = []
    async with connection.transaction():
        await connection.execute(_ALONE)
        for one in events:
            phase = "Processing" if one.phase == "Deleted" else one.phase
            task = (one.uid, one.namespace, one.name, one.kb_id, one.type, phase, one.attempt, one.at, one.reason)
            await connection.execute(_TASK, *task)
            numbers.append(
                await connection.fetchval(
                    _EVENT,
                    *(uuid.UUID(one.uid), one.namespace, one.name, one.kb_id, one.type, one.phase, one.attempt),
                    *(one.reason, one.message, one.at),
                )
            )
        await connection.execute("SELECT pg_notify('task_events', $1::text)", str(numbers[-1]))
    return numbers
