"""A shard of a batch: its documents one after another through the pipeline of single ones, and what became of each.

The first pod of a task that comes lists the documents and enters them in PostgreSQL, all in one transaction; the others, and
all later attempts, read theirs there. So the set is what it was then, whatever becomes of a folder meanwhile. Two pods that
list at once list twice; what the first one enters counts.

It is safe to die at any write:

- *before the list is entered*: the next pod lists.
- *document taken up*: that is counted in its row before any work. Of what is left, an attempt begins with what was taken up
  least often, so a document that kills its pod keeps the others waiting once, not for ever.
- *document published, outcome not entered*: the next attempt finds it published by this task, and enters that.

What is wrong with a document is entered with it and ends no pod: a permanent error for good, any other one until the next
attempt. A store that is down, SIGTERM, the fence and a runner without its model end the pod at once: no other document would
fare better.
"""

import asyncio
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from job_runner.fetch import files_below, hashed, open_document
from job_runner.indexing import Indexing
from job_runner.progress import Progress
from job_runner.settings import Settings
from job_runner.watchdog import beat
from job_runner.work import Done, Work
from task_contract.batches import COUNTS, MOST_DOCUMENTS, read_shards, shard_count
from task_contract.errors import (
    DocumentNotFound,
    DocumentUnreadable,
    DuplicateDocument,
    Fenced,
    HandedBack,
    InvalidTask,
    ModelUnavailable,
    PermanentError,
    SourceUnavailable,
    StoreUnavailable,
    TaskError,
)
from task_contract.location import is_url
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Payload, ProcessingTask, Result, Stage, TaskType, describe

_OWN: Final = frozenset({"filePaths", "prefix", "glob", "manifestPath", "parallelism", "maxFailedPercent"})
"""Fields of the payload that are the batch's; the others are those of each document."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Listed:
    """A document of a batch, as a list has it."""

    file_path: str
    document_id: str
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Taken:
    """A document that this pod has taken up."""

    ordinal: int
    listed: Listed


# ------------------------------------------------------------------------------------------------------------- listing


class _Line(BaseModel):
    """A line of a manifest that is a JSON object."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, frozen=True)

    file_path: str
    document_id: str | None = None
    metadata: dict[str, str] = {}


async def list_documents(payload: Payload, *, settings: Settings) -> list[Listed]:
    """Return the documents of a batch in their order, those of a folder in that of their paths.

    Raises InvalidTask, DocumentNotFound where there are none, DocumentRefused, and SourceUnavailable or StoreUnavailable
    where it cannot be told.
    """
    if payload.file_paths is not None:
        return [Listed(path, path) for path in payload.file_paths]
    if payload.prefix is not None:
        with _of_field("prefix"):
            found = await _below(payload.prefix, payload.glob or "**", settings)
    elif payload.manifest_path is not None:
        with _of_field("manifestPath"):
            found = await _from_manifest(payload.manifest_path, settings)
    else:
        raise InvalidTask("cannot list the batch: set one of payload.filePaths, payload.prefix, payload.manifestPath")
    if len(found) > MOST_DOCUMENTS:
        raise InvalidTask(f"cannot list the batch: it has more than {MOST_DOCUMENTS} documents; make several tasks of it")
    return found


@contextmanager
def _of_field(name: str) -> Iterator[None]:
    """Have errors of opening a place name the field that it stands in."""
    try:
        yield
    except TaskError as error:
        error.message = error.message.replace("payload.filePath", f"payload.{name}")
        raise


async def _below(prefix: str, glob: str, settings: Settings) -> list[Listed]:
    if is_url(prefix):
        from job_runner.remote import list_objects  # obstore, which a mounted document does not need

        names = [url.removeprefix(prefix) for url in await list_objects(prefix, settings=settings, most=MOST_DOCUMENTS)]
        start = prefix
    else:
        names = await asyncio.to_thread(lambda: sorted(files_below(prefix, root=settings.document_root)))
        start = prefix.rstrip("/") + "/"
    matches = glob_pattern(glob).fullmatch
    found = list(islice((start + name for name in names if matches(name)), MOST_DOCUMENTS + 1))
    if not found:
        there = f"none of the {len(names)} files there matches payload.glob {glob}" if names else "there is no file"
        raise DocumentNotFound(f"cannot list the batch: below {prefix} {there}; correct payload.prefix or payload.glob")
    return [Listed(path, path) for path in found]


def glob_pattern(glob: str) -> re.Pattern[str]:
    """Return what a glob matches, as Python 3.13's ``glob.translate`` has it: ``**`` is any folders, ``*`` stops at a slash.

    >>> bool(glob_pattern("2026/**/*.md").fullmatch("2026/07/a/notes.md"))
    True
    """
    parts = glob.split("/")
    pattern = ""
    for place, part in enumerate(parts, start=1):
        last = place == len(parts)
        if part == "**":
            pattern += ".+" if last else "(?:.+/)?"
            continue
        pieces = re.split(r"(\*|\?|\[[^]]+\])", part)
        pattern += "".join(_piece(piece) for piece in pieces) + ("" if last else "/")
    return re.compile(pattern, re.DOTALL)


def _piece(piece: str) -> str:
    match piece:
        case "*":
            return "[^/]*"
        case "?":
            return "[^/]"
        case _ if re.fullmatch(r"\[[^]]+\]", piece):
            inside = piece[1:-1].replace("\\", "\\\\").replace("[", "\\[")
            return f"(?!/)[{'^' + inside[1:] if inside.startswith('!') else inside}]"
        case _:
            return re.escape(piece)


async def _from_manifest(path: str, settings: Settings) -> list[Listed]:
    def read(descriptor: int) -> list[Listed]:
        try:
            with open(descriptor, encoding="utf-8-sig", closefd=False) as lines:
                lines.seek(0)
                return list(islice(parse_manifest_lines(lines), MOST_DOCUMENTS + 1))
        except UnicodeDecodeError as error:
            raise DocumentUnreadable(f"cannot read {path}: it is not in UTF-8 ({error.reason}); convert it") from error
        except OSError as error:
            raise StoreUnavailable(f"cannot read {path}: {error.strerror}; check the volume") from error

    async with AsyncExitStack() as stack:
        opened = await open_document(stack, path, settings=settings, inspect=hashed)
        found = await asyncio.to_thread(read, opened.descriptor)
    if not found:
        raise DocumentNotFound(f"cannot list the batch: {path} names no document; correct payload.manifestPath")
    return found


def parse_manifest_lines(lines: Iterable[str]) -> Iterator[Listed]:
    """Read a manifest: a path a line, or a JSON object a line; empty lines count for nothing. Raises InvalidTask."""
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        if not text.startswith("{"):
            yield Listed(text, text)
            continue
        try:
            read = _Line.model_validate_json(text)
        except ValidationError as error:
            raise InvalidTask(
                f"cannot list the batch: line {number} of payload.manifestPath: {describe(error)}; "
                "give a path, or a JSON object with filePath and, if you like, documentId and metadata"
            ) from error
        yield Listed(read.file_path, read.document_id or read.file_path, read.metadata)


# --------------------------------------------------------------------------------------------------------------- table


class _Table:
    """The rows of one batch."""

    def __init__(self, work: Work) -> None:
        self._ledger = work.ledger
        self._uid = work.uid
        self._attempt = work.settings.attempt

    async def total(self) -> int | None:
        """Return how many documents there are; None before they are listed."""
        async with self._ledger.connection("look for the batch") as connection:
            total: int | None = await connection.fetchval("SELECT total FROM batches WHERE task_uid = $1", self._uid)
            return total

    async def enter(self, documents: Sequence[Listed], *, shards: int) -> None:
        """Enter the documents, dealt out among the shards, unless another pod has entered them.

        Of those of one documentId the first counts: the same file again is done with it, another one is refused.
        """
        first: dict[str, tuple[int, Listed]] = {}
        rows = []
        for ordinal, one in enumerate(documents, start=1):
            place, before = first.setdefault(one.document_id, (ordinal, one))
            state, reason, message = "pending", None, None
            if before is not one:
                state, reason = ("done", "Duplicate") if before == one else ("failed", DuplicateDocument.reason)
                message = f"document {place} of the batch has the same documentId, {one.document_id}"
                message += "" if before == one else ": it would replace this one; give each its own"
            rows.append((ordinal, (ordinal - 1) % shards, one, state, reason, message))
        async with self._ledger.connection("enter the batch") as connection, connection.transaction():
            entered = await connection.fetchval(  # waits for another pod's transaction, and then enters nothing
                "INSERT INTO batches (task_uid, total) VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING total",
                self._uid,
                len(rows),
            )
            if entered is None:
                return
            await connection.execute(
                "INSERT INTO batch_documents "
                "(task_uid, ordinal, shard, file_path, document_id, metadata, state, reason, message) "
                "SELECT $1, * FROM unnest($2::integer[], $3::integer[], $4::text[], $5::text[], $6::jsonb[], $7::text[], "
                "$8::text[], $9::text[])",
                self._uid,
                [row[0] for row in rows],
                [row[1] for row in rows],
                [row[2].file_path for row in rows],
                [row[2].document_id for row in rows],
                [json.dumps(dict(row[2].metadata)) for row in rows],
                [row[3] for row in rows],
                [row[4] for row in rows],
                [row[5] for row in rows],
            )

    async def take(self, *, shard: int | None, but: Sequence[int]) -> _Taken | None:
        """Take up the next document of a shard (None: of any) that has not ended and is none of ``but``."""
        async with self._ledger.connection("take up a document") as connection:
            row = await connection.fetchrow(
                "UPDATE batch_documents SET begun = begun + 1, attempt = $2, updated_at = now() "
                "WHERE task_uid = $1 AND ordinal = (SELECT ordinal FROM batch_documents WHERE task_uid = $1 "
                "AND state = 'pending' AND ($3::integer IS NULL OR shard = $3) AND ordinal <> ALL($4::integer[]) "
                "ORDER BY begun, ordinal LIMIT 1) RETURNING ordinal, file_path, document_id, metadata",
                self._uid,
                self._attempt,
                shard,
                list(but),
            )
        if row is None:
            return None
        listed = Listed(row["file_path"], row["document_id"], json.loads(row["metadata"]))
        return _Taken(row["ordinal"], listed)

    async def done(self, ordinal: int, done: Done) -> None:
        """Enter that a document has ended well."""
        result = done.result
        await self._end(ordinal, "done", done.reason, None, result.version, result.chunks, result.embedded, result.reused)

    async def failed(self, ordinal: int, error: TaskError) -> None:
        """Enter an error: for good, or until the next attempt."""
        state = "failed" if isinstance(error, PermanentError) else "pending"
        message = error.message if len(error.message) <= 1024 else error.message[:1023] + "…"
        await self._end(ordinal, state, error.reason, message.replace("\0", ""), None, None, None, None)

    async def _end(self, ordinal: int, *values: object) -> None:
        # Only of one that is pending: the operator may have given it up, or another pod have ended it.
        async with self._ledger.connection("enter what became of a document") as connection:
            await connection.execute(
                "UPDATE batch_documents SET state = $3, reason = $4, message = $5, version = $6, chunks = $7, "
                "embedded = $8, reused = $9, updated_at = now() WHERE task_uid = $1 AND ordinal = $2 AND state = 'pending'",
                self._uid,
                ordinal,
                *values,
            )

    async def counts(self) -> Mapping[str, Any]:
        """Return what has become of the documents, as :data:`task_contract.batches.COUNTS` has it."""
        async with self._ledger.connection("count the documents") as connection:
            row: Mapping[str, Any] = await connection.fetchrow(COUNTS, self._uid)
            return row


# --------------------------------------------------------------------------------------------------------------- shard


class _OfBatch:
    """Progress of a document as that of its batch: how many of all documents have ended."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._counted = (0, 1)

    def count(self, ended: int, total: int) -> None:
        """Take in how far the batch has come."""
        self._counted = (ended, total)
        self.report(Stage.PUBLISH, 0)

    def report(self, stage: Stage, percent: int, *, counted: tuple[int, int] | None = None) -> None:
        del percent, counted  # of the document
        ended, total = self._counted
        self._progress.report(stage, 100 * ended // total, counted=self._counted)


class Batch:
    """One attempt at one shard of a ``batch_processing`` task; outside a cluster at all of them."""

    def __init__(self, work: Work) -> None:
        if work.task.spec.kb_id is None:
            raise InvalidTask("cannot index documents without a knowledge base: set spec.kbId")
        self._work = work
        self._payload = work.task.spec.payload
        self._shard = _shard_of(work.settings)
        self._table = _Table(work)
        self._progress = _OfBatch(work.progress)

    async def run(self) -> AttemptOutcome:
        """Do it. Raises errors of :mod:`task_contract.errors`: permanent ones are those of the whole batch.

        One that may be tried again names the first document that it stands for.
        """
        if await self._table.total() is None:
            documents = await list_documents(self._payload, settings=self._work.settings)
            await self._table.enter(documents, shards=shard_count(self._payload))
        tried: list[int] = []
        left: list[tuple[Listed, TaskError]] = []
        async with aclosing(Indexing()) as indexing:  # opened by the first document: an empty shard needs no model
            counts = await self._count()
            while (taken := await self._table.take(shard=self._shard, but=tried)) is not None:
                beat()
                tried.append(taken.ordinal)
                error = await self._one(taken, indexing)
                if error is not None and not isinstance(error, PermanentError):
                    left.append((taken.listed, error))
                counts = await self._count()
        if left:
            raise _left_over(left, shard=self._shard)
        result = Result(
            documents=counts["published"],
            documents_total=counts["total"],
            documents_failed=counts["failed"],
            chunks=counts["chunks"],
        )
        return AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=self._work.settings.attempt, result=result)

    async def _one(self, taken: _Taken, indexing: Indexing) -> TaskError | None:
        """Process a document and enter what became of it; return what went wrong with it."""
        work = self._work
        with structlog.contextvars.bound_contextvars(document=taken.listed.document_id):
            try:
                task = _document_task(work.task, taken.listed)
                one = Work(
                    task,
                    uid=work.uid,
                    created_at=work.created_at,
                    settings=work.settings,
                    ledger=work.ledger,
                    progress=self._progress,
                    make_embedder=work.make_embedder,
                )
                done = await indexing.process(one)
            except SourceUnavailable as error:  # of this document's server: those of others may be well
                problem: TaskError = error
            except (StoreUnavailable, HandedBack, Fenced, ModelUnavailable):
                raise
            except TaskError as error:
                problem = error
            except Exception as error:
                log.exception("the runner failed")
                problem = TaskError(f"{type(error).__name__}: {error}; this is an error of the runner, see its log")
            else:
                await self._table.done(taken.ordinal, done)
                return None
            log.warning("document failed", reason=problem.reason, error=problem.message)
            await self._table.failed(taken.ordinal, problem)
            return problem

    async def _count(self) -> Mapping[str, int]:
        counts = await self._table.counts()
        self._progress.count(counts["total"] - counts["pending"], counts["total"])
        return counts


def _shard_of(settings: Settings) -> int | None:
    if settings.shards is None:
        return None
    shards = read_shards(settings.shards)
    if settings.shard_index >= len(shards):
        raise TaskError(f"cannot tell the shard: TASKS_SHARDS {settings.shards} has no index {settings.shard_index}")
    return shards[settings.shard_index]


def _document_task(task: ProcessingTask, listed: Listed) -> ProcessingTask:
    """Return the task of one document of a batch. Raises InvalidTask for a place or an identity that it cannot have."""
    shared = {name: value for name, value in task.spec.payload.manifest().items() if name not in _OWN}
    own = {"filePath": listed.file_path, "documentId": listed.document_id}
    metadata = {**shared.pop("metadata", {}), **listed.metadata}
    try:
        payload = Payload.model_validate({**shared, **own, **({"metadata": metadata} if metadata else {})})
    except ValidationError as error:
        raise InvalidTask(f"cannot index {listed.file_path}: {describe(error)}; correct the list of documents") from error
    spec = task.spec.model_copy(update={"type": TaskType.DOCUMENT_PROCESSING, "payload": payload})
    return task.model_copy(update={"spec": spec})


def _left_over(left: Sequence[tuple[Listed, TaskError]], *, shard: int | None) -> TaskError:
    """Return the error of a shard of which documents are left: a counted one first, since waiting alone cures the others."""
    listed, error = min(left, key=lambda one: isinstance(one[1], StoreUnavailable))
    where = "" if shard is None else f" of shard {shard}"
    return type(error)(
        f"cannot publish {len(left)} documents{where} this time, the first is {listed.file_path}: {error.message}",
        stage=error.stage,
    )
