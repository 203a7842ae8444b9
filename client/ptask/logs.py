"""Logs of a task: of the pods of its attempts while they are there, after that the lines that its status keeps.

A task in a Job has pods of its own, one a shard for a batch. One in a pool has lines among those of a worker, which are told
by the task's uid; each line of a runner is a JSON object that has it.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from ptask.outcomes import CommandError, Exit, of_phases
from ptask.tables import FINISHED, Manifest, phase_of, status_of
from service_client.errors import TaskClientError, TaskForbidden, TaskNotFound, TaskRefused
from task_contract import names

if TYPE_CHECKING:
    from ptask.cluster import Cluster
    from ptask.screen import Screen

_LOOK: Final = 1.0  # seconds between two looks at task and pods
_LAST: Final = 5.0  # seconds after the end of a task in which the ends of its logs still come


def in_pool(task: Manifest) -> bool:
    """Whether a worker of a pool has the task."""
    return str(status_of(task).get("executor") or "") == "pool"


def pod_labels(task: Manifest, *, attempt: int | None = None) -> str:
    """Return the labels of the pods that write, or wrote, the log of a task: a Job's own, or those of a worker's Job."""
    if in_pool(task):
        return f"batch.kubernetes.io/job-name={status_of(task).get('job') or ''}"
    labels = f"{names.TASK_UID_LABEL}={task['metadata']['uid']}"
    return labels if attempt is None else f"{labels},{names.ATTEMPT_LABEL}={attempt}"


def about(task: Manifest) -> Callable[[bytes], bool]:
    """Return whether a line of a log is about the task: in a pod of its own each is, of a worker those with its uid."""
    if not in_pool(task):
        return lambda line: True
    uid = str(task["metadata"]["uid"])

    def wanted(line: bytes) -> bool:
        if uid.encode() not in line:
            return False
        try:
            said = json.loads(line)
        except ValueError:
            return True
        return not isinstance(said, Mapping) or said.get("uid", uid) == uid

    return wanted


def kept(task: Manifest, tail: int | None) -> str | None:
    """Return the lines that the status of a failed task keeps."""
    log = (status_of(task).get("error") or {}).get("log")
    if not log:
        return None
    lines = str(log).splitlines()
    return "\n".join(lines if tail is None else lines[-tail:] if tail else [])


class _Printer:
    """Whole lines of several pods, one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.broken = threading.Event()

    def line(self, text: bytes, prefix: str) -> None:
        with self._lock:
            try:
                sys.stdout.buffer.write(prefix.encode() + text + b"\n")
                sys.stdout.buffer.flush()
            except (BrokenPipeError, ValueError):
                self.broken.set()


def show(
    cluster: "Cluster", screen: "Screen", name: str, *, follow: bool, tail: int | None, attempt: int | None, prefix: bool
) -> Exit:
    """Print the log of a task; with ``follow`` until it has ended, over all its attempts. Raises :class:`CommandError`."""
    task = cluster.task(name)
    if not follow:
        return _once(cluster, screen, task, tail=tail, attempt=attempt, prefix=prefix)
    return _follow(cluster, screen, task, tail=tail, prefix=prefix)


def _pods(cluster: "Cluster", task: Manifest, attempt: int | None) -> list[dict[str, Any]]:
    if in_pool(task) and not status_of(task).get("job"):
        return []
    return cluster.pods(task["metadata"]["namespace"], pod_labels(task, attempt=attempt))


def _of_attempt(pods: list[dict[str, Any]], attempt: int | None) -> list[dict[str, Any]]:
    """Return the pods of the latest attempt, unless one was asked for."""
    if attempt is not None or not pods:
        return pods
    newest = max(_attempt_of(pod) for pod in pods)
    return [pod for pod in pods if _attempt_of(pod) == newest]


def _attempt_of(pod: Manifest) -> int:
    text = str((pod["metadata"].get("labels") or {}).get(names.ATTEMPT_LABEL, "0"))
    return int(text) if text.isdecimal() else 0


def _short(pod: Manifest) -> str:
    """Return what tells a pod from the others of its task: the index of its shard, or the end of its name."""
    labels = pod["metadata"].get("labels") or {}
    return str(labels.get("batch.kubernetes.io/job-completion-index") or pod["metadata"]["name"].rpartition("-")[2])


def _once(
    cluster: "Cluster", screen: "Screen", task: Manifest, *, tail: int | None, attempt: int | None, prefix: bool
) -> Exit:
    pods = _of_attempt(_pods(cluster, task, attempt), attempt)
    printer, wanted, printed = _Printer(), about(task), False
    for pod in pods:
        name = pod["metadata"]["name"]
        before = f"[{_short(pod)}] " if prefix or len(pods) > 1 else ""
        lines = cluster.log(name, pod["metadata"]["namespace"], follow=False, tail=tail, container=names.CONTAINER)
        with contextlib.suppress(TaskNotFound, TaskRefused) if len(pods) > 1 else _explained(task, name):
            for line in lines:
                if wanted(line):
                    printer.line(line, before)
                    printed = True
    if printed:
        return Exit.DONE
    if (lines_kept := kept(task, tail)) is not None:
        screen.note(f"no pod of task {task['metadata']['name']} is there any more: these are the last lines of its log")
        screen.raw(lines_kept)
        return Exit.DONE
    if pods:
        return Exit.DONE  # it has written nothing yet
    raise CommandError(
        f"cannot show a log of task {task['metadata']['name']}: no pod of it is there, and only of attempts that failed the "
        "last lines are kept; run `ptask why` or, while it runs, `ptask logs -f`"
    )


@contextlib.contextmanager
def _explained(task: Manifest, pod: str) -> Any:
    try:
        yield
    except TaskForbidden:
        raise
    except TaskNotFound:
        pass  # it went in between
    except TaskRefused as error:
        raise CommandError(
            f"cannot show the log of task {task['metadata']['name']}: pod {pod} has not begun to write; run "
            f"`ptask why {task['metadata']['name']}`, or `ptask logs -f` to wait for it"
        ) from error


def _follow(cluster: "Cluster", screen: "Screen", task: Manifest, *, tail: int | None, prefix: bool) -> Exit:
    """Look for pods that have begun to write, read each in a thread, until the task has ended and all are read."""
    name, namespace, uid = task["metadata"]["name"], task["metadata"]["namespace"], task["metadata"]["uid"]
    printer = _Printer()
    readers: dict[str, threading.Thread] = {}
    attempt, ended_at = 0, 0.0
    while not printer.broken.is_set():
        if phase_of(task) in FINISHED and not ended_at:
            ended_at = time.monotonic()
        pods = _of_attempt(_pods(cluster, task, None), None)
        for pod in pods:
            if pod["metadata"]["uid"] in readers or not _begun(pod):
                continue
            if readers and _attempt_of(pod) > attempt:
                screen.note(f"--- attempt {_attempt_of(pod)}, pod {pod['metadata']['name']}")
            attempt = max(attempt, _attempt_of(pod))
            before = f"[{_short(pod)}] " if prefix or len(pods) > 1 else ""
            arguments = (cluster, pod, about(task), printer, before, tail)
            readers[pod["metadata"]["uid"]] = reader = threading.Thread(target=_read, args=arguments, daemon=True)
            reader.start()
        if ended_at:
            # The log of a worker goes on with other tasks; of a pod of its own it ends with it.
            left = ended_at + _LAST - time.monotonic()
            for reader in readers.values():
                reader.join(timeout=max(0.0, left if not in_pool(task) else 1.0))
            break
        time.sleep(_LOOK)
        try:
            task = cluster.task(name, namespace)
        except TaskNotFound:
            break
        if task["metadata"]["uid"] != uid:
            break  # another one of that name
    if not readers and (lines := kept(task, tail)) is not None:
        screen.raw(lines)
    return of_phases([phase_of(task)]) if phase_of(task) in FINISHED else Exit.CANCELED


def _begun(pod: Manifest) -> bool:
    states = [one.get("state") or {} for one in status_of(pod).get("containerStatuses") or ()]
    return any("running" in state or "terminated" in state for state in states)


def _read(
    cluster: "Cluster",
    pod: Manifest,
    wanted: Callable[[bytes], bool],
    printer: _Printer,
    prefix: str,
    tail: int | None,
) -> None:
    name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
    try:
        for line in cluster.log(name, namespace, follow=True, tail=tail, container=names.CONTAINER):
            if printer.broken.is_set():
                return
            if wanted(line):
                printer.line(line, prefix)
    except TaskClientError as error:
        print(f"the log of pod {name} broke off: {error.message}", file=sys.stderr)  # noqa: T201 - for who reads it
