"""Failover: the operator that acts is killed, told to stop, or paused under 50 tasks a second; when the other one acts.

Two operators as processes on the devstack's API server with PostgreSQL, in a namespace of their own; tasks come all the time
and their pods stay pending, so that the load is the operators' own. Measured is the time from the signal to the first Job of
a task that was made after it, and in the end what was lost or done twice. Kubernetes' own election (client-go) has a lease
of 15 s. Beside it runs what kopf has, peering: two of the obvious operator, of which the one of the higher priority is
killed, without any load.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import devstack
from devstack import cluster
from task_contract.crd import custom_resource_definition
from task_platform.kubernetes import Access
from tests.bench.measurement import Measurement
from tests.support.databases import fresh_database
from tests.support.operator_lab import ROOT, Kube, OperatorProcess, Place, until

RATE: Final = 50  # tasks a second
BEFORE: Final = 5.0  # seconds of load before the signal
AFTER: Final = 20.0  # seconds after it
_PEERINGS: Final = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "kopfpeerings.kopf.dev"},
    "spec": {
        "scope": "Namespaced",
        "group": "kopf.dev",
        "names": {"kind": "KopfPeering", "plural": "kopfpeerings", "singular": "kopfpeering"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}
_PEERING: Final[dict[str, Any]] = {"apiVersion": "kopf.dev/v1", "kind": "KopfPeering", "metadata": {"name": "bench"}}
_PATIENCE: Final = 180.0  # seconds for every task to have its Job
SCENARIOS: Final = {"killed": signal.SIGKILL, "told to stop": signal.SIGTERM, "paused": signal.SIGSTOP}
TARGETS: Final = {"killed": 15.0, "told to stop": 5.0, "paused": 15.0}  # seconds


@dataclass(frozen=True, slots=True)
class _Outage:
    seconds: float
    tasks: int
    lost: int
    """Tasks without a Job in the end."""
    twice: int
    """Tasks with more than one."""


def run() -> list[Measurement]:
    """Measure each way to lose the leader, in a namespace of its own: four minutes."""
    endpoints = devstack.up(["cluster", "stores"])
    cluster.apply([custom_resource_definition()])
    measurements = []
    for name, how in SCENARIOS.items():
        with (
            fresh_database(endpoints.host_urls["TASKS_POSTGRES_URL"], prefix="bench") as url,
            tempfile.TemporaryDirectory() as folder,
        ):
            one = asyncio.run(_measured(endpoints.kubeconfig, url, Path(folder), how))
            baseline = asyncio.run(_peering(endpoints.kubeconfig, Path(folder))) if how is signal.SIGKILL else None
        told = f"{one.tasks} tasks at {RATE}/s, two operators, Lease of 10 s; the one that leads is {name}"
        measurements += [
            Measurement(
                metric=f"{name}: {what}",
                value=value,
                unit=unit,
                target=target,
                how=told,
                baseline=baseline if unit == "s" else None,
            )
            for what, value, unit, target in (
                ("until the next one acts", one.seconds, "s", TARGETS[name]),
                ("tasks without a Job", one.lost, "", 0),
                ("tasks with two Jobs", one.twice, "", 0),
            )
        ]
    return measurements


async def _measured(kubeconfig: Path, url: str, folder: Path, how: signal.Signals) -> _Outage:
    kube = Kube(Access.from_kubeconfig(kubeconfig))
    try:
        async with Place.fresh(kube) as place:
            operators = [
                OperatorProcess(
                    kubeconfig=kubeconfig,
                    namespaces=[place.namespace],
                    folder=folder,
                    OPERATOR_LEASE_NAME="operator",
                    OPERATOR_LEASE_NAMESPACE=place.namespace,
                    OPERATOR_POSTGRES_URL=url,
                    OPERATOR_LIMIT_TOTAL="0",
                )
                for _ in range(2)
            ]
            try:
                return await _outage(place, operators, how)
            finally:
                for one in operators:
                    one.kill()
    finally:
        await kube.aclose()


async def _outage(place: Place, operators: Sequence[OperatorProcess], how: signal.Signals) -> _Outage:
    for one in operators:
        one.start()
    for one in operators:
        await one.ready()

    async def leads() -> OperatorProcess | None:
        for one in operators:
            if "task_operator_leader 1.0" in (await one.get("/metrics"))[1]:
                return one
        return None

    leader: OperatorProcess = await until("one of them leads", leads, seconds=30)
    made: list[str] = []
    loading = asyncio.create_task(_load(place, made, seconds=BEFORE + AFTER))
    await asyncio.sleep(BEFORE)
    os.kill(leader.pid, how)
    began = time.monotonic()
    marked = await _create(place, "mark")
    path, selector = place.path("jobs"), f"tasks.zzdsj.io/task-uid={marked['metadata']['uid']}"

    async def acts() -> bool:
        return bool((await place.kube.do("GET", path, labelSelector=selector))["items"])

    await until("the next one acts", acts, seconds=60)
    seconds = time.monotonic() - began
    if how is signal.SIGSTOP:
        os.kill(leader.pid, signal.SIGCONT)  # under the load that is left, it has its say
    await loading
    made.append("mark")

    async def all_have_one() -> Counter[str] | None:
        owners = Counter(job["metadata"]["ownerReferences"][0]["name"] for job in await place.objects("jobs"))
        return owners if owners.keys() >= set(made) else None

    try:
        owners: Counter[str] = await until("every task has a Job", all_have_one, seconds=_PATIENCE, interval=1)
    except AssertionError:
        owners = Counter(job["metadata"]["ownerReferences"][0]["name"] for job in await place.objects("jobs"))
    twice = sum(number > 1 for number in owners.values())
    return _Outage(seconds=seconds, tasks=len(made), lost=len(set(made) - owners.keys()), twice=twice)


async def _peering(kubeconfig: Path, folder: Path) -> float:
    """Return the seconds until the second of two operators with kopf's peering acts, after the first was killed."""
    kube = Kube(Access.from_kubeconfig(kubeconfig))
    cluster.apply([_PEERINGS])
    started: list[subprocess.Popen[bytes]] = []
    try:
        async with Place.fresh(kube) as place:
            peering = f"/apis/kopf.dev/v1/namespaces/{place.namespace}/kopfpeerings"

            async def made() -> bool:
                return (await kube.ask("POST", peering, _PEERING))[0] < 300  # else the kind is not served yet

            await until("the peering is there", made, seconds=30)
            started += [_with_peering(place.namespace, priority, kubeconfig, folder) for priority in (2, 1)]

            async def both_are_known() -> bool:
                return len((await kube.do("GET", f"{peering}/{_PEERING['metadata']['name']}")).get("status") or {}) == 2

            async def done(name: str) -> bool:
                jobs = await place.objects("jobs")
                return any(job["metadata"]["ownerReferences"][0]["name"] == name for job in jobs)

            await until("both have said that they are there", both_are_known, seconds=60)
            await _create(place, "before")
            await until("the first one acts", lambda: done("before"), seconds=60)
            started[0].kill()
            began = time.monotonic()
            await _create(place, "mark")
            await until("the second one acts", lambda: done("mark"), seconds=180)
            return time.monotonic() - began
    finally:
        for one in started:
            one.kill()
            one.wait()
        await kube.aclose()


def _with_peering(namespace: str, priority: int, kubeconfig: Path, folder: Path) -> "subprocess.Popen[bytes]":
    options = ["--namespace", namespace, "--peering", _PEERING["metadata"]["name"], "--priority", str(priority)]
    command = [sys.executable, "-m", "kopf", "run", *options, str(Path(__file__).with_name("baseline_operator.py"))]
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "crds", "operator"))
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "PYTHONPATH": paths}
    with (folder / f"kopf-{priority}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


async def _load(place: Place, made: list[str], *, seconds: float) -> None:
    """Make tasks at the rate, whatever becomes of them; those that are late are made as soon as possible."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.TaskGroup() as group:
        for number in range(int(RATE * seconds)):
            await asyncio.sleep(max(0.0, began + number / RATE - loop.time()))
            name = f"task-{number}"
            group.create_task(_create(place, name))
            made.append(name)


async def _create(place: Place, name: str) -> dict[str, Any]:
    body = {
        "apiVersion": "tasks.zzdsj.io/v1",
        "kind": "ProcessingTask",
        "metadata": {"name": name},
        "spec": {"type": "health_check", "executor": "job"},
    }
    return await place.kube.do("POST", place.path("processingtasks"), body)
