"""The operator's HTTP side: /healthz, /readyz and /metrics.

Liveness is the age of the last byte on the watches and the lag of the event loop: what a restart can cure. Stores are not
asked: an operator that restarts because PostgreSQL is away helps nobody. One that stands by is ready when it could act.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from task_operator.cluster import Watches
from task_operator.metrics import Metrics

_WATCH_SILENCE: Final = 180.0  # seconds; the API server sends a bookmark about each minute, kopf reconnects after 70 s
_LOOP_LAG: Final = 10.0  # seconds
_TICK: Final = 1.0


class Health:
    """Serves the probes and the metrics."""

    def __init__(
        self,
        *,
        listen: str,
        watches: Watches,
        ready: Callable[[], bool],
        metrics: Metrics,
        leads: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host, _, port = listen.rpartition(":")
        self._port = int(port)
        self._watches = watches
        self._ready = ready
        self._metrics = metrics
        self._leads = leads
        self._clock = clock
        self._started = clock()
        self._lag = 0.0
        self._runner: web.AppRunner | None = None

    async def warm_up(self) -> None:
        """Start listening."""
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._scrape)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host.strip("[]"), self._port).start()

    async def run(self) -> None:
        """Measure the lag of the event loop until cancelled."""
        while True:
            before = self._clock()
            await asyncio.sleep(_TICK)
            late = self._clock() - before - _TICK
            self._lag = max(late, self._lag * 0.9)  # a stall stays visible for some probes

    async def aclose(self) -> None:
        """Stop listening and close what is open."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def problem(self) -> str | None:
        """Return why this process should be restarted; None if it should not."""
        if self._lag > _LOOP_LAG:
            return f"the event loop was late by {self._lag:.1f} s"
        age = self._watches.oldest()
        if age is None:
            waited = self._clock() - self._started
            return None if waited < _WATCH_SILENCE else f"the watches were not opened in {waited:.0f} s"
        return None if age < _WATCH_SILENCE else f"a watch has been silent for {age:.0f} s"

    async def _healthz(self, _: web.Request) -> web.Response:
        problem = self.problem()
        return web.Response(text=f"{problem or 'ok'}\n", status=200 if problem is None else 503)

    async def _readyz(self, _: web.Request) -> web.Response:
        if not self._ready():
            return web.Response(text="the first list is not complete\n", status=503)
        return web.Response(text="ok\n" if self._leads() else "ok, standing by\n")

    async def _scrape(self, _: web.Request) -> web.Response:
        self._metrics.watch_age.set(self._watches.oldest() or 0)
        body = generate_latest(self._metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})
