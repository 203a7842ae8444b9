"""A table of many finished tasks, as years of use leave it."""

import asyncpg

from task_contract.models import Phase, Priority, TaskType

RARE = 997
"""One in so many tasks is of each rare kind."""

_FILL = """
INSERT INTO tasks (uid, namespace, name, kb_id, type, priority, phase, spec, attempt, created_at, queued_at, started_at,
                   finished_at, deleted_at, generation, resource_version, told_version)
SELECT gen_random_uuid(), 'tenant-' || number % 4, 'task-' || number, 'kb-' || number % 500,
       CASE WHEN number % {rare} = 0 THEN 'health_check' ELSE 'document_processing' END,
       CASE WHEN number % {rare} = 1 THEN 'low' WHEN number % {rare} = 2 THEN 'high' ELSE 'normal' END,
       CASE WHEN number % {rare} = 3 THEN 'Canceled' WHEN number % 50 = 4 THEN 'Failed' ELSE 'Completed' END,
       '{{"type": "document_processing", "kbId": "kb-1", "payload": {{"filePath": "/data/handbook.pdf"}}}}',
       1, at, at, at, at, at + interval '1 day', 1, number, number
  FROM generate_series(1, $1::int) AS number
 CROSS JOIN LATERAL (SELECT timestamptz '2024-01-01' + number / 20 * interval '1 second' AS at) AS times
"""


async def fill(connection: "asyncpg.Connection[asyncpg.Record]", count: int) -> None:
    """Write so many tasks of four namespaces and 500 knowledge bases, twenty a second, and have them counted."""
    assert {Phase.CANCELED, Phase.FAILED, Phase.COMPLETED} == {"Canceled", "Failed", "Completed"}
    assert {TaskType.HEALTH_CHECK, Priority.LOW} == {"health_check", "low"}
    await connection.execute(_FILL.format(rare=RARE), count, timeout=600)
    await connection.execute("VACUUM ANALYZE tasks", timeout=600)
