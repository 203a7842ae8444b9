"""Names that operator, runner and callers agree on: API group, labels, object names, store names, chunk ids.

Pure functions over the standard library. Every name is deterministic, so a write that is repeated after a crash meets the
object that the first try made (``409 AlreadyExists``) instead of making a second one.
"""

import hashlib
import re
from datetime import UTC, datetime
from typing import Final

GROUP: Final = "tasks.zzdsj.io"
VERSION: Final = "v1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "ProcessingTask"
PLURAL: Final = "processingtasks"
SHORT_NAME: Final = "ptask"
POOL_KIND: Final = "WorkerPool"
POOL_PLURAL: Final = "workerpools"
POOL_SHORT_NAME: Final = "wpool"
SCHEDULE_KIND: Final = "ProcessingSchedule"
SCHEDULE_PLURAL: Final = "processingschedules"
SCHEDULE_SHORT_NAME: Final = "psched"

PART_OF: Final = "processing-tasks"
"""Value of the label ``app.kubernetes.io/part-of`` on everything that the product makes."""
MANAGED_BY_LABEL: Final = "app.kubernetes.io/managed-by"
MANAGED_BY: Final = "processing-tasks"
"""Value of :data:`MANAGED_BY_LABEL` on every Job of ours; the operator's watch on Jobs selects by it."""

TASK_UID_LABEL: Final = f"{GROUP}/task-uid"
ATTEMPT_LABEL: Final = f"{GROUP}/attempt"
TYPE_LABEL: Final = f"{GROUP}/type"
RESOURCE_CLASS_LABEL: Final = f"{GROUP}/resource-class"
POOL_LABEL: Final = f"{GROUP}/pool"
"""On the Job and the pod of a worker: the name of its pool."""
SLOT_LABEL: Final = f"{GROUP}/slot"
REVISION_LABEL: Final = f"{GROUP}/revision"
TASK_NAME_ANNOTATION: Final = f"{GROUP}/task-name"
"""An annotation, not a label: task names may have 253 characters, label values 63."""
TASK_ANNOTATION: Final = f"{GROUP}/task"
"""On the pod: the task manifest as JSON, handed to the container as a downward-API file."""

SHARDS_ANNOTATION: Final = f"{GROUP}/shards"
"""On the Job of a batch: which shards it is for, by its indexes in order, as ``0-2,7``."""

RETRY_OF_ANNOTATION: Final = f"{GROUP}/retry-of"
"""On a task that was made to do a finished one again: the name of that one."""

SCHEDULE_LABEL: Final = f"{GROUP}/schedule"
"""On a task that a schedule made: the name of the schedule."""
SCHEDULED_AT_ANNOTATION: Final = f"{GROUP}/scheduled-at"
"""On the same: the time that it was made for, as of RFC 3339 in UTC."""

TRACEPARENT_ANNOTATION: Final = f"{GROUP}/traceparent"
"""On a task: the trace of its caller, as of W3C Trace Context."""

TASK_FILE: Final = "/etc/processing-task/task.json"
"""Where the pod finds its task."""
TERMINATION_LOG: Final = "/dev/termination-log"
"""Kubernetes' default ``terminationMessagePath``."""
CONTAINER: Final = "runner"
DOCUMENT_ROOT: Final = "/data"
"""Where the document volume of a task namespace is mounted in its pods."""
OUTPUTS: Final = "outputs"
"""The folder of the document volume that pods write to, of those tasks alone that have an ``outputPath``."""

PROGRESS_CHANNEL: Final = f"{GROUP}:progress"
"""Redis pub/sub channel of :class:`task_contract.messages.ProgressEvent`; what it carries may be lost."""

EVENTS_NOTIFICATION: Final = "task_events"
"""PostgreSQL's channel on which the number of the youngest row of ``task_events`` is told after each commit."""
EVENTS_CHANNEL: Final = f"{GROUP}:events"
"""Redis pub/sub channel of the life-cycle events, as CloudEvents in JSON."""

KNOWLEDGE_BASE_PREFIX: Final = "kb_"
"""Names of collections, indices and aliases begin with it."""

_NAME_LIMIT = 63  # a Job's name becomes a label value of its pods: 63 characters at most


def digest(*parts: str, length: int = 32) -> str:
    """Return the first ``length`` (at most 64) hex digits of the SHA-256 over the parts, unambiguous in their borders."""
    joined = b"".join(len(data).to_bytes(8, "big") + data for data in (part.encode() for part in parts))
    return hashlib.sha256(joined).hexdigest()[:length]


def job_name(*, task_name: str, task_uid: str, attempt: int) -> str:
    """Return the name of the Job of one attempt: at most 63 characters, equal for equal arguments.

    >>> job_name(task_name="handbook", task_uid="0d9f8a52-1b1c-4c7e-9d53-0d5a0a4bd1a7", attempt=1)
    'handbook-1a667239-1'
    """
    suffix = f"-{digest(task_uid, length=8)}-{attempt}"
    prefix = re.sub(r"[^a-z0-9-]", "-", task_name.lower())[: _NAME_LIMIT - len(suffix)].strip("-")
    return f"{prefix or 'task'}{suffix}"


def worker_job_name(*, pool_name: str, pool_uid: str, slot: int, revision: str, number: int) -> str:
    """Return the name of the Job of a worker: ``number`` counts those that the slot has had with this revision.

    >>> worker_job_name(pool_name="texts", pool_uid="0d9f8a52-1b1c-4c7e-9d53-0d5a0a4bd1a7", slot=3, revision="5f", number=1)
    'texts-1a667239-3-5f-1'
    """
    suffix = f"-{digest(pool_uid, length=8)}-{slot}-{revision}-{number}"
    prefix = re.sub(r"[^a-z0-9-]", "-", pool_name.lower())[: _NAME_LIMIT - len(suffix)].strip("-")
    return f"{prefix or 'pool'}{suffix}"


def scheduled_task_name(*, schedule_name: str, schedule_uid: str, at: datetime) -> str:
    """Return the name of the task that a schedule makes for the minute of ``at``: whoever makes it, there is one.

    >>> at = datetime(2026, 11, 28, 3, 0, tzinfo=UTC)
    >>> scheduled_task_name(schedule_name="nightly", schedule_uid="0d9f8a52-1b1c-4c7e-9d53-0d5a0a4bd1a7", at=at)
    'nightly-1a667239-202611280300'
    """
    return f"{schedule_name}-{digest(schedule_uid, length=8)}-{at.astimezone(UTC):%Y%m%d%H%M}"


def knowledge_base_name(*, namespace: str, kb_id: str) -> str:
    """Return the name under which both stores know a knowledge base: the alias readers use.

    Milvus allows letters, digits and underscores; Elasticsearch wants lower case. The digest over namespace and id keeps
    tenants apart that the readable part would mix up.
    """
    readable = re.sub(r"[^a-z0-9]+", "_", kb_id.lower())[:32].strip("_")
    return f"{KNOWLEDGE_BASE_PREFIX}{readable}_{digest(namespace, kb_id, length=12)}"


def generation_name(*, namespace: str, kb_id: str, generation: int) -> str:
    """Return the name of the collection and of the index that hold one generation of a knowledge base."""
    return f"{knowledge_base_name(namespace=namespace, kb_id=kb_id)}_g{generation}"


def chunk_id(*, namespace: str, kb_id: str, document_id: str, version: int, ordinal: int) -> str:
    """Return the primary key of a chunk in both stores: 32 hex digits."""
    return digest(namespace, kb_id, document_id, str(version), str(ordinal))
