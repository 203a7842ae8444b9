"""What a task went through, event by event: from the last event that was told, and the task as it is now. Pure functions.

Versions of a task are coalesced on their way to PostgreSQL: only the latest waits. What happened in between is read from
what the status keeps: when the task was queued, started and finished, and its attempts. So a task that is first seen
Completed was Queued and Processing before, at the times that stand there, and an attempt that failed in between was followed
by Retrying.

The last event is all that has to be remembered of what was told (:func:`transitions` gives nothing for a task that stands
where its last event left it), and it is read from ``task_events`` itself, in the transaction that adds to it. Hence nothing
is told twice: not after a crash, not by a second operator, not when the row of the task was removed and is written again.

What the status does not keep is not told: an attempt that was given back leaves ``status.attempts``, so of two that were
given back between two versions the later one is told. Times are those of the status, by whichever clock stood behind each
(API server, node, operator); the order of events is that of their numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final, NamedTuple

from task_contract.models import Phase
from task_operator.jobs import current_attempt

DELETED: Final = "Deleted"
"""In place of a phase: the task was deleted before it had ended. A finished one has said its last word."""
_QUEUED: Final = str(Phase.QUEUED)
_PROCESSING: Final = str(Phase.PROCESSING)
_RETRYING: Final = str(Phase.RETRYING)
_SUCCEEDED: Final = "Succeeded"  # reason of an attempt that no other follows
_FINISHED: Final = frozenset(str(phase) for phase in Phase if phase.finished)
ENDS: Final = _FINISHED | {DELETED}
"""After these nothing follows."""
_RANK: Final = {_QUEUED: 0, _PROCESSING: 1, _RETRYING: 2}
"""Order within an attempt, which is queued, runs and fails."""


class Attempt(NamedTuple):
    """An entry of ``status.attempts``."""

    number: int
    job: str
    started_at: datetime | None
    finished_at: datetime | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Transition:
    """An event: a task has come into a phase, or waits in Queued for another reason."""

    phase: str
    """A phase, or :data:`DELETED`."""
    attempt: int
    """The attempt that runs, or has ended; of Queued the one that is waited for."""
    queued_at: datetime
    """When the stay in the queue began that this belongs to: a task that is given back begins a new one."""
    reason: str
    message: str | None = None
    at: datetime | None = None
    """None: no clock was read; about now."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A task as one version shows it. Fields are those of the status, unless they say otherwise."""

    phase: str
    attempt: int
    created_at: datetime
    queued_at: datetime
    """The creation of a task that has never been given back."""
    started_at: datetime | None = None
    finished_at: datetime | None = None
    deleted_at: datetime | None = None
    """When the task was seen to be gone."""
    attempts: Sequence[Attempt] = ()
    reason: str = ""
    """Of the condition Ready, as the message."""
    message: str | None = None
    waits_since: datetime | None = None
    """``status.queue.since``."""


def transitions(told: Transition | None, seen: Seen) -> list[Transition]:
    """Return the events that lead from the last one that was told (None: nothing was) to what is seen now, in order.

    After them the last event says where the task stands: its phase, or that it was deleted unfinished.
    """
    goal = _goal(seen)
    if told is not None and told.phase in ENDS:
        # An end is left when the API server was restored from a backup, or knows better of a task that was gone unseen.
        return [] if goal.phase == told.phase else [goal]
    story: list[Transition] = []
    last = told
    if last is None:
        last = Transition(_QUEUED, 1, seen.created_at, _QUEUED, at=seen.created_at)
        if _same_place(last, goal):
            return [replace(goal, at=seen.created_at)]
        story.append(last)
    anew = seen.queued_at > last.queued_at
    for attempt in sorted(seen.attempts, key=lambda one: one.number):
        if anew and (attempt.finished_at is None or attempt.finished_at > seen.queued_at):
            last = _into_queue(story, last, seen, goal)
            anew = False
        if (attempt.number, _RANK[_PROCESSING]) > (last.attempt, _RANK[last.phase]):
            began = attempt.started_at or attempt.finished_at
            last = _add(story, goal, Transition(_PROCESSING, attempt.number, last.queued_at, _PROCESSING, at=began))
        if _was_retried(attempt, seen) and (attempt.number, _RANK[_RETRYING]) > (last.attempt, _RANK[last.phase]):
            reason = attempt.reason or _RETRYING
            last = _add(story, goal, Transition(_RETRYING, attempt.number, last.queued_at, reason, at=attempt.finished_at))
    if anew:
        last = _into_queue(story, last, seen, goal)
    if (last.phase, last.attempt) != (goal.phase, goal.attempt) or (goal.phase == _QUEUED and last.reason != goal.reason):
        story.append(goal)
    return story


def withdrawn(told: Transition | None, seen: Seen) -> int | None:
    """Return the number of an attempt that was told to run and has been given back since: it does not count."""
    if told is None or told.phase != _PROCESSING or any(one.number >= told.attempt for one in seen.attempts):
        return None
    return told.attempt


def _goal(seen: Seen) -> Transition:
    """Return the event that says where the task stands."""
    finished = seen.phase in _FINISHED
    if seen.deleted_at is not None and not finished:
        return Transition(DELETED, seen.attempt, seen.queued_at, DELETED, at=seen.deleted_at)
    at: datetime | None
    match seen.phase:
        case Phase.QUEUED:
            at = seen.waits_since
        case Phase.PROCESSING | Phase.RETRYING:
            current = next((one for one in seen.attempts if one.number == seen.attempt), None)
            at = None if current is None else current.finished_at or current.started_at
        case _:
            at = seen.finished_at
    attempt = current_attempt(seen) if seen.phase == _QUEUED else seen.attempt
    return Transition(seen.phase, attempt, seen.queued_at, seen.reason or seen.phase, seen.message or None, at)


def _into_queue(story: list[Transition], last: Transition, seen: Seen, goal: Transition) -> Transition:
    """Tell of the stay in the queue that has begun since: an attempt was given back."""
    began = seen.started_at
    if last.phase == _QUEUED and last.queued_at == seen.created_at and began is not None and began <= seen.queued_at:
        # Nobody has told that it ran, and its entry is gone; that a first attempt ran stands in the status all the same.
        last = _add(story, goal, Transition(_PROCESSING, last.attempt, last.queued_at, _PROCESSING, at=began))
    attempt = last.attempt + (last.phase == _RETRYING)
    return _add(story, goal, Transition(_QUEUED, attempt, seen.queued_at, _QUEUED, at=seen.queued_at))


def _add(story: list[Transition], goal: Transition, found: Transition) -> Transition:
    """Add an event; of the one that the task stands at more is known."""
    if _same_place(found, goal):
        found = replace(goal, at=found.at)
    story.append(found)
    return found


def _same_place(one: Transition, other: Transition) -> bool:
    return (one.phase, one.attempt, one.queued_at) == (other.phase, other.attempt, other.queued_at)


def _was_retried(attempt: Attempt, seen: Seen) -> bool:
    """Whether the task went on after an attempt. One that ended with the task has the task's time: one write sets both."""
    if attempt.finished_at is None or attempt.reason == _SUCCEEDED:
        return False
    return seen.phase not in _FINISHED or attempt.number != seen.attempt or attempt.finished_at != seen.finished_at
