"""Do both stores hold exactly what the ledger publishes? A check of a whole knowledge base.

It compares sets of chunk ids, not counts, and goes over all rows of both stores once, in memory that grows with the number
of documents and not with that of chunks: an id follows from document, version and ordinal, so that each row by itself tells
whether it belongs. What looks wrong is looked at once more, document by document, since tasks go on publishing meanwhile.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from job_runner.index import ChunkStore, Generation, Stored
from job_runner.ledger import Contents, Ledger, Published
from job_runner.stores import Stores

LOOKS: Final = 5
"""How often a document is looked at again because a task published it meanwhile."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """How one document differs from the ledger."""

    document_id: str
    version: int | None
    """What readers should see; ``None``: the ledger has no such document, or it is not published."""
    milvus_missing: int = 0
    milvus_extra: int = 0
    elasticsearch_missing: int = 0
    elasticsearch_extra: int = 0

    @property
    def missing(self) -> int:
        """Chunks of the published version that a store lacks, summed over both."""
        return self.milvus_missing + self.elasticsearch_missing

    @property
    def extra(self) -> int:
        """Rows of no version that somebody sees or writes, summed over both stores."""
        return self.milvus_extra + self.elasticsearch_extra


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found. Documents without a deviation are in both stores as the ledger says."""

    documents: int
    chunks: int
    deviations: tuple[Deviation, ...]

    @property
    def consistent(self) -> bool:
        """Whether nothing is missing and nothing is extra."""
        return not self.deviations

    def as_text(self) -> str:
        """Return what was found, for people, with the remedy."""
        held = f"{self.documents} documents, {self.chunks} chunks"
        if self.consistent:
            return f"{held}: Milvus and Elasticsearch hold exactly these"
        lines = [f"{held}; of {len(self.deviations)} documents the stores hold something else:"]
        lines += [
            f"  {one.document_id}, {'not published' if one.version is None else f'version {one.version}'}: "
            f"Milvus misses {one.milvus_missing} chunks and has {one.milvus_extra} rows too many, "
            f"Elasticsearch misses {one.elasticsearch_missing} and has {one.elasticsearch_extra}"
            for one in self.deviations
        ]
        if any(one.missing for one in self.deviations):
            lines.append("Create the tasks of documents with missing chunks again: they are written anew from what is left.")
        if any(one.extra for one in self.deviations):
            lines.append("Rows too many are not seen by readers of the ledger; the next publication or sweep removes them.")
        return "\n".join(lines)


@dataclass(slots=True)
class Tally:
    """What one store holds, by document: rows of the published version, and versions of which there are other rows."""

    belonging: Counter[str] = field(default_factory=Counter)
    other: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def suspects(self, contents: Contents) -> set[str]:
        """Return the documents that are not as the ledger says."""
        short = {name for name, is_ in contents.published.items() if self.belonging[name] != is_.chunk_count}
        return short | self.other.keys()


def belongs(row: Stored, published: Published | None, generation: Generation) -> bool:
    """Tell whether a row is one of the chunks of a published version."""
    return (
        published is not None
        and row.version == published.version
        and row.content_hash == published.content_hash
        and 0 <= row.ordinal < published.chunk_count
        and row.id == generation.chunk_id(row.document_id, row.version, row.ordinal)
    )


async def tally(rows: AsyncIterable[list[Stored]], contents: Contents, generation: Generation) -> Tally:
    """Sort the rows of one store. Rows of intents are neither: a task is writing them."""
    found = Tally()
    async for page in rows:
        for row in page:
            if belongs(row, contents.published.get(row.document_id), generation):
                found.belonging[row.document_id] += 1
            elif (row.document_id, row.version) not in contents.intents:
                found.other[row.document_id].add(row.version)
    return found


async def compare(generation: Generation, *, ledger: Ledger, stores: Stores) -> tuple[Contents, dict[str, set[int]]]:
    """Go over both stores; return what they should hold, and the documents that look wrong, with versions of other rows."""
    contents = await ledger.contents(generation)
    tallies = await asyncio.gather(
        tally(stores.vectors.scan(), contents, generation), tally(stores.texts.scan(), contents, generation)
    )
    names = sorted(set().union(*(found.suspects(contents) for found in tallies)))
    return contents, {name: set().union(*(found.other.get(name, ()) for found in tallies)) for name in names}


async def verify(generation: Generation, *, ledger: Ledger, stores: Stores) -> Report:
    """Compare both stores with the ledger, and enter what was found there.

    Raises StoreUnavailable. A document that tasks publish again and again while it is looked at counts as it is: each of
    them has read both stores back.
    """
    contents, suspects = await compare(generation, ledger=ledger, stores=stores)
    deviations = []
    for name, versions in suspects.items():
        found = await _look(name, versions, generation, ledger=ledger, stores=stores)
        if found is not None:
            deviations.append(found)
    await ledger.record_check(generation, contents, {one.document_id: (one.missing, one.extra) for one in deviations})
    return Report(
        documents=sum(published.chunk_count > 0 for published in contents.published.values()),
        chunks=sum(published.chunk_count for published in contents.published.values()),
        deviations=tuple(deviations),
    )


async def _look(
    name: str, versions: Collection[int], generation: Generation, *, ledger: Ledger, stores: Stores
) -> Deviation | None:
    """Look at one document closely; ``None`` if it is as it should be."""
    before = await ledger.contents(generation, document_id=name)
    for _ in range(LOOKS):
        published = before.published.get(name)
        expected = {} if published is None else published.rows(generation, name)
        milvus, elasticsearch = await asyncio.gather(
            _differences(stores.vectors, name, published, expected, versions, before),
            _differences(stores.texts, name, published, expected, versions, before),
        )
        after = await ledger.contents(generation, document_id=name)
        if after == before:
            if not any((*milvus, *elasticsearch)):
                return None
            return Deviation(name, None if published is None else published.version, *milvus, *elasticsearch)
        before = after
    return None


async def _differences(
    store: ChunkStore,
    name: str,
    published: Published | None,
    expected: Mapping[str, str],
    versions: Collection[int],
    contents: Contents,
) -> tuple[int, int]:
    """Return how many rows one store lacks, and how many it has that nobody needs."""
    stored = {} if published is None else await store.stored(name, published.version)
    right = {key for key, content in stored.items() if expected.get(key) == content}
    extra = len(stored) - len(right)
    for version in versions:
        if (name, version) not in contents.intents and (published is None or version != published.version):
            extra += len(await store.stored(name, version))
    return len(expected) - len(right), extra
