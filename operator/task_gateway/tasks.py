"""Tasks over REST: the handlers of ``/api/v1/tasks``.

The gateway keeps nothing. A task is accepted when the API server has stored its resource, and answered with 202 after that:
whatever becomes of this process then, the task is there. What exists is read from the API server; lists, history and what is
gone come from PostgreSQL.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import structlog
from aiohttp import web

from task_contract.messages import ProgressEvent
from task_gateway.callers import Caller, Callers
from task_gateway.cluster import Cluster
from task_gateway.database import Database
from task_gateway.metrics import Metrics
from task_gateway.models import (
    REQUEST_HASH,
    Accepted,
    Row,
    TaskRequest,
    TaskView,
    accepted,
    live_view,
    manifest_of,
    name_of,
    parse_task,
    stored_view,
)
from task_gateway.problems import Problem, is_task_name, of_cluster
from task_gateway.routes import NAME, NAMESPACE, Route, answer, asked_namespace, caller_of, read_json
from task_gateway.settings import Settings
from task_platform.kubernetes import ClusterError, Conflict, NotFound

_log = structlog.get_logger(__name__)

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
                parameters=NAMESPACE,
                body={_JSON: {"$ref": "#/components/schemas/TaskRequest"}},
                description=(
                    "It is accepted once the cluster has stored it, and can be read at once. With an idempotency_key the "
                    "request may be repeated: the answer is the first task, with the header Idempotent-Replayed."
                ),
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
        )

    # ---------------------------------------------------------------------------------------------------------- create

    async def _create(self, request: web.Request) -> web.Response:
        wanted = parse_task(await read_json(request, limit=self._settings.body_bytes))
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
        manifest = manifest_of(wanted, name=name, namespace=namespace, caller=caller.name)
        manifest["metadata"]["annotations"] |= annotations or {}
        for _ in range(2):
            try:
                created = await self._cluster.create_task(manifest)
                self._metrics.accepted.inc()
                return created, False
            except Conflict as error:
                if error.reason != "AlreadyExists":
                    raise of_cluster(error, what="cannot create the task") from error
            except NotFound as error:
                raise Problem(
                    404, "not-found", f"cannot create the task: {error.answer}; does the namespace exist?"
                ) from error
            except ClusterError as error:
                raise of_cluster(error, what="cannot create the task") from error
            try:
                there = await self._cluster.task(namespace, name)
            except NotFound:
                continue  # it was deleted in between
            except ClusterError as error:
                raise of_cluster(error, what="cannot create the task") from error
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

    async def _get(self, request: web.Request) -> web.Response:
        namespace, name = await self._named(request, "get")
        try:
            manifest = await self._cluster.task(namespace, name)
        except NotFound:
            return answer(stored_view(await self._archived(namespace, name)))
        except ClusterError as error:
            raise of_cluster(error, what=f"cannot read task {name}") from error
        return answer(live_view(manifest, self._latest(manifest["metadata"]["uid"])))

    async def _archived(self, namespace: str, name: str) -> Row:
        row = await self._database.task(namespace, name)
        if row is None:
            raise _no_task(name, namespace)
        return row

    async def _named(self, request: web.Request, verb: str) -> tuple[str, str]:
        """Return namespace and name of the task that a path means, which the caller may do this with."""
        name = request.match_info["id"]
        namespace = self._callers.namespace(*asked_namespace(request))
        await self._callers.check(caller_of(request), verb, namespace)
        if not is_task_name(name):
            raise _no_task(name[:80], namespace)
        structlog.contextvars.bind_contextvars(namespace=namespace, task=name)
        return namespace, name


def _no_task(name: str, namespace: str) -> Problem:
    return Problem(
        404,
        "task-not-found",
        f"cannot find task {name!r} in namespace {namespace}; was its namespace given with the request?",
    )
