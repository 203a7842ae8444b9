"""Tasks over REST: the handlers of ``/api/v1/tasks``.

The gateway keeps nothing. A task is accepted when the API server has stored its resource, and answered with 202 after that:
whatever becomes of this process then, the task is there. What exists is read from the API server; lists, history and what is
gone come from PostgreSQL.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import orjson
import structlog
from aiohttp import web
from pydantic import ValidationError

from task_contract.messages import ProgressEvent
from task_contract.models import TaskType, spec_again
from task_contract.names import RETRY_OF_ANNOTATION
from task_gateway import tracing
from task_gateway.callers import Caller, Callers
from task_gateway.cluster import Cluster
from task_gateway.database import Database, TaskFilter
from task_gateway.metrics import Metrics
from task_gateway.models import (
    REQUEST_HASH,
    STATUSES,
    Accepted,
    BatchDocumentPage,
    Cursor,
    DocumentsQuery,
    EventPage,
    EventsQuery,
    ListQuery,
    PriorityChange,
    TaskPage,
    TaskRequest,
    TaskResult,
    TaskView,
    accepted,
    document_view,
    event_view,
    live_view,
    manifest_of,
    name_of,
    parse_task,
    stored_view,
)
from task_gateway.problems import Problem, is_task_name, of_validation, refused
from task_gateway.routes import (
    IDEMPOTENCY_KEY,
    LIST_NAMESPACE,
    NAME,
    NAMESPACE,
    Route,
    answer,
    answer_page,
    asked_namespace,
    caller_of,
    check_media_type,
    idempotency_key,
    parse_json,
    query_parameters,
    read_body,
    read_json,
    read_query,
)
from task_gateway.settings import Settings
from task_platform.kubernetes import Conflict, NotFound

_JSON: Final = "application/json"


class Tasks:
    """The task API."""

    def __init__(
        self,
        *,
        cluster: Cluster,
        database: Database,
        callers: Callers,
        metrics: Metrics,
        settings: Settings,
        latest: Callable[[str], ProgressEvent | None] = lambda uid: None,
    ) -> None:
        """``latest``: the last progress that is known of a task, by uid."""
        self._cluster = cluster
        self._database = database
        self._callers = callers
        self._metrics = metrics
        self._settings = settings
        self._latest = latest

    def routes(self) -> Sequence[Route]:
        """Return the operations."""
        return (
            Route(
                "POST",
                "/api/v1/tasks",
                self._create,
                "Create a task",
                {202: {_JSON: Accepted}},
                problems=(400, 409, 413, 415, 422),
                parameters=(*NAMESPACE, IDEMPOTENCY_KEY),
                body={_JSON: {"$ref": "#/components/schemas/TaskRequest"}},
                description=(
                    "It is accepted once the cluster has stored it, and can be read at once. With an idempotency_key, as a "
                    "field or as a header, the request may be repeated: the answer is the first task, with the header "
                    "Idempotent-Replayed."
                ),
            ),
            Route(
                "GET",
                "/api/v1/tasks",
                self._list,
                "Tasks, the youngest first",
                {200: {_JSON: TaskPage}},
                problems=(422,),
                parameters=(*query_parameters(ListQuery), *LIST_NAMESPACE),
                description="From PostgreSQL: a task is in it a moment after its creation, and stays when it is deleted.",
            ),
            Route(
                "GET",
                "/api/v1/tasks/{id}",
                self._get,
                "A task",
                {200: {_JSON: TaskView}},
                problems=(404, 422),
                parameters=(NAME, *NAMESPACE),
                description="With the progress of this moment. A task that was deleted comes from the archive.",
            ),
            Route(
                "GET",
                "/api/v1/tasks/{id}/result",
                self._result,
                "How a task has ended",
                {200: {_JSON: TaskResult}},
                problems=(404, 409, 422),
                parameters=(NAME, *NAMESPACE),
                description="409 while it has not.",
            ),
            Route(
                "GET",
                "/api/v1/tasks/{id}/events",
                self._events,
                "What a task went through",
                {200: {_JSON: EventPage}},
                problems=(404, 422),
                parameters=(NAME, *query_parameters(EventsQuery), *NAMESPACE),
                description="Its transitions in their order, from PostgreSQL.",
            ),
            Route(
                "GET",
                "/api/v1/tasks/{id}/documents",
                self._documents,
                "What became of the documents of a batch",
                {200: {_JSON: BatchDocumentPage}},
                problems=(404, 422),
                parameters=(NAME, *query_parameters(DocumentsQuery), *NAMESPACE),
                description="From PostgreSQL, in the order of the batch; none before its first pod has listed them.",
            ),
            self._change_route("cancel", "End a task", "It ends as canceled, or as completed if it was published before."),
            self._change_route("suspend", "Hold a task up", "It does not run; a running attempt is given back, uncounted."),
            self._change_route("resume", "Let a task run", "The opposite of suspend."),
            Route(
                "POST",
                "/api/v1/tasks/{id}/retry",
                self._retry,
                "Do a finished task again",
                {202: {_JSON: Accepted}},
                problems=(404, 409, 422),
                parameters=(NAME, *NAMESPACE, IDEMPOTENCY_KEY),
                description="As a new task of the same spec; its annotation tasks.zzdsj.io/retry-of names the first.",
            ),
            Route(
                "PATCH",
                "/api/v1/tasks/{id}",
                self._prioritize,
                "Change the priority of a task",
                {200: {_JSON: TaskView}},
                problems=(400, 404, 409, 413, 415, 422),
                parameters=(NAME, *NAMESPACE),
                body={_JSON: PriorityChange, "application/merge-patch+json": PriorityChange},
                description="While it is queued.",
            ),
            Route(
                "DELETE",
                "/api/v1/tasks/{id}",
                self._delete,
                "Delete a task",
                {204: None},
                problems=(404, 409, 422),
                parameters=(NAME, *NAMESPACE),
                description="What it published stays; one that runs is stopped. Its history stays in the archive.",
            ),
        )

    def _change_route(self, action: str, summary: str, description: str) -> Route:
        spec = {"cancel": {"cancel": True}, "suspend": {"suspend": True}, "resume": {"suspend": False}}[action]

        async def handle(request: web.Request) -> web.Response:
            return await self._change(request, spec, what=action)

        return Route(
            "POST",
            f"/api/v1/tasks/{{id}}/{action}",
            handle,
            summary,
            {200: {_JSON: TaskView}},
            problems=(404, 409, 422),
            parameters=(NAME, *NAMESPACE),
            description=f"{description} It may be repeated; nothing becomes of a task that has finished.",
        )

    # ---------------------------------------------------------------------------------------------------------- create

    async def _create(self, request: web.Request) -> web.Response:
        wanted = parse_task(await read_json(request, limit=self._settings.body_bytes))
        wanted = replace(wanted, idempotency_key=wanted.idempotency_key or idempotency_key(request))
        caller = caller_of(request)
        namespace = self._callers.namespace(wanted.namespace, *asked_namespace(request))
        await self._callers.check(caller, "create", namespace)
        manifest, replayed = await self.create(wanted, caller=caller, namespace=namespace)
        return answer(accepted(manifest), status=202, headers={"Idempotent-Replayed": "true"} if replayed else None)

    async def create(
        self, wanted: TaskRequest, *, caller: Caller, namespace: str, annotations: Mapping[str, str] | None = None
    ) -> tuple[dict[str, Any], bool]:
        """Create a task for a caller who may; return it, and whether it was there already. Raises :class:`Problem`."""
        key = wanted.idempotency_key
        name = f"task-{secrets.token_hex(10)}" if key is None else name_of(namespace=namespace, caller=caller.name, key=key)
        structlog.contextvars.bind_contextvars(namespace=namespace, task=name)
        labels = self._settings.task_labels
        manifest = manifest_of(wanted, name=name, namespace=namespace, caller=caller.name, labels=labels)
        manifest["metadata"]["annotations"] |= tracing.annotations() | dict(annotations or {})
        for _ in range(2):
            with refused("cannot create the task"):
                try:
                    created = await self._cluster.create_task(manifest)
                    self._metrics.accepted.inc()
                    return created, False
                except Conflict as error:
                    if error.reason != "AlreadyExists":
                        raise
                except NotFound as error:
                    raise Problem(
                        404, "not-found", f"cannot create the task: {error.answer}; does the namespace exist?"
                    ) from error
                try:
                    there = await self._cluster.task(namespace, name)
                except NotFound:
                    continue  # it was deleted in between
            if (there["metadata"].get("annotations") or {}).get(REQUEST_HASH) == wanted.hash:
                return there, True
            raise Problem(
                409,
                "already-exists",
                f"cannot create the task: another one has this idempotency_key, {name}; use a key for one request only",
            )
        raise Problem(
            503, "unavailable", f"cannot create the task: {name} is being deleted; repeat the request", retry_after=1
        )

    # ------------------------------------------------------------------------------------------------------------ read

    async def _list(self, request: web.Request) -> web.Response:
        query = read_query(request, ListQuery)
        scope = await self._callers.scope(caller_of(request), self._callers.namespace(*asked_namespace(request)))
        wanted = TaskFilter(
            kb_id=query.kb_id,
            task_type=query.task_type,
            phase=None if query.status is None else STATUSES[query.status],
            priority=query.priority,
            created_after=query.created_after,
            created_before=query.created_before,
        )
        rows = await self._database.page(wanted, scope=scope, after=query.cursor, limit=query.limit + 1)

        def end(row: Any) -> str:
            return Cursor(created_at=row["created_at"], uid=row["uid"]).text()

        return answer_page(rows, limit=query.limit, view=stored_view, end=end)

    async def _get(self, request: web.Request) -> web.Response:
        namespace, name = await self.named(request, "get")
        return answer(await self.view(namespace, name))

    async def view(self, namespace: str, name: str) -> dict[str, Any]:
        """Return a task: as the API server has it, else from the archive. Raises :class:`Problem`."""
        try:
            with refused(f"cannot read task {name}", but=NotFound):
                manifest = await self._cluster.task(namespace, name)
        except NotFound:
            row = await self._database.task(namespace, name)
            if row is None:
                raise _no_task(name, namespace) from None
            return stored_view(row)
        return live_view(manifest, self._latest(manifest["metadata"]["uid"]))

    async def named(self, request: web.Request, verb: str, **resource: str) -> tuple[str, str]:
        """Return namespace and name of the task that a path means, with which the caller may do this."""
        name = request.match_info["id"]
        namespace = self._callers.namespace(*asked_namespace(request))
        await self._callers.check(caller_of(request), verb, namespace, **resource)
        if not is_task_name(name):
            raise _no_task(name[:80], namespace)
        structlog.contextvars.bind_contextvars(namespace=namespace, task=name)
        return namespace, name

    async def _result(self, request: web.Request) -> web.Response:
        namespace, name = await self.named(request, "get")
        view = await self.view(namespace, name)
        check_finished(view)
        return answer({key: view[key] for key in ("task_id", "namespace", "status", "result", "error", "completed_at")})

    async def _events(self, request: web.Request) -> web.Response:
        query = read_query(request, EventsQuery)
        namespace, name = await self.named(request, "get")
        view = await self.view(namespace, name)
        rows = await self._database.events(view["uid"], after=query.after, limit=query.limit + 1)
        return answer_page(rows, limit=query.limit, view=event_view, end=lambda row: row["number"], following="next_after")

    async def _documents(self, request: web.Request) -> web.Response:
        query = read_query(request, DocumentsQuery)
        namespace, name = await self.named(request, "get")
        view = await self.view(namespace, name)
        if view["task_type"] != TaskType.BATCH_PROCESSING:
            raise Problem(
                404, "not-found", f"cannot list documents: task {name} is no batch; see /api/v1/tasks/{name}/result"
            )
        rows = await self._database.batch_documents(view["uid"], state=query.state, after=query.after, limit=query.limit + 1)
        return answer_page(
            rows, limit=query.limit, view=document_view, end=lambda row: row["number"], following="next_after"
        )

    # ---------------------------------------------------------------------------------------------------------- change

    async def _change(self, request: web.Request, spec: Mapping[str, Any], *, what: str) -> web.Response:
        namespace, name = await self.named(request, "patch")
        try:
            with refused(f"cannot {what} task {name}", but=NotFound):
                manifest = await self._cluster.change_task(namespace, name, spec)
        except NotFound:
            raise await self._not_there(namespace, name, what=f"cannot {what} task {name}") from None
        return answer(live_view(manifest, self._latest(manifest["metadata"]["uid"])))

    async def _prioritize(self, request: web.Request) -> web.Response:
        check_media_type(request, _JSON, "application/merge-patch+json")
        body = parse_json(await read_body(request, limit=self._settings.body_bytes))
        try:
            wanted = PriorityChange.model_validate(body)
        except ValidationError as error:
            raise of_validation(error, kind="invalid-request", what="cannot change the task") from error
        return await self._change(request, {"priority": wanted.priority.value}, what="change")

    async def _delete(self, request: web.Request) -> web.Response:
        namespace, name = await self.named(request, "delete")
        try:
            with refused(f"cannot delete task {name}", but=NotFound):
                await self._cluster.delete_task(namespace, name)
        except NotFound:
            raise await self._not_there(namespace, name, what=f"cannot delete task {name}") from None
        return web.Response(status=204)

    async def _retry(self, request: web.Request) -> web.Response:
        namespace, name = await self.named(request, "get")
        caller = caller_of(request)
        await self._callers.check(caller, "create", namespace)
        try:
            with refused(f"cannot read task {name}", but=NotFound):
                manifest = await self._cluster.task(namespace, name)
            view, spec, labels = live_view(manifest), manifest["spec"], manifest["metadata"].get("labels") or {}
        except NotFound:
            row = await self._database.task(namespace, name)
            if row is None:
                raise _no_task(name, namespace) from None
            view, spec, labels = stored_view(row), orjson.loads(row["spec"]), {}
        check_finished(view)
        again = TaskRequest(
            spec=spec_again(spec),
            labels=labels,
            namespace=namespace,
            idempotency_key=idempotency_key(request),
        )
        created, replayed = await self.create(
            again, caller=caller, namespace=namespace, annotations={RETRY_OF_ANNOTATION: name}
        )
        return answer(accepted(created), status=202, headers={"Idempotent-Replayed": "true"} if replayed else None)

    async def _not_there(self, namespace: str, name: str, *, what: str) -> Problem:
        """Return why a task that the API server has not cannot be changed."""
        if await self._database.task(namespace, name) is None:
            return _no_task(name, namespace)
        return Problem(409, "archived", f"{what}: it was deleted and is in the archive only; it can be read and retried")


def check_finished(view: Mapping[str, Any]) -> None:
    """Raise :class:`Problem` 409 unless a task has ended."""
    if view["completed_at"] is None and view["status"] not in {"completed", "failed", "canceled"}:
        name, status = view["task_id"], view["status"]
        raise Problem(409, "not-finished", f"cannot do that while task {name} is {status}; wait for its end, or cancel it")


def _no_task(name: str, namespace: str) -> Problem:
    detail = f"cannot find task {name!a} in namespace {namespace}; was its namespace given with the request?"
    return Problem(404, "task-not-found", detail)
