"""GET /api/v1/tasks/{id}/logs: what a task writes while its pod is there, and after that the last lines that were kept."""

from collections.abc import Sequence
from typing import Any, Final

import structlog
from aiohttp import web

from task_contract.names import ATTEMPT_LABEL
from task_gateway.cluster import Cluster
from task_gateway.database import Database
from task_gateway.models import LogQuery
from task_gateway.problems import Problem, of_cluster
from task_gateway.routes import NAME, NAMESPACE, Route, query_parameters, read_query
from task_gateway.tasks import Tasks
from task_platform.kubernetes import ClusterError, Invalid, NotFound

_log = structlog.get_logger(__name__)

_TEXT: Final = "text/plain"


class Logs:
    """Logs of tasks."""

    def __init__(self, *, tasks: Tasks, cluster: Cluster, database: Database) -> None:
        self._tasks = tasks
        self._cluster = cluster
        self._database = database

    def routes(self) -> Sequence[Route]:
        """Return the operations."""
        return (
            Route(
                "GET",
                "/api/v1/tasks/{id}/logs",
                self._get,
                "The log of a task",
                {200: {_TEXT: {"type": "string"}}},
                problems=(404, 422),
                parameters=(NAME, *query_parameters(LogQuery), *NAMESPACE),
                description="Of the pod of its latest attempt, for callers that may get pods/log. When the pod is gone: the "
                "last lines of an attempt that failed; the header X-Log-Source says kept, and not pod.",
            ),
        )

    async def _get(self, request: web.Request) -> web.StreamResponse:
        query = read_query(request, LogQuery)
        namespace, name = await self._tasks.named(request, "get")
        await self._tasks.named(request, "get", group="", resource="pods", subresource="log")
        view = await self._tasks.view(namespace, name)
        response = await self._of_pod(request, namespace, view["uid"], query)
        if response is not None:
            return response
        return web.Response(text=await self._kept(view, query), headers={"X-Log-Source": "kept"})

    async def _of_pod(self, request: web.Request, namespace: str, uid: str, query: LogQuery) -> web.StreamResponse | None:
        """Stream the log of the youngest pod; None when there is no pod, or none that has begun to write."""
        response = web.StreamResponse(
            headers={"X-Log-Source": "pod", "Content-Type": f"{_TEXT}; charset=utf-8", "X-Accel-Buffering": "no"}
        )
        try:
            pods = await self._cluster.pods(namespace, uid=uid, attempt=query.attempt)
            if not pods:
                return None
            metadata = pods[-1]["metadata"]
            response.headers["X-Log-Pod"] = metadata["name"]
            response.headers["X-Log-Attempt"] = (metadata.get("labels") or {}).get(ATTEMPT_LABEL, "")
            async with self._cluster.log(namespace, metadata["name"], tail=query.tail, follow=query.follow) as chunks:
                await response.prepare(request)
                async for chunk in chunks:
                    await response.write(chunk)
                await response.write_eof()
        except ClusterError as error:
            if response.prepared:
                # The head is gone: all that can be done is not to let it look like the end.
                _log.warning("a log has broken off", error=error.message)
                if request.transport is not None:
                    request.transport.abort()
                return response
            if isinstance(error, NotFound | Invalid):  # the pod has gone in between, or its container has not begun
                return None
            raise of_cluster(error, what="cannot read the log") from error
        except ConnectionResetError:
            return response  # the reader has gone
        return response

    async def _kept(self, view: dict[str, Any], query: LogQuery) -> str:
        """Return the last lines of an attempt that were kept. Raises :class:`Problem` 404 when there are none."""
        if query.attempt is None:
            log = (view["error"] or {}).get("log")
        else:
            log = await self._database.kept_log(view["uid"], attempt=query.attempt)
        if log is None:
            raise Problem(
                404,
                "no-log",
                f"cannot find a log of task {view['task_id']}: no pod of it is there; only of attempts that failed the last "
                "lines are kept",
            )
        return "\n".join(log.splitlines()[-query.tail :]) + "\n"
