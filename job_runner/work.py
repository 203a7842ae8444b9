"""What every type of task is given to work with."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from job_runner.embed import Embedder
from job_runner.ledger import Ledger
from job_runner.progress import Progress
from job_runner.settings import Settings
from task_contract.messages import AttemptOutcome, Outcome
from task_contract.models import ProcessingTask, Result, Stage


@dataclass(frozen=True, slots=True)
class Done:
    """How a task ended well. ``reason`` is Completed, Unchanged, Superseded or Deleted."""

    reason: str
    result: Result


@dataclass(frozen=True, slots=True)
class Work:
    """One attempt at one task."""

    task: ProcessingTask
    uid: UUID
    """Of the task."""
    created_at: datetime
    """Creation of the task, with its time zone: the order of tasks."""
    settings: Settings
    ledger: Ledger
    progress: Progress
    make_embedder: Callable[..., Embedder]
    """As :func:`job_runner.embed.make_embedder`."""

    async def embedder(self) -> Embedder:
        """Return the model of the settings, not loaded yet. Raises ModelUnavailable."""
        settings = self.settings
        return await asyncio.to_thread(self.make_embedder, settings.embedding_model, threads=settings.threads)

    def succeeded(self, done: Done) -> AttemptOutcome:
        """Return the outcome of an attempt that ended well, and report it."""
        self.progress.report(Stage.PUBLISH, 100)
        return AttemptOutcome(
            outcome=Outcome.SUCCEEDED, attempt=self.settings.attempt, reason=done.reason, result=done.result
        )
