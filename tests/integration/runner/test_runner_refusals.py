"""Real servers that refuse: for now, in part, for good. A proxy before Elasticsearch is busy when a test says so."""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import pytest
from aiohttp import web

from job_runner.elasticsearch import ElasticsearchIndex
from job_runner.milvus import MilvusIndex
from task_contract.errors import StoreCapacity, StoreRefused, StoreUnavailable
from tests.integration.runner.test_runner_stores import DIMENSION, generation, rows, vectors

pytestmark = pytest.mark.integration


class BusyProxy:
    """Passes requests on to Elasticsearch; what it does with bulk requests is planned, one entry a request."""

    def __init__(self, server: str) -> None:
        parts = urlsplit(server)
        self._server = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        self.plan: list[Callable[[list[bytes]], set[int] | web.Response]] = []
        """Given the lines of the body in pairs, the numbers of those that are refused, or an answer instead of all."""
        self.seen: list[int] = []
        """Operations of each bulk request."""

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        refused: set[int] = set()
        pairs: list[bytes] = []
        if request.path.endswith("/_bulk"):
            lines = body.rstrip(b"\n").split(b"\n")
            pairs = [b"\n".join(lines[start : start + 2]) for start in range(0, len(lines), 2)]
            self.seen.append(len(pairs))
            planned = self.plan.pop(0)(pairs) if self.plan else set()
            if isinstance(planned, web.Response):
                return planned
            refused = planned
            body = b"\n".join(pair for index, pair in enumerate(pairs) if index not in refused) + b"\n"
        headers = {
            name: value
            for name, value in request.headers.items()
            if name.lower() in {"authorization", "content-type", "accept"}
        }
        async with (
            aiohttp.ClientSession() as session,
            session.request(request.method, self._server + request.path_qs, data=body, headers=headers) as response,
        ):
            text = await response.text()
            passed = {
                name: response.headers[name] for name in ("X-elastic-product", "Content-Type") if name in response.headers
            }
        if refused:
            answered = json.loads(text)
            items = iter(answered["items"])
            error = {"type": "es_rejected_execution_exception", "reason": "the queue is full"}
            answered["items"] = [
                {"index": {"_id": "?", "status": 429, "error": error}} if index in refused else next(items)
                for index in range(len(pairs))
            ]
            text = json.dumps(answered)
        return web.Response(status=response.status, text=text, headers=passed)


@pytest.fixture
async def proxy(store_urls: dict[str, str]) -> AsyncIterator[tuple[BusyProxy, ElasticsearchIndex]]:
    """A busy proxy, and an index that is reached through it."""
    server = store_urls["TASKS_ELASTICSEARCH_URL"]
    proxy = BusyProxy(server)
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", proxy.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    parts = urlsplit(server)
    netloc = f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{port}".lstrip("@")
    url = urlunsplit(parts._replace(scheme="http", netloc=netloc))
    index = ElasticsearchIndex(generation(), url=url, api_key=store_urls.get("TASKS_ELASTICSEARCH_API_KEY"))
    await index.ensure()
    yield proxy, index
    await index._client.indices.delete(index=index._name)
    await index.aclose()
    await runner.cleanup()


def too_many(**headers: str) -> web.Response:
    error = {"type": "es_rejected_execution_exception", "reason": "the queue is full"}
    return web.json_response(
        {"error": error, "status": 429}, status=429, headers={"X-elastic-product": "Elasticsearch", **headers}
    )


async def test_of_a_bulk_only_the_rows_that_were_refused_are_sent_again(proxy: tuple[BusyProxy, ElasticsearchIndex]) -> None:
    busy, index = proxy
    busy.plan = [lambda pairs: {3, 7}, lambda pairs: {1}]
    data = rows(10)
    await index.write(data)
    assert busy.seen == [10, 2, 1]
    assert (await index.stored(data[0].document_id, 1)).keys() == {row.id for row in data}


async def test_a_server_that_is_busy_as_a_whole_is_asked_again_when_it_says(
    proxy: tuple[BusyProxy, ElasticsearchIndex],
) -> None:
    busy, index = proxy
    busy.plan = [lambda pairs: too_many(), lambda pairs: too_many(**{"Retry-After": "1"})]
    data = rows(10)
    await index.write(data)
    assert busy.seen == [10, 10, 10]
    assert len(await index.stored(data[0].document_id, 1)) == 10


async def test_a_server_that_asks_for_more_patience_than_there_is_gives_the_attempt_back(
    proxy: tuple[BusyProxy, ElasticsearchIndex],
) -> None:
    busy, index = proxy
    busy.plan = [lambda pairs: too_many(**{"Retry-After": "3600"})]
    with pytest.raises(
        StoreUnavailable, match=r"cannot write in kb_.*429 es_rejected_execution_exception.*check the server's load"
    ):
        await index.write(rows(10))
    assert busy.seen == [10]


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
