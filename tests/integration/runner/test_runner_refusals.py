"""Real servers that refuse: for now, in part, for good. Proxies before them are busy when a test says so."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest

from job_runner import elasticsearch, milvus
from job_runner.backoff import patiently
from job_runner.elasticsearch import ElasticsearchIndex
from job_runner.index import Stale
from job_runner.milvus import MilvusIndex
from task_contract.errors import StoreCapacity, StoreRefused, StoreUnavailable
from tests.integration.runner.test_runner_stores import DIMENSION, generation, rows, vectors
from tests.support.busy_stores import BusyElasticsearch, BusyMilvus, busy_elasticsearch, busy_milvus, too_many

pytestmark = pytest.mark.integration


@pytest.fixture
async def proxy(store_urls: dict[str, str]) -> AsyncIterator[tuple[BusyElasticsearch, ElasticsearchIndex]]:
    """A busy proxy, and an index that is reached through it."""
    async with busy_elasticsearch(store_urls["TASKS_ELASTICSEARCH_URL"]) as (proxy, url):
        index = ElasticsearchIndex(generation(), url=url, api_key=store_urls.get("TASKS_ELASTICSEARCH_API_KEY"))
        await index.ensure()
        yield proxy, index
        await index.drop()
        await index.aclose()


@pytest.fixture
def busy_vectors(store_urls: dict[str, str]) -> Iterator[tuple[BusyMilvus, MilvusIndex]]:
    """A busy proxy, and a collection that is reached through it; the test makes it."""
    with busy_milvus(store_urls["TASKS_MILVUS_URL"]) as (proxy, url):
        yield proxy, MilvusIndex(generation(), url=url, token=store_urls.get("TASKS_MILVUS_TOKEN"), dimension=DIMENSION)


async def check_patience(
    busy: BusyElasticsearch | BusyMilvus, store: ElasticsearchIndex | MilvusIndex, *, refused: int
) -> None:
    """What both stores promise alike: whatever they are asked, REFUSED refusals delay it and change nothing."""
    data = rows(3)
    one = data[0].document_id
    ids = {row.id: row.content_hash for row in data}

    async def write() -> None:
        await (store.write(data, vectors(3)) if isinstance(store, MilvusIndex) else store.write(data))

    async def found() -> set[str]:
        hits = store.search(vectors(3)[0], limit=5) if isinstance(store, MilvusIndex) else store.search("chunk", limit=5)
        return {hit.id for hit in await hits}

    async def scanned() -> set[str]:
        return {row.id async for page in store.scan() for row in page}

    calls: list[tuple[str, Callable[[], Awaitable[object]], object]] = [
        ("create", store.ensure, None),
        ("create again", store.ensure, None),
        ("write", write, None),
        ("read", lambda: store.stored(one, 1), ids),
        ("search", found, ids.keys()),
        ("scan", scanned, ids.keys()),
        ("exists", store.exists, True),
        ("count", lambda: store.count([Stale(one, up_to=1)]), 3),
        ("delete", lambda: store.delete([data[0].id]), None),
        ("remove", lambda: store.remove([Stale(one, up_to=1)]), 2),
        ("drop", store.drop, True),
        ("drop again", store.drop, False),
    ]
    if isinstance(store, MilvusIndex):
        hashes = {data[1].text_hash}

        async def copied() -> set[str]:
            return set(await store.vectors(one, 1, hashes))

        calls.insert(6, ("copy vectors", copied, hashes))
    for name, call, expected in calls:
        busy.refusing = refused
        assert await call() == expected, name
        assert busy.refusing == 0, f"{name}: the refusals were not met"
    await store.aclose()


async def test_a_busy_elasticsearch_is_asked_again_whatever_it_is_asked(
    proxy: tuple[BusyElasticsearch, ElasticsearchIndex],
) -> None:
    busy, index = proxy
    await index.drop()
    await check_patience(busy, index, refused=2)


@pytest.mark.parametrize("by_grpc", [False, True], ids=["by Milvus", "by gRPC"])
async def test_a_busy_milvus_is_asked_again_whatever_it_is_asked(
    busy_vectors: tuple[BusyMilvus, MilvusIndex], by_grpc: bool
) -> None:
    busy, index = busy_vectors
    await index.warm_up()
    busy.by_grpc = by_grpc
    await check_patience(busy, index, refused=2)


async def test_a_store_that_stays_busy_gives_the_attempt_back(
    proxy: tuple[BusyElasticsearch, ElasticsearchIndex],
    busy_vectors: tuple[BusyMilvus, MilvusIndex],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (elasticsearch, milvus):
        monkeypatch.setattr(module, "patiently", partial(patiently, seconds=1))
    for busy, index in (proxy, busy_vectors):
        busy.refusing = 1_000
        for call, action in (
            (index.ensure, "create the "),
            (partial(index.stored, "a", 1), "read "),
            (index.exists, "look for "),
        ):
            with pytest.raises(StoreUnavailable, match=rf"cannot {action}.*check the server's load"):
                await call()
        busy.refusing = 0
    await busy_vectors[1].aclose()


async def test_of_a_bulk_only_the_rows_that_were_refused_are_sent_again(
    proxy: tuple[BusyElasticsearch, ElasticsearchIndex],
) -> None:
    busy, index = proxy
    busy.plan = [lambda pairs: {3, 7}, lambda pairs: {1}]
    data = rows(10)
    await index.write(data)
    assert busy.bulks == [10, 2, 1]
    assert (await index.stored(data[0].document_id, 1)).keys() == {row.id for row in data}


async def test_a_server_that_is_busy_as_a_whole_is_asked_again_when_it_says(
    proxy: tuple[BusyElasticsearch, ElasticsearchIndex],
) -> None:
    busy, index = proxy
    busy.plan = [lambda pairs: too_many(), lambda pairs: too_many(**{"Retry-After": "1"})]
    data = rows(10)
    await index.write(data)
    assert busy.bulks == [10, 10, 10]
    assert len(await index.stored(data[0].document_id, 1)) == 10


async def test_a_server_that_asks_for_more_patience_than_there_is_gives_the_attempt_back(
    proxy: tuple[BusyElasticsearch, ElasticsearchIndex],
) -> None:
    busy, index = proxy
    busy.plan = [lambda pairs: too_many(**{"Retry-After": "3600"})]
    with pytest.raises(
        StoreUnavailable, match=r"cannot write in kb_.*429 es_rejected_execution_exception.*check the server's load"
    ):
        await index.write(rows(10))
    assert busy.bulks == [10]


async def test_a_value_that_is_too_long_is_refused_for_good(store_urls: dict[str, str], milvus_lite: str) -> None:
    long = [replace(row, document_id="字" * 1500) for row in rows(2)]
    for url, token in (
        (store_urls["TASKS_MILVUS_URL"], store_urls.get("TASKS_MILVUS_TOKEN")),
        (milvus_lite, None),
    ):
        index = MilvusIndex(generation(), url=url, token=token, dimension=DIMENSION)
        await index.ensure()
        if url != milvus_lite:  # lite bounds no column but the key
            with pytest.raises(StoreRefused, match=r"cannot write in kb_.*exceeds max length"):
                await index.write(long, vectors(2))
        with pytest.raises(StoreRefused, match=r"cannot write in kb_.*exceeds max"):
            await index.write([replace(row, id="x" * 65) for row in rows(2)], vectors(2))
        with pytest.raises(StoreRefused, match=r"cannot write in kb_.* dim"):
            await index.write(rows(2), vectors(2)[:, :5])
        # The longest identity that a task can have fits: 1,024 characters of four bytes.
        longest = [replace(row, document_id="𠀀" * 1024) for row in rows(2)]
        await index.write(longest, vectors(2))
        assert len(await index.stored(longest[0].document_id, 1)) == 2
        await index._run("drop", index._client.drop_alias, index._generation.alias)
        await index._run("drop", index._client.drop_collection, index._name)
        await index.aclose()


async def test_the_longest_identity_fits_elasticsearch_and_a_row_of_another_shape_does_not(
    store_urls: dict[str, str],
) -> None:
    index = ElasticsearchIndex(
        generation(), url=store_urls["TASKS_ELASTICSEARCH_URL"], api_key=store_urls.get("TASKS_ELASTICSEARCH_API_KEY")
    )
    await index.ensure()
    longest = [replace(row, document_id="𠀀" * 1024) for row in rows(2)]
    await index.write(longest)
    assert len(await index.stored(longest[0].document_id, 1)) == 2
    with pytest.raises(StoreRefused, match=r"cannot write .*document_parsing_exception"):
        await index.write([replace(rows(1)[0], ordinal="first")])  # type: ignore[arg-type]  # the point of it
    await index._client.indices.delete(index=index._name)
    await index.aclose()


async def test_a_limit_of_the_server_itself_ends_the_task(store_urls: dict[str, str]) -> None:
    index = ElasticsearchIndex(
        generation(),
        url=store_urls["TASKS_ELASTICSEARCH_URL"],
        api_key=store_urls.get("TASKS_ELASTICSEARCH_API_KEY"),
        replicas=900_000,  # copies count against cluster.max_shards_per_node too
    )
    with pytest.raises(StoreCapacity, match=r"maximum.* shards.*raise cluster\.max_shards_per_node"):
        await index.ensure()
    await index.aclose()
