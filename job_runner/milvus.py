"""Milvus behind :class:`job_runner.index.VectorIndex`: the only module that knows pymilvus and its exceptions.

Written for servers from 2.3 on and for milvus-lite 3: schema, HNSW, upsert, deletion by expression, aliases; nothing newer.
pymilvus is imported by :func:`load`, when the first connection is made: the import costs a quarter of a second of CPU, and
twice that with pandas, which it is spared.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

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
from job_runner.without_pandas import without_pandas
from task_contract.errors import RetryableError, StoreCapacity, StoreRefused, StoresDisagree, StoreUnavailable, TaskError
from task_contract.names import KNOWLEDGE_BASE_PREFIX

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

P = ParamSpec("P")
R = TypeVar("R")

TIMEOUT: Final = 15.0
"""Seconds for one call; the client repeats what a restarting server refuses within it."""
_CREATE_TIMEOUT: Final = 60.0
_UNDER_WAY: Final = 2.0
"""Seconds in which who came first has made what it makes: Milvus Lite refuses the second before it shows the first."""
_READ_LIMIT: Final = 16_384
"""Milvus' own limit on rows of one answer (proxy.maxResultWindow)."""
_WINDOW: Final = 8_192
_WRITE_ROWS: Final = 1_024
_WRITE_BYTES: Final = 8_000_000
"""A call at most: an eighth of Milvus' limit on a message."""
_ROW_BYTES: Final = 2_000
"""Of a row beside its vector, text and metadata."""
_HASHES: Final = 256
"""Texts that are asked for at once."""
_DELETE_IDS: Final = 1_000
_GONE_SECONDS: Final = 15.0
"""How long rows that were deleted are waited for, in pauses: a busy server may take its time for each call."""

# Codes of pymilvus and of Milvus 2.3 and later (pkg/util/merr); milvus-lite uses 1 for many things.
_CONNECTION_CODES: Final = frozenset({2, 5, 10, 1400, 1401})
_BUSY_CODES: Final = frozenset({3, 4, 7, 8, 9})
"""Memory, requests, disk, rate, quota: the server is there and takes no more now."""
_LIMIT_CODES: Final = frozenset({102})
_BAD_ROW_CODES: Final = frozenset({6, 1100, 1101, 1102})
"""6 is milvus-lite's; of a server it would say that the client asks a wrong cluster."""
_BAD_ROWS: Final = re.compile("exceeds? max|divide the dim|expected dim|not a number|larger than max")
"""Refusals that Milvus 2.3 gives the code of every unexpected error."""

_DYNAMIC: Final = frozenset({"keywords"})
"""Columns beside the schema. Milvus takes no default for a list, and without one it would refuse the rows of pods of an
earlier release, which go on writing for a while."""

_PASSING: Final = ("unavailable", "deadline", "timeout", "auth", "connect", "not loaded", "not ready")
"""Words of errors that waiting, or an administrator, cures."""


def _written_at_once(rows: Sequence[Row], dimension: int) -> Iterator[slice]:
    """Yield which rows are written by one call: as many as can be, each call has a log to wait for."""
    start = size = 0
    for index, row in enumerate(rows):
        more = 4 * (dimension + len(row.text) + sum(len(value) for value in row.metadata.values())) + _ROW_BYTES
        if index > start and (index - start >= _WRITE_ROWS or size + more > _WRITE_BYTES):
            yield slice(start, index)
            start, size = index, 0
        size += more
    if start < len(rows):
        yield slice(start, len(rows))


class MilvusIndex:
    """One collection. Construct it cheaply; the first call connects."""

    def __init__(self, generation: Generation, *, url: str, token: str | None, dimension: int, label: str = "") -> None:
        self._generation = generation
        self._name = generation.name
        self._url = url
        self._token = token
        self._dimension = dimension
        self._label = label
        self._client: Any = None
        self._columns: frozenset[str] = frozenset()
        self._connecting = asyncio.Lock()

    async def aclose(self) -> None:
        """Close the connection."""
        if self._client is not None:
            await asyncio.to_thread(self._client.close)
            self._client = None

    async def warm_up(self) -> None:
        """Import the client and connect, while something else is being done."""
        async with self._connecting:
            if self._client is None:
                self._client = await asyncio.to_thread(connect, self._url, self._token)

    async def ensure(self) -> None:
        """Create collection, index and alias where they are missing, and load the collection."""
        await self._run("create the collection", self._ensure)

    def _ensure(self) -> None:
        """Each step looks first and, when it fails, looks again: another pod may have been there in between."""
        client, name = self._client, self._name
        if not client.has_collection(name, timeout=TIMEOUT):
            _unless(
                lambda: client.has_collection(name, timeout=TIMEOUT),
                lambda: client.create_collection(
                    name, schema=_schema(self._dimension, self._label), consistency_level="Strong", timeout=_CREATE_TIMEOUT
                ),
            )
        if not client.list_indexes(name, timeout=TIMEOUT):
            indexes = client.prepare_index_params()
            indexes.add_index("embedding", index_type="HNSW", metric_type="COSINE", params={"M": 16, "efConstruction": 200})
            _unless(
                lambda: bool(client.list_indexes(name, timeout=TIMEOUT)),
                # Not waiting for it: loading does, and an empty collection has nothing to index.
                lambda: client.create_index(name, indexes, timeout=_CREATE_TIMEOUT, sync=False),
            )
        client.load_collection(name, timeout=_CREATE_TIMEOUT)
        # An alias that serves another generation stays: switching generations is a step of its own.
        if not self._has_alias():
            _unless(self._has_alias, lambda: client.create_alias(name, self._generation.alias, timeout=TIMEOUT))

    def _has_alias(self) -> bool:
        return bool(self._client.has_collection(self._generation.alias, timeout=TIMEOUT))

    async def stored(self, document_id: str, version: int, *, first: int = 0, below: int | None = None) -> dict[str, str]:
        """Return chunk id → content hash, read with Strong consistency."""
        condition = f"document_id == {_quoted(document_id)} and version == {version}"
        condition += f" and ordinal >= {first}" if first else ""
        condition += f" and ordinal < {below}" if below is not None else ""
        rows = await self._run("read", self._stored, condition, first)
        return {row["id"]: row["content_hash"] for row in rows}

    def _stored(self, condition: str, first: int) -> list[dict[str, Any]]:
        fields = ["id", "content_hash", "ordinal"]
        rows = self._query(condition, fields)
        if len(rows) < _READ_LIMIT:
            return rows
        # More than one answer holds: windows of ordinals, of which a version has each at most once, up to the count.
        count = int(self._query(condition, ["count(*)"])[0]["count(*)"])
        rows, start = [], first
        while len(rows) < count and start < 1 << 31:
            rows += self._query(f"{condition} and ordinal >= {start} and ordinal < {start + _WINDOW}", fields)
            start += _WINDOW
        return rows

    async def read(self, document_id: str, version: int) -> AsyncIterator[list[Row]]:
        """Yield rows without their vectors, read with Strong consistency."""
        async for part in self._parts(document_id, version, embedding=False):
            yield [Row.of(row, id=row["id"]) for row in part]

    async def read_with_vectors(
        self, document_id: str, version: int
    ) -> "AsyncIterator[tuple[list[Row], npt.NDArray[np.float32]]]":
        """Yield rows and vectors, read with Strong consistency."""
        import numpy as np

        async for part in self._parts(document_id, version, embedding=True):
            vectors = np.asarray([row["embedding"] for row in part], dtype=np.float32)
            yield [Row.of(row, id=row["id"]) for row in part], vectors

    async def _parts(self, document_id: str, version: int, *, embedding: bool) -> AsyncIterator[list[dict[str, Any]]]:
        condition = f"document_id == {_quoted(document_id)} and version == {version}"
        known = await self._run("look for the columns", self._known_columns)
        fields = [name for name in ("id", *FIELDS, *(["embedding"] if embedding else [])) if name in known]
        # Of most documents one answer holds all; Milvus 2.3 sorts none.
        rows = await self._run("read", self._query, condition, fields, READ_AT_ONCE)
        if len(rows) < READ_AT_ONCE:
            if rows:
                yield _in_order(rows)
            return
        count = await self._run("count", self._count, condition)
        found, start = 0, 0
        while found < count and start < 1 << 31:
            window = f"{condition} and ordinal >= {start} and ordinal < {start + READ_AT_ONCE}"
            if rows := await self._run("read", self._query, window, fields):
                yield _in_order(rows)
            found += len(rows)
            start += READ_AT_ONCE

    def _query(self, condition: str, fields: Sequence[str], most: int = _READ_LIMIT) -> list[dict[str, Any]]:
        limit = {} if fields == ["count(*)"] else {"limit": most}
        answer = self._client.query(
            self._name,
            filter=condition,
            output_fields=list(fields),
            consistency_level="Strong",
            timeout=TIMEOUT,
            **limit,
        )
        beat()  # of a large version there are many answers
        return list(answer)

    async def scan(self) -> AsyncIterator[list[Stored]]:
        """Yield all rows in the order of their ids, read with Strong consistency."""
        if not await self._run("look for the collection", self._exists):
            return
        pages = await self._run("read", self._pages)
        try:
            while rows := await self._run("read", pages.next):
                yield [
                    Stored(id=row["id"], **{name: row.get(name, ADDED.get(name)) for name in STORED_FIELDS}) for row in rows
                ]
        finally:
            pages.close()

    def _exists(self) -> bool:
        return bool(self._client.has_collection(self._name, timeout=TIMEOUT))

    def _pages(self) -> Any:
        fields = [name for name in ("id", *STORED_FIELDS) if name in self._known_columns()]
        return self._client.query_iterator(
            self._name, batch_size=_WINDOW, output_fields=fields, consistency_level="Strong", timeout=TIMEOUT
        )

    def _known_columns(self) -> frozenset[str]:
        """Return the columns that the collection has, asked once: a column cannot be added to it in Milvus 2.3."""
        if not self._columns:
            described = self._client.describe_collection(self._name, timeout=TIMEOUT)
            dynamic = _DYNAMIC if described.get("enable_dynamic_field") else frozenset()
            self._columns = frozenset(field["name"] for field in described["fields"]) | dynamic
        return self._columns

    async def has_all_columns(self) -> bool:
        """Tell whether the collection has every column."""
        return ADDED.keys() <= await self._run("look for the columns", self._known_columns)

    async def write(self, rows: Sequence[Row], vectors: "npt.NDArray[np.float32]") -> None:
        """Upsert: insert alone would leave two rows of one id after a retry (milvus-io/milvus#37389)."""
        for part in _written_at_once(rows, vectors.shape[1]):
            data = [
                {**columns_of(row), "metadata": dict(row.metadata), "keywords": list(row.keywords), "embedding": vector}
                for row, vector in zip(rows[part], vectors[part], strict=True)
            ]
            await self._run("write", self._upsert, data)

    def _upsert(self, data: list[dict[str, Any]]) -> None:
        if missing := ADDED.keys() - self._known_columns():
            data = [{name: value for name, value in row.items() if name not in missing} for row in data]
        self._client.upsert(self._name, data, timeout=TIMEOUT)

    async def delete(self, ids: Collection[str]) -> None:
        """Remove rows by id."""
        listed = list(ids)
        for start in range(0, len(listed), _DELETE_IDS):
            part = listed[start : start + _DELETE_IDS]
            await self._run("delete", self._delete, ids=part)

    async def exists(self) -> bool:
        """Tell whether the collection is there."""
        return await self._run("look for the collection", self._exists)

    async def count(self, stale: Sequence[Stale]) -> int:
        """Count with Strong consistency."""
        if not stale or not await self.exists():
            return 0
        return await self._run("count", self._count, _stale(stale))

    async def remove(self, stale: Sequence[Stale]) -> int:
        """Remove by expression, then count until there are none."""
        found = left = await self.count(stale)
        condition = _stale(stale)
        waited, pause = 0.0, 0.1
        while left > 0:
            if waited > _GONE_SECONDS:
                raise StoresDisagree(f"cannot remove old versions from Milvus: {left} rows are still in {self._name}")
            await self._run("delete", self._delete, filter=condition)
            if left := await self._run("count", self._count, condition):
                await asyncio.sleep(pause)
                waited += pause
                pause *= 2
        return found

    async def serves(self) -> bool:
        """Ask for the collection behind the alias."""
        return await self._run("look for the alias", self._serves)

    def _serves(self) -> bool:
        if not self._has_alias():
            return False
        described = self._client.describe_collection(self._generation.alias, timeout=TIMEOUT)
        return bool(described["collection_name"] == self._name)

    async def serve(self) -> None:
        """Create or alter the alias, which is one step in Milvus."""
        await self._run("switch the alias", self._serve)

    def _serve(self) -> None:
        name, alias = self._name, self._generation.alias
        if not self._has_alias():
            _unless(self._has_alias, lambda: self._client.create_alias(name, alias, timeout=TIMEOUT))
        if not self._serves():
            _unless(self._serves, lambda: self._client.alter_alias(name, alias, timeout=TIMEOUT))

    async def drop(self) -> bool:
        """Drop the collection; Milvus wants its alias to be dropped before."""
        there = await self.exists()
        await self._run("drop the collection", self._drop)
        return there

    def _drop(self) -> None:
        client, name, alias = self._client, self._name, self._generation.alias
        self._columns = frozenset()
        if not client.has_collection(name, timeout=TIMEOUT):
            return
        if self._serves():
            _unless(lambda: not self._has_alias(), lambda: client.drop_alias(alias, timeout=TIMEOUT))
        _unless(
            lambda: not client.has_collection(name, timeout=TIMEOUT),
            lambda: client.drop_collection(name, timeout=_CREATE_TIMEOUT),
        )
        if client.has_collection(name, timeout=TIMEOUT):
            raise StoresDisagree(f"cannot remove the collection {name} from Milvus: it is still there")

    def _delete(self, **what: object) -> None:
        self._client.delete(self._name, timeout=TIMEOUT, **what)

    def _count(self, condition: str) -> int:
        return int(self._query(condition, ["count(*)"])[0]["count(*)"])

    async def vectors(
        self, document_id: str, version: int, text_hashes: Collection[str]
    ) -> "dict[str, npt.NDArray[np.float32]]":
        """Return vectors by text hash."""
        import numpy as np

        condition = f"document_id == {_quoted(document_id)} and version == {version}"
        found: dict[str, npt.NDArray[np.float32]] = {}
        listed = sorted(text_hashes)
        for start in range(0, len(listed), _HASHES):
            hashes = json.dumps(listed[start : start + _HASHES])
            rows = await self._run("read", self._query, f"{condition} and text_hash in {hashes}", ["text_hash", "embedding"])
            found |= {row["text_hash"]: np.asarray(row["embedding"], dtype=np.float32) for row in rows}
        return found

    async def search(
        self, vector: "npt.NDArray[np.float32]", *, limit: int, offset: int = 0, filters: Filters | None = None
    ) -> list[Hit]:
        """Return the nearest rows by cosine."""
        condition = _condition(filters) if filters else ""
        return await self._run("search", self._search, vector.tolist(), limit, offset, condition)

    def _search(self, vector: list[float], limit: int, offset: int, condition: str) -> list[Hit]:
        answer = self._client.search(
            self._name,
            filter=condition,
            data=[vector],
            limit=limit,
            output_fields=["id", *HIT_FIELDS],
            search_params={"metric_type": "COSINE", "params": {"ef": max(64, limit + offset)}, "offset": offset},
            consistency_level="Strong",
            timeout=TIMEOUT,
        )
        return [Hit.of(hit["entity"], id=hit["entity"]["id"], score=float(hit["distance"])) for hit in answer[0]]

    async def _run(self, action: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the client in a thread, again while the server is busy: any call may be. Its exceptions become ours."""
        guarded = partial(call, *args, **kwargs)

        async def once() -> R:
            await self.warm_up()
            return await asyncio.to_thread(_guarded, f"{action} in {self._name}", guarded)

        with asked("milvus"):
            return await patiently(once)


def _guarded(action: str, call: Callable[[], R]) -> R:
    import grpc  # type: ignore[import-untyped]  # pymilvus depends on it, its types come from no package of ours
    from pymilvus import MilvusException

    try:
        return call()
    except (MilvusException, grpc.RpcError) as error:
        raise _converted(action, error) from error


def load() -> Any:
    """Import the client, and return its class; blocking."""
    with without_pandas("pymilvus"):
        from pymilvus import MilvusClient
    return MilvusClient


def connect(url: str, token: str | None) -> Any:
    """Return a client; blocking. Raises StoreUnavailable."""
    client = load()
    # The client logs each failed call with its stack trace; ours are raised, and said once.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    return _guarded("connect", partial(client, url, token=token or "", timeout=TIMEOUT))


async def labels(url: str, token: str | None) -> list[Label]:
    """Return the labels of all collections of ours that have one. Raises StoreUnavailable."""
    client = await asyncio.to_thread(connect, url, token)

    def read() -> list[Label]:
        names = [name for name in client.list_collections(timeout=TIMEOUT) if name.startswith(KNOWLEDGE_BASE_PREFIX)]
        described = ((name, client.describe_collection(name, timeout=TIMEOUT)) for name in names)
        found = (Label.read(collection.get("description", ""), name=name) for name, collection in described)
        return [label for label in found if label is not None]

    try:
        return await patiently(partial(asyncio.to_thread, _guarded, "list the collections", read))
    finally:
        await asyncio.to_thread(client.close)


def check(url: str, token: str | None) -> str:
    """Return what a health check says of the server; blocking. Raises StoreUnavailable."""
    client = connect(url, token)
    try:
        return f"Milvus {_guarded('ask for the version', partial(client.get_server_version, timeout=TIMEOUT))}"
    finally:
        client.close()


def _converted(action: str, error: Exception) -> TaskError:
    code = getattr(error, "code", None)
    message = str(getattr(error, "message", "") or error)
    text = f"cannot {action}: Milvus: {message[:500]}"
    lowered = message.lower()
    if code in _LIMIT_CODES or ("collection" in lowered and "exceed" in lowered and "limit" in lowered):
        return StoreCapacity(f"{text}; remove unused knowledge bases, or raise Milvus' limit on collections")
    if code in _BAD_ROW_CODES or isinstance(error, _mismatch()) or _BAD_ROWS.search(lowered):
        return StoreRefused(f"{text}; correct the task, or rebuild a knowledge base whose collection has other columns")
    if code in _BUSY_CODES or (callable(code) and code().name == "RESOURCE_EXHAUSTED"):  # gRPC's own: of a proxy, perhaps
        return Busy(f"{text}; check the server's load, memory and disk")
    if callable(code) or code in _CONNECTION_CODES or any(words in lowered for words in _PASSING):
        return StoreUnavailable(f"{text}; check TASKS_MILVUS_URL and the server")
    return RetryableError(text)


def _mismatch() -> type[Exception]:
    from pymilvus.exceptions import DataNotMatchException

    mismatch: type[Exception] = DataNotMatchException
    return mismatch


def _unless(done: Callable[[], bool], act: Callable[[], object]) -> None:
    """Act; if that fails, it is no error when somebody else has done it meanwhile, or is about to have done it."""
    from pymilvus import MilvusException

    try:
        act()
    except MilvusException:
        until = time.monotonic() + _UNDER_WAY
        while not done():
            if time.monotonic() >= until:
                raise
            time.sleep(_UNDER_WAY / 10)  # in a thread of its own, as all that this client does


def _schema(dimension: int, label: str = "") -> Any:
    from pymilvus import CollectionSchema, DataType, FieldSchema

    integers = {"version", "ordinal", "page_start", "page_end", "char_start", "char_end", "chunk_count", "tokens"}
    # Milvus counts bytes: four a character at most. Bounds are those of the contract and of the splitter.
    lengths = {"document_id": 4_096, "text": 65_535, "heading_path": 4_096, "summary": 4_096}
    fields = [FieldSchema("id", DataType.VARCHAR, max_length=64, is_primary=True)]
    for name in FIELDS:
        if name in _DYNAMIC:
            continue
        default = {"default_value": ADDED[name]} if name in ADDED else {}
        if name in integers:
            fields.append(FieldSchema(name, DataType.INT64, **default))
        elif name == "metadata":
            fields.append(FieldSchema(name, DataType.JSON))
        else:
            fields.append(FieldSchema(name, DataType.VARCHAR, max_length=lengths.get(name, 128), **default))
    fields.append(FieldSchema("embedding", DataType.FLOAT_VECTOR, dim=dimension))
    return CollectionSchema(fields, description=label, enable_dynamic_field=True)


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: int(row["ordinal"]))


def _condition(filters: Filters) -> str:
    """Return an expression of Milvus; everything that a person gave stands in it as a quoted literal."""
    clauses = []
    if filters.document_ids:
        clauses.append(f"document_id in {json.dumps(filters.document_ids, ensure_ascii=False)}")
    if filters.language is not None:
        clauses.append(f"language == {_quoted(filters.language)}")
    clauses += [f"metadata[{_quoted(key)}] == {_quoted(value)}" for key, value in filters.metadata]
    if filters.headings:
        path = "\n".join(filters.headings)
        # A range of strings, since `like` gives % and _ a meaning: what is below the path begins with it and a line's end.
        first, last = _quoted(f"{path}\n"), _quoted(f"{path}\n\U0010ffff")
        below = f"(heading_path >= {first} and heading_path < {last})"
        clauses.append(f"(heading_path == {_quoted(path)} or {below})")
    if filters.pages is not None:
        from_page, to_page = filters.pages
        clauses.append(f"page_start <= {to_page} and page_end >= {from_page}")
    clauses += [f"json_contains(keywords, {_quoted(keyword.lower())})" for keyword in filters.keywords]
    if filters.without_duplicates:
        clauses.append('duplicate_of == ""')
    return " and ".join(clauses)


def _stale(stale: Sequence[Stale]) -> str:
    def clause(up_to: int, keep: tuple[int, ...], documents: list[str]) -> str:
        kept = f" and version not in {list(keep)}" if keep else ""
        return f"(document_id in {json.dumps(documents, ensure_ascii=False)} and version <= {up_to}{kept})"

    return " or ".join(clause(*versions, documents) for versions, documents in alike(stale).items())


def _quoted(text: str) -> str:
    """Return a string literal of Milvus' expression language, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)
