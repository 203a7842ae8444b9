"""Tasks over the gateway's REST: every call is one of :func:`service_client.calls.exchange`, a watch is an event stream.

A watch goes on behind the last event that was seen when its stream ends, and asks again and again where there is no stream
(a proxy that holds it back, PostgreSQL away). Of a single task the state is also read every :data:`LOOK` seconds: what a
caller waits for never hangs on an event.
"""

import contextlib
import json
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from pydantic import ValidationError

from service_client.breaker import SHARED, Breakers
from service_client.calls import CallConfig, CallMethod, decoded, exchange, make_call, pause_before
from service_client.errors import (
    FieldError,
    ServiceError,
    ServiceRefused,
    TaskClientError,
    TaskConflict,
    TaskForbidden,
    TaskNotFound,
    TaskRefused,
    TaskUnavailable,
    TooManyRequests,
)
from service_client.programs import Answer, Emit, HttpStream, NoAnswer, NotSent, Open, Program, Read, Request, pause
from service_client.sse import EventParser, ServerEvent
from service_client.transport import Page, Watched
from service_client.views import DELETED, BatchItem, Order, Submitted, Task, TaskFilter, TaskUpdate

SERVICE: Final = "task-manager-service"
"""The gateway, as its callers know it."""
TASKS: Final = "/api/v1/tasks"

SILENCE: Final = 60.0
"""Seconds without a byte after which a stream is taken for dead; the gateway sends something more often."""
LOOK: Final = 20.0
"""Seconds after which the state of a single task is read again beside its stream."""
POLL: Final = 2.0
"""Seconds between two looks where there is no stream."""
POLLED: Final = 60.0
"""Seconds of that after which a stream is tried again."""
_MOST_POLLED: Final = 500
"""Of many tasks so many are looked at where there is no stream, the youngest."""
_CHUNK_BYTES: Final = 4 * 2**20
"""Of a batch at once."""

Token = str | Callable[[], str] | None


class TokenFile:
    """A token from a file, read anew each minute: Kubernetes replaces the tokens of pods."""

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = Path(path)
        self._clock = clock
        self._read: tuple[float, str] | None = None

    def __call__(self) -> str:
        """Return the token."""
        now = self._clock()
        if self._read is None or now - self._read[0] >= 60:
            self._read = now, self._path.read_text(encoding="ascii").strip()
        return self._read[1]


class RestTransport:
    """A way to tasks over REST; :class:`~service_client.transport.Transport` says what each program does."""

    batch = 1000

    def __init__(
        self,
        url: str | None = None,
        *,
        namespace: str | None = None,
        token: Token = None,
        config: CallConfig | None = None,
        breakers: Breakers = SHARED,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """``url``: of the gateway, else it is looked up; ``namespace``: of the tasks, else the gateway's default."""
        self._url = url
        self._namespace = namespace
        self._token = token
        self._config = config or CallConfig(timeout=30.0, retry_times=3)
        self._breakers = breakers
        self._clock = clock
        self._chance = chance

    def submit(self, order: Order) -> Program[Submitted]:
        """Create a task, or find the one that the same order has created."""
        what = "cannot create the task"
        body = order.body(self._bounded(order))
        # Its body has a key, always.
        answer, data = yield from self._ask(what, CallMethod.POST, TASKS, json=body, repeatable=True)
        return _accepted(data, what, replayed=answer.headers.get("idempotent-replayed") == "true")

    def submit_batch(self, orders: Sequence[Order]) -> Program[list[BatchItem]]:
        """Create tasks; a batch that is too large for one body goes in parts."""
        what = "cannot create the tasks"
        items: list[BatchItem] = []
        bodies: list[tuple[int, dict[str, Any]]] = []
        for index, order in enumerate(orders):
            try:
                bodies.append((index, order.body(self._bounded(order))))
            except TaskClientError as error:
                items.append(BatchItem(index, error=error))
        for part in _parts(bodies):
            sent = [body for _, body in part]
            try:
                _, data = yield from self._ask(what, CallMethod.POST, f"{TASKS}/batch", json=sent, repeatable=True)
                found = {int(one["index"]): one for one in data["items"]}
                items += [_item(index, found[place]) for place, (index, _) in enumerate(part)]
            except TaskClientError as error:
                items += [BatchItem(index, error=error) for index, _ in part]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                unreadable = _unreadable(what, error)
                items += [BatchItem(index, error=unreadable) for index, _ in part]
        return sorted(items, key=lambda item: item.index)

    def get(self, task_id: str) -> Program[Task]:
        """Read a task."""
        return self._get(task_id, self._config)

    def _get(self, task_id: str, config: CallConfig) -> Program[Task]:
        what, params = f"cannot read task {task_id}", {"namespace": self._namespace}
        _, data = yield from self._ask(what, CallMethod.GET, _path(task_id), params=params, config=config)
        return _task(data, what)

    def cancel(self, task_id: str) -> Program[Task]:
        """Ask for its end."""
        what = f"cannot cancel task {task_id}"
        params = {"namespace": self._namespace}
        _, data = yield from self._ask(what, CallMethod.POST, f"{_path(task_id)}/cancel", params=params, repeatable=True)
        return _task(data, what)

    def retry(self, task_id: str, *, key: str) -> Program[Submitted]:
        """Create a task that does the same as one that has ended."""
        what = f"cannot retry task {task_id}"
        answer, data = yield from self._ask(
            what,
            CallMethod.POST,
            f"{_path(task_id)}/retry",
            params={"namespace": self._namespace},
            idempotency_key=key,
        )
        return _accepted(data, what, replayed=answer.headers.get("idempotent-replayed") == "true")

    def page(self, wanted: TaskFilter, *, limit: int, cursor: str | None) -> Program[Page]:
        """Read part of a list, the youngest first."""
        return self._page(wanted, limit=limit, cursor=cursor, config=self._config)

    def _page(self, wanted: TaskFilter, *, limit: int, cursor: str | None, config: CallConfig) -> Program[Page]:
        what = "cannot list tasks"
        params = {
            "namespace": self._namespace,
            "status": wanted.status,
            "task_type": wanted.task_type,
            "kb_id": wanted.kb_id,
            "priority": wanted.priority,
            "limit": limit,
            "cursor": cursor,
        }
        _, data = yield from self._ask(what, CallMethod.GET, TASKS, params=params, config=config)
        try:
            return Page([Task.model_validate(one) for one in data["items"]], data.get("next_cursor"))
        except (KeyError, TypeError, AttributeError, ValidationError) as error:
            raise _unreadable(what, error) from error

    # ----------------------------------------------------------------------------------------------------------- watch

    def updates(self, watched: Watched) -> Program[None]:
        """Emit the present states, then what happens; see :class:`~service_client.transport.Transport`."""
        seen = _Seen(watched)
        failures = 0
        while not seen.over(self._clock()):
            try:
                heard = yield from self._stream(watched, seen)
                failures = 0 if heard else failures + 1
            except (NotSent, NoAnswer, TaskUnavailable):
                failures += 1
            except ServiceError as error:
                if isinstance(error, ServiceRefused) and error.status not in {404, 405, 406}:
                    raise _translated(error, "cannot watch tasks") from error
                failures = 3  # there is no such stream, or not now
            if seen.over(self._clock()):
                return
            if failures < 3:
                yield from pause(pause_before(failures + 2, None, chance=self._chance))
                continue
            yield from self._poll(watched, seen)
            failures = 2

    def _stream(self, watched: Watched, seen: "_Seen") -> Program[bool]:
        """Follow an event stream to its end; return whether it was one. Raises NotSent, NoAnswer, ServiceError."""
        params = {"namespace": self._namespace, "task_id": watched.task_id, "kb_id": watched.kb_id}
        resumed = {} if seen.cursor is None else {"Last-Event-ID": str(seen.cursor)}
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity", "Cache-Control": "no-cache", **resumed}
        call = make_call(
            SERVICE, CallMethod.GET, f"{TASKS}/events", params=params, headers=headers | self._headers(), url=self._url
        )
        life = None if watched.until is None else max(0.05, watched.until - self._clock())
        request = Request(
            method=call.method,
            url=call.base + call.path,
            headers=call.headers,
            seconds=SILENCE if life is None else min(SILENCE, life),
            connect_seconds=self._config.connect_timeout,
        )
        opened: HttpStream | Answer = yield Open(request, life)
        if isinstance(opened, Answer):
            kind = {429: TooManyRequests}.get(opened.status, ServiceRefused if opened.status < 500 else ServiceError)
            raise call.error(kind, f"{opened.status}", status=opened.status)
        self._breakers.of(call.base).succeeded()
        if watched.task_id is not None:
            # After the stream has begun, so that nothing lies in between.
            yield from self._look(watched, seen)
        parser, heard, looked_at = EventParser(), False, self._clock()
        while not seen.over(self._clock()):
            chunk: bytes = yield Read(opened)
            if not chunk:
                return heard
            try:
                events = list(parser.feed(chunk))
            except ValueError as error:
                raise NoAnswer(str(error)) from error
            for event in events:
                heard = True
                yield from seen.hear(event)
            if watched.task_id is not None and self._clock() - looked_at >= LOOK and not seen.over(self._clock()):
                looked_at = self._clock()
                yield from self._look(watched, seen)
        return heard

    def _poll(self, watched: Watched, seen: "_Seen") -> Program[None]:
        """Look at the tasks again and again, for a while."""
        until = self._clock() + POLLED
        while self._clock() < until:
            with contextlib.suppress(TaskUnavailable):  # the next look will tell
                yield from self._look(watched, seen)
            if seen.over(self._clock()):
                return
            left = POLL if watched.until is None else min(POLL, max(0.01, watched.until - self._clock()))
            yield from pause(left * (0.75 + self._chance() / 4))

    def _look(self, watched: Watched, seen: "_Seen") -> Program[None]:
        """Tell where the tasks stand, unless that was told."""
        config = self._config
        if watched.until is not None:
            config = replace(config, timeout=max(0.05, min(config.timeout, watched.until - self._clock())))
        if watched.task_id is not None:
            task = yield from self._get(watched.task_id, config)
            if task.deleted_at is not None and not task.status.finished:
                raise TaskNotFound(f"cannot watch task {task.id}: it was deleted")
            yield from seen.tell(TaskUpdate.of(task), only_if_new=True)
            return
        cursor, count = None, 0
        while count < _MOST_POLLED:
            page = yield from self._page(TaskFilter(kb_id=watched.kb_id), limit=100, cursor=cursor, config=config)
            for task in page.items:
                yield from seen.tell(TaskUpdate.of(task), only_if_new=True)
            count, cursor = count + len(page.items), page.cursor
            if cursor is None:
                return

    # ------------------------------------------------------------------------------------------------------------ calls

    def _ask(self, what: str, method: CallMethod, path: str, **options: Any) -> Program[tuple[Answer, Any]]:
        """Make a call; return the answer and its JSON. Raises :class:`TaskClientError` that begins with ``what``."""
        given: dict[str, Any] = {"headers": self._headers(), "config": self._config, "url": self._url} | options
        call = make_call(SERVICE, method, path, **given)
        try:
            answer = yield from exchange(call, breakers=self._breakers, clock=self._clock, chance=self._chance)
            return answer, decoded(call, answer)
        except ServiceError as error:
            raise _translated(error, what) from error

    def _headers(self) -> dict[str, str]:
        token = self._token() if callable(self._token) else self._token
        return {} if token is None else {"Authorization": f"Bearer {token}"}

    def _bounded(self, order: Order) -> str | None:
        """Return the namespace of an order; it has to be that of this client, which the other calls ask in."""
        if order.name is not None:
            raise TaskRefused("cannot choose the name of a task over REST: give idempotency_key instead")
        if order.namespace not in {None, self._namespace}:
            raise TaskRefused(
                f"cannot create the task: this client is for namespace {self._namespace or '(the default)'}, not for "
                f"{order.namespace}; make one for each namespace",
                fields=(FieldError("namespace", "is not that of the client"),),
            )
        return self._namespace


class _Seen:
    """What a watch has told, so that it tells nothing twice."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self.cursor = watched.after
        self._last: dict[str, TaskUpdate] = {}
        self._ended = False

    def over(self, now: float) -> bool:
        """Whether there is nothing more to tell."""
        return self._ended or (self._watched.until is not None and now >= self._watched.until)

    def hear(self, event: ServerEvent) -> Program[None]:
        """Take an event of the stream: a state of the snapshot, or something that has happened."""
        try:
            said = json.loads(event.data)
            kind = said.get("type") if isinstance(said, dict) else None
            update = TaskUpdate.model_validate(said) if kind == "task" or kind == "snapshot" else None
        except (ValueError, RecursionError):
            return  # of a kind that a later gateway has
        if update is not None and kind == "snapshot":
            if said.get("reset"):
                self.cursor = None  # the numbers have begun anew, or too much has passed
            yield from self.tell(update, only_if_new=True)
        elif update is not None and (update.event is None or self.cursor is None or update.event > self.cursor):
            yield from self.tell(update)
        if event.id is not None and re.fullmatch("[0-9]{1,19}", event.id):
            self.cursor = int(event.id)

    def tell(self, update: TaskUpdate, *, only_if_new: bool = False) -> Program[None]:
        """Emit an update; a state that was read only if it is not what was told last."""
        before = self._last.get(update.uid)
        if self._ended or (only_if_new and before is not None and _state(before) == _state(update)):
            return
        if update.reason == DELETED and self._watched.task_id is not None:
            raise TaskNotFound(f"cannot watch task {update.task_id}: it was deleted")
        self._last.pop(update.uid, None)
        self._last[update.uid] = update
        if len(self._last) > 2 * _MOST_POLLED:
            self._last.pop(next(iter(self._last)))  # what has been silent longest
        self._ended = self._watched.task_id is not None and update.status.finished
        yield Emit(update)


def _state(update: TaskUpdate) -> tuple[Any, ...]:
    return update.status, update.attempt, update.stage, update.progress, update.reason


def _path(task_id: str) -> str:
    return f"{TASKS}/{quote(task_id, safe='')}"


def _parts(bodies: Sequence[tuple[int, dict[str, Any]]]) -> list[list[tuple[int, dict[str, Any]]]]:
    """Cut a batch into parts that fit into a body each."""
    parts: list[list[tuple[int, dict[str, Any]]]] = []
    size = 0
    for body in bodies:
        length = len(json.dumps(body[1], ensure_ascii=False).encode())
        if not parts or size + length > _CHUNK_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(body)
        size += length
    return parts


def _task(data: Any, what: str) -> Task:
    try:
        return Task.model_validate(data)
    except ValidationError as error:
        raise _unreadable(what, error) from error


def _accepted(data: Any, what: str, *, replayed: bool) -> Submitted:
    try:
        return Submitted.model_validate({**data, "replayed": replayed})
    except (TypeError, ValidationError) as error:
        raise _unreadable(what, error) from error


def _item(index: int, given: Mapping[str, Any]) -> BatchItem:
    if given.get("task") is not None:
        return BatchItem(index, task=_accepted(given["task"], "cannot create the task", replayed=False))
    problem = given.get("problem") or {}
    fields = tuple(FieldError(str(one["field"]), str(one["message"])) for one in problem.get("errors") or ())
    message = str(problem.get("detail") or problem.get("title") or "cannot create the task: the gateway does not say why")
    return BatchItem(index, error=_kind(int(problem.get("status") or 500))(message, fields=fields))


def _unreadable(what: str, error: Exception) -> TaskUnavailable:
    return TaskUnavailable(f"{what}: the answer is none of a gateway ({error!r:.200}); is the URL right?")


_KINDS: Final[dict[int, type[TaskClientError]]] = {
    401: TaskForbidden,
    403: TaskForbidden,
    404: TaskNotFound,
    409: TaskConflict,
    410: TaskNotFound,
    429: TaskUnavailable,
}


def _kind(status: int) -> type[TaskClientError]:
    return _KINDS.get(status, TaskRefused if 400 <= status < 500 else TaskUnavailable)


def _translated(error: ServiceError, what: str) -> TaskClientError:
    """Return the error of a call as one about tasks; the gateway's own words say what could not be done."""
    kind = TaskUnavailable if error.status is None else _kind(error.status)
    problem = error.problem
    detail = problem.detail if problem is not None and problem.detail.startswith("cannot ") else None
    return kind(
        detail or f"{what}: {error.message}",
        fields=problem.errors if problem is not None else (),
        retry_after=error.retry_after,
    )
