"""Health and metrics, for whoever asks: probes have no token.

A replica is ready until it is about to stop. Servers that are away do not make it unready: they are away for all replicas,
and a caller is better told so by a problem than by a connection that is refused.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from task_gateway.metrics import Metrics
from task_gateway.models import HealthAnswer
from task_gateway.routes import Route, answer
from task_platform.settings import product_version

_LOOK_SECONDS: Final = 2.0
_TEXT: Final = {"text/plain": {"type": "string"}}

Check = Callable[[], Awaitable[None]]


class Probes:
    """/health, /livez, /readyz and /metrics."""

    def __init__(
        self,
        *,
        checks: Mapping[str, Check | None],
        vital: str,
        metrics: Metrics,
        ready: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``checks``: by server, raising what is wrong; None: it is not used. ``vital``: nothing goes without it."""
        self._checks = checks
        self._vital = vital
        self._metrics = metrics
        self._ready = ready
        self._clock = clock
        self._looked_at = float("-inf")
        self._found: dict[str, dict[str, Any]] = {}
        self._looking = asyncio.Lock()

    def routes(self) -> Sequence[Route]:
        """Return the operations."""
        ok = {200: _TEXT}
        return (
            Route(
                "GET",
                "/health",
                self._health,
                "Whether the gateway can do its work",
                {200: {"application/json": HealthAnswer}, 503: {"application/json": HealthAnswer}},
                public=True,
                tag="service",
                description="503 while the Kubernetes API does not answer. Servers are asked every two seconds at most.",
            ),
            Route("GET", "/livez", self._livez, "Whether the process runs", ok, public=True, tag="service"),
            Route(
                "GET",
                "/readyz",
                self._readyz,
                "Whether this replica takes requests",
                {200: _TEXT, 503: _TEXT},
                public=True,
                tag="service",
            ),
            Route("GET", "/metrics", self._scrape, "Metrics for Prometheus", ok, public=True, tag="service"),
        )

    async def _health(self, _: web.Request) -> web.Response:
        async with self._looking:  # whoever waits finds the answer there
            if self._clock() - self._looked_at >= _LOOK_SECONDS:
                states = await asyncio.gather(*(_state(check) for check in self._checks.values()))
                self._found = dict(zip(self._checks, states, strict=True))
                self._looked_at = self._clock()
        down = [name for name, state in self._found.items() if state["status"] == "down"]
        status = "down" if self._vital in down else "degraded" if down else "ok"
        body = {"status": status, "version": product_version(), "components": self._found}
        return answer(body, status=503 if status == "down" else 200)

    async def _livez(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        ready = self._ready()
        return web.Response(text="ok\n" if ready else "this replica is about to stop\n", status=200 if ready else 503)

    async def _scrape(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _state(check: Check | None) -> dict[str, Any]:
    if check is None:
        return {"status": "off", "message": None}
    try:
        async with asyncio.timeout(_LOOK_SECONDS):
            await check()
    except TimeoutError:
        return {"status": "down", "message": f"no answer within {_LOOK_SECONDS:.0f} s"}
    except Exception:  # noqa: BLE001 - whatever it is, the server does not work; addresses and accounts are not told
        return {"status": "down", "message": "it does not answer as it should"}
    return {"status": "ok", "message": None}
