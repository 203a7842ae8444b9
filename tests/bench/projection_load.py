"""Lives of tasks as the API server tells them: whole manifests, a mix of what tasks go through, at a given rate."""

import random
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from task_contract.lifecycle import conditions
from task_contract.models import Phase
from task_contract.names import job_name

NOON: Final = datetime(2026, 1, 1, 12, tzinfo=UTC)
_STAGES: Final = (("fetch", 2), ("parse", 10), ("split", 15), ("embed", 40), ("embed", 70), ("store", 90), ("publish", 99))
_FAILS: Final = 0.10
_GIVEN_BACK: Final = 0.03
"""Parts of the attempts."""


def lives(seed: int, *, at_once: int) -> Iterator[dict[str, Any]]:
    """Go for ever over the versions of tasks, ``at_once`` of which are under way at any time, in random order.

    A task that completes at once has four versions and a deletion (``deletionTimestamp`` is set in it); each stage that it
    tells of is one more, each failed attempt about six. Every version is a manifest of its own, as one from the network is.
    """
    chance = random.Random(seed)
    going = [_life(chance) for _ in range(at_once)]
    version = 0
    while True:
        place = chance.randrange(at_once)
        manifest = next(going[place], None)
        if manifest is None:
            going[place] = _life(chance)
            continue
        version += 1
        manifest["metadata"]["resourceVersion"] = str(version)
        yield manifest


def _life(chance: random.Random) -> Iterator[dict[str, Any]]:
    uid, created = str(uuid.UUID(int=chance.getrandbits(128), version=4)), NOON + timedelta(seconds=chance.randrange(86_400))
    name, kb_id = f"document-{uid[:8]}", f"kb-{chance.randrange(100)}"
    now, attempt, attempts = created, 1, list[dict[str, Any]]()
    common: dict[str, Any] = {"queuedAt": _stamp(created)}

    def told(phase: Phase, reason: str, message: str, **status: Any) -> dict[str, Any]:
        ready = conditions(phase, reason=reason, message=message, generation=1, now=now)
        whole = {
            "phase": str(phase),
            "attempt": attempt,
            "observedGeneration": 1,
            "conditions": [one.model_dump(mode="json", by_alias=True, exclude_none=True) for one in ready],
            "attempts": [dict(one) for one in attempts],
            **common,
            **status,
        }
        return _manifest(uid, name, kb_id, created, whole)

    yield _manifest(uid, name, kb_id, created, {"phase": "Queued", "attempt": 0, "conditions": []})
    while True:
        now += timedelta(seconds=2)
        job = job_name(task_name=name, task_uid=uid, attempt=attempt)
        common = {"startedAt": _stamp(now), **common, "job": job, "executor": "job"}
        attempts = [
            *(one for one in attempts if one["number"] != attempt),
            {"number": attempt, "job": job, "startedAt": _stamp(now)},
        ]
        yield told(Phase.PROCESSING, "Processing", f"attempt {attempt} runs as Job {job}", progress=0)
        for stage, progress in _STAGES[:: chance.choice((2, 3))]:
            now += timedelta(seconds=1)
            yield told(
                Phase.PROCESSING, "Processing", f"attempt {attempt} runs as Job {job}", stage=stage, progress=progress
            )
        now += timedelta(seconds=1)
        fate = chance.random()
        if fate < _GIVEN_BACK:
            attempts.pop()
            common = {**common, "queuedAt": _stamp(now)}
            queue = {"reason": "StoreUnavailable", "message": "cannot reach Milvus", "since": _stamp(now)}
            yield told(Phase.QUEUED, "StoreUnavailable", "cannot reach Milvus", queue=queue)
        elif fate < _GIVEN_BACK + _FAILS and attempt < 4:
            attempts[-1] = {**attempts[-1], "finishedAt": _stamp(now), "reason": "ParserCrashed"}
            error = {"reason": "ParserCrashed", "message": "cannot parse page 7: the parser crashed", "retryable": True}
            yield told(Phase.RETRYING, "ParserCrashed", f"attempt {attempt} failed, the next follows", error=error)
            attempt += 1
        else:
            break
    attempts[-1] = {**attempts[-1], "finishedAt": _stamp(now), "reason": "Succeeded"}
    result = {
        "documents": 1,
        "pages": 12,
        "chunks": 87,
        "embedded": 12,
        "reused": 75,
        "milvusCount": 87,
        "elasticsearchCount": 87,
    }
    last = told(Phase.COMPLETED, "Completed", "", progress=100, result=result, finishedAt=_stamp(now))
    yield last
    yield {**last, "metadata": {**last["metadata"], "deletionTimestamp": _stamp(now)}}


def _manifest(uid: str, name: str, kb_id: str, created: datetime, status: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "tasks.zzdsj.io/v1",
        "kind": "ProcessingTask",
        "metadata": {
            "name": name,
            "namespace": "knowledge",
            "uid": uid,
            "generation": 1,
            "creationTimestamp": _stamp(created),
            "labels": {"team": "search"},
        },
        "spec": {
            "type": "document_processing",
            "kbId": kb_id,
            "priority": "normal",
            "payload": {"filePath": f"/data/handbooks/{name}.pdf", "chunkSize": 1000, "chunkOverlap": 200},
            "retry": {"limit": 3, "initialDelay": "10s", "factor": 2, "maxDelay": "10m", "jitter": 0.2},
            "timeout": "10m",
            "ttlSecondsAfterFinished": 86_400,
        },
        "status": status,
    }


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
