"""Writes the Grafana dashboard of the chart from the table below: `python helm/dashboards.py`, or `make generate`.

A row of the table is a panel: title, what it shows, unit, and queries with their legends. Grafana's own format has eighty
lines for each, in which a change cannot be read.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FILE: Final = Path(__file__).parent / "processing-tasks/files/dashboards/processing-tasks.json"
_WIDTH: Final = 24
_OURS: Final = 'namespace=~"$namespace"'


@dataclass(frozen=True)
class Panel:
    """A panel; its queries are (PromQL, legend)."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    width: int = 8
    kind: str = "timeseries"
    stacked: bool = False
    text: str = ""


def _quantile(q: float, metric: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{{{_OURS}}}[$__rate_interval])))"


def _rate(metric: str, by: str, labels: str = "") -> str:
    inside = _OURS + (f", {labels}" if labels else "")
    return f"sum by ({by}) (rate({metric}{{{inside}}}[$__rate_interval]))"


def _ratio(above: str, below: str, by: str, *, below_labels: str = "") -> str:
    return f"{_rate(above, by)} / {_rate(below, by, below_labels)}"


ROWS: Final[dict[str, tuple[Panel, ...]]] = {
    "Overview": (
        Panel("Waiting", "short", ((f"sum(max by (priority) (task_queue_size{{{_OURS}}}))", ""),), 4, "stat"),
        Panel("Oldest", "s", ((f"max(task_queue_oldest_seconds{{{_OURS}}})", ""),), 4, "stat"),
        Panel(
            "Completed in an hour", "short", ((f"round(sum(increase(task_success_total{{{_OURS}}}[1h])))", ""),), 4, "stat"
        ),
        Panel("Failed in an hour", "short", ((f"round(sum(increase(task_failure_total{{{_OURS}}}[1h])))", ""),), 4, "stat"),
        Panel(
            "Lag of a status, 99 %",
            "s",
            ((f"histogram_quantile(0.99, sum by (le) (rate(task_operator_status_lag_seconds_bucket{{{_OURS}}}[1h])))", ""),),
            4,
            "stat",
        ),
        Panel("PostgreSQL behind by", "s", ((f"max(task_operator_projection_lag_seconds{{{_OURS}}})", ""),), 4, "stat"),
        Panel("Queue", "short", ((f"max by (priority) (task_queue_size{{{_OURS}}})", "{{priority}}"),), stacked=True),
        Panel(
            "What they wait for",
            "short",
            ((f"max by (reason) (task_queue_waiting{{{_OURS}}})", "{{reason}}"),),
            stacked=True,
        ),
        Panel("Age of the oldest", "s", ((f"max by (priority) (task_queue_oldest_seconds{{{_OURS}}})", "{{priority}}"),)),
        Panel(
            "Ended a second",
            "ops",
            ((_rate("task_success_total", "type"), "{{type}}"), (_rate("task_failure_total", "type"), "{{type}} failed")),
        ),
        Panel("Why they fail", "ops", ((_rate("task_failure_reasons_total", "reason"), "{{reason}}"),), stacked=True),
        Panel(
            "Duration",
            "s",
            (
                (_quantile(0.5, "task_processing_duration_seconds", "type"), "{{type}} 50 %"),
                (_quantile(0.95, "task_processing_duration_seconds", "type"), "{{type}} 95 %"),
            ),
        ),
    ),
    "One knowledge base": (
        Panel(
            "Where to look",
            "short",
            (),
            24,
            "text",
            text=(
                "No metric names a knowledge base: there may be thousands. Its state is at `GET /api/v1/knowledge/{kb_id}`, "
                "its cost at `GET /api/v1/stats/costs?kb_id=`. Below is what all have in common: stages, embedding, stores."
            ),
        ),
        Panel(
            "Stages, mean",
            "s",
            ((_ratio("task_stage_seconds_sum", "task_stage_seconds_count", "stage"), "{{stage}}"),),
            stacked=True,
        ),
        Panel(
            "Tokens embedded a second of embedding",
            "short",
            (
                (
                    f"sum(rate(task_embedding_tokens_total{{{_OURS}}}[$__rate_interval])) / "
                    f'sum(rate(task_stage_seconds_sum{{{_OURS}, stage="embed"}}[$__rate_interval]))',
                    "tokens/s",
                ),
            ),
        ),
        Panel(
            "Latency of the stores, mean",
            "s",
            ((_ratio("task_store_seconds_total", "task_store_requests_total", "store"), "{{store}}"),),
        ),
    ),
    "One task": (
        Panel(
            "Where to look",
            "short",
            (),
            24,
            "text",
            text=(
                "`kubectl describe ptask NAME`, `GET /api/v1/tasks/NAME/events`, and logs by its uid. Below is the way that "
                "each task takes through the operator."
            ),
        ),
        Panel(
            "Lag of a status",
            "s",
            (
                (_quantile(0.5, "task_operator_status_lag_seconds", "phase"), "{{phase}} 50 %"),
                (_quantile(0.99, "task_operator_status_lag_seconds", "phase"), "{{phase}} 99 %"),
            ),
        ),
        Panel("Attempts that ended", "ops", ((_rate("task_attempts_total", "outcome"), "{{outcome}}"),), stacked=True),
        Panel(
            "Callbacks",
            "short",
            (
                (f"max by (state) (task_callbacks{{{_OURS}}})", "{{state}}"),
                (_rate("task_callbacks_sent_total", "result"), "{{result}} a second"),
            ),
        ),
    ),
    "Capacity and cost": (
        Panel("CPUs of attempts", "short", ((_rate("task_cpu_seconds_total", "type"), "{{type}}"),), stacked=True),
        Panel("Memory of attempts", "bytes", ((_rate("task_memory_byte_seconds_total", "type"), "{{type}}"),), stacked=True),
        Panel(
            "Peak memory of an attempt, 95 %", "bytes", ((_quantile(0.95, "task_memory_peak_bytes", "type"), "{{type}}"),)
        ),
        Panel(
            "Tokens embedded a second", "short", ((_rate("task_embedding_tokens_total", "type"), "{{type}}"),), stacked=True
        ),
        Panel(
            "Requests to the API server",
            "reqps",
            ((_rate("task_operator_api_requests_total", "verb, resource"), "{{verb}} {{resource}}"),),
            stacked=True,
        ),
        Panel(
            "Operator and gateway",
            "bytes",
            ((f"sum by (pod) (process_resident_memory_bytes{{{_OURS}}})", "{{pod}}"),),
        ),
        Panel("A look at a task, 99 %", "s", ((_quantile(0.99, "task_operator_reconcile_seconds"), "reconcile"),)),
        Panel("REST, 99 %", "s", ((_quantile(0.99, "task_gateway_request_seconds", "method"), "{{method}}"),)),
        Panel("Age of the watches", "s", ((f"max by (pod) (task_operator_watch_age_seconds{{{_OURS}}})", "{{pod}}"),)),
    ),
}


def dashboard() -> dict[str, Any]:
    """Return what Grafana reads."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": top, "w": _WIDTH, "h": 1},
                "panels": [],
            }
        )
        top += 1
        left = height = 0
        for panel in row:
            if left + panel.width > _WIDTH:
                left, top, height = 0, top + height, 0
            tall = {"stat": 4, "text": 3}.get(panel.kind, 8)
            place = {"x": left, "y": top, "w": panel.width, "h": tall}
            panels.append({"id": len(panels) + 1, "title": panel.title, "gridPos": place} | _body(panel))
            left, height = left + panel.width, max(height, tall)
        top += height
    return {
        "uid": "processing-tasks",
        "title": "Processing tasks",
        "tags": ["processing-tasks"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
                {
                    "name": "namespace",
                    "type": "query",
                    "label": "Namespace of the operator",
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "query": {"query": "label_values(task_operator_watch_age_seconds, namespace)", "refId": "namespace"},
                    "refresh": 2,
                    "includeAll": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": panels,
    }


def _body(panel: Panel) -> dict[str, Any]:
    if panel.kind == "text":
        return {"type": "text", "options": {"mode": "markdown", "content": panel.text}}
    custom = {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 20} if panel.stacked else {}
    return {
        "type": panel.kind,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": expression, "legendFormat": legend}
            for number, (expression, legend) in enumerate(panel.queries)
        ],
    }


def main(arguments: list[str]) -> int:
    """Write the file; with ``--check`` only say whether it is what would be written."""
    text = json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"
    if "--check" in arguments:
        if not FILE.exists() or FILE.read_text(encoding="utf-8") != text:
            sys.stderr.write(f"{FILE} is not what helm/dashboards.py makes: run make generate\n")
            return 1
        return 0
    FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
