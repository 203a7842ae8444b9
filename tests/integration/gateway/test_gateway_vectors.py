"""The vectors of a task, created over REST and read from PostgreSQL as the runner keeps them."""

import uuid
from typing import Any

import numpy as np
import orjson
import pytest

from job_runner.ledger import KeptVectors, Ledger, VectorPart
from task_contract.vectors import INLINE
from tests.support.gateway_lab import GatewayProcess, document
from tests.support.operator_lab import Place

pytestmark = pytest.mark.integration

TASKS = "/api/v1/tasks"


async def created(gateway: GatewayProcess, **payload: Any) -> dict[str, Any]:
    body = {"task_type": "embedding_generation", "payload": payload}
    answer: dict[str, Any] = await gateway.do("POST", TASKS, body)
    return answer


async def ended(place: Place, name: str, phase: str = "Completed", **result: Any) -> None:
    await place.kube.do(
        "PATCH",
        place.path("processingtasks", name) + "/status",
        {"status": {"phase": phase, "result": result, "finishedAt": "2026-01-01T12:00:00Z"}},
        content_type="application/merge-patch+json",
    )


async def test_vectors_are_sent_part_by_part_in_the_order_of_the_texts(
    trusting: GatewayProcess, place: Place, url: str
) -> None:
    task = await created(trusting, texts=["a", "b", "c", "d", "e"])
    vectors = np.random.default_rng(1).normal(size=(5, 3)).astype("<f4")
    kept = KeptVectors(uuid.UUID(task["uid"]), 5, 3, "model", "model-1", "0" * 64, INLINE)
    parts = [
        VectorPart(0, [None, "b"], vectors[:2].tobytes()),
        VectorPart(2, ["c", None], vectors[2:4].tobytes()),
        VectorPart(4, [None], vectors[4:].tobytes()),
    ]
    ledger = Ledger(url)
    try:
        await ledger.keep_vectors(kept, parts, attempt=1)
    finally:
        await ledger.aclose()
    await ended(place, task["id"], vectors=5, dimension=3, output=INLINE)
    status, headers, data = await trusting.send("GET", f"{TASKS}/{task['id']}/vectors")
    assert (status, headers["Content-Type"]) == (200, "application/x-ndjson")
    lines = [orjson.loads(line) for line in data.splitlines()]
    assert [(line["row"], line.get("id")) for line in lines] == [(1, None), (2, "b"), (3, "c"), (4, None), (5, None)]
    assert np.array_equal(np.array([line["vector"] for line in lines], np.float32), vectors)


async def test_a_task_without_vectors_is_a_problem_that_says_why(trusting: GatewayProcess, place: Place) -> None:
    running, failed, written, lost = [
        (await created(trusting, texts=["a"], **payload))["id"] for payload in ({}, {}, {"output_path": "outputs/a.npy"}, {})
    ]
    other = (await trusting.do("POST", TASKS, document()))["id"]
    await ended(place, failed, "Failed")
    await ended(place, written, output="outputs/a.npy")
    await ended(place, lost, output=INLINE)
    for name, status, kind, says in (
        (running, 409, "not-finished", "queued"),
        (failed, 404, "no-vectors", "it is failed"),
        (written, 404, "no-vectors", "outputs/a.npy"),
        (lost, 404, "no-vectors", "deleted with its history"),
        (other, 404, "no-vectors", "document_processing"),
        ("nothing", 404, "task-not-found", "nothing"),
    ):
        found, problem = await trusting.ask("GET", f"{TASKS}/{name}/vectors")
        assert (found, problem["type"].rpartition("/")[2]) == (status, kind)
        assert says in problem["detail"]


@pytest.mark.parametrize(
    "body",
    [
        {"task_type": "vector_storage", "kb_id": "kb", "payload": {"from_task": "a", "metadata": {"k": "v"}}},
        {"task_type": "vector_storage", "kb_id": "kb", "payload": {"input_path": "rows.jsonl", "document_id": "d"}},
        {"task_type": "embedding_generation", "payload": {"input_path": "texts.jsonl", "output_path": "outputs/a.npy"}},
    ],
)
async def test_the_types_of_vectors_are_created_over_rest(trusting: GatewayProcess, body: dict[str, Any]) -> None:
    assert (await trusting.do("POST", TASKS, body))["status"] == "queued"
