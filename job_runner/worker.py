"""A worker of a pool: a process that carries out one task after the other, several at once, as long as it is wanted.

It takes leases when it has room, renews all of them in one call, carries them out as a pod of its own would
(:class:`job_runner.attempt.Attempt`), and reports. What keeps this safe, whoever dies when:

- *A result is in PostgreSQL before it is reported*, as with the termination message of a pod: who judges an attempt of
  which nothing is heard looks there first. Without PostgreSQL the report goes all the same.
- *A report stays until Redis has taken it*, and its lease is renewed until then. Without Redis the worker goes on with what
  it has.
- *Who has lost a lease stops and says nothing*: neither a row nor a report. A worker that was paused for longer than its
  lease asks whether it still has it before it writes that something has ended. That is courtesy: what readers see is
  fenced in the ledger, where the next attempt has taken over.
- *The process dies*: its leases run out, and each is an attempt that was lost.

An attempt that hangs has perhaps left a thread behind that will never end, so the worker ends when it has given back the
others: an empty place is filled at once.
"""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import asyncpg
import structlog

from job_runner import logs
from job_runner.attempt import RECORD_SECONDS, Attempt, identity, known_task, name_in_logs, record_usage
from job_runner.embed import Embedder, make_embedder
from job_runner.health import SharedChecks
from job_runner.leases import Backoff, Lease, Leases, QueueUnavailable
from job_runner.ledger import Ended, Ledger
from job_runner.settings import Settings
from job_runner.shared_model import SharedModels, embed_for
from job_runner.usage import Meter, Used
from job_runner.work import Work
from task_contract.errors import AttemptStalled, Fenced, HandedBack, InvalidTask, StoreUnavailable, TaskError
from task_contract.leases import PoolKeys, PoolReport, ReportKind, WorkerState
from task_contract.lifecycle import ExitCode
from task_contract.messages import AttemptOutcome, progress_event
from task_contract.models import ProcessingTask, Stage
from task_contract.pools import POOL_TYPES

GROUP_SECONDS: Final = 0.05
"""Results of attempts that end within this are written in one statement, and reported in one call."""
RUNNING_SECONDS: Final = 1.0
"""An attempt that runs for longer is reported as running; most end before."""
_PROGRESS_SECONDS: Final = 0.25
"""Between two messages of progress."""
_ACCOUNT_SECONDS: Final = 1.0
"""What attempts have used is written so often."""
_WAIT_SECONDS: Final = 1.0
"""So long a worker waits to be woken before it looks by itself."""
_TAKE_SECONDS: Final = 0.05
"""At least so long between two calls that take tasks, where the first has found fewer than there was room for: many that
come one by one are taken together."""
_UNREPORTED: Final = 256
"""Attempts that have ended and are not reported: with more of them nothing is taken."""
_CONNECTIONS: Final = 8
"""To PostgreSQL, at most."""
_LAST_SECONDS: Final = 2.0
"""For what Redis is told by a worker that is about to end."""
_THREADS_EACH: Final = 3
"""Threads for what blocks, an attempt: one that waits for the model, and one for each store."""

log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class _Held:
    """A lease, and what becomes of it."""

    lease: Lease
    holder: str
    """In the ledger, of this attempt alone: a later one of the task may be this worker's too."""
    started_at: datetime
    task: ProcessingTask | None = None
    uid: UUID | None = None
    """Of the task."""
    attempt: Attempt | None = None
    running: asyncio.TimerHandle | None = None
    lost: bool = False
    reporting: bool = False
    """Whether its end is on its way: then it is a lease no more as soon as Redis has heard."""
    outcome: AttemptOutcome | None = None
    finished_at: datetime | None = None
    used: Used | None = None
    progress: tuple[Stage, int, tuple[int, int] | None] | None = None
    shown: bool = False
    """Whether any progress was published."""

    @property
    def ended(self) -> bool:
        return self.outcome is not None


@dataclass(slots=True)
class _Count:
    tasks: int = 0
    renewals: int = 0


class Worker:
    """One worker. :meth:`run` it once."""

    def __init__(
        self,
        settings: Settings,
        *,
        started: float,
        make: Callable[..., Embedder] = make_embedder,
    ) -> None:
        """``started``: the monotonic time at which the process started. Raises StoreUnavailable where settings lack."""
        if missing := settings.worker_missing:
            raise StoreUnavailable(
                f"cannot work for a pool: {', '.join(missing)} not set; "
                "set it in the environment (in a cluster the operator does)"
            )
        assert settings.pool is not None  # noqa: S101 - for the type checker: looked at above
        assert settings.worker is not None  # noqa: S101 - for the type checker: looked at above
        assert settings.redis_url is not None  # noqa: S101 - for the type checker: looked at above
        self._settings = settings
        self._name = settings.worker
        self._namespace = settings.pool_namespace
        self._started = started
        keys = PoolKeys(settings.pool_namespace, settings.pool)
        self._leases = Leases(settings.redis_url.get_secret_value(), keys, settings.worker)
        connections = min(settings.pool_concurrency + 1, _CONNECTIONS)
        self._ledger = Ledger(settings.postgres_url.get_secret_value(), connections=connections)
        self._models = SharedModels(make, batch_size=settings.pool_batch_size, may_ask=lambda: max(1, len(self._active)))
        self._checks = SharedChecks()
        self._held: dict[str, _Held] = {}
        """By uid of the task: all that it has a lease of, until it is reported or lost."""
        self._active: set[_Held] = set()
        """Of these, attempts that run."""
        self._ended: list[_Held] = []
        """Attempts whose result is to be written."""
        self._outbox: list[tuple[_Held, ReportKind]] = []
        self._moved: set[_Held] = set()
        """Attempts whose progress is to be published."""
        self._changed = asyncio.Event()
        """Set when the worker is told to end, and from then on whenever an attempt ends or is reported."""
        self._room_changed = asyncio.Event()
        """Set whenever an attempt ends or is reported."""
        self._in_take = asyncio.Lock()
        """Held while tasks are taken: an answer that nobody waits for would be lost."""
        self._used: list[Used] = []
        """What attempts have used, to be written."""
        self._to_record = asyncio.Event()
        self._to_account = asyncio.Event()
        self._to_report = asyncio.Event()
        self._to_publish = asyncio.Event()
        self._to_renew = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._renewed_at = time.monotonic()
        self._count = _Count()
        self._load_seconds = 0.0
        self._ready = False
        self._draining = False
        self._stopped_at: float | None = None
        """When SIGTERM came."""
        self._hangs = False
        """Whether an attempt hung."""

    async def run(self) -> ExitCode:
        """Work until the worker is to end; return the exit code. Raises ModelUnavailable for a model that is not there."""
        loop = asyncio.get_running_loop()
        threads = _THREADS_EACH * self._settings.pool_concurrency + 8
        loop.set_default_executor(ThreadPoolExecutor(threads, thread_name_prefix="asyncio"))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        parts = [self._spawn(part) for part in (self._renewing, self._listening)]
        model = await asyncio.to_thread(self._models, self._settings.embedding_model, threads=self._settings.threads)
        await asyncio.to_thread(model.warm_up)
        self._load_seconds = time.monotonic() - self._started
        self._ready = True
        self._to_renew.set()
        log.info("ready", pool=self._settings.pool, worker=self._name, seconds=round(self._load_seconds, 3))
        taking = self._spawn(self._taking)
        parts += [taking, *map(self._spawn, (self._recording, self._reporting, self._accounting, self._publishing))]
        try:
            while not self._ending:
                await self._next_change(parts, None)
            async with self._in_take:
                taking.cancel()
            parts.remove(taking)
            with contextlib.suppress(QueueUnavailable, TimeoutError):
                async with asyncio.timeout(_LAST_SECONDS):
                    for lease in await self._leases.forgotten(self._entries()):
                        self._begin(lease)
                    await self._renew()  # so that everybody knows
            await self._finished(parts)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.wait(parts)
            await self._account()
            await self._ledger.aclose()
            await self._leases.aclose()
        log.info("ended", tasks=self._count.tasks, left=len(self._held))
        if self._hangs:
            return ExitCode.RETRYABLE
        return ExitCode.SUCCEEDED if self._stopped_at is None else ExitCode.HANDED_BACK

    def _spawn(self, part: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        return asyncio.create_task(part(), name=part.__name__)

    # ------------------------------------------------------------------------------------------------------- its end

    def _stop(self) -> None:
        if self._stopped_at is None:
            log.info("asked to stop", tasks=len(self._active), seconds=self._settings.pool_grace_seconds)
            self._stopped_at = time.monotonic()
        self._changed.set()

    @property
    def _ending(self) -> bool:
        return self._draining or self._hangs or self._stopped_at is not None

    async def _finished(self, parts: list[asyncio.Task[None]]) -> None:
        """Wait until all that it has is finished and reported; after SIGTERM within the grace period, and part of it is for
        handing back the rest. A worker in which an attempt hangs hands back at once."""
        grace = self._settings.pool_grace_seconds
        handed_back = False
        while self._held:
            now, end = time.monotonic(), None
            if self._hangs and self._stopped_at is None:
                self._stopped_at = now - grace + _handing_back(grace)
            if self._stopped_at is not None:
                end = self._stopped_at + grace
                if now >= end:
                    log.warning("cannot end in time", tasks=len(self._held))
                    return
                if not handed_back and now >= end - _handing_back(grace):
                    handed_back = True
                    for held in tuple(self._active):
                        if held.attempt is not None:
                            held.attempt.hand_back()
                if not handed_back:
                    end -= _handing_back(grace)
            await self._next_change(parts, None if end is None else max(0.0, end - now))

    async def _next_change(self, parts: list[asyncio.Task[None]], seconds: float | None) -> None:
        """Wait until something has changed, so long at most. Raises what a part of the worker has failed with: that ends the
        process."""
        waiting = asyncio.ensure_future(self._changed.wait())
        try:
            done, _ = await asyncio.wait([waiting, *parts], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        self._changed.clear()
        for part in done - {waiting}:
            if not part.cancelled():
                part.result()

    # -------------------------------------------------------------------------------------------------------- leases

    async def _taking(self) -> None:
        backoff = Backoff()
        taken_at = 0.0
        while True:
            room = self._settings.pool_concurrency - len(self._active)
            if room <= 0 or len(self._held) - len(self._active) >= _UNREPORTED or self._ending:
                self._room_changed.clear()
                await self._room_changed.wait()
                continue
            if (pause := taken_at + _TAKE_SECONDS - time.monotonic()) > 0:
                await asyncio.sleep(pause)
                room = self._settings.pool_concurrency - len(self._active)
            try:
                async with self._in_take:
                    leases = await self._leases.take(room, held=self._entries())
                    for lease in leases:
                        self._begin(lease)
                if len(leases) < room:
                    taken_at = time.monotonic()
                    await self._leases.wait(_WAIT_SECONDS)
            except QueueUnavailable as error:
                log.warning("cannot take tasks", error=str(error))
                await asyncio.sleep(backoff.pause())
            else:
                backoff.reset()

    async def _listening(self) -> None:
        backoff = Backoff()
        while True:
            try:
                async for said in self._leases.control():
                    backoff.reset()
                    # Redis is asked what holds now: the task may have been taken anew meanwhile, by this worker. What was
                    # said before it listened is heard in this way too.
                    if said in {"", "drain"} or said in self._held:
                        self._to_renew.set()
            except QueueUnavailable as error:
                log.warning("cannot listen", error=str(error))
            await asyncio.sleep(backoff.pause())

    async def _renewing(self) -> None:
        backoff = Backoff()
        while True:
            try:
                await self._renew()
            except QueueUnavailable as error:
                log.warning("cannot renew leases", tasks=len(self._held), error=str(error))
                await asyncio.sleep(backoff.pause())
                continue
            backoff.reset()
            self._to_renew.clear()
            try:
                async with asyncio.timeout(self._settings.pool_lease_seconds / 3):
                    await self._to_renew.wait()
            except TimeoutError:
                pass

    async def _renew(self) -> None:
        held = list(self._held.values())
        asked_at = time.monotonic()
        heard = await self._leases.renew(self._state(), [one.lease for one in held])
        self._renewed_at = asked_at
        self._count.renewals += 1
        for one in held:
            if one.lease.uid in heard.lost and self._held.get(one.lease.uid) is one and not one.reporting:
                self._lose(one, "it was withdrawn, or its lease ran out")
        if heard.draining and not self._draining:
            log.info("to drain", tasks=len(self._active))
            self._draining = True
            self._changed.set()

    def _state(self) -> WorkerState:
        calls, texts, room = self._models.totals
        return WorkerState(
            worker=self._name,
            job=self._settings.worker_job,
            revision=self._settings.pool_revision,
            ready=self._ready and not self._ending,
            draining=self._ending,
            leased=len(self._held),
            capacity=self._settings.pool_concurrency,
            load_seconds=round(self._load_seconds, 3),
            tasks=self._count.tasks,
            renewals=self._count.renewals,
            calls=calls,
            texts=texts,
            room=room,
        )

    def _lose(self, held: _Held, why: str) -> None:
        """Stop an attempt that is somebody else's by now, or nobody's; it says nothing any more."""
        if held.lost:
            return
        log.info("a task is given up", uid=held.lease.uid, attempt=held.lease.attempt, why=why)
        held.lost = True
        self._release(held)
        if held.attempt is not None:
            held.attempt.stop(Fenced(f"cannot go on: {why}; this one stops"))

    def _release(self, held: _Held) -> None:
        if self._held.get(held.lease.uid) is held:
            del self._held[held.lease.uid]
        if held.running is not None:
            held.running.cancel()
        self._tell()

    def _tell(self) -> None:
        self._room_changed.set()
        if self._ending:
            self._changed.set()

    def _entries(self) -> set[tuple[int, str]]:
        return {(held.lease.stream, held.lease.entry) for held in self._held.values()}

    # ------------------------------------------------------------------------------------------------------- attempts

    def _begin(self, lease: Lease) -> None:
        if (before := self._held.get(lease.uid)) is not None:
            self._lose(before, "the worker has a later lease of the same task")
        held = self._held[lease.uid] = _Held(
            lease, f"{self._settings.holder}.{lease.stream}-{lease.entry}", datetime.now(UTC)
        )
        self._active.add(held)
        held.running = asyncio.get_running_loop().call_later(RUNNING_SECONDS, self._say_running, held)
        task = asyncio.create_task(self._carry_out(held))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry_out(self, held: _Held) -> None:
        logs.keep_apart()
        try:
            outcome = await self._outcome(held)
        except TaskError as error:
            outcome = AttemptOutcome.of_error(error, attempt=held.lease.attempt)
        except Exception as raised:
            log.exception("the worker failed")
            said = f"cannot go on: {type(raised).__name__}: {raised}; this is an error of the runner, see its log"
            outcome = AttemptOutcome.of_error(TaskError(said), attempt=held.lease.attempt)
        log.info("attempt ended", reason=outcome.reason)
        self._active.discard(held)
        self._count.tasks += 1
        held.outcome, held.finished_at, held.attempt = outcome, datetime.now(UTC), None
        if outcome.reason == AttemptStalled.reason:
            self._hangs = True
        if not held.lost:
            if held.running is not None:
                held.running.cancel()
            self._ended.append(held)
            self._to_record.set()
        self._tell()

    async def _outcome(self, held: _Held) -> AttemptOutcome:
        lease = held.lease
        task = held.task = known_task(json.loads(lease.task), called="task")
        uid, created_at = identity(task)
        if str(uid) != lease.uid:
            raise InvalidTask(f"cannot carry out task {lease.uid}: what stands in the queue is task {uid}")
        held.uid = uid
        if task.spec.type not in POOL_TYPES:
            raise InvalidTask(f"cannot carry out {task.spec.type} in a pool: it has Jobs of its own")
        name_in_logs(task, uid, lease.attempt)
        embed_for(task.spec.kb_id or "")
        settings = self._settings.model_copy(update={"attempt": lease.attempt, "holder": held.holder})
        held.attempt = Attempt(
            Work(
                task,
                uid=uid,
                created_at=created_at,
                settings=settings,
                ledger=self._ledger,
                progress=_Moved(held, self._move),
                make_embedder=self._models,
                shared_checks=self._checks,
            ),
            until=time.monotonic() + task.spec.effective_timeout.total_seconds(),
            meter=Meter(),
            last_resort=lambda outcome, code: self._last_resort(held, outcome),
        )
        outcome, _ = await held.attempt.run()
        held.used = held.attempt.used(outcome)
        return outcome

    def _last_resort(self, hanging: _Held, outcome: AttemptOutcome) -> None:
        """Say what there is to say and end the process: the event loop hangs. Called from another thread."""
        back = HandedBack("cannot go on: another task hangs in the same worker; the attempt is handed back")
        reports = []
        for held in list(self._held.values()):
            given_back = AttemptOutcome.of_error(back, attempt=held.lease.attempt)
            said = outcome if held is hanging else held.outcome or given_back
            reports.append((held.lease, self._report(held, ReportKind.ENDED, said)))
        self._leases.last_words(reports)
        os._exit(ExitCode.RETRYABLE)

    # -------------------------------------------------------------------------------------------------------- results

    async def _recording(self) -> None:
        """Write the results of attempts that end about the same time, then have them reported."""
        while True:
            await self._to_record.wait()
            if not self._ending:
                await asyncio.sleep(GROUP_SECONDS)
            self._to_record.clear()
            if time.monotonic() - self._renewed_at > self._settings.pool_lease_seconds:
                try:
                    await self._renew()
                except QueueUnavailable as error:
                    log.warning("cannot ask whether leases still hold", error=str(error))
            ended, self._ended = [held for held in self._ended if not held.lost], []
            if await self._record(ended):
                self._used += [held.used for held in ended if held.used is not None]
                self._to_account.set()
            self._outbox += [(held, ReportKind.ENDED) for held in ended]
            self._to_report.set()

    async def _record(self, ended: list[_Held]) -> bool:
        rows = [
            Ended(held.uid, held.holder, held.outcome) for held in ended if held.uid is not None and held.outcome is not None
        ]
        if not rows:
            return True
        try:
            async with asyncio.timeout(RECORD_SECONDS):
                try:
                    await self._ledger.record(rows)
                except StoreUnavailable as error:
                    if len(rows) == 1 or not isinstance(error.__cause__, asyncpg.DataError):
                        raise
                    for row in rows:  # the others are not to go with one that PostgreSQL does not take
                        await self._record_alone(row)
        except (TaskError, TimeoutError) as error:
            log.warning("results are not in PostgreSQL; the reports say the same", tasks=len(rows), error=str(error))
            return False
        return True

    async def _record_alone(self, row: Ended) -> None:
        try:
            await self._ledger.record([row])
        except StoreUnavailable as error:
            if not isinstance(error.__cause__, asyncpg.DataError):
                raise
            log.warning("a result is not in PostgreSQL; the report says the same", uid=str(row.task_uid), error=str(error))

    async def _accounting(self) -> None:
        """Write what attempts have used, once a second."""
        while True:
            await self._to_account.wait()
            await asyncio.sleep(_ACCOUNT_SECONDS)
            await self._account()

    async def _account(self) -> None:
        self._to_account.clear()
        if used := self._used:
            self._used = []
            await record_usage(self._ledger, used)

    def _say_running(self, held: _Held) -> None:
        self._outbox.append((held, ReportKind.RUNNING))
        self._to_report.set()

    async def _reporting(self) -> None:
        backoff = Backoff()
        while True:
            await self._to_report.wait()
            self._to_report.clear()
            outbox = [(held, kind) for held, kind in self._outbox if not held.lost]
            # Of one that has ended that is all there is to say.
            over = {held for held, kind in outbox if kind is ReportKind.ENDED}
            outbox = [(held, kind) for held, kind in outbox if kind is ReportKind.ENDED or held not in over]
            self._outbox = []
            for held in over:
                held.reporting = True
            try:
                taken = await self._leases.report(
                    [(held.lease, self._report(held, kind, held.outcome)) for held, kind in outbox]
                )
            except QueueUnavailable as error:
                self._outbox = outbox + self._outbox
                log.warning("cannot report", tasks=len(outbox), error=str(error))
                await asyncio.sleep(backoff.pause())
                self._to_report.set()
                continue
            backoff.reset()
            for (held, kind), mine in zip(outbox, taken, strict=True):
                if kind is ReportKind.ENDED:
                    self._release(held)
                elif not mine:
                    self._lose(held, "it went to another worker, or was withdrawn")

    def _report(self, held: _Held, kind: ReportKind, outcome: AttemptOutcome | None) -> PoolReport:
        lease = held.lease
        ended = kind is ReportKind.ENDED
        return PoolReport(
            kind=kind,
            uid=lease.uid,
            namespace=self._namespace,
            name="" if held.task is None else held.task.metadata.name,
            attempt=lease.attempt,
            stamp=lease.stamp,
            worker=self._name,
            job=self._settings.worker_job,
            offered_at=lease.offered_at,
            started_at=held.started_at,
            finished_at=(held.finished_at or datetime.now(UTC)) if ended else None,
            outcome=outcome if ended else None,
        )

    # ------------------------------------------------------------------------------------------------------- progress

    def _move(self, held: _Held) -> None:
        self._moved.add(held)
        self._to_publish.set()

    async def _publishing(self) -> None:
        """Publish the latest progress of each attempt. Of one that ends before its turn there is nothing to watch."""
        while True:
            await self._to_publish.wait()
            await asyncio.sleep(_PROGRESS_SECONDS)
            self._to_publish.clear()
            moved, self._moved = self._moved, set()
            messages = []
            for held in moved:
                if held.task is None or held.progress is None or held.lost or (held.ended and not held.shown):
                    continue
                held.shown = True
                stage, percent, counted = held.progress
                messages.append(
                    progress_event(
                        uid=held.lease.uid,
                        namespace=held.task.metadata.namespace,
                        name=held.task.metadata.name,
                        attempt=held.lease.attempt,
                        stage=stage,
                        progress=percent,
                        at=datetime.now(UTC),
                        counted=counted,
                    )
                )
            if messages:
                try:
                    await self._leases.publish_progress(messages)
                except QueueUnavailable:
                    await asyncio.sleep(_WAIT_SECONDS)  # others say so


class _Moved:
    """The progress of one attempt."""

    def __init__(self, held: _Held, move: Callable[[_Held], None]) -> None:
        self._held = held
        self._move = move

    def report(self, stage: Stage, percent: int, *, counted: tuple[int, int] | None = None) -> None:
        """Keep it until it is published or a later one takes its place."""
        latest = stage, percent, counted
        if latest != self._held.progress:
            self._held.progress = latest
            self._move(self._held)


def _handing_back(grace: float) -> float:
    """Return how much of the grace period is for handing back: a batch of the model takes two seconds at most, a call to a
    store that is canceled as long, and a row in PostgreSQL five."""
    return min(10.0, grace / 3)
