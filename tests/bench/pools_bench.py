"""Warm pools: 100 tasks a second and more, what a task costs whom, killed workers, priorities, joined texts; beside Celery.

``--only steady`` (or fast, gateway, floor, queued, killed, operator, embedding, celery, pods; comma separated) runs one
part. Each but the last two has a machine of its own: network and process namespace, etcd, API server, PostgreSQL and Redis,
all started for it (:mod:`tests.bench.pool_rounds`); pods run on the whole installation (:mod:`tests.bench.pool_pods`).
The operator signs in with a service account, as in a cluster, and runs in the environment of the image; workers run in that
of the tests, as plain processes.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from devstack import DevstackError, machine, tools
from devstack.stores import postgres
from tests.bench import celery_side, pool_pods
from tests.bench.measurement import Measurement
from tests.bench.operator_bench import environment
from tests.bench.pool_rounds import BATCH, LEASE, QUEUED, SCENARIOS, TEXT, TEXTS, WORKERS
from tests.support.operator_lab import ROOT

PARTS: Final = ("floor", "steady", "fast", "gateway", "queued", "killed", "operator", "embedding", "celery", "pods")
_LIMIT: Final = 900.0  # seconds for one part
_CONTROL: Final = ("operator", "apiserver", "etcd", "postgres", "redis")
Rounds = dict[str, dict[str, Any]]


def run(only: Sequence[str] = ()) -> list[Measurement]:
    """Run all parts, or those named. Raises DevstackError."""
    if unknown := set(only) - {*PARTS, *SCENARIOS}:
        raise DevstackError(f"cannot measure {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    machine.require_root()
    machine.require(["cluster"])
    tools.kube()  # built here: the private machines reach no network
    tools.kubectl()
    postgres.programs_folder()
    python = environment()
    rounds: Rounds = {}
    for part in only or PARTS:
        print(f"    {part}", flush=True)
        if part == "celery":
            rounds[part] = celery_side.measure()
        elif part == "pods":
            rounds[part] = asyncio.run(pool_pods.measure(rate=100, seconds=30))
        else:
            rounds[part] = _round(part, python=python)
        print(f"      {json.dumps(rounds[part])}", flush=True)
    return [one for part in rounds for one in _TABLES.get(part, _steady)(part, rounds)]


def _round(scenario: str, *, python: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="pools-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user, who has to get to its data
        command = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        inside = f'"{sys.executable}" -m tests.bench.pool_rounds {scenario} {name} {python}'
        try:
            subprocess.run(
                [*command, "bash", "-c", f"ip link set lo up && {inside}"],
                cwd=ROOT,
                env={**os.environ, "DEVSTACK_STATE": f"{name}/state"},
                timeout=_LIMIT,
                check=True,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            for log in sorted(folder.glob("*.log")):
                print(f"      {log.name}: {log.read_text()[-1500:]}", flush=True)
            raise DevstackError(f"cannot measure {scenario}: {error}; see what is printed above") from error
        answer: dict[str, Any] = json.loads((folder / "round.json").read_text())
        return answer


# -------------------------------------------------------------------------------------------------------------- tables


def _row(metric: str, value: float, unit: str, target: float | None = None, **more: Any) -> Measurement:
    return Measurement(metric=metric, value=value, unit=unit, target=target, **more)


def _split(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{part} {ms:.2f}" for part, ms in sorted(found["cpu"].items()))


def _lost(part: str, found: Mapping[str, Any]) -> Measurement:
    lost = found["tasks"] - min(found["completed"], found["rows"])
    how = (
        f"of {found['tasks']}; each looked at in the API server and in PostgreSQL (row, attempt, event); "
        f"in the pool: {found['in_pool']}"
    )
    return _row(f"{part}: tasks lost or late", lost, "", 0, how=how)


def _control(found: Mapping[str, Any]) -> float:
    return float(sum(found["cpu"].get(part, 0.0) for part in _CONTROL))


def _steady(part: str, rounds: Rounds) -> list[Measurement]:
    found, least = rounds[part], rounds.get("floor")
    wanted = {"steady": "100 health checks a second for 60 s", "fast": "200 a second for 30 s"}.get(part, part)
    how = f"{wanted}, created through the Kubernetes API; {WORKERS} workers; a machine of {os.cpu_count()} CPUs for all"
    base = None if least is None else least["cpu"]["apiserver"] + least["cpu"]["etcd"]
    return [
        _lost(part, found),
        _row(f"{part}: rate", round(found["throughput"]), "/s", 100 if part == "steady" else 200, better="higher", how=how),
        _row(f"{part}: created to Completed, p99", found["p99"], "ms", 2000 if part == "steady" else None, how=how),
        _row(f"{part}: created to Completed, p50", found["p50"], "ms", how=how),
        _row(f"{part}: CPU of the control plane", _control(found), "ms/task", baseline=base, how=f"{how}; {_split(found)}"),
        _row(f"{part}: CPU of the operator", found["cpu"]["operator"], "ms/task", how=how),
        _row(f"{part}: CPU of the workers", found["cpu"]["workers"], "ms/task", 1.0, how=f"{how}; what they check included"),
        _row(f"{part}: status writes", found["status_writes"], "/task", 1.05, how="counted at the API server"),
        _row(f"{part}: operator memory, most", found["memory"], "MB", 100, how=how),
    ]


def _floor(part: str, rounds: Rounds) -> list[Measurement]:
    found = rounds[part]
    cost = found["cpu"]["apiserver"] + found["cpu"]["etcd"]
    how = f"2,000 tasks created and ended by one write each, by the load, 16 at once, no operator: {found['rate']:.0f}/s"
    return [_row("floor: CPU of API server and etcd", cost, "ms/task", how=f"{how}; {_split(found)}")]


def _gateway(part: str, rounds: Rounds) -> list[Measurement]:
    rows = []
    for name, one in rounds[part].items():
        way = "a POST /api/v1/tasks each" if name == "single" else f"{BATCH} in each POST /api/v1/tasks/batch"
        how = f"100 health checks a second for 30 s, {way}; {WORKERS} workers"
        rows += [
            _lost(f"gateway, {name}", one),
            _row(f"gateway, {name}: rate", round(one["throughput"]), "/s", 100, better="higher", how=how),
            _row(f"gateway, {name}: asked for to Completed, p99", one["p99"], "ms", 2000, how=how),
            _row(f"gateway, {name}: CPU of the gateway", one["cpu"]["gateway"], "ms/task", how=f"{how}; {_split(one)}"),
        ]
    return rows


def _pods(part: str, rounds: Rounds) -> list[Measurement]:
    found = rounds[part]
    how = f"100 health checks a second for 30 s; {pool_pods.WORKERS} worker pods on the whole installation; {_split(found)}"
    return [
        _lost(part, found),
        _row("pods: rate", round(found["throughput"]), "/s", 100, better="higher", how=how),
        _row("pods: created to Completed, p99", found["p99"], "ms", 2000, how=how),
        _row("pods: created to Completed, p50", found["p50"], "ms", how=how),
    ]


def _queued(part: str, rounds: Rounds) -> list[Measurement]:
    found = rounds[part]
    how = (
        f"{QUEUED} tasks of low priority wait, one worker starts, high ones come, ten a second; "
        f"low ones left at the end: {found['low_left']}"
    )
    return [
        _row("queued: high priority, created to Completed, p99", found["p99"], "ms", 1000, how=how),
        _row("queued: high priority, created to Completed, p50", found["p50"], "ms", how=how),
        _row(f"queued: operator memory, {QUEUED} waiting", found["memory_queued"], "MB", 100, how=how),
    ]


def _killed(part: str, rounds: Rounds) -> list[Measurement]:
    found = rounds[part]
    if part == "killed":
        what, bound = "two minutes, workers killed one after the other, every 5 s", LEASE + 2
    else:
        what, bound = "a minute, the operator, which is one alone, killed every 12 s", None
    how = (
        f"50 health checks a second for {what}: {found['killed']} times in all; "
        f"tasks with a second attempt: {found['second_attempts']}; lease {LEASE:.0f} s"
    )
    return [
        _lost(part, found),
        _row(f"{part}: tasks that ended twice", found["twice"], "", 0, how=how),
        _row(
            f"{part}: slowest task that took longer than a lease",
            found["slowest"],
            "s",
            bound,
            how=f"{how}; from its creation",
        ),
    ]


def _embedding(part: str, rounds: Rounds) -> list[Measurement]:
    found = rounds[part]
    joined, single, bare = found["joined"], found["single"], found["bare"]
    # What the CPU that the control plane left over could have embedded in bare loops.
    cpus = os.cpu_count() or 1
    others = sum(ms for name, ms in joined["cpu"].items() if name != "workers") * TEXTS / 1000
    span = TEXTS / joined["rate"]
    possible = min(max(cpus * span - others, 0.0) / (bare["cpu"] / 1000), span * bare["rate"])
    how = f"{TEXTS} tasks of one text of {TEXT} Chinese characters, created at once, {WORKERS} workers, 16 at once in each"
    return [
        _lost("embedding", joined),
        _row(
            "embedding: tasks",
            joined["rate"],
            "/s",
            baseline=single["rate"],
            how=f"{how}; baseline: one at a time; bare loops {bare['rate']:.0f}/s",
        ),
        _row(
            "embedding: share of what is left over",
            100 * TEXTS / possible if possible else 0.0,
            "%",
            80,
            better="higher",
            baseline=100,
            how=how,
        ),
        _row(
            "embedding: CPU of the worker",
            joined["cpu"]["workers"],
            "ms/task",
            baseline=bare["cpu"],
            how=f"{how}; baseline: bare loops, as many as workers",
        ),
    ]


def _celery(part: str, rounds: Rounds) -> list[Measurement]:
    found, rows = rounds[part], []
    for name, one in found.items():
        how = f"{one['what']}; Redis on loopback, two worker processes (prefork)"
        rows += [
            _row(f"celery, {name}: no-op tasks", one["noop_rate"], "/s", how=how),
            _row(f"celery, {name}: CPU of a no-op", one["noop_cpu"], "ms/task", how=f"{how}; worker, producer and Redis"),
            _row(
                f"celery, {name}: texts embedded",
                one["embed_rate"],
                "/s",
                how=f"{how}; one text of {TEXT} characters a task",
            ),
            _row(f"celery, {name}: CPU of a text", one["embed_cpu"], "ms/task", how=f"{how}; worker, producer and Redis"),
            _row(
                f"celery, {name}: tasks not done 60 s after a killed worker",
                one["lost"],
                "",
                how=f"{how}; of {one['killed_of']}",
            ),
        ]
    return rows


_TABLES: Final[dict[str, Callable[[str, Rounds], list[Measurement]]]] = {
    "floor": _floor,
    "gateway": _gateway,
    "gateway-trial": _gateway,
    "queued": _queued,
    "killed": _killed,
    "operator": _killed,
    "embedding": _embedding,
    "celery": _celery,
    "pods": _pods,
}
