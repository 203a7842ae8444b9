"""The projection: 2,000 versions of tasks a second into PostgreSQL, with events and attempts; beside it an INSERT a version.

The real :class:`~task_operator.projection.Database` on a real PostgreSQL (the devstack's, or that of TASKS_POSTGRES_URL), in
a process of its own with the event loop and the collector settings of the operator. The load, that of
:mod:`tests.bench.projection_load`, is made in the same process, and its own CPU time is measured and left out. It waits
while a thousand rows do, so that a slow server is no help: versions would overtake each other then and never be written.
"""

import asyncio
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import asyncpg
import uvloop

import devstack
from devstack.progress import DevstackError
from task_operator.metrics import Metrics
from task_operator.projection import _COLUMNS, Database, _values
from tests.bench.measurement import Measurement
from tests.bench.projection_load import NOON, lives
from tests.support.databases import fresh_database
from tests.support.operator_lab import until

RATE: Final = 2_000  # versions a second
SECONDS: Final = 20.0
BASELINE_VERSIONS: Final = 10_000
VERSIONS: Final = int(RATE * SECONDS)
AT_ONCE: Final = 5_000  # tasks under way: each has a version every 2.5 s, so that few are overtaken while they wait
_WAITING: Final = 1_000  # rows that may wait before the load does: where the server is slower, it is the rate that falls
_TICK: Final = 0.01  # seconds
_PATIENCE: Final = 60.0  # seconds for what waits at the end
_ROOT: Final = Path(__file__).resolve().parents[2]
_ONE: Final = (
    f"INSERT INTO tasks ({', '.join(name for name, _ in _COLUMNS)}) "
    f"VALUES ({', '.join(f'${place}' for place in range(1, len(_COLUMNS) + 1))}) ON CONFLICT (uid) DO UPDATE SET "
    f"{', '.join(f'{name} = excluded.{name}' for name, _ in _COLUMNS if name != 'uid')} "
    "WHERE tasks.resource_version <= excluded.resource_version"
)


def run() -> list[Measurement]:
    """Measure both, each in a process and a database of its own: one minute."""
    server = os.environ.get("TASKS_POSTGRES_URL") or devstack.up(["stores"]).host_urls["TASKS_POSTGRES_URL"]
    ours, baseline = (_measured(server, who) for who in ("ours", "baseline"))
    how = (
        f"{ours['versions']:.0f} versions in {ours['seconds']:.0f} s, {AT_ONCE} tasks at once; {ours['written']:.0f} were "
        f"written, a later one overtook the others while they waited; {ours['rows']:.0f} tasks, "
        f"{ours['events']:.0f} events, {ours['attempts']:.0f} attempts; baseline: one INSERT ... ON CONFLICT a version, "
        f"no events ({baseline['versions']:.0f} versions in {baseline['seconds']:.0f} s); CPU without that of the load"
    )

    def row(metric: str, of: str, unit: str, target: float | None, *, beside: bool = True) -> Measurement:
        return Measurement(
            metric=metric, value=ours[of], unit=unit, baseline=baseline[of] if beside else None, target=target, how=how
        )

    return [
        row("operator CPU of a version", "cpu", "ms", 0.2),
        row("the same, shared by those that were written", "cpu_written", "ms", 0.2, beside=False),
        replace(row("versions written", "rate", "/s", RATE), better="higher"),
        row("histories that differ from what happened", "wrong", "", 0, beside=False),
    ]


def _measured(server: str, who: str) -> Mapping[str, float]:
    with fresh_database(server, prefix="bench") as url:
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.projection_bench", who, url],
            cwd=_ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(str(_ROOT / part) for part in (".", "crds", "operator"))},
            capture_output=True,
            text=True,
            timeout=SECONDS + 5 * _PATIENCE,
            check=False,
        )
    if done.returncode:
        raise DevstackError(f"cannot measure the projection ({who}):\n{done.stderr[-3000:]}")
    found: Mapping[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# ------------------------------------------------------------------------------------------------------- in the process


class Load:
    """Versions at a rate; what making them costs is known."""

    def __init__(self) -> None:
        self._lives = lives(1, at_once=AT_ONCE)
        self.versions = 0
        self.cpu = 0.0

    def due(self, elapsed: float) -> list[dict[str, Any]]:
        """Return the versions that should have come by now."""
        began = time.process_time()
        found = [next(self._lives) for _ in range(min(int(elapsed * RATE) - self.versions, _WAITING // 2))]
        self.versions += len(found)
        self.cpu += time.process_time() - began
        return found


async def ours(url: str) -> dict[str, float]:
    """Submit as the controller does."""
    metrics = Metrics()
    database = Database(url, metrics=metrics)
    await database.warm_up()
    writing = asyncio.create_task(database.run())
    load, last = Load(), dict[str, dict[str, Any]]()
    cpu, began = time.process_time(), time.monotonic()

    async def room() -> bool:
        return (metrics.registry.get_sample_value("task_operator_projection_pending") or 0) < _WAITING

    async def written() -> bool:
        return not metrics.registry.get_sample_value("task_operator_projection_pending")

    while load.versions < VERSIONS:
        for manifest in load.due(time.monotonic() - began):
            database.submit(manifest, deleted=_gone(manifest))
            last[manifest["metadata"]["uid"]] = manifest
        await asyncio.sleep(_TICK)
        await until("there is room", room, seconds=_PATIENCE)
    await until("all rows are written", written, seconds=_PATIENCE)
    seconds = time.monotonic() - began
    used = time.process_time() - cpu - load.cpu
    writing.cancel()
    await asyncio.wait([writing])
    await database.aclose()
    sql = await asyncpg.connect(url)
    counts = {name: await sql.fetchval(f"SELECT count(*) FROM {name}") for name in ("tasks", "attempts", "task_events")}
    await asyncio.sleep(1)  # statistics of a backend that has ended come late
    written_rows = await sql.fetchval("SELECT n_tup_ins + n_tup_upd FROM pg_stat_user_tables WHERE relname = 'tasks'")
    events = await sql.fetch("SELECT task_uid::text AS uid, phase, attempt FROM task_events ORDER BY number")
    await sql.close()
    return {
        "versions": load.versions,
        "seconds": seconds,
        "rate": written_rows / seconds,
        "rows": counts["tasks"],
        "events": counts["task_events"],
        "attempts": counts["attempts"],
        "written": written_rows,
        "cpu": 1000 * used / load.versions,
        "cpu_written": 1000 * used / written_rows,
        "wrong": _wrong(last, [(row["uid"], row["phase"], row["attempt"]) for row in events]),
    }


async def baseline(url: str) -> dict[str, float]:
    """Write each version by a statement of its own, four at a time."""
    load = Load()
    async with asyncpg.create_pool(url, min_size=4, max_size=4) as pool:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(maxsize=1000)

        async def write() -> None:
            while True:
                manifest = await queue.get()
                values = _values(manifest, deleted_at=NOON if _gone(manifest) else None, now=NOON)
                await pool.execute(_ONE, *values)
                queue.task_done()

        writers = [asyncio.create_task(write()) for _ in range(4)]
        cpu, began = time.process_time(), time.monotonic()
        while load.versions < BASELINE_VERSIONS:
            for manifest in load.due(time.monotonic() - began):
                await queue.put(manifest)
            await asyncio.sleep(_TICK)
        await queue.join()
        seconds = time.monotonic() - began
        used = time.process_time() - cpu - load.cpu
        for writer in writers:
            writer.cancel()
        await asyncio.wait(writers)
    return {
        "versions": load.versions,
        "seconds": seconds,
        "rate": load.versions / seconds,
        "cpu": 1000 * used / load.versions,
    }


def _gone(manifest: Mapping[str, Any]) -> bool:
    return "deletionTimestamp" in manifest["metadata"]


def _wrong(last: Mapping[str, Mapping[str, Any]], events: Iterable[tuple[str, str, int]]) -> int:
    """Count tasks whose events do not tell their attempts, once each and in order, and where they stand."""
    stories: dict[str, list[tuple[str, int]]] = {}
    for uid, phase, attempt in events:
        stories.setdefault(uid, []).append((phase, attempt))
    wrong = 0
    for uid, manifest in last.items():
        status, story = manifest["status"], stories.get(uid, [])
        failed = [one["number"] for one in status.get("attempts", ()) if one.get("reason") not in {None, "Succeeded"}]
        wrong += not (
            story[:1] == [("Queued", 1)]
            and story[-1][0] == status["phase"]
            and [attempt for phase, attempt in story if phase == "Retrying"] == failed
        )
    return wrong


if __name__ == "__main__":
    gc.set_threshold(20_000, 20, 50)  # as the operator does
    print(json.dumps(uvloop.run({"ours": ours, "baseline": baseline}[sys.argv[1]](sys.argv[2]))))
