"""One attempt: from a task to a result row, an outcome and an exit code, whatever happens in between.

Of a process of its own (:func:`run_attempt`), or one of many in a worker (:mod:`job_runner.worker`).
"""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import structlog

from job_runner import health, logs
from job_runner.batch import Batch
from job_runner.deletion import Deletion
from job_runner.embed import Embedder, make_embedder
from job_runner.embedding import embedding_generation
from job_runner.indexing import Indexing
from job_runner.knowledge_indexing import KnowledgeIndexing
from job_runner.ledger import Ended, Ledger
from job_runner.progress import Progress, RedisProgress, SilentProgress
from job_runner.settings import Settings, revealed
from job_runner.stores import labelled_opener, opener
from job_runner.usage import PROCESS, Meter, Used
from job_runner.watchdog import Pulse, Watchdog
from job_runner.work import Work
from task_contract.errors import AttemptStalled, AttemptTimeout, HandedBack, InvalidTask, TaskError
from task_contract.lifecycle import ExitCode, exit_code
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import Action, ProcessingTask, Stage, TaskType, format_duration, parse_manifest
from task_contract.tracing import trace_of

RECORD_SECONDS: Final = 5.0
"""How long the result row may take: the termination message, or the report of a worker, says the same."""
USAGE_SECONDS: Final = 2.0
"""How long the row of what was used may take: figures, of which nothing else depends on one."""

log = structlog.get_logger(__name__)


def read_task(path: Path) -> ProcessingTask:
    """Read a manifest, JSON or YAML. Raises InvalidTask.

    A task that comes from the API server (it has a uid) was checked there, perhaps by a newer release: unknown fields are
    ignored. In a file that a person wrote they are refused.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidTask(f"cannot read the task file {path}: {error}") from error
    manifest = _parse(text, path)
    if not isinstance(manifest, dict):
        raise InvalidTask(f"cannot read the task file {path}: it holds no object; give one ProcessingTask manifest")
    metadata = manifest.get("metadata")
    if isinstance(metadata, dict) and metadata.get("uid"):
        return known_task(manifest, called=f"task file {path}")
    return parse_manifest(manifest)


def known_task(manifest: object, *, called: str) -> ProcessingTask:
    """Return a task that the API server has checked. Raises InvalidTask where this release cannot read it all the same."""
    try:
        return ProcessingTask.model_validate(manifest)
    except ValueError as error:
        raise InvalidTask(f"cannot read the {called}: {error}") from error


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidTask(f"cannot read the task file {path}: it is neither JSON nor YAML: {error}") from error


def identity(task: ProcessingTask) -> tuple[UUID, datetime]:
    """Return uid and creation time of a task; a task outside a cluster is a new one each time, made now."""
    try:
        uid = uuid4() if task.metadata.uid is None else UUID(task.metadata.uid)
    except ValueError as error:
        raise InvalidTask(f"cannot use metadata.uid {task.metadata.uid!r}: it is no UUID; leave it out") from error
    created_at = task.metadata.creation_timestamp or datetime.now(UTC)
    return uid, created_at if created_at.tzinfo else created_at.replace(tzinfo=UTC)


class _Reported:
    """Progress whose reports are signs of work."""

    def __init__(self, progress: Progress, pulse: Pulse) -> None:
        self._progress = progress
        self._pulse = pulse

    def report(self, stage: Stage, percent: int, *, counted: tuple[int, int] | None = None) -> None:
        self._pulse.beat(stage)
        self._progress.report(stage, percent, counted=counted)


async def run_attempt(
    task: ProcessingTask,
    *,
    settings: Settings,
    started: float,
    make: Callable[..., Embedder] = make_embedder,
    last_resort: Callable[[AttemptOutcome, ExitCode], None] | None = None,
) -> tuple[AttemptOutcome, ExitCode]:
    """Carry out a task in a process of its own; ``started`` is the monotonic time at which the process started.

    Never raises for anything that a task, a store or a signal can do: the outcome says it. The result row is written; the
    caller writes the termination message. ``last_resort`` is called from another thread when the attempt hangs and the event
    loop with it: it ends the process. Without it nothing does.
    """
    uid, created_at = identity(task)
    name_in_logs(task, uid, settings.attempt)
    ledger = Ledger(settings.postgres_url.get_secret_value())
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(ledger.aclose)
        progress: Progress = SilentProgress()
        if (redis_url := revealed(settings.redis_url)) is not None:
            progress = await stack.enter_async_context(
                RedisProgress(redis_url, task=task, uid=str(uid), attempt=settings.attempt)
            )
        attempt = Attempt(
            Work(
                task, uid=uid, created_at=created_at, settings=settings, ledger=ledger, progress=progress, make_embedder=make
            ),
            until=started + task.spec.effective_timeout.total_seconds(),
            meter=Meter(since=started),
            last_resort=last_resort,
        )
        # They stay until the loop is closed: a signal that comes while the outcome is being written must not cut it off.
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, attempt.hand_back)
        outcome, code = await attempt.run()
        try:
            async with asyncio.timeout(RECORD_SECONDS):
                if says_of_the_task(outcome, task):
                    await ledger.record([Ended(uid, settings.holder, outcome)])
        except (TaskError, TimeoutError) as error:
            log.warning("the result is not in PostgreSQL; the termination message says the same", error=str(error))
        else:
            await record_usage(ledger, [attempt.used(outcome)])
    return outcome, code


async def record_usage(ledger: Ledger, used: Sequence[Used]) -> None:
    """Enter what attempts have used, in a time that it can do without."""
    try:
        async with asyncio.timeout(USAGE_SECONDS):
            await ledger.record_usage(used)
    except (TaskError, TimeoutError) as error:
        log.warning("what was used is not in PostgreSQL", attempts=len(used), error=str(error))


def name_in_logs(task: ProcessingTask, uid: UUID, attempt: int) -> None:
    """Have all that is logged from now on, in this asyncio task and in what it starts, name an attempt."""
    structlog.contextvars.bind_contextvars(
        task=f"{task.metadata.namespace}/{task.metadata.name}",
        uid=str(uid),
        attempt=attempt,
        trace_id=trace_of(task.metadata.annotations, uid=str(uid)),
    )


class Attempt:
    """One attempt at one task. A process may have any number of them, one after the other and at once."""

    def __init__(
        self,
        work: Work,
        *,
        until: float,
        meter: Meter,
        last_resort: Callable[[AttemptOutcome, ExitCode], None] | None = None,
    ) -> None:
        """``until``: the monotonic time at which it has taken too long. ``last_resort`` as of :func:`run_attempt`."""
        self._pulse = Pulse()
        self._work = replace(work, progress=_Reported(work.progress, self._pulse))
        self._until = until
        self._meter = meter
        self._last_resort = last_resort
        self._why: TaskError | None = None
        self._current: asyncio.Task[AttemptOutcome] | None = None

    async def run(self) -> tuple[AttemptOutcome, ExitCode]:
        """Do the work within its time, while it makes progress and until it is stopped; return how it ended.

        Never raises for anything that a task, a store or a signal can do.
        """
        async with PROCESS.metered(self._meter):
            outcome, code = await self._ended()
        return _with_log(outcome, self._work.settings), code

    def used(self, outcome: AttemptOutcome) -> Used:
        """Return what it has used, after its end."""
        work = self._work
        return Used(work.task, work.uid, work.settings.attempt, work.settings.holder, outcome.outcome, self._meter.usage)

    def stop(self, error: TaskError) -> None:
        """End it with an error, soon: cancel, and again each second, as a library may swallow a cancellation that meets its
        own timeout. To be handed back comes before other reasons, and of those the first one counts."""
        self._why = error if isinstance(error, HandedBack) else self._why or error
        if self._current is not None and not self._current.done():
            self._current.cancel()
            asyncio.get_running_loop().call_later(1, self.stop, error)

    def hand_back(self) -> None:
        """End it uncounted: the process was asked to stop."""
        log.info("asked to stop: the attempt is handed back")
        self.stop(HandedBack("cannot go on: the process was asked to stop; the attempt is handed back"))

    async def _ended(self) -> tuple[AttemptOutcome, ExitCode]:
        loop = asyncio.get_running_loop()
        # Monotonic clocks of Linux are one clock: loop.time() and time.monotonic() agree.
        timer = loop.call_at(self._until, self._late)
        watchdog = Watchdog(
            self._pulse,
            limit=self._work.task.spec.effective_stall_timeout.total_seconds(),
            on_stall=lambda: self.stop(self._stalled()),
            in_loop=loop.call_soon_threadsafe,
            last_resort=self._last_resort and self._end_all,
        )
        try:
            with watchdog:
                self._current = asyncio.create_task(_carried_out(self._work))
                if self._why is not None:  # stopped before it had begun
                    self._current.cancel()
                outcome = await self._current
        except asyncio.CancelledError:
            error = self._why or TaskError(
                "cannot go on: the work was canceled; this is an error of the runner, see its log"
            )
        except TaskError as raised:
            error = raised
        except Exception as raised:
            log.exception("the runner failed")
            error = TaskError(
                f"cannot go on: {type(raised).__name__}: {raised}; this is an error of the runner, see its log"
            )
        else:
            return outcome, ExitCode.SUCCEEDED if outcome.error is None else ExitCode.RETRYABLE
        finally:
            timer.cancel()
        return AttemptOutcome.of_error(error, attempt=self._work.settings.attempt), exit_code(error)

    def _late(self) -> None:
        most = format_duration(self._work.task.spec.effective_timeout)
        self.stop(AttemptTimeout(f"cannot finish within {most}; raise spec.timeout or split the document"))

    def _stalled(self) -> AttemptStalled:
        stage, limit = self._pulse.stage, self._work.task.spec.effective_stall_timeout
        at = "" if stage is None else f" in stage {stage}"
        return AttemptStalled(
            f"cannot go on: no progress{at} for {format_duration(limit)}; the stacks in the pod's log say what it hangs in, "
            "raise spec.stallTimeout if it may take so long",
            stage=stage,
        )

    def _end_all(self) -> None:
        assert self._last_resort is not None  # noqa: S101 - for the type checker: it is called only then
        outcome = AttemptOutcome.of_error(error := self._stalled(), attempt=self._work.settings.attempt)
        self._last_resort(_with_log(outcome, self._work.settings), exit_code(error))


def says_of_the_task(outcome: AttemptOutcome, task: ProcessingTask) -> bool:
    """Whether an outcome is that of the whole attempt. Of a batch it is that of a shard, unless it ends all of them."""
    permanent = outcome.error is not None and not outcome.error.retryable and outcome.outcome is Outcome.FAILED
    return task.spec.type is not TaskType.BATCH_PROCESSING or permanent


def _with_log(outcome: AttemptOutcome, settings: Settings) -> AttemptOutcome:
    """Add the last lines of the log to a failure: they outlive the pod."""
    if outcome.outcome not in {Outcome.FAILED, Outcome.FENCED}:
        return outcome
    return outcome.model_copy(update={"log": logs.tail(secrets=settings.secrets)})


async def _carried_out(work: Work) -> AttemptOutcome:
    """Do what the type of the task asks for. Raises errors of :mod:`task_contract.errors`."""
    carry_out = _TYPES.get(work.task.spec.type)
    if carry_out is None:
        raise InvalidTask(f"cannot carry out {work.task.spec.type}: this version has {', '.join(_TYPES)}")
    return await carry_out(work)


async def _document(work: Work) -> AttemptOutcome:
    if work.task.spec.effective_action is not Action.UPSERT:  # no model, and nothing is created
        return work.succeeded(await Deletion(work, open_stores=opener(work.settings, dimension=0)).run())
    async with contextlib.aclosing(Indexing()) as indexing:
        return work.succeeded(await indexing.process(work))


async def _batch(work: Work) -> AttemptOutcome:
    return await Batch(work).run()


async def _indexing(work: Work) -> AttemptOutcome:
    if work.task.spec.effective_action is Action.PURGE:
        return work.succeeded(await Deletion(work, open_stores=opener(work.settings, dimension=0)).run())
    return work.succeeded(await KnowledgeIndexing(work, open_labelled=labelled_opener(work.settings)).run())


async def _health_check(work: Work) -> AttemptOutcome:
    embedder = await work.embedder()
    work.progress.report(Stage.CHECK, 0)
    started = time.monotonic()
    asked = health.checks(work.task.spec.payload.components, settings=work.settings, ledger=work.ledger, embedder=embedder)
    if work.shared_checks is None:
        await health.warm_up(asked, embedder=embedder)
        result = await health.check(asked)
    else:
        result = await work.shared_checks.check(asked, embedder=embedder)
    result = result.model_copy(update={"seconds": {str(Stage.CHECK): round(time.monotonic() - started, 3)}})
    work.progress.report(Stage.CHECK, 100)
    if (error := health.unhealthy(result)) is None:
        return AttemptOutcome(outcome=Outcome.SUCCEEDED, attempt=work.settings.attempt, result=result)
    error.stage = Stage.CHECK
    # The components that are well stand beside those that are not.
    return AttemptOutcome.of_error(error, attempt=work.settings.attempt).model_copy(update={"result": result})


async def _vector_storage(work: Work) -> AttemptOutcome:
    from job_runner.vector_storage import vector_storage  # with numpy, which others import when they need it

    return await vector_storage(work)


_TYPES: Final[Mapping[TaskType, Callable[[Work], Awaitable[AttemptOutcome]]]] = {
    TaskType.DOCUMENT_PROCESSING: _document,
    TaskType.BATCH_PROCESSING: _batch,
    TaskType.EMBEDDING_GENERATION: embedding_generation,
    TaskType.VECTOR_STORAGE: _vector_storage,
    TaskType.HEALTH_CHECK: _health_check,
    TaskType.KNOWLEDGE_INDEXING: _indexing,
}


def write_termination_message(outcome: AttemptOutcome, path: Path) -> None:
    """Write the message where the kubelet looks for it; outside a pod there is no such file and nothing to do."""
    try:
        with path.open("r+") as file:
            file.write(outcome.termination_message())
            file.truncate()
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("cannot write the termination message", path=str(path), error=str(error))
