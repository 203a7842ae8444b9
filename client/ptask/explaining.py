"""Gathers what :mod:`ptask.why` explains, as far as the caller may read it."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from ptask.logs import in_pool, pod_labels
from ptask.tables import FINISHED, Manifest, phase_of, status_of
from ptask.why import Known
from service_client.errors import TaskForbidden, TaskNotFound
from task_contract import names

if TYPE_CHECKING:
    from ptask.cluster import Cluster

T = TypeVar("T")


def _others(task: Manifest) -> list[str]:
    """Return the names of the tasks that one needs."""
    spec = task.get("spec", {})
    other = (spec.get("payload") or {}).get("fromTask")
    return [*([other] if other else []), *(spec.get("dependsOn") or ())]


def gather(cluster: "Cluster", name: str) -> Known:
    """Return what is known of a task."""
    from ptask.cluster import DEPLOYMENTS, POOLS

    task = cluster.task(name)
    namespace, uid = task["metadata"]["namespace"], task["metadata"]["uid"]
    unread: list[str] = []

    def may(what: str, ask: Callable[[], T]) -> T | None:
        try:
            return ask()
        except TaskForbidden:
            unread.append(what)
        except TaskNotFound:
            pass  # no such kind, or it went in between
        return None

    if phase_of(task) in FINISHED:  # its status says it all
        return Known(task, now=datetime.now(UTC))
    status = status_of(task)
    pods: Sequence[Manifest] | None = []
    if status.get("job") and (attempt := status.get("attempt")):
        labels = pod_labels(task, attempt=None if in_pool(task) else int(attempt))
        pods = may("pods", lambda: cluster.pods(namespace, labels))
    events: Sequence[Manifest] | None = may("events", lambda: cluster.events(namespace, uid=uid))
    if pods and events is not None:
        pod = pods[-1]["metadata"]["uid"]
        events = [*events, *(may("events of pods", lambda: cluster.events(namespace, uid=pod)) or ())]
    pools: Sequence[Manifest] | None = ()
    if "pool" in {status.get("executor"), task.get("spec", {}).get("executor")}:
        pools = may("worker pools", lambda: cluster.items(POOLS, namespace))
    needed = {other: may("the tasks that it needs", partial(cluster.task, other)) for other in _others(task)}
    operators: Sequence[Manifest] | None = None
    if not status.get("observedGeneration"):
        selector = f"app.kubernetes.io/component=operator,app.kubernetes.io/part-of={names.PART_OF}"
        operators = may("deployments", lambda: cluster.items(DEPLOYMENTS, None, labels=selector))
    return Known(
        task,
        now=datetime.now(UTC),
        pods=pods,
        events=events,
        pools=pools,
        needed=needed,
        operators=operators,
        unread=[what for what in dict.fromkeys(unread) if what != "deployments"],
    )
