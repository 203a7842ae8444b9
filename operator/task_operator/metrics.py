"""Prometheus metrics of the operator. Labels have few values; no task, no knowledge base, no user is named."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from task_contract.models import Phase, Priority, Status

_MINUTES = (0.5, 1, 2.5, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)


class _QueueSize(Collector):
    def __init__(self, count: Callable[[], Mapping[str, int]]) -> None:
        self._count = count

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily("task_queue_size", "Tasks that wait to run.", labels=["priority"])
        counts = self._count()
        for priority in Priority:
            family.add_metric([str(priority)], counts.get(str(priority), 0))
        yield family


class Metrics:
    """All metrics, in a registry of their own, so that tests can have several operators in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.duration = Histogram(
            "task_processing_duration_seconds",
            "From the start of the first attempt to the end of the task.",
            ["type"],
            buckets=_MINUTES,
            registry=self.registry,
        )
        self.succeeded = Counter("task_success", "Tasks that completed.", ["type"], registry=self.registry)
        self.failed = Counter("task_failure", "Tasks that failed.", ["type", "reason"], registry=self.registry)
        self.reconcile_seconds = Histogram(
            "task_operator_reconcile_seconds",
            "One look at one task.",
            buckets=(0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30),
            registry=self.registry,
        )
        self.reconcile_errors = Counter(
            "task_operator_reconcile_errors", "Looks that went wrong.", ["error"], registry=self.registry
        )
        self.queue_depth = Gauge("task_operator_queue_depth", "Tasks due for a look.", registry=self.registry)
        self.status_writes = Counter("task_operator_status_writes", "Status writes.", registry=self.registry)
        self.jobs_created = Counter("task_operator_jobs_created", "Jobs created.", registry=self.registry)
        self.sweep_jobs = Counter("task_operator_sweep_jobs", "Jobs created that sweep the stores.", registry=self.registry)
        self.dead_intents = Counter(
            "task_operator_dead_intents",
            "Tasks barred from publishing after their end.",
            registry=self.registry,
        )
        self.pruned = Counter(
            "task_operator_pruned", "Finished tasks deleted over the budget of a namespace.", registry=self.registry
        )
        self.history_expired = Counter(
            "task_operator_history_expired", "Tasks whose history was deleted from PostgreSQL.", registry=self.registry
        )
        self.callbacks_sent = Counter(
            "task_callbacks_sent", "Deliveries of callbacks that were tried.", ["result"], registry=self.registry
        )
        self.callback_seconds = Histogram(
            "task_callback_seconds",
            "One delivery of a callback.",
            buckets=(0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30),
            registry=self.registry,
        )
        self.callbacks = Gauge("task_callbacks", "Callbacks that are pending, or dead.", ["state"], registry=self.registry)
        self.callbacks_oldest = Gauge(
            "task_callbacks_oldest_pending_seconds", "Age of the oldest callback that is pending.", registry=self.registry
        )
        self.events_published = Counter(
            "task_events_published", "Life-cycle events published.", ["sink"], registry=self.registry
        )
        self.events_behind = Gauge(
            "task_events_behind", "Life-cycle events that a sink has yet to take.", ["sink"], registry=self.registry
        )
        self.events = Counter("task_operator_events", "Kubernetes Events.", ["result"], registry=self.registry)
        self.resyncs = Counter("task_operator_resyncs", "Full resyncs.", ["result"], registry=self.registry)
        self.projection_pending = Gauge(
            "task_operator_projection_pending", "Tasks not yet in PostgreSQL.", registry=self.registry
        )
        self.projection_bytes = Gauge(
            "task_operator_projection_pending_bytes", "Their size; 32 MiB are the most.", registry=self.registry
        )
        self.projection_lag = Gauge(
            "task_operator_projection_lag_seconds", "Age of the oldest of them.", registry=self.registry
        )
        self.watch_age = Gauge(
            "task_operator_watch_age_seconds", "Since the quietest watch brought a byte.", registry=self.registry
        )

    def watch_queue(self, count: Callable[[], Mapping[str, int]]) -> None:
        """Have ``task_queue_size`` counted when somebody asks."""
        self.registry.register(_QueueSize(count))

    def watch_projection(self, *, pending: Callable[[], float], size: Callable[[], float], lag: Callable[[], float]) -> None:
        """Have the gauges of the projection read when somebody asks: they matter most while nothing is written."""
        self.projection_pending.set_function(pending)
        self.projection_bytes.set_function(size)
        self.projection_lag.set_function(lag)

    def finished(self, *, type_: str, status: Status) -> None:
        """Count a task that has just reached its end by a write of this process."""
        match status.phase:
            case Phase.COMPLETED:
                self.succeeded.labels(type_).inc()
            case Phase.FAILED:
                self.failed.labels(type_, "Unknown" if status.error is None else status.error.reason).inc()
            case _:
                return
        if status.started_at is not None and status.finished_at is not None:
            self.duration.labels(type_).observe(max(0.0, (status.finished_at - status.started_at).total_seconds()))
