"""kopf as the watch engine: it opens watches and takes them up again; every event becomes a call of the controller.

Events are taken off kopf's watches where they arrive (:func:`event_sinks`, :class:`task_operator.cluster.Watches`): from
there to a handler kopf needs a task, two queues and a quarter of a CPU millisecond, four to seven times a task, and keeps
3 KB of each object (docs/adr/0027). The handlers below do the same, for what comes through kopf all the same.

No change-detecting handlers, daemons, timers or indexes: they write annotations and finalizers into objects, keep progress
there that a 409 or a kill loses, and cost several requests a task. ``on.event`` writes nothing.
"""

import gc
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import kopf
import structlog

from task_contract.names import GROUP, PLURAL, POOL_PLURAL, SCHEDULE_PLURAL, VERSION
from task_operator.cluster import MANAGED_SELECTOR, Sink, Watches, open_watching
from task_operator.controller import Controller
from task_operator.pool_controller import PoolController
from task_operator.schedule_controller import ScheduleController
from task_platform.kubernetes import Access, Manifest

_log = structlog.get_logger(__name__)
_EXIT: Final = 9.0  # seconds


class _NoDiffBase(kopf.DiffBaseStorage):
    """Keeps no copy of what was handled last: the default one deep-copies the body on every event."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


class _NoProgress(kopf.ProgressStorage):
    """Keeps no progress of handlers: there are none that retry."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None

    def purge(self, **_: Any) -> None:
        return None

    def touch(self, **_: Any) -> None:
        return None

    def clear(self, *, essence: Any) -> Any:
        return essence


def kopf_settings(*, selector: str = "") -> kopf.OperatorSettings:
    """Return settings under which kopf only watches, in little memory; each was measured or guards against a known hang.

    ``selector``: of the labels of what is looked after; empty: everything is.
    """
    settings = kopf.OperatorSettings()
    settings.peering.standalone = True
    settings.scanning.disabled = True  # no watches on CRDs and namespaces, no rights for them
    settings.posting.enabled = False
    # A worker keeps its slot for idle_timeout after its last event: 100 slots of 5 s would be 20 objects a second.
    settings.queueing.worker_limit = 100
    settings.queueing.idle_timeout = 0.02
    settings.watching.chunk_size = 100
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 310
    settings.watching.connect_timeout = 10
    settings.watching.reconnect_backoff = 1
    settings.watching.label_selectors["batch", "v1", "jobs"] = MANAGED_SELECTOR
    for plural in (PLURAL, POOL_PLURAL, SCHEDULE_PLURAL):
        if selector:
            settings.watching.label_selectors[GROUP, VERSION, plural] = selector
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.persistence.diffbase_storage = _NoDiffBase()
    settings.persistence.progress_storage = _NoProgress()
    settings.process.ultimate_exiting_timeout = _EXIT
    return settings


def event_sinks(controller: Controller, pools: PoolController, schedules: ScheduleController) -> Mapping[str, Sink]:
    """Return who takes events straight from the watches, by the plural name of their objects."""

    def on_task(kind: str, manifest: Manifest) -> None:
        controller.on_task(kind, manifest)
        schedules.on_task(kind, manifest)

    def on_job(kind: str, manifest: Manifest) -> None:
        controller.on_job(kind, manifest)
        pools.on_worker_job(kind, manifest)

    return {
        PLURAL: on_task,
        "jobs": on_job,
        POOL_PLURAL: pools.on_pool,
        SCHEDULE_PLURAL: schedules.on_schedule,
    }


def build_registry(
    sinks: Mapping[str, Sink],
    *,
    access: Access,
    watches: Watches,
    with_pools: bool,
    with_schedules: bool,
    cleanup: Callable[[], Awaitable[None]],
    begun: Callable[[], None] = lambda: None,
) -> kopf.OperatorRegistry:
    """Return the handlers, bound to who takes events. ``with_pools``, ``with_schedules``: whether there is
    something to watch for them. ``begun`` is called when kopf has set itself up, its signals too."""
    registry = kopf.OperatorRegistry()

    def take(plural: str, event: Any) -> None:
        sinks[plural](event["type"], event["object"])

    @kopf.on.login(registry=registry, errors=kopf.ErrorsMode.PERMANENT)
    async def login(**_: Any) -> kopf.AiohttpSession:
        session = open_watching(access, watches)
        return kopf.AiohttpSession(server=access.server, aiohttp_session=session, default_namespace=access.namespace)

    @kopf.on.startup(registry=registry)
    async def startup(**_: Any) -> None:
        # Fewer full collections: the live objects of a process full of caches are walked for nothing.
        gc.set_threshold(20_000, 20, 50)
        begun()

    @kopf.on.cleanup(registry=registry)
    async def stop(**_: Any) -> None:
        await cleanup()

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def task_event(event: kopf.RawEvent, **_: Any) -> None:
        take(PLURAL, event)

    @kopf.on.event("batch", "v1", "jobs", registry=registry)
    async def job_event(event: kopf.RawEvent, **_: Any) -> None:
        take("jobs", event)

    if with_pools:

        @kopf.on.event(GROUP, VERSION, POOL_PLURAL, registry=registry)
        async def pool_event(event: kopf.RawEvent, **_: Any) -> None:
            take(POOL_PLURAL, event)

    if with_schedules:

        @kopf.on.event(GROUP, VERSION, SCHEDULE_PLURAL, registry=registry)
        async def schedule_event(event: kopf.RawEvent, **_: Any) -> None:
            take(SCHEDULE_PLURAL, event)

    return registry
