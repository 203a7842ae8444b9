"""What nobody reads and nobody will publish, out of both stores: versions of dead intents and of replaced documents.

Also what rebuilds leave: a switch of generations that stopped half-way is finished, and generations go that are retained no
longer, or that nobody will go on filling.

The ledger says what is stale, and what it has called stale once stays so: a canceled, superseded or replaced version is
never written to by a task that may still commit, since :meth:`job_runner.ledger.Ledger.begin` hands out new numbers only,
and those are higher than any that the sweep has looked at. So nothing is locked while rows are removed, tasks may begin and
commit meanwhile, and two sweeps do no harm.

A pod that was given up for dead may write after the sweep. Its rows are of stale versions too: the next sweep removes them.
Hence it looks again at every document of the last :data:`WINDOW`, and is repeated hourly.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Final

import structlog

from job_runner.deletion import drop_generation
from job_runner.index import STALE_AT_ONCE, Generation
from job_runner.ledger import Ledger, StaleDocument
from job_runner.stores import OpenStores
from job_runner.switching import finish_switch

WINDOW: Final = timedelta(days=8)
"""How long after its last change a document is looked at again: an attempt may take 168 hours (spec.timeout)."""

log = structlog.get_logger(__name__)


@dataclass
class Summary:
    """What a sweep has found; a dry run has removed none of it."""

    dry_run: bool = False
    intents: int = 0
    """Of tasks that have ended: canceled, so that nobody can commit them."""
    documents: int = 0
    """Looked at."""
    milvus_rows: int = 0
    elasticsearch_rows: int = 0
    generations: int = 0
    """Of deleted and of rebuilt knowledge bases, not needed any more, of which a store still had collection or index."""
    aliases: int = 0
    """That did not lead to the generation that serves: a switch had stopped half-way."""

    def as_text(self, namespace: str) -> str:
        """Return it for people, in one line."""
        verb = "would remove" if self.dry_run else "removed"
        return (
            f"namespace {namespace}: {verb} {self.milvus_rows} rows from Milvus and {self.elasticsearch_rows} from "
            f"Elasticsearch, {self.generations} generations of knowledge bases; {self.intents} dead intents, "
            f"{self.documents} documents looked at, {self.aliases} aliases switched"
        )


async def sweep(
    namespace: str, *, ledger: Ledger, open_stores: OpenStores, dry_run: bool = False, everything: bool = False
) -> Summary:
    """Sweep the knowledge bases of a namespace; with ``everything`` also documents that were left alone for long.

    May be repeated, interrupted, and run beside tasks and other sweeps. Raises StoreUnavailable and StoresDisagree.
    """
    summary = Summary(dry_run=dry_run)
    since = None if everything else datetime.now(UTC) - WINDOW
    dead = await ledger.dead_tasks(namespace=namespace)
    summary.intents = len(dead) if dry_run else await ledger.bury(dead)
    stale = await ledger.stale(namespace=namespace, since=since, dead=dead if dry_run else ())
    summary.documents = len(stale)
    for (kb_id, number), documents in groupby(stale, key=lambda one: (one.kb_id, one.generation)):
        stores = open_stores(Generation(namespace, kb_id, number))
        try:
            await stores.open_existing()
            for part in _parts(documents):
                versions = [one.stale for one in part]
                rows = await (stores.count if dry_run else stores.remove)(versions)
                summary.milvus_rows += rows[0]
                summary.elasticsearch_rows += rows[1]
                if any(rows):
                    log.info("stale rows", kb_id=kb_id, documents=len(part), milvus=rows[0], elasticsearch=rows[1])
                if not dry_run:
                    await ledger.swept(namespace=namespace, kb_id=kb_id, documents=part)
        finally:
            await stores.aclose()
    if not dry_run:
        for kb_id in await ledger.switched(namespace=namespace, since=since):
            summary.aliases += await finish_switch(namespace=namespace, kb_id=kb_id, ledger=ledger, open_stores=open_stores)
        await ledger.expire(namespace=namespace)  # after the aliases, which may lead to what is retained no longer
    for kb_id, number in await ledger.dropped_generations(namespace=namespace, since=since):
        generation = Generation(namespace, kb_id, number)
        there = await (_there if dry_run else drop_generation)(generation, ledger, open_stores)
        summary.generations += any(there)
    if not dry_run:
        await ledger.record_sweep(namespace=namespace, summary=json.dumps(asdict(summary)))
    return summary


def _parts(documents: Iterable[StaleDocument]) -> Iterator[Sequence[StaleDocument]]:
    """Cut into what is asked for at once."""
    listed = list(documents)
    for start in range(0, len(listed), STALE_AT_ONCE):
        yield listed[start : start + STALE_AT_ONCE]


async def _there(generation: Generation, ledger: Ledger, open_stores: OpenStores) -> tuple[bool, bool]:
    """Tell which store has a generation that is to go."""
    if await ledger.is_needed(namespace=generation.namespace, kb_id=generation.kb_id, generation=generation.number):
        return False, False
    stores = open_stores(generation)
    try:
        return await stores.vectors.exists(), await stores.texts.exists()
    finally:
        await stores.aclose()
