"""One document from its file into both stores: fetch, parse, split, embed, store, verify, publish.

What makes it safe to die at any write stands in :mod:`job_runner.publication`, which does everything but the rows: reading
the file, and vectors for its chunks. No vector is computed that a store has: the stores are the checkpoint.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import structlog

from job_runner.document import Chunk, ParsedDocument, language_of_most
from job_runner.embed import Embedder, batches, embedded
from job_runner.fetch import Source, inspected, open_document
from job_runner.index import Row, check_metadata, rows_of_chunks
from job_runner.ledger import Claim, Intent
from job_runner.made import Made
from job_runner.parse import parse, parser_limits
from job_runner.publication import Publication, Window, Writer, Written, generation_of
from job_runner.readers import parser_version
from job_runner.split import SPLITTER_VERSION, SplitSettings, split
from job_runner.stages import Stages
from job_runner.stores import OpenStores, Stores
from job_runner.watchdog import beat
from job_runner.work import Done, Work
from task_contract.errors import DocumentRefused, InvalidTask
from task_contract.models import ProcessingMode, Stage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_GROUP: Final = 256
"""Chunks whose vectors are looked up together."""
_FAILED_NAMED: Final = 10
"""Failed pages whose numbers are told, as the contract bounds them."""
log = structlog.get_logger(__name__)


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
        self._embedder = embedder
        self._stages = Stages(work.progress)
        self._publication = Publication(work, stages=self._stages, open_stores=open_stores, load=embedder.warm_up)
        self._splitting = self._split_settings()

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
                source = await open_document(stack, self._file_path, settings=self._settings, inspect=inspected)
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
            read: _Read | None = None

            async def write(intent: Intent, stores: Stores) -> Written:
                nonlocal read
                read = read or await self._read(source)
                rows = self._rows(intent, read, source)
                embedded = await self._write(intent, rows, stores)
                return Written(chunks=len(rows), embedded=embedded, facts=_facts(read))

            return await self._publication.run(claim, write)

    def _made(self, source: Source) -> Made:
        return Made(
            parser_version(source.kind),
            SPLITTER_VERSION,
            self._mode,
            self._splitting.chunk_size,
            self._splitting.chunk_overlap,
            self._embedder.fingerprint,
        )

    def _content_hash(self, source: Source) -> str:
        return self._made(source).content_hash(source.kind, source.sha256, self._payload.metadata or {})

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

    def _rows(self, intent: Intent, read: _Read, source: Source) -> list[Row]:
        return rows_of_chunks(
            read.chunks,
            generation=generation_of(intent),
            document_id=self._document_id,
            version=intent.version,
            paged=read.document.paged,
            metadata=self._payload.metadata or {},
            source_sha256=source.sha256,
            content_hash=intent.claim.content_hash,
            task_uid=str(self._uid),
            pipeline=self._made(source).text,
        )

    async def _write(self, intent: Intent, rows: Sequence[Row], stores: Stores) -> int:
        """Bring all rows into both stores; return how many vectors were computed.

        The rows of a batch are written while the vectors of the next one are computed, and never more than one batch waits.
        """
        with self._stages.enter(Stage.EMBED):
            there, texts_there = await self._take_over(intent, len(rows), stores)
            writer = self._publication.writer()
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

    async def _take_over(self, intent: Intent, chunks: int, stores: Stores) -> tuple[set[str], set[str]]:
        """Return the ids that each store has already."""
        vectors: set[str] = set()
        texts: set[str] = set()
        for window in Window.all(chunks):
            found = await self._publication.take_over(intent, stores, window)
            vectors |= found[0]
            texts |= found[1]
        return vectors, texts

    async def _published_vectors(
        self, intent: Intent, rows: Sequence[Row], stores: Stores
    ) -> "dict[str, npt.NDArray[np.float32]]":
        """Return vectors of texts that the published version has too. The ledger holds the knowledge base to one model."""
        if intent.published is None or not rows:
            return {}
        await self._publication.ready()
        return await stores.vectors.vectors(self._document_id, intent.published.version, {row.text_hash for row in rows})

    @staticmethod
    async def _store(
        writer: Writer, stores: Stores, rows: Sequence[Row], vectors: "dict[str, npt.NDArray[np.float32]]"
    ) -> None:
        if rows:
            import numpy as np

            stacked = np.stack([vectors[row.text_hash] for row in rows])
            await writer.start(partial(stores.vectors.write, rows, stacked))


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
