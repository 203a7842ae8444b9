"""The least that an operator can do: kopf watches, a queue of keys, one Job a task, its end copied into the status.

For comparison only: the floor under ours. It uses our kopf settings and our client and makes the very Jobs that ours makes,
but knows no retry, deadline, cancel, fence or history, lists no pods, takes every complete Job for a success without its
result, and never looks again at what went wrong.
"""

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import kopf
import uvloop

from task_contract.models import ProcessingTask
from task_contract.names import PLURAL, TASK_NAME_ANNOTATION
from task_operator.cluster import Cluster, Watches
from task_operator.handlers import build_registry, kopf_settings
from task_operator.jobs import RunnerTemplate, build_job
from task_platform.kubernetes import Access, Conflict

TEMPLATE = RunnerTemplate(
    image="localhost/processing-tasks/runner:test",
    classes={"medium": {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}}},
    node_selector={"tests.tasks.zzdsj.io/node": "none"},
)


class LeanOperator:
    """Takes the place of our controller behind our kopf handlers."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._tasks: dict[tuple[str, str], Mapping[str, Any]] = {}
        self._jobs: dict[tuple[str, str], str] = {}  # Queued, Processing or Completed
        self._queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self._busy: set[tuple[str, str]] = set()

    def on_task(self, kind: str | None, manifest: Mapping[str, Any]) -> None:
        """Take in a task; one that has finished is forgotten."""
        key = (manifest["metadata"]["namespace"], manifest["metadata"]["name"])
        if kind == "DELETED" or manifest["status"]["phase"] == "Completed":
            self._tasks.pop(key, None)
            return
        known = self._tasks.get(key)
        if known is None or _version(known) < _version(manifest):
            self._tasks[key] = manifest
            self._queue.put_nowait(key)

    def on_job(self, _: str | None, manifest: Mapping[str, Any]) -> None:
        """Take in a Job."""
        status = manifest.get("status") or {}
        ended = any(one["type"] == "Complete" for one in status.get("conditions") or ())
        key = (manifest["metadata"]["namespace"], manifest["metadata"]["annotations"][TASK_NAME_ANNOTATION])
        phase = "Completed" if ended else "Processing" if status.get("ready") else "Queued"
        if self._jobs.get(key) != phase:
            self._jobs[key] = phase
            self._queue.put_nowait(key)

    async def work(self) -> None:
        """Look after one task at a time, for ever."""
        while True:
            key = await self._queue.get()
            task = self._tasks.get(key)
            if task is None or key in self._busy:
                continue
            self._busy.add(key)
            try:
                await self._look(key, task)
            finally:
                self._busy.discard(key)

    async def _look(self, key: tuple[str, str], task: Mapping[str, Any]) -> None:
        if key not in self._jobs:
            self._jobs[key] = "Queued"
            with contextlib.suppress(Conflict):
                await self._cluster.create_job(build_job(ProcessingTask.model_validate(task), attempt=1, template=TEMPLATE))
        phase = self._jobs[key]
        if phase not in {"Queued", task["status"]["phase"]}:
            time = "finishedAt" if phase == "Completed" else "startedAt"
            patch = {"phase": phase, time: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
            version = _version(task)
            answer = await self._cluster.patch_status(
                *key, uid=task["metadata"]["uid"], resource_version=version, patch=patch
            )
            self.on_task("MODIFIED", answer)
        if self._jobs[key] != phase:
            self._queue.put_nowait(key)


def _version(manifest: Mapping[str, Any]) -> int:
    return int(manifest["metadata"]["resourceVersion"])


async def run(namespace: str) -> None:
    """Run until killed."""
    access, watches = Access.from_environment(), Watches(expected=2)
    cluster = Cluster(access)
    await cluster.warm_up()
    operator = LeanOperator(cluster)
    workers = [asyncio.create_task(operator.work()) for _ in range(24)]
    sinks = {PLURAL: operator.on_task, "jobs": operator.on_job}
    registry = build_registry(
        sinks, access=access, watches=watches, with_pools=False, with_schedules=False, cleanup=cluster.aclose
    )
    identity: Any = "lean-operator"
    await kopf.operator(
        registry=registry, settings=kopf_settings(), namespaces=[namespace], standalone=True, identity=identity
    )
    for worker in workers:
        worker.cancel()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    uvloop.run(run(sys.argv[1]))
