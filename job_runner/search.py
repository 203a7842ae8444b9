"""Questions to a knowledge base, answered by each store alone: what is published, and nothing else."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from job_runner.embed import Embedder
from job_runner.index import Generation, Hit
from job_runner.ledger import Ledger
from job_runner.stores import OpenStores
from task_contract.errors import DocumentNotFound, ModelMismatch

_PAGES: Final = 10
"""How many pages of hits are looked through for published ones: others are there for the seconds of a publication."""

Find = Callable[[int, int], Awaitable[list[Hit]]]
"""Called with (limit, offset)."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The best published chunks of each store, the best first."""

    milvus: list[Hit]
    elasticsearch: list[Hit]


async def search(
    query: str, *, namespace: str, kb_id: str, top_k: int, ledger: Ledger, embedder: Embedder, open_stores: OpenStores
) -> Answers:
    """Ask both stores.

    Raises DocumentNotFound for a knowledge base that is not there, and ModelMismatch for one of another model.
    """
    found = await ledger.knowledge_base(namespace=namespace, kb_id=kb_id)
    if found is None:
        raise DocumentNotFound(f"cannot search {kb_id}: namespace {namespace} has no such knowledge base; check both names")
    if await ledger.is_empty(namespace=namespace, kb_id=kb_id):
        return Answers(milvus=[], elasticsearch=[])
    generation, fingerprint, _ = found
    if fingerprint != await asyncio.to_thread(lambda: embedder.fingerprint):
        raise ModelMismatch(f"cannot search {kb_id}: it was filled with model {fingerprint}; set TASKS_EMBEDDING_MODEL")
    stores = open_stores(Generation(namespace, kb_id, generation))

    async def by_meaning() -> list[Hit]:
        vector = await asyncio.to_thread(embedder.embed_query, query)
        return await published_hits(lambda limit, offset: stores.vectors.search(vector, limit=limit, offset=offset))

    async def by_words() -> list[Hit]:
        return await published_hits(lambda limit, offset: stores.texts.search(query, limit=limit, offset=offset))

    async def published_hits(find: Find) -> list[Hit]:
        kept: list[Hit] = []
        size = 2 * top_k
        for page in range(_PAGES):
            hits = await find(size, page * size)
            documents = sorted({hit.document_id for hit in hits})
            versions = await ledger.published(namespace=namespace, kb_id=kb_id, document_ids=documents)
            kept += [hit for hit in hits if versions.get(hit.document_id) == hit.version]
            if len(kept) >= top_k or len(hits) < size:
                break
        return kept[:top_k]

    try:
        milvus, elasticsearch = await asyncio.gather(by_meaning(), by_words())
    finally:
        await stores.aclose()
    return Answers(milvus=milvus, elasticsearch=elasticsearch)
