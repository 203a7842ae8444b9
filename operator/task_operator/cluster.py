"""The Kubernetes API as the operator uses it: the only file that speaks to it.

One aiohttp session with few connections and orjson: an order of magnitude less CPU a request than the generated clients,
and no 30 MB of models. Errors of transport and server become :class:`ClusterError` and its subclasses here; what is above
knows neither HTTP nor aiohttp.

::

    ClusterError
    ├── Conflict       409: somebody else has written since, or the name is taken
    ├── NotFound       404
    ├── Gone           410: a list or watch position that the server has forgotten
    ├── Forbidden      403: missing rights, quota, admission
    ├── Invalid        400, 413, 422: the object itself
    └── Unavailable    401, 429, 5xx, no answer: trying later is the cure. The write may or may not have happened.
"""

import asyncio
import base64
import os
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson
import yaml
from aiohttp.connector import Connection
from aiohttp.streams import StreamReader

from task_contract.names import GROUP, MANAGED_BY, MANAGED_BY_LABEL, PLURAL, TASK_UID_LABEL, VERSION

Manifest = dict[str, Any]
Sink = Callable[[str, Manifest], None]
"""Takes an event of a watch: ADDED, MODIFIED or DELETED, and the object."""

_SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TOKEN_AGE: Final = 60.0  # seconds; the kubelet renews a projected token long before it ends
_CONNECTIONS: Final = 32
_REQUEST_TIMEOUT: Final = 30.0  # seconds
_PAGE: Final = 50
FIELD_MANAGER: Final = "processing-tasks-operator"
"""Who the operator is in ``metadata.managedFields``. Its status writes are told apart there by ``subresource: status``."""
MANAGED_SELECTOR: Final = f"{MANAGED_BY_LABEL}={MANAGED_BY}"
"""Selects the Jobs that are ours, on the server."""


class ClusterError(Exception):
    """A request to the Kubernetes API did not succeed."""

    def __init__(self, message: str, *, status: int = 0, reason: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.reason = reason
        """Of the server's Status object, such as AlreadyExists."""
        self.retry_after = retry_after
        """Seconds the server asked to wait."""


class Conflict(ClusterError):
    """Somebody else has written since, or the name is taken."""


class NotFound(ClusterError):
    """No such object."""


class Gone(ClusterError):
    """A position in a list or watch that the server has forgotten."""


class Forbidden(ClusterError):
    """Refused: missing rights, a quota, admission."""


class Invalid(ClusterError):
    """Refused: the object itself is wrong."""


class Unavailable(ClusterError):
    """No usable answer: try later. A write may or may not have happened."""


class KubeconfigError(ValueError):
    """There is no usable way to the API server in the environment."""


# --------------------------------------------------------------------------------------------------------- credentials


@dataclass(frozen=True)
class Access:
    """Where the API server is and how to be believed by it."""

    server: str
    ssl: ssl.SSLContext | None
    token_file: Path | None = None
    token: str | None = None
    namespace: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Access":
        """Use the pod's service account, or the current context of KUBECONFIG. Raises :class:`KubeconfigError`."""
        if path := environment.get("KUBECONFIG"):
            return cls.from_kubeconfig(Path(path.split(os.pathsep)[0]))
        host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT", "443")
        if host and (_SERVICE_ACCOUNT / "token").exists():
            host = f"[{host}]" if ":" in host else host
            return cls(
                server=f"https://{host}:{port}",
                ssl=ssl.create_default_context(cafile=str(_SERVICE_ACCOUNT / "ca.crt")),
                token_file=_SERVICE_ACCOUNT / "token",
            )
        default = Path.home() / ".kube" / "config"
        if default.exists():
            return cls.from_kubeconfig(default)
        raise KubeconfigError("cannot find the API server: set KUBECONFIG, or run in a pod with a service account token")

    @classmethod
    def from_kubeconfig(cls, path: Path) -> "Access":
        """Read the current context of a kubeconfig: certificates or a token. Raises :class:`KubeconfigError`."""
        try:
            config = yaml.safe_load(path.read_text())
            context = _named(config["contexts"], config["current-context"])["context"]
            cluster = _named(config["clusters"], context["cluster"])["cluster"]
            user = _named(config["users"], context["user"])["user"]
            server = str(cluster["server"]).rstrip("/")
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise KubeconfigError(f"cannot read {path}: {error!r}; give a kubeconfig with a current context") from error
        if "exec" in user or "auth-provider" in user:
            raise KubeconfigError(f"cannot use {path}: credential plugins are not supported; give a token or certificate")
        folder = path.resolve().parent
        try:
            tls = _tls(cluster, user, folder=folder) if server.startswith("https:") else None
        except (OSError, ValueError, KeyError) as error:
            raise KubeconfigError(f"cannot use {path}: {error!r}; are its certificates complete?") from error
        return cls(
            server=server,
            ssl=tls,
            token_file=folder / user["tokenFile"] if "tokenFile" in user else None,
            token=user.get("token"),
            namespace=context.get("namespace"),
        )


def _named(entries: list[Manifest], name: str) -> Manifest:
    for entry in entries:
        if entry["name"] == name:
            return entry
    raise KeyError(name)


def _tls(cluster: Manifest, user: Manifest, *, folder: Path) -> ssl.SSLContext:
    if "certificate-authority-data" in cluster:
        context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
    elif "certificate-authority" in cluster:
        context = ssl.create_default_context(cafile=str(folder / cluster["certificate-authority"]))
    else:
        context = ssl.create_default_context()
    if cluster.get("insecure-skip-tls-verify"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if "client-certificate-data" in user:
        # The ssl module takes certificates from files only.
        with tempfile.NamedTemporaryFile(suffix=".pem") as file:
            for part in ("client-certificate-data", "client-key-data"):
                file.write(base64.b64decode(user[part]) + b"\n")
            file.flush()
            context.load_cert_chain(file.name)
    elif "client-certificate" in user:
        context.load_cert_chain(str(folder / user["client-certificate"]), str(folder / user["client-key"]))
    return context


# ------------------------------------------------------------------------------------------------------------- session


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


def open_session(access: Access, *, watches: Watches | None = None) -> aiohttp.ClientSession:
    """Return a session that is authenticated on every request, with a token that is read anew each minute.

    With ``watches``, answers to watch requests note when they bring a byte, and give events to their sinks. kopf does not
    show bookmarks to handlers and aiohttp does not trace streamed chunks, so the session's response class (a public
    parameter) is where to see them. Lists of what has a sink are empty but for their version, where the watch begins.
    """
    token: str | None = access.token
    read_at = -_TOKEN_AGE

    async def authorize(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        nonlocal token, read_at
        if access.token_file is not None and time.monotonic() - read_at >= _TOKEN_AGE:
            token = access.token_file.read_text().strip()
            read_at = time.monotonic()
        if token is not None:
            request.headers["Authorization"] = f"Bearer {token}"
        return await handler(request)

    class Response(aiohttp.ClientResponse):
        async def start(self, connection: Connection) -> aiohttp.ClientResponse:
            response = await super().start(connection)
            path = self.url.path
            if watches is None or self.status != 200:
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
            if watches is None or self.status != 200 or watches.sink(self.url.path) is None:
                return answer
            return {"metadata": {"resourceVersion": answer["metadata"]["resourceVersion"]}, "items": []}

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=_CONNECTIONS, ssl=access.ssl if access.ssl is not None else True, keepalive_timeout=60
        ),
        middlewares=(authorize,),
        response_class=Response,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": "processing-tasks-operator"},
        json_serialize=lambda value: orjson.dumps(value).decode(),
        timeout=aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT, sock_connect=10),
    )


# ---------------------------------------------------------------------------------------------------------------- API

_TASKS: Final = f"/apis/{GROUP}/{VERSION}"
_JOBS: Final = "/apis/batch/v1"
_CORE: Final = "/api/v1"
_EVENTS: Final = "/apis/events.k8s.io/v1"


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list, and the resourceVersion at which the whole list was true. Its items go when the next is asked for."""

    items: list[Manifest]
    resource_version: int


class Cluster:
    """Requests of the operator. Objects go in and out as manifests; an answer is the object as stored."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._session: aiohttp.ClientSession | None = None

    async def warm_up(self) -> None:
        """Open the session; no request is made."""
        self._session = open_session(self._access)

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def check_access(self, namespace: str | None) -> None:
        """Raise :class:`Forbidden` or :class:`NotFound` unless tasks and Jobs can be listed."""
        for group, plural in ((_TASKS, PLURAL), (_JOBS, "jobs")):
            await self._object("GET", _path(group, namespace, plural), params={"limit": "1"})

    async def task_version(self, namespace: str | None) -> int:
        """Return the resourceVersion at which tasks could be listed now: no lower than that of any task seen before."""
        page = await self._object("GET", _path(_TASKS, namespace, PLURAL), params={"limit": "1"})
        return int(page["metadata"]["resourceVersion"])

    def list_tasks(self, namespace: str | None) -> AsyncIterator[Page]:
        """Hand out all tasks of a namespace, or of the cluster, in pages: ten thousand at once would take 100 MB."""
        return self._pages(_TASKS, PLURAL, namespace)

    def list_jobs(self, namespace: str | None) -> AsyncIterator[Page]:
        """Hand out all Jobs that are ours, in pages."""
        return self._pages(_JOBS, "jobs", namespace, labelSelector=MANAGED_SELECTOR)

    async def list_pods(self, namespace: str, *, task_uid: str) -> list[Manifest]:
        """Return the pods of one task, of whatever attempt."""
        pages = self._pages(_CORE, "pods", namespace, labelSelector=f"{TASK_UID_LABEL}={task_uid}")
        return [pod async for page in pages for pod in page.items]

    async def pod_refusal(self, namespace: str, *, job_uid: str) -> str | None:
        """Return what the Job controller last said when it could not create a pod of this Job; None if it said nothing.

        It says so in Events only; they are searched on the server, and gone after an hour.
        """
        selector = f"regarding.uid={job_uid},reason=FailedCreate"
        found = [
            one async for page in self._pages(_EVENTS, "events", namespace, fieldSelector=selector) for one in page.items
        ]
        if not found:
            return None
        latest = max(found, key=lambda event: int(event["metadata"]["resourceVersion"]))
        note: str = latest.get("note") or ""
        return note.removeprefix("(combined from similar events): ").removeprefix("Error creating: ")

    async def get_task(self, namespace: str, name: str) -> Manifest:
        """Return a task as it is now."""
        return await self._object("GET", _path(_TASKS, namespace, PLURAL, name))

    async def get_job(self, namespace: str, name: str) -> Manifest:
        """Return a Job as it is now."""
        return await self._object("GET", _path(_JOBS, namespace, "jobs", name))

    async def create_job(self, job: Manifest) -> Manifest:
        """Create a Job; :class:`Conflict` if the name is taken."""
        path = _path(_JOBS, job["metadata"]["namespace"], "jobs")
        return await self._object("POST", path, body=job, params={"fieldManager": FIELD_MANAGER})

    async def create_event(self, event: Manifest) -> Manifest:
        """Create an Event (``events.k8s.io/v1``); :class:`Conflict` if it was told before."""
        path = _path(_EVENTS, event["metadata"]["namespace"], "events")
        return await self._object("POST", path, body=event, params={"fieldManager": FIELD_MANAGER})

    async def delete_job(self, namespace: str, name: str, *, uid: str) -> None:
        """Delete this very Job and, after it, its pods with their grace period. One that is gone already is fine."""
        await self._delete(_path(_JOBS, namespace, "jobs", name), uid=uid, propagationPolicy="Background")

    async def patch_status(
        self, namespace: str, name: str, *, uid: str, resource_version: int, patch: Mapping[str, Any]
    ) -> Manifest:
        """Merge ``patch`` into the status of this very task; :class:`Conflict` if it has changed since that version."""
        body = {"metadata": {"uid": uid, "resourceVersion": str(resource_version)}, "status": patch}
        return await self._object(
            "PATCH",
            f"{_path(_TASKS, namespace, PLURAL, name)}/status",
            body=body,
            params={"fieldManager": FIELD_MANAGER},
            content_type="application/merge-patch+json",
        )

    async def delete_task(self, namespace: str, name: str, *, uid: str, resource_version: int) -> None:
        """Delete this very task unless it has changed since that version; one that is gone already is fine."""
        path = _path(_TASKS, namespace, PLURAL, name)
        await self._delete(path, uid=uid, resource_version=resource_version, propagationPolicy="Background")

    async def _delete(self, path: str, *, uid: str, resource_version: int | None = None, **options: str) -> None:
        preconditions = {"uid": uid} | ({} if resource_version is None else {"resourceVersion": str(resource_version)})
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": preconditions, **options}
        try:
            await self._request("DELETE", path, body=body)
        except NotFound:
            return
        except Conflict:
            if resource_version is not None:
                raise
            return  # another object of that name: the one that was meant is gone

    async def _pages(self, group: str, plural: str, namespace: str | None, **params: str) -> AsyncIterator[Page]:
        path = _path(group, namespace, plural)
        position = ""
        while True:
            page = await self._object("GET", path, params=params | {"limit": str(_PAGE), "continue": position})
            metadata = page["metadata"]
            items = page.pop("items", None) or []
            yield Page(items=items, resource_version=int(metadata["resourceVersion"]))
            items.clear()  # whoever has the page holds it while the next one is on its way: a hundred Jobs are megabytes
            position = metadata.get("continue") or ""
            if not position:
                return

    async def _object(self, method: str, path: str, **options: Any) -> Manifest:
        data = await self._request(method, path, **options)
        try:
            loaded: Manifest = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise Unavailable(f"cannot {method} {path}: the answer is no JSON; is this an API server?") from error
        return loaded

    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> bytes:
        if self._session is None:
            raise RuntimeError("Cluster is used before warm_up()")
        try:
            async with self._session.request(
                method,
                self._access.server + path,
                params={key: value for key, value in (params or {}).items() if value},
                data=None if body is None else orjson.dumps(body),
                headers={"Content-Type": content_type, "Accept": "application/json"},
            ) as response:
                data = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(f"cannot {method} {path}: {error!r}; is the API server reachable?") from error
        if response.status < 300:
            return data
        raise _error(method, path, response.status, data, response.headers.get("Retry-After"))


def _path(group: str, namespace: str | None, plural: str, name: str | None = None) -> str:
    scope = "" if namespace is None else f"/namespaces/{namespace}"
    return f"{group}{scope}/{plural}" + ("" if name is None else f"/{name}")


_KINDS: Final[dict[int, type[ClusterError]]] = {
    400: Invalid,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    413: Invalid,
    422: Invalid,
}


def _error(method: str, path: str, status: int, data: bytes, retry_after: str | None) -> ClusterError:
    """Return the typed error of an answer; the server's own words are the better part of the message."""
    message, reason = data[:300].decode(errors="replace"), ""
    try:
        answer = orjson.loads(data)
        message, reason = answer.get("message") or message, answer.get("reason") or ""
    except (orjson.JSONDecodeError, AttributeError):
        pass  # a proxy's page and not the API server's Status: its text will do
    kind = _KINDS.get(status, Unavailable)
    wait = float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
    return kind(f"cannot {method} {path}: {status} {message}", status=status, reason=reason, retry_after=wait)
