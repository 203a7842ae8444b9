"""Vectors of texts, and nothing else: into a file of the document volume, or into PostgreSQL.

The input is read twice: whether every row has a text is known, and how many there are, before the first vector is computed.
Each vector belongs to the row of its number: a row without a text fails the task, for leaving it out would move the others.

Who dies has done nothing that somebody sees: rows in PostgreSQL are one transaction, and a file gets its name in the
transaction that enters it (:meth:`job_runner.ledger.Ledger.keep_vectors`). The next attempt replaces both.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

import structlog

from job_runner.embed import Embedder, batches
from job_runner.fetch import Opened, hashed, open_document
from job_runner.ledger import KeptVectors, VectorPart
from job_runner.outputs import replacing
from job_runner.publication import to_the_end
from job_runner.rows import Record, records
from job_runner.shared_model import SharedModel, vectors_of
from job_runner.stages import Stages
from job_runner.watchdog import beat
from job_runner.work import Done, Work
from task_contract.errors import DocumentEmpty, DocumentUnreadable, InvalidTask
from task_contract.messages import AttemptOutcome
from task_contract.models import TEXT_CHARACTERS, Payload, Result, Stage
from task_contract.names import digest
from task_contract.vectors import INLINE

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

T = TypeVar("T")

_WINDOW: Final = 2_048
"""Texts that are put into batches together: enough of each length, and 4 MB of vectors of 512 dimensions."""
_SHORT: Final = 1_000
"""Characters of all texts of a task: the packaged model's tokenizer takes a third of a millisecond for so many."""
_PART_BYTES: Final = 2 << 20
"""Of a row in PostgreSQL; a reader holds one."""
_STARTS: Final = {Stage.FETCH: 0, Stage.PARSE: 2, Stage.EMBED: 5, Stage.PUBLISH: 98}

log = structlog.get_logger(__name__)

Texts = Callable[[], Iterator[Record]]
"""Reads texts from the first one on: each record has a text, and perhaps an id."""

Keep = Callable[[Sequence[str | None], "npt.NDArray[np.float32]"], Awaitable[None]]
"""Takes ids and vectors of texts, in the order of these."""


async def embedding_generation(work: Work) -> AttemptOutcome:
    """Carry out a task of this type."""
    return work.succeeded(await EmbeddingGeneration(work, embedder=await work.embedder_of_knowledge_base()).run())


async def texts_of(
    payload: Payload, stack: contextlib.AsyncExitStack, *, work: Work, stages: Stages
) -> tuple[str, Texts, int | None]:
    """Return digest and texts of an embedding_generation task, and their number where it is known; open with the stack."""
    if payload.texts is not None:
        texts = payload.texts
        inline = [Record(number, {"text": text}) for number, text in enumerate(texts, start=1)]
        return digest(*texts, length=64), lambda: iter(inline), len(inline)
    if payload.input_path is None:
        raise InvalidTask("cannot embed nothing: set spec.payload.texts or spec.payload.inputPath")
    with stages.enter(Stage.FETCH):
        file: Opened = await open_document(stack, payload.input_path, settings=work.settings, inspect=hashed)
    return file.sha256, lambda: _checked(file), None


def _checked(file: Opened) -> Iterator[Record]:
    """Yield the rows of a file. Raises DocumentUnreadable for one that has no text."""
    for record in records(file, ["text", "id"]):
        text, key = record.fields.get("text"), record.fields.get("id")
        problem = record.problem
        if not problem and (not isinstance(text, str) or not text):
            problem = "no text: give each row a field text that is not empty"
        elif not problem and len(str(text)) > TEXT_CHARACTERS:
            problem = f"the text has {len(str(text))} characters, {TEXT_CHARACTERS} are the most: split it"
        elif not problem and not isinstance(key, str | int | None):
            problem = "the id is no text and no whole number"
        if problem:
            raise DocumentUnreadable(f"cannot embed {file.name}: row {record.number}: {problem}")
        yield record


async def in_a_thread(call: Callable[[], T]) -> T:
    """Call what blocks."""
    return await asyncio.to_thread(call)


async def here(call: Callable[[], T]) -> T:
    """Call what takes less time than handing it to a thread does, a tenth of a millisecond or two."""
    return call()


async def windows(
    rows: Iterator[T], size: int, *, call: Callable[[Callable[[], list[T]]], Awaitable[list[T]]] = in_a_thread
) -> AsyncIterator[list[T]]:
    """Yield what a blocking iterator has, so many at a time, each part read in a thread, or as ``call`` does."""
    while part := await call(lambda: list(islice(rows, size))):
        beat()
        yield part
        if len(part) < size:
            return


class EmbeddingGeneration:
    """One attempt at one task."""

    def __init__(self, work: Work, *, embedder: Embedder) -> None:
        self._work = work
        self._payload = work.task.spec.payload
        self._settings = work.settings
        self._embedder = embedder
        self._stages = Stages(work.progress, starts=_STARTS)
        texts = self._payload.texts
        short = texts is not None and sum(map(len, texts)) <= _SHORT
        self._call = here if short and isinstance(embedder, SharedModel) and embedder.at_hand else in_a_thread

    async def run(self) -> Done:
        """Do it. Raises errors of :mod:`task_contract.errors`."""
        async with contextlib.AsyncExitStack() as stack:
            source_sha256, texts, known = await texts_of(self._payload, stack, work=self._work, stages=self._stages)
            with self._stages.enter(Stage.PARSE):
                count = await self._counted(texts) if known is None else known
                if self._payload.output_path is None:
                    self._check_size(count)
            kept = KeptVectors(
                task_uid=self._work.uid,
                vectors=count,
                dimension=self._embedder.dimension,
                model=self._embedder.name,
                model_fingerprint=await self._call(lambda: self._embedder.fingerprint),
                source_sha256=source_sha256,
                output=self._payload.output_path or INLINE,
            )
            await (self._inline(kept, texts) if self._payload.output_path is None else self._into_file(kept, texts))
        result = Result(vectors=count, dimension=kept.dimension, output=kept.output, seconds=self._stages.seconds)
        return Done("Completed", result)

    async def _counted(self, texts: Texts) -> int:
        count = 0
        async for part in windows(texts(), _WINDOW):
            count += len(part)
        if count == 0:
            raise DocumentEmpty(f"cannot embed {self._payload.input_path}: it has no row")
        return count

    def _check_size(self, count: int) -> None:
        size, most = count * self._embedder.dimension * 4, self._settings.inline_result_bytes
        if size > most:
            raise InvalidTask(
                f"cannot keep {count} vectors in PostgreSQL: they have {size} bytes, {most} are the most; set "
                "payload.outputPath, embed less at once, or raise TASKS_INLINE_RESULT_BYTES"
            )

    async def _inline(self, kept: KeptVectors, texts: Texts) -> None:
        parts: list[VectorPart] = []
        rows = max(1, _PART_BYTES // (kept.dimension * 4))

        async def keep(ids: Sequence[str | None], vectors: "npt.NDArray[np.float32]") -> None:
            for start in range(0, len(ids), rows):
                first = sum(len(part.ids) for part in parts)
                part = slice(start, start + rows)
                parts.append(VectorPart(first, ids[part], vectors[part].astype("<f4").tobytes()))

        with self._stages.enter(Stage.EMBED):
            await self._embed(texts, kept.vectors, keep)
        with self._stages.enter(Stage.PUBLISH):
            await self._work.ledger.keep_vectors(kept, parts, attempt=self._settings.attempt)

    async def _into_file(self, kept: KeptVectors, texts: Texts) -> None:
        from job_runner.vector_files import writing

        place = replacing(kept.output, root=self._settings.document_root, uid=kept.task_uid, holder=self._settings.holder)
        with contextlib.ExitStack() as stack:
            output = await asyncio.to_thread(stack.enter_context, place)
            with self._stages.enter(Stage.EMBED), writing(output, count=kept.vectors, dimension=kept.dimension) as sink:

                async def write(ids: Sequence[str | None], vectors: "npt.NDArray[np.float32]") -> None:
                    await asyncio.to_thread(sink, ids, vectors)

                await self._embed(texts, kept.vectors, write)
            with self._stages.enter(Stage.PUBLISH):
                await asyncio.to_thread(output.flush)
                whole = replace(kept, output_sha256=output.sha256)

                async def publish() -> None:
                    await asyncio.to_thread(output.publish)

                attempt = self._settings.attempt
                await to_the_end(self._work.ledger.keep_vectors(whole, attempt=attempt, before_commit=publish))

    async def _embed(self, texts: Texts, count: int, keep: Keep) -> None:
        """Compute vectors batch by batch, and hand them on window by window, in the order of their texts."""
        import numpy as np

        embedder = self._embedder
        done = 0

        def sized() -> Iterator[tuple[Record, int]]:
            embedder.warm_up()  # here, as it blocks too
            for record in texts():
                yield record, embedder.count_tokens(str(record.fields["text"]))

        async for part in windows(sized(), _WINDOW, call=self._call):
            given = [str(record.fields["text"]) for record, _ in part]
            tokens = [size for _, size in part]
            vectors = np.empty((len(given), embedder.dimension), dtype=np.float32)
            for batch in batches(tokens, budget=embedder.batch_tokens):
                asked = [given[index] for index in batch], [tokens[index] for index in batch]
                vectors[batch] = await vectors_of(embedder, *asked)
                done += len(batch)
                self._stages.within(Stage.EMBED, done, count)
            ids = [None if (key := record.fields.get("id")) is None else str(key) for record, _ in part]
            await keep(ids, vectors)
