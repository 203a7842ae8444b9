"""What can go wrong with a task, as one small tree that knows neither Kubernetes nor HTTP.

::

    TaskError
    ├── PermanentError            the same input fails again: ends the task
    │   ├── InvalidTask           the spec itself
    │   ├── DocumentNotFound
    │   ├── DocumentRefused       a place that is not allowed, too large, a kind that is not read
    │   ├── DocumentUnreadable    damaged, encrypted or lying about its type
    │   ├── DocumentEmpty         no text in it
    │   ├── DuplicateDocument     another document of the batch has the same documentId
    │   ├── ModelMismatch         the knowledge base was filled by another embedding model
    │   ├── ModelUnavailable      the runner's image has not the embedding model of its settings, or a damaged one
    │   ├── KnowledgeBaseNotFound the knowledge base that is to be rebuilt, rolled back, repaired or analyzed
    │   ├── NothingToRollBack     no generation is kept that served before
    │   ├── RecallDropped         a new generation finds less than the one that serves, which goes on serving
    │   ├── ChunksLost            neither store has some of the chunks that readers should see
    │   ├── StoreCapacity         a store's limit on collections, shards or fields
    │   └── StoreRefused          a store does not take these rows: a value too long, columns of another kind
    ├── RetryableError            another attempt may succeed: counted against spec.retry.limit
    │   ├── AttemptTimeout
    │   ├── AttemptStalled        no progress for spec.stallTimeout
    │   ├── ParserCrashed         killed for memory or time, or a crash of the child process
    │   ├── StoresDisagree        read-back of the two stores did not find the expected chunks
    │   ├── DocumentChanged       the file was written to while it was read
    │   └── Unhealthy             a health check found a component that does not work
    ├── GivenBack                 not the task's fault: it waits, and nothing is counted
    │   ├── StoreUnavailable
    │   │   └── SourceUnavailable the server that has the document is down, or how to reach it is not configured
    │   ├── KnowledgeBaseBusy     another task rebuilds, repairs or analyzes it
    │   ├── TaskUnfinished        the task whose vectors are to be stored has not ended yet
    │   └── HandedBack            SIGTERM
    └── Fenced                    canceled, or another pod holds the attempt: this one must not write

Each class has a ``reason`` that is part of the API: it stands in conditions, in ``status.error`` and in metrics. A message
starts with what could not be done and ends with the remedy, when there is one.
"""

from typing import ClassVar


class TaskError(Exception):
    """Base of the tree. ``stage`` is filled in by the pipeline where it is known."""

    reason: ClassVar[str] = "InternalError"
    retryable: ClassVar[bool] = True

    def __init__(self, message: str, *, stage: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.stage = stage


class PermanentError(TaskError):
    """The same input fails again."""

    reason = "PermanentError"
    retryable = False


class InvalidTask(PermanentError):
    """The spec cannot be carried out as it is."""

    reason = "InvalidTask"


class DocumentNotFound(PermanentError):
    """Nothing at ``payload.filePath``."""

    reason = "DocumentNotFound"


class DocumentRefused(PermanentError):
    """It will not be read: outside the document volume, an address or bucket that is not allowed, too large, of a kind that
    is not supported."""

    reason = "DocumentRefused"


class DuplicateDocument(PermanentError):
    """Another document of the batch has the same documentId, and would replace this one or be replaced by it."""

    reason = "DuplicateDocument"


class DocumentUnreadable(PermanentError):
    """The file is damaged, encrypted or not what it says it is."""

    reason = "DocumentUnreadable"


class DocumentEmpty(PermanentError):
    """The file was read and has no text in it."""

    reason = "DocumentEmpty"


class ModelMismatch(PermanentError):
    """The knowledge base was filled by another embedding model; vectors of two models cannot be compared."""

    reason = "ModelMismatch"


class ModelUnavailable(PermanentError):
    """The embedding model that the runner's settings name is not in its image, or damaged."""

    reason = "ModelUnavailable"


class KnowledgeBaseNotFound(PermanentError):
    """The namespace has no such knowledge base."""

    reason = "KnowledgeBaseNotFound"


class NothingToRollBack(PermanentError):
    """No generation is kept that served before the present one."""

    reason = "NothingToRollBack"


class RecallDropped(PermanentError):
    """The gate of a rebuild: the new generation finds less than the one that serves, by more than payload.maxRecallDrop."""

    reason = "RecallDropped"


class ChunksLost(PermanentError):
    """Neither store has some of the chunks of a published version; their documents have to be processed again."""

    reason = "ChunksLost"


class StoreCapacity(PermanentError):
    """A store's own limit is reached (collections, shards, fields)."""

    reason = "StoreCapacity"


class StoreRefused(PermanentError):
    """A store refuses the rows for what they are: a value that is too long, a column of another kind."""

    reason = "StoreRefused"


class RetryableError(TaskError):
    """Another attempt may succeed."""

    reason = "RetryableError"


class AttemptTimeout(RetryableError):
    """The attempt took longer than ``spec.timeout``."""

    reason = "Timeout"


class AttemptStalled(RetryableError):
    """No progress for ``spec.stallTimeout``. The reason is not Stalled, which is a condition of every failed task."""

    reason = "NoProgress"


class ParserCrashed(RetryableError):
    """The parsing child process died: memory, time, or a crash of a library."""

    reason = "ParserCrashed"


class StoresDisagree(RetryableError):
    """After writing, a store did not hold exactly the expected chunk ids."""

    reason = "StoresDisagree"


class DocumentChanged(RetryableError):
    """The file was written to while it was read."""

    reason = "DocumentChanged"


class Unhealthy(RetryableError):
    """A health check found a component that does not work; ``result.components`` says which."""

    reason = "Unhealthy"


class GivenBack(TaskError):
    """Waiting is the cure: the attempt is not counted, and the task looks again until its deadline."""


class StoreUnavailable(GivenBack):
    """PostgreSQL, Milvus or Elasticsearch cannot be reached."""

    reason = "StoreUnavailable"


class SourceUnavailable(StoreUnavailable):
    """The server that has the document does not answer or is not configured. A reason of its own: the stores are well."""

    reason = "SourceUnavailable"


class KnowledgeBaseBusy(GivenBack):
    """Another task rebuilds, rolls back, repairs or analyzes the knowledge base: one at a time does."""

    reason = "KnowledgeBaseBusy"


class TaskUnfinished(GivenBack):
    """The task that ``payload.fromTask`` names is not Completed yet."""

    reason = "TaskUnfinished"


class HandedBack(GivenBack):
    """The process was asked to stop and gives the attempt back."""

    reason = "HandedBack"


class Fenced(TaskError):
    """The fence of this attempt was raised; the process must write nothing more."""

    reason = "Fenced"
    retryable = False
