"""What stands around the pipeline: progress, health checks, search between two versions."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio

from job_runner import health
from job_runner.index import Filters, Hit
from job_runner.ledger import Ledger
from job_runner.progress import RedisProgress
from job_runner.search import search
from job_runner.stores import Stores
from task_contract.errors import DocumentNotFound, ModelMismatch, StoreUnavailable
from task_contract.lifecycle import ExitCode
from task_contract.messages import Outcome
from task_contract.models import Component, ComponentHealth, ProcessingTask, Stage
from task_contract.names import PROGRESS_CHANNEL
from tests.support.memory_stores import MemoryTextIndex, MemoryVectorIndex
from tests.support.runner_lab import NAMESPACE, HashEmbedder, Lab

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

NOWHERE = "http://127.0.0.1:9"


# ------------------------------------------------------------------------------------------------------------ progress


@pytest.fixture
async def messages(store_urls: dict[str, str]) -> AsyncIterator[asyncio.Queue[dict[str, Any]]]:
    """What is published on the channel."""
    queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    client = redis.asyncio.from_url(store_urls["TASKS_REDIS_URL"])
    channel = client.pubsub()
    await channel.subscribe(PROGRESS_CHANNEL)
    assert await channel.get_message(timeout=5) is not None  # the confirmation

    async def listen() -> None:
        async for message in channel.listen():
            await queue.put(json.loads(message["data"]))

    listener = asyncio.create_task(listen())
    yield queue
    listener.cancel()
    await asyncio.gather(listener, return_exceptions=True)
    await channel.aclose()  # type: ignore[no-untyped-call]  # redis has no types for it
    await client.aclose()


async def test_progress_is_published_and_the_last_report_always(
    store_urls: dict[str, str], messages: "asyncio.Queue[dict[str, Any]]", lab: Lab
) -> None:
    uid = str(uuid.uuid4())
    started = time.monotonic()
    async with RedisProgress(store_urls["TASKS_REDIS_URL"], task=lab.task(), uid=uid, attempt=2) as progress:
        for percent in range(100):
            progress.report(Stage.EMBED, percent)
            await asyncio.sleep(0.01)
        progress.report(Stage.PUBLISH, 100)
    took = time.monotonic() - started
    seen: list[dict[str, Any]] = []
    while not seen or seen[-1]["progress"] < 100:
        message = await asyncio.wait_for(messages.get(), timeout=5)
        if message["uid"] == uid:  # other tasks of this machine publish on the same channel
            seen.append(message)
    assert 3 <= len(seen) <= took * 4 + 2
    assert [message["progress"] for message in seen] == sorted(message["progress"] for message in seen)
    assert (seen[-1]["stage"], seen[-1]["attempt"], seen[-1]["namespace"]) == ("publish", 2, NAMESPACE)


@pytest.mark.parametrize("url", ["redis://127.0.0.1:9", "nonsense://", "redis://10.255.255.1:6379"])
async def test_a_redis_that_is_not_there_harms_nothing(lab: Lab, url: str) -> None:
    lab.write(["one", "two"])
    outcome, code = await lab.run(lab.task(), redis_url=url)
    assert (code, outcome.reason) == (ExitCode.SUCCEEDED, "Completed")


# -------------------------------------------------------------------------------------------------------------- health


def health_task(components: list[str] | None = None) -> ProcessingTask:
    payload = {} if components is None else {"components": components}
    return ProcessingTask.model_validate(
        {"metadata": {"name": "h", "uid": str(uuid.uuid4())}, "spec": {"type": "health_check", "payload": payload}}
    )


async def test_a_healthy_platform(lab: Lab) -> None:
    outcome, code = await lab.run(health_task())
    assert (outcome.outcome, code) == (Outcome.SUCCEEDED, ExitCode.SUCCEEDED), outcome
    assert outcome.result is not None
    assert [component.name for component in outcome.result.components or ()] == list(Component)
    assert all(component.healthy for component in outcome.result.components or ())


async def test_a_component_that_is_down_fails_the_task_and_the_others_are_told(lab: Lab) -> None:
    outcome, code = await lab.run(health_task(["milvus", "postgres", "documents"]), milvus_url=NOWHERE)
    assert (outcome.outcome, outcome.reason, code) == (Outcome.FAILED, "Unhealthy", ExitCode.RETRYABLE)
    assert outcome.error is not None
    assert outcome.error.message.startswith("cannot call the platform healthy: milvus: cannot connect: Milvus: ")
    assert outcome.result is not None
    found = {component.name: component.healthy for component in outcome.result.components or ()}
    assert found == {Component.MILVUS: False, Component.POSTGRES: True, Component.DOCUMENTS: True}


async def test_a_component_that_is_asked_for_and_not_configured_is_unhealthy(lab: Lab) -> None:
    outcome, _ = await lab.run(health_task(["elasticsearch"]), elasticsearch_url=None)
    assert outcome.error is not None
    assert "not configured: set TASKS_ELASTICSEARCH_URL" in outcome.error.message


async def test_each_component_has_its_own_deadline() -> None:
    async def never() -> str:
        await asyncio.Event().wait()
        return ""

    async def well() -> str:
        return "fine"

    async def broken() -> str:
        raise StoreUnavailable("cannot answer: no")

    async def strange() -> str:
        raise RuntimeError("boom")

    asked = {
        Component.REDIS: never,
        Component.MODEL: well,
        Component.MILVUS: broken,
        Component.DOCUMENTS: strange,
    }
    result = await health.check(asked, deadline=0.05)

    def told(component: ComponentHealth) -> tuple[Component, bool, str]:
        return component.name, component.healthy, component.message

    assert [told(component) for component in result.components or ()] == [
        (Component.REDIS, False, "no answer within 0.05 s"),
        (Component.MODEL, True, "fine"),
        (Component.MILVUS, False, "cannot answer: no"),
        (Component.DOCUMENTS, False, "RuntimeError: boom"),
    ]


# -------------------------------------------------------------------------------------------------------------- search


class Crowded(MemoryTextIndex):
    """A store in which rows that are not published stand before those that are."""

    def __init__(self, hits: list[Hit]) -> None:
        super().__init__()
        self.hits = hits

    async def search(self, query: str, *, limit: int, offset: int = 0, filters: Filters | None = None) -> list[Hit]:
        return self.hits[offset : offset + limit]


def hit(document_id: str, version: int, ordinal: int) -> Hit:
    return Hit(
        score=1,
        id=f"{document_id}-{version}-{ordinal}",
        document_id=document_id,
        version=version,
        ordinal=ordinal,
        text="",
        page_start=0,
        page_end=0,
        heading_path="",
    )


async def test_only_what_is_published_is_found_however_much_stands_before_it(lab: Lab) -> None:
    lab.write(["one", "two"])
    await lab.run(lab.task())
    document = lab.document_id("a.txt")
    hits = [hit(document, 2, number) for number in range(17)] + [hit(document, 1, 0), hit("gone", 1, 0), hit(document, 1, 1)]
    ledger = Ledger(lab.settings().postgres_url.get_secret_value())

    async def found(kb_id: str, embedder: HashEmbedder) -> list[str]:
        answers = await search(
            "one",
            namespace=NAMESPACE,
            kb_id=kb_id,
            top_k=2,
            ledger=ledger,
            embedder=embedder,
            open_stores=lambda generation: Stores(vectors=MemoryVectorIndex(), texts=Crowded(hits)),
        )
        assert answers.milvus == []
        return [hit.id for hit in answers.elasticsearch]

    assert await found(lab.kb_id, HashEmbedder()) == [f"{document}-1-0", f"{document}-1-1"]
    other = HashEmbedder()
    other.fingerprint = "hash-2"
    with pytest.raises(ModelMismatch, match="filled with model hash-1"):
        await found(lab.kb_id, other)
    with pytest.raises(DocumentNotFound, match="no such knowledge base"):
        await found("nothing", HashEmbedder())
    await ledger.aclose()
