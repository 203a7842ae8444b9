"""Watching and waiting: a live table on a terminal, a line a change in a pipe. What is watched is a pure state.

The state is fed with what :meth:`ptask.cluster.Cluster.follow` yields; a watch that breaks is part of that, and so is a
task that is deleted.
"""

import contextlib
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from ptask.outcomes import CommandError, Exit, of_phases
from ptask.screen import Screen, text_of
from ptask.tables import (
    FINISHED,
    LIVE_COLUMNS,
    Cell,
    Manifest,
    clipped,
    columns_for,
    condition,
    newest_first,
    phase_of,
    plain,
    progress_of,
    status_of,
    table,
    waiting_for,
    without_managed_fields,
)
from ptask.top import summary

if TYPE_CHECKING:
    from ptask.cluster import Change, Cluster

_ORDER: Final = {"Processing": 0, "Retrying": 1, "Queued": 2}
_PAUSE: Final = 0.1  # seconds between two drawings, however much happens
DELETED: Final = "Deleted"

Key = tuple[str, str]
"""Namespace and name."""


def key_of(task: Manifest) -> Key:
    """Return namespace and name."""
    return str(task["metadata"]["namespace"]), str(task["metadata"]["name"])


@dataclass
class Watched:
    """The tasks that are watched, and how they stand."""

    wanted: frozenset[Key] | None = None
    """None: all that come."""
    tasks: dict[Key, Manifest] = field(default_factory=dict)
    gone: set[Key] = field(default_factory=set)
    """Wanted ones that were deleted."""
    lost: str = ""
    """Why nothing is heard at the moment."""
    synced: bool = False

    def take(self, change: "Change") -> Sequence[Manifest]:
        """Enter a change; return the tasks whose line is another one now."""
        if change.kind == "LOST":
            self.lost = change.message
            return []
        self.lost = ""
        if change.kind == "DELETED":
            return [task for task in change.manifests if self._remove(key_of(task)) is not None]
        fresh = [task for task in change.manifests if self._enter(task)]
        if change.kind == "SYNC":
            self.synced = True
            there = {key_of(task) for task in change.manifests}
            for key in [*self.tasks.keys() - there, *((self.wanted or frozenset()) - there)]:
                self._remove(key)
        return fresh

    def _enter(self, task: Manifest) -> bool:
        key = key_of(task)
        if self.wanted is not None and key not in self.wanted:
            return False
        before = self.tasks.get(key)
        self.tasks[key] = task
        self.gone.discard(key)
        return before is None or line_of(before) != line_of(task)

    def _remove(self, key: Key) -> Manifest | None:
        if self.wanted is not None and key in self.wanted:
            ended = self.tasks.get(key)
            if ended is not None and phase_of(ended) in FINISHED:
                return None  # its TTL is over: how it ended is known
            self.gone.add(key)
            return ended or {"metadata": {"namespace": key[0], "name": key[1]}}
        return self.tasks.pop(key, None)

    @property
    def phases(self) -> dict[Key, str]:
        """Return the phase of each; Deleted for one that is gone, Unknown for one that was not seen yet."""
        known = {key: phase_of(task) for key, task in self.tasks.items()}
        known |= dict.fromkeys((self.wanted or frozenset()) - known.keys(), "Unknown")
        return known | dict.fromkeys(self.gone, DELETED)

    @property
    def ended(self) -> bool:
        """Whether all that is waited for has ended."""
        return self.wanted is not None and all(phase in FINISHED | {DELETED} for phase in self.phases.values())


def line_of(task: Manifest) -> tuple[str, str, int, str]:
    """Return what a line about a task says: a change of anything else is not told."""
    phase = phase_of(task)
    reason = waiting_for(task) or (str(condition(task, "Ready").get("reason") or "") if phase in FINISHED else "")
    return phase, str(status_of(task).get("stage") or ""), progress_of(task), "" if reason == phase else reason


def ranked(tasks: Iterable[Manifest]) -> list[Manifest]:
    """Return tasks in the order of a live table: those that run, those that wait, the ends by age."""
    return sorted(newest_first(list(tasks)), key=lambda task: _ORDER.get(phase_of(task), 3))


def drawn(watched: Watched, *, now: datetime, width: int, height: int, namespaces: bool) -> list[list[Cell]]:
    """Return the live table, no higher than the terminal."""
    tasks = ranked(watched.tasks.values())
    room = max(1, height - 4)
    lines = table(columns_for(LIVE_COLUMNS, wide=False, namespaces=namespaces), tasks[:room], now=now, width=width)
    more = f"… and {len(tasks) - room} more; " if len(tasks) > room else ""
    foot = f"{more}{summary(list(watched.tasks.values()))}" + (f", {len(watched.gone)} deleted" if watched.gone else "")
    lines.append([Cell(clipped(foot, width), "dim")])
    if watched.lost:
        lines.append([Cell(clipped(plain(f"nothing is heard: {watched.lost}"), width), "yellow")])
    return lines


# -------------------------------------------------------------------------------------------------------------- loops


class _Table:
    """A table that is drawn again and again."""

    def __init__(self, screen: Screen, watched: Watched, *, namespaces: bool) -> None:
        from rich.live import Live

        self._screen, self._watched, self._namespaces = screen, watched, namespaces
        self._live = Live(console=screen.console, auto_refresh=False, transient=False, vertical_overflow="crop")
        self._drawn = 0.0

    def __enter__(self) -> "_Table":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._drawn = 0.0
        self.draw([])
        self._live.stop()

    def draw(self, _: Sequence[Manifest]) -> None:
        from rich.console import Group

        if time.monotonic() - self._drawn < _PAUSE:  # what comes meanwhile is drawn within a second
            return
        self._drawn = time.monotonic()
        console = self._screen.console
        now, height = datetime.now(UTC), console.height
        lines = drawn(self._watched, now=now, width=console.width, height=height, namespaces=self._namespaces)
        self._live.update(Group(*(text_of(line) for line in lines)), refresh=True)


class _Lines:
    """A line for each change."""

    def __init__(self, screen: Screen, *, namespaces: bool, as_json: bool) -> None:
        self._screen, self._namespaces, self._json = screen, namespaces, as_json

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def draw(self, changed: Sequence[Manifest]) -> None:
        import json
        import sys

        for task in changed:
            if self._json:
                text = json.dumps(without_managed_fields(task), ensure_ascii=False)
            elif "status" not in task and "spec" not in task:
                text = f"{task['metadata']['name']} {DELETED}"
            else:
                phase, stage, progress, reason = line_of(task)
                where = f"{task['metadata']['namespace']}/" if self._namespaces else ""
                text = plain(
                    " ".join(filter(None, (f"{where}{task['metadata']['name']}", phase, stage, f"{progress}%", reason)))
                )
            self._screen.raw(text)
        if changed:
            sys.stdout.flush()


def watch(
    cluster: "Cluster",
    screen: Screen,
    *,
    namespace: str | None,
    wanted: Collection[Key] | None = None,
    labels: str | None = None,
    fields: str | None = None,
    timeout: float | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> Exit:
    """Show tasks until those that are wanted have ended, or for ever; return the exit code.

    ``timeout``: seconds. ``quiet``: nothing is shown.
    """
    from ptask.cluster import TASKS

    watched = Watched(None if wanted is None else frozenset(wanted))
    if wanted is not None and len(watched.wanted or ()) == 1:
        fields = f"metadata.name={next(iter(wanted))[1]}"
    until = None if timeout is None else time.monotonic() + timeout
    view: Any = contextlib.nullcontext()
    if not quiet:
        on_terminal = screen.terminal and not as_json
        namespaces = namespace is None
        view = (
            _Table(screen, watched, namespaces=namespaces)
            if on_terminal
            else _Lines(screen, namespaces=namespaces, as_json=as_json)
        )
    with view as shown:
        changes = cluster.follow(TASKS, namespace, labels=labels, fields=fields)
        with contextlib.closing(changes):
            for changed in _batches(changes, watched):
                if shown is not None:
                    shown.draw(changed)
                if watched.ended or (until is not None and time.monotonic() >= until):
                    break
    return of_phases(watched.phases.values()) if wanted is not None else Exit.DONE


def _batches(changes: "Iterator[Change | None]", watched: Watched) -> Iterator[Sequence[Manifest]]:
    for change in changes:
        yield [] if change is None else watched.take(change)


def seconds_of(text: str | None) -> float | None:
    """Return ``10m`` in seconds; None for None and 0. Raises :class:`CommandError`."""
    from ptask.why import seconds

    if text is None or text == "0":
        return None
    found = seconds(f"{text}s" if text.isdecimal() else text)
    if found is None:
        raise CommandError(f"cannot use --timeout {text}: give a duration such as 30s, 10m or 1h30m", code=Exit.USAGE)
    return found
