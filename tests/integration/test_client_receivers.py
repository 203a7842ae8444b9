"""The receivers of examples/receivers, sent signed callbacks over HTTP."""

import importlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from service_client import CallbackReceiver
from task_contract.callbacks import callback_body
from task_contract.webhooks import sign
from tests.support.client_world import SECRETS

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
PATH = "/api/v1/tasks/task-1/callback"
BODY: dict[str, Any] = json.loads(
    callback_body(
        task_id="task-1",
        namespace="knowledge",
        uid="u",
        kb_id="kb",
        task_type="document_processing",
        phase="Completed",
        attempt=1,
        result={"chunks": 7},
        error=None,
        finished_at=datetime(2026, 1, 31, 9, 30, tzinfo=UTC),
    )
)

Serve = Callable[[Any, Any], AbstractAsyncContextManager[httpx.AsyncClient]]


@asynccontextmanager
async def with_aiohttp(module: Any, inbox: Any) -> AsyncIterator[httpx.AsyncClient]:
    runner = web.AppRunner(module.make_app(CallbackReceiver(SECRETS), inbox), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{runner.addresses[0][1]}", trust_env=False) as client:
            yield client
    finally:
        await runner.cleanup()


@asynccontextmanager
async def with_fastapi(module: Any, inbox: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(module.make_app(CallbackReceiver(SECRETS), inbox))
    async with httpx.AsyncClient(transport=transport, base_url="http://receiver") as client:
        yield client


@pytest.fixture(params=[("aiohttp_receiver", with_aiohttp), ("fastapi_receiver", with_fastapi)], ids=lambda one: one[0])
async def receiver(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[httpx.AsyncClient, Any]]:
    name, serve = request.param
    monkeypatch.syspath_prepend(str(ROOT / "examples/receivers"))
    for module in ("inbox", name):
        monkeypatch.delitem(sys.modules, module, raising=False)
    inbox = importlib.import_module("inbox").Inbox()
    async with serve(importlib.import_module(name), inbox) as client:
        yield client, inbox


def headers(body: bytes, *, message_id: str = "m1", key: bytes = b"secret", age: float = 0) -> dict[str, str]:
    signed = sign(body, message_id=message_id, timestamp=int(time.time() - age), secrets=[key])
    return signed | {"Content-Type": "application/json"}


async def test_a_callback_is_acted_on_once_however_often_it_comes(receiver: tuple[httpx.AsyncClient, Any]) -> None:
    client, inbox = receiver
    body = json.dumps(BODY).encode()
    first = await client.post(PATH, content=body, headers=headers(body))
    again = await client.post(PATH, content=body, headers=headers(body))
    assert [(one.status_code, one.json()) for one in (first, again)] == [(200, {"done": True}), (200, {"done": False})]
    assert inbox.documents() == [("task-1", "completed", 7)]
    other = json.dumps(BODY | {"task_id": "task-2", "status": "failed", "result": None}).encode()
    assert (await client.post(PATH, content=other, headers=headers(other, message_id="m2"))).json() == {"done": True}
    assert inbox.documents()[1] == ("task-2", "failed", None)


@pytest.mark.parametrize(
    ("changed", "status", "detail"),
    [
        ({"key": b"another"}, 401, "none of the secrets"),
        ({"age": 3600}, 401, "in the past by"),
    ],
)
async def test_what_is_not_to_be_believed_changes_nothing(
    receiver: tuple[httpx.AsyncClient, Any], changed: dict[str, Any], status: int, detail: str
) -> None:
    client, inbox = receiver
    body = json.dumps(BODY).encode()
    answer = await client.post(PATH, content=body, headers=headers(body, **changed))
    assert (answer.status_code, inbox.documents()) == (status, [])
    assert detail in answer.json()["detail"]
    assert (await client.post(PATH, content=body)).status_code == 401
    assert (await client.post(PATH, content=b"[]", headers=headers(b"[]"))).status_code == 422


def test_what_could_not_be_done_is_done_with_the_next_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples/receivers"))
    monkeypatch.delitem(sys.modules, "inbox", raising=False)
    module: Any = importlib.import_module("inbox")
    inbox, body = module.Inbox(), json.dumps(BODY).encode()
    event = CallbackReceiver(SECRETS).receive(body, headers(body))

    def fails(database: Any, event: Any) -> None:
        module.keep_document(database, event)
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        inbox.once(event, fails)
    assert inbox.documents() == []
    assert inbox.once(event, module.keep_document)
