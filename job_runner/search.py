"""Questions to a knowledge base: what is published, and nothing else, by meaning, by words, and by both together.

Scores of the two stores cannot be compared, their ranks can: both rankings become one by reciprocal-rank fusion, which needs
no numbers of either store and no tuning for a knowledge base.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from job_runner.embed import Embedder
from job_runner.index import Filters, Generation, Hit
from job_runner.ledger import Ledger
from job_runner.stores import OpenStores, Stores
from task_contract.errors import DocumentNotFound, ModelMismatch

_PAGES: Final = 10
"""How many pages of hits are looked through for published ones: others are there for the seconds of a publication."""
K: Final = 60
"""Of the fusion, as Cormack, Clarke and Büttcher found it best over many collections ("Reciprocal Rank Fusion outperforms
Condorcet and individual Rank Learning Methods", SIGIR 2009): the first few ranks differ little, so that what both stores
have well up comes before what one has first and the other not at all."""
_FUSED: Final = 20
"""Ranks of each store that are fused at least, whatever is asked for: of shorter lists few rows stand in both."""

Find = Callable[[int, int], Awaitable[list[Hit]]]
"""Called with (limit, offset)."""


class Mode(StrEnum):
    """Which store is asked."""

    DENSE = "dense"
    """Milvus: by meaning."""
    KEYWORD = "keyword"
    """Elasticsearch: by words. Needs no model."""
    HYBRID = "hybrid"
    """Both, and one ranking made of theirs."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a store has a row."""

    rank: int
    """1 is the best."""
    score: float


@dataclass(frozen=True, slots=True)
class Fused:
    """A row with its place in the common ranking, and where it comes from."""

    hit: Hit
    """Its score is that of the fusion, the sum of 1 / (60 + rank) over the stores."""
    milvus: Place | None
    """``None``: not among the ranks that were fused."""
    elasticsearch: Place | None


@dataclass(frozen=True, slots=True)
class Answers:
    """The best published chunks of each store and of both together, the best first; of a store not asked there are none."""

    milvus: list[Hit]
    elasticsearch: list[Hit]
    fused: list[Fused]


def fuse(milvus: Sequence[Hit], elasticsearch: Sequence[Hit]) -> list[Fused]:
    """Make one ranking of two. Of equal scores the better one by meaning is first: ids differ between knowledge bases."""
    by_meaning, by_words = _places(milvus), _places(elasticsearch)
    rows = {hit.id: hit for hit in (*milvus, *elasticsearch)}

    def fused(key: str) -> Fused:
        places = by_meaning.get(key), by_words.get(key)
        score = sum(1 / (K + place.rank) for place in places if place is not None)
        return Fused(rows[key].scored(score), *places)

    # The rows of Milvus in their order, then those that Elasticsearch alone has: sorting leaves equal ones as they stand.
    return sorted(map(fused, rows), key=lambda one: -one.hit.score)


def _places(hits: Sequence[Hit]) -> Mapping[str, Place]:
    return {hit.id: Place(rank, hit.score) for rank, hit in enumerate(hits, start=1)}


class _Versions(Protocol):
    """What of the ledger a search asks."""

    async def published(self, *, namespace: str, kb_id: str, document_ids: list[str]) -> dict[str, int]: ...


class Searcher:
    """Asks one generation, whether it serves or not; of each document the version that the ledger publishes counts.

    The embedder must be that of the generation; without one only words are asked for. The stores stay the caller's to close.
    """

    def __init__(self, generation: Generation, *, stores: Stores, embedder: Embedder | None, ledger: _Versions) -> None:
        self._generation = generation
        self._stores = stores
        self._embedder = embedder
        self._ledger = ledger
        self._computing = asyncio.Lock()
        """Several may ask at once, and a model may not be made for it."""

    async def ask(self, query: str, *, top_k: int = 5, filters: Filters | None = None, mode: Mode = Mode.HYBRID) -> Answers:
        """Return the best ``top_k`` of each ranking. Raises StoreUnavailable."""
        depth = max(top_k, _FUSED) if mode is Mode.HYBRID else top_k
        milvus, elasticsearch = await asyncio.gather(
            self._by_meaning(query, depth, filters) if mode is not Mode.KEYWORD else _nothing(),
            self._by_words(query, depth, filters) if mode is not Mode.DENSE else _nothing(),
        )
        return Answers(milvus=milvus[:top_k], elasticsearch=elasticsearch[:top_k], fused=fuse(milvus, elasticsearch)[:top_k])

    async def _by_meaning(self, query: str, depth: int, filters: Filters | None) -> list[Hit]:
        assert self._embedder is not None  # noqa: S101 - for the type checker: who asks by meaning gives one
        async with self._computing:
            vector = await asyncio.to_thread(self._embedder.embed_query, query)
        return await self._published(
            lambda limit, offset: self._stores.vectors.search(vector, limit=limit, offset=offset, filters=filters), depth
        )

    async def _by_words(self, query: str, depth: int, filters: Filters | None) -> list[Hit]:
        return await self._published(
            lambda limit, offset: self._stores.texts.search(query, limit=limit, offset=offset, filters=filters), depth
        )

    async def _published(self, find: Find, depth: int) -> list[Hit]:
        """Return the best hits that are published, however many stand before them that are not."""
        kept: list[Hit] = []
        size = 2 * depth
        for page in range(_PAGES):
            hits = await find(size, page * size)
            versions = await self._ledger.published(
                namespace=self._generation.namespace,
                kb_id=self._generation.kb_id,
                document_ids=sorted({hit.document_id for hit in hits}),
            )
            kept += [hit for hit in hits if versions.get(hit.document_id) == hit.version]
            if len(kept) >= depth or len(hits) < size:
                break
        return kept[:depth]


async def _nothing() -> list[Hit]:
    return []


class Ask(Protocol):
    """As :meth:`Searcher.ask`."""

    async def __call__(
        self, query: str, *, top_k: int = 5, filters: Filters | None = None, mode: Mode = Mode.HYBRID
    ) -> Answers:
        """Return the best of each ranking."""


@asynccontextmanager
async def serving(
    *, namespace: str, kb_id: str, ledger: Ledger, embedder: Embedder | None, open_stores: OpenStores
) -> AsyncIterator[Ask]:
    """Open the generation of a knowledge base that serves, and yield what asks it. Without an embedder words alone.

    Raises DocumentNotFound for a knowledge base that is not there, and ModelMismatch for one of another model.
    """
    found = await ledger.knowledge_base(namespace=namespace, kb_id=kb_id)
    if found is None:
        raise DocumentNotFound(f"cannot search {kb_id}: namespace {namespace} has no such knowledge base; check both names")
    if await ledger.is_empty(namespace=namespace, kb_id=kb_id):
        yield _nobody
        return
    number, fingerprint, _ = found
    if embedder is not None and fingerprint != await asyncio.to_thread(lambda: embedder.fingerprint):
        raise ModelMismatch(f"cannot search {kb_id}: it was filled with model {fingerprint}; set TASKS_EMBEDDING_MODEL")
    generation = Generation(namespace, kb_id, number)
    stores = open_stores(generation)
    try:
        yield Searcher(generation, stores=stores, embedder=embedder, ledger=ledger).ask
    finally:
        await stores.aclose()


async def _nobody(
    query: str,
    *,
    top_k: int = 5,
    filters: Filters | None = None,
    mode: Mode = Mode.HYBRID,
) -> Answers:
    """Answer for a knowledge base without documents, whose collection and index may not be there yet."""
    return Answers(milvus=[], elasticsearch=[], fused=[])


async def search(
    query: str, *, namespace: str, kb_id: str, top_k: int, ledger: Ledger, embedder: Embedder, open_stores: OpenStores
) -> Answers:
    """Ask the generation of a knowledge base that serves, once: see :func:`serving`."""
    async with serving(namespace=namespace, kb_id=kb_id, ledger=ledger, embedder=embedder, open_stores=open_stores) as ask:
        return await ask(query, top_k=top_k)
