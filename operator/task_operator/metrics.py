"""Prometheus metrics of the operator. Labels have few values; no task, no knowledge base, no user is named."""

import collections
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from task_contract.models import Phase, Priority, Status, TaskType

_MOMENTS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_MINUTES: Final = (0.5, 1, 2.5, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)
_STAGE_SECONDS: Final = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_REQUEST_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)
_MOST_REASONS: Final = 64
"""Values of a label ``reason``. Reasons come from runners of other releases too: the rest is counted as OTHER."""
OTHER: Final = "Other"


@dataclass(frozen=True, slots=True)
class Waiting:
    """Tasks that wait to run."""

    sizes: collections.Counter[str] = field(default_factory=collections.Counter)
    """By priority, with those that wait for their next attempt."""
    oldest: dict[str, float] = field(default_factory=dict)
    """Seconds that the oldest has been in the queue, by priority."""
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)
    """By what they wait for."""


class Bounded:
    """Values of a label, of which the first so many are taken as they are and all others are one."""

    def __init__(self, most: int = _MOST_REASONS) -> None:
        self._most = most
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        """Return the value, or OTHER for one too many."""
        if value not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known.add(value)
        return value


class _Queue(Collector):
    """Counted when somebody asks: one walk over the tasks that are known."""

    def __init__(self, count: Callable[[], Waiting]) -> None:
        self._count = count
        self._reason = Bounded()

    def collect(self) -> Iterable[Metric]:
        waiting = self._count()
        size = GaugeMetricFamily("task_queue_size", "Tasks that wait to run.", labels=["priority"])
        oldest = GaugeMetricFamily(
            "task_queue_oldest_seconds", "Age in the queue of the task that came first.", labels=["priority"]
        )
        for priority in map(str, Priority):
            size.add_metric([priority], waiting.sizes[priority])
            oldest.add_metric([priority], waiting.oldest.get(priority, 0.0))
        counts: collections.Counter[str] = collections.Counter()
        for reason, number in waiting.reasons.items():
            counts[self._reason(reason)] += number
        reasons = GaugeMetricFamily("task_queue_waiting", "Tasks that wait to run, by what for.", labels=["reason"])
        for reason, number in counts.items():
            reasons.add_metric([reason], number)
        yield from (size, oldest, reasons)


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
        self.failed = Counter("task_failure", "Tasks that failed.", ["type"], registry=self.registry)
        self.failure_reasons = Counter(
            "task_failure_reasons", "Tasks that failed, by why.", ["reason"], registry=self.registry
        )
        self._reason, self._kind, self._outcome, self._stage, self._store = (
            Bounded(most) for most in (_MOST_REASONS, 16, 8, 32, 8)
        )
        for kind in map(str, TaskType):  # from the start on: the first of a kind is an increase too, not a beginning
            self.duration.labels(kind)
            self.succeeded.labels(kind)
            self.failed.labels(kind)
        self.status_lag = Histogram(
            "task_operator_status_lag_seconds",
            "From the news of a change to the written phase that tells of it.",
            ["phase"],
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self.registry,
        )
        self.requests = Counter(
            "task_operator_api_requests",
            "Requests to the Kubernetes API but for the watches; code none: no answer came.",
            ["verb", "resource", "code"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "task_operator_api_request_seconds",
            "One such request.",
            ["verb", "resource"],
            buckets=_REQUEST_SECONDS,
            registry=self.registry,
        )
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
        self.pool_offers = Counter(
            "task_pool_offers", "Attempts offered to worker pools.", ["result"], registry=self.registry
        )
        self.pool_reports = Counter("task_pool_reports", "Reports of workers.", ["kind"], registry=self.registry)
        self.pool_handovers = Counter(
            "task_pool_handovers", "Attempts that workers lost or gave back.", ["reason"], registry=self.registry
        )
        self.pool_wait_seconds = Histogram(
            "task_pool_queue_wait_seconds",
            "From when a task was put into the queue to when a worker took it.",
            ["priority"],
            buckets=_MOMENTS,
            registry=self.registry,
        )
        self.pool_run_seconds = Histogram(
            "task_pool_run_seconds",
            "From when a worker took a task to when it ended it.",
            ["type"],
            buckets=_MOMENTS,
            registry=self.registry,
        )
        self.schedule_runs = Counter(
            "task_schedule_runs",
            "Times of schedules: a task was made for them, or they were missed.",
            ["result"],
            registry=self.registry,
        )
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
        self.attempts = Counter(
            "task_attempts",
            "Attempts that pods and workers have ended, given back ones too.",
            ["type", "outcome"],
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "task_stage_seconds",
            "One stage of one attempt.",
            ["type", "stage"],
            buckets=_STAGE_SECONDS,
            registry=self.registry,
        )
        self.cpu_seconds = Counter("task_cpu_seconds", "Processor time of attempts.", ["type"], registry=self.registry)
        self.memory_byte_seconds = Counter(
            "task_memory_byte_seconds", "Memory of attempts, times time.", ["type"], registry=self.registry
        )
        self.memory_peak = Histogram(
            "task_memory_peak_bytes",
            "The most memory that an attempt held.",
            ["type"],
            buckets=[2**power << 20 for power in range(6, 15)],
            registry=self.registry,
        )
        self.tokens = Counter("task_embedding_tokens", "Tokens that were embedded.", ["type"], registry=self.registry)
        self.texts = Counter("task_embedding_texts", "Texts that were embedded.", ["type"], registry=self.registry)
        self.store_requests = Counter(
            "task_store_requests", "Requests of attempts to stores.", ["store"], registry=self.registry
        )
        self.store_seconds = Counter(
            "task_store_seconds",
            "Time of these requests, waits for a busy store included.",
            ["store"],
            registry=self.registry,
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
        self.database_down = Gauge(
            "task_operator_postgres_down_seconds",
            "For how long PostgreSQL has not answered.",
            registry=self.registry,
        )
        self.watch_age = Gauge(
            "task_operator_watch_age_seconds", "Since the quietest watch brought a byte.", registry=self.registry
        )
        self.leader = Gauge("task_operator_leader", "1: this process acts; 0: it stands by.", registry=self.registry)
        self.leader.set(1)
        self.lease_age = Gauge(
            "task_operator_lease_age_seconds", "Since the Lease was last seen to change.", registry=self.registry
        )
        self.terms = Counter("task_operator_terms", "How often this process became the leader.", registry=self.registry)

        ProcessCollector(registry=self.registry)

    def requested(self, verb: str, resource: str, code: str, seconds: float) -> None:
        """Count a request to the Kubernetes API."""
        self.requests.labels(verb, resource, code).inc()
        self.request_seconds.labels(verb, resource).observe(seconds)

    def used(self, row: Mapping[str, Any]) -> None:
        """Count what a process has used for an attempt: a row of ``task_usage``, its JSON read."""
        kind = self._kind(row["type"])
        self.attempts.labels(kind, self._outcome(row["outcome"])).inc()
        self.cpu_seconds.labels(kind).inc(row["cpu_seconds"])
        self.memory_byte_seconds.labels(kind).inc(row["memory_byte_seconds"])
        self.memory_peak.labels(kind).observe(row["memory_peak_bytes"])
        self.tokens.labels(kind).inc(row["tokens"])
        self.texts.labels(kind).inc(row["texts"])
        for stage, seconds in row["stages"].items():
            self.stage_seconds.labels(kind, self._stage(stage)).observe(seconds)
        for store, (number, seconds) in row["stores"].items():
            self.store_requests.labels(self._store(store)).inc(number)
            self.store_seconds.labels(self._store(store)).inc(seconds)

    def watch_queue(self, count: Callable[[], Waiting]) -> None:
        """Have the gauges of the queue counted when somebody asks."""
        self.registry.register(_Queue(count))

    def watch_projection(
        self, *, pending: Callable[[], float], size: Callable[[], float], lag: Callable[[], float], down: Callable[[], float]
    ) -> None:
        """Have the gauges of the projection read when somebody asks: they matter most while nothing is written."""
        self.database_down.set_function(down)
        self.projection_pending.set_function(pending)
        self.projection_bytes.set_function(size)
        self.projection_lag.set_function(lag)

    def watch_lease(self, *, leads: Callable[[], bool], age: Callable[[], float]) -> None:
        """Have the gauges of the election read when somebody asks."""
        self.leader.set_function(lambda: float(leads()))
        self.lease_age.set_function(age)

    def finished(self, *, type_: str, status: Status) -> None:
        """Count a task that has just reached its end by a write of this process."""
        match status.phase:
            case Phase.COMPLETED:
                self.succeeded.labels(type_).inc()
            case Phase.FAILED:
                self.failed.labels(type_).inc()
                self.failure_reasons.labels(self._reason("Unknown" if status.error is None else status.error.reason)).inc()
            case _:
                return
        if status.started_at is not None and status.finished_at is not None:
            self.duration.labels(type_).observe(max(0.0, (status.finished_at - status.started_at).total_seconds()))
