"""What every request passes through, on a real socket, with handlers that fail in every way."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from task_gateway.app import Gate, make_app
from task_gateway.callers import Callers
from task_gateway.database import DatabaseUnavailable
from task_gateway.limits import RateLimit
from task_gateway.metrics import Metrics
from task_gateway.problems import Problem
from task_gateway.routes import Route, answer
from task_platform.kubernetes import Unavailable

pytestmark = pytest.mark.integration

FAILURES: dict[str, tuple[Exception, int, str]] = {
    "problem": (Problem(409, "conflict", "cannot do that"), 409, "conflict"),
    "fault": (RuntimeError("a secret of ours"), 500, "internal"),
    "cluster": (Unavailable("cannot ask 10.0.0.1", status=0), 503, "unavailable"),
    "database": (DatabaseUnavailable("cannot ask postgresql://user:secret@host"), 503, "unavailable"),
    "http": (web.HTTPExpectationFailed(), 417, "invalid-request"),
    "large": (web.HTTPRequestEntityTooLarge(1, 2), 413, "too-large"),
}


class Failing:
    """A part whose handlers fail."""

    def routes(self) -> Sequence[Route]:
        async def fail(request: web.Request) -> web.StreamResponse:
            raise FAILURES[request.match_info["how"]][0]

        async def succeed(request: web.Request) -> web.StreamResponse:
            return answer({"text": "x" * 5000})

        return (
            Route("GET", "/fail/{how}", fail, "It fails", {}),
            Route("GET", "/large", succeed, "It is large", {}),
            Route("GET", "/public", succeed, "For everybody", {}, public=True),
        )


@pytest.fixture
async def url() -> AsyncIterator[str]:
    nobody: Any = None
    callers = Callers(reviews=nobody, tickets=nobody, trusting=True, namespaces=(), default_namespace="default")
    gate = Gate(callers=callers, limit=RateLimit(rate=0.001, burst=len(FAILURES) + 1.5), metrics=Metrics())
    runner = web.AppRunner(make_app(gate, [Failing()]), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_whatever_fails_is_a_problem_that_gives_nothing_away_and_the_next_request_is_served(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        for how, (_, status, kind) in FAILURES.items():
            async with session.get(f"{url}/fail/{how}") as response:
                body = await response.json(content_type="application/problem+json")
                assert (response.status, body["status"]) == (status, status)
                assert body["type"].endswith(f"/{kind}")
                assert body["request_id"] == response.headers["X-Request-Id"]
                assert "secret" not in str(body)
                assert "10.0.0.1" not in str(body)
                assert ("Retry-After" in response.headers) == (status == 503)
                assert response.headers["X-Content-Type-Options"] == "nosniff"
        async with session.get(f"{url}/large", headers={"Accept-Encoding": "identity"}) as response:
            assert (response.status, response.headers.get("Content-Encoding")) == (200, None)
        async with session.get(f"{url}/large", headers={"Accept-Encoding": "gzip"}) as response:
            assert (response.status, response.headers["Content-Encoding"]) == (200, "gzip")
        async with session.get(f"{url}/large") as response:
            assert response.status == 429
        async with session.get(f"{url}/public") as response:
            assert response.status == 200, "probes are not limited"
