"""Pools, queue and running tasks at one look. Pure functions of manifests."""

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final

from ptask.tables import (
    FINISHED,
    RANKS,
    Cell,
    Column,
    Manifest,
    condition,
    named,
    newest_first,
    phase_of,
    status_of,
    waiting_for,
)


def _figure(field: str, *, spec: bool = False, style: str = "") -> Callable[[Manifest, datetime], Cell]:
    def cell(pool: Manifest, _: datetime) -> Cell:
        value: Any = (pool.get("spec") or {}).get(field) if spec else status_of(pool).get(field)
        return Cell(str(0 if value is None else value), style if value else "")

    return cell


def _pool_reason(pool: Manifest, _: datetime) -> Cell:
    ready = condition(pool, "Ready")
    return Cell("" if ready.get("status") == "True" else str(ready.get("reason") or "Unseen"), "yellow")


POOL_COLUMNS: Final = (
    Column("POOL", named, least=8),
    Column("READY", _figure("ready", style="green")),
    Column("BUSY", _figure("busy", style="blue"), goes=1),
    Column("IDLE", _figure("idle"), goes=3),
    Column("QUEUED", _figure("queued", style="cyan")),
    Column("DESIRED", _figure("desired"), goes=5),
    Column("MIN", _figure("min", spec=True), goes=6),
    Column("MAX", _figure("max", spec=True), goes=4),
    Column("REASON", _pool_reason, goes=2, least=8),
    Column("TYPES", lambda pool, _: Cell(",".join(pool["spec"].get("types") or ())), goes=7, least=12),
)


def queue(tasks: Sequence[Manifest]) -> list[tuple[str, str, int]]:
    """Return how many tasks wait, by priority and reason: the highest priority first, of it the most frequent reason."""
    counts: Counter[tuple[str, str]] = Counter()
    for task in tasks:
        phase = phase_of(task)
        if phase not in FINISHED and phase != "Processing":
            reason = waiting_for(task) or ("RetryLater" if phase == "Retrying" else "Next")
            counts[str(task.get("spec", {}).get("priority") or "normal"), reason] += 1
    ranked = sorted(counts.items(), key=lambda item: (RANKS.get(item[0][0], 9), -item[1], item[0][1]))
    return [(priority, reason, count) for (priority, reason), count in ranked]


QUEUE_COLUMNS: Final = (
    Column("PRIORITY", lambda row, _: Cell(str(row["priority"]))),
    Column("REASON", lambda row, _: Cell(str(row["reason"]), "yellow"), least=8),
    Column("TASKS", lambda row, _: Cell(str(row["tasks"]))),
)


def queue_rows(tasks: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Return the queue as rows of :data:`QUEUE_COLUMNS`."""
    return [{"priority": priority, "reason": reason, "tasks": count} for priority, reason, count in queue(tasks)]


def running(tasks: Sequence[Manifest]) -> list[Manifest]:
    """Return the tasks that run, the youngest first."""
    return newest_first([task for task in tasks if phase_of(task) == "Processing"])


def summary(tasks: Sequence[Manifest]) -> str:
    """Return one line about all tasks."""
    phases = Counter(phase_of(task) for task in tasks)
    known = ("Queued", "Processing", "Retrying", "Completed", "Failed", "Canceled")
    return ", ".join(f"{phases[phase]} {phase}" for phase in known if phases[phase]) or "no tasks"
