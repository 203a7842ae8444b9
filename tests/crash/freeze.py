"""Freeze what a release leaves behind: ``python -m tests.crash.freeze 0.2.0`` writes ``tests/data/releases/0.2.0``.

The tasks in it are those that the release's own operator and runner store, in every phase; so are the rows, the
statements, and the collection and the index of a knowledge base. What releases hold, and what later ones are held to, is in
:mod:`tests.support.releases`.
"""

import argparse
import asyncio
import contextlib
import json
import re
import shutil
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import yaml

from devstack import up
from task_contract.lifecycle import ExitCode
from task_contract.names import DOCUMENT_ROOT
from tests.crash.faults import Action
from tests.crash.life import NEW, OLD, Life, Scenario, Track, World
from tests.crash.oracle import look
from tests.crash.sweeping import SweepLife
from tests.support.devstack import Kubectl
from tests.support.frozen_stores import taken
from tests.support.operator_lab import ROOT, until
from tests.support.releases import FOLDER, MIGRATIONS

SCENARIOS = (
    Scenario("publish"),
    Scenario("retry", runner={"Milvus upsert #1 after": Action.KILL}),
    Scenario("given-back", first_pod={"TASKS_MILVUS_URL": "http://127.0.0.1:9"}),
    Scenario("cancel", runner={"Elasticsearch PUT _bulk #1 after": Action.STOP}, cancel=True, phase="Canceled"),
    Scenario("unchanged"),
    Scenario("delete", deletes=True),
    Scenario("missing", seeded=False, phase="Failed"),
)
FILES = {"unchanged": OLD, "missing": "missing.txt"}
"""Scenario → the file of its task, where that makes the difference."""
NOISE = ("managedFields", "resourceVersion", "selfLink")


async def record(track: Track, scenario: Scenario, seen: dict[str, dict[str, Any]]) -> set[str]:
    """Lead a life and keep the task as it is stored in each phase, for each reason; return the statements that were sent."""
    life = Life(scenario, track, file=FILES.get(scenario.name, NEW))

    async def watch() -> None:
        while True:
            if (task := await track.place.task(life.name)) is not None:
                keep(scenario.name, task, seen)
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    try:
        await track.live(life)

        async def rests() -> bool:
            return (await look(life)).settled

        await until("the life has come to rest", rests)
    finally:
        watching.cancel()
    statements = life.record("operator").statements | life.record("runner").statements
    # Rows are kept: only what would be in the way of the next life goes.
    for plural in ("processingtasks", "jobs"):
        for thing in await track.place.objects(plural):
            path = track.place.path(plural, thing["metadata"]["name"])
            await track.place.kube.ask("DELETE", path, propagationPolicy="Background")
    return statements


def keep(name: str, task: dict[str, Any], seen: dict[str, dict[str, Any]]) -> None:
    status = task["status"]
    ready = next(one for one in status["conditions"] if one["type"] == "Ready")
    stage = f"-{status['stage']}" if "stage" in status and status["phase"] == "Processing" else ""
    task["metadata"] = {key: value for key, value in task["metadata"].items() if key not in NOISE}
    seen.setdefault(f"{name}-{status['phase']}-{ready['reason']}{stage}".lower(), task)


async def others(track: Track, seen: dict[str, dict[str, Any]]) -> set[str]:
    """Keep a task that is suspended, and two of other kinds from beginning to end; return the statements that were sent."""
    gone = {"action": "delete_knowledge_base", "confirm": "kb-gone"}
    specs: dict[str, dict[str, Any]] = {
        "suspended": {"type": "document_processing", "kbId": "kb", "payload": {"filePath": "a.txt"}, "suspend": True},
        "health": {"type": "health_check", "priority": "high", "payload": {"components": ["postgres", "milvus"]}},
        "deletion": {"type": "document_processing", "kbId": "kb-gone", "payload": gone},
    }
    await track.seed("kb-gone", "document", uid=str(uuid.uuid4()))
    for name, spec in specs.items():
        body = {"apiVersion": "tasks.zzdsj.io/v1", "kind": "ProcessingTask", "metadata": {"name": name}, "spec": spec}
        await track.place.kube.do("POST", track.place.path("processingtasks"), body)

    async def done() -> bool:
        for name in specs:
            task = await track.place.task(name)
            assert task is not None
            keep(name, task, seen)
        return {"suspended-queued-suspended", "health-completed-completed", "deletion-completed-deleted"} <= seen.keys()

    await until("the health check and the deletion have ended", done, interval=0.02, seconds=60)
    assert track.node.life is not None
    return track.node.life.record("operator").statements | track.node.life.record("runner").statements


async def swept(world: World) -> set[str]:
    """Sweep a namespace that has everything to be swept; return the statements that were sent."""
    life = SweepLife(world)
    try:
        await life.prepare()
        assert await life.sweep() == ExitCode.SUCCEEDED
        return life.record.statements
    finally:
        await life.aclose()


async def rows(world: World) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every table, in the order in which the migrations make the tables."""
    sql = "".join(path.read_text() for path in sorted(MIGRATIONS.glob("*.sql")))
    found: dict[str, list[dict[str, Any]]] = {}
    for table in re.findall(r"CREATE TABLE (?:IF NOT EXISTS )?(\w+)", sql):
        records = await world.sql.fetch(f"SELECT row_to_json(one)::text AS row FROM {table} AS one")
        found[table] = [json.loads(record["row"]) for record in records]
    return found


async def freeze(release: Path) -> None:
    endpoints = up(["cluster", "stores"])
    Kubectl(endpoints)("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    seen: dict[str, dict[str, Any]] = {}
    statements: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        async with contextlib.AsyncExitStack() as stack:
            world = await stack.enter_async_context(
                World.fresh(endpoints.kubeconfig, endpoints.host_urls, folder=Path(folder))
            )
            track = await stack.enter_async_context(world.track())
            for scenario in SCENARIOS:
                print(f"  > {scenario.name}", file=sys.stderr, flush=True)
                statements |= await record(track, scenario, seen)
            print("  > other tasks, and a sweep", file=sys.stderr, flush=True)
            statements |= await others(track, seen) | await swept(world)
            written = await rows(world)
            published = "SELECT max(document_id) FROM documents WHERE namespace = $1 AND kb_id = $2 AND chunk_count > 0"
            document = await world.sql.fetchval(published, track.place.namespace, track.kb_id)
            stored = await taken(track.stores(track.kb_id), document)
            root = str(world.documents)
    write(release, _without(root, seen), _without(root, written), sorted(statements), stored)


def _without(root: str, value: Any) -> Any:
    """Return a value in which the documents lie where they lie in a pod."""
    return json.loads(json.dumps(value).replace(root, DOCUMENT_ROOT))


def write(
    release: Path,
    seen: dict[str, dict[str, Any]],
    written: dict[str, list[dict[str, Any]]],
    statements: list[str],
    stored: dict[str, Any],
) -> None:
    """Write the folder, whole."""
    empty = [table for table, found in written.items() if not found]
    assert not empty, f"cannot freeze {release.name}: no row in {', '.join(empty)}; add a life that writes one"
    release.mkdir(parents=True)
    for crd in sorted((ROOT / "crds").glob("*.yaml")):
        shutil.copy(crd, release)
    shutil.copytree(ROOT / "manifests/examples", release / "examples", ignore=shutil.ignore_patterns("kustomization*"))
    shutil.copytree(MIGRATIONS, release / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    (release / "stored").mkdir()
    for name, task in sorted(seen.items()):
        text = yaml.safe_dump(task, sort_keys=True, allow_unicode=True, width=120)
        (release / "stored" / f"{name}.yaml").write_text(text)
    (release / "rows.json").write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    (release / "statements.json").write_text(json.dumps(statements, indent=1) + "\n")
    (release / "stores.json").write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.crash.freeze", description="Freeze what a release leaves behind.")
    parser.add_argument("version", help="of the release: 0.2.0")
    version = parser.parse_args().version
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        sys.exit(f"cannot freeze {version!r}: give a version such as 0.2.0 (make freeze-release VERSION=0.2.0)")
    if (FOLDER / version).exists():
        sys.exit(
            f"cannot freeze {version}: {FOLDER / version} is there, and a release never changes; choose another version"
        )
    asyncio.run(freeze(FOLDER / version))
    print(f"frozen: {FOLDER / version}; commit it with the release")
