"""Requests to the Kubernetes API: how to reach it, a session that it believes, and its refusals as typed errors.

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

import base64
import contextlib
import os
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson
import yaml

from task_contract.names import GROUP, VERSION

Manifest = dict[str, Any]
Observe = Callable[[str, str, str, float], None]
"""Is told of each request: verb and resource as in RBAC (``patch``, ``processingtasks/status``), the status of the answer or
``none``, and seconds."""

_SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TOKEN_AGE: Final = 60.0  # seconds; the kubelet renews a projected token long before it ends
_CONNECTIONS: Final = 32
_LIST_CONNECTIONS: Final = 4
"""For pages of lists: a connection keeps room for the most that it has read at once (uvloop: up to 256 KiB), and 32 of them
that each read a page now and then keep 8 MB."""
_REQUEST_TIMEOUT: Final = 30.0  # seconds
_PAGE: Final = 50

TASKS_API: Final = f"/apis/{GROUP}/{VERSION}"
JOBS_API: Final = "/apis/batch/v1"
CORE_API: Final = "/api/v1"
EVENTS_API: Final = "/apis/events.k8s.io/v1"
LEASES_API: Final = "/apis/coordination.k8s.io/v1"
_JSON: Final = "application/json"
METADATA_ALONE: Final = f"{_JSON};as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
"""A list without specs and statuses.

https://kubernetes.io/docs/reference/using-api/api-concepts/#alternate-representations-of-resources
"""


class ClusterError(Exception):
    """A request to the Kubernetes API did not succeed."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        reason: str = "",
        retry_after: float | None = None,
        answer: str = "",
        causes: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.reason = reason
        """Of the server's Status object, such as AlreadyExists."""
        self.retry_after = retry_after
        """Seconds the server asked to wait."""
        self.answer = answer
        """The server's own words."""
        self.causes = tuple(causes)
        """Path and message of each bad field of the object."""


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

    def own_namespace(self) -> str:
        """Return the namespace of the pod, or of the kubeconfig's context; ``default`` where neither names one."""
        if self.namespace is not None:
            return self.namespace
        try:
            return (_SERVICE_ACCOUNT / "namespace").read_text().strip() or "default"
        except OSError:
            return "default"

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


def open_session(
    access: Access,
    *,
    user_agent: str,
    response_class: type[aiohttp.ClientResponse] = aiohttp.ClientResponse,
    connections: int = _CONNECTIONS,
) -> aiohttp.ClientSession:
    """Return a session that is authenticated on every request, with a token that is read anew each minute."""
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

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=connections, ssl=access.ssl if access.ssl is not None else True, keepalive_timeout=60
        ),
        middlewares=(authorize,),
        response_class=response_class,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": user_agent},
        json_serialize=lambda value: orjson.dumps(value).decode(),
        timeout=aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT, sock_connect=10),
    )


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list, and the resourceVersion at which the whole list was true. Its items go when the next is asked for."""

    items: list[Manifest]
    resource_version: int


class Kubernetes:
    """Requests to the API server. Objects go in and out as manifests; an answer is the object as stored."""

    def __init__(self, access: Access, *, user_agent: str, observe: Observe = lambda *_: None) -> None:
        self._access = access
        self._user_agent = user_agent
        self._observe = observe
        self._session: aiohttp.ClientSession | None = None
        self._lists: aiohttp.ClientSession | None = None

    async def warm_up(self) -> None:
        """Open the sessions; no request is made."""
        self._session = open_session(self._access, user_agent=self._user_agent)
        self._lists = open_session(self._access, user_agent=self._user_agent, connections=_LIST_CONNECTIONS)

    async def aclose(self) -> None:
        """Close all connections."""
        for session in (self._session, self._lists):
            if session is not None:
                await session.close()
        self._session = self._lists = None

    async def delete(self, path: str, *, uid: str, resource_version: int | None = None, **options: str) -> None:
        """Delete this very object (unless it has changed since that version). One that is gone already is fine.

        Raises :class:`Conflict` for one that has changed.
        """
        preconditions = {"uid": uid} | ({} if resource_version is None else {"resourceVersion": str(resource_version)})
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": preconditions, **options}
        try:
            await self.request("DELETE", path, body=body)
        except NotFound:
            return
        except Conflict:
            if resource_version is not None:
                raise
            return  # another object of that name: the one that was meant is gone

    async def pages(
        self, group: str, plural: str, namespace: str | None, *, accept: str = _JSON, **params: str
    ) -> AsyncIterator[Page]:
        """Hand out a list in pages; without namespace, of the whole cluster. ``accept``: as what, see METADATA_ALONE."""
        path = path_of(group, namespace, plural)
        position = ""
        while True:
            wanted = params | {"limit": str(_PAGE), "continue": position}
            page = await self.ask("GET", path, params=wanted, accept=accept, listing=True)
            metadata = page["metadata"]
            items = page.pop("items", None) or []
            yield Page(items=items, resource_version=int(metadata["resourceVersion"]))
            items.clear()  # whoever has the page holds it while the next one is on its way: a hundred Jobs are megabytes
            position = metadata.get("continue") or ""
            if not position:
                return

    async def ask(self, method: str, path: str, **options: Any) -> Manifest:
        """Make a request and return the object that is the answer; options are those of :meth:`request`."""
        data = await self.request(method, path, **options)
        try:
            loaded: Manifest = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise Unavailable(f"cannot {method} {path}: the answer is no JSON; is this an API server?") from error
        return loaded

    @contextlib.asynccontextmanager
    async def stream(self, path: str, *, params: Mapping[str, str] | None = None) -> AsyncIterator[AsyncIterator[bytes]]:
        """Yield the body of a long answer, such as a log that is followed, as it comes. Raises a :class:`ClusterError`."""
        if self._session is None:
            raise RuntimeError("the client is used before warm_up()")
        try:
            response = await self._session.get(
                self._access.server + path,
                params=dict(params or {}),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unreachable("GET", path, error) from error
        async with response:
            if response.status >= 300:
                raise _error("GET", path, response.status, await response.read(), response.headers.get("Retry-After"))
            yield _chunks(response, path)

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        params: Mapping[str, str] | None = None,
        content_type: str = _JSON,
        accept: str = _JSON,
        listing: bool = False,
    ) -> bytes:
        """Make a request and return the body of the answer. Raises a :class:`ClusterError`.

        ``listing``: it is large, and goes over one of the few connections for such.
        """
        session = self._lists if listing else self._session
        if session is None:
            raise RuntimeError("the client is used before warm_up()")
        began, code = time.perf_counter(), "none"
        try:
            async with session.request(
                method,
                self._access.server + path,
                params={key: value for key, value in (params or {}).items() if value},
                data=None if body is None else orjson.dumps(body),
                headers={"Content-Type": content_type, "Accept": accept},
            ) as response:
                code = str(response.status)
                data = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unreachable(method, path, error) from error
        finally:
            self._observe(*verb_of(method, path), code, time.perf_counter() - began)
        if response.status < 300:
            return data
        raise _error(method, path, response.status, data, response.headers.get("Retry-After"))


async def _chunks(response: aiohttp.ClientResponse, path: str) -> AsyncIterator[bytes]:
    try:
        async for chunk in response.content.iter_any():
            yield chunk
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise _unreachable("GET", path, error) from error


def _unreachable(method: str, path: str, error: Exception) -> Unavailable:
    return Unavailable(f"cannot {method} {path}: {error!r}; is the API server reachable?")


def path_of(group: str, namespace: str | None, plural: str, name: str | None = None) -> str:
    """Return the path of a collection, or of an object in it. ``group`` is one of the constants ``…_API``."""
    scope = "" if namespace is None else f"/namespaces/{namespace}"
    return f"{group}{scope}/{plural}" + ("" if name is None else f"/{name}")


def verb_of(method: str, path: str) -> tuple[str, str]:
    """Return verb and resource of a request, as RBAC names them; never the name of an object.

    >>> verb_of("PATCH", "/apis/tasks.zzdsj.io/v1/namespaces/team-a/processingtasks/handbook/status")
    ('patch', 'processingtasks/status')
    >>> verb_of("GET", "/api/v1/namespaces/team-a/pods"), verb_of("GET", "/api/v1/namespaces/team-a")
    (('list', 'pods'), ('get', 'namespaces'))
    """
    parts = path.strip("/").split("/")
    inside = parts[2:] if parts[0] == "api" else parts[3:]
    if inside[:1] == ["namespaces"] and len(inside) > 2:
        inside = inside[2:]
    resource, named = "/".join(inside[:1] + inside[2:3]), len(inside) > 1
    verb = {"GET": "get" if named else "list", "POST": "create", "PUT": "update"}.get(method, method.lower())
    return verb, resource


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
    causes: list[tuple[str, str]] = []
    try:
        answer = orjson.loads(data)
        message, reason = answer.get("message") or message, answer.get("reason") or ""
        found = (answer.get("details") or {}).get("causes") or []
        causes = [(str(one.get("field") or ""), str(one.get("message") or "")) for one in found]
    except (orjson.JSONDecodeError, AttributeError):
        pass  # a proxy's page and not the API server's Status: its text will do
    kind = _KINDS.get(status, Unavailable)
    wait = float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
    return kind(
        f"cannot {method} {path}: {status} {message}",
        status=status,
        reason=reason,
        retry_after=wait,
        answer=message,
        causes=causes,
    )
