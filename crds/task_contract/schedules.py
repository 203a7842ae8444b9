"""ProcessingSchedule as frozen pydantic models: the source of its CRD.

A schedule makes tasks at the times of a cron schedule in a time zone. The tasks are its own: they go with it. What it has
done stands in its status and in the names of its tasks, so an operator that dies at any moment makes none twice.
"""

from enum import StrEnum
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from task_contract.models import Conditions, Metadata, Model, Spec, Timestamp

NAMES_SHOWN: Final = 32
"""Most names in ``status.active``."""


class ConcurrencyPolicy(StrEnum):
    """What becomes of a time that comes while a task of an earlier one has not finished."""

    ALLOW = "Allow"
    FORBID = "Forbid"
    REPLACE = "Replace"


class TemplateMetadata(Model):
    """What tasks of a schedule carry besides what the operator gives them."""

    labels: Annotated[
        dict[Annotated[str, Field(min_length=1, max_length=317)], Annotated[str, Field(max_length=63)]], Field(max_length=32)
    ] = {}
    """Labels of the tasks."""
    annotations: Annotated[
        dict[Annotated[str, Field(min_length=1, max_length=317)], Annotated[str, Field(max_length=4096)]],
        Field(max_length=32),
    ] = {}
    """Annotations of the tasks."""


class TaskTemplate(Model):
    """What each task is made from."""

    metadata: TemplateMetadata = TemplateMetadata()
    """Labels and annotations; names follow from the schedule and the time."""
    spec: Spec
    """The spec of the tasks, as of a ProcessingTask. Without cancel, dependsOn, idempotencyKey and notBefore, which are of
    one task alone."""


class ScheduleSpec(Model):
    """When there is to be a task, and which."""

    schedule: Annotated[str, Field(min_length=1, max_length=128)]
    """Minute, hour, day of month, month and day of week, as cron has them: `30 2 * * 1-5`. Or one of @hourly, @daily,
    @midnight, @weekly, @monthly, @yearly and @annually."""
    time_zone: Annotated[str, Field(min_length=1, max_length=64)] = "UTC"
    """The IANA time zone that the schedule is meant in, such as `Asia/Shanghai`."""
    concurrency_policy: ConcurrencyPolicy = ConcurrencyPolicy.ALLOW
    """A time comes while a task of an earlier one has not finished. Allow: they run side by side. Forbid: the time waits for
    its end, until startingDeadlineSeconds or the next time. Replace: the earlier one is canceled."""
    suspend: bool = False
    """true: make no tasks. The times that pass are missed, and not caught up. Tasks that there are go on."""
    starting_deadline_seconds: Annotated[int, Field(ge=10, le=31_536_000)] | None = None
    """A time that could not be kept is caught up within so many seconds, the latest one alone. Default: however late."""
    successful_history_limit: Annotated[int, Field(ge=0, le=1000)] = 3
    """So many completed tasks stay; older ones are deleted. Their rows in PostgreSQL stay."""
    failed_history_limit: Annotated[int, Field(ge=0, le=1000)] = 3
    """So many failed or canceled tasks stay; older ones are deleted. Their rows in PostgreSQL stay."""
    task_template: TaskTemplate
    """What the tasks are made from. A change holds for those that are made after it."""


class ScheduleStatus(Model):
    """What the operator has done for a schedule."""

    observed_generation: Annotated[int, Field(ge=0)] | None = None
    last_schedule_time: Timestamp | None = None
    """The latest time that a task was made for."""
    last_successful_time: Timestamp | None = None
    """When a task of the schedule was last completed."""
    next_schedule_time: Timestamp | None = None
    """The next time for a task, in UTC. One in the past is due: conditions tell what it waits for."""
    active: Annotated[list[Annotated[str, Field(max_length=253)]], Field(max_length=NAMES_SHOWN)] = []
    """Tasks that have not finished, the latest first; the first 32 of them."""
    active_count: Annotated[int, Field(ge=0)] = 0
    """Tasks that have not finished."""
    missed: Annotated[int, Field(ge=0)] = 0
    """Times that no task was made for, since there is the schedule. Of more than a thousand in a row a thousand count."""
    conditions: Conditions = []
    """Ready and Stalled: what kstatus and kubectl wait read."""


class ProcessingSchedule(Model):
    """A schedule, as a manifest holds it and as the API server hands it back."""

    api_version: Literal["tasks.zzdsj.io/v1"] = "tasks.zzdsj.io/v1"
    kind: Literal["ProcessingSchedule"] = "ProcessingSchedule"
    metadata: Metadata
    spec: ScheduleSpec
    status: ScheduleStatus = ScheduleStatus()

    plural: ClassVar[str] = "processingschedules"
