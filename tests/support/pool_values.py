"""Worker pools for tests: manifests, Jobs of workers, and a pool whose cluster and Redis are a few dictionaries."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from task_contract.leases import WorkerState
from task_contract.pools import PoolStatus
from task_operator.pool_queue import Look, Worker
from task_operator.pools import Backlog, Memory, Plan, Pool, Seen, Trouble, WorkerJob, plan
from tests.support.operator_values import T0, stamp

POOL_UID = "5b1c7a52-0d9f-4c7e-9d53-1bd1a70d5a0a"
DOWN = Trouble("RedisUnavailable", "cannot use Redis: refused")


def pool_manifest(*, spec: Mapping[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    """Return a WorkerPool as the API server hands it out."""
    return {
        "apiVersion": "tasks.zzdsj.io/v1",
        "kind": "WorkerPool",
        "metadata": {
            "name": "texts",
            "namespace": "knowledge",
            "uid": POOL_UID,
            "generation": 1,
            "resourceVersion": "100",
            "creationTimestamp": stamp(0),
            **metadata,
        },
        "spec": {"types": ["embedding_generation", "health_check"], **(spec or {})},
    }


def pool(*, spec: Mapping[str, Any] | None = None, **metadata: Any) -> Pool:
    """Return a pool; arguments as for :func:`pool_manifest`."""
    return Pool.from_manifest(pool_manifest(spec=spec, **metadata))


@dataclass
class Process:
    """The worker in a Job."""

    leased: int = 0
    heard_at: float | None = None
    draining: bool = False
    frozen: bool = False


@dataclass
class PoolWorld:
    """A pool, its Jobs and its workers: second by second, without servers."""

    pool: Pool
    revision: str = "a"
    backlog: Backlog = field(default_factory=Backlog)
    redis: bool = True
    boots: bool = True
    """Whether new workers come up; else their processes fail."""
    schedules: bool = True
    """Whether there is a node for new pods."""
    starting: int = 2
    """Seconds from a Job's creation to a worker that takes tasks."""
    second: int = 0
    memory: Memory = field(default_factory=Memory)
    status: PoolStatus = field(default_factory=PoolStatus)
    jobs: dict[str, WorkerJob] = field(default_factory=dict)
    workers: dict[str, Process] = field(default_factory=dict)
    created: list[str] = field(default_factory=list)
    plan: Plan | None = None

    @property
    def now(self) -> datetime:
        return T0 + timedelta(seconds=self.second)

    @property
    def live(self) -> list[WorkerJob]:
        return [job for job in self.jobs.values() if not job.finished]

    @property
    def ready(self) -> list[WorkerJob]:
        heard = self.workers.items()
        names = {name for name, one in heard if one.heard_at is not None and not one.draining and not one.frozen}
        return [job for job in self.live if job.name in names]

    def seen(self) -> Seen:
        look = None
        if self.redis:
            states = {}
            for name, one in self.workers.items():
                if one.heard_at is None:
                    continue
                state = WorkerState(
                    worker=f"{name}-pod", job=name, ready=True, draining=one.draining, leased=one.leased, capacity=4
                )
                states[f"{name}-pod"] = Worker(state, self.second - one.heard_at)
            look = Look(0, sum(one.leased for one in self.workers.values()), {}, frozenset(), states)
        return Seen(
            pool=self.pool,
            revision=self.revision,
            jobs=[*self.jobs.values()],
            backlog=self.backlog,
            look=look,
            trouble=None if self.redis else DOWN,
            status=self.status,
            now=self.now,
            second=self.second,
        )

    def step(self, seconds: int = 1) -> Plan:
        """Let time pass, decide each second and do it."""
        for _ in range(seconds):
            self.second += 1
            self._pass_time()
            self.plan = plan(self.seen(), self.memory)
            self._apply(self.plan)
        assert self.plan is not None
        return self.plan

    def end(self, name: str, *, failed: bool, message: str = "") -> None:
        """Have a worker end."""
        job = self.jobs[name]
        self.workers.pop(name, None)
        self.jobs[name] = replace(
            job, complete=not failed, failed=failed, ready=0, finished_at=self.now, message=message or job.message
        )

    def _pass_time(self) -> None:
        for job in self.live:
            worker = self.workers.setdefault(job.name, Process())
            age = (self.now - job.created_at).total_seconds()
            if age >= 1 and job.ready == 0 and self.schedules:
                if not self.boots:
                    self.end(job.name, failed=True, message="ended with exit code 1: no model")
                    continue
                self.jobs[job.name] = replace(job, ready=1, started_at=self.now)
            if self.jobs[job.name].ready and age >= self.starting and self.redis and not worker.frozen:
                worker.heard_at = self.second
            if worker.draining and not worker.leased and not worker.frozen:
                self.end(job.name, failed=False)

    def _apply(self, plan: Plan) -> None:
        for job in plan.delete:
            del self.jobs[job.name]
            self.workers.pop(job.name, None)
        for new in plan.create:
            name = f"texts-{new.slot}-{self.revision}-{new.number}"
            assert name not in self.jobs, f"{name} is there already"
            self.created.append(name)
            self.jobs[name] = WorkerJob(
                name=name,
                namespace="knowledge",
                uid=f"uid-{len(self.created)}",
                pool_uid=POOL_UID,
                slot=new.slot,
                revision=self.revision,
                number=new.number,
                created_at=self.now,
            )
        if plan.drain is not None:
            for name, worker in self.workers.items():
                worker.draining = f"{name}-pod" in plan.drain
        self.memory, self.status = plan.memory, plan.status
