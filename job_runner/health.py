"""``health_check``: does each component answer, within a deadline of its own?"""

import asyncio
import contextlib
import importlib
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import Context
from typing import Any, Final

from job_runner.embed import Embedder
from job_runner.ledger import Ledger
from job_runner.settings import Settings, revealed
from job_runner.watchdog import beat
from task_contract.errors import TaskError, Unhealthy
from task_contract.models import Component, ComponentHealth, Result
from task_contract.redis_address import open_redis

DEADLINE: Final = 8.0
"""Seconds for one component; all are asked at once. A resolver asks again after 5 s (resolv.conf(5)): one packet of DNS that
is lost, as may happen in the first moment of a pod, is no outage of all stores."""
SHARED_SECONDS: Final = 1.0
"""So long an answer holds for other tasks of the same worker."""
_MESSAGE_LIMIT: Final = 250
"""Characters: six messages fit a termination message."""

Check = Callable[[], Awaitable[str]]
"""Returns what is there; raises if it does not work."""


def _load(component: Component) -> None:
    """Import the client of a component."""
    match component:
        case Component.REDIS:
            importlib.import_module("redis.asyncio")
        case Component.MILVUS | Component.ELASTICSEARCH:
            importlib.import_module(f"job_runner.{component}").load()


async def warm_up(components: Iterable[Component], *, embedder: Embedder) -> None:
    """Import the clients and load the model. On a busy node that takes seconds that say nothing about a component."""
    for component in components:
        await asyncio.to_thread(_load, component)
        if component is Component.MODEL:
            # A model that does not load is reported by its check.
            with contextlib.suppress(Exception):
                await asyncio.to_thread(embedder.warm_up)
        beat()


async def check(components: Mapping[Component, Check], *, deadline: float = DEADLINE) -> Result:
    """Ask all components at once; the answer of each stands in the result, in order."""
    found = await asyncio.gather(*(_ask(name, ask, deadline=deadline) for name, ask in components.items()))
    return Result(components=list(found))


class SharedChecks:
    """Checks for several tasks of one process: who asks within a second of another is told what that one was told.

    So a health check among many of a worker costs it next to nothing, and its components no more than one question a second.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked: dict[Component, tuple[float, asyncio.Task[ComponentHealth]]] = {}
        self._warm: set[Component] = set()

    async def check(self, components: Mapping[Component, Check], *, embedder: Embedder) -> Result:
        """Ask those components that nobody has asked within the last second, all at once."""
        if cold := components.keys() - self._warm:
            await warm_up(cold, embedder=embedder)
            self._warm |= cold
        now = self._clock()
        for name, ask in components.items():
            if name not in self._asked or now - self._asked[name][0] >= SHARED_SECONDS:
                # In no attempt's context: the answer is for all of them.
                question = asyncio.create_task(_ask(name, ask, deadline=DEADLINE), context=Context())
                self._asked[name] = now, question
        asked = [self._asked[name][1] for name in components]
        if not all(question.done() for question in asked):
            await asyncio.wait(asked)  # whoever is canceled meanwhile leaves the others their answer
        return Result(components=[question.result() for question in asked])


async def _ask(name: Component, ask: Check, *, deadline: float) -> ComponentHealth:
    started = time.monotonic()
    try:
        async with asyncio.timeout(deadline):
            message, healthy = await ask(), True
    except TimeoutError:
        message, healthy = f"no answer within {deadline:g} s", False
    except TaskError as error:
        message, healthy = error.message, False
    except Exception as error:  # noqa: BLE001 - whatever a component does, the others are reported
        message, healthy = f"{type(error).__name__}: {error}", False
    return ComponentHealth(
        name=name,
        healthy=healthy,
        milliseconds=round(1000 * (time.monotonic() - started)),
        message=message[:_MESSAGE_LIMIT],
    )


def unhealthy(result: Result) -> Unhealthy | None:
    """Return the error of a health check that found something; ``None`` if all is well."""
    bad = [component for component in result.components or () if not component.healthy]
    if not bad:
        return None
    described = "; ".join(f"{component.name}: {component.message}" for component in bad)
    return Unhealthy(f"cannot call the platform healthy: {described}")


async def redis_version(url: str) -> str:
    """Return the version of Redis, which answers then; of a cluster that of one node."""
    import redis.asyncio

    client = open_redis(redis.asyncio, url, socket_timeout=DEADLINE)
    try:
        answer: dict[str, Any] = await client.info("server")
        one = answer if "redis_version" in answer else next(iter(answer.values()))
        return str(one["redis_version"])
    finally:
        await client.aclose()


def checks(
    wanted: Sequence[Component] | None, *, settings: Settings, ledger: Ledger, embedder: Embedder
) -> dict[Component, Check]:
    """Return the checks of the components that a task names, or of all that are configured."""

    async def redis() -> str:
        return f"Redis {await redis_version(revealed(settings.redis_url) or '')}"

    async def milvus() -> str:
        from job_runner import milvus as store

        return await asyncio.to_thread(store.check, revealed(settings.milvus_url) or "", revealed(settings.milvus_token))

    async def elasticsearch() -> str:
        from job_runner import elasticsearch as store

        url, key = revealed(settings.elasticsearch_url) or "", revealed(settings.elasticsearch_api_key)
        return await store.check(url, key, settings.elasticsearch_ca)

    async def model() -> str:
        vectors = await asyncio.to_thread(embedder.embed, ["health"])
        return f"{embedder.name}, {vectors.shape[1]} dimensions"

    async def documents() -> str:
        names = await asyncio.to_thread(os.listdir, settings.document_root)
        return f"{settings.document_root}, {len(names)} entries"

    configured: dict[Component, tuple[bool, Check]] = {
        Component.POSTGRES: (True, ledger.check),
        Component.REDIS: (settings.redis_url is not None, redis),
        Component.MILVUS: (settings.milvus_url is not None, milvus),
        Component.ELASTICSEARCH: (settings.elasticsearch_url is not None, elasticsearch),
        Component.MODEL: (True, model),
        Component.DOCUMENTS: (True, documents),
    }
    if wanted is None:
        return {name: ask for name, (is_set, ask) in configured.items() if is_set}
    return {name: configured[name][1] if configured[name][0] else _missing(name) for name in wanted}


def _missing(name: Component) -> Check:
    async def ask() -> str:
        raise Unhealthy(f"not configured: set TASKS_{name.upper()}_URL")

    return ask
