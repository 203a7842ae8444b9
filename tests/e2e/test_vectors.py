"""Vectors through the whole installation: computed inline and into a file, fetched, and stored as a document."""

import json
import stat
from collections.abc import Mapping
from datetime import timedelta

import numpy as np
import pytest

from task_contract.models import Phase, ProcessingTask
from tests.e2e.conftest import Installed
from tests.e2e.test_gateway import call
from tests.e2e.test_installation import unique, verified

pytestmark = pytest.mark.e2e

TEXTS = ["The tide station sends its readings every ten minutes.", "实验室的钥匙在值班室领取。", "Visitors sign the book."]
MINUTES = timedelta(minutes=3)


def ended(installed: Installed, spec: Mapping[str, object], *, name: str) -> ProcessingTask:
    installed.client.submit(spec, name=name)
    task = installed.client.wait(name, timeout=MINUTES)
    assert task.status.phase is Phase.COMPLETED, task.status.error
    assert task.status.result is not None
    return task


def test_vectors_are_kept_fetched_and_stored_with_their_texts(installed: Installed, service: str) -> None:
    name = unique("embed")
    embedded = ended(installed, {"type": "embedding_generation", "payload": {"texts": TEXTS}}, name=name)
    assert embedded.status.result is not None
    assert (embedded.status.result.vectors, embedded.status.result.output) == (3, "postgres")
    status, text = call(installed, "GET", f"/api/v1/tasks/{name}/vectors", token=service)
    assert status == 200, text
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["row"] for row in rows] == [1, 2, 3]
    assert {len(row["vector"]) for row in rows} == {embedded.status.result.dimension}

    storage = {"type": "vector_storage", "kbId": unique("kb"), "payload": {"fromTask": name, "documentId": "topics"}}
    stored = ended(installed, storage, name=unique("store"))
    assert verified(stored)
    assert stored.status.result is not None
    assert (stored.status.result.chunks, stored.status.result.rejected) == (3, 0)


def test_a_task_writes_its_file_to_the_folder_of_outputs(installed: Installed) -> None:
    name = unique("vectors")
    payload: dict[str, object] = {"texts": TEXTS, "outputPath": f"/data/outputs/{name}/v.npy"}
    task = ended(installed, {"type": "embedding_generation", "payload": payload}, name=name)
    assert task.status.result is not None
    assert task.status.result.output == payload["outputPath"]
    file = installed.documents / "outputs" / name / "v.npy"
    vectors = np.load(file)
    assert vectors.shape == (3, task.status.result.dimension)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert stat.filemode(file.stat().st_mode) == "-rw-r--r--"
    assert [one.name for one in file.parent.iterdir()] == ["v.npy"]
