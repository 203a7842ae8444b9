"""Schedules: makes their tasks, cancels, deletes old ones. Gathers, lets :mod:`task_operator.schedules` decide, applies.

A schedule is looked at when its next time has come, soon after news of it or its tasks, and each minute. What is done may be
done twice: tasks have names that follow from schedule and minute, ``409`` for one of ours is success, and the status, which
moves on past a time, is written last. It carries the resourceVersion, so that what is counted is counted once.

A cluster without the CRD ProcessingSchedule, or without the right to list schedules, has none; that is looked at again now
and then.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol

import structlog
from pydantic import ValidationError

from task_contract.names import SCHEDULE_LABEL
from task_contract.schedules import ScheduleStatus
from task_operator.lookout import Lookout
from task_operator.metrics import Metrics
from task_operator.schedules import Decision, Refusal, Run, Schedule, build_task, decide, owner_of, run_of
from task_operator.selection import inherited
from task_platform.kubernetes import ClusterError, Conflict, Forbidden, Invalid, Manifest, NotFound, Page

_log = structlog.get_logger(__name__)

Key = tuple[str, str]
"""Namespace and name of a schedule, or of a task."""
Archived = Callable[[str, int], bool]
"""Whether PostgreSQL has the task of a uid in a resourceVersion, or no PostgreSQL is configured."""

_TICK: Final = 1.0  # seconds between two looks at the clock
_EVERY: Final = 60.0  # seconds between two looks at all of them: the clock may have been set
_AGAIN: Final = timedelta(seconds=2)  # after a look that did not succeed
_REFUSED: Final = 10.0  # seconds between two tries of a task that was refused


class Api(Protocol):
    """The part of :class:`task_operator.cluster.Cluster` that is used."""

    def list_schedules(self, namespace: str | None) -> AsyncIterator[Page]: ...  # noqa: D102 - see Cluster
    def list_scheduled_tasks(self, namespace: str | None) -> AsyncIterator[Page]: ...  # noqa: D102
    async def get_task(self, namespace: str, name: str) -> Manifest: ...  # noqa: D102
    async def create_task(self, task: Manifest) -> Manifest: ...  # noqa: D102
    async def cancel_task(self, namespace: str, name: str, *, uid: str) -> Manifest: ...  # noqa: D102
    async def delete_task(self, namespace: str, name: str, *, uid: str, resource_version: int) -> None: ...  # noqa: D102
    async def patch_schedule_status(  # noqa: D102
        self, namespace: str, name: str, *, uid: str, resource_version: int, status: Mapping[str, Any]
    ) -> Manifest: ...


@dataclass(slots=True)
class _Known:
    """What is known of a schedule besides its tasks."""

    schedule: Schedule
    version: int
    template: Mapping[str, Any]
    labels: Mapping[str, str]
    """That its tasks have too."""
    wake_at: datetime | None = None
    refused: Refusal | None = None
    refused_at: float = float("-inf")


class ScheduleController:
    """Keeps schedules, until cancelled."""

    def __init__(
        self,
        *,
        api: Api,
        metrics: Metrics,
        archived: Archived,
        namespaces: Sequence[str] = (),
        selector: str = "",
        watched: bool = True,
        resync_seconds: float = 300,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``selector``: of the labels of what is looked after: a schedule's tasks have its own. ``watched``: whether
        :meth:`on_schedule` is told of schedules; else they are listed every few seconds."""
        self._api = api
        self._metrics = metrics
        self._archived = archived
        self._namespaces: tuple[str | None, ...] = tuple(namespaces) or (None,)
        self._selector = selector
        self._clock = clock
        self._monotonic = monotonic
        self._known: dict[Key, _Known] = {}
        self._runs: dict[Key, tuple[str, Run]] = {}
        """Tasks of schedules with the uid of their schedule."""
        self._of: dict[str, set[Key]] = {}
        """The keys of a schedule's tasks, by its uid."""
        self._lookout = Lookout("schedules", listing=self._list, watched=watched, resync_seconds=resync_seconds)

    # ------------------------------------------------------------------------------------------------- what is known

    def on_schedule(self, kind: str, manifest: Mapping[str, Any]) -> None:
        """Take an event of the watch on ProcessingSchedules."""
        metadata = manifest["metadata"]
        key = (metadata["namespace"], metadata["name"])
        if kind != "DELETED":
            self._put_schedule(key, manifest)
        elif (known := self._known.get(key)) is not None and known.schedule.uid == metadata["uid"]:
            del self._known[key]  # owner references end its tasks

    def on_task(self, kind: str, manifest: Mapping[str, Any]) -> None:
        """Take an event of the watch on tasks; those that no schedule made are ignored."""
        metadata = manifest["metadata"]
        if SCHEDULE_LABEL not in (metadata.get("labels") or ()):
            if self._runs and (metadata["namespace"], metadata["name"]) in self._runs:
                self._drop_run((metadata["namespace"], metadata["name"]))  # somebody has taken it out
            return
        if kind == "DELETED":
            there = self._runs.get((metadata["namespace"], metadata["name"]))
            if there is not None and there[1].uid == metadata["uid"]:
                self._drop_run((metadata["namespace"], metadata["name"]))
        else:
            self._put_run(manifest)

    def relist(self) -> None:
        """Have everything listed soon: a watch was lost for longer than the server remembers, with deletions unseen."""
        self._lookout.relist()

    def _put_schedule(self, key: Key, manifest: Mapping[str, Any]) -> None:
        metadata = manifest["metadata"]
        version = int(metadata["resourceVersion"])
        known = self._known.get(key)
        if known is not None and version < known.version:
            return
        try:
            schedule = Schedule.from_manifest(manifest)
        except ValidationError as error:  # of a later release
            _log.warning("cannot read a ProcessingSchedule", namespace=key[0], schedule=key[1], error=str(error))
            self._known.pop(key, None)
            return
        template = manifest["spec"]["taskTemplate"]
        labels = inherited(metadata.get("labels") or {}, selector=self._selector)
        if known is None or known.schedule.uid != schedule.uid:
            self._known[key] = _Known(schedule, version, template, labels)
        else:
            if known.schedule.generation != schedule.generation:
                known.refused = None  # what was refused may be what was changed
            known.schedule, known.version, known.template, known.labels = schedule, version, template, labels
        self._lookout.soon(key)

    def _put_run(self, manifest: Mapping[str, Any]) -> None:
        owner, metadata = owner_of(manifest), manifest["metadata"]
        if owner is None:
            return
        name, uid = owner
        key, run = (metadata["namespace"], metadata["name"]), run_of(manifest)
        there = self._runs.get(key)
        if there is not None and run.resource_version < there[1].resource_version:
            return
        if there is not None and there[0] != uid:
            self._drop_run(key)
        self._runs[key] = (uid, run)
        self._of.setdefault(uid, set()).add(key)
        if there is None or (there[1].phase, there[1].cancel) != (run.phase, run.cancel):
            self._lookout.soon((key[0], name))

    def _drop_run(self, key: Key) -> None:
        uid, _ = self._runs.pop(key)
        self._of[uid].discard(key)
        if not self._of[uid]:
            del self._of[uid]
        for schedule_key, known in self._known.items():
            if known.schedule.uid == uid:
                self._lookout.soon(schedule_key)

    # ----------------------------------------------------------------------------------------------------- running

    async def run(self, watching: asyncio.Event) -> None:
        """Wait for the watches, list everything, look at schedules in time. May be run again after it was cancelled."""
        await watching.wait()
        await self._lookout.list_until_done()
        self._lookout.restart()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._lookout.list_forever(), name="schedule lists")
            full = self._monotonic()
            while True:
                now = self._clock()
                due = {key for key, one in self._known.items() if one.wake_at is not None and one.wake_at <= now}
                if self._monotonic() >= full:
                    due, full = set(self._known), self._monotonic() + _EVERY
                for key in self._lookout.begin(self._known, due):
                    group.create_task(self._guarded(key), name=f"schedule {key[0]}/{key[1]}")
                await self._lookout.rest(_TICK)

    async def _list(self) -> None:
        """List schedules, then their tasks, and take in the tasks first: of a schedule that is known all of them are."""
        schedules: dict[Key, Manifest] = {}
        tasks: dict[Key, Manifest] = {}
        schedules_at = tasks_at = 0
        try:
            for namespace in self._namespaces:
                async for page in self._api.list_schedules(namespace):
                    schedules_at = page.resource_version
                    schedules |= {(one["metadata"]["namespace"], one["metadata"]["name"]): one for one in page.items}
        except (NotFound, Forbidden) as error:
            if not self._lookout.absent:
                _log.warning(
                    "there are no schedules: install the CRD processingschedules with its rights", error=error.message
                )
            self._lookout.absent = error.message
            return
        if self._lookout.absent:
            _log.info("there are schedules now")
            self._lookout.absent = ""
        for namespace in self._namespaces:
            async for page in self._api.list_scheduled_tasks(namespace):
                tasks_at = page.resource_version
                tasks |= {(one["metadata"]["namespace"], one["metadata"]["name"]): one for one in page.items}
        for key in [key for key, (_, run) in self._runs.items() if key not in tasks and run.resource_version <= tasks_at]:
            self._drop_run(key)
        for manifest in tasks.values():
            self._put_run(manifest)
        for key in [key for key, one in self._known.items() if key not in schedules and one.version <= schedules_at]:
            del self._known[key]
        for key, manifest in schedules.items():
            self._put_schedule(key, manifest)

    async def _guarded(self, key: Key) -> None:
        known = self._known.get(key)
        try:
            if known is not None:
                await self._look(key, known)
        except ClusterError as error:
            _log.warning(
                "cannot look after a schedule; trying again", namespace=key[0], schedule=key[1], error=error.message
            )
            self._later(known)
        except Exception:  # noqa: BLE001 - a bug in one schedule must not end the others, nor the tasks
            _log.exception("cannot look after a schedule", namespace=key[0], schedule=key[1])
        finally:
            self._lookout.ended(key)

    def _later(self, known: _Known | None) -> None:
        if known is not None:
            known.wake_at = self._clock() + _AGAIN

    # ------------------------------------------------------------------------------------------------ one schedule

    async def _look(self, key: Key, known: _Known) -> None:
        schedule, version = known.schedule, known.version
        known.wake_at = None
        if schedule.deleting:
            return
        now = self._clock()
        decided = self._decide(schedule, now)
        if decided.create is not None:
            if self._monotonic() - known.refused_at >= _REFUSED or known.refused is None:
                known.refused = await self._create(known, decided.create)
                known.refused_at = self._monotonic()
            if known.refused is not None:
                decided = self._decide(schedule, now, refused=known.refused)
                known.wake_at = now + timedelta(seconds=_REFUSED)
        for run in decided.cancel:
            await self._cancel(key, run)
        if decided.status != schedule.status and not await self._write(key, schedule, version, decided.status):
            self._later(known)
            return
        if decided.create is not None:
            self._metrics.schedule_runs.labels("created").inc()
        self._metrics.schedule_runs.labels("missed").inc(decided.status.missed - schedule.status.missed)
        for run in decided.delete:
            await self._delete(key, run)
        if decided.wake_at is not None and (known.wake_at is None or decided.wake_at < known.wake_at):
            known.wake_at = decided.wake_at

    def _decide(self, schedule: Schedule, now: datetime, *, refused: Refusal | None = None) -> Decision:
        runs = [self._runs[task][1] for task in self._of.get(schedule.uid, ())]
        return decide(
            schedule, runs, now, archived=lambda run: self._archived(run.uid, run.resource_version), refused=refused
        )

    async def _create(self, known: _Known, at: datetime) -> Refusal | None:
        """Make the task of a time; return why there is none."""
        schedule = known.schedule
        task = build_task(schedule, at, known.template, labels=known.labels)
        name = task["metadata"]["name"]
        try:
            self._put_run(await self._api.create_task(task))
        except Conflict:
            there = await self._api.get_task(schedule.namespace, name)
            if owner_of(there) != (schedule.name, schedule.uid):
                return Refusal(f"there is a task {name} that is not of this schedule; delete it", lasting=False)
            self._put_run(there)  # the answer to an earlier try was lost, or the watch is behind
        except (Invalid, Forbidden) as error:
            _log.warning(
                "cannot make a scheduled task", namespace=schedule.namespace, schedule=schedule.name, error=error.message
            )
            return Refusal(error.message, lasting=isinstance(error, Invalid))
        else:
            _log.info("made a scheduled task", namespace=schedule.namespace, schedule=schedule.name, task=name)
        return None

    async def _cancel(self, key: Key, run: Run) -> None:
        try:
            self._put_run(await self._api.cancel_task(key[0], run.name, uid=run.uid))
        except (NotFound, Conflict):
            return  # it has gone

    async def _delete(self, key: Key, run: Run) -> None:
        try:
            await self._api.delete_task(key[0], run.name, uid=run.uid, resource_version=run.resource_version)
        except Conflict:
            return  # changed since: the watch tells how
        task = (key[0], run.name)
        if (there := self._runs.get(task)) is not None and there[1].uid == run.uid:
            self._drop_run(task)

    async def _write(self, key: Key, schedule: Schedule, version: int, status: ScheduleStatus) -> bool:
        """Write the status unless the schedule has changed since it was decided upon; return whether it is written."""
        patch = status.model_dump(mode="json", by_alias=True)  # with null for what is to go
        try:
            stored = await self._api.patch_schedule_status(*key, uid=schedule.uid, resource_version=version, status=patch)
        except (NotFound, Conflict):
            return False  # it has gone or was changed: the watch tells, and it is decided anew
        self._put_schedule(key, stored)
        return True
