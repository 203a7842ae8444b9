"""Calls of services over real connections, in threads and in an event loop: times, streams, and what the line does."""

import asyncio
import gzip
import json
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from aiohttp import web

from service_client import (
    AsyncServiceClient,
    CallConfig,
    CallMethod,
    ServiceClient,
    ServiceError,
    ServiceRefused,
    ServiceTimeout,
    ServiceUnavailable,
    call_service,
    call_service_sync,
    programs,
)
from service_client.breaker import Breakers
from service_client.programs import Blocking, NoAnswer, Open, Program, Read, Request, TooLate, Waiting
from tests.support.servers import free_port

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Service:
    """Another service: how it answers is a function of the test's."""

    url: str = ""
    asked: list[web.Request] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    peers: list[Any] = field(default_factory=list)
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        self.bodies.append(await request.read())
        self.peers.append(request.transport.get_extra_info("peername") if request.transport else None)
        if self.answer is not None:
            return await self.answer(request)
        return web.json_response({"method": request.method, "path": request.path_qs})


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    service = Service()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", service.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    service.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield service
    await runner.cleanup()


Ask = Callable[..., Awaitable[Any]]


@pytest.fixture(params=["in a thread", "in an event loop"])
def ask(request: pytest.FixtureRequest, service: Service) -> Ask:
    """Call the service, by either function."""

    async def ask(method: str = "POST", path: str = "/a", **options: Any) -> Any:
        given: dict[str, Any] = {"url": service.url, "config": CallConfig(timeout=5, retry_times=0)} | options
        if request.param == "in a thread":
            return await asyncio.to_thread(call_service_sync, "other", method, path, **given)
        return await call_service("other", method, path, **given)

    return ask


async def test_a_call_takes_json_and_returns_it(ask: Ask, service: Service) -> None:
    answer = await ask("POST", "/a", json={"名": 1}, params={"b": [1, 2]}, idempotency_key="k")
    assert answer == {"method": "POST", "path": "/a?b=1&b=2"}
    assert json.loads(service.bodies[0]) == {"名": 1}
    assert service.asked[0].headers["Idempotency-Key"] == "k"
    assert service.asked[0].headers["User-Agent"].startswith("processing-tasks-client/")


async def test_an_answer_may_be_packed_and_may_be_empty(ask: Ask, service: Service) -> None:
    async def packed(request: web.Request) -> web.Response:
        return web.Response(body=gzip.compress(b'{"a": 1}'), headers={"Content-Encoding": "gzip"})

    async def empty(request: web.Request) -> web.Response:
        return web.Response(status=204)

    service.answer = packed
    assert await ask() == {"a": 1}
    service.answer = empty
    assert await ask() is None


async def test_an_answer_that_never_ends_is_given_up(ask: Ask, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def bomb(request: web.Request) -> web.Response:
        return web.Response(body=gzip.compress(b"x" * 1_000_000), headers={"Content-Encoding": "gzip"})

    monkeypatch.setattr(programs, "MAX_ANSWER", 100_000)
    service.answer = bomb
    with pytest.raises(ServiceUnavailable, match="larger than 100000 bytes"):
        await ask()


@pytest.mark.parametrize("drips", [False, True], ids=["silent", "a byte now and then"])
async def test_the_time_is_kept(ask: Ask, service: Service, drips: bool) -> None:
    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if drips:
            await response.prepare(request)
        for _ in range(100):
            await asyncio.sleep(0.05)
            if drips:
                await response.write(b" ")
        return response

    service.answer = slow
    begun = time.monotonic()
    with pytest.raises(ServiceTimeout, match=r"cannot POST /a of other: no answer in 0\.5 s"):
        await ask(config=CallConfig(timeout=0.5))
    assert time.monotonic() - begun < 1.5
    assert len(service.asked) == 1


async def test_a_connection_that_breaks_off_is_tried_again_where_that_is_safe(ask: Ask, service: Service) -> None:
    async def breaks_once(request: web.Request) -> web.StreamResponse:
        if len(service.asked) > 1:
            return web.json_response({"tries": len(service.asked)})
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    service.answer = breaks_once
    assert await ask("GET", config=CallConfig(timeout=5, retry_times=1)) == {"tries": 2}
    service.asked.clear()
    with pytest.raises(ServiceUnavailable, match="it may have been done"):
        await ask("POST", config=CallConfig(timeout=5, retry_times=1))
    assert len(service.asked) == 1


async def test_a_service_that_is_not_there_was_sent_nothing(ask: Ask) -> None:
    with pytest.raises(ServiceUnavailable, match="3 times; nothing was sent"):
        await ask("POST", url=f"http://127.0.0.1:{free_port()}", config=CallConfig(timeout=5, retry_times=2))


async def test_a_redirect_is_not_followed(ask: Ask, service: Service) -> None:
    async def moved(request: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": f"{service.url}/elsewhere"})

    service.answer = moved
    with pytest.raises(ServiceRefused, match="is not followed"):
        await ask()
    assert len(service.asked) == 1


async def test_a_request_that_is_none_is_not_sent(ask: Ask, service: Service) -> None:
    with pytest.raises(ValueError, match="Illegal header value"):
        await ask(headers={"X-Team": "a\r\nX-Other: b"})
    assert service.asked == []


async def test_a_problem_is_told(ask: Ask, service: Service) -> None:
    async def refuses(request: web.Request) -> web.Response:
        problem = {"type": "https://example.com/p", "detail": "too much", "errors": [{"field": "a", "message": "b"}]}
        return web.json_response(problem, status=422, content_type="application/problem+json")

    service.answer = refuses
    with pytest.raises(ServiceRefused, match="422 too much") as caught:
        await ask()
    assert caught.value.problem is not None
    assert caught.value.problem.errors[0].field == "a"


async def test_services_are_found_by_the_environment(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNOWLEDGE_SERVICE_URL", service.url)
    assert await call_service("knowledge-service", CallMethod.GET, "/x") == {"method": "GET", "path": "/x"}


async def test_a_client_keeps_its_connection(service: Service) -> None:
    async with AsyncServiceClient() as client:
        await client.call("a", "GET", "/1", url=service.url)
        await client.call("a", "GET", "/2", url=service.url)
    with ServiceClient() as blocking:
        for path in ("/3", "/4"):
            await asyncio.to_thread(blocking.call, "a", "GET", path, url=service.url)
    assert service.peers[0] == service.peers[1] != service.peers[2] == service.peers[3]


async def test_a_caller_that_is_cancelled_leaves_at_once_and_opens_no_circuit(service: Service) -> None:
    waits = asyncio.Event()

    async def never(request: web.Request) -> web.StreamResponse:
        waits.set()
        await asyncio.sleep(60)
        return web.Response()

    service.answer = never
    breakers = Breakers()
    async with AsyncServiceClient(breakers=breakers) as client:
        calling = asyncio.create_task(client.call("a", "GET", "/", url=service.url))
        await asyncio.wait_for(waits.wait(), 5)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
    assert breakers.of(service.url).failures == 0


async def test_a_service_that_is_down_is_cut_off_until_it_answers(service: Service) -> None:
    async def down(request: web.Request) -> web.Response:
        return web.Response(status=503)

    now = [0.0]
    service.answer = down
    async with AsyncServiceClient(breakers=Breakers(lambda: now[0])) as client:
        for _ in range(9):
            with pytest.raises(ServiceError):
                await client.call("a", "POST", "/", url=service.url)
        assert len(service.asked) == 5
        service.answer = None
        now[0] = 60
        assert await client.call("a", "GET", "/", url=service.url)


def _stream(url: str, *, life: float | None, reads: int) -> Program[list[bytes]]:
    opened = yield Open(Request("GET", f"{url}/stream", seconds=10), life)
    found = []
    for _ in range(reads):
        found.append((yield Read(opened)))
    return found


@pytest.mark.parametrize("driver", ["in a thread", "in an event loop"])
async def test_a_stream_is_read_as_it_comes_and_ends_at_its_time(service: Service, driver: str) -> None:
    async def streams(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"one")
        await asyncio.sleep(60)
        return response

    async def run(program: Program[list[bytes]]) -> list[bytes]:
        if driver == "in a thread":
            return await asyncio.to_thread(Blocking().run, program)
        return await Waiting().run(program)

    service.answer = streams
    assert await run(_stream(service.url, life=None, reads=1)) == [b"one"]
    begun = time.monotonic()
    try:
        ended = await run(_stream(service.url, life=0.5, reads=2))
    except (TooLate, NoAnswer):
        ended = [b"one", b""]
    assert ended == [b"one", b""]
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("driver", ["in a thread", "in an event loop"])
async def test_a_stream_over_tls_ends_at_its_time_too(driver: str) -> None:
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    gone = asyncio.Event()

    async def streams(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"one")
        try:
            await asyncio.sleep(60)
        finally:
            gone.set()
        return response

    app = web.Application()
    app.router.add_get("/stream", streams)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "localhost", 0, ssl_context=server).start()
        program = _stream(f"https://localhost:{runner.addresses[0][1]}", life=0.5, reads=3)
        begun = time.monotonic()
        try:
            if driver == "in a thread":
                with httpx.Client(verify=client, trust_env=False) as http:
                    ended = await asyncio.to_thread(Blocking(http).run, program)
            else:
                async with httpx.AsyncClient(verify=client, trust_env=False) as waiting:
                    ended = await Waiting(waiting).run(program)
        except (TooLate, NoAnswer):
            ended = [b"one"]
        assert ended[0] == b"one"
        assert time.monotonic() - begun < 3
        await asyncio.wait_for(gone.wait(), 5)
    finally:
        await runner.cleanup()


def test_importing_the_client_is_light() -> None:
    """What it must not bring along, and what the document's import is served by."""
    script = (
        "import sys, service_client; "
        "heavy = {'kubernetes', 'aiohttp', 'redis', 'asyncpg', 'numpy', 'yaml'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "from shared.service_client import call_service, CallMethod; "
        "assert call_service is service_client.call_service\n"
        "sys.modules['kubernetes'] = None\n"  # as where the extra is not installed
        "try: service_client.TaskClient.over_kubernetes(namespace='n')\n"
        "except ImportError as error: assert 'processing-tasks[client-kubernetes]' in str(error)\n"
        "else: raise AssertionError('no error')"
    )
    path = ":".join(str(ROOT / part) for part in ("crds", "client", "examples/alias"))
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": path, "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
