"""Workers that are scripted, on a real API server and a real Redis: pods that nobody runs, and who says what they would."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from redis.asyncio import Redis

from task_contract.leases import RENEW, REPORT, TAKE, PoolKeys, PoolReport, ReportKind, WorkerState
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.names import POOL_LABEL
from tests.support.operator_lab import MERGE, Kubelet, Place, end, exited, running, until


@dataclass
class Lease:
    """A task that a scripted worker has."""

    stream: str
    id: str
    uid: str
    attempt: int
    stamp: str


@dataclass
class ScriptedWorker:
    """The process in a pod."""

    pod: str
    job: str
    revision: str
    leases: list[Lease] = field(default_factory=list)
    done: int = 0
    draining: bool = False
    silent: bool = False
    """Whether it hangs: it neither renews nor takes."""


@dataclass
class Workforce:
    """Plays kubelet and workers for the pools of a namespace."""

    place: Place
    redis: Redis
    pool: str = "texts"
    concurrency: int = 4
    boots: bool = True
    """Whether new workers come up; else they end with exit code 1."""
    holds: bool = False
    """Whether tasks are kept; else they are done as soon as they are taken."""
    workers: dict[str, ScriptedWorker] = field(default_factory=dict)
    """Those that run, by pod."""
    seen: set[str] = field(default_factory=set)
    """Names of all pods of workers that ever were."""
    most: int = 0
    """Most that ran at once."""

    @property
    def keys(self) -> PoolKeys:
        return PoolKeys(self.place.namespace, self.pool)

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator["Workforce"]:
        work = asyncio.create_task(self._work())
        try:
            yield self
            if work.done():
                work.result()
        finally:
            await end(work)

    async def _work(self) -> None:
        kubelet = Kubelet(self.place)
        while True:
            there = [pod for pod in await self.place.objects("pods") if "deletionTimestamp" not in pod["metadata"]]
            mine = [pod for pod in there if pod["metadata"].get("labels", {}).get(POOL_LABEL) == self.pool]
            pods = {pod["metadata"]["name"]: pod for pod in mine}
            self.seen |= pods.keys()
            for name in self.workers.keys() - pods.keys():  # killed: nobody says anything any more
                del self.workers[name]
            for name, pod in pods.items():
                if pod["status"].get("phase", "Pending") == "Pending":
                    await self._start(kubelet, pod)
                elif (worker := self.workers.get(name)) is not None and not worker.silent:
                    await self._turn(worker)
                    if worker.draining and not worker.leases:
                        await kubelet.write(pod, exited(0))
                        del self.workers[name]
            self.most = max(self.most, len(self.workers))
            await asyncio.sleep(0.1)

    async def _start(self, kubelet: Kubelet, pod: Mapping[str, Any]) -> None:
        await kubelet.write(pod, running())
        if not self.boots:
            await kubelet.write(pod, exited(1, message="cannot load the model: no such folder"))
            return
        labels, name = pod["metadata"]["labels"], pod["metadata"]["name"]
        revision = labels["tasks.zzdsj.io/revision"]
        self.workers[name] = ScriptedWorker(name, labels["batch.kubernetes.io/job-name"], revision)

    async def _turn(self, worker: ScriptedWorker) -> None:
        """Renew, take, and report what is done."""
        state = WorkerState(
            worker=worker.pod,
            job=worker.job,
            revision=worker.revision,
            ready=True,
            draining=worker.draining,
            leased=len(worker.leases),
            capacity=self.concurrency,
            load_seconds=1.5,
            tasks=worker.done,
            calls=worker.done,
            texts=worker.done,
            room=worker.done * 2,
        )
        held = [part for lease in worker.leases for part in (lease.stream, lease.id, lease.uid)]
        drain, lost = await self._run(RENEW, worker.pod, state.model_dump_json(), *held)
        worker.draining = bool(drain)
        worker.leases = [lease for lease in worker.leases if lease.uid not in lost]
        if not worker.draining:
            for stream, id_, uid, attempt, stamp, _, _ in await self._run(
                TAKE, worker.pod, self.concurrency - len(worker.leases)
            ):
                worker.leases.append(Lease(stream, id_, uid, int(attempt), stamp))
        if not self.holds:
            for lease in worker.leases:
                await self._finish(worker, lease)
            worker.leases = []

    async def _finish(self, worker: ScriptedWorker, lease: Lease) -> None:
        now = datetime.now(UTC)
        report = PoolReport(
            kind=ReportKind.ENDED,
            uid=lease.uid,
            namespace=self.place.namespace,
            name="",
            attempt=lease.attempt,
            stamp=lease.stamp,
            worker=worker.pod,
            job=worker.job,
            offered_at=now,
            started_at=now,
            finished_at=now,
            outcome=AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=lease.attempt),
        )
        await self._run(REPORT, worker.pod, "ended", lease.stream, lease.id, lease.uid, report.model_dump_json())
        worker.done += 1

    async def _run(self, script: str, *arguments: Any) -> Any:
        return await self.redis.register_script(script)(self.keys.all, list(arguments))


@dataclass
class PoolPlace:
    """A pool in a namespace, and what is asked of it."""

    place: Place
    name: str = "texts"

    async def create(self, **spec: Any) -> dict[str, Any]:
        body = {
            "apiVersion": "tasks.zzdsj.io/v1",
            "kind": "WorkerPool",
            "metadata": {"name": self.name},
            "spec": {"types": ["health_check"], **spec},
        }
        return await self.place.kube.do("POST", self.place.path("workerpools"), body)

    async def edit(self, **spec: Any) -> None:
        path = self.place.path("workerpools", self.name)
        await self.place.kube.do("PATCH", path, {"spec": spec}, content_type=MERGE)

    async def delete(self) -> None:
        await self.place.kube.do("DELETE", self.place.path("workerpools", self.name))

    async def stored(self) -> dict[str, Any]:
        return await self.place.kube.do("GET", self.place.path("workerpools", self.name))

    async def status(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.stored()).get("status") or {}
        return found

    async def conditions(self) -> dict[str, str]:
        """Return reason (and status) of each condition."""
        found = (await self.status()).get("conditions", [])
        return {one["type"]: f"{one['status']} {one['reason']}" for one in found}

    async def wait_for(self, *, seconds: float = 30, **fields: Any) -> dict[str, Any]:
        """Return the status once these fields of it have these values."""
        seen: dict[str, Any] = {}

        async def look() -> bool:
            seen.clear()
            seen.update(await self.status())
            return all(seen.get(name) == value for name, value in fields.items())

        try:
            await until(f"pool {self.name} has {fields}", look, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; last seen: {seen}") from None
        return seen

    async def jobs(self) -> list[dict[str, Any]]:
        return [one for one in await self.place.objects("jobs") if one["metadata"]["labels"].get(POOL_LABEL) == self.name]
