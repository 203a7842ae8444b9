"""Uploads, knowledge bases and figures, on real PostgreSQL, Redis and API server and a real folder."""

import asyncio
import hashlib
import io
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import aiohttp
import asyncpg
import orjson
import psutil
import pytest
from aiohttp import web

from devstack import Endpoints
from task_gateway.costs import Cost, CostStats
from tests.support.event_sources import event
from tests.support.event_tables import tell
from tests.support.gateway_lab import GatewayProcess, account
from tests.support.operator_lab import Kube, Place, Proxy, until
from tests.support.s3 import ObjectStore, object_store
from tests.support.uploading import files

pytestmark = pytest.mark.integration

Make = Callable[..., GatewayProcess]
PDF = b"%PDF-1.7\n" + b"x" * 1000
MB = 1_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("s3")) as store:
        yield store


@pytest.fixture
def volume(place: Place, tmp_path: Path) -> Path:
    """The document volume of the namespace, as it is mounted in the gateway."""
    folder = tmp_path / "documents" / place.namespace
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def with_volume(gateway: Make, volume: Path) -> Make:
    """Make a trusting gateway that has it."""

    def make(**given: Any) -> GatewayProcess:
        return gateway(**{"trusting": True, "GATEWAY_DOCUMENTS": str(volume.parent), **given})

    return make


@pytest.fixture
def bucket(server: ObjectStore, place: Place) -> Path:
    """What there is of the namespace in a bucket, whose server keeps objects as files."""
    folder = server.folder / "uploads" / "team-a" / place.namespace
    (server.folder / "uploads").mkdir(exist_ok=True)
    return folder


@pytest.fixture
def with_bucket(gateway: Make, server: ObjectStore) -> Make:
    """Make a trusting gateway that puts documents there."""

    def make(**given: Any) -> GatewayProcess:
        settings = {
            "GATEWAY_DOCUMENTS": "s3://uploads/team-a",
            "GATEWAY_S3_ENDPOINT": f"https://127.0.0.1:{server.port}",
            "GATEWAY_S3_ACCESS_KEY_ID": server.account[0],
            "GATEWAY_S3_SECRET_ACCESS_KEY": server.account[1],
            "GATEWAY_S3_CA": server.certificate_authority,
        }
        return gateway(**{"trusting": True, **settings, **given})

    return make


@pytest.fixture(params=["volume", "bucket"])
def stored(request: pytest.FixtureRequest) -> Path:
    """Where documents of the namespace are put: both ways."""
    return cast("Path", request.getfixturevalue(request.param))


@pytest.fixture
def with_documents(request: pytest.FixtureRequest, stored: Path) -> Make:
    """Make a trusting gateway that puts them there."""
    return cast("Make", request.getfixturevalue(f"with_{request.node.callspec.params['stored']}"))


@pytest.fixture
async def uploads(with_documents: Make) -> AsyncIterator[GatewayProcess]:
    async with with_documents(GATEWAY_UPLOAD_BYTES="5000000").at_work() as process:
        yield process


def form(
    *fields: tuple[str, Any], file: bytes = PDF, name: str = "handbook.pdf", content_type: str = ""
) -> aiohttp.FormData:
    """Return a form: fields in their order, and the file where a field of the name ``file`` stands, else at the end."""
    data = aiohttp.FormData()
    for field, value in fields:
        if field != "file":
            data.add_field(field, value)
        else:
            data.add_field("file", io.BytesIO(file), filename=name, content_type=content_type or "application/octet-stream")
    if "file" not in [field for field, _ in fields]:
        data.add_field("file", io.BytesIO(file), filename=name, content_type=content_type or "application/octet-stream")
    return data


async def upload(process: GatewayProcess, data: Any, **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return status, JSON and headers of the answer."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(process.url + "/api/v1/knowledge/upload", data=data, headers=headers) as response,
    ):
        return response.status, orjson.loads(await response.read()), dict(response.headers)


def name_of(file_path: str, stored: Path) -> str:
    """Return what a task names, as a file of the folder that stands for its namespace."""
    for root in ("/data/", f"s3://uploads/team-a/{stored.name}/"):
        if file_path.startswith(root):
            return file_path.removeprefix(root)
    raise AssertionError(file_path)


KB = ("kb_id", "kb-42")


async def test_an_upload_is_a_file_where_pods_see_it_and_a_task_for_it(
    uploads: GatewayProcess, stored: Path, place: Place
) -> None:
    data = form(
        KB, ("chunk_size", "500"), ("metadata", '{"team": "search"}'), ("priority", "high"), ("labels", '{"a": "b"}')
    )
    status, told, _ = await upload(uploads, data)
    assert status == 202, told
    path = name_of(told["file_path"], stored)
    assert (stored / path).read_bytes() == PDF
    assert (told["sha256"], told["size_bytes"]) == (hashlib.sha256(PDF).hexdigest(), len(PDF))
    assert (told["status"], told["document_id"]) == ("queued", "handbook.pdf")
    task = await place.task(told["id"])
    assert task is not None
    assert task["spec"]["payload"] == {
        "filePath": told["file_path"],
        "fileBytes": len(PDF),
        "documentId": "handbook.pdf",
        "chunkSize": 500,
        "metadata": {"team": "search"},
    }
    assert (task["spec"]["kbId"], task["spec"]["priority"]) == ("kb-42", "high")
    assert task["metadata"]["annotations"]["tasks.zzdsj.io/sha256"] == told["sha256"]
    assert task["metadata"]["labels"] == {"a": "b"}


REFUSED: list[tuple[Callable[[], Any], int, str | None]] = [
    (lambda: form(), 422, "kb_id"),
    (lambda: form(KB, ("chunk_size", "7")), 422, "payload.chunk_size"),
    (lambda: form(("file", None), KB, ("chunk_size", "many")), 422, "payload.chunk_size"),
    (lambda: form(KB, ("metadata", "{")), 422, "metadata"),
    (lambda: form(KB, ("surprise", "x")), 422, "surprise"),
    (lambda: form(KB, KB), 422, "kb_id"),
    (lambda: form(KB, ("file", None), ("file", None)), 422, "file"),
    (lambda: form(("file", None), KB, ("namespace", "elsewhere")), 422, "namespace"),
    (lambda: form(KB, ("namespace", "elsewhere")), 403, None),
    (lambda: form(KB, file=b""), 422, "file"),
    (lambda: form(KB, file=b"plain text"), 422, "file"),
    (lambda: form(KB, file=b"\x7fELF\x02\x01\0", name="a.txt"), 422, "file"),
    (lambda: form(KB, name="a.txt", file=b"plain", content_type="application/pdf"), 422, "file"),
    (lambda: form(KB, ("sha256", "0" * 64)), 422, "sha256"),
    (lambda: form(KB, ("document_id", "x" * 70_000)), 422, "document_id"),
    (lambda: form(("kb_id", "../../etc")), 422, "kb_id"),
    (lambda: form(KB, file=b"x" * 5_000_001, name="a.txt"), 413, None),
    (lambda: form(KB, file=b"x" * 7_000_000, name="a.txt"), 413, None),  # its length says so
    (lambda: {"kb_id": "kb-42"}, 415, None),  # a form of another kind
    (lambda: _without_file(), 422, "file"),
]


async def test_what_is_refused_says_which_field_and_leaves_nothing(
    uploads: GatewayProcess, stored: Path, place: Place
) -> None:
    for number, (data, status, field) in enumerate(REFUSED):
        found, problem, headers = await upload(uploads, data())
        assert found == status, (number, problem)
        assert headers["Content-Type"].startswith("application/problem+json")
        assert [one["field"] for one in problem.get("errors", [])] == ([] if field is None else [field]), number
        assert files(stored) == [], number
    assert await place.objects("processingtasks") == []


def _without_file() -> aiohttp.MultipartWriter:
    writer = aiohttp.MultipartWriter("form-data")
    writer.append("kb-42").set_content_disposition("form-data", name="kb_id")
    return writer


async def test_bodies_that_are_no_form_are_refused_and_leave_nothing(uploads: GatewayProcess, stored: Path) -> None:
    boundary = "multipart/form-data; boundary=b"
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
    for content_type, body in (
        ("multipart/form-data", b"x"),
        (boundary, b""),
        (boundary, b"--b--\r\n"),
        (boundary, b"nothing of the kind"),
        (boundary, part + b"no end"),
        (boundary, b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"),
        (boundary, b"--b\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n\r\nx\r\n--c--\r\n--b--\r\n"),
        (boundary, b"\xff" * 5000),
        (boundary, b'--b\r\nContent-Disposition: form-data; name="\xff\xed\xa0\x80"\r\n\r\nx\r\n--b--\r\n'),
        (boundary, part.replace(b"a.txt", b"\xff\xed\xa0\x80/..") + b"\0\r\n--b--\r\n"),
    ):
        status, problem, _ = await upload(uploads, body, **{"Content-Type": content_type})
        assert status in {400, 422}, (body, problem)
        assert files(stored) == [], body
    assert uploads.exit_code() is None
    assert not [line for line in uploads.lines() if line["level"] == "error"]


async def test_a_repeated_upload_is_one_task_and_another_file_under_its_key_is_refused(
    uploads: GatewayProcess, stored: Path, place: Place
) -> None:
    key = ("idempotency_key", "order-7")
    _, first, _ = await upload(uploads, form(KB, key))
    status, again, headers = await upload(uploads, form(KB, key))
    assert (status, again["uid"], headers["Idempotent-Replayed"]) == (202, first["uid"], "true")
    status, problem, _ = await upload(uploads, form(KB, key, file=PDF + b"y"))
    assert (status, problem["type"].rpartition("/")[2]) == (409, "already-exists")
    assert files(stored) == [name_of(first["file_path"], stored)]
    assert len(await place.objects("processingtasks")) == 1


@pytest.mark.parametrize("how", ["the client goes", "the client stops in the middle", "the gateway is killed"])
async def test_an_upload_that_is_cut_off_leaves_nothing(with_volume: Make, volume: Path, place: Place, how: str) -> None:
    process = with_volume()
    async with process.at_work():
        reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
        head = (
            b'--b\r\nContent-Disposition: form-data; name="kb_id"\r\n\r\nkb-42\r\n'
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
        )
        writer.write(
            b"POST /api/v1/knowledge/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            b"Content-Length: 90000000\r\n\r\n" + head + b"x" * 3 * MB
        )
        await writer.drain()

        async def arrives() -> bool:
            return any((volume / name).stat().st_size >= 2 * MB for name in files(volume))

        await until("the file arrives", arrives, seconds=20, interval=0.02)
        [partial] = files(volume)
        assert partial.startswith("uploads/.partial-")
        match how:
            case "the client goes":
                writer.transport.abort()
            case "the client stops in the middle":
                writer.write_eof()
            case _:
                process.kill()
                hours_ago = time.time() - 7200
                os.utime(volume / partial, (hours_ago, hours_ago))
                process.start()
                await process.ready()

        async def gone() -> bool:
            return files(volume) == []

        await until("nothing of it is left", gone, seconds=20)
        writer.transport.abort()
        del reader
    assert await place.objects("processingtasks") == []


@pytest.mark.parametrize("how", ["the client goes", "the client stops in the middle"])
async def test_an_upload_into_a_bucket_that_is_cut_off_leaves_nothing(
    with_bucket: Make, server: ObjectStore, place: Place, how: str
) -> None:
    before = files(server.folder)
    async with with_bucket().at_work() as process:
        reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
        writer.write(
            b"POST /api/v1/knowledge/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            b'Content-Length: 90000000\r\n\r\n--b\r\nContent-Disposition: form-data; name="kb_id"\r\n\r\nkb-42\r\n'
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n' + b"x" * 20 * MB
        )
        await writer.drain()

        async def arrives() -> bool:
            return files(server.folder) != before  # the first part of it

        await until("the file arrives", arrives, seconds=20, interval=0.02)
        if how == "the client goes":
            writer.transport.abort()
        else:
            writer.write_eof()

        async def gone() -> bool:
            return files(server.folder) == before

        await until("nothing of it is left", gone, seconds=20)
        writer.transport.abort()
        del reader
    assert await place.objects("processingtasks") == []


async def test_an_object_store_that_is_away_costs_the_upload_alone(with_bucket: Make, bucket: Path, place: Place) -> None:
    async with with_bucket(GATEWAY_S3_SECRET_ACCESS_KEY="another").at_work() as process:
        status, problem, headers = await upload(process, form(KB))
        assert (status, headers["Retry-After"]) == (503, "10"), problem
        assert "answered 403 SignatureDoesNotMatch" in problem["detail"]
        assert "another" not in process.log.read_text()
        await process.do("GET", "/api/v1/tasks")
    assert files(bucket) == []
    assert await place.objects("processingtasks") == []


async def test_a_file_stays_when_nobody_can_tell_whether_its_task_is_there(
    with_volume: Make, volume: Path, kube: Kube, tmp_path: Path
) -> None:
    refused = {"kind": "Status", "message": "quota exceeded", "reason": "Forbidden"}
    proxy = Proxy(kube.access, folder=tmp_path)
    await proxy.start()
    try:
        async with with_volume(kubeconfig=proxy.kubeconfig).at_work() as process:
            for answer, status, kept in (
                (lambda: web.Response(status=503), 503, 1),
                (lambda: web.json_response(refused, status=403), 403, 1),  # this one's is gone again
            ):
                proxy.refuse = lambda method, path, answer=answer: answer() if method == "POST" else None  # type: ignore[misc]
                found, problem, _ = await upload(process, form(KB))
                assert (found, len(files(volume))) == (status, kept), problem
    finally:
        await proxy.aclose()


async def test_200_megabytes_pass_through_bounded_memory(with_documents: Make) -> None:
    size = 200 * MB
    process = with_documents()
    async with process.at_work():
        await upload(process, form(KB))
        resident = psutil.Process(process.pid)
        before, most = resident.memory_info().rss, 0
        block = os.urandom(MB)
        digest = hashlib.sha256()

        async def blocks() -> AsyncIterator[bytes]:
            nonlocal most
            for _ in range(size // MB):
                digest.update(block)
                yield block
                most = max(most, resident.memory_info().rss)

        data = aiohttp.FormData()
        data.add_field("kb_id", "kb-42")
        data.add_field("file", blocks(), filename="large.txt", content_type="text/plain")
        block = b"a line of text that is read by nobody\n" * (MB // 38) + b"x" * (MB % 38)
        status, told, _ = await upload(process, data)
    assert (status, told.get("size_bytes"), told.get("sha256")) == (202, size, digest.hexdigest()), told
    assert most - before < 30 * MB, f"{before / MB:.0f} MB before, {most / MB:.0f} MB at most"


async def test_who_may_not_create_tasks_may_not_upload(with_volume: Make, volume: Path, kube: Kube, place: Place) -> None:
    async with with_volume(trusting=False).at_work() as process:
        reader = await account(kube, place.namespace, "reader", verbs=["list"])
        writer = await account(kube, place.namespace, "writer", verbs=["create"])
        assert (await upload(process, form(KB)))[0] == 401
        assert (await upload(process, form(KB), Authorization=f"Bearer {reader}"))[0] == 403
        assert files(volume) == []
        assert (await upload(process, form(KB), Authorization=f"Bearer {writer}"))[0] == 202


async def test_a_gateway_without_a_volume_says_so(trusting: GatewayProcess) -> None:
    status, problem, _ = await upload(trusting, form(KB))
    assert status == 404
    assert "not mounted" in problem["detail"]


# ------------------------------------------------------------------------------------------------------ knowledge bases


@pytest.fixture
async def filled(sql: "asyncpg.Connection[Any]", place: Place) -> str:
    """A knowledge base of seven documents, one of them deleted, one inconsistent; another namespace has one of that name."""
    for namespace, documents in ((place.namespace, 7), ("elsewhere", 1)):
        await sql.execute(
            "INSERT INTO knowledge_bases (namespace, kb_id, generation, model_fingerprint, dimension) "
            "VALUES ($1, 'kb-42', 3, 'usem3', 256)",
            namespace,
        )
        for number in range(documents):
            await sql.execute(
                "INSERT INTO documents (namespace, kb_id, document_id, last_version, published_version, chunk_count, "
                "missing, checked_at) VALUES ($1, 'kb-42', $2, 2, 2, $3, $4, now())",
                *(namespace, f"文档-{number}.md", 0 if number == 6 else 10, 4 if number == 1 else 0),
            )
    return "kb-42"


async def test_the_state_of_a_knowledge_base_is_that_of_the_ledger(
    trusting: GatewayProcess, filled: str, place: Place
) -> None:
    told = await trusting.do("GET", f"/api/v1/knowledge/{filled}")
    consistency = told.pop("consistency")
    updated_at = datetime.fromisoformat(told.pop("updated_at"))
    assert datetime.now(UTC) - updated_at < timedelta(minutes=5)
    assert told == {
        "kb_id": filled,
        "namespace": place.namespace,
        "state": "degraded",
        "generation": 3,
        "model": "usem3",
        "embedding_model": None,
        "dimension": 256,
        "documents": 6,
        "chunks": 60,
        "intents": 0,
        "retained": None,
        "rebuild": None,
    }
    assert (consistency["missing"], consistency["extra"]) == (4, 0)
    for path in ("/api/v1/knowledge/none", "/api/v1/knowledge/none/documents", "/api/v1/knowledge/%00%ff/documents"):
        status, problem = await trusting.ask("GET", path)
        assert (status, problem["type"].rpartition("/")[2]) == (404, "not-found")


async def test_knowledge_bases_of_a_namespace_come_in_pages(
    trusting: GatewayProcess, filled: str, place: Place, sql: "asyncpg.Connection[Any]"
) -> None:
    for namespace, name in ((place.namespace, "kb-43"), (place.namespace, "知识库"), ("another", "kb-44")):
        await sql.execute(
            "INSERT INTO knowledge_bases (namespace, kb_id, generation, model_fingerprint, dimension) "
            "VALUES ($1, $2, 1, 'usem3', 256)",
            *(namespace, name),
        )
    seen: list[dict[str, Any]] = []
    cursor = ""
    for _ in range(3):
        page = await trusting.do("GET", f"/api/v1/knowledge?limit=1{cursor}")
        seen += page["items"]
        cursor = f"&cursor={page['next_cursor']}"
    assert page["next_cursor"] is None
    assert [one["kb_id"] for one in seen] == [filled, "kb-43", "知识库"]
    assert seen[0] == await trusting.do("GET", f"/api/v1/knowledge/{filled}")
    status, problem = await trusting.ask("GET", "/api/v1/knowledge?limit=0")
    assert (status, problem["errors"][0]["field"]) == (422, "limit")


async def test_generations_beside_the_one_that_serves_are_told(
    trusting: GatewayProcess, filled: str, place: Place, sql: "asyncpg.Connection[Any]"
) -> None:
    task = uuid.uuid4()
    for number, state, name, keep in (
        (2, "retained", None, "1 day"),
        (3, "serving", "other", None),
        (4, "filling", "b", None),
    ):
        await sql.execute(
            "INSERT INTO generations (namespace, kb_id, generation, model_fingerprint, dimension, state, embedding_model, "
            "keep_until, task_uid) VALUES ($1, $2, $3, $4, 256, $5, $6, now() + $7::text::interval, $8)",
            *(place.namespace, filled, number, f"model-{number}", state, name, keep, task),
        )
    told = await trusting.do("GET", f"/api/v1/knowledge/{filled}")
    assert (told["generation"], told["embedding_model"]) == (3, "other")
    until = datetime.fromisoformat(told["retained"].pop("until")) - datetime.now(UTC)
    assert timedelta(hours=23) < until <= timedelta(days=1)
    assert told["retained"] == {"generation": 2, "model": "model-2"}
    assert told["rebuild"] == {"generation": 4, "model": "model-4", "task_uid": str(task)}


async def test_documents_come_in_pages(trusting: GatewayProcess, filled: str) -> None:
    seen: list[str] = []
    cursor = ""
    for _ in range(3):
        page = await trusting.do("GET", f"/api/v1/knowledge/{filled}/documents?limit=2{cursor}")
        seen += [one["document_id"] for one in page["items"]]
        cursor = f"&cursor={page['next_cursor']}"
    assert page["next_cursor"] is None
    assert sorted(seen) == [f"文档-{number}.md" for number in range(6)]
    for wrong in ("%21", "AA", "_w", "x"):  # no base64, NUL, no UTF-8, too short
        status, problem = await trusting.ask("GET", f"/api/v1/knowledge/{filled}/documents?cursor={wrong}")
        assert (status, problem["errors"][0]["field"]) == (422, "cursor"), wrong


# ----------------------------------------------------------------------------------------------------------- statistics


async def test_costs_are_sums_over_all_attempts_of_the_callers_namespaces(
    gateway: Make, place: Place, kube: Kube, sql: "asyncpg.Connection[Any]"
) -> None:
    async with Place.fresh(kube) as other:
        process = gateway(namespaces=[place.namespace, other.namespace])
        async with process.at_work():
            ada = await account(kube, place.namespace, "ada", verbs=["list"])
            await tell(sql, [event("one", "Completed", namespace=place.namespace)])
            known = await sql.fetchval("SELECT uid FROM tasks WHERE name = 'one'")
            other_task = uuid.uuid4()
            for uid, namespace, kb_id, cpu, days in (
                (known, place.namespace, "a", 1.5, 0),
                (known, place.namespace, "a", 2.5, 1),
                (other_task, place.namespace, "b", 9.0, 2),
                (other_task, place.namespace, None, 1.0, 3),
                (other_task, place.namespace, "old", 99.0, 40),
                (uuid.uuid4(), other.namespace, "a", 77.0, 0),
            ):
                await sql.execute(
                    "INSERT INTO task_usage (task_uid, attempt, holder, namespace, kb_id, type, outcome, seconds, "
                    "cpu_seconds, memory_byte_seconds, memory_peak_bytes, tokens, texts, stages, stores, ended_at) VALUES "
                    "($1, 1, 'pod', $2, $3, 'health_check', 'Failed', 10, $4, 1000, 5, 7, 2, '{}', '{}', "
                    "now() - make_interval(days => $5))",
                    *(uid, namespace, kb_id, cpu, days),
                )

            async def costs(query: str) -> Any:
                return await process.do("GET", f"/api/v1/stats/costs?namespace={place.namespace}{query}", token=ada)

            found = await costs("")
            assert CostStats.model_validate(found).total == Cost(
                tasks=2, processes=4, seconds=40, cpu_seconds=14, memory_byte_seconds=4000, tokens=28, texts=8
            )
            assert [(one["kb_id"], one["cpu_seconds"]) for one in found["by_knowledge_base"]] == [
                ("b", 9),
                ("a", 4),
                (None, 1),
            ]
            assert [one["kb_id"] for one in (await costs("&limit=1"))["by_knowledge_base"]] == ["b"]
            assert (await costs("&kb_id=a"))["total"]["cpu_seconds"] == 4
            assert (await costs("&task_id=one"))["total"]["processes"] == 2
            nothing = await costs("&kb_id=unknown")
            assert (nothing["total"]["tasks"], nothing["by_knowledge_base"]) == (0, [])
            assert (await costs("&since=2020-01-01T00:00:00Z"))["total"]["cpu_seconds"] == 113
            assert (await process.ask("GET", f"/api/v1/stats/costs?namespace={other.namespace}", token=ada))[0] == 403
            for wrong in ("since=yesterday", "task_id=%00", "kb_id=%00", "task_id=%2e"):
                assert (await process.ask("GET", f"/api/v1/stats/costs?{wrong}", token=ada))[0] == 422, wrong


async def test_figures_are_of_the_callers_namespaces_alone(
    gateway: Make, place: Place, kube: Kube, sql: "asyncpg.Connection[Any]", stores: Endpoints
) -> None:
    async with Place.fresh(kube) as other:
        process = gateway(
            namespaces=[place.namespace, other.namespace],
            GATEWAY_REDIS_URL=stores.host_urls["TASKS_REDIS_URL"],
            GATEWAY_MILVUS_URL=stores.host_urls["TASKS_MILVUS_URL"],
            GATEWAY_ELASTICSEARCH_URL="http://127.0.0.1:1",
        )
        async with process.at_work():
            ada = await account(kube, place.namespace, "ada", verbs=["list"])
            await tell(
                sql,
                [
                    *(event(f"waits-{n}", "Queued", namespace=place.namespace) for n in range(3)),
                    *(event(f"runs-{n}", namespace=place.namespace) for n in range(2)),
                    *(event(f"done-{n}", "Completed", namespace=place.namespace) for n in range(3)),
                    event("broken", "Failed", namespace=place.namespace),
                    event("theirs", "Queued", namespace=other.namespace),
                ],
            )
            await sql.execute("UPDATE tasks SET started_at = finished_at - interval '4 seconds' WHERE phase = 'Completed'")
            for namespace in (place.namespace, "*"):
                told = await process.do("GET", f"/api/v1/stats/system?namespace={namespace}", token=ada)
                assert told["namespaces"] == [place.namespace]
                assert told["queue"]["by_priority"] == {"high": 0, "normal": 3, "low": 0}
                assert (told["running"], told["workers"]["busy"]) == (2, 2)
                assert told["queue"]["oldest_seconds"] > 0
                minute = told["throughput"]["1m"]
                assert (minute["completed"], minute["failed"], minute["success_rate"]) == (3, 1, 0.75)
                assert minute["average_seconds"] == 4
                assert {name: store["status"] for name, store in told["stores"].items()} == {
                    "postgres": "ok",
                    "redis": "ok",
                    "milvus": "ok",
                    "elasticsearch": "down",
                }
            assert (await process.ask("GET", f"/api/v1/stats/system?namespace={other.namespace}", token=ada))[0] == 403
