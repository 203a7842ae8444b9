"""Documents from a real S3 server and a real HTTPS server, alone and through the whole pipeline into both stores."""

import asyncio
import gc
import hashlib
import http.server
import json
import os
import ssl
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
import trustme
from aiohttp import web
from pydantic import SecretStr

from job_runner.embed import PackagedEmbedder
from job_runner.remote import download, list_objects
from job_runner.settings import Settings
from task_contract.errors import DocumentNotFound, DocumentRefused, SourceUnavailable, TaskError
from task_contract.lifecycle import ExitCode
from task_contract.messages import Outcome
from tests.support.runner_lab import Lab
from tests.support.s3 import HOST, ObjectStore, object_store

# The first time the S3 server is built from its Go module.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

KEY = "team-a/手册 1+2 ~100%.txt"
LOCATION = f"s3://manuals/{KEY}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with object_store(tmp_path_factory.mktemp("s3")) as store:
        store.write(LOCATION, b"of team a")
        store.write("s3://manuals/team-ab/other.txt", b"of another team")
        store.write("s3://public/a.txt", b"for all")
        store.write("s3://private/a.txt", b"of another tenant")
        yield store


async def fetched(store: ObjectStore, location: str = LOCATION, **changes: Any) -> bytes:
    settings = Settings.model_validate({"postgres_url": "postgresql://unused", **store.settings(**changes)})

    async def resolve(host: str) -> Sequence[str]:
        assert host == HOST or host.endswith(f".{HOST}") or host == "127.0.0.1"
        return ["127.0.0.1"]

    with os.fdopen(await download(location, settings=settings, resolve=resolve), "rb") as file:
        return file.read()


# -------------------------------------------------------------------------------------------------------- object store


async def test_an_object_is_read_by_path_and_by_host(store: ObjectStore) -> None:
    assert await fetched(store) == b"of team a"
    virtual = {"s3_endpoint": f"https://{HOST}:{store.port}/", "s3_addressing": "virtual"}
    assert await fetched(store, **virtual) == b"of team a"
    assert await fetched(store, "s3://public/a.txt", s3_buckets="public", s3_anonymous=True, **virtual) == b"for all"


async def test_an_object_that_everybody_may_read_needs_no_account(store: ObjectStore) -> None:
    public = {"s3_buckets": "public", "s3_access_key_id": None, "s3_secret_access_key": None}
    assert await fetched(store, "s3://public/a.txt", s3_anonymous=True, **public) == b"for all"
    with pytest.raises(SourceUnavailable, match="TASKS_S3_ACCESS_KEY_ID and TASKS_S3_SECRET_ACCESS_KEY are not set"):
        await fetched(store, "s3://public/a.txt", **public)


async def test_a_large_object_arrives_whole(store: ObjectStore) -> None:
    body = os.urandom(5 * 2**20 + 17)
    store.write("s3://manuals/large", body)
    assert hashlib.sha256(await fetched(store, "s3://manuals/large")).digest() == hashlib.sha256(body).digest()
    with pytest.raises(DocumentRefused, match="more than 100 bytes"):
        await fetched(store, "s3://manuals/large", max_document_bytes=100)


FAILURES: list[tuple[str, str, dict[str, Any], type[TaskError], str]] = [
    ("no object", "s3://manuals/none", {}, DocumentNotFound, "no such object; put it there"),
    ("a folder", "s3://manuals/team-a", {}, DocumentNotFound, "no such object"),
    ("no bucket", "s3://nowhere/a", {"s3_buckets": "nowhere"}, DocumentNotFound, "no such bucket"),
    ("no bucket is listed", LOCATION, {"s3_buckets": ""}, DocumentRefused, "name it in TASKS_S3_BUCKETS"),
    ("another tenant's bucket", "s3://private/a.txt", {}, DocumentRefused, "name it in TASKS_S3_BUCKETS"),
    (
        "another team's prefix",
        "s3://manuals/team-ab/other.txt",
        {"s3_buckets": "manuals/team-a"},
        DocumentRefused,
        "may not read that bucket or prefix",
    ),
    (
        "an account without the right",
        LOCATION,
        {"s3_access_key_id": "stranger", "s3_secret_access_key": "secret-of-the-stranger"},
        DocumentRefused,
        "give the account the right to read it",
    ),
    ("anonymous", LOCATION, {"s3_anonymous": True}, DocumentRefused, "give the account the right to read it"),
    ("unknown account", LOCATION, {"s3_access_key_id": "nobody"}, SourceUnavailable, "403 InvalidAccessKeyId; correct"),
    ("wrong secret", LOCATION, {"s3_secret_access_key": "x"}, SourceUnavailable, "403 SignatureDoesNotMatch; correct"),
    ("wrong region", LOCATION, {"s3_region": "eu-west-7"}, SourceUnavailable, "TASKS_S3_REGION"),
    ("unknown authority", LOCATION, {"source_ca": None}, SourceUnavailable, "put it into TASKS_SOURCE_CA"),
    ("nobody there", LOCATION, {"s3_endpoint": "http://127.0.0.1:1"}, SourceUnavailable, "Connect"),
]


@pytest.mark.parametrize(
    ("location", "changes", "error", "message"), [case[1:] for case in FAILURES], ids=[case[0] for case in FAILURES]
)
async def test_what_cannot_be_read_has_a_reason(
    store: ObjectStore, location: str, changes: dict[str, Any], error: type[TaskError], message: str
) -> None:
    with pytest.raises(error) as failure:
        await fetched(store, location, **changes)
    assert type(failure.value) is error
    assert failure.value.message.startswith("cannot ")
    assert message in failure.value.message
    assert not any(secret in repr(failure.value) for secret in ("X-Amz", "secret-of", "<Error>"))
    assert failure.value.__context__ is None or "X-Amz" not in repr(failure.value.__context__)


@pytest.mark.parametrize(
    "entry", ["manuals", "manuals/", "manuals/team-a", "manuals/team-a/", "other,manuals", "other\nmanuals"]
)
async def test_buckets_are_listed_whole_or_by_prefix(store: ObjectStore, entry: str) -> None:
    assert await fetched(store, s3_buckets=entry) == b"of team a"


def _at(store: ObjectStore, **changes: Any) -> Settings:
    return Settings.model_validate({"postgres_url": "postgresql://unused", **store.settings(**changes)})


async def test_a_prefix_lists_the_objects_below_it_by_names_that_can_be_fetched(store: ObjectStore) -> None:
    before = os.environ.get("SSL_CERT_FILE")
    found = await list_objects("s3://manuals/team-a/", settings=_at(store), most=10)
    assert found == [LOCATION]
    assert await fetched(store, found[0]) == b"of team a"
    whole = await list_objects("s3://manuals/", settings=_at(store), most=10)
    assert {LOCATION, "s3://manuals/team-ab/other.txt"} <= set(whole)
    assert await list_objects("s3://manuals/nothing/", settings=_at(store), most=10) == []
    assert os.environ.get("SSL_CERT_FILE") == before


LISTINGS: list[tuple[str, str, dict[str, Any], type[TaskError], str]] = [
    ("no bucket", "s3://nowhere/", {"s3_buckets": "nowhere"}, DocumentNotFound, "no such bucket"),
    ("no bucket is listed", "s3://manuals/", {"s3_buckets": ""}, DocumentRefused, "name it in TASKS_S3_BUCKETS"),
    ("above what may be read", "s3://manuals/", {"s3_buckets": "manuals/team-a"}, DocumentRefused, "may not read"),
    ("wrong secret", "s3://manuals/", {"s3_secret_access_key": "x"}, SourceUnavailable, "403 SignatureDoesNotMatch"),
    ("no account", "s3://manuals/", {"s3_access_key_id": None}, SourceUnavailable, "are not set"),
    ("not trusted", "s3://manuals/", {"source_ca": None}, SourceUnavailable, "does not answer"),
    ("nobody there", "s3://manuals/", {"s3_endpoint": "http://127.0.0.1:1"}, SourceUnavailable, "does not answer"),
]


@pytest.mark.parametrize(
    ("prefix", "changes", "error", "message"), [case[1:] for case in LISTINGS], ids=[case[0] for case in LISTINGS]
)
async def test_what_cannot_be_listed_has_a_reason(
    store: ObjectStore, prefix: str, changes: dict[str, Any], error: type[TaskError], message: str
) -> None:
    with pytest.raises(error) as failure:
        await list_objects(prefix, settings=_at(store, **changes), most=10)
    assert type(failure.value) is error
    assert message in failure.value.message
    assert not any(secret in repr(failure.value) for secret in ("X-Amz", "secret-of", "<Error>"))


async def test_the_account_is_that_of_the_settings_whatever_the_environment_says(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ambient = {
        "AWS_ACCESS_KEY_ID": "ambient",
        "AWS_SECRET_ACCESS_KEY": "ambient",
        "AWS_SESSION_TOKEN": "ambient",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_REGION": "eu-west-7",
        "AWS_SKIP_SIGNATURE": "true",
        "HTTPS_PROXY": "http://127.0.0.1:1",
    }
    for name, value in ambient.items():
        monkeypatch.setenv(name, value)
    assert await fetched(store) == b"of team a"


# ------------------------------------------------------------------------------------------------------ whole pipeline


def text(count: int) -> bytes:
    return "\n\n".join(f"Sentence {number}".ljust(90, ".") + " end." for number in range(count)).encode()


async def test_an_object_is_published_and_found_unchanged_and_replaced(lab: Lab, store: ObjectStore) -> None:
    location = "s3://manuals/published.txt"
    store.write(location, text(40))
    task = lab.task(location, at=0)
    outcome, code = await lab.run(task, **store.settings())
    assert (code, outcome.reason) == (ExitCode.SUCCEEDED, "Completed"), outcome
    in_vectors, in_texts = await lab.contents(location)
    assert in_vectors == in_texts
    assert len(in_vectors) == 40
    assert {row["source_sha256"] for row in in_vectors} == {hashlib.sha256(text(40)).hexdigest()}

    outcome, _ = await lab.run(lab.task(location, at=1), **store.settings())
    assert outcome.reason == "Unchanged"
    store.write(location, text(41))
    outcome, _ = await lab.run(lab.task(location, at=2), **store.settings())
    assert outcome.result is not None
    assert (outcome.reason, outcome.result.embedded, outcome.result.reused) == ("Completed", 1, 40)


async def test_the_same_bytes_from_a_volume_and_from_a_bucket_are_the_same_document(lab: Lab, store: ObjectStore) -> None:
    store.write("s3://manuals/same.txt", text(5))
    (lab.documents / "same.txt").write_bytes(text(5))
    await lab.run(lab.task("same.txt", documentId="same", at=0))
    outcome, _ = await lab.run(lab.task("s3://manuals/same.txt", documentId="same", at=1), **store.settings())
    assert outcome.reason == "Unchanged"


async def test_a_process_of_its_own_says_nothing_of_signatures_and_secrets(lab: Lab, store: ObjectStore) -> None:
    location = "s3://manuals/process.txt"
    store.write(location, text(5))
    lab.embedder = PackagedEmbedder()
    lab.take_own_knowledge_base()
    given = {f"TASKS_{name.upper()}": str(value) for name, value in store.settings().items()}
    environment = given | {"TASKS_LOG_LEVEL": "info", "PYTHONASYNCIODEBUG": "1"}
    process = lab.command("job_runner", "run", lab.task_file(lab.task(location)), environment=environment)
    said = await asyncio.to_thread(process.communicate, timeout=60)
    assert process.returncode == 0, said
    assert "stage ended" in said[1]
    message = (lab.folder / "termination-log").read_text()
    assert not any(secret in f"{said}{message}" for secret in ("X-Amz", "secret-of-the-owner"))


@pytest.mark.parametrize(
    ("location", "changes", "expected"),
    [
        ("s3://manuals/none.txt", {}, (ExitCode.PERMANENT, Outcome.FAILED, "DocumentNotFound", "fetch")),
        ("s3://private/a.txt", {}, (ExitCode.PERMANENT, Outcome.FAILED, "DocumentRefused", "fetch")),
        (LOCATION, {"s3_region": "x"}, (ExitCode.STORE_UNAVAILABLE, Outcome.GIVEN_BACK, "SourceUnavailable", "fetch")),
        ("https://127.0.0.1/a", {}, (ExitCode.PERMANENT, Outcome.FAILED, "DocumentRefused", "fetch")),
    ],
)
async def test_how_an_attempt_ends_when_the_document_cannot_be_had(
    lab: Lab, store: ObjectStore, location: str, changes: dict[str, Any], expected: tuple[object, ...]
) -> None:
    await lab.stores.vectors.ensure()  # by name alone, this is the first test of the knowledge base
    await lab.stores.texts.ensure()
    outcome, code = await lab.run(lab.task(location), **store.settings(**changes))
    assert outcome.error is not None
    assert (code, outcome.outcome, outcome.reason, outcome.error.stage) == expected
    assert await lab.versions(location) == {}


@pytest.fixture
async def server() -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """An HTTPS server on 127.0.0.1; its URL, and the settings that allow it."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    async def handle(request: web.Request) -> web.Response:
        return web.Response(body=text(10), content_type="application/octet-stream")

    application = web.Application()
    application.router.add_get("/手册.txt", handle)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    port = runner.addresses[0][1]
    pem = authority.cert_pem.bytes().decode()
    yield f"https://127.0.0.1:{port}/手册.txt", {"source_allow": "127.0.0.1", "source_ports": str(port), "source_ca": pem}
    await runner.cleanup()


async def test_a_document_behind_https_is_published(lab: Lab, server: tuple[str, dict[str, Any]]) -> None:
    location, settings = server
    outcome, code = await lab.run(lab.task(location), **settings)
    assert (code, outcome.reason) == (ExitCode.SUCCEEDED, "Completed"), outcome
    in_vectors, in_texts = await lab.contents(location)
    assert in_vectors == in_texts
    assert len(in_vectors) == 10
    assert json.dumps(in_vectors).count("https://") == len(in_vectors), "only as the identity of the document"


class _Refusing(http.server.BaseHTTPRequestHandler):
    """Refuses, says that this ends the connection, and does not end it."""

    protocol_version = "HTTP/1.1"
    enough = threading.Event()

    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "2")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"no")
        self.enough.wait(20)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as the library has it
        pass


def test_no_connection_outlives_an_answer_that_was_to_end_it() -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        serving.start()
        port = server.server_address[1]
        settings = Settings(
            postgres_url=SecretStr("postgresql://unused"),
            source_allow="127.0.0.1",
            source_ports=str(port),
            source_ca=authority.cert_pem.bytes().decode(),
        )
        with pytest.raises(DocumentRefused, match="403"):
            asyncio.run(download(f"https://127.0.0.1:{port}/a", settings=settings))
        gc.collect()  # what was left open warns, and warnings are errors
        _Refusing.enough.set()
        server.shutdown()
        serving.join()
