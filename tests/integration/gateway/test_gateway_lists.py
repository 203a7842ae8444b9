"""Lists among many tasks: every filter finds its page through an index, and pages have each task once."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from devstack import Endpoints
from task_contract.models import Phase, Priority, TaskType
from task_gateway.database import Database, TaskFilter, page_statement
from task_gateway.models import Cursor
from tests.support.databases import fresh_database
from tests.support.many_tasks import fill

pytestmark = pytest.mark.integration

COUNT = 60_000
MOST_BUFFERS = 600
"""Pages of 8 KB that a list of 51 tasks may touch: one for each row in each namespace, and the way down the indices."""


@pytest.fixture(scope="module")
def many(stores: Endpoints) -> Iterator[str]:
    """URL of a database with many tasks."""

    async def prepare(url: str) -> None:
        connection = await asyncpg.connect(url)
        await fill(connection, COUNT)
        await connection.close()

    with fresh_database(stores.host_urls["TASKS_POSTGRES_URL"], prefix="lists") as url:
        asyncio.run(prepare(url))
        yield url


@pytest.fixture
async def database(many: str) -> AsyncIterator[Database]:
    database = Database(many)
    await database.warm_up()
    yield database
    await database.aclose()


FILTERS = {
    "none": TaskFilter(),
    "a knowledge base": TaskFilter(kb_id="kb-40"),
    "no such knowledge base": TaskFilter(kb_id="kb-none"),
    "what most are": TaskFilter(phase=Phase.COMPLETED, priority=Priority.NORMAL, task_type=TaskType.DOCUMENT_PROCESSING),
    "failed": TaskFilter(phase=Phase.FAILED),
    "canceled, which are rare": TaskFilter(phase=Phase.CANCELED),
    "queued, of which there are none": TaskFilter(phase=Phase.QUEUED),
    "a rare type": TaskFilter(task_type=TaskType.HEALTH_CHECK),
    "a type of which there are none": TaskFilter(task_type=TaskType.VECTOR_STORAGE),
    "low": TaskFilter(priority=Priority.LOW),
    "failed in a knowledge base": TaskFilter(kb_id="kb-4", phase=Phase.FAILED),
    "a time": TaskFilter(
        created_after=datetime(2024, 1, 1, 0, 10, tzinfo=UTC), created_before=datetime(2024, 1, 1, 0, 20, tzinfo=UTC)
    ),
}
SCOPES: dict[str, list[str] | None] = {"one": ["tenant-0"], "two": ["tenant-0", "tenant-3"], "all": None}


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
@pytest.mark.parametrize("wanted", FILTERS.values(), ids=FILTERS)
async def test_a_page_is_found_through_an_index(database: Database, wanted: TaskFilter, scope: list[str] | None) -> None:
    first, values = page_statement(wanted, scope=scope, after=None, limit=51)
    rows = await database.rows(first, *values)
    after = Cursor(created_at=rows[25]["created_at"], uid=rows[25]["uid"]) if len(rows) > 25 else None
    for position in {None, after}:
        statement, values = page_statement(wanted, scope=scope, after=position, limit=51)
        answer = await database.rows(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", *values)
        plan = json.loads(answer[0][0])[0]["Plan"]
        assert "Seq Scan" not in json.dumps(plan), json.dumps(plan, indent=1)
        touched = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
        assert touched <= MOST_BUFFERS, f"{touched} pages: {json.dumps(plan, indent=1)}"


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
@pytest.mark.parametrize("name", ["canceled, which are rare", "low", "a knowledge base", "a rare type", "a time"])
async def test_pages_have_each_task_once_in_their_order(database: Database, name: str, scope: list[str] | None) -> None:
    wanted = FILTERS[name]
    found: list[Any] = []
    after: Cursor | None = None
    while rows := await database.page(wanted, scope=scope, after=after, limit=7):
        found += rows
        after = Cursor.parse(Cursor(created_at=rows[-1]["created_at"], uid=rows[-1]["uid"]).text())
        if len(found) > 300:
            break
    keys = [(row["created_at"], row["uid"]) for row in found]
    assert keys == sorted(keys, reverse=True)
    assert len(set(keys)) == len(keys)
    column, value = {
        "canceled, which are rare": ("phase", "Canceled"),
        "low": ("priority", "low"),
        "a knowledge base": ("kb_id", "kb-40"),
        "a rare type": ("type", "health_check"),
        "a time": ("name", None),
    }[name]
    condition = f"{column} = $1" if value else "created_at >= '2024-01-01 00:10Z' AND created_at < '2024-01-01 00:20Z'"
    place = "$2" if value else "$1"
    everything = await database.rows(
        f"SELECT uid FROM tasks WHERE {condition} AND (namespace = ANY({place}) OR {place} IS NULL) "
        "ORDER BY created_at DESC, uid DESC LIMIT 301",
        *([value] if value else []),
        scope,
    )
    assert [row["uid"] for row in found][:301] == [row["uid"] for row in everything][: len(found)]
    assert everything
    if scope is not None:
        assert {row["namespace"] for row in found} <= set(scope)
