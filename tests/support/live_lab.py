"""Clients of live updates, as tests need them."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import orjson

Updates = list[dict[str, Any]]


class Socket:
    """A WebSocket client that keeps what it is sent."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self.frames: Updates = []
        self.close_code: int | None = None
        self.close_reason = ""

    async def send(self, message: object) -> None:
        """Send a message as JSON; text and bytes are sent as they are."""
        if isinstance(message, bytes):
            await self._socket.send_bytes(message)
        else:
            await self._socket.send_str(message if isinstance(message, str) else orjson.dumps(message).decode())

    async def next(self, *, seconds: float = 10) -> dict[str, Any] | None:
        """Return the next frame; None once it is closed. AssertionError after so many seconds."""
        try:
            message = await self._socket.receive(timeout=seconds)
        except TimeoutError:
            raise AssertionError(f"nothing came for {seconds} s; so far {self.frames}") from None
        if message.type is not aiohttp.WSMsgType.TEXT:
            self.close_code = self._socket.close_code
            self.close_reason = str(message.extra or "")
            return None
        frame: dict[str, Any] = orjson.loads(message.data)
        self.frames.append(frame)
        return frame

    async def until(self, what: Callable[[dict[str, Any]], object], *, seconds: float = 10) -> dict[str, Any]:
        """Read frames up to one for which this is true, and return that."""
        deadline = time.monotonic() + seconds
        while (frame := await self.next(seconds=max(0.01, deadline - time.monotonic()))) is not None:
            if what(frame):
                return frame
        raise AssertionError(f"closed with {self.close_code} {self.close_reason}; so far {self.frames}")

    async def closed(self, *, seconds: float = 10) -> int | None:
        """Read until the other side closes, and return its code."""
        deadline = time.monotonic() + seconds
        while await self.next(seconds=max(0.01, deadline - time.monotonic())) is not None:
            pass
        return self.close_code


@contextlib.asynccontextmanager
async def connected(url: str, *, headers: Any = None, **query: str) -> AsyncIterator[Socket]:
    """A WebSocket at ``/ws/tasks`` of a gateway; ``url`` begins with http."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{url}/ws/tasks", params=query, headers=headers, autoping=True, timeout=_TIMEOUT) as socket,
    ):
        yield Socket(socket)


_TIMEOUT = aiohttp.ClientWSTimeout(ws_close=5)


@contextlib.asynccontextmanager
async def streamed(url: str, *, headers: Any = None, **query: str) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The events of a stream: their fields, with ``data`` read as JSON; comments as ``{"comment": …}``."""

    async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
        fields: dict[str, Any] = {}
        async for line in response.content:
            text = line.decode().rstrip("\n")
            if text.startswith(":"):
                yield {"comment": text[1:].strip()}
            elif text:
                name, _, value = text.partition(": ")
                fields[name] = orjson.loads(value) if name == "data" else value
            elif fields:
                yield fields
                fields = {}

    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session,
        session.get(f"{url}/api/v1/tasks/events", params=query, headers=headers) as response,
    ):
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"].startswith("text/event-stream")
        yield events(response)


async def within(seconds: float, work: Any) -> Any:
    """Return what comes of it; TimeoutError after so many seconds."""
    async with asyncio.timeout(seconds):
        return await work
