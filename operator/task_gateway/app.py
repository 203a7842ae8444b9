"""The application: routes, and what every request passes through.

In this order: a request id; who asks; the limit of the caller; the handler; errors as problems; headers, compression,
metrics. The same application answers on both ports.
"""

import re
import secrets
import time
from collections.abc import Awaitable, Sequence
from http import HTTPStatus
from typing import Final

import orjson
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler as AiohttpHandler

from task_gateway import tracing
from task_gateway.callers import ANYBODY, Caller, Callers
from task_gateway.database import DatabaseUnavailable
from task_gateway.limits import RateLimit
from task_gateway.metrics import Metrics
from task_gateway.problems import CONTENT_TYPE, Problem, of_cluster
from task_gateway.routes import CALLER, REQUEST_ID, Handler, Part, Route, caller_of
from task_platform.kubernetes import ClusterError

_log = structlog.get_logger(__name__)

_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ROUTE: Final = web.RequestKey("route", str)
_COMPRESS_OVER: Final = 1024  # bytes
_CORS_HEADERS: Final = (
    "Authorization",
    "Content-Type",
    "X-Namespace",
    "X-Request-Id",
    "Last-Event-ID",
    "Idempotency-Key",
)
_CORS_SECONDS: Final = "600"
_CHANGES: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})


class Gate:
    """What every request passes through."""

    def __init__(self, *, callers: Callers, limit: RateLimit, metrics: Metrics, cors_origins: Sequence[str] = ()) -> None:
        """``cors_origins``: origins whose pages may read answers."""
        self._callers = callers
        self.limit = limit
        self._metrics = metrics
        self._origins = frozenset(cors_origins)
        self.draining = False
        """Set when the process is about to stop: connections are closed after their answer."""

    def application(self, routes: Sequence[Route]) -> web.Application:
        """Return an application that serves the routes."""
        app = web.Application(middlewares=[self._outermost])
        for route in routes:
            handler = self._endpoint(route)
            if route.method == "GET":
                app.router.add_get(route.path, handler)
            else:
                app.router.add_route(route.method, route.path, handler)
        app.on_response_prepare.append(self._headers)
        return app

    def _endpoint(self, route: Route) -> Handler:
        """Wrap a handler: who asks, and whether he may ask so often."""

        async def handle(request: web.Request) -> web.StreamResponse:
            request[_ROUTE] = route.path
            if not route.public:
                await self._admit(request, ticket=route.ticket)
            return await route.handler(request)

        return handle

    async def _admit(self, request: web.Request, *, ticket: bool) -> None:
        address = ("address", request.remote)
        if ticket and not self._callers.trusting and (given := request.query.get("ticket")):
            self._refuse_if_empty(self.limit.wait(address))
            request[CALLER] = await self._with_penalty(address, self._callers.of_ticket(given))
        else:
            token = _bearer(request.headers.get("Authorization"))
            if token is not None and not self._callers.knows(token):
                # Whoever guesses tokens costs the API server a review each.
                self._refuse_if_empty(self.limit.wait(address))
            request[CALLER] = await self._with_penalty(address, self._callers.of_token(token))
        caller = request[CALLER]
        structlog.contextvars.bind_contextvars(caller=caller.name)
        self._refuse_if_empty(self.limit.take(_bucket(request)))

    async def _with_penalty(self, address: tuple[str, str | None], known: Awaitable[Caller]) -> Caller:
        try:
            return await known
        except Problem as problem:
            if problem.status == HTTPStatus.UNAUTHORIZED:
                self.limit.charge(address, 10)
            raise

    def charge(self, request: web.Request, cost: float) -> None:
        """Take more from the caller's bucket for a request that asks for much."""
        self.limit.charge(_bucket(request), cost)

    def _refuse_if_empty(self, wait: float) -> None:
        if wait > 0:
            self._metrics.limited.inc()
            raise Problem(
                429, "too-many-requests", f"cannot take more requests of this caller: wait {wait:.1f} s", retry_after=wait
            )

    # ------------------------------------------------------------------------------------------------- every request

    @web.middleware
    async def _outermost(self, request: web.Request, handler: AiohttpHandler) -> web.StreamResponse:
        given = request.headers.get("X-Request-Id", "")
        request[REQUEST_ID] = given if _ID.fullmatch(given) else secrets.token_hex(8)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request[REQUEST_ID])
        tracing.begin(request.headers)
        began = time.perf_counter()
        self._metrics.in_flight.inc()
        status = 499  # as nginx has it: the client went away
        try:
            response = self._preflight(request) or await self._answer(request, handler)
            status = response.status
            if self.draining and not response.prepared:
                response.force_close()
            if isinstance(response, web.Response) and (response.content_length or 0) > _COMPRESS_OVER:
                response.enable_compression()
            return response
        finally:
            route = request.get(_ROUTE, "unmatched")
            method = request.method if route != "unmatched" else "any"
            self._metrics.in_flight.dec()
            self._metrics.requests.labels(method, route, str(status)).inc()
            self._metrics.seconds.labels(method, route).observe(time.perf_counter() - began)
            if route != "unmatched" and request.method in _CHANGES:
                _log.info(
                    "audit",
                    action=f"{request.method} {route}",
                    path=request.path[:500],
                    status=status,
                    address=request.remote,
                )

    async def _answer(self, request: web.Request, handler: AiohttpHandler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Problem as problem:
            found = problem
        except web.HTTPException as error:
            if error.status < HTTPStatus.BAD_REQUEST:
                raise
            found = _of_http(error)
        except ClusterError as error:
            found = of_cluster(error, what="cannot do that")
        except DatabaseUnavailable as error:
            _log.warning("PostgreSQL cannot be used", error=str(error))
            found = Problem(
                503, "unavailable", "cannot do that: PostgreSQL does not answer; repeat the request later", retry_after=2
            )
        except Exception:  # noqa: BLE001 - a fault of ours is one answer of 500, and never the end of the process
            _log.exception("a handler failed", method=request.method, path=request.path[:500])
            found = Problem(500, "internal", "cannot do that: a fault of the gateway; its log has it under the request_id")
        if found.status == HTTPStatus.SERVICE_UNAVAILABLE:
            _log.warning("unavailable", detail=found.detail)
        return problem_response(found, request)

    async def _headers(self, request: web.Request, response: web.StreamResponse) -> None:
        headers = response.headers
        headers["X-Request-Id"] = request.get(REQUEST_ID, "")
        headers["X-Content-Type-Options"] = "nosniff"
        headers.setdefault("Cache-Control", "no-store")
        if (origin := self._origin(request)) is not None:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After, Idempotent-Replayed"
        if self._origins:
            headers["Vary"] = "Origin"

    def _origin(self, request: web.Request) -> str | None:
        origin = request.headers.get("Origin")
        return origin if origin in self._origins else None

    def _preflight(self, request: web.Request) -> web.Response | None:
        """Answer a browser that asks before it sends a request of another origin."""
        if request.method != "OPTIONS" or self._origin(request) is None:
            return None
        return web.Response(
            status=HTTPStatus.NO_CONTENT,
            headers={
                "Access-Control-Allow-Methods": "GET, POST, PATCH, DELETE",
                "Access-Control-Allow-Headers": ", ".join(_CORS_HEADERS),
                "Access-Control-Max-Age": _CORS_SECONDS,
            },
        )


def make_app(gate: Gate, parts: Sequence[Part]) -> web.Application:
    """Return the application of all parts."""
    return gate.application([route for part in parts for route in part.routes()])


def problem_response(problem: Problem, request: web.Request) -> web.Response:
    """Return the answer that tells of a problem."""
    body = problem.body(instance=request.rel_url.raw_path[:500], request_id=request.get(REQUEST_ID))
    return web.Response(body=orjson.dumps(body), status=problem.status, content_type=CONTENT_TYPE, headers=problem.headers)


def _bucket(request: web.Request) -> tuple[str, str | None]:
    caller = caller_of(request)
    return ("address", request.remote) if caller == ANYBODY else ("caller", caller.name)


def _bearer(header: str | None) -> str | None:
    scheme, _, token = (header or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _of_http(error: web.HTTPException) -> Problem:
    """Return what aiohttp refuses by itself as a problem."""
    kind, detail = {
        404: ("not-found", "cannot find that path; /openapi.json lists those that there are"),
        405: ("method-not-allowed", "cannot use this method there; the header Allow lists those that can be used"),
        413: ("too-large", "cannot read the body: it is too large"),
    }.get(error.status, ("invalid-request", f"cannot read the request: {error.reason}"))
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    return Problem(error.status, kind, detail, headers=headers)
