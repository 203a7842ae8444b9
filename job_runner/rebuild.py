"""The ledger of a knowledge base from what both stores hold, for when PostgreSQL and its backups are lost.

The highest version of a document that is whole, and the same in both stores, is what readers see afterwards. A version is
whole when each store has all of its chunks: rows say how many there are. The stores do not know what was committed: a
version that was whole but waited for its commit is published by this. That is what its task was about to do, unless the
task was canceled in that moment or came too late.

What the ledger already says stays as it is. So it may run again, and while tasks run: a row that a task made meanwhile is
only given the numbers that it must not allot again.
"""

import asyncio
from collections.abc import AsyncIterable, Mapping, Sequence
from dataclasses import dataclass

from job_runner.index import Generation, Label, Stored
from job_runner.ledger import Ledger, Published, RebuiltDocument
from job_runner.stores import OpenLabelled, Stores

_Key = tuple[str, int]
"""(document id, version)."""


@dataclass(slots=True)
class VersionRows:
    """What one store holds of one version of a document."""

    content_hash: str
    task_uid: str
    chunk_count: int
    """As the rows say; 0 for rows of a release that did not say it."""
    rows: int = 0
    """Rows with the right id for their place."""
    last: int = -1
    """Highest ordinal."""
    mixed: bool = False
    """Whether rows of different content stand under one version: nobody publishes that."""

    @property
    def whole(self) -> bool:
        """Whether all chunks are there. Without a count, that nothing is missing up to the last one has to do."""
        return not self.mixed and self.rows == (self.chunk_count or self.last + 1)


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What became of one knowledge base."""

    documents: tuple[RebuiltDocument, ...]
    entered: int
    """Documents that the ledger sees as published now and did not before."""

    @property
    def incomplete(self) -> tuple[str, ...]:
        """Documents of which no version is whole in both stores: their tasks have to be created again."""
        return tuple(document.document_id for document in self.documents if document.published is None)

    def as_text(self, label: Label) -> str:
        """Return what became of the knowledge base, for people."""
        whole = len(self.documents) - len(self.incomplete)
        lines = [f"{label.namespace}/{label.kb_id}: {whole} documents are whole in both stores, {self.entered} entered"]
        lines += [f"  {document}: not whole in both stores; create its task again" for document in self.incomplete]
        return "\n".join(lines)


async def versions(rows: AsyncIterable[list[Stored]], generation: Generation) -> dict[_Key, VersionRows]:
    """Sum up the rows of one store by version."""
    found: dict[_Key, VersionRows] = {}
    async for page in rows:
        for row in page:
            key = row.document_id, row.version
            version = found.get(key)
            if version is None:
                version = found[key] = VersionRows(row.content_hash, row.task_uid, row.chunk_count)
            if (row.content_hash, row.chunk_count) != (version.content_hash, version.chunk_count):
                version.mixed = True
            if row.id == generation.chunk_id(row.document_id, row.version, row.ordinal):
                version.rows += 1
            version.last = max(version.last, row.ordinal)
    return found


def choose(milvus: Mapping[_Key, VersionRows], elasticsearch: Mapping[_Key, VersionRows]) -> list[RebuiltDocument]:
    """Return each document of which a store has rows, with the version that readers are to see."""
    numbers: dict[str, list[int]] = {}
    for document_id, number in milvus.keys() | elasticsearch.keys():
        numbers.setdefault(document_id, []).append(number)
    rebuilt = []
    for document_id, found in sorted(numbers.items()):
        keys = {number: (document_id, number) for number in found}
        whole = [number for number, key in keys.items() if _same(milvus.get(key), elasticsearch.get(key))]
        best = milvus[document_id, max(whole)] if whole else None
        rebuilt.append(
            RebuiltDocument(
                document_id=document_id,
                last_version=max(found),
                published=None if best is None else Published(max(whole), best.content_hash, best.rows),
                task_uid=None if best is None else best.task_uid,
            )
        )
    return rebuilt


def _same(left: VersionRows | None, right: VersionRows | None) -> bool:
    """Tell whether both stores have a version, whole and alike."""
    if left is None or right is None or not (left.whole and right.whole):
        return False
    return (left.content_hash, left.rows) == (right.content_hash, right.rows)


async def rebuild(label: Label, *, ledger: Ledger, stores: Stores, dry_run: bool = False) -> Rebuilt:
    """Read both stores and enter what the ledger lacks.

    Raises StoreUnavailable, and ModelMismatch or InvalidTask where the ledger knows the knowledge base with another model or
    generation.
    """
    generation = label.names
    milvus, elasticsearch = await asyncio.gather(
        versions(stores.vectors.scan(), generation), versions(stores.texts.scan(), generation)
    )
    documents = choose(milvus, elasticsearch)
    entered = 0
    if not dry_run:
        entered = await ledger.restore(label, documents)
    return Rebuilt(documents=tuple(documents), entered=entered)


async def serving(labels: Sequence[Label], open_labelled: OpenLabelled) -> list[Label]:
    """Return of each knowledge base the generation that serves: that of the alias, of those that rebuilds have left.

    Where no alias leads to any of them it is the youngest. Raises StoreUnavailable.
    """
    found: dict[tuple[str, str], Label] = {}
    for label in sorted(labels, key=lambda one: one.generation):
        key = label.namespace, label.kb_id
        if key not in found or await _is_served(label, open_labelled) or not await _is_served(found[key], open_labelled):
            found[key] = label
    return list(found.values())


async def _is_served(label: Label, open_labelled: OpenLabelled) -> bool:
    stores = open_labelled(label)
    try:
        return await stores.texts.serves()
    finally:
        await stores.aclose()
