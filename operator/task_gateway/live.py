"""Live updates: ``/ws/tasks`` as WebSocket, ``/api/v1/tasks/events`` as server-sent events.

Every frame is a task as the platform's front end reads it. Frames of other kinds (answers to messages, the end of a
snapshot) go to those WebSocket clients alone that have sent a message, or asked for them with ``?control=true``.

A client that does not take what it is sent holds up nobody: it is told so and cut off.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

import orjson
import structlog
from aiohttp import WSCloseCode, WSMsgType, web
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from task_gateway.database import DatabaseUnavailable
from task_gateway.following import LAST_NUMBER, NAME_PATTERN, NAMES, Begun, Frame, Watcher, Watchers, Wish
from task_gateway.hub import Drop, Dropped
from task_gateway.models import Answer, TasksStatus
from task_gateway.problems import Problem, field_errors, of_validation
from task_gateway.routes import Parameter, Route, asked_namespace, caller_of

_log = structlog.get_logger(__name__)
T = TypeVar("T")

HEARTBEAT: Final = 20.0  # seconds between pings; half as long without a pong ends the connection
_FRAME: Final = 16 * 1024
"""Bytes of a frame of a client."""
_BAD_FRAMES: Final = 5
_WISHES: Final = 100
_COMMANDS: Final = 16
"""Messages that wait; a client that sends more waits itself."""
_CLOSE_SECONDS: Final = 3.0
_DEFAULT: Final = "default"
"""Id of the subscription that a query makes, and of a message that names none."""
_CLOSES: Final = {
    Drop.SLOW: (WSCloseCode.TRY_AGAIN_LATER, "too slow: more updates waited than are kept; connect again with since="),
    Drop.RESET: (WSCloseCode.SERVICE_RESTART, "event numbers begin anew; connect again"),
    Drop.CLOSING: (WSCloseCode.GOING_AWAY, "this replica stops; connect again"),
}
_NOT_ALLOWED: Final = (WSCloseCode.POLICY_VIOLATION, "the right to list these tasks was taken away")
_TOO_MANY_BAD: Final = (WSCloseCode.POLICY_VIOLATION, f"{_BAD_FRAMES} messages could not be read")

_Id = Annotated[str, Field(min_length=1, max_length=64)]
_LIST_SCHEMA: Final = {
    "type": "array",
    "maxItems": NAMES,
    "items": {"type": "string", "minLength": 1, "maxLength": 253, "pattern": NAME_PATTERN},
}
_NUMBER_SCHEMA: Final = {"type": "integer", "minimum": 0, "maximum": LAST_NUMBER}
_QUERY: Final = (
    Parameter("namespace", "query", {"type": "string", "maxLength": 63}, "Namespace, or * for all that you may list."),
    Parameter("X-Namespace", "header", {"type": "string", "maxLength": 63}, "The same; goes before the query."),
    Parameter("kb_id", "query", _LIST_SCHEMA, "Of these knowledge bases only."),
    Parameter("task_id", "query", _LIST_SCHEMA, "Of these tasks only; how they have ended is told as well."),
    Parameter("since", "query", _NUMBER_SCHEMA, "The last event that you know: what has passed since, and no snapshot."),
)


class LiveUpdate(Answer):
    """A frame of the WebSocket, and the data of a server-sent event."""

    type: Literal["task", "snapshot"]
    """snapshot: where the task stood when the client came; task: something has happened."""
    event: int | None = None
    """What ?since= takes: of transitions, and of the last task of a snapshot. Progress has none."""
    task_id: str
    namespace: str
    uid: str
    kb_id: str | None
    task_type: str
    status: TasksStatus
    progress: Annotated[int, Field(ge=0, le=100)]
    stage: str | None
    done: int | None = None
    """Of a batch that runs: documents that have ended, well or not."""
    total: int | None = None
    """Of a batch that runs: documents that there are."""
    attempt: int
    reason: str | None
    message: str | None
    at: str
    reset: bool | None = None
    """true, in a snapshot: what has passed since the number that you gave is not to be had; forget what you knew."""


class Subscribe(Wish):
    """A message: hear of this as well, or in place of what has the same id."""

    action: Literal["subscribe"]
    id: _Id = _DEFAULT


class Unsubscribe(BaseModel):
    """A message: hear of it no longer."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    action: Literal["unsubscribe"]
    id: _Id = _DEFAULT


Message = Subscribe | Unsubscribe
_MESSAGE: Final[TypeAdapter[Message]] = TypeAdapter(Annotated[Message, Field(discriminator="action")])


class Live:
    """Live updates for all who may list tasks."""

    def __init__(
        self, watchers: Watchers, *, origins: Iterable[str] = (), heartbeat: float = HEARTBEAT, recheck: float = 60.0
    ) -> None:
        """``origins``: of pages that may connect besides the gateway's own; ``recheck``: rights are looked at so often."""
        self._watchers = watchers
        self._origins = frozenset(origins)
        self._heartbeat = heartbeat
        self._recheck = recheck

    def routes(self) -> Sequence[Route]:
        """Return the operations."""
        came_back = Parameter("Last-Event-ID", "header", _NUMBER_SCHEMA, "As since; browsers send it when they come back.")
        return (
            Route(
                "GET",
                "/api/v1/tasks/events",
                self._stream,
                "What happens to tasks, as it happens",
                {200: {"text/event-stream": LiveUpdate}},
                problems=(422,),
                parameters=(*_QUERY, came_back),
                description=(
                    "Server-sent events: first where the tasks that have not ended stand, then their transitions, which are "
                    "numbered, and their progress, of which only the latest counts. /ws/tasks is the same as WebSocket."
                ),
                ticket=True,
            ),
            Route(
                "GET",
                "/ws/tasks",
                self._socket,
                "The same as WebSocket",
                {101: None},
                problems=(400, 422),
                parameters=_QUERY,
                ticket=True,
                documented=False,
            ),
        )

    def _check_origin(self, request: web.Request) -> None:
        """Raise :class:`Problem` 403 for a page that may not: without tokens, any page that a user opens could listen."""
        origin = request.headers.get("Origin")
        if origin is None or origin in self._origins or origin.partition("://")[2] == request.host:
            return
        raise Problem(
            403,
            "not-allowed",
            f"cannot connect from a page of {origin[:100]}: if it may, add it to GATEWAY_CORS_ORIGINS",
        )

    # ------------------------------------------------------------------------------------------------------- WebSocket

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        self._check_origin(request)
        socket: web.WebSocketResponse[Literal[False]] = web.WebSocketResponse(
            heartbeat=self._heartbeat, max_msg_size=_FRAME, compress=False, timeout=_CLOSE_SECONDS, decode_text=False
        )
        if not socket.can_prepare(request).ok:
            raise Problem(400, "invalid-request", "cannot serve this: it is no WebSocket handshake; use a WebSocket client")
        with contextlib.closing(self._watchers.watcher(caller_of(request), *asked_namespace(request))) as watcher:
            begun = await watcher.follow(_DEFAULT, _wish_of(request))  # before the handshake: what is refused is a problem
            await socket.prepare(request)
            client = _Client(socket, watcher, control=request.query.get("control") in {"true", "1"})
            code, reason = await client.serve(begun, recheck=self._recheck)
            await _close(socket, request, code, reason)
        return socket

    # ---------------------------------------------------------------------------------------------- server-sent events

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        self._check_origin(request)
        wish = _wish_of(request)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        with contextlib.closing(self._watchers.watcher(caller_of(request), *asked_namespace(request))) as watcher:
            begun = await watcher.follow(_DEFAULT, wish)
            await response.prepare(request)
            gone = watcher.subscriber.gone
            async with _working(_send_events(response, watcher, begun, heartbeat=self._heartbeat)) as sending:
                while await _first((sending, gone), seconds=self._recheck) is None:
                    if not await watcher.may_still():
                        return response
            if gone.done() and gone.result() is Drop.SLOW:
                _too_slow(request)
        return response


async def _send_events(response: web.StreamResponse, watcher: Watcher, begun: Begun, *, heartbeat: float) -> None:
    """Send what there is as server-sent events until the hub parts with the client."""
    await response.write(b"retry: 1000\n\n")
    for frame in begun.frames:
        await response.write(_event(frame))
    await response.write(b"event: ready\n" + _event(begun.ready(_DEFAULT)))
    while True:
        try:
            async with asyncio.timeout(heartbeat):
                updates = await watcher.subscriber.take()
        except TimeoutError:
            await response.write(b":\n\n")  # a comment
            continue
        except Dropped:
            return
        await response.write(b"".join(_event(Frame(update.data, update.number)) for update in updates))


def _event(frame: Frame) -> bytes:
    head = b"" if frame.number is None else b"id: %d\n" % frame.number
    return head + b"data: " + frame.data + b"\n\n"  # the JSON has no line ends


class _Client:
    """One WebSocket. One coroutine reads and another one alone writes: so frames have an order."""

    def __init__(self, socket: "web.WebSocketResponse[Literal[False]]", watcher: Watcher, *, control: bool) -> None:
        self._socket = socket
        self._watcher = watcher
        self._control = control
        self._commands: asyncio.Queue[Message | dict[str, Any]] = asyncio.Queue(_COMMANDS)

    async def serve(self, begun: Begun, *, recheck: float) -> tuple[int, str]:
        """Serve until one side has enough; return with which code and reason to close."""
        gone = self._watcher.subscriber.gone
        async with _working(self._read()) as reading, _working(self._write(begun)) as writing:
            while await _first((gone, reading, writing), seconds=recheck) is None:
                if not await self._watcher.may_still():
                    return _NOT_ALLOWED
            if gone.done():
                return _CLOSES[gone.result()]
            if reading.done():
                return reading.result()
            writing.result()  # a fault of ours is raised here; else the connection was lost
            return WSCloseCode.ABNORMAL_CLOSURE, ""

    async def _read(self) -> tuple[int, str]:
        """Read messages until there are no more."""
        bad = 0
        while True:
            frame = await self._socket.receive()
            if frame.type is WSMsgType.TEXT:
                command = _parse(frame.data)
            elif frame.type is WSMsgType.BINARY:
                command = _refusal("cannot read a binary message: send JSON as text")
            else:  # it was closed, or is broken
                return WSCloseCode.OK, ""
            await self._commands.put(command)
            self._watcher.subscriber.nudge()
            bad += isinstance(command, dict)
            if bad >= _BAD_FRAMES:
                return _TOO_MANY_BAD

    async def _write(self, begun: Begun) -> None:
        """Send what there is to send until the hub parts with the client or the connection is lost."""
        try:
            await self._send_begun(_DEFAULT, begun)
            while True:
                while not self._commands.empty():
                    await self._obey(self._commands.get_nowait())
                for update in await self._watcher.subscriber.take():
                    await self._send(update.data)
        except (Dropped, ConnectionError):
            return

    async def _obey(self, command: Message | dict[str, Any]) -> None:
        self._control = True
        match command:
            case Subscribe():
                await self._subscribe(command)
            case Unsubscribe():
                known = self._watcher.unfollow(command.id)
                await self._answer({"type": "unsubscribed", "id": command.id, "known": known})
            case _:
                await self._answer(command)

    async def _subscribe(self, wanted: Subscribe) -> None:
        if self._watcher.followed >= _WISHES and not self._watcher.follows(wanted.id):
            await self._answer(_refusal(f"cannot follow more than {_WISHES} things; unsubscribe from one", wanted.id))
            return
        try:
            begun = await self._watcher.follow(wanted.id, wanted)
        except Problem as problem:
            await self._answer(_refusal(problem.detail, wanted.id))
            return
        except DatabaseUnavailable:
            await self._answer(_refusal("cannot follow it: PostgreSQL does not answer; subscribe again later", wanted.id))
            return
        await self._answer({"type": "subscribed", "id": wanted.id})
        await self._send_begun(wanted.id, begun)

    async def _send_begun(self, key: str, begun: Begun) -> None:
        for frame in begun.frames:
            await self._send(frame.data)
        if self._control:
            await self._send(begun.ready(key).data)

    async def _answer(self, body: dict[str, Any]) -> None:
        await self._send(orjson.dumps(body))

    async def _send(self, data: bytes) -> None:
        await self._socket.send_frame(data, WSMsgType.TEXT)


def _parse(data: bytes) -> Message | dict[str, Any]:
    """Return a message of a client, or the answer to one that is none."""
    try:
        return _MESSAGE.validate_python(orjson.loads(data))
    except orjson.JSONDecodeError:
        return _refusal('cannot read the message: it is no JSON; send {"action": "subscribe", "kb_id": "…"}')
    except ValidationError as error:
        # The first part of each path is the tag of the union.
        errors = [(one.field.partition(".")[2] or "action", one.message) for one in field_errors(error)]
        shown = "; ".join(f"{field}: {message}" for field, message in errors[:3])
        return _refusal(f"cannot read the message: {shown}") | {
            "errors": [{"field": field, "message": message} for field, message in errors]
        }


def _refusal(detail: str, key: str | None = None) -> dict[str, Any]:
    return {"type": "error", **({} if key is None else {"id": key}), "detail": detail}


async def _close(socket: web.WebSocketResponse[Any], request: web.Request, code: int, reason: str) -> None:
    """Close a WebSocket; cut it off when the other side does not listen."""
    if code == WSCloseCode.TRY_AGAIN_LATER:
        _log.warning("a client was too slow for what it follows", address=request.remote)
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(_CLOSE_SECONDS):
            await socket.close(code=code, message=reason.encode(), drain=False)
    # Closing waits until all is sent, which may be never.
    if request.transport is not None and request.transport.get_write_buffer_size():
        request.transport.abort()


def _too_slow(request: web.Request) -> None:
    _log.warning("a client was too slow for what it follows; its event stream is cut off", address=request.remote)
    if request.transport is not None:
        request.transport.abort()


@contextlib.asynccontextmanager
async def _working(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Run a coroutine as a task until the end of the block."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await task


async def _first(futures: Sequence[asyncio.Future[Any]], *, seconds: float) -> asyncio.Future[Any] | None:
    """Return the first of these that is done, in their order; None when none is after so many seconds."""
    await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    return next((one for one in futures if one.done()), None)


def _wish_of(request: web.Request) -> Wish:
    """Return what the query, or a browser that comes back, asks for. Raises :class:`Problem` 422."""
    query = request.query
    if unknown := sorted(query.keys() - {"namespace", "ticket", "control", "kb_id", "task_id", "since"}):
        raise Problem(422, "invalid-parameter", f"cannot follow tasks: {unknown[0][:80]!a} is no parameter; take it out")
    given: dict[str, Any] = {
        name: [part for text in query.getall(name) for part in text.split(",") if part]
        for name in ("kb_id", "task_id")
        if name in query
    }
    if (since := request.headers.get("Last-Event-ID") or query.get("since")) is not None:
        given["since"] = since
    try:
        return Wish.model_validate(given)
    except ValidationError as error:
        raise of_validation(error, kind="invalid-parameter", what="cannot follow tasks") from error
