"""Alerts, queries and metrics as Prometheus itself understands them: promtool checks them all."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.exposition import generate_latest

from devstack import tools
from task_gateway.metrics import Metrics as GatewayMetrics
from task_operator.metrics import Metrics, Waiting

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "helm/processing-tasks/files/alerts/alerts.yaml"
TESTS = ROOT / "tests/data/alerts/alerts.test.yaml"
DASHBOARD = ROOT / "helm/processing-tasks/files/dashboards/processing-tasks.json"

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
"""The first one builds Prometheus."""


def promtool(*arguments: str | Path, stdin: bytes = b"") -> str:
    """Run promtool; return what it says, with its exit code in front where that is not 0."""
    done = subprocess.run(
        [tools.prometheus() / "promtool", *arguments], input=stdin, capture_output=True, timeout=120, check=False
    )
    text = (done.stdout + done.stderr).decode()
    return text if done.returncode == 0 else f"{done.returncode}: {text}"


def test_the_rules_are_valid() -> None:
    assert "SUCCESS" in promtool("check", "rules", "--lint=all", "--lint-fatal", ALERTS)


def test_each_alert_fires_when_it_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", TESTS)
    tested = {one["alertname"] for test in yaml.safe_load(TESTS.read_text())["tests"] for one in test["alert_rule_test"]}
    assert tested == {rule["alert"] for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]}


def test_an_alert_with_another_threshold_fails_its_test(tmp_path: Path) -> None:
    """The tests of the rules can fail."""
    (tmp_path / "alerts.yaml").write_text(ALERTS.read_text().replace("> 120", "> 1200"))
    (tmp_path / "test.yaml").write_text(TESTS.read_text().replace(f"../../../{ALERTS.relative_to(ROOT)}", "alerts.yaml"))
    assert "FAILED" in promtool("test", "rules", tmp_path / "test.yaml")


def test_what_the_processes_show_is_as_prometheus_wants_it() -> None:
    operator, gateway = Metrics(), GatewayMetrics()
    operator.watch_queue(Waiting)
    for registry in (operator.registry, gateway.registry):
        assert promtool("check", "metrics", stdin=generate_latest(registry)) == ""


def test_every_query_of_the_dashboard_can_be_read(tmp_path: Path) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    rules = [{"record": f"query:{number}", "expr": plain(query)} for number, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(queries)} rules found" in promtool("check", "rules", tmp_path / "rules.yaml")


def plain(query: str) -> str:
    """Return a query with what Grafana fills in."""
    return query.replace("$__rate_interval", "1m").replace("$namespace", ".*")
