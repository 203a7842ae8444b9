"""What TaskClient asks of the way to the tasks, as programs.

There are two: REST (:mod:`service_client.rest`) and the Kubernetes API (:mod:`service_client.cluster`). Both pass the same
contract tests.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from service_client.programs import Emit, Program
from service_client.views import BatchItem, Order, Submitted, Task, TaskFilter


@dataclass(frozen=True, slots=True)
class Watched:
    """Which tasks a watch is about: one, those of a knowledge base, or all of the namespace."""

    task_id: str | None = None
    kb_id: str | None = None
    after: int | None = None
    """Number of the last event that was seen: the watch goes on behind it. None: it begins with the present states."""
    until: float | None = None
    """When it ends at the latest, by the monotonic clock."""


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list."""

    items: list[Task]
    cursor: str | None
    """Where the next page begins."""


class Transport(Protocol):
    """A way to the tasks of one namespace. Every program raises :class:`~service_client.errors.TaskClientError`."""

    batch: int
    """So many tasks go into one batch."""

    def submit(self, order: Order) -> Program[Submitted]:
        """Create a task, or find the one that the same order has created."""

    def submit_batch(self, orders: Sequence[Order]) -> Program[list[BatchItem]]:
        """Create tasks, at most ``batch``; items have the place of their order."""

    def get(self, task_id: str) -> Program[Task]:
        """Read a task."""

    def cancel(self, task_id: str) -> Program[Task]:
        """Ask for its end."""

    def retry(self, task_id: str, *, key: str) -> Program[Submitted]:
        """Create a task that does the same as one that has ended."""

    def page(self, wanted: TaskFilter, *, limit: int, cursor: str | None) -> Program[Page]:
        """Read part of a list."""

    def updates(self, watched: Watched) -> Program[None]:
        """Emit a :class:`~service_client.views.TaskUpdate` for the present states, then for what happens.

        That about one task ends with its end, or with TaskNotFound when it is deleted; all end at ``until``.
        """


def handled(program: Program[None], take: Callable[[Any], bool]) -> Program[None]:
    """Run a program and take what it emits here; it ends when ``take`` says True."""
    outcome: Any = None
    error: Exception | None = None
    try:
        while True:
            try:
                effect = program.send(outcome) if error is None else program.throw(error)
            except StopIteration:
                return
            outcome, error = None, None
            if isinstance(effect, Emit):
                if take(effect.value):
                    return
                continue
            try:
                outcome = yield effect
            except Exception as caught:  # noqa: BLE001  # whatever it is, the inner program decides
                error = caught
    finally:
        program.close()
