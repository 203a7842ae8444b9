"""A knowledge base as a whole through the whole installation: rebuilt, rolled back, repaired, purged."""

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest

from devstack import installation
from job_runner.index import Generation
from job_runner.settings import Settings
from job_runner.stores import Stores, opener
from task_contract.models import Phase, Result
from tests.e2e.conftest import Installed
from tests.e2e.test_installation import document, search, unique, verified

pytestmark = pytest.mark.e2e

MINUTES = timedelta(minutes=5)
QUERY = "How often does the tide station send its readings?"


def ended(installed: Installed, spec: Mapping[str, object]) -> Result:
    name = unique("indexing")
    installed.client.submit(spec, name=name)
    task = installed.client.wait(name, timeout=MINUTES)
    assert task.status.phase is Phase.COMPLETED, task.status.error
    assert task.status.result is not None
    return task.status.result


async def aliased(installed: Installed, kb_id: str, number: int) -> tuple[bool, bool]:
    stores = opened(installed, kb_id, number)
    try:
        return await stores.vectors.serves(), await stores.texts.serves()
    finally:
        await stores.aclose()


def opened(installed: Installed, kb_id: str, number: int) -> Stores:
    settings = Settings.model_validate(
        {name.removeprefix("TASKS_").lower(): value for name, value in installed.endpoints.host_urls.items()}
    )
    return opener(settings, dimension=512)(Generation(installation.TASK_NAMESPACE, kb_id, number))


async def lose_texts(installed: Installed, kb_id: str, number: int, document_id: str) -> int:
    """Remove rows of a document from Elasticsearch; return how many."""
    stores = opened(installed, kb_id, number)
    try:
        ids = sorted(await stores.texts.stored(document_id, 1))[:2]
        await stores.texts.delete(ids)
        return len(ids)
    finally:
        await stores.aclose()


def test_a_knowledge_base_is_rebuilt_rolled_back_repaired_and_purged(installed: Installed) -> None:
    kb_id = unique("kb")

    def indexing(**payload: Any) -> dict[str, Any]:
        return {"type": "knowledge_indexing", "kbId": kb_id, "payload": payload}

    before = ended(installed, document("tide-station.html", kb_id=kb_id))
    rebuilt = ended(installed, indexing(rebuildIndex=True, chunkSize=400, maxRecallDrop=20))
    assert rebuilt.generation == 2
    assert rebuilt.chunks is not None
    assert before.chunks is not None
    assert rebuilt.chunks > before.chunks
    assert search(installed, kb_id=kb_id, query=QUERY).keys() >= {"milvus", "elasticsearch"}
    assert asyncio.run(aliased(installed, kb_id, 2)) == (True, True)

    lost = asyncio.run(lose_texts(installed, kb_id, 2, "tide-station.html"))
    name = unique("repair")
    installed.client.submit(indexing(action="repair"), name=name)
    repaired = installed.client.wait(name, timeout=MINUTES)
    assert repaired.status.result is not None
    assert (repaired.status.result.repaired, verified(repaired)) == (lost, rebuilt.chunks)

    back = ended(installed, indexing(action="rollback"))
    assert (back.generation, back.chunks, back.embedded) == (1, before.chunks, 0)
    assert asyncio.run(aliased(installed, kb_id, 1)) == (True, True)

    assert ended(installed, indexing(action="purge", confirm=kb_id)).documents == 1
    assert search(installed, kb_id=kb_id, query=QUERY) == {}
