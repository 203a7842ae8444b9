"""Callbacks over REST: which were given up, and sending them again. They are sent by the operator (docs/callbacks.md)."""

from collections.abc import Sequence
from typing import Any, Final

from aiohttp import web

from task_gateway.callers import Callers
from task_gateway.database import Database
from task_gateway.models import CallbackPage, CallbacksQuery, Cursor, Replayed, callback_view
from task_gateway.problems import Problem
from task_gateway.routes import (
    LIST_NAMESPACE,
    NAME,
    NAMESPACE,
    Route,
    answer,
    answer_page,
    asked_namespace,
    caller_of,
    query_parameters,
    read_query,
)
from task_gateway.tasks import Tasks

_JSON: Final = "application/json"


class Callbacks:
    """The dead letters, and their way back."""

    def __init__(self, *, tasks: Tasks, database: Database, callers: Callers) -> None:
        self._tasks = tasks
        self._database = database
        self._callers = callers

    def routes(self) -> Sequence[Route]:
        """Return the operations."""
        return (
            Route(
                "GET",
                "/api/v1/callbacks",
                self._list,
                "Callbacks, the youngest first",
                {200: {_JSON: CallbackPage}},
                problems=(422,),
                parameters=(*query_parameters(CallbacksQuery), *LIST_NAMESPACE),
                tag="callbacks",
                description="Those that were given up, unless the query names another state.",
            ),
            Route(
                "POST",
                "/api/v1/tasks/{id}/callback/replay",
                self._replay,
                "Send the callback of a task again",
                {202: {_JSON: Replayed}},
                problems=(404, 422),
                parameters=(NAME, *NAMESPACE),
                tag="callbacks",
                description="Whatever has become of it, also of a task that was deleted. Its webhook-id stays, so that a "
                "receiver that has had it knows it.",
            ),
        )

    async def _list(self, request: web.Request) -> web.Response:
        query = read_query(request, CallbacksQuery)
        scope = await self._callers.scope(caller_of(request), self._callers.namespace(*asked_namespace(request)))
        rows = await self._database.callbacks(query.state, scope=scope, after=query.cursor, limit=query.limit + 1)

        def end(row: Any) -> str:
            return Cursor(created_at=row["created_at"], uid=row["task_uid"]).text()

        return answer_page(rows, limit=query.limit, view=callback_view, end=end)

    async def _replay(self, request: web.Request) -> web.Response:
        namespace, name = await self._tasks.named(request, "patch")
        if not await self._database.replay(namespace, name):
            raise Problem(
                404,
                "no-callback",
                f"cannot send the callback of task {name} in {namespace} again: there is none; it comes with the end of a "
                "task that names one, or for which the settings do",
            )
        return answer({"task_id": name, "namespace": namespace, "state": "pending"}, status=202)
