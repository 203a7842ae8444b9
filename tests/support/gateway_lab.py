"""A place to try the gateway as a process: the process, requests to it, and accounts of the cluster that have rights."""

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from tests.support.operator_lab import ROOT, Kube, until
from tests.support.servers import free_port

AUTH = "/apis/rbac.authorization.k8s.io/v1"


def document(**given: Any) -> dict[str, Any]:
    """Return a request for a document task; fields of it may be given."""
    return {
        "task_type": "document_processing",
        "kb_id": "kb-42",
        "priority": "high",
        "payload": {"file_path": "/data/handbook.pdf"},
        **given,
    }


class GatewayProcess:
    """The gateway as it is deployed: a process of its own, told by environment variables."""

    def __init__(
        self,
        *,
        kubeconfig: Path,
        postgres: str,
        folder: Path,
        namespaces: Sequence[str] = (),
        trusting: bool = False,
        **environment: str,
    ) -> None:
        """``namespaces``: those that it serves, the first of them being the default; more variables may be given."""
        self.port, self.front_port = free_port(), free_port()
        self.log = folder / f"gateway-{uuid.uuid4().hex[:8]}.log"
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("GATEWAY_", "OPERATOR_", "TASKS_"))},
            "KUBECONFIG": str(kubeconfig),
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("crds", "operator")),
            "GATEWAY_POSTGRES_URL": postgres,
            "GATEWAY_NAMESPACES": ",".join(namespaces),
            **({"GATEWAY_DEFAULT_NAMESPACE": namespaces[0]} if namespaces else {}),
            "GATEWAY_AUTH": "trust-the-network" if trusting else "kubernetes",
            "GATEWAY_LISTEN": f"127.0.0.1:{self.port}",
            "GATEWAY_FRONT_LISTEN": f"127.0.0.1:{self.front_port}",
            "GATEWAY_DRAIN_SECONDS": "0",
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def url(self) -> str:
        """Where the task API is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def front_url(self) -> str:
        """Where the front door is."""
        return f"http://127.0.0.1:{self.front_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        command = [sys.executable, "-m", "task_gateway", "run"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=log, stderr=log)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it at once; it gets no chance to do anything."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def lines(self) -> list[dict[str, Any]]:
        """Return what it has logged."""
        return [orjson.loads(line) for line in self.log.read_bytes().splitlines() if line.startswith(b"{")]

    async def ready(self) -> None:
        """Wait until it takes requests."""

        async def look() -> bool:
            assert self.exit_code() is None, f"the gateway has ended:\n{self.log.read_text()}"
            try:
                return (await self.ask("GET", "/readyz"))[0] == 200
            except aiohttp.ClientError:
                return False

        await until("the gateway is ready", look, seconds=30, interval=0.05)

    async def send(
        self, method: str, path: str, body: Any = None, *, token: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Return status, headers and body of the answer to a request; a body that is not bytes is sent as JSON."""
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
        sent = {"Content-Type": "application/json"} if body is not None else {}
        sent |= {"Authorization": f"Bearer {token}"} if token else {}
        data = body if body is None or isinstance(body, bytes) else orjson.dumps(body)
        async with self._session.request(method, self.url + path, data=data, headers=sent | (headers or {})) as response:
            return response.status, response.headers, await response.read()

    async def ask(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        """Return status and JSON (or text) of the answer."""
        status, headers, data = await self.send(method, path, body, **options)
        if "json" in headers.get("Content-Type", ""):
            return status, orjson.loads(data)
        return status, data.decode()

    async def do(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """Return the answer to a request that must succeed."""
        status, answer = await self.ask(method, path, body, **options)
        assert status < 300, f"{method} {path}: {status} {answer}"
        return answer

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator["GatewayProcess"]:
        self.start()
        try:
            await self.ready()
            yield self
        finally:
            self.kill()
            if self._session is not None:
                await self._session.close()
                self._session = None


async def account(
    kube: Kube, namespace: str, name: str, *, verbs: Sequence[str] = (), resources: Sequence[str] = ("processingtasks",)
) -> str:
    """Make a service account with a Role of these verbs in its namespace, and return a token of it."""
    where = f"/api/v1/namespaces/{namespace}/serviceaccounts"
    await kube.do("POST", where, {"metadata": {"name": name}})
    if verbs:
        rules = [
            {"apiGroups": [""] if "/" in one else ["tasks.zzdsj.io"], "resources": [one], "verbs": list(verbs)}
            for one in resources
        ]
        roles = f"{AUTH}/namespaces/{namespace}"
        await kube.do("POST", f"{roles}/roles", {"metadata": {"name": name}, "rules": rules})
        binding = {
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
        }
        await kube.do("POST", f"{roles}/rolebindings", binding)
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
    answer = await kube.do("POST", f"{where}/{name}/token", request)
    return str(answer["status"]["token"])
