"""Uploads in an object store: ``s3://BUCKET/PREFIX/NAMESPACE/uploads/KB_ID/TOKEN/NAME``.

An object arrives in parts under a name that nobody looks at, and is copied into its place by the server: what stands there
is whole, whichever process dies. Only one part of it is ever in memory. Parts of an upload whose gateway was killed are seen
by nobody; a rule of the bucket removes them (``AbortIncompleteMultipartUpload``).

Nothing that the server says gets into a message but its status and the code of its error.
"""

import asyncio
import contextlib
import hashlib
import re
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote
from xml.etree.ElementTree import ParseError

import aiohttp
import structlog
from yarl import URL

from task_gateway.documents import (
    ABANDONED,
    FOLDER,
    PARTIAL,
    Arriving,
    PlaceFull,
    PlaceUnavailable,
    Received,
    Stored,
)

if TYPE_CHECKING:
    from aiohttp_s3_client import S3Client
    from aiohttp_s3_client.client import MultipartUploader

_log = structlog.get_logger(__name__)

MOST_BYTES: Final = 5 * 2**30
"""Of one upload: the most that one request copies, https://docs.aws.amazon.com/AmazonS3/latest/API/API_CopyObject.html."""
_PART: Final = 8 * 2**20
"""Bytes of a part; S3 wants 5 MiB at least and 10,000 parts at most."""
_BLOCK: Final = 1 << 18
_CONNECT_SECONDS: Final = 10
_SILENT_SECONDS: Final = 60
"""Without a byte: the server copies meanwhile."""
_FULL: Final = frozenset({"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"})
_SAYS: Final = 4096
"""Bytes of an answer in which the code of an error is looked for."""
_NOTHING: Final = hashlib.sha256(b"").hexdigest()


class DocumentBucket:
    """A :class:`~task_gateway.documents.DocumentStore` of one bucket, or of a prefix in it."""

    def __init__(
        self,
        location: str,
        *,
        endpoint: str | None,
        region: str,
        virtual: bool,
        account: tuple[str, str],
        session_token: str | None = None,
        certificates: str | None = None,
    ) -> None:
        """Made within a running event loop.

        ``location``: ``s3://bucket/prefix``; ``endpoint``: None: Amazon's of the region; ``virtual``: the bucket is part of
        the host's name; ``account``: id and key; ``certificates``: PEM, trusted besides those of the system.
        """
        self._bucket, _, prefix = location.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        base = URL(endpoint or f"https://s3.{region}.amazonaws.com")
        self._url = base.with_host(f"{self._bucket}.{base.host}") if virtual else base / self._bucket
        context = ssl.create_default_context()
        if certificates is not None:
            context.load_verify_locations(cadata=certificates)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENT_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._client = self._signing(account, session_token, region)

    def _signing(self, account: tuple[str, str], session_token: str | None, region: str) -> "S3Client":
        from aiohttp_s3_client import S3Client  # a library that few need
        from aiohttp_s3_client.credentials import StaticCredentials

        # Said explicitly: what is left out would be taken from AWS_* variables, or asked of the metadata service.
        credentials = StaticCredentials(*account, session_token=session_token, region=region)
        return S3Client(self._session, self._url, credentials=credentials)

    async def aclose(self) -> None:
        """Close connections."""
        await self._session.close()

    def serves(self, namespace: str) -> bool:
        """All namespaces; whether its tasks may read the bucket, the Secret of their stores says."""
        del namespace
        return True

    @contextlib.asynccontextmanager
    async def receive(self, chunks: AsyncIterator[bytes], *, namespace: str, limit: int) -> AsyncIterator[Received]:
        """Write an object as it arrives."""
        partial = f"{self._prefix}{namespace}/{FOLDER}/{PARTIAL}{uuid.uuid4().hex}"
        try:
            arriving = Arriving(chunks, limit=limit)
            await self._write(partial, arriving)
            yield arriving.received(namespace, partial)
        finally:
            with contextlib.suppress(PlaceUnavailable):  # tidy does it later
                await self._delete(partial)

    async def place(self, received: Received, *, kb_id: str, token: str, name: str) -> Stored:
        """Give a file its place; parts of a URL that an ``s3://`` path cannot have become ``_`` in its name."""
        key = f"{self._prefix}{received.namespace}/{FOLDER}/{kb_id}/{token}/{re.sub('[?#]', '_', name)}"
        fresh = not await self._exists(key)
        source = quote(f"/{self._bucket}/{received.partial}")
        await self._request("PUT", key, headers={"x-amz-copy-source": source}, content_sha256=_NOTHING)
        return Stored(namespace=received.namespace, file_path=f"s3://{self._bucket}/{key}", fresh=fresh)

    async def remove(self, stored: Stored) -> None:
        """Remove an object whose task was refused."""
        with contextlib.suppress(PlaceUnavailable):
            await self._delete(stored.file_path.removeprefix(f"s3://{self._bucket}/"))

    async def tidy(self, *, now: float | None = None) -> int:
        """Remove what processes that were killed have left half."""
        before = (time.time() if now is None else now) - ABANDONED
        removed = 0
        try:
            with _explained():
                async for _, folders in self._client.list_objects_v2(prefix=self._prefix, delimiter="/"):
                    for folder in folders:
                        async for found, _ in self._client.list_objects_v2(prefix=f"{folder}{FOLDER}/{PARTIAL}"):
                            for one in found:
                                if one.last_modified.timestamp() < before:
                                    await self._delete(one.key)
                                    removed += 1
        except (PlaceUnavailable, PlaceFull) as error:
            _log.warning("cannot look for uploads that were cut off", error=str(error))
        return removed

    async def _write(self, key: str, arriving: Arriving) -> None:
        """Put an object in parts, or in one request when there is one part."""
        part = bytearray()
        with _explained():
            async with contextlib.AsyncExitStack() as stack:  # completes the upload, or gives it up after an error
                upload: MultipartUploader | None = None
                async for chunk in arriving:
                    part += chunk
                    if len(part) >= _PART:
                        if upload is None:
                            upload = await stack.enter_async_context(self._client.multipart_upload(key))
                        await self._put_part(upload, part)
                if upload is None:
                    await self._request("PUT", key, **await _body(part))
                elif part:
                    await self._put_part(upload, part)

    @staticmethod
    async def _put_part(upload: "MultipartUploader", part: bytearray) -> None:
        await upload.put_part(**await _body(part))
        part.clear()

    async def _exists(self, key: str) -> bool:
        with _explained():
            async with self._client.head(key) as response:
                if response.status not in {HTTPStatus.OK, HTTPStatus.NOT_FOUND}:
                    raise _refused(response.status, "")
                return response.status == HTTPStatus.OK

    async def _delete(self, key: str) -> None:
        await self._request("DELETE", key, content_sha256=_NOTHING)

    async def _request(self, method: str, key: str, **given: Any) -> None:
        with _explained():
            async with self._client.request(method, key, **given) as response:
                said = (await response.content.read(_SAYS)).decode(errors="replace")
                # A copy that fails after it has begun is an error in an answer of 200.
                if response.status not in {HTTPStatus.OK, HTTPStatus.NO_CONTENT} or "<Error>" in said:
                    raise _refused(response.status, said)


class _Blocks:
    """Data as a request is given it: in blocks, for aiohttp would keep the event loop with more at once; and as often as it
    is tried again."""

    def __init__(self, data: bytearray) -> None:
        self._data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._data), _BLOCK):
            yield bytes(self._data[start : start + _BLOCK])


async def _body(data: bytearray) -> dict[str, Any]:
    digest = await asyncio.to_thread(hashlib.sha256, data)  # 8 MiB take longer than others should wait
    return {"data": _Blocks(data), "data_length": len(data), "content_sha256": digest.hexdigest()}


def _refused(status: int, said: str) -> PlaceFull | PlaceUnavailable:
    """Return what an answer that is not as it should be means."""
    found = re.search(r"<Code>([A-Za-z]{1,64})</Code>", said)
    code = "" if found is None else found[1]
    if status == HTTPStatus.INSUFFICIENT_STORAGE or code in _FULL:
        return PlaceFull("cannot store the document: the object store is full")
    remedy = (
        "look at it"
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR
        else "correct GATEWAY_DOCUMENTS and GATEWAY_S3_..., and the rights of the account"
    )
    return PlaceUnavailable(f"cannot store the document: the object store answered {f'{status} {code}'.strip()}; {remedy}")


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    from aiohttp_s3_client.client import AwsError

    # Without the chain: what aiohttp raises may hold the request with its signature.
    try:
        yield
    except AwsError as error:
        raise _refused(error.status, error.message) from None
    except aiohttp.ClientSSLError:
        raise PlaceUnavailable(
            "cannot store the document: the certificate of the object store is not trusted; if its authority is your own, "
            "put it into GATEWAY_S3_CA"
        ) from None
    except (aiohttp.ClientError, TimeoutError, ParseError, ValueError):
        raise PlaceUnavailable(
            "cannot store the document: the object store does not answer; look at it and at GATEWAY_S3_ENDPOINT"
        ) from None
