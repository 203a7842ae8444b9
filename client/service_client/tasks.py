"""The client of tasks, :class:`TaskClient` in threads and :class:`AsyncTaskClient` in an event loop.

Both do the same over either transport: what they do is written once, as programs (:mod:`service_client.programs`).
"""

import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self

import httpx

from service_client.calls import CallConfig, new_key
from service_client.errors import TaskClientError, TaskFailed, TaskNotFinished, TaskTimeout
from service_client.programs import Blocking, Emit, Program, Waiting
from service_client.rest import RestTransport, Token
from service_client.transport import Transport, Watched, handled
from service_client.views import BatchItem, Order, Submitted, Task, TaskFilter, TaskLike, TaskStatus, TaskUpdate
from task_contract.models import Result

if TYPE_CHECKING:
    from kubernetes.client import CustomObjectsApi

_PAGE = 100


def _over_kubernetes(api: "CustomObjectsApi | None", namespace: str) -> Transport:
    try:
        from service_client.cluster import ClusterTransport, api_from_environment
    except ModuleNotFoundError as error:
        raise ImportError(f"cannot use the Kubernetes API: {error}; install processing-tasks[client-kubernetes]") from error
    return ClusterTransport(api or api_from_environment(), namespace=namespace)


class _Programs:
    """What both clients do."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def _submit(
        self, task: TaskLike, name: str | None, labels: Mapping[str, str] | None, key: str | None
    ) -> Program[Submitted]:
        # A key of our own makes it safe to ask again where no answer came.
        order = Order.of(task, key=key or new_key(), labels=labels, name=name)
        return (yield from self._transport.submit(order))

    def _submit_batch(self, tasks: Iterable[TaskLike], labels: Mapping[str, str] | None) -> Program[list[BatchItem]]:
        outcomes: dict[int, BatchItem] = {}
        orders: list[tuple[int, Order]] = []
        for index, task in enumerate(tasks):
            try:
                orders.append((index, Order.of(task, key=new_key(), labels=labels)))
            except TaskClientError as error:
                outcomes[index] = BatchItem(index, error=error)
        for first in range(0, len(orders), self._transport.batch):
            part = orders[first : first + self._transport.batch]
            for item in (yield from self._transport.submit_batch([order for _, order in part])):
                index = part[item.index][0]
                outcomes[index] = BatchItem(index, task=item.task, error=item.error)
        return [outcomes[index] for index in range(len(outcomes))]

    def _list(self, wanted: TaskFilter, limit: int | None) -> Program[None]:
        cursor, left = None, limit
        while left is None or left > 0:
            size = _PAGE if left is None else min(_PAGE, left)
            page = yield from self._transport.page(wanted, limit=size, cursor=cursor)
            for task in page.items:
                yield Emit(task)
            left = None if left is None else left - len(page.items)
            cursor = page.cursor
            if cursor is None:
                return

    def _wait(self, task_id: str, timeout: timedelta, on_change: Callable[[TaskUpdate], None] | None) -> Program[Task]:
        last: TaskUpdate | None = None

        def take(update: TaskUpdate) -> bool:
            nonlocal last
            last = update
            if on_change is not None:
                on_change(update)
            return update.status.finished

        until = time.monotonic() + timeout.total_seconds()
        yield from handled(self._transport.updates(Watched(task_id=task_id, until=until)), take)
        if last is None or not last.status.finished:
            state = "not known" if last is None else str(last.status)
            raise TaskTimeout(
                f"cannot wait longer for task {task_id}: it is {state} after {timeout}; it goes on, wait again or cancel it"
            )
        return (yield from self._transport.get(task_id))

    def _result(self, task_id: str) -> Program[Result]:
        task = yield from self._transport.get(task_id)
        if not task.status.finished:
            raise TaskNotFinished(f"cannot read the result of task {task_id}: it is {task.status}; wait for it")
        if task.status is not TaskStatus.COMPLETED:
            why = task.error.message if task.error is not None else task.message or ""
            raise TaskFailed(f"task {task_id} is {task.status}: {task.reason}: {why}", task=task)
        return task.result or Result()


class TaskClient(_Programs):
    """Submits, reads, watches and cancels the tasks of one namespace. Close it, or use it in a ``with`` block.

    Every method raises :class:`~service_client.errors.TaskClientError`; where there is no usable answer
    :class:`~service_client.errors.TaskUnavailable`, after it was tried again. Safe in several threads.
    """

    def __init__(self, transport: Transport, *, http: httpx.Client | None = None) -> None:
        super().__init__(transport)
        self._driver = Blocking(http)

    @classmethod
    def over_rest(
        cls,
        url: str | None = None,
        *,
        namespace: str | None = None,
        token: Token = None,
        config: CallConfig | None = None,
        http: httpx.Client | None = None,
    ) -> Self:
        """Use the gateway at ``url``, else where :mod:`service_client.discovery` finds ``task-manager-service``.

        ``namespace``: of the tasks, else the gateway's default. ``token``: for a gateway that asks for one; a function is
        called for each request (:class:`~service_client.rest.TokenFile`). ``http``: a client of yours with proxies or
        certificates; it stays yours to close.
        """
        return cls(RestTransport(url, namespace=namespace, token=token, config=config), http=http)

    @classmethod
    def over_kubernetes(cls, api: "CustomObjectsApi | None" = None, *, namespace: str) -> Self:
        """Use the Kubernetes API, by default with the pod's service account or the current context of the kubeconfig."""
        return cls(_over_kubernetes(api, namespace))

    @classmethod
    def from_environment(cls, *, namespace: str) -> Self:
        """Do as :meth:`over_kubernetes`; the name that 0.1.0 gave it."""
        return cls.over_kubernetes(namespace=namespace)

    def submit(
        self,
        task: TaskLike,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Submitted:
        """Create a task and return what it is called.

        With ``idempotency_key`` a repeated call returns the task that the first has created; without, only what this call
        repeats by itself. Over the Kubernetes API ``name`` chooses the name and does the same.

        Raises :class:`~service_client.errors.TaskRefused` for a task that is not valid,
        :class:`~service_client.errors.TaskConflict` when the key or name is taken by another one.
        """
        return self._driver.run(self._submit(task, name, labels, idempotency_key))

    def submit_batch(self, tasks: Iterable[TaskLike], *, labels: Mapping[str, str] | None = None) -> list[BatchItem]:
        """Create tasks, however many, and return what has become of each: one that is refused does not touch the others."""
        return self._driver.run(self._submit_batch(tasks, labels))

    def get(self, task_id: str) -> Task:
        """Return a task. Raises :class:`~service_client.errors.TaskNotFound`."""
        return self._driver.run(self._transport.get(task_id))

    def list(
        self,
        *,
        status: TaskStatus | None = None,
        task_type: str | None = None,
        kb_id: str | None = None,
        priority: str | None = None,
        limit: int | None = None,
    ) -> Generator[Task, None, None]:
        """Yield tasks, page by page as they are asked for: over REST the youngest first and those of the archive too, over
        the Kubernetes API those that exist, by name.
        """
        return self._driver.iterate(self._list(TaskFilter(status, task_type, kb_id, priority), limit))

    def wait(self, task_id: str, *, timeout: timedelta, on_change: Callable[[TaskUpdate], None] | None = None) -> Task:
        """Wait until a task has ended, and return it; its status says how. ``on_change`` is given what happens meanwhile.

        Raises :class:`~service_client.errors.TaskTimeout` after ``timeout``,
        :class:`~service_client.errors.TaskNotFound` when there is no such task or it is deleted.
        """
        return self._driver.run(self._wait(task_id, timeout, on_change))

    def watch(
        self, task_id: str | None = None, *, kb_id: str | None = None, after: int | None = None
    ) -> Generator[TaskUpdate, None, None]:
        """Yield the present state of a task, of those of a knowledge base or of all, then what happens to them.

        That of one task ends with its end; the others never do: close them. ``after`` is the number of the last event that
        was seen, over REST: what has happened since comes in place of the present states.
        """
        return self._driver.iterate(self._transport.updates(Watched(task_id, kb_id, after)))

    def cancel(self, task_id: str) -> Task:
        """Ask for the end of a task. It ends as canceled, or as completed if it had been published before."""
        return self._driver.run(self._transport.cancel(task_id))

    def retry(self, task_id: str) -> Submitted:
        """Create a task that does the same as one that has ended."""
        return self._driver.run(self._transport.retry(task_id, key=new_key()))

    def result(self, task_id: str) -> Result:
        """Return what a task has done.

        Raises :class:`~service_client.errors.TaskNotFinished`, and :class:`~service_client.errors.TaskFailed` for one that
        has ended otherwise than completed.
        """
        return self._driver.run(self._result(task_id))

    def close(self) -> None:
        """Close the connections."""
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncTaskClient(_Programs):
    """Does as :class:`TaskClient`, in one event loop. Close it, or use it in an ``async with`` block."""

    def __init__(self, transport: Transport, *, http: httpx.AsyncClient | None = None) -> None:
        super().__init__(transport)
        self._driver = Waiting(http)

    @classmethod
    def over_rest(
        cls,
        url: str | None = None,
        *,
        namespace: str | None = None,
        token: Token = None,
        config: CallConfig | None = None,
        http: httpx.AsyncClient | None = None,
    ) -> Self:
        """Do as :meth:`TaskClient.over_rest`."""
        return cls(RestTransport(url, namespace=namespace, token=token, config=config), http=http)

    @classmethod
    def over_kubernetes(cls, api: "CustomObjectsApi | None" = None, *, namespace: str) -> Self:
        """Do as :meth:`TaskClient.over_kubernetes`; requests run in threads."""
        return cls(_over_kubernetes(api, namespace))

    async def submit(
        self,
        task: TaskLike,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Submitted:
        """Do as :meth:`TaskClient.submit`."""
        return await self._driver.run(self._submit(task, name, labels, idempotency_key))

    async def submit_batch(self, tasks: Iterable[TaskLike], *, labels: Mapping[str, str] | None = None) -> list[BatchItem]:
        """Do as :meth:`TaskClient.submit_batch`."""
        return await self._driver.run(self._submit_batch(tasks, labels))

    async def get(self, task_id: str) -> Task:
        """Do as :meth:`TaskClient.get`."""
        return await self._driver.run(self._transport.get(task_id))

    def list(
        self,
        *,
        status: TaskStatus | None = None,
        task_type: str | None = None,
        kb_id: str | None = None,
        priority: str | None = None,
        limit: int | None = None,
    ) -> AsyncGenerator[Task, None]:
        """Do as :meth:`TaskClient.list`."""
        return self._driver.iterate(self._list(TaskFilter(status, task_type, kb_id, priority), limit))

    async def wait(
        self,
        task_id: str,
        *,
        timeout: timedelta,  # noqa: ASYNC109 - it is not an error of the loop but TaskTimeout, as in TaskClient
        on_change: Callable[[TaskUpdate], None] | None = None,
    ) -> Task:
        """Do as :meth:`TaskClient.wait`."""
        return await self._driver.run(self._wait(task_id, timeout, on_change))

    def watch(
        self, task_id: str | None = None, *, kb_id: str | None = None, after: int | None = None
    ) -> AsyncGenerator[TaskUpdate, None]:
        """Do as :meth:`TaskClient.watch`; leave it early with ``contextlib.aclosing``."""
        return self._driver.iterate(self._transport.updates(Watched(task_id, kb_id, after)))

    async def cancel(self, task_id: str) -> Task:
        """Do as :meth:`TaskClient.cancel`."""
        return await self._driver.run(self._transport.cancel(task_id))

    async def retry(self, task_id: str) -> Submitted:
        """Do as :meth:`TaskClient.retry`."""
        return await self._driver.run(self._transport.retry(task_id, key=new_key()))

    async def result(self, task_id: str) -> Result:
        """Do as :meth:`TaskClient.result`."""
        return await self._driver.run(self._result(task_id))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._driver.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
