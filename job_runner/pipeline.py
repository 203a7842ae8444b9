"""One document from its file into both stores: fetch, parse, split, embed, store, verify, publish.

The order makes it safe to die at any write (see also :mod:`job_runner.ledger`):

1. ``begin`` enters the intent: a version number that nobody reads yet.
2. Rows of that version go into both stores, batch by batch. What is there already is not written again, and no vector is
   computed that a store has: the stores are the checkpoint.
3. Both stores are read back; each must hold exactly the expected chunk ids.
4. ``commit`` publishes the version in the ledger.
5. Lower versions are removed from both stores, and looked for once more.

Who dies before 4 leaves rows that nobody reads and that the next attempt takes over. Who dies after 4 leaves old rows that
readers of the ledger skip; the next attempt finds its own version published and only does 5.

About 5: "lower" is lower than what was committed, whoever wrote it. Rows of an intent that lives and has a lower number may
be among them. Such an intent belongs to an older task, which will end as Superseded, or to a newer task that was overtaken,
whose commit the ledger refuses with AGAIN: it then takes a higher number and writes its rows anew. Rows with higher numbers
than the published one belong to intents that live, or to dead ones, which a sweep removes (:mod:`job_runner.sweep`).
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog

from job_runner.document import Chunk, ParsedDocument, language_of_most
from job_runner.embed import Embedder, batches, embedded
from job_runner.fetch import Source, inspected, opened
from job_runner.index import Generation, Row, Stale, check_metadata
from job_runner.ledger import Claim, Commit, Intent, Published, Standing
from job_runner.parse import parse, parser_limits
from job_runner.progress import Progress
from job_runner.readers import parser_version
from job_runner.settings import Settings
from job_runner.split import SPLITTER_VERSION, SplitSettings, split
from job_runner.stores import OpenStores, Stores
from job_runner.watchdog import beat
from job_runner.work import Done, Work
from task_contract.errors import DocumentRefused, InvalidTask, StoresDisagree, TaskError
from task_contract.location import is_url
from task_contract.models import ProcessingMode, Result, Stage
from task_contract.names import digest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

R = TypeVar("R")

_GROUP: Final = 256
"""Chunks whose vectors are looked up together."""
_FAILED_NAMED: Final = 10
"""Failed pages whose numbers are told, as the contract bounds them."""
ROUNDS: Final = 5
"""How often the work is begun anew because other tasks publish the same document meanwhile."""

# Percent of an attempt that are done when a stage starts.
_STARTS: Final = {
    Stage.FETCH: 0,
    Stage.PARSE: 2,
    Stage.SPLIT: 15,
    Stage.EMBED: 18,
    Stage.STORE: 85,
    Stage.VERIFY: 90,
    Stage.PUBLISH: 96,
}

log = structlog.get_logger(__name__)


class Stages:
    """Which stage is under way, and how long each one took."""

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress = progress
        self._clock = clock
        self._spent: dict[Stage, float] = {}

    @contextlib.contextmanager
    def enter(self, stage: Stage) -> Iterator[None]:
        """Time a stage, report it, and name it in errors that leave it."""
        started = self._clock()
        self._progress.report(stage, _STARTS[stage])
        try:
            yield
        except TaskError as error:
            error.stage = error.stage or stage
            raise
        finally:
            self.add(stage, self._clock() - started)
            log.info("stage ended", stage=str(stage), seconds=round(self._clock() - started, 3))

    def add(self, stage: Stage, seconds: float) -> None:
        """Count time for a stage."""
        self._spent[stage] = self._spent.get(stage, 0) + seconds

    def within(self, stage: Stage, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` parts of a stage are done."""
        later = [start for start in _STARTS.values() if start > _STARTS[stage]]
        width = min(later, default=100) - _STARTS[stage]
        self._progress.report(stage, _STARTS[stage] + width * done // max(total, 1))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, for the result."""
        return {str(stage): round(spent, 3) for stage, spent in self._spent.items()}


@dataclass
class _Read:
    """What one reading of the file gave; kept when the work is begun anew."""

    document: ParsedDocument
    chunks: tuple[Chunk, ...]


class DocumentPipeline:
    """One attempt at one ``document_processing`` task."""

    def __init__(self, work: Work, *, embedder: Embedder, open_stores: OpenStores) -> None:
        spec = work.task.spec
        if spec.kb_id is None:
            raise InvalidTask("cannot index a document without a knowledge base: set spec.kbId")
        if spec.payload.file_path is None:
            raise InvalidTask("cannot index nothing: set spec.payload.filePath")
        check_metadata(spec.payload.metadata or {})
        self._namespace = work.task.metadata.namespace
        self._kb_id = spec.kb_id
        self._payload = spec.payload
        self._file_path = spec.payload.file_path
        self._document_id = spec.payload.effective_document_id
        self._mode = self._payload.processing_mode or ProcessingMode.INTELLIGENT_SPLIT
        self._uid = work.uid
        self._created_at = work.created_at
        self._settings = work.settings
        self._ledger = work.ledger
        self._embedder = embedder
        self._open_stores = open_stores
        self._stages = Stages(work.progress)
        self._splitting = self._split_settings()
        self._loading: asyncio.Task[None] | None = None
        self._ready: asyncio.Task[None] | None = None

    def _split_settings(self) -> SplitSettings:
        try:
            return SplitSettings(
                chunk_size=self._payload.effective_chunk_size,
                chunk_overlap=self._payload.effective_chunk_overlap,
                mode=self._mode,
                max_tokens=self._embedder.max_tokens,
                count_tokens=self._embedder.count_tokens,
            )
        except ValueError as error:  # a rule over two fields, which the API server holds and a file may break
            raise InvalidTask(f"{error}; correct payload.chunkSize and payload.chunkOverlap") from error

    async def run(self) -> Done:
        """Do it. May be canceled until the version is being published; from then on it ends by itself within seconds.

        Raises errors of :mod:`task_contract.errors`.
        """
        async with contextlib.AsyncExitStack() as stack:
            with self._stages.enter(Stage.FETCH):
                source = await _open(stack, self._file_path, self._settings)
                claim = Claim(
                    namespace=self._namespace,
                    kb_id=self._kb_id,
                    document_id=self._document_id,
                    task_uid=self._uid,
                    task_created_at=self._created_at,
                    holder=self._settings.holder,
                    content_hash=await asyncio.to_thread(self._content_hash, source),
                    model_fingerprint=self._embedder.fingerprint,
                    dimension=self._embedder.dimension,
                )
                intent = await self._ledger.begin(claim)
            read: _Read | None = None
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
                    await self._withdraw(intent.version, stores)
                    return self._superseded(intent.published)
                if intent.standing is Standing.PUBLISHED:
                    return await to_the_end(self._clear_up(intent, stores))
                if intent.standing is Standing.UNCHANGED and await self._holds_published(intent, stores):
                    done = await to_the_end(self._confirm(intent, stores))
                else:
                    read = read or await self._read(source)
                    done = await self._write_and_publish(intent, read, source, stores)
                if done is not None:
                    return done
                with self._stages.enter(Stage.FETCH):
                    intent = await self._ledger.begin(claim)
        raise StoresDisagree(
            f"cannot publish {self._document_id}: other tasks published it {ROUNDS} times meanwhile; try again later"
        )

    async def _opened(self, stack: contextlib.AsyncExitStack, intent: Intent) -> Stores:
        """Open a generation; what it lacks is created while something else is done, see :meth:`_stores_ready`.

        A new collection takes Milvus seconds: meanwhile the document is parsed and its first batches are embedded. The model
        is loaded before: the stores' clients are a second of imports, which would share the interpreter with it.
        """
        stores = self._open_stores(self._generation(intent))
        stack.push_async_callback(stores.aclose)
        if intent.standing is Standing.WORK and self._loading is None:
            self._loading = asyncio.create_task(asyncio.to_thread(self._embedder.warm_up))
            stack.push_async_callback(_end, self._loading)
        self._ready = asyncio.create_task(_ensure(stores, after=self._loading))
        stack.push_async_callback(_end, self._ready)
        return stores

    def _content_hash(self, source: Source) -> str:
        """Return the identity of what will be written: equal hashes give equal rows, but for the version."""
        pipeline = (
            parser_version(source.kind),
            SPLITTER_VERSION,
            source.kind,
            self._mode,
            str(self._splitting.chunk_size),
            str(self._splitting.chunk_overlap),
            self._embedder.fingerprint,
        )
        metadata = [part for pair in sorted((self._payload.metadata or {}).items()) for part in pair]
        return digest(source.sha256, *pipeline, *metadata, length=64)

    def _fingerprint(self, source: Source) -> str:
        """Return the same for people and for filters over rows; without source and metadata, which have columns."""
        cut = self._splitting
        splitter = f"splitter {SPLITTER_VERSION} {self._mode} {cut.chunk_size}/{cut.chunk_overlap}"
        return f"parser {parser_version(source.kind)}, {splitter}, model {self._embedder.fingerprint}"

    # ------------------------------------------------------------------------------------------------------- reading

    async def _read(self, source: Source) -> _Read:
        """Parse and split, while the model is loaded."""
        limits = parser_limits(self._settings, source.kind)
        with self._stages.enter(Stage.PARSE):
            document = await parse(
                source, limits=limits, on_progress=lambda done, all_: self._stages.within(Stage.PARSE, done, all_)
            )
            source.check_unchanged()
        with self._stages.enter(Stage.SPLIT):
            chunks = await asyncio.to_thread(self._split, document)
        with self._stages.enter(Stage.EMBED):
            await asyncio.to_thread(self._embedder.warm_up)  # waits for the loading that is under way
        return _Read(document=document, chunks=chunks)

    def _split(self, document: ParsedDocument) -> tuple[Chunk, ...]:
        limit = self._settings.max_chunks
        embed = partial(embedded, embedder=self._embedder)
        chunks = tuple(_beating(islice(split(document, self._splitting, embed=embed), limit + 1)))
        if len(chunks) > limit:
            raise DocumentRefused(
                f"cannot index {self._file_path}: it has more than {limit} chunks; "
                "raise payload.chunkSize, lower payload.chunkOverlap, split the document, or raise TASKS_MAX_CHUNKS"
            )
        return chunks

    # ------------------------------------------------------------------------------------------------------- writing

    async def _write_and_publish(self, intent: Intent, read: _Read, source: Source, stores: Stores) -> Done | None:
        """Return ``None`` when another task was in between and the work must be begun anew."""
        rows = [self._row(chunk, intent, read, source) for chunk in read.chunks]
        embedded = await self._write(intent, rows, stores)
        with self._stages.enter(Stage.VERIFY):
            counts = await self._verified(intent, rows, stores)
        if counts is None:
            return None
        return await to_the_end(self._publish(intent, read, counts, embedded=embedded, stores=stores))

    def _row(self, chunk: Chunk, intent: Intent, read: _Read, source: Source) -> Row:
        document = read.document
        return Row(
            id=self._generation(intent).chunk_id(self._document_id, intent.version, chunk.ordinal),
            document_id=self._document_id,
            version=intent.version,
            ordinal=chunk.ordinal,
            text=chunk.text,
            text_hash=digest(chunk.text),
            page_start=chunk.page_start if document.paged else 0,
            page_end=chunk.page_end if document.paged else 0,
            heading_path="\n".join(chunk.heading_path),
            char_start=chunk.start,
            char_end=chunk.end,
            language=chunk.language,
            metadata=self._payload.metadata or {},
            source_sha256=source.sha256,
            content_hash=intent.claim.content_hash,
            task_uid=str(self._uid),
            chunk_count=len(read.chunks),
            tokens=chunk.tokens,
            pipeline=self._fingerprint(source),
        )

    def _generation(self, intent: Intent) -> Generation:
        return Generation(self._namespace, self._kb_id, intent.generation)

    async def _write(self, intent: Intent, rows: Sequence[Row], stores: Stores) -> int:
        """Bring all rows into both stores; return how many vectors were computed.

        The rows of a batch are written while the vectors of the next one are computed, and never more than one batch waits.
        """
        with self._stages.enter(Stage.EMBED):
            there, texts_there = await self._take_over(intent, rows, stores)
            writer = _Writer(self._stores_ready)
            embedded = done = 0
            try:
                for start in range(0, len(rows), _GROUP):
                    group = rows[start : start + _GROUP]
                    missing = [row for row in group if row.id not in texts_there]
                    if missing:
                        await writer.start(partial(stores.texts.write, missing))
                    todo = [row for row in group if row.id not in there]
                    known = await self._published_vectors(intent, todo, stores)
                    await self._store(writer, stores, [row for row in todo if row.text_hash in known], known)
                    new = list({row.text_hash: row for row in todo if row.text_hash not in known}.values())
                    done += len(group) - len(new)
                    budget = self._embedder.batch_tokens
                    # A small one first, so that the stores have something to do soon.
                    for batch in batches([row.tokens for row in new], budget=budget, first=None if start else budget // 8):
                        part = [new[index] for index in batch]
                        vectors = await asyncio.to_thread(self._embedder.embed, [row.text for row in part])
                        computed = dict(zip((row.text_hash for row in part), vectors, strict=True))
                        embedded += len(computed)
                        await self._store(writer, stores, [row for row in todo if row.text_hash in computed], computed)
                        done += len(computed)
                        self._stages.within(Stage.EMBED, done, len(rows))
            except BaseException:
                await writer.abandon()
                raise
        with self._stages.enter(Stage.STORE):
            await writer.finish()
        return embedded

    async def _take_over(self, intent: Intent, rows: Sequence[Row], stores: Stores) -> tuple[set[str], set[str]]:
        """Return the ids that each store has already; remove what does not belong to this version."""
        if not intent.resumed:
            return set(), set()
        await self._stores_ready()
        expected = {row.id for row in rows}
        found = await stores.stored(self._document_id, intent.version)
        kept = []
        for store, stored in zip((stores.vectors, stores.texts), found, strict=True):
            await store.delete(stored.keys() - expected)
            kept.append({key for key, content in stored.items() if content == intent.claim.content_hash} & expected)
        log.info("taken over", vectors=len(kept[0]), texts=len(kept[1]))
        return kept[0], kept[1]

    async def _published_vectors(
        self, intent: Intent, rows: Sequence[Row], stores: Stores
    ) -> "dict[str, npt.NDArray[np.float32]]":
        """Return vectors of texts that the published version has too. The ledger holds the knowledge base to one model."""
        if intent.published is None or not rows:
            return {}
        await self._stores_ready()
        return await stores.vectors.vectors(self._document_id, intent.published.version, {row.text_hash for row in rows})

    @staticmethod
    async def _store(
        writer: "_Writer", stores: Stores, rows: Sequence[Row], vectors: "dict[str, npt.NDArray[np.float32]]"
    ) -> None:
        if rows:
            import numpy as np

            stacked = np.stack([vectors[row.text_hash] for row in rows])
            await writer.start(partial(stores.vectors.write, rows, stacked))

    async def _stores_ready(self) -> None:
        """Wait until both stores have a place for the knowledge base; may be called again and again."""
        assert self._ready is not None  # noqa: S101 - for the type checker: run() has set it
        await asyncio.shield(self._ready)  # who waits may be canceled, the others go on waiting

    async def _verified(self, intent: Intent, rows: Sequence[Row], stores: Stores) -> tuple[int, int] | None:
        """Read both stores back until each holds exactly the expected rows; return their counts.

        ``None`` when another task has published a higher version meanwhile and may have removed these rows. Raises
        StoresDisagree when it takes too long.
        """
        expected = {row.id: row.content_hash for row in rows}
        deadline = time.monotonic() + self._settings.verify_seconds
        pause = 0.1
        while True:
            in_vectors, in_texts = await stores.stored(self._document_id, intent.version)
            if in_vectors == expected == in_texts:
                return len(in_vectors), len(in_texts)
            published = await self._ledger.published(
                namespace=self._namespace, kb_id=self._kb_id, document_ids=[self._document_id]
            )
            if published.get(self._document_id, 0) > intent.version:
                return None
            if time.monotonic() > deadline:
                raise StoresDisagree(
                    f"cannot publish {self._document_id}: of {len(expected)} chunks, Milvus misses "
                    f"{len(expected.keys() - in_vectors.keys())} and has {len(in_vectors.keys() - expected.keys())} others, "
                    f"Elasticsearch misses {len(expected.keys() - in_texts.keys())} and has "
                    f"{len(in_texts.keys() - expected.keys())} others, {self._settings.verify_seconds:g} s after writing"
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, 2)

    # ---------------------------------------------------------------------------------------------------- publishing

    async def _publish(
        self, intent: Intent, read: _Read, counts: tuple[int, int], *, embedded: int, stores: Stores
    ) -> Done | None:
        with self._stages.enter(Stage.PUBLISH):
            facts = _facts(read)
            match await self._ledger.commit(intent, chunk_count=len(read.chunks), facts=facts):
                case Commit.AGAIN:
                    return None
                case Commit.SUPERSEDED:
                    await self._withdraw(intent.version, stores)
                    return self._superseded(None)
                case Commit.DONE:
                    await self._remove_lower(intent.version, stores)
        return Done(
            "Completed",
            Result(
                **facts,
                documents=1,
                chunks=len(read.chunks),
                embedded=embedded,
                reused=len(read.chunks) - embedded,
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
            await self._stores_ready()
            version = intent.published.version
            expected = intent.published.rows(self._generation(intent), self._document_id)
            found = await stores.stored(self._document_id, version)
            if found[0] == expected == found[1]:
                return True
            log.warning("the stores have lost chunks of the published version", version=version)
            return False

    async def _confirm(self, intent: Intent, stores: Stores) -> Done | None:
        with self._stages.enter(Stage.PUBLISH):
            match await self._ledger.confirm(intent):
                case Commit.AGAIN:
                    return None
                case Commit.SUPERSEDED:
                    await self._withdraw(intent.version, stores)
                    return self._superseded(None)
                case Commit.DONE:
                    assert intent.published is not None  # noqa: S101 - for the type checker: that is what was confirmed
                    await self._remove_lower(intent.published.version, stores)
        return self._done("Unchanged", intent.published, counts=(intent.published.chunk_count,) * 2)

    async def _clear_up(self, intent: Intent, stores: Stores) -> Done:
        """Finish what an earlier attempt of this task did not after its commit."""
        assert intent.published is not None  # noqa: S101 - for the type checker: this task has published
        published = intent.published
        with self._stages.enter(Stage.PUBLISH):
            await self._stores_ready()
            await self._remove_lower(published.version, stores)
            found = await stores.stored(self._document_id, published.version)
        return self._done("Completed", published, counts=(len(found[0]), len(found[1])))

    async def _remove_lower(self, version: int, stores: Stores) -> None:
        await stores.remove([Stale(self._document_id, up_to=version - 1)])

    async def _withdraw(self, version: int, stores: Stores) -> None:
        """Remove what this task has written of a version that nobody will publish: a sweep would find it an hour later."""
        await self._stores_ready()
        for store in (stores.vectors, stores.texts):
            await store.delete(await store.stored(self._document_id, version))

    def _done(self, reason: str, published: Published, *, counts: tuple[int, int]) -> Done:
        return Done(
            reason,
            Result(
                **published.facts,
                documents=1,
                chunks=published.chunk_count,
                embedded=0,
                reused=published.chunk_count,
                milvus_count=counts[0],
                elasticsearch_count=counts[1],
                version=published.version,
                seconds=self._stages.seconds,
            ),
        )

    def _superseded(self, published: Published | None) -> Done:
        version = None if published is None else published.version
        return Done("Superseded", Result(documents=0, version=version, seconds=self._stages.seconds))


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


def _beating(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Pass chunks on, each a sign of work: of a large document it takes a minute to make them all."""
    for chunk in chunks:
        beat()
        yield chunk


def _facts(read: _Read) -> dict[str, Any]:
    """Return what a result says of the document itself: kept with the version, for those who need not read it again."""
    document = read.document
    found = {
        "pages": len(document.pages) if document.paged else None,
        "failed_pages": len(document.failed_pages) if document.paged or document.failed_pages else None,
        "failed_page_numbers": list(document.failed_pages[:_FAILED_NAMED]) or None,
        "language": language_of_most(read.chunks),
    }
    return {name: value for name, value in found.items() if value is not None}


async def _open(stack: contextlib.AsyncExitStack, file_path: str, settings: Settings) -> Source:
    """Open the document in a thread, after it was fetched if a URL names it; it is closed with the stack."""
    max_bytes = settings.max_document_bytes
    if is_url(file_path):
        from job_runner.remote import download  # an HTTP client, which a mounted document does not need

        opening = inspected(await download(file_path, settings=settings), name=file_path, max_bytes=max_bytes)
    else:
        opening = opened(file_path, root=settings.document_root, max_bytes=max_bytes)
    return await asyncio.to_thread(stack.enter_context, opening)


async def _ensure(stores: Stores, *, after: asyncio.Task[None] | None) -> None:
    if after is not None:
        await asyncio.wait([after])  # whatever became of it: who needs the model will hear
    await stores.ensure()


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end, whatever it is."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class _Writer:
    """Writes in the background: one is under way while the next batch is computed, so that a crash loses little."""

    def __init__(self, ready: Callable[[], Awaitable[None]]) -> None:
        self._ready = ready
        self._running: asyncio.Task[None] | None = None

    async def start(self, write: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start a write when the one before has ended and the stores are ready. Raises what the one before raised."""
        await self.finish()
        self._running = asyncio.create_task(self._after_ready(write))

    async def _after_ready(self, write: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await self._ready()
        await write()

    async def finish(self) -> None:
        """Wait for the write that is under way."""
        if self._running is not None:
            await self._running
            self._running = None

    async def abandon(self) -> None:
        """Cancel the write, after another failure. What it may have written is of a version that nobody reads."""
        if self._running is not None:
            await _end(self._running)
