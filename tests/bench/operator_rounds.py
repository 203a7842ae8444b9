"""One round of the operator's benchmark, on a machine of its own.

``python -m tests.bench.operator_rounds SCENARIO OPERATOR FOLDER PYTHON``.
Runs inside the network and process namespace that :mod:`tests.bench.operator_bench` makes: there a control plane of its own
and a PostgreSQL of its own are started, an operator, and the load. The result is FOLDER/round.json.
"""

import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import asyncpg
import orjson
import psutil
import uvloop
import yaml

import devstack
from devstack import DevstackError, cluster, process
from devstack.stores import postgres
from task_contract.crd import custom_resource_definition
from task_contract.models import ProcessingTask
from task_operator.jobs import RunnerTemplate, build_job
from task_operator.schema import migrate
from task_platform.kubernetes import Access
from tests.bench import kwok
from tests.bench.operator_load import (
    OUTCOME,
    Hand,
    Load,
    PodHand,
    Record,
    Results,
    Server,
    StatusHand,
    complete,
    own_cpu,
    task,
)
from tests.support.operator_lab import JOBS, MERGE, NOWHERE, RESTRICTED, ROOT, TASKS, OperatorProcess, running, until

NAMESPACE: Final = "bench"
WARM_UP: Final = 20  # tasks before what is measured
_READS: Final = {"GET", "LIST", "WATCH", "CONNECT"}
_LOAD_WRITES: Final = {("POST", "processingtasks"), ("PATCH", "pods/status"), ("PATCH", "jobs/status")}
"""What the load itself writes; nothing of it is an operator's, but that of the Job controller is not either."""
_CONTROLLERS: Final = {
    ("POST", "pods"),
    ("PATCH", "pods"),
    ("PUT", "jobs/status"),
    ("POST", "events"),
    ("GET", "processingtasks"),
}
"""What Job controller and garbage collector ask; operators of this benchmark tell no Events of tasks that go well."""


@dataclass(frozen=True)
class Scenario:
    """What happens to an operator."""

    what: str
    count: int
    """Tasks."""
    rate: float | None
    """Tasks a second; None: all at once."""
    patience: float
    """Seconds to wait for what has not completed."""
    real_jobs: bool = False
    """The Job controller is real, and only pods are played."""
    manager_flags: str = ""
    seeds: int = 0
    """Tasks that have completed before, with their Jobs."""
    type: str = "document_processing"
    operators: tuple[str, ...] = ("ours", "lean", "obvious")
    scheduler_flags: str = ""
    nodes: bool = False
    """Scheduler and Job controller are real, and KWOK plays nodes and pods; beside operators run Jobs without one."""


RAISED: Final = "--kube-api-qps=2000 --kube-api-burst=4000 --concurrent-job-syncs=20"
_COMPARED: Final = ("ours", "bare", "obvious")
SOAK_RATE: Final = 10  # tasks a second
SOAK_LIVE: Final = 10_000  # tasks that are there all the time
SOAK_MINUTES: Final = float(os.environ.get("SOAK_MINUTES", "60"))
SOAK_SAMPLE: Final = 15.0  # seconds between two looks at the operator's memory
SCENARIOS: Final = {
    "steady": Scenario("100 tasks/s for 60 s, Jobs ended by one status patch", 6000, 100, 30),
    "burst": Scenario("5,000 tasks at once, Jobs ended by one status patch", 5000, None, 60),
    "jobs": Scenario(
        f"1,000 tasks at once, real Job controller ({RAISED}), pods played",
        1000,
        None,
        60,
        real_jobs=True,
        manager_flags=RAISED,
    ),
    "idle": Scenario(
        "one empty task at a time on an idle cluster, Job controller with its stock flags, pod played",
        10,
        0.4,
        30,
        real_jobs=True,
        manager_flags="--kube-api-qps=20 --kube-api-burst=30",
        type="health_check",
        operators=("ours", "obvious"),
    ),
    "nodes": Scenario(
        f"1,000 tasks at once, simulated nodes (KWOK), real scheduler and Job controller ({RAISED})",
        1000,
        None,
        90,
        real_jobs=True,
        manager_flags=RAISED,
        scheduler_flags="--kube-api-qps=2000 --kube-api-burst=4000",
        nodes=True,
        operators=_COMPARED,
    ),
    "nodes-stock": Scenario(
        "150 tasks at once, simulated nodes (KWOK), real scheduler and Job controller with their stock flags",
        150,
        None,
        90,
        real_jobs=True,
        manager_flags="--kube-api-qps=20 --kube-api-burst=30",
        nodes=True,
        operators=_COMPARED,
    ),
    "soak": Scenario(
        f"{SOAK_LIVE} tasks all the time, of which {SOAK_RATE} a second come, complete and go after their TTL, for "
        f"{SOAK_MINUTES:g} min; simulated nodes (KWOK), real scheduler and Job controller",
        round(SOAK_MINUTES * 60 * SOAK_RATE),
        SOAK_RATE,
        60,
        real_jobs=True,
        manager_flags=RAISED,
        scheduler_flags="--kube-api-qps=2000 --kube-api-burst=4000",
        seeds=SOAK_LIVE,
        nodes=True,
        operators=("ours",),
    ),
    "restart": Scenario(
        "killed and started again among 10,000 tasks with their Jobs: 9,800 have completed, 200 run",
        200,
        None,
        20,
        seeds=9_800,
        operators=("ours", "lean"),
    ),
}


@dataclass(frozen=True)
class Round:
    """What one operator did in one scenario."""

    tasks: int = 0
    completed: int = 0
    """Of the tasks, before patience ended."""
    seconds: float = 0.0
    """From the first request that creates a task to the last task that has completed."""
    middle_rate: float = 0.0
    """Completed tasks a second between the tenth and the ninetieth percent."""
    job_p50: float = 0.0
    """Milliseconds from the request that creates a task to its Job; so too the next."""
    job_p99: float = 0.0
    done_p50: float = 0.0
    """Milliseconds from a Job that is done to its task that is Completed."""
    done_p99: float = 0.0
    whole_p50: float = 0.0
    """Milliseconds from the request that creates a task to its being Completed."""
    whole_max: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    """CPU milliseconds a completed task, by process: operator, apiserver, etcd, controller-manager, postgres, load."""
    memory: float = 0.0
    """Most memory (VmHWM) of the operator in MB."""
    requests: dict[str, float] = field(default_factory=dict)
    """The operator's requests a task, by verb and resource."""
    writes: float = 0.0
    conflicts: float = 0.0
    """Answers of 409 a task."""
    ready: float = 0.0
    """Seconds from the start of the process to its being ready; of a restart alone, as the next."""
    cpu_seconds: float = 0.0
    samples: list[tuple[float, float, int]] = field(default_factory=list)
    """Of a soak: seconds since its begin, memory of the operator (VmRSS) in MB, and tasks that are there."""


class Running:
    """An operator as a process."""

    def __init__(self, name: str, *, python: Path, kubeconfig: Path, folder: Path, postgres_url: str, nodes: bool) -> None:
        self._ours = name == "ours"
        self._nobody = name == "bare"
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._operator = OperatorProcess(
            kubeconfig=kubeconfig,
            namespaces=[NAMESPACE],
            folder=folder,
            python=str(python),
            OPERATOR_POSTGRES_URL=postgres_url,
            MALLOC_MMAP_THRESHOLD_="65536",  # as in the image
            OPERATOR_RUNNER_RESOURCES='{"requests":{"cpu":"250m","memory":"512Mi"},"limits":{"memory":"2Gi"}}',
            **({"OPERATOR_RUNNER_NODE_SELECTOR": json.dumps(kwok.SELECTOR)} if nodes else {}),
        )
        # The obvious operator has the generated client, which our image does not carry.
        obvious = Path(__file__).with_name("baseline_operator.py")
        self._command = {
            "lean": [str(python), "-m", "tests.bench.lean_operator", NAMESPACE],
            "obvious": [sys.executable, "-m", "kopf", "run", "--standalone", "--namespace", NAMESPACE, str(obvious)],
        }.get(name, [])
        paths = os.pathsep.join(str(ROOT / part) for part in (".", "crds", "operator"))
        self._environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "PYTHONPATH": paths}
        if nodes:
            self._environment["BENCH_NODE_SELECTOR"] = json.dumps(kwok.SELECTOR)

    async def start(self) -> None:
        """Start it; ours is waited for until it is ready."""
        if self._nobody:
            return
        if self._ours:
            self._operator.start()
            await self._operator.ready(interval=0.02)
        else:
            self._spawn()

    def _spawn(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        """0 without an operator."""
        if self._nobody:
            return 0
        return self._operator.pid if self._process is None else self._process.pid

    def kill(self) -> None:
        if self._nobody:
            return
        if self._process is None:
            self._operator.kill()
        else:
            self._process.kill()
            self._process.wait()

    def require_alive(self) -> None:
        """Raise DevstackError, with the end of its log, if it has ended by itself."""
        if self._nobody:
            return
        ended = self._operator.exit_code() if self._process is None else self._process.poll()
        if ended is not None:
            raise DevstackError(f"cannot measure an operator that has ended with {ended}:\n{self.said()}")

    def said(self) -> str:
        """Return the end of its log."""
        log = self._operator.log if self._ours else self._log
        return log.read_text()[-3000:] if log.exists() else ""


@dataclass
class Lab:
    """The private machine while a scenario runs."""

    scenario: Scenario
    admin: Server
    operator: Running
    load: Load
    database: "asyncpg.Pool[asyncpg.Record]"

    async def warm_up(self) -> None:
        """Have a few tasks completed, so that nothing is done for the first time in what is measured."""
        await self.load.run(name="warm-up", count=WARM_UP, rate=10, patience=60)  # it may have to start first
        if self.load.completed < WARM_UP:
            raise DevstackError(f"cannot warm up: {self.load.completed} of {WARM_UP} completed\n{self.operator.said()}")
        self.load.forget()

    async def measure(self) -> Round:
        """Run the load, and tell what it took."""
        before, requests = cpu_of_all(self.operator.pid), await self.admin.requests()
        await self.load.run(name="task", count=self.scenario.count, rate=self.scenario.rate, patience=self.scenario.patience)
        self.operator.require_alive()
        after = cpu_of_all(self.operator.pid)
        used = {name: after[name] - before[name] for name in before}
        requests = await self.admin.requests() - requests
        result = summary(list(self.load.records.values()), used, requests, real_jobs=self.scenario.real_jobs)
        return replace(result, memory=peak_memory(self.operator.pid))

    async def soak(self) -> Round:
        """Have tasks come and go for a long time, and look at the operator's memory all the while."""
        self.operator.kill()
        await seed(self.admin, self.scenario.seeds, goes_every=1 / SOAK_RATE)
        await self.operator.start()
        await _quiet(self.operator.pid, seconds=60)
        self.load.spec = {"ttlSecondsAfterFinished": SOAK_LIVE // SOAK_RATE}
        samples: list[tuple[float, float, int]] = []
        looking = asyncio.create_task(self._look(samples))
        try:
            result = await self.measure()
        finally:
            looking.cancel()
            await asyncio.wait([looking])
        return replace(result, samples=samples)

    async def _look(self, samples: list[tuple[float, float, int]]) -> None:
        began, path = time.monotonic(), f"{TASKS}/namespaces/{NAMESPACE}/processingtasks?limit=1"
        while True:
            page = orjson.loads(await self.admin.send("GET", path))["metadata"]
            live = 1 + int(page.get("remainingItemCount", 0))
            samples.append((time.monotonic() - began, memory(self.operator.pid, "VmRSS"), live))
            await asyncio.sleep(SOAK_SAMPLE)

    async def restart(self) -> Round:
        """Have many tasks behind it and some running, kill it, and see what it takes to be ready again."""
        self.operator.kill()
        await seed(self.admin, self.scenario.seeds)
        await self.operator.start()
        await self.load.run(name="live", count=self.scenario.count, rate=50, patience=0)
        await self._settled()
        self.operator.kill()
        before = await self.admin.requests()
        began = time.monotonic()
        await self.operator.start()
        ready = time.monotonic() - began
        cpu = await _quiet(self.operator.pid, seconds=60)
        self.operator.require_alive()
        requests = await self.admin.requests() - before
        writes = {f"{verb} {what}": float(n) for (verb, what, _), n in requests.items() if verb not in _READS}
        return Round(
            tasks=self.scenario.seeds + self.scenario.count,
            requests=writes,
            writes=sum(writes.values()),
            memory=peak_memory(self.operator.pid),
            ready=ready,
            cpu_seconds=cpu,
        )

    async def _settled(self) -> None:
        """Wait until all of the load runs, and the projection has it."""
        await _quiet(self.operator.pid, seconds=90)
        path = f"{TASKS}/namespaces/{NAMESPACE}/processingtasks"
        found = orjson.loads(await self.admin.send("GET", path))["items"]
        phases = Counter(one["status"]["phase"] for one in found)
        if phases["Processing"] != self.scenario.count:
            raise DevstackError(f"cannot measure a restart: {dict(phases)}\n{self.operator.said()}")


class LiveHand:
    """Gives Jobs a pod that runs, and leaves them so."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._waiting: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()

    def made(self, job: Mapping[str, Any]) -> None:
        self._waiting.put_nowait(job)

    async def run(self) -> None:
        pods = f"/api/v1/namespaces/{NAMESPACE}/pods"
        while True:
            job = await self._waiting.get()
            name, template = job["metadata"]["name"], job["spec"]["template"]
            owner = {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "name": name,
                "uid": job["metadata"]["uid"],
                "controller": True,
            }
            metadata = {"name": f"{name}-pod", "ownerReferences": [owner]}
            metadata |= {key: template["metadata"][key] for key in ("labels", "annotations")}
            await self._server.send("POST", pods, {"metadata": metadata, "spec": template["spec"]})
            await self._server.send("PATCH", f"{pods}/{name}-pod/status", {"status": running()}, content_type=MERGE)
            status = {"startTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "active": 1, "ready": 1}
            path = f"{JOBS}/namespaces/{NAMESPACE}/jobs/{name}/status"
            await self._server.send("PATCH", path, {"status": status}, content_type=MERGE)


async def seed(server: Server, count: int, *, goes_every: float | None = None) -> None:
    """Make tasks that have completed, with their Jobs, as our operator leaves them.

    ``goes_every``: their TTLs end one by one, so many seconds apart, and they have no Jobs any more.
    """
    template = RunnerTemplate(image="localhost/processing-tasks/runner:test", node_selector=NOWHERE)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    slots = asyncio.Semaphore(24)
    tasks, jobs = (f"{group}/namespaces/{NAMESPACE}/{what}" for group, what in ((TASKS, "processingtasks"), (JOBS, "jobs")))

    async def one(number: int) -> None:
        async with slots:
            wanted = task(f"seed-{number:05d}")
            if goes_every is not None:
                wanted["spec"]["ttlSecondsAfterFinished"] = 60 + round(number * goes_every)
            made = orjson.loads(await server.send("POST", tasks, wanted))
            job = build_job(ProcessingTask.model_validate(made), attempt=1, template=template)
            name = job["metadata"]["name"]
            status = {
                "phase": "Completed",
                "progress": 100,
                "attempt": 1,
                "job": name,
                "executor": "job",
                "observedGeneration": 1,
                **dict.fromkeys(("queuedAt", "startedAt", "finishedAt"), now),
                "result": None if OUTCOME.result is None else OUTCOME.result.manifest(),
                "attempts": [{"number": 1, "job": name, "startedAt": now, "finishedAt": now, "reason": "Succeeded"}],
                "conditions": [
                    {"type": kind, "status": "True", "reason": "Completed", "message": "", "lastTransitionTime": now}
                    | {"observedGeneration": 1}
                    for kind in ("Ready", "Succeeded")
                ],
            }
            path = f"{tasks}/{made['metadata']['name']}/status"
            await server.send("PATCH", path, {"status": status}, content_type=MERGE)
            if goes_every is not None:
                return
            await server.send("POST", jobs, job)
            await server.send("PATCH", f"{jobs}/{name}/status", complete(), content_type=MERGE)

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))


async def _quiet(pid: int, *, seconds: float) -> float:
    """Wait until a process has used next to no CPU for three seconds; return the CPU seconds that it has used so far."""
    deadline = time.monotonic() + seconds
    used: list[float] = []
    while time.monotonic() < deadline:
        used.append(cpu_seconds(pid))
        if len(used) > 6 and used[-1] - used[-7] < 0.06:
            break
        await asyncio.sleep(0.5)
    return used[-1]


# ------------------------------------------------------------------------------------------------------------- figures


def summary(
    records: Sequence[Record], used: Mapping[str, float], requests: "Counter[tuple[str, str, str]]", *, real_jobs: bool
) -> Round:
    """Return the figures of what happened to tasks."""
    ends = sorted(one.completed for one in records if one.completed is not None)
    made = [(one.job_made - one.posted) * 1000 for one in records if one.job_made is not None]
    done = [
        (one.completed - one.job_done) * 1000 for one in records if one.completed is not None and one.job_done is not None
    ]
    whole = [(one.completed - one.posted) * 1000 for one in records if one.completed is not None]
    others = _LOAD_WRITES | (_CONTROLLERS if real_jobs else set())
    ours = Counter[str]()
    for (verb, resource, code), count in requests.items():
        if (verb, resource) not in others and verb not in {"WATCH", "CONNECT"} and not code.startswith("0"):
            ours[f"{verb} {resource}"] += count
    each = max(len(ends), 1)
    middle = ends[len(ends) // 10 : len(ends) * 9 // 10]
    return Round(
        tasks=len(records),
        completed=len(ends),
        seconds=ends[-1] - min(one.posted for one in records) if ends else 0.0,
        middle_rate=(len(middle) - 1) / (middle[-1] - middle[0]) if len(middle) > 2 else 0.0,
        job_p50=percentile(made, 0.5),
        job_p99=percentile(made, 0.99),
        done_p50=percentile(done, 0.5),
        done_p99=percentile(done, 0.99),
        whole_p50=percentile(whole, 0.5),
        whole_max=max(whole, default=0.0),
        cpu={name: seconds * 1000 / each for name, seconds in used.items()},
        requests={name: round(count / each, 3) for name, count in sorted(ours.items())},
        writes=sum(count for name, count in ours.items() if name.split()[0] not in _READS) / each,
        conflicts=sum(count for (_, _, code), count in requests.items() if code == "409") / each,
    )


def cpu_of_all(operator: int) -> dict[str, float]:
    """Return the CPU seconds that each process has used so far: the operator (0: none), the servers, the load (this one)."""
    used = {"operator": cpu_seconds(operator) if operator else 0.0, "load": own_cpu()}
    for name in ("apiserver", "etcd", "controller-manager", "scheduler", "postgres"):
        if (found := process.find(name)) is not None:
            used[name] = cpu_seconds(found.pid)
    if (server := process.find("postgres")) is not None:
        used["postgres"] += cpu_of_children(server.pid)
    return used


def cpu_of_children(pid: int) -> float:
    """Return the CPU seconds of the processes that a process has started: those of a PostgreSQL come and go."""
    found = 0.0
    for child in psutil.Process(pid).children():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += cpu_seconds(child.pid)
    return found


def cpu_seconds(pid: int) -> float:
    """Return the CPU time a process has used, in user and kernel, with that of children that have ended, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(one) for one in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def peak_memory(pid: int) -> float:
    """Return the most memory a process has ever had resident, in MB (10^6 bytes); of none 0."""
    return memory(pid, "VmHWM") if pid else 0.0


def memory(pid: int, name: str) -> float:
    """Return a figure of ``/proc/PID/status`` in MB (10^6 bytes)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024 / 1e6


def percentile(values: Sequence[float], part: float) -> float:
    """Return the value below which that part of all values lies (nearest rank); 0 for none.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.0
    """
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)] if values else 0.0


# ----------------------------------------------------------------------------------------------------- the private machine


async def run(scenario: Scenario, operator: str, *, python: Path, folder: Path) -> Round:
    """Start what is needed, run the scenario, and return what the operator did."""
    async with _lab(scenario, operator, python=python, folder=folder) as lab:
        if scenario.rate is None and scenario.seeds:
            return await lab.restart()
        await lab.warm_up()
        return await (lab.soak() if scenario.seeds else lab.measure())


@asynccontextmanager
async def _lab(scenario: Scenario, name: str, *, python: Path, folder: Path) -> AsyncIterator[Lab]:
    endpoints = devstack.up(["cluster"])
    if not scenario.nodes:
        process.stop("scheduler", kill=True)  # pods are played: nobody else may have them
    if not scenario.real_jobs:
        process.stop("controller-manager", kill=True)
    postgres.up()
    url = postgres.create_database("bench")
    await migrate(url)
    admin = Server(Access.from_kubeconfig(endpoints.kubeconfig))
    database = await asyncpg.create_pool(url, min_size=1, max_size=4)
    cluster.apply([custom_resource_definition()])
    kubeconfig = await account(admin, folder, endpoints.kubeconfig)
    await admin.send("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE, "labels": RESTRICTED}})
    runner = {"metadata": {"name": "processing-task-runner"}}
    await admin.send("POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts", runner)
    results = Results(database)
    hand: Hand = StatusHand(admin, NAMESPACE, results)
    if scenario.nodes:
        hand = kwok.Outcomes(admin, NAMESPACE, results)
    elif scenario.real_jobs:
        hand = PodHand(admin, NAMESPACE, results)
    elif scenario.seeds:
        hand = LiveHand(admin)
    load = (kwok.BareJobs if name == "bare" else Load)(admin, NAMESPACE, hand, type=scenario.type)
    running_operator = Running(
        name, python=python, kubeconfig=kubeconfig, folder=folder, postgres_url=url, nodes=scenario.nodes
    )
    await running_operator.start()
    following = asyncio.create_task(load.follow())
    nodes = None
    if scenario.nodes:
        await kwok.make_nodes(admin, NAMESPACE)
        nodes = kwok.start(endpoints.kubeconfig, folder)
    try:
        await asyncio.sleep(2)  # the watches are open
        yield Lab(scenario, admin, running_operator, load, database)
        if following.done():
            following.result()
    finally:
        following.cancel()
        await asyncio.wait([following])
        running_operator.kill()
        if nodes is not None:
            nodes.kill()
        await admin.aclose()
        await database.close()


async def account(admin: Server, folder: Path, kubeconfig: Path, name: str = "operator") -> Path:
    """Return a kubeconfig with the token of a service account: unlike an administrator it queues with others, and no
    certificate is verified with each request.
    """
    accounts = "/api/v1/namespaces/default/serviceaccounts"
    await admin.send("POST", accounts, {"metadata": {"name": name}})
    binding = {
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": "default"}],
    }
    await admin.send("POST", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", binding)
    wanted = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    answer = orjson.loads(await admin.send("POST", f"{accounts}/{name}/token", wanted))
    config: dict[str, Any] = yaml.safe_load(kubeconfig.read_text())  # noqa: ASYNC240 - before any load
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": answer["status"]["token"]}}]
    path = folder / f"{name}.kubeconfig"
    path.touch(mode=0o600)
    path.write_text(json.dumps(config))

    async def served() -> bool:
        server = Server(Access.from_kubeconfig(path))
        try:
            await server.send("GET", "/apis/tasks.zzdsj.io/v1/namespaces/default/processingtasks")
        except RuntimeError:
            return False
        finally:
            await server.aclose()
        return True

    await until("the resource is served to the account", served, seconds=30)
    return path


if __name__ == "__main__":
    place = Path(sys.argv[3])
    measured = uvloop.run(run(SCENARIOS[sys.argv[1]], sys.argv[2], python=Path(sys.argv[4]), folder=place))
    (place / "round.json").write_text(json.dumps(asdict(measured)))
