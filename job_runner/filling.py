"""Documents from the generation that serves into another one: copied, embedded anew, or split and embedded anew.

The rows come from the stores: no file is read. What a document needs follows from what its rows say of themselves
(:class:`job_runner.made.Made`) and from what the rebuild wants:

- same splitter, same model: rows and vectors are copied, nothing is computed;
- same splitter, another model: the texts are embedded; a document with a text that the new model would not read whole is
  split anew;
- another splitter: the text is put together from the chunks (:mod:`job_runner.reassembly`), split, and embedded but for
  texts that the document had before under the same model.

Rows keep document, version and so their ids. A version that is published never changes, so that a document is done when the
generation has the version that readers see; what tasks publish meanwhile differs again and is brought in the next round.

Three things go on at once, so that the model always has something to do: documents are read, a group of rows of any number
of documents is embedded, and the group before is written. Memory holds three groups, and of a document that is split anew
its text. Who dies loses one group: whole documents are entered in the ledger once they were written, and of one that was not
the vectors that are there are taken over.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog

from job_runner.embed import Embedder, batches, embedded
from job_runner.generations import Differing, Filled, Lease
from job_runner.index import Generation, Row, Stale, rows_of_chunks
from job_runner.ledger import Ledger
from job_runner.made import Made, rehashed, with_model
from job_runner.reassembly import reassembled
from job_runner.split import SPLITTER_VERSION, SplitSettings, split
from job_runner.stores import Stores
from job_runner.watchdog import beat
from task_contract.errors import StoresDisagree
from task_contract.models import ProcessingMode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = dict[str, npt.NDArray[np.float32]]
else:
    Vectors = dict

GROUP: Final = 512
"""Rows that are embedded and written together: 16 MB of the longest texts."""
_DOCUMENTS: Final = 200
"""Documents of a group at most."""
_AHEAD: Final = 4
"""Parts of 256 rows that are read ahead."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Side:
    """A generation with its open stores."""

    generation: Generation
    stores: Stores
    model: str
    """Fingerprint."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows of a document as they are to be written."""

    rows: Sequence[Row]
    known: Vectors = field(default_factory=dict)
    """Text hash → vector, of those that are not to be computed."""
    filled: Filled | None = None
    """With the last part of a document."""


class Filling:
    """Brings into a generation what another one has."""

    def __init__(
        self,
        lease: Lease,
        *,
        ledger: Ledger,
        source: Side,
        target: Side,
        embedder: Embedder,
        splitting: Mapping[str, Any],
        resumed: bool,
        on_rows: Callable[[int], None],
    ) -> None:
        """``resumed``: an earlier attempt may have written rows that the ledger does not know of."""
        self._lease = lease
        self._ledger = ledger
        self._source = source
        self._target = target
        self._embedder = embedder
        self._splitting = splitting
        self._resumed = resumed
        self._on_rows = on_rows
        self._writing: asyncio.Task[None] | None = None
        self._computes = source.model != target.model
        self.rows = 0
        self.embedded = 0

    async def round(self) -> list[str]:
        """Bring every document that differs; return which. Raises Fenced, StoreUnavailable, StoresDisagree."""
        parts: asyncio.Queue[_Part | Exception | None] = asyncio.Queue(_AHEAD)
        reading = asyncio.create_task(self._read_all(parts))
        brought: list[str] = []
        try:
            group: list[_Part] = []
            while (part := await parts.get()) is not None:
                if isinstance(part, Exception):
                    raise part
                group.append(part)
                if sum(len(one.rows) for one in group) >= GROUP or len(group) >= _DOCUMENTS:
                    brought += await self._bring(group)
                    group = []
            brought += await self._bring(group)
            await self._written()
            self._resumed = True  # from now on it has versions that may be replaced
        finally:
            for task in (reading, self._writing):
                if task is not None:
                    task.cancel()
            await asyncio.gather(*(task for task in (reading, self._writing) if task is not None), return_exceptions=True)
        return brought

    # ------------------------------------------------------------------------------------------------------- reading

    async def _read_all(self, parts: "asyncio.Queue[_Part | Exception | None]") -> None:
        """Put all parts, then None, or why it cannot go on."""
        after = ""
        try:
            while documents := await self._ledger.differing(self._lease, self._target.generation.number, after=after):
                for document in documents:
                    async for part in self._parts(document):
                        await parts.put(part)
                after = documents[-1].document_id
        except Exception as error:  # noqa: BLE001 - raised where the parts are taken
            await parts.put(error)
        else:
            await parts.put(None)

    async def _parts(self, document: Differing) -> AsyncIterator[_Part]:
        """Yield the rows of a document as the target is to have them.

        Nothing, or some rows without an end, if tasks replace it meanwhile: it will differ in the next round.
        """
        filled = Filled(document.document_id, document.version, document.content_hash, 0)
        if document.chunk_count == 0:  # deleted; what there was of it goes
            yield _Part([], filled=filled)
            return
        held: list[Row] = []  # of a document that can only be dealt with as a whole
        count = 0
        last: _Part | None = None
        async for rows, vectors in self._stored(document):
            count += len(rows)
            if held or self._splits(rows[0]) or self._bounded:
                held += rows
                continue
            if last is not None:
                yield last
            last = await self._as_wanted(document, rows, vectors)
        if count != document.chunk_count:
            await self._check_replaced(document, count)
            return
        if not held:
            assert last is not None  # noqa: S101 - for the type checker: there are rows
            yield replace(last, filled=replace(filled, content_hash=last.rows[0].content_hash, chunk_count=count))
            return
        if self._splits(held[0]) or await asyncio.to_thread(self._too_long, held):
            held = await asyncio.to_thread(self._split, held)
        else:
            held = await asyncio.to_thread(self._with_model, held)
        for start in range(0, len(held), GROUP):
            group = held[start : start + GROUP]
            whole = replace(filled, content_hash=held[0].content_hash, chunk_count=len(held))
            known = await self._there(document, group)
            yield _Part(group, known, filled=whole if start + GROUP >= len(held) else None)

    @property
    def _bounded(self) -> bool:
        """Whether a text may be longer than the model reads."""
        return self._computes and self._embedder.max_tokens is not None

    async def _stored(self, document: Differing) -> "AsyncIterator[tuple[list[Row], npt.NDArray[np.float32] | None]]":
        vectors = self._source.stores.vectors
        if self._computes:
            async for rows in vectors.read(document.document_id, document.version):
                yield rows, None
        else:
            async for rows, found in vectors.read_with_vectors(document.document_id, document.version):
                yield rows, found

    async def _as_wanted(self, document: Differing, rows: list[Row], vectors: "npt.NDArray[np.float32] | None") -> _Part:
        if vectors is not None:
            return _Part(rows, dict(zip((row.text_hash for row in rows), vectors, strict=True)))
        changed = await asyncio.to_thread(self._with_model, rows)
        return _Part(changed, await self._there(document, changed))

    async def _there(self, document: Differing, rows: Sequence[Row]) -> Vectors:
        """Return vectors that need not be computed: of the same model, or of an earlier attempt."""
        hashes = {row.text_hash for row in rows}
        found: Vectors = {}
        if not self._computes:
            found = await self._source.stores.vectors.vectors(document.document_id, document.version, hashes)
        if self._resumed and (missing := hashes - found.keys()):
            found |= await self._target.stores.vectors.vectors(document.document_id, document.version, missing)
        return found

    async def _check_replaced(self, document: Differing, count: int) -> None:
        """Raise StoresDisagree unless a task has published the document since: then it is not as it was any more."""
        published = await self._ledger.published(
            namespace=self._lease.namespace, kb_id=self._lease.kb_id, document_ids=[document.document_id]
        )
        if published.get(document.document_id) == document.version:
            raise StoresDisagree(
                f"cannot rebuild {self._lease.kb_id}: Milvus has {count} of the {document.chunk_count} chunks of "
                f"{document.document_id}; create a knowledge_indexing task with action repair first"
            )

    # ------------------------------------------------------------------------------------------------- another splitter

    def _wanted(self, made: Made) -> Made:
        """Return what is to make the rows of a document that another model or splitter has made."""
        size = self._splitting.get("chunkSize", made.chunk_size)
        overlap = self._splitting.get("chunkOverlap")
        if overlap is None:
            overlap = min(200, size // 5) if "chunkSize" in self._splitting else made.chunk_overlap
        return replace(
            made,
            splitter=SPLITTER_VERSION,
            mode=ProcessingMode(self._splitting.get("processingMode", made.mode)),
            chunk_size=size,
            chunk_overlap=min(overlap, size // 2) if overlap >= size else overlap,
            model=self._target.model,
        )

    def _splits(self, row: Row) -> bool:
        """Tell whether a document is to be split anew. Rows that no splitter of ours has made stay as they are."""
        made = Made.read(row.pipeline)
        return made is not None and replace(self._wanted(made), model=made.model) != made

    def _too_long(self, rows: Sequence[Row]) -> bool:
        limit = self._embedder.max_tokens
        if limit is None or Made.read(rows[0].pipeline) is None:
            return False
        return any(self._embedder.count_tokens(row.text) > limit for row in rows)

    def _split(self, rows: Sequence[Row]) -> list[Row]:
        first = rows[0]
        before = Made.read(first.pipeline)
        assert before is not None  # noqa: S101 - for the type checker: asked before
        made = self._wanted(before)
        settings = SplitSettings(
            chunk_size=made.chunk_size,
            chunk_overlap=made.chunk_overlap,
            mode=made.mode,
            max_tokens=self._embedder.max_tokens,
            count_tokens=self._embedder.count_tokens,
        )
        document = reassembled(rows)
        chunks = []
        for chunk in split(document, settings, embed=partial(embedded, embedder=self._embedder)):
            beat()
            chunks.append(chunk)
        return rows_of_chunks(
            chunks,
            generation=self._target.generation,
            document_id=first.document_id,
            version=first.version,
            paged=document.paged,
            metadata=first.metadata,
            source_sha256=first.source_sha256,
            content_hash=self._rehashed(first, made.text),
            task_uid=first.task_uid,
            pipeline=made.text,
        )

    def _with_model(self, rows: Sequence[Row]) -> list[Row]:
        """Return rows with what another model changes beside the vectors."""
        pipeline = with_model(rows[0].pipeline, self._target.model)
        content_hash = self._rehashed(rows[0], pipeline)
        return [
            replace(row, pipeline=pipeline, content_hash=content_hash, tokens=self._embedder.count_tokens(row.text))
            for row in rows
        ]

    @staticmethod
    def _rehashed(row: Row, pipeline: str) -> str:
        return rehashed(row.content_hash, row.pipeline, pipeline, source_sha256=row.source_sha256, metadata=row.metadata)

    # ------------------------------------------------------------------------------------------------------- writing

    async def _bring(self, group: Sequence[_Part]) -> list[str]:
        """Embed what has no vector, and start to write; return the documents that are whole by that."""
        if not group:
            return []
        import numpy as np

        rows = [row for part in group for row in part.rows]
        known: Vectors = {key: vector for part in group for key, vector in part.known.items()}
        new = list({row.text_hash: row for row in rows if row.text_hash not in known}.values())
        tokens = [row.tokens or self._embedder.count_tokens(row.text) for row in new]
        for batch in batches(tokens, budget=self._embedder.batch_tokens):
            vectors = await asyncio.to_thread(self._embedder.embed, [new[index].text for index in batch])
            known |= zip((new[index].text_hash for index in batch), vectors, strict=True)
            self.embedded += len(batch)
            beat()
        stacked = np.stack([known[row.text_hash] for row in rows]) if rows else None
        filled = [part.filled for part in group if part.filled is not None]
        await self._written()
        self._writing = asyncio.create_task(self._write(rows, stacked, filled))
        return [one.document_id for one in filled]

    async def _write(self, rows: Sequence[Row], vectors: "npt.NDArray[np.float32] | None", filled: Sequence[Filled]) -> None:
        stores = self._target.stores
        if vectors is not None:
            await asyncio.gather(stores.vectors.write(rows, vectors), stores.texts.write(rows))
        stale = [Stale(one.document_id, up_to=one.version if one.chunk_count == 0 else one.version - 1) for one in filled]
        if self._resumed:  # of a new generation nothing is to be removed
            await stores.remove(stale)
        await self._ledger.enter(self._lease, self._target.generation.number, filled)
        self.rows += len(rows)
        self._on_rows(self.rows)

    async def _written(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            await writing
