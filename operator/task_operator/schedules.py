"""Schedules as values: which task is to be made now, which canceled or deleted, what the status says. Pure functions.

``status.nextScheduleTime`` is the earliest time that nothing has been decided about; the status is written after what was
decided is done, and so moves on past a time only then. An operator that dies in between finds the time due again, and the
task of it by its name, which follows from the schedule's uid and the minute. See docs/adr/0048.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from typing import Any, Final, Literal

from task_contract.models import Condition, Phase
from task_contract.names import (
    API_VERSION,
    KIND,
    MANAGED_BY,
    MANAGED_BY_LABEL,
    SCHEDULE_KIND,
    SCHEDULE_LABEL,
    SCHEDULED_AT_ANNOTATION,
    scheduled_task_name,
)
from task_contract.schedules import NAMES_SHOWN, ConcurrencyPolicy, ProcessingSchedule, ScheduleSpec, ScheduleStatus
from task_operator.cron import BadSchedule, Cron

SKEW: Final = timedelta(minutes=5)
"""So far the clocks of two operators may be apart. A next time that is further in the future than by this was written
under a wrong clock."""
_COUNTED: Final = 1000
"""Times of a gap that are counted as missed: a year of minutes would be half a million, and seconds of work."""
_UNARCHIVED: Final = timedelta(seconds=5)
"""So long until it is looked again whether PostgreSQL has a task that is to go."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A ProcessingSchedule as it is decided upon."""

    namespace: str
    name: str
    uid: str
    spec: ScheduleSpec
    status: ScheduleStatus
    created: datetime
    generation: int
    deleting: bool = False

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> "Schedule":
        """Read one as the API server hands it out. Raises pydantic's ValidationError for one that is none."""
        schedule = ProcessingSchedule.model_validate(manifest)
        metadata = manifest["metadata"]
        return cls(
            namespace=metadata["namespace"],
            name=metadata["name"],
            uid=metadata["uid"],
            spec=schedule.spec,
            status=schedule.status,
            created=datetime.fromisoformat(metadata["creationTimestamp"]),
            generation=metadata["generation"],
            deleting=metadata.get("deletionTimestamp") is not None,
        )

    def task_name(self, at: datetime) -> str:
        """Return the name of the task of a time."""
        return scheduled_task_name(schedule_name=self.name, schedule_uid=self.uid, at=at)


@dataclass(frozen=True, slots=True)
class Run:
    """A task that a schedule has made."""

    name: str
    uid: str
    resource_version: int
    at: datetime
    """The time that it was made for."""
    phase: str
    finished_at: datetime | None = None
    cancel: bool = False
    """Whether it has been told to end."""

    @property
    def finished(self) -> bool:
        """Whether it will never change phase again."""
        return self.phase in {Phase.COMPLETED, Phase.FAILED, Phase.CANCELED}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the API server did not take a task."""

    message: str
    lasting: bool
    """Whether it will say so until the schedule is changed."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done, in this order."""

    create: datetime | None
    """The time that a task is to be made for."""
    cancel: tuple[Run, ...]
    status: ScheduleStatus
    """What holds once the above is done."""
    delete: tuple[Run, ...]
    """Finished tasks that are to go: never before the status is written, which alone keeps them from being made again."""
    wake_at: datetime | None
    """When to decide again although nothing has changed."""


@dataclass(frozen=True, slots=True)
class _Due:
    """What becomes of the times up to now."""

    next: datetime | None
    create: datetime | None = None
    cancel: tuple[Run, ...] = ()
    missed: int = 0
    last: datetime | None = None
    waits: str = ""
    look_again: datetime | None = None


def decide(
    schedule: Schedule,
    runs: Sequence[Run],
    now: datetime,
    *,
    archived: Callable[[Run], bool],
    refused: Refusal | None = None,
) -> Decision:
    """Decide about a schedule, given all tasks of it that there are.

    ``archived``: whether PostgreSQL has a finished task as it is, so that it may be deleted. ``refused``: why a task of the
    latest time could just not be made; nothing is created then.
    """
    status, spec = schedule.status, schedule.spec
    trouble: BadSchedule | None = None
    try:
        due = _due(schedule, Cron(spec.schedule, spec.time_zone), runs, now, refused=refused)
    except BadSchedule as error:
        trouble, due = error, _Due(next=None)
    active = sorted((run for run in runs if not run.finished), key=lambda run: (run.at, run.name), reverse=True)
    names = [*([] if due.create is None else [schedule.task_name(due.create)]), *(run.name for run in active)]
    surplus = _surplus(spec, runs)
    gone = tuple(run for run in surplus if archived(run))
    completed = (run.finished_at for run in runs if run.phase == Phase.COMPLETED and run.finished_at is not None)
    after = ScheduleStatus(
        observed_generation=schedule.generation,
        last_schedule_time=_latest(status.last_schedule_time, due.last),
        last_successful_time=_latest(status.last_successful_time, *completed),
        next_schedule_time=due.next,
        active=names[:NAMES_SHOWN],
        active_count=len(names),
        missed=status.missed + due.missed,
        conditions=_conditions(schedule, now, trouble=trouble, waits=due.waits, refused=refused),
    )
    looks = [due.look_again, now + _UNARCHIVED if len(gone) < len(surplus) else None]
    if due.next is not None and due.next > now:
        looks.append(due.next)
    return Decision(
        create=due.create,
        cancel=due.cancel,
        status=after,
        delete=gone,
        wake_at=min((at for at in looks if at is not None), default=None),
    )


def build_task(
    schedule: Schedule, at: datetime, template: Mapping[str, Any], *, labels: Mapping[str, str]
) -> dict[str, Any]:
    """Return the manifest of the task of a time. ``template``: ``spec.taskTemplate`` as it stands in the schedule, with
    fields that a later release may know. ``labels``: of the task in any case."""
    metadata = template.get("metadata") or {}
    owner = {
        "apiVersion": API_VERSION,
        "kind": SCHEDULE_KIND,
        "name": schedule.name,
        "uid": schedule.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": schedule.task_name(at),
            "namespace": schedule.namespace,
            "labels": {
                **(metadata.get("labels") or {}),
                **labels,
                SCHEDULE_LABEL: schedule.name,
                MANAGED_BY_LABEL: MANAGED_BY,
            },
            "annotations": {**(metadata.get("annotations") or {}), SCHEDULED_AT_ANNOTATION: rfc3339(at)},
            "ownerReferences": [owner],
        },
        "spec": template["spec"],
    }


def owner_of(manifest: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return name and uid of the schedule that made a task; None if none did."""
    for owner in manifest["metadata"].get("ownerReferences") or ():
        if owner.get("controller") and owner["kind"] == SCHEDULE_KIND and owner["apiVersion"] == API_VERSION:
            return owner["name"], owner["uid"]
    return None


def run_of(manifest: Mapping[str, Any]) -> Run:
    """Read a task that a schedule made."""
    metadata, status = manifest["metadata"], manifest.get("status") or {}
    finished = status.get("finishedAt")
    return Run(
        name=metadata["name"],
        uid=metadata["uid"],
        resource_version=int(metadata["resourceVersion"]),
        at=_scheduled_at(metadata),
        phase=status.get("phase") or Phase.QUEUED,
        finished_at=None if finished is None else datetime.fromisoformat(finished),
        cancel=bool((manifest.get("spec") or {}).get("cancel")),
    )


def rfc3339(at: datetime) -> str:
    """Write a time to the second, in UTC."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _scheduled_at(metadata: Mapping[str, Any]) -> datetime:
    """By the name, which nobody can change; an annotation is for people."""
    try:
        return datetime.strptime(metadata["name"].rpartition("-")[2], "%Y%m%d%H%M").replace(tzinfo=UTC)
    except ValueError:  # somebody made it, in the name of the schedule
        return datetime.fromisoformat(metadata["creationTimestamp"])


def _latest(*times: datetime | None) -> datetime | None:
    return max((at for at in times if at is not None), default=None)


# ------------------------------------------------------------------------------------------------------------ the times


def _next(schedule: Schedule, cron: Cron, now: datetime) -> datetime | None:
    """Return the earliest time that nothing has been decided about."""
    status, fresh = schedule.status, cron.next(now)
    known, edited = status.next_schedule_time, status.observed_generation != schedule.generation
    if known is None:
        # None of a new one, which may have been made while no operator ran; else the schedule could not be read before.
        return cron.next(schedule.created) if status.observed_generation is None else fresh
    if known > now and edited:
        return fresh
    if not cron.is_time(known):  # of the schedule before a change: what it has missed is no time of this one
        return fresh
    ahead = cron.next(now + SKEW)
    return fresh if ahead is not None and known > ahead else known


def _due(schedule: Schedule, cron: Cron, runs: Sequence[Run], now: datetime, *, refused: Refusal | None) -> _Due:
    spec = schedule.spec
    first = _next(schedule, cron, now)
    if first is None:
        raise BadSchedule("NeverDue", f"spec.schedule: {spec.schedule!r} has no time in the next 50 years")
    if first > now:
        return _Due(next=first)
    fresh = cron.next(now)
    times = [first, *islice(takewhile(lambda at: at <= now, cron.times(first)), _COUNTED - 1)]
    latest = times[-1] if len(times) < _COUNTED else cron.latest(now) or times[-1]
    made = {run.at for run in runs}
    earlier = sum(at not in made for at in times if at != latest)
    last = max((at for at in times if at in made), default=None)
    active = [run for run in runs if not run.finished and run.at != latest]
    cancel: tuple[Run, ...] = ()
    if spec.concurrency_policy is ConcurrencyPolicy.REPLACE:
        cancel = tuple(run for run in active if not run.cancel)
    if latest in made:  # whoever made it did not live to write the status, nor to cancel the others
        return _Due(next=fresh, cancel=cancel, missed=earlier, last=latest)
    deadline = None
    if spec.starting_deadline_seconds is not None:
        deadline = latest + timedelta(seconds=spec.starting_deadline_seconds)
    if spec.suspend or (deadline is not None and now > deadline):
        return _Due(next=fresh, missed=earlier + 1, last=last)
    # A second after it: the deadline itself is in time.
    again = min((at for at in (fresh, deadline and deadline + timedelta(seconds=1)) if at is not None), default=None)
    if spec.concurrency_policy is ConcurrencyPolicy.FORBID and active:
        waits = f"the task of {rfc3339(latest)} is made when {active[0].name} has finished"
        return _Due(next=latest, missed=earlier, last=last, waits=waits, look_again=again)
    if refused is not None:
        return _Due(next=latest, missed=earlier, last=last, look_again=again)
    return _Due(next=fresh, create=latest, cancel=cancel, missed=earlier, last=latest)


def _surplus(spec: ScheduleSpec, runs: Sequence[Run]) -> list[Run]:
    """Return the finished tasks over the limits, those that ended first."""
    found: list[Run] = []
    for completed, most in ((True, spec.successful_history_limit), (False, spec.failed_history_limit)):
        ended = [run for run in runs if run.finished and (run.phase == Phase.COMPLETED) is completed]
        ended.sort(key=lambda run: (run.finished_at or run.at, run.at, run.name), reverse=True)
        found += ended[most:]
    return found


# ----------------------------------------------------------------------------------------------------------- the status


def _conditions(
    schedule: Schedule, now: datetime, *, trouble: BadSchedule | None, waits: str, refused: Refusal | None
) -> list[Condition]:
    """Return Ready and, only when it is so, Stalled."""
    found: list[tuple[str, Literal["True", "False"], str, str]] = []
    if trouble is not None:
        found = [("Ready", "False", trouble.reason, str(trouble)), ("Stalled", "True", trouble.reason, str(trouble))]
    elif refused is not None:
        message = f"the task of the last time could not be made: {refused.message}"
        found.append(("Ready", "False", "TaskRefused", message))
        if refused.lasting:
            found.append(("Stalled", "True", "TaskRefused", message))
    elif schedule.spec.suspend:
        found.append(("Ready", "True", "Suspended", "no tasks are made while spec.suspend is true"))
    elif waits:
        found.append(("Ready", "True", "Waiting", waits))
    else:
        found.append(("Ready", "True", "Scheduled", "tasks are made at the times of the schedule"))
    before = {condition.type: condition for condition in schedule.status.conditions}
    second = now.replace(microsecond=0)
    return [
        Condition(
            type=kind,
            status=status,
            observed_generation=schedule.generation,
            last_transition_time=before[kind].last_transition_time
            if kind in before and before[kind].status == status
            else second,
            reason=reason,
            message=message[:32768],
        )
        for kind, status, reason, message in found
    ]
