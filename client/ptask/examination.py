"""Carries out :mod:`ptask.doctor`: looks, runs a health check if one is asked for, prints."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ptask.doctor import Level, as_lines, diagnose, look, worst
from ptask.live import seconds_of, watch
from ptask.manifests import suffix
from ptask.outcomes import Exit
from ptask.tables import Cell, as_json, as_yaml
from service_client.errors import TaskClientError
from service_client.views import Order

if TYPE_CHECKING:
    from ptask.cluster import Cluster
    from ptask.doctor import Seen
    from ptask.screen import Screen

_LABELS = {"app.kubernetes.io/created-by": "ptask-doctor"}


def examine(
    cluster: "Cluster",
    screen: "Screen",
    *,
    namespace: str | None,
    system: str | None,
    check: bool,
    timeout: str,
    output: str,
) -> Exit:
    """Print the findings; return the exit code."""
    limit = seconds_of(timeout)
    seen = look(cluster, namespaces=None if namespace is None else [namespace], system=system, now=datetime.now(UTC))
    if check:
        # In a namespace where tasks run: that of the command may be none.
        where = namespace or next(iter(seen.rights), cluster.namespace)
        seen = _with_health(cluster, screen, seen, where, limit)
    findings = diagnose(seen)
    level = worst(findings)
    if output in {"json", "yaml"}:
        whole = {"level": str(level), "findings": [finding.as_dict() for finding in findings]}
        screen.raw(as_json(whole) if output == "json" else as_yaml(whole))
    else:
        for finding in findings:
            for mark, style, text in as_lines(finding):
                _folded(screen, mark, style, text)
        counted = {one: sum(finding.level is one for finding in findings) for one in Level}
        screen.say(
            f"{counted[Level.PROBLEM]} problems, {counted[Level.WARNING]} warnings, {counted[Level.UNKNOWN]} unknown, "
            f"{counted[Level.OK]} ok",
            "bold",
        )
    return Exit.FAILED if level is Level.PROBLEM else Exit.DONE


def _folded(screen: "Screen", mark: str, style: str, text: str) -> None:
    """Print a line of a finding, folded behind its mark on a terminal."""
    from rich.text import Text

    lines = [text]
    if screen.width is not None and screen.width > 20:
        lines = [part.plain.rstrip() for part in Text(text).wrap(screen.console, screen.width - 6)]
    for index, line in enumerate(lines):
        screen.lines([[Cell(f"{mark if not index else '':6}", style), Cell(line)]])


def _with_health(cluster: "Cluster", screen: "Screen", seen: "Seen", namespace: str, limit: float | None) -> "Seen":
    """Run a health check and add how it ended. One that cannot be created is a finding by the caller's rights."""
    name = f"doctor-{suffix()}"
    spec = {"type": "health_check", "priority": "high", "retry": {"limit": 0}, "ttlSecondsAfterFinished": 600}
    order = Order(task=spec, key=name, labels=_LABELS, namespace=None, name=name)
    try:
        cluster.run(cluster.transport(namespace).submit(order))
    except TaskClientError as error:
        screen.note(f"no health check was made: {error.message}")
        return seen
    screen.note(f"health check {namespace}/{name} runs")
    watch(cluster, screen, namespace=namespace, wanted=[(namespace, name)], timeout=limit, quiet=True)
    return replace(seen, health=cluster.task(name, namespace), now=datetime.now(UTC))
