"""A poison task, whose pod ends badly each time, on a real kubelet: it fails after its last attempt, and says why."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web

from devstack import Endpoints, images
from tests.support.operator_lab import Kube, OperatorProcess, Place, Proxy

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.timeout(600)]

SEGFAULT = "import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)"
IMPORT = "import a_module_of_another_release"
# What the runner's watchdog leaves of a library that holds the interpreter's lock.
LOCK = "import faulthandler, re; faulthandler.dump_traceback_later(1, exit=True); re.match(r'(x+x+)+y', 'x' * 64)"
MEMORY = "import time; print('reading', flush=True); x = bytearray(b'x') * (1 << 30); time.sleep(600)"
DISK = """
import os, time
print("writing", flush=True)
os.posix_fallocate(os.open("/tmp/big", os.O_CREAT | os.O_WRONLY), 0, 32 << 20)
time.sleep(600)
"""


class Poison(Proxy):
    """Puts another program in place of the runner into every Job, and a smaller volume."""

    def __init__(self, *arguments: Any, code: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._code = code

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        if request.method == "POST" and request.path.endswith("/jobs"):
            job = orjson.loads(body)
            pod = job["spec"]["template"]["spec"]
            [container] = pod["containers"]
            container["command"] = ["python3", "-c", self._code]
            del container["envFrom"]
            pod["volumes"][0]["emptyDir"]["sizeLimit"] = "16Mi"
            body = orjson.dumps(job)
        return await super()._forward(request, body)


@pytest.fixture
async def poisoned(kube: Kube, place: Place, node: Endpoints, tmp_path: Path) -> AsyncIterator[Any]:
    """Start an operator whose runner is a program; return its environment's maker."""
    base = images.base()
    await asyncio.to_thread(images.import_image, base)
    proxies = []

    async def start(code: str) -> OperatorProcess:
        proxy = Poison(kube.access, folder=tmp_path, code=code)
        await proxy.start()
        proxies.append(proxy)
        resources = {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "64Mi"}}
        return OperatorProcess(
            kubeconfig=proxy.kubeconfig,
            namespaces=[place.namespace],
            folder=tmp_path,
            OPERATOR_RUNNER_IMAGE=base.reference,
            OPERATOR_RUNNER_IMAGE_PULL_POLICY="Never",
            OPERATOR_RUNNER_NODE_SELECTOR="{}",
            OPERATOR_RUNNER_RESOURCES=orjson.dumps(resources).decode(),
            OPERATOR_DOCUMENTS_CLAIM="",
        )

    yield start
    for proxy in proxies:
        await proxy.aclose()


@pytest.mark.parametrize(
    ("code", "reason", "message", "log"),
    [
        pytest.param(SEGFAULT, "ContainerFailed", "139 (SIGSEGV)", 'File "<string>", line 1 in <module>', id="segfault"),
        pytest.param(IMPORT, "ContainerFailed", "exit code 1 ", "ModuleNotFoundError: No module named", id="import"),
        pytest.param(LOCK, "NoProgress", "no progress for spec.stallTimeout", " in match", id="lock"),
        pytest.param(MEMORY, "OOMKilled", "more memory than its limit", "reading", id="memory"),
        pytest.param(
            *(DISK, "DiskFull", 'EmptyDir volume "tmp" exceeds the limit "16Mi"', ""), id="disk", marks=pytest.mark.long
        ),
    ],
)
async def test_a_poison_task_ends(poisoned: Any, place: Place, code: str, reason: str, message: str, log: str) -> None:
    async with (await poisoned(code)).at_work():
        await place.create(retry={"limit": 1, "initialDelay": "1s", "maxDelay": "1s", "jitter": 0})
        status = await place.wait_for("Failed", seconds=400)
    assert [(one["number"], one["reason"]) for one in status["attempts"]] == [(1, reason), (2, reason)]
    error = status["error"]
    assert (error["reason"], error["retryable"]) == (reason, True)
    assert message in error["message"]
    assert log in error.get("log", "")
