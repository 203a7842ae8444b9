"""Rows as the published version of a document, wherever they come from: claim, write, verify, publish, clear up.

The order makes it safe to die at any write (see also :mod:`job_runner.ledger`):

1. ``begin`` enters the intent: a version number that nobody reads yet.
2. Rows of that version go into both stores, batch by batch; what is there already is not written again.
3. Both stores are read back; each must hold exactly the expected chunk ids.
4. ``commit`` publishes the version in the ledger.
5. Lower versions are removed from both stores, and looked for once more.

Who dies before 4 leaves rows that nobody reads and that the next attempt takes over. Who dies after 4 leaves old rows that
readers of the ledger skip; the next attempt finds its own version published and only does 5.

About 5: "lower" is lower than what was committed, whoever wrote it. Rows of an intent that lives and has a lower number may
be among them. Such an intent belongs to an older task, which will end as Superseded, or to a newer task that was overtaken,
whose commit the ledger refuses with AGAIN: it then takes a higher number and writes its rows anew. Rows with higher numbers
than the published one belong to intents that live, or to dead ones, which a sweep removes (:mod:`job_runner.sweep`).

What is expected follows from document, version and number of rows alone. So rows are compared in windows of ordinals, and
memory does not grow with their number.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import structlog

from job_runner.index import Generation, Stale
from job_runner.ledger import Claim, Commit, Intent, Published, Standing
from job_runner.stages import Stages
from job_runner.stores import OpenStores, Stores
from job_runner.work import Done, Work
from task_contract.errors import StoresDisagree
from task_contract.models import Result, Stage

R = TypeVar("R")

ROUNDS: Final = 5
"""How often the work is begun anew because other tasks publish the same document meanwhile."""
WINDOW: Final = 8_192
"""Rows that are compared together, by their ordinals: one answer of Milvus holds them (job_runner.milvus)."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Window:
    """Some of the rows of a version."""

    first: int
    """Ordinal of the first row."""
    below: int
    """Ordinal after the last one that is expected."""
    last: bool
    """Whether everything beyond belongs to it too, though no row is expected there."""

    @classmethod
    def all(cls, count: int) -> Iterator[Self]:
        """Yield the windows of a version of so many rows: at least one, and the last one is open."""
        for first in range(0, max(count, 1), WINDOW):
            yield cls(first, min(first + WINDOW, count), last=first + WINDOW >= count)


@dataclass(frozen=True, slots=True)
class Written:
    """What was brought into both stores: the rows of the ordinals from 0 on."""

    chunks: int
    embedded: int | None
    """Vectors that were computed for them; ``None`` where none ever are."""
    facts: Mapping[str, Any]
    """Fields of the result that reading the input has given: kept with the version, for those who need not read it again."""


@dataclass(frozen=True, slots=True)
class _Compared:
    """What one store has of a version."""

    right: int = 0
    missing: int = 0
    others: int = 0

    def and_(self, found: Mapping[str, str], expected: Mapping[str, str]) -> "_Compared":
        """Return this with what a window has."""
        right = sum(expected.get(key) == content for key, content in found.items())
        return _Compared(
            self.right + right, self.missing + len(expected) - right, self.others + len(found.keys() - expected.keys())
        )

    @property
    def exact(self) -> bool:
        return not self.missing and not self.others

    @property
    def rows(self) -> int:
        return self.right + self.others


class Publication:
    """One attempt at publishing one version of one document."""

    def __init__(
        self,
        work: Work,
        *,
        stages: Stages,
        open_stores: OpenStores,
        load: Callable[[], None] | None = None,
    ) -> None:
        """``load``: what blocks for a while and is needed when rows are written, the model; done beside other work."""
        self._settings = work.settings
        self._ledger = work.ledger
        self._stages = stages
        self._open_stores = open_stores
        self._load = load
        self._loading: asyncio.Task[None] | None = None
        self._ready: asyncio.Task[None] | None = None

    async def run(self, claim: Claim, write: Callable[[Intent, Stores], Awaitable[Written]]) -> Done:
        """Publish what ``write`` brings into both stores for an intent; it is called again when the work is begun anew.

        May be canceled until the version is being published; from then on it ends by itself within seconds. Raises errors of
        :mod:`task_contract.errors`.
        """
        async with contextlib.AsyncExitStack() as stack:
            with self._stages.enter(Stage.FETCH):
                intent = await self._ledger.begin(claim)
            stores: Stores | None = None
            generation = 0
            for _ in range(ROUNDS):
                log.info("intent", standing=str(intent.standing), version=intent.version, epoch=intent.epoch)
                if intent.standing is Standing.SUPERSEDED and not intent.resumed:
                    return self._superseded(intent.published)
                if stores is None or generation != intent.generation:  # begun anew after the knowledge base was deleted
                    generation = intent.generation
                    stores = await self._opened(stack, intent)
                if intent.standing is Standing.SUPERSEDED:
                    await self._withdraw(intent, stores)
                    return self._superseded(intent.published)
                if intent.standing is Standing.PUBLISHED:
                    return await to_the_end(self._clear_up(intent, stores))
                if intent.standing is Standing.UNCHANGED and await self._holds_published(intent, stores):
                    done = await to_the_end(self._confirm(intent, stores))
                else:
                    done = await self._write_and_publish(intent, write, stores)
                if done is not None:
                    return done
                with self._stages.enter(Stage.FETCH):
                    intent = await self._ledger.begin(claim)
        raise StoresDisagree(
            f"cannot publish {claim.document_id}: other tasks published it {ROUNDS} times meanwhile; try again later"
        )

    async def _opened(self, stack: contextlib.AsyncExitStack, intent: Intent) -> Stores:
        """Open a generation; what it lacks is created while something else is done, see :meth:`ready`.

        A new collection takes Milvus seconds: meanwhile a document is parsed and its first batches are embedded. The model
        is loaded before: the stores' clients are a second of imports, which would share the interpreter with it.
        """
        stores = self._open_stores(generation_of(intent))
        stack.push_async_callback(stores.aclose)
        if intent.standing is Standing.WORK and self._loading is None and self._load is not None:
            self._loading = asyncio.create_task(asyncio.to_thread(self._load))
            stack.push_async_callback(_end, self._loading)
        self._ready = asyncio.create_task(_ensure(stores, after=self._loading))
        stack.push_async_callback(_end, self._ready)
        return stores

    async def ready(self) -> None:
        """Wait until both stores have a place for the knowledge base; may be called again and again."""
        assert self._ready is not None  # noqa: S101 - for the type checker: run() has set it
        await asyncio.shield(self._ready)  # who waits may be canceled, the others go on waiting

    def writer(self, *, waiting: int = 0) -> "Writer":
        """Return what writes in the background, once the stores are ready; ``waiting`` as of :class:`Writer`."""
        return Writer(self.ready, waiting=waiting)

    async def take_over(self, intent: Intent, stores: Stores, window: Window) -> tuple[set[str], set[str]]:
        """Return the ids of a window that each store has already; remove what does not belong to this version."""
        if not intent.resumed:
            return set(), set()
        await self.ready()
        expected = self._expected(intent, window)
        found = await _stored(stores, intent.claim.document_id, intent.version, window)
        kept = []
        for store, stored in zip((stores.vectors, stores.texts), found, strict=True):
            await store.delete(stored.keys() - expected.keys())
            kept.append({key for key, content in stored.items() if content == expected.get(key)})
        log.info("taken over", vectors=len(kept[0]), texts=len(kept[1]))
        return kept[0], kept[1]

    @staticmethod
    def _expected(intent: Intent, window: Window) -> dict[str, str]:
        version = Published(intent.version, intent.claim.content_hash, window.below)
        return version.rows(generation_of(intent), intent.claim.document_id, first=window.first)

    # ---------------------------------------------------------------------------------------------------- publishing

    async def _write_and_publish(
        self, intent: Intent, write: Callable[[Intent, Stores], Awaitable[Written]], stores: Stores
    ) -> Done | None:
        """Return ``None`` when another task was in between and the work must be begun anew."""
        written = await write(intent, stores)
        with self._stages.enter(Stage.VERIFY):
            counts = await self._verified(intent, written.chunks, stores)
        if counts is None:
            return None
        return await to_the_end(self._publish(intent, written, counts, stores))

    async def _verified(self, intent: Intent, chunks: int, stores: Stores) -> tuple[int, int] | None:
        """Read both stores back until each holds exactly the expected rows; return their counts.

        ``None`` when another task has published a higher version meanwhile and may have removed these rows. Raises
        StoresDisagree when it takes too long.
        """
        claim = intent.claim
        deadline = time.monotonic() + self._settings.verify_seconds
        pause = 0.1
        while True:
            version = Published(intent.version, claim.content_hash, chunks)
            in_vectors, in_texts = await _compared(intent, version, stores)
            if in_vectors.exact and in_texts.exact:
                return in_vectors.rows, in_texts.rows
            published = await self._ledger.published(
                namespace=claim.namespace, kb_id=claim.kb_id, document_ids=[claim.document_id]
            )
            if published.get(claim.document_id, 0) > intent.version:
                return None
            if time.monotonic() > deadline:
                raise StoresDisagree(
                    f"cannot publish {claim.document_id}: of {chunks} chunks, Milvus misses {in_vectors.missing} and has "
                    f"{in_vectors.others} others, Elasticsearch misses {in_texts.missing} and has {in_texts.others} others, "
                    f"{self._settings.verify_seconds:g} s after writing"
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, 2)

    async def _publish(self, intent: Intent, written: Written, counts: tuple[int, int], stores: Stores) -> Done | None:
        with self._stages.enter(Stage.PUBLISH):
            match await self._ledger.commit(intent, chunk_count=written.chunks, facts=written.facts):
                case Commit.AGAIN:
                    return None
                case Commit.SUPERSEDED:
                    await self._withdraw(intent, stores)
                    return self._superseded(None)
                case Commit.DONE:
                    await self._remove_lower(intent, intent.version, stores)
        return Done(
            "Completed",
            Result(
                **written.facts,
                documents=1,
                chunks=written.chunks,
                embedded=written.embedded,
                reused=None if written.embedded is None else written.chunks - written.embedded,
                milvus_count=counts[0],
                elasticsearch_count=counts[1],
                version=intent.version,
                seconds=self._stages.seconds,
            ),
        )

    async def _holds_published(self, intent: Intent, stores: Stores) -> bool:
        """Tell whether both stores hold exactly the published version; if not, it is written again as a new version."""
        if intent.published is None:
            return False
        with self._stages.enter(Stage.VERIFY):
            await self.ready()
            if all(found.exact for found in await _compared(intent, intent.published, stores)):
                return True
            log.warning("the stores have lost chunks of the published version", version=intent.published.version)
            return False

    async def _confirm(self, intent: Intent, stores: Stores) -> Done | None:
        with self._stages.enter(Stage.PUBLISH):
            match await self._ledger.confirm(intent):
                case Commit.AGAIN:
                    return None
                case Commit.SUPERSEDED:
                    await self._withdraw(intent, stores)
                    return self._superseded(None)
                case Commit.DONE:
                    assert intent.published is not None  # noqa: S101 - for the type checker: that is what was confirmed
                    await self._remove_lower(intent, intent.published.version, stores)
        return self._done("Unchanged", intent.published, counts=(intent.published.chunk_count,) * 2)

    async def _clear_up(self, intent: Intent, stores: Stores) -> Done:
        """Finish what an earlier attempt of this task did not after its commit."""
        assert intent.published is not None  # noqa: S101 - for the type checker: this task has published
        with self._stages.enter(Stage.PUBLISH):
            await self.ready()
            await self._remove_lower(intent, intent.published.version, stores)
            in_vectors, in_texts = await _compared(intent, intent.published, stores)
        return self._done("Completed", intent.published, counts=(in_vectors.rows, in_texts.rows))

    async def _remove_lower(self, intent: Intent, version: int, stores: Stores) -> None:
        await stores.remove([Stale(intent.claim.document_id, up_to=version - 1)])

    async def _withdraw(self, intent: Intent, stores: Stores) -> None:
        """Remove what this task has written of a version that nobody will publish: a sweep would find it an hour later."""
        await self.ready()
        for store in (stores.vectors, stores.texts):
            await store.delete(await store.stored(intent.claim.document_id, intent.version))

    def _done(self, reason: str, published: Published, *, counts: tuple[int, int]) -> Done:
        return Done(
            reason,
            Result(
                **published.facts,
                documents=1,
                chunks=published.chunk_count,
                embedded=None if self._load is None else 0,
                reused=None if self._load is None else published.chunk_count,
                milvus_count=counts[0],
                elasticsearch_count=counts[1],
                version=published.version,
                seconds=self._stages.seconds,
            ),
        )

    def _superseded(self, published: Published | None) -> Done:
        version = None if published is None else published.version
        return Done("Superseded", Result(documents=0, version=version, seconds=self._stages.seconds))


def generation_of(intent: Intent) -> Generation:
    """Return the generation that an intent writes into."""
    return Generation(intent.claim.namespace, intent.claim.kb_id, intent.generation)


async def _compared(intent: Intent, version: Published, stores: Stores) -> tuple[_Compared, _Compared]:
    """Compare both stores with what they should have of a version, window by window."""
    generation, document_id = generation_of(intent), intent.claim.document_id
    in_vectors = in_texts = _Compared()
    for window in Window.all(version.chunk_count):
        expected = version.rows(generation, document_id, first=window.first, below=window.below)
        found = await _stored(stores, document_id, version.version, window)
        in_vectors, in_texts = in_vectors.and_(found[0], expected), in_texts.and_(found[1], expected)
    return in_vectors, in_texts


async def _stored(stores: Stores, document_id: str, version: int, window: Window) -> tuple[dict[str, str], dict[str, str]]:
    return await stores.stored(document_id, version, first=window.first, below=None if window.last else window.below)


async def to_the_end(publishing: Coroutine[Any, Any, R]) -> R:
    """Await something that is not to be interrupted: between commit and clearing up there is nothing to hand back.

    A stop or a timeout that comes meanwhile is late: the task succeeds. Every call in it has a timeout of its own.
    """
    task = asyncio.create_task(publishing)
    while True:
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise


async def _ensure(stores: Stores, *, after: asyncio.Task[None] | None) -> None:
    if after is not None:
        await asyncio.wait([after])  # whatever became of it: who needs the model will hear
    await stores.ensure()


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end, whatever it is."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class Writer:
    """Writes in the background, one after the other, while the next batch is made."""

    def __init__(self, ready: Callable[[], Awaitable[None]], *, waiting: int = 0) -> None:
        """``waiting``: so many writes may wait for the one that is under way; with 0 a crash loses one batch alone."""
        self._ready = ready
        self._most = waiting
        self._begun: deque[asyncio.Task[None]] = deque()

    async def start(self, write: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start a write when those before have ended and the stores are ready. Raises what one before raised."""
        while len(self._begun) > self._most:
            await self._begun.popleft()
        before = self._begun[-1] if self._begun else None
        self._begun.append(asyncio.create_task(self._after(before, write)))

    async def _after(self, before: "asyncio.Task[None] | None", write: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if before is not None:
            await asyncio.shield(before)
        await self._ready()
        await write()

    async def finish(self) -> None:
        """Wait for the writes that are under way."""
        while self._begun:
            await self._begun.popleft()

    async def abandon(self) -> None:
        """Cancel the writes, after another failure. What they may have written is of a version that nobody reads."""
        while self._begun:
            await _end(self._begun.pop())
