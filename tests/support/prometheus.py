"""A real Prometheus for a test: it looks at processes on this machine, and is asked as Grafana asks it."""

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from devstack import tools
from tests.support.servers import free_port, serving


class Prometheus:
    """The HTTP API of one."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series that a query gives now."""
        return await self._ask("query", query=expression)

    async def query_range(self, expression: str, *, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """Return the series of a query over a time."""
        return await self._ask("query_range", query=expression, start=start, end=end, step=step)

    async def _ask(self, what: str, **params: Any) -> list[dict[str, Any]]:
        async with self._session.get(f"{self._url}/api/v1/{what}", params=params) as response:
            answer = json.loads(await response.read())
        assert answer["status"] == "success", answer
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result


@contextlib.asynccontextmanager
async def prometheus(folder: Path, targets: Mapping[str, int]) -> AsyncIterator[Prometheus]:
    """Run one that looks each second at the ports of ``targets``, by the name of their pod."""
    port = free_port()
    scrapes = [
        {"targets": [f"127.0.0.1:{at}"], "labels": {"namespace": "system", "pod": pod}} for pod, at in targets.items()
    ]
    configuration = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "tasks", "static_configs": scrapes}],
    }
    (folder / "prometheus.json").write_text(json.dumps(configuration))  # JSON is YAML
    command = [
        str(tools.prometheus() / "prometheus"),
        f"--config.file={folder / 'prometheus.json'}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with serving(command, port=port, log=folder / "prometheus.log"):
        async with aiohttp.ClientSession() as session:
            yield Prometheus(f"http://127.0.0.1:{port}", session)
