"""The Kubernetes API as the operator uses it: its requests, and its watches."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Final

import aiohttp
import orjson
import structlog
from aiohttp.connector import Connection
from aiohttp.streams import StreamReader

from task_contract.names import (
    API_VERSION,
    KIND,
    MANAGED_BY,
    MANAGED_BY_LABEL,
    PLURAL,
    POOL_LABEL,
    POOL_PLURAL,
    SCHEDULE_LABEL,
    SCHEDULE_PLURAL,
    TASK_UID_LABEL,
)
from task_operator.jobs import JOB_NAME_LABEL
from task_platform.kubernetes import (
    CORE_API,
    EVENTS_API,
    JOBS_API,
    METADATA_ALONE,
    TASKS_API,
    Access,
    ClusterError,
    Conflict,
    Forbidden,
    Invalid,
    Kubernetes,
    Manifest,
    NotFound,
    Observe,
    Page,
    Unavailable,
    open_session,
    path_of,
)

_log = structlog.get_logger(__name__)

Sink = Callable[[str, Manifest], None]
"""Takes an event of a watch: ADDED, MODIFIED or DELETED, and the object."""

USER_AGENT: Final = "processing-tasks-operator"
FIELD_MANAGER: Final = "processing-tasks-operator"
"""Who the operator is in ``metadata.managedFields``. Its status writes are told apart there by ``subresource: status``."""
MANAGED_SELECTOR: Final = f"{MANAGED_BY_LABEL}={MANAGED_BY}"
"""Selects the Jobs that are ours, on the server."""


class NotLeading(Unavailable):
    """A write that was not sent, since another operator may lead by now."""


class Watches:
    """What can be seen of lists and watches from outside: what they bring, and when they last brought a byte."""

    def __init__(self, *, expected: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        """Expect so many watches, on collections of their own."""
        self._expected = expected
        self._clock = clock
        self._last: dict[str, float] = {}
        self.sinks: Mapping[str, Sink] = {}
        """Who takes the events of a kind of objects, by its plural name, straight from the stream."""
        self.open = asyncio.Event()
        """Set as soon as every watch has been opened once."""
        self.on_relist: Callable[[], None] = lambda: None
        """Called when a collection is listed anew, after its watch was open: what was deleted between may go unseen."""
        self.on_reopen: Callable[[], None] = lambda: None
        """Called when a watch is opened again."""

    def opened(self, path: str) -> None:
        """Note that the watch of the collection at ``path`` was opened."""
        if path in self._last:
            self.on_reopen()
        self.touch(path)

    def touch(self, path: str) -> None:
        """Note a byte on the watch of the collection at ``path``: an event, or the bookmark of each minute."""
        self._last[path] = self._clock()
        if len(self._last) >= self._expected:
            self.open.set()

    def listed(self, path: str) -> None:
        """Note that the collection at ``path`` is listed."""
        if path in self._last:
            self.on_relist()

    def sink(self, path: str) -> Sink | None:
        """Return who takes the events of the collection at ``path``; None: whoever opened the watch."""
        return self.sinks.get(path.rpartition("/")[2])

    def oldest(self) -> float | None:
        """Return the age in seconds of the watch that has been silent for longest; None while one was never open."""
        return self._clock() - min(self._last.values()) if self.open.is_set() else None


class _WatchStream:
    """A watch's stream that notes every byte, and gives events to their sink; all else is the stream's own.

    Who reads it finds a bookmark in place of an event that the sink has taken, to go on from when the watch breaks.
    """

    def __init__(self, stream: StreamReader, *, note: Callable[[], None], sink: Sink | None) -> None:
        self._stream = stream
        self._note = note
        self._sink = sink

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        rest = b""
        async for data in self._stream.iter_chunked(size):
            self._note()
            if self._sink is None:
                yield data
                continue
            *lines, rest = (rest + data).split(b"\n")
            if lines:
                yield b"".join(_taken(line, self._sink) + b"\n" for line in lines)
        if rest:
            yield rest


def _taken(line: bytes, sink: Sink) -> bytes:
    """Give an event to its sink; return what is to be read in its place: a bookmark, or what was no event as it is."""
    try:
        event = orjson.loads(line)
        if event["type"] not in {"ADDED", "MODIFIED", "DELETED"}:
            return line
        sink(event["type"], event["object"])
        metadata = {"resourceVersion": event["object"]["metadata"]["resourceVersion"]}
    except Exception:  # noqa: BLE001 - whoever reads the line trips over it too, and says so
        return line
    return orjson.dumps({"type": "BOOKMARK", "object": {"metadata": metadata}})


def open_watching(access: Access, watches: Watches) -> aiohttp.ClientSession:
    """Return a session for kopf: answers to its watch requests note when they bring a byte, and give events to their sinks.

    kopf does not show bookmarks to handlers and aiohttp does not trace streamed chunks, so the session's response class (a
    public parameter) is where to see them. Lists of what has a sink are empty but for their version, where the watch begins.
    """

    class Response(aiohttp.ClientResponse):
        async def start(self, connection: Connection) -> aiohttp.ClientResponse:
            response = await super().start(connection)
            path = self.url.path
            if self.status != 200:
                return response
            if self.url.query.get("watch") == "true":
                watches.opened(path)
                stream = _WatchStream(self.content, note=lambda: watches.touch(path), sink=watches.sink(path))
                self.content = stream  # type: ignore[assignment]  # a proxy
            else:
                watches.listed(path)  # of other answers the path is none that is watched
            return response

        async def json(self, **options: Any) -> Any:
            answer = await super().json(**(options | {"loads": orjson.loads}))
            if self.status != 200 or watches.sink(self.url.path) is None:
                return answer
            return {"metadata": {"resourceVersion": answer["metadata"]["resourceVersion"]}, "items": []}

    return open_session(access, user_agent=USER_AGENT, response_class=Response)


_TASKS_A_LIST: Final = 100
"""Tasks whose pods one list selects: 4 KB of uids in its URL."""


class _PodLists:
    """Questions about the pods of single tasks of a namespace, answered together: what is asked while a list is under way
    is answered by the next one, which begins after it was asked."""

    def __init__(self, pods_of: Callable[[Sequence[str]], Awaitable[Mapping[str, list[Manifest]]]]) -> None:
        self._pods_of = pods_of
        self._asked: dict[str, asyncio.Future[list[Manifest]]] = {}
        self._working: asyncio.Task[None] | None = None

    async def ask(self, task_uid: str) -> list[Manifest]:
        """Return the pods of a task. Raises what the list raised."""
        if (answer := self._asked.get(task_uid)) is None:
            answer = self._asked[task_uid] = asyncio.get_running_loop().create_future()
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await asyncio.shield(answer)  # who asked may be canceled, others may wait for the same

    async def _work(self) -> None:
        while self._asked:
            now = dict(islice(self._asked.items(), _TASKS_A_LIST))
            for uid in now:
                del self._asked[uid]
            try:
                found = await self._pods_of([*now])
            except BaseException as error:
                for answer in now.values():
                    answer.set_exception(error if isinstance(error, Exception) else asyncio.CancelledError())
                    answer.exception()  # whoever asked may be gone: nobody is to be told then
                if not isinstance(error, Exception):
                    raise
            else:
                for uid, answer in now.items():
                    answer.set_result(found[uid])


class Cluster(Kubernetes):
    """Requests of the operator; those that change something are sent only while it leads."""

    def __init__(
        self,
        access: Access,
        *,
        selector: str = "",
        observe: Observe = lambda *_: None,
        leads: Callable[[], bool] = lambda: True,
    ) -> None:
        """``selector``: of the labels of the tasks, pools and schedules that are listed; empty: of all."""
        super().__init__(access, user_agent=USER_AGENT, observe=observe)
        self._selector = selector
        self._leads = leads
        self._pod_lists: dict[str, _PodLists] = {}

    async def request(self, method: str, path: str, **options: Any) -> bytes:
        """Make a request, as :meth:`Kubernetes.request` does. Raises :class:`NotLeading` in place of a write."""
        if method != "GET" and not self._leads():
            raise NotLeading(f"cannot {method} {path}: this operator does not lead any more")
        return await super().request(method, path, **options)

    async def check_access(self, namespace: str | None) -> None:
        """Raise :class:`Forbidden` or :class:`NotFound` unless tasks and Jobs can be listed."""
        for group, plural, selector in ((TASKS_API, PLURAL, self._selector), (JOBS_API, "jobs", "")):
            await self.ask("GET", path_of(group, namespace, plural), params={"limit": "1", "labelSelector": selector})

    async def has(self, plural: str, namespaces: Sequence[str]) -> bool:
        """Whether a kind of ours can be listed: its CRD is there, and so is the right to. Waits for the API server.

        An operator may be upgraded before CRDs and rights are; it goes on without that kind then.
        """
        wait = 1.0
        while True:
            try:
                for namespace in namespaces or (None,):
                    await self.ask("GET", path_of(TASKS_API, namespace, plural), params={"limit": "1"})
            except (NotFound, Forbidden):
                return False
            except ClusterError as error:
                _log.warning("the API server does not answer yet", error=error.message, wait=wait)
                await asyncio.sleep(wait)
                wait = min(2 * wait, 15.0)
            else:
                return True

    async def task_version(self, namespace: str | None) -> int:
        """Return the resourceVersion at which tasks could be listed now: no lower than that of any task seen before."""
        page = await self.ask("GET", path_of(TASKS_API, namespace, PLURAL), params={"limit": "1"})
        return int(page["metadata"]["resourceVersion"])

    def list_tasks(self, namespace: str | None) -> AsyncIterator[Page]:
        """Hand out all tasks of a namespace, or of the cluster, in pages: ten thousand at once would take 100 MB."""
        return self.pages(TASKS_API, PLURAL, namespace, labelSelector=self._selector)

    async def list_uids(self, namespace: str | None) -> AsyncIterator[set[str]]:
        """Hand out the uids of all tasks that there are, whoever looks after them, in pages without their contents."""
        async for page in self.pages(TASKS_API, PLURAL, namespace, accept=METADATA_ALONE):
            yield {one["metadata"]["uid"] for one in page.items}

    def list_jobs(self, namespace: str | None) -> AsyncIterator[Page]:
        """Hand out all Jobs that are ours, in pages."""
        return self.pages(JOBS_API, "jobs", namespace, labelSelector=MANAGED_SELECTOR)

    def list_pools(self, namespace: str | None) -> AsyncIterator[Page]:
        """Hand out all worker pools of a namespace, or of the cluster, in pages."""
        return self.pages(TASKS_API, POOL_PLURAL, namespace, labelSelector=self._selector)

    def list_worker_jobs(self, namespace: str | None) -> AsyncIterator[Page]:
        """Hand out the Jobs of workers, in pages."""
        return self.pages(JOBS_API, "jobs", namespace, labelSelector=f"{MANAGED_SELECTOR},{POOL_LABEL}")

    async def list_worker_pods(self, namespace: str, *, job: str) -> list[Manifest]:
        """Return the pods of a worker's Job."""
        found = self.pages(CORE_API, "pods", namespace, labelSelector=f"{JOB_NAME_LABEL}={job}")
        return [pod async for page in found for pod in page.items]

    async def patch_pool_status(self, namespace: str, name: str, *, uid: str, status: Mapping[str, Any]) -> Manifest:
        """Merge ``status`` into that of this very pool, whatever its version: nobody else writes it.

        :class:`NotFound` or :class:`Conflict` if it is gone.
        """
        return await self.ask(
            "PATCH",
            f"{path_of(TASKS_API, namespace, POOL_PLURAL, name)}/status",
            body={"metadata": {"uid": uid}, "status": status},
            params={"fieldManager": FIELD_MANAGER},
            content_type="application/merge-patch+json",
        )

    def list_schedules(self, namespace: str | None) -> AsyncIterator[Page]:
        """Hand out all schedules of a namespace, or of the cluster, in pages."""
        return self.pages(TASKS_API, SCHEDULE_PLURAL, namespace, labelSelector=self._selector)

    def list_scheduled_tasks(self, namespace: str | None) -> AsyncIterator[Page]:
        """Hand out the tasks that schedules made, in pages."""
        selector = ",".join(filter(None, (SCHEDULE_LABEL, self._selector)))
        return self.pages(TASKS_API, PLURAL, namespace, labelSelector=selector)

    async def create_task(self, task: Manifest) -> Manifest:
        """Create a task; :class:`Conflict` if the name is taken."""
        path = path_of(TASKS_API, task["metadata"]["namespace"], PLURAL)
        return await self.ask("POST", path, body=task, params={"fieldManager": FIELD_MANAGER})

    async def cancel_task(self, namespace: str, name: str, *, uid: str) -> Manifest:
        """Tell this very task to end. :class:`NotFound` or :class:`Conflict` if it is gone."""
        return await self.ask(
            "PATCH",
            path_of(TASKS_API, namespace, PLURAL, name),
            body={"metadata": {"uid": uid}, "spec": {"cancel": True}},
            params={"fieldManager": FIELD_MANAGER},
            content_type="application/merge-patch+json",
        )

    async def patch_schedule_status(
        self, namespace: str, name: str, *, uid: str, resource_version: int, status: Mapping[str, Any]
    ) -> Manifest:
        """Merge ``status`` into that of this very schedule; :class:`Conflict` if it has changed since that version."""
        return await self.ask(
            "PATCH",
            f"{path_of(TASKS_API, namespace, SCHEDULE_PLURAL, name)}/status",
            body={"metadata": {"uid": uid, "resourceVersion": str(resource_version)}, "status": status},
            params={"fieldManager": FIELD_MANAGER},
            content_type="application/merge-patch+json",
        )

    async def list_pods(self, namespace: str, *, task_uid: str) -> list[Manifest]:
        """Return the pods of one task, of whatever attempt, as they are now or later.

        A list costs the API server a look at every pod of the namespace, however few it selects. So one list is under way in
        a namespace at a time, and the next one is for all tasks that were asked about meanwhile: where a thousand pods wait
        for room, a thousand lists would be a million looks, and what they wait for would wait for the API server.
        """
        lists = self._pod_lists.get(namespace)
        if lists is None:
            lists = self._pod_lists[namespace] = _PodLists(partial(self._pods_of, namespace))
        return await lists.ask(task_uid)

    async def _pods_of(self, namespace: str, task_uids: Sequence[str]) -> dict[str, list[Manifest]]:
        found: dict[str, list[Manifest]] = {uid: [] for uid in task_uids}
        selector = f"{TASK_UID_LABEL} in ({','.join(task_uids)})"
        async for page in self.pages(CORE_API, "pods", namespace, labelSelector=selector):
            for pod in page.items:
                found[pod["metadata"]["labels"][TASK_UID_LABEL]].append(pod)
        return found

    async def pod_refusal(self, namespace: str, *, job_uid: str) -> str | None:
        """Return what the Job controller last said when it could not create a pod of this Job; None if it said nothing.

        It says so in Events only; they are searched on the server, and gone after an hour.
        """
        selector = f"regarding.uid={job_uid},reason=FailedCreate"
        found = [
            one async for page in self.pages(EVENTS_API, "events", namespace, fieldSelector=selector) for one in page.items
        ]
        if not found:
            return None
        latest = max(found, key=lambda event: int(event["metadata"]["resourceVersion"]))
        note: str = latest.get("note") or ""
        return note.removeprefix("(combined from similar events): ").removeprefix("Error creating: ")

    async def get_task(self, namespace: str, name: str) -> Manifest:
        """Return a task as it is now."""
        return await self.ask("GET", path_of(TASKS_API, namespace, PLURAL, name))

    async def get_job(self, namespace: str, name: str) -> Manifest:
        """Return a Job as it is now."""
        return await self.ask("GET", path_of(JOBS_API, namespace, "jobs", name))

    async def create_job(self, job: Manifest) -> Manifest:
        """Create a Job; :class:`Conflict` if the name is taken."""
        path = path_of(JOBS_API, job["metadata"]["namespace"], "jobs")
        return await self.ask("POST", path, body=job, params={"fieldManager": FIELD_MANAGER})

    async def create_event(self, event: Manifest) -> Manifest:
        """Create an Event (``events.k8s.io/v1``); :class:`Conflict` if it was told before."""
        path = path_of(EVENTS_API, event["metadata"]["namespace"], "events")
        return await self.ask("POST", path, body=event, params={"fieldManager": FIELD_MANAGER})

    async def delete_job(self, namespace: str, name: str, *, uid: str) -> None:
        """Delete this very Job and, after it, its pods with their grace period. One that is gone already is fine."""
        await self.delete(path_of(JOBS_API, namespace, "jobs", name), uid=uid, propagationPolicy="Background")

    async def put_status(
        self, namespace: str, name: str, *, uid: str, resource_version: int, status: Mapping[str, Any]
    ) -> Manifest:
        """Replace the status of this very task; :class:`Conflict` if it has changed since that version.

        For a patch the API server would write the object as JSON, merge, and read it again besides. Of what is sent all but
        the status is passed over.
        """
        body = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "status": status,
            "metadata": {"name": name, "namespace": namespace, "uid": uid, "resourceVersion": str(resource_version)},
        }
        path = f"{path_of(TASKS_API, namespace, PLURAL, name)}/status"
        return await self.ask("PUT", path, body=body, params={"fieldManager": FIELD_MANAGER})

    async def patch_status(
        self, namespace: str, name: str, *, uid: str, resource_version: int, patch: Mapping[str, Any]
    ) -> Manifest:
        """Merge ``patch`` into the status of this very task; :class:`Conflict` if it has changed since that version."""
        body = {"metadata": {"uid": uid, "resourceVersion": str(resource_version)}, "status": patch}
        return await self.ask(
            "PATCH",
            f"{path_of(TASKS_API, namespace, PLURAL, name)}/status",
            body=body,
            params={"fieldManager": FIELD_MANAGER},
            content_type="application/merge-patch+json",
        )

    async def patch_callback(self, namespace: str, name: str, *, uid: str, callback: Mapping[str, Any]) -> None:
        """Merge ``callback`` into ``status.callback`` of this very task, unless that tells of a later attempt already.

        :class:`NotFound` if the task is gone; :class:`Conflict` if it has changed meanwhile.
        """
        task = await self.get_task(namespace, name)
        metadata = task["metadata"]
        if metadata["uid"] != uid:
            raise NotFound(f"cannot find {namespace}/{name} of uid {uid}: another task has its name", status=404)
        told = (task.get("status") or {}).get("callback") or {}
        # Times of PostgreSQL in one form, to the second at most: they compare as texts, and attempts are seconds apart.
        if (told.get("lastAttemptAt") or "") > (callback.get("lastAttemptAt") or ""):
            return
        body = {"metadata": {"uid": uid, "resourceVersion": metadata["resourceVersion"]}, "status": {"callback": callback}}
        await self.ask(
            "PATCH",
            f"{path_of(TASKS_API, namespace, PLURAL, name)}/status",
            body=body,
            params={"fieldManager": FIELD_MANAGER},
            content_type="application/merge-patch+json",
        )

    async def get_secret(self, namespace: str, name: str) -> dict[str, bytes]:
        """Return the values of a Secret. Those of ``callbacks.secrets`` alone may be read."""
        secret = await self.ask("GET", path_of(CORE_API, namespace, "secrets", name))
        return {key: base64.b64decode(value) for key, value in (secret.get("data") or {}).items()}

    async def replace_status(
        self, namespace: str, name: str, *, uid: str, generation: int, before: Mapping[str, Any], after: Mapping[str, Any]
    ) -> Manifest:
        """Replace the status of this very task; :class:`Conflict` if its spec or its status is another one by now.

        For a task whose labels or annotations somebody writes all the time: its resourceVersion is never the known one.
        The operator alone writes the status, and everything else that it decides upon is in the spec.
        """
        body = [
            {"op": "test", "path": "/metadata/uid", "value": uid},
            {"op": "test", "path": "/metadata/generation", "value": generation},
            {"op": "test", "path": "/status", "value": before},
            {"op": "replace", "path": "/status", "value": after},
        ]
        try:
            return await self.ask(
                "PATCH",
                f"{path_of(TASKS_API, namespace, PLURAL, name)}/status",
                body=body,
                params={"fieldManager": FIELD_MANAGER},
                content_type="application/json-patch+json",
            )
        except Invalid as error:
            if "is invalid" in error.message:  # by the schema; of a test that failed it names nothing
                raise
            raise Conflict(error.message, status=error.status) from error

    async def delete_task(self, namespace: str, name: str, *, uid: str, resource_version: int) -> None:
        """Delete this very task unless it has changed since that version; one that is gone already is fine."""
        path = path_of(TASKS_API, namespace, PLURAL, name)
        await self.delete(path, uid=uid, resource_version=resource_version, propagationPolicy="Background")
