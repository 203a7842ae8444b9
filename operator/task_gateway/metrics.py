"""Prometheus metrics of the gateway. Labels have few values; no task, no knowledge base, no caller is named."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from task_gateway.hub import Drop, Hub


class Metrics:
    """All metrics, in a registry of their own, so that tests can have several gateways in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.submissions = Counter(
            "gateway_submissions", "Messages of the queue of tasks.", ["result"], registry=self.registry
        )
        self.requests = Counter("task_gateway_requests", "Requests.", ["method", "route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "task_gateway_request_seconds",
            "From the head of a request to the end of its answer; of streams to their beginning.",
            ["method", "route"],
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=self.registry,
        )
        self.in_flight = Gauge("task_gateway_requests_in_flight", "Requests under way.", registry=self.registry)
        self.accepted = Counter("task_gateway_tasks_accepted", "Tasks created.", registry=self.registry)
        self.limited = Counter("task_gateway_rate_limited", "Requests that came too fast.", registry=self.registry)

    def watch(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """Have a gauge read when somebody asks."""
        Gauge(name, help_text, registry=self.registry).set_function(value)

    def watch_hub(self, hub: Hub) -> None:
        """Have what live updates do read when somebody asks."""
        self.watch("task_gateway_live_clients", "WebSockets and event streams.", lambda: hub.subscribers)
        self.watch("task_gateway_live_connected", "1 while transitions arrive from PostgreSQL.", lambda: hub.connected)
        self.watch("task_gateway_live_updates", "Updates handed on since the start.", lambda: hub.updates)
        dropped = Gauge("task_gateway_live_dropped", "Clients parted with since the start.", ["why"], registry=self.registry)
        for why in Drop:
            dropped.labels(why.value).set_function(lambda why=why: hub.drops[why])  # type: ignore[misc]
