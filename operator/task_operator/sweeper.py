"""Nothing stale stays in the stores: intents of tasks that are gone are fenced, and a Job sweeps what they have left.

Every half minute the intents in the ledger are compared with the tasks that are alive, and a namespace that has something
to sweep, or was not swept for an hour, gets a Job. The work is the runner's (``python -m job_runner sweep``): nothing here
knows the stores. It may be killed at any point, and two operators may do it at once: a fence that is raised again stands
already, and the Job's name follows from the end of the sweep before, so the second one finds it created.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

import structlog

from task_operator.jobs import RunnerTemplate, build_sweep_job
from task_operator.metrics import Metrics
from task_operator.observation import Fence
from task_operator.projection import DatabaseUnavailable, Intent, Swept
from task_platform.kubernetes import ClusterError, Conflict, Manifest

LOOK: Final = timedelta(seconds=30)
"""From one comparison to the next. With it and the start of a pod, what a task left is gone within a minute of its end."""
STRANGER: Final = timedelta(days=1)
"""So long an intent may rest whose task the cluster has never had: of a runner that somebody has started by hand."""

_log = structlog.get_logger(__name__)


class Database(Protocol):
    """The part of :class:`task_operator.projection.Database` that is used."""

    async def intents(self, *, namespaces: Sequence[str]) -> list[Intent]: ...  # noqa: D102 - see there
    async def swept(self, *, namespaces: Sequence[str]) -> list[Swept]: ...  # noqa: D102 - see there
    async def raise_fence(self, uid: str, *, reason: str) -> Fence: ...  # noqa: D102 - see there


def dead(intents: Iterable[Intent], *, alive: Collection[str], now: datetime) -> list[str]:
    """Return the uids of tasks that will not go on with their intents.

    ``alive``: the tasks that have not finished, as known later than the intents. A task that has an intent has a pod, and so
    was seen by the operator that made it: what is not alive then has ended.
    """
    return [one.uid for one in intents if one.uid not in alive and (one.known or now - one.begun_at > STRANGER)]


def is_due(swept: Swept, *, interval: timedelta, now: datetime) -> bool:
    """Tell whether a namespace is to be swept."""
    return swept.dirty or now - swept.since >= interval


async def _nowhere() -> Collection[str]:
    """No other installation looks after tasks of these namespaces."""
    return ()


class Sweeper:
    """Compares and creates Jobs until cancelled."""

    def __init__(
        self,
        *,
        create_job: Callable[[Manifest], Awaitable[Manifest]],
        database: Database,
        alive: Callable[[], Collection[str] | None],
        template: RunnerTemplate,
        metrics: Metrics,
        elsewhere: Callable[[], Awaitable[Collection[str]]] = _nowhere,
        namespaces: Sequence[str] = (),
        interval: timedelta = timedelta(hours=1),
        look: timedelta = LOOK,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``alive``: the tasks that have not finished; None while that is not known. ``elsewhere``: those that another
        installation looks after, which shares namespaces and database; it may raise ClusterError."""
        self._create_job = create_job
        self._database = database
        self._alive = alive
        self._elsewhere = elsewhere
        self._template = template
        self._metrics = metrics
        self._namespaces = namespaces
        self._interval = interval
        self._look = look
        self._clock = clock

    async def run(self) -> None:
        """Look every half minute, for the first time as soon as all tasks are known."""
        while True:
            known = self._alive() is not None
            try:
                if known:
                    await self.look()
            except (ClusterError, DatabaseUnavailable) as error:
                _log.warning("cannot look after the stores; trying again", error=str(error))
            except Exception as error:  # noqa: BLE001 - tasks go on, whatever becomes of sweeping
                _log.exception("cannot look after the stores", error=repr(error))
            await asyncio.sleep(self._look.total_seconds() if known else 1)

    async def look(self) -> None:
        """Fence what is dead, and have swept what is due. Raises ClusterError and DatabaseUnavailable."""
        intents = await self._database.intents(namespaces=self._namespaces)
        alive = self._alive()  # asked for after the intents
        if alive is None:
            return
        ended = dead(intents, alive=alive, now=self._clock())
        others = await self._elsewhere() if ended else ()
        for uid in [uid for uid in ended if uid not in others]:
            await self._database.raise_fence(uid, reason="Ended")
            self._metrics.dead_intents.inc()
            _log.info("a task that has ended or gone cannot publish any more", uid=uid)
        for swept in await self._database.swept(namespaces=self._namespaces):
            if is_due(swept, interval=self._interval, now=self._clock()):
                await self._start(swept)

    async def _start(self, swept: Swept) -> None:
        job = build_sweep_job(swept.namespace, last=swept.last, template=self._template)
        try:
            await self._create_job(job)
        except Conflict:
            return  # it runs, or has failed less than a minute ago
        except ClusterError as error:  # a quota, a namespace that is going: the others are to be swept all the same
            _log.warning("cannot create a sweep Job", namespace=swept.namespace, error=error.message)
            return
        self._metrics.sweep_jobs.inc()
        _log.info("sweeping the stores", namespace=swept.namespace, job=job["metadata"]["name"], dirty=swept.dirty)
