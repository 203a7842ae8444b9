"""What this process knows of tasks that are with worker pools, and its requests to Redis about them, many in one.

Nothing here has to outlive the process. What was offered is found in the tasks again, what workers said stays in Redis until
the status says it, and what is in a pool and should not be there is taken out by the next look, each second.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final, Protocol

import structlog

from task_contract.leases import PoolKeys, PoolReport, ReportKind
from task_contract.models import ProcessingTask
from task_operator.cache import Key
from task_operator.metrics import Metrics
from task_operator.observation import Lease, Pools
from task_operator.pool_queue import Heard, Look, Offer, QueueUnavailable
from task_operator.pools import Backlog, Pool, choose, fits, misfit
from task_operator.resources import Resources

_log = structlog.get_logger(__name__)

PoolId = tuple[str, str]
"""Namespace and name."""

_TICK: Final = 0.5  # seconds between two looks at which pools there are
_LINGER: Final = 0.01  # seconds in which offers gather for one request
_SETTLE: Final = 0.05  # the same of reports
_WINDOW: Final = 64  # tasks of a priority that are offered to a pool whatever its size
_PER_PLACE: Final = 4  # and as many for each task that its workers can have at once, for they take many in a second
_CLOCKS: Final = timedelta(seconds=10)
"""So much the clocks of the API server and of this process may differ."""
_MISSED: Final = 2  # looks in a row: the first may have begun before the task was there


class Queue(Protocol):
    """The part of :class:`task_operator.pool_queue.PoolQueue` that is used."""

    async def offer(self, keys: PoolKeys, offers: Sequence[Offer], *, now: datetime) -> list[bool]: ...  # noqa: D102
    async def withdraw(self, keys: PoolKeys, uid: str) -> str | None: ...  # noqa: D102
    def reports(self, keys: PoolKeys) -> AsyncGenerator[list[Heard], None]: ...  # noqa: D102
    async def settle(self, keys: PoolKeys, numbers: Sequence[str]) -> None: ...  # noqa: D102


class PoolPort(Protocol):
    """The part of :class:`task_operator.pool_controller.PoolController` that is used."""

    @property
    def synced(self) -> bool: ...  # noqa: D102
    def pools(self) -> Sequence[Pool]: ...  # noqa: D102


@dataclass(slots=True)
class _Held:
    """A lease, and which task it is of."""

    key: Key
    lease: Lease
    missed: int = 0


@dataclass(slots=True)
class _Place:
    """A pool as this process has seen it."""

    id: PoolId
    held: dict[str, _Held] = field(default_factory=dict)
    """By uid."""
    waits: dict[Key, datetime] = field(default_factory=dict)
    """Tasks for it that have not been offered, and since when they wait."""
    look: Look | None = None
    looks: int = 0
    down_since: datetime | None = None
    read: bool = False
    """Whether all reports were read that there were when this process began."""
    read_up_to: float = 0.0
    """By the loop's clock: what was reported before has been read."""
    missed_at: float = 0.0
    """When a lease was first missed in the row of looks that goes on."""
    gone_since: datetime | None = None
    strangers: frozenset[str] = frozenset()
    """What the last look saw of tasks that are not known."""
    window: int = _WINDOW

    @property
    def keys(self) -> PoolKeys:
        return PoolKeys(*self.id)

    @property
    def known(self) -> bool:
        return self.down_since is not None or (self.looks > 0 and self.read)


class PoolTasks:
    """Leases and reports of this process, by task."""

    def __init__(
        self,
        *,
        queue: Queue,
        pools: PoolPort,
        metrics: Metrics,
        classes: Mapping[str, Resources],
        wake: Callable[[Key], None],
        tell: Callable[[Key], None],
        live: Callable[[str, Mapping[str, str]], Mapping[str, Key]],
        grown: Callable[[], None],
        clock: Callable[[], datetime],
    ) -> None:
        """Calls back what has to be done about tasks.

        ``wake``: have one looked at; ``tell``: the same, for there is news of it. ``live``: which of these uids in a
        namespace, each with the task's name where that is known, are tasks that have not finished. ``grown``: there is more
        room in a pool.
        """
        self._queue = queue
        self._pools = pools
        self._metrics = metrics
        self._classes = classes
        self._wake = wake
        self._tell = tell
        self._live = live
        self._grown = grown
        self._clock = clock
        self._began = clock()
        self._places: dict[PoolId, _Place] = {}
        self._of: dict[str, PoolId] = {}  # of each lease
        self._present: dict[str, PoolId] = {}
        self._reports: dict[str, list[tuple[PoolId, Heard]]] = {}
        self._numbers: set[tuple[PoolId, str]] = set()
        self._idle: dict[str, set[Key]] = {}  # by namespace: tasks that wait for a pool that there is not
        self._offers: dict[PoolId, list[tuple[Offer, asyncio.Future[bool]]]] = {}
        self._senders: dict[PoolId, asyncio.Task[None]] = {}
        self._settling: dict[PoolId, list[str]] = {}
        self._settle_now = asyncio.Event()
        self._readers: dict[PoolId, asyncio.Task[None]] = {}
        self._taking_out: set[asyncio.Task[None]] = set()
        self._seen: tuple[Pool, ...] = ()
        self._synced = False

    # ------------------------------------------------------------------------------------------------------ deciding

    def lease(self, uid: str) -> Lease | None:
        """Return the lease of a task."""
        of = self._of.get(uid)
        return None if of is None else self._places[of].held[uid].lease

    def reports(self, uid: str) -> tuple[PoolReport, ...]:
        """Return what workers have said of a task and was not settled yet."""
        return tuple(heard.report for _, heard in self._reports.get(uid, ()))

    def facts(self, task: ProcessingTask) -> Pools:
        """Return what pools can do for a task."""
        namespace, uid = task.metadata.namespace, task.metadata.uid or ""
        inside = [pool for pool in self._pools.pools() if pool.namespace == namespace]
        lease, present = self.lease(uid), self._present.get(uid)
        has = present[1] if lease is None and present is not None else None if lease is None else lease.pool
        serving = next((pool for pool in inside if pool.name == has and fits(task, pool, self._classes)), None)
        if serving is None:
            serving = choose(task, inside, self._classes)
        places = [self._places.get((namespace, pool.name)) for pool in inside]
        at = None if has is None and serving is None else (namespace, has or (serving.name if serving else ""))
        place = None if at is None else self._places.get(at)
        since = task.status.retry_at or task.status.queued_at or task.metadata.creation_timestamp
        return Pools(
            known=self._pools.synced and all(one is not None and one.known for one in places),
            serving=None if serving is None else serving.name,
            missing="" if serving is not None else self._missing(task, inside),
            down_since=None if place is None else place.down_since,
            lease=timedelta() if serving is None else serving.spec.lease,
            present=None if present is None else present[1],
            gone_since=None if place is None else place.gone_since,
            inherited=lease is None and (since is None or since < self._began + _CLOCKS),
        )

    def _missing(self, task: ProcessingTask, inside: Sequence[Pool]) -> str:
        serves = [(pool, misfit(task, pool, self._classes)) for pool in inside if task.spec.type in pool.spec.types]
        where = f"namespace {task.metadata.namespace}"
        if not serves:
            return f"no WorkerPool of {where} serves {task.spec.type}: create one, or add the type to one"
        why = "; ".join(f"not {pool.name}, for {reason}" for pool, reason in serves)
        return f"no WorkerPool of {where} can take the task: {why}"

    def waits(self, key: Key, namespace: str, pool: str | None, since: datetime | None) -> None:
        """Note that a task waits for a pool, or, without one, for a pool to come."""
        if pool is None:
            self._idle.setdefault(namespace, set()).add(key)
        else:
            self._place((namespace, pool)).waits.setdefault(key, since or self._clock())

    def waits_no_more(self, key: Key) -> None:
        """Note that a task waits for no pool any more."""
        for place in self._places.values():
            place.waits.pop(key, None)
        if key in (idle := self._idle.get(key[0], set())):
            idle.discard(key)

    def window(self, pool: PoolId, _priority: str) -> int:
        """Return how many tasks of a priority may be with a pool at once."""
        place = self._places.get(pool)
        return _WINDOW if place is None else place.window

    def backlog(self, pool: Pool) -> Backlog:
        """Return what waits for a pool."""
        place = self._places.get((pool.namespace, pool.name))
        if place is None:
            return Backlog()
        now = self._clock()
        untaken = 0 if place.look is None else sum(place.look.waiting.values())
        oldest = max((now - since for since in place.waits.values()), default=timedelta())
        return Backlog(waiting=len(place.waits) + untaken, oldest_seconds=max(0.0, oldest.total_seconds()))

    # ----------------------------------------------------------------------------------------------------- requests

    async def offer(self, key: Key, pool: PoolId, offer: Offer) -> None:
        """Offer an attempt to a pool. Raises :class:`QueueUnavailable`."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._offers.setdefault(pool, []).append((offer, answer))
        sender = self._senders.get(pool)
        if sender is None or sender.done():
            self._senders[pool] = asyncio.create_task(self._send(pool))
        new = await asyncio.shield(answer)
        self._metrics.pool_offers.labels("new" if new else "known").inc()
        self._drop(offer.uid)
        place = self._place(pool)
        lease = Lease(pool=pool[1], attempt=offer.attempt, stamp=offer.stamp, priority=offer.priority)
        place.held[offer.uid] = _Held(key, lease)
        self._of[offer.uid] = pool
        for _, heard in self._reports.get(offer.uid, ()):
            self._note_end(heard.report)  # it may have been faster than the answer

    async def _send(self, pool: PoolId) -> None:
        await asyncio.sleep(_LINGER)
        while batch := self._offers.pop(pool, []):
            try:
                new = await self._queue.offer(PoolKeys(*pool), [offer for offer, _ in batch], now=self._clock())
            except BaseException as error:
                failure = error if isinstance(error, Exception) else QueueUnavailable("stopped")
                for _, answer in batch:
                    answer.set_exception(failure)
                    answer.exception()  # whoever asked may be gone
                if not isinstance(error, Exception):
                    raise
            else:
                for (_, answer), one in zip(batch, new, strict=True):
                    answer.set_result(one)

    async def withdraw(self, uid: str, namespace: str) -> None:
        """Take a task out of the pools that have it. While Redis is away nothing happens: a later look does it."""
        pools = {pool for pool in (self._of.get(uid), self._present.pop(uid, None)) if pool is not None}
        self._drop(uid)
        for pool in pools:
            try:
                await self._queue.withdraw(PoolKeys(*pool), uid)
            except QueueUnavailable as error:
                _log.warning("cannot withdraw a task yet", namespace=namespace, pool=pool[1], uid=uid, error=str(error))
                self.failed(pool)

    def failed(self, pool: PoolId) -> None:
        """Note that Redis does not answer."""
        place = self._place(pool)
        if place.down_since is None:
            place.down_since = self._clock()
            self._wake_all(place)

    def heard(self, uid: str, reports: Collection[PoolReport] | None = None) -> None:
        """Have reports of a task removed, those that were looked at; None: all."""
        kept = []
        for pool, heard in self._reports.pop(uid, ()):
            if reports is None or any(heard.report is one for one in reports):
                self._numbers.discard((pool, heard.number))
                self._settling.setdefault(pool, []).append(heard.number)
                self._settle_now.set()
            else:
                kept.append((pool, heard))
        if kept:
            self._reports[uid] = kept

    def forget(self, uid: str, key: Key) -> None:
        """Forget a task that has finished or is gone; what a pool still has of it the next look takes out."""
        self._drop(uid)
        self.heard(uid)
        self.waits_no_more(key)

    def _drop(self, uid: str) -> None:
        if (pool := self._of.pop(uid, None)) is not None:
            self._places[pool].held.pop(uid, None)

    # -------------------------------------------------------------------------------------------------- looks, reports

    async def run(self) -> None:
        """Read what workers report, of all pools, until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._settle_forever())
                while True:
                    self.follow(group)
                    await asyncio.sleep(_TICK)
        finally:
            for task in (*self._readers.values(), *self._senders.values(), *self._taking_out):
                task.cancel()

    def follow(self, group: asyncio.TaskGroup | None = None) -> None:
        """See which pools there are; read the reports of those that are new."""
        pools = tuple(self._pools.pools())
        there = {(pool.namespace, pool.name) for pool in pools}
        if group is not None:
            for pool in (there | {of for of, place in self._places.items() if place.held}) - self._readers.keys():
                self._readers[pool] = group.create_task(self._read_forever(self._place(pool)))
        self._drop_places(there)
        if pools == self._seen and self._pools.synced == self._synced:
            return
        for of, place in self._places.items():
            if of in there:
                place.gone_since = None
            elif place.gone_since is None:
                place.gone_since = self._clock()
        self._seen, self._synced = pools, self._pools.synced
        for place in self._places.values():
            self._wake_all(place)
        for keys in self._idle.values():
            for key in list(keys):
                self._wake(key)

    def _drop_places(self, there: Collection[PoolId]) -> None:
        for of in [of for of, place in self._places.items() if of not in there and not place.held]:
            for key in self._places.pop(of).waits:
                self._wake(key)
            if (reader := self._readers.pop(of, None)) is not None:
                reader.cancel()

    async def _read_forever(self, place: _Place) -> None:
        while True:
            try:
                async with contextlib.aclosing(self._queue.reports(place.keys)) as batches:
                    async for batch in batches:
                        self.on_reports(place.id, batch)
            except QueueUnavailable as error:
                _log.warning("cannot read what workers report; trying again", pool=place.id[1], error=str(error))
                await asyncio.sleep(1)

    def on_reports(self, pool: PoolId, batch: Iterable[Heard]) -> None:
        """Take in reports, some of them perhaps again; none: there are no more at the moment."""
        place, some = self._place(pool), False
        if place.gone_since is not None and place.down_since is not None:
            # Nobody looks at a pool that is gone. That its reports can be read says that Redis is back.
            place.down_since = None
            self._wake_all(place)
        for heard in batch:
            some = True
            if (pool, heard.number) in self._numbers:
                continue
            report = heard.report
            self._metrics.pool_reports.labels(str(report.kind)).inc()
            self._numbers.add((pool, heard.number))
            self._reports.setdefault(report.uid, []).append((pool, heard))
            held = place.held.get(report.uid)
            self._note_end(report)
            key = held.key if held is not None else self._live(pool[0], {report.uid: report.name}).get(report.uid)
            if key is None:
                self.heard(report.uid)
            else:
                self._tell(key)
        if not some:
            place.read_up_to = asyncio.get_running_loop().time()
            if not place.read:
                place.read = True
                self._wake_all(place)
                self._wake_idle(pool[0])

    def _note_end(self, report: PoolReport) -> None:
        """The script that reports an end ends the lease with it."""
        if report.kind is ReportKind.RUNNING:
            return
        self._present.pop(report.uid, None)
        lease = self.lease(report.uid)
        if lease is not None and (lease.attempt, lease.stamp) == (report.attempt, report.stamp):
            self._drop(report.uid)

    def on_look(self, pool: Pool, look: Look | None) -> None:
        """Take in what there is of a pool in Redis; None: Redis cannot be used."""
        of = (pool.namespace, pool.name)
        place = self._place(of)
        if look is None:
            self.failed(of)
            return
        news = place.down_since is not None or place.looks == 0
        place.look, place.down_since, place.looks = look, None, place.looks + 1
        self._find_lost(place, look)
        self._find_strangers(place, look)
        capacity = sum(worker.state.capacity for worker in look.workers.values())
        window = max(_WINDOW, _PER_PLACE * capacity)
        grown, place.window = window > place.window, window
        if news:
            self._wake_all(place)
            self._wake_idle(of[0])
        if grown or news:
            self._grown()

    def _find_lost(self, place: _Place, look: Look) -> None:
        now = asyncio.get_running_loop().time()
        for uid, held in place.held.items():
            if uid in look.uids:
                held.missed = 0
                continue
            held.missed += 1
            if held.missed == 1:
                place.missed_at = now
            elif held.missed >= _MISSED and place.read_up_to >= place.missed_at and not held.lease.lost:
                held.lease = replace(held.lease, lost=True)
                self._wake(held.key)

    def _find_strangers(self, place: _Place, look: Look) -> None:
        """Look for tasks that this process has not offered here: of an earlier one, or those that should not be here."""
        for uid in [uid for uid, of in self._present.items() if of == place.id and uid not in look.uids]:
            del self._present[uid]
        strange = look.uids - place.held.keys()
        seen, place.strangers = place.strangers, frozenset[str]()
        if not strange or not self._pools.synced:
            return
        unknown = set[str]()
        live = self._live(place.id[0], {uid: "" for uid in strange if self._present.get(uid) != place.id})
        for uid in strange:
            if self._present.get(uid) == place.id:
                continue
            key = live.get(uid)
            if key is not None and self._of.get(uid) in {None, place.id}:
                self._present[uid] = place.id
                self._wake(key)
            elif uid in seen:
                self._taking_out.add(task := asyncio.create_task(self._take_out(place, uid)))
                task.add_done_callback(self._taking_out.discard)
            else:
                unknown.add(uid)  # of another operator, perhaps, whose watch is ahead of ours
        place.strangers = frozenset(unknown)

    async def _take_out(self, place: _Place, uid: str) -> None:
        with contextlib.suppress(QueueUnavailable):
            await self._queue.withdraw(place.keys, uid)

    def _wake_all(self, place: _Place) -> None:
        for held in place.held.values():
            self._wake(held.key)
        for key in place.waits:
            self._wake(key)

    def _wake_idle(self, namespace: str) -> None:
        for key in list(self._idle.get(namespace, ())):
            self._wake(key)

    def _place(self, of: PoolId) -> _Place:
        place = self._places.get(of)
        if place is None:
            place = self._places[of] = _Place(of)
        return place

    async def _settle_forever(self) -> None:
        while True:
            await self._settle_now.wait()
            await asyncio.sleep(_SETTLE)
            self._settle_now.clear()
            await self.settle()

    async def settle(self) -> None:
        """Remove the reports that are done with. Those that stay are read once more, and concern nothing then."""
        settling, self._settling = self._settling, {}
        for pool, numbers in settling.items():
            try:
                await self._queue.settle(PoolKeys(*pool), numbers)
            except QueueUnavailable as error:
                _log.warning("cannot remove reports", pool=pool[1], count=len(numbers), error=str(error))
