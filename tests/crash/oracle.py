"""The judge: what a life has left behind everywhere, and how that differs from what a life without faults leaves.

As in Sieve (OSDI 2022), nobody writes down what the end should be: a life without faults says it, whole, and every other
life must end in the same. Fields are compared because they are there, not because they are listed, so a new one is compared
too.
Left out is only what no two lives share (names, uids, times, seconds), and what a killed runner may cost:

- attempts: each killed runner may spend one, which ends as ContainerFailed; a killed operator may spend none;
- the epoch of the intent: each attempt raises it, but for one that is killed before it has;
- how many of the chunks were embedded and how many reused: their sum is compared, and what was computed in all is bounded;
- writes of the operator: one that was killed may write two again, and a retry costs four;
- with a lost node, its pod, which is there or not, as the garbage collector met it; how many texts its runner has spared the
  next one; and the epoch, which a killed operator may raise twice;
- the Job's and the pod's own end: a runner that is killed after it has stored its result has succeeded, whatever they say.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from job_runner.embed import BATCH_TEXTS
from task_contract.names import chunk_id, digest
from tests.crash.life import Life, of_task
from tests.support.runner_lab import rows_of

KILLED = "ContainerFailed"
"""Reason of an attempt whose runner was killed before it could say anything."""
AGAIN, RETRY = 2, 4
"""Writes to the API server that the kill of an operator, and that of a runner, may cost."""
_TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|\+00:00)?")
_KINDS = {
    "/api/v1": ("configmaps", "secrets", "services", "persistentvolumeclaims"),
    "/apis/batch/v1": ("cronjobs",),
    "/apis/coordination.k8s.io/v1": ("leases",),
}


@dataclass(frozen=True)
class End:
    """What a life has left behind."""

    state: dict[str, Any]
    """Compared as it is."""
    attempts: tuple[str | None, ...]
    """Reasons of the attempts, in order."""
    attempt: int
    epoch: int
    computed: int
    """Texts that the model has computed in all."""
    ends: tuple[str, ...]
    """How Jobs and pods ended."""
    writes: int
    """What the operator has written to the API server, Events apart; 0 where it served other lives too."""
    settled: bool
    """Whether the projection has caught up and no process works on it any more."""


async def look(life: Life) -> End:
    """Gather what a life has left: the task, its Jobs and pods, its rows in PostgreSQL and in both stores."""
    track, place = life.track, life.track.place
    busy = track.node.busy
    task = await place.task(life.name)
    assert task is not None, f"the task {life.name} is gone"
    jobs = of_task(await place.objects("jobs"), life.uid)
    pods = of_task(await place.objects("pods"), life.uid)
    projected = await _rows(life, "SELECT * FROM tasks WHERE uid = $1", life.uid)
    results = await _rows(life, "SELECT * FROM task_results WHERE task_uid = $1 ORDER BY attempt", life.uid)
    where = (place.namespace, life.kb_id)
    versions = await _rows(
        life,
        "SELECT * FROM document_versions WHERE namespace = $1 AND kb_id = $2 AND document_id = $3 ORDER BY version",
        *where,
        life.document_id,
    )
    last = task["status"]["attempt"]
    [epoch] = [version["epoch"] for version in versions if str(version["task_uid"]) == life.uid] or [0]
    in_vectors, in_texts = await rows_of(track.stores(life.kb_id), life.document_id)
    state = {
        "status": _status(task["status"]),
        "metadata": {name: task["metadata"].get(name) for name in ("finalizers", "annotations", "labels", "generation")},
        "tasks": [_projection(row, task) for row in projected],
        "history": await _history(life, task["status"]),
        "task_results": [_outcome(row["outcome"]) for row in results if row["attempt"] == last],
        "earlier successes": [row["attempt"] for row in results if row["attempt"] < last and _succeeded(row)],
        "task_fences": await _rows(life, "SELECT * FROM task_fences WHERE task_uid = $1", life.uid),
        "knowledge_bases": await _rows(life, "SELECT * FROM knowledge_bases WHERE namespace = $1 AND kb_id = $2", *where),
        "documents": await _rows(
            life,
            "SELECT * FROM documents WHERE namespace = $1 AND kb_id = $2 AND document_id = $3",
            *where,
            life.document_id,
        ),
        "document_versions": [{key: value for key, value in row.items() if key != "epoch"} for row in versions],
        "Milvus": _stored(life, in_vectors),
        "Elasticsearch": _stored(life, in_texts),
        "Jobs": [_is_of(job, last) for job in jobs],
        "pods": [_is_of(pod, last) for pod in pods],
        "other objects": await _others(life),
        "runners that go on": busy,
    }
    names = {
        life.uid: "UID",
        life.seed: "SEED",
        life.document_id: "DOCUMENT",
        life.name: "TASK",
        digest(life.uid, length=8): "HASH",
        place.namespace: "NAMESPACE",
        life.kb_id: "KB",
    } | dict.fromkeys(life.pods, "POD")
    return End(
        state=without(state, names),
        attempts=tuple(one.get("reason") for one in task["status"].get("attempts", [])),
        attempt=last,
        epoch=epoch,
        computed=len(life.counter.read_text().splitlines()) if life.counter.exists() else 0,
        ends=tuple(sorted([*map(_job_end, jobs), *(pod["status"]["phase"] for pod in pods)])),
        writes=_writes(life),
        settled=bool(projected)
        and str(projected[0]["resource_version"]) == task["metadata"]["resourceVersion"]
        and not busy
        and all((job.get("status") or {}).get("conditions") for job in jobs),
    )


def differences(undisturbed: End, end: End, life: Life) -> list[str]:
    """Return in what a life ended otherwise than one without faults; nothing is as it should be."""
    found = list(life.broken)
    lost = life.scenario.loses_node
    for part, expected in undisturbed.state.items():
        if end.state[part] != expected and not (lost and part == "pods"):
            found += paths(part, expected, end.state[part])
    spent = list(end.attempts)
    for reason in undisturbed.attempts:
        if reason not in spent:
            found.append(f"no attempt ended as {reason}: {end.attempts}")
        else:
            spent.remove(reason)
    if len(spent) > life.runner_kills or set(spent) - {KILLED}:
        found.append(f"attempts: {end.attempts} instead of {undisturbed.attempts}, with {life.runner_kills} runners killed")
    if end.attempt != undisturbed.attempt + len(spent):
        found.append(f"attempt: {end.attempt} with {len(spent)} more spent, instead of {undisturbed.attempt}")
    more = life.runner_kills + (len(life.kills) if lost else 0)  # intents may be taken twice
    if not max(1, undisturbed.epoch - life.runner_kills) <= end.epoch <= undisturbed.epoch + more:
        found.append(f"epoch: {end.epoch} instead of {undisturbed.epoch}")
    least = 0 if lost else undisturbed.computed
    if not least <= end.computed <= undisturbed.computed + 2 * BATCH_TEXTS * life.runner_kills:
        found.append(f"texts computed: {end.computed} instead of {undisturbed.computed}")
    if end.ends != undisturbed.ends and not life.runner_kills and not lost:
        found.append(f"Jobs and pods ended as {end.ends} instead of {undisturbed.ends}")
    allowed = undisturbed.writes + AGAIN * (len(life.kills) - life.runner_kills) + RETRY * life.runner_kills
    if end.writes > allowed:
        found.append(f"the operator wrote {end.writes} times, instead of {undisturbed.writes} and at most {allowed}")
    if not end.settled:
        found.append("not settled: the projection is behind, or a process or Job goes on")
    return found


# --------------------------------------------------------------------------------------------------------------- parts


async def _rows(life: Life, query: str, *arguments: object) -> list[dict[str, Any]]:
    return [dict(row) for row in await life.track.world.sql.fetch(query, *arguments)]


def _status(status: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in status.items() if key not in {"attempt", "attempts", "job"}}
    kept["job is the last"] = status.get("job", "").endswith(f"-{status['attempt']}")
    if "result" in kept:
        kept["result"] = _result(kept["result"])
    return kept


def _projection(row: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of tasks, with the columns that copy the status as whether they do."""
    kept = {key: value for key, value in row.items() if key not in {"updated_at", "resource_version", "generation"}}
    status = task["status"]
    for name, of in (("result", "result"), ("error", "error"), ("queue", "queue"), ("attempts", "attempts")):
        kept[name] = (None if row[name] is None else orjson.loads(row[name])) == status.get(of)
    kept["spec"] = orjson.loads(row["spec"]) == task["spec"]
    kept["attempt"] = row["attempt"] == status["attempt"]
    kept["job"] = row["job"] == status.get("job")
    kept["told_version"] = row["told_version"] == row["resource_version"]
    return kept


async def _history(life: Life, status: Mapping[str, Any]) -> dict[str, Any]:
    """Return what PostgreSQL tells of a task's life: its events without those of killed runners and of waits, its attempts.

    Why a pod has not started yet is told when a machine is slow, and Processing once more after it.
    """
    query = "SELECT phase, attempt, reason FROM task_events WHERE task_uid = $1 ORDER BY number"
    events = await _rows(life, query, life.uid)
    killed = {event["attempt"] for event in events if (event["phase"], event["reason"]) == ("Retrying", KILLED)}
    runs = [
        (event["phase"], event["reason"])
        for event in events
        if event["phase"] != "Queued" and event["attempt"] not in killed
    ]
    failed = [event["attempt"] for event in events if event["phase"] == "Retrying"]
    listed = [(one["number"], one["job"], one.get("reason")) for one in status.get("attempts", ())]
    attempts = await _rows(life, "SELECT number, job, reason FROM attempts WHERE task_uid = $1 ORDER BY number", life.uid)
    return {
        "begins": [event["phase"] for event in events[:1]],
        "goes on": [one for place, one in enumerate(runs) if one not in runs[max(0, place - 1) : place]],
        "each attempt fails once": failed == sorted(set(failed)),
        "attempts are those of the status": listed == [tuple(one.values()) for one in attempts],
    }


def _result(result: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in result.items() if key not in {"seconds", "embedded", "reused"}}
    return kept | {"embedded + reused": result.get("embedded", 0) + result.get("reused", 0)}


def _writes(life: Life) -> int:
    points = life.record("operator").points
    return sum(point.startswith("API ") and point.endswith(" before") and " events " not in point for point in points)


def _outcome(text: str) -> dict[str, Any]:
    outcome = orjson.loads(text)
    kept = {key: value for key, value in outcome.items() if key != "attempt"}
    return kept | ({"result": _result(outcome["result"])} if "result" in outcome else {})


def _succeeded(row: Mapping[str, Any]) -> bool:
    return bool(orjson.loads(row["outcome"])["outcome"] == "Succeeded")


def _stored(life: Life, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the rows of a document by version and ordinal; an id that is not theirs is told."""
    found: dict[str, Any] = {}
    for row in rows:
        expected = chunk_id(
            namespace=life.track.place.namespace,
            kb_id=life.kb_id,
            document_id=life.document_id,
            version=row["version"],
            ordinal=row["ordinal"],
        )
        key = f"{row['version']}/{row['ordinal']}"
        if row["id"] != expected or key in found:
            found[f"stray {row['id']}"] = key
        embedding = [round(float(number), 4) for number in row.get("embedding", ())]
        found[key] = {name: value for name, value in row.items() if name != "id"} | {"embedding": embedding}
    return found


def _job_end(job: Mapping[str, Any]) -> str:
    ended = [one["type"] for one in job["status"].get("conditions") or () if one["status"] == "True"]
    return next((kind for kind in ("Complete", "Failed") if kind in ended), "goes on")


def _is_of(thing: Mapping[str, Any], attempt: int) -> bool:
    return bool(thing["metadata"]["labels"]["tasks.zzdsj.io/attempt"] == str(attempt))


async def _others(life: Life) -> list[str]:
    place = life.track.place
    found = []
    for group, plurals in _KINDS.items():
        for plural in plurals:
            listed = await place.kube.do("GET", f"{group}/namespaces/{place.namespace}/{plural}")
            found += [f"{plural} {one['metadata']['name']}" for one in listed["items"]]
    return sorted(found)


def without(value: Any, names: Mapping[str, str]) -> Any:
    """Return a value with names, uids and times replaced by what they are."""
    if isinstance(value, Mapping):
        return {str(key): without(one, names) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without(one, names) for one in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = _TIME.sub("TIME", str(value))
    for name, meaning in names.items():
        text = text.replace(name, meaning)
    return text


def paths(path: str, expected: Any, found: Any) -> list[str]:
    """Return where two values differ, the deepest places that differ."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        return [
            line
            for key in sorted(expected.keys() | found.keys())
            if expected.get(key) != found.get(key)
            for line in paths(f"{path}.{key}", expected.get(key), found.get(key))
        ]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [line for index, (a, b) in pairs if a != b for line in paths(f"{path}[{index}]", a, b)]
    return [f"{path}: {str(found)[:200]} instead of {str(expected)[:200]}"]
