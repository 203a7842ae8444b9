"""Statuses as values: one function for each arrow of a task's life. Pure functions; the arguments are what is known."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from task_contract.lifecycle import conditions, stores_consistent
from task_contract.messages import AttemptOutcome
from task_contract.models import Attempt, Failure, Phase, ProcessingTask, QueueStatus, Result, Status
from task_operator.observation import Ending, View

_ATTEMPTS_KEPT: Final = 5  # the bound of status.attempts
_TEXT: Final = 1024  # the bound of texts in a status


def status_in(task: ProcessingTask, phase: Phase, *, reason: str, message: str, now: datetime, **changes: Any) -> Status:
    """Return the task's status in another phase: conditions that fit, and the changes; what is not named stays."""
    status = task.status
    consistent = stores_consistent(
        changes.get("result", status.result),
        changes.get("error", status.error),
        generation=task.metadata.generation,
        now=to_second(now),
        previous=status.conditions,
    )
    fixed = {
        "phase": phase,
        "observed_generation": task.metadata.generation,
        "queued_at": status.queued_at or task.metadata.creation_timestamp,
        "conditions": [
            *conditions(
                phase,
                reason=_condition_reason(reason),
                message=clip(message),
                generation=task.metadata.generation,
                now=to_second(now),
                previous=status.conditions,
            ),
            *([] if consistent is None else [consistent]),
        ],
    }
    return status.model_copy(update=fixed | changes)


def queued(task: ProcessingTask, queue: QueueStatus | None, *, now: datetime, **changes: Any) -> Status:
    """Return the status of a task that waits, and why if there is more to say than that."""
    reason = "Queued" if queue is None else queue.reason
    message = "waiting to run" if queue is None else queue.message or queue.reason
    return status_in(task, Phase.QUEUED, reason=reason, message=message, now=now, queue=queue, **changes)


def tells_a_wait(before: Status, after: Status) -> bool:
    """Tell whether a status says why its task waits, or since when, and nothing else: one that is welcome and can wait."""
    if after.phase is not before.phase or after.phase not in {Phase.QUEUED, Phase.RETRYING}:
        return False
    said: dict[str, object] = {"queue": None, "conditions": [], "observed_generation": None, "queued_at": after.queued_at}
    same_stay = before.queued_at in {None, after.queued_at}
    return same_stay and before.model_copy(update=said) == after.model_copy(update=said)


def given_back(task: ProcessingTask, view: View, *, now: datetime) -> dict[str, Any]:
    """Return the changes that give an attempt back: it keeps its number, was never counted, and begins a new stay."""
    status = task.status
    before = status.queued_at or task.metadata.creation_timestamp
    at = to_second(now)
    if before is not None and at <= before:  # clocks differ, or less than a second has passed: a stay has its own second
        at = before + timedelta(seconds=1)
    return {
        "queued_at": at,
        "attempt": view.attempt,
        "attempts": without_attempt(status.attempts, view.attempt),
        "job": view.ran_as,
        "stage": None,
        "progress": None,
    }


def completed(
    task: ProcessingTask,
    view: View,
    outcome: AttemptOutcome,
    started_at: datetime | None,
    *,
    now: datetime,
    message: str = "",
) -> Status:
    """Return the status of a task whose work is done. ``started_at``: of the last container, if known."""
    status = task.status
    return status_in(
        task,
        Phase.COMPLETED,
        reason=outcome.reason,
        message=message,
        now=now,
        attempt=view.attempt,
        job=view.ran_as,
        executor=view.executor,
        stage=None,
        progress=100,
        queue=None,
        retry_at=None,
        error=None,
        result=outcome.result,
        started_at=status.started_at or started_at or to_second(now),
        finished_at=to_second(now),
        attempts=ended_attempt(status, view, "Succeeded", started_at=started_at, now=now),
    )


def failed(
    task: ProcessingTask,
    failure: Failure,
    *,
    now: datetime,
    view: View | None = None,
    result: Result | None = None,
    started_at: datetime | None = None,
) -> Status:
    """Return the status of a failed task; without ``view`` it failed before any attempt of this kind."""
    status = task.status
    changes: dict[str, Any] = {}
    if view is not None:
        changes = {
            "attempt": view.attempt,
            "job": view.ran_as,
            "executor": view.executor,
            "started_at": status.started_at or started_at or to_second(now),
            "attempts": ended_attempt(status, view, failure.reason, started_at=started_at, now=now),
        }
    return status_in(
        task,
        Phase.FAILED,
        reason=failure.reason,
        message=failure.message,
        now=now,
        stage=None,
        queue=None,
        retry_at=None,
        error=failure,
        result=result,
        finished_at=to_second(now),
        **changes,
    )


def ended(task: ProcessingTask, view: View, ending: Ending, *, now: datetime, result: Result | None = None) -> Status:
    """Return the status of a task that was ended from outside: canceled, or over its deadline.

    ``result``: what it had done by then.
    """
    status = task.status
    changes: dict[str, Any] = {} if result is None else {"result": result}
    if any(attempt.number == view.attempt for attempt in status.attempts):
        changes["attempts"] = ended_attempt(status, view, ending.reason, started_at=None, now=now)
    if ending.phase is Phase.FAILED:
        changes["error"] = Failure(reason=ending.reason, message=ending.message, retryable=False)
    return status_in(
        task,
        ending.phase,
        reason=ending.reason,
        message=ending.message,
        now=now,
        stage=None,
        queue=None,
        retry_at=None,
        duplicate_of=ending.duplicate_of,
        finished_at=to_second(now),
        **changes,
    )


def with_attempt(attempts: Sequence[Attempt], attempt: Attempt) -> list[Attempt]:
    """Return the last few attempts with this one as the latest."""
    return [*without_attempt(attempts, attempt.number), attempt][-_ATTEMPTS_KEPT:]


def without_attempt(attempts: Sequence[Attempt], number: int) -> list[Attempt]:
    """Return the attempts without one that is not counted."""
    return [attempt for attempt in attempts if attempt.number != number]


def ended_attempt(status: Status, view: View, reason: str, *, started_at: datetime | None, now: datetime) -> list[Attempt]:
    """Return the last few attempts, the current one ended: that spends its number."""
    begun = next((attempt for attempt in status.attempts if attempt.number == view.attempt), None)
    return with_attempt(
        status.attempts,
        Attempt(
            number=view.attempt,
            job=view.ran_as,
            started_at=started_at or (None if begun is None else begun.started_at),
            finished_at=to_second(now),
            reason=reason,
        ),
    )


def ready_reason(status: Status) -> str | None:
    """Return the reason of the Ready condition."""
    return next((condition.reason for condition in status.conditions if condition.type == "Ready"), None)


def _condition_reason(reason: str) -> str:
    """Return a reason that ``metav1.Condition`` allows: a word of letters, digits and underscores."""
    word = "".join(character for character in reason if character.isascii() and (character.isalnum() or character == "_"))
    return word if word and word[0].isalpha() else "Unknown"


def clip(text: str) -> str:
    """Return a text that fits into a status."""
    return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"


def to_second(at: datetime, *, up: bool = False) -> datetime:
    """Return ``at`` to the second, as a status holds it. Ends of waits are rounded up: storing makes no wait shorter."""
    whole = at.astimezone(UTC).replace(microsecond=0)
    return whole + timedelta(seconds=1) if up and at.microsecond else whole
