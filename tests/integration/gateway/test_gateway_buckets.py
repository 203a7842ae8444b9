"""Uploads in an object store: whole or not there, in their place, and read by runners under the path of their task."""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from job_runner.remote import download
from job_runner.settings import Settings
from task_contract.location import check_file_path
from task_gateway.buckets import DocumentBucket
from task_gateway.documents import PlaceFull, PlaceUnavailable, Received, Stored, TooLarge
from tests.support.operator_lab import until
from tests.support.s3 import HOST, ObjectStore, object_store
from tests.support.servers import free_port
from tests.support.uploading import files, parts

pytestmark = pytest.mark.integration

PDF = b"%PDF-1.7\n..."
MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("s3")) as store:
        yield store


@pytest.fixture
def folder(server: ObjectStore, request: pytest.FixtureRequest) -> Path:
    """The folder of the bucket: each test has one of its own."""
    path = server.folder / f"b{hashlib.sha256(request.node.name.encode()).hexdigest()[:16]}"
    path.mkdir()
    return path


def made(server: ObjectStore, folder: Path, **changes: Any) -> DocumentBucket:
    given: dict[str, Any] = {
        "location": f"s3://{folder.name}/documents/",
        "endpoint": f"https://127.0.0.1:{server.port}",
        "region": "us-east-1",
        "virtual": False,
        "account": server.account,
        "certificates": server.certificate_authority,
    }
    return DocumentBucket(**(given | changes))


async def close(bucket: DocumentBucket) -> None:
    """Close it, and wait for TLS to say goodbye: a transport that outlives the loop is a warning."""
    await bucket.aclose()
    selector: Any = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]  # that of the default loop

    async def quiet() -> bool:
        return len(selector.get_map()) == 1  # the loop's own pipe

    await until("all connections are closed", quiet, seconds=20, interval=0.01)
    await asyncio.sleep(0)


@pytest.fixture
async def bucket(server: ObjectStore, folder: Path) -> AsyncIterator[DocumentBucket]:
    bucket = made(server, folder)
    yield bucket
    await close(bucket)


async def put(
    bucket: DocumentBucket, *data: bytes, token: str = "t1", name: str = "handbook.pdf", limit: int = 100 * MIB
) -> tuple[Received, Stored]:
    async with bucket.receive(parts(*data), namespace="knowledge", limit=limit) as received:
        return received, await bucket.place(received, kb_id="kb-42", token=token, name=name)


async def read(server: ObjectStore, location: str, buckets: str) -> bytes:
    """Read a document as the pod of its task does."""
    given = server.settings(s3_buckets=buckets, postgres_url="postgresql://nobody@nowhere/none")
    file = await download(check_file_path(location), settings=Settings(**given))  # type: ignore[arg-type]  # as variables
    with os.fdopen(file, "rb") as opened:
        return opened.read()


@pytest.mark.parametrize(
    ("name", "stored_as"),
    [
        ("handbook.pdf", "handbook.pdf"),
        ("季度 报告+é%20~(1)'\"&=.pdf", "季度 报告+é%20~(1)'\"&=.pdf"),
        ("what?#1.pdf", "what__1.pdf"),
    ],
)
async def test_a_document_stands_where_its_task_reads_it(
    bucket: DocumentBucket, server: ObjectStore, folder: Path, name: str, stored_as: str
) -> None:
    received, stored = await put(bucket, PDF, name=name)
    path = f"documents/knowledge/uploads/kb-42/t1/{stored_as}"
    assert stored == Stored(namespace="knowledge", file_path=f"s3://{folder.name}/{path}", fresh=True)
    assert (received.size, received.sha256, received.head) == (len(PDF), hashlib.sha256(PDF).hexdigest(), PDF)
    assert files(folder) == [path]
    assert await read(server, stored.file_path, f"{folder.name}/documents/knowledge") == PDF


async def test_an_upload_that_is_repeated_takes_the_same_place(bucket: DocumentBucket, folder: Path) -> None:
    await put(bucket, PDF)
    _, again = await put(bucket, PDF)
    assert not again.fresh
    assert len(files(folder)) == 1


@pytest.mark.parametrize("size", [0, 8 * MIB, 8 * MIB + 1, 20_000_000])
async def test_a_document_of_any_size_arrives_as_it_was_sent(bucket: DocumentBucket, folder: Path, size: int) -> None:
    data = os.urandom(size)
    received, stored = await put(bucket, *[data[at : at + 65_537] for at in range(0, size, 65_537)])
    assert (folder / stored.file_path.removeprefix(f"s3://{folder.name}/")).read_bytes() == data
    assert (received.size, received.sha256) == (size, hashlib.sha256(data).hexdigest())
    assert received.head == data[:4096]
    assert len(files(folder)) == 1


async def test_the_bucket_may_be_part_of_the_name_of_the_host_and_the_place_its_root(
    server: ObjectStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = made(server, folder, location=f"s3://{folder.name}", virtual=True, endpoint=f"https://{HOST}:{server.port}")

    async def resolve(*_: object, **__: object) -> list[dict[str, Any]]:
        host = f"{folder.name}.{HOST}"
        return [{"hostname": host, "host": "127.0.0.1", "port": server.port, "family": 2, "proto": 0, "flags": 0}]

    monkeypatch.setattr(bucket._session.connector, "_resolve_host", resolve)
    _, stored = await put(bucket, PDF)
    assert stored.file_path == f"s3://{folder.name}/knowledge/uploads/kb-42/t1/handbook.pdf"
    assert files(folder) == ["knowledge/uploads/kb-42/t1/handbook.pdf"]
    await close(bucket)


@pytest.mark.parametrize("before", [600, 9 * MIB])
@pytest.mark.parametrize(
    ("then", "error"),
    [
        (None, TooLarge),
        (ConnectionResetError("cut"), ConnectionResetError),
        (asyncio.CancelledError(), asyncio.CancelledError),
    ],
)
async def test_what_does_not_arrive_whole_leaves_nothing(
    bucket: DocumentBucket, folder: Path, before: int, then: BaseException | None, error: type[BaseException]
) -> None:
    with pytest.raises(error):
        async with bucket.receive(
            parts(b"x" * before, b"y" * 600, then=then), namespace="knowledge", limit=before + (0 if then is None else 1000)
        ):
            pytest.fail("it has not arrived")
    assert files(folder) == []


async def test_what_is_refused_after_it_arrived_leaves_nothing(bucket: DocumentBucket, folder: Path) -> None:
    with pytest.raises(ValueError, match="refused"):
        async with bucket.receive(parts(PDF), namespace="knowledge", limit=1000):
            raise ValueError("refused")
    assert files(folder) == []


async def test_a_document_whose_task_was_refused_is_removed_alone(bucket: DocumentBucket, folder: Path) -> None:
    await put(bucket, PDF)
    _, refused = await put(bucket, PDF, token="t2")
    await bucket.remove(refused)
    await bucket.remove(refused)
    assert files(folder) == ["documents/knowledge/uploads/kb-42/t1/handbook.pdf"]


async def test_what_killed_processes_left_is_removed_an_hour_later(bucket: DocumentBucket, folder: Path) -> None:
    await put(bucket, PDF)
    await put(bucket, PDF, name=".partial-of-a-user")
    for namespace in ("knowledge", "other"):
        await bucket._request("PUT", f"documents/{namespace}/uploads/.partial-0123", data=b"half")
    assert await bucket.tidy() == 0
    assert await bucket.tidy(now=time.time() + 3500) == 0
    assert await bucket.tidy(now=time.time() + 3602) == 2
    assert [name.rpartition("/")[2] for name in files(folder)] == [".partial-of-a-user", "handbook.pdf"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"location": "s3://no-such-bucket/documents"}, "answered 404 NoSuchBucket; correct GATEWAY_DOCUMENTS"),
        ({"account": ("owner", "wrong")}, "answered 403 SignatureDoesNotMatch; correct GATEWAY_DOCUMENTS"),
        ({"account": ("stranger", "secret-of-the-stranger")}, "answered 403 AccessDenied; .* rights of the account"),
        ({"certificates": None}, "not trusted; .* GATEWAY_S3_CA"),
        ({"endpoint": "http://127.0.0.1:1"}, "does not answer; look at it and at GATEWAY_S3_ENDPOINT"),
    ],
)
@pytest.mark.parametrize("size", [10, 9 * MIB])
async def test_an_object_store_that_cannot_be_used_says_what_to_correct(
    server: ObjectStore, folder: Path, changes: dict[str, Any], message: str, size: int
) -> None:
    bucket = made(server, folder, **changes)
    with pytest.raises(PlaceUnavailable, match=message):
        await put(bucket, b"x" * size)
    assert await bucket.tidy() == 0
    await close(bucket)
    assert files(folder) == []


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((507, b""), PlaceFull),
        ((400, b"<Error><Code>QuotaExceeded</Code></Error>"), PlaceFull),
        ((500, b"<Error><Code>InternalError</Code></Error>"), PlaceUnavailable),
        ((200, b"<Error><Code>InternalError</Code></Error>"), PlaceUnavailable),
        ((200, b"no XML"), PlaceUnavailable),
    ],
)
@pytest.mark.parametrize("size", [10, 9 * MIB])
async def test_what_an_object_store_answers_is_read(
    server: ObjectStore, folder: Path, answer: tuple[int, bytes], error: type[Exception], size: int
) -> None:
    async def handle(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=answer[0], body=answer[1])

    app = web.Application(client_max_size=100 * MIB)
    app.router.add_route("*", "/{path:.*}", handle)
    runner, port = web.AppRunner(app), free_port()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    bucket = made(server, folder, endpoint=f"http://127.0.0.1:{port}")
    try:
        if answer == (200, b"no XML") and size == 10:
            await put(bucket, b"x" * size)  # nothing is read from the answer to a single request
        else:
            with pytest.raises(error):
                await put(bucket, b"x" * size)
    finally:
        await runner.cleanup()
        await close(bucket)
