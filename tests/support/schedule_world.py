"""A world of one schedule in memory: an API server, a clock, tasks that end when told to, and operators that die."""

import asyncio
import copy
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from task_contract.names import SCHEDULE_LABEL
from task_operator.metrics import Metrics
from task_operator.schedule_controller import ScheduleController
from task_operator.schedules import rfc3339
from task_platform.kubernetes import ClusterError, Conflict, NotFound, Page

KEY = ("knowledge", "nightly")
TEMPLATE = {"spec": {"type": "health_check"}}


class Killed(BaseException):
    """The operator's process has ended."""


def schedule(*, created: datetime, status: Mapping[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    """Return a ProcessingSchedule as the API server hands it out."""
    return {
        "apiVersion": "tasks.zzdsj.io/v1",
        "kind": "ProcessingSchedule",
        "metadata": {
            "name": KEY[1],
            "namespace": KEY[0],
            "uid": "0d9f8a52-1b1c-4c7e-9d53-0d5a0a4bd1a7",
            "generation": 1,
            "resourceVersion": "1",
            "creationTimestamp": rfc3339(created),
        },
        "spec": {"schedule": "*/5 * * * *", "taskTemplate": TEMPLATE} | spec,
        "status": dict(status or {}),
    }


@dataclass
class World:
    """Takes what a :class:`ScheduleController` asks of the API server."""

    now: datetime
    manifest: dict[str, Any]
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    created: list[str] = field(default_factory=list)
    """Names of all tasks that were ever made, in their order."""
    writes: list[str] = field(default_factory=list)
    archived: bool = True
    refuse: ClusterError | None = None
    """What the next tasks are answered with."""
    dies: Callable[[int], str] = lambda _: ""
    """Says of the how-manieth write whether the operator dies `before` or `after` it."""
    disturbed: bool = False
    """Whether somebody writes labels of the schedule all the time, so that its version is never the known one."""
    most_active: int = 0
    monotonic: float = 0.0
    _versions: Any = field(default_factory=lambda: itertools.count(2))
    _written: int = 0

    def __post_init__(self) -> None:
        self.start()

    # ------------------------------------------------------------------------------------------------- the operator

    def start(self) -> None:
        """Start an operator that knows nothing."""
        self.controller = ScheduleController(
            api=self,
            metrics=Metrics(),
            archived=lambda _uid, _version: self.archived,
            clock=lambda: self.now,
            monotonic=lambda: self.monotonic,
        )

    def look(self, rounds: int = 4) -> None:
        """Let the operator list everything and look; one that dies is started again."""
        for _ in range(rounds):
            try:
                asyncio.run(self._look())
            except Killed:
                self.start()

    async def _look(self) -> None:
        controller = self.controller
        await controller._list()
        await controller._guarded(KEY)

    def step(self, **after: float) -> None:
        """Let time pass, and the operator look."""
        self.now += timedelta(**after)
        self.monotonic += max(0.0, timedelta(**after).total_seconds())
        self.look()

    # -------------------------------------------------------------------------------------------------- what is there

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.manifest["status"]
        return status

    def condition(self, kind: str = "Ready") -> tuple[str, str, str] | None:
        """Return status, reason and message of a condition."""
        for one in self.status["conditions"]:
            if one["type"] == kind:
                return one["status"], one["reason"], one["message"]
        return None

    def active(self) -> list[str]:
        """Return the names of tasks that have not finished."""
        return [name for name, task in self.tasks.items() if "finishedAt" not in task["status"]]

    def made(self) -> list[str]:
        """Return the times of all tasks that were ever made, as hour and minute."""
        return [f"{name[-4:-2]}:{name[-2:]}" for name in self.created]

    def edit(self, **spec: Any) -> None:
        """Change the schedule as its owner does."""
        self.manifest["spec"] |= spec
        self.manifest["metadata"]["generation"] += 1
        self._touch(self.manifest)

    def end(self, name: str, phase: str = "Completed") -> None:
        """Let a task end."""
        self.tasks[name]["status"] = {"phase": phase, "finishedAt": rfc3339(self.now)}
        self._touch(self.tasks[name])

    def end_all(self, phase: str = "Completed") -> None:
        for name in self.active():
            self.end(name, phase)

    # ------------------------------------------------------------------------------------------------- the API server

    def _touch(self, manifest: dict[str, Any]) -> None:
        manifest["metadata"]["resourceVersion"] = str(next(self._versions))

    async def _pages(self, items: list[dict[str, Any]]) -> AsyncIterator[Page]:
        yield Page(copy.deepcopy(items), resource_version=next(self._versions))

    def list_schedules(self, namespace: str | None) -> AsyncIterator[Page]:
        return self._pages([self.manifest])

    def list_scheduled_tasks(self, namespace: str | None) -> AsyncIterator[Page]:
        return self._pages([one for one in self.tasks.values() if SCHEDULE_LABEL in one["metadata"]["labels"]])

    async def get_task(self, namespace: str, name: str) -> dict[str, Any]:
        return copy.deepcopy(self.tasks[name])

    def _write(self, what: str, effect: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        end, self._written = self.dies(self._written), self._written + 1
        if end == "before":
            raise Killed
        self.writes.append(what)
        answer = effect()
        if end == "after":
            raise Killed
        return copy.deepcopy(answer)

    async def create_task(self, task: dict[str, Any]) -> dict[str, Any]:
        name = task["metadata"]["name"]

        def effect() -> dict[str, Any]:
            if self.refuse is not None:
                raise self.refuse
            if name in self.tasks:
                raise Conflict(f"{name} already exists", status=409)
            self.created.append(name)
            made = copy.deepcopy(task) | {"status": {"phase": "Queued"}}
            made["metadata"] |= {"uid": f"uid-{len(self.created)}", "creationTimestamp": rfc3339(self.now)}
            self.tasks[name] = made
            self._touch(made)
            self.most_active = max(self.most_active, len(self.active()))
            return made

        return self._write(f"create {name}", effect)

    async def cancel_task(self, namespace: str, name: str, *, uid: str) -> dict[str, Any]:
        def effect() -> dict[str, Any]:
            task = self.tasks.get(name)
            if task is None or task["metadata"]["uid"] != uid:
                raise NotFound(name, status=404)
            task["spec"] = task["spec"] | {"cancel": True}
            self._touch(task)
            return task

        return self._write(f"cancel {name}", effect)

    async def delete_task(self, namespace: str, name: str, *, uid: str, resource_version: int) -> None:
        def effect() -> dict[str, Any]:
            task = self.tasks.get(name)
            if task is not None:
                assert task["metadata"]["uid"] == uid
                if task["metadata"]["resourceVersion"] != str(resource_version):
                    raise Conflict(name, status=409)
                del self.tasks[name]
            return {}

        self._write(f"delete {name}", effect)

    async def patch_schedule_status(
        self, namespace: str, name: str, *, uid: str, resource_version: int, status: Mapping[str, Any]
    ) -> dict[str, Any]:
        def effect() -> dict[str, Any]:
            if self.disturbed or self.manifest["metadata"]["resourceVersion"] != str(resource_version):
                raise Conflict(name, status=409)
            merged = {**self.status, **status}
            self.manifest["status"] = {key: value for key, value in merged.items() if value is not None}
            self._touch(self.manifest)
            return self.manifest

        return self._write("status", effect)


def world(begin: str = "2026-11-28T03:00Z", status: Mapping[str, Any] | None = None, **spec: Any) -> World:
    """Return a world at ``begin``, when its schedule is made."""
    now = datetime.fromisoformat(begin).astimezone(UTC)
    return World(now, schedule(created=now, status=status, **spec))
