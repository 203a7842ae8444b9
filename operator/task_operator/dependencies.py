"""What a task waits for before its first attempt: other tasks (``spec.dependsOn``) and a time (``spec.notBefore``).

Pure functions. A task waits for the Completed of each task that it names. What it names may be made later, and may have been
deleted since: PostgreSQL knows how it ended. A task that waits for itself, by way of others, never runs: each task of such a
circle is refused, by the first look that sees all of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from task_contract.models import Failure, Phase, ProcessingTask

DEPENDS_ON: Final = "DependsOn"
"""Reason in ``status.queue`` of a task that waits for others."""
NOT_BEFORE: Final = "NotBefore"
"""Of one that waits for its time."""
DEPENDENCY_FAILED: Final = "DependencyFailed"
"""Reason of a task that failed because one that it needs did not complete."""


@dataclass(frozen=True, slots=True)
class Dependency:
    """What is known of a task that another one waits for."""

    name: str
    phase: str | None
    """None: there is no such task, and none is known to have ended."""


@dataclass(frozen=True, slots=True)
class Dependencies:
    """What is known of all tasks that one waits for."""

    of: tuple[Dependency, ...] = ()
    circle: tuple[str, ...] = ()
    """Names from the task to itself, if it waits for itself."""
    sure: bool = True
    """Whether PostgreSQL was asked for those that are not there, or there is none."""


def circle_through(name: str, needed_by: Callable[[str], Sequence[str]]) -> tuple[str, ...]:
    """Return a way from a task over what it needs back to itself, with its name at both ends; empty: there is none.

    >>> circle_through("a", {"a": ["b"], "b": ["c", "a"], "c": []}.__getitem__)
    ('a', 'b', 'a')
    """
    came_from: dict[str, str] = {}
    ahead = [name]
    while ahead:
        at = ahead.pop()
        for needed in needed_by(at):
            if needed == name:
                way = [name, at]
                while way[-1] != name:
                    way.append(came_from[way[-1]])
                return tuple(reversed(way))
            if needed not in came_from:
                came_from[needed] = at
                ahead.append(needed)
    return ()


def judge(dependencies: Dependencies) -> Failure | str | None:
    """Return why a task can never run, or in words what it waits for; None: all that it needs has completed."""
    if dependencies.circle:
        way = " → ".join(dependencies.circle)
        return Failure(
            reason="InvalidTask",
            message=f"cannot run: the task waits for itself by spec.dependsOn: {way}; create them anew without the circle",
            retryable=False,
        )
    bad = [one for one in dependencies.of if one.phase in {Phase.FAILED, Phase.CANCELED}]
    if bad:
        first = bad[0]
        message = f"cannot run: task {first.name}, which spec.dependsOn names, is {first.phase}; create both anew"
        return Failure(reason=DEPENDENCY_FAILED, message=message, retryable=False)
    left = [one for one in dependencies.of if one.phase != Phase.COMPLETED]
    if not left:
        return None
    doubt = "" if dependencies.sure else ", and PostgreSQL, which may know of one that was deleted, does not answer"
    said = ", ".join(f"{one.name} ({one.phase or f'there is none{doubt}'})" for one in left)
    return f"waits for {len(left)} of {len(dependencies.of)} tasks: {said}"


def left_until(task: ProcessingTask, now: datetime) -> float:
    """Return for how many seconds ``spec.notBefore`` holds a task back; 0: it does not."""
    due = task.spec.not_before
    return 0.0 if due is None else max((due - now).total_seconds(), 0.0)
