"""A pool of worker pods under load, on the whole installation: chart, images, operator and workers on the embedded node."""

import asyncio
from collections import defaultdict
from typing import Any, Final

import asyncpg
import orjson
import psutil

import devstack
from devstack import installation, process
from task_platform.kubernetes import Access
from tests.bench.operator_load import Load, Server, own_cpu
from tests.bench.operator_rounds import cpu_seconds
from tests.bench.pool_rounds import NoHand, compared, tasks_called, times
from tests.support.operator_lab import TASKS, until

POOL: Final = "bench-pods"
NAMES: Final = "pods-"
WORKERS: Final = 2
_NAMESPACE: Final = installation.TASK_NAMESPACE
_SERVERS: Final = ("apiserver", "etcd", "controller-manager", "scheduler", "kubelet", "containerd", "redis")
_PODS: Final = {("task_operator", "run"): "operator", ("job_runner", "work"): "workers"}


async def measure(*, rate: float, seconds: float) -> dict[str, Any]:
    """Run health checks at a rate through a pool of pods; return times, counts, and CPU milliseconds a task by process."""
    endpoints = devstack.up()
    installation.install(endpoints)
    admin = Server(Access.from_kubeconfig(endpoints.kubeconfig))
    database = await asyncpg.create_pool(endpoints.host_urls["TASKS_POSTGRES_URL"], min_size=1, max_size=2)
    path = f"{TASKS}/namespaces/{_NAMESPACE}"
    spec = {"types": ["health_check"], "min": WORKERS, "max": WORKERS, "concurrency": 16}
    pool = {"apiVersion": "tasks.zzdsj.io/v1", "kind": "WorkerPool", "metadata": {"name": POOL}, "spec": spec}
    load = Load(admin, _NAMESPACE, NoHand(), type="health_check", spec={"executor": "pool"})
    following = asyncio.create_task(load.follow_tasks())
    try:
        await admin.send("POST", f"{path}/workerpools", pool)

        async def ready() -> bool:
            found = orjson.loads(await admin.send("GET", f"{path}/workerpools/{POOL}"))
            return bool(found.get("status", {}).get("ready") == WORKERS)

        await until(f"{WORKERS} workers take tasks", ready, seconds=180)
        await load.run(name=f"{NAMES}first", count=60, rate=20, patience=60)
        load.forget()
        count, before = int(rate * seconds), _cpu()
        await load.run(name=f"{NAMES}task", count=count, rate=rate, patience=60)
        after = _cpu()
        tasks = await tasks_called(f"{NAMES}task", server=admin, namespace=_NAMESPACE)
        return {
            **await compared(tasks, database),
            **times(load),
            "cpu": {part: (after[part] - before[part]) * 1000 / count for part in after},
        }
    finally:
        following.cancel()
        await asyncio.wait([following])
        await _clear(admin, path)
        await database.close()
        await admin.aclose()


async def _clear(admin: Server, path: str) -> None:
    """Remove pool and tasks."""
    for one in await tasks_called(NAMES, server=admin, namespace=_NAMESPACE):
        await admin.send("DELETE", f"{path}/processingtasks/{one['metadata']['name']}")
    await admin.send("DELETE", f"{path}/workerpools/{POOL}")


def _cpu() -> dict[str, float]:
    """Return the CPU seconds that each part has used so far."""
    used = defaultdict[str, float](float, load=own_cpu())
    for name in _SERVERS:
        if (found := process.find(name)) is not None:
            used[name] = cpu_seconds(found.pid)
    if (server := process.find("postgres")) is not None:
        used["postgres"] = sum(cpu_seconds(one.pid) for one in psutil.Process(server.pid).children())
    for one in psutil.process_iter(["pid", "cmdline"]):
        words = one.info["cmdline"] or []
        for marks, name in _PODS.items():
            if all(mark in words for mark in marks):
                used[name] += cpu_seconds(one.info["pid"])
    return used
