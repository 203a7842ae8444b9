"""Receivers of callbacks: real HTTP servers that do as they are told, and note what they were sent."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web


@dataclass(frozen=True)
class Received:
    """A request that came."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def json(self) -> Any:
        return orjson.loads(self.body)


Answer = Callable[[Received], Awaitable[web.StreamResponse]]


async def ok(_: Received) -> web.StreamResponse:
    return web.Response(status=204)


def status(code: int, **headers: str) -> Answer:
    async def answer(_: Received) -> web.StreamResponse:
        return web.Response(status=code, headers={key.replace("_", "-"): value for key, value in headers.items()})

    return answer


@dataclass
class Receiver:
    """A server on loopback; ``answer`` may be replaced at any time."""

    answer: Answer = ok
    received: list[Received] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    port: int = 0
    _runner: web.AppRunner | None = None

    def url(self, path: str = "/callback") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    @property
    def ids(self) -> list[str]:
        return [one.id for one in self.received]

    async def start(self) -> None:
        """Listen; on the port that it had before, if it had one."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        one = Received(request.path_qs, {key.lower(): value for key, value in request.headers.items()}, await request.read())
        self.received.append(one)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self.answer(one)
        finally:
            self.at_once -= 1


@contextlib.asynccontextmanager
async def receiving(answer: Answer = ok) -> AsyncIterator[Receiver]:
    """Run a receiver until the end of the block."""
    receiver = Receiver(answer)
    await receiver.start()
    try:
        yield receiver
    finally:
        await receiver.stop()


async def never(_: Received) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError
