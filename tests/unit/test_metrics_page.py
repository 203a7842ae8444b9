"""docs/metrics.md, alerts and dashboard against the registries of operator and gateway."""

import json
import re
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from task_gateway.hub import Event, Hub
from task_gateway.metrics import Metrics as GatewayMetrics
from task_operator.metrics import Metrics, Waiting
from task_operator.pool_metrics import PoolMetrics

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/metrics.md"
DASHBOARD = ROOT / "helm/processing-tasks/files/dashboards/processing-tasks.json"
WORST = {"namespace", "name", "uid", "kb_id", "job", "task", "user", "url", "document_id"}
"""Labels with as many values as there are tasks or callers."""


class NoEvents:
    """A source that is never asked."""

    async def connect(self) -> None:
        raise NotImplementedError

    async def heard(self, *, timeout: float) -> None:  # noqa: ASYNC109 - of the protocol
        raise NotImplementedError

    async def after(self, number: int, *, limit: int) -> list[Event]:
        raise NotImplementedError

    async def head(self) -> int:
        raise NotImplementedError

    async def running(self, *, limit: int) -> tuple[int, list[Event]]:
        raise NotImplementedError


def _names(registry: CollectorRegistry) -> dict[str, Metric]:
    """Return every metric under the name that is asked for: of a counter that with ``_total``."""
    return {
        one.name + ("_total" if one.type == "counter" else ""): one
        for one in registry.collect()
        if not one.name.startswith("process_")
    }


def _operator() -> dict[str, Metric]:
    metrics = Metrics()
    metrics.watch_queue(lambda: Waiting())
    PoolMetrics(metrics)
    return _names(metrics.registry)


def _gateway() -> dict[str, Metric]:
    metrics = GatewayMetrics()
    metrics.watch_hub(Hub(NoEvents()))
    return _names(metrics.registry)


def test_the_page_names_every_metric_with_its_labels_and_no_other() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE.read_text().partition("## Prometheus and Grafana")[0], re.MULTILINE)
    told = {name: tuple(sorted(re.findall(r"`(\w+)`", labels))) for name, labels in rows}
    metrics, gateway = Metrics(), GatewayMetrics()
    labels = {
        one.describe()[0].name: tuple(sorted(one._labelnames))
        for one in [*vars(metrics).values(), *PoolMetrics(metrics).families, *vars(gateway).values()]
        if hasattr(one, "_labelnames")
    }
    known = _operator() | _gateway()
    assert told.keys() == known.keys()
    assert {name: told[name] for name in known if known[name].name in labels} == {
        name: labels[known[name].name] for name in known if known[name].name in labels
    }
    assert len(labels) > 30


def test_no_label_grows_with_tasks_or_callers() -> None:
    metrics, gateway = Metrics(), GatewayMetrics()
    for one in [*vars(metrics).values(), *vars(gateway).values()]:
        assert WORST.isdisjoint(getattr(one, "_labelnames", ()))
    for family in PoolMetrics(metrics).families:  # pools are few, and made by who runs the platform
        assert family._labelnames == ("namespace", "pool")


def test_what_others_ask_for_has_exactly_these_names() -> None:
    asked = {
        "task_queue_size": "gauge",
        "task_processing_duration_seconds": "histogram",
        "task_success_total": "counter",
        "task_failure_total": "counter",
        "worker_pool_active_count": "gauge",
        "worker_pool_idle_count": "gauge",
    }
    known = _operator()
    assert {name: known[name].type for name in asked} == asked
    assert Metrics().failed._labelnames == Metrics().succeeded._labelnames == ("type",)


ALERTS = ROOT / "helm/processing-tasks/files/alerts/alerts.yaml"
OF_OTHERS = re.compile(r"process_\w+")


def _asked() -> dict[str, str]:
    """Return every query of alerts and dashboard by what asks it."""
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return {rule["alert"]: rule["expr"] for rule in rules} | {
        f"{panel['title']} {target['refId']}": target["expr"] for panel in panels for target in panel.get("targets", [])
    }


def test_alerts_and_dashboard_ask_for_metrics_that_there_are() -> None:
    known = _operator() | _gateway()
    names = set(known) | {
        f"{name}_{part}" for name, one in known.items() if one.type == "histogram" for part in ("bucket", "sum", "count")
    }
    asked = {name for query in _asked().values() for name in re.findall(r"\b(?:task|process|worker)_\w+\b(?=[{\[)])", query)}
    assert len(asked) > 20
    assert {name for name in asked if not OF_OTHERS.fullmatch(name)} - names == set()


def test_every_alert_has_its_page_and_every_page_its_alert() -> None:
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    pages = {f"docs/runbooks/{page.name}" for page in (ROOT / "docs/runbooks").glob("T*.md")}
    assert (
        {rule["annotations"]["runbook_url"] for rule in rules}
        == pages
        == {f"docs/runbooks/{rule['alert']}.md" for rule in rules}
    )
    listed = (ROOT / "docs/runbooks/README.md").read_text()
    assert all(f"[{rule['alert']}]({rule['alert']}.md)" in listed for rule in rules)
    assert {rule["labels"]["severity"] for rule in rules} == {"warning", "critical"}


def test_the_dashboard_has_what_is_asked_of_it() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Overview", "One knowledge base", "One task", "Capacity and cost"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = [(x, y) for p in panels for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
             for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])]  # fmt: skip
    assert len(taken) == len(set(taken)), "panels overlap"
