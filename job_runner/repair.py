"""Ledger, Milvus and Elasticsearch alike again, where one of them has lost rows or has some too many.

What is right is what the ledger publishes, and each store is the other's copy:

- rows that Elasticsearch lacks are written there as Milvus has them;
- rows that Milvus lacks are written there as Elasticsearch has them, with vectors computed anew;
- rows of versions that nobody reads and nobody writes are removed;
- documents of which the ledger knows nothing at all are entered where they are whole in both stores, by the rules of
  :mod:`job_runner.rebuild`; where they are not their rows stay as they are, and the document is named;
- what neither store has is lost: the document is named, and has to be processed again.

Tasks go on meanwhile. A document that one of them publishes while it is looked at is looked at again; rows of a version that
a task is writing are left alone, and the numbers of rows that are removed are barred before, so that no task is given them.
It may die at any point and run again: every step makes the difference smaller.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from job_runner.consistency import LOOKS, compare
from job_runner.index import ChunkStore, Generation, Label, Row
from job_runner.ledger import Ledger, Published
from job_runner.rebuild import choose, versions
from job_runner.stores import Stores
from job_runner.watchdog import beat

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Embed = Callable[[Sequence[str]], "Awaitable[npt.NDArray[np.float32]]"]
"""Computes vectors of texts, in order."""

log = structlog.get_logger(__name__)


@dataclass
class Repaired:
    """What a repair has done."""

    documents: int = 0
    chunks: int = 0
    """That readers see."""
    changes: int = 0
    """Rows written and removed, and documents entered in the ledger."""
    embedded: int = 0
    lost: tuple[str, ...] = ()
    """Documents of which neither store has all chunks."""


async def repair(label: Label, *, ledger: Ledger, stores: Stores, embed: Embed) -> Repaired:
    """Repair the generation that serves, and enter in the ledger what was found.

    Raises StoreUnavailable, and what ``embed`` raises.
    """
    generation = label.names
    contents, suspects = await compare(generation, ledger=ledger, stores=stores)
    entered, unknown = await _enter_unknown(label, set(suspects) - contents.published.keys(), ledger=ledger, stores=stores)
    known = {name: found for name, found in suspects.items() if name not in unknown}
    repaired = await mend(generation, known, ledger=ledger, stores=stores, embed=embed)
    repaired.changes += entered
    # What is missing now is missing in both stores; the state of the knowledge base says so.
    missing = await _missing(generation, repaired.lost, ledger, stores)
    contents = await ledger.contents(generation)
    await ledger.record_check(generation, contents, {name: (count, 0) for name, count in missing.items()})
    repaired.documents = sum(one.chunk_count > 0 for one in contents.published.values())
    repaired.chunks = sum(one.chunk_count for one in contents.published.values())
    repaired.lost = tuple(sorted({*missing, *unknown}))
    return repaired


async def _enter_unknown(label: Label, names: Collection[str], *, ledger: Ledger, stores: Stores) -> tuple[int, set[str]]:
    """Enter documents that the ledger has lost; return how many, and which of them are not whole in both stores."""
    if not names or not (unknown := await ledger.unknown(label.names, names)):
        return 0, set()
    found = await asyncio.gather(versions(stores.vectors.scan(), label.names), versions(stores.texts.scan(), label.names))
    documents = [one for one in choose(*found) if one.document_id in unknown]
    whole = [one for one in documents if one.published is not None]
    entered = await ledger.restore(label, whole) if whole else 0
    log.info("documents entered in the ledger", entered=entered, incomplete=len(documents) - len(whole))
    return entered, {one.document_id for one in documents if one.published is None}


async def _missing(generation: Generation, names: Sequence[str], ledger: Ledger, stores: Stores) -> dict[str, int]:
    """Return how many chunks the stores lack, summed, of documents that have lost some."""
    found = {}
    for name in names:
        published = (await ledger.contents(generation, document_id=name)).published.get(name)
        if published is not None:
            expected = published.rows(generation, name)
            stored = await stores.stored(name, published.version)
            if missing := sum(len(expected) - len(_right(one, expected)) for one in stored):
                found[name] = missing
    return found


async def mend(
    generation: Generation, suspects: Mapping[str, Collection[int]], *, ledger: Ledger, stores: Stores, embed: Embed
) -> Repaired:
    """Make documents be in both stores as the ledger says.

    ``suspects``: as :func:`job_runner.consistency.compare` finds them. Of the answer documents and chunks do not count.
    """
    repaired = Repaired()
    lost = []
    for name, others in suspects.items():
        if await _mend(name, set(others), generation, ledger=ledger, stores=stores, embed=embed, repaired=repaired):
            lost.append(name)
        beat()
    repaired.lost = tuple(lost)
    return repaired


async def _mend(
    name: str,
    others: set[int],
    generation: Generation,
    *,
    ledger: Ledger,
    stores: Stores,
    embed: Embed,
    repaired: Repaired,
) -> bool:
    """Mend one document; return whether neither store has all of it."""
    if others:
        await ledger.bar(generation, name, up_to=max(others))
    before = await ledger.contents(generation, document_id=name)
    lost = False
    for _ in range(LOOKS):
        published = before.published.get(name)
        lost = published is not None and await _mend_published(
            name, published, generation, stores=stores, embed=embed, repaired=repaired
        )
        for version in sorted(others):
            if (name, version) not in before.intents and (published is None or version != published.version):
                for store in (stores.vectors, stores.texts):
                    repaired.changes += await _remove(store, await store.stored(name, version))
        after = await ledger.contents(generation, document_id=name)
        if after == before:
            break
        # A task has published it meanwhile: what was written here of the version before is of nobody now.
        others |= set() if published is None else {published.version}
        before = after
    return lost


async def _mend_published(
    name: str, published: Published, generation: Generation, *, stores: Stores, embed: Embed, repaired: Repaired
) -> bool:
    expected = published.rows(generation, name)
    in_vectors, in_texts = await stores.stored(name, published.version)
    vectors, texts = _right(in_vectors, expected), _right(in_texts, expected)
    repaired.changes += await _remove(stores.vectors, in_vectors.keys() - vectors)
    repaired.changes += await _remove(stores.texts, in_texts.keys() - texts)
    if vectors - texts:
        async for rows in stores.vectors.read(name, published.version):
            if missing := [row for row in rows if row.id in vectors and row.id not in texts]:
                await stores.texts.write(missing)
                repaired.changes += len(missing)
    if texts - vectors:
        async for rows in stores.texts.read(name, published.version):
            if missing := [row for row in rows if row.id in texts and row.id not in vectors]:
                await stores.vectors.write(missing, await embed(_texts(missing)))
                repaired.changes += len(missing)
                repaired.embedded += len(missing)
    return bool(expected.keys() - vectors - texts)


def _right(stored: Mapping[str, str], expected: Mapping[str, str]) -> set[str]:
    return {key for key, content in stored.items() if expected.get(key) == content}


def _texts(rows: Sequence[Row]) -> list[str]:
    return [row.text for row in rows]


async def _remove(store: ChunkStore, ids: Collection[str]) -> int:
    if ids:
        await store.delete(ids)
    return len(ids)
