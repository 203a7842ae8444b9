"""One round of the pools' benchmark, on a machine of its own: ``python -m tests.bench.pool_rounds SCENARIO FOLDER PYTHON``.

Runs inside the network and process namespace that :mod:`tests.bench.pools_bench` makes: there etcd, API server, PostgreSQL
and Redis are started, an operator with a WorkerPool, and workers as plain processes: a kubelet would be measured too. The
result is FOLDER/round.json.
"""

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Final

import asyncpg
import orjson
import uvloop

import devstack
from devstack import DevstackError, cluster, process
from devstack.stores import postgres, redis
from task_contract.crd import custom_resource_definition
from task_contract.names import POOL_LABEL, REVISION_LABEL
from task_contract.pool_crd import pool_definition
from task_gateway.models import name_of
from task_operator.schema import migrate
from task_platform.kubernetes import Access
from tests.bench import corpus
from tests.bench.operator_load import Load, Record, Server, own_cpu, task
from tests.bench.operator_rounds import NAMESPACE, account, cpu_of_children, cpu_seconds, peak_memory, percentile
from tests.support.gateway_lab import GatewayProcess
from tests.support.operator_lab import JOBS, MERGE, RESTRICTED, ROOT, TASKS, OperatorProcess, until

POOL: Final = "warm"
WORKERS: Final = 2
LEASE: Final = 5.0
QUEUED: Final = 10_000
TEXTS: Final = 3_000
TEXT: Final = 120
"""Characters of the one text of an embedding task: a question, or a line of a form."""
BATCH: Final = 100
"""Tasks of one request of a batch."""
_SERVERS: Final = ("apiserver", "etcd", "postgres", "redis")
_TASKS: Final = f"{TASKS}/namespaces/{NAMESPACE}/processingtasks"
_POOLS: Final = f"{TASKS}/namespaces/{NAMESPACE}/workerpools"


@dataclass
class Worker:
    """A worker of the pool as a process."""

    environment: Mapping[str, str]
    log: Path
    job: Mapping[str, str] = field(default_factory=dict)
    """The variables by which the operator tells which of its Jobs the worker is of."""
    process: "subprocess.Popen[bytes] | None" = None
    spent: float = 0.0
    """CPU seconds of those that were killed."""

    def start(self, **changes: str) -> None:
        """Start it, as another pod than before."""
        names = dict.fromkeys(("TASKS_WORKER", "TASKS_HOLDER"), f"worker-{uuid.uuid4().hex[:8]}")
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "job_runner", "work"]
            environment = {**self.environment, **names, **self.job, **changes}
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def end(self) -> None:
        """Kill it, and wait until it has ended."""
        if self.process is not None:
            self.spent = self.cpu
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    @property
    def cpu(self) -> float:
        """CPU seconds so far."""
        return self.spent + (0.0 if self.process is None else cpu_seconds(self.process.pid))


class NoHand:
    """Nobody plays the end of a Job: tasks are to have none."""

    def made(self, job: Mapping[str, Any]) -> None:
        """Refuse."""
        raise DevstackError(f"a task has a Job of its own: {job['metadata']['name']}")

    async def run(self) -> None:
        """Do nothing."""
        await asyncio.Event().wait()


@dataclass
class RestLoad(Load):
    """The same, created through the gateway: a request each, or many in one."""

    gateway: GatewayProcess | None = None

    async def create(self, name: str, number: int) -> None:
        """Create the task, with its name as idempotency key: so the name that it gets is known beforehand."""
        await self._post("/api/v1/tasks", self._asked_for(name))

    async def run_batches(self, *, name: str, count: int, rate: float, patience: float) -> None:
        """Create tasks at a rate, :data:`BATCH` in each request; then wait until all have completed."""
        began, sent = time.monotonic(), list[asyncio.Task[None]]()
        for start in range(0, count, BATCH):
            await asyncio.sleep(max(0.0, began + start / rate - time.monotonic()))
            asked = [self._asked_for(f"{name}-{number:05d}") for number in range(start, start + BATCH)]
            sent.append(asyncio.create_task(self._post("/api/v1/tasks/batch", asked)))
        await asyncio.gather(*sent)
        await self.run(name=name, count=0, rate=None, patience=patience)

    def _asked_for(self, name: str) -> dict[str, Any]:
        self.records[name_of(namespace=self.namespace, caller="", key=name)] = Record(posted=time.monotonic())
        return {"task_type": self.type, "idempotency_key": name}

    async def _post(self, path: str, body: object) -> None:
        assert self.gateway is not None
        answer = await self.gateway.do("POST", path, body)
        if answer.get("refused"):
            raise DevstackError(f"cannot create tasks: {answer['refused']} refused, such as {answer['items'][0]}")


@dataclass
class Lab:
    """The private machine while a scenario runs."""

    admin: Server
    operator: OperatorProcess
    load: Load
    database: "asyncpg.Pool[asyncpg.Record]"
    workers: list[Worker] = field(default_factory=list)
    gateway: GatewayProcess | None = None
    """Of those scenarios that have one."""

    def cpu(self) -> dict[str, float]:
        """Return the CPU seconds that each part has used so far."""
        used = {"load": own_cpu(), "workers": sum(worker.cpu for worker in self.workers)}
        if self.operator.exit_code() is None:
            used["operator"] = cpu_seconds(self.operator.pid)
        if self.gateway is not None:
            used["gateway"] = cpu_seconds(self.gateway.pid)
        for name in _SERVERS:
            if (found := process.find(name)) is not None:
                used[name] = cpu_seconds(found.pid)
        if (server := process.find("postgres")) is not None:
            used["postgres"] += cpu_of_children(server.pid)
        return used

    async def scale(self, count: int, **changes: str) -> None:
        """Have so many new workers, that take tasks."""
        for worker in self.workers:
            worker.end()
        for worker, job in zip(self.workers[:count], await self._slots(), strict=False):
            worker.job = {
                "TASKS_WORKER_JOB": job["metadata"]["name"],
                "TASKS_POOL_REVISION": job["metadata"]["labels"][REVISION_LABEL],
            }
            worker.start(**changes)

        async def ready() -> bool:
            status = orjson.loads(await self.admin.send("GET", f"{_POOLS}/{POOL}")).get("status") or {}
            return bool(status.get("ready") == count)

        await until(f"{count} workers take tasks", ready, seconds=90)

    async def _slots(self) -> list[dict[str, Any]]:
        """Return the Jobs of the pool's slots, and say of each that it has a pod: the process that is started for it."""
        jobs, found = f"{JOBS}/namespaces/{NAMESPACE}/jobs", list[dict[str, Any]]()

        async def made() -> bool:
            nonlocal found
            found = orjson.loads(await self.admin.send("GET", f"{jobs}?labelSelector={POOL_LABEL}%3D{POOL}"))["items"]
            return len(found) >= WORKERS

        await until("the pool's slots have Jobs", made, seconds=30)
        for job in found:
            if (job.get("status") or {}).get("active"):
                continue  # said before, for an earlier worker of the slot
            status = {"startTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "active": 1, "ready": 1}
            await self.admin.send(
                "PATCH", f"{jobs}/{job['metadata']['name']}/status", {"status": status}, content_type=MERGE
            )
        return found

    async def tasks(self, names: str) -> list[dict[str, Any]]:
        """Return the tasks whose names begin so."""
        return await tasks_called(names, server=self.admin, namespace=NAMESPACE)

    async def compared(self, names: str) -> dict[str, int]:
        """Compare CRs and PostgreSQL, task by task; return the counts."""
        return await compared(await self.tasks(names), self.database)

    async def measured(self, name: str, count: int, work: Callable[[], Awaitable[object]]) -> dict[str, Any]:
        """Do some work; return what it cost a task, and how long tasks took."""
        before, requests = self.cpu(), await self.admin.requests()
        began = time.monotonic()
        await work()
        seconds = time.monotonic() - began
        after, requests = self.cpu(), await self.admin.requests() - requests
        patches = status_writes(requests)
        return {
            **await self.compared(name),
            **times(self.load),
            "seconds": seconds,
            "cpu": {part: (after[part] - before[part]) * 1000 / count for part in after},
            "status_writes": patches / count,
            "memory": peak_memory(self.operator.pid),
        }


def status_writes(requests: Mapping[tuple[str, str, str], int]) -> int:
    """Return how many of the requests write the status of a task."""
    return sum(
        number
        for (verb, what, _), number in requests.items()
        if verb in {"PATCH", "PUT"} and what == "processingtasks/status"
    )


async def tasks_called(names: str, *, server: Server, namespace: str) -> list[dict[str, Any]]:
    """Return the tasks of a namespace whose names begin so."""
    found: list[dict[str, Any]] = []
    token = ""
    while True:
        path = f"{TASKS}/namespaces/{namespace}/processingtasks?limit=1000&continue={token}"
        page = orjson.loads(await server.send("GET", path))
        found += [one for one in page["items"] if one["metadata"]["name"].startswith(names)]
        if not (token := page["metadata"].get("continue", "")):
            return found


async def compared(tasks: list[dict[str, Any]], database: "asyncpg.Pool[asyncpg.Record]") -> dict[str, int]:
    """Look for each of the tasks that have completed in PostgreSQL, 15 s at most; return the counts."""
    done = {one["metadata"]["uid"] for one in tasks if one.get("status", {}).get("phase") == "Completed"}
    rows: set[str] = set()
    deadline = time.monotonic() + 15
    while not done <= rows and time.monotonic() < deadline:
        answer = await database.fetch(
            "SELECT uid::text FROM tasks t WHERE uid = ANY($1::uuid[]) AND phase = 'Completed' "
            "AND started_at IS NOT NULL AND finished_at IS NOT NULL "
            "AND EXISTS (SELECT FROM attempts a WHERE a.task_uid = t.uid AND a.reason = 'Succeeded') "
            "AND EXISTS (SELECT FROM task_events e WHERE e.task_uid = t.uid AND e.phase = 'Completed')",
            list(done),
        )
        rows = {row["uid"] for row in answer}
        await asyncio.sleep(0.1)
    return {
        "tasks": len(tasks),
        "completed": len(done),
        "rows": len(done & rows),
        "in_pool": sum(one["status"].get("executor") == "pool" for one in tasks),
        "second_attempts": sum(one["status"].get("attempt", 0) > 1 for one in tasks),
    }


def times(load: Load) -> dict[str, float]:
    """Return how long tasks took from their creation on, and how many ended a second: from the first one's creation on, and
    from the first one's end on (``throughput``), where they come at a rate."""
    records = load.records.values()
    ends = [(one.completed, (one.completed - one.posted) * 1000) for one in records if one.completed is not None]
    begun, whole = min((one.posted for one in records), default=0.0), [took for _, took in ends]
    last, first = max((end for end, _ in ends), default=0.0), min((end for end, _ in ends), default=0.0)
    rate = len(ends) / (last - begun) if ends else 0.0
    throughput = (len(ends) - 1) / (last - first) if last > first else 0.0
    return {"rate": rate, "throughput": throughput, "p50": percentile(whole, 0.5), "p99": percentile(whole, 0.99)}


# ------------------------------------------------------------------------------------------------------------ scenarios


async def warm(lab: Lab) -> None:
    """Have a few tasks completed, so that nothing is done for the first time in what is measured."""
    await lab.load.run(name="first", count=60, rate=20, patience=60)
    if lab.load.completed < 60:
        raise DevstackError(f"cannot warm up: {lab.load.completed} of 60 completed\n{lab.operator.log.read_text()[-3000:]}")
    lab.load.forget()


async def at_rate(lab: Lab, *, rate: float, seconds: float) -> dict[str, Any]:
    """Run health checks at a rate, through the Kubernetes API."""
    await lab.scale(WORKERS)
    await warm(lab)
    count = int(rate * seconds)
    return await lab.measured("task", count, lambda: lab.load.run(name="task", count=count, rate=rate, patience=30))


async def through_gateway(lab: Lab, *, rate: float, seconds: float) -> dict[str, Any]:
    """Run health checks at a rate that come through REST: first a request each, then in batches."""
    await lab.scale(WORKERS)
    await warm(lab)
    count, direct = int(rate * seconds), lab.load
    load = lab.load = RestLoad(direct.server, direct.namespace, direct.hand, type=direct.type, gateway=lab.gateway)
    following = asyncio.create_task(load.follow_tasks())
    answers: dict[str, Any] = {}
    try:
        await asyncio.sleep(1)  # the watch is open
        for name, work in (("single", load.run), ("batches", load.run_batches)):
            # All tasks of the gateway have names of one form: those of the part before count again, and have ended.
            create = partial(work, name=name, count=count, rate=rate, patience=30)
            answers[name] = await lab.measured("task-", count, create)
            answers[name]["posted"] = len(load.records)
            load.forget()
    finally:
        following.cancel()
        await asyncio.wait([following])
    return answers


async def floor(lab: Lab, *, count: int) -> dict[str, Any]:
    """Create tasks and write the end of each, by the load itself: what nobody can spare. There is no operator."""
    lab.operator.kill()
    status = {"status": {"phase": "Completed", "attempt": 1}}

    async def one(number: int, slots: asyncio.Semaphore) -> None:
        async with slots:
            await lab.load.server.send("POST", _TASKS, task(f"floor-{number}", "health_check"))
            await lab.load.server.send("PATCH", f"{_TASKS}/floor-{number}/status", status, content_type=MERGE)

    before, began, slots = lab.cpu(), time.monotonic(), asyncio.Semaphore(16)
    await asyncio.gather(*(one(number, slots) for number in range(count)))
    after, seconds = lab.cpu(), time.monotonic() - began
    return {"cpu": {part: (after[part] - before[part]) * 1000 / count for part in after}, "rate": count / seconds}


async def at_rest(lab: Lab) -> None:
    """Wait until the operator has written no status for some seconds."""
    written, since = -1, time.monotonic()

    async def still() -> bool:
        nonlocal written, since
        now = status_writes(await lab.admin.requests())
        if now != written:
            written, since = now, time.monotonic()
        return time.monotonic() - since > 5

    await until("the operator has told all tasks that they wait", still, seconds=300, interval=1)


async def queued(lab: Lab, *, count: int) -> dict[str, Any]:
    """Queue tasks of low priority without a worker, then start one and create tasks of high priority, ten a second."""
    lab.load.spec = {"priority": "low"}
    await lab.load.run(name="low", count=count, rate=None, patience=0)

    async def listed() -> bool:
        found = await lab.database.fetchval("SELECT count(*) FROM tasks WHERE name LIKE 'low-%'")
        return bool(found == count)

    await until("all wait", listed, seconds=180)
    memory = peak_memory(lab.operator.pid)
    await at_rest(lab)  # each of them is told that it waits: 10,000 statuses, which are not what is measured
    lab.load.forget()
    lab.load.spec = {"priority": "high"}
    await lab.scale(1)
    answer = await lab.measured("high", 100, lambda: lab.load.run(name="high", count=100, rate=10, patience=30))
    waiting = sum(one["status"]["phase"] == "Queued" for one in await lab.tasks("low"))
    # From its creation to a worker's having it, by the clocks of two processes of one machine, in whole seconds: so the
    # whole task is told, which is more.
    return {**answer, "memory_queued": memory, "low_left": waiting}


async def killed(lab: Lab, *, rate: float, seconds: float, every: float, operator: bool = False) -> dict[str, Any]:
    """Run health checks at a rate while one worker after the other, or the operator, is killed, and started again."""
    await lab.scale(WORKERS)
    await warm(lab)
    count = int(rate * seconds)

    async def kill() -> int:
        number = 0
        while True:
            await asyncio.sleep(every)
            if operator:
                lab.operator.kill()
                lab.operator.start()
            else:
                worker = lab.workers[number % WORKERS]
                worker.end()
                worker.start()  # as another pod
            number += 1

    killer = asyncio.create_task(kill())
    try:
        answer = await lab.measured("task", count, lambda: lab.load.run(name="task", count=count, rate=rate, patience=60))
    finally:
        killer.cancel()
    slow = [one for one in lab.load.records.values() if one.completed is not None and one.completed - one.posted > LEASE]
    handed_over = [one.completed - one.posted for one in slow if one.completed is not None]
    results = await lab.database.fetchval(
        "SELECT count(*) FROM "
        "(SELECT task_uid FROM task_events WHERE phase = 'Completed' GROUP BY 1 HAVING count(*) > 1) AS twice"
    )
    return {**answer, "slowest": max(handed_over, default=0.0), "twice": results, "killed": int(seconds // every)}


async def embedding(lab: Lab, *, count: int) -> dict[str, Any]:
    """Embed one short text a task: many at once in each worker, then one at a time, beside a bare loop over the model."""
    texts = _texts(count)
    lab.load.type = "embedding_generation"
    answers = {}
    for name, changes in (("joined", {}), ("single", {"TASKS_POOL_CONCURRENCY": "1", "TASKS_POOL_BATCH_SIZE": "1"})):
        lab.load.payloads = texts
        await lab.scale(WORKERS, **changes)
        lab.load.forget()
        await lab.load.run(name=f"first-{name}", count=8, rate=8, patience=60)
        lab.load.forget()
        answers[name] = await lab.measured(name, count, lambda name=name: _burst(lab, name, count))  # type: ignore[misc]
    for worker in lab.workers:
        worker.end()
    answers["bare"] = await asyncio.to_thread(bare_loops, texts)
    return answers


async def _burst(lab: Lab, name: str, count: int) -> None:
    await lab.load.run(name=name, count=count, rate=None, patience=180)


def _texts(count: int) -> list[str]:
    text = "".join(corpus.chinese(count * TEXT))
    return [text[start : start + TEXT] for start in range(0, count * TEXT, TEXT)]


def bare_loops(texts: list[str]) -> dict[str, float]:
    """Embed texts and nothing else, in as many processes at once as there are workers; return CPU ms of a text and the rate.

    At once, since a text takes longer where the other CPU is busy too, as it is beside a control plane.
    """
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as processes:
        found = list(processes.map(bare_loop, [texts] * WORKERS))
    return {"cpu": mean(cpu for cpu, _ in found), "rate": sum(rate for _, rate in found)}


def bare_loop(texts: list[str]) -> tuple[float, float]:
    """Embed texts in batches, in this process; return CPU ms of a text and the rate."""
    from job_runner.embed import PACKAGED_MODEL, embedded, make_embedder

    model = make_embedder(PACKAGED_MODEL)
    model.warm_up()
    embedded(texts[:32], model)
    cpu, began = own_cpu(), time.monotonic()
    embedded(texts, model)
    return (own_cpu() - cpu) * 1000 / len(texts), len(texts) / (time.monotonic() - began)


SCENARIOS: Final[dict[str, Callable[[Lab], Awaitable[dict[str, Any]]]]] = {
    "steady": lambda lab: at_rate(lab, rate=100, seconds=60),
    "fast": lambda lab: at_rate(lab, rate=200, seconds=30),
    "gateway": lambda lab: through_gateway(lab, rate=100, seconds=30),
    "floor": lambda lab: floor(lab, count=2_000),
    "queued": lambda lab: queued(lab, count=QUEUED),
    "killed": lambda lab: killed(lab, rate=50, seconds=120, every=5),
    "operator": lambda lab: killed(lab, rate=50, seconds=60, every=12, operator=True),
    "embedding": lambda lab: embedding(lab, count=TEXTS),
    "trial": lambda lab: at_rate(lab, rate=10, seconds=10),
    "gateway-trial": lambda lab: through_gateway(lab, rate=100, seconds=3),
}


# ----------------------------------------------------------------------------------------------------- the private machine


@contextlib.asynccontextmanager
async def _lab(*, python: Path, folder: Path, with_gateway: bool) -> AsyncIterator[Lab]:
    endpoints = devstack.up(["cluster"])
    for name in ("scheduler", "controller-manager"):
        process.stop(name, kill=True)  # Jobs of the pool's slots get no pods: workers are processes
    postgres.up()
    redis.up()
    url = postgres.create_database("bench")
    redis_url = redis.environment(f"127.0.0.1:{redis.port()}")["TASKS_REDIS_URL"]
    await migrate(url)
    admin = Server(Access.from_kubeconfig(endpoints.kubeconfig))
    database = await asyncpg.create_pool(url, min_size=1, max_size=4)
    cluster.apply([custom_resource_definition(), pool_definition()])
    kubeconfig = await account(admin, folder, endpoints.kubeconfig)
    caller = await account(admin, folder, endpoints.kubeconfig, name="caller")
    await admin.send("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE, "labels": RESTRICTED}})
    spec = {
        "types": ["health_check", "embedding_generation"],
        "min": WORKERS,
        "max": WORKERS,
        "concurrency": 16,
        "lease": f"{int(LEASE)}s",
    }
    pool = {"apiVersion": "tasks.zzdsj.io/v1", "kind": "WorkerPool", "metadata": {"name": POOL}, "spec": spec}
    await admin.send("POST", _POOLS, pool)
    operator = OperatorProcess(
        kubeconfig=kubeconfig,
        namespaces=[NAMESPACE],
        folder=folder,
        python=str(python),
        OPERATOR_POSTGRES_URL=url,
        OPERATOR_REDIS_URL=redis_url,
        MALLOC_MMAP_THRESHOLD_="65536",  # as in the image
    )
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("OPERATOR_", "TASKS_"))},
        "TASKS_POSTGRES_URL": url,
        "TASKS_REDIS_URL": redis_url,
        "TASKS_POOL": POOL,
        "TASKS_POOL_NAMESPACE": NAMESPACE,
        "TASKS_POOL_CONCURRENCY": "16",
        "TASKS_POOL_BATCH_SIZE": "64",
        "TASKS_POOL_LEASE_SECONDS": str(LEASE),
        "TASKS_POOL_GRACE_SECONDS": "10",
        "TASKS_LOG_LEVEL": "warning",
        "TASKS_DOCUMENT_ROOT": str(folder),
    }
    workers = [Worker(environment, folder / f"worker-{number}.log") for number in range(WORKERS)]
    load = Load(Server(Access.from_kubeconfig(caller)), NAMESPACE, NoHand(), type="health_check")
    gateway = GatewayProcess(
        kubeconfig=endpoints.kubeconfig,
        postgres=url,
        folder=folder,
        namespaces=[NAMESPACE],
        trusting=True,
        GATEWAY_RATE="10000",
        GATEWAY_BURST="10000",
    )
    operator.start()
    await operator.ready(interval=0.05)
    following = asyncio.create_task(load.follow_tasks())
    try:
        await asyncio.sleep(2)  # the watch is open
        async with contextlib.AsyncExitStack() as stack:
            if with_gateway:
                await stack.enter_async_context(gateway.at_work())
            yield Lab(admin, operator, load, database, workers, gateway if with_gateway else None)
        if following.done():
            following.result()
    finally:
        following.cancel()
        await asyncio.wait([following])
        for worker in workers:
            worker.end()
        operator.kill()
        await load.server.aclose()
        await admin.aclose()
        await database.close()


async def run(scenario: str, *, python: Path, folder: Path) -> dict[str, Any]:
    """Start what is needed, run the scenario, and return what happened."""
    async with _lab(python=python, folder=folder, with_gateway=scenario.startswith("gateway")) as lab:
        return await SCENARIOS[scenario](lab)


if __name__ == "__main__":
    place = Path(sys.argv[2])
    measured = uvloop.run(run(sys.argv[1], python=Path(sys.argv[3]), folder=place))
    (place / "round.json").write_text(json.dumps(measured))
