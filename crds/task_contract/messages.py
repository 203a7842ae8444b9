"""What a pod says: how its attempt ended, and how far it has come."""

import re
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field, ValidationError

from task_contract.errors import Fenced, GivenBack, TaskError
from task_contract.models import Failure, Model, Result, Stage, Timestamp

TERMINATION_LIMIT: Final = 3072
"""Bytes of a termination message: the kubelet cuts at 4096, and what it cuts is no JSON any more."""
LOG_LIMIT: Final = 1024
"""Characters of the end of a log, the bound of ``status.error.log``; and bytes of it in a termination message."""
_UNPRINTABLE: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\n\t -~\u00a0-\U0010ffff]|[\ud800-\udfff]")
"""Colours of terminals; control characters but line ends and tabs (PostgreSQL takes no NUL); halves of characters."""
_FRAME: Final = re.compile(r'  File ".*", line \d+ in .+')
"""A line of faulthandler's stacks. Those of an exception have a comma after the number, and the exception comes last."""


def last_lines(text: str, *, limit: int = LOG_LIMIT) -> str:
    """Return the last whole lines of a log that fit, as printable text; of a line that is longer alone, its end.

    >>> last_lines("one\\ntwo\\nthree\\n", limit=9)
    'two\\nthree'
    """
    clean = _UNPRINTABLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).strip("\n")
    if len(clean) <= limit:
        return clean
    if limit < 2:
        return ""
    kept = clean[-limit:]
    if clean[-limit - 1] == "\n":
        return kept
    _, newline, rest = kept.partition("\n")
    return rest if newline else "…" + kept[1:]


def hung(log: str) -> bool:
    """Whether a log ends as that of a runner which faulthandler has ended, since no thread of Python could run any more."""
    return _FRAME.fullmatch(log.rstrip().rpartition("\n")[2]) is not None


class Outcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    GIVEN_BACK = "GivenBack"
    """Not counted: a store was down, or the pod was asked to stop."""
    FENCED = "Fenced"


class AttemptOutcome(Model):
    """The termination message, and the row in ``task_results`` that serves when the message or the pod is gone."""

    outcome: Outcome
    attempt: Annotated[int, Field(ge=1)]
    reason: Annotated[str, Field(min_length=1, max_length=64)] = "Completed"
    """Completed, PartiallyFailed, Deleted, Superseded or Unchanged for a success; else the reason of the error."""
    result: Result | None = None
    error: Failure | None = None
    log: Annotated[str, Field(max_length=LOG_LIMIT)] | None = None
    """Last lines of the runner's log, of a failure only."""

    @classmethod
    def of_error(cls, error: TaskError, *, attempt: int) -> "AttemptOutcome":
        """Return what an error means for the attempt. Long messages are cut to the bounds of the schema."""
        outcome = Outcome.FAILED
        if isinstance(error, GivenBack):
            outcome = Outcome.GIVEN_BACK
        elif isinstance(error, Fenced):
            outcome = Outcome.FENCED
        message = error.message if len(error.message) <= 1024 else error.message[:1023] + "…"
        failure = Failure(reason=error.reason, message=message, retryable=error.retryable, stage=error.stage)
        return cls(outcome=outcome, attempt=attempt, reason=error.reason, error=failure)

    def termination_message(self) -> str:
        """Return JSON of at most :data:`TERMINATION_LIMIT` bytes; what does not fit is shortened, never cut blindly."""
        log, whole = self.log or "", self
        while log:
            text = whole.model_dump_json(by_alias=True, exclude_none=True)
            if len(text.encode()) <= TERMINATION_LIMIT and len(log.encode()) <= LOG_LIMIT:
                return text
            log = last_lines(log, limit=len(log) * 3 // 4)
            whole = self.model_copy(update={"log": log})
        shorter = self.model_copy(update={"log": None})
        text = shorter.model_dump_json(by_alias=True, exclude_none=True)
        if len(text.encode()) <= TERMINATION_LIMIT:
            return text
        if self.error is not None:
            shorter = shorter.model_copy(
                update={"error": self.error.model_copy(update={"message": self.error.message[:400]})}
            )
        if self.result is not None:
            shorter = shorter.model_copy(
                update={"result": self.result.model_copy(update={"seconds": None, "components": None})}
            )
        return shorter.model_dump_json(by_alias=True, exclude_none=True)

    @classmethod
    def parse(cls, text: str | None) -> "AttemptOutcome | None":
        """Read a termination message; ``None`` for none, or for one that is not ours (a crash before it was written)."""
        if not text:
            return None
        try:
            return cls.model_validate_json(text)
        except ValidationError:
            return None


class ProgressEvent(Model):
    """Published on :data:`task_contract.names.PROGRESS_CHANNEL`; may be lost, so nothing depends on it."""

    uid: str
    namespace: str
    name: str
    attempt: Annotated[int, Field(ge=1)]
    stage: Stage
    progress: Annotated[int, Field(ge=0, le=100)]
    at: Timestamp
    done: Annotated[int, Field(ge=0)] | None = None
    """Of a batch: documents that have ended, well or not."""
    total: Annotated[int, Field(ge=0)] | None = None
    """Of a batch: documents that there are."""


def progress_event(
    *,
    uid: str,
    namespace: str,
    name: str,
    attempt: int,
    stage: Stage,
    progress: int,
    at: datetime,
    counted: tuple[int, int] | None = None,
) -> str:
    """Return the JSON of a progress event; ``counted`` is (done, total) of a batch."""
    done, total = counted or (None, None)
    event = ProgressEvent(
        uid=uid,
        namespace=namespace,
        name=name,
        attempt=attempt,
        stage=stage,
        progress=progress,
        at=at,
        done=done,
        total=total,
    )
    return event.model_dump_json(by_alias=True, exclude_none=True)
