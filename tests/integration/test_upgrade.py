"""From each release to the present state, on a real API server and real stores: what it stored is read and goes on."""

import asyncio
import contextlib
import copy
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
import pytest
import yaml

from devstack import Endpoints
from devstack.stores import postgres
from job_runner.elasticsearch import ElasticsearchIndex
from job_runner.index import Generation, Row, Stale
from job_runner.milvus import MilvusIndex
from task_contract.crd import custom_resource_definition
from task_contract.migrations import migrations
from task_contract.models import ProcessingTask, TaskType
from task_operator.schema import migrate
from tests.support.frozen_stores import make_collection, make_index, write_texts, write_vectors
from tests.support.operator_lab import MERGE, Kube, Place, until
from tests.support.releases import RELEASES, ROOT, Release
from tests.support.resources import TaskResources

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300), pytest.mark.alone]

RELEASED = pytest.mark.parametrize("release", RELEASES, ids=str)


# ------------------------------------------------------------------------------------------------------------ the CRD


CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"
APPLY = "application/apply-patch+yaml"
MARK = "as it was released"


async def _serve(place: Place, crd: Mapping[str, Any]) -> None:
    """Have the API server serve a CRD, and wait until it does: tables then describe its first column as it does.

    In between the server has taken down the old storage and answers 429.
    """
    path = f"{CRD}/{crd['metadata']['name']}"
    await place.kube.do("PATCH", path, crd, content_type=APPLY, fieldManager="kubectl", force="true")
    wanted = crd["spec"]["versions"][0]["additionalPrinterColumns"][0].get("description", "")

    async def served() -> bool:
        status, table = await place.kube.ask("GET", place.path("processingtasks"), accept=TABLE)
        if status != 200:
            return False
        found: str = table["columnDefinitions"][1]["description"]
        return found == wanted if wanted else MARK not in found

    await until("the CRD is served", served, seconds=20)


def _marked(crd: Mapping[str, Any]) -> dict[str, Any]:
    """Return a CRD whose tables tell it from every other one, the same release's included."""
    marked = copy.deepcopy(dict(crd))
    marked["spec"]["versions"][0]["additionalPrinterColumns"][0]["description"] = f"{MARK} {uuid.uuid4().hex}"
    return marked


@contextlib.asynccontextmanager
async def _served(place: Place, crd: Mapping[str, Any]) -> AsyncIterator[None]:
    """Have another CRD served for a while, then the present one again."""
    try:
        await _serve(place, _marked(crd))
        yield
    finally:
        await _serve(place, custom_resource_definition())


async def _create(place: Place, name: str, task: Mapping[str, Any], **options: str) -> None:
    body = {"apiVersion": task["apiVersion"], "kind": task["kind"], "metadata": {"name": name}, "spec": task["spec"]}
    await place.kube.do("POST", place.path("processingtasks"), body, fieldValidation="Strict", **options)


async def _patch(place: Place, name: str, **patch: Any) -> None:
    """Edit a task as people do, or its status as the operator does."""
    path = place.path("processingtasks", name) + ("/status" if "status" in patch else "")
    await place.kube.do("PATCH", path, patch, content_type=MERGE)


def _examples(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        for number, task in enumerate(yaml.safe_load_all(path.read_text())):
            if task["kind"] == "ProcessingTask":
                found[f"{path.stem}-{number}"] = task
    return found


@RELEASED
async def test_what_a_release_stored_is_read_and_edited_after_the_upgrade_and_after_a_rollback(
    cluster: Endpoints, kube: Kube, namespace: str, release: Release
) -> None:
    place = Place(kube, namespace)
    client = TaskResources(cluster, namespace)
    stored, examples = release.stored, _examples(release.path / "examples")
    async with _served(place, release.crd):
        for name, task in stored.items():
            await _create(place, name, task)
            await _patch(place, name, status=task["status"])
        for name, task in examples.items():
            await _create(place, f"old-{name}", task)

    for name, task in stored.items():
        raw = await place.task(name)
        assert raw is not None
        assert (raw["spec"], raw["status"]) == (task["spec"], task["status"]), f"{name}: not as it was stored"
        expected, found = ProcessingTask.model_validate(task), client.get(name)
        assert (found.spec, found.status) == (expected.spec, expected.status), name
        await _patch(place, name, metadata={"labels": {"team": "a"}})
        await _patch(place, name, spec={"suspend": True})
        await _patch(place, name, status={"observedGeneration": 2})
    for name, task in examples.items():
        assert client.get(f"old-{name}").spec == ProcessingTask.model_validate(task).spec
        await _patch(place, f"old-{name}", metadata={"labels": {"team": "a"}})
        await _create(place, f"again-{name}", task)
    present = _examples(ROOT / "manifests/examples")
    for name, task in present.items():
        await _create(place, f"new-{name}", task)

    async with _served(place, release.crd):
        everything = [task["metadata"]["name"] for task in await place.objects("processingtasks")]
        assert len(everything) == len(stored) + 2 * len(examples) + len(present)
        for name in everything:
            client.get(name)
            await _patch(place, name, metadata={"labels": {"team": "b"}})
            spec = client.get(name).spec
            if str(release) == "0.1.0" and (spec.callback is not None or spec.type not in OF_THE_FIRST):
                # Its rules allow no such task and so no edit of one; its operator ends them as InvalidTask.
                await _patch(place, name, status={"phase": "Failed"})
                continue
            await _patch(place, name, spec={"cancel": True})


# --------------------------------------------------------------------------------------------------------- PostgreSQL


@pytest.fixture
async def database(stores: Endpoints) -> AsyncIterator[str]:
    """The address of a database without tables."""
    name = f"upgrade_{uuid.uuid4().hex[:10]}"
    yield await asyncio.to_thread(postgres.create_database, name)
    await asyncio.to_thread(postgres.drop_database, name)


@pytest.fixture
async def sql(database: str) -> "AsyncIterator[asyncpg.Connection[Any]]":
    """A connection to it."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


async def _insert(sql: "asyncpg.Connection[Any]", rows: Mapping[str, list[dict[str, Any]]]) -> None:
    """Insert rows as the release wrote them: with its columns, and no word of others."""
    for table, found in rows.items():
        columns = ", ".join(found[0])
        await sql.execute(
            # As in a dump: also numbers that the table itself counts.
            f"INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE "
            f"SELECT {columns} FROM json_populate_recordset(NULL::{table}, $1)",
            json.dumps(found),
        )


async def _rows(sql: "asyncpg.Connection[Any]", like: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return all rows of the tables in LIKE, with the columns that they have there."""
    present = {}
    for table, found in like.items():
        columns = ", ".join(found[0])
        records = await sql.fetch(f"SELECT row_to_json(one)::text AS row FROM (SELECT {columns} FROM {table}) AS one")
        present[table] = sorted((json.loads(record["row"]) for record in records), key=str)
    return present


async def _as_released(sql: "asyncpg.Connection[Any]", release: Release) -> None:
    """Make the tables of a release, with the rows that it wrote."""
    await sql.execute(
        "CREATE TABLE schema_migrations (version integer PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    for number, text in enumerate(release.migrations.values(), start=1):
        await sql.execute(text)
        await sql.execute("INSERT INTO schema_migrations (version) VALUES ($1)", number)
    await _insert(sql, release.rows)


async def _lost(sql: "asyncpg.Connection[Any]", release: Release) -> list[str]:
    """Return what code of a release can no longer do: it goes on running while its successor has migrated already."""
    lost = []
    for statement in release.statements:
        try:
            if ";" not in statement:  # BEGIN; and what the driver sends to reset a connection name no table
                await sql.prepare(statement)
        except asyncpg.PostgresError as error:
            lost.append(f"{statement[:80]}: {error}")
    transaction = sql.transaction()
    await transaction.start()
    try:
        for table in reversed(release.rows):
            await sql.execute(f"DELETE FROM {table}")
        await _insert(sql, release.rows)
    except asyncpg.PostgresError as error:
        lost.append(f"writing its rows: {error}")
    finally:
        await transaction.rollback()
    return lost


@RELEASED
async def test_the_tables_of_a_release_are_migrated_with_their_rows_and_its_code_goes_on(
    sql: "asyncpg.Connection[Any]", database: str, release: Release
) -> None:
    await _as_released(sql, release)
    rows = release.rows
    before = await _rows(sql, rows)
    assert {table: len(found) for table, found in before.items()} == {table: len(found) for table, found in rows.items()}
    assert await migrate(database) == len(migrations()) - len(release.migrations)
    assert await _rows(sql, rows) == before
    assert await _lost(sql, release) == []
    assert await migrate(database) == 0
    # After a rollback the code of 0.1.0, which keeps a list of its own, must find nothing to do.
    assert await sql.fetchval("SELECT max(version) FROM schema_migrations") == len(migrations())


async def test_two_that_migrate_at_once_apply_each_migration_once(database: str) -> None:
    applied = await asyncio.gather(*(migrate(database) for _ in range(3)))
    assert sorted(applied) == [0, 0, len(migrations())]


async def test_a_migration_that_fails_leaves_the_tables_as_they_were(sql: "asyncpg.Connection[Any]", database: str) -> None:
    await sql.execute("CREATE VIEW task_events AS SELECT 1")  # in the way of the last one
    with pytest.raises(asyncpg.PostgresError, match="task_events"):
        await migrate(database)
    assert await sql.fetchval("SELECT to_regclass('tasks') IS NULL AND to_regclass('alembic_version') IS NULL")
    await sql.execute("DROP VIEW task_events")
    assert await migrate(database) == len(migrations())


@pytest.mark.parametrize(
    ("migration", "lost"),
    [
        ("ALTER TABLE tasks RENAME COLUMN job TO job_name", 'column "job"'),
        ("ALTER TABLE document_versions DROP COLUMN epoch CASCADE", 'column "epoch"'),
        ("DROP TABLE task_fences", 'relation "task_fences" does not exist'),
        ("DELETE FROM documents; ALTER TABLE documents ADD COLUMN owner text NOT NULL", 'column "owner"'),
        ("ALTER TABLE tasks ALTER COLUMN kb_id SET NOT NULL", 'column "kb_id"'),
    ],
)
async def test_a_migration_under_which_the_code_of_a_release_fails_is_found(
    sql: "asyncpg.Connection[Any]", migration: str, lost: str
) -> None:
    release = RELEASES[-1]
    await _as_released(sql, release)
    await sql.execute("DELETE FROM tasks")  # or the migration itself would be refused, which a large table finds too late
    await sql.execute(migration)
    found = await _lost(sql, release)
    assert any(lost in one for one in found), found


# ----------------------------------------------------------------------------------------------------------- the stores


def _kind(value: object) -> type:
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def _kinds(row: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, type]:
    """Return the type of each column that another row has too."""
    return {name: _kind(value) for name, value in row.items() if name in like}


OF_THE_FIRST = {TaskType.DOCUMENT_PROCESSING, TaskType.HEALTH_CHECK}
"""Types of tasks that release 0.1.0 carries out."""


def _row(ordinal: int, **columns: Any) -> Row:
    known: dict[str, Any] = {name: "0" if column.type is str else 0 for name, column in Row.__dataclass_fields__.items()}
    return Row(
        **{**known, "metadata": {"team": "a"}, "keywords": ("a",), "id": f"{ordinal:032x}", "ordinal": ordinal, **columns}
    )


@RELEASED
@pytest.mark.parametrize("store", ["Milvus", "Elasticsearch"])
@pytest.mark.parametrize("made_by", ["the release", "today's code"])
async def test_a_knowledge_base_serves_the_release_that_made_it_and_the_other(
    stores: Endpoints, release: Release, store: str, made_by: str
) -> None:
    """Pods of both work on it while an upgrade goes on, and after a rollback: each reads and replaces rows of the other."""
    frozen, urls = release.stores[store], stores.host_urls
    rows = frozen["rows"]
    document, version = rows[0]["document_id"], rows[0]["version"]
    where = Generation("upgrade", f"kb-{uuid.uuid4().hex[:12]}", 1)
    dimension = len(release.stores["Milvus"]["rows"][0]["embedding"])
    vector = np.full((2, dimension), dimension**-0.5, dtype=np.float32)
    index: Any
    if store == "Milvus":
        index = MilvusIndex(where, url=urls["TASKS_MILVUS_URL"], token=urls.get("TASKS_MILVUS_TOKEN"), dimension=dimension)
    else:
        index = ElasticsearchIndex(
            where, url=urls["TASKS_ELASTICSEARCH_URL"], api_key=urls.get("TASKS_ELASTICSEARCH_API_KEY")
        )
    try:
        if made_by == "the release":
            await (make_collection(index, frozen) if store == "Milvus" else make_index(index, frozen))
        await index.ensure()
        if made_by != "the release":
            if store == "Milvus":
                await asyncio.to_thread(write_vectors, index, frozen)
            else:
                await write_texts(index, frozen)
        assert await index.stored(document, version) == {row["id"]: row["content_hash"] for row in rows}
        if store == "Milvus":
            hashes = {row["text_hash"] for row in rows}
            assert (await index.vectors(document, version, hashes)).keys() == hashes, "they are not computed anew"
            [hit] = await index.search(np.array(rows[1]["embedding"], dtype=np.float32), limit=1)
        else:
            hit = (await index.search(rows[1]["text"], limit=1))[0]
        assert (hit.id, hit.text, hit.heading_path) == (rows[1]["id"], rows[1]["text"], rows[1]["heading_path"])

        new = [_row(ordinal, document_id=document, version=version + 1, chunk_count=2) for ordinal in range(2)]
        await (index.write(new, vector) if store == "Milvus" else index.write(new))
        scanned = {row.id: row async for page in index.scan() for row in page}
        assert scanned.keys() == {*(row["id"] for row in rows), *(row.id for row in new)}
        assert {scanned[row["id"]].task_uid for row in rows} == {rows[0]["task_uid"]}
        # The release's code reads columns by their names, of rows that today's has written.
        written = (await _stored_rows(index, document))[new[0].id]
        assert written.keys() >= rows[0].keys()
        assert _kinds(written, rows[0]) == _kinds(rows[0], rows[0])

        assert await index.remove([Stale(document, up_to=version)]) == len(rows)
        assert (await index.stored(document, version + 1)).keys() == {row.id for row in new}
        if store == "Milvus":
            await asyncio.to_thread(write_vectors, index, frozen)  # a pod of the release, late
        else:
            await write_texts(index, frozen)
        assert len(await index.stored(document, version)) == len(rows)
    finally:
        await index.drop()
        await index.aclose()


async def _stored_rows(index: MilvusIndex | ElasticsearchIndex, document: str) -> dict[str, dict[str, Any]]:
    """Return id → row as the store has it."""
    if isinstance(index, MilvusIndex):
        found = await index._run("read", index._query, f'document_id == "{document}"', ["*"])
        return {row["id"]: dict(row) for row in found}
    query = {"term": {"document_id": document}}
    hits = (await index._client.search(index=index._name, query=query, size=100))["hits"]["hits"]
    return {hit["_id"]: hit["_source"] | {"id": hit["_id"]} for hit in hits}
