"""docs/metrics.md against the registries of operator and gateway."""

import re
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from task_gateway.hub import Event, Hub
from task_gateway.metrics import Metrics as GatewayMetrics
from task_operator.metrics import Metrics, Waiting
from task_operator.pool_metrics import PoolMetrics

PAGE = Path(__file__).parents[2] / "docs/metrics.md"
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
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
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
