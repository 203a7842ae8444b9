"""One contract for each store, held by the real servers and by the fakes that stand in for them."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from pymilvus import CollectionSchema

from job_runner import elasticsearch, milvus
from job_runner.elasticsearch import ElasticsearchIndex
from job_runner.index import ADDED, READ_AT_ONCE, Filters, Generation, Row, Stale, Stored, TextIndex, VectorIndex
from job_runner.milvus import MilvusIndex
from task_contract import names
from task_contract.errors import StoreRefused, StoreUnavailable
from tests.support.memory_stores import MemoryTextIndex, MemoryVectorIndex
from tests.support.operator_lab import until

pytestmark = pytest.mark.integration

DIMENSION = 8
ODD_ID = "folder/知识 \"库\"\\手册\t'x' 😀 {a} %_*.md"


def generation() -> Generation:
    return Generation(namespace="test", kb_id=f"kb-{uuid.uuid4().hex[:12]}", number=1)


def rows(count: int, *, document_id: str = ODD_ID, version: int = 1, texts: str = "chunk {}") -> list[Row]:
    return [
        Row(
            id=names.chunk_id(namespace="test", kb_id="kb", document_id=document_id, version=version, ordinal=ordinal),
            document_id=document_id,
            version=version,
            ordinal=ordinal,
            text=texts.format(ordinal),
            text_hash=names.digest(texts.format(ordinal)),
            page_start=1,
            page_end=2,
            heading_path="部分一\nPart 2",
            char_start=ordinal * 10,
            char_end=ordinal * 10 + 9,
            language="en",
            metadata={"team": "知识", "x.y": ""},
            source_sha256="0" * 64,
            content_hash="c" * 32,
            task_uid=str(uuid.uuid4()),
            chunk_count=count,
            tokens=3,
            pipeline="parser 1, splitter 1",
        )
        for ordinal in range(count)
    ]


def vectors(count: int, *, seed: int = 1) -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
    drawn = np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32)
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), dtype=np.float32)


@pytest.fixture(params=["milvus", "milvus-lite", "memory"])
async def vector_index(request: pytest.FixtureRequest) -> AsyncIterator[VectorIndex]:
    """An empty knowledge base in each vector store."""
    if request.param == "memory":
        memory = MemoryVectorIndex()
        await memory.ensure()
        yield memory
        return
    token = None
    if request.param == "milvus":
        urls = request.getfixturevalue("store_urls")
        url, token = urls["TASKS_MILVUS_URL"], urls.get("TASKS_MILVUS_TOKEN")
    else:
        url = request.getfixturevalue("milvus_lite")
    index = MilvusIndex(generation(), url=url, token=token, dimension=DIMENSION)

    async def ensured() -> bool:
        try:
            await index.ensure()
        except StoreUnavailable:  # milvus-lite on a busy machine: "too many pings"
            return False
        return True

    await until("the collection is there", ensured, seconds=90)
    yield index
    await index.drop()
    await index.aclose()


@pytest.fixture(params=["elasticsearch", "memory"])
async def text_index(request: pytest.FixtureRequest) -> AsyncIterator[TextIndex]:
    """An empty knowledge base in each text store."""
    if request.param == "memory":
        memory = MemoryTextIndex()
        await memory.ensure()
        yield memory
        return
    urls = request.getfixturevalue("store_urls")
    index = ElasticsearchIndex(
        generation(), url=urls["TASKS_ELASTICSEARCH_URL"], api_key=urls.get("TASKS_ELASTICSEARCH_API_KEY")
    )
    await index.ensure()
    yield index
    await index.drop()
    await index.aclose()


async def check_chunk_store(store: VectorIndex | TextIndex) -> None:
    """What both kinds of store promise alike."""

    async def write(data: list[Row]) -> None:
        if isinstance(store, (MemoryTextIndex, ElasticsearchIndex)):
            await store.write(data)
        else:
            assert isinstance(store, (MemoryVectorIndex, MilvusIndex))
            await store.write(data, vectors(len(data)))

    # Nothing is there, and removing nothing is no error.
    assert await store.stored(ODD_ID, 1) == {}
    await store.delete(["0" * 32])
    assert await store.remove([Stale(ODD_ID, up_to=5)]) == 0
    await store.ensure()  # again

    # What was written is there at once, once, and only in its version.
    first, second, other = rows(700), rows(3, version=2), rows(2, document_id="other", version=1)
    for data in (first, first, second, other):
        await write(data)
    assert await store.stored(ODD_ID, 1) == {row.id: row.content_hash for row in first}
    assert await store.stored(ODD_ID, 2) == {row.id: row.content_hash for row in second}
    for window in (slice(0, 500), slice(500, 700), slice(699, None), slice(700, None)):
        found = await store.stored(ODD_ID, 1, first=window.start, below=window.stop)
        assert found == {row.id: row.content_hash for row in first[window]}

    # Writing again replaces.
    await write([replace(row, content_hash="d" * 32) for row in second[:1]])
    assert (await store.stored(ODD_ID, 2))[second[0].id] == "d" * 32
    assert len(await store.stored(ODD_ID, 2)) == 3

    # A scan shows every row once, with what tells its place.
    scanned = [row async for page in store.scan() for row in page]
    assert len(scanned) == 705
    assert {row.id: row for row in scanned} == {
        row.id: Stored(row.id, row.document_id, row.version, row.ordinal, row.content_hash, row.task_uid, row.chunk_count)
        for row in (*first, replace(second[0], content_hash="d" * 32), *second[1:], *other)
    }

    # Whole rows come back as they were written, in order, some at a time.
    parts = [part async for part in store.read(ODD_ID, 1)]
    assert [row for part in parts for row in part] == first
    assert max(map(len, parts)) <= READ_AT_ONCE
    assert [row async for part in store.read("other", 1) for row in part] == other
    assert [part async for part in store.read("other", 2)] == []

    # Removal by id, and of stale versions: of these documents alone, up to a number, without those that are kept.
    await store.delete([row.id for row in first[:10]])
    assert len(await store.stored(ODD_ID, 1)) == 690
    assert await store.remove([Stale(ODD_ID, up_to=0), Stale("unknown", up_to=9)]) == 0
    assert await store.remove([Stale(ODD_ID, up_to=2, keep=(1, 2, 7))]) == 0
    assert await store.count([]) == await store.remove([]) == 0
    stale = [Stale(ODD_ID, up_to=2, keep=(2,)), Stale("other", up_to=0)]
    assert await store.count(stale) == 690
    assert len(await store.stored(ODD_ID, 1)) == 690
    assert await store.remove(stale) == 690
    assert await store.count(stale) == await store.remove(stale) == 0
    assert await store.stored(ODD_ID, 1) == {}
    assert len(await store.stored(ODD_ID, 2)) == 3
    assert len(await store.stored("other", 1)) == 2
    assert sum([len(page) async for page in store.scan()]) == 5
    assert await store.remove([Stale(ODD_ID, up_to=9), Stale("other", up_to=9)]) == 5

    # The first generation has the alias.
    assert await store.serves()
    await store.serve()
    assert await store.serves()

    # A generation that is dropped is not there, holds nothing, and can be made anew.
    await write(first[:3])
    assert await store.exists()
    assert await store.drop()
    assert not await store.exists()
    assert not await store.serves()
    assert not await store.drop()
    assert await store.count([Stale(ODD_ID, up_to=9)]) == await store.remove([Stale(ODD_ID, up_to=9)]) == 0
    assert [page async for page in store.scan()] == []
    await store.ensure()
    assert await store.exists()
    assert await store.stored(ODD_ID, 1) == {}


async def test_a_vector_store_keeps_rows(vector_index: VectorIndex) -> None:
    await check_chunk_store(vector_index)


async def test_a_text_store_keeps_rows(text_index: TextIndex) -> None:
    await check_chunk_store(text_index)


async def test_a_vector_store_holds_large_rows(vector_index: VectorIndex) -> None:
    large = [
        replace(row, text="字" * 8000, heading_path="题" * 1000, metadata={str(key): "值" * 500 for key in range(24)})
        for row in rows(20)
    ]
    await vector_index.write(large, vectors(20))
    assert len(await vector_index.stored(ODD_ID, 1)) == 20


async def test_a_text_store_holds_large_rows(text_index: TextIndex) -> None:
    large = [
        replace(row, text="字" * 8000, heading_path="题" * 1000, metadata={str(key): "值" * 500 for key in range(24)})
        for row in rows(20)
    ]
    await text_index.write(large)
    assert len(await text_index.stored(ODD_ID, 1)) == 20


async def test_more_rows_than_one_answer_holds(vector_index: VectorIndex) -> None:
    data = rows(17_000)
    for start in range(0, len(data), 5000):
        await vector_index.write(data[start : start + 5000], vectors(len(data[start : start + 5000])))
    assert (await vector_index.stored(ODD_ID, 1)).keys() == {row.id for row in data}
    assert await vector_index.remove([Stale(ODD_ID, up_to=1)]) == 17_000
    assert await vector_index.stored(ODD_ID, 1) == {}


async def test_more_text_rows_than_one_answer_holds(text_index: TextIndex) -> None:
    data = rows(11_000)
    await text_index.write(data)
    assert (await text_index.stored(ODD_ID, 1)).keys() == {row.id for row in data}
    assert await text_index.remove([Stale(ODD_ID, up_to=1)]) == 11_000
    assert await text_index.stored(ODD_ID, 1) == {}


async def test_vectors_come_back_by_text_hash(vector_index: VectorIndex) -> None:
    data, drawn = rows(400), vectors(400)
    await vector_index.write(data, drawn)
    found = await vector_index.vectors(ODD_ID, 1, {row.text_hash for row in data[:300]} | {"unknown"})
    assert found.keys() == {row.text_hash for row in data[:300]}
    assert all(np.allclose(found[row.text_hash], drawn[index], atol=1e-6) for index, row in enumerate(data[:300]))
    assert await vector_index.vectors(ODD_ID, 2, {data[0].text_hash}) == {}


async def test_vectors_come_back_with_their_rows(vector_index: VectorIndex) -> None:
    data, drawn = rows(600), vectors(600)
    await vector_index.write(data, drawn)
    found = [part async for part in vector_index.read_with_vectors(ODD_ID, 1)]
    assert [row for part, _ in found for row in part] == data
    assert max(len(part) for part, _ in found) <= READ_AT_ONCE
    assert np.allclose(np.concatenate([part for _, part in found]), drawn, atol=1e-6)


async def test_the_nearest_vectors_are_found(vector_index: VectorIndex) -> None:
    data, drawn = rows(50), vectors(50)
    await vector_index.write(data, drawn)
    hits = await vector_index.search(drawn[7], limit=3)
    assert hits[0].id == data[7].id
    assert hits[0].score == pytest.approx(1, abs=1e-4)
    assert (hits[0].document_id, hits[0].version, hits[0].ordinal, hits[0].text) == (ODD_ID, 1, 7, "chunk 7")
    assert (hits[0].page_start, hits[0].page_end, hits[0].heading_path) == (1, 2, "部分一\nPart 2")
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    further = await vector_index.search(drawn[7], limit=3, offset=3)
    assert not {hit.id for hit in hits} & {hit.id for hit in further}


async def test_words_are_found_in_both_languages(text_index: TextIndex) -> None:
    chinese, english = rows(2)
    await text_index.write(
        [
            replace(chinese, text="任务失败之后会自动重试三次", heading_path="重试"),
            replace(english, text="Every failed task is retried three times", heading_path="Retries"),
        ]
    )
    assert len(await text_index.stored(ODD_ID, 1)) == 2
    assert [hit.ordinal for hit in await text_index.search("失败 任务", limit=5)] == [0]
    assert [hit.ordinal for hit in await text_index.search("task retried", limit=5)] == [1]
    assert [hit.ordinal for hit in await text_index.search("retries", limit=5)] == [1]
    assert await text_index.search("xylophone", limit=5) == []


FILTERED: dict[str, tuple[Filters, set[int]]] = {
    "nothing is asked for": (Filters(), {0, 1, 2, 3, 4}),
    "any of several documents": (Filters(document_ids=(ODD_ID, "gone")), {0, 1}),
    "an identity that looks like an expression": (Filters(document_ids=('" or "" == "',)), set()),
    "language": (Filters(language="zh"), {1}),
    "a language that looks like an expression": (Filters(language='en" or language != "'), set()),
    "metadata": (Filters(metadata=(("team", "知识"),)), {0, 3}),
    "all pairs of metadata": (Filters(metadata=(("team", "知识"), ("x.y", ""))), {0}),
    "a key and a value full of quotes": (Filters(metadata=(('a"]\\', "' == \n\""),)), {1}),
    "a key that no row has": (Filters(metadata=(("team=", "知识"),)), set()),
    "a heading and all below it": (Filters(headings=("A",)), {0, 1, 2}),
    "two levels of headings": (Filters(headings=("A", "B_")), {0, 1}),
    "a heading that looks like a pattern": (Filters(headings=("%",)), set()),
    "pages that rows begin or end in": (Filters(pages=(3, 4)), {1, 2, 3}),
    "a keyword": (Filters(keywords=("Retry limit",)), {0, 2}),
    "all keywords": (Filters(keywords=("retry limit", "备份")), {0}),
    "a keyword full of quotes": (Filters(keywords=('") or (1 == 1',)), {2}),
    "without what says the same as another": (Filters(without_duplicates=True), {0, 2, 3, 4}),
    "everything that is asked for": (Filters(pages=(3, 4), headings=("A", "B_")), {1}),
}
"""What a search is asked for → ordinals that it finds of :func:`filtered`."""


KEYWORDS = ("retry limit", '") or (1 == 1')


def filtered() -> list[Row]:
    changes: list[dict[str, Any]] = [
        {"heading_path": "A\nB_", "page_start": 1, "page_end": 2, "keywords": ("retry limit", "备份")},
        {
            "heading_path": "A\nB_\nC",
            "page_start": 2,
            "page_end": 3,
            "language": "zh",
            "metadata": {'a"]\\': "' == \n\""},
            "duplicate_of": "0",
        },
        {"heading_path": "A", "page_start": 3, "page_end": 3, "document_id": "other", "metadata": {}, "keywords": KEYWORDS},
        {"heading_path": "AB", "page_start": 4, "page_end": 9, "document_id": "third", "metadata": {"team": "知识"}},
        {"heading_path": "A ", "page_start": 0, "page_end": 0, "document_id": "third", "metadata": {"team": "others"}},
    ]
    return [replace(row, **change) for row, change in zip(rows(5), changes, strict=True)]


async def test_a_search_by_meaning_looks_at_what_fits(vector_index: VectorIndex) -> None:
    drawn = vectors(5)
    await vector_index.write(filtered(), drawn)
    for name, (filters, found) in FILTERED.items():
        hits = await vector_index.search(drawn[0], limit=10, filters=filters)
        assert {hit.ordinal for hit in hits} == found, name


async def test_a_search_by_words_looks_at_what_fits(text_index: TextIndex) -> None:
    await text_index.write(filtered())
    assert len(await text_index.stored(ODD_ID, 1)) == 2  # refreshes
    for name, (filters, found) in FILTERED.items():
        hits = await text_index.search("chunk", limit=10, filters=filters)
        assert {hit.ordinal for hit in hits} == found, name


async def test_two_pods_create_a_knowledge_base_at_once(store_urls: dict[str, str], milvus_lite: str) -> None:
    where = generation()
    token = store_urls.get("TASKS_MILVUS_TOKEN")
    pods = [MilvusIndex(where, url=store_urls["TASKS_MILVUS_URL"], token=token, dimension=DIMENSION) for _ in range(3)]
    pods += [MilvusIndex(where, url=milvus_lite, token=None, dimension=DIMENSION) for _ in range(3)]
    texts = [
        ElasticsearchIndex(
            where, url=store_urls["TASKS_ELASTICSEARCH_URL"], api_key=store_urls.get("TASKS_ELASTICSEARCH_API_KEY")
        )
        for _ in range(3)
    ]
    await asyncio.gather(*(pod.ensure() for pod in pods), *(text.ensure() for text in texts))
    data = rows(2)
    for pod in (pods[0], pods[3]):
        await pod.write(data, vectors(2))
        assert (await pod.search(vectors(2)[0], limit=1))[0].id == data[0].id
    await texts[0].write(data)
    assert len(await texts[1].stored(ODD_ID, 1)) == 2
    assert await texts[2].search("chunk", limit=5)
    stores: list[MilvusIndex | ElasticsearchIndex] = [*pods, *texts]
    assert all([await one.serves() for one in stores])
    for store in (pods[0], pods[3], texts[0]):
        await store.drop()
    for pod in pods:
        await pod.aclose()
    for text in texts:
        await text.aclose()


async def test_the_alias_goes_over_to_the_generation_that_is_left(store_urls: dict[str, str], milvus_lite: str) -> None:
    first = generation()
    second = replace(first, number=2)
    api_key = store_urls.get("TASKS_ELASTICSEARCH_API_KEY")
    for open_store in (
        lambda where: MilvusIndex(
            where, url=store_urls["TASKS_MILVUS_URL"], token=store_urls.get("TASKS_MILVUS_TOKEN"), dimension=DIMENSION
        ),
        lambda where: MilvusIndex(where, url=milvus_lite, token=None, dimension=DIMENSION),
        lambda where: ElasticsearchIndex(where, url=store_urls["TASKS_ELASTICSEARCH_URL"], api_key=api_key),
    ):
        old, new = open_store(first), open_store(second)
        await old.ensure()
        await new.ensure()
        assert (await old.serves(), await new.serves()) == (True, False)
        await new.serve()
        assert (await old.serves(), await new.serves()) == (False, True), "a switch"
        await old.serve()
        assert (await old.serves(), await new.serves()) == (True, False), "and back"
        assert await old.drop()
        await new.ensure()
        assert await new.serves(), "the alias goes over to the one that is left"
        await old.ensure()
        assert await old.drop(), "an alias that serves another generation does not keep a collection"
        assert await new.serves()
        await new.drop()
        await old.aclose()
        await new.aclose()


COLUMNS_0_1_0 = (
    *("document_id", "version", "ordinal", "text", "text_hash", "page_start", "page_end", "heading_path", "char_start"),
    *("char_end", "language", "metadata", "source_sha256", "content_hash", "task_uid"),
)


def as_written_by_0_1_0(row: Row) -> dict[str, object]:
    return {name: value for name, value in asdict(row).items() if name in ("id", *COLUMNS_0_1_0)}


@pytest.mark.parametrize("server", ["milvus", "milvus-lite"])
async def test_this_release_and_the_one_before_write_into_a_collection_of_either(
    request: pytest.FixtureRequest, server: str
) -> None:
    if server == "milvus":
        urls = request.getfixturevalue("store_urls")
        url, token = urls["TASKS_MILVUS_URL"], urls.get("TASKS_MILVUS_TOKEN")
    else:
        url, token = request.getfixturevalue("milvus_lite"), None
    old_schema = milvus._schema(DIMENSION)
    old_schema = CollectionSchema([field for field in old_schema.fields if field.name not in ADDED])
    assert [field.name for field in old_schema.fields] == ["id", *COLUMNS_0_1_0, "embedding"]
    for schema in (old_schema, None):
        index = MilvusIndex(generation(), url=url, token=token, dimension=DIMENSION)
        await index.warm_up()
        if schema is not None:
            await index._run("create", index._client.create_collection, index._name, schema=schema)
        await index.ensure()
        of_old, of_new = rows(4)[:2], rows(4)[2:]
        data = [{**as_written_by_0_1_0(row), "embedding": vector} for row, vector in zip(of_old, vectors(2), strict=True)]
        await index._run("write", index._client.upsert, index._name, data)
        await index.write(of_new, vectors(2))
        assert len(await index.stored(ODD_ID, 1)) == 4
        counts = {row.ordinal: row.chunk_count async for page in index.scan() for row in page}
        assert counts == {0: 0, 1: 0, 2: 0 if schema else 4, 3: 0 if schema else 4}
        await index.drop()
        await index.aclose()


async def test_this_release_and_the_one_before_write_into_an_index_of_either(store_urls: dict[str, str]) -> None:
    for old in (True, False):
        index = ElasticsearchIndex(
            generation(), url=store_urls["TASKS_ELASTICSEARCH_URL"], api_key=store_urls.get("TASKS_ELASTICSEARCH_API_KEY")
        )
        if old:
            mappings = elasticsearch._mappings("standard")
            mappings["properties"] = {name: type_ for name, type_ in mappings["properties"].items() if name not in ADDED}
            assert mappings["properties"].keys() == {*COLUMNS_0_1_0, "heading_text", "metadata_pairs"}
            await index._client.indices.create(index=index._name, mappings=mappings)
        await index.ensure()
        await index.ensure()  # and once more, with nothing to add
        of_old, of_new = rows(4)[:2], rows(4)[2:]
        data = [as_written_by_0_1_0(row) for row in of_old]
        await index._bulk("write", [elasticsearch._operation({"index": {"_id": row.pop("id")}}, row) for row in data])
        await index.write(of_new)
        assert len(await index.stored(ODD_ID, 1)) == 4
        counts = {row.ordinal: row.chunk_count async for page in index.scan() for row in page}
        assert counts == {0: 0, 1: 0, 2: 4, 3: 4}
        await index.drop()
        await index.aclose()


async def test_an_index_is_strict_about_its_fields(store_urls: dict[str, str]) -> None:
    index = ElasticsearchIndex(
        generation(), url=store_urls["TASKS_ELASTICSEARCH_URL"], api_key=store_urls.get("TASKS_ELASTICSEARCH_API_KEY")
    )
    await index.ensure()
    with pytest.raises(StoreRefused, match=r"cannot write x in kb_.*strict_dynamic_mapping_exception"):
        await index._bulk("write", [elasticsearch._operation({"index": {"_id": "x"}}, {"unknown": 1})])
    await index.drop()
    await index.aclose()


async def test_a_store_that_is_down_is_unavailable() -> None:
    nowhere = "http://127.0.0.1:9"
    vector = MilvusIndex(generation(), url=nowhere, token=None, dimension=DIMENSION)
    text = ElasticsearchIndex(generation(), url=nowhere, api_key=None)
    with pytest.raises(StoreUnavailable, match=r"cannot connect: Milvus: .*check TASKS_MILVUS_URL"):
        await vector.ensure()
    with pytest.raises(StoreUnavailable, match=r"cannot create the index kb_.*check TASKS_ELASTICSEARCH_URL"):
        await text.ensure()
    await text.aclose()
    with pytest.raises(StoreUnavailable):
        await asyncio.to_thread(milvus.check, nowhere, None)
    with pytest.raises(StoreUnavailable):
        await elasticsearch.check(nowhere, None)


async def test_health_names_the_servers(store_urls: dict[str, str]) -> None:
    found = await asyncio.to_thread(milvus.check, store_urls["TASKS_MILVUS_URL"], store_urls.get("TASKS_MILVUS_TOKEN"))
    assert found.startswith("Milvus v2")
    api_key = store_urls.get("TASKS_ELASTICSEARCH_API_KEY")
    assert (await elasticsearch.check(store_urls["TASKS_ELASTICSEARCH_URL"], api_key)).startswith("Elasticsearch, state ")
