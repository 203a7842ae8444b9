"""Tasks over the Kubernetes API, with the official ``kubernetes`` client: nothing of the gateway is needed.

The only module that imports ``kubernetes``, which weighs more than the rest together; the extra ``client-kubernetes``
installs it.
That client blocks: in an event loop its calls run in threads.
"""

import contextlib
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeVar, cast

import kubernetes.client
import kubernetes.config
import urllib3.exceptions
from kubernetes.client.exceptions import ApiException
from pydantic.alias_generators import to_snake

from service_client.calls import pause_before
from service_client.errors import (
    FieldError,
    TaskClientError,
    TaskConflict,
    TaskForbidden,
    TaskNotFound,
    TaskRefused,
    TaskUnavailable,
)
from service_client.programs import Emit, Program, call, pause
from service_client.transport import Page, Watched
from service_client.views import DELETED, BatchItem, Order, Submitted, Task, TaskFilter, TaskStatus, TaskUpdate
from task_contract import names
from task_contract.models import Spec, spec_again
from task_contract.views import task_view

T = TypeVar("T")
Manifest = dict[str, Any]

FIELD_MANAGER: Final = "processing-tasks-client"
"""Who this client is in ``metadata.managedFields`` of the tasks that it creates and cancels."""

_TRIES: Final = 4
_TIMEOUT: Final = (3.05, 30.0)  # seconds to connect, and of silence
_WATCH: Final = 240  # seconds; the server ends a watch then
_AT_ONCE: Final = 8
_CHANGEABLE: Final = {"cancel": False, "suspend": False, "priority": "normal", "ttl_seconds_after_finished": 86_400}
"""Fields that may have been changed since a task was created: they do not make it another one."""


def api_from_environment() -> kubernetes.client.CustomObjectsApi:
    """Use the pod's service account, or outside a cluster the current context of the kubeconfig."""
    configuration = kubernetes.client.Configuration()
    try:
        kubernetes.config.load_incluster_config(configuration)
    except kubernetes.config.ConfigException:
        kubernetes.config.load_kube_config(client_configuration=configuration)
    return kubernetes.client.CustomObjectsApi(kubernetes.client.ApiClient(configuration))


class ClusterTransport:
    """A way to tasks over the Kubernetes API; :class:`~service_client.transport.Transport` says what each program does."""

    batch = 1000

    def __init__(
        self,
        api: kubernetes.client.CustomObjectsApi,
        *,
        namespace: str,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._clock = clock
        self._chance = chance
        self._where: dict[str, Any] = {
            "group": names.GROUP,
            "version": names.VERSION,
            "namespace": namespace,
            "plural": names.PLURAL,
        }

    def submit(self, order: Order) -> Program[Submitted]:
        """Create a task, or find the one that the same order has created."""
        spec = self._spec(order)
        return (yield from self._patiently(lambda: self._create(order, spec)))

    def submit_batch(self, orders: Sequence[Order]) -> Program[list[BatchItem]]:
        """Create tasks, some at once."""

        def one(index: int) -> BatchItem:
            try:
                return BatchItem(index, task=self._create(orders[index], self._spec(orders[index])))
            except TaskClientError as error:
                return BatchItem(index, error=error)

        def some(indices: Sequence[int]) -> list[BatchItem]:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                return list(pool.map(one, indices))

        items: dict[int, BatchItem] = {}
        left: list[int] = list(range(len(orders)))
        for number in range(1, _TRIES + 1):
            done = yield from call(partial(some, left))
            items |= {item.index: item for item in done}
            failed = [item.error for item in done if isinstance(item.error, TaskUnavailable)]
            left = [item.index for item in done if isinstance(item.error, TaskUnavailable)]
            if not left or number == _TRIES:
                break
            yield from pause(pause_before(number + 1, max(one.retry_after or 0.0 for one in failed), chance=self._chance))
        return [items[index] for index in range(len(orders))]

    def get(self, task_id: str) -> Program[Task]:
        """Read a task."""
        return _task((yield from self._patiently(lambda: self._read(task_id))))

    def cancel(self, task_id: str) -> Program[Task]:
        """Ask for its end."""

        def patch() -> Manifest:
            with translated(f"cannot cancel task {task_id}"):
                return cast(
                    "Manifest",
                    self._api.patch_namespaced_custom_object(
                        **self._where,
                        name=task_id,
                        body={"spec": {"cancel": True}},
                        field_manager=FIELD_MANAGER,
                        _request_timeout=_TIMEOUT,
                    ),
                )

        return _task((yield from self._patiently(patch)))

    def retry(self, task_id: str, *, key: str) -> Program[Submitted]:
        """Create a task that does the same as one that has ended."""
        manifest = yield from self._patiently(lambda: self._read(task_id))
        task = _task(manifest)
        if not task.status.finished:
            raise TaskConflict(f"cannot retry task {task_id}: it is {task.status}; wait until it has ended, or cancel it")
        spec = spec_again(manifest["spec"])
        order = Order(task=spec, key=key, labels=task.labels, namespace=None, name=None)
        return (yield from self._patiently(lambda: self._create(order, spec, {names.RETRY_OF_ANNOTATION: task_id})))

    def page(self, wanted: TaskFilter, *, limit: int, cursor: str | None) -> Program[Page]:
        """Read part of a list, in the order of names."""
        chosen = {
            "status.phase": None if wanted.status is None else wanted.status.capitalize(),
            "spec.type": wanted.task_type,
            "spec.kbId": wanted.kb_id,
            "spec.priority": wanted.priority,
        }
        selector = ",".join(f"{field}={value}" for field, value in chosen.items() if value is not None)
        listed = yield from self._patiently(lambda: self._list(selector, limit=limit, cursor=cursor))
        return Page([_task(one) for one in listed["items"]], listed["metadata"].get("continue") or None)

    # ----------------------------------------------------------------------------------------------------------- watch

    def updates(self, watched: Watched) -> Program[None]:
        """Emit the present states, then what happens; see :class:`~service_client.transport.Transport`."""
        if watched.after is not None:
            raise TaskRefused("cannot go on from the number of an event over the Kubernetes API: watch over REST for that")
        selector = "" if watched.kb_id is None else f"spec.kbId={watched.kb_id}"
        if watched.task_id is not None:
            selector = f"metadata.name={watched.task_id}"
        told: dict[str, Task] = {}
        failures = 0
        while True:
            version: str | None = None
            try:
                version = yield from self._present(watched, selector, told)
                failures = 0
            except TaskUnavailable as error:
                failures += 1
                if self._ended(watched, told):
                    return
                yield from pause(pause_before(failures + 2, error.retry_after, chance=self._chance))
            while version is not None:
                if self._ended(watched, told):
                    return
                begun = self._clock()
                version = yield from self._follow(watched, selector, told, version)
                if self._clock() - begun < 1 and not self._ended(watched, told):
                    yield from pause(pause_before(2, None, chance=self._chance))  # something ends watches at once

    def _present(self, watched: Watched, selector: str, told: dict[str, Task]) -> Program[str]:
        """Emit what has changed since the last look, and return the version that it was at."""
        cursor: str | None = None
        there: set[str] = set()
        while True:
            left = None if watched.until is None else watched.until - self._clock()
            listed = yield from call(partial(self._list, selector, limit=200, cursor=cursor, seconds=left))
            for manifest in listed["items"]:
                there.add(manifest["metadata"]["uid"])
                yield from self._tell(_task(manifest), told)
            cursor = listed["metadata"].get("continue") or None
            if cursor is None:
                break
        if watched.task_id is not None and not there:
            raise TaskNotFound(f"cannot watch task {watched.task_id}: it is not there, or was deleted")
        for uid in told.keys() - there:
            yield from self._gone(watched, told[uid], told)
        return str(listed["metadata"]["resourceVersion"])

    def _follow(self, watched: Watched, selector: str, told: dict[str, Task], version: str) -> Program[str | None]:
        """Emit what one watch brings; return the version to go on from, None if that is forgotten."""
        stream: WatchStream | None = None
        left = _WATCH if watched.until is None else min(_WATCH, watched.until - self._clock())
        try:
            stream = yield from call(lambda: self._open(selector, version, seconds=max(1, round(left))))
            while (event := (yield from call(stream.next))) is not None:
                kind, manifest = event["type"], event["object"]
                if kind == "ERROR":
                    return None
                version = manifest["metadata"]["resourceVersion"]
                if kind == "DELETED":
                    yield from self._gone(watched, _task(manifest), told)
                elif kind != "BOOKMARK":
                    yield from self._tell(_task(manifest), told)
                if self._ended(watched, told):
                    return version
        except TaskUnavailable as error:
            yield from pause(pause_before(3, error.retry_after, chance=self._chance))
            return None
        finally:
            if stream is not None:
                stream.close()
        return version

    def _ended(self, watched: Watched, told: Mapping[str, Task]) -> bool:
        if watched.until is not None and self._clock() >= watched.until:
            return True
        return watched.task_id is not None and any(task.status.finished for task in told.values())

    def _tell(self, task: Task, told: dict[str, Task]) -> Program[None]:
        before = told.get(task.uid)
        told[task.uid] = task
        update = TaskUpdate.of(task)
        if before is None or TaskUpdate.of(before) != update:
            yield Emit(update.model_copy(update={"at": datetime.now(UTC)}))

    def _gone(self, watched: Watched, task: Task, told: dict[str, Task]) -> Program[None]:
        told.pop(task.uid, None)
        if watched.task_id is not None:
            raise TaskNotFound(f"cannot watch task {watched.task_id}: it was deleted")
        if not task.status.finished:
            ended = {"at": datetime.now(UTC), "status": TaskStatus.CANCELED, "reason": DELETED, "progress": 0}
            yield Emit(TaskUpdate.of(task).model_copy(update=ended))

    # -------------------------------------------------------------------------------------------------------- requests

    def _patiently(self, function: Callable[[], T]) -> Program[T]:
        """Make a request that may be made twice, again where that can help."""
        number = 1
        while True:
            try:
                return (yield from call(function))
            except TaskUnavailable as error:
                number += 1
                if number > _TRIES:
                    raise
                yield from pause(pause_before(number, error.retry_after, chance=self._chance))

    def _spec(self, order: Order) -> Manifest:
        if order.namespace not in {None, self._namespace}:
            raise TaskRefused(
                f"cannot create the task: this client is for namespace {self._namespace}, not for {order.namespace}; make "
                "one for each namespace",
                fields=(FieldError("namespace", "is not that of the client"),),
            )
        return order.spec()

    def _create(self, order: Order, spec: Manifest, annotations: Mapping[str, str] | None = None) -> Submitted:
        name = order.name or f"task-{names.digest(self._namespace, FIELD_MANAGER, order.key)}"
        metadata = {
            "name": name,
            "labels": dict(order.labels),
            "annotations": {**order.annotations, **(annotations or {})},
        }
        body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": metadata, "spec": spec}
        options: dict[str, Any] = {"dry_run": "All"} if order.dry_run else {}
        try:
            with translated("cannot create the task" if order.name is None else f"cannot create task {name}"):
                created: Any = self._api.create_namespaced_custom_object(
                    **self._where, body=body, field_manager=FIELD_MANAGER, _request_timeout=_TIMEOUT, **options
                )
            return _submitted(created, replayed=False)
        except TaskConflict as conflict:
            there = self._read(name)
            if _same(there["spec"], spec):
                return _submitted(there, replayed=True)
            raise TaskConflict(f"cannot create task {name}: it exists with another spec; choose another name") from conflict

    def _read(self, task_id: str) -> Manifest:
        with translated(f"cannot read task {task_id}"):
            return cast(
                "Manifest", self._api.get_namespaced_custom_object(**self._where, name=task_id, _request_timeout=_TIMEOUT)
            )

    def _list(self, selector: str, *, limit: int, cursor: str | None, seconds: float | None = None) -> Manifest:
        timeout = _TIMEOUT if seconds is None else tuple(max(0.1, min(one, seconds)) for one in _TIMEOUT)
        options: dict[str, Any] = {"limit": limit, "_request_timeout": timeout}
        options |= {"field_selector": selector} if selector else {}
        options |= {"_continue": cursor} if cursor else {}
        with translated("cannot list tasks"):
            return cast("Manifest", self._api.list_namespaced_custom_object(**self._where, **options))

    def _open(self, selector: str, version: str, *, seconds: int) -> "WatchStream":
        options: dict[str, Any] = {"field_selector": selector} if selector else {}
        with translated("cannot watch tasks"):
            return WatchStream(
                self._api.list_namespaced_custom_object(
                    **self._where,
                    **options,
                    watch=True,
                    resource_version=version,
                    allow_watch_bookmarks=True,
                    timeout_seconds=seconds,
                    _request_timeout=(_TIMEOUT[0], seconds + 10.0),
                    _preload_content=False,
                )
            )


class WatchStream:
    """The events of one watch, line by line. ``kubernetes.watch`` cannot be ended from another thread."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self._lines = self._read()
        self._closed = False

    def next(self) -> Manifest | None:
        """Return the next event, None at the end."""
        with translated("cannot watch tasks"):
            line = next(self._lines, None)
        try:
            return None if line is None else json.loads(line)
        except ValueError as error:
            raise TaskUnavailable(f"cannot watch tasks: the answer is no JSON ({line!r:.100})") from error

    def _read(self) -> Iterator[bytes]:
        rest = b""
        for chunk in self._response.stream(amt=None, decode_content=True):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line for line in lines if line.strip())

    def close(self) -> None:
        """Give the connection back; a read that waits in another thread ends."""
        if self._closed:
            return
        self._closed = True
        # It may have ended by itself; urllib3 before 2.3 cannot, and its read ends with the watch.
        with contextlib.suppress(ValueError, OSError, RuntimeError, AttributeError):
            self._response.shutdown()
        self._response.close()


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn what the Kubernetes client raises into errors of ours that begin with ``what``."""
    try:
        yield
    except ApiException as error:
        raise _of_answer(error, what) from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        why = f"{what}: the Kubernetes API does not answer ({error!r:.200}); is it reachable?"
        raise TaskUnavailable(why) from error


_KINDS: Final[dict[int, type[TaskClientError]]] = {
    401: TaskForbidden,
    403: TaskForbidden,
    404: TaskNotFound,
    408: TaskUnavailable,
    409: TaskConflict,
    410: TaskUnavailable,  # a position in a list that is forgotten: read it anew
    429: TaskUnavailable,
}


def _of_answer(error: ApiException, what: str) -> TaskClientError:
    try:
        answer = json.loads(error.body or "{}")
        message = answer.get("message") or error.reason
        causes = (answer.get("details") or {}).get("causes") or []
    except (ValueError, AttributeError):
        message, causes = error.reason, []
    kind = _KINDS.get(error.status, TaskRefused if 400 <= (error.status or 0) < 500 else TaskUnavailable)
    fields = tuple(_field(str(one.get("field", "")), str(one.get("message", ""))) for one in causes)
    asked = (error.headers or {}).get("Retry-After", "")
    return kind(
        f"{what}: {message}",
        fields=fields if kind is TaskRefused else (),
        retry_after=float(asked) if asked.isdecimal() else None,
    )


def _field(path: str, message: str) -> FieldError:
    """Return a cause in the words of REST; our rules name the field themselves, ``spec.payload.chunkSize: must …``."""
    if match := re.search(r"\bspec((?:\.[A-Za-z]+)+): (.+)$", message, re.DOTALL):
        path, message = match[1], match[2]
    first, *rest = [to_snake(part) for part in path.removeprefix("spec").strip(".").split(".")]
    return FieldError(".".join(["task_type" if first == "type" else first, *rest]), message)


def _same(there: Manifest, wanted: Manifest) -> bool:
    """Whether a stored spec is the one that is wanted, but for what may be changed."""
    first, second = (Spec.model_validate(one).model_copy(update=_CHANGEABLE) for one in (there, wanted))
    return first == second


def _task(manifest: Manifest) -> Task:
    return Task.model_validate(task_view(manifest))


def _submitted(manifest: Manifest, *, replayed: bool) -> Submitted:
    return Submitted.model_validate({**task_view(manifest), "replayed": replayed})
