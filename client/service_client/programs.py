"""What a client does, apart from whether it waits in a thread or in an event loop.

A :data:`Program` is a generator that yields effects (a request, a pause, a read) and is sent their outcomes. What to retry,
what an answer means, where a stream goes on: all that is written once, without I/O, and tested by sending outcomes by hand.
A program has one stream at a time: that of before is closed when it opens another, and the last one with it.
:class:`Blocking` carries effects out with ``httpx.Client``, :class:`Waiting` with ``httpx.AsyncClient``; they are the only
part that knows httpx.

    ServiceClient, TaskClient            ── run ──►  Blocking ──► httpx.Client
    AsyncServiceClient, AsyncTaskClient  ── run ──►  Waiting  ──► httpx.AsyncClient, threads for the Kubernetes client
"""

import asyncio
import contextlib
import functools
import socket
import ssl
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

import httpx

T = TypeVar("T")

MAX_ANSWER: Final = 64 * 2**20
"""Bytes of an answer, unpacked; more is refused."""

# Each watch keeps a connection: with a bound, a hundred of them would leave none to anybody else.
_LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=20)
_THREADS: Final = 256
"""Calls that block at once, of one client."""


class NotSent(Exception):
    """The service was not reached: whatever was asked has not happened."""


class NoAnswer(Exception):
    """There is no whole answer; what was asked may have happened."""


class TooLate(NoAnswer):
    """There is no whole answer within the time given."""


# ------------------------------------------------------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class Request:
    """A request over HTTP, whole."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes | None = field(default=None, repr=False)
    seconds: float = 10.0
    """Until the whole answer is there."""
    connect_seconds: float = 3.0
    """Until there is a connection, of these."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer over HTTP, whole. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait; answered with None."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Open:
    """Begin an answer that goes on; answered with an :class:`HttpStream`, or an :class:`Answer` if its status is not 200.

    ``request.seconds`` is the longest silence.
    """

    request: Request
    life: float | None = None
    """Seconds after which reading ends, as with a lost connection."""


@dataclass(frozen=True, slots=True)
class Read:
    """The next bytes of a stream; answered with them, empty at its end."""

    stream: "HttpStream"


@dataclass(frozen=True, slots=True)
class Call:
    """A function that blocks; answered with its value. A :class:`Closable` that it returns is closed with the program."""

    function: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Emit:
    """A value for whoever iterates; answered with None."""

    value: Any


Effect = Request | Pause | Open | Read | Call | Emit
Program = Generator[Effect, Any, T]


@runtime_checkable
class Closable(Protocol):
    """Something that is being read in a thread. ``close`` also ends a read that waits in another one."""

    def close(self) -> None:
        """Give it back; may be called twice."""


class HttpStream:
    """An answer that goes on, of either kind of httpx client."""

    def __init__(self, response: httpx.Response, life: float | None) -> None:
        self.response = response
        self.until = None if life is None else time.monotonic() + life
        self.chunks: Any = None
        """One iterator for all reads: httpx lets a body be iterated once."""


def ask(request: Request) -> Program[Answer]:
    """Send a request. Raises :class:`NotSent` or :class:`NoAnswer`."""
    answer: Answer = yield request
    return answer


def pause(seconds: float) -> Program[None]:
    """Wait."""
    yield Pause(seconds)


def call(function: Callable[[], T]) -> Program[T]:
    """Run a function that blocks."""
    value: T = yield Call(function)
    return value


# ------------------------------------------------------------------------------------------------------------- drivers


@functools.cache
def _tls() -> ssl.SSLContext:
    """Return the settings of TLS, made once: reading the authorities costs 20 ms, more than most calls."""
    return httpx.create_ssl_context()


class Blocking:
    """Carries out programs in the thread that calls."""

    def __init__(self, http: httpx.Client | None = None, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._given = http
        self._made: httpx.Client | None = None
        self._sleep = sleep

    def close(self) -> None:
        """Close the connections, unless the client was given."""
        if self._made is not None:
            self._made.close()
            self._made = None

    def run(self, program: Program[T]) -> T:
        """Carry out a program and return its value."""
        try:
            next(self._each(program))
        except StopIteration as end:
            value: T = end.value
            return value
        raise AssertionError("a program that emits has to be iterated")

    def iterate(self, program: Program[None]) -> Generator[Any, None, None]:
        """Carry out a program and yield what it emits."""
        return self._each(program)

    def _each(self, program: Program[T]) -> Generator[Any, None, T]:
        opened: list[HttpStream | Closable] = []
        outcome: Any = None
        error: Exception | None = None
        try:
            while True:
                try:
                    effect = program.send(outcome) if error is None else program.throw(error)
                except StopIteration as end:
                    value: T = end.value
                    return value
                outcome, error = None, None
                if isinstance(effect, Emit):
                    yield effect.value
                    continue
                try:
                    outcome = self._perform(effect, opened)
                except Exception as caught:  # noqa: BLE001  # whatever it is, the program decides
                    error = caught
        finally:
            program.close()
            _close(opened)

    def _perform(self, effect: Effect, opened: list[HttpStream | Closable]) -> Any:
        match effect:
            case Request():
                response = self._send(effect)
                try:
                    return self._whole(response, until=time.monotonic() + effect.seconds)
                finally:
                    response.close()
            case Pause(seconds):
                return self._sleep(seconds)
            case Open(request, life):
                _close(opened)
                response = self._send(request)
                if response.status_code != 200:
                    try:
                        return self._whole(response, until=time.monotonic() + request.seconds)
                    finally:
                        response.close()
                stream = HttpStream(response, life)
                opened.append(stream)
                if life is not None:
                    # A read of httpx has one timeout, from its first to its last byte: only this ends it earlier.
                    opened.append(_Alarm(life, response))
                return stream
            case Read(stream):
                with _translated():
                    stream.chunks = stream.chunks or stream.response.iter_bytes()
                    chunk = next(stream.chunks, b"")
                if not chunk:
                    _close(opened)  # its connection may be used again: no alarm must ring on it
                return chunk
            case Call(function):
                value = function()
                if isinstance(value, Closable):
                    _close(opened)
                    opened.append(value)
                return value
        raise AssertionError(effect)

    def _send(self, request: Request) -> httpx.Response:
        http = self._given or self._made
        if http is None:
            http = self._made = httpx.Client(verify=_tls(), limits=_LIMITS)
        with _translated():
            return http.send(_made(request), stream=True, follow_redirects=False)

    def _whole(self, response: httpx.Response, *, until: float) -> Answer:
        body = bytearray()
        with _translated():
            for chunk in response.iter_bytes():
                body += chunk
                _bounded(body)
                if time.monotonic() > until:
                    raise TooLate("the answer was still coming in")
        return Answer(response.status_code, _lower(response), bytes(body))


class Waiting:
    """Carries out programs in the event loop that runs."""

    def __init__(self, http: httpx.AsyncClient | None = None) -> None:
        self._given = http
        self._made: httpx.AsyncClient | None = None
        # Not those of the event loop, of which there are few: a watch over the Kubernetes API keeps one for itself.
        self._threads: ThreadPoolExecutor | None = None

    async def aclose(self) -> None:
        """Close the connections, unless the client was given."""
        if self._threads is not None:
            self._threads.shutdown(wait=False)
            self._threads = None
        if self._made is not None:
            await self._made.aclose()
            self._made = None

    async def run(self, program: Program[T]) -> T:
        """Carry out a program and return its value."""
        values: list[T] = []
        async for _ in self._each(program, values):
            raise AssertionError("a program that emits has to be iterated")
        return values[0]

    def iterate(self, program: Program[None]) -> AsyncGenerator[Any, None]:
        """Carry out a program and yield what it emits."""
        return self._each(program, [])

    async def _each(self, program: Program[T], values: list[T]) -> AsyncGenerator[Any, None]:
        opened: list[HttpStream | Closable] = []
        outcome: Any = None
        error: Exception | None = None
        try:
            while True:
                try:
                    effect = program.send(outcome) if error is None else program.throw(error)
                except StopIteration as end:
                    values.append(end.value)
                    return
                outcome, error = None, None
                if isinstance(effect, Emit):
                    yield effect.value
                    continue
                try:
                    outcome = await self._perform(effect, opened)
                except Exception as caught:  # noqa: BLE001  # whatever it is, the program decides
                    error = caught
        finally:
            program.close()
            await _aclose(opened)

    async def _perform(self, effect: Effect, opened: list[HttpStream | Closable]) -> Any:
        match effect:
            case Request():
                with _translated():
                    async with asyncio.timeout(effect.seconds):
                        return await self._whole(await self._send(effect))
            case Pause(seconds):
                return await asyncio.sleep(seconds)
            case Open(request, life):
                await _aclose(opened)
                with _translated():
                    response = await self._send(request)
                    if response.status_code != 200:
                        async with asyncio.timeout(request.seconds):
                            return await self._whole(response)
                stream = HttpStream(response, life)
                opened.append(stream)
                return stream
            case Read(stream):
                stream.chunks = stream.chunks or stream.response.aiter_bytes()
                left = None if stream.until is None else max(0.0, stream.until - time.monotonic())
                with _translated():
                    async with asyncio.timeout(left):
                        return await anext(stream.chunks, b"")
            case Call(function):
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="service-client")
                value = await asyncio.get_running_loop().run_in_executor(self._threads, function)
                if isinstance(value, Closable):
                    await _aclose(opened)
                    opened.append(value)
                return value
        raise AssertionError(effect)

    async def _send(self, request: Request) -> httpx.Response:
        http = self._given or self._made
        if http is None:
            http = self._made = httpx.AsyncClient(verify=_tls(), limits=_LIMITS)
        with _translated():
            return await http.send(_made(request), stream=True, follow_redirects=False)

    async def _whole(self, response: httpx.Response) -> Answer:
        body = bytearray()
        try:
            with _translated():
                async for chunk in response.aiter_bytes():
                    body += chunk
                    _bounded(body)
        finally:
            await response.aclose()
        return Answer(response.status_code, _lower(response), bytes(body))


def _close(opened: "list[HttpStream | Closable]") -> None:
    # The alarm first: its connection must not be somebody else's when it rings.
    while opened:
        stream = opened.pop()
        if isinstance(stream, HttpStream):
            stream.response.close()
        else:
            stream.close()


async def _aclose(opened: "list[HttpStream | Closable]") -> None:
    while opened:
        stream = opened.pop()
        if isinstance(stream, HttpStream):
            await stream.response.aclose()
        else:
            stream.close()


class _Alarm:
    """Ends a read that waits, from another thread, after some seconds."""

    def __init__(self, seconds: float, response: httpx.Response) -> None:
        stream = response.extensions.get("network_stream")  # none where a transport of the caller's has no network
        self._socket = None if stream is None else stream.get_extra_info("socket")
        self._timer = threading.Timer(seconds, self._ring)
        self._timer.daemon = True
        self._timer.start()

    def _ring(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop it; may be called twice."""
        self._timer.cancel()


@contextlib.contextmanager
def _translated() -> Generator[None, None, None]:
    """Turn what httpx raises into :class:`NotSent` and :class:`NoAnswer`; for one that is no request, ``ValueError``."""
    try:
        yield
    except httpx.LocalProtocolError as error:
        raise ValueError(f"cannot send the request: {error}") from error
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol) as error:
        raise NotSent(_words(error)) from error
    except (httpx.TimeoutException, TimeoutError) as error:
        raise TooLate(_words(error)) from error
    except (httpx.HTTPError, httpx.StreamError) as error:
        raise NoAnswer(_words(error)) from error


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _made(request: Request) -> httpx.Request:
    timeout = httpx.Timeout(request.seconds, connect=min(request.seconds, request.connect_seconds))
    return httpx.Request(
        request.method,
        request.url,
        headers=dict(request.headers),
        content=request.body,
        extensions={"timeout": timeout.as_dict()},
    )


def _lower(response: httpx.Response) -> dict[str, str]:
    return {name.lower(): value for name, value in response.headers.items()}


def _bounded(body: bytearray) -> None:
    if len(body) > MAX_ANSWER:
        raise NoAnswer(f"the answer is larger than {MAX_ANSWER} bytes")
