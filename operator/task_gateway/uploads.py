"""Uploads: a document is put on the volume of its namespace or into a bucket, and a task is made that processes it.

The file comes first; a task that is refused takes it away again. When nobody can tell (the API server does not answer) the
file stays, for the task may be there.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import orjson
import structlog
from aiohttp import BodyPartReader, web

from task_contract.models import Payload, TaskType
from task_contract.names import GROUP, digest
from task_gateway.callers import Caller, Callers
from task_gateway.documents import (
    DocumentStore,
    PlaceFull,
    PlaceUnavailable,
    Received,
    TooLarge,
    safe_name,
    wrong_content,
)
from task_gateway.models import Accepted, accepted, parse_task
from task_gateway.problems import FieldError, Problem
from task_gateway.routes import NAMESPACE, Route, answer, asked_namespace, caller_of, plain_schema
from task_gateway.tasks import Tasks

_log = structlog.get_logger(__name__)

SHA256: Final = f"{GROUP}/sha256"
"""Annotation: digest of the file that was uploaded."""
_JSON: Final = "application/json"
_FORM: Final = "multipart/form-data"
_PAYLOAD: Final = ("document_id", "chunk_size", "chunk_overlap", "processing_mode", "embedding_model", "metadata")
_AROUND: Final = (
    *("kb_id", "priority", "idempotency_key", "timeout", "stall_timeout", "deadline", "resource_class", "executor"),
    *("labels", "callback", "retry", "suspend", "ttl_seconds_after_finished"),
)
_AS_JSON: Final = frozenset({"metadata", "labels", "callback", "retry", "suspend"})
_TEXT_BYTES: Final = 65_536
"""Of a field that is no file."""
_PARTS: Final = 50
_CHUNK: Final = 1 << 18
_SILENCE: Final = 60.0  # seconds without a byte
_OVERHEAD: Final = 1 << 20
"""Bytes of a body beside the file."""
_TIDY_SECONDS: Final = 3600.0


class Uploaded(Accepted):
    """A document that was stored, and the task that processes it."""

    file_path: str
    """Where pods see it."""
    document_id: str
    size_bytes: int
    sha256: str


@dataclass(slots=True)
class _Upload:
    """A file that is being uploaded."""

    store: DocumentStore
    caller: Caller
    namespace: str
    name: str
    declared: str
    """Type that its sender gave it; may be empty."""
    received: Received | None = None


class Uploads:
    """POST /api/v1/knowledge/upload."""

    def __init__(self, *, tasks: Tasks, callers: Callers, store: DocumentStore | None, most_bytes: int) -> None:
        """``store``: None: there are no uploads; ``most_bytes``: of a file."""
        self._tasks = tasks
        self._callers = callers
        self._store = store
        self._most_bytes = most_bytes
        self._finishing: set[asyncio.Task[web.Response]] = set()

    def routes(self) -> Sequence[Route]:
        """Return the operations."""
        return (
            Route(
                "POST",
                "/api/v1/knowledge/upload",
                self._upload,
                "Upload a document and process it",
                {202: {_JSON: Uploaded}},
                problems=(400, 404, 408, 409, 413, 415, 422, 507),
                parameters=NAMESPACE,
                body={_FORM: _FORM_SCHEMA},
                tag="knowledge",
                description=(
                    "The file is stored as it arrives, whole or not at all. Fields that stand before it are checked before "
                    "it is read. With an idempotency_key the same file may be sent again: the answer is the first task."
                ),
            ),
        )

    async def _upload(self, request: web.Request) -> web.Response:
        if request.content_type != _FORM:
            raise Problem(415, "unsupported-media-type", f"cannot read the upload: send it as {_FORM}")
        if (request.content_length or 0) > self._most_bytes + _OVERHEAD:
            raise self._too_large()
        fields: dict[str, str] = {}
        upload: _Upload | None = None
        async with contextlib.AsyncExitStack() as stack:
            async for part in _parts(request):
                if part.name != "file":
                    await _read_field(part, fields)
                elif upload is not None:
                    raise _wrong("file", "is given twice; send one file a request")
                else:
                    upload = await self._begin(request, part, fields)
                    upload.received = await stack.enter_async_context(self._receive(upload, part))
            if upload is None or upload.received is None:
                raise _wrong("file", "is required")
            if fields.get("namespace", upload.namespace) != upload.namespace:
                raise _wrong("namespace", "must stand before the file")
            # A client that goes away now has uploaded the file all the same: what was begun is brought to its end.
            finishing = asyncio.create_task(self._finish(upload, upload.received, fields))
            self._finishing.add(finishing)
            finishing.add_done_callback(self._finishing.discard)
            try:
                return await asyncio.shield(finishing)
            finally:
                await asyncio.wait([finishing])  # it needs what was received

    async def _begin(self, request: web.Request, part: BodyPartReader, fields: Mapping[str, str]) -> _Upload:
        """Check what is known before a byte of the file is read."""
        caller = caller_of(request)
        namespace = self._callers.namespace(fields.get("namespace"), *asked_namespace(request))
        await self._callers.check(caller, "create", namespace)
        if self._store is None or not self._store.serves(namespace):
            raise Problem(
                404,
                "not-found",
                f"cannot take uploads for namespace {namespace}: its document volume is not mounted in this gateway; "
                "put the document there yourself and create a task with its payload.file_path",
            )
        declared = part.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        upload = _Upload(self._store, caller, namespace, safe_name(part.filename), declared)
        if "kb_id" in fields:
            parse_task(_body(fields, upload, file_path="/data/document", size=0))
        return upload

    @contextlib.asynccontextmanager
    async def _receive(self, upload: _Upload, part: BodyPartReader) -> AsyncIterator[Received]:
        with _storable():
            try:
                async with upload.store.receive(
                    _chunks(part), namespace=upload.namespace, limit=self._most_bytes
                ) as received:
                    yield received
            except TooLarge:
                raise self._too_large() from None

    async def _finish(self, upload: _Upload, received: Received, fields: Mapping[str, str]) -> web.Response:
        """Put the file into its place and create its task. Raises :class:`Problem`; then the file is gone again."""
        if (wrong := wrong_content(received.head, name=upload.name, declared=upload.declared)) is not None:
            raise Problem(422, "invalid-task", f"cannot take the document: {wrong}", errors=[FieldError("file", wrong)])
        if fields.get("sha256", received.sha256).lower() != received.sha256:
            raise _wrong("sha256", f"is not that of the file, which is {received.sha256}; send it again")
        wanted = parse_task(_body(fields, upload, file_path="/data/document", size=received.size))
        if (kb_id := wanted.spec.get("kbId")) is None:
            raise _wrong("kb_id", "is required")
        # With a key the place follows from it and from the content: whoever repeats the request asks for the same task.
        key = wanted.idempotency_key
        token = secrets.token_hex(12) if key is None else digest(upload.caller.name, key, received.sha256, length=24)
        with _storable():
            stored = await upload.store.place(received, kb_id=kb_id, token=token, name=upload.name)
        body = _body(fields, upload, file_path=stored.file_path, size=received.size)
        try:
            manifest, replayed = await self._tasks.create(
                parse_task(body),
                caller=upload.caller,
                namespace=upload.namespace,
                annotations={SHA256: received.sha256},
            )
        except Problem as problem:
            if problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                _log.warning("an uploaded file stays, for its task may have been created", path=stored.file_path)
            elif stored.fresh:
                await upload.store.remove(stored)
            raise
        told = {
            **accepted(manifest),
            "file_path": stored.file_path,
            "document_id": body["payload"]["document_id"],
            "size_bytes": received.size,
            "sha256": received.sha256,
        }
        return answer(told, status=202, headers={"Idempotent-Replayed": "true"} if replayed else None)

    def _too_large(self) -> Problem:
        return Problem(413, "too-large", f"cannot take the document: it has more than {self._most_bytes} bytes")

    async def tidy(self) -> None:
        """Remove what processes that were killed have left half, once an hour, until cancelled."""
        while True:
            if self._store is not None and (removed := await self._store.tidy()):
                _log.info("removed uploads that had been cut off", files=removed)
            await asyncio.sleep(_TIDY_SECONDS)


def _wrong(field: str, message: str) -> Problem:
    return Problem(422, "invalid-task", f"cannot take the document: {field}: {message}", errors=[FieldError(field, message)])


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Turn what is wrong with a multipart body into a problem."""
    try:
        yield
    except TimeoutError:
        raise Problem(408, "invalid-request", f"cannot read the upload: nothing came for {_SILENCE:.0f} s") from None
    except (ValueError, AssertionError, RuntimeError, web.RequestPayloadError) as error:
        raise Problem(400, "invalid-request", f"cannot read the upload: {str(error)[:200] or 'it is cut off'}") from error


async def _parts(request: web.Request) -> AsyncIterator[BodyPartReader]:
    """Yield the parts of a form; each is to be read before the next one."""
    with _readable():
        reader = await request.multipart()
    for _ in range(_PARTS):
        with _readable():
            async with asyncio.timeout(_SILENCE):
                part = await reader.next()
        if part is None:
            return
        if not isinstance(part, BodyPartReader) or part.name is None:
            raise Problem(400, "invalid-request", "cannot read the upload: each part needs a name, and has no parts itself")
        yield part
    raise Problem(400, "invalid-request", f"cannot read the upload: it has more than {_PARTS} parts")


async def _chunks(part: BodyPartReader) -> AsyncIterator[bytes]:
    while True:
        with _readable():
            async with asyncio.timeout(_SILENCE):
                chunk = await part.read_chunk(_CHUNK)
        if not chunk:
            return
        yield chunk


async def _read_field(part: BodyPartReader, fields: dict[str, str]) -> None:
    name = str(part.name).encode("utf-8", "replace").decode()  # headers may hold any bytes
    if name not in {"namespace", "sha256", *_PAYLOAD, *_AROUND}:
        raise _wrong(name[:80], "is no field of it; take it out")
    if name in fields:
        raise _wrong(name, "is given twice; give it once")
    data = bytearray()
    async for chunk in _chunks(part):
        data += chunk
        if len(data) > _TEXT_BYTES:
            raise _wrong(name, f"has more than {_TEXT_BYTES} bytes")
    try:
        fields[name] = data.decode()
    except UnicodeDecodeError as error:
        raise _wrong(name, "is no text in UTF-8") from error


@contextlib.contextmanager
def _storable() -> Iterator[None]:
    """Turn what is wrong with where documents are put into a problem."""
    try:
        yield
    except PlaceFull as error:
        raise Problem(507, "volume-full", str(error)) from error
    except PlaceUnavailable as error:
        raise Problem(503, "unavailable", str(error), retry_after=10) from error


def _body(fields: Mapping[str, str], upload: _Upload, *, file_path: str, size: int) -> dict[str, Any]:
    """Return the body of POST /api/v1/tasks that an upload stands for. Raises :class:`Problem` for JSON that is none."""

    def value(field: str) -> Any:
        if field not in _AS_JSON:
            return fields[field]
        try:
            return orjson.loads(fields[field])
        except orjson.JSONDecodeError as error:
            raise _wrong(field, "is no JSON") from error

    payload = {field: value(field) for field in _PAYLOAD if field in fields}
    return {
        "task_type": str(TaskType.DOCUMENT_PROCESSING),
        **{field: value(field) for field in _AROUND if field in fields},
        # Whoever uploads a file of the same name again replaces the document.
        "payload": {"document_id": upload.name, **payload, "file_path": file_path, "file_bytes": size},
    }


_PAYLOAD_SCHEMA: Final = Payload.model_json_schema(by_alias=False)
_FORM_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["kb_id", "file"],
    "additionalProperties": False,
    "properties": {
        "namespace": {"type": "string", "maxLength": 63, "description": "Where the task goes; stands before the file."},
        "kb_id": {"type": "string", "minLength": 1, "maxLength": 63},
        **{
            name: plain_schema(_PAYLOAD_SCHEMA["properties"][name], _PAYLOAD_SCHEMA)
            for name in _PAYLOAD
            if name not in _AS_JSON
        },
        "metadata": {"type": "string", "description": "A JSON object of labels, as payload.metadata."},
        "sha256": {"type": "string", "description": "Of the file: another one is refused."},
        **{
            name: {"type": "string", "description": "As in POST /api/v1/tasks" + (", as JSON." if name in _AS_JSON else ".")}
            for name in _AROUND
            if name != "kb_id"
        },
        "file": {"type": "string", "contentMediaType": "application/octet-stream", "description": "The document."},
    },
}
