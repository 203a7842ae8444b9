"""Elasticsearch behind :class:`job_runner.index.TextIndex`: the only module that knows its client and its exceptions.

Written for servers 8 and 9 and for what every distribution of them has: strict mappings, bulk, search_after, aliases.
Deletion is search and bulk, since ``_delete_by_query`` comes with a module that not every server has.
"""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Final, TypeVar

import orjson

from job_runner.backoff import Busy, patiently
from job_runner.index import (
    ADDED,
    FIELDS,
    HIT_FIELDS,
    READ_AT_ONCE,
    STORED_FIELDS,
    Filters,
    Generation,
    Hit,
    Label,
    Row,
    Stale,
    Stored,
    alike,
    columns_of,
)
from job_runner.usage import asked
from job_runner.watchdog import beat
from task_contract.errors import RetryableError, StoreCapacity, StoreRefused, StoresDisagree, StoreUnavailable, TaskError
from task_contract.names import KNOWLEDGE_BASE_PREFIX

R = TypeVar("R")

TIMEOUT: Final = 15.0
_PAGE: Final = 5_000
_BULK_BYTES: Final = 1_000_000
"""The HTTP library wants bodies below 1 MiB, so as not to hold up the event loop; a row may have 150 KiB."""
_BULKS: Final = 2
"""Requests under way at once: 2 MB in the server, and no more of its threads than a small one has."""
_BUSY: Final = frozenset({429, 502, 503, 504})
# Of the errors with status 400 those that say something of the rows; others are about the index or a request of ours.
_BAD_ROWS: Final = frozenset(
    {
        "document_parsing_exception",
        "illegal_argument_exception",
        "mapper_parsing_exception",
        "strict_dynamic_mapping_exception",
    }
)
_GONE_SECONDS: Final = 15.0
_LABEL: Final = "processing-tasks"
"""Key of the label in the mapping's ``_meta``."""
_ANALYZERS: Final = ("smartcn", "cjk", "standard")
"""In the order in which Chinese is found best: words, pairs of characters, single characters. All know English."""


class ElasticsearchIndex:
    """One index. Construct it cheaply; the first call connects."""

    def __init__(
        self,
        generation: Generation,
        *,
        url: str,
        api_key: str | None,
        ca: str | None = None,
        analyzer: str | None = None,
        replicas: int = 0,
        label: str = "",
    ) -> None:
        self._generation = generation
        self._name = generation.name
        self._url = url
        self._api_key = api_key
        self._ca = ca
        self._analyzer = analyzer
        self._replicas = replicas
        self._label = label
        self._opened: Any = None

    @property
    def _client(self) -> Any:
        if self._opened is None:
            self._opened = make_client(self._url, self._api_key, self._ca)
        return self._opened

    async def aclose(self) -> None:
        """Close the connections."""
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    async def ensure(self) -> None:
        """Create the index with its alias, in one step, where it is missing; add columns that an earlier release's lacks."""
        action, alias = f"create the index {self._name}", self._generation.alias
        # An alias that serves another generation stays: switching generations is a step of its own.
        served = await _ask(action, lambda: self._client.indices.exists_alias(name=alias))
        if await self._exists(action):
            if not served:  # it was that of a generation that has been dropped
                await _ask(action, lambda: self._client.indices.put_alias(index=self._name, name=alias))
            await self._add_columns(action)
            return
        analyzer = self._analyzer or await self._detect_analyzer(action)

        async def create() -> bool:
            from elasticsearch import BadRequestError

            try:
                await self._client.indices.create(
                    index=self._name,
                    settings={"number_of_shards": 1, "number_of_replicas": self._replicas},
                    mappings=_mappings(analyzer) | {"_meta": {_LABEL: self._label}},
                    aliases={} if served else {alias: {}},
                    wait_for_active_shards="1",
                )
            except BadRequestError as error:
                if error.error != "resource_already_exists_exception":
                    raise
                return False
            return True

        if not await _ask(action, create):
            await self._add_columns(action)  # another pod was first, perhaps one of an earlier release

    async def _add_columns(self, action: str) -> None:
        """Add those of ADDED that the index has not."""
        answer = await _ask(action, lambda: self._client.indices.get_mapping(index=self._name))
        there = next(iter(answer.values()))["mappings"]["properties"]
        if missing := ADDED.keys() - there.keys():
            columns = _mappings(_ANALYZERS[-1])["properties"]
            added = {name: columns[name] for name in missing}
            await _ask(action, lambda: self._client.indices.put_mapping(index=self._name, properties=added))

    async def _detect_analyzer(self, action: str) -> str:
        async def knows(analyzer: str) -> bool:
            from elasticsearch import ApiError

            try:
                await self._client.indices.analyze(analyzer=analyzer, text="知识库")
            except ApiError as error:
                if error.meta.status not in {400, 404}:
                    raise
                return False
            return True

        for analyzer in _ANALYZERS[:-1]:
            if await _ask(action, partial(knows, analyzer)):
                return analyzer
        return _ANALYZERS[-1]

    async def stored(self, document_id: str, version: int, *, first: int = 0, below: int | None = None) -> dict[str, str]:
        """Return chunk id → content hash, after a refresh that makes all writes visible."""
        action = f"read {self._name}"
        await self._refresh(action)
        found: dict[str, str] = {}
        after: list[Any] | None = None
        while True:
            hits = await self._hits(
                action,
                query=_version(document_id, version, first=first, below=below),
                size=_PAGE,
                source=False,
                fields=["content_hash"],
                sort=[{"ordinal": "asc"}],  # unique within a version
                track_total_hits=False,
                **({} if after is None else {"search_after": after}),
            )
            beat()
            found |= {hit["_id"]: hit["fields"]["content_hash"][0] for hit in hits}
            if len(hits) < _PAGE:
                return found
            after = hits[-1]["sort"]

    async def read(self, document_id: str, version: int) -> AsyncIterator[list[Row]]:
        """Yield rows, after a refresh that makes all writes visible."""
        action = f"read {self._name}"
        await self._refresh(action)
        after: list[Any] | None = None
        while hits := await self._hits(
            action,
            query=_version(document_id, version, first=0, below=None),
            size=READ_AT_ONCE,
            source=list(FIELDS),
            sort=[{"ordinal": "asc"}],  # unique within a version
            track_total_hits=False,
            **({} if after is None else {"search_after": after}),
        ):
            beat()
            yield [Row.of(hit["_source"], id=hit["_id"]) for hit in hits]
            if len(hits) < READ_AT_ONCE:
                return
            after = hits[-1]["sort"]

    async def scan(self) -> AsyncIterator[list[Stored]]:
        """Yield all rows, document by document."""
        action = f"read {self._name}"
        if not await self._exists(action):
            return
        await self._refresh(action)
        after: list[Any] | None = None
        while hits := await self._hits(
            action,
            size=_PAGE,
            source=False,
            fields=list(STORED_FIELDS),
            sort=[{"document_id": "asc"}, {"version": "asc"}, {"ordinal": "asc"}],  # together unique
            track_total_hits=False,
            **({} if after is None else {"search_after": after}),
        ):
            yield [_stored(hit) for hit in hits]
            after = hits[-1]["sort"]

    async def _exists(self, action: str) -> bool:
        return bool(await _ask(action, lambda: self._client.indices.exists(index=self._name)))

    async def _refresh(self, action: str) -> None:
        await _ask(action, lambda: self._client.indices.refresh(index=self._name))

    async def _search(self, action: str, **request: Any) -> Any:
        """Return the answer to a search; one that did not reach every shard says less than there is and is none."""
        answer = await _ask(action, lambda: self._client.search(index=self._name, **request))
        if answer["timed_out"] or answer["_shards"]["failed"]:
            raise StoreUnavailable("cannot search Elasticsearch: not every shard answered; check the cluster")
        return answer

    async def _hits(self, action: str, **request: Any) -> list[dict[str, Any]]:
        return list((await self._search(action, **request))["hits"]["hits"])

    async def write(self, rows: Sequence[Row]) -> None:
        """Index rows under their ids, in requests of bounded size, two at a time; only what failed is sent again."""
        parts: list[list[bytes]] = [[]]
        size = 0
        for row in rows:
            source = columns_of(row)
            source["metadata"] = dict(row.metadata)
            source["metadata_pairs"] = [f"{key}={value}" for key, value in row.metadata.items()]
            operation = _operation({"index": {"_id": source.pop("id")}}, source)
            if parts[-1] and size + len(operation) > _BULK_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(operation)
            size += len(operation)
        # The server flushes its log once a request: while it does so for one it takes in the other.
        for start in range(0, len(parts), _BULKS):
            writing = (self._bulk("write", part) for part in parts[start : start + _BULKS])
            for ended in await asyncio.gather(*writing, return_exceptions=True):
                if isinstance(ended, BaseException):
                    raise ended

    async def delete(self, ids: Collection[str]) -> None:
        """Remove rows by id."""
        listed = list(ids)
        for start in range(0, len(listed), _PAGE):
            await self._bulk("delete", [_operation({"delete": {"_id": key}}) for key in listed[start : start + _PAGE]])

    async def exists(self) -> bool:
        """Tell whether the index is there."""
        return await self._exists(f"look for {self._name}")

    async def count(self, stale: Sequence[Stale]) -> int:
        """Count after a refresh that makes all writes visible."""
        if not stale or not await self.exists():
            return 0
        action = f"look for old versions in {self._name}"
        await self._refresh(action)
        answer = await self._search(action, query=_stale(stale), size=0, track_total_hits=True)
        return int(answer["hits"]["total"]["value"])

    async def remove(self, stale: Sequence[Stale]) -> int:
        """Remove page by page, until a refreshed search finds none."""
        found = await self.count(stale)
        if not found:
            return 0
        action = f"look for old versions in {self._name}"
        deadline = asyncio.get_running_loop().time() + _GONE_SECONDS
        left = None
        while True:
            await self._refresh(action)
            ids = [hit["_id"] for hit in await self._hits(action, query=_stale(stale), size=_PAGE, source=False)]
            if not ids:
                return found
            if ids == left and asyncio.get_running_loop().time() > deadline:
                message = f"cannot remove old versions from Elasticsearch: {len(ids)} rows are still in {self._name}"
                raise StoresDisagree(message)
            left = ids
            await self.delete(ids)

    async def serves(self) -> bool:
        """Ask for the alias of this index, and whether it is that of no other."""
        alias, action = self._generation.alias, f"look for the alias of {self._name}"
        served = await _ask(action, lambda: self._client.indices.exists_alias(name=alias))
        if not served:
            return False
        answer = await _ask(action, lambda: self._client.indices.get_alias(name=alias))
        return bool(set(answer) == {self._name})

    async def serve(self) -> None:
        """Take the alias from all indices that have it and give it to this one: one request, which the server does whole."""
        alias = self._generation.alias
        actions = [
            {"remove": {"index": f"{alias}_g*", "alias": alias, "must_exist": False}},
            {"add": {"index": self._name, "alias": alias}},
        ]
        await _ask(f"switch the alias to {self._name}", lambda: self._client.indices.update_aliases(actions=actions))

    async def drop(self) -> bool:
        """Delete the index, with which its alias goes."""
        there = await self.exists()
        action = f"delete the index {self._name}"
        await _ask(action, lambda: self._client.indices.delete(index=self._name, ignore_unavailable=True))
        if await self._exists(action):
            raise StoresDisagree(f"cannot remove the index {self._name} from Elasticsearch: it is still there")
        return there

    async def search(self, query: str, *, limit: int, offset: int = 0, filters: Filters | None = None) -> list[Hit]:
        """Return the best rows by BM25 over text and headings."""
        matching = {"multi_match": {"query": query, "fields": ["text", "heading_text"]}}
        hits = await self._hits(
            f"search {self._name}",
            query={"bool": {"must": matching, "filter": _conditions(filters)}} if filters else matching,
            size=limit,
            from_=offset,
            source=list(HIT_FIELDS),
        )
        return [Hit.of(hit["_source"], id=hit["_id"], score=float(hit["_score"])) for hit in hits]

    async def _bulk(self, action: str, operations: Sequence[bytes]) -> None:
        """Send operations; look at every item of the answer, since a bulk request succeeds even where its items fail."""
        rest = list(operations)

        async def send() -> None:
            nonlocal rest
            async with _guarded(f"{action} in {self._name}"):
                answer = await self._client.bulk(index=self._name, operations=rest)
            busy, last = [], None
            for operation, item in zip(rest, answer["items"], strict=True):
                result = next(iter(item.values()))
                status = result["status"]
                if status in _BUSY:
                    busy.append(operation)
                    last = result.get("error")
                elif status >= 300 and not (status == 404 and "delete" in item):
                    raise _refused(f"{action} {result.get('_id')} in {self._name}", status, result.get("error"))
            rest = busy
            if rest:
                raise _refused(f"{action} {len(rest)} rows in {self._name}", 429, last)

        if rest:
            await patiently(send)


_loaded: Any = None


def load() -> Any:
    """Import the client, and return its module; blocking."""
    global _loaded
    import elasticsearch

    _loaded = elasticsearch
    return elasticsearch


def make_client(url: str, api_key: str | None, ca: str | None = None) -> Any:
    """Return an asynchronous client. What a busy server refuses it does not repeat: that is :func:`_ask`'s, with pauses.

    ``ca`` has certificates in PEM form that are trusted besides those of the system.
    """
    from elasticsearch import AsyncElasticsearch

    trusted: dict[str, Any] = {}
    if ca is not None and url.startswith("https:"):
        trusted["ssl_context"] = ssl.create_default_context()
        trusted["ssl_context"].load_verify_locations(cadata=ca)
    return AsyncElasticsearch(
        url, api_key=api_key, request_timeout=TIMEOUT, max_retries=3, retry_on_timeout=True, retry_on_status=(), **trusted
    )


async def labels(url: str, api_key: str | None, ca: str | None = None) -> list[Label]:
    """Return the labels of all indices of ours that have one. Raises StoreUnavailable."""
    client = make_client(url, api_key, ca)
    try:
        mine = f"{KNOWLEDGE_BASE_PREFIX}*"
        answer = await _ask("list the indices", lambda: client.indices.get_mapping(index=mine))
    finally:
        await client.close()
    written = ((name, found["mappings"].get("_meta", {}).get(_LABEL, "")) for name, found in answer.items())
    return [label for name, text in written if (label := Label.read(text, name=name)) is not None]


async def check(url: str, api_key: str | None, ca: str | None = None) -> str:
    """Return what a health check says of the cluster. Raises StoreUnavailable, also when its state is red."""
    client = make_client(url, api_key, ca)
    try:
        async with _guarded("ask for the cluster's health"):
            health = await client.cluster.health()
    finally:
        await client.close()
    if health["status"] == "red":
        raise StoreUnavailable("cannot use Elasticsearch: the state of its cluster is red; some shards have no copy")
    return f"Elasticsearch, state {health['status']}"


def _mappings(analyzer: str) -> dict[str, Any]:
    keyword, integer = {"type": "keyword"}, {"type": "integer"}
    return {
        "dynamic": "strict",
        "properties": {
            "document_id": keyword,
            "version": {"type": "long"},
            "ordinal": integer,
            "text": {"type": "text", "analyzer": analyzer},
            "text_hash": keyword,
            "page_start": integer,
            "page_end": integer,
            "heading_path": {"type": "keyword", "ignore_above": 4096, "copy_to": "heading_text"},
            "heading_text": {"type": "text", "analyzer": analyzer},
            "char_start": integer,
            "char_end": integer,
            "language": keyword,
            # Keys are the caller's: as fields they would use up the index's limit of fields. Filters use "key=value".
            "metadata": {"type": "object", "enabled": False},
            "metadata_pairs": keyword,
            "source_sha256": keyword,
            "content_hash": keyword,
            "task_uid": keyword,
            "chunk_count": integer,
            "tokens": integer,
            "pipeline": keyword,
            "keywords": keyword,
            "summary": {"type": "keyword", "index": False, "doc_values": False},
            "duplicate_of": keyword,
            "analysis": keyword,
        },
    }


def _stored(hit: Mapping[str, Any]) -> Stored:
    columns = {name: hit["fields"].get(name, [ADDED.get(name)])[0] for name in STORED_FIELDS}
    return Stored(id=hit["_id"], **columns)


def _operation(action: Mapping[str, Any], source: Mapping[str, Any] | None = None) -> bytes:
    """Return the lines of one operation of a bulk request."""
    lines = (action,) if source is None else (action, source)
    return b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines)


def _version(document_id: str, version: int, *, first: int = 0, below: int | None = None) -> dict[str, Any]:
    ordinals = {"gte": first} | ({} if below is None else {"lt": below})
    clauses = [{"term": {"document_id": document_id}}, {"term": {"version": version}}, {"range": {"ordinal": ordinals}}]
    return {"bool": {"filter": clauses}}


def _conditions(filters: Filters) -> list[dict[str, Any]]:
    """Return the clauses of a filter: values of a request's body, in which nothing has a meaning of its own."""
    clauses: list[dict[str, Any]] = []
    if filters.document_ids:
        clauses.append({"terms": {"document_id": filters.document_ids}})
    if filters.language is not None:
        clauses.append({"term": {"language": filters.language}})
    clauses += [{"term": {"metadata_pairs": f"{key}={value}"}} for key, value in filters.metadata]
    if filters.headings:
        path = "\n".join(filters.headings)
        either = [{"term": {"heading_path": path}}, {"prefix": {"heading_path": f"{path}\n"}}]
        clauses.append({"bool": {"should": either, "minimum_should_match": 1}})
    if filters.pages is not None:
        first, last = filters.pages
        clauses += [{"range": {"page_start": {"lte": last}}}, {"range": {"page_end": {"gte": first}}}]
    clauses += [{"term": {"keywords": keyword.lower()}} for keyword in filters.keywords]
    if filters.without_duplicates:
        # Rows that were written before the column was there have none.
        one_alone = [{"term": {"duplicate_of": ""}}, {"bool": {"must_not": {"exists": {"field": "duplicate_of"}}}}]
        clauses.append({"bool": {"should": one_alone, "minimum_should_match": 1}})
    return clauses


def _stale(stale: Sequence[Stale]) -> dict[str, Any]:
    return {
        "bool": {
            "should": [
                {
                    "bool": {
                        "filter": [
                            {"terms": {"document_id": documents}},
                            {"range": {"version": {"lte": up_to}}},
                        ],
                        "must_not": [{"terms": {"version": list(keep)}}],
                    }
                }
                for (up_to, keep), documents in alike(stale).items()
            ],
            "minimum_should_match": 1,
        }
    }


async def _ask(action: str, request: Callable[[], Awaitable[R]]) -> R:
    """Make a request that may be made again; a busy server is asked again."""

    async def once() -> R:
        async with _guarded(action):
            return await request()

    with asked("elasticsearch"):
        return await patiently(once)


@contextlib.asynccontextmanager
async def _guarded(action: str) -> AsyncIterator[None]:
    """Turn exceptions of the client into ours."""
    # The first import of the client takes half a second and more: in a thread, so as not to hold up the event loop.
    client = await asyncio.to_thread(load) if _loaded is None else _loaded
    try:
        yield
    except client.ApiError as error:
        raise _refused(action, error.meta.status, error.body, after=_retry_after(error.meta.headers)) from error
    except client.TransportError as error:
        message = f"cannot {action}: Elasticsearch: {error.message}; check TASKS_ELASTICSEARCH_URL and the server"
        raise StoreUnavailable(message) from error


def _refused(action: str, status: int, detail: object, *, after: float = 0) -> TaskError:
    kind, reason = "", str(detail)
    if isinstance(detail, Mapping):
        cause = detail.get("error", detail)
        kind = str(cause.get("type")) if isinstance(cause, Mapping) else ""
        reason = f"{kind}: {cause.get('reason')}" if isinstance(cause, Mapping) else str(cause)
    text = f"cannot {action}: Elasticsearch: {status} {reason[:500]}"
    if "maximum" in text and "shards" in text:
        return StoreCapacity(f"{text}; remove unused knowledge bases, or raise cluster.max_shards_per_node")
    if status == 400 and ("Limit of total fields" in text or "documents in the index cannot exceed" in text):
        return StoreCapacity(f"{text}; begin another knowledge base, or raise the limit of the index")
    if status in _BUSY:
        return Busy(f"{text}; check the server's load and disk", after=after)
    if kind == "cluster_block_exception":
        return StoreUnavailable(f"{text}; the index does not take writes: free disk space, then remove the block")
    if status in {401, 403}:
        return StoreUnavailable(f"{text}; check the credentials in TASKS_ELASTICSEARCH_URL or TASKS_ELASTICSEARCH_API_KEY")
    if (status == 400 and kind in _BAD_ROWS) or status == 413:
        return StoreRefused(f"{text}; correct the task, or rebuild a knowledge base whose index has other columns")
    return RetryableError(text)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds for which a server asks to be left alone (RFC 9110, 10.2.3); 0 if it does not say."""
    said = headers.get("retry-after") or ""
    with contextlib.suppress(ValueError):
        return max(0.0, float(said))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    return 0.0
