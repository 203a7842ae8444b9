"""Tasks as text: columns that fit the terminal, JSON, YAML, names. Pure functions of manifests; the time is an argument.

A table for a terminal is made to fit it: texts become shorter, then columns go. One that goes into a pipe is whole. Widths
are those of the terminal, where Chinese characters take two cells.
"""

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final, NamedTuple

from rich.cells import cell_len

Manifest = Mapping[str, Any]

GAP: Final = 3
"""Cells between columns, as kubectl has them."""
FINISHED: Final = frozenset({"Completed", "Failed", "Canceled"})
PHASE_STYLES: Final = {
    "Queued": "cyan",
    "Processing": "blue",
    "Retrying": "yellow",
    "Completed": "green",
    "Failed": "red",
    "Canceled": "magenta",
}
RANKS: Final = {"high": 0, "normal": 1, "low": 2}
"""Priorities in the order in which they are shown."""


class Output(StrEnum):
    """What -o takes."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


class Cell(NamedTuple):
    """A text and how it looks."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table of things of one kind."""

    title: str
    cell: Callable[[Manifest, datetime], Cell]
    wide: bool = False
    """Only with -o wide."""
    goes: int = 0
    """Where there is no room, columns with the highest number go first; 0: it stays."""
    least: int | None = None
    """Cells that it may become short to; None: it does not."""


# ------------------------------------------------------------------------------------------------------------- texts


def plain(text: str) -> str:
    """Return a text without what a terminal would take for commands: names and messages may come from documents."""
    return "".join(" " if char in "\n\t" else char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def clipped(text: str, width: int) -> str:
    """Return a text that takes at most ``width`` cells, with … where something is missing.

    >>> clipped("操作手册.pdf", 8)
    '操作手…'
    """
    if cell_len(text) <= width:
        return text
    kept, room = "", width - 1
    for char in text:
        room -= cell_len(char)
        if room < 0:
            break
        kept += char
    return kept + "…" if width > 0 else ""


def age(since: str | None, now: datetime) -> str:
    """Return how long ago a time of a manifest was, as kubectl writes it; "" without one.

    >>> age("2026-01-31T09:30:00Z", datetime(2026, 1, 31, 9, 33, 12, tzinfo=UTC))
    '3m12s'
    """
    at = moment(since)
    return "" if at is None else span((now - at).total_seconds())


def span(seconds: float) -> str:
    """Return a length of time as kubectl writes it: two units where the larger is small."""
    whole = max(0, int(seconds))
    if whole < 120:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 10:
        return f"{minutes}m{rest}s" if rest else f"{minutes}m"
    if minutes < 180:
        return f"{minutes}m"
    hours, rest = divmod(minutes, 60)
    if hours < 8:
        return f"{hours}h{rest}m" if rest else f"{hours}h"
    if hours < 48:
        return f"{hours}h"
    days, rest = divmod(hours, 24)
    return f"{days}d{rest}h" if days < 8 and rest else f"{days}d"


def moment(text: str | None) -> datetime | None:
    """Return a time of a manifest; None without one, or for one that cannot be read."""
    try:
        at = None if not text else datetime.fromisoformat(text)
    except ValueError:
        return None
    return at if at is None or at.tzinfo else at.replace(tzinfo=UTC)


# ------------------------------------------------------------------------------------------------------------- tasks


def status_of(task: Manifest) -> Mapping[str, Any]:
    """Return the status, empty before the operator has written one."""
    return task.get("status") or {}


def phase_of(task: Manifest) -> str:
    """Return the phase."""
    return str(status_of(task).get("phase") or "Queued")


def condition(thing: Manifest, kind: str) -> Mapping[str, Any]:
    """Return a condition, empty if it is not there."""
    found: Mapping[str, Any] = next((one for one in status_of(thing).get("conditions") or () if one.get("type") == kind), {})
    return found


def progress_of(task: Manifest) -> int:
    """Return how far a task is in percent."""
    phase = phase_of(task)
    return 100 if phase == "Completed" else 0 if phase == "Queued" else int(status_of(task).get("progress") or 0)


def bar(percent: int, *, width: int = 10, style: str = "blue") -> Cell:
    """Return a progress bar with its figure.

    >>> bar(62).text
    '━━━━━━──── 62%'
    """
    full = percent * width // 100
    return Cell(f"{'━' * full}{'─' * (width - full)} {percent}%", style)


def waiting_for(task: Manifest) -> str:
    """Return the word for why a task does not run; "" while it does."""
    return str((status_of(task).get("queue") or {}).get("reason") or "")


def _spec(field: str) -> Callable[[Manifest, datetime], Cell]:
    return lambda task, _: Cell(str(task.get("spec", {}).get(field) or ""))


def _status(*path: str) -> Callable[[Manifest, datetime], Cell]:
    def cell(task: Manifest, _: datetime) -> Cell:
        value: Any = status_of(task)
        for part in path:
            value = value.get(part) if isinstance(value, Mapping) else None
        return Cell("" if value is None else str(value))

    return cell


def _phase(task: Manifest, _: datetime) -> Cell:
    phase = phase_of(task)
    return Cell(phase, PHASE_STYLES.get(phase, ""))


def _progress(task: Manifest, _: datetime) -> Cell:
    return Cell(f"{progress_of(task)}%" if phase_of(task) != "Queued" else "")


def _live_progress(task: Manifest, _: datetime) -> Cell:
    phase = phase_of(task)
    return Cell("") if phase == "Queued" else bar(progress_of(task), style=PHASE_STYLES.get(phase, "blue"))


def _reason(task: Manifest, _: datetime) -> Cell:
    return Cell(waiting_for(task) or str(condition(task, "Ready").get("reason") or ""))


def _news(task: Manifest, now: datetime) -> Cell:
    """Return the reason where it says more than the phase."""
    cell = _reason(task, now)
    return Cell("") if cell.text == phase_of(task) else cell


def _since(task: Manifest, now: datetime) -> Cell:
    return Cell(age(task["metadata"].get("creationTimestamp"), now))


def named(thing: Manifest, _: datetime) -> Cell:
    """Return the name."""
    return Cell(str(thing["metadata"]["name"]))


def spaced(thing: Manifest, _: datetime) -> Cell:
    """Return the namespace."""
    return Cell(str(thing["metadata"].get("namespace") or ""))


NAMESPACE: Final = Column("NAMESPACE", spaced, least=8)
TASK_COLUMNS: Final = (
    Column("NAME", named, least=12),
    Column("TYPE", _spec("type"), goes=6),
    Column("KB", _spec("kbId"), goes=4, least=8),
    Column("PRIORITY", _spec("priority"), goes=7),
    Column("PHASE", _phase),
    Column("STAGE", _status("stage"), goes=5),
    Column("PROGRESS", _progress, goes=2),
    Column("ATTEMPT", _status("attempt"), goes=8),
    Column("WAITING", lambda task, _: Cell(waiting_for(task), "yellow"), goes=1, least=10),
    Column("POSITION", _status("queue", "position"), wide=True, goes=9),
    Column("CHUNKS", _status("result", "chunks"), wide=True, goes=9),
    Column("REASON", _reason, wide=True, goes=3, least=12),
    Column("JOB", _status("job"), wide=True, goes=10, least=12),
    Column("AGE", _since),
)
"""Those of ``kubectl get ptask``."""
LIVE_COLUMNS: Final = (
    Column("NAME", named, least=12),
    Column("KB", _spec("kbId"), goes=4, least=8),
    Column("PHASE", _phase),
    Column("PROGRESS", _live_progress, goes=3),
    Column("STAGE", _status("stage"), goes=5),
    Column("ATTEMPT", _status("attempt"), goes=7),
    Column("REASON", _news, goes=2, least=10),
    Column("AGE", _since, goes=1),
)


def columns_for(columns: Sequence[Column], *, wide: bool, namespaces: bool) -> list[Column]:
    """Return the columns of a table; ``namespaces`` puts that of the namespace first."""
    shown = [column for column in columns if wide or not column.wide]
    return [NAMESPACE, *shown] if namespaces else shown


def newest_first(tasks: Sequence[Manifest]) -> list[Manifest]:
    """Return tasks by age; those of one second by name."""
    by_name = sorted(tasks, key=lambda task: (task["metadata"].get("namespace", ""), task["metadata"]["name"]))
    return sorted(by_name, key=lambda task: str(task["metadata"].get("creationTimestamp") or ""), reverse=True)


# ----------------------------------------------------------------------------------------------------------- layout


def table(
    columns: Sequence[Column], things: Sequence[Manifest], *, now: datetime, width: int | None = None
) -> list[list[Cell]]:
    """Return the lines of a table, the titles first; each is a list of cells that have their width already.

    ``width``: cells of the terminal; None: a pipe, for which nothing is left out.
    """
    rows = [[_plain(column.cell(thing, now)) for column in columns] for thing in things]
    shown = list(range(len(columns)))
    widths = [
        max(cell_len(column.title), *(cell_len(row[index].text) for row in rows)) if rows else cell_len(column.title)
        for index, column in enumerate(columns)
    ]
    if width is not None:
        _fit(columns, shown, widths, width)
    lines = [[Cell(column.title, "bold") for column in columns], *rows]
    return [[_padded(line[index], widths[index], last=index == shown[-1]) for index in shown] for line in lines]


def _fit(columns: Sequence[Column], shown: list[int], widths: list[int], width: int) -> None:
    """Make columns shorter and take columns away until the table has room, in place."""

    def over() -> int:
        return sum(widths[index] for index in shown) + GAP * (len(shown) - 1) - width

    while over() > 0:
        # First the longest text a bit shorter, never below what its column may have; then a column goes.
        wide = [index for index in shown if (least := columns[index].least) is not None and widths[index] > least]
        slack = sum(widths[index] - (columns[index].least or 0) for index in wide)
        leaving = max(shown, key=lambda index: columns[index].goes)
        if slack >= over():
            longest = max(wide, key=lambda index: widths[index])
            widths[longest] -= 1
        elif columns[leaving].goes:
            shown.remove(leaving)
        else:
            longest = max(shown, key=lambda index: widths[index])
            if widths[longest] <= 4:
                return
            widths[longest] -= 1


def _plain(cell: Cell) -> Cell:
    return cell._replace(text=plain(cell.text))


def _padded(cell: Cell, width: int, *, last: bool) -> Cell:
    text = clipped(cell.text, width)
    return cell._replace(text=text if last else text + " " * (width - cell_len(text) + GAP))


def as_text(lines: Sequence[Sequence[Cell]]) -> str:
    """Return a table without colours, as it goes into a pipe."""
    return "".join("".join(cell.text for cell in line).rstrip() + "\n" for line in lines)


# ---------------------------------------------------------------------------------------------------------- machines


def without_managed_fields(thing: Manifest) -> dict[str, Any]:
    """Return a manifest as kubectl shows it."""
    metadata = {key: value for key, value in (thing.get("metadata") or {}).items() if key != "managedFields"}
    return {**thing, "metadata": metadata}


def document(things: Sequence[Manifest], *, single: bool) -> dict[str, Any]:
    """Return what -o json and -o yaml print: the object, or a List of them."""
    shown = [without_managed_fields(thing) for thing in things]
    return shown[0] if single else {"apiVersion": "v1", "kind": "List", "metadata": {}, "items": shown}


def as_json(value: Any) -> str:
    """Return JSON as kubectl writes it."""
    return json.dumps(value, ensure_ascii=False, indent=4)


def as_yaml(value: Any) -> str:
    """Return YAML, fields in their order."""
    import yaml

    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
    return text.rstrip("\n")


def resource_name(task: Manifest) -> str:
    """Return what ``-o name`` prints, which kubectl takes."""
    return f"processingtask.tasks.zzdsj.io/{task['metadata']['name']}"


# ------------------------------------------------------------------------------------------------------------- detail


def detail(task: Manifest, *, now: datetime) -> list[tuple[str, Cell]]:
    """Return what there is to know of a task, as names and values; lines of a group have an empty name."""
    metadata, spec, status = task["metadata"], task.get("spec") or {}, status_of(task)
    phase = phase_of(task)
    lines: list[tuple[str, Cell]] = [
        ("Name", Cell(f"{metadata['namespace']}/{metadata['name']}", "bold")),
        ("Type", Cell(str(spec.get("type") or ""))),
        ("Knowledge base", Cell(str(spec.get("kbId") or ""))),
        ("Priority", Cell(str(spec.get("priority") or "normal"))),
        ("Phase", Cell(_phase_line(task, now), PHASE_STYLES.get(phase, ""))),
    ]
    payload = spec.get("payload") or {}
    lines += [("Payload" if not index else "", Cell(f"{key}: {_short(payload[key])}")) for index, key in enumerate(payload)]
    if phase not in FINISHED and phase != "Queued":
        lines.append(("Progress", Cell(f"{bar(progress_of(task)).text} {status.get('stage') or ''}".rstrip())))
    if wait := status.get("queue"):
        place = f"{wait['position']} in line, " if wait.get("position") else ""
        lines.append(("Waiting", Cell(f"{place}{wait.get('reason')}: {wait.get('message') or ''}".rstrip(": "), "yellow")))
    if (retry_at := moment(status.get("retryAt"))) is not None and phase == "Retrying":
        lines.append(("Next attempt", Cell(f"in {span((retry_at - now).total_seconds())}")))
    if error := status.get("error"):
        lines.append(("Error", Cell(f"{error.get('reason')}: {error.get('message') or ''}".rstrip(": "), "red")))
    lines += _result(status.get("result") or {})
    for index, attempt in enumerate(status.get("attempts") or ()):
        begun, ended = moment(attempt.get("startedAt")), moment(attempt.get("finishedAt"))
        took = "" if begun is None else f" after {span(((ended or now) - begun).total_seconds())}"
        said = f"{attempt.get('number')}: {attempt.get('reason') or 'running'}{took} ({attempt.get('job')})"
        lines.append(("Attempts" if not index else "", Cell(said)))
    if callback := status.get("callback"):
        said = f"{callback.get('state')} after {callback.get('attempts') or 0} tries {callback.get('message') or ''}"
        lines.append(("Callback", Cell(said.rstrip())))
    if labels := metadata.get("labels"):
        lines.append(("Labels", Cell(", ".join(f"{key}={value}" for key, value in labels.items()))))
    return [(name, _plain(cell)) for name, cell in lines if cell.text]


def _phase_line(task: Manifest, now: datetime) -> str:
    status, phase = status_of(task), phase_of(task)
    if phase in FINISHED:
        begun, ended = moment(status.get("startedAt")), moment(status.get("finishedAt"))
        took = "" if begun is None or ended is None else f", took {span((ended - begun).total_seconds())}"
        reason = str(condition(task, "Ready").get("reason") or "")
        said = "" if reason in {"", phase} else f" ({reason})"
        return f"{phase}{said} {age(status.get('finishedAt'), now)} ago{took}"
    return f"{phase}, created {age(task['metadata'].get('creationTimestamp'), now)} ago"


def _result(result: Mapping[str, Any]) -> list[tuple[str, Cell]]:
    lines: list[tuple[str, Cell]] = []
    figures = {key: value for key, value in result.items() if not isinstance(value, list | dict)}
    if figures:
        lines.append(("Result", Cell(", ".join(f"{key} {value}" for key, value in figures.items()))))
    if seconds := result.get("seconds"):
        lines.append(("Seconds", Cell(", ".join(f"{stage} {value:g}" for stage, value in seconds.items()))))
    for index, component in enumerate(result.get("components") or ()):
        well = bool(component.get("healthy"))
        said = f"{component.get('name')}: {'healthy' if well else 'UNHEALTHY'} ({component.get('milliseconds')} ms)"
        said = f"{said} {component.get('message') or ''}".rstrip()
        lines.append(("Components" if not index else "", Cell(said, "green" if well else "red")))
    return lines


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return clipped(text, 160)
