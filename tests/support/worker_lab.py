"""A pool of a test's own: a Redis that may be killed and wiped, what the operator does there, and workers as processes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
from redis import Redis
from redis.exceptions import RedisError

from devstack.stores import redis
from task_contract.leases import PoolKeys, PoolReport, ReportKind
from task_contract.models import ProcessingTask
from task_operator.pool_queue import Look, Offer, PoolQueue, QueueUnavailable
from tests.support.runner_lab import RunnerProcess
from tests.support.servers import free_port

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "test"


class RedisServer:
    """A Redis of the test's own. What it holds is written to no file: to kill it is to wipe it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        with (self._folder / "redis.log").open("a") as log:
            self._process = subprocess.Popen([redis.program(), *options], stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        with Redis(port=self.port) as client:
            while True:
                with suppress(RedisError, OSError):
                    client.ping()
                    return
                assert time.monotonic() < deadline

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self) -> None:
        with Redis(port=self.port) as client:
            client.flushall()


class WorkerProcess(RunnerProcess):
    """A worker."""

    def __init__(self, *, folder: Path, environment: Mapping[str, str], module: str = "job_runner") -> None:
        self.name = environment["TASKS_WORKER"]
        command = [sys.executable, "-m", *module.split(), "work"]
        base = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'crds'}:{ROOT / 'operator'}"}
        super().__init__(command, folder=folder, env={**base, **environment})

    async def ended(self, seconds: float = 30) -> int:
        """Wait for its end; return the exit code."""
        return await asyncio.to_thread(self.wait, seconds)


@dataclass
class PoolLab:
    """What the operator sees of a pool, and its workers."""

    redis: RedisServer
    database: str
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    lease: float = 4.0
    keys: PoolKeys = field(default_factory=lambda: PoolKeys(NAMESPACE, f"pool-{uuid.uuid4().hex[:8]}"))

    def __post_init__(self) -> None:
        self.queue = PoolQueue(self.redis.url)
        self.workers: list[WorkerProcess] = []
        self.heard: list[PoolReport] = []
        """All reports, in order."""
        self._read = "0-0"

    @classmethod
    @asynccontextmanager
    async def open(cls, folder: Path, database: str, **options: Any) -> "AsyncIterator[PoolLab]":
        server = RedisServer(folder)
        server.start()
        lab = cls(server, database, folder, **options)
        try:
            yield lab
        finally:
            for worker in lab.workers:
                worker.kill()
                worker.wait()
            await lab.queue.aclose()
            server.kill()

    def worker(self, *, module: str = "job_runner", **changes: str) -> WorkerProcess:
        """Start a worker; ``changes`` are variables of its environment, in lower case without TASKS_."""
        name = f"worker-{uuid.uuid4().hex[:6]}"
        environment = {
            **self.environment,
            "TASKS_POSTGRES_URL": self.database,
            "TASKS_REDIS_URL": self.redis.url,
            "TASKS_POOL": self.keys.pool,
            "TASKS_POOL_NAMESPACE": self.keys.namespace,
            "TASKS_WORKER": name,
            "TASKS_WORKER_JOB": f"{name}-job",
            "TASKS_HOLDER": str(uuid.uuid4()),
            "TASKS_POOL_LEASE_SECONDS": str(self.lease),
            "TASKS_POOL_GRACE_SECONDS": "9",
            **{f"TASKS_{key.upper()}": value for key, value in changes.items()},
        }
        worker = WorkerProcess(folder=self.folder, environment=environment, module=module)
        self.workers.append(worker)
        return worker

    async def ready(self, *workers: WorkerProcess) -> None:
        """Wait until these take tasks."""

        async def all_ready() -> bool:
            for worker in workers:
                assert worker.poll() is None, worker.communicate()
            look = await self.look()
            return all(one.name in look.workers and look.workers[one.name].state.ready for one in workers)

        await until("workers take tasks", all_ready)

    async def look(self) -> Look:
        """Look at the pool as the operator does each second: leases that ran out end."""
        return await self.queue.look(self.keys, lease=timedelta(seconds=self.lease), now=datetime.now(UTC))

    async def offer(
        self, *tasks: ProcessingTask, attempt: int = 1, stamp: str = "1", priority: str = "normal"
    ) -> list[bool]:
        """Offer tasks as the operator does."""
        return await self.queue.offer(
            self.keys,
            [offered(task, attempt=attempt, stamp=stamp, priority=priority) for task in tasks],
            now=datetime.now(UTC),
        )

    async def reports(self) -> list[PoolReport]:
        """Return all reports so far; leases that ran out are looked for first."""
        with suppress(QueueUnavailable):
            await self.look()
            client: Any = self.queue._redis
            for number, values in await client.xrange(self.keys.reports, f"({self._read}" if self._read != "0-0" else "-"):
                self._read = number
                if "report" in values:
                    self.heard.append(PoolReport.model_validate_json(values["report"]))
                else:
                    self.heard.append(
                        PoolReport(
                            kind=ReportKind.EXPIRED,
                            uid=values["expired"],
                            namespace=NAMESPACE,
                            name="",
                            attempt=int(values["attempt"]),
                            stamp=values["stamp"],
                            worker=values["worker"],
                        )
                    )
        return self.heard

    async def report(
        self, task: ProcessingTask, kind: ReportKind = ReportKind.ENDED, *, attempt: int = 1, seconds: float = 30
    ) -> PoolReport:
        """Wait for a report on an attempt."""
        found: list[PoolReport] = []

        async def there() -> bool:
            found[:] = [
                one for one in await self.reports() if (one.uid, one.kind, one.attempt) == (task.metadata.uid, kind, attempt)
            ]
            return bool(found)

        await until(f"a report: {kind}", there, seconds=seconds)
        return found[0]

    async def outcome(self, task: ProcessingTask, *, attempt: int = 1) -> Any:
        """Return the row of an attempt in PostgreSQL."""
        text = await self.fetch(
            "SELECT outcome FROM task_results WHERE task_uid = $1 AND attempt = $2", uuid.UUID(task.metadata.uid), attempt
        )
        return None if text is None else json.loads(text)

    async def fetch(self, query: str, *arguments: object) -> Any:
        """Ask PostgreSQL for one value."""
        connection = await asyncpg.connect(self.database)
        try:
            return await connection.fetchval(query, *arguments)
        finally:
            await connection.close()


def offered(task: ProcessingTask, *, attempt: int = 1, stamp: str = "1", priority: str = "normal", rank: float = 0) -> Offer:
    """Return the offer of a task; the later, the later in line."""
    assert task.metadata.uid is not None
    return Offer(
        task.metadata.uid,
        task.metadata.namespace,
        task.metadata.name,
        attempt,
        stamp,
        priority,
        rank or time.time(),
        json.dumps(task.manifest()),
    )


def health_check(*components: str, **spec: object) -> ProcessingTask:
    """Return a health check, of PostgreSQL where nothing else is named."""
    return task(type="health_check", payload={"components": components or ["postgres"]}, **spec)


def embedding(*texts: str, **spec: object) -> ProcessingTask:
    """Return a task that embeds texts."""
    return task(type="embedding_generation", payload={"texts": texts}, **spec)


def task(**spec: object) -> ProcessingTask:
    """Return a task as the API server has it."""
    metadata = {
        "name": f"task-{uuid.uuid4().hex[:6]}",
        "namespace": NAMESPACE,
        "uid": str(uuid.uuid4()),
        "creationTimestamp": datetime.now(UTC).isoformat(),
    }
    return ProcessingTask.model_validate({"metadata": metadata, "spec": spec})


async def until(what: str, holds: Callable[[], Awaitable[bool]], *, seconds: float = 30, pause: float = 0.02) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not await holds():
        assert time.monotonic() < deadline, f"waited {seconds} s: {what}"
        await asyncio.sleep(pause)


def suspend(worker: WorkerProcess) -> None:
    """Pause a worker, as a node that is overloaded does."""
    os.kill(worker.pid, signal.SIGSTOP)


def resume(worker: WorkerProcess) -> None:
    """Let it go on."""
    os.kill(worker.pid, signal.SIGCONT)
