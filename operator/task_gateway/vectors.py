"""GET /api/v1/tasks/{id}/vectors: what an embedding_generation task without outputPath has computed."""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import asyncpg
import orjson
import structlog
from aiohttp import web

from task_contract.models import Phase, TaskType
from task_contract.vectors import INLINE, vectors_of
from task_gateway.database import Database, DatabaseUnavailable
from task_gateway.problems import Problem
from task_gateway.routes import NAME, NAMESPACE, Route
from task_gateway.tasks import Tasks, check_finished

_log = structlog.get_logger(__name__)

_LINES: Final = "application/x-ndjson"
_LINE: Final = {
    "type": "object",
    "description": "One a line, in the order of the input.",
    "required": ["row", "vector"],
    "properties": {
        "row": {"type": "integer", "minimum": 1, "description": "Number of the text in the input."},
        "id": {"type": "string", "description": "Id of its row there, if it has one."},
        "vector": {"type": "array", "items": {"type": "number"}, "description": "Numbers of 32 bits; of length 1."},
    },
}


class Vectors:
    """Vectors of tasks."""

    def __init__(self, *, tasks: Tasks, database: Database) -> None:
        self._tasks = tasks
        self._database = database

    def routes(self) -> Sequence[Route]:
        """Return the operations."""
        return (
            Route(
                "GET",
                "/api/v1/tasks/{id}/vectors",
                self._get,
                "The vectors of a task",
                {200: {_LINES: _LINE}},
                problems=(404, 409, 422),
                parameters=(NAME, *NAMESPACE),
                description="Of a task of type embedding_generation that has completed and keeps them in PostgreSQL: a JSON "
                "object a line. With payload.output_path they are in that file, which result.output names.",
            ),
        )

    async def _get(self, request: web.Request) -> web.StreamResponse:
        namespace, name = await self._tasks.named(request, "get")
        view = await self._tasks.view(namespace, name)
        if view["task_type"] != TaskType.EMBEDDING_GENERATION:
            raise _none(name, f"it is of type {view['task_type']}")
        check_finished(view)
        if view["status"] != Phase.COMPLETED.lower():
            raise _none(name, f"it is {view['status']}")
        if (output := (view["result"] or {}).get("output")) != INLINE:
            raise _none(name, f"they are in {output} on the document volume")
        part = await self._database.vectors(view["uid"], first=0)
        if part is None:
            raise _none(name, "they were deleted with its history")
        return await self._stream(request, view["uid"], part)

    async def _stream(self, request: web.Request, uid: str, part: asyncpg.Record | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": _LINES})
        try:
            await response.prepare(request)
            while part is not None:
                await response.write(await asyncio.to_thread(_encoded, part))
                part = await self._database.vectors(uid, first=part["first"] + 1)
            await response.write_eof()
        except DatabaseUnavailable as error:
            # The head is gone: all that can be done is not to let it look like the end.
            _log.warning("vectors have broken off", error=str(error))
            if request.transport is not None:
                request.transport.abort()
        except ConnectionResetError:
            pass  # the reader has gone
        return response


def _encoded(part: asyncpg.Record) -> bytes:
    lines = []
    for row, (key, vector) in enumerate(vectors_of(dict(part)), start=part["first"] + 1):
        line: dict[str, Any] = {"row": row} if key is None else {"row": row, "id": key}
        lines.append(orjson.dumps(line | {"vector": vector.tolist()}, option=orjson.OPT_APPEND_NEWLINE))
    return b"".join(lines)


def _none(name: str, why: str) -> Problem:
    return Problem(404, "no-vectors", f"cannot return vectors of task {name}: {why}")
