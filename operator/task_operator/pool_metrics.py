"""Prometheus metrics of worker pools. Labels are namespace and name of the pool: there are few."""

from collections.abc import Sequence
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from task_contract.leases import WorkerState
from task_contract.pools import PoolStatus
from task_operator.metrics import Metrics

_LABELS: Final = ("namespace", "pool")


class PoolMetrics:
    """What is counted of pools, in the registry of the operator's metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._all = metrics
        registry = metrics.registry
        self._gauges = {
            name: Gauge(name, about, _LABELS, registry=registry)
            for name, about in {
                "worker_pool_active_count": "Workers that have a task.",
                "worker_pool_idle_count": "Workers that have none, and take one.",
                "task_pool_workers": "Workers that there are, also those that start or drain.",
                "task_pool_workers_desired": "Workers that there are to be.",
                "task_pool_queued": "Tasks that wait for a worker.",
                "task_pool_oldest_seconds": "So long the first of them has been waiting.",
                "task_pool_lease_age_seconds": "Longest silence of a worker that has tasks.",
            }.items()
        }
        self._counters = {
            name: Counter(name, about, _LABELS, registry=registry)
            for name, about in {
                "task_pool_attempts": "Attempts that workers have ended.",
                "task_pool_renewals": "Renewals of leases.",
                "task_pool_leases_expired": "Leases that ran out: the worker was silent.",
                "task_pool_model_calls": "Calls of the model.",
                "task_pool_batch_texts": "Texts in them.",
                "task_pool_batch_room": "Texts that would have fitted: what the texts fill of it is the fill of batches.",
            }.items()
        }
        self._load = Histogram(
            "task_pool_load_seconds",
            "From the start of a worker to the first task that it could take.",
            _LABELS,
            buckets=(0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
            registry=registry,
        )

    def seen(self, namespace: str, pool: str, status: PoolStatus, *, oldest_seconds: float) -> None:
        """Note how a pool was seen."""
        for name, value in {
            "worker_pool_active_count": status.busy,
            "worker_pool_idle_count": status.idle,
            "task_pool_workers": status.replicas,
            "task_pool_workers_desired": status.desired,
            "task_pool_queued": status.queued,
            "task_pool_oldest_seconds": oldest_seconds,
        }.items():
            self._gauges[name].labels(namespace, pool).set(value)

    def leases(self, namespace: str, pool: str, *, age: float, expired: int) -> None:
        """Note the longest silence of a worker with tasks, in seconds, and leases that have just run out."""
        self._gauges["task_pool_lease_age_seconds"].labels(namespace, pool).set(age)
        self._counters["task_pool_leases_expired"].labels(namespace, pool).inc(expired)

    def worked(self, namespace: str, pool: str, *, before: WorkerState, now: WorkerState) -> None:
        """Count what a worker has done between two states. One that counts less than before has begun anew."""
        for name, old, new in (
            ("task_pool_attempts", before.tasks, now.tasks),
            ("task_pool_renewals", before.renewals, now.renewals),
            ("task_pool_model_calls", before.calls, now.calls),
            ("task_pool_batch_texts", before.texts, now.texts),
            ("task_pool_batch_room", before.room, now.room),
        ):
            self._counters[name].labels(namespace, pool).inc(new - old if new >= old else new)
        if now.ready and not before.ready:
            self._load.labels(namespace, pool).observe(now.load_seconds)

    def wrote(self) -> None:
        """Count the write of a status."""
        self._all.status_writes.inc()

    def forget(self, namespace: str, pool: str) -> None:
        """A pool is gone, and its numbers with it."""
        for family in self.families:
            family.remove(namespace, pool)

    @property
    def families(self) -> Sequence[Counter | Gauge | Histogram]:
        """All of them."""
        return *self._gauges.values(), *self._counters.values(), self._load
