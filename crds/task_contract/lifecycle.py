"""The life of a task as arithmetic: phases, their arrows and conditions, retry delays, exit codes.

Nothing here reads a clock or draws a random number; callers pass both in.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import IntEnum
from typing import Final, Literal

from task_contract.errors import ChunksLost, Fenced, GivenBack, HandedBack, StoresDisagree, TaskError
from task_contract.models import Condition, Failure, Phase, Result, RetryPolicy

ARROWS: Final[dict[Phase, frozenset[Phase]]] = {
    # Queued → Completed, Failed: an attempt may end before anyone saw it run.
    Phase.QUEUED: frozenset({Phase.PROCESSING, Phase.RETRYING, Phase.COMPLETED, Phase.FAILED, Phase.CANCELED}),
    # Processing → Queued: given back, not counted (suspended, evicted, store down).
    Phase.PROCESSING: frozenset({Phase.QUEUED, Phase.RETRYING, Phase.COMPLETED, Phase.FAILED, Phase.CANCELED}),
    Phase.RETRYING: frozenset({Phase.QUEUED, Phase.PROCESSING, Phase.COMPLETED, Phase.FAILED, Phase.CANCELED}),
    Phase.COMPLETED: frozenset(),
    Phase.FAILED: frozenset(),
    Phase.CANCELED: frozenset(),
}


class ExitCode(IntEnum):
    """Exit codes of the runner; the values are those of BSD ``sysexits.h`` where one fits."""

    SUCCEEDED = 0
    PERMANENT = 65  # EX_DATAERR: the Job's podFailurePolicy fails it at once
    STORE_UNAVAILABLE = 69  # EX_UNAVAILABLE
    RETRYABLE = 75  # EX_TEMPFAIL
    FENCED = 76  # EX_PROTOCOL: somebody else holds the attempt
    HANDED_BACK = 143  # 128 + SIGTERM, as a shell reports it


def exit_code(error: TaskError) -> ExitCode:
    """Return the exit code that tells the operator what ``error`` means for the attempt."""
    if isinstance(error, HandedBack):
        return ExitCode.HANDED_BACK
    if isinstance(error, GivenBack):
        return ExitCode.STORE_UNAVAILABLE
    if isinstance(error, Fenced):
        return ExitCode.FENCED
    return ExitCode.RETRYABLE if error.retryable else ExitCode.PERMANENT


def retry_delay(policy: RetryPolicy, *, failures: int, random: float) -> timedelta:
    """Return how long to wait after the ``failures``-th counted failure (1 for the first).

    ``random`` is uniform in [0, 1) and spreads the delay by ±``policy.jitter``. The exponent is capped before multiplying,
    so a long row of failures cannot overflow ``timedelta``.
    """
    if failures < 1:
        raise ValueError(f"cannot compute a retry delay after {failures} failures: at least 1 is needed")
    cap = policy.max_delay.total_seconds()
    seconds = policy.initial_delay.total_seconds()
    for _ in range(failures - 1):
        seconds *= policy.factor
        if seconds >= cap:
            break
    seconds = min(seconds, cap) * (1 + policy.jitter * (2 * random - 1))
    return timedelta(seconds=seconds)


STORES_CONSISTENT: Final = "StoresConsistent"
"""A condition beside those of the phase: it says nothing about whether the task goes on."""

_ConditionType = Literal["Ready", "Succeeded", "Stalled", "Reconciling"]


def conditions(
    phase: Phase,
    *,
    reason: str,
    message: str,
    generation: int,
    now: datetime,
    previous: Sequence[Condition] = (),
) -> tuple[Condition, ...]:
    """Return the conditions of a phase, as kstatus and ``kubectl wait --for=condition=Succeeded`` read them.

    ``lastTransitionTime`` is kept from ``previous`` where the status of a condition did not change, as the API conventions
    ask. ``reason`` defaults are the caller's: pass the phase's name when nothing more precise is known.
    """
    wanted: dict[_ConditionType, Literal["True", "False", "Unknown"]]
    match phase:
        case Phase.QUEUED:
            wanted = {"Ready": "False"}
        case Phase.PROCESSING | Phase.RETRYING:
            wanted = {"Ready": "False", "Succeeded": "Unknown", "Reconciling": "True"}
        case Phase.COMPLETED:
            wanted = {"Ready": "True", "Succeeded": "True"}
        case Phase.FAILED | Phase.CANCELED:
            wanted = {"Ready": "False", "Succeeded": "False", "Stalled": "True"}
    return tuple(
        Condition(
            type=name,
            status=status,
            reason=reason,
            message=message,
            observed_generation=generation,
            last_transition_time=_since(name, status, now=now, previous=previous),
        )
        for name, status in wanted.items()
    )


def stores_consistent(
    result: Result | None,
    error: Failure | None,
    *,
    generation: int,
    now: datetime,
    previous: Sequence[Condition] = (),
) -> Condition | None:
    """Return the condition StoresConsistent: do both stores hold exactly the chunks of the document, or knowledge base?

    True after a verification of all chunk ids, False with the numbers of missing and extra ones after a failed one; ``None``
    when the task has verified nothing.
    """
    status: Literal["True", "False"]
    if error is not None and error.reason in {StoresDisagree.reason, ChunksLost.reason}:
        status, reason, message = "False", error.reason, error.message
    elif result is not None and result.chunks is not None:
        counts = result.milvus_count, result.elasticsearch_count
        if counts != (result.chunks, result.chunks):
            return None  # not verified: an older runner, or a result that lacks counts
        version = "" if result.version is None else f" of version {result.version}"
        held = f"exactly the {result.chunks} chunks{version}" if result.chunks else "no chunk of the document"
        status, reason, message = "True", "Verified", f"Milvus and Elasticsearch hold {held}: 0 missing, 0 extra"
    else:
        return None
    return Condition(
        type=STORES_CONSISTENT,
        status=status,
        reason=reason,
        message=message,
        observed_generation=generation,
        last_transition_time=_since(STORES_CONSISTENT, status, now=now, previous=previous),
    )


def _since(type_: str, status: str, *, now: datetime, previous: Sequence[Condition]) -> datetime:
    """Return since when a condition has had its status."""
    before = next((one for one in previous if one.type == type_ and one.status == status), None)
    return now if before is None else before.last_transition_time
