"""Kubernetes Events about tasks: what ``kubectl describe ptask`` shows. Retries, failures, long waits, and
callbacks that were given up; nothing else.

Best effort, and never in the way: an Event is made after the status write that it tells of has succeeded, waits in a
bounded queue, and is sent by a task of its own, one at a time. What cannot be sent is counted and forgotten: the status
says it all. An Event's name follows from the task and what happened, so that whoever tells it again is answered with
AlreadyExists.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog

from task_contract.models import Metadata, Phase, Status, format_duration
from task_contract.names import API_VERSION, GROUP, KIND, digest
from task_operator.metrics import Metrics
from task_operator.outbox import Told
from task_platform.kubernetes import ClusterError, Conflict, Manifest

_log = structlog.get_logger(__name__)

REPORTER: Final = f"{GROUP}/operator"
LONG: Final = timedelta(minutes=1)
"""A wait of this length is told once."""
_QUIET: Final = frozenset({"Suspended", "JobSuspended"})  # somebody wanted it so
_NOTE: Final = 1024  # bytes: the API server's bound
_NAME: Final = 230  # characters of 253: the rest is the digest
_WAITING: Final = 500  # Events: about half a megabyte
_PACE: Final = 0.05  # seconds between two Events: a thousand failures at once are no load for the API server
_LOG_INTERVAL: Final = 60.0  # seconds


def of_transition(metadata: Metadata, before: Status, after: Status, *, now: datetime) -> Manifest | None:
    """Return the Event of a status write; None for one that is none of a retry or a failure."""
    if after.phase is before.phase or after.error is None:
        return None
    match after.phase:
        case Phase.RETRYING:
            at = "" if after.retry_at is None else f"; the next one starts at {after.retry_at.astimezone(UTC):%H:%M:%SZ}"
            note = f"attempt {after.attempt} failed ({after.error.reason}): {after.error.message}{at}"
            return _event(metadata, after, "Retrying", "Retry", note, str(after.attempt), now=now)
        case Phase.FAILED:
            return _event(metadata, after, "Failed", "Fail", f"{after.error.reason}: {after.error.message}", "", now=now)
        case _:
            return None


def of_wait(metadata: Metadata, status: Status, *, now: datetime) -> Manifest | None:
    """Return the Event of a task that has waited for long; None while it has not. The same wait gives the same name."""
    queue = status.queue
    if status.phase.finished or queue is None or queue.since is None or queue.reason in _QUIET:
        return None
    waited = now - queue.since
    if waited < LONG:
        return None
    seconds = timedelta(seconds=int(waited.total_seconds()))
    note = f"waiting for {format_duration(seconds)} ({queue.reason}): {queue.message or 'no more is known'}"
    return _event(metadata, status, "Waiting", "Wait", note, f"{queue.reason} {queue.since.isoformat()}", now=now)


def of_dead_callback(callback: Told, *, now: datetime) -> Manifest:
    """Return the Event of a callback that was given up."""
    metadata = Metadata(name=callback.name, namespace=callback.namespace, uid=callback.task_uid)
    note = f"the callback was given up: {callback.error}; correct what is wrong and send it again, see docs/callbacks.md"
    which = "" if callback.last_attempt_at is None else callback.last_attempt_at.isoformat()
    return _event(metadata, Status(), "CallbackDead", "Callback", note, which, now=now)


def _event(
    metadata: Metadata, status: Status, reason: str, action: str, note: str, which: str, *, now: datetime
) -> Manifest:
    """Return an Event; ``which`` tells it from others of the same task and reason."""
    mark = digest(metadata.uid or "", reason, which, length=16)
    where = {"namespace": metadata.namespace}
    event: Manifest = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{metadata.name[:_NAME].rstrip('.-')}.{mark}", **where},
        "eventTime": now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "type": "Warning",
        "reason": reason,
        "action": action,
        "note": _cut(note),
        "regarding": {"apiVersion": API_VERSION, "kind": KIND, "name": metadata.name, "uid": metadata.uid, **where},
    }
    if status.job is not None:
        event["related"] = {"apiVersion": "batch/v1", "kind": "Job", "name": status.job, **where}
    return event


def _cut(note: str) -> str:
    data = note.encode()
    return note if len(data) <= _NOTE else data[: _NOTE - 3].decode(errors="ignore") + "…"


class Events:
    """Sends Events as the operator."""

    def __init__(
        self,
        create: Callable[[Manifest], Awaitable[object]],
        *,
        instance: str,
        labels: Mapping[str, str],
        metrics: Metrics,
        pace: float = _PACE,
    ) -> None:
        """``instance`` names this process (its host or pod); ``labels`` are put on each Event."""
        self._create = create
        self._instance = instance[:128]
        self._labels = dict(labels)
        self._metrics = metrics
        self._pace = pace
        self._waiting: deque[Manifest] = deque()
        self._wake = asyncio.Event()
        self._logged_at = float("-inf")

    def submit(self, event: Manifest) -> None:
        """Have an Event sent; returns at once. When too many wait it is dropped."""
        if len(self._waiting) >= _WAITING:
            self._metrics.events.labels("dropped").inc()
            return
        self._waiting.append(event)
        self._wake.set()

    async def run(self) -> None:
        """Send what was submitted until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                await self._send(self._waiting.popleft())
                await asyncio.sleep(self._pace)

    async def _send(self, event: Manifest) -> None:
        whole = event | {
            "metadata": event["metadata"] | {"labels": self._labels},
            "reportingController": REPORTER,
            "reportingInstance": self._instance,
        }
        try:
            await self._create(whole)
        except Conflict:
            self._metrics.events.labels("known").inc()
        except ClusterError as error:
            self._metrics.events.labels("failed").inc()
            now = asyncio.get_running_loop().time()
            if now - self._logged_at >= _LOG_INTERVAL:
                self._logged_at = now
                _log.warning("cannot tell an Event; it is left out", error=error.message)
        else:
            self._metrics.events.labels("sent").inc()
