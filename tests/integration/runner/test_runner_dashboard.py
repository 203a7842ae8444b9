"""The dashboard on a real Prometheus that looks at an operator while real attempts run."""

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.dashboard_picture import picture
from tests.support.operator_lab import Kubelet, OperatorProcess, Place, until
from tests.support.operator_values import failure, success
from tests.support.prometheus import prometheus
from tests.support.runner_lab import ROOT, Lab

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
"""The first one builds Prometheus."""

DASHBOARD = json.loads((ROOT / "helm/processing-tasks/files/dashboards/processing-tasks.json").read_text())
PICTURE = ROOT / "docs/images/dashboard.svg"
OF_OTHERS = {("REST, 99 %", "A"), ("Callbacks", "A"), ("Callbacks", "B")}
"""Of the gateway, and of a receiver: neither is part of this run."""


def _filled_in(query: str) -> str:
    return query.replace("$__rate_interval", "15s").replace("$namespace", ".*")


async def test_every_panel_shows_something_of_a_run(
    lab: Lab, database: str, place: Place, process: Callable[..., OperatorProcess], tmp_path: Path
) -> None:
    """``UPDATE_PICTURES=1`` draws the picture of the page anew, of a longer run."""
    drawing = bool(os.environ.get("UPDATE_PICTURES"))
    operator = process(OPERATOR_POSTGRES_URL=database)
    queries = {
        (panel["title"], target["refId"]): (panel["id"], _filled_in(target["expr"]))
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
    }
    began = time.time()

    async def ends(pod: Any) -> Any:
        return failure() if "broken" in pod["metadata"]["name"] else success()

    kubelet = Kubelet(place, ends=ends)
    async with prometheus(tmp_path, {"operator-0": operator.port}) as server, operator.at_work(), kubelet.at_work():
        await place.create("held", suspend=True)  # something waits
        for wave in range(16 if drawing else 3):
            await asyncio.sleep(wave % 5 * 2 if drawing else 0)
            for number in range(4):
                await place.create(f"{'broken' if number == 0 else 'fine'}-{wave}-{number}", retry={"limit": 0})
            (lab.documents / f"{wave}.md").write_text(f"# Part {wave}\n\n" + "A paragraph of a handbook.\n\n" * 40)
            await lab.run(lab.task(f"{wave}.md"))
            for number in range(4):
                name = f"{'broken' if number == 0 else 'fine'}-{wave}-{number}"
                await place.wait_for("Completed", "Failed", name=name)

        found: dict[tuple[str, str], list[dict[str, Any]]] = {}

        async def all_there() -> bool:
            for key, (_, query) in queries.items():
                if not found.get(key):
                    found[key] = await server.query(query)
            return all(series for key, series in found.items() if key not in OF_OTHERS)

        try:
            await until("every panel has data", all_there, seconds=40)
        finally:
            assert {key for key, series in found.items() if not series} <= OF_OTHERS
        step = max(1.0, (time.time() - began) / 120)
        ranges = await asyncio.gather(
            *(server.query_range(query, start=began, end=time.time(), step=step) for _, query in queries.values())
        )
        drawn = picture(
            DASHBOARD, {(panel, ref): one for ((_, ref), (panel, _)), one in zip(queries.items(), ranges, strict=True)}
        )
    assert drawn.count("<polyline") > 15, "the data are looked at above; a rate of few points may draw no line"
    if drawing:
        PICTURE.parent.mkdir(exist_ok=True)
        PICTURE.write_text(drawn)
