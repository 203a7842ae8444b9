"""The stores of the devstack as the product meets them: its own clients, real servers, right and wrong passwords."""

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import psutil
import pytest
from elasticsearch import AsyncElasticsearch, AuthenticationException
from pymilvus import MilvusClient
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError

from devstack import Endpoints, network
from devstack import stores as launcher
from devstack.process import find, running, wait_until
from devstack.progress import DevstackError
from devstack.stores import milvus, milvus_lite

pytestmark = [pytest.mark.integration, pytest.mark.alone]

VECTOR = [0.1, 0.2, 0.3, 0.4]


@pytest.fixture(params=["127.0.0.1", network.ADDRESS], ids=["loopback", "bridge"])
def urls(request: pytest.FixtureRequest, stores: Endpoints) -> dict[str, str]:
    """The stores' variables, by each of the two addresses that they listen on."""
    return {key: value.replace("127.0.0.1", request.param) for key, value in stores.host_urls.items()}


@pytest.fixture
def name() -> str:
    return f"test_{uuid.uuid4().hex[:12]}"


@pytest.fixture
def database(stores: Endpoints, name: str) -> Iterator[str]:
    yield launcher.create_database(name)
    launcher.drop_database(name)


def with_password(url: str, password: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:{password}@{parts.hostname}:{parts.port}"))


def connect_milvus(urls: Mapping[str, str], token: str | None = None) -> MilvusClient:
    return MilvusClient(urls["TASKS_MILVUS_URL"], token=urls["TASKS_MILVUS_TOKEN"] if token is None else token, timeout=10)


@pytest.fixture
async def search(urls: dict[str, str]) -> AsyncIterator[AsyncElasticsearch]:
    async with AsyncElasticsearch(urls["TASKS_ELASTICSEARCH_URL"]) as client:
        yield client


async def test_postgres_answers_the_product_and_refuses_a_wrong_password(urls: dict[str, str]) -> None:
    connection = await asyncpg.connect(urls["TASKS_POSTGRES_URL"])
    try:
        assert await connection.fetchval("SELECT lower('ÄB') || '知识'") == "äb知识"
        row = await connection.fetchrow("SELECT rolsuper, rolcreaterole FROM pg_roles WHERE rolname = current_user")
        assert row is not None
        assert not row["rolsuper"]
        assert not row["rolcreaterole"]
    finally:
        await connection.close()
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(with_password(urls["TASKS_POSTGRES_URL"], "wrong"))


async def test_a_scratch_database_belongs_to_the_product_and_goes_even_while_it_is_used(
    stores: Endpoints, name: str
) -> None:
    url = launcher.create_database(name)
    try:
        connection = await asyncpg.connect(url)
        await connection.execute("CREATE TABLE chunk (id text PRIMARY KEY)")
        assert await connection.fetchval("SELECT current_database()") == name
        with pytest.raises(DevstackError, match="already exists"):
            launcher.create_database(name)
    finally:
        launcher.drop_database(name)
    launcher.drop_database(name)
    with pytest.raises(asyncpg.PostgresError):
        await connection.fetchval("SELECT 1")
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await asyncpg.connect(url)


async def test_redis_answers_the_product_and_refuses_a_wrong_password(urls: dict[str, str], name: str) -> None:
    async with Redis.from_url(urls["TASKS_REDIS_URL"]) as client, client.pubsub() as listener:
        await listener.subscribe(name)
        await client.publish(name, "知识".encode())
        messages = [await listener.get_message(timeout=5) for _ in range(2)]
        assert [message["data"] for message in messages if message] == [1, "知识".encode()]
    for url in (with_password(urls["TASKS_REDIS_URL"], "wrong"), urls["TASKS_REDIS_URL"].replace(launcher_secret(urls), "")):
        async with Redis.from_url(url) as client:
            with pytest.raises(AuthenticationError):
                await client.ping()


def launcher_secret(urls: Mapping[str, str]) -> str:
    """The `:password@` of the Redis URL."""
    return f":{urlsplit(urls['TASKS_REDIS_URL']).password}@"


def test_milvus_answers_the_product_and_refuses_a_wrong_password(urls: dict[str, str], name: str) -> None:
    client = connect_milvus(urls)
    try:
        client.create_collection(name, dimension=len(VECTOR), metric_type="COSINE", consistency_level="Strong")
        client.insert(
            name, [{"id": 1, "vector": VECTOR, "text": "知识"}, {"id": 2, "vector": [-x for x in VECTOR], "text": "b"}]
        )
        (hits,) = client.search(name, data=[VECTOR], limit=1, output_fields=["text"])
        assert [(hit["id"], hit["entity"]["text"]) for hit in hits] == [(1, "知识")]
    finally:
        client.drop_collection(name)
        client.close()
    for token in ("root:wrong", "root:Milvus", ""):
        # Of one type or another, depending on whether the client has a connection to share.
        with pytest.raises(Exception, match=r"auth check failure|illegal connection params"):
            connect_milvus(urls, token).list_collections()


async def test_elasticsearch_answers_the_product_and_refuses_a_wrong_password(
    urls: dict[str, str], search: AsyncElasticsearch
) -> None:
    assert await search.ping()
    information = await search.info()
    assert information["version"]["number"].startswith("9.")
    assert information["tagline"] == "You Know, for Search"
    url = urls["TASKS_ELASTICSEARCH_URL"]
    bare = urlunsplit(urlsplit(url)._replace(netloc=urlsplit(url).netloc.rpartition("@")[2]))
    for refused in (with_password(url, "wrong"), bare):
        async with AsyncElasticsearch(refused) as client:
            for call in (client.info, client.cluster.health, client.cat.indices):
                with pytest.raises(AuthenticationException) as caught:
                    await call()
                assert caught.value.meta.headers["WWW-Authenticate"].startswith("Basic ")


@pytest.mark.parametrize(
    ("analyzer", "text", "query", "found"),
    [
        ("smartcn", "知识库平台支持文档处理和向量检索", "检索", True),
        ("smartcn", "知识库平台支持文档处理和向量检索", "量检", False),  # words, not any two characters
        ("cjk", "知识库平台支持文档处理和向量检索", "量检", True),  # any two characters
        ("english", "The workers are running tasks", "task run", True),
    ],
)
async def test_text_is_found_by_the_words_that_its_analyzer_sees(
    search: AsyncElasticsearch, name: str, analyzer: str, text: str, query: str, found: bool
) -> None:
    mappings = {"dynamic": "strict", "properties": {"text": {"type": "text", "analyzer": analyzer}}}
    await search.indices.create(index=name, mappings=mappings, settings={"number_of_replicas": 0})
    try:
        answer = await search.bulk(index=name, operations=[{"index": {"_id": "1"}}, {"text": text}], refresh="wait_for")
        assert not answer["errors"]
        hits = await search.search(index=name, query={"match": {"text": {"query": query, "operator": "and"}}})
        assert [hit["_id"] for hit in hits["hits"]["hits"]] == (["1"] if found else [])
        await search.bulk(index=name, operations=[{"delete": {"_id": "1"}}], refresh="wait_for")
        assert (await search.count(index=name))["count"] == 0
    finally:
        await search.indices.delete(index=name)


def test_no_store_can_be_reached_but_by_loopback_and_bridge(stores: Endpoints) -> None:
    for store in launcher.NAMES:
        process = find(store)
        assert process is not None
        listening = [c.laddr for c in psutil.Process(process.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert listening, store
        outside = {
            address.port for address in listening if address.ip.removeprefix("::ffff:") not in {"127.0.0.1", "10.244.0.1"}
        }
        assert not outside or store == "milvus"
        if outside:
            table = subprocess.run(
                ["nft", "list", "table", "inet", milvus.filter_name(milvus.port())],
                capture_output=True,
                text=True,
                check=True,
            )
            assert all(str(port) in table.stdout for port in outside)


def test_up_again_changes_nothing(stores: Endpoints) -> None:
    before = {store: find(store) for store in launcher.NAMES}
    assert launcher.up() == stores.host_urls
    assert {store: find(store) for store in launcher.NAMES} == before


def test_milvus_lite_serves_what_milvus_2_3_cannot(stores: Endpoints, name: str) -> None:
    url = milvus_lite.up()
    assert milvus_lite.up() == url
    client = MilvusClient(url, timeout=10)
    try:
        client.create_collection(name, dimension=len(VECTOR), metric_type="COSINE")
        client.insert(name, [{"id": 1, "vector": VECTOR}])
        client.flush(name)
        (hits,) = client.search(name, data=[VECTOR], limit=1)
        assert [hit["id"] for hit in hits] == [1]
    finally:
        client.drop_collection(name)
        client.close()
        milvus_lite.down()
    assert not running(milvus_lite.NAME)


@pytest.fixture
def own_stores(stores: Endpoints, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder and ports for a second set of stores, so that it can be killed; gone after the test."""
    folder = Path(tempfile.mkdtemp(prefix="devstack-stores-"))  # pytest's own folders are closed to PostgreSQL's user
    folder.chmod(0o755)
    monkeypatch.setenv("DEVSTACK_STATE", str(folder))
    for offset, store in enumerate(launcher.NAMES):
        monkeypatch.setenv(f"DEVSTACK_{store.upper()}_PORT", str(21000 + 100 * offset))
    yield folder
    launcher.down(purge=True)
    shutil.rmtree(folder)


def kill_all() -> None:
    for store in launcher.NAMES:
        process = find(store)
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
    wait_until("the end of the stores", lambda: not any(running(store) for store in launcher.NAMES), seconds=10)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("end", [launcher.down, kill_all], ids=["down", "kill -9"])
def test_what_was_written_is_there_after(own_stores: Path, end: Callable[[], Any]) -> None:
    urls = launcher.up()
    asyncio.run(write(urls))
    end()
    # As after a reboot: the pid in the lock file is another process' by now.
    (own_stores / "postgres" / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n")
    assert launcher.up() == urls
    assert asyncio.run(read(urls)) == ("kept", b"kept", [1], "kept")
    launcher.down()
    assert set(launcher.status().values()) == {"not running"}
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    assert milvus.filter_name(milvus.port()) not in tables


async def write(urls: Mapping[str, str]) -> None:
    connection = await asyncpg.connect(urls["TASKS_POSTGRES_URL"])
    await connection.execute("CREATE TABLE kept (value text)")
    await connection.execute("INSERT INTO kept VALUES ('kept')")
    await connection.close()
    async with Redis.from_url(urls["TASKS_REDIS_URL"]) as client:
        await client.set("kept", "kept")
    store = connect_milvus(urls)
    store.create_collection("kept", dimension=len(VECTOR), consistency_level="Strong")
    store.insert("kept", [{"id": 1, "vector": VECTOR}])
    store.close()
    async with AsyncElasticsearch(urls["TASKS_ELASTICSEARCH_URL"]) as search:
        await search.index(index="kept", id="1", document={"value": "kept"}, refresh=True)


async def read(urls: Mapping[str, str]) -> tuple[Any, Any, list[int], Any]:
    connection = await asyncpg.connect(urls["TASKS_POSTGRES_URL"])
    row = await connection.fetchval("SELECT value FROM kept")
    await connection.close()
    async with Redis.from_url(urls["TASKS_REDIS_URL"]) as client:
        value = await client.get("kept")
    store = connect_milvus(urls)
    store.load_collection("kept", timeout=60)
    ids = [found["id"] for found in store.query("kept", filter="id > 0", output_fields=["id"], timeout=60)]
    store.close()
    async with AsyncElasticsearch(urls["TASKS_ELASTICSEARCH_URL"]) as search:
        document = await search.get(index="kept", id="1")
    return row, value, ids, document["_source"]["value"]
