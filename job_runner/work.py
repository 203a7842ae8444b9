"""What every type of task is given to work with."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from uuid import UUID

from job_runner.embed import Embedder, find_embedder
from job_runner.health import SharedChecks
from job_runner.ledger import Ledger
from job_runner.progress import Progress
from job_runner.settings import Settings
from job_runner.shared_model import SharedModels
from task_contract.errors import ModelUnavailable
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
    shared_checks: SharedChecks | None = None
    """Of a worker, whose health checks have their answers in common."""

    async def embedder(self, name: str | None = None, fingerprint: str | None = None) -> Embedder:
        """Return a model of the settings, not loaded yet, as :func:`job_runner.embed.find_embedder` finds it."""
        if isinstance(self.make_embedder, SharedModels) and fingerprint is None:
            known = self.make_embedder.known(name or self.settings.models[0])
            if known is not None:  # no thread is needed, which would cost as much as a small task
                return known
        make = partial(self.make_embedder, threads=self.settings.threads)
        found = partial(find_embedder, self.settings.models, make, name=name, fingerprint=fingerprint)
        return await asyncio.to_thread(found)

    async def embedder_of_knowledge_base(self) -> Embedder:
        """Return the model that the task names, else that of its knowledge base if the runner has it, else the default.

        The ledger refuses the default where the knowledge base was filled by another model, and says which.
        """
        spec, settings = self.task.spec, self.settings
        if spec.payload.embedding_model is None and spec.kb_id is not None and settings.embedding_models:
            known = await self.ledger.knowledge_base(namespace=self.task.metadata.namespace, kb_id=spec.kb_id)
            if known is not None and (fingerprint := known[1]):  # of one with deletions alone there is none yet
                with contextlib.suppress(ModelUnavailable):
                    return await self.embedder(fingerprint=fingerprint)
        return await self.embedder(spec.payload.embedding_model)

    def succeeded(self, done: Done) -> AttemptOutcome:
        """Return the outcome of an attempt that ended well, and report it."""
        self.progress.report(Stage.PUBLISH, 100)
        return AttemptOutcome(
            outcome=Outcome.SUCCEEDED, attempt=self.settings.attempt, reason=done.reason, result=done.result
        )
