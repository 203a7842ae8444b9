"""Documents behind a URL: fetched into a private file, which then goes the way of a mounted one.

Whatever a server does, it ends within bounds of size and time and as one of these:

- DocumentNotFound, DocumentRefused: the same URL fails again;
- SourceUnavailable: the server is down, overloaded or slow, or the settings for it are wrong, which is not the task's fault.

Servers of ``https://`` URLs are chosen by who makes the task: :mod:`job_runner.guard` decides about each request, redirects
included. The object store is chosen by the settings, which also name the buckets that a namespace may read: one account may
well see the buckets of others. obstore signs for it; every request is made here, in one way.

Nothing that a server says gets into a message, and neither does a signature.
"""

import asyncio
import contextlib
import errno
import os
import re
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Protocol
from urllib.parse import quote

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import Connection
from yarl import URL

from job_runner.guard import Guard, Resolve, Target, resolve
from job_runner.settings import Settings, revealed
from job_runner.watchdog import asking, beat
from task_contract.errors import DocumentNotFound, DocumentRefused, SourceUnavailable, StoreUnavailable, TaskError
from task_contract.location import bucket_and_key
from task_contract.networks import Address, AllowList

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.tracing import Trace
    from obstore.store import ClientConfig, RetryConfig, S3Config, S3Credential, S3Store

_REDIRECTS: Final = 3
"""A download page, a mirror, a signed URL: what public servers need."""
_CONNECT_SECONDS: Final = 10
_SILENT_SECONDS: Final = 30
"""Longest time without a byte."""
_CHUNK: Final = 1 << 20
_SAYS: Final = 4096
"""Bytes of an answer of the object store in which the code of its error is looked for."""
_SIGNED_FOR: Final = timedelta(minutes=5)
"""The signature is checked when the request arrives; the time is for clocks that differ."""

# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_ACCOUNT: Final = frozenset(
    {
        "AccountProblem",
        "AuthorizationHeaderMalformed",
        "AuthorizationQueryParametersError",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidRegion",
        "InvalidSecurity",
        "InvalidToken",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
"""Errors of the settings, not of the task."""


class Origin(Protocol):
    """Where a document comes from."""

    @property
    def guard(self) -> Guard | None:
        """What checks where redirects lead; None: they are not followed."""

    async def target(self) -> Target:
        """Return the request for the document."""

    def failure(self, status: int, *, code: str, retry_after: str) -> TaskError:
        """Return what an answer other than 200 means."""

    def untrusted(self, why: str) -> TaskError:
        """Return what a server without a valid certificate means."""


async def download(location: str, *, settings: Settings, resolve: Resolve = resolve) -> int:
    """Fetch a document; return a descriptor of it, open for reading, which the caller closes.

    The file has no name: it is gone when it is closed, however the process ends. Raises DocumentNotFound, DocumentRefused,
    SourceUnavailable, and StoreUnavailable where there is no room for it.
    """
    origin: Origin
    origin = (_ObjectStore if location.startswith("s3://") else _Web)(location, settings=settings, resolve=resolve)
    folder = tempfile.gettempdir()
    try:
        async with asyncio.timeout(settings.source_seconds):
            with asking(), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                await _fetch(location, origin, into=file, settings=settings)
                file.seek(0)
                return os.dup(file.fileno())
    except TimeoutError:
        raise SourceUnavailable(
            f"cannot fetch {location} within {settings.source_seconds:g} s; look at the server or raise TASKS_SOURCE_SECONDS"
        ) from None
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise StoreUnavailable(f"cannot keep {location}: no room in {folder}; make room on the node") from error
        raise StoreUnavailable(f"cannot keep {location} in {folder}: {error.strerror}; look at the node") from error


async def list_objects(prefix: str, *, settings: Settings, most: int) -> list[str]:
    """Return the ``s3://`` URLs of the objects below a prefix, in the order of their keys; one more than ``most`` at most.

    Raises DocumentNotFound for no such bucket, DocumentRefused, SourceUnavailable.
    """
    import obstore

    origin = _ObjectStore(prefix, settings=settings, resolve=resolve)
    bucket, key = origin.checked()
    found: list[str] = []
    try:
        async with asyncio.timeout(settings.source_seconds):
            with asking(), _trusted(settings.source_ca):
                store = origin.store(bucket)
                async for page in obstore.list(store, prefix=key or None, chunk_size=1000):
                    beat()
                    # A marker of a folder is an object whose key ends with a slash; its path comes without it.
                    found += [f"s3://{bucket}/{one['path']}" for one in page if one["size"]]
                    if len(found) > most:
                        break
    except TimeoutError:
        raise SourceUnavailable(
            f"cannot list {prefix} within {settings.source_seconds:g} s; look at the server or raise TASKS_SOURCE_SECONDS"
        ) from None
    except obstore.exceptions.BaseError as error:
        raise origin.not_listed(str(error)) from None  # what the server says may hold a signature
    return sorted(found)


@contextlib.contextmanager
def _trusted(certificates: str | None) -> Iterator[None]:
    """Have obstore trust these certificates besides those of the system, for as long as this lasts.

    It has no option for that, and takes SSL_CERT_FILE for the system's.
    """
    if certificates is None:
        yield
        return
    system = ssl.get_default_verify_paths().cafile
    before = os.environ.get("SSL_CERT_FILE")
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write((Path(system).read_text() if system else "") + "\n" + certificates)
        file.flush()
        os.environ["SSL_CERT_FILE"] = file.name
        try:
            yield
        finally:
            if before is None:
                del os.environ["SSL_CERT_FILE"]
            else:
                os.environ["SSL_CERT_FILE"] = before


async def _fetch(location: str, origin: Origin, *, into: "IO[bytes]", settings: Settings) -> None:
    target = await origin.target()
    context = ssl.create_default_context()
    if settings.source_ca is not None:
        context.load_verify_locations(cadata=settings.source_ca)
    for _ in range(_REDIRECTS + 1):
        following = await _request(
            location, target, origin, into=into, context=context, max_bytes=settings.max_document_bytes
        )
        if following is None or origin.guard is None:
            return
        if target.url.scheme == "https" and following.scheme != "https":
            raise DocumentRefused(
                f"cannot fetch {location}: it redirects from https to {following.scheme}; give its final URL"
            )
        target = await origin.guard.check(following)
    raise DocumentRefused(f"cannot fetch {location}: more than {_REDIRECTS} redirects; give its final URL")


async def _request(
    location: str, target: Target, origin: Origin, *, into: "IO[bytes]", context: ssl.SSLContext, max_bytes: int
) -> URL | None:
    """Make one request. Return where it is redirected, or None when the document is in the file."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENT_SECONDS)
    connector = _Connector(target, context)
    session = aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        trust_env=False,  # no proxy: it would resolve the name again, out of the guard's sight
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        read_bufsize=_CHUNK,
        headers={"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "processing-tasks"},
    )
    # No chain of exceptions below: those of aiohttp hold the URL of the request, which may be signed.
    try:
        async with _answer(session, connector, target.url) as response:
            if response.status == 200:
                await _keep(location, response, into=into, max_bytes=max_bytes)
                return None
            if origin.guard is not None and response.status in {301, 302, 303, 307, 308}:
                try:
                    return response.url.join(URL(response.headers.get("Location", ""))).with_fragment(None)
                except ValueError:
                    raise DocumentRefused(f"cannot fetch {location}: it redirects to no URL; give its final URL") from None
            said = await response.content.read(_SAYS)
            code = re.search(rb"<Code>([A-Za-z]{1,64})</Code>", said)
            raise origin.failure(
                response.status,
                code="" if code is None else code[1].decode(),
                retry_after=response.headers.get("Retry-After", ""),
            )
    except aiohttp.ClientConnectorCertificateError as error:
        why = getattr(error.certificate_error, "verify_message", "") or "it does not fit the host"
        raise origin.untrusted(why) from None
    except aiohttp.ClientSSLError:
        raise origin.untrusted("it does not speak TLS as expected") from None
    except TimeoutError:
        raise SourceUnavailable(f"cannot fetch {location}: the server is silent; look at the server") from None
    except aiohttp.ClientPayloadError:
        raise SourceUnavailable(f"cannot fetch {location}: the answer was cut off; look at the server") from None
    except aiohttp.ClientResponseError:
        raise SourceUnavailable(f"cannot fetch {location}: the answer is no HTTP; look at the server") from None
    except aiohttp.ClientOSError as error:
        why = error.strerror if error.strerror and not isinstance(error, aiohttp.ClientConnectorError) else ""
        reason = why or (os.strerror(error.errno) if error.errno and error.errno > 0 else "no connection")
        raise SourceUnavailable(f"cannot fetch {location}: {reason}; look at the server and at network policies") from None
    except aiohttp.ClientError as error:
        raise SourceUnavailable(f"cannot fetch {location}: {type(error).__name__}; look at the server") from None


class _Connector(aiohttp.TCPConnector):
    """Knows the connections that it made until they are gone. A session that is closed waits for those in its pool alone,
    and an answer that ends its connection has taken that one out."""

    def __init__(self, target: Target, context: ssl.SSLContext) -> None:
        super().__init__(resolver=_Pinned(target), ssl=context, use_dns_cache=False)
        self._made: list[tuple[ResponseHandler, asyncio.Transport]] = []

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: "list[Trace]",
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109  # the name is aiohttp's, and it is no time to wait here
    ) -> Connection:
        """Return a connection, and remember it."""
        connection = await super().connect(req, traces, timeout)
        if (protocol := connection.protocol) is not None and protocol.transport is not None:
            self._made.append((protocol, protocol.transport))
        return connection

    async def end(self) -> None:
        """End all connections, without a farewell of TLS: what was to be read has been, and nothing else is wanted."""
        gone = [closed for protocol, _ in self._made if (closed := protocol.closed) is not None]
        for _, transport in self._made:
            transport.abort()
        await asyncio.gather(*gone, return_exceptions=True)


@contextlib.asynccontextmanager
async def _answer(session: aiohttp.ClientSession, connector: _Connector, url: URL) -> AsyncIterator[aiohttp.ClientResponse]:
    """Make the one request of a session. Its connection is gone when this ends, not only told to close."""
    try:
        async with session.get(url, allow_redirects=False) as response:
            yield response
    finally:
        await connector.end()
        await session.close()


async def _keep(location: str, response: aiohttp.ClientResponse, *, into: "IO[bytes]", max_bytes: int) -> None:
    """Write the body into the file, never more than the limit and never more than a chunk in memory."""
    too_large = DocumentRefused(
        f"cannot fetch {location}: it has more than {max_bytes} bytes; split it, or raise TASKS_MAX_DOCUMENT_BYTES"
    )
    if (response.content_length or 0) > max_bytes:
        raise too_large
    size = 0
    async for chunk in response.content.iter_chunked(_CHUNK):
        size += len(chunk)
        beat()
        if size > max_bytes:
            raise too_large
        await asyncio.to_thread(_write, into, chunk)


def _write(file: "IO[bytes]", data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


class _Pinned(AbstractResolver):
    """Gives a connection the addresses that were checked, and no others."""

    def __init__(self, target: Target) -> None:
        self._target = target

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET6 if address.version == 6 else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._target.addresses
        ]

    async def close(self) -> None:
        pass


class _Web:
    """A server that the task names."""

    def __init__(self, location: str, *, settings: Settings, resolve: Resolve) -> None:
        self._location = location
        self.guard = Guard(
            allowed=AllowList.parse(settings.source_allow),
            ports=frozenset(settings.source_ports),
            allow_http=settings.source_allow_http,
            api_servers=_api_servers(),
            resolve=resolve,
        )

    async def target(self) -> Target:
        return await self.guard.check(URL(self._location))

    def failure(self, status: int, *, code: str, retry_after: str) -> TaskError:
        del code
        if status in {404, 410}:
            return DocumentNotFound(f"cannot find {self._location}: the server answered {status}; correct payload.filePath")
        if status in {401, 403, 407}:
            return DocumentRefused(
                f"cannot fetch {self._location}: the server answered {status}, it wants credentials; "
                "put the document on the document volume or into a bucket"
            )
        return _busy(self._location, status, retry_after) or DocumentRefused(
            f"cannot fetch {self._location}: the server answered {status}; give a URL that answers with the document"
        )

    def untrusted(self, why: str) -> TaskError:
        return DocumentRefused(
            f"cannot trust the server of {self._location}: {why}; if its authority is your own, put it into TASKS_SOURCE_CA"
        )


class _ObjectStore:
    """The object store of the settings."""

    guard = None  # redirects lead to another region, for which the signature is not valid

    def __init__(self, location: str, *, settings: Settings, resolve: Resolve) -> None:
        self._location = location
        self._settings = settings
        self._resolve = resolve

    def checked(self) -> tuple[str, str]:
        """Return bucket and key, where the settings allow them. Raises DocumentRefused."""
        bucket, key = bucket_and_key(self._location)
        if not any(f"{bucket}/{key}".startswith(f"{entry.rstrip('/')}/") for entry in self._settings.s3_buckets):
            raise DocumentRefused(
                f"cannot read {self._location}: this namespace may not read that bucket or prefix; "
                "name it in TASKS_S3_BUCKETS of the namespace's Secret"
            )
        return bucket, key

    async def target(self) -> Target:
        bucket, key = self.checked()
        url = await self._url(bucket, key)
        assert url.host is not None  # noqa: S101 - for the type checker: the settings want a host
        try:
            addresses = tuple(dict.fromkeys(ip_address(found.partition("%")[0]) for found in await self._resolve(url.host)))
        except (socket.gaierror, UnicodeError) as error:
            raise SourceUnavailable(
                f"cannot resolve {url.host}, the object store; correct TASKS_S3_ENDPOINT or look at the DNS"
            ) from error
        return Target(url, addresses)

    async def _url(self, bucket: str, key: str) -> URL:
        """Return the URL of an object, signed unless requests are to be anonymous."""
        if self._settings.s3_anonymous:
            virtual = self._settings.s3_addressing == "virtual"
            return URL(f"{self._base(bucket)}{'' if virtual else f'/{bucket}'}/{quote(key, safe='/~')}", encoded=True)
        import obstore

        return URL(await obstore.sign_async(self.store(bucket), "GET", key, _SIGNED_FOR), encoded=True)

    def _base(self, bucket: str) -> str:
        settings = self._settings
        endpoint = URL(settings.s3_endpoint or f"https://s3.{settings.s3_region}.amazonaws.com")
        if settings.s3_addressing == "virtual":
            endpoint = endpoint.with_host(f"{bucket}.{endpoint.host}")
        return str(endpoint).rstrip("/")

    def store(self, bucket: str) -> "S3Store":
        """Return obstore's view of a bucket. Raises SourceUnavailable without an account."""
        from obstore.store import S3Store

        settings = self._settings
        # All is said explicitly: what is left out would be taken from AWS_* variables, or asked of the metadata service.
        said: S3Config = {
            "endpoint": self._base(bucket),
            "region": settings.s3_region,
            "virtual_hosted_style_request": settings.s3_addressing == "virtual",
            "skip_signature": settings.s3_anonymous,
        }
        patience = timedelta(seconds=_SILENT_SECONDS)
        options: ClientConfig = {
            "allow_http": True,
            "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
            "timeout": patience,
        }
        retries: RetryConfig = {"max_retries": 2, "retry_timeout": patience}
        if settings.s3_anonymous:
            return S3Store(bucket, config=said, client_options=options, retry_config=retries)
        account, secret = revealed(settings.s3_access_key_id), revealed(settings.s3_secret_access_key)
        if account is None or secret is None:
            raise SourceUnavailable(
                "cannot read from the object store: TASKS_S3_ACCESS_KEY_ID and TASKS_S3_SECRET_ACCESS_KEY are not set; "
                "set them in the Secret of the stores, or TASKS_S3_ANONYMOUS=true for public buckets"
            )

        def credential() -> "S3Credential":
            return {
                "access_key_id": account,
                "secret_access_key": secret,
                "token": revealed(settings.s3_session_token),
                "expires_at": None,
            }

        return S3Store(bucket, config=said, credential_provider=credential, client_options=options, retry_config=retries)

    def not_listed(self, said: str) -> TaskError:
        """Return what an error of obstore means, by the code that the object store has given."""
        status = re.search(r"\b([345][0-9]{2}) [A-Z][A-Za-z ]+", said)
        code = re.search(r"<Code>([A-Za-z]{1,64})</Code>", said)
        if status is None:
            return SourceUnavailable(
                f"cannot list {self._location}: the object store does not answer; look at it and at TASKS_S3_ENDPOINT"
            )
        return self.failure(int(status[1]), code="" if code is None else code[1], retry_after="")

    def failure(self, status: int, *, code: str, retry_after: str) -> TaskError:
        if status == 404:
            bucket = " bucket" if code == "NoSuchBucket" else " object"
            return DocumentNotFound(
                f"cannot find {self._location}: no such{bucket}; put it there or correct payload.filePath"
            )
        if code in _ACCOUNT or status in {301, 307, 308, 401}:
            return SourceUnavailable(
                f"cannot read {self._location}: the object store answered {status} {code}; correct TASKS_S3_ACCESS_KEY_ID, "
                "TASKS_S3_SECRET_ACCESS_KEY, TASKS_S3_REGION and TASKS_S3_ENDPOINT in the Secret of the stores"
            )
        if status == 403:
            return DocumentRefused(
                f"cannot read {self._location}: the account may not, or there is no such object; "
                "give the account the right to read it, or correct payload.filePath"
            )
        return _busy(self._location, status, retry_after) or DocumentRefused(
            f"cannot read {self._location}: the object store answered {status}; look at the object there"
        )

    def untrusted(self, why: str) -> TaskError:
        return SourceUnavailable(
            f"cannot trust the object store: {why}; if its authority is your own, put it into TASKS_SOURCE_CA"
        )


def _busy(location: str, status: int, retry_after: str) -> SourceUnavailable | None:
    """Return the error of a server that may answer otherwise later."""
    if status not in {408, 425, 429} and status < 500:
        return None
    wait = f", and asks to wait {retry_after} s" if re.fullmatch("[0-9]{1,6}", retry_after) else ""
    return SourceUnavailable(f"cannot fetch {location}: the server answered {status}{wait}; look at the server")


def _api_servers() -> frozenset[Address]:
    """Return the address of the Kubernetes API that every pod has in its environment."""
    try:
        return frozenset({ip_address(os.environ["KUBERNETES_SERVICE_HOST"])})
    except (KeyError, ValueError):
        return frozenset()
