"""POST /api/v1/tasks/batch: up to 1,000 tasks in one request, each for itself accepted or refused."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import structlog
from aiohttp import web

from task_gateway.callers import Caller, Callers
from task_gateway.models import BatchAnswer, accepted, parse_task
from task_gateway.problems import Problem
from task_gateway.routes import (
    NAMESPACE,
    REQUEST_ID,
    Route,
    answer,
    asked_namespace,
    caller_of,
    check_media_type,
    parse_json,
    read_body,
)
from task_gateway.settings import Settings
from task_gateway.tasks import Tasks

_log = structlog.get_logger(__name__)

LIMIT: Final = 1000
"""Tasks of a batch."""
_AT_ONCE: Final = 2
"""Batches that a replica has in memory; others wait before their body is read."""
_ARRAY: Final = "application/json"
_LINES: Final = ("application/x-ndjson", "application/jsonl")


class Batches:
    """The batch API."""

    def __init__(
        self, *, tasks: Tasks, callers: Callers, charge: Callable[[web.Request, float], None], settings: Settings
    ) -> None:
        """``charge`` takes from the caller's limit what a batch costs beyond a request."""
        self._tasks = tasks
        self._callers = callers
        self._charge = charge
        self._settings = settings
        self._room = asyncio.Semaphore(_AT_ONCE)

    def routes(self) -> Sequence[Route]:
        """Return the operations."""
        request = {"$ref": "#/components/schemas/TaskRequest"}
        lines = {"type": "string", "description": "One task a line, as JSON."}
        return (
            Route(
                "POST",
                "/api/v1/tasks/batch",
                self._create,
                "Create up to 1,000 tasks",
                {202: {_ARRAY: BatchAnswer}},
                problems=(400, 408, 413, 415, 422),
                parameters=NAMESPACE,
                body={
                    _ARRAY: {"type": "array", "minItems": 1, "maxItems": LIMIT, "items": request},
                    **dict.fromkeys(_LINES, lines),
                },
                description="Each is accepted or refused for itself; the answer has the order of the batch. One that is "
                "sent again creates its tasks again, except those that have an idempotency_key.",
            ),
        )

    async def _create(self, request: web.Request) -> web.Response:
        media = check_media_type(request, _ARRAY, *_LINES)
        async with self._room:
            items = _items(await read_body(request, limit=self._settings.batch_bytes), lines=media in _LINES)
            self._charge(request, len(items) - 1)
            outcomes: list[dict[str, Any]] = [{} for _ in items]
            todo = iter(enumerate(items))
            workers = min(self._settings.batch_concurrency, len(items))
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(self._work(todo, outcomes, request))
        taken = sum(1 for outcome in outcomes if outcome["status"] == "accepted")
        structlog.contextvars.bind_contextvars(accepted=taken, refused=len(items) - taken)
        return answer({"accepted": taken, "refused": len(items) - taken, "items": outcomes}, status=202)

    async def _work(self, todo: Iterator[tuple[int, Any]], outcomes: list[dict[str, Any]], request: web.Request) -> None:
        """Create one task after the other, until none is left."""
        caller, named = caller_of(request), asked_namespace(request)
        for index, item in todo:
            try:
                task = await self._one(item, caller=caller, named=named)
                outcomes[index] = {"index": index, "status": "accepted", "task": task, "problem": None}
            except Problem as problem:
                body = problem.body(request_id=request[REQUEST_ID])
                outcomes[index] = {"index": index, "status": "refused", "task": None, "problem": body}

    async def _one(self, item: Any, *, caller: Caller, named: Sequence[str | None]) -> dict[str, Any]:
        if isinstance(item, Problem):
            raise item
        wanted = parse_task(item)
        namespace = self._callers.namespace(wanted.namespace, *named)
        await self._callers.check(caller, "create", namespace)
        manifest, _ = await self._tasks.create(wanted, caller=caller, namespace=namespace)
        task = accepted(manifest)
        _log.info("audit", action="create", namespace=namespace, task=task["task_id"], caller=caller.name)
        return task


def _items(data: bytes, *, lines: bool) -> list[Any]:
    """Return the tasks of a batch; a line that is no JSON is the :class:`Problem` that says so."""
    if lines:
        items = [_line(line) for line in data.splitlines() if line.strip()]
    else:
        items = parse_json(data)
        if not isinstance(items, list):
            raise Problem(422, "invalid-request", "cannot read the batch: send a JSON array of tasks, or a task a line")
    if not 1 <= len(items) <= LIMIT:
        raise Problem(422, "invalid-request", f"cannot read the batch: it has {len(items)} tasks; send 1 to {LIMIT}")
    return items


def _line(line: bytes) -> Any:
    try:
        return parse_json(line)
    except Problem as problem:
        return problem
