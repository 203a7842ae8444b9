"""Documents from real HTTP servers, well-behaved and not: what is kept, what is refused, and that it ends."""

import asyncio
import contextlib
import hashlib
import os
import resource
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web

from job_runner.document import Kind
from job_runner.fetch import inspected
from job_runner.parse import ParserLimits, parse
from job_runner.remote import download
from job_runner.settings import Settings
from task_contract.errors import DocumentNotFound, DocumentRefused, SourceUnavailable, StoreUnavailable, TaskError

pytestmark = pytest.mark.integration

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SECRET = "body-that-nobody-may-see"
LIMIT = 1 << 20


class Names:
    """Stands in for the resolver: answers one after the other, the last one for ever."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        return [self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]]


def settings(port: int, **changes: Any) -> Settings:
    given = {
        "postgres_url": "postgresql://unused",
        "source_allow": "127.0.0.2",
        "source_ports": str(port),
        "source_allow_http": True,
        "source_seconds": 20,
        "max_document_bytes": LIMIT,
    }
    return Settings.model_validate(given | changes)


async def fetched(location: str, names: Names | None = None, **changes: Any) -> bytes:
    """Fetch with 127.0.0.2 allowed, and the names of the test leading there."""
    port = int(location.split("/")[2].rpartition(":")[2])
    descriptor = await download(location, settings=settings(port, **changes), resolve=names or Names("127.0.0.2"))
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


class Site:
    """A server on 127.0.0.1 and 127.0.0.2 at one port; counts its requests by the address that they came to."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.port = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self.requests.append((request.transport.get_extra_info("sockname")[0], request.path_qs))
        self.headers.append(dict(request.headers))
        return await self.handlers[request.path](request)

    def url(self, path: str, host: str = "files.example.com") -> str:
        return f"http://{host}:{self.port}{path}"


async def serve(site: Site, context: ssl.SSLContext | None = None) -> web.AppRunner:
    application = web.Application()
    application.router.add_route("*", "/{tail:.*}", site.handle)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    first = web.TCPSite(runner, "127.0.0.2", 0, ssl_context=context)
    await first.start()
    site.port = runner.addresses[0][1]
    await web.TCPSite(runner, "127.0.0.1", site.port, ssl_context=context).start()
    return runner


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    runner = await serve(site)
    yield site
    await runner.cleanup()


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file has no name, and what is not handed over is closed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # who used a proxy would fail
    yield
    assert list(tmp_path.iterdir()) == []


def answer(body: bytes = b"", status: int = 200, **headers: str) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return handler


# ---------------------------------------------------------------------------------------------------------------- good


async def test_a_document_goes_the_way_of_a_mounted_file(site: Site) -> None:
    body = "# 手册\n\n知识库。".encode() * 10_000
    site.handlers["/目录/手册 1.md"] = answer(body)
    location = site.url("/目录/手册 1.md")
    descriptor = await download(location, settings=settings(site.port), resolve=Names("127.0.0.2"))
    with inspected(descriptor, name=location, max_bytes=LIMIT) as source:
        assert source.sha256 == hashlib.sha256(body).hexdigest()
        assert (source.size, source.kind, source.name) == (len(body), Kind.MARKDOWN, location)
        source.check_unchanged()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert site.headers[0]["Accept-Encoding"] == "identity"
    assert {"Authorization", "Cookie"}.isdisjoint(site.headers[0])


EXAMPLES = Path(__file__).resolve().parents[2] / "examples/documents"
KINDS = ["handbook.pdf", "laboratory-rules.zh.docx", "tide-station.html", "operations-guide.zh.md"]


@pytest.mark.parametrize("name", KINDS)
async def test_documents_of_every_kind_are_parsed_without_a_name(site: Site, name: str) -> None:
    site.handlers["/a"] = answer((EXAMPLES / name).read_bytes())
    limits = ParserLimits(memory_bytes=1 << 30, seconds=60, cpu_seconds=60, output_bytes=1 << 24)
    texts = []
    for descriptor in (
        await download(site.url("/a"), settings=settings(site.port), resolve=Names("127.0.0.2")),
        os.open(EXAMPLES / name, os.O_RDONLY),
    ):
        with inspected(descriptor, name=name, max_bytes=LIMIT) as source:
            texts.append((await parse(source, limits=limits, on_progress=lambda done, total: None)).text)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 500


async def test_encoded_characters_reach_the_server_as_they_are(site: Site) -> None:
    site.handlers["/a b/c"] = answer(b"x")
    await fetched(site.url("/a%20b%2Fc"))
    assert site.requests[0][1] == "/a%20b%2Fc"


async def test_a_body_without_length_is_kept_whole(site: Site) -> None:
    async def chunked(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(10):
            await response.write(b"x" * 1000)
        return response

    site.handlers["/a"] = chunked
    assert await fetched(site.url("/a")) == b"x" * 10_000


async def test_a_document_of_exactly_the_limit_is_kept(site: Site) -> None:
    site.handlers["/a"] = answer(b"x" * LIMIT)
    assert len(await fetched(site.url("/a"))) == LIMIT


async def test_an_encoded_body_is_not_inflated(site: Site) -> None:
    site.handlers["/a"] = answer(b"\x1f\x8bnot really", Content_Encoding="gzip")
    assert await fetched(site.url("/a")) == b"\x1f\x8bnot really"


# ------------------------------------------------------------------------------------------------------------- answers

ANSWERS: list[tuple[int, dict[str, str], type[TaskError], str]] = [
    (404, {}, DocumentNotFound, "the server answered 404; correct payload.filePath"),
    (410, {}, DocumentNotFound, "410"),
    (401, {"WWW_Authenticate": "Basic"}, DocumentRefused, "it wants credentials"),
    (403, {}, DocumentRefused, "it wants credentials"),
    (400, {}, DocumentRefused, "the server answered 400"),
    (204, {}, DocumentRefused, "the server answered 204"),
    (304, {}, DocumentRefused, "the server answered 304"),
    (451, {}, DocumentRefused, "the server answered 451"),
    (408, {}, SourceUnavailable, "408"),
    (429, {"Retry_After": "120"}, SourceUnavailable, "answered 429, and asks to wait 120 s"),
    (429, {"Retry_After": SECRET}, SourceUnavailable, "answered 429; look at the server"),
    (500, {}, SourceUnavailable, "500"),
    (503, {"Retry_After": "5"}, SourceUnavailable, "503, and asks to wait 5 s"),
]


@pytest.mark.parametrize(("status", "headers", "error", "message"), ANSWERS)
async def test_other_answers_have_a_reason_and_never_show_their_body(
    site: Site, status: int, headers: dict[str, str], error: type[TaskError], message: str
) -> None:
    body = b"" if status in {204, 304} else f"<Error><Code>{SECRET}</Code></Error>{SECRET}".encode()
    site.handlers["/a"] = answer(body, status, **headers)
    with pytest.raises(error) as failure:
        await fetched(site.url("/a"))
    assert type(failure.value) is error
    assert failure.value.message.startswith("cannot f")
    assert message in failure.value.message
    assert SECRET not in failure.value.message


# ----------------------------------------------------------------------------------------------------------- redirects


def redirect(to: str, status: int = 302) -> Handler:
    return answer(b"", status, Location=to)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed_and_each_is_checked_anew(site: Site, status: int) -> None:
    site.handlers |= {"/a": redirect("/b?signature=1#there", status), "/b": answer(b"found")}
    names = Names("127.0.0.2")
    assert await fetched(site.url("/a"), names) == b"found"
    assert [path for _, path in site.requests] == ["/a", "/b?signature=1"]
    assert names.asked == ["files.example.com.", "files.example.com."]


@pytest.mark.parametrize(
    ("to", "error", "message"),
    [
        ("http://127.0.0.1:{port}/secret", DocumentRefused, "cannot fetch from 127.0.0.1: it is not a public address"),
        ("//127.0.0.1:{port}/secret", DocumentRefused, "127.0.0.1"),
        ("http://[::1]:{port}/secret", DocumentRefused, "::1"),
        ("http://2130706433:{port}/secret", DocumentRefused, "its usual form"),
        ("http://localhost:{port}/secret", DocumentRefused, "localhost: it is a name inside"),
        ("http://kubernetes.default.svc:{port}/secret", DocumentRefused, "a name inside the cluster"),
        ("http://169.254.169.254:{port}/latest", DocumentRefused, "it is a metadata service"),
        ("http://user:pass@files.example.com:{port}/secret", DocumentRefused, "carries user and password"),
        ("http://files.example.com:22/secret", DocumentRefused, "port 22 is not allowed"),
        ("file:///etc/passwd", DocumentRefused, "no proper host"),
        ("gopher://files.example.com:{port}/", DocumentRefused, "gopher is not allowed"),
        ("http://[", DocumentRefused, "it redirects to no URL"),
        ("/a", DocumentRefused, "more than 3 redirects"),
    ],
)
async def test_redirects_lead_nowhere_that_the_task_could_not_name(
    site: Site, to: str, error: type[TaskError], message: str
) -> None:
    site.handlers |= {"/a": redirect(to.format(port=site.port)), "/secret": answer(SECRET.encode())}
    with pytest.raises(error) as failure:
        await fetched(site.url("/a"))
    assert message in failure.value.message
    assert "pass@" not in failure.value.message
    assert all(path == "/a" for _, path in site.requests)


async def test_a_name_that_points_elsewhere_later_changes_nothing(site: Site) -> None:
    site.handlers |= {"/a": answer(b"checked"), "/b": redirect("/a")}
    names = Names("127.0.0.2", "127.0.0.1")
    assert await fetched(site.url("/a"), names) == b"checked"
    assert (site.requests, names.asked) == ([("127.0.0.2", "/a")], ["files.example.com."])
    with pytest.raises(DocumentRefused, match="not a public address"):
        await fetched(site.url("/b"), Names("127.0.0.2", "127.0.0.1"))
    assert site.requests[1:] == [("127.0.0.2", "/b")], "the second request was refused before it was made"


async def test_nothing_is_asked_of_a_place_that_is_refused(site: Site) -> None:
    site.handlers["/a"] = answer(b"x")
    for host in ("127.0.0.1", "localhost", "files.example.com"):
        with pytest.raises(DocumentRefused):
            await fetched(site.url("/a", host), Names("127.0.0.1"))
    with pytest.raises(DocumentRefused, match="http is not allowed"):
        await fetched(site.url("/a"), source_allow_http=False)
    with pytest.raises(DocumentRefused, match="TASKS_SOURCE_PORTS"):
        await fetched(site.url("/a"), source_ports="443")
    assert site.requests == []


# ------------------------------------------------------------------------------------------------------------- hostile


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def raw(talk: Talk) -> AsyncIterator[str]:
    """Give the URL of a server that says what it likes once it has seen a request."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.2", 0)
    async with server:
        yield f"http://files.example.com:{server.sockets[0].getsockname()[1]}/a"


async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def trickle_headers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(10_000):
        writer.write(b"X-%d: x\r\n" % number)
        await writer.drain()
        await asyncio.sleep(0.02)


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x" * 65_536)
        await writer.drain()


def says(data: bytes) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return talk


HOSTILE: list[tuple[str, Talk, type[TaskError], str]] = [
    ("a byte now and then", trickle, SourceUnavailable, "within 0.5 s; look at the server or raise TASKS_SOURCE_SECONDS"),
    ("a header now and then", trickle_headers, SourceUnavailable, "within 0.5 s"),
    ("nothing", silence, SourceUnavailable, "within 0.5 s"),
    ("no end", endless, DocumentRefused, f"more than {LIMIT} bytes; split it, or raise TASKS_MAX_DOCUMENT_BYTES"),
    (
        "a length over the limit",
        says(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\n"),
        DocumentRefused,
        "more than",
    ),
    ("less than it says", says(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort"), SourceUnavailable, "was cut off"),
    (
        "half a chunk",
        says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nshort"),
        SourceUnavailable,
        "was cut off",
    ),
    (
        "two lengths",
        says(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
        SourceUnavailable,
        "no HTTP",
    ),
    ("another protocol", says(b"220 mail.example.com ESMTP " + SECRET.encode() + b"\r\n"), SourceUnavailable, "no HTTP"),
    ("a huge header", says(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"), SourceUnavailable, "no HTTP"),
    ("nothing and good-bye", says(b""), SourceUnavailable, "look at the server"),
]


@pytest.mark.parametrize(("talk", "error", "message"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
async def test_a_hostile_server_ends_as_an_error_within_the_limits(talk: Talk, error: type[TaskError], message: str) -> None:
    started = time.monotonic()
    async with raw(talk) as location:
        with pytest.raises(error) as failure:
            await fetched(location, source_seconds=0.5 if "0.5" in message else 20)
    assert message in failure.value.message
    assert SECRET not in failure.value.message
    assert time.monotonic() - started < 10


async def test_more_than_the_length_says_is_never_kept() -> None:
    async with raw(says(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nshort, and more")) as location:
        kept = b"short"
        with contextlib.suppress(SourceUnavailable):  # when both come in one piece, it is no HTTP
            kept = await fetched(location)
        assert kept == b"short"


async def test_a_server_that_is_not_there() -> None:
    with pytest.raises(SourceUnavailable, match=r"Connect.* refused"):
        await fetched("http://files.example.com:1/a")


def open_files() -> list[str]:
    return [os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()]


async def test_no_descriptor_stays_open_when_it_fails(site: Site) -> None:
    site.handlers["/a"] = answer(b"x" * (LIMIT + 1))
    with pytest.raises(DocumentRefused):
        await fetched(site.url("/a"))
    assert not [path for path in open_files() if tempfile.gettempdir() in path]


async def test_a_full_disk_is_not_the_tasks_fault(site: Site) -> None:
    site.handlers["/a"] = answer(b"x" * LIMIT)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT // 2, hard))
    try:
        with pytest.raises(StoreUnavailable, match=r"cannot keep http://files\.example\.com.*no room in.*make room"):
            await fetched(site.url("/a"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_canceled_download_leaves_nothing() -> None:
    async with raw(trickle) as location:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(fetched(location), 0.3)


# ----------------------------------------------------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def secure(authority: trustme.CA) -> AsyncIterator[Site]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("files.example.com").configure_cert(context)
    site = Site()
    site.handlers["/a"] = answer(b"secure")
    runner = await serve(site, context)
    yield site
    await runner.cleanup()


async def test_tls_is_verified_against_the_system_and_the_authority_of_the_settings(
    secure: Site, authority: trustme.CA
) -> None:
    pem = authority.cert_pem.bytes().decode()
    location = secure.url("/a").replace("http://", "https://")
    assert await fetched(location, source_ca=pem, source_allow_http=False) == b"secure"
    with pytest.raises(DocumentRefused) as failure:
        await fetched(location)
    assert "unable to get local issuer certificate; if its authority is your own, put it into TASKS_SOURCE_CA" in str(
        failure.value
    )
    other = trustme.CA().cert_pem.bytes().decode()
    with pytest.raises(DocumentRefused, match="cannot trust the server"):
        await fetched(location, source_ca=other)
    with pytest.raises(DocumentRefused, match="Hostname mismatch"):
        await fetched(location.replace("files.", "other."), source_ca=pem)
    assert [path for _, path in secure.requests] == ["/a"]


async def test_a_server_without_tls_at_an_https_url(site: Site) -> None:
    with pytest.raises((DocumentRefused, SourceUnavailable), match="cannot"):
        await fetched(site.url("/a").replace("http://", "https://"))
    assert site.requests == []


async def test_a_redirect_never_leads_from_https_to_http(secure: Site, authority: trustme.CA) -> None:
    secure.handlers["/b"] = redirect(secure.url("/a"))
    with pytest.raises(DocumentRefused, match="redirects from https to http"):
        await fetched(secure.url("/b").replace("http://", "https://"), source_ca=authority.cert_pem.bytes().decode())
