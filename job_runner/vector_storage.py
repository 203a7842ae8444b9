"""Rows with vectors that others have made, into both stores, as one version of one document.

The way is that of a document (:mod:`job_runner.publication`); what differs is where rows come from. The input is read twice:
the first reading finds which rows are good, since each row in the stores says how many there are; the second one writes. In
between, a byte a row is kept and 24 more where it has an id, and nothing of the rows themselves: memory does not grow with
vectors and texts.

A row that is refused is counted and named, and the others are published. Vectors that are not of length 1 are made so: both
the stores' similarity and that of documents is the cosine.
"""

import asyncio
import contextlib
import json
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final
from uuid import UUID

import numpy as np
import numpy.typing as npt
import structlog

from job_runner.embedding import Texts, texts_of, windows
from job_runner.fetch import Opened, hashed, open_document
from job_runner.index import METADATA_BYTES, Row, check_metadata
from job_runner.ledger import Claim, Intent, KeptVectors
from job_runner.publication import WINDOW, Publication, Window, Written, generation_of
from job_runner.rows import Record, records
from job_runner.split import language_of
from job_runner.stages import Stages
from job_runner.stores import OpenStores, Stores, opener
from job_runner.vector_files import reading
from job_runner.work import Done, Work
from task_contract.errors import (
    DocumentChanged,
    DocumentEmpty,
    DocumentNotFound,
    DocumentRefused,
    InvalidTask,
    TaskUnfinished,
)
from task_contract.messages import AttemptOutcome
from task_contract.models import Payload, Phase, Stage, TaskType
from task_contract.names import digest
from task_contract.vectors import INLINE, vectors_of

_VERSION: Final = "1"
"""Of what is made of a row; another one gives rows that differ for the same input."""
_COLUMNS: Final = ("vector", "text", "id", "metadata")
GROUP: Final = 1024
"""Rows that are read and written together; :data:`job_runner.publication.WINDOW` is a multiple of it."""
_AHEAD: Final = 2
"""Groups that may wait for each store."""
_TEXT_BYTES: Final = 65_535
"""Milvus takes no longer text (job_runner.milvus)."""
_DIMENSIONS: Final = 32_768
"""Milvus' own limit."""
_ID_CHARACTERS: Final = 256
_LABELS: Final = 32
"""Of payload.metadata too."""
_KEY_CHARACTERS: Final = 63
_VALUE_CHARACTERS: Final = 1024
_LANGUAGES: Final = ("en", "zh", "other")
"""As :func:`job_runner.split.language_of` tells them apart."""
_NAMED: Final = 10
"""Refused rows that are named, as the contract bounds them."""
_REASON: Final = 120
"""Characters of a reason: ten of them fit into a termination message (task_contract.messages)."""
_NAME_BYTES: Final = 64
"""Of a model from elsewhere: its name stands in a column of 128 bytes of Milvus."""
_STARTS: Final = {Stage.FETCH: 0, Stage.PARSE: 2, Stage.STORE: 25, Stage.VERIFY: 90, Stage.PUBLISH: 96}

log = structlog.get_logger(__name__)


async def vector_storage(work: Work) -> AttemptOutcome:
    """Carry out a task of this type."""
    return work.succeeded(await VectorStorage(work).run())


class Refused(Exception):
    """A row will not be stored; the message says why."""


@dataclass(frozen=True, slots=True)
class Model:
    """What has made the vectors."""

    fingerprint: str
    dimension: int | None
    """None: that of the first good row."""


@dataclass(frozen=True, slots=True)
class Input:
    """Where the rows come from."""

    sha256: str
    rows: Texts
    """Each record has the columns of a row; reads from the first one on."""


@dataclass(frozen=True, slots=True)
class Good:
    """A row that can be stored."""

    text: str
    vector: npt.NDArray[np.float32]
    """Of length 1."""
    metadata: Mapping[str, str]
    key: str | None
    scaled: bool
    """Whether it had another length."""


@dataclass(slots=True)
class Survey:
    """What the first reading has found."""

    good: bytearray = field(default_factory=bytearray)
    """For each row, in the order of the input: 0 for one that is refused, else the place of its language, from 1."""
    refused: int = 0
    named: list[tuple[int, str]] = field(default_factory=list)
    """(row number, reason) of the first refused ones."""
    scaled: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    _numbers: "array[int]" = field(default_factory=lambda: array("q"))
    """Row numbers of the rows with an id, their places, and digests of their ids."""
    _places: "array[int]" = field(default_factory=lambda: array("q"))
    _keys: bytearray = field(default_factory=bytearray)

    @property
    def accepted(self) -> int:
        """How many rows are good."""
        return len(self.good) - self.refused

    def add(self, record: Record, row: Good | Refused) -> None:
        """Count a row."""
        if isinstance(row, Refused):
            self.good.append(0)
            self._refuse(record.number, str(row))
            return
        language = language_of(row.text)
        self.languages[language] += len(row.text)
        self.good.append(1 + _LANGUAGES.index(language))
        self.scaled += row.scaled
        if row.key is not None:
            self._numbers.append(record.number)
            self._places.append(len(self.good) - 1)
            self._keys += bytes.fromhex(digest(row.key, length=32))

    def refuse_repeated(self) -> None:
        """Refuse the rows whose id a row before has; call it once, at the end."""
        if not self._keys:
            return
        keys = np.frombuffer(self._keys, dtype=[("a", "<u8"), ("b", "<u8")])
        first = np.zeros(len(keys), dtype=bool)
        first[np.unique(keys, return_index=True)[1]] = True
        for index in np.flatnonzero(~first):
            self.good[self._places[index]] = 0
            self._refuse(self._numbers[index], "its id stands in a row before")

    def _refuse(self, number: int, reason: str) -> None:
        self.refused += 1
        if len(self.named) < _NAMED or number < self.named[-1][0]:
            self.named = sorted([*self.named, (number, reason[:_REASON])])[:_NAMED]

    def facts(self, dimension: int) -> dict[str, Any]:
        """Return fields of the result."""
        language = max(sorted(self.languages), key=self.languages.__getitem__)
        named = [{"row": number, "reason": reason} for number, reason in self.named]
        return {"dimension": dimension, "language": language, "rejected": self.refused, "rejections": named or None}


def checked(record: Record, *, dimension: int | None, metadata: Mapping[str, str]) -> Good:
    """Return a row that can be stored, with the metadata of the task under its own. Raises Refused."""
    if record.problem:
        raise Refused(record.problem)
    fields = record.fields
    vector, scaled = _vector(fields.get("vector"), dimension)
    text = fields.get("text")
    if not isinstance(text, str) or not text.strip():
        raise Refused("no text")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise Refused("the text is no Unicode: it has half a pair of surrogates") from None
    if size > _TEXT_BYTES:
        raise Refused(f"the text has {size} bytes, {_TEXT_BYTES} are the most")
    key = fields.get("id")
    if key is not None and (isinstance(key, bool) or not isinstance(key, str | int)):
        raise Refused("the id is no text and no whole number")
    name = None if key is None else str(key)
    if name is not None and not 0 < len(name) <= _ID_CHARACTERS:
        raise Refused(f"the id has {len(name)} characters, 1 to {_ID_CHARACTERS} are allowed")
    return Good(text, vector, _metadata(fields.get("metadata"), metadata, name), name, scaled)


def _vector(value: Any, dimension: int | None) -> tuple[npt.NDArray[np.float32], bool]:
    """Return a vector of length 1, and whether it had another length."""
    if value is None:
        raise Refused("no vector")
    try:
        found = np.asarray(value)
    except (ValueError, OverflowError):
        found = np.empty(0, dtype=object)
    if found.ndim != 1 or found.dtype.kind not in "fiu":
        raise Refused("the vector is no list of numbers")
    if dimension is None and not 1 <= len(found) <= _DIMENSIONS:
        raise Refused(f"the vector has {len(found)} dimensions, 1 to {_DIMENSIONS} are allowed")
    if dimension is not None and len(found) != dimension:
        raise Refused(f"the vector has {len(found)} dimensions and not {dimension}")
    # In 64 bits, so that the squares of 32 bits neither overflow nor vanish.
    exact = found.astype(np.float64, copy=False)
    length = math.sqrt(exact @ exact)
    if not math.isfinite(length):
        raise Refused("the vector has numbers that are not finite")
    if length == 0:
        raise Refused("the vector is zero")
    if abs(length - 1) < 1e-5:  # of 32 bits, over thousands of dimensions
        return found.astype(np.float32), False
    return (exact / length).astype(np.float32), True


def _metadata(own: Any, common: Mapping[str, str], key: str | None) -> Mapping[str, str]:
    if own is None:
        own = {}
    if not isinstance(own, Mapping) or not all(isinstance(part, str) for pair in own.items() for part in pair):
        raise Refused("the metadata is no object of texts")
    if key is not None and own.get("id", key) != key:
        raise Refused("the metadata has another id")
    found = {**common, **own, **({} if key is None else {"id": key})}
    if len(found) > _LABELS + 1:
        raise Refused(f"the metadata has {len(found)} labels, {_LABELS} are the most")
    if any(not 0 < len(name) <= _KEY_CHARACTERS or len(value) > _VALUE_CHARACTERS for name, value in found.items()):
        raise Refused(f"a label of the metadata has a name over {_KEY_CHARACTERS} or a value over {_VALUE_CHARACTERS}")
    plain = all(part.isascii() for pair in found.items() for part in pair)
    if plain and 6 * sum(map(len, found.values())) < METADATA_BYTES // 2:  # whatever of it JSON escapes
        return found
    try:
        size = len(json.dumps(found, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        raise Refused("the metadata is no Unicode: it has half a pair of surrogates") from None
    if size > METADATA_BYTES:
        raise Refused(f"the metadata has {size} bytes, {METADATA_BYTES} are the most")
    return found


class VectorStorage:
    """One attempt at one task."""

    def __init__(self, work: Work, *, opener: Callable[..., OpenStores] = opener) -> None:
        """``opener``: as :func:`job_runner.stores.opener`."""
        spec = work.task.spec
        if spec.kb_id is None:
            raise InvalidTask("cannot store vectors without a knowledge base: set spec.kbId")
        check_metadata(spec.payload.metadata or {})
        self._work = work
        self._namespace = work.task.metadata.namespace
        self._kb_id = spec.kb_id
        self._payload = spec.payload
        self._metadata = spec.payload.metadata or {}
        self._document_id = spec.payload.effective_document_id
        self._stages = Stages(work.progress, starts=_STARTS)
        self._opener = opener

    async def run(self) -> Done:
        """Do it. May be canceled until the version is being published. Raises errors of :mod:`task_contract.errors`."""
        async with contextlib.AsyncExitStack() as stack:
            found, kept = await self._input(stack)
            model = await self._model(kept)
            if (dimension := model.dimension) is None:
                with self._stages.enter(Stage.PARSE):
                    dimension = await self._first_dimension(found)
            claim = Claim(
                namespace=self._namespace,
                kb_id=self._kb_id,
                document_id=self._document_id,
                task_uid=self._work.uid,
                task_created_at=self._work.created_at,
                holder=self._work.settings.holder,
                content_hash=self._content_hash(found, model, dimension),
                model_fingerprint=model.fingerprint,
                dimension=dimension,
            )
            open_stores = self._opener(self._work.settings, dimension=dimension, model_fingerprint=model.fingerprint)
            publication = Publication(self._work, stages=self._stages, open_stores=open_stores)
            survey: Survey | None = None

            async def write(intent: Intent, stores: Stores) -> Written:
                nonlocal survey
                survey = survey or await self._survey(found, dimension)
                await self._write(intent, stores, publication, found, survey)
                return Written(chunks=survey.accepted, embedded=None, facts=survey.facts(dimension))

            return await publication.run(claim, write)

    def _content_hash(self, found: Input, model: Model, dimension: int) -> str:
        """Return the identity of what will be written: equal hashes give equal rows, but for the version."""
        labels = [part for pair in sorted(self._metadata.items()) for part in pair]
        return digest("vectors", _VERSION, found.sha256, model.fingerprint, str(dimension), *labels, length=64)

    # --------------------------------------------------------------------------------------------------------- input

    async def _input(self, stack: contextlib.AsyncExitStack) -> tuple[Input, KeptVectors | None]:
        """Return the rows, and of those of a task what has made them."""
        if self._payload.from_task is not None:
            return await self._of_task(stack, self._payload.from_task)
        if self._payload.input_path is None:
            raise InvalidTask("cannot store nothing: set spec.payload.inputPath or spec.payload.fromTask")
        file = await self._opened(stack, self._payload.input_path)
        return Input(file.sha256, lambda: records(file, _COLUMNS)), None

    async def _opened(self, stack: contextlib.AsyncExitStack, path: str) -> Opened:
        with self._stages.enter(Stage.FETCH):
            return await open_document(stack, path, settings=self._work.settings, inspect=hashed)

    async def _of_task(self, stack: contextlib.AsyncExitStack, name: str) -> tuple[Input, KeptVectors]:
        """Join the texts of a task with the vectors that it has made, row by row.

        Texts and vectors must be those of the task: a file that was replaced since would put vectors to other texts.
        """
        uid, payload = await self._task(name)
        kept = await self._work.ledger.kept_vectors(uid)
        if kept is None:
            raise DocumentNotFound(f"cannot find the vectors of task {name}: they are gone with its history; run it again")
        sha256, texts, _ = await texts_of(payload, stack, work=self._work, stages=self._stages)
        if sha256 != kept.source_sha256:
            raise DocumentRefused(
                f"cannot store the vectors of task {name}: {payload.input_path} has changed since; run that task again"
            )
        read = await self._vectors(stack, kept, name)

        def rows() -> Iterator[Record]:
            for record, vector in zip(texts(), read(), strict=True):
                yield Record(record.number, {**record.fields, "vector": vector})

        return Input(digest(kept.source_sha256, kept.model_fingerprint, length=64), rows), kept

    async def _task(self, name: str) -> tuple[UUID, Payload]:
        found = await self._work.ledger.task(namespace=self._namespace, name=name)
        what = f"cannot store the vectors of task {name}"
        if found is None:
            raise InvalidTask(f"{what}: namespace {self._namespace} has no such task; correct payload.fromTask")
        if found.spec.get("type") != TaskType.EMBEDDING_GENERATION:
            raise InvalidTask(f"{what}: it is of type {found.spec.get('type')}; payload.fromTask takes embedding_generation")
        if not found.phase.finished:
            raise TaskUnfinished(f"{what}: it is {found.phase}; this task waits for it")
        if found.phase is not Phase.COMPLETED:
            raise InvalidTask(f"{what}: it is {found.phase}; run it again under another name, and correct payload.fromTask")
        return found.uid, Payload.model_validate(found.spec.get("payload") or {})

    async def _vectors(self, stack: contextlib.AsyncExitStack, kept: KeptVectors, name: str) -> Any:
        """Return what yields the vectors of a task from the first one on."""
        if kept.output == INLINE:  # bounded by TASKS_INLINE_RESULT_BYTES
            parts = [part async for part in self._work.ledger.vector_parts(kept.task_uid)]
            return lambda: (vector for part in parts for _, vector in vectors_of(part))
        file = await self._opened(stack, kept.output)
        if file.sha256 != kept.output_sha256:
            raise DocumentRefused(
                f"cannot store the vectors of task {name}: {kept.output} was written anew since; run that task again"
            )
        return lambda: reading(file, count=kept.vectors, dimension=kept.dimension)

    async def _model(self, kept: KeptVectors | None) -> Model:
        """Return what has made the vectors: the task they come from, the model that is named, or that of the knowledge base.

        A name that this runner has no model of is one from elsewhere: its vectors are held apart from all others.
        """
        named = self._payload.embedding_model
        if kept is not None:
            if named not in {None, kept.model}:
                raise InvalidTask(
                    f"cannot store the vectors as those of {named!r}: task {self._payload.from_task} has made them with "
                    f"{kept.model!r}; leave payload.embeddingModel out"
                )
            return Model(kept.model_fingerprint, kept.dimension)
        known = await self._work.ledger.knowledge_base(namespace=self._namespace, kb_id=self._kb_id)
        if named is None and known is not None and known[1]:
            return Model(known[1], known[2])
        try:
            embedder = await self._work.embedder(named)
        except InvalidTask:
            name = str(named)
            fingerprint = f"external-{name if len(name.encode()) <= _NAME_BYTES else digest(name)}"
            same = known is not None and known[1] == fingerprint
            return Model(fingerprint, known[2] if known is not None and same else None)
        return Model(await asyncio.to_thread(lambda: embedder.fingerprint), embedder.dimension)

    # ------------------------------------------------------------------------------------------------------- reading

    def _good(self, record: Record, dimension: int | None) -> Good | Refused:
        try:
            return checked(record, dimension=dimension, metadata=self._metadata)
        except Refused as refused:
            return refused

    async def _first_dimension(self, found: Input) -> int:
        """Return the dimension of the first row that can be stored. Raises DocumentRefused when there is none."""
        refused: list[tuple[int, str]] = []
        async for part in windows(((record, self._good(record, None)) for record in found.rows()), GROUP):
            for record, row in part:
                if isinstance(row, Good):
                    return len(row.vector)
                refused = [*refused, (record.number, str(row))][:_NAMED]
        raise self._nothing(refused)

    async def _survey(self, found: Input, dimension: int) -> Survey:
        """Read all rows once. Raises DocumentRefused when none is good."""
        survey = Survey()
        with self._stages.enter(Stage.PARSE):
            rows = ((record, self._good(record, dimension)) for record in found.rows())
            async for part in windows(rows, GROUP):
                for record, row in part:
                    survey.add(record, row)
            survey.refuse_repeated()
            if not survey.accepted:
                raise self._nothing(survey.named)
        log.info("rows", good=survey.accepted, refused=survey.refused, scaled_to_length_1=survey.scaled)
        return survey

    def _nothing(self, named: list[tuple[int, str]]) -> DocumentRefused | DocumentEmpty:
        name = self._payload.input_path or self._payload.from_task
        if not named:
            return DocumentEmpty(f"cannot store the vectors of {name}: it has no row")
        reasons = "; ".join(f"row {number}: {reason}" for number, reason in named[:3])
        return DocumentRefused(f"cannot store the vectors of {name}: no row of it is good: {reasons}; correct them")

    # ------------------------------------------------------------------------------------------------------- writing

    async def _write(self, intent: Intent, stores: Stores, publication: Publication, found: Input, survey: Survey) -> None:
        """Bring the good rows into both stores; a store that has a row already is not sent it again.

        A group is read while the one before is written, by each store for itself.
        """
        row_of = partial(self._row, intent=intent, count=survey.accepted, source_sha256=found.sha256)
        # Neither store is to wait for the other with each group.
        writers = publication.writer(waiting=_AHEAD), publication.writer(waiting=_AHEAD)
        spans = Window.all(survey.accepted)
        there: tuple[set[str], set[str]] = set(), set()
        done = 0
        with self._stages.enter(Stage.STORE):
            try:
                async for part in windows(self._again(found, survey, intent.claim.dimension), GROUP):
                    if done % WINDOW == 0:
                        there = await publication.take_over(intent, stores, next(spans))
                    rows = [row_of(good, done + index, language) for index, (good, language) in enumerate(part)]
                    done += len(part)
                    new = [index for index, row in enumerate(rows) if row.id not in there[0]]
                    if new:
                        vectors = np.stack([part[index][0].vector for index in new])
                        await writers[0].start(partial(stores.vectors.write, [rows[index] for index in new], vectors))
                    if missing := [row for row in rows if row.id not in there[1]]:
                        await writers[1].start(partial(stores.texts.write, missing))
                    self._stages.within(Stage.STORE, done, survey.accepted)
                for writer in writers:
                    await writer.finish()
            except BaseException:
                for writer in writers:
                    await writer.abandon()
                raise

    def _again(self, found: Input, survey: Survey, dimension: int) -> Iterator[tuple[Good, str]]:
        """Yield the good rows, each with its language."""
        for record, good in zip(found.rows(), survey.good, strict=True):
            if good:
                row = self._good(record, dimension)
                if isinstance(row, Refused):
                    raise DocumentChanged(f"cannot store {self._document_id}: its input was written to while it was read")
                yield row, _LANGUAGES[good - 1]

    def _row(self, good: Good, ordinal: int, language: str, *, intent: Intent, count: int, source_sha256: str) -> Row:
        return Row(
            id=generation_of(intent).chunk_id(self._document_id, intent.version, ordinal),
            document_id=self._document_id,
            version=intent.version,
            ordinal=ordinal,
            text=good.text,
            text_hash=digest(good.text),
            page_start=0,
            page_end=0,
            heading_path="",
            char_start=0,
            char_end=len(good.text),
            language=language,
            metadata=good.metadata,
            source_sha256=source_sha256,
            content_hash=intent.claim.content_hash,
            task_uid=str(self._work.uid),
            chunk_count=count,
            tokens=0,
            pipeline=f"vectors {_VERSION}, model {intent.claim.model_fingerprint}",
        )
