"""The code that callers copy runs as it stands: docs/client.md, and the Python of the platform's architecture document.

The document's snippets lie in tests/data/platform. What stands around them there, and what they import without saying so, is
given here; not a letter of them is changed.
"""

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any  # the document's own

import httpx
import pytest
import pytest_asyncio
from aiohttp import web

from devstack import Endpoints
from service_client import CallConfig, CallMethod, call_service
from tests.docs.blocks import ROOT, blocks
from tests.support.client_world import World
from tests.support.databases import fresh_database
from tests.support.devstack import Kubectl

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

DOCUMENT = ROOT / "tests/data/platform/architecture.zh.md"
PAGE = ROOT / "docs/client.md"
PATH = ":".join(str(ROOT / part) for part in ("crds", "client"))


@pytest.fixture(scope="module")
def database_url(stores: Endpoints) -> Iterator[str]:
    with fresh_database(stores.host_urls["TASKS_POSTGRES_URL"], prefix="client") as url:
        yield url


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    cluster: Endpoints, kubectl: Kubectl, database_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("page")
    async with World.open(cluster, postgres=database_url, folder=folder, trusting=True) as world:
        yield world


def snippet(function: str) -> str:
    """Return the block of the document that defines a function."""
    found: list[str] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    return next(text for text in found if f"async def {function}(" in text)


def defined(function: str, **around: Any) -> Any:
    """Run the block of the document that defines a function, and return the function."""
    names: dict[str, Any] = dict(around)
    exec(compile(snippet(function), str(DOCUMENT), "exec"), names)
    return names[function]


@pytest.fixture
def at_port_8084(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lead http://localhost:8084, which the snippets name, to the gateway's port: through the proxy that httpx asks for."""
    monkeypatch.setenv("http_proxy", world.gateway.url)
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("at_port_8084")
async def test_the_documents_service_submits_a_document(world: World) -> None:
    answer = await defined("process_document", httpx=httpx)("kb-1", "/data/handbook.pdf")
    assert answer["status"] == "submitted"
    task = await world.place.task(answer["task_id"])
    assert task is not None
    assert (task["spec"]["kbId"], task["spec"]["payload"]["filePath"]) == ("kb-1", "/data/handbook.pdf")


@pytest.mark.usefixtures("at_port_8084")
async def test_the_documents_service_submits_a_batch(world: World) -> None:
    answer = await defined("batch_knowledge_enhancement", httpx=httpx, List=list)(["kb-1", "kb-2"])
    # knowledge_indexing comes with a later version: each is told so in its place.
    assert [one["index"] for one in answer["items"]] == [0, 1]
    assert all(one["task"] or one["problem"]["detail"].startswith("cannot create the task") for one in answer["items"])


async def test_the_documents_client_submits_a_task(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples/alias"))
    for name in ("shared", "shared.service_client"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("TASK_MANAGER_SERVICE_URL", world.gateway.url)
    # The document uses CallConfig without importing it.
    submit = defined("submit_task", CallConfig=CallConfig)
    answer = await submit({"task_type": "health_check"})
    assert (answer["status"], answer["id"]) == ("queued", answer["task_id"])
    assert await world.place.task(answer["id"])


async def test_the_documents_callback_reaches_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[tuple[str, dict[str, Any]]] = []

    async def callback(request: web.Request) -> web.Response:
        came.append((request.match_info["task_id"], await request.json()))
        return web.json_response({})

    app = web.Application()
    app.router.add_post("/api/v1/tasks/{task_id}/callback", callback)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        monkeypatch.setenv("KNOWLEDGE_SERVICE_URL", f"http://127.0.0.1:{runner.addresses[0][1]}")
        around = {"call_service": call_service, "CallMethod": CallMethod, "datetime": datetime}
        await defined("task_completion_callback", **around)("task-1", {"chunks": 7})
    finally:
        await runner.cleanup()
    [(task_id, body)] = came
    assert task_id == body["task_id"] == "task-1"
    assert (body["status"], body["result"]) == ("completed", {"chunks": 7})


SAYS = {
    "from datetime": ["processing", "completed", "chunks=7"],
    "from service_client import TaskClient, TaskStatus": ["0 task-", "2 task-", "3 cannot create the task"],
    "import asyncio\nfrom contextlib": ["queued None 0", "canceled"],
    "from service_client import CallbackReceiver": ["401"],
    "import asyncio\n\nfrom service_client import CallConfig": ["task-"],
}
"""How a block of the page begins → what it prints."""


async def test_the_page_runs_as_it_stands(world: World, tmp_path: Path) -> None:
    python = [block for block in blocks(PAGE) if block.language == "python"]
    assert len(python) == len(SAYS)
    environment = {"PYTHONPATH": PATH, "PATH": "", "TASK_MANAGER_SERVICE_URL": world.gateway.url}
    for block in python:
        says = next(words for beginning, words in SAYS.items() if block.text.startswith(beginning))
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-W", "error", "-c", block.text],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, f"{block}:\n{done.stderr}"
        assert not [word for word in says if word not in done.stdout], f"{block} says:\n{done.stdout}"
