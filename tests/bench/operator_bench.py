"""Our operator beside the obvious one (:mod:`tests.bench.baseline_operator`), under the same load on a real API server.

The control plane is one of its own in a network namespace of its own; its Job controller and scheduler are stopped, and the
load plays them (:mod:`tests.bench.operator_load`). Both operators use a service account, as in a cluster, and no database.
"""

import asyncio
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import orjson
import uvloop
import yaml

import devstack
from devstack import DevstackError, cluster, machine, process, tools
from task_contract.crd import custom_resource_definition
from task_operator.cluster import Access
from tests.bench.measurement import Measurement
from tests.bench.operator_load import WORK, Load, Record, Server
from tests.support.operator_lab import RESTRICTED, ROOT, OperatorProcess, until

RATES: Final = (30, 100)  # tasks a second
SECONDS: Final = 30.0  # of each round
PATIENCE: Final = 25.0  # seconds for an operator that has fallen behind
WARM_UP: Final = 20  # tasks before what is measured
_LIMIT: Final = 360.0  # seconds for all
_WRITES: Final = {"POST", "PUT", "PATCH", "APPLY", "DELETE"}
_LOAD_WRITES: Final = {("POST", "processingtasks"), ("POST", "pods"), ("PATCH", "pods/status"), ("PATCH", "jobs/status")}
"""What the load itself writes; nothing of it is an operator's."""


@dataclass(frozen=True)
class Round:
    """What one operator did in one round."""

    operator: str
    rate: int
    tasks: int
    completed: int
    """Of the tasks, before patience ended."""
    job_p50: float
    """Milliseconds from the request that creates a task to its Job; so too the next."""
    job_p99: float
    done_p50: float
    """Milliseconds from a Job that is done to its task that is Completed."""
    done_p99: float
    operator_cpu: float
    """CPU milliseconds a task; so too the next two."""
    api_cpu: float
    etcd_cpu: float
    memory: float
    """Most memory (VmHWM) of the operator in MB."""
    requests: dict[str, float]
    """The operator's requests a task, by verb and resource."""

    @property
    def writes(self) -> float:
        """Writes a task."""
        return sum(count for name, count in self.requests.items() if name.split()[0] in _WRITES)


def run() -> list[Measurement]:
    """Run all rounds on a private machine and compare."""
    machine.require_root()
    machine.require(["cluster"])
    tools.kube()  # built here: the private machine reaches no network
    tools.kubectl()
    with tempfile.TemporaryDirectory(prefix="operator-bench-") as folder:
        result = Path(folder) / "rounds.json"
        command = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        inside = f'ip link set lo up && "{sys.executable}" -m tests.bench.operator_bench "{folder}"'
        try:
            subprocess.run(
                [*command, "bash", "-c", inside],
                cwd=ROOT,
                env={**os.environ, "DEVSTACK_STATE": f"{folder}/state"},
                timeout=_LIMIT,
                check=True,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise DevstackError(f"the rounds did not end well: {error}; see what is printed above") from error
        rounds = [Round(**one) for one in json.loads(result.read_text())]
    return [measurement for rate in RATES for measurement in _compare(rate, rounds)]


def _compare(rate: int, rounds: Sequence[Round]) -> list[Measurement]:
    ours = next(one for one in rounds if (one.operator, one.rate) == ("ours", rate))
    other = next(one for one in rounds if (one.operator, one.rate) == ("baseline", rate))
    how = (
        f"{ours.tasks} tasks at {rate}/s, pods of {WORK} s played; completed {ours.completed}, "
        f"baseline {other.completed} of {other.tasks}; times are of those that came so far; a shared machine of "
        f"{os.cpu_count()} CPUs"
    )

    def row(metric: str, unit: str, value: float, baseline: float | None, target: float | None) -> Measurement:
        metric = f"{metric}, {rate}/s"
        return Measurement(metric=metric, value=value, unit=unit, baseline=baseline, target=target, how=how)

    rows = [
        row("CR to Job, p50", "ms", ours.job_p50, other.job_p50, 50),
        row("CR to Job, p99", "ms", ours.job_p99, other.job_p99, 1000),
        row("Job done to CR done, p50", "ms", ours.done_p50, other.done_p50, 50),
        row("Job done to CR done, p99", "ms", ours.done_p99, other.done_p99, 1000),
        row("tasks not completed in time", "", ours.tasks - ours.completed, other.tasks - other.completed, 0),
        row("operator memory, most", "MB", ours.memory, other.memory, 100),
    ]
    if ours.completed < ours.tasks:
        return rows  # what went into tasks that are half done belongs to no task: there is no cost of one
    complete = other.completed == other.tasks
    requests = "; ".join(
        f"{one.operator}: {', '.join(f'{name} {count:.2f}' for name, count in one.requests.items())}"
        for one in (ours, other)
        if one.completed == one.tasks
    )
    writes = row("API writes", "/task", ours.writes, other.writes if complete else None, 3.0)
    return [
        *rows,
        row("operator CPU", "ms/task", ours.operator_cpu, other.operator_cpu if complete else None, 3.3),
        row("API server CPU, load included", "ms/task", ours.api_cpu, other.api_cpu if complete else None, None),
        row("etcd CPU, load included", "ms/task", ours.etcd_cpu, other.etcd_cpu if complete else None, None),
        replace(writes, how=f"{how}; {requests}"),
    ]


# ------------------------------------------------------------------------------------------------ on the private machine


async def measure(folder: Path) -> list[Round]:
    """Run every operator at every rate, each in a namespace of its own."""
    endpoints = devstack.up(["cluster"])
    for name in ("controller-manager", "scheduler"):  # the load plays them; nobody else writes
        process.stop(name, kill=True)
    admin = Server(Access.from_kubeconfig(endpoints.kubeconfig))
    try:
        cluster.apply([custom_resource_definition()])
        kubeconfig = await _account(admin, folder, endpoints.kubeconfig)
        rounds = []
        for rate in RATES:
            for operator in ("ours", "baseline"):
                print(f"    {operator}, {rate}/s", flush=True)
                rounds.append(await _round(admin, operator, rate, kubeconfig=kubeconfig, folder=folder))
                print(f"      {rounds[-1]}", flush=True)
        return rounds
    finally:
        await admin.aclose()


async def _round(admin: Server, operator: str, rate: int, *, kubeconfig: Path, folder: Path) -> Round:
    namespace = f"{operator}-{rate}"
    await admin.send("POST", "/api/v1/namespaces", {"metadata": {"name": namespace, "labels": RESTRICTED}})
    account = {"metadata": {"name": "processing-task-runner"}}
    await admin.send("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts", account)
    started = OperatorProcess(kubeconfig=kubeconfig, namespaces=[namespace], folder=folder)
    pid = (await _start_ours(started)) if operator == "ours" else None
    baseline = None if pid is not None else _start_baseline(namespace, kubeconfig=kubeconfig, folder=folder)
    if baseline is not None:
        pid = baseline.pid
    assert pid is not None
    load = Load(admin, namespace)
    following = asyncio.create_task(load.follow())
    try:
        await asyncio.sleep(1)  # the watches are open
        await load.run(name="warm-up", rate=10, seconds=WARM_UP / 10, patience=PATIENCE)
        if load.finished < WARM_UP:
            log = (folder / f"{namespace}.log") if baseline is not None else started.log
            raise DevstackError(f"cannot warm up {operator}:\n{log.read_text()[-3000:]}")
        load.records.clear()
        pids = {name: found.pid for name in ("apiserver", "etcd") if (found := process.find(name)) is not None}
        pids["operator"] = pid
        before, requests = {name: cpu_seconds(one) for name, one in pids.items()}, await admin.requests()
        await load.run(name="task", rate=rate, seconds=SECONDS, patience=PATIENCE)
        used = {name: cpu_seconds(one) - before[name] for name, one in pids.items()}
        requests = await admin.requests() - requests
        if following.done():
            following.result()
        return _summary(operator, rate, list(load.records.values()), used, requests, memory=peak_memory(pid))
    finally:
        following.cancel()
        await asyncio.wait([following])
        if baseline is None:
            started.kill()
        else:
            baseline.kill()
            baseline.wait()


def _summary(
    operator: str,
    rate: int,
    records: Sequence[Record],
    used: Mapping[str, float],
    requests: Counter[tuple[str, str]],
    *,
    memory: float,
) -> Round:
    completed = sum(record.completed is not None for record in records)
    made = [(one.job_made - one.posted) * 1000 for one in records if one.job_made is not None]
    done = [
        (one.completed - one.job_done) * 1000 for one in records if one.completed is not None and one.job_done is not None
    ]
    milliseconds = {name: seconds * 1000 / max(completed, 1) for name, seconds in used.items()}
    ours = {
        f"{verb} {resource}": round(count / max(completed, 1), 3)
        for (verb, resource), count in sorted(requests.items())
        if (verb, resource) not in _LOAD_WRITES and verb not in {"WATCH", "CONNECT"}
    }
    return Round(
        operator=operator,
        rate=rate,
        tasks=len(records),
        completed=completed,
        job_p50=percentile(made, 0.5),
        job_p99=percentile(made, 0.99),
        done_p50=percentile(done, 0.5),
        done_p99=percentile(done, 0.99),
        operator_cpu=milliseconds["operator"],
        api_cpu=milliseconds["apiserver"],
        etcd_cpu=milliseconds["etcd"],
        memory=memory,
        requests=ours,
    )


async def _start_ours(operator: OperatorProcess) -> int:
    operator.start()
    await operator.ready()
    return operator.pid


def _start_baseline(namespace: str, *, kubeconfig: Path, folder: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "kopf", "run", "--standalone", "--namespace", namespace]
    with (folder / f"{namespace}.log").open("wb") as log:
        return subprocess.Popen(
            [*command, str(Path(__file__).with_name("baseline_operator.py"))],
            cwd=ROOT,
            env={**os.environ, "KUBECONFIG": str(kubeconfig), "PYTHONPATH": f"{ROOT / 'crds'}:{ROOT / 'operator'}"},
            stdout=log,
            stderr=log,
        )


async def _account(admin: Server, folder: Path, kubeconfig: Path) -> Path:
    """Return a kubeconfig with the token of a service account: unlike an administrator it queues with others."""
    accounts = "/api/v1/namespaces/default/serviceaccounts"
    await admin.send("POST", accounts, {"metadata": {"name": "operator"}})
    binding = {
        "metadata": {"name": "operator"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"kind": "ServiceAccount", "name": "operator", "namespace": "default"}],
    }
    await admin.send("POST", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", binding)
    wanted = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    answer = orjson.loads(await admin.send("POST", f"{accounts}/operator/token", wanted))
    config: dict[str, Any] = yaml.safe_load(kubeconfig.read_text())  # noqa: ASYNC240 - before any load
    config["users"] = [{"name": config["users"][0]["name"], "user": {"token": answer["status"]["token"]}}]
    path = folder / "operator.kubeconfig"
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


def cpu_seconds(pid: int) -> float:
    """Return the CPU time a process has used, in user and kernel, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_memory(pid: int) -> float:
    """Return the most memory a process has ever had resident, in MB (10^6 bytes)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e6


def percentile(values: Sequence[float], part: float) -> float:
    """Return the value below which that part of all values lies (nearest rank); 0 for none.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.0
    """
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)] if values else 0.0


if __name__ == "__main__":
    place = Path(sys.argv[1])
    measured = uvloop.run(measure(place))
    (place / "rounds.json").write_text(json.dumps([asdict(one) for one in measured]))
